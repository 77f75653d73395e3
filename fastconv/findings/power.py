"""What the data could show at all, asked before any verdict (DESIGN.md, sections 3 and 6).

Chance level and the test against it, the design effect of sampling one question many times, bounds for
rates at their floor or ceiling, the minimum detectable effect, and what would mend one that is too large.

Arrays are float64 and NaN means *missing*. Malformed input raises `ValueError`; a quantity that sound input
cannot give is `None` beside a `reason`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special
from scipy import stats as distributions


@dataclass(frozen=True, slots=True)
class AboveChance:
    """One-sided exact binomial test of `n_correct` of `n` against `chance`; `above` is p <= alpha."""

    n_correct: int
    n: int
    rate: float
    chance: float
    p_one_sided: float
    alpha: float
    above: bool


@dataclass(frozen=True, slots=True)
class EffectiveSample:
    """How many independent samples the [Q, S] samples are worth; spreads are in the unit of the values."""

    n_effective: float
    n_samples: int
    n_questions: int
    n_missing: int
    design_effect: float
    icc: float | None
    sd_question: float | None
    sd_sample: float | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class RateBound:
    """A rate seen at its floor or ceiling, and the one-sided bound at `level` on the side that is open.

    `room` is how far the true rate may still lie from that extreme. Away from the extremes `room` and
    `extreme` are None with the reason: there the t interval over questions is the right one.
    """

    rate: float | None
    extreme: Literal["floor", "ceiling"] | None
    lower: float | None
    upper: float | None
    room: float | None
    n_effective: float
    level: float
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Detectable:
    """The minimum detectable effect, in the unit of `sd_between`."""

    effect: float | None
    sd_between: float | None
    n_clusters: int
    alpha: float
    power: float
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Needed:
    """How many of `what` bring the minimum detectable effect down to `effect`; None where no number can."""

    number: int | None
    what: Literal["questions", "samples", "seeds"]
    effect: float
    reason: str


@dataclass(frozen=True, slots=True)
class Attainable:
    """Whether the smallest p that n points can give reaches alpha / m."""

    possible: bool
    smallest_p: float
    corrected_level: float
    reason: str


def above_chance(n_correct: int, n: int, chance: float, alpha: float = 0.01) -> AboveChance:
    """Is the rate above chance? P(X >= n_correct) for X ~ Binomial(n, chance), no approximation.

    Source: Conover, Practical Nonparametric Statistics (1999), section 3.1.
    """
    if n < 1 or not 0 <= n_correct <= n:
        raise ValueError(f"n_correct must lie in 0..n with n >= 1, not {n_correct} of {n}")
    _check_open_unit(chance=chance, alpha=alpha)
    p = float(distributions.binom.sf(n_correct - 1, n, chance))
    return AboveChance(n_correct, n, n_correct / n, chance, p, alpha, p <= alpha)


def multiple_choice_chance(n_choices_per_question: ArrayLike, labels: Sequence[object]) -> float:
    """Accuracy without knowledge: the larger of mean(1/choices) and the commonest right label's share.

    `n_choices_per_question`: int[C], each >= 1; `labels`: the C right answers, named alike over questions
    (positions, so that "A" and "1" are one). A model that always answers one letter reaches the second
    figure.
    """
    choices = np.asarray(n_choices_per_question, dtype=np.float64)
    if choices.ndim != 1 or choices.size == 0 or choices.size != len(labels):
        raise ValueError(f"need one label per question, not {len(labels)} for {choices.size} questions")
    if not np.all(choices >= 1):
        raise ValueError("every question needs at least one choice")
    counts: dict[object, int] = {}
    for label in labels:
        counts[label] = counts.get(label, 0) + 1
    return float(max(np.mean(1.0 / choices), max(counts.values()) / choices.size))


def effective_sample_size(values: ArrayLike) -> EffectiveSample:
    """Independent samples that float[Q, S] is worth: N / deff with deff = 1 + (sum n_q^2 / N - 1) ICC.

    ICC is the one-way ANOVA estimator with unequal sizes (Donner 1986, Int. Stat. Rev. 54:67; Searle,
    Casella and McCulloch 1992, section 3.6), cut to 0..1; the design effect is Kish's (Survey Sampling,
    1965, section 5.4). Where the ICC cannot be estimated (all values equal, or one sample per question) it
    counts as 1: a question is one sample.
    """
    x = _matrix(values, "values")
    present = ~np.isnan(x)
    sizes = present.sum(axis=1)
    sizes, filled = sizes[sizes > 0], np.where(present, x, 0.0)[sizes > 0]
    n_questions, n_samples = sizes.size, int(sizes.sum())
    n_missing = x.size - n_samples
    if n_questions < 2 or n_samples == n_questions or np.ptp(x[present]) == 0:
        reason = _why_no_icc(n_questions, n_samples)
        deff = n_samples / n_questions if n_questions else 1.0
        return EffectiveSample(float(n_questions), n_samples, n_questions, n_missing, deff, None, None, None, reason)
    means = filled.sum(axis=1) / sizes
    residual = np.where(present[present.any(axis=1)], filled - means[:, None], 0.0)
    within = float((residual**2).sum()) / (n_samples - n_questions)
    between = float((sizes * (means - filled.sum() / n_samples) ** 2).sum()) / (n_questions - 1)
    typical_size = (n_samples - float((sizes**2).sum()) / n_samples) / (n_questions - 1)
    between_variance = max(0.0, (between - within) / typical_size)
    icc = between_variance / (between_variance + within)
    deff = 1.0 + (float((sizes**2).sum()) / n_samples - 1.0) * icc
    spreads = math.sqrt(between_variance), math.sqrt(within)
    return EffectiveSample(n_samples / deff, n_samples, n_questions, n_missing, deff, icc, *spreads)


def _why_no_icc(n_questions: int, n_samples: int) -> str:
    if n_questions < 2:
        return f"{n_questions} questions have samples; spread between questions needs at least 2"
    if n_samples == n_questions:
        return "one sample per question shows no spread within questions; each question counts once"
    return "all samples are equal, which shows no intraclass correlation; each question counts once"


def zero_hits_upper_bound(n_effective: float, level: float = 0.95) -> float:
    """One-sided upper bound of a rate without a hit in n independent samples: 1 - (1 - level)^(1/n).

    Source: Clopper and Pearson 1934, Biometrika 26:404, with no hits (the exact form of the "rule of three").
    """
    _check_open_unit(level=level)
    if not (math.isfinite(n_effective) and n_effective > 0):
        raise ValueError(f"n_effective must be positive and finite, not {n_effective}")
    return -math.expm1(math.log1p(-level) / n_effective)


def clustered_rate_bound(values: ArrayLike, level: float = 0.95) -> RateBound:
    """One-sided bound for the rate of float[Q, S] in 0..1 where no sample, or every sample, is a hit.

    `zero_hits_upper_bound` (or its mirror image) on the effective sample size, as Korn and Graubard do for
    clustered samples (1998, Survey Methodology 24:193). Samples that are all alike show no ICC, so the
    effective size is the number of questions. Scores on another scale are to be brought to 0..1 first.
    """
    _check_open_unit(level=level)
    x = _matrix(values, "values")
    hits = x[~np.isnan(x)]
    if np.any((hits < 0) | (hits > 1)):
        raise ValueError("a rate needs values between 0 and 1")
    n_effective = effective_sample_size(x).n_effective
    if hits.size == 0:
        return RateBound(None, None, None, None, None, 0.0, level, "no sample has a value")
    rate = float(hits.mean())
    if 0.0 < rate < 1.0:
        reason = "the rate lies between floor and ceiling; use the t interval over questions"
        return RateBound(rate, None, None, None, None, n_effective, level, reason)
    room = zero_hits_upper_bound(n_effective, level)
    if rate == 0.0:
        return RateBound(rate, "floor", 0.0, room, room, n_effective, level)
    return RateBound(rate, "ceiling", 1.0 - room, 1.0, room, n_effective, level)


def minimum_detectable_effect(
    sd_between: float | None, n_clusters: int, alpha: float = 0.05, power: float = 0.8
) -> Detectable:
    """Smallest change that a two-sided paired t test over `n_clusters` questions finds with the given power.

    delta(alpha, power, C - 1) * sd / sqrt(C), delta being the noncentrality of Student's t (Cohen,
    Statistical Power Analysis, 1988, chapter 2). `sd_between`: spread between questions of the contrast
    itself, in its unit. For the first step of Holm over m contrasts pass alpha / m.
    """
    _check_open_unit(alpha=alpha, power=power)
    _check_clusters(n_clusters)
    reason = _unusable_spread(sd_between)
    if reason is not None or sd_between is None:
        return Detectable(None, sd_between, n_clusters, alpha, power, reason)
    effect = _noncentrality(n_clusters - 1, alpha, power) * sd_between / math.sqrt(n_clusters)
    return Detectable(effect, sd_between, n_clusters, alpha, power)


def rate_contrast_sd(rate: float, n_samples: int, icc: float, n_terms: int = 2, pairing: float = 0.0) -> float:
    """Expected spread between questions of a contrast of `n_terms` rates, each from `n_samples` per question.

    sqrt(n_terms * p(1-p) * (icc (1 - pairing) + (1 - icc) / S)): the variance of a cluster mean (Donner and
    Klar, Cluster Randomization Trials, 2000). `n_terms`: 2 for a paired change, 4 against the
    canary, 8 for transfer. `pairing` is the correlation of a question's true rates over the terms; 0 grants
    nothing to pairing.
    """
    _check_open_unit(rate=rate)
    if n_samples < 1 or n_terms < 1 or not 0 <= icc <= 1 or not 0 <= pairing <= 1:
        raise ValueError("need n_samples >= 1, n_terms >= 1, and icc and pairing between 0 and 1")
    return math.sqrt(n_terms * rate * (1 - rate) * (icc * (1 - pairing) + (1 - icc) / n_samples))


def minimum_detectable_rate_change(
    rate: float,
    n_questions: int,
    n_samples: int,
    icc: float,
    alpha: float = 0.05,
    power: float = 0.8,
    n_terms: int = 2,
    pairing: float = 0.0,
) -> Detectable:
    """`minimum_detectable_effect` of a contrast of rates near `rate`, spread as in `rate_contrast_sd`."""
    sd = rate_contrast_sd(rate, n_samples, icc, n_terms, pairing)
    return minimum_detectable_effect(sd, n_questions, alpha, power)


def clusters_needed(
    effect: float, sd_between: float | None, alpha: float = 0.05, power: float = 0.8, limit: int = 1_000_000
) -> Needed:
    """Fewest questions whose minimum detectable effect is at most `effect`; None above `limit`."""
    return _fewest(effect, sd_between, alpha, power, limit, "questions")


def seeds_needed(
    effect: float, sd_between_seeds: float | None, alpha: float = 0.05, power: float = 0.8, limit: int = 100
) -> Needed:
    """Fewest seeds whose t interval can show `effect`, given the spread of the estimates between seeds."""
    return _fewest(effect, sd_between_seeds, alpha, power, limit, "seeds")


def samples_needed(
    effect: float,
    sd_question: float | None,
    sd_sample: float | None,
    n_clusters: int,
    alpha: float = 0.05,
    power: float = 0.8,
) -> Needed:
    """Fewest samples per question that bring the minimum detectable effect down to `effect`.

    With `n_clusters` questions the contrast's variance between them is sd_question^2 + sd_sample^2 / S
    (both spreads of the contrast); only the second part shrinks, so where the first alone is too large no
    number of samples helps (Snijders and Bosker, Multilevel Analysis, 2012, chapter 11).
    """
    _check_effect(effect)
    _check_open_unit(alpha=alpha, power=power)
    _check_clusters(n_clusters)
    if sd_question is None or sd_sample is None or not math.isfinite(sd_question + sd_sample):
        return Needed(None, "samples", effect, "the spread is not known, so no number can be given")
    if sd_question < 0 or sd_sample < 0:
        raise ValueError(f"a spread cannot be negative, not {sd_question} and {sd_sample}")
    tolerated = effect * math.sqrt(n_clusters) / _noncentrality(n_clusters - 1, alpha, power)
    spare = tolerated**2 - sd_question**2
    if sd_sample == 0 and spare >= 0:
        return Needed(1, "samples", effect, "one sample per question is enough")
    if spare <= 0:
        reason = f"the spread between {n_clusters} questions alone hides {effect:.4g}; add questions"
        return Needed(None, "samples", effect, reason)
    number = max(1, math.ceil(sd_sample**2 / spare))
    return Needed(number, "samples", effect, f"{number} samples per question can show {effect:.4g}")


def sign_flip_floor(n_questions: int) -> float:
    """The smallest two-sided sign-flip p of C questions: 2 / 2^C (the data and their mirror image)."""
    if n_questions < 1:
        raise ValueError(f"need at least 1 question, not {n_questions}")
    return math.ldexp(2.0, -n_questions)


def questions_for_family(n_contrasts: int) -> int:
    """Smallest C with 2 / 2^C <= 0.05 / m, that is C >= 1 + log2(20 m)."""
    if n_contrasts < 1:
        raise ValueError(f"a family has at least 1 contrast, not {n_contrasts}")
    return 1 + (20 * n_contrasts - 1).bit_length()  # integers: ceil(log2(n)) without rounding


def sign_flip_warning(n_questions: int, n_contrasts: int) -> str | None:
    """What to print when C questions cannot reach 0.05 / m by sign flips; None when they can."""
    needed = questions_for_family(n_contrasts)
    if n_questions >= needed:
        return None
    return (
        f"{n_questions} questions give a sign-flip p no smaller than {sign_flip_floor(n_questions):.2g}; "
        f"{n_contrasts} contrasts require {0.05 / n_contrasts:.2g}, which takes at least {needed} questions"
    )


def spearman_attainable(n_points: int, n_tests: int, alpha: float = 0.05) -> Attainable:
    """Can any order of n untied points reach alpha / m? The smallest two-sided permutation p is 2 / n!."""
    _check_open_unit(alpha=alpha)
    if n_points < 2 or n_tests < 1:
        raise ValueError(f"need at least 2 points and 1 test, not {n_points} and {n_tests}")
    smallest, level = min(1.0, 2 / math.factorial(n_points)), alpha / n_tests
    possible = smallest <= level
    reason = (
        f"{n_points} points give a rank correlation a p no smaller than {smallest:.2g}, so it "
        f"{'can' if possible else 'cannot'} reach the {level:.2g} that {n_tests} tests require"
    )
    return Attainable(possible, smallest, level, reason)


def _fewest(
    effect: float,
    sd: float | None,
    alpha: float,
    power: float,
    limit: int,
    what: Literal["questions", "seeds"],
) -> Needed:
    _check_effect(effect)
    _check_open_unit(alpha=alpha, power=power)
    _check_clusters(limit)
    reason = _unusable_spread(sd)
    if reason is not None or sd is None:
        return Needed(None, what, effect, reason or "")

    def shows(n: int) -> bool:
        return _noncentrality(n - 1, alpha, power) * sd / math.sqrt(n) <= effect

    if not shows(limit):
        return Needed(None, what, effect, f"not even {limit} {what} can show {effect:.4g}")
    number = _first_true(shows, 2, limit)
    return Needed(number, what, effect, f"{number} {what} can show {effect:.4g}")


def _first_true(predicate: Callable[[int], bool], low: int, high: int) -> int:
    """Smallest n in low..high where a monotone `predicate` holds, given that it holds at `high`."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if predicate(middle) else (middle + 1, high)
    return low


