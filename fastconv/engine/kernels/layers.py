"""Fused forward functions for the norms, MLPs and attentions of Llama and Qwen2 models loaded by transformers.

Each function replaces the `forward` of one module instance and calls the Triton kernels of `elementwise`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from fastconv.engine.attention import Layout
from fastconv.engine.kernels.elementwise import rms_norm, rope, swiglu


def use_fused_forwards(model: nn.Module) -> int:
    """Replace the forward of a model's norms, MLPs and attentions (Llama, Qwen2); returns the number of changed
    modules.

    Other modules stay as they are. In fp32, which is for checking, every module computes as in transformers.
    """
    forwards: dict[str, Callable[..., Any]] = {"RMSNorm": _norm, "MLP": _mlp, "Attention": _attention}
    n_changed = 0
    module: Any
    for module in model.modules():
        kind = type(module).__name__
        if not kind.startswith(("Llama", "Qwen2")) or "forward" in vars(
            module
        ):  # already replaced, by `engine.unsloth` for example
            continue
        forward = forwards.get(kind.removeprefix("Llama").removeprefix("Qwen2"))
        windowed = forward is _attention and getattr(module, "sliding_window", None)
        if forward is not None and not windowed and (forward is not _mlp or module.config.hidden_act == "silu"):
            module.forward = MethodType(forward, module)
            n_changed += 1
    return n_changed


def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if hidden_states.dtype == torch.float32:
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    if x.dtype == torch.float32:
        return type(self).forward(self, x)
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _attention(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    *,
    layout: Layout,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """hidden_states [1, T, hidden] -> ([1, T, hidden], None)."""
    if hidden_states.dtype == torch.float32:
        return type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values, layout=layout, **kwargs
        )
    n_tok = hidden_states.shape[1]
    q, k, v = (
        project(hidden_states).view(n_tok, -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    cos, sin = (table[0] for table in position_embeddings)
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    out = layout.attend(self.layer_idx, q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), self.scaling)
    return self.o_proj(out.reshape(1, n_tok, -1)), None
