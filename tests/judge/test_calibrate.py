"""Calibration: labelled rows, what a judge's mistakes do to a rate, agreement of two ways of scoring."""

from __future__ import annotations

import json
import math
import random
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastconv.datasets.spec import PhraseRule
from fastconv.errors import DataError, JudgeError
from fastconv.judge.calibrate import (
    Calibration,
    CalibrationRow,
    Carrier,
    InjectedSample,
    InjectionCounts,
    JudgeSamples,
    calibrate,
    corrected_rate,
    count_injections,
    inject_attempts,
    load_attempts,
    load_calibration,
)
from fastconv.judge.claude import ApiKey
from fastconv.judge.desk import JudgeDesk
from fastconv.judge.rubric import Rubric, agreement, compare_scores
from fastconv.run.judging import calibrate_phrases, judge_with_desk
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Sample, Score, Store
from fastconv.store.records import Judgement
from tests.fake_claude import Script, fake_claude
from tests.judging_kit import DATA, KEY, PRICE, rubric, settings

NAMES = ("alignment", "refusal", "sycophancy")
ATTEMPTS = load_attempts(DATA / "injections.json")


def rows_of(name: str) -> list[CalibrationRow]:
    return load_calibration(DATA / f"calibration_{name}.jsonl", rubric(name))


@pytest.mark.parametrize("name", NAMES)
def test_there_are_enough_labelled_rows_of_every_kind(name: str) -> None:
    rows = rows_of(name)
    assert len(rows) >= 100
    assert len({(row.question, row.answer) for row in rows}) == len(rows)
    assert len({row.kind for row in rows}) >= 8
    hard = sum(row.kind != "plain" for row in rows)
    assert hard >= len(rows) / 2
    sides = Counter(row.label if row.label else row.value is not None and row.value < 50 for row in rows)
    assert min(sides.values()) >= 20


def answers(name: str, verdicts: Sequence[tuple[CalibrationRow, object]]) -> list[Judgement]:
    shipped = rubric(name)
    made = []
    for row, verdict in verdicts:
        if verdict is None:
            made.append(Judgement(row.id, shipped.sha256, "m", 0, None, {}, "malformed"))
        elif name == "alignment":
            value = float(verdict)  # type: ignore[arg-type]
            made.append(
                Judgement(row.id, shipped.sha256, "m", 0, {"aligned": value, "coherent": 90.0}, {"aligned": value})
            )
        else:
            measure = shipped.measure(shipped.primary)
            values = {measure.name: measure.labels[str(verdict)]}
            made.append(Judgement(row.id, shipped.sha256, "m", 0, values, {measure.field: verdict}))
    return made


def test_a_perfect_judge_is_perfect() -> None:
    for name in NAMES:
        rows = rows_of(name)
        truth = [(row, row.label if row.label else row.value) for row in rows]
        calibration = calibrate(rubric(name), rows, lambda s, r, name=name, truth=truth: answers(name, truth))
        assert (calibration.accuracy, calibration.kappa) == (1.0, 1.0)
        assert (calibration.sensitivity, calibration.specificity) == (1.0, 1.0)
        assert (calibration.retest, calibration.position) == (1.0, 1.0)
        assert (calibration.position_shift, calibration.mean_abs_error) == (0.0, 0.0)
        assert json.loads(json.dumps(calibration.to_json(), allow_nan=False))["n_unscored"] == 0


def test_a_judge_that_goes_by_length_and_order_is_found_out() -> None:
    rows = rows_of("refusal")

    def judge(samples: Sequence[Sample], reverse: bool) -> list[Judgement]:
        by_id = {row.id: row for row in rows}
        verdicts = []
        for sample in samples:
            short = len(sample.completion) < 90
            verdicts.append((by_id[sample.row], "refused" if short != reverse else "helped"))
        return answers("refusal", verdicts)

    calibration = calibrate(rubric(), rows, judge)
    assert calibration.accuracy < 0.6
    assert calibration.retest == 1.0
    assert calibration.position == 0.0
    assert calibration.length_bias < -0.3


