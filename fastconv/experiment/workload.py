"""What a recipe has to work through, stage by stage, before anything is computed: the graph for planning, and sums over it.

How a stage's work is counted stands with its kind in `measures`. No tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cached_property
from typing import Any

from fastconv.datasets.questions import HUB_FILE, Question, QuestionSet, load_questions, read_split
from fastconv.experiment.graph import Graph
from fastconv.experiment.measures import KINDS, Demand, Target
from fastconv.hub import cached_file
from fastconv.store.records import Stage

#: A question of ARC-Challenge as it is on average, where the questions are not at hand.
_ARC_QUESTION, _ARC_CHOICE = "x" * 125, "x" * 26


class Sketch(Graph):
    """A recipe's graph for planning: multiple-choice questions that are not at hand are stood in for.

    Then `questions_known` is False: the stages that ask them have other keys than they will have.
    """

    questions_known = True

    @cached_property
    def questions(self) -> QuestionSet:
        """The recipe's questions if they are on this disk, else as many of the same size."""
        if self.recipe.eval.multiple_choice == "builtin" or self.recipe.eval.arc_file or _arc_in_cache():
            return load_questions(self.recipe)
        self.questions_known = False
        split = read_split()
        held_out, training = (
            tuple(_stand_in(identity) for identity in sorted(ids)) for ids in (split.eval, split.train)
        )
        return QuestionSet(training, held_out, split.left_out)


def demands(graph: Graph, stages: Iterable[Stage], target: Target) -> dict[str, Demand]:
    """The demand of each stage, by key."""
    found: dict[tuple[str, ...], Demand] = {}
    by_stage: dict[str, Demand] = {}
    for stage in stages:
        alike = _alike(stage)
        if alike not in found:
            count = KINDS[stage.kind].demand
            found[alike] = count(graph, stage, target) if count is not None else Demand()
        by_stage[stage.key] = found[alike]
    return by_stage


def _alike(stage: Stage) -> tuple[str, ...]:
    """Equal for stages of one recipe with equal demand: adapters train the same rows on every snapshot, and probes are
    asked the same prompts on every stack, where near ties are letters above an adapter."""
    if stage.kind == "behavior":
        return stage.kind, stage.needs["rows"].key
    if stage.kind == "eval":
        stack = "above an adapter" if stage.needs else "base"
        return stage.kind, stage.inputs["measure"], stack, stage.inputs["prompts_sha256"], *stage.inputs["system"]
    if stage.kind == "judge":
        return stage.kind, stage.work["rubric"].sha256, *_alike(stage.needs["eval"])
    return stage.kind, stage.key


def total(found: Iterable[Demand]) -> Demand:
    """Sums over stages; lengths and shares do not add up and are left out."""
    kept = list(found)
    added = {
        one.name: sum(getattr(demand, one.name) for demand in kept)
        for one in fields(Demand)
        if one.name not in ("length_tok", "share")
    }
    return Demand(**added)


def _stand_in(identity: str) -> Question:
    return Question(identity, _ARC_QUESTION, ("A", "B", "C", "D"), (_ARC_CHOICE,) * 4, "A")


def _arc_in_cache() -> bool:
    """Whether the hub's file is on this disk; nothing is fetched."""
    split = read_split()
    return cached_file(split.dataset, HUB_FILE, split.revision, "dataset") is not None


def settings_of(found: Demand) -> Mapping[str, Any]:
    """A demand as JSON, without what is zero."""
    return {one.name: round(value, 3) for one in fields(found) if (value := getattr(found, one.name))}
