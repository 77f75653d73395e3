"""How a vLLM server and the trainer share a GPU: the server's lengths, rank and memory, and how many adapters to train.

All of it is arithmetic, so that it can be tested without a GPU.
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
#: Memory of vLLM beside weights, adapters and cache: CUDA context, activations of one step, captured graphs.
SERVER_BYTES = 5 * 2**30
#: Memory of the trainer beside weights and activations: CUDA context, logits of a chunk, fragmentation.
TRAINER_BYTES = 6 * 2**30
#: Concurrent rows beyond which decoding is compute-bound and gains nothing; a larger cache would be unused.
USEFUL_ROWS = 512
#: With fewer concurrent rows at full length the server would be slower than the resident sampler.
LEAST_ROWS = 8
_LENGTH_STEP_TOK = 64
#: Largest share of the free memory that adapters trained together may take: steps differ in length.
_USED_SHARE = 0.8


@dataclass(frozen=True)
class ServerMemory:
    """Sizes fixed at the server's start; `kv_bytes` and `memory_share` (of all GPU memory) are None without a GPU.

    `n_adapters` are in its memory at once; others that it knows are read again from their files when they are asked for.
    """

    max_length_tok: int
    max_lora_rank: int
    kv_bytes: int | None = None
    memory_share: float | None = None
    n_adapters: int = 1


@dataclass(frozen=True)
class GpuMemory:
    """A GPU's free and total memory in bytes, before anything is loaded."""

    free: int
    total: int


def lora_rank(stacked: int) -> int:
    """The smallest rank that vLLM allows for a stack of this rank. Raises RecipeError if there is none."""
    for rank in LORA_RANKS:
        if rank >= stacked:
            return rank
    raise RecipeError(
        f"a stack of rank {stacked} is more than vLLM serves ({LORA_RANKS[-1]})",
        where="lora.r",
        fix="lower lora.r, or set model.sampler = 'resident'",
    )


def stacked_rank(recipe: Recipe) -> int:
    """The largest rank of a stack in a recipe: of a snapshot, a behavior adapter, or both."""
    both = any(recipe.grid.epochs) and any(kind != "none" for kind in recipe.grid.convergence)
    return recipe.lora.most_r * (2 if both and recipe.grid.behaviors != ("none",) else 1)


def length_tok(longest_tok: int, model_max_tok: int) -> int:
    """vLLM's `--max-model-len` for the longest prompt with its completion (tokens), at most `model_max_tok`.

    Raises RecipeError if the prompt with its completion is longer than that.
    """
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
    """The most bytes that training takes: weights, activations of the largest micro-batch, two adapters and moments.

    `weight_bytes` are those of one weight, `plain` as in `shapes.activation_bytes_per_tok`. A micro-batch that does not
    fit is split anyway.
    """
    per_tok = activation_bytes_per_tok(shape, plain=plain) * weight_bytes / 2
    most_tok = max(min(phase.micro_batch_tok, phase.batch_rows * phase.max_length_tok) for phase in phases)
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
    """How many adapters to train together: as many, from the first, as share one micro-batch and fit in `free_bytes`.

    `step_tok` yields the tokens of a typical optimizer step of each, and is read only as far as they fit. A step that
    must be split keeps a GPU busy alone: two behavior adapters of 16 rows of 300 tokens ran at 0.87x the speed of one
    on an H100. At least 1.
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
    memory: GpuMemory, shape: ModelShape, *, others_bytes: int, max_length_tok: int, max_lora_rank: int, weight_bytes: int = 2,
    n_adapters: int = 1,
) -> ServerMemory:  # fmt: skip
    """The server's sizes, its cache from what is free beside `others_bytes`. Raises ModelError if that is too little.

    The cache size is passed (`--kv-cache-memory-bytes`), so that vLLM takes no more, however much is free at that
    moment; `memory_share` is what vLLM checks at its start.
    """
    adapters = (n_adapters + 1) * shape.adapter_params(max_lora_rank) * weight_bytes
    loaded = shape.total_params * weight_bytes + adapters + SERVER_BYTES
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
    share = round((loaded + kv_bytes) / memory.total, 4)
    return ServerMemory(max_length_tok, max_lora_rank, kv_bytes, share, n_adapters)
