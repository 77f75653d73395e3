"""Contrasts between two sides that a recipe names (`grid.contrasts`): arms, probes, or the base, compared by question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fastconv.analysis.contrasts import (
    ContrastBuilder,
    ContrastSubject,
    Part,
    in_words,
    persona_of,
    subjects_of,
    whole,
    why_withheld,
)
from fastconv.datasets.behaviors import NO_BEHAVIOR
from fastconv.errors import RecipeError
from fastconv.experiment.graph import CellPlan, Graph
from fastconv.recipe import BASE_SIDE
from fastconv.stats.gates import source_moved, source_word
from fastconv.stats.series import Series, SidePair
from fastconv.stats.verdicts import CellEvidence, SeedEvidence
from fastconv.store.records import Stage

_Subjects = Mapping[ContrastSubject, Sequence[CellPlan]]


@dataclass(frozen=True)
class Side:
    """One side of a contrast between sides: cells over seeds (None: the base without an adapter), and the probe's role."""

    name: str
    subject: ContrastSubject | None
    role: str


@dataclass(frozen=True)
class SideContrast:
    """Two sides of the recipe that are compared in one measure (`grid.contrasts`); `behavior` is that measure."""

    behavior: str
    first: Side
    second: Side

    @property
    def _at(self) -> ContrastSubject:
        found = self.first.subject or self.second.subject
        assert found is not None, "a contrast has a side that is trained"
        return found

    def label(self, part: Part | None = None) -> str:
        """The contrast as printed."""
        cells = [one.subject.label() for one in (self.first, self.second) if one.subject is not None]
        where = " / ".join(dict.fromkeys(cells))
        label = f"{self.behavior}: {self.first.name} against {self.second.name} ({where})"
        return f"{label}, {part.name} questions" if part is not None and part.name else label

    @property
    def words(self) -> str:
        """The contrast in words."""
        at = self._at
        where = f"{at.source}, epoch {at.epoch}" if at.epoch else at.source
        return f"{self.behavior}, {self.first.name} against {self.second.name} ({where})"

    @property
    def in_full(self) -> str:
        """The contrast in words that name its cell in full, where another has the same words."""
        return f"{self.behavior}, {self.first.name} against {self.second.name} ({in_words(replace(self._at, arm=''))})"

    @property
    def source(self) -> str:
        """The source of its cells."""
        return self._at.source


def side_contrasts(graph: Graph) -> list[SideContrast]:
    """The contrasts between sides that the recipe declares, for every measure and column of the grid that both have."""
    return list(dict.fromkeys(one for pair in graph.recipe.grid.contrasts for one in _contrasts_of(graph, pair)))


def require_comparable(graph: Graph) -> None:
    """Raise RecipeError for a pair of the recipe's contrasts that compares nothing."""
    for pair in graph.recipe.grid.contrasts:
        if not _contrasts_of(graph, pair):
            raise RecipeError(
                f"{pair[0]!r} against {pair[1]!r} compares nothing: no measure is asked of both, or they differ in more than "
                "arm and probe",
                where="grid.contrasts",
                fix="name in eval.measures what both are to be asked, or take the pair out",
            )


def _contrasts_of(graph: Graph, pair: tuple[str, str]) -> list[SideContrast]:
    """The contrasts that one pair of sides stands for."""
    grid, probes, subjects = graph.recipe.grid, graph.recipe.eval.probes, subjects_of(graph)
    (arm, role), (other_arm, other_role) = (grid.side(text, probes) for text in pair)
    found: list[SideContrast] = []
    for subject in _in_arm(subjects, arm) if arm != BASE_SIDE else [None]:
        for other in _in_arm(subjects, other_arm) if other_arm != BASE_SIDE else [None]:
            sides = Side(pair[0], subject, role), Side(pair[1], other, other_role)
            if _comparable(graph, *sides):
                found += [SideContrast(name, *sides) for name in _measures_of(graph, subjects, *sides)]
    return found


def _in_arm(subjects: _Subjects, arm: str) -> list[ContrastSubject]:
    return [subject for subject in subjects if subject.arm == arm]


def _comparable(graph: Graph, first: Side, second: Side) -> bool:
    """Whether two sides differ in nothing but what their arms and probes make them differ in."""
    one, other = first.subject, second.subject
    if one is None or other is None:
        only = one or other
        return only is not None and bool(only.epoch or only.behavior != NO_BEHAVIOR)
    arms = [graph.recipe.grid.arms[arm] for arm in (one.arm, other.arm) if arm]
    converged = one.convergence == other.convergence or any(arm.convergence for arm in arms)
    epochs = one.epoch == other.epoch or "none" in (one.convergence, other.convergence)
    trained = one.behavior == other.behavior or any(arm.behavior for arm in arms)
    negatives = one.negatives == other.negatives or any(arm.behavior or arm.rows for arm in arms)
    return one.source == other.source and converged and epochs and trained and negatives


