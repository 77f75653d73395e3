"""A forward pass in fp32 on a base held in a shorter format, one layer at a time: no second copy of the base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastconv.engine.attention import Layout
from fastconv.engine.model import Base

#: Rows of the head held in fp32 at once; 16,384 x 3,584 are 0.23 GB.
_HEAD_ROWS = 16384


@torch.no_grad()
def hidden_fp32(base: Base, ids: torch.Tensor, positions: torch.Tensor, layout: Layout) -> torch.Tensor:
    """As `Base.hidden`, every product in fp32: hidden states [T, hidden] fp32."""
    with _widening(base):
        return base.hidden(ids, positions, layout)


@torch.no_grad()
def logprobs_fp32(base: Base, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [n, vocab] fp32 of hidden states [n, hidden] fp32; the head is widened a piece at a time."""
    pieces = [F.linear(hidden, piece.float()) for piece in base.head.weight.split(_HEAD_ROWS)]
    return torch.log_softmax(torch.cat(pieces, dim=-1), dim=-1)


@contextlib.contextmanager
def _widening(base: Base) -> Iterator[None]:
    """Inside, each layer is fp32 while it runs. Widening is exact, so narrowing again gives the same bits."""
    embedding = base.model.get_input_embeddings()
    layers: list[nn.Module] = []
    for child in base.backbone.children():
        layers += list(child) if isinstance(child, nn.ModuleList) else [child]
    layers = [layer for layer in layers if layer is not embedding and any(True for _ in layer.parameters())]

    def widen(layer: nn.Module, *_: Any) -> None:
        layer.to(torch.float32)

    def narrow(layer: nn.Module, *_: Any) -> None:
        layer.to(base.dtype)

    hooks = [embedding.register_forward_hook(lambda layer, inputs, output: output.float())]
    for layer in layers:
        hooks += [layer.register_forward_pre_hook(widen), layer.register_forward_hook(narrow)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            narrow(layer)
