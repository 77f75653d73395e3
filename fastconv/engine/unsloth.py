"""Loading the base with Unsloth, and running its fused kernels with our stacked layers and attention.

The first part imports Unsloth, which must come before the libraries that it patches, and loads a model in 16 or 4 bits,
always with `FastLanguageModel`: `FastModel` silently drops a second adapter. The second part (`patch_model`) replaces
forwards of the loaded model, so that its kernels see a stack as one adapter and are used only where they are exact.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from fastconv.engine.attention import Layout
from fastconv.engine.locate import BITSANDBYTES, UNSLOTH, cache_home, require_versions
from fastconv.engine.stacked_linear import Route, StackedLinear
from fastconv.errors import ModelError, TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_WITHOUT = "set model.engine = 'torch'"
#: Packages that Unsloth patches; if imported before it, they keep their old functions, in part silently.
PATCHED = ("transformers", "peft", "trl")
_ENVIRONMENT = {
    "UNSLOTH_COMPILE_DISABLE": "1",  # it would generate trainers and patch PEFT for the whole process, which we do not use
    "UNSLOTH_DISABLE_STATISTICS": "1",  # it would call the hub at every load
}
#: Model types whose layers have the structure that the forwards below expect.
MODEL_TYPES = ("llama", "qwen2")

#: (weight, its quantization or None, A [r, in], B [out, r], scale); the last three are None if no adapter is live.
LoraParameters = tuple[torch.Tensor, Any, torch.Tensor | None, torch.Tensor | None, float | None]


def require_usable(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ModelError where Unsloth's kernels cannot run: without a GPU, or on a base in fp32 (they would be
    unfused)."""
    if device.type != "cuda" or dtype == torch.float32:
        raise ModelError(
            f"Unsloth needs a GPU and a base in 16 bits, not {device.type} in {str(dtype).removeprefix('torch.')}",
            where="model.engine",
            fix=_WITHOUT,
        )


def import_unsloth() -> ModuleType:
    """The `unsloth` module. Raises ModelError if its version is not tested, what it patches was imported before it, or
    it cannot be imported."""
    # bitsandbytes too: without it `from_pretrained` fails even where nothing is quantized.
    require_versions((*UNSLOTH, *BITSANDBYTES), "model.engine", _WITHOUT)
    if "unsloth" not in sys.modules:
        assert_imported_first(about_to_import=True)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault(
            "UNSLOTH_COMPILE_LOCATION", str(cache_home() / "unsloth")
        )  # its default is the working directory
    try:
        with _quiet():
            import unsloth  # pyright: ignore[reportMissingImports]
    except (ImportError, NotImplementedError, RuntimeError, OSError, AttributeError) as error:
        raise ModelError(f"unsloth cannot be imported: {error}", where="model.engine", fix=_WITHOUT) from error
    return unsloth


def assert_imported_first(*, about_to_import: bool = False) -> None:
    """Raise ModelError unless unsloth was (or is about to be) imported before what it patches.

    `sys.modules` is in the order of import: unsloth's first module is there before it imports the others.
    """
    order = [name.split(".")[0] for name in sys.modules]
    start = len(order) if about_to_import else order.index("unsloth")
    before = [name for name in PATCHED if name in order[:start]]
    if before:
        raise ModelError(
            f"{before[0]} was imported before unsloth, which must patch it first",
            where="model.engine",
            fix=f"load the base before importing {before[0]} (in a notebook: restart, run fastconv first), or {_WITHOUT}",
        )


def load(folder: Path, dtype: torch.dtype, device: torch.device, *, four_bit: bool = False) -> PreTrainedModel:
    """The model in `folder`, loaded by `FastLanguageModel` and patched (`patch_model`); `four_bit` quantizes it to NF4.

    Raises ModelError as `import_unsloth` and `patch_model` do.
    """
    unsloth = import_unsloth()
    longest = json.loads((folder / "config.json").read_text()).get("max_position_embeddings", 4096)
    with _quiet():
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            str(folder),
            dtype=dtype,
            load_in_4bit=four_bit,  # its default is 4 bits
            max_seq_length=longest,  # a shorter one cuts batches, a longer one stretches the rotary embedding
            device_map={"": device},
            use_exact_model_name=True,  # else a known name may be swapped for a quantized copy
            use_gradient_checkpointing=False,  # ours is used, where needed
            offload_embedding=False,
            local_files_only=True,
        )
    patch_model(model)
    return model


