"""`fastconv run RECIPE --ray`: the sources of a recipe as Ray tasks, one worker per GPU, with a single ledger in the end.

Ray decides where and when a task runs. `orders` defines what a worker receives, `worker` how it computes, and `driver`
how results are merged into the driver's workspace, stage by stage as they arrive. The driver computes nothing itself; it
asks a paid judge, so that one ledger holds the budget, and decides the gates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastconv.analysis.gates import ignored_gates, measurable_behaviors
from fastconv.cluster.driver import Driver, task_resources, without_announcements
from fastconv.cluster.orders import base_order, is_cell_computed, shared_order, source_orders
from fastconv.errors import ClusterError, RecipeError
from fastconv.experiment.graph import CellPlan, Graph
from fastconv.judge.desk import PROVIDERS
from fastconv.recipe import Recipe
from fastconv.run.run import RunResult, prepare_run, run_recipe
from fastconv.run.runner import Watcher, stop_on_sigint
from fastconv.run.status import begin_run, failed_stages
from fastconv.store.ledger import Store

#: The address that starts a local Ray and shuts it down at the end.
LOCAL = "local"


def run_on_ray(
    recipe: Recipe,
    workspace: Path,
    watcher: Watcher,
    *,
    address: str = LOCAL,
    ignore_gates: Mapping[str, str] | None = None,
    admit: Callable[[Graph, Sequence[CellPlan]], Mapping[str, Any]] | None = None,
) -> RunResult:
    """Run a recipe with its sources spread over a Ray cluster; the same stages as `run_recipe`, merged into `workspace`.

    A lost worker is replaced by one that continues from the stages that came back. A stage that fails is recorded and
    the rest goes on, as in one process. If a worker ends with an error, the other sources are finished first (except for
    a GateStop, which ends the run), and then that error is raised as it was raised there. `admit` and `ignore_gates` are
    as for `run_recipe`. Raises ClusterError without Ray, Interrupted on Ctrl-C, and what `prepare_run` raises.
    """
    prepared = prepare_run(recipe, workspace, watcher, admit=admit)
    graph, store = prepared.graph, prepared.store
    with _ray(address, graph) as ray:
        prepared.begin(watcher, ignore_gates)
        with stop_on_sigint() as stop:
            driver = Driver(ray, graph, store, watcher, stop)
            _compute_in_rounds(driver)
    result = run_recipe(
        recipe,
        workspace,
        without_announcements(watcher),
        plans=lambda graph: _computed_cells(graph, store),
        judge_later=True,
    )
    if driver.errors or driver.failed:
        begin_run(store, recipe, {})  # marks it as unfinished again
    if driver.errors:
        raise driver.errors[0]
    failures = {key: failure for key, failure in store.failures().items() if key in driver.failed}
    failed = failed_stages(failures, graph.cells)
    return replace(result, tally=driver.tally, problem=driver.problem, failed=failed)


def _compute_in_rounds(driver: Driver) -> None:
    """Compute the base, stages that sources share, and the sources; repeat while G0 lets more behaviors through."""
    graph, store = driver.graph, driver.store
    before: list[str] = []
    if (base := base_order(graph, store)) is not None:
        driver.compute([base])
    while not driver.errors:
        driver.judge(urgent=True)
        alive = measurable_behaviors(graph, store)
        if set(alive) <= set(before):
            return
        before = alive
        if (shared := shared_order(graph, store, alive)) is not None:
            driver.compute([shared])
        if not driver.errors:
            driver.compute(source_orders(graph, store, alive, ignored_gates(store, graph.recipe)))
            driver.judge(urgent=False)


def _computed_cells(graph: Graph, store: Store) -> list[CellPlan]:
    """Cells that are computed except for judging; the driver has no model and cannot compute others."""
    alive = measurable_behaviors(graph, store)
    return [plan for plan in graph.cells if is_cell_computed(graph, store, plan, alive)]


@contextmanager
def _ray(address: str, graph: Graph) -> Iterator[Any]:
    """Connect to Ray unless it is connected already; disconnects after the block. Raises ClusterError, RecipeError."""
    try:
        import ray
    except ImportError:
        raise ClusterError("Ray is not installed", where="--ray", fix="pip install 'ray>=2.40,<3'") from None
    connect = not ray.is_initialized()
    try:
        if connect:
            _connect(ray, address)
        _require_capacity(ray, graph)
        yield ray
    finally:
        if connect:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    where = {"include_dashboard": False, "address": "local"} if address == LOCAL else {"address": address}
    # The driver alone asks a paid judge: the processes that Ray starts on this machine get no key.
    names = {provider.key_name for provider in PROVIDERS.values()}
    keys = {name: os.environ.pop(name) for name in names & os.environ.keys()}
    try:
        ray.init(**where, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ClusterError(
            f"Ray cannot be reached ({reason})",
            where=f"--ray {address}",
            fix="give HOST:PORT of a running cluster (`ray start --head`), or --ray alone for a local one",
        ) from None
    finally:
        os.environ.update(keys)


def _require_capacity(ray: Any, graph: Graph) -> None:
    """Raise ClusterError or RecipeError unless some node can run a task; Ray would wait for one forever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    resources = task_resources(graph)
    most = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in ("GPU", "CPU")}
    if graph.recipe.model.device == "auto" and "num_gpus" not in resources and most["GPU"]:
        raise RecipeError(
            "auto is cpu on this machine, and the cluster has GPUs",
            where="model.device",
            fix="say which: --set model.device=cuda (or cpu)",
        )
    for kind, needed in (("GPU", resources.get("num_gpus", 0)), ("CPU", resources["num_cpus"])):
        if most[kind] < needed:
            raise ClusterError(
                f"a worker needs {needed} {kind}, and no node has more than {most[kind]:g}",
                where="--ray",
                fix="set OMP_NUM_THREADS to fewer threads" if kind == "CPU" else "add a node with a GPU",
            )
