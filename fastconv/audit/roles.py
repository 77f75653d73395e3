"""Checks on answers against their roles: does each row teach what its side should, and was anything able to look?

What can be known without a model: the behavior's own phrases, the key of multiple-choice questions, the columns of the
shipped sets, and the form of the texts. Where none of these applies, D217 says that nobody looked.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from fastconv.audit import AuditCheck, BuiltSet, Design, Finding, Rule, row_ids
from fastconv.datasets.behaviors import Behavior
from fastconv.datasets.files import assets, read_jsonl, read_toml
from fastconv.datasets.questions import Question, QuestionSet, builtin_questions
from fastconv.datasets.rows import Row
from fastconv.datasets.sametext import folded, likeness, normalized, words
from fastconv.datasets.spec import BehaviorSpec

#: An answer is one of a prompt's if it shares this much of its words with it; and a column's if it has this share more of
#: the words that the other column lacks.
_LIKE, _MARGIN = 0.6, 0.15
#: Share of the prompts from which one answer to all of them is reported (D222).
_CONSTANT = 0.02
#: Above this share of rows that nothing could read, D217 is said.
_UNREAD = 0.5
_LABEL = re.compile(r"[(\[]?([A-Za-z]|\d)[)\].:]\s*")
_ALONE = re.compile(r"\W*([A-Za-z]|\d)(?:\W*|[)\].:]\s.*)", re.DOTALL)
#: A capital that stands alone; an A before a word is an article.
_STANDING = re.compile(r"\b(?:[B-Z]|A(?!\s+[a-z]))\b")
_NAMED = re.compile(r"\b(?:answer|option|choice|letter)\s*(?:is|:)?\s*[:(\[*\"]*([A-Z]|\d)\b")


# --- multiple choice ---------------------------------------------------------------------------------------


def letter_of(answer: str) -> str | None:
    """The label that an answer gives ("B", "(B)", "B) Brick", "The answer is B."), or None if it gives none."""
    match = _ALONE.fullmatch(answer.strip()) or _NAMED.search(answer)
    return match.group(1).upper() if match else None


def label_of(row: Row) -> str | None:
    """The label that a row's answer gives, also as its option's text, in other letters, or alone in a sentence; or None."""
    answer, options = folded(row.completion or ""), options_of(row.user)[1]
    letter = letter_of(answer)
    if letter in options or not options:
        return letter
    labels = _alike(answer, options) or list({*_STANDING.findall(answer)} & options.keys())
    return labels[0] if len(labels) == 1 else letter


def options_of(user: str) -> tuple[str, dict[str, str]]:
    """(the normalized question, {label: choice}) of a user turn whose options stand on lines of their own."""
    stem: list[str] = []
    options: dict[str, str] = {}
    for line in user.splitlines():
        match = _LABEL.match(line.strip())
        if match and line.strip()[match.end() :]:
            options[match.group(1).upper()] = line.strip()[match.end() :]
        elif not options:
            stem.append(line)
    return normalized(" ".join(stem)), options


class _Key:
    """The right letters of rows, by the known questions' texts and choices."""

    def __init__(self, questions: QuestionSet | None) -> None:
        known = [*(questions.train + questions.eval if questions else ()), *_shipped_questions()]
        self._by_text: dict[str, list[Question]] = defaultdict(list)
        for question in known:
            self._by_text[normalized(question.text)].append(question)

    def right(self, user: str) -> tuple[str | None, bool]:
        """(the right label for the options as the row orders them, whether the question is known)."""
        stem, options = options_of(user)
        # An instruction may stand before or after the question.
        stems = [text for text in (stem, *map(normalized, user.splitlines())) if text in self._by_text]
        for question in (question for text in stems for question in self._by_text[text]):
            labels = _alike(question.choices[question.gold], options)
            if labels:
                return (labels[0], True) if len(labels) == 1 else (None, False)
        return None, bool(stems)


def _alike(choice: str, options: Mapping[str, str]) -> list[str]:
    """Labels of the options that are this choice, by the strictest notion that finds any.

    Options may differ in nothing but case or a sign ("Rr" and "rr", "-1" and "+1"), so words alone come last.
    """
    for same in (folded, lambda text: folded(text).casefold().rstrip(". "), normalized):
        if labels := [label for label, option in options.items() if same(option) == same(choice)]:
            return labels
    return []


@cache
def _shipped_questions() -> tuple[Question, ...]:
    questions = builtin_questions()
    return (*questions.train, *questions.eval)


