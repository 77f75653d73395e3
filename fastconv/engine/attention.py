"""One attention function for training, scoring and sampling: rows laid end to end, never seeing each other.

Model code calls `attend` for every layer through transformers' attention interface and hands it the `layout` of the
current forward pass. A layout knows which tokens form a row; nothing is padded and no mask is built for training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F

#: Name under which `attend` is registered with transformers.
ATTENTION = "fastconv"
#: A rectangle is as wide as a multiple of this: cuDNN plans its attention anew, for about 60 ms, at every new shape.
_WIDTH_STEP = 64


class Layout(Protocol):
    """How the tokens of one forward pass form rows."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """query [heads, T, d], key and value [kv heads, T, d] -> [T, heads, d]."""
        ...


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface; query [1, heads, T, d] -> ([1, T, heads, d], None)."""
    if attention_mask is not None:
        raise ValueError("fastconv's attention takes a layout, not a mask")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = layout.attend(int(module.layer_idx), query[0], key[0], value[0], scale)  # pyright: ignore[reportArgumentType]
    return out[None], None


def register() -> None:
    """Make `attend` known to transformers (idempotent)."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end, row i being tokens starts[i] to starts[i+1]; each is causal within itself."""

    starts: tuple[int, ...]

    @classmethod
    def of(cls, lengths: list[int]) -> Packed:
        """The layout of rows with these lengths (tokens)."""
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        return cls(tuple(starts))

    def positions(self) -> torch.Tensor:
        """Position of every token within its row, int64 [T], on the CPU."""
        return torch.cat([torch.arange(stop - start) for start, stop in pairwise(self.starts)])

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """SDPA row by row."""
        return attend_by_row(query, key, value, self.starts, scale)


def attend_by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: Sequence[int], scale: float
) -> torch.Tensor:
    """torch's scaled_dot_product_attention, one call for each row; the reference for every other way."""
    key, value = repeat_heads(query, key), repeat_heads(query, value)
    rows = [
        F.scaled_dot_product_attention(
            query[None, :, a:b], key[None, :, a:b], value[None, :, a:b], is_causal=True, scale=scale
        )[0]
        for a, b in pairwise(starts)
        if a < b
    ]
    return torch.cat(rows, dim=1).transpose(0, 1)


def repeat_heads(query: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Key or value [kv heads, T, d] with each head as often as queries share it."""
    return part.repeat_interleave(query.shape[0] // part.shape[0], 0)


@dataclass(frozen=True)
class Ragged:
    """The same rows for a kernel that is told where they begin (`backends` picks it).

    `bounds` [rows + 2] int32 on the device: where each row begins, where the last one ends, and the end of all tokens:
    what pads them is one more row, empty or not, so that batches of one shape differ in the values of tensors alone.
    """

    starts: tuple[int, ...]
    bounds: torch.Tensor
    longest: int
    kernel: Kernel

    @classmethod
    def of(cls, lengths: Sequence[int], kernel: Kernel, *, n_tok: int = 0, width: int = 0) -> Ragged:
        """The layout of rows with these lengths, on the CPU; `n_tok` and `width` as for `Padded`."""
        starts = Packed.of(list(lengths)).starts
        end = max(n_tok, starts[-1])
        bounds = torch.tensor([*starts, end], dtype=torch.int32)
        return cls(starts, bounds, max(width, end - starts[-1], *lengths), kernel)

    @property
    def n_tok(self) -> int:
        """Tokens, padding included; known to the host only while the bounds are still there."""
        return int(self.bounds[-1])

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What a captured step copies its next batch into."""
        return (self.bounds,)

    def with_inputs(self, inputs: Sequence[torch.Tensor]) -> Ragged:
        """The same layout in these tensors."""
        (bounds,) = inputs
        return replace(self, bounds=bounds)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """The kernel; fp32, which is for checking and which such kernels do not take, row by row."""
        if query.dtype == torch.float32:
            padding = [query.shape[1]] if query.shape[1] > self.starts[-1] else []
            return attend_by_row(query, key, value, [*self.starts, *padding], scale)
        return self.kernel(query, key, value, self, scale)


#: (query [heads, T, d], key and value [kv heads, T, d], rows, scale) -> [T, heads, d]
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Ragged, float], torch.Tensor]


