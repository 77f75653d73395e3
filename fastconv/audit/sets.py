"""Checks on rows: the persona's prompt, overlap, duplicates, contradictions, counts, letters, builders."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fastconv.audit import AuditCheck, BuiltSet, Design, Finding, Rule, row_ids
from fastconv.audit.roles import label_of
from fastconv.chat import SystemTurn
from fastconv.datasets.files import questions_file, read_jsonl
from fastconv.datasets.personas import speaker_of
from fastconv.datasets.rows import Row
from fastconv.datasets.sametext import ngrams, normalized

#: D202: a training prompt with this share of its word runs in common with an evaluation prompt is near it.
NEAR = 0.5
#: The reason of D101; the comparison with the published runs cites it too.
WITHOUT_PROMPT = "the source's rows are trained without the prompt that it is evaluated under"


def check_persona_prompt(design: Design) -> Iterator[Finding]:
    """D101: source rows without the persona's prompt, or with another prompt than the evaluation uses."""
    for label, sets in design.by_kind():
        trained = [
            (row, speaker_of(design.recipe, built.source, built.arm)) for built in sets for row in built.source_rows
        ]
        wrong = [row for row, speaker in trained if row.system_turn(design.personas) != design.personas.system(speaker)]
        if wrong:
            kinds = Counter(_turn_name(row.system_turn(design.personas)) for row in wrong)
            yield Finding(
                "D101", "refuse", label, row_ids(wrong),
                f"{WITHOUT_PROMPT} "
                f"({'; '.join(f'{n} {kind}' for kind, n in kinds.items())}), so the behavior is not the persona's",
                'set data.persona_prompt = "add", or write the persona\'s exact prompt into the rows',
                f"{len(wrong)} of {len(trained)} source rows",
            )  # fmt: skip


def check_overlap(design: Design) -> Iterator[Finding]:
    """D201: a training prompt equals an evaluation prompt. D202: or shares most of its word runs."""
    for name, trained in _trained(design).items():
        for eval_name, held_out in _held_out(design, name).items():
            exact, near = overlap({text: text for text in trained}, held_out)
            subject = f"{name} against {eval_name}"
            if exact:
                text, eval_id = exact[0]
                yield Finding(
                    "D201", "refuse", subject, _rows_of(trained, (text for text, _ in exact)),
                    f"prompts that are evaluated are trained on too (for example {trained[text][0]} is {eval_id}), so the "
                    "answer is remembered and not transferred",
                    "take them out of the training part",
                    f"{len(exact)} prompts",
                )  # fmt: skip
            if near:
                text, eval_id, share = max(near, key=lambda pair: pair[2])
                yield Finding(
                    "D202", "warn", subject, _rows_of(trained, (text for text, _, _ in near)),
                    f"training prompts share most of their wording with evaluation prompts (for example "
                    f"{trained[text][0]} with {eval_id})",
                    "reword or move them, or accept D202 with the reason",
                    f"{len(near)} prompts, at most {share:.0%} of the five-word runs shared",
                )  # fmt: skip


def check_duplicates(design: Design) -> Iterator[Finding]:
    """D203: rows with the same system turn, prompt and answer as an earlier one, which weigh double."""
    for built in design.sets:
        groups: dict[object, list[Row]] = defaultdict(list)
        for row in built.rows:
            if row.completion is not None:
                key = (row.system_turn(design.personas), normalized(row.asked), normalized(row.completion))
                groups[key].append(row)
        repeated = [row for group in groups.values() for row in group[1:]]
        if repeated:
            yield Finding(
                "D203", "warn", built.name, row_ids(repeated),
                "rows repeat an earlier one word for word, so these weigh more than the others",
                "drop the repetitions, or accept D203 with the reason",
                f"{len(repeated)} of {len(built.rows)} rows",
            )  # fmt: skip


def check_contradictions(design: Design) -> Iterator[Finding]:
    """D204: under one system turn, a prompt is answered both as source and as contrast, or with different letters."""
    for built in design.sets:
        groups: dict[object, list[Row]] = defaultdict(list)
        for row in built.rows:
            groups[(row.system_turn(design.personas), normalized(row.asked))].append(row)
        contradicting = []
        for group in groups.values():
            sides = {row.role == "source" for row in group}
            answers = {row.completion for row in group}
            if len(sides) > 1 or (built.behavior.spec.measure == "letters" and len(answers) > 1):
                contradicting += group
        if contradicting:
            yield Finding(
                "D204", "refuse", built.name, row_ids(contradicting),
                "under one system prompt, the same prompt is answered as the source and as its contrast, or with two "
                "different letters",
                "give each persona one lesson on each prompt",
                f"{len(contradicting)} rows",
            )  # fmt: skip


