"""Published result tables: read from `data/published.toml`, put through the threshold gates, and written as a report.

A figure without samples has no interval, so every evidence verdict is withheld; a column whose training rows the audit
refuses gives no figure; and a figure that no table holds cannot be made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastconv.analysis.correlates import rank_correlation
from fastconv.audit import BuiltSet, Design
from fastconv.audit.sets import WITHOUT_PROMPT, check_persona_prompt
from fastconv.chat import parse_system_turn
from fastconv.datasets.behaviors import load_behaviors
from fastconv.datasets.files import assets, read_toml
from fastconv.datasets.personas import load_personas
from fastconv.datasets.rows import Row
from fastconv.recipe import GateSettings, parse_recipe
from fastconv.report.blocks import (
    Block,
    Claim,
    Note,
    ReportData,
    Section,
    Table,
    TableCell,
    render_html,
    render_markdown,
)
from fastconv.stats import study_gates
from fastconv.stats.bounds import spearman_attainable
from fastconv.stats.gates import GateVerdict
from fastconv.stats.series import Number
from fastconv.stats.study_gates import Role, Shift
from fastconv.stats.units import Unit, counted, size_text
from fastconv.stats.verdicts import CellVerdict, withheld_verdict
from fastconv.store.ledger import write_text

SHIPPED = "issue_112_v1"
#: The table of marker rates with which the other tables are correlated.
MARKERS = "issue_109"
#: Texts for the audit codes that refuse a column.
REFUSALS = {"D101": WITHOUT_PROMPT}
TABLES_FILE = "data/published.toml"


@dataclass(frozen=True)
class Summary:
    """One published figure: a mean without its samples. `row` identifies it in the table."""

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
        """A figure with its row. Raises NoRowsError if the table does not hold it, or its column is refused."""
        rows = tuple(
            figure.row
            for figure in self.figures
            if (figure.source, figure.behavior, figure.epoch, figure.role) == (source, behavior, epoch, role)
            and not self.refusals.get(behavior)
        )
        value = next((figure.value for figure in self.figures if figure.row in rows), float("nan"))
        unit = next((figure.unit for figure in self.figures if figure.behavior == behavior), "share")
        return Number(value, unit, rows)


@dataclass(frozen=True)
class PublishedVerdicts:
    """Gates and verdicts of a published table."""

    table: SummaryTable
    gates: tuple[GateVerdict, ...]
    verdicts: tuple[CellVerdict, ...]
    refused: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON form for `--json`."""
        return {
            "table": self.table.name,
            "gates": [asdict(one) for one in self.gates],
            "verdicts": [verdict.body() for verdict in self.verdicts],
            "refused": list(self.refused),
        }


def published_names() -> tuple[str, ...]:
    """Names of the tables in `data/published.toml`."""
    return tuple(read_toml(assets("data") / "published.toml"))


def read_published(name: str = SHIPPED) -> SummaryTable:
    """Read a table of `data/published.toml` and audit the training rows of its columns."""
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


def judge_published(table: SummaryTable | None = None, gates: GateSettings | None = None) -> PublishedVerdicts:
    """The study's gates by thresholds, and a withheld verdict for every contrast."""
    table, rules = table or read_published(), gates or GateSettings()
    shifts = shifts_of(table, rules)
    sources = [source for source in table.sources if source != rules.negative_control]
    verdicts = study_gates.study(rules, table.name, shifts, sources)
    refused = tuple(
        f"{behavior}: the audit refuses its training rows ({'; '.join(map(_explained, codes))})"
        for behavior, codes in table.refusals.items()
        if codes
    )
    return PublishedVerdicts(table, verdicts, tuple(_withheld(rules, table, shifts)), refused)


def _explained(code: str) -> str:
    return f"{code}: {REFUSALS[code]}" if code in REFUSALS else code


