"""Running a recipe: stages in order, gates before cost, everything found done taken as done.

Phase one measures the base; gate G0 then decides which behaviors can say anything; only their cells are trained.
Judging goes on beside it (`judge_room`), and the run ends when both are done.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastconv.auditing import require_passed
from fastconv.cleaning import spent_adapters
from fastconv.datasets.audit import CheckReport, check_recipe
from fastconv.deciding.results import decide_gates, gate_base, measurable_behaviors
from fastconv.deciding.stopping import GateKeeper
from fastconv.engine.locate import engine_identity
from fastconv.errors import DataError, Interrupted, JudgeError, TrainingError
from fastconv.failing import FailedStage, Failing, raise_failed
from fastconv.findings.gates import GateVerdict
from fastconv.graph import CellPlan, Graph, lineage_key, walk
from fastconv.judge_room import Access, JudgeRoom, check_judge, judge_stages
from fastconv.judging.book import DeskStatus
from fastconv.recipe import Recipe, canonical_json, recipe_sha256, run_id
from fastconv.schedule import steps, wanted
from fastconv.stage import Failure
from fastconv.store import Stage, Store, changed_inputs
from fastconv.store_gc import free

if TYPE_CHECKING:
    from fastconv.execute import Progress

#: Packages whose versions stand in the reproducibility card.
CARD_PACKAGES = (
    "fastconv",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "trl",
    "polars",
    "numpy",
    "scipy",
    "unsloth",
    "triton",
    "vllm",
)


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
    def gate(self, verdict: GateVerdict) -> None: ...


@dataclass
class Tally:
    """What a call of `run` computed itself."""

    n_stages: int = 0
    seconds: float = 0.0
    tokens: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """The end of a run: its id, what was computed now, the gates' verdicts, what the judge still owes, what failed."""

    run: str
    tally: Tally
    verdicts: tuple[GateVerdict, ...]
    pending: tuple[str, ...] = ()
    problem: str = ""
    failed: tuple[FailedStage, ...] = ()

    def require_whole(self) -> None:
        """Raise TrainingError or DataError if stages failed, naming the cells; else JudgeError if some are pending."""
        raise_failed(self.run, self.failed)
        self.require_judged()

    def require_judged(self) -> None:
        """Raise JudgeError if judge stages are pending."""
        if self.pending:
            raise JudgeError(
                f"{len(self.pending)} stages wait for the judge ({self.problem or 'it did not answer'}); their "
                "completions are kept and the rest is done",
                where=self.run,
                fix=f"`fastconv judge {self.run}` finishes them, then the same run goes on",
            )


@dataclass(frozen=True)
class StageStatus:
    """Where one stage of a recipe stands.

    `done`, `running`, `to do`, `pending` (at the judge), `stale`, `failed` or `skipped`.
    """

    slot: str
    kind: str
    key: str
    state: str
    reason: str
    seconds: float | None = None


