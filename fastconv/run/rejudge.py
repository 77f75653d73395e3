"""Judging without sampling or training: pending judge stages, another rubric, calibration. For `judge` and `calibrate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from fastconv.datasets.behaviors import load_behaviors
from fastconv.datasets.files import assets, read_toml
from fastconv.datasets.spec import PhraseRule
from fastconv.errors import InputError, JudgeError, RecipeError
from fastconv.experiment.graph import Graph
from fastconv.experiment.recorded import graph_of_run
from fastconv.judge.access import check_judge, open_desk
from fastconv.judge.budget import JudgeIdentity
from fastconv.judge.calibrate import (
    Calibration,
    CalibrationRow,
    calibrate,
    load_attempts,
    load_calibration,
)
from fastconv.judge.desk import DeskStatus, JudgeDesk
from fastconv.judge.local import CompleteMany
from fastconv.judge.rubric import (
    REASONS,
    Agreement,
    Rubric,
    RuleFigures,
    compare_scores,
    find_rubric,
    labelled_figures,
    load_rubric,
    shipped_rubrics,
)
from fastconv.recipe import JudgeSettings, Recipe, run_id
from fastconv.run.judging import JudgeQueue, calibrate_phrases, judge_stages, judge_with_desk
from fastconv.run.runner import Watcher, stop_on_sigint
from fastconv.run.status import begin_run, needed_ends, run_facts
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Score, Stage, Store


@dataclass(frozen=True)
class JudgingResult:
    """Result of `finish_judging`. `agreement[measure][other]` compares the new scores with another way of scoring.

    `pending` are the slots of stages that are still not judged.
    """

    run: str
    n_committed: int
    pending: tuple[str, ...]
    status: DeskStatus
    agreement: Mapping[str, Mapping[str, Agreement]]

    def require_judged(self) -> None:
        """Raise JudgeError if stages are still pending."""
        if self.pending:
            raise JudgeError(
                f"{len(self.pending)} stages still wait for the judge ({self.status.problem or 'it did not answer'})",
                where=self.run,
                fix="the same command goes on from here",
            )


@dataclass(frozen=True)
class RubricCalibration:
    """Results of the judge and of the phrase rule on the labelled rows of one rubric; None where there is none."""

    rubric: str
    judge: Calibration | None
    phrases: Agreement | None
    #: The phrase rule on the labelled answers that it was tuned on, and on those that it was not.
    rule: tuple[RuleFigures, ...] = ()


def with_rubric(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with this file as the rubric of its name. Raises DataError; InputError if no behavior uses that name."""
    rubric = load_rubric(path)
    used = {behavior.spec.rubric for behavior in load_behaviors(recipe).values()}
    if rubric.name not in used:
        raise InputError(
            f"no behavior of the recipe is judged by {rubric.name!r}",
            where=str(path),
            fix=f"name the rubric one of {', '.join(sorted(used - {''})) or 'none'}",
        )
    judge = recipe.judge.model_copy(update={"rubrics": {**recipe.judge.rubrics, rubric.name: str(path.resolve())}})
    return recipe.model_copy(update={"judge": judge})


def finish_judging(
    recipe: Recipe, workspace: Path, watcher: Watcher, *, before: Recipe | None = None, urgent: bool = False,
    again: str = "",
) -> JudgingResult:  # fmt: skip
    """Judge the stored completions of every judge stage that is missing; samples and trains nothing.

    `again` also asks for what the judge left unscored for this reason (one of `rubric.REASONS`). `urgent` stages are
    judged live in `auto` mode. `before` is an earlier recipe (with another rubric, for example) whose scores are compared
    with the new ones. Raises RecipeError without a judge, JudgeError if it cannot be asked, Interrupted on Ctrl-C.
    """
    if recipe.judge.mode == "substring":
        raise RecipeError(
            "the recipe has no judge", where="judge.mode", fix="set it, e.g. --set judge.mode=auto with judge.model"
        )
    store = Store.open(workspace, create=False)
    graph = graph_of_run(recipe, store)
    if graph.judge is not None and graph.judge.family == "resident":
        graph = Graph(recipe)  # it judges with this machine's engine, whoever drew the answers
    judge = graph.judge
    assert judge is not None
    run = run_id(recipe)
    stages = judge_stages(graph.stages())
    if again:
        _reopen(judge, store, stages, again)
    todo = [s for s in stages if store.record(s.key) is None and store.record(s.needs["eval"].key) is not None]
    access = check_judge(judge, store) if todo else None
    if store.run(run) is None:
        begin_run(store, recipe, run_facts())
    watcher.begin(run, len(todo), len(todo))
    with stop_on_sigint() as stop:
        judge_queue = JudgeQueue(graph, store, run, watcher, stop=stop, resident=_resident(graph, store), access=access)
        with judge_queue:
            for stage in todo:
                judge_queue.submit(stage, urgent=urgent)
            judge_queue.wait()
    store.add_run_facts(run, judge_queue.facts())
    if all(store.record(end.key) for end in needed_ends(graph, store, graph.cells)):
        store.finish_run(run)
    pending = tuple(stage.slot for stage in judge_queue.pending)
    return JudgingResult(run, judge_queue.n_committed, pending, judge_queue.status, _agreement(graph, store, before))


