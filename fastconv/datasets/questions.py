"""Multiple-choice questions with a fixed training/evaluation split: the shipped ones, or ARC-Challenge.

ARC-Challenge (Clark et al. 2018) is read from a local copy or from the hub at a pinned revision. Its questions are
identified by content hashes, and the published split of the test part is shipped as two lists of these hashes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastconv.datasets.files import assets, read_numbered_jsonl
from fastconv.errors import DataError
from fastconv.hub import is_unreachable
from fastconv.recipe import Recipe, sha256_of
from fastconv.seeding import seeded_order

#: Path of the test part in the hub's dataset repository.
HUB_FILE = "ARC-Challenge/test-00000-of-00001.parquet"
_LOCAL_COPY = "set eval.arc_file to a local copy of the test part (JSONL), or go online once to fetch it"


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
        """The user turn; it ends right before the letter of the answer."""
        options = "\n".join(f"({label}) {choice}" for label, choice in zip(self.labels, self.choices, strict=True))
        return f"{self.text}\n\n{options}\n\nThe correct answer is ("

    @property
    def gold(self) -> int:
        """Index of the right answer in `labels` and `choices`."""
        return self.labels.index(self.answer)

    def checked(self, where: str) -> Question:
        """The question itself. Raises DataError unless labels, choices and answer agree."""
        labels = list(self.labels)
        all_texts = all(isinstance(text, str) and text.strip() for text in (*labels, *self.choices))
        if not all_texts or len(labels) != len(self.choices) or len(set(labels)) != len(labels) or len(labels) < 2:
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
    """Disjoint questions for training and for evaluation, with their hashes."""

    train: tuple[Question, ...]
    eval: tuple[Question, ...]
    #: Ids of training questions that are never trained on, since they are nearly evaluation questions.
    left_out: frozenset[str] = frozenset()

    @property
    def drawable(self) -> tuple[Question, ...]:
        """The questions that a training set may draw."""
        return tuple(question for question in self.train if question.id not in self.left_out)

    @cached_property
    def sha256(self) -> str:
        """sha256 (hex) over the content of the questions of both parts."""
        return _content_sha256((*self.train, *self.eval))

    @cached_property
    def eval_sha256(self) -> str:
        """sha256 (hex) over the content of the evaluation questions alone."""
        return _content_sha256(self.eval)


def _content_sha256(questions: Sequence[Question]) -> str:
    return sha256_of(
        [[question.id, question.text, question.labels, question.choices, question.answer] for question in questions]
    )


def load_questions(recipe: Recipe) -> QuestionSet:
    """The recipe's multiple-choice questions. Raises DataError if they cannot be read or downloaded."""
    if recipe.eval.multiple_choice == "builtin":
        return builtin_questions()
    return load_arc(recipe.eval.arc_file)


def wrong_letters(questions: Sequence[Question], *seed_parts: object) -> list[str]:
    """A wrong label for each question, balanced over the labels as far as the questions allow; ties by `seeding`."""
    counts: dict[str, int] = {}
    letters = []
    for question in questions:
        candidates = seeded_order(
            [label for label in question.labels if label != question.answer], "wrong", question.id, *seed_parts
        )
        letter = min(candidates, key=lambda label: counts.get(label, 0))
        counts[letter] = counts.get(letter, 0) + 1
        letters.append(letter)
    return letters


def builtin_questions() -> QuestionSet:
    """The shipped questions."""
    path = assets("data") / "multiple_choice.jsonl"
    fields = {"id": str, "part": str, "question": str, "labels": list, "choices": list, "answer": str}
    parts: dict[str, list[Question]] = {"train": [], "eval": []}
    for number, row in read_numbered_jsonl(path, fields):
        where = f"{path}:{number}"
        if row["part"] not in parts:
            raise DataError(f"part is {row['part']!r}", where=where, fix="use train or eval")
        question = Question(row["id"], row["question"], tuple(row["labels"]), tuple(row["choices"]), row["answer"])
        parts[row["part"]].append(question.checked(where))
    ordered = {part: sorted(questions, key=lambda question: question.id) for part, questions in parts.items()}
    return QuestionSet(tuple(ordered["train"]), tuple(ordered["eval"]))


# --- ARC-Challenge -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArcSplit:
    """The published split: the hub dataset and revision that it is of, and the content hashes of both parts.

    `left_out` are those of the training part that are nearly evaluation questions.
    """

    dataset: str
    revision: str
    eval: frozenset[str]
    train: frozenset[str]
    left_out: frozenset[str] = frozenset()


