"""The Triton kernels of the stacked layer, and the autograd function that launches them (`stacked_linear`).

Import it only where triton is installed and a GPU or its interpreter can run it. Every kernel program works on a token
range of one slot: a table row (slot, start, stop). Ranks differ between slots (0 if the slot's adapter does not target
the module), so they are padded to RF (frozen part) and RT (trainable part), and the padding reads as zero. `places`
[slots, 8] int64 has for each slot the addresses of A and B of the frozen part, of A and B of the trainable part, and of
the gradients of the latter, then both ranks. Products are accumulated in fp32 in a fixed order, without atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastconv.engine.kernels.lora_tables import LayerCall

# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false


@triton.jit
def _keep(seeds, columns, salt, threshold):
    """`lora.keep_mask` for seeds [M] and columns [N], as booleans [M, N]: the same bits."""
    channels = columns.to(tl.uint32) * 0x9E3779B1 + salt.to(tl.uint32)
    bits = seeds.to(tl.uint32)[:, None] ^ channels[None, :]
    bits = bits ^ (bits >> 16)
    bits = bits * 0x7FEB352D
    bits = bits ^ (bits >> 15)
    bits = bits * 0x846CA68B
    bits = bits ^ (bits >> 16)
    return (bits & 0xFFFFFF) >= threshold.to(tl.uint32)


@triton.jit
def _weights(places, slot, at: tl.constexpr, element: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in column `at` of a slot's places, as a pointer to elements of this type."""
    weights = tl.load(places + slot * 8 + at).to(tl.pointer_type(element))
    if ALIGNED:
        weights = tl.multiple_of(weights, 16)
    return weights


@triton.jit
def _ranks(places, slot, ALIGNED: tl.constexpr):
    """A slot's frozen and trainable rank for this module. Triton loads vectors only if it knows that they are
    aligned."""
    rank_f, rank_t = tl.load(places + slot * 8 + 6), tl.load(places + slot * 8 + 7)
    if ALIGNED:
        rank_f, rank_t = tl.multiple_of(rank_f, 8), tl.multiple_of(rank_t, 8)
    return rank_f, rank_t


@triton.jit
def _columns_by_rank(weights, ks, n_k, rank, PADDED: tl.constexpr, ACROSS: tl.constexpr):
    """A tile [K, PADDED] of A [rank, n_k] transposed, or with ACROSS of B [n_k, rank] as it lies."""
    ranks = tl.arange(0, PADDED)
    if ACROSS:
        where = ks.to(tl.int64)[:, None] * rank + ranks[None, :]
    else:
        where = ranks.to(tl.int64)[None, :] * n_k + ks[:, None]
    return tl.load(weights + where, mask=(ks < n_k)[:, None] & (ranks < rank)[None, :], other=0.0)


@triton.jit
def _rank_by_columns(weights, ns, n_n, rank, PADDED: tl.constexpr, ACROSS: tl.constexpr):
    """A tile [PADDED, N] of A [rank, n_n] as it lies, or with ACROSS of B [n_n, rank] transposed."""
    ranks = tl.arange(0, PADDED)
    if ACROSS:
        where = ns.to(tl.int64)[None, :] * rank + ranks[:, None]
    else:
        where = ranks.to(tl.int64)[:, None] * n_n + ns[None, :]
    return tl.load(weights + where, mask=(ns < n_n)[None, :] & (ranks < rank)[:, None], other=0.0)


