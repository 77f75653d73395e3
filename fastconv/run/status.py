"""Where every stage of a recipe stands, without computing anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastconv.analysis.gates import measurable_behaviors, undecided_base_gates
from fastconv.errors import DataError, FastconvError, TrainingError
from fastconv.experiment.graph import CellPlan, Graph, walk
from fastconv.experiment.schedule import wanted
from fastconv.recipe import run_id
from fastconv.stats.units import counted, first_few
from fastconv.store.ledger import Store, changed_inputs
from fastconv.store.records import Failure, Stage


@dataclass(frozen=True)
class StageStatus:
    """Where one stage of a recipe stands.

    `done`, `running`, `to do`, `pending` (at the judge), `stale`, `failed` or `skipped`.
    """

    slot: str
    kind: str
    key: str
    state: str
    reason: str
    seconds: float | None = None


def status_of(graph: Graph, store: Store | None) -> list[StageStatus]:
    """Every stage of a recipe with its state and the reason, without computing anything."""
    if store is None:
        return [StageStatus(s.slot, s.kind, s.key, "to do", "nothing was computed here yet") for s in graph.stages()]
    live = store.live_leases()
    needed = {part.key for end in needed_ends(graph, store, graph.cells) for part in walk(end)}
    problem = store.run_facts(run_id(graph.recipe)).get("judging", {}).get("problem", "")
    failures, statuses = store.failures(), dict[str, StageStatus]()
    held = _held(graph, store)
    for stage in graph.stages():
        status = _status(stage, store, live, stage.key in needed, statuses)
        if status.state not in ("done", "running") and (failed := _failed(stage, failures)) is not None:
            status = failed
        if status.state == "to do" and stage.key in held:
            status = replace(status, reason=f"held back: gate G0, {held[stage.key]}")
        if stage.kind == "judge" and status.state in ("to do", "stale") and store.record(stage.needs["eval"].key):
            status = replace(status, state="pending", reason=problem or "its completions wait for the judge")
        statuses[stage.key] = status
    return list(statuses.values())


def needed_ends(graph: Graph, store: Store, plans: Sequence[CellPlan]) -> list[Stage]:
    """The end stages that these cells need, as far as G0 has decided; all of them where it has not, or cannot yet."""
    failures = store.failures()
    missing = [(m, s) for plan in graph.cells for (m, _), s in plan.base.items() if store.record(s.key) is None]
    failed = {measure for measure, stage in missing if any(part.key in failures for part in walk(stage))}
    if {measure for measure, _ in missing} - failed:
        alive = [behavior for behavior in graph.behaviors if behavior not in failed]
    else:
        alive = [*measurable_behaviors(graph, store), *(one.subject for one in undecided_base_gates(graph, store))]
    ends = [end for plan in plans for end in (*plan.base.values(), *wanted(plan, alive))]
    return [*ends, *(plan.geometry for plan in plans if plan.geometry is not None and wanted(plan, alive))]


def _held(graph: Graph, store: Store) -> dict[str, str]:
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
    """Why a stage has to be computed: new, or which of its inputs changed."""
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
        far = f"{note['done']} of {note['total']} {note['unit']}" if "done" in note else "just begun"
        return StageStatus(stage.slot, stage.kind, stage.key, "running", f"{far} (process {note['pid']})")
    if not needed:
        return StageStatus(stage.slot, stage.kind, stage.key, "skipped", "gate G0: not measurable at base")
    reason = reason_to_run(stage, store)
    if reason != "new":
        return StageStatus(stage.slot, stage.kind, stage.key, "stale", f"because {reason}")
    waiting = [need.slot for need in stage.needs.values() if need.key in before and before[need.key].state != "done"]
    return StageStatus(stage.slot, stage.kind, stage.key, "to do", f"after {waiting[0]}" if waiting else "")


def _failed(stage: Stage, failures: Mapping[str, Failure]) -> StageStatus | None:
    """A stage that failed, or that needs one that did; None for any other."""
    if stage.key in failures:
        return StageStatus(stage.slot, stage.kind, stage.key, "failed", failures[stage.key].reason)
    before = next((part.slot for part in walk(stage) if part.key in failures), None)
    return None if before is None else StageStatus(stage.slot, stage.kind, stage.key, "skipped", f"{before} failed")


#: So many cells are named in the line that ends a run.
NAMED_CELLS = 6


@dataclass(frozen=True)
class FailedStage:
    """A stage that failed and the cells that have no numbers, or fewer, because of it."""

    slot: str
    reason: str
    exit_code: int
    cells: tuple[str, ...]


class FailureLog:
    """The stages of one run that failed, and what cannot be computed because of them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._keys: set[str] = set()
        self._blocked: set[str] = set()

    def note(self, stage: Stage, error: TrainingError | DataError) -> None:
        """Write a failure down. A later run tries the stage again."""
        self._keys.add(stage.key)
        self._store.note_failure(stage, error.exit_code, str(error))

    def blocks(self, stage: Stage) -> bool:
        """Whether this stage failed, or something before it did, so that it cannot be computed."""
        if any(need.key in self._keys or need.key in self._blocked for need in stage.needs.values()):
            self._blocked.add(stage.key)
        return stage.key in self._keys or stage.key in self._blocked

    def touches(self, plan: CellPlan) -> bool:
        """Whether a failure takes anything from this cell."""
        return bool(self._keys) and any(part.key in self._keys for part in parts_of(plan))

    def of(self, plans: Sequence[CellPlan]) -> tuple[FailedStage, ...]:
        """What failed in this run, with the cells it is missing in."""
        return failed_stages({k: v for k, v in self._store.failures().items() if k in self._keys}, plans)


def parts_of(plan: CellPlan) -> list[Stage]:
    """Every stage that a cell's measures rest on; a stage may come more than once."""
    ends = (*plan.base.values(), *plan.scores.values(), *plan.beside.values())
    return [part for end in ends for part in walk(end)]


def failed_stages(failures: Mapping[str, Failure], plans: Sequence[CellPlan]) -> tuple[FailedStage, ...]:
    """Those of the failures (by key) that concern these cells, each with the cells' labels."""
    cells: dict[str, list[str]] = {}
    for plan in plans:
        parts = [*parts_of(plan), *([plan.geometry] if plan.geometry is not None else [])]
        for key in {part.key for part in parts} & failures.keys():
            cells.setdefault(key, []).append(plan.cell.label)
    return tuple(
        FailedStage(one.slot, one.reason, one.exit_code, tuple(cells[key]))
        for key, one in failures.items()
        if key in cells
    )


def raise_failed(run: str, failed: Sequence[FailedStage]) -> None:
    """Raise one error for all of these stages, naming the cells; its exit code is the worst of theirs."""
    if not failed:
        return
    kind: type[FastconvError] = max((DataError, TrainingError), key=lambda k: _has(failed, k.exit_code) * k.exit_code)
    cells = list(dict.fromkeys(label for one in failed for label in one.cells))
    raise kind(
        f"{counted(len(failed), 'stage')} failed, the rest is done; without numbers: {first_few(cells, NAMED_CELLS)}. "
        f"First reason: {failed[0].reason.rstrip('.')}",
        where=run,
        fix="mend the cause; the same command tries them again and nothing else",
    )


def _has(failed: Sequence[FailedStage], exit_code: int) -> bool:
    return any(one.exit_code == exit_code for one in failed)
