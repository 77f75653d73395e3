"""Gates and cell verdicts on hand-made series: what is not measured is never "no effect"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastconv.recipe import GateSettings, canonical_json
from fastconv.stats import gates
from fastconv.stats.gates import GateVerdict
from fastconv.stats.series import NoRowsError, Number, Series, series_of
from fastconv.stats.verdicts import CellEvidence, Quad, SeedEvidence, by_kind, decide, not_run
from fastconv.store.ledger import Score

RULES = GateSettings(g3_reference_pct={"villain": 90.45})


def rates(*means: float, stage: str = "stage", n: int = 10) -> Series:
    """A series with these question means, each over n samples of 0 and 1."""
    values = np.array([[1.0] * round(mean * n) + [0.0] * (n - round(mean * n)) for mean in means])
    return Series(stage, "refusal", "assistant", tuple(f"q{i:02}" for i in range(len(means))), values)


def accuracy(n_right: int, n: int) -> Series:
    values = np.array([[1.0]] * n_right + [[0.0]] * (n - n_right))
    return Series("stage", "capability", "assistant", tuple(f"q{i:03}" for i in range(n)), values)


# --- evidence ----------------------------------------------------------------------------------------------


def test_a_number_cannot_be_made_without_rows() -> None:
    with pytest.raises(NoRowsError, match=r"0\.5 share has no rows"):
        Number(0.5, "share", ())
    assert Number(0.123, "share", ("a/1",)).text() == "12.3 %"
    assert Number(12.3456, "tok/s", ("a/1",)).text() == "12.3 tok/s"


def test_a_series_averages_samples_within_a_question_first() -> None:
    scores = [Score("q1", i, "rate", float(i == 0)) for i in range(4)] + [Score("q2", 0, "rate", 1.0)]
    one = series_of("a" * 64, "refusal", "assistant", scores)
    assert one.means.tolist() == [0.25, 1.0]
    assert one.mean.value == pytest.approx(0.625)
    assert one.rows == ("aaaaaaaaaaaa/q1", "aaaaaaaaaaaa/q2")
    assert one.mean.rows == one.rows


def test_a_missing_score_is_missing_and_never_zero() -> None:
    scores = [Score("q1", 0, "rate", 1.0), Score("q1", 1, "rate", None, "cut"), Score("q2", 0, "rate", None, "cut")]
    one = series_of("b" * 64, "refusal", "assistant", scores)
    assert one.mean.value == 1.0
    assert one.rows == ("bbbbbbbbbbbb/q1",)
    assert one.n_unscored == 3  # q2's second sample was never drawn: it is missing as well
    nothing = series_of("c" * 64, "refusal", "assistant", [Score("q1", 0, "rate", None, "cut")])
    with pytest.raises(NoRowsError):
        _ = nothing.mean
    with pytest.raises(NoRowsError, match="has no scores"):
        series_of("d" * 64, "refusal", "assistant", [])


# --- G0 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_right", "verdict"), [(15, "fail"), (23, "fail"), (24, "pass"), (60, "pass"), (0, "fail")])
def test_g0_wants_accuracy_above_chance(n_right: int, verdict: str) -> None:
    found = gates.measurable(RULES, "capability", "lowers", accuracy(n_right, 60), 0.25)
    assert found.verdict == verdict
    assert f"({n_right} of 60) against chance 25.0 %" in found.reason
    assert ("nothing is trained" in found.reason) is (verdict == "fail")
    assert len(found.rows) == 60


@pytest.mark.parametrize(
    ("direction", "rate", "verdict"),
    [("raises", 0.0, "pass"), ("raises", 0.9, "pass"), ("raises", 1.0, "fail"), ("lowers", 1.0, "pass"), ("lowers", 0.0, "fail")],
)  # fmt: skip
def test_g0_wants_room_in_the_direction_of_leakage(direction: str, rate: float, verdict: str) -> None:
    found = gates.measurable(RULES, "refusal", direction, rates(rate, rate), None)
    assert found.verdict == verdict
    assert found.threshold == "at least 10 points of room"


# --- the other gates ---------------------------------------------------------------------------------------


def test_stacking_fails_where_a_swap_changed_nothing() -> None:
    good = {"eval/a": {"from_base": 0.3, "from_recorded": 0.0}, "eval/base": {"from_base": 0.0}}
    assert gates.stacking("x", good).verdict == "pass"
    assert gates.stacking("x", good).rows == ("eval/a",)
    assert gates.stacking("x", {**good, "eval/b": {"from_base": 0.0, "from_recorded": 0.0}}).verdict == "fail"
    assert gates.stacking("x", {"eval/base": {"from_base": 0.0}}).verdict == "not applicable"


@pytest.mark.parametrize(
    ("n_right", "verdict"), [(905, "pass"), (875, "pass"), (874, "fail"), (934, "pass"), (935, "fail")]
)
def test_g3_compares_epoch_0_with_the_published_figure(n_right: int, verdict: str) -> None:
    assert gates.reference(RULES, "villain", accuracy(n_right, 1000)).verdict == verdict


def test_g3_without_a_reference_or_a_cell_says_which() -> None:
    assert "no reference" in gates.reference(RULES, "comedian", accuracy(9, 10)).reason
    found = gates.reference(RULES, "villain", None)
    assert (found.verdict, found.rows) == ("not applicable", ())


@pytest.mark.parametrize(
    ("direction", "base", "now", "verdict"),
    [("raises", 0.0, 0.5, "pass"), ("raises", 0.0, 0.4, "fail"), ("lowers", 0.9, 0.3, "pass"), ("lowers", 0.3, 0.9, "fail")],
)  # fmt: skip
def test_the_source_must_show_its_own_behavior(direction: str, base: float, now: float, verdict: str) -> None:
    found = gates.source_shows(RULES, "x", direction, rates(base, base), rates(now, now))
    assert found.verdict == verdict
    assert len(found.numbers) == 2


def _change(by_epoch: dict[int, Series]) -> GateVerdict:
    return gates.convergence_change(RULES, "refusal", "x", by_epoch)


def test_a_change_must_be_large_enough_and_clear_of_zero() -> None:
    zero = rates(*[0.0] * 12)
    assert _change({0: zero, 4: rates(*[0.3] * 6, *[0.2] * 6)}).verdict == "pass"
    assert _change({0: zero, 4: rates(*[0.0] * 11, 1.0)}).verdict == "fail"  # 8 points on average, from one question
    small = rates(*[0.04] * 6, *[0.03] * 6, n=100)
    assert _change({0: rates(*[0.0] * 12, n=100), 4: small}).verdict == "fail"  # clear of zero, under the threshold
    down = _change({0: rates(*[0.8] * 6, *[0.9] * 6), 4: zero})
    assert down.verdict == "pass"
    assert "-85.0 pp" in down.reason


def test_the_largest_change_of_all_epochs_counts() -> None:
    grown = {0: rates(*[0.0] * 12), 4: rates(*[0.0] * 12), 20: rates(*[0.3] * 6, *[0.4] * 6)}
    assert "epoch 20: +35.0 pp" in _change(grown).reason
    assert len(_change(grown).numbers) == 3


@pytest.mark.parametrize("by_epoch", [{}, {0: rates(0.1, 0.2)}, {4: rates(0.1, 0.2)}])
def test_a_change_needs_two_epochs(by_epoch: dict[int, Series]) -> None:
    assert _change(by_epoch).verdict == "not applicable"


# --- unscored samples ------------------------------------------------------------------------------------


def lost(one: Series, n: int, reason: str = "malformed") -> Series:
    """The series without the scores of its first n samples."""
    values = one.values.copy()
    places = [np.unravel_index(place, values.shape) for place in range(n)]
    for place in places:
        values[place] = np.nan
    return replace(one, values=values, lost=tuple((one.questions[row], reason) for row, _ in places))


TEN = rates(*[0.9] * 10)  # 100 samples


@pytest.mark.parametrize(("n", "verdict"), [(5, "pass"), (6, "not applicable"), (100, "not applicable")])
def test_a_gate_on_one_series_says_neither_over_five_percent_unscored(n: int, verdict: str) -> None:
    right = lost(accuracy(90, 100), n)
    found = [
        gates.measurable(RULES, "refusal", "lowers", lost(TEN, n), None),
        gates.measurable(RULES, "capability", "lowers", right, 0.25),
        gates.reference(RULES, "villain", right),
    ]
    for one in found:
        assert (one.verdict, one.unread) == (verdict, verdict != "pass")
        if one.unread:
            assert f"{n}.0 % of the assistant's samples are unscored (at most 5 %): {n} of 100" in one.reason
            assert one.reason.endswith("most often malformed")
            assert one.numbers == ()
            assert one.rows


@pytest.mark.parametrize(("n_now", "n_base", "verdict"), [(3, 0, "pass"), (4, 0, "not applicable"), (1, 5, "not applicable"),
                                                          (5, 5, "pass"), (100, 100, "not applicable")])  # fmt: skip
def test_a_gate_on_two_series_says_neither_where_they_lost_unlike_shares(n_now: int, n_base: int, verdict: str) -> None:
    now, base = lost(TEN, n_now), lost(rates(*[0.1] * 5, *[0.0] * 5), n_base)
    assert gates.source_shows(RULES, "x", "raises", base, now).verdict == verdict
    assert _change({0: base, 20: now}).verdict == verdict
    # An epoch that can be read does not speak for one that cannot.
    assert _change({0: base, 4: lost(TEN, n_base), 20: now}).verdict == verdict


def test_the_commonest_reason_is_told() -> None:
    mixed = lost(TEN, 30)
    kinds = ["truncated"] * 10 + ["judge refused"] * 20
    mixed = replace(mixed, lost=tuple((row, kind) for (row, _), kind in zip(mixed.lost, kinds, strict=True)))
    found = gates.measurable(RULES, "refusal", "lowers", mixed, None)
    assert "30 of 100, most often judge refused" in found.reason
    half = mixed.part(lambda question: question in ("q00", "q01"))
    assert {reason for _, reason in half.lost} == {"truncated", "judge refused"}
    assert len(half.lost) == half.n_unscored


# --- the pilot gate ----------------------------------------------------------------------------------------


def _pilot(**words: str) -> GateVerdict:
    """The pilot's word; keys name gate and subject (`CHANGE_included`), rows are their names."""
    found = []
    for name, word in words.items():
        gate, _, subject = name.partition("_")
        found.append(GateVerdict(gate, subject, word, f"{name} is {word}", "rule", rows=(name,)))
    return gates.pilot("villain x refusal", "refusal", found)


