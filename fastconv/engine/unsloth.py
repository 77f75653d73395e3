"""The base through Unsloth: imported before anything it patches, loaded in 16 bits or 4, its layers run by our forwards.

Unsloth loads the base and de-quantizes 4-bit weights with its own kernel. Everything between (norms, RoPE, SwiGLU, the
stack, attention, the loss) runs by the forwards of `kernels.layers`, which a base of engine `torch` gets too: Unsloth's
kernels for these know one adapter, no dropout beside a frozen one and no biased projection, and measured no faster.

Always `FastLanguageModel`: `FastModel` drops a second adapter without a word.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastconv.engine.locate import BITSANDBYTES, UNSLOTH, require_versions
from fastconv.engine.optim import is_four_bit
from fastconv.errors import ModelError
from fastconv.hub import cache_home

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_WITHOUT = "set model.engine = 'torch'"
#: Packages that Unsloth patches; if imported before it, they keep their old functions, in part silently.
PATCHED = ("transformers", "peft", "trl")
_ENVIRONMENT = {
    "UNSLOTH_COMPILE_DISABLE": "1",  # it would write compiled copies of modules for the whole process, which we do not use
    "UNSLOTH_DISABLE_STATISTICS": "1",  # it would call the hub at every load
}


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
        if torch.cuda.is_available() and torch.version.hip is None:
            # Its switch for tests without a GPU. On an NVIDIA card it only leaves TRL's trainers alone, which would be rewritten
            # and compiled, a quarter of the import; every other device it would take for such a card.
            os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")
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
    """The model in `folder`, loaded by `FastLanguageModel` run by our forwards (`adopt`); `four_bit` quantizes it to NF4.

    Raises ModelError as `import_unsloth` and `adopt` do.
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
    adopt(model)
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


def adopt(model: PreTrainedModel) -> None:
    """Run a model that Unsloth loaded by our forwards. Only this instance is changed.

    Unsloth patches the classes of transformers: its decoder casts to the config's dtype, cuts batches at its own idea of
    a sequence's length, and its rotary embedding rounds early. None of that is left in the way here.
    Raises ModelError for a kind of model whose whole decoder is not ours.
    """
    from fastconv.engine.kernels import layers  # needs Triton, which machines without a GPU lack

    if reason := layers.why_not_whole(model.config):
        raise ModelError(f"Unsloth's path cannot run this model: {reason}", where="model.engine", fix=_WITHOUT)
    layers.use_fused_decoder(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and is_four_bit(module):
            module.forward = types.MethodType(_four_bit_forward, module)


def is_adopted(model: PreTrainedModel) -> bool:
    """True for a model that went through `adopt`."""
    return "forward" in vars(model.get_decoder())  # pyright: ignore[reportAttributeAccessIssue]


class _FourBitLinear(torch.autograd.Function):
    """x W^T for a frozen packed W, unpacked by Unsloth's kernel both ways; nothing dense is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, state: Any) -> torch.Tensor:
        ctx.packed = weight, state
        return x @ _unpacked(weight, state, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0] @ _unpacked(*ctx.packed, grads[0].dtype), None, None  # pyright: ignore[reportCallIssue]


def _unpacked(weight: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    from unsloth.kernels.utils import fast_dequantize  # pyright: ignore[reportMissingImports]

    return fast_dequantize(weight, state).to(dtype)


def _four_bit_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """x [..., in] -> [..., out]."""
    y = _FourBitLinear.apply(x, self.weight, self.weight.quant_state)
    return y if self.bias is None else y + self.bias  # pyright: ignore[reportOperatorIssue, reportReturnType]
