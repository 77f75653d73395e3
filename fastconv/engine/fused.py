"""Unsloth's fused kernels with our stack live, on a model that Unsloth loaded.

The kernels know one adapter: weights A, B and one scale. A slot's adapters are handed to them as one concatenation,
`A = [A_f ; A_t]`, `B = [B_f s_f/s_t | B_t]`, scale s_t, which is exact without dropout; the gradient of a concatenation
goes to its parts, so only the trainable one gets any. With dropout the branches need different inputs, and with
several slots different adapters: then every layer runs its own forward, as without Unsloth.

Attention stays ours: rows are packed by a `layout`, which Unsloth's own attention knows nothing of.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastconv.engine.attention import Layout
from fastconv.engine.stack import Route, StackedLinear
from fastconv.errors import ModelError, TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Kinds of model whose layers are what the functions below take them for.
MODEL_TYPES = ("llama", "qwen2")

#: (weight, its quantization or None, A [r, in], B [out, r], scale), the last three None where no adapter is live.
LoraParameters = tuple[torch.Tensor, Any, torch.Tensor | None, torch.Tensor | None, float | None]


def adopt(model: PreTrainedModel) -> None:
    """Make a model that Unsloth loaded run our attention, and its fused kernels wherever they are exact.

    Only these instances are changed. Raises ModelError for a kind of model that Unsloth's path is not tested with.
    """
    kind = model.config.model_type
    if kind not in MODEL_TYPES:
        raise ModelError(
            f"Unsloth's kernels are tested with {' and '.join(MODEL_TYPES)} models, not {kind}",
            where="model.engine",
            fix="set model.engine = 'torch'",
        )
    hook()
    backbone: Any = model.get_decoder()
    # It would cut a packed batch at its own idea of a sequence's length without a word.
    backbone._unsloth_allow_packed_overlength = True
    for layer in backbone.layers:
        layer.self_attn.forward = types.MethodType(_attention, layer.self_attn)
        layer.mlp.forward = types.MethodType(_mlp, layer.mlp)


def is_adopted(model: PreTrainedModel) -> bool:
    """True for a model that went through `adopt`."""
    layers: Any = model.get_decoder().layers  # pyright: ignore[reportAttributeAccessIssue]
    return getattr(layers[0].mlp.forward, "__func__", None) is _mlp


def hook() -> None:
    """Teach `unsloth.kernels.fast_lora` to read stacked layers; for all others it stays as it was. Idempotent."""
    from unsloth.kernels import fast_lora  # pyright: ignore[reportMissingImports]

    ours: dict[str, Callable[[StackedLinear], Any]] = {
        "get_lora_parameters": lora_parameters,
        "get_lora_parameters_bias": lambda layer: (*lora_parameters(layer), layer.base.bias),
        "_has_multiple_active_adapters": lambda layer: False,  # to the kernels a stack is one adapter
        "_has_activation_fake_quantizer": lambda layer: False,
    }
    for name, answer in ours.items():
        theirs = getattr(fast_lora, name)
        if not isinstance(theirs, _Reader):
            setattr(fast_lora, name, _Reader(answer, theirs))


class _Reader:
    """Answers for our layers, and asks Unsloth's own function about all others."""

    def __init__(self, ours: Callable[[StackedLinear], Any], theirs: Callable[..., Any]) -> None:
        self.ours = ours
        self.theirs = theirs

    def __call__(self, layer: Any, *rest: Any, **named: Any) -> Any:
        return self.ours(layer) if isinstance(layer, StackedLinear) else self.theirs(layer, *rest, **named)


def lora_parameters(layer: StackedLinear) -> LoraParameters:
    """What the fused kernels need of a layer under the live slot: its adapters as one."""
    weight = layer.base.weight
    quantization = getattr(weight, "quant_state", None)
    slots = layer.route.slots
    adapters = [adapter for adapter in (slots[0].adapters if slots else ()) if layer.name in adapter.weights]
    if not adapters:
        return weight, quantization, None, None, None
    *before, last = adapters
    a, b = last.weights[layer.name]
    if not before:
        return weight, quantization, a, b, last.scale
    # Cast first: the kernels compute in the base's precision, and half the bytes are joined.
    dtype = weight.dtype if quantization is None else quantization.dtype
    firsts = [adapter.weights[layer.name] for adapter in before]
    rescaled = [
        (other_b * (adapter.scale / last.scale)).to(dtype) for adapter, (_, other_b) in zip(before, firsts, strict=True)
    ]
    joined_a = torch.cat([*(other_a.to(dtype) for other_a, _ in firsts), a.to(dtype)])
    joined_b = torch.cat([*rescaled, b.to(dtype)], dim=1)
    return weight, quantization, joined_a, joined_b, last.scale


def can_fuse(layers: Sequence[Any]) -> bool:
    """True where one fused kernel over these layers computes what their own forwards would."""
    if not all(isinstance(layer, StackedLinear) for layer in layers):
        return False
    route: Route = layers[0].route
    if route.plain or len(route.slots) > 1:
        return False
    if not route.slots:
        return True  # the bare base, by the same kernels: else a stack would seem to differ from it by their rounding
    slot = route.slots[0]
    if slot.trainable is not None and slot.dropout > 0 and route.dropout_seeds is not None:
        return False
    # The backward pass of the kernels takes it for granted that every layer carries an adapter.
    carried = all(any(layer.name in adapter.weights for adapter in slot.adapters) for layer in layers)
    return carried or not torch.is_grad_enabled()


def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    """down(silu(gate x) * up x) for x [1, T, hidden]."""
    from unsloth.kernels import fast_lora  # pyright: ignore[reportMissingImports]

    if can_fuse((self.gate_proj, self.up_proj, self.down_proj)):
        return fast_lora.apply_lora_mlp_swiglu(self, x)
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _attention(
    self: Any,
    hidden_states: torch.Tensor,
    *,
    layout: Layout,
    position_ids: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **_: Any,
) -> tuple[torch.Tensor, None, None]:
    """hidden_states [1, T, hidden] -> the same shape, with Unsloth's rotary and output kernels and our layout."""
    from unsloth.kernels import fast_lora  # pyright: ignore[reportMissingImports]
    from unsloth.kernels.rope_embedding import fast_rope_embedding  # pyright: ignore[reportMissingImports]

    n_tok = hidden_states.shape[1]
    if position_ids.shape[-1] != n_tok:
        raise TrainingError(
            f"Unsloth cut a batch of {position_ids.shape[-1]} tokens to {n_tok}",
            where="model.engine",
            fix="set model.engine = 'torch'",
        )
    inputs = (self.q_proj, self.k_proj, self.v_proj)
    if can_fuse(inputs) and all(layer.base.bias is None for layer in inputs):
        query, key, value = fast_lora.apply_lora_qkv(self, hidden_states)
    else:  # a bias (as Qwen2 has) is not part of the fused kernel
        query, key, value = (layer(hidden_states) for layer in inputs)
    query, key, value = (part.view(1, n_tok, -1, self.head_dim).transpose(1, 2) for part in (query, key, value))
    query, key = fast_rope_embedding(query, key, *position_embeddings, position_ids)
    out = layout.attend(int(self.layer_idx), query[0], key[0], value[0], self.head_dim**-0.5)
    out = out.reshape(1, n_tok, -1)
    return (fast_lora.apply_lora_o(self, out) if can_fuse((self.o_proj,)) else self.o_proj(out)), None, None
