"""What the audit says: a finding with a stable code, and the report of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Literal, TypeVar

from fastconv.recipe import Recipe, recipe_sha256

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
class Check(Generic[Subject]):
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
