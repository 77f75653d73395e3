"""Packed micro-batches (rows of several trainees laid end to end on the device, with targets and loss weights), and the
micro-steps over them as CUDA graphs: one launch, whatever the number of layers.

A graph serves every micro-batch of its sizes, whichever adapters it trains. Which sizes are worth a graph follows from
measured times.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from fastconv.chat import Rendered
from fastconv.engine.attention import Packed, Padded, Ragged, Rows, to_device
from fastconv.engine.lora import shared_route
from fastconv.engine.model import Base, pack
from fastconv.engine.score import free_memory, with_memory
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
    """Sizes to pad a micro-batch to: all tokens, a row (tokens), rows, supervised tokens. 0 means no padding."""

    n_tok: int = 0
    width: int = 0
    n_rows: int = 0
    n_supervised: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """A packed micro-batch on the device.

    `ids` and `positions` [T] int64, `seeds` [T] int32 (dropout, None without it). For each of the N supervised
    tokens: `take` [N] int64 is the index of the token before it, `targets` [N] int64 its id, `weights` [N] fp32 its
    loss weight and `owners` [N] int64 the index of its trainee. Padding has weight 0. `slots` are those that have
    rows here, `spans` their token ranges, the last with the padding (None if there is one slot).
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
    rows = [list(item.row.ids) for item in micro]
    ids, positions, layout = pack(rows, base, n_tok=sizes.n_tok, width=sizes.width, n_rows=sizes.n_rows)
    take, targets, weights, owners = _supervision(micro, layout.starts, sizes.n_supervised, device)
    live, spans = [], []
    for owner, slot in enumerate(slots):
        owned = [i for i, item in enumerate(micro) if item.owner == owner]
        if owned:
            live.append(slot)
            spans.append((layout.starts[owned[0]], layout.starts[owned[-1] + 1]))
    spans[-1] = (spans[-1][0], ids.shape[0])
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


#: Number of sizes kept as graphs; later ones are launched directly.
_MAX_GRAPHS = 96
#: A graph says how fast the device is at sizes up to this many times its own.
_LARGER = 1.5
#: A size takes the device at least this share of what a smaller one took it for each token, up to this many times its size.
_SURELY, _NEAR = 0.7, 6


def rounded_sizes(lengths: Sequence[int], n_supervised: int) -> PaddedSizes:
    """The sizes to pad a batch of rows with these lengths (tokens) to.

    Padding costs matrix products, more sizes cost captures: tokens are rounded up by 2 % on average, rows of logits by 4 %,
    rows to a power of two or the middle between two, and what costs least, the width of attention, to a power of two.
    """
    return PaddedSizes(
        _up(sum(lengths), 5, 64), _up(max(lengths), 1, 64), _up(len(lengths), 2, 1), _up(n_supervised, 4, 128)
    )


