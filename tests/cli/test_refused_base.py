"""A base that is refused: every verb says so in one line with the documented exit code, before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
from typer.testing import CliRunner

from fastconv.cli import app
from tests.engine.families_kit import build
from tests.loop_kit import write_tiny_recipe

QUESTION = {"id": "1", "question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}


def _verbs(tmp_path: Path, model: Path) -> dict[str, list[str]]:
    recipe, questions, workspace = tmp_path / "r.toml", tmp_path / "q.jsonl", tmp_path / "checkpoints"
    write_tiny_recipe(recipe, model)
    questions.write_text(json.dumps(QUESTION) + "\n")
    return {
        "check": ["check", str(recipe)],
        "doctor": ["doctor", str(recipe), "--workspace", str(workspace)],
        "run": ["run", str(recipe), "--workspace", str(workspace)],
        "score": ["score", str(questions), "--model", str(model)],
        "bench": ["bench", "score", "--model", str(model), "--size", "2"],
    }


def _without_head(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "because", "exempt"),
    [("bart (decoder)", "does not tell packed rows apart", ""), ("llama", "the files lack 1 of the model's", "check")],
)  # fmt: skip
def test_every_verb_refuses_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, because: str, exempt: str
) -> None:
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "cache"))
    model = build(tmp_path / "model", family)
    if family == "llama":  # a plain decoder, which `check` takes by its config
        _without_head(model)
    for verb, command in _verbs(tmp_path, model).items():
        if verb == exempt:
            continue
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 4, (verb, done.output)
        said = [line for line in done.output.splitlines() if because in line]
        assert len(said) == 1, (verb, done.output)
        assert "Fix: " in said[0], verb
    assert not (tmp_path / "checkpoints" / "adapters").exists()
