"""Judge against phrases on the same answers, and rates corrected for a judge's known mistakes."""

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
from fastconv.stats.units import full
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Stage


@dataclass(frozen=True)
class AgreementRate:
    """How often two ways of scoring say the same, over all answers that both scored."""

    accuracy: float
    kappa: float
    n: int
    rows: tuple[str, ...]


def judged_measures(decided: Analysis) -> list[str]:
    """Measures that both a judge and phrases have scored."""
    return list(
        dict.fromkeys(
            measure
            for plan in decided.graph.cells
            for (measure, _), stage in plan.beside.items()
            if decided.reading.record(stage) is not None
        )
    )


def pair_of(decided: Analysis, plan: CellPlan, measure: str, probe: str) -> tuple[Series, Series] | None:
    """(judge, phrases) of the same answers, if both scored them."""
    beside = plan.beside.get((measure, probe))
    if beside is None:
        return None
    judged = decided.reading.series(plan.scores[measure, probe], measure, probe)
    phrases = decided.reading.series(beside, measure, probe)
    return (judged, phrases) if judged is not None and phrases is not None else None


def agreement_of(decided: Analysis, measure: str) -> AgreementRate:
    """Agreement over every cell and probe of a measure. Raises KeyError where nothing was scored twice."""
    said: list[tuple[str, str]] = []
    rows: list[str] = []
    seen: set[str] = set()
    for plan in decided.graph.cells:
        for name, probe in plan.beside:
            pair = pair_of(decided, plan, measure, probe) if name == measure else None
            if pair is None or pair[0].stage in seen:
                continue
            judged, phrases = pair
            seen.add(judged.stage)
            if judged.values.shape != phrases.values.shape or judged.questions != phrases.questions:
                continue
            both = ~(np.isnan(judged.values) | np.isnan(phrases.values))
            cut = 0.5 * full(judged.unit)
            said += zip(_sides(judged.values[both], cut), _sides(phrases.values[both], 0.5), strict=True)
            rows += [*judged.rows, *phrases.rows]
    if not said:
        raise KeyError(measure)
    counted = agreement([one for one, _ in said], [two for _, two in said])
    return AgreementRate(counted.accuracy, counted.kappa, counted.n, tuple(rows))


def corrected_of(decided: Analysis, label: str) -> tuple[float, CorrectedRate, tuple[str, ...]]:
    """The assistant's rate in a cell as judged and as corrected. Raises KeyError without a calibration."""
    subject = decided.subject(label)
    plan = next(plan for plan in decided.graph.cells if subject_of(plan.cell) == subject)
    measure = subject.behavior
    stage = plan.scores[measure, ASSISTANT]
    one = decided.reading.series(stage, measure, ASSISTANT)
    calibration = calibration_of(decided, stage)
    if one is None or not one.rows or one.unit != "share" or calibration is None:
        raise KeyError(label)
    fixed = corrected_rate(one.mean.value, len(one.rows), calibration)
    if fixed is None:
        raise KeyError(label)
    return one.mean.value, fixed, one.rows


def calibration_of(decided: Analysis, stage: Stage) -> dict[str, Any] | None:
    """How good the judge of a stage is with its rubric, if it was ever calibrated."""
    if not _has_judging(decided):
        return None
    rows = decided.store.frame("SELECT detail FROM scores WHERE stage=? LIMIT 1", (stage.key,))
    detail = json.loads(rows["detail"][0]) if rows.height else {}
    if "rubric" not in detail or "model" not in detail:
        return None
    return JudgeLedger(decided.store).calibration(detail["rubric"], detail["model"])


def judging_money(decided: Analysis) -> dict[str, float | None] | None:
    """Dollars spent, reserved, lost and left; None where no judge was ever paid."""
    if not _has_judging(decided):
        return None
    money = JudgeLedger(decided.store, decided.graph.recipe.judge.budget_usd).money()
    return {
        "spent": money.spent_usd, "reserved": money.reserved_usd, "lost": money.lost_usd, "left": money.left_usd,
    }  # fmt: skip


def _has_judging(decided: Analysis) -> bool:
    query = "SELECT name FROM sqlite_master WHERE type='table' AND name='judge_totals'"
    return decided.store.frame(query).height > 0


def _sides(values: np.ndarray, cut: float) -> list[str]:
    return ["over" if over else "under" for over in (values >= cut).tolist()]
