"""Benchmarks of training: ours against SFTTrainer + PEFT (padded batches), and engine torch against engine unsloth.

There are three loads: `train` is convergence (one adapter, small batches), `behavior` an adapter with dropout above a
frozen one, `group` several convergence runs at once against the same runs one after another. SFTTrainer runs with and
without gradient checkpointing. As a script this module is the process that runs Unsloth (`main`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from fastconv.bench.measure import (
    BenchModel,
    BenchResult,
    Clock,
    Measured,
    Peak,
    base_shape,
    bench_model,
    matmul_ceiling,
    measured,
    paired_ratio,
    ragged_rows,
)
from fastconv.engine.lora import Adapter
from fastconv.engine.shapes import Work, train_flops_per_tok
from fastconv.engine.stack import Stack
from fastconv.engine.train import Hooks, Job, Trainee, captured_steps, start, train
from fastconv.engine.trl_reference import TrlOptions, train_with_trl
from fastconv.errors import ModelError
from fastconv.recipe import ModelSettings, TrainSettings
from fastconv.store.io import child_environment


@dataclass(frozen=True)
class Load:
    """A training load: batch size (rows), shortest and longest row (tokens), dropout, frozen adapters, number of
    jobs."""

    kind: str
    batch_rows: int
    shortest_tok: int
    longest_tok: int
    dropout: float = 0.0
    n_frozen: int = 0
    n_jobs: int = 1


#: Loads by kind and device: on a GPU the protocol's rows of 300 tokens on average, on a CPU short ones.
LOADS = {
    ("train", "cpu"): Load("train", 4, 20, 300),
    ("train", "cuda"): Load("train", 4, 200, 400),
    ("behavior", "cpu"): Load("behavior", 4, 20, 120, 0.05, 1),
    ("behavior", "cuda"): Load("behavior", 16, 200, 400, 0.05, 1),
    ("group", "cpu"): Load("group", 2, 20, 80, n_jobs=3),
    ("group", "cuda"): Load("group", 4, 200, 400, n_jobs=6),
}
#: Steps that are not timed. On a CPU the first allocates, and memory is measured in the second; a GPU captures graphs.
WARM_UP = {"cpu": 2, "cuda": 48}
#: Epochs of a load's schedule, of which the first is run: what is worth capturing depends on how much is to come.
_EPOCHS = 20
#: Steps of the usual ways on a GPU, and how many of them are not timed.
USUAL_STEPS, USUAL_WARM_UP = 12, 2
#: The usual ways, with or without gradient checkpointing: the first is faster, the second is as published.
BASELINES = {"TRL padded": False, "TRL padded, checkpointing": True}


@dataclass(frozen=True)
class Timed:
    """Seconds of each timed step (or of all together), their tokens, and the peak memory (bytes) above what was
    resident; on a GPU what was padded, launched, replayed and captured meanwhile (`cuda_graph.StepTally`)."""

    seconds: Sequence[float]
    n_tok: int
    peak: int | None
    steps: Mapping[str, float] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, float]:
        """`steps` as a benchmark reports it: padding as a share of the real tokens, seconds of captures as part of the
        whole."""
        if not self.steps:
            return {}
        padded, real = self.steps["padded_tok"], self.steps["n_tok"]
        counts = {name: self.steps[name] for name in ("launched", "replayed", "captures", "capture_s")}
        return {"padding": padded / real - 1 if real else 0.0, **counts}


def bench_train(model: BenchModel, n_steps: int, kind: str = "train") -> BenchResult:
    """Time `n_steps` optimizer steps of a load, in tokens per second without padding.

    On a CPU each of our steps is timed right after the same step of the usual way, so that other programs slow both; on
    a GPU one model is in memory at a time, and our steps, which overlap, are timed as a whole. Raises ModelError if no
    usual way fits on the GPU.
    """
    load = LOADS[kind, model.device.type]
    ceiling = matmul_ceiling(model.device, model.dtype)
    stack = Stack(model.base(), model.lora)
    jobs = make_jobs(stack, load, n_steps + WARM_UP[model.device.type])
    model_shape = base_shape(stack.base)
    first = stack.new_adapter(*jobs[0].seed_parts)
    ratios: dict[str, float] = {}
    usual_runs: dict[str, Timed] = {}
    if load.n_jobs > 1:
        ours_run, usual_runs = time_jobs(stack, jobs), {"one after another": _in_turn(stack, jobs)}
    elif model.device.type == "cpu":
        pairs = {
            name: _interleaved(model, stack, jobs[0], first, checkpointing) for name, checkpointing in BASELINES.items()
        }
        ours_run = next(iter(pairs.values()))[0]
        usual_runs = {name: usual for name, (_, usual) in pairs.items()}
        ratios = {name: paired_ratio(usual.seconds, ours.seconds) for name, (ours, usual) in pairs.items()}
    else:
        ours_run = time_jobs(stack, jobs)
        del stack
        free_memory()
        tried = {name: _if_it_fits(model, jobs[0], first, checkpointing) for name, checkpointing in BASELINES.items()}
        usual_runs = {name: run for name, run in tried.items() if run is not None}
    work = Work(mean_length(jobs[0]), supervised_share(jobs[0]), model.lora.r)
    flops_per_tok = train_flops_per_tok(model_shape, work)

    def as_measured(name: str, run: Timed) -> Measured:
        return measured(name, sum(run.seconds), run.n_tok, run.n_tok * flops_per_tok, ceiling, run.peak)

    ours = as_measured("fastconv, packed" if load.n_jobs == 1 else "fastconv, together", ours_run)
    usual = tuple(as_measured(name, run) for name, run in usual_runs.items())
    if not usual:
        raise ModelError(
            "no usual way fits on this GPU", where=f"bench {kind}", fix="take a larger GPU or a smaller model"
        )
    ratios = ratios or {baseline.name: ours.per_s / baseline.per_s for baseline in usual}
    left_out = [name for name in BASELINES if load.n_jobs == 1 and name not in usual_runs]
    return BenchResult(
        kind=load.kind, model=model.settings.id, device=model.device.type,
        dtype=str(model.dtype).removeprefix("torch."), threads=torch.get_num_threads(), unit="tokens",
        work=f"{n_steps} steps of {load.n_jobs} x {load.batch_rows} rows, {load.shortest_tok} to {load.longest_tok} "
        f"tokens, dropout {load.dropout:g}, {load.n_frozen} frozen adapters below; {ours_run.n_tok} tokens",
        ours=ours, usual=usual, ratio=next(iter(ratios.values())), ratios=ratios,
        extra={"matmul_flops": ceiling, "flops_per_tok": flops_per_tok, "out_of_memory": left_out, **ours_run.facts},
    )  # fmt: skip


def make_jobs(stack: Stack, load: Load, n_steps: int) -> list[Job]:
    """The jobs of a load, the same on every engine: rows, order and initial weights follow from the job's index."""
    settings = TrainSettings(lr=5e-5, epochs=_EPOCHS, batch_rows=load.batch_rows, dropout=load.dropout)
    frozen = tuple(stack.new_adapter("frozen", place) for place in range(load.n_frozen))
    for place, adapter in enumerate(frozen):
        adapter.flat.normal_(0.0, 0.01, generator=torch.Generator(adapter.flat.device).manual_seed(place))
    vocab = stack.base.head.weight.shape[0]
    return [
        Job(
            "bench", ragged_rows(n_steps * load.batch_rows, vocab, load.shortest_tok, load.longest_tok, place),
            settings, ("bench", 42 + place), frozen,
        )
        for place in range(load.n_jobs)
    ]  # fmt: skip


