"""How training went and what everything cost."""

from __future__ import annotations

from collections.abc import Iterator

from fastconv.analysis.analysis import Decided
from fastconv.report.blocks import Block, Cell, Figure, Figures, Section, Table, folded_if_long
from fastconv.report.figures import curves
from fastconv.experiment.graph import lineage_key
from fastconv.report.claims import ask
from fastconv.store.records import Record
from fastconv.store.ledger import Stage


def curves_and_rho(decided: Decided) -> Section | None:
    """Loss over steps for each convergence run and behavior, and rho of every adapter."""
    trained = list(_trained(decided))
    if not trained:
        return None
    panels = [*_convergence(decided, trained), *_behaviors(decided, trained)]
    rows = tuple(_rho_row(stage, record) for stage, record in trained)
    columns = ("adapter", "last epoch's loss", "rho, least", "median", "greatest", "sha256")
    caption = "rho: norm of the adapter's delta over the norm of the weights that it stands beside, over modules."
    blocks: list[Block] = [Figures("curves", "Training loss", tuple(panels))] if panels else []
    blocks.append(Table("rho", columns, rows, frozenset({1, 2, 3, 4}), caption, folded_if_long(rows, "adapters")))
    return Section("training", "Training", tuple(blocks))


def _trained(decided: Decided) -> Iterator[tuple[Stage, Record]]:
    for stage in decided.graph.stages():
        record = decided.reading.record(stage)
        if record is not None and "adapter" in record.outputs:
            yield stage, record


def _convergence(decided: Decided, trained: list[tuple[Stage, Record]]) -> list[Figure]:
    """A line for each convergence run: the losses of its last snapshot hold those of the earlier ones."""
    runs: dict[str, tuple[Stage, Record]] = {}
    for stage, record in trained:
        if stage.kind == "snapshot":
            run = lineage_key(stage)
            if run not in runs or len(record.outputs["losses"]) > len(runs[run][1].outputs["losses"]):
                runs[run] = (stage, record)
    series = {_run_name(stage): record.outputs["losses"] for stage, record in runs.values()}
    return [curves("loss-convergence", "Convergence", series, ("step", "loss, nats"), decided.run)] if series else []


def _run_name(stage: Stage) -> str:
    _, source, convergence, _, seed = stage.slot.split("/")
    return f"{source} {seed}" if convergence == "source" else f"{source} {convergence} {seed}"


def _behaviors(decided: Decided, trained: list[tuple[Stage, Record]]) -> list[Figure]:
    by_behavior: dict[str, dict[str, list[float]]] = {}
    for plan in decided.graph.cells:
        record = decided.reading.record(plan.adapter) if plan.adapter is not None else None
        if record is not None:
            cell = plan.cell
            name = f"{cell.source} e{cell.epoch} {cell.negatives} s{cell.seed}"
            by_behavior.setdefault(cell.behavior, {}).setdefault(name, record.outputs["losses"])
    return [
        curves(f"loss-{behavior}", f"Training {behavior}", series, ("step", "loss, nats"), decided.run)
        for behavior, series in by_behavior.items()
    ]


def _rho_row(stage: Stage, record: Record) -> tuple[Cell, ...]:
    row = (f"{stage.key[:12]}/rho",)
    rho = record.outputs.get("rho", {})
    shares = [
        Cell(f"{100 * rho[name]:.2g} %", row) if name in rho else Cell("not recorded")
        for name in ("least", "median", "greatest")
    ]
    loss = Cell(f"{record.outputs['last_epoch_loss']:.3f}", (f"{stage.key[:12]}/last_epoch_loss",))
    return (Cell(stage.slot), loss, *shares, Cell(str(record.outputs["adapter"]), code=True))


def cost(decided: Decided) -> Section | None:
    """Seconds and tokens of every stage."""
    rows = []
    for stage in decided.graph.stages():
        record = decided.reading.record(stage)
        if record is None:
            continue
        tokens = ", ".join(
            f"{n:,} {name.removesuffix('_tok')}" for name, n in record.facts.items() if name.endswith("_tok")
        )
        row = (f"{stage.key[:12]}/seconds",)
        rows.append((
            Cell(stage.slot), Cell(stage.key[:12], code=True), Cell(f"{record.seconds:.1f}", row), Cell(tokens, row),
            Cell("reused" if decided.reused.get(stage.key, True) else "computed"),
        ))  # fmt: skip
    if not rows:
        return None
    kinds = _by_kind(decided)
    columns = ("stage", "key", "seconds", "tokens", "in this run")
    blocks: tuple[Block, ...] = (
        ask(decided, "cost"),
        Table("kinds", ("kind of stage", "stages", "seconds"), kinds, frozenset({1, 2})),
        Table("stages", columns, tuple(rows), frozenset({2}), folded=folded_if_long(rows, "stages")),
    )
    return Section("cost", "Cost", blocks)


def _by_kind(decided: Decided) -> tuple[tuple[Cell, ...], ...]:
    found: dict[str, list[Record]] = {}
    for stage in decided.graph.stages():
        record = decided.reading.record(stage)
        if record is not None:
            found.setdefault(stage.kind, []).append(record)
    return tuple(
        (
            Cell(kind),
            Cell(str(len(records)), _ids(records)),
            Cell(f"{sum(r.seconds for r in records):.1f}", _ids(records)),
        )
        for kind, records in found.items()
    )


def _ids(records: list[Record]) -> tuple[str, ...]:
    return tuple(f"{record.key[:12]}/seconds" for record in records)
