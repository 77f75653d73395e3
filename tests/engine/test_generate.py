"""Sampling: independent of the batch, of slots and of compaction; the distribution is the nucleus of the logits."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastconv.engine import attention, decode
from fastconv.engine import generate as module
from fastconv.engine.decode import DeviceDecoder, sample_tokens
from fastconv.engine.generate import Completion, sample
from fastconv.engine.prompts import PackedPrompts, pack_prompts
from fastconv.engine.stack import Slot, Stack
from fastconv.recipe import SamplingSettings
from tests.engine_kit import StandInDevice, packed_logits, plain_logits, plain_model, random_adapter, tiny_stack

SETTINGS = SamplingSettings(temperature=1.0, top_p=0.95, max_new_tok=24)


@pytest.fixture(scope="module", params=["tiny_qwen", "tiny_llama"])
def stack(request: pytest.FixtureRequest) -> Stack:
    """A stack whose base ends a row about every tenth token, so that rows finish at all times."""
    stack = tiny_stack(request.getfixturevalue(request.param))
    stack.base.tokenizer.stop_ids = (*stack.base.tokenizer.stop_ids, *range(0, 256, 12))
    return stack


def prompts(n: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(3, 50))] for _ in range(n)], list(range(100, 100 + n))


def test_rows_alone_are_rows_in_a_batch(stack: Stack) -> None:
    texts, seeds = prompts(12)
    with stack.live(Slot((random_adapter(stack, 1),))):
        together = sample(stack.base, texts, seeds, SETTINGS)
        alone = [sample(stack.base, [text], [seed], SETTINGS)[0] for text, seed in zip(texts, seeds, strict=True)]
        shuffled = sample(stack.base, texts[::-1], seeds[::-1], SETTINGS)[::-1]
    assert together == alone == shuffled
    assert len({row.ids for row in together}) > 8
    assert {row.ended for row in together} == {True, False}


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_waiting_prompts_take_the_places_of_finished_rows(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    texts, seeds = prompts(20)
    plenty = sample(stack.base, texts, seeds, SETTINGS)
    monkeypatch.setitem(module.MAX_ROWS, "cpu", slots)
    monkeypatch.setitem(module._PREFILL_TOK, "cpu", 60)
    assert sample(stack.base, texts, seeds, SETTINGS) == plenty


def test_drawn_tokens_are_those_of_a_plain_loop(
    stack: Stack, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cache, no packing, transformers' own attention: the whole row again for every token."""
    packed: list[PackedPrompts] = []
    folder = request.getfixturevalue("tiny_qwen" if stack.base.model.config.model_type == "qwen2" else "tiny_llama")
    model, (texts, seeds) = plain_model(folder), prompts(4, seed=1)
    texts = [[*range(100, 120), *text[:9]] for text in texts[:3]] + texts[
        3:
    ]  # on a CPU what begins alike is computed once
    monkeypatch.setattr(
        module, "pack_prompts", lambda base, rows: packed.append(pack_prompts(base, rows)) or packed[-1]
    )
    for text, seed, found in zip(texts, seeds, sample(stack.base, texts, seeds, SETTINGS), strict=True):
        uniforms = torch.rand(SETTINGS.max_new_tok, generator=torch.Generator().manual_seed(seed))
        ids, expected = list(text), Completion((), False)
        for step in range(SETTINGS.max_new_tok):
            token = int(sample_tokens(plain_logits(model, ids)[-1:], uniforms[step : step + 1], SETTINGS))
            if token in stack.base.tokenizer.stop_ids:
                expected = Completion(expected.ids, True)
                break
            ids.append(token)
            expected = Completion((*expected.ids, token), False)
        assert found == expected
    assert [len(one.ids) for one in packed] == [sum(map(len, texts)) - 2 * 20]


def test_the_seed_decides(stack: Stack) -> None:
    (text, *_), _ = prompts(1)
    first, again, other = sample(stack.base, [text] * 3, [7, 7, 8], SETTINGS)
    assert first == again != other


