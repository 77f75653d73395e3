"""Triton kernels for what is not a matrix product: SwiGLU, RoPE, row gathering, the loss, decoding attention.

They round like the torch modules that they replace, so that results agree up to the last bit or two of the base's
dtype. Decoding attention has no backward pass; `norms` has RMSNorm.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# pyright: reportMissingImports=false, reportIndexIssue=false
# Triton comes with torch's CUDA builds alone, and pyright does not see what its decorator makes of a function.


#: Elements that one program of a pointwise kernel handles.
_BLOCK = 1024
#: Logits that one program of the loss reads at a time.
_VOCAB_BLOCK = 4096
#: Keys that one program of the decoding kernel reads at a time.
_KEYS = 64


@triton.jit
def _swiglu_forward(gate, up, y, n, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(gate + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(y.dtype.element_ty).to(tl.float32)
    tl.store(
        y + row * n + at, silu * tl.load(up + row * stride + at, mask=inside, other=0.0).to(tl.float32), mask=inside
    )


@triton.jit
def _swiglu_backward(dy, gate, up, dgate, dup, n, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    given = tl.load(dy + row * n + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    tl.store(dup + row * stride + at, given * g * share, mask=inside)
    tl.store(dgate + row * stride + at, given * u * share * (1.0 + g * (1.0 - share)), mask=inside)


@triton.jit
def _rope(x, cos, sin, y, n_heads, sign, HALF: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n_heads * HALF
    head, lane = at // HALF, at % HALF
    first = token * n_heads * 2 * HALF + head * 2 * HALF + lane
    low = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + first + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * 2 * HALF + lane, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + token * 2 * HALF + lane, mask=inside, other=0.0).to(tl.float32) * sign
    kind = y.dtype.element_ty
    low_c, high_s = (low * c).to(kind).to(tl.float32), (high * s).to(kind).to(tl.float32)
    high_c, low_s = (high * c).to(kind).to(tl.float32), (low * s).to(kind).to(tl.float32)
    tl.store(y + first, low_c - high_s, mask=inside)
    tl.store(y + first + HALF, high_c + low_s, mask=inside)


@triton.jit
def _rope_joined(x, cos, sin, q, k, v, index, n_q, n_k, sign, HALF: tl.constexpr, BLOCK: tl.constexpr,
                 BACK: tl.constexpr, INDEXED: tl.constexpr):  # fmt: skip
    """The heads of a token, q then k then v side by side in x, to a row of three tensors, q and k turned; with BACK from
    them to x. Row i of what is written comes from index[i] if INDEXED, and is zero where that is negative."""
    written = tl.program_id(0).to(tl.int64)
    read = written
    if INDEXED:
        read = tl.load(index + written)
    token, row = read, written
    if BACK:
        token, row = written, read
    at = tl.arange(0, BLOCK)
    head, lane = at // HALF, at % HALF
    is_q, is_k, is_v = head < n_q, (head >= n_q) & (head < n_q + n_k), (head >= n_q + n_k) & (head < n_q + 2 * n_k)
    inside, turned = head < n_q + 2 * n_k, head < n_q + n_k
    there = head < tl.where(read >= 0, n_q + 2 * n_k, 0)
    joint = x + token * (n_q + 2 * n_k) * 2 * HALF + head * 2 * HALF + lane
    of_q = q + row * n_q * 2 * HALF + head * 2 * HALF + lane
    of_k = k + row * n_k * 2 * HALF + (head - n_q) * 2 * HALF + lane
    of_v = v + row * n_k * 2 * HALF + (head - n_q - n_k) * 2 * HALF + lane
    if BACK:
        low = tl.load(of_q, mask=is_q & there, other=0.0) + tl.load(of_k, mask=is_k & there, other=0.0)
        low = (low + tl.load(of_v, mask=is_v & there, other=0.0)).to(tl.float32)
        high = tl.load(of_q + HALF, mask=is_q & there, other=0.0) + tl.load(of_k + HALF, mask=is_k & there, other=0.0)
        high = (high + tl.load(of_v + HALF, mask=is_v & there, other=0.0)).to(tl.float32)
    else:
        low = tl.load(joint, mask=inside & there, other=0.0).to(tl.float32)
        high = tl.load(joint + HALF, mask=inside & there, other=0.0).to(tl.float32)
    c = tl.load(cos + token * 2 * HALF + lane, mask=turned & there, other=0.0).to(tl.float32)
    s = tl.load(sin + token * 2 * HALF + lane, mask=turned & there, other=0.0).to(tl.float32) * sign
    kind = x.dtype.element_ty
    low_c, high_s = (low * c).to(kind).to(tl.float32), (high * s).to(kind).to(tl.float32)
    high_c, low_s = (high * c).to(kind).to(tl.float32), (low * s).to(kind).to(tl.float32)
    first, second = tl.where(turned, low_c - high_s, low), tl.where(turned, high_c + low_s, high)
    if BACK:
        tl.store(joint, first, mask=inside)
        tl.store(joint + HALF, second, mask=inside)
    else:
        tl.store(of_q, first, mask=is_q)
        tl.store(of_q + HALF, second, mask=is_q)
        tl.store(of_k, first, mask=is_k)
        tl.store(of_k + HALF, second, mask=is_k)
        tl.store(of_v, first, mask=is_v)
        tl.store(of_v + HALF, second, mask=is_v)


@triton.jit
def _rows(x, index, y, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index + row)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + source * n + at, mask=at < tl.where(source >= 0, n, 0), other=0.0)
    tl.store(y + row * n + at, value, mask=at < n)


@triton.jit
def _cross_entropy(logits, targets, weights, losses, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * n
    at = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        value = tl.load(logits + start + at, mask=start + at < n, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, value)
        total = total * tl.exp(top - higher) + tl.exp(value - higher)
        top = higher
    highest = tl.max(top, 0)
    log_sum = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    target, weight = tl.load(targets + row), tl.load(weights + row)
    tl.store(losses + row, log_sum - tl.load(logits + target).to(tl.float32))
    tl.debug_barrier()  # the target's logit is read before any thread writes over it
    for start in range(0, n, BLOCK):
        value = tl.load(logits + start + at, mask=start + at < n, other=0.0).to(tl.float32)
        share = tl.exp(value - log_sum) - tl.where(start + at == target, 1.0, 0.0)
        tl.store(logits + start + at, share * weight, mask=start + at < n)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _activated(gate, up, torch.empty_like(gate), gate.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _activated_back(grads[0].contiguous(), gate, up, dgate, dup, gate.shape[-1])
        return dgate, dup


class _SwiGluJoined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        both = both.contiguous()
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return _activated(gate, up, both.new_empty(gate.shape), both.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        given = torch.empty_like(both)
        gate, up = both.chunk(2, dim=-1)
        dgate, dup = given.chunk(2, dim=-1)
        _activated_back(grads[0].contiguous(), gate, up, dgate, dup, both.shape[-1])
        return given


def _activated(gate: torch.Tensor, up: torch.Tensor, y: torch.Tensor, stride: int) -> torch.Tensor:
    n = y.shape[-1]
    _swiglu_forward[(y.numel() // n, triton.cdiv(n, _BLOCK))](gate, up, y, n, stride, BLOCK=_BLOCK)
    return y


def _activated_back(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, dgate: torch.Tensor, dup: torch.Tensor, stride: int
) -> None:
    n = dy.shape[-1]
    grid = (dy.numel() // n, triton.cdiv(n, _BLOCK))
    _swiglu_backward[grid](dy, gate, up, dgate, dup, n, stride, BLOCK=_BLOCK)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, -1.0), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    x = x.contiguous()
    n_tok, n_heads, width = x.shape
    y, half = torch.empty_like(x), width // 2
    _rope[(n_tok,)](x, cos, sin, y, n_heads, sign, HALF=half, BLOCK=triton.next_power_of_2(n_heads * half))
    return y


class _RopeJoined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: tuple[int, int],
        rows: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        there, back = rows if rows is not None else (None, None)
        ctx.save_for_backward(cos, sin, back)
        n_rows, width = len(x) if there is None else len(there), x.shape[1] // (heads[0] + 2 * heads[1])
        parts = tuple(x.new_empty(n_rows, n, width) for n in (*heads, heads[1]))
        _turn_joined(x.contiguous(), cos, sin, parts, there, back=False)
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, back = ctx.saved_tensors
        parts = tuple(grad.contiguous() for grad in grads[:3])
        given = parts[0].new_empty(len(cos), sum(part.shape[1] * part.shape[2] for part in parts))
        _turn_joined(given, cos, sin, parts, back, back=True)
        return given, None, None, None, None


def _turn_joined(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, parts: tuple[torch.Tensor, ...], index: torch.Tensor | None,
    *, back: bool,
) -> None:  # fmt: skip
    q, k, v = parts
    n_heads, half = q.shape[1], q.shape[2] // 2
    lanes = (n_heads + 2 * k.shape[1]) * half
    _rope_joined[(len(x) if back else len(q),)](
        x, cos, sin, q, k, v, x if index is None else index, n_heads, k.shape[1], -1.0 if back else 1.0, HALF=half,
        BLOCK=triton.next_power_of_2(lanes), BACK=back, INDEXED=index is not None, num_warps=8,
    )  # fmt: skip


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index, inverse)
        return _gather_rows(x, index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _gather_rows(grads[0], ctx.saved_tensors[1]), None, None


def _gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    x, n_rows = x.contiguous(), index.shape[0]
    n = x.numel() // x.shape[0]
    y = x.new_empty(n_rows, *x.shape[1:])
    _rows[(n_rows, triton.cdiv(n, _BLOCK))](x, index, y, n, BLOCK=_BLOCK)
    return y


def gather_rows(x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """x [T, ...] -> [P, ...]: row i is x[index[i]], or zero where index [P] int64 is negative.

    `inverse` [T] int64 is the inverse map (negative where a row is not used), so that the gradient is a gather too.
    """
    return _GatherRows.apply(x, index, inverse)  # pyright: ignore[reportReturnType]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020), both [..., n] in one dtype."""
    return _SwiGlu.apply(gate, up)  # pyright: ignore[reportReturnType]


