"""Correlates of transfer over sources: the assistant's marker rate (#109), and properties of each source's base."""

from __future__ import annotations

from dataclasses import dataclass

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.contrasts import subject_of
from fastconv.datasets.personas import ASSISTANT
from fastconv.stats.series import Number
from fastconv.stats.units import scale
from fastconv.stats.verdicts import CellVerdict

MARKER = "marker"


def marker_rates(decided: Analysis) -> dict[str, Number]:
    """The assistant's marker rate per source at its last measured epoch, over seeds; empty without the behavior."""
    found: dict[str, Number] = {}
    last: dict[str, int] = {}
    if MARKER not in decided.graph.behaviors:
        return found
    part = decided.found.main(MARKER)
    for subject, plans in decided.found.subjects.items():
        if (
            subject.behavior != MARKER
            or decided.found.is_control(subject)
            or subject.epoch < last.get(subject.source, 0)
        ):
            continue
        series = [one for plan in plans if (one := decided.found.now(plan, part, ASSISTANT)) is not None and one.rows]
        if series:
            last[subject.source] = subject.epoch
            value = sum(one.mean.value for one in series) / len(series)
            found[subject.source] = Number(value, "share", tuple(row for one in series for row in one.rows))
    return found


def transfer_by_source(decided: Analysis, behavior: str) -> dict[str, CellVerdict]:
    """Each source's declared contrast of a behavior at its last epoch, of the first kind of negatives."""
    found: dict[str, tuple[int, CellVerdict]] = {}
    for plan in decided.graph.cells:
        subject = subject_of(plan.cell)
        if subject.behavior != behavior or not subject.epoch or decided.found.is_control(subject):
            continue
        label = subject.label(decided.found.main(behavior))
        one = next((verdict for verdict in decided.verdicts if verdict.label == label), None)
        if one is not None and one.estimate is not None and subject.epoch > found.get(subject.source, (0, one))[0]:
            found[subject.source] = (subject.epoch, one)
    return {source: one for source, (_, one) in found.items()}


MARKER_RATE = "marker rate"


@dataclass(frozen=True)
class Level:
    """A source's value of a correlate, in the unit it is shown in, and the rows behind it."""

    value: float
    rows: tuple[str, ...]


#: On the base, before any adapter: by name, how a sentence and an axis call it.
ON_THE_BASE = {
    "base level": "the source's own level of it on the base",
    "cosine": "the source's cosine to the assistant on the base",
    "distinctiveness": "the source's distinctiveness on the base",
}


def in_words(correlate: str) -> str:
    """The name of a correlate in a sentence."""
    return ON_THE_BASE.get(correlate, f"the assistant's {correlate}")


def levels(decided: Analysis, correlate: str, behavior: str) -> dict[str, Level]:
    """Each source's value of a correlate where measured; cosine and distinctiveness are means over depths."""
    if correlate == MARKER_RATE:
        return {source: Level(scale(one.unit) * one.value, one.rows) for source, one in marker_rates(decided).items()}
    if correlate == "base level":
        return _own_levels(decided, behavior)
    return _places(decided, correlate)


def _own_levels(decided: Analysis, behavior: str) -> dict[str, Level]:
    found, part = {}, decided.found.main(behavior)
    for plan in decided.graph.cells:
        source = plan.cell.source
        base = decided.found.base(plan, part, source) if source not in found else None
        if base is not None and base.rows:
            found[source] = Level(scale(base.unit) * base.mean.value, base.mean.rows)
    return found


def _places(decided: Analysis, metric: str) -> dict[str, Level]:
    found: dict[str, Level] = {}
    for plan in decided.graph.cells:
        source = plan.cell.source
        stage = plan.on_snapshot.get("geometry")
        if plan.cell.epoch or stage is None or source in found:
            continue
        mine = [
            one
            for one in decided.store.scores(stage.key)
            if (one.row, one.metric) == (source, metric) and one.value is not None
        ]
        if mine:
            rows = tuple(f"{stage.key[:12]}/{source}/{one.sample}/{metric}" for one in mine)
            found[source] = Level(sum(one.value or 0.0 for one in mine) / len(mine), rows)
    return found
