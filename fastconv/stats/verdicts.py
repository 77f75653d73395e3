"""The verdict of each cell: transfer, reverse, generic, equivalent, inconclusive or uninformative, with its reason.

Estimand (docs/DESIGN.md, section 6): the assistant's change against epoch 0, paired by question, minus the canary's
change, minus the same without a behavior adapter (mimicry) where the recipe has that control. Seeds of one cell are
averaged within a question. An interval holds the noise from run to run beside that over questions: the spread of three
seeds or more, else the declared one (`power.declared_spread`). From three seeds on a word needs the test over seeds too.
`verdict` is the rule for one cell; `decide` applies it to a family of declared contrasts.
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
    Confidence,
    Equivalence,
    Interval,
    SeedPool,
    clustered_interval,
    confidence_level,
    equivalence,
    holm,
    mean_present,
    over_runs,
    pool_seeds,
    seeds_against,
)
from fastconv.stats.power import (
    RunSpread,
    SampleSizeNeeded,
    clusters_needed,
    minimum_detectable_effect,
    run_variance,
    samples_needed,
    seeds_needed,
    unshared_variance,
)
from fastconv.stats.series import CellEvidence, Floats, Quad, SeedEvidence, pooled_rates
from fastconv.stats.units import Unit, change, interval_text, scale_maximum, size_text

__all__ = [
    "CellEvidence", "CellVerdict", "Evidence", "Quad", "SeedEvidence", "Verdict",
    "count_by_kind", "decide", "untrained_verdict", "verdict", "withheld_verdict",
]  # fmt: skip

#: Random sign patterns of the sign-flip check: enough for its smallest p-value to lie well under the corrected level.
DRAWS_PER_CONTRAST, FEWEST_DRAWS, MOST_DRAWS = 40, 2_000, 10_000


@dataclass(frozen=True, slots=True)
class Evidence:
    """Input of the verdict rule for one cell.

    `direction` is -1 where leakage lowers the measure (accuracy, alignment), else +1. `contrast` is the transfer
    contrast, `p_corrected` its Holm-corrected t p-value, `equivalence` its TOST with the threshold as margin; all in
    the measure's `unit`. `bound_base` and `bound_now` are the assistant's rate bounds, scaled to 0..1, or None. The two
    bools are None when nothing was measured, which counts as not shown. `seeds` pools the seeds' estimates of the
    contrast. `assistant` and `canary` are their own changes against epoch 0; None leaves whose movement it was unasked.
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
    assistant: Interval | None = None
    canary: Interval | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """One of six kinds and the sentence that explains it."""

    kind: Literal["transfer", "reverse", "generic", "equivalent", "inconclusive", "uninformative"]
    reason: str


