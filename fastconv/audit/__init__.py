"""Types of the audit: its rules, its findings and report, and what its checks look at.

A check takes a `Design` (a recipe with every set of rows that could be built) or a `RenderedSet` and yields findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from fastconv.datasets.behaviors import NO_BEHAVIOR, Behavior, negatives_kinds, open_questions
from fastconv.datasets.personas import Personas
from fastconv.datasets.questions import QuestionSet
from fastconv.datasets.rows import Row
from fastconv.recipe import NegativesKind, Recipe, recipe_sha256

Severity = Literal["refuse", "warn", "note"]
Subject = TypeVar("Subject")
_SEVERITIES: tuple[Severity, ...] = ("refuse", "warn", "note")  # the worst first

# --- findings and their report -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault that the audit found. Codes are stable, as a recipe may accept a warning by its code.

    `subject` is the set, behavior or key it is about, `rows` the ids of the rows (or cells) concerned, `why` the
    reason, `mend` the fix, `figure` the number behind it in words.
    """

    code: str
    severity: Severity
    subject: str
    rows: tuple[str, ...]
    why: str
    mend: str
    figure: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of the registry: a code, its severity, the design fault that it stands for, and an example of it.

    docs/AUDIT.md is written from these.
    """

    code: str
    severity: Severity
    fault: str
    example: str


@dataclass(frozen=True)
class AuditCheck(Generic[Subject]):
    """One check: the rules whose findings it may yield, and the function that yields them."""

    rules: tuple[Rule, ...]
    run: Callable[[Subject], Iterable[Finding]]

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the rules."""
        return tuple(rule.code for rule in self.rules)


@dataclass(frozen=True)
class CheckReport:
    """All findings on a recipe, the worst first. `accepted`: code of a warning found -> the recipe's reason for it."""

    recipe: str
    recipe_sha256: str
    findings: tuple[Finding, ...]
    accepted: dict[str, str]

    def _of(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == severity)

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """Findings that forbid training (gate G1)."""
        return self._of("refuse")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Warnings that the recipe does not accept."""
        return tuple(finding for finding in self._of("warn") if finding.code not in self.accepted)

    @property
    def passed(self) -> bool:
        """Whether there is no refusal, so that the sets may be trained on."""
        return not self.refusals

    def to_json(self) -> dict[str, Any]:
        """The report as JSON, for `--json` and for the ledger."""
        return {
            "recipe": self.recipe,
            "recipe_sha256": self.recipe_sha256,
            "passed": self.passed,
            "refusals": len(self.refusals),
            "warnings": len(self.warnings),
            "accepted": dict(self.accepted),
            "findings": [
                {**asdict(finding), "rows": list(finding.rows), "accepted": self.accepted.get(finding.code)}
                for finding in self.findings
            ],
        }


def build_report(recipe: Recipe, findings: Sequence[Finding]) -> CheckReport:
    """The report of these findings with the recipe's acceptances applied; a refusal cannot be accepted.

    An acceptance without a matching warning becomes a note of its own (D901).
    """
    severities_of = {
        code: {finding.severity for finding in findings if finding.code == code} for code in recipe.audit.accept
    }
    unused = []
    for code, severities in severities_of.items():
        if "warn" in severities:
            continue
        why = "a refusal cannot be accepted" if "refuse" in severities else "no warning with this code was found"
        mend = "mend the data" if "refuse" in severities else f"take {code} out of audit.accept"
        unused.append(Finding("D901", "note", f"audit.accept.{code}", (), why, mend))
    accepted = {code: recipe.audit.accept[code] for code, severities in severities_of.items() if "warn" in severities}
    ranked = sorted(
        [*findings, *unused],
        key=lambda finding: (_SEVERITIES.index(finding.severity), finding.code, finding.subject),
    )
    return CheckReport(recipe.name, recipe_sha256(recipe), tuple(ranked), accepted)


# --- what the checks look at -------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuiltSet:
    """One behavior set: the training rows of a behavior for one source, one kind of negatives and one seed."""

    name: str
    behavior: Behavior
    source: str
    kind: NegativesKind
    seed: int
    rows: tuple[Row, ...]
    arm: str = ""

    @property
    def source_rows(self) -> list[Row]:
        """The rows that train the behavior into the source."""
        return [row for row in self.rows if row.role == "source"]

    @property
    def negatives(self) -> list[Row]:
        """The contrastive rows of other personas."""
        return [row for row in self.rows if row.role != "source"]


@dataclass(frozen=True)
class Design:
    """A recipe, its personas and behaviors, and every set that could be built.

    `questions` is None if the multiple-choice questions are not available.
    """

    recipe: Recipe
    personas: Personas
    behaviors: Mapping[str, Behavior]
    sets: tuple[BuiltSet, ...]
    questions: QuestionSet | None

    def by_behavior(self) -> Iterator[tuple[Behavior, list[BuiltSet]]]:
        """Each behavior that has sets, with these."""
        for behavior in self.behaviors.values():
            sets = [built for built in self.sets if built.behavior.id == behavior.id]
            if sets:
                yield behavior, sets

    def by_kind(self) -> Iterator[tuple[str, list[BuiltSet]]]:
        """("behavior (kind)", its sets over sources and seeds) for each kind of negatives."""
        for behavior, sets in self.by_behavior():
            for kind in dict.fromkeys(built.kind for built in sets):
                yield f"{behavior.id} ({kind})", [built for built in sets if built.kind == kind]

    def cells(self) -> tuple[str, ...]:
        """Ids of all trained cells, for findings on the design and not on its rows."""
        grid = self.recipe.grid
        return tuple(
            f"{source}/e{epoch}/{name}/{kind}"
            for source in grid.sources
            for epoch in grid.epochs
            for name, behavior in self.behaviors.items()
            if name != NO_BEHAVIOR and behavior.trained
            for kind in negatives_kinds(self.recipe, behavior)
        )

    @cached_property
    def held_out(self) -> dict[str, dict[str, str]]:
        """Behavior -> {id: user turn} of all its evaluation prompts."""
        texts: dict[str, dict[str, str]] = {}
        for name, behavior in self.behaviors.items():
            if behavior.spec.measure == "letters":
                questions = self.questions.eval if self.questions else ()
                texts[name] = {question.id: question.user for question in questions}
            else:
                texts[name] = {str(row["id"]): str(row[behavior.eval_field]) for row in behavior.eval}
        return texts

    @cached_property
    def open_lists(self) -> dict[str, dict[str, str]]:
        """Name of a shipped list of open questions -> {id: text}."""
        return {name: dict(open_questions(name)) for name in ("convergence", "alignment", "marker")}


def row_ids(rows: Iterable[Row]) -> tuple[str, ...]:
    """The ids of rows in order, without repetitions."""
    return tuple(dict.fromkeys(row.id for row in rows))
