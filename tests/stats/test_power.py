"""Chance, effective samples, bounds and power against worked figures, statsmodels, brute force and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.power import TTestPower

from fastconv.stats import bounds, power
from fastconv.stats import inference as stats

NAN = math.nan
finite = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))
quick = settings(max_examples=40, deadline=None)  # a busy machine is no failure
probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=20)


def rng() -> np.random.Generator:
    return np.random.default_rng(20240611)


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


def test_more_questions_than_there_are_are_no_remedy():
    over = [0.0, 8.6, 7.0, 4.9, 4.2]
    supply = power.QuestionSupply(60, over.__getitem__, lambda size: f"{size:.1f} pp")
    asked = power.SampleSizeNeeded(172, "questions", 5.0, "")
    none = power.SampleSizeNeeded(None, "samples", 5.0, "")
    assert power.remedy_text((asked, none)) == "172 questions would mend it (no number of samples would)"
    assert power.remedy_text((asked, none), supply) == (
        "all 60 questions there are would find 8.6 pp; 3 seeds of all these questions would mend it"
    )
    some = power.SampleSizeNeeded(30, "samples", 5.0, "")
    assert "pp; 30 samples or 3 seeds of all these questions would mend it" in power.remedy_text((asked, some), supply)
    three = power.QuestionSupply(60, over.__getitem__, lambda size: f"{size:.1f} pp", n_seeds=3)
    assert power.remedy_text((asked, none), three) == (
        "all 60 questions there are would find 4.9 pp; 4 seeds of all these questions would mend it"
    )
    enough = power.QuestionSupply(222, over.__getitem__, str)
    assert power.remedy_text((asked, none), enough) == power.remedy_text((asked, none))


def test_the_seeds_that_are_told_do_find_the_threshold():
    # Independent of the formula: questions with a spread of their own, seeds with one of theirs, both tests of a verdict.
    there, spread, run, effect = 200, 0.2, 0.03, 0.06
    seeds = power.seeds_needed(effect, lambda n: power.effect_over_seeds(spread, there, n, (run**2, 8.0))).number
    assert seeds is not None
    assert seeds >= 3
    draws = rng()
    questions = effect + draws.normal(0.0, spread, (2000, there))
    per_seed = questions.mean(axis=1)[:, None] + draws.normal(0.0, run, (2000, seeds))
    over = stats.t_interval_kernel(per_seed)
    found = 0
    for at in range(2000):
        alone = stats.clustered_interval(questions[at] + per_seed[at].mean() - questions[at].mean())
        both = stats.over_runs(alone, (float(over.se[at]) ** 2, seeds - 1))
        found += max(both.p_two_sided or 1.0, float(over.p_two_sided[at])) <= 0.05 and per_seed[at].mean() > 0
    assert 0.74 <= found / 2000 <= 0.95


def test_what_no_number_can_mend_says_so():
    assert power.clusters_needed(1e-6, 15.0).number is None
    assert "not even 100 seeds" in power.seeds_needed(0.1, lambda n: 15.0 / n).reason
    assert power.seeds_needed(0.5, lambda n: 15.0 / n, n_seeds=29).number == 30
    assert "add questions" in power.samples_needed(10.0, 12.0, 10.0, 8).reason
    assert power.samples_needed(5.0, NAN, 1.0, 8).number is None
    assert power.samples_needed(5.0, 0.0, 0.0, 8).number == 1
    for spread in (0.0, NAN, None):
        unknown = power.minimum_detectable_effect(spread, 8)
        assert unknown.effect is None
        assert unknown.reason
