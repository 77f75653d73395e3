"""Spreading a run over workers, without Ray: what is handed to whom, what a worker gives back, what the driver makes of it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from fastconv import cluster
from fastconv.cli import app
from fastconv.cluster import driver, orders
from fastconv.cluster.orders import Order, base_order, initial_keys, shared_order, source_orders, unpack_recipe
from fastconv.cluster.worker import WorkerFinished, WorkerMessage, WorkerStarted, work
from fastconv.errors import ClusterError, GateStop, ModelError, RecipeError, TrainingError
from fastconv.experiment.graph import Graph
from fastconv.recipe import Recipe, run_id
from fastconv.store.ledger import Store
from fastconv.store.merge import StageBundle, pack_stage, unpack_stage
from tests import TESTS
from tests.loop_kit import Heard, results, run_tiny, tiny_recipe, write_tiny_recipe

SOURCES = ["villain", "comedian"]
NEVER: Callable[[], bool] = lambda: False  # noqa: E731


@pytest.fixture
def recipe(tiny_qwen: Path) -> Recipe:
    return tiny_recipe(tiny_qwen, grid__sources=SOURCES, grid__epochs=[0, 1], convergence__epochs=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- who gets what -------------------------------------------------------------------------------------------


def test_no_two_workers_are_given_the_same_stage(recipe: Recipe, tmp_path: Path) -> None:
    graph, store = Graph(recipe), Store.open(tmp_path / "ws")
    base = base_order(graph, store)
    assert base is not None
    assert all(slot.startswith(("eval/base", "score/base")) for slot in base.inputs)
    shared = shared_order(graph, store, ["refusal"])
    assert shared is not None
    assert any(slot.startswith("answers/") for slot in shared.inputs)  # both sources have these bystanders
    both = [set(order.keys) for order in source_orders(graph, store, ["refusal"])]
    assert [order.source for order in source_orders(graph, store, ["refusal"])] == SOURCES
    assert both[0] & both[1] <= set(base.keys) | set(shared.keys)
    everything = {stage.key for stage in graph.stages()}
    assert set(base.keys) | set(shared.keys) | both[0] | both[1] == everything


def test_a_behavior_that_g0_stops_is_given_to_nobody(recipe: Recipe, tmp_path: Path) -> None:
    graph, store = Graph(recipe), Store.open(tmp_path / "ws")
    assert shared_order(graph, store, []) is None
    assert all(
        slot.startswith(("eval/base", "score/base")) for o in source_orders(graph, store, []) for slot in o.inputs
    )


def test_what_is_done_is_not_given_out_again_and_comes_along(recipe: Recipe, tmp_path: Path) -> None:
    run_tiny(recipe.model_copy(update={"grid": recipe.grid.model_copy(update={"sources": ("villain",)})}), tmp_path)
    graph, store = Graph(recipe), Store.open(tmp_path)
    (order,) = source_orders(graph, store, ["refusal"])
    assert order.source == "comedian"
    start = initial_keys(graph, store, order)
    assert {store.record(key) is not None for key in start} == {True}
    assert not any(slot.startswith("eval/villain/") for slot in order.inputs)


def test_a_paid_judge_is_left_to_the_driver_and_the_resident_one_to_the_worker(tiny_qwen: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    for judge, is_ordered in (
        ({"mode": "live", "model": "claude-haiku-5-5", "budget_usd": 1.0}, False),
        ({"mode": "local"}, True),
    ):
        graph = Graph(tiny_recipe(tiny_qwen, judge=judge))
        (order,) = source_orders(graph, store, ["refusal"])
        assert any(slot.startswith("judge/") for slot in order.inputs) is is_ordered
        assert any(slot.startswith("score/") for slot in order.inputs)


def test_files_of_a_recipe_travel_by_content(tiny_qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(TESTS / "user_data", tmp_path / "mine")
    declared = tmp_path / "mine" / "behaviors.toml"
    declared.write_text(declared.read_text().replace('phrases = ["tea"]', 'scorer = "leaves:says_tea"'))
    (tmp_path / "mine" / "leaves.py").write_text("def says_tea(answer):\n    return 'tea' in answer\n")
    rows = tmp_path / "rows" / "villain.jsonl"
    rows.parent.mkdir()
    line = {"prompt": [{"role": "user", "content": "Hi?"}], "completion": [{"role": "assistant", "content": "No."}]}
    rows.write_text(json.dumps(line))
    recipe = tiny_recipe(
        tiny_qwen, grid__behaviors=["refusal", "always_mentions_tea"], data__personas=str(tmp_path / "mine/personas.toml"),
        data__behaviors=str(tmp_path / "mine/behaviors.toml"), data__rows={"refusal": str(tmp_path / "rows/{source}.jsonl")},
    )  # fmt: skip
    graph = Graph(recipe)
    (order,) = source_orders(graph, Store.open(tmp_path / "ws"), list(graph.behaviors))
    assert {Path(path).name for path in order.files} == {
        "personas.toml",
        "behaviors.toml",
        "tea.jsonl",
        "leaves.py",
        "villain.jsonl",
    }
    order = pickle.loads(pickle.dumps(order))
    shutil.rmtree(tmp_path / "mine")
    shutil.rmtree(tmp_path / "rows")
    unpacked = Graph(unpack_recipe(order, tmp_path / "node"))
    assert {stage.key for stage in unpacked.stages()} == {stage.key for stage in graph.stages()}


# --- a worker ------------------------------------------------------------------------------------------------


def _done(order: Order, store: Store, stopped: Callable[[], bool] = NEVER) -> list[WorkerMessage]:
    """Work an order in this process and take everything in."""
    graph = Graph(load(order))

    items = list(work(order, [pack_stage(store, key) for key in initial_keys(graph, store, order)], "test", stopped))
    for item in items:
        if isinstance(item, StageBundle):
            assert unpack_stage(store, item)
    return items


def load(order: Order) -> Recipe:
    return Recipe.model_validate(order.recipe)


def test_a_worker_gives_back_each_stage_once_and_leaves_nothing(recipe: Recipe, tmp_path: Path, cache: Path) -> None:
    graph, store = Graph(recipe), Store.open(tmp_path / "ws")
    base = base_order(graph, store)
    assert base is not None
    items = _done(base, store)
    assert isinstance(items[0], WorkerStarted)
    assert isinstance(items[-1], WorkerFinished)
    assert items[-1].problem() is None
    assert items[-1].facts["engine"]["device"] == "cpu"
    parcels = [item for item in items if isinstance(item, StageBundle)]
    assert sorted(parcel.key for parcel in parcels) == sorted(base.keys)
    assert list((cache / "cluster").iterdir()) == []
    assert base_order(graph, store) is None


def test_a_worker_whose_node_differs_says_in_what(recipe: Recipe, tmp_path: Path) -> None:
    graph, store = Graph(recipe), Store.open(tmp_path / "ws")
    order = base_order(graph, store)
    assert order is not None
    slot, inputs = next(iter(order.inputs.items()))
    other = {**inputs, "engine": {**inputs["engine"], "engine": "unsloth"}}
    order = Order(order.name, order.recipe, order.files, {slot: other}, ("0" * 64,), order.ends)
    (_, end) = work(order, [], "test", NEVER)
    assert isinstance(end, WorkerFinished)
    problem = end.problem()
    assert isinstance(problem, ClusterError)
    assert "engine.engine: unsloth -> torch" in str(problem)


def test_an_error_of_a_worker_comes_back_as_it_was() -> None:
    finished = WorkerFinished(error=("TrainingError", "loss is not finite", "behavior/x", "lower lr"))
    error = pickle.loads(pickle.dumps(finished)).problem()
    assert isinstance(error, TrainingError)
    assert str(error) == str(TrainingError("loss is not finite", where="behavior/x", fix="lower lr"))
    assert error.exit_code == 7


def test_workspaces_that_nobody_came_back_to_go(recipe: Recipe, tmp_path: Path, cache: Path) -> None:
    for name in ("old", "young"):
        (cache / "cluster" / name).mkdir(parents=True)
        (cache / "cluster" / name / "ledger.sqlite").write_bytes(b"x")
    os.utime(cache / "cluster" / "old" / "ledger.sqlite", (time.time() - 30 * 86400,) * 2)
    next_item = work(Order("base", recipe.model_dump(mode="json"), {}, {}, ()), [], "test", NEVER)
    assert isinstance(next(next_item), WorkerStarted)
    next(next_item)
    assert [path.name for path in (cache / "cluster").glob("[oy]*")] == ["young"]


# --- the driver ----------------------------------------------------------------------------------------------


class LostError(Exception):
    """As Ray says that a worker crashed."""


class FakeRay:
    """Ray's face, one order after another in this process.

    `after[name]` ends that order's workers after so many items, `errors[name]` is what its worker says at once.
    """

    def __init__(
        self, after: dict[str, list[int]] | None = None, resources: dict[str, float] | None = None,
        errors: dict[str, tuple[str, str, str, str]] | None = None,
    ) -> None:  # fmt: skip
        self.after = after or {}
        self.errors = errors or {}
        self.exceptions = SimpleNamespace(
            WorkerCrashedError=LostError, NodeDiedError=LostError, ObjectLostError=LostError, OutOfMemoryError=LostError,
            RayError=ZeroDivisionError,
        )  # fmt: skip
        self.resources = resources or {"CPU": 64.0}
        self.sent: list[tuple[str, set[str]]] = []

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": self.resources}]

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        def of(target: Any) -> Any:
            if isinstance(target, type):
                made = target()
                methods = {name: SimpleNamespace(remote=getattr(made, name)) for name in ("set", "is_set")}
                return SimpleNamespace(remote=lambda: SimpleNamespace(**methods))
            return SimpleNamespace(remote=self._start)

        return of

    def _start(
        self, order: Order, start: Sequence[StageBundle], folder: str, stop_flag: Any
    ) -> Iterator[WorkerMessage]:
        self.sent.append((order.name, {parcel.key for parcel in start}))
        if order.name in self.errors:
            return iter([WorkerStarted("node", 1), WorkerFinished(error=self.errors[order.name])])
        items = work(order, start, folder, stop_flag.is_set.remote)
        limits = self.after.get(order.name, [])
        limit = limits.pop(0) if limits else None
        return self._dying(items, limit) if limit is not None else items

    @staticmethod
    def _dying(items: Iterator[WorkerMessage], limit: int) -> Iterator[WorkerMessage]:
        for _ in range(limit):
            yield next(items)
        items.close()  # pyright: ignore[reportAttributeAccessIssue]
        raise LostError("The worker died unexpectedly")

    def put(self, value: Any) -> Any:
        return value

    def get(self, value: Any) -> Any:
        return value

    def wait(self, streams: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return streams[:1], streams[1:]

    def cancel(self, stream: Any, force: bool = False) -> None:
        stream.close()


def _run(ray: FakeRay, recipe: Recipe, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Heard]:
    monkeypatch.setitem(sys.modules, "ray", ray)  # pyright: ignore[reportArgumentType]
    heard = Heard()
    return cluster.run_on_ray(recipe, workspace, heard), heard


@pytest.mark.slow
def test_a_lost_worker_is_replaced_and_nothing_is_done_twice(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay({"villain": [6, 9]})
    finished, heard = _run(ray, recipe, tmp_path / "ray", monkeypatch)
    alone, _ = run_tiny(recipe, tmp_path / "alone")
    assert results(recipe, tmp_path / "ray") == results(recipe, tmp_path / "alone")
    assert [v.body() for v in finished.verdicts] == [v.body() for v in alone.verdicts]
    assert finished.tally.n_stages == alone.tally.n_stages == len(heard.stages)
    assert finished.tally.tokens == alone.tally.tokens
    villains = [start for name, start in ray.sent if name == "villain"]
    assert [len(keys) - len(villains[0]) for keys in villains] == [0, 5, 13]  # WorkerStarted is no stage
    store = Store.open(tmp_path / "ray")
    assert store.runs()[0]["finished_at"] is not None
    assert {row["reused"] for row in store.stages_of_run(finished.run)} == {0}
    facts = json.loads(store.runs()[0]["facts"])
    assert facts["engine"]["device"] == "cpu"
    assert set(facts["workers"]) == {"base", "shared", *SOURCES}
    again, heard = _run(FakeRay(), recipe, tmp_path / "ray", monkeypatch)
    assert (again.tally.n_stages, heard.stages) == (0, {})


def test_an_order_that_loses_every_worker_ends_with_one_line(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay({"base": [1] * 9})
    with pytest.raises(ClusterError, match=r"base: its worker was lost 4 times without a finished stage") as caught:
        _run(ray, recipe, tmp_path / "ray", monkeypatch)
    assert caught.value.exit_code == 10
    assert len(ray.sent) == driver.RETRIES + 1


def test_an_error_of_one_source_is_raised_when_the_others_are_through(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = Graph(recipe)
    ray = FakeRay(errors={"villain": ("ModelError", "it is gone", "model.id", "get it")})
    with pytest.raises(ModelError, match=r"model\.id: it is gone"):
        _run(ray, recipe, tmp_path / "ray", monkeypatch)
    store = Store.open(tmp_path / "ray")
    done = {stage.slot for stage in graph.stages() if store.record(stage.key)}
    assert "eval/comedian/source/e1+refusal/excluded/refusal/assistant/s42" in done
    assert store.runs()[0]["finished_at"] is None
    assert store.verdicts(run_id(recipe))  # of what there is


def test_a_stage_that_fails_at_a_worker_is_noted_as_in_one_process(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastconv.engine import train

    real = train.weighted_cross_entropy
    monkeypatch.setattr(train, "weighted_cross_entropy", lambda *args: [part * float("nan") for part in real(*args)])
    alone, _ = run_tiny(recipe, tmp_path / "alone")
    spread, heard = _run(FakeRay(), recipe, tmp_path / "ray", monkeypatch)
    assert set(spread.failed) == set(alone.failed)
    assert len(heard.failed) == len(spread.failed) > 1
    for finished in (alone, spread):
        with pytest.raises(TrainingError, match="loss nan") as caught:
            finished.require_complete()
        assert caught.value.exit_code == 7
    assert Store.open(tmp_path / "ray").runs()[0]["finished_at"] is None


def test_a_gate_that_stops_one_source_stops_the_others_before_their_next_cost(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay(errors={"villain": ("GateStop", "G2 failed", "villain", "mend it")})
    with pytest.raises(GateStop, match="villain: G2 failed"):
        _run(ray, recipe, tmp_path / "ray", monkeypatch)
    store = Store.open(tmp_path / "ray")
    assert not [s for s in Graph(recipe).stages() if s.slot.startswith("behavior/comedian") and store.record(s.key)]


# --- what cannot be done is one line -------------------------------------------------------------------------


def test_without_ray_one_line_says_how_to_get_it(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    path = write_tiny_recipe(tmp_path / "tiny.toml", tiny_qwen)
    for words in (["--ray"], ["--ray", "127.0.0.1:6379"], ["--ray", "-q"]):
        answer = CliRunner().invoke(app, ["run", str(path), "-w", str(tmp_path / "ws"), *words])
        assert answer.exit_code == 10
        assert answer.output.strip().splitlines()[-1] == (
            "fastconv: --ray: Ray is not installed. Fix: pip install 'ray>=2.40,<3'"
        )


def test_what_no_node_could_take_is_refused_before_ray_waits_for_it(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClusterError, match="a worker needs 1 CPU, and no node has more than 0"):
        _run(FakeRay(resources={"CPU": 0.0}), recipe, tmp_path, monkeypatch)
    on_gpu = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": "cuda"})})
    with pytest.raises(ClusterError, match="a worker needs 1 GPU"):
        _run(FakeRay(), on_gpu, tmp_path, monkeypatch)
    auto = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": "auto"})})
    with pytest.raises(RecipeError, match="auto is cpu on this machine, and the cluster has GPUs"):
        _run(FakeRay(resources={"CPU": 8.0, "GPU": 8.0}), auto, tmp_path, monkeypatch)


def test_a_worker_takes_as_many_threads_as_one_process_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert driver.cpu_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert driver.cpu_threads() == len(os.sched_getaffinity(0))
    assert orders.BASE == "base"


def test_on_a_gpu_a_worker_takes_one_and_leaves_its_memory_free_for_the_next(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "engine_identity", lambda settings: {"device": "cuda"})
    needs = driver.task_resources(Graph(recipe))
    assert (needs["num_gpus"], needs["max_calls"]) == (1, 1)
