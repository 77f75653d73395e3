"""Attention over packed rows: the fastest way that works here, found by trying, never assumed.

Every way computes the same: row i is tokens starts[i] to starts[i+1], causal within itself, grouped queries.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

#: (query [heads, T, d], key and value [kv heads, T, d], starts, scale) -> [T, heads, d]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int], float], torch.Tensor]

#: How far another way may lie from SDPA in fp32, relative, by precision; attention has no long sums to lose more in.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
#: What a library that is missing, too old, or built for other hardware raises when it is tried.
_DOES_NOT_WORK = (ImportError, AttributeError, RuntimeError, NotImplementedError, TypeError, ValueError, OSError)


@dataclass(frozen=True)
class Backend:
    """One way, and what it is called in a run's facts; `passed_over` are the ways before it and why they are not it."""

    name: str
    attend: Attend
    passed_over: tuple[tuple[str, str], ...] = ()


def pick_attention(
    device: torch.device, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2, head_dim: int = 64
) -> Backend:
    """The first of flash-attn, torch's varlen, xformers and SDPA that gives SDPA's values and gradients on the device."""
    passed_over: list[tuple[str, str]] = []
    if device.type != "cuda":
        return Backend("sdpa", sdpa)
    for name, make in _CANDIDATES:
        try:
            attend = make()
            apart = _distance(attend, device, dtype, heads, kv_heads, head_dim)
        except _DOES_NOT_WORK as error:
            passed_over.append((name, " ".join(str(error).split())[:160]))
            continue
        if apart <= _TOLERANCE[dtype]:
            return Backend(name, attend, tuple(passed_over))
        passed_over.append((name, f"{apart:.1%} away from SDPA"))
    return Backend("sdpa", sdpa, tuple(passed_over))


def sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: Sequence[int], scale: float
) -> torch.Tensor:
    """torch's scaled_dot_product_attention, row by row."""
    key, value = _repeated(query, key), _repeated(query, value)
    rows = [
        F.scaled_dot_product_attention(
            query[None, :, a:b], key[None, :, a:b], value[None, :, a:b], is_causal=True, scale=scale
        )[0]
        for a, b in pairwise(starts)
    ]
    return torch.cat(rows, dim=1).transpose(0, 1)


def _flash_attn() -> Attend:
    varlen: Any = importlib.import_module("flash_attn").flash_attn_varlen_func

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: Sequence[int], scale: float) -> torch.Tensor:
        bounds, longest = _bounds(starts, q.device)
        q, k, v = (part.transpose(0, 1).contiguous() for part in (q, k, v))
        return varlen(q, k, v, bounds, bounds, longest, longest, softmax_scale=scale, causal=True)

    return attend


def _torch_varlen() -> Attend:
    """torch 2.10 and later; grouped queries from 2.12 on, before that key and value are repeated."""
    varlen: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    known = inspect.signature(varlen).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: Sequence[int], scale: float) -> torch.Tensor:
        bounds, longest = _bounds(starts, q.device)
        grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
        if not grouped:
            k, v = _repeated(q, k), _repeated(q, v)
        if "scale" not in known:  # its own is 1/sqrt(d)
            q = q * (scale * q.shape[-1] ** 0.5)
        else:
            grouped["scale"] = scale
        q, k, v = (part.transpose(0, 1).contiguous() for part in (q, k, v))
        return varlen(q, k, v, bounds, bounds, longest, longest, **causal, **grouped)

    return attend


def _xformers() -> Attend:
    ops: Any = importlib.import_module("xformers.ops")
    masks: Any = importlib.import_module("xformers.ops.fmha.attn_bias")

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: Sequence[int], scale: float) -> torch.Tensor:
        mask = masks.BlockDiagonalCausalMask.from_seqlens([b - a for a, b in pairwise(starts)])
        k, v = _repeated(q, k), _repeated(q, v)
        q, k, v = (part.transpose(0, 1)[None].contiguous() for part in (q, k, v))
        return ops.memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale)[0]

    return attend


_CANDIDATES: tuple[tuple[str, Callable[[], Attend]], ...] = (
    ("flash-attn", _flash_attn),
    ("torch varlen", _torch_varlen),
    ("xformers", _xformers),
)


def _bounds(starts: Sequence[int], device: torch.device) -> tuple[torch.Tensor, int]:
    """(starts int32 on the device, longest row); through pinned memory, so that the host does not wait."""
    on_host = torch.tensor(list(starts), dtype=torch.int32)
    bounds = on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host
    return bounds, max(b - a for a, b in pairwise(starts))


def _repeated(query: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Key or value with each head as often as queries share it."""
    return part.repeat_interleave(query.shape[0] // part.shape[0], 0)


def _distance(
    attend: Attend, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> float:
    """How far values and gradients on three short rows lie from SDPA's in fp32, relative; the larger of them."""
    starts = (0, 5, 6, 20)
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, starts[-1], head_dim), *[(kv_heads, starts[-1], head_dim)] * 2]
    drawn = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    scale = 0.7 * head_dim**-0.5
    results = []
    for way, kind in ((sdpa, torch.float32), (attend, dtype)):
        parts = [part.to(kind).requires_grad_() for part in drawn]
        query, key, value = parts
        out = way(query, key, value, starts, scale)
        gradients = torch.autograd.grad(out.float().square().sum(), parts)
        results.append([tensor.float() for tensor in (out, *gradients)])
    return max(
        float(torch.linalg.vector_norm(mine - theirs) / torch.linalg.vector_norm(theirs))
        for theirs, mine in zip(*results, strict=True)
    )
