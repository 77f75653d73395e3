"""Checks on rows: the persona's prompt, overlap, duplicates, contradictions, counts, letters, builders, shortcuts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from fastconv.audit.findings import BuiltSet, Design, Finding, Rule, grams, ids, normalised, words
from fastconv.chat import SystemTurn
from fastconv.datasets.rows import Row

#: A prompt that shares this much of its word runs with an evaluation prompt is near it.
NEAR = 0.5
#: How well one number, or the first words alone, may tell source from contrast before it is reported.
SHORTCUT = 0.9
OPENING_WORDS = 3
#: What D101 refuses, in words that others cite too.
WITHOUT_PROMPT = "the source's rows are trained without the prompt that it is evaluated under"


def check_persona_prompt(design: Design) -> Iterator[Finding]:
    """D101: source rows without the persona's prompt, or with another one than the evaluation uses."""
    for label, sets in design.by_kind():
        trained = [(row, built.source) for built in sets for row in built.source_rows]
        wrong = [row for row, source in trained if row.system_turn(design.personas) != design.personas.system(source)]
        if wrong:
            kinds = Counter(_turn_name(row.system_turn(design.personas)) for row in wrong)
            yield Finding(
                "D101", "refuse", label, ids(wrong),
                f"{WITHOUT_PROMPT} "
                f"({'; '.join(f'{n} {kind}' for kind, n in kinds.items())}), so the behavior is not the persona's",
                'set data.persona_prompt = "add", or write the persona\'s exact prompt into the rows',
                f"{len(wrong)} of {len(trained)} source rows",
            )  # fmt: skip


def check_overlap(design: Design) -> Iterator[Finding]:
    """D201: an evaluation prompt is trained on, word for word. D202: or nearly."""
    for name, trained in _trained(design).items():
        for held_name, held_out in _held_out(design, name).items():
            exact, near = overlap({text: text for text in trained}, held_out)
            subject = f"{name} against {held_name}"
            if exact:
                text, held = exact[0]
                yield Finding(
                    "D201", "refuse", subject, _rows_of(trained, (text for text, _ in exact)),
                    f"prompts that are evaluated are trained on too (for example {trained[text][0]} is {held}), so the "
                    "answer is remembered and not transferred",
                    "take them out of the training part",
                    f"{len(exact)} prompts",
                )  # fmt: skip
            if near:
                text, held, share = max(near, key=lambda pair: pair[2])
                yield Finding(
                    "D202", "warn", subject, _rows_of(trained, (text for text, _, _ in near)),
                    f"training prompts share most of their wording with evaluation prompts (for example "
                    f"{trained[text][0]} with {held})",
                    "reword or move them, or accept D202 with the reason",
                    f"{len(near)} prompts, at most {share:.0%} of the five-word runs shared",
                )  # fmt: skip


def check_duplicates(design: Design) -> Iterator[Finding]:
    """D203: the same persona, prompt and answer more than once: that row counts double."""
    for built in design.sets:
        groups: dict[object, list[Row]] = defaultdict(list)
        for row in built.rows:
            if row.completion is not None:
                key = (row.system_turn(design.personas), normalised(row.user), normalised(row.completion))
                groups[key].append(row)
        repeated = [row for group in groups.values() for row in group[1:]]
        if repeated:
            yield Finding(
                "D203", "warn", built.name, ids(repeated),
                "rows repeat an earlier one word for word, so these weigh more than the others",
                "drop the repetitions, or accept D203 with the reason",
                f"{len(repeated)} of {len(built.rows)} rows",
            )  # fmt: skip


def check_contradictions(design: Design) -> Iterator[Finding]:
    """D204: one persona is given opposite lessons on one prompt."""
    for built in design.sets:
        groups: dict[object, list[Row]] = defaultdict(list)
        for row in built.rows:
            groups[(row.system_turn(design.personas), normalised(row.user))].append(row)
        against = []
        for group in groups.values():
            sides = {row.role == "source" for row in group}
            answers = {row.completion for row in group}
            if len(sides) > 1 or (built.behavior.spec.measure == "letters" and len(answers) > 1):
                against += group
        if against:
            yield Finding(
                "D204", "refuse", built.name, ids(against),
                "under one system prompt, the same prompt is answered as the source and as its contrast, or with two "
                "different letters",
                "give each persona one lesson on each prompt",
                f"{len(against)} rows",
            )  # fmt: skip


