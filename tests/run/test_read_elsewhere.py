"""A run is read with the keys that it was computed with: on a laptop or a login node, whose engine is another one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fastconv.engine import locate as located
from fastconv.errors import ModelError
from fastconv.experiment import graph as module
from fastconv.experiment import recorded
from fastconv.experiment.graph import Graph
from fastconv.experiment.recorded import graph_of_run
from fastconv.recipe import Recipe, canonical_json, parse_recipe, recipe_sha256, run_id
from fastconv.report import write_report
from fastconv.report.verify import verify
from fastconv.run.gc import find_garbage
from fastconv.run.rejudge import finish_judging
from fastconv.run.status import status_of
from fastconv.store.ledger import Store
from tests.loop_kit import DoneRun, Heard, as_computed_by, copy_ledger, with_model

OWN = {"engine": "torch", "device": "cpu", "dtype": "float32"}
OTHER = {"engine": "unsloth", "device": "cuda", "dtype": "bfloat16"}
THIRD = {"engine": "torch", "device": "cuda", "dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the recipe leaves the device open, this machine computes on its CPU."""
    monkeypatch.setattr(located, "gpu_is_visible", lambda: False)


@pytest.fixture(scope="module")
def open_run(letters_run: DoneRun, tmp_path_factory: pytest.TempPathFactory) -> DoneRun:
    """A run whose recipe leaves the device open, computed on a CPU; its multiple-choice sets have one key everywhere."""
    workspace = tmp_path_factory.mktemp("open") / "checkpoints"
    shutil.copytree(letters_run.workspace, workspace)
    recipe = with_model(letters_run.recipe, workspace, device="auto")
    return DoneRun(recipe, workspace, letters_run.finished, letters_run.heard)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine would compute with another engine."""
    monkeypatch.setattr(located, "engine_identity", lambda settings: OTHER)


def _no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(settings: Any) -> Any:
        raise ModelError("no such model folder", where=settings.id, fix="give one")

    monkeypatch.setattr(module, "locate", missing)


def _states(graph: Graph, store: Store) -> set[str]:
    return {status.state for status in status_of(graph, store)}


@pytest.mark.parametrize("has_base", [True, False])
def test_a_run_of_another_machine_is_reported_and_verified(
    open_run: DoneRun, elsewhere: None, has_base: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not has_base:
        _no_base(monkeypatch)
    store = Store.open(open_run.workspace, create=False)
    graph = graph_of_run(open_run.recipe, store)
    assert any("engine" not in stage.inputs and stage.kind == "rows" for stage in graph.stages())
    assert _states(graph, store) == {"done"}
    paths = write_report(graph, store, tmp_path)
    found = verify(paths.html, store)
    assert found.holds
    assert found.n_claims > 10


def test_what_this_machine_would_compute_keeps_its_own_keys(open_run: DoneRun, elsewhere: None) -> None:
    store = Store.open(open_run.workspace, create=False)
    assert {stage.key for stage in Graph(open_run.recipe).stages()}.isdisjoint(
        key for (key,) in store.rows("SELECT key FROM stages WHERE kind='eval'")
    )


def test_a_run_of_this_machine_is_read_as_ever(open_run: DoneRun) -> None:
    store = Store.open(open_run.workspace, create=False)
    read, own = graph_of_run(open_run.recipe, store), Graph(open_run.recipe)
    assert [stage.key for stage in read.stages()] == [stage.key for stage in own.stages()]


def _changed(recipe: Recipe, **tables: dict[str, Any]) -> Recipe:
    table = recipe.model_dump(mode="json")
    return parse_recipe({**table, **{name: {**table[name], **change} for name, change in tables.items()}})


def test_a_recipe_with_another_judge_finds_the_completions_of_the_run(open_run: DoneRun, elsewhere: None) -> None:
    store = Store.open(open_run.workspace, create=False)
    judged = _changed(open_run.recipe, judge={"mode": "local", "model": "j", "base_url": "http://127.0.0.1:9/v1"})
    drawn, found = (
        {
            stage.key
            for stage in graph_of_run(recipe, store).stages()
            if stage.kind == "eval" and store.record(stage.key)
        }
        for recipe in (open_run.recipe, judged)
    )
    assert drawn
    assert found == drawn


def test_a_recipe_of_another_base_is_not_read_with_this_ones_keys(open_run: DoneRun, elsewhere: None) -> None:
    store = Store.open(open_run.workspace, create=False)
    other = _changed(open_run.recipe, model={"id": "builtin:tiny"})
    assert graph_of_run(other, store).engine_inputs["engine"] == OTHER
    done = {stage.kind for stage in graph_of_run(other, store).stages() if store.record(stage.key)}
    assert done == {"rows"}  # of multiple-choice questions, which no base has written


def _as_computed_by_both(open_run: DoneRun, folder: Path) -> Store:
    """The run's ledger after the other engine has computed all of it again, as the newest, and has not finished."""
    store = Store.open(copy_ledger(open_run.workspace, folder), create=False)
    own, other = (
        Graph(open_run.recipe),
        Graph(open_run.recipe, {**Graph(open_run.recipe).engine_inputs, "engine": OTHER}),
    )
    new_key = {a.key: b.key for a, b in zip(own.stages(), other.stages(), strict=True)}
    inputs = {a.key: canonical_json(b.inputs) for a, b in zip(own.stages(), other.stages(), strict=True)}
    with store.transaction() as db:
        for key in [key for (key,) in store.rows("SELECT key FROM stages") if key in new_key]:
            columns = "kind, slot, version, outputs, facts, seconds"
            db.execute(
                f"INSERT OR IGNORE INTO stages (key, inputs, finished_at, {columns}) SELECT ?, ?, finished_at + 1e6, {columns} "
                "FROM stages WHERE key=?", (new_key[key], inputs[key], key),
            )  # fmt: skip
            db.execute("UPDATE run_stages SET key=? WHERE key=?", (new_key[key], key))
        db.execute("UPDATE runs SET finished_at=NULL")
    return store