def _noncentrality(df: int, alpha: float, power: float) -> float:
    """The noncentrality at which t exceeds its two-sided critical value, on the true side, with `power`.

    The other tail is left out: a rejection with the wrong sign is no success, it weighs about 1e-6 at 80 %
    power, and scipy's lower tail gives NaN for some large arguments.
    """
    if power <= alpha:
        raise ValueError(f"power must exceed alpha, not {power} and {alpha}")
    critical = float(special.stdtrit(df, 1.0 - alpha / 2.0))

    def shortfall(noncentrality: float) -> float:
        return 1.0 - float(special.nctdtr(df, noncentrality, critical)) - power

    high = critical + 2.0
    while shortfall(high) < 0:
        high *= 2.0
    return float(optimize.root_scalar(shortfall, bracket=(0.0, high), method="brentq", xtol=1e-12).root)


def _unusable_spread(sd: float | None) -> str | None:
    if sd is None or not math.isfinite(sd):
        return "the spread is not known, so no number can be given"
    if sd < 0:
        raise ValueError(f"a spread cannot be negative, not {sd}")
    return "a spread of zero says nothing about what could be detected" if sd == 0 else None


def _matrix(values: ArrayLike, name: str) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] < 1:
        raise ValueError(f"{name} must be [questions, samples] with 2 questions or more, not {x.shape}")
    if np.isinf(x).any():
        raise ValueError(f"{name} must be finite or NaN (missing)")
    return x


def _check_open_unit(**named: float) -> None:
    for name, value in named.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, not {value}")


def _check_clusters(n: int) -> None:
    if n < 2:
        raise ValueError(f"need at least 2 clusters, not {n}")


def _check_effect(effect: float) -> None:
    if not (math.isfinite(effect) and effect > 0):
        raise ValueError(f"an effect to be shown must be positive, not {effect}")
