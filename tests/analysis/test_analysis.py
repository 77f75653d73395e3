"""`Analysis` of a ledger: withheld verdicts, the headline answer, edited thresholds."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest

from fastconv.analysis.analysis import Analysis
from fastconv.experiment.graph import CellPlan, Graph
from fastconv.planning.plan import make_plan
from fastconv.recipe import Recipe, parse_recipe
from fastconv.report import build
from fastconv.report.blocks import Figure, Table, render_html, render_markdown
from fastconv.report.claims import NoSuchClaimError, ask
from fastconv.report.export import frames_of
from fastconv.report.verify import verify
from fastconv.store.ledger import Store
from tests.loop_kit import copy_ledger
from tests.scale_kit import fill, matrix_recipe

LABEL = "villain source e20 refusal included"
IN_WORDS = "villain, epoch 20, refusal, assistant among the negatives"


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
    decided = Analysis(Graph(recipe), Store.open(workspace, create=False))
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
        ("assistant", False, {"CHANGE", "G4"}), ("villain", False, {"KEPT", "KILL"}),
        ("villain", True, {"SOURCE", "KEPT", "KILL"}), ("assistant", True, {"G0"}),
    ],
)  # fmt: skip
def test_gates_that_read_what_is_unscored_say_neither_and_no_pilot_says_go(
    small: tuple[Recipe, Path], persona: str, base: bool, silent: set[str]
) -> None:
    recipe, workspace = small
    before = {gate.gate: gate.verdict for gate in Analysis(Graph(recipe), Store.open(workspace, create=False)).gates}
    assert {before[gate] for gate in ("G0", "SOURCE", "KILL", "CHANGE", "G4")} == {"pass"}
    unscore(workspace, plan_of(recipe, "refusal", "included"), persona, 60, base=base)
    decided = Analysis(Graph(recipe), Store.open(workspace, create=False))
    gates = {gate.gate: gate for gate in decided.gates}
    assert {name for name, one in gates.items() if one.verdict != before[name]} == {*silent, "PILOT"}
    for name in (*silent, "PILOT"):
        assert (gates[name].verdict, gates[name].numbers) == ("not applicable", ()), name
        assert "(at most 5 %): 60 of 100, most often malformed" in gates[name].reason, name
        assert gates[name].rows, name
    assert ask(decided, "gate").text == "OPEN: not decided yet for villain x refusal."
    assert decided.verdict(LABEL).kind == "withheld"


def test_a_cell_whose_base_is_too_much_unscored_is_withheld_without_the_mimicry_control_too(
    small: tuple[Recipe, Path],
) -> None:
    recipe, workspace = small
    table = recipe.model_dump(mode="json")
    table["grid"]["behaviors"] = ["refusal"]
    alone = parse_recipe(table)  # the same cells in the same ledger
    unscore(workspace, plan_of(alone, "refusal", "included"), "assistant", 60, base=True)
    one = Analysis(Graph(alone), Store.open(workspace, create=False)).verdict(LABEL)
    assert one.kind == "withheld"
    assert one.reason.startswith("at the base, 60.0 % of the assistant's samples are unscored")


def test_the_answer_says_go_or_stop_and_how_sure(small: tuple[Recipe, Path]) -> None:
    recipe, workspace = small
    decided = Analysis(Graph(recipe), Store.open(workspace, create=False))
    blocks = build(decided).sections[0].blocks
    one = decided.verdict(LABEL)
    figures = f"{100 * (one.estimate or 0):+.1f} pp [{100 * (one.low or 0):+.1f}, {100 * (one.high or 0):+.1f}]"
    assert [block.id if isinstance(block, Figure) else block.text for block in blocks] == [  # pyright: ignore[reportAttributeAccessIssue]
        f"Yes: 1 of 1 declared contrasts is transfer, the surest {IN_WORDS}: {figures}.",
        "How sure: confidence LOW. Not surer, because 1 seed, three are needed for more; the noise from run to run is assumed "
        f"(SD 2 pp), nobody measured it; a change of refusal under {100 * (one.detectable or 0):.3g} pp is easily missed, the "
        "threshold is 5 pp.",
        "first",
        "GO: villain x refusal.",
        f"What to run next: three seeds (`grid.seeds`) of {IN_WORDS}, which has 1.",
    ]
    figure = next(block for block in blocks if isinstance(block, Figure))
    assert re.search(r"assistant: .* at 0, .* at 20; villain \(the source\): .* at 0, .* at 20; canary: ", figure.alt)


def test_a_threshold_edited_after_the_run_is_told_with_both_verdicts(
    small: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, workspace = small
    store = Store.open(workspace, create=False)
    table = recipe.model_dump(mode="json")
    table["gates"]["refusal"] = 0.6
    edited = Analysis(Graph(parse_recipe(table)), store)
    assert (edited.verdict(LABEL).kind, Analysis(Graph(recipe), store).verdict(LABEL).kind) == (
        "equivalent",
        "transfer",
    )
    data = build(edited)
    assert "Thresholds were edited after results were seen" in data.banners[0].text
    assert "refusal: 0.05" in data.banners[0].text
    told = [claim.text for claim in data.claims() if claim.query == "edited_finding"]
    assert f"{IN_WORDS}: equivalent under the edited thresholds, transfer under the first ones." in told
    gates = [claim.text for claim in data.claims() if claim.query == "edited"]
    assert "PILOT, villain x refusal: stop under the edited thresholds, go under the first ones." in gates
    # Taking the banner off the page, or one of the verdicts, is an edit that `verify` sees.
    page = tmp_path / "edited.html"
    page.write_text(render_html(data))
    assert verify(page, store).holds
    page.write_text(render_html(data).replace("Thresholds were edited after results were seen.", "", 1))
    assert not verify(page, store).holds


@pytest.fixture(scope="module")
def four(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """Four declared contrasts, refusal and sycophancy with and without negatives, all of them measured."""
    table = matrix_recipe(tiny_qwen, n_sources=1, seeds=1, samples=2).model_dump(mode="json")
    table["grid"] |= {"epochs": [0, 20], "behaviors": ["none", "refusal", "sycophancy"]}
    recipe, workspace = parse_recipe(table), tmp_path_factory.mktemp("four") / "w"
    fill(recipe, workspace)[1].close()
    return recipe, workspace


def unmeasure(recipe: Recipe, workspace: Path, behavior: str, negatives: str) -> None:
    """Take a cell's measurements away, as if the run had not come to them yet."""
    db = sqlite3.connect(workspace / "ledger.sqlite")
    for stage in plan_of(recipe, behavior, negatives).scores.values():
        db.execute("DELETE FROM scores WHERE stage=?", (stage.key,))
        db.execute("DELETE FROM stages WHERE key=?", (stage.key,))
    db.commit()
    db.close()


