"""What a measurement is, and the instruments: clock, peak memory, matmul ceiling."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Measured:
    """One way of doing it. `per_s` counts `Comparison.unit` per second.

    `peak_bytes` is the memory above what was resident before (None where the system does not tell), `written_bytes`
    what went to disk, `ceiling_share` the floating-point work over what a large matrix product reaches here.
    """

    name: str
    seconds: float
    per_s: float
    peak_bytes: int | None = None
    written_bytes: int = 0
    ceiling_share: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Ours against one or more usual ways, measured in one call on the same work.

    `ratio` is the first usual way's seconds over ours, `ratios` has one for each by name.
    """

    kind: str
    model: str
    device: str
    dtype: str
    threads: int
    work: str
    unit: str
    ours: Measured
    usual: tuple[Measured, ...]
    ratio: float
    ratios: Mapping[str, float]
    extra: Mapping[str, Any] = field(default_factory=dict)


class Clock:
    """Seconds of work on a device, added up over blocks; waits for the device at both ends of each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.blocks: list[float] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the block."""
        _wait(self.device)
        began = time.perf_counter()
        yield
        _wait(self.device)
        self.blocks.append(time.perf_counter() - began)

    @property
    def seconds(self) -> float:
        """All blocks together."""
        return sum(self.blocks)


def paired_ratio(usual: Sequence[float], ours: Sequence[float]) -> float:
    """Median over blocks of usual / ours. Both did the same work right after one another, so other programs on the
    machine disturb both alike, and a disturbed block does not decide."""
    return statistics.median(theirs / mine for theirs, mine in zip(usual, ours, strict=True))


class Peak:
    """Peak memory above what is resident at the start, for a block: GPU memory there, resident set size on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure the block; `bytes` stays None where the system cannot tell."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - before
            return
        before = _reset_peak_rss()
        yield
        after = _status_bytes("VmHWM")
        if before is not None and after is not None:
            self.bytes = max(0, after - before)


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of five."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        clock = Clock(device)
        with clock.running():
            torch.mm(a, b)
        best = max(best, 2 * n**3 / clock.seconds)
    return best


def measured(name: str, seconds: float, count: float, flops: float = 0.0, ceiling: float = 0.0,
             peak_bytes: int | None = None, written_bytes: int = 0) -> Measured:  # fmt: skip
    """A Measured from its raw figures; `flops` is the useful work of all `count` units."""
    share = flops / seconds / ceiling if flops and ceiling else None
    return Measured(name, seconds, count / seconds, peak_bytes, written_bytes, share)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset_peak_rss() -> int | None:
    """Set Linux's peak of the resident set back to what is resident now; returns that (bytes).

    What the C library holds on to is given back first, else an earlier step's memory would hide this one's.
    """
    with contextlib.suppress(OSError, AttributeError):  # musl and macOS have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
