"""Everything tested beside the primary contrasts, corrected together by Benjamini and Hochberg.

Trends over epochs, mimicry, the canary's own change, and measures that are reported apart (the published eight
alignment questions). They describe; no verdict rests on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastconv.stats.inference import (
    Contrast,
    Interval,
    benjamini_hochberg,
    clustered_interval,
    paired_change,
    trend_over_epochs,
)
from fastconv.stats.series import Series, means_at, union_of
from fastconv.stats.units import Unit
from fastconv.stats.verdicts import Quad


@dataclass(frozen=True, eq=False)
class SecondaryContrast:
    """A contrast that is not among the declared ones; `per` is `change` or `epoch` (a slope)."""

    label: str
    what: str
    unit: Unit
    per: str
    interval: Interval
    rows: tuple[str, ...]


@dataclass(frozen=True)
class CorrectedContrast:
    """An aside with its p-value corrected for the false discovery rate over all asides of the run."""

    label: str
    what: str
    unit: Unit
    per: str
    estimate: float | None
    low: float | None
    high: float | None
    p_raw: float | None
    p_corrected: float | None
    reason: str | None
    rows: tuple[str, ...]


def correct(asides: Sequence[SecondaryContrast]) -> list[CorrectedContrast]:
    """Benjamini-Hochberg over all asides of a run."""
    if not asides:
        return []
    raw = [np.nan if one.interval.p_two_sided is None else one.interval.p_two_sided for one in asides]
    corrected = benjamini_hochberg(raw).tolist()
    return [
        CorrectedContrast(
            one.label, one.what, one.unit, one.per, one.interval.estimate, one.interval.low, one.interval.high,
            one.interval.p_two_sided, None if np.isnan(p) else p, one.interval.reason, one.rows,
        )
        for one, p in zip(asides, corrected, strict=True)
    ]  # fmt: skip


def trend(label: str, by_epoch: Mapping[int, Series]) -> SecondaryContrast:
    """The assistant's slope over convergence epochs, in the measure's unit per epoch. Needs two epochs."""
    epochs = sorted(by_epoch)
    questions = union_of(list(by_epoch.values()))
    values = np.stack([means_at(by_epoch[epoch], questions) for epoch in epochs], axis=1)
    found: Contrast = trend_over_epochs(values, epochs)
    rows = tuple(row for epoch in epochs for row in by_epoch[epoch].rows)
    return SecondaryContrast(label, "trend of the assistant", by_epoch[epochs[0]].unit, "epoch", found.interval, rows)


def change_of(label: str, what: str, now: Series, base: Series) -> SecondaryContrast:
    """A plain paired change."""
    questions = union_of([now, base])
    found = paired_change(means_at(now, questions), means_at(base, questions))
    return SecondaryContrast(label, what, now.unit, "change", found.interval, (*now.rows, *base.rows))


def difference_of(label: str, what: str, quad: Quad) -> SecondaryContrast:
    """A difference-in-differences against the canary."""
    found = clustered_interval(quad.change(union_of(quad.series)))
    return SecondaryContrast(label, what, quad.now.unit, "change", found, quad.rows)
