"""The cache of the embedded models: each in a folder of its own, checked, written once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from fastconv.engine import builtin
from fastconv.engine.locate import BUILTIN, BUILTIN_DONE, TINY, builtin_folder, locate, model_folder
from fastconv.errors import ModelError
from fastconv.recipe import ModelSettings


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An own cache, and the names of what was converted into it; each model is one file that says which it is."""
    names: list[str] = []

    def convert(gguf: Path, folder: Path, name: str) -> None:
        names.append(name)
        write(folder, name)

    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "builtin_gguf", lambda: Path("a.gguf"))
    monkeypatch.setattr(builtin, "_convert", convert)
    return names


def write(folder: Path, name: str) -> None:
    folder.mkdir(parents=True)
    (folder / "weights").write_text(name)
    sums = {"weights": hashlib.sha256(name.encode()).hexdigest()}
    (folder / BUILTIN_DONE).write_text(json.dumps({"model": name, "sha256": sums}))


def test_each_embedded_model_is_converted_once_into_a_folder_of_its_own(converted: list[str], tmp_path: Path) -> None:
    for name in (TINY, BUILTIN, TINY, BUILTIN):
        settings = ModelSettings(id=name)
        folder = builtin.prepare_model_folder(settings, locate(settings))
        assert folder == builtin.ensure_builtin(name) == model_folder(locate(settings), settings)
        assert (folder / "weights").read_text() == name
    assert converted == [TINY, BUILTIN]
    assert sorted(tmp_path.joinpath("models").iterdir()) == sorted(map(builtin_folder, (TINY, BUILTIN)))


def test_another_model_in_a_models_folder_is_replaced(converted: list[str], tmp_path: Path) -> None:
    """Tests of ours once wrote SmolLM2 into the folder of the random weights: what was to take seconds took minutes."""
    write(builtin_folder(TINY), BUILTIN)
    assert (builtin.ensure_builtin(TINY) / "weights").read_text() == TINY
    assert converted == [TINY]
    assert list(tmp_path.joinpath("models").iterdir()) == [builtin_folder(TINY)]  # nothing is left beside it


@pytest.mark.parametrize("said", ["", "[]", "{", '{"model": "builtin:tiny"}', b"\xff"])
def test_a_copy_that_does_not_say_what_it_is_is_replaced(converted: list[str], said: str | bytes) -> None:
    folder = builtin_folder(TINY)
    write(folder, TINY)
    (folder / BUILTIN_DONE).write_bytes(said.encode() if isinstance(said, str) else said)
    assert (builtin.ensure_builtin(TINY) / "weights").read_text() == TINY
    assert json.loads((folder / BUILTIN_DONE).read_text())["sha256"]


def test_a_copy_that_was_altered_is_refused(converted: list[str]) -> None:
    folder = builtin.ensure_builtin(TINY)
    (folder / "weights").write_text("edited")
    with pytest.raises(ModelError, match=r"was altered.*delete .*it is converted again"):
        builtin.ensure_builtin(TINY)


def test_a_faster_process_wins_and_a_folder_in_the_way_is_told(
    converted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = builtin._convert

    def slow(gguf: Path, folder: Path, name: str) -> None:
        convert(gguf, folder, name)
        write(builtin_folder(name), name)  # meanwhile, by another process

    monkeypatch.setattr(builtin, "_convert", slow)
    assert (builtin.ensure_builtin(TINY) / "weights").read_text() == TINY
    monkeypatch.setattr(builtin, "_convert", convert)
    builtin_folder(BUILTIN).joinpath("of the user").mkdir(parents=True)
    with pytest.raises(ModelError, match="cannot be converted"):
        builtin.ensure_builtin(BUILTIN)
