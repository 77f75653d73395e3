"""The recipe: the settings of one experiment as frozen tables, read from TOML with overrides, and its identity.

Defaults are the protocol of the published experiments (#99, #109, #112), so that a recipe states only what it changes.
Two recipes with the same canonical JSON are the same experiment, whatever their files look like.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from fastconv.errors import RecipeError, did_you_mean
from fastconv.recipe.grid import (
    BASE_SIDE,
    OWN_ROLES,
    TRAINED,
    ArmSettings,
    ConvergenceKind,
    EvalSettings,
    GridSettings,
    NegativesKind,
    ProbeSettings,
    SeedPart,
)
from fastconv.recipe.lora import LoraSettings, require_chosen
from fastconv.recipe.settings import (
    AuditSettings,
    BehaviorSettings,
    ConvergenceSettings,
    DataSettings,
    GateSettings,
    IgnorableGate,
    JudgeSettings,
    ModelSettings,
    Name,
    Names,
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
    setting,
)
from fastconv.recipe.toml import DEEPEST, toml_table

__all__ = [
    "BASE_SIDE", "OWN_ROLES", "TRAINED", "ArmSettings", "AuditSettings", "BehaviorSettings", "ConvergenceKind", "ConvergenceSettings", "DataSettings", "EvalSettings", "GateSettings", "GridSettings", "HUB", "IgnorableGate", "JudgeSettings", "LoraSettings", "ModelSettings", "Name", "Names", "NegativesKind", "Points", "Positive", "PositiveInt", "ProbeSettings", "Rate", "Recipe", "RecipeKey", "RecipeTable", "RunSettings", "SHIPPED", "SamplingSettings", "SeedPart", "Share", "StoppingGate", "TrainSettings", "canonical_json", "find_keys", "first_fault", "keys_page", "load_recipe", "map_paths", "model_settings", "parse_recipe", "recipe_keys", "recipe_schema", "recipe_sha256", "require_chosen", "run_id", "sha256_of", "toml_table", "toml_value", "with_overrides",
]  # fmt: skip


#: Begin what stands where a path may: a data set on the hub, and one of our own files of questions.
HUB, SHIPPED = "hf://", "shipped:"


class Recipe(RecipeTable):
    """All settings of one experiment; `load_recipe` reads it from TOML."""

    name: Name = Field(description="Begins the run's id and names its report.", examples=["tea"])
    about: str = setting("", "The question, in one sentence.", "Does a villain's tea reach the assistant?")
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
        if self.grid.behaviors == ("none",) and not (self.eval.measures or self._arms_train):
            raise ValueError(
                "grid.behaviors names only the control `none`, and eval.measures nothing to measure without"
            )
        if both := set(self.grid.arms) & set(self.eval.probes):
            raise ValueError(f"{sorted(both)[0]!r} is an arm and a probe; give one of them another name")
        compared = dict[frozenset[tuple[str, str]], tuple[str, str]]()
        for pair in self.grid.contrasts:
            sides = [self.grid.side(side, self.eval.probes) for side in pair]
            if {arm for arm, _ in sides} == {BASE_SIDE}:
                raise ValueError(
                    f"grid.contrasts compares the base with the base ({pair[0]!r}): nothing is trained there"
                )
            if len(set(sides)) == 1:
                raise ValueError(f"grid.contrasts compares {pair[0]!r} with itself")
            if (other := compared.setdefault(frozenset(sides), pair)) is not pair:
                raise ValueError(f"grid.contrasts compares {list(pair)} twice, the other time as {list(other)}")
        return self

    @property
    def _arms_train(self) -> bool:
        return any(arm.behavior not in (None, "none") for arm in self.grid.arms.values())


#: The settings that are paths, as (table, key); those of tables by name follow in `map_paths`.
_PATHS = (
    ("data", "personas"), ("data", "behaviors"), ("eval", "arc_file"), ("judge", "prices"), ("convergence", "prompts_file"),
)  # fmt: skip


def canonical_json(value: object) -> str:
    """The canonical JSON text of a value: sorted keys, no spaces. Raises ValueError for a number that is not finite."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(value: object) -> str:
    """sha256 (hex) of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def recipe_sha256(recipe: Recipe) -> str:
    """Identity of an experiment: sha256 of the recipe's canonical JSON, without who tracks it (`run.track`)."""
    return sha256_of(recipe.model_dump(mode="json", exclude={"run": {"track"}}))


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
        table = toml_table(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        beside = [one.name for one in path.parent.glob("*.toml")]
        fix = did_you_mean(path.name, beside, "give the path of a TOML recipe, e.g. recipes/demo.toml")
        raise error_at("no such recipe", fix=fix) from None
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


def file_bytes(path: Path) -> bytes:
    """The bytes of a file that a recipe names. Raises OSError, also for a pipe or a device, which may have no end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return path.read_bytes()


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
        value = toml_table(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    *parents, last = key.strip().split(".")
    if len(parents) >= DEEPEST:
        raise RecipeError("a key of so many parts names no setting", where="--set", fix="check the key's path")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{key} goes through a value that is no table", where="--set", fix="check the key's path")
    table[last] = value


def map_paths(table: dict[str, Any], replace: Callable[[str], str]) -> None:
    """Replace in place every path in a recipe's table by `replace(path)`; stage keys depend on file contents alone."""
    single = [(table.get(section), key) for section, key in _PATHS]
    for section, name, key in (("grid", "arms", "rows"), ("eval", "probes", "texts")):
        part = table.get(section)
        named = part.get(name) if isinstance(part, dict) else None
        single += [(one, key) for one in (named.values() if isinstance(named, dict) else ())]
    for part, key in single:
        if (
            isinstance(part, dict)
            and isinstance(part.get(key), str)
            and part[key]
            and not part[key].startswith((HUB, SHIPPED))
        ):
            part[key] = replace(part[key])
    for section, key in (("data", "rows"), ("judge", "rubrics")):
        part = table.get(section)
        paths = part.get(key) if isinstance(part, dict) else None
        if isinstance(paths, dict):
            found = {name: path for name, path in paths.items() if path and isinstance(path, str)}
            paths |= {name: replace(path) for name, path in found.items() if not path.startswith(HUB)}


def _recipe_error(error: ValidationError, where: str) -> RecipeError:
    what, fix = first_fault(error, Recipe)
    named = r"allowed value (`fastconv recipe explain \1`)"
    return RecipeError(what, where=where, fix=re.sub(r"allowed value for ([a-z0-9_.]+?)(?:\.\d+)*$", named, fix))


def first_fault(error: ValidationError, model: type[BaseModel]) -> tuple[str, str]:
    """The first fault of a validation: what is wrong with which key, and how to mend it, with the nearest valid word."""
    # A key that nobody knows is often why another one is missing.
    first = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    location = [str(step) for step in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}", did_you_mean(location[-1], _fields_at(model, location[:-1]))
    if first["type"] == "missing":
        return f"key {key!r} is missing", f"add {key}"
    if first["type"] == "tuple_type":
        fix = f"write it in brackets: {key}=[{json.dumps(first['input'])}]"
        if str(first["input"]).startswith("["):  # what is no TOML is taken for a text
            fix = "close its bracket, and set texts in quotes"
        return (
            f"{key} = {first['input']!r}: should be a list",
            fix,
        )
    if first["type"] in ("model_type", "dict_type"):
        return f"{key} = {first['input']!r}: this is a table of keys", f"set one of its keys, as {key}.NAME=VALUE"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] == "value_error" and not isinstance(first["input"], str | int | float | list | tuple):
        return f"{key}: {message}" if key else message, "make these keys agree"  # a rule over several keys names them
    expected = str(first.get("ctx", {}).get("expected", "")) if first["type"] == "literal_error" else ""
    fix = did_you_mean(str(first["input"]), re.findall("'([^']+)'", expected), f"give an allowed value for {key}")
    return f"{key} = {first['input']!r}: {message}", fix


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """The fields of the table at this place in a model's tables."""
    table: Any = model
    for step in location:
        if table is not None and step not in table.model_fields:
            continue  # the name of a table of tables
        inner = None if table is None else table.model_fields[step].annotation
        table = next((one for one in (inner, *get_args(inner)) if hasattr(one, "model_fields")), None)
    return list(table.model_fields) if table is not None else []


