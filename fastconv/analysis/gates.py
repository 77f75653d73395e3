"""Gates and verdicts of a recipe from the ledger, and the thresholds that applied when results were first seen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic import ValidationError

from fastconv.analysis.contrasts import ContrastBuilder, ContrastSubject, subject_of
from fastconv.analysis.scores import ScoreReader
from fastconv.analysis.sides import SideContrast, side_contrasts, side_evidence
from fastconv.datasets.behaviors import NO_BEHAVIOR, declared_rows, in_arm
from fastconv.datasets.personas import ASSISTANT
from fastconv.engine.locate import base_name
from fastconv.experiment.graph import Cell, CellPlan, Graph
from fastconv.experiment.schedule import wanted
from fastconv.recipe import GateSettings, Recipe, StoppingGate, run_id
from fastconv.stats import gates, study_gates
from fastconv.stats.bounds import multiple_choice_chance
from fastconv.stats.gates import GateVerdict, Loss
from fastconv.stats.series import Series, series_of
from fastconv.stats.verdicts import (
    CellEvidence,
    CellVerdict,
    CorrectedContrast,
    correct_for_fdr,
    decide,
    untrained_verdict,
)
from fastconv.store.ledger import Stage, Store, changed_inputs


def stage_series(store: Store, stage: Stage, measure: str, probe: str, unit: Any = "share") -> Series | None:
    """The scores of one stage as a series, or None if it is not done."""
    return series_of(stage.key, measure, probe, store.scores(stage.key), unit) if store.record(stage.key) else None


def ignored_gates(store: Store, recipe: Recipe) -> dict[str, str]:
    """Gates that the recipe or the run's command line ignores, with the reason given."""
    return {**recipe.gates.ignore, **store.run_facts(run_id(recipe)).get("ignored_gates", {})}


def gate_base(graph: Graph, store: Store) -> list[GateVerdict]:
    """G0 of every behavior whose base measurement under the assistant is done; leakage is measured there."""
    return base_gates(ContrastBuilder(ScoreReader(graph, store)))


def base_gates(contrasts: ContrastBuilder) -> list[GateVerdict]:
    """`gate_base` for a given contrast builder."""
    graph, verdicts = contrasts.graph, {}
    for plan in graph.cells:
        for measure in plan.measures:
            if measure in verdicts:
                continue
            base = contrasts.base(plan, contrasts.main(measure), ASSISTANT)
            if base is not None:
                direction = graph.behaviors[measure].spec.direction
                mass = contrasts.letter_mass(plan, measure, ASSISTANT, at_base=True)
                verdicts[measure] = gates.measurable(
                    contrasts.gates, measure, direction, base, _chance(graph, measure), mass
                )
    return list(verdicts.values())


def measurable_behaviors(graph: Graph, store: Store) -> list[str]:
    """Behaviors that passed G0, or whose G0 was ignored."""
    ignored = "G0" in ignored_gates(store, graph.recipe)
    return [verdict.subject for verdict in gate_base(graph, store) if verdict.verdict == "pass" or ignored]


def undecided_base_gates(graph: Graph, store: Store) -> list[GateVerdict]:
    """G0 verdicts that are undecidable because of unscored base samples, and not ignored; their behaviors wait."""
    ignored = ignored_gates(store, graph.recipe)
    return [
        verdict for verdict in mark_ignored(gate_base(graph, store), ignored) if verdict.unread and not verdict.ignored
    ]


def decide_gates(graph: Graph, store: Store, plans: Sequence[CellPlan]) -> list[GateVerdict]:
    """Every gate's verdict on the given cells: G0, then each behavior's gates and its pilot gate, then the study's."""
    return all_gates(ContrastBuilder(ScoreReader(graph, store).load()), plans)


