"""Computes the stages of a run one after another, each once and under a lease. A stage that fails is recorded, the rest goes on."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from fastconv.audit.checks import CheckReport
from fastconv.errors import DataError, SamplerError, TrainingError, stopped
from fastconv.experiment.graph import CellPlan, Graph, walk
from fastconv.judge.access import JudgeAccess
from fastconv.judge.desk import DeskStatus
from fastconv.run.judging import JudgeQueue
from fastconv.run.sampling import SamplingQueue, SamplingStatus, commit_together, in_one_pass, is_sampled
from fastconv.run.status import FailureLog, cell_stages, reason_to_run
from fastconv.startup import StartTimes, uncollected
from fastconv.stats.gates import GateVerdict
from fastconv.store.ledger import Stage, Store
from fastconv.store.records import Record

if TYPE_CHECKING:
    from fastconv.run.executor import Progress

#: Seconds a waiting run lets pass at most before it checks for a stop, and between status displays of a busy run.
WAIT_S, SHOW_S = 0.25, 1.0
#: Kinds of stages that need nothing but completions: they are postponed while these are sampled.
_FOLLOWERS = ("score", "judge")


class Watcher(Protocol):
    """Displays the progress of a run."""

    def audited(self, report: CheckReport) -> None: ...
    def begin(self, run: str, n_stages: int, n_todo: int) -> None: ...
    def engine(self, facts: Mapping[str, Any]) -> None: ...
    def stage(self, stage: Stage, reason: str) -> None: ...
    def progress(self, progress: Progress) -> None: ...
    def stage_done(self, stage: Stage, seconds: float) -> None: ...
    def stage_failed(self, stage: Stage, reason: str) -> None: ...
    def judging(self, status: DeskStatus) -> None: ...
    def drawing(self, status: SamplingStatus) -> None: ...
    def gate(self, verdict: GateVerdict) -> None: ...


@dataclass
class Tally:
    """What this call computed: number of stages, seconds, and tokens by kind."""

    n_stages: int = 0
    seconds: float = 0.0
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Count a stage and the token counts of its record."""
        self.n_stages += 1
        for name, value in record.facts.items():
            if name.endswith("_tok"):
                self.tokens[name] = self.tokens.get(name, 0) + int(value)


