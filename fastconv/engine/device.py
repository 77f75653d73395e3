"""Whether a machine can run a recipe: driver, compute capability, memory (RAM for a CPU), and what to change if not.

Does not import torch; `query_gpu` is given `torch.cuda`. Messages are one line each.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastconv.engine.locate import TINY, ModelSource, cached_config, engine_identity, locate, trains_without_kernels
from fastconv.engine.shapes import (
    SHAPES,
    ModelShape,
    activation_bytes_per_tok,
    adapter_bytes,
    named_shape,
    recomputed_bytes_per_tok,
    shape_of,
    weight_bytes,
)
from fastconv.errors import ModelError
from fastconv.recipe import ModelSettings, Recipe

#: The first compute capability with bfloat16 in hardware (Ampere).
MIN_CAPABILITY = (8, 0)
#: Allowance for the CUDA context, the cuBLAS workspace and allocator fragmentation; an estimate, not a measurement.
OVERHEAD_BYTES = 1.2 * 2**30
_GIB = 2**30


@dataclass(frozen=True)
class GpuFacts:
    """Name, compute capability and memory (bytes) of a GPU, as torch reports them."""

    name: str
    capability: tuple[int, int]
    free_bytes: int
    total_bytes: int


def query_gpu(cuda: Any, built_for: str | None) -> GpuFacts:
    """The GPU that `cuda` (torch.cuda, built for CUDA version `built_for`) reports.

    Raises ModelError with the reason if torch cannot use one.
    """
    where = "model.device"
    if built_for is None:
        raise ModelError(
            "this torch is built without CUDA", where=where, fix="install a CUDA build of torch, or set device = 'cpu'"
        )
    try:
        cuda.init()
        free, total = cuda.mem_get_info()
        return GpuFacts(cuda.get_device_name(), tuple(cuda.get_device_capability()), free, total)
    except (RuntimeError, AssertionError) as error:
        message = str(error)
    if "driver" in message and (match := re.search(r"found version (\d+)", message)):
        number = int(match.group(1))
        raise ModelError(
            f"the driver speaks CUDA {number // 1000}.{number % 1000 // 10}, torch was built for {built_for}",
            where=where,
            fix=f"update the NVIDIA driver, or install a torch built for CUDA {number // 1000}.{number % 1000 // 10}",
        )
    if "busy" in message or "exclusive" in message.lower():
        raise ModelError(
            "the GPU is busy: another process holds it alone", where=where, fix="end that process (nvidia-smi names it)"
        )
    if "out of memory" in message:
        raise ModelError(
            "the GPU is busy: no memory is free", where=where, fix="end the processes that nvidia-smi names"
        )
    first = message.splitlines()[0] if message else "no reason given"
    raise ModelError(
        f"torch cannot use the GPU: {first}", where=where, fix="check the driver with nvidia-smi, or set device = 'cpu'"
    )


def require_fit(gpu: GpuFacts, recipe: Recipe, shape: ModelShape | None) -> str:
    """One line about the GPU. Raises ModelError if it is too old, too small or too full for the recipe.

    The engine halves its micro-batches down to one row and then recomputes activations; that much must fit. With a
    shape of None (a model that is not downloaded yet) memory is not checked.
    """
    identity = engine_identity(recipe.model)
    if identity["dtype"] == "bfloat16" and gpu.capability < MIN_CAPABILITY:
        has, needs = (".".join(map(str, pair)) for pair in (gpu.capability, MIN_CAPABILITY))
        raise ModelError(
            f"{gpu.name} is too old: compute capability {has}, bfloat16 needs {needs}",
            where="model.device",
            fix="set model.dtype = 'float32' with a small model, or model.device = 'cpu'",
        )
    summary = f"{gpu.name}, {gpu.free_bytes / _GIB:.0f} of {gpu.total_bytes / _GIB:.0f} GiB free"
    if shape is None:
        return summary
    need = min_training_bytes(recipe, shape)
    if need <= gpu.free_bytes:
        return f"{summary}, at least {need / _GIB:.1f} needed{halving_note(recipe, shape, gpu.free_bytes)}"
    options = "; or ".join(fitting_changes(recipe, shape, gpu.free_bytes)) or "use a larger GPU"
    if need <= gpu.total_bytes:
        raise ModelError(
            f"the GPU is busy: {gpu.free_bytes / _GIB:.1f} of {gpu.total_bytes / _GIB:.1f} GiB are free, at least "
            f"{need / _GIB:.1f} are needed",
            where="model.device",
            fix=f"end what nvidia-smi names; or {options}",
        )
    raise ModelError(
        f"{gpu.name} is too small: it has {gpu.total_bytes / _GIB:.1f} GiB, {shape.name} needs at least "
        f"{need / _GIB:.1f}",
        where="model.device",
        fix=options,
    )


def ram_bytes() -> float | None:
    """Bytes of memory that this process may use: the machine's, or the control group's limit; None if neither is told."""
    told: list[float] = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            told.append(float(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        told.append(float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE"))
    return min((value for value in told if value > 0), default=None)


def require_ram(recipe: Recipe, shape: ModelShape | None) -> str:
    """One line about this machine's memory, for a recipe that computes on its CPU. Raises ModelError if it is too small.

    With a shape of None, or where the memory is not told, nothing is checked and the line is empty.
    """
    room_bytes = ram_bytes()
    if shape is None or room_bytes is None:
        return ""
    need = min_training_bytes(recipe, shape)
    if need <= room_bytes:
        return f"{room_bytes / _GIB:.0f} GiB of memory, at least {need / _GIB:.1f} needed"
    options = "; or ".join(("compute on a GPU", *fitting_changes(recipe, shape, room_bytes)))
    raise ModelError(
        f"this machine is too small: it has {room_bytes / _GIB:.1f} GiB of memory, {shape.name} on its CPU needs at "
        f"least {need / _GIB:.1f}",
        where="model.device",
        fix=options,
    )


def fit_note(name: str, room_bytes: float, recipe: Recipe, shape: ModelShape) -> str:
    """What of the recipe does not fit into `room_bytes` of a machine called `name`, and what would; empty if all fits."""
    need = min_training_bytes(recipe, shape)
    if need <= room_bytes:
        return halving_note(recipe, shape, room_bytes).removeprefix("; ")
    options = "; or ".join(fitting_changes(recipe, shape, room_bytes)) or "use a larger machine"
    has = f"{room_bytes / _GIB:.0f} GiB"
    return f"does not fit: {shape.name} needs at least {need / _GIB:.1f} GiB, {name} has {has}; {options}"


def min_training_bytes(recipe: Recipe, shape: ModelShape) -> float:
    """The least bytes for a training step: base, adapters, and the longest row with recomputed activations."""
    longest = max(recipe.convergence.max_length_tok, recipe.behavior.max_length_tok)
    return _fixed_bytes(recipe, shape) + longest * recomputed_bytes_per_tok(shape)


def fitting_changes(recipe: Recipe, shape: ModelShape, room_bytes: float) -> Iterator[str]:
    """Changes to the recipe with which a training step fits into `room_bytes`, the smallest change first."""
    four_bit = _with(recipe, weights="4bit")
    on_gpu = engine_identity(recipe.model)["device"] == "cuda"
    if on_gpu and recipe.model.weights == "full" and min_training_bytes(four_bit, shape) <= room_bytes:
        yield "set model.weights = '4bit' (recipes/small_gpu.toml)"
    short = _with(recipe, max_length_tok=512)
    if min_training_bytes(short, shape) <= room_bytes:
        yield "set max_length_tok = 512 in both phases"
    smaller = [s for s in SHAPES.values() if s.qkv_bias and s.total_params < shape.total_params]
    for candidate in sorted(smaller, key=lambda s: -s.total_params):
        if min_training_bytes(recipe, candidate) <= room_bytes:
            yield f"take a smaller model ({candidate.name})"
            return


def shape_on_disk(settings: ModelSettings, source: ModelSource | None = None) -> ModelShape | None:
    """The model's shape, as far as it is known without a download: from its config.json, or from its name."""
    source = source or locate(settings)
    if source.kind == "builtin":
        return named_shape("tiny" if source.id == TINY else "smollm2-135m")
    if source.folder is not None:
        return shape_of(_config(Path(source.folder) / "config.json"), source.folder.name)
    named = [name for name in SHAPES if source.id.lower().split("/")[-1].startswith(name)]
    if named:
        return SHAPES[named[0]]
    cached = cached_config(settings)
    return None if cached is None else shape_of(_config(cached), source.id)


