"""Judge against phrases in the report: agreement with kappa, and rates corrected where the judge was calibrated."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.correlates import levels
from fastconv.datasets.personas import ASSISTANT
from fastconv.experiment.graph import Graph
from fastconv.judge.calibrate import corrected_rate
from fastconv.judge.rubric import compare_scores, load_rubric
from fastconv.recipe import Recipe, parse_recipe
from fastconv.report import build
from fastconv.report.blocks import Claim, Note, ReportData, Section, Table, render_html
from fastconv.report.claims import NoSuchClaimError, ask
from fastconv.report.verify import verify
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store
from tests.judging_kit import DATA
from tests.loop_kit import copy_ledger
from tests.scale_kit import JUDGE, RUBRIC, fill, matrix_recipe

LABEL = "villain source e20 refusal included"
KNOWN = {"sensitivity": 0.9, "specificity": 0.95, "n_positive": 60, "n_negative": 60}


@pytest.fixture(scope="module")
def kept(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A small judged ledger: refusal, phrases beside a judge that reads one answer in twenty otherwise."""
    table = matrix_recipe(tiny_qwen, n_sources=1, seeds=1, samples=2).model_dump(mode="json")
    table["grid"] |= {"epochs": [0, 20], "behaviors": ["none", "refusal"], "negatives": ["included"]}
    table["judge"] = {"mode": "local", "model": JUDGE, "base_url": "http://127.0.0.1:9"}
    recipe, workspace = parse_recipe(table), tmp_path_factory.mktemp("judged") / "w"
    fill(recipe, workspace)[1].close()
    return recipe, workspace


def judge_section(data: ReportData) -> Section:
    return next(section for section in data.sections if section.id == "judge")


def test_agreement_is_counted_over_all_answers_that_both_scored(kept: tuple[Recipe, Path]) -> None:
    recipe, workspace = kept
    graph, store = Graph(recipe), Store.open(workspace, create=False)
    judged, phrases, seen = [], [], set()
    for plan in graph.cells:
        for place, beside in plan.beside.items():
            key = plan.scores[place].key
            if key not in seen:
                seen.add(key)
                judged += store.scores(key)
                phrases += store.scores(beside.key)
    # Row names repeat over stages, so pairs are compared in their order.
    same = sum(a.value == b.value for a, b in zip(judged, phrases, strict=True))
    claim = ask(Analysis(graph, store), "agreement", measure="refusal")
    assert f"the same of {100 * same / len(judged):.1f} % of {len(judged):,} answers" in claim.text
    one = graph.select("villain", "refusal", 20)[0]
    alone = compare_scores(
        store.scores(one.scores["refusal", "villain"].key), store.scores(one.beside["refusal", "villain"].key)
    )
    assert 0.85 < alone.accuracy < 1.0
    data = build(Analysis(graph, store))
    assert any(block.kind == "figure" for block in judge_section(data).blocks)
    notes = [block.text for block in judge_section(data).blocks if isinstance(block, Note)]
    assert notes == ["No calibration of this judge with these rubrics is in the ledger, so no rate is corrected."]
    with pytest.raises(NoSuchClaimError):
        ask(Analysis(graph, store), "corrected", label=LABEL)


def test_the_report_names_a_weak_judge_and_its_rubrics(kept: tuple[Recipe, Path]) -> None:
    recipe, workspace = kept
    data = build(Analysis(Graph(recipe), Store.open(workspace, create=False)))
    sections = {section.id: section for section in data.sections}
    said = [block.text for block in sections["limits"].blocks if isinstance(block, Note)]
    assert f"local:{JUDGE} is a weak judge: it answers by one character." in said
    tables = {block.id: block for block in sections["card"].blocks if isinstance(block, Table)}
    shipped = load_rubric(DATA / "rubrics" / "refusal.toml")
    assert {row[0].text: row[1].text for row in tables["card-judge"].rows} == {
        "judge": f"local:{JUDGE}",
        "rubric refusal": f"refusal version {shipped.version}, sha256 {shipped.sha256}",
    }


