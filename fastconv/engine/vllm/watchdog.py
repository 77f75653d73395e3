"""A watchdog for one server process: starts it, and ends it and all its children when the parent is gone.

Run by path in isolated mode (`python -I watchdog.py PARENT FOLDER COMMAND...`), so that it needs only the standard
library and starts in milliseconds. The kernel signals the parent's death (PR_SET_PDEATHSIG, even after a kill -9);
checking the parent's id covers a death before that was set. Orphans of the server become its children
(PR_SET_CHILD_SUBREAPER), so that engine processes in process groups of their own end too. FOLDER is removed at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time

#: From <linux/prctl.h>.
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
#: Interval of checking the parent, and time that the server gets to end by itself.
_CHECK_S, _GRACE_S = 0.1, 10.0


def supervise(parent: int, folder: str, command: list[str]) -> int:
    """Run `command` until it ends, SIGTERM comes, or `parent` is gone; its exit code (128 + signal when killed)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    # A Ctrl-C goes to the whole terminal; the run decides when its server ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = 127
    try:
        # If the watchdog itself is killed, the server is signalled in the same way (safe: there is only one thread
        # here).
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
        )
        while server.poll() is None and not signals and os.getppid() == parent:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(_CHECK_S)
        code = _end(server)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return code


def _end(server: subprocess.Popen[bytes]) -> int:
    """End the server's process group, first with SIGTERM, then all processes that are still our children; its exit
    code."""
    _kill_group(server.pid, signal.SIGTERM)
    try:
        code = server.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        _kill_group(server.pid, signal.SIGKILL)
        code = server.wait()
    _kill_group(server.pid, signal.SIGKILL)
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline:
        for child in children_of(os.getpid()):
            os.kill(child, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(_CHECK_S / 10)  # waiting for any child, adopted ones included: subprocess waits for its own
        except ChildProcessError:
            break
    return code if code >= 0 else 128 - code


def _kill_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def children_of(parent: int) -> list[int]:
    """Ids of the processes whose parent this is, adopted ones included; none where there is no /proc.

    By each process's parent: a list of children (/proc/PID/task/TID/children) is an option of the kernel.
    """
    found = []
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        # A process may have ended meanwhile; its name, in brackets, is any bytes.
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            if file.read().rpartition(b")")[2].split()[1:2] == [b"%d" % parent]:
                found.append(int(name))
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
