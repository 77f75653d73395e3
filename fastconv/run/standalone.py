"""Scoring a question file and exporting a cell's adapters without a run, for `score` and `export`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastconv.audit.checks import Finding
from fastconv.chat import SystemTurn
from fastconv.datasets.questions import Question, read_arc
from fastconv.datasets.rows import Row, require_plain_text
from fastconv.engine.export import (
    BaseReference,
    export_concatenated,
    export_separate,
    load_peft_folder,
    targets_of,
)
from fastconv.engine.locate import model_folder
from fastconv.engine.model import Base, load_base
from fastconv.engine.score import letter_item, memory_errors, score_letters, score_texts, text_item
from fastconv.engine.stack import Slot, Stack
from fastconv.errors import AdapterError, InputError
from fastconv.experiment.graph import Graph
from fastconv.experiment.recorded import graph_of_run
from fastconv.recipe import LoraSettings, ModelSettings, Recipe
from fastconv.run.audit import READ_BY_CHECK
from fastconv.run.stacks import Stacks
from fastconv.run.training import read_set
from fastconv.stats.bounds import multiple_choice_chance
from fastconv.store.io import storage_errors, write_atomically
from fastconv.store.ledger import Stage, Store

#: What of a model's folder is its tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
#: Tokens per batch; the default of a recipe's evaluation.
BATCH_TOK = 16384


@dataclass(frozen=True)
class ScoredQuestion:
    """A scored question. `logprobs` are log-probabilities (nats) of its labels or texts, in their order."""

    id: str
    gold: str
    predicted: str
    correct: bool
    logprobs: tuple[float, ...]
    #: Probability that the next token is any of the labels; None when texts are scored.
    mass: float | None


@dataclass(frozen=True)
class ScoreReport:
    """Scored questions, with accuracy and chance accuracy as shares."""

    accuracy: float
    chance: float
    questions: tuple[ScoredQuestion, ...]


def score_file(
    model: ModelSettings,
    adapters: Sequence[Path],
    questions_file: Path,
    system: SystemTurn,
    *,
    by_text: bool,
    same_weights: Sequence[str] = (),
) -> ScoreReport:
    """Score a question file (in ARC's formats) under a base with these adapters (PEFT folders) stacked in order.

    Questions are scored by letter, as in the protocol, or with `by_text` by the choices' texts, as in lm-eval's
    arc_challenge. `same_weights` are other names of this base that adapters may state. Raises ModelError, AdapterError
    or DataError.
    """
    questions = read_arc(questions_file)
    with memory_errors(model.id):
        base = load_base(model)
    said = ((f"the question {q.id}", q.user, str(questions_file)) for q in questions)
    require_plain_text([("the system turn", system.text, "--system"), *said], base.tokenizer)
    with memory_errors(str(questions_file)), _adapted(base, model, adapters, same_weights):
        scored = _by_text(base, questions) if by_text else _by_letter(base, questions, system)
    chance = multiple_choice_chance([len(q.choices) for q in questions], [q.gold for q in questions])
    return ScoreReport(sum(question.correct for question in scored) / len(scored), chance, tuple(scored))


@contextlib.contextmanager
def _adapted(base: Base, model: ModelSettings, adapters: Sequence[Path], same_weights: Sequence[str]) -> Iterator[None]:
    """Within the block these adapters are live on the base; a bare base needs no layers that could carry one."""
    if not adapters:
        yield
        return
    named = ", ".join(map(str, adapters))
    targets = sorted({name for path in adapters for name in targets_of(path)})
    try:
        stack = Stack(base, LoraSettings(targets=tuple(targets)))
    except AdapterError as error:
        raise AdapterError(
            f"it targets what carries no adapter here: {error.what}", where=named, fix="train it without that layer"
        ) from None
    reference = BaseReference(model.id, model.revision, tuple(same_weights))
    loaded = tuple(load_peft_folder(stack, path, reference) for path in adapters)
    with stack.live(Slot(frozen=loaded)):
        stack.prove(None, named)
        yield


def read_by_the_base(graph: Graph, store: Store | None, sets: Sequence[tuple[Stage, Sequence[Row]]]) -> list[Finding]:
    """What the base, loaded for it, finds in these sets of rows, for `check --with-model`. Raises ModelError."""
    base = load_base(graph.recipe.model, graph.source)
    return [finding for stage, rows in sets for finding in read_set(graph, store, base, stage, rows, READ_BY_CHECK)]


def export_cell(
    recipe: Recipe, store: Store, folder: Path, source: str, behavior: str, epoch: int, **others: Any
) -> list[Path]:
    """Write a cell's stack twice: as one concatenated PEFT adapter with the base's tokenizer, and as separate adapters
    with stack.json.

    Returns both folders. Raises InputError if the cell is not trained, StoreError if the folder cannot be written.
    """
    graph = graph_of_run(recipe, store)
    plan = graph.select(source, behavior, epoch, **others)[0]
    if plan.snapshot is None and plan.adapter is None:
        raise InputError(
            "this cell is the bare base: there is nothing to export",
            where=plan.cell.label,
            fix="choose a later epoch or a behavior",
        )
    needs = {n: s for n, s in (("snapshot", plan.snapshot), ("behavior", plan.adapter)) if s is not None}
    if missing := [stage.slot for stage in needs.values() if store.record(stage.key) is None]:
        raise InputError(
            f"the cell is not trained yet ({', '.join(missing)} is not computed)",
            where=plan.cell.label,
            fix=f"fastconv cell {source} {behavior} --epoch {epoch} --recipe RECIPE trains it",
        )
    adapters = Stacks(graph, store).adapters(needs)
    reference = BaseReference(recipe.model.id, recipe.model.revision)
    whole = export_concatenated(adapters, reference, folder / "concatenated")
    for path in sorted(model_folder(graph.source, recipe.model).iterdir()):
        if path.name in TOKENIZER_FILES:
            with storage_errors(folder):
                write_atomically(whole / path.name, path.read_bytes())
    return [whole, export_separate(adapters, reference, folder / "separate")]


def _by_letter(base: Any, questions: Sequence[Question], system: SystemTurn) -> list[ScoredQuestion]:
    items = [letter_item(base.tokenizer, base.tokenizer.prompt_text(system, q.user), q.labels) for q in questions]
    scores = score_letters(base, items, BATCH_TOK)
    return [
        ScoredQuestion(q.id, q.answer, q.labels[s.predicted], s.predicted == q.gold, s.logprobs, s.mass)
        for q, s in zip(questions, scores, strict=True)
    ]


def _by_text(base: Any, questions: Sequence[Question]) -> list[ScoredQuestion]:
    items = [text_item(base.tokenizer, f"Question: {q.text}\nAnswer:", q.choices) for q in questions]
    scores = score_texts(base, items, BATCH_TOK)
    return [
        ScoredQuestion(q.id, q.answer, q.labels[s.predicted], s.predicted == q.gold, s.logprobs, None)
        for q, s in zip(questions, scores, strict=True)
    ]
