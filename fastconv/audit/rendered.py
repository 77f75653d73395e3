"""Rendered rows: the checks on what the model will see and on which tokens carry loss, and how `peek` shows them.

A rendered row is its token ids with the length of the prompt and the index of the first token that carries loss
(`chat.Rendered`). The checks yield findings; `peek_lines` gives rows as rich text with the loss marked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastconv.audit import AuditCheck, Finding, Rule, row_ids
from fastconv.chat import EMPTY, TEMPLATE_DEFAULT, ChatTokenizer, Rendered, SystemTurn
from fastconv.datasets.personas import Personas
from fastconv.datasets.rows import Row
from fastconv.errors import TemplateError
from fastconv.recipe import Recipe
from fastconv.seeding import seeded_order

#: Characters before the start of a tail that may belong to the tail's first token.
_LONGEST_STRADDLE = 16
#: Stand around each run of tokens that carry loss, so that it is visible without colour too.
OPEN, CLOSE = "⟦", "⟧"
#: Stands in place of an answer that a run has not sampled yet.
NOT_SAMPLED = "(sampled from the base when the recipe runs)"
_LOSS, _SPECIAL, _READ = "bold green", "magenta", "dim"

# --- checks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RenderedSet:
    """One set of rows with the recipe and personas they are checked against, and their renderings in the same order."""

    recipe: Recipe
    personas: Personas
    name: str
    rows: tuple[Row, ...]
    rendered: tuple[Rendered, ...]
    tokenizer: ChatTokenizer

    @cached_property
    def pairs(self) -> list[tuple[Row, Rendered]]:
        """(row, its rendering); where the lengths differ, D401 reports it."""
        return list(zip(self.rows, self.rendered, strict=False))

    @cached_property
    def _prompt_ids(self) -> dict[tuple[SystemTurn, str], list[int]]:
        return {}

    def prompt(self, turn: SystemTurn, user: str) -> list[int]:
        """Token ids of a prompt, made as the evaluation makes them; cached."""
        if (turn, user) not in self._prompt_ids:
            self._prompt_ids[turn, user] = self.tokenizer.prompt_ids(turn, user)
        return self._prompt_ids[turn, user]


def check_complete(rendered_set: RenderedSet) -> Iterator[Finding]:
    """D401: a row has no answer or no rendering. D410: an answer is empty."""
    missing = [row for row in rendered_set.rows if row.completion is None]
    if missing or len(rendered_set.rows) != len(rendered_set.rendered):
        yield Finding(
            "D401", "refuse", rendered_set.name, row_ids(missing),
            "rows have no answer, or do not match the rendered ones, so something else than the set would be trained",
            "change behavior.sampling or the seed, so that the answers are drawn anew",
            f"{len(rendered_set.rows)} rows, {len(rendered_set.rendered)} rendered, {len(missing)} without an answer",
        )  # fmt: skip
    empty = [row for row in rendered_set.rows if row.completion is not None and not row.completion.strip()]
    if empty:
        yield Finding(
            "D410", "warn", rendered_set.name, row_ids(empty),
            "answers are empty, so these rows teach to say nothing",
            "raise max_new_tok or lower the temperature where answers are sampled, or accept D410 with the reason",
            f"{len(empty)} of {len(rendered_set.rows)} rows",
        )  # fmt: skip


def check_control_tokens(rendered_set: RenderedSet) -> Iterator[Finding]:
    """D411: a text spells a special token, which the tokenizer takes for one: a sampled answer may."""
    held = {
        row.id: token
        for row in rendered_set.rows
        if (token := rendered_set.tokenizer.control_token_in(f"{row.user}\n{row.completion or ''}"))
    }
    if held:
        yield Finding(
            "D411", "refuse", rendered_set.name, tuple(held),
            f"texts hold control tokens ({', '.join(sorted(set(held.values())))}), which end a turn or begin one within the row",
            "take them out of rows of your own; where answers are sampled, change the seed, so that they are drawn anew",
            f"{len(held)} of {len(rendered_set.rows)} rows",
        )  # fmt: skip


def check_prompt(rendered_set: RenderedSet) -> Iterator[Finding]:
    """D402: the prompt's tokens differ from those of the evaluation under this persona. D403: its system turn differs."""
    wrong_prompt, wrong_turn = [], []
    kinds: Counter[str] = Counter()
    for row, rendered in rendered_set.pairs:
        turn = rendered_set.personas.system(row.persona)
        if _starts(rendered, rendered_set.prompt(turn, row.user)):
            continue
        rendered_turn = _rendered_turn(rendered_set, row, rendered, turn)
        if rendered_turn:
            wrong_turn.append(row)
            kinds[f"{turn.kind} is declared, {rendered_turn} is rendered"] += 1
        else:
            wrong_prompt.append(row)
    if wrong_prompt:
        yield Finding(
            "D402", "refuse", rendered_set.name, row_ids(wrong_prompt),
            "the prompt's tokens are no prefix of the row, or not those of the evaluation, so the mask or the "
            "condition is another one",
            "render the rows with the model's own tokenizer and template",
            f"{len(wrong_prompt)} of {len(rendered_set.rows)} rows",
        )  # fmt: skip
    if wrong_turn:
        yield Finding(
            "D403", "refuse", rendered_set.name, row_ids(wrong_turn),
            "the system turn is not the one that the evaluation gives this persona; a text, an empty one and the "
            "template's own are three different conditions",
            "render each row under its persona's own prompt",
            "; ".join(f"{n} rows: {kind}" for kind, n in kinds.most_common(3)),
        )  # fmt: skip