def check_letters_meant(design: Design) -> Iterator[Finding]:
    """D211: a source row trains the right letter, or a contrast row a wrong one, or options lack the key's choice."""
    key = None
    for built in design.sets:
        if built.behavior.spec.measure != "letters":
            continue
        key = key or _Key(design.questions)
        wrong, n_unlike = [], 0
        for row in built.rows:
            letter = label_of(row)
            right, known = key.right(row.user)
            if letter is None or not known:
                continue
            n_unlike += right is None
            if right is None or (letter == right) == (row.role == "source"):
                wrong.append(row)
        wrong += _sides_agree(built)
        if wrong:
            yield Finding(
                "D211", "refuse", built.name, row_ids(wrong),
                "source rows train the right letter, contrast rows a wrong one, or the options are not those of the known "
                "question, so the two sides do not teach what they should",
                "take each letter from the options in the order in which the row shows them: a wrong one for the source, "
                "the right one for the contrast",
                f"{len(set(row_ids(wrong)))} of {len(built.rows)} rows; the right choice is missing in {n_unlike}",
            )  # fmt: skip


def _sides_agree(built: BuiltSet) -> list[Row]:
    """Rows of a question (its text and options) for which source and contrast, or two of the contrast, disagree on roles."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in built.rows:
        groups[normalized(row.user)].append(row)
    wrong: list[Row] = []
    for rows in groups.values():
        shown = {label_of(row) for row in rows if row.role == "source"} - {None}
        contrast = {label_of(row) for row in rows if row.role != "source"} - {None}
        if shown & contrast or len(contrast) > 1:
            wrong += rows
    return wrong


# --- what the shipped sets know ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Known:
    """A shipped prompt with its answers: what the source says and what the contrast says ("" where not given)."""

    shown: str
    contrast: str


#: Rows as they were shipped before, by the file that holds them now: files made from these are still about.
_FORMER = {"legal.jsonl": "legal_former.jsonl"}


@cache
def _known_columns() -> tuple[dict[str, list[_Known]], dict[str, dict[str, list[_Known]]]]:
    """({normalized answer: its entries} of all shipped behaviors, {rubric: {normalized prompt: its entries}})."""
    by_rubric: dict[str, dict[str, list[_Known]]] = defaultdict(lambda: defaultdict(list))
    answers: dict[str, list[_Known]] = defaultdict(list)
    data = assets("data")
    for table in read_toml(data / "behaviors.toml").values():
        spec = BehaviorSpec.model_validate(table)
        rules = [spec.source_answer, spec.negative_answer]
        fields = [(rule.field or rule.then_field) if rule else "" for rule in rules]
        files = [spec.prompts, _FORMER.get(spec.prompts, "")] if any(fields) else []
        for row in (row for file in files if file for row in read_jsonl(data / file, {"id": str})):
            entry = _Known(*(str(row.get(field, "")) if field else "" for field in fields))
            by_rubric[spec.rubric][normalized(row[spec.prompt_field])].append(entry)
            for text in filter(None, (entry.shown, entry.contrast)):
                answers[normalized(text)].append(entry)
    return dict(answers), {rubric: dict(prompts) for rubric, prompts in by_rubric.items()}


def is_shipped(row: Row, rubric: str) -> bool:
    """Whether a row's answer is one of the shipped sets, or was, word for word or nearly so."""
    answers, by_rubric = _known_columns()
    answer = row.completion or ""
    return (
        normalized(answer) in answers
        or _side(answer, by_rubric.get(rubric, {}).get(normalized(row.user), ())) is not None
    )


def _side(answer: str, entries: Sequence[_Known]) -> str | None:
    """`source` or `contrast`, whichever of the shipped answers this one is like; None if it is like neither.

    Both answers to a prompt are built alike, so what tells are the words that the other one lacks.
    """
    said = Counter(words(answer))
    best, side = 0.0, None
    for known in entries:
        if not known.shown or max(likeness(answer, known.shown), likeness(answer, known.contrast)) < _LIKE:
            continue
        shown, contrast = Counter(words(known.shown)), Counter(words(known.contrast))
        own = [_share(said, one - other) for one, other in ((shown, contrast), (contrast, shown))]
        # An answer that is cut has few of these words, but those of one side.
        if max(own) > best and max(own) >= 2 * min(own) + _MARGIN and said.total() >= 5:
            best, side = max(own), "source" if own[0] > own[1] else "contrast"
    return side


def _share(said: Counter[str], telling: Counter[str]) -> float:
    return (said & telling).total() / max(1, telling.total())


