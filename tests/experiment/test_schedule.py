"""The order in which cells are computed: gates before cost, equal stacks next to one another, nothing twice."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pytest

from fastconv.datasets.files import assets
from fastconv.experiment.graph import CellPlan, Graph, lineage_key
from fastconv.experiment.schedule import Step, steps, wanted
from fastconv.recipe import load_recipe
from tests.loop_kit import tiny_recipe

ALIVE = ("refusal", "capability")


@pytest.fixture(scope="module")
def graph(tiny_qwen: Path) -> Graph:
    return Graph(
        tiny_recipe(
            tiny_qwen,
            grid__sources=["villain", "comedian", "nurse"],
            grid__convergence=["source", "generic"],
            grid__behaviors=["none", *ALIVE],
            grid__negatives=["excluded", "included"],
        )
    )


def _cells(order: Sequence[Step]) -> list[CellPlan]:
    """The cells in the order in which they are measured."""
    return [step.cells[0] for step in order if step.ends and step.cells]


def _changes(values: Sequence[object]) -> int:
    """In how many runs of equal neighbours the values stand."""
    return len(list(groupby(values)))


@pytest.mark.parametrize("group", [0, 1, 2])
def test_every_wanted_end_is_there_once_for_each_cell_and_nothing_else(graph: Graph, group: int) -> None:
    order = steps(graph.cells, ALIVE, group)
    assert sorted(plan.cell for plan in _cells(order)) == sorted(plan.cell for plan in graph.cells)
    for step in order:
        if step.ends and step.cells:
            assert list(step.ends) == wanted(step.cells[0], ALIVE)


def test_cells_that_g0_leaves_out_are_not_there_and_their_snapshots_neither(graph: Graph) -> None:
    cells = {plan.cell.behavior for plan in _cells(steps(graph.cells, ["refusal"], 0))}
    assert cells == {"none", "refusal"}
    assert steps(graph.cells, [], 0) == []


@pytest.mark.parametrize("group", [0, 1, 2])
def test_epoch_0_comes_before_any_convergence_and_g3s_cells_come_first(graph: Graph, group: int) -> None:
    order = steps(graph.cells, ALIVE, group)
    epochs = [plan.cell.epoch for plan in _cells(order)]
    n_zeros = epochs.count(0)
    assert epochs[:n_zeros] == [0] * n_zeros
    before = order[: next(place for place, step in enumerate(order) if step.runs)]
    assert all(plan.cell.epoch == 0 for step in before for plan in step.cells)
    assert sum(bool(step.ends) for step in before) == n_zeros + 1  # and the base's geometry
    decided = [_decided(plan) for plan in _cells(order)]
    assert decided[:6] == [True] * 6  # three sources, two kinds of convergence that share them
    assert not any(decided[6:n_zeros])


@pytest.mark.parametrize("group", [0, 1, 2])
def test_cells_on_one_snapshot_are_adjacent_and_the_snapshot_alone_comes_first(graph: Graph, group: int) -> None:
    cells = [plan for plan in _cells(steps(graph.cells, ALIVE, group)) if plan.snapshot]
    snapshots = [plan.snapshot.key for plan in cells if plan.snapshot]
    assert _changes(snapshots) == len(set(snapshots)) == 8  # three sources and the generic run they share, two epochs
    for _, mine in groupby(cells, key=lambda plan: plan.snapshot and plan.snapshot.key):
        alone = [plan.adapter is None for plan in mine]
        assert alone == sorted(alone, reverse=True)
    lineages = [lineage_key(plan.snapshot) for plan in cells if plan.snapshot]
    assert _changes(lineages) == len(set(lineages)) == 4


@pytest.mark.parametrize(("group", "sizes"), [(0, [4]), (1, [1, 1, 1, 1]), (3, [3, 1])])
def test_convergence_runs_are_trained_in_groups_each_right_before_its_cells(
    graph: Graph, group: int, sizes: list[int]
) -> None:
    order = steps(graph.cells, ALIVE, group)
    trained: set[str] = set()
    assert [len(step.runs) for step in order if step.runs] == sizes
    for step in order:
        for run in step.runs:
            assert [one.inputs["epoch"] for one in run] == [1, 2]
            assert len({lineage_key(one) for one in run}) == 1
        trained |= {one.key for run in step.runs for one in run}
        assert all(plan.snapshot is None or plan.snapshot.key in trained for plan in step.cells)
        if step.runs:
            assert len(step.cells) == len(step.runs)  # each run's G2 is asked before anything stands on it


def test_all_measures_and_probes_of_a_stack_follow_one_another() -> None:
    offline = ["eval.multiple_choice=builtin", "behavior.source_rows=20"]
    matrix = Graph(load_recipe(assets("recipes") / "matrix.toml", offline))
    order = steps(matrix.cells, list(matrix.behaviors), 0)
    stacks = []
    for step in order:
        for end in step.ends:
            drawn = end.needs.get("eval", end)
            stacks.append(tuple(need.key for need in drawn.needs.values()))
    snapshots = [stack for stack in stacks if len(stack) == 1]
    assert _changes(stacks) == len(set(stacks)) + _repeats_of_the_base(stacks)
    assert snapshots


def _repeats_of_the_base(stacks: Sequence[tuple[str, ...]]) -> int:
    """Epoch-0 cells without a behavior are the base, which was measured before: they compute nothing."""
    return [stack for stack, _ in groupby(stacks)].count(()) - (() in stacks)


def test_a_graph_has_no_two_stages_of_one_name() -> None:
    offline = ["eval.multiple_choice=builtin", "behavior.source_rows=20", 'grid.convergence=["source","generic"]']
    for name in ("pilot", "matrix"):
        stages = Graph(load_recipe(assets("recipes") / f"{name}.toml", offline)).stages()
        slots = [stage.slot for stage in stages]
        assert sorted(set(slots)) == sorted(slots)


def test_geometry_is_measured_once_for_a_snapshot_right_before_its_cells(graph: Graph) -> None:
    order = steps(graph.cells, ALIVE, 2)
    placed = [(place, step.ends[0]) for place, step in enumerate(order) if step.ends and not step.cells]
    assert [stage.kind for _, stage in placed] == ["geometry"] * 9  # the base and eight snapshots
    assert len({stage.key for _, stage in placed}) == 9
    for place, stage in placed:
        after = order[place + 1].cells[0]
        assert after.on_snapshot["geometry"].key == stage.key


@pytest.mark.parametrize(("group", "most"), [(0, 12), (1, 0), (2, 2), (3, 3)])
def test_adapters_on_one_snapshot_are_trained_in_groups_right_before_their_cells(
    graph: Graph, group: int, most: int
) -> None:
    order = steps(graph.cells, ALIVE, group)
    together = [(place, step.adapters) for place, step in enumerate(order) if step.adapters]
    assert max((len(adapters) for _, adapters in together), default=0) == most
    for place, adapters in together:
        assert len({stage.needs["snapshot"].key if "snapshot" in stage.needs else "" for stage in adapters}) == 1
        after = [step.cells[0].adapter for step in order[place + 1 :] if step.cells and step.ends]
        assert list(dict.fromkeys(one.key for one in after if one))[: len(adapters)] == [one.key for one in adapters]
    trained = [stage.key for _, adapters in together for stage in adapters]
    assert len(trained) == len(set(trained))
    decides = {p.adapter.key for p in graph.cells if p.adapter and p.snapshot is None and _decided(p)}
    assert not decides & set(trained)  # G3 looks at these, and each may end the run


def _decided(plan: CellPlan) -> bool:
    return (plan.cell.behavior, plan.cell.negatives) == ("capability", "included")
