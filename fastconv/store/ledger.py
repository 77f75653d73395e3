"""The ledger: one SQLite file per workspace, with content-addressed artefact files beside it.

The rules that make resuming safe:

- A stage is named by the sha256 of its *inputs* (`Stage.key`), which is known before anything runs.
- An artefact is written to a temporary file, fsynced, renamed to its own sha256, and the folder fsynced.
- A stage's row is committed last, in one transaction with its samples and scores. Without a row it is not computed.
- A missing score is a row with a NULL value and a reason. It is never 0.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastconv.errors import BusyError, StoreError, safe_text
from fastconv.recipe import canonical_json
from fastconv.store.io import (
    connect,
    damaged,
    joined_json,
    make_folder,
    process_is_alive,
    process_start,
    storage_errors,
    stored_json,
    write_atomically,
    write_text,
)
from fastconv.store.records import LEDGER_SCHEMA, Failure, Record, Sample, Score, Stage, changed_inputs
from fastconv.store.sound import SUFFIXES, require_artefact, unsound_rows

if TYPE_CHECKING:
    import polars

__all__ = ["Lease", "Record", "Sample", "Score", "Stage", "Store", "changed_inputs", "write_atomically", "write_text"]

#: A lease whose holder is on another host counts as dead after this many seconds without a heartbeat.
LEASE_DEAD_AFTER_S = 300.0
#: Columns of the ledger that hold a record's fields as they are, and the functions that read those fields.
_SAMPLE_COLUMNS = "row, sample, persona, prompt, completion, n_tok, ended"
_SCORE_COLUMNS = "row, sample, metric, value, reason"
_SAMPLE_VALUES = attrgetter(*_SAMPLE_COLUMNS.split(", "))
_SCORE_VALUES = attrgetter(*_SCORE_COLUMNS.split(", "))
SCHEMA_VERSION = 1


class Lease:
    """The right to compute one stage; `note` is both the heartbeat and the live progress that `status` shows."""

    def __init__(self, store: Store, key: str, token: str) -> None:
        self._store = store
        self._key = key
        self._token = token
        self._last_note_s = 0.0

    def note(self, progress: Mapping[str, Any], *, at_most_every_s: float = 1.0) -> None:
        """Write how far the stage is, for other processes; at most once in `at_most_every_s` seconds, else a no-op."""
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
    """The ledger and artefacts of one workspace. Safe for several processes; each object has its own connection."""

    def __init__(self, root: Path, db: sqlite3.Connection) -> None:
        self.root = root
        self._db = db

    @classmethod
    def open(cls, root: Path | str, *, create: bool = True) -> Store:
        """Open the workspace at `root`, creating it if `create`. Raises StoreError if it cannot be used."""
        root = Path(root)
        path = root / "ledger.sqlite"
        if not create and not path.is_file():
            raise StoreError("no ledger here yet", where=str(root), fix="run a recipe first, or give --workspace")
        with storage_errors(root):
            if path.exists() and not path.is_file():
                raise damaged("ledger.sqlite is no file", str(root))
            if path.is_file() and not path.stat().st_size and any((root / "artefacts").glob("*/*")):
                raise damaged("it is empty, beside artefacts", str(root))
            if create:
                (root / "artefacts").mkdir(parents=True, exist_ok=True)
            db = connect(path, LEDGER_SCHEMA, SCHEMA_VERSION)
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version != SCHEMA_VERSION:
                raise StoreError(
                    f"the ledger has schema {version}, this fastconv reads {SCHEMA_VERSION}",
                    where=str(path),
                    fix="use the fastconv version that wrote it, or another --workspace",
                )
            if create and not _has_failures(db):  # written before the failures table existed
                db.executescript(LEDGER_SCHEMA)
        return cls(root, db)

    def relaxed(self) -> Store:
        """This store with commits that do not wait for the disk (`synchronous=NORMAL`), for many small ones.

        A killed process loses nothing. A power cut may lose what was committed since any connection last synced, as
        the write-ahead log is one sequence; the ledger stays consistent.
        """
        self._db.execute("PRAGMA synchronous=NORMAL")
        return self

    def close(self) -> None:
        """Close the connection; the object cannot be used afterwards."""
        self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One atomic write under the write lock, or a part of the one that is open. Raises StoreError for storage faults."""
        if self._db.in_transaction:
            yield self._db
            return
        with storage_errors(self.root):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has rolled back already; a second error would hide it
                    self._db.execute("ROLLBACK")
                raise

    # --- artefacts -------------------------------------------------------------------------------------

    def put(self, data: bytes, suffix: str) -> str:
        """Store bytes under their sha256 and return it (hex). Raises ValueError unless `suffix` is `safetensors` or `json`."""
        if suffix not in SUFFIXES:
            raise ValueError(f"artefacts are safetensors or json, not {suffix!r}")
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.path(sha256, suffix)
        with storage_errors(self.root):
            make_folder(path.parent)
            if path.is_file() and path.read_bytes() == data:
                os.utime(path)  # makes it young, so that no sweep removes it before its row is committed
            else:
                write_atomically(path, data)
        with self.transaction() as db:
            db.execute("INSERT OR IGNORE INTO artefacts VALUES(?,?,?)", (sha256, suffix, len(data)))
        with storage_errors(self.root):
            # `gc` removes a file only under the ledger's lock and while no row names it: from here on it is safe.
            if not path.is_file():
                write_atomically(path, data)
        return sha256

    def path(self, sha256: str, suffix: str) -> Path:
        """Path of an artefact's file. Raises StoreError for a name that is none."""
        require_artefact(sha256, suffix, str(self.root))
        return self.root / "artefacts" / sha256[:2] / f"{sha256}.{suffix}"

    def get(self, sha256: str, suffix: str) -> bytes:
        """The bytes of an artefact, its sha256 verified. Raises StoreError if it is missing or damaged."""
        path = self.path(sha256, suffix)
        fix = "`fastconv forget` the stage that made it, then run the recipe again"
        with storage_errors(path):
            if not path.is_file():  # also what only looks like one: to read a pipe would never end
                raise StoreError("the artefact is gone", where=str(path), fix=fix)
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StoreError("the artefact's bytes do not match its sha256", where=str(path), fix=fix)
        return data

    def put_json(self, value: object) -> str:
        """`put` for a JSON value in canonical form."""
        return self.put(canonical_json(value).encode(), "json")

    def get_json(self, sha256: str) -> Any:
        """`get` for a JSON value."""
        return stored_json(self.get(sha256, "json"))

    # --- stages ----------------------------------------------------------------------------------------

    def record(self, key: str) -> Record | None:
        """The finished stage with this key, or None."""
        row = self._db.execute("SELECT * FROM stages WHERE key=?", (key,)).fetchone()
        return _record(row) if row else None

    def latest_in_slot(self, slot: str) -> Record | None:
        """The newest finished stage in this slot, whatever its inputs were, or None."""
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
        """Write a finished stage with its samples and scores in one transaction. Committing twice changes nothing.

        `seconds` is its wall time. Raises StoreError, and then nothing is written.
        """
        with self.transaction() as db:
            if db.execute("SELECT 1 FROM stages WHERE key=?", (stage.key,)).fetchone():
                return
            db.executemany(
                "INSERT INTO samples VALUES(?,?,?,?,?,?,?,?)",
                [(stage.key, *_SAMPLE_VALUES(sample)) for sample in samples],
            )
            db.executemany(
                "INSERT INTO scores VALUES(?,?,?,?,?,?,?)",
                [(stage.key, *_SCORE_VALUES(score), canonical_json(score.detail)) for score in scores],
            )
            db.execute(
                "INSERT INTO stages VALUES(?,?,?,?,?,?,?,?,?)",
                (stage.key, stage.kind, stage.slot, stage.version, canonical_json(stage.full_inputs),
                 canonical_json(outputs), canonical_json(facts), seconds, time.time()),
            )  # fmt: skip
            db.execute("DELETE FROM failures WHERE key=?", (stage.key,))

    def note_failure(self, stage: Stage, exit_code: int, reason: str) -> None:
        """Record why a stage failed; the newest reason stands until the stage is committed."""
        with self.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO failures VALUES(?,?,?,?,?)",
                (stage.key, stage.slot, exit_code, reason, time.time()),
            )

    def failures(self) -> dict[str, Failure]:
        """Key -> failure of the stages that failed when they were last tried, in the order they failed."""
        if not _has_failures(self._db):
            return {}
        columns = "key, slot, exit_code, reason, failed_at"
        rows = self._db.execute(f"SELECT {columns} FROM failures ORDER BY failed_at, key")
        return {key: Failure(*values) for key, *values in rows}

    def forget(self, name: str) -> list[str]:
        """Delete finished stages by slot or by 8 or more digits of their key, with their rows; returns their slots.

        Stages that depend on them stay, because the same inputs give the same result again. Artefacts that only they
        named lose their row, so that the next sweep frees them.
        """
        with self.transaction() as db:
            stages = db.execute(
                "SELECT key, slot, outputs FROM stages WHERE slot=?1 OR (length(?1) >= 8 AND substr(key, 1, length(?1))=?1)",
                (name,),
            ).fetchall()
            for row in stages:
                delete_stage(db, row["key"])
            for row in stages:
                for value in stored_json(row["outputs"]).values():
                    db.execute(
                        "DELETE FROM artefacts WHERE sha256=?1 AND NOT EXISTS (SELECT 1 FROM stages, "
                        "json_each(stages.outputs) WHERE json_each.value=?1)",
                        (value if isinstance(value, str) else "",),
                    )
        return [row["slot"] for row in stages]

    def samples(self, key: str) -> list[Sample]:
        """The samples of a stage, ordered by row and sample number."""
        rows = self._db.execute(f"SELECT {_SAMPLE_COLUMNS} FROM samples WHERE stage=? ORDER BY row, sample", (key,))
        return [Sample(*values, ended=bool(ended)) for *values, ended in rows]

    def scores(self, key: str) -> list[Score]:
        """The scores of a stage, ordered by row, sample number and metric."""
        query = f"SELECT {_SCORE_COLUMNS}, detail FROM scores WHERE stage=? ORDER BY row, sample, metric"
        rows = self._db.execute(query, (key,))
        return [Score(*values, detail=stored_json(detail)) for *values, detail in rows]

    def rows(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of any read-only query as plain tuples. Raises StoreError for storage faults."""
        with storage_errors(self.root):
            return [tuple(row) for row in self._db.execute(query, tuple(parameters))]

    def frame(self, query: str, parameters: Sequence[Any] = ()) -> polars.DataFrame:
        """The rows of any read-only query as a polars frame, with the columns named as in the query."""
        import polars

        cursor = self._db.execute(query, tuple(parameters))
        columns = [column[0] for column in cursor.description]
        try:
            return polars.DataFrame(list(map(tuple, cursor)), schema=columns, orient="row", infer_schema_length=None)
        except (polars.exceptions.PolarsError, TypeError, OverflowError) as error:
            raise damaged(f"a column holds values of several kinds ({error})") from error

    def unsound_rows(self, tables: Iterable[str] | None = None) -> list[str]:
        """`sound.unsound_rows` of this ledger."""
        return unsound_rows(self._db, tables)

    # --- leases and progress ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def lease(self, stage: Stage) -> Iterator[Lease]:
        """Hold the stage's lease while it is computed. Raises BusyError if a live process holds it already."""
        token = f"{process_start(os.getpid())}-{os.getpid()}-{time.time_ns()}"
        with self.transaction() as db:
            holder = db.execute("SELECT * FROM leases WHERE key=?", (stage.key,)).fetchone()
            if holder and _holder_is_alive(holder):
                raise BusyError(
                    f"process {holder['pid']} on {holder['host']} is computing it",
                    where=stage.slot,
                    fix="wait for it (`fastconv status` shows how far it is) or stop it",
                )
            values = (stage.key, stage.slot, os.getpid(), socket.gethostname(), token, time.time(), "{}")
            db.execute("INSERT OR REPLACE INTO leases VALUES(?,?,?,?,?,?,?)", values)
        try:
            yield Lease(self, stage.key, token)
        finally:
            # A full or read-only disk must not hide the error raised inside: the lease ends with the process anyway.
            with contextlib.suppress(StoreError), self.transaction() as db:
                db.execute("DELETE FROM leases WHERE key=? AND token=?", (stage.key, token))

    def live_leases(self) -> dict[str, Mapping[str, Any]]:
        """Key -> progress note (with the holder's `pid`) of the stages that are being computed."""
        rows = self._db.execute("SELECT * FROM leases").fetchall()
        return {row["key"]: {**stored_json(row["note"]), "pid": row["pid"]} for row in rows if _holder_is_alive(row)}

    def save_progress(self, key: str, step: int, state: bytes) -> None:
        """Save a stage's training state (safetensors bytes) at `step` and delete the previous one."""
        previous = self.progress(key)
        sha256 = self.put(state, "safetensors")
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO progress VALUES(?,?,?)", (key, step, sha256))
        if previous and previous[1] != sha256:
            self._delete_state(previous[1])

    def progress(self, key: str) -> tuple[int, str] | None:
        """(step, sha256 of the training state) of an unfinished stage, or None."""
        row = self._db.execute("SELECT step, sha256 FROM progress WHERE key=?", (key,)).fetchone()
        return (row["step"], row["sha256"]) if row else None

    def drop_progress(self, key: str) -> None:
        """Delete the training state of a stage, row and file."""
        previous = self.progress(key)
        with self.transaction() as db:
            db.execute("DELETE FROM progress WHERE key=?", (key,))
        if previous:
            self._delete_state(previous[1])

    def _delete_state(self, sha256: str) -> None:
        self.path(sha256, "safetensors").unlink(missing_ok=True)
        with self.transaction() as db:
            db.execute("DELETE FROM artefacts WHERE sha256=?", (sha256,))

    # --- runs and verdicts -----------------------------------------------------------------------------

    def start_run(self, run: str, recipe_json: str, recipe_sha256: str, source: str, facts: Mapping[str, Any]) -> None:
        """Record that a run begins or resumes: its first start time is kept, `facts` are merged over those it had.

        No run starts before one that is recorded already, whatever the clock says: whose thresholds were the first is read
        off these times.
        """
        with self.transaction() as db:
            row = db.execute("SELECT facts FROM runs WHERE id=?", (run,)).fetchone()
            merged = joined_json(row["facts"] if row else "{}", facts)
            db.execute(
                "INSERT INTO runs VALUES(?,?,?,?,MAX(?, (SELECT COALESCE(MAX(started_at), 0) FROM runs)),NULL,?) "
                "ON CONFLICT(id) DO UPDATE SET facts=excluded.facts, finished_at=NULL",
                (run, recipe_json, recipe_sha256, source, time.time(), merged),
            )

    def add_run_facts(self, run: str, facts: Mapping[str, Any]) -> None:
        """Merge facts that became known while the run was going over those recorded at its start."""
        with self.transaction() as db:
            row = db.execute("SELECT facts FROM runs WHERE id=?", (run,)).fetchone()
            db.execute("UPDATE runs SET facts=? WHERE id=?", (joined_json(row["facts"], facts), run))

    def finish_run(self, run: str) -> None:
        """Record that a run is finished."""
        with self.transaction() as db:
            db.execute("UPDATE runs SET finished_at=? WHERE id=?", (time.time(), run))

    def runs(self) -> list[sqlite3.Row]:
        """The rows of all runs of the workspace, newest first."""
        return self._db.execute("SELECT * FROM runs ORDER BY started_at DESC, rowid DESC").fetchall()

    def run(self, run: str) -> sqlite3.Row | None:
        """The row of the run with this id, or None if it never began in this workspace. Users type it: any text will do."""
        return self._db.execute("SELECT * FROM runs WHERE id=?", (safe_text(run, len(run)),)).fetchone()

    def run_facts(self, run: str) -> dict[str, Any]:
        """The run's facts (machine, versions, command); empty if it never began in this workspace."""
        row = self.run(run)
        return {} if row is None else stored_json(row["facts"])

    def note_stage_of_run(self, run: str, stage: Stage, *, reused: bool) -> None:
        """Record that a run uses a stage, and whether it was done already. For one key the first record stands."""
        with self.transaction() as db:
            db.execute(
                "INSERT INTO run_stages VALUES(?,?,?,?) ON CONFLICT(run, slot) DO UPDATE SET "
                "reused=CASE WHEN key=excluded.key THEN reused ELSE excluded.reused END, key=excluded.key",
                (run, stage.key, stage.slot, int(reused)),
            )

    def stages_of_run(self, run: str) -> list[sqlite3.Row]:
        """Rows (key, slot, reused) of every stage that a run uses."""
        return self._db.execute("SELECT key, slot, reused FROM run_stages WHERE run=?", (run,)).fetchall()

    def put_verdict(self, run: str, gate: str, subject: str, verdict: str, body: Mapping[str, Any]) -> None:
        """Record a gate's verdict with its evidence (`body`, JSON); the newest stands."""
        with self.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO verdicts VALUES(?,?,?,?,?,?)",
                (run, gate, subject, verdict, canonical_json(body), time.time()),
            )

    def verdicts(self, run: str) -> list[Mapping[str, Any]]:
        """The bodies of a run's verdicts, in the order decided."""
        rows = self._db.execute("SELECT body FROM verdicts WHERE run=? ORDER BY decided_at, gate, subject", (run,))
        return [stored_json(row["body"]) for row in rows]


