"""Sign flips and rank correlations against worked figures, scipy, brute force and properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from fastconv.stats import bounds

NAN = math.nan
finite = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))
quick = settings(max_examples=40, deadline=None)  # a busy machine is no failure
probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=20)


def rng() -> np.random.Generator:
    return np.random.default_rng(20240611)


# --- sign flips ---------------------------------------------------------------------------------------------


def test_sign_flip_by_hand():
    # 2^3 patterns of 1, 2, 3: |sum| is 6, 4, 2, 0 twice each; 2 of 8 reach 6
    assert bounds.sign_flip_p([1, 2, 3], 10, rng()).p == 0.25
    assert bounds.sign_flip_p([1, 2, -3], 10, rng()).p == 1.0
    assert bounds.sign_flip_p([0.0, 0.0], 10, rng()).p == 1.0


def test_sign_flip_agrees_with_scipys_exact_permutation_test():
    x = rng().normal(0.4, 1, size=10)
    oracle = scipy_stats.permutation_test(
        (x,), lambda values: np.abs(np.sum(values)), permutation_type="samples", n_resamples=2**10,
        alternative="greater", vectorized=False,
    )  # fmt: skip
    assert bounds.sign_flip_p(x, 10, rng()).p == pytest.approx(oracle.pvalue, abs=1e-12)


def test_monte_carlo_sign_flip_is_close_to_exact_and_never_zero(monkeypatch):
    x = rng().normal(0.5, 1, size=14)
    exact = bounds.sign_flip_p(x, 10, rng())
    monkeypatch.setattr(bounds, "EXACT_SIGN_FLIPS", 0)
    drawn = bounds.sign_flip_p(x, 20_000, rng())
    assert exact.exact
    assert not drawn.exact
    assert exact.p is not None
    assert drawn.p == pytest.approx(exact.p, abs=4 * math.sqrt(exact.p / 20_000))
    assert bounds.sign_flip_p(np.arange(1, 61), 99, rng()).p == 1 / 100


def test_sign_flip_floor_knows_that_zeros_do_not_flip():
    flip = bounds.sign_flip_p([1.0, 1.0, 1.0, 0.0, 0.0, NAN], 10, rng())
    assert (flip.p, flip.floor, flip.n_clusters, flip.n_missing) == (0.25, 0.25, 5, 1)
    assert bounds.sign_flip_p([NAN, NAN], 10, rng()).p is None


@pytest.mark.parametrize(("contrasts", "questions"), [(1, 6), (4, 8), (6, 8), (7, 9), (16, 10), (80, 12)])
def test_questions_for_a_family(contrasts, questions):
    assert bounds.questions_for_family(contrasts) == questions == math.ceil(1 + math.log2(20 * contrasts))
    assert bounds.sign_flip_floor(questions) <= 0.05 / contrasts < bounds.sign_flip_floor(questions - 1)


def test_eight_questions_cannot_carry_sixteen_contrasts():
    warning = bounds.sign_flip_warning(8, 16)
    assert warning is not None
    assert "0.0078" in warning
    assert "at least 10 questions" in warning
    assert bounds.sign_flip_warning(10, 16) is None


# --- Spearman -----------------------------------------------------------------------------------------------


def scipy_spearman(x, y) -> tuple[float, float]:
    rho, p = np.asarray(scipy_stats.spearmanr(x, y), dtype=float)
    return rho, p


@given(st.integers(3, 7), st.booleans(), st.integers(0, 10_000))
@settings(quick, max_examples=15)
def test_exact_spearman_agrees_with_brute_force(n, tied, seed):
    random = np.random.default_rng(seed)
    x, y = (random.integers(0, 4, size=(2, n)) if tied else random.normal(size=(2, n))).astype(float)
    result = bounds.exact_spearman(x, y)
    if result.rho is None:
        assert np.ptp(x) == 0 or np.ptp(y) == 0
        return
    observed = scipy_spearman(x, y)[0]
    assert result.rho == pytest.approx(observed, abs=1e-12)
    ranks = scipy_stats.rankdata(x), scipy_stats.rankdata(y)
    orders = np.array(list(itertools.permutations(ranks[0])))
    rhos = [np.corrcoef(order, ranks[1])[0, 1] for order in orders]
    assert result.p == pytest.approx(np.mean(np.abs(rhos) >= abs(observed) - 1e-9), abs=1e-12)


def test_spearman_of_nine_points_enumerates_all_orders():
    x = np.arange(9.0)
    assert bounds.exact_spearman(x, x).p == pytest.approx(2 / math.factorial(9), rel=1e-12)
    orders = bounds._permutations(6)
    assert len(np.unique(orders, axis=0)) == len(orders) == 720
    assert np.all(np.sort(orders, axis=1) == np.arange(6))


def test_spearman_range_without_each_point():
    x, y = [1, 2, 3, 4, 5], [1, 2, 3, 4, 0]
    result = bounds.exact_spearman(x, y)
    each = [scipy_spearman(np.delete(x, i), np.delete(y, i))[0] for i in range(5)]
    got = (result.leave_one_out_low, result.leave_one_out_high)
    assert got == pytest.approx((min(each), max(each)))
    assert got[1] == pytest.approx(1.0)


def test_spearman_by_random_orders_needs_a_seed_and_agrees():
    x, y = rng().normal(size=(2, 12))
    with pytest.raises(ValueError, match="pass rng"):
        bounds.exact_spearman(x, y)
    drawn = bounds.exact_spearman(x, y, 20_000, rng())
    approximate = scipy_spearman(x, y)[1]  # t approximation, good to about 0.02 at n = 12
    assert not drawn.exact
    assert drawn.p == pytest.approx(approximate, abs=0.03)


def test_spearman_says_what_it_cannot_give():
    assert bounds.exact_spearman([1, 1, 1, 1], [1, 2, 3, 4]).reason == "one side is constant"
    holed = bounds.exact_spearman([1, NAN, 2, 3], [1, 2, NAN, 3])
    assert (holed.rho, holed.n, holed.n_missing) == (None, 2, 2)
    assert holed.reason
    assert bounds.exact_spearman([1, 1, 1, 2], [1, 2, 3, 4]).reason is not None  # constant without the last


def test_five_sources_and_four_behaviors_cannot_reach_significance():
    five = bounds.spearman_attainable(5, 4)
    assert not five.possible
    assert five.smallest_p == pytest.approx(1 / 60)
    assert "cannot" in five.reason
    assert bounds.spearman_attainable(6, 4).possible
    assert bounds.exact_spearman(np.arange(5), np.arange(5)).p == pytest.approx(five.smallest_p)
