"""Running a recipe: stages in order, gates before cost, everything found done taken as done.

Phase one measures the base; gate G0 then decides which behaviors can say anything; only their cells are trained.
Judging goes on beside it (`judge_room`), and the run ends when both are done.
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
from fastconv.errors import GateStop, InputError, JudgeError
from fastconv.experiment.graph import CellPlan, Graph, lineage_key, walk
from fastconv.experiment.schedule import group_size, steps
from fastconv.judge.access import check_judge
from fastconv.recipe import IgnorableGate, Recipe
from fastconv.run.audit import require_passed
from fastconv.run.gc import spent_adapters
from fastconv.run.judging import judge_stages
from fastconv.run.provenance import begin_run, run_facts
from fastconv.run.runner import Runner, Tally, Watcher, stop_on_sigint
from fastconv.run.status import FailedStage, needed_ends, raise_failed
from fastconv.stats.gates import GateVerdict
from fastconv.store.gc import free
from fastconv.store.ledger import Store

#: Gates that a user may ignore.
IGNORABLE = get_args(IgnorableGate)


def ignoring(codes: list[str], because: str) -> dict[str, str]:
    """Gates to ignore, each with the reason. Raises InputError for one that cannot be, or without a reason."""
    unknown = [code for code in codes if code not in IGNORABLE]
    if unknown:
        why = "the audit's refusals cannot be ignored" if unknown == ["G1"] else f"{unknown[0]!r} ends no run"
        raise InputError(why, where="--ignore-gate", fix=f"use one of {', '.join(IGNORABLE)}")
    if codes and len(because.split()) < 2:
        raise InputError(
            "an ignored gate needs its reason in words", where="--because", fix='write --because "why it may fail"'
        )
    if because and not codes:
        raise InputError("a reason without a gate", where="--because", fix="add --ignore-gate CODE")
    return dict.fromkeys(codes, because)


class Gatekeeper:
    """Asks the gates after each cell, and records what they said."""

    def __init__(
        self, graph: Graph, store: Store, run: str, tell: Callable[[GateVerdict], None], ignored: Mapping[str, str]
    ) -> None:
        """`ignored` is recorded in the run's facts, beside what earlier calls ignored."""
        self._graph, self._store, self._run, self._tell = graph, store, run, tell
        self._ignored = {**ignored_gates(store, graph.recipe), **ignored}
        self._said: set[tuple[str, str]] = set()
        if ignored:
            store.add_run_facts(run, {"ignored_gates": self._ignored, "ignored_at": time.time()})

    def after(self, plan: CellPlan) -> None:
        """Ask the gates about a finished cell. Raises GateStop if one that stops the run failed and is not ignored."""
        verdicts = gates_after(ContrastBuilder(ScoreReader(self._graph, self._store)), plan)
        for verdict in mark_ignored(verdicts, self._ignored):
            self._record(verdict)
            if verdict.failed and not verdict.ignored and verdict.gate in self._graph.recipe.gates.stop:
                raise GateStop(
                    f"{verdict.gate} failed: {verdict.reason} (rule: {verdict.threshold})",
                    where=verdict.subject,
                    fix=f'mend the cause, or go on with --ignore-gate {verdict.gate} --because "..."',
                )

    def _record(self, verdict: GateVerdict) -> None:
        self._store.put_verdict(self._run, verdict.gate, verdict.subject, verdict.verdict, verdict.body())
        if verdict.failed and (verdict.gate, verdict.subject) not in self._said:
            self._said.add((verdict.gate, verdict.subject))
            self._tell(verdict)


