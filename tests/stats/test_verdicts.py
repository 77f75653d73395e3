"""Verdicts: the rule for one cell, and families of cells on hand-made series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from fastconv.stats import bounds, gates
from fastconv.stats import inference as stats
from fastconv.stats import verdicts as rule
from fastconv.stats.series import Series
from fastconv.stats.verdicts import CellEvidence, Quad, SeedEvidence, count_by_kind, decide, untrained_verdict
from tests.stats.test_gates import RULES, rates

NAN = math.nan


def rng() -> np.random.Generator:
    return np.random.default_rng(20240611)


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
        (evidence(-1, seeds=stats.pool_seeds([-2, -2, 1])), "inconclusive", "do not agree in sign"),
        (
            evidence(-1, p_corrected=0.2, unit="points", seeds=stats.pool_seeds([-2, -2, 1])),
            "inconclusive",
            "within the margin of 5 points (over 3 seeds [-5.3, +3.3])",
        ),
        (evidence(-1, seeds=stats.pool_seeds([-1, -1.2, -0.8])), "equivalent", "within the margin"),
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


# --- verdicts of cells -------------------------------------------------------------------------------------


def _cell(
    now: Sequence[float], base: Sequence[float], *, canary_now: Series | None = None, mimicry: Quad | None = None,
    **changes: Any,
) -> CellEvidence:  # fmt: skip
    flat = rates(*[0.0] * len(now))
    trained = Quad(rates(*now), rates(*base), canary_now or flat, flat)
    seeds = (SeedEvidence(42, trained, mimicry),)
    cell = CellEvidence("cell", "refusal", 1, 0.05, seeds, True)
    return replace(cell, **changes)


RISEN, FLAT = [0.8, 0.9] * 10, [0.0] * 20


def test_a_clear_rise_in_the_declared_direction_is_transfer_and_against_it_reverse() -> None:
    up, down = decide([_cell(RISEN, FLAT), _cell(FLAT, RISEN)])
    assert (up.kind, down.kind) == ("transfer", "reverse")
    assert up.estimate == pytest.approx(0.85)
    assert "mimicry was not measured" in up.reason
    assert len(up.rows) == 20  # the four series of this test stand in one stage, and a row is named once
    assert count_by_kind([up, down]) == {"transfer": 1, "reverse": 1}


def test_what_the_canary_does_too_is_taken_off() -> None:
    found = decide([_cell(RISEN, FLAT, canary_now=rates(*RISEN))])[0]
    assert found.kind != "transfer"
    assert found.estimate == pytest.approx(0.0)


def test_what_convergence_alone_does_is_taken_off() -> None:
    flat, risen = rates(*FLAT), rates(*RISEN)
    found = decide([_cell(RISEN, FLAT, mimicry=Quad(risen, flat, flat, flat))])[0]
    assert found.estimate == pytest.approx(0.0)
    assert found.kind != "transfer"
    assert "mimicry was not measured" not in found.reason


def test_a_source_that_shows_nothing_is_told_with_what_it_moved() -> None:
    cell = replace(
        _cell(RISEN, FLAT, source_shows=False), source_moved="from 13.0 % to 46.6 %: 39 % of its room, 50 % asked"
    )
    assert decide([cell])[0].reason.startswith(
        f"the source itself does not show the trained behavior here ({cell.source_moved})"
    )


def test_a_cell_whose_source_shows_nothing_says_nothing() -> None:
    for shows in (False, None):
        assert decide([_cell(RISEN, FLAT, source_shows=shows)])[0].kind == "uninformative"


def test_holm_runs_over_all_cells_together() -> None:
    weak = [0.3, 0.0, 0.1, 0.0, 0.2, 0.0, 0.4, 0.0, 0.0, 0.2]
    alone = decide([_cell(weak, [0.0] * 10)])[0]
    among = decide([_cell(weak, [0.0] * 10) for _ in range(8)])
    assert alone.p_corrected is not None
    assert all(one.p_corrected == pytest.approx(min(1.0, 8 * alone.p_corrected)) for one in among)


def test_declared_contrasts_without_a_measurement_keep_their_place_in_the_family() -> None:
    weak = [0.3, 0.0, 0.1, 0.0, 0.2, 0.0, 0.4]
    cell = _cell(weak, [0.0] * 7)
    alone, first = decide([cell])[0], decide([cell], 6)[0]
    assert alone.p_raw is not None
    assert first.p_corrected == pytest.approx(6 * alone.p_raw)
    assert first.p_sign_flip == pytest.approx(6 * (alone.p_sign_flip or 0.0))
    assert (alone.sign_flip_warning, "6 contrasts require" in (first.sign_flip_warning or "")) == (None, True)
    assert (first.detectable_in_family or 0.0) > (alone.detectable_in_family or 1.0)
    assert decide([], 6) == []
    with pytest.raises(ValueError, match="2 contrasts of a family of 1"):
        decide([cell, cell], 1)


def test_no_cells_give_no_verdicts_and_an_unrun_cell_no_number() -> None:
    assert decide([]) == []
    silent = untrained_verdict("cell", "not measurable at base", ("a/1",))
    assert (silent.kind, silent.estimate, silent.p_corrected) == ("uninformative", None, None)


def points(*means: float, n: int = 4) -> Series:
    """A judged series, 0 to 100."""
    values = np.array([[mean - 1.0, mean + 1.0] * (n // 2) for mean in means])
    return Series("stage", "misalignment", "assistant", tuple(f"q{i:02}" for i in range(len(means))), values, "points")


def test_points_stay_points_in_thresholds_margins_and_words() -> None:
    high, low = points(*[88.0, 92.0] * 12), points(*[44.0, 44.0] * 12)
    found = gates.convergence_change(RULES, "misalignment", "x", {0: high, 20: low})
    assert found.verdict == "pass"
    assert "-46.0 points" in found.reason
    assert "at least 10 points" in found.threshold
    assert gates.source_shows(RULES, "x", "lowers", high, low).verdict == "pass"
    assert gates.source_shows(RULES, "x", "lowers", high, points(*[50.0] * 24)).verdict == "fail"
    assert gates.measurable(RULES, "misalignment", "lowers", points(*[9.0] * 8), None).verdict == "fail"
    assert gates.measurable(RULES, "misalignment", "lowers", points(*[11.0] * 8), None).verdict == "pass"
    flat = points(*[90.0] * 24)
    evidence = CellEvidence(
        "cell", "misalignment", -1, 10.0, (SeedEvidence(1, Quad(low, high, flat, flat)),), True, "points"
    )
    verdict = decide([evidence])[0]
    assert verdict.kind == "transfer"
    assert "-46.0 points" in verdict.reason
    assert verdict.estimate == pytest.approx(-46.0)


def test_a_score_at_its_floor_is_bounded_on_its_own_scale() -> None:
    floor = Series("s", "misalignment", "assistant", tuple(f"q{i}" for i in range(50)), np.zeros((50, 10)), "points")
    evidence = CellEvidence(
        "cell", "misalignment", -1, 10.0, (SeedEvidence(1, Quad(floor, floor, floor, floor)),), True, "points"
    )
    # The bound of 5.8 points lies inside the margin of 10: at the floor twice is an answer here, and none at 5 points.
    assert decide([evidence])[0].kind == "equivalent"
    silent = decide([replace(evidence, margin=5.0)])[0]
    assert silent.kind == "uninformative"
    assert "5.8 points" in silent.reason


def test_zero_hits_in_fifty_by_ten_are_uninformative_with_their_bound() -> None:
    floor = Series("s", "refusal", "assistant", tuple(f"q{i}" for i in range(50)), np.zeros((50, 10)))
    evidence = CellEvidence("cell", "refusal", 1, 0.05, (SeedEvidence(1, Quad(floor, floor, floor, floor)),), True)
    found = decide([evidence])[0]
    assert found.kind == "uninformative"
    assert "5.8 %" in found.reason
    assert found.bound == pytest.approx(0.0582, abs=1e-4)
    assert found.n_effective == 50


def _seeds(*lifts: float) -> CellEvidence:
    """A cell with one seed for each lift of the assistant's rate; a lift below zero is one of the base."""
    flat, noise = rates(*[0.0] * 20), 0.1

    def quad(lift: float) -> Quad:
        if lift < 0:
            return Quad(flat, rates(*[noise - lift, -lift] * 10), flat, flat)
        return Quad(rates(*[lift, lift + noise] * 10), flat, flat, flat)

    return replace(_cell(RISEN, FLAT), seeds=tuple(SeedEvidence(i, quad(lift)) for i, lift in enumerate(lifts)))


