"""What `fastconv gc` can free in a workspace. No torch.

Nothing that a live process or an unfinished run needs is freed. An unfinished run needs all stages of its recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastconv.errors import FastconvError, InputError, did_you_mean
from fastconv.experiment.graph import CellPlan, Graph, lineage_of, walk
from fastconv.experiment.recorded import graphs_of_run
from fastconv.recipe import canonical_json, parse_recipe, run_id
from fastconv.store.gc import Garbage, artefact_bytes, stray_files, unnamed_artefacts
from fastconv.store.io import stored_json
from fastconv.store.ledger import Store
from fastconv.store.merge import artefacts_of


@dataclass(frozen=True)
class GcPlan:
    """What can be freed, and one line with the reason for each kind of garbage that is skipped."""

    garbage: tuple[Garbage, ...]
    skipped: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all garbage together."""
        return sum(item.n_bytes for item in self.garbage)


def find_garbage(store: Store, adapters: Sequence[str] = ()) -> GcPlan:
    """Find everything that `gc` would free.

    `adapters` are ids of finished runs whose adapters are freed too; their scores stay. Raises InputError for a run that
    is unknown or not finished.
    """
    unfinished, skipped = _needed_by_unfinished(store)
    garbage = [*stray_files(store), *unnamed_artefacts(store), *_training_states(store)]
    if not skipped:  # otherwise the needs of an unfinished run are unknown, and no stage may go
        garbage += _superseded(store, unfinished)
    garbage += _adapters(store, adapters)
    if store.live_leases():
        skipped.append("artefacts without a stage, while a process is computing here")
    return GcPlan(tuple(garbage), tuple(skipped))


def unneeded_adapters(graph: Graph, store: Store, plans: Sequence[CellPlan]) -> list[Garbage]:
    """Adapters of these cells that no missing stage of the graph and no other run needs."""
    run = run_id(graph.recipe)
    trained = [stage for plan in plans for stage in plan.stack.values()]
    again = [part for plan in plans for end in plan.replicates.values() for part in walk(end)]
    trained += [part for part in again if part.kind == "behavior"]
    slots = {stage.key: stage.slot for stage in trained}
    needed = {
        stage.needs[name].key
        for stage in graph.stages()
        for name in ("snapshot", "behavior")
        if name in stage.needs and stage.needs[name].key in slots and store.record(stage.key) is None
    }
    garbage = []
    for key, slot in slots.items():
        record = store.record(key)
        other_runs = "SELECT 1 FROM run_stages WHERE key=? AND run<>?"
        if record is None or key in needed or list(store.rows(other_runs, (key, run))):
            continue
        artefacts = tuple(artefacts_of(store, canonical_json(record.outputs)))
        if artefacts:
            n_bytes = artefact_bytes(store, artefacts)
            garbage.append(Garbage("adapter", slot, "all its answers are drawn", n_bytes, (), artefacts))
    return garbage


def _needed_by_unfinished(store: Store) -> tuple[set[str], list[str]]:
    """Stage keys of unfinished runs, and a line for each run whose recipe cannot be read any more."""
    keys: set[str] = set()
    unreadable: list[str] = []
    for row in store.runs():
        if row["finished_at"] is not None:
            continue
        try:
            recipe = parse_recipe(stored_json(row["recipe"]), where=row["id"])
            graphs = graphs_of_run(recipe, store) or [Graph(recipe)]
            keys |= {stage.key for graph in graphs for stage in graph.stages()}
        except FastconvError as error:
            unreadable.append(f"superseded stages, as unfinished {row['id']} may need them ({error.what})")
    return keys, unreadable


