"""Keys and tokens of the user's environment: no process that is started for a part of a run gets them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastconv import cluster
from fastconv.engine.vllm.server import server_environment
from fastconv.store.io import child_environment
from tests import ROOT

SECRETS = {
    "ANTHROPIC_API_KEY": "s1", "FASTCONV_LOCAL_KEY": "s2", "HF_TOKEN": "s3", "AWS_SECRET_ACCESS_KEY": "s4",
    "VLLM_API_KEY": "s5", "HF_HUB_TOKEN": "s6", "DATABASE_URL": "s7", "MY_PASSWORD": "s8", "ANTHROPIC_AUTH_TOKEN": "s9",
}  # fmt: skip
NEEDED = {
    "PATH": "/bin", "HOME": "/h", "LD_LIBRARY_PATH": "/l", "CUDA_VISIBLE_DEVICES": "1", "HF_HOME": "/hf", "TMPDIR": "/t",
    "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false", "FASTCONV_CACHE": "/c", "LC_ALL": "C", "PYTHONPATH": "/p",
}  # fmt: skip


def test_a_child_gets_what_it_needs_and_no_secret() -> None:
    assert child_environment(SECRETS | NEEDED) == NEEDED
    served = server_environment("its-own", SECRETS | NEEDED)
    assert {name: served[name] for name in NEEDED} == NEEDED
    assert served["VLLM_API_KEY"] == "its-own"
    assert not {value for name, value in SECRETS.items()} & set(served.values())


def test_every_process_is_started_with_an_environment_of_its_own() -> None:
    started = re.compile(r"subprocess\.(?:run|Popen|check_output)\((.*?)\n?\s*\)", re.DOTALL)
    found = {}
    for path in sorted((ROOT / "fastconv").rglob("*.py")):
        for call in started.finditer(path.read_text()):
            found.setdefault(path.name, []).append("env=" in path.read_text()[call.start() : call.start() + 500])
    # The watchdog is started with the server's environment and hands it on.
    assert {name for name, given in found.items() if not all(given)} <= {"watchdog.py"}
    assert len(found) >= 4


def test_rays_processes_are_started_without_the_key_that_only_the_driver_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "s1")
    seen: list[str | None] = []
    ray = SimpleNamespace(init=lambda **given: seen.append(os.environ.get("ANTHROPIC_API_KEY")))
    cluster._connect(ray, cluster.LOCAL)
    assert seen == [None]
    assert os.environ["ANTHROPIC_API_KEY"] == "s1"


def test_a_recipe_cannot_name_a_file_that_holds_a_key(tmp_path: Path) -> None:
    # Keys come from the environment alone: no setting of a recipe is a key or names where one is.
    from fastconv.recipe import JudgeSettings

    assert not [
        name for name in JudgeSettings.model_fields if re.search("key|token|secret", name) and "tok" not in name
    ]
