"""Packed micro-batches: rows of several trainees laid end to end on the device, with targets and loss weights; how an
optimizer step is split into them, and the sizes that they are padded to, so that a graph of one serves others.

Sizes follow from the jobs alone, never from measured times or free memory: the same rows are padded alike in a run that was
killed and goes on, and give the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import reduce

import torch
import torch.nn.functional as F

from fastconv.chat import Rendered
from fastconv.engine.attention import Rows, to_device
from fastconv.engine.model import Base, pack
from fastconv.engine.stack import Slot
from fastconv.engine.trainee import Job

#: Tokens that a GPU trains in the time of a launch and a capture; 14,000 of 1.5B and 6,000 of 7B were measured on an H100.
_GRAPH_TOK = 8192


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
    """Sizes to pad a micro-batch to: all tokens, a row (tokens), rows, supervised tokens. 0 means no padding."""

    n_tok: int = 0
    width: int = 0
    n_rows: int = 0
    n_supervised: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """A packed micro-batch on the device.

    `ids` and `positions` [T] int64, `seeds` [T] int32 (dropout, None without it). For each of the N supervised
    tokens: `take` [N] int64 is the index of the token before it, `targets` [N] int64 its id, `weights` [N] fp32 its
    loss weight and `owners` [N] int64 the index of its trainee. Padding has weight 0. `slots` are those that have
    rows here, `spans` their token ranges, the last with the padding (None if there is one slot).
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
    rows = [list(item.row.ids) for item in micro]
    ids, positions, layout = pack(rows, base, n_tok=sizes.n_tok, width=sizes.width, n_rows=sizes.n_rows)
    take, targets, weights, owners = _supervision(micro, layout.starts, sizes.n_supervised, device)
    live, spans = [], []
    for owner, slot in enumerate(slots):
        owned = [i for i, item in enumerate(micro) if item.owner == owner]
        if owned:
            live.append(slot)
            spans.append((layout.starts[owned[0]], layout.starts[owned[-1] + 1]))
    spans[-1] = (spans[-1][0], ids.shape[0])
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
        for start, stop in item.row.loss_spans:
            take += range(begin + start - 1, begin + stop - 1)
            targets += item.row.ids[start:stop]
        weights += [item.weight] * item.row.n_supervised
        owners += [item.owner] * item.row.n_supervised
    missing = max(0, n_padded - len(take))
    tensors = (torch.tensor(take), torch.tensor(targets), torch.tensor(weights), torch.tensor(owners))
    return tuple(to_device(F.pad(tensor, (0, missing)), device) for tensor in tensors)  # pyright: ignore[reportReturnType]


def token_seeds(rows: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """Dropout seeds [T] int32, one per token, from (row seed, row length) pairs: row seed + 0x01000193 * position."""
    seeds = torch.cat([seed + 0x01000193 * torch.arange(length, dtype=torch.int64) for seed, length in rows])
    return to_device((seeds & 0x7FFFFFFF).to(torch.int32), device)


def rounded_sizes(lengths: Sequence[int], n_supervised: int) -> PaddedSizes:
    """The sizes to pad a batch of rows with these lengths (tokens) to, where nothing is known of the others.

    Padding costs matrix products, more sizes cost captures: tokens are rounded up by 2 % on average, rows of logits by 4 %,
    and what costs least, the width of attention and the rows, to a power of two or the middle between two.
    """
    return PaddedSizes(
        _up(sum(lengths), 5, 64), _up(max(lengths), 2, 64), _up(len(lengths), 2, 1), _up(n_supervised, 4, 128)
    )


def _up(n: int, bits: int, least: int) -> int:
    """n rounded up to its first `bits` binary digits, and to a multiple of `least`."""
    step = max(least, 1 << max(0, (n - 1).bit_length() - bits))
    return -(-n // step) * step


@dataclass(frozen=True)
class JobSizes:
    """Sizes that the micro-batches of a schedule are padded to, by their tokens, rounded up."""

    of: Mapping[int, PaddedSizes]

    def __call__(self, lengths: Sequence[int], n_supervised: int) -> PaddedSizes:
        """The sizes for rows with these lengths (tokens); their own, rounded, where the schedule has none that hold them."""
        own = rounded_sizes(lengths, n_supervised)
        return _larger(own, self.of.get(own.n_tok, own))


def job_sizes(jobs: Sequence[Job], limit_tok: int) -> JobSizes:
    """The sizes of all micro-batches of at most `limit_tok` tokens that these jobs have, each step of all in one.

    There are as many as cost least, padding and captures together. The width of a row, the rows and the supervised tokens
    of a size are the most that any of its micro-batches has, so that they make no further sizes.
    """
    found: dict[int, PaddedSizes] = {}
    counts: Counter[int] = Counter()
    for lengths, n_supervised in _schedule(jobs, limit_tok):
        own = rounded_sizes(lengths, n_supervised)
        counts[own.n_tok] += 1
        found[own.n_tok] = _larger(own, found.get(own.n_tok, own))
    sizes: dict[int, PaddedSizes] = {}
    for together in _cheapest(counts):
        size = reduce(_larger, [found[n_tok] for n_tok in together])
        sizes |= dict.fromkeys(together, size)
    return JobSizes(sizes)


def _cheapest(counts: Mapping[int, int]) -> list[list[int]]:
    """Numbers of tokens, met so many times, in groups that are padded to their largest: what costs least if a group costs
    `_GRAPH_TOK` tokens."""
    sizes = sorted(counts)
    best: list[tuple[int, int]] = [
        (0, 0)
    ]  # for the first j sizes: (tokens that they cost, where their last group begins)
    for j in range(1, len(sizes) + 1):
        padding, options = 0, []
        for i in range(j - 1, -1, -1):
            padding += counts[sizes[i]] * (sizes[j - 1] - sizes[i])
            options.append((best[i][0] + _GRAPH_TOK + padding, i))
        best.append(min(options))
    groups, j = [], len(sizes)
    while j:
        groups.append(sizes[best[j][1] : j])
        j = best[j][1]
    return groups


def _schedule(jobs: Sequence[Job], limit_tok: int) -> Iterator[tuple[list[int], int]]:
    """(row lengths, number of supervised tokens) of each micro-batch, in the order in which they are trained."""
    for step in range(max(job.n_steps for job in jobs)):
        rows = [job.rows[index] for job in jobs if step < job.n_steps for index in job.batch(step)]
        lengths = [len(row.ids) for row in rows]
        for first, stop in split(lengths, limit_tok):
            yield lengths[first:stop], sum(row.n_supervised for row in rows[first:stop])


def _larger(one: PaddedSizes, other: PaddedSizes) -> PaddedSizes:
    return PaddedSizes(*map(max, astuple(one), astuple(other)))


def split(lengths: Sequence[int], limit_tok: int) -> list[tuple[int, int]]:
    """Rows with these lengths (tokens) in order, as (first, stop) of micro-batches: as few as fit into `limit_tok` tokens
    each, of sizes as equal as they can be. A longer row is alone."""
    fewest = len(_filled(lengths, limit_tok))
    low, high = min(limit_tok, -(-sum(lengths) // fewest)), limit_tok
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(lengths, middle)) <= fewest else (middle + 1, high)
    return _filled(lengths, high)


def _filled(lengths: Sequence[int], limit_tok: int) -> list[tuple[int, int]]:
    """As many rows in each micro-batch as fit into `limit_tok` tokens, at least one."""
    spans: list[tuple[int, int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not spans or length > room:
            spans.append((index, index))
            room = limit_tok
        spans[-1] = (spans[-1][0], index + 1)
        room -= length
    return spans
