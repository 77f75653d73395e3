"""Gates on training and over the study, and published tables under the same rules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fastconv.cli import app
from fastconv.recipe import GateSettings
from fastconv.report.blocks import render_html, render_markdown
from fastconv.report.published import (
    SummaryTable,
    judge_published,
    published_names,
    published_report,
    read_published,
    summary_claim,
)
from fastconv.report.verify import verify_published
from fastconv.stats import gates, study_gates
from fastconv.stats.gates import Loss
from fastconv.stats.series import NoRowsError, Series
from fastconv.stats.study_gates import Role, Shift
from tests import ROOT

RULES = GateSettings()
QWEN = "Qwen/Qwen2.5-7B-Instruct"
PUBLISHED = ROOT.parent / "shared" / "data" / "published_results.json"
#: Behavior -> its column in the published results, and what our unit is multiplied by to be theirs.
COLUMNS = {
    "capability": ("arc_c_pct", 100.0), "misalignment": ("alignment_0_100", 1.0), "refusal": ("refusal_rate", 1.0),
    "sycophancy": ("sycophancy_rate", 1.0),
}  # fmt: skip
FOUR = ("villain", "comedian", "software_engineer", "kindergarten_teacher")


def series(mean: float) -> Series:
    return Series("a" * 64, "refusal", "villain", ("q1", "q2"), np.full((2, 2), mean))


# --- G1, G2, G3.5, KILL ------------------------------------------------------------------------------------


def test_g1_wants_the_protocols_rows_and_no_refusal() -> None:
    assert gates.data_ready("x", 800, 800, "k" * 64, ()).verdict == "pass"
    assert gates.data_ready("x", 800, 799, "k" * 64, ()).verdict == "fail"
    refused = gates.data_ready("x", 800, 800, "k" * 64, ("D101",))
    assert (refused.verdict, "D101" in refused.reason) == ("fail", True)
    assert gates.data_ready("x", 800, None, "", ()).verdict == "not applicable"


@pytest.mark.parametrize(("loss", "verdict"), [(0.99, "pass"), (1.0, "fail"), (2.0, "fail")])
def test_g2_wants_a_low_loss_on_the_registered_base(loss: float, verdict: str) -> None:
    found = gates.converged(RULES, QWEN, "villain", (), Loss(loss, "k" * 64))
    assert (found.verdict, found.rows) == (verdict, ("kkkkkkkkkkkk/last_epoch_loss",))


def test_g2_has_no_limit_for_other_bases_unless_the_recipe_gives_one() -> None:
    assert gates.converged(RULES, "builtin:smollm2", "v", (), Loss(3.0, "k")).verdict == "not applicable"
    own = GateSettings(g2_loss=2.0)
    assert gates.converged(own, "builtin:smollm2", "v", (), Loss(3.0, "k")).verdict == "fail"
    waiting = gates.converged(RULES, QWEN, "v", ("snapshot/villain/source/e8/s42",), Loss(0.1, "k"))
    assert (waiting.verdict, "e8" in waiting.reason) == ("not applicable", True)


@pytest.mark.parametrize(("later", "verdict"), [(0.6, "pass"), (0.61, "fail"), (0.4, "pass"), (0.05, "pass")])
def test_g35_compares_the_training_loss_with_epoch_0(later: float, verdict: str) -> None:
    found = gates.same_loss(RULES, "x", {0: Loss(0.5, "a"), 8: Loss(0.5, "b"), 20: Loss(later, "c")})
    assert found.verdict == verdict
    assert len(found.rows) == 3


@pytest.mark.parametrize(
    ("zero", "later", "verdict"), [(0.002, 0.04, "pass"), (0.002, 0.06, "fail"), (0.06, 0.002, "pass")]
)
def test_g35_does_not_compare_losses_that_are_next_to_nothing(zero: float, later: float, verdict: str) -> None:
    found = gates.same_loss(RULES, "x", {0: Loss(zero, "a"), 8: Loss(zero, "b"), 20: Loss(later, "c")})
    assert found.verdict == verdict


def test_kill_fires_when_the_source_falls_back_to_the_base() -> None:
    def found(*moved: float) -> str:
        by_epoch = dict(zip((0, 2, 8), map(series, moved), strict=False))
        return study_gates.reverted(RULES, "x", "raises", series(0.0), by_epoch).verdict

    assert found(0.9, 0.8, 0.3) == "pass"
    assert found(0.9, 0.8, 0.2) == "fail"
    assert found(0.3, 0.0, 0.0) == "not applicable"  # it never showed the behavior
    assert found(0.9) == "not applicable"


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_kill_says_neither_where_an_end_is_too_much_unscored(place: int) -> None:
    ends = [series(mean) for mean in (0.0, 0.9, 0.8, 0.1)]
    assert study_gates.reverted(RULES, "x", "raises", ends[0], dict(enumerate(ends[1:]))).verdict == "fail"
    ends[place] = replace(
        ends[place], values=np.full((2, 2), np.nan), lost=(("q1", "expired"),) * 2 + (("q2", "expired"),) * 2
    )
    found = study_gates.reverted(RULES, "x", "raises", ends[0], dict(enumerate(ends[1:])))
    assert (found.verdict, found.numbers, found.unread) == ("not applicable", (), True)
    assert "4 of 4, most often expired" in found.reason


# --- G4, G5, confirm, falsify ------------------------------------------------------------------------------


def shift(source: str, behavior: str, value: float, epoch: int = 20, role: Role = "assistant") -> Shift:
    row = f"{source}/{behavior}/{role}/e{epoch}"
    return Shift(source, behavior, epoch, role, value, "share", 0.05, (row,))


def matrix(moving: dict[str, int], **others: Shift) -> list[Shift]:
    """Shifts of four sources in two behaviors; `moving` says in how many each moves."""
    found = []
    for source in FOUR:
        for place, behavior in enumerate(("capability", "refusal")):
            found.append(shift(source, behavior, 0.2 if place < moving.get(source, 0) else 0.01))
    return [*found, *others.values()]


def test_g4_and_g5_ask_the_first_sources_for_a_signal() -> None:
    quiet, loud = matrix({}), matrix({"comedian": 1})
    assert study_gates.signal(RULES, "s", quiet).verdict == "fail"
    assert study_gates.signal(RULES, "s", matrix({"villain": 1})).verdict == "pass"
    assert study_gates.signal(RULES, "s", []).verdict == "not applicable"
    assert study_gates.first_sources(RULES, "s", quiet, FOUR).verdict == "fail"
    assert study_gates.first_sources(RULES, "s", loud, FOUR).verdict == "pass"
    late = matrix({"kindergarten_teacher": 2})
    assert study_gates.first_sources(RULES, "s", late, FOUR).verdict == "fail"  # the fourth source does not count
    assert study_gates.first_sources(RULES, "s", loud, FOUR[:2]).verdict == "not applicable"


def test_g4_asks_the_grids_first_source_unless_the_recipe_names_one() -> None:
    quiet, loud = matrix({"comedian": 1}), matrix({"villain": 1})
    order = ["comedian", "villain"]
    assert study_gates.signal(RULES, "s", quiet, order).verdict == "pass"
    assert study_gates.signal(RULES, "s", loud, order).verdict == "fail"
    assert study_gates.signal(RULES, "s", loud, order).threshold.startswith("comedian shifts")
    named = GateSettings(g4_source="villain")
    assert study_gates.signal(named, "s", loud, order).verdict == "pass"
    gone = study_gates.signal(GateSettings(g4_source="nurse"), "s", loud, order)
    assert (gone.verdict, gone.reason) == ("not applicable", "nurse (gates.g4_source) is no source of this grid")


@pytest.mark.parametrize(
    ("moving", "confirm", "falsify"),
    [(dict.fromkeys(FOUR[:3], 2), "pass", "pass"), (dict.fromkeys(FOUR[:2], 2), "fail", "pass"),
     (dict.fromkeys(FOUR, 1), "fail", "fail"), ({"villain": 2}, "fail", "fail")],
)  # fmt: skip
def test_confirm_and_falsify_count_sources_in_two_behaviors(moving: dict[str, int], confirm: str, falsify: str) -> None:
    assert study_gates.confirm(RULES, "s", matrix(moving), FOUR).verdict == confirm
    assert study_gates.falsify(RULES, "s", matrix(moving), FOUR).verdict == falsify


def test_a_control_that_shifts_as_much_falsifies() -> None:
    all_move = dict.fromkeys(FOUR, 2)
    control = matrix(all_move, control=shift("librarian", "refusal", 0.3))
    canary = matrix(all_move, canary=shift("villain", "refusal", -0.25, role="canary"))
    small = matrix(all_move, canary=shift("villain", "refusal", 0.1, role="canary"))
    assert "negative control shifts as much" in study_gates.falsify(RULES, "s", control, FOUR).reason
    assert "canary shifts as much" in study_gates.falsify(RULES, "s", canary, FOUR).reason
    assert study_gates.falsify(RULES, "s", small, FOUR).verdict == "pass"


@pytest.mark.parametrize(
    ("source", "behavior", "role", "epoch", "silent"),
    [
        ("villain", "refusal", "assistant", 20, {"G4", "G5", "CONFIRM", "FALSIFY"}),
        ("villain", "refusal", "assistant", 8, {"G4", "G5"}),
        ("kindergarten_teacher", "refusal", "assistant", 20, {"CONFIRM", "FALSIFY"}),
        ("villain", "refusal", "canary", 20, {"FALSIFY"}), ("librarian", "refusal", "assistant", 20, {"FALSIFY"}),
    ],
)  # fmt: skip
def test_rules_over_the_study_say_neither_where_a_shift_cannot_be_read(
    source: str, behavior: str, role: Role, epoch: int, silent: set[str]
) -> None:
    every = matrix(
        dict.fromkeys(FOUR, 2), canary=shift("villain", "refusal", 0.01, role="canary"),
        control=shift("librarian", "refusal", 0.01), early=shift("villain", "refusal", 0.2, epoch=8),
    )  # fmt: skip
    assert {one.verdict for one in study_gates.study(RULES, "s", every, FOUR)} == {"pass"}
    where = (source, behavior, role, epoch)
    unread = [
        replace(one, value=float("nan"), unread="60.0 % are unscored")
        if (one.source, one.behavior, one.role, one.epoch) == where else one
        for one in every
    ]  # fmt: skip
    found = {one.gate: one for one in study_gates.study(RULES, "s", unread, FOUR)}
    assert {gate for gate, one in found.items() if one.verdict == "not applicable"} == silent
    assert all(one.verdict == "pass" for gate, one in found.items() if gate not in silent)
    for gate in silent:
        assert f"{source} {behavior} at epoch {epoch}: 60.0 % are unscored" in found[gate].reason
        assert (found[gate].numbers, found[gate].unread) == ((), True)


def test_the_last_epoch_decides_and_every_row_is_named() -> None:
    early = [shift(source, behavior, 0.3, epoch=8) for source in FOUR for behavior in ("capability", "refusal")]
    found = study_gates.confirm(RULES, "s", [*early, *matrix({})], FOUR)
    assert found.verdict == "fail"
    assert len(found.rows) == 8
    assert study_gates.confirm(RULES, "s", matrix({})[:6], FOUR).verdict == "not applicable"


# --- the published tables ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> SummaryTable:
    return read_published()


def test_the_published_tables_give_the_published_verdicts(table: SummaryTable) -> None:
    found = {one.gate: one for one in judge_published(table).gates}
    assert (found["CONFIRM"].verdict, found["FALSIFY"].verdict) == ("fail", "fail")
    assert "largest change of capability -2.6 pp (software_engineer)" in found["CONFIRM"].reason
    assert found["CONFIRM"].rows[0].startswith("issue_112_v1/capability/")


def test_every_evidence_verdict_on_published_figures_is_withheld_with_its_reason(table: SummaryTable) -> None:
    verdicts = judge_published(table).verdicts
    assert {one.kind for one in verdicts} == {"withheld"}
    assert all("no samples" in one.reason and "one seed" in one.reason for one in verdicts)
    assert all("at its floor" in one.reason for one in verdicts if one.behavior == "refusal")
    assert not [one for one in verdicts if "at its floor" in one.reason and one.behavior == "capability"]


def test_the_alignment_column_is_refused_because_its_data_fail_the_audit(table: SummaryTable) -> None:
    judged = judge_published(table)
    assert judged.refused == (
        "misalignment: the audit refuses its training rows (D101: the source's rows are trained without the prompt that "
        "it is evaluated under)",
    )
    assert not [one for one in judged.verdicts if one.behavior == "misalignment"]
    with pytest.raises(NoRowsError):
        table.number("villain", "misalignment", 20)
    sound = replace(table, refusals={})
    assert [one for one in judge_published(sound).verdicts if one.behavior == "misalignment"]


def test_a_figure_that_no_table_holds_cannot_be_made_or_rendered(table: SummaryTable) -> None:
    assert table.number("villain", "sycophancy", 20).value == 0.026
    with pytest.raises(NoRowsError):
        table.number("villain", "sycophancy", 20, "canary")
    data = published_report(judge_published(table))
    for page in (render_html(data), render_markdown(data)):
        assert "canary sycophancy" not in page
        assert "refused" in page
        assert "32.8" not in page  # no figure of the refused column
        assert "-2.6 pp" in page


def test_the_published_verb_prints_the_words_and_writes_the_page(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["published", "--reports", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "CONFIRM issue_112_v1: fail" in shown.stdout
    assert "refusal: 15 contrasts withheld (no samples are published" in shown.stdout
    assert "refused: misalignment: the audit refuses its training rows (D101: the source's rows are" in shown.stdout
    assert "Content-Security-Policy" in (tmp_path / "issue_112_v1.html").read_text()
    assert (tmp_path / "issue_112_v1.md").is_file()
    answer = json.loads(CliRunner().invoke(app, ["published", "--json"]).stdout)
    assert [one["table"] for one in answer["tables"]] == list(published_names())
    assert {one["kind"] for table in answer["tables"] for one in table["verdicts"]} == {"withheld"}


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published figures are not beside the checkout")
def test_every_retyped_figure_is_the_published_one() -> None:
    published = json.loads(PUBLISHED.read_text())
    seen = 0
    for name, part, columns in (
        ("issue_112_v1", "issue_112_v1_assistant", COLUMNS),
        ("issue_112_v3", "issue_112_v3_assistant", {k: v for k, v in COLUMNS.items() if k != "capability"}),
        ("issue_109", "issue_109_assistant_marker_rate_pct", {"marker": ("", 100.0)}),
    ):
        table, theirs = read_published(name), published[part]
        assert set(table.behaviors) == set(columns)
        assert table.epochs == tuple(theirs["convergence_epochs"])
        assert set(table.sources) == set(theirs["by_source"])
        for one in table.figures:
            column, factor = columns[one.behavior]
            rates = theirs["by_source"][one.source][column] if column else theirs["by_source"][one.source]
            assert one.value * factor == pytest.approx(rates[table.epochs.index(one.epoch)], abs=1e-9), one
            seen += 1
    assert seen == 4 * 5 * 4 + 3 * 3 * 4 + 7 * 11


def test_the_judged_table_moves_the_villain_and_can_confirm_nothing() -> None:
    found = {one.gate: one for one in judge_published(read_published("issue_112_v3")).gates}
    assert (found["G4"].verdict, found["CONFIRM"].verdict, found["FALSIFY"].verdict) == (
        "pass", "not applicable", "not applicable",
    )  # fmt: skip
    assert "villain misalignment -38.9 points at epoch 2" in found["G4"].reason
    assert "needs 3 sources" in found["CONFIRM"].reason


def test_five_sources_and_four_behaviors_cannot_reach_significance(table: SummaryTable) -> None:
    said = {claim.id: claim for claim in published_report(judge_published(table)).claims()}
    assert said["attainable"].text.startswith("5 sources with a marker rate and 4 behaviors: ")
    assert "cannot reach" in said["attainable"].text
    assert len(said["attainable"].rows) == 5
    assert all(row.startswith("issue_109/marker/") and row.endswith("/e20") for row in said["attainable"].rows)
    # Ranks of the change by hand: capability 3 4 1 5 2, marker 5 4 2 3 1, so 1 - 6 * 10 / 120.
    assert "is +0.50 (exact permutation p = " in said["correlation:capability"].text
    assert "correlation:misalignment" not in said  # its column is refused
    fewer = published_report(judge_published(read_published("issue_112_v3"))).claims()
    assert next(one.text for one in fewer if one.query == "attainable").startswith("3 sources with a marker rate")
    assert not [
        one for one in published_report(judge_published(read_published("issue_109"))).claims() if one.query != "answer"
    ]


@pytest.mark.parametrize("name", ["issue_112_v1", "issue_112_v3", "issue_109"])
def test_the_page_leads_with_what_the_figures_amount_to(name: str) -> None:
    judged = judge_published(read_published(name))
    data = published_report(judged)
    first = data.sections[0].blocks[0]
    assert first == summary_claim(judged)
    assert "neither for nor against transfer" in first.text
    assert f"{len(judged.verdicts)} contrasts is withheld (no samples are published" in first.text
    assert first.text in render_markdown(data)
    if name == "issue_112_v1":
        assert "is not confirmed (0 of 4 sources do" in first.text
        assert "and falsified (" in first.text
        assert "D101: the source's rows are trained without the prompt" in first.text
    else:
        assert "The rules over a whole study cannot be asked of this table" in first.text


def test_verify_compares_a_published_page_with_the_shipped_table(tmp_path: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["published", "--reports", str(tmp_path)]).exit_code == 0
    nowhere = ["-w", str(tmp_path / "no_workspace")]
    for name in published_names():
        for path in (tmp_path / f"{name}.html", tmp_path / f"{name}.md"):
            shown = runner.invoke(app, ["verify", str(path), *nowhere])
            assert shown.exit_code == 0, shown.output
            assert f"{name}: " in shown.stdout
    page = tmp_path / "issue_112_v1.html"
    text = page.read_text()
    page.write_text(text.replace("capability -2.6 pp", "capability -9.6 pp"))
    found = verify_published(page)
    assert found is not None
    assert ("changed", "answer:issue_112_v1") in {(one.what, one.where) for one in found.differences}
    shown = runner.invoke(app, ["verify", str(page), *nowhere])
    assert shown.exit_code == 9
    assert "data/published.toml: " in shown.stdout
    claim = text.index('data-query="attainable"')
    page.write_text(text[:claim] + text[claim:].replace('data-query="attainable"', 'data-query="invented"', 1))
    found = verify_published(page)
    assert found is not None
    assert {"missing", "left out"} <= {one.what for one in found.differences}
    assert runner.invoke(app, ["verify", str(page), *nowhere]).exit_code == 9
    other = tmp_path / "other.md"
    other.write_text("# some-run-12345678\n")
    assert verify_published(other) is None
