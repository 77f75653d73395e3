"""The embedded models, written once as model folders into the user's cache.

`builtin:smollm2` is converted from GGUF; `builtin:tiny` has SmolLM2's tokenizer and random weights, the same on every
machine.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from fastconv.engine.folder import file_sha256
from fastconv.engine.locate import (
    BUILTIN_DONE,
    TINY,
    TINY_VERSION,
    ModelSource,
    builtin_folder,
    builtin_gguf,
    model_folder,
)
from fastconv.errors import ModelError
from fastconv.recipe import ModelSettings


def prepare_model_folder(settings: ModelSettings, source: ModelSource) -> Path:
    """The folder with the model's files, after download or conversion if needed. Raises ModelError if that fails."""
    return ensure_builtin(source.id) if source.kind == "builtin" else model_folder(source, settings)


def ensure_builtin(name: str) -> Path:
    """The folder of the embedded model of this name, written atomically unless a copy is there.

    A copy is checked by its name and the sha256 of its files. Raises ModelError if the package is missing, the disk is
    full, or the cached copy was altered.
    """
    folder = builtin_folder(name)
    if _holds(folder, name):
        _verify(folder)
        return folder
    gguf = builtin_gguf()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as work:
            _convert(gguf, Path(work) / "model", name)
            if (folder / BUILTIN_DONE).is_file() and not _holds(folder, name):
                with contextlib.suppress(FileNotFoundError):  # another process has moved it
                    os.rename(folder, Path(work) / "another")  # written under this name by mistake, or damaged
            try:
                os.rename(Path(work) / "model", folder)
            except OSError:
                if not _holds(folder, name):  # else another process was faster; its copy is the same
                    raise
    except OSError as error:
        raise ModelError(
            f"the embedded model cannot be converted: {error}",
            where=str(folder.parent),
            fix="free 600 MB there, or point FASTCONV_CACHE elsewhere",
        ) from None
    return folder


def _convert(gguf: Path, folder: Path, name: str) -> None:
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = _random(len(tokenizer)) if name == TINY else _embedded(gguf)
    model.config.eos_token_id = model.generation_config.eos_token_id = 2
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    sums = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    (folder / BUILTIN_DONE).write_text(json.dumps({"model": name, "sha256": sums}, indent=1))


def _embedded(gguf: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    # The bar that it draws has no switch, and would break a run's own lines.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are fp32 now; `save_pretrained` refuses as long as the model is marked as quantized.
    delattr(model.config, "quantization_config")
    vars(model).update(hf_quantizer=None, is_quantized=False)
    return model


def _random(vocab: int) -> Any:
    """Two layers of width 32; matrices of standard deviation 1/sqrt(in), so that logits spread over a few nats."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(TINY_VERSION)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.1 * noise if name.endswith("norm.weight") else noise * weight.shape[-1] ** -0.5)
    return model


def _holds(folder: Path, name: str) -> bool:
    """Whether a whole copy of this very model lies there, by what was written with it."""
    try:
        done = json.loads((folder / BUILTIN_DONE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(done, dict) and done.get("model") == name and isinstance(done.get("sha256"), dict)


def _verify(folder: Path) -> None:
    sums = json.loads((folder / BUILTIN_DONE).read_text())["sha256"]
    for name, expected in sums.items():
        path = folder / name
        actual = file_sha256(path) if path.is_file() else "nothing"
        if actual != expected:
            raise ModelError(
                "the cached copy of the embedded model was altered",
                where=str(path),
                fix=f"delete {folder}; it is converted again",
            )
