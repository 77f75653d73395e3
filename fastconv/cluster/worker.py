"""A worker: computes an order in its own workspace on its node and hands every stage over as soon as it is finished.

The computation runs in a thread; the main thread reads the ledger and hands over new stages. So a lost worker has handed
over all but its last stage, and a new one on the same node continues from the checkpoint stored there.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastconv import errors
from fastconv.cluster.orders import Order, require_same_stages, unpack_recipe
from fastconv.errors import FastconvError
from fastconv.experiment.graph import Graph
from fastconv.hub import cache_home
from fastconv.recipe import Recipe, run_id
from fastconv.run.run import compute_stages, run_recipe
from fastconv.show.progress import SilentWatcher
from fastconv.store.ledger import Store
from fastconv.store.merge import StageBundle, pack_stage, unpack_stage
from fastconv.store.records import Failure

#: Seconds between checks for finished stages and for a stop.
POLL_S = 0.25
#: Seconds that the workspace of an order is kept if its driver never comes back.
FORGOTTEN_AFTER_S = 14 * 86400.0


@dataclass(frozen=True)
class WorkerStarted:
    """The first message of a worker."""

    node: str
    pid: int


@dataclass(frozen=True)
class WorkerFinished:
    """The last message of a worker. `facts` are those of its run, `failures` its failed stages by key.

    `error` is the exception's class name, problem, place and fix.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    failures: Mapping[str, Failure] = field(default_factory=dict)
    error: tuple[str, str, str, str] | None = None

    def problem(self) -> FastconvError | None:
        """The error as it was raised, or None."""
        if self.error is None:
            return None
        name, what, where, fix = self.error
        return getattr(errors, name, FastconvError)(what, where=where, fix=fix)


#: What a worker yields to the driver.
WorkerMessage = WorkerStarted | StageBundle | WorkerFinished


def work(
    order: Order, start: Sequence[StageBundle], folder_name: str, stopped: Callable[[], bool]
) -> Iterator[WorkerMessage]:
    """Compute an order from the finished stages in `start`; yields a start message, every new stage, and an end message.

    `stopped` returns whether to end after the current step. The workspace is `folder_name` under the node's cache; it is
    removed once everything is computed and handed over.
    """
    node = socket.gethostname()
    yield WorkerStarted(node, os.getpid())
    _drop_old_workspaces()
    root = cache_home() / "cluster" / f"{node}-{folder_name}"
    try:
        recipe = unpack_recipe(order, root / "inputs")
        # Stages are handed over with their adapters; the driver frees those that its recipe does not keep.
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"keep_adapters": True})})
        graph = Graph(recipe)
        require_same_stages(order, graph, node)
        store = Store.open(root / "checkpoints")
        for bundle in start:
            unpack_stage(store, bundle)
    except FastconvError as error:
        yield WorkerFinished(error=_error_texts(error))
        return
    computing = _ComputeThread(order, graph, store.root)
    try:
        computing.start()
        yield from _new_stages(order, store, {bundle.key for bundle in start}, computing, stopped)
        failures = {key: failure for key, failure in store.failures().items() if key in order.keys}
        yield WorkerFinished(_facts(store, recipe), failures, computing.error)
    finally:
        computing.stop.set()  # if Ray cancels the task, the running step is finished and its checkpoint written
        computing.join()
        store.close()
    if computing.error is None:
        shutil.rmtree(root, ignore_errors=True)


def _new_stages(
    order: Order, store: Store, known: set[str], computing: _ComputeThread, stopped: Callable[[], bool]
) -> Iterator[StageBundle]:
    """Yield every ordered stage that is not in `known` as soon as it is in the ledger, until the thread has ended."""
    ordered = set(order.keys)
    while True:
        is_last = not computing.is_alive()
        for (key,) in store.rows("SELECT key FROM stages ORDER BY rowid"):
            if key in ordered and key not in known:
                known.add(key)
                yield pack_stage(store, key)
        if is_last:
            computing.raise_defect()
            return
        if not computing.stop.is_set() and stopped():
            computing.stop.set()
        computing.join(POLL_S)


class _ComputeThread(threading.Thread):
    """Computes an order, and keeps the error that ended it."""

    def __init__(self, order: Order, graph: Graph, workspace: Path) -> None:
        super().__init__(name=f"order-{order.name}")
        self._order, self._recipe, self._workspace = order, graph.recipe, workspace
        self._judge_later = graph.judges_outside
        self._defect: BaseException | None = None
        self.stop = threading.Event()
        #: Texts of the FastconvError that ended it, if one did.
        self.error: tuple[str, str, str, str] | None = None

    def run(self) -> None:
        """Compute; never raises."""
        watcher = SilentWatcher(_console())
        source = self._order.source
        try:
            if source is None:
                compute_stages(self._recipe, self._workspace, watcher, self._order.ends, stop=self.stop)
            else:
                run_recipe(
                    self._recipe, self._workspace, watcher, stop=self.stop, ignore_gates=self._order.ignore_gates,
                    plans=lambda graph: [plan for plan in graph.cells if plan.cell.source == source],
                    judge_later=self._judge_later,
                )  # fmt: skip
        except FastconvError as error:
            self.error = _error_texts(error)
        except BaseException as error:
            self._defect = error  # raised again in the main thread, where Ray reports it with its traceback

    def raise_defect(self) -> None:
        """Raise the exception that ended the thread, if it was a defect and not a FastconvError."""
        if self._defect is not None:
            raise self._defect


def _facts(store: Store, recipe: Recipe) -> dict[str, Any]:
    """Facts of this worker's run: engine, template, machine and versions."""
    facts = store.run_facts(run_id(recipe))
    return {name: facts[name] for name in ("engine", "template", "machine", "versions") if name in facts}


def _error_texts(error: FastconvError) -> tuple[str, str, str, str]:
    return type(error).__name__, error.what, error.where, error.fix


def _console() -> Any:
    from rich.console import Console

    return Console(quiet=True)


def _drop_old_workspaces() -> None:
    """Remove workspaces on this node that were not used for `FORGOTTEN_AFTER_S` seconds."""
    for folder in (cache_home() / "cluster").glob("*"):
        touched = max((path.stat().st_mtime for path in folder.rglob("*")), default=0.0)
        if time.time() - touched > FORGOTTEN_AFTER_S:
            shutil.rmtree(folder, ignore_errors=True)
