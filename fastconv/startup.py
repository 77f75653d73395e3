"""The start of a computation: seconds of its parts, and what makes it shorter. No torch."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

#: Bytes that `reading_ahead` asks for at once; between two it looks whether the block has ended.
_AT_ONCE = 2**24


@dataclass
class StartTimes:
    """Seconds of the parts of a start. A run that goes on overwrites all of them, so each is told even where it is none."""

    import_s: float = 0.0
    load_s: float = 0.0
    proof_s: float = 0.0
    compile_s: float = 0.0
    self_tests_s: float = 0.0

    @contextlib.contextmanager
    def part(self, name: Literal["import_s", "load_s", "proof_s", "compile_s", "self_tests_s"]) -> Iterator[None]:
        """Add the seconds of the block to a part, also where it raises."""
        began = time.monotonic()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.monotonic() - began)

    def facts(self) -> dict[str, float]:
        """The seconds by name, as a run records them."""
        return {name: round(seconds, 3) for name, seconds in asdict(self).items()}


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Within the block Python looks for no cycles: imports of thousands of modules make objects that stay, and walking
    them again and again is a fifth of the time of importing Unsloth."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def reading_ahead(files: Sequence[Path]) -> Iterator[None]:
    """Within the block a thread reads these files, so that they are in the page cache for who loads them after it.

    It ends with the block, however far it came. A file that cannot be read is left to who loads it.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_read, args=(files, ended), name="reading ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _read(files: Sequence[Path], ended: threading.Event) -> None:
    room = bytearray(_AT_ONCE)
    for path in files:
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
            while not ended.is_set() and file.readinto(room):
                pass
