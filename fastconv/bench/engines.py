"""Our training step on plain layers with our kernels against the same step through Unsloth's fused kernels.

Importing Unsloth changes transformers for a whole process, so its side runs in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import torch

from fastconv.bench.measure import Comparison, Measured, matmul_ceiling, measured
from fastconv.bench.subject import Subject, shape, subject
from fastconv.bench.training import LOADS, WARM_UP, Timed, free_memory, jobs_for, mean_length, supervised_share, timed
from fastconv.engine.stack import Stack
from fastconv.errors import ModelError
from fastconv.recipe import ModelSettings
from fastconv.engine.shapes import Work, train_flops_per_tok


def bench_engine(model: Subject, n_steps: int) -> Comparison:
    """`n_steps` convergence steps with engine torch, then with engine unsloth; on a GPU alone.

    Raises ModelError without a GPU, or if Unsloth cannot be used here.
    """
    if model.device.type != "cuda":
        raise ModelError("Unsloth needs a GPU", where="bench engine", fix="run it where there is one")
    load = LOADS["train", "cuda"]
    ceiling = matmul_ceiling(model.device, model.dtype)
    plain = subject(model.settings.model_copy(update={"engine": "torch"}))
    stack = Stack(plain.base(), model.lora)
    (job,) = jobs_for(stack, load, n_steps + WARM_UP["cuda"])
    flops = train_flops_per_tok(shape(stack.base), Work(mean_length(job), supervised_share(job), model.lora.r))
    mine = timed(stack, [job])
    del stack
    free_memory()
    theirs = _in_a_process(model, n_steps)

    def as_measured(name: str, run: Timed) -> Measured:
        return measured(name, sum(run.seconds), run.n_tok, run.n_tok * flops, ceiling, run.peak)

    ours, usual = as_measured("engine torch", mine), as_measured("engine unsloth", theirs)
    return Comparison(
        kind="engine", model=model.settings.id, device=model.device.type,
        dtype=str(model.dtype).removeprefix("torch."), threads=torch.get_num_threads(), unit="tokens",
        work=f"{n_steps} steps of {load.batch_rows} rows, {load.shortest_tok} to {load.longest_tok} tokens, no dropout",
        ours=ours, usual=(usual,), ratio=ours.per_s / usual.per_s, ratios={usual.name: ours.per_s / usual.per_s},
        extra={"matmul_flops": ceiling, "flops_per_tok": flops},
    )  # fmt: skip


def _in_a_process(model: Subject, n_steps: int) -> Timed:
    settings = model.settings.model_copy(update={"engine": "unsloth"})
    command = [sys.executable, "-m", "fastconv.bench.engines", settings.model_dump_json(), str(n_steps)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        said = (found.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ModelError(
            f"Unsloth's side failed: {said}", where="bench engine", fix="see `fastconv doctor` for what is missing"
        )
    return Timed(**json.loads(found.stdout.strip().splitlines()[-1]))


def main(settings: str, n_steps: str) -> None:
    """Unsloth's side: print its run as JSON."""
    model = subject(ModelSettings.model_validate_json(settings))
    stack = Stack(model.base(), model.lora)
    jobs = jobs_for(stack, LOADS["train", "cuda"], int(n_steps) + WARM_UP["cuda"])
    print(json.dumps(asdict(timed(stack, jobs))))


if __name__ == "__main__":
    main(*sys.argv[1:])