PROVEN = {"G0": "pass", "STACK": "pass"}


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        ({**PROVEN, "SOURCE_a": "pass", "CHANGE_a": "pass"}, "go"),
        ({**PROVEN, "G3": "not applicable", "SOURCE_a": "pass", "CHANGE_a": "pass"}, "go"),
        ({**PROVEN, "SOURCE_a": "pass", "CHANGE_a": "fail"}, "stop"),
        ({**PROVEN, "SOURCE_a": "fail", "CHANGE_a": "pass"}, "stop"),
        ({**PROVEN, "SOURCE_a": "fail", "CHANGE_a": "pass", "SOURCE_b": "pass", "CHANGE_b": "fail"}, "stop"),
        ({**PROVEN, "SOURCE_a": "pass", "CHANGE_a": "fail", "SOURCE_b": "pass", "CHANGE_b": "pass"}, "go"),
        ({**PROVEN, "G3": "fail", "SOURCE_a": "pass", "CHANGE_a": "pass"}, "stop"),
        ({"G0": "pass", "STACK": "fail", "SOURCE_a": "pass", "CHANGE_a": "pass"}, "stop"),
        ({"G0": "pass", "STACK": "not applicable", "SOURCE_a": "pass", "CHANGE_a": "pass"}, "stop"),
        ({"G0": "fail"}, "uninformative"),
        ({**PROVEN, "SOURCE_a": "pass", "CHANGE_a": "not applicable"}, "not applicable"),
        ({"G0": "pass"}, "not applicable"),
        ({}, "not applicable"),
    ],
)
def test_pilot(words: dict[str, str], verdict: str) -> None:
    found = _pilot(**words)
    assert found.verdict == verdict
    assert found.rows == tuple(words)