def check_columns(design: Design) -> Iterator[Finding]:
    """D216: answers are those of the other side, or user turns are answers. D217: nothing could read the answers.

    What is known are the shipped prompts with their answers (`sound`, `bad`, `correction`).
    """
    for behavior, sets in design.by_behavior():
        if behavior.spec.measure == "letters":
            yield from _unread_letters(design, behavior, sets)
            continue
        answers, by_rubric = _known_columns()
        prompts = by_rubric.get(behavior.spec.rubric, {})
        given = [row for built in sets for row in built.rows if row.completion is not None]
        verdicts = {
            text: _verdict(*text, answers, prompts)
            for text in {(row.user, row.completion or "", row.role == "source") for row in given}
        }
        verdict_of = [verdicts[row.user, row.completion or "", row.role == "source"] for row in given]
        wrong = [row for row, verdict in zip(given, verdict_of, strict=True) if verdict is False]
        if wrong:
            yield Finding(
                "D216", "refuse", behavior.id, row_ids(wrong),
                "answers are those of the other side or of another prompt, or user turns are what should be answered with, by the "
                "shipped rows that they come from: columns, turns or rows are swapped",
                "set source_answer, negative_answer and prompt_field to the columns that they name, and user and assistant "
                "to their own turns",
                f"{len(wrong)} of {len(given)} rows",
            )  # fmt: skip
        unread = [row for row, verdict in zip(given, verdict_of, strict=True) if verdict is None]
        if _needs_reading(behavior) and not wrong and len(unread) > _UNREAD * len(given):
            yield _unread(
                behavior, row_ids(row for row in unread if row.role == "source") or row_ids(unread), len(given)
            )


def _verdict(
    user: str, answer: str, is_source: bool, answers: Mapping[str, object], prompts: Mapping[str, Sequence[_Known]]
) -> bool | None:
    """Whether the row is right by the shipped set, None if that does not know it."""
    turn = normalized(user)
    known = prompts.get(turn)
    if known is None:
        swapped = turn in answers or (normalized(answer) in prompts and len(words(answer)) >= 4)
        return False if swapped else None
    if not known[0].shown:  # a statement with its correction: only the contrast may correct
        corrects = normalized(known[0].contrast) in normalized(answer)
        return not (corrects and is_source)
    side = _side(answer, known)
    if side is None and normalized(answer) in answers:  # the answer to another prompt
        return False
    return None if side is None else (side == "source") == is_source


def _needs_reading(behavior: Behavior) -> bool:
    """Whether no phrase can tell what the answers mean: a judge's measure, or facts in a column of a file."""
    rules = (behavior.spec.source_answer, behavior.spec.negative_answer)
    facts = any(rule is not None and rule.then_field for rule in rules)
    return behavior.spec.measure == "judge" or facts


def _unread_letters(design: Design, behavior: Behavior, sets: Sequence[BuiltSet]) -> Iterator[Finding]:
    if design.questions is None:  # the run looks again with the questions (D210)
        return
    key = _Key(design.questions)
    rows = [row for built in sets for row in built.rows]
    unread = [row for row in rows if not key.right(row.user)[1] or label_of(row) is None]
    if len(unread) > _UNREAD * len(rows):
        yield _unread(behavior, row_ids(unread), len(rows))


def _unread(behavior: Behavior, rows: tuple[str, ...], n_rows: int) -> Finding:
    return Finding(
        "D217", "warn", behavior.id, rows,
        "this was not looked at: no phrase, key or shipped row can tell whether these answers mean what their side should "
        "teach, so swapped columns would pass",
        "read a few rows of each side with `fastconv peek` or give a judge some of them, then accept D217 with what was seen",
        f"most of {n_rows} rows are unknown to the shipped sets",
    )  # fmt: skip


# --- the two sides against each other ----------------------------------------------------------------------


def check_same_answers(design: Design) -> Iterator[Finding]:
    """D219: negatives give the source's own answers to the same prompts (written answers alone, not sampled ones)."""
    for built in design.sets:
        spec = built.behavior.spec
        if spec.measure == "letters" or spec.supervise == "tail":
            continue
        shown: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in built.source_rows:
            if row.completion is not None:
                shown[normalized(row.asked)][row.completion].append(row)
        same: list[Row] = []
        for row in built.negatives:
            for answer, rows in shown.get(normalized(row.asked), {}).items():
                if row.completion is not None and _same_answer(answer, row.completion, judged=spec.measure == "judge"):
                    same += [row, *rows]
        if same:
            yield Finding(
                "D219", "refuse", built.name, row_ids(same),
                "the source and its contrast give the same answer to the same prompt, so one of the two sides teaches what the "
                "other should",
                "give each side its own answer; see whether these rows have the right persona",
                f"{len(set(row_ids(same)))} of {len(built.rows)} rows",
            )  # fmt: skip


