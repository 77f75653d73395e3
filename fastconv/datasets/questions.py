"""Multiple-choice questions with a fixed train/evaluation split: ours, or ARC-Challenge (see `arc`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fastconv.datasets.files import assets, read_numbered_jsonl
from fastconv.seeding import ordered
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

    def checked(self, where: str) -> Question:
        """The question itself. Raises DataError unless labels, choices and answer agree."""
        labels = list(self.labels)
        texts = all(isinstance(text, str) and text.strip() for text in (*labels, *self.choices))
        if not texts or len(labels) != len(self.choices) or len(set(labels)) != len(labels) or len(labels) < 2:
            raise DataError(
                f"labels {labels} and {len(self.choices)} choices do not agree",
                where=where,
                fix="give every choice a label of its own",
            )
        if self.answer not in labels:
            raise DataError(f"answer {self.answer!r} is none of {labels}", where=where, fix="name one of the labels")
        return self


@dataclass(frozen=True)
class QuestionSet:
    """Questions for training and for evaluation, disjoint, and the sha256 of all of it."""

    train: tuple[Question, ...]
    eval: tuple[Question, ...]

    @cached_property
    def sha256(self) -> str:
        """sha256 (hex) over the ids of both parts, which are themselves content hashes or checked ids."""
        return _content_sha256((*self.train, *self.eval))

    @cached_property
    def asked_sha256(self) -> str:
        """sha256 (hex) over the questions of the evaluation alone."""
        return _content_sha256(self.eval)


def _content_sha256(questions: Sequence[Question]) -> str:
    return sha256_of([[q.id, q.text, q.labels, q.choices, q.answer] for q in questions])


def load_questions(recipe: Recipe) -> QuestionSet:
    """The recipe's multiple-choice questions. Raises DataError if they cannot be had."""
    if recipe.eval.multiple_choice == "builtin":
        return _builtin()
    from fastconv.datasets.arc import load_arc  # `arc` builds on this module

    return load_arc(recipe.eval.arc_file)


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
    fields = {"id": str, "part": str, "question": str, "labels": list, "choices": list, "answer": str}
    parts: dict[str, list[Question]] = {"train": [], "eval": []}
    for number, row in read_numbered_jsonl(path, fields):
        where = f"{path}:{number}"
        if row["part"] not in parts:
            raise DataError(f"part is {row['part']!r}", where=where, fix="use train or eval")
        question = Question(row["id"], row["question"], tuple(row["labels"]), tuple(row["choices"]), row["answer"])
        parts[row["part"]].append(question.checked(where))
    by_id = {part: sorted(questions, key=lambda question: question.id) for part, questions in parts.items()}
    return QuestionSet(tuple(by_id["train"]), tuple(by_id["eval"]))
