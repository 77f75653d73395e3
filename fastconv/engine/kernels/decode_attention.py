"""Attention of one new token per row over a cache, in one launch: each row reads its own length and no more."""

# pyright: reportMissingImports=false, reportIndexIssue=false
# Triton comes with torch's CUDA builds alone, and pyright does not see what its decorator makes of a function.
from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Keys that a program reads at once.
_KEYS = 64


@triton.jit
def _decode(
    query, keys, values, lengths, out, scale, row_stride, head_stride, n_groups,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Online softmax (Milakov and Gimelshein 2018) for the query heads of one kv head of one row."""
    row, kv = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    heads, lanes, block = tl.arange(0, GROUP), tl.arange(0, WIDTH), tl.arange(0, KEYS)
    n_kv = tl.num_programs(1)
    mine = (row * n_kv + kv) * n_groups * WIDTH + heads[:, None] * WIDTH + lanes[None, :]
    real = heads[:, None] < n_groups
    q = tl.load(query + mine, mask=real, other=0.0)
    start = row * row_stride + kv * head_stride
    n_seen = tl.load(lengths + row) + 1
    best = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    summed = tl.zeros((GROUP, WIDTH), tl.float32)
    for begin in range(0, n_seen, KEYS):
        at = begin + block
        inside = at < n_seen
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
    tl.store(out + mine, summed / total[:, None], mask=real)


def decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """query [n, heads, d] over cache slots keys, values [>= n, kv heads, L, d] up to lengths [n] -> [n, heads, d].

    Position `lengths[i]` of row i is its newest token and is seen. Heads of one group share a kv head, as in Llama.
    """
    n_rows, n_heads, width = query.shape
    n_kv = keys.shape[1]
    query = query.contiguous()
    out = torch.empty_like(query)
    group = max(16, triton.next_power_of_2(n_heads // n_kv))  # a matrix product wants 16 rows
    _decode[(n_rows, n_kv)](
        query, keys, values, lengths, out, scale, keys.stride(0), keys.stride(1), n_heads // n_kv,
        GROUP=group, WIDTH=width, KEYS=_KEYS, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
