"""`fastconv run RECIPE --ray`: sources as Ray tasks, one worker for each GPU, one ledger in the end.

Ray decides where and when a task runs. Here stands only what is handed over (`orders`), how it is computed there
(`worker`), and how results come together: merged into the driver's workspace stage by stage, as they arrive. The driver
computes nothing; it asks a paid judge, so that one ledger holds the budget, and decides the gates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastconv.analysis.gates import ignored_gates, measurable_behaviors
from fastconv.audit.checks import check_recipe
from fastconv.cluster.driver import Driver, needs_of, unannounced
from fastconv.cluster.orders import base_order, is_whole, shared_order, source_orders
from fastconv.errors import ClusterError, RecipeError
from fastconv.experiment.graph import CellPlan, Graph
from fastconv.judge.access import check_judge
from fastconv.recipe import Recipe
from fastconv.run.audit import require_passed
from fastconv.run.judging import judge_stages
from fastconv.run.provenance import begin_run, run_facts
from fastconv.run.run import Finished, Gatekeeper, run_recipe
from fastconv.run.runner import Watcher, stop_on_sigint
from fastconv.run.status import failed_stages, needed_ends
from fastconv.store.ledger import Store

#: A local Ray is started and ended again.
LOCAL = "local"


def run_on_ray(
    recipe: Recipe,
    workspace: Path,
    watcher: Watcher,
    *,
    address: str = LOCAL,
    ignore_gates: Mapping[str, str] | None = None,
    admit: Callable[[Graph, Sequence[CellPlan]], Mapping[str, Any]] | None = None,
) -> Finished:
    """Run a recipe with its sources spread over a Ray cluster; the same stages as `run_recipe`, merged into `workspace`.

    A worker that is lost is replaced by one that goes on from what came back. A stage that fails is noted and the rest
    goes on, as in one process. If a worker ends with an error, the other sources go on to their end (but for a GateStop,
    which ends the run), and then that error is raised as it was there. `admit` is asked as by `run_recipe`.
    Raises ClusterError without Ray, Interrupted on Ctrl-C, and before anything is computed what `run_recipe` raises.
    """
    report = check_recipe(recipe)
    require_passed(report, "audit")
    graph = Graph(recipe)
    notes = admit(graph, graph.cells) if admit else {}
    store = Store.open(workspace)
    to_judge = [s for s in judge_stages(needed_ends(graph, store, graph.cells)) if store.record(s.key) is None]
    if to_judge and graph.judges_outside:
        check_judge(graph.judge, store)
    watcher.audited(report)
    with _ray(address, graph) as ray:
        run = begin_run(store, recipe, {**run_facts(), **notes})
        Gatekeeper(graph, store, run, watcher.gate, ignore_gates or {})  # records what is ignored
        stages = graph.stages()
        watcher.begin(run, len(stages), sum(store.record(stage.key) is None for stage in stages))
        with stop_on_sigint() as stop:
            driver = Driver(ray, graph, store, watcher, stop)
            _in_rounds(driver)
    finished = run_recipe(
        recipe, workspace, unannounced(watcher), plans=lambda again: _whole_cells(again, store), judge_later=True
    )
    if driver.errors or driver.failed:
        begin_run(store, recipe, {})  # it is not finished
    if driver.errors:
        raise driver.errors[0]
    failures = {key: failure for key, failure in store.failures().items() if key in driver.failed}
    failed = failed_stages(failures, graph.cells)
    return replace(finished, tally=driver.tally, problem=driver.problem, failed=failed)


def _in_rounds(driver: Driver) -> None:
    """The base, what sources share, the sources; again while the judge's word on the base lets more behaviors in."""
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


def _whole_cells(graph: Graph, store: Store) -> list[CellPlan]:
    """Cells of which nothing is left to compute; the driver has no model to compute it with."""
    alive = measurable_behaviors(graph, store)
    return [plan for plan in graph.cells if is_whole(graph, store, plan, alive)]


@contextmanager
def _ray(address: str, graph: Graph) -> Iterator[Any]:
    """Ray, connected; a local one is ended with the block. Raises ClusterError, RecipeError."""
    try:
        import ray
    except ImportError:
        raise ClusterError("Ray is not installed", where="--ray", fix="pip install 'fastconv[cluster]'") from None
    mine = not ray.is_initialized()
    try:
        if mine:
            _connect(ray, address)
        _require_room(ray, graph)
        yield ray
    finally:
        if mine:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    where = {"include_dashboard": False, "address": "local"} if address == LOCAL else {"address": address}
    try:
        ray.init(**where, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ClusterError(
            f"Ray cannot be reached ({reason})",
            where=f"--ray {address}",
            fix="give HOST:PORT of a running cluster (`ray start --head`), or --ray alone for a local one",
        ) from None


def _require_room(ray: Any, graph: Graph) -> None:
    """Raise unless some node could take a task, which Ray would otherwise wait for without end."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needs = needs_of(graph)
    most = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in ("GPU", "CPU")}
    if graph.recipe.model.device == "auto" and "num_gpus" not in needs and most["GPU"]:
        raise RecipeError(
            "auto is cpu on this machine, and the cluster has GPUs",
            where="model.device",
            fix="say which: --set model.device=cuda (or cpu)",
        )
    for kind, wanted in (("GPU", needs.get("num_gpus", 0)), ("CPU", needs["num_cpus"])):
        if most[kind] < wanted:
            raise ClusterError(
                f"a worker needs {wanted} {kind}, and no node has more than {most[kind]:g}",
                where="--ray",
                fix="set OMP_NUM_THREADS to fewer threads" if kind == "CPU" else "add a node with a GPU",
            )
