"""Export and import of adapters as PEFT directories, which `PeftModel.from_pretrained` and vLLM load.

A directory holds a JSON of settings and a safetensors file with PEFT's tensor names; both are written here without
PEFT. Pickles (.bin, .pt) are never read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from fastconv.engine.lora import Adapter, adapter_from_tensors, concatenate, read_safetensors
from fastconv.engine.stack import Stack
from fastconv.errors import AdapterError
from fastconv.recipe import LoraSettings
from fastconv.store.ledger import write_atomically

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
STACK_FILE = "stack.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: PEFT options that change what an adapter computes, with the values under which it is plain LoRA.
_PLAIN = {
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
}


@dataclass(frozen=True)
class BaseReference:
    """The base model as an export names it: hub id or folder, and commit (40 hex digits, empty if there is none)."""

    id: str
    revision: str = ""


def export_concatenated(adapters: Sequence[Adapter], base: BaseReference, folder: Path) -> Path:
    """Write the whole stack as one PEFT adapter, the scales multiplied into B (`lora.concatenate`); returns
    `folder`."""
    return export_adapter(concatenate(adapters), base, folder)


def export_separate(adapters: Sequence[Adapter], base: BaseReference, folder: Path) -> Path:
    """Write each adapter of the stack as a PEFT directory of its own, and `stack.json`; returns `folder`.

    `stack.json` has the base with its revision and, in order, each adapter's folder, scale, rank and sha256 of weights.
    """
    entries = []
    for place, adapter in enumerate(adapters):
        name = f"{place}"
        export_adapter(adapter, base, folder / name)
        entries.append({"folder": name, "sha256": adapter.sha256(), "scale": adapter.scale, "r": adapter.shape.r})
    description = {"base": {"id": base.id, "revision": base.revision, "name": adapters[0].base}, "adapters": entries}
    write_atomically(folder / STACK_FILE, json.dumps(description, indent=1).encode())
    return folder


def export_adapter(adapter: Adapter, base: BaseReference, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write one adapter as a PEFT directory, weights in `dtype`; returns `folder`.

    The settings are written last, so that an interrupted export is not taken for an adapter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS_FILE, adapter.to_bytes(dtype))
    config = peft_config(adapter.shape, base)
    write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=1).encode())
    return folder


def peft_config(shape: LoraSettings, base: BaseReference) -> dict[str, Any]:
    """PEFT's adapter_config.json (version 0.21) for a LoRA of this shape; other options keep PEFT's defaults."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.id,
        "revision": base.revision or None,
        "inference_mode": True,
        "r": shape.r,
        "lora_alpha": int(shape.alpha) if float(shape.alpha).is_integer() else shape.alpha,
        "use_rslora": shape.rslora,
        "lora_dropout": 0.0,
        "target_modules": sorted(shape.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_dora": False,
    }


def load_peft_folder(stack: Stack, folder: Path, base: BaseReference) -> Adapter:
    """The adapter of a PEFT directory, on the device of the stack's base.

    The base must be the stack's by the name in the weights' metadata (as fastconv writes it), or `base` by the
    settings. Raises AdapterError if the directory is incomplete, holds a pickle, is not plain LoRA, or does not fit
    the base.
    """
    config = _read_config(folder)
    where = str(folder)
    shape = _shape(config, where)
    for target in shape.targets:
        if target in stack.tied:
            raise AdapterError(
                f"it targets {target}, which shares its weight with the embedding on this base",
                where=where,
                fix="train it without that layer",
            )
    data = (folder / WEIGHTS_FILE).read_bytes()
    tensors, metadata = read_safetensors(data, where)
    if not (metadata["base"] == stack.base.name if "base" in metadata else _same_base(config, base)):
        raise AdapterError(
            f"the adapter was made for {config.get('base_model_name_or_path') or 'another base'}, not {base.id}",
            where=where,
            fix="use the base it was trained on",
        )
    return stack.take(adapter_from_tensors(tensors, shape, stack.base.name, stack.sizes, where))


def _read_config(folder: Path) -> Mapping[str, Any]:
    where = str(folder)
    pickles = [folder] if folder.suffix in _PICKLES else []
    if folder.is_dir():
        pickles = [path for path in sorted(folder.iterdir()) if path.suffix in _PICKLES]
    if not (folder / WEIGHTS_FILE).is_file():
        if pickles:
            raise AdapterError(
                f"{pickles[0].name} is a pickle, which can run code when read; only safetensors are loaded",
                where=where,
                fix="save the adapter again with safe_serialization=True",
            )
        raise AdapterError(f"no {WEIGHTS_FILE}", where=where, fix="give a folder written by PEFT or `fastconv export`")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{CONFIG_FILE} cannot be read: {error}", where=where, fix="copy the adapter again"
        ) from None
    if not isinstance(config, dict):
        raise AdapterError(f"{CONFIG_FILE} is not a JSON object", where=where, fix="copy the adapter again")
    return config


def _shape(config: Mapping[str, Any], where: str) -> LoraSettings:
    """The LoRA shape that a PEFT config states. Raises AdapterError for anything but plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"it is a {config.get('peft_type')} adapter", where=where, fix="use a plain LoRA adapter")
    for option, plain in _PLAIN.items():
        if option in config and config[option] not in plain:
            raise AdapterError(
                f"{option} = {config[option]!r} is not plain LoRA", where=where, fix=f"train without {option}"
            )
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets:
        raise AdapterError(
            "target_modules is not a list of layer names", where=where, fix="save it with the layers' names"
        )
    try:
        return LoraSettings(
            r=config.get("r"),  # pyright: ignore[reportArgumentType]
            alpha=config.get("lora_alpha"),  # pyright: ignore[reportArgumentType]
            rslora=bool(config.get("use_rslora", False)),
            targets=tuple(sorted({str(name).rsplit(".", 1)[-1] for name in targets})),
        )
    except ValidationError:
        raise AdapterError("r, lora_alpha or target_modules are not valid", where=where, fix="train it again") from None


def _same_base(config: Mapping[str, Any], base: BaseReference) -> bool:
    """Whether hub id (or folder) and, where both have one, the revision are the same; commits may be abbreviated."""
    named, revision = str(config.get("base_model_name_or_path") or ""), str(config.get("revision") or "")
    if re.fullmatch(r"[0-9a-f]{7,40}", revision) and base.revision and not base.revision.startswith(revision):
        return False
    if not named:
        return False
    return named == base.id or Path(named).expanduser().resolve() == Path(base.id).expanduser().resolve()
