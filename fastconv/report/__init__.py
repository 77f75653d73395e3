"""Builds a report from the ledger and writes HTML, Markdown, figures and tables.

A section is a function from `Analysis` to a `Section`, or None if it has no content; `SECTIONS` lists them in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastconv.analysis.analysis import Analysis
from fastconv.experiment.graph import Graph
from fastconv.report.behaviors import beside, gates, letters, markers, mimicry, power
from fastconv.report.blocks import Note, ReportData, Section, render_html, render_markdown
from fastconv.report.export import frames_of, parquet_bytes
from fastconv.report.measures import answers, geometry, judge_against_phrases, measurements, on_the_base, over_epochs
from fastconv.report.overview import findings, headline
from fastconv.report.record import card, cost, curves_and_rho, failures, limits, planned, superseded, warnings
from fastconv.store.io import storage_errors, write_atomically
from fastconv.store.ledger import Store, write_text

SECTIONS: tuple[Callable[[Analysis], Section | None], ...] = (
    headline, failures, findings, over_epochs, mimicry, geometry, on_the_base, markers, judge_against_phrases, power, gates, beside,
    measurements, letters, curves_and_rho, cost, planned, answers, warnings, superseded, limits, card,
)  # fmt: skip


@dataclass(frozen=True)
class ReportPaths:
    """Paths of a report; `folder` holds its figures (SVG and PNG) and tables (Parquet)."""

    html: Path
    markdown: Path
    folder: Path


def write_report(graph: Graph, store: Store, folder: Path) -> ReportPaths:
    """Write the report of a recipe from the present ledger. Raises StoreError if the folder cannot be written."""
    decided = Analysis(graph, store)
    data = build(decided)
    paths = ReportPaths(folder / f"{data.run}.html", folder / f"{data.run}.md", folder / data.run)
    with storage_errors(folder):
        for name in ("figures", "tables"):
            (paths.folder / name).mkdir(parents=True, exist_ok=True)
        for figure in data.figures():
            write_atomically(paths.folder / "figures" / f"{figure.id}.svg", figure.svg)
            write_atomically(paths.folder / "figures" / f"{figure.id}.png", figure.png)
        for name, frame in frames_of(decided).items():
            write_atomically(paths.folder / "tables" / f"{name}.parquet", parquet_bytes(frame))
    write_text(paths.html, render_html(data))
    write_text(paths.markdown, render_markdown(data))
    return paths


def collect(graph: Graph, store: Store) -> ReportData:
    """Everything the report shows. Cells that were not run are shown as such, never as numbers."""
    return build(Analysis(graph, store))


def build(decided: Analysis) -> ReportData:
    """The report of an analysis."""
    sections = [section for make in SECTIONS if (section := make(decided)) is not None]
    return ReportData(decided.run, decided.graph.recipe.about, tuple(sections), _banners(decided))


def _banners(decided: Analysis) -> tuple[Note, ...]:
    """Notes that precede the first number: edited thresholds and ignored gates."""
    notes = []
    if decided.first is not None:
        changes = "; ".join(decided.first.changes)
        notes.append(
            Note(
                f"Thresholds were edited after results were seen. First run: {decided.first.run}; changed since: {changes}. "
                "Verdicts under both stand with the gates.",
                "edited",
            )
        )
    notes += [Note(f"Gate {code} was ignored, because {why}.", "ignored") for code, why in decided.ignored.items()]
    return tuple(notes)