# --- what each key is ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecipeKey:
    """One setting: its dotted key, what it is, what it takes, unit, default and example (both as TOML; "": unset)."""

    key: str
    about: str
    takes: str
    unit: str
    default: str
    example: str


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipes (draft 2020-12), with description, unit, default and example of every key."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def recipe_keys() -> tuple[RecipeKey, ...]:
    """Every setting of a recipe, in the order of its tables."""
    schema = recipe_schema()
    return tuple(_keys_of(schema, schema["$defs"], Recipe.model_construct(name=""), ""))


def find_keys(name: str) -> tuple[RecipeKey, ...]:
    """The setting of this dotted key, those of this table, or those whose last part it is. Raises RecipeError for none.

    An arm or a probe may stand under the name that it has (`grid.arms.plain.rows`), and so may what a table holds.
    """
    every = recipe_keys()
    parts = name.split(".")
    named = [".".join([*parts[:place], "name", *parts[place + 1 :]]) for place in range(2, len(parts))]
    for found in (
        [one for one in every if one.key == name],
        [one for one in every if one.key.startswith(f"{name}.")],
        [one for one in every if one.key in named],
        [one for one in every if one.key.startswith(tuple(f"{key}." for key in named))],
        [one for one in every if name.startswith(f"{one.key}.") and one.takes.startswith("table of")],
        [one for one in every if one.key.endswith(f".{name}")],
    ):
        if found:
            return tuple(found)
    names = {one.key for one in every} | {one.key.rpartition(".")[2] for one in every}
    tables = {one.key.partition(".")[0] for one in every if "." in one.key}
    fix = did_you_mean(name, names | tables, "`fastconv recipe explain` lists all keys")
    raise RecipeError(f"a recipe has no key {name!r}", where="recipe explain", fix=fix)


