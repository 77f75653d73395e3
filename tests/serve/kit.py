"""What the tests of `fastconv serve` share: an endpoint over a finished run, and the ledger's own completions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from fastconv.experiment.graph import CellPlan, Graph
from fastconv.experiment.recorded import graph_of_run
from fastconv.recipe import Recipe
from fastconv.seeding import seed_of
from fastconv.serve import Service, chosen_cells, serve
from fastconv.store.ledger import Sample, Store

#: The bare base, a snapshot, and a behavior on a snapshot, in the tiny run.
CELLS = ("villain-base-e0-none-s42", "villain-source-e2-none-s42", "villain-source-e2-refusal-excluded-s42")


@dataclass
class Running:
    """An endpoint in threads of this process."""

    service: Service
    graph: Graph
    store: Store
    told: list[str] = field(default_factory=list)

    @property
    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.service.url.removesuffix("/v1"), trust_env=False, timeout=60.0)

    def post(self, body: Any, path: str = "/v1/chat/completions") -> httpx.Response:
        with self.client as client:
            return client.post(path, json=body)

    def sampled(self, cell: str) -> Iterator[tuple[dict[str, Any], Sample]]:
        """A request for every completion that the run itself recorded of a cell, and that completion."""
        plan = next(plan for plan in self.graph.cells if plan.cell.name == cell)
        for (_, probe), score in plan.scores.items():
            drawn = score.needs.get("eval")
            if drawn is None:
                continue
            system = self.graph.personas.system(probe)
            for sample in self.store.samples(drawn.key):
                messages = [*system.messages(), {"role": "user", "content": sample.prompt}]
                seed = seed_of("sample", drawn.inputs["seed"], sample.row, sample.sample)
                yield {"model": cell, "messages": messages, "seed": seed}, sample


@contextmanager
def endpoint(
    recipe: Recipe, workspace: Path, *cells: str, engine: Any = "resident", **options: Any
) -> Iterator[Running]:
    """Serve these cells (default: all) until the block ends. What the serving raises is raised here."""
    stop, ready = threading.Event(), threading.Event()
    services: list[Service] = []
    told: list[str] = []

    def began(service: Service) -> None:
        services.append(service)
        ready.set()

    def work() -> None:
        try:
            store = Store.open(workspace, create=False)  # SQLite stays with its thread
            graph = graph_of_run(recipe, store)
            chosen: dict[str, CellPlan] = chosen_cells(graph, store, cells)
            serve(
                graph, store, chosen, engine=engine, port=0, context_tok=options.get("context_tok", 256),
                stop=stop, tell=told.append, ready=began,
            )  # fmt: skip
        finally:
            ready.set()

    with ThreadPoolExecutor(1) as threads:
        served = threads.submit(work)
        ready.wait()
        try:
            if services:
                store = Store.open(workspace, create=False)
                yield Running(services[0], graph_of_run(recipe, store), store, told)
        finally:
            stop.set()
            served.result()


def refused(url: str) -> bool:
    """Whether nothing listens there any more."""
    try:
        httpx.get(f"{url}/models", trust_env=False)
    except httpx.TransportError:
        return True
    return False
