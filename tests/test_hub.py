"""What is tried of the hub where there is no network: nothing that takes half a minute to fail."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from fastconv.datasets import questions as arc
from fastconv.engine import locate
from fastconv.errors import DataError, ModelError
from fastconv.hub import is_unreachable
from fastconv.recipe import ModelSettings


@pytest.fixture(autouse=True)
def no_proxy_and_no_wish_to_be_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "getproxies", dict)


def _names(monkeypatch: pytest.MonkeyPatch, *, known: bool) -> None:
    def look_up(host: str, port: int) -> list[object]:
        if not known:
            raise socket.gaierror(-2, "Name or service not known")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_a_name_that_means_nothing_is_out_of_reach_unless_a_proxy_looks_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    _names(monkeypatch, known=True)
    assert not is_unreachable()
    _names(monkeypatch, known=False)
    assert is_unreachable()
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert not is_unreachable()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert is_unreachable()


@pytest.mark.parametrize("known", [True, False])
def test_only_the_cache_is_asked_then(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    asked: list[bool] = []

    def not_kept(*where: object, local_files_only: bool, **more: object) -> Path:
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("not here")

    _names(monkeypatch, known=known)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, not_kept)
    with pytest.raises(DataError, match=r"eval\.arc_file"):
        arc._from_hub(arc.read_split())
    settings = ModelSettings(id="some/model", revision="0" * 40)
    with pytest.raises(ModelError, match="not in its cache"):
        locate.model_folder(locate.locate(settings), settings)
    assert asked == [not known, not known]
