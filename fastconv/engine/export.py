"""Export and import of adapters as PEFT directories, which `PeftModel.from_pretrained` and vLLM load.

A directory holds a JSON of settings and a safetensors file with PEFT's tensor names; both are written here without
PEFT. Pickles (.bin, .pt) are never read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from pydantic import ValidationError

from fastconv.engine.locate import folder_called
from fastconv.engine.lora import Adapter, adapter_from_tensors, concatenate, read_safetensors
from fastconv.engine.stack import Stack
from fastconv.errors import AdapterError
from fastconv.recipe import LoraSettings
from fastconv.store.ledger import write_atomically

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
STACK_FILE = "stack.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: Options of PEFT that say nothing of what a saved adapter computes: names, versions, how it was trained, and sizes that
#: are read here. Every other option must have PEFT's own default value, and every option that PEFT lacks must be off.
_FREE = frozenset(
    {
        "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
        "inference_mode", "lora_dropout", "r", "lora_alpha", "use_rslora", "target_modules", "megatron_core",
        "qalora_group_size", "init_lora_weights", "eva_config", "layers_to_transform", "rank_pattern", "alpha_pattern",
    }
)  # fmt: skip
#: Starts that leave the base's weights as they are. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take something out of
#: them, and PEFT does so again when it loads the adapter.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
#: Tensors, and the bytes of each, that are compared to prove that two folders hold the same weights.
_COMPARED, _COMPARED_BYTES = 8, 1 << 20


@dataclass(frozen=True)
class BaseReference:
    """The base model as an export names it: hub id or folder, and commit (40 hex digits, empty if there is none).

    `same_weights` are other names that the user vouches for, such as a copy of it that Unsloth keeps.
    """

    id: str
    revision: str = ""
    same_weights: tuple[str, ...] = ()


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
    chosen = {
        "layers_to_transform": list(shape.layer_numbers), "rank_pattern": shape.rank_pattern,
        "alpha_pattern": shape.alpha_pattern,
    }  # fmt: skip
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
        **{name: value for name, value in chosen.items() if value},
    }


def load_peft_folder(stack: Stack, folder: Path, base: BaseReference) -> Adapter:
    """The adapter of a PEFT directory, on the device of the stack's base.

    The base must be the stack's by the name in the weights' metadata (as fastconv writes it), or `base` by the
    settings. Raises AdapterError if the directory is incomplete, holds a pickle, is not plain LoRA, or does not fit
    the base.
    """
    config = _read_config(folder)
    where = str(folder)
    data = (folder / WEIGHTS_FILE).read_bytes()
    tensors, metadata = read_safetensors(data, where)
    shape = _shape(config, where)
    for target in shape.targets:
        if target in stack.tied:
            raise AdapterError(
                f"it targets {target}, which shares its weight with the embedding on this base",
                where=where,
                fix="train it without that layer",
            )
    if not (metadata["base"] == stack.base.name if "base" in metadata else _same_base(config, base)):
        named = config.get("base_model_name_or_path")
        option = f", or say `--same-weights {named}` if it is a copy of it" if named and "base" not in metadata else ""
        raise AdapterError(
            f"the adapter was made for {named or 'another base'}, not {base.id}",
            where=where,
            fix=f"use the base it was trained on{option}",
        )
    return stack.take(adapter_from_tensors(tensors, shape, stack.base.name, stack.sizes, where))


def targets_of(folder: Path) -> tuple[str, ...]:
    """Names of the layers that a PEFT directory's adapter is for. Raises AdapterError as `load_peft_folder` does."""
    return _shape(_read_config(folder), str(folder)).targets


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
    except (OSError, ValueError, RecursionError) as error:
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
    _refuse_options(config, where)
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    layers = [] if layers is None else layers
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
            layers=",".join(map(str, [layers] if isinstance(layers, int) else layers)),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
        )
    except (ValidationError, TypeError):
        raise AdapterError(
            "r, lora_alpha, target_modules, layers or patterns are not valid", where=where, fix="train it again"
        ) from None


