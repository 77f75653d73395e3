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
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastconv.auditing import require_passed
from fastconv.datasets.audit import CheckReport, check_recipe
from fastconv.deciding.results import decide_gates, gate_base, measurable_behaviors
from fastconv.deciding.stopping import GateKeeper
from fastconv.errors import Interrupted, JudgeError
from fastconv.findings.gates import GateVerdict
from fastconv.graph import CellPlan, Graph, lineage_key, walk
from fastconv.judge_room import Access, JudgeRoom, check_judge, judge_stages
from fastconv.judging.book import DeskStatus
from fastconv.recipe import Recipe, canonical_json, recipe_sha256, run_id
from fastconv.store import Stage, Store, changed_inputs

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
    """The end of a run: its id, what was computed now, the gates' verdicts, and what the judge still owes."""

    run: str
    tally: Tally
    verdicts: tuple[GateVerdict, ...]
    pending: tuple[str, ...] = ()
    problem: str = ""

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
    """Where one stage of a recipe stands: `done`, `running`, `to do`, `pending` (at the judge), `stale` or `skipped`."""

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
    notes: Mapping[str, Any] | None = None,
) -> Finished:
    """Run a recipe (or the cells that `plans` picks from it) to its verdict. Resumes whatever was begun.

    A judge that is out or has spent its budget leaves its stages pending; everything else is finished. `ignore_gates`
    names gates that may fail, each with the reason; `notes` join the run's facts. Raises GateStop at the first other one that does, before the next
    cost; Interrupted on the first Ctrl-C once the running step is whole and its state is kept; and before anything is
    computed RecipeError or JudgeError for a judge that cannot be asked.
    """
    report = check_recipe(recipe)
    require_passed(report, "audit")
    graph = Graph(recipe)
    picked = plans(graph) if plans else graph.cells
    store = Store.open(workspace)
    to_judge = [s for s in judge_stages(needed_ends(graph, store, picked)) if store.record(s.key) is None]
    access = check_judge(graph.judge, store) if to_judge else None
    watcher.audited(report)
    store.sweep()
    run = run_id(recipe)
    store.start_run(
        run,
        canonical_json(recipe.model_dump(mode="json")),
        recipe_sha256(recipe),
        recipe.name,
        {**run_facts(), **(notes or {})},
    )
    keeper = GateKeeper(graph, store, run, watcher.gate, ignore_gates or {})
    with stop_on_sigint() as stop:
        everything = graph.stages(picked)
        runner = _Runner(graph, store, run, watcher, stop, {stage.key for stage in everything}, access)
        watcher.begin(run, len(everything), sum(store.record(stage.key) is None for stage in everything))
        with closing(runner), runner.judging:
            _compute_all(runner, keeper, graph, store, picked)
    store.add_run_facts(run, runner.judging.facts())
    _forget_training_state(graph, store)
    # Over everything measured so far: one cell alone must not unsay what the whole run found.
    verdicts = decide_gates(graph, store, [plan for plan in graph.cells if plan in picked or _measured(plan, store)])
    for verdict in verdicts:
        store.put_verdict(run, verdict.gate, verdict.subject, verdict.verdict, verdict.body())
        if verdict.gate != "G0":
            watcher.gate(verdict)
    pending = tuple(stage.slot for stage in runner.judging.pending)
    if not pending:
        store.finish_run(run)
    runner.tally.n_stages += runner.judging.n_committed
    return Finished(run, runner.tally, tuple(verdicts), pending, runner.judging.status.problem)


