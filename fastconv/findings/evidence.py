"""Numbers that carry the rows they came from. Nothing else may be printed in a report or decide a gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastconv.findings.stats import question_means
from fastconv.store import Score


class NoRowsError(ValueError):
    """A number was asked for that no row supports."""


@dataclass(frozen=True, slots=True)
class Number:
    """A value with its unit and the ids of the rows behind it (`stage/row`). It cannot be made without rows."""

    value: float
    unit: str
    rows: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise NoRowsError(f"{self.value!r} {self.unit} has no rows behind it")

    def text(self, digits: int = 3) -> str:
        """The number as people read it; shares as percent."""
        return f"{100 * self.value:.1f} %" if self.unit == "share" else f"{self.value:.{digits}g} {self.unit}".rstrip()


@dataclass(frozen=True, eq=False)
class Series:
    """One measure of one stack under one probe: values [questions, samples], NaN where nothing was scored.

    Questions are in id order, so the series of two epochs are paired by position.
    """

    stage: str
    measure: str
    probe: str
    questions: tuple[str, ...]
    values: NDArray[np.float64]

    @property
    def means(self) -> NDArray[np.float64]:
        """Mean per question over its samples that were scored, [questions]; NaN where none was."""
        n_samples = self.values.shape[1]
        index = np.repeat(np.arange(len(self.questions)), n_samples)
        return question_means(self.values.ravel(), index, len(self.questions)).means

    @property
    def n_samples(self) -> int:
        """Samples asked for."""
        return self.values.size

    @property
    def n_unscored(self) -> int:
        """Samples without a score, each with its reason in the ledger."""
        return int(np.isnan(self.values).sum())

    @property
    def rows(self) -> tuple[str, ...]:
        """Ids of the rows behind the series, one per question with a score."""
        scored = ~np.isnan(self.means)
        return tuple(f"{self.stage[:12]}/{q}" for q, kept in zip(self.questions, scored, strict=True) if kept)

    @property
    def mean(self) -> Number:
        """Mean over questions of the questions' means. Raises NoRowsError if nothing was scored."""
        rows = self.rows
        return Number(float(np.nanmean(self.means)) if rows else float("nan"), "share", rows)


def series_of(stage: str, measure: str, probe: str, scores: Sequence[Score]) -> Series:
    """Collect a stage's scores; missing values stay missing. Raises NoRowsError if the stage has none."""
    if not scores:
        raise NoRowsError(f"stage {stage[:12]} ({measure}, {probe}) has no scores")
    questions = sorted({score.row for score in scores})
    index = {question: place for place, question in enumerate(questions)}
    values = np.full((len(questions), 1 + max(score.sample for score in scores)), np.nan)
    for score in scores:
        if score.value is not None:
            values[index[score.row], score.sample] = score.value
    return Series(stage, measure, probe, tuple(questions), values)