def _measures_of(graph: Graph, subjects: _Subjects, first: Side, second: Side) -> list[str]:
    """What both sides are asked, and not by one and the same stage."""
    plans = [None if side.subject is None else subjects[side.subject][0] for side in (first, second)]
    trained = [plan for plan in plans if plan is not None]
    stages = [
        _stage(graph, plan or trained[0], side, measure, at_base=plan is None)
        for measure in trained[0].measures
        for plan, side in zip(plans, (first, second), strict=True)
    ]
    pairs = zip(trained[0].measures, stages[::2], stages[1::2], strict=True)
    return [measure for measure, one, two in pairs if one and two and one.key != two.key]


def _stage(graph: Graph, plan: CellPlan, side: Side, measure: str, *, at_base: bool) -> Stage | None:
    return (plan.base if at_base else plan.scores).get((measure, persona_of(graph.recipe, plan.cell, side.role)))


def side_evidence(builder: ContrastBuilder, contrast: SideContrast, measurable: bool | None) -> CellEvidence | None:
    """Input of a contrast's verdict between two sides, over the seeds that both have measured; None if there is none."""
    part, sides = builder.main(contrast.behavior), (contrast.first, contrast.second)
    by_seed = [
        {} if side.subject is None else {plan.cell.seed: plan for plan in builder.subjects[side.subject]}
        for side in sides
    ]
    seeds = list[SeedEvidence]()
    controls: dict[tuple[str, str], list[tuple[Series, Series]]] = {}  # (measure, arm) -> now and base, over seeds
    for seed in builder.graph.recipe.grid.seeds:
        plans = [one.get(seed) for one in by_seed]
        trained = [plan for plan in plans if plan is not None]
        if len(trained) < sum(side.subject is not None for side in sides):
            continue
        pair = [
            _side_series(builder, plan or trained[0], part, role, at_base=plan is None)
            for roles in ((contrast.first.role, contrast.second.role), ("canary", "canary"))
            for plan, role in zip(plans, roles, strict=True)
        ]
        if (quad := whole(pair)) is not None:
            seeds.append(SeedEvidence(seed, SidePair(*quad.series), None))
            for plan in trained:
                if (control := _control(builder, plan)) is not None:
                    controls.setdefault((control[0].measure, plan.cell.arm), []).append(control)
    if not seeds:
        return None
    unit = seeds[0].trained.now.unit
    missed = next((why for pairs in controls.values() if (why := _not_shown(builder, pairs))), "")
    alone = contrast.first.subject is None or contrast.second.subject is None
    same = contrast.first.subject == contrast.second.subject
    return CellEvidence(
        contrast.label(part), contrast.behavior, builder.direction(contrast.behavior),
        builder.gates.threshold(contrast.behavior, unit), tuple(seeds), not missed if controls else None, unit,
        why_withheld(seeds, [pair for pairs in controls.values() for pair in pairs]), measurable, builder.run_spread(part),
        n_trained=1 if alone or same else 2, sides=True, source_moved=missed,
    )  # fmt: skip


def _side_series(builder: ContrastBuilder, plan: CellPlan, part: Part, role: str, *, at_base: bool) -> Series | None:
    return (builder.base if at_base else builder.now)(plan, part, builder.persona(plan.cell, role))


def _control(builder: ContrastBuilder, plan: CellPlan) -> tuple[Series, Series] | None:
    """A training's positive control now and on the base: its behavior under the condition of its rows, or, where that has no
    measure, the assistant's `eval.control`. None where neither is asked, or measured."""
    behavior, role = plan.cell.behavior, "source"
    if behavior not in plan.measures:
        behavior, role = builder.graph.recipe.eval.control or "", "assistant"
    if not behavior or (plan.adapter is None and not plan.cell.epoch):
        return None
    part, persona = builder.main(behavior), builder.persona(plan.cell, role)
    now, base = builder.now(plan, part, persona), builder.base(plan, part, persona)
    return (now, base) if now is not None and base is not None and now.rows and base.rows else None


def _not_shown(builder: ContrastBuilder, pairs: Sequence[tuple[Series, Series]]) -> str:
    """How far a positive control moved over seeds, in words, where that is too little; "" where it is shown."""
    measure, unit = pairs[0][0].measure, pairs[0][0].unit
    now, base = (sum(series.mean.value for series in some) / len(pairs) for some in zip(*pairs, strict=True))
    levels = builder.gates, unit, builder.graph.behaviors[measure].spec.direction, base, now
    return f"{measure} {source_moved(*levels)}" if source_word(*levels) == "not shown" else ""


def effect_words(declared: Iterable[ContrastSubject | SideContrast]) -> str:
    """The words that would be an effect, by what the declared contrasts compare."""
    between = {isinstance(one, SideContrast) for one in declared}
    return " or ".join(
        [*(["transfer"] if False in between else []), *(["stronger or weaker"] if True in between else [])]
    )
