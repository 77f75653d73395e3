"""The verdict of each cell: transfer, reverse, equivalent, inconclusive or uninformative, with its reason.

Estimand (docs/DESIGN.md, section 6): the assistant's change against epoch 0, paired by question, minus the canary's
change, minus the same without a behavior adapter (mimicry) where the recipe has that control. Seeds of one cell are
averaged within a question. With three seeds or more, the interval over their means must not contradict a change, and it
sets the confidence. `verdict` is the rule for one cell; `decide` applies it to a family of declared contrasts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from fastconv.seeding import seed_of
from fastconv.stats.bounds import RateBound, clustered_rate_bound, effective_sample_size, sign_flip_p, sign_flip_warning
from fastconv.stats.inference import (
    FEWEST_SEEDS,
    ROUNDING,
    Arm,
    Confidence,
    Equivalence,
    Interval,
    SeedPool,
    clustered_interval,
    confidence_level,
    difference_in_differences,
    holm,
    mean_present,
    pool_seeds,
    seeds_against,
    tost,
    transfer_contrast,
)
from fastconv.stats.power import (
    SampleSizeNeeded,
    clusters_needed,
    minimum_detectable_effect,
    samples_needed,
    seeds_needed,
)
from fastconv.stats.series import Floats, Series, all_questions, pooled_rates, question_means
from fastconv.stats.units import Unit, change, interval_text, scale_maximum, size_text

#: Random sign patterns of the sign-flip check: enough for its smallest p-value to lie well under the corrected level.
DRAWS_PER_CONTRAST, FEWEST_DRAWS, MOST_DRAWS = 40, 2_000, 10_000


@dataclass(frozen=True, slots=True)
class Evidence:
    """Input of the verdict rule for one cell.

    `direction` is -1 where leakage lowers the measure (accuracy, alignment), else +1. `contrast` is the transfer
    contrast, `p_corrected` its Holm-corrected t p-value, `equivalence` its TOST with the threshold as margin; all in
    the measure's `unit`. `bound_base` and `bound_now` are the assistant's rate bounds, scaled to 0..1, or None. The two
    bools are None when nothing was measured, which counts as not shown. `seeds` pools the seeds' estimates of the
    contrast.
    """

    direction: Literal[-1, 1]
    contrast: Interval
    p_corrected: float | None
    equivalence: Equivalence
    measurable_at_base: bool | None
    source_shows_behavior: bool | None
    bound_base: RateBound | None = None
    bound_now: RateBound | None = None
    p_sign_flip_corrected: float | None = None
    alpha: float = 0.05
    unit: Unit = "share"
    seeds: SeedPool | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """One of five kinds and the sentence that explains it."""

    kind: Literal["transfer", "reverse", "equivalent", "inconclusive", "uninformative"]
    reason: str


def verdict(evidence: Evidence) -> Verdict:
    """Apply the rule of section 6: first whether the cell is informative at all, then its kind.

    A change that TOST shows to lie within the threshold is *equivalent* even where its p-value is small, and the reason
    says both: the threshold is the smallest effect declared to matter (Lakens 2017, SPPS 8:355). A change that is clear
    of zero over questions but not over seeds is *inconclusive*: the interval over questions is conditional on these
    seeds.

    Raises ValueError for evidence that contradicts itself.
    """
    _check_evidence(evidence)
    uninformative = _why_uninformative(evidence)
    if uninformative is not None:
        return Verdict("uninformative", uninformative)
    contrast, margin = evidence.contrast, size_text(evidence.equivalence.margin, evidence.unit)
    if contrast.estimate is None or contrast.low is None or contrast.high is None:
        return _verdict_without_interval(evidence)
    figures = f"{change(contrast.estimate, evidence.unit)} {interval_text(contrast.low, contrast.high, evidence.unit)}"
    significant = evidence.p_corrected is not None and evidence.p_corrected <= evidence.alpha
    if evidence.equivalence.equivalent:
        aside = "; it differs from zero, by less than declared to matter" if significant else ""
        return Verdict("equivalent", f"the change {figures} lies within the margin of {margin}{aside}")
    if evidence.p_corrected is None:
        return Verdict("inconclusive", f"the change {figures} has no corrected p-value")
    if not significant:
        reason = f"the change {figures} is neither clear of zero (corrected p = {evidence.p_corrected:.3g})"
        return Verdict("inconclusive", f"{reason} nor within the margin of {margin}")
    against = None if evidence.seeds is None else seeds_against(evidence.seeds)
    if against is not None:
        clear = f"is clear of zero over questions (corrected p = {evidence.p_corrected:.3g})"
        return Verdict("inconclusive", f"the change {figures} {clear} and not over seeds: {against}")
    check = evidence.p_sign_flip_corrected
    disagrees = check is not None and check > evidence.alpha
    aside = f"; the sign-flip check disagrees (p = {check:.3g})" if disagrees else ""
    with_leakage = contrast.estimate * evidence.direction > 0
    side = "in the direction of" if with_leakage else "against the direction of"
    reason = f"the change {figures} goes {side} leakage (corrected p = {evidence.p_corrected:.3g}){aside}"
    return Verdict("transfer" if with_leakage else "reverse", reason)


def _why_uninformative(evidence: Evidence) -> str | None:
    if evidence.measurable_at_base is None:
        return "nothing shows that the behavior is measurable at base: it was not measured there"
    if not evidence.measurable_at_base:
        return "the behavior is not measurable at base"
    extreme, room = _shared_extreme(evidence)
    if room is not None and room > evidence.equivalence.margin / scale_maximum(evidence.unit):
        return (
            f"both epochs are at the {extreme}, where the truth may still lie {_distance(room, evidence.unit)} away, "
            f"more than the margin of {size_text(evidence.equivalence.margin, evidence.unit)}"
        )
    if evidence.source_shows_behavior is None:
        return "nothing shows that the behavior was learned: the source was not measured"
    return None if evidence.source_shows_behavior else "the source itself does not show the trained behavior"


def _shared_extreme(evidence: Evidence) -> tuple[str | None, float | None]:
    """The extreme at which both epochs lie and the wider of their bounds; None for floor to ceiling."""
    base, now = evidence.bound_base, evidence.bound_now
    if base is None or now is None or base.extreme != now.extreme or base.room is None or now.room is None:
        return None, None
    return base.extreme, max(base.room, now.room)


def _verdict_without_interval(evidence: Evidence) -> Verdict:
    extreme, room = _shared_extreme(evidence)
    contrast, margin = evidence.contrast, evidence.equivalence.margin
    no_spread = contrast.se == 0 and contrast.estimate is not None and abs(contrast.estimate) <= margin
    if room is not None and no_spread:
        reason = f"both epochs are at the {extreme} and the truth lies within {_distance(room, evidence.unit)} of it"
        return Verdict("equivalent", f"{reason}, inside the margin of {size_text(margin, evidence.unit)}")
    return Verdict("inconclusive", f"no interval: {contrast.reason}")


def _distance(share: float, unit: Unit) -> str:
    """A share of the measure's whole scale in the measure's unit: 5.8 %, 5.8 points."""
    return f"{100 * share:.1f} {'%' if unit == 'share' else 'points'}"


def _check_evidence(evidence: Evidence) -> None:
    if evidence.direction not in (-1, 1):
        raise ValueError(f"direction must be -1 or +1, not {evidence.direction}")
    if not 0 < evidence.alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, not {evidence.alpha}")
    if evidence.equivalence.interval.estimate != evidence.contrast.estimate:
        raise ValueError("the equivalence test and the interval belong to different contrasts")
    corrected, raw = evidence.p_corrected, evidence.contrast.p_two_sided
    least = 0.0 if raw is None else raw * (1 - ROUNDING)
    if corrected is not None and not least <= corrected <= 1:
        raise ValueError(f"a corrected p lies between the raw p ({raw}) and 1, not at {corrected}")


@dataclass(frozen=True, eq=False)
class Quad:
    """The four series of a difference-in-differences: assistant and canary, now and at epoch 0."""

    now: Series
    base: Series
    canary_now: Series
    canary_base: Series

    @property
    def series(self) -> tuple[Series, Series, Series, Series]:
        """All four."""
        return self.now, self.base, self.canary_now, self.canary_base

    @property
    def rows(self) -> tuple[str, ...]:
        """Ids of the rows behind all four."""
        return tuple(row for series in self.series for row in series.evidence_rows)

    def arm(self, questions: Sequence[str]) -> Arm:
        """Question means at these questions."""
        return Arm(*(question_means(series, questions) for series in self.series))

    def change(self, questions: Sequence[str]) -> Floats:
        """The assistant's change minus the canary's, per question."""
        arm = self.arm(questions)
        return difference_in_differences(arm.now, arm.base, arm.canary_now, arm.canary_base).per_question


@dataclass(frozen=True, eq=False)
class SeedEvidence:
    """One seed's series; `mimicry` is None where the control was not run."""

    seed: int
    trained: Quad
    mimicry: Quad | None = None

    def transfer(self, questions: Sequence[str]) -> Floats:
        """The seed's contrast per question."""
        if self.mimicry is None:
            return self.trained.change(questions)
        return transfer_contrast(self.trained.arm(questions), self.mimicry.arm(questions)).per_question


