"""Ours against the usual way, in one call: `bench("train", "builtin:smollm2")`."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

from fastconv.bench.inference import bench_sample, bench_score, bench_stack
from fastconv.bench.kernels import bench_kernel
from fastconv.bench.measure import (
    RANDOM,
    BenchModel,
    BenchResult,
    Clock,
    Measured,
    base_shape,
    bench_model,
    ragged_rows,
)
from fastconv.bench.training import WARM_UP, Load, bench_engine, bench_train, make_jobs, time_jobs
from fastconv.engine.generate import sample
from fastconv.engine.locate import engine_identity, locate
from fastconv.engine.model import Base
from fastconv.engine.score import LetterItem, score_letters
from fastconv.engine.shapes import ModelShape, Work, forward_flops_per_tok, train_flops_per_tok, weight_bytes
from fastconv.engine.stack import Stack
from fastconv.errors import InputError
from fastconv.planning.hardware import probe_stage
from fastconv.planning.plan import known_shape
from fastconv.recipe import ModelSettings, Recipe, SamplingSettings
from fastconv.store.ledger import Store

#: Steps, questions, rows: the shares that the protocol's 800-row cell has, made small on a CPU.
_SIZES = {"cpu": (2, 16, 8), "cuda": (50, 586, 512)}


def bench_cell(model: BenchModel) -> BenchResult:
    """The parts one after another in this process, each measured as by itself; seconds are their sums.

    The usual way as published: checkpointing on, one question at a time with all logits, and the merged model written
    and loaded twice, once to train on it and once to evaluate it.
    """
    steps, questions, rows = _SIZES[model.device.type]
    parts = (
        (bench_stack(model, 1), 2), (bench_train(model, steps), 1), (bench_score(model, questions), 1),
        (bench_sample(model, rows), 1),
    )  # fmt: skip
    ours = sum(part.ours.seconds * times for part, times in parts)
    theirs = sum(part.usual[-1].seconds * times for part, times in parts)
    ratio = theirs / ours
    return BenchResult(
        kind="cell", model=model.settings.id, device=model.device.type, dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(), unit="cells",
        work=f"2 swaps, {steps} steps, {questions} questions, {rows} completions",
        ours=Measured("fastconv", ours, 1 / ours, _peak([part.ours for part, _ in parts])),
        usual=(
            Measured(
                "as published", theirs, 1 / theirs, _peak([part.usual[-1] for part, _ in parts]),
                sum(part.usual[-1].written_bytes * times for part, times in parts),
            ),
        ),
        ratio=ratio, ratios={"as published": ratio},
        extra={part.kind: {"ours_s": part.ours.seconds * times, "usual_s": part.usual[-1].seconds * times}
               for part, times in parts},
    )  # fmt: skip


def _peak(ways: list[Measured]) -> int | None:
    known = [way.peak_bytes for way in ways if way.peak_bytes is not None]
    return max(known) if known else None


__all__ = ["KINDS", "BenchResult", "BenchModel", "bench", "compare", "bench_model"]

KINDS = ("train", "behavior", "group", "score", "stack", "sample", "cell", "kernel", "engine")


def compare(kind: str, model: BenchModel, size: int | None = None) -> BenchResult:
    """Run one comparison. `size` is its number of steps, questions, swaps, rows or tokens; None takes the documented one.

    Raises InputError for an unknown kind.
    """
    if kind in ("train", "behavior", "group"):
        return bench_train(model, size or (8 if model.device.type == "cpu" else 48), kind)
    if kind == "score":
        return bench_score(model, size or 128)
    if kind == "stack":
        return bench_stack(model, size or 3)
    if kind == "sample":
        return bench_sample(model, size or 64)
    if kind == "cell":
        return bench_cell(model)
    if kind == "kernel":
        return bench_kernel(model, size)
    if kind == "engine":
        return bench_engine(model, size or 48)
    raise InputError(f"no comparison is called {kind!r}", where="bench", fix=f"use one of {', '.join(KINDS)}")


def bench(kind: str, model: str, *, device: str = "auto", dtype: str = "auto", revision: str = "",
          size: int | None = None) -> dict[str, Any]:  # fmt: skip
    """`compare` for a model given as in a recipe, or as `random:SHAPE`; returns plain JSON values.

    At least `ours`, `usual` and `ratio` (ours over the first usual way; above 1 means ours is faster).
    """
    # Not `auto`: importing Unsloth patches transformers for the whole process, the usual way's side included.
    given = {"id": model, "device": device, "dtype": dtype, "revision": revision, "engine": "torch"}
    settings = ModelSettings.model_validate(given)
    return asdict(compare(kind, bench_model(settings), size))


#: Optimizer steps counted and not, questions, prompts and new tokens of each, by device: about six seconds of each.
_STEPS = {"cpu": 6, "cuda": 60}
#: Rows as the demo has them, and as the protocol has them.
LOADS = {"cpu": Load("behavior", 4, 40, 80, n_frozen=1), "cuda": Load("behavior", 4, 200, 400, n_frozen=1)}
_QUESTIONS = {"cpu": 24, "cuda": 1200}
_PROMPTS = {"cpu": (24, 12), "cuda": (320, 128)}
#: Above this many weights a CPU would need minutes for a figure that nobody runs.
_MOST_ON_CPU = 1e9


def measure_machine(recipe: Recipe, store: Store) -> dict[str, float]:
    """Measure this machine with the recipe's shape and keep the rates in the workspace. Raises InputError if it cannot."""
    found, device = known_shape(recipe), engine_identity(recipe.model)["device"]
    if device == "cpu" and found.total_params > _MOST_ON_CPU:
        raise InputError(
            f"there is no GPU here to measure with {found.name}", where="--measure",
            fix="measure on the machine that will run it, or plan with --machine",
        )  # fmt: skip
    stage = probe_stage(recipe, found, device, time.time())
    with store.lease(stage):
        began = time.perf_counter()
        rates = probe(_subject(recipe, found))
        store.commit(stage, outputs=rates, facts={}, seconds=time.perf_counter() - began)
    return rates


