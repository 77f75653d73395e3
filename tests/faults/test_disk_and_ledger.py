"""Damaged ledgers, hostile workspaces and recipes, full disks and readers that go away: one line and an exit code."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fastconv.cli import app
from fastconv.errors import FastconvError, StoreError, safe_text, shown
from fastconv.planning.doctor import _ledger
from fastconv.recipe import load_recipe
from fastconv.store import io
from fastconv.store.gc import find_damage
from fastconv.store.ledger import Store
from fastconv.store.merge import merge
from fastconv.store.records import Sample, Score, Stage
from tests import ROOT
from tests.loop_kit import DoneRun, write_tiny_recipe

EVAL = Stage("eval", "eval/one", 1, {"seed": 42})


def filled(root: Path, n_samples: int = 400) -> Store:
    """A workspace with a few stages, samples, scores, artefacts and a run."""
    store = Store.open(root)
    for seed in range(3):
        stage = Stage("eval", f"eval/{seed}", 1, {"seed": seed})
        samples = [Sample(f"q{i}", 0, "assistant", f"Why {i}?", "Because. " * 9, 9, True) for i in range(n_samples)]
        scores = [Score(f"q{i}", 0, "rate", float(i % 2)) for i in range(n_samples)]
        outputs = {"rows": store.put(f"[{seed}]".encode(), "json"), "n": n_samples}
        store.commit(stage, outputs=outputs, facts={}, seconds=1.0, samples=samples, scores=scores)
    store.start_run("tiny-00000000", '{"name": "tiny"}', "x", "own", {})
    store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    return store


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ws")
    filled(root).close()
    return root


def damaged_copy(workspace: Path, to: Path, how: str) -> Path:
    shutil.copytree(workspace, to)
    for name in ("ledger.sqlite-wal", "ledger.sqlite-shm"):
        (to / name).unlink(missing_ok=True)
    path, rng = to / "ledger.sqlite", random.Random(how)
    data = bytearray(path.read_bytes())
    if how.startswith("cut"):
        data = data[: int(len(data) * float(how[4:]))]
    elif how == "heads":
        for at in range(4096, len(data), 4096):
            data[at : at + 16] = bytes(16)
    elif how == "noise":
        for at in range(4096, len(data), 4096):
            data[at + 100 : at + 900] = rng.randbytes(800)
    elif how == "text":
        data = bytearray(b"hello world" * 1000)
    path.write_bytes(data)
    return to


DAMAGE = ["cut 0", "cut 0.001", "cut 0.25", "cut 0.5", "cut 0.9", "heads", "noise", "text"]


def ask(*words: object) -> tuple[int, str, BaseException | None]:
    """A verb in this process: exit code, output, and the exception if it was not one of ours."""
    answer = CliRunner().invoke(app, [str(word) for word in words])
    crash = answer.exception if not isinstance(answer.exception, SystemExit | None) else None
    return answer.exit_code, answer.output, crash


@pytest.mark.parametrize("how", DAMAGE)
def test_doctor_says_that_a_ledger_is_damaged(workspace: Path, tmp_path: Path, how: str) -> None:
    (finding,) = _ledger(damaged_copy(workspace, tmp_path / "x", how), deep=False, fix=False)
    assert finding.exit_code == 5, finding
    assert "ledger" in finding.text
    assert finding.text.isprintable()


def test_doctor_finds_a_whole_ledger_whole_and_looks_at_artefacts(workspace: Path, tmp_path: Path) -> None:
    (finding,) = _ledger(workspace, deep=True, fix=False)
    assert (finding.exit_code, finding.text) == (0, "3 stages, whole to the last byte")
    copy = damaged_copy(workspace, tmp_path / "x", "")
    path = next((copy / "artefacts").rglob("*.json"))
    path.write_bytes(path.read_bytes()[::-1])
    assert _ledger(copy, deep=False, fix=False)[0].exit_code == 0  # as long as before: only its bytes tell
    (finding,) = _ledger(copy, deep=True, fix=False)
    assert finding.exit_code == 5
    assert path.name in finding.text
    path.unlink()
    assert "is gone" in _ledger(copy, deep=False, fix=False)[0].text
    assert _ledger(tmp_path / "nothing", deep=True, fix=True) == []


@pytest.mark.parametrize(
    ("damage", "deep", "says"),
    [
        ("PRAGMA ignore_check_constraints=ON; UPDATE scores SET reason='x'", False, "CHECK constraint failed in scores"),
        ("PRAGMA writable_schema=ON; DELETE FROM sqlite_master WHERE tbl_name='failures'", False, "never used"),
        ("DROP INDEX stages_by_slot; CREATE INDEX stages_by_slot ON stages(slot, finished_at) WHERE seconds>9;"
         "PRAGMA writable_schema=ON; UPDATE sqlite_master SET sql=replace(sql, ' WHERE seconds>9', '') WHERE name='stages_by_slot'",
         True, "missing from index"),
        ("UPDATE stages SET key=NULL", False, "3 rows of stages hold what no fastconv writes"),
        ("ALTER TABLE stages DROP COLUMN facts", False, "table stages has no column facts"),
    ],
    ids=["a rule", "a lost page", "an index", "no key", "no column"],
)  # fmt: skip
def test_doctor_sees_damage_that_every_reader_passes_over(
    workspace: Path, tmp_path: Path, damage: str, deep: bool, says: str
) -> None:
    copy = damaged_copy(workspace, tmp_path / "x", "")
    with sqlite3.connect(copy / "ledger.sqlite") as db:
        db.executescript(damage)
    db.close()
    (finding,) = _ledger(copy, deep=deep, fix=False)
    assert finding.exit_code == 5
    assert says in finding.text


def test_doctor_mends_what_is_safe(workspace: Path, tmp_path: Path) -> None:
    copy = damaged_copy(workspace, tmp_path / "x", "")
    store = Store.open(copy)
    with store.transaction() as db:
        db.execute("INSERT INTO leases VALUES('k', 's', 1, ?, 'dead-1-1', 0, '{}')", (os.uname().nodename,))
    stray = copy / "artefacts" / "00" / "stray.json"
    stray.parent.mkdir(exist_ok=True)
    stray.write_text("x")
    os.utime(stray, (1, 1))
    assert "1 dead lease, 1 stray file" in _ledger(copy, deep=False, fix=False)[0].text
    assert stray.exists()
    assert "1 dead lease and 1 bytes" in _ledger(copy, deep=False, fix=True)[0].text
    assert not stray.exists()
    assert not store.rows("SELECT * FROM leases")
    assert len(store.rows("SELECT * FROM stages")) == 3
    assert find_damage(store, deep=True) == []


VERBS = [("status",), ("gate", "demo"), ("report", "demo"), ("gc",), ("forget", "eval/0"), ("judge", "demo"),
         ("plan", "demo"), ("merge",), ("status", "demo", "--json")]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_over_a_damaged_ledger_ends_in_a_line(
    workspace: Path, tmp_path: Path, verb: tuple[str, ...], how: str
) -> None:
    broken = damaged_copy(workspace, tmp_path / "x", how)
    words = [*verb, broken, "-w", tmp_path / "own"] if verb == ("merge",) else [*verb, "-w", broken]
    code, out, crash = ask(*words, *(("--reports", tmp_path / "r") if verb[0] == "report" else ()))
    assert crash is None, f"{crash!r}\n{out}"
    assert code in (0, 2, 3, 5, 8), out  # some verbs need no damaged page
    assert "Traceback" not in out


@pytest.mark.parametrize("verb", [("status",), ("gc",), ("doctor",), ("status", "x"), ("report", "x")], ids=" ".join)
def test_names_in_a_ledger_do_not_write_to_the_terminal(workspace: Path, tmp_path: Path, verb: tuple[str, ...]) -> None:
    copy = damaged_copy(workspace, tmp_path / "x", "")
    with contextlib.closing(sqlite3.connect(copy / "ledger.sqlite")) as db:
        db.executescript("UPDATE runs SET id='\x1b]0;owned\x07'; UPDATE stages SET slot='\x1b[2J' || slot")
    more = ("--reports", tmp_path / "r") if verb[0] == "report" else ()
    _, out, crash = ask(*verb, "-w", copy, *more)
    assert crash is None
    assert out.replace("\n", "").isprintable(), repr(out)


def test_a_row_that_holds_no_json_is_a_damaged_ledger(workspace: Path, tmp_path: Path) -> None:
    copy = damaged_copy(workspace, tmp_path / "x", "")
    with sqlite3.connect(copy / "ledger.sqlite") as db:
        db.execute("UPDATE stages SET outputs='{\"n\":'")
    db.close()
    for verb in (("gc",), ("merge",)):
        words = [*verb, copy, "-w", tmp_path / "own"] if verb == ("merge",) else [*verb, "-w", copy]
        code, out, crash = ask(*words)
        assert (code, crash) == (5, None), out
        assert "the ledger is damaged" in out


# --- merging from anybody ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("UPDATE scores SET value='many'", "of its scores are none"), ("UPDATE scores SET value=9e999", "of its scores are none"),
        ("UPDATE scores SET value=x'00ff'", "of its scores are none"), ("UPDATE samples SET n_tok=-5", "of its samples are none"),
        ("UPDATE samples SET completion=x'00ff'", "of its samples are none"),
        ("UPDATE stages SET inputs='{\"seed\":7}'", "key is not that of its inputs"),
        ("UPDATE stages SET outputs='[1]'", "its row is damaged"), ("UPDATE stages SET facts=x'ff'", "its row is damaged"),
        ("UPDATE stages SET seconds='long'", "no numbers"), ("UPDATE scores SET sample='a'", "of its scores are none"),
        ("UPDATE stages SET key=NULL", "row of a stage is damaged"),
    ],
)  # fmt: skip
def test_what_no_fastconv_wrote_is_not_merged(workspace: Path, tmp_path: Path, change: str, says: str) -> None:
    copy = damaged_copy(workspace, tmp_path / "x", "")
    with sqlite3.connect(copy / "ledger.sqlite") as db:
        db.execute(change)
    db.close()
    own = Store.open(tmp_path / "own")
    with pytest.raises(StoreError, match=says):
        merge(own, Store.open(copy, create=False))
    assert own.rows("SELECT COUNT(*) FROM stages") == [(0,)]


@pytest.mark.parametrize(
    "change",
    ["ALTER TABLE samples RENAME TO old; CREATE VIEW samples AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM n) "
     "SELECT old.* FROM old, n",
     "CREATE TRIGGER t AFTER INSERT ON leases BEGIN DELETE FROM stages; END", "CREATE VIRTUAL TABLE t USING rtree(a, b, c)"],
    ids=["view", "trigger", "virtual"],
)  # fmt: skip
def test_a_ledger_that_would_run_what_is_written_in_it_is_refused(workspace: Path, tmp_path: Path, change: str) -> None:
    """In a process of its own: rows without end would hold the only thread inside SQLite."""
    copy = damaged_copy(workspace, tmp_path / "x", "")
    with contextlib.closing(sqlite3.connect(copy / "ledger.sqlite")) as db:
        db.executescript(change)
    for words in (("merge", copy, "-w", tmp_path / "own"), ("status", "-w", copy)):
        process = started(*words, stdout=subprocess.PIPE)
        try:
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 5, said
        assert "that no fastconv wrote" in said
    (finding,) = _ledger(copy, deep=False, fix=True)
    assert finding.exit_code == 5


@pytest.mark.parametrize("change", ["UPDATE judge_money SET nusd=-5", "UPDATE judge_money SET nusd='x'",
                                    "INSERT INTO judgements VALUES('k','r','m',0,'{\"v\": \"x\"}','{}',NULL,0)"])  # fmt: skip
def test_judgements_and_costs_that_are_no_numbers_are_not_merged(tmp_path: Path, change: str) -> None:
    from fastconv.store.judge_ledger import JudgeLedger
    from fastconv.store.records import Reserve, Unpaid

    other = filled(tmp_path / "other", 2)
    ledger = JudgeLedger(other)
    (ticket,) = ledger.apply([Reserve("k", 0.01)])
    assert isinstance(ticket, int)
    ledger.apply([Unpaid(ticket, "lost")])
    with other.transaction() as db:
        db.execute(change)
    own = Store.open(tmp_path / "own")
    with pytest.raises(StoreError, match=r"no (amount|number)"):
        merge(own, other)
    assert JudgeLedger(own).money().lost_usd == 0
    assert own.rows("SELECT COUNT(*) FROM stages") == [(0,)]


@pytest.mark.parametrize("what", ["fifo", "folder", "loop"])
def test_an_artefact_that_is_no_file_is_gone_and_nobody_waits_for_it(
    workspace: Path, tmp_path: Path, what: str
) -> None:
    copy = damaged_copy(workspace, tmp_path / "x", "")
    path = next((copy / "artefacts").rglob("*.json"))
    path.unlink()
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    with pytest.raises(StoreError, match="gone"):
        merge(Store.open(tmp_path / "own"), Store.open(copy, create=False))
    code, out, crash = ask("doctor", "-w", copy)
    assert (code, crash) == (5, None), out


def test_a_ledger_that_is_no_file_is_one_line(tmp_path: Path) -> None:
    for i, make in enumerate((os.mkfifo, os.mkdir)):
        root = tmp_path / str(i)
        root.mkdir()
        make(root / "ledger.sqlite")
        with pytest.raises(StoreError):
            Store.open(root)


# --- disks -------------------------------------------------------------------------------------------------


def test_reports_that_cannot_be_written_are_found_before_the_computing(tmp_path: Path, tiny_qwen: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    recipe = write_tiny_recipe(tmp_path / "tiny.toml", tiny_qwen)
    code, out, crash = ask("run", recipe, "-w", tmp_path / "ws", "--reports", tmp_path / "file" / "reports", "-q")
    assert (code, crash) == (5, None), out
    assert "another --reports" in out
    assert not (tmp_path / "ws").exists()


def test_a_new_artefact_is_synced_with_its_folder_and_the_folder_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen from a trace: file, rename, its folder, and where that is new the folder above; only then the row."""
    store = Store.open(tmp_path)
    trace: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def fsync(handle: int) -> None:
        at = Path(os.readlink(f"/proc/self/fd/{handle}"))
        trace.append(f"sync {'file' if stat.S_ISREG(os.fstat(handle).st_mode) else at.relative_to(tmp_path)}")
        real_sync(handle)

    def rename(self: Path, target: Path) -> Path:
        trace.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    sha256 = store.put(b"weights", "safetensors")
    shard = f"artefacts/{sha256[:2]}"
    assert trace == ["sync artefacts", "sync file", "rename", f"sync {shard}"]


