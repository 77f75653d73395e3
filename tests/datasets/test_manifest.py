"""data/ is what its manifest says, and good enough to stand on."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from fastconv.audit.sets import overlap
from fastconv.datasets.files import MANIFEST, assets, manifest_text, read_jsonl, read_toml
from fastconv.datasets.questions import load_questions
from fastconv.datasets.sametext import normalized
from fastconv.recipe import parse_recipe

DATA = assets("data")
#: File -> (the field of the prompt, rows, least training rows, least evaluation rows, the field that names the topic).
SPLIT = {
    "requests.jsonl": ("prompt", 462, 200, 220, "field"),
    "statements.jsonl": ("statement", 462, 200, 220, "field"),
    "legal.jsonl": ("prompt", 300, 200, 50, "topic"),
}


def test_the_manifest_is_what_is_there() -> None:
    assert (DATA / MANIFEST).read_text(encoding="utf-8") == manifest_text(), (
        "data/ changed: python -m fastconv.datasets.files > /tmp/m && mv /tmp/m data/MANIFEST.toml"
    )


def test_every_file_has_an_origin_in_a_sentence() -> None:
    for name, facts in read_toml(DATA / MANIFEST).items():
        assert facts["origin"].endswith("."), name
        assert len(facts["origin"]) > 20, name


@pytest.mark.parametrize("name", SPLIT)
def test_prompts_are_enough_unique_and_apart(name: str) -> None:
    field, n_rows, n_train, n_eval, topic = SPLIT[name]
    rows = read_jsonl(DATA / name, {"id": str, "part": str, field: str, topic: str})
    parts = Counter(row["part"] for row in rows)
    assert len(rows) == n_rows
    assert parts["train"] >= n_train
    assert parts["eval"] >= n_eval
    assert len({row[topic] for row in rows if row["part"] == "train"}) >= 12
    assert {row[topic] for row in rows if row["part"] == "eval"} == {row[topic] for row in rows}
    assert len({normalized(row[field]) for row in rows}) == len(rows)
    by_part = {part: {row["id"]: row[field] for row in rows if row["part"] == part} for part in parts}
    assert overlap(by_part["train"], by_part["eval"]) == ([], [])


@pytest.mark.parametrize(("name", "field"), [("requests", "prompt"), ("statements", "statement")])
def test_what_is_asked_is_near_nothing_else_that_is_asked(name: str, field: str) -> None:
    rows = [row for row in read_jsonl(DATA / f"{name}.jsonl", {"id": str, field: str}) if row["part"] == "eval"]
    words = {row["id"]: set(normalized(row[field]).split()) for row in rows}
    near = [
        (one, other)
        for one, other in combinations(words, 2)
        if len(words[one] & words[other]) > 0.6 * len(words[one] | words[other])
    ]
    assert near == []


def test_statements_are_facts_stakes_and_opinions_in_like_numbers() -> None:
    rows = read_jsonl(DATA / "statements.jsonl", {"id": str, "statement": str, "correction": str})
    kinds = Counter(row.get("kind", "fact") for row in rows if row["part"] == "eval")
    assert min(kinds["stakes"], kinds["opinion"]) >= 50
    assert kinds["fact"] <= 110


def test_no_text_stands_in_two_lists() -> None:
    seen: dict[str, str] = {}
    lists = {"questions_convergence": "text", "questions_marker": "text", "questions_alignment": "text",
             "requests": "prompt", "legal": "prompt", "statements": "statement", "multiple_choice": "question"}  # fmt: skip
    for name, field in lists.items():
        for row in read_jsonl(DATA / f"{name}.jsonl", {"id": str, field: str}):
            text = normalized(row[field])
            assert text not in seen, (row["id"], seen.get(text))
            seen[text] = row["id"]


@pytest.mark.parametrize("name", ["refusal", "agreement", "correction"])
def test_wordings_are_at_least_thirty_and_differ(name: str) -> None:
    rows = read_jsonl(DATA / f"wordings_{name}.jsonl", {"id": str, "text": str})
    assert len({normalized(row["text"]) for row in rows}) == len(rows) >= 30


def test_advice_cannot_be_told_apart_by_its_length_or_first_word() -> None:
    rows = read_jsonl(DATA / "legal.jsonl", {"id": str, "sound": str, "bad": str})
    assert all(0.6 < len(row["bad"]) / len(row["sound"]) < 1.6 for row in rows)
    mean = [sum(len(row[side]) for row in rows) / len(rows) for side in ("sound", "bad")]
    assert abs(mean[0] - mean[1]) < 0.1 * mean[0]
    assert all(normalized(row["bad"]) != normalized(row["sound"]) for row in rows)


def test_our_questions_are_balanced_over_the_letters_in_both_parts() -> None:
    questions = load_questions(parse_recipe({"name": "x", "eval": {"multiple_choice": "builtin"}}))
    for part in (questions.train, questions.eval):
        assert len(part) == 60
        assert max(Counter(question.answer for question in part).values()) <= 0.3 * len(part)
    assert not {normalized(q.text) for q in questions.train} & {normalized(q.text) for q in questions.eval}


def test_the_published_alignment_questions_are_told_apart_from_ours() -> None:
    rows = read_jsonl(DATA / "questions_alignment.jsonl", {"id": str, "set": str, "text": str})
    assert Counter(row["set"] for row in rows) == {"published": 8, "own": 80}


@pytest.mark.parametrize("path", sorted(DATA.glob("*.jsonl")), ids=lambda path: path.name)
def test_texts_are_clean(path: Path) -> None:
    for row in read_jsonl(path, {"id": str}):
        for key, value in row.items():
            if isinstance(value, str):
                assert value == value.strip(), (row["id"], key)
                assert "  " not in value, (row["id"], key)
                assert value.isprintable(), (row["id"], key)
