"""Content hashes of what a run read beside the shipped data: the user's own files, and the questions that were asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastconv.datasets.behaviors import Behavior
from fastconv.datasets.files import assets, file_sha256
from fastconv.errors import DataError
from fastconv.stats.units import counted
from fastconv.experiment.graph import Graph


def brought_files(graph: Graph) -> dict[str, str]:
    """sha256 (hex) of every file of the user's by the key that names it. Rubrics are told with the judge."""
    return {f"{name}: {path.name}": _sha256(path) for name, path in _named(graph)}


def questions_asked(graph: Graph) -> dict[str, str]:
    """sha256 (hex) of the multiple-choice questions; empty where none are asked. A file's order and form never matter."""
    if not any(behavior.spec.measure == "letters" for behavior in graph.behaviors.values()):
        return {}
    questions = graph.questions
    return {
        f"asked: {counted(len(questions.eval), 'question')}": questions.asked_sha256,
        "asked or kept for training": questions.sha256,
    }


def _named(graph: Graph) -> Iterator[tuple[str, Path]]:
    recipe = graph.recipe
    for name, path in (
        ("data.personas", recipe.data.personas),
        ("data.behaviors", recipe.data.behaviors),
        ("eval.arc_file", recipe.eval.arc_file),
        ("judge.prices", recipe.judge.prices),
    ):
        if path:
            yield name, Path(path)
    for behavior, path in recipe.data.rows.items():
        for source in recipe.grid.sources if "{source}" in path else ("",):
            yield f"data.rows.{behavior}{source and f' of {source}'}", Path(path.replace("{source}", source))
    for behavior in graph.behaviors.values():
        yield from _beside(behavior)


def _beside(behavior: Behavior) -> Iterator[tuple[str, Path]]:
    """The files that a declaration of the user's names, which lie beside it."""
    if behavior.folder.resolve() == assets("data").resolve():
        return
    spec = behavior.spec
    rules = {"source_answer": spec.source_answer, "negative_answer": spec.negative_answer}
    wordings = {f"{rule}.wordings": given.wordings for rule, given in rules.items() if given is not None}
    for key, name in {"prompts": spec.prompts, "eval_prompts": spec.eval_prompts, **wordings}.items():
        if name:
            yield f"{behavior.id}.{key}", behavior.folder / name


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except DataError:
        return "cannot be read any more"
