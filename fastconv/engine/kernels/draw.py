"""Triton kernels for drawing a token from each row of probabilities: its most likely tokens without sorting the
vocabulary, and draws from a nucleus of any size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# pyright: reportMissingImports=false, reportIndexIssue=false
# Triton comes with torch's CUDA builds alone, and pyright does not see what its decorator makes of a function.

#: Probabilities that one program reads at a time.
_BLOCK = 4096
#: Classes of probabilities, eight to each power of two: the upper bits of a float, from those of 1 downwards.
_CLASSES = tl.constexpr(256)
_SHIFT = tl.constexpr(20)
_LOWEST = tl.constexpr((0x3F800000 >> 20) - 255)


@triton.jit
def _class_of(probability):
    return tl.maximum((probability.to(tl.int32, bitcast=True) >> _SHIFT) - _LOWEST, 0)


@triton.jit
def _likeliest(probabilities, values, tokens, n, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    counts = tl.zeros((_CLASSES,), tl.int32)
    for start in range(0, n, BLOCK):
        each = tl.load(probabilities + row * n + start + at, mask=start + at < n, other=0.0)
        counts += tl.histogram(_class_of(each), _CLASSES)
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # tokens of this class or a higher one
    least = _CLASSES - tl.sum((above <= K).to(tl.int32), 0)
    seen = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        each = tl.load(probabilities + row * n + start + at, mask=start + at < n, other=0.0)
        taken = ((_class_of(each) >= least) & (start + at < n)).to(tl.int32)
        place = row * K + seen + tl.cumsum(taken, 0) - 1
        tl.store(values + place, each, mask=taken > 0)
        tl.store(tokens + place, (start + at).to(tl.int64), mask=taken > 0)
        seen += tl.sum(taken, 0)


def likeliest(probabilities: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to `k` of the most likely tokens of each row of probabilities [n, vocab] fp32, as (their probabilities [n, k]
    fp32, most likely first, then zeros; the tokens [n, k] int64).

    All tokens of equal classes, eight to each power of two, are among them or none; equally likely ones keep their order.
    A row is read twice, where `torch.topk` over a vocabulary reads and sorts it several times.
    """
    n_rows, vocab = probabilities.shape
    values = probabilities.new_zeros(n_rows, k)
    tokens = torch.zeros(n_rows, k, dtype=torch.int64, device=probabilities.device)
    _likeliest[(n_rows,)](probabilities.contiguous(), values, tokens, vocab, K=k, BLOCK=_BLOCK, num_warps=8)
    values, order = torch.sort(values, dim=-1, descending=True, stable=True)
    return values, tokens.gather(-1, order)


@triton.jit
def _mass_above(row, n, bits, BLOCK: tl.constexpr):
    """Sum of the probabilities whose bits are above `bits`; positive floats are in the order of their bits."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        value = tl.load(row + start + at, mask=start + at < n, other=0.0)
        total += tl.where(value.to(tl.int32, bitcast=True) > bits, value, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _least_bits(row, n, low, mass, STRICT: tl.constexpr, BLOCK: tl.constexpr):
    """The least bits, from `low` on, above which there is less than `mass`; or without STRICT, not more than it."""
    high = tl.full((), 0x3F800000, tl.int32)  # the bits of 1, above which there is nothing
    while low < high:
        middle = low + (high - low) // 2
        above = _mass_above(row, n, middle, BLOCK)
        enough = above < mass if STRICT else above <= mass
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return low


@triton.jit
def _draw_wide(probabilities, uniforms, wide, chosen, n, top_p, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(wide + row) != 0:
        values = probabilities + row * n
        last = _least_bits(values, n, tl.full((), 0, tl.int32), top_p, True, BLOCK)
        above, value = _mass_above(values, n, last, BLOCK), last.to(tl.float32, bitcast=True)
        ties = tl.where(value > 0.0, tl.ceil((top_p - above) / tl.maximum(value, 1e-38)), 0.0)
        target = tl.load(uniforms + row) * (above + ties * value)
        drawn = _least_bits(values, n, last, target, False, BLOCK)
        share = drawn.to(tl.float32, bitcast=True)
        place = ((target - _mass_above(values, n, drawn, BLOCK)) / tl.maximum(share, 1e-38)).to(tl.int32)
        at = tl.arange(0, BLOCK)
        seen = tl.full((), 0, tl.int32)
        found = tl.full((), 0, tl.int32)
        for start in range(0, n, BLOCK):
            each = tl.load(values + start + at, mask=start + at < n, other=-1.0)
            equal = (each == share).to(tl.int32)
            count = seen + tl.cumsum(equal, 0)
            # the last equal one at most: rounding may ask for one more than there are
            hit = tl.where((equal > 0) & (count <= place + 1), start + at, -1)
            found = tl.maximum(found, tl.max(hit, 0))
            seen += tl.sum(equal, 0)
        tl.store(chosen + row, found.to(tl.int64))


def draw_wide(
    probabilities: torch.Tensor, uniforms: torch.Tensor, wide: torch.Tensor, top_p: float, chosen: torch.Tensor
) -> None:
    """Write into chosen [n] int64 the tokens of the rows that are `wide` [n] bool: the inverse of the nucleus' CDF at
    uniforms [n] fp32, most likely tokens first, equally likely ones in their order.

    probabilities [n, vocab] fp32. Nothing is sorted: the least probability of the nucleus and that of the drawn token
    are found by bisection over the bits of a float, some 60 passes over a row that stays in cache. The host does not wait.
    """
    n_rows, vocab = probabilities.shape
    _draw_wide[(n_rows,)](
        probabilities.contiguous(), uniforms, wide, chosen, vocab, top_p, BLOCK=_BLOCK, num_warps=8
    )  # fmt: skip
