"""Intervals, contrasts, corrections, equivalence, trends, seeds: worked figures, statsmodels and properties."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from fastconv.stats import bounds, power
from fastconv.stats import inference as stats
from fastconv.stats import verdicts as rule
from tests.stats.test_verdicts import evidence

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
        lambda: bounds.sign_flip_p([1.0], 10, rng()),
        lambda: bounds.sign_flip_p(np.ones(20), 0, rng()),
        lambda: stats.tost([1.0, 2.0], 0.0),
        lambda: stats.trend_over_epochs([[1.0, 2.0], [1.0, 2.0]], [3, 3]),
        lambda: stats.trend_over_epochs([[1.0, 2.0], [1.0, 2.0]], [0, 2, 8]),
        lambda: stats.pool_seeds([]),
        lambda: bounds.exact_spearman([1, 2, 3], [1, 2, 3, 4]),
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
