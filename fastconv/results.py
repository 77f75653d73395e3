"""From the ledger to findings: collects the series of a run's cells and hands them to gates and verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from fastconv.datasets.behaviors import NO_BEHAVIOR
from fastconv.datasets.personas import ASSISTANT, canary_of
from fastconv.findings import gates
from fastconv.findings.evidence import Series, series_of
from fastconv.findings.gates import GateVerdict
from fastconv.findings.power import multiple_choice_chance
from fastconv.findings.verdicts import CellEvidence, CellVerdict, arm, decide, not_run
from fastconv.graph import Cell, CellPlan, Graph
from fastconv.store import Stage, Store


def series(store: Store, stage: Stage, measure: str, probe: str) -> Series | None:
    """The scores of a stage, or None if it is not done."""
    return series_of(stage.key, measure, probe, store.scores(stage.key)) if store.record(stage.key) else None


def gate_base(graph: Graph, store: Store) -> list[GateVerdict]:
    """G0 for every behavior whose base measurements are done: the assistant's, which is where leakage would show."""
    verdicts: dict[str, GateVerdict] = {}
    for plan in graph.cells:
        for measure in plan.measures:
            base = series(store, plan.base[measure, ASSISTANT], measure, ASSISTANT)
            if base is None or measure in verdicts:
                continue
            verdicts[measure] = gates.measurable(
                graph.recipe.gates, measure, _spec(graph, measure).direction, base, _chance(graph, measure)
            )
    return list(verdicts.values())


def measurable_behaviors(graph: Graph, store: Store) -> list[str]:
    """Behaviors that passed G0."""
    return [verdict.subject for verdict in gate_base(graph, store) if verdict.verdict == "pass"]


def decide_gates(graph: Graph, store: Store, plans: Sequence[CellPlan]) -> list[GateVerdict]:
    """Every gate's word on the given cells, the pilot gate last; one pilot verdict for each behavior and source."""
    verdicts = gate_base(graph, store)
    g0 = {verdict.subject: verdict for verdict in verdicts}
    for source, behavior in dict.fromkeys(
        (p.cell.source, p.cell.behavior) for p in plans if p.cell.behavior != NO_BEHAVIOR
    ):
        mine = [p for p in plans if (p.cell.source, p.cell.behavior) == (source, behavior)]
        found = [g0[behavior]] if behavior in g0 else []
        if behavior in g0 and g0[behavior].verdict == "pass":
            found += _training_gates(graph, store, source, behavior, mine)
        verdicts += [verdict for verdict in found if verdict.gate != "G0"]
        verdicts.append(gates.pilot(f"{source} x {behavior}", behavior, found))
    return verdicts


def cell_verdicts(graph: Graph, store: Store) -> list[CellVerdict]:
    """The verdict of every cell beyond epoch 0 that has a behavior; Holm runs over all of them together."""
    g0 = {verdict.subject: verdict for verdict in gate_base(graph, store)}
    done: list[CellEvidence] = []
    silent: list[CellVerdict] = []
    for plan in graph.cells:
        cell = plan.cell
        if cell.behavior == NO_BEHAVIOR:
            continue
        word = g0.get(cell.behavior)
        if word is not None and word.verdict != "pass":
            silent.append(not_run(cell.label, f"not measurable at base: {word.reason}", word.rows))
        elif cell.epoch and (evidence := _evidence(graph, store, plan)) is not None:
            done.append(evidence)
    return [*decide(done), *silent]


