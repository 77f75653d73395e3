"""Transfer over sources against what each source is like on the base, before anything is trained."""

from __future__ import annotations

from fastconv.analysis.correlates import ON_THE_BASE, levels
from fastconv.analysis.analysis import Decided
from fastconv.analysis.markers import MARKER, transfer_by_source
from fastconv.report.blocks import Block, Section
from fastconv.report.figures import Point, scatter
from fastconv.stats.units import scale
from fastconv.report.claims import ask

#: Fewer points have no rank correlation.
LEAST_SOURCES = 3


def points_of(decided: Decided, correlate: str, behavior: str) -> list[Point]:
    """A point for each source that has both a level of the correlate and a contrast of the behavior."""
    there = levels(decided, correlate, behavior)
    return [
        Point(there[source].value, scale(one.unit) * (one.estimate or 0.0), label=source, group=behavior)
        for source, one in transfer_by_source(decided, behavior).items()
        if source in there
    ]


def on_the_base(decided: Decided) -> Section | None:
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