def verdict(evidence: Evidence) -> Verdict:
    """Apply the rule of section 6: first whether the cell is informative at all, then its kind.

    A change that TOST shows to lie within the threshold is *equivalent* even where its p-value is small, and the reason
    says both: the threshold is the smallest effect declared to matter (Lakens 2017, SPPS 8:355). A change that is clear
    of zero over questions but not over seeds is *inconclusive*: the interval over questions is conditional on these
    seeds; nor is anything *equivalent* whose interval over seeds leaves the margin. *transfer* and *reverse* are said of
    the assistant, so its own change must go the same way; where the canary moves as much or more, it is *generic*.

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
    if (generic := _why_generic(evidence, significant=significant)) is not None:
        return Verdict("generic", generic)
    beyond = _seeds_beyond_margin(evidence)
    if evidence.equivalence.equivalent and not beyond:
        aside = "; it differs from zero, by less than declared to matter" if significant else ""
        return Verdict("equivalent", f"the change {figures} lies within the margin of {margin}{aside}")
    if evidence.p_corrected is None:
        return Verdict("inconclusive", f"the change {figures} has no corrected p-value")
    if not significant:
        reason = f"the change {figures} is neither clear of zero (corrected p = {evidence.p_corrected:.3g})"
        return Verdict("inconclusive", f"{reason} nor within the margin of {margin}{beyond}")
    against = None if evidence.seeds is None else seeds_against(evidence.seeds)
    if against is not None:
        clear = f"is clear of zero over questions (corrected p = {evidence.p_corrected:.3g})"
        return Verdict("inconclusive", f"the change {figures} {clear} and not over seeds: {against}")
    check = evidence.p_sign_flip_corrected
    disagrees = check is not None and check > evidence.alpha
    aside = f"; the sign-flip check disagrees (p = {check:.3g})" if disagrees else ""
    with_leakage = contrast.estimate * evidence.direction > 0
    own = evidence.assistant
    if own is not None and not _moves(own, 1 if contrast.estimate > 0 else -1):
        return Verdict(
            "inconclusive",
            f"the difference {figures} is not the assistant's own movement, which is {_figures(own, evidence.unit)}",
        )
    side = "in the direction of" if with_leakage else "against the direction of"
    reason = f"the change {figures} goes {side} leakage (corrected p = {evidence.p_corrected:.3g}){aside}"
    return Verdict("transfer" if with_leakage else "reverse", reason)


def _moves(interval: Interval, direction: int) -> bool:
    """Whether a change is clear of zero in a direction (+1 or -1), uncorrected."""
    end = interval.low if direction > 0 else interval.high
    return end is not None and end * direction > 0


def _figures(interval: Interval, unit: Unit) -> str:
    """An estimate with its interval."""
    if interval.estimate is None:
        return "not known"
    return f"{change(interval.estimate, unit)} {interval_text(interval.low, interval.high, unit)}".rstrip()


def _why_generic(evidence: Evidence, *, significant: bool) -> str | None:
    """Why the change is generic: the canary moves with leakage too, as much as the assistant (within the margin) or more.

    The canary's change is clear of zero and no smaller than the margin, the assistant's goes the same way, and the
    difference is no transfer. Either the assistant's change is clear as well, or the canary's is clearly the larger.
    """
    own, canary, toward = evidence.assistant, evidence.canary, evidence.direction
    estimates = [None if moved is None else moved.estimate for moved in (own, canary, evidence.contrast)]
    if own is None or canary is None or None in estimates:
        return None
    ours, its, difference = (toward * (value or 0.0) for value in estimates)
    margin = evidence.equivalence.margin
    both = _moves(own, toward) and ours >= margin
    clear = significant and difference < 0
    if not (_moves(canary, toward) and its >= margin and 0 < ours <= its + margin):
        return None
    if not (both or clear) or (significant and difference > 0):
        return None
    return (
        f"the canary moved with leakage as much or more: {_figures(canary, evidence.unit)} against the assistant's "
        f"{_figures(own, evidence.unit)}"
    )


def _seeds_beyond_margin(evidence: Evidence) -> str:
    """That the interval over three seeds or more leaves the margin; empty where it does not, or there is none."""
    pool, margin = evidence.seeds, evidence.equivalence.margin
    if pool is None or pool.n_seeds < FEWEST_SEEDS or pool.interval.low is None or pool.interval.high is None:
        return ""
    if max(-pool.interval.low, pool.interval.high) <= margin:
        return ""
    over = interval_text(pool.interval.low, pool.interval.high, evidence.unit)
    return f" (over {pool.n_seeds} seeds {over})"


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
    if room is not None and no_spread and evidence.equivalence.equivalent is not False:
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


@dataclass(frozen=True)
class CellVerdict:
    """A cell's verdict and every figure computed for it; None where not estimable. Effects are in the measure's unit.

    `kind` is one of the six of `Verdict`, or `withheld` where no verdict is allowed. `low`, `high` and the p-values hold
    the noise from run to run (`run_spread`, of one trained cell); `over_questions` is the interval for this run alone.
    `assistant` and `canary` are their own changes against epoch 0, `mimicry` and `trained` the
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
    over_questions: Interval | None = None
    assistant: Interval | None = None
    canary: Interval | None = None
    run_spread: RunSpread | None = None

    @property
    def runs_text(self) -> str:
        """What stands for the noise from run to run, with its size and origin; empty without a figure."""
        spread = self.run_spread
        return "" if spread is None else f"run-to-run SD {size_text(spread.sd, self.unit)}, {spread.origin}"

    def body(self) -> dict[str, object]:
        """JSON form: figures and the number of rows behind them."""
        plain = {name: getattr(self, name) for name in (
            "label", "behavior", "kind", "reason", "unit", "margin", "estimate", "low", "high", "p_raw", "p_corrected",
            "p_sign_flip", "bound", "n_questions", "n_effective", "n_seeds", "detectable", "detectable_in_family",
        )}  # fmt: skip
        ends = {
            f"{name}_{end}": getattr(interval, end, None)
            for name, interval in (("seeds", self.over_seeds), ("questions", self.over_questions))
            for end in ("low", "high")
        }
        moved = {
            f"{name}_change": None if interval is None else interval.estimate
            for name, interval in (("assistant", self.assistant), ("canary", self.canary), ("mimicry", self.mimicry))
        }
        return {
            **plain,
            **ends,
            **moved,
            "run_sd": None if self.run_spread is None else self.run_spread.sd,
            "run_sd_origin": None if self.run_spread is None else self.run_spread.origin,
            "confidence": self.confidence.level,
            "n_rows": len(self.rows),
        }


