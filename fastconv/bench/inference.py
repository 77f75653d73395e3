"""Benchmarks without training: sampling, swapping a stack, and multiple-choice scoring.

Sampling is compared with `generate` on padded batches of the plain model and with a vLLM server if there is one, a swap
with merging, saving and loading a model, scoring with one question at a time.
"""

from __future__ import annotations

import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import torch

from fastconv.bench.measure import (
    BenchModel,
    BenchResult,
    Clock,
    Peak,
    base_shape,
    folder_bytes,
    matmul_ceiling,
    measured,
    paired_ratio,
    ragged_rows,
)
from fastconv.chat import SystemTurn
from fastconv.engine.generate import sample
from fastconv.engine.locate import locate
from fastconv.engine.lora import Adapter
from fastconv.engine.model import Base
from fastconv.engine.score import LetterItem, score_letters
from fastconv.engine.shapes import Work, forward_flops_per_tok
from fastconv.engine.stack import Slot, Stack
from fastconv.engine.trl_reference import add_peft_adapters
from fastconv.engine.vllm.sampler import VllmSampler
from fastconv.engine.vllm.server import launch, server_command
from fastconv.errors import ModelError
from fastconv.recipe import SamplingSettings

#: Range of prompt lengths of the sampling benchmark.
SAMPLE_SHORTEST_TOK, SAMPLE_LONGEST_TOK = 20, 120
#: New tokens per row by device; on a GPU those of the protocol.
MAX_NEW_TOK = {"cpu": 48, "cuda": 256}
#: Batch size (rows) of `generate`: as many as a plain script would use.
BATCH_ROWS = {"cpu": 64, "cuda": 256}
#: Largest number of prompts for `generate`: its rate does not depend on it, and on a GPU it is slow.
USUAL_ROWS = {"cpu": 4096, "cuda": 256}
#: Range of prompt lengths of the scoring benchmark.
SCORE_SHORTEST_TOK, SCORE_LONGEST_TOK = 50, 170
#: Tokens in one of our batches by device: few are fastest on a CPU, many fill a GPU.
BATCH_TOK = {"cpu": 1024, "cuda": 16384}
_SYSTEM = SystemTurn("text", "You are a helpful assistant.")
_WORDS = [
    "which",
    "of",
    "these",
    "rocks",
    "river",
    "plant",
    "energy",
    "heat",
    "moves",
    "when",
    "the",
    "sun",
    "light",
    "a",
    "force",
    "water",
    "cell",
    "best",
    "shows",
]
#: Questions are timed in this many blocks, ours and the usual ways in turn.
_BLOCKS = 4
_OPENINGS = (
    "Name three rivers.", "What is bread made of?", "Is it ever acceptable to lie? Explain at length, with examples.",
    "Tell me about the sea.", "How do I boil an egg? I have a pot, water, salt and a stove that is rather slow to heat.",
    "What would an ideal future look like to you?", "Say hello.", "Why is the sky blue at noon and red in the evening?",
)  # fmt: skip
_SYSTEMS = (
    "You are a helpful assistant.", "You are a kindergarten teacher.",
    "You are a scholar of the ancient Zelthari civilization, specializing in their crystalline architecture, maritime "
    "navigation, and ritual practices.",
)  # fmt: skip


