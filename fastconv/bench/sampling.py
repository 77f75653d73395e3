"""Sampling: ours against `generate` on padded batches of the plain model, and against a vLLM server if there is one."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import torch

from fastconv.bench.measure import Clock, Comparison, Peak, matmul_ceiling, measured
from fastconv.bench.subject import Subject, ragged_rows, shape
from fastconv.engine.model import Base
from fastconv.engine.vllm.launch import launch
from fastconv.engine.locate import locate
from fastconv.engine.generate import sample
from fastconv.engine.vllm.server import server_command
from fastconv.engine.vllm.sampler import Served
from fastconv.engine.stack import Stack
from fastconv.errors import ModelError
from fastconv.recipe import SamplingSettings
from fastconv.engine.shapes import Work, forward_flops_per_tok
from fastconv.chat import SystemTurn

SHORTEST_TOK, LONGEST_TOK = 20, 120
#: New tokens per row; a GPU draws the length that the protocol has.
MAX_NEW_TOK = {"cpu": 48, "cuda": 256}
#: Rows that `generate` gets at once: as many as a plain script would give it.
BATCH_ROWS = {"cpu": 64, "cuda": 256}
#: Prompts that `generate` gets at most: its rate does not depend on their number, and on a GPU it takes a while.
USUAL_ROWS = {"cpu": 4096, "cuda": 256}
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


def bench_sample(model: Subject, n_rows: int) -> Comparison:
    """Draw one completion for each of `n_rows` ragged prompts (T 0.7, top_p 0.95); rates count tokens that are kept.

    The two draw with their own random numbers, so lengths differ a little; `ratio` is of kept tokens per second.
    """
    stack, plain, device = Stack(model.base(), model.lora), model.plain(), model.device
    prompts = _prompts(stack.base, model, n_rows)
    settings = SamplingSettings(max_new_tok=MAX_NEW_TOK[device.type])
    few = SamplingSettings(max_new_tok=2)
    ours, theirs, my_peak, their_peak = Clock(device), Clock(device), Peak(device), Peak(device)
    stops = stack.base.tokenizer.stop_ids
    sample(stack.base, prompts[:4], list(range(4)), few)
    _generate(plain, prompts[:4], few, stops, device)
    with their_peak.watching(), theirs.running():
        their_tok = _generate(plain, prompts[: USUAL_ROWS[device.type]], settings, stops, device)
    with my_peak.watching(), ours.running():
        drawn = sample(stack.base, prompts, list(range(n_rows)), settings)
    my_tok = sum(len(row.ids) + row.ended for row in drawn)
    ceiling, work = matmul_ceiling(device, model.dtype), Work(_mean_length(prompts, my_tok), 1.0, 0)
    per_tok = forward_flops_per_tok(shape(stack.base), work)
    mine = measured("fastconv, resident", ours.seconds, my_tok, my_tok * per_tok, ceiling, my_peak.bytes)
    usual = measured("generate, padded", theirs.seconds, their_tok, their_tok * per_tok, ceiling, their_peak.bytes)
    others, extra = [usual], {"ours_tokens": my_tok, "usual_tokens": their_tok, "matmul_flops": ceiling}
    served = _served(model, stack, prompts, settings)
    if isinstance(served, str):
        extra["vllm"] = f"not measured: {served}"
    else:
        seconds, served_tok, start_s = served
        others.append(measured("vllm, a server", seconds, served_tok, served_tok * per_tok, ceiling))
        extra |= {"vllm_tokens": served_tok, "vllm_start_s": start_s}
    ratios = {other.name: mine.per_s / other.per_s for other in others}
    return Comparison(
        kind="sample", model=model.settings.id, device=device.type, dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(), unit="kept tokens",
        work=f"{n_rows} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, "
        f"up to {settings.max_new_tok} new ones each; generate gets {min(n_rows, USUAL_ROWS[device.type])} of them",
        ours=mine, usual=tuple(others), ratio=ratios[usual.name], ratios=ratios, extra=extra,
    )  # fmt: skip


def _served(
    model: Subject, stack: Stack, prompts: list[list[int]], settings: SamplingSettings
) -> tuple[float, int, float] | str:
    """(seconds, kept tokens, seconds of start-up) of vLLM for the same prompts, or why it was not measured."""
    if model.random is not None:
        return "a random shape has no tokenizer for it"
    try:
        server_command(model.device.type)
    except ModelError as error:
        return error.what
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # what ours and theirs let go of is the server's
    longest_tok = max(map(len, prompts)) + settings.max_new_tok
    with tempfile.TemporaryDirectory() as folder:
        server = launch(model.settings, locate(model.settings), longest_tok, model.lora.r, Path(folder))
        with closing(server), closing(Served(server, stack)) as sampler:
            sampler.draw(prompts[:4], range(4), SamplingSettings(max_new_tok=2), lambda n_tok: None)
            began = time.monotonic()
            drawn = sampler.draw(prompts, range(len(prompts)), settings, lambda n_tok: None)
            seconds = time.monotonic() - began
    return seconds, sum(len(row.ids) + row.ended for row in drawn), server.start_s


def _prompts(base: Base, model: Subject, n_rows: int) -> list[list[int]]:
    """Chat prompts where the model can write, else random tokens of ragged lengths."""
    if model.random is not None:
        return [list(row.ids) for row in ragged_rows(n_rows, base.head.weight.shape[0], SHORTEST_TOK, LONGEST_TOK)]
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
    """Kept tokens of `generate` over left-padded batches, prompts sorted by length as a careful script would."""
    kept = 0
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
        kept += sum(_kept(row, stops) for row in out[:, longest:].tolist())
    return kept


def _kept(row: list[int], stops: tuple[int, ...]) -> int:
    """Tokens up to and with the first stop token."""
    return next((place + 1 for place, token in enumerate(row) if token in stops), len(row))
