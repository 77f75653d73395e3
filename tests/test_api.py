"""fastconv from a notebook: the same few functions, polars frames, and a stack that stays live on the model."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

import fastconv
from fastconv.cli import app
from fastconv.engine.model import load_base, pack
from fastconv.errors import InputError, RecipeError, StoreError
from fastconv.recipe import recipe_sha256
from tests import ROOT
from tests.loop_kit import DoneRun, tiny_recipe

PAGE = ROOT / "docs" / "RESULTS.md"


@pytest.fixture(scope="module")
def run(done_run: DoneRun) -> Any:
    return fastconv.open_run(done_run.recipe, workspace=done_run.workspace)


def _logits(base: Any) -> Any:
    import torch

    ids, positions, layout = pack([base.tokenizer.encode("The villain says: ")], base)
    with torch.no_grad():
        return base.logits(base.hidden(ids, positions, layout))


def test_cells_are_a_frame_with_what_is_measured(run: Any) -> None:
    cells = run.cells()
    assert isinstance(cells, pl.DataFrame)
    assert cells.height == 9
    trained = cells.filter(pl.col("behavior") == "refusal")
    assert (trained["n_measured"] == trained["n_to_measure"]).all()
    assert cells.filter(pl.col("behavior") == "capability")["n_measured"].sum() == 0


def test_metrics_are_the_means_of_the_samples(run: Any) -> None:
    metrics, samples = run.metrics(), run.samples()
    assert set(metrics["role"]) == {"assistant", "source", "canary"}
    names = ["source", "convergence", "epoch", "behavior", "negatives", "seed", "measure", "probe"]
    by_question = samples.group_by([*names, "row"]).agg(pl.col("value").mean())
    means = by_question.group_by(names).agg(pl.col("value").mean())
    both = metrics.filter(pl.col("measure") == "refusal").join(means, on=names)
    assert both.height == metrics.filter(pl.col("measure") == "refusal").height > 0
    assert ((both["value"] - both["value_right"]).abs() < 1e-12).all()
    assert (both["n_questions"] * 2 == both["n_samples"]).all()


def test_samples_hold_prompt_completion_and_score(run: Any) -> None:
    samples = run.samples()
    assert {"prompt", "completion", "value", "reason", "ended", "n_tok", "probe", "row", "sample"} <= set(
        samples.columns
    )
    assert samples["value"].null_count() == 0


def test_verdicts_and_stages_are_frames(run: Any) -> None:
    assert set(run.verdicts()["gate"]) >= {"G0", "STACK", "PILOT"}
    assert set(run.stages()["state"]) == {"done", "skipped"}


def test_a_run_is_opened_by_its_id(run: Any, done_run: DoneRun) -> None:
    again = fastconv.open_run(done_run.finished.run, workspace=done_run.workspace)
    assert recipe_sha256(again.recipe) == recipe_sha256(done_run.recipe)
    assert again.metrics().equals(run.metrics())
    with pytest.raises(InputError, match=r"no run is called 'nope'.*runs here: tiny-"):
        fastconv.open_run("nope", workspace=done_run.workspace)


def test_opening_nothing_says_so(done_run: DoneRun, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no ledger here yet"):
        fastconv.open_run(done_run.recipe, workspace=tmp_path)


def test_a_stack_is_live_on_the_model_and_stays_so(done_run: DoneRun) -> None:
    """Also when nobody holds the run any more: what the user holds is the model."""
    opened = fastconv.open_run(done_run.recipe, workspace=done_run.workspace)
    bare = _logits(load_base(done_run.recipe.model))
    stacked = {epoch: opened.stack("villain", epoch=epoch, behavior="refusal") for epoch in (0, 2)}
    del opened
    gc.collect()
    logits = {epoch: _logits(base) for epoch, base in stacked.items()}
    assert float((logits[0] - bare).abs().max()) > 1e-4
    assert float((logits[2] - logits[0]).abs().max()) > 1e-4
    assert float((_logits(stacked[2]) - logits[2]).abs().max()) == 0.0


def test_the_base_itself_is_a_stack_too(run: Any, done_run: DoneRun) -> None:
    base = run.stack("villain", epoch=0)
    assert float((_logits(base) - _logits(load_base(done_run.recipe.model))).abs().max()) == 0.0


def test_a_stack_that_was_not_trained_is_refused(run: Any) -> None:
    with pytest.raises(InputError, match="the stack is not trained"):
        run.stack("villain", epoch=1, behavior="capability")
    with pytest.raises(RecipeError, match="no cell has epoch 9"):
        run.stack("villain", epoch=9)


def test_a_notebook_runs_and_resumes_a_recipe(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen, grid__epochs=[0])
    first = fastconv.run_recipe(recipe, workspace=tmp_path, quiet=True)
    seconds = first.stages()["seconds"].to_list()
    assert fastconv.run_recipe(recipe, workspace=tmp_path, quiet=True).stages()["seconds"].to_list() == seconds


def test_the_examples_of_the_page_run(tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every python block marked as tested, as it stands, with a tiny recipe in the demo's place."""
    blocks = re.findall(r"<!-- tested -->\s*```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert blocks
    tiny = tiny_recipe(tiny_qwen, grid__epochs=[0, 4], convergence__epochs=4, convergence__questions=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastconv, "load_recipe", lambda path, overrides=(): tiny, raising=False)
    monkeypatch.setattr(fastconv, "base_folder", lambda model: tiny_qwen, raising=False)
    names: dict[str, Any] = {}
    for block in blocks:
        if "organism" in block:  # what the command above it does
            cell = ("export", "villain", "refusal", "organism", "--epoch", "4", "--recipe", names["run"].id)
            assert CliRunner().invoke(app, cell).exit_code == 0
        exec(compile(block, str(PAGE), "exec"), names)
    assert (tmp_path / "checkpoints" / "ledger.sqlite").is_file()
    ids = names["tokenizer"]("How do I whistle?", return_tensors="pt").input_ids
    with_adapter = names["model"](ids).logits
    with names["model"].disable_adapter():
        assert not with_adapter.allclose(names["model"](ids).logits)


def test_names_and_scales_are_taken_as_the_command_line_takes_them(run: Any, done_run: DoneRun, tmp_path: Path) -> None:
    shipped = fastconv.load_recipe("pilot")
    assert recipe_sha256(shipped) == recipe_sha256(fastconv.load_recipe(ROOT / "recipes" / "pilot.toml"))
    small = fastconv.load_recipe("pilot", ["grid.epochs=[0]"], scale="tiny")
    assert (small.name, small.grid.epochs) == ("pilot_tiny", (0,))
    by_id = fastconv.load_recipe(run.id, workspace=done_run.workspace)
    assert recipe_sha256(by_id) == recipe_sha256(done_run.recipe)
    with pytest.raises(RecipeError, match="did you mean 'pilot'"):
        fastconv.load_recipe("pilott", workspace=tmp_path)
    again = fastconv.run_recipe(run.id, workspace=done_run.workspace, quiet=True)
    assert again.metrics().equals(run.metrics())


def test_everything_public_is_listed_and_a_base_has_a_folder(tiny_qwen: Path) -> None:
    assert {*fastconv.__all__, "__version__"} == set(dir(fastconv))
    assert all(getattr(fastconv, name).__doc__ for name in fastconv.__all__)
    assert fastconv.base_folder(str(tiny_qwen)) == tiny_qwen