def all_gates(contrasts: ContrastBuilder, plans: Sequence[CellPlan]) -> list[GateVerdict]:
    """`decide_gates` for a given contrast builder; ignored gates carry the reason."""
    ignored = ignored_gates(contrasts.reading.store, contrasts.graph.recipe)
    epochs = contrasts.graph.recipe.grid.epochs
    verdicts = mark_ignored(base_gates(contrasts), ignored)
    g0 = {verdict.subject: verdict for verdict in verdicts}
    verdicts += mark_ignored(_convergence_gates(contrasts, plans), ignored)
    words = primary_verdicts(contrasts)
    subjects = {subject.label(contrasts.main(subject.behavior)): subject for subject in declared_contrasts(contrasts)}
    for source, behavior in dict.fromkeys(
        (p.cell.source, p.cell.behavior) for p in plans if p.cell.behavior != NO_BEHAVIOR
    ):
        behavior_plans = [p for p in plans if (p.cell.source, p.cell.behavior) == (source, behavior)]
        behavior_verdicts = [g0[behavior]] if behavior in g0 else []
        # An undecidable G0 excludes nothing: cells may have been trained before another judge scored the base.
        asked = behavior in contrasts.measured
        if not asked or (behavior_verdicts and not (behavior_verdicts[0].failed and not behavior_verdicts[0].ignored)):
            behavior_verdicts += mark_ignored(_behavior_gates(contrasts, source, behavior, behavior_plans), ignored)
        verdicts += [verdict for verdict in behavior_verdicts if verdict.gate != "G0"]
        if source == ASSISTANT or not asked or (contrasts.graph.recipe.grid.contrasts and not any(epochs)):
            continue  # a degenerate control: its gates are reported, but it has no pilot gate
        controls = {group_name(p.cell) for p in behavior_plans if contrasts.is_control(subject_of(p.cell))}
        declared = [verdict for verdict in behavior_verdicts if verdict.subject not in controls]
        subject = f"{source} x {behavior}"
        own = {
            v.label: v.kind
            for v in words
            if v.behavior == behavior and isinstance(one := subjects[v.label], ContrastSubject) and one.source == source
        }
        verdicts.append(gates.pilot(subject, behavior, declared, own, declared=any(epochs)))
    verdicts += mark_ignored(_killed(contrasts, plans), ignored)
    return [*verdicts, *mark_ignored(_study_gates(contrasts, plans), ignored)]


def gates_after(contrasts: ContrastBuilder, plan: CellPlan) -> list[GateVerdict]:
    """The gates that a finished cell allows to decide before the next cost: G2, G3, G3.5, KILL, G4 and G5."""
    verdicts = _convergence_gates(contrasts, [plan])
    if plan.cell.behavior != NO_BEHAVIOR:
        zero = contrasts.sibling(plan, epoch=0)
        pair = [cell_plan for cell_plan in (zero, plan) if cell_plan is not None]
        verdicts += _behavior_gates(contrasts, plan.cell.source, plan.cell.behavior, pair)
        verdicts += _killed(contrasts, [plan])
        verdicts += _first_sources(contrasts, plan)
    return [verdict for verdict in verdicts if verdict.gate in get_args(StoppingGate)]


def cell_verdicts(graph: Graph, store: Store) -> list[CellVerdict]:
    """The verdict of every subject beyond epoch 0 that has a behavior, Holm-corrected together."""
    return primary_verdicts(ContrastBuilder(ScoreReader(graph, store).load()))


def declared_contrasts(contrasts: ContrastBuilder) -> list[ContrastSubject | SideContrast]:
    """The pre-declared family: the recipe's grid and its contrasts between sides, measured or not. Controls are among the
    secondary contrasts.

    Behaviors that fail G0 stay in it. G0 depends on base measurements, so a family without them would depend on data
    and not on what was declared before; the price is power, never a false positive.
    """
    grid = [
        subject
        for subject in contrasts.subjects
        if subject.behavior in contrasts.measured
        and subject.behavior != NO_BEHAVIOR
        and subject.epoch
        and not contrasts.is_control(subject)
    ]
    return [*grid, *side_contrasts(contrasts.graph)]


def primary_verdicts(contrasts: ContrastBuilder) -> list[CellVerdict]:
    """`cell_verdicts` for a given contrast builder."""
    g0 = {verdict.subject: verdict for verdict in base_gates(contrasts)}
    evidence: list[CellEvidence] = []
    not_trained: list[CellVerdict] = []
    family = declared_contrasts(contrasts)
    for subject in family:
        g0_verdict, part = g0.get(subject.behavior), contrasts.main(subject.behavior)
        unread = "" if g0_verdict is None or not g0_verdict.unread else f"at the base, {g0_verdict.reason}"
        measurable = None if g0_verdict is None or unread else g0_verdict.verdict == "pass"
        if isinstance(subject, SideContrast):
            measured = side_evidence(contrasts, subject, measurable)
        else:
            measured = contrasts.cell_evidence(subject, part, measurable)
        if measured is not None and unread:
            evidence.append(replace(measured, withheld=measured.withheld or unread))
        elif measured is not None:
            evidence.append(measured)
        elif g0_verdict is not None and g0_verdict.failed:
            label = subject.label(part)
            not_trained.append(
                untrained_verdict(
                    label, f"not measurable at base: {g0_verdict.reason}", g0_verdict.rows, subject.behavior
                )
            )
    return [*decide(evidence, len(family)), *not_trained]