def test_seeds_are_averaged_within_a_question_and_decide_the_confidence() -> None:
    one, three, split = (decide([_seeds(*lifts)])[0] for lifts in ((0.5,), (0.5, 0.6, 0.7), (0.5, 0.6, 0.0)))
    assert (one.confidence.level, three.confidence.level) == ("LOW", "MODERATE")
    assert three.estimate == pytest.approx(0.65)
    assert split.confidence.level == "LOW"
    assert decide([_seeds(0.5, 0.6, 0.7, 0.6, 0.5)])[0].confidence.level == "HIGH"


def test_one_row_has_one_estimate_where_seeds_have_other_questions() -> None:
    whole = _seeds(0.5, 0.6, 0.7)
    now = whole.seeds[2].trained.now
    few = replace(now, questions=now.questions[:9], values=now.values[:9] * 0.5)  # 0.35 and 0.4 in place of 0.75
    first, second, third = whole.seeds
    lacking = replace(whole, seeds=(first, second, replace(third, trained=replace(third.trained, now=few))))
    found = decide([lacking])[0]
    over = found.over_seeds
    assert over is not None
    assert over.low is not None
    assert over.high is not None
    per_seed = [float(np.nanmean(seed.transfer(lacking.questions))) for seed in lacking.seeds]
    assert found.estimate != pytest.approx(
        float(np.mean(per_seed)), abs=0.01
    )  # the mean of the seeds is another figure
    assert over.estimate == found.estimate
    assert (over.low + over.high) / 2 == pytest.approx(found.estimate)
    half = 4.302653 * float(np.std(per_seed, ddof=1)) / 3**0.5
    assert over.high - over.low == pytest.approx(2 * half)
    assert over.p_two_sided == pytest.approx(2 * scipy_stats.t.sf(over.estimate / (half / 4.302653), 2), rel=1e-4)