@pytest.mark.parametrize("name", ["EMFILE", "ENOSPC", "EIO", "EDQUOT"])
@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdir"])
def test_a_fault_at_any_step_of_a_write_is_one_line_and_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, name: str
) -> None:
    import errno

    store = filled(tmp_path, 2)
    before = sorted(path for path in (tmp_path / "artefacts").rglob("*") if path.is_file())

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    with monkeypatch.context() as broken:
        if call == "fsync":
            broken.setattr(os, "fsync", fail)
        elif call == "write":
            broken.setattr(io, "write_atomically", fail)
            broken.setattr("fastconv.store.ledger.write_atomically", fail)
        else:
            broken.setattr(Path, call, fail)
        with pytest.raises(StoreError) as caught:
            store.put(b"new bytes", "json")
    assert str(caught.value).isprintable()
    after = sorted(path for path in (tmp_path / "artefacts").rglob("*") if path.is_file())
    if call != "fsync":  # the folder's sync comes after the rename: a whole file without a row, freed by the next sweep
        assert after == before
    assert not [path for path in after if path.name.startswith(".tmp-")]
    assert store.put(b"new bytes", "json")


# --- pipes and terminals -----------------------------------------------------------------------------------


def started(*words: object, **given: Any) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)} | given.pop("env", {})
    command = [sys.executable, "-m", "fastconv", *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=environ, **given)