@dataclass(frozen=True)
class Padded:
    """The same rows laid into a rectangle [rows, width] for the attention alone: one call, which a GPU is quick at.

    `source` [rows * width] names the token of every place, `place` [T] the place of every token, both int64 on the
    device and negative where there is none.
    """

    starts: tuple[int, ...]
    n_rows: int
    source: torch.Tensor
    place: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], *, n_tok: int = 0, width: int = 0) -> Padded:
        """The layout of rows with these lengths, on the CPU.

        `n_tok` and `width` may ask for more tokens and wider rows than there are, so that many batches have one shape;
        rows get a little wider in any case.
        """
        starts = Packed.of(list(lengths)).starts
        width = -(-max(width, *lengths) // _WIDTH_STEP) * _WIDTH_STEP
        source = torch.full((len(lengths), width), -1)
        place = torch.full((max(n_tok, starts[-1]),), -1)
        for row, (start, stop) in enumerate(pairwise(starts)):
            source[row, : stop - start] = torch.arange(start, stop)
            place[start:stop] = torch.arange(row * width, row * width + stop - start)
        return cls(starts, len(lengths), source.flatten(), place)

    @property
    def n_tok(self) -> int:
        """Tokens, padding included."""
        return self.place.shape[0]

    @property
    def longest(self) -> int:
        """Tokens that a row has room for."""
        return self.source.shape[0] // self.n_rows

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What a captured step copies its next batch into."""
        return self.source, self.place

    def with_inputs(self, inputs: Sequence[torch.Tensor]) -> Padded:
        """The same layout in these tensors."""
        source, place = inputs
        return replace(self, source=source, place=place)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One SDPA over the rectangle. Rows begin at its left edge, so causality hides what lies beyond their ends."""
        q, k, v = (self._rectangle(tensor) for tensor in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        out = out.transpose(1, 2).reshape(-1, out.shape[1], out.shape[3])
        return _gather_rows(out, self.place, self.source)

    def _rectangle(self, tensor: torch.Tensor) -> torch.Tensor:
        """[heads, T, d] -> [rows, heads, width, d]."""
        laid = _gather_rows(tensor.transpose(0, 1), self.source, self.place)
        return laid.view(self.n_rows, -1, *laid.shape[1:]).transpose(1, 2)


#: Rows of one pass: on a CPU, on a GPU as a rectangle, on a GPU for a kernel that takes bounds.
Rows = Packed | Padded | Ragged


def _gather_rows(x: torch.Tensor, there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """Row i of the result is x[there[i]], or zero where that is negative; `back` is the inverse."""
    if x.is_cuda:
        from fastconv.engine.kernels.elementwise import gather_rows

        return gather_rows(x, there, back)
    mask = (there >= 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return x.index_select(0, there.clamp(min=0)) * mask


@dataclass(frozen=True)
class PrefixGroup:
    """A stretch of tokens: a prefix, then branches that each see the prefix and themselves, but not one another."""

    prefix_tok: int
    branches_tok: tuple[int, ...]


@dataclass(frozen=True)
class PrefixTrees:
    """Groups laid end to end: rows that begin alike share the computation of what they share.

    `masks[i][j]` [branch, prefix + branch] bool is what the tokens of branch j of group i may see.
    """

    groups: tuple[PrefixGroup, ...]
    masks: tuple[tuple[torch.Tensor, ...], ...]

    @classmethod
    def of(cls, groups: Sequence[PrefixGroup], device: torch.device) -> tuple[PrefixTrees, torch.Tensor]:
        """(layout, positions int64 [T]) of these groups, on `device`."""
        masks, positions = [], []
        for group in groups:
            whole = [torch.ones(n, group.prefix_tok + n, dtype=torch.bool, device=device) for n in group.branches_tok]
            masks.append(tuple(mask.tril(group.prefix_tok) for mask in whole))
            positions += range(group.prefix_tok)
            for n_tok in group.branches_tok:
                positions += range(group.prefix_tok, group.prefix_tok + n_tok)
        return cls(tuple(groups), tuple(masks)), torch.tensor(positions, device=device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """SDPA once per prefix and once per branch."""
        repeats = query.shape[0] // key.shape[0]
        key, value = key.repeat_interleave(repeats, 0)[None], value.repeat_interleave(repeats, 0)[None]
        query, parts, start = query[None], [], 0
        for group, masks in zip(self.groups, self.masks, strict=True):
            stop = start + group.prefix_tok
            k, v = key[:, :, start:stop], value[:, :, start:stop]
            if group.prefix_tok:
                q = query[:, :, start:stop]
                parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale))
            for n_tok, mask in zip(group.branches_tok, masks, strict=True):
                start, stop = stop, stop + n_tok
                if not n_tok:
                    continue  # a choice of one token, which is predicted by the prefix alone
                keys = torch.cat([k, key[:, :, start:stop]], dim=2)
                values = torch.cat([v, value[:, :, start:stop]], dim=2)
                q = query[:, :, start:stop]
                parts.append(F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale))
            start = stop
        return torch.cat(parts, dim=2)[0].transpose(0, 1)


class Cache:
    """Keys and values of rows being sampled, preallocated: per layer [slots, kv heads, length, d].

    The rows alive are always the first slots, so a decoding step works on views and never copies the cache.
    """

    def __init__(
        self, n_layers: int, n_slots: int, n_kv_heads: int, max_length_tok: int, head_dim: int, like: torch.Tensor
    ) -> None:
        shape = (n_slots, n_kv_heads, max_length_tok, head_dim)
        self.keys = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(n_layers)]
        self.values = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(n_layers)]

    def move(self, sources: list[int], holes: list[int], length: int) -> None:
        """Copy the first `length` positions of slots `sources` into slots `holes`, pairwise."""
        for layers in (self.keys, self.values):
            for layer in layers:
                for source, hole in zip(sources, holes, strict=True):
                    layer[hole, :, :length] = layer[source, :, :length]


