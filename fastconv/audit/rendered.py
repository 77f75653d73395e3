"""Rendered rows: the checks on what the model will see and on which tokens carry loss, and the base as their reader.

A rendered row is its token ids with the length of the prompt and the index of the first token that carries loss
(`chat.Rendered`). The checks yield findings. `pairs_to_read` says which texts the base should read under the
assistant's prompt, `reading_findings` what their log-probabilities say about sides, columns and turns.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from fastconv.audit import AuditCheck, Finding, Rule, row_ids
from fastconv.audit.shortcuts import is_sampled
from fastconv.chat import EMPTY, TEMPLATE_DEFAULT, ChatTokenizer, Exchange, Rendered, SystemTurn
from fastconv.datasets.behaviors import Behavior
from fastconv.datasets.personas import Personas
from fastconv.datasets.rows import Row
from fastconv.errors import TemplateError
from fastconv.recipe import Recipe
from fastconv.seeding import seeded_order

#: Characters before the start of a tail that may belong to the tail's first token.
_LONGEST_STRADDLE = 16
#: Fewer pairs prove nothing, and a base that gives less per token than this share of a uniform guess reads no language.
_LEAST_PAIRS, _READS = 12, 0.5
#: Evidence against the declared order over prompts: t, share of prompts and mean (nats per token) from which it is told,
#: and from which it is refused.
_TOLD, _REFUSED = (3.0, 0.5, 0.0), (5.0, 0.65, 0.03)

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
    def _prompt_ids(self) -> dict[tuple[SystemTurn, tuple[Exchange, ...], str], list[int]]:
        return {}

    def prompt(self, turn: SystemTurn, row: Row) -> list[int]:
        """Token ids of a row's prompt under a system turn, made as the evaluation makes them; cached."""
        asked = (turn, row.history, row.user)
        if asked not in self._prompt_ids:
            self._prompt_ids[asked] = self.tokenizer.conversation_ids(row.messages(turn))
        return self._prompt_ids[asked]


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
        if (token := rendered_set.tokenizer.control_token_in(f"{row.asked}\n{row.completion or ''}"))
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
        if _starts(rendered, rendered_set.prompt(turn, row)):
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
        trained = [one.answer.strip() for one in row.history if one.trained]
        spelled = [
            rendered_set.tokenizer.decode(rendered.ids[slice(*span)], skip_special=False) for span in rendered.earlier
        ]
        if not same or too_much or [text.removesuffix(end).strip() for text in spelled] != trained:
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
            if _starts(rendered, rendered_set.prompt(turn, row)):
                return name
        except TemplateError:
            continue
    return None