def test_equal_prompts_are_read_once(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, _ = prompts(3)
    read: list[int] = []
    monkeypatch.setattr(module, "pack_prompts", lambda base, rows: read.append(len(rows)) or pack_prompts(base, rows))
    drawn = sample(stack.base, [text for text in texts for _ in range(5)], [*range(15)], SETTINGS)
    assert read == [3]
    assert drawn[7] == sample(stack.base, [texts[1]], [7], SETTINGS)[0]


def test_max_new_tok_and_the_callback(stack: Stack) -> None:
    texts, seeds = prompts(5)
    heard: list[int] = []
    rows = sample(stack.base, texts, seeds, SETTINGS.model_copy(update={"max_new_tok": 3}), heard.append)
    assert all(len(row.ids) == 3 or row.ended for row in rows)
    assert sum(heard) == sum(len(row.ids) + row.ended for row in rows)
    assert sample(stack.base, [], [], SETTINGS) == []


def test_compaction_keeps_slots_dense(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    launch = decode.Decoder.launch

    def watched(self, slots):
        seen.append(len(slots))
        assert None not in slots
        return launch(self, slots)

    monkeypatch.setattr(decode.Decoder, "launch", watched)
    rows = sample(stack.base, *prompts(16), SETTINGS)
    assert seen == sorted(seen, reverse=True)
    assert sum(seen) == sum(max(len(row.ids) + row.ended - 1, 0) for row in rows), "finished rows must cost nothing"


def test_more_rows_than_slots_go_in_balanced_waves(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """21 rows in 10 slots make three waves of 7, not two of 10 and one row alone."""
    made: list[int] = []
    monkeypatch.setitem(module.MAX_ROWS, "cpu", 10)
    monkeypatch.setattr(module, "Cache", lambda n, length: made.append(n) or decode.Cache(n, length))
    sample(stack.base, *prompts(21), SETTINGS)
    assert made == [7]


@pytest.mark.parametrize(
    ("device", "gib", "prompt_tok", "rows"),
    [("cuda", 80, 100, 1536), ("cuda", 80, 2000, 1024), ("cuda", 24, 100, 1024), ("cpu", 80, 100, 64)],
)
def test_more_rows_are_decoded_at_once_where_their_cache_is_small(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, device: str, gib: int, prompt_tok: int, rows: int
) -> None:
    """28 layers of Qwen2.5-1.5B hold 28 KiB a token: 1,536 rows of 384 tokens are 16 GiB, of 2,304 they are 97."""
    base = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr(module, "_kv_bytes_per_tok", lambda base: 28 * 1024)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, gib * 2**30))
    row = decode.SampledRow(0, [1] * prompt_tok, torch.zeros(256))
    assert module._rows_at_once(base, [row]) == rows  # type: ignore[arg-type]


# --- with the state on the device ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_slots", [5, 12, 40])
def test_a_device_that_is_read_one_pass_late_gives_the_same_completions(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, n_slots: int
) -> None:
    """Rows end, move and are replaced while a pass is under way; sizes of graphs are larger than the rows in them."""
    texts, seeds = prompts(40)
    expected = sample(stack.base, texts, seeds, SETTINGS)
    device, heard = StandInDevice(stack), []

    def on_device(base, n_rows, max_length_tok, settings) -> DeviceDecoder:
        cache = decode.Cache(n_slots, max_length_tok)
        return DeviceDecoder(base, cache, settings, device)

    monkeypatch.setattr(decode, "_GRAPH_ROWS", (2, 4, 8, 16))
    monkeypatch.setattr(module, "_decoder", on_device)
    assert sample(stack.base, texts, seeds, SETTINGS, heard.append) == expected
    assert sum(heard) == sum(len(row.ids) + row.ended for row in expected)
    assert "replay" in device.calls
    assert device.calls.count("capture") <= 5, "one graph for each size"


def test_a_decoder_that_was_kept_makes_the_passes_of_a_new_one(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run goes on with a new decoder where the whole run had one of more rows: the passes must be the same."""
    monkeypatch.setattr(decode, "_GRAPH_ROWS", (2, 4, 8, 16, 32, 64))
    monkeypatch.setitem(module.MAX_ROWS, "cpu", 10)
    run, passes, found = DeviceDecoder._run, list[list[int]](), []
    monkeypatch.setattr(DeviceDecoder, "_run", lambda self, size: passes[-1].append(size) or run(self, size))
    for n_slots in (12, 16, 64):

        def on_device(base, n_rows, max_length_tok, settings, n_slots=n_slots) -> DeviceDecoder:
            kept = DeviceDecoder(base, decode.Cache(n_slots, max_length_tok), settings, StandInDevice(stack))
            assert kept.serves(12, max_length_tok, settings)
            return kept

        monkeypatch.setattr(module, "_decoder", on_device)
        passes.append([])
        found.append(sample(stack.base, *prompts(40), SETTINGS))
    assert found[0] == found[1] == found[2]
    assert passes[0] == passes[1] == passes[2]
    assert max(passes[0]) == 12, "all slots, where memory holds no more"


class _Card:
    """A base on a card that has room for so many tokens of its cache beside the weights, and torch's allocator.

    A token takes one byte, and its decoders compute nothing.
    """

    device = torch.device("cuda")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room_tok: int, weights_tok: int = 1000) -> None:
        weight = torch.empty(weights_tok, dtype=torch.int8, device="meta")
        self.room_tok, self.weights_tok, self.cached_tok, self.others_tok = room_tok, weights_tok, 0, 0
        self.model = SimpleNamespace(parameters=lambda: [weight])
        self.kept: dict[str, DeviceDecoder] = {}
        self.made: list[tuple[int, int]] = []
        monkeypatch.setattr(module, "OVERHEAD_BYTES", 0)
        monkeypatch.setattr(module, "_kv_bytes_per_tok", lambda base: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self._free_tok(), room_tok + weights_tok))
        monkeypatch.setattr(torch.cuda, "memory_reserved", self._reserved_tok)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(self, "cached_tok", 0))
        monkeypatch.setattr(module, "DeviceDecoder", self._decoder)

    def _held_tok(self) -> int:
        return sum(decoder.cache.n_tok for decoder in self.kept.values())

    def _reserved_tok(self, device: torch.device) -> int:
        return self.weights_tok + self._held_tok() + self.cached_tok

    def _free_tok(self) -> int:
        return self.room_tok - self._held_tok() - self.cached_tok - self.others_tok

    def require_length(self, n_tok: int) -> None:
        """Every length will do."""

    def _decoder(self, base: Any, cache: decode.Cache, settings: SamplingSettings) -> DeviceDecoder:
        self.made.append((cache.n_slots, cache.max_length_tok))
        decoder: Any = DeviceDecoder.__new__(DeviceDecoder)
        decoder.cache, decoder.n_slots, decoder.settings = cache, cache.n_slots, settings
        decoder.route, decoder.passed_over, decoder._state, decoder._loaded = object(), 0, torch.ones(1), set()
        return decoder

    def draw(self, n_rows: int, n_tok: int, temperature: float) -> list[int]:
        """What `sample` does with decoders; rows of the passes over 1, 2, ... up to all slots."""
        settings = SamplingSettings(temperature=temperature)
        decoder: Any = module._decoder(self, n_rows, n_tok, settings)  # type: ignore[arg-type]
        module._keep(self, decoder)  # type: ignore[arg-type]
        return [decoder.size(n) for n in range(1, decoder.n_slots + 1)]


def test_a_few_answers_between_evaluations_leave_their_decoder_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    card = _Card(monkeypatch, 2_000_000)
    for n_rows, n_tok, temperature in [(40, 300, 0.7), (1000, 300, 1.0), (200, 500, 0.7), (1000, 300, 1.0)]:
        card.draw(n_rows, n_tok, temperature)
    assert card.made == [(128, 320), (1024, 320), (256, 512)]


def test_a_decoder_that_is_not_asked_any_more_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    card = _Card(monkeypatch, 2_000_000)
    card.draw(1000, 300, 1.0)
    for _ in range(5):
        card.draw(200, 300, 0.7)
    assert card.made == [(1024, 320), *[(256, 320)] * 3]


def test_room_for_training_does_not_depend_on_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many adapters share their steps follows from it, and their bits from that."""
    card = _Card(monkeypatch, 2_000_000)
    alone = module.training_room_bytes(card)  # type: ignore[arg-type]
    card.cached_tok = 150_000
    card.draw(1000, 300, 1.0)
    assert card.kept
    assert module.training_room_bytes(card) == alone  # type: ignore[arg-type]
    held = max(decoder.cache.n_tok for decoder in card.kept.values())
    assert 0 < alone <= 2_000_000 - held  # what is kept fits beside it
    card.others_tok = 1_900_000
    assert module.training_room_bytes(card) < alone - 1_800_000 + 100_000  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(("n_rows", "n_tok"), [(1, 500), (9, 500), (100, 500), (384, 300), (384, 500), (1500, 1000)])
def test_slots_do_not_depend_on_what_was_kept(
    monkeypatch: pytest.MonkeyPatch, n_rows: int, n_tok: int, temperature: float
) -> None:
    """Nor on what torch's allocator kept of a training: a killed run that goes on has neither."""
    passes = []
    for before in ([], [(384, 300)], [(384, 500)], [(1500, 1000)], [(384, 300), (8, 300)], [(1500, 100), (8, 1000)]):
        for cached_tok in (0, 100_000):
            card = _Card(monkeypatch, 250_000, weights_tok=500_000)  # a large base, beside which all is kept
            for draw in before:
                card.draw(*draw, 1.0)
            card.cached_tok = min(cached_tok, card._free_tok())
            passes.append(card.draw(n_rows, n_tok, temperature))
    assert all(found == passes[0] for found in passes)


def test_other_programs_on_the_card_take_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    card = _Card(monkeypatch, 400_000)
    card.others_tok = 60_000
    assert len(card.draw(1500, 512, 1.0)) == 512, "as on a card of its own"
    card.others_tok = 300_000
    assert len(card.draw(1500, 512, 0.5)) == 128


def test_a_decoder_that_reads_its_whole_cache_serves_rows_of_that_length_alone() -> None:
    """Over a longer cache the same keys are summed in another order."""
    keys = torch.zeros(1, 1, 8)
    for limits, read_whole in ((attention.NO_LIMITS, False), (attention.Limits(softcap=30.0), True)):
        cache = decode.Cache(4, 128)
        cache.reserve(0, keys, keys)
        decode.Decode(cache, torch.zeros(1, dtype=torch.int64), 0).attend(0, keys, keys, keys, 1.0, limits)
        assert cache.read_whole == read_whole
        kept: Any = DeviceDecoder.__new__(DeviceDecoder)
        kept.cache, kept.settings, kept._state, kept._loaded = cache, SETTINGS, torch.ones(1), set()
        assert kept.serves(4, 128, SETTINGS)
        assert kept.serves(4, 64, SETTINGS) != read_whole


def test_a_decoder_goes_where_there_is_no_room_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots follow from the call alone, whatever was kept before it."""
    card = _Card(monkeypatch, 400_000)
    card.draw(384, 300, 1.0)
    card.draw(512, 500, 0.7)
    assert card.made == [(384, 320), (512, 512)]
    assert "decoder" not in card.kept


def test_slots_follow_from_the_rows_wherever_these_fit() -> None:
    assert {decode.slots_for(500, n_fit) for n_fit in (512, 600, 1024, 10**6)} == {512}
    assert decode.slots_for(500, 511) == 384
    assert decode.slots_for(500, 5) == 5
    assert [decode.slots_for(1500, n_fit) for n_fit in (20, 60, 122, 200)] == [16, 48, 96, 192]
    assert decode.slots_for(40, 122) == 48, "no more than the rows need"
    assert decode.slots_for(3000, 10**6) == 3000


# --- the draw itself -------------------------------------------------------------------------------------------------


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities [vocab] cut to the nucleus and normalised, by the definition."""
    order = sorted(range(len(probabilities)), key=lambda i: -float(probabilities[i]))
    kept, mass = torch.zeros_like(probabilities), 0.0
    for index in order:
        if mass >= top_p:
            break
        kept[index] = probabilities[index]
        mass += float(probabilities[index])
    return kept / kept.sum()


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [4, 512])
def test_draws_follow_the_nucleus(monkeypatch: pytest.MonkeyPatch, top_p: float, top_k: int) -> None:
    monkeypatch.setattr(decode, "_TOP_K", top_k)  # 4: rows with a wider nucleus take the sorting way
    settings = SamplingSettings(temperature=0.7, top_p=top_p)
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    uniform = (torch.arange(20_000) + 0.5) / 20_000  # every quantile once: the frequencies are then exact
    drawn = sample_tokens(logits.expand(20_000, -1), uniform, settings)
    found = torch.bincount(drawn, minlength=12) / 20_000
    assert float((found - nucleus(torch.softmax(logits[0] / 0.7, -1), top_p)).abs().max()) < 2e-4


def test_both_ways_of_finding_the_nucleus_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(64, 2000, generator=generator) * torch.linspace(0.5, 8, 64)[:, None]
    uniform, settings = torch.rand(64, generator=generator), SamplingSettings(temperature=1.0)
    narrow = sample_tokens(logits, uniform, settings)
    monkeypatch.setattr(decode, "_TOP_K", 2000)
    assert sample_tokens(logits, uniform, settings).equal(narrow)


def test_a_sharp_distribution_always_gives_its_first_token() -> None:
    logits = torch.tensor([[0.0, 50.0, 1.0]])
    for uniform in (0.0, 0.5, 0.99999994):
        assert int(sample_tokens(logits, torch.tensor([uniform]), SamplingSettings())) == 1


@pytest.mark.parametrize("top_k", [2, 512])
def test_temperature_0_takes_the_most_likely_token_whatever_the_seed(
    monkeypatch: pytest.MonkeyPatch, top_k: int
) -> None:
    monkeypatch.setattr(decode, "_TOP_K", top_k)
    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(2)) * 0.01
    logits[0] = 0.0  # all equal: the first one
    for uniform in (0.0, 0.5, 0.99999994):
        drawn = sample_tokens(logits, torch.full((64,), uniform), SamplingSettings(temperature=0.0, top_p=0.5))
        assert drawn.equal(logits.argmax(-1))


def test_sampling_goes_through_the_live_stack(stack: Stack) -> None:
    texts, seeds = prompts(6)
    bare = sample(stack.base, texts, seeds, SETTINGS)
    with stack.live(Slot((random_adapter(stack, 1, size=0.1),))):
        assert sample(stack.base, texts, seeds, SETTINGS) != bare
    assert sample(stack.base, texts, seeds, SETTINGS) == bare
    assert len(packed_logits(stack.base, texts)) == 6
