"""The driver: sends orders to Ray, merges the stages that come back, sends lost orders again, asks the judge."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from fastconv.audit.checks import CheckReport
from fastconv.cluster.orders import Order, has_missing_stages, initial_keys
from fastconv.cluster.worker import WorkerFinished, WorkerMessage, WorkerStarted, work
from fastconv.engine.locate import engine_identity
from fastconv.errors import ClusterError, FastconvError, GateStop, Interrupted, stopped
from fastconv.experiment.graph import Graph
from fastconv.recipe import run_id, sha256_of
from fastconv.run.rejudge import finish_judging
from fastconv.run.runner import Tally, Watcher
from fastconv.store.ledger import Stage, Store
from fastconv.store.merge import StageBundle, pack_stage, unpack_stage

#: How often an order is sent again after its worker was lost without a finished stage.
RETRIES = 3
#: Seconds between checks for a stop, and seconds that workers then get to finish their step.
POLL_S, GRACE_S = 0.5, 60.0


@dataclass
class _SentOrder:
    """A sent order: its stream of messages, how often it was lost without a finished stage, and its node."""

    order: Order
    stream: Any
    n_lost: int = 0
    node: str = ""


@dataclass
class Driver:
    """Sends orders to Ray and merges the stages that come back. `tally` counts these stages."""

    ray: Any
    graph: Graph
    store: Store
    watcher: Watcher
    stop: threading.Event
    errors: list[FastconvError] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    #: Keys of stages that failed; the rest went on.
    failed: set[str] = field(default_factory=set)
    #: Why the judge is out, if it is.
    problem: str = ""

    def __post_init__(self) -> None:
        self._stages = {stage.key: stage for stage in self.graph.stages()}
        self._run = run_id(self.graph.recipe)
        self._stop_flag = self.ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_StopFlag).remote()
        self._sent: list[_SentOrder] = []

    def compute(self, orders: Sequence[Order]) -> None:
        """Compute these orders; errors of workers go to `errors`. Raises Interrupted, ClusterError."""
        self._sent = [_SentOrder(order, self._send(order)) for order in orders]
        try:
            while self._sent:
                if self.stop.is_set():
                    self._drain()
                    raise stopped(self._run)
                self._take(self._ready(POLL_S))
        except BaseException:
            for sent in self._sent:
                self.ray.cancel(sent.stream, force=True)
            raise

    def judge(self, *, urgent: bool) -> None:
        """Judge everything that came back; a judge that is out leaves it pending.

        A resident base judges at the workers, not here.
        """
        if self.graph.judges_outside and not self.stop.is_set():
            recipe, watcher = self.graph.recipe, without_announcements(self.watcher)
            result = finish_judging(recipe, self.store.root, watcher, urgent=urgent)
            self.problem = result.status.problem

    def _send(self, order: Order) -> Any:
        bundles = [pack_stage(self.store, key) for key in initial_keys(self.graph, self.store, order)]
        origin = [socket.gethostname(), str(self.store.root.resolve()), self._run, order.name]
        folder = f"{self._run}-{order.name}-{sha256_of(origin)[:8]}"
        task = self.ray.remote(**task_resources(self.graph))(_work_for)
        return task.remote(order, self.ray.put(bundles), folder, self._stop_flag)

    def _ready(self, timeout_s: float) -> list[_SentOrder]:
        ready, _ = self.ray.wait([sent.stream for sent in self._sent], timeout=timeout_s)
        return [sent for sent in self._sent if sent.stream in ready]

    def _take(self, ready: Sequence[_SentOrder]) -> None:
        lost_errors = _lost_errors(self.ray)
        for sent in ready:
            try:
                self._handle(sent, self.ray.get(next(sent.stream)))
            except StopIteration:
                self._sent.remove(sent)
            except lost_errors as error:
                self._send_again(sent, error)
            except self.ray.exceptions.RayError as error:
                if "No module named 'fastconv'" not in str(error):
                    raise  # a defect, with its traceback
                raise ClusterError(
                    "fastconv is not installed on a node", where="--ray", fix="install the same version on every node"
                ) from None

    def _handle(self, sent: _SentOrder, message: WorkerMessage) -> None:
        if isinstance(message, WorkerStarted):
            sent.node = message.node
        elif isinstance(message, StageBundle):
            sent.n_lost = 0
            self._merge(message)
        else:
            self._finish(sent, message)

    def _merge(self, bundle: StageBundle) -> None:
        stage = self._stages[bundle.key]
        if unpack_stage(self.store, bundle):
            self._count(stage)
        self.store.note_stage_of_run(self._run, stage, reused=False)

    def _count(self, stage: Stage) -> None:
        record = self.store.record(stage.key)
        assert record is not None, "it was added just now"
        self.tally.add(record)
        self.tally.seconds += record.seconds
        self.watcher.stage(stage, "new")
        self.watcher.stage_done(stage, record.seconds)

    def _finish(self, sent: _SentOrder, finished: WorkerFinished) -> None:
        facts = {name: finished.facts[name] for name in ("engine", "template") if name in finished.facts}
        before = self.store.run_facts(self._run).get("workers", {})
        workers = {**before, sent.order.name: {"node": sent.node, **finished.facts}}
        self.store.add_run_facts(self._run, {**facts, "workers": workers})
        for key, failure in finished.failures.items():
            self.failed.add(key)
            self.store.note_failure(self._stages[key], failure.exit_code, failure.reason)
            self.watcher.stage_failed(self._stages[key], failure.reason)
        error = finished.problem()
        if error is not None and not (isinstance(error, Interrupted) and (self.stop.is_set() or self.errors)):
            self.errors.append(error)
            if isinstance(error, GateStop):  # ends all workers before their next expensive step
                self._stop_workers()

    def _send_again(self, sent: _SentOrder, error: Exception) -> None:
        """Send a lost order again, starting from every stage that came back. Raises ClusterError after `RETRIES` times."""
        self._sent.remove(sent)
        if self.stop.is_set() or not has_missing_stages(sent.order, self.store):
            return
        if sent.n_lost >= RETRIES:
            reason = str(error).strip().split("\n", 1)[0]
            raise ClusterError(
                f"its worker was lost {sent.n_lost + 1} times without a finished stage ({reason})",
                where=sent.order.name,
                fix="look into the node's memory and Ray's logs; the same command goes on from what came back",
            )
        self._sent.append(_SentOrder(sent.order, self._send(sent.order), sent.n_lost + 1))

    def _drain(self) -> None:
        """Stop the workers and merge the stages they still hand over, for at most `GRACE_S` seconds."""
        self._stop_workers()
        deadline = time.monotonic() + GRACE_S
        while self._sent and time.monotonic() < deadline:
            self._take(self._ready(POLL_S))

    def _stop_workers(self) -> None:
        """Tell all workers to stop after their step, and cancel orders that have not started."""
        self.ray.get(self._stop_flag.set.remote())
        for sent in [sent for sent in self._sent if not sent.node]:
            self.ray.cancel(sent.stream)
            self._sent.remove(sent)


class _StopFlag:
    """A Ray actor that holds a flag: once set, all workers end after their current step."""

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        """End them."""
        self._set = True

    def is_set(self) -> bool:
        """Whether the workers are to end."""
        return self._set


class _WithoutAnnouncements:
    """Forwards to a watcher everything but the announcements `audited` and `begin`, which it has received already."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def audited(self, report: CheckReport) -> None:
        """Not forwarded."""

    def begin(self, run: str, n_stages: int, n_todo: int) -> None:
        """Not forwarded."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watcher, name)


def _work_for(order: Order, start: Sequence[StageBundle], folder: str, stop_flag: Any) -> Iterator[WorkerMessage]:
    """The Ray task: computes an order and yields its messages."""
    import ray

    yield from work(order, start, folder, lambda: bool(ray.get(stop_flag.is_set.remote())))


def task_resources(graph: Graph) -> dict[str, Any]:
    """Ray options of a task. A worker process computes a single order, so that the next one finds the GPU's memory free.

    Ray's own retries are off, because they would start an order from the beginning.
    """
    always = {"num_returns": "streaming", "max_retries": 0, "max_calls": 1}
    if engine_identity(graph.recipe.model)["device"] == "cuda":
        return {**always, "num_gpus": 1, "num_cpus": 1}
    threads = cpu_threads()
    # As many threads as a single process uses here, because another order of summation gives other numbers.
    return {**always, "num_cpus": threads, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}}}


def cpu_threads() -> int:
    """Number of CPU threads that a run on this machine uses."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else len(os.sched_getaffinity(0))


def without_announcements(watcher: Watcher) -> Watcher:
    """The watcher without `audited` and `begin`, for calls that continue an announced run."""
    return cast(Watcher, _WithoutAnnouncements(watcher))


def _lost_errors(ray: Any) -> tuple[type[Exception], ...]:
    """Ray's exceptions for a lost worker, node or object."""
    kinds = ray.exceptions
    return (kinds.WorkerCrashedError, kinds.NodeDiedError, kinds.ObjectLostError, kinds.OutOfMemoryError)