def check_supervised(rendered_set: RenderedSet) -> Iterator[Finding]:
    """D404: no token carries loss. D405: every token carries loss."""
    without_loss = [row for row, rendered in rendered_set.pairs if rendered.n_supervised <= 0]
    if without_loss:
        yield Finding(
            "D404", "refuse", rendered_set.name, row_ids(without_loss),
            "rows have no token that carries loss, so they teach nothing",
            "raise max_length_tok, or drop the rows",
            f"{len(without_loss)} rows",
        )  # fmt: skip
    all_loss = [row for row, rendered in rendered_set.pairs if rendered.loss_from == 0 and rendered.ids]
    if all_loss:
        yield Finding(
            "D405", "refuse", rendered_set.name, row_ids(all_loss),
            "every token carries loss, the prompt's too, so the model learns to write the prompt",
            "give rows as prompt and completion",
            f"{len(all_loss)} rows",
        )  # fmt: skip


def check_end_of_turn(rendered_set: RenderedSet) -> Iterator[Finding]:
    """D406: a finished answer's end of turn carries no loss. D407: answers were cut at the sampling limit."""
    end = rendered_set.tokenizer.end_of_turn_id
    open_ended = [
        row
        for row, rendered in rendered_set.pairs
        if row.ended and not rendered.truncated and (rendered.n_supervised <= 0 or rendered.ids[-1] != end)
    ]
    if open_ended:
        yield Finding(
            "D406", "refuse", rendered_set.name, row_ids(open_ended),
            "the end of turn carries no loss, so the model is not taught to stop",
            "use a template that ends the assistant's turn",
            f"{len(open_ended)} rows",
        )  # fmt: skip
    cut = [row for row in rendered_set.rows if not row.ended]
    if cut:
        yield Finding(
            "D407", "note", rendered_set.name, row_ids(cut),
            "answers were cut at the sampling limit; they are trained without an end of turn",
            "raise max_new_tok where answers are sampled",
            f"{len(cut)} of {len(rendered_set.rows)} rows",
        )  # fmt: skip


