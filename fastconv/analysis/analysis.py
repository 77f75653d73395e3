"""`Analysis`: gates, verdicts and secondary contrasts of a recipe from one reading of the ledger.

The report, its claims and `verify` all start from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastconv.analysis.contrasts import ContrastBuilder, ContrastSubject, subject_of
from fastconv.analysis.gates import (
    FirstThresholds,
    all_gates,
    base_gates,
    declared_contrasts,
    first_thresholds,
    ignored_gates,
    primary_verdicts,
    secondary_findings,
)
from fastconv.analysis.scores import ScoreReader
from fastconv.analysis.sides import SideContrast
from fastconv.experiment.graph import CellPlan, Graph
from fastconv.recipe import run_id
from fastconv.stats.gates import GateVerdict
from fastconv.stats.verdicts import CellVerdict, CorrectedContrast
from fastconv.store.ledger import Store


@dataclass(frozen=True)
class _Words:
    gates: tuple[GateVerdict, ...]
    verdicts: tuple[CellVerdict, ...]


class Analysis:
    """Gates, verdicts and secondary contrasts of a recipe as the ledger stands, computed on first access."""

    def __init__(self, graph: Graph, store: Store) -> None:
        self.graph = graph
        self.store = store
        self.run = run_id(graph.recipe)
        self.reading = ScoreReader(graph, store).load()
        self.found = ContrastBuilder(self.reading)

    @cached_property
    def measured(self) -> list[CellPlan]:
        """Cells with the scores of at least one finished stage."""
        series = self.reading.series
        return [
            plan
            for plan in self.graph.cells
            if any(series(stage, *pair) is not None for pair, stage in plan.scores.items())
        ]

    @cached_property
    def gates(self) -> tuple[GateVerdict, ...]:
        """Every gate's verdict on what was measured."""
        return self._now.gates

    @cached_property
    def verdicts(self) -> tuple[CellVerdict, ...]:
        """Verdicts of the declared contrasts that are measured."""
        return self._now.verdicts

    @cached_property
    def declared(self) -> Mapping[str, ContrastSubject | SideContrast]:
        """The declared contrasts of the grid, and those between sides, by label, measured or not."""
        return {subject.label(self.found.main(subject.behavior)): subject for subject in declared_contrasts(self.found)}

    @cached_property
    def asked(self) -> Mapping[str, ContrastSubject | SideContrast]:
        """The declared contrasts that answer the question: all but those of `eval.control`, which shows that training took, and
        with `eval.measures` all but those of what was trained."""
        asked = self.graph.recipe.eval
        answering = {
            label: one
            for label, one in self.declared.items()
            if one.behavior != asked.control and (not asked.measures or one.behavior in asked.measures)
        }
        return answering or self.declared

    @cached_property
    def answers(self) -> tuple[CellVerdict, ...]:
        """The verdicts of `asked` that are measured; those of the control where there are no others."""
        return tuple(one for one in self.verdicts if one.label in self.asked) or self.verdicts

    @cached_property
    def secondary(self) -> tuple[CorrectedContrast, ...]:
        """The secondary contrasts, with corrected p-values."""
        return tuple(secondary_findings(self.found))

    @cached_property
    def first(self) -> FirstThresholds | None:
        """The thresholds that applied when results were first seen; None if they are those of this recipe."""
        return first_thresholds(self.reading)

    @cached_property
    def under_first(self) -> tuple[tuple[GateVerdict, ...], tuple[CellVerdict, ...]]:
        """Gates and verdicts under the first thresholds; the same as now where nothing was edited."""
        if self.first is None:
            return self.gates, self.verdicts
        decisions = self._words(ContrastBuilder(self.reading, self.first.gates))
        return decisions.gates, decisions.verdicts

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """Machine, versions and command that the run recorded; empty if it was never started in this workspace."""
        return self.store.run_facts(self.run)

    @cached_property
    def reused(self) -> Mapping[str, bool]:
        """For every stage of the run, by key: whether it was finished before the run."""
        return {row["key"]: bool(row["reused"]) for row in self.store.stages_of_run(self.run)}

    @cached_property
    def ignored(self) -> Mapping[str, str]:
        """Ignored gates by code, with the reason given."""
        return ignored_gates(self.store, self.graph.recipe)

    def verdict(self, label: str) -> CellVerdict:
        """The verdict of a contrast by label. Raises KeyError if there is none."""
        return self._by_label[label]

    def subject(self, label: str) -> ContrastSubject | SideContrast:
        """The subject of a declared contrast by label. Raises KeyError if there is none."""
        return self._subjects[label]

    def words(self, label: str) -> str:
        """A contrast in words; its cell is named in full where another declared contrast has the same words."""
        subject = self.subject(label)
        if isinstance(subject, SideContrast) and sum(one.words == subject.words for one in self.declared.values()) > 1:
            return subject.in_full
        return subject.words

    @cached_property
    def _by_label(self) -> dict[str, CellVerdict]:
        return {verdict.label: verdict for verdict in self.verdicts}

    @cached_property
    def _subjects(self) -> dict[str, ContrastSubject | SideContrast]:
        subjects: dict[str, ContrastSubject | SideContrast] = dict(self.declared)
        for plan in self.graph.cells:
            subject = subject_of(plan.cell)
            if subject.behavior in self.graph.behaviors:
                subjects[subject.label(self.found.main(subject.behavior))] = subject
        return subjects

    @cached_property
    def _now(self) -> _Words:
        return self._words(self.found)

    def _words(self, contrasts: ContrastBuilder) -> _Words:
        unmeasurable = {gate.subject for gate in base_gates(contrasts) if gate.failed or gate.unread}
        measured = {id(plan) for plan in self.measured}
        plans = [plan for plan in self.graph.cells if id(plan) in measured or plan.cell.behavior in unmeasurable]
        gates = all_gates(contrasts, plans) if plans else []
        return _Words(tuple(gates), tuple(primary_verdicts(contrasts)))
