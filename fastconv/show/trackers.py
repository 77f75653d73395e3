"""A run in the trackers that people watch runs in (`run.track`): TensorBoard, Weights & Biases, Trackio.

Each gets losses by optimizer step, rates by seconds, scores of every cell by snapshot epoch, gates, and where the report
is. Each is fed from a thread of its own by its own library: one that is missing, fails or hangs is told in one line, and
the run goes on.
"""

# tensorboard's messages are made at import, and two of the three libraries are extras.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import io
import json
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from fastconv.analysis.contrasts import role_of
from fastconv.analysis.gates import stage_series
from fastconv.errors import StoreError
from fastconv.experiment.graph import Graph
from fastconv.recipe import run_id
from fastconv.show.progress import StageClock
from fastconv.store.io import write_atomically
from fastconv.store.ledger import Store

if TYPE_CHECKING:
    from fastconv.recipe import Recipe
    from fastconv.run.executor import Progress
    from fastconv.run.runner import Watcher
    from fastconv.show.progress import LineWatcher
    from fastconv.stats.gates import GateVerdict
    from fastconv.store.ledger import Stage

#: Folder of a workspace in which trackers keep files, and the project that runs belong to in those that have projects.
FOLDER, PROJECT = "tracking", "fastconv"
#: What stands on the x axis, by the first part of a curve's name.
AXES = {"loss": "optimizer_step", "rate": "run_s", "score": "epoch"}
#: Values that wait for a tracker at most, and seconds that it gets to send the rest when a run has ended.
MOST_WAITING, CLOSE_S = 100_000, 60.0
#: Seconds between two rates.
RATE_EVERY_S = 5.0


class Tracker(Protocol):
    """One tracker's own library, used from a single thread. Every method may raise anything."""

    def scalars(self, values: Mapping[str, float], axis: str, step: int) -> None:
        """Add a point to each of these curves; `step` is counted in `axis` (a value of AXES)."""

    def text(self, name: str, text: str) -> None:
        """Set a text, e.g. a gate's verdict."""

    def close(self) -> None:
        """Write out what is left."""


