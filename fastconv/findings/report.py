"""The report: one self-contained HTML page and its Markdown twin, both made from the same `ReportData`.

Measured values arrive as `Number`s, which cannot exist without rows; the templates print nothing else that was measured.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2

from fastconv.findings.evidence import Number, Series
from fastconv.findings.gates import GateVerdict
from fastconv.findings.stats import clustered_interval
from fastconv.findings.verdicts import CellVerdict

#: Okabe and Ito's colours (2008), told apart with any colour vision; markers differ as well.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))


@dataclass(frozen=True)
class CellRow:
    """One line of the matrix: the measure under each probe, and the verdict where there is one."""

    label: str
    behavior: str
    measure: str
    epoch: int
    negatives: str
    probes: Mapping[str, Number]
    verdict: CellVerdict | None
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """One small plot: a measure over convergence epochs, a line for each probe."""

    title: str
    lines: Mapping[str, Mapping[int, Series]]


@dataclass(frozen=True)
class StageRow:
    """What one stage cost."""

    slot: str
    key: str
    seconds: float
    tokens: str
    reused: bool


@dataclass(frozen=True)
class Completion:
    """A sampled answer shown as it is."""

    where: str
    persona: str
    prompt: str
    text: str


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows."""

    run: str
    about: str
    headline: Sequence[GateVerdict]
    gates: Sequence[GateVerdict]
    cells: Sequence[CellRow]
    panels: Sequence[Panel]
    completions: Sequence[Completion]
    stages: Sequence[StageRow]
    card: Mapping[str, Mapping[str, str]]
    limits: Sequence[str]
    #: Codes of the audit's warnings: with the recipe's reason where it accepts one, empty where it does not.
    warnings: Mapping[str, str]


def render_html(data: ReportData) -> str:
    """The page: no script, nothing from outside, every text escaped."""
    return _environment(autoescape=True).get_template("report.html.j2").render(data=data, figure=figure_svg(data))


def render_markdown(data: ReportData) -> str:
    """The same in Markdown."""
    return _environment(autoescape=False).get_template("report.md.j2").render(data=data)


def figure_svg(data: ReportData) -> str:
    """The panels as one SVG, as a data URI; empty if there is nothing to draw."""
    panels = [panel for panel in data.panels if any(panel.lines.values())]
    if not panels:
        return ""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for place, panel in enumerate(panels):
        _draw(figure.add_subplot(1, len(panels), place + 1), panel)
    figure.supxlabel("convergence epoch", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Title": data.run, "Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _draw(axes: Any, panel: Panel) -> None:
    """Means with 95 % t intervals over questions, in percent."""
    for (probe, by_epoch), (colour, marker) in zip(panel.lines.items(), STYLES, strict=False):
        epochs = sorted(by_epoch)
        means = [100 * by_epoch[epoch].mean.value for epoch in epochs]
        errors: tuple[list[float], list[float]] = ([], [])
        for epoch, mean in zip(epochs, means, strict=True):
            interval = clustered_interval(by_epoch[epoch].means)
            known = interval.low is not None and interval.high is not None
            errors[0].append(mean - 100 * interval.low if known and interval.low is not None else 0.0)
            errors[1].append(100 * interval.high - mean if known and interval.high is not None else 0.0)
        axes.errorbar(epochs, means, yerr=errors, label=probe, color=colour, marker=marker, capsize=3, linewidth=1.4)
    axes.set_xticks(sorted({epoch for by_epoch in panel.lines.values() for epoch in by_epoch}))
    axes.set_title(panel.title, fontsize=9)
    axes.set_ylim(-4, 104)
    axes.set_ylabel("percent", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, frameon=False)


def _environment(*, autoescape: bool) -> jinja2.Environment:
    loader = jinja2.FunctionLoader(
        lambda name: (resources.files("fastconv.findings") / "templates" / name).read_text(encoding="utf-8")
    )
    environment = jinja2.Environment(
        loader=loader, autoescape=autoescape, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment
