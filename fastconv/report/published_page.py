"""A published table as a report: what its figures amount to in plain words, then the figures and what the rules say."""

from __future__ import annotations

from pathlib import Path

from fastconv.report.blocks import Block, Cell, Claim, Note, ReportData, Section, Table
from fastconv.stats.series import Number
from fastconv.stats.gates import GateVerdict
from fastconv.stats.power import spearman_attainable
from fastconv.report.render import render_html, render_markdown
from fastconv.stats.units import counted
from fastconv.recipe import GateSettings
from fastconv.report.claims import rank_correlation
from fastconv.report.published import MARKERS, Judged, SummaryTable, read_published, shifts_of
from fastconv.store.ledger import write_text

MADE_OF = "data/published.toml"


def published_report(judged: Judged) -> ReportData:
    """The table as a report: only figures that it holds, and what the rules say of them."""
    table = judged.table
    gates = tuple(
        (Cell(one.gate), Cell(one.verdict, word=one.verdict), Cell(one.reason, one.rows), Cell(one.threshold))
        for one in judged.gates
    )
    verdicts = tuple(
        (Cell(one.label), Cell(one.kind, word=one.kind), Cell(one.reason, one.rows)) for one in judged.verdicts
    )
    sections = [
        Section("amounts", "What the published figures amount to", (lead(judged),)),
        _figures(judged),
        Section("gates", "Gates", (Table("gates-table", ("gate", "verdict", "because", "rule"), gates),)),
        Section("findings", "Findings", (Table("contrasts", ("contrast", "verdict", "why"), verdicts),)),
    ]
    if correlations := _beside_markers(table):
        sections.append(Section("markers", "Beside the marker rates of #109", correlations))
    return ReportData(table.name, table.about, tuple(sections))


def write_published(judged: Judged, folder: Path) -> Path:
    """Write that report as a page and its Markdown twin; returns the page. Raises StoreError if the folder cannot be."""
    data = published_report(judged)
    write_text(folder / f"{data.run}.md", render_markdown(data))
    write_text(folder / f"{data.run}.html", render_html(data))
    return folder / f"{data.run}.html"


def lead(judged: Judged) -> Claim:
    """One paragraph: what the thresholds say, that none of it is evidence and why, and what was left out."""
    gates = {one.gate: one for one in judged.gates}
    shared = [
        reason
        for reason in judged.verdicts[0].reason.split("; ")
        if all(reason in one.reason.split("; ") for one in judged.verdicts)
    ]
    n = counted(len(judged.verdicts), "contrast")
    said = [
        _by_thresholds(gates),
        f"Thresholds are not evidence: every verdict on its {n} is withheld ({'; '.join(shared)}), so the table speaks "
        "neither for nor against transfer.",
        *(f"Left out is {one}." for one in judged.refused),
    ]
    word = gates["CONFIRM"].verdict if gates["CONFIRM"].verdict != "not applicable" else "withheld"
    rows = tuple(dict.fromkeys(row for one in judged.verdicts for row in one.rows))
    return Claim("answer", {"table": judged.table.name}, " ".join(said), rows, word)


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


def _figures(judged: Judged) -> Section:
    table = judged.table
    rows = [
        (Cell(source), Cell(behavior), *(_shown(table, source, behavior, epoch) for epoch in table.epochs))
        for behavior in table.behaviors
        for source in table.sources
    ]
    columns = ("source", "behavior", *(f"e{epoch}" for epoch in table.epochs))
    blocks: tuple[Block, ...] = tuple(Note(text, "withheld") for text in judged.refused)
    intro = f"As retyped in {MADE_OF}, with their origin; `fastconv verify` compares this page with that file."
    return Section("figures", "Published figures", (*blocks, Table("figures-table", columns, tuple(rows))), intro)


def _shown(table: SummaryTable, source: str, behavior: str, epoch: int) -> Cell:
    if table.refusals.get(behavior):
        return Cell("refused", word="absent")
    return Cell.of(table.number(source, behavior, epoch))


def _beside_markers(table: SummaryTable) -> tuple[Claim, ...]:
    """Each behavior's last change beside the marker rate at its last epoch, over the sources that both tables have."""
    markers = read_published(MARKERS)
    sources = [source for source in table.sources if source in markers.sources]
    if table.name == MARKERS or len(sources) < 2:
        return ()
    rates = {source: markers.number(source, "marker", markers.epochs[-1]) for source in sources}
    marked = tuple(row for one in rates.values() for row in one.rows)
    attainable = spearman_attainable(len(sources), len(table.behaviors))
    shown = f"{counted(len(sources), 'source')} with a marker rate and {counted(len(table.behaviors), 'behavior')}"
    found = [
        Claim("attainable", {}, f"{shown}: {attainable.reason}.", marked, "" if attainable.possible else "withheld")
    ]
    for behavior in table.behaviors:
        changes = _last_changes(table, behavior)
        if len(sources) >= 3 and set(sources) <= set(changes):
            figures = rank_correlation([rates[s].value for s in sources], [changes[s].value for s in sources])
            text = (
                f"Over {len(sources)} sources, the rank correlation of the assistant's change in {behavior} with its "
                f"marker rate, both at their last epochs, is {figures}."
            )
            rows = (*marked, *(row for source in sources for row in changes[source].rows))
            found.append(Claim("correlation", {"behavior": behavior}, text, rows))
    return tuple(found)


def _last_changes(table: SummaryTable, behavior: str) -> dict[str, Number]:
    """The assistant's change at the last epoch by source; empty for a refused column."""
    return {
        one.source: one.number
        for one in shifts_of(table, GateSettings())
        if one.behavior == behavior and one.epoch == table.epochs[-1] and one.role == "assistant"
    }