def time_jobs(stack: Stack, jobs: Sequence[Job]) -> Timed:
    """Time our training of all jobs together, after a warm-up, as one block."""
    device = stack.base.device
    trainees = [start(stack, job) for job in jobs]
    warm_up, clock, peak = WARM_UP[device.type], Clock(device), Peak(device)
    train(stack, trainees, Hooks(), until_step=warm_up)
    captured, end = captured_steps(stack), jobs[0].steps_per_epoch
    before = replace(captured.tally) if captured is not None else None
    with peak.watching(), clock.running():
        train(stack, trainees, Hooks(), until_step=end)
    steps = captured.tally.since(before) if captured is not None and before is not None else {}
    return Timed(clock.blocks, sum(_n_tok(job, warm_up, end) for job in jobs), peak.bytes, steps)


def _in_turn(stack: Stack, jobs: Sequence[Job]) -> Timed:
    runs = [time_jobs(stack, [job]) for job in jobs]
    peaks = [run.peak for run in runs if run.peak is not None]
    return Timed([sum(run.seconds) for run in runs], sum(run.n_tok for run in runs), max(peaks, default=None))


def _interleaved(model: BenchModel, stack: Stack, job: Job, first: Adapter, checkpointing: bool) -> tuple[Timed, Timed]:
    """(ours, the usual way), step by step in turn, on a CPU."""
    ours = _Ours(stack, start(stack, job), Clock(model.device), Peak(model.device))
    usual = _usual(model, job, first, checkpointing, job.steps_per_epoch, ours)
    warm_up = WARM_UP["cpu"]
    return Timed(ours.clock.blocks[warm_up:], _n_tok(job, warm_up, job.steps_per_epoch), ours.peak.bytes), usual


@dataclass
class _Ours:
    """Our training loop run step by step; `clock` has one block for each step."""

    stack: Stack
    trainee: Trainee
    clock: Clock
    peak: Peak

    def step(self) -> None:
        """Take one optimizer step."""
        watched = self.peak.watching() if self.trainee.step == WARM_UP["cpu"] - 1 else contextlib.nullcontext()
        with watched, self.clock.running():
            train(self.stack, [self.trainee], Hooks(), until_step=self.trainee.step + 1)


