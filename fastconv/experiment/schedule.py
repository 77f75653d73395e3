"""In which order the cells of a recipe are computed. Pure: plans in, steps out.

Cheap things that a gate decides on come before dear ones, and equal stacks stand next to one another:

1. epoch-0 cells, which need no convergence; first those on which G3 decides;
2. convergence runs, as many at once as are to be trained together, and after each such group
3. the cells on its snapshots, run by run and epoch by epoch: the snapshot alone first, then each behavior on it, their
   adapters trained together in the same groups.

The base and G0 come before all of this: what G0 lets through is `alive`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import TypeVar

from fastconv.datasets.behaviors import NO_BEHAVIOR
from fastconv.errors import InputError, did_you_mean
from fastconv.experiment.graph import CellPlan, Graph, lineage_key
from fastconv.recipe import Recipe, run_id
from fastconv.store.records import Stage

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """What is computed next, and the cells whose gates are asked after it.

    `runs` are convergence runs, each as its wanted snapshots by epoch; `adapters` are behavior adapters on one snapshot to
    train together; `ends` are end stages of one stack. A step of ends without cells measures the snapshot
    of what comes next.
    """

    ends: tuple[Stage, ...] = ()
    runs: tuple[tuple[Stage, ...], ...] = ()
    cells: tuple[CellPlan, ...] = ()
    adapters: tuple[Stage, ...] = ()


def wanted(plan: CellPlan, alive: Sequence[str]) -> list[Stage]:
    """The end stages a cell needs computed: only measures that can say something, nothing of a behavior that cannot."""
    if plan.cell.behavior != NO_BEHAVIOR and not any(measure in alive for measure in plan.measures):
        return []
    sides = (plan.scores, plan.beside)
    again = [stage for (_, measure, _), stage in plan.replicates.items() if measure in alive]
    return [*(stage for side in sides for (measure, _), stage in side.items() if measure in alive), *again]


def steps(plans: Sequence[CellPlan], alive: Sequence[str], group: int) -> list[Step]:
    """The cells in order; `group` adapters at once, 0 for as many as there are. Cells that G0 leaves out are not there."""
    plans = [plan for plan in plans if wanted(plan, alive)]
    zeros = [plan for plan in plans if plan.snapshot is None]
    first = [plan for plan in zeros if _decides(plan)]
    found = [*_measures(zeros), *(_step(plan, alive) for plan in first)]
    found += _on_one_snapshot([plan for plan in zeros if not _decides(plan)], alive, group)
    runs: dict[str, list[CellPlan]] = {}
    for plan in plans:
        if plan.snapshot is not None:
            runs.setdefault(lineage_key(plan.snapshot), []).append(plan)
    lineages = [sorted(cells, key=_on_snapshot) for cells in runs.values()]
    for chunk in _chunks(lineages, group):
        found.append(Step(runs=tuple(map(_snapshots, chunk)), cells=tuple(cells[0] for cells in chunk)))
        for cells in chunk:
            for _, on_one in groupby(cells, key=lambda plan: plan.cell.epoch):
                same = list(on_one)
                found += [*_measures(same), *_on_one_snapshot(same, alive, group)]
    return found


def group_size(recipe: Recipe, device: str) -> int:
    """How many adapters may be trained in the same steps on a device; 0 is for as many as memory allows."""
    if recipe.model.uses_reference_trainer:
        return 1
    if recipe.run.group != "auto":
        return recipe.run.group
    return 0 if device == "cuda" else 1


def _on_one_snapshot(cells: Sequence[CellPlan], alive: Sequence[str], group: int) -> list[Step]:
    """These cells one by one, those without an adapter first, the others' adapters trained together before them."""
    found = [_step(plan, alive) for plan in cells if plan.adapter is None]
    above: dict[str, list[CellPlan]] = {}
    adapters = {plan.adapter.key: plan.adapter for plan in cells if plan.adapter is not None}
    for plan in cells:
        if plan.adapter is not None:
            above.setdefault(plan.adapter.key, []).append(plan)
    for chunk in _chunks(list(adapters), group):
        if len(chunk) > 1:
            found.append(Step(adapters=tuple(adapters[key] for key in chunk)))
        found += [_step(plan, alive) for key in chunk for plan in above[key]]
    return found


def _chunks(things: Sequence[T], size: int) -> list[Sequence[T]]:
    """In order, so many at a time; 0 for all at once."""
    size = size or max(1, len(things))
    return [things[start : start + size] for start in range(0, len(things), size)]


def _measures(cells: Sequence[CellPlan]) -> list[Step]:
    """The measures of these cells' snapshot itself; cells of one snapshot share them."""
    stages = {stage.key: stage for plan in cells for stage in plan.on_snapshot.values()}
    return [Step(ends=(stage,)) for stage in stages.values()]


def _step(plan: CellPlan, alive: Sequence[str]) -> Step:
    return Step(ends=tuple(wanted(plan, alive)), cells=(plan,))


def _snapshots(cells: Sequence[CellPlan]) -> tuple[Stage, ...]:
    """The snapshots of one run's cells, each once, in their order."""
    return tuple({plan.snapshot.key: plan.snapshot for plan in cells if plan.snapshot is not None}.values())


def _on_snapshot(plan: CellPlan) -> tuple[int, bool]:
    """Cells of one run by snapshot, the snapshot alone first: its stack needs no more training."""
    return plan.cell.epoch, plan.cell.behavior != NO_BEHAVIOR


def _decides(plan: CellPlan) -> bool:
    """Whether G3 looks at this epoch-0 cell: it comes first, and alone."""
    return plan.cell.behavior == "capability" and plan.cell.negatives == "included"


def fitting_cells(graph: Graph, patterns: Sequence[str]) -> dict[str, CellPlan]:
    """The cells of a recipe by name that fit one of these names or patterns (`villain-*-refusal-*`); without any, all.

    A label, with spaces as reports print it, is as good as a name. Raises InputError for a pattern that none fits.
    """
    cells = {plan.cell.name: plan for plan in graph.cells}
    wanted = ["-".join(pattern.split()) for pattern in patterns]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in cells):
            fix = did_you_mean(pattern, cells, f"its cells are {', '.join(list(cells)[:4])}, ...")
            raise InputError(f"there is no cell {pattern!r}", where=run_id(graph.recipe), fix=fix)
    return {
        name: plan
        for name, plan in cells.items()
        if not wanted or any(fnmatchcase(name, pattern) for pattern in wanted)
    }