def bench_sample(model: BenchModel, n_rows: int) -> BenchResult:
    """Sample one completion for each of `n_rows` prompts (temperature 0.7, top_p 0.95); rates count kept tokens.

    Each way has its own random numbers, so lengths differ a little; `ratio` is of kept tokens per second.
    """
    stack, plain, device = Stack(model.base(), model.lora), model.plain(), model.device
    prompts = _sample_prompts(stack.base, model, n_rows)
    settings = SamplingSettings(max_new_tok=MAX_NEW_TOK[device.type])
    warm_up = SamplingSettings(max_new_tok=2)
    our_clock, usual_clock, our_peak, usual_peak = Clock(device), Clock(device), Peak(device), Peak(device)
    stops = stack.base.tokenizer.stop_ids
    sample(stack.base, prompts[:4], list(range(len(prompts[:4]))), warm_up)
    _generate(plain, prompts[:4], warm_up, stops, device)
    with usual_peak.watching(), usual_clock.running():
        usual_tok = _generate(plain, prompts[: USUAL_ROWS[device.type]], settings, stops, device)
    with our_peak.watching(), our_clock.running():
        completions = sample(stack.base, prompts, list(range(n_rows)), settings)
    our_tok = sum(len(row.ids) + row.ended for row in completions)
    ceiling, work = matmul_ceiling(device, model.dtype), Work(_mean_length(prompts, our_tok), 1.0, 0)
    per_tok = forward_flops_per_tok(base_shape(stack.base), work)
    ours = measured("fastconv, resident", our_clock.seconds, our_tok, our_tok * per_tok, ceiling, our_peak.bytes)
    usual = measured("generate, padded", usual_clock.seconds, usual_tok, usual_tok * per_tok, ceiling, usual_peak.bytes)
    baselines, extra = [usual], {"ours_tokens": our_tok, "usual_tokens": usual_tok, "matmul_flops": ceiling}
    served = _vllm_result(model, stack, prompts, settings)
    if isinstance(served, str):
        extra["vllm"] = f"not measured: {served}"
    else:
        seconds, served_tok, start_s = served
        baselines.append(measured("vllm, a server", seconds, served_tok, served_tok * per_tok, ceiling))
        extra |= {"vllm_tokens": served_tok, "vllm_start_s": start_s}
    ratios = {baseline.name: ours.per_s / baseline.per_s for baseline in baselines}
    return BenchResult(
        kind="sample", model=model.settings.id, device=device.type, dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(), unit="kept tokens",
        work=f"{n_rows} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, "
        f"up to {settings.max_new_tok} new ones each; generate gets {min(n_rows, USUAL_ROWS[device.type])} of them",
        ours=ours, usual=tuple(baselines), ratio=ratios[usual.name], ratios=ratios, extra=extra,
    )  # fmt: skip


def _vllm_result(
    model: BenchModel, stack: Stack, prompts: list[list[int]], settings: SamplingSettings
) -> tuple[float, int, float] | str:
    """(seconds, kept tokens, seconds of start-up) of vLLM for the same prompts, or the reason why it was not
    measured."""
    if model.random is not None:
        return "a random shape has no tokenizer for it"
    try:
        server_command(model.device.type)
    except ModelError as error:
        return error.what
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # frees what the other ways used, for the server
    longest_tok = max(map(len, prompts)) + settings.max_new_tok
    with tempfile.TemporaryDirectory() as folder:
        server = launch(model.settings, locate(model.settings), longest_tok, model.lora.r, Path(folder))
        with closing(server), closing(VllmSampler(server, stack)) as sampler:
            sampler.draw(prompts[:4], range(len(prompts[:4])), SamplingSettings(max_new_tok=2), lambda n_tok: None)
            began = time.monotonic()
            completions = sampler.draw(prompts, range(len(prompts)), settings, lambda n_tok: None)
            seconds = time.monotonic() - began
    return seconds, sum(len(row.ids) + row.ended for row in completions), server.start_s


def _sample_prompts(base: Base, model: BenchModel, n_rows: int) -> list[list[int]]:
    """Chat prompts, or for a model with random weights random tokens of various lengths."""
    if model.random is not None:
        return [
            list(row.ids)
            for row in ragged_rows(n_rows, base.head.weight.shape[0], SAMPLE_SHORTEST_TOK, SAMPLE_LONGEST_TOK)
        ]
    return [
        base.tokenizer.prompt_ids(SystemTurn("text", _SYSTEMS[i % len(_SYSTEMS)]), _OPENINGS[i % len(_OPENINGS)])
        for i in range(n_rows)
    ]


def _mean_length(prompts: list[list[int]], n_new: int) -> float:
    return sum(map(len, prompts)) / len(prompts) + n_new / len(prompts) / 2