def delete_stage(db: sqlite3.Connection, key: str) -> None:
    """Delete a finished stage's row with its samples and scores, in the caller's transaction."""
    for table, column in (("samples", "stage"), ("scores", "stage"), ("stages", "key")):
        db.execute(f"DELETE FROM {table} WHERE {column}=?", (key,))


def _has_failures(db: sqlite3.Connection) -> bool:
    return bool(db.execute("SELECT 1 FROM sqlite_master WHERE name='failures'").fetchone())


def _record(row: sqlite3.Row) -> Record:
    return Record(
        key=row["key"], kind=row["kind"], slot=row["slot"], version=row["version"], inputs=stored_json(row["inputs"]),
        outputs=stored_json(row["outputs"]), facts=stored_json(row["facts"]), seconds=row["seconds"],
        finished_at=row["finished_at"],
    )  # fmt: skip


def _holder_is_alive(lease: sqlite3.Row) -> bool:
    """Whether the process that holds a lease runs; on another host, whether its heartbeat is recent.

    A heartbeat far in the future is none: a clock was wrong, and nobody would wait until it is right.
    """
    if lease["host"] != socket.gethostname():
        return abs(time.time() - lease["heartbeat"]) < LEASE_DEAD_AFTER_S
    return process_is_alive(lease["pid"], lease["token"].partition("-")[0])
