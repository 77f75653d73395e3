"""Forward functions of our own for the decoders of Llama and Qwen2 models, whoever loaded them.

Each replaces the `forward` of one module instance, whatever its class was patched to, and calls the Triton kernels of
`elementwise` between the matrix products. In fp32, which is for checking (near ties), the same formulas run in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastconv.engine.attention import Layout, Padded
from fastconv.engine.kernels.elementwise import rope, rope_joined, swiglu, swiglu_joined
from fastconv.engine.kernels.joined import join, joined_product
from fastconv.engine.kernels.norms import residual_norm, rms_norm


def use_fused_forwards(model: nn.Module) -> int:
    """Give the norms, MLPs and attentions of a model (Llama, Qwen2) our forward; returns how many modules got one.

    Other kinds of layers stay as they are.
    """
    forwards: dict[str, Callable[..., Any]] = {"RMSNorm": _norm, "MLP": _mlp, "Attention": _attention}
    n_changed = 0
    module: Any
    for module in model.modules():
        kind = type(module).__name__
        if not kind.startswith(("Llama", "Qwen2")):
            continue
        forward = forwards.get(kind.removeprefix("Llama").removeprefix("Qwen2"))
        windowed = forward is _attention and getattr(module, "sliding_window", None)
        if forward is not None and not windowed and (forward is not _mlp or module.config.hidden_act == "silu"):
            module.forward = MethodType(forward, module)
            if forward in _JOINED:
                join(module, _JOINED[forward])
            n_changed += 1
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # where the weights lay before they were joined
    return n_changed


#: Kinds of model whose whole decoder is computed here, and rotary embeddings that are the same at every length.
DECODER_TYPES, ROPE_TYPES = ("llama", "qwen2"), ("default", "linear", "llama3")


def why_not_whole(config: Any) -> str:
    """Why `use_fused_decoder` would compute another model than this config's; empty if it would not."""
    if config.model_type not in DECODER_TYPES:
        return f"it is a {config.model_type} model, not {' or '.join(DECODER_TYPES)}"
    if config.hidden_act != "silu":
        return f"its MLPs use {config.hidden_act}, not silu"
    if (kind := _rope_type(config)) not in ROPE_TYPES:
        return f"its rotary embedding is of type {kind}, not {' or '.join(ROPE_TYPES)}"
    windows = [kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"]
    if windows or getattr(config, "use_sliding_window", False):
        return "some of its layers attend within a window"
    return ""


def use_fused_decoder(model: Any) -> None:
    """`use_fused_forwards`, and a decoder that calls nothing else: less work for the host, and none of what a class was
    patched to. Only where `why_not_whole` has no reason against it."""
    use_fused_forwards(model)
    decoder = model.get_decoder()
    decoder.rotary_emb = RotaryEmbedding(model.config).to(decoder.embed_tokens.weight.device)
    decoder.forward = MethodType(_decoder, decoder)
    for layer in decoder.layers:
        layer.forward = MethodType(_layer, layer)
        layer.self_attn.scaling = layer.self_attn.head_dim**-0.5


def _rope_type(config: Any) -> str:
    return config.rope_parameters.get("rope_type", "default")


class RotaryEmbedding(nn.Module):
    """cos and sin [1, T, head_dim] of positions [1, T], computed in fp32 as transformers does (Su et al. 2021)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.scaling = 1.0
        if (kind := _rope_type(config)) == "default":
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            powers = torch.arange(0, width, 2, dtype=torch.float32) / width
            frequencies = 1.0 / config.rope_parameters["rope_theta"] ** powers
        else:
            frequencies, self.scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In x's dtype."""
        angles = position_ids[..., None].float() * self.frequencies.float()
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scaling).to(x.dtype), (angles.sin() * self.scaling).to(x.dtype)


def _decoder(
    self: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, *, layout: Layout, **_: Any
) -> BaseModelOutputWithPast:
    """Token ids [1, T] -> last_hidden_state [1, T, hidden], in the dtype of the embedding's output."""
    hidden = self.embed_tokens(input_ids)
    position_embeddings = self.rotary_emb(hidden, position_ids)
    for layer in self.layers:
        hidden = layer(hidden, position_embeddings=position_embeddings, layout=layout)
    return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def _layer(self: Any, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
    """Pre-norm attention and MLP, each added to its input; [1, T, hidden]."""
    hidden_states, normed = _residual(self.input_layernorm, hidden_states, None)
    hidden_states, normed = _residual(self.post_attention_layernorm, hidden_states, self.self_attn(normed, **named)[0])
    return hidden_states + self.mlp(normed)


def _residual(norm: Any, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + delta, its norm), or (x, its norm)."""
    if x.dtype == torch.float32:
        x = x if delta is None else x + delta
        return x, norm(x)
    return residual_norm(x, delta, norm.weight, norm.variance_epsilon)


def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if hidden_states.dtype == torch.float32:
        scale = torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (hidden_states * scale)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    both = joined_product(self, x)
    if both is not None and x.dtype != torch.float32:
        return self.down_proj(swiglu_joined(both))
    gate, up = (self.gate_proj(x), self.up_proj(x)) if both is None else both.chunk(2, dim=-1)
    return self.down_proj(F.silu(gate) * up if x.dtype == torch.float32 else swiglu(gate, up))


def _attention(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    *,
    layout: Layout,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """hidden_states [1, T, hidden] -> ([1, T, hidden], None)."""
    n_tok = hidden_states.shape[1]
    cos, sin = (table[0] for table in position_embeddings)
    all_three = joined_product(self, hidden_states)
    if all_three is not None and hidden_states.dtype != torch.float32:
        padded = layout if isinstance(layout, Padded) else None
        rows = None if padded is None else (padded.source, padded.place)
        q, k, v = rope_joined(all_three[0], cos, sin, _heads(self), rows)
        if padded is not None:
            out = padded.attend_padded(q, k, v, self.scaling)
            return self.o_proj(out.reshape(1, n_tok, -1)), None
    else:
        parts = (
            (project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj))
            if all_three is None
            else all_three.split([n_heads * self.head_dim for n_heads in (*_heads(self), _heads(self)[1])], dim=-1)
        )
        q, k, v = (part.reshape(n_tok, -1, self.head_dim) for part in parts)
        turn = _rope_fp32 if hidden_states.dtype == torch.float32 else rope
        q, k = turn(q, cos, sin), turn(k, cos, sin)
    out = layout.attend(self.layer_idx, q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), self.scaling)
    return self.o_proj(out.reshape(1, n_tok, -1)), None


def _heads(attention: Any) -> tuple[int, int]:
    """Numbers of query and of key-value heads."""
    return attention.q_proj.out_features // attention.head_dim, attention.k_proj.out_features // attention.head_dim


def _rope_fp32(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, d] turned by cos, sin [T, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


#: Layers of a module that read the same input, by our forward of it.
_JOINED = {_mlp: ("gate_proj", "up_proj"), _attention: ("q_proj", "k_proj", "v_proj")}