def secondary_findings(contrasts: ContrastBuilder) -> list[CorrectedContrast]:
    """All secondary contrasts, corrected for the false discovery rate."""
    return correct_for_fdr(contrasts.secondary_contrasts())


#: The field of the gate settings that holds one value per source instead of a single threshold.
_REFERENCES = "g3_reference_pct"


@dataclass(frozen=True)
class FirstThresholds:
    """The thresholds that applied when results were first seen, if this recipe's differ."""

    run: str
    started_at: float
    gates: GateSettings
    changes: tuple[str, ...]


def first_thresholds(reading: ScoreReader) -> FirstThresholds | None:
    """The thresholds that applied when the results of this recipe were first seen, or None if they are the same.

    Editing a threshold makes another recipe and so another run over the same stages, which the ledger shows. The first
    value of a threshold is that of the earliest run that had it: a pilot has no reference for a source that only the
    matrix has.
    """
    recipe, store = reading.graph.recipe, reading.store
    ends = {stage.key for plan in reading.graph.cells for stage in (*plan.scores.values(), *plan.base.values())}
    rows = store.frame(
        "SELECT id, recipe, started_at FROM runs WHERE id IN "
        "(SELECT run FROM run_stages WHERE key IN (SELECT value FROM json_each(?))) ORDER BY started_at, rowid",
        (json.dumps(sorted(ends)),),
    )
    now = _thresholds(recipe.gates, recipe.grid.sources)
    first: dict[str, Any] = {}
    edited: tuple[str, float] | None = None
    for run, written, started_at in rows.iter_rows():
        if run == run_id(recipe):
            break  # later runs came after these results were seen
        table = json.loads(written)
        try:
            before = GateSettings.model_validate(table.get("gates", {}))
        except ValidationError:
            continue  # written by another version with other threshold names
        earlier = _thresholds(before, table.get("grid", {}).get("sources", ()))
        new_thresholds = {name: value for name, value in earlier.items() if name in now and name not in first}
        if edited is None and any(value != now[name] for name, value in new_thresholds.items()):
            edited = run, started_at
        first |= new_thresholds
    if edited is None:
        return None
    changes = changed_inputs(first, {name: now[name] for name in first})
    return FirstThresholds(*edited, _with_thresholds(recipe.gates, first), tuple(changes))


def _thresholds(gates: GateSettings, sources: Sequence[str]) -> dict[str, Any]:
    """Every threshold by name, and the reference of each source of a grid; not which gates stop or are ignored."""
    table = gates.model_dump(mode="json", exclude={"stop", "ignore", _REFERENCES})
    return table | {f"{_REFERENCES}.{source}": gates.g3_reference_pct.get(source) for source in sources}


def _with_thresholds(gates: GateSettings, first: Mapping[str, Any]) -> GateSettings:
    """The gates with these thresholds, named as in `_thresholds`."""
    references: dict[str, float | None] = dict(gates.g3_reference_pct)
    references |= {name.split(".")[1]: value for name, value in first.items() if name.startswith(f"{_REFERENCES}.")}
    known = {source: value for source, value in references.items() if value is not None}
    plain = {name: value for name, value in first.items() if "." not in name}
    return GateSettings.model_validate(gates.model_dump(mode="json") | plain | {_REFERENCES: known})


def mark_ignored(verdicts: Sequence[GateVerdict], ignored: Mapping[str, str]) -> list[GateVerdict]:
    """The verdicts, with the reason set on each failed or undecidable one that is ignored."""
    return [
        replace(verdict, ignored=ignored[gate])
        if (verdict.failed or verdict.unread) and (gate := verdict.gate) in ignored
        else verdict
        for verdict in verdicts
    ]


def _convergence_gates(contrasts: ContrastBuilder, plans: Sequence[CellPlan]) -> list[GateVerdict]:
    """G2 of every convergence training that the cells depend on."""
    verdicts: dict[str, GateVerdict] = {}
    for plan in plans:
        if plan.snapshot is None:
            continue
        cell = plan.cell
        subject = f"{cell.source}, converged on {cell.convergence}, seed {cell.seed}{_arm(cell)}"
        if subject in verdicts:
            continue
        lineage = contrasts.graph.lineage(plan.snapshot)
        missing = tuple(stage.slot for stage in lineage if contrasts.reading.record(stage) is None)
        last = _loss(contrasts, lineage[-1])
        verdicts[subject] = gates.converged(contrasts.gates, contrasts.graph.recipe.model.id, subject, missing, last)
    return list(verdicts.values())


