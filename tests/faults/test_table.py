"""docs/FAULTS.md names every fault of the table with a test that is there, tried, and without a loss."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests import ROOT
from tests.faults import table
from tests.faults.table import FAULTS, HEAD, PAGE, Fault, rows_of

#: Tests in tests/faults of the suite itself, which break nothing.
OF_THE_SUITE = {"test_table", "test_mutants"}


@cache
def functions(file: str) -> dict[str, list[str]]:
    """The tests of a file by name, with their decorators as text."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {
        one.name: [ast.unparse(decorator) for decorator in one.decorator_list]
        for one in tree.body
        if isinstance(one, ast.FunctionDef) and one.name.startswith("test_")
    }


def test_the_page_is_that_of_the_table() -> None:
    text = PAGE.read_text()
    assert text.startswith(HEAD)
    lines = [f"| {one.fault} | {one.promise} | `{one.name}` | " for one in FAULTS]
    assert [line.startswith(begin) for line, begin in zip(text[len(HEAD) :].splitlines(), lines, strict=True)] == [
        True
    ] * len(lines)
    rows = rows_of(text)
    for one in FAULTS:
        untried = (f"`make test-{one.tier}`", "-") if one.tier else None
        tried, losses = rows[one.name]
        assert (tried, losses) == untried or (int(tried.replace(",", "")) > 0 and losses == "0"), one


@pytest.mark.parametrize("one", FAULTS, ids=lambda one: one.name)
def test_a_row_has_its_test_in_its_tier_with_its_examples(one: Fault) -> None:
    decorators = functions(one.file)[one.test]
    examples = re.search(r"\b(?:many\(|max_examples=)(\d+)", " ".join(decorators))
    assert not examples or one.n_examples == int(examples[1])
    assert one.tier or not {"pytest.mark.slow", "pytest.mark.long"} & {*decorators}


def test_every_test_of_this_folder_that_breaks_something_has_a_row() -> None:
    rows = {(one.file, one.test) for one in FAULTS}
    files = [path for path in (ROOT / "tests" / "faults").glob("test_*.py") if path.stem not in OF_THE_SUITE]
    missing = [
        (path.name, test)
        for path in files
        for test in functions(f"faults/{path.name}")
        if (f"faults/{path.name}", test) not in rows
    ]
    assert missing == []


def test_a_row_without_its_test_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Fault("x", "y", "faults/test_memory.py", "test_that_is_not_there")
    with pytest.raises(KeyError):
        test_a_row_has_its_test_in_its_tier_with_its_examples(gone)
    monkeypatch.setattr(table, "FAULTS", (gone,))
    with pytest.raises(KeyError):
        rows_of(PAGE.read_text())[gone.name]