def run_recipe(
    recipe: Recipe,
    workspace: Path,
    watcher: Watcher,
    *,
    plans: Callable[[Graph], list[CellPlan]] | None = None,
    ignore_gates: Mapping[str, str] | None = None,
    admit: Callable[[Graph, Sequence[CellPlan]], Mapping[str, Any]] | None = None,
    stop: threading.Event | None = None,
    judge_later: bool = False,
) -> Finished:
    """Run a recipe (or the cells that `plans` picks from it) to its verdict. Resumes whatever was begun.

    A judge that is out or has spent its budget leaves its stages pending, a stage whose numbers cannot be used (or whose
    rows the audit refuses) is noted as failed; everything else is finished. `ignore_gates` names gates that may fail, each
    with the reason; `admit` may refuse the audited cells by raising, and gives facts of the run; `stop` ends the run like a
    Ctrl-C; with `judge_later` no judge is asked and its stages stay pending. Raises GateStop at the first gate that fails
    and may not, before the next cost; Interrupted on the first Ctrl-C once the running step is whole and its state is
    kept; and before anything is computed RecipeError or JudgeError for a judge that cannot be asked.
    """
    report = check_recipe(recipe)
    require_passed(report, "audit")
    graph = Graph(recipe)
    picked = plans(graph) if plans else graph.cells
    notes = admit(graph, picked) if admit else {}
    store = Store.open(workspace)
    to_judge = [s for s in judge_stages(needed_ends(graph, store, picked)) if store.record(s.key) is None]
    access = check_judge(graph.judge, store) if to_judge and not judge_later else None
    watcher.audited(report)
    store.sweep()
    run = run_id(recipe)
    store.start_run(
        run,
        canonical_json(recipe.model_dump(mode="json")),
        recipe_sha256(recipe),
        recipe.name,
        {**run_facts(), **notes},
    )
    keeper = GateKeeper(graph, store, run, watcher.gate, ignore_gates or {})
    with stop_on_sigint(stop) as stop:
        everything = graph.stages(picked)
        asked = {stage.key for stage in everything}
        runner = _Runner(graph, store, run, watcher, stop, asked, access, judge_later=judge_later)
        watcher.begin(run, len(everything), sum(store.record(stage.key) is None for stage in everything))
        with closing(runner), runner.judging:
            _compute_all(runner, keeper, graph, store, picked)
    store.add_run_facts(run, runner.judging.facts())
    _forget_training_state(graph, store)
    _free_adapters(graph, store, picked)
    # Over everything measured so far: one cell alone must not unsay what the whole run found.
    verdicts = decide_gates(graph, store, [plan for plan in graph.cells if plan in picked or _measured(plan, store)])
    for verdict in verdicts:
        store.put_verdict(run, verdict.gate, verdict.subject, verdict.verdict, verdict.body())
        if verdict.gate != "G0":
            watcher.gate(verdict)
    pending = tuple(stage.slot for stage in runner.judging.pending)
    failed = runner.failing.of(picked)
    if not pending and not failed:
        store.finish_run(run)
    runner.tally.n_stages += runner.judging.n_committed
    return Finished(run, runner.tally, tuple(verdicts), pending, runner.judging.status.problem, failed)


def compute_stages(
    recipe: Recipe, workspace: Path, watcher: Watcher, keys: Collection[str], *, stop: threading.Event | None = None
) -> None:
    """Compute these stages of a recipe and what they need. No gate is asked, and no judge but the resident base.

    Raises what `run_recipe` raises while computing.
    """
    graph, store, run = Graph(recipe), Store.open(workspace), run_id(recipe)
    store.sweep()
    store.start_run(
        run, canonical_json(recipe.model_dump(mode="json")), recipe_sha256(recipe), recipe.name, run_facts()
    )
    ends = [stage for stage in graph.stages() if stage.key in keys]
    asked = {part.key for end in ends for part in walk(end)}
    with stop_on_sigint(stop) as stop:
        later = graph.judge is not None and graph.judge.family != "resident"
        runner = _Runner(graph, store, run, watcher, stop, asked, None, judge_later=later)
        with closing(runner), runner.judging:
            runner.compute(ends)


def _compute_all(runner: _Runner, keeper: GateKeeper, graph: Graph, store: Store, picked: Sequence[CellPlan]) -> None:
    """The base first, then the cells of every behavior that G0 lets through, as `schedule` orders them.

    A behavior whose base the judge has not read yet is held back; if its judgements come in time, it follows. Nothing
    waits for the judgements of a cell: its gates are asked again once they are there.
    """
    runner.compute([stage for plan in picked for stage in plan.base.values()], urgent=True)
    runner.judging.settle()
    decided: list[str] = []
    while fresh := [verdict for verdict in gate_base(graph, store) if verdict.subject not in decided]:
        for verdict in fresh:
            runner.decide(verdict)
        decided += [verdict.subject for verdict in fresh]
        alive = measurable_behaviors(graph, store)
        for step in steps(picked, alive, _group(graph.recipe)):
            runner.converge(step.runs)
            runner.compute(step.ends)
            for plan in step.cells:
                runner.ask(keeper, plan)
            _free_adapters(graph, store, step.cells)
        runner.judging.settle()
        if graph.judge is not None:
            for plan in picked:
                runner.ask(keeper, plan)