def _reopen(judge: JudgeIdentity, store: Store, stages: Sequence[Stage], reason: str) -> None:
    """Forget the judgements without a value for this reason, and the stages that rest on them. Raises InputError."""
    if reason not in REASONS:
        raise InputError(f"no reason is called {reason!r}", where="--again", fix=f"use one of {', '.join(REASONS)}")
    ledger = JudgeLedger(store)
    # Equal completions of several stages share a judgement, so what rests on it is asked of each stage's own scores.
    stale = [stage.key for stage in stages if any(score.reason == reason for score in store.scores(stage.key))]
    for stage in stages:
        if store.record(stage.needs["eval"].key) is not None:
            requests = judge.requests(stage.work["rubric"], store.samples(stage.needs["eval"].key))
            ledger.reopen([request.key for request in requests], reason)
    for key in stale:
        store.forget(key)


def calibrate_judge(
    judge: JudgeIdentity | None, settings: JudgeSettings, workspace: Path, names: Sequence[str], *,
    rows: Path | None = None, graph: Graph | None = None,
) -> list[RubricCalibration]:  # fmt: skip
    """Compare a judge's verdicts with hand-labelled rows, rubric by rubric, and store the results in the ledger.

    The effect of the shipped injection attempts is measured too, and the phrase rule where a behavior has one. `names`
    are rubrics (default: all shipped), `rows` a file of the user's for a single one. `judge` None measures phrase rules
    only; `graph` is needed when the resident base judges. Raises InputError, DataError, JudgeError.
    """
    names = names or list(shipped_rubrics())
    if rows is not None and len(names) != 1:
        raise InputError("labelled rows go with one rubric", where="--rows", fix="name it with --rubric")
    store = Store.open(workspace)
    access, resident = check_judge(judge, store), cache(_resident(graph, store))

    def open_one(reverse: bool) -> JudgeDesk:
        assert judge is not None, "called for a judge only"
        return open_desk(judge, access, workspace, resident, reverse=reverse)

    results = []
    for name in names:
        rubric = find_rubric(settings, name)
        labelled = load_calibration(rows or assets("data") / f"calibration_{name}.jsonl", rubric)
        calibration = None
        if judge is not None:
            judge_samples = judge_with_desk(open_one, JudgeLedger(store), rubric)
            calibration = calibrate(rubric, labelled, judge_samples, load_attempts(assets("data") / "injections.json"))
            # Stored under the model name of the replies, as the scores are.
            JudgeLedger(store).save_calibration(rubric.sha256, calibration.model, calibration.to_json())
        rule = _rule_beside(rubric)
        figures = tuple(labelled_figures(rule)) if rule else ()
        results.append(RubricCalibration(name, calibration, _phrase_agreement(rubric, rule, labelled), figures))
    return results


def _resident(graph: Graph | None, store: Store) -> Callable[[], CompleteMany]:
    def load() -> CompleteMany:
        from fastconv.run.executor import Executor  # torch, for a judge that is the base itself

        if graph is None:
            raise InputError("the resident base judges only with a recipe", where="calibrate", fix="name a recipe")
        return Executor(graph, store).judge

    return load


def _rule_beside(rubric: Rubric) -> str:
    """The phrase rule of the shipped behavior with this rubric; empty without one."""
    specs = read_toml(assets("data") / "behaviors.toml").values()
    return next(
        (spec["phrase_rule"] for spec in specs if spec.get("rubric") == rubric.name and "phrase_rule" in spec), ""
    )


def _phrase_agreement(rubric: Rubric, rule: str, labelled: Sequence[CalibrationRow]) -> Agreement | None:
    """Agreement of this phrase rule with the labels of the same rows; None without a rule."""
    if not rule:
        return None
    phrases = PhraseRule.of(read_toml(assets("data") / "phrases.toml")[rule], rule)
    return calibrate_phrases(rubric, labelled, lambda answer: phrases.match(answer) is not None)


def _agreement(graph: Graph, store: Store, before: Recipe | None) -> dict[str, dict[str, Agreement]]:
    """By measure: the agreement of the judge's scores with the phrase rule's, and with the earlier recipe's judge."""
    comparisons: dict[str, list[tuple[str, Stage, Stage]]] = {}
    old_plans = {plan.cell: plan for plan in graph_of_run(before, store).cells} if before is not None else {}
    for plan in graph.cells:
        for pair, stage in plan.scores.items():
            if stage.kind != "judge":
                continue
            others = [("phrases", plan.beside[pair])] if pair in plan.beside else []
            if plan.cell in old_plans and old_plans[plan.cell].scores[pair].kind == "judge":
                others.append(("the judge before", old_plans[plan.cell].scores[pair]))
            for name, other in others:
                if store.record(stage.key) and store.record(other.key) and stage.key != other.key:
                    comparisons.setdefault(pair[0], []).append((name, stage, other))
    agreements: dict[str, dict[str, Agreement]] = {}
    for measure, triples in comparisons.items():
        cut = 50.0 if graph.behaviors[measure].spec.unit == "points" else 0.5
        for name in dict.fromkeys(name for name, _, _ in triples):
            # Cells share stages: each pair counts once.
            pairs = {(stage.key, other.key): (stage, other) for way, stage, other in triples if way == name}
            new_scores = [score for stage, _ in pairs.values() for score in _unique_rows(store, stage)]
            old_scores = [score for stage, other in pairs.values() for score in _unique_rows(store, other, stage.slot)]
            agreements.setdefault(measure, {})[name] = compare_scores(old_scores, new_scores, cut=cut)
    return agreements


def _unique_rows(store: Store, stage: Stage, slot: str = "") -> list[Score]:
    """A stage's scores with the slot in front of the row, so that rows are unique over stages."""
    return [replace(score, row=f"{slot or stage.slot}/{score.row}") for score in store.scores(stage.key)]
