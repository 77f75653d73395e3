"""What each cell says: transfer, reverse, equivalent, inconclusive or uninformative, each with its reason.

Estimand (blueprint section 6): the assistant's change against epoch 0, paired by question, minus the canary's change,
minus the same without a behavior adapter (mimicry) where the recipe has that control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastconv.findings.evidence import Series
from fastconv.findings.power import RateBound, clustered_rate_bound
from fastconv.findings.stats import (
    Arm,
    Contrast,
    difference_in_differences,
    holm,
    tost,
    transfer_contrast,
)
from fastconv.findings.words import Evidence, verdict


@dataclass(frozen=True, eq=False)
class CellEvidence:
    """The series that a cell's verdict may look at; `mimicry` is None where the control was not run."""

    label: str
    behavior: str
    direction: Literal[-1, 1]
    margin: float
    assistant_now: Series
    assistant_base: Series
    canary_now: Series
    canary_base: Series
    mimicry: Arm | None
    source_shows: bool | None


@dataclass(frozen=True)
class CellVerdict:
    """A cell's verdict, its contrast in points (None where not estimable), and the rows it rests on."""

    label: str
    kind: str
    reason: str
    estimate: float | None
    low: float | None
    high: float | None
    p_corrected: float | None
    rows: tuple[str, ...]


def decide(cells: Sequence[CellEvidence]) -> list[CellVerdict]:
    """Verdicts of all primary contrasts of a run, Holm-corrected together."""
    contrasts = [_contrast(cell) for cell in cells]
    raw = np.array([np.nan if c.interval.p_two_sided is None else c.interval.p_two_sided for c in contrasts])
    corrected = holm(raw) if raw.size else raw
    return [_decide(*parts) for parts in zip(cells, contrasts, corrected.tolist(), strict=True)]


def not_run(label: str, reason: str, rows: tuple[str, ...]) -> CellVerdict:
    """A cell that was not trained because it could not have said anything."""
    return CellVerdict(label, "uninformative", reason, None, None, None, None, rows)


def arm(now: Series, base: Series, canary_now: Series, canary_base: Series) -> Arm:
    """Question means of a cell and of its epoch 0, by position."""
    return Arm(now.means, base.means, canary_now.means, canary_base.means)


def _contrast(cell: CellEvidence) -> Contrast:
    with_behavior = arm(cell.assistant_now, cell.assistant_base, cell.canary_now, cell.canary_base)
    if cell.mimicry is not None:
        return transfer_contrast(with_behavior, cell.mimicry)
    return difference_in_differences(
        with_behavior.now, with_behavior.base, with_behavior.canary_now, with_behavior.canary_base
    )


def _decide(cell: CellEvidence, contrast: Contrast, p_corrected: float) -> CellVerdict:
    interval = contrast.interval
    corrected = None if interval.p_two_sided is None or np.isnan(p_corrected) else p_corrected
    word = verdict(
        Evidence(
            direction=cell.direction,
            contrast=interval,
            p_corrected=corrected,
            equivalence=tost(contrast.per_question, cell.margin),
            measurable_at_base=True,  # a cell that is not measurable is never trained, so never comes here
            source_shows_behavior=cell.source_shows,
            bound_base=_bound(cell.assistant_base),
            bound_now=_bound(cell.assistant_now),
        )
    )
    reason = word.reason if cell.mimicry is not None else f"{word.reason}; mimicry was not measured"
    rows = tuple(
        row
        for series in (cell.assistant_now, cell.assistant_base, cell.canary_now, cell.canary_base)
        for row in series.rows
    )
    return CellVerdict(cell.label, word.kind, reason, interval.estimate, interval.low, interval.high, corrected, rows)


def _bound(one: Series) -> RateBound | None:
    """The clustered bound at floor or ceiling; None for a judge's points, which are no rate."""
    return None if np.nanmax(one.values, initial=0.0) > 1.0 else clustered_rate_bound(one.values)


def by_kind(verdicts: Sequence[CellVerdict]) -> Mapping[str, int]:
    """How many cells got which word."""
    counts: dict[str, int] = {}
    for one in verdicts:
        counts[one.kind] = counts.get(one.kind, 0) + 1
    return counts