def decide(cells: Sequence[CellEvidence], n_declared: int | None = None) -> list[CellVerdict]:
    """Verdicts of the measured contrasts of a family of `n_declared`; all p-values are Holm-corrected in it.

    Three corrections: the t tests of a change, the sign flips, and the equivalence tests. A declared contrast without a
    p-value still counts in m, so that m, and every figure that depends on it, stays the same from the first measurement
    of a run to the last. Without `n_declared` the family is `cells`. Raises ValueError if there are more cells than
    declared.
    """
    m = len(cells) if n_declared is None else n_declared
    if m < len(cells):
        raise ValueError(f"{len(cells)} contrasts of a family of {m}")
    if not cells:
        return []
    estimates = [_estimate(cell) for cell in cells]
    corrected = _in_family([one.p_raw for one in estimates], m)
    alike = _in_family([one.equivalence.p for one in estimates], m)
    n_draws = min(MOST_DRAWS, max(FEWEST_DRAWS, DRAWS_PER_CONTRAST * m))
    flips: list[float | None] = []
    for one in estimates:
        rng = np.random.default_rng(seed_of("sign flips", one.cell.label))
        flips.append(sign_flip_p(one.contrast, n_draws, rng).p)
    return [
        _decide(_corrected(one, p_alike), p, check, m)
        for one, p, check, p_alike in zip(estimates, corrected, _in_family(flips, m), alike, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Estimate:
    """A cell's contrast per question, its intervals for this run and for others, and its tests before correction."""

    cell: CellEvidence
    contrast: Floats
    over_questions: Interval
    seeds: SeedPool
    runs: tuple[float, float]
    interval: Interval
    equivalence: Equivalence

    @property
    def p_raw(self) -> float | None:
        """The p-value over questions and runs; with three seeds or more not under that over seeds."""
        p, over_seeds = self.interval.p_two_sided, self.seeds.interval.p_two_sided
        return p if p is None or over_seeds is None or self.seeds.n_seeds < FEWEST_SEEDS else max(p, over_seeds)


def _estimate(cell: CellEvidence) -> _Estimate:
    questions = cell.questions
    per_seed = [seed.transfer(questions) for seed in cell.seeds]
    contrast = _mean_over_seeds(per_seed)
    over_questions, seeds = clustered_interval(contrast), _pooled(per_seed)
    runs = _runs(cell, seeds)
    # Without seeds that tell, equivalence takes the declared spread as known and leaves out the canary's own noise.
    alike = runs if _seeds_tell(seeds) else (unshared_variance(cell.spread, len(cell.seeds)), float("inf"))
    tested = equivalence(contrast, cell.margin, cell.n_silent(contrast), scale_maximum(cell.unit), alike)
    return _Estimate(cell, contrast, over_questions, seeds, runs, over_runs(over_questions, runs), tested)


def _pooled(per_seed: Sequence[Floats]) -> SeedPool:
    return pool_seeds([_or_nan(clustered_interval(values).estimate) for values in per_seed])


def _seeds_tell(seeds: SeedPool) -> bool:
    """Whether the seeds have a spread of their own: three or more that are not all alike."""
    return seeds.n_seeds >= FEWEST_SEEDS and bool(seeds.interval.se)


def _runs(cell: CellEvidence, seeds: SeedPool, n_trained: int = 2) -> tuple[float, float]:
    """Variance from run to run of an estimate averaged over the seeds, and its df: the seeds' own, else as declared."""
    if _seeds_tell(seeds) and seeds.interval.se is not None and seeds.interval.df is not None:
        return seeds.interval.se**2, seeds.interval.df
    return run_variance(cell.spread, len(cell.seeds)) * n_trained / 2, cell.spread.df


def _movement(cell: CellEvidence, per_seed: Sequence[Floats], n_trained: int = 2) -> Interval:
    """The interval, over questions and runs, of a change that rests on so many trained cells.

    Where every question moves alike, the noise from run to run remains; nothing that did not move at all has an interval.
    """
    over_questions = clustered_interval(_mean_over_seeds(per_seed))
    runs = _runs(cell, _pooled(per_seed), n_trained)
    if over_questions.se == 0 and over_questions.estimate:
        over_questions = replace(over_questions, se=1e-9 * abs(over_questions.estimate))
    return over_runs(over_questions, runs)


def _corrected(one: _Estimate, p: float | None) -> _Estimate:
    """With the equivalence test as the family leaves it."""
    tested = one.equivalence
    if p is None:
        return one
    return replace(one, equivalence=replace(tested, p=p, equivalent=p < tested.alpha))


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


def _mean_over_seeds(per_seed: Sequence[Floats]) -> Floats:
    return mean_present(np.stack(per_seed), axis=0)


def _decide(one: _Estimate, corrected: float | None, check: float | None, m: int) -> CellVerdict:
    cell, interval, seeds, questions = one.cell, one.interval, one.seeds, one.cell.questions
    if cell.withheld is not None:
        return replace(
            withheld_verdict(cell.label, cell.withheld, cell.rows, cell.behavior),
            unit=cell.unit, margin=cell.margin, n_questions=interval.n_clusters, n_seeds=len(cell.seeds),
        )  # fmt: skip
    now = pooled_rates([seed.trained.now for seed in cell.seeds])
    base = pooled_rates([seed.trained.base for seed in cell.seeds])
    bound_now = clustered_rate_bound(now)
    assistant, canary = (
        _movement(cell, [seed.trained.own_change(questions, canary=which) for seed in cell.seeds])
        for which in (False, True)
    )
    decision = verdict(Evidence(
        direction=cell.direction, contrast=interval, p_corrected=corrected, equivalence=one.equivalence,
        measurable_at_base=cell.measurable, source_shows_behavior=cell.source_shows,
        bound_base=clustered_rate_bound(base), bound_now=bound_now, p_sign_flip_corrected=check, unit=cell.unit, seeds=seeds,
        assistant=assistant, canary=canary,
    ))  # fmt: skip
    alone = [seed.mimicry.change(questions) for seed in cell.seeds if seed.mimicry is not None]
    with_control = len(alone) == len(cell.seeds)
    aside = "" if with_control else "; mimicry was not measured"
    cell_verdict = CellVerdict(
        cell.label, decision.kind, decision.reason + aside, interval.estimate, interval.low, interval.high, corrected,
        cell.rows, cell.behavior, cell.unit, cell.margin,
        p_raw=one.p_raw,
        p_sign_flip=check,
        sign_flip_warning=sign_flip_warning(interval.n_clusters, m) if interval.n_clusters else None,
        confidence=confidence_level(seeds, interval),
        trained=_movement(cell, [seed.trained.change(questions) for seed in cell.seeds]),
        mimicry=_movement(cell, alone, n_trained=1) if with_control else None,
        bound=bound_now.room * scale_maximum(cell.unit) if bound_now.room is not None else None,
        n_questions=interval.n_clusters,
        n_effective=effective_sample_size(now).n_effective,
        n_seeds=len(cell.seeds),
        over_seeds=seeds.interval if seeds.n_seeds >= FEWEST_SEEDS else None,
        over_questions=one.over_questions, assistant=assistant, canary=canary,
        run_spread=_seed_spread(seeds, cell),
    )  # fmt: skip
    return _with_power(cell_verdict, one, m)


def _seed_spread(seeds: SeedPool, cell: CellEvidence) -> RunSpread:
    """The run-to-run spread behind a verdict: the seeds' own where they tell, scaled to one trained cell."""
    variance, df = _runs(cell, seeds)
    if not _seeds_tell(seeds):
        return cell.spread
    sd = cell.spread.sd * (variance / run_variance(cell.spread, seeds.n_seeds)) ** 0.5
    return RunSpread(sd, df, f"from {seeds.n_seeds} seeds")


def _with_power(result: CellVerdict, one: _Estimate, m: int) -> CellVerdict:
    """Add the minimum detectable effect at this spread, and the sample sizes that bring it down to the margin."""
    cell, present = one.cell, one.contrast[~np.isnan(one.contrast)]
    if present.size < 2:
        return result
    spread = float(present.std(ddof=1))
    alone = minimum_detectable_effect(spread, present.size, runs=one.runs)
    mend: list[SampleSizeNeeded] = []
    if alone.effect is not None and alone.effect > cell.margin:
        mend.append(clusters_needed(cell.margin, spread, runs=one.runs))
        noise = _sampling_sd(cell)
        own = max(0.0, spread**2 - noise**2) ** 0.5
        n_samples = min(seed.trained.now.values.shape[1] for seed in cell.seeds)
        if n_samples > 1:
            mend.append(samples_needed(cell.margin, own, noise * n_samples**0.5, present.size, runs=one.runs))
        mend.append(seeds_needed(cell.margin, (one.runs[0] * len(cell.seeds)) ** 0.5))
    return replace(
        result,
        detectable=alone.effect,
        detectable_in_family=minimum_detectable_effect(spread, present.size, 0.05 / m, runs=one.runs).effect,
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
