"""About twenty seconds of training, reading and drawing on this machine, from which `plan` takes its rates."""

from __future__ import annotations

import time

from fastconv.bench.measure import Clock
from fastconv.bench.subject import RANDOM, Subject, ragged_rows, shape, subject
from fastconv.bench.training import WARM_UP, Load, jobs_for, timed
from fastconv.engine.model import Base
from fastconv.engine.locate import engine_identity, locate
from fastconv.engine.generate import sample
from fastconv.engine.score import LetterItem, score_letters
from fastconv.engine.stack import Stack
from fastconv.errors import InputError
from fastconv.planning.hardware import probe_stage
from fastconv.planning.plan import known_shape
from fastconv.recipe import Recipe, SamplingSettings
from fastconv.engine.shapes import ModelShape, Work, forward_flops_per_tok, train_flops_per_tok, weight_bytes
from fastconv.store.ledger import Store

#: Optimizer steps counted and not, questions, prompts and new tokens of each, by device: about six seconds of each.
_STEPS = {"cpu": 6, "cuda": 60}
#: Rows as the demo has them, and as the protocol has them.
LOADS = {"cpu": Load("behavior", 4, 40, 80, n_frozen=1), "cuda": Load("behavior", 4, 200, 400, n_frozen=1)}
_QUESTIONS = {"cpu": 24, "cuda": 1200}
_PROMPTS = {"cpu": (24, 12), "cuda": (320, 128)}
#: Above this many weights a CPU would need minutes for a figure that nobody runs.
_MOST_ON_CPU = 1e9


def keep_probe(recipe: Recipe, store: Store) -> dict[str, float]:
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


def probe(model: Subject) -> dict[str, float]:
    """Rates of this machine: FLOP/s trained, read and drawn, and seconds to load."""
    began = time.perf_counter()
    base = model.base()
    loaded = time.perf_counter() - began
    stack, form = Stack(base, model.lora), shape(base)
    rates = {"train_flops_s": _training(stack, form), "read_flops_s": _reading(base, form), **_drawing(base, form)}
    return {**rates, "step_s": 0.0, "load_s": loaded}


def _subject(recipe: Recipe, found: ModelShape) -> Subject:
    """The recipe's own model where it is on this disk, else random weights of its shape."""
    at_hand = locate(recipe.model).kind in ("builtin", "local")
    name = recipe.model.id if at_hand else f"{RANDOM}{found.name}"
    return subject(recipe.model.model_copy(update={"id": name}))


def _training(stack: Stack, form: ModelShape) -> float:
    """Steps of a behavior above a frozen snapshot, as most steps of a run are. Optimizer and set-up are in the rate."""
    device = stack.base.device.type
    load = LOADS[device]
    job = jobs_for(stack, load, WARM_UP[device] + _STEPS[device])[0]
    found = timed(stack, [job])
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