@dataclass(frozen=True, eq=False)
class CellEvidence:
    """All measurements behind a cell's verdict. `withheld` is the reason, if any, to give none."""

    label: str
    behavior: str
    direction: Literal[-1, 1]
    margin: float
    seeds: tuple[SeedEvidence, ...]
    source_shows: bool | None
    unit: Unit = "share"
    withheld: str | None = None
    measurable: bool | None = True

    @property
    def questions(self) -> tuple[str, ...]:
        """All questions of any seed's series."""
        return all_questions([series for seed in self.seeds for series in seed.trained.series])

    @property
    def rows(self) -> tuple[str, ...]:
        """Ids of the rows that the verdict rests on."""
        quads = [quad for seed in self.seeds for quad in (seed.trained, seed.mimicry) if quad is not None]
        return tuple(dict.fromkeys(row for quad in quads for row in quad.rows))


@dataclass(frozen=True)
class CellVerdict:
    """A cell's verdict and every figure computed for it; None where not estimable. Effects are in the measure's unit.

    `kind` is one of the five of `Verdict`, or `withheld` where no verdict is allowed. `mimicry` and `trained` are the
    difference-in-differences without and with the behavior adapter, `detectable` the minimum detectable effect at this
    spread and number of questions (`detectable_in_family` at the first step of Holm), `mend` the sample sizes that
    bring it down to the margin. `over_seeds` is the t interval over the means of three seeds or more.
    """

    label: str
    kind: str
    reason: str
    estimate: float | None
    low: float | None
    high: float | None
    p_corrected: float | None
    rows: tuple[str, ...]
    behavior: str = ""
    unit: Unit = "share"
    margin: float | None = None
    p_raw: float | None = None
    p_sign_flip: float | None = None
    sign_flip_warning: str | None = None
    confidence: Confidence = field(default_factory=lambda: Confidence("LOW", "nothing was estimated"))
    trained: Interval | None = None
    mimicry: Interval | None = None
    bound: float | None = None
    n_questions: int = 0
    n_effective: float | None = None
    n_seeds: int = 0
    detectable: float | None = None
    detectable_in_family: float | None = None
    mend: tuple[SampleSizeNeeded, ...] = ()
    over_seeds: Interval | None = None

    def body(self) -> dict[str, object]:
        """JSON form: figures and the number of rows behind them."""
        plain = {name: getattr(self, name) for name in (
            "label", "behavior", "kind", "reason", "unit", "margin", "estimate", "low", "high", "p_raw", "p_corrected",
            "p_sign_flip", "bound", "n_questions", "n_effective", "n_seeds", "detectable", "detectable_in_family",
        )}  # fmt: skip
        low, high = (None, None) if self.over_seeds is None else (self.over_seeds.low, self.over_seeds.high)
        return {
            **plain,
            "seeds_low": low,
            "seeds_high": high,
            "confidence": self.confidence.level,
            "n_rows": len(self.rows),
        }


