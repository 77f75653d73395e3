"""What `compare` prints."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from fastconv.findings.units import change, level, span
from fastconv.reporting.comparing import Comparison, Paired
from fastconv.show import console_of_output


def comparison(found: Comparison) -> None:
    """Two runs side by side."""
    console = console_of_output()
    console.print(f"{found.first} and {found.second}")
    for text in found.changes:
        console.print(f"  {escape(text)}", style="dim")
    if found.apart:
        console.print(f"matched without {', '.join(found.apart)}, on which each run has one value of its own")
    table = Table(box=None, pad_edge=False)
    for name in ("cell", "measure", "probe", "first", "second", "difference", "p corrected", "questions"):
        table.add_column(name, justify="left" if name in ("cell", "measure", "probe") else "right", overflow="fold")
    for one in found.pairs:
        table.add_row(*_row(one))
    console.print(table)
    console.print(f"{len(found.pairs)} pairs; {found.n_unmatched} cells stand in one run only")


def _row(one: Paired) -> tuple[str, ...]:
    if one.same_rows:
        difference = "the same rows"
    elif one.difference is None:
        difference = "cannot be given"
    else:
        difference = f"{change(one.difference, one.unit)} {span(one.low, one.high, one.unit)}".rstrip()
    p = "" if one.p_corrected is None else f"{one.p_corrected:.3g}"
    levels = (level(one.first, one.unit), level(one.second, one.unit))
    return (escape(one.cell), one.measure, one.role, *levels, escape(difference), p, str(one.n_questions))
