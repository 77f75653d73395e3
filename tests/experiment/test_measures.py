"""The registry: a measure of snapshots is one row, one way to compute it, and nothing else has to know it."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from fastconv.engine.geometry import MeasuredSnapshot
from fastconv.experiment.graph import Graph
from fastconv.experiment.measures import KINDS, SNAPSHOT_MEASURES, Demand, SnapshotMeasure, Target
from fastconv.experiment.workload import demands
from fastconv.report import write_report
from fastconv.run.executor import SNAPSHOT_COMPUTE
from fastconv.store.ledger import Store
from fastconv.store.records import Score
from tests.loop_kit import run_tiny, tiny_recipe

LENGTHS = SnapshotMeasure(
    version=3,
    demand=lambda graph, stage, target: Demand(read_tok=7.0),
    name="lengths",
    inputs=lambda graph: {"unit": "tok"},
    items=lambda graph: [("q1", "How long is this?"), ("q2", "And this, which is longer?")],
    columns=("question", "nth"),
)


def test_every_measure_of_snapshots_has_its_way_to_be_computed() -> None:
    names = [measure.name for measure in SNAPSHOT_MEASURES]
    assert sorted(SNAPSHOT_COMPUTE) == sorted(names)
    assert set(names) <= set(KINDS)


def test_a_new_measure_is_planned_computed_and_reported_by_its_row_alone(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(base, inputs, questions, batch_tok, begin, on_halved):  # type: ignore[no-untyped-def]
        begin(len(questions))
        lengths = [len(base.tokenizer.encode(question)) for question in questions]
        scores = [Score(f"q{i}", i, inputs["unit"], float(n)) for i, n in enumerate(lengths)]
        return MeasuredSnapshot({"n": len(scores)}, {}, scores)

    measures = (*SNAPSHOT_MEASURES, LENGTHS)
    monkeypatch.setattr("fastconv.experiment.graph.SNAPSHOT_MEASURES", measures)
    monkeypatch.setattr("fastconv.report.export.SNAPSHOT_MEASURES", measures)
    monkeypatch.setattr("fastconv.experiment.workload.KINDS", {**KINDS, "lengths": LENGTHS})
    monkeypatch.setitem(SNAPSHOT_COMPUTE, "lengths", compute)
    recipe = tiny_recipe(tiny_qwen, grid__epochs=[0, 1])
    graph = Graph(recipe)
    stages = [stage for stage in graph.stages() if stage.kind == "lengths"]
    assert [stage.version for stage in stages] == [3] * len(stages)
    assert {demand.read_tok for demand in demands(graph, stages, Target("cpu")).values()} == {7.0}
    run_tiny(recipe, tmp_path / "workspace")
    store = Store.open(tmp_path / "workspace")
    try:
        paths = write_report(graph, store, tmp_path / "reports")
    finally:
        store.close()
    table = pl.read_parquet(paths.folder / "tables" / "lengths.parquet")
    assert table.columns == ["stack", "question", "nth", "metric", "value", "stage"]
    assert table.height == 2 * len(stages)
    assert set(table["metric"]) == {"tok"}
