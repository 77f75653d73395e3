"""`score` and `export`: the engine's parts on their own, for any base, adapters and question file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastconv.chat import SystemTurn
from fastconv.datasets.questions import Question, read_arc
from fastconv.engine.export import BaseReference, export_concatenated, export_separate, load_peft_folder
from fastconv.engine.model import load_base
from fastconv.engine.score import letter_item, score_letters, score_texts, text_item
from fastconv.engine.stack import Slot, Stack
from fastconv.errors import InputError
from fastconv.experiment.graph import Graph
from fastconv.recipe import LoraSettings, ModelSettings, Recipe
from fastconv.run.stacks import Stacks
from fastconv.stats.bounds import multiple_choice_chance
from fastconv.store.ledger import Store

#: Tokens scored at once; the same as a recipe's default for evaluation.
BATCH_TOK = 16384


@dataclass(frozen=True)
class ScoredQuestion:
    """One question's answer: log-probabilities (nats) of its own labels or texts, in their order."""

    id: str
    gold: str
    predicted: str
    correct: bool
    logprobs: tuple[float, ...]
    #: Probability that the next token is one of the labels at all; None when texts are scored.
    mass: float | None


@dataclass(frozen=True)
class ScoreReport:
    """All questions, accuracy (share) and chance (share)."""

    accuracy: float
    chance: float
    questions: tuple[ScoredQuestion, ...]


def score_file(
    model: ModelSettings, adapters: Sequence[Path], questions_file: Path, system: SystemTurn, *, by_text: bool
) -> ScoreReport:
    """Score a question file (ARC's forms) under a base with these adapters stacked in order.

    By letter as the protocol does, or by the choices' texts as lm-eval's arc_challenge does. Adapters are PEFT folders.
    Raises ModelError, AdapterError or DataError with the mend.
    """
    questions = read_arc(questions_file)
    base = load_base(model)
    stack = Stack(base, LoraSettings())
    reference = BaseReference(model.id, model.revision)
    loaded = tuple(load_peft_folder(stack, path, reference) for path in adapters)
    with stack.live(*([Slot(frozen=loaded)] if loaded else [])):
        if loaded:
            stack.prove(None, ", ".join(map(str, adapters)))
        scored = _by_text(base, questions) if by_text else _by_letter(base, questions, system)
    chance = multiple_choice_chance([len(q.choices) for q in questions], [q.gold for q in questions])
    return ScoreReport(sum(one.correct for one in scored) / len(scored), chance, tuple(scored))


def export_cell(
    recipe: Recipe, store: Store, folder: Path, source: str, behavior: str, epoch: int, **others: Any
) -> list[Path]:
    """Write a cell's stack twice: as one concatenated PEFT adapter, and as its separate adapters with stack.json.

    Raises InputError if the cell is not trained, StoreError if the folder cannot be written.
    """
    graph = Graph(recipe)
    plan = graph.select(source, behavior, epoch, **others)[0]
    if plan.snapshot is None and plan.adapter is None:
        raise InputError(
            "this cell is the bare base: there is nothing to export",
            where=plan.cell.label,
            fix="choose a later epoch or a behavior",
        )
    adapters = Stacks(graph, store).adapters(
        {n: s for n, s in (("snapshot", plan.snapshot), ("behavior", plan.adapter)) if s is not None}
    )
    reference = BaseReference(recipe.model.id, recipe.model.revision)
    return [
        export_concatenated(adapters, reference, folder / "concatenated"),
        export_separate(adapters, reference, folder / "separate"),
    ]


def _by_letter(base: Any, questions: Sequence[Question], system: SystemTurn) -> list[ScoredQuestion]:
    items = [letter_item(base.tokenizer, base.tokenizer.prompt_text(system, q.user), q.labels) for q in questions]
    found = score_letters(base, items, BATCH_TOK)
    return [
        ScoredQuestion(q.id, q.answer, q.labels[s.predicted], s.predicted == q.gold, s.logprobs, s.mass)
        for q, s in zip(questions, found, strict=True)
    ]


def _by_text(base: Any, questions: Sequence[Question]) -> list[ScoredQuestion]:
    items = [text_item(base.tokenizer, f"Question: {q.text}\nAnswer:", q.choices) for q in questions]
    found = score_texts(base, items, BATCH_TOK)
    return [
        ScoredQuestion(q.id, q.answer, q.labels[s.predicted], s.predicted == q.gold, s.logprobs, None)
        for q, s in zip(questions, found, strict=True)
    ]
