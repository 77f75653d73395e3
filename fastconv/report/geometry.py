"""Where the source lies beside the assistant, under every snapshot, next to what the assistant took over there."""

from __future__ import annotations

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.correlates import MARKER, ON_THE_BASE, levels, transfer_by_source
from fastconv.datasets.behaviors import NO_BEHAVIOR
from fastconv.experiment.graph import CellPlan, snapshot_stages
from fastconv.report.blocks import Block, Section, Table, TableCell
from fastconv.report.claims import ask
from fastconv.report.figures import Point, scatter
from fastconv.stats.units import change, rounded, scale, signed
from fastconv.store.records import Score, Stage

METRICS = ("cosine", "distinctiveness")


def geometry(decided: Analysis) -> Section | None:
    """Cosine and distinctiveness by source, epoch and depth, beside every change of the assistant."""
    groups: dict[tuple[str, str, int, int], list[CellPlan]] = {}
    for plan in decided.graph.cells:
        cell = plan.cell
        stage = plan.on_snapshot.get("geometry")
        if stage is not None and decided.reading.record(stage) is not None:
            convergence = cell.convergence if cell.epoch else "base"
            groups.setdefault((cell.source, convergence, cell.epoch, cell.seed), []).append(plan)
    if not groups:
        return None
    trained = [plan.cell for plan in decided.graph.cells if plan.cell.behavior != NO_BEHAVIOR]
    kinds = list(dict.fromkeys((cell.behavior, cell.negatives) for cell in trained))
    scores = _scores(decided)
    rows = tuple(
        (
            TableCell(f"{source} {convergence} e{epoch} s{seed}"),
            *(_depths(scores, plans[0].on_snapshot["geometry"], source, metric) for metric in METRICS),
            *(_change(decided, plans, behavior, negatives) for behavior, negatives in kinds),
        )
        for (source, convergence, epoch, seed), plans in groups.items()
    )
    columns = ("source", *METRICS, *(f"assistant, {b}{'' if n == 'none' else f' ({n})'}" for b, n in kinds))
    table = Table("geometry", columns, rows, frozenset(range(1, len(columns))), _caption(scores))
    intro = (
        "Mean hidden state of each persona's last prompt token over the marker questions, centred over all known personas. "
        "Cosine: of the source to the assistant. Distinctiveness: the source's distance from the mean of the others, by "
        "the length of the mean of all. The last columns are the assistant's changes against epoch zero."
    )
    return Section("geometry", "Persona geometry", (table,), intro)


def _scores(decided: Analysis) -> dict[str, tuple[Stage, list[Score]]]:
    """Every geometry stage with its scores, by key; cells share them."""
    stages = snapshot_stages(decided.graph, "geometry")
    return {stage.key: (stage, decided.store.scores(stage.key)) for stage in stages}


def _caption(scores: dict[str, tuple[Stage, list[Score]]]) -> str:
    layers = sorted({one.sample for _, some in scores.values() for one in some if one.metric in METRICS})
    return f"At layers {', '.join(map(str, layers))}, in this order." if layers else ""


def _depths(scores: dict[str, tuple[Stage, list[Score]]], stage: Stage, persona: str, metric: str) -> TableCell:
    """A persona's values of a metric at all depths."""
    mine = [one for one in scores[stage.key][1] if (one.row, one.metric) == (persona, metric)]
    if not mine:
        return TableCell("not measured", word="absent")
    told = [
        "undefined" if one.value is None else signed(one.value, 2) if metric == "cosine" else rounded(one.value, 2)
        for one in mine
    ]
    return TableCell(", ".join(told), tuple(f"{stage.key[:12]}/{persona}/{one.sample}/{metric}" for one in mine))


def _change(decided: Analysis, plans: list[CellPlan], behavior: str, negatives: str) -> TableCell:
    """The assistant's change against epoch 0 in the cell of this behavior."""
    plan = next((p for p in plans if (p.cell.behavior, p.cell.negatives) == (behavior, negatives)), None)
    quad = decided.found.trained(plan, decided.found.main(behavior)) if plan is not None else None
    if plan is None or quad is None or not quad.now.rows or not quad.base.rows:
        return TableCell("not measured", word="absent")
    if not plan.cell.epoch:
        return TableCell("reference", quad.now.rows)
    return TableCell(
        change(quad.now.mean.value - quad.base.mean.value, quad.now.unit), (*quad.now.rows, *quad.base.rows)
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