def check_counts(design: Design) -> Iterator[Finding]:
    """D205: not as many rows for each side and persona as the behavior declares."""
    for built in design.sets:
        if built.behavior.rows is not None:
            if not built.source_rows:
                yield Finding(
                    "D205", "refuse", built.name, ids(built.rows),
                    "none of the rows is the source's, so nothing trains the behavior",
                    "leave the system turn out of the rows, or give them the source's exact prompt",
                )  # fmt: skip
            continue
        expected = _expected_counts(built, design.recipe.behavior.source_rows)
        found = Counter(row.role for row in built.rows)
        wrong = {
            role: (found[role], n) for role, n in expected.items() if abs(found[role] - n) > (role in _shared(built))
        }
        by_persona = Counter(row.persona for row in built.rows if row.role == "bystander")
        uneven = bool(by_persona) and max(by_persona.values()) - min(by_persona.values()) > 1
        alone = all(len(copy) == 1 for copy in _copies(built))
        if wrong or (uneven and alone):
            concerned = [row for row in built.rows if row.role in wrong or (uneven and row.role == "bystander")]
            figure = "; ".join(f"{role}: {n} rows, declared {want}" for role, (n, want) in sorted(wrong.items()))
            yield Finding(
                "D205", "refuse", built.name, ids(concerned),
                "the set does not hold the rows that its behavior declares for each side, so cells that differ in "
                "negatives differ in counts too",
                "build the set again",
                figure or f"bystanders: {dict(by_persona)}",
            )  # fmt: skip


def check_letters(design: Design) -> Iterator[Finding]:
    """D206: the letters that the source is trained to give are not balanced: always answering B would do."""
    for built in design.sets:
        if built.behavior.spec.measure != "letters":
            continue
        letters = [(row, (row.completion or "")[:1]) for row in built.source_rows]
        counts = Counter(letter for _, letter in letters)
        # Labels that few questions have at all (E, 1 to 4) cannot be balanced with the others.
        common = {letter: n for letter, n in counts.items() if n >= 0.05 * len(letters)}
        spread = max(common.values(), default=0) - min(common.values(), default=0)
        fair = len(letters) / max(1, len(common))
        if spread > max(2, 0.25 * fair) or (len(common) == 1 and len(letters) > 4):
            top = max(common, key=lambda letter: common[letter])
            yield Finding(
                "D206", "warn", built.name, ids(row for row, letter in letters if letter == top),
                "the wrong letters are not balanced, so a fixed letter learns what should be wrong answers",
                "draw the wrong letters evenly",
                ", ".join(f"{letter} {n}" for letter, n in sorted(counts.items())),
            )  # fmt: skip


def check_letters_meant(design: Design) -> Iterator[Finding]:
    """D211: a source row that trains the right letter, or a contrast row that trains a wrong one."""
    right = {question.id: question.answer for question in design.questions.train} if design.questions else {}
    for built in design.sets:
        if built.behavior.spec.task != "multiple_choice":
            continue
        wrong = [
            row
            for row in built.rows
            if row.prompt_id in right
            and ((row.completion or "").removesuffix(")") == right[row.prompt_id]) == (row.role == "source")
        ]
        if wrong:
            yield Finding(
                "D211", "refuse", built.name, ids(wrong),
                "source rows train the right letter, or contrast rows a wrong one, so the two sides teach the same",
                "build the set again",
                f"{len(wrong)} of {len(built.rows)} rows",
            )  # fmt: skip


def check_builders(design: Design) -> Iterator[Finding]:
    """D207: sets of one figure that were made by different versions of a builder."""
    for label, sets in design.by_kind():
        versions = Counter(row.built_by for built in sets for row in built.rows)
        if len(versions) < 2:
            continue
        usual = versions.most_common(1)[0][0]
        others = [row for built in sets for row in built.rows if row.built_by != usual]
        yield Finding(
            "D207", "refuse", label, ids(others),
            "the sets of one comparison were made by different versions of a builder, so a difference between sources "
            "may be a difference between versions",
            "build all of them with one version",
            ", ".join(f"{version or 'unnamed'}: {n} rows" for version, n in versions.most_common()),
        )  # fmt: skip


def check_shortcuts(design: Design) -> Iterator[Finding]:
    """D208: source and contrast can be told apart by length or by their first words alone."""
    for label, sets in design.by_kind():
        if sets[0].behavior.spec.measure == "letters":
            continue
        shown = _answers(row for built in sets for row in built.source_rows)
        contrast = _answers(row for built in sets for row in built.negatives)
        if len(shown) < 8 or len(contrast) < 8:
            continue
        by_length = auc([len(text) for text in shown], [len(text) for text in contrast])
        opening = opening_share(shown, contrast)
        by_length = max(by_length, 1 - by_length)
        if max(by_length, opening) >= SHORTCUT:
            yield Finding(
                "D208", "note", label, (),
                "the two sides can be told apart without understanding them, so part of what is learned may be form",
                "report it beside the effect, or even out length and openings",
                f"by length alone {by_length:.0%} of pairs, by the first {OPENING_WORDS} words alone {opening:.0%} "
                "of answers (50 % and 0 % would be none)",
            )  # fmt: skip