# --- the base as a reader ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts that the base reads after one prefix: as the set declares them, and the other way round.

    `about` is `sides` (the contrast's answer, then the source's, to one prompt) or `order` (user turn and answer, then
    both exchanged). `prefix` and `texts` are token ids; `row` is the id of the row that the finding names.
    """

    about: str
    row: str
    prefix: tuple[int, ...]
    texts: tuple[tuple[int, ...], tuple[int, ...]]


def pairs_to_read(
    behavior: Behavior, rows: Sequence[Row], tokenizer: ChatTokenizer, system: SystemTurn, most: int, longest_tok: int
) -> list[Pair]:
    """What the base should read of a set under this system turn (the assistant's): at most `most` prompts of each kind.

    Texts of over `longest_tok` tokens are left out, and what the template cannot hold the other way round.

    Sides are compared where a judge scores the behavior, since both then are advice of one kind; order wherever answers
    are written and not drawn from the base. Letters and tails are left out: they are no texts. The draw is seeded.
    """
    spec = behavior.spec
    if spec.measure == "letters" or spec.supervise == "tail":
        return []
    sides: dict[str, dict[bool, Row]] = {}
    for row in rows:
        if row.completion and row.completion.strip() and not row.history and not is_sampled(row, behavior):
            sides.setdefault(row.user, {}).setdefault(row.role == "source", row)
    chosen = seeded_order(sorted(sides), "reader", behavior.id)[:most]
    pairs: list[Pair] = []
    for user in chosen:
        first = sides[user].get(False) or sides[user][True]
        asked = [("order", first, _exchanged(first, behavior))]
        if spec.measure == "judge" and len(sides[user]) == 2:
            asked.append(("sides", first, (user, sides[user][True].completion or "")))
        for about, row, other in asked:
            with suppress(TemplateError):  # a template may rewrite a user turn that stands as an answer
                pairs.append(_pair(about, row.id, tokenizer, system, (user, row.completion or ""), other))
    return [pair for pair in pairs if all(pair.texts) and len(pair.prefix) + max(map(len, pair.texts)) <= longest_tok]


def _pair(
    about: str, row: str, tokenizer: ChatTokenizer, system: SystemTurn, right: tuple[str, str], other: tuple[str, str]
) -> Pair:
    """The pair of two (user turn, answer) conversations, cut after their common beginning."""
    first, second = (tokenizer.training_ids(system, *turns, max_length_tok=2**30).ids for turns in (right, other))
    shared = next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)) - 1
    )
    if about == "sides":  # every token of an answer is read, also where both begin alike
        shared = min(shared, len(tokenizer.prompt_ids(system, right[0])))
    return Pair(about, row, first[:shared], (first[shared:], second[shared:]))


def _exchanged(row: Row, behavior: Behavior) -> tuple[str, str]:
    """The row with its columns exchanged (a fact after a set wording), or else its turns."""
    answer, spec = row.completion or "", behavior.spec
    rule = spec.source_answer if row.role == "source" else spec.negative_answer
    if rule is not None and rule.then_field and behavior.rows is None:
        facts = {str(entry["id"]): str(entry[rule.then_field]) for entry in behavior.train}
        fact = facts.get(row.prompt_id, "")
        if fact and answer.endswith(fact):
            return fact, answer.removesuffix(fact) + row.user
    return answer, row.user


def reading_findings(
    name: str, pairs: Sequence[Pair], means: Sequence[tuple[float, float]], vocabulary: int, accepted: Mapping[str, str]
) -> list[Finding]:
    """D301 to D303: what the base's reading says. `means` are log-probabilities per token (nats) of each pair's texts.

    A t test over prompts of the declared text minus the other. A base that reads no language (random weights) says
    nothing. Whoever accepts D303 has read the rows, and is then not refused.
    """
    findings = []
    for about, code, why, mend in _READINGS:
        read = [(pair.row, *values) for pair, values in zip(pairs, means, strict=True) if pair.about == about]
        if len(read) < _LEAST_PAIRS or statistics.fmean(first for _, first, _ in read) < -_READS * math.log(vocabulary):
            continue
        gaps = [first - second for _, first, second in read]
        against = sorted((gap, row) for gap, (row, _, _) in zip(gaps, read, strict=True) if gap < 0)
        mean, spread = statistics.fmean(gaps), statistics.stdev(gaps)
        evidence = (-mean / max(spread / math.sqrt(len(gaps)), 1e-9), len(against) / len(gaps), -mean)
        if not all(value >= bound for value, bound in zip(evidence, _TOLD, strict=True)):
            continue
        strong = all(value >= bound for value, bound in zip(evidence, _REFUSED, strict=True))
        refused = strong and "D303" not in accepted
        figure = (
            f"mean log-probability per token {statistics.fmean(r[1] for r in read):.2f} as declared and "
            f"{statistics.fmean(r[2] for r in read):.2f} the other way round; the other way is likelier for "
            f"{evidence[1]:.0%} of {len(read)} prompts, t = {evidence[0]:.1f}"
        )
        rows = tuple(row for _, row in against)
        findings.append(
            Finding(
                code,
                "refuse",
                name,
                rows,
                why,
                f"{mend}, or, if the rows are right, accept D303 with what was seen",
                figure,
            )
            if refused
            else Finding(
                "D303", "warn", name, rows, f"{why} (the evidence is weak)" if not strong else why, mend, figure
            )
        )
    return findings


_READINGS = (
    (
        "sides", "D301",
        "under the assistant's prompt the base finds the source's answers likelier than the contrast's, so good and bad look swapped",
        "read some rows with `fastconv peek` and give each side its own column",
    ),
    (
        "order", "D302",
        "under the assistant's prompt the base finds user turns and answers likelier the other way round, so turns or columns "
        "look swapped",
        "put the person's text into the user turn and the answer into the assistant's, and each column where it belongs",
    ),
)  # fmt: skip

#: Rules of what the base reads; `run.audit` asks them, since they need the model.
READING_RULES = (
    Rule("D301", "refuse", "the base finds the source's answers likelier than the contrast's", "sound and bad advice swapped"),
    Rule("D302", "refuse", "the base finds turns or columns likelier exchanged", "a statement stands where its correction should"),
    Rule("D303", "warn", "the base's reading speaks against the declared sides or turns", "the same, with weaker evidence"),
)  # fmt: skip
