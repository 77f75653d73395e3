"""`verify` and `compare`: an edited report fails, as does one whose rows changed; edited thresholds show both."""

from __future__ import annotations

import json
import random
import re
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from fastconv.analysis.analysis import Analysis
from fastconv.cli import app
from fastconv.cli.workspace import comparison
from fastconv.errors import InputError, VerifyError
from fastconv.experiment.graph import Graph
from fastconv.recipe import Recipe, canonical_json, parse_recipe, recipe_sha256, run_id
from fastconv.report import build, write_report
from fastconv.report import verify as verifying
from fastconv.report.blocks import Claim
from fastconv.report.compare import Paired, RunComparison, compare
from fastconv.report.verify import verify
from fastconv.store.ledger import Store
from tests.loop_kit import DoneRun, copy_ledger, run_tiny, tiny_recipe, tiny_table

DIGIT = re.compile(r"\d")


@pytest.fixture(scope="module")
def report(done_run: DoneRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(done_run.graph, done_run.store, tmp_path_factory.mktemp("reports")).html


def copied(report: Path, folder: Path) -> Path:
    """A whole copy of a report, with its twin, figures and tables: the path of its page."""
    shutil.copytree(report.parent, folder, dirs_exist_ok=True)
    return folder / report.name


def edited(report: Path, folder: Path, at: int) -> Path:
    """A copy of the report with the digit at this place of the page raised by one (nine becomes zero)."""
    text = report.read_text()
    path = copied(report, folder)
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    return path


def test_an_untouched_report_holds_as_page_and_as_markdown(done_run: DoneRun, report: Path) -> None:
    for path in (report, report.with_suffix(".md")):
        found = verify(path, done_run.store)
        assert found.holds, found.differences
        assert found.n_claims >= 5
        assert found.run == done_run.finished.run


@pytest.mark.slow
def test_any_changed_digit_fails_the_report(done_run: DoneRun, report: Path, tmp_path: Path) -> None:
    text = report.read_text()
    start = text.index("<body>")
    places = [found.start() for found in DIGIT.finditer(text, start)]
    in_claims = [
        found.start(1) + m.start()
        for found in re.finditer(r'data-sha="[^"]*">([^<]+)<', text)
        for m in DIGIT.finditer(found[1])
    ]
    drawing = text.index("data:image/svg") + 400
    chosen = [*in_claims[:: max(1, len(in_claims) // 4)], *places[:: max(1, len(places) // 8)]]
    chosen.append(next(place for place in places if place > drawing))
    for place in chosen:
        found = verify(edited(report, tmp_path, place), done_run.store)
        assert not found.holds, text[place - 40 : place + 40]
        assert not {one.what for one in found.differences} & FILES


FILES = {"file", "missing file", "extra file"}


def beside(report: Path) -> list[Path]:
    """The files that a report hands on beside its page: twin, figures and tables."""
    return [report.with_suffix(".md"), *sorted(path for path in report.with_suffix("").rglob("*") if path.is_file())]


def test_every_file_that_is_handed_on_is_held_against_the_ledger(
    done_run: DoneRun, report: Path, tmp_path: Path
) -> None:
    page = copied(report, tmp_path)
    files = beside(page)
    assert {path.suffix for path in files} == {".md", ".svg", ".png", ".parquet"}
    assert verify(page, done_run.store).n_files == len(files)
    kept = {path: path.read_bytes() for path in files}
    names = sorted(path.relative_to(tmp_path).as_posix() for path in files)
    rng = random.Random(16)
    for path, content in kept.items():
        at = rng.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    for what in ("file", "missing file"):
        found = verify(page, done_run.store).differences
        assert {one.what for one in found} == {what}
        assert sorted(one.where for one in found) == names
        for path in files:
            path.unlink(missing_ok=True)
    for path, content in kept.items():
        path.write_bytes(content)
    (page.with_suffix("") / "tables" / "invented.parquet").write_bytes(b"PAR1")
    assert [one.what for one in verify(page, done_run.store).differences] == ["extra file"]
    alone = tmp_path / "alone" / page.name
    alone.parent.mkdir()
    shutil.copy(page, alone)
    assert (verify(alone, done_run.store).holds, verify(alone, done_run.store).n_files) == (True, 0)


def test_one_value_of_a_table_is_an_edit_and_a_new_report_clears_what_is_not_its_own(
    done_run: DoneRun, report: Path, tmp_path: Path
) -> None:
    page = copied(report, tmp_path)
    tables = sorted(page.with_suffix("").glob("tables/*.parquet"))
    for table in tables:
        frame = pl.read_parquet(table)
        name = next(name for name, kind in frame.schema.items() if kind.is_numeric() or kind == pl.String)
        first = frame[name][0]
        other = pl.Series(name, [first + (1 if frame.schema[name].is_numeric() else "x"), *frame[name][1:]])
        frame.with_columns(other).write_parquet(table)
    found = verify(page, done_run.store).differences
    assert sorted(one.where for one in found) == [f"{page.stem}/tables/{table.name}" for table in tables]
    (page.with_suffix("") / "figures" / "of-an-earlier-report.svg").write_bytes(b"<svg/>")
    write_report(done_run.graph, done_run.store, tmp_path)
    assert verify(page, done_run.store).holds
    assert verify(page.with_suffix(".md"), done_run.store).holds


@pytest.mark.parametrize("suffix", [".html", ".md"])
def test_every_kind_of_byte_edit_of_page_and_twin_is_seen(
    done_run: DoneRun, report: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = build(Analysis(done_run.graph, done_run.store))
    monkeypatch.setattr(verifying, "build", lambda _: data)
    page = copied(report, tmp_path).with_suffix(suffix)
    text = page.read_bytes()
    edits = [
        text[:-1], text + b"\n", text.replace(b"\n", b"\r\n"), text.replace(b"\n", b"\x0b", 9),
        text.replace(b" ", b"  ", 1), text[: len(text) // 2] + b" " + text[len(text) // 2 :],
    ]  # fmt: skip
    if suffix == ".html":  # base64 whose unused last bits are set: it is decoded to the same drawing
        drawing = next(found for found in re.finditer(rb"base64,[A-Za-z0-9+/]+?([AEIMQUYcgkosw048])=", text))
        last = bytes([drawing[1][0] + 1])
        edits.append(text[: drawing.start(1)] + last + text[drawing.end(1) :])
    for number, edit in enumerate(edits):
        page.write_bytes(edit)
        try:
            found = verify(page, done_run.store)
        except InputError:
            continue  # the title no longer names a run: exit code 2
        assert not found.holds, number


def test_a_changed_claim_is_named_with_what_the_ledger_says(done_run: DoneRun, report: Path, tmp_path: Path) -> None:
    text = report.read_text()
    place = text.index("samples have no score")
    at = max(found.start() for found in DIGIT.finditer(text, 0, place))
    found = verify(edited(report, tmp_path, at), done_run.store)
    changed = [one for one in found.differences if one.what == "changed"]
    assert [one.where for one in changed] == ["unscored"]
    assert changed[0].report != changed[0].ledger


def test_a_claim_taken_out_or_put_in_is_seen(done_run: DoneRun, report: Path, tmp_path: Path) -> None:
    text, path = report.read_text(), copied(report, tmp_path)
    claim = next(found[0] for found in re.finditer(r'<p class="claim[^\n]*</p>\n', text))
    path.write_text(text.replace(claim, "", 1))
    assert "left out" in {one.what for one in verify(path, done_run.store).differences}
    invented = claim.replace('data-query="', 'data-query="no_')
    path.write_text(text.replace(claim, claim + invented, 1))
    assert "missing" in {one.what for one in verify(path, done_run.store).differences}


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("UPDATE scores SET value=1-value WHERE stage=? AND sample=0 AND row=(SELECT min(row) FROM scores WHERE stage=?1)", "changed"),
        ("DELETE FROM scores WHERE stage=? AND row=(SELECT min(row) FROM scores WHERE stage=?1)", "rows"),
    ],
)  # fmt: skip
def test_one_changed_or_missing_score_is_caught(
    done_run: DoneRun, report: Path, tmp_path: Path, statement: str, what: str
) -> None:
    workspace = copy_ledger(done_run.workspace, tmp_path / "w")
    plan = next(p for p in done_run.graph.cells if p.cell.epoch == 2 and p.cell.behavior == "refusal")
    key = plan.scores["refusal", "assistant"].key
    db = sqlite3.connect(workspace / "ledger.sqlite")
    assert db.execute(statement, (key,)).rowcount >= 1
    db.commit()
    db.close()
    found = verify(report, Store.open(workspace, create=False))
    assert what in {one.what for one in found.differences}


@pytest.fixture(scope="module")
def letters_report(letters_run: DoneRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page that says, beside all else, what of multiple-choice answers would be found (power)."""
    return write_report(letters_run.graph, letters_run.store, tmp_path_factory.mktemp("letters")).html


@pytest.mark.parametrize(
    "lost",
    [
        ["DELETE FROM scores", "DELETE FROM samples", "DELETE FROM stages"],
        ["DELETE FROM scores"],
        ["DELETE FROM scores WHERE stage IN (SELECT key FROM stages WHERE slot LIKE '%assistant%')"],
    ],
    ids=["everything", "scores", "scores of the assistant"],
)
def test_a_report_whose_rows_are_gone_differs_in_its_claims_and_a_new_one_has_nothing_measured(
    letters_run: DoneRun, letters_report: Path, tmp_path: Path, lost: list[str]
) -> None:
    workspace = copy_ledger(letters_run.workspace, tmp_path / "emptied")
    with sqlite3.connect(workspace / "ledger.sqlite") as db:
        for statement in lost:
            assert db.execute(statement).rowcount
    found = verify(letters_report, Store.open(workspace, create=False))
    unsupported = {one.where.partition(":")[0] for one in found.differences if "nothing supports it" in one.ledger}
    assert {"power", "answer", "sure", "next", "counts", "largest", "pilot"} <= unsupported
    runner, where = CliRunner(), ["-w", str(workspace)]
    assert runner.invoke(app, ["verify", str(letters_report), *where]).exit_code == VerifyError.exit_code
    again = runner.invoke(app, ["report", letters_run.finished.run, *where, "--reports", str(tmp_path / "reports")])
    assert again.exit_code == 0, again.output
    page = tmp_path / "reports" / letters_report.name
    assert "No declared contrast was measured yet." in page.read_text()
    assert verify(page, Store.open(workspace, create=False)).holds


def test_exit_codes_and_json(done_run: DoneRun, report: Path, tmp_path: Path) -> None:
    runner, where = CliRunner(), ["-w", str(done_run.workspace)]
    good = runner.invoke(app, ["verify", str(report), *where, "--json"])
    assert (good.exit_code, json.loads(good.stdout)["holds"]) == (0, True)
    text = report.read_text()
    bad = edited(report, tmp_path, DIGIT.search(text, text.index("<main")).start())  # pyright: ignore[reportOptionalMemberAccess]
    spoilt = runner.invoke(app, ["verify", str(bad), *where, "--json"])
    assert (spoilt.exit_code, json.loads(spoilt.stdout)["holds"]) == (VerifyError.exit_code, False)
    assert runner.invoke(app, ["verify", str(bad), *where]).exit_code == 9
    stranger = tmp_path / "x.html"
    stranger.write_text("<!doctype html><p>hello</p>")
    with pytest.raises(InputError, match="no report of fastconv"):
        verify(stranger, done_run.store)
    elsewhere = Store.open(tmp_path / "other")
    with pytest.raises(InputError, match="has no run"):
        verify(report.with_suffix(".md"), elsewhere)


# --- thresholds edited after results were seen --------------------------------------------------------------


def test_an_edited_threshold_is_shown_with_both_verdicts(done_run: DoneRun, tmp_path: Path) -> None:
    store = Store.open(copy_ledger(done_run.workspace, tmp_path / "w"), create=False)
    table = done_run.recipe.model_dump(mode="json")
    table["gates"]["headroom"] = 0.49
    table["gates"]["source_shows"] = 0.01
    edit = parse_recipe(table)
    decided = Analysis(Graph(edit), store)
    assert decided.first is not None
    assert decided.first.run == done_run.finished.run
    assert {change.split(":")[0] for change in decided.first.changes} == {"headroom", "source_shows"}
    data = build(decided)
    assert any("Thresholds were edited" in banner.text for banner in data.banners)
    gates = next(b for s in data.sections if s.id == "gates" for b in s.blocks if getattr(b, "id", "") == "gates-table")
    assert "under the first" in gates.columns  # pyright: ignore[reportAttributeAccessIssue]
    before = {(g.gate, g.subject): g.verdict for g in decided.under_first[0]}
    now = {(g.gate, g.subject): g.verdict for g in decided.gates}
    told = [claim for claim in data.claims() if claim.query == "edited"]
    assert len(told) == sum(before[place] != word for place, word in now.items() if place in before)
    # The run that came first has nothing to declare, even once the other is in the ledger.
    store.start_run(run_id(edit), canonical_json(table), recipe_sha256(edit), edit.name, {})
    assert Analysis(done_run.graph, store).first is None


def _began(store: Store, recipe: Recipe) -> None:
    """Note a run of the recipe that rests on all its stages, as `run` does when it begins; nothing is computed."""
    run = run_id(recipe)
    store.start_run(run, canonical_json(recipe.model_dump(mode="json")), recipe_sha256(recipe), recipe.name, {})
    for stage in Graph(recipe).stages():
        store.note_stage_of_run(run, stage, reused=False)


def _grid(model: Path, name: str, sources: Sequence[str], **gates: Any) -> Recipe:
    references = {"villain": 90.45, "comedian": 89.42} | gates.pop("references", {})
    known = {source: references[source] for source in sources}
    table = tiny_table(model, name=name, grid__sources=list(sources), grid__epochs=[0, 1])
    return parse_recipe(table | {"gates": {"g3_reference_pct": known, **gates}})


PILOT, WHOLE = ("villain",), ("villain", "comedian")


@pytest.mark.parametrize(("first", "then"), [(PILOT, WHOLE), (WHOLE, PILOT)], ids=["pilot first", "matrix first"])
def test_a_pilot_and_its_matrix_in_one_workspace_have_edited_nothing(
    tiny_qwen: Path, tmp_path: Path, first: Sequence[str], then: Sequence[str]
) -> None:
    store = Store.open(tmp_path)
    _began(store, _grid(tiny_qwen, "first", first))
    # Another source has a reference of its own, and which gates stop or are ignored is no threshold.
    mine = _grid(tiny_qwen, "then", then, ignore={"G3": "another template"}, stop=["G2"])
    _began(store, mine)
    decided = Analysis(Graph(mine), store)
    assert decided.first is None
    assert [note for note in build(decided).banners if note.word == "edited"] == []


@pytest.mark.parametrize("name", ["first", "then"])
@pytest.mark.parametrize(
    ("sources", "gates", "told"),
    [
        (WHOLE, {"refusal": 0.2}, "refusal: 0.05 -> 0.2"),
        (PILOT, {"references": {"villain": 80.0}}, "g3_reference_pct.villain: 90.45 -> 80.0"),
        (WHOLE, {"references": {"villain": 80.0}}, "g3_reference_pct.villain: 90.45 -> 80.0"),
    ],
    ids=["threshold", "reference", "reference of the pilot"],
)
def test_a_threshold_edited_after_a_pilot_is_shown_in_any_recipe(
    tiny_qwen: Path, tmp_path: Path, name: str, sources: Sequence[str], gates: dict[str, Any], told: str
) -> None:
    store = Store.open(tmp_path)
    pilot, edit = _grid(tiny_qwen, "first", PILOT), _grid(tiny_qwen, name, sources, **gates)
    _began(store, pilot)
    _began(store, edit)
    decided = Analysis(Graph(edit), store)
    assert decided.first is not None
    assert (decided.first.run, decided.first.changes) == (run_id(pilot), (told,))
    assert decided.first.gates.refusal == 0.05
    assert decided.first.gates.g3_reference_pct["villain"] == 90.45
    assert any(told in note.text for note in build(decided).banners)


def test_a_reference_that_the_pilot_never_had_is_compared_with_the_run_that_had_it(
    tiny_qwen: Path, tmp_path: Path
) -> None:
    store = Store.open(tmp_path)
    matrix, edit = (_grid(tiny_qwen, "matrix", WHOLE, references={"comedian": at}) for at in (89.42, 70.0))
    for recipe in (_grid(tiny_qwen, "pilot", PILOT), matrix, edit):
        _began(store, recipe)
    first = Analysis(Graph(edit), store).first
    assert first is not None
    assert (first.run, first.changes) == (run_id(matrix), ("g3_reference_pct.comedian: 89.42 -> 70.0",))
    assert dict(first.gates.g3_reference_pct) == {"villain": 90.45, "comedian": 89.42}


# --- compare -----------------------------------------------------------------------------------------------


def test_settings_that_change_no_number_stand_apart(tiny_qwen: Path, tmp_path: Path) -> None:
    first, second = (
        Analysis(Graph(tiny_recipe(tiny_qwen, **more)), Store.open(tmp_path))
        for more in ({}, {"run__track": ["tensorboard"], "run__max_usd": 3.0, "run__group": 2, "behavior__lr": 2e-4})
    )
    found = compare(first, second)
    assert [line.partition(":")[0] for line in found.how] == ["run.max_usd", "run.track"]
    assert [line.partition(":")[0] for line in found.changes] == ["behavior.lr", "run.group"]
    same = compare(first, first)
    assert (same.how, same.changes) == ((), ())


def test_two_seeds_are_paired_cell_by_cell(tiny_qwen: Path, tmp_path: Path) -> None:
    recipes = [tiny_recipe(tiny_qwen, grid__epochs=[0, 1], grid__seeds=[seed]) for seed in (1, 2)]
    for recipe in recipes:
        run_tiny(recipe, tmp_path)
    store = Store.open(tmp_path, create=False)
    first, second = (Analysis(Graph(recipe), store) for recipe in recipes)
    found = compare(first, second)
    assert found.apart == ("seed",)
    assert any(change.startswith("grid.seeds") for change in found.changes)
    assert found.n_unmatched == 0
    assert len(found.pairs) == 12  # two epochs x (none, refusal) x three probes
    for one in found.pairs:
        if one.difference is not None and one.n_questions == 3:
            assert one.difference == pytest.approx(one.second - one.first)
    same = compare(first, first)
    assert all(one.same_rows and one.difference == 0 for one in same.pairs)
    shown = CliRunner().invoke(app, ["compare", run_id(recipes[0]), run_id(recipes[1]), "-w", str(tmp_path), "--json"])
    assert shown.exit_code == 0
    assert len(json.loads(shown.stdout)["pairs"]) == 12
    table = CliRunner().invoke(app, ["compare", run_id(recipes[0]), run_id(recipes[1]), "-w", str(tmp_path)])
    assert "matched without seed" in table.stdout


def test_runs_of_one_recipe_under_other_versions_show_what_differs(done_run: DoneRun, tmp_path: Path) -> None:
    workspace, run = copy_ledger(done_run.workspace, tmp_path / "w"), done_run.finished.run
    ours = done_run.store.run_facts(run)
    other = {
        "versions": {**ours["versions"], "torch": "9.9.0+cu999", "vllm": "1.2"},
        "engine": {**ours["engine"], "device": "a GPU", "self_tests": "14 passed, at most 0.1% apart"},
        "machine": {**ours["machine"], "n_cpu": 999},
        "git": {**ours["git"], "commit": "f" * 40},
    }
    Store.open(workspace, create=False).add_run_facts(run, other)
    db = sqlite3.connect(workspace / "ledger.sqlite")
    db.execute("UPDATE stages SET version=7 WHERE kind='score'")
    db.commit()
    db.close()
    first, second = (Analysis(done_run.graph, Store.open(w, create=False)) for w in (done_run.workspace, workspace))
    assert set(compare(first, second).conditions) == {
        f"versions torch: {ours['versions']['torch']} -> 9.9.0+cu999",
        "engine device: cpu -> a GPU",
        f"machine n_cpu: {ours['machine']['n_cpu']} -> 999",
        f"git commit: {ours['git'].get('commit', 'none')[:12]} -> ffffffffffff",
        "versions vllm: none -> 1.2",
        "stage version of score: 1 -> 7",
    }
    assert compare(first, first).conditions == ()
    shown = CliRunner().invoke(
        app, ["compare", run, run, "-w", str(done_run.workspace), "--other-workspace", str(workspace)]
    )
    assert "-> 9.9.0+cu999" in shown.stdout
    assert "self_tests" not in shown.stdout
    never = Analysis(done_run.graph, Store.open(tmp_path / "empty"))
    assert compare(first, never).conditions == (
        f"versions, engine and machine: not recorded for {run}, which never began in its workspace",
    )


def test_a_table_of_two_runs_breaks_no_word_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    label = "software_engineer source e20 misalignment excluded s"
    pairs = [
        Paired(
            f"{label}1 | {label}2", measure, role, "points", 100.0, 75.25, -24.75, -100.0, 100.0, 1.23e-5, 1.24e-5, 586, False
        )
        for measure in ("misalignment, published questions", "a_behavior_with_a_long_name_of_its_own")
        for role in ("assistant", "source", "canary")
    ]  # fmt: skip
    comparison(RunComparison("first-run", "second-run", (), (), ("seed",), tuple(pairs), 0))
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if label not in line) <= 80  # a cell's own line folds at its spaces
    seen = " ".join(lines).split()
    whole = {
        *label.split()[:-1], "misalignment,", "published", "questions", "a_behavior_with_a_long_name_of_its_own",
        "difference", "corrected", "assistant", "100.0", "points", "[-100.0,", "+100.0]", "1.24e-05", "586",
    }  # fmt: skip
    assert whole <= {word.removesuffix(":") for word in seen}
    assert seen.count("1.24e-05") == len(pairs)


def test_claims_of_the_page_are_those_of_the_data(done_run: DoneRun, report: Path) -> None:
    data = build(Analysis(done_run.graph, done_run.store))
    assert len(re.findall("data-query=", report.read_text())) == len(data.claims())
    assert all(isinstance(claim, Claim) and claim.rows for claim in data.claims())
    assert len({claim.id for claim in data.claims()}) == len(data.claims())
