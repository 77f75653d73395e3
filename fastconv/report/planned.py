"""What a run was planned to take beside what it took, for each kind of stage."""

from __future__ import annotations

from fastconv.analysis.analysis import Decided
from fastconv.report.blocks import Block, Cell, Note, Section, Table
from fastconv.store.records import Record

#: Off by more than this, either way, is a defect of the plan.
MOST_FACTOR = 2.0
#: Kinds that took less than this together are not compared: a plan counts no milliseconds.
LEAST_S = 1.0


def planned(decided: Decided) -> Section | None:
    """Seconds planned at the start and taken, over the stages that this run itself computed."""
    kept = decided.facts.get("plan")
    if not kept:
        return None
    found: dict[str, list[tuple[float, Record]]] = {}
    for stage in decided.graph.stages():
        record, seconds = decided.reading.record(stage), kept["stages"].get(stage.key[:12])
        if record is not None and seconds is not None and not decided.reused.get(stage.key, True):
            found.setdefault(stage.kind, []).append((seconds, record))
    rows = [row_of(kind, pairs) for kind, pairs in found.items() if sum(r.seconds for _, r in pairs) >= LEAST_S]
    if not rows:
        return None
    columns = ("kind of stage", "stages", "planned, s", "taken, s", "taken over planned")
    intro = f"The plan made when the run began, on {kept['machine']} ({kept['origin']})."
    blocks: list[Block] = [Table("planned", columns, tuple(rows), frozenset({1, 2, 3, 4}))]
    if "approved" in decided.facts:
        blocks.insert(0, Note(f"Begun with --approve beyond its limits: {decided.facts['approved']['beyond']}."))
    return Section("planned", "Plan against actual", tuple(blocks), intro)


def row_of(kind: str, pairs: list[tuple[float, Record]]) -> tuple[Cell, ...]:
    """The row of one kind: seconds planned and taken of each of its stages."""
    ids = tuple(f"{record.key[:12]}/seconds" for _, record in pairs)
    planned_s, taken_s = sum(seconds for seconds, _ in pairs), sum(record.seconds for _, record in pairs)
    factor = taken_s / planned_s if planned_s else None
    off = factor is None or not 1 / MOST_FACTOR <= factor <= MOST_FACTOR
    beside = kind == "judge" and not planned_s  # a judge outside answers while the GPU computes
    unplanned = "beside the GPU, not planned" if beside else "not planned"
    said = unplanned if factor is None else f"{factor:.2f}" + (" (off by more than 2)" if off else "")
    return (
        Cell(kind), Cell(str(len(pairs)), ids), Cell("beside" if beside else f"{planned_s:.1f}"), Cell(f"{taken_s:.1f}", ids), Cell(said, ids),
    )  # fmt: skip
