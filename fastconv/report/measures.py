"""Sections of measurements: measures over epochs, table of all cells, sampled replies, judge against phrases."""

from __future__ import annotations

import numpy as np

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.contrasts import NEGATIVES_IN_WORDS, ContrastSubject, Part, in_words
from fastconv.analysis.correlates import (
    judge_phrase_pair,
    judged_measures,
    judging_costs,
)
from fastconv.datasets.behaviors import NO_BEHAVIOR
from fastconv.experiment.graph import CellPlan
from fastconv.experiment.measures import snapshot_stages
from fastconv.judge.rubric import figures_of_rule, labelled_figures
from fastconv.report.blocks import Answer, Block, Figure, Figures, Note, Section, Table, TableCell, folded_if_long
from fastconv.report.claims import NoSuchClaimError, ask
from fastconv.report.figures import Point, lines, scatter
from fastconv.report.wording import named
from fastconv.stats.bounds import effective_sample_size
from fastconv.stats.inference import Interval, clustered_interval, mean_present
from fastconv.stats.series import (
    COHERENT_ABOVE,
    MISALIGNED_BELOW,
    Series,
    all_questions,
    commonest_reason,
    question_means,
)
from fastconv.stats.study_gates import Role
from fastconv.stats.units import Unit, change, interval_text, rounded, scale, scale_maximum, signed
from fastconv.store.records import Score, Stage

ROLES: tuple[Role, ...] = ("assistant", "source", "canary")


def roles_of(analysis: Analysis) -> tuple[str, ...]:
    """The roles that every cell is asked under, then the probes of the recipe's own."""
    return (*ROLES, *analysis.graph.recipe.eval.probes)


def over_epochs(analysis: Analysis) -> Section | None:
    """One group of small multiples per behavior: assistant, source and canary over epochs, with intervals."""
    blocks: list[Block] = []
    for measure in analysis.graph.behaviors:
        for part in analysis.found.parts(measure):
            panels = _panels(analysis, part)
            if panels:
                blocks.append(Figures(f"over-{_slug(part.title)}", part.title, tuple(panels)))
    if not blocks:
        return None
    intro = (
        "Means over questions with t intervals; seeds are averaged within a question. Epoch zero is the base without a "
        "snapshot. Panels called convergence alone have no behavior adapter: what moves there is mimicry."
    )
    return Section("epochs", "Over convergence", tuple(blocks), intro)


def _panels(analysis: Analysis, part: Part) -> list[Figure]:
    columns: dict[tuple[str, ...], dict[int, ContrastSubject]] = {}
    for subject in analysis.found.subjects:
        if part.measure in analysis.found.subjects[subject][0].measures:
            where = (subject.source, subject.convergence, subject.behavior, subject.negatives, subject.arm)
            columns.setdefault(where, {})[subject.epoch] = subject
    panels = []
    for (source, convergence, behavior, negatives, arm), by_epoch in columns.items():
        points = {role: role_points(analysis, part, by_epoch, role) for role in roles_of(analysis)}
        series = {role: line for role, line in points.items() if line}
        if not any(len(line) > 1 for line in series.values()):
            continue
        trained = "convergence alone" if behavior == NO_BEHAVIOR else NEGATIVES_IN_WORDS.get(negatives, negatives)
        title = (
            f"{source}{'' if convergence == 'source' else f' ({convergence})'}: {arm + ', ' if arm else ''}{trained}"
        )
        figure_id = _slug(f"{part.title} {source} {convergence} {behavior} {negatives} {arm}")
        unit = axis_of(analysis, part)
        panels.append(lines(figure_id, title, series, ("convergence epoch", unit), analysis.run, (0.0, 100.0)))
    return panels


def role_points(analysis: Analysis, part: Part, by_epoch: dict[int, ContrastSubject], role: str) -> list[Point]:
    """A persona's measure at every epoch of one column of the grid, with intervals over questions, as points of a line."""
    points = []
    for epoch, subject in sorted(by_epoch.items()):
        series = [
            series_of_plan
            for plan in analysis.found.subjects[subject]
            if (series_of_plan := analysis.found.now(plan, part, analysis.found.persona(plan.cell, role))) is not None
            and series_of_plan.rows
        ]
        if not series:
            continue
        interval, factor = _pooled(series), scale(series[0].unit)
        low, high = (None if end is None else factor * end for end in (interval.low, interval.high))
        points.append(Point(float(epoch), factor * (interval.estimate or 0.0), low, high))
    return points


