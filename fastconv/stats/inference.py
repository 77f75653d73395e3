"""Contrasts, intervals, equivalence, multiplicity corrections and pooling over seeds (docs/DESIGN.md, section 6).

Everything is paired by question. Samples are averaged within a question first, then questions are the clusters. Arrays
are float64 and NaN means *missing*: a missing question is dropped and counted, never replaced by 0. Malformed input
raises `ValueError`; a figure that valid input cannot give is `None`, with the explanation in `reason`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from fastconv.stats.power import satterthwaite
from fastconv.stats.units import counted

Floats = NDArray[np.float64]

# Differences of decimals (0.3 - 0.2 - 0.1) leave about 1e-17; below this fraction of the inputs they count as zero.
ROUNDING = 1e-12
FEWEST_SEEDS = 3  # fewer do not generalize to other seeds


@dataclass(frozen=True, slots=True)
class Interval:
    """A t interval over clusters, in the unit of the values; `reason` says why anything in it is None."""

    estimate: float | None
    low: float | None
    high: float | None
    se: float | None
    df: float | None
    n_clusters: int
    p_two_sided: float | None
    level: float
    n_missing: int = 0
    reason: str | None = None


class IntervalArrays(NamedTuple):
    """Output of `t_interval_kernel`, arrays of the leading shape; low, high and p are NaN where the spread is zero."""

    estimate: Floats
    low: Floats
    high: Floats
    se: Floats
    p_two_sided: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Contrast:
    """A contrast per question, float[C] with NaN where a side is missing, and its interval over questions."""

    per_question: Floats
    interval: Interval


@dataclass(frozen=True, slots=True, eq=False)
class Arm:
    """Question means of a cell and of its epoch 0, for assistant and canary: four float[C], matched by position."""

    now: ArrayLike
    base: ArrayLike
    canary_now: ArrayLike
    canary_base: ArrayLike


@dataclass(frozen=True, slots=True)
class Equivalence:
    """Two one-sided tests against +-margin; `interval` (level 1 - 2 alpha) lies inside the margin when p < alpha."""

    equivalent: bool | None
    p: float | None
    p_lower: float | None
    p_upper: float | None
    margin: float
    alpha: float
    interval: Interval
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class SeedPool:
    """Estimates pooled over seeds; `agree_in_sign` is True when all of them are on one side of zero."""

    n_seeds: int
    agree_in_sign: bool
    interval: Interval


@dataclass(frozen=True, slots=True)
class Confidence:
    """Confidence level (see `confidence_level`) and the reason for it."""

    level: Literal["LOW", "MODERATE", "HIGH"]
    reason: str


def mean_present(values: ArrayLike, axis: int) -> Floats:
    """Mean over an axis, ignoring NaN; NaN where all values are missing.

    Over samples this gives every question the same weight, however many of its samples have a score (Miller 2024,
    "Adding error bars to evals"); over seeds, a question missing in one seed gets the mean of the others.
    """
    x = np.asarray(values, dtype=np.float64)
    present = ~np.isnan(x)
    sizes = present.sum(axis=axis)
    means = np.full(sizes.shape, np.nan)
    np.divide(np.where(present, x, 0.0).sum(axis=axis), sizes, out=means, where=sizes > 0)
    return means


def t_interval_kernel(x: ArrayLike, level: float = 0.95) -> IntervalArrays:
    """Student's t interval and two-sided p-value against 0 over the last axis of float[..., C], with C - 1 df.

    Source: Student 1908; Snedecor and Cochran, Statistical Methods (1989). For complete data: NaN stays NaN. Equal
    values have se 0, and NaN for low, high and p, because a spread of zero is no certainty.
    """
    _check_level(level)
    data = np.asarray(x, dtype=np.float64)
    if data.ndim < 1 or data.shape[-1] < 2:
        raise ValueError(f"an interval needs at least 2 clusters on the last axis, not shape {data.shape}")
    clusters = data.shape[-1]
    estimate = data.mean(axis=-1)
    sd = data.std(axis=-1, ddof=1)
    se = np.where(sd <= ROUNDING * np.abs(data).max(axis=-1), 0.0, sd) / math.sqrt(clusters)
    divisor = np.where(se == 0, np.nan, se)
    half = float(special.stdtrit(clusters - 1, 0.5 + level / 2)) * divisor
    p = 2.0 * special.stdtr(clusters - 1, -np.abs(estimate) / divisor)
    return IntervalArrays(estimate, estimate - half, estimate + half, se, p)


def clustered_interval(per_question: ArrayLike, level: float = 0.95) -> Interval:
    """t interval over questions of float[C], C - 1 df; NaN questions are dropped and counted.

    With fewer than two questions there is no interval, and `reason` says so.
    """
    return _interval(float_vector(per_question, "per_question", 1), level, "questions")


def paired_change(now: ArrayLike, base: ArrayLike, level: float = 0.95) -> Contrast:
    """now - base per question, two float[C] matched by position (the paired t test)."""
    return _contrast({"now": (1, now), "base": (-1, base)}, level)


def difference_in_differences(
    now: ArrayLike, base: ArrayLike, canary_now: ArrayLike, canary_base: ArrayLike, level: float = 0.95
) -> Contrast:
    """The assistant's change minus the canary's, per question; four float[C] matched by position.

    Source: Angrist and Pischke, Mostly Harmless Econometrics (2009), section 5.2, taken within each question.
    """
    return _contrast(_arm_terms(Arm(now, base, canary_now, canary_base), 1, ""), level)


def transfer_contrast(with_behavior: Arm, without_behavior: Arm, level: float = 0.95) -> Contrast:
    """The effect of the behavior adapter: its difference-in-differences minus mimicry's, per question.

    Mimicry is the same difference for behavior `none`. Both sides subtract their own canary: otherwise the canary's
    drift under convergence alone would be subtracted twice.
    """
    terms = _arm_terms(with_behavior, 1, "") | _arm_terms(without_behavior, -1, "mimicry ")
    return _contrast(terms, level)


def holm(p: ArrayLike) -> Floats:
    """Holm's step-down adjusted p-values over the last axis of float[..., m] (Holm 1979, Scand. J. Stat. 6:65).

    A NaN p-value (declared, not estimable) stays NaN and still counts in m.
    """
    return _adjusted(p, lambda ordered, m: np.maximum.accumulate(ordered * np.arange(m, 0, -1), axis=-1))


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """Adjusted p-values for the false discovery rate over the last axis of float[..., m]; NaN as in `holm`.

    Source: Benjamini and Hochberg 1995, JRSS B 57:289.
    """

    def step_up(ordered: Floats, m: int) -> Floats:
        scaled = ordered * (m / np.arange(1, m + 1))
        return np.minimum.accumulate(scaled[..., ::-1], axis=-1)[..., ::-1]

    return _adjusted(p, step_up)


def tost(x: ArrayLike, margin: float, alpha: float = 0.05) -> Equivalence:
    """Two one-sided t tests that the mean of float[C] lies within +-margin.

    Source: Schuirmann 1987, J. Pharmacokinetics and Biopharmaceutics 15:657. NaN is dropped and counted.
    """
    if not (math.isfinite(margin) and margin > 0 and 0 < alpha < 0.5):
        raise ValueError(f"need a positive margin and alpha under 0.5, not {margin} and {alpha}")
    interval = clustered_interval(x, 1 - 2 * alpha)
    if interval.estimate is None or interval.df is None or not interval.se:
        return Equivalence(None, None, None, None, margin, alpha, interval, interval.reason)
    p_lower = float(special.stdtr(interval.df, -(interval.estimate + margin) / interval.se))
    p_upper = float(special.stdtr(interval.df, (interval.estimate - margin) / interval.se))
    p = max(p_lower, p_upper)
    return Equivalence(p < alpha, p, p_lower, p_upper, margin, alpha, interval)


def over_runs(interval: Interval, runs: tuple[float, float]) -> Interval:
    """The interval with the variance from run to run (variance of the estimate, its df) beside that over questions.

    se^2 = se_questions^2 + variance, Student's t with the degrees of freedom of the sum (`power.satterthwaite`). What has
    no interval over questions gets none: a spread of zero over questions is not known to be zero.
    """
    if interval.estimate is None or interval.df is None or not interval.se:
        return interval
    se, df = satterthwaite((interval.se**2, interval.df), runs)
    half = float(special.stdtrit(df, 0.5 + interval.level / 2)) * se
    p = 2.0 * float(special.stdtr(df, -abs(interval.estimate) / se))
    return replace(interval, low=interval.estimate - half, high=interval.estimate + half, se=se, df=df, p_two_sided=p)


def equivalence(
    x: ArrayLike, margin: float, n_silent: int, maximum: float, runs: tuple[float, float] = (0.0, math.inf), alpha: float = 0.05
) -> Equivalence:  # fmt: skip
    """Two one-sided tests that the mean of float[C] lies within +-margin, which hold near the ends of the scale too.

    A question whose samples all lie at one end (`n_silent` of them) shows no spread, whatever its true rate: near a floor
    the t test therefore calls most rates small. As a score test does, each such question is given the variance that it
    would have if the margin were true: m (1 - m) with m = margin / `maximum` of the scale, the largest that a mean of
    values in 0..1 can have (Wilson 1927, JASA 22:209; for non-inferiority Farrington and Manning 1990, Statistics in
    Medicine 9:1447). `runs` is the variance from run to run and its degrees of freedom.
    """
    over_questions = tost(x, margin, alpha).interval
    estimate, df = over_questions.estimate, over_questions.df
    if estimate is None or df is None or over_questions.se is None:
        return Equivalence(None, None, None, None, margin, alpha, over_questions, over_questions.reason)
    m, n = min(1.0, margin / maximum), over_questions.n_clusters
    at_margin = n_silent / n * m * (1 - m) / n * maximum**2
    se, df = satterthwaite((over_questions.se**2 + at_margin, df), runs)
    if se == 0:
        return Equivalence(None, None, None, None, margin, alpha, over_questions, over_questions.reason)
    p_lower, p_upper = (float(special.stdtr(df, side / se)) for side in (-(estimate + margin), estimate - margin))
    half = float(special.stdtrit(df, 1 - alpha)) * se
    interval = replace(over_questions, low=estimate - half, high=estimate + half, se=se, df=df)
    p = max(p_lower, p_upper)
    return Equivalence(p < alpha, p, p_lower, p_upper, margin, alpha, interval)


def trend_over_epochs(values: ArrayLike, epochs: ArrayLike, level: float = 0.95) -> Contrast:
    """Least-squares slope per question of float[Q, E] on float[E], in values per epoch, and its t interval.

    Source: the summary-measures analysis of Matthews et al. 1990, BMJ 300:230. A question with a missing epoch is
    dropped and counted, because a slope over fewer epochs is a different quantity.
    """
    x, times = np.asarray(values, dtype=np.float64), float_vector(epochs, "epochs", 2)
    if x.ndim != 2 or x.shape[1] != times.size or not np.all(np.isfinite(times)):
        raise ValueError(f"values must be [questions, epochs]; got shape {x.shape} and {times.size} epochs")
    centred = times - times.mean()
    if np.ptp(times) == 0:
        raise ValueError("a trend needs at least two different epochs")
    slopes = ((x - x.mean(axis=1, keepdims=True)) @ centred) / (centred @ centred)
    slopes[np.abs(slopes) * np.ptp(times) <= ROUNDING * np.abs(x).max(axis=1)] = 0.0
    return Contrast(slopes, clustered_interval(slopes, level))


def pool_seeds(per_seed_estimates: ArrayLike, level: float = 0.95) -> SeedPool:
    """Pool float[n_seeds] estimates of one contrast with a t interval over seeds (the outer cluster), equally weighted.

    One seed has an estimate and no interval; NaN seeds are dropped and counted.
    """
    data = float_vector(per_seed_estimates, "per_seed_estimates", 1)
    present = data[~np.isnan(data)]
    agree = present.size > 0 and bool(np.all(present > 0) or np.all(present < 0))
    return SeedPool(present.size, agree, _interval(data, level, "seeds"))


def centred_at(pool: SeedPool, estimate: float | None) -> SeedPool:
    """The pool with its interval around `estimate`, of the same width, and the p-value of that.

    The mean over questions of the means over seeds is the mean of the seeds only where every seed has the same questions.
    A verdict gives one estimate, over questions; the seeds say how far it would move from run to run.
    """
    interval = pool.interval
    if estimate is None or interval.estimate is None or interval.estimate == estimate:
        return pool
    if interval.low is None or not interval.se or interval.df is None:
        return replace(pool, interval=replace(interval, estimate=estimate))
    half = interval.estimate - interval.low
    p = 2.0 * float(special.stdtr(interval.df, -abs(estimate) / interval.se))
    moved = replace(interval, estimate=estimate, low=estimate - half, high=estimate + half, p_two_sided=p)
    return replace(pool, interval=moved)


def seeds_against(pool: SeedPool) -> str | None:
    """Why three seeds or more do not support a change; None where they do, or where there are fewer than three.

    Identical seeds have no interval, and count as supporting the change.
    """
    low, high = pool.interval.low, pool.interval.high
    if pool.n_seeds < FEWEST_SEEDS:
        return None
    if not pool.agree_in_sign:
        return f"the {pool.n_seeds} seeds do not agree in sign"
    if low is not None and high is not None and low <= 0 <= high:
        return f"{pool.n_seeds} seeds agree in sign, but the interval over seeds includes zero"
    return None


def confidence_level(pool: SeedPool, over_questions: Interval) -> Confidence:
    """MODERATE with three seeds, HIGH with five, if all share one sign and both intervals exclude zero; else LOW.

    The interval over seeds covers other seeds; the one over questions (seeds averaged within each) covers other
    questions.
    """
    if pool.n_seeds < FEWEST_SEEDS:
        return Confidence("LOW", f"{counted(pool.n_seeds, 'seed')}; three are needed for more")
    if (against := seeds_against(pool)) is not None:
        return Confidence("LOW", against)
    for interval, what in ((pool.interval, "seeds"), (over_questions, "questions")):
        if interval.low is None or interval.high is None:
            return Confidence("LOW", f"no interval over {what}: {interval.reason}")
        if interval.low <= 0 <= interval.high:
            return Confidence("LOW", f"{pool.n_seeds} seeds agree in sign, but the interval over {what} includes zero")
    reason = f"{pool.n_seeds} seeds agree in sign, and the intervals over seeds and over questions are clear of zero"
    return Confidence("HIGH" if pool.n_seeds >= 5 else "MODERATE", reason)


def _interval(x: Floats, level: float, unit: str) -> Interval:
    _check_level(level)
    present = x[~np.isnan(x)]
    n, n_missing = present.size, x.size - present.size
    if n < 2:
        estimate = float(present[0]) if n else None
        reason = f"{n} of {x.size} {unit} have a value; an interval needs at least 2"
        return Interval(estimate, None, None, None, None, n, None, level, n_missing, reason)
    k = t_interval_kernel(present, level)
    estimate, se = float(k.estimate), float(k.se)
    if se == 0:
        reason = f"all {n} {unit} have the same value, so their spread cannot be estimated"
        return Interval(estimate, None, None, 0.0, n - 1, n, None, level, n_missing, reason)
    return Interval(estimate, float(k.low), float(k.high), se, n - 1, n, float(k.p_two_sided), level, n_missing)


def _arm_terms(arm: Arm, sign: int, prefix: str) -> dict[str, tuple[int, ArrayLike]]:
    return {
        f"{prefix}now": (sign, arm.now),
        f"{prefix}base": (-sign, arm.base),
        f"{prefix}canary_now": (-sign, arm.canary_now),
        f"{prefix}canary_base": (sign, arm.canary_base),
    }


def _contrast(terms: dict[str, tuple[int, ArrayLike]], level: float) -> Contrast:
    """The signed sum per question; one missing term makes the question missing."""
    arrays = {name: float_vector(values, name, 1) for name, (_, values) in terms.items()}
    if len({array.size for array in arrays.values()}) > 1:
        sizes = ", ".join(f"{name} {array.size}" for name, array in arrays.items())
        raise ValueError(f"the sides must hold the same questions: {sizes}")
    stacked = np.stack(list(arrays.values()))
    total = np.array([sign for sign, _ in terms.values()], dtype=np.float64) @ stacked
    total[np.abs(total) <= ROUNDING * np.abs(stacked).max(axis=0)] = 0.0
    return Contrast(total, _interval(total, level, "questions"))


def _adjusted(p: ArrayLike, cumulate: Callable[[Floats, int], Floats]) -> Floats:
    """Sort the last axis, adjust, clip at 1 and undo the sort; NaN is treated as 1 while sorting."""
    raw = np.asarray(p, dtype=np.float64)
    if raw.ndim < 1 or raw.shape[-1] == 0:
        raise ValueError("a correction needs at least one p-value")
    if np.any((raw < 0) | (raw > 1)):
        raise ValueError("p-values lie between 0 and 1")
    filled = np.where(np.isnan(raw), 1.0, raw)
    order = np.argsort(filled, axis=-1, kind="stable")
    ordered = np.take_along_axis(filled, order, axis=-1)
    result = np.empty_like(filled)
    np.put_along_axis(result, order, np.minimum(cumulate(ordered, raw.shape[-1]), 1.0), axis=-1)
    return np.where(np.isnan(raw), np.nan, result)


def float_vector(values: ArrayLike, name: str, at_least: int) -> Floats:
    """The values as float64[n], NaN allowed. Raises ValueError for another shape, n < `at_least`, or infinities."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size < at_least:
        raise ValueError(f"{name} must be a vector of at least {at_least}, not of shape {x.shape}")
    if np.isinf(x).any():
        raise ValueError(f"{name} must be finite or NaN (missing)")
    return x


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"a level lies between 0 and 1, not at {level}")
