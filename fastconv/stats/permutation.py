"""Permutation tests: sign flips of paired differences, and Spearman's rank correlation.

Exact for few points, Monte Carlo above. Arrays are float64 and NaN means *missing*. Malformed input raises `ValueError`; a
figure that valid input cannot give is `None`, with the explanation in `reason`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as distributions

from fastconv.stats.bounds import sign_flip_floor
from fastconv.stats.inference import ROUNDING, Floats, float_vector

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
    ranks = np.asarray(distributions.rankdata(x), dtype=np.float64)
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
