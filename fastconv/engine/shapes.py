"""Model shapes, and the FLOPs and bytes that follow from them. Needs neither torch nor a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fastconv.errors import ModelError, did_you_mean


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder-only model with gated MLP and grouped-query attention (Llama, Qwen2)."""

    name: str
    n_layers: int
    hidden: int
    intermediate: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool = False

    @property
    def modules(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of one layer's seven linear modules: q, k, v, o, gate, up, down."""
        queries, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return (
            (self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden),
            (self.hidden, self.intermediate), (self.hidden, self.intermediate), (self.intermediate, self.hidden),
        )  # fmt: skip

    @property
    def linear_params(self) -> int:
        """Number of weights in all layers' linear modules, without head and embedding."""
        return self.n_layers * sum(n_in * n_out for n_in, n_out in self.modules)

    @property
    def head_params(self) -> int:
        """Number of weights in the output head."""
        return self.hidden * self.vocab

    @property
    def total_params(self) -> int:
        """Number of all weights, norms and biases included."""
        biases = self.n_layers * (self.n_heads + 2 * self.n_kv_heads) * self.head_dim if self.qkv_bias else 0
        norms = (2 * self.n_layers + 1) * self.hidden
        return self.linear_params + self.head_params * (1 if self.tied else 2) + biases + norms

    def adapter_params(self, r: int) -> int:
        """Number of weights in a LoRA adapter of rank r on all seven modules."""
        return self.n_layers * r * sum(n_in + n_out for n_in, n_out in self.modules)

    def kv_bytes_per_tok(self, bytes_per_value: int = 2) -> int:
        """Bytes of key-value cache per token."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_per_value


@dataclass(frozen=True, slots=True)
class Work:
    """The workload that FLOPs depend on: mean row length (tokens), share of tokens with loss, LoRA rank."""

    length_tok: float
    completion_share: float
    r: int


def train_flops_per_tok(shape: ModelShape, work: Work, *, checkpointing: bool = False) -> float:
    """FLOPs per trained token on a frozen base: 2 per weight forward, 2 for the gradient to the input, and the
    adapter's.

    (4 + 2c) linear + 4 head x share + (3.5 + c) 2 layers x width x length + (6 + 2c) adapter, c = 1 if activations are
    recomputed. The frozen weights need no gradient, so 4 instead of 6; causal attention computes half the square.
    """
    recomputed = 1 if checkpointing else 0
    width = shape.n_heads * shape.head_dim
    return (
        (4 + 2 * recomputed) * shape.linear_params
        + 4 * shape.head_params * work.completion_share
        + (3.5 + recomputed) * 2 * shape.n_layers * width * work.length_tok
        + (6 + 2 * recomputed) * shape.adapter_params(work.r)
    )


def forward_flops_per_tok(shape: ModelShape, work: Work) -> float:
    """FLOPs per token of a forward pass with causal attention, logits on `completion_share` of the tokens."""
    width = shape.n_heads * shape.head_dim
    return (
        2 * shape.linear_params
        + 2 * shape.head_params * work.completion_share
        + 2 * shape.n_layers * width * work.length_tok
        + 2 * shape.adapter_params(work.r)
    )


def weight_bytes(shape: ModelShape, *, four_bit: bool = False) -> float:
    """Bytes of the base in 16 bits; NF4 layers have 4 bits a weight and an 8-bit scale for 64 (plus 1 % for the
    rest)."""
    if not four_bit:
        return 2.0 * shape.total_params
    return shape.linear_params * (0.5 + 1 / 64) * 1.01 + 2.0 * (shape.total_params - shape.linear_params)


def adapter_bytes(shape: ModelShape, r: int, *, eight_bit: bool = False) -> float:
    """Bytes of a frozen snapshot and a trainee: fp32 weights, gradient and two moments (8 bits each with
    `eight_bit`)."""
    return shape.adapter_params(r) * (4 + 4 + 4 + (2 if eight_bit else 8))


def activation_bytes_per_tok(shape: ModelShape, *, plain: bool = False) -> float:
    """Bytes of activations kept for the backward pass per token, in 16 bits, with two adapters and dropout.

    With the fused kernels a layer keeps about three values of the MLP's width and nine of the model's: 5.0 MB for
    Qwen2.5-7B, where an H100 took 4.8 and 5.0 (`fastconv bench group` and `behavior`). `plain` (without the kernels):
    six and twelve, 8.8 MB.
    """
    mlp, model = (6, 12) if plain else (3, 9)
    return 2.0 * shape.n_layers * (mlp * shape.intermediate + model * shape.hidden)


def recomputed_bytes_per_tok(shape: ModelShape) -> float:
    """Activation bytes per token when recomputing: those of one layer without kernels, and the inputs of all layers."""
    return activation_bytes_per_tok(shape, plain=True) / shape.n_layers + 2.0 * shape.n_layers * shape.hidden


#: Rows decoded at once; a data-centre GPU is compute-bound well below this, a CPU gains nothing beyond 64.
MAX_ROWS = {"cuda": 1024, "cpu": 64}
#: Rows decoded at once on a GPU where their cache is small: the fewer waves, the fewer passes over the last rows of one.
MANY_ROWS = 1536
#: Share of all GPU memory up to which a cache is small.
SMALL_SHARE = 0.33


def rows_at_once(device: str, row_bytes: float, memory_bytes: float) -> int:
    """The most rows that are decoded at once, each with `row_bytes` of cache, on a device with so much memory."""
    small = device == "cuda" and is_small_cache(MANY_ROWS * row_bytes, memory_bytes)
    return max(MAX_ROWS[device], MANY_ROWS) if small else MAX_ROWS[device]


def is_small_cache(n_bytes: float, memory_bytes: float) -> bool:
    """Whether a key-value cache leaves enough of a GPU's memory to be kept beside training."""
    return n_bytes < SMALL_SHARE * memory_bytes


def cached_tok(n_tok: int) -> int:
    """Tokens of a row's cache on a GPU: of some more than it has, so that a cache serves rows that are a little longer."""
    return -(-n_tok // 64) * 64


#: More than any model has: beyond it a size of a config is damage, and never the length of a list.
_MOST_LAYERS, _MOST = 10_000, 2**31
#: What the families call a size in config.json, the usual name first.
_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "n_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
        "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
        "intermediate": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim"),
        "n_heads": ("num_attention_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads"),
        "n_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
        "vocab": ("vocab_size",),
    }
)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a model's config.json (parsed) about its language model: nested where it has other parts too."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def shape_of(config: Mapping[str, Any], name: str = "model") -> ModelShape:
    """The shape in a model's config.json (parsed), by whatever names its family uses. Raises ModelError if a size is
    missing or is no number."""
    text = text_config(config)

    def size(of: str, otherwise: int | None = None) -> int:
        key = next((key for key in _NAMES[of] if text.get(key) is not None), _NAMES[of][0])
        value = text.get(key, otherwise)
        return _size(key, otherwise if value is None else value, _MOST_LAYERS if of == "n_layers" else _MOST, name)

    heads, hidden = size("n_heads"), size("hidden")
    return ModelShape(
        name=name,
        n_layers=size("n_layers"),
        hidden=hidden,
        intermediate=size("intermediate", 4 * hidden),
        n_heads=heads,
        n_kv_heads=1 if text.get("multi_query") else size("n_kv_heads", heads),
        head_dim=_size("head_dim", text.get("head_dim") or max(1, hidden // heads), _MOST, name),
        vocab=size("vocab"),
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        qkv_bias=text.get("model_type") == "qwen2",
    )


def n_positions(config: Mapping[str, Any], otherwise: int, name: str) -> int:
    """Tokens of the longest row by a model's config.json (parsed); `otherwise` where it does not say. Raises ModelError."""
    return _size("max_position_embeddings", config.get("max_position_embeddings") or otherwise, _MOST, name)


def _size(key: str, value: Any, most: int, where: str) -> int:
    """A size that a config states, or the largest where a family states it layer by layer. Raises ModelError if it is none."""
    try:
        number = int(max(value) if isinstance(value, list) else value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if not 1 <= number <= most:
        what = f"says {key} is {value!r:.60}, which is no size" if value is not None else f"says nothing of {key}"
        raise ModelError(f"its config {what}", where=where, fix="use a Llama or Qwen2 kind of model, or fetch it again")
    return number


SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            ModelShape("qwen2.5-0.5b", 24, 896, 4864, 14, 2, 64, 151936, True, True),
            ModelShape("qwen2.5-1.5b", 28, 1536, 8960, 12, 2, 128, 151936, True, True),
            ModelShape("qwen2.5-3b", 36, 2048, 11008, 16, 2, 128, 151936, True, True),
            ModelShape("qwen2.5-7b", 28, 3584, 18944, 28, 4, 128, 152064, False, True),
            ModelShape("qwen2.5-14b", 48, 5120, 13824, 40, 8, 128, 152064, False, True),
            ModelShape("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152, True),
            ModelShape("tiny", 2, 32, 64, 4, 2, 8, 49152, True),  # builtin:tiny
            ModelShape("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256, False),
        )
    }
)


def named_shape(name: str) -> ModelShape:
    """A shape of `SHAPES` by name. Raises ModelError with the known names."""
    if name not in SHAPES:
        raise ModelError(f"no shape is called {name!r}", where="model", fix=did_you_mean(name, SHAPES))
    return SHAPES[name]
