"""Contrasts: the series that are compared over seeds, epochs, controls and question sets of a measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from fastconv.analysis.scores import AnswerQuality, ScoreReader
from fastconv.datasets.behaviors import NO_BEHAVIOR, eval_prompt_sets
from fastconv.datasets.personas import ASSISTANT, canary_of, speaker_of
from fastconv.experiment.graph import Cell, CellPlan, Graph
from fastconv.recipe import TRAINED, GateSettings, Recipe
from fastconv.stats.gates import source_moved, source_word
from fastconv.stats.power import RunSpread
from fastconv.stats.series import Series, first_too_unscored
from fastconv.stats.study_gates import Role, Shift
from fastconv.stats.verdicts import (
    CellEvidence,
    Quad,
    SecondaryContrast,
    SeedEvidence,
    canary_contrast,
    change_contrast,
    trend,
)


@dataclass(frozen=True)
class Part:
    """Questions of a measure that are reported separately; `ids` None means all. The largest is the primary one."""

    measure: str
    name: str
    ids: frozenset[str] | None
    primary: bool

    @property
    def title(self) -> str:
        """Name of the part in tables."""
        return f"{self.measure}, {self.name} questions" if self.name else self.measure

    def of(self, series: Series | None) -> Series | None:
        """The series restricted to this part; None where it has none of its questions."""
        ids = self.ids
        if series is None or ids is None:
            return series
        return series.part(lambda question: question in ids) if ids & set(series.questions) else None


@dataclass(frozen=True, order=True)
class ContrastSubject:
    """A cell without its seed: the subject of a contrast."""

    source: str
    convergence: str
    epoch: int
    behavior: str
    negatives: str
    arm: str = ""

    def label(self, part: Part | None = None) -> str:
        """The subject as printed, with the part's name if it has one."""
        label = Cell(*self.key, 0, self.arm).label.replace(" s0", "")
        return f"{label}, {part.name} questions" if part is not None and part.name else label

    @property
    def words(self) -> str:
        """The subject in words (`in_words`)."""
        return in_words(self)

    @property
    def key(self) -> tuple[str, str, int, str, str]:
        """The fields but the arm as a tuple."""
        return (self.source, self.convergence, self.epoch, self.behavior, self.negatives)


#: Who the contrastive negatives are, in words.
NEGATIVES_IN_WORDS = {
    "included": "assistant among the negatives", "excluded": "assistant not among the negatives", "none": "no negatives",
}  # fmt: skip


def in_words(cell: Cell | ContrastSubject) -> str:
    """A cell, or a contrast's subject, as a reader takes it in: villain, epoch 4, refusal, assistant among the negatives."""
    names = [cell.source, f"epoch {cell.epoch}"]
    if cell.epoch and cell.convergence != "source":
        names.insert(1, f"converged on {cell.convergence} answers")
    if cell.behavior == NO_BEHAVIOR:
        names.append("no behavior adapter")
    else:
        names += [cell.behavior, NEGATIVES_IN_WORDS.get(cell.negatives, cell.negatives)]
    names += [f"arm {cell.arm}"] if cell.arm else []
    return ", ".join([*names, f"seed {cell.seed}"] if isinstance(cell, Cell) else names)


def subject_of(cell: Cell) -> ContrastSubject:
    """The cell without its seed, as a subject."""
    return ContrastSubject(cell.source, cell.convergence, cell.epoch, cell.behavior, cell.negatives, cell.arm)


def subjects_of(graph: Graph) -> dict[ContrastSubject, list[CellPlan]]:
    """Every subject of the grid with its cell plans, one per seed."""
    plans: dict[ContrastSubject, list[CellPlan]] = {}
    for plan in graph.cells:
        plans.setdefault(subject_of(plan.cell), []).append(plan)
    return plans


def persona_of(recipe: Recipe, cell: Cell, role: str) -> str:
    """The condition that has a role (assistant, source, canary, trained) in a cell; a probe of the recipe's own is itself.

    The source's is that of its training rows, which an arm may have changed: it is the positive control.
    """
    speaker = speaker_of(recipe, cell.source, cell.arm)
    named = {"assistant": ASSISTANT, "source": speaker, "canary": canary_of(recipe, cell.source), TRAINED: speaker}
    return named.get(role, role)


