"""Every named mutant has its line and its tests, and the runner says how each ends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import ROOT
from tests.mutants import MUTANTS, Mutant
from tests.mutants.__main__ import run_all


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{Path(m.file).name}-{m.words}")
def test_a_mutant_finds_its_line_once_and_its_tests(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    tests = (ROOT / mutant.tests).read_text()
    assert all(word in tests for word in re.findall(r"\w+", mutant.words) if word not in ("and", "or", "not"))


@pytest.mark.slow
def test_the_runner_says_how_each_mutant_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "sums.py").write_text("def add(a, b):\n    return a + b\n")
    (tree / "test_sums.py").write_text(
        "import pytest\nfrom sums import add\n\n"
        "def test_two(): assert add(2, 2) == 4\n\ndef test_none(): assert add(0, 0) == 0\n\n"
        "def test_wrong(): assert add(1, 1) == 3\n\n@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    one = Mutant("sums.py", "a + b", "a - b", "test_sums.py", "two")
    words = ("none", "wrong", "skipped", "nothing_at_all")
    mutants = [one, *(Mutant(one.file, one.old, one.new, one.tests, word) for word in words)]
    fates = run_all([*mutants, Mutant("sums.py", "c + d", "c", "test_sums.py", "two")], tree, 2)
    assert fates == {"died": 1, "SURVIVED": 1, "cannot be run": 4}
    lines = capsys.readouterr().out
    for said in (
        "SURVIVED: its tests pass",
        "do not pass on the whole",
        "skipped here",
        "no test of that",
        "there 0 times",
    ):
        assert said in lines
    assert (tree / "sums.py").read_text().count("a + b") == 1
