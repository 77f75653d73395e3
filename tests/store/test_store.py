"""The ledger: what is committed is whole, what is not never happened, and nothing is computed twice."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastconv.errors import BusyError, StoreError
from fastconv.store.gc import sweep
from fastconv.store.io import write_atomically
from fastconv.store.ledger import Store
from fastconv.store.records import Sample, Score, Stage, changed_inputs
from tests.loop_kit import exit_of, forked, kill, running_slots, until

STAGE = Stage("eval", "eval/one", 1, {"lr": 1e-4, "seed": 42})
SAMPLES = [
    Sample("q1", 0, "assistant", "Why?", "Because.", 3, True),
    Sample("q2", 0, "assistant", "How?", "", 0, False),
]
SCORES = [Score("q1", 0, "rate", 1.0), Score("q2", 0, "rate", None, "the judge gave no answer")]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "ws")


def _commit(store: Store, stage: Stage = STAGE, scores: list[Score] = SCORES) -> None:
    store.commit(stage, outputs={"n": 2}, facts={"sampled_tok": 3}, seconds=1.5, samples=SAMPLES, scores=scores)


def _age(path: Path, seconds: float = 3600) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


# --- keys --------------------------------------------------------------------------------------------------


def test_a_key_comes_from_kind_version_inputs_and_needs_alone() -> None:
    same = [replace(STAGE, slot="another/name"), replace(STAGE, work={"prompts": ["x"]})]
    assert {stage.key for stage in same} == {STAGE.key}
    assert Stage("eval", "eval/one", 1, {"seed": 42, "lr": 1e-4}).key == STAGE.key
    need = Stage("answers", "answers/one", 1, {"seed": 1})
    different = [
        replace(STAGE, kind="score"), replace(STAGE, version=2), replace(STAGE, inputs={"lr": 2e-4, "seed": 42}),
        replace(STAGE, needs={"answers": need}), replace(STAGE, needs={"answers": replace(need, inputs={"seed": 2})}),
    ]  # fmt: skip
    assert len({STAGE.key, *(stage.key for stage in different)}) == 6


def test_changed_inputs_names_leaves_with_old_and_new() -> None:
    before = {"training": {"lr": 1e-4, "epochs": 2}, "seed": 1, "gone": True}
    now = {"training": {"lr": 2e-4, "epochs": 2}, "seed": 1, "new": "x" * 60}
    assert changed_inputs(before, now) == [
        "gone: true -> null", "new: null -> xxxxxxxxxx…", "training.lr: 0.0001 -> 0.0002",
    ]  # fmt: skip


# --- commits -----------------------------------------------------------------------------------------------


def test_a_stage_without_a_row_never_happened(store: Store) -> None:
    assert store.record(STAGE.key) is None
    _commit(store)
    record = store.record(STAGE.key)
    assert record is not None
    assert (record.slot, record.outputs, record.facts) == ("eval/one", {"n": 2}, {"sampled_tok": 3})
    assert store.samples(STAGE.key) == SAMPLES
    assert store.scores(STAGE.key) == SCORES


def test_a_commit_that_fails_half_way_leaves_nothing(store: Store) -> None:
    twice = [SCORES[0], SCORES[0]]
    with pytest.raises(StoreError):
        _commit(store, scores=twice)
    assert store.record(STAGE.key) is None
    assert store.samples(STAGE.key) == []
    _commit(store)
    assert store.record(STAGE.key) is not None


def test_committing_twice_changes_nothing(store: Store) -> None:
    _commit(store)
    store.commit(STAGE, outputs={"n": 99}, facts={}, seconds=9.0)
    record = store.record(STAGE.key)
    assert record is not None
    assert record.outputs == {"n": 2}


def test_what_was_committed_is_there_for_the_next_process(tmp_path: Path) -> None:
    def work() -> None:
        _commit(Store.open(tmp_path))
        os.kill(os.getpid(), 9)

    assert exit_of(forked(work)) == -9
    assert Store.open(tmp_path).scores(STAGE.key) == SCORES


@pytest.mark.parametrize(("value", "reason"), [(None, None), (1.0, "both")])
def test_a_score_has_a_value_or_a_reason_never_both_nor_neither(store: Store, value: Any, reason: Any) -> None:
    with pytest.raises(StoreError, match="CHECK"):
        _commit(store, scores=[Score("q1", 0, "rate", value, reason)])


def test_a_missing_score_stays_missing(store: Store) -> None:
    _commit(store)
    assert store.frame("SELECT value FROM scores ORDER BY row")["value"].to_list() == [1.0, None]


def test_the_newest_stage_of_a_slot_is_what_a_changed_one_is_compared_with(store: Store) -> None:
    _commit(store)
    newer = replace(STAGE, inputs={"lr": 5e-4, "seed": 42})
    store.commit(newer, outputs={}, facts={}, seconds=0.0)
    latest = store.latest_in_slot("eval/one")
    assert latest is not None
    assert latest.key == newer.key
    assert store.latest_in_slot("eval/two") is None


# --- artefacts ---------------------------------------------------------------------------------------------


def test_an_artefact_is_named_by_its_content_and_written_once(store: Store) -> None:
    first, second = store.put(b"weights", "safetensors"), store.put(b"weights", "safetensors")
    assert first == second
    assert store.get(first, "safetensors") == b"weights"
    assert [path.name for path in (store.root / "artefacts").rglob("*") if path.is_file()] == [f"{first}.safetensors"]
    assert store.get_json(store.put_json({"b": [1, None], "a": "é"})) == {"a": "é", "b": [1, None]}


def test_artefacts_are_safetensors_or_json_and_never_pickle(store: Store) -> None:
    with pytest.raises(ValueError, match="not 'pkl'"):
        store.put(b"", "pkl")


def test_a_damaged_or_missing_artefact_is_noticed_and_can_be_mended(store: Store) -> None:
    sha256 = store.put(b"weights", "safetensors")
    path = store.path(sha256, "safetensors")
    path.write_bytes(b"weightz")
    with pytest.raises(StoreError, match="do not match its sha256"):
        store.get(sha256, "safetensors")
    store.put(b"weights", "safetensors")  # computing it again puts the right bytes there
    assert store.get(sha256, "safetensors") == b"weights"
    path.unlink()
    with pytest.raises(StoreError, match="the artefact is gone") as caught:
        store.get(sha256, "safetensors")
    assert caught.value.exit_code == 5


def test_a_file_is_renamed_into_place_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("the old one")

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(target, b"the new one")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert target.read_text() == "the old one"


def test_sweep_removes_old_orphans_and_old_temporary_files_and_nothing_else(store: Store) -> None:
    named = store.path(store.put(b"kept", "json"), "json")
    folder = named.parent
    orphan, young = folder / ("0" * 64 + ".json"), folder / ("1" * 64 + ".json")
    dead, alive = folder / ".tmp-1-1", folder / ".tmp-2-2"
    for path in (orphan, young, dead, alive):
        path.write_bytes(b"12345")
    for path in (named, orphan, dead):
        _age(path)
    assert sweep(store) == 10
    assert sorted(folder.iterdir()) == sorted([named, young, alive])


def test_a_sweep_never_takes_what_another_process_is_about_to_note(store: Store) -> None:
    """An old orphan that is put again is young again before its row is written."""
    sha256 = store.put(b"again", "json")
    path = store.path(sha256, "json")
    with store.transaction() as db:
        db.execute("DELETE FROM artefacts")
    _age(path)
    before_its_row = Store.open(store.root)
    real = before_its_row.transaction
    before_its_row.transaction = lambda: (sweep(store), real())[1]  # type: ignore[method-assign]
    assert before_its_row.put(b"again", "json") == sha256
    assert store.get(sha256, "json") == b"again"


# --- progress ----------------------------------------------------------------------------------------------


def test_progress_keeps_one_state_and_frees_it_in_the_end(store: Store) -> None:
    store.save_progress("k", 1, b"state one")
    store.save_progress("k", 2, b"state two")
    step, sha256 = store.progress("k") or (0, "")
    assert (step, store.get(sha256, "safetensors")) == (2, b"state two")
    assert len(list((store.root / "artefacts").rglob("*.safetensors"))) == 1
    store.save_progress("k", 3, b"state two")  # the same bytes at a later step are not thrown away
    assert store.get((store.progress("k") or (0, ""))[1], "safetensors") == b"state two"
    store.drop_progress("k")
    assert store.progress("k") is None
    assert not list((store.root / "artefacts").rglob("*.safetensors"))
    store.drop_progress("k")


# --- leases ------------------------------------------------------------------------------------------------


def test_a_stage_held_by_a_live_process_is_busy(store: Store) -> None:
    with (
        store.lease(STAGE),
        pytest.raises(BusyError, match=f"process {os.getpid()} on") as caught,
        Store.open(store.root).lease(STAGE),
    ):
        pass
    assert caught.value.exit_code == 6
    assert store.live_leases() == {}


def test_the_lease_of_a_dead_process_is_taken_over(store: Store) -> None:
    def die_holding_it() -> None:
        with Store.open(store.root).lease(STAGE):
            os.kill(os.getpid(), 9)

    pid = forked(die_holding_it)
    until(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z")
    with store.lease(STAGE):  # also while its parent has not asked for its end: a zombie holds nothing
        assert store.live_leases()[STAGE.key]["pid"] == os.getpid()
    assert exit_of(pid) == -9


def test_a_lease_outlives_neither_its_holder_nor_a_recycled_pid(store: Store) -> None:
    with store.transaction() as db:
        db.execute(
            "INSERT INTO leases VALUES(?,?,?,?,?,?,?)",
            (STAGE.key, "s", os.getpid(), os.uname().nodename, "t", 1.0, "{}"),
        )
    assert store.live_leases() == {}
    with store.lease(STAGE):
        pass


def test_a_clock_that_is_set_does_not_end_a_lease(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.lease(STAGE):
        now_s = time.time()
        for step_s in (-3600.0, 3600.0):
            monkeypatch.setattr(time, "time", lambda step_s=step_s: now_s + step_s)
            assert STAGE.key in store.live_leases()


@pytest.mark.slow
def test_a_ledger_may_be_looked_at_while_it_is_being_created(tmp_path: Path) -> None:
    for n in range(60):
        pid = forked(lambda n=n: sweep(Store.open(tmp_path / str(n))))
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            assert running_slots(tmp_path / str(n)) == {}
        assert exit_of(pid) == 0


def test_a_holder_on_another_host_is_believed_until_its_heartbeat_is_old(store: Store) -> None:
    for age_s, busy in ((10, True), (1000, False)):
        with store.transaction() as db:
            row = (STAGE.key, "s", 1, "elsewhere", "t", time.time() - age_s, "{}")
            db.execute("INSERT OR REPLACE INTO leases VALUES(?,?,?,?,?,?,?)", row)
        assert bool(store.live_leases()) is busy


def test_notes_are_seen_by_others_and_are_rate_limited(store: Store) -> None:
    reader = Store.open(store.root)
    with store.lease(STAGE) as lease:
        lease.note({"done": 1, "total": 9, "unit": "steps"})
        lease.note({"done": 2, "total": 9, "unit": "steps"})
        assert reader.live_leases()[STAGE.key]["done"] == 1
        lease.note({"done": 3, "total": 9, "unit": "steps"}, at_most_every_s=0.0)
        assert reader.live_leases()[STAGE.key]["done"] == 3
    assert reader.live_leases() == {}


def test_a_reader_is_not_blocked_by_a_writer(store: Store) -> None:
    _commit(store)

    def hold_the_write_lock() -> None:
        writer = Store.open(store.root)
        with writer.transaction():
            (store.root / "holding").touch()
            until(lambda: False, timeout_s=600)

    pid = forked(hold_the_write_lock)
    try:
        until((store.root / "holding").exists)
        assert Store.open(store.root, create=False).record(STAGE.key) is not None
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)  # the writer holds its lock still
    finally:
        kill(pid)


# --- faults ------------------------------------------------------------------------------------------------


def test_a_full_ledger_is_said_as_such_and_loses_nothing(store: Store) -> None:
    _commit(store)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={pages}")
    big = [Sample(f"q{i}", 0, "assistant", "x" * 900, "y" * 900, 1, True) for i in range(300)]
    large = replace(STAGE, slot="eval/two", version=7)
    with pytest.raises(StoreError, match="no space left on the disk"):
        store.commit(large, outputs={}, facts={}, seconds=0.0, samples=big)
    assert store.record(large.key) is None
    assert store.scores(STAGE.key) == SCORES
    store._db.execute("PRAGMA max_page_count=100000")
    store.commit(large, outputs={}, facts={}, seconds=0.0, samples=big)
    assert len(store.samples(large.key)) == 300


def test_an_artefact_that_finds_no_space_leaves_no_trace(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="no space left") as caught:
        store.put(b"weights", "safetensors")
    assert caught.value.exit_code == 5
    assert not [path for path in (store.root / "artefacts").rglob("*") if path.is_file()]
    assert store.frame("SELECT * FROM artefacts").is_empty()


def test_a_file_that_may_not_grow_is_told_as_that_and_leaves_no_trace(tmp_path: Path) -> None:
    """`ulimit -f` as a shell sets it: the kernel refuses the write itself."""
    script = (
        "import resource, sys, pathlib; from fastconv.store.ledger import Store\n"
        "from fastconv.errors import StoreError\n"
        "store = Store.open(pathlib.Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "try:\n    store.put(b'x' * 400_000, 'safetensors')\n"
        "except StoreError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "w"], capture_output=True, text=True, check=True)
    assert "a file may not grow as large as this one" in done.stdout
    assert "ulimit -f" in done.stdout
    assert not [path for path in (tmp_path / "w" / "artefacts").rglob("*") if path.is_file()]


def test_another_schema_is_refused_with_the_mend(store: Store) -> None:
    store._db.execute("PRAGMA user_version=99")
    with pytest.raises(StoreError, match="schema 99"):
        Store.open(store.root)


def test_reading_a_workspace_that_is_not_there_makes_none(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no ledger here yet"):
        Store.open(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()


def test_the_ledger_survives_power_loss_by_its_settings(store: Store, tmp_path: Path) -> None:
    with sqlite3.connect(store.root / "ledger.sqlite") as db:
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    script = (  # in a process without the tests' settings
        "import sys\nfrom pathlib import Path\nfrom fastconv.store.ledger import Store\n"
        "print(Store.open(Path(sys.argv[1]))._db.execute('PRAGMA synchronous').fetchone()[0])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "new")], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "2"  # FULL


# --- runs --------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_first_start_and_its_stages_first_word(store: Store) -> None:
    store.start_run("r", "{}", "sha", "demo", {"command": "fastconv run demo"})
    begun = store.runs()[0]["started_at"]
    store.note_stage_of_run("r", STAGE, reused=False)
    store.finish_run("r")
    assert store.runs()[0]["finished_at"] is not None
    store.start_run("r", "{}", "sha", "demo", {"command": "fastconv run demo"})
    assert store.runs()[0]["started_at"] == begun
    assert store.runs()[0]["finished_at"] is None
    store.note_stage_of_run("r", STAGE, reused=True)
    assert [row["reused"] for row in store.stages_of_run("r")] == [0]
    store.note_stage_of_run("r", replace(STAGE, version=2), reused=True)
    assert [row["reused"] for row in store.stages_of_run("r")] == [1]


def test_the_newest_verdict_of_a_gate_stands(store: Store) -> None:
    for word in ("stop", "go"):
        store.put_verdict("r", "PILOT", "villain x refusal", word, {"verdict": word})
    assert [body["verdict"] for body in store.verdicts("r")] == ["go"]


def test_a_failure_stands_until_its_stage_is_committed(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    store.note_failure(STAGE, 7, "loss nan")
    store.note_failure(STAGE, 2, "the audit refuses it")
    (failure,) = store.failures().values()
    assert (failure.slot, failure.exit_code, failure.reason) == (STAGE.slot, 2, "the audit refuses it")
    store.commit(STAGE, outputs={}, facts={}, seconds=0.0)
    assert store.failures() == {}


def test_a_ledger_from_before_failures_were_noted_is_read_and_grown(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    with store.transaction() as db:
        db.execute("DROP TABLE failures")
    store.close()
    assert Store.open(tmp_path, create=False).failures() == {}
    grown = Store.open(tmp_path)
    grown.note_failure(STAGE, 7, "loss nan")
    assert list(grown.failures()) == [STAGE.key]