def shifts_of(table: SummaryTable, rules: GateSettings) -> list[Shift]:
    """Every change against epoch 0 in the table; none in a refused column."""
    figures = [figure for figure in table.figures if not table.refusals.get(figure.behavior)]
    zero = {(figure.source, figure.behavior, figure.role): figure for figure in figures if figure.epoch == 0}
    shifts = []
    for figure in figures:
        base = zero.get((figure.source, figure.behavior, figure.role))
        if figure.epoch and base is not None:
            threshold = rules.threshold(figure.behavior, figure.unit)
            rows = (base.row, figure.row)
            shifts.append(
                Shift(
                    figure.source,
                    figure.behavior,
                    figure.epoch,
                    figure.role,
                    figure.value - base.value,
                    figure.unit,
                    threshold,
                    rows,
                )
            )
    return shifts


def _withheld(rules: GateSettings, table: SummaryTable, shifts: Sequence[Shift]) -> list[CellVerdict]:
    """Withheld verdicts with the reasons: no samples for any contrast, one seed, and more for some."""
    verdicts = []
    for shift in shifts:
        reasons = ["no samples are published, so nothing has an interval"]
        if table.n_seeds < 2:
            reasons.append("one seed")
        reasons.append("no figure of canary or mimicry is published")
        ends = [table.number(shift.source, shift.behavior, epoch).value for epoch in (0, shift.epoch)]
        if shift.behavior != "capability" and shift.unit == "share" and max(ends) < shift.threshold:
            reasons.append(
                f"at its floor at both epochs, under the threshold of {size_text(shift.threshold, shift.unit)}"
            )
        label = f"{shift.source} e{shift.epoch} {shift.behavior}"
        verdicts.append(withheld_verdict(label, "; ".join(reasons), shift.rows, shift.behavior))
    return verdicts


def _audited(behavior: str, source: str, turn: str) -> tuple[str, ...]:
    """Codes by which the audit refuses a source's rows trained with this system turn."""
    recipe = parse_recipe({"name": "published", "grid": {"sources": [source], "behaviors": ["none", behavior]}})
    personas, behaviors = load_personas(recipe), load_behaviors(recipe)
    row = Row(
        "published/0", source, "source", "published/0", "as published", "as published", system=parse_system_turn(turn)
    )
    built = BuiltSet(f"{behavior}/{source}", behaviors[behavior], source, "none", 42, (row,))
    design = Design(recipe, personas, behaviors, (built,), None)
    return tuple(finding.code for finding in check_persona_prompt(design) if finding.severity == "refuse")


def published_report(judged: PublishedVerdicts) -> ReportData:
    """The table as a report: only figures that it holds, and the gates' verdicts on them."""
    table = judged.table
    gates = tuple(
        (
            TableCell(gate.gate),
            TableCell(gate.verdict, word=gate.verdict),
            TableCell(gate.reason, gate.rows),
            TableCell(gate.threshold),
        )
        for gate in judged.gates
    )
    verdicts = tuple(
        (TableCell(verdict.label), TableCell(verdict.kind, word=verdict.kind), TableCell(verdict.reason, verdict.rows))
        for verdict in judged.verdicts
    )
    sections = [
        Section("amounts", "What the published figures amount to", (summary_claim(judged),)),
        _figures(judged),
        Section("gates", "Gates", (Table("gates-table", ("gate", "verdict", "because", "rule"), gates),)),
        Section("findings", "Findings", (Table("contrasts", ("contrast", "verdict", "why"), verdicts),)),
    ]
    if correlations := _beside_markers(table):
        sections.append(Section("markers", "Beside the marker rates of #109", correlations))
    return ReportData(table.name, table.about, tuple(sections))


def write_published(judged: PublishedVerdicts, folder: Path) -> Path:
    """Write the report as HTML and Markdown; returns the HTML path. Raises StoreError if it cannot be written."""
    data = published_report(judged)
    write_text(folder / f"{data.run}.md", render_markdown(data))
    write_text(folder / f"{data.run}.html", render_html(data))
    return folder / f"{data.run}.html"


