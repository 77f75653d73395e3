"""What is known of a run without computing anything: where every stage stands, which ones failed, and the provenance that its
card prints (machine, versions, command, checkout).
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from fastconv.analysis.gates import measurable_behaviors, undecided_base_gates
from fastconv.errors import DataError, FastconvError, TrainingError
from fastconv.experiment.graph import CellPlan, Graph, walk
from fastconv.experiment.schedule import wanted
from fastconv.recipe import Recipe, canonical_json, recipe_sha256, run_id
from fastconv.stats.units import counted, first_few
from fastconv.store.io import child_environment
from fastconv.store.ledger import Store, changed_inputs
from fastconv.store.records import Failure, Stage

#: Number of cells that the error at the end of a run names at most.
NAMED_CELLS = 6


@dataclass(frozen=True)
class StageStatus:
    """State of one stage, with the reason for it; `seconds` is how long a finished stage took.

    `state` is `done`, `running`, `to do`, `pending` (at the judge), `stale`, `failed` or `skipped`.
    """

    slot: str
    kind: str
    key: str
    state: str
    reason: str
    seconds: float | None = None


def status_of(graph: Graph, store: Store | None) -> list[StageStatus]:
    """Every stage of a recipe with its state and the reason. `store` is None if the workspace does not exist yet."""
    if store is None:
        return [StageStatus(s.slot, s.kind, s.key, "to do", "nothing was computed here yet") for s in graph.stages()]
    live = store.live_leases()
    needed = {part.key for end in needed_ends(graph, store, graph.cells) for part in walk(end)}
    problem = store.run_facts(run_id(graph.recipe)).get("judging", {}).get("problem", "")
    failures, statuses = store.failures(), dict[str, StageStatus]()
    held = _held_stages(graph, store)
    for stage in graph.stages():
        status = _status(stage, store, live, stage.key in needed, statuses)
        if status.state not in ("done", "running") and (failed := _failed_status(stage, failures)) is not None:
            status = failed
        if status.state == "to do" and stage.key in held:
            status = replace(status, reason=f"held back: gate G0, {held[stage.key]}")
        if stage.kind == "judge" and status.state in ("to do", "stale") and store.record(stage.needs["eval"].key):
            status = replace(status, state="pending", reason=problem or "its completions wait for the judge")
        statuses[stage.key] = status
    return list(statuses.values())


def needed_ends(graph: Graph, store: Store, plans: Sequence[CellPlan]) -> list[Stage]:
    """The end stages that these cells need. A behavior counts unless G0 has ruled it out or its base failed."""
    failures = store.failures()
    missing = [(m, s) for plan in graph.cells for (m, _), s in plan.base.items() if store.record(s.key) is None]
    failed = {measure for measure, stage in missing if any(part.key in failures for part in walk(stage))}
    if {measure for measure, _ in missing} - failed:
        alive = [behavior for behavior in graph.behaviors if behavior not in failed]
    else:
        alive = [*measurable_behaviors(graph, store), *(one.subject for one in undecided_base_gates(graph, store))]
    ends = [end for plan in plans for end in (*plan.base.values(), *wanted(plan, alive))]
    return [*ends, *(stage for plan in plans if wanted(plan, alive) for stage in plan.on_snapshot.values())]


def _held_stages(graph: Graph, store: Store) -> dict[str, str]:
    """The stages that only cells of a behavior need whose G0 cannot be decided, with the reason."""
    held = {verdict.subject: verdict.reason for verdict in undecided_base_gates(graph, store)}
    if not held:
        return {}
    free = [behavior for behavior in graph.behaviors if behavior not in held]
    going_on = {part.key for plan in graph.cells for end in wanted(plan, free) for part in walk(end)}
    return {
        part.key: why
        for behavior, why in held.items()
        for plan in graph.cells
        for end in wanted(plan, [behavior])
        for part in walk(end)
        if part.key not in going_on
    }


def reason_to_run(stage: Stage, store: Store) -> str:
    """Why a stage has to be computed: "new", or which of its inputs changed since the last stage in its slot."""
    before = store.latest_in_slot(stage.slot)
    if before is None:
        return "new"
    if before.version != stage.version:
        return f"fastconv computes this kind of stage differently now (version {before.version} -> {stage.version})"
    changes = changed_inputs(before.inputs, stage.full_inputs)
    own = [change for change in changes if not change.startswith("needs.")]
    upstream = [name for name, need in stage.needs.items() if before.inputs.get("needs", {}).get(name) != need.key]
    return "; ".join([*own, *(f"{name} changed" for name in upstream)]) or "new"


def _status(
    stage: Stage, store: Store, live: Mapping[str, Any], needed: bool, before: Mapping[str, StageStatus]
) -> StageStatus:
    record = store.record(stage.key)
    if record is not None:
        return StageStatus(stage.slot, stage.kind, stage.key, "done", "", record.seconds)
    if stage.key in live:
        note = live[stage.key]
        progress = f"{note['done']} of {note['total']} {note['unit']}" if "done" in note else "just begun"
        return StageStatus(stage.slot, stage.kind, stage.key, "running", f"{progress} (process {note['pid']})")
    if not needed:
        return StageStatus(stage.slot, stage.kind, stage.key, "skipped", "gate G0: not measurable at base")
    reason = reason_to_run(stage, store)
    if reason != "new":
        return StageStatus(stage.slot, stage.kind, stage.key, "stale", f"because {reason}")
    waiting = [need.slot for need in stage.needs.values() if need.key in before and before[need.key].state != "done"]
    return StageStatus(stage.slot, stage.kind, stage.key, "to do", f"after {waiting[0]}" if waiting else "")


def _failed_status(stage: Stage, failures: Mapping[str, Failure]) -> StageStatus | None:
    """The status of a stage that failed or needs one that did; None otherwise."""
    if stage.key in failures:
        return StageStatus(stage.slot, stage.kind, stage.key, "failed", failures[stage.key].reason)
    before = next((part.slot for part in walk(stage) if part.key in failures), None)
    return None if before is None else StageStatus(stage.slot, stage.kind, stage.key, "skipped", f"{before} failed")


@dataclass(frozen=True)
class FailedStage:
    """A failed stage, and the labels of the cells whose results are missing or incomplete because of it."""

    slot: str
    reason: str
    exit_code: int
    cells: tuple[str, ...]


class FailureLog:
    """Stages that failed in one run, and the stages that cannot be computed because of them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._keys: set[str] = set()
        self._blocked: set[str] = set()

    def note(self, stage: Stage, error: TrainingError | DataError) -> None:
        """Record a failure in the ledger. A later run tries the stage again."""
        self._keys.add(stage.key)
        self._store.note_failure(stage, error.exit_code, str(error))

    def blocks(self, stage: Stage) -> bool:
        """Whether a stage cannot be computed because it failed or needs a stage that did."""
        if any(need.key in self._keys or need.key in self._blocked for need in stage.needs.values()):
            self._blocked.add(stage.key)
        return stage.key in self._keys or stage.key in self._blocked

    def touches(self, plan: CellPlan) -> bool:
        """Whether a failed stage belongs to this cell."""
        return bool(self._keys) and any(part.key in self._keys for part in cell_stages(plan))

    def of(self, plans: Sequence[CellPlan]) -> tuple[FailedStage, ...]:
        """The failed stages of this run, with the affected cells among `plans`."""
        return failed_stages({k: v for k, v in self._store.failures().items() if k in self._keys}, plans)


