"""The assistant's marker rate by source (#109) beside what its behaviors transferred."""

from __future__ import annotations

from fastconv.datasets.personas import ASSISTANT
from fastconv.analysis.analysis import Decided
from fastconv.analysis.contrasts import subject_of
from fastconv.stats.series import Number
from fastconv.stats.verdicts import CellVerdict

MARKER = "marker"


def marker_rates(decided: Decided) -> dict[str, Number]:
    """The assistant's marker rate of each source at its last measured epoch, over seeds; empty without the behavior."""
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


def transfer_by_source(decided: Decided, behavior: str) -> dict[str, CellVerdict]:
    """Each source's declared contrast of a behavior at its last epoch; the first kind of negatives where there are two."""
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
