"""Controls: which are on by default, what each is trained on, and that none of them counts as a finding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastconv.analysis.analysis import Analysis
from fastconv.datasets.behaviors import NO_BEHAVIOR
from fastconv.datasets.files import assets
from fastconv.experiment.graph import Graph
from fastconv.recipe import GridSettings, load_recipe, recipe_sha256
from fastconv.report import write_report
from fastconv.store.ledger import Store
from tests.loop_kit import DoneRun, run_tiny, tiny_recipe

SOURCES = ["villain", "assistant", "librarian"]


@pytest.fixture(scope="module")
def run(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> DoneRun:
    """A source, the assistant as its own and the negative control, on source and generic convergence; refused rows none."""
    recipe = tiny_recipe(
        tiny_qwen,
        grid__sources=SOURCES,
        grid__convergence=["source", "generic"],
        grid__epochs=[0, 2],
        eval__geometry=False,
    )
    workspace = tmp_path_factory.mktemp("controls")
    return DoneRun(recipe, workspace, *run_tiny(recipe, workspace))


@pytest.fixture(scope="module")
def decided(run: DoneRun) -> Iterator[Analysis]:
    store = Store.open(run.workspace)
    yield Analysis(run.graph, store)
    store.close()


@pytest.mark.parametrize("path", sorted((assets("recipes")).glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_has_the_convergence_only_control(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe_sha256(recipe)
    if not recipe.grid.contrasts:  # sides are compared with one another or with the base instead
        assert NO_BEHAVIOR in recipe.grid.behaviors
    assert 0 in recipe.grid.epochs


def test_the_default_grid_has_the_convergence_only_control() -> None:
    assert NO_BEHAVIOR in GridSettings().behaviors


def test_the_assistant_as_its_own_source_is_the_generic_convergence_of_all(run: DoneRun) -> None:
    """Its own answers under its own prompt: one training, whatever it is called."""
    keys = {(p.cell.source, p.cell.convergence): p.snapshot.key for p in run.graph.cells if p.snapshot}
    assert keys["assistant", "source"] == keys["villain", "generic"] == keys["librarian", "generic"]
    assert keys["villain", "source"] != keys["villain", "generic"]
    assert run.finished.failed == ()


def test_a_degenerate_source_has_two_probes_and_decides_nothing(run: DoneRun, decided: Analysis) -> None:
    plan = next(plan for plan in run.graph.cells if plan.cell.source == "assistant" and plan.adapter)
    assert {probe for _, probe in plan.scores} == {"assistant", "librarian"}
    assert decided.measured
    assert not [verdict.label for verdict in decided.verdicts if verdict.label.startswith("assistant ")]
    pilots = {verdict.subject for verdict in decided.gates if verdict.gate == "PILOT"}
    assert pilots == {"villain x refusal", "librarian x refusal"}
    for gate in ("G5", "CONFIRM", "FALSIFY"):
        (word,) = [verdict for verdict in decided.gates if verdict.gate == gate]
        assert "assistant" not in word.reason
        assert "librarian" not in word.reason
        assert "has 1 of 3 sources" in word.reason or "has 1 and 1" in word.reason  # the villain alone counts


def test_generic_convergence_stands_beside_and_moves_no_pilot(decided: Analysis) -> None:
    assert not [verdict.label for verdict in decided.verdicts if " generic " in verdict.label]
    controls = [contrast.label for contrast in decided.secondary if contrast.what == "control"]
    assert [label for label in controls if label.startswith("villain generic e2 refusal")]
    groups = {verdict.subject for verdict in decided.gates if verdict.gate == "CHANGE"}
    assert [subject for subject in groups if "villain x refusal" in subject and "generic" in subject]
    (pilot,) = [
        verdict for verdict in decided.gates if (verdict.gate, verdict.subject) == ("PILOT", "villain x refusal")
    ]
    rows = {
        row
        for verdict in decided.gates
        if verdict.gate == "CHANGE" and "generic" in verdict.subject
        for row in verdict.rows
    }
    own = {
        row
        for verdict in decided.gates
        if verdict.gate == "CHANGE" and "generic" not in verdict.subject
        for row in verdict.rows
    }
    assert not set(pilot.rows) & (rows - own)


def test_the_canary_gives_way_where_it_is_the_source(run: DoneRun) -> None:
    probes = {source: set() for source in SOURCES}
    for plan in run.graph.cells:
        probes[plan.cell.source] |= {probe for _, probe in plan.scores}
    assert probes["librarian"] == {"assistant", "librarian", "data_scientist"}
    assert probes["villain"] == {"assistant", "villain", "librarian"}
    rows = [stage for stage in run.graph.stages() if stage.kind == "rows"]
    for stage in rows:
        source = stage.slot.split("/")[2]
        spoken = {row.persona for row in stage.work["rows"]}
        assert ("data_scientist" if source == "librarian" else "librarian") not in spoken


def test_the_report_says_that_the_assistant_as_source_is_degenerate(run: DoneRun, tmp_path: Path) -> None:
    text = write_report(Graph(run.recipe), Store.open(run.workspace), tmp_path).markdown.read_text()
    assert "The assistant as its own source is a degenerate control" in text
    assert "It counts in no verdict" in text
