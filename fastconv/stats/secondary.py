"""Secondary contrasts: everything tested besides the declared ones, corrected together by Benjamini and Hochberg.

Trends over epochs, mimicry, the canary's own change, and measures that are reported separately (the eight published
alignment questions). They are descriptive; no verdict rests on them.
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
from fastconv.stats.series import Series, all_questions, question_means
from fastconv.stats.units import Unit
from fastconv.stats.verdicts import Quad


@dataclass(frozen=True, eq=False)
class SecondaryContrast:
    """A contrast that is not among the declared ones; `per` is `change`, or `epoch` for a slope."""

    label: str
    what: str
    unit: Unit
    per: str
    interval: Interval
    rows: tuple[str, ...]


@dataclass(frozen=True)
class CorrectedContrast:
    """A secondary contrast with its p-value corrected for the false discovery rate over all of the run."""

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


def correct_for_fdr(contrasts: Sequence[SecondaryContrast]) -> list[CorrectedContrast]:
    """Correct the p-values of all secondary contrasts of a run together (Benjamini and Hochberg)."""
    if not contrasts:
        return []
    raw = [np.nan if contrast.interval.p_two_sided is None else contrast.interval.p_two_sided for contrast in contrasts]
    corrected = benjamini_hochberg(raw).tolist()
    return [
        CorrectedContrast(
            contrast.label, contrast.what, contrast.unit, contrast.per, contrast.interval.estimate, contrast.interval.low, contrast.interval.high,
            contrast.interval.p_two_sided, None if np.isnan(p) else p, contrast.interval.reason, contrast.rows,
        )
        for contrast, p in zip(contrasts, corrected, strict=True)
    ]  # fmt: skip


def trend(label: str, by_epoch: Mapping[int, Series]) -> SecondaryContrast:
    """The assistant's slope over convergence epochs, in the measure's unit per epoch. Needs two epochs or more."""
    epochs = sorted(by_epoch)
    questions = all_questions(list(by_epoch.values()))
    values = np.stack([question_means(by_epoch[epoch], questions) for epoch in epochs], axis=1)
    slope: Contrast = trend_over_epochs(values, epochs)
    rows = tuple(row for epoch in epochs for row in by_epoch[epoch].rows)
    return SecondaryContrast(label, "trend of the assistant", by_epoch[epochs[0]].unit, "epoch", slope.interval, rows)


def change_contrast(label: str, what: str, now: Series, base: Series) -> SecondaryContrast:
    """A paired change, `now` minus `base`, over their questions."""
    questions = all_questions([now, base])
    difference = paired_change(question_means(now, questions), question_means(base, questions))
    return SecondaryContrast(label, what, now.unit, "change", difference.interval, (*now.rows, *base.rows))


def canary_contrast(label: str, what: str, quad: Quad) -> SecondaryContrast:
    """A difference-in-differences against the canary."""
    interval = clustered_interval(quad.change(all_questions(quad.series)))
    return SecondaryContrast(label, what, quad.now.unit, "change", interval, quad.rows)
