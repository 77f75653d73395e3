"""The audit: can the *design* of the data answer the question? Pure functions, no model, no network.

It has two passes. `audit_structure` checks the recipe and every set of rows that can be built without a model, before
anything runs. `audit_rows` checks one set as rendered for the model, before it is trained on (gate G1). Each check is
one small function in a table, and a test fails for each that is removed.

    D1xx design    D2xx rows    D3xx what the base reads    D4xx rendered rows    D9xx the audit itself
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from fastconv.audit import AuditCheck, BuiltSet, CheckReport, Design, Finding, Rule, build_report
from fastconv.audit.design import DESIGN_CHECKS, PERSONA_CHECKS, n_questions
from fastconv.audit.rendered import READING_RULES, RENDERED_CHECKS, RenderedSet
from fastconv.audit.roles import ROLE_CHECKS
from fastconv.audit.sets import SET_CHECKS
from fastconv.audit.shortcuts import FORM_CHECKS
from fastconv.chat import ChatTokenizer, Rendered
from fastconv.datasets.behaviors import Behavior, declared_sets, load_behaviors, n_eval_prompts_there_are, set_name
from fastconv.datasets.personas import ASSISTANT, Personas, load_personas
from fastconv.datasets.questions import Question, QuestionSet, load_questions
from fastconv.datasets.rows import Row
from fastconv.engine.locate import base_name
from fastconv.errors import DataError, InputError
from fastconv.recipe import Recipe

__all__ = [
    "OWN_RULES", "ROW_CHECKS", "STRUCTURE_CHECKS", "Rule", "all_rules", "rules_table", "AuditCheck", "CheckReport", "Finding",
    "audit_rows", "audit_structure", "check_recipe", "build_report", "set_name", "structure_findings",
]  # fmt: skip


def check_evaluated(design: Design) -> Iterator[Finding]:
    """D120: a behavior has no held-out prompts, so it would be trained and could never be measured."""
    for name, behavior in design.behaviors.items():
        if behavior.spec.measure in ("letters", "none") or behavior.eval:
            continue
        cells = tuple(cell for cell in design.cells() if f"/{name}/" in cell)
        rows = "rows of your own are all for training" if behavior.rows is not None else "its prompts are all training"
        yield Finding(
            "D120", "refuse", name, cells,
            f"the behavior has no evaluation part ({rows}), so nothing could be asked and no figure could stand behind it",
            'give its prompts file rows with part = "eval", or name a file of held-out prompts in eval_prompts',
        )  # fmt: skip


def check_gates_can_pass(design: Design) -> Iterator[Finding]:
    """D121: a gate that no result of this design could pass. D122: G3's references are of another base."""
    recipe, rules = design.recipe, design.recipe.gates
    borrowed = sorted(set(rules.g3_reference_pct) & set(recipe.grid.sources))
    if borrowed and base_name(recipe.model) != rules.g3_base:
        yield Finding(
            "D122", "warn", "gates.g3_reference_pct", tuple(borrowed),
            f"the references are of {rules.g3_base} and this base is {base_name(recipe.model)}, so G3 is not applicable",
            "take them out; or, if you measured them on this base, name it in gates.g3_base",
        )  # fmt: skip
        borrowed = []
    for gate, why, mend, figure in _impossible(design, borrowed):
        yield Finding("D121", "warn", gate, (), f"no result could pass this gate: {why}", mend, figure)


def check_as_expected(design: Design) -> Iterator[Finding]:
    """D131: fewer evaluation prompts than the recipe asks for. D132: a persona of the user's replaces a shipped one."""
    asked = design.recipe.eval.prompts
    for name, behavior in design.behaviors.items():
        n = n_questions(design, behavior)
        if behavior.spec.measure != "letters" and n and n < asked:
            there = max(n_eval_prompts_there_are(behavior))
            larger = (
                f"raise eval.prompts: {there} are there, more of them for larger draws" if there > n else "add some"
            )
            why = f"asks {n} evaluation prompts where eval.prompts = {asked}"
            yield Finding("D131", "note", name, (), why, f"{larger}; or lower eval.prompts")
    for name in design.personas.replaced:
        yield Finding(
            "D132", "note", name, (),
            f"{design.recipe.data.personas} gives this shipped persona another prompt, and that one is used everywhere",
            "give your persona another id if both are meant",
        )  # fmt: skip


