"""What a report is made of: sections of claims, tables, figures and answers. Plain data; `report` renders them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fastconv.stats.series import NoRowsError, Number

#: A longer table is folded away, or told in two.
OPEN_ROWS = 24


def folded_if_long(rows: Sequence[object], what: str) -> str:
    """What a table is folded under: nothing for a short one, else how many of `what` it holds."""
    return f"{len(rows)} {what}" if len(rows) > OPEN_ROWS else ""


@dataclass(frozen=True)
class Claim:
    """One sentence and the query that produced its numbers. Made by `claims.ask`, and by `published_page` for tables.

    `rows` are the ids behind it. A claim with a digit in its sentence cannot be made without rows.
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
        """Name of the claim: its query and what it was asked of."""
        return ":".join([self.query, *self.arguments.values()])

    @property
    def rows_sha256(self) -> str:
        """sha256 (hex) of the row ids in order."""
        return hashlib.sha256("\n".join(self.rows).encode()).hexdigest()


@dataclass(frozen=True)
class TableCell:
    """A table cell. `word` colours it (a verdict); `rows` are what stands behind a number in it."""

    text: str
    rows: tuple[str, ...] = ()
    word: str = ""
    code: bool = False
    #: The row ids are listed, folded away, rather than counted in the title.
    list_rows: bool = False
    claim: Claim | None = None

    @staticmethod
    def of(number: Number | None, absent: str = "not measured") -> TableCell:
        """A measured number, or that there is none."""
        return TableCell(absent, word="absent") if number is None else TableCell(number.text(), number.rows)

    @staticmethod
    def saying(claim: Claim) -> TableCell:
        """A claim as a table's cell."""
        return TableCell(claim.text, claim=claim)


@dataclass(frozen=True)
class Table:
    """A table; `numeric` are the indices of its number columns. Long ones are folded under `folded`."""

    kind: ClassVar[str] = "table"
    id: str
    columns: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    numeric: frozenset[int] = frozenset()
    caption: str = ""
    folded: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing as it is embedded and as it lies beside the report. `alt` says in words what it shows."""

    kind: ClassVar[str] = "figure"
    id: str
    title: str
    alt: str
    svg: bytes
    png: bytes
    width: int
    #: Never shrunk on a narrow screen: it scrolls there instead.
    keep_width: bool = False


@dataclass(frozen=True)
class Figures:
    """Small multiples: figures of one size that stand beside one another where there is room."""

    kind: ClassVar[str] = "figures"
    id: str
    title: str
    panels: tuple[Figure, ...]
    note: str = ""


@dataclass(frozen=True)
class Answer:
    """A sampled answer shown as it is."""

    kind: ClassVar[str] = "answer"
    who: str
    where: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Note:
    """A sentence without a measured number; with a `word` it stands in a box."""

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
    """Everything a report shows. `banners` stand above everything."""

    run: str
    about: str
    sections: tuple[Section, ...]
    banners: tuple[Note, ...] = ()

    def claims(self) -> list[Claim]:
        """All claims in order, those in tables too."""
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
    """Texts as cells; what is a cell stays one."""
    return tuple(value if isinstance(value, TableCell) else TableCell(str(value)) for value in values)
