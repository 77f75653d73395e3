"""Launches the kernels of `lora_triton`: one layer, or layers that share their input, as one autograd function.

Import it only where triton is installed and a GPU or its interpreter can run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

from fastconv.engine.kernels.lora_tables import LayerCall
from fastconv.engine.kernels.lora_triton import add_up, expand, finish_shrink, input_side, output_side, shrink

#: Rows that one program of `finish_shrink` sums, and elements that one of `add_up` adds.
_FINISH_ROWS, _ADD_ELEMENTS = 16, 1024
#: Tokens at a time where several modules have masks of their own: with more, their masks do not fit into registers.
_MASKED_ROWS = 32
#: Columns of `WeightTable.table`: A of the frozen and the trainable part, B of both, gradients of the trainable A and
#: B.
_A, _B, _GRAD_A, _GRAD_B = (0, 2), (1, 3), 4, 5


def stacked_linear(x: torch.Tensor, call: LayerCall, trained: Sequence[torch.Tensor]) -> torch.Tensor:
    """W x + b + the branches, x [T, in] -> [T, out], the outputs of the call's modules side by side; the backward pass
    adds to the `.grad` of the weights `trained`."""
    return _Stacked.apply(x, call, *trained)  # pyright: ignore[reportReturnType]


class _Stacked(torch.autograd.Function):
    """Saves x [T, in] and its low-rank products [T, modules * ranks]; the dropout mask is computed again from the seeds."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: LayerCall, *trained: torch.Tensor) -> torch.Tensor:
        xa = _shrink_input(x, call)
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
        dxa = _shrink_output(dy, call)
        first = call.tiling.order == "base_first"
        dx = (dy @ call.weight if first else torch.empty_like(x)) if wants_x else None
        _input_side(x, dxa, dx, call, wants_weights=wants_weights, adds=first)
        if dx is not None and not first:
            dx.addmm_(dy, call.weight)
        if wants_weights:
            _output_side(dy, xa, call)
        return dx, None, *[None] * ctx.n_trained