def _behavior_gates(
    contrasts: ContrastBuilder, source: str, behavior: str, plans: Sequence[CellPlan]
) -> list[GateVerdict]:
    """STACK, G1, G3, G3.5, SOURCE, KEPT and CHANGE of one source and behavior, for each group of cells of one kind."""
    proofs: dict[str, Any] = {}
    for end in (stage for plan in plans for stage in plan.scores.values()):
        drawn = end.needs.get("eval", end)
        if (record := contrasts.reading.record(drawn)) is not None:
            proofs[drawn.slot] = record.outputs
    verdicts = [gates.stacking(f"{source} x {behavior}", proofs)]
    groups: dict[tuple[str, str, int, str], dict[int, CellPlan]] = {}
    for plan in plans:
        cell = plan.cell
        groups.setdefault((cell.convergence, cell.negatives, cell.seed, cell.arm), {})[cell.epoch] = plan
    for by_epoch in groups.values():
        subject = group_name(next(iter(by_epoch.values())).cell)
        verdicts += _group_gates(contrasts, source, behavior, subject, by_epoch)
    return verdicts


def group_name(cell: Cell) -> str:
    """The name of the cells that differ only in their epoch, as gates print it."""
    named = f"{cell.source} x {cell.behavior}, {cell.negatives}, converged on {cell.convergence}, seed {cell.seed}"
    return named + _arm(cell)


def _arm(cell: Cell) -> str:
    return f", arm {cell.arm}" if cell.arm else ""


def _group_gates(
    contrasts: ContrastBuilder, source: str, behavior: str, subject: str, by_epoch: Mapping[int, CellPlan]
) -> list[GateVerdict]:
    rules, part, direction = (
        contrasts.gates,
        contrasts.main(behavior),
        contrasts.graph.behaviors[behavior].spec.direction,
    )
    now = {epoch: contrasts.now(plan, part, ASSISTANT) for epoch, plan in by_epoch.items()}
    measured = {epoch: series for epoch, series in now.items() if series is not None}
    losses = {e: loss for e, plan in by_epoch.items() if plan.adapter and (loss := _loss(contrasts, plan.adapter))}
    first = by_epoch[min(by_epoch)]
    source = contrasts.persona(first.cell, "source")
    base = contrasts.base(first, part, source)
    own = {e: series for e, plan in by_epoch.items() if (series := contrasts.now(plan, part, source)) is not None}
    verdicts = [_rows_gate(contrasts, subject, first)]
    if (
        behavior == "capability"
        and first.cell.negatives == "included"
        and contrasts.graph.recipe.eval.multiple_choice == "arc"
    ):
        verdicts.append(gates.reference(rules, source, measured.get(0), base_name(contrasts.graph.recipe.model)))
    verdicts.append(gates.same_loss(rules, subject, losses))
    if base is not None and own:
        verdicts.append(gates.source_shows(rules, subject, direction, base, own[min(own)]))
        verdicts.append(study_gates.reverted(rules, subject, direction, base, own))
    canaries = {
        epoch: series
        for epoch, plan in by_epoch.items()
        if (series := contrasts.now(plan, part, contrasts.canary(plan.cell))) is not None
    }
    verdicts.append(gates.convergence_change(rules, behavior, subject, measured, canaries))
    return verdicts


def _rows_gate(contrasts: ContrastBuilder, subject: str, plan: CellPlan) -> GateVerdict:
    """G1. Rows that the audit refuses are never trained, so a set with an adapter has passed it."""
    stage = plan.adapter.needs["rows"] if plan.adapter is not None else None
    record = contrasts.reading.record(stage) if stage is not None else None
    if stage is None or record is None:
        return gates.data_ready(subject, 0, None, "", ())
    recipe, n = contrasts.graph.recipe, int(record.outputs["n"])
    behavior = in_arm(recipe, contrasts.graph.behaviors[plan.cell.behavior], plan.cell.arm)
    declared = declared_rows(recipe, behavior, plan.cell.negatives)
    return gates.data_ready(subject, n if declared is None else declared, n, stage.key, ())


def _killed(contrasts: ContrastBuilder, plans: Sequence[CellPlan]) -> list[GateVerdict]:
    """KILL of every source among these cells, over all behaviors that are trained into it on its snapshots.

    A behavior that G0 rules out is never trained, so it is not waited for.
    """
    ruled_out = {gate.subject for gate in base_gates(contrasts) if gate.failed}
    groups: dict[str, dict[str, dict[int, CellPlan]]] = {}
    wanted_subjects = {_killed_subject(plan.cell) for plan in plans if plan.cell.behavior != NO_BEHAVIOR}
    for plan in contrasts.graph.cells:
        cell = plan.cell
        if cell.behavior in (NO_BEHAVIOR, *ruled_out) or (subject := _killed_subject(cell)) not in wanted_subjects:
            continue
        groups.setdefault(subject, {}).setdefault(cell.behavior, {})[cell.epoch] = plan
    later = any(contrasts.graph.recipe.grid.epochs)
    return [
        study_gates.killed(subject, {name: _kept(contrasts, by_epoch) for name, by_epoch in some.items()}, later=later)
        for subject, some in groups.items()
    ]


