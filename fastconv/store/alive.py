"""Whether a process that holds something still lives, told apart from another that was given its pid since."""

from __future__ import annotations

import os
from pathlib import Path


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
