"""Prompts packed for one pass of the base. On a CPU what they begin alike is computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fastconv.engine.attention import Layout, PrefixGroup, PrefixTrees, to_device
from fastconv.engine.model import Base, pack


@dataclass(frozen=True)
class PackedPrompts:
    """A pass over prompts: ids and positions [T] int64 on the base's device, and its layout.

    `pieces[key]` says where a prompt is, piece by piece: (token of the pass, position in the prompt, number of tokens).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    layout: Layout
    pieces: Mapping[int, tuple[tuple[int, int, int], ...]]

    def last(self, keys: Sequence[int]) -> torch.Tensor:
        """The tokens of the pass that end these prompts, int64 [len(keys)] on the base's device."""
        ends = [token + n_tok - 1 for token, _, n_tok in (self.pieces[key][-1] for key in keys)]
        return to_device(torch.tensor(ends), self.ids.device)


def pack_prompts(base: Base, prompts: Mapping[int, tuple[int, ...]]) -> PackedPrompts:
    """The pass over these prompts (token ids by any key).

    On a GPU common prefixes are computed for each row: one attention call saves more than sharing them would.
    """
    if base.device.type == "cuda":
        ids, positions, layout = pack([list(prompt) for prompt in prompts.values()], base)
        rows = zip(prompts.items(), layout.starts, strict=False)
        return PackedPrompts(ids, positions, layout, {key: ((at, 0, len(prompt)),) for (key, prompt), at in rows})
    base.require_length(max(map(len, prompts.values()), default=0))
    order, groups, tokens = shared_prefixes(prompts)
    layout, positions = PrefixTrees.of(groups, base.device)
    pieces: dict[int, tuple[tuple[int, int, int], ...]] = {}
    unplaced, at = iter(order), 0
    for group in groups:
        prefix, at = (at, 0, group.prefix_tok), at + group.prefix_tok
        for n_tok in group.branches_tok:
            pieces[next(unplaced)] = prefix, (at, group.prefix_tok, n_tok)
            at += n_tok
    return PackedPrompts(torch.tensor(tokens), positions, layout, pieces)


def shared_prefixes(prompts: Mapping[int, tuple[int, ...]]) -> tuple[list[int], list[PrefixGroup], list[int]]:
    """Group prompts by common prefix, so that it is computed once: (order of keys, groups, token ids of all groups).

    Neighbours in lexicographic order join a group unless it would then save fewer tokens: chat prompts of one persona
    share its system turn. At least the last token of each prompt is not shared.
    """
    order = sorted(prompts, key=lambda i: (prompts[i], i))
    members: list[list[int]] = []
    shared = 0  # length of the last group's common prefix
    for i in order:
        if members:
            common = min(_common_prefix(prompts[members[-1][0]], prompts[i]), shared, len(prompts[i]) - 1)
            if common and len(members[-1]) * common >= (len(members[-1]) - 1) * shared:
                members[-1].append(i)
                shared = common
                continue
        members.append([i])
        shared = len(prompts[i]) - 1
    groups, ids = [], []
    for group in members:
        first, last = prompts[group[0]], prompts[group[-1]]
        # In lexicographic order the first and the last of a group share what all of them share.
        prefix = min(_common_prefix(first, last), *(len(prompts[i]) - 1 for i in group)) if len(group) > 1 else 0
        groups.append(PrefixGroup(prefix, tuple(len(prompts[i]) - prefix for i in group)))
        ids += first[:prefix]
        for i in group:
            ids += prompts[i][prefix:]
    return order, groups, ids


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length (tokens) of the common prefix of two prompts."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))