def probe(model: BenchModel) -> dict[str, float]:
    """Rates of this machine: FLOP/s trained, read and drawn, and seconds to load."""
    began = time.perf_counter()
    base = model.base()
    loaded = time.perf_counter() - began
    stack, form = Stack(base, model.lora), base_shape(base)
    rates = {"train_flops_s": _training(stack, form), "read_flops_s": _reading(base, form), **_drawing(base, form)}
    return {**rates, "step_s": 0.0, "load_s": loaded}


def _subject(recipe: Recipe, found: ModelShape) -> BenchModel:
    """The recipe's own model where it is on this disk, else random weights of its shape."""
    at_hand = locate(recipe.model).kind in ("builtin", "local")
    name = recipe.model.id if at_hand else f"{RANDOM}{found.name}"
    return bench_model(recipe.model.model_copy(update={"id": name}))


def _training(stack: Stack, form: ModelShape) -> float:
    """Steps of a behavior above a frozen snapshot, as most steps of a run are. Optimizer and set-up are in the rate."""
    device = stack.base.device.type
    load = LOADS[device]
    job = make_jobs(stack, load, WARM_UP[device] + _STEPS[device])[0]
    found = time_jobs(stack, [job])
    lengths = [len(row.ids) for row in job.rows]
    work = Work(sum(lengths) / len(lengths), 0.6, stack.settings.r)
    return found.n_tok * train_flops_per_tok(form, work) / sum(found.seconds)


def _reading(base: Base, form: ModelShape) -> float:
    """Multiple choice by letter, on prompts that share nothing."""
    rows = ragged_rows(_QUESTIONS[base.device.type], form.vocab, 60, 110, seed=1)
    items = [LetterItem(row.ids, (11, 12, 13, 14)) for row in rows]
    clock = Clock(base.device)
    score_letters(base, items[:4], 1024)
    with clock.running():
        score_letters(base, items, 4096)
    n_tok = sum(len(row.ids) for row in rows)
    return n_tok * forward_flops_per_tok(form, Work(n_tok / len(rows), 0.0, 0)) / clock.seconds


def _drawing(base: Base, form: ModelShape) -> dict[str, float]:
    """Seconds of a pass that serves one row, and the rate of what each further row adds to it."""
    n, new_tok = _PROMPTS[base.device.type]
    prompts = [list(row.ids) for row in ragged_rows(n, form.vocab, 30, 50, seed=2)]
    one, all_of = Clock(base.device), Clock(base.device)
    sample(base, prompts[:4], list(range(4)), SamplingSettings(max_new_tok=2))
    with one.running():
        said = sample(base, prompts[:1], [0], SamplingSettings(max_new_tok=new_tok))
    pass_s = one.seconds / max(1, len(said[0].ids) + said[0].ended)
    with all_of.running():
        drawn = sample(base, prompts, list(range(n)), SamplingSettings(max_new_tok=new_tok))
    n_tok = sum(len(row.ids) + row.ended for row in drawn)
    own_s = max(all_of.seconds - new_tok * pass_s, 0.1 * all_of.seconds)
    work = Work(60.0, 1.0, 0)
    return {
        "draw_flops_s": n_tok * forward_flops_per_tok(form, work) / own_s, "pass_s": pass_s,
        "memory_bytes_s": weight_bytes(form) * base.dtype.itemsize / 2 / pass_s,
    }  # fmt: skip
