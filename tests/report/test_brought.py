"""The reproducibility card lists the hash of every user file and of the multiple-choice questions."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from fastconv.analysis.analysis import Analysis
from fastconv.datasets import questions as arc
from fastconv.datasets.files import assets, file_sha256
from fastconv.experiment.graph import Graph
from fastconv.recipe import Recipe
from fastconv.report.blocks import Table
from fastconv.report.record import card
from fastconv.store.ledger import Store
from tests import TESTS
from tests.data_kit import pair, written
from tests.loop_kit import tiny_recipe

USERS = TESTS / "user_data"


def arc_rows() -> list[dict[str, object]]:
    """Questions of our own in the hub's form."""
    choices = {"text": ["one", "two", "three"], "label": ["A", "B", "C"]}
    return [{"question": f"Which comes after {i}?", "choices": choices, "answerKey": "B"} for i in range(12)]


@pytest.fixture
def brought(tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe whose every file is the user's, and a split of its small ARC file in place of the shipped one."""
    folder = tmp_path / "mine"
    shutil.copytree(USERS, folder)
    for name in ("villain", "pirate"):
        written(folder, [pair(f"Question {i}?", "No.") for i in range(4)], f"rows-{name}.jsonl")
    shutil.copy(assets("data") / "prices.toml", folder / "prices.toml")
    ids = sorted(question.id for question in arc.read_arc(written(folder, list(arc_rows()), "arc.jsonl")))
    split(monkeypatch, ids[:6], ids[6:])
    return tiny_recipe(
        tiny_qwen,
        grid__sources=["villain", "pirate"],
        grid__behaviors=["none", "refusal", "capability", "always_mentions_tea"],
        data__personas=str(folder / "personas.toml"),
        data__behaviors=str(folder / "behaviors.toml"),
        data__rows={"refusal": str(folder / "rows-{source}.jsonl")},
        eval__multiple_choice="arc",
        eval__arc_file=str(folder / "arc.jsonl"),
        judge__prices=str(folder / "prices.toml"),
    )


def split(monkeypatch: pytest.MonkeyPatch, train: list[str], held_out: list[str]) -> None:
    found = arc.ArcSplit("ours/small", "0" * 40, frozenset(held_out), frozenset(train))
    monkeypatch.setattr(arc, "read_split", lambda: found)


def shown(recipe: Recipe, tmp_path: Path, block: str) -> dict[str, str]:
    """A table of the card as name and value."""
    made = card(Analysis(Graph(recipe), Store.open(tmp_path / "w")))
    return {
        row[0].text: row[1].text
        for one in made.blocks
        if isinstance(one, Table) and one.id == block
        for row in one.rows
    }


def test_changing_the_content_of_any_brought_file_changes_its_line_of_the_card(brought: Recipe, tmp_path: Path) -> None:
    before = shown(brought, tmp_path, "card-brought")
    assert set(before) == {
        "data.personas: personas.toml", "data.behaviors: behaviors.toml", "eval.arc_file: arc.jsonl",
        "judge.prices: prices.toml", "data.rows.refusal of villain: rows-villain.jsonl",
        "data.rows.refusal of pirate: rows-pirate.jsonl", "always_mentions_tea.prompts: tea.jsonl",
    }  # fmt: skip
    for line in before:
        path = tmp_path / "mine" / line.split(": ")[1]
        assert before[line] == file_sha256(path)
        path.write_bytes(path.read_bytes() + b"\n")
        now = shown(brought, tmp_path, "card-brought")
        assert {name for name in now if now[name] != before[name]} == {line}
        before = now


def test_the_questions_that_were_asked_are_told_by_content(
    brought: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = shown(brought, tmp_path, "card-questions")
    assert list(before) == ["asked: 6 questions", "asked or kept for training"]
    assert all(len(value) == 64 for value in before.values())
    rows = list(arc_rows())
    random.Random(1).shuffle(rows)
    written(tmp_path / "mine", rows, "arc.jsonl")
    assert shown(brought, tmp_path, "card-questions") == before  # the same questions in another order
    rows[0]["answerKey"] = "C"  # an answer is no part of a question's id, and yet of what was asked
    written(tmp_path / "mine", rows, "arc.jsonl")
    assert (
        shown(brought, tmp_path, "card-questions")["asked or kept for training"] != before["asked or kept for training"]
    )
    ids = sorted(question.id for question in arc.read_arc(tmp_path / "mine" / "arc.jsonl"))
    split(monkeypatch, ids[6:], ids[:6])
    assert shown(brought, tmp_path, "card-questions")["asked: 6 questions"] != before["asked: 6 questions"]


def test_a_brought_file_that_nothing_reads_and_that_is_gone_is_said_to_be(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen, eval__arc_file=str(tmp_path / "gone.jsonl"))  # asks nothing of multiple choice
    assert shown(recipe, tmp_path, "card-brought") == {"eval.arc_file: gone.jsonl": "cannot be read any more"}


def test_a_run_on_shipped_data_alone_brings_nothing(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen)
    assert shown(recipe, tmp_path, "card-brought") == {}
    assert shown(recipe, tmp_path, "card-questions") == {}  # no multiple-choice question is asked
