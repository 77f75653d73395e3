"""What the data can show at all, and tests that assume no distribution (docs/DESIGN.md, section 6).

Chance level and the test against it, the design effect of sampling one question many times, bounds for rates at their
floor or ceiling; sign flips and rank correlations by permutation, and the smallest p that they can give.

Arrays are float64 and NaN means *missing*. Malformed input raises `ValueError`; a quantity that sound input cannot give
is `None` beside a `reason`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastconv.stats.inference import ROUNDING, Floats, float_vector


@dataclass(frozen=True, slots=True)
class AboveChance:
    """One-sided exact binomial test of `n_correct` of `n` against `chance`; `above` is `p_one_sided <= alpha`."""

    n_correct: int
    n: int
    rate: float
    chance: float
    p_one_sided: float
    alpha: float
    above: bool


@dataclass(frozen=True, slots=True)
class EffectiveSample:
    """Number of independent samples that float[Q, S] is worth. Standard deviations are in the unit of the values."""

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
    """A rate at its floor or ceiling, with the one-sided bound at confidence `level` on the open side.

    `room` is how far the true rate may lie from that extreme. For other rates `room` and `extreme` are None and
    `reason` says so: use the t interval over questions there.
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
class Attainable:
    """Whether the smallest p-value that n points can give reaches alpha / m."""

    possible: bool
    smallest_p: float
    corrected_level: float
    reason: str


def above_chance(n_correct: int, n: int, chance: float, alpha: float = 0.01) -> AboveChance:
    """Exact one-sided binomial test: P(X >= n_correct) for X ~ Binomial(n, chance).

    Source: Conover, Practical Nonparametric Statistics (1999), section 3.1. Raises ValueError for counts outside 0..n.
    """
    from scipy.stats import binom  # late: its import takes longer than all that `check` does

    if n < 1 or not 0 <= n_correct <= n:
        raise ValueError(f"n_correct must lie in 0..n with n >= 1, not {n_correct} of {n}")
    _check_open_unit(chance=chance, alpha=alpha)
    p = float(binom.sf(n_correct - 1, n, chance))
    return AboveChance(n_correct, n, n_correct / n, chance, p, alpha, p <= alpha)


def multiple_choice_chance(n_choices_per_question: ArrayLike, labels: Sequence[object]) -> float:
    """Accuracy without knowledge: the larger of mean(1/choices) and the share of the most frequent correct label.

    `n_choices_per_question`: int[C], each >= 1; `labels`: the C correct answers, named consistently over questions (by
    position, so that "A" and "1" are the same). A model that always gives one letter reaches the second figure. Raises
    ValueError for lengths that do not match.
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
    """Effective sample size of float[Q, S]: N / deff with deff = 1 + (sum n_q^2 / N - 1) ICC.

    ICC is the one-way ANOVA estimator for unequal group sizes (Donner 1986, Int. Stat. Rev. 54:67; Searle, Casella and
    McCulloch 1992, section 3.6), clipped to 0..1; the design effect is Kish's (Survey Sampling, 1965, section 5.4).
    Where the ICC cannot be estimated (all values equal, or one sample per question) it is taken as 1: each question
    counts once.
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
    """One-sided upper bound of a rate with no hit in n independent samples: 1 - (1 - level)^(1/n).

    Source: Clopper and Pearson 1934, Biometrika 26:404, for zero hits (the exact form of the "rule of three"). Raises
    ValueError unless `n_effective` is positive and finite.
    """
    _check_open_unit(level=level)
    if not (math.isfinite(n_effective) and n_effective > 0):
        raise ValueError(f"n_effective must be positive and finite, not {n_effective}")
    return -math.expm1(math.log1p(-level) / n_effective)


