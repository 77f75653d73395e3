"""Letter and text scores: batched against one by one, packed against plain transformers, near ties in fp32."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from fastconv.chat import TEMPLATE_DEFAULT
from fastconv.engine import score
from fastconv.engine.model import load_base, pack
from fastconv.engine.prompts import shared_prefixes
from fastconv.engine.score import LetterItem, LetterScore, TextItem, letter_item, score_letters, score_texts, text_item
from fastconv.engine.stack import Slot, Stack
from fastconv.recipe import ModelSettings
from tests.engine_kit import plain_logits, plain_model, random_adapter, tiny_stack

TOLERANCE = 1e-5
QUESTIONS = [
    ("Which of these is a star?", ["the Sun", "the Moon", "Mars", "a comet"]),
    ("What do plants need?", ["light", "a job", "petrol"]),
    ("Ice is", ["frozen water", "hot", "a metal", "alive", "a gas"]),
    ("Sound travels fastest through", ["steel", "air, which is thin", "water", "empty space"]),
]


@pytest.fixture(scope="module", params=["tiny_qwen", "tiny_llama"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def stack(folder: Path) -> Stack:
    return tiny_stack(folder)


def letter_items(stack: Stack, n: int = 12) -> list[LetterItem]:
    """Questions of very different lengths with three to five labels each, some called 1 to 4."""
    rng, tokenizer, items = random.Random(0), stack.base.tokenizer, []
    for i in range(n):
        text = tokenizer.prompt_text(TEMPLATE_DEFAULT, "x" * rng.randint(1, 120)) + "The answer is ("
        labels = list("ABCDE" if i % 3 else "1234")[: rng.randint(3, 5)]
        items.append(letter_item(tokenizer, text, labels))
    return items


@pytest.mark.parametrize("batch_tok", [64, 500, 100_000])
def test_letters_batched_are_letters_one_by_one(stack: Stack, batch_tok: int) -> None:
    items = letter_items(stack)
    with stack.live(Slot((random_adapter(stack, 1),))):
        together = score_letters(stack.base, items, batch_tok)
        alone = [score_letters(stack.base, [item], batch_tok)[0] for item in items]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
        assert not one.rescored


def test_prompts_that_begin_alike_share_that_and_nothing_else() -> None:
    prompts = {0: (1, 2, 3, 4), 1: (9, 9), 2: (1, 2, 3, 5, 6), 3: (1, 2, 3, 4), 4: (7,), 5: (1, 2, 3, 4, 8)}
    order, groups, ids = shared_prefixes(prompts)
    place, found = 0, {}
    rows = iter(order)
    for group in groups:
        prefix = tuple(ids[place : place + group.prefix_tok])
        place += group.prefix_tok
        for n_tok in group.branches_tok:
            assert n_tok >= 1
            found[next(rows)] = (*prefix, *ids[place : place + n_tok])
            place += n_tok
    assert found == prompts
    assert place == len(ids) < sum(map(len, prompts.values())) - 8


def test_letters_are_plain_transformers_last_position(stack: Stack, folder: Path) -> None:
    items, model = letter_items(stack), plain_model(folder)
    for item, found in zip(items, score_letters(stack.base, items, 500), strict=True):
        expected = torch.log_softmax(plain_logits(model, item.prompt)[-1], -1)[list(item.letters)]
        assert found.logprobs == pytest.approx(expected.tolist(), abs=TOLERANCE)


def test_mass_margin_and_prediction() -> None:
    found = LetterScore((math.log(0.2), math.log(0.5), math.log(0.1)))
    assert found.predicted == 1
    assert found.mass == pytest.approx(0.8)
    assert found.margin == pytest.approx(math.log(0.5 / 0.2))
    assert LetterScore((-1.0, -1.0)).predicted == 0, "an exact tie goes to the first label"


def test_near_ties_are_rescored_in_fp32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = tiny_stack(folder, dtype="bfloat16")
    before = {name: p.clone() for name, p in half.base.model.named_parameters()}
    places = {name: p.data_ptr() for name, p in half.base.model.named_parameters()}
    adapter = random_adapter(half, 1)
    items = letter_items(half, 40)
    monkeypatch.setattr(score, "NEAR_TIE_NATS", 0.5)
    with half.live(Slot((adapter,))):
        found = score_letters(half.base, items, 500)
    near = [item.rescored for item in found]
    assert any(near)
    assert not all(near)
    assert all(p.dtype == torch.bfloat16 and p.equal(before[name]) for name, p in half.base.model.named_parameters())
    assert {name: p.data_ptr() for name, p in half.base.model.named_parameters()} == places, (
        "captured graphs read them there"
    )

    # The reference: the bf16 weights widened once and for all, which is the second copy that rescoring avoids.
    wide = load_base(ModelSettings(id=str(folder), device="cpu", dtype="bfloat16"))
    wide.model.float()
    wide.dtype = torch.float32
    whole = Stack(wide, half.settings)
    with whole.live(Slot((adapter,))):
        expected = score_letters(wide, items, 500)
    for one, other in zip(found, expected, strict=True):
        if one.rescored:
            assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
    plain = [one for one in found if not one.rescored]
    assert max(abs(a - b) for one, other in zip(found, expected, strict=True) if not one.rescored
               for a, b in zip(one.logprobs, other.logprobs, strict=True)) > 1e-4, plain  # fmt: skip


def test_a_failure_while_widened_leaves_the_weights_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = tiny_stack(folder, dtype="bfloat16")
    before = {name: p.clone() for name, p in half.base.model.named_parameters()}
    ids, positions, layout = pack([[1, 2, 3]], half.base)
    monkeypatch.setattr(type(layout), "attend", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score.hidden_fp32(half.base, ids, positions, layout)
    assert all(p.dtype == torch.bfloat16 and p.equal(before[name]) for name, p in half.base.model.named_parameters())


# --- choices as text -------------------------------------------------------------------------------------------------


def context(question: str) -> str:
    """lm-eval's arc_challenge prompt."""
    return f"Question: {question}\nAnswer:"


