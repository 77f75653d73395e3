"""The parts of a start are told, and what makes it shorter changes nothing else."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest

from fastconv.startup import StartTimes, reading_ahead, uncollected


def test_parts_add_up_and_all_are_told_even_where_one_raised() -> None:
    times = StartTimes(load_s=1.23456)
    for _ in range(2):
        with times.part("import_s"):
            time.sleep(0.02)
    with pytest.raises(KeyError), times.part("load_s"):
        raise KeyError
    told = times.facts()
    assert list(told) == ["import_s", "load_s", "proof_s", "compile_s", "self_tests_s"]
    assert 0.04 <= told["import_s"] < 1
    assert told["load_s"] == 1.235
    assert times.load_s > 0
    assert told["proof_s"] == 0.0


def test_cycles_are_looked_for_again_after_the_block_unless_they_were_not_before() -> None:
    inside = []
    with pytest.raises(KeyError), uncollected():
        raise KeyError(inside.append(gc.isenabled()))
    assert (inside, gc.isenabled()) == ([False], True)
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def _read_bytes() -> int:
    """Bytes that this process has asked of files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_files_are_read_while_the_block_goes_on(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(3 * 2**20))
    (tmp_path / "b").write_bytes(bytes(5 * 2**20))
    before = _read_bytes()
    with reading_ahead([tmp_path / "a", tmp_path / "missing", tmp_path / "b"]):
        until = time.monotonic() + 20
        while _read_bytes() - before < 8 * 2**20 and time.monotonic() < until:
            time.sleep(0.01)
    assert _read_bytes() - before >= 8 * 2**20


def test_reading_ahead_ends_with_its_block(tmp_path: Path) -> None:
    with (tmp_path / "endless").open("wb") as file:
        file.truncate(2**40)  # zeros without room on the disk: hours to read
    began = time.monotonic()
    with reading_ahead([tmp_path / "endless"] * 3):
        time.sleep(0.05)
    assert time.monotonic() - began < 5
