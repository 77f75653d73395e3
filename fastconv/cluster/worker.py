"""One worker: it computes an order in a workspace of its own on its node and hands every stage back as it is done.

The run goes on in a thread; this one looks into the ledger and hands over what is new. So a worker that is lost has
handed over all but its last stage, and one that comes again to the same node goes on from the state kept there.
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
from fastconv.cluster.orders import Order, require_same_stages, unpacked_recipe
from fastconv.engine.locate import cache_home
from fastconv.errors import FastconvError
from fastconv.experiment.graph import Graph
from fastconv.recipe import Recipe, run_id
from fastconv.run.run import compute_stages, run_recipe
from fastconv.show.progress import SilentWatcher
from fastconv.store.ledger import Store
from fastconv.store.merge import StageBundle, pack_stage, unpack_stage
from fastconv.store.records import Failure

#: How often a worker looks for finished stages, and whether it is to stop.
LOOK_S = 0.25
#: A worker's workspace that was left behind (its driver never came back) is kept for this long.
FORGOTTEN_AFTER_S = 14 * 86400.0


@dataclass(frozen=True)
class WorkerStarted:
    """A worker has begun."""

    node: str
    pid: int


@dataclass(frozen=True)
class WorkerFinished:
    """A worker is through. `facts` are those of its run; `failures` (by key) are stages that it could not finish.

    An error is told by its class and its three texts.
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


Item = WorkerStarted | StageBundle | WorkerFinished


def work(order: Order, start: Sequence[StageBundle], folder_name: str, stopped: Callable[[], bool]) -> Iterator[Item]:
    """Compute an order beginning from the stages in `start`; gives what comes of it, stage by stage, and its end.

    The workspace is `folder_name` under the node's cache; it is removed once everything is done and handed over.
    """
    node = socket.gethostname()
    yield WorkerStarted(node, os.getpid())
    _drop_old_workspaces()
    root = cache_home() / "cluster" / f"{node}-{folder_name}"
    try:
        recipe = unpacked_recipe(order, root / "inputs")
        # Whole stages are handed over, adapters with them; the driver frees what its recipe does not keep.
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"keep_adapters": True})})
        graph = Graph(recipe)
        require_same_stages(order, graph, node)
        store = Store.open(root / "checkpoints")
        for parcel in start:
            unpack_stage(store, parcel)
    except FastconvError as error:
        yield WorkerFinished(error=_told(error))
        return
    one = _Thread(order, graph, store.root)
    try:
        one.start()
        yield from _handing_over(order, store, {parcel.key for parcel in start}, one, stopped)
        failures = {key: failure for key, failure in store.failures().items() if key in order.keys}
        yield WorkerFinished(_facts(store, recipe), failures, one.told)
    finally:
        one.stop.set()  # Ray takes the task back: the running step ends well and its state is kept
        one.join()
        store.close()
    if one.told is None:
        shutil.rmtree(root, ignore_errors=True)


def _handing_over(
    order: Order, store: Store, known: set[str], one: _Thread, stopped: Callable[[], bool]
) -> Iterator[StageBundle]:
    """Every ordered stage that the driver does not have, as soon as it is in the ledger, until the thread has ended."""
    ordered = set(order.keys)
    while True:
        last_look = not one.is_alive()
        for (key,) in store.rows("SELECT key FROM stages ORDER BY finished_at, rowid"):
            if key in ordered and key not in known:
                known.add(key)
                yield pack_stage(store, key)
        if last_look:
            one.raise_defect()
            return
        if not one.stop.is_set() and stopped():
            one.stop.set()
        one.join(LOOK_S)


class _Thread(threading.Thread):
    """The computing of an order, and how it ended."""

    def __init__(self, order: Order, graph: Graph, workspace: Path) -> None:
        super().__init__(name=f"order-{order.name}")
        self._order, self._recipe, self._workspace = order, graph.recipe, workspace
        self._judge_later = graph.judges_outside
        self._defect: BaseException | None = None
        self.stop = threading.Event()
        #: The error that ended it, if one of fastconv's did.
        self.told: tuple[str, str, str, str] | None = None

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
            self.told = _told(error)
        except BaseException as error:
            self._defect = error  # raised again where Ray can see it, with its traceback

    def raise_defect(self) -> None:
        """Raise what ended the thread, if it was a defect of fastconv."""
        if self._defect is not None:
            raise self._defect


def _facts(store: Store, recipe: Recipe) -> dict[str, Any]:
    """What this worker's run knows of engine and template."""
    facts = store.run_facts(run_id(recipe))
    return {name: facts[name] for name in ("engine", "template", "machine", "versions") if name in facts}


def _told(error: FastconvError) -> tuple[str, str, str, str]:
    return type(error).__name__, error.what, error.where, error.fix


def _console() -> Any:
    from rich.console import Console

    return Console(quiet=True)


def _drop_old_workspaces() -> None:
    """Remove workspaces on this node to which nobody came back."""
    for folder in (cache_home() / "cluster").glob("*"):
        touched = max((path.stat().st_mtime for path in folder.rglob("*")), default=0.0)
        if time.time() - touched > FORGOTTEN_AFTER_S:
            shutil.rmtree(folder, ignore_errors=True)