@triton.jit(do_not_specialize=["salt", "n_tok"])
def shrink(x, partial, tiles, places, thresholds, seeds, salt, n_tok, n_k,
           FROZEN: tl.constexpr, TRAINED: tl.constexpr, ACROSS: tl.constexpr, RF: tl.constexpr, RT: tl.constexpr,
           DROPS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """partial[split, t] [RF + RT] = x[t, range of the split] @ [frozen; trainable]^T, the trainable columns on the
    kept inputs alone. One pass over x [n_tok, n_k]. FROZEN and TRAINED are the columns of `places` to use."""
    tile, split = tl.program_id(0), tl.program_id(1)
    slot, start, stop = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    if start < stop:
        rows = start + tl.arange(0, M)
        live = rows < stop
        element = x.dtype.element_ty
        rank_f, rank_t = _ranks(places, slot, ALIGNED)
        sums_f = tl.zeros((M, RF if RF else 16), dtype=tl.float32)
        sums_t = tl.zeros((M, RT if RT else 16), dtype=tl.float32)
        if DROPS:
            row_seeds = tl.load(seeds + rows, mask=live, other=0)
            threshold = tl.load(thresholds + slot)
        frozen_weights = _weights(places, slot, FROZEN, element, ALIGNED)
        trained_weights = _weights(places, slot, TRAINED, element, ALIGNED)
        x_rows = x + rows.to(tl.int64)[:, None] * n_k
        for k in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, n_k), K):
            ks = k + tl.arange(0, K)
            given = tl.load(x_rows + ks[None, :], mask=live[:, None] & (ks < n_k)[None, :], other=0.0)
            if RF:
                frozen = _columns_by_rank(frozen_weights, ks, n_k, rank_f, RF, ACROSS)
                sums_f = tl.dot(given, frozen, sums_f, input_precision="ieee")
            if RT:
                if DROPS:
                    given = tl.where(_keep(row_seeds, ks, salt, threshold), given, 0.0)
                trained = _columns_by_rank(trained_weights, ks, n_k, rank_t, RT, ACROSS)
                sums_t = tl.dot(given, trained, sums_t, input_precision="ieee")
        out = partial + (split.to(tl.int64) * n_tok + rows)[:, None] * (RF + RT)
        if RF:
            tl.store(out + tl.arange(0, RF)[None, :], sums_f, mask=live[:, None])
        if RT:
            tl.store(out + RF + tl.arange(0, RT)[None, :], sums_t, mask=live[:, None])