def _impossible(design: Design, referenced: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    """Gates that cannot pass, whatever is measured: (gate, why, mend, figure). `referenced` are G3's sources."""
    recipe, rules = design.recipe, design.recipe.gates
    sources = [source for source in recipe.grid.sources if source not in (ASSISTANT, rules.negative_control)]
    if not any(recipe.grid.epochs) and not recipe.grid.contrasts:
        why = "the grid has epoch 0 alone, so it declares no contrast and nothing can be decided"
        yield "PILOT", why, "add a later epoch to grid.epochs", ""
    if rules.g4_source and rules.g4_source not in sources:
        mend = "name a source of the grid, or leave it out: then the first source is asked"
        yield "G4", f"gates.g4_source is {rules.g4_source}, which is no source of the grid", mend, ""
    if len(sources) >= rules.confirm_sources and rules.falsify_under > len(sources):
        figure = f"{len(sources)} sources, gates.falsify_under = {rules.falsify_under}"
        yield "FALSIFY", "it asks for more sources than the grid has", "lower gates.falsify_under", figure
    for name, behavior in design.behaviors.items():
        n = n_questions(design, behavior)
        if n == 1:
            why = "one question gives no interval, and a change must be clear of zero"
            yield f"CHANGE {name}", why, "ask more questions (eval.prompts)", "1 question"
        if behavior.spec.measure != "letters" or not n or design.questions is None:
            continue
        best_p = _all_right_p(design.questions.eval)
        if best_p > rules.above_chance_alpha:
            figure = (
                f"{n} questions, all right: p = {best_p:.3g}, gates.above_chance_alpha = {rules.above_chance_alpha:g}"
            )
            yield f"G0 {name}", "even all answers right is not above chance", "ask more questions", figure
        for source in referenced if recipe.eval.multiple_choice == "arc" else ():
            expected = rules.g3_reference_pct[source]
            nearest = 100 * min(max(round(expected * n / 100), 0), n) / n
            if abs(nearest - expected) > rules.g3_tolerance_pp:
                figure = f"nearest {nearest:.2f} %, reference {expected:g} %, tolerance {rules.g3_tolerance_pp:g} pp"
                yield (
                    f"G3 {source}",
                    f"no accuracy over {n} questions lies near it",
                    "raise gates.g3_tolerance_pp",
                    figure,
                )


def _all_right_p(asked: Sequence[Question]) -> float:
    """p of the exact binomial test of G0 if every answer is right: chance ** n, chance as in `stats.bounds` (no scipy)."""
    gold = Counter(question.gold for question in asked)
    chance = max(sum(1 / len(question.choices) for question in asked), max(gold.values())) / len(asked)
    return chance ** len(asked)


#: Checks on what a recipe's gates and evaluation could say at all.
GATE_CHECKS: tuple[AuditCheck[Design], ...] = (
    AuditCheck(
        (Rule("D120", "refuse", "a behavior has no evaluation prompts", "finished rows without rows of part = \"eval\""),),
        check_evaluated,
    ),
    AuditCheck(
        (
            Rule("D121", "warn", "a gate that nothing could pass", "epochs = [0] and the pilot's gate"),
            Rule("D122", "warn", "G3 references borrowed from another base", "the published figures beside a 1.5B base"),
        ),
        check_gates_can_pass,
    ),
    AuditCheck(
        (
            Rule("D131", "note", "fewer evaluation prompts than eval.prompts", "50 prompts of a file that has 20"),
            Rule("D132", "note", "a persona of the user's replaces a shipped one", "[villain] in data.personas"),
        ),
        check_as_expected,
    ),
)  # fmt: skip

#: The checks of the second pass that look at rows (it also runs RENDERED_CHECKS), and those of the first.
ROW_CHECKS: tuple[AuditCheck[Design], ...] = (*PERSONA_CHECKS, *SET_CHECKS, *ROLE_CHECKS, *FORM_CHECKS)
STRUCTURE_CHECKS: tuple[AuditCheck[Design], ...] = (*GATE_CHECKS, *DESIGN_CHECKS, *ROW_CHECKS)
#: Rules of the audit itself and of building the sets, which no check yields.
OWN_RULES = (
    Rule("D209", "refuse", "a set cannot be built", "more source_rows than prompts"),
    Rule("D210", "note", "sets that wait for their questions", "ARC-Challenge is not on this disk"),
    Rule(
        "D212", "refuse", "rows without a system turn and a persona among rows that state theirs",
        'negatives that lost their prompt, with persona_prompt = "add"',
    ),
    Rule("D901", "note", "an acceptance that nothing needs", "a code in audit.accept that is not found"),
)  # fmt: skip


def all_rules() -> list[Rule]:
    """Every rule of the audit by code: the registry."""
    checks = (*STRUCTURE_CHECKS, *RENDERED_CHECKS)
    return sorted(
        [*OWN_RULES, *READING_RULES, *(rule for check in checks for rule in check.rules)], key=lambda rule: rule.code
    )


def rules_table() -> str:
    """The registry as the Markdown table of docs/AUDIT.md."""
    head = ("code", "severity", "design fault", "example")
    rows = [head, ("---",) * 4, *((rule.code, rule.severity, rule.fault, rule.example) for rule in all_rules())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def check_recipe(recipe: Recipe) -> CheckReport:
    """The report of the first pass with the recipe's acceptances applied; see `structure_findings`."""
    return build_report(recipe, structure_findings(recipe))


def structure_findings(recipe: Recipe) -> list[Finding]:
    """The findings of the first pass. Reads the recipe's files and never the hub.

    ARC-Challenge is audited if `eval.arc_file` names a copy. Raises InputError if a file cannot be used.
    """
    behaviors = load_behaviors(recipe)
    letters = any(behavior.spec.measure == "letters" for behavior in behaviors.values())
    available = recipe.eval.multiple_choice == "builtin" or recipe.eval.arc_file
    questions = load_questions(recipe) if letters and available else None
    return audit_structure(recipe, load_personas(recipe), behaviors, questions)


def audit_structure(
    recipe: Recipe,
    personas: Personas,
    behaviors: Mapping[str, Behavior],
    questions: QuestionSet | None,
    *,
    checks: Sequence[AuditCheck[Design]] = STRUCTURE_CHECKS,
) -> list[Finding]:
    """The first pass over the whole recipe. Needs neither model nor tokenizer nor network.

    `questions` may be None if they are not available; multiple-choice sets are then left to `audit_rows` (D210).
    """
    sets: list[BuiltSet] = []
    findings: list[Finding] = []
    waiting: list[str] = []
    for one in declared_sets(recipe, behaviors):
        letters = one.behavior.spec.task == "multiple_choice"
        if questions is None and (letters or one.behavior.spec.measure == "letters"):
            waiting.append(one.name)
        if letters and questions is None:
            continue
        try:
            rows = one.build(recipe, personas, questions if letters else None)
        except InputError as error:
            findings.append(_unbuildable(one.name, error))
            continue
        sets.append(BuiltSet(one.name, one.behavior, one.source, one.kind, one.seed, tuple(rows), one.arm))
    if waiting:
        findings.append(_waiting(waiting))
    design = Design(recipe, personas, behaviors, tuple(sets), questions)
    return [*findings, *(finding for check in checks for finding in check.run(design))]


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
    set_checks: Sequence[AuditCheck[Design]] = ROW_CHECKS,
    rendered_checks: Sequence[AuditCheck[RenderedSet]] = RENDERED_CHECKS,
) -> list[Finding]:
    """The second pass over one set with its answers, rows and renderings in the same order.

    `set_name` is as `set_name()` gives it. Rows of any other name (convergence rows) get the checks on rendering alone:
    each must be rendered under the persona it names. Personas, behaviors and, for multiple choice, questions are read
    unless given. Raises InputError if they cannot be read.
    """
    personas = load_personas(recipe) if personas is None else personas
    rendered_set = RenderedSet(recipe, personas, set_name, tuple(rows), tuple(rendered), tokenizer)
    findings = [finding for check in rendered_checks for finding in check.run(rendered_set)]
    built = _built(recipe, set_name, rows, load_behaviors(recipe) if behaviors is None else behaviors)
    if built is not None:
        if questions is None and built.behavior.spec.measure == "letters":
            questions = load_questions(recipe)
        design = Design(recipe, personas, {built.behavior.id: built.behavior}, (built,), questions)
        findings += [finding for check in set_checks for finding in check.run(design)]
    return findings


def _built(recipe: Recipe, name: str, rows: Sequence[Row], behaviors: Mapping[str, Behavior]) -> BuiltSet | None:
    """The rows as the behavior set of this name, or None if the recipe has no such set."""
    for one in declared_sets(recipe, behaviors):
        if one.name == name:
            return BuiltSet(name, one.behavior, one.source, one.kind, one.seed, tuple(rows), one.arm)
    return None


def _unbuildable(name: str, error: InputError) -> Finding:
    place = f"{error.where}: " if error.where else ""
    rows = error.rows if isinstance(error, DataError) else ()
    return Finding(
        "D212" if rows else "D209", "refuse", name, rows, f"the set cannot be built: {place}{error.what}", error.fix
    )


def _waiting(names: Sequence[str]) -> Finding:
    return Finding(
        "D210",
        "note",
        "multiple choice",
        tuple(names),
        "the questions are not at hand, so the letters of these sets are audited when they are built, before training",
        "set eval.arc_file to audit them now",
        f"{len(names)} sets wait",
    )
