"""The embedded model, converted once from GGUF to a plain model folder in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from fastconv.engine.locate import BUILTIN, builtin_gguf
from fastconv.errors import ModelError

_DONE = "fastconv.json"


def ensure_builtin(folder: Path) -> Path:
    """Convert the embedded model into `folder` unless a checked copy is there. Atomic: all of it or none.

    Raises ModelError if the package is missing, the disk is full, or the cached copy was altered.
    """
    if (folder / _DONE).is_file():
        _verify(folder)
        return folder
    gguf = builtin_gguf()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as work:
            _convert(gguf, Path(work) / "model")
            try:
                os.rename(Path(work) / "model", folder)
            except FileExistsError:
                pass  # another process was faster; its copy is the same
            except OSError:
                if not (folder / _DONE).is_file():
                    raise
    except OSError as error:
        raise ModelError(
            f"the embedded model cannot be converted: {error}",
            where=str(folder.parent),
            fix="free 600 MB there, or point FASTCONV_CACHE elsewhere",
        ) from None
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain fp32 now; what still says "quantized" would make saving refuse.
    delattr(model.config, "quantization_config")
    vars(model).update(hf_quantizer=None, is_quantized=False)
    model.config.eos_token_id = model.generation_config.eos_token_id = 2
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    (folder / _DONE).write_text(json.dumps({"model": BUILTIN, "sha256": sums}, indent=1))


def _verify(folder: Path) -> None:
    sums = json.loads((folder / _DONE).read_text())["sha256"]
    for name, expected in sums.items():
        path = folder / name
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "nothing"
        if found != expected:
            raise ModelError(
                "the cached copy of the embedded model was altered",
                where=str(path),
                fix=f"delete {folder}; it is converted again",
            )
