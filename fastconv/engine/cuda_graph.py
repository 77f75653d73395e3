"""Micro-steps over packed batches as CUDA graphs: one launch, whatever the number of layers.

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

from fastconv.engine.attention import Packed, Padded, Ragged
from fastconv.engine.lora import shared_route
from fastconv.engine.micro_batch import JobSizes, MicroBatch, job_sizes
from fastconv.engine.score import free_memory, with_memory
from fastconv.engine.stack import Stack
from fastconv.engine.trainee import Job

#: Number of sizes kept as graphs; the one that was used longest ago makes room.
_MAX_GRAPHS = 96
#: What was measured says how fast the device is at sizes up to this many times its own.
_LARGER = 1.5
#: A launched micro-step that the device takes this many times as long for as the host leaves no time to gain.
_BOUND = 1.2
#: A size takes the device at least this share of what a smaller one took it for each token, up to this many times its size.
_SURELY, _NEAR = 0.7, 6


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
    whose number of kernels does not depend on its size. `device_s` and `device_tok` are those of the largest that is known:
    replayed, or launched where the device took longer than the host, which did not hold it up then.
    """

    launch_s: float = math.inf
    capture_s: float = math.inf
    device_s: float = math.inf
    device_tok: int = 0
    _pending: deque[tuple[int, float, Callable[[], float | None]]] = field(default_factory=deque)

    def replayed(self, n_tok: int, seconds: Callable[[], float | None]) -> None:
        """Note a replay of `n_tok` tokens whose seconds will be known later."""
        self._pending.append((n_tok, 0.0, seconds))
        self._read()

    def launched(self, n_tok: int, host_s: float, seconds: Callable[[], float | None]) -> None:
        """Note a launch of `n_tok` tokens which took the host `host_s`; what it took the device will be known later."""
        self.launch_s = min(self.launch_s, host_s)
        self._pending.append((n_tok, host_s, seconds))
        self._read()

    def _read(self) -> None:
        while self._pending and (known := self._pending[0][2]()) is not None:
            size, host_s, _ = self._pending.popleft()
            if known < _BOUND * host_s:
                continue
            if size > self.device_tok:
                self.device_tok, self.device_s = size, known
            elif size == self.device_tok:
                self.device_s = min(self.device_s, known)

    def worth_capturing(self, n_tok: int, n_direct: int, n_more: int) -> bool:
        """Whether to capture a size of `n_tok` tokens that is met again, and will be about `n_more` times after this one.

        It is captured if the device would idle as long behind the launches as a capture takes; `n_direct` launches of it are
        behind. A size much larger than any that is known is captured to learn how long the device takes, once two launches
        have not shown that, unless it is so large that the device is surely busy for longer than the host.
        """
        self._read()
        if n_tok > _LARGER * self.device_tok:
            least_s = self.device_s * n_tok / self.device_tok if n_tok <= _NEAR * self.device_tok else 0.0
            learning = any(not host_s and size * _LARGER >= n_tok for size, host_s, _ in self._pending)
            return n_direct > 1 and not learning and self.launch_s >= _SURELY * least_s
        idle_s = self.launch_s - self.device_s * n_tok / self.device_tok
        return idle_s > 0 and (math.isinf(self.capture_s) or (n_more + 1) * idle_s >= self.capture_s)


@dataclass
class StepTally:
    """What the micro-steps so far were: their tokens, without and with padding, how many were launched and replayed, how
    many sizes were captured, and the seconds that this took."""

    n_tok: int = 0
    padded_tok: int = 0
    launched: int = 0
    replayed: int = 0
    captures: int = 0
    capture_s: float = 0.0

    def since(self, before: StepTally) -> dict[str, float]:
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
        self._sizes: tuple[tuple[Job, ...], int, JobSizes] | None = None
        self._too_large: float = math.inf
        self.times = StepTimes()
        self.tally = StepTally()
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
                wanted = may and self.times.worth_capturing(n_tok, self._direct[key], self._n_more(key))
                if not wanted or (graph := self._captured(key, batch, totals)) is None:
                    self._launch(key, batch, totals)
                    return
            self._graphs[key] = self._graphs.pop(key)  # the last one is that used last
            for target, source in zip(_tensors(graph.inputs), _tensors(batch), strict=True):
                target.copy_(source, non_blocking=True)
            if graph.tables is not None:
                kernel = self._stack.route.kernel
                assert kernel is not None
                kernel.load_tables(graph.tables, self._stack.route, self._stack.base.dtype, n_tok)
            self.times.replayed(n_tok, self._device.timed(graph.replay))
            self.tally.replayed += 1
            totals.add_(graph.losses)

    def sizes(self, jobs: Sequence[Job], limit_tok: int) -> JobSizes:
        """What the micro-batches of these jobs in one step are padded to; found once for all steps."""
        if self._sizes is None or self._sizes[1] != limit_tok or not _same(self._sizes[0], jobs):
            self._sizes = (tuple(jobs), limit_tok, job_sizes(jobs, limit_tok))
        return self._sizes[2]

    def _launch(self, key: Hashable, batch: MicroBatch, totals: torch.Tensor) -> None:
        began = time.perf_counter()
        seconds = self._device.timed(partial(self._step, batch, totals))
        self.times.launched(batch.ids.shape[0], time.perf_counter() - began, seconds)
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
        self._full = False

    def end_of_trainees(self) -> None:
        """Forget what belongs to trainees which are done, and graphs that are bound to them."""
        self._sizes = None
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
        if len(self._graphs) > _MAX_GRAPHS:
            if self._stack.base.device.type == "cuda":
                torch.cuda.synchronize()  # it may still be replayed
            self._graphs.pop(next(iter(self._graphs)))
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


def _same(jobs: Sequence[Job], others: Sequence[Job]) -> bool:
    return len(jobs) == len(others) and all(one is other for one, other in zip(jobs, others, strict=True))


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
