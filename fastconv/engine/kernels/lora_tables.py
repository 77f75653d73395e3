"""What the stacked-LoRA kernels are given: block sizes, tables of tokens and weights, and one layer's call."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from fastconv.engine.lora import Slot

Order = Literal["branches_first", "base_first"]
#: Modules that one call can hold.
MOST_JOINED = 3


@dataclass(frozen=True)
class Tiling:
    """Block sizes of the kernels: powers of two, at least 16. None depends on the number of tokens in a pass, so that a
    row's result does not depend on the rest of the batch. Raises ValueError for sizes that do not divide one another.

    `shrink`: `shrink_m` tokens x `shrink_k` channels at a time, at least `shrink_split` channels in one partial sum
    and at most `shrink_splits` partial sums. `expand`: `expand_m` tokens x `expand_n` output channels. Weight
    gradients: chunks of at most `chunk` tokens (`wide_chunk` for modules of `wide_from` channels, which give work enough:
    every chunk's sums are written and read once more), `chunk_m` at a time, and `chunk_n` channels. `order` says whether
    the base's product is added to the branches (their sum is then written once, and read while the product is
    computed) or they to it.
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
    wide_chunk: int = 1024
    wide_from: int = 8192

    def __post_init__(self) -> None:
        if (
            self.shrink_split % self.shrink_k
            or self.shrink_m % 16
            or (self.chunk % self.chunk_m | self.wide_chunk % self.chunk_m)
        ):
            raise ValueError("shrink_split, both chunks and shrink_m must be multiples of shrink_k, chunk_m and 16")

    def split_of(self, n_k: int) -> int:
        """Channels in one partial sum, of `n_k` in all."""
        return max(self.shrink_split, -(-n_k // (self.shrink_splits * self.shrink_k)) * self.shrink_k)


@dataclass(frozen=True)
class Chunks:
    """`parts` [n, 3] int32 of (slot, start, stop), and `of_slot` [slots, 2] int32, the range of each slot's parts."""

    parts: torch.Tensor
    of_slot: torch.Tensor

    def __len__(self) -> int:
        """Number of chunks, empty ones included."""
        return len(self.parts)


@dataclass(frozen=True)
class TokenRouting:
    """Which tokens belong to which slot, int32 on the device: tiles [n, 3] of (slot, start, stop), and chunks of two sizes.
    All are views of `whole` [n] int32. n depends only on the numbers of tokens and slots; surplus rows are empty."""

    n_tok: int
    whole: torch.Tensor
    shrink_tiles: torch.Tensor
    expand_tiles: torch.Tensor
    chunks: Chunks
    wide_chunks: Chunks

    @classmethod
    def of(cls, n_tok: int, whole: torch.Tensor, sizes: Sequence[int]) -> TokenRouting:
        """The tables that lie one after another in `whole`, with these numbers of elements."""
        shrinks, expands, *chunks = whole.split(list(sizes))
        small, small_of, wide, wide_of = chunks
        return cls(
            n_tok, whole, shrinks.view(-1, 3), expands.view(-1, 3), Chunks(small.view(-1, 3), small_of.view(-1, 2)),
            Chunks(wide.view(-1, 3), wide_of.view(-1, 2)),
        )  # fmt: skip

    def copied(self) -> TokenRouting:
        """The same tables at addresses of their own."""
        chunks = (self.chunks.parts, self.chunks.of_slot, self.wide_chunks.parts, self.wide_chunks.of_slot)
        parts = (self.shrink_tiles, self.expand_tiles, *chunks)
        return self.of(self.n_tok, self.whole.clone(), [part.numel() for part in parts])

    def chunks_for(self, width: int, tiling: Tiling) -> Chunks:
        """The chunks of modules with at most `width` channels."""
        return self.wide_chunks if width >= tiling.wide_from else self.chunks


@dataclass(frozen=True)
class WeightTable:
    """Addresses of the weights of one layer, or of some that share their input: `table` [modules, slots, 8] int64 as
    described in `lora_triton`, the padded ranks of the frozen and the trainable part, and whether all addresses and ranks
    allow loads of 16 bytes."""

    table: torch.Tensor
    rank_f: int
    rank_t: int
    aligned: bool

    @property
    def width(self) -> int:
        """Low-rank values of a token and a module."""
        return self.rank_f + self.rank_t


@dataclass(frozen=True)
class PackedAdapters:
    """Adapters in one tensor `flat` [n] of the compute dtype; `offsets` has (offset of A, offset of B, rank) by
    module, `scales` the scale."""

    flat: torch.Tensor
    offsets: Mapping[str, tuple[int, int, int]]
    scales: Mapping[str, float]

    def scale_of(self, module: str) -> float:
        """Scale of a module; 0 for one that these adapters do not target."""
        return self.scales.get(module, 0.0)


@dataclass(frozen=True)
class LiveSlots:
    """The live slots, prepared for the kernels: `scales` [modules, slots, 2] fp32 of the frozen and the trainable part,
    dropout `thresholds` [slots] int32 (p * 2^24), weight tables by module name, all views of `tables` [modules, slots, 8]
    int64. `packed` owns the memory that they point to."""

    slots: tuple[Slot, ...]
    dtype: torch.dtype
    seeded: bool
    drops: bool
    packed: tuple[tuple[PackedAdapters | None, PackedAdapters | None], ...]
    tables: torch.Tensor
    layers: Mapping[str, WeightTable]
    scales: torch.Tensor
    thresholds: torch.Tensor

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.layers)}

    def joined(self, names: Sequence[str]) -> tuple[WeightTable, torch.Tensor] | None:
        """(weight table, scales [modules, slots, 2]) of modules that lie side by side in the tables, views of them; None if
        they do not, or if some slot's adapters do not reach all of them."""
        first = self._places.get(names[0])
        if first is None or any(self._places.get(name) != first + i for i, name in enumerate(names)):
            return None
        parts, last = [self.layers[name] for name in names], first + len(names)
        table = WeightTable(
            self.tables[first:last], max(part.rank_f for part in parts), max(part.rank_t for part in parts),
            all(part.aligned for part in parts),
        )  # fmt: skip
        return table, self.scales[first:last]

    @property
    def structure(self) -> Hashable:
        """All that the kernels are compiled for or launched by: two passes of equal structure differ in table values."""
        layers = tuple((name, table.rank_f, table.rank_t, table.aligned) for name, table in self.layers.items())
        trains = any(slot.trainable is not None for slot in self.slots)
        return self.dtype, self.seeded, self.drops, len(self.slots), trains, layers

    def copied(self) -> LiveSlots:
        """The same slots with tables at addresses of their own."""
        tables = self.tables.clone()
        layers = {
            name: replace(layer, table=table)
            for (name, layer), table in zip(self.layers.items(), tables.split(1), strict=True)
        }
        return replace(
            self, tables=tables, layers=layers, scales=self.scales.clone(), thresholds=self.thresholds.clone()
        )


