"""What a vLLM server gets: its lengths, its ranks, and its part of the GPU's memory, fixed before training starts.

Arithmetic alone, so that it can be checked without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastconv.engine.shapes import ModelShape, activation_bytes_per_tok, adapter_bytes
from fastconv.errors import ModelError, RecipeError
from fastconv.recipe import Recipe, TrainSettings

#: Ranks that vLLM 0.32 allows for `--max-lora-rank`.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: vLLM's own needs beside weights, adapters and cache: CUDA context, activations of one step, captured graphs.
SERVER_BYTES = 5 * 2**30
#: The trainer's needs beside weights and activations: CUDA context, logits of a chunk, fragmentation.
TRAINER_BYTES = 6 * 2**30
#: Rows in flight beyond which decoding gains nothing more (compute-bound, STACK.md); a longer cache would lie idle.
USEFUL_ROWS = 512
#: Fewer rows than this at full length, and the server would be slower than the resident sampler.
LEAST_ROWS = 8
_LENGTH_STEP_TOK = 64
#: Of the memory that is free, a group takes no more than this: steps differ in length.
_USED_SHARE = 0.8


@dataclass(frozen=True)
class ServerMemory:
    """What is fixed at the server's start. `kv_bytes` and `memory_share` are None where there is no GPU."""

    max_length_tok: int
    max_lora_rank: int
    kv_bytes: int | None = None
    memory_share: float | None = None


@dataclass(frozen=True)
class GpuMemory:
    """A GPU's memory in bytes, as the driver tells it before anything is loaded."""

    free: int
    total: int


def lora_rank(stacked: int) -> int:
    """The smallest rank that vLLM allows and a stack of this rank fits. Raises RecipeError if there is none."""
    for rank in LORA_RANKS:
        if rank >= stacked:
            return rank
    raise RecipeError(
        f"a stack of rank {stacked} is more than vLLM serves ({LORA_RANKS[-1]})",
        where="lora.r",
        fix="lower lora.r, or set model.sampler = 'resident'",
    )


def stacked_rank(recipe: Recipe) -> int:
    """The greatest rank of a stack in a recipe: a snapshot, a behavior, or both."""
    both = any(recipe.grid.epochs) and any(kind != "none" for kind in recipe.grid.convergence)
    return recipe.lora.r * (2 if both and recipe.grid.behaviors != ("none",) else 1)


def length_tok(longest_tok: int, model_max_tok: int) -> int:
    """`--max-model-len` for the longest prompt with its completion; never beyond what the model was made for."""
    if longest_tok > model_max_tok:
        raise RecipeError(
            f"a prompt with its completion takes up to {longest_tok} tokens, the model reads {model_max_tok}",
            where="sampling.max_new_tok",
            fix="lower it, or shorten the prompts",
        )
    return min(math.ceil(longest_tok / _LENGTH_STEP_TOK) * _LENGTH_STEP_TOK, model_max_tok)


def training_bytes(
    shape: ModelShape, phases: Sequence[TrainSettings], r: int, *, weight_bytes: int, plain: bool = False
) -> int:
    """What the trainer takes at most: weights, activations of its largest micro-batch, two adapters and their moments.

    `plain` as for `shapes.activation_bytes_per_tok`. A micro-batch that does not fit is split anyway.
    """
    per_tok = activation_bytes_per_tok(shape, plain=plain) * weight_bytes / 2
    most_tok = max(min(one.micro_batch_tok, one.batch_rows * one.max_length_tok) for one in phases)
    adapters = 2 * 4 * 4 * shape.adapter_params(r)  # weights, gradient and two moments in fp32
    return int(shape.total_params * weight_bytes + most_tok * per_tok + adapters + TRAINER_BYTES)


def group_size(
    shape: ModelShape,
    r: int,
    step_tok: Iterable[float],
    micro_batch_tok: int,
    free_bytes: float,
    *,
    plain: bool = False,
) -> int:
    """How many trainings to take together: the first so many that share one micro-batch and fit into `free_bytes`.

    `step_tok` are the tokens of a usual optimizer step of each, taken only as far as they fit. A step that must be split
    keeps a GPU busy alone: two behavior adapters of 16 rows of 300 tokens ran at 0.87x of one on an H100. At least 1.
    """
    per_tok, adapter = activation_bytes_per_tok(shape, plain=plain), adapter_bytes(shape, r)
    size, total_tok = 0, 0.0
    for tok in step_tok:
        total_tok += tok
        if total_tok > micro_batch_tok or (size + 1) * adapter + total_tok * per_tok > _USED_SHARE * free_bytes:
            break
        size += 1
    return max(1, size)


def share_memory(
    memory: GpuMemory, shape: ModelShape, *, others_bytes: int, max_length_tok: int, max_lora_rank: int, weight_bytes: int = 2
) -> ServerMemory:  # fmt: skip
    """A cache of fixed size out of what is free once others have theirs. Raises ModelError if that is too little.

    The size is stated (`--kv-cache-memory-bytes`), so vLLM takes no more than it, however much is free at that moment;
    `memory_share` is what it checks at its start.
    """
    loaded = shape.total_params * weight_bytes + 2 * shape.adapter_params(max_lora_rank) * weight_bytes + SERVER_BYTES
    row_bytes = max_length_tok * shape.kv_bytes_per_tok(weight_bytes)
    left = memory.free - others_bytes - loaded
    if left < LEAST_ROWS * row_bytes:
        gib = 2**30
        raise ModelError(
            f"training takes {others_bytes / gib:.0f} GiB and a vLLM server {(loaded + LEAST_ROWS * row_bytes) / gib:.0f} "
            f"GiB, but {memory.free / gib:.0f} GiB of {memory.total / gib:.0f} are free",
            where="model.sampler",
            fix="set model.sampler = 'resident', lower micro_batch_tok, or free the GPU",
        )
    kv_bytes = min(left, USEFUL_ROWS * row_bytes)
    return ServerMemory(max_length_tok, max_lora_rank, kv_bytes, round((loaded + kv_bytes) / memory.total, 4))
