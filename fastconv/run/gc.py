"""`fastconv gc`: what of a workspace nothing needs any more. No torch.

Never what a live process or an unfinished run needs: the stages of such a run are those of its recipe, computed or not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastconv.errors import FastconvError, InputError
from fastconv.experiment.graph import CellPlan, Graph, lineage_of
from fastconv.recipe import canonical_json, parse_recipe, run_id
from fastconv.store.gc import Garbage, artefact_bytes, stray_files, unnamed_artefacts
from fastconv.store.ledger import Store
from fastconv.store.merge import artefacts_of


@dataclass(frozen=True)
class GcPlan:
    """What can be freed, and what was left alone though it looked free, each with the reason."""

    waste: tuple[Garbage, ...]
    left: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(one.n_bytes for one in self.waste)


def find_waste(store: Store, adapters: Sequence[str] = ()) -> GcPlan:
    """Everything that `gc` would free; with `adapters`, also the adapters of these finished runs, whose scores stay.

    Raises InputError for a run that is not known or not finished.
    """
    unfinished, left = _needed_by_unfinished(store)
    waste = [*stray_files(store), *unnamed_artefacts(store), *_training_states(store)]
    if not left:  # else nobody can tell what such a run needs, and no stage is taken away
        waste += _superseded(store, unfinished)
    waste += _adapters(store, adapters)
    if store.live_leases():
        left.append("artefacts without a stage, while a process is computing here")
    return GcPlan(tuple(waste), tuple(left))


def spent_adapters(graph: Graph, store: Store, plans: Sequence[CellPlan]) -> list[Garbage]:
    """Adapters of these cells on which everything in the graph was trained and drawn, but for those of another run."""
    mine = run_id(graph.recipe)
    each = [one for plan in plans for one in (plan.snapshot, plan.adapter) if one is not None]
    wanted = {one.key: one.slot for one in each}
    missing = {
        stage.needs[name].key
        for stage in graph.stages()
        for name in ("snapshot", "behavior")
        if name in stage.needs and stage.needs[name].key in wanted and store.record(stage.key) is None
    }
    found = []
    for key, slot in wanted.items():
        record = store.record(key)
        others = "SELECT 1 FROM run_stages WHERE key=? AND run<>?"
        if record is None or key in missing or list(store.rows(others, (key, mine))):
            continue
        artefacts = tuple(artefacts_of(store, canonical_json(record.outputs)))
        if artefacts:
            n_bytes = artefact_bytes(store, artefacts)
            found.append(Garbage("adapter", slot, "all its answers are drawn", n_bytes, (), artefacts))
    return found


def _needed_by_unfinished(store: Store) -> tuple[set[str], list[str]]:
    """Keys of all stages of unfinished runs, and why no stage may go where a recipe cannot be read any more."""
    keys: set[str] = set()
    left: list[str] = []
    for row in store.runs():
        if row["finished_at"] is not None:
            continue
        try:
            graph = Graph(parse_recipe(json.loads(row["recipe"]), where=row["id"]))
            keys |= {stage.key for stage in graph.stages()}
        except FastconvError as error:
            left.append(f"superseded stages, as unfinished {row['id']} may need them ({error.what})")
    return keys, left


def _training_states(store: Store) -> list[Garbage]:
    """States of finished trainings; and all of them where every run is finished and nothing is being computed."""
    finished = {key for (key,) in store.rows("SELECT key FROM stages WHERE kind='behavior'")}
    snapshots = store.rows("SELECT version, inputs FROM stages WHERE kind='snapshot'")
    trained = [(version, json.loads(inputs)) for version, inputs in snapshots]
    finished |= {lineage_of(version, inputs) for version, inputs in trained if _is_last_epoch(inputs)}
    runs_done = all(row["finished_at"] is not None for row in store.runs()) and not store.live_leases()
    found = []
    for key, step, sha256 in store.rows("SELECT key, step, sha256 FROM progress ORDER BY key"):
        if key in finished or runs_done:
            artefacts = tuple(store.rows("SELECT sha256, suffix FROM artefacts WHERE sha256=?", (sha256,)))
            why = "its training is finished" if key in finished else "every run is finished"
            n_bytes = artefact_bytes(store, artefacts)
            name = f"{key[:12]} at step {step}"
            found.append(
                Garbage("training state", name, why, n_bytes, (key,), artefacts, only_idle=key not in finished)
            )
    return found


def _is_last_epoch(inputs: dict[str, Any]) -> bool:
    return inputs["epoch"] == inputs["training"]["epochs"]


def _superseded(store: Store, unfinished: set[str]) -> list[Garbage]:
    """Stages whose slot has a newer one and which no run rests on, directly or through what it needs."""
    records = {key: (slot, at, json.loads(inputs), outputs) for key, slot, at, inputs, outputs in store.rows(
        "SELECT key, slot, finished_at, inputs, outputs FROM stages")}  # fmt: skip
    newest: dict[str, float] = {}
    for slot, at, _, _ in records.values():
        newest[slot] = max(at, newest.get(slot, at))
    current = {key for key, (slot, at, _, _) in records.items() if at >= newest[slot]}
    noted = {key for (key,) in store.rows("SELECT key FROM run_stages")}
    kept = _with_needs(noted | unfinished | current | set(store.live_leases()), records)
    shared = {one for key in kept & records.keys() for one in artefacts_of(store, records[key][3])}
    found = []
    for key, (slot, _, _, outputs) in records.items():
        if key not in kept:
            artefacts = tuple(one for one in artefacts_of(store, outputs) if one not in shared)
            why = "its slot has a newer stage and no run rests on it"
            found.append(Garbage("superseded stage", slot, why, artefact_bytes(store, artefacts), (key,), artefacts))
    return found


def _with_needs(keys: Iterable[str], records: dict[str, Any]) -> set[str]:
    """These stages and all before them."""
    kept: set[str] = set()
    todo = list(keys)
    while todo:
        key = todo.pop()
        if key not in kept:
            kept.add(key)
            todo += records[key][2].get("needs", {}).values() if key in records else []
    return kept


def _adapters(store: Store, runs: Sequence[str]) -> list[Garbage]:
    """Adapters of these finished runs, but for those that another run rests on."""
    known = {row["id"]: row["finished_at"] for row in store.runs()}
    for run in runs:
        if run not in known:
            raise InputError("no such run", where=run, fix="see `fastconv status` for the runs of this workspace")
        if known[run] is None:
            raise InputError("the run is not finished and needs its adapters", where=run, fix="finish it first")
    rows = store.rows("SELECT run, stages.key, stages.slot, outputs FROM run_stages JOIN stages USING(key) "
                      "WHERE kind IN ('snapshot', 'behavior') ORDER BY stages.slot")  # fmt: skip
    others = {key for run, key, _, _ in rows if run not in runs}
    found: dict[str, Garbage] = {}
    for run, key, slot, outputs in rows:
        artefacts = tuple(artefacts_of(store, outputs))
        if run in runs and key not in others and key not in found and artefacts:
            why = f"{run} is finished; its scores stay"
            found[key] = Garbage("adapter", slot, why, artefact_bytes(store, artefacts), (), artefacts)
    return list(found.values())
