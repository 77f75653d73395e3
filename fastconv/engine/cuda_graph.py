"""Forward and backward passes of micro-batches as CUDA graphs, so that a micro-step is one launch.

Batches are padded to a few sizes. A size is run directly the first time (which loads kernels and allocates memory),
captured the second time, and replayed from then on. All three give the same bits, so a resumed run does too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastconv.engine.attention import Packed, Padded, Ragged
from fastconv.engine.batch import MicroBatch, PaddedSizes
from fastconv.engine.stack import Stack

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
