"""Break named lines of fastconv, one at a time, and run the tests that must see it: `python -m tests.mutants [--jobs N] [WORD ...]`.

Each job has a small copy of the tree, and breaks that: the working tree is never touched. A mutant is dead if its tests
pass on the whole copy and fail on the broken one; it has survived if they pass on both. Exit code 1 if one survives, 2 if
none does but some could not be run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

from tests import ROOT
from tests.mutants import MUTANTS, Mutant

# What tests read; without the repository, environments, and what was computed.
NOT_COPIED = (".git", ".venv*", "checkpoints", "reports", "__pycache__", ".*_cache", ".hypothesis", "build", "dist")
WHOLE_S = 600
Fate = Literal["died", "SURVIVED", "cannot be run"]


def tested(copy: Path, tests: str, words: str, limit_s: float) -> tuple[int | None, str]:
    """Run tests of this copy: pytest's exit code (None after `limit_s` seconds) and its last words, "" if none ran."""
    options = ["-x", "-p", "no:cacheprovider", "-m", "not gpu", f"--basetemp={copy.parent / 'tmp'}"]
    environ = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, tests, "-k", words],
        cwd=copy,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = run.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)  # what its tests started has to go too
        run.communicate()
        return None, f"no end after {limit_s:.0f} s"
    return run.returncode, said.strip().rpartition("\n")[2]


def why_not(copy: Path, tests: str, words: str) -> tuple[str, float]:
    """Run tests of a whole copy: why no mutant can be held against them, or ""; and the seconds that they took."""
    began = time.monotonic()
    code, last = tested(copy, tests, words, WHOLE_S)
    took_s = time.monotonic() - began
    if code == 5:
        return "no test of that name", took_s
    if code != 0:
        return f"its tests do not pass on the whole tree ({last[-200:]})", took_s
    return ("" if re.search(r"\d+ passed", last) else f"its tests are skipped here ({last})"), took_s


def fate(mutant: Mutant, copy: Path, whole_s: float) -> tuple[Fate, str]:
    """Break the copy, run the tests, mend it. `whole_s`: what the tests took before."""
    path = copy / mutant.file
    whole = path.read_text()
    if whole.count(mutant.old) != 1:
        return "cannot be run", f"its line is there {whole.count(mutant.old)} times"
    path.write_text(whole.replace(mutant.old, mutant.new))
    try:
        code, last = tested(copy, mutant.tests, mutant.words, 60 + 5 * whole_s)
    finally:
        path.write_text(whole)
    if code == 0:
        return "SURVIVED", "its tests pass"
    if code is not None and code < 0:
        return "cannot be run", f"its tests were ended by signal {-code}"
    return "died", last if code is None else ""  # a test that never ends has seen it


def name_of(mutant: Mutant) -> str:
    """File, line and what it becomes, on one short line."""
    old, new = (" ".join(text.split())[:50] for text in (mutant.old, mutant.new))
    return f"{mutant.file}: {old} -> {new or 'nothing'}"


class Copies:
    """Copies of the tree in `folder`, one a job; made when first asked for, given back mended."""

    def __init__(self, tree: Path, folder: Path, n_jobs: int) -> None:
        self._tree = tree
        self._free: SimpleQueue[Path] = SimpleQueue()
        for index in range(n_jobs):
            self._free.put(folder / str(index) / "copy")

    def take(self) -> Path:
        """A copy that nobody else has."""
        copy = self._free.get()
        if not copy.exists():
            shutil.copytree(self._tree, copy, ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True)
        return copy

    def give_back(self, copy: Path) -> None:
        """To the next who asks."""
        self._free.put(copy)


def run_all(mutants: list[Mutant], tree: Path, n_jobs: int) -> Counter[Fate]:
    """Each mutant's line as it ends; how many ended how."""
    fates: Counter[Fate] = Counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ThreadPoolExecutor(n_jobs) as pool:
        copies = Copies(tree, Path(folder), n_jobs)

        def whole(tests: tuple[str, str]) -> tuple[str, float]:
            copy = copies.take()
            try:
                return why_not(copy, *tests)
            finally:
                copies.give_back(copy)

        def broken(mutant: Mutant) -> None:
            began = time.monotonic()
            why, whole_s = before[mutant.tests, mutant.words].result()
            end: Fate = "cannot be run"
            if not why:
                copy = copies.take()
                began = time.monotonic()
                try:
                    end, why = fate(mutant, copy, whole_s)
                finally:
                    copies.give_back(copy)
            fates[end] += 1
            reason = f": {why}" if why else ""
            print(f"{end}{reason}  {time.monotonic() - began:.1f} s  {name_of(mutant)}", flush=True)

        # Those that a mutant waits for are all queued before it, so that a waiting job never holds up what it waits for.
        before = {tests: pool.submit(whole, tests) for tests in dict.fromkeys((m.tests, m.words) for m in mutants)}
        for waiting in [pool.submit(broken, mutant) for mutant in mutants]:
            waiting.result()
    return fates


def main(arguments: list[str] | None = None) -> int:
    """Run the mutants whose file, line or tests hold one of the words, all without any; 1 if one survives, 2 if one
    cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="only mutants whose file, line or tests hold it")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time, each in its own copy")
    given = parser.parse_args(arguments)
    chosen = [
        m for m in MUTANTS if not given.words or any(word in m.file + m.old + m.tests + m.words for word in given.words)
    ]
    fates = run_all(chosen, ROOT, max(1, given.jobs))
    print(
        f"{len(chosen)} mutants: {fates['died']} died, {fates['SURVIVED']} survived, {fates['cannot be run']} cannot be run"
    )
    return 1 if fates["SURVIVED"] else 2 if fates["cannot be run"] else 0


if __name__ == "__main__":
    sys.exit(main())
