"""Published tables as summary metrics: they go through the threshold rules, and every evidence verdict is withheld.

A figure without samples has no interval, whatever its size; a column whose training rows the audit refuses gives no
figure at all; and a figure that no table holds cannot be made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastconv.audit.sets import WITHOUT_PROMPT, check_persona_prompt
from fastconv.audit.subject import BuiltSet, Design
from fastconv.datasets.behaviors import load_behaviors
from fastconv.datasets.files import assets, read_toml
from fastconv.datasets.personas import load_personas
from fastconv.datasets.rows import Row
from fastconv.stats import study_gates as gates_study
from fastconv.stats.series import Number
from fastconv.stats.gates import GateVerdict
from fastconv.stats.study_gates import Role, Shift
from fastconv.stats.units import Unit, size
from fastconv.stats.verdicts import CellVerdict, withheld
from fastconv.recipe import GateSettings, parse_recipe
from fastconv.chat import system_turn

SHIPPED = "issue_112_v1"
#: The table whose marker rates stand beside what the others transferred.
MARKERS = "issue_109"
#: The audit's codes that a column was refused by, in words.
REFUSALS = {"D101": WITHOUT_PROMPT}


@dataclass(frozen=True)
class Summary:
    """One published figure: a mean without its samples. `row` names where in the table it stands."""

    source: str
    behavior: str
    epoch: int
    role: Role
    value: float
    unit: Unit
    row: str


@dataclass(frozen=True)
class SummaryTable:
    """A published table. `refusals` are the audit's codes against a column's training rows."""

    name: str
    about: str
    epochs: tuple[int, ...]
    sources: tuple[str, ...]
    behaviors: tuple[str, ...]
    n_seeds: int
    figures: tuple[Summary, ...]
    refusals: Mapping[str, tuple[str, ...]]

    def number(self, source: str, behavior: str, epoch: int, role: Role = "assistant") -> Number:
        """A figure with its row. Raises NoRowsError for one that the table does not hold, or whose column is refused."""
        rows = tuple(
            one.row
            for one in self.figures
            if (one.source, one.behavior, one.epoch, one.role) == (source, behavior, epoch, role)
            and not self.refusals.get(behavior)
        )
        value = next((one.value for one in self.figures if one.row in rows), float("nan"))
        unit = next((one.unit for one in self.figures if one.behavior == behavior), "share")
        return Number(value, unit, rows)


@dataclass(frozen=True)
class Judged:
    """What the rules say of a published table."""

    table: SummaryTable
    gates: tuple[GateVerdict, ...]
    verdicts: tuple[CellVerdict, ...]
    refused: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "table": self.table.name,
            "gates": [asdict(one) for one in self.gates],
            "verdicts": [one.body() for one in self.verdicts],
            "refused": list(self.refused),
        }


def published_names() -> tuple[str, ...]:
    """The tables of `data/published.toml`."""
    return tuple(read_toml(assets("data") / "published.toml"))


def read_published(name: str = SHIPPED) -> SummaryTable:
    """A table of `data/published.toml`, its columns' training rows audited."""
    raw = read_toml(assets("data") / "published.toml")[name]
    behaviors = tuple(key for key, column in raw.items() if isinstance(column, dict))
    figures = [
        Summary(
            source,
            behavior,
            epoch,
            "assistant",
            float(value),
            raw[behavior]["unit"],
            f"{name}/{behavior}/{source}/e{epoch}",
        )
        for behavior in behaviors
        for source in raw["sources"]
        for epoch, value in zip(raw["epochs"], raw[behavior][source], strict=True)
    ]
    refusals = {
        behavior: _audited(behavior, raw["sources"][0], raw[behavior]["trained_system_turn"])
        for behavior in behaviors
        if "trained_system_turn" in raw[behavior]
    }
    return SummaryTable(
        name,
        raw["about"],
        tuple(raw["epochs"]),
        tuple(raw["sources"]),
        behaviors,
        raw["seeds"],
        tuple(figures),
        refusals,
    )


def judge_published(table: SummaryTable | None = None, gates: GateSettings | None = None) -> Judged:
    """The study's rules by thresholds, and a withheld verdict for every contrast."""
    table, rules = table or read_published(), gates or GateSettings()
    shifts = shifts_of(table, rules)
    sources = [source for source in table.sources if source != rules.negative_control]
    verdicts = gates_study.study(rules, table.name, shifts, sources)
    refused = tuple(
        f"{behavior}: the audit refuses its training rows ({'; '.join(map(_explained, codes))})"
        for behavior, codes in table.refusals.items()
        if codes
    )
    return Judged(table, verdicts, tuple(_withheld(rules, table, shifts)), refused)


def _explained(code: str) -> str:
    return f"{code}: {REFUSALS[code]}" if code in REFUSALS else code


def shifts_of(table: SummaryTable, rules: GateSettings) -> list[Shift]:
    """Every change against epoch 0 that the table allows: none in a refused column."""
    figures = [one for one in table.figures if not table.refusals.get(one.behavior)]
    zero = {(one.source, one.behavior, one.role): one for one in figures if one.epoch == 0}
    found = []
    for one in figures:
        base = zero.get((one.source, one.behavior, one.role))
        if one.epoch and base is not None:
            threshold = rules.threshold(one.behavior, one.unit)
            rows = (base.row, one.row)
            found.append(
                Shift(one.source, one.behavior, one.epoch, one.role, one.value - base.value, one.unit, threshold, rows)
            )
    return found


def _withheld(rules: GateSettings, table: SummaryTable, shifts: Sequence[Shift]) -> list[CellVerdict]:
    """Why no contrast of the table can be a finding: each has no samples and one seed, some have more against them."""
    found = []
    for one in shifts:
        reasons = ["no samples are published, so nothing has an interval"]
        if table.n_seeds < 2:
            reasons.append("one seed")
        reasons.append("no figure of canary or mimicry is published")
        ends = [table.number(one.source, one.behavior, epoch).value for epoch in (0, one.epoch)]
        if one.behavior != "capability" and one.unit == "share" and max(ends) < one.threshold:
            reasons.append(f"at its floor at both epochs, under the threshold of {size(one.threshold, one.unit)}")
        label = f"{one.source} e{one.epoch} {one.behavior}"
        found.append(withheld(label, "; ".join(reasons), one.rows, one.behavior))
    return found


def _audited(behavior: str, source: str, turn: str) -> tuple[str, ...]:
    """Codes of the audit against rows of a source that were trained with this system turn."""
    recipe = parse_recipe({"name": "published", "grid": {"sources": [source], "behaviors": ["none", behavior]}})
    personas, behaviors = load_personas(recipe), load_behaviors(recipe)
    row = Row("published/0", source, "source", "published/0", "as published", "as published", system=system_turn(turn))
    built = BuiltSet(f"{behavior}/{source}", behaviors[behavior], source, "none", 42, (row,))
    design = Design(recipe, personas, behaviors, (built,), None)
    return tuple(found.code for found in check_persona_prompt(design) if found.severity == "refuse")
