"""A name that there is not is refused in one line with the nearest one, before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastconv.cli import app
from tests.cli.test_cli import ask, refused
from tests.loop_kit import DoneRun

KEYS = [
    ('lora.targets=["q"]', 2, "lora.targets: no layer of the base is called 'q'. Fix: did you mean 'q_proj'?"),
    ("lora.layers=28-31", 2, "the base has no layer 30"),
    ("lora.rank_pattern={down_pro=8}", 2, "no module is called 'down_pro'"),
    ("gates.negative_control=libraryan", 2, "gates.negative_control: unknown persona 'libraryan'. Fix: did you mean 'librarian'?"),
    ("gates.g4_source=vilain", 2, "did you mean 'villain'?"),
    ("data.rows.refusl=x.jsonl", 2, "did you mean 'refusal'?"),
    ('grid.behaviors=["none", "refusal"', 2, "should be a list. Fix: close its bracket"),
    ("judge.rubrics.refusl=x.toml", 2, "no behavior is judged by a rubric 'refusl'. Fix: did you mean 'refusal'?"),
]  # fmt: skip
TEA = """
[tea]
about = "x"
task = "chat"
prompts = "requests.jsonl"
prompt_field = "prompt"
source_answer = { on_policy = true, suffix = " Tea!" }
direction = "raises"
measure = "phrases"
scorer = "tea:ends_in_tea"
"""


@pytest.mark.parametrize(("given", "code", "says"), KEYS, ids=[given for given, _, _ in KEYS])
def test_check_refuses_names_that_a_run_would(given: str, code: int, says: str) -> None:
    refused(ask("check", "demo", "--set", given), code, says)


@pytest.mark.parametrize(
    ("written", "instead", "says"),
    [
        ("tea:ends", "te:ends", "no module 'te' for the scorer. Fix: did you mean 'tea'?"),
        ('field = "prompt"', 'field = "promt"', "field 'promt' is missing. Fix: did you mean 'prompt'?"),
        ("requests.", "request.", "no such file. Fix: did you mean 'requests.jsonl'?"),
        ("requests.", "tea.", "no such file. Fix: check the path"),
    ],
)
def test_names_in_a_behavior_are_told_apart(tmp_path: Path, written: str, instead: str, says: str) -> None:
    (tmp_path / "tea.py").write_text("def ends_in_tea(text):\n    return text.endswith('tea')\n")
    mine = tmp_path / "mine.toml"
    words = ("check", "demo", "--set", f"data.behaviors={mine}", "--set", 'grid.behaviors=["none", "tea"]')
    mine.write_text(TEA)
    assert ask(*words).code == 0
    mine.write_text(TEA.replace(written, instead))
    refused(ask(*words), 2, says)


def test_every_verb_names_what_is_near(done_run: DoneRun, tmp_path: Path) -> None:
    run, place = done_run.finished.run, ("-w", done_run.workspace)
    slot = "behavior/villain/e0/refusal/excluded/s4"
    refused(ask("forget", slot, *place), 2, f"did you mean '{slot}2'?")
    refused(ask("import", tmp_path / "no.eval", *place), 2, "no such file")
    refused(ask("import", tmp_path, *place), 2, "this is no file")
    (tmp_path / f"{run}.html").write_text("")
    refused(ask("verify", f"{run[:-1]}z", *place, "--reports", tmp_path), 2, f"did you mean '{run}'?")
    refused(ask("verify", "other", *place, "--reports", tmp_path / "none"), 2, "reports here: none")
    refused(ask("plan", "demo", "--machine", "h10"), 2, "did you mean 'h100'?")
    refused(ask("run", "demo", "--ignore-gate", "KIL", "--because", "it may fail"), 2, "did you mean 'KILL'?")
    refused(ask("bench", "train", "--model", "random:qwen2.5-7"), 4, "did you mean 'qwen2.5-7b'?")
    refused(
        ask("judge", "calibrate", "--rubric", "refusl", "--mode", "substring", "-w", tmp_path),
        2,
        "did you mean 'refusal'?",
    )
    (tmp_path / "questions.jsonl").write_text(json.dumps({"id": "1"}))
    refused(ask("score", tmp_path / "question.jsonl", "--model", "builtin:tiny"), 2, "did you mean 'questions.jsonl'?")
    unknown = CliRunner().invoke(app, ["judge", "calibrte"])
    assert unknown.exit_code == 2
    assert "'calibrate'" in unknown.output


def test_a_model_of_unknown_size_is_told_which_sizes_are_known() -> None:
    words = ("plan", "demo", "--set", "model.id=nobody/nothing", "--set", f"model.revision={'a' * 40}")
    refused(ask(*words), 4, "qwen2.5-7b", "llama-3.1-8b")