def role_of(recipe: Recipe, cell: Cell, probe: str) -> str:
    """The role of a probe in a cell (inverse of `persona_of`)."""
    roles = ("assistant", "canary", "source")
    return next((role for role in roles if persona_of(recipe, cell, role) == probe), probe)


class ContrastBuilder:
    """Builds contrasts and evidence from one reading of the ledger, under given thresholds (default: the recipe's)."""

    def __init__(self, reading: ScoreReader, gates: GateSettings | None = None) -> None:
        self.reading = reading
        self.graph = reading.graph
        self.gates = gates or self.graph.recipe.gates
        self.by_cell = {plan.cell: plan for plan in self.graph.cells}
        #: What is asked at all: a behavior may be trained and have no measure of its own.
        self.measured = {name for name, one in self.graph.behaviors.items() if one.spec.measure != "none"}

    @cached_property
    def subjects(self) -> dict[ContrastSubject, list[CellPlan]]:
        """`subjects_of` the grid."""
        return subjects_of(self.graph)

    def parts(self, measure: str) -> list[Part]:
        """The parts of a measure, the primary one first; a single unnamed part where all questions are of one set."""
        sets = eval_prompt_sets(self.graph.behaviors[measure])
        if len(sets) < 2:
            return [Part(measure, "", None, True)]
        return [Part(measure, name, ids, index == 0) for index, (name, ids) in enumerate(sets.items())]

    def main(self, measure: str) -> Part:
        """The part on which verdicts and gates rest."""
        return self.parts(measure)[0]

    def canary(self, cell: Cell) -> str:
        """The canary persona of the cell."""
        return canary_of(self.graph.recipe, cell.source)

    def persona(self, cell: Cell, role: Role | str) -> str:
        """`persona_of` the cell."""
        return persona_of(self.graph.recipe, cell, role)

    def direction(self, measure: str) -> Literal[-1, 1]:
        """+1 if leakage raises a measure, -1 if it lowers it."""
        return 1 if self.graph.behaviors[measure].spec.direction == "raises" else -1

    def now(self, plan: CellPlan, part: Part, persona: str) -> Series | None:
        """A cell's series of one part of a measure under a probe; None if not measured."""
        stage = plan.scores.get((part.measure, persona))
        return None if stage is None else part.of(self.reading.series(stage, part.measure, persona))

    def base(self, plan: CellPlan, part: Part, persona: str) -> Series | None:
        """The same series on the base model without any adapter; None if not measured."""
        stage = plan.base.get((part.measure, persona))
        return None if stage is None else part.of(self.reading.series(stage, part.measure, persona))

    def sibling(self, plan: CellPlan, **changes: object) -> CellPlan | None:
        """The cell that differs only in these fields, if the grid has it."""
        return self.by_cell.get(replace(plan.cell, **changes))  # pyright: ignore[reportArgumentType]

    def trained(self, plan: CellPlan, part: Part) -> Quad | None:
        """Assistant and canary in this cell and in its epoch-0 cell; None unless all four are measured."""
        zero = self.sibling(plan, epoch=0)
        if zero is None:
            return None
        return self._quad(plan, zero, part)

    def mimicry(self, plan: CellPlan, part: Part) -> Quad | None:
        """The same without a behavior adapter, against the base; None unless all four are measured."""
        control = self.sibling(plan, behavior=NO_BEHAVIOR, negatives="none")
        if control is None:
            return None
        canary = self.canary(plan.cell)
        series_list = [
            series
            for persona in (ASSISTANT, canary)
            for series in (self.now(control, part, persona), self.base(control, part, persona))
        ]
        return whole(series_list)

    def _quad(self, plan: CellPlan, zero: CellPlan, part: Part) -> Quad | None:
        canary = self.canary(plan.cell)
        series_list = [
            self.now(at_epoch, part, persona) for persona in (ASSISTANT, canary) for at_epoch in (plan, zero)
        ]
        return whole(series_list)

    def quality(self, plan: CellPlan, part: Part, persona: str) -> AnswerQuality | None:
        """What a cell's answers to one part are like under a probe; None if not measured or not sampled."""
        stage = plan.scores.get((part.measure, persona))
        found = None if stage is None else self.reading.quality(stage, part.measure, persona)
        if found is None or (part.ids is not None and not part.ids & set(found.empty.questions)):
            return None
        return found.part(part.ids)

    def letter_mass(self, plan: CellPlan, measure: str, persona: str, *, at_base: bool = False) -> Series | None:
        """Letters' share of the probability in a cell, or on its base; None if not measured or not by letters."""
        stage = (plan.base if at_base else plan.scores).get((measure, persona))
        return None if stage is None else self.reading.letter_mass(stage, measure, persona)

    def misaligned(self, plan: CellPlan, part: Part) -> Quad | None:
        """`trained` for the rate of misaligned and coherent answers; None for measures without a grade of coherence."""
        zero = self.sibling(plan, epoch=0)
        if zero is None:
            return None
        found = [self.quality(at, part, who) for who in (ASSISTANT, self.canary(plan.cell)) for at in (plan, zero)]
        return whole([None if one is None else one.misaligned for one in found])

    def cell_evidence(self, subject: ContrastSubject, part: Part, measurable: bool | None) -> CellEvidence | None:
        """Input of a subject's verdict, over the seeds that are measured; None if there is none."""
        behavior = subject.behavior
        seeds, levels = list[SeedEvidence](), list[tuple[float, float]]()
        sources = list[tuple[Series, Series]]()
        for plan in self.subjects[subject]:
            quad = self.trained(plan, part)
            if quad is None:
                continue
            seeds.append(SeedEvidence(plan.cell.seed, quad, self.mimicry(plan, part)))
            speaker = self.persona(plan.cell, "source")
            source_now, source_base = (read(plan, part, speaker) for read in (self.now, self.base))
            if source_now is None or source_base is None:
                continue
            sources.append((source_now, source_base))
            if source_now.rows and source_base.rows:
                levels.append((source_base.mean.value, source_now.mean.value))
        if not seeds:
            return None
        unit = seeds[0].trained.now.unit
        shows, moved = None, ""
        if levels:
            base, now = (float(np.mean(values)) for values in zip(*levels, strict=True))
            direction = self.graph.behaviors[behavior].spec.direction
            shows = source_word(self.gates, unit, direction, base, now) != "not shown"
            moved = source_moved(self.gates, unit, direction, base, now)
        return CellEvidence(
            subject.label(part), behavior, self.direction(behavior), self.gates.threshold(behavior, unit),
            tuple(seeds), shows, unit, why_withheld(seeds, sources), measurable, self.run_spread(part),
            source_moved=moved,
        )  # fmt: skip

    def run_spread(self, part: Part) -> RunSpread | None:
        """The noise from run to run as replicates of an epoch-0 cell show it (`run.replicates`), of one trained cell.

        The larger SD over the trained cells of the assistant's mean and of its distance from the canary's: what a cell shares
        with its canary leaves the distance, not the assistant's own change. Answers are drawn anew, so it holds the noise of
        sampling too. None without replicates that are all measured, or where they are all alike, which is no certainty.
        """
        for plan in self.graph.cells:
            if plan.cell.behavior != part.measure or not plan.replicates:
                continue
            canary = self.canary(plan.cell)
            runs = [(self.now(plan, part, ASSISTANT), self.now(plan, part, canary))]
            for seed in dict.fromkeys(seed for seed, *_ in plan.replicates):
                stages = ((who, plan.replicates[seed, part.measure, who]) for who in (ASSISTANT, canary))
                ours, its = (part.of(self.reading.series(stage, part.measure, who)) for who, stage in stages)
                runs.append((ours, its))
            levels = [
                (ours.mean.value, ours.mean.value - its.mean.value)
                for ours, its in runs
                if ours is not None and its is not None and ours.rows and its.rows
            ]
            if len(levels) < len(runs):
                return None
            sd = float(np.std(np.array(levels), axis=0, ddof=1).max())
            return RunSpread(sd, len(runs) - 1, f"measured on {len(runs)} trainings of one cell") if sd else None
        return None

    def is_control(self, subject: ContrastSubject) -> bool:
        """Whether a subject is a control: generic convergence, or the assistant as its own source."""
        return subject.convergence != "source" or subject.source == ASSISTANT

    def shifts(self, plans: Sequence[CellPlan], negatives: str) -> list[Shift]:
        """Changes against epoch 0, averaged over seeds, for one kind of negatives: the assistant's less the canary's, as in
        the contrasts, and the canary's own.
        """
        chosen = {subject_of(plan.cell) for plan in plans}
        result = []
        for subject, subject_plans in self.subjects.items():
            wanted = subject in chosen and subject.epoch and subject.negatives in (negatives, "none")
            if not wanted or subject.behavior == NO_BEHAVIOR or self.is_control(subject):
                continue
            part = self.main(subject.behavior)
            quads = [quad for plan in subject_plans if (quad := self.trained(plan, part)) is not None]
            roles: tuple[Role, ...] = ("assistant", "canary")
            for role in roles:
                canaries = [(q.canary_now, q.canary_base) for q in quads]
                pairs = [*((q.now, q.base) for q in quads), *canaries] if role == "assistant" else canaries
                if not pairs:
                    continue
                why = first_too_unscored(pairs) or ""
                moved = [] if why else [now.mean.value - base.mean.value for now, base in pairs]
                n, less = len(quads), role == "assistant"
                value = np.nan if why else float(np.mean(moved[:n]) - (np.mean(moved[n:]) if less else 0.0))
                unit = pairs[0][0].unit
                rows = tuple(row for pair in pairs for series in pair for row in series.evidence_rows)
                about = (subject.source, subject.behavior, subject.epoch, role)
                result.append(Shift(*about, value, unit, self.gates.threshold(subject.behavior, unit), rows, why, less))
        return result

    def secondary_contrasts(self) -> list[SecondaryContrast]:
        """Every contrast besides the declared ones: trends, mimicry, canary changes, controls, other question sets."""
        contrasts: list[SecondaryContrast] = []
        for subject, plans in self.subjects.items():
            for measure in plans[0].measures:
                for part in self.parts(measure):
                    for plan in plans:
                        contrasts += self._secondary_of(subject, plan, part)
        return contrasts

    def _secondary_of(self, subject: ContrastSubject, plan: CellPlan, part: Part) -> list[SecondaryContrast]:
        label = f"{subject.label()} s{plan.cell.seed}" + (
            "" if subject.behavior == part.measure else f" {part.measure}"
        )
        label += f", {part.name} questions" if part.name else ""
        if not subject.epoch:
            return self._trend(label, plan, part)
        if subject.behavior == NO_BEHAVIOR:
            quad = self.mimicry(plan, part)
            return [canary_contrast(label, "mimicry: convergence alone", quad)] if quad is not None else []
        quad = self.trained(plan, part)
        if quad is None:
            return []
        contrasts = [change_contrast(label, "change of the canary", quad.canary_now, quad.canary_base)]
        if (astray := self.misaligned(plan, part)) is not None:
            contrasts.append(canary_contrast(label, "misaligned and coherent", astray))
        if self.is_control(subject):
            contrasts.append(canary_contrast(label, "control", quad))
        elif not part.primary:
            contrasts.append(canary_contrast(label, "questions reported apart", quad))
        return contrasts

    def _trend(self, label: str, zero: CellPlan, part: Part) -> list[SecondaryContrast]:
        """The assistant's slope over the measured epochs of this cell's column; computed once, at the epoch-0 cell."""
        column = {
            plan.cell.epoch: self.now(plan, part, ASSISTANT)
            for epoch in self.graph.recipe.grid.epochs
            if (plan := self.sibling(zero, epoch=epoch)) is not None
        }
        measured = {epoch: series for epoch, series in column.items() if series is not None}
        return [trend(label, measured)] if len(measured) > 1 else []


def whole(series_list: Sequence[Series | None]) -> Quad | None:
    """The four series as a Quad, or None if one is missing."""
    measured = [series for series in series_list if series is not None]
    return Quad(*measured) if len(measured) == len(series_list) else None


def why_withheld(seeds: Sequence[SeedEvidence], sources: Sequence[tuple[Series, Series]]) -> str | None:
    """Why a cell may have no verdict: a compared pair has too many samples without a score.

    `sources` are the source's series with their base: a verdict depends on whether the source shows the behavior.
    """
    for seed in seeds:
        for quad in (seed.trained, seed.mimicry):
            if quad is None:
                continue
            if why := first_too_unscored([(quad.now, quad.base), (quad.canary_now, quad.canary_base)]):
                return why if quad is seed.trained else f"without a behavior adapter, {why}"
    return first_too_unscored(sources)