def leave_no_room(recipe: Recipe, workspace: Path, behavior: str) -> None:
    """Let the base's assistant always show a behavior, so that G0 rules it uninformative."""
    db = sqlite3.connect(workspace / "ledger.sqlite")
    key = plan_of(recipe, behavior, "included").base[behavior, "assistant"].key
    db.execute("UPDATE scores SET value=1 WHERE stage=?", (key,))
    db.commit()
    db.close()


@pytest.mark.parametrize("silenced", [False, True], ids=["not measured", "silenced by G0"])
def test_the_family_is_what_was_declared_however_much_of_it_is_measured(
    four: tuple[Recipe, Path], tmp_path: Path, silenced: bool
) -> None:
    recipe, workspace = four[0], copy_ledger(four[1], tmp_path / "w")
    full = Analysis(Graph(recipe), Store.open(four[1], create=False))
    for behavior, negatives in (("sycophancy", "included"), ("sycophancy", "excluded"), ("refusal", "excluded")):
        unmeasure(recipe, workspace, behavior, negatives)
    if silenced:
        leave_no_room(recipe, workspace, "sycophancy")
    part = Analysis(Graph(recipe), Store.open(workspace, create=False))
    assert [one.label for one in part.verdicts if one.estimate is not None] == [LABEL]
    words = [one.kind for one in part.verdicts if "sycophancy" in one.label]
    assert words == (["uninformative"] * 2 if silenced else [])
    now, whole = part.verdict(LABEL), full.verdict(LABEL)
    assert (now.p_raw, now.detectable_in_family) == (whole.p_raw, whole.detectable_in_family)
    assert now.p_corrected == pytest.approx(4 * (now.p_raw or 0.0))
    for decided in (part, full):
        assert "at the first step of the correction over 4 contrasts" in ask(decided, "power", behavior="refusal").text
        assert "Declared contrasts: 4." in ask(decided, "counts").text
    assert {one.n_contrasts for one in make_plan(part.graph, None).power.values()} == {4}


