"""What a report is made of (sections of claims, tables, figures, answers: plain data), and how it becomes one
self-contained HTML page and its Markdown twin.

No script, nothing from outside, every text escaped. The templates print what the blocks hold and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import ClassVar

import jinja2

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
    """Everything a report shows. `banners` precede all sections; `files` are beside the page, bytes by path in its folder."""

    run: str
    about: str
    sections: tuple[Section, ...]
    banners: tuple[Note, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])

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


#: Control and bidirectional formatting characters: shown as escape codes, so that they have no effect.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


def render_html(data: ReportData) -> str:
    """The report as an HTML page."""
    return _environment(autoescape=True).get_template("report.html.j2").render(data=data)


def render_markdown(data: ReportData) -> str:
    """The report as Markdown, without figures."""
    text = _environment(autoescape=False).get_template("report.md.j2").render(data=data)
    return re.sub(r"\n{3,}", "\n\n", text)


def visible(text: object) -> str:
    """The text with invisible and direction-changing characters replaced by their escape codes."""
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))


def svg_data_uri(figure: Figure) -> str:
    """The figure's SVG as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(figure.svg).decode()


def claim_attributes(claim: Claim) -> dict[str, str]:
    """The attributes of a claim in the page that `verify` reads: query, arguments, number of rows, and their sha256."""
    return {
        "query": claim.query,
        "arguments": json.dumps(dict(claim.arguments), sort_keys=True),
        "rows": str(len(claim.rows)),
        "sha": claim.rows_sha256[:16],
    }


def _quoted(text: object) -> str:
    """Model text as an indented Markdown code block, which it cannot leave."""
    return "\n".join(f"    {line}" for line in visible(text).splitlines() or [""])


def _in_cell(text: object) -> str:
    """Text for a Markdown table cell: without line breaks, bars or HTML."""
    escaped = visible(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return " ".join(escaped.split())


def _environment(*, autoescape: bool) -> jinja2.Environment:
    loader = jinja2.FunctionLoader(
        lambda name: (resources.files("fastconv.report") / "templates" / name).read_text(encoding="utf-8")
    )
    environment = jinja2.Environment(
        loader=loader, autoescape=autoescape, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "cell": _in_cell, "seen": visible, "quoted": _quoted, "address": svg_data_uri, "marks": claim_attributes,
    }  # fmt: skip
    return environment
