"""What a model family computes beyond a plain decoder: read from its config, computed here, or refused by name.

`rules_of` reads the rules of a loaded model; `Head` makes logits of hidden states. What no config field tells is found
by `engine.proof`, which compares the loaded base with transformers itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from fastconv.engine.attention import OTHER_BASE
from fastconv.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Kinds of layers whose attention is computed here; all others mix rows that are packed, or see other tokens.
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "attention"})
#: RoPE whose frequencies depend on the position alone, so that rows may be packed at any length.
_STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
#: RoPE whose frequencies change for a whole pass once one row is longer than the original length; the config's field
#: with that length (tokens).
_GROWING_ROPE = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}
#: Sizes of a small copy of a family.
_SMALL_VOCAB, _SMALL_WIDTH, _SMALL_LAYERS = 512, 128, 4
#: Config fields, where set, of attention that is not computed here, and what they say.
_REFUSED = {
    "attention_chunk_size": "chunked attention",
    "use_bidirectional_attention": "bidirectional attention",
    "is_encoder_decoder": "an encoder beside its decoder",
    "alibi": "ALiBi position biases",
    "use_alibi": "ALiBi position biases",
}
#: Families that compute, without a field that says so, what is not computed here.
_REFUSED_FAMILIES = {"bloom": "ALiBi position biases", "mpt": "ALiBi position biases"}


@dataclass(frozen=True)
class Head:
    """The output projection: logits = cap tanh(z / cap) with z = scale (W h + b); no cap where it is 0.

    `weight` [vocab, hidden] and `bias` [vocab] (or None) in the base's dtype.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float = 0.0

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocab] of hidden states [n, hidden], in their dtype."""
        return self._shaped(F.linear(hidden, self.weight, self.bias))

    def logits_fp32(self, hidden: torch.Tensor, n_rows: int) -> torch.Tensor:
        """Logits [n, vocab] fp32 of hidden states [n, hidden] fp32; `n_rows` of the weight are converted at a time."""
        biases = [None] * len(self.weight) if self.bias is None else self.bias.float().split(n_rows)
        pieces = [F.linear(hidden, w.float(), b) for w, b in zip(self.weight.split(n_rows), biases, strict=False)]
        return self._shaped(torch.cat(pieces, dim=-1))

    def _shaped(self, raw: torch.Tensor) -> torch.Tensor:
        scaled = raw if self.scale == 1.0 else raw * self.scale
        return scaled if not self.cap else torch.tanh(scaled / self.cap) * self.cap

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """d logits / d (W h + b), element by element, from the logits [n, vocab]: for the chain rule."""
        return self.scale if not self.cap else (1.0 - (logits / self.cap) ** 2) * self.scale


@dataclass(frozen=True)
class Rules:
    """What a loaded model needs beside its layers.

    `scale` and `cap` as in `Head`. `windows` are the sliding windows (tokens) of its layers, `softcap` says that some
    layer caps attention scores. `longest_tok` is the longest row whose numbers do not depend on what it is packed with
    or that the position table holds (0: any), and `longest_because` says why.
    """

    scale: float = 1.0
    cap: float = 0.0
    windows: tuple[int, ...] = ()
    softcap: bool = False
    longest_tok: int = 0
    longest_because: str = ""

    def pads(self, longest: int) -> bool:
        """Whether rows of up to `longest` tokens need a mask or a cap, which variable-length kernels do not have."""
        return self.softcap or any(window < longest for window in self.windows)


#: A plain decoder with RoPE.
NO_RULES = Rules()


def rules_of(model: PreTrainedModel) -> Rules:
    """The rules of a model. Raises ModelError, naming the family, for what fastconv does not compute."""
    refuse_beyond(model.config)
    config: Any = model.config.get_text_config()
    head: Any = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        what = f"the family {config.model_type} has no linear output head"
        raise ModelError(what, where="model.id", fix=OTHER_BASE)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    owners = (config, *model.modules())  # some layers keep their window, others read the config's
    windows = {int(w) for m in owners if isinstance(w := getattr(m, "sliding_window", None), int) and w > 0}
    softcap = bool(getattr(config, "attn_logit_softcapping", None))
    longest, because = _longest(config)
    return Rules(scale, float(cap or 0.0), tuple(sorted(windows)), softcap, longest, because)


def refuse_beyond(config: Any) -> None:
    """Raise ModelError, naming the family, if a transformers config states what is not computed here."""
    for what in _beyond(config.get_text_config()):
        raise ModelError(
            f"the family {config.model_type} has {what}, which is not computed here", where="model.id", fix=OTHER_BASE
        )


def rope_tables(config: Any) -> list[Mapping[str, Any]]:
    """The RoPE parameters of a text config: one table, or one for each kind of layer; empty without RoPE."""
    found = getattr(config, "rope_parameters", None) or {}
    tables = list(found.values()) if found and all(isinstance(part, Mapping) for part in found.values()) else [found]
    return [table for table in tables if table]


def _beyond(config: Any) -> Iterator[str]:
    """What a config states that is not computed here, in words."""
    if what := _REFUSED_FAMILIES.get(config.model_type):
        yield what
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    if others := sorted(kinds - _LAYER_TYPES):
        yield f"layers of kind {', '.join(others)}"
    chunked = kinds and "chunked_attention" not in kinds
    for field, what in _REFUSED.items():
        if getattr(config, field, None) and not (field == "attention_chunk_size" and chunked):
            yield f"{what} ({field})"
    for table in rope_tables(config):
        kind = table.get("rope_type", "default")
        if kind not in _STATIC_ROPE and kind not in _GROWING_ROPE:
            yield f"RoPE of type {kind}"


def _longest(config: Any) -> tuple[int, str]:
    """(longest row in tokens or 0 for any, why)."""
    tables = rope_tables(config)
    limits = []
    for table in tables:
        kind = table.get("rope_type", "default")
        if kind in _GROWING_ROPE:
            field = _GROWING_ROPE[kind]
            limits.append((int(table.get(field) or getattr(config, field)), f"its {kind} RoPE changes with the length"))
    if not tables and (n_positions := getattr(config, "max_position_embeddings", None)):
        limits.append((int(n_positions), "its position table ends there"))
    return min(limits, default=(0, ""))


def small_config(original: Any) -> Any:
    """A copy of a model's config with few layers, one of each kind at least, a narrow MLP and a short vocabulary."""
    config = copy.deepcopy(original)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text: Any = config.get_text_config()
    n_layers = int(text.num_hidden_layers)
    kinds = list(getattr(text, "layer_types", None) or [])
    shared = int(getattr(text, "num_kv_shared_layers", None) or 0)
    # The last layers may read keys and values of earlier ones of their kind.
    parts = (range(n_layers - shared), range(n_layers - shared, n_layers))
    firsts = {next(i for i in part if kinds[i] == kind) for part in parts for kind in {kinds[i] for i in part if kinds}}
    chosen = sorted(firsts | set(range(min(2, n_layers - shared))))[:_SMALL_LAYERS]
    if shared:
        text.num_kv_shared_layers = sum(i in parts[1] for i in chosen)
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == n_layers:
            setattr(text, name, [value[i] for i in chosen])
    text.num_hidden_layers = len(chosen)
    for name, value in list(vars(text).items()):
        if name.startswith("vocab_size") and isinstance(value, int):  # some have one for each layer's own embedding too
            setattr(text, name, min(value, _SMALL_VOCAB))
    for name in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if isinstance(size := getattr(text, name, None), int):
            setattr(text, name, min(size, _SMALL_WIDTH))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        for part in (config, text):
            setattr(part, name, None)
    return config