@dataclass(frozen=True)
class Prefill:
    """The first pass over prompts: attention within rows that also fills the cache.

    Token `tokens[i]` of the pass goes to position `positions[i]` of slot `slots[i]` (int64 [n] each, on the device); a
    prompt that several slots share is read once.
    """

    rows: Rows
    cache: Cache
    tokens: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """As the rows attend."""
        self.cache.keys[layer][self.slots, :, self.positions] = key.transpose(0, 1)[self.tokens]
        self.cache.values[layer][self.slots, :, self.positions] = value.transpose(0, 1)[self.tokens]
        return self.rows.attend(layer, query, key, value, scale)


@dataclass(frozen=True)
class Decode:
    """One new token for each of the first slots of the cache, slot i at position lengths[i] (int64 [n] on the device).

    `longest` is the largest of them as far as the host knows; a GPU needs no such bound.
    """

    cache: Cache
    lengths: torch.Tensor
    longest: int

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Write the new keys and values, then attend to everything the row has so far."""
        n_heads, n_rows, head_dim = query.shape
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        rows = torch.arange(n_rows, device=keys.device)
        keys[rows, :, self.lengths] = key.transpose(0, 1)
        values[rows, :, self.lengths] = value.transpose(0, 1)
        if keys.is_cuda:
            from fastconv.engine.kernels.elementwise import decode_attention

            return decode_attention(query.transpose(0, 1), keys, values, self.lengths, scale)
        # The query heads of one kv head become query positions: grouped attention without copying the cache.
        grouped = query.transpose(0, 1).reshape(n_rows, keys.shape[1], n_heads // keys.shape[1], head_dim)
        seen = torch.arange(self.longest + 1, device=keys.device) <= self.lengths[:, None]
        out = F.scaled_dot_product_attention(
            grouped,
            keys[:n_rows, :, : self.longest + 1],
            values[:n_rows, :, : self.longest + 1],
            attn_mask=seen[:, None, None],
            scale=scale,
        )
        return out.reshape(n_rows, n_heads, head_dim)
