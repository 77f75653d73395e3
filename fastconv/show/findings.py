"""What `compare` prints."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastconv.stats.units import change, level, span
from fastconv.report.compare import Comparison, Paired
from fastconv.show import console_of_output

#: Columns with their widths; these hold any figure on one line, and together they fit 80 columns.
COLUMNS = {"probe": 9, "first": 11, "second": 11, "difference": 27, "p corrected": 9, "asked": 5}


def comparison(found: Comparison) -> None:
    """Two runs side by side: what differs in their recipes and conditions, then each measure of each cell."""
    console = console_of_output()
    console.print(f"{found.first} and {found.second}")
    _differences(console, "recipe", found.changes)
    _differences(console, "made under", found.conditions)
    if found.apart:
        console.print(f"matched without {', '.join(found.apart)}, on which each run has one value of its own")
    for n, ((cell, measure), pairs) in enumerate(groupby(found.pairs, key=lambda one: (one.cell, one.measure))):
        # Cell and measure stand above their rows: beside them they would leave the figures no room.
        console.print(escape(f"{cell}: {measure}"), style="bold")
        console.print(_table(list(pairs), header=not n))
    console.print(f"{len(found.pairs)} pairs; {found.n_unmatched} cells stand in one run only")


def _differences(console: Console, what: str, differences: Sequence[str]) -> None:
    console.print(f"{what}: {'' if differences else 'no difference'}".rstrip())
    for text in differences:
        console.print(f"  {escape(text)}", style="dim")


def _table(pairs: Sequence[Paired], *, header: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=header)
    for name, width in COLUMNS.items():
        table.add_column(name, justify="left" if name == "probe" else "right", overflow="fold", width=width)
    for one in pairs:
        table.add_row(*_row(one))
    return table


def _row(one: Paired) -> tuple[str, ...]:
    if one.same_rows:
        difference = "the same rows"
    elif one.difference is None:
        difference = "cannot be given"
    else:
        difference = f"{change(one.difference, one.unit)} {span(one.low, one.high, one.unit)}".rstrip()
    p = "" if one.p_corrected is None else f"{one.p_corrected:.3g}"
    levels = (level(one.first, one.unit), level(one.second, one.unit))
    return (one.role, *levels, escape(difference), p, str(one.n_questions))