def swiglu_joined(both: torch.Tensor) -> torch.Tensor:
    """The same of gate and up side by side: [..., 2 n] -> [..., n]; so is the gradient, without a copy."""
    return _SwiGluJoined.apply(both)  # pyright: ignore[reportReturnType]


def rope_joined(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: tuple[int, int],
    rows: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """q [T, heads, d], k and v [T, kv heads, d] of x [T, (heads + 2 kv heads) d], q and k turned as by `rope`.

    With `rows` = (index, inverse) they are laid out as by `gather_rows` in the same pass.
    """
    return _RopeJoined.apply(x, cos.contiguous(), sin.contiguous(), heads, rows)  # pyright: ignore[reportReturnType]


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021) of x [T, heads, d], halves paired as in Llama; cos and sin [T, d]."""
    return _Rope.apply(x, cos.contiguous(), sin.contiguous())  # pyright: ignore[reportReturnType]


def cross_entropy_in_place(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Losses [n] fp32 of logits [n, vocab]; the logits are overwritten with the gradient of sum(weights * loss).

    targets [n] int64, weights [n] fp32; sums are fp32, the gradient is rounded once, to the logits' dtype.
    """
    losses = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    _cross_entropy[(len(targets),)](
        logits, targets, weights, losses, logits.shape[1], BLOCK=_VOCAB_BLOCK, num_warps=8
    )  # fmt: skip
    return losses


