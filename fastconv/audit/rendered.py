"""Checks on rendered rows: what the model really sees, and on which tokens it learns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastconv.audit.findings import Finding, Rule, ids
from fastconv.chat import EMPTY, TEMPLATE_DEFAULT, ChatTokenizer, Rendered, SystemTurn
from fastconv.datasets.personas import Personas
from fastconv.datasets.rows import Row
from fastconv.errors import TemplateError
from fastconv.recipe import Recipe
from fastconv.seeding import ordered

#: Characters that one token may reach back over before the tail begins.
_LONGEST_STRADDLE = 16


@dataclass(frozen=True)
class RenderedSet:
    """One set of rows with its renderings, in the same order."""

    recipe: Recipe
    personas: Personas
    name: str
    rows: tuple[Row, ...]
    rendered: tuple[Rendered, ...]
    tokenizer: ChatTokenizer

    @cached_property
    def pairs(self) -> list[tuple[Row, Rendered]]:
        """Each row beside its rendering."""
        return list(zip(self.rows, self.rendered, strict=False))

    @cached_property
    def _prompts(self) -> dict[tuple[SystemTurn, str], list[int]]:
        return {}

    def prompt(self, turn: SystemTurn, user: str) -> list[int]:
        """The prompt's ids, exactly as the evaluation makes them; each prompt is encoded once."""
        if (turn, user) not in self._prompts:
            self._prompts[turn, user] = self.tokenizer.prompt_ids(turn, user)
        return self._prompts[turn, user]


def check_complete(seen: RenderedSet) -> Iterator[Finding]:
    """D401: a row without an answer, or without a rendering. D410: an answer with nothing in it."""
    missing = [row for row in seen.rows if row.completion is None]
    if missing or len(seen.rows) != len(seen.rendered):
        yield Finding(
            "D401", "refuse", seen.name, ids(missing),
            "rows have no answer, or do not match the rendered ones, so something else than the set would be trained",
            "change behavior.sampling or the seed, so that the answers are drawn anew",
            f"{len(seen.rows)} rows, {len(seen.rendered)} rendered, {len(missing)} without an answer",
        )  # fmt: skip
    empty = [row for row in seen.rows if row.completion is not None and not row.completion.strip()]
    if empty:
        yield Finding(
            "D410", "warn", seen.name, ids(empty),
            "answers are empty, so these rows teach to say nothing",
            "raise max_new_tok or lower the temperature where answers are sampled, or accept D410 with the reason",
            f"{len(empty)} of {len(seen.rows)} rows",
        )  # fmt: skip


def check_prompt(seen: RenderedSet) -> Iterator[Finding]:
    """D402: the prompt's tokens are not those that the evaluation asks this persona with. D403: the system turn."""
    broken, turned = [], []
    kinds: Counter[str] = Counter()
    for row, rendered in seen.pairs:
        turn = seen.personas.system(row.persona)
        if _starts(rendered, seen.prompt(turn, row.user)):
            continue
        found = _found_turn(seen, row, rendered, turn)
        if found:
            turned.append(row)
            kinds[f"{turn.kind} is declared, {found} is rendered"] += 1
        else:
            broken.append(row)
    if broken:
        yield Finding(
            "D402", "refuse", seen.name, ids(broken),
            "the prompt's tokens are no prefix of the row, or not those of the evaluation, so the mask or the "
            "condition is another one",
            "render the rows with the model's own tokenizer and template",
            f"{len(broken)} of {len(seen.rows)} rows",
        )  # fmt: skip
    if turned:
        yield Finding(
            "D403", "refuse", seen.name, ids(turned),
            "the system turn is not the one that the evaluation gives this persona; a text, an empty one and the "
            "template's own are three different conditions",
            "render each row under its persona's own prompt",
            "; ".join(f"{n} rows: {kind}" for kind, n in kinds.most_common(3)),
        )  # fmt: skip


def check_supervised(seen: RenderedSet) -> Iterator[Finding]:
    """D404: no token carries loss. D405: every token does."""
    none = [row for row, rendered in seen.pairs if rendered.n_supervised <= 0]
    if none:
        yield Finding(
            "D404", "refuse", seen.name, ids(none),
            "rows have no token that carries loss, so they teach nothing",
            "raise max_length_tok, or drop the rows",
            f"{len(none)} rows",
        )  # fmt: skip
    whole = [row for row, rendered in seen.pairs if rendered.loss_from == 0 and rendered.ids]
    if whole:
        yield Finding(
            "D405", "refuse", seen.name, ids(whole),
            "every token carries loss, the prompt's too, so the model learns to write the prompt",
            "give rows as prompt and completion",
            f"{len(whole)} rows",
        )  # fmt: skip


