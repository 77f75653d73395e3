"""What a recipe has to work through, stage by stage, before anything is computed: the graph for planning, and sums over it.

How a stage's work is counted stands with its kind in `measures`. No tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cached_property
from typing import Any

from fastconv.datasets.questions import Question, QuestionSet, load_questions, read_split
from fastconv.experiment.graph import Graph
from fastconv.experiment.measures import KINDS, Demand
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
        return QuestionSet(training, held_out)


def demands(graph: Graph, stages: Iterable[Stage], device: str) -> dict[str, Demand]:
    """The demand of each stage on a device (`cpu` or `cuda`), by key."""
    of_set: dict[str, Demand] = {}  # adapters on every snapshot train the same rows: counted once

    def demand(stage: Stage) -> Demand:
        count = KINDS[stage.kind].demand
        if count is None:
            return Demand()
        if stage.kind != "behavior":
            return count(graph, stage, device)
        rows = stage.needs["rows"].key
        if rows not in of_set:
            of_set[rows] = count(graph, stage, device)
        return of_set[rows]

    return {stage.key: demand(stage) for stage in stages}


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
    from huggingface_hub import try_to_load_from_cache  # slow to import, and only needed here

    from fastconv.datasets.questions import HUB_FILE

    split = read_split()
    return isinstance(
        try_to_load_from_cache(split.dataset, HUB_FILE, revision=split.revision, repo_type="dataset"), str
    )


def settings_of(found: Demand) -> Mapping[str, Any]:
    """A demand as JSON, without what is zero."""
    return {one.name: round(value, 3) for one in fields(found) if (value := getattr(found, one.name))}
