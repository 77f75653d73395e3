"""The registry of stage kinds: one row for each, with its version, and what it costs a plan.

A measure of a snapshot itself (no behavior trained, no probe asked) is one row of `SNAPSHOT_MEASURES`: when a recipe wants
it, the inputs that its result depends on, its demand, and the columns of its table beside the report. How it is computed
is one entry of `run.executor.SNAPSHOT_COMPUTE`, how it is reported one section of `report.SECTIONS`. No torch, no tokenizer.

Demand is counted from a stage's own work (prompts, rows, questions). Tokens are estimated from characters, and drawn answers
have the length that they are expected to have, because neither is known before a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastconv.datasets.behaviors import (
    open_questions,
)
from fastconv.datasets.personas import ASSISTANT
from fastconv.engine.shapes import cached_tok, rows_at_once
from fastconv.recipe import Recipe, TrainSettings
from fastconv.store.records import Stage

if TYPE_CHECKING:
    from fastconv.datasets.rows import Row
    from fastconv.experiment.graph import Graph

#: English characters per token, and tokens of a chat template around a system and a user turn. On the rows of the demo
#: the two give the tokenizer's counts within 15 % (Qwen2.5's and SmolLM2's).
CHARS_PER_TOK, TEMPLATE_TOK = 4.2, 15
#: Tokens of one letter's line beside its text, in a multiple-choice prompt.
LABEL_TOK = 2
#: An answer ends by itself after about as many tokens, at any of them alike: that gives 221 under a limit of 512 and 162 under
#: 256, where a real 1.5B drew 222 and 155 (1,500 and 1,200 answers, 27 November 2026).
EXPECTED_ANSWER_TOK = 256
#: Share of the letters above an adapter that are near ties: with it 33 probes of a real 1.5B, whose letters hold little of the probability,
#: are planned at 0.7 of what they took on an H100. A base that answers in letters has fewer.
NEAR_TIES = 0.25
#: Depths at which personas are placed: shares of the model's layers.
GEOMETRY_DEPTHS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Demand:
    """What a stage works through: optimizer `steps` in `micro_steps` passes. `new_tok` are drawn one after another in
    `decode_steps` passes, at most `worst_tok`.

    Of the `read_tok` as many as `precise_tok` are read again in fp32. `length_tok` is the mean length of a row, `share` the part of its tokens that carries loss.
    """

    trained_tok: float = 0.0
    steps: int = 0
    micro_steps: int = 0
    read_tok: float = 0.0
    precise_tok: float = 0.0
    new_tok: float = 0.0
    worst_tok: float = 0.0
    decode_steps: float = 0.0
    judged: int = 0
    samples: int = 0
    length_tok: float = 0.0
    share: float = 0.0


@dataclass(frozen=True)
class Target:
    """What stages are counted for: a device (`cpu` or `cuda`), its memory, and the bytes that a token takes in the cache."""

    device: str
    memory_bytes: float = 0.0
    kv_tok_bytes: int = 1

    def rows_at_once(self, length_tok: float) -> int:
        """Prompts that are in the model at once while sampling, where the longest row has so many tokens."""
        return rows_at_once(self.device, cached_tok(math.ceil(length_tok)) * self.kv_tok_bytes, self.memory_bytes)


@dataclass(frozen=True)
class StageKind:
    """One kind of stage. Raise `version` when its results change for the same inputs: what was computed becomes stale.

    `demand(graph, stage, target)` is the work of one stage; None where it is next to nothing.
    """

    version: int
    demand: Callable[[Graph, Stage, Target], Demand] | None = None


@dataclass(frozen=True)
class SnapshotMeasure(StageKind):
    """A measure of a snapshot (at epoch 0, of the base). Its stages have kind `name` and keep their values as scores.

    `items` are (id, user text) of what is asked, `inputs` the other settings that the result depends on, beside engine and
    snapshot. `columns` name a score's row and
    sample in the measure's Parquet table.
    """

    name: str = ""
    wanted: Callable[[Recipe], bool] = lambda recipe: True
    inputs: Callable[[Graph], dict[str, Any]] = lambda graph: {}
    items: Callable[[Graph], list[tuple[str, str]]] = lambda graph: []
    columns: tuple[str, str] = ("row", "sample")


def text_tok(text: str) -> float:
    """Tokens of a text, estimated."""
    return len(text) / CHARS_PER_TOK


def prompt_tok(system: Sequence[str], user: str) -> float:
    """Tokens of a rendered prompt, estimated; `system` is (kind, text)."""
    return TEMPLATE_TOK + text_tok(system[1]) + text_tok(user)


def expected_tok(max_new_tok: int) -> float:
    """Tokens that an answer is expected to have under a limit."""
    return EXPECTED_ANSWER_TOK * -math.expm1(-max_new_tok / EXPECTED_ANSWER_TOK)


def _completions(stage: Stage, target: Target) -> Demand:
    """Completions: `per_prompt` of each item; equal prompts are read once. On a GPU the probes of a stack are drawn together,
    and so are the answers to be made: a stage is taken for a third of what shares its passes."""
    items = stage.work["prompts"] if stage.kind == "answers" else stage.work["items"]
    n, limit = len(items) * stage.inputs["per_prompt"], stage.inputs["sampling"]["max_new_tok"]
    prompts = [prompt_tok(stage.inputs["system"], user) for _, user in items]
    at_once, shared = target.rows_at_once(max(prompts, default=0.0) + limit), 1 if target.device == "cpu" else 3
    read = sum(prompts)
    return Demand(
        read_tok=read, new_tok=n * expected_tok(limit), worst_tok=float(n * limit),
        decode_steps=limit * math.ceil(shared * n / at_once) / shared, samples=n, length_tok=read / max(1, len(items)) + limit / 2,
    )  # fmt: skip


def _answers(graph: Graph, stage: Stage, target: Target) -> Demand:
    return _completions(stage, target)


def _eval(graph: Graph, stage: Stage, target: Target) -> Demand:
    if "sampling" in stage.inputs:
        return _completions(stage, target)
    own = [text_tok(user) + LABEL_TOK * user.count("\n") + TEMPLATE_TOK / 2 for _, user in stage.work["items"]]
    if choices := stage.work.get("choices"):
        own = [tok + sum(map(text_tok, choices[row])) for tok, (row, _) in zip(own, stage.work["items"], strict=True)]
    read = _read([stage.inputs["system"]], own, graph.recipe.eval.batch_tok, target.device)
    in_16_bits = target.device == "cuda" and graph.recipe.model.dtype != "float32"
    rescored = in_16_bits and stage.inputs["measure"] == "letters" and bool(stage.needs)
    near = NEAR_TIES * read if rescored else 0.0
    return Demand(read_tok=read, precise_tok=near, samples=len(own), length_tok=read / max(1, len(own)))


def _read(systems: Sequence[Sequence[str]], own_tok: Sequence[float], batch_tok: int, device: str) -> float:
    """Tokens read when each of these system turns meets each of these questions, which have so many tokens of their own.

    A GPU reads every prompt whole; a CPU reads a system turn once for each batch (`engine.score.laid_out`).
    """
    begins, own = sum(text_tok(text) + TEMPLATE_TOK / 2 for _, text in systems), len(systems) * sum(own_tok)
    whole = own + len(own_tok) * begins
    return whole if device == "cuda" else own + min(len(own_tok), max(1.0, whole / batch_tok)) * begins


def _snapshot(graph: Graph, stage: Stage, target: Target) -> Demand:
    """The epochs between the snapshot before it and this one: one training gives them all."""
    settings, answers = graph.recipe.convergence, stage.needs["answers"]
    earlier = [s.inputs["epoch"] for s in graph.lineage(stage) if s.inputs["epoch"] < stage.inputs["epoch"]]
    n_epochs = stage.inputs["epoch"] - max(earlier, default=0)
    drawn = expected_tok(settings.sampling.max_new_tok)
    prompts = [prompt_tok(stage.inputs["system"], user) for _, user in answers.work["prompts"]]
    n_rows = len(prompts) * answers.inputs["per_prompt"]
    length = min(sum(prompts) / max(1, len(prompts)) + drawn, settings.max_length_tok)
    return _trained(n_rows, n_epochs, length, drawn / length, settings)


def _behavior(graph: Graph, stage: Stage, target: Target) -> Demand:
    rows: Sequence[Row] = stage.needs["rows"].work["rows"]
    settings = graph.recipe.behavior
    drawn = expected_tok(settings.sampling.max_new_tok)
    lengths, learned = [], []
    for row in rows:
        turn = row.system_turn(graph.personas)
        answer = (drawn if row.completion is None else text_tok(row.completion)) + 1
        lengths.append(prompt_tok((turn.kind, turn.text), row.asked) + answer)
        earlier = sum(text_tok(one.answer) + 1 for one in row.history if one.trained)
        learned.append(earlier + (text_tok(row.suffix) + 1 if row.supervise == "tail" else answer))
    length = sum(lengths) / max(1, len(lengths))
    share = sum(learned) / max(1.0, sum(lengths))
    return _trained(len(rows), settings.epochs, min(length, settings.max_length_tok), share, settings)


def _trained(n_rows: int, n_epochs: int, length_tok: float, share: float, settings: TrainSettings) -> Demand:
    steps = n_epochs * math.ceil(n_rows / settings.batch_rows)
    micro_steps = steps * math.ceil(settings.batch_rows * length_tok / settings.micro_batch_tok)
    return Demand(n_rows * n_epochs * length_tok, steps, micro_steps, length_tok=length_tok, share=share)


def _judge(graph: Graph, stage: Stage, target: Target) -> Demand:
    """Judgements of an evaluation's completions. The resident base reads them itself, the rubric once for a batch."""
    drawn = _completions(stage.needs["eval"], target)
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


