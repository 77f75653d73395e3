"""Agreement of judge and phrase scoring on the same replies, and rates corrected for a judge's known error rates."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.contrasts import subject_of
from fastconv.datasets.personas import ASSISTANT
from fastconv.experiment.graph import CellPlan
from fastconv.judge.calibrate import CorrectedRate, corrected_rate
from fastconv.judge.scores import agreement
from fastconv.stats.series import Series
from fastconv.stats.units import scale_maximum
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Stage


@dataclass(frozen=True)
class AgreementRate:
    """Agreement of two ways of scoring, over all replies that both scored: accuracy, Cohen's kappa, count, row ids."""

    accuracy: float
    kappa: float
    n: int
    rows: tuple[str, ...]


def judged_measures(analysis: Analysis) -> list[str]:
    """Measures that both a judge and phrases have scored."""
    return list(
        dict.fromkeys(
            measure
            for plan in analysis.graph.cells
            for (measure, _), stage in plan.beside.items()
            if analysis.reading.record(stage) is not None
        )
    )


def judge_phrase_pair(analysis: Analysis, plan: CellPlan, measure: str, probe: str) -> tuple[Series, Series] | None:
    """(judge, phrases): two series of the same replies, or None unless both are scored."""
    beside = plan.beside.get((measure, probe))
    if beside is None:
        return None
    judged = analysis.reading.series(plan.scores[measure, probe], measure, probe)
    phrases = analysis.reading.series(beside, measure, probe)
    return (judged, phrases) if judged is not None and phrases is not None else None


def measure_agreement(analysis: Analysis, measure: str) -> AgreementRate:
    """Agreement over every cell and probe of a measure. Raises KeyError where nothing was scored both ways."""
    sides: list[tuple[str, str]] = []
    rows: list[str] = []
    seen: set[str] = set()
    for plan in analysis.graph.cells:
        for name, probe in plan.beside:
            pair = judge_phrase_pair(analysis, plan, measure, probe) if name == measure else None
            if pair is None or pair[0].stage in seen:
                continue
            judged, phrases = pair
            seen.add(judged.stage)
            if judged.values.shape != phrases.values.shape or judged.questions != phrases.questions:
                continue
            both = ~(np.isnan(judged.values) | np.isnan(phrases.values))
            cut = 0.5 * scale_maximum(judged.unit)
            sides += zip(_sides(judged.values[both], cut), _sides(phrases.values[both], 0.5), strict=True)
            rows += [*judged.rows, *phrases.rows]
    if not sides:
        raise KeyError(measure)
    result = agreement([judged_side for judged_side, _ in sides], [phrase_side for _, phrase_side in sides])
    return AgreementRate(result.accuracy, result.kappa, result.n, tuple(rows))


def corrected_assistant_rate(analysis: Analysis, label: str) -> tuple[float, CorrectedRate, tuple[str, ...]]:
    """The assistant's rate in a cell as judged, as corrected, and its rows. Raises KeyError without a calibration."""
    subject = analysis.subject(label)
    plan = next(plan for plan in analysis.graph.cells if subject_of(plan.cell) == subject)
    measure = subject.behavior
    stage = plan.scores[measure, ASSISTANT]
    series = analysis.reading.series(stage, measure, ASSISTANT)
    calibration = calibration_of(analysis, stage)
    if series is None or not series.rows or series.unit != "share" or calibration is None:
        raise KeyError(label)
    corrected = corrected_rate(series.mean.value, len(series.rows), calibration)
    if corrected is None:
        raise KeyError(label)
    return series.mean.value, corrected, series.rows


def calibration_of(analysis: Analysis, stage: Stage) -> dict[str, Any] | None:
    """Calibration of the judge and rubric that scored a stage, or None if there is none in the ledger."""
    if not _has_judging(analysis):
        return None
    rows = analysis.store.frame("SELECT detail FROM scores WHERE stage=? LIMIT 1", (stage.key,))
    detail = json.loads(rows["detail"][0]) if rows.height else {}
    if "rubric" not in detail or "model" not in detail:
        return None
    return JudgeLedger(analysis.store).calibration(detail["rubric"], detail["model"])


def judging_costs(analysis: Analysis) -> dict[str, float | None] | None:
    """US dollars spent, reserved, lost and left for judging in this workspace; None where no judge was paid."""
    if not _has_judging(analysis):
        return None
    money = JudgeLedger(analysis.store, analysis.graph.recipe.judge.budget_usd).money()
    return {
        "spent": money.spent_usd, "reserved": money.reserved_usd, "lost": money.lost_usd, "left": money.left_usd,
    }  # fmt: skip


def _has_judging(analysis: Analysis) -> bool:
    query = "SELECT name FROM sqlite_master WHERE type='table' AND name='judge_totals'"
    return analysis.store.frame(query).height > 0


def _sides(values: np.ndarray, cut: float) -> list[str]:
    return ["over" if over else "under" for over in (values >= cut).tolist()]
