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
#: Columns of `WeightTable.table`: A of the frozen and the trainable part, B of both.
_A, _B = (0, 2), (1, 3)


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
        wants_x, wants_weights = ctx.needs_input_grad[0], ctx.n_trained > 0 and call.weights.rank_t > 0
        dxa = _shrink_output(dy, call)
        first = call.tiling.order == "base_first"
        dx = (dy @ call.weight if first else torch.empty_like(x)) if wants_x else None
        of_a = _input_side(x, dxa, dx, call, wants_a=wants_weights, adds=first)
        if dx is not None and not first:
            dx.addmm_(dy, call.weight)
        if wants_weights:
            _add_up(of_a, _output_side(dy, xa, call), x.shape[1], call)
        return dx, None, *[None] * ctx.n_trained


def _shrink_input(x: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """Scaled products [T, modules * ranks] of x [T, in] with every module's A, dropping out where there are seeds."""
    return _shrink(x, call, (x.shape[1],) * 3, call.seeds, _A)


def _shrink_output(dy: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """Scaled products [T, modules * ranks] of dy [T, sum of outs] with every module's B transposed."""
    return _shrink(dy, call, call.three_outs, None, _B)


def _shrink(
    x: torch.Tensor, call: LayerCall, sizes: tuple[int, ...], seeds: torch.Tensor | None, columns: tuple[int, int]
) -> torch.Tensor:  # fmt: skip
    weights, tiling, tiles, n_tok = call.weights, call.tiling, call.rows.shrink_tiles, len(x)
    across, width = columns == _B, call.n_modules * call.weights.width
    split = tiling.split_of(max(sizes))
    splits = -(-max(sizes) // split)
    partial = torch.empty(splits, n_tok, width, dtype=torch.float32, device=x.device)
    cast(Any, shrink)[(len(tiles), splits, call.n_modules if across else 1)](
        x, partial, tiles, weights.table, call.live.thresholds, _or_any(seeds, tiles), *call.three_salts, n_tok,
        call.n_slots, *sizes, x.stride(0), FROZEN=columns[0], TRAINED=columns[1], ACROSS=across, RF=weights.rank_f,
        RT=weights.rank_t, DROPS=seeds is not None, M=tiling.shrink_m, K=tiling.shrink_k, ALIGNED=weights.aligned,
        SPLIT=split, MODULES=call.n_modules,
    )  # fmt: skip
    out = torch.empty(n_tok, width, dtype=x.dtype, device=x.device)
    cast(Any, finish_shrink)[(len(tiles), tiling.shrink_m // _FINISH_ROWS)](
        partial, out, tiles, call.scales, n_tok, call.n_slots, RF=weights.rank_f, RT=weights.rank_t, SPLITS=splits,
        ROWS=_FINISH_ROWS, MODULES=call.n_modules,
    )  # fmt: skip
    return out


def _expand(
    xa: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, call: LayerCall, *, adds: bool
) -> torch.Tensor:
    """y [T, sum of outs] = (y +) xa B^T (+ bias), in place."""
    tiles, weights, tiling = call.rows.expand_tiles, call.weights, call.tiling
    cast(Any, expand)[(len(tiles), -(-max(call.outs) // tiling.expand_n), call.n_modules)](
        xa, y, _or_any(bias, xa), tiles, weights.table, len(y), call.n_slots, *call.three_outs, xa.stride(0), y.stride(0),
        RF=weights.rank_f, RT=weights.rank_t, BIASED=bias is not None, ALIGNED=weights.aligned, ADDS=adds,
        M=tiling.expand_m, N=tiling.expand_n,
    )  # fmt: skip
    return y


def _input_side(
    x: torch.Tensor, dxa: torch.Tensor, dx: torch.Tensor | None, call: LayerCall, *, wants_a: bool, adds: bool
) -> torch.Tensor:
    """The branches' part of dx in place; returns the sums of every chunk for the gradients of every A."""
    weights, tiling = call.weights, call.tiling
    n_tok, n_in = x.shape
    chunks = call.rows.chunks_for(n_in, tiling)
    n_partial = call.n_modules * len(chunks) * weights.rank_t * n_in if wants_a else 0
    partial = torch.empty(n_partial, dtype=torch.float32, device=x.device)
    if dx is None and not wants_a:
        return partial
    m = min(tiling.chunk_m, _MASKED_ROWS) if call.seeds is not None and call.n_modules > 1 else tiling.chunk_m
    cast(Any, input_side)[(len(chunks), -(-n_in // tiling.chunk_n))](
        x, dxa, x if dx is None else dx, partial, chunks.parts, weights.table, call.live.thresholds,
        _or_any(call.seeds, chunks.parts), *call.three_salts, n_tok, call.n_slots, n_in, RF=weights.rank_f,
        RT=weights.rank_t, DROPS=call.seeds is not None, WANTS_X=dx is not None, WANTS_A=wants_a,
        ALIGNED=weights.aligned, ADDS=adds, M=m, N=tiling.chunk_n, MODULES=call.n_modules,
    )  # fmt: skip
    return partial


def _output_side(dy: torch.Tensor, xa: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """The sums of every chunk for the gradients of every B."""
    weights, tiling = call.weights, call.tiling
    chunks = call.rows.chunks_for(max(call.outs), tiling)
    partial = torch.empty(len(chunks) * weights.rank_t * dy.shape[1], dtype=torch.float32, device=dy.device)
    cast(Any, output_side)[(len(chunks), -(-max(call.outs) // tiling.chunk_n), call.n_modules)](
        dy, xa, partial, chunks.parts, weights.table, len(dy), call.n_slots, *call.three_outs, dy.stride(0), xa.stride(0),
        ALIGNED=weights.aligned, RF=weights.rank_f, RT=weights.rank_t, M=tiling.chunk_m, N=tiling.chunk_n,
    )  # fmt: skip
    return partial


def _add_up(of_a: torch.Tensor, of_b: torch.Tensor, n_in: int, call: LayerCall) -> None:
    """Add the chunks' sums to the gradients of every A and B."""
    rank = call.weights.rank_t
    for_a = call.rows.chunks_for(n_in, call.tiling)
    for_b = call.rows.chunks_for(max(call.outs), call.tiling)
    blocks = -(-rank * max(n_in, *call.outs) // _ADD_ELEMENTS)
    cast(Any, add_up)[(len(for_a.of_slot), blocks, 2 * call.n_modules)](
        of_a, of_b, for_a.of_slot, for_b.of_slot, call.weights.table, n_in, *call.three_outs, len(for_a), len(for_b),
        RT=rank, N=_ADD_ELEMENTS, MODULES=call.n_modules,
    )  # fmt: skip


def _or_any(tensor: torch.Tensor | None, placeholder: torch.Tensor) -> torch.Tensor:
    """A tensor for a kernel argument that is not read if `tensor` is None."""
    return placeholder if tensor is None else tensor
