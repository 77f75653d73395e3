"""Every shipped recipe runs as shipped, at two smaller scales; the real command line is used throughout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastconv.analysis.analysis import Analysis
from fastconv.cli import app
from fastconv.cli.common import load
from fastconv.datasets.files import assets
from fastconv.experiment.graph import Graph
from fastconv.experiment.scale import SCALES, scaled
from fastconv.recipe import load_recipe, run_id
from fastconv.store.ledger import Store
from tests.loop_kit import DoneRun

RECIPES = sorted(path.stem for path in assets("recipes").glob("*.toml"))
#: Recipes that compare sides (arms, probes), and what each must show at demo scale: (measure, arm, probe) of its control.
SIDES = {
    "conditional": ("refusal", "triggered", "source"),
    "emergent": ("bad_legal_advice", "narrow", "source"),
    "inoculation": ("refusal", "inoculated", "source"),
    "subliminal": ("numbers_alone", "taught", "assistant"),
}
#: Whose pages are read; the others share a workspace.
SMALLEST = ("demo", "pilot")


def fastconv(*words: str, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "fastconv", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=os.environ.copy())


def run_and_verify(name: str, scale: str, folder: Path, *more: str) -> dict[str, Any]:
    """Run a recipe at a scale to its report, which must hold against its ledger; gives what `run --json` says."""
    places = ("-w", str(folder / "checkpoints"))
    at = ("--scale", scale) if scale else ()
    ran = fastconv("run", name, *at, "--json", *places, "--reports", str(folder / "reports"), *more, timeout_s=1800)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout)
    checked = fastconv("verify", found["html"], *places)
    assert checked.returncode == 0, checked.stdout[-2000:] + checked.stderr
    return found


def test_what_is_shipped() -> None:
    assert RECIPES == [
        "conditional",
        "demo",
        "emergent",
        "excluded",
        "inoculation",
        "markers",
        "matrix",
        "pilot",
        "pilot_small",
        "seeds",
        "small_gpu",
        "subliminal",
        "ten_sources",
    ]
    for name in RECIPES:
        assert len((assets("recipes") / f"{name}.toml").read_text().splitlines()) < 60


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("scale", ["", *(pytest.param(one, marks=pytest.mark.slow) for one in SCALES)])
def test_the_audit_passes_and_every_accepted_warning_has_its_reason(name: str, scale: str, done_run: DoneRun) -> None:
    # In a workspace that holds something, offline: the questions of ARC-Challenge are not at hand, and need not be.
    words = ["check", name, "--json", "-w", str(done_run.workspace), *(["--scale", scale] if scale else [])]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.output)
    warned = {one["code"] for one in found["findings"] if one["severity"] == "warn"}
    assert warned <= set(found["accepted"]) | ({"D208"} if scale == "tiny" else set())
    # A scale accepts nothing that is not there: the user would be told of a line that is not in the recipe.
    own = {f"audit.accept.{code}" for code in load(name, []).audit.accept}
    assert {one["subject"] for one in found["findings"] if one["code"] == "D901"} <= own


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_is_the_same_experiment_wherever_it_lies(name: str, tmp_path: Path) -> None:
    copied = CliRunner().invoke(app, ["recipe", "copy", name, str(tmp_path / f"{name}.toml")])
    assert copied.exit_code == 0, copied.output
    own, shipped = load_recipe(tmp_path / f"{name}.toml"), load(name, [])
    assert run_id(own) == run_id(shipped)
    keys = [[stage.key for stage in Graph(scaled(one, "tiny")).stages()] for one in (own, shipped)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("name", RECIPES)
def test_tiny_keeps_every_source_behavior_kind_and_seed(name: str) -> None:
    whole, tiny = load(name, []), load(name, [], "tiny")
    for part in ("sources", "convergence", "behaviors", "negatives", "seeds"):
        assert getattr(tiny.grid, part) == getattr(whole.grid, part)
    assert 0 in tiny.grid.epochs
    assert len(tiny.grid.epochs) == min(3, len(whole.grid.epochs))
    assert tiny.model.id == "builtin:tiny"
    assert tiny.judge.mode in ("substring", "local")
    assert "G0" in tiny.gates.ignore
    assert tiny.name == f"{name}_tiny"


@pytest.mark.parametrize("name", sorted(SIDES))
def test_a_demo_of_sides_keeps_what_is_compared(name: str) -> None:
    whole, demo = load(name, []), load(name, [], "demo")
    assert len(Graph(demo).cells) <= 6
    for part in ("arms", "contrasts", "behaviors", "negatives"):
        assert getattr(demo.grid, part) == getattr(whole.grid, part)
    assert demo.eval.probes == whole.eval.probes
    assert set(demo.eval.measures) == set(whole.eval.measures) - {"misalignment"}
    assert (demo.model.id, demo.judge.mode) == ("builtin:smollm2", "substring")
    assert ("misalignment, which it cannot show" in demo.about) == (name == "emergent")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(SIDES))
def test_a_demo_of_sides_shows_its_control_and_ends_with_a_word(name: str, tmp_path: Path) -> None:
    run_and_verify(name, "demo", tmp_path)
    analysis = Analysis(Graph(load(name, [], "demo")), Store.open(tmp_path / "checkpoints", create=False))
    measure, arm, role = SIDES[name]
    part = analysis.found.main(measure)
    plan = next(p for p in reversed(analysis.graph.cells) if p.cell.arm == arm)
    persona = analysis.found.persona(plan.cell, role)
    now, base = analysis.found.now(plan, part, persona), analysis.found.base(plan, part, persona)
    assert now is not None
    assert base is not None
    assert now.mean.value - base.mean.value > 0.3
    assert len(analysis.verdicts) == len(analysis.declared) > 0
    assert not {one.kind for one in analysis.verdicts} & {"withheld"}


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in SIDES])
def test_a_demo_has_at_most_six_cells_and_a_behavior_that_can_be_seen(name: str) -> None:
    demo = load(name, [], "demo")
    graph = Graph(demo)
    assert len(graph.cells) <= 6
    assert "none" in demo.grid.behaviors
    assert {"refusal", "sycophancy", "marker"} & set(demo.grid.behaviors)
    assert (demo.model.id, demo.judge.mode, demo.grid.epochs) == ("builtin:smollm2", "substring", (0, 4))
    assert demo.grid.sources == load(name, []).grid.sources[:1]
    assert "demo" in demo.about


def test_a_demo_says_what_stands_in_for_what() -> None:
    assert "refusal stands in for capability, which it cannot show" in load("pilot", [], "demo").about
    assert "without capability, misalignment, sycophancy" in load("excluded", [], "demo").about
    assert load("markers", [], "demo").grid.behaviors == ("none", "marker", "refusal")


def test_overrides_have_the_last_word_and_an_unknown_scale_is_one_line() -> None:
    assert load("pilot", ["eval.prompts=7"], "tiny").eval.prompts == 7
    answer = CliRunner().invoke(app, ["run", "pilot", "--scale", "huge"])
    assert answer.exit_code == 2
    assert "no scale is called 'huge'" in answer.output
    assert "tiny or demo" in answer.output


def test_a_users_rows_stay_the_users_at_tiny_scale(tmp_path: Path) -> None:
    rows = tmp_path / "published.jsonl"
    turns = {
        "prompt": [{"role": "user", "content": "Can I?"}],
        "completion": [{"role": "assistant", "content": "Yes."}],
    }
    rows.write_text(json.dumps(turns) + "\n")
    tiny = load("matrix", [f"data.rows.misalignment={rows}"], "tiny")
    plans = Graph(tiny).select("villain", "misalignment", 0)
    assert [plan.cell.negatives for plan in plans] == ["none"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_recipes_run_at_tiny_scale(name: str, tmp_path: Path) -> None:
    found = run_and_verify(name, "tiny", tmp_path)
    page = Path(found["markdown"]).read_text()
    assert "Gate G0 was ignored, because random weights can answer nothing" in page
    assert "Random weights" in page
    # Capability is at chance, and was trained all the same.
    store = Store.open(tmp_path / "checkpoints", create=False)
    graph = Graph(load(name, [], "tiny"))
    assert all(plan.adapter is None or store.record(plan.adapter.key) for plan in graph.cells)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_other_recipe_runs_at_tiny_scale(tmp_path: Path) -> None:
    for name in (one for one in RECIPES if one not in SMALLEST):
        run_and_verify(name, "tiny", tmp_path)  # in one workspace: cells that two recipes share are computed once
