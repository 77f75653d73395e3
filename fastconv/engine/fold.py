"""Folding a stack into the weights, to reproduce the published semantics, and how much that rounds away.

The live stack needs none of this. `rho` = ||delta|| / ||W|| says how much of a fold survives bf16: with an 8-bit
significand the relative error of the delta is about 0.17 % / rho.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch

from fastconv.engine.lora import Adapter, concatenate
from fastconv.engine.optim import assert_foldable, dense_weight
from fastconv.engine.stack import Stack, StackedLinear
from fastconv.errors import AdapterError

#: Below this share of the weights' norm, folding in bf16 loses over 10 % of the delta.
RHO_MIN = 0.017

Semantics = Literal["live", "published"]


def rho(stack: Stack, adapters: Sequence[Adapter]) -> dict[str, float]:
    """||sum of scale * B A||_F / ||W||_F by module, without a dense product (`Adapter.delta_norm`)."""
    joined = concatenate(adapters)
    norms = {name: float(torch.linalg.vector_norm(dense_weight(layer.base))) for name, layer in _layers(stack)}
    return {module: joined.delta_norm(module) / norms[module] for module in joined.sizes}


@contextlib.contextmanager
def folded(stack: Stack, adapters: Sequence[Adapter], semantics: Semantics = "live") -> Iterator[None]:
    """Add the adapters' delta to the base's weights inside the block; afterwards the weights are the old bits.

    The pristine weights wait on the host and come back by copy: subtracting the delta would not restore them. Raises
    AdapterError, with nothing changed, if the base is not fp32 and some module's rho is under `RHO_MIN`, unless
    `semantics` is "published", which asks for that rounding; ModelError if the base is quantized.
    """
    if stack.route.slots:
        raise AdapterError("a stack is live", where="fold", fix="fold outside of Stack.live")
    assert_foldable({name: layer.base for name, layer in _layers(stack)})
    joined = concatenate(adapters)
    if semantics != "published" and stack.base.dtype != torch.float32:
        _refuse_rounding(rho(stack, adapters), stack.base.dtype)
    pristine: dict[str, torch.Tensor] = {}
    layers = {name: layer for name, layer in _layers(stack) if name in joined.sizes}
    try:
        with torch.no_grad():
            for name, layer in layers.items():
                weight = layer.base.weight
                pristine[name] = weight.to("cpu", copy=True)
                a, b = joined.weights[name]
                weight += (b @ a * joined.scale).to(weight.dtype)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in pristine.items():
                layers[name].base.weight.copy_(tensor)


def _refuse_rounding(found: Mapping[str, float], dtype: torch.dtype) -> None:
    module = min(found, key=lambda name: found[name])
    if found[module] < RHO_MIN:
        raise AdapterError(
            f"{module} has rho {found[module]:.2%}, under {RHO_MIN:.1%}: {dtype} would round over 10 % of it away",
            where="fold",
            fix='keep the stack live, or say semantics = "published" to reproduce that rounding',
        )


def _layers(stack: Stack) -> Iterator[tuple[str, StackedLinear]]:
    for module in stack.base.model.modules():
        if isinstance(module, StackedLinear):
            yield module.name, module
