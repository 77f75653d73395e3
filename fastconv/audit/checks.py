"""The audit: is the *design* of the data one that can answer the question? Pure functions, no model, no network.

Two passes. `audit_structure` looks at the recipe and at every set that can be built without a model, before anything
runs. `audit_rows` looks at one set exactly as the model will see it, before it is trained on (gate G1). Each check is
one small function in a table, and each has a test that turns red without it.

    D1xx design    D2xx rows    D4xx rendered rows    D9xx the audit itself
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastconv.audit.design import DESIGN_CHECKS, WHO_CHECKS
from fastconv.audit.findings import BuiltSet, CheckReport, Design, Finding, Rule, report_of
from fastconv.audit.rendered import RENDERED_CHECKS, RenderedSet
from fastconv.audit.sets import SET_CHECKS
from fastconv.chat import ChatTokenizer, Rendered
from fastconv.datasets.behaviors import Behavior, build_rows, kinds_of, load_behaviors, set_name
from fastconv.datasets.personas import Personas, load_personas
from fastconv.datasets.questions import QuestionSet, load_questions
from fastconv.datasets.rows import Row
from fastconv.errors import InputError
from fastconv.recipe import Recipe

__all__ = [
    "ROW_CHECKS", "STRUCTURE_CHECKS", "Rule", "CheckReport", "Finding",
    "audit_rows", "audit_structure", "check_recipe", "report_of", "set_name", "structure_findings",
]  # fmt: skip


#: Every check of the first pass; of the second, those on who and what the rows are (and RENDERED_CHECKS).
STRUCTURE_CHECKS: tuple[Rule[Design], ...] = (*DESIGN_CHECKS, *WHO_CHECKS, *SET_CHECKS)
ROW_CHECKS: tuple[Rule[Design], ...] = (*WHO_CHECKS, *SET_CHECKS)


def check_recipe(recipe: Recipe) -> CheckReport:
    """The whole first pass, with the recipe's acceptances applied; see `structure_findings`."""
    return report_of(recipe, structure_findings(recipe))


def structure_findings(recipe: Recipe) -> list[Finding]:
    """The findings of the whole first pass: reads the recipe's files and never the hub.

    ARC is looked at where `eval.arc_file` names a copy. Raises InputError where a file cannot be used at all.
    """
    behaviors = load_behaviors(recipe)
    letters = any(behavior.spec.measure == "letters" for behavior in behaviors.values())
    at_hand = recipe.eval.multiple_choice == "builtin" or recipe.eval.arc_file
    questions = load_questions(recipe) if letters and at_hand else None
    return audit_structure(recipe, load_personas(recipe), behaviors, questions)


def audit_structure(
    recipe: Recipe,
    personas: Personas,
    behaviors: Mapping[str, Behavior],
    questions: QuestionSet | None,
    *,
    checks: Sequence[Rule[Design]] = STRUCTURE_CHECKS,
) -> list[Finding]:
    """The first pass, over the whole recipe. Needs neither model nor tokenizer nor network.

    `questions` may be None while they are not at hand: multiple-choice sets then wait for `audit_rows`.
    """
    sets: list[BuiltSet] = []
    findings: list[Finding] = []
    waiting: list[str] = []
    for behavior in behaviors.values():
        letters = behavior.spec.task == "multiple_choice"
        for kind in kinds_of(recipe, behavior):
            for source in recipe.grid.sources:
                for seed in recipe.grid.seeds:
                    name = set_name(behavior.id, source, kind, seed)
                    if letters and questions is None:
                        waiting.append(name)
                        continue
                    asked = questions if letters else None
                    try:
                        rows = build_rows(recipe, personas, behavior, asked, source, kind, seed)
                    except InputError as error:
                        findings.append(_unbuildable(name, error))
                        continue
                    sets.append(BuiltSet(name, behavior, source, kind, seed, tuple(rows)))
    if waiting:
        findings.append(_waiting(waiting))
    design = Design(recipe, personas, behaviors, tuple(sets), questions)
    return [*findings, *(found for check in checks for found in check.run(design))]


def audit_rows(
    recipe: Recipe,
    set_name: str,
    rows: Sequence[Row],
    rendered: Sequence[Rendered],
    tokenizer: ChatTokenizer,
    *,
    personas: Personas | None = None,
    behaviors: Mapping[str, Behavior] | None = None,
    questions: QuestionSet | None = None,
    set_checks: Sequence[Rule[Design]] = ROW_CHECKS,
    rendered_checks: Sequence[Rule[RenderedSet]] = RENDERED_CHECKS,
) -> list[Finding]:
    """The second pass, over one set with its answers, as rendered. `set_name` is that of `set_name()`.

    A name that is no behavior set (convergence rows, say) gets the checks on rendering alone: each row must then be
    rendered under the persona it names. Personas, behaviors and, for letters, questions are read unless given.
    """
    personas = load_personas(recipe) if personas is None else personas
    seen = RenderedSet(recipe, personas, set_name, tuple(rows), tuple(rendered), tokenizer)
    findings = [found for check in rendered_checks for found in check.run(seen)]
    built = _built(recipe, set_name, rows, load_behaviors(recipe) if behaviors is None else behaviors)
    if built is not None:
        if questions is None and built.behavior.spec.measure == "letters":
            questions = load_questions(recipe)
        design = Design(recipe, personas, {built.behavior.id: built.behavior}, (built,), questions)
        findings += [found for check in set_checks for found in check.run(design)]
    return findings


def _built(recipe: Recipe, name: str, rows: Sequence[Row], behaviors: Mapping[str, Behavior]) -> BuiltSet | None:
    """The behavior set of this name, or None if no cell of the recipe has it."""
    for behavior in behaviors.values():
        for kind in kinds_of(recipe, behavior):
            for source in recipe.grid.sources:
                for seed in recipe.grid.seeds:
                    if set_name(behavior.id, source, kind, seed) == name:
                        return BuiltSet(name, behavior, source, kind, seed, tuple(rows))
    return None


def _unbuildable(name: str, error: InputError) -> Finding:
    place = f"{error.where}: " if error.where else ""
    return Finding("D209", "refuse", name, (), f"the set cannot be built: {place}{error.what}", error.fix)


def _waiting(names: Sequence[str]) -> Finding:
    return Finding(
        "D210",
        "note",
        "multiple choice",
        tuple(names),
        "the questions are not at hand, so these sets are audited when they are built, before training",
        "set eval.arc_file to audit them now",
        f"{len(names)} sets wait",
    )
