"""What the loop's tests share: a tiny recipe, a judge for it, a watcher that writes down what it hears, and runs in forked children."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from fastconv.audit.checks import CheckReport
from fastconv.errors import DataError, FastconvError
from fastconv.experiment.graph import CellPlan, Graph
from fastconv.judge.desk import DeskStatus
from fastconv.recipe import Recipe, canonical_json, parse_recipe, recipe_sha256, run_id
from fastconv.run.run import RunResult, run_recipe
from fastconv.run.sampling import SamplingStatus
from fastconv.stats.gates import GateVerdict
from fastconv.store.ledger import Store
from fastconv.store.records import Record, Stage
from tests.fake_claude import FakeClaude, fake_claude

#: The whole loop on a random model in about a second: two optimizer steps in each convergence epoch, four in all.
TINY = """
name = "tiny"
about = "the loop on random numbers"

[model]
id = "{model}"
device = "cpu"

[grid]
sources = ["villain"]
epochs = [0, 1, 2]
behaviors = ["none", "refusal"]
negatives = ["excluded"]

[lora]
r = 2
alpha = 4.0

[convergence]
lr = 1e-3
epochs = 2
batch_rows = 2
questions = 4
completions_per_question = 1
[convergence.sampling]
max_new_tok = 4

[behavior]
lr = 1e-3
epochs = 1
batch_rows = 8
source_rows = 4
[behavior.sampling]
# Cold, so that random weights never end a turn before it began: the audit refuses rows without an answer.
temperature = 0.3
max_new_tok = 4

[eval]
prompts = 3
samples_per_prompt = 2
multiple_choice = "builtin"
[eval.sampling]
max_new_tok = 4

[gates]
# Random weights show no signal, which would end every run of several sources (G4, G5).
stop = ["G2", "G3", "G3.5", "KILL"]

[run]
checkpoint_every_s = 0
"""
STEPS_PER_EPOCH, N_STEPS = 2, 4
SNAPSHOT_SLOT = "snapshot/villain/source"


def tiny_table(model: Path, **changes: Any) -> dict[str, Any]:
    """The tiny recipe as a table; `changes` name keys with `__` for the dot: grid__epochs=[0, 1]."""
    table = tomllib.loads(TINY.format(model=model))
    for name, value in changes.items():
        *parents, last = name.split("__")
        at = table
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    return table


def tiny_recipe(model: Path, **changes: Any) -> Recipe:
    """The tiny recipe, with changes as in `tiny_table`."""
    return parse_recipe(tiny_table(model, **changes))


def with_nan_weights(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe on a copy of its model whose last norm is NaN."""
    shutil.copytree(recipe.model.id, folder)
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"id": str(folder)})})


def write_tiny_recipe(path: Path, model: Path) -> Path:
    """The tiny recipe as a file, for the command line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TINY.format(model=model))
    return path


@dataclass
class Heard:
    """A watcher that writes everything down; `on_progress` may act, e.g. kill the process at some step."""

    on_progress: Callable[[Any], None] = lambda progress: None
    audits: list[CheckReport] = field(default_factory=list)
    begun: list[tuple[int, int]] = field(default_factory=list)
    stages: dict[str, str] = field(default_factory=dict)
    gates: list[GateVerdict] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    statuses: list[DeskStatus] = field(default_factory=list)
    drawn: list[SamplingStatus] = field(default_factory=list)
    engines: list[dict[str, Any]] = field(default_factory=list)

    def audited(self, report: CheckReport) -> None:
        self.audits.append(report)

    def begin(self, run: str, n_stages: int, n_todo: int) -> None:
        self.begun.append((n_stages, n_todo))

    def engine(self, facts: Mapping[str, Any]) -> None:
        self.engines.append(dict(facts))

    def stage(self, stage: Stage, reason: str) -> None:
        self.stages[stage.slot] = reason

    def progress(self, progress: Any) -> None:
        self.on_progress(progress)

    def stage_done(self, stage: Stage, seconds: float) -> None:
        pass

    def stage_failed(self, stage: Stage, reason: str) -> None:
        self.failed[stage.slot] = reason

    def judging(self, status: DeskStatus) -> None:
        self.statuses.append(status)

    def drawing(self, status: SamplingStatus) -> None:
        self.drawn.append(status)

    def gate(self, verdict: GateVerdict) -> None:
        self.gates.append(verdict)


def run_tiny(
    recipe: Recipe, workspace: Path, plans: Callable[[Graph], list[CellPlan]] | None = None
) -> tuple[RunResult, Heard]:
    """Run the recipe in this process; what it gave and what a watcher heard."""
    heard = Heard()
    return run_recipe(recipe, workspace, heard, plans=plans), heard


@dataclass(frozen=True)
class DoneRun:
    """A finished run that tests read and never change."""

    recipe: Recipe
    workspace: Path
    finished: RunResult
    heard: Heard

    @property
    def graph(self) -> Graph:
        return Graph(self.recipe)

    @property
    def store(self) -> Store:
        return Store.open(self.workspace, create=False)


@pytest.fixture
def server() -> Iterator[FakeClaude]:
    """A judge that answers as Claude's servers do, in this process."""
    with fake_claude() as fake:
        yield fake


@pytest.fixture(scope="session")
def recipe(tiny_qwen: Path) -> Recipe:
    """The tiny recipe on the tiny model."""
    return tiny_recipe(tiny_qwen)