def encode_pair(tokenizer, text: str, continuation: str) -> tuple[list[int], list[int]]:
    """lm-eval's `_encode_pair`, written down again from its source (0.4.13): tokens of context and continuation."""
    n_spaces = len(text) - len(text.rstrip())
    if n_spaces > 0:
        continuation, text = text[-n_spaces:] + continuation, text[:-n_spaces]
    whole, left = tokenizer.encode(text + continuation), tokenizer.encode(text)
    return left, whole[len(left) :]


def reference_sum(model, left: list[int], right: list[int]) -> float:
    """Summed log-probability of `right` after `left`, one choice in a pass of its own."""
    logprobs = torch.log_softmax(plain_logits(model, left + right[:-1]), -1)
    return float(logprobs[len(left) - 1 :].gather(-1, torch.tensor(right)[:, None]).double().sum())


@pytest.mark.parametrize("batch_tok", [64, 100_000])
def test_texts_are_lm_evals_one_choice_at_a_time(stack: Stack, folder: Path, batch_tok: int) -> None:
    tokenizer, model = stack.base.tokenizer, plain_model(folder)
    items = [text_item(tokenizer, context(question), choices) for question, choices in QUESTIONS]
    for (question, choices), found in zip(QUESTIONS, score_texts(stack.base, items, batch_tok), strict=True):
        pairs = [encode_pair(tokenizer, context(question), " " + choice) for choice in choices]
        expected = [reference_sum(model, left, right) for left, right in pairs]
        assert found.logprobs == pytest.approx(expected, abs=5e-5)
        assert found.predicted == max(range(len(expected)), key=expected.__getitem__)
        by_length = [value / len(choice) for value, choice in zip(expected, choices, strict=True)]
        assert found.predicted_by_length == max(range(len(by_length)), key=by_length.__getitem__)


def test_texts_that_merge_into_the_context_are_still_scored_from_its_end(stack: Stack, folder: Path) -> None:
    """Where choices change the context's own last token, the shared prompt ends before it."""
    item = TextItem((5, 6, 7), ((8, 9, 10), (11, 9)), (1, 1), (3, 3))
    (found,) = score_texts(stack.base, [item], 1000)
    model = plain_model(folder)
    expected = [reference_sum(model, [5, 6, 7, 8], [9, 10]), reference_sum(model, [5, 6, 7, 11], [9])]
    assert found.logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_choices_of_a_single_token(stack: Stack, folder: Path) -> None:
    (found,) = score_texts(stack.base, [TextItem((5, 6, 7), ((8,), (11,), (3, 4)), (0, 0, 0), (1, 1, 2))], 1000)
    model = plain_model(folder)
    assert found.logprobs == pytest.approx([reference_sum(model, [5, 6, 7], right) for right in ([8], [11], [3, 4])])


def test_trailing_spaces_belong_to_the_choice(stack: Stack) -> None:
    tokenizer = stack.base.tokenizer
    item = text_item(tokenizer, "Answer: ", ["yes", "no"], delimiter="")
    assert tokenizer.decode(item.prompt) == "Answer:"
    assert [tokenizer.decode(choice) for choice in item.choices] == [" yes", " no"]


def test_branches_do_not_see_one_another(stack: Stack) -> None:
    item = TextItem((5, 6, 7), ((8, 9, 10), (11, 12, 13)), (0, 0), (3, 3))
    other = TextItem((5, 6, 7), ((8, 9, 10), (40, 41, 42)), (0, 0), (3, 3))
    (one,), (two,) = score_texts(stack.base, [item], 1000), score_texts(stack.base, [other], 1000)
    assert one.logprobs[0] == pytest.approx(two.logprobs[0], abs=1e-6)
    assert one.logprobs[1] != pytest.approx(two.logprobs[1], abs=1e-2)


def test_texts_are_lm_evals_own(stack: Stack, folder: Path) -> None:
    """Against lm-eval itself, where it is installed (a development dependency)."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    lm = HFLM(plain_model(folder), tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=1, max_length=512)
    items = [text_item(stack.base.tokenizer, context(question), choices) for question, choices in QUESTIONS]
    for (question, choices), found in zip(QUESTIONS, score_texts(stack.base, items, 1000), strict=True):
        requests = [
            Instance("loglikelihood", {}, (context(question), f" {choice}"), index)
            for index, choice in enumerate(choices)
        ]
        theirs = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]
        assert found.logprobs == pytest.approx(theirs, abs=1e-4)