def _refuse_options(config: Mapping[str, Any], where: str) -> None:
    """Raise AdapterError for every option under which an adapter is not plain LoRA, or that is not known."""
    from peft import LoraConfig

    start = config.get("init_lora_weights", True)
    if not any(start is plain or (isinstance(plain, str) and start == plain) for plain in _PLAIN_STARTS):
        raise AdapterError(
            f"init_lora_weights = {start!r}: its start may have rewritten the base's own weights",
            where=where,
            fix="save it with path_initial_model_for_weight_conversion, which makes it plain LoRA",
        )
    defaults = LoraConfig().to_dict()
    for option, value in config.items():
        if option in _FREE or (_is_off(value) and _is_off(defaults.get(option))):
            continue
        if option not in defaults:
            raise AdapterError(
                f"{option} = {value!r} is not an option that is known here",
                where=where,
                fix="save it with the PEFT version that fastconv is tested with, or train it without that option",
            )
        if value != defaults[option]:
            raise AdapterError(f"{option} = {value!r} is not plain LoRA", where=where, fix=f"train without {option}")


def _is_off(value: Any) -> bool:
    """Whether an option says nothing; 0 is a number, for example of a layer."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def _same_base(config: Mapping[str, Any], base: BaseReference) -> bool:
    """Whether an adapter's base is this one: by hub id (or folder) and, where both have one, the revision (commits may
    be abbreviated); by a name the user vouches for; or by the weights themselves, if both are on this disk."""
    named, revision = str(config.get("base_model_name_or_path") or ""), str(config.get("revision") or "")
    if not named:
        return False
    if named in base.same_weights:
        return True
    folders = folder_called(named), folder_called(base.id)
    if named == base.id or (folders[0] and folders[1] and folders[0].resolve() == folders[1].resolve()):
        pinned = re.fullmatch(r"[0-9a-f]{7,40}", revision) and base.revision
        return not pinned or base.revision.startswith(revision)
    theirs, ours = _weights_sha256(named, revision), _weights_sha256(base.id, base.revision)
    return theirs is not None and theirs == ours


def _weights_sha256(name: str, revision: str) -> str | None:
    """`_folder_weights_sha256` of a model by its name; None if it is not on this disk, or its files cannot be read."""
    folder = _local_folder(name, revision)
    try:
        return None if folder is None else _folder_weights_sha256(folder)
    except (OSError, ValueError, IndexError, TypeError, RuntimeError, safetensors.SafetensorError):
        return None  # what cannot be read proves nothing


def _folder_weights_sha256(folder: Path) -> str | None:
    """sha256 (hex) over names, dtypes and shapes of all weights of a model, and over the first bytes of a few of them; None without
    any. A copy under another name has the same; a fine-tune or a quantized copy has not."""
    files = sorted(folder.glob("*.safetensors"))
    tensors: dict[str, tuple[Any, Any]] = {}
    for file in files:
        with safetensors.safe_open(file, framework="pt") as opened:
            for key in sorted(opened.keys()):
                part = opened.get_slice(key)
                tensors[key] = (file, (part.get_dtype(), part.get_shape()))
    if not tensors:
        return None
    digest = hashlib.sha256(repr(sorted((key, shape) for key, (_, shape) in tensors.items())).encode())
    keys = sorted(tensors)
    for key in keys[:: max(1, len(keys) // _COMPARED)]:
        with safetensors.safe_open(tensors[key][0], framework="pt") as opened:
            part = opened.get_slice(key)
            few = part[: max(1, _COMPARED_BYTES // (4 * max(1, math.prod(part.get_shape()[1:]))))]
            digest.update(few.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _local_folder(name: str, revision: str) -> Path | None:
    """The folder of a model on this disk: the name itself, or the hub's cache. Nothing is downloaded."""
    folder = folder_called(name)
    if folder is not None:
        return folder
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision or None)
    except (OSError, ValueError):  # a path that is not here, or a name of another kind
        return None
    return Path(cached).parent if isinstance(cached, str) else None