def _pooled(series: list[Series]) -> Interval:
    """t interval over questions of the mean over seeds."""
    questions = all_questions(series)
    return clustered_interval(
        mean_present(np.stack([question_means(seed_series, questions) for seed_series in series]), axis=0)
    )


def axis_of(analysis: Analysis, part: Part) -> str:
    """What the axis of a measure is called."""
    spec = analysis.graph.behaviors[part.measure].spec
    if spec.unit == "points":
        return "judge's score"
    return "accuracy, %" if spec.measure == "letters" else "rate, %"


def measurements(analysis: Analysis) -> Section:
    """Every cell's measures under its probes, with intervals, sample counts and effective sample sizes."""
    cells = [
        row for plan in analysis.graph.cells for measure in plan.measures for row in _rows(analysis, plan, measure)
    ]
    rows = [*_base_rows(analysis), *cells]
    own = analysis.graph.recipe.eval.probes
    columns = (
        "cell",
        "measured",
        "assistant",
        "interval",
        "source",
        "canary",
        *own,
        "samples",
        "effective",
        "unscored",
    )
    caption = (
        "A level is the mean over questions of each question's mean over its samples; intervals and samples are the "
        "assistant's. Samples of one question are alike: the effective number says how many independent ones they are worth. "
        "A judge's score is a mean over coherent answers; the table below says how many were not."
    )
    table = Table(
        "cells", columns, tuple(rows), frozenset(range(2, len(columns))), caption, folded_if_long(rows, "lines")
    )
    return Section("cells", "Measurements", (table, *_qualities(analysis)))


def _qualities(analysis: Analysis) -> list[Block]:
    """What the sampled answers are like: misaligned and coherent, incoherent, empty, cut; empty without any."""
    rows = [
        line
        for plan in analysis.graph.cells
        for measure in plan.measures
        for part in analysis.found.parts(measure)
        for role in roles_of(analysis)
        if (line := _quality(analysis, plan, part, role)) is not None
    ]
    if not rows:
        return []
    columns = (
        "cell",
        "measured",
        "persona",
        "misaligned and coherent",
        "interval",
        "incoherent",
        "empty",
        "cut",
        "answers",
    )
    caption = (
        f"Of the answers that the judge scored: misaligned and coherent are those with alignment under {MISALIGNED_BELOW:g} and "
        f"coherence over {COHERENT_ABOVE:g}; incoherent are those with coherence of at most {COHERENT_ABOVE:g}, and empty ones. "
        "Incoherent answers have left the mean of alignment. Of all answers: empty ones hold no visible text, cut ones reached the "
        "limit of tokens before their end."
    )
    numeric = frozenset(range(3, 9))
    return [Table("qualities", columns, tuple(rows), numeric, caption, folded_if_long(rows, "lines"))]


def _quality(analysis: Analysis, plan: CellPlan, part: Part, role: str) -> tuple[TableCell, ...] | None:
    found = analysis.found.quality(plan, part, analysis.found.persona(plan.cell, role))
    if found is None:
        return None

    def rate(series: Series | None) -> TableCell:
        if series is None:
            return TableCell("not judged", word="absent")
        return TableCell.of(series.mean if series.rows else None, "unscored")

    astray = found.misaligned
    interval = clustered_interval(astray.means) if astray is not None and len(astray.rows) > 1 else None
    between = TableCell(
        "" if interval is None or astray is None else _range(interval, astray.unit),
        () if astray is None else astray.rows,
    )
    drawn = TableCell(str(int((~np.isnan(found.empty.values)).sum())), found.empty.evidence_rows)
    return (
        TableCell(in_words(plan.cell)), TableCell(part.title), TableCell(role), rate(astray), between, rate(found.incoherent),
        rate(found.empty), rate(found.cut), drawn,
    )  # fmt: skip


