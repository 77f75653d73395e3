"""Orders for workers: first the base, then stages that sources share, then one order per source. No Ray in here.

An order contains everything by content, so that a worker needs only fastconv and the model.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastconv.datasets.files import read_toml
from fastconv.datasets.spec import scorer_file
from fastconv.errors import ClusterError, DataError
from fastconv.experiment.graph import CellPlan, Graph, walk
from fastconv.experiment.schedule import wanted
from fastconv.recipe import HUB, Recipe, map_paths, parse_recipe
from fastconv.store.io import storage_errors, write_atomically
from fastconv.store.ledger import Stage, Store, changed_inputs
from fastconv.store.merge import strings_in

#: Names of the orders that belong to no source.
BASE, SHARED = "base", "shared"


@dataclass(frozen=True)
class Order:
    """The work of one worker: the stages `keys`, needs included, either as `ends` alone or as the cells of a `source`.

    `recipe` is its JSON form, `files` the contents of the files it names by path, and `inputs` the stages' inputs by slot
    as the driver computed them.
    """

    name: str
    recipe: Mapping[str, Any]
    files: Mapping[str, bytes]
    inputs: Mapping[str, Mapping[str, Any]]
    keys: tuple[str, ...]
    ends: tuple[str, ...] = ()
    source: str | None = None
    ignore_gates: Mapping[str, str] | None = None


def base_order(graph: Graph, store: Store) -> Order | None:
    """An order for the missing base stages of all cells; None if there are none."""
    ends = [stage for plan in graph.cells for stage in plan.base.values()]
    return _order(graph, store, BASE, ends)


def shared_order(graph: Graph, store: Store, alive: Sequence[str]) -> Order | None:
    """An order for missing stages that two or more sources need, so that no stage is computed twice."""
    n_sources: Counter[str] = Counter()
    stages: dict[str, Stage] = {}
    for source in sources_of(graph):
        parts = _parts(graph, source, alive)
        n_sources.update(parts.keys())
        stages |= parts
    return _order(graph, store, SHARED, [stage for key, stage in stages.items() if n_sources[key] > 1])


def source_orders(
    graph: Graph, store: Store, alive: Sequence[str], ignore_gates: Mapping[str, str] | None = None
) -> list[Order]:
    """An order for each source with missing stages. `alive` are the behaviors that G0 let through."""
    orders = []
    for source in sources_of(graph):
        parts = list(_parts(graph, source, alive).values())
        base = [end for plan in graph.cells if plan.cell.source == source for end in plan.base.values()]
        order = _order(graph, store, source, [*base, *parts])
        if order is not None:
            orders.append(_with_source(order, source, ignore_gates or {}))
    return orders


def sources_of(graph: Graph) -> list[str]:
    """The sources of a recipe, in their order."""
    return list(dict.fromkeys(plan.cell.source for plan in graph.cells))


def initial_keys(graph: Graph, store: Store, order: Order) -> list[str]:
    """Keys of the finished stages that a worker starts with: those of its order, and the whole base, which G0 needs."""
    base = [part.key for plan in graph.cells for end in plan.base.values() for part in walk(end)]
    return [key for key in dict.fromkeys([*base, *order.keys]) if store.record(key) is not None]


def has_missing_stages(order: Order, store: Store) -> bool:
    """Whether any stage of an order is missing. Orders contain no stages of an outside judge."""
    return any(store.record(key) is None for key in order.keys)


def is_cell_computed(graph: Graph, store: Store, plan: CellPlan, alive: Sequence[str]) -> bool:
    """Whether every stage of a cell except judging by an outside judge is computed."""
    ends = [*plan.base.values(), *_ends(plan, alive)]
    parts = (part for end in ends for part in walk(end) if _is_computed(graph, part))
    return all(store.record(part.key) is not None for part in parts)


def recipe_files(recipe: Recipe) -> dict[str, bytes]:
    """Contents of every user file that the recipe names, by path. Raises DataError for one that cannot be read."""
    paths: list[str] = []
    map_paths(recipe.model_dump(mode="json"), lambda path: paths.append(path) or path)
    by_source = {*recipe.data.rows.values(), *(arm.rows for arm in recipe.grid.arms.values() if arm.rows)}
    named = [path for path in paths if path not in by_source]
    own_rows = [path for path in by_source if not path.startswith(HUB)]  # a node loads what is pinned on the hub itself
    named += [path.replace("{source}", source) for path in own_rows for source in recipe.grid.sources]
    if recipe.data.behaviors:
        folder, declared = Path(recipe.data.behaviors).parent, read_toml(Path(recipe.data.behaviors))
        named += [str(folder / text) for text in strings_in(declared)
                  if text and "\n" not in text and (folder / text).is_file()]  # fmt: skip
        scorers = [table.get("scorer", "") for table in declared.values() if isinstance(table, dict)]
        own = [scorer_file(str(scorer), folder) for scorer in scorers if scorer]
        named += [str(path) for path in own if path.is_file()]  # an installed module is installed on every node
    if recipe.convergence.keep_if:
        filters = scorer_file(recipe.convergence.keep_if, Path(recipe.convergence.prompts_file).parent)
        named += [str(filters)] if filters.is_file() else []
    try:
        return {path: Path(path).read_bytes() for path in dict.fromkeys(named)}
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(error.filename), fix="check the path") from None


def unpack_recipe(order: Order, folder: Path) -> Recipe:
    """Write the order's files under `folder`, keeping their full paths, and return the recipe that names them there."""
    with storage_errors(folder):
        for path, data in order.files.items():
            target = _below(folder, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, data)
    table = copy.deepcopy(dict(order.recipe))
    map_paths(table, lambda path: str(_below(folder, path)))
    return parse_recipe(table, where=order.name)


