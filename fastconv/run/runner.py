"""Computing stages one after another, each once, under a lease; what fails is noted and the rest goes on."""

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
from fastconv.judge.access import Access
from fastconv.judge.desk import DeskStatus
from fastconv.run.judging import JudgeQueue
from fastconv.run.sampling import SamplingQueue, SamplingStatus, commit, is_drawn
from fastconv.run.status import FailureLog, parts_of, reason_to_run
from fastconv.stats.gates import GateVerdict
from fastconv.store.ledger import Stage, Store
from fastconv.store.records import Record

if TYPE_CHECKING:
    from fastconv.run.executor import Progress

#: How often a run that waits for the server looks at it, and how often a busy one shows it.
WAIT_S, GLANCE_S = 0.05, 1.0
#: What is made of completions alone, and so waits for them instead of making the run wait.
_FOLLOWERS = ("score", "judge")


class Watcher(Protocol):
    """Whoever shows a run to people."""

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
    """What a call of `run` computed itself."""

    n_stages: int = 0
    seconds: float = 0.0
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Count a stage and the tokens that its record names."""
        self.n_stages += 1
        for name, value in record.facts.items():
            if name.endswith("_tok"):
                self.tokens[name] = self.tokens.get(name, 0) + int(value)


class Runner:
    """Computes stages depth first, each once, under a lease."""

    def __init__(
        self, graph: Graph, store: Store, run: str, watcher: Watcher, stop: threading.Event, wanted: Collection[str],
        access: Access | None, *, judge_later: bool = False,
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
        self._drawing = SamplingQueue(store)
        self.tally = Tally()
        self.failing = FailureLog(store)
        self.judging = JudgeQueue(
            graph, store, run, watcher, stop=stop, resident=lambda: self._engine().judge, access=access,
            later=judge_later,
        )  # fmt: skip

    def compute(self, ends: Sequence[Stage], *, urgent: bool = False) -> None:
        """Make sure that every one of these stages and all before them are done, or at the sampler or the judge."""
        for end in ends:
            for stage in walk(end):
                if stage.key not in self._seen:
                    self._seen.add(stage.key)
                    if self._one(stage, urgent):
                        self._look()

    def settle(self) -> None:
        """Wait for the sampler, then for the judge as far as it answers. Raises Interrupted, SamplerError."""
        self._await_drawn()
        self.judging.settle()

    def when_measured(self, plan: CellPlan, then: Callable[[CellPlan], None]) -> None:
        """Call `then` with this cell once nothing of it is at the sampler: at once, or when its completions came in.

        Not called if a failure left the cell half measured: its gates could say nothing.
        """
        self._unfinished.append((plan, then))
        self._finish_cells()

    def decide(self, verdict: GateVerdict) -> None:
        """Write a gate's verdict down and show it."""
        self._store.put_verdict(self._run, verdict.gate, verdict.subject, verdict.verdict, verdict.body())
        self._watcher.gate(verdict)

    def _one(self, stage: Stage, urgent: bool) -> bool:
        """Compute a stage, or see to it that it will be; whether there was anything to do."""
        if self._store.record(stage.key) is not None:
            self._store.note_stage_of_run(self._run, stage, reused=True)
            return False
        if self.failing.blocks(stage):
            return False
        if self._stop.is_set():
            raise stopped(stage.slot)
        at_server = any(need.key in self._drawing.keys for need in stage.needs.values())
        if at_server and stage.kind in _FOLLOWERS:
            self._followers.append((stage, urgent))
            return False
        if at_server:
            self._await_drawn()
        if stage.kind == "judge":
            self.judging.submit(stage, urgent=urgent)
        elif stage.kind == "snapshot":
            self.converge([self._graph.lineage(stage)])
        elif stage.kind == "behavior":
            self._train([[stage]])
        else:
            self._compute(stage)
        return True

    def _compute(self, stage: Stage) -> None:
        """Compute a stage, or hand it to the server that draws its completions."""
        self._watcher.stage(stage, reason_to_run(stage, self._store))
        began = time.monotonic()
        engine = self._engine()
        try:
            if self._graph.recipe.model.sampler == "vllm" and is_drawn(stage):
                self._drawing.submit(stage, engine)
            else:
                with self._store.lease(stage) as lease:
                    outcome = engine.compute(stage, lease)
                    commit(self._store, stage, outcome, time.monotonic() - began)
        except (TrainingError, DataError) as error:
            self._note_failure([stage], error)
        self._spent([stage], time.monotonic() - began)

    def converge(self, runs: Sequence[Sequence[Stage]]) -> None:
        """Train convergence runs, each given by its snapshots, in the same steps as far as memory allows.

        It is the dear part: what is being drawn comes in first, and the gates that wait for it are asked.
        """
        self.compute([run[0].needs["answers"] for run in runs])
        missing = [left for run in runs if (left := [one for one in run if self._is_missing(one)])]
        if missing:
            self._await_drawn()
        self._train(missing)

    def stack(self, adapters: Sequence[Stage]) -> None:
        """Train behavior adapters, all on one snapshot, in the same steps as far as memory allows."""
        self.compute([need for adapter in adapters for need in adapter.needs.values()])
        self._train([[adapter] for adapter in adapters if self._is_missing(adapter)])

    def _train(self, runs: Sequence[Sequence[Stage]]) -> None:
        """Train these runs, each given by the stages it is to reach, so many at once as the engine says."""
        while runs:
            size = self._engine().trainer.group_size([run[0] for run in runs]) if len(runs) > 1 else 1
            self._train_together(runs[:size])
            runs = runs[size:]
            self._look()

    def _is_missing(self, trained: Stage) -> bool:
        """Whether an adapter was asked for and still has to be trained."""
        if trained.key not in self._wanted or self._store.record(trained.key) is not None:
            return False
        return not self.failing.blocks(trained)

    def _train_together(self, runs: Sequence[Sequence[Stage]]) -> None:
        """Train these runs in one call. Should one of them fail, each goes on alone, to find out which."""
        if self._stop.is_set():
            raise stopped(runs[0][0].slot)
        for run in runs:
            self._watcher.stage(run[0], reason_to_run(run[0], self._store))
        began = time.monotonic()
        engine, failed = self._engine(), False
        try:
            with ExitStack() as leases:
                engine.trainer.train([(run, leases.enter_context(self._store.lease(run[0]))) for run in runs])
        except (TrainingError, DataError) as error:
            failed = True
            if len(runs) == 1:
                self._note_failure([one for one in runs[0] if self._store.record(one.key) is None], error)
        everything = [one for run in runs for one in run]
        self._spent(everything, time.monotonic() - began)
        if failed and len(runs) > 1:
            for run in runs:
                if left := [one for one in run if self._store.record(one.key) is None]:
                    self._train_together([left])

    def _spent(self, stages: Sequence[Stage], seconds: float) -> None:
        """Count and show what is done of these stages, which took so long together."""
        self.tally.seconds += seconds
        self._account(stages, seconds)

    def _account(self, stages: Sequence[Stage], seconds: float) -> None:
        for stage in stages:
            if (record := self._store.record(stage.key)) is not None and stage.key not in self._counted:
                self._counted.add(stage.key)
                self.tally.add(record)
                self._store.note_stage_of_run(self._run, stage, reused=False)
                self._watcher.stage_done(stage, seconds)

    def _look(self) -> None:
        """Commit what sampler and judge have ready, compute what only waited for it, finish the cells that are whole."""
        for stage, seconds in self._drawing.take():
            self._account([stage], seconds)
            self._watcher.drawing(self._drawing.status)
        waiting, self._followers = self._followers, []
        for stage, urgent in waiting:
            self._one(stage, urgent)  # one whose completions are still being drawn goes back among the followers
        self._finish_cells()
        self.judging.collect()

    def _await_drawn(self) -> None:
        """Wait until the server has drawn all it was asked. Raises Interrupted and SamplerError."""
        while self._drawing.keys:
            if self._stop.is_set():
                raise stopped("sampler")
            time.sleep(WAIT_S)
            self.tally.seconds += WAIT_S
            self._show()
            self._look()

    def _finish_cells(self) -> None:
        missing = {*self._drawing.keys, *(stage.key for stage, _ in self._followers)}
        waiting, self._unfinished = self._unfinished, []
        for plan, then in waiting:
            if missing and any(part.key in missing for part in parts_of(plan)):
                self._unfinished.append((plan, then))
            elif not self.failing.touches(plan):
                then(plan)

    def _note_failure(self, stages: Sequence[Stage], error: TrainingError | DataError) -> None:
        for stage in stages:
            self.failing.note(stage, error)
            self._watcher.stage_failed(stage, str(error))

    def _engine(self) -> Any:
        """Who computes. A base that fails its own tests is no matter of one stage: what it raises ends the run."""
        if self._executor is None:
            from fastconv.run.executor import Executor  # torch is loaded here, and only if something must be computed

            self._executor = Executor(self._graph, self._store, self._tell, self._stop.is_set, self._wanted)
            self._executor.prepare()
            self._executor.prove()
            facts = self._executor.facts()
            self._store.add_run_facts(self._run, facts)
            self._watcher.engine(facts["engine"])
        return self._executor

    def close(self) -> None:
        """Let go of whatever computing holds outside this process. Completions that are there already are kept."""
        try:
            for stage, seconds in self._drawing.take():
                self._account([stage], seconds)
        except SamplerError:
            pass  # it is what ends the run, or came after what does
        finally:
            self._drawing.close()
            if self._executor is not None:
                self._executor.close()

    def _tell(self, progress: Progress) -> None:
        self._watcher.progress(progress)
        self._show()

    def _show(self) -> None:
        """Show where judge and sampler stand; for loops that must not wait."""
        self.judging.glance()
        now = time.monotonic()
        if self._drawing.keys and now - self._shown_s >= GLANCE_S:
            self._shown_s = now
            self._drawing.note()
            self._watcher.drawing(self._drawing.status)


@contextmanager
def stop_on_sigint(stop: threading.Event | None = None) -> Iterator[threading.Event]:
    """The first Ctrl-C (or SIGTERM) asks the running step to end well; the second one ends at once.

    `stop` is the event that it sets, where others set it too.
    """
    stop = stop or threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