@triton.jit
def _decode(
    query, key, value, keys, values, lengths, out, scale, row_stride, head_stride, new_row, new_head, n_groups,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Online softmax (Milakov and Gimelshein 2018) for the query heads of one kv head of one row: the new token first, which
    goes to the cache, then those before it."""
    row, kv = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    heads, lanes, block = tl.arange(0, GROUP), tl.arange(0, WIDTH), tl.arange(0, KEYS)
    n_kv = tl.num_programs(1)
    own = (row * n_kv + kv) * n_groups * WIDTH + heads[:, None] * WIDTH + lanes[None, :]
    valid = heads[:, None] < n_groups
    q = tl.load(query + own, mask=valid, other=0.0)
    start = row * row_stride + kv * head_stride
    n_keys = tl.load(lengths + row)
    new_key = tl.load(key + row * new_row + kv * new_head + lanes)
    new_value = tl.load(value + row * new_row + kv * new_head + lanes)
    tl.store(keys + start + n_keys * WIDTH + lanes, new_key)
    tl.store(values + start + n_keys * WIDTH + lanes, new_value)
    best = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
    total = tl.full((GROUP,), 1.0, tl.float32)
    summed = tl.zeros((GROUP, WIDTH), tl.float32) + new_value.to(tl.float32)[None, :]
    for begin in range(0, n_keys, KEYS):
        at = begin + block
        inside = at < n_keys
        place = start + at[:, None] * WIDTH + lanes[None, :]
        k = tl.load(keys + place, mask=inside[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        share = tl.exp(score - higher[:, None])
        shrink = tl.exp(best - higher)
        v = tl.load(values + place, mask=inside[:, None], other=0.0)
        total = total * shrink + tl.sum(share, 1)
        summed = summed * shrink[:, None] + tl.dot(share.to(v.dtype), v, input_precision="ieee")
        best = higher
    tl.store(out + own, summed / total[:, None], mask=valid)


def decode_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
    lengths: torch.Tensor, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Attention of query [n, heads, d] to the first lengths [n] int64 tokens of cache slots keys, values [>= n, kv heads, L, d]
    and to the new token's key, value [n, kv heads, d], which are written behind them -> [n, heads, d].

    Query heads of one group share a kv head, as in Llama.
    """
    n_rows, n_heads, width = query.shape
    n_kv = keys.shape[1]
    query = query.contiguous()
    if key.stride() != value.stride() or key.stride(2) != 1:
        key, value = key.contiguous(), value.contiguous()
    out = torch.empty_like(query)
    group = max(16, triton.next_power_of_2(n_heads // n_kv))  # tl.dot needs at least 16 rows
    _decode[(n_rows, n_kv)](
        query, key, value, keys, values, lengths, out, scale, keys.stride(0), keys.stride(1), key.stride(0), key.stride(1),
        n_heads // n_kv, GROUP=group, WIDTH=width, KEYS=_KEYS, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