def _group(recipe: Recipe) -> int:
    """How many convergence runs may be trained in the same steps; 0 is for as many as memory allows."""
    if recipe.model.trainer == "trl":
        return 1
    if recipe.run.group != "auto":
        return recipe.run.group
    return 0 if engine_identity(recipe.model)["device"] == "cuda" else 1


def _free_adapters(graph: Graph, store: Store, plans: Sequence[CellPlan]) -> None:
    """Where the recipe keeps no adapters: free those of these cells that nothing will be drawn under any more."""
    if not graph.recipe.run.keep_adapters and (spent := spent_adapters(graph, store, plans)):
        free(store, spent)


def needed_ends(graph: Graph, store: Store, plans: Sequence[CellPlan]) -> list[Stage]:
    """The end stages that these cells need, as far as G0 has decided; all of them where it has not."""
    failures = store.failures()
    missing = [(m, s) for plan in graph.cells for (m, _), s in plan.base.items() if store.record(s.key) is None]
    failed = {measure for measure, stage in missing if any(part.key in failures for part in walk(stage))}
    if {measure for measure, _ in missing} - failed:
        alive = [behavior for behavior in graph.behaviors if behavior not in failed]
    else:
        alive = measurable_behaviors(graph, store)
    ends = [end for plan in plans for end in (*plan.base.values(), *wanted(plan, alive))]
    return [*ends, *(plan.geometry for plan in plans if plan.geometry is not None and wanted(plan, alive))]


def _measured(plan: CellPlan, store: Store) -> bool:
    return any(store.record(stage.key) is not None for stage in plan.scores.values())


def _forget_training_state(graph: Graph, store: Store) -> None:
    """Free the training state of finished stages that a kill left between their last commit and its removal."""
    for plan in graph.cells:
        finished = []
        if plan.snapshot is not None:
            lineage = graph.lineage(plan.snapshot)
            # Only a training that is through: a longer recipe's state may lie under the same key.
            if lineage[-1].inputs["epoch"] == graph.recipe.convergence.epochs and store.record(lineage[-1].key):
                finished.append(lineage_key(plan.snapshot))
        if plan.adapter is not None and store.record(plan.adapter.key):
            finished.append(plan.adapter.key)
        for key in finished:
            if store.progress(key):
                store.drop_progress(key)


def status_of(graph: Graph, store: Store | None) -> list[StageStatus]:
    """Every stage of a recipe with its state and the reason, without computing anything."""
    if store is None:
        return [StageStatus(s.slot, s.kind, s.key, "to do", "nothing was computed here yet") for s in graph.stages()]
    live = store.live_leases()
    needed = {part.key for end in needed_ends(graph, store, graph.cells) for part in walk(end)}
    run = next((row for row in store.runs() if row["id"] == run_id(graph.recipe)), None)
    problem = json.loads(run["facts"]).get("judging", {}).get("problem", "") if run else ""
    failures, statuses = store.failures(), dict[str, StageStatus]()
    for stage in graph.stages():
        status = _status(stage, store, live, stage.key in needed, statuses)
        if status.state not in ("done", "running") and (failed := _failed(stage, failures)) is not None:
            status = failed
        if stage.kind == "judge" and status.state in ("to do", "stale") and store.record(stage.needs["eval"].key):
            status = replace(status, state="pending", reason=problem or "its completions wait for the judge")
        statuses[stage.key] = status
    return list(statuses.values())


def run_facts() -> dict[str, Any]:
    """What the reproducibility card says of the machine, the versions, the command and the checkout."""
    versions = {}
    for package in CARD_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(["fastconv", *sys.argv[1:]]) if sys.argv[:1] else "",
        "python": platform.python_version(),
        "versions": versions,
        "machine": {"system": platform.system(), "processor": platform.machine(), "n_cpu": os.cpu_count()},
        "git": _git_state(),
    }


