"""Benchmarks: fastconv against the usual way in one call (`bench("train", "builtin:smollm2")`), and machine rates.

`compare` runs one comparison, `bench_cell` all parts of a cell, `bench_all` every comparison that a machine can do, into
one file; `changes` sets two such files beside one another. `probe` measures the rates that `fastconv plan` needs,
and `measure_machine` keeps them in the workspace.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
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
from fastconv.bench.training import WARM_UP, Load, bench_engine, bench_train, free_memory, make_jobs, time_jobs
from fastconv.engine.generate import sample
from fastconv.engine.locate import engine_identity
from fastconv.engine.model import Base, resolve_device
from fastconv.engine.score import LetterItem, score_letters
from fastconv.engine.shapes import ModelShape, Work, forward_flops_per_tok, train_flops_per_tok, weight_bytes
from fastconv.engine.stack import Stack
from fastconv.errors import InputError, ModelError, did_you_mean
from fastconv.planning.hardware import probe_stage, probes_own_model
from fastconv.planning.plan import known_shape
from fastconv.recipe import ModelSettings, Recipe, SamplingSettings
from fastconv.run.status import run_facts
from fastconv.store.io import write_text
from fastconv.store.ledger import Store

__all__ = [
    "KINDS",
    "BenchResult",
    "BenchModel",
    "Change",
    "bench",
    "bench_all",
    "bench_model",
    "changes",
    "compare",
    "compare_files",
]

KINDS = ("train", "behavior", "group", "score", "stack", "sample", "cell", "kernel", "engine")
#: (steps, questions, rows) of a cell by device: those of the protocol's 800-row cell, few on a CPU.
_SIZES = {"cpu": (2, 16, 8), "cuda": (50, 586, 512)}
#: Optimizer steps that `probe` counts, by device. This and the sizes below take about six seconds each.
_STEPS = {"cpu": 6, "cuda": 60}
#: Training load of `probe` by device: rows as in the demo, and as in the protocol.
LOADS = {"cpu": Load("behavior", 4, 40, 80, n_frozen=1), "cuda": Load("behavior", 4, 200, 400, n_frozen=1)}
#: Questions of `probe`, and (prompts, new tokens of each).
_QUESTIONS = {"cpu": 24, "cuda": 1200}
_PROMPTS = {"cpu": (24, 12), "cuda": (320, 128)}
#: With more weights than this a CPU would take minutes, for a model that nobody runs on it.
_MOST_ON_CPU = 1e9


def bench_cell(model: BenchModel) -> BenchResult:
    """The parts of a cell one after another in this process, each measured by itself; seconds are sums over the parts.

    The usual way is as published: gradient checkpointing, one question at a time with all logits, and the merged model
    written and loaded twice, for training and for evaluation.
    """
    steps, questions, rows = _SIZES[model.device.type]
    parts = (
        (bench_stack(model, 1), 2), (bench_train(model, steps), 1), (bench_score(model, questions), 1),
        (bench_sample(model, rows), 1),
    )  # fmt: skip
    ours = sum(part.ours.seconds * times for part, times in parts)
    usual = sum(part.usual[-1].seconds * times for part, times in parts)
    ratio = usual / ours
    return BenchResult(
        kind="cell", model=model.settings.id, device=model.device.type, dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(), unit="cells",
        work=f"2 swaps, {steps} steps, {questions} questions, {rows} completions",
        ours=Measured("fastconv", ours, 1 / ours, _peak([part.ours for part, _ in parts])),
        usual=(
            Measured(
                "as published", usual, 1 / usual, _peak([part.usual[-1] for part, _ in parts]),
                sum(part.usual[-1].written_bytes * times for part, times in parts),
            ),
        ),
        ratio=ratio, ratios={"as published": ratio},
        extra={part.kind: {"ours_s": part.ours.seconds * times, "usual_s": part.usual[-1].seconds * times}
               for part, times in parts},
    )  # fmt: skip


def _peak(measurements: list[Measured]) -> int | None:
    peaks = [result.peak_bytes for result in measurements if result.peak_bytes is not None]
    return max(peaks, default=None)


def compare(kind: str, model: BenchModel, size: int | None = None) -> BenchResult:
    """Run one comparison of `KINDS`. `size` is its number of steps, questions, swaps, rows or tokens; None: the
    default.

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
    raise InputError(
        f"no comparison is called {kind!r}",
        where="bench",
        fix=did_you_mean(kind, KINDS, f"use one of {', '.join(KINDS)}"),
    )


