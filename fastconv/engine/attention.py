"""Attention over packed rows, used by training, scoring and sampling: one function and the layouts it works on.

Model code calls `attend` in every layer through transformers' attention interface and passes the `layout` of the
current forward pass. A layout says which tokens form a row; no row attends to another. Training needs no mask and, on
a CPU, no padding.
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
#: The width of a padded batch is a multiple of this: cuDNN plans its attention again, about 60 ms, for each new shape.
_WIDTH_STEP = 64


class Layout(Protocol):
    """How the tokens of one forward pass form rows."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention output [T, heads, d] of query [heads, T, d], key and value [kv heads, T, d], all in one dtype."""
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
    """transformers' attention interface: query [1, heads, T, d] -> ([1, T, heads, d], None).

    `scaling` defaults to 1 / sqrt(d). Raises ValueError if a mask is given.
    """
    if attention_mask is not None:
        raise ValueError("fastconv's attention takes a layout, not a mask")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = layout.attend(int(module.layer_idx), query[0], key[0], value[0], scale)  # pyright: ignore[reportArgumentType]
    return out[None], None


def register() -> None:
    """Register `attend` with transformers under the name `ATTENTION`. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end: row i is tokens starts[i] to starts[i+1], with causal attention within it. Used on CPUs."""

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
        """SDPA, one call for each row."""
        return attend_by_row(query, key, value, self.starts, scale)


def attend_by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: Sequence[int], scale: float
) -> torch.Tensor:
    """torch's scaled_dot_product_attention, one call for each row; the reference for every other implementation.

    Shapes as in `Layout.attend`; row i is tokens starts[i] to starts[i+1].
    """
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
    """Key or value [kv heads, T, d] -> [heads, T, d], each head repeated for the query heads that share it."""
    return part.repeat_interleave(query.shape[0] // part.shape[0], 0)


@dataclass(frozen=True)
class Ragged:
    """Packed rows for a variable-length attention kernel (chosen by `attention_backends`). Used on GPUs.

    `bounds` [rows + 2] int32 on the device: the first token of each row, the end of the last row, and the end of all
    tokens. Padding is one more row, which may be empty, so that batches of equal shapes differ only in tensor values.
    `longest` is the largest row length (tokens) that the kernel has to expect.
    """

    starts: tuple[int, ...]
    bounds: torch.Tensor
    longest: int
    kernel: Kernel

    @classmethod
    def of(cls, lengths: Sequence[int], kernel: Kernel, *, n_tok: int = 0, width: int = 0) -> Ragged:
        """The layout of rows with these lengths (tokens), on the CPU; `n_tok` and `width` as for `Padded.of`."""
        starts = Packed.of(list(lengths)).starts
        end = max(n_tok, starts[-1])
        bounds = torch.tensor([*starts, end], dtype=torch.int32)
        return cls(starts, bounds, max(width, end - starts[-1], *lengths), kernel)

    @property
    def n_tok(self) -> int:
        """Number of tokens, padding included. Waits for the device if `bounds` is there."""
        return int(self.bounds[-1])

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Tensors that a captured step overwrites with those of its next batch."""
        return (self.bounds,)

    def with_inputs(self, inputs: Sequence[torch.Tensor]) -> Ragged:
        """The same layout with these tensors as its `inputs`."""
        (bounds,) = inputs
        return replace(self, bounds=bounds)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Call the kernel; in fp32, which is for checking and which such kernels do not support, SDPA for each row."""
        if query.dtype == torch.float32:
            padding = [query.shape[1]] if query.shape[1] > self.starts[-1] else []
            return attend_by_row(query, key, value, [*self.starts, *padding], scale)
        return self.kernel(query, key, value, self, scale)


#: (query [heads, T, d], key and value [kv heads, T, d], rows, scale) -> [T, heads, d]
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Ragged, float], torch.Tensor]


