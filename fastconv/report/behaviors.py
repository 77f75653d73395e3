"""Behind the verdicts: mimicry against transfer, marker rates, power, gates, and what was tested beside."""

from __future__ import annotations

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.correlates import MARKER, MARKER_RATE, marker_rates
from fastconv.report.blocks import OPEN_ROWS, Block, Note, Section, Table, TableCell, folded_if_long
from fastconv.report.claims import NoSuchClaimError, ask
from fastconv.report.figures import Point, scatter
from fastconv.report.geometry import points_of
from fastconv.stats.gates import GateVerdict
from fastconv.stats.secondary import CorrectedContrast
from fastconv.stats.units import p_value, scale, signed

#: Gates that speak of the whole study.
STUDY_GATES = ("G4", "G5", "CONFIRM", "FALSIFY", "PILOT")


def mimicry(decided: Analysis) -> Section | None:
    """What convergence alone does against what the behavior adapter adds."""
    with_both = [one for one in decided.verdicts if one.mimicry is not None and one.trained is not None]
    estimated = [one for one in decided.verdicts if one.trained is not None and one.estimate is not None]
    if not estimated:
        return None
    points = [
        Point(
            scale(one.unit) * one.mimicry.estimate,
            scale(one.unit) * one.trained.estimate,
            label=_label(one.label, one.behavior),
            group=one.behavior,
        )
        for one in with_both
        if one.mimicry and one.trained and one.mimicry.estimate is not None and one.trained.estimate is not None
    ]
    blocks: list[Block] = []
    if points:
        axes = ("change without a behavior adapter (mimicry), points", "change with it, points")
        blocks.append(
            scatter("mimicry", "Change of the assistant, canary taken off", points, axes, decided.run, diagonal=True)
        )
    else:
        blocks.append(
            Note("No convergence-only control was measured, so mimicry and transfer cannot be told apart.", "withheld")
        )
    rows = tuple(
        (TableCell(one.behavior), TableCell.saying(ask(decided, "mimicry", label=one.label))) for one in estimated
    )
    folded = folded_if_long(rows, "contrasts")
    blocks.append(Table("mimicry-table", ("behavior", "what moved"), rows, folded=folded))
    intro = "On the dotted line the behavior adapter adds nothing: the assistant imitates the source and has taken over nothing."
    return Section("mimicry", "Transfer against mimicry", tuple(blocks), intro)


def _label(label: str, behavior: str) -> str:
    return label.replace(f" {behavior}", "").replace(" source ", " ")


def markers(decided: Analysis) -> Section | None:
    """Transfer against the assistant's marker rate, with what so few sources can show."""
    behaviors = [name for name in dict.fromkeys(one.behavior for one in decided.verdicts) if name != MARKER]
    if not behaviors:
        return None
    if not marker_rates(decided):
        text = "The marker behavior was not measured in this run, so there is no rate to set transfer against."
        return Section("markers", "Transfer against the marker rate", (Note(text),))
    points = [point for behavior in behaviors for point in points_of(decided, MARKER_RATE, behavior)]
    blocks: list[Block] = []
    if points:
        axes = ("assistant's marker rate, %", "transfer, points")
        blocks.append(scatter("markers", "Transfer against the marker rate", points, axes, decided.run))
    for behavior in behaviors:
        try:
            blocks.append(ask(decided, "correlation", behavior=behavior))
        except NoSuchClaimError:
            blocks.append(
                Note(f"{behavior}: too few sources have both a marker rate and a contrast for a correlation.")
            )
    blocks.append(ask(decided, "attainable"))
    return Section("markers", "Transfer against the marker rate", tuple(blocks))


def power(decided: Analysis) -> Section | None:
    """The minimum detectable effect beside every threshold."""
    behaviors = dict.fromkeys(one.behavior for one in decided.verdicts if one.detectable is not None)
    if not behaviors:
        return None
    claims = tuple(ask(decided, "power", behavior=behavior) for behavior in behaviors)
    return Section("power", "What could have been seen", claims)


