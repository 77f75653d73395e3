"""The model that is measured: a real one, or one of a named shape with random weights (speed and memory only)."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch

from fastconv.engine import trl_reference as reference
from fastconv.engine.attention import ATTENTION, register
from fastconv.engine.model import Base, load_base, resolve_device, resolve_dtype, wrap
from fastconv.engine.locate import engine_identity
from fastconv.recipe import LoraSettings, ModelSettings
from fastconv.engine.shapes import ModelShape, named_shape, shape_of
from fastconv.chat import ChatTokenizer, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANDOM = "random:"
#: How much a fresh head is scaled up, so that next-token distributions are about as sure as a trained model's.
_SURENESS = 8.0


@dataclass(frozen=True)
class Subject:
    """A model that can be had twice: as our Base, and plain for the usual way."""

    settings: ModelSettings
    random: ModelShape | None
    lora: LoraSettings = field(default_factory=LoraSettings)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return resolve_device(self.settings)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the base."""
        return resolve_dtype(self.settings)

    def base(self) -> Base:
        """Ours: a frozen base with our attention."""
        if self.random is None:
            return load_base(self.settings)
        if engine_identity(self.settings)["engine"] == "unsloth":
            return wrap(_random_unsloth(self.random, self), cast(ChatTokenizer, NoText()), self.settings.id)
        return wrap(_random_model(self.random, ATTENTION, self), cast(ChatTokenizer, NoText()), self.settings.id)

    def plain(self) -> PreTrainedModel:
        """Theirs: transformers' model with SDPA attention."""
        if self.random is None:
            return reference.plain_model(self.settings).requires_grad_(False).eval()
        return _random_model(self.random, "sdpa", self)


@dataclass(frozen=True)
class NoText:
    """Stands in for the tokenizer of a model that never learned to write: nothing ends an answer early."""

    stop_ids: tuple[int, ...] = ()


def subject(settings: ModelSettings) -> Subject:
    """The subject of `settings.id`; `random:NAME` takes a shape from `fastconv.engine.shapes`."""
    if settings.id.startswith(RANDOM):
        return Subject(settings, named_shape(settings.id.removeprefix(RANDOM)))
    return Subject(settings, None)


def shape(base: Base) -> ModelShape:
    """The shape of a loaded base."""
    return shape_of(base.model.config.to_dict())


def ragged_rows(n: int, vocab: int, shortest: int, longest: int, seed: int = 0) -> tuple[Rendered, ...]:
    """Rows of random tokens, lengths uniform between two bounds, about 60 % of each carrying loss."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        length = rng.randint(shortest, longest)
        rows.append(Rendered(tuple(rng.randrange(vocab) for _ in range(length)), max(1, round(0.4 * length))))
    return tuple(rows)


def _random_unsloth(shape: ModelShape, model: Subject) -> PreTrainedModel:
    """The same shape as Unsloth would have loaded it."""
    from fastconv.engine import fused
    from fastconv.engine import unsloth as unsloth_path

    unsloth_path.patched_classes("qwen2" if shape.qkv_bias else "llama")
    made = _random_model(shape, "sdpa", model)
    fused.adopt(made)
    return made


def _random_model(shape: ModelShape, attention: str, model: Subject) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    register()
    kind = Qwen2Config if shape.qkv_bias else LlamaConfig
    config = kind(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads, num_key_value_heads=shape.n_kv_heads,
        tie_word_embeddings=shape.tied, max_position_embeddings=4096,
        eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config.head_dim = shape.head_dim
    with model.device:
        made = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=attention)
        if (
            not shape.tied
        ):  # fresh heads are nearly indifferent, which no trained model is: draws would be made of it all
            made.get_output_embeddings().weight.data.mul_(_SURENESS)
    return made.requires_grad_(False).eval()