def _training_states(store: Store) -> list[Garbage]:
    """States of finished trainings, or all states if every run is finished and nothing is being computed."""
    finished = {key for (key,) in store.rows("SELECT key FROM stages WHERE kind='behavior'")}
    snapshots = store.rows("SELECT version, inputs FROM stages WHERE kind='snapshot'")
    parsed = [(version, stored_json(inputs)) for version, inputs in snapshots]
    finished |= {lineage_of(version, inputs) for version, inputs in parsed if _is_last_epoch(inputs)}
    runs_done = all(row["finished_at"] is not None for row in store.runs()) and not store.live_leases()
    garbage = []
    for key, step, sha256 in store.rows("SELECT key, step, sha256 FROM progress ORDER BY key"):
        if key in finished or runs_done:
            artefacts = tuple(store.rows("SELECT sha256, suffix FROM artefacts WHERE sha256=?", (sha256,)))
            why = "its training is finished" if key in finished else "every run is finished"
            n_bytes = artefact_bytes(store, artefacts)
            name = f"{key[:12]} at step {step}"
            garbage.append(
                Garbage("training state", name, why, n_bytes, (key,), artefacts, only_idle=key not in finished)
            )
    return garbage


def _is_last_epoch(inputs: dict[str, Any]) -> bool:
    return inputs["epoch"] == inputs["training"]["epochs"]


def _superseded(store: Store, unfinished: set[str]) -> list[Garbage]:
    """Stages whose slot has a newer stage and that no run needs, directly or through other stages."""
    records = {key: (slot, at, stored_json(inputs), outputs) for key, slot, at, inputs, outputs in store.rows(
        "SELECT key, slot, finished_at, inputs, outputs FROM stages")}  # fmt: skip
    newest: dict[str, float] = {}
    for slot, at, _, _ in records.values():
        newest[slot] = max(at, newest.get(slot, at))
    current = {key for key, (slot, at, _, _) in records.items() if at >= newest[slot]}
    in_runs = {key for (key,) in store.rows("SELECT key FROM run_stages")}
    needed = _with_needs(in_runs | unfinished | current | set(store.live_leases()), records)
    shared = {artefact for key in needed & records.keys() for artefact in artefacts_of(store, records[key][3])}
    garbage = []
    for key, (slot, _, _, outputs) in records.items():
        if key not in needed:
            artefacts = tuple(artefact for artefact in artefacts_of(store, outputs) if artefact not in shared)
            why = "its slot has a newer stage and no run rests on it"
            garbage.append(Garbage("superseded stage", slot, why, artefact_bytes(store, artefacts), (key,), artefacts))
    return garbage


def _with_needs(keys: Iterable[str], records: dict[str, Any]) -> set[str]:
    """These stages and all that they need, by key."""
    closed: set[str] = set()
    todo = list(keys)
    while todo:
        key = todo.pop()
        if key not in closed:
            closed.add(key)
            todo += records[key][2].get("needs", {}).values() if key in records else []
    return closed


def _adapters(store: Store, runs: Sequence[str]) -> list[Garbage]:
    """Adapters of these finished runs, without those that another run needs."""
    finished_at = {row["id"]: row["finished_at"] for row in store.runs()}
    for run in runs:
        if run not in finished_at:
            fix = did_you_mean(run, finished_at, "see `fastconv status` for the runs of this workspace")
            raise InputError("no such run", where=run, fix=fix)
        if finished_at[run] is None:
            raise InputError("the run is not finished and needs its adapters", where=run, fix="finish it first")
    rows = store.rows("SELECT run, stages.key, stages.slot, outputs FROM run_stages JOIN stages USING(key) "
                      "WHERE kind IN ('snapshot', 'behavior') ORDER BY stages.slot")  # fmt: skip
    others = {key for run, key, _, _ in rows if run not in runs}
    garbage: dict[str, Garbage] = {}
    for run, key, slot, outputs in rows:
        artefacts = tuple(artefacts_of(store, outputs))
        if run in runs and key not in others and key not in garbage and artefacts:
            why = f"{run} is finished; its scores stay"
            garbage[key] = Garbage("adapter", slot, why, artefact_bytes(store, artefacts), (), artefacts)
    return list(garbage.values())
