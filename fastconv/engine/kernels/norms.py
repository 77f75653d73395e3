"""Triton kernels for RMSNorm, alone and with the residual sum before it. They round like torch's modules, and norm weights
are frozen: gradients go to the inputs only."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# pyright: reportMissingImports=false, reportIndexIssue=false
# Triton comes with torch's CUDA builds alone, and pyright does not see what its decorator makes of a function.


@triton.jit
def _rms_forward(x, delta, total, weight, y, scale, n, eps, BLOCK: tl.constexpr, ADDS: tl.constexpr):
    """y = the norm of x, or with ADDS of x + delta, which is stored as total."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + row * n + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        value = (value + tl.load(delta + row * n + at, mask=inside, other=0.0).to(tl.float32)).to(
            total.dtype.element_ty
        )
        tl.store(total + row * n + at, value, mask=inside)
        value = value.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value, 0) / n + eps)
    tl.store(scale + row, rstd)
    normed = (value * rstd).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * n + at, (normed * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)), mask=inside)


@triton.jit
def _rms_backward(dy, x, weight, scale, beside, dx, n, BLOCK: tl.constexpr, ADDS: tl.constexpr):
    """dx = the gradient through the norm, with ADDS plus the one that went beside it."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    rstd = tl.load(scale + row)
    normed = tl.load(x + row * n + at, mask=inside, other=0.0).to(tl.float32) * rstd
    given = tl.load(dy + row * n + at, mask=inside, other=0.0).to(tl.float32)
    given *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    inner = tl.sum(given * normed, 0) / n
    change = rstd * (given - normed * inner)
    if ADDS:
        change += tl.load(beside + row * n + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * n + at, change, mask=inside)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x = x.contiguous()
        y, scale = _normed(x, None, x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _normed_back(grads[0], *ctx.saved_tensors, beside=None), None, None


class _ResidualNorm(torch.autograd.Function):
    """Both the sum and its norm are used, so one pass adds up their gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.contiguous()
        delta = None if delta is None else delta.contiguous()
        total = x.view_as(x) if delta is None else torch.empty_like(x)
        y, scale = _normed(x, delta, total, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        ctx.adds = delta is not None
        return total, y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx = _normed_back(grads[1], *ctx.saved_tensors, beside=grads[0])
        return dx, dx if ctx.adds else None, None, None


def _normed(
    x: torch.Tensor, delta: torch.Tensor | None, total: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of x, or of `total` = x + delta, [..., n]; one over the root mean square of each row, fp32)."""
    n = x.shape[-1]
    rows = x.numel() // n
    y, scale = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    _rms_forward[(rows,)](
        x, x if delta is None else delta, total, weight, y, scale, n, eps, BLOCK=triton.next_power_of_2(n),
        ADDS=delta is not None, num_warps=8,
    )  # fmt: skip
    return y, scale


def _normed_back(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *, beside: torch.Tensor | None
) -> torch.Tensor:
    dy, n, dx = dy.contiguous(), x.shape[-1], torch.empty_like(x)
    beside = None if beside is None else beside.contiguous()
    _rms_backward[(x.numel() // n,)](
        dy, x, weight, scale, dy if beside is None else beside, dx, n, BLOCK=triton.next_power_of_2(n),
        ADDS=beside is not None, num_warps=8,
    )  # fmt: skip
    return dx


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n] divided by its root mean square (Zhang and Sennrich 2019), times the frozen weight [n]; x's dtype."""
    return _RmsNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


def residual_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + delta, its `rms_norm`), or (x, its norm) for a delta of None: what goes on beside a layer and into it."""
    return _ResidualNorm.apply(x, delta, weight, eps)  # pyright: ignore[reportReturnType]
