"""Ours against the usual way, in one call: `bench("train", "builtin:smollm2")`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastconv.bench.engines import bench_engine
from fastconv.bench.kernels import bench_kernel
from fastconv.bench.measure import Comparison
from fastconv.bench.sampling import bench_sample
from fastconv.bench.scoring import bench_score
from fastconv.bench.subject import Subject, subject
from fastconv.bench.swapping import bench_stack
from fastconv.bench.training import bench_train
from fastconv.bench.whole import bench_cell
from fastconv.errors import InputError
from fastconv.recipe import ModelSettings

__all__ = ["KINDS", "Comparison", "Subject", "bench", "compare", "subject"]

KINDS = ("train", "behavior", "group", "score", "stack", "sample", "cell", "kernel", "engine")


def compare(kind: str, model: Subject, size: int | None = None) -> Comparison:
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
    return asdict(compare(kind, subject(settings), size))
