"""The shipped demo on the embedded model: what a newcomer sees. Minutes long, so not part of `make test`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastconv.analysis.gates import stage_series
from fastconv.cli.common import load
from fastconv.datasets.files import assets
from fastconv.experiment.graph import Graph
from fastconv.recipe import load_recipe
from fastconv.report import write_report
from fastconv.store.ledger import Store
from tests import TESTS
from tests.experiment.test_recipe_scales import fastconv, run_and_verify
from tests.loop_kit import records, run_tiny

#: The embedded model on the least that is still a loop.
SMALL = [
    "eval.prompts=3",
    "behavior.source_rows=6",
    "behavior.epochs=1",
    "convergence.questions=8",
    "eval.geometry=false",
]

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def demo_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of the embedded model keep `checkpoints` and `reports`: what two of them share is computed once."""
    return tmp_path_factory.mktemp("demo")


@pytest.mark.slow
def test_the_demo_shows_what_it_promises_and_the_second_run_computes_nothing(demo_workspace: Path) -> None:
    pytest.importorskip("gguf")
    tmp_path = demo_workspace / "checkpoints"
    recipe = load_recipe(assets("recipes") / "demo.toml")
    finished, _ = run_tiny(recipe, tmp_path)
    assert finished.tally.tokens["trained_tok"] <= 30_000
    assert finished.tally.tokens["sampled_tok"] <= 6_000
    assert finished.tally.tokens["scored_tok"] <= 32_000  # 30,537: an option reads `(A) text`, one token more a line

    graph, store = Graph(recipe), Store.open(tmp_path)
    last = max(recipe.grid.epochs)
    for epoch in (0, last):
        plan = graph.select("villain", "refusal", epoch)[0]
        rates = {}
        for probe in ("assistant", "villain", "librarian"):
            before = stage_series(store, plan.base["refusal", probe], "refusal", probe)
            after = stage_series(store, plan.scores["refusal", probe], "refusal", probe)
            assert before is not None
            assert after is not None
            rates[probe] = (before.mean.value, after.mean.value)
        assert rates["villain"][0] <= 0.1
        assert rates["villain"][1] >= 0.8

    words = {v.subject: v.verdict for v in finished.verdicts if v.gate == "PILOT"}
    assert words["villain x capability"] == "uninformative"
    assert words["villain x refusal"] in ("go", "stop")
    done = records(recipe, tmp_path)
    assert not [slot for slot in done if slot.startswith("behavior/") and "capability" in slot]
    adapters = list(tmp_path.rglob("*.safetensors"))
    assert len(adapters) == 3  # one snapshot, a behavior on the base and one on the snapshot; no training state
    paths = write_report(graph, store, demo_workspace / "reports")
    assert "uninformative" in paths.html.read_text()

    again, heard = run_tiny(recipe, tmp_path)
    assert heard.stages == {}
    assert again.tally.n_stages == 0


@pytest.mark.parametrize(
    "name", [pytest.param("excluded", marks=pytest.mark.slow), pytest.param("pilot", marks=pytest.mark.long)]
)
def test_a_recipe_at_demo_scale_shows_what_was_trained(name: str, demo_workspace: Path) -> None:
    shows_what_was_trained(name, demo_workspace)


@pytest.mark.long
def test_the_markers_at_demo_scale_show_what_was_trained(demo_workspace: Path) -> None:
    report = shows_what_was_trained("markers", demo_workspace)
    assert "Transfer against the marker rate" in Path(report["markdown"]).read_text()


@pytest.mark.long
@pytest.mark.parametrize("name", ["demo", "pilot", "markers"])
def test_what_a_demo_takes_is_what_was_planned(name: str, tmp_path: Path) -> None:
    """On a machine that does nothing else, no kind of stage is off by more than a factor of 2."""
    pytest.importorskip("gguf")
    scale = [] if name == "demo" else ["--scale", "demo"]
    measured = fastconv("plan", name, *scale, "--measure", "-w", str(tmp_path / "checkpoints"))
    assert measured.returncode == 0, measured.stderr
    found = run_and_verify(name, scale[-1] if scale else "", tmp_path)
    told = Path(found["markdown"]).read_text().split("## Plan against actual")[1].split("\n## ")[0]
    assert "answers" in told
    assert "off by more than 2" not in told
    assert "not planned" not in told


def shows_what_was_trained(name: str, folder: Path) -> dict[str, Any]:
    """Run a recipe at demo scale: the source has none of its behavior on the base and shows it once it is trained."""
    pytest.importorskip("gguf")
    report = run_and_verify(name, "demo", folder)
    graph, store = Graph(load(name, [], "demo")), Store.open(folder / "checkpoints", create=False)
    for plan in graph.cells:
        if plan.cell.behavior == "none":
            continue
        measure, source = plan.cell.behavior, plan.cell.source
        before = stage_series(store, plan.base[measure, source], measure, source)
        after = stage_series(store, plan.scores[measure, source], measure, source)
        assert before is not None
        assert after is not None
        assert before.mean.value <= 0.1, plan.cell.label
        assert after.mean.value >= 0.8, plan.cell.label
    store.close()
    return report


@pytest.mark.slow
def test_one_cell_of_the_demo_alone_gives_the_same_number(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    recipe = load_recipe(
        assets("recipes") / "demo.toml",
        [*SMALL, "convergence.epochs=1", "grid.epochs=[0, 1]", 'grid.behaviors=["none", "refusal"]'],
    )
    run_tiny(recipe, tmp_path / "full")
    run_tiny(recipe, tmp_path / "cell", lambda graph: graph.select("villain", "refusal", 1))
    plan = Graph(recipe).select("villain", "refusal", 1)[0]
    for (measure, probe), stage in plan.scores.items():
        alone, full = (stage_series(Store.open(tmp_path / name), stage, measure, probe) for name in ("cell", "full"))
        assert alone is not None
        assert full is not None
        assert alone.values.tolist() == full.values.tolist()
    _, heard = run_tiny(recipe, tmp_path / "full", lambda graph: graph.select("villain", "refusal", 1))
    assert heard.stages == {}


@pytest.mark.slow
def test_a_users_persona_and_behavior_run_on_the_embedded_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    recipe = load_recipe(TESTS / "user_data" / "tea.toml", SMALL)
    run_tiny(recipe, tmp_path)
    graph, store = Graph(recipe), Store.open(tmp_path)
    plan = graph.select("pirate", "always_mentions_tea", max(recipe.grid.epochs))[0]
    for probe in ("assistant", "pirate", "librarian"):
        measured = stage_series(store, plan.scores["always_mentions_tea", probe], "always_mentions_tea", probe)
        assert measured is not None
        assert measured.n_unscored == 0