def test_where_both_engines_have_computed_it_each_machine_reads_its_own(open_run: DoneRun, tmp_path: Path) -> None:
    store = _as_computed_by_both(open_run, tmp_path / "both")
    assert graph_of_run(open_run.recipe, store).engine_inputs["engine"] == OWN
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(located, "engine_identity", lambda settings: OTHER)
        assert graph_of_run(open_run.recipe, store).engine_inputs["engine"] == OTHER


@pytest.mark.parametrize("machine", [OWN, OTHER, THIRD])
def test_nothing_of_an_unfinished_run_is_garbage_on_any_machine(
    open_run: DoneRun, tmp_path: Path, machine: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _as_computed_by_both(open_run, tmp_path / "both")
    monkeypatch.setattr(located, "engine_identity", lambda settings: machine)
    assert not [item for item in find_garbage(store).garbage if item.kind == "superseded stage"]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("has_base", [True, False])
def test_a_run_that_was_hardly_begun_elsewhere_is_read_as_it_was_computed(
    open_run: DoneRun, tmp_path: Path, has_base: bool, is_first: bool
) -> None:
    """On a third machine: of two engines the one that has computed most, whatever their order and also where the base is not."""
    store = Store.open(copy_ledger(open_run.workspace, tmp_path / "begun"), create=False)
    first = Graph(open_run.recipe, {**Graph(open_run.recipe).engine_inputs, "engine": OTHER}).stages()[0]
    store.commit(first, outputs={}, facts={}, seconds=1.0)
    if is_first:
        with store.transaction() as db:
            db.execute("UPDATE stages SET rowid=0 WHERE key=?", (first.key,))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(located, "engine_identity", lambda settings: THIRD)
        if not has_base:
            _no_base(patched)
        assert graph_of_run(open_run.recipe, store).engine_inputs["engine"] == OWN


def test_a_try_that_failed_here_hides_nothing(open_run: DoneRun, elsewhere: None, tmp_path: Path) -> None:
    """A login node that ran out of memory once never read that run again."""
    store = Store.open(copy_ledger(open_run.workspace, tmp_path / "tried"), create=False)
    store.note_failure(Graph(open_run.recipe).stages()[0], 4, "no memory is left")
    assert graph_of_run(open_run.recipe, store).engine_inputs["engine"] == OWN


@pytest.mark.parametrize(
    ("settings", "engine", "is_read"),
    [
        ({}, OTHER, True), ({}, THIRD, True), ({"dtype": "bfloat16"}, {**OWN, "dtype": "bfloat16"}, True),
        ({"engine": "unsloth"}, OTHER, True), ({"weights": "4bit"}, {**OTHER, "weights": "4bit"}, True),
        ({}, {**OWN, "dtype": "bfloat16"}, False), ({}, {**THIRD, "dtype": "float32"}, False),
        ({}, {**OWN, "engine": "unsloth"}, False), ({}, {**OTHER, "dtype": "float32"}, False),
        ({"dtype": "float32"}, {**OTHER, "dtype": "float32"}, False), ({}, {**OTHER, "weights": "4bit"}, False),
        ({"device": "cpu"}, OTHER, False), ({"engine": "torch"}, OTHER, False),
    ],
)  # fmt: skip
def test_only_what_the_settings_resolve_to_somewhere_is_read(
    open_run: DoneRun, tmp_path: Path, settings: dict[str, str], engine: dict[str, str], is_read: bool
) -> None:
    """Beside another recipe that names it: "auto" is no wildcard."""
    workspace = copy_ledger(open_run.workspace, tmp_path / "theirs")
    as_computed_by(engine, open_run.recipe, workspace)
    recipe = with_model(open_run.recipe, workspace, **settings)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(located, "engine_identity", lambda settings: {**OWN, "engine": "none like it"})
        found = graph_of_run(recipe, Store.open(workspace, create=False)).engine_inputs["engine"]
    assert (found == engine) == is_read


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"engine": "unsloth"}, {"engine": "unsloth"}), ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"weights": "4bit"}, {"weights": "4bit", "dtype": "bfloat16"}),
    ],
)  # fmt: skip
def test_what_other_settings_computed_is_not_read_as_this_recipes(
    open_run: DoneRun, elsewhere: None, tmp_path: Path, change: dict[str, str], named: dict[str, str]
) -> None:
    """Neither before it is run nor after, however little it has of its own."""
    store = Store.open(copy_ledger(open_run.workspace, tmp_path / "settings"), create=False)
    other = _changed(open_run.recipe, model=change)
    assert graph_of_run(other, store).engine_inputs["engine"] == OTHER
    engine = {**OWN, **named}
    first = Graph(other, {**Graph(other).engine_inputs, "engine": engine}).stages()[0]
    run = run_id(other)
    store.start_run(run, canonical_json(other.model_dump(mode="json")), recipe_sha256(other), "", {})
    store.commit(first, outputs={}, facts={}, seconds=1.0)
    store.note_stage_of_run(run, first, reused=False)
    assert graph_of_run(other, store).engine_inputs["engine"] == engine


