"""The wheel works away from the checkout: data and recipes travel with it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import ROOT


@pytest.mark.slow
def test_the_wheel_brings_its_data_and_recipes(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = tmp_path.glob("fastconv-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # -P and an own path: nothing of the checkout, or of an editable install, is seen.
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from fastconv.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for command in (["recipe", "show", "demo"], ["check", "demo"], ["status", "demo", "-w", str(tmp_path / "none")]):
        answer = subprocess.run(
            [sys.executable, "-P", "-c", code, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert answer.returncode == 0, answer.stderr
        assert "refusal" in answer.stdout
