"""The ledger: one SQLite file per workspace and content-addressed artefacts beside it.

The only module that writes either. The rules that make resuming safe:

- A stage is named by the sha256 of its *inputs* (`Stage.key`), known before anything runs.
- An artefact is written to a temporary file, fsynced, renamed to its own sha256, and the folder fsynced.
- A stage's row is committed last, in one transaction with its samples and scores. No row: it never happened.
- A score that could not be had is a row with a NULL value and a reason. It is never 0.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastconv.errors import BusyError, StoreError
from fastconv.recipe import canonical_json
from fastconv.store.io import connect, lives, started, storage_errors, write_atomically, write_text
from fastconv.store.records import Failure, Record, Sample, Score, Stage, changed_inputs

if TYPE_CHECKING:
    import polars

__all__ = ["Lease", "Record", "Sample", "Score", "Stage", "Store", "changed_inputs", "write_atomically", "write_text"]

#: A lease whose holder cannot be seen (another host) counts as dead after this long without a heartbeat.
LEASE_DEAD_AFTER_S = 300.0
#: A file that no row names is left alone for this long: its writer may be about to commit the row.
WRITER_DEAD_AFTER_S = 60.0
SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS stages(
  key TEXT PRIMARY KEY, kind TEXT NOT NULL, slot TEXT NOT NULL, version INTEGER NOT NULL, inputs TEXT NOT NULL,
  outputs TEXT NOT NULL, facts TEXT NOT NULL, seconds REAL NOT NULL, finished_at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS stages_by_slot ON stages(slot, finished_at);
CREATE TABLE IF NOT EXISTS artefacts(sha256 TEXT PRIMARY KEY, suffix TEXT NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS samples(
  stage TEXT NOT NULL, row TEXT NOT NULL, sample INTEGER NOT NULL, persona TEXT NOT NULL, prompt TEXT NOT NULL,
  completion TEXT NOT NULL, n_tok INTEGER NOT NULL, ended INTEGER NOT NULL, PRIMARY KEY(stage, row, sample)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores(
  stage TEXT NOT NULL, row TEXT NOT NULL, sample INTEGER NOT NULL, metric TEXT NOT NULL, value REAL, reason TEXT,
  detail TEXT NOT NULL, PRIMARY KEY(stage, row, sample, metric),
  CHECK ((value IS NULL) = (reason IS NOT NULL))) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases(
  key TEXT PRIMARY KEY, slot TEXT NOT NULL, pid INTEGER NOT NULL, host TEXT NOT NULL, token TEXT NOT NULL,
  heartbeat REAL NOT NULL, note TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS progress(key TEXT PRIMARY KEY, step INTEGER NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs(
  id TEXT PRIMARY KEY, recipe TEXT NOT NULL, recipe_sha256 TEXT NOT NULL, source TEXT NOT NULL,
  started_at REAL NOT NULL, finished_at REAL, facts TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS run_stages(
  run TEXT NOT NULL, key TEXT NOT NULL, slot TEXT NOT NULL, reused INTEGER NOT NULL, PRIMARY KEY(run, slot));
CREATE TABLE IF NOT EXISTS verdicts(
  run TEXT NOT NULL, gate TEXT NOT NULL, subject TEXT NOT NULL, verdict TEXT NOT NULL, body TEXT NOT NULL,
  decided_at REAL NOT NULL, PRIMARY KEY(run, gate, subject));
CREATE TABLE IF NOT EXISTS failures(
  key TEXT PRIMARY KEY, slot TEXT NOT NULL, exit_code INTEGER NOT NULL, reason TEXT NOT NULL, failed_at REAL NOT NULL);
"""


class Lease:
    """The right to compute one stage; `note` doubles as heartbeat and as live progress for `status`."""

    def __init__(self, store: Store, key: str, token: str) -> None:
        self._store = store
        self._key = key
        self._token = token
        self._last_note_s = 0.0

    def note(self, progress: Mapping[str, Any], *, at_most_every_s: float = 1.0) -> None:
        """Tell other terminals how far the stage is. Cheap: writes at most once in `at_most_every_s`."""
        now_s = time.monotonic()
        if now_s - self._last_note_s < at_most_every_s:
            return
        self._last_note_s = now_s
        with self._store.transaction() as db:
            db.execute(
                "UPDATE leases SET heartbeat=?, note=? WHERE key=? AND token=?",
                (time.time(), canonical_json(progress), self._key, self._token),
            )


