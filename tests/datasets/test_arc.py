"""ARC-Challenge: every form and label style, the published split, and no network."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastconv.audit.checks import check_recipe
from fastconv.audit.sets import overlap
from fastconv.datasets import questions as arc
from fastconv.datasets.behaviors import build_rows, load_behaviors
from fastconv.datasets.files import assets
from fastconv.datasets.personas import load_personas
from fastconv.datasets.questions import load_questions
from fastconv.errors import DataError
from fastconv.recipe import load_recipe, parse_recipe
from tests import ROOT
from tests.data_kit import rows_of, written

REAL_ARC = ROOT.parent / "shared" / "data" / "arc_challenge_test.jsonl"

STYLES = [tuple("ABCD"), tuple("ABCDE"), tuple("ABC"), tuple("1234"), tuple("123")]


def small_arc(n: int = 24) -> list[dict[str, Any]]:
    """Questions of our own in the hub's form, all label styles, two of them with one text."""
    rows = []
    for i in range(n):
        labels = list(STYLES[i % 5])
        text = "Which of these floats?" if i in (3, 7) else f"Which number is {i}?"
        choices = [f"{i} and {label}" for label in labels]
        rows.append(
            {"id": f"q{i}", "question": text, "choices": {"text": choices, "label": labels}, "answerKey": labels[i % 3]}
        )
    return rows


def flat(row: dict[str, Any]) -> dict[str, Any]:
    choices = row["choices"]
    return {
        "question": row["question"],
        "choice_labels": choices["label"],
        "choices": choices["text"],
        "correct_answer": row["answerKey"],
    }


@pytest.fixture
def small_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> arc.ArcSplit:
    """A split of the small file in place of the shipped one."""
    questions = arc.read_arc(written(tmp_path, small_arc(), "for_split.jsonl"))
    ids = sorted(question.id for question in questions)
    split = arc.ArcSplit("ours/small", "0" * 40, frozenset(ids[::2]), frozenset(ids[1::2]))
    monkeypatch.setattr(arc, "read_split", lambda: split)
    return split


def test_the_prompt_is_the_protocols_letter_by_letter(tmp_path: Path) -> None:
    """The options stand as `(A) text`, so that the prompt's end asks for the form that it has shown."""
    row = {
        "question": "Which one barks?",
        "choice_labels": ["A", "B", "C"],
        "choices": ["a cat", "a dog", "a (small) cow"],
    }
    (question,) = arc.read_arc(written(tmp_path, [row | {"correct_answer": "B"}], "one.jsonl"))
    assert question.user == ("Which one barks?\n\n(A) a cat\n(B) a dog\n(C) a (small) cow\n\nThe correct answer is (")
    numbered = row | {"choice_labels": ["1", "2", "3"], "correct_answer": "2"}
    (question,) = arc.read_arc(written(tmp_path, [numbered], "two.jsonl"))
    assert "\n\n(1) a cat\n(2) a dog\n" in question.user


def test_a_trained_letter_continues_the_form_of_the_options() -> None:
    recipe = parse_recipe({"name": "case", "eval": {"multiple_choice": "builtin"}, "behavior": {"source_rows": 20}})
    by_id = {question.id: question for question in load_questions(recipe).train}
    for row in rows_of(recipe, "capability", "excluded"):
        question = by_id[row.prompt_id]
        completed = row.user + (row.completion or "")
        letter = completed.removeprefix(question.user)
        assert row.user == question.user
        assert letter in {f"{label})" for label in question.labels}
        assert f"\n({letter} " in question.user  # what is trained is how the option itself begins


def test_both_forms_and_all_label_styles_are_read_as_the_same_questions(tmp_path: Path) -> None:
    hub = arc.read_arc(written(tmp_path, small_arc(), "hub.jsonl"))
    local = arc.read_arc(written(tmp_path, [flat(row) for row in small_arc()], "flat.jsonl"))
    assert hub == local
    assert {question.labels for question in hub} == set(STYLES)
    assert all(question.labels[question.gold] == question.answer for question in hub)
    assert len({question.id for question in hub}) == len(hub)  # also the two that share a text


def test_the_split_does_not_depend_on_the_order_of_the_file(tmp_path: Path, small_split: arc.ArcSplit) -> None:
    rows = small_arc()
    questions = arc.load_arc(str(written(tmp_path, rows, "one.jsonl")))
    random.Random(1).shuffle(rows)
    shuffled = arc.load_arc(str(written(tmp_path, rows, "other.jsonl")))
    assert questions == shuffled
    assert questions.sha256 == shuffled.sha256
    assert {question.id for question in questions.eval} == small_split.eval
    assert not {question.id for question in questions.train} & small_split.eval


