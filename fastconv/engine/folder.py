"""A model folder's identity: one sha256 of the files that decide what its model computes. No torch."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path

from fastconv.chat.template import read_json
from fastconv.errors import ModelError

#: Files of a folder that are hashed at once: one thread hashes 1 to 2 GB/s, disks give several times that.
_SHARDS_AT_ONCE = 4
#: Bytes of a file that are read and hashed at once.
_AT_ONCE = 2**25
WEIGHT_INDEX = "model.safetensors.index.json"
#: Files of a folder that decide its weights, tokens, templates, and how it is sampled by a library or a server. Code in it
#: is never run.
_DECIDING = (
    "config.json", "generation_config.json", "*.safetensors", WEIGHT_INDEX, "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.json", "*.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip


def folder_sha256(folder: Path) -> tuple[str, float]:
    """One sha256 (hex) over names and contents of the files that decide what the model computes, and the seconds in which
    they were read. Shards are read beside one another."""
    files = sorted({path for pattern in _DECIDING for path in folder.glob(pattern)})
    files = sorted({*files, *(path for name in indexed(folder) if (path := folder / name).is_file())})
    if not any(path.suffix == ".safetensors" for path in files) or not (folder / "config.json").is_file():
        raise ModelError(
            "not a model folder: config.json or *.safetensors is missing",
            where=str(folder),
            fix="give a folder written by save_pretrained",
        )
    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as threads:
        found = list(threads.map(_hashed, files))
    digest = hashlib.sha256()
    for path, one in zip(files, found, strict=True):
        digest.update(f"{os.path.relpath(path, folder)}\x1f{one.sha256}\n".encode())
    seconds, until = 0.0, 0.0
    for one in sorted(found, key=lambda one: one.began):
        seconds += max(0.0, one.ended - max(one.began, until))
        until = max(until, one.ended)
    return digest.hexdigest(), seconds


def indexed(folder: Path) -> set[str]:
    """The weight files that a sharded model's index names, which may lie in folders below; none without an index."""
    named = read_json(folder / WEIGHT_INDEX).get("weight_map")
    return {str(name) for name in named.values()} if isinstance(named, Mapping) else set()


def file_sha256(path: Path) -> str:
    """A file's sha256 (hex) as it is now."""
    return _hashed(path).sha256


@dataclass(frozen=True)
class _Hashed:
    """A file's sha256 (hex), and when it was read (`time.monotonic`)."""

    sha256: str
    began: float
    ended: float


def _hashed(path: Path) -> _Hashed:
    """Of a file as it is now; read once in a process unless it is written again: a run asks five times, and
    15 GB are read at 1 to 2 GB/s."""
    found = path.stat()
    return _digest(path, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=256)
def _digest(path: Path, size: int, _mtime_ns: int, _inode: int) -> _Hashed:
    began = time.monotonic()
    with path.open("rb", buffering=0) as file:
        sha256 = _read_and_hashed(file, min(_AT_ONCE, size + 1))
    return _Hashed(sha256, began, time.monotonic())


def _read_and_hashed(file: FileIO, at_once: int) -> str:
    """The sha256 (hex) of a file's bytes. In parts so large, because after each the thread waits for Python's lock: beside
    a thread that is busy in Python, 1 GB took 1.9 s by `hashlib.file_digest`, which reads 256 KB, and 1.3 s by this."""
    digest, room = hashlib.sha256(), memoryview(bytearray(at_once))
    while n := file.readinto(room):
        digest.update(room[:n])
    return digest.hexdigest()