def clustered_rate_bound(values: ArrayLike, level: float = 0.95) -> RateBound:
    """One-sided bound for the rate of float[Q, S] in 0..1 where no sample, or every sample, is a hit.

    Applies `zero_hits_upper_bound` (mirrored for the ceiling) to the effective sample size, as Korn and Graubard do for
    clustered samples (1998, Survey Methodology 24:193). Identical samples show no ICC, so the effective size is the
    number of questions. Scale other scores to 0..1 first; values outside raise ValueError.
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


def sign_flip_floor(n_questions: int) -> float:
    """The smallest two-sided sign-flip p-value of C questions: 2 / 2^C (the data and their mirror image)."""
    if n_questions < 1:
        raise ValueError(f"need at least 1 question, not {n_questions}")
    return math.ldexp(2.0, -n_questions)


def questions_for_family(n_contrasts: int) -> int:
    """Smallest C with 2 / 2^C <= 0.05 / m, that is C >= 1 + log2(20 m)."""
    if n_contrasts < 1:
        raise ValueError(f"a family has at least 1 contrast, not {n_contrasts}")
    return 1 + (20 * n_contrasts - 1).bit_length()  # integers: ceil(log2(n)) without rounding


def sign_flip_warning(n_questions: int, n_contrasts: int) -> str | None:
    """The sentence to print when C questions cannot reach 0.05 / m by sign flips; None when they can."""
    needed = questions_for_family(n_contrasts)
    if n_questions >= needed:
        return None
    return (
        f"{n_questions} questions give a sign-flip p no smaller than {sign_flip_floor(n_questions):.2g}; "
        f"{n_contrasts} contrasts require {0.05 / n_contrasts:.2g}, which takes at least {needed} questions"
    )


def spearman_attainable(n_points: int, n_tests: int, alpha: float = 0.05) -> Attainable:
    """Whether any order of n untied points can reach alpha / m; the smallest two-sided permutation p is 2 / n!."""
    _check_open_unit(alpha=alpha)
    if n_points < 2 or n_tests < 1:
        raise ValueError(f"need at least 2 points and 1 test, not {n_points} and {n_tests}")
    smallest, level = min(1.0, 2 / math.factorial(n_points)), alpha / n_tests
    possible = smallest <= level
    reason = (
        f"{n_points} points give a rank correlation a p no smaller than {smallest:.2g}, so it "
        f"{'can' if possible else 'cannot'} reach the {level:.2g} that {'1 test requires' if n_tests == 1 else f'{n_tests} tests require'}"
    )
    return Attainable(possible, smallest, level, reason)


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


EXACT_SIGN_FLIPS = 14  # 2^14 sign patterns; above, Monte Carlo
EXACT_SPEARMAN = 9  # 9! orders; above, Monte Carlo
CHUNK = 4_000_000  # floats per block of Monte Carlo draws, 32 MB


@dataclass(frozen=True, slots=True)
class SignFlip:
    """A two-sided sign-flip test; `floor` is the smallest p-value that these data could have given."""

    p: float | None
    floor: float | None
    exact: bool
    n_clusters: int
    n_missing: int
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Spearman:
    """Rank correlation, its permutation p-value, and the range of the correlation with each point left out in turn."""

    rho: float | None
    p: float | None
    leave_one_out_low: float | None
    leave_one_out_high: float | None
    exact: bool
    n: int
    n_missing: int
    reason: str | None = None


def sign_flip_p(x: ArrayLike, n_draws: int, rng: np.random.Generator) -> SignFlip:
    """Two-sided sign-flip test of float[C] against symmetry about 0, statistic |sum|.

    All 2^C patterns when C <= 14, else `n_draws` random ones with (1 + hits) / (1 + draws) (Fisher 1935,
    The Design of Experiments, section 21; Phipson and Smyth 2010, SAGMB 9:39). Zeros do not flip, so they
    do not lower `floor`.
    """
    data = float_vector(x, "x", 2)
    present = data[~np.isnan(data)]
    n_missing = data.size - present.size
    if present.size == 0:
        return SignFlip(None, None, False, 0, n_missing, f"none of {data.size} questions has a value")
    exact = present.size <= EXACT_SIGN_FLIPS
    observed = abs(present.sum()) - ROUNDING * np.abs(present).sum()
    floor = min(1.0, sign_flip_floor(max(1, int(np.count_nonzero(present)))))
    if exact:
        patterns = (np.arange(2**present.size)[:, None] >> np.arange(present.size)) & 1
        p = float(np.mean(np.abs((1.0 - 2.0 * patterns) @ present) >= observed))
        return SignFlip(p, floor, exact, present.size, n_missing)
    if n_draws < 1:
        raise ValueError(f"n_draws must be at least 1, not {n_draws}")
    hits = 0
    for n_block in _blocks(n_draws, present.size):
        signs = 2.0 * rng.integers(0, 2, size=(n_block, present.size), dtype=np.int8) - 1.0
        hits += int(np.count_nonzero(np.abs(signs @ present) >= observed))
    return SignFlip((1 + hits) / (1 + n_draws), max(floor, 1 / (1 + n_draws)), exact, present.size, n_missing)


def exact_spearman(
    x: ArrayLike, y: ArrayLike, n_draws: int = 100_000, rng: np.random.Generator | None = None
) -> Spearman:
    """Spearman's rho of two float[n] with average ranks on ties, and its two-sided permutation p-value.

    All n! orders for n <= 9, else `n_draws` random ones with the +1 correction, for which `rng` is required (Kendall
    and Gibbons, Rank Correlation Methods, 1990, chapter 4). Pairs with a NaN are dropped and counted.
    """
    a, b = float_vector(x, "x", 3), float_vector(y, "y", 3)
    if a.size != b.size:
        raise ValueError(f"x and y must match, not {a.size} and {b.size} points")
    both = ~(np.isnan(a) | np.isnan(b))
    a, b = a[both], b[both]
    n, n_missing = a.size, both.size - a.size
    rho = _rank_correlation(a, b) if n >= 3 else None
    if rho is None:
        reason = f"{n} complete points; at least 3 are needed" if n < 3 else "one side is constant"
        return Spearman(None, None, None, None, n <= EXACT_SPEARMAN, n, n_missing, reason)
    others = [_rank_correlation(np.delete(a, i), np.delete(b, i)) for i in range(n)]
    ranges = [value for value in others if value is not None]
    reason = None if len(ranges) == n else "without one of the points a side is constant"
    p = _permutation_p(a, b, n_draws, rng)
    return Spearman(rho, p, min(ranges), max(ranges), n <= EXACT_SPEARMAN, n, n_missing, reason)


def _blocks(n_draws: int, width: int) -> Iterator[int]:
    """Split the draws so that a block of [draws, width] floats stays small."""
    size = max(1, CHUNK // width)
    for start in range(0, n_draws, size):
        yield min(size, n_draws - start)


def _centred_ranks(x: Floats) -> Floats:
    from scipy.stats import rankdata

    ranks = np.asarray(rankdata(x), dtype=np.float64)
    return ranks - ranks.mean()


def _rank_correlation(x: Floats, y: Floats) -> float | None:
    rx, ry = _centred_ranks(x), _centred_ranks(y)
    norm = math.sqrt(float(rx @ rx) * float(ry @ ry))
    return float(rx @ ry) / norm if norm > 0 else None


def _permutation_p(x: Floats, y: Floats, n_draws: int, rng: np.random.Generator | None) -> float:
    rx, ry = _centred_ranks(x), _centred_ranks(y)
    observed = abs(float(rx @ ry)) - ROUNDING * float(np.abs(rx) @ np.abs(ry))
    if rx.size <= EXACT_SPEARMAN:
        return float(np.mean(np.abs(rx[_permutations(rx.size)] @ ry) >= observed))
    if rng is None or n_draws < 1:
        raise ValueError(f"{rx.size} points need random orders: pass rng and at least 1 draw")
    hits = 0
    for n_block in _blocks(n_draws, rx.size):
        shuffled = rng.permuted(np.broadcast_to(rx, (n_block, rx.size)), axis=1)
        hits += int(np.count_nonzero(np.abs(shuffled @ ry) >= observed))
    return (1 + hits) / (1 + n_draws)


def _permutations(n: int) -> NDArray[np.int8]:
    """All orders of 0..n-1, int8[n!, n]: each new number is inserted at every position of the orders so far."""
    orders = np.zeros((1, 1), dtype=np.int8)
    for number in range(1, n):
        orders = np.concatenate([np.insert(orders, gap, number, axis=1) for gap in range(number + 1)])
    return orders
