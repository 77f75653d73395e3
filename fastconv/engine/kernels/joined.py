"""Linear layers that read the same input as one product: q, k and v of an attention, gate and up of an MLP.

Their weights lie below one another in one tensor, of which each layer's own weight is a view: no memory is doubled, and
whoever reads or changes a layer's weight (folding, hashes, exports) finds what it always found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastconv.engine.lora import StackedLinear


class Joined:
    """The weights of some layers below one another: `weight` [sum of outs, in], and `bias` [sum of outs] or None."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        """Moves the layers' weights into one tensor; raises ValueError unless `can_join`."""
        if not can_join(layers):
            raise ValueError("these layers cannot be joined")
        self.outs = tuple(layer.out_features for layer in layers)
        with torch.no_grad():
            self.weight = torch.cat([layer.weight for layer in layers])
            has_bias = layers[0].bias is not None
            self.bias = torch.cat([layer.bias for layer in layers]) if has_bias else None
        for layer, weight, bias in zip(_bare(layers), self.weight.split(self.outs), self._biases(), strict=True):
            layer.weight.data = weight
            if bias is not None:
                layer.bias.data = bias

    def product(self, layers: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor | None:
        """What the layers give for x [..., in], side by side [..., sum of outs], live branches included; None where that
        has to be computed layer by layer."""
        if x.dtype != self.weight.dtype or not self._holds(layers):
            return None
        stacked = [layer for layer in layers if isinstance(layer, StackedLinear)]
        route = stacked[0].route if stacked else None
        if route is None or not route.slots:
            return F.linear(x, self.weight, self.bias)
        if len(stacked) < len(layers) or route.kernel is None or route.plain or not route.kernel.serves(stacked[0], x):
            return None
        return route.kernel.joined(stacked, self.weight, self.bias, x)

    def _biases(self) -> Sequence[torch.Tensor | None]:
        return [None] * len(self.outs) if self.bias is None else self.bias.split(self.outs)

    def _holds(self, layers: Sequence[nn.Module]) -> bool:
        """Whether the layers' weights are still views of these."""
        at, size = self.weight.data_ptr(), self.weight.shape[1] * self.weight.element_size()
        for layer, n_out in zip(_bare(layers), self.outs, strict=True):
            if layer.weight.data_ptr() != at or layer.weight.dtype != self.weight.dtype:
                return False
            at += n_out * size
        return True


def can_join(layers: Sequence[nn.Module]) -> bool:
    """Whether these are plain linear layers of one input and one dtype, all with a bias or none, on one device."""
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    kinds = {
        (type(layer.weight), layer.weight.shape[1], layer.weight.dtype, layer.weight.device, layer.bias is None)
        for layer in _bare(layers)
    }
    return len(kinds) == 1 and all(type(layer.weight) is nn.Parameter for layer in _bare(layers))


def join(module: nn.Module, names: Sequence[str]) -> None:
    """Join these layers of a module, where they can be: `joined_product` then computes them at once."""
    layers = [getattr(module, name) for name in names]
    if can_join(layers):
        object.__setattr__(module, "joined", (tuple(names), Joined(layers)))  # no part of the state dict


def joined_product(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The outputs of the module's joined layers for x, side by side; None if it has none, or where each has to be
    computed by itself."""
    found = module.__dict__.get("joined")
    if found is None:
        return None
    names, joined = found
    return joined.product([getattr(module, name) for name in names], x)


def _bare(layers: Sequence[nn.Module]) -> list[Any]:
    """The linear layers below stacked ones."""
    return [layer.base if isinstance(layer, StackedLinear) else layer for layer in layers]
