"""Blocks of a report: sections of claims, tables, figures, replies and notes. Rendered by `report.render`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fastconv.stats.series import NoRowsError, Number

#: A table with more rows is folded away or split in two.
OPEN_ROWS = 24


def folded_if_long(rows: Sequence[object], what: str) -> str:
    """The title under which a long table is folded away, with its count of `what`; empty for a short one."""
    return f"{len(rows)} {what}" if len(rows) > OPEN_ROWS else ""


@dataclass(frozen=True)
class Claim:
    """One sentence and the query that produced its numbers. Made by `claims.ask`, and by `report.published` for tables.

    `rows` are the ids behind it. Raises NoRowsError for a sentence with a digit and without rows.
    """

    kind: ClassVar[str] = "claim"
    query: str
    arguments: Mapping[str, str]
    text: str
    rows: tuple[str, ...]
    word: str = ""

    def __post_init__(self) -> None:
        if not self.rows and any(mark.isdigit() for mark in self.text):
            raise NoRowsError(f"{self.text!r} has no rows behind it")

    @property
    def id(self) -> str:
        """The claim's name: its query and arguments."""
        return ":".join([self.query, *self.arguments.values()])

    @property
    def rows_sha256(self) -> str:
        """sha256 (hex) of the row ids in order."""
        return hashlib.sha256("\n".join(self.rows).encode()).hexdigest()


@dataclass(frozen=True)
class TableCell:
    """A table cell. `word` selects its color (a verdict); `rows` are the ids behind a number in it."""

    text: str
    rows: tuple[str, ...] = ()
    word: str = ""
    code: bool = False
    #: List the row ids, folded away, instead of counting them in the tooltip.
    list_rows: bool = False
    claim: Claim | None = None

    @staticmethod
    def of(number: Number | None, absent: str = "not measured") -> TableCell:
        """A cell with a measured number, or with `absent`."""
        return TableCell(absent, word="absent") if number is None else TableCell(number.text(), number.rows)

    @staticmethod
    def saying(claim: Claim) -> TableCell:
        """A cell with a claim."""
        return TableCell(claim.text, claim=claim)


@dataclass(frozen=True)
class Table:
    """A table; `numeric` are the indices of its number columns. A long one is folded away under the title `folded`."""

    kind: ClassVar[str] = "table"
    id: str
    columns: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    numeric: frozenset[int] = frozenset()
    caption: str = ""
    folded: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure as SVG (embedded) and PNG (beside the report). `alt` describes it in words; `width` is in CSS pixels."""

    kind: ClassVar[str] = "figure"
    id: str
    title: str
    alt: str
    svg: bytes
    png: bytes
    width: int
    #: Not scaled down on a narrow screen; it scrolls there instead.
    keep_width: bool = False


@dataclass(frozen=True)
class Figures:
    """Small multiples: figures of one size, side by side where there is space."""

    kind: ClassVar[str] = "figures"
    id: str
    title: str
    panels: tuple[Figure, ...]
    note: str = ""


@dataclass(frozen=True)
class Answer:
    """A sampled reply, unedited."""

    kind: ClassVar[str] = "answer"
    who: str
    where: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Note:
    """A sentence without a measured number; with a `word` it is shown in a box."""

    kind: ClassVar[str] = "note"
    text: str
    word: str = ""


Block = Claim | Table | Figure | Figures | Answer | Note


@dataclass(frozen=True)
class Section:
    """A titled part of the report."""

    id: str
    title: str
    blocks: tuple[Block, ...]
    intro: str = ""


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows. `banners` precede all sections."""

    run: str
    about: str
    sections: tuple[Section, ...]
    banners: tuple[Note, ...] = ()

    def claims(self) -> list[Claim]:
        """All claims in order, including those in tables."""
        collected: list[Claim] = []
        for block in (block for section in self.sections for block in section.blocks):
            if isinstance(block, Claim):
                collected.append(block)
            elif isinstance(block, Table):
                collected += [cell.claim for row in block.rows for cell in row if cell.claim is not None]
        return collected

    def figures(self) -> list[Figure]:
        """All figures in order."""
        collected: list[Figure] = []
        for section in self.sections:
            for block in section.blocks:
                collected += (
                    [block] if isinstance(block, Figure) else block.panels if isinstance(block, Figures) else []
                )
        return collected


def plain_row(values: Sequence[object]) -> tuple[TableCell, ...]:
    """A table row from values; a `TableCell` is kept, anything else becomes its text."""
    return tuple(value if isinstance(value, TableCell) else TableCell(str(value)) for value in values)
