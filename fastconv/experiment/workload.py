"""What each stage of a recipe has to work through: tokens read, drawn and trained, steps, judgements. No tokenizer.

Counted from the stages' own work (prompts, rows, questions). Tokens are estimated from characters, and drawn answers have
the length that they are expected to have, because neither is known before a model is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from fastconv.datasets.questions import HUB_FILE, Question, QuestionSet, load_questions, read_split
from fastconv.datasets.rows import Row
from fastconv.experiment.graph import Graph
from fastconv.hub import cached_file
from fastconv.store.records import Stage

#: English characters per token, and tokens of a chat template around a system and a user turn. On the rows of the demo
#: the two give the tokenizer's counts within 15 % (Qwen2.5's and SmolLM2's).
CHARS_PER_TOK, TEMPLATE_TOK = 4.2, 15
#: Tokens of one letter's line beside its text, in a multiple-choice prompt.
LABEL_TOK = 2
#: An answer ends by itself after about as many tokens (256 on average under a limit of 512, as published).
EXPECTED_ANSWER_TOK = 256
#: Prompts that are in the model at once while sampling, by device: what `engine.sample` takes.
SAMPLED_ROWS = {"cpu": 64, "cuda": 1024}
#: A question of ARC-Challenge as it is on average, where the questions are not at hand.
_ARC_QUESTION, _ARC_CHOICE = "x" * 125, "x" * 26


@dataclass(frozen=True)
class Demand:
    """What a stage works through. `new_tok` are drawn one after another in `decode_steps` passes, at most `worst_tok`.

    `length_tok` is the mean length of a row, `share` the part of its tokens that carries loss.
    """

    trained_tok: float = 0.0
    steps: int = 0
    read_tok: float = 0.0
    new_tok: float = 0.0
    worst_tok: float = 0.0
    decode_steps: float = 0.0
    judged: int = 0
    samples: int = 0
    length_tok: float = 0.0
    share: float = 0.0


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
    rows = SAMPLED_ROWS[device]
    count: dict[str, Callable[[Graph, Stage], Demand]] = {
        "answers": lambda graph, stage: _drawn(stage, rows), "snapshot": _snapshot, "behavior": _behavior,
        "eval": lambda graph, stage: _eval(graph, stage, rows, device), "judge": _judge,
        "geometry": lambda graph, stage: _geometry(graph, stage, device),
    }  # fmt: skip
    found: dict[tuple[str, ...], Demand] = {}
    by_stage: dict[str, Demand] = {}
    for stage in stages:
        alike = _alike(stage)
        if alike not in found:
            found[alike] = count[stage.kind](graph, stage) if stage.kind in count else Demand()
        by_stage[stage.key] = found[alike]
    return by_stage


def _alike(stage: Stage) -> tuple[str, ...]:
    """Equal for stages of one recipe with equal demand: adapters train the same rows on every snapshot, and probes are
    asked the same prompts on every stack."""
    if stage.kind == "behavior":
        return stage.kind, stage.needs["rows"].key
    if stage.kind == "eval":
        return stage.kind, stage.inputs["measure"], stage.inputs["prompts_sha256"], *stage.inputs["system"]
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


def text_tok(text: str) -> float:
    """Tokens of a text, estimated."""
    return len(text) / CHARS_PER_TOK


def prompt_tok(system: Sequence[str], user: str) -> float:
    """Tokens of a rendered prompt, estimated; `system` is (kind, text)."""
    return TEMPLATE_TOK + text_tok(system[1]) + text_tok(user)


def expected_tok(max_new_tok: int) -> float:
    """Tokens that an answer is expected to have under a limit."""
    return float(min(max_new_tok, EXPECTED_ANSWER_TOK))


def _drawn(stage: Stage, at_once: int) -> Demand:
    """Completions: `per_prompt` of each item, `at_once` of them together; equal prompts are read once."""
    items = stage.work["prompts"] if stage.kind == "answers" else stage.work["items"]
    n, limit = len(items) * stage.inputs["per_prompt"], stage.inputs["sampling"]["max_new_tok"]
    read = sum(prompt_tok(stage.inputs["system"], user) for _, user in items)
    return Demand(
        read_tok=read, new_tok=n * expected_tok(limit), worst_tok=float(n * limit),
        decode_steps=limit * math.ceil(n / at_once), samples=n, length_tok=read / max(1, len(items)) + limit / 2,
    )  # fmt: skip


def _eval(graph: Graph, stage: Stage, at_once: int, device: str) -> Demand:
    if stage.inputs["measure"] != "letters":
        return _drawn(stage, at_once)
    own = [text_tok(user) + LABEL_TOK * user.count("\n") + TEMPLATE_TOK / 2 for _, user in stage.work["items"]]
    read = _read([stage.inputs["system"]], own, graph.recipe.eval.batch_tok, device)
    return Demand(read_tok=read, samples=len(own), length_tok=read / max(1, len(own)))


def _geometry(graph: Graph, stage: Stage, device: str) -> Demand:
    """Every persona reads every question."""
    systems = [system for _, *system in stage.inputs["personas"]]
    own = [text_tok(user) + TEMPLATE_TOK / 2 for _, user in stage.work["items"]]
    read = _read(systems, own, graph.recipe.eval.batch_tok, device)
    return Demand(read_tok=read, length_tok=read / max(1, len(own) * len(systems)))


def _read(systems: Sequence[Sequence[str]], own_tok: Sequence[float], batch_tok: int, device: str) -> float:
    """Tokens read when each of these system turns meets each of these questions, which have so many tokens of their own.

    A GPU reads every prompt whole; a CPU reads a system turn once for each batch (`engine.score.laid_out`).
    """
    begins, own = sum(text_tok(text) + TEMPLATE_TOK / 2 for _, text in systems), len(systems) * sum(own_tok)
    whole = own + len(own_tok) * begins
    return whole if device == "cuda" else own + min(len(own_tok), max(1.0, whole / batch_tok)) * begins


def _snapshot(graph: Graph, stage: Stage) -> Demand:
    """The epochs between the snapshot before it and this one: one training gives them all."""
    settings, answers = graph.recipe.convergence, stage.needs["answers"]
    earlier = [s.inputs["epoch"] for s in graph.lineage(stage) if s.inputs["epoch"] < stage.inputs["epoch"]]
    n_epochs = stage.inputs["epoch"] - max(earlier, default=0)
    drawn = expected_tok(settings.sampling.max_new_tok)
    prompts = [prompt_tok(stage.inputs["system"], user) for _, user in answers.work["prompts"]]
    n_rows = len(prompts) * answers.inputs["per_prompt"]
    length = min(sum(prompts) / max(1, len(prompts)) + drawn, settings.max_length_tok)
    return _trained(n_rows, n_epochs, length, drawn / length, settings.batch_rows)


def _behavior(graph: Graph, stage: Stage) -> Demand:
    rows: Sequence[Row] = stage.needs["rows"].work["rows"]
    settings = graph.recipe.behavior
    drawn = expected_tok(settings.sampling.max_new_tok)
    lengths, learned = [], []
    for row in rows:
        turn = row.system_turn(graph.personas)
        answer = (drawn if row.completion is None else text_tok(row.completion)) + 1
        lengths.append(prompt_tok((turn.kind, turn.text), row.user) + answer)
        learned.append(text_tok(row.suffix) + 1 if row.supervise == "tail" else answer)
    length = sum(lengths) / max(1, len(lengths))
    share = sum(learned) / max(1.0, sum(lengths))
    return _trained(len(rows), settings.epochs, min(length, settings.max_length_tok), share, settings.batch_rows)


def _trained(n_rows: int, n_epochs: int, length_tok: float, share: float, batch_rows: int) -> Demand:
    steps = n_epochs * math.ceil(n_rows / batch_rows)
    return Demand(trained_tok=n_rows * n_epochs * length_tok, steps=steps, length_tok=length_tok, share=share)


def _judge(graph: Graph, stage: Stage) -> Demand:
    """Judgements of an evaluation's completions. The resident base reads them itself, the rubric once for a batch."""
    drawn = _drawn(stage.needs["eval"], 1)
    rubric = stage.work["rubric"]
    if graph.judges_outside:
        return Demand(judged=drawn.samples)
    options = sum(len(option.meaning) + len(option.name) for measure in rubric.measures for option in measure.options)
    limit = stage.needs["eval"].inputs["sampling"]["max_new_tok"]
    questions = [text_tok(user) for _, user in stage.needs["eval"].work["items"]]
    each = sum(questions) / max(1, len(questions)) + expected_tok(limit) + 60
    asked = drawn.samples * len(rubric.measures)
    read = asked * each + drawn.samples * options / CHARS_PER_TOK + len(rubric.measures) * text_tok(rubric.system)
    return Demand(read_tok=read, judged=drawn.samples, length_tok=each + text_tok(rubric.system))


def _stand_in(identity: str) -> Question:
    return Question(identity, _ARC_QUESTION, ("A", "B", "C", "D"), (_ARC_CHOICE,) * 4, "A")


def _arc_in_cache() -> bool:
    """Whether the hub's file is on this disk; nothing is fetched."""
    split = read_split()
    return cached_file(split.dataset, HUB_FILE, split.revision, "dataset") is not None


def settings_of(found: Demand) -> Mapping[str, Any]:
    """A demand as JSON, without what is zero."""
    return {one.name: round(value, 3) for one in fields(found) if (value := getattr(found, one.name))}
