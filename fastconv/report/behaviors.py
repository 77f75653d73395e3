"""Sections behind the verdicts: mimicry against transfer, marker rates, power, gates, letters, secondary contrasts."""

from __future__ import annotations

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.contrasts import in_words
from fastconv.analysis.correlates import (
    MARKER,
    MARKER_RATE,
    ON_THE_BASE,
    levels,
    marker_rates,
    transfer_by_source,
)
from fastconv.analysis.sides import SideContrast
from fastconv.report.blocks import OPEN_ROWS, Block, Note, Section, Table, TableCell, folded_if_long
from fastconv.report.claims import NoSuchClaimError, ask
from fastconv.report.figures import Point, scatter
from fastconv.report.measures import ROLES
from fastconv.stats.gates import LEAST_LETTER_MASS, GateVerdict
from fastconv.stats.units import first_few, p_value, scale, signed
from fastconv.stats.verdicts import CorrectedContrast

#: Gates over the whole study, and the pilot gate.
STUDY_GATES = ("G4", "G5", "CONFIRM", "FALSIFY", "PILOT")


def mimicry(analysis: Analysis) -> Section | None:
    """Changes by convergence alone against changes with the behavior adapter."""
    with_both = [
        verdict for verdict in analysis.verdicts if verdict.mimicry is not None and verdict.trained is not None
    ]
    estimated = [
        verdict for verdict in analysis.verdicts if verdict.trained is not None and verdict.estimate is not None
    ]
    if not estimated:
        return None
    points = [
        Point(
            scale(verdict.unit) * verdict.mimicry.estimate,
            scale(verdict.unit) * verdict.trained.estimate,
            label=_label(verdict.label, verdict.behavior),
            group=verdict.behavior,
        )
        for verdict in with_both
        if verdict.mimicry
        and verdict.trained
        and verdict.mimicry.estimate is not None
        and verdict.trained.estimate is not None
    ]
    blocks: list[Block] = []
    if points:
        axes = ("change without a behavior adapter (mimicry), points", "change with it, points")
        blocks.append(
            scatter("mimicry", "Change of the assistant, canary taken off", points, axes, analysis.run, diagonal=True)
        )
    else:
        blocks.append(
            Note("No convergence-only control was measured, so mimicry and transfer cannot be told apart.", "withheld")
        )
    rows = tuple(
        (TableCell(verdict.behavior), TableCell.saying(ask(analysis, "mimicry", label=verdict.label)))
        for verdict in estimated
    )
    folded = folded_if_long(rows, "contrasts")
    blocks.append(Table("mimicry-table", ("behavior", "what moved"), rows, folded=folded))
    intro = "On the dotted line the behavior adapter adds nothing: the assistant imitates the source and has taken over nothing."
    return Section("mimicry", "Transfer against mimicry", tuple(blocks), intro)


def _label(label: str, behavior: str) -> str:
    return label.replace(f" {behavior}", "").replace(" source ", " ")


def markers(analysis: Analysis) -> Section | None:
    """Transfer against the assistant's marker rate, and what this number of sources can show."""
    behaviors = [name for name in dict.fromkeys(verdict.behavior for verdict in analysis.verdicts) if name != MARKER]
    if not behaviors or all(isinstance(subject, SideContrast) for subject in analysis.declared.values()):
        return None
    if not marker_rates(analysis):
        text = "The marker behavior was not measured in this run, so there is no rate to set transfer against."
        return Section("markers", "Transfer against the marker rate", (Note(text),))
    points = [point for behavior in behaviors for point in points_of(analysis, MARKER_RATE, behavior)]
    blocks: list[Block] = []
    if points:
        axes = ("assistant's marker rate, %", "transfer, points")
        blocks.append(scatter("markers", "Transfer against the marker rate", points, axes, analysis.run))
    for behavior in behaviors:
        try:
            blocks.append(ask(analysis, "correlation", behavior=behavior))
        except NoSuchClaimError:
            blocks.append(
                Note(f"{behavior}: too few sources have both a marker rate and a contrast for a correlation.")
            )
    blocks.append(ask(analysis, "attainable"))
    return Section("markers", "Transfer against the marker rate", tuple(blocks))