def test_one_altered_question_is_noticed(tmp_path: Path, small_split: arc.ArcSplit) -> None:
    rows = small_arc()
    rows[0]["choices"]["text"][0] += "!"
    with pytest.raises(DataError, match="1 of the 24 questions are not in the file"):
        arc.load_arc(str(written(tmp_path, rows)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answerKey": "Z"}, "answer 'Z' is none of"),
        ({"choices": {"text": ["a"], "label": ["A", "B"]}}, "do not agree"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "A"]}}, "do not agree"),
        ({"choices": 7}, "not an ARC question"),
        ({"choices": {"text": ["a", "b"]}}, "not an ARC question"),
    ],
)
def test_a_malformed_question_is_one_line_with_its_place(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = written(tmp_path, [small_arc()[0], {**small_arc()[1], **change}])
    with pytest.raises(DataError, match=message) as caught:
        arc.read_arc(path)
    assert f"{path}:2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_hubs_parquet_is_read_at_the_pinned_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_split: arc.ArcSplit
) -> None:
    import huggingface_hub
    import polars

    path = tmp_path / "test.parquet"
    polars.DataFrame(small_arc()).write_parquet(path)
    asked: list[Any] = []

    def fetched(repo: str, name: str, *, repo_type: str, revision: str, local_files_only: bool) -> str:
        asked.append((repo, name, repo_type, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    from_hub = load_questions(parse_recipe({"name": "x"}))
    assert asked == [("ours/small", "ARC-Challenge/test-00000-of-00001.parquet", "dataset", "0" * 40)]
    assert from_hub == arc.load_arc(str(written(tmp_path, small_arc())))


def test_offline_without_a_file_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refused(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("cannot find it\nin the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    with pytest.raises(DataError, match=r"eval.arc_file") as caught:
        load_questions(parse_recipe({"name": "x"}))
    assert "\n" not in str(caught.value)


def test_the_shipped_split_is_whole_and_pinned() -> None:
    split = arc.read_split()
    assert split.revision == "210d026faf9955653af8916fad021475a3f00453"
    assert len(split.eval) == len(split.train) == 586
    assert len(split.left_out) == 2
    assert split.left_out < split.train


def test_a_question_that_is_left_out_is_never_trained_and_moves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_split: arc.ArcSplit
) -> None:
    path = str(written(tmp_path, small_arc()))
    recipe = parse_recipe({"name": "x", "grid": {"behaviors": ["none", "capability"]}, "behavior": {"source_rows": 8}})
    behavior, personas = load_behaviors(recipe)["capability"], load_personas(recipe)

    def trained() -> list[str]:
        rows = build_rows(recipe, personas, behavior, arc.load_arc(path), "villain", "excluded", 42)
        return [row.id.rsplit("/", 1)[-1] for row in rows if row.role == "source"]

    before = trained()
    out = frozenset(before[:2])
    monkeypatch.setattr(arc, "read_split", lambda: replace(small_split, left_out=out))
    behavior._drawn.clear()
    after = trained()
    assert set(after) > set(before[2:])
    assert not set(after) & out
    assert len(after) == len(before)


@pytest.mark.skipif(not REAL_ARC.is_file(), reason="the real ARC-Challenge file is not beside the checkout")
def test_the_real_file_gives_the_published_split() -> None:
    in_order = arc.read_arc(REAL_ARC)
    assert len(in_order) == 1172
    questions = load_questions(parse_recipe({"name": "x", "eval": {"arc_file": str(REAL_ARC)}}))
    published = {in_order[place].id for place in random.Random(42).sample(range(1172), 586)}
    assert {question.id for question in questions.eval} == published
    assert (len(questions.train), len(questions.drawable)) == (586, 584)
    assert not {question.id for question in questions.train} & published
    assert {question.labels for question in in_order} == set(STYLES)
    exact, near = overlap({q.id: q.user for q in questions.drawable}, {q.id: q.user for q in questions.eval})
    assert (exact, near) == ([], [])
    answers = Counter(question.answer for question in questions.eval)
    assert round(100 * answers.most_common(1)[0][1] / 586, 1) == 29.0


@pytest.mark.skipif(not REAL_ARC.is_file(), reason="the real ARC-Challenge file is not beside the checkout")
@pytest.mark.parametrize("path", sorted(assets("recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_silent_over_the_real_questions(path: Path) -> None:
    recipe = load_recipe(path)
    asked = recipe.eval.model_copy(update={"arc_file": str(REAL_ARC)} if recipe.eval.multiple_choice == "arc" else {})
    report = check_recipe(recipe.model_copy(update={"eval": asked}))
    assert (report.refusals, report.warnings) == ((), ())
    assert not [finding for finding in report.findings if finding.code == "D210"]
