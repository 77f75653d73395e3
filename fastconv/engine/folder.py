"""A model folder's identity: one sha256 of the files that decide what its model computes. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from fastconv.chat.template import read_json
from fastconv.errors import ModelError

#: Files of a folder that are hashed at once: one thread hashes 1 to 2 GB/s, disks give several times that.
_SHARDS_AT_ONCE = 4
WEIGHT_INDEX = "model.safetensors.index.json"
#: Files of a folder that decide its weights, tokens, templates, and how it is sampled by a library or a server. Code in it
#: is never run.
_DECIDING = (
    "config.json", "generation_config.json", "*.safetensors", WEIGHT_INDEX, "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.json", "*.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip


def folder_sha256(folder: Path) -> str:
    """One sha256 (hex) over names and contents of the files that decide what the model computes; shards are read beside
    one another."""
    files = sorted({path for pattern in _DECIDING for path in folder.glob(pattern)})
    files = sorted({*files, *(path for name in indexed(folder) if (path := folder / name).is_file())})
    if not any(path.suffix == ".safetensors" for path in files) or not (folder / "config.json").is_file():
        raise ModelError(
            "not a model folder: config.json or *.safetensors is missing",
            where=str(folder),
            fix="give a folder written by save_pretrained",
        )
    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as threads:
        hashes = list(threads.map(file_sha256, files))
    digest = hashlib.sha256()
    for path, sha256 in zip(files, hashes, strict=True):
        digest.update(f"{os.path.relpath(path, folder)}\x1f{sha256}\n".encode())
    return digest.hexdigest()


def indexed(folder: Path) -> set[str]:
    """The weight files that a sharded model's index names, which may lie in folders below; none without an index."""
    named = read_json(folder / WEIGHT_INDEX).get("weight_map")
    return {str(name) for name in named.values()} if isinstance(named, Mapping) else set()


def file_sha256(path: Path) -> str:
    """A file's sha256 (hex) as it is now; read once in a process unless it is written again: a run asks five times, and
    15 GB are read at 1 to 2 GB/s."""
    found = path.stat()
    return _digest(path, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=256)
def _digest(path: Path, _size: int, _mtime_ns: int, _inode: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
