"""What one look at a ledger decides: withheld verdicts, the answer on the first page, edited thresholds."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from fastconv.deciding.decided import Decided
from fastconv.findings.report import render_html
from fastconv.graph import CellPlan, Graph
from fastconv.recipe import Recipe, parse_recipe
from fastconv.reporting import build
from fastconv.reporting.claims import NoSuchClaimError, ask
from fastconv.reporting.frames import frames_of
from fastconv.reporting.verifying import verify
from fastconv.store import Store
from tests.loop_kit import copy_ledger
from tests.scale_kit import fill, matrix_recipe

LABEL = "villain source e20 refusal included"


@pytest.fixture(scope="module")
def kept(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """One source, one seed, two epochs, refusal with 50 questions x 2 samples: every change is there to be found."""
    table = matrix_recipe(tiny_qwen, n_sources=1, seeds=1, samples=2).model_dump(mode="json")
    table["grid"] |= {"epochs": [0, 20], "behaviors": ["none", "refusal"], "negatives": ["included"]}
    recipe, workspace = parse_recipe(table), tmp_path_factory.mktemp("kept") / "w"
    fill(recipe, workspace)[1].close()
    return recipe, workspace


@pytest.fixture
def small(kept: tuple[Recipe, Path], tmp_path: Path) -> tuple[Recipe, Path]:
    """A copy of that ledger for a test to spoil."""
    return kept[0], copy_ledger(kept[1], tmp_path / "w")


def unscore(workspace: Path, plan: CellPlan, persona: str, n: int, *, base: bool = False) -> None:
    """Take the score of the first n samples of a refusal measurement away, as a judge that answered badly would."""
    db = sqlite3.connect(workspace / "ledger.sqlite")
    key = (plan.base if base else plan.scores)["refusal", persona].key
    places = db.execute(
        "SELECT row, sample FROM scores WHERE stage=? ORDER BY sample, row LIMIT ?", (key, n)
    ).fetchall()
    statement = "UPDATE scores SET value=NULL, reason='malformed' WHERE stage=? AND row=? AND sample=?"
    db.executemany(statement, [(key, *place) for place in places])
    db.commit()
    db.close()


def plan_of(recipe: Recipe, behavior: str, negatives: str, epoch: int = 20) -> CellPlan:
    return Graph(recipe).select("villain", behavior, epoch, negatives=negatives)[0]


@pytest.mark.parametrize(
    ("behavior", "persona", "n", "why"),
    [
        ("refusal", "assistant", 6, "6.0 % of the assistant's samples are unscored (at most 5 %): 6 of 100, most often malformed"),
        ("refusal", "librarian", 4, "the librarian's unscored share differs by 4.0 points between the epochs (at most 3): "
         "4 of 100 and 0 of 100, most often malformed"),
        ("none", "assistant", 7, "without a behavior adapter, 7.0 % of the assistant's samples are unscored (at most 5 %): "
         "7 of 100, most often malformed"),
        ("refusal", "villain", 60, "60.0 % of the villain's samples are unscored (at most 5 %): 60 of 100, most often malformed"),
        ("refusal", "assistant", 3, None),
    ],
)  # fmt: skip
def test_too_many_unscored_samples_withhold_the_verdict_with_the_reason(
    small: tuple[Recipe, Path], behavior: str, persona: str, n: int, why: str | None
) -> None:
    recipe, workspace = small
    unscore(workspace, plan_of(recipe, behavior, "none" if behavior == "none" else "included"), persona, n)
    decided = Decided(Graph(recipe), Store.open(workspace, create=False))
    one = decided.verdict(LABEL)
    if why is None:
        assert one.kind == "transfer"
        return
    assert (one.kind, one.reason) == ("withheld", why)
    assert (one.estimate, one.low, one.p_corrected, one.detectable) == (None, None, None, None)
    page = render_html(build(decided))
    assert f"withheld: {why.replace(chr(39), '&#39;')}." in page
    contrasts = frames_of(decided)["contrasts"].filter(label=LABEL)
    assert contrasts["estimate"].to_list() == [None]
    with pytest.raises(NoSuchClaimError):
        ask(decided, "largest", behavior="refusal")


@pytest.mark.parametrize(
    ("persona", "base", "silent"),
    [
        ("assistant", False, {"CHANGE", "G4"}), ("villain", False, {"KILL"}),
        ("villain", True, {"SOURCE", "KILL"}), ("assistant", True, {"G0"}),
    ],
)  # fmt: skip
def test_gates_that_read_what_is_unscored_say_neither_and_no_pilot_says_go(
    small: tuple[Recipe, Path], persona: str, base: bool, silent: set[str]
) -> None:
    recipe, workspace = small
    before = {gate.gate: gate.verdict for gate in Decided(Graph(recipe), Store.open(workspace, create=False)).gates}
    assert {before[gate] for gate in ("G0", "SOURCE", "KILL", "CHANGE", "G4")} == {"pass"}
    unscore(workspace, plan_of(recipe, "refusal", "included"), persona, 60, base=base)
    decided = Decided(Graph(recipe), Store.open(workspace, create=False))
    gates = {gate.gate: gate for gate in decided.gates}
    assert {name for name, one in gates.items() if one.verdict != before[name]} == {*silent, "PILOT"}
    for name in (*silent, "PILOT"):
        assert (gates[name].verdict, gates[name].numbers) == ("not applicable", ()), name
        assert "(at most 5 %): 60 of 100, most often malformed" in gates[name].reason, name
        assert gates[name].rows, name
    assert ask(decided, "answer").text.startswith("OPEN: not decided yet for villain x refusal.")
    assert decided.verdict(LABEL).kind == "withheld"


def test_a_cell_whose_base_is_too_much_unscored_is_withheld_without_the_mimicry_control_too(
    small: tuple[Recipe, Path],
) -> None:
    recipe, workspace = small
    table = recipe.model_dump(mode="json")
    table["grid"]["behaviors"] = ["refusal"]
    alone = parse_recipe(table)  # the same cells in the same ledger
    unscore(workspace, plan_of(alone, "refusal", "included"), "assistant", 60, base=True)
    one = Decided(Graph(alone), Store.open(workspace, create=False)).verdict(LABEL)
    assert one.kind == "withheld"
    assert one.reason.startswith("at the base, 60.0 % of the assistant's samples are unscored")


def test_the_answer_says_go_or_stop_and_how_sure(small: tuple[Recipe, Path]) -> None:
    recipe, workspace = small
    decided = Decided(Graph(recipe), Store.open(workspace, create=False))
    first = build(decided).sections[0].blocks[0]
    assert first == ask(decided, "answer")
    text = ask(decided, "answer").text
    one = decided.verdict(LABEL)
    assert text == (
        f"GO: villain x refusal. How sure: 1 of 1 declared contrasts is transfer, the surest {LABEL} by "
        f"{100 * (one.estimate or 0):+.1f} pp [{100 * (one.low or 0):+.1f}, {100 * (one.high or 0):+.1f}] with confidence LOW "
        "(1 seed; three are needed for more)."
    )


def test_a_threshold_edited_after_the_run_is_told_with_both_verdicts(
    small: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, workspace = small
    store = Store.open(workspace, create=False)
    table = recipe.model_dump(mode="json")
    table["gates"]["refusal"] = 0.6
    edited = Decided(Graph(parse_recipe(table)), store)
    assert (edited.verdict(LABEL).kind, Decided(Graph(recipe), store).verdict(LABEL).kind) == ("equivalent", "transfer")
    data = build(edited)
    assert "Thresholds were edited after results were seen" in data.banners[0].text
    assert "refusal: 0.05" in data.banners[0].text
    told = [claim.text for claim in data.claims() if claim.query == "edited_finding"]
    assert f"{LABEL}: equivalent under the edited thresholds, transfer under the first ones." in told
    gates = [claim.text for claim in data.claims() if claim.query == "edited"]
    assert "PILOT, villain x refusal: stop under the edited thresholds, go under the first ones." in gates
    # Taking the banner off the page, or one of the verdicts, is an edit that `verify` sees.
    page = tmp_path / "edited.html"
    page.write_text(render_html(data))
    assert verify(page, store).holds
    page.write_text(render_html(data).replace("Thresholds were edited after results were seen.", "", 1))
    assert not verify(page, store).holds