def check_end_of_turn(seen: RenderedSet) -> Iterator[Finding]:
    """D406: the answer ends and the end of turn carries no loss. D407: answers that were cut while sampled."""
    end = seen.tokenizer.end_of_turn_id
    open_ended = [
        row
        for row, rendered in seen.pairs
        if row.ended and not rendered.truncated and (rendered.n_supervised <= 0 or rendered.ids[-1] != end)
    ]
    if open_ended:
        yield Finding(
            "D406", "refuse", seen.name, ids(open_ended),
            "the end of turn carries no loss, so the model is not taught to stop",
            "use a template that ends the assistant's turn",
            f"{len(open_ended)} rows",
        )  # fmt: skip
    cut = [row for row in seen.rows if not row.ended]
    if cut:
        yield Finding(
            "D407", "note", seen.name, ids(cut),
            "answers were cut at the sampling limit; they are trained without an end of turn",
            "raise max_new_tok where answers are sampled",
            f"{len(cut)} of {len(seen.rows)} rows",
        )  # fmt: skip


def check_truncated(seen: RenderedSet) -> Iterator[Finding]:
    """D408: rows longer than the limit lose the end of the answer."""
    cut = [row for row, rendered in seen.pairs if rendered.truncated]
    if cut:
        yield Finding(
            "D408", "warn", seen.name, ids(cut),
            "rows are cut at the maximum length, so their answers never end",
            "raise max_length_tok, or accept D408 with the reason",
            f"{len(cut)} of {len(seen.rows)} rows",
        )  # fmt: skip


def check_answer(seen: RenderedSet) -> Iterator[Finding]:
    """D409: the text under loss is not the answer (or the tail of it) that the row declares."""
    end = seen.tokenizer.token_text(seen.tokenizer.end_of_turn_id)
    wrong = []
    for row, rendered in seen.pairs:
        if rendered.truncated or row.completion is None:
            continue
        text = seen.tokenizer.decode(rendered.ids[rendered.loss_from :], skip_special=False).removesuffix(end)
        declared = row.completion[row.given_chars :]
        # A token may straddle the start of a tail and then belongs to it; a template may trim an answer's ends.
        same = text.endswith(declared) if row.supervise == "tail" else text.strip() == declared.strip()
        too_much = row.supervise == "tail" and len(text) > len(declared) + _LONGEST_STRADDLE
        if not same or too_much:
            wrong.append(row)
    if wrong:
        yield Finding(
            "D409", "refuse", seen.name, ids(wrong),
            "the tokens that carry loss do not spell what the row declares to train",
            "render the rows again with this tokenizer",
            f"{len(wrong)} of {len(seen.rows)} rows",
        )  # fmt: skip


RENDERED_CHECKS: tuple[Rule[RenderedSet], ...] = (
    Rule(("D401", "D410"), check_complete),
    Rule(("D402", "D403"), check_prompt),
    Rule(("D404", "D405"), check_supervised),
    Rule(("D406", "D407"), check_end_of_turn),
    Rule(("D408",), check_truncated),
    Rule(("D409",), check_answer),
)


def _starts(rendered: Rendered, prompt: list[int]) -> bool:
    """Whether the row is this prompt and then an answer; a row cut within its prompt is as far as it goes."""
    n = rendered.n_prompt
    return list(rendered.ids[:n]) == prompt[:n] and (n == len(prompt) or rendered.truncated)


def _found_turn(seen: RenderedSet, row: Row, rendered: Rendered, expected: SystemTurn) -> str | None:
    """What system turn the row was rendered with instead, or None if that is not what differs."""
    others = {"the template's own": TEMPLATE_DEFAULT, "an empty one": EMPTY}
    if row.system is not None:
        others["the row's own text"] = row.system
    others |= {f"{name}'s text": seen.personas.system(name) for name in seen.personas.prompts}
    for name, turn in others.items():
        if turn == expected:
            continue
        try:
            if _starts(rendered, seen.prompt(turn, row.user)):
                return name
        except TemplateError:
            continue
    return None


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
