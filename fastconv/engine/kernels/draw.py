"""Triton kernels for drawing a token from each row of logits: the likeliest tokens without sorting the vocabulary, and draws
from a nucleus of any size. Probabilities are computed as they are read, and never stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# pyright: reportMissingImports=false, reportIndexIssue=false
# Triton comes with torch's CUDA builds alone, and pyright does not see what its decorator makes of a function.

#: Logits that one program reads at a time.
_BLOCK = 4096
#: Below all logits, and finite: the difference of two is a number.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _probability(logit, largest, total, sharpness):
    return tl.exp((logit - largest) * sharpness) / total


@triton.jit
def _likeliest(logits, values, tokens, largest, totals, n, sharpness, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), _LOWEST, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        each = tl.load(logits + row * n + start + at, mask=start + at < n, other=_LOWEST).to(tl.float32)
        higher = tl.maximum(tops, each)
        sums = sums * tl.exp((tops - higher) * sharpness) + tl.exp((each - higher) * sharpness)
        tops = higher
    top = tl.max(tops, 0)
    total = tl.sum(sums * tl.exp((tops - top) * sharpness), 0)
    tl.store(largest + row, top)
    tl.store(totals + row, total)
    seen = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        each = tl.load(logits + row * n + start + at, mask=start + at < n, other=_LOWEST).to(tl.float32)
        probability = _probability(each, top, total, sharpness)
        taken = (probability >= 1.0 / K).to(tl.int32)
        place = row * K + seen + tl.cumsum(taken, 0) - 1
        tl.store(values + place, probability, mask=taken > 0)
        tl.store(tokens + place, (start + at).to(tl.int64), mask=taken > 0)
        seen += tl.sum(taken, 0)


@dataclass(frozen=True)
class Drawn:
    """Rows of logits [n, vocab] at `sharpness`, the inverse of the temperature: their probabilities are
    exp((logits - largest) * sharpness) / totals, both [n] fp32."""

    logits: torch.Tensor
    sharpness: float
    largest: torch.Tensor
    totals: torch.Tensor


def likeliest(logits: torch.Tensor, temperature: float, k: int) -> tuple[torch.Tensor, torch.Tensor, Drawn]:
    """The tokens of each row of logits [n, vocab] whose probability is 1/k or more, which are k at most, as (their
    probabilities [n, k] fp32, the likeliest first, then zeros; the tokens [n, k] int64; what `draw_wide` needs).

    Equally likely ones keep their order. A row is read twice, where `torch.topk` over a vocabulary reads and sorts it
    several times.
    """
    n_rows, vocab = logits.shape
    logits = logits.contiguous()
    values = torch.zeros(n_rows, k, dtype=torch.float32, device=logits.device)
    tokens = torch.zeros(n_rows, k, dtype=torch.int64, device=logits.device)
    drawn = Drawn(logits, 1.0 / temperature, values.new_empty(n_rows), values.new_empty(n_rows))
    _likeliest[(n_rows,)](
        logits, values, tokens, drawn.largest, drawn.totals, vocab, drawn.sharpness, K=k, BLOCK=_BLOCK, num_warps=8
    )
    values, order = torch.sort(values, dim=-1, descending=True, stable=True)
    return values, tokens.gather(-1, order), drawn


@triton.jit
def _mass_above(row, n, bits, largest, total, sharpness, BLOCK: tl.constexpr):
    """Sum of the probabilities whose bits are above `bits`; positive floats are in the order of their bits."""
    at = tl.arange(0, BLOCK)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        each = tl.load(row + start + at, mask=start + at < n, other=_LOWEST).to(tl.float32)
        value = _probability(each, largest, total, sharpness)
        mass += tl.where(value.to(tl.int32, bitcast=True) > bits, value, 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _least_bits(row, n, low, mass, largest, total, sharpness, STRICT: tl.constexpr, BLOCK: tl.constexpr):
    """The least bits, from `low` on, above which there is less than `mass`; or without STRICT, not more than it."""
    high = tl.full((), 0x3F800000, tl.int32)  # the bits of 1, above which there is nothing
    while low < high:
        middle = low + (high - low) // 2
        above = _mass_above(row, n, middle, largest, total, sharpness, BLOCK)
        enough = above < mass if STRICT else above <= mass
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return low


@triton.jit
def _draw_wide(logits, uniforms, wide, chosen, tops, totals, n, top_p, sharpness, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(wide + row) != 0:
        values, top, total = logits + row * n, tl.load(tops + row), tl.load(totals + row)
        last = _least_bits(values, n, tl.full((), 0, tl.int32), top_p, top, total, sharpness, True, BLOCK)
        above, value = _mass_above(values, n, last, top, total, sharpness, BLOCK), last.to(tl.float32, bitcast=True)
        ties = tl.where(value > 0.0, tl.ceil((top_p - above) / tl.maximum(value, 1e-38)), 0.0)
        target = tl.load(uniforms + row) * (above + ties * value)
        drawn = _least_bits(values, n, last, target, top, total, sharpness, False, BLOCK)
        share = drawn.to(tl.float32, bitcast=True)
        before = _mass_above(values, n, drawn, top, total, sharpness, BLOCK)
        place = ((target - before) / tl.maximum(share, 1e-38)).to(tl.int32)
        at = tl.arange(0, BLOCK)
        seen = tl.full((), 0, tl.int32)
        found = tl.full((), 0, tl.int32)
        for start in range(0, n, BLOCK):
            each = tl.load(values + start + at, mask=start + at < n, other=_LOWEST).to(tl.float32)
            same = (_probability(each, top, total, sharpness) == share) & (start + at < n)
            equal = same.to(tl.int32)
            count = seen + tl.cumsum(equal, 0)
            # the last equal one at most: rounding may ask for one more than there are
            hit = tl.where(same & (count <= place + 1), start + at, -1)
            found = tl.maximum(found, tl.max(hit, 0))
            seen += tl.sum(equal, 0)
        tl.store(chosen + row, found.to(tl.int64))


def draw_wide(drawn: Drawn, uniforms: torch.Tensor, wide: torch.Tensor, top_p: float, chosen: torch.Tensor) -> None:
    """Write into chosen [n] int64 the tokens of the rows that are `wide` [n] bool: the inverse of the nucleus' CDF at
    uniforms [n] fp32, most likely tokens first, equally likely ones in their order.

    Nothing is sorted: the least probability of the nucleus and that of the drawn token are found by bisection over the bits
    of a float, some 60 passes over a row that stays in cache. The host does not wait.
    """
    n_rows, vocab = drawn.logits.shape
    _draw_wide[(n_rows,)](
        drawn.logits, uniforms, wide, chosen, drawn.largest, drawn.totals, vocab, top_p, drawn.sharpness,
        BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
