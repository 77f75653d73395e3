"""A run is read with the keys that it was computed with: on a laptop or a login node, whose engine is another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastconv.errors import ModelError
from fastconv.experiment import graph as module
from fastconv.experiment.graph import Graph, graph_of_run
from fastconv.recipe import Recipe, parse_recipe
from fastconv.report import write_report
from fastconv.report.verify import verify
from fastconv.run.gc import find_garbage
from fastconv.run.status import status_of
from fastconv.store.ledger import Store
from tests.loop_kit import DoneRun

OTHER = {"engine": "unsloth", "device": "cuda", "dtype": "bfloat16"}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine would compute with another engine."""
    monkeypatch.setattr(module, "engine_identity", lambda settings: OTHER)


def _no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(settings: Any) -> Any:
        raise ModelError("no such model folder", where=settings.id, fix="give one")

    monkeypatch.setattr(module, "locate", missing)


def _states(graph: Graph, store: Store) -> set[str]:
    return {status.state for status in status_of(graph, store)}


@pytest.mark.parametrize("has_base", [True, False])
def test_a_run_of_another_machine_is_reported_and_verified(
    done_run: DoneRun, elsewhere: None, has_base: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not has_base:
        _no_base(monkeypatch)
    store = Store.open(done_run.workspace, create=False)
    graph = graph_of_run(done_run.recipe, store)
    assert _states(graph, store) <= {"done", "skipped"}
    paths = write_report(graph, store, tmp_path)
    found = verify(paths.html, store)
    assert found.holds
    assert found.n_claims > 10


def test_what_this_machine_would_compute_keeps_its_own_keys(done_run: DoneRun, elsewhere: None) -> None:
    store = Store.open(done_run.workspace, create=False)
    assert {stage.key for stage in Graph(done_run.recipe).stages()}.isdisjoint(
        key for (key,) in store.rows("SELECT key FROM stages WHERE kind='eval'")
    )


def test_a_run_of_this_machine_is_read_as_ever(done_run: DoneRun) -> None:
    store = Store.open(done_run.workspace, create=False)
    read, own = graph_of_run(done_run.recipe, store), Graph(done_run.recipe)
    assert [stage.key for stage in read.stages()] == [stage.key for stage in own.stages()]


def _changed(recipe: Recipe, **tables: dict[str, Any]) -> Recipe:
    table = recipe.model_dump(mode="json")
    return parse_recipe({**table, **{name: {**table[name], **change} for name, change in tables.items()}})


def test_a_recipe_with_another_judge_finds_the_completions_of_the_run(done_run: DoneRun, elsewhere: None) -> None:
    store = Store.open(done_run.workspace, create=False)
    judged = _changed(done_run.recipe, judge={"mode": "local", "model": "j", "base_url": "http://127.0.0.1:9/v1"})
    drawn, found = (
        {
            stage.key
            for stage in graph_of_run(recipe, store).stages()
            if stage.kind == "eval" and store.record(stage.key)
        }
        for recipe in (done_run.recipe, judged)
    )
    assert drawn
    assert found == drawn


def test_a_recipe_of_another_base_is_not_read_with_this_ones_keys(done_run: DoneRun, elsewhere: None) -> None:
    store = Store.open(done_run.workspace, create=False)
    other = _changed(done_run.recipe, model={"id": "builtin:tiny"})
    assert graph_of_run(other, store).engine_inputs["engine"] == OTHER
    assert "done" not in _states(graph_of_run(other, store), store)


def test_nothing_of_an_unfinished_run_is_garbage_elsewhere(done_run: DoneRun, elsewhere: None) -> None:
    store = Store.open(done_run.workspace, create=False)
    assert not [item for item in find_garbage(store).garbage if item.kind == "superseded stage"]
