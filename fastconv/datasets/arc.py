"""ARC-Challenge: read from a local file or from the hub at a pinned revision, split by content hash.

What is verified is the content of the questions, against the hashes in `data/arc_split.json`: the same questions in
another file, order or format are the same split, and one altered letter is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastconv.datasets.files import assets, read_numbered_jsonl
from fastconv.datasets.questions import Question, QuestionSet
from fastconv.errors import DataError
from fastconv.hub import is_out_of_reach
from fastconv.recipe import sha256_of

HUB_FILE = "ARC-Challenge/test-00000-of-00001.parquet"
_LOCAL_COPY = "set eval.arc_file to a local copy of the test part (JSONL), or go online once to fetch it"


@dataclass(frozen=True)
class ArcSplit:
    """The published split: content hashes of both parts, and where the questions come from."""

    dataset: str
    revision: str
    eval: frozenset[str]
    train: frozenset[str]


def load_arc(arc_file: str) -> QuestionSet:
    """The published split of a local file, or of the hub's where no file is given. Raises DataError without either."""
    if arc_file:
        return split_arc(read_arc(Path(arc_file)), where=arc_file)
    split = read_split()
    return split_arc(_from_hub(split), where=f"{split.dataset}@{split.revision[:8]}")


def read_split() -> ArcSplit:
    """The shipped split. Raises DataError if its hashes are not those it names or the parts overlap."""
    path = assets("data") / "arc_split.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    held_out, training = frozenset(table["eval"]), frozenset(table["train"])
    if sha256_of([table["eval"], table["train"]]) != table["sha256"] or held_out & training:
        raise DataError("the shipped split was altered", where=str(path), fix="install fastconv again")
    return ArcSplit(table["dataset"], table["revision"], held_out, training)


def read_arc(path: Path) -> list[Question]:
    """ARC rows in the hub's form (choices as a table of text and label) or flat; ids are content hashes."""
    return [_question(row, f"{path}:{number}") for number, row in read_numbered_jsonl(path, {"question": str})]


def content_hash(text: str, labels: Sequence[str], choices: Sequence[str]) -> str:
    """Identity of a question: 16 hex digits of the sha256 over its text, labels and choices."""
    return sha256_of([text, list(labels), list(choices)])[:16]


def split_arc(questions: Sequence[Question], *, where: str) -> QuestionSet:
    """The published split, by content hash and ordered by it: the order of the file never matters.

    Raises DataError if a listed question is missing.
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
    )


def _from_hub(split: ArcSplit) -> list[Question]:
    """Questions of the pinned file, from the hub's cache if it is there, else fetched once."""
    # Imported late: `check` and `plan` start without either.
    import httpx
    import polars
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    where = f"{split.dataset}@{split.revision[:8]}"
    try:
        path = hf_hub_download(
            split.dataset, HUB_FILE, repo_type="dataset", revision=split.revision, local_files_only=is_out_of_reach()
        )
        table = polars.read_parquet(path, columns=["question", "choices", "answerKey"])
    except (OSError, httpx.HTTPError, EntryNotFoundError) as error:
        reason = str(error).strip().split("\n", 1)[0][:160]
        raise DataError(
            f"ARC-Challenge cannot be had from the hub ({type(error).__name__}: {reason})",
            where=where,
            fix=_LOCAL_COPY,
        ) from None
    except polars.exceptions.PolarsError as error:
        raise DataError(f"the hub's file cannot be read: {error}", where=where, fix=_LOCAL_COPY) from None
    return [_question(row, f"{where} row {number}") for number, row in enumerate(table.iter_rows(named=True), 1)]


def _question(row: Mapping[str, Any], where: str) -> Question:
    try:
        if isinstance(row["choices"], dict):
            labels, choices, answer = row["choices"]["label"], row["choices"]["text"], row["answerKey"]
        else:
            labels, choices, answer = row["choice_labels"], row["choices"], row["correct_answer"]
        return Question(
            content_hash(row["question"], labels, choices), row["question"], tuple(labels), tuple(choices), answer
        ).checked(where)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"not an ARC question ({type(error).__name__}: {error})",
            where=where,
            fix="use the hub's fields (question, choices, answerKey) or the flat ones "
            "(question, choice_labels, choices, correct_answer)",
        ) from None