def gates(decided: Analysis) -> Section | None:
    """Every gate with its rule and rows, and under both sets of thresholds where they were edited."""
    if not decided.gates:
        return None
    before = {(one.gate, one.subject): one for one in decided.under_first[0]}
    columns = (
        "gate", "subject", "verdict", *(("under the first",) if decided.first else ()), "because", "rule", "rows",
    )  # fmt: skip

    def table(place: str, some: list[GateVerdict], folded: str = "") -> Table:
        rows = tuple(_gate_row(decided, one, before.get((one.gate, one.subject))) for one in some)
        return Table(place, columns, rows, frozenset({len(columns) - 1}), folded=folded)

    blocks: list[Block] = []
    if len(decided.gates) <= OPEN_ROWS:
        blocks.append(table("gates-table", list(decided.gates)))
    else:
        loud = [one for one in decided.gates if one.failed or one.gate in STUDY_GATES]
        quiet = [one for one in decided.gates if not (one.failed or one.gate in STUDY_GATES)]
        blocks.append(_gate_counts(decided.gates))
        blocks.append(table("gates-table", loud))
        blocks.append(table("gates-quiet", quiet, f"{len(quiet)} gates that passed or do not apply"))
    if decided.first is not None:
        blocks += _edits(decided, before)
    intro = (
        "Thresholds decide what is spent next; evidence is the interval. Each verdict lists the rows that it rests on."
    )
    return Section("gates", "Gates", tuple(blocks), intro)


def _gate_counts(verdicts: tuple[GateVerdict, ...]) -> Table:
    """How often each gate said what."""
    words = list(dict.fromkeys(one.verdict for one in verdicts))
    rows = []
    for gate in dict.fromkeys(one.gate for one in verdicts):
        mine = [[one for one in verdicts if (one.gate, one.verdict) == (gate, word)] for word in words]
        cells = (
            TableCell(str(len(some)), tuple(one.subject for one in some)) if some else TableCell("") for some in mine
        )
        rows.append((TableCell(gate), *cells))
    return Table("gates-count", ("gate", *words), tuple(rows), frozenset(range(1, 1 + len(words))))


def _gate_row(decided: Analysis, one: GateVerdict, before: GateVerdict | None) -> tuple[TableCell, ...]:
    because = one.reason + (f" (ignored, because {one.ignored})" if one.ignored else "")
    first = (
        (TableCell(before.verdict if before else "", word=before.verdict if before else ""),) if decided.first else ()
    )
    count = TableCell(str(len(one.rows)), one.rows, list_rows=True)
    return (
        TableCell(one.gate), TableCell(one.subject), TableCell(one.verdict, word=one.verdict.replace(" ", "-")), *first,
        TableCell(because, one.rows), TableCell(one.threshold), count,
    )  # fmt: skip


def _edits(decided: Analysis, before: dict[tuple[str, str], GateVerdict]) -> list[Block]:
    found: list[Block] = []
    for one in decided.gates:
        twin = before.get((one.gate, one.subject))
        if twin is not None and twin.verdict != one.verdict:
            found.append(ask(decided, "edited", gate=one.gate, subject=one.subject))
    return found or [Note("Every gate says the same under the first thresholds.", "edited")]


def beside(decided: Analysis) -> Section | None:
    """Contrasts that were not declared: described, corrected together, and behind no verdict."""
    if not decided.secondary:
        return None
    rows = tuple(_aside_row(one) for one in decided.secondary)
    columns = ("contrast", "what", "estimate", "interval", "p", "p corrected")
    folded = folded_if_long(rows, "contrasts")
    table = Table("secondary", columns, rows, frozenset({2, 3, 4, 5}), folded=folded)
    intro = "Corrected for the false discovery rate (Benjamini and Hochberg) over this table. No verdict rests on it."
    return Section("beside", "Tested beside", (table,), intro)


def _aside_row(one: CorrectedContrast) -> tuple[TableCell, ...]:
    factor = scale(one.unit)
    digits = 2 if one.per == "epoch" else 1
    unit = ("pp" if one.unit == "share" else "points") + (" per epoch" if one.per == "epoch" else "")
    estimate = "" if one.estimate is None else f"{signed(factor * one.estimate, digits)} {unit}"
    between = (
        f"{signed(factor * one.low, digits)} to {signed(factor * one.high, digits)}"
        if one.low is not None and one.high is not None
        else one.reason or ""
    )
    return (
        TableCell(one.label),
        TableCell(one.what),
        TableCell(estimate, one.rows),
        TableCell(between, one.rows),
        TableCell(p_value(one.p_raw)),
        TableCell(p_value(one.p_corrected)),
    )
