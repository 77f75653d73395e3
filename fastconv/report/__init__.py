"""Builds a report from the ledger and writes HTML, Markdown, figures and tables.

A section is a function from `Analysis` to a `Section`, or None if it has no content; `SECTIONS` lists them in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fastconv.analysis.analysis import Analysis
from fastconv.experiment.graph import Graph
from fastconv.report.behaviors import beside, gates, letters, markers, mimicry, on_the_base, power
from fastconv.report.blocks import Note, ReportData, Section, render_html, render_markdown
from fastconv.report.export import frames_of, parquet_bytes
from fastconv.report.measures import answers, geometry, judge_against_phrases, measurements, over_epochs
from fastconv.report.overview import findings, headline, numbers
from fastconv.report.record import (
    card,
    cost,
    curves_and_rho,
    failures,
    handed_on,
    limits,
    planned,
    superseded,
    warnings,
)
from fastconv.store.io import storage_errors, write_atomically
from fastconv.store.ledger import Store, write_text

SECTIONS: tuple[Callable[[Analysis], Section | None], ...] = (
    headline, failures, numbers, findings, over_epochs, mimicry, geometry, on_the_base, markers, judge_against_phrases, power, gates, beside,
    measurements, letters, curves_and_rho, cost, planned, answers, warnings, superseded, limits, card,
)  # fmt: skip
#: Where the files beside a page lie in its folder, and what they are.
FILE_FOLDERS, FILE_SUFFIXES = ("figures", "tables"), (".svg", ".png", ".parquet")


@dataclass(frozen=True)
class ReportPaths:
    """Paths of a report; `folder` holds its figures (SVG and PNG) and tables (Parquet)."""

    html: Path
    markdown: Path
    folder: Path


def write_report(graph: Graph, store: Store, folder: Path) -> ReportPaths:
    """Write the report of a recipe from the present ledger. Raises StoreError if the folder cannot be written.

    A figure or table that an earlier report of this run left there, and that this one does not have, is removed.
    """
    data = build(Analysis(graph, store))
    paths = ReportPaths(folder / f"{data.run}.html", folder / f"{data.run}.md", folder / data.run)
    with storage_errors(folder):
        for name in FILE_FOLDERS:
            (paths.folder / name).mkdir(parents=True, exist_ok=True)
        for name in strangers(paths.folder, data):
            (paths.folder / name).unlink()
        for name, content in data.files.items():
            write_atomically(paths.folder / name, content)
    write_text(paths.html, render_html(data))
    write_text(paths.markdown, render_markdown(data))
    return paths


def collect(graph: Graph, store: Store) -> ReportData:
    """Everything the report shows. Cells that were not run are shown as such, never as numbers."""
    return build(Analysis(graph, store))


def build(decided: Analysis) -> ReportData:
    """The report of an analysis, with the files beside its page and their hashes in it."""
    sections = [section for make in SECTIONS if (section := make(decided)) is not None]
    data = ReportData(decided.run, decided.graph.recipe.about, tuple(sections), _banners(decided))
    files = {
        **{f"figures/{figure.id}.svg": figure.svg for figure in data.figures()},
        **{f"figures/{figure.id}.png": figure.png for figure in data.figures()},
        **{f"tables/{name}.parquet": parquet_bytes(frame) for name, frame in frames_of(decided).items()},
    }
    return replace(data, sections=(*sections, handed_on(files)), files=files)


def strangers(folder: Path, data: ReportData) -> list[str]:
    """Figures and tables in the report's folder that are not of this report, as paths in it."""
    found = [
        path for name in FILE_FOLDERS for path in sorted((folder / name).glob("*")) if path.suffix in FILE_SUFFIXES
    ]
    return [name for path in found if (name := path.relative_to(folder).as_posix()) not in data.files]


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