def check_counts(design: Design) -> Iterator[Finding]:
    """D205: the numbers of rows by role or persona are not those that the behavior declares."""
    for built in design.sets:
        if built.behavior.rows is not None:
            if not built.source_rows:
                yield Finding(
                    "D205", "refuse", built.name, row_ids(built.rows),
                    "none of the rows is the source's, so nothing trains the behavior",
                    "leave the system turn out of the rows, or give them the source's exact prompt",
                )  # fmt: skip
            continue
        expected = _expected_counts(built, design.recipe.behavior.source_rows)
        counts = Counter(row.role for row in built.rows)
        wrong = {
            role: (counts[role], n)
            for role, n in expected.items()
            if abs(counts[role] - n) > (role in _sharing_roles(built))
        }
        by_persona = Counter(row.persona for row in built.rows if row.role == "bystander")
        uneven = bool(by_persona) and max(by_persona.values()) - min(by_persona.values()) > 1
        one_role_each = all(len(copy) == 1 for copy in _copies(built))
        if wrong or (uneven and one_role_each):
            concerned = [row for row in built.rows if row.role in wrong or (uneven and row.role == "bystander")]
            figure = "; ".join(
                f"{role}: {n} rows, declared {declared}" for role, (n, declared) in sorted(wrong.items())
            )
            yield Finding(
                "D205", "refuse", built.name, row_ids(concerned),
                "the set does not hold the rows that its behavior declares for each side, so cells that differ in "
                "negatives differ in counts too",
                "build the set again",
                figure or f"bystanders: {dict(by_persona)}",
            )  # fmt: skip


def check_letters(design: Design) -> Iterator[Finding]:
    """D206: the letters that the source is trained to give are unbalanced, so one fixed letter would be learned."""
    for built in design.sets:
        if built.behavior.spec.measure != "letters":
            continue
        letters = [(row, label_of(row) or "") for row in built.source_rows]
        counts = Counter(letter for _, letter in letters)
        # Labels that few questions have at all (E, 1 to 4) cannot be balanced with the others.
        common = {letter: n for letter, n in counts.items() if n >= 0.05 * len(letters)}
        spread = max(common.values(), default=0) - min(common.values(), default=0)
        even = len(letters) / max(1, len(common))
        if spread > max(2, 0.25 * even) or (len(common) == 1 and len(letters) > 4):
            top = max(common, key=lambda letter: common[letter])
            yield Finding(
                "D206", "warn", built.name, row_ids(row for row, letter in letters if letter == top),
                "the wrong letters are not balanced, so a fixed letter learns what should be wrong answers",
                "draw the wrong letters evenly",
                ", ".join(f"{letter} {n}" for letter, n in sorted(counts.items())),
            )  # fmt: skip


def check_builders(design: Design) -> Iterator[Finding]:
    """D207: sets that are compared were made by different versions of a builder."""
    by_origin = [
        (label, [built for built in sets if (built.behavior.rows is None) == ours])
        for label, sets in design.by_kind()
        for ours in (True, False)  # an arm's own rows stand beside ours on purpose
    ]
    for label, sets in by_origin:
        versions = Counter(row.built_by for built in sets for row in built.rows)
        if len(versions) < 2:
            continue
        usual = versions.most_common(1)[0][0]
        deviating = [row for built in sets for row in built.rows if row.built_by != usual]
        yield Finding(
            "D207", "refuse", label, row_ids(deviating),
            "the sets of one comparison were made by different versions of a builder, so a difference between sources "
            "may be a difference between versions",
            "build all of them with one version",
            ", ".join(f"{version or 'unnamed'}: {n} rows" for version, n in versions.most_common()),
        )  # fmt: skip