def bench(kind: str, model: str, *, device: str = "auto", dtype: str = "auto", revision: str = "",
          size: int | None = None) -> dict[str, Any]:  # fmt: skip
    """`compare` for a model given as in a recipe, or as `random:SHAPE`; returns the `BenchResult` as JSON values.

    `ratio` is the speed of ours over that of the first usual way: above 1, ours is faster.
    """
    # Not engine "auto": importing Unsloth patches transformers for the whole process, the usual way included.
    fields = {"id": model, "device": device, "dtype": dtype, "revision": revision, "engine": "torch"}
    settings = ModelSettings.model_validate(fields)
    return asdict(compare(kind, bench_model(settings), size))


#: What `bench_all` compares: the loads and measures of a run. `cell` is a sum of these, `engine` loads a second base.
ALL_KINDS = ("train", "behavior", "group", "score", "stack", "sample", "kernel")
#: A rate below this share of the one before is slower: timings on one machine vary by some percent.
SLOWER = 0.9
_MAKE_ONE = "make both with `fastconv bench all --out FILE`, with one model"


def bench_all(
    model: str, *, size: int | None = None, device: str = "auto", out: Path | None = None, kinds: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Every comparison of `ALL_KINDS`, or those named, one after another, with the card, the versions and the time (s since the epoch).

    Written as JSON to `out` if it is named, after each comparison. A comparison that this machine cannot do stands under `left_out` with its reason.
    """
    settings = ModelSettings.model_validate({"id": model, "device": device, "engine": "torch"})
    measured_on, facts = resolve_device(settings), run_facts()
    is_gpu = measured_on.type == "cuda"
    found: dict[str, Any] = {
        "at": time.time(), "card": torch.cuda.get_device_name(measured_on) if is_gpu else platform.processor() or "cpu",
        **{name: facts[name] for name in ("python", "versions", "machine", "git")},
        "model": model, "results": {}, "left_out": {},
    }  # fmt: skip
    for kind in kinds or ALL_KINDS:
        try:
            found["results"][kind] = bench(kind, model, device=device, size=size)
        except ModelError as error:
            found["left_out"][kind] = error.what
        free_memory()
        if out is not None:  # after each: some take minutes, and what was measured is not to be lost
            write_text(out, json.dumps(found, indent=1) + "\n")
    return found


@dataclass(frozen=True)
class Change:
    """A figure of two `bench_all` files: our rate on the same card, else how much faster than a usual way ours is."""

    kind: str
    figure: str
    before: float
    after: float

    @property
    def share(self) -> float:
        """After over before."""
        return self.after / self.before

    @property
    def slower(self) -> bool:
        """Whether it fell by more than timings vary."""
        return self.share < SLOWER


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """What two files of `bench_all` have in common. Raises InputError if that is nothing."""
    same_card = (before.get("card"), before.get("model")) == (after.get("card"), after.get("model"))
    found = []
    for kind, now in after.get("results", {}).items():
        then = before.get("results", {}).get(kind)
        if then is None:
            continue
        if same_card and then["work"].split(";")[0] == now["work"].split(";")[0]:
            found.append(Change(kind, f"{now['unit']}/s", then["ours"]["per_s"], now["ours"]["per_s"]))
        names = [name for name in now["ratios"] if name in then["ratios"]]
        found += [Change(kind, f"times {name}", then["ratios"][name], now["ratios"][name]) for name in names]
    if not found:
        raise InputError(
            "the two files have no measurement in common",
            where="bench compare",
            fix=_MAKE_ONE,
        )
    return found


def compare_files(files: Sequence[Path]) -> list[Change]:
    """`changes` between two files that `fastconv bench all --out FILE` wrote. Raises InputError if they are no such files."""
    if len(files) != 2:
        raise InputError(
            f"it takes two files, not {len(files)}",
            where="bench compare",
            fix="name the one from before, then the new one",
        )
    read = []
    for path in files:
        try:
            read.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no JSON"
            raise InputError(f"it cannot be read: {why}", where=str(path), fix=_MAKE_ONE) from None
        if not isinstance(read[-1], dict) or "results" not in read[-1]:
            raise InputError("it holds no benchmarks", where=str(path), fix=_MAKE_ONE)
    return changes(*read)


def measure_machine(recipe: Recipe, store: Store) -> dict[str, float]:
    """Measure this machine with the recipe's model shape and store the rates in the workspace; returns them (`probe`).

    Raises InputError without a GPU if the model is too large for a CPU.
    """
    model_shape, device = known_shape(recipe), engine_identity(recipe.model)["device"]
    if device == "cpu" and model_shape.total_params > _MOST_ON_CPU:
        raise InputError(
            f"there is no GPU here to measure with {model_shape.name}", where="--measure",
            fix="measure on the machine that will run it, or plan with --machine",
        )  # fmt: skip
    stage = probe_stage(recipe, model_shape, device, time.time())
    with store.lease(stage):
        began = time.perf_counter()
        rates = probe(_probe_model(recipe, model_shape))
        store.commit(stage, outputs=rates, facts={}, seconds=time.perf_counter() - began)
    return rates


def probe(model: BenchModel) -> dict[str, float]:
    """Rates of this machine: FLOP/s of training, scoring and sampling, seconds of a sampling pass, seconds to load."""
    began = time.perf_counter()
    base = model.base()
    load_s = time.perf_counter() - began
    stack, model_shape = Stack(base, model.lora), base_shape(base)
    rates = {
        "train_flops_s": _training_rate(stack, model_shape),
        "read_flops_s": _scoring_rate(base, model_shape),
        **_sampling_rates(base, model_shape),
    }
    return {**rates, "step_s": 0.0, "load_s": load_s}


def _probe_model(recipe: Recipe, model_shape: ModelShape) -> BenchModel:
    """The recipe's own model where it is on this disk, else random weights of its shape."""
    name = recipe.model.id if probes_own_model(recipe) else f"{RANDOM}{model_shape.name}"
    return bench_model(recipe.model.model_copy(update={"id": name}))


def _training_rate(stack: Stack, model_shape: ModelShape) -> float:
    """FLOP/s of behavior training above a frozen snapshot, as most steps of a run are; optimizer and set-up
    included."""
    device = stack.base.device.type
    load = LOADS[device]
    job = make_jobs(stack, load, WARM_UP[device] + _STEPS[device])[0]
    run = time_jobs(stack, [job])
    lengths = [len(row.ids) for row in job.rows]
    work = Work(sum(lengths) / len(lengths), 0.6, stack.settings.r)
    return run.n_tok * train_flops_per_tok(model_shape, work) / sum(run.seconds)


def _scoring_rate(base: Base, model_shape: ModelShape) -> float:
    """FLOP/s of scoring multiple choice by letter, on prompts without common prefixes."""
    rows = ragged_rows(_QUESTIONS[base.device.type], model_shape.vocab, 60, 110, seed=1)
    items = [LetterItem(row.ids, (11, 12, 13, 14)) for row in rows]
    clock = Clock(base.device)
    score_letters(base, items[:4], 1024)
    with clock.running():
        score_letters(base, items, 4096)
    n_tok = sum(len(row.ids) for row in rows)
    return n_tok * forward_flops_per_tok(model_shape, Work(n_tok / len(rows), 0.0, 0)) / clock.seconds


def _sampling_rates(base: Base, model_shape: ModelShape) -> dict[str, float]:
    """Seconds of a decoding pass with one row, FLOP/s of what further rows add, and the bytes/s of reading weights."""
    n, new_tok = _PROMPTS[base.device.type]
    prompts = [list(row.ids) for row in ragged_rows(n, model_shape.vocab, 30, 50, seed=2)]
    single, batch = Clock(base.device), Clock(base.device)
    sample(base, prompts[:4], list(range(4)), SamplingSettings(max_new_tok=2))
    with single.running():
        completions = sample(base, prompts[:1], [0], SamplingSettings(max_new_tok=new_tok))
    pass_s = single.seconds / max(1, len(completions[0].ids) + completions[0].ended)
    with batch.running():
        completions = sample(base, prompts, list(range(n)), SamplingSettings(max_new_tok=new_tok))
    n_tok = sum(len(row.ids) + row.ended for row in completions)
    rows_s = max(batch.seconds - new_tok * pass_s, 0.1 * batch.seconds)
    work = Work(60.0, 1.0, 0)
    return {
        "draw_flops_s": n_tok * forward_flops_per_tok(model_shape, work) / rows_s, "pass_s": pass_s,
        "memory_bytes_s": weight_bytes(model_shape) * base.dtype.itemsize / 2 / pass_s,
    }  # fmt: skip