def _killed_subject(cell: Cell) -> str:
    """What KILL is decided for: all behaviors trained into one source on one convergence."""
    return f"{cell.source}, {cell.negatives}, converged on {cell.convergence}, seed {cell.seed}{_arm(cell)}"


def _kept(contrasts: ContrastBuilder, by_epoch: Mapping[int, CellPlan]) -> GateVerdict | None:
    """KEPT of one behavior of a source over its cells; None while it is not measured at epoch 0 and one more."""
    first = by_epoch[min(by_epoch)]
    part, source = contrasts.main(first.cell.behavior), contrasts.persona(first.cell, "source")
    base = contrasts.base(first, part, source)
    own = {e: series for e, plan in by_epoch.items() if (series := contrasts.now(plan, part, source)) is not None}
    if base is None or 0 not in own or len(own) < 2:
        return None
    direction = contrasts.graph.behaviors[part.measure].spec.direction
    return study_gates.reverted(contrasts.gates, group_name(first.cell), direction, base, own)


def _study_gates(contrasts: ContrastBuilder, plans: Sequence[CellPlan]) -> list[GateVerdict]:
    """G4, G5, confirm and falsify, for each kind of negatives."""
    rules, grid = contrasts.gates, contrasts.graph.recipe.grid
    sources = [source for source in grid.sources if source not in (ASSISTANT, rules.negative_control)]
    kinds = dict.fromkeys(p.cell.negatives for p in plans if p.cell.behavior != NO_BEHAVIOR)
    verdicts = []
    for kind in [kind for kind in kinds if kind != "none"] or list(kinds):
        shifts = contrasts.shifts(plans, kind)
        verdicts += study_gates.study(rules, f"negatives {kind}", shifts, sources)
    if not any(grid.epochs):
        if grid.contrasts:
            return []  # the recipe asks another question
        verdicts = [replace(verdict, reason=gates.NO_CONTRAST) for verdict in verdicts]
    return verdicts


def _first_sources(contrasts: ContrastBuilder, plan: CellPlan) -> list[GateVerdict]:
    """G4 and G5, each as soon as its sources are completely measured, while other sources are still to be computed."""
    rules, graph, kind = contrasts.gates, contrasts.graph, plan.cell.negatives
    ignored = ignored_gates(contrasts.reading.store, graph.recipe)
    measurable = [
        gate.subject for gate in mark_ignored(base_gates(contrasts), ignored) if gate.verdict == "pass" or gate.ignored
    ]
    by_source: dict[str, list[CellPlan]] = {source: [] for source in graph.recipe.grid.sources}
    for cell_plan in graph.cells:
        if cell_plan.cell.behavior in measurable and cell_plan.cell.epoch and cell_plan.cell.negatives == kind:
            by_source[cell_plan.cell.source].append(cell_plan)
    is_open = {
        source
        for source, plans in by_source.items()
        if any(contrasts.reading.record(end) is None for cell_plan in plans for end in wanted(cell_plan, measurable))
    }
    sources = [source for source in by_source if source not in (ASSISTANT, rules.negative_control)]
    subject, verdicts = f"negatives {kind}", []
    asked = [rules.g4_source] if rules.g4_source else sources[:1]
    for gate, first in (("G4", asked), ("G5", sources[: rules.g5_sources])):
        if not is_open or not is_open.isdisjoint(first) or not set(first) <= set(sources):
            continue
        shifts = contrasts.shifts([cell_plan for source in first for cell_plan in by_source[source]], kind)
        if gate == "G4":
            verdicts.append(study_gates.signal(rules, subject, shifts, sources))
        else:
            verdicts.append(study_gates.first_sources(rules, subject, shifts, sources))
    return verdicts


def _loss(contrasts: ContrastBuilder, stage: Stage) -> Loss | None:
    record = contrasts.reading.record(stage)
    return None if record is None else Loss(float(record.outputs["last_epoch_loss"]), stage.key)


def _chance(graph: Graph, behavior: str) -> float | None:
    if graph.behaviors[behavior].spec.measure != "letters":
        return None
    asked = graph.questions.eval
    return multiple_choice_chance([len(q.choices) for q in asked], [q.gold for q in asked])