class TensorBoard:
    """Event files for TensorBoard, written by its own package."""

    def __init__(self, run: str, folder: Path, settings: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2
        self._tensor, self._shape, self._string = tensor_pb2.TensorProto, tensor_shape_pb2, types_pb2.DT_STRING
        self._file = EventFileWriter(str(folder / run), flush_secs=10)
        self.text("recipe", f"```\n{json.dumps(settings, indent=1, ensure_ascii=False)}\n```")

    def scalars(self, values: Mapping[str, float], axis: str, step: int) -> None:
        """Add a point to each of these curves."""
        points = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(points, step)

    def text(self, name: str, text: str) -> None:
        """Set a text, which TensorBoard shows as Markdown."""
        kind = self._summary.SummaryMetadata(plugin_data=self._summary.SummaryMetadata.PluginData(plugin_name="text"))
        one = self._shape.TensorShapeProto(dim=[self._shape.TensorShapeProto.Dim(size=1)])
        tensor = self._tensor(dtype=self._string, string_val=[text.encode()], tensor_shape=one)
        self._add([self._summary.Summary.Value(tag=name, metadata=kind, tensor=tensor)], 0)

    def close(self) -> None:
        """Write out what is left."""
        self._file.close()

    def _add(self, values: list[Any], step: int) -> None:
        summary = self._summary.Summary(value=values)
        self._file.add_event(self._event(wall_time=time.time(), step=step, summary=summary))


class WeightsAndBiases:
    """A run of Weights & Biases. Without a key it is kept offline, in its own form, for `wandb sync`; nothing is asked."""

    def __init__(self, run: str, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        folder.mkdir(parents=True, exist_ok=True)
        mode = None if os.environ.get("WANDB_MODE") or wandb.login(prompt=False) else "offline"
        quiet = wandb.Settings(silent=True, console="off", finish_timeout=CLOSE_S)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=run, name=run, resume="allow", dir=str(folder),
            config=dict(settings), mode=mode, settings=quiet,
        )  # fmt: skip
        for part, axis in AXES.items():
            self._run.define_metric(f"{part}/*", step_metric=axis)

    def scalars(self, values: Mapping[str, float], axis: str, step: int) -> None:
        """Add a point to each of these curves."""
        self._run.log({**values, axis: step})

    def text(self, name: str, text: str) -> None:
        """Set an entry of the run's summary."""
        self._run.summary[name] = text

    def close(self) -> None:
        """Send what is left, for CLOSE_S seconds at most."""
        self._run.finish()


class Trackio:
    """A run of Trackio, in its own local database unless its environment variables name a Space."""

    def __init__(self, run: str, folder: Path, settings: Mapping[str, Any]) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        with redirect_stdout(io.StringIO()):  # it prints there, where `--json` answers
            self._run = trackio.init(
                project=PROJECT, name=run, resume="allow", config=dict(settings), embed=False, auto_log_gpu=False,
                auto_log_cpu=False,
            )  # fmt: skip

    def scalars(self, values: Mapping[str, float], axis: str, step: int) -> None:
        """Add a point to each of these curves."""
        self._run.log({**values, axis: step}, step=step)

    def text(self, name: str, text: str) -> None:
        """Log a text."""
        self._run.log({name: text})

    def close(self) -> None:
        """Write out what is left."""
        with redirect_stdout(io.StringIO()):
            self._run.finish()


TRACKERS: Mapping[str, Callable[[str, Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


class _Feed(threading.Thread):
    """Feeds one tracker in a thread of its own, which nobody waits for longer than `CLOSE_S` seconds."""

    def __init__(self, name: str, begin: Callable[[], Tracker], tell: Callable[[str], None]) -> None:
        super().__init__(name=f"track-{name}", daemon=True)
        self.tracker, self.problem, self.finished = name, "", False
        #: Keys of the stages whose losses or scores this tracker has.
        self.sent: set[str] = set()
        self._begin, self._tell = begin, tell
        self._waiting: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MOST_WAITING)

    def run(self) -> None:
        """Open the tracker and give it what waits, until `close`."""
        try:
            tracker = self._begin()
            while (give := self._waiting.get()) is not None:
                give(tracker)
            tracker.close()
            self.finished = True
        except ImportError as error:
            self._fail(f"{error}; pip install {self.tracker}")
        except Exception as error:  # another library's code: whatever it raises must not end the run
            self._fail(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")

    def put(self, give: Callable[[Tracker], None] | None) -> None:
        """Have the tracker given this; never waits, and does nothing once the tracker has failed."""
        if self.problem:
            return
        try:
            self._waiting.put_nowait(give)
        except queue.Full:
            self._fail(f"it takes nothing any more ({MOST_WAITING:,} values wait)")

    def close(self, within_s: float) -> None:
        """Let it send what waits."""
        self.put(None)
        self.join(within_s)
        if not self.finished and not self.problem:
            self._fail(f"it did not end within {within_s:g} s")

    def _fail(self, problem: str) -> None:
        self.problem = problem
        self._tell(f"{self.tracker} does not track this run: {problem}")


class RunTracking:
    """One call's run in its trackers. What an earlier call did not send (it ran untracked, or was killed) is sent too."""

    def __init__(self, recipe: Recipe, workspace: Path) -> None:
        self._recipe, self._workspace, self._run = recipe, workspace, run_id(recipe)
        self._folder = workspace / FOLDER
        self._feeds: list[_Feed] = []
        #: Where the report is, once it is written.
        self.report: Path | None = None
        self._tell: Callable[[str], None] = lambda line: None
        #: The part that needs the run's graph and ledger, from its begin on.
        self._results: _Results | None = None

    def watch(self, watcher: LineWatcher) -> Watcher:
        """The watcher, with the trackers listening too."""
        if not self._recipe.run.track:
            return watcher
        self._tell = watcher.note
        return cast("Watcher", _TrackedWatcher(watcher, self))

    def begin(self) -> None:
        """The run begins: open the trackers and send what they do not have yet."""
        if self._feeds:
            return
        settings = self._recipe.model_dump(mode="json")
        sent = self._sent_before()
        for name in dict.fromkeys(self._recipe.run.track):
            open_tracker, folder = TRACKERS[name], self._folder / name
            feed = _Feed(name, lambda opened=open_tracker, at=folder: opened(self._run, at, settings), self._tell)
            feed.sent |= sent.get(name, set())
            feed.start()
            self._feeds.append(feed)
        self._results = _Results(Graph(self._recipe), Store.open(self._workspace, create=False))
        for stage in self._results.stages:
            self.done(stage, {})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves that share one axis."""
        for name, value in values.items():
            self._give(partial(_add_point, (name, value, step)))

    def text(self, name: str, text: str) -> None:
        """A text."""
        self._give(lambda tracker: tracker.text(name, text))

    def done(self, stage: Stage, live_steps: Mapping[str, set[int]]) -> None:
        """Send what a finished stage found to the trackers that do not have it; `live_steps` have gone out, by curve."""
        waiting = [feed for feed in self._feeds if stage.key not in feed.sent and not feed.problem]
        if self._results is None or not waiting:
            return
        points = [one for one in self._results.points(stage) if one[2] not in live_steps.get(one[0], ())]
        done = bool(points) or self._results.store.record(stage.key) is not None
        for feed in waiting:
            feed.sent |= {stage.key} if done else set()
            for point in points:
                feed.put(partial(_add_point, point))

    def close(self) -> None:
        """The run ended: send what is left and where the report is, and note what each tracker has."""
        if self._results is None:
            return
        for stage in self._results.stages:  # judged in the meantime, or computed by another process
            self.done(stage, {})
        if self.report is not None:
            self.text("report", self.report.resolve().as_uri())
        until_s = time.monotonic() + CLOSE_S
        for feed in self._feeds:
            feed.close(max(until_s - time.monotonic(), 0.1))
        kept = {feed.tracker: sorted(feed.sent) for feed in self._feeds if feed.finished}
        others = {name: sorted(keys) for name, keys in self._sent_before().items() if name not in kept}
        self._results.store.close()
        self._results = None
        with suppress(OSError, StoreError):  # without it everything is sent again
            write_atomically(self._sent_file, json.dumps({**others, **kept}).encode())

    @property
    def _sent_file(self) -> Path:
        return self._folder / f"{self._run}.json"

    def _sent_before(self) -> dict[str, set[str]]:
        """Stages that earlier calls sent, by tracker whose files are still there."""
        try:
            table = json.loads(self._sent_file.read_text(encoding="utf-8"))
            return {
                name: set(keys) for name, keys in table.items() if name == "trackio" or (self._folder / name).is_dir()
            }
        except (OSError, ValueError, AttributeError, TypeError):
            return {}  # sent again at worst

    def _give(self, give: Callable[[Tracker], None]) -> None:
        for feed in self._feeds:
            feed.put(give)


def _add_point(point: tuple[str, float, int], tracker: Tracker) -> None:
    name, value, step = point
    tracker.scalars({name: value}, AXES[name.partition("/")[0]], step)


class _Results:
    """Curves of a run's finished stages, read from the ledger."""

    def __init__(self, graph: Graph, store: Store) -> None:
        self.store = store
        self._graph = graph
        self._scores: dict[str, list[tuple[str, int, str, str]]] = defaultdict(list)
        for plan in graph.cells:
            cell = plan.cell
            name = f"{cell.source}-{cell.convergence}-{cell.behavior}-{cell.negatives}-s{cell.seed}"
            name += f"-{cell.arm}" if cell.arm else ""
            for (measure, probe), stage in plan.scores.items():
                curve = f"score/{measure}/{role_of(graph.recipe, cell, probe)}/{name}"
                self._scores[stage.key].append((curve, cell.epoch, measure, probe))
        trained = (stage for stage in graph.stages() if stage.kind in ("snapshot", "behavior"))
        scored = (stage for plan in graph.cells for stage in plan.scores.values())
        self.stages = list({stage.key: stage for stage in (*trained, *scored)}.values())

    def points(self, stage: Stage) -> Iterator[tuple[str, float, int]]:
        """(curve, value, step) of a stage, if it is done: the loss at each step of a training, or a score at its epoch."""
        record = self.store.record(stage.key)
        if record is None:
            return
        if stage.kind in ("snapshot", "behavior"):
            yield from ((loss_curve(stage), loss, step) for step, loss in enumerate(record.outputs["losses"], 1))
        for curve, epoch, measure, probe in self._scores.get(stage.key, ()):
            scores = stage_series(self.store, stage, measure, probe, self._graph.behaviors[measure].spec.unit)
            if scores is not None and scores.rows:
                yield curve, scores.mean.value, epoch


def loss_curve(stage: Stage) -> str:
    """Name of the curve of a training's losses; the snapshots of one convergence run share it."""
    parts = stage.slot.split("/")
    return "loss/" + "-".join(part for at, part in enumerate(parts) if stage.kind != "snapshot" or at != 3)


class _TrackedWatcher:
    """Forwards all that a watcher hears, and has the trackers hear it as well."""

    def __init__(self, watcher: LineWatcher, tracking: RunTracking) -> None:
        self._watcher, self._tracking = watcher, tracking
        self._began_s = self._rated_s = time.monotonic()
        self._clock = StageClock(self._began_s)
        #: Curves by the name under which their training tells its progress; None where two trainings share a name.
        self._curves: dict[str, str | None] = {}
        self._live_steps: dict[str, set[int]] = defaultdict(set)
        self._under_way = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watcher, name)

    def begin(self, run: str, n_stages: int, n_todo: int) -> None:
        """The run starts."""
        self._watcher.begin(run, n_stages, n_todo)
        self._tracking.begin()

    def stage(self, stage: Stage, reason: str) -> None:
        """A stage starts; several do at once where they are trained in the same steps."""
        self._watcher.stage(stage, reason)
        self._clock = StageClock(time.monotonic())
        if self._under_way:
            self._curves, self._under_way = {}, False
        if stage.kind in ("snapshot", "behavior"):
            name = stage.slot.rsplit("/", 2)[0] if stage.kind == "snapshot" else stage.slot
            self._curves[name] = None if name in self._curves else loss_curve(stage)

    def progress(self, progress: Progress) -> None:
        """A stage made progress."""
        self._watcher.progress(progress)
        self._under_way = True
        for name, step, loss in progress.each:
            curve = self._curves.get(name)
            if loss is not None and curve is not None:
                self._live_steps[curve].add(step)
                self._tracking.scalars({curve: loss}, step)
        now = time.monotonic()
        self._clock.note(progress, now)
        rate = self._clock.rate(now)
        if rate is not None and now - self._rated_s >= RATE_EVERY_S:
            self._rated_s = now
            self._tracking.scalars({f"rate/{progress.unit}_per_s": rate}, round(now - self._began_s))

    def stage_done(self, stage: Stage, seconds: float) -> None:
        """A stage was committed."""
        self._watcher.stage_done(stage, seconds)
        self._tracking.done(stage, self._live_steps)

    def gate(self, verdict: GateVerdict) -> None:
        """A gate was decided."""
        self._watcher.gate(verdict)
        self._tracking.text(f"gate/{verdict.gate}/{verdict.subject}", f"{verdict.verdict}: {verdict.reason}")


@contextmanager
def tracking(recipe: Recipe, workspace: Path) -> Iterator[RunTracking]:
    """A run's trackers, closed at the end of the block."""
    tracked = RunTracking(recipe, workspace)
    try:
        yield tracked
    finally:
        tracked.close()