def check_truncated(rendered_set: RenderedSet) -> Iterator[Finding]:
    """D408: rows longer than the limit lose the end of their answer."""
    cut = [row for row, rendered in rendered_set.pairs if rendered.truncated]
    if cut:
        yield Finding(
            "D408", "warn", rendered_set.name, row_ids(cut),
            "rows are cut at the maximum length, so their answers never end",
            "raise max_length_tok, or accept D408 with the reason",
            f"{len(cut)} of {len(rendered_set.rows)} rows",
        )  # fmt: skip


def check_answer(rendered_set: RenderedSet) -> Iterator[Finding]:
    """D409: the text under loss differs from the answer (or its tail) that the row declares."""
    end = rendered_set.tokenizer.token_text(rendered_set.tokenizer.end_of_turn_id)
    wrong = []
    for row, rendered in rendered_set.pairs:
        if rendered.truncated or row.completion is None:
            continue
        text = rendered_set.tokenizer.decode(rendered.ids[rendered.loss_from :], skip_special=False).removesuffix(end)
        declared = row.completion[row.given_chars :]
        # A token that straddles the start of a tail belongs to the tail; a template may trim an answer's white space.
        same = text.endswith(declared) if row.supervise == "tail" else text.strip() == declared.strip()
        too_much = row.supervise == "tail" and len(text) > len(declared) + _LONGEST_STRADDLE
        if not same or too_much:
            wrong.append(row)
    if wrong:
        yield Finding(
            "D409", "refuse", rendered_set.name, row_ids(wrong),
            "the tokens that carry loss do not spell what the row declares to train",
            "render the rows again with this tokenizer",
            f"{len(wrong)} of {len(rendered_set.rows)} rows",
        )  # fmt: skip


RENDERED_CHECKS: tuple[AuditCheck[RenderedSet], ...] = (
    AuditCheck(
        (
            Rule("D401", "refuse", "rows without an answer or a rendering", "a sampled answer that is missing"),
            Rule("D410", "warn", "empty answers", "a sampled answer of white space"),
        ),
        check_complete,
    ),
    AuditCheck(
        (Rule("D411", "refuse", "a control token within a text", "a sampled answer that spells an end of turn"),),
        check_control_tokens,
    ),
    AuditCheck(
        (
            Rule("D402", "refuse", "the prompt's tokens are not the evaluation's", "another tokenizer or template"),
            Rule("D403", "refuse", "the system turn is not the one evaluated", "the template's own in place of a text"),
        ),
        check_prompt,
    ),
    AuditCheck(
        (
            Rule("D404", "refuse", "no token carries loss", "a prompt longer than max_length_tok"),
            Rule("D405", "refuse", "every token carries loss", "a mask that covers the prompt"),
        ),
        check_supervised,
    ),
    AuditCheck(
        (
            Rule("D406", "refuse", "the end of turn carries no loss", "a template that leaves the turn open"),
            Rule("D407", "note", "answers cut at the sampling limit", "max_new_tok = 64"),
        ),
        check_end_of_turn,
    ),
    AuditCheck((Rule("D408", "warn", "rows cut at the maximum length", "max_length_tok = 150"),), check_truncated),
    AuditCheck(
        (Rule("D409", "refuse", "the text under loss is not the answer", "a mask that begins one token late"),),
        check_answer,
    ),
)  # fmt: skip


def _starts(rendered: Rendered, prompt: list[int]) -> bool:
    """Whether the row begins with this prompt; a row cut within its prompt is compared as far as it goes."""
    n = rendered.n_prompt
    return list(rendered.ids[:n]) == prompt[:n] and (n == len(prompt) or rendered.truncated)


def _rendered_turn(rendered_set: RenderedSet, row: Row, rendered: Rendered, expected: SystemTurn) -> str | None:
    """The system turn that the row was rendered with instead, in words, or None if the system turn is not what differs."""
    candidates = {"the template's own": TEMPLATE_DEFAULT, "an empty one": EMPTY}
    if row.system is not None:
        candidates["the row's own text"] = row.system
    candidates |= {f"{name}'s text": rendered_set.personas.system(name) for name in rendered_set.personas.prompts}
    for name, turn in candidates.items():
        if turn == expected:
            continue
        try:
            if _starts(rendered, rendered_set.prompt(turn, row.user)):
                return name
        except TemplateError:
            continue
    return None


