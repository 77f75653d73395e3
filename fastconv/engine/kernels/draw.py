"""A Triton kernel that draws a token from each row of logits: from a nucleus of any size, without sorting.

A row is read once for its largest logit and its total and once more to copy aside the tokens that may be in the
nucleus, few of the vocabulary; the rest is done on the copy. Probabilities are computed as they are read, never stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# pyright: reportMissingImports=false, reportIndexIssue=false
# Triton comes with torch's CUDA builds alone, and pyright does not see what its decorator makes of a function.

#: Logits that one program reads at a time, from a row of the vocabulary and from the copy.
_BLOCK, _CHUNK = 4096, 1024
#: Tokens of a row that are copied aside at most. No row has more of them with 1/_CAPACITY of the probability each.
_CAPACITY = 8192
#: Of a thread, so that two programs share a multiprocessor of NVIDIA's and one reads while the other waits.
_MOST_REGISTERS = 128
#: Below all logits, and finite: the difference of two is a number.
_LOWEST = tl.constexpr(-1e30)
#: The bits of 1, above which there is no probability.
_ONE = tl.constexpr(0x3F800000)
#: Tokens below this probability are not copied: where the nucleus needs them, they are too many.
_LEAST_FLOOR = tl.constexpr(1e-6)


@triton.jit
def _probability(logit, largest, total, sharpness):
    return tl.exp((logit.to(tl.float32) - largest) * sharpness) / total


@triton.jit
def _largest_and_total(row, n, sharpness, BLOCK: tl.constexpr):
    """The largest logit, and the sum of exp((logits - largest) * sharpness)."""
    at = tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), _LOWEST, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        each = tl.load(row + start + at, mask=start + at < n, other=_LOWEST).to(tl.float32)
        higher = tl.maximum(tops, each)
        sums = sums * tl.exp((tops - higher) * sharpness) + tl.exp((each - higher) * sharpness)
        tops = higher
    top = tl.max(tops, 0)
    return top, tl.sum(sums * tl.exp((tops - top) * sharpness), 0)


@triton.jit
def _copy_aside(
    row,
    n,
    floor,
    largest,
    total,
    sharpness,
    kept,
    places,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the places of the tokens of probability `floor` or more to `places`, in order, and their logits to `kept`.

    Returns how many there are; those beyond CAPACITY are not written.
    """
    at = tl.arange(0, BLOCK)
    seen = tl.full((), 0, tl.int32)
    tl.debug_barrier()  # what is written here other threads read, now and the last time
    for start in range(0, n, BLOCK):
        each = tl.load(row + start + at, mask=start + at < n, other=_LOWEST)
        taken = ((_probability(each, largest, total, sharpness) >= floor) & (start + at < n)).to(tl.int32)
        place = seen + tl.cumsum(taken, 0) - 1
        tl.store(places + place, start + at, mask=(taken > 0) & (place < CAPACITY))
        seen += tl.sum(taken, 0)
    tl.debug_barrier()
    each = tl.arange(0, CHUNK)
    for start in range(0, tl.minimum(seen, CAPACITY), CHUNK):
        written = start + each < tl.minimum(seen, CAPACITY)
        place = tl.load(places + start + each, mask=written, other=0)
        tl.store(kept + start + each, tl.load(row + place, mask=written), mask=written)
    tl.debug_barrier()
    return seen


@triton.jit
def _split(row, n, bits, largest, total, sharpness, BLOCK: tl.constexpr):
    """(Sum of the probabilities whose bits are above `bits`, the most bits of the others, the least of those above).

    Positive floats are in the order of their bits.
    """
    at = tl.arange(0, BLOCK)
    mass = tl.zeros((BLOCK,), tl.float32)
    under = tl.zeros((BLOCK,), tl.int32)
    over = tl.full((BLOCK,), _ONE, tl.int32)
    for start in range(0, n, BLOCK):
        each = tl.load(row + start + at, mask=start + at < n, other=_LOWEST)
        value = _probability(each, largest, total, sharpness)
        its = value.to(tl.int32, bitcast=True)
        mass += tl.where(its > bits, value, 0.0)
        under = tl.maximum(under, tl.where(its > bits, 0, its))
        over = tl.minimum(over, tl.where(its > bits, its, _ONE))
    return tl.sum(mass, 0), tl.max(under, 0), tl.min(over, 0)