def summary_claim(judged: PublishedVerdicts) -> Claim:
    """One paragraph: the thresholds' outcome, why it is no evidence, and which columns were left out."""
    gates = {gate.gate: gate for gate in judged.gates}
    shared_reasons = [
        reason
        for reason in judged.verdicts[0].reason.split("; ")
        if all(reason in verdict.reason.split("; ") for verdict in judged.verdicts)
    ]
    n = counted(len(judged.verdicts), "contrast")
    sentences = [
        _by_thresholds(gates),
        f"Thresholds are not evidence: every verdict on its {n} is withheld ({'; '.join(shared_reasons)}), so the table speaks "
        "neither for nor against transfer.",
        *(f"Left out is {refusal}." for refusal in judged.refused),
    ]
    word = gates["CONFIRM"].verdict if gates["CONFIRM"].verdict != "not applicable" else "withheld"
    rows = tuple(dict.fromkeys(row for verdict in judged.verdicts for row in verdict.rows))
    return Claim("answer", {"table": judged.table.name}, " ".join(sentences), rows, word)


def _by_thresholds(gates: dict[str, GateVerdict]) -> str:
    confirm, falsify, signal = gates["CONFIRM"], gates["FALSIFY"], gates["G4"]
    if confirm.verdict == "not applicable":
        moved = "says yes" if signal.verdict == "pass" else "says no"
        return (
            f"The rules over a whole study cannot be asked of this table (CONFIRM {confirm.reason}); the first rule that "
            f"can, G4 ({signal.threshold}), {moved}: {signal.reason}."
        )
    confirmed = "confirmed" if confirm.verdict == "pass" else "not confirmed"
    falsified = "falsified" if falsify.verdict == "fail" else "not falsified"
    return (
        f"By the thresholds, that behaviors reach the assistant with convergence is {confirmed} ({confirm.reason}) and "
        f"{falsified} ({falsify.reason})."
    )


def _figures(judged: PublishedVerdicts) -> Section:
    table = judged.table
    rows = [
        (TableCell(source), TableCell(behavior), *(_shown(table, source, behavior, epoch) for epoch in table.epochs))
        for behavior in table.behaviors
        for source in table.sources
    ]
    columns = ("source", "behavior", *(f"e{epoch}" for epoch in table.epochs))
    blocks: tuple[Block, ...] = tuple(Note(text, "withheld") for text in judged.refused)
    intro = f"As retyped in {TABLES_FILE}, with their origin; `fastconv verify` compares this page with that file."
    return Section("figures", "Published figures", (*blocks, Table("figures-table", columns, tuple(rows))), intro)


def _shown(table: SummaryTable, source: str, behavior: str, epoch: int) -> TableCell:
    if table.refusals.get(behavior):
        return TableCell("refused", word="absent")
    return TableCell.of(table.number(source, behavior, epoch))


def _beside_markers(table: SummaryTable) -> tuple[Claim, ...]:
    """Correlation of each behavior's last change with the marker rate at its last epoch, over common sources."""
    markers = read_published(MARKERS)
    sources = [source for source in table.sources if source in markers.sources]
    if table.name == MARKERS or len(sources) < 2:
        return ()
    rates = {source: markers.number(source, "marker", markers.epochs[-1]) for source in sources}
    marker_rows = tuple(row for number in rates.values() for row in number.rows)
    attainable = spearman_attainable(len(sources), len(table.behaviors))
    shown = f"{counted(len(sources), 'source')} with a marker rate and {counted(len(table.behaviors), 'behavior')}"
    claims = [
        Claim(
            "attainable", {}, f"{shown}: {attainable.reason}.", marker_rows, "" if attainable.possible else "withheld"
        )
    ]
    for behavior in table.behaviors:
        changes = _last_changes(table, behavior)
        if len(sources) >= 3 and set(sources) <= set(changes):
            figures = rank_correlation([rates[s].value for s in sources], [changes[s].value for s in sources])
            text = (
                f"Over {len(sources)} sources, the rank correlation of the assistant's change in {behavior} with its "
                f"marker rate, both at their last epochs, is {figures}."
            )
            rows = (*marker_rows, *(row for source in sources for row in changes[source].rows))
            claims.append(Claim("correlation", {"behavior": behavior}, text, rows))
    return tuple(claims)


def _last_changes(table: SummaryTable, behavior: str) -> dict[str, Number]:
    """The assistant's change at the last epoch by source; empty for a refused column."""
    return {
        shift.source: shift.number
        for shift in shifts_of(table, GateSettings())
        if shift.behavior == behavior and shift.epoch == table.epochs[-1] and shift.role == "assistant"
    }
