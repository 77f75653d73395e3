"""What the tests of the vLLM sampler share: a fake server in place of vLLM, and what it wrote down."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastconv.engine.vllm.client import Client
from fastconv.engine.vllm.memory import ServerMemory
from fastconv.engine.vllm.server import COMMAND_VARIABLE, Server
from fastconv.recipe import Recipe
from tests import ROOT
from tests.loop_kit import tiny_recipe

COMMAND = [sys.executable, str(ROOT / "tests" / "fake_vllm.py")]
#: Both tokens that end an answer of the tiny model.
STOPS = (258, 256)


def served(model: Path, **changes: Any) -> Recipe:
    """The tiny recipe with a server as its sampler."""
    return tiny_recipe(model, **{"model__sampler": "vllm", "eval__geometry": False, **changes})


@dataclass(frozen=True)
class Fake:
    """A fake's place in the environment, and its record."""

    folder: Path
    environ: pytest.MonkeyPatch

    @property
    def record(self) -> Path:
        return self.folder / "record.jsonl"

    @property
    def hold(self) -> Path:
        """While this file exists, no completion is answered."""
        return self.folder / "hold"

    def script(self, **what: Any) -> None:
        """What servers that are started from now on do."""
        self.environ.setenv(
            "VLLM_FAKE_SCRIPT", json.dumps({"record": str(self.record), "hold": str(self.hold), **what})
        )

    def noted(self) -> list[dict[str, Any]]:
        """What the last server wrote down: first its pids and flags, then every request."""
        return [json.loads(line) for line in self.record.read_text().splitlines()]

    @property
    def pids(self) -> list[int]:
        return self.noted()[0]["pids"]

    def asked(self, path: str) -> list[dict[str, Any]]:
        """The requests to one path, in order."""
        return [one for one in self.noted()[1:] if one["path"] == path]

    def server(self, **changes: Any) -> Server:
        """A server of its own, outside of a run."""
        adapters = self.folder / "adapters"
        adapters.mkdir(exist_ok=True)
        options = {"dtype": "float32", "folder": adapters, "log": self.folder / "vllm.log", "start_s": 20.0} | changes
        model, room = (
            options.pop("model", self.folder),
            options.pop("room", ServerMemory(256, 16 if "model" in changes else 8)),
        )
        return Server(COMMAND, model, room, **options)

    @contextmanager
    def client(self, **changes: Any) -> Iterator[Client]:
        """A client of a fresh server."""
        server = self.server()
        try:
            client = Client(server, **({"n_connections": 16} | changes))
            try:
                yield client
            finally:
                client.close()
        finally:
            server.close()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A fake vLLM that `model.sampler = "vllm"` will start."""
    monkeypatch.setenv(COMMAND_VARIABLE, " ".join(COMMAND))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    one = Fake(tmp_path, monkeypatch)
    one.script()
    return one


def running(pid: int) -> bool:
    """Whether a process lives; one that ended and was not reaped yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def end(pid: int) -> None:
    """kill -9."""
    os.kill(pid, 9)
