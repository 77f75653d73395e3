"""Runs a recipe: stages in order, gates before expensive work, finished stages reused.

The base is measured first. Gate G0 then decides which behaviors can be measured, and only their cells are trained.
Judging happens at the same time (`run.judging`); the run ends when both are done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fastconv.analysis.contrasts import ContrastBuilder
from fastconv.analysis.gates import (
    decide_gates,
    gate_base,
    gates_after,
    ignored_gates,
    mark_ignored,
    measurable_behaviors,
    undecided_base_gates,
)
from fastconv.analysis.scores import ScoreReader
from fastconv.audit.checks import check_recipe
from fastconv.engine.locate import engine_identity
from fastconv.errors import GateStop, InputError, JudgeError, did_you_mean
from fastconv.experiment.graph import CellPlan, Graph, lineage_key, walk
from fastconv.experiment.schedule import group_size, steps, wanted
from fastconv.judge.access import JudgeAccess, check_judge
from fastconv.recipe import IgnorableGate, Recipe
from fastconv.run.audit import require_passed, require_template
from fastconv.run.gc import unneeded_adapters
from fastconv.run.judging import judge_stages
from fastconv.run.runner import Runner, Tally, Watcher, stop_on_sigint
from fastconv.run.status import FailedStage, begin_run, needed_ends, raise_failed, run_facts
from fastconv.stats.gates import GateVerdict
from fastconv.store.gc import free, sweep
from fastconv.store.ledger import Store

#: Codes of the gates that a user may ignore.
IGNORABLE = get_args(IgnorableGate)


def parse_ignored_gates(codes: list[str], because: str) -> dict[str, str]:
    """The gates to ignore by code, with the reason. Raises InputError for an unknown code or a missing reason."""
    unknown = [code for code in codes if code not in IGNORABLE]
    if unknown:
        why = "the audit's refusals cannot be ignored" if unknown == ["G1"] else f"{unknown[0]!r} ends no run"
        raise InputError(why, where="--ignore-gate", fix=did_you_mean(unknown[0], IGNORABLE))
    if codes and len(because.split()) < 2:
        raise InputError(
            "an ignored gate needs its reason in words", where="--because", fix='write --because "why it may fail"'
        )
    if because and not codes:
        raise InputError("a reason without a gate", where="--because", fix="add --ignore-gate CODE")
    return dict.fromkeys(codes, because)


def require_no_stop(recipe: Recipe, verdicts: Sequence[GateVerdict]) -> None:
    """Raise GateStop for the first gate that failed, is not ignored, and ends a run of this recipe."""
    for verdict in verdicts:
        if verdict.failed and not verdict.ignored and verdict.gate in recipe.gates.stop:
            raise GateStop(
                f"{verdict.gate} failed: {verdict.reason} (rule: {verdict.threshold})",
                where=verdict.subject,
                fix=f'mend the cause, or go on with --ignore-gate {verdict.gate} --because "..."',
            )


def replay_gates(graph: Graph, store: Store) -> None:
    """Raise GateStop where `run_recipe` would: decides the gates of each cell again, as after it, and records nothing."""
    contrasts = ContrastBuilder(ScoreReader(graph, store).load())
    ignored = ignored_gates(store, graph.recipe)
    alive = measurable_behaviors(graph, store)
    for plan in graph.cells:
        begun = plan.snapshot is None or store.record(plan.snapshot.key) is not None
        if begun and wanted(plan, alive):  # what is not measured yet fails no gate
            require_no_stop(graph.recipe, mark_ignored(gates_after(contrasts, plan), ignored))


class Gatekeeper:
    """Decides the gates after each cell and records their verdicts."""

    def __init__(
        self, graph: Graph, store: Store, run: str, tell: Callable[[GateVerdict], None], ignored: Mapping[str, str]
    ) -> None:
        """`ignored` (reason by gate) is added to the run's facts, with what earlier calls ignored."""
        self._graph, self._store, self._run, self._tell = graph, store, run, tell
        self._ignored = {**ignored_gates(store, graph.recipe), **ignored}
        self._announced: set[tuple[str, str]] = set()
        if ignored:
            store.add_run_facts(run, {"ignored_gates": self._ignored, "ignored_at": time.time()})

    def after(self, plan: CellPlan) -> None:
        """Decide the gates of a finished cell. Raises GateStop if one that stops the run failed and is not ignored."""
        verdicts = gates_after(ContrastBuilder(ScoreReader(self._graph, self._store)), plan)
        for verdict in mark_ignored(verdicts, self._ignored):
            self._record(verdict)
            require_no_stop(self._graph.recipe, [verdict])

    def _record(self, verdict: GateVerdict) -> None:
        self._store.put_verdict(self._run, verdict.gate, verdict.subject, verdict.verdict, verdict.body())
        if verdict.failed and (verdict.gate, verdict.subject) not in self._announced:
            self._announced.add((verdict.gate, verdict.subject))
            self._tell(verdict)