@triton.jit
def _least_bits(row, n, low, mass, largest, total, sharpness, STRICT: tl.constexpr, BLOCK: tl.constexpr):
    """The least bits, from `low` on, above which there is less than `mass` (not STRICT: not more), and what is above.

    A bisection whose ends are bits of probabilities that occur: about as many passes as their number has bits.
    """
    high = tl.full((), _ONE, tl.int32)
    above_high = tl.full((), 0.0, tl.float32)
    while low < high:
        above, under, over = _split(row, n, low + (high - low) // 2, largest, total, sharpness, BLOCK)
        enough = above < mass if STRICT else above <= mass
        high = tl.where(enough, under, high)
        above_high = tl.where(enough, above, above_high)
        low = tl.where(enough, low, tl.minimum(over, high))
    return high, above_high


@triton.jit
def _find(row, n, uniform, top_p, largest, total, sharpness, BLOCK: tl.constexpr):
    """The place in `row` of the token at `uniform` of the nucleus' CDF: likeliest tokens first, equal ones in order."""
    zero = tl.full((), 0, tl.int32)
    last, above = _least_bits(row, n, zero, top_p, largest, total, sharpness, True, BLOCK)
    value = last.to(tl.float32, bitcast=True)
    ties = tl.where(value > 0.0, tl.ceil((top_p - above) / tl.maximum(value, 1e-38)), 0.0)
    target = uniform * (above + ties * value)
    drawn, before = _least_bits(row, n, last, target, largest, total, sharpness, False, BLOCK)
    share = drawn.to(tl.float32, bitcast=True)
    place = tl.floor((target - before) / tl.maximum(share, 1e-38))
    # rounding may ask for one more than the nucleus has, or than there are: the last one is taken then
    wanted = tl.where(drawn == last, tl.minimum(place, ties - 1.0), place).to(tl.int32) + 1
    at = tl.arange(0, BLOCK)
    seen = tl.full((), 0, tl.int32)
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        each = tl.load(row + start + at, mask=start + at < n, other=_LOWEST)
        same = (_probability(each, largest, total, sharpness) == share) & (start + at < n)
        count = seen + tl.cumsum(same.to(tl.int32), 0)
        found = tl.maximum(found, tl.where(same & (count <= wanted), start + at, 0))
        seen += tl.sum(same.to(tl.int32), 0)
    return tl.max(found, 0)


@triton.jit
def _nucleus_draw(
    logits, uniforms, chosen, kept, places, n, top_p, sharpness,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    row, kept, places = logits + at * n, kept + at * CAPACITY, places + at * CAPACITY
    uniform = tl.load(uniforms + at)
    largest, total = _largest_and_total(row, n, sharpness, BLOCK)
    floor = tl.full((), 1.0 / CAPACITY, tl.float32)
    n_kept = tl.full((), 0, tl.int32)
    mass = tl.full((), 0.0, tl.float32)
    while (mass < top_p) & (n_kept <= CAPACITY) & (floor > _LEAST_FLOOR):
        n_kept = _copy_aside(row, n, floor, largest, total, sharpness, kept, places, CAPACITY, BLOCK, CHUNK)
        mass, _, _ = _split(kept, tl.minimum(n_kept, CAPACITY), 0, largest, total, sharpness, CHUNK)
        floor = floor / 8.0
    if (n_kept <= CAPACITY) & (mass >= top_p):
        place = _find(kept, n_kept, uniform, top_p, largest, total, sharpness, CHUNK)
        token = tl.load(places + place)
    else:
        token = _find(row, n, uniform, top_p, largest, total, sharpness, BLOCK)
    tl.store(chosen + at, token.to(tl.int64))


def draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """A token [n] int64 for each row of logits [n, vocab]: the inverse of the CDF of its nucleus at uniforms [n] fp32,
    most likely tokens first, equally likely ones in their order.

    What a row gives depends on that row alone, the memory asked for on the shape alone, and the host does not wait.
    Tokens are copied aside down to a probability that is lowered until they reach `top_p`. Their least probability in
    the nucleus and that of the drawn one are found by bisection. A row that has too many of them is itself read some
    30 times, or 40 in fp32.
    """
    n_rows, vocab = logits.shape
    logits, uniforms = logits.contiguous(), uniforms.contiguous()
    chosen = torch.empty(n_rows, dtype=torch.int64, device=logits.device)
    kept = logits.new_empty(n_rows, _CAPACITY)
    places = torch.empty(n_rows, _CAPACITY, dtype=torch.int32, device=logits.device)
    _nucleus_draw[(n_rows,)](
        logits, uniforms, chosen, kept, places, vocab, top_p, 1.0 / temperature,
        CAPACITY=_CAPACITY, BLOCK=_BLOCK, CHUNK=_CHUNK, num_warps=8, maxnreg=_MOST_REGISTERS,
    )  # fmt: skip
    return chosen
