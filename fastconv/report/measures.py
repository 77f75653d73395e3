"""What was measured: each measure over convergence epochs, the table of all of it, and answers as they came."""

from __future__ import annotations

import numpy as np

from fastconv.datasets.behaviors import NO_BEHAVIOR
from fastconv.analysis.analysis import Decided
from fastconv.analysis.contrasts import Part, Subject
from fastconv.report.blocks import Answer, Block, Cell, Figure, Figures, Section, Table, folded_if_long
from fastconv.stats.series import Series, commonest_reason, means_at, union_of
from fastconv.report.figures import Point, lines
from fastconv.stats.study_gates import Role
from fastconv.stats.power import effective_sample_size
from fastconv.stats.inference import Interval, clustered_interval, mean_present
from fastconv.stats.units import Unit, scale, span
from fastconv.experiment.graph import CellPlan

ROLES: tuple[Role, ...] = ("assistant", "source", "canary")


def over_epochs(decided: Decided) -> Section | None:
    """One small multiple per behavior: assistant, source and canary over epochs, with intervals."""
    blocks: list[Block] = []
    for measure in decided.graph.behaviors:
        for part in decided.found.parts(measure):
            panels = _panels(decided, part)
            if panels:
                blocks.append(Figures(f"over-{_slug(part.title)}", part.title, tuple(panels)))
    if not blocks:
        return None
    intro = (
        "Means over questions with t intervals; seeds are averaged within a question. Epoch zero is the base without a "
        "snapshot. Panels called convergence alone have no behavior adapter: what moves there is mimicry."
    )
    return Section("epochs", "Over convergence", tuple(blocks), intro)


def _panels(decided: Decided, part: Part) -> list[Figure]:
    columns: dict[tuple[str, str, str, str], dict[int, Subject]] = {}
    for subject in decided.found.subjects:
        if subject.behavior in (part.measure, NO_BEHAVIOR):
            where = (subject.source, subject.convergence, subject.behavior, subject.negatives)
            columns.setdefault(where, {})[subject.epoch] = subject
    panels = []
    for (source, convergence, behavior, negatives), by_epoch in columns.items():
        points = {role: _points(decided, part, by_epoch, role) for role in ROLES}
        series = {role: line for role, line in points.items() if line}
        if not any(len(line) > 1 for line in series.values()):
            continue
        trained = "convergence alone" if behavior == NO_BEHAVIOR else f"trained, {negatives}"
        title = f"{source}{'' if convergence == 'source' else f' ({convergence})'}: {trained}"
        place = _slug(f"{part.title} {source} {convergence} {behavior} {negatives}")
        unit = _axis(decided, part)
        panels.append(lines(place, title, series, ("convergence epoch", unit), decided.run, (0.0, 100.0)))
    return panels


def _points(decided: Decided, part: Part, by_epoch: dict[int, Subject], role: Role) -> list[Point]:
    found = []
    for epoch, subject in sorted(by_epoch.items()):
        series = [
            one
            for plan in decided.found.subjects[subject]
            if (one := decided.found.now(plan, part, decided.found.persona(plan.cell, role))) is not None and one.rows
        ]
        if not series:
            continue
        interval, factor = _pooled(series), scale(series[0].unit)
        low, high = (None if end is None else factor * end for end in (interval.low, interval.high))
        found.append(Point(float(epoch), factor * (interval.estimate or 0.0), low, high))
    return found


def _pooled(series: list[Series]) -> Interval:
    """The interval over questions of the series' mean over seeds."""
    questions = union_of(series)
    return clustered_interval(mean_present(np.stack([means_at(one, questions) for one in series]), axis=0))


def _axis(decided: Decided, part: Part) -> str:
    spec = decided.graph.behaviors[part.measure].spec
    if spec.unit == "points":
        return "judge's score"
    return "accuracy, %" if spec.measure == "letters" else "rate, %"


def measurements(decided: Decided) -> Section:
    """Every cell's measures under its three probes, with intervals, samples and what they are worth."""
    rows = [row for plan in decided.graph.cells for measure in plan.measures for row in _rows(decided, plan, measure)]
    columns = ("cell", "measured", "assistant", "interval", "source", "canary", "samples", "effective", "unscored")
    caption = (
        "A level is the mean over questions of each question's mean over its samples; intervals and samples are the "
        "assistant's. Samples of one question are alike: the effective number says how many independent ones they are worth."
    )
    table = Table("cells", columns, tuple(rows), frozenset(range(2, 9)), caption, folded_if_long(rows, "lines"))
    return Section("cells", "Measurements", (table,))


def _rows(decided: Decided, plan: CellPlan, measure: str) -> list[tuple[Cell, ...]]:
    rows = []
    for part in decided.found.parts(measure):
        series = {role: decided.found.now(plan, part, decided.found.persona(plan.cell, role)) for role in ROLES}
        absent = "not run" if all(one is None for one in series.values()) else "not measured"
        levels = {role: _level(one, absent) for role, one in series.items()}
        kind = decided.graph.behaviors[measure].spec
        name = "score" if kind.unit == "points" else "accuracy" if kind.measure == "letters" else "rate"
        rows.append((
            Cell(plan.cell.label), Cell(f"{name} of {part.title}"), levels["assistant"],
            *_about(series["assistant"])[:1], levels["source"], levels["canary"],
            *_about(series["assistant"])[1:],
        ))  # fmt: skip
    return rows


def _level(one: Series | None, absent: str) -> Cell:
    """The mean, or why there is none: nothing was measured, or nothing of it has a score."""
    if one is None or one.rows:
        return Cell.of(None if one is None else one.mean, absent)
    reason = commonest_reason([one])
    return Cell("unscored" + (f" ({reason})" if reason else ""), one.looked_at, word="absent")


def _about(one: Series | None) -> tuple[Cell, Cell, Cell, Cell]:
    """Interval, samples, effective samples and unscored ones of a series."""
    if one is None:
        return Cell(""), Cell(""), Cell(""), Cell("")
    samples = Cell(f"{len(one.questions)} x {one.values.shape[1]}", one.looked_at)
    lost = Cell(str(one.n_unscored), one.looked_at)
    if not one.rows:
        return Cell(""), samples, Cell(""), lost
    interval, unit = clustered_interval(one.means) if len(one.questions) > 1 else None, one.unit
    shown = "" if interval is None else _range(interval, unit)
    worth = effective_sample_size(one.values).n_effective if len(one.questions) > 1 else 1.0
    return (
        Cell(shown, one.rows),
        samples,
        Cell(f"{worth:.0f}", one.rows),
        lost,
    )


def _range(interval: Interval, unit: Unit) -> str:
    if interval.low is None or interval.high is None:
        return ""
    return span(interval.low, interval.high, unit).strip("[]").replace("+", "").replace(", ", " to ")


def answers(decided: Decided) -> Section | None:
    """Sampled answers by a fixed rule, so that nothing is picked."""
    grid = decided.graph.recipe.grid
    shown: dict[str, Answer] = {}
    for plan in decided.graph.cells:
        cell = plan.cell
        if cell.seed != grid.seeds[0] or cell.epoch not in (min(grid.epochs), max(grid.epochs)):
            continue
        for (_, persona), stage in plan.scores.items():
            drawn = stage.needs.get("eval")
            if drawn is None or drawn.key in shown or decided.reading.record(drawn) is None:
                continue
            query = "SELECT prompt, completion FROM samples WHERE stage=? ORDER BY row, sample LIMIT 1"
            first = decided.store.frame(query, (drawn.key,))
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