def _config(path: Path) -> dict[str, Any]:
    """A model's config. Raises ModelError if it cannot be read."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        where, fix = str(path.parent), "fetch the model again"
        raise ModelError(f"its config.json cannot be read ({error})", where=where, fix=fix) from None
    return config


def _fixed_bytes(recipe: Recipe, shape: ModelShape) -> float:
    eight_bit = {recipe.convergence.optimizer, recipe.behavior.optimizer} == {"adamw8bit"}
    scale = 2 if engine_identity(recipe.model)["dtype"] == "float32" else 1
    weights = weight_bytes(shape, four_bit=recipe.model.weights == "4bit") * scale
    return weights + adapter_bytes(shape, recipe.lora.most_r, eight_bit=eight_bit) + OVERHEAD_BYTES


def halving_note(recipe: Recipe, shape: ModelShape, room_bytes: float) -> str:
    """A note if whole micro-batches do not fit into `room_bytes` of a GPU, so that the engine will halve them; or empty."""
    limit = max(recipe.convergence.micro_batch_tok, recipe.behavior.micro_batch_tok)
    per_tok = activation_bytes_per_tok(shape, plain=trains_without_kernels(recipe.model))
    fits = int((room_bytes - _fixed_bytes(recipe, shape)) / per_tok)
    if fits >= limit or engine_identity(recipe.model)["device"] == "cpu":
        return ""
    return f"; micro-batches of about {fits} tokens fit, so those of {limit} will be halved"


def _with(recipe: Recipe, *, weights: str | None = None, max_length_tok: int | None = None) -> Recipe:
    changes: dict[str, Any] = {}
    if weights is not None:
        changes["model"] = recipe.model.model_copy(update={"weights": weights})
    if max_length_tok is not None:
        for phase in ("convergence", "behavior"):
            changes[phase] = getattr(recipe, phase).model_copy(update={"max_length_tok": max_length_tok})
    return recipe.model_copy(update=changes)
