"""Attention implementations for packed rows, and the choice of the first one that works on this device.

All compute the same: row i is tokens starts[i] to starts[i+1], with causal grouped-query attention within the row.
Whether one works is tested by running it, not concluded from versions.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from fastconv.engine.attention import Kernel, Padded, Ragged, attend_by_row, repeat_heads
from fastconv.engine.same_bits import settings_kept

#: Largest relative difference from SDPA in fp32, by precision.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
#: What a library that is missing, too old, or built for other hardware raises when it is tried.
_DOES_NOT_WORK = (
    ImportError, AttributeError, RuntimeError, NotImplementedError, TypeError, ValueError, OSError, AssertionError,
)  # fmt: skip
#: Row lengths (tokens) of the test; one row has a single token, and one is empty, as padding may be.
_TRIAL_TOK = (5, 1, 14, 0)
#: Row lengths of the test for the same bits: several blocks of keys add to a gradient. It is run this many times.
_REPEATED_TOK, _REPEATS = (900, 500), 4


@dataclass(frozen=True)
class Backend:
    """An attention implementation under the name that a run records; `kernel` is None for SDPA on padded rows.

    `captures` says whether a CUDA graph can hold it, which needs row boundaries that are on the device only.
    `passed_over` lists (name, reason) of the implementations that were tried before it.
    """

    name: str
    kernel: Kernel | None = None
    captures: bool = True
    passed_over: tuple[tuple[str, str], ...] = ()


#: The implementation that every machine has.
SDPA = Backend("sdpa")


def pick_attention(
    device: torch.device, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2, head_dim: int = 64
) -> Backend:
    """The first that gives the values and gradients of SDPA in fp32, the same bits each time: flash-attn, FlashAttention 4,
    torch's varlen, SDPA, xformers.

    One that no CUDA graph can hold comes after SDPA, which every machine has: without graphs the host launches each
    kernel of a training step. On a CPU and in fp32 it is always SDPA, and so where none is right (the self-test judges
    it). `heads`, `kv_heads` and `head_dim` are those of the model.
    """
    passed_over: list[tuple[str, str]] = []
    if device.type != "cuda" or dtype == torch.float32:
        return SDPA
    sdpa = (SDPA.name, (_padded_sdpa, True))
    held = [(name, made) for name, made in _CANDIDATES.items() if made[1]]
    others = [(name, made) for name, made in _CANDIDATES.items() if not made[1]]
    for name, (make, captures) in (*held, sdpa, *others):
        try:
            kernel = make()
            shape = device, dtype, heads, kv_heads, head_dim
            difference = _distance(kernel, *shape)
            repeats = name == SDPA.name or difference > _TOLERANCE[dtype] or _repeats(kernel, *shape)
        except _DOES_NOT_WORK as error:
            passed_over.append((name, " ".join(str(error).split())[:160]))
            continue
        if difference > _TOLERANCE[dtype] or not repeats:
            away = f"{difference:.1%} away from SDPA"
            passed_over.append((name, away if repeats else "the same rows give other bits the second time"))
        elif name == SDPA.name:
            passed_over += [(name, "no CUDA graph can hold it, and SDPA is right here") for name, _ in others]
            return replace(SDPA, passed_over=tuple(passed_over))
        else:
            return Backend(name, kernel, captures, tuple(passed_over))
    return replace(SDPA, passed_over=tuple(passed_over))


def _flash_attn() -> Kernel:
    """FlashAttention 2. Without its flag, gradients of queries are added in the order in which blocks end."""
    varlen: Any = importlib.import_module("flash_attn").flash_attn_varlen_func
    if "deterministic" not in inspect.signature(varlen).parameters:
        raise NotImplementedError("this version adds gradients in no fixed order")

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Ragged, scale: float) -> torch.Tensor:
        q, k, v = (part.transpose(0, 1).contiguous() for part in (q, k, v))
        bounds, longest = rows.bounds, rows.longest
        return varlen(
            q, k, v, bounds, bounds, longest, longest, softmax_scale=scale, causal=True, deterministic=True
        )  # fmt: skip

    return attend


def _flash_attn_4() -> Kernel:
    """FlashAttention 4 (package flash-attn-4), which is compiled for the device at its first call."""
    varlen: Any = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    refused: Any = getattr(importlib.import_module("cutlass.base_dsl.common"), "DSLBaseError", RuntimeError)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Ragged, scale: float) -> torch.Tensor:
        q, k, v = (part.transpose(0, 1).contiguous() for part in (q, k, v))
        try:
            found = varlen(
                q, k, v, cu_seqlens_q=rows.bounds, cu_seqlens_k=rows.bounds, max_seqlen_q=rows.longest,
                max_seqlen_k=rows.longest, softmax_scale=scale, causal=True, deterministic=True,
            )  # fmt: skip
        except refused as error:  # its compiler's errors are no RuntimeErrors
            raise RuntimeError(str(error)) from error
        return found[0] if isinstance(found, tuple) else found  # with the sums of the softmax

    return attend


def _torch_varlen() -> Kernel:
    """torch's own, from 2.12 on: earlier versions do not support grouped queries."""
    varlen: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    parameters = inspect.signature(varlen).parameters
    missing = [name for name in ("enable_gqa", "scale", "window_size") if name not in parameters]
    if missing:
        raise NotImplementedError(f"torch {torch.__version__} has it without {', '.join(missing)}")

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Ragged, scale: float) -> torch.Tensor:
        q, k, v = (part.transpose(0, 1).contiguous() for part in (q, k, v))
        bounds, longest = rows.bounds, rows.longest
        return varlen(
            q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip

    return attend


def _xformers() -> Kernel:
    ops: Any = importlib.import_module("xformers.ops")
    masks: Any = importlib.import_module("xformers.ops.fmha.attn_bias")

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Ragged, scale: float) -> torch.Tensor:
        lengths = [b - a for a, b in pairwise((*rows.starts, q.shape[1]))]
        mask = masks.BlockDiagonalCausalMask.from_seqlens([length for length in lengths if length])
        k, v = repeat_heads(q, k), repeat_heads(q, v)
        q, k, v = (part.transpose(0, 1)[None].contiguous() for part in (q, k, v))
        return ops.memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale)[0]

    return attend


