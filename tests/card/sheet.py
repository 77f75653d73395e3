"""What a part is given (`Job`), and the JSON file that it keeps (`Sheet`), written anew whenever something is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from fastconv.store.io import write_text

#: Packages whose versions a sheet names.
PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "unsloth",
    "peft",
    "trl",
    "bitsandbytes",
    "xformers",
    "flash-attn-4",
    "ray",
)
NO_CARD = "no card here"


@dataclass(frozen=True)
class Job:
    """Where a part writes (`out`; large files in `scratch`), the base, ARC-Challenge's file, and when it has to be done.

    `deadline` is in seconds since the epoch. `rehearse` is for a machine without a card: a tiny model, recipes at scale tiny.
    """

    part: str
    out: Path
    scratch: Path
    model: str
    arc: str = ""
    deadline: float = float("inf")
    rehearse: bool = False
    why: str = "measured on a card whose base may fail it"

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def path(self, name: str) -> Path:
        """A file of this part, DIR/PART-name (or DIR/PART/name for what has a folder)."""
        return self.out / f"{self.part}-{name}"

    def workspace(self, name: str = "") -> Path:
        """The workspace of a part, this one's by default; it holds adapters, so it lies in `scratch`."""
        return self.scratch / (name or self.part) / "checkpoints"

    def to_json(self) -> str:
        """The job as one line, for the process of its part."""
        return json.dumps({**asdict(self), "out": str(self.out), "scratch": str(self.scratch)})

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job of `to_json`."""
        found = json.loads(text)
        return cls(**{**found, "out": Path(found["out"]), "scratch": Path(found["scratch"])})

    def named(self, part: str) -> Job:
        """The same for another part."""
        return replace(self, part=part)


class Sheet:
    """A part's findings. `note` adds to them and writes the file, so that a kill loses nothing that was found.

    `state` is `running`, `complete`, `skipped`, `failed` or `stopped`; `why` says more of all but `complete`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = read_sheet(path)

    def note(self, **found: Any) -> None:
        """Add findings; those of the same name are replaced."""
        self.found |= found
        write_json(self.path, self.found)

    def end(self, state: str, why: str = "") -> None:
        """Write the state that the part ended in."""
        self.note(state=state, why=why, ended_at=time.time())


def read_sheet(path: Path) -> dict[str, Any]:
    """What a part has found so far; empty if it never began, or if its file was cut short."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a reader never sees half of it."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def has_card() -> bool:
    """Whether nvidia-smi lists a card here. Imports no torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=30)
    return listed.returncode == 0 and "GPU" in listed.stdout


def machine() -> dict[str, Any]:
    """Card, driver and versions, as far as they are to be had."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {"versions": versions, "n_cpu": os.cpu_count(), "card": NO_CARD}
    if has_card():
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader", "-i", card_id()]
        told = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
        name, driver, memory = ([part.strip() for part in told.split(",")] + ["", "", ""])[:3]
        found |= {"card": name, "driver": driver, "memory": memory}
    return found


def card_id() -> str:
    """What nvidia-smi calls the card that CUDA_VISIBLE_DEVICES names first."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"


def n_cards() -> int:
    """Number of cards that this process may use."""
    if not has_card():
        return 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([part for part in named.split(",") if part.strip()])
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=30)
    return sum(line.startswith("GPU") for line in listed.stdout.splitlines())
