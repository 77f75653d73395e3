"""Facts about a run for the report's reproducibility card: command, package versions, machine, git checkout."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from fastconv.recipe import Recipe, canonical_json, recipe_sha256, run_id
from fastconv.store.ledger import Store

#: Packages whose versions the card lists.
CARD_PACKAGES = (
    "fastconv",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "trl",
    "polars",
    "numpy",
    "scipy",
    "unsloth",
    "triton",
    "vllm",
)


def begin_run(store: Store, recipe: Recipe, facts: Mapping[str, Any]) -> str:
    """Record that a run of the recipe begins or continues with these facts; returns its id."""
    run = run_id(recipe)
    store.start_run(run, canonical_json(recipe.model_dump(mode="json")), recipe_sha256(recipe), recipe.name, facts)
    return run


def run_facts() -> dict[str, Any]:
    """Facts of the current process for the reproducibility card: command, Python and package versions, machine, git."""
    versions = {}
    for package in CARD_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(["fastconv", *sys.argv[1:]]) if sys.argv[:1] else "",
        "python": platform.python_version(),
        "versions": versions,
        "machine": {"system": platform.system(), "processor": platform.machine(), "n_cpu": os.cpu_count()},
        "git": _git_state(),
    }


def _git_state() -> dict[str, str]:
    """Commit of the checkout that fastconv runs from and sha256 of its uncommitted diff; empty if it is not a checkout."""
    import hashlib

    folder = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        diff = subprocess.run(["git", "-C", str(folder), "diff", "HEAD"], capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {
        "commit": commit.stdout.strip(),
        "dirty_diff_sha256": hashlib.sha256(diff.stdout).hexdigest() if diff.stdout else "clean",
    }