class Runner:
    """Computes stages depth first, each once, under a lease. `wanted` are the keys of all stages of this call.

    `access` is the checked judge; with `judge_later`, judge stages stay pending.
    """

    def __init__(
        self, graph: Graph, store: Store, run: str, watcher: Watcher, stop: threading.Event, wanted: Collection[str],
        access: JudgeAccess | None, *, judge_later: bool = False,
    ) -> None:  # fmt: skip
        self._graph = graph
        self._wanted = wanted
        self._store = store
        self._run = run
        self._watcher = watcher
        self._stop = stop
        self._seen: set[str] = set()
        self._counted: set[str] = set()
        self._executor: Any = None
        self._followers: list[tuple[Stage, bool]] = []
        self._unfinished: list[tuple[CellPlan, Callable[[CellPlan], None]]] = []
        self._shown_s = 0.0
        self._sampling = SamplingQueue(store)
        self.tally = Tally()
        self.failures = FailureLog(store)
        self.judge_queue = JudgeQueue(
            graph, store, run, watcher, stop=stop, resident=lambda: self._engine().judge, access=access,
            later=judge_later,
        )  # fmt: skip

    def compute(self, ends: Sequence[Stage], *, urgent: bool = False) -> None:
        """Compute these stages and all that they need, as far as they are missing, or submit them to sampler or judge."""
        stages = [stage for end in ends for stage in walk(end)]
        for stage in stages:
            if stage.key not in self._seen:
                self._seen.add(stage.key)
                if self._start_stage(stage, urgent, stages):
                    self._collect()

    def wait(self) -> None:
        """Wait for the sampler, then for the judge unless it is out. Raises Interrupted, SamplerError."""
        self._await_sampler()
        self.judge_queue.wait()

    def when_measured(self, plan: CellPlan, then: Callable[[CellPlan], None]) -> None:
        """Call `then` with this cell once none of its stages is at the sampler, which may be at once.

        It is not called if a failure left the cell incomplete, because its gates cannot be decided then.
        """
        self._unfinished.append((plan, then))
        self._finish_cells()

    def decide(self, verdict: GateVerdict) -> None:
        """Record a gate's verdict and display it."""
        self._store.put_verdict(self._run, verdict.gate, verdict.subject, verdict.verdict, verdict.body())
        self._watcher.gate(verdict)

    def _start_stage(self, stage: Stage, urgent: bool, others: Sequence[Stage] = ()) -> bool:
        """Compute, submit or postpone a stage; False if there was nothing to do now. `others` are those that are asked
        for with it, of which some may be sampled in the same pass."""
        if self._store.record(stage.key) is not None:
            self._store.note_stage_of_run(self._run, stage, reused=True)
            return False
        if self.failures.blocks(stage):
            return False
        if self._stop.is_set():
            raise stopped(stage.slot)
        at_server = any(need.key in self._sampling.keys for need in stage.needs.values())
        if at_server and stage.kind in _FOLLOWERS:
            self._followers.append((stage, urgent))
            return False
        if at_server:
            self._await_sampler()
        if stage.kind == "judge":
            self.judge_queue.submit(stage, urgent=urgent)
        elif stage.kind == "snapshot":
            self.train_convergence([self._graph.lineage(stage)])
        elif stage.kind == "behavior":
            self._train([[stage]])
        elif is_sampled(stage) and self._graph.recipe.model.sampler == "vllm":
            self._submit(stage)
        else:
            self._compute([stage, *self._in_the_same_pass(stage, others)])
        return True

    def _submit(self, stage: Stage) -> None:
        """Submit a stage to the server that samples its completions."""
        engine = self._engine()
        began = time.monotonic()
        self._watcher.stage(stage, reason_to_run(stage, self._store))
        try:
            self._sampling.submit(stage, engine)
        except (TrainingError, DataError) as error:
            self._note_failure([stage], error)
        self._add_to_tally([stage], time.monotonic() - began)

    def _in_the_same_pass(self, stage: Stage, others: Sequence[Stage]) -> list[Stage]:
        """Those of the others that are sampled in one pass with this stage, now marked as seen."""
        found: list[Stage] = []
        for other in others if is_sampled(stage) else ():
            ready = other.key not in self._seen and in_one_pass(other) == in_one_pass(stage)
            if ready and self._store.record(other.key) is None and not self.failures.blocks(other):
                self._seen.add(other.key)
                found.append(other)
        return found

    def _compute(self, stages: Sequence[Stage]) -> None:
        """Compute a stage, or several in one pass. If one of several fails, each is computed alone to find out which."""
        engine = self._engine()  # loaded before the stage is shown, so that no stage is shown as slow for it
        began, failed = time.monotonic(), False
        shares: dict[str, float] = {}
        for stage in stages:
            self._watcher.stage(stage, reason_to_run(stage, self._store))
        try:
            with ExitStack() as leases:
                held = [(stage, leases.enter_context(self._store.lease(stage))) for stage in stages]
                outcomes = list(zip(stages, engine.compute(held), strict=True))
                shares = commit_together(self._store, outcomes, time.monotonic() - began)
        except (TrainingError, DataError) as error:
            failed = True
            if len(stages) == 1:
                self._note_failure(stages, error)
        self.tally.seconds += time.monotonic() - began
        for stage in stages:
            self._count_done([stage], shares.get(stage.key, 0.0))
        if failed and len(stages) > 1:
            for stage in stages:
                self._compute([stage])

    def train_convergence(self, runs: Sequence[Sequence[Stage]]) -> None:
        """Train convergence runs, each given by its snapshots, in the same steps as far as memory allows.

        Training is the expensive part: completions that are being sampled are awaited first, so that the gates that need
        them are decided before it.
        """
        self.compute([run[0].needs["answers"] for run in runs])
        missing = [stages for run in runs if (stages := [stage for stage in run if self._is_missing(stage)])]
        if missing:
            self._await_sampler()
        self._train(missing)

    def train_behaviors(self, adapters: Sequence[Stage]) -> None:
        """Train behavior adapters that share a snapshot, in the same steps as far as memory allows."""
        self.compute([need for adapter in adapters for need in adapter.needs.values()])
        self._train([[adapter] for adapter in adapters if self._is_missing(adapter)])

    def _train(self, runs: Sequence[Sequence[Stage]]) -> None:
        """Train runs, each given by the stages it has to reach, in groups of the size that the trainer allows."""
        while runs:
            size = self._engine().trainer.group_size([run[0] for run in runs]) if len(runs) > 1 else 1
            self._train_together(runs[:size])
            runs = runs[size:]
            self._collect()

    def _is_missing(self, stage: Stage) -> bool:
        """Whether an adapter is wanted and still has to be trained."""
        if stage.key not in self._wanted or self._store.record(stage.key) is not None:
            return False
        return not self.failures.blocks(stage)

    def _train_together(self, runs: Sequence[Sequence[Stage]]) -> None:
        """Train runs in the same steps. If one of them fails, each is trained alone to find out which."""
        if self._stop.is_set():
            raise stopped(runs[0][0].slot)
        engine, failed = self._engine(), False  # loaded before the clock of the first stage starts
        began = time.monotonic()
        for run in runs:
            self._watcher.stage(run[0], reason_to_run(run[0], self._store))
        try:
            with ExitStack() as leases:
                engine.trainer.train([(run, leases.enter_context(self._store.lease(run[0]))) for run in runs])
        except (TrainingError, DataError) as error:
            failed = True
            if len(runs) == 1:
                self._note_failure([stage for stage in runs[0] if self._store.record(stage.key) is None], error)
        stages = [stage for run in runs for stage in run]
        self._add_to_tally(stages, time.monotonic() - began)
        if failed and len(runs) > 1:
            for run in runs:
                if missing := [stage for stage in run if self._store.record(stage.key) is None]:
                    self._train_together([missing])

    def _add_to_tally(self, stages: Sequence[Stage], seconds: float) -> None:
        """Count and display those of these stages that are done; they took `seconds` together."""
        self.tally.seconds += seconds
        self._count_done(stages, seconds)

    def _count_done(self, stages: Sequence[Stage], seconds: float) -> None:
        for stage in stages:
            if (record := self._store.record(stage.key)) is not None and stage.key not in self._counted:
                self._counted.add(stage.key)
                self.tally.add(record)
                self._store.note_stage_of_run(self._run, stage, reused=False)
                self._watcher.stage_done(stage, seconds)

    def _collect(self) -> None:
        """Commit what sampler and judge have finished, start postponed stages, and report cells that are complete."""
        for stage, seconds in self._sampling.take():
            self._count_done([stage], seconds)
            self._watcher.drawing(self._sampling.status)
        postponed, self._followers = self._followers, []
        for stage, urgent in postponed:
            self._start_stage(stage, urgent)  # postpones it again while its completions are sampled
        self._finish_cells()
        self.judge_queue.collect()

    def _await_sampler(self) -> None:
        """Wait until the server has sampled every submitted stage. Raises Interrupted and SamplerError."""
        while self._sampling.keys:
            if self._stop.is_set():
                raise stopped("sampler")
            began = time.monotonic()
            self._sampling.wait(WAIT_S)
            self.tally.seconds += time.monotonic() - began
            self._show()
            self._collect()

    def _finish_cells(self) -> None:
        missing = {*self._sampling.keys, *(stage.key for stage, _ in self._followers)}
        waiting, self._unfinished = self._unfinished, []
        for plan, then in waiting:
            if missing and any(stage.key in missing for stage in cell_stages(plan)):
                self._unfinished.append((plan, then))
            elif not self.failures.touches(plan):
                then(plan)

    def _note_failure(self, stages: Sequence[Stage], error: TrainingError | DataError) -> None:
        for stage in stages:
            self.failures.note(stage, error)
            self._watcher.stage_failed(stage, str(error))

    def _engine(self) -> Any:
        """The executor, created on first use. A base that fails its self-tests raises here and ends the run."""
        if self._executor is None:
            began, times = time.monotonic(), StartTimes()
            with times.part("import_s"), uncollected():
                from fastconv.run.executor import Executor  # imports torch, so only when something is computed
            self._executor = Executor(self._graph, self._store, self._tell, self._stop.is_set, self._wanted, times)
            self._executor.prepare()
            self._executor.prove()
            start_s = time.monotonic() - began
            self.tally.seconds += start_s
            facts = self._executor.facts()
            self._store.add_run_facts(self._run, {**facts, "start_s": round(start_s, 3), **times.facts()})
            self._watcher.engine(facts["engine"])
        return self._executor

    def close(self) -> None:
        """Stop the server and release leases. Completions that are already sampled are committed."""
        try:
            for stage, seconds in self._sampling.take():
                self._count_done([stage], seconds)
        except SamplerError:
            pass  # the run ends anyway, by this error or by an earlier one
        finally:
            self._sampling.close()
            if self._executor is not None:
                self._executor.close()

    def _tell(self, progress: Progress) -> None:
        self._watcher.progress(progress)
        self._show()

    def _show(self) -> None:
        """Display the status of judge and sampler; called from loops that must not wait."""
        self.judge_queue.show_status()
        now = time.monotonic()
        if self._sampling.keys and now - self._shown_s >= SHOW_S:
            self._shown_s = now
            self._sampling.note_progress()
            self._watcher.drawing(self._sampling.status)


@contextmanager
def stop_on_sigint(stop: threading.Event | None = None) -> Iterator[threading.Event]:
    """Inside the block, the first Ctrl-C or SIGTERM sets the event, and the second one raises KeyboardInterrupt.

    `stop` is the event to set, if other code may set it too. Outside the main thread no signal handler is installed.
    """
    stop = stop or threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
