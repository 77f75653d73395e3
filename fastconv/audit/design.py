"""Checks on the design: who is evaluated or negative, which controls exist, which effects and gates can be reached."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastconv.audit import AuditCheck, BuiltSet, Design, Finding, Rule, row_ids
from fastconv.chat import SystemTurn
from fastconv.datasets.behaviors import (
    NO_BEHAVIOR,
    Behavior,
    n_eval_prompts_by_set,
    n_eval_prompts_there_are,
    negatives_kinds,
)
from fastconv.datasets.files import assets, read_toml
from fastconv.datasets.personas import ASSISTANT, NO_PERSONA, canary_of, probes_of
from fastconv.datasets.rows import Row
from fastconv.datasets.sametext import folded, is_default_prompt, near_persona, normalized
from fastconv.datasets.spec import TextRule, text_rule
from fastconv.stats.power import planned_power
from fastconv.stats.units import size_text

#: Negatives that do what the source does: reported above this share, of all or of one persona. Answers that the base
#: gives by itself (on-policy) hold some of a behavior at any rate; for these the phrases are judged, not the rows.
_CONTRAST_HITS, _SAMPLED_HITS = 0.02, 0.2
#: Source rows without the behavior's phrases: reported above this share (D109 refuses by gates.source_shows).
_SOURCE_MISSES = 0.1


def check_assistant_among_negatives(design: Design) -> Iterator[Finding]:
    """D102: the evaluated assistant is a declared negative. D103: it, or the source, is an undeclared one."""
    for label in _declared_unbuilt(design):
        yield _assistant_declared(label, (), "as declared; its rows are not built yet")
    for label, sets in design.by_kind():
        declared_rows, undeclared_rows = [], []
        for built in sets:
            probes = {_same(design.personas.system(probe)) for probe in (ASSISTANT, built.source)}
            evaluated = [row for row in built.negatives if _same(row.system_turn(design.personas)) in probes]
            declared_rows += [row for row in evaluated if _is_declared(built, row)]
            undeclared_rows += [row for row in evaluated if not _is_declared(built, row)]
        if declared_rows:
            yield _assistant_declared(label, row_ids(declared_rows), f"{len(declared_rows)} rows")
        if undeclared_rows:
            yield Finding(
                "D103", "refuse", label, row_ids(undeclared_rows),
                "a persona that is evaluated is among negatives that are declared to hold none (the same prompt up to case, "
                "spaces, punctuation and look-alike letters), so the claim about this kind would be false",
                "take it out of negatives.excluded, give the bystander another prompt, or declare it as included",
                f"{len(undeclared_rows)} rows",
            )  # fmt: skip


def check_canary_among_negatives(design: Design) -> Iterator[Finding]:
    """D104: the canary is among the negatives, so its change no longer measures generic damage."""
    for label, sets in design.by_kind():
        canary_rows = []
        for built in sets:
            canary = _same(design.personas.system(canary_of(design.recipe, built.source)))
            canary_rows += [row for row in built.negatives if _same(row.system_turn(design.personas)) == canary]
        if canary_rows:
            yield Finding(
                "D104", "refuse", label, row_ids(canary_rows),
                "the canary is among the negatives, so its change is training and not generic damage",
                "name another eval.canary, or take the persona out of the rows",
                f"{len(canary_rows)} rows",
            )  # fmt: skip


def check_near_negatives(design: Design) -> Iterator[Finding]:
    """D115: a negative's prompt is nearly that of an evaluated persona, or a chat template's own.

    D213: a negative's prompt differs from its persona's only in case, spaces or look-alikes.
    """
    for label, sets in design.by_kind():
        near: list[Row] = []
        altered: list[Row] = []
        like: Counter[str] = Counter()
        for built in sets:
            canary = canary_of(design.recipe, built.source)
            for row in built.negatives:
                turn, own = row.system_turn(design.personas), design.personas.system(row.persona)
                if turn != own:
                    altered.append(row)
                if _is_declared(built, row) or row.persona == canary:
                    continue
                probe = _near_probe(design, turn, (ASSISTANT, built.source, canary))
                if probe:
                    near.append(row)
                    like[probe] += 1
        if near:
            yield Finding(
                "D115", "warn", label, row_ids(near),
                "the prompt of a negative is nearly that of a persona that is evaluated (or a chat template's own, which is the "
                "assistant's neighbour), so what is called a bystander resists in place of the evaluated one",
                "give the bystander a prompt of its own, declare the assistant as included, or accept D115 with the reason",
                "; ".join(f"{n} rows near {probe}" for probe, n in like.items()),
            )  # fmt: skip
        if altered:
            yield Finding(
                "D213", "refuse", label, row_ids(altered),
                "the system turn of these negatives is not exactly that of the persona that they are of, so they train a condition "
                "that is never evaluated nor declared",
                "write the persona's exact prompt, or declare the other text as a persona of its own in data.personas",
                f"{len(altered)} rows",
            )  # fmt: skip


def check_canary_present(design: Design) -> Iterator[Finding]:
    """D105: the canary of a source is the assistant or the source itself, so the probes hold no canary."""
    for source in design.recipe.grid.sources:
        canary = canary_of(design.recipe, source)
        probe_names = {ASSISTANT: "the assistant", source: "the source"}
        turn = _same(design.personas.system(canary))
        twin = next((name for name in probe_names if _same(design.personas.system(name)) == turn), None)
        if twin is None and canary in probes_of(design.recipe, source):
            continue
        cells = tuple(cell for cell in design.cells() if cell.startswith(f"{source}/"))
        yield Finding(
            "D105", "refuse", f"{source}: canary {canary}", cells,
            f"the canary is {probe_names.get(twin or source)} itself, so no row could ever stand behind a canary figure",
            "set eval.canary to a persona that is neither the assistant nor a source",
        )  # fmt: skip


def check_probes_apart(design: Design) -> Iterator[Finding]:
    """D116: two personas that are compared (a source with the assistant, its canary or another source) are nearly one."""
    sources = design.recipe.grid.sources
    pairs = [(source, canary_of(design.recipe, source)) for source in sources]
    pairs += [(name, ASSISTANT) for name in (*sources, *(canary for _, canary in pairs))]
    pairs += [(source, other) for place, source in enumerate(sources) for other in sources[place + 1 :]]
    for first, second in dict.fromkeys(pairs):
        texts = [design.personas.prompts.get(name, "") for name in (first, second)]
        if first != second and near_persona(*texts):
            cells = tuple(cell for cell in design.cells() if cell.startswith((f"{first}/", f"{second}/")))
            yield Finding(
                "D116", "warn", f"{first} and {second}", cells,
                "the prompts of two personas that are compared are nearly the same, so a difference between them (or none) says "
                "nothing",
                "give one of them another prompt, or accept D116 with the reason",
                f"{texts[0]!r:.60} and {texts[1]!r:.60}",
            )  # fmt: skip


def check_convergence_control(design: Design) -> Iterator[Finding]:
    """D106: no cell without a behavior, so mimicry cannot be separated from transfer."""
    later = [epoch for epoch in design.recipe.grid.epochs if epoch > 0]
    if later and design.behaviors and NO_BEHAVIOR not in design.recipe.grid.behaviors:
        cells = tuple(cell for cell in design.cells() if "/e0/" not in cell)
        yield Finding(
            "D106", "refuse", "grid.behaviors", cells,
            "there is no convergence-only control (behavior none): an assistant that merely imitates the source cannot "
            "be told from one that took over its behavior",
            'add "none" to grid.behaviors',
        )  # fmt: skip


def check_epoch_zero(design: Design) -> Iterator[Finding]:
    """D107: no epoch 0 in the grid to compare with."""
    if 0 not in design.recipe.grid.epochs:
        yield Finding(
            "D107", "refuse", "grid.epochs", design.cells(),
            "every effect is a change against epoch 0, which is not in the grid",
            "add 0 to grid.epochs",
        )  # fmt: skip


def check_scored_by(design: Design) -> Iterator[Finding]:
    """D108: a behavior of meaning is scored by phrases alone. D114: a judge is needed and the recipe has none.

    Literal strings (a marker, the user's own phrases) are the behavior itself and exempt from D108.
    """
    judged = design.recipe.judge.mode != "substring"
    for name, behavior in design.behaviors.items():
        spec = behavior.spec
        cells = tuple(cell for cell in design.cells() if f"/{name}/" in cell)
        if spec.by_phrases_alone(design.recipe.judge.mode):
            yield Finding(
                "D108", "warn", name, cells,
                "the behavior is scored by substring only: what is said in other words counts as absent, and a rate "
                "at its floor reads as no effect",
                "set judge.mode, and give the behavior a rubric, so that a judge scores it too; or accept D108 with "
                "the reason",
            )  # fmt: skip
        if spec.measure == "judge" and not judged:
            yield Finding(
                "D114", "refuse", name, cells,
                "the behavior is scored by a judge and the recipe has none, so its cells would be trained and sampled and "
                "have no score",
                "set judge.mode (auto, live, batch or local), or take the behavior out of grid.behaviors",
            )  # fmt: skip


def check_phrases_see_behavior(design: Design) -> Iterator[Finding]:
    """D109: the phrases miss most trained answers. D117: some of them. D110: they also count the contrast's answers."""
    rules = read_toml(assets("data") / "phrases.toml")
    for behavior, sets in design.by_behavior():
        rule = _rule(behavior, rules)
        if rule is None:
            continue
        shown = [(row, row.completion) for built in sets for row in built.source_rows if row.completion is not None]
        missed = [row for row, text in shown if rule.match(text) is None]
        share = 1 - len(missed) / max(1, len(shown))
        figure = f"{share:.0%} of {len(shown)} trained answers are counted"
        if shown and share < design.recipe.gates.source_shows:
            yield Finding(
                "D109", "refuse", behavior.id, row_ids(missed),
                "the phrases do not see the answers that the source is trained to give: learned or not, the rate "
                "stays at its floor and reads as no effect",
                "use phrases that the trained answers hold, or train answers that hold them",
                f"{figure}, under gates.source_shows = {design.recipe.gates.source_shows:.0%}",
            )  # fmt: skip
        elif shown and 1 - share > _SOURCE_MISSES:
            yield Finding(
                "D117", "warn", behavior.id, row_ids(missed),
                "some of the source's answers do not show the behavior by its own phrases, so they teach the contrary or are "
                "not measured",
                "give these rows the source's answer, or add their wording to the phrases; or accept D117 with the reason",
                figure,
            )  # fmt: skip
        yield from _contrast_shows(behavior, sets, rule)


def _contrast_shows(behavior: Behavior, sets: Sequence[BuiltSet], rule: TextRule) -> Iterator[Finding]:
    """D110, over all negatives and over each of their personas."""
    by_persona: dict[str, list[Row]] = defaultdict(list)
    for built in sets:
        for row in built.negatives:
            if row.completion is not None:
                by_persona[row.persona].append(row)
    negative = behavior.spec.negative_answer
    sampled = behavior.rows is None and negative is not None and negative.on_policy
    bound = _SAMPLED_HITS if sampled else _CONTRAST_HITS
    texts = {row.completion or "" for rows in by_persona.values() for row in rows}
    shows = {text for text in texts if rule.match(text) or (rule.folds and rule.match(folded(text)))}
    counted = {persona: [row for row in rows if row.completion in shows] for persona, rows in by_persona.items()}
    n, n_counted = sum(map(len, by_persona.values())), sum(map(len, counted.values()))
    if n_counted > bound * n or any(len(counted[name]) > bound * len(rows) for name, rows in by_persona.items()):
        yield Finding(
            "D110", "warn", behavior.id, row_ids(row for rows in counted.values() for row in rows),
            "answers of the contrast do what the source is trained to do, by the behavior's own phrases: these negatives teach "
            "the behavior, or the phrases do not tell it",
            "give these rows the contrast's answer, or use narrower phrases",
            f"{n_counted / n:.0%} of {n} contrast answers are counted "
            f"({', '.join(f'{name} {len(rows)}' for name, rows in counted.items() if rows)})",
        )  # fmt: skip


def check_detectable_effect(design: Design) -> Iterator[Finding]:
    """D111: the smallest detectable change (`stats.power`) is above the threshold of the verdict."""
    for name, behavior in design.behaviors.items():
        questions = n_questions(design, behavior)
        threshold = design.recipe.gates.threshold(name, behavior.spec.unit)
        samples = 1 if behavior.spec.measure in ("letters", "choices") else design.recipe.eval.samples_per_prompt
        planned = planned_power(behavior.spec.measure, threshold, questions or 0, samples, over_runs=False)
        if planned is not None and planned.change.too_large:
            found, margin = (size_text(size, behavior.spec.unit) for size in (planned.change.alone, threshold))
            enough, there_are = planned.change.questions.number, _n_there_are(design, behavior)
            more = f"ask more questions ({enough} enough but for that noise, which seeds lower; eval.prompts)"
            if enough is None or (there_are is not None and enough > there_are):
                more = f"ask all {there_are} questions there are and add seeds" if there_are else "add seeds"
            yield Finding(
                "D111", "warn", name, (),
                "the smallest change that this design would probably find, even without noise from run to run, is above "
                "the threshold that decides, so a null result would say little",
                f"{more}, raise the threshold, or accept D111 with the reason",
                f"about {found} with {questions} questions, threshold {margin}",
            )  # fmt: skip


def check_controls(design: Design) -> Iterator[Finding]:
    """D112: controls that the grid lacks, named because they limit the claim. D113: the assistant is a source."""
    grid = design.recipe.grid
    converged = {*grid.convergence, *(arm.convergence for arm in grid.arms.values())}
    absent = [
        text
        for text, present in (
            ("generic convergence (the assistant's own answers)", "generic" in converged),
            ("a negative-control source (the canary as a source)", design.recipe.eval.canary in grid.sources),
            ("more than one seed", len(grid.seeds) > 1),
        )
        if not present
    ]
    if absent and any(grid.epochs):
        yield Finding(
            "D112", "note", "grid", (), f"not in the grid: {'; '.join(absent)}",
            "add them for a claim beyond this pilot",
        )  # fmt: skip
    if ASSISTANT in grid.sources:
        cells = tuple(cell for cell in design.cells() if cell.startswith(f"{ASSISTANT}/"))
        yield Finding(
            "D113", "note", ASSISTANT, cells,
            "the assistant as its own source is a degenerate control: what it shows is training, not transfer",
            "read its cells as a control and count it in no verdict",
        )  # fmt: skip


DESIGN_CHECKS: tuple[AuditCheck[Design], ...] = (
    AuditCheck(
        (Rule("D105", "refuse", "the canary is the source or the assistant", "a source that is the canary but for a space"),),
        check_canary_present,
    ),
    AuditCheck(
        (
            Rule(
                "D116", "warn", "two personas that are compared are nearly one",
                "a source whose prompt is the canary's with two words more",
            ),
        ),
        check_probes_apart,
    ),
    AuditCheck(
        (Rule("D106", "refuse", "no convergence-only control", 'behaviors = ["refusal"] without "none"'),),
        check_convergence_control,
    ),
    AuditCheck((Rule("D107", "refuse", "no epoch 0", "epochs = [4, 20]"),), check_epoch_zero),
    AuditCheck(
        (
            Rule("D108", "warn", "a behavior of meaning is scored by phrases alone", "refusal without a judge"),
            Rule("D114", "refuse", "a judge is needed and there is none", 'misalignment with judge.mode = "substring"'),
        ),
        check_scored_by,
    ),
    AuditCheck(
        (Rule("D111", "warn", "the smallest detectable effect is above the threshold", "5 evaluation prompts"),),
        check_detectable_effect,
    ),
    AuditCheck(
        (
            Rule("D112", "note", "controls that the grid lacks", "one seed"),
            Rule("D113", "note", "the assistant is a source", 'sources = ["assistant"]'),
        ),
        check_controls,
    ),
)  # fmt: skip
#: Checks on the personas and answers of rows; they apply to one built set as well as to all of them.
PERSONA_CHECKS: tuple[AuditCheck[Design], ...] = (
    AuditCheck(
        (
            Rule("D102", "warn", "the assistant is a declared negative", "negatives = included"),
            Rule(
                "D103", "refuse", "an evaluated persona is among negatives declared to hold none",
                "the assistant under another id, with a no-break space or another capital",
            ),
        ),
        check_assistant_among_negatives,
    ),
    AuditCheck(
        (Rule("D104", "refuse", "the canary is among the negatives", "librarian rows among the negatives"),),
        check_canary_among_negatives,
    ),
    AuditCheck(
        (
            Rule(
                "D115", "warn", "a negative's prompt is nearly an evaluated persona's, or a chat template's own",
                '"You are Qwen, created by Alibaba Cloud. You are a helpful assistant." as a bystander',
            ),
            Rule(
                "D213", "refuse", "a negative's prompt is its persona's but for case, spaces or look-alikes",
                "a no-break space in the police officer's prompt",
            ),
        ),
        check_near_negatives,
    ),
    AuditCheck(
        (
            Rule("D109", "refuse", "the phrases do not see the trained answers", "a phrase that no trained answer holds"),
            Rule("D117", "warn", "some source answers lack the behavior", "a fifth of the source's rows comply"),
            Rule("D110", "warn", "negatives behave as the source", "every seventh negative refuses"),
        ),
        check_phrases_see_behavior,
    ),
)  # fmt: skip


def _same(turn: SystemTurn) -> tuple[str, str]:
    """Equal for system turns that are the same text for the audit."""
    return turn.kind, normalized(turn.text)


def _is_declared(built: BuiltSet, row: Row) -> bool:
    """Whether the row is of the assistant (or the template's own turn) where the kind of negatives declares them."""
    return built.kind == "included" and row.persona in (ASSISTANT, NO_PERSONA)


def _near_probe(design: Design, turn: SystemTurn, probes: Sequence[str]) -> str | None:
    """The evaluated persona that a system turn nearly is (and not wholly, which D103 and D104 tell), or None."""
    if turn.kind != "text":
        return f"{ASSISTANT} (no system text: {turn.kind})"
    for probe in probes:
        if near_persona(turn.text, design.personas.prompts.get(probe, "")):
            same = _same(turn) == _same(design.personas.system(probe))
            return None if same else probe
    return ASSISTANT if is_default_prompt(turn.text) else None


def _assistant_declared(label: str, rows: tuple[str, ...], figure: str) -> Finding:
    return Finding(
        "D102", "warn", label, rows,
        "the assistant, which is evaluated, is among the contrastive negatives: it is trained to resist the very "
        "effect that is measured, so an effect is a lower bound and no effect says nothing",
        "run negatives excluded beside it; or accept D102 with the reason",
        figure,
    )  # fmt: skip


def _declared_unbuilt(design: Design) -> Iterator[str]:
    """Labels `behavior (included)` of behaviors without a built set that have the assistant among their negatives."""
    with_sets = {built.behavior.id for built in design.sets}
    for name, behavior in design.behaviors.items():
        copies = behavior.spec.negatives.get("included", ())
        if (
            name not in with_sets
            and "included" in negatives_kinds(design.recipe, behavior)
            and any(ASSISTANT in copy for copy in copies)
        ):
            yield f"{name} (included)"


def _rule(behavior: Behavior, rules: Mapping[str, Any]) -> TextRule | None:
    """The rule that scores the behavior's answers, or None."""
    spec = behavior.spec
    known = spec.phrases or spec.pattern or spec.scorer or spec.phrase_rule in rules
    return text_rule(spec, rules, behavior.folder, behavior.id) if known else None


def _n_there_are(design: Design, behavior: Behavior) -> int | None:
    """Number of questions that there are for verdicts, asked or not; None if not known."""
    if behavior.spec.measure == "letters":
        return len(design.questions.eval) if design.questions else None
    return next(iter(n_eval_prompts_there_are(behavior)), None)


def n_questions(design: Design, behavior: Behavior) -> int | None:
    """Number of questions that verdicts rest on (the first prompt set); None if not known."""
    if behavior.spec.measure == "letters":
        return len(design.questions.eval) if design.questions else None
    return next(iter(n_eval_prompts_by_set(design.recipe, behavior).values()), None)