@dataclass(frozen=True)
class RunResult:
    """Result of a run: id, what this call computed, gate verdicts, slots of pending judge stages, failed stages.

    `problem` is why the judge is out, if it is. `held` are the verdicts of G0 gates that could not be decided because
    too much of the base is unscored; their behaviors wait.
    """

    run: str
    tally: Tally
    verdicts: tuple[GateVerdict, ...]
    pending: tuple[str, ...] = ()
    problem: str = ""
    failed: tuple[FailedStage, ...] = ()
    held: tuple[GateVerdict, ...] = ()

    def require_complete(self) -> None:
        """Raise TrainingError or DataError if stages failed, naming the cells; otherwise what `require_judged` raises."""
        raise_failed(self.run, self.failed)
        self.require_judged()

    def require_judged(self) -> None:
        """Raise JudgeError if judge stages are pending or G0 could not be decided for some behavior."""
        if self.pending:
            raise JudgeError(
                f"{len(self.pending)} stages wait for the judge ({self.problem or 'it did not answer'}); their "
                "completions are kept and the rest is done",
                where=self.run,
                fix=f"`fastconv judge {self.run}` finishes them, then the same run goes on",
            )
        if self.held:
            reasons = "; ".join(f"{verdict.subject}: {verdict.reason}" for verdict in self.held)
            raise JudgeError(
                f"G0 cannot be decided, so these cells wait for a judge that answers ({reasons}); the base's completions "
                "are kept and the rest is done",
                where=self.run,
                fix="let another model or rubric read them (--set judge.model=... or --set judge.rubrics.NAME=FILE on the same "
                'run), or train unread with --ignore-gate G0 --because "..."',
            )


@dataclass(frozen=True)
class PreparedRun:
    """A recipe that passed all checks before any computation. `facts` are those that `admit` added to the run."""

    graph: Graph
    store: Store
    cells: list[CellPlan]
    access: JudgeAccess | None
    facts: Mapping[str, Any]

    def begin(self, watcher: Watcher, ignore_gates: Mapping[str, str] | None) -> tuple[str, Gatekeeper]:
        """Record and announce the run; returns its id and its gatekeeper, which records the ignored gates."""
        run = begin_run(self.store, self.graph.recipe, {**run_facts(), **self.facts})
        keeper = Gatekeeper(self.graph, self.store, run, watcher.gate, ignore_gates or {})
        stages = self.graph.stages(self.cells)
        watcher.begin(run, len(stages), sum(self.store.record(stage.key) is None for stage in stages))
        return run, keeper


def prepare_run(
    recipe: Recipe,
    workspace: Path,
    watcher: Watcher,
    *,
    plans: Callable[[Graph], list[CellPlan]] | None = None,
    admit: Callable[[Graph, Sequence[CellPlan]], Mapping[str, Any]] | None = None,
    judge_later: bool = False,
) -> PreparedRun:
    """Audit a recipe, select its cells and check its judge. Arguments as for `run_recipe`; nothing is computed.

    Raises DataError if the audit refuses the recipe, what `require_template` and `admit` raise, and RecipeError or JudgeError for a judge that
    is needed and cannot be asked.
    """
    report = check_recipe(recipe)
    require_passed(report, "audit")
    require_template(recipe)
    graph = Graph(recipe)
    cells = plans(graph) if plans else graph.cells
    facts = admit(graph, cells) if admit else {}
    store = Store.open(workspace)
    to_judge = [stage for stage in judge_stages(needed_ends(graph, store, cells)) if store.record(stage.key) is None]
    access = check_judge(graph.judge, store) if to_judge and not judge_later else None
    watcher.audited(report)
    return PreparedRun(graph, store, cells, access, facts)


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
) -> RunResult:
    """Run a recipe, or the cells that `plans` selects from it, to its verdicts. Continues what was begun.

    A judge that is out or has spent its budget leaves its stages pending; a stage whose numbers cannot be used, or whose
    rows the audit refuses, is recorded as failed; everything else is finished. `ignore_gates` holds gates that may fail,
    each with the reason. `admit` may refuse the audited cells by raising, and returns facts for the run's record. `stop`
    ends the run like Ctrl-C. With `judge_later` no judge is asked and its stages stay pending.

    Raises GateStop at the first gate that fails and may not, before the next expensive step; Interrupted on the first
    Ctrl-C, after the running step is complete and its checkpoint written; and what `prepare_run` raises.
    """
    prepared = prepare_run(recipe, workspace, watcher, plans=plans, admit=admit, judge_later=judge_later)
    graph, store, cells = prepared.graph, prepared.store, prepared.cells
    sweep(store)
    run, keeper = prepared.begin(watcher, ignore_gates)
    with stop_on_sigint(stop) as stop:
        wanted = {stage.key for stage in graph.stages(cells)}
        runner = Runner(graph, store, run, watcher, stop, wanted, prepared.access, judge_later=judge_later)
        with closing(runner), runner.judge_queue:
            _compute_all(runner, keeper, graph, store, cells)
    store.add_run_facts(run, runner.judge_queue.facts())
    _drop_finished_checkpoints(graph, store)
    _free_adapters(graph, store, cells)
    # Over everything measured so far: a call for one cell must not overwrite the verdicts of the whole run.
    verdicts = decide_gates(graph, store, [plan for plan in graph.cells if plan in cells or _is_measured(plan, store)])
    for verdict in verdicts:
        store.put_verdict(run, verdict.gate, verdict.subject, verdict.verdict, verdict.body())
        if verdict.gate != "G0":
            watcher.gate(verdict)
    pending = tuple(stage.slot for stage in runner.judge_queue.pending)
    failed = runner.failures.of(cells)
    held = tuple(
        verdict
        for verdict in undecided_base_gates(graph, store)
        if any(verdict.subject in plan.measures for plan in cells)
    )
    if not pending and not failed and not held:
        store.finish_run(run)
    runner.tally.n_stages += runner.judge_queue.n_committed
    return RunResult(run, runner.tally, tuple(verdicts), pending, runner.judge_queue.status.problem, failed, held)


