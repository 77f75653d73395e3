"""A recipe that keeps no behavior adapters: files go as soon as nothing is drawn under them, numbers stay."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from fastconv.errors import StoreError
from fastconv.recipe import Recipe
from fastconv.run.run import run_recipe
from fastconv.run.standalone import export_cell
from fastconv.store.ledger import Store
from tests.loop_kit import Heard, adapters, exit_of, forked, results, run_tiny, tiny_recipe


def _files(recipe: Recipe, workspace: Path) -> dict[str, bool]:
    """Whether each adapter's file is there, by slot."""
    store = Store.open(workspace)
    return {slot: store.path(sha, "safetensors").is_file() for slot, sha in adapters(recipe, workspace).items()}


def test_behavior_adapters_go_cell_by_cell_and_every_number_stays(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen, run__keep_adapters=False)
    on_disk: list[int] = []

    def look(progress: Any) -> None:
        if progress.slot.startswith("behavior/"):
            on_disk.append(
                sum(exists for slot, exists in _files(recipe, tmp_path / "ws").items() if "behavior/" in slot)
            )

    run_recipe(recipe, tmp_path / "ws", Heard(look))
    assert on_disk
    assert set(on_disk) == {0}  # when the next one is trained, the one before is gone
    files = _files(recipe, tmp_path / "ws")
    assert len(files) == 5
    assert not any(files.values())
    run_tiny(tiny_recipe(tiny_qwen), tmp_path / "kept")
    assert results(recipe, tmp_path / "ws") == results(tiny_recipe(tiny_qwen), tmp_path / "kept")
    again, heard = run_tiny(recipe, tmp_path / "ws")
    assert heard.stages == {}
    assert again.tally.n_stages == 0


def test_an_export_says_how_to_get_a_freed_adapter_back(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen, grid__epochs=[0], run__keep_adapters=False)
    run_tiny(recipe, tmp_path / "ws")
    store = Store.open(tmp_path / "ws")
    with pytest.raises(StoreError, match=r"the artefact is gone\. Fix: `fastconv forget` the stage that made it"):
        export_cell(recipe, store, tmp_path / "out", "villain", "refusal", 0)
    store.forget("behavior/villain/e0/refusal/excluded/s42")
    stored = recipe.model_copy(update={"run": recipe.run.model_copy(update={"keep_adapters": True})})
    _, heard = run_tiny(stored, tmp_path / "ws")
    assert list(heard.stages) == ["behavior/villain/e0/refusal/excluded/s42"]
    assert export_cell(recipe, store, tmp_path / "out", "villain", "refusal", 0)


def test_an_adapter_that_another_run_rests_on_stays(tiny_qwen: Path, tmp_path: Path) -> None:
    run_tiny(tiny_recipe(tiny_qwen, grid__epochs=[0]), tmp_path)
    recipe = tiny_recipe(tiny_qwen, grid__epochs=[0], run__keep_adapters=False)
    run_tiny(recipe, tmp_path)
    assert all(_files(recipe, tmp_path).values())


def test_after_a_kill_between_the_last_answer_and_the_freeing_the_next_run_frees(
    tiny_qwen: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tiny_qwen, grid__epochs=[0], run__keep_adapters=False)

    def work() -> None:
        from fastconv.run import run

        run._free_adapters = lambda *args: signal.raise_signal(signal.SIGKILL)
        run_tiny(recipe, tmp_path)

    pytest.importorskip("fastconv.run.executor")
    assert exit_of(forked(work)) == -signal.SIGKILL
    run_tiny(recipe, tmp_path)
    assert not any(_files(recipe, tmp_path).values())