@triton.jit(do_not_specialize=["n_tok"])
def finish_shrink(partial, out, tiles, scales, n_tok,
                  RF: tl.constexpr, RT: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """out[t] = the slot's scales times the sum over splits of partial[split, t], in out's type."""
    tile = tl.program_id(0)
    slot, start, stop = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    rows = start + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = rows < stop
    if RF:
        _sum_splits(partial, out, rows, live, tl.load(scales + slot * 2), n_tok, 0, RF, RF + RT, SPLITS, ROWS)
    if RT:
        _sum_splits(partial, out, rows, live, tl.load(scales + slot * 2 + 1), n_tok, RF, RT, RF + RT, SPLITS, ROWS)


@triton.jit
def _sum_splits(partial, out, rows, live, scale, n_tok, FIRST: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
                SPLITS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    where = rows.to(tl.int64)[:, None] * WIDTH + (FIRST + tl.arange(0, N))[None, :]
    total = tl.zeros((ROWS, N), dtype=tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial + split * (n_tok.to(tl.int64) * WIDTH) + where, mask=live[:, None], other=0.0)
    tl.store(out + where, (total * scale).to(out.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["n_tok"])
def expand(xa, y, bias, tiles, places, n_tok, n_out, RF: tl.constexpr, RT: tl.constexpr, BIASED: tl.constexpr,
           ALIGNED: tl.constexpr, ADDS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """y[t] = xa[t] @ [B frozen | B trainable]^T, plus the bias if BIASED, plus what y held if ADDS."""
    tile = tl.program_id(0)
    slot, start, stop = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    if start < stop:
        rows = start + tl.arange(0, M)
        live = rows < stop
        columns = tl.program_id(1) * N + tl.arange(0, N)
        element = xa.dtype.element_ty
        rank_f, rank_t = _ranks(places, slot, ALIGNED)
        sums = tl.zeros((M, N), dtype=tl.float32)
        xa_rows = xa + rows.to(tl.int64)[:, None] * (RF + RT)
        if RF:
            frozen = _rank_by_columns(_weights(places, slot, 1, element, ALIGNED), columns, n_out, rank_f, RF, True)
            given = tl.load(xa_rows + tl.arange(0, RF)[None, :], mask=live[:, None], other=0.0)
            sums = tl.dot(given, frozen, sums, input_precision="ieee")
        if RT:
            trained = _rank_by_columns(_weights(places, slot, 3, element, ALIGNED), columns, n_out, rank_t, RT, True)
            given = tl.load(xa_rows + RF + tl.arange(0, RT)[None, :], mask=live[:, None], other=0.0)
            sums = tl.dot(given, trained, sums, input_precision="ieee")
        inside = live[:, None] & (columns < n_out)[None, :]
        where = y + rows.to(tl.int64)[:, None] * n_out + columns[None, :]
        if BIASED:
            sums += tl.load(bias + columns, mask=columns < n_out, other=0.0).to(tl.float32)[None, :]
        if ADDS:
            sums += tl.load(where, mask=inside, other=0.0).to(tl.float32)
        tl.store(where, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["salt", "n_tok"])
def input_side(x, dxa, dx, partial, chunks, places, thresholds, seeds, salt, n_tok, n_in,
               RF: tl.constexpr, RT: tl.constexpr, DROPS: tl.constexpr, WANTS_X: tl.constexpr, WANTS_A: tl.constexpr,
               ALIGNED: tl.constexpr, ADDS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Both gradients that need the mask, computed once: dx[t] = dxa_f A_f + kept(dxa_t A_t) (plus what dx held if
    ADDS), and partial[chunk] [rank, n_in] = the sum over the chunk's tokens of dxa_t^T kept(x)."""
    chunk = tl.program_id(0)
    slot, start, stop = tl.load(chunks + chunk * 3), tl.load(chunks + chunk * 3 + 1), tl.load(chunks + chunk * 3 + 2)
    if start < stop:
        columns = tl.program_id(1) * N + tl.arange(0, N)
        in_width = columns < n_in
        element = x.dtype.element_ty
        rank_f, rank_t = _ranks(places, slot, ALIGNED)
        sums = tl.zeros((RT if RT else 16, N), dtype=tl.float32)
        if DROPS:
            threshold = tl.load(thresholds + slot)
        if WANTS_X:
            if RF:
                frozen = _rank_by_columns(_weights(places, slot, 0, element, ALIGNED), columns, n_in, rank_f, RF, False)
            if RT:
                trained = _rank_by_columns(
                    _weights(places, slot, 2, element, ALIGNED), columns, n_in, rank_t, RT, False
                )
        for first in range(start, stop, M):
            rows = first + tl.arange(0, M)
            live = rows < stop
            inside = live[:, None] & in_width[None, :]
            where = rows.to(tl.int64)[:, None] * n_in + columns[None, :]
            dxa_rows = dxa + rows.to(tl.int64)[:, None] * (RF + RT)
            if RT:
                given_t = tl.load(dxa_rows + RF + tl.arange(0, RT)[None, :], mask=live[:, None], other=0.0)
                if DROPS:
                    keep = _keep(tl.load(seeds + rows, mask=live, other=0), columns, salt, threshold)
            if WANTS_X:
                change = tl.zeros((M, N), dtype=tl.float32)
                if RT:
                    change = tl.dot(given_t, trained, change, input_precision="ieee")
                    if DROPS:
                        change = tl.where(keep, change, 0.0)
                if RF:
                    given_f = tl.load(dxa_rows + tl.arange(0, RF)[None, :], mask=live[:, None], other=0.0)
                    change = tl.dot(given_f, frozen, change, input_precision="ieee")
                if ADDS:
                    change += tl.load(dx + where, mask=inside, other=0.0).to(tl.float32)
                tl.store(dx + where, change.to(dx.dtype.element_ty), mask=inside)
            if WANTS_A:
                kept = tl.load(x + where, mask=inside, other=0.0)
                if DROPS:
                    kept = tl.where(keep, kept, 0.0)
                sums = tl.dot(tl.trans(given_t), kept, sums, input_precision="ieee")
        if WANTS_A:
            ranks = tl.arange(0, RT)
            out = partial + chunk.to(tl.int64) * RT * n_in + ranks.to(tl.int64)[:, None] * n_in + columns[None, :]
            tl.store(out, sums, mask=(ranks < rank_t)[:, None] & in_width[None, :])


@triton.jit(do_not_specialize=["n_tok"])
def output_side(dy, xa, partial, chunks, places, n_tok, n_out,
                ALIGNED: tl.constexpr, RF: tl.constexpr, RT: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """partial[chunk] [n_out, rank] = the sum over the chunk's tokens of dy^T xa_t, packed by the slot's own rank."""
    chunk = tl.program_id(0)
    slot, start, stop = tl.load(chunks + chunk * 3), tl.load(chunks + chunk * 3 + 1), tl.load(chunks + chunk * 3 + 2)
    if start < stop:
        columns = tl.program_id(1) * N + tl.arange(0, N)
        ranks = tl.arange(0, RT)
        _, rank_t = _ranks(places, slot, ALIGNED)
        sums = tl.zeros((N, RT), dtype=tl.float32)
        for first in range(start, stop, M):
            rows = first + tl.arange(0, M)
            live = rows < stop
            inside = live[:, None] & (columns < n_out)[None, :]
            given = tl.load(dy + rows.to(tl.int64)[:, None] * n_out + columns[None, :], mask=inside, other=0.0)
            low = tl.load(
                xa + rows.to(tl.int64)[:, None] * (RF + RT) + RF + ranks[None, :], mask=live[:, None], other=0.0
            )
            sums = tl.dot(tl.trans(given), low, sums, input_precision="ieee")
        out = partial + chunk.to(tl.int64) * RT * n_out + columns.to(tl.int64)[:, None] * rank_t + ranks[None, :]
        tl.store(out, sums, mask=(columns < n_out)[:, None] & (ranks < rank_t)[None, :])


@triton.jit(do_not_specialize=["width"])
def add_up(partial, chunks_of, places, width, AT: tl.constexpr, RT: tl.constexpr, N: tl.constexpr):
    """Add to each slot's gradient (fp32, address in column AT) the sum of its chunks, first to last."""
    slot = tl.program_id(0)
    first, last = tl.load(chunks_of + slot * 2), tl.load(chunks_of + slot * 2 + 1)
    rank_t, address = tl.load(places + slot * 8 + 7), tl.load(places + slot * 8 + AT)
    if (rank_t > 0) & (address != 0) & (first < last):
        elements = tl.program_id(1) * N + tl.arange(0, N)
        inside = elements < rank_t * width
        grad = address.to(tl.pointer_type(tl.float32)) + elements
        stride = width.to(tl.int64) * RT
        total = tl.zeros((N,), dtype=tl.float32)
        for chunk in range(first, last):
            total += tl.load(partial + chunk * stride + elements, mask=inside, other=0.0)
        tl.store(grad, tl.load(grad, mask=inside, other=0.0) + total, mask=inside)


#: Rows that one program of `finish_shrink` sums, and elements that one of `add_up` adds.
_FINISH_ROWS, _ADD_ELEMENTS = 16, 1024
#: Columns of `WeightTable.table`: A of the frozen and the trainable part, B of both, gradients of the trainable A and
#: B.
_A, _B, _GRAD_A, _GRAD_B = (0, 2), (1, 3), 4, 5


def stacked_linear(x: torch.Tensor, call: LayerCall, trained: Sequence[torch.Tensor]) -> torch.Tensor:
    """W x + b + the branches, x [T, in] -> [T, out]; the backward pass adds to the `.grad` of the weights `trained`."""
    return _Stacked.apply(x, call, *trained)  # pyright: ignore[reportReturnType]


class _Stacked(torch.autograd.Function):
    """Saves x [T, in] and its low-rank products [T, ranks]; the dropout mask is computed again from the seeds."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: LayerCall, *trained: torch.Tensor) -> torch.Tensor:
        xa = _shrink(x, call, _A, call.seeds)
        ctx.call, ctx.n_trained = call, len(trained)
        ctx.save_for_backward(x, xa)
        if call.tiling.order == "base_first":
            return _expand(xa, F.linear(x, call.weight, call.bias), None, call, adds=True)
        y = _expand(xa, x.new_empty(len(x), call.weight.shape[0]), call.bias, call, adds=False)
        return y.addmm_(x, call.weight.t())

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        call: LayerCall = ctx.call
        x, xa = ctx.saved_tensors
        dy = dy.contiguous()
        wants_x, wants_weights = ctx.needs_input_grad[0], ctx.n_trained > 0
        dxa = _shrink(dy, call, _B, None)
        first = call.tiling.order == "base_first"
        dx = (dy @ call.weight if first else torch.empty_like(x)) if wants_x else None
        _input_side(x, dxa, dx, call, wants_weights=wants_weights, adds=first)
        if dx is not None and not first:
            dx.addmm_(dy, call.weight)
        if wants_weights:
            _output_side(dy, xa, call)
        return dx, None, *[None] * ctx.n_trained


def _shrink(x: torch.Tensor, call: LayerCall, columns: tuple[int, int], seeds: torch.Tensor | None) -> torch.Tensor:
    """Scaled products [T, ranks] of x [T, n] with A (dropping out where there are seeds), or with B transposed."""
    weights, tiling = call.weights, call.tiling
    n_tok, n_k = x.shape
    split, width = tiling.split_of(n_k), weights.rank_f + weights.rank_t
    splits = -(-n_k // split)
    partial = torch.empty(splits, n_tok, width, dtype=torch.float32, device=x.device)
    tiles = call.rows.shrink_tiles
    cast(Any, shrink)[(len(tiles), splits)](
        x, partial, tiles, weights.table, call.live.thresholds, _or_any(seeds, tiles), call.salt, n_tok, n_k,
        FROZEN=columns[0], TRAINED=columns[1], ACROSS=columns == _B, RF=weights.rank_f, RT=weights.rank_t,
        DROPS=seeds is not None, M=tiling.shrink_m, K=tiling.shrink_k, ALIGNED=weights.aligned,
        SPLIT=split,
    )  # fmt: skip
    out = torch.empty(n_tok, width, dtype=x.dtype, device=x.device)
    cast(Any, finish_shrink)[(len(tiles), tiling.shrink_m // _FINISH_ROWS)](
        partial,
        out,
        tiles,
        call.scales,
        n_tok,
        RF=weights.rank_f,
        RT=weights.rank_t,
        SPLITS=splits,
        ROWS=_FINISH_ROWS,
    )
    return out


def _expand(
    xa: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, call: LayerCall, *, adds: bool
) -> torch.Tensor:
    """y [T, out] = (y +) xa B^T (+ bias), in place."""
    tiles, weights, tiling = call.rows.expand_tiles, call.weights, call.tiling
    n_tok, n_out = y.shape
    cast(Any, expand)[(len(tiles), -(-n_out // tiling.expand_n))](
        xa, y, _or_any(bias, xa), tiles, weights.table, n_tok, n_out, RF=weights.rank_f, RT=weights.rank_t,
        BIASED=bias is not None, ALIGNED=weights.aligned, ADDS=adds, M=tiling.expand_m, N=tiling.expand_n,
    )  # fmt: skip
    return y


def _input_side(
    x: torch.Tensor, dxa: torch.Tensor, dx: torch.Tensor | None, call: LayerCall, *, wants_weights: bool, adds: bool
) -> None:
    """The branches' part of dx in place, and A's gradients added to their `.grad`."""
    rows, weights, tiling = call.rows, call.weights, call.tiling
    n_tok, n_in = x.shape
    wants_a = wants_weights and weights.rank_t > 0
    if dx is None and not wants_a:
        return
    n_partial = len(rows.chunks) * weights.rank_t * n_in if wants_a else 0
    partial = torch.empty(n_partial, dtype=torch.float32, device=x.device)
    cast(Any, input_side)[(len(rows.chunks), -(-n_in // tiling.chunk_n))](
        x, dxa, x if dx is None else dx, partial, rows.chunks, weights.table, call.live.thresholds,
        _or_any(call.seeds, rows.chunks), call.salt, n_tok, n_in, RF=weights.rank_f, RT=weights.rank_t,
        DROPS=call.seeds is not None, WANTS_X=dx is not None, WANTS_A=wants_a, ALIGNED=weights.aligned, ADDS=adds,
        M=tiling.chunk_m, N=tiling.chunk_n,
    )  # fmt: skip
    if wants_a:
        _add_up(partial, call, n_in, _GRAD_A)


def _output_side(dy: torch.Tensor, xa: torch.Tensor, call: LayerCall) -> None:
    """B's gradients added to their `.grad`."""
    rows, weights, tiling = call.rows, call.weights, call.tiling
    n_tok, n_out = dy.shape
    partial = torch.empty(len(rows.chunks) * weights.rank_t * n_out, dtype=torch.float32, device=dy.device)
    cast(Any, output_side)[(len(rows.chunks), -(-n_out // tiling.chunk_n))](
        dy, xa, partial, rows.chunks, weights.table, n_tok, n_out, ALIGNED=weights.aligned, RF=weights.rank_f,
        RT=weights.rank_t, M=tiling.chunk_m, N=tiling.chunk_n,
    )  # fmt: skip
    _add_up(partial, call, n_out, _GRAD_B)


def _add_up(partial: torch.Tensor, call: LayerCall, width: int, column: int) -> None:
    weights, chunks_of = call.weights, call.rows.chunks_of
    cast(Any, add_up)[(len(chunks_of), -(-weights.rank_t * width // _ADD_ELEMENTS))](
        partial, chunks_of, weights.table, width, AT=column, RT=weights.rank_t, N=_ADD_ELEMENTS
    )


def _or_any(tensor: torch.Tensor | None, placeholder: torch.Tensor) -> torch.Tensor:
    """A tensor for a kernel argument that is not read if `tensor` is None."""
    return placeholder if tensor is None else tensor
