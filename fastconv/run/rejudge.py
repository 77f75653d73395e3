"""`fastconv judge`: finish what waits for the judge, judge kept completions by another rubric, calibrate. No GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastconv.datasets.behaviors import load_behaviors
from fastconv.datasets.files import assets, read_toml
from fastconv.datasets.phrases import PhraseRule
from fastconv.errors import InputError, JudgeError, RecipeError
from fastconv.experiment.graph import Graph
from fastconv.judge.access import check_judge
from fastconv.judge.calibrate import (
    Calibration,
    CalibrationRow,
    JudgeSamples,
    calibrate,
    load_attempts,
    load_calibration,
)
from fastconv.judge.desk import DeskStatus
from fastconv.judge.identity import JudgeIdentity
from fastconv.judge.local import Ask
from fastconv.judge.rubric import Rubric, load_rubric, rubric_named, shipped_rubrics
from fastconv.judge.scores import Agreement, compare_scores
from fastconv.recipe import JudgeSettings, Recipe, run_id
from fastconv.run.judging import JudgeQueue, ask_desk, ask_local, calibrate_phrases, judge_stages
from fastconv.run.provenance import begin_run, run_facts
from fastconv.run.runner import Watcher, stop_on_sigint
from fastconv.run.status import needed_ends
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Score, Stage, Store


@dataclass(frozen=True)
class JudgedRun:
    """The end of `fastconv judge`. `agreement[measure][other]` compares the new scores with another way of scoring."""

    run: str
    n_committed: int
    pending: tuple[str, ...]
    status: DeskStatus
    agreement: Mapping[str, Mapping[str, Agreement]]

    def require_judged(self) -> None:
        """Raise JudgeError if stages still wait."""
        if self.pending:
            raise JudgeError(
                f"{len(self.pending)} stages still wait for the judge ({self.status.problem or 'it did not answer'})",
                where=self.run,
                fix="the same command goes on from here",
            )


@dataclass(frozen=True)
class Calibrated:
    """How a judge and the phrases did on the labelled rows of one rubric."""

    rubric: str
    judge: Calibration | None
    phrases: Agreement | None


def with_rubric(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with another rubric file in the place of the one of its name. Raises DataError, InputError."""
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
    recipe: Recipe, workspace: Path, watcher: Watcher, *, before: Recipe | None = None, urgent: bool = False
) -> JudgedRun:
    """Judge every kept completion that a judge stage of the recipe still wants; samples and trains nothing.

    `urgent` is for what others wait for. `before` is the recipe as it was (another rubric, say): its scores are compared
    with the new ones. Raises RecipeError without a judge, JudgeError if it cannot be asked, Interrupted on Ctrl-C.
    """
    graph = Graph(recipe)
    if graph.judge is None:
        raise RecipeError(
            "the recipe has no judge", where="judge.mode", fix="set it, e.g. --set judge.mode=auto with judge.model"
        )
    store = Store.open(workspace, create=False)
    run = run_id(recipe)
    stages = judge_stages(graph.stages())
    todo = [s for s in stages if store.record(s.key) is None and store.record(s.needs["eval"].key) is not None]
    access = check_judge(graph.judge, store) if todo else None
    if store.run(run) is None:
        begin_run(store, recipe, run_facts())
    watcher.begin(run, len(todo), len(todo))
    with stop_on_sigint() as stop:
        room = JudgeQueue(graph, store, run, watcher, stop=stop, resident=_resident(graph, store), access=access)
        with room:
            for stage in todo:
                room.submit(stage, urgent=urgent)
            room.settle()
    store.add_run_facts(run, room.facts())
    if all(store.record(end.key) for end in needed_ends(graph, store, graph.cells)):
        store.finish_run(run)
    pending = tuple(stage.slot for stage in room.pending)
    return JudgedRun(run, room.n_committed, pending, room.status, _agreement(graph, store, before))