def _shrink_input(x: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """Scaled products [T, modules * ranks] of x [T, in] with every module's A, dropping out where there are seeds."""
    out = torch.empty(len(x), call.n_modules * call.weights.width, dtype=x.dtype, device=x.device)
    _shrink(x, out, call, call.weights.table, call.scales, call.seeds, _A)
    return out


def _shrink_output(dy: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """Scaled products [T, modules * ranks] of dy [T, out] with every module's B transposed."""
    width = call.weights.width
    out = torch.empty(len(dy), call.n_modules * width, dtype=dy.dtype, device=dy.device)
    for module, (first, last) in enumerate(call.columns):
        low = out[:, module * width : (module + 1) * width]
        _shrink(dy[:, first:last], low, call, call.weights.table[module], call.scales[module], None, _B)
    return out


def _shrink(
    x: torch.Tensor, out: torch.Tensor, call: LayerCall, places: torch.Tensor, scales: torch.Tensor,
    seeds: torch.Tensor | None, columns: tuple[int, int],
) -> None:  # fmt: skip
    """Into `out` the products of x [T, n] with those columns of `places`, for all modules of `places`."""
    weights, tiling, tiles = call.weights, call.tiling, call.rows.shrink_tiles
    n_modules = places.shape[0] if places.ndim == 3 else 1
    n_tok, n_k = x.shape
    split = tiling.split_of(n_k)
    splits = -(-n_k // split)
    partial = torch.empty(splits, n_tok, n_modules * weights.width, dtype=torch.float32, device=x.device)
    cast(Any, shrink)[(len(tiles), splits)](
        x, partial, tiles, places, call.live.thresholds, _or_any(seeds, tiles), *call.three_salts, n_tok, call.n_slots,
        n_k, x.stride(0), FROZEN=columns[0], TRAINED=columns[1], ACROSS=columns == _B, RF=weights.rank_f,
        RT=weights.rank_t, DROPS=seeds is not None, M=tiling.shrink_m, K=tiling.shrink_k, ALIGNED=weights.aligned,
        SPLIT=split, MODULES=n_modules,
    )  # fmt: skip
    cast(Any, finish_shrink)[(len(tiles), tiling.shrink_m // _FINISH_ROWS)](
        partial, out, tiles, scales, n_tok, call.n_slots, out.stride(0), RF=weights.rank_f, RT=weights.rank_t,
        SPLITS=splits, ROWS=_FINISH_ROWS, MODULES=n_modules,
    )  # fmt: skip


def _expand(
    xa: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, call: LayerCall, *, adds: bool
) -> torch.Tensor:
    """y [T, out] = (y +) xa B^T (+ bias), in place, module by module."""
    tiles, weights, tiling = call.rows.expand_tiles, call.weights, call.tiling
    for module, (first, last) in enumerate(call.columns):
        low, out = xa[:, module * weights.width :], y[:, first:last]
        added = None if bias is None else bias[first:last]
        cast(Any, expand)[(len(tiles), -(-(last - first) // tiling.expand_n))](
            low, out, _or_any(added, xa), tiles, weights.table[module], len(y), last - first, xa.stride(0), y.stride(0),
            RF=weights.rank_f, RT=weights.rank_t, BIASED=bias is not None, ALIGNED=weights.aligned, ADDS=adds,
            M=tiling.expand_m, N=tiling.expand_n,
        )  # fmt: skip
    return y


def _input_side(
    x: torch.Tensor, dxa: torch.Tensor, dx: torch.Tensor | None, call: LayerCall, *, wants_weights: bool, adds: bool
) -> None:
    """The branches' part of dx in place, and the gradients of every A added to their `.grad`."""
    rows, weights, tiling = call.rows, call.weights, call.tiling
    n_tok, n_in = x.shape
    wants_a = wants_weights and weights.rank_t > 0
    if dx is None and not wants_a:
        return
    m = min(tiling.chunk_m, _MASKED_ROWS) if call.seeds is not None and call.n_modules > 1 else tiling.chunk_m
    n_partial = call.n_modules * len(rows.chunks) * weights.rank_t * n_in if wants_a else 0
    partial = torch.empty(n_partial, dtype=torch.float32, device=x.device)
    cast(Any, input_side)[(len(rows.chunks), -(-n_in // tiling.chunk_n))](
        x, dxa, x if dx is None else dx, partial, rows.chunks, weights.table, call.live.thresholds,
        _or_any(call.seeds, rows.chunks), *call.three_salts, n_tok, call.n_slots, n_in, RF=weights.rank_f,
        RT=weights.rank_t, DROPS=call.seeds is not None, WANTS_X=dx is not None, WANTS_A=wants_a,
        ALIGNED=weights.aligned, ADDS=adds, M=m, N=tiling.chunk_n, MODULES=call.n_modules,
    )  # fmt: skip
    if wants_a:
        _add_up(partial, call, weights.table, n_in, _GRAD_A)


def _output_side(dy: torch.Tensor, xa: torch.Tensor, call: LayerCall) -> None:
    """The gradients of every B added to their `.grad`, module by module."""
    rows, weights, tiling = call.rows, call.weights, call.tiling
    for module, (first, last) in enumerate(call.columns):
        n_out, places = last - first, weights.table[module]
        partial = torch.empty(len(rows.chunks) * weights.rank_t * n_out, dtype=torch.float32, device=dy.device)
        cast(Any, output_side)[(len(rows.chunks), -(-n_out // tiling.chunk_n))](
            dy[:, first:last], xa[:, module * weights.width :], partial, rows.chunks, places, len(dy), n_out,
            dy.stride(0), xa.stride(0), ALIGNED=weights.aligned, RF=weights.rank_f, RT=weights.rank_t, M=tiling.chunk_m,
            N=tiling.chunk_n,
        )  # fmt: skip
        _add_up(partial, call, places, n_out, _GRAD_B)


def _add_up(partial: torch.Tensor, call: LayerCall, places: torch.Tensor, width: int, column: int) -> None:
    weights, chunks_of, n_chunks = call.weights, call.rows.chunks_of, len(call.rows.chunks)
    n_modules = places.shape[0] if places.ndim == 3 else 1
    cast(Any, add_up)[(len(chunks_of), -(-weights.rank_t * width // _ADD_ELEMENTS), n_modules)](
        partial, chunks_of, places, width, n_chunks, AT=column, RT=weights.rank_t, N=_ADD_ELEMENTS
    )


def _or_any(tensor: torch.Tensor | None, placeholder: torch.Tensor) -> torch.Tensor:
    """A tensor for a kernel argument that is not read if `tensor` is None."""
    return placeholder if tensor is None else tensor