class _Runner:
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
        self.tally = Tally()
        self.failing = Failing(store)
        self.judging = JudgeRoom(
            graph, store, run, watcher, stop=stop, resident=lambda: self._engine().judge, access=access,
            later=judge_later,
        )  # fmt: skip

    def compute(self, ends: Sequence[Stage], *, urgent: bool = False) -> None:
        """Make sure that every one of these stages and all before them are done, or at the judge."""
        for end in ends:
            for stage in walk(end):
                if stage.key not in self._seen:
                    self._seen.add(stage.key)
                    self._one(stage, urgent)

    def ask(self, keeper: GateKeeper, plan: CellPlan) -> None:
        """Ask the gates about a finished cell; of one that a failure left half measured they could say nothing."""
        if not self.failing.touches(plan):
            keeper.after(plan)

    def decide(self, verdict: GateVerdict) -> None:
        """Write a gate's verdict down and show it."""
        self._store.put_verdict(self._run, verdict.gate, verdict.subject, verdict.verdict, verdict.body())
        self._watcher.gate(verdict)

    def _one(self, stage: Stage, urgent: bool) -> None:
        if self._store.record(stage.key) is not None:
            self._store.note_stage_of_run(self._run, stage, reused=True)
            return
        if self.failing.blocks(stage):
            return
        if self._stop.is_set():
            raise Interrupted("stopped", where=stage.slot, fix="the same command goes on from here")
        if stage.kind == "judge":
            self.judging.submit(stage, urgent=urgent)
            return
        if stage.kind == "snapshot":
            self.converge([self._graph.lineage(stage)])
            return
        self._watcher.stage(stage, reason_to_run(stage, self._store))
        began = time.monotonic()
        engine = self._engine()
        try:
            with self._store.lease(stage) as lease:
                outcome = engine.compute(stage, lease)
                self._store.commit(
                    stage,
                    outputs=outcome.outputs,
                    facts=outcome.facts,
                    seconds=time.monotonic() - began,
                    samples=outcome.samples,
                    scores=outcome.scores,
                )
        except (TrainingError, DataError) as error:
            self._note_failure([stage], error)
        self._account([stage], time.monotonic() - began)

    def converge(self, runs: Sequence[Sequence[Stage]]) -> None:
        """Train convergence runs, each given by its snapshots, in the same steps as far as memory allows."""
        for run in runs:
            self.compute([run[0].needs["answers"]])
        missing = [left for run in runs if (left := [one for one in run if self._is_missing(one)])]
        while missing:
            size = self._engine().group_size([run[0] for run in missing]) if len(missing) > 1 else 1
            self._converge_together(missing[:size])
            missing = missing[size:]

    def _is_missing(self, snapshot: Stage) -> bool:
        """Whether a snapshot was asked for and still has to be trained."""
        if snapshot.key not in self._wanted or self._store.record(snapshot.key) is not None:
            return False
        return not self.failing.blocks(snapshot)

    def _converge_together(self, runs: Sequence[Sequence[Stage]]) -> None:
        """Train these runs in one call. Should one of them fail, each goes on alone, to find out which."""
        if self._stop.is_set():
            raise Interrupted("stopped", where=runs[0][0].slot, fix="the same command goes on from here")
        for run in runs:
            self._watcher.stage(run[0], reason_to_run(run[0], self._store))
        began = time.monotonic()
        engine, failed = self._engine(), False
        try:
            with ExitStack() as leases:
                engine.converge([(run, leases.enter_context(self._store.lease(run[0]))) for run in runs])
        except TrainingError as error:
            failed = True
            if len(runs) == 1:
                self._note_failure([one for one in runs[0] if self._store.record(one.key) is None], error)
        everything = [one for run in runs for one in run]
        self._account(everything, time.monotonic() - began)
        if failed and len(runs) > 1:
            for run in runs:
                if left := [one for one in run if self._store.record(one.key) is None]:
                    self._converge_together([left])

    def _account(self, stages: Sequence[Stage], seconds: float) -> None:
        """Count and show what is done of these stages, which took so long together; then look at the judge."""
        self.tally.seconds += seconds
        for stage in stages:
            if self._store.record(stage.key) is not None and stage.key not in self._counted:
                self._counted.add(stage.key)
                self._count(stage)
                self._store.note_stage_of_run(self._run, stage, reused=False)
                self._watcher.stage_done(stage, seconds)
        self.judging.collect()

    def _note_failure(self, stages: Sequence[Stage], error: TrainingError | DataError) -> None:
        for stage in stages:
            self.failing.note(stage, error)
            self._watcher.stage_failed(stage, str(error))

    def _engine(self) -> Any:
        """Who computes. A base that fails its own tests is no matter of one stage: what it raises ends the run."""
        if self._executor is None:
            from fastconv.execute import Executor  # torch is loaded here, and only if something must be computed

            self._executor = Executor(self._graph, self._store, self._tell, self._stop.is_set, self._wanted)
            self._executor.prepare()
            self._executor.prove()
            facts = self._executor.facts()
            self._store.add_run_facts(self._run, facts)
            self._watcher.engine(facts["engine"])
        return self._executor

    def close(self) -> None:
        """Let go of whatever computing holds outside this process."""
        if self._executor is not None:
            self._executor.close()

    def _tell(self, progress: Progress) -> None:
        self._watcher.progress(progress)
        self.judging.glance()

    def _count(self, stage: Stage) -> None:
        record = self._store.record(stage.key)
        self.tally.n_stages += 1
        for name, value in (record.facts if record else {}).items():
            if name.endswith("_tok"):
                self.tally.tokens[name] = self.tally.tokens.get(name, 0) + int(value)