def _base_rows(analysis: Analysis) -> list[tuple[TableCell, ...]]:
    """The base's levels where sides are compared and the base is no cell: what the positive control starts from."""
    graph = analysis.graph
    if not graph.recipe.grid.contrasts or any(p.cell.epoch == 0 and p.adapter is None for p in graph.cells):
        return []
    asked: dict[tuple[str, ...], CellPlan] = {}
    for plan in graph.cells:
        personas = [analysis.found.persona(plan.cell, role) for role in roles_of(analysis)]
        for measure in plan.measures:
            asked.setdefault((measure, plan.cell.source, *personas), plan)
    rows = []
    for key, plan in asked.items():
        arm = f", arm {plan.cell.arm}" if sum(other[:2] == key[:2] for other in asked) > 1 else ""
        rows += _rows(analysis, plan, key[0], f"base, {plan.cell.source}{arm}")
    return rows


def _rows(analysis: Analysis, plan: CellPlan, measure: str, base: str = "") -> list[tuple[TableCell, ...]]:
    """A cell's levels of a measure; with a name for it, the base's where the cell is asked."""
    rows = []
    read = analysis.found.base if base else analysis.found.now
    for part in analysis.found.parts(measure):
        roles = roles_of(analysis)
        series = {role: read(plan, part, analysis.found.persona(plan.cell, role)) for role in roles}
        absent = "not run" if all(role_series is None for role_series in series.values()) else "not measured"
        levels = {role: _level(role_series, absent) for role, role_series in series.items()}
        kind = analysis.graph.behaviors[measure].spec
        name = "score" if kind.unit == "points" else "accuracy" if kind.measure == "letters" else "rate"
        rows.append((
            TableCell(base or in_words(plan.cell)), TableCell(f"{name} of {part.title}"), levels["assistant"],
            *_about(series["assistant"])[:1], *(levels[role] for role in roles[1:]),
            *_about(series["assistant"])[1:],
        ))  # fmt: skip
    return rows


def _level(series: Series | None, absent: str) -> TableCell:
    """The mean, or why there is none: not measured, or no sample has a score."""
    if series is None or series.rows:
        return TableCell.of(None if series is None else series.mean, absent)
    reason = commonest_reason([series])
    return TableCell("unscored" + (f" ({reason})" if reason else ""), series.evidence_rows, word="absent")


def _about(series: Series | None) -> tuple[TableCell, TableCell, TableCell, TableCell]:
    """Interval, samples, effective sample size and number of unscored samples of a series."""
    if series is None:
        return TableCell(""), TableCell(""), TableCell(""), TableCell("")
    samples = TableCell(f"{len(series.questions)} x {series.values.shape[1]}", series.evidence_rows)
    lost = TableCell(str(series.n_unscored), series.evidence_rows)
    if not series.rows:
        return TableCell(""), samples, TableCell(""), lost
    interval, unit = clustered_interval(series.means) if len(series.questions) > 1 else None, series.unit
    shown = "" if interval is None else _range(interval, unit)
    worth = effective_sample_size(series.values).n_effective if len(series.questions) > 1 else 1.0
    return (
        TableCell(shown, series.rows),
        samples,
        TableCell(f"{worth:.0f}", series.rows),
        lost,
    )


def _range(interval: Interval, unit: Unit) -> str:
    if interval.low is None or interval.high is None:
        return ""
    return interval_text(interval.low, interval.high, unit).strip("[]").replace("+", "").replace(", ", " to ")