def decide(cells: Sequence[CellEvidence], n_declared: int | None = None) -> list[CellVerdict]:
    """Verdicts of the measured contrasts of a family of `n_declared`, with t and sign-flip p-values Holm-corrected.

    A declared contrast without a p-value still counts in m, so that m, and every figure that depends on it, stays the
    same from the first measurement of a run to the last. Without `n_declared` the family is `cells`. Raises ValueError
    if there are more cells than declared.
    """
    m = len(cells) if n_declared is None else n_declared
    if m < len(cells):
        raise ValueError(f"{len(cells)} contrasts of a family of {m}")
    if not cells:
        return []
    contrasts = [_per_question(cell) for cell in cells]
    intervals = [clustered_interval(contrast) for contrast in contrasts]
    corrected = _in_family([interval.p_two_sided for interval in intervals], m)
    n_draws = min(MOST_DRAWS, max(FEWEST_DRAWS, DRAWS_PER_CONTRAST * m))
    flips: list[float | None] = []
    for cell, contrast in zip(cells, contrasts, strict=True):
        rng = np.random.default_rng(seed_of("sign flips", cell.label))
        flips.append(sign_flip_p(contrast, n_draws, rng).p)
    return [
        _decide(cell, contrast, interval, p, check, m)
        for cell, contrast, interval, p, check in zip(
            cells, contrasts, intervals, corrected, _in_family(flips, m), strict=True
        )
    ]