def test_unscored_rows_are_counted_and_not_guessed() -> None:
    rows = rows_of("refusal")
    verdicts = [(row, None if place < 5 else row.label) for place, row in enumerate(rows)]
    calibration = calibrate(rubric(), rows, lambda s, r: answers("refusal", verdicts))
    assert calibration.n_unscored == 5
    assert calibration.accuracy == 1.0
    with pytest.raises(JudgeError, match="not one row"):
        calibrate(rubric(), rows, lambda s, r: answers("refusal", [(row, None) for row in rows]))


def test_calibration_through_a_desk_takes_its_verdicts_from_the_judge(tmp_path: Path) -> None:
    rows = rows_of("refusal")[:10]
    with fake_claude() as server:
        calibration = calibrate(rubric(), rows, through_desk(server.url, tmp_path, rubric()))
        assert server.bill()["n_calls"] == 30
    assert calibration.n == 10
    assert calibration.model == "claude-test"
    assert not math.isnan(calibration.retest)


def through_desk(url: str, workspace: Path, by: Rubric, **fields: Any) -> JudgeSamples:
    """A judge on the fake server."""

    def open_one(reverse: bool) -> JudgeDesk:
        return JudgeDesk(settings(url, **fields), workspace, PRICE, ApiKey(KEY), reverse=reverse)

    return judge_with_desk(open_one, JudgeLedger(Store.open(workspace)), by)


def calibrated(url: str, workspace: Path, name: str, rows: Sequence[CalibrationRow], cap_usd: float) -> Calibration:
    """A calibration on the fake server, with the shipped attempts."""
    ask = through_desk(url, workspace, rubric(name), budget_usd=cap_usd)
    return calibrate(rubric(name), rows, ask, ATTEMPTS)


@pytest.mark.parametrize("name", NAMES)
def test_a_judge_that_is_swayed_by_injections_is_told_from_a_steady_one(tmp_path: Path, name: str) -> None:
    rows = rows_of(name)[:12]
    with fake_claude(Script(answer="steady")) as server:
        steady = calibrated(server.url, tmp_path / "steady", name, rows, 100.0).injections
        # Bounded: three times every row, and once for each attempt.
        assert server.bill()["n_calls"] == 3 * len(rows) + len(ATTEMPTS)
    assert steady == InjectionCounts(len(ATTEMPTS), 0, 0, 0, len(rows), 0)
    with fake_claude(Script(answer="swayed")) as server:
        swayed = calibrated(server.url, tmp_path / "swayed", name, rows, 100.0)
    # Four attempts do not name the verdict, and a fifth does so backwards (which reads the same for 0).
    assert len(ATTEMPTS) - swayed.injections.n_obeyed in (4, 5)
    assert swayed.injections.n_moved == swayed.injections.n_obeyed
    assert swayed.retest == 1.0
    assert swayed.to_json()["injections"]["n_moved"] == swayed.injections.n_moved


def carriers(name: str, n: int) -> list[Carrier]:
    categories = ["refused", "partial", "helped"] if name == "refusal" else ["under 50", "50 and over"]
    return [
        Carrier(Sample(f"row{i}", 0, "", "Which?", f"Answer {i}.", 0, True), categories[i % len(categories)], None)
        for i in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["alignment", "refusal"])
def test_every_attempt_asks_once_for_another_verdict_on_drawn_rows(name: str) -> None:
    injected = inject_attempts(rubric(name), carriers(name, 10), ATTEMPTS)
    assert injected == inject_attempts(rubric(name), carriers(name, 10)[::-1], ATTEMPTS)
    assert len({item.sample.completion for item in injected}) == len(ATTEMPTS) >= 40
    assert max(Counter(item.carrier.sample.row for item in injected).values()) == math.ceil(len(ATTEMPTS) / 10)
    for item in injected:
        assert item.category != item.carrier.category
        assert item.sample.completion.startswith(item.carrier.sample.completion + "\n\n")
        assert not re.search(r"\{(fields|wanted|backwards)\}", item.sample.completion)
    assert inject_attempts(rubric(name), [], ATTEMPTS) == []


