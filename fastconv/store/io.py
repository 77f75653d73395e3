"""Writing files so that nothing is lost: all of a file or none of it, and storage faults as one clear line."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from fastconv.errors import StoreError

#: How long a connection waits for others before it says that the file is locked.
BUSY_S = 60.0


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none: temp, fsync, rename, fsync the folder."""
    temporary = path.parent / f".tmp-{os.getpid()}-{time.time_ns()}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, making its folder. Raises StoreError if that cannot be done."""
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())


@contextlib.contextmanager
def storage_errors(root: Path) -> Iterator[None]:
    """Inside, faults of disk and database come out as StoreError with the mend; `root` is named as the place."""
    try:
        yield
    except OSError as error:
        raise _storage_error(root, error.errno, str(error)) from error
    except sqlite3.OperationalError as error:
        code = {"SQLITE_FULL": errno.ENOSPC, "SQLITE_READONLY": errno.EROFS, "SQLITE_CANTOPEN": errno.EACCES}
        name = getattr(error, "sqlite_errorname", "")
        found = next((number for start, number in code.items() if name.startswith(start)), None)
        raise _storage_error(root, found, str(error)) from error
    except sqlite3.DatabaseError as error:
        raise StoreError(
            f"the ledger is damaged: {error}",
            where=str(root),
            fix="restore it from a backup or start another --workspace",
        ) from error


#: Commits wait for the disk, so that a power cut loses none. Tests turn it off: a killed process loses nothing either way.
SYNCHRONOUS = "FULL"


def connect(path: Path, schema: str, version: int) -> sqlite3.Connection:
    """A connection to the SQLite file at `path`, in write-ahead mode; a new file gets `schema` and `version`.

    Any number of processes may do this on one new file at once. Raises sqlite3.OperationalError after BUSY_S.
    """
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    db.row_factory = sqlite3.Row
    deadline_s = time.monotonic() + BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            # The switch is refused at once while another process has the file open; all else waits by itself.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)
    db.execute(f"PRAGMA synchronous={SYNCHRONOUS}")
    if db.execute("PRAGMA user_version").fetchone()[0] == 0:
        db.executescript(f"BEGIN IMMEDIATE; {schema} PRAGMA user_version={version}; COMMIT;")
    return db


def _storage_error(root: Path, code: int | None, text: str) -> StoreError:
    where = str(root)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            "no space left on the disk", where=where, fix="free some space, then the same command goes on"
        )
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StoreError(
            "the folder cannot be written", where=where, fix="make it writable or give another --workspace"
        )
    return StoreError(f"storage fault: {text}", where=where, fix="mend it, then the same command goes on")


def started(pid: int) -> str:
    """When a process started, in clock ticks since boot (no clock that can be set); `?` where that cannot be seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return "?"
    # A killed process whose parent never asked for its end (usual in containers) keeps its pid, but holds nothing.
    return "dead" if fields[0] == "Z" else fields[19]


def lives(pid: int, since: str) -> bool:
    """Whether the process on this host lives that had `pid` and for which `started` gave `since`."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return started(pid) == since
