"""Finding and freeing what nothing in a workspace needs. Which stages and states those are, `cleaning` says.

Rows go first, files second. A kill between the two leaves files that no row names, which the next `gc` (and every run's
sweep) frees; the other order would leave rows that name files which are gone.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastconv.store.io import storage_errors
from fastconv.store.ledger import WRITER_DEAD_AFTER_S, Store
from fastconv.store.merge import artefacts_of

Kind = Literal["temporary file", "orphan", "training state", "superseded stage", "adapter"]


@dataclass(frozen=True)
class Garbage:
    """One thing to free: what it is, its name (file, slot), why nothing needs it, and the bytes of its files."""

    kind: Kind
    name: str
    why: str
    n_bytes: int
    #: Keys of stages or of training states whose rows go, and (sha256, suffix) of artefacts that lose theirs.
    keys: tuple[str, ...] = ()
    artefacts: tuple[tuple[str, str], ...] = ()
    #: It may go only while every run is finished.
    only_idle: bool = False


def stray_files(store: Store) -> list[Garbage]:
    """Temporary files of dead writers, and artefact files without a row."""
    known = {sha256 for (sha256,) in store.rows("SELECT sha256 FROM artefacts")}
    found = []
    for path, n_bytes in _old_files(store.root):
        if path.name.startswith(".tmp-"):
            found.append(Garbage("temporary file", path.name, "its writer is dead", n_bytes))
        elif path.stem not in known:
            found.append(Garbage("orphan", path.name, "no row names it", n_bytes))
    return found


def unnamed_artefacts(store: Store) -> list[Garbage]:
    """Artefacts with a row that neither a stage nor a training state names: what a kill left before its commit.

    None while anything is being computed: its artefact may be waiting for its row.
    """
    if store.live_leases():
        return []
    named = {
        artefact for (outputs,) in store.rows("SELECT outputs FROM stages") for artefact in artefacts_of(store, outputs)
    }
    kept = {sha256 for (sha256,) in store.rows("SELECT sha256 FROM progress")}
    return [
        Garbage("orphan", f"{sha256}.{suffix}", "no stage names it", n_bytes, artefacts=((sha256, suffix),))
        for sha256, suffix, n_bytes in store.rows("SELECT sha256, suffix, bytes FROM artefacts ORDER BY sha256")
        if (sha256, suffix) not in named and sha256 not in kept and _is_old(store.path(sha256, suffix))
    ]


def free(store: Store, waste: Iterable[Garbage]) -> int:
    """Free these; the bytes of the files removed. What has come into use since it was found stays."""
    waste = list(waste)
    for one in waste:
        _drop_rows(store, one)
    wanted = {sha256 for one in waste for sha256, _ in one.artefacts}
    return _drop_files(store, wanted)


def artefact_bytes(store: Store, artefacts: Collection[tuple[str, str]]) -> int:
    """Bytes of these artefacts as their rows say."""
    return sum(
        n_bytes
        for sha256, _ in artefacts
        for (n_bytes,) in store.rows("SELECT bytes FROM artefacts WHERE sha256=?", (sha256,))
    )


def _drop_rows(store: Store, one: Garbage) -> None:
    """The rows of one thing, in one transaction; an artefact that anything else names keeps its row."""
    with store.transaction() as db:
        if one.only_idle and db.execute("SELECT 1 FROM runs WHERE finished_at IS NULL").fetchone():
            return
        if one.kind == "superseded stage" and db.execute("SELECT 1 FROM run_stages WHERE key=?", one.keys).fetchone():
            return
        for key in one.keys if one.kind == "superseded stage" else ():
            for table, column in (("samples", "stage"), ("scores", "stage"), ("stages", "key")):
                db.execute(f"DELETE FROM {table} WHERE {column}=?", (key,))
        for key in one.keys if one.kind == "training state" else ():
            db.execute("DELETE FROM progress WHERE key=?", (key,))
        for sha256, _ in one.artefacts:
            used = "SELECT 1 FROM progress WHERE sha256=?1"
            if one.kind != "adapter":  # an adapter's own stage goes on naming it: that it is gone is then said clearly
                used += " UNION ALL SELECT 1 FROM stages, json_tree(stages.outputs) AS part WHERE part.atom=?1"
            if not db.execute(used, (sha256,)).fetchone():
                db.execute("DELETE FROM artefacts WHERE sha256=?", (sha256,))


def _drop_files(store: Store, just_unnamed: Collection[str]) -> int:
    """Files that no row names: those that have just lost theirs, and others once they are old."""
    freed = 0
    for path, n_bytes in [*_files(store.root)]:
        if path.stem not in just_unnamed and not _is_old(path):
            continue
        # Under the ledger's lock: a writer adds its row under it too, and then looks whether the file is still there.
        with store.transaction() as db:
            if not db.execute("SELECT 1 FROM artefacts WHERE sha256=?", (path.stem,)).fetchone():
                path.unlink(missing_ok=True)
                freed += n_bytes
    return freed


def _files(root: Path) -> Iterator[tuple[Path, int]]:
    """Every file under the artefacts' folder, with its bytes."""
    with storage_errors(root):
        for path in sorted((root / "artefacts").rglob("*")):
            try:
                if path.is_file():
                    yield path, path.stat().st_size
            except FileNotFoundError:
                continue  # another process has just renamed or removed it


def _old_files(root: Path) -> Iterator[tuple[Path, int]]:
    return ((path, n_bytes) for path, n_bytes in _files(root) if _is_old(path))


def _is_old(path: Path) -> bool:
    """Whether its writer would have noted it by now; a file that is gone counts as old."""
    try:
        return time.time() - path.stat().st_mtime > WRITER_DEAD_AFTER_S
    except FileNotFoundError:
        return True