class Store:
    """A workspace's ledger and artefacts. Safe for several processes; one connection per process and object."""

    def __init__(self, root: Path, db: sqlite3.Connection) -> None:
        self.root = root
        self._db = db

    @classmethod
    def open(cls, root: Path | str, *, create: bool = True) -> Store:
        """Open the workspace at `root`, creating it if asked. Raises StoreError when it cannot be used."""
        root = Path(root)
        path = root / "ledger.sqlite"
        if not create and not path.is_file():
            raise StoreError("no ledger here yet", where=str(root), fix="run a recipe first, or give --workspace")
        with storage_errors(root):
            if create:
                (root / "artefacts").mkdir(parents=True, exist_ok=True)
            db = connect(path, _SCHEMA, SCHEMA_VERSION)
            found = db.execute("PRAGMA user_version").fetchone()[0]
            if found != SCHEMA_VERSION:
                raise StoreError(
                    f"the ledger has schema {found}, this fastconv reads {SCHEMA_VERSION}",
                    where=str(path),
                    fix="use the fastconv version that wrote it, or another --workspace",
                )
            if create and not _has_failures(db):  # a ledger from before there was that table
                db.executescript(_SCHEMA)
        return cls(root, db)

    def relaxed(self) -> Store:
        """This store, its commits no longer waiting for the disk: for many small ones.

        A killed process loses nothing by it. A power cut may lose what was committed since any connection last
        committed in full, as the log is one sequence; the ledger stays whole.
        """
        self._db.execute("PRAGMA synchronous=NORMAL")
        return self

    def close(self) -> None:
        """Close the connection; the object cannot be used afterwards."""
        self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One atomic write. Storage faults (disk full, read-only) come out as StoreError."""
        with storage_errors(self.root):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has ended it already, and must not be hidden by that
                    self._db.execute("ROLLBACK")
                raise

    # --- artefacts -------------------------------------------------------------------------------------

    def put(self, data: bytes, suffix: str) -> str:
        """Store bytes under their sha256 (hex, returned). `suffix` is `safetensors` or `json`; never pickle."""
        if suffix not in ("safetensors", "json"):
            raise ValueError(f"artefacts are safetensors or json, not {suffix!r}")
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.path(sha256, suffix)
        with storage_errors(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() and path.read_bytes() == data:
                os.utime(path)  # young again, so that no sweep takes it for an orphan before its row is there
            else:
                write_atomically(path, data)
        with self.transaction() as db:
            db.execute("INSERT OR IGNORE INTO artefacts VALUES(?,?,?)", (sha256, suffix, len(data)))
        with storage_errors(self.root):
            # A `gc` removes a file only under the ledger's lock and while no row names it: from here on it cannot.
            if not path.is_file():
                write_atomically(path, data)
        return sha256

    def path(self, sha256: str, suffix: str) -> Path:
        """Where an artefact lies."""
        return self.root / "artefacts" / sha256[:2] / f"{sha256}.{suffix}"

    def get(self, sha256: str, suffix: str) -> bytes:
        """Read an artefact and verify its sha256. Raises StoreError if it is missing or damaged."""
        path = self.path(sha256, suffix)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise StoreError(
                "the artefact is gone",
                where=str(path),
                fix="`fastconv forget` the stage that made it, then run the recipe again",
            ) from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StoreError(
                "the artefact's bytes do not match its sha256",
                where=str(path),
                fix="`fastconv forget` the stage that made it, then run the recipe again",
            )
        return data

    def put_json(self, value: object) -> str:
        """`put` for a JSON value in canonical form."""
        return self.put(canonical_json(value).encode(), "json")

    def get_json(self, sha256: str) -> Any:
        """`get` for a JSON value."""
        return json.loads(self.get(sha256, "json"))

    def _drop_artefact(self, sha256: str, suffix: str) -> None:
        self.path(sha256, suffix).unlink(missing_ok=True)
        with self.transaction() as db:
            db.execute("DELETE FROM artefacts WHERE sha256=?", (sha256,))

    # --- stages ----------------------------------------------------------------------------------------

    def record(self, key: str) -> Record | None:
        """The finished stage of this key, or None: without a row it never happened."""
        row = self._db.execute("SELECT * FROM stages WHERE key=?", (key,)).fetchone()
        return _record(row) if row else None

    def latest_in_slot(self, slot: str) -> Record | None:
        """The newest finished stage of this human name, whatever its inputs were."""
        row = self._db.execute(
            "SELECT * FROM stages WHERE slot=? ORDER BY finished_at DESC LIMIT 1", (slot,)
        ).fetchone()
        return _record(row) if row else None

    def commit(
        self,
        stage: Stage,
        *,
        outputs: Mapping[str, Any],
        facts: Mapping[str, Any],
        seconds: float,
        samples: Iterable[Sample] = (),
        scores: Iterable[Score] = (),
    ) -> None:
        """Write a finished stage with all its rows, atomically and last. Committing twice changes nothing."""
        with self.transaction() as db:
            if db.execute("SELECT 1 FROM stages WHERE key=?", (stage.key,)).fetchone():
                return
            db.executemany(
                "INSERT INTO samples VALUES(?,?,?,?,?,?,?,?)",
                [
                    (stage.key, s.row, s.sample, s.persona, s.prompt, s.completion, s.n_tok, int(s.ended))
                    for s in samples
                ],
            )
            db.executemany(
                "INSERT INTO scores VALUES(?,?,?,?,?,?,?)",
                [(stage.key, s.row, s.sample, s.metric, s.value, s.reason, canonical_json(s.detail)) for s in scores],
            )
            db.execute(
                "INSERT INTO stages VALUES(?,?,?,?,?,?,?,?,?)",
                (stage.key, stage.kind, stage.slot, stage.version, canonical_json(stage.full_inputs),
                 canonical_json(outputs), canonical_json(facts), seconds, time.time()),
            )  # fmt: skip
            db.execute("DELETE FROM failures WHERE key=?", (stage.key,))

    def note_failure(self, stage: Stage, exit_code: int, reason: str) -> None:
        """Write down why a stage could not be finished; the newest reason stands until the stage is committed."""
        with self.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO failures VALUES(?,?,?,?,?)",
                (stage.key, stage.slot, exit_code, reason, time.time()),
            )

    def failures(self) -> dict[str, Failure]:
        """Stages that could not be finished when they were last tried, by key, in the order they failed."""
        if not _has_failures(self._db):
            return {}
        rows = self._db.execute("SELECT * FROM failures ORDER BY failed_at, key").fetchall()
        return {r["key"]: Failure(r["slot"], r["exit_code"], r["reason"], r["failed_at"]) for r in rows}

    def forget(self, name: str) -> list[str]:
        """Remove finished stages by slot or by 8 or more digits of their key, with their rows; returns the slots removed.

        Stages that rest on them stay: computed again from the same inputs, a stage gives the same result. Artefacts
        that only they named lose their row, so the next sweep frees them.
        """
        with self.transaction() as db:
            found = db.execute(
                "SELECT key, slot, outputs FROM stages WHERE slot=?1 OR (length(?1) >= 8 AND substr(key, 1, length(?1))=?1)",
                (name,),
            ).fetchall()
            for row in found:
                for table, column in (("samples", "stage"), ("scores", "stage"), ("stages", "key")):
                    db.execute(f"DELETE FROM {table} WHERE {column}=?", (row["key"],))
            for row in found:
                for value in json.loads(row["outputs"]).values():
                    db.execute(
                        "DELETE FROM artefacts WHERE sha256=?1 AND NOT EXISTS (SELECT 1 FROM stages, "
                        "json_each(stages.outputs) WHERE json_each.value=?1)",
                        (value if isinstance(value, str) else "",),
                    )
        return [row["slot"] for row in found]

    def samples(self, key: str) -> list[Sample]:
        """The completions of a stage, ordered by row and sample."""
        rows = self._db.execute("SELECT * FROM samples WHERE stage=? ORDER BY row, sample", (key,))
        return [
            Sample(r["row"], r["sample"], r["persona"], r["prompt"], r["completion"], r["n_tok"], bool(r["ended"]))
            for r in rows
        ]

    def scores(self, key: str) -> list[Score]:
        """The scores of a stage, ordered by row, sample and metric."""
        rows = self._db.execute("SELECT * FROM scores WHERE stage=? ORDER BY row, sample, metric", (key,))
        return [
            Score(r["row"], r["sample"], r["metric"], r["value"], r["reason"], json.loads(r["detail"])) for r in rows
        ]

    def rows(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Any read-only query as plain tuples."""
        with storage_errors(self.root):
            return [tuple(row) for row in self._db.execute(query, tuple(parameters))]

    def frame(self, query: str, parameters: Sequence[Any] = ()) -> polars.DataFrame:
        """Any read-only query as a polars frame (columns named as in the query)."""
        import polars

        cursor = self._db.execute(query, tuple(parameters))
        columns = [column[0] for column in cursor.description]
        rows = [tuple(row) for row in cursor]
        return polars.DataFrame(rows, schema=columns, orient="row", infer_schema_length=None)

    # --- leases and progress ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def lease(self, stage: Stage) -> Iterator[Lease]:
        """Hold the stage while computing it. Raises BusyError when a live process already does."""
        token = f"{started(os.getpid())}-{os.getpid()}-{time.time_ns()}"
        with self.transaction() as db:
            holder = db.execute("SELECT * FROM leases WHERE key=?", (stage.key,)).fetchone()
            if holder and _alive(holder):
                raise BusyError(
                    f"process {holder['pid']} on {holder['host']} is computing it",
                    where=stage.slot,
                    fix="wait for it (`fastconv status` shows how far it is) or stop it",
                )
            db.execute(
                "INSERT OR REPLACE INTO leases VALUES(?,?,?,?,?,?,?)",
                (stage.key, stage.slot, os.getpid(), socket.gethostname(), token, time.time(), "{}"),
            )
        try:
            yield Lease(self, stage.key, token)
        finally:
            # A full or read-only disk must not hide the error that got us here: the lease dies with the process.
            with contextlib.suppress(StoreError), self.transaction() as db:
                db.execute("DELETE FROM leases WHERE key=? AND token=?", (stage.key, token))

    def live_leases(self) -> dict[str, Mapping[str, Any]]:
        """Progress notes of the stages being computed right now, by key."""
        rows = self._db.execute("SELECT * FROM leases").fetchall()
        return {row["key"]: {**json.loads(row["note"]), "pid": row["pid"]} for row in rows if _alive(row)}

    def save_progress(self, key: str, step: int, state: bytes) -> None:
        """Keep a stage's training state (safetensors bytes) at `step`, replacing the one before."""
        before = self.progress(key)
        sha256 = self.put(state, "safetensors")
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO progress VALUES(?,?,?)", (key, step, sha256))
        if before and before[1] != sha256:
            self._drop_artefact(before[1], "safetensors")

    def progress(self, key: str) -> tuple[int, str] | None:
        """(step, sha256 of the state) of an unfinished stage, or None."""
        row = self._db.execute("SELECT step, sha256 FROM progress WHERE key=?", (key,)).fetchone()
        return (row["step"], row["sha256"]) if row else None

    def drop_progress(self, key: str) -> None:
        """Forget the training state of a finished stage and free its bytes."""
        before = self.progress(key)
        with self.transaction() as db:
            db.execute("DELETE FROM progress WHERE key=?", (key,))
        if before:
            self._drop_artefact(before[1], "safetensors")

    def sweep(self) -> int:
        """Remove temporary files of dead writers and artefacts without a row; returns the bytes freed."""
        known = {row[0] for row in self._db.execute("SELECT sha256 FROM artefacts")}
        freed = 0
        for path in (self.root / "artefacts").rglob("*"):
            try:
                about = path.stat()
            except FileNotFoundError:
                continue  # another process has just renamed or removed it
            # A young file without a row may be one that another process is about to note.
            if path.is_dir() or path.stem in known or time.time() - about.st_mtime <= WRITER_DEAD_AFTER_S:
                continue
            freed += about.st_size
            path.unlink(missing_ok=True)
        return freed

    # --- runs and verdicts -----------------------------------------------------------------------------

    def start_run(self, run: str, recipe_json: str, recipe_sha256: str, source: str, facts: Mapping[str, Any]) -> None:
        """Note that a run begins, or goes on: its first start and the facts it had are kept, new facts are added."""
        with self.transaction() as db:
            before = db.execute("SELECT facts FROM runs WHERE id=?", (run,)).fetchone()
            merged = {**(json.loads(before["facts"]) if before else {}), **facts}
            db.execute(
                "INSERT INTO runs VALUES(?,?,?,?,?,NULL,?) ON CONFLICT(id) DO UPDATE SET facts=excluded.facts, finished_at=NULL",
                (run, recipe_json, recipe_sha256, source, time.time(), canonical_json(merged)),
            )

    def add_run_facts(self, run: str, facts: Mapping[str, Any]) -> None:
        """Add what became known of a run's machine and model while it ran."""
        with self.transaction() as db:
            before = db.execute("SELECT facts FROM runs WHERE id=?", (run,)).fetchone()
            db.execute(
                "UPDATE runs SET facts=? WHERE id=?", (canonical_json({**json.loads(before["facts"]), **facts}), run)
            )

    def finish_run(self, run: str) -> None:
        """Note that a run has come to its end."""
        with self.transaction() as db:
            db.execute("UPDATE runs SET finished_at=? WHERE id=?", (time.time(), run))

    def runs(self) -> list[sqlite3.Row]:
        """All runs of the workspace, newest first."""
        return self._db.execute("SELECT * FROM runs ORDER BY started_at DESC").fetchall()

    def run(self, run: str) -> sqlite3.Row | None:
        """The run of this id, if it ever began here."""
        return self._db.execute("SELECT * FROM runs WHERE id=?", (run,)).fetchone()

    def run_facts(self, run: str) -> dict[str, Any]:
        """What a run noted of its machine, versions and command; empty if it never began here."""
        row = self.run(run)
        return {} if row is None else json.loads(row["facts"])

    def note_stage_of_run(self, run: str, stage: Stage, *, reused: bool) -> None:
        """Record that a run rests on a stage, and whether it found it done. The first word stands."""
        with self.transaction() as db:
            db.execute(
                "INSERT INTO run_stages VALUES(?,?,?,?) ON CONFLICT(run, slot) DO UPDATE SET "
                "reused=CASE WHEN key=excluded.key THEN reused ELSE excluded.reused END, key=excluded.key",
                (run, stage.key, stage.slot, int(reused)),
            )

    def stages_of_run(self, run: str) -> list[sqlite3.Row]:
        """Key, slot and whether it was reused, for every stage that a run rests on."""
        return self._db.execute("SELECT key, slot, reused FROM run_stages WHERE run=?", (run,)).fetchall()

    def put_verdict(self, run: str, gate: str, subject: str, verdict: str, body: Mapping[str, Any]) -> None:
        """Record a gate's verdict with its evidence; the newest stands."""
        with self.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO verdicts VALUES(?,?,?,?,?,?)",
                (run, gate, subject, verdict, canonical_json(body), time.time()),
            )

    def verdicts(self, run: str) -> list[Mapping[str, Any]]:
        """The verdicts of a run as the gates wrote them, in the order decided."""
        rows = self._db.execute("SELECT body FROM verdicts WHERE run=? ORDER BY decided_at, gate, subject", (run,))
        return [json.loads(row["body"]) for row in rows]


def _has_failures(db: sqlite3.Connection) -> bool:
    return bool(db.execute("SELECT 1 FROM sqlite_master WHERE name='failures'").fetchone())


def _record(row: sqlite3.Row) -> Record:
    return Record(
        key=row["key"], kind=row["kind"], slot=row["slot"], version=row["version"], inputs=json.loads(row["inputs"]),
        outputs=json.loads(row["outputs"]), facts=json.loads(row["facts"]), seconds=row["seconds"],
        finished_at=row["finished_at"],
    )  # fmt: skip


def _alive(lease: sqlite3.Row) -> bool:
    if lease["host"] != socket.gethostname():
        return time.time() - lease["heartbeat"] < LEASE_DEAD_AFTER_S
    return lives(lease["pid"], lease["token"].partition("-")[0])