# --- geometry ------------------------------------------------------------------------------------------------


def _geometry_inputs(graph: Graph) -> dict[str, Any]:
    prompts = graph.personas.prompts
    return {
        "personas": [[persona, *graph.system(persona)] for persona in sorted(prompts)],
        "anchor": ASSISTANT,
        "depths": list(GEOMETRY_DEPTHS),
    }


def _geometry_demand(graph: Graph, stage: Stage, target: Target) -> Demand:
    """Every persona reads every question."""
    systems = [system for _, *system in stage.inputs["personas"]]
    own = [text_tok(user) + TEMPLATE_TOK / 2 for _, user in stage.work["items"]]
    read = _read(systems, own, graph.recipe.eval.batch_tok, target.device)
    return Demand(read_tok=read, length_tok=read / max(1, len(own) * len(systems)))


#: Where every known persona lies in the hidden space (#99: leakage grows with cosine similarity).
GEOMETRY = SnapshotMeasure(
    version=1, demand=_geometry_demand, name="geometry", wanted=lambda recipe: recipe.eval.geometry,
    inputs=_geometry_inputs, items=lambda graph: open_questions("marker"), columns=("persona", "layer"),
)  # fmt: skip

SNAPSHOT_MEASURES: tuple[SnapshotMeasure, ...] = (GEOMETRY,)

#: Every kind of stage by name.
KINDS: Mapping[str, StageKind] = {
    "answers": StageKind(1, _answers),
    "snapshot": StageKind(2, _snapshot),
    "rows": StageKind(1),
    "behavior": StageKind(2, _behavior),
    "eval": StageKind(1, _eval),
    "score": StageKind(1),
    "judge": StageKind(1, _judge),
    "imported": StageKind(1),
    **{measure.name: measure for measure in SNAPSHOT_MEASURES},
}


def snapshot_stages(graph: Graph, measure: str) -> list[Stage]:
    """The stages of a measure of snapshots, each once; cells of one snapshot share them."""
    found = {s.key: s for plan in graph.cells if (s := plan.on_snapshot.get(measure)) is not None}
    return list(found.values())