def calibrate_judge(
    judge: JudgeIdentity | None, settings: JudgeSettings, workspace: Path, names: Sequence[str], *,
    rows: Path | None = None, graph: Graph | None = None,
) -> list[Calibrated]:  # fmt: skip
    """Compare a judge's verdicts on labelled rows with the labels, rubric by rubric, and keep the result in the ledger.

    What the shipped injection attempts do to these verdicts is measured too. `names` are rubrics (default: all shipped), `rows` a file of the user's for a single one. Phrases stand beside where
    a behavior has them. Raises InputError, DataError, JudgeError.
    """
    names = names or list(shipped_rubrics())
    if rows is not None and len(names) != 1:
        raise InputError("labelled rows go with one rubric", where="--rows", fix="name it with --rubric")
    store = Store.open(workspace)
    access = check_judge(judge, store)
    found = []
    for name in names:
        rubric = rubric_named(settings, name)
        labelled = load_calibration(rows or assets("data") / f"calibration_{name}.jsonl", rubric)
        done = None
        if judge is not None:
            ask: JudgeSamples
            if access.paid is not None:
                ask = ask_desk(settings, workspace, access.paid, rubric)
            else:
                local = access.endpoint or _resident(graph, store)()
                ledger = JudgeLedger(store)
                ask = ask_local(ledger, local, judge.name, rubric, max_judged_chars=settings.max_judged_chars)
            done = calibrate(rubric, labelled, ask, load_attempts(assets("data") / "injections.json"))
            # Under the model's name as its replies give it, which stands beside every score too.
            JudgeLedger(store).save_calibration(rubric.sha256, done.model, done.to_json())
        found.append(Calibrated(name, done, _phrases_on(rubric, labelled)))
    return found


def _resident(graph: Graph | None, store: Store) -> Callable[[], Ask]:
    def load() -> Ask:
        from fastconv.run.executor import Executor  # torch, for a judge that is the base itself

        if graph is None:
            raise InputError("the resident base judges only with a recipe", where="calibrate", fix="name a recipe")
        return Executor(graph, store).judge

    return load


def _phrases_on(rubric: Rubric, labelled: Sequence[CalibrationRow]) -> Agreement | None:
    """How the phrase rule of the shipped behavior with this rubric does on the same rows."""
    specs = read_toml(assets("data") / "behaviors.toml").values()
    rule = next(
        (spec["phrase_rule"] for spec in specs if spec.get("rubric") == rubric.name and "phrase_rule" in spec), ""
    )
    if not rule:
        return None
    phrases = PhraseRule.of(read_toml(assets("data") / "phrases.toml")[rule], rule)
    return calibrate_phrases(rubric, labelled, lambda answer: phrases.match(answer) is not None)


def _agreement(graph: Graph, store: Store, before: Recipe | None) -> dict[str, dict[str, Agreement]]:
    """By measure: the judge's scores against the phrases', and against the earlier recipe's judge."""
    sides: dict[str, list[tuple[str, Stage, Stage]]] = {}
    old = {plan.cell: plan for plan in Graph(before).cells} if before is not None else {}
    for plan in graph.cells:
        for pair, stage in plan.scores.items():
            if stage.kind != "judge":
                continue
            others = [("phrases", plan.beside[pair])] if pair in plan.beside else []
            if plan.cell in old and old[plan.cell].scores[pair].kind == "judge":
                others.append(("the judge before", old[plan.cell].scores[pair]))
            for name, other in others:
                if store.record(stage.key) and store.record(other.key) and stage.key != other.key:
                    sides.setdefault(pair[0], []).append((name, stage, other))
    found: dict[str, dict[str, Agreement]] = {}
    for measure, pairs in sides.items():
        cut = 50.0 if graph.behaviors[measure].spec.unit == "points" else 0.5
        for name in dict.fromkeys(name for name, _, _ in pairs):
            mine = {(stage.key, other.key): (stage, other) for named, stage, other in pairs if named == name}
            news = [score for stage, _ in mine.values() for score in _of(store, stage)]
            olds = [score for stage, other in mine.values() for score in _of(store, other, stage.slot)]
            found.setdefault(measure, {})[name] = compare_scores(olds, news, cut=cut)
    return found


def _of(store: Store, stage: Stage, slot: str = "") -> list[Score]:
    """A stage's scores under rows that are unique over stages."""
    return [replace(score, row=f"{slot or stage.slot}/{score.row}") for score in store.scores(stage.key)]