def _in_family(p: Sequence[float | None], m: int) -> list[float | None]:
    """Holm's adjusted p-values of these among m declared; the others count as not estimable, which is as 1."""
    declared = np.full(m, np.nan)
    declared[: len(p)] = [_or_nan(value) for value in p]
    return [None if np.isnan(value) else value for value in holm(declared)[: len(p)].tolist()]


def untrained_verdict(label: str, reason: str, rows: tuple[str, ...], behavior: str = "") -> CellVerdict:
    """An `uninformative` verdict for a cell that was not trained because its behavior is not measurable."""
    return CellVerdict(label, "uninformative", reason, None, None, None, None, rows, behavior)


def withheld_verdict(label: str, reason: str, rows: tuple[str, ...], behavior: str = "") -> CellVerdict:
    """A verdict of kind `withheld` with its reason and without figures."""
    return CellVerdict(label, "withheld", reason, None, None, None, None, rows, behavior)


def count_by_kind(verdicts: Sequence[CellVerdict]) -> Mapping[str, int]:
    """Number of verdicts of each kind."""
    return Counter(verdict.kind for verdict in verdicts)


def _per_question(cell: CellEvidence) -> Floats:
    """The contrast per question, averaged over the seeds that have it."""
    questions = cell.questions
    return _mean_over_seeds([seed.transfer(questions) for seed in cell.seeds])


def _mean_over_seeds(per_seed: Sequence[Floats]) -> Floats:
    return mean_present(np.stack(per_seed), axis=0)


