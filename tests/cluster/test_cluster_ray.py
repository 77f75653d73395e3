"""Ray itself: two local workers give the bits of one process, also when one is killed or the user stops them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fastconv.analysis.analysis import Analysis
from fastconv.cluster import run_on_ray
from fastconv.errors import FastconvError, TrainingError
from fastconv.experiment.graph import Graph
from fastconv.recipe import Recipe, run_id
from fastconv.report.export import frames_of, parquet_bytes
from fastconv.store.ledger import Store
from tests import ROOT
from tests.loop_kit import TINY, Heard, results, run_tiny, tiny_recipe, until, with_nan_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
pytest.importorskip("ray")

SOURCES = ["villain", "comedian"]


@pytest.fixture(scope="module")
def recipe(tiny_qwen: Path) -> Recipe:
    return tiny_recipe(tiny_qwen, grid__sources=SOURCES)


@pytest.fixture(scope="module")
def alone(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of one process that nothing disturbed."""
    workspace = tmp_path_factory.mktemp("alone")
    run_tiny(recipe, workspace)
    return workspace


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "cache"


#: Of a stage, how long it took is no result; nor are its tokens where another process went on with its training: the
#: count then begins at that training's first step.
NO_RESULT = ("seconds",)
NO_RESULT_TWICE = ("seconds", "trained_tok", "sampled_tok", "scored_tok")


def _tables(recipe: Recipe, workspace: Path, left_out: Sequence[str]) -> dict[str, bytes]:
    """Every table of the report as Parquet, without these columns of the stages."""
    store = Store.open(workspace, create=False)
    frames = frames_of(Analysis(Graph(recipe), store))
    frames["stages"] = frames["stages"].drop(left_out)
    store.close()
    return {name: parquet_bytes(frame) for name, frame in frames.items()}


def _require_same(recipe: Recipe, one: Path, other: Path, left_out: Sequence[str] = NO_RESULT) -> None:
    assert results(recipe, one) == results(recipe, other)
    own, theirs = _tables(recipe, one, left_out), _tables(recipe, other, left_out)
    assert {"scores", "measurements", "gates", "stages"} <= set(own)
    assert own == theirs


def _at_work(cache: Path, order: str) -> dict[str, int]:
    """What the worker of an order is computing right now: slot -> its process."""
    for ledger in (cache / "cluster").glob(f"*-{order}-*/checkpoints/ledger.sqlite"):
        try:
            store = Store.open(ledger.parent, create=False)
            rows = store.rows("SELECT slot, pid FROM leases")
            store.close()
        except FastconvError:
            continue  # it is just being made
        return dict(rows)
    return {}


def _processes_of(cache: Path) -> list[int]:
    """Processes that were started with this test's cache: Ray's and its workers'."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if f"FASTCONV_CACHE={cache}".encode() in environment and state != "Z" and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def test_two_workers_give_the_bits_of_one_process(recipe: Recipe, alone: Path, tmp_path: Path, cache: Path) -> None:
    seen: dict[str, set[int]] = {}

    def watch() -> None:
        for source in SOURCES:
            seen.setdefault(source, set()).update(_at_work(cache, source).values())

    with _beside(watch):
        finished = run_on_ray(recipe, tmp_path / "ray", Heard())
    _require_same(recipe, tmp_path / "ray", alone)
    assert finished.tally.n_stages == len(Graph(recipe).stages())
    assert len(seen["villain"]) == len(seen["comedian"]) == 1
    assert not seen["villain"] & seen["comedian"]
    until(lambda: not _processes_of(cache), 30)


def test_a_worker_killed_midway_costs_time_and_nothing_else(
    recipe: Recipe, alone: Path, tmp_path: Path, cache: Path
) -> None:
    killed: list[int] = []

    def kill_once() -> None:
        for slot, pid in _at_work(cache, "villain").items():
            if not killed and slot.startswith(("behavior/villain/source", "eval/villain/source")):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    heard = Heard()
    with _beside(kill_once):
        finished = run_on_ray(recipe, tmp_path / "ray", heard)
    assert killed
    _require_same(recipe, tmp_path / "ray", alone, NO_RESULT_TWICE)
    assert finished.tally.n_stages == len(heard.stages) == len(Graph(recipe).stages())


def test_an_error_of_a_worker_is_the_same_line_and_exit_code(recipe: Recipe, tmp_path: Path) -> None:
    broken = with_nan_weights(recipe, tmp_path / "broken")
    with pytest.raises(TrainingError) as alone:
        run_tiny(broken, tmp_path / "alone")
    with pytest.raises(TrainingError) as spread:
        run_on_ray(broken, tmp_path / "ray", Heard())
    assert (str(spread.value), spread.value.exit_code) == (str(alone.value), 7)


def test_ctrl_c_ends_the_workers_and_the_same_command_goes_on(
    recipe: Recipe, alone: Path, tmp_path: Path, cache: Path
) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(model=recipe.model.id).replace('["villain"]', '["villain", "comedian"]'))
    words = [sys.executable, "-m", "fastconv", "run", str(path), "--ray", "-w", str(tmp_path / "ray"), "--reports"]
    command = subprocess.Popen([*words, str(tmp_path / "reports")], start_new_session=True, stderr=subprocess.PIPE)
    until(lambda: any(slot.startswith("eval/villain/e0") for slot in _at_work(cache, "villain")), 120)
    os.killpg(command.pid, signal.SIGINT)
    _, output = command.communicate(timeout=120)
    assert command.returncode == 130, output.decode()
    assert output.decode().strip().splitlines()[-1].endswith("stopped. Fix: the same command goes on from here")
    until(lambda: not _processes_of(cache), 30)
    done = set(results(recipe, tmp_path / "ray"))
    assert "eval/base/refusal/assistant/s42" in done
    assert len(done) < len(Graph(recipe).stages())
    again = subprocess.run([*words, str(tmp_path / "reports")], capture_output=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr.decode()
    _require_same(recipe, tmp_path / "ray", alone, NO_RESULT_TWICE)
    assert (tmp_path / "reports" / f"{run_id(recipe)}.html").is_file()


class _beside:
    """Call `look` again and again in another thread while the block runs."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: self._run(look))

    def _run(self, look: Callable[[], None]) -> None:
        while not self._over.is_set():
            look()
            time.sleep(0.01)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