def _compute_all(runner: _Runner, keeper: GateKeeper, graph: Graph, store: Store, picked: Sequence[CellPlan]) -> None:
    """The base first, then the cells of every behavior that G0 lets through, each cell's gates asked after it.

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
        for plan in picked:
            runner.compute(wanted(plan, alive))
            keeper.after(plan)
        runner.judging.settle()
        if graph.judge is not None:
            for plan in picked:
                keeper.after(plan)


def needed_ends(graph: Graph, store: Store, plans: Sequence[CellPlan]) -> list[Stage]:
    """The end stages that these cells need, as far as G0 has decided; all of them where it has not."""
    base_done = all(store.record(stage.key) for plan in graph.cells for stage in plan.base.values())
    alive = measurable_behaviors(graph, store) if base_done else list(graph.behaviors)
    return [end for plan in plans for end in (*plan.base.values(), *wanted(plan, alive))]


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


def wanted(plan: CellPlan, alive: Sequence[str]) -> list[Stage]:
    """The end stages a cell needs computed: only measures that can say something, nothing of a behavior that cannot."""
    if plan.cell.behavior != "none" and plan.cell.behavior not in alive:
        return []
    sides = (plan.scores, plan.beside)
    return [stage for side in sides for (measure, _), stage in side.items() if measure in alive]


def status_of(graph: Graph, store: Store | None) -> list[StageStatus]:
    """Every stage of a recipe with its state and the reason, without computing anything."""
    if store is None:
        return [StageStatus(s.slot, s.kind, s.key, "to do", "nothing was computed here yet") for s in graph.stages()]
    live = store.live_leases()
    needed = {part.key for end in needed_ends(graph, store, graph.cells) for part in walk(end)}
    run = next((row for row in store.runs() if row["id"] == run_id(graph.recipe)), None)
    problem = json.loads(run["facts"]).get("judging", {}).get("problem", "") if run else ""
    statuses: dict[str, StageStatus] = {}
    for stage in graph.stages():
        status = _status(stage, store, live, stage.key in needed, statuses)
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
        access: Access | None,
    ) -> None:  # fmt: skip
        self._graph = graph
        self._wanted = wanted
        self._store = store
        self._run = run
        self._watcher = watcher
        self._stop = stop
        self._seen: set[str] = set()
        self._executor: Any = None
        self.tally = Tally()
        self.judging = JudgeRoom(
            graph, store, run, watcher, stop=stop, resident=lambda: self._engine().judge, access=access
        )

    def compute(self, ends: Sequence[Stage], *, urgent: bool = False) -> None:
        """Make sure that every one of these stages and all before them are done, or at the judge."""
        for end in ends:
            for stage in walk(end):
                if stage.key not in self._seen:
                    self._seen.add(stage.key)
                    self._one(stage, urgent)

    def decide(self, verdict: GateVerdict) -> None:
        """Write a gate's verdict down and show it."""
        self._store.put_verdict(self._run, verdict.gate, verdict.subject, verdict.verdict, verdict.body())
        self._watcher.gate(verdict)

    def _one(self, stage: Stage, urgent: bool) -> None:
        if self._store.record(stage.key) is not None:
            self._store.note_stage_of_run(self._run, stage, reused=True)
            return
        if self._stop.is_set():
            raise Interrupted("stopped", where=stage.slot, fix="the same command goes on from here")
        if stage.kind == "judge":
            self.judging.submit(stage, urgent=urgent)
            return
        self._watcher.stage(stage, reason_to_run(stage, self._store))
        together = self._graph.lineage(stage) if stage.kind == "snapshot" else [stage]
        missing = [one for one in together if one.key in self._wanted and self._store.record(one.key) is None]
        began = time.monotonic()
        with self._store.lease(stage) as lease:
            outcome = self._engine().compute(stage, lease)
            seconds = time.monotonic() - began
            if outcome is not None:
                self._store.commit(
                    stage,
                    outputs=outcome.outputs,
                    facts=outcome.facts,
                    seconds=seconds,
                    samples=outcome.samples,
                    scores=outcome.scores,
                )
        self.tally.seconds += seconds
        for one in missing:  # one training commits all its epochs
            self._seen.add(one.key)
            self._count(one)
            self._store.note_stage_of_run(self._run, one, reused=False)
            self._watcher.stage_done(one, seconds)
        self.judging.collect()

    def _engine(self) -> Any:
        if self._executor is None:
            from fastconv.execute import Executor  # torch is loaded here, and only if something must be computed

            self._executor = Executor(self._graph, self._store, self._tell, self._stop.is_set, self._wanted)
            self._executor.prepare()
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


@contextmanager
def stop_on_sigint() -> Iterator[threading.Event]:
    """The first Ctrl-C (or SIGTERM) asks the running step to end well; the second one ends at once."""
    stop = threading.Event()
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