def _padded_sdpa() -> Kernel:
    """SDPA on padded rows as a kernel, for the trial; a run lays its rows out once (`attention.Padded`)."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Ragged, scale: float) -> torch.Tensor:
        lengths = [b - a for a, b in pairwise((*rows.starts, q.shape[1]))]
        padded = Padded.of(lengths)
        padded = padded.with_inputs([part.to(q.device) for part in padded.inputs])
        return padded.attend(0, q, k, v, scale)

    return attend


#: In order of preference: its factory, and whether a CUDA graph can hold it (the host makes xformers' mask).
_CANDIDATES: dict[str, tuple[Callable[[], Kernel], bool]] = {
    "flash-attn": (_flash_attn, True),
    "flash-attn 4": (_flash_attn_4, True),
    "torch varlen": (_torch_varlen, True),
    "xformers": (_xformers, False),
}


def _distance(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> float:
    """Largest relative difference of values and gradients from SDPA in fp32, over a few short rows."""
    n_tok = sum(_TRIAL_TOK) + 3
    rows, inputs = _trial(_TRIAL_TOK, n_tok, kernel, device, heads, kv_heads, head_dim)
    scale = 0.7 * head_dim**-0.5

    expected = _results(lambda q, k, v: attend_by_row(q, k, v, (*rows.starts, n_tok), scale), inputs, torch.float32)
    actual = _results(lambda q, k, v: kernel(q, k, v, rows, scale), inputs, dtype)
    return max(
        float(torch.linalg.vector_norm(value - reference) / torch.linalg.vector_norm(reference))
        for reference, value in zip(expected, actual, strict=True)
    )


def _repeats(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> bool:
    """Whether values and gradients have the same bits each time: a run that is resumed must go on to the same weights."""
    rows, inputs = _trial(_REPEATED_TOK, sum(_REPEATED_TOK), kernel, device, heads, kv_heads, head_dim)
    first, *others = (
        _results(lambda q, k, v: kernel(q, k, v, rows, head_dim**-0.5), inputs, dtype) for _ in range(_REPEATS)
    )
    return all(torch.equal(one, other) for found in others for one, other in zip(first, found, strict=True))


def _trial(
    lengths: tuple[int, ...], n_tok: int, kernel: Kernel, device: torch.device, heads: int, kv_heads: int, head_dim: int
) -> tuple[Ragged, list[torch.Tensor]]:
    """Rows of these lengths, padded to `n_tok`, and random (query, key, value) for them on the device, fp32."""
    rows = Ragged.of(lengths, kernel, n_tok=n_tok)
    rows = rows.with_inputs([rows.bounds.to(device)])
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, n_tok, head_dim), *[(kv_heads, n_tok, head_dim)] * 2]
    return rows, [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def _results(
    attention: Callable[..., torch.Tensor], inputs: list[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """(output, gradients of query, key and value) in this dtype, as fp32."""
    parts = [part.to(dtype).requires_grad_() for part in inputs]
    out = attention(*parts)
    with settings_kept():
        gradients = torch.autograd.grad(out.float().square().sum(), parts)
    return [tensor.detach().float() for tensor in (out, *gradients)]