@dataclass(frozen=True)
class Finished:
    """The end of a run: its id, what was computed now, the gates' verdicts, what the judge still owes, what failed.

    `held` are the G0 gates that could not be decided, for too much of the base is unscored: their behaviors wait.
    """

    run: str
    tally: Tally
    verdicts: tuple[GateVerdict, ...]
    pending: tuple[str, ...] = ()
    problem: str = ""
    failed: tuple[FailedStage, ...] = ()
    held: tuple[GateVerdict, ...] = ()

    def require_whole(self) -> None:
        """Raise TrainingError or DataError if stages failed, naming the cells; else JudgeError if some wait."""
        raise_failed(self.run, self.failed)
        self.require_judged()

    def require_judged(self) -> None:
        """Raise JudgeError if judge stages are pending, or behaviors are held back for what their base's judge left out."""
        if self.pending:
            raise JudgeError(
                f"{len(self.pending)} stages wait for the judge ({self.problem or 'it did not answer'}); their "
                "completions are kept and the rest is done",
                where=self.run,
                fix=f"`fastconv judge {self.run}` finishes them, then the same run goes on",
            )
        if self.held:
            told = "; ".join(f"{one.subject}: {one.reason}" for one in self.held)
            raise JudgeError(
                f"G0 cannot be decided, so these cells wait for a judge that answers ({told}); the base's completions "
                "are kept and the rest is done",
                where=self.run,
                fix="let another model or rubric read them (--set judge.model=... or --set judge.rubrics.NAME=FILE on the same "
                'run), or train unread with --ignore-gate G0 --because "..."',
            )


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
    run = begin_run(store, recipe, {**run_facts(), **notes})
    keeper = Gatekeeper(graph, store, run, watcher.gate, ignore_gates or {})
    with stop_on_sigint(stop) as stop:
        everything = graph.stages(picked)
        asked = {stage.key for stage in everything}
        runner = Runner(graph, store, run, watcher, stop, asked, access, judge_later=judge_later)
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
    held = tuple(
        one for one in undecided_base_gates(graph, store) if any(one.subject in plan.measures for plan in picked)
    )
    if not pending and not failed and not held:
        store.finish_run(run)
    runner.tally.n_stages += runner.judging.n_committed
    return Finished(run, runner.tally, tuple(verdicts), pending, runner.judging.status.problem, failed, held)


def compute_stages(
    recipe: Recipe, workspace: Path, watcher: Watcher, keys: Collection[str], *, stop: threading.Event | None = None
) -> None:
    """Compute these stages of a recipe and what they need. No gate is asked, and no judge but the resident base.

    Raises what `run_recipe` raises while computing.
    """
    graph, store = Graph(recipe), Store.open(workspace)
    store.sweep()
    run = begin_run(store, recipe, run_facts())
    ends = [stage for stage in graph.stages() if stage.key in keys]
    asked = {part.key for end in ends for part in walk(end)}
    with stop_on_sigint(stop) as stop:
        runner = Runner(graph, store, run, watcher, stop, asked, None, judge_later=graph.judges_outside)
        with closing(runner), runner.judging:
            runner.compute(ends)
            runner.settle()


def _compute_all(runner: Runner, keeper: Gatekeeper, graph: Graph, store: Store, picked: Sequence[CellPlan]) -> None:
    """The base first, then the cells of every behavior that G0 lets through, as `schedule` orders them.

    A behavior whose base the judge has not read yet is held back; if its judgements come in time, it follows. Nothing
    waits for the judgements of a cell: its gates are asked again once they are there.
    A behavior whose base was read and is too much unscored is held back alike: its G0 says neither yes nor no. Training
    costs GPU-hours that a G0 may still rule out, and judging its cells pays the judge that just failed; waiting costs
    nothing, for the completions are kept. It is not dropped either: the run says so and does not end well (`Finished`).
    """

    def measured(plan: CellPlan) -> None:
        keeper.after(plan)
        _free_adapters(graph, store, [plan])

    runner.compute([stage for plan in picked for stage in plan.base.values()], urgent=True)
    runner.settle()
    decided: list[str] = []
    while fresh := [verdict for verdict in gate_base(graph, store) if verdict.subject not in decided]:
        for verdict in fresh:
            runner.decide(verdict)
        decided += [verdict.subject for verdict in fresh]
        alive = measurable_behaviors(graph, store)
        for step in steps(picked, alive, group_size(graph.recipe, engine_identity(graph.recipe.model)["device"])):
            runner.converge(step.runs)
            runner.stack(step.adapters)
            runner.compute(step.ends)
            for plan in step.cells:
                runner.when_measured(plan, measured)
        runner.settle()
        if graph.judge is not None:
            for plan in picked:
                runner.when_measured(plan, keeper.after)


def _free_adapters(graph: Graph, store: Store, plans: Sequence[CellPlan]) -> None:
    """Where the recipe keeps no adapters: free those of these cells on which nothing will stand any more."""
    if not graph.recipe.run.keep_adapters and (spent := spent_adapters(graph, store, plans)):
        free(store, spent)


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
