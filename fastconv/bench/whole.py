"""A whole small cell: swap, train, score, sample; ours against the usual way of doing each."""

from __future__ import annotations

import torch

from fastconv.bench.measure import Comparison, Measured
from fastconv.bench.sampling import bench_sample
from fastconv.bench.scoring import bench_score
from fastconv.bench.subject import Subject
from fastconv.bench.swapping import bench_stack
from fastconv.bench.training import bench_train

#: Steps, questions, rows: the shares that the protocol's 800-row cell has, made small on a CPU.
_SIZES = {"cpu": (2, 16, 8), "cuda": (50, 586, 512)}


def bench_cell(model: Subject) -> Comparison:
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
    return Comparison(
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
