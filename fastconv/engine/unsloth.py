"""The base through Unsloth: imported before anything it patches, loaded in 16 bits or 4, adopted by our engine.

Always `FastLanguageModel`: `FastModel` drops a second adapter without a word.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from fastconv.engine import fused
from fastconv.engine.installed import BITSANDBYTES, UNSLOTH, require
from fastconv.engine.locate import cache_home
from fastconv.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_WITHOUT = "set model.engine = 'torch'"
#: What Unsloth patches; what was imported before it keeps its old functions, and some of them silently.
PATCHED = ("transformers", "peft", "trl")
_ENVIRONMENT = {
    "UNSLOTH_COMPILE_DISABLE": "1",  # generated trainers and a PEFT patched for the whole process: not used here
    "UNSLOTH_DISABLE_STATISTICS": "1",  # it would call its hub at every load
}


def require_usable(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ModelError where its kernels cannot run: without a GPU, or on a base in fp32 (they would run unfused)."""
    if device.type != "cuda" or dtype == torch.float32:
        raise ModelError(
            f"Unsloth needs a GPU and a base in 16 bits, not {device.type} in {str(dtype).removeprefix('torch.')}",
            where="model.engine",
            fix=_WITHOUT,
        )


def import_unsloth() -> ModuleType:
    """The `unsloth` module. Raises ModelError if it is not a tested version, comes too late or cannot be imported."""
    # bitsandbytes too: without it `from_pretrained` fails even where nothing is quantized.
    require((*UNSLOTH, *BITSANDBYTES), "model.engine", _WITHOUT)
    if "unsloth" not in sys.modules:
        assert_first(about_to_import=True)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_home() / "unsloth"))  # else the working directory
    try:
        with _quiet():
            import unsloth  # pyright: ignore[reportMissingImports]
    except (ImportError, NotImplementedError, RuntimeError, OSError, AttributeError) as error:
        raise ModelError(f"unsloth cannot be imported: {error}", where="model.engine", fix=_WITHOUT) from error
    return unsloth


def assert_first(*, about_to_import: bool = False) -> None:
    """Raise ModelError unless unsloth was (or is about to be) imported before what it patches.

    `sys.modules` lists modules as their imports end: unsloth's first part does so before it turns to the others.
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
    """The model in `folder` through `FastLanguageModel`, adopted. `four_bit` quantizes its layers to NF4 on the way.

    Raises ModelError with the mend.
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
            use_gradient_checkpointing=False,  # ours, where it is needed
            offload_embedding=False,
            local_files_only=True,
        )
    fused.adopt(model)
    return model


def patched_classes(model_type: str) -> None:
    """Patch transformers' classes as a load would, for models with random weights. Raises ModelError as `load` does."""
    import_unsloth()
    from unsloth.models.llama import FastLlamaModel  # pyright: ignore[reportMissingImports]
    from unsloth.models.qwen2 import FastQwen2Model  # pyright: ignore[reportMissingImports]

    {"llama": FastLlamaModel, "qwen2": FastQwen2Model}[model_type].pre_patch()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Banners go to the log, not among the output of a run."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        yield
    _log.debug("%s", said.getvalue())