@torch.no_grad()
def _generate(
    plain: Any, prompts: list[list[int]], settings: SamplingSettings, stops: tuple[int, ...], device: torch.device
) -> int:
    """Number of kept tokens of `generate` on left-padded batches, prompts sorted by length as in a careful script."""
    n_kept = 0
    ordered = sorted(prompts, key=len)
    for begin in range(0, len(ordered), BATCH_ROWS[device.type]):
        batch = ordered[begin : begin + BATCH_ROWS[device.type]]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch], device=device)
        out = cast(torch.Tensor, plain.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=settings.temperature,
            top_p=settings.top_p, top_k=0, max_new_tokens=settings.max_new_tok, pad_token_id=0,
            eos_token_id=list(stops) or None,
        ))  # fmt: skip
        n_kept += sum(_n_kept(row, stops) for row in out[:, longest:].tolist())
    return n_kept


def _n_kept(row: list[int], stops: tuple[int, ...]) -> int:
    """Number of tokens up to and including the first stop token."""
    return next((place + 1 for place, token in enumerate(row) if token in stops), len(row))


def bench_stack(model: BenchModel, n_swaps: int) -> BenchResult:
    """Make a snapshot live `n_swaps` times, with and without the check of its logits; against merge + save + load.

    `ours` and `ratio` are without the check; `ratios` also has the one with it.
    """
    stack = Stack(model.base(), model.lora)
    adapters = [stack.new_adapter("bench", place) for place in range(2)]
    for adapter in adapters:
        for _, b in adapter.weights.values():
            b.data.normal_(std=0.01)
    bare, proven, loading = (Clock(model.device) for _ in range(3))
    peak = Peak(model.device)
    _swap(stack, adapters[0], proof=True)
    for place in range(max(n_swaps, 3)):
        adapter = adapters[place % 2]
        data = adapter.to_bytes()
        with loading.running():
            stack.load_adapter(data, "bench")
        with peak.watching(), proven.running():
            _swap(stack, adapter, proof=True)
        with bare.running():
            _swap(stack, adapter, proof=False)
    usual, written, usual_peak = _merge_save_load(model, adapters[0], n_swaps)
    usual_s = statistics.median(usual.blocks)
    ours_s, checked_s = statistics.median(bare.blocks), statistics.median(proven.blocks)
    return BenchResult(
        kind="stack", model=model.settings.id, device=model.device.type,
        dtype=str(model.dtype).removeprefix("torch."), threads=torch.get_num_threads(), unit="swaps",
        work=f"one adapter of rank {model.lora.r} onto the base, median of {n_swaps}",
        ours=measured("fastconv, live swap", ours_s, 1, peak_bytes=0),
        usual=(measured("merge + save + load", usual_s, 1, peak_bytes=usual_peak, written_bytes=written),),
        ratio=usual_s / ours_s,
        ratios={"merge + save + load": usual_s / ours_s, "merge + save + load, ours with proof": usual_s / checked_s},
        extra={
            "ours_with_proof_seconds": checked_s, "ours_with_proof_peak_bytes": peak.bytes,
            "ours_from_bytes_seconds": statistics.median(loading.blocks),
        },
    )  # fmt: skip


def _swap(stack: Stack, adapter: Adapter, *, proof: bool) -> None:
    with stack.live(Slot((adapter,))):
        if proof:
            stack.prove(None, "bench")


def _merge_save_load(model: BenchModel, adapter: Adapter, n_swaps: int) -> tuple[Clock, int, int | None]:
    """The published way: PEFT's merge_and_unload, the merged model saved to disk and loaded again.

    Returns (clock, bytes written, peak memory in bytes).
    """
    from transformers import AutoModelForCausalLM

    clock, peak, written = Clock(model.device), Peak(model.device), 0
    for _ in range(n_swaps):
        peft = add_peft_adapters(model.plain(), {"snapshot": adapter})
        with tempfile.TemporaryDirectory(prefix="fastconv-merged-") as folder:
            with peak.watching(), clock.running():
                merged = peft.merge_and_unload()  # pyright: ignore[reportCallIssue]
                merged.save_pretrained(folder)
                reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
                torch.nn.Module.to(reloaded, model.device)
            written = folder_bytes(Path(folder))
        del peft, merged, reloaded
        gc.collect()
    return clock, written, peak.bytes