def _training_gates(
    graph: Graph, store: Store, source: str, behavior: str, plans: Sequence[CellPlan]
) -> list[GateVerdict]:
    recipe, direction = graph.recipe, _spec(graph, behavior).direction
    ends = [stage for plan in plans for stage in plan.scores.values()]
    proofs: dict[str, Any] = {}
    for end in ends:
        drawn = end.needs.get("eval", end)
        if (record := store.record(drawn.key)) is not None:
            proofs[drawn.slot] = record.outputs
    found = [gates.stacking(f"{source} x {behavior}", proofs)]
    groups = dict.fromkeys((p.cell.convergence, p.cell.negatives, p.cell.seed) for p in plans)
    for convergence, negatives, seed in groups:
        mine = {
            p.cell.epoch: p
            for p in plans
            if (p.cell.convergence, p.cell.negatives, p.cell.seed) == (convergence, negatives, seed)
        }
        subject = f"{source} x {behavior}, {negatives}, converged on {convergence}, seed {seed}"
        now = {
            epoch: series(store, plan.scores[behavior, ASSISTANT], behavior, ASSISTANT) for epoch, plan in mine.items()
        }
        measured = {epoch: one for epoch, one in now.items() if one is not None}
        if behavior == "capability" and negatives == "included" and recipe.eval.multiple_choice == "arc":
            found.append(gates.reference(recipe.gates, source, measured.get(0)))
        first = mine[min(mine)]
        base = series(store, first.base[behavior, source], behavior, source)
        own = series(store, first.scores[behavior, source], behavior, source)
        if base is not None and own is not None:
            found.append(gates.source_shows(recipe.gates, subject, direction, base, own))
        found.append(gates.convergence_change(recipe.gates, behavior, subject, measured))
    return found


def _evidence(graph: Graph, store: Store, plan: CellPlan) -> CellEvidence | None:
    """Everything the cell's verdict rests on, or None while part of it is missing."""
    cell, recipe = plan.cell, graph.recipe
    canary = canary_of(recipe, cell.source)
    zero = next((p for p in graph.cells if p.cell == _at(cell, 0, cell.behavior, cell.negatives)), None)
    if zero is None:
        return None
    quad = [
        series(store, p.scores[cell.behavior, probe], cell.behavior, probe)
        for probe in (ASSISTANT, canary)
        for p in (plan, zero)
    ]
    if any(one is None for one in quad):
        return None
    now, base, canary_now, canary_base = (one for one in quad if one is not None)
    source_base = series(store, plan.base[cell.behavior, cell.source], cell.behavior, cell.source)
    source_now = series(store, plan.scores[cell.behavior, cell.source], cell.behavior, cell.source)
    direction: Literal[-1, 1] = 1 if _spec(graph, cell.behavior).direction == "raises" else -1
    shows = None
    if source_base is not None and source_now is not None:
        shows = direction * (source_now.mean.value - source_base.mean.value) >= recipe.gates.source_shows
    mimicry = _mimicry(graph, store, plan, canary)
    margin = recipe.gates.threshold(cell.behavior)
    return CellEvidence(
        cell.label, cell.behavior, direction, margin, now, base, canary_now, canary_base, mimicry, shows
    )


def _mimicry(graph: Graph, store: Store, plan: CellPlan, canary: str) -> Any:
    """The same change without a behavior adapter, if the recipe has behavior `none`."""
    cell = plan.cell
    control = next((p for p in graph.cells if p.cell == _at(cell, cell.epoch, NO_BEHAVIOR, "none")), None)
    if control is None:
        return None
    quad = [
        series(store, side[cell.behavior, probe], cell.behavior, probe)
        for probe in (ASSISTANT, canary)
        for side in (control.scores, control.base)
    ]
    if any(one is None for one in quad):
        return None
    now, base, canary_now, canary_base = (one for one in quad if one is not None)
    return arm(now, base, canary_now, canary_base)


def _at(cell: Cell, epoch: int, behavior: str, negatives: str) -> Cell:
    return replace(cell, epoch=epoch, behavior=behavior, negatives=negatives)


def _spec(graph: Graph, behavior: str) -> Any:
    return graph.behaviors[behavior].spec


def _chance(graph: Graph, behavior: str) -> float | None:
    if _spec(graph, behavior).measure != "letters":
        return None
    asked = graph.questions.eval
    return multiple_choice_chance([len(q.choices) for q in asked], [q.gold for q in asked])