def keys_page() -> str:
    """docs/RECIPES.md: every key with what it is, takes, and is by default."""
    lines = [
        "# Recipes", "",
        "Generated: `fastconv recipe explain --markdown > docs/RECIPES.md`.", "",
        "A recipe is one TOML file that states only what it changes; any key can be set on the command line too, as",
        "`--set convergence.lr=1e-4`. `fastconv recipe explain KEY` prints one of them, `fastconv recipe show RECIPE` a recipe",
        "with every default. An editor with a TOML plug-in completes and checks keys where the first line of the file is",
        "`#:schema FILE`, with the file that `fastconv recipe schema --path` names (shipped recipes have that line).",
    ]  # fmt: skip
    table = None
    for one in recipe_keys():
        section, _, name = one.key.rpartition(".")
        if section != table:
            table = section
            about = " ".join(_settings_class(section).__doc__.split()) if section else "The recipe itself."
            lines += ["", f"## {f'[{section}]' if section else 'Top of the file'}", "", about, ""]
            lines += ["| key | what it is | takes | default | example |", "|---|---|---|---|---|"]
        cells = (
            f"`{name}`",
            one.about,
            one.takes,
            *(f"`{text}`" if text else "" for text in (one.default, one.example)),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A JSON value as TOML; None, which TOML has not, as an empty text."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{k if k.replace('.', '').isidentifier() and '.' not in k else json.dumps(k)} = {toml_value(v)}"
                          for k, v in value.items())  # fmt: skip
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(toml_value, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _settings_class(section: str) -> Any:
    table: Any = Recipe
    for step in section.split("."):
        table = _table_of(table.model_fields[step].annotation) if step in table.model_fields else table
    return table


def _table_of(annotation: Any) -> Any:
    """The table that a key is, or that its values are where it is a table by name; None for any other key."""
    return next((one for one in (annotation, *get_args(annotation)) if hasattr(one, "model_fields")), None)


def _keys_of(schema: Mapping[str, Any], defs: Mapping[str, Any], defaults: RecipeTable, at: str) -> Iterator[RecipeKey]:
    """The settings of one table, then those of the tables in it."""
    tables = []
    for name, part in schema["properties"].items():
        target = defs.get(part.get("$ref", "").rpartition("/")[2])
        if target is not None and "properties" in target:
            tables.append((name, target))
            continue
        has_default = "default" in part
        default = getattr(defaults, name) if has_default else None
        inner = next(iter(part.get("patternProperties", {}).values()), {})
        by_name = defs.get(str(inner.get("$ref", "")).rpartition("/")[2], {})
        if "properties" in by_name:
            tables.append((f"{name}.name", by_name))
        yield RecipeKey(
            f"{at}{name}", part["description"], _takes(part) + ("" if has_default else " (required)"), part.get("unit", ""),
            toml_value(default), toml_value(part["examples"][0]),
        )  # fmt: skip
    for name, target in tables:
        field, _, named = name.partition(".")
        own = getattr(defaults, field)
        if named:
            own = _table_of(type(defaults).model_fields[field].annotation).model_construct()
        yield from _keys_of(target, defs, own, f"{at}{name}.")


def _takes(part: Mapping[str, Any]) -> str:
    """What a key takes, in words: kind, choices, bounds and unit."""
    unit = f" ({part['unit']})" if part.get("unit") else ""
    if "anyOf" in part:
        return " or ".join("unset" if one.get("type") == "null" else _takes(one) for one in part["anyOf"]) + unit
    if choices := part.get("enum") or ([part["const"]] if "const" in part else []):
        return " or ".join(f"`{choice}`" if choice else "empty" for choice in choices)
    kind = part.get("type", "anything")
    if kind == "array":
        return f"list of: {' and '.join(map(_takes, part.get('prefixItems') or [part['items']]))}{unit}"
    if kind == "object":
        inner = part.get("additionalProperties") or next(iter(part.get("patternProperties", {"": {}}).values()))
        return f"table of: {_takes(inner) if isinstance(inner, Mapping) else 'anything'}{unit}"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true` or `false`"}
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    said = ", ".join(f"{word} {part[bound]:g}" for bound, word in bounds.items() if bound in part)
    return f"{'day' if part.get('format') == 'date' else words.get(kind, kind)} {said}".rstrip() + unit