def test_seeds_that_agree_leave_the_word_and_show_their_interval() -> None:
    three, fallen = decide([_seeds(0.5, 0.6, 0.7), _seeds(-0.5, -0.6, -0.7)])
    assert (three.kind, fallen.kind) == ("transfer", "reverse")
    over = three.over_seeds
    assert over is not None
    # 0.55, 0.65 and 0.75: a spread of 0.1 over the root of 3, times Student's t of 2 degrees of freedom
    half = 4.302653 * 0.1 / 3**0.5
    assert (over.low, over.high) == (pytest.approx(0.65 - half), pytest.approx(0.65 + half))
    assert (over.df, over.n_clusters) == (2, 3)
    assert three.body()["seeds_low"] == over.low
    # Seeds that are all alike have no spread and so no interval, which speaks against nothing.
    assert decide([_seeds(0.5, 0.5, 0.5)])[0].kind == "transfer"


@pytest.mark.parametrize(
    ("lifts", "why"),
    [
        ((0.8, 0.9, -0.3), "the 3 seeds do not agree in sign"),
        ((-0.8, -0.9, 0.3), "the 3 seeds do not agree in sign"),
        ((0.8, 0.1, 0.1), "3 seeds agree in sign, but the interval over seeds includes zero"),
        ((0.9, 0.9, 0.9, 0.9, -0.1), "the 5 seeds do not agree in sign"),
    ],
)
def test_seeds_that_do_not_show_it_together_take_the_word_away(lifts: tuple[float, ...], why: str) -> None:
    found = decide([_seeds(*lifts)])[0]
    over_questions = found.over_questions
    assert over_questions is not None
    assert (over_questions.p_two_sided or 1.0) < 0.001  # over questions alone it would be clear
    assert (found.p_corrected or 0.0) > (over_questions.p_two_sided or 1.0)
    assert (found.kind, found.confidence.level) == ("inconclusive", "LOW")
    assert why in found.reason


def test_two_seeds_cannot_speak_for_other_seeds() -> None:
    two = decide([_seeds(0.9, -0.1)])[0]
    assert (two.kind, two.over_seeds) == ("transfer", None)


def test_seeds_must_stay_within_the_margin_to_be_equivalent() -> None:
    found = decide([replace(_seeds(0.1, -0.1, 0.1), margin=0.2)])[0]
    # 0.15, -0.15 and 0.15: 0.05, with a spread of 0.3 over the root of 3, over the root of 3, times t of 2 degrees of freedom
    assert (found.kind, "over 3 seeds [-38.0, +48.0]" in found.reason) == ("inconclusive", True)
    assert decide([replace(_seeds(0.1, -0.1, 0.1), margin=0.6)])[0].kind == "equivalent"


def test_a_withheld_cell_keeps_its_reason_and_shows_no_word() -> None:
    found = decide([_cell(RISEN, FLAT, withheld="8.0 % of the assistant's samples are unscored")])[0]
    assert (found.kind, found.reason) == ("withheld", "8.0 % of the assistant's samples are unscored")
    assert (found.estimate, found.trained, found.confidence.level) == (None, None, "LOW")


def test_eight_questions_warn_that_sign_flips_cannot_reach_the_level() -> None:
    found = decide([_cell(RISEN[:8], FLAT[:8]) for _ in range(16)])
    assert all("8 questions give a sign-flip p" in (one.sign_flip_warning or "") for one in found)
    assert decide([_cell(RISEN, FLAT)])[0].sign_flip_warning is None


def test_what_could_have_been_seen_stands_beside_the_margin_with_its_mend() -> None:
    noisy = decide([_cell([0.0, 1.0, 0.3, 0.0] * 5, FLAT)])[0]
    assert noisy.detectable is not None
    assert noisy.detectable > 0.05
    by_what = {one.what: one for one in noisy.mend}
    assert (by_what["questions"].number, "from run to run" in by_what["questions"].reason) == (None, True)
    assert "not even 100 seeds" in by_what["seeds"].reason  # over these few questions no seed helps
    many = decide([_cell([0.0, 0.1, 0.05, 0.0] * 100, [0.0] * 400)])[0]
    seeds = next(one.number for one in many.mend if one.what == "seeds")
    assert seeds is not None
    assert many.would_find(400, seeds) <= 0.05 < many.would_find(400, seeds - 1)
    family = decide([_cell([0.0, 1.0, 0.3, 0.0] * 5, FLAT) for _ in range(10)])[0]
    assert family.detectable_in_family is not None
    assert family.detectable_in_family > family.detectable
