"""`findings.stats` and `findings.power` against hand-worked figures, statsmodels, brute force, properties."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from fastconv.stats import bounds, power
from fastconv.stats import inference as stats
from fastconv.stats import verdicts as rule

NAN = math.nan
finite = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))
quick = settings(max_examples=40, deadline=None)  # a busy machine is no failure
probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=20)


def rng() -> np.random.Generator:
    return np.random.default_rng(20240611)


# --- question means, intervals, contrasts -------------------------------------------------------------------


def test_means_are_of_what_is_there_and_missing_where_nothing_is():
    values = [[1.0, 0.0, NAN], [NAN, NAN, NAN], [1.0, NAN, NAN]]
    np.testing.assert_array_equal(stats.mean_present(values, axis=1), [0.5, NAN, 1.0])
    np.testing.assert_array_equal(stats.mean_present(values, axis=0), [1.0, 0.0, NAN])


def test_interval_by_hand():
    # mean 5, variance 10, se sqrt(10/5) = 1.41421, t(4, 0.975) = 2.776445, t = 3.535534
    interval = stats.clustered_interval([1, 3, 5, 7, 9, NAN])
    assert interval.estimate == 5
    assert interval.se == pytest.approx(math.sqrt(2))
    assert interval.low == pytest.approx(5 - 2.776445 * math.sqrt(2), abs=1e-6)
    assert interval.high == pytest.approx(5 + 2.776445 * math.sqrt(2), abs=1e-6)
    assert interval.p_two_sided == pytest.approx(0.0241, abs=5e-5)
    assert (interval.df, interval.n_clusters, interval.n_missing, interval.reason) == (4, 5, 1, None)


@given(st.lists(finite, min_size=3, max_size=30), st.randoms(use_true_random=False))
@quick
def test_interval_agrees_with_statsmodels_and_not_with_the_order(values, shuffler):
    interval = stats.clustered_interval(values)
    if interval.reason is not None:
        assert np.ptp(values) == 0
        return
    described = DescrStatsW(values)
    bounds = described.tconfint_mean()
    assert interval.p_two_sided == pytest.approx(described.ttest_mean()[1], abs=1e-9)
    assert (interval.low, interval.high) == pytest.approx(bounds)
    shuffled = list(values)
    shuffler.shuffle(shuffled)
    again = stats.clustered_interval(shuffled)
    assert (again.low, again.high) == pytest.approx((interval.low, interval.high))


@given(st.lists(finite, min_size=3, max_size=10))
@quick
def test_more_clusters_of_the_same_spread_shrink_the_interval(values):
    if np.ptp(values) == 0:
        return
    few, many = (stats.t_interval_kernel(values * copies) for copies in (1, 4))
    assert many.high - many.low < few.high - few.low


@given(st.lists(finite, min_size=2, max_size=20), st.integers(0, 5))
@quick
def test_missing_questions_change_the_count_and_nothing_else(values, n_missing):
    whole, holed = stats.clustered_interval(values), stats.clustered_interval([NAN] * n_missing + values)
    assert holed == replace(whole, n_missing=n_missing)


def test_kernel_matches_the_scalar_path_over_a_leading_axis():
    draws = rng().normal(size=(3, 4, 9))
    kernel = stats.t_interval_kernel(draws, level=0.9)
    for at in np.ndindex(3, 4):
        one = stats.clustered_interval(draws[at], level=0.9)
        got = (kernel.estimate[at], kernel.low[at], kernel.high[at], kernel.se[at], kernel.p_two_sided[at])
        assert got == pytest.approx((one.estimate, one.low, one.high, one.se, one.p_two_sided), rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.0])
def test_equal_changes_have_no_interval_and_no_p(value):
    interval = stats.clustered_interval([value] * 8)
    assert (interval.estimate, interval.se) == (pytest.approx(value), 0)
    assert (interval.low, interval.high, interval.p_two_sided) == (None, None, None)
    assert interval.reason is not None
    assert "same value" in interval.reason


@pytest.mark.parametrize(("values", "estimate"), [([3.0, NAN], 3.0), ([NAN, NAN, NAN], None)])
def test_too_few_questions_left_is_a_reason_not_a_zero(values, estimate):
    interval = stats.clustered_interval(values)
    assert (interval.estimate, interval.low, interval.p_two_sided) == (estimate, None, None)
    assert interval.reason is not None
    assert "at least 2" in interval.reason


def test_contrasts_by_hand():
    now, base = [0.9, 0.5, 0.4, NAN], [0.5, 0.5, 0.1, 0.2]
    canary_now, canary_base = [0.2, 0.2, NAN, 0.1], [0.1, 0.3, 0.0, 0.1]
    change = stats.paired_change(now, base)
    np.testing.assert_allclose(change.per_question, [0.4, 0.0, 0.3, NAN])
    assert change.interval.n_missing == 1
    both = stats.difference_in_differences(now, base, canary_now, canary_base)
    np.testing.assert_allclose(both.per_question, [0.3, 0.1, NAN, NAN])
    assert (both.interval.estimate, both.interval.n_missing) == (pytest.approx(0.2), 2)


def test_transfer_is_zero_when_the_behavior_adapter_adds_nothing():
    random = rng()
    arm = stats.Arm(*random.normal(size=(4, 20)))
    transfer = stats.transfer_contrast(arm, arm)
    np.testing.assert_array_equal(transfer.per_question, np.zeros(20))


def test_transfer_subtracts_the_canarys_drift_once():
    base, spread = np.zeros(6), np.array([-2.0, -1, 0, 0, 1, 2])
    drift, mimicry, transfer = 5.0, 3.0, 7.0
    without = stats.Arm(base + drift + mimicry, base, base + drift, base)
    with_behavior = stats.Arm(base + drift + mimicry + transfer + spread, base, base + drift, base)
    assert stats.transfer_contrast(with_behavior, without).interval.estimate == pytest.approx(transfer)


def test_rounding_of_decimals_is_no_spread():
    # 0.3 - 0.2 - (0.1 - 0) is -2.8e-17 in floating point; a spread of such crumbs would look significant
    contrast = stats.difference_in_differences([0.3, 0.3, 0.5], [0.2, 0.2, 0.4], [0.1] * 3, [0.0] * 3)
    np.testing.assert_array_equal(contrast.per_question, np.zeros(3))
    assert contrast.interval.p_two_sided is None


@given(st.lists(st.one_of(finite, st.just(NAN)), min_size=4, max_size=12))
@quick
def test_a_missing_side_is_never_read_as_zero(values):
    now, base = np.array(values), np.full(len(values), 50.0)
    change = stats.paired_change(now, base)
    np.testing.assert_array_equal(np.isnan(change.per_question), np.isnan(now))
    assert change.interval.n_missing == np.isnan(now).sum()
    if change.interval.estimate is not None:
        assert change.interval.estimate == pytest.approx(np.nanmean(now) - 50.0)


# --- corrections --------------------------------------------------------------------------------------------


@given(probabilities)
@settings(quick, max_examples=20)  # statsmodels' Holm collects garbage at every call
@pytest.mark.parametrize(
    ("ours", "theirs"), [(stats.holm, "holm"), (stats.benjamini_hochberg, "fdr_bh")], ids=["holm", "bh"]
)
def test_corrections_agree_with_statsmodels(ours, theirs, p):
    assert ours(p) == pytest.approx(np.asarray(multipletests(p, method=theirs)[1]), abs=1e-9, rel=0)


@given(probabilities, st.randoms(use_true_random=False))
@quick
def test_corrections_are_no_smaller_than_raw_and_do_not_know_the_order(p, shuffler):
    order = list(range(len(p)))
    shuffler.shuffle(order)
    raw = np.array(p)
    for correct in (stats.holm, stats.benjamini_hochberg):
        corrected = correct(raw)
        assert np.all(corrected >= raw)
        assert np.all(corrected <= 1)
        np.testing.assert_array_equal(correct(raw[order]), corrected[order])
    assert np.all(stats.holm(raw) >= stats.benjamini_hochberg(raw) - 1e-12)


def test_a_contrast_without_p_keeps_its_place_in_the_family():
    np.testing.assert_allclose(stats.holm([0.01, NAN, 0.04]), [0.03, NAN, 0.08])
    np.testing.assert_allclose(stats.benjamini_hochberg([0.01, NAN, 0.04]), [0.03, NAN, 0.06])


def test_corrections_work_over_a_leading_axis():
    p = rng().uniform(size=(5, 7))
    for correct in (stats.holm, stats.benjamini_hochberg):
        np.testing.assert_array_equal(correct(p), np.stack([correct(row) for row in p]))


# --- sign flips ---------------------------------------------------------------------------------------------


def test_sign_flip_by_hand():
    # 2^3 patterns of 1, 2, 3: |sum| is 6, 4, 2, 0 twice each; 2 of 8 reach 6
    assert stats.sign_flip_p([1, 2, 3], 10, rng()).p == 0.25
    assert stats.sign_flip_p([1, 2, -3], 10, rng()).p == 1.0
    assert stats.sign_flip_p([0.0, 0.0], 10, rng()).p == 1.0


def test_sign_flip_agrees_with_scipys_exact_permutation_test():
    x = rng().normal(0.4, 1, size=10)
    oracle = scipy_stats.permutation_test(
        (x,), lambda values: np.abs(np.sum(values)), permutation_type="samples", n_resamples=2**10,
        alternative="greater", vectorized=False,
    )  # fmt: skip
    assert stats.sign_flip_p(x, 10, rng()).p == pytest.approx(oracle.pvalue, abs=1e-12)


def test_monte_carlo_sign_flip_is_close_to_exact_and_never_zero(monkeypatch):
    x = rng().normal(0.5, 1, size=14)
    exact = stats.sign_flip_p(x, 10, rng())
    monkeypatch.setattr(stats, "EXACT_SIGN_FLIPS", 0)
    drawn = stats.sign_flip_p(x, 20_000, rng())
    assert exact.exact
    assert not drawn.exact
    assert exact.p is not None
    assert drawn.p == pytest.approx(exact.p, abs=4 * math.sqrt(exact.p / 20_000))
    assert stats.sign_flip_p(np.arange(1, 61), 99, rng()).p == 1 / 100


def test_sign_flip_floor_knows_that_zeros_do_not_flip():
    flip = stats.sign_flip_p([1.0, 1.0, 1.0, 0.0, 0.0, NAN], 10, rng())
    assert (flip.p, flip.floor, flip.n_clusters, flip.n_missing) == (0.25, 0.25, 5, 1)
    assert stats.sign_flip_p([NAN, NAN], 10, rng()).p is None


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


# --- equivalence, trend, seeds ------------------------------------------------------------------------------


@given(st.lists(finite, min_size=3, max_size=20), st.floats(0.1, 60))
@quick
def test_tost_agrees_with_statsmodels(values, margin):
    result = stats.tost(values, margin)
    if result.reason is not None:
        assert np.ptp(values) == 0
        assert result.equivalent is None
        assert result.p is None
        return
    p, lower, upper = DescrStatsW(values).ttost_mean(-margin, margin)
    assert (result.p, result.p_lower, result.p_upper) == pytest.approx((p, lower[1], upper[1]), abs=1e-9)


@given(st.lists(finite, min_size=3, max_size=20), st.floats(0.1, 60))
@quick
def test_tost_is_the_ninety_percent_interval_inside_the_margin(values, margin):
    result = stats.tost(values, margin)
    low, high = result.interval.low, result.interval.high
    if low is None or high is None or min(abs(low + margin), abs(high - margin)) < 1e-6:
        return
    assert result.equivalent == (-margin < low and high < margin)


def test_tost_by_hand():
    # mean 0, se sqrt(2.5 / 5), t(4, 0.95) = 2.131847: the 90 % interval is +-1.5074, the 95 % one +-1.96
    values = [-2.0, -1.0, 0.0, 1.0, 2.0]
    inside, outside = stats.tost(values, 1.51), stats.tost(values, 1.50)
    assert inside.interval.high == pytest.approx(2.131847 * math.sqrt(0.5), abs=1e-5)
    assert (inside.equivalent, outside.equivalent) == (True, False)
    assert inside.p == pytest.approx(0.0498, abs=2e-4)


def test_trend_by_hand():
    epochs = [0, 2, 8, 20]
    slopes = np.array([0.5, -1.0, 2.0, 0.0])
    values = 3 + slopes[:, None] * np.array(epochs)
    values = np.vstack([values, [1, NAN, 2, 3]])
    trend = stats.trend_over_epochs(values, epochs)
    np.testing.assert_allclose(trend.per_question, [*slopes, NAN], atol=1e-12)
    assert trend.interval.estimate == pytest.approx(0.375)
    assert (trend.interval.n_clusters, trend.interval.n_missing) == (4, 1)


def test_a_flat_line_has_no_trend_of_rounding():
    values = np.repeat([[0.3], [0.1], [0.7]], 3, axis=1)  # the mean of three times 0.1 is not 0.1
    np.testing.assert_array_equal(stats.trend_over_epochs(values, [0, 2, 8]).per_question, np.zeros(3))


def test_trend_fits_by_least_squares():
    values = rng().normal(size=(6, 4))
    fitted = np.polynomial.polynomial.polyfit([0, 4, 10, 20], values.T, 1)[1]
    np.testing.assert_allclose(stats.trend_over_epochs(values, [0, 4, 10, 20]).per_question, fitted)


@pytest.mark.parametrize(
    ("estimates", "level"),
    [
        ([5.0], "LOW"),
        ([5.0, 5.1], "LOW"),
        ([5.0, 5.1, 5.2], "MODERATE"),
        ([-5.0, -5.1, -5.2, -5.3], "MODERATE"),
        ([5.0, 5.1, 5.2, 5.3, 5.4], "HIGH"),
        ([5.0, 5.1, 5.2, 5.3, -0.1], "LOW"),
        ([5.0, 0.1, 0.1], "LOW"),  # one sign, but the interval includes zero
        ([5.0, 5.1, 0.0], "LOW"),  # zero has no sign
        ([5.0, 5.1, NAN, NAN], "LOW"),
        ([5.0, 5.0, 5.0], "LOW"),  # no spread, no interval
    ],
)
def test_confidence_follows_the_seeds(estimates, level):
    clear = stats.clustered_interval([5.0, 5.2, 4.8])
    assert stats.confidence_level(stats.pool_seeds(estimates), clear).level == level


def test_seeds_that_agree_are_not_enough_where_other_questions_might_not():
    noisy = stats.clustered_interval([30.0, -20.0, 5.0])
    found = stats.confidence_level(stats.pool_seeds([5.0, 5.1, 5.2]), noisy)
    assert (found.level, found.reason) == (
        "LOW",
        "3 seeds agree in sign, but the interval over questions includes zero",
    )


def test_seeds_are_the_outer_cluster():
    pool = stats.pool_seeds([1.0, 3.0, 5.0])
    assert (pool.n_seeds, pool.interval.df, pool.interval.estimate) == (3, 2, 3.0)
    assert pool.interval.high == pytest.approx(3 + 4.302653 * 2 / math.sqrt(3), abs=1e-5)
    single = stats.pool_seeds([2.0])
    assert (single.interval.estimate, single.interval.low) == (2.0, None)


# --- chance, effective samples, bounds ----------------------------------------------------------------------


def test_above_chance_is_the_exact_binomial():
    # P(X >= 4 | 5, 1/2) = (5 + 1) / 32
    assert bounds.above_chance(4, 5, 0.5).p_one_sided == pytest.approx(6 / 32)
    assert bounds.above_chance(0, 5, 0.5).p_one_sided == 1.0
    oracle = scipy_stats.binomtest(200, 586, 0.29, alternative="greater").pvalue
    result = bounds.above_chance(200, 586, 0.29)
    assert result.p_one_sided == pytest.approx(oracle, rel=1e-9)
    assert result.above
    assert not bounds.above_chance(180, 586, 0.29).above


def test_chance_is_the_larger_of_guessing_and_one_letter():
    assert bounds.multiple_choice_chance([4, 4, 4, 4], [0, 1, 2, 3]) == 0.25
    assert bounds.multiple_choice_chance([4, 4, 4, 4], [0, 1, 1, 3]) == 0.5
    assert bounds.multiple_choice_chance([2, 4], ["A", "B"]) == 0.5
    assert bounds.multiple_choice_chance([4, 3, 5], [0, 1, 2]) == pytest.approx(1 / 3)


def test_effective_sample_by_hand():
    # means 1 and 3, MSB = 2 * 2 = 4, MSW = (0.5 + 0.5) / 2... both questions spread +-1: MSW = 2
    sample = bounds.effective_sample_size([[0.0, 2.0], [2.0, 4.0]])
    assert sample.icc == pytest.approx((4 - 2) / (4 + 2))
    assert sample.design_effect == pytest.approx(4 / 3)
    assert sample.n_effective == pytest.approx(3)
    assert (sample.sd_question, sample.sd_sample) == pytest.approx((1.0, math.sqrt(2)))


def test_effective_sample_with_unequal_questions_by_hand():
    # sizes 3 and 1, means 1 and 5, grand mean 2: MSB = 3 + 9 = 12, MSW = 2/2 = 1, n0 = 4 - 10/4 = 1.5
    sample = bounds.effective_sample_size([[0.0, 1.0, 2.0], [5.0, NAN, NAN], [NAN, NAN, NAN]])
    icc = (12 - 1) / (12 - 1 + 1.5)
    assert sample.icc == pytest.approx(icc)
    assert sample.n_effective == pytest.approx(4 / (1 + 1.5 * icc))
    assert (sample.n_samples, sample.n_questions, sample.n_missing) == (4, 2, 5)


def test_effective_sample_runs_from_questions_to_samples():
    alike = np.repeat(rng().normal(size=(30, 1)), 10, axis=1)
    assert bounds.effective_sample_size(alike).n_effective == pytest.approx(30)
    loose = bounds.effective_sample_size(rng().normal(size=(30, 10)))
    assert 150 < loose.n_effective <= 300
    half = rng().normal(size=(2000, 1)) + rng().normal(size=(2000, 10))
    assert bounds.effective_sample_size(half).icc == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("values", [np.zeros((50, 10)), np.ones((50, 10)), np.arange(50.0)[:, None]])
def test_where_icc_cannot_be_seen_a_question_counts_once(values):
    sample = bounds.effective_sample_size(values)
    assert (sample.n_effective, sample.icc) == (50, None)
    assert sample.reason


def test_zero_hits_in_fifty_questions_leave_six_percent():
    assert bounds.zero_hits_upper_bound(50) == pytest.approx(0.0582, abs=5e-5)
    assert bounds.zero_hits_upper_bound(20) == pytest.approx(scipy_stats.beta.ppf(0.95, 1, 20))
    floor = bounds.clustered_rate_bound(np.zeros((50, 10)))
    assert (floor.extreme, floor.lower, floor.n_effective) == ("floor", 0.0, 50)
    assert floor.upper == floor.room == pytest.approx(0.0582, abs=5e-5)
    ceiling = bounds.clustered_rate_bound(np.ones((50, 10)))
    assert (ceiling.extreme, ceiling.upper) == ("ceiling", 1.0)
    assert ceiling.lower == pytest.approx(1 - 0.0582, abs=5e-5)
    assert ceiling.room == floor.room


def test_bounds_are_only_for_the_extremes():
    mixed = bounds.clustered_rate_bound([[0.0, 1.0], [0.0, 0.0]])
    assert (mixed.rate, mixed.extreme, mixed.upper, mixed.room) == (0.25, None, None, None)
    assert mixed.reason
    empty = bounds.clustered_rate_bound([[NAN], [NAN]])
    assert (empty.rate, empty.upper) == (None, None)
    assert empty.reason


# --- Spearman -----------------------------------------------------------------------------------------------


def scipy_spearman(x, y) -> tuple[float, float]:
    rho, p = np.asarray(scipy_stats.spearmanr(x, y), dtype=float)
    return rho, p


@given(st.integers(3, 7), st.booleans(), st.integers(0, 10_000))
@settings(quick, max_examples=15)
def test_exact_spearman_agrees_with_brute_force(n, tied, seed):
    random = np.random.default_rng(seed)
    x, y = (random.integers(0, 4, size=(2, n)) if tied else random.normal(size=(2, n))).astype(float)
    result = stats.exact_spearman(x, y)
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
    assert stats.exact_spearman(x, x).p == pytest.approx(2 / math.factorial(9), rel=1e-12)
    orders = stats._permutations(6)
    assert len(np.unique(orders, axis=0)) == len(orders) == 720
    assert np.all(np.sort(orders, axis=1) == np.arange(6))


def test_spearman_range_without_each_point():
    x, y = [1, 2, 3, 4, 5], [1, 2, 3, 4, 0]
    result = stats.exact_spearman(x, y)
    each = [scipy_spearman(np.delete(x, i), np.delete(y, i))[0] for i in range(5)]
    got = (result.leave_one_out_low, result.leave_one_out_high)
    assert got == pytest.approx((min(each), max(each)))
    assert got[1] == pytest.approx(1.0)


def test_spearman_by_random_orders_needs_a_seed_and_agrees():
    x, y = rng().normal(size=(2, 12))
    with pytest.raises(ValueError, match="pass rng"):
        stats.exact_spearman(x, y)
    drawn = stats.exact_spearman(x, y, 20_000, rng())
    approximate = scipy_spearman(x, y)[1]  # t approximation, good to about 0.02 at n = 12
    assert not drawn.exact
    assert drawn.p == pytest.approx(approximate, abs=0.03)


def test_spearman_says_what_it_cannot_give():
    assert stats.exact_spearman([1, 1, 1, 1], [1, 2, 3, 4]).reason == "one side is constant"
    holed = stats.exact_spearman([1, NAN, 2, 3], [1, 2, NAN, 3])
    assert (holed.rho, holed.n, holed.n_missing) == (None, 2, 2)
    assert holed.reason
    assert stats.exact_spearman([1, 1, 1, 2], [1, 2, 3, 4]).reason is not None  # constant without the last


def test_five_sources_and_four_behaviors_cannot_reach_significance():
    five = bounds.spearman_attainable(5, 4)
    assert not five.possible
    assert five.smallest_p == pytest.approx(1 / 60)
    assert "cannot" in five.reason
    assert bounds.spearman_attainable(6, 4).possible
    assert stats.exact_spearman(np.arange(5), np.arange(5)).p == pytest.approx(five.smallest_p)


# --- power --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clusters", [8, 50, 586])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 80])
def test_minimum_detectable_effect_agrees_with_statsmodels(clusters, alpha):
    result = power.minimum_detectable_effect(15.0, clusters, alpha)
    assert result.effect is not None
    # one side at alpha / 2: statsmodels' two-sided power is NaN at 8 clusters and 0.05 / 80
    achieved = TTestPower().power(result.effect / 15.0, clusters, alpha / 2, alternative="larger")
    assert achieved == pytest.approx(0.8, abs=1e-9)


def test_eight_alignment_questions_cannot_show_the_threshold_of_ten_points():
    # delta(0.05, 0.8, 7 df) = 3.26976, by sqrt(8)
    detectable = power.minimum_detectable_effect(15.0, 8)
    assert detectable.effect == pytest.approx(3.26976 * 15 / math.sqrt(8), abs=1e-3)
    needed = power.clusters_needed(10.0, 15.0)
    assert needed.number == 20
    enough, short = (power.minimum_detectable_effect(15.0, n).effect for n in (20, 19))
    assert enough is not None
    assert short is not None
    assert enough <= 10 < short


def test_rate_spread_by_hand():
    # p(1-p) = 0.0475; two terms; 0.5 + 0.5 / 10 = 0.55
    assert power.rate_contrast_sd(0.05, 10, 0.5) == pytest.approx(math.sqrt(2 * 0.0475 * 0.55))
    assert power.rate_contrast_sd(0.05, 10, 0.5, n_terms=8, pairing=1.0) == pytest.approx(math.sqrt(8 * 0.0475 * 0.05))
    rate = power.minimum_detectable_rate_change(0.05, 50, 10, 0.5)
    assert rate == power.minimum_detectable_effect(power.rate_contrast_sd(0.05, 10, 0.5), 50)


@given(st.floats(0.5, 30), st.floats(0.0, 20), st.floats(0.1, 40), st.integers(4, 300))
@quick
def test_samples_needed_is_the_smallest_number_that_mends(effect, sd_question, sd_sample, clusters):
    def detectable(samples: float) -> float:
        sd = math.sqrt(sd_question**2 + sd_sample**2 / samples)
        found = power.minimum_detectable_effect(sd, clusters).effect
        assert found is not None
        return found

    needed = power.samples_needed(effect, sd_question, sd_sample, clusters)
    if needed.number is None:
        assert detectable(1e12) >= effect * (1 - 1e-9)
        assert "add questions" in needed.reason
    else:
        assert detectable(needed.number) <= effect * (1 + 1e-9)
        assert needed.number == 1 or detectable(needed.number - 1) > effect * (1 - 1e-9)


def test_what_no_number_can_mend_says_so():
    assert power.clusters_needed(1e-6, 15.0).number is None
    assert "not even 100 seeds" in power.seeds_needed(0.1, 15.0).reason
    assert power.seeds_needed(10.0, None).number is None
    assert power.seeds_needed(10.0, 5.0).number == 5
    assert "add questions" in power.samples_needed(10.0, 12.0, 10.0, 8).reason
    assert power.samples_needed(5.0, NAN, 1.0, 8).number is None
    assert power.samples_needed(5.0, 0.0, 0.0, 8).number == 1
    for spread in (0.0, NAN, None):
        unknown = power.minimum_detectable_effect(spread, 8)
        assert unknown.effect is None
        assert unknown.reason


# --- verdicts -----------------------------------------------------------------------------------------------


def evidence(shift: float, spread: float = 1.0, margin: float = 5.0, **changes) -> rule.Evidence:
    per_question = shift + spread * np.linspace(-1, 1, 20)
    interval = stats.clustered_interval(per_question)
    made = rule.Evidence(-1, interval, interval.p_two_sided, stats.tost(per_question, margin), True, True)
    return replace(made, **changes)


FLOOR = bounds.clustered_rate_bound(np.zeros((50, 10)))
CEILING = bounds.clustered_rate_bound(np.ones((50, 10)))
WIDE_FLOOR = bounds.clustered_rate_bound(np.zeros((100, 10)))


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        (evidence(-10), "transfer", "in the direction of leakage"),
        (evidence(-10, direction=1), "reverse", "against the direction"),
        (evidence(10), "reverse", "against the direction"),
        (evidence(10, direction=1), "transfer", "in the direction of leakage"),
        (evidence(0), "equivalent", "within the margin"),
        (evidence(-1), "equivalent", "differs from zero, by less than declared to matter"),
        (evidence(0, spread=50), "inconclusive", "neither clear of zero"),
        (evidence(-10, p_corrected=0.06), "inconclusive", "corrected p = 0.06"),
        (evidence(-10, p_corrected=None), "inconclusive", "no corrected p-value"),
        (evidence(-10, p_sign_flip_corrected=0.4), "transfer", "sign-flip check disagrees"),
        (evidence(-10, seeds=stats.pool_seeds([-9, -10, -11])), "transfer", "in the direction of leakage"),
        (evidence(-10, seeds=stats.pool_seeds([-31, 1])), "transfer", "in the direction of leakage"),
        (evidence(-10, seeds=stats.pool_seeds([-16, -15, 1])), "inconclusive", "the 3 seeds do not agree in sign"),
        (evidence(10, seeds=stats.pool_seeds([28, 1, 1])), "inconclusive", "interval over seeds includes zero"),
        (evidence(-1, seeds=stats.pool_seeds([-2, -2, 1])), "equivalent", "within the margin"),
        (evidence(-10, measurable_at_base=False), "uninformative", "not measurable at base"),
        (evidence(-10, measurable_at_base=None), "uninformative", "not measured"),
        (evidence(-10, source_shows_behavior=False), "uninformative", "source itself"),
        (evidence(-10, source_shows_behavior=None), "uninformative", "source was not measured"),
        (evidence(-7, spread=0), "inconclusive", "no interval"),
    ],
)
def test_verdicts(case, kind, words):
    result = rule.verdict(case)
    assert result.kind == kind
    assert words in result.reason
    assert "None" not in result.reason
    assert "nan" not in result.reason


def test_zero_hits_are_uninformative_not_equal():
    silent = evidence(0, spread=0, margin=0.05, direction=1, bound_base=FLOOR, bound_now=FLOOR)
    result = rule.verdict(silent)
    assert result.kind == "uninformative"
    assert "5.8 %" in result.reason
    assert "floor" in result.reason
    assert rule.verdict(replace(silent, bound_base=CEILING, bound_now=CEILING)).kind == "uninformative"
    # a hundred questions bound the rate under the margin: then no hit at both epochs is an answer
    loud = rule.verdict(replace(silent, bound_base=WIDE_FLOOR, bound_now=WIDE_FLOOR))
    assert loud.kind == "equivalent"
    assert "inside the margin" in loud.reason


def test_a_single_question_at_the_floor_is_not_an_answer():
    alone = stats.clustered_interval([0.0, NAN])
    silent = evidence(0, spread=0, margin=0.05, bound_base=WIDE_FLOOR, bound_now=WIDE_FLOOR, contrast=alone)
    assert rule.verdict(silent).kind == "inconclusive"


def test_from_floor_to_ceiling_is_a_change_not_a_floor():
    moved = evidence(-10, margin=0.05, bound_base=FLOOR, bound_now=CEILING)
    assert rule.verdict(moved).kind == "transfer"


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.clustered_interval([]),
        lambda: stats.clustered_interval([1.0, math.inf]),
        lambda: stats.clustered_interval([1.0, 2.0], level=95),
        lambda: stats.t_interval_kernel(np.ones((3, 1))),
        lambda: stats.paired_change([1.0, 2.0], [1.0, 2.0, 3.0]),
        lambda: stats.difference_in_differences([1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0]),
        lambda: stats.holm([]),
        lambda: stats.holm([1.2]),
        lambda: stats.benjamini_hochberg([-0.1]),
        lambda: stats.sign_flip_p([1.0], 10, rng()),
        lambda: stats.sign_flip_p(np.ones(20), 0, rng()),
        lambda: stats.tost([1.0, 2.0], 0.0),
        lambda: stats.trend_over_epochs([[1.0, 2.0], [1.0, 2.0]], [3, 3]),
        lambda: stats.trend_over_epochs([[1.0, 2.0], [1.0, 2.0]], [0, 2, 8]),
        lambda: stats.pool_seeds([]),
        lambda: stats.exact_spearman([1, 2, 3], [1, 2, 3, 4]),
        lambda: rule.verdict(evidence(-10, direction=0)),
        lambda: rule.verdict(evidence(0, equivalence=stats.tost([1.0, 2.0, 4.0], 5.0))),
        lambda: rule.verdict(evidence(0, spread=50, p_corrected=0.001)),  # smaller than the raw p
        lambda: bounds.above_chance(6, 5, 0.5),
        lambda: bounds.above_chance(1, 5, 1.0),
        lambda: bounds.multiple_choice_chance([4, 4], ["A"]),
        lambda: bounds.multiple_choice_chance([0], ["A"]),
        lambda: bounds.effective_sample_size([[1.0, 2.0]]),
        lambda: bounds.clustered_rate_bound([[0.0], [2.0]]),
        lambda: bounds.zero_hits_upper_bound(0),
        lambda: bounds.questions_for_family(0),
        lambda: bounds.spearman_attainable(5, 0),
        lambda: power.minimum_detectable_effect(15.0, 1),
        lambda: power.minimum_detectable_effect(-1.0, 8),
        lambda: power.minimum_detectable_effect(1.0, 8, power=0.01),
        lambda: power.clusters_needed(0.0, 1.0),
        lambda: power.samples_needed(1.0, -1.0, 1.0, 8),
        lambda: power.rate_contrast_sd(0.05, 0, 0.5),
    ],
)
def test_malformed_input_is_refused(call):
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        call()


def test_one_question_has_a_mean_and_no_interval():
    found = stats.clustered_interval([8.5])
    assert (found.estimate, found.low, found.high, found.n_clusters) == (8.5, None, None, 1)
    assert found.reason
    alone = stats.trend_over_epochs([[1.0, 3.0]], [0, 2]).interval
    assert (alone.estimate, alone.low) == (1.0, None)


def test_results_are_frozen():
    result = stats.clustered_interval([1.0, 2.0])
    assert "estimate" in {field.name for field in fields(result)}
    with pytest.raises(AttributeError):
        result.estimate = 0.0  # pyright: ignore[reportAttributeAccessIssue]
