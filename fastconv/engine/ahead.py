"""Kernels compiled before they are needed, side by side. A first launch compiles its kernel while the card waits, one after
another: some 50 s of the first run on a machine.

What a run will launch is found by passes of a few tokens under stacks like its own, in which no kernel runs that is not
compiled yet: it is noted, and what it would have written stays undefined.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from fastconv.chat import Rendered
from fastconv.engine.decode import Cache, Decode, Prefill, sample_tokens
from fastconv.engine.lora import Adapter
from fastconv.engine.micro_batch import Item, make_micro_batch, no_padding
from fastconv.engine.model import pack
from fastconv.engine.score import hidden_fp32
from fastconv.engine.selftest import SelfTestSetup, plainly
from fastconv.engine.stack import Slot, Stack
from fastconv.engine.train import micro_step
from fastconv.recipe import SamplingSettings, TrainSettings

# pyright: reportMissingImports=false
# Triton comes with torch's CUDA builds alone.

_log = logging.getLogger(__name__)
#: Tokens of the rows of a pass. What is compiled depends neither on their number nor on that of the rows.
_ROWS_TOK = (48, 80)
#: A kernel as Triton names it (its function, and all that it is compiled for as JSON), and what compiles it.
Noted = dict[tuple[str, str], Any]


def compile_ahead(
    stack: Stack, phases: Sequence[TrainSettings], sampling: SamplingSettings, *, letters: bool = False
) -> int:
    """Compile the kernels of the self-tests, of training with these settings, and of scoring and sampling what was trained;
    with `letters` also those of near ties, which are scored again in fp32. Returns their number.

    None where the stack does without kernels of ours. No adapter may be live. Kernels that are noted here and never
    launched cost a second of a core, kernels that are not noted are compiled when they are launched.
    """
    if stack.route.kernel is None:
        return 0
    with noted() as found:
        tests = SelfTestSetup(stack)
        tests.gradient()
        for adapters in ((tests.frozen,), (tests.frozen, tests.trainable)):
            tests.logits(tests.rows, *adapters)
        with plainly(stack):
            tests.logits(tests.rows, tests.frozen, tests.trainable)
            tests.gradient()
        for settings in phases:
            for frozen in ((), (_zeros(stack),)):
                _train(stack, Slot(frozen, _zeros(stack), settings.dropout))
        one, other = _zeros(stack), _zeros(stack)
        for slots in ((), (Slot((one,)),), (Slot((one, other)),)):
            with stack.live(*slots), torch.no_grad():
                _read(stack, precise=letters)
                _decode(stack, sampling)
    compile_noted(found)
    return len(found)


@contextlib.contextmanager
def noted() -> Iterator[Noted]:
    """Within the block Triton notes a kernel that is not compiled yet instead of launching it."""
    from triton import knobs

    found: Noted = {}

    def note(*, fn: Any, compile: dict[str, Any], **others: Any) -> bool:
        data: str = compile["specialization_data"]
        found.setdefault((f"{fn.module}.{fn.name}", data), fn.jit_function)
        return True  # nothing is compiled, nothing launched

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before


def compile_noted(found: Noted) -> None:
    """Compile what was noted, or read it from Triton's cache on disk; on all cores. What cannot be is left to its launch, which
    will say why if it comes."""
    import triton
    from triton.errors import TritonError

    cores = len(os.sched_getaffinity(0))
    try:
        with ThreadPoolExecutor(cores) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for (_, data), function in found.items():
                function.preload(data)
    except (RuntimeError, TritonError) as error:
        _log.warning("kernels are compiled when they are launched: %s", error)


def _zeros(stack: Stack) -> Adapter:
    """An adapter as the recipe's, of zeros."""
    return stack.zero_adapter(stack.base.device)


def _train(stack: Stack, slot: Slot) -> None:
    """A pass forward and back for one slot."""
    assert slot.trainable is not None
    slot.trainable.train(torch.zeros_like(slot.trainable.flat))
    try:
        items = [Item(0, Rendered((1,) * n_tok, n_tok // 2), 1.0, row) for row, n_tok in enumerate(_ROWS_TOK)]
        batch = make_micro_batch(stack.base, [slot], items, no_padding)
        micro_step(stack, batch, torch.zeros(1, device=stack.base.device))
    finally:
        slot.trainable.train(None)


def _read(stack: Stack, *, precise: bool) -> None:
    """A pass over rows, as scores and prefills take it; with `precise` again in fp32."""
    ids, positions, layout = pack([[1] * n_tok for n_tok in _ROWS_TOK], stack.base)
    stack.base.logits(stack.base.hidden(ids, positions, layout)[-1:])
    if precise and stack.base.dtype != torch.float32:
        hidden_fp32(stack.base, ids, positions, layout)


def _decode(stack: Stack, settings: SamplingSettings) -> None:
    """A pass that decodes one token of each row, and the draws."""
    base, n_rows = stack.base, _ROWS_TOK[0]
    cache, rows = Cache(n_rows, 64), torch.arange(n_rows, device=base.device)
    ids, positions, layout = pack([[1]] * n_rows, base)
    base.hidden(ids, positions, Prefill(layout, cache, rows, rows, torch.zeros_like(rows)))
    at = torch.ones_like(rows)
    hidden = base.hidden(at, at, Decode(cache, at, cache.max_length_tok - 1))
    for logits in (base.logits(hidden), base.readout.logits(hidden)):  # of the first token, and of the others
        sample_tokens(logits, torch.zeros(n_rows, device=base.device), settings)
