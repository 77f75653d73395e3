"""Packed micro-batches (rows of several trainees laid end to end on the device, with targets and loss weights), and the
micro-steps over them as CUDA graphs: one launch, whatever the number of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from fastconv.chat import Rendered
from fastconv.engine.attention import Packed, Padded, Ragged, Rows, to_device
from fastconv.engine.model import Base, pack
from fastconv.engine.stack import Slot, Stack


@dataclass(frozen=True, slots=True)
class Item:
    """A training row in an optimizer step.

    `owner` is the index of its trainee, `weight` the loss weight of each supervised token, `seed` its dropout seed.
    """

    owner: int
    row: Rendered
    weight: float
    seed: int


@dataclass(frozen=True)
class PaddedSizes:
    """Sizes (tokens) to pad a micro-batch to: all tokens, a row, supervised tokens. 0 means no padding."""

    n_tok: int = 0
    width: int = 0
    n_supervised: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """A packed micro-batch on the device.

    `ids` and `positions` [T] int64, `seeds` [T] int32 (dropout, None without it). For each of the N supervised
    tokens: `take` [N] int64 is the index of the token before it, `targets` [N] int64 its id, `weights` [N] fp32 its
    loss weight and `owners` [N] int64 the index of its trainee. Padding has weight 0. `slots` are those that have
    rows here, `spans` their token ranges (None if there is one slot).
    """

    slots: tuple[Slot, ...]
    spans: tuple[tuple[int, int], ...] | None
    layout: Rows
    ids: torch.Tensor
    positions: torch.Tensor
    seeds: torch.Tensor | None
    take: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    owners: torch.Tensor


def no_padding(lengths: Sequence[int], n_supervised: int) -> PaddedSizes:
    """Sizes for no padding, whatever the row lengths and the number of supervised tokens are."""
    return PaddedSizes()


def make_micro_batch(
    base: Base, slots: Sequence[Slot], micro: Sequence[Item], sizes_for: Callable[[Sequence[int], int], PaddedSizes]
) -> MicroBatch:
    """The micro-batch of these rows on the base's device, padded to `sizes_for(row lengths, number of supervised
    tokens)`.

    `slots[i]` belongs to owner i; the rows of one owner must be contiguous.
    """
    device = base.device
    lengths = [len(item.row.ids) for item in micro]
    sizes = sizes_for(lengths, sum(item.row.n_supervised for item in micro))
    ids, positions, layout = pack([list(item.row.ids) for item in micro], base, n_tok=sizes.n_tok, width=sizes.width)
    take, targets, weights, owners = _supervision(micro, layout.starts, sizes.n_supervised, device)
    live, spans = [], []
    for owner, slot in enumerate(slots):
        rows = [i for i, item in enumerate(micro) if item.owner == owner]
        if rows:
            live.append(slot)
            spans.append((layout.starts[rows[0]], layout.starts[rows[-1] + 1]))
    seeds = None
    if any(slot.dropout > 0 for slot in live):
        seed_lengths = [(item.seed, length) for item, length in zip(micro, lengths, strict=True)]
        seeds = token_seeds([*seed_lengths, (0, ids.shape[0] - sum(lengths))], device)
    return MicroBatch(
        tuple(live),
        tuple(spans) if len(live) > 1 else None,
        layout,
        ids,
        positions,
        seeds,
        take,
        targets,
        weights,
        owners,
    )


def _supervision(
    micro: Sequence[Item], starts: Sequence[int], n_padded: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(`take`, `targets`, `weights`, `owners`) of a `MicroBatch`, each [N] on `device`."""
    take, targets, weights, owners = [], [], [], []
    for item, begin in zip(micro, starts, strict=False):
        for start, stop in item.row.loss_spans:
            take += range(begin + start - 1, begin + stop - 1)
            targets += item.row.ids[start:stop]
        weights += [item.weight] * item.row.n_supervised
        owners += [item.owner] * item.row.n_supervised
    missing = max(0, n_padded - len(take))
    tensors = (torch.tensor(take), torch.tensor(targets), torch.tensor(weights), torch.tensor(owners))
    return tuple(to_device(F.pad(tensor, (0, missing)), device) for tensor in tensors)  # pyright: ignore[reportReturnType]


def token_seeds(rows: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """Dropout seeds [T] int32, one per token, from (row seed, row length) pairs: row seed + 0x01000193 * position."""
    seeds = torch.cat([seed + 0x01000193 * torch.arange(length, dtype=torch.int64) for seed, length in rows])
    return to_device((seeds & 0x7FFFFFFF).to(torch.int32), device)


#: Sizes are rounded up to multiples of these: padding costs matrix products, more sizes cost captures.
_TOK_STEP, _WIDTH_STEP, _SUPERVISED_STEP = 256, 256, 512
#: A batch of this size keeps the GPU busy longer than the host needs to launch it: it is run directly, unpadded.
_LARGE_TOK = 3072
#: Number of sizes kept as graphs; later ones are run directly.
_MAX_GRAPHS = 64


@dataclass(frozen=True)
class _Graph:
    """A captured micro-step: its input tensors, its loss [1] fp32, and the kernel state that it points to."""

    graph: torch.cuda.CUDAGraph
    inputs: MicroBatch
    loss: torch.Tensor
    kernel_state: Any


class CapturedSteps:
    """The micro-steps of one trainee.

    `step(batch, totals)` runs with the batch's slots live and adds to the gradients and to `totals` [1] fp32.
    """

    def __init__(self, stack: Stack, step: Callable[[MicroBatch, torch.Tensor], None]) -> None:
        self._stack = stack
        self._step = step
        self._seen: set[tuple[int, ...]] = set()
        self._graphs: dict[tuple[int, ...], _Graph] = {}

    def run(self, batch: MicroBatch, totals: torch.Tensor) -> None:
        """Run one micro-step and add its share of the loss to `totals` [1]. Raises torch.OutOfMemoryError."""
        key = _sizes_of(batch)
        full = key not in self._graphs and len(self._graphs) >= _MAX_GRAPHS
        if batch.ids.shape[0] >= _LARGE_TOK or key not in self._seen or full:
            self._seen.add(key)
            with self._stack.live(*batch.slots, spans=batch.spans, dropout_seeds=batch.seeds):
                self._step(batch, totals)
            return
        if key not in self._graphs:
            self._graphs[key] = self._captured(batch)
        captured = self._graphs[key]
        for target, source in zip(_tensors(captured.inputs), _tensors(batch), strict=True):
            target.copy_(source, non_blocking=True)
        if self._stack.route.kernel is not None:
            self._stack.route.kernel.refresh_graph(captured.kernel_state)
        captured.graph.replay()
        totals.add_(captured.loss)

    def _captured(self, batch: MicroBatch) -> _Graph:
        inputs = _copied(batch)
        loss = torch.zeros(1, device=batch.ids.device)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
        kernel, kernel_state = self._stack.route.kernel, None
        with self._stack.live(*inputs.slots, spans=inputs.spans, dropout_seeds=inputs.seeds):
            if kernel is not None:  # its tables are copied from the host, which a graph cannot do
                kernel.prepare(self._stack.route, self._stack.base.dtype, inputs.ids.shape[0])
            with torch.cuda.graph(graph, pool=pool):
                loss.zero_()
                self._step(inputs, loss)
            if kernel is not None:
                kernel_state = kernel.graph_state()
        return _Graph(graph, inputs, loss, kernel_state)


def rounded_sizes(lengths: Sequence[int], n_supervised: int) -> PaddedSizes:
    """The sizes to pad a batch of rows with these lengths (tokens) to; a batch of `_LARGE_TOK` or more is not
    padded."""
    if sum(lengths) >= _LARGE_TOK:
        return PaddedSizes()
    return PaddedSizes(
        _up(sum(lengths), _TOK_STEP), _up(max(lengths), _WIDTH_STEP), _up(n_supervised, _SUPERVISED_STEP)
    )


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _sizes_of(batch: MicroBatch) -> tuple[int, ...]:
    return (_layout(batch).longest, *(tensor.shape[0] for tensor in _tensors(batch)))


def _tensors(batch: MicroBatch) -> list[torch.Tensor]:
    tensors = [batch.ids, batch.positions, *_layout(batch).inputs, batch.take, batch.targets]
    return [*tensors, batch.weights, batch.owners, *([] if batch.seeds is None else [batch.seeds])]


def _layout(batch: MicroBatch) -> Padded | Ragged:
    assert not isinstance(batch.layout, Packed), "graphs are for GPUs, whose layouts lie on the device"
    return batch.layout


def _copied(batch: MicroBatch) -> MicroBatch:
    """The same batch in tensors of its own, whose addresses a graph may keep."""
    layout = _layout(batch).with_inputs([tensor.clone() for tensor in _layout(batch).inputs])
    return replace(
        batch, layout=layout, ids=batch.ids.clone(), positions=batch.positions.clone(), take=batch.take.clone(),
        targets=batch.targets.clone(), weights=batch.weights.clone(), owners=batch.owners.clone(),
        seeds=None if batch.seeds is None else batch.seeds.clone(),
    )  # fmt: skip
