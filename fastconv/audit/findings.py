"""What the audit says: a finding with a stable code, and the report of all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from fastconv.datasets.behaviors import NO_BEHAVIOR, Behavior, kinds_of, open_questions
from fastconv.datasets.personas import Personas
from fastconv.datasets.questions import QuestionSet
from fastconv.datasets.rows import Row
from fastconv.recipe import NegativesKind, Recipe, recipe_sha256

Severity = Literal["refuse", "warn", "note"]
Subject = TypeVar("Subject")
_WEIGHT: tuple[Severity, ...] = ("refuse", "warn", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the audit found. Codes are stable: a recipe may accept a warning by its code.

    `subject` is the set, behavior or key it is about, `rows` the ids of the rows (or cells) concerned, `figure` the
    number behind it, in words.
    """

    code: str
    severity: Severity
    subject: str
    rows: tuple[str, ...]
    why: str
    mend: str
    figure: str = ""


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """One line of a table of checks: the codes it may give, and the function that gives them."""

    codes: tuple[str, ...]
    run: Callable[[Subject], Iterable[Finding]]


@dataclass(frozen=True)
class CheckReport:
    """All findings on a recipe, the worst first. `accepted` are the recipe's reasons for warnings found here."""

    recipe: str
    recipe_sha256: str
    findings: tuple[Finding, ...]
    accepted: dict[str, str]

    def _of(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(found for found in self.findings if found.severity == severity)

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """Findings that nothing may be trained with (gate G1)."""
        return self._of("refuse")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Warnings that the recipe does not accept."""
        return tuple(found for found in self._of("warn") if found.code not in self.accepted)

    @property
    def passed(self) -> bool:
        """No refusal: the sets may be trained on."""
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
                {**asdict(found), "rows": list(found.rows), "accepted": self.accepted.get(found.code)}
                for found in self.findings
            ],
        }


def report_of(recipe: Recipe, findings: Sequence[Finding]) -> CheckReport:
    """Findings with the recipe's acceptances applied. A refusal stays one, whatever the recipe accepts."""
    severity_of = {code: {found.severity for found in findings if found.code == code} for code in recipe.audit.accept}
    extra = []
    for code, severities in severity_of.items():
        if "warn" in severities:
            continue
        why = "a refusal cannot be accepted" if "refuse" in severities else "no warning with this code was found"
        mend = "mend the data" if "refuse" in severities else f"take {code} out of audit.accept"
        extra.append(Finding("D901", "note", f"audit.accept.{code}", (), why, mend))
    accepted = {code: recipe.audit.accept[code] for code, severities in severity_of.items() if "warn" in severities}
    every = sorted([*findings, *extra], key=lambda found: (_WEIGHT.index(found.severity), found.code, found.subject))
    return CheckReport(recipe.name, recipe_sha256(recipe), tuple(every), accepted)


_APOSTROPHES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u02bc": "'"})
_WORD = re.compile(r"\w+(?:'\w+)?")
#: Words in a row that two prompts must share to count as near each other.
GRAM = 5


@dataclass(frozen=True)
class BuiltSet:
    """One behavior set: the rows of a source with one kind of negatives, for one seed."""

    name: str
    behavior: Behavior
    source: str
    kind: NegativesKind
    seed: int
    rows: tuple[Row, ...]

    @property
    def source_rows(self) -> list[Row]:
        """The rows that train the behavior."""
        return [row for row in self.rows if row.role == "source"]

    @property
    def negatives(self) -> list[Row]:
        """The rows that train its contrast."""
        return [row for row in self.rows if row.role != "source"]


@dataclass(frozen=True)
class Design:
    """A recipe, what it names, and every set that could be built. `questions` is None while they are not at hand."""

    recipe: Recipe
    personas: Personas
    behaviors: Mapping[str, Behavior]
    sets: tuple[BuiltSet, ...]
    questions: QuestionSet | None

    def by_behavior(self) -> Iterator[tuple[Behavior, list[BuiltSet]]]:
        """Each behavior with its sets, behaviors without a set left out."""
        for behavior in self.behaviors.values():
            sets = [built for built in self.sets if built.behavior.id == behavior.id]
            if sets:
                yield behavior, sets

    def by_kind(self) -> Iterator[tuple[str, list[BuiltSet]]]:
        """("behavior (kind)", its sets over sources and seeds)."""
        for behavior, sets in self.by_behavior():
            for kind in dict.fromkeys(built.kind for built in sets):
                yield f"{behavior.id} ({kind})", [built for built in sets if built.kind == kind]

    def cells(self, *, epoch: int | None = None) -> tuple[str, ...]:
        """Ids of the trained cells, for findings that concern a design and not its rows."""
        grid = self.recipe.grid
        return tuple(
            f"{source}/e{at}/{name}/{kind}"
            for source in grid.sources
            for at in grid.epochs
            if epoch is None or at == epoch
            for name, behavior in self.behaviors.items()
            if name != NO_BEHAVIOR
            for kind in kinds_of(self.recipe, behavior)
        )

    @cached_property
    def held_out(self) -> dict[str, dict[str, str]]:
        """Behavior -> {id: user turn} of everything that it may be evaluated with."""
        texts: dict[str, dict[str, str]] = {}
        for name, behavior in self.behaviors.items():
            if behavior.spec.measure == "letters":
                asked = self.questions.eval if self.questions else ()
                texts[name] = {question.id: question.user for question in asked}
            else:
                texts[name] = {str(row["id"]): str(row[behavior.eval_field]) for row in behavior.eval}
        return texts

    @cached_property
    def open_lists(self) -> dict[str, dict[str, str]]:
        """List -> {id: text} of the shipped open questions."""
        return {name: dict(open_questions(name)) for name in ("convergence", "alignment", "marker")}


def words(text: str) -> list[str]:
    """Words of a text without case, punctuation or the kind of apostrophe."""
    return _WORD.findall(text.translate(_APOSTROPHES).casefold())


def normalised(text: str) -> str:
    """Equal for two texts that differ in case, white space and punctuation alone."""
    return " ".join(words(text))


def grams(text: str) -> frozenset[tuple[str, ...]]:
    """Runs of five words; a shorter text is one run."""
    found = words(text)
    if len(found) < GRAM:
        return frozenset([tuple(found)]) if found else frozenset()
    return frozenset(tuple(found[at : at + GRAM]) for at in range(len(found) - GRAM + 1))


def ids(rows: Iterable[Row]) -> tuple[str, ...]:
    """Ids of rows, in order, each once."""
    return tuple(dict.fromkeys(row.id for row in rows))
