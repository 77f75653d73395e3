"""Training steps: ours against SFTTrainer + PEFT (padded batches), with and without gradient checkpointing."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass

import torch

from fastconv.bench.measure import Clock, Comparison, Peak, matmul_ceiling, measured, paired_ratio
from fastconv.bench.subject import Subject, ragged_rows, shape
from fastconv.engine.reference import TrlOptions, train_with_trl
from fastconv.engine.stack import Adapter, Stack
from fastconv.engine.train import Hooks, Job, Trainee, start, train
from fastconv.recipe import TrainSettings
from fastconv.shapes import ModelShape, Work, train_flops_per_tok

#: Steps that are run and not counted: the first allocates and chooses kernels, in the second memory is watched (which
#: costs time: what was freed is given back to the system first).
WARM_UP = 2
BATCH_ROWS, SHORTEST_TOK, LONGEST_TOK = 4, 20, 300
#: The usual ways, the first being the stronger one; as published had checkpointing on.
WAYS = {"TRL padded": False, "TRL padded, checkpointing": True}


@dataclass
class _Ours:
    """Our loop, taken step by step; `clock` has one block a step."""

    stack: Stack
    trainee: Trainee
    clock: Clock
    peak: Peak

    def step(self) -> None:
        """One optimizer step."""
        watched = self.peak.watching() if self.trainee.step == WARM_UP - 1 else contextlib.nullcontext()
        with watched, self.clock.running():
            train(self.stack, [self.trainee], Hooks(), until_step=self.trainee.step + 1)


def bench_train(model: Subject, n_steps: int) -> Comparison:
    """`n_steps` optimizer steps on ragged rows (20 to 300 tokens, batch 4), counted in real tokens, not padding.

    On a CPU each of our steps is timed right after the same step of theirs, so that a busy machine slows both; on a
    GPU, which nobody disturbs, one model is held at a time.
    """
    ceiling = matmul_ceiling(model.device, model.dtype)
    stack = Stack(model.base(), model.lora)
    rows = ragged_rows((n_steps + WARM_UP) * BATCH_ROWS, stack.base.head.weight.shape[0], SHORTEST_TOK, LONGEST_TOK)
    job = Job("bench", rows, TrainSettings(lr=5e-5, epochs=1, batch_rows=BATCH_ROWS, dropout=0.0), ("bench", 42))
    first, form = stack.new_adapter(*job.seed_parts), shape(stack.base)
    if model.device.type == "cpu":
        pairs = {name: _interleaved(model, stack, job, first, again) for name, again in WAYS.items()}
        mine = next(iter(pairs.values()))[0]
        theirs = {name: usual for name, (_, usual) in pairs.items()}
        ratios = {name: paired_ratio(usual.seconds, ours.seconds) for name, (ours, usual) in pairs.items()}
    else:
        mine = _alone(stack, job)
        del stack
        _free()
        theirs = {name: _usual(model, job, first, again) for name, again in WAYS.items()}
        ratios = {name: paired_ratio(usual.seconds, mine.seconds) for name, usual in theirs.items()}
    return _comparison(model, job, form, ceiling, mine, theirs, ratios)


@dataclass(frozen=True)
class _Run:
    """Seconds of every counted step, and the peak memory of one (bytes above what was resident)."""

    seconds: list[float]
    peak: int | None


def _interleaved(model: Subject, stack: Stack, job: Job, first: Adapter, checkpointing: bool) -> tuple[_Run, _Run]:
    """(ours, theirs), step by step in turn."""
    ours = _Ours(stack, start(stack, job), Clock(model.device), Peak(model.device))
    usual = _usual(model, job, first, checkpointing, ours)
    return _Run(ours.clock.blocks[WARM_UP:], ours.peak.bytes), usual


def _alone(stack: Stack, job: Job) -> _Run:
    device = stack.base.device
    ours = _Ours(stack, start(stack, job), Clock(device), Peak(device))
    for _ in range(job.n_steps):
        ours.step()
    return _Run(ours.clock.blocks[WARM_UP:], ours.peak.bytes)


def _usual(model: Subject, job: Job, first: Adapter, checkpointing: bool, ours: _Ours | None = None) -> _Run:
    """Their whole run; after each of their steps, one of `ours` if given."""
    seconds: list[float] = []
    peak, watched = Peak(model.device), contextlib.ExitStack()

    def on_step(step_seconds: float) -> None:
        seconds.append(step_seconds)
        watched.close()
        if ours is not None:
            ours.step()
        if len(seconds) == WARM_UP - 1:
            watched.enter_context(peak.watching())

    plain = model.plain()
    train_with_trl(plain, job, first, TrlOptions(gradient_checkpointing=checkpointing, on_step=on_step))
    del plain
    _free()
    return _Run(seconds[WARM_UP:], peak.bytes)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _comparison(
    model: Subject, job: Job, form: ModelShape, ceiling: float, ours: _Run, theirs: dict[str, _Run],
    ratios: dict[str, float],
) -> Comparison:  # fmt: skip
    counted = [job.rows[i] for step in range(WARM_UP, job.n_steps) for i in job.batch(step)]
    n_tok = sum(len(row.ids) for row in counted)
    work = Work(n_tok / len(counted), sum(row.n_supervised for row in counted) / n_tok, model.lora.r)
    flops = n_tok * train_flops_per_tok(form, work)
    return Comparison(
        kind="train", model=model.settings.id, device=model.device.type, dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(), unit="tokens",
        work=f"{job.n_steps - WARM_UP} steps of {BATCH_ROWS} rows, {SHORTEST_TOK} to {LONGEST_TOK} tokens, {n_tok} in all",
        ours=measured("fastconv, packed", sum(ours.seconds), n_tok, flops, ceiling, ours.peak),
        usual=tuple(measured(name, sum(run.seconds), n_tok, flops, ceiling, run.peak) for name, run in theirs.items()),
        ratio=next(iter(ratios.values())), ratios=ratios, extra={"matmul_flops": ceiling},
    )  # fmt: skip
