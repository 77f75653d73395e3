"""The linear layer that carries adapters: which adapters are live (`Slot`, `Route`) and the forward pass
(`StackedLinear`).

`y = W x + sum_i s_i B_i A_i d_i(x)`, with d_i the dropout of the trainable adapter and the identity for frozen ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from fastconv.engine.lora import Adapter, keep_mask
from fastconv.seeding import seed_of


class BranchKernel(Protocol):
    """A fused kernel that computes whole stacked layers; `kernels.lora.StackedKernel` is the one there is."""

    def serves(self, layer: StackedLinear, x: torch.Tensor) -> bool:
        """Whether it can compute this layer on x [..., T, in]."""
        ...

    def forward(self, layer: StackedLinear, x: torch.Tensor) -> torch.Tensor:
        """W x + b + the live branches, for x [..., T, in] -> [..., T, out]."""
        ...

    def prepare(self, route: Route, dtype: torch.dtype, n_tok: int) -> None:
        """Make the tables of a pass over `n_tok` tokens, before a graph is captured."""
        ...

    def release(self) -> None:
        """Forget the live slots."""
        ...

    def graph_state(self) -> Any:
        """What a captured graph points to, to be kept as long as the graph."""
        ...

    def refresh_graph(self, state: Any) -> None:
        """Refresh what a captured graph points to, before a replay."""
        ...


@dataclass
class Slot:
    """The adapters for a span of tokens. Only `trainable` gets gradients, and dropout (a probability) on its input."""

    frozen: tuple[Adapter, ...] = ()
    trainable: Adapter | None = None
    dropout: float = 0.0

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The frozen adapters, then the trainable one."""
        return (*self.frozen, self.trainable) if self.trainable is not None else self.frozen


@dataclass
class Route:
    """Which slots are live, and which tokens of the current pass belong to which slot.

    `spans[i]` is the token range (start, stop) of `slots[i]`; together they cover the pass. None stands for one slot
    with all tokens. `dropout_seeds` [T] int32 has one seed per token, so that a mask depends only on the row and the
    step, not on the rest of the batch. `kernel` computes the branches if there is one, else torch's operations do.
    `plain` switches fused kernels off, for comparison.
    """

    slots: tuple[Slot, ...] = ()
    spans: tuple[tuple[int, int], ...] | None = None
    dropout_seeds: torch.Tensor | None = None
    kernel: BranchKernel | None = None
    plain: bool = False


class StackedLinear(nn.Module):
    """A frozen linear layer with the branches of the live adapters."""

    def __init__(self, base: nn.Linear, name: str, route: Route) -> None:
        super().__init__()
        self.training = base.training
        self.base = base
        self.name = name
        self.route = route
        self.salt = seed_of("dropout", name) & 0x7FFFFFFF

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., T, in] -> [..., T, out]."""
        kernel = self.route.kernel
        if kernel is not None and not self.route.plain and self.route.slots and kernel.serves(self, x):
            return kernel.forward(self, x)
        y = self.base(x)
        if not self.route.slots:
            return y
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if self.route.spans is None:
            (slot,) = self.route.slots  # without spans, several slots would be ambiguous
            return self._add_branches(flat_y, flat_x, slot, self.route.dropout_seeds).view_as(y)
        parts = []
        for slot, (start, stop) in zip(self.route.slots, self.route.spans, strict=True):
            seeds = None if self.route.dropout_seeds is None else self.route.dropout_seeds[start:stop]
            parts.append(self._add_branches(flat_y[start:stop], flat_x[start:stop], slot, seeds))
        return torch.cat(parts).view_as(y)

    def _add_branches(self, y: torch.Tensor, x: torch.Tensor, slot: Slot, seeds: torch.Tensor | None) -> torch.Tensor:
        """y [T, out] plus the slot's low-rank products of x [T, in], computed in x's dtype."""
        for adapter in slot.adapters:
            if self.name not in adapter.weights:
                continue
            a, b = (weight.to(x.dtype) for weight in adapter.weights[self.name])
            branch_input = x
            if adapter is slot.trainable and slot.dropout > 0 and seeds is not None:
                branch_input = x * keep_mask(seeds, x.shape[-1], self.salt, slot.dropout).to(x.dtype)
            y = torch.addmm(y, F.linear(branch_input, a) * adapter.scale, b.t())
        return y
