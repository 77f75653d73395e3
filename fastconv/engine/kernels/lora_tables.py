"""What the stacked-LoRA kernels are given: block sizes, tables of tokens and weights, and one layer's call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from fastconv.engine.stacked_linear import Slot

Order = Literal["branches_first", "base_first"]


@dataclass(frozen=True)
class Tiling:
    """Sizes of the kernels' blocks: powers of two, at least 16. None depends on how many tokens a pass has, so that a
    row's result does not depend on what else is in the batch.

    `shrink_m` x `shrink_k` tokens and channels at a time, at least `shrink_split` channels in one sum and at most
    `shrink_splits` sums; `expand_m` x `expand_n`
    of the output; weight gradients over `chunk_m` of at most `chunk` tokens at a time and `chunk_n` channels. `order`
    says whether the base's product is added to the branches' (their sum is then written once and read while the
    product is computed) or they to it.
    """

    shrink_m: int = 64
    shrink_k: int = 64
    shrink_split: int = 512
    shrink_splits: int = 8
    expand_m: int = 64
    expand_n: int = 128
    chunk: int = 256
    chunk_m: int = 64
    chunk_n: int = 64
    order: Order = "branches_first"

    def __post_init__(self) -> None:
        if self.shrink_split % self.shrink_k or self.chunk % self.chunk_m or self.shrink_m % 16:
            raise ValueError("shrink_split, chunk and shrink_m must be multiples of shrink_k, chunk_m and 16")

    def split_of(self, n_k: int) -> int:
        """Channels in one sum where there are `n_k`."""
        return max(self.shrink_split, -(-n_k // (self.shrink_splits * self.shrink_k)) * self.shrink_k)


@dataclass(frozen=True)
class TokenRouting:
    """Which tokens are whose, on the device, int32: `tiles` and `chunks` [n, 3] of (slot, start, stop), `chunks_of`
    [slots, 2] the chunks of each slot. How many there are depends on the numbers of tokens and slots alone; the
    surplus is empty."""

    n_tok: int
    shrink_tiles: torch.Tensor
    expand_tiles: torch.Tensor
    chunks: torch.Tensor
    chunks_of: torch.Tensor


@dataclass(frozen=True)
class WeightTable:
    """Where one layer's weights lie: `table` [slots, 8] int64 as in `kernel_triton`, the padded ranks, and whether
    every address and rank allows loads of 16 bytes."""

    table: torch.Tensor
    rank_f: int
    rank_t: int
    aligned: bool


@dataclass(frozen=True)
class PackedAdapters:
    """Adapters in one tensor of the compute dtype: for each module the offsets of A and B in it, and the rank."""

    flat: torch.Tensor
    offsets: Mapping[str, tuple[int, int, int]]
    scale: float


@dataclass(frozen=True)
class LiveSlots:
    """The slots that are live, ready for the kernels. `scales` [slots, 2] fp32, `thresholds` [slots] int32; `lows`
    keeps what `layers` points to."""

    slots: tuple[Slot, ...]
    dtype: torch.dtype
    seeded: bool
    drops: bool
    lows: tuple[tuple[PackedAdapters | None, PackedAdapters | None], ...]
    layers: Mapping[str, WeightTable]
    scales: torch.Tensor
    thresholds: torch.Tensor


@dataclass(frozen=True)
class LayerCall:
    """One layer in one pass: all that its kernels need beside the activations."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    places: WeightTable
    rows: TokenRouting
    live: LiveSlots
    seeds: torch.Tensor | None
    salt: int
    tiling: Tiling
