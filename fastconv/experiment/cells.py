"""The cells of a recipe's grid, over seeds, sources and arms, and the stages of each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastconv.datasets.behaviors import NO_BEHAVIOR, Behavior, arm_behaviors, in_arm, negatives_kinds
from fastconv.datasets.files import questions_file, read_jsonl
from fastconv.datasets.personas import speaker_of
from fastconv.datasets.spec import FunctionRule, PatternRule
from fastconv.errors import RecipeError
from fastconv.recipe import ConvergenceSettings, Recipe
from fastconv.store.records import Stage


@dataclass(frozen=True, order=True)
class Cell:
    """One cell of the grid. For behavior `none` the negatives are `none` too."""

    source: str
    convergence: str
    epoch: int
    behavior: str
    negatives: str
    seed: int
    #: The arm of the recipe that it belongs to; "" without arms.
    arm: str = ""

    @property
    def label(self) -> str:
        """How people read it."""
        parts = [self.source, self.convergence if self.epoch else "base", f"e{self.epoch}", self.behavior]
        more = [*([self.negatives] if self.negatives != "none" else []), f"s{self.seed}", *filter(None, [self.arm])]
        return " ".join([*parts, *more])

    @property
    def name(self) -> str:
        """The label as one word, for file names and as a served model; no part of it has a dash."""
        return "-".join(self.label.split())

    @property
    def columns(self) -> dict[str, object]:
        """Its fields, as tables have them; the arm only where there is one."""
        return {name: value for name, value in asdict(self).items() if name != "arm" or value}

    @property
    def stack(self) -> str:
        """How slots begin that stand on the cell's snapshot, or on the base."""
        where = f"{self.source}@{self.arm}" if self.arm else self.source
        return f"{where}/{self.convergence}/e{self.epoch}" if self.epoch else f"{where}/e0"


@dataclass(frozen=True)
class CellPlan:
    """A cell and its stages. `scores[measure, probe]` is where its numbers will stand, `base[...]` the base's.

    `beside[measure, probe]` scores the same completions another way (phrases, where a judge decides). `on_snapshot` are the
    measures of the cell's snapshot itself (of the base at epoch 0) by name, as far as the recipe wants them.
    `replicates[seed, measure, probe]` scores the same cell trained again (`run.replicates`), asked the same.
    """

    cell: Cell
    scores: Mapping[tuple[str, str], Stage]
    base: Mapping[tuple[str, str], Stage]
    snapshot: Stage | None
    adapter: Stage | None
    beside: Mapping[tuple[str, str], Stage] = field(default_factory=dict)
    on_snapshot: Mapping[str, Stage] = field(default_factory=dict)
    replicates: Mapping[tuple[int, str, str], Stage] = field(default_factory=dict)

    @property
    def stack(self) -> dict[str, Stage]:
        """The stages whose adapters the cell's stack is made of, in order, as the needs of what stands on it."""
        parts = (("snapshot", self.snapshot), ("behavior", self.adapter))
        return {name: stage for name, stage in parts if stage is not None}

    @property
    def measures(self) -> tuple[str, ...]:
        """Behaviors and measures that are asked in this cell."""
        return tuple(dict.fromkeys(measure for measure, _ in self.scores))


def grid_cells(recipe: Recipe, behaviors: Mapping[str, Behavior]) -> Iterator[Cell]:
    """Every cell of the grid once: seeds, sources, arms, convergence, epochs, behaviors, negatives."""
    grid = recipe.grid
    seen: set[Cell] = set()
    for seed in grid.seeds:
        for source in grid.sources:
            for arm in grid.arms or ("",):
                for convergence in arm_convergence(recipe, arm):
                    for epoch in grid.epochs:
                        for behavior in arm_behaviors(recipe, arm):
                            for negatives in kinds_of(recipe, behaviors, behavior, arm):
                                if convergence == "none" and epoch:
                                    continue  # nothing was converged: only epoch 0 exists
                                cell = Cell(source, convergence, epoch, behavior, negatives, seed, arm)
                                if cell not in seen:
                                    seen.add(cell)
                                    yield cell


def arm_convergence(recipe: Recipe, arm: str) -> tuple[str, ...]:
    """On whose answers an arm converges the assistant."""
    own = recipe.grid.arms[arm].convergence if arm else None
    return (own,) if own else recipe.grid.convergence


def kinds_of(recipe: Recipe, behaviors: Mapping[str, Behavior], behavior: str, arm: str) -> tuple[str, ...]:
    """The kinds of negatives that an arm trains a behavior with; `none` without one."""
    return ("none",) if behavior == NO_BEHAVIOR else negatives_kinds(recipe, in_arm(recipe, behaviors[behavior], arm))


# --- conditions of a recipe's own, and what convergence keeps ------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """How a probe of the recipe's own, or of an arm's prompt, asks: texts around a question, other wordings by id."""

    name: str
    before: str = ""
    after: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)

    def asked(self, items: Sequence[tuple[str, str]], measure: str) -> list[tuple[str, str]]:
        """The (id, user text) of a measure as this condition asks them; empty where its wordings have none of them.

        Raises RecipeError where they have some, because what is compared must be the same questions.
        """
        if self.texts:
            known = [(row, self.texts[row]) for row, _ in items if row in self.texts]
            if known and len(known) < len(items):
                absent = next(row for row, _ in items if row not in self.texts)
                raise RecipeError(
                    f"has other wordings of {len(known)} of {len(items)} questions of {measure}; {absent!r} is missing",
                    where=f"eval.probes.{self.name}.texts",
                    fix="give it all of them, or none",
                )
            items = known
        return [(row, f"{self.before}{user}{self.after}") for row, user in items]


def conditions_of(recipe: Recipe) -> dict[str, Condition]:
    """The probes that do not ask the plain questions, by name: the recipe's own, and those of arms with a trigger."""
    found: dict[str, Condition] = {}
    for name, probe in recipe.eval.probes.items():
        texts = dict(texts_by_id(probe.texts)) if probe.texts else {}
        found[name] = Condition(name, probe.before, probe.after, texts)
    for arm, own in recipe.grid.arms.items():
        for source in recipe.grid.sources if own.before or own.after else ():
            name = speaker_of(recipe, source, arm)
            found[name] = Condition(name, own.before, own.after)
    return {name: one for name, one in found.items() if one != Condition(name)}


def texts_by_id(path: str) -> list[tuple[str, str]]:
    """(id, text) of a JSONL file of the user's. Raises DataError."""
    return [(row["id"], row["text"]) for row in read_jsonl(questions_file(path), {"id": str, "text": str})]


@dataclass(frozen=True)
class WholeAnswer(PatternRule):
    """A regular expression that must match an answer whole (white space at its ends aside)."""

    def match(self, answer: str) -> str | None:
        """The answer if it matches, or None."""
        return answer if re.fullmatch(self.pattern, answer.strip()) else None


def answer_filter(settings: ConvergenceSettings) -> WholeAnswer | FunctionRule | None:
    """Which answers convergence trains; None for all. Raises DataError for a filter that cannot be used."""
    if settings.keep:
        PatternRule.of(settings.keep, "convergence.keep")
        return WholeAnswer(settings.keep)
    if settings.keep_if:
        folder = Path(settings.prompts_file).parent
        return FunctionRule.of(settings.keep_if, folder, "convergence.keep_if")
    return None