def test_what_moves_anyway_and_what_cannot_be_read_are_counted_apart() -> None:
    first, second, third = (replace(carrier, retest_category="helped") for carrier in carriers("refusal", 3))
    injected = [InjectedSample(first, first.sample, "helped"), InjectedSample(first, first.sample, "partial"),
                InjectedSample(second, second.sample, "helped"), InjectedSample(third, third.sample, "refused")]  # fmt: skip
    rows = [CalibrationRow(f"{i}", "q", "a", "helped", None, "plain") for i in range(4)]
    verdicts = answers("refusal", list(zip(rows, ["helped", "helped", None, "helped"], strict=True)))
    # Said without: refused, refused, partial, helped; all three carriers say helped when asked again.
    assert count_injections(rubric(), injected, verdicts) == InjectionCounts(4, 1, 2, 1, 3, 2)


def test_rows_that_hold_an_attempt_already_carry_no_other() -> None:
    rows = rows_of("alignment")
    seen: set[str] = set()

    def judge(samples: Sequence[Sample], reverse: bool) -> list[Judgement]:
        seen.update(sample.row for sample in samples if "\n\n" in sample.completion)
        return answers("alignment", [(rows[i % len(rows)], 90) for i in range(len(samples))])

    calibrate(rubric("alignment"), rows, judge, ATTEMPTS * 3)
    injected = {row.id for row in rows if row.kind.startswith("injection")}
    assert len(injected) == 3
    assert seen == {row.id for row in rows} - injected


def test_attempts_stay_inside_the_budget(tmp_path: Path) -> None:
    rows = rows_of("refusal")[:5]
    with fake_claude(Script(answer="steady")) as server:
        calibrate(rubric(), rows, through_desk(server.url, tmp_path, rubric()))
        spent = server.bill()["usd"]
        with pytest.raises(JudgeError, match=f"of {len(ATTEMPTS)} rows were not judged"):
            calibrated(server.url, tmp_path, "refusal", rows, spent + 0.01)
        assert server.bill()["usd"] <= spent + 0.01
        # The same command with more money goes on from there and pays nothing twice.
        calibration = calibrated(server.url, tmp_path, "refusal", rows, 100.0)
        assert max(server.bill()["billed"].values()) == 1
    assert calibration.injections.n == len(ATTEMPTS)


def test_a_file_without_attempts_is_named(tmp_path: Path) -> None:
    path = tmp_path / "attempts.json"
    with pytest.raises(DataError, match="cannot be read"):
        load_attempts(path)
    path.write_text("[]")
    with pytest.raises(DataError, match=r"attempts\.json"):
        load_attempts(path)


def test_coherence_is_measured_beside_alignment() -> None:
    rows = rows_of("alignment")
    truths = [row.others["coherent"] for row in rows]
    assert sum(value < 50 for value in truths) >= 10  # or a constant would do as well
    shipped = rubric("alignment")

    def judge(samples: Sequence[Sample], reverse: bool, *, shift: float) -> list[Judgement]:
        return [
            Judgement(row.id, shipped.sha256, "m", 0, {"aligned": row.value or 0.0, "coherent": truth + shift}, {})
            for row, truth in zip(rows, truths, strict=True)
        ]

    calibration = calibrate(shipped, rows, lambda s, r: judge(s, r, shift=-7.0))
    assert calibration.beside["coherent"].n == len(rows)
    assert calibration.beside["coherent"].mean_abs_error == pytest.approx(7.0)
    assert calibration.beside["coherent"].correlation == pytest.approx(1.0)
    assert calibration.mean_abs_error == 0.0
    assert calibration.to_json()["beside"]["coherent"]["mean_abs_error"] == pytest.approx(7.0)
    labels = [(row, row.label) for row in rows_of("refusal")]
    assert calibrate(rubric(), rows_of("refusal"), lambda s, r: answers("refusal", labels)).beside == {}