@dataclass(frozen=True)
class Padded:
    """Packed rows that are padded to [rows, width] for attention only, so that one SDPA call serves all. Used on GPUs.

    `source` [rows * width] is the token at each padded position, `place` [T] the padded position of each token; both
    int64 on the device, negative where there is none.
    """

    starts: tuple[int, ...]
    n_rows: int
    source: torch.Tensor
    place: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], *, n_tok: int = 0, width: int = 0) -> Padded:
        """The layout of rows with these lengths (tokens), on the CPU.

        `n_tok` and `width` are lower bounds of the number of tokens and of the row width, so that many batches get the
        same shape. The width is rounded up to a multiple of `_WIDTH_STEP` in any case.
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
        """Number of tokens, padding included."""
        return self.place.shape[0]

    @property
    def longest(self) -> int:
        """Width of the padded batch: tokens in a row, padding included."""
        return self.source.shape[0] // self.n_rows

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Tensors that a captured step overwrites with those of its next batch."""
        return self.source, self.place

    def with_inputs(self, inputs: Sequence[torch.Tensor]) -> Padded:
        """The same layout with these tensors as its `inputs`."""
        source, place = inputs
        return replace(self, source=source, place=place)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One SDPA call on the padded batch. Rows are left-aligned, so the causal mask also hides the padding."""
        q, k, v = (self._pad(tensor) for tensor in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        out = out.transpose(1, 2).reshape(-1, out.shape[1], out.shape[3])
        return _gather_rows(out, self.place, self.source)

    def _pad(self, tensor: torch.Tensor) -> torch.Tensor:
        """[heads, T, d] -> [rows, heads, width, d]."""
        laid = _gather_rows(tensor.transpose(0, 1), self.source, self.place)
        return laid.view(self.n_rows, -1, *laid.shape[1:]).transpose(1, 2)


#: Layouts of packed rows: on a CPU, on a GPU with SDPA, on a GPU with a variable-length kernel.
Rows = Packed | Padded | Ragged


def _gather_rows(x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Row i of the result is x[index[i]], or zero where that is negative; `inverse` maps back, for the gradient."""
    if x.is_cuda:
        from fastconv.engine.kernels.elementwise import gather_rows

        return gather_rows(x, index, inverse)
    mask = (index >= 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return x.index_select(0, index.clamp(min=0)) * mask


@dataclass(frozen=True)
class PrefixGroup:
    """A prefix followed by branches (lengths in tokens); a branch attends to the prefix and itself, not to other
    branches."""

    prefix_tok: int
    branches_tok: tuple[int, ...]


@dataclass(frozen=True)
class PrefixTrees:
    """Prefix groups laid end to end, so that rows with a common prefix compute it once.

    `masks[i][j]` [branch, prefix + branch] bool says what the tokens of branch j of group i attend to.
    """

    groups: tuple[PrefixGroup, ...]
    masks: tuple[tuple[torch.Tensor, ...], ...]

    @classmethod
    def of(cls, groups: Sequence[PrefixGroup], device: torch.device) -> tuple[PrefixTrees, torch.Tensor]:
        """(layout, position of every token within its row [T] int64) of these groups, on `device`."""
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
        """SDPA, one call for each prefix and one for each branch."""
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
                    continue  # a choice of one token is predicted from the prefix alone
                keys = torch.cat([k, key[:, :, start:stop]], dim=2)
                values = torch.cat([v, value[:, :, start:stop]], dim=2)
                q = query[:, :, start:stop]
                parts.append(F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale))
            start = stop
        return torch.cat(parts, dim=2)[0].transpose(0, 1)


class Cache:
    """Preallocated key-value cache for sampling: `keys` and `values`, one tensor [slots, kv heads, length, d] per
    layer.

    Unfinished rows always occupy the first slots, so that a decoding step works on views and never copies the cache.
    dtype and device are those of `like`.
    """

    def __init__(
        self, n_layers: int, n_slots: int, n_kv_heads: int, max_length_tok: int, head_dim: int, like: torch.Tensor
    ) -> None:
        shape = (n_slots, n_kv_heads, max_length_tok, head_dim)
        self.keys = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(n_layers)]
        self.values = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(n_layers)]

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` positions of each slot in `sources` to the slot in `targets` at the same place."""
        for layers in (self.keys, self.values):
            for layer in layers:
                for source, target in zip(sources, targets, strict=True):
                    layer[target, :, :length] = layer[source, :, :length]


@dataclass(frozen=True)
class Prefill:
    """The pass over the prompts: attention within rows that also fills the cache.

    Token `tokens[i]` of the pass goes to position `positions[i]` of slot `slots[i]` (int64 [n] each, on the device). A
    prompt that several slots share is computed once.
    """

    rows: Rows
    cache: Cache
    tokens: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Write keys and values to the cache, then attend as `rows` does."""
        self.cache.keys[layer][self.slots, :, self.positions] = key.transpose(0, 1)[self.tokens]
        self.cache.values[layer][self.slots, :, self.positions] = value.transpose(0, 1)[self.tokens]
        return self.rows.attend(layer, query, key, value, scale)


@dataclass(frozen=True)
class Decode:
    """A decoding step: one new token for each of the first n slots, slot i at position lengths[i] (int64 [n], device).

    `longest` is the largest length; only the CPU path reads it.
    """

    cache: Cache
    lengths: torch.Tensor
    longest: int

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Write the new keys and values to the cache, then attend to all tokens of the row so far."""
        n_heads, n_rows, head_dim = query.shape
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        rows = torch.arange(n_rows, device=keys.device)
        keys[rows, :, self.lengths] = key.transpose(0, 1)
        values[rows, :, self.lengths] = value.transpose(0, 1)
        if keys.is_cuda:
            from fastconv.engine.kernels.elementwise import decode_attention

            return decode_attention(query.transpose(0, 1), keys, values, self.lengths, scale)
        # The query heads of one kv head become query positions: grouped-query attention without copying the cache.
        grouped = query.transpose(0, 1).reshape(n_rows, keys.shape[1], n_heads // keys.shape[1], head_dim)
        mask = torch.arange(self.longest + 1, device=keys.device) <= self.lengths[:, None]
        out = F.scaled_dot_product_attention(
            grouped,
            keys[:n_rows, :, : self.longest + 1],
            values[:n_rows, :, : self.longest + 1],
            attn_mask=mask[:, None, None],
            scale=scale,
        )
        return out.reshape(n_rows, n_heads, head_dim)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`; to a GPU through pinned memory, so that the host does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
