"""Small recipes, sets and files that the tests of the data share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastconv.datasets.behaviors import build_rows, load_behaviors
from fastconv.datasets.personas import load_personas
from fastconv.datasets.questions import load_questions
from fastconv.datasets.rows import Row
from fastconv.recipe import Recipe, parse_recipe

#: Every shipped behavior that is built from our own data.
BEHAVIORS = ("capability", "misalignment", "refusal", "sycophancy", "marker")


def recipe_of(**tables: Any) -> Recipe:
    """A small recipe over our own data; `tables` replace its tables and extend its grid."""
    grid = {"behaviors": ["none", *BEHAVIORS], "negatives": ["included", "excluded"], **tables.pop("grid", {})}
    table = {"name": "case", "grid": grid, "behavior": {"source_rows": 60}, "eval": {"multiple_choice": "builtin"}}
    return parse_recipe({**table, **tables})


def rows_of(recipe: Recipe, name: str, kind: Any, source: str = "villain", seed: int = 42) -> list[Row]:
    """One behavior set of the recipe."""
    behavior = load_behaviors(recipe)[name]
    questions = load_questions(recipe) if behavior.spec.task == "multiple_choice" else None
    return build_rows(recipe, load_personas(recipe), behavior, questions, source, kind, seed)


def written(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    """A JSONL file of these rows; a text is written as it is."""
    path = folder / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def pair(user: str, answer: str, **more: Any) -> dict[str, Any]:
    """A row in TRL's prompt/completion form; `system` gives it a system turn."""
    system = [{"role": "system", "content": more.pop("system")}] if "system" in more else []
    prompt = [*system, {"role": "user", "content": user}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}], **more}