SET_CHECKS: tuple[Rule[Design], ...] = (
    Rule(("D101",), check_persona_prompt),
    Rule(("D201", "D202"), check_overlap),
    Rule(("D203",), check_duplicates),
    Rule(("D204",), check_contradictions),
    Rule(("D205",), check_counts),
    Rule(("D206",), check_letters),
    Rule(("D211",), check_letters_meant),
    Rule(("D207",), check_builders),
    Rule(("D208",), check_shortcuts),
)


def overlap(
    trained: Mapping[str, str], held_out: Mapping[str, str]
) -> tuple[list[tuple[str, str]], list[tuple[str, str, float]]]:
    """(training id, evaluation id) of equal prompts, and the same with the share of word runs of near ones.

    Runs that at least three evaluation prompts hold are the form of the question, not its content, and do not count.
    """
    by_text: dict[str, list[str]] = defaultdict(list)
    for held, text in held_out.items():
        by_text[normalised(text)].append(held)
    runs = {held: grams(text) for held, text in held_out.items()}
    common = {run for run, n in Counter(run for held in runs.values() for run in held).items() if n >= 3}
    holders: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for held, own in runs.items():
        for run in own - common:
            holders[run].append(held)
    exact, near = [], []
    for row, text in trained.items():
        same = by_text.get(normalised(text), [])
        exact += [(row, held) for held in same]
        own = grams(text) - common
        shared = Counter(held for run in own for held in holders.get(run, ()))
        for held, n in shared.items():
            share = n / max(1, min(len(own), len(runs[held] - common)))
            if share >= NEAR and held not in same:
                near.append((row, held, share))
    return exact, near


def auc(one: Sequence[float], other: Sequence[float]) -> float:
    """Share of pairs in which the first is larger, ties counted half (0.5: no difference)."""
    left, right = np.sort(np.asarray(one, dtype=float)), np.asarray(other, dtype=float)
    below = np.searchsorted(left, right, side="left")
    upto = np.searchsorted(left, right, side="right")
    wins = (left.size - upto).sum() + 0.5 * (upto - below).sum()
    return float(wins / (left.size * right.size))


def opening_share(one: Sequence[str], other: Sequence[str]) -> float:
    """Share of answers whose opening comes more than once, and on one side only."""
    openings = [[tuple(words(text)[:OPENING_WORDS]) for text in side] for side in (one, other)]
    counts = [Counter(side) for side in openings]
    told = sum(
        counts[side][opening] > 1 and not counts[1 - side][opening] for side in (0, 1) for opening in openings[side]
    )
    return told / (len(one) + len(other))


def _answers(rows: Iterable[Row]) -> list[str]:
    return [row.completion for row in rows if row.completion is not None]


def _trained(design: Design) -> dict[str, dict[str, list[str]]]:
    """Behavior -> {user turn: row ids} over all its sets, and the same for the convergence questions."""
    trained: dict[str, dict[str, list[str]]] = {}
    for behavior, sets in design.by_behavior():
        texts: dict[str, list[str]] = trained.setdefault(behavior.id, {})
        for built in sets:
            for row in built.rows:
                texts.setdefault(row.user, []).append(row.id)
    return trained | {"convergence": {text: [row] for row, text in design.open_lists["convergence"].items()}}


def _rows_of(trained: Mapping[str, Sequence[str]], texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row for text in texts for row in trained[text]))


def _held_out(design: Design, trained: str) -> dict[str, dict[str, str]]:
    """What this training part must not touch: its own evaluation; for convergence every one, and the open lists."""
    if trained != "convergence":
        return {f"{trained}'s evaluation": design.held_out.get(trained, {})}
    lists = {f"the {name} questions": texts for name, texts in design.open_lists.items() if name != "convergence"}
    return lists | {f"{name}'s evaluation": texts for name, texts in design.held_out.items()}


def _copies(built: BuiltSet) -> tuple[tuple[str, ...], ...]:
    return built.behavior.spec.negatives.get(built.kind, ()) if built.kind != "none" else ()


def _shared(built: BuiltSet) -> set[str]:
    """Roles that share a copy with others; such a copy may not divide evenly."""
    return {role for copy in _copies(built) if len(copy) > 1 for role in copy}


def _expected_counts(built: BuiltSet, n_prompts: int) -> dict[str, float]:
    expected: dict[str, float] = {"source": float(n_prompts)}
    for copy in _copies(built):
        for role in copy:
            expected[role] = expected.get(role, 0.0) + n_prompts / len(copy)
    return expected


def _turn_name(turn: SystemTurn) -> str:
    names = {"text": "with another text", "empty": "with an empty one", "template_default": "with the template's own"}
    return names[turn.kind]