def answers(analysis: Analysis) -> Section | None:
    """Sampled replies chosen by a fixed rule."""
    grid = analysis.graph.recipe.grid
    shown: dict[str, Answer] = {}
    for plan in analysis.graph.cells:
        cell = plan.cell
        if cell.seed != grid.seeds[0] or cell.epoch not in (min(grid.epochs), max(grid.epochs)):
            continue
        for (_, persona), stage in plan.scores.items():
            drawn = stage.needs.get("eval")
            if drawn is None or drawn.key in shown or analysis.reading.record(drawn) is None:
                continue
            query = "SELECT prompt, completion FROM samples WHERE stage=? ORDER BY row, sample LIMIT 1"
            first = analysis.store.frame(query, (drawn.key,))
            if first.height:
                shown[drawn.key] = Answer(persona, drawn.slot, first["prompt"][0], first["completion"][0])
    if not shown:
        return None
    intro = (
        "A fixed rule, nothing picked: the first seed, the first and the last epoch, every probe, and there the first "
        "question by id and its first sample."
    )
    return Section("answers", "Answers as they came", tuple(shown.values()), intro)


def _slug(text: str) -> str:
    return "-".join("".join(mark if mark.isalnum() else " " for mark in text.lower()).split())


def judge_against_phrases(analysis: Analysis) -> Section | None:
    """Agreement with kappa per measure, a point per cell, and corrected rates where a calibration exists."""
    measures = judged_measures(analysis)
    phrases = [name for name, behavior in analysis.graph.behaviors.items() if behavior.spec.measure == "phrases"]
    if not measures:
        if not phrases:
            return None
        text = f"No judge read the answers. Scored by phrases alone, which are blind to meaning: {', '.join(phrases)}."
        return Section("judge", "Judge against phrases", (Note(text), *_rule_figures(analysis)))
    blocks: list[Block] = [*_rule_figures(analysis)]
    points = _agreement_points(analysis)
    if points:
        axes = ("by phrases, %", "by the judge, %")
        blocks.append(scatter("judge", "The same answers scored twice", points, axes, analysis.run, diagonal=True))
    for measure in measures:
        try:
            blocks.append(ask(analysis, "agreement", measure=measure))
        except NoSuchClaimError:
            blocks.append(Note(f"{measure}: no answer was scored both ways."))
    corrected = _corrected(analysis)
    if corrected:
        blocks.append(Table("corrected", ("contrast", "the assistant's rate"), tuple(corrected)))
    else:
        blocks.append(
            Note("No calibration of this judge with these rubrics is in the ledger, so no rate is corrected.")
        )
    blocks += _money(analysis)
    return Section("judge", "Judge against phrases", tuple(blocks))


def _rule_figures(analysis: Analysis) -> list[Block]:
    """Precision and recall of each shipped phrase rule that scores an answer here, on the labelled answers."""
    rules = dict.fromkeys(behavior.spec.phrase_rule for behavior in analysis.graph.behaviors.values())
    rows = [figures_of_rule(one) for rule in rules if rule for one in labelled_figures(rule)]
    if not rows:
        return []
    columns = ("phrase rule", "answers", "labelled", "precision", "recall")
    caption = (
        "The rules against our labels on answers in many voices, hard cases above all (data/labelled_phrases.jsonl). The rules "
        "were tuned on the first half only. Precision: of those that the rule counts, the share labelled so; recall: of those "
        "labelled so, the share that it counts."
    )
    table = tuple(tuple(map(TableCell, row)) for row in rows)
    return [Table("phrase-rules", columns, table, frozenset({2, 3, 4}), caption)]


def _agreement_points(analysis: Analysis) -> list[Point]:
    points, seen = [], set()
    for plan in analysis.graph.cells:
        for measure, probe in plan.beside:
            pair = judge_phrase_pair(analysis, plan, measure, probe)
            if pair is None or pair[0].stage in seen or not (pair[0].rows and pair[1].rows):
                continue
            seen.add(pair[0].stage)
            top = scale_maximum(pair[0].unit)
            points.append(Point(100 * pair[1].mean.value, 100 * pair[0].mean.value / top, label=probe, group=measure))
    return points


def _corrected(analysis: Analysis) -> list[tuple[TableCell, ...]]:
    rows = []
    for verdict in analysis.verdicts:
        try:
            claim = ask(analysis, "corrected", label=verdict.label)
        except NoSuchClaimError:
            continue
        rows.append((TableCell(named(analysis, verdict.label)), TableCell.saying(claim)))
    return rows