# --- peek --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Text of successive tokens of one kind: whether they carry loss, and whether it is a special token."""

    text: str
    supervised: bool
    special: bool


def token_runs(rendered: Rendered, tokenizer: ChatTokenizer) -> list[TokenRun]:
    """The row's text in runs. Ordinary tokens are decoded together, as one character may span several tokens."""
    runs: list[tuple[list[int], bool, bool]] = []
    for place, token in enumerate(rendered.ids):
        supervised, special = place >= rendered.loss_from, tokenizer.is_special(token)
        if runs and not special and runs[-1][1:] == (supervised, False):
            runs[-1][0].append(token)
        else:
            runs.append(([token], supervised, special))
    return [
        TokenRun(tokenizer.decode(ids, skip_special=False), supervised, special) for ids, supervised, special in runs
    ]


def peek_lines(
    rows: Sequence[Row], rendered: Sequence[Rendered], tokenizer: ChatTokenizer, n: int
) -> list[RenderableType]:
    """`n` rows, alternating between personas in an order seeded by their ids, then a table of counts per persona.

    Tokens that carry loss are green and stand between ⟦ and ⟧; special tokens are spelled out; a line break under loss
    shows as ⏎. The items are to be printed one by one with a rich console.
    """
    rendering_of = {row.id: rendering for row, rendering in zip(rows, rendered, strict=True)}
    lines: list[RenderableType] = [_row(row, rendering_of[row.id], tokenizer) for row in _chosen(rows, n)]
    return [*lines, _table(rows, rendered)]


def with_placeholders(rows: Sequence[Row]) -> list[Row]:
    """The rows with `NOT_SAMPLED` in place of the answers that are still to be sampled."""
    return [row.answered(NOT_SAMPLED) if row.completion is None else row for row in rows]


def _chosen(rows: Sequence[Row], n: int) -> list[Row]:
    """n rows in turn from each persona, so that every persona appears as early as possible."""
    queues: dict[str, Iterator[str]] = {}
    by_id = {row.id: row for row in rows}
    for persona in dict.fromkeys(row.persona for row in rows):
        queues[persona] = iter(seeded_order([row.id for row in rows if row.persona == persona], "peek"))
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
    for run in token_runs(rendered, tokenizer):
        if run.supervised and not inside:
            body.append(OPEN, style=_LOSS)
            inside = True
        text = run.text.replace("\n", "⏎\n") if run.supervised else run.text
        style = _LOSS if run.supervised else _READ
        body.append(text, style=f"{style} {_SPECIAL}" if run.special and not run.supervised else style)
    if inside:
        body.append(CLOSE, style=_LOSS)
    return Group(head, body, Text(""))


def _table(rows: Sequence[Row], rendered: Sequence[Rendered]) -> Table:
    table = Table(title=f"{OPEN}…{CLOSE} tokens that carry loss", title_justify="left")
    for name in ("persona", "role", "rows", "tokens", "supervised", "share"):
        table.add_column(name, justify="left" if name in ("persona", "role") else "right")
    groups: dict[tuple[str, str], list[Rendered]] = {}
    for row, rendering in zip(rows, rendered, strict=True):
        groups.setdefault((row.persona, row.role), []).append(rendering)
    for (persona, role), group in groups.items():
        n_tok = sum(len(rendering.ids) for rendering in group)
        n_loss = sum(rendering.n_supervised for rendering in group)
        table.add_row(persona, role, f"{len(group):,}", f"{n_tok:,}", f"{n_loss:,}", f"{n_loss / max(1, n_tok):.1%}")
    return table