def _decide(
    cell: CellEvidence, contrast: Floats, interval: Interval, corrected: float | None, check: float | None, m: int
) -> CellVerdict:
    if cell.withheld is not None:
        return replace(
            withheld_verdict(cell.label, cell.withheld, cell.rows, cell.behavior),
            unit=cell.unit, margin=cell.margin, n_questions=interval.n_clusters, n_seeds=len(cell.seeds),
        )  # fmt: skip
    now = pooled_rates([seed.trained.now for seed in cell.seeds])
    base = pooled_rates([seed.trained.base for seed in cell.seeds])
    bound_now = clustered_rate_bound(now)
    questions = cell.questions
    estimates = [_or_nan(clustered_interval(seed.transfer(questions)).estimate) for seed in cell.seeds]
    seeds = pool_seeds(estimates)
    decision = verdict(Evidence(
        direction=cell.direction, contrast=interval, p_corrected=corrected, equivalence=tost(contrast, cell.margin),
        measurable_at_base=cell.measurable, source_shows_behavior=cell.source_shows,
        bound_base=clustered_rate_bound(base), bound_now=bound_now, p_sign_flip_corrected=check, unit=cell.unit, seeds=seeds,
    ))  # fmt: skip
    with_control = all(seed.mimicry is not None for seed in cell.seeds)
    aside = "" if with_control else "; mimicry was not measured"
    cell_verdict = CellVerdict(
        cell.label, decision.kind, decision.reason + aside, interval.estimate, interval.low, interval.high, corrected,
        cell.rows, cell.behavior, cell.unit, cell.margin,
        p_raw=interval.p_two_sided,
        p_sign_flip=check,
        sign_flip_warning=sign_flip_warning(interval.n_clusters, m) if interval.n_clusters else None,
        confidence=confidence_level(seeds, interval),
        trained=clustered_interval(_mean_over_seeds([seed.trained.change(questions) for seed in cell.seeds])),
        mimicry=_mimicry(cell) if with_control else None,
        bound=bound_now.room * scale_maximum(cell.unit) if bound_now.room is not None else None,
        n_questions=interval.n_clusters,
        n_effective=effective_sample_size(now).n_effective,
        n_seeds=len(cell.seeds),
        over_seeds=seeds.interval if seeds.n_seeds >= FEWEST_SEEDS else None,
    )  # fmt: skip
    return _with_power(cell_verdict, cell, contrast, estimates, m)


def _mimicry(cell: CellEvidence) -> Interval:
    questions = cell.questions
    return clustered_interval(
        _mean_over_seeds([seed.mimicry.change(questions) for seed in cell.seeds if seed.mimicry is not None])
    )


def _with_power(
    result: CellVerdict, cell: CellEvidence, contrast: Floats, by_seed: Sequence[float], m: int
) -> CellVerdict:
    """Add the minimum detectable effect at this spread, and the sample sizes that bring it down to the margin."""
    present = contrast[~np.isnan(contrast)]
    if present.size < 2:
        return result
    spread = float(present.std(ddof=1))
    alone = minimum_detectable_effect(spread, present.size)
    mend: list[SampleSizeNeeded] = []
    if alone.effect is not None and alone.effect > cell.margin:
        mend.append(clusters_needed(cell.margin, spread))
        noise = _sampling_sd(cell)
        own = max(0.0, spread**2 - noise**2) ** 0.5
        n_samples = min(seed.trained.now.values.shape[1] for seed in cell.seeds)
        if n_samples > 1:
            mend.append(samples_needed(cell.margin, own, noise * n_samples**0.5, present.size))
        over_seeds = np.array(by_seed)[~np.isnan(by_seed)]
        if over_seeds.size > 1:
            mend.append(seeds_needed(cell.margin, float(over_seeds.std(ddof=1))))
    return replace(
        result,
        detectable=alone.effect,
        detectable_in_family=minimum_detectable_effect(spread, present.size, 0.05 / m).effect,
        mend=tuple(mend),
    )


def _sampling_sd(cell: CellEvidence) -> float:
    """The part of the contrast's standard deviation between questions that more samples would shrink."""
    total = 0.0
    for seed in cell.seeds:
        for quad in (seed.trained, seed.mimicry):
            for series in quad.series if quad is not None else ():
                within = effective_sample_size(series.values).sd_sample or 0.0
                total += within**2 / series.values.shape[1]
    return (total / len(cell.seeds) ** 2) ** 0.5


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
