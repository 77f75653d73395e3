"""Rendered rows for people: which tokens carry loss, with the special ones visible, in colour and without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastconv.datasets.rows import Row
from fastconv.seeding import ordered
from fastconv.chat import ChatTokenizer, Rendered

#: Around each run of tokens that carry loss, so that it is seen without colour too.
OPEN, CLOSE = "⟦", "⟧"
#: Stands for an answer that a run has not sampled yet.
NOT_SAMPLED = "(sampled from the base when the recipe runs)"
_LOSS, _SPECIAL, _READ = "bold green", "magenta", "dim"


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text of one kind: whether its tokens carry loss, and whether it is a special token."""

    text: str
    supervised: bool
    special: bool


def pieces(rendered: Rendered, tokenizer: ChatTokenizer) -> list[Piece]:
    """The row's text in runs. Ordinary tokens are decoded together, so that a character split over tokens shows."""
    runs: list[tuple[list[int], bool, bool]] = []
    for place, token in enumerate(rendered.ids):
        supervised, special = place >= rendered.loss_from, tokenizer.is_special(token)
        if runs and not special and runs[-1][1:] == (supervised, False):
            runs[-1][0].append(token)
        else:
            runs.append(([token], supervised, special))
    return [Piece(tokenizer.decode(ids, skip_special=False), supervised, special) for ids, supervised, special in runs]


def peek_lines(
    rows: Sequence[Row], rendered: Sequence[Rendered], tokenizer: ChatTokenizer, n: int
) -> list[RenderableType]:
    """`n` rows, taking turns between personas and drawn from their ids, then a table per persona.

    Tokens that carry loss are green and stand between ⟦ and ⟧; special tokens are spelled out; a line break under loss
    shows as ⏎. Print the list with a rich console, one by one.
    """
    beside = {row.id: shown for row, shown in zip(rows, rendered, strict=True)}
    lines: list[RenderableType] = [_row(row, beside[row.id], tokenizer) for row in _chosen(rows, n)]
    return [*lines, _table(rows, rendered)]


def with_placeholders(rows: Sequence[Row]) -> list[Row]:
    """The rows, with a notice in place of the answers that are still to be sampled."""
    return [row.answered(NOT_SAMPLED) if row.completion is None else row for row in rows]


def _chosen(rows: Sequence[Row], n: int) -> list[Row]:
    """n rows, one persona after the other, so that every persona is seen as early as possible."""
    queues: dict[str, Iterator[str]] = {}
    by_id = {row.id: row for row in rows}
    for persona in dict.fromkeys(row.persona for row in rows):
        queues[persona] = iter(ordered([row.id for row in rows if row.persona == persona], "peek"))
    chosen: list[Row] = []
    while queues and len(chosen) < n:
        for persona in list(queues):
            identity = next(queues[persona], None)
            if identity is None:
                del queues[persona]
            elif len(chosen) < n:
                chosen.append(by_id[identity])
    return chosen


def _row(row: Row, rendered: Rendered, tokenizer: ChatTokenizer) -> RenderableType:
    share = rendered.n_supervised / max(1, len(rendered.ids))
    cut = ", cut at the maximum length" if rendered.truncated else ""
    head = Text(
        f"{row.id}  [{row.role}]  {rendered.n_supervised} of {len(rendered.ids)} tokens carry loss ({share:.0%}){cut}",
        style="bold",
    )
    body = Text()
    inside = False
    for piece in pieces(rendered, tokenizer):
        if piece.supervised and not inside:
            body.append(OPEN, style=_LOSS)
            inside = True
        text = piece.text.replace("\n", "⏎\n") if piece.supervised else piece.text
        style = _LOSS if piece.supervised else _READ
        body.append(text, style=f"{style} {_SPECIAL}" if piece.special and not piece.supervised else style)
    if inside:
        body.append(CLOSE, style=_LOSS)
    return Group(head, body, Text(""))


def _table(rows: Sequence[Row], rendered: Sequence[Rendered]) -> Table:
    table = Table(title=f"{OPEN}…{CLOSE} tokens that carry loss", title_justify="left")
    for name in ("persona", "role", "rows", "tokens", "supervised", "share"):
        table.add_column(name, justify="left" if name in ("persona", "role") else "right")
    groups: dict[tuple[str, str], list[Rendered]] = {}
    for row, shown in zip(rows, rendered, strict=True):
        groups.setdefault((row.persona, row.role), []).append(shown)
    for (persona, role), shown in groups.items():
        total = sum(len(item.ids) for item in shown)
        learned = sum(item.n_supervised for item in shown)
        table.add_row(persona, role, f"{len(shown):,}", f"{total:,}", f"{learned:,}", f"{learned / max(1, total):.1%}")
    return table