@pytest.mark.parametrize("gate", ["G0", "G3", "SOURCE", "CHANGE", "KILL"])
def test_a_pilot_that_rests_on_an_unread_gate_says_neither(gate: str) -> None:
    words = {"G0": "pass", "STACK": "pass", "G3": "pass", "SOURCE": "pass", "CHANGE": "pass", "KILL": "pass"}
    found = [GateVerdict(name, "a", word, f"{name} is {word}", "rule") for name, word in words.items()]
    assert gates.pilot("x", "refusal", found).verdict == "go"
    silent = [
        replace(one, verdict="not applicable", reason="60 of 100", unread=True) if one.gate == gate else one
        for one in found
    ]
    one = gates.pilot("x", "refusal", silent)
    assert (one.verdict, one.reason) == ("not applicable", f"{gate} of a cannot be decided: 60 of 100")
    # What is certain without it stays certain.
    broken = [replace(one, verdict="fail") if one.gate == "STACK" else one for one in silent]
    assert gates.pilot("x", "refusal", broken).verdict == "stop"


def test_the_pilots_reason_is_the_gate_that_decided() -> None:
    assert "G3 is fail" in _pilot(**PROVEN, G3="fail", SOURCE_a="pass", CHANGE_a="pass").reason
    assert "source does not show" in _pilot(**PROVEN, SOURCE_a="fail", CHANGE_a="pass").reason
    assert "no convergence-dependent change" in _pilot(**PROVEN, SOURCE_a="pass", CHANGE_a="fail").reason