def power(analysis: Analysis) -> Section | None:
    """The minimum detectable effect of each behavior beside its threshold."""
    behaviors = dict.fromkeys(verdict.behavior for verdict in analysis.verdicts if verdict.detectable is not None)
    if not behaviors:
        return None
    claims = tuple(ask(analysis, "power", behavior=behavior) for behavior in behaviors)
    return Section("power", "What could have been seen", claims)


def gates(analysis: Analysis) -> Section | None:
    """Every gate with its rule and rows, under both sets of thresholds if they were edited."""
    if not analysis.gates:
        return None
    before = {(gate.gate, gate.subject): gate for gate in analysis.under_first[0]}
    columns = (
        "gate", "subject", "verdict", *(("under the first",) if analysis.first else ()), "because", "rule", "rows",
    )  # fmt: skip

    def table(table_id: str, verdicts: list[GateVerdict], folded: str = "") -> Table:
        rows = tuple(_gate_row(analysis, gate, before.get((gate.gate, gate.subject))) for gate in verdicts)
        return Table(table_id, columns, rows, frozenset({len(columns) - 1}), folded=folded)

    blocks: list[Block] = []
    if len(analysis.gates) <= OPEN_ROWS:
        blocks.append(table("gates-table", list(analysis.gates)))
    else:
        loud = [gate for gate in analysis.gates if gate.failed or gate.gate in STUDY_GATES]
        quiet = [gate for gate in analysis.gates if not (gate.failed or gate.gate in STUDY_GATES)]
        blocks.append(_gate_counts(analysis.gates))
        blocks.append(table("gates-table", loud))
        blocks.append(table("gates-quiet", quiet, f"{len(quiet)} gates that passed or do not apply"))
    if analysis.first is not None:
        blocks += _edits(analysis, before)
    intro = (
        "Thresholds decide what is spent next; evidence is the interval. Each verdict lists the rows that it rests on."
    )
    return Section("gates", "Gates", tuple(blocks), intro)


def letters(analysis: Analysis) -> Section | None:
    """The letters' share of the probability in every cell, with a warning where it is small; None without letters."""
    rows, low = list[tuple[TableCell, ...]](), list[str]()
    for plan in analysis.graph.cells:
        for measure in plan.measures:
            found = [
                analysis.found.letter_mass(plan, measure, analysis.found.persona(plan.cell, role)) for role in ROLES
            ]
            means = [None if series is None or not series.rows else series.mean for series in found]
            if any(means):
                rows.append((TableCell(in_words(plan.cell)), TableCell(measure), *map(TableCell.of, means)))
            if any(mean is not None and mean.value < LEAST_LETTER_MASS for mean in means):
                low.append(in_words(plan.cell))
    if not rows:
        return None
    columns, folded = ("cell", "measured", *ROLES), folded_if_long(rows, "lines")
    table = Table("letters", columns, tuple(rows), frozenset({2, 3, 4}), folded=folded)
    rarely = f"Under half of it, accuracy ranks answers that are rarely given: {first_few(low, 4)}."
    intro = (
        "The mean probability that an answer begins with one of its question's letters. Accuracy takes the best of these "
        "letters, whatever the model would rather begin with."
    )
    blocks = (*([Note(rarely, "withheld")] if low else []), table)
    return Section("letters", "What the letters hold", blocks, intro)


def _gate_counts(verdicts: tuple[GateVerdict, ...]) -> Table:
    """Number of verdicts of each kind per gate."""
    words = list(dict.fromkeys(verdict.verdict for verdict in verdicts))
    rows = []
    for gate in dict.fromkeys(verdict.gate for verdict in verdicts):
        by_word = [
            [verdict for verdict in verdicts if (verdict.gate, verdict.verdict) == (gate, word)] for word in words
        ]
        cells = (
            TableCell(str(len(group)), tuple(verdict.subject for verdict in group)) if group else TableCell("")
            for group in by_word
        )
        rows.append((TableCell(gate), *cells))
    return Table("gates-count", ("gate", *words), tuple(rows), frozenset(range(1, 1 + len(words))))


