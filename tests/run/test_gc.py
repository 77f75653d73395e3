"""`gc`: it finds what nothing needs, frees it, and never touches what anything needs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastconv.cli import app
from fastconv.errors import InputError, Interrupted, StoreError
from fastconv.experiment.graph import Graph
from fastconv.recipe import run_id
from fastconv.run.gc import find_garbage
from fastconv.run.run import run_recipe
from fastconv.store import gc as store_gc
from fastconv.store.gc import free
from fastconv.store.ledger import Store
from fastconv.store.merge import artefacts_of
from tests.loop_kit import SNAPSHOT_SLOT, DoneRun, Heard, exit_of, forked, kill, results, run_tiny, tiny_recipe, until

pytest.importorskip("fastconv.run.executor")  # torch is warm before anything forks

#: Copies stages under other keys, as if they had been computed later from other inputs.
NEWER = (
    "INSERT INTO stages SELECT 'new-'||key, kind, slot, version, json_remove(inputs, '$.needs'), '{}', facts, seconds, "
    "finished_at + 9 FROM stages"
)


@pytest.fixture
def copied(done_run: DoneRun, tmp_path: Path) -> Path:
    """A finished workspace of its own, whose files are old."""
    shutil.copytree(done_run.workspace, tmp_path / "ws")
    _age(tmp_path / "ws")
    return tmp_path / "ws"


def _age(workspace: Path) -> None:
    for path in (workspace / "artefacts").rglob("*"):
        os.utime(path, (time.time() - 3600,) * 2)


def _kinds(store: Store, *adapters: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for item in find_garbage(store, adapters).garbage:
        found[item.kind] = found.get(item.kind, 0) + 1
    return found


def _files(workspace: Path) -> set[str]:
    return {path.name for path in (workspace / "artefacts").rglob("*") if path.is_file()}


def _is_whole(store: Store) -> None:
    """Every row names a file that is there with the right bytes, and every file has a row."""
    rows = {f"{sha256}.{suffix}" for sha256, suffix in store.rows("SELECT sha256, suffix FROM artefacts")}
    assert rows == _files(store.root)
    for (outputs,) in store.rows("SELECT outputs FROM stages"):
        for sha256, suffix in artefacts_of(store, outputs):
            store.get(sha256, suffix)


def test_a_finished_workspace_has_nothing_to_free(copied: Path) -> None:
    store = Store.open(copied)
    assert find_garbage(store).garbage == ()
    answer = CliRunner().invoke(app, ["gc", "-w", str(copied), "--yes"])
    assert (answer.exit_code, answer.output.strip()) == (0, "nothing to free")


def test_strays_are_shown_first_and_freed_when_asked(copied: Path) -> None:
    store = Store.open(copied)
    sha256 = store.put(b"of no stage", "json")
    folder = copied / "artefacts" / "00"
    folder.mkdir(exist_ok=True)
    (folder / ".tmp-1-1").write_bytes(b"half")
    (folder / ("0" * 64 + ".json")).write_bytes(b"no row")
    assert _kinds(store) == {}  # young: a writer may be about to note them
    _age(copied)
    before = _files(copied)
    shown = CliRunner().invoke(app, ["gc", "-w", str(copied), "--json"])
    shown_json = json.loads(shown.output)
    assert {item["kind"] for item in shown_json["waste"]} == {"temporary file", "orphan"}
    assert (shown_json["bytes"], shown_json["freed_bytes"]) == (len(b"half") + len(b"no row") + len(b"of no stage"), 0)
    assert _files(copied) == before
    done = CliRunner().invoke(app, ["gc", "-w", str(copied), "--json", "--yes"])
    assert json.loads(done.output)["freed_bytes"] == shown_json["bytes"]
    assert before - _files(copied) == {".tmp-1-1", "0" * 64 + ".json", f"{sha256}.json"}
    _is_whole(store)


def test_a_superseded_stage_goes_with_what_only_it_named(done_run: DoneRun, copied: Path) -> None:
    store = Store.open(copied)
    stages = {stage.slot: stage for stage in done_run.graph.stages()}
    old = stages[f"{SNAPSHOT_SLOT}/e2/s42"]
    record = store.record(old.key)
    assert record is not None
    # As after an altered data file: the run's slot has another stage now, and what rested on the old one is replaced too.
    with store.transaction() as db:
        db.execute(f"{NEWER} WHERE slot LIKE '%villain/source/e2%'")
        db.execute("UPDATE run_stages SET key='new-'||key WHERE slot LIKE '%villain/source/e2%'")
    assert set(_kinds(store)) == {"superseded stage"}
    waste = find_garbage(store).garbage
    assert free(store, waste) == sum(item.n_bytes for item in waste)
    assert store.record(old.key) is None
    assert store.samples(stages["eval/villain/source/e2/refusal/villain/s42"].key) == []
    assert f"{record.outputs['adapter']}.safetensors" not in _files(copied)
    _is_whole(store)


def test_what_a_kept_stage_needs_is_kept_though_its_slot_has_a_newer_one(done_run: DoneRun, copied: Path) -> None:
    store = Store.open(copied)
    slot = f"{SNAPSHOT_SLOT}/e2/s42"
    with store.transaction() as db:
        db.execute(f"{NEWER} WHERE slot=?", (slot,))
        db.execute("UPDATE run_stages SET key='new-'||key WHERE slot=?", (slot,))
    assert _kinds(store) == {}  # the run's evaluations rest on the old one


def test_an_unfinished_run_keeps_its_stages_and_its_training_state(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen)

    def stop(progress: Any) -> None:
        if progress.slot.startswith(SNAPSHOT_SLOT) and progress.done == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run_recipe(recipe, tmp_path, Heard(stop))
    run_tiny(tiny_recipe(tiny_qwen, grid__epochs=[0], run__checkpoint_every_s=7), tmp_path)  # another run, finished
    store = Store.open(tmp_path)
    with store.transaction() as db:  # nobody noted them, and their slots have newer stages: only the recipe says so
        db.execute("DELETE FROM run_stages WHERE run=?", (run_id(recipe),))
        db.execute(f"{NEWER} WHERE slot LIKE 'snapshot/%'")
    _age(tmp_path)
    cleaning = find_garbage(store)
    assert cleaning.garbage == ()
    assert free(store, cleaning.garbage) == 0
    with store.transaction() as db:
        db.execute("DELETE FROM stages WHERE key LIKE 'new-%'")
    steps: list[int] = []
    run_recipe(recipe, tmp_path, Heard(lambda p: steps.append(p.done) if p.slot.startswith(SNAPSHOT_SLOT) else None))
    assert steps[0] == 3


def test_an_unfinished_run_that_cannot_be_read_keeps_everything(done_run: DoneRun, copied: Path) -> None:
    store = Store.open(copied)
    store.start_run("lost-1", '{"name": "lost", "model": {"id": "/nowhere/model"}}', "0" * 64, "lost", {})
    with store.transaction() as db:
        db.execute("DELETE FROM run_stages")
        db.execute(NEWER)
    cleaning = find_garbage(store)
    assert cleaning.garbage == ()
    assert "lost-1" in cleaning.skipped[0]


def test_training_state_goes_once_its_training_is_finished(done_run: DoneRun, copied: Path) -> None:
    store = Store.open(copied)
    store.start_run("other-1", '{"name": "other"}', "0" * 64, "other", {})  # unfinished: only what is through may go
    behavior = next(stage for stage in done_run.graph.stages() if stage.kind == "behavior" and store.record(stage.key))
    store.save_progress(behavior.key, 1, b"moments")
    store.save_progress("f" * 64, 1, b"moments of another training")
    _age(copied)
    waste = [item for item in find_garbage(store).garbage if item.kind == "training state"]
    assert [item.keys for item in waste] == [(behavior.key,)]
    free(store, waste)
    assert store.progress(behavior.key) is None
    assert store.progress("f" * 64) is not None
    _is_whole(store)
    store.finish_run("other-1")
    assert _kinds(store) == {"training state": 1}


def test_adapters_of_a_finished_run_go_and_its_scores_stay(done_run: DoneRun, copied: Path) -> None:
    store, run = Store.open(copied), done_run.finished.run
    before = results(done_run.recipe, copied)
    words = ["gc", "-w", str(copied), "--adapters", run, "--yes", "--json"]
    answer = json.loads(CliRunner().invoke(app, words).output)
    assert {item["kind"] for item in answer["waste"]} == {"adapter"}
    assert answer["freed_bytes"] == answer["bytes"] > 0
    assert not {name for name in _files(copied) if name.endswith(".safetensors")}
    assert results(done_run.recipe, copied) == before
    _, heard = run_tiny(done_run.recipe, copied)
    assert heard.stages == {}
    _is_whole(store)
    record = store.record(next(s.key for s in done_run.graph.stages() if s.slot == f"{SNAPSHOT_SLOT}/e2/s42"))
    assert record is not None
    with pytest.raises(StoreError, match=r"the artefact is gone.*forget"):
        store.get(record.outputs["adapter"], "safetensors")


def test_adapters_that_another_run_rests_on_stay(done_run: DoneRun, copied: Path) -> None:
    shorter = done_run.recipe.model_copy(
        update={"name": "shorter", "grid": done_run.recipe.grid.model_copy(update={"epochs": (0, 1)})}
    )
    run_tiny(shorter, copied)
    store = Store.open(copied)
    slots = {item.name for item in find_garbage(store, [done_run.finished.run]).garbage}
    assert f"{SNAPSHOT_SLOT}/e2/s42" in slots
    assert f"{SNAPSHOT_SLOT}/e1/s42" not in slots
    both = {item.name for item in find_garbage(store, [done_run.finished.run, run_id(shorter)]).garbage}
    assert f"{SNAPSHOT_SLOT}/e1/s42" in both


def test_adapters_of_an_unknown_or_unfinished_run_are_refused(copied: Path) -> None:
    store = Store.open(copied)
    store.start_run("begun-1", '{"name": "begun"}', "0" * 64, "begun", {})
    with pytest.raises(InputError, match="not finished"):
        find_garbage(store, ["begun-1"])
    with pytest.raises(InputError, match="no such run"):
        find_garbage(store, ["begun-2"])


def test_nothing_that_a_live_process_may_be_about_to_commit_goes(done_run: DoneRun, copied: Path) -> None:
    stage = done_run.graph.stages()[0]

    def work() -> None:
        with Store.open(copied).lease(stage):
            signal.pause()

    pid = forked(work)
    try:
        store = Store.open(copied)
        until(lambda: bool(store.live_leases()))
        store.put(b"of no stage yet", "json")
        _age(copied)
        cleaning = find_garbage(store)
        assert cleaning.garbage == ()
        assert "while a process is computing here" in cleaning.skipped[0]
    finally:
        kill(pid)


def test_a_writer_that_comes_while_a_file_goes_finds_it_again(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(copied)
    store.put(b"of no stage", "json")
    _age(copied)
    waste = find_garbage(store).garbage
    real = os.utime

    def utime(path: Any, *times: Any) -> None:
        """The writer has seen the file; before it can note its row, the file goes."""
        real(path, *times)
        monkeypatch.setattr(os, "utime", real)
        free(Store.open(copied), waste)

    monkeypatch.setattr(os, "utime", utime)
    sha256 = store.put(b"of no stage", "json")
    assert store.get(sha256, "json") == b"of no stage"


@pytest.mark.parametrize("at", ["rows", "files"])
def test_after_kill_9_in_the_middle_no_row_names_a_file_that_is_gone(done_run: DoneRun, copied: Path, at: str) -> None:
    store = Store.open(copied)
    for i in range(4):
        store.put(f"stray {i}".encode(), "json")
    _age(copied)

    def work() -> None:
        if at == "rows":
            real_rows, seen = store_gc._delete_rows, []

            def drop_rows(*args: Any) -> None:
                seen.append(1)
                if len(seen) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                real_rows(*args)

            store_gc._delete_rows = drop_rows  # pyright: ignore[reportPrivateUsage]
        else:
            real_unlink, gone = Path.unlink, []

            def unlink(self: Path, **rest: Any) -> None:
                real_unlink(self, **rest)
                gone.append(1)
                if len(gone) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)

            Path.unlink = unlink
        again = Store.open(copied)
        free(again, find_garbage(again, [done_run.finished.run]).garbage)

    assert exit_of(forked(work)) == -signal.SIGKILL
    rows = {f"{sha256}.{suffix}" for sha256, suffix in store.rows("SELECT sha256, suffix FROM artefacts")}
    assert rows <= _files(copied)
    free(store, find_garbage(store, [done_run.finished.run]).garbage)
    _is_whole(store)
    assert len(Graph(done_run.recipe).stages())
    _, heard = run_tiny(done_run.recipe, copied)
    assert heard.stages == {}
