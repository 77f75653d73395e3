"""Multiple-choice questions: ours, or ARC-Challenge from a local file, with a fixed train/evaluation split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastconv.datasets.files import assets, read_jsonl
from fastconv.draws import ordered
from fastconv.errors import DataError
from fastconv.recipe import Recipe, sha256_of


@dataclass(frozen=True, slots=True)
class Question:
    """A multiple-choice question with its own labels (A to D, A to E, A to C or 1 to 4)."""

    id: str
    text: str
    labels: tuple[str, ...]
    choices: tuple[str, ...]
    answer: str

    @property
    def user(self) -> str:
        """The user turn: it ends right where the letter comes."""
        options = "\n".join(f"{label}) {choice}" for label, choice in zip(self.labels, self.choices, strict=True))
        return f"{self.text}\n\n{options}\n\nThe correct answer is ("

    @property
    def gold(self) -> int:
        """Index of the right label."""
        return self.labels.index(self.answer)


@dataclass(frozen=True)
class QuestionSet:
    """Questions for training and for evaluation, disjoint, and the sha256 of all of it."""

    train: tuple[Question, ...]
    eval: tuple[Question, ...]

    @property
    def sha256(self) -> str:
        """sha256 (hex) over the ids of both parts, which are themselves content hashes or checked ids."""
        return sha256_of([[q.id, q.text, q.labels, q.choices, q.answer] for q in (*self.train, *self.eval)])


def load_questions(recipe: Recipe) -> QuestionSet:
    """The recipe's multiple-choice questions. Raises DataError if they cannot be had."""
    if recipe.eval.multiple_choice == "builtin":
        return _builtin()
    if not recipe.eval.arc_file:
        raise DataError(
            "ARC-Challenge is not at hand",
            where="eval.arc_file",
            fix="set eval.arc_file to a local copy of the test part",
        )
    return split_arc(read_arc(Path(recipe.eval.arc_file)), where=recipe.eval.arc_file)


def read_arc(path: Path) -> list[Question]:
    """ARC rows in the hub's form (choices as a table of text and label) or flat; ids are content hashes."""
    questions = []
    for number, row in enumerate(read_jsonl(path, {"question": str}), 1):
        try:
            questions.append(_arc_question(row))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"row {number} is not an ARC question: {error}",
                where=str(path),
                fix="use the hub's fields or the flat ones",
            ) from None
    return questions


def content_hash(text: str, labels: Sequence[str], choices: Sequence[str]) -> str:
    """Identity of a question: 16 hex digits of the sha256 over its text, labels and choices."""
    return sha256_of([text, list(labels), list(choices)])[:16]


def split_arc(questions: Sequence[Question], *, where: str) -> QuestionSet:
    """The published split, by content hash. Raises DataError if a listed evaluation question is missing."""
    listed = json.loads((assets("data") / "arc_split.json").read_text(encoding="utf-8"))
    held_out = set(listed["eval"])
    if missing := held_out - {q.id for q in questions}:
        raise DataError(
            f"{len(missing)} of the {len(held_out)} evaluation questions are not in the file",
            where=where,
            fix="use the ARC-Challenge test part, unaltered",
        )
    known = held_out | set(listed["train"])
    return QuestionSet(
        tuple(q for q in questions if q.id in known and q.id not in held_out),
        tuple(q for q in questions if q.id in held_out),
    )


def wrong_letters(questions: Sequence[Question], *seed_parts: object) -> list[str]:
    """A wrong label for each question, as balanced over the labels as the questions allow."""
    used: dict[str, int] = {}
    letters = []
    for question in questions:
        candidates = ordered(
            [label for label in question.labels if label != question.answer], "wrong", question.id, *seed_parts
        )
        letter = min(candidates, key=lambda label: used.get(label, 0))
        used[letter] = used.get(letter, 0) + 1
        letters.append(letter)
    return letters


def _builtin() -> QuestionSet:
    path = assets("data") / "multiple_choice.jsonl"
    parts: dict[str, list[Question]] = {"train": [], "eval": []}
    for row in read_jsonl(
        path, {"id": str, "part": str, "question": str, "labels": list, "choices": list, "answer": str}
    ):
        parts[row["part"]].append(
            Question(row["id"], row["question"], tuple(row["labels"]), tuple(row["choices"]), row["answer"])
        )
    return QuestionSet(tuple(parts["train"]), tuple(parts["eval"]))


def _arc_question(row: dict[str, Any]) -> Question:
    if isinstance(row["choices"], dict):
        labels, choices, answer = row["choices"]["label"], row["choices"]["text"], row["answerKey"]
    else:
        labels, choices, answer = row["choice_labels"], row["choices"], row["correct_answer"]
    if len(labels) != len(choices) or answer not in labels or len(set(labels)) != len(labels):
        raise ValueError(f"labels {labels}, {len(choices)} choices, answer {answer!r} do not agree")
    return Question(
        content_hash(row["question"], labels, choices), row["question"], tuple(labels), tuple(choices), answer
    )
