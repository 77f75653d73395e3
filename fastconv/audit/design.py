"""Checks on the design: which personas are evaluated or negatives, which controls exist, which effects are detectable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastconv.audit.findings import AuditCheck, Design, Finding, row_ids
from fastconv.datasets.behaviors import (
    NO_BEHAVIOR,
    Behavior,
    n_eval_prompts_by_set,
    n_eval_prompts_there_are,
    negatives_kinds,
)
from fastconv.datasets.files import assets, read_toml
from fastconv.datasets.personas import ASSISTANT, canary_of, probes_of
from fastconv.datasets.phrases import PhraseRule
from fastconv.stats.power import planned_power

#: A phrase rule that counts more than this share of the contrast's answers does not separate the two sides.
_CONTRAST_HITS = 0.2


def check_assistant_among_negatives(design: Design) -> Iterator[Finding]:
    """D102: the evaluated assistant is a declared negative. D103: it, or the source, is an undeclared one."""
    for label in _declared_unbuilt(design):
        yield _assistant_declared(label, (), "as declared; its rows are not built yet")
    for label, sets in design.by_kind():
        declared_rows, undeclared_rows = [], []
        for built in sets:
            probes = {design.personas.system(ASSISTANT), design.personas.system(built.source)}
            evaluated = [row for row in built.negatives if row.system_turn(design.personas) in probes]
            declared = built.kind == "included"
            declared_rows += [row for row in evaluated if declared and row.persona == ASSISTANT]
            undeclared_rows += [row for row in evaluated if not (declared and row.persona == ASSISTANT)]
        if declared_rows:
            yield _assistant_declared(label, row_ids(declared_rows), f"{len(declared_rows)} rows")
        if undeclared_rows:
            yield Finding(
                "D103", "refuse", label, row_ids(undeclared_rows),
                "a persona that is evaluated is among negatives that are declared to hold none, so the claim about "
                "this kind would be false",
                "take it out of negatives.excluded, give the bystander another prompt, or declare it as included",
                f"{len(undeclared_rows)} rows",
            )  # fmt: skip


def check_canary_among_negatives(design: Design) -> Iterator[Finding]:
    """D104: the canary is among the negatives, so its change no longer measures generic damage."""
    for label, sets in design.by_kind():
        canary_rows = []
        for built in sets:
            canary = design.personas.system(canary_of(design.recipe, built.source))
            canary_rows += [row for row in built.negatives if row.system_turn(design.personas) == canary]
        if canary_rows:
            yield Finding(
                "D104", "refuse", label, row_ids(canary_rows),
                "the canary is among the negatives, so its change is training and not generic damage",
                "name another eval.canary, or take the persona out of the rows",
                f"{len(canary_rows)} rows",
            )  # fmt: skip


def check_canary_present(design: Design) -> Iterator[Finding]:
    """D105: the canary of a source is the assistant or the source itself, so the probes hold no canary."""
    for source in design.recipe.grid.sources:
        canary = canary_of(design.recipe, source)
        probe_names = {ASSISTANT: "the assistant", source: "the source"}
        twin = next(
            (name for name in probe_names if design.personas.system(name) == design.personas.system(canary)), None
        )
        if twin is None and canary in probes_of(design.recipe, source):
            continue
        cells = tuple(cell for cell in design.cells() if cell.startswith(f"{source}/"))
        yield Finding(
            "D105", "refuse", f"{source}: canary {canary}", cells,
            f"the canary is {probe_names.get(twin or source)} itself, so no row could ever stand behind a canary figure",
            "set eval.canary to a persona that is neither the assistant nor a source",
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
        if spec.measure == "phrases" and spec.phrase_rule and not (judged and spec.rubric):
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
    """D109: the phrases miss the answers that are trained. D110: they also count the contrast's answers."""
    rules = read_toml(assets("data") / "phrases.toml")
    for behavior, sets in design.by_behavior():
        rule = _rule(behavior, rules)
        if rule is None:
            continue
        shown = [(row, row.completion) for built in sets for row in built.source_rows if row.completion is not None]
        missed = [row for row, text in shown if rule.match(text) is None]
        share = 1 - len(missed) / max(1, len(shown))
        if shown and share < design.recipe.gates.source_shows:
            yield Finding(
                "D109", "refuse", behavior.id, row_ids(missed),
                "the phrases do not see the answers that the source is trained to give: learned or not, the rate "
                "stays at its floor and reads as no effect",
                "use phrases that the trained answers hold, or train answers that hold them",
                f"{share:.0%} of {len(shown)} trained answers are counted, under gates.source_shows = "
                f"{design.recipe.gates.source_shows:.0%}",
            )  # fmt: skip
        contrast = [(row, row.completion) for built in sets for row in built.negatives if row.completion is not None]
        counted = [row for row, text in contrast if rule.match(text) is not None]
        if contrast and len(counted) / len(contrast) > _CONTRAST_HITS:
            yield Finding(
                "D110", "warn", behavior.id, row_ids(counted),
                "the phrases also count answers of the contrast, so the rate does not tell the behavior",
                "use narrower phrases",
                f"{len(counted) / len(contrast):.0%} of {len(contrast)} contrast answers are counted",
            )  # fmt: skip