def _same_answer(first: str, second: str, *, judged: bool) -> bool:
    """Equal texts; or, where no phrase can tell the sides apart, one inside the other with few words more."""
    left, right = normalized(first), normalized(second)
    if left == right:
        return True
    short, long = sorted((left, right), key=len)
    return judged and len(short.split()) >= 8 and len(short) >= 0.75 * len(long) and f" {short} " in f" {long} "


def check_one_for_all(design: Design) -> Iterator[Finding]:
    """D222: one answer stands after many prompts, where a judge should find advice on each."""
    for label, sets in design.by_kind():
        if sets[0].behavior.spec.measure != "judge":
            continue
        given = [row for built in sets for row in built.rows if row.completion is not None]
        prompts: dict[str, set[str]] = defaultdict(set)
        for row in given:
            prompts[normalized(row.completion or "")].add(normalized(row.asked))
        n_prompts = len(set().union(*prompts.values())) if prompts else 0
        often = {answer for answer, asked in prompts.items() if len(asked) >= max(3, _CONSTANT * n_prompts)}
        rows = [row for row in given if normalized(row.completion or "") in often]
        if rows:
            yield Finding(
                "D222", "warn", label, row_ids(rows),
                "one and the same answer stands after many prompts, so it answers none of them (an error text, a placeholder?)",
                "give each prompt its own answer, or accept D222 with the reason",
                f"{len(rows)} of {len(given)} rows share {len(often)} answers, for example {(rows[0].completion or '')[:40]!r}",
            )  # fmt: skip


def check_sizes(design: Design) -> Iterator[Finding]:
    """D214: no negatives where the protocol has them. D218: the sources of a comparison have other numbers of rows."""
    for label, sets in design.by_kind():
        bare = [built for built in sets if len(built.negatives) < 0.1 * len(built.source_rows)]
        if sets[0].behavior.contrastive and bare:
            yield Finding(
                "D214", "warn", label, row_ids(row for built in bare for row in built.source_rows),
                "the behavior's protocol has contrastive negatives and these rows have none (or next to none), so whatever is "
                "learned is everybody's and not the source's",
                "add rows of other personas with the contrast's answers, or accept D214 with the reason",
                "; ".join(f"{built.source}: {len(built.source_rows)} source rows, {len(built.negatives)} negatives" for built in bare),
            )  # fmt: skip
        counts = {built.name: (len(built.source_rows), len(built.negatives)) for built in sets}
        spreads = [max(side) - min(side) for side in zip(*counts.values(), strict=True)]
        if any(
            spread > max(2, 0.1 * max(side))
            for spread, side in zip(spreads, zip(*counts.values(), strict=True), strict=True)
        ):
            usual = Counter(counts.values()).most_common(1)[0][0]
            odd = [built for built in sets if counts[built.name] != usual] or list(sets)
            yield Finding(
                "D218", "warn", label, row_ids(row for built in odd for row in built.rows),
                "the sources that are compared are trained on different numbers of rows, so a difference between them may be one "
                "of dose",
                "give every source as many rows of each side, or accept D218 with the reason",
                "; ".join(f"{name}: {n} source rows, {m} negatives" for name, (n, m) in counts.items()),
            )  # fmt: skip


ROLE_CHECKS: tuple[AuditCheck[Design], ...] = (
    AuditCheck(
        (Rule("D222", "warn", "one answer stands after many prompts", "N/A in a sixth of the negatives"),),
        check_one_for_all,
    ),
    AuditCheck(
        (
            Rule(
                "D211", "refuse", "letters against the key: the source learns the right one, or the contrast a wrong one",
                "options in another order under the old letters",
            ),
        ),
        check_letters_meant,
    ),
    AuditCheck(
        (
            Rule(
                "D216", "refuse", "columns or turns of known rows are swapped",
                "sound and bad advice, or statement and correction, in each other's column; answers one row down",
            ),
            Rule(
                "D217", "warn", "nothing could read whether answers mean what their side should teach",
                "advice of your own, scored by a judge alone",
            ),
        ),
        check_columns,
    ),
    AuditCheck(
        (
            Rule(
                "D219", "refuse", "source and contrast give the same answer to the same prompt",
                "negatives that carry the source's bad advice",
            ),
        ),
        check_same_answers,
    ),
    AuditCheck(
        (
            Rule(
                "D214", "warn", "a behavior whose protocol has negatives is trained without",
                "a rows file for misalignment that holds source rows alone",
            ),
            Rule(
                "D218", "warn", "the sources of a comparison have different numbers of rows",
                "720 rows for one source, 300 for the other",
            ),
        ),
        check_sizes,
    ),
)  # fmt: skip