def test_rows_of_other_runs_that_are_damaged_do_not_matter(open_run: DoneRun, elsewhere: None, tmp_path: Path) -> None:
    store = Store.open(copy_ledger(open_run.workspace, tmp_path / "damaged"), create=False)
    bad = Graph(open_run.recipe).stages()[0]
    with store.transaction() as db:
        db.execute(
            "INSERT INTO runs (id, recipe, recipe_sha256, source, started_at, facts) VALUES ('x', '[]', '', '', 1.0, '{}')"
        )
        for key, inputs in (("a", '{"engine": 5}'), ("b", '{"engine": {}, "base": "z"}'), ("c", "[]")):
            db.execute(
                "INSERT INTO stages SELECT ?, kind, slot || 'x', version, ?, outputs, facts, seconds, finished_at FROM stages WHERE key=?",
                (key, inputs, bad.key),
            )
    assert len(recorded._engines(store)) == 1
    assert graph_of_run(open_run.recipe, store).engine_inputs["engine"] == OWN


def test_a_base_that_judges_itself_does_so_as_this_machine(open_run: DoneRun, elsewhere: None, tmp_path: Path) -> None:
    """Its judgements would be kept under the other engine's name."""
    resident = _changed(open_run.recipe, judge={"mode": "local", "model": "", "base_url": ""})
    workspace = copy_ledger(open_run.workspace, tmp_path / "judged")
    result = finish_judging(resident, workspace, Heard())
    assert result.n_committed == 0