def patch_classes(model_type: str) -> None:
    """Patch transformers' classes as a load would, for models with random weights. Raises ModelError as `load` does."""
    import_unsloth()
    from unsloth.models.llama import FastLlamaModel  # pyright: ignore[reportMissingImports]
    from unsloth.models.qwen2 import FastQwen2Model  # pyright: ignore[reportMissingImports]

    {"llama": FastLlamaModel, "qwen2": FastQwen2Model}[model_type].pre_patch()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send Unsloth's banners to the log instead of stdout."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        yield
    _log.debug("%s", output.getvalue())


def patch_model(model: PreTrainedModel) -> None:
    """Make a model that Unsloth loaded use our attention, and its fused kernels wherever they are exact.

    Only this model's modules are changed. Raises ModelError for a model type that is not in `MODEL_TYPES`.
    """
    kind = model.config.model_type
    if kind not in MODEL_TYPES:
        raise ModelError(
            f"Unsloth's kernels are tested with {' and '.join(MODEL_TYPES)} models, not {kind}",
            where="model.engine",
            fix="set model.engine = 'torch'",
        )
    backbone: Any = model.get_decoder()
    if any(getattr(layer.self_attn, "sliding_window", None) for layer in backbone.layers):
        raise ModelError(
            f"Unsloth's kernels are not used with the sliding windows of this {kind} model",
            where="model.engine",
            fix="set model.engine = 'torch'",
        )
    patch_fast_lora()
    # Otherwise it would silently cut a packed batch at its maximal sequence length.
    backbone._unsloth_allow_packed_overlength = True
    for layer in backbone.layers:
        layer.self_attn.forward = types.MethodType(_attention, layer.self_attn)
        layer.mlp.forward = types.MethodType(_mlp, layer.mlp)


def patch_fast_lora() -> None:
    """Make `unsloth.kernels.fast_lora` read stacked layers; for other layers it is unchanged. Idempotent."""
    from unsloth.kernels import fast_lora  # pyright: ignore[reportMissingImports]

    readers: dict[str, Callable[[StackedLinear], Any]] = {
        "get_lora_parameters": lora_parameters,
        "get_lora_parameters_bias": lambda layer: (*lora_parameters(layer), layer.base.bias),
        "_has_multiple_active_adapters": lambda layer: False,  # to the kernels a stack is one adapter
        "_has_activation_fake_quantizer": lambda layer: False,
    }
    for name, read_stacked in readers.items():
        original = getattr(fast_lora, name)
        if not isinstance(original, _Reader):
            setattr(fast_lora, name, _Reader(read_stacked, original))


class _Reader:
    """Reads our layers itself, and calls Unsloth's function for all others."""

    def __init__(self, read_stacked: Callable[[StackedLinear], Any], original: Callable[..., Any]) -> None:
        self.read_stacked = read_stacked
        self.original = original

    def __call__(self, layer: Any, *rest: Any, **named: Any) -> Any:
        return self.read_stacked(layer) if isinstance(layer, StackedLinear) else self.original(layer, *rest, **named)


def lora_parameters(layer: StackedLinear) -> LoraParameters:
    """A layer's parameters for the fused kernels: the adapters of the live slot, concatenated to one."""
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
    # Cast before joining: the kernels compute in the base's dtype, and half the bytes are copied.
    dtype = weight.dtype if quantization is None else quantization.dtype
    frozen_weights = [adapter.weights[layer.name] for adapter in before]
    rescaled = [
        (frozen_b * (adapter.scale / last.scale)).to(dtype)
        for adapter, (_, frozen_b) in zip(before, frozen_weights, strict=True)
    ]
    joined_a = torch.cat([*(frozen_a.to(dtype) for frozen_a, _ in frozen_weights), a.to(dtype)])
    joined_b = torch.cat([*rescaled, b.to(dtype)], dim=1)
    return weight, quantization, joined_a, joined_b, last.scale


def can_fuse(layers: Sequence[Any]) -> bool:
    """Whether one fused kernel over these layers computes what their own forwards would."""
    if not all(isinstance(layer, StackedLinear) for layer in layers):
        return False
    route: Route = layers[0].route
    if route.plain or len(route.slots) > 1:
        return False
    if not route.slots:
        return True  # the bare base uses the same kernels, else it would differ from a stack by their rounding
    slot = route.slots[0]
    if slot.trainable is not None and slot.dropout > 0 and route.dropout_seeds is not None:
        return False
    # The backward pass of the kernels assumes that every layer has an adapter.
    all_adapted = all(any(layer.name in adapter.weights for adapter in slot.adapters) for layer in layers)
    return all_adapted or not torch.is_grad_enabled()


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