def reason_to_run(stage: Stage, store: Store) -> str:
    """Why a stage has to be computed: new, or which of its inputs changed."""
    before = store.latest_in_slot(stage.slot)
    if before is None:
        return "new"
    if before.version != stage.version:
        return f"fastconv computes this kind of stage differently now (version {before.version} -> {stage.version})"
    changes = changed_inputs(before.inputs, stage.full_inputs)
    own = [change for change in changes if not change.startswith("needs.")]
    upstream = [name for name, need in stage.needs.items() if before.inputs.get("needs", {}).get(name) != need.key]
    return "; ".join([*own, *(f"{name} changed" for name in upstream)]) or "new"


def _status(
    stage: Stage, store: Store, live: Mapping[str, Any], needed: bool, before: Mapping[str, StageStatus]
) -> StageStatus:
    record = store.record(stage.key)
    if record is not None:
        return StageStatus(stage.slot, stage.kind, stage.key, "done", "", record.seconds)
    if stage.key in live:
        note = live[stage.key]
        far = f"{note['done']} of {note['total']} {note['unit']}" if "done" in note else "just begun"
        return StageStatus(stage.slot, stage.kind, stage.key, "running", f"{far} (process {note['pid']})")
    if not needed:
        return StageStatus(stage.slot, stage.kind, stage.key, "skipped", "gate G0: not measurable at base")
    reason = reason_to_run(stage, store)
    if reason != "new":
        return StageStatus(stage.slot, stage.kind, stage.key, "stale", f"because {reason}")
    waiting = [need.slot for need in stage.needs.values() if need.key in before and before[need.key].state != "done"]
    return StageStatus(stage.slot, stage.kind, stage.key, "to do", f"after {waiting[0]}" if waiting else "")


def _failed(stage: Stage, failures: Mapping[str, Failure]) -> StageStatus | None:
    """A stage that failed, or that needs one that did; None for any other."""
    if stage.key in failures:
        return StageStatus(stage.slot, stage.kind, stage.key, "failed", failures[stage.key].reason)
    before = next((part.slot for part in walk(stage) if part.key in failures), None)
    return None if before is None else StageStatus(stage.slot, stage.kind, stage.key, "skipped", f"{before} failed")


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


def _git_state() -> dict[str, str]:
    """Commit and sha256 of the uncommitted diff of the checkout fastconv runs from, if it is one."""
    import hashlib

    folder = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        diff = subprocess.run(["git", "-C", str(folder), "diff", "HEAD"], capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {
        "commit": commit.stdout.strip(),
        "dirty_diff_sha256": hashlib.sha256(diff.stdout).hexdigest() if diff.stdout else "clean",
    }