def compute_stages(
    recipe: Recipe, workspace: Path, watcher: Watcher, keys: Collection[str], *, stop: threading.Event | None = None
) -> None:
    """Compute the stages with these keys and what they need. No gate is decided, and only a resident judge is asked.

    Raises what `run_recipe` raises while computing.
    """
    graph, store = Graph(recipe), Store.open(workspace)
    sweep(store)
    run = begin_run(store, recipe, run_facts())
    ends = [stage for stage in graph.stages() if stage.key in keys]
    wanted = {part.key for end in ends for part in walk(end)}
    with stop_on_sigint(stop) as stop:
        runner = Runner(graph, store, run, watcher, stop, wanted, None, judge_later=graph.judges_outside)
        with closing(runner), runner.judge_queue:
            runner.compute(ends)
            runner.wait()


def _compute_all(runner: Runner, keeper: Gatekeeper, graph: Graph, store: Store, cells: Sequence[CellPlan]) -> None:
    """Compute the base, then the cells of every behavior that G0 lets through, in the order of `schedule`.

    A behavior whose base is not judged yet is held back, and follows if its judgements arrive in time. The judgements of
    a cell are not awaited; its gates are decided again once they have arrived.

    A behavior whose base is judged but has too many unscored samples is held back as well, because its G0 is undecided:
    training costs GPU-hours that G0 may still rule out, while waiting costs nothing, as the completions are kept. It is
    not dropped: the run names it and does not end as finished (`RunResult.held`).
    """

    def after_cell(plan: CellPlan) -> None:
        keeper.after(plan)
        _free_adapters(graph, store, [plan])

    runner.compute([stage for plan in cells for stage in plan.base.values()], urgent=True)
    runner.wait()
    decided: list[str] = []
    while fresh := [verdict for verdict in gate_base(graph, store) if verdict.subject not in decided]:
        for verdict in fresh:
            runner.decide(verdict)
        decided += [verdict.subject for verdict in fresh]
        alive = measurable_behaviors(graph, store)
        for step in steps(cells, alive, group_size(graph.recipe, engine_identity(graph.recipe.model)["device"])):
            runner.train_convergence(step.runs)
            runner.train_behaviors(step.adapters)
            runner.compute(step.ends)
            for plan in step.cells:
                runner.when_measured(plan, after_cell)
        runner.wait()
        if graph.judge is not None:
            for plan in cells:
                runner.when_measured(plan, keeper.after)


def _free_adapters(graph: Graph, store: Store, plans: Sequence[CellPlan]) -> None:
    """Free the adapters of these cells that nothing needs any more, unless the recipe keeps adapters."""
    if not graph.recipe.run.keep_adapters and (garbage := unneeded_adapters(graph, store, plans)):
        free(store, garbage)


def _is_measured(plan: CellPlan, store: Store) -> bool:
    return any(store.record(stage.key) is not None for stage in plan.scores.values())


def _drop_finished_checkpoints(graph: Graph, store: Store) -> None:
    """Remove checkpoints of finished trainings that a kill has left behind after the last commit."""
    for plan in graph.cells:
        finished = []
        if plan.snapshot is not None:
            lineage = graph.lineage(plan.snapshot)
            # Only of a complete training: the checkpoint of a longer recipe may have the same key.
            if lineage[-1].inputs["epoch"] == graph.recipe.convergence.epochs and store.record(lineage[-1].key):
                finished.append(lineage_key(plan.snapshot))
        if plan.adapter is not None and store.record(plan.adapter.key):
            finished.append(plan.adapter.key)
        for key in finished:
            if store.progress(key):
                store.drop_progress(key)
