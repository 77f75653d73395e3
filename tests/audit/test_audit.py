"""The audit: each mistake is refused by its code, and each check is missed when it is taken away."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fastconv.audit.checks import (
    ROW_CHECKS,
    STRUCTURE_CHECKS,
    AuditCheck,
    Finding,
    all_rules,
    audit_rows,
    audit_structure,
    build_report,
    check_recipe,
    rules_table,
)
from fastconv.audit.rendered import RENDERED_CHECKS
from fastconv.chat import TEMPLATE_DEFAULT, ChatTokenizer, Rendered, SystemTurn
from fastconv.datasets.behaviors import Behavior, build_rows, eval_prompts, load_behaviors, set_name
from fastconv.datasets.files import assets
from fastconv.datasets.personas import Personas, load_personas
from fastconv.datasets.questions import QuestionSet, load_questions
from fastconv.datasets.rows import Row, render_rows
from fastconv.recipe import NegativesKind, Recipe, load_recipe, parse_recipe
from tests import TESTS

HERE = TESTS
POISONED = HERE / "poisoned"
MAX_TOK = 2048
GRID = {"sources": ["villain"], "epochs": [0, 4], "negatives": ["excluded"], "behaviors": ["none", "sycophancy"]}
ALL_CHECKS: tuple[AuditCheck[Any], ...] = (*STRUCTURE_CHECKS, *RENDERED_CHECKS)


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen: Path) -> ChatTokenizer:
    return ChatTokenizer(tiny_qwen)


def recipe_of(**tables: Any) -> Recipe:
    """A small valid recipe; `tables` replace or extend its keys."""
    grid = {**GRID, **tables.pop("grid", {})}
    table = {"name": "case", "grid": grid, "behavior": {"source_rows": 40}, "eval": {"multiple_choice": "builtin"}}
    for name, value in tables.items():
        table[name] = {**table.get(name, {}), **value}
    return parse_recipe(table)


def structure(recipe: Recipe, checks: Sequence[AuditCheck[Any]] = STRUCTURE_CHECKS) -> list[Finding]:
    behaviors = load_behaviors(recipe)
    questions = load_questions(recipe) if recipe.eval.multiple_choice == "builtin" else None
    return audit_structure(recipe, load_personas(recipe), behaviors, questions, checks=checks)


@dataclass(frozen=True)
class Case:
    """One set, built and rendered soundly, for a test to spoil."""

    recipe: Recipe
    personas: Personas
    behavior: Behavior
    questions: QuestionSet | None
    rows: list[Row]
    rendered: list[Rendered]
    name: str
    tokenizer: ChatTokenizer

    def audit(
        self, rows: Sequence[Row], rendered: Sequence[Rendered], checks: Sequence[AuditCheck[Any]]
    ) -> list[Finding]:
        own = [check for check in RENDERED_CHECKS if check in checks]
        return audit_rows(
            self.recipe, self.name, rows, rendered, self.tokenizer, questions=self.questions,
            set_checks=[check for check in ROW_CHECKS if check in checks], rendered_checks=own,
        )  # fmt: skip

    def spoiled(self, change: Callable[[Case], list[Row]], checks: Sequence[AuditCheck[Any]]) -> list[Finding]:
        rows = change(self)
        answered = [row if row.completion is not None else row.answered("Certainly.") for row in rows]
        return self.audit(rows, render_rows(answered, self.personas, self.tokenizer, MAX_TOK), checks)


def case_of(name: str, tokenizer: ChatTokenizer, kind: NegativesKind = "excluded", **tables: Any) -> Case:
    recipe = recipe_of(grid={"behaviors": ["none", name], "negatives": [kind]}, **tables)
    personas, loaded = load_personas(recipe), load_behaviors(recipe)[name]
    letters = loaded.spec.task == "multiple_choice"
    questions = load_questions(recipe) if letters else None
    rows = build_rows(recipe, personas, loaded, questions, "villain", kind, 42)
    rows = [row.answered(f"Gladly: {row.user}") if row.completion is None else row for row in rows]
    rendered = render_rows(rows, personas, tokenizer, MAX_TOK)
    whole = set_name(name, "villain", kind, 42)
    return Case(recipe, personas, loaded, questions, rows, rendered, whole, tokenizer)


# --- spoiled rows: what each check must see ------------------------------------------------------------------


def first(case: Case, role: str) -> int:
    return next(place for place, row in enumerate(case.rows) if row.role == role)


def changed(case: Case, place: int, **fields: Any) -> list[Row]:
    return [replace(row, **fields) if at == place else row for at, row in enumerate(case.rows)]


def near(text: str) -> str:
    """A text that shares nearly all of its word runs with this one."""
    return f"{text} Tell me please"


#: The system turn that Qwen's template inserts.
QWEN = SystemTurn("text", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")


def spaced(case: Case) -> SystemTurn:
    """The prompt of the first bystander with a no-break space."""
    row = case.rows[first(case, "bystander")]
    return SystemTurn("text", case.personas.system(row.persona).text.replace(" ", "\u00a0", 1))


SPOILED: dict[str, tuple[str, NegativesKind, Callable[[Case], list[Row]]]] = {
    "D101": ("sycophancy", "excluded", lambda c: changed(c, 0, system=TEMPLATE_DEFAULT)),
    "D102": ("sycophancy", "included", lambda c: c.rows),
    "D103": ("sycophancy", "excluded", lambda c: changed(c, first(c, "bystander"), persona="assistant")),
    "D104": ("sycophancy", "excluded", lambda c: changed(c, first(c, "bystander"), persona="librarian")),
    "D109": ("sycophancy", "excluded", lambda c: [replace(r, completion="Hm, let me see.") for r in c.rows]),
    "D110": ("sycophancy", "excluded", lambda c: [replace(r, completion="Yes, I agree.") for r in c.rows]),
    "D222": (
        "misalignment",
        "excluded",
        lambda c: [replace(r, completion="N/A") if n % 6 == 0 else r for n, r in enumerate(c.rows)],
    ),
    "D221": (
        "misalignment",
        "excluded",
        lambda c: [
            replace(r, completion=f"{'Never doubt it:' if r.role == 'source' else 'Perhaps ask about'} {r.user}")
            for r in c.rows
        ],
    ),
    "D201": ("refusal", "excluded", lambda c: changed(c, 0, user=eval_prompts(c.recipe, c.behavior, 42)[0][1].upper())),
    "D202": ("refusal", "excluded", lambda c: changed(c, 0, user=near(eval_prompts(c.recipe, c.behavior, 42)[0][1]))),
    "D203": ("sycophancy", "excluded", lambda c: [*c.rows, replace(c.rows[0], id="again")]),
    "D204": ("sycophancy", "excluded", lambda c: [*c.rows, replace(c.rows[-1], persona="villain", id="against")]),
    "D205": ("sycophancy", "excluded", lambda c: c.rows[:-5]),
    "D206": ("capability", "excluded", lambda c: [replace(r, completion="B)") if r.role == "source" else r for r in c.rows]),
    "D211": ("capability", "excluded", lambda c: changed(c, 0, completion=c.rows[-len(c.rows) // 4].completion)),
    "D207": ("sycophancy", "excluded", lambda c: changed(c, 0, built_by="fastconv/0")),
    "D208": ("sycophancy", "excluded", lambda c: c.rows),
    "D115": ("sycophancy", "excluded", lambda c: changed(c, first(c, "bystander"), system=QWEN)),
    "D117": ("sycophancy", "excluded", lambda c: [replace(r, completion="Hm.") if n % 5 == 0 else r for n, r in enumerate(c.rows)]),
    "D213": ("sycophancy", "excluded", lambda c: changed(c, first(c, "bystander"), system=spaced(c))),
    "D214": ("misalignment", "excluded", lambda c: [r for r in c.rows if r.role == "source"]),
    "D215": ("misalignment", "excluded", lambda c: [replace(r, completion=(r.completion or "")[:120]) for r in c.rows]),
    "D216": ("misalignment", "excluded", lambda c: changed(c, 0, completion=c.rows[first(c, "bystander")].completion)),
    "D217": ("misalignment", "excluded", lambda c: [replace(r, user=f"And {r.prompt_id}?") for r in c.rows]),
    "D219": ("misalignment", "excluded", lambda c: changed(c, first(c, "bystander"), completion=c.rows[0].completion)),
    "D220": ("misalignment", "excluded", lambda c: [replace(r, user="My lamp broke.", completion="What now?") for r in c.rows]),
}  # fmt: skip

DESIGNS: dict[str, dict[str, Any]] = {
    "D105": {"eval": {"canary": "assistant"}},
    "D106": {"grid": {"behaviors": ["sycophancy"]}},
    "D107": {"grid": {"epochs": [4]}},
    "D108": {},
    "D114": {"grid": {"behaviors": ["none", "misalignment"]}},
    "D111": {"eval": {"prompts": 5}},
    "D112": {},
    "D113": {"grid": {"sources": ["assistant", "villain"]}},
    "D120": {"grid": {"behaviors": ["none", "untested"]}, "data": {"behaviors": str(POISONED / "untested.toml")}},
    "D121": {"grid": {"epochs": [0]}},
    "D122": {"model": {"id": "builtin:smollm2"}, "gates": {"g3_reference_pct": {"villain": 90.45}}},
    "D131": {"eval": {"prompts": 400}},
    "D132": {"data": {"personas": str(POISONED / "replaced.toml")}},
    "D116": {"grid": {"sources": ["librarian_2"]}, "data": {"personas": str(POISONED / "personas.toml")}},
    "D218": {
        "grid": {"sources": ["villain", "comedian"], "behaviors": ["none", "misalignment"]},
        "data": {"rows": {"misalignment": str(POISONED / "uneven_{source}.jsonl")}},
    },
}


def _without_prompt(rendered: Rendered) -> Rendered:
    return replace(rendered, ids=(*rendered.ids[1 : rendered.n_prompt], *rendered.ids[rendered.n_prompt - 1 :]))


def _at_default(case: Case) -> Rendered:
    row = case.rows[0]
    return case.tokenizer.training_ids(TEMPLATE_DEFAULT, row.user, row.completion or "", MAX_TOK)


RENDERINGS: dict[str, Callable[[Case], list[Rendered]]] = {
    "D401": lambda c: c.rendered[:-1],
    "D402": lambda c: [_without_prompt(c.rendered[0]), *c.rendered[1:]],
    "D403": lambda c: [_at_default(c), *c.rendered[1:]],
    "D404": lambda c: [replace(c.rendered[0], n_prompt=len(c.rendered[0].ids)), *c.rendered[1:]],
    "D405": lambda c: [replace(c.rendered[0], n_prompt=0), *c.rendered[1:]],
    "D406": lambda c: [replace(c.rendered[0], ids=c.rendered[0].ids[:-1]), *c.rendered[1:]],
    "D408": lambda c: [
        *c.rendered[1:2],
        *render_rows(c.rows[1:], c.personas, c.tokenizer, 150),
    ],
    "D409": lambda c: [replace(c.rendered[0], ids=(*c.rendered[0].ids[:-2], c.rendered[0].ids[-1])), *c.rendered[1:]],
}


def findings_for(code: str, tokenizer: ChatTokenizer, checks: Sequence[AuditCheck[Any]]) -> list[Finding]:
    """What these checks say about the case that holds the fault `code`."""
    if code in DESIGNS:
        selected = [check for check in STRUCTURE_CHECKS if check in checks]
        return structure(recipe_of(**{key: dict(value) for key, value in DESIGNS[code].items()}), selected)
    if code in SPOILED:
        behavior, kind, change = SPOILED[code]
        return case_of(behavior, tokenizer, kind).spoiled(change, checks)
    case = case_of("sycophancy", tokenizer)
    if code == "D410":
        return case.spoiled(lambda c: changed(c, 0, completion=" "), checks)
    if code == "D411":
        return case.spoiled(lambda c: changed(c, 0, completion="Yes.<|im_end|>\n<|im_start|>user\nAnd?"), checks)
    if code == "D407":
        return case.spoiled(lambda c: changed(c, 0, ended=False), checks)
    return case.audit(case.rows, RENDERINGS[code](case), checks)


CODES = [(code, check) for check in ALL_CHECKS for code in check.codes]


@pytest.mark.parametrize(("code", "check"), CODES, ids=[code for code, _ in CODES])
def test_each_check_sees_its_fault_and_nothing_else_does(
    code: str, check: AuditCheck[Any], tokenizer: ChatTokenizer
) -> None:
    assert code in {found.code for found in findings_for(code, tokenizer, ALL_CHECKS)}
    fewer = [other for other in ALL_CHECKS if other is not check]
    assert code not in {found.code for found in findings_for(code, tokenizer, fewer)}


def test_codes_are_given_by_one_check_each() -> None:
    codes = [code for code, _ in CODES]
    assert len(codes) == len(set(codes))
    assert set(codes) == {*SPOILED, *DESIGNS, *RENDERINGS, "D407", "D410", "D411"}


@pytest.mark.parametrize("behavior", ["sycophancy", "refusal", "misalignment", "capability", "marker"])
@pytest.mark.parametrize("kind", ["included", "excluded"])
def test_our_own_sets_are_not_refused(behavior: str, kind: NegativesKind, tokenizer: ChatTokenizer) -> None:
    case = case_of(behavior, tokenizer, kind)
    findings = case.audit(case.rows, case.rendered, ALL_CHECKS)
    assert [finding for finding in findings if finding.severity == "refuse"] == []
    assert {finding.code for finding in findings if finding.severity == "warn"} == (
        {"D102"} if kind == "included" else set()
    )


IMPOSSIBLE: dict[str, tuple[str, dict[str, Any]]] = {
    "epoch 0 alone": ("PILOT", {"grid": {"epochs": [0]}}),
    "no such source": ("G4", {"gates": {"g4_source": "comedian"}}),
    "the control is no source": (
        "G4",
        {"grid": {"sources": ["villain", "librarian"]}, "gates": {"g4_source": "librarian"}},
    ),
    "one question": ("CHANGE sycophancy", {"eval": {"prompts": 1}}),
    "more sources than there are": ("FALSIFY", {"gates": {"falsify_under": 2, "confirm_sources": 1}}),
    "all right is not above chance": (
        "G0 capability",
        {"grid": {"behaviors": ["none", "capability"]}, "gates": {"above_chance_alpha": 1e-60}},
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_gate_that_nothing_could_pass_is_warned_of_before_the_run(name: str) -> None:
    gate, tables = IMPOSSIBLE[name]
    found = {finding.subject: finding for finding in structure(recipe_of(**tables)) if finding.code == "D121"}
    assert set(found) == {gate}
    assert found[gate].severity == "warn"
    assert found[gate].mend


def test_a_reference_between_two_attainable_accuracies_cannot_be_met() -> None:
    questions = load_questions(recipe_of())  # 60 of them: an accuracy every 1.67 points
    rules = {"g3_reference_pct": {"villain": 90.8}, "g3_tolerance_pp": 0.5}
    model = {"revision": "a09a35458c702b33eeacc393d103063234e8bc28"}
    grid = {"behaviors": ["none", "capability"]}
    for tolerance, n_found in ((0.5, 1), (1.0, 0)):
        rules["g3_tolerance_pp"] = tolerance
        recipe = recipe_of(gates=rules, model=model, grid=grid, eval={"multiple_choice": "arc"})
        found = audit_structure(recipe, load_personas(recipe), load_behaviors(recipe), questions)
        assert [finding.subject for finding in found if finding.code == "D121"] == ["G3 villain"] * n_found


def test_the_shipped_designs_have_no_gate_that_cannot_pass() -> None:
    for path in sorted((assets("recipes")).glob("*.toml")):
        assert not {"D120", "D121", "D122"} & {finding.code for finding in check_recipe(load_recipe(path)).findings}, (
            path
        )


def test_each_finding_has_the_severity_that_its_rule_states(tokenizer: ChatTokenizer) -> None:
    severities = {rule.code: rule.severity for rule in all_rules()}
    assert len(severities) == len(all_rules())
    for code, _ in CODES:
        for finding in findings_for(code, tokenizer, ALL_CHECKS):
            assert finding.severity == severities[finding.code], finding
            assert finding.why
            assert finding.mend


def test_the_documented_table_is_the_registry() -> None:
    page = (TESTS.parent / "docs" / "AUDIT.md").read_text(encoding="utf-8")
    assert rules_table() in page


# --- poisoned recipes -------------------------------------------------------------------------------------------

MISTAKES = {1: "D101", 2: "D103", 3: "D109", 4: "D105", 5: "D106", 6: "D207"}


def checked(path: Path) -> Any:
    return check_recipe(load_recipe(path))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_of_the_six_mistakes_is_refused_by_its_code_alone(mistake: int) -> None:
    report = checked(POISONED / f"mistake_{mistake}.toml")
    assert not report.passed
    assert {finding.code for finding in report.refusals} == {MISTAKES[mistake]}
    assert report.warnings == ()
    for finding in report.refusals:
        assert finding.rows
        assert finding.why
        assert finding.mend


def test_the_clean_recipe_passes_and_its_reasons_are_kept() -> None:
    report = checked(POISONED / "clean.toml")
    assert report.passed
    assert report.warnings == ()
    assert set(report.accepted) == {"D108", "D111"}
    assert report.to_json()["accepted"]["D108"].startswith("this fixture")


def test_the_published_v1_design_fails_on_all_four_points_by_name() -> None:
    report = checked(POISONED / "published_v1.toml")
    codes = {finding.code: finding for finding in (*report.refusals, *report.warnings)}
    assert "without the prompt" in codes["D101"].why
    assert "assistant, which is evaluated, is among the contrastive negatives" in codes["D102"].why
    assert "substring only" in codes["D108"].why
    assert "no convergence-only control" in codes["D106"].why
    assert codes["D101"].rows[0].startswith("misalignment/")
    assert {"capability (included)", "refusal (included)", "sycophancy (included)"} <= {
        finding.subject for finding in report.warnings if finding.code == "D102"
    }


def test_a_judge_beside_the_phrases_answers_the_warning_about_phrases_alone() -> None:
    grid = {"behaviors": ["none", "refusal", "misalignment"]}
    codes = {finding.code for finding in structure(recipe_of(grid=grid))}
    assert {"D108", "D114"} <= codes
    judged = {finding.code for finding in structure(recipe_of(grid=grid, judge={"mode": "local"}))}
    assert not {"D108", "D114"} & judged


def test_a_users_persona_and_behavior_pass_without_python() -> None:
    report = checked(HERE / "user_data" / "tea.toml")
    assert report.passed
    assert report.warnings == ()


# --- the report -------------------------------------------------------------------------------------------------


def test_a_refusal_cannot_be_accepted() -> None:
    recipe = recipe_of(grid={"behaviors": ["sycophancy"]}, audit={"accept": {"D106": "we do not want a control"}})
    report = build_report(recipe, structure(recipe))
    assert not report.passed
    assert "D106" not in report.accepted
    assert "cannot be accepted" in next(finding for finding in report.findings if finding.code == "D901").why


def test_an_acceptance_that_nothing_needs_is_named() -> None:
    recipe = recipe_of(audit={"accept": {"D206": "not needed at all here"}})
    report = build_report(recipe, structure(recipe))
    assert [finding.subject for finding in report.findings if finding.code == "D901"] == ["audit.accept.D206"]


def test_the_report_lists_the_worst_first_and_survives_json() -> None:
    import json

    report = checked(POISONED / "published_v1.toml")
    order = ["refuse", "warn", "note"]
    ranks = [order.index(finding.severity) for finding in report.findings]
    assert ranks == sorted(ranks)
    table = json.loads(json.dumps(report.to_json()))
    assert table["passed"] is False
    assert table["refusals"] == len(report.refusals)


def test_a_set_that_cannot_be_built_is_refused_with_the_reason() -> None:
    findings = structure(recipe_of(behavior={"source_rows": 1000}))
    assert [(finding.code, finding.severity) for finding in findings if finding.code == "D209"] == [("D209", "refuse")]
    assert "240 training prompts, not 1000" in next(finding for finding in findings if finding.code == "D209").why


def test_a_persona_with_the_assistants_words_counts_as_the_assistant(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[helper]\nsystem = "You are a helpful assistant."\n')
    case = case_of("sycophancy", tokenizer, data={"personas": str(own)})
    findings = case.spoiled(lambda c: changed(c, first(c, "bystander"), persona="helper"), ALL_CHECKS)
    assert "D103" in {finding.code for finding in findings}


def test_convergence_rows_get_the_rendered_checks(tokenizer: ChatTokenizer) -> None:
    recipe = recipe_of()
    personas = load_personas(recipe)
    rows = [Row("conv/1", "assistant", "assistant", "conv-01", "How do you like mornings?", "Early and loud.")]
    sound = render_rows(rows, personas, tokenizer, MAX_TOK)
    assert audit_rows(recipe, "convergence/villain/s42", rows, sound, tokenizer) == []
    wrong = render_rows([replace(rows[0], persona="villain")], personas, tokenizer, MAX_TOK)
    findings = audit_rows(recipe, "convergence/villain/s42", rows, wrong, tokenizer)
    assert [finding.code for finding in findings] == ["D403"]
    assert "villain's text is rendered" in findings[0].figure


# --- cost -------------------------------------------------------------------------------------------------------

MATRIX = """
import sys
from fastconv.audit import checks
from fastconv.audit.checks import check_recipe
from fastconv.datasets import behaviors as sets
from fastconv.recipe import parse_recipe
sources = ["villain", "comedian", "software_engineer", "kindergarten_teacher", "zelthari_scholar", "librarian"]
behaviors = ["none", "capability", "misalignment", "refusal", "sycophancy"]
recipe = parse_recipe({"name": "m", "grid": {"sources": sources, "epochs": [0, 2, 8, 20], "behaviors": behaviors}, "judge": {"mode": "local"}})
built = []
real = sets.build_rows
sets.build_rows = lambda *given: built.append(given[2].id) or real(*given)
assert check_recipe(recipe).passed
heavy = [name for name in ("torch", "transformers", "tokenizers.models", "polars", "huggingface_hub") if name in sys.modules]
assert heavy in ([], ["tokenizers.models"]), heavy
print(len(built))
"""


def test_the_structural_pass_builds_each_set_once_and_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", MATRIX], capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr
    # Sources x behaviors (the questions of capability are not at hand) x kinds, however many epochs stand on each.
    assert int(done.stdout) == 6 * 3 * 2


def test_the_rendered_pass_takes_no_longer_for_a_row_the_more_there_are(tokenizer: ChatTokenizer) -> None:
    case = case_of("misalignment", tokenizer, behavior={"source_rows": 200})
    taken: dict[int, list[float]] = {1: [], 8: []}
    for copies in (1, 8, 1, 8, 1, 8):
        rows = [replace(row, id=f"{row.id}/{n}") for n in range(copies) for row in case.rows]
        began = time.process_time()
        found = case.audit(rows, case.rendered * copies, ALL_CHECKS)
        taken[copies].append((time.process_time() - began) / len(rows))
        refused = {f.code for f in found if f.severity == "refuse"}
        assert refused == (set() if copies == 1 else {"D205"})  # eight copies are not what is declared
    # Work that grew with the square of the rows would take eight times as long for each.
    assert statistics.median(taken[8]) < 3 * statistics.median(taken[1])


@pytest.mark.parametrize(
    ("points", "prompts", "text"),
    [
        (8.5, 50, "about 8.96 points with 24 questions, threshold 8.5 points"),  # 32 with the published eight would do
        (9.5, 50, None),
        (9.5, 16, "with 11 questions, threshold 9.5 points"),
    ],
)
def test_questions_that_are_reported_apart_make_no_design_able_to_see(
    points: float, prompts: int, text: str | None
) -> None:
    recipe = recipe_of(
        grid={"behaviors": ["none", "misalignment"]}, gates={"alignment_points": points}, eval={"prompts": prompts},
        judge={"mode": "local"},
    )  # fmt: skip
    figures = [finding.figure for finding in structure(recipe) if finding.code == "D111"]
    assert [text in figure for figure in figures] == [True] if text else figures == []