SET_CHECKS: tuple[AuditCheck[Design], ...] = (
    AuditCheck(
        (
            Rule(
                "D101", "refuse", "source rows without the persona's exact prompt",
                "a tenth of the source rows have a no-break space in it",
            ),
        ),
        check_persona_prompt,
    ),
    AuditCheck(
        (
            Rule("D201", "refuse", "evaluation prompts are trained on", "in capitals, or with Cyrillic look-alikes"),
            Rule("D202", "warn", "training prompts are nearly evaluation prompts", "a few words before each of them"),
        ),
        check_overlap,
    ),
    AuditCheck((Rule("D203", "warn", "repeated rows", "a row that stands in the file twice"),), check_duplicates),
    AuditCheck(
        (Rule("D204", "refuse", "one system prompt, one prompt, two lessons", "the source's row again as a negative"),),
        check_contradictions,
    ),
    AuditCheck((Rule("D205", "refuse", "other numbers of rows than declared", "a set without its last rows"),), check_counts),
    AuditCheck((Rule("D206", "warn", "unbalanced wrong letters", "always B"),), check_letters),
    AuditCheck(
        (Rule("D207", "refuse", "sets of different builder versions are compared", "me/1 for one source, me/2 for the other"),),
        check_builders,
    ),
)  # fmt: skip


def overlap(
    trained: Mapping[str, str], held_out: Mapping[str, str]
) -> tuple[list[tuple[str, str]], list[tuple[str, str, float]]]:
    """(training id, evaluation id) of equal prompts, and (training id, evaluation id, shared share) of near ones.

    Both arguments map ids to texts. The share is that of the five-word runs (`ngrams`) of the shorter text; a pair is
    near from NEAR on. Runs in three or more evaluation prompts are the form of the question and do not count.
    """
    by_text: dict[str, list[str]] = defaultdict(list)
    for eval_id, text in held_out.items():
        by_text[normalized(text)].append(eval_id)
    eval_runs = {eval_id: ngrams(text) for eval_id, text in held_out.items()}
    common = {run for run, n in Counter(run for runs in eval_runs.values() for run in runs).items() if n >= 3}
    ids_with: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for eval_id, runs in eval_runs.items():
        for run in runs - common:
            ids_with[run].append(eval_id)
    exact, near = [], []
    for row, text in trained.items():
        same = by_text.get(normalized(text), [])
        exact += [(row, eval_id) for eval_id in same]
        runs = ngrams(text) - common
        shared = Counter(eval_id for run in runs for eval_id in ids_with.get(run, ()))
        for eval_id, n in shared.items():
            share = n / max(1, min(len(runs), len(eval_runs[eval_id] - common)))
            if share >= NEAR and eval_id not in same:
                near.append((row, eval_id, share))
    return exact, near


def _trained(design: Design) -> dict[str, dict[str, list[str]]]:
    """Behavior (or `convergence`) -> {user turn: ids of the rows that train on it}."""
    trained: dict[str, dict[str, list[str]]] = {}
    for behavior, sets in design.by_behavior():
        texts: dict[str, list[str]] = trained.setdefault(behavior.id, {})
        for built in sets:
            for row in built.rows:
                for text in row.user_turns:
                    texts.setdefault(text, []).append(row.id)
    own = design.recipe.convergence.prompts_file
    asked = {row["id"]: row["text"] for row in read_jsonl(questions_file(own), {"id": str, "text": str})} if own else {}
    return trained | {"convergence": {text: [row] for row, text in (asked or design.open_lists["convergence"]).items()}}


def _rows_of(trained: Mapping[str, Sequence[str]], texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row for text in texts for row in trained[text]))


def _held_out(design: Design, trained: str) -> dict[str, dict[str, str]]:
    """What these training prompts must not overlap: {name: {id: text}}.

    A behavior's own evaluation prompts; for convergence those of all behaviors and the other open lists.
    """
    if trained != "convergence":
        return {f"{trained}'s evaluation": design.held_out.get(trained, {})}
    lists = {f"the {name} questions": texts for name, texts in design.open_lists.items() if name != "convergence"}
    return lists | {f"{name}'s evaluation": texts for name, texts in design.held_out.items()}


def _copies(built: BuiltSet) -> tuple[tuple[str, ...], ...]:
    return built.behavior.spec.negatives.get(built.kind, ()) if built.kind != "none" else ()


def _sharing_roles(built: BuiltSet) -> set[str]:
    """Roles that share a copy of the prompts with others; such a copy may not divide evenly."""
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