@dataclass(frozen=True)
class GraphTables:
    """The tables that a captured graph reads, at addresses of its own, so that one graph serves any slots of equal
    structure: `load` copies the tables of what is live now, on the device."""

    weights: torch.Tensor
    scales: torch.Tensor
    thresholds: torch.Tensor
    routing: torch.Tensor

    def load(self, live: LiveSlots, routing: TokenRouting) -> None:
        """Copy these tables, which must have the same structure. The host does not wait."""
        self.weights.copy_(live.tables)
        self.scales.copy_(live.scales)
        self.thresholds.copy_(live.thresholds)
        self.routing.copy_(routing.whole)


@dataclass(frozen=True)
class LayerCall:
    """One layer in one pass, or up to `MOST_JOINED` that share their input: everything that the kernels need beside the
    activations. `weight` [sum of outs, in] and `bias` are the modules' below one another; `outs` and `salts` are theirs."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    weights: WeightTable
    rows: TokenRouting
    live: LiveSlots
    seeds: torch.Tensor | None
    outs: tuple[int, ...]
    salts: tuple[int, ...]
    tiling: Tiling
    scales: torch.Tensor

    @property
    def n_modules(self) -> int:
        """Number of modules."""
        return len(self.outs)

    @property
    def n_slots(self) -> int:
        """Number of slots."""
        return self.weights.table.shape[1]

    @property
    def three_outs(self) -> tuple[int, ...]:
        """`outs` as the kernels take them."""
        return (*self.outs, *self.outs[:1] * (MOST_JOINED - len(self.outs)))

    @property
    def three_salts(self) -> tuple[int, ...]:
        """`salts` likewise."""
        return (*self.salts, *self.salts[:1] * (MOST_JOINED - len(self.salts)))
