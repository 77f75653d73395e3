"""Fixtures that several test files share."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastconv.store import io
from tests.loop_kit import done_run, letters_run, recipe, server, whole
from tests.tiny import tiny_model_folder

__all__ = ["done_run", "letters_run", "recipe", "server", "tiny_llama", "tiny_qwen", "whole"]

# A tiny model gains nothing from a second thread, and a forked child of a process with OpenMP threads never ends.
os.environ["OMP_NUM_THREADS"] = "1"
# A tiny run commits 500 times; waiting for the disk each time would take longer than all that it computes.
io.SYNCHRONOUS = "OFF"
# No test may need a network: what tries one fails at once instead of waiting.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if find_spec("hypothesis"):  # the environment of `make test-fused` has none
    from hypothesis import settings

    # The same examples each time: whether a commit is good must not depend on luck. FASTCONV_EXAMPLES=500 looks for new ones.
    settings.register_profile("repeatable", derandomize="FASTCONV_EXAMPLES" not in os.environ)
    settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Qwen2 (biases on q, k, v; untied head)."""
    return tiny_model_folder(tmp_path_factory.mktemp("tiny_qwen"), "qwen2")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama whose head is tied to its embedding."""
    return tiny_model_folder(tmp_path_factory.mktemp("tiny_llama"), "llama_tied")


#: Files whose tests take minutes. A file belongs to one process: begun last, they would leave the other one idle.
DEAREST = ("test_notebook.py", "test_demo.py", "test_wheel.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    items.sort(key=lambda item: item.path.name not in DEAREST)