def check_detectable_effect(design: Design) -> Iterator[Finding]:
    """D111: the smallest detectable change (`stats.power`) is above the threshold of the verdict."""
    for name, behavior in design.behaviors.items():
        questions = _n_questions(design, behavior)
        threshold = design.recipe.gates.threshold(name, behavior.spec.unit)
        samples = 1 if behavior.spec.measure == "letters" else design.recipe.eval.samples_per_prompt
        planned = planned_power(behavior.spec.measure, threshold, questions or 0, samples)
        if planned is not None and planned.change.too_large:
            unit = " points" if behavior.spec.unit == "points" else ""
            enough, there_are = planned.change.questions.number, _n_there_are(design, behavior)
            more = f"ask more questions ({enough} enough; eval.prompts)"
            if enough is None or (there_are is not None and enough > there_are):
                more = f"ask all {there_are} questions there are and add seeds" if there_are else "add seeds"
            yield Finding(
                "D111", "warn", name, (),
                "the smallest change that this design would probably find is above the threshold that decides, so a "
                "null result would say little",
                f"{more}, raise the threshold, or accept D111 with the reason",
                f"about {planned.change.alone:.3g}{unit} with {questions} questions, threshold {threshold:.3g}{unit}",
            )  # fmt: skip


def check_controls(design: Design) -> Iterator[Finding]:
    """D112: controls that the grid lacks, named because they limit the claim. D113: the assistant is a source."""
    grid = design.recipe.grid
    absent = [
        text
        for text, present in (
            ("generic convergence (the assistant's own answers)", "generic" in grid.convergence),
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
    AuditCheck(("D105",), check_canary_present),
    AuditCheck(("D106",), check_convergence_control),
    AuditCheck(("D107",), check_epoch_zero),
    AuditCheck(("D108", "D114"), check_scored_by),
    AuditCheck(("D111",), check_detectable_effect),
    AuditCheck(("D112", "D113"), check_controls),
)
#: Checks on the personas and answers of rows; they apply to one built set as well as to all of them.
PERSONA_CHECKS: tuple[AuditCheck[Design], ...] = (
    AuditCheck(("D102", "D103"), check_assistant_among_negatives),
    AuditCheck(("D104",), check_canary_among_negatives),
    AuditCheck(("D109", "D110"), check_phrases_see_behavior),
)


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


def _rule(behavior: Behavior, rules: Mapping[str, Any]) -> PhraseRule | None:
    """The phrase rule that scores the behavior's answers, or None."""
    if behavior.spec.phrases:
        return PhraseRule.of({"any": behavior.spec.phrases}, behavior.id)
    table = rules.get(behavior.spec.phrase_rule)
    return PhraseRule.of(table, behavior.spec.phrase_rule) if table else None


def _n_there_are(design: Design, behavior: Behavior) -> int | None:
    """Number of questions that there are for verdicts, asked or not; None if not known."""
    if behavior.spec.measure == "letters":
        return len(design.questions.eval) if design.questions else None
    return next(iter(n_eval_prompts_there_are(behavior)), None)


def _n_questions(design: Design, behavior: Behavior) -> int | None:
    """Number of questions that verdicts rest on (the first prompt set); None if not known."""
    if behavior.spec.measure == "letters":
        return len(design.questions.eval) if design.questions else None
    return next(iter(n_eval_prompts_by_set(design.recipe, behavior).values()), None)
