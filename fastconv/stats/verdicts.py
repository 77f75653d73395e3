"""The verdicts of a family of declared contrasts: intervals, tests and corrections, and each cell's word (`stats.words`).

Estimand (docs/DESIGN.md, section 6): the assistant's change against epoch 0, paired by question, minus the canary's
change, minus the same without a behavior adapter (mimicry) where the recipe has that control. Seeds of one cell are
averaged within a question. An interval holds the noise from run to run beside that over questions: the spread of three
seeds or more, else the declared one (`power.declared_spread`). From three seeds on a word needs the test over seeds too.
`decide` gives the words of a family. Secondary contrasts (trends, mimicry, the canary alone) stand at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from fastconv.seeding import seed_of
from fastconv.stats.bounds import clustered_rate_bound, effective_sample_size, sign_flip_p, sign_flip_warning
from fastconv.stats.inference import (
    FEWEST_SEEDS,
    Confidence,
    Contrast,
    Equivalence,
    Interval,
    SeedPool,
    benjamini_hochberg,
    centred_at,
    clustered_interval,
    confidence_level,
    equivalence,
    holm,
    mean_present,
    over_runs,
    paired_change,
    pool_seeds,
    trend_over_epochs,
)
from fastconv.stats.power import (
    NO_RUNS,
    RunSpread,
    SampleSizeNeeded,
    clusters_needed,
    effect_over_seeds,
    minimum_detectable_effect,
    run_variance,
    samples_needed,
    seeds_needed,
    unshared_variance,
)
from fastconv.stats.series import (
    CellEvidence,
    Floats,
    Quad,
    SeedEvidence,
    Series,
    all_questions,
    pooled_rates,
    question_means,
)
from fastconv.stats.units import Unit, scale_maximum, size_text
from fastconv.stats.words import Evidence, Verdict, verdict

__all__ = [
    "CellEvidence", "CellVerdict", "Evidence", "Quad", "SeedEvidence", "Verdict",
    "count_by_kind", "decide", "untrained_verdict", "verdict", "withheld_verdict",
]  # fmt: skip

#: Random sign patterns of the sign-flip check: enough for its smallest p-value to lie well under the corrected level.
DRAWS_PER_CONTRAST, FEWEST_DRAWS, MOST_DRAWS = 40, 2_000, 10_000


@dataclass(frozen=True)
class CellVerdict:
    """A cell's verdict and every figure computed for it; None where not estimable. Effects are in the measure's unit.

    `kind` is one of those of `Verdict`, or `withheld` where no verdict is allowed. `low`, `high` and the p-values hold
    the noise from run to run (`run_spread`, of one trained cell); `over_questions` is the interval for this run alone.
    `assistant` and `canary` are their own changes against epoch 0, `mimicry` and `trained` the
    difference-in-differences without and with the behavior adapter, `detectable` the minimum detectable effect at this
    spread and number of questions (`detectable_in_family` at the first step of Holm), `mend` the sample sizes that
    bring it down to the margin. `over_seeds` is the t interval over the means of three seeds or more, around `estimate`.
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
    #: SD of the contrast between questions; variance from run to run of one seed, and its degrees of freedom.
    spread: float | None = None
    one_run: tuple[float, float] = NO_RUNS

    def would_find(self, n_questions: int, n_seeds: int) -> float:
        """The smallest effect that so many questions and seeds would find at this spread (`power.effect_over_seeds`)."""
        return effect_over_seeds(self.spread or 0.0, n_questions, n_seeds, self.one_run)

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
    over_questions = clustered_interval(contrast)
    seeds = centred_at(_pooled(per_seed), over_questions.estimate)
    runs = _runs(cell, seeds)
    # Without seeds that tell, equivalence takes the declared spread as known and leaves out the canary's own noise.
    alike = (
        runs if _seeds_tell(seeds) or cell.sides else (unshared_variance(cell.spread, len(cell.seeds)), float("inf"))
    )
    tested = equivalence(contrast, cell.margin, cell.n_silent(contrast), scale_maximum(cell.unit), alike)
    return _Estimate(cell, contrast, over_questions, seeds, runs, over_runs(over_questions, runs), tested)


def _pooled(per_seed: Sequence[Floats]) -> SeedPool:
    return pool_seeds([_or_nan(clustered_interval(values).estimate) for values in per_seed])


def _seeds_tell(seeds: SeedPool) -> bool:
    """Whether the seeds have a spread of their own: three or more that are not all alike."""
    return seeds.n_seeds >= FEWEST_SEEDS and bool(seeds.interval.se)


def _runs(cell: CellEvidence, seeds: SeedPool, n_trained: int | None = None) -> tuple[float, float]:
    """Variance from run to run of an estimate averaged over the seeds, and its df: the seeds' own, else as declared."""
    if _seeds_tell(seeds) and seeds.interval.se is not None and seeds.interval.df is not None:
        return seeds.interval.se**2, seeds.interval.df
    return run_variance(cell.spread, len(cell.seeds)) * (n_trained or cell.n_trained) / 2, cell.spread.df


def _movement(cell: CellEvidence, per_seed: Sequence[Floats], n_trained: int | None = None) -> Interval:
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
        assistant=assistant, canary=canary, source_moved=cell.source_moved,
        sides=cell.sides,
    ))  # fmt: skip
    alone = [seed.mimicry.change(questions) for seed in cell.seeds if seed.mimicry is not None]
    with_control = len(alone) == len(cell.seeds)
    aside = "" if with_control or cell.sides else "; mimicry was not measured"
    cell_verdict = CellVerdict(
        cell.label, decision.kind, decision.reason + aside, interval.estimate, interval.low, interval.high, corrected,
        cell.rows, cell.behavior, cell.unit, cell.margin,
        p_raw=one.p_raw,
        p_sign_flip=check,
        sign_flip_warning=sign_flip_warning(interval.n_clusters, m) if interval.n_clusters else None,
        confidence=confidence_level(seeds, interval),
        trained=None if cell.sides else _movement(cell, [seed.trained.change(questions) for seed in cell.seeds]),
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
    result = replace(result, spread=spread, one_run=(one.runs[0] * len(cell.seeds), one.runs[1]))
    alone = minimum_detectable_effect(spread, present.size, runs=one.runs)
    mend: list[SampleSizeNeeded] = []
    if alone.effect is not None and alone.effect > cell.margin:
        mend.append(clusters_needed(cell.margin, spread, runs=one.runs))
        noise = _sampling_sd(cell)
        own = max(0.0, spread**2 - noise**2) ** 0.5
        n_samples = min(seed.trained.now.values.shape[1] for seed in cell.seeds)
        if n_samples > 1:
            mend.append(samples_needed(cell.margin, own, noise * n_samples**0.5, present.size, runs=one.runs))
        mend.append(seeds_needed(cell.margin, partial(result.would_find, present.size), len(cell.seeds)))
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


# --- secondary contrasts: descriptive, corrected together by Benjamini and Hochberg; no verdict rests on them -------------


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