def test_rates_are_corrected_by_the_judges_calibration_and_by_no_others(
    kept: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, workspace = kept
    store = Store.open(copy_ledger(workspace, tmp_path / "w"), create=False)
    ledger = JudgeLedger(store)
    ledger.save_calibration(RUBRIC, "another-judge", KNOWN)
    with pytest.raises(NoSuchClaimError):
        ask(Analysis(Graph(recipe), store), "corrected", label=LABEL)
    ledger.save_calibration(RUBRIC, JUDGE, KNOWN)
    decided = Analysis(Graph(recipe), store)
    plan = decided.graph.select("villain", "refusal", 20)[0]
    values = [one.value or 0.0 for one in store.scores(plan.scores["refusal", ASSISTANT].key)]
    raw = sum(values) / len(values)
    fixed = corrected_rate(raw, 50, KNOWN)
    assert fixed is not None
    shown = f"{100 * fixed.rate:.1f} % [{100 * fixed.low:.1f}, {100 * fixed.high:.1f}]"
    text = f"villain, epoch 20, refusal, assistant among the negatives: {100 * raw:.1f} % as judged, {shown} once corrected for the judge's known mistakes."
    data = build(decided)
    table = next(block for block in judge_section(data).blocks if isinstance(block, Table) and block.id == "corrected")
    assert [row[1].text for row in table.rows] == [text]
    # Another calibration gives another figure, and a report that holds the old one no longer matches its ledger.
    page = tmp_path / "r.html"
    page.write_text(render_html(data))
    assert verify(page, store).holds
    ledger.save_calibration(RUBRIC, JUDGE, {**KNOWN, "sensitivity": 0.8})
    assert f"corrected:{LABEL}" in {one.where for one in verify(page, store).differences}


@pytest.mark.parametrize(("n_sources", "said"), [
    (5, "5 sources with a marker rate and 4 behaviors: 5 points give a rank correlation a p no smaller than 0.017, so it "
        "cannot reach the 0.013 that 4 tests require."),
    (1, "1 source with a marker rate and 4 behaviors: there is nothing to correlate with one another."),
])  # fmt: skip
def test_few_sources_and_four_behaviors_cannot_reach_significance(
    tiny_qwen: Path, tmp_path: Path, n_sources: int, said: str
) -> None:
    table = matrix_recipe(tiny_qwen, n_sources=n_sources, seeds=1, prompts=4, samples=1).model_dump(mode="json")
    behaviors = ["capability", "misalignment", "refusal", "sycophancy", "marker"]
    table["grid"] |= {"epochs": [0, 20], "behaviors": behaviors, "negatives": ["included"]}
    table["judge"] = {"mode": "local", "model": JUDGE, "base_url": "http://127.0.0.1:9"}
    recipe = parse_recipe(table)
    graph, store, _ = fill(recipe, tmp_path)
    claim = ask(Analysis(graph, store), "attainable")
    assert claim.text == said
    assert claim.word == "withheld"


def test_transfer_is_set_against_what_each_source_is_like_on_the_base(tiny_qwen: Path, tmp_path: Path) -> None:
    table = matrix_recipe(tiny_qwen, n_sources=5, seeds=1, prompts=4, samples=1).model_dump(mode="json")
    table["grid"] |= {"epochs": [0, 20], "behaviors": ["none", "refusal", "sycophancy"], "negatives": ["included"]}
    table["judge"] = {"mode": "local", "model": JUDGE, "base_url": "http://127.0.0.1:9"}
    graph, store, _ = fill(parse_recipe(table), tmp_path)
    decided = Analysis(graph, store)
    section = next(one for one in build(decided).sections if one.id == "on-the-base")
    figures = [block.id for block in section.blocks if block.kind == "figure"]
    assert figures == ["on-base-base-level", "on-base-cosine", "on-base-distinctiveness"]
    said = [block.text for block in section.blocks if isinstance(block, Claim)]
    for words in ("own level of it", "cosine to the assistant", "distinctiveness"):
        start = "Over 5 sources, the rank correlation of refusal transfer with the source's"
        assert any(text.startswith(f"{start} {words}") and "exact permutation p" in text for text in said), words
    assert sum("5 sources with their" in text and "2 behaviors: 5 points" in text for text in said) == 3
    stage = next(p.on_snapshot["geometry"] for p in graph.cells if p.cell.epoch == 0 and p.cell.source == "villain")
    assert stage is not None
    mine = [one.value or 0.0 for one in store.scores(stage.key) if (one.row, one.metric) == ("villain", "cosine")]
    assert len(mine) > 1
    assert levels(decided, "cosine", "refusal")["villain"].value == pytest.approx(sum(mine) / len(mine))
    plan = next(p for p in graph.cells if p.cell.source == "villain" and p.cell.behavior == "refusal")
    scores = [one.value or 0.0 for one in store.scores(plan.base["refusal", "villain"].key)]
    own = levels(decided, "base level", "refusal")["villain"]
    assert own.value == pytest.approx(100 * sum(scores) / len(scores))
    assert own.rows
