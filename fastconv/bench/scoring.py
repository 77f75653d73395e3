"""Multiple choice by letter: ours against one question at a time on the plain model."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from fastconv.bench.measure import Clock, Comparison, Peak, matmul_ceiling, measured, paired_ratio
from fastconv.bench.subject import Subject, shape
from fastconv.engine.model import Base
from fastconv.engine.score import LetterItem, score_letters
from fastconv.engine.stack import Stack
from fastconv.engine.shapes import Work, forward_flops_per_tok
from fastconv.chat import SystemTurn

SHORTEST_TOK, LONGEST_TOK = 50, 170
#: Tokens in one of our batches: what a CPU likes, and what fills a GPU.
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
#: Questions are timed in this many blocks, ours and theirs in turn.
_BLOCKS = 4


def bench_score(model: Subject, n_questions: int) -> Comparison:
    """Score `n_questions` of 50 to 170 tokens: packed batches, against one by one with last and with all logits."""
    stack, plain = Stack(model.base(), model.lora), model.plain()
    device = model.device
    items = [LetterItem(prompt, (11, 12, 13, 14)) for prompt in _prompts(stack.base, model, n_questions)]
    ways: dict[str, Callable[[list[LetterItem]], object]] = {
        "fastconv, packed": lambda block: score_letters(stack.base, block, BATCH_TOK[device.type]),
        "one by one, last logits": lambda block: [_alone(plain, item, device, last_only=True) for item in block],
        "one by one, all logits": lambda block: [_alone(plain, item, device, last_only=False) for item in block],
    }
    clocks = {name: Clock(device) for name in ways}
    peaks = {name: Peak(device) for name in ways}
    for name, way in ways.items():  # uncounted, and where memory is watched
        with peaks[name].watching():
            way(items[: max(4, n_questions // 16)])
    size = -(-n_questions // _BLOCKS)
    for begin in range(0, n_questions, size):
        for name, way in ways.items():
            with clocks[name].running():
                way(items[begin : begin + size])
    n_tok = sum(len(item.prompt) for item in items)
    flops = n_tok * forward_flops_per_tok(shape(stack.base), Work(n_tok / n_questions, n_questions / n_tok, 0))
    ceiling = matmul_ceiling(device, model.dtype)
    ours, *usual = (
        measured(name, clocks[name].seconds, n_questions, flops, ceiling, peaks[name].bytes) for name in ways
    )
    ratios = {way.name: paired_ratio(clocks[way.name].blocks, clocks[ours.name].blocks) for way in usual}
    return Comparison(
        kind="score", model=model.settings.id, device=device.type, dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(), unit="questions",
        work=f"{n_questions} questions of {SHORTEST_TOK} to {LONGEST_TOK} tokens, {n_tok} in all",
        ours=ours, usual=tuple(usual), ratio=next(iter(ratios.values())), ratios=ratios,
        extra={"matmul_flops": ceiling},
    )  # fmt: skip


def _prompts(base: Base, model: Subject, n_questions: int) -> list[tuple[int, ...]]:
    """Chat prompts of one persona around texts of random words; a model without a tokenizer gets random tokens.

    As in every evaluation, prompts share what the template and the system turn put first (24 tokens at random).
    """
    rng = random.Random(0)
    lengths = [rng.randint(SHORTEST_TOK, LONGEST_TOK) for _ in range(n_questions)]
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
def _alone(plain: torch.nn.Module, item: LetterItem, device: torch.device, *, last_only: bool) -> list[float]:
    """One question as a plain script scores it."""
    ids = torch.tensor([list(item.prompt)], device=device)
    logits = plain(input_ids=ids, use_cache=False, logits_to_keep=1 if last_only else 0).logits[0, -1]
    return torch.log_softmax(logits.float(), -1)[list(item.letters)].tolist()
