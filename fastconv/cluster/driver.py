"""The driver: gives orders to Ray, merges what comes back, gives a lost order out again, asks the judge."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from fastconv.audit.checks import CheckReport
from fastconv.cluster.orders import Order, left_to_compute, start_keys
from fastconv.cluster.worker import Item, WorkerFinished, WorkerStarted, work
from fastconv.engine.locate import engine_identity
from fastconv.errors import ClusterError, FastconvError, GateStop, Interrupted, stopped
from fastconv.experiment.graph import Graph
from fastconv.recipe import run_id, sha256_of
from fastconv.run.rejudge import finish_judging
from fastconv.run.runner import Tally, Watcher
from fastconv.store.ledger import Stage, Store
from fastconv.store.merge import StageBundle, pack_stage, unpack_stage

#: So often an order is given out again without a single new stage having come back from it.
RETRIES = 3
#: How often the driver looks whether it is to stop, and how long workers then get to end their step well.
LOOK_S, GRACE_S = 0.5, 60.0


@dataclass
class _Open:
    """An order that is out: its stream of items, and how often it went out without anything coming back."""

    order: Order
    stream: Any
    n_lost: int = 0
    node: str = ""


@dataclass
class Driver:
    """Gives orders to Ray and takes in what comes back."""

    ray: Any
    graph: Graph
    store: Store
    watcher: Watcher
    stop: threading.Event
    errors: list[FastconvError] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    #: Keys of stages that could not be finished; the rest went on.
    failed: set[str] = field(default_factory=set)
    #: What kept the judge from its work, if anything did.
    problem: str = ""

    def __post_init__(self) -> None:
        self._stages = {stage.key: stage for stage in self.graph.stages()}
        self._run = run_id(self.graph.recipe)
        self._bell = self.ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Bell).remote()
        self._open: list[_Open] = []

    def compute(self, orders: Sequence[Order]) -> None:
        """Have these orders computed. Errors of workers are kept in `errors`. Raises Interrupted, ClusterError."""
        self._open = [_Open(order, self._send(order)) for order in orders]
        try:
            while self._open:
                if self.stop.is_set():
                    self._drain()
                    raise stopped(self._run)
                self._take(self._ready(LOOK_S))
        except BaseException:
            for one in self._open:
                self.ray.cancel(one.stream, force=True)
            raise

    def judge(self, *, urgent: bool) -> None:
        """Ask a judge about everything that came back; one that is out leaves it pending.

        The resident base judges where it is resident: at the workers.
        """
        if self.graph.judges_outside and not self.stop.is_set():
            recipe, watcher = self.graph.recipe, unannounced(self.watcher)
            judged = finish_judging(recipe, self.store.root, watcher, urgent=urgent)
            self.problem = judged.status.problem

    def _send(self, order: Order) -> Any:
        start = [pack_stage(self.store, key) for key in start_keys(self.graph, self.store, order)]
        about = [socket.gethostname(), str(self.store.root.resolve()), self._run, order.name]
        folder = f"{self._run}-{order.name}-{sha256_of(about)[:8]}"
        task = self.ray.remote(**needs_of(self.graph))(_work_for)
        return task.remote(order, self.ray.put(start), folder, self._bell)

    def _ready(self, timeout_s: float) -> list[_Open]:
        ready, _ = self.ray.wait([one.stream for one in self._open], timeout=timeout_s)
        return [one for one in self._open if one.stream in ready]

    def _take(self, ready: Sequence[_Open]) -> None:
        lost = _lost_errors(self.ray)
        for one in ready:
            try:
                self._item(one, self.ray.get(next(one.stream)))
            except StopIteration:
                self._open.remove(one)
            except lost as error:
                self._again(one, error)
            except self.ray.exceptions.RayError as error:
                if "No module named 'fastconv'" not in str(error):
                    raise  # a defect, with its traceback
                raise ClusterError(
                    "fastconv is not installed on a node", where="--ray", fix="install the same version on every node"
                ) from None

    def _item(self, one: _Open, item: Item) -> None:
        if isinstance(item, WorkerStarted):
            one.node = item.node
        elif isinstance(item, StageBundle):
            one.n_lost = 0
            self._merge(item)
        else:
            self._end(one, item)

    def _merge(self, parcel: StageBundle) -> None:
        stage = self._stages[parcel.key]
        if unpack_stage(self.store, parcel):
            self._count(stage)
        self.store.note_stage_of_run(self._run, stage, reused=False)

    def _count(self, stage: Stage) -> None:
        record = self.store.record(stage.key)
        assert record is not None, "it was added just now"
        self.tally.add(record)
        self.tally.seconds += record.seconds
        self.watcher.stage(stage, "new")
        self.watcher.stage_done(stage, record.seconds)

    def _end(self, one: _Open, end: WorkerFinished) -> None:
        facts = {name: end.facts[name] for name in ("engine", "template") if name in end.facts}
        before = self.store.run_facts(self._run).get("workers", {})
        workers = {**before, one.order.name: {"node": one.node, **end.facts}}
        self.store.add_run_facts(self._run, {**facts, "workers": workers})
        for key, failure in end.failures.items():
            self.failed.add(key)
            self.store.note_failure(self._stages[key], failure.exit_code, failure.reason)
            self.watcher.stage_failed(self._stages[key], failure.reason)
        error = end.problem()
        if error is not None and not (isinstance(error, Interrupted) and (self.stop.is_set() or self.errors)):
            self.errors.append(error)
            if isinstance(error, GateStop):  # before the next cost, whoever it would be paid for
                self._ring()

    def _again(self, one: _Open, error: Exception) -> None:
        """Give a lost order out again, beginning from everything that came back."""
        self._open.remove(one)
        if self.stop.is_set() or not left_to_compute(one.order, self.store):
            return
        if one.n_lost >= RETRIES:
            reason = str(error).strip().split("\n", 1)[0]
            raise ClusterError(
                f"its worker was lost {one.n_lost + 1} times without a finished stage ({reason})",
                where=one.order.name,
                fix="look into the node's memory and Ray's logs; the same command goes on from what came back",
            )
        self._open.append(_Open(one.order, self._send(one.order), one.n_lost + 1))

    def _drain(self) -> None:
        """Ask the workers to stop and take in what they still hand over, for as long as they may need for a step."""
        self._ring()
        deadline = time.monotonic() + GRACE_S
        while self._open and time.monotonic() < deadline:
            self._take(self._ready(LOOK_S))

    def _ring(self) -> None:
        """Ask all workers to stop after their step; orders that wait for a place are taken back."""
        self.ray.get(self._bell.ring.remote())
        for one in [one for one in self._open if not one.node]:
            self.ray.cancel(one.stream)
            self._open.remove(one)


class _Bell:
    """Rung once, to end all workers after the step they are in."""

    def __init__(self) -> None:
        self._rung = False

    def ring(self) -> None:
        """End them."""
        self._rung = True

    def rung(self) -> bool:
        """Whether to end."""
        return self._rung


class _Unannounced:
    """A watcher that passes on what was not said already: the run is known, and audited."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def audited(self, report: CheckReport) -> None:
        """Said already."""

    def begin(self, run: str, n_stages: int, n_todo: int) -> None:
        """Said already."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watcher, name)


def _work_for(order: Order, start: Sequence[StageBundle], folder: str, bell: Any) -> Iterator[Item]:
    """The Ray task."""
    import ray

    yield from work(order, start, folder, lambda: bool(ray.get(bell.rung.remote())))


def needs_of(graph: Graph) -> dict[str, Any]:
    """What a task asks of Ray. A worker process does one order: the next one finds the GPU's memory free.

    Ray's own retry would begin an order anew; here it is given out again from what came back.
    """
    always = {"num_returns": "streaming", "max_retries": 0, "max_calls": 1}
    if engine_identity(graph.recipe.model)["device"] == "cuda":
        return {**always, "num_gpus": 1, "num_cpus": 1}
    threads = cpu_threads()
    # As many threads as one process takes here: sums in another order would be other numbers.
    return {**always, "num_cpus": threads, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}}}


def cpu_threads() -> int:
    """Threads that a run on this machine takes on its CPU."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else len(os.sched_getaffinity(0))


def unannounced(watcher: Watcher) -> Watcher:
    """The watcher, for calls whose beginning it has shown already."""
    return cast(Watcher, _Unannounced(watcher))


def _lost_errors(ray: Any) -> tuple[type[Exception], ...]:
    """What Ray says when a worker, its node or what it handed over is gone."""
    kinds = ray.exceptions
    return (kinds.WorkerCrashedError, kinds.NodeDiedError, kinds.ObjectLostError, kinds.OutOfMemoryError)