def _usual(
    model: BenchModel, job: Job, first: Adapter, checkpointing: bool, n_steps: int, ours: _Ours | None = None
) -> Timed:
    """Time `n_steps` of the usual way; after each step, one of `ours` if given."""
    seconds: list[float] = []
    peak, watched = Peak(model.device), contextlib.ExitStack()

    def on_step(step_seconds: float) -> None:
        seconds.append(step_seconds)
        watched.close()
        if ours is not None:
            ours.step()
        if len(seconds) == USUAL_WARM_UP - 1:
            watched.enter_context(peak.watching())

    plain = model.plain()
    options = TrlOptions(gradient_checkpointing=checkpointing, on_step=on_step, until_step=n_steps)
    train_with_trl(plain, job, first, options)
    del plain
    free_memory()
    return Timed(seconds[USUAL_WARM_UP:], _n_tok(job, USUAL_WARM_UP, n_steps), peak.bytes)


def _if_it_fits(model: BenchModel, job: Job, first: Adapter, checkpointing: bool) -> Timed | None:
    """The usual way on a GPU, or None if it runs out of memory."""
    try:
        return _usual(model, job, first, checkpointing, USUAL_STEPS)
    except torch.OutOfMemoryError:
        return None  # leaving this frame frees the traceback and its tensors
    finally:
        free_memory()


def _n_tok(job: Job, begin: int, end: int) -> int:
    return sum(len(job.rows[i].ids) for step in range(begin, end) for i in job.batch(step))


def mean_length(job: Job) -> float:
    """Mean row length (tokens)."""
    return sum(len(row.ids) for row in job.rows) / len(job.rows)


def supervised_share(job: Job) -> float:
    """Supervised tokens as a share of all."""
    return sum(row.n_supervised for row in job.rows) / sum(len(row.ids) for row in job.rows)


def free_memory() -> None:
    """Run the garbage collector and release the GPU allocator's free memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bench_engine(model: BenchModel, n_steps: int) -> BenchResult:
    """Time `n_steps` convergence steps with engine torch, then with engine unsloth in its own process.

    Raises ModelError without a GPU, or if Unsloth cannot be used here.
    """
    if model.device.type != "cuda":
        raise ModelError("Unsloth needs a GPU", where="bench engine", fix="run it where there is one")
    load = LOADS["train", "cuda"]
    ceiling = matmul_ceiling(model.device, model.dtype)
    plain = bench_model(model.settings.model_copy(update={"engine": "torch"}))
    stack = Stack(plain.base(), model.lora)
    (job,) = make_jobs(stack, load, n_steps + WARM_UP["cuda"])
    flops = train_flops_per_tok(base_shape(stack.base), Work(mean_length(job), supervised_share(job), model.lora.r))
    ours_run = time_jobs(stack, [job])
    del stack
    free_memory()
    unsloth_run = _in_a_process(model, n_steps)

    def as_measured(name: str, run: Timed) -> Measured:
        return measured(name, sum(run.seconds), run.n_tok, run.n_tok * flops, ceiling, run.peak)

    ours, usual = as_measured("engine torch", ours_run), as_measured("engine unsloth", unsloth_run)
    return BenchResult(
        kind="engine", model=model.settings.id, device=model.device.type,
        dtype=str(model.dtype).removeprefix("torch."), threads=torch.get_num_threads(), unit="tokens",
        work=f"{n_steps} steps of {load.batch_rows} rows, {load.shortest_tok} to {load.longest_tok} tokens, no dropout",
        ours=ours, usual=(usual,), ratio=ours.per_s / usual.per_s, ratios={usual.name: ours.per_s / usual.per_s},
        extra={"matmul_flops": ceiling, "flops_per_tok": flops, **ours_run.facts},
    )  # fmt: skip


def _in_a_process(model: BenchModel, n_steps: int) -> Timed:
    settings = model.settings.model_copy(update={"engine": "unsloth"})
    command = [sys.executable, "-m", "fastconv.bench.training", settings.model_dump_json(), str(n_steps)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment())
    if process.returncode:
        message = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ModelError(
            f"Unsloth's side failed: {message}", where="bench engine", fix="see `fastconv doctor` for what is missing"
        )
    return Timed(**json.loads(process.stdout.strip().splitlines()[-1]))


def main(settings: str, n_steps: str) -> None:
    """Train with Unsloth and print the `Timed` result as JSON."""
    model = bench_model(ModelSettings.model_validate_json(settings))
    stack = Stack(model.base(), model.lora)
    jobs = make_jobs(stack, LOADS["train", "cuda"], int(n_steps) + WARM_UP["cuda"])
    print(json.dumps(asdict(time_jobs(stack, jobs))))


if __name__ == "__main__":
    main(*sys.argv[1:])
