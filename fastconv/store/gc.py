"""Finding and freeing what nothing in a workspace needs: stray files, unnamed artefacts, and rows that `run.gc` names.

Rows are deleted first, files second. A kill between the two leaves files that no row names, which the next `gc` (and the
sweep of every run) frees; the other order would leave rows that name missing files.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastconv.errors import StoreError
from fastconv.store.io import columns_of, storage_errors
from fastconv.store.ledger import Store, delete_stage
from fastconv.store.merge import artefacts_of
from fastconv.store.records import LEDGER_SCHEMA
from fastconv.store.sound import is_artefact

Kind = Literal["temporary file", "orphan", "training state", "superseded stage", "adapter"]
#: A file that no row names is kept for this many seconds: its writer may be about to commit the row.
WRITER_DEAD_AFTER_S = 60.0
#: Tables that every ledger has.
LEDGER_TABLES = ("stages", "artefacts", "samples", "scores", "leases", "progress", "runs", "run_stages", "verdicts")


@dataclass(frozen=True)
class Garbage:
    """One item to free: its kind, its name (file or slot), why nothing needs it, and the bytes of its files."""

    kind: Kind
    name: str
    why: str
    n_bytes: int
    #: Keys of the stages or training states whose rows are deleted, and (sha256, suffix) of artefacts that lose theirs.
    keys: tuple[str, ...] = ()
    artefacts: tuple[tuple[str, str], ...] = ()
    #: It is freed only while every run is finished.
    only_idle: bool = False


def stray_files(store: Store) -> list[Garbage]:
    """Temporary files of dead writers, and artefact files without a row."""
    garbage = []
    for path, n_bytes in _stray_paths(store):
        if path.name.startswith(".tmp-"):
            garbage.append(Garbage("temporary file", path.name, "its writer is dead", n_bytes))
        else:
            garbage.append(Garbage("orphan", path.name, "no row names it", n_bytes))
    return garbage


def sweep(store: Store) -> int:
    """Remove the stray files; returns the bytes freed. Raises StoreError for a storage fault."""
    freed_bytes = 0
    with storage_errors(store.root):
        for path, n_bytes in [*_stray_paths(store)]:
            path.unlink(missing_ok=True)
            freed_bytes += n_bytes
    return freed_bytes


def unnamed_artefacts(store: Store) -> list[Garbage]:
    """Artefacts with a row that neither a stage nor a training state names: a process was killed before its commit.

    Empty while any stage is being computed: its artefact may be waiting for its row.
    """
    if store.live_leases():
        return []
    named = {
        artefact for (outputs,) in store.rows("SELECT outputs FROM stages") for artefact in artefacts_of(store, outputs)
    }
    in_progress = {sha256 for (sha256,) in store.rows("SELECT sha256 FROM progress")}
    return [
        Garbage("orphan", f"{sha256}.{suffix}", "no stage names it", n_bytes, artefacts=((sha256, suffix),))
        for sha256, suffix, n_bytes in store.rows("SELECT sha256, suffix, bytes FROM artefacts ORDER BY sha256")
        if (sha256, suffix) not in named and sha256 not in in_progress and _is_old(store.path(sha256, suffix))
    ]


def free(store: Store, garbage: Iterable[Garbage]) -> int:
    """Free these items; returns the bytes of the files removed. What has come into use since it was found stays."""
    garbage = list(garbage)
    for item in garbage:
        _delete_rows(store, item)
    unnamed = {sha256 for item in garbage for sha256, _ in item.artefacts}
    return _delete_files(store, unnamed)


def artefact_bytes(store: Store, artefacts: Collection[tuple[str, str]]) -> int:
    """Sum of the bytes that the rows of these artefacts, given as (sha256, suffix), record."""
    return sum(
        n_bytes
        for sha256, _ in artefacts
        for (n_bytes,) in store.rows("SELECT bytes FROM artefacts WHERE sha256=?", (sha256,))
    )


def find_damage(store: Store, *, deep: bool = False) -> list[str]:
    """What is wrong with a ledger and its artefacts, one line each; `deep` reads every page and every artefact.

    Raises StoreError for a ledger that cannot be read at all.
    """
    said = [row[0] for row in store.rows(f"PRAGMA {'integrity_check' if deep else 'quick_check'}(5)")]
    found = [f"the ledger is damaged: {line}" for line in said if line != "ok"]
    for table in LEDGER_TABLES:
        store.rows(f"SELECT COUNT(*) FROM {table}")
    for table, columns in columns_of(LEDGER_SCHEMA).items():
        held = {row[1] for row in store.rows(f"PRAGMA table_info({table})")}
        # An older ledger may lack a whole table.
        found += [
            f"the ledger is damaged: table {table} has no column {one}" for one in columns if held and one not in held
        ]
    found += [f"the ledger is damaged: {line}" for line in store.unsound_rows()]
    for sha256, suffix, n_bytes in store.rows("SELECT sha256, suffix, bytes FROM artefacts ORDER BY sha256"):
        if not is_artefact(sha256, suffix):
            continue  # told with the rows
        path = store.path(sha256, suffix)
        if not path.is_file() or path.stat().st_size != n_bytes:
            found.append(f"artefact {path.name} is {'cut short' if path.is_file() else 'gone'}")
        elif deep:
            try:
                store.get(sha256, suffix)
            except StoreError as error:
                found.append(f"artefact {path.name}: {error.what}")
    return found


def drop_dead_leases(store: Store) -> int:
    """Delete the leases of processes that run no more; returns how many."""
    live = store.live_leases()
    with store.transaction() as db:
        dead = [key for (key,) in db.execute("SELECT key FROM leases").fetchall() if key not in live]
        for key in dead:
            db.execute("DELETE FROM leases WHERE key=?", (key,))
    return len(dead)


def _delete_rows(store: Store, item: Garbage) -> None:
    """Delete the rows of one item in one transaction; an artefact that anything else names keeps its row."""
    with store.transaction() as db:
        if item.only_idle and db.execute("SELECT 1 FROM runs WHERE finished_at IS NULL").fetchone():
            return
        if item.kind == "superseded stage" and db.execute("SELECT 1 FROM run_stages WHERE key=?", item.keys).fetchone():
            return
        for key in item.keys if item.kind == "superseded stage" else ():
            delete_stage(db, key)
        for key in item.keys if item.kind == "training state" else ():
            db.execute("DELETE FROM progress WHERE key=?", (key,))
        for sha256, _ in item.artefacts:
            used = "SELECT 1 FROM progress WHERE sha256=?1"
            if item.kind != "adapter":  # an adapter's stage still names it, so that a later reader gets a clear error
                used += " UNION ALL SELECT 1 FROM stages, json_tree(stages.outputs) AS part WHERE part.atom=?1"
            if not db.execute(used, (sha256,)).fetchone():
                db.execute("DELETE FROM artefacts WHERE sha256=?", (sha256,))


def _delete_files(store: Store, just_unnamed: Collection[str]) -> int:
    """Delete files that no row names: those that have just lost theirs, and others once they are old."""
    freed_bytes = 0
    for path, n_bytes in [*_files(store.root)]:
        if path.stem not in just_unnamed and not _is_old(path):
            continue
        # Under the ledger's lock, because a writer adds its row under it too and then checks that its file still exists.
        with store.transaction() as db:
            if not db.execute("SELECT 1 FROM artefacts WHERE sha256=?", (path.stem,)).fetchone():
                path.unlink(missing_ok=True)
                freed_bytes += n_bytes
    return freed_bytes


def _stray_paths(store: Store) -> Iterator[tuple[Path, int]]:
    """Old files under the artefacts' folder that no row names, with their bytes."""
    known = {sha256 for (sha256,) in store.rows("SELECT sha256 FROM artefacts")}
    return ((path, n_bytes) for path, n_bytes in _files(store.root) if path.stem not in known and _is_old(path))


def _files(root: Path) -> Iterator[tuple[Path, int]]:
    """Every file under the artefacts' folder, with its bytes."""
    with storage_errors(root):
        for path in sorted((root / "artefacts").rglob("*")):
            try:
                if path.is_file():
                    yield path, path.stat().st_size
            except FileNotFoundError:
                continue  # another process has just renamed or removed it


def _is_old(path: Path) -> bool:
    """Whether its writer would have committed its row by now; a missing file counts as old."""
    try:
        return time.time() - path.stat().st_mtime > WRITER_DEAD_AFTER_S
    except FileNotFoundError:
        return True