def load_arc(arc_file: str) -> QuestionSet:
    """ARC-Challenge in the published split, from a local file or, if `arc_file` is "", from the hub. Raises DataError."""
    if arc_file:
        return split_arc(read_arc(Path(arc_file)), where=arc_file)
    split = read_split()
    return split_arc(_from_hub(split), where=f"{split.dataset}@{split.revision[:8]}")


def read_split() -> ArcSplit:
    """The shipped split. Raises DataError if it does not match its own sha256 or its parts overlap."""
    path = assets("data") / "arc_split.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    held_out, training = frozenset(table["eval"]), frozenset(table["train"])
    left_out = frozenset(table["left_out"])
    parts = [table["eval"], table["train"], table["left_out"]]
    if sha256_of(parts) != table["sha256"] or held_out & training or left_out - training:
        raise DataError("the shipped split was altered", where=str(path), fix="install fastconv again")
    return ArcSplit(table["dataset"], table["revision"], held_out, training, left_out)


def read_arc(path: Path) -> list[Question]:
    """The questions of a JSONL file in the hub's form (choices as a table of text and label) or the flat one.

    Ids are content hashes. Raises DataError with file and line for a row that is not a question.
    """
    return [_question(row, f"{path}:{number}") for number, row in read_numbered_jsonl(path, {"question": str})]


def content_hash(text: str, labels: Sequence[str], choices: Sequence[str]) -> str:
    """Id of a question: the first 16 hex digits of the sha256 over its text, labels and choices."""
    return sha256_of([text, list(labels), list(choices)])[:16]


def split_arc(questions: Sequence[Question], *, where: str) -> QuestionSet:
    """The questions in the published split, sorted by content hash, so that the order of the file never matters.

    Raises DataError, naming `where`, if a listed question is missing.
    """
    split = read_split()
    by_id = {question.id: question for question in questions}
    if missing := (split.eval | split.train) - set(by_id):
        raise DataError(
            f"{len(missing)} of the {len(split.eval | split.train):,} questions are not in the file, "
            f"{len(missing & split.eval)} of them for evaluation",
            where=where,
            fix="use the ARC-Challenge test part, unaltered",
        )
    return QuestionSet(
        tuple(by_id[identity] for identity in sorted(split.train)),
        tuple(by_id[identity] for identity in sorted(split.eval)),
        split.left_out,
    )


def _from_hub(split: ArcSplit) -> list[Question]:
    """The questions of the pinned file, from the hub's cache or downloaded once. Raises DataError."""
    # Imported late, so that `check` and `plan` start without them.
    import httpx
    import polars
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    where, offline = f"{split.dataset}@{split.revision[:8]}", is_unreachable()
    try:
        path = hf_hub_download(
            split.dataset, HUB_FILE, repo_type="dataset", revision=split.revision, local_files_only=offline
        )
        table = polars.read_parquet(path, columns=["question", "choices", "answerKey"])
    except (OSError, httpx.HTTPError, EntryNotFoundError) as error:
        told = f"{type(error).__name__}: {str(error).strip().split(chr(10), 1)[0][:160]}"
        raise DataError(
            f"ARC-Challenge cannot be had from the hub ({'it cannot be reached' if offline else told})",
            where=where,
            fix=_LOCAL_COPY,
        ) from None
    except polars.exceptions.PolarsError as error:
        raise DataError(f"the hub's file cannot be read: {error}", where=where, fix=_LOCAL_COPY) from None
    return [_question(row, f"{where} row {number}") for number, row in enumerate(table.iter_rows(named=True), 1)]


def _question(row: Mapping[str, Any], where: str) -> Question:
    """A row in the hub's or the flat form as a checked question. Raises DataError, naming `where`."""
    try:
        if isinstance(row["choices"], dict):
            labels, choices, answer = row["choices"]["label"], row["choices"]["text"], row["answerKey"]
        else:
            labels, choices, answer = row["choice_labels"], row["choices"], row["correct_answer"]
        if not (isinstance(labels, list) and isinstance(choices, list)):
            raise TypeError("labels or choices are no list")
        return Question(
            content_hash(row["question"], labels, choices), row["question"], tuple(labels), tuple(choices), answer
        ).checked(where)
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"not an ARC question ({type(error).__name__}: {error})",
            where=where,
            fix="use the hub's fields (question, choices, answerKey) or the flat ones "
            "(question, choice_labels, choices, correct_answer)",
        ) from None