def require_same_stages(order: Order, graph: Graph, node: str) -> None:
    """Raise ClusterError with the difference unless this node's stages have the same keys as the ordered ones."""
    for stage in graph.stages():  # in order of needs, so that the first difference is the cause
        ordered = order.inputs.get(stage.slot)
        if ordered is not None and stage.key not in order.keys:
            changes = "; ".join(changed_inputs(ordered, stage.full_inputs)) or "another version of fastconv"
            raise ClusterError(
                f"the worker would compute {stage.slot} differently ({changes})",
                where=node,
                fix="install the same fastconv and extras on every node, and name model.device and model.engine",
            )


def _ends(plan: CellPlan, alive: Sequence[str]) -> list[Stage]:
    """What a cell wants computed, the measures of its snapshot included."""
    ends = wanted(plan, alive)
    return [*ends, *plan.on_snapshot.values()] if ends else ends


def _parts(graph: Graph, source: str, alive: Sequence[str]) -> dict[str, Stage]:
    """The stages, by key, that a source's cells need for behaviors that G0 let through, except an outside judge's."""
    plans = [plan for plan in graph.cells if plan.cell.source == source]
    parts = [part for plan in plans for end in _ends(plan, alive) for part in walk(end)]
    return {part.key: part for part in parts if _is_computed(graph, part)}


def _order(graph: Graph, store: Store, name: str, ends: Sequence[Stage]) -> Order | None:
    parts = {part.key: part for end in ends for part in walk(end) if _is_computed(graph, part)}
    missing = [key for key in parts if store.record(key) is None]
    if not missing:
        return None
    recipe = graph.recipe
    inputs = {part.slot: part.full_inputs for part in parts.values()}
    return Order(name, recipe.model_dump(mode="json"), recipe_files(recipe), inputs, tuple(parts), tuple(missing))


def _with_source(order: Order, source: str, ignore_gates: Mapping[str, str]) -> Order:
    return Order(order.name, order.recipe, order.files, order.inputs, order.keys, (), source, dict(ignore_gates))


def _is_computed(graph: Graph, stage: Stage) -> bool:
    """Whether a worker computes this stage. An outside judge is asked by the driver only, whose ledger holds the budget."""
    return stage.kind != "judge" or not graph.judges_outside


def _below(folder: Path, path: str) -> Path:
    """The path below `folder` that keeps the file's full old path, so that relative references stay valid."""
    return folder.joinpath(*Path(path).absolute().parts[1:])
