"""Low-level storage: atomic file writes, SQLite connections, storage errors, and whether a process is alive.

Errors of disk and database become one-line StoreErrors. Locks and leases name their holder by pid and start time, so
whether that process still runs is decided here too, and what a child process gets to see.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastconv.errors import StoreError
from fastconv.recipe import canonical_json

#: Seconds that a connection waits for other processes before SQLite reports the file as locked.
BUSY_S = 60.0


# --- files -------------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none: temporary file, fsync, rename, fsync of the folder.

    Raises OSError; the temporary file is then removed.
    """
    temporary = path.parent / f".tmp-{os.getpid()}-{time.time_ns()}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that a power cut keeps them: each new one's parent is synced. Raises OSError."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_writable(folder: Path, option: str) -> None:
    """Try to write where a folder is or will be, and leave nothing; `option` names it for the user. Raises StoreError."""
    above = next((one for one in (folder, *folder.absolute().parents) if one.exists()), folder)
    trial = above / f".tmp-{os.getpid()}-{time.time_ns()}"
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise _storage_error(folder, error.errno, error.strerror or str(error), option) from None


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically and create its folder. Raises StoreError if that fails."""
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())


# --- errors ------------------------------------------------------------------------------------------------


#: What a faulty disk or a damaged ledger raises by itself.
STORAGE_FAULTS = (OSError, sqlite3.Error)


@contextlib.contextmanager
def storage_errors(root: Path) -> Iterator[None]:
    """A block in which OSError and sqlite3.DatabaseError become StoreError with a fix; `root` is named as the place."""
    try:
        yield
    except OSError as error:
        raise _storage_error(root, error.errno, str(error)) from error
    except (OverflowError, UnicodeEncodeError) as error:
        raise StoreError(
            f"a value cannot be stored: {error}",
            where=str(root),
            fix="mend what it came from, then the same command goes on",
        ) from error
    except sqlite3.OperationalError as error:
        errno_of = {"SQLITE_FULL": errno.ENOSPC, "SQLITE_READONLY": errno.EROFS, "SQLITE_CANTOPEN": errno.EACCES}
        name = getattr(error, "sqlite_errorname", "")
        code = next((number for prefix, number in errno_of.items() if name.startswith(prefix)), None)
        raise _storage_error(root, code, str(error)) from error
    except sqlite3.DatabaseError as error:
        raise damaged(str(error), str(root)) from error


def _storage_error(root: Path, code: int | None, text: str, option: str = "--workspace") -> StoreError:
    where = str(root)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            "no space left on the disk", where=where, fix="free some space, then the same command goes on"
        )
    if code == errno.EFBIG:
        fix = "raise `ulimit -f`, or take a disk that holds larger files; then the same command goes on"
        return StoreError("a file may not grow as large as this one", where=where, fix=fix)
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StoreError("the folder cannot be written", where=where, fix=f"make it writable or give another {option}")
    if code in (errno.ENOTDIR, errno.EEXIST):
        return StoreError("a file stands there, not a folder", where=where, fix=f"give another {option}")
    return StoreError(f"storage fault: {text}", where=where, fix="mend it, then the same command goes on")


def stored_json(text: str | bytes) -> Any:
    """A JSON value of the ledger. Raises StoreError if the text is none: the row is damaged."""
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise damaged("a row holds no JSON where it must") from None


def joined_json(first: str, over: Mapping[str, Any]) -> str:
    """A stored JSON object with `over` laid over it, as JSON. Raises StoreError if it is none, or holds no finite number."""
    try:
        return canonical_json({**stored_json(first), **over})
    except (TypeError, ValueError):
        raise damaged("a row holds no JSON object where it must") from None


def damaged(what: str, where: str = "ledger.sqlite") -> StoreError:
    """The error for a ledger that cannot be trusted."""
    fix = "`fastconv doctor -w WORKSPACE` says more; restore it from a backup or start another --workspace"
    return StoreError(f"the ledger is damaged: {what}", where=where, fix=fix)


# --- SQLite ------------------------------------------------------------------------------------------------


#: Commits wait for the disk, so that a power cut loses none. Tests turn it off: a killed process loses nothing either way.
SYNCHRONOUS = "FULL"


def connect(path: Path, schema: str, version: int) -> sqlite3.Connection:
    """A connection to the SQLite file at `path`, in write-ahead mode; a new file gets `schema` and `version`.

    Several processes may do this on one new file at once. Raises sqlite3.OperationalError after BUSY_S, StoreError if the
    file would run what somebody wrote into it.
    """
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    db.row_factory = sqlite3.Row
    deadline_s = time.monotonic() + BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            # SQLite refuses this switch at once while another process has the file open; its timeout does not apply.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)
    db.execute(f"PRAGMA synchronous={SYNCHRONOUS}")
    if db.execute("PRAGMA user_version").fetchone()[0] == 0:
        db.executescript(f"BEGIN IMMEDIATE; {schema} PRAGMA user_version={version}; COMMIT;")
    # A view may have rows without end, and a trigger may delete: a workspace comes from anybody, and SQLite runs both.
    runs = "type IN ('view', 'trigger') OR sql LIKE 'CREATE VIRTUAL%'"
    if found := db.execute(f"SELECT type, name FROM sqlite_master WHERE {runs}").fetchone():
        raise damaged(f"it has a {found['type']} {found['name']!r} that no fastconv wrote", str(path.parent))
    return db


def columns_of(schema: str) -> dict[str, list[str]]:
    """The columns of every table of a schema."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(schema)
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        return {table: [row[1] for row in db.execute(f"PRAGMA table_info({table})")] for table in tables}


# --- processes ---------------------------------------------------------------------------------------------


#: Environment variables that a child process gets, by name or by the beginning of it: where things are and how a GPU, its
#: libraries and Python behave.
_PASSED_ON = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TMP", "TEMP", "TERM", "VIRTUAL_ENV", "CC", "CXX", "LC_", "LD_",
    "SSL_CERT_", "CUDA", "NVIDIA_", "NCCL_", "HIP_", "ROCR_", "TORCH", "PYTORCH_", "TRITON_", "VLLM_", "FLASHINFER_", "HF_",
    "TRANSFORMERS_", "TOKENIZERS_", "OMP_", "MKL_", "OPENBLAS_", "NUMBA_", "XDG_", "PYTHON", "CONDA_", "UNSLOTH_", "FASTCONV_",
)  # fmt: skip
#: Parts of a name that say that its value is a secret.
_SECRET = frozenset({"KEY", "TOKEN", "SECRET", "PASSWORD", "PASSPHRASE", "CREDENTIALS", "AUTH"})


def child_environment(environ: Mapping[str, str] = os.environ, **added: str) -> dict[str, str]:
    """The environment for a child process: what it needs to run, and no key, token or password. `added` stands over it."""
    passed = {
        name: value
        for name, value in environ.items()
        if name.startswith(_PASSED_ON) and not _SECRET & set(name.upper().split("_"))
    }
    return passed | added


def process_start(pid: int) -> str:
    """Start time of a process on this host in clock ticks since boot; `dead` for a zombie, `?` if it cannot be read.

    Ticks since boot, because a wall clock can be set back.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return "?"
    # A killed process that its parent has not reaped (usual in containers) keeps its pid, but holds nothing.
    return "dead" if fields[0] == "Z" else fields[19]


def process_is_alive(pid: int, start: str) -> bool:
    """Whether the process with this pid and this `process_start` still runs on this host (pids are reused)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process_start(pid) == start
