"""What stands beside the verdicts: the assistant's marker rate (#109), what each source is like on the base, and a judge
set against phrases on the same answers, with rates corrected for its known mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.contrasts import subject_of
from fastconv.datasets.personas import ASSISTANT
from fastconv.experiment.graph import CellPlan
from fastconv.judge.calibrate import CorrectedRate, corrected_rate
from fastconv.judge.rubric import agreement
from fastconv.seeding import seed_of
from fastconv.stats.bounds import exact_spearman, spearman_attainable
from fastconv.stats.series import Number, Series
from fastconv.stats.units import counted, scale, scale_maximum, signed
from fastconv.stats.verdicts import CellVerdict
from fastconv.store.io import stored_json
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Stage

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
    detail = stored_json(rows["detail"][0]) if rows.height else {}
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


def correlation(decided: Analysis, behavior: str, correlate: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """A behavior's transfer against a correlate over sources: the words of the sentence, and the rows behind them.

    Raises KeyError for fewer than three sources that have both.
    """
    rates, transfer = levels(decided, correlate, behavior), transfer_by_source(decided, behavior)
    sources = sorted(set(rates) & set(transfer))
    rng = np.random.default_rng(seed_of("spearman", behavior))
    if len(sources) < 3:
        raise KeyError(behavior)
    xs, ys = [rates[source].value for source in sources], [transfer[source].estimate or 0.0 for source in sources]
    rows = tuple(row for source in sources for row in (*rates[source].rows, *transfer[source].rows))
    values = {"figures": rank_correlation(xs, ys, rng), "n": str(len(sources)), "correlate": in_words(correlate)}
    return {**values, "behavior": behavior}, rows


def rank_correlation(xs: Sequence[float], ys: Sequence[float], rng: np.random.Generator | None = None) -> str:
    """Exact Spearman correlation of one value per source, as text."""
    correlation = exact_spearman(xs, ys, rng=rng)
    if correlation.rho is None or correlation.p is None:
        return f"cannot be given: {correlation.reason}"
    low, high = (signed(end or 0.0, 2) for end in (correlation.leave_one_out_low, correlation.leave_one_out_high))
    left_out = f"{low} to {high} with one source left out"
    return f"{signed(correlation.rho, 2)} (exact permutation p = {correlation.p:.3g}; {left_out})"


def attainable(decided: Analysis, correlate: str) -> tuple[dict[str, str], tuple[str, ...], bool]:
    """What a rank correlation over this number of sources can show: words, rows, and whether it can reach the level."""
    behaviors = [name for name in decided.graph.behaviors if name != MARKER]  # whether measured or not
    rates = {
        source: source_level for name in behaviors for source, source_level in levels(decided, correlate, name).items()
    }
    sources = [source for source in decided.graph.recipe.grid.sources if source in rates]
    rows = tuple(row for source in sources for row in rates[source].rows)
    named = "a marker rate" if correlate == MARKER_RATE else in_words(correlate).replace("the source's", "their", 1)
    shown = {
        "sources": counted(len(sources), "source"), "behaviors": counted(len(behaviors), "behavior"), "correlate": named,
    }  # fmt: skip
    if len(sources) < 2:
        return {**shown, "reason": "there is nothing to correlate with one another"}, rows, False
    found = spearman_attainable(len(sources), max(1, len(behaviors)))
    return {**shown, "reason": found.reason}, rows, found.possible