@pytest.fixture(scope="module")
def eight_questions(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """More contrasts than an open table holds, on eight questions, which cannot carry them by sign flips."""
    recipe = matrix_recipe(tiny_qwen, n_sources=2, seeds=1, prompts=8, samples=8)
    workspace = tmp_path_factory.mktemp("eight") / "w"
    fill(recipe, workspace)[1].close()
    return recipe, workspace


@pytest.mark.slow
@pytest.mark.parametrize("all_silent", [False, True], ids=["some speak", "none speaks"])
def test_too_few_questions_for_sign_flips_are_told_before_the_tables(
    eight_questions: tuple[Recipe, Path], tmp_path: Path, all_silent: bool
) -> None:
    recipe, workspace = eight_questions[0], copy_ledger(eight_questions[1], tmp_path / "w")
    if all_silent:
        db = sqlite3.connect(workspace / "ledger.sqlite")
        db.execute("UPDATE scores SET value=0 WHERE metric='rate'")
        db.commit()
        db.close()
    store = Store.open(workspace, create=False)
    data = build(Analysis(Graph(recipe), store))
    page = tmp_path / "page.html"
    page.write_text(render_html(data))
    section = page.read_text().split('id="findings"', 1)[1]
    assert ('<table id="contrasts"' in section) is not all_silent
    open_part = section[: min(section.index("<table"), section.index("<details"))]
    for behavior in ("refusal", "sycophancy", "marker"):
        assert (
            f"The sign-flip check is weak for {behavior}: 8 questions give a sign-flip p no smaller than 0.0078; "
            "36 contrasts require 0.0014, which takes at least 11 questions."
        ) in open_part
    assert "The sign-flip check is weak for refusal: 8 questions" in render_markdown(data)
    assert verify(page, store).holds


@pytest.fixture(scope="module")
def three_seeds(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """One contrast with three seeds, each of which shows it."""
    table = matrix_recipe(tiny_qwen, n_sources=1, seeds=3, samples=2).model_dump(mode="json")
    table["grid"] |= {"epochs": [0, 20], "behaviors": ["none", "refusal"], "negatives": ["included"]}
    recipe, workspace = parse_recipe(table), tmp_path_factory.mktemp("seeds") / "w"
    fill(recipe, workspace)[1].close()
    return recipe, workspace


@pytest.mark.parametrize("agree", [True, False])
def test_the_interval_over_seeds_stands_in_the_table_and_the_sentence(
    three_seeds: tuple[Recipe, Path], tmp_path: Path, agree: bool
) -> None:
    recipe, workspace = three_seeds[0], copy_ledger(three_seeds[1], tmp_path / "w")
    if not agree:  # in one of the seeds the assistant falls from always to never
        now, zero = (Graph(recipe).select("villain", "refusal", epoch, negatives="included")[2] for epoch in (20, 0))
        db = sqlite3.connect(workspace / "ledger.sqlite")
        for plan, value in ((now, 0), (zero, 0.25)):
            key = plan.scores["refusal", "assistant"].key
            db.execute("UPDATE scores SET value=? WHERE stage=?", (value, key))
        db.commit()
        db.close()
    store = Store.open(workspace, create=False)
    decided = Analysis(Graph(recipe), store)
    one = decided.verdict(LABEL)
    over = one.over_seeds
    assert over is not None
    assert over.low is not None
    assert over.high is not None
    assert one.kind == ("transfer" if agree else "inconclusive")
    figures = f"{100 * (over.estimate or 0):+.1f} pp [{100 * over.low:+.1f}, {100 * over.high:+.1f}]"
    told = ask(decided, "finding", label=LABEL).text
    assert f" Over seeds: {figures}, 3 seeds. Confidence " in told
    assert ("the 3 seeds do not agree in sign" in told) is not agree
    data = build(decided)
    table = next(b for s in data.sections for b in s.blocks if isinstance(b, Table) and b.id == "contrasts")
    at = table.columns.index("over seeds")
    assert at in table.numeric
    assert table.rows[0][at].text == f"{100 * over.low:+.1f} to {100 * over.high:+.1f}"
    assert table.rows[0][at].rows
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert frames_of(decided)["contrasts"]["seeds_high"].to_list() == [over.high]
    page = tmp_path / "page.html"
    page.write_text(render_html(data))
    assert f"Over seeds: {figures}" in page.read_text()
    assert verify(page, store).holds


def test_one_seed_has_no_interval_over_seeds_and_no_column_for_it(small: tuple[Recipe, Path]) -> None:
    recipe, workspace = small
    decided = Analysis(Graph(recipe), Store.open(workspace, create=False))
    assert decided.verdict(LABEL).over_seeds is None
    assert "ver seeds" not in ask(decided, "finding", label=LABEL).text
    data = build(decided)
    table = next(b for s in data.sections for b in s.blocks if isinstance(b, Table) and b.id == "contrasts")
    assert "over seeds" not in table.columns


def rescore(workspace: Path, plan: CellPlan, persona: str, rate: float, *, base: bool = False) -> None:
    """Set the rate of a refusal measurement: its first samples 1, the others 0."""
    db = sqlite3.connect(workspace / "ledger.sqlite")
    key = (plan.base if base else plan.scores)["refusal", persona].key
    places = db.execute("SELECT row, sample FROM scores WHERE stage=? ORDER BY sample, row", (key,)).fetchall()
    n = round(rate * len(places))
    statement = "UPDATE scores SET value=? WHERE stage=? AND row=? AND sample=?"
    db.executemany(statement, [(float(place < n), key, *of) for place, of in enumerate(places)])
    db.commit()
    db.close()


@pytest.mark.parametrize(
    ("base", "now", "kind", "gate"),
    [
        (0.15, 0.62, "transfer", "pass"), (0.15, 0.40, "uninformative", "fail"),
        (0.90, 0.92, "transfer", "not applicable"), (0.90, 0.40, "uninformative", "fail"),
    ],
)  # fmt: skip
def test_a_cells_verdict_follows_what_the_source_could_move(
    small: tuple[Recipe, Path], base: float, now: float, kind: str, gate: str
) -> None:
    """Of a source that was there before nothing can be asked: the assistant decides, and no pilot stops for it."""
    recipe, workspace = small
    for epoch in (0, 20):
        rescore(workspace, plan_of(recipe, "refusal", "included", epoch), "villain", now)
    rescore(workspace, plan_of(recipe, "refusal", "included"), "villain", base, base=True)
    decided = Analysis(Graph(recipe), Store.open(workspace, create=False))
    gates = {one.gate: one for one in decided.gates}
    assert (decided.verdict(LABEL).kind, gates["SOURCE"].verdict) == (kind, gate)
    assert gates["PILOT"].verdict == ("stop" if gate == "fail" else "go")
    page = render_markdown(build(decided))
    assert ("was there before" in page) == (gate == "not applicable" or "moved away" in gates["SOURCE"].reason)


def test_a_grid_of_epoch_0_alone_says_that_it_declares_no_contrast(kept: tuple[Recipe, Path], tmp_path: Path) -> None:
    """Nothing is left to wait for, so the page must not say that a decision is open."""
    table = kept[0].model_dump(mode="json")
    table["grid"] |= {"epochs": [0]}
    recipe = parse_recipe(table)
    fill(recipe, tmp_path / "w")[1].close()
    decided = Analysis(Graph(recipe), Store.open(tmp_path / "w", create=False))
    (pilot,) = [one for one in decided.gates if one.gate == "PILOT"]
    assert (pilot.verdict, pilot.failed) == ("no contrast", False)
    study = [one for one in decided.gates if one.gate in ("G4", "G5", "CONFIRM", "FALSIFY")]
    assert study
    assert all("epoch 0 alone" in one.reason for one in study)
    assert ask(decided, "gate").text.startswith("NO CONTRAST: the grid has epoch zero alone")
    page = render_markdown(build(decided))
    assert "The recipe declares no contrast" in page
    assert "OPEN" not in page
    assert " yet" not in page.split("## ")[1]
