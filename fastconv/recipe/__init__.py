"""The recipe: the settings of one experiment as frozen tables, read from TOML with overrides, and its identity.

Defaults are the protocol of the published experiments (#99, #109, #112), so that a recipe states only what it changes.
Two recipes with the same canonical JSON are the same experiment, whatever their files look like.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from fastconv.errors import RecipeError
from fastconv.recipe.settings import (
    AuditSettings,
    BehaviorSettings,
    ConvergenceKind,
    ConvergenceSettings,
    DataSettings,
    EvalSettings,
    GateSettings,
    GridSettings,
    IgnorableGate,
    JudgeSettings,
    LoraSettings,
    ModelSettings,
    Name,
    Names,
    NegativesKind,
    Points,
    Positive,
    PositiveInt,
    Rate,
    RecipeTable,
    RunSettings,
    SamplingSettings,
    Share,
    StoppingGate,
    TrainSettings,
)

__all__ = [
    "AuditSettings", "BehaviorSettings", "ConvergenceKind", "ConvergenceSettings", "DataSettings", "EvalSettings", "GateSettings", "GridSettings", "IgnorableGate", "JudgeSettings", "LoraSettings", "ModelSettings", "Name", "Names", "NegativesKind", "Points", "Positive", "PositiveInt", "Rate", "Recipe", "RecipeTable", "RunSettings", "SamplingSettings", "Share", "StoppingGate", "TrainSettings", "canonical_json", "load_recipe", "map_paths", "model_settings", "parse_recipe", "recipe_sha256", "run_id", "sha256_of", "with_overrides",
]  # fmt: skip


class Recipe(RecipeTable):
    """All settings of one experiment; `load_recipe` reads it from TOML."""

    name: Name
    about: str = ""
    model: ModelSettings = ModelSettings()
    grid: GridSettings = GridSettings()
    lora: LoraSettings = LoraSettings()
    convergence: ConvergenceSettings = ConvergenceSettings()
    behavior: BehaviorSettings = BehaviorSettings()
    eval: EvalSettings = EvalSettings()
    gates: GateSettings = GateSettings()
    data: DataSettings = DataSettings()
    audit: AuditSettings = AuditSettings()
    judge: JudgeSettings = JudgeSettings()
    run: RunSettings = RunSettings()

    @model_validator(mode="after")
    def _epochs_fit(self) -> Recipe:
        beyond = [epoch for epoch in self.grid.epochs if epoch > self.convergence.epochs]
        if beyond:
            raise ValueError(
                f"grid.epochs {beyond} lie beyond convergence.epochs = {self.convergence.epochs} (allowed: 0 to that)"
            )
        if self.eval.canary == self.eval.canary_swap:
            raise ValueError("eval.canary and eval.canary_swap must be two personas")
        if self.model.sampler == "vllm" and self.model.semantics == "published":
            raise ValueError("model.sampler vllm serves a snapshot as an adapter; model.semantics published folds it")
        return self


def canonical_json(value: object) -> str:
    """The canonical JSON text of a value: sorted keys, no spaces. Raises ValueError for a number that is not finite."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(value: object) -> str:
    """sha256 (hex) of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def recipe_sha256(recipe: Recipe) -> str:
    """Identity of an experiment: sha256 of the recipe's canonical JSON."""
    return sha256_of(recipe.model_dump(mode="json"))


def run_id(recipe: Recipe) -> str:
    """Name of the recipe's run in a workspace: its name and the first 8 hex digits of its sha256."""
    return f"{recipe.name}-{recipe_sha256(recipe)[:8]}"


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from TOML and apply `a.b=c` overrides. Raises RecipeError naming file, key, value and allowed values.

    Paths in the file are relative to its folder, those in overrides to the current one.
    """
    path = Path(path)
    error_at = partial(RecipeError, where=str(path))
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error_at("no such recipe", fix="give the path of a TOML recipe, e.g. recipes/demo.toml") from None
    except UnicodeDecodeError as error:
        raise error_at(f"not UTF-8 at byte {error.start}", fix="save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise error_at(f"not valid TOML: {error}", fix="mend the syntax there") from None
    except OSError as error:
        raise error_at(
            f"cannot be read: {str(error.strerror).lower()}", fix="give a TOML recipe that you may read"
        ) from None
    map_paths(table, lambda name: str((path.parent / name).resolve()))
    return _overridden(table, overrides, where=str(path))


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with `a.b=c` overrides applied. Raises RecipeError as `load_recipe` does."""
    return _overridden(recipe.model_dump(mode="json"), overrides, where=recipe.name)


def parse_recipe(table: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """The recipe of a TOML or JSON table. Raises RecipeError for the first fault, naming key, value and allowed values."""
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise _recipe_error(error, where) from None


def model_settings(model_id: str, revision: str = "") -> ModelSettings:
    """The settings of a model named on the command line. Raises RecipeError if the revision is not a commit sha."""
    return parse_recipe({"name": "model", "model": {"id": model_id, "revision": revision}}, where="--model").model


def _overridden(table: dict[str, Any], overrides: Sequence[str], *, where: str) -> Recipe:
    for override in overrides:
        _apply_override(table, override)
    map_paths(table, lambda name: str(Path(name).resolve()))  # overrides are relative to the current folder
    return parse_recipe(table, where=where)


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise RecipeError(
            f"{override!r} is not key=value", where="--set", fix="write it like --set convergence.lr=1e-4"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{key} goes through a value that is no table", where="--set", fix="check the key's path")
    table[last] = value


def map_paths(table: dict[str, Any], replace: Callable[[str], str]) -> None:
    """Replace in place every path in a recipe's table by `replace(path)`; stage keys depend on file contents alone."""
    for section, key in (("data", "personas"), ("data", "behaviors"), ("eval", "arc_file"), ("judge", "prices")):
        part = table.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str) and part[key]:
            part[key] = replace(part[key])
    for section, key in (("data", "rows"), ("judge", "rubrics")):
        part = table.get(section)
        paths = part.get(key) if isinstance(part, dict) else None
        if isinstance(paths, dict):
            paths |= {name: replace(path) for name, path in paths.items() if path and isinstance(path, str)}


def _recipe_error(error: ValidationError, where: str) -> RecipeError:
    """The first fault of a validation as a RecipeError; for an unknown key its fix names the nearest valid one."""
    first = error.errors()[0]
    location = [str(step) for step in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        table: Any = Recipe
        for step in location[:-1]:
            table = table.model_fields[step].annotation
        valid = list(table.model_fields)
        nearest = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.6)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid here: {', '.join(sorted(valid))}"
        return RecipeError(f"unknown key {key!r}", where=where, fix=hint)
    if first["type"] == "missing":
        return RecipeError(f"key {key!r} is missing", where=where, fix=f"add {key} to the recipe")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not key:  # the message of a rule over several keys names them
        return RecipeError(message, where=where, fix="make these keys agree")
    return RecipeError(f"{key} = {first['input']!r}: {message}", where=where, fix=f"give {key} an allowed value")