def _up(n: int, bits: int, least: int) -> int:
    """n rounded up to its first `bits` binary digits, and to a multiple of `least`."""
    step = max(least, 1 << max(0, (n - 1).bit_length() - bits))
    return -(-n // step) * step


class Device(Protocol):
    """What `CapturedSteps` asks of a device; `CudaDevice` is the one there is outside of tests."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` launches, without computing it; calling the result computes it."""
        ...

    def timed(self, run: Callable[[], None]) -> Callable[[], float | None]:
        """Run, and return a function that gives the seconds which it took on the device, or None if not yet known."""
        ...


class CudaDevice:
    """Graphs and timers of the current CUDA device. The graphs share one memory pool: they run one after another."""

    def __init__(self) -> None:
        self._side: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph of `run`, as its `replay`. Raises what a capture that runs out of memory raises."""
        graph = with_memory(partial(self._captured, run))
        if graph is None:  # what the allocator keeps for launched steps is in the way
            free_memory()
            graph = self._captured(run)
        return graph.replay

    def _captured(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """`torch.cuda.graph` would wait for the device and give all its free memory back, pinned memory too: every size
        that is launched afterwards would allocate it anew."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._side = self._side or torch.cuda.Stream()
        self._side.wait_stream(current)
        held = next(iter(self._graphs), None)  # a pool goes with the last of its graphs
        with torch.cuda.stream(self._side):
            graph.capture_begin(pool=None if held is None else held.pool())
            try:
                run()
            finally:
                graph.capture_end()
        current.wait_stream(self._side)
        self._graphs.add(graph)
        return graph

    def timed(self, run: Callable[[], None]) -> Callable[[], float | None]:
        """Timed by events on the stream, which do not make the host wait."""
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        return lambda: began.elapsed_time(ended) / 1000 if ended.query() else None


@dataclass
class StepTimes:
    """Measured times of micro-steps, which say whether a size is worth a graph.

    `launch_s` and `capture_s` are the least seconds of the host for launching a micro-step and for capturing one,
    whose number of kernels does not depend on its size. `device_s` and `device_tok` are those of the largest replayed.
    """

    launch_s: float = math.inf
    capture_s: float = math.inf
    device_s: float = math.inf
    device_tok: int = 0
    _pending: deque[tuple[int, Callable[[], float | None]]] = field(default_factory=deque)

    def replayed(self, n_tok: int, seconds: Callable[[], float | None]) -> None:
        """Note a replay of `n_tok` tokens whose seconds will be known later."""
        self._pending.append((n_tok, seconds))
        self._read()

    def _read(self) -> None:
        while self._pending and (known := self._pending[0][1]()) is not None:
            size = self._pending.popleft()[0]
            if size > self.device_tok:
                self.device_tok, self.device_s = size, known
            elif size == self.device_tok:
                self.device_s = min(self.device_s, known)

    def worth_capturing(self, n_tok: int, n_more: int) -> bool:
        """Whether to capture a size of `n_tok` tokens that is met again, and will be about `n_more` times after this one.

        It is captured if the device would idle as long behind the launches as a capture takes. A size much larger than any
        that was replayed is captured to learn how long the device takes, unless it is so large that the device is busy for
        longer than the host in any case.
        """
        self._read()
        near = 0 < n_tok <= _NEAR * self.device_tok
        if near and self.launch_s < _SURELY * self.device_s * n_tok / self.device_tok:
            return False
        if math.isinf(self.capture_s):
            return True
        if not self.device_tok and self._pending:
            return False
        if n_tok > _LARGER * self.device_tok:
            return not any(size * _LARGER >= n_tok for size, _ in self._pending)
        idle_s = self.launch_s - self.device_s * n_tok / self.device_tok
        return (n_more + 1) * idle_s >= self.capture_s


@dataclass
class Tally:
    """What the micro-steps so far were: their tokens, without and with padding, how many were launched and replayed, how
    many sizes were captured, and the seconds that this took."""

    n_tok: int = 0
    padded_tok: int = 0
    launched: int = 0
    replayed: int = 0
    captures: int = 0
    capture_s: float = 0.0

    def since(self, before: Tally) -> dict[str, float]:
        """The same since a copy that was made before."""
        return {name: value - getattr(before, name) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class _Graph:
    """A captured micro-step: its input tensors, its losses [owners] fp32, and the kernel's tables that it reads."""

    replay: Callable[[], None]
    inputs: MicroBatch
    losses: torch.Tensor
    tables: Any


class CapturedSteps:
    """The micro-steps of all trainees of a stack, launched directly or as graphs of equal sizes.

    `step(batch, totals)` runs with the batch's slots live and adds to the gradients and to `totals` [owners] fp32. Both
    ways compute the same bits. Where the stacked kernel computes every adapted layer, a graph finds adapters and
    gradients through its tables and serves all trainees; elsewhere it is bound to its trainee.
    """

    def __init__(
        self, stack: Stack, step: Callable[[MicroBatch, torch.Tensor], None], device: Device | None = None
    ) -> None:
        self._stack = stack
        self._step = step
        self._device = device or CudaDevice()
        self._direct: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Graph] = {}
        self._full = False
        self._too_large: float = math.inf
        self.times = StepTimes()
        self.tally = Tally()
        #: Optimizer steps that the training under way still has to do.
        self.steps_left = 0

    def __len__(self) -> int:
        """Number of graphs."""
        return len(self._graphs)

    @cached_property
    def shared(self) -> bool:
        """Whether a graph serves all trainees; only then may several train in one micro-step."""
        return shared_route(self._stack.base.model, self._stack.base.dtype) is not None

    def run(self, batch: MicroBatch, totals: torch.Tensor) -> None:
        """Run one micro-step and add its shares of the losses to `totals` [owners]. Raises torch.OutOfMemoryError."""
        n_tok = batch.ids.shape[0]
        with self._stack.live(*batch.slots, spans=batch.spans, dropout_seeds=batch.seeds):
            key = self._key(batch, totals)
            graph = self._graphs.get(key)
            self.tally.n_tok += batch.layout.starts[-1]
            self.tally.padded_tok += n_tok
            if graph is None:
                may = self._direct[key] and not self._full and n_tok < self._too_large
                wanted = may and self.times.worth_capturing(n_tok, self._n_more(key))
                if not wanted or (graph := self._captured(key, batch, totals)) is None:
                    self._launch(key, batch, totals)
                    return
            for target, source in zip(_tensors(graph.inputs), _tensors(batch), strict=True):
                target.copy_(source, non_blocking=True)
            if graph.tables is not None:
                kernel = self._stack.route.kernel
                assert kernel is not None
                kernel.load_tables(graph.tables, self._stack.route, self._stack.base.dtype, n_tok)
            self.times.replayed(n_tok, self._device.timed(graph.replay))
            self.tally.replayed += 1
            totals.add_(graph.losses)

    def _launch(self, key: Hashable, batch: MicroBatch, totals: torch.Tensor) -> None:
        began = time.perf_counter()
        self._step(batch, totals)
        self.times.launch_s = min(self.times.launch_s, time.perf_counter() - began)
        self._direct[key] += 1
        self.tally.launched += 1

    def _n_more(self, key: Hashable) -> int:
        """How often a size that was only launched so far will be met: its share of the steps left, or as often as it was."""
        met, micro_steps = self._direct[key], self.tally.launched + self.tally.replayed
        return max(met, self.steps_left * met // max(1, micro_steps))

    def forget(self) -> None:
        """Give all graphs up, where memory ran out; no size is captured again that is as large as the largest of them."""
        largest = max((graph.inputs.ids.shape[0] for graph in self._graphs.values()), default=math.inf)
        self._too_large = min(self._too_large, largest)
        self._graphs.clear()

    def end_of_trainees(self) -> None:
        """Forget graphs that are bound to trainees which are done."""
        if not self.shared:
            self._graphs.clear()
            self._direct.clear()

    def _key(self, batch: MicroBatch, totals: torch.Tensor) -> Hashable:
        """What two micro-steps must share for one graph to serve both."""
        sizes = (_layout(batch).longest, *(tensor.shape[0] for tensor in _tensors(batch)), len(totals))
        if self.shared:
            kernel = self._stack.route.kernel
            assert kernel is not None
            return sizes, kernel.structure(self._stack.route, self._stack.base.dtype)
        return sizes, tuple((slot.frozen, slot.trainable, slot.dropout) for slot in batch.slots)

    def _captured(self, key: Hashable, batch: MicroBatch, totals: torch.Tensor) -> _Graph | None:
        """The micro-step as a graph; None, and no further ones, where memory runs out."""
        began = time.perf_counter()
        graph = with_memory(partial(self._capture, batch, totals))
        if graph is None:
            self._full = True
            free_memory()
            return None
        took_s = time.perf_counter() - began
        self.times.capture_s = min(self.times.capture_s, took_s)
        self.tally.captures += 1
        self.tally.capture_s += took_s
        self._graphs[key] = graph
        self._full = len(self._graphs) >= _MAX_GRAPHS
        return graph

    def _capture(self, batch: MicroBatch, totals: torch.Tensor) -> _Graph:
        inputs, losses = _copied(batch), torch.zeros_like(totals)
        kernel, tables = self._stack.route.kernel, None
        with self._stack.live(*inputs.slots, spans=inputs.spans, dropout_seeds=inputs.seeds):
            if kernel is not None:
                tables = kernel.own_tables(self._stack.route, self._stack.base.dtype, inputs.ids.shape[0])

            def run() -> None:
                losses.zero_()
                self._step(inputs, losses)

            replay = self._device.capture(run)
        return _Graph(replay, inputs, losses, tables)


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