def test_a_verdict_can_stand_in_the_ledger() -> None:
    found = gates.measurable(RULES, "capability", "lowers", accuracy(40, 60), 0.25)
    assert canonical_json(found.body()).count("stage/q0") == 120  # the rows of the verdict and of its number


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
    assert by_kind([up, down]) == {"transfer": 1, "reverse": 1}


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
    silent = not_run("cell", "not measurable at base", ("a/1",))
    assert (silent.kind, silent.estimate, silent.p_corrected) == ("uninformative", None, None)


def points(*means: float, n: int = 4) -> Series:
    """A judged series, 0 to 100."""
    values = np.array([[mean - 1.0, mean + 1.0] * (n // 2) for mean in means])
    return Series("stage", "misalignment", "assistant", tuple(f"q{i:02}" for i in range(len(means))), values, "points")


def test_points_stay_points_in_thresholds_margins_and_words() -> None:
    high, low = points(*[88.0, 92.0] * 12), points(*[50.0, 50.0] * 12)
    found = gates.convergence_change(RULES, "misalignment", "x", {0: high, 20: low})
    assert found.verdict == "pass"
    assert "-40.0 points" in found.reason
    assert "at least 10 points" in found.threshold
    assert gates.source_shows(RULES, "x", "lowers", high, low).verdict == "pass"
    assert gates.source_shows(RULES, "x", "lowers", high, points(*[75.0] * 24)).verdict == "fail"
    assert gates.measurable(RULES, "misalignment", "lowers", points(*[9.0] * 8), None).verdict == "fail"
    assert gates.measurable(RULES, "misalignment", "lowers", points(*[11.0] * 8), None).verdict == "pass"
    flat = points(*[90.0] * 24)
    evidence = CellEvidence(
        "cell", "misalignment", -1, 10.0, (SeedEvidence(1, Quad(low, high, flat, flat)),), True, "points"
    )
    verdict = decide([evidence])[0]
    assert verdict.kind == "transfer"
    assert "-40.0 points" in verdict.reason
    assert verdict.estimate == pytest.approx(-40.0)


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
    assert found.p_corrected is not None
    assert found.p_corrected < 0.001  # over questions alone it would be clear
    assert (found.kind, found.confidence.level) == ("inconclusive", "LOW")
    assert why in found.reason
    assert "clear of zero over questions" in found.reason


def test_two_seeds_cannot_speak_for_other_seeds() -> None:
    two = decide([_seeds(0.9, -0.1)])[0]
    assert (two.kind, two.over_seeds) == ("transfer", None)


def test_seeds_that_disagree_within_the_margin_are_still_equivalent() -> None:
    found = decide([replace(_seeds(0.1, -0.1, 0.1), margin=0.2)])[0]
    assert (found.kind, found.confidence.reason) == ("equivalent", "the 3 seeds do not agree in sign")


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
    assert any(one.what == "questions" and one.number for one in noisy.mend)
    family = decide([_cell([0.0, 1.0, 0.3, 0.0] * 5, FLAT) for _ in range(10)])[0]
    assert family.detectable_in_family is not None
    assert family.detectable_in_family > family.detectable
