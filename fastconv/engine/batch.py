"""A packed micro-batch on the device: tokens, layout, and where its loss is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastconv.chat import Rendered
from fastconv.engine.attention import Rows
from fastconv.engine.model import Base, pack
from fastconv.engine.stack import Slot
from fastconv.engine.transfer import to_device


@dataclass(frozen=True, slots=True)
class Item:
    """A row in a step: whose it is, the weight of each of its supervised tokens, and its dropout seed."""

    owner: int
    row: Rendered
    weight: float
    seed: int


@dataclass(frozen=True)
class PaddedSizes:
    """What a micro-batch is padded to: tokens in all, tokens in a row, tokens with loss. 0 leaves a size as it is."""

    n_tok: int = 0
    width: int = 0
    n_supervised: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """A packed micro-batch on the device: what goes into the model, and where its loss is.

    `take` [N] is the token before each that carries loss, with its target, its weight and the trainee it belongs to.
    Padding carries no weight. `slots` are those that have rows here, `spans` their tokens (None for one slot alone).
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
    """No padding."""
    return PaddedSizes()


def make_micro_batch(
    base: Base, slots: Sequence[Slot], micro: Sequence[Item], sizes_for: Callable[[Sequence[int], int], PaddedSizes]
) -> MicroBatch:
    """Lay a micro-batch out on the base's device, padded to the sizes asked for."""
    device = base.device
    lengths = [len(item.row.ids) for item in micro]
    sizes = sizes_for(lengths, sum(item.row.n_supervised for item in micro))
    ids, positions, layout = pack([list(item.row.ids) for item in micro], base, n_tok=sizes.n_tok, width=sizes.width)
    take, targets, weights, owners = _supervision(micro, layout.starts, sizes.n_supervised, device)
    live, spans = [], []
    for owner, slot in enumerate(slots):
        mine = [i for i, item in enumerate(micro) if item.owner == owner]
        if mine:
            live.append(slot)
            spans.append((layout.starts[mine[0]], layout.starts[mine[-1] + 1]))
    seeds = None
    if any(slot.dropout > 0 for slot in live):
        rows = [(item.seed, length) for item, length in zip(micro, lengths, strict=True)]
        seeds = token_seeds([*rows, (0, ids.shape[0] - sum(lengths))], device)
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
    """(place of the token before, target, weight, owner) of every token that carries loss, each [N]."""
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
    """One dropout seed per token [T] int32 from (row seed, row length) pairs: the row's seed mixed with the place."""
    seeds = torch.cat([seed + 0x01000193 * torch.arange(length, dtype=torch.int64) for seed, length in rows])
    return to_device((seeds & 0x7FFFFFFF).to(torch.int32), device)
