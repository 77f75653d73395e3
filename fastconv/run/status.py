"""Where every stage of a recipe stands, without computing anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastconv.analysis.gates import held_back, measurable_behaviors
from fastconv.experiment.graph import CellPlan, Graph, walk
from fastconv.recipe import run_id
from fastconv.experiment.schedule import wanted
from fastconv.store.records import Failure
from fastconv.store.ledger import Stage, Store, changed_inputs


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
        alive = [*measurable_behaviors(graph, store), *(one.subject for one in held_back(graph, store))]
    ends = [end for plan in plans for end in (*plan.base.values(), *wanted(plan, alive))]
    return [*ends, *(plan.geometry for plan in plans if plan.geometry is not None and wanted(plan, alive))]


def _held(graph: Graph, store: Store) -> dict[str, str]:
    """The stages that only cells of a behavior need whose G0 cannot be decided, with the reason."""
    held = {verdict.subject: verdict.reason for verdict in held_back(graph, store)}
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
