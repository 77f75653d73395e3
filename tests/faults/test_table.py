"""docs/FAULTS.md names every fault of the table with a test that is there, tried, and without a loss."""

from __future__ import annotations

import re

from tests import ROOT
from tests.faults.table import FAULTS, HEAD, PAGE


def test_the_page_is_that_of_the_table() -> None:
    text = PAGE.read_text()
    assert text.startswith(HEAD)
    rows = re.findall(r"^\| (.+) \| (.+) \| `(\w+)::(\w+)` \| ([\d,]+) \| (\d+) \|$", text, re.MULTILINE)
    assert [(row[0], row[1], row[3]) for row in rows] == [(one.fault, one.promise, one.test) for one in FAULTS]
    assert all(int(row[4].replace(",", "")) > 0 and row[5] == "0" for row in rows)


def test_every_test_of_the_table_is_there() -> None:
    for one in FAULTS:
        assert f"def {one.test}(" in (ROOT / "tests" / one.file).read_text(), one