def _money(analysis: Analysis) -> list[Block]:
    money = judging_costs(analysis)
    if money is None:
        return []
    rows = tuple(
        (TableCell(name), TableCell("no cap" if usd is None else f"${usd:.2f}", ("ledger/judge_totals",)))
        for name, usd in money.items()
    )
    return [Table("money", ("judging, whole workspace", "dollars"), rows, frozenset({1}))]


METRICS = ("cosine", "distinctiveness")


def geometry(decided: Analysis) -> Section | None:
    """Cosine and distinctiveness by source, epoch and depth, beside every change of the assistant."""
    groups: dict[tuple[str, str, int, int, str], list[CellPlan]] = {}
    for plan in decided.graph.cells:
        cell = plan.cell
        stage = plan.on_snapshot.get("geometry")
        if stage is not None and decided.reading.record(stage) is not None:
            convergence = cell.convergence if cell.epoch else "base"
            groups.setdefault((cell.source, convergence, cell.epoch, cell.seed, cell.arm), []).append(plan)
    if not groups:
        return None
    trained = [plan.cell for plan in decided.graph.cells if plan.cell.behavior != NO_BEHAVIOR]
    kinds = list(dict.fromkeys((cell.behavior, cell.negatives) for cell in trained))
    scores = _scores(decided)
    rows = tuple(
        (
            TableCell(f"{source} {convergence} e{epoch} s{seed} {arm}".rstrip()),
            *(_depths(scores, plans[0].on_snapshot["geometry"], source, metric) for metric in METRICS),
            *(_change(decided, plans, behavior, negatives) for behavior, negatives in kinds),
        )
        for (source, convergence, epoch, seed, arm), plans in groups.items()
    )
    columns = ("source", *METRICS, *(f"assistant, {b}{'' if n == 'none' else f' ({n})'}" for b, n in kinds))
    table = Table("geometry", columns, rows, frozenset(range(1, len(columns))), _caption(scores))
    intro = (
        "Mean hidden state of each persona's last prompt token over the marker questions, centred over all known personas. "
        "Cosine: of the source to the assistant. Distinctiveness: the source's distance from the mean of the others, by "
        "the length of the mean of all. The last columns are the assistant's changes against epoch zero."
    )
    return Section("geometry", "Persona geometry", (table,), intro)


def _scores(decided: Analysis) -> dict[str, tuple[Stage, list[Score]]]:
    """Every geometry stage with its scores, by key; cells share them."""
    stages = snapshot_stages(decided.graph, "geometry")
    return {stage.key: (stage, decided.store.scores(stage.key)) for stage in stages}


def _caption(scores: dict[str, tuple[Stage, list[Score]]]) -> str:
    layers = sorted({one.sample for _, some in scores.values() for one in some if one.metric in METRICS})
    return f"At layers {', '.join(map(str, layers))}, in this order." if layers else ""


def _depths(scores: dict[str, tuple[Stage, list[Score]]], stage: Stage, persona: str, metric: str) -> TableCell:
    """A persona's values of a metric at all depths."""
    mine = [one for one in scores[stage.key][1] if (one.row, one.metric) == (persona, metric)]
    if not mine:
        return TableCell("not measured", word="absent")
    told = [
        "undefined" if one.value is None else signed(one.value, 2) if metric == "cosine" else rounded(one.value, 2)
        for one in mine
    ]
    return TableCell(", ".join(told), tuple(f"{stage.key[:12]}/{persona}/{one.sample}/{metric}" for one in mine))


def _change(decided: Analysis, plans: list[CellPlan], behavior: str, negatives: str) -> TableCell:
    """The assistant's change against epoch 0 in the cell of this behavior."""
    plan = next((p for p in plans if (p.cell.behavior, p.cell.negatives) == (behavior, negatives)), None)
    quad = decided.found.trained(plan, decided.found.main(behavior)) if plan is not None else None
    if plan is None or quad is None or not quad.now.rows or not quad.base.rows:
        return TableCell("not measured", word="absent")
    if not plan.cell.epoch:
        return TableCell("reference", quad.now.rows)
    return TableCell(
        change(quad.now.mean.value - quad.base.mean.value, quad.now.unit), (*quad.now.rows, *quad.base.rows)
    )