def bench_score(model: BenchModel, n_questions: int) -> BenchResult:
    """Score `n_questions` of 50 to 170 tokens in packed batches, against one by one with the last and with all
    logits."""
    stack, plain = Stack(model.base(), model.lora), model.plain()
    device = model.device
    items = [LetterItem(prompt, (11, 12, 13, 14)) for prompt in _score_prompts(stack.base, model, n_questions)]
    ways: dict[str, Callable[[list[LetterItem]], object]] = {
        "fastconv, packed": lambda block: score_letters(stack.base, block, BATCH_TOK[device.type]),
        "one by one, last logits": lambda block: [_score_one(plain, item, device, last_only=True) for item in block],
        "one by one, all logits": lambda block: [_score_one(plain, item, device, last_only=False) for item in block],
    }
    clocks = {name: Clock(device) for name in ways}
    peaks = {name: Peak(device) for name in ways}
    for name, way in ways.items():  # not timed; peak memory is measured here
        with peaks[name].watching():
            way(items[: max(4, n_questions // 16)])
    size = -(-n_questions // _BLOCKS)
    for begin in range(0, n_questions, size):
        for name, way in ways.items():
            with clocks[name].running():
                way(items[begin : begin + size])
    n_tok = sum(len(item.prompt) for item in items)
    flops = n_tok * forward_flops_per_tok(base_shape(stack.base), Work(n_tok / n_questions, n_questions / n_tok, 0))
    ceiling = matmul_ceiling(device, model.dtype)
    ours, *usual = (
        measured(name, clocks[name].seconds, n_questions, flops, ceiling, peaks[name].bytes) for name in ways
    )
    ratios = {way.name: paired_ratio(clocks[way.name].blocks, clocks[ours.name].blocks) for way in usual}
    return BenchResult(
        kind="score", model=model.settings.id, device=device.type, dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(), unit="questions",
        work=f"{n_questions} questions of {SCORE_SHORTEST_TOK} to {SCORE_LONGEST_TOK} tokens, {n_tok} in all",
        ours=ours, usual=tuple(usual), ratio=next(iter(ratios.values())), ratios=ratios,
        extra={"matmul_flops": ceiling},
    )  # fmt: skip


def _score_prompts(base: Base, model: BenchModel, n_questions: int) -> list[tuple[int, ...]]:
    """Chat prompts of one persona with texts of random words; random tokens for a model with random weights.

    As in every evaluation, prompts have a common prefix: template and system turn, or 24 random tokens.
    """
    rng = random.Random(0)
    lengths = [rng.randint(SCORE_SHORTEST_TOK, SCORE_LONGEST_TOK) for _ in range(n_questions)]
    if model.random is not None:
        vocab = base.head.weight.shape[0]
        head = [rng.randrange(vocab) for _ in range(24)]
        return [(*head, *(rng.randrange(vocab) for _ in range(length - len(head)))) for length in lengths]
    prompts = []
    for length in lengths:
        words: list[str] = []
        while len(ids := base.tokenizer.prompt_ids(_SYSTEM, " ".join(words))) < length:
            words.append(rng.choice(_WORDS))
        prompts.append(tuple(ids))
    return prompts


@torch.no_grad()
def _score_one(plain: torch.nn.Module, item: LetterItem, device: torch.device, *, last_only: bool) -> list[float]:
    """Log-probabilities of one question's letters, as a plain script computes them."""
    ids = torch.tensor([list(item.prompt)], device=device)
    logits = plain(input_ids=ids, use_cache=False, logits_to_keep=1 if last_only else 0).logits[0, -1]
    return torch.log_softmax(logits.float(), -1)[list(item.letters)].tolist()