@pytest.mark.parametrize(
    "words", [("recipe", "show", "demo"), ("recipe", "schema"), ("--help",), ("status", "--help")], ids=str
)
def test_a_reader_that_goes_away_ends_a_verb_without_a_word(words: tuple[str, ...]) -> None:
    process = started(*words, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("words", "code"),
    [(("recipe", "show", "demo"), 5), (("recipe", "schema"), 5), (("status", "none", "--json"), 2), (("--help",), 5),
     (("run", "--help"), 5), (("--version",), 5), (("status", "--json"), 5)],
)  # fmt: skip
def test_output_that_cannot_be_written_is_one_line(words: tuple[str, ...], code: int, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = started(*words, stdout=full, cwd=tmp_path)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.wait(60) == code, said
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert said.startswith("fastconv: " + "output: the output cannot be written" * (code == 5)), said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_error_that_nobody_can_be_told_keeps_its_exit_code(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        for words, code in (
            (("recipe", "show", "none"), 2),
            (("status", "none", "--json"), 2),
            (("recipe", "schema"), 0),
        ):
            command = [sys.executable, "-m", "fastconv", *words]
            ended = subprocess.run(command, stderr=full, stdout=subprocess.PIPE, env=environ, cwd=tmp_path, timeout=60)
            assert ended.returncode == code, words


OLD = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    "env",
    [{"LC_ALL": "C", **OLD}, {"COLUMNS": "1", "LINES": "1", "TERM": "dumb"},
     *(pytest.param(env, marks=pytest.mark.slow) for env in (
         {"LANG": "C", **OLD}, {"LC_ALL": "POSIX", **OLD}, {"LC_ALL": "tr_TR.UTF-8"}, {"LC_ALL": "none", **OLD},
         {"PYTHONIOENCODING": "ascii:strict"}, {"COLUMNS": "0", "FORCE_COLOR": "1"}, {"COLUMNS": "-5"}, {"COLUMNS": "wide"}))],
)  # fmt: skip
def test_locales_and_tiny_terminals_break_no_verb(env: dict[str, str], tmp_path: Path) -> None:
    Store.open(tmp_path / "ws").close()  # so that the name is looked for among its runs too
    process = started("recipe", "show", "no\u00fc\u2026", "-w", tmp_path / "ws", stdout=subprocess.PIPE, env=env)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert "Traceback" not in said + out


@pytest.mark.parametrize(
    "closed", [">&-", *(pytest.param(how, marks=pytest.mark.slow) for how in ("2>&-", ">&- 2>&- <&-"))]
)
def test_streams_that_are_closed_are_nowhere(closed: str, tmp_path: Path) -> None:
    """A file that is opened first would get the number of a closed stream, and what is printed would be written into it."""
    Store.open(tmp_path / "ws").close()
    verb = f"exec {sys.executable} -m fastconv status demo -w {tmp_path / 'ws'} {closed}"
    ended = subprocess.run(
        ["sh", "-c", verb], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended
    assert ended.stderr == ""
    assert Store.open(tmp_path / "ws").rows("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [1, 2, 7, 20, 41])
def test_tiny_terminals_break_no_table(done_run: DoneRun, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    run = done_run.finished.run
    for verb in (("status", run), ("status",), ("gate", run), ("plan", run), ("gc",), ("recipe", "list"), ("doctor",)):
        code, out, crash = ask(*verb, *(() if verb[0] == "recipe" else ("-w", done_run.workspace)))
        assert crash is None, f"{verb}: {crash!r}\n{out}"
        assert code in (0, 3), out


# --- rows that no fastconv wrote ---------------------------------------------------------------------------


SPOILT = ["runs SET facts='-1'", "runs SET facts='[]'", "runs SET recipe=x'ff'", "runs SET started_at='soon'", "runs SET started_at=1e17",
          "verdicts SET body='null'", "stages SET outputs='[1]'", "stages SET finished_at=-9e999", "scores SET detail='3'",
          "leases SET note='x'", "leases SET heartbeat='x'"]  # fmt: skip


@pytest.mark.parametrize("change", SPOILT)
def test_a_row_of_another_kind_is_a_damaged_ledger(workspace: Path, tmp_path: Path, change: str) -> None:
    copy = damaged_copy(workspace, tmp_path / "x", "")
    with sqlite3.connect(copy / "ledger.sqlite") as db:
        db.execute("INSERT INTO leases VALUES('k','s',1,'elsewhere','dead-1-1',0,'{}')")
        db.execute("INSERT INTO verdicts VALUES('tiny-00000000','G0','x','pass','{}',0)")
        db.execute(f"UPDATE {change}")
    db.close()
    (finding,) = _ledger(copy, deep=False, fix=False)
    assert (finding.exit_code, "hold what no fastconv writes" in finding.text) == (5, True), finding
    for verb in (("status",), ("status", "tiny-00000000"), ("gate", "tiny-00000000"), ("gc",), ("merge", copy)):
        code, out, crash = ask(*verb, "-w", tmp_path / "own" if verb[0] == "merge" else copy)
        assert crash is None, f"{verb}: {crash!r}\n{out}"
        assert code in (0, 2, 4, 5), out
        assert code == 5 or verb[0] != "merge" or "leases" in change


# --- text and recipes of any kind --------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(), max_size=300))
@example("half \ud83d an emoji, a zero \x00 and \x1b]0;a title")
def test_what_is_shown_is_one_plain_line_and_what_is_stored_is_valid(text: str) -> None:
    assert shown(text).isprintable()
    assert len(shown(text, 50)) <= 50
    kept = safe_text(text, 100)
    assert len(kept) <= 100
    assert "\x00" not in kept
    kept.encode()
    error = FastconvError(text, where=text, fix=text)
    assert str(error).isprintable()


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300) | st.text(st.characters(), max_size=300).map(lambda t: t.encode(errors="replace")))
def test_any_bytes_as_a_recipe_are_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("r") / "x.toml"
    path.write_bytes(data)
    with pytest.raises(FastconvError) as caught:
        load_recipe(path)
    assert caught.value.exit_code == 2
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "line", ["x = " + "[" * 3000 + "]" * 3000, "x = 1" + "0" * 5000, "x = {" + "a={" * 2000 + "}" * 2001]
)
def test_toml_beyond_reason_is_refused_wherever_it_is_read(tmp_path: Path, line: str) -> None:
    from fastconv.datasets.files import read_toml
    from fastconv.judge.budget import load_prices
    from fastconv.judge.rubric import load_rubric

    path = tmp_path / "x.toml"
    path.write_text(line)
    for read in (load_recipe, read_toml, load_prices, load_rubric):
        with pytest.raises(FastconvError) as caught:
            read(path)
        assert caught.value.exit_code == 2
    with pytest.raises(FastconvError):
        load_recipe(ROOT / "recipes" / "demo.toml", [f"run.{line.replace(' ', '')}"])