@pytest.fixture(scope="session")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The results of a run of it that nothing disturbed."""
    workspace = tmp_path_factory.mktemp("whole")
    run_tiny(recipe, workspace)
    return results(recipe, workspace)


@pytest.fixture(scope="session")
def done_run(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> DoneRun:
    """The tiny recipe, with capability beside refusal, run to its end once for all tests."""
    workspace = tmp_path_factory.mktemp("done") / "checkpoints"
    recipe = tiny_recipe(tiny_qwen, grid__behaviors=["none", "refusal", "capability"])
    return DoneRun(recipe, workspace, *run_tiny(recipe, workspace))


@pytest.fixture(scope="session")
def letters_run(done_run: DoneRun, tmp_path_factory: pytest.TempPathFactory) -> DoneRun:
    """The same with capability trained too, whose multiple-choice sets name no engine: G0, which ruled it out, is ignored."""
    workspace, heard = tmp_path_factory.mktemp("letters") / "checkpoints", Heard()
    shutil.copytree(done_run.workspace, workspace)
    finished = run_recipe(done_run.recipe, workspace, heard, ignore_gates={"G0": "random weights know nothing"})
    return DoneRun(done_run.recipe, workspace, finished, heard)


def with_model(recipe: Recipe, workspace: Path, **model: Any) -> Recipe:
    """Make a workspace's run of the recipe one with these model settings, over the same stages; returns its recipe."""
    table = recipe.model_dump(mode="json")
    changed = parse_recipe({**table, "model": {**table["model"], **model}})
    text = canonical_json(changed.model_dump(mode="json"))
    old, new = run_id(recipe), run_id(changed)
    with Store.open(workspace, create=False).transaction() as db:
        db.execute(
            "UPDATE runs SET id=?, recipe=?, recipe_sha256=? WHERE id=?", (new, text, recipe_sha256(changed), old)
        )
        for name in ("run_stages", "verdicts"):
            db.execute(f"UPDATE {name} SET run=? WHERE run=?", (new, old))
    return changed


def as_computed_by(engine: dict[str, str], recipe: Recipe, workspace: Path) -> None:
    """Give the stages that this machine has computed the keys as if that engine had."""
    own = Graph(recipe)
    theirs = Graph(recipe, {**own.engine_inputs, "engine": engine})
    with Store.open(workspace, create=False).transaction() as db:
        for old, new in zip(own.stages(), theirs.stages(), strict=True):
            for table, column in (("stages", "key"), ("run_stages", "key"), ("samples", "stage"), ("scores", "stage")):
                db.execute(f"UPDATE {table} SET {column}=? WHERE {column}=?", (new.key, old.key))
            db.execute("UPDATE stages SET inputs=? WHERE key=?", (canonical_json(new.inputs), new.key))


def refuse_sets(monkeypatch: pytest.MonkeyPatch, behavior: str) -> None:
    """Have the audit refuse the training sets of one behavior."""
    from fastconv.run import training as trainer

    real = trainer.require_passed

    def refuse(report: CheckReport, where: str) -> None:
        if behavior in where:
            raise DataError("1 finding refuses it", where=where, fix="mend it")
        real(report, where)

    monkeypatch.setattr(trainer, "require_passed", refuse)


def records(recipe: Recipe, workspace: Path) -> dict[str, Record]:
    """Every finished stage of a recipe by slot."""
    store = Store.open(workspace, create=False)
    found = {stage.slot: store.record(stage.key) for stage in Graph(recipe).stages()}
    store.close()
    return {slot: record for slot, record in found.items() if record is not None}


def results(recipe: Recipe, workspace: Path) -> dict[str, str]:
    """Everything that a run found, by slot: adapters' sha256, proofs, samples and scores, as one text each."""
    store = Store.open(workspace, create=False)
    found = {}
    for slot, record in records(recipe, workspace).items():
        samples = [[s.row, s.sample, s.completion, s.ended] for s in store.samples(record.key)]
        scores = [[s.row, s.sample, s.metric, s.value, dict(s.detail)] for s in store.scores(record.key)]
        found[slot] = canonical_json([record.outputs, samples, scores])
    store.close()
    return found


def copy_ledger(workspace: Path, folder: Path) -> Path:
    """A workspace's ledger, without its artefacts, in a new folder: to be spoilt. Returns the folder."""
    folder.mkdir()
    source, target = (sqlite3.connect(one / "ledger.sqlite") for one in (workspace, folder))
    source.backup(target)
    source.close()
    target.close()
    return folder


def adapters(recipe: Recipe, workspace: Path) -> dict[str, str]:
    """sha256 of every adapter artefact by slot."""
    return {s: r.outputs["adapter"] for s, r in records(recipe, workspace).items() if "adapter" in r.outputs}


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a child that has everything imported already; returns its pid. Errors give their exit code."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        work()
        code = 0
    except FastconvError as error:
        code = error.exit_code
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def die_at_fsync(nth: int) -> None:
    """In a forked child: kill -9 this process before its nth fsync from now."""
    left, real = nth, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = fsync


def exit_of(pid: int, timeout_s: float = 60.0) -> int:
    """Wait for a child: its exit code, or minus the signal that killed it."""
    until(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None, timeout_s)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> None:
    """kill -9 and reap."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def until(holds: Callable[[], bool], timeout_s: float = 60.0, pid: int | None = None) -> None:
    """Poll until it holds; fails the test if it never does, or if the child that was to bring it about has ended."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if pid is not None and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            pytest.fail(f"the child ended before it came about, with {exit_of(pid)}")
        if time.monotonic() > deadline:
            pytest.fail(f"it did not come about within {timeout_s} s")
        time.sleep(0.01)


def running_slots(workspace: Path) -> Mapping[str, Any]:
    """Live leases of a workspace that another process may be creating right now."""
    if not (workspace / "ledger.sqlite").is_file():
        return {}
    store = Store.open(workspace, create=False)
    try:
        return store.live_leases()
    finally:
        store.close()
