"""Packed micro-batches: the rows of several trainees laid end to end on the device, with targets and loss weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastconv.chat import Rendered
from fastconv.engine.attention import Rows, to_device
from fastconv.engine.model import Base, pack
from fastconv.engine.stack import Slot


@dataclass(frozen=True, slots=True)
class Item:
    """A training row in an optimizer step.

    `owner` is the index of its trainee, `weight` the loss weight of each supervised token, `seed` its dropout seed.
    """

    owner: int
    row: Rendered
    weight: float
    seed: int


@dataclass(frozen=True)
class PaddedSizes:
    """Sizes (tokens) to pad a micro-batch to: all tokens, a row, supervised tokens. 0 means no padding."""

    n_tok: int = 0
    width: int = 0
    n_supervised: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """A packed micro-batch on the device.

    `ids` and `positions` [T] int64, `seeds` [T] int32 (dropout, None without it). For each of the N supervised
    tokens: `take` [N] int64 is the index of the token before it, `targets` [N] int64 its id, `weights` [N] fp32 its
    loss weight and `owners` [N] int64 the index of its trainee. Padding has weight 0. `slots` are those that have
    rows here, `spans` their token ranges (None if there is one slot).
    """

    slots: tuple[Slot, ...]
    spans: tuple[tuple[int, int], ...] | None
    layout: Rows
    ids: torch.Tensor
    positions: torch.Tensor
    seeds: torch.Tensor | None
    take: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    owners: torch.Tensor


def no_padding(lengths: Sequence[int], n_supervised: int) -> PaddedSizes:
    """Sizes for no padding, whatever the row lengths and the number of supervised tokens are."""
    return PaddedSizes()


def make_micro_batch(
    base: Base, slots: Sequence[Slot], micro: Sequence[Item], sizes_for: Callable[[Sequence[int], int], PaddedSizes]
) -> MicroBatch:
    """The micro-batch of these rows on the base's device, padded to `sizes_for(row lengths, number of supervised
    tokens)`.

    `slots[i]` belongs to owner i; the rows of one owner must be contiguous.
    """
    device = base.device
    lengths = [len(item.row.ids) for item in micro]
    sizes = sizes_for(lengths, sum(item.row.n_supervised for item in micro))
    ids, positions, layout = pack([list(item.row.ids) for item in micro], base, n_tok=sizes.n_tok, width=sizes.width)
    take, targets, weights, owners = _supervision(micro, layout.starts, sizes.n_supervised, device)
    live, spans = [], []
    for owner, slot in enumerate(slots):
        rows = [i for i, item in enumerate(micro) if item.owner == owner]
        if rows:
            live.append(slot)
            spans.append((layout.starts[rows[0]], layout.starts[rows[-1] + 1]))
    seeds = None
    if any(slot.dropout > 0 for slot in live):
        seed_lengths = [(item.seed, length) for item, length in zip(micro, lengths, strict=True)]
        seeds = token_seeds([*seed_lengths, (0, ids.shape[0] - sum(lengths))], device)
    return MicroBatch(
        tuple(live),
        tuple(spans) if len(live) > 1 else None,
        layout,
        ids,
        positions,
        seeds,
        take,
        targets,
        weights,
        owners,
    )


def _supervision(
    micro: Sequence[Item], starts: Sequence[int], n_padded: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(`take`, `targets`, `weights`, `owners`) of a `MicroBatch`, each [N] on `device`."""
    take, targets, weights, owners = [], [], [], []
    for item, begin in zip(micro, starts, strict=False):
        loss_from, n_supervised = item.row.loss_from, item.row.n_supervised
        take += range(begin + loss_from - 1, begin + len(item.row.ids) - 1)
        targets += item.row.ids[loss_from:]
        weights += [item.weight] * n_supervised
        owners += [item.owner] * n_supervised
    missing = max(0, n_padded - len(take))
    tensors = (torch.tensor(take), torch.tensor(targets), torch.tensor(weights), torch.tensor(owners))
    return tuple(to_device(F.pad(tensor, (0, missing)), device) for tensor in tensors)  # pyright: ignore[reportReturnType]


def token_seeds(rows: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """Dropout seeds [T] int32, one per token, from (row seed, row length) pairs: row seed + 0x01000193 * position."""
    seeds = torch.cat([seed + 0x01000193 * torch.arange(length, dtype=torch.int64) for seed, length in rows])
    return to_device((seeds & 0x7FFFFFFF).to(torch.int32), device)