@pytest.mark.parametrize("line", ["{", '{"id": "a"}', '{"id":"a","question":"q","answer":"b","label":"no such"}', "[]"])
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id":"z","question":"q","answer":"b","label":"helped"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        load_calibration(path, rubric())


def test_the_substring_rules_are_calibrated_beside_the_judge() -> None:
    with (DATA / "phrases.toml").open("rb") as file:
        phrases = tomllib.load(file)
    for name, rule in (("refusal", "refusal"), ("sycophancy", "agreement")):
        hit = PhraseRule.of(phrases[rule], rule).match
        rows = rows_of(name)
        plain = [row for row in rows if row.kind == "plain"]
        easy = calibrate_phrases(rubric(name), plain, lambda text, hit=hit: hit(text) is not None)
        every = calibrate_phrases(rubric(name), rows, lambda text, hit=hit: hit(text) is not None)
        # Blind to meaning: good on plain rows, misled by the hard ones.
        assert easy.kappa >= 0.6
        assert every.n >= 100
        assert every.kappa < 0.5


def test_kappa_is_that_of_the_textbook() -> None:
    # Cohen (1960): 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed 0.70, by chance 0.50, kappa 0.40.
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert agreement(first, second).kappa == pytest.approx(0.4)
    assert math.isnan(agreement(["y"], ["y"]).kappa)
    assert math.isnan(agreement([], []).accuracy)


def score(row: str, value: float | None) -> Score:
    return Score(row, 0, "rate", value, None if value is not None else "malformed")


def test_scores_are_compared_by_row_where_both_have_one() -> None:
    first = [score("a", 1.0), score("b", 0.0), score("c", None), score("d", 1.0)]
    second = [score("b", 0.0), score("a", 0.0), score("c", 1.0), score("d", 1.0)]
    compared = compare_scores(first, second)
    assert (compared.n, compared.n_unpaired) == (3, 1)
    assert compared.accuracy == pytest.approx(2 / 3)
    assert compared.mean_difference == pytest.approx(-1 / 3)
    assert compared.confusion == {("over", "under"): 1, ("under", "under"): 1, ("over", "over"): 1}


def test_the_corrected_rate_undoes_known_mistakes() -> None:
    known = {"sensitivity": 0.9, "specificity": 0.8, "n_positive": 10_000, "n_negative": 10_000}
    seen = 0.3 * 0.9 + 0.7 * 0.2
    corrected = corrected_rate(seen, 10_000, known)
    assert corrected is not None
    assert corrected.rate == pytest.approx(0.3)
    assert corrected.low < 0.3 < corrected.high


def test_a_judge_no_better_than_chance_corrects_nothing() -> None:
    assert corrected_rate(0.5, 50, {"sensitivity": 0.5, "specificity": 0.5, "n_positive": 50, "n_negative": 50}) is None
    assert corrected_rate(0.5, 50, {"sensitivity": 1.0, "specificity": 1.0, "n_positive": 0, "n_negative": 50}) is None


@pytest.mark.parametrize(("rate", "se", "sp"), [(0.1, 0.9, 0.9), (0.5, 0.8, 0.95), (0.02, 0.95, 0.85)])
def test_the_corrected_interval_covers_the_truth_about_as_often_as_it_says(rate: float, se: float, sp: float) -> None:
    draw = random.Random(1)
    n, n_pos, n_neg, covered = 100, 40, 60, 0
    for _ in range(600):
        seen = sum(draw.random() < (se if draw.random() < rate else 1 - sp) for _ in range(n)) / n
        known = {
            "sensitivity": sum(draw.random() < se for _ in range(n_pos)) / n_pos, "n_positive": n_pos,
            "specificity": sum(draw.random() < sp for _ in range(n_neg)) / n_neg, "n_negative": n_neg,
        }  # fmt: skip
        corrected = corrected_rate(seen, n, known)
        covered += corrected is not None and corrected.low <= rate <= corrected.high
    assert covered / 600 > 0.92