def _gate_row(analysis: Analysis, gate: GateVerdict, before: GateVerdict | None) -> tuple[TableCell, ...]:
    because = gate.reason + (f" (ignored, because {gate.ignored})" if gate.ignored else "")
    first = (
        (TableCell(before.verdict if before else "", word=before.verdict if before else ""),) if analysis.first else ()
    )
    count = TableCell(str(len(gate.rows)), gate.rows, list_rows=True)
    return (
        TableCell(gate.gate), TableCell(gate.subject), TableCell(gate.verdict, word=gate.verdict.replace(" ", "-")), *first,
        TableCell(because, gate.rows), TableCell(gate.threshold), count,
    )  # fmt: skip


def _edits(analysis: Analysis, before: dict[tuple[str, str], GateVerdict]) -> list[Block]:
    blocks: list[Block] = []
    for gate in analysis.gates:
        earlier = before.get((gate.gate, gate.subject))
        if earlier is not None and earlier.verdict != gate.verdict:
            blocks.append(ask(analysis, "edited", gate=gate.gate, subject=gate.subject))
    return blocks or [Note("Every gate says the same under the first thresholds.", "edited")]


def beside(analysis: Analysis) -> Section | None:
    """The secondary contrasts, corrected together; no verdict rests on them."""
    if not analysis.secondary:
        return None
    rows = tuple(_aside_row(contrast) for contrast in analysis.secondary)
    columns = ("contrast", "what", "estimate", "interval", "p", "p corrected")
    folded = folded_if_long(rows, "contrasts")
    table = Table("secondary", columns, rows, frozenset({2, 3, 4, 5}), folded=folded)
    intro = (
        "Corrected for the false discovery rate (Benjamini and Hochberg) over this table. Over questions alone: neither intervals nor "
        "p hold the noise from run to run. No verdict rests on it."
    )
    return Section("beside", "Tested beside", (table,), intro)


def _aside_row(contrast: CorrectedContrast) -> tuple[TableCell, ...]:
    factor = scale(contrast.unit)
    digits = 2 if contrast.per == "epoch" else 1
    unit = ("pp" if contrast.unit == "share" else "points") + (" per epoch" if contrast.per == "epoch" else "")
    estimate = "" if contrast.estimate is None else f"{signed(factor * contrast.estimate, digits)} {unit}"
    between = (
        f"{signed(factor * contrast.low, digits)} to {signed(factor * contrast.high, digits)}"
        if contrast.low is not None and contrast.high is not None
        else contrast.reason or ""
    )
    return (
        TableCell(contrast.label),
        TableCell(contrast.what),
        TableCell(estimate, contrast.rows),
        TableCell(between, contrast.rows),
        TableCell(p_value(contrast.p_raw)),
        TableCell(p_value(contrast.p_corrected)),
    )


#: Fewer points have no rank correlation.
LEAST_SOURCES = 3


def points_of(decided: Analysis, correlate: str, behavior: str) -> list[Point]:
    """A point for each source that has both a level of the correlate and a contrast of the behavior."""
    there = levels(decided, correlate, behavior)
    return [
        Point(there[source].value, scale(one.unit) * (one.estimate or 0.0), label=source, group=behavior)
        for source, one in transfer_by_source(decided, behavior).items()
        if source in there
    ]


def on_the_base(decided: Analysis) -> Section | None:
    """For each correlate: a point for each source and behavior, the rank correlations, and what so few can show."""
    behaviors = [name for name in dict.fromkeys(one.behavior for one in decided.verdicts) if name != MARKER]
    blocks: list[Block] = []
    for correlate, words in ON_THE_BASE.items():
        points, claims = [], []
        for behavior in behaviors:
            mine = points_of(decided, correlate, behavior)
            points += mine
            if len(mine) >= LEAST_SOURCES:
                claims.append(ask(decided, "correlation", behavior=behavior, correlate=correlate))
        if claims:
            title, place = f"Transfer against {words}", f"on-base-{correlate.replace(' ', '-')}"
            blocks.append(scatter(place, title, points, (words, "transfer, points"), decided.run))
            blocks += [*claims, ask(decided, "attainable", correlate=correlate)]
    if not blocks:
        return None
    intro = (
        "A persona that is like this before any training may explain what the assistant takes over by imitation alone. "
        "Levels in percent or points; cosine and distinctiveness are means over the depths at which they were taken. "
        "Each correlate is a family of its own, corrected over behaviors."
    )
    return Section("on-the-base", "Transfer against what the source is like on the base", tuple(blocks), intro)