def cell_stages(plan: CellPlan) -> list[Stage]:
    """Every stage that a cell's measures need; a stage may occur more than once."""
    ends = (*plan.base.values(), *plan.scores.values(), *plan.beside.values(), *plan.replicates.values())
    return [part for end in ends for part in walk(end)]


def failed_stages(failures: Mapping[str, Failure], plans: Sequence[CellPlan]) -> tuple[FailedStage, ...]:
    """The failures (by stage key) that affect these cells, each with the cells' labels."""
    cells: dict[str, list[str]] = {}
    for plan in plans:
        parts = [*cell_stages(plan), *plan.on_snapshot.values()]
        for key in {part.key for part in parts} & failures.keys():
            cells.setdefault(key, []).append(plan.cell.label)
    return tuple(
        FailedStage(failure.slot, failure.reason, failure.exit_code, tuple(cells[key]))
        for key, failure in failures.items()
        if key in cells
    )


def raise_failed(run: str, failed: Sequence[FailedStage]) -> None:
    """Raise one error for all failed stages, naming the cells; its exit code is the highest of theirs."""
    if not failed:
        return
    kind: type[FastconvError] = max(
        (DataError, TrainingError), key=lambda k: _has_code(failed, k.exit_code) * k.exit_code
    )
    cells = list(dict.fromkeys(label for one in failed for label in one.cells))
    raise kind(
        f"{counted(len(failed), 'stage')} failed, the rest is done; without numbers: {first_few(cells, NAMED_CELLS)}. "
        f"First reason: {failed[0].reason.rstrip('.')}",
        where=run,
        fix="mend the cause; the same command tries them again and nothing else",
    )


def _has_code(failed: Sequence[FailedStage], exit_code: int) -> bool:
    return any(stage.exit_code == exit_code for stage in failed)


#: Packages whose versions the card lists.
CARD_PACKAGES = (
    "fastconv",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "trl",
    "polars",
    "numpy",
    "scipy",
    "unsloth",
    "triton",
    "vllm",
)


def begin_run(store: Store, recipe: Recipe, facts: Mapping[str, Any]) -> str:
    """Record that a run of the recipe begins or continues with these facts; returns its id."""
    run = run_id(recipe)
    store.start_run(run, canonical_json(recipe.model_dump(mode="json")), recipe_sha256(recipe), recipe.name, facts)
    return run


def run_facts() -> dict[str, Any]:
    """Facts of the current process for the reproducibility card: command, Python and package versions, machine, git."""
    versions = {}
    for package in CARD_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(["fastconv", *sys.argv[1:]]) if sys.argv[:1] else "",
        "python": platform.python_version(),
        "versions": versions,
        "machine": {"system": platform.system(), "processor": platform.machine(), "n_cpu": os.cpu_count()},
        "git": _git_state(),
    }


def _git_state() -> dict[str, str]:
    """Commit of the checkout that fastconv runs from and sha256 of its uncommitted diff; empty if it is not a checkout."""
    import hashlib

    folder = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env=child_environment(),
        )
        diff = subprocess.run(
            ["git", "-C", str(folder), "diff", "HEAD"],
            capture_output=True,
            timeout=30,
            check=True,
            env=child_environment(),
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {
        "commit": commit.stdout.strip(),
        "dirty_diff_sha256": hashlib.sha256(diff.stdout).hexdigest() if diff.stdout else "clean",
    }
