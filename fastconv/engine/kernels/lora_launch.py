"""The stacked layer as one autograd function: what is saved, which kernel runs when, where gradients go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

from fastconv.engine.kernels import lora_triton as kernel_triton
from fastconv.engine.kernels.lora import Call

#: Jitted functions look like plain ones to a type checker.
_KERNELS = cast(Any, kernel_triton)
#: Rows that one program of `finish_shrink` sums, and elements that one of `add_up` adds.
_FINISH_ROWS, _ADD_ELEMENTS = 16, 1024
#: Columns of `Places.table`: A of the frozen and the trainable part, B of both, the gradients of the trainable two.
_A, _B, _GRAD_A, _GRAD_B = (0, 2), (1, 3), 4, 5


def stacked_linear(x: torch.Tensor, call: Call, trained: Sequence[torch.Tensor]) -> torch.Tensor:
    """W x + b + the branches, x [T, in] -> [T, out]. `trained` are the weights whose `.grad` the backward adds to."""
    return _Stacked.apply(x, call, *trained)  # pyright: ignore[reportReturnType]


class _Stacked(torch.autograd.Function):
    """Saves x [T, in] and its low-rank products [T, ranks]; the mask is drawn again from the seeds."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: Call, *trained: torch.Tensor) -> torch.Tensor:
        xa = _shrink(x, call, _A, call.seeds)
        ctx.call, ctx.n_trained = call, len(trained)
        ctx.save_for_backward(x, xa)
        if call.tiling.order == "base_first":
            return _expand(xa, F.linear(x, call.weight, call.bias), None, call, adds=True)
        y = _expand(xa, x.new_empty(len(x), call.weight.shape[0]), call.bias, call, adds=False)
        return y.addmm_(x, call.weight.t())

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        call: Call = ctx.call
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


def _shrink(x: torch.Tensor, call: Call, columns: tuple[int, int], seeds: torch.Tensor | None) -> torch.Tensor:
    """Scaled products [T, ranks] of x [T, n] with A (dropping out where there are seeds), or with B transposed."""
    places, tiling = call.places, call.tiling
    n_tok, n_k = x.shape
    split, width = tiling.split_of(n_k), places.rank_f + places.rank_t
    splits = -(-n_k // split)
    partial = torch.empty(splits, n_tok, width, dtype=torch.float32, device=x.device)
    tiles = call.rows.shrink_tiles
    _KERNELS.shrink[(len(tiles), splits)](
        x, partial, tiles, places.table, call.live.thresholds, _or_any(seeds, tiles), call.salt, n_tok, n_k,
        FROZEN=columns[0], TRAINED=columns[1], ACROSS=columns == _B, RF=places.rank_f, RT=places.rank_t,
        DROPS=seeds is not None, M=tiling.shrink_m, K=tiling.shrink_k, ALIGNED=places.aligned,
        SPLIT=split,
    )  # fmt: skip
    out = torch.empty(n_tok, width, dtype=x.dtype, device=x.device)
    _KERNELS.finish_shrink[(len(tiles), tiling.shrink_m // _FINISH_ROWS)](
        partial,
        out,
        tiles,
        call.live.scales,
        n_tok,
        RF=places.rank_f,
        RT=places.rank_t,
        SPLITS=splits,
        ROWS=_FINISH_ROWS,
    )
    return out


def _expand(xa: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, call: Call, *, adds: bool) -> torch.Tensor:
    """y [T, out] = (y +) xa B^T (+ bias), in place."""
    tiles, places, tiling = call.rows.expand_tiles, call.places, call.tiling
    n_tok, n_out = y.shape
    _KERNELS.expand[(len(tiles), -(-n_out // tiling.expand_n))](
        xa, y, _or_any(bias, xa), tiles, places.table, n_tok, n_out, RF=places.rank_f, RT=places.rank_t,
        BIASED=bias is not None, ALIGNED=places.aligned, ADDS=adds, M=tiling.expand_m, N=tiling.expand_n,
    )  # fmt: skip
    return y


def _input_side(
    x: torch.Tensor, dxa: torch.Tensor, dx: torch.Tensor | None, call: Call, *, wants_weights: bool, adds: bool
) -> None:
    """The branches' part of dx in place, and A's gradients added to their `.grad`."""
    rows, places, tiling = call.rows, call.places, call.tiling
    n_tok, n_in = x.shape
    wants_a = wants_weights and places.rank_t > 0
    if dx is None and not wants_a:
        return
    n_partial = len(rows.chunks) * places.rank_t * n_in if wants_a else 0
    partial = torch.empty(n_partial, dtype=torch.float32, device=x.device)
    _KERNELS.input_side[(len(rows.chunks), -(-n_in // tiling.chunk_n))](
        x, dxa, x if dx is None else dx, partial, rows.chunks, places.table, call.live.thresholds,
        _or_any(call.seeds, rows.chunks), call.salt, n_tok, n_in, RF=places.rank_f, RT=places.rank_t,
        DROPS=call.seeds is not None, WANTS_X=dx is not None, WANTS_A=wants_a, ALIGNED=places.aligned, ADDS=adds,
        M=tiling.chunk_m, N=tiling.chunk_n,
    )  # fmt: skip
    if wants_a:
        _add_up(partial, call, n_in, _GRAD_A)


def _output_side(dy: torch.Tensor, xa: torch.Tensor, call: Call) -> None:
    """B's gradients added to their `.grad`."""
    rows, places, tiling = call.rows, call.places, call.tiling
    n_tok, n_out = dy.shape
    partial = torch.empty(len(rows.chunks) * places.rank_t * n_out, dtype=torch.float32, device=dy.device)
    _KERNELS.output_side[(len(rows.chunks), -(-n_out // tiling.chunk_n))](
        dy, xa, partial, rows.chunks, places.table, n_tok, n_out, ALIGNED=places.aligned, RF=places.rank_f,
        RT=places.rank_t, M=tiling.chunk_m, N=tiling.chunk_n,
    )  # fmt: skip
    _add_up(partial, call, n_out, _GRAD_B)


def _add_up(partial: torch.Tensor, call: Call, width: int, column: int) -> None:
    places, chunks_of = call.places, call.rows.chunks_of
    _KERNELS.add_up[(len(chunks_of), -(-places.rank_t * width // _ADD_ELEMENTS))](
        partial, chunks_of, places.table, width, AT=column, RT=places.rank_t, N=_ADD_ELEMENTS
    )


def _or_any(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A kernel takes a tensor also where a flag tells it not to look."""
    return other if tensor is None else tensor
