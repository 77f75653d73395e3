"""A run in trackers: TensorBoard's event files are read back by its own reader; one that fails or hangs stops nothing."""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

import fastconv
from fastconv.cli import app
from fastconv.experiment.graph import Graph
from fastconv.recipe import Recipe, run_id
from fastconv.run.run import run_recipe
from fastconv.show import trackers as module
from fastconv.show.trackers import TRACKERS, loss_curve, tracking
from tests.loop_kit import Heard, records, tiny_recipe, write_tiny_recipe


class Listener(Heard):
    """A watcher that writes down what it is told of trackers."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def recipe(tiny_qwen: Path) -> Recipe:
    return tiny_recipe(tiny_qwen, grid__epochs=[0, 1], run__track=["tensorboard"])


def run_tracked(recipe: Recipe, workspace: Path, report: Path | None = None) -> list[str]:
    """Run the recipe with its trackers; what was told of them."""
    heard = Listener()
    with tracking(recipe, workspace) as tracked:
        run_recipe(recipe, workspace, tracked.watch(heard))  # pyright: ignore[reportArgumentType]
        tracked.report = report
    return heard.notes


def events(workspace: Path, recipe: Recipe) -> tuple[dict[str, list[tuple[int, float]]], dict[str, str]]:
    """(points by curve, texts) as TensorBoard's own reader finds them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = workspace / "tracking" / "tensorboard" / run_id(recipe)
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    points = {tag: [(one.step, one.value) for one in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    texts = {tag: reader.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in reader.Tags()["tensors"]}
    return points, texts


def expected_losses(recipe: Recipe, workspace: Path) -> dict[str, list[float]]:
    found = records(recipe, workspace)
    stages = [stage for stage in Graph(recipe).stages() if stage.kind in ("snapshot", "behavior")]
    return {loss_curve(stage): found[stage.slot].outputs["losses"] for stage in stages}


def without_rates(points: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {name: sorted(found) for name, found in points.items() if not name.startswith("rate/")}


def test_tensorboard_reads_back_losses_rates_scores_gates_and_the_report(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RATE_EVERY_S", 0.0)
    assert run_tracked(recipe, tmp_path, report=tmp_path / "report.html") == []
    points, texts = events(tmp_path, recipe)
    losses = expected_losses(recipe, tmp_path)
    assert len(losses) == 3
    for curve, values in losses.items():
        assert sorted(points[curve]) == [(step, pytest.approx(value, abs=1e-5)) for step, value in enumerate(values, 1)]
    metrics = fastconv.open_run(recipe, workspace=tmp_path).metrics()
    scores = {name: found for name, found in points.items() if name.startswith("score/")}
    assert sum(map(len, scores.values())) == metrics.height == 12
    row = metrics.filter(epoch=1, behavior="refusal", role="source").row(0, named=True)
    curve = dict(scores["score/refusal/source/villain-source-refusal-excluded-s42"])
    assert curve[1] == pytest.approx(row["value"])
    assert all(rate > 0 for name, found in points.items() if name.startswith("rate/") for _, rate in found)
    assert "rate/tok_per_s" in points
    assert texts["report"] == (tmp_path / "report.html").as_uri()
    assert texts["gate/G0/refusal"].startswith("pass: ")
    assert '"tiny"' in texts["recipe"]


def test_what_was_computed_before_is_sent_once(recipe: Recipe, tmp_path: Path) -> None:
    """Untracked, tracked, tracked again: the second call sends everything, the third nothing twice."""
    plain = recipe.model_copy(update={"run": recipe.run.model_copy(update={"track": ()})})
    run_tracked(plain, tmp_path)
    assert not (tmp_path / "tracking").exists()
    run_tracked(recipe, tmp_path)
    first = without_rates(events(tmp_path, recipe)[0])
    assert {name: [value for _, value in first[name]] for name in expected_losses(recipe, tmp_path)} == {
        name: pytest.approx(values, abs=1e-5) for name, values in expected_losses(recipe, tmp_path).items()
    }
    run_tracked(recipe, tmp_path)
    assert without_rates(events(tmp_path, recipe)[0]) == first


def test_tracking_is_no_part_of_a_run_or_of_any_stage(recipe: Recipe) -> None:
    plain = recipe.model_copy(update={"run": recipe.run.model_copy(update={"track": ()})})
    assert run_id(plain) == run_id(recipe)
    assert "track" not in plain.model_dump(mode="json")["run"]
    assert [stage.key for stage in Graph(plain).stages()] == [stage.key for stage in Graph(recipe).stages()]


def fake_tracker(open_it: Callable[[], None], give: Callable[[], None], close: Callable[[], None]) -> Any:
    class Fake:
        def __init__(self, run: str, folder: Path, settings: Any) -> None:
            open_it()

        def scalars(self, values: Any, axis: str, step: int) -> None:
            give()

        def text(self, name: str, text: str) -> None:
            give()

        def close(self) -> None:
            close()

    return Fake


def _nothing() -> None:
    pass


def _fails() -> None:
    raise ConnectionError("no route to the tracker\nand more")


@pytest.mark.parametrize("at", [0, 1, 2], ids=["opening", "giving", "closing"])
def test_a_tracker_that_fails_is_told_and_the_other_gets_everything(
    at: int, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [_nothing, _nothing, _nothing]
    parts[at] = _fails
    monkeypatch.setattr(module, "TRACKERS", {**TRACKERS, "wandb": fake_tracker(*parts)})
    both = recipe.model_copy(update={"run": recipe.run.model_copy(update={"track": ("wandb", "tensorboard")})})
    assert run_tracked(both, tmp_path) == ["wandb does not track this run: ConnectionError: no route to the tracker"]
    assert set(expected_losses(both, tmp_path)) <= set(events(tmp_path, both)[0])
    assert set(json.loads((tmp_path / "tracking" / f"{run_id(both)}.json").read_text())) == {"tensorboard"}


def test_a_tracker_that_hangs_is_left_behind(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ever = threading.Event()
    monkeypatch.setattr(module, "TRACKERS", {"tensorboard": fake_tracker(_nothing, lambda: ever.wait(60), _nothing)})
    monkeypatch.setattr(module, "CLOSE_S", 0.3)
    began = time.monotonic()
    (note,) = run_tracked(recipe, tmp_path)
    assert note.startswith("tensorboard does not track this run: it did not end within ")
    assert time.monotonic() - began < 60
    assert fastconv.open_run(recipe, workspace=tmp_path).stages()["state"].unique().to_list() == ["done"]
    ever.set()


def test_a_library_that_is_not_installed_is_named(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command line, which ends as without the tracker."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    path = write_tiny_recipe(tmp_path / "tiny.toml", tiny_qwen)
    words = ["run", str(path), "-w", str(tmp_path / "c"), "--reports", str(tmp_path / "r")]
    answer = CliRunner().invoke(app, [*words, "--set", 'run.track=["wandb"]', "--set", "grid.epochs=[0]"])
    assert answer.exit_code == 0, answer.output
    assert "wandb does not track this run: " in answer.output
    assert "pip install wandb" in answer.output
    monkeypatch.undo()
    told = CliRunner().invoke(
        app, ["doctor", str(path), "-w", str(tmp_path / "c"), "--set", 'run.track=["tensorboard"]']
    )
    assert "tensorboard 2." in told.output


def fake_wandb(calls: list[tuple[Any, ...]], *, key: bool) -> ModuleType:
    class Run:
        summary: dict[str, str] = {}  # noqa: RUF012

        def define_metric(self, name: str, *, step_metric: str) -> None:
            calls.append(("axis", name, step_metric))

        def log(self, values: dict[str, float]) -> None:
            calls.append(("log", values))

        def finish(self) -> None:
            calls.append(("finish", dict(self.summary)))

    fake: Any = ModuleType("wandb")
    fake.Settings = dict
    fake.login = lambda prompt: key
    fake.init = lambda **given: (calls.append(("init", given)), Run())[1]
    return fake


@pytest.mark.parametrize("key", [False, True])
def test_wandb_is_offline_without_a_key_and_never_asks_for_one(
    key: bool, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls, key=key))
    tracked = recipe.model_copy(update={"run": recipe.run.model_copy(update={"track": ("wandb",)})})
    assert run_tracked(tracked, tmp_path, report=tmp_path / "report.html") == []
    given = calls[0][1]
    assert given["mode"] == (None if key else "offline")
    assert (given["id"], given["name"]) == (run_id(recipe), run_id(recipe))
    assert ("axis", "score/*", "epoch") in calls
    logged = [values for kind, values in calls if kind == "log"] if (calls := [c for c in calls if len(c) == 2]) else []
    losses = [values["loss/behavior-villain-e0-refusal-excluded-s42"] for values in logged
              if "loss/behavior-villain-e0-refusal-excluded-s42" in values]  # fmt: skip
    assert losses == pytest.approx(
        expected_losses(recipe, tmp_path)["loss/behavior-villain-e0-refusal-excluded-s42"], abs=1e-5
    )
    assert all({"optimizer_step", "run_s", "epoch"} & set(values) for values in logged)
    assert calls[-1][1]["report"] == (tmp_path / "report.html").as_uri()


@pytest.mark.trackers
def test_wandb_and_trackio_themselves_take_it_all_offline(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both libraries as they are, in the environment of `make test-trackers`; what they keep is looked at."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    both = recipe.model_copy(update={"run": recipe.run.model_copy(update={"track": ("wandb", "trackio")})})
    assert run_tracked(both, tmp_path / "c", report=tmp_path / "report.html") == []
    assert capfd.readouterr().out == ""
    curves = [*expected_losses(both, tmp_path / "c"), "score/refusal/source/villain-source-refusal-excluded-s42"]
    (kept,) = (tmp_path / "c" / "tracking" / "wandb" / "wandb").glob("offline-run-*/*.wandb")
    assert all(curve.encode() in kept.read_bytes() for curve in curves)
    with sqlite3.connect(tmp_path / "trackio" / "fastconv.db") as db:
        logged = "".join(str(row[0]) for row in db.execute("SELECT metrics FROM metrics"))
    assert all(curve in logged for curve in curves)
