"""Child processes in groups of their own that die with their parent, with the time of every line; and looks at nvidia-smi."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import IO

from tests.card.sheet import card_id

#: Runs its arguments so that they die with the process that started them, whatever ends it, and hear SIGINT, which a shell
#: lets its background jobs ignore.
_DIES_WITH_PARENT = (
    "import ctypes,os,signal,sys; signal.signal(signal.SIGINT, signal.SIG_DFL); ctypes.CDLL(None).prctl(1, 9); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)
_POLL_S, _INTERRUPT_S = 0.02, 25.0
#: What is asked of nvidia-smi, and the columns of the CSV.
ASKED = ("utilization.gpu", "utilization.memory", "power.draw", "memory.used", "clocks.sm", "temperature.gpu")
COLUMNS = ("at", "utilisation", "memory_utilisation", "power_w", "memory_mib", "clock_mhz", "temperature_c")


@dataclass(frozen=True)
class Ran:
    """A child that has ended: exit code, times (s; `began` since the epoch, `quiet_s` since its last line), why it was killed, its
    last lines."""

    code: int
    began: float
    seconds: float
    killed: str
    tail: tuple[str, ...]
    quiet_s: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether it ended well."""
        return self.code == 0

    @property
    def last(self) -> str:
        """Its last line that says something."""
        return next((line for line in reversed(self.tail) if line.strip()), "it said nothing")


def run_child(
    command: Sequence[str], log: Path, *, deadline: float, out: Path | None = None,
    each: Callable[[int], str] = lambda pid: "",
) -> Ran:  # fmt: skip
    """Run a command; its lines go to `log`, each with the seconds since it began, its standard output to `out` if named.

    `each(pid)` is called every few hundredths of a second; if it returns a reason, the whole process group is killed with
    SIGKILL. At the deadline the group gets SIGINT, which a run answers with a checkpoint, and SIGKILL if that takes long.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    began, clock, killed = time.time(), time.monotonic(), ""
    tail: list[tuple[float, str]] = []
    with log.open("a", encoding="utf-8") as file, contextlib.ExitStack() as files:
        file.write(f"\n$ {' '.join(command)}\n")
        stdout = subprocess.PIPE if out is None else files.enter_context(out.open("w", encoding="utf-8"))
        process = subprocess.Popen(
            [sys.executable, "-c", _DIES_WITH_PARENT, *command], stdin=subprocess.DEVNULL, stdout=stdout,
            stderr=subprocess.STDOUT if out is None else subprocess.PIPE, env=environment, start_new_session=True,
            text=True, errors="replace",
        )  # fmt: skip
        pipe = process.stdout if out is None else process.stderr
        assert pipe is not None
        reader = threading.Thread(target=_stamp, args=(pipe, file, clock, tail), daemon=True)
        reader.start()
        try:
            while process.poll() is None:
                if reason := each(process.pid):
                    killed = reason
                    _signal(process, signal.SIGKILL)
                    break
                if time.time() > deadline:
                    killed = "out of time"
                    _end(process)
                    break
                time.sleep(_POLL_S)
            process.wait()
        finally:
            _signal(process, signal.SIGKILL)  # what it left behind in its group
            process.wait()
        ended = time.monotonic()
        reader.join(5.0)
    spoke, lines = (tail[-1][0] if tail else 0.0), tuple(line for _, line in tail[-40:])
    return Ran(process.returncode, began, ended - clock, killed, lines, ended - clock - spoke)


def _stamp(pipe: IO[str], file: IO[str], clock: float, tail: list[tuple[float, str]]) -> None:
    with contextlib.suppress(ValueError):  # the log is closed: a grandchild outlived the wait
        for line in pipe:
            at = time.monotonic() - clock
            file.write(f"{at:9.3f} {line}")
            file.flush()
            tail.append((at, line.rstrip()))


def _signal(process: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_INTERRUPT_S)
        return
    _signal(process, signal.SIGKILL)


@dataclass(frozen=True)
class Look:
    """One look at the card; None where nvidia-smi does not tell. `at` in seconds since the epoch."""

    at: float
    utilisation: float | None
    power_w: float | None
    memory_mib: float | None
    clock_mhz: float | None


class Watch:
    """Asks nvidia-smi every second in the block, and writes what it says to a CSV file. `missing` is why it cannot."""

    def __init__(self, path: Path, every_s: float = 1.0) -> None:
        self.path = path
        self.missing = "" if shutil.which("nvidia-smi") else "nvidia-smi is not here"
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        if not self.missing:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(15.0)

    def _look(self) -> None:
        asked = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits", "-i", card_id()]
        is_new = not self.path.exists()
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(COLUMNS)
            while not self._stop.is_set():
                began = time.monotonic()
                try:
                    told = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout
                except (OSError, subprocess.SubprocessError) as error:
                    self.missing = f"nvidia-smi failed: {type(error).__name__}"
                else:
                    for line in told.splitlines()[:1]:
                        writer.writerow([f"{time.time():.3f}", *(part.strip() for part in line.split(","))])
                    file.flush()
                self._stop.wait(max(0.0, self._every_s - (time.monotonic() - began)))


def read_looks(path: Path) -> tuple[Look, ...]:
    """The looks of a CSV file; none if there is no file. A line that was cut short is left out."""
    if not path.is_file():
        return ()

    def number(text: str | None) -> float | None:
        try:
            return float(text or "")
        except ValueError:
            return None

    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if number(row.get("at")) is not None and row.get("temperature_c")]
    return tuple(
        Look(
            float(row["at"]), *(number(row.get(name)) for name in ("utilisation", "power_w", "memory_mib", "clock_mhz"))
        )
        for row in rows
    )


def summary(looks: Sequence[Look]) -> dict[str, float | int]:
    """Means over looks: utilisation (percent), share of looks in which the card was at work, power, and the most memory."""
    at_work = [look.utilisation for look in looks if look.utilisation is not None]
    if not at_work:
        return {"looks": len(looks)}
    power, memory, clock = (
        [value for look in looks if (value := getattr(look, name)) is not None]
        for name in ("power_w", "memory_mib", "clock_mhz")
    )
    return {
        "looks": len(looks), "utilisation_percent": round(fmean(at_work), 1),
        "share_at_work": round(sum(value > 0 for value in at_work) / len(at_work), 4),
        **({"power_w": round(fmean(power), 1)} if power else {}),
        **({"most_memory_mib": max(memory)} if memory else {}),
        **({"clock_mhz": round(fmean(clock))} if clock else {}),
    }  # fmt: skip
