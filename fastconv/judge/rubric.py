"""Rubrics: what a judge is told, the form of its answer, and the strict reading of what it sent back."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fastconv.datasets.files import assets
from fastconv.errors import DataError, RecipeError
from fastconv.recipe import JudgeSettings

#: Why a judgement has no value. A reason stands beside a NULL and never beside a number.
REASONS = ("malformed", "out of range", "truncated", "judge refused", "expired", "errored")


@dataclass(frozen=True)
class Option:
    """A label with the value it counts as, or (for a scale) an anchor: a grade and what it stands for."""

    name: str
    value: float
    meaning: str


@dataclass(frozen=True)
class Measure:
    """One number of a judgement: a whole number between `low` and `high`, or the value of one of `options`."""

    name: str
    field: str
    scale: tuple[int, int] | None
    options: tuple[Option, ...]

    @property
    def labels(self) -> dict[str, float]:
        """Value by label; empty for a scale."""
        return {} if self.scale else {option.name: option.value for option in self.options}

    def value(self, raw: object) -> float | str:
        """The value of an answer's field, or the reason why it is none."""
        if self.scale is None:
            return self.labels[raw] if isinstance(raw, str) and raw in self.labels else "malformed"
        if not isinstance(raw, int) or isinstance(raw, bool):
            return "malformed"
        low, high = self.scale
        return float(raw) if low <= raw <= high else "out of range"


@dataclass(frozen=True)
class Positive:
    """What counts as a positive of the primary measure, for rates and kappa: given labels, or values under a bound."""

    measure: str
    labels: tuple[str, ...] = ()
    below: float | None = None

    def holds(self, answer: Mapping[str, Any], values: Mapping[str, float], field: str) -> bool:
        """Whether a judgement is a positive."""
        if self.below is not None:
            return values[self.measure] < self.below
        return answer[field] in self.labels


@dataclass(frozen=True)
class ParsedReply:
    """A reply as the rubric reads it: `values` by measure and the whole `answer`, or a reason and neither."""

    values: Mapping[str, float]
    answer: Mapping[str, Any]
    reason: str | None = None


@dataclass(frozen=True)
class Rubric:
    """One rubric file."""

    name: str
    version: int
    about: str
    system: str
    ask: str
    re_ask: str
    schema: Mapping[str, Any]
    measures: tuple[Measure, ...]
    primary: str
    positive: Positive
    #: The whole rubric as canonical text, kept in the ledger beside its judgements.
    source: str

    @cached_property
    def sha256(self) -> str:
        """Identity of the rubric, part of every judgement's key."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def unit(self) -> Literal["share", "points"]:
        """What the primary measure counts in: shares of 1 (labels), or points (a scale)."""
        return "points" if self.measure(self.primary).scale else "share"

    def measure(self, name: str) -> Measure:
        """A measure by name."""
        return next(measure for measure in self.measures if measure.name == name)

    def read(self, text: str, stop_reason: str = "end_turn") -> ParsedReply:
        """Read a reply: exactly one JSON object with exactly the rubric's fields. Nothing is guessed.

        A repeated key, a second object, prose around it or a further field make it malformed, so text that a judge
        echoes can never become the field that is read.
        """
        if stop_reason == "refusal":
            return _unread("judge refused")
        if stop_reason in ("max_tokens", "model_context_window_exceeded"):
            return _unread("truncated")
        try:
            answer = json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constants)
        except (ValueError, RecursionError):
            return _unread("malformed")
        if not isinstance(answer, dict) or set(answer) != set(self.schema["required"]):
            return _unread("malformed")
        if any(not _typed(answer[name], part["type"]) for name, part in self.schema["properties"].items()):
            return _unread("malformed")
        values: dict[str, float] = {}
        for measure in self.measures:
            value = measure.value(answer[measure.field])
            if isinstance(value, str):
                return _unread(value)
            values[measure.name] = value
        return ParsedReply(values, answer)

    def is_positive(self, values: Mapping[str, float], answer: Mapping[str, Any]) -> bool:
        """Whether a judgement counts as a positive of the primary measure."""
        return self.positive.holds(answer, values, self.measure(self.positive.measure).field)

    def category(self, values: Mapping[str, float], answer: Mapping[str, Any]) -> str:
        """What a judgement says: its label, or for a scale on which side of the bound its value lies."""
        primary = self.measure(self.primary)
        return self.band(values[self.primary]) if primary.scale else str(answer[primary.field])

    def band(self, value: float) -> str:
        """On which side of the bound of the positives a value of the scale lies."""
        bound = self.positive.below or 0.0
        return f"under {bound:g}" if value < bound else f"{bound:g} and over"


def load_rubric(path: Path) -> Rubric:
    """Read a rubric file. Raises DataError naming the file and what is wrong with it."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror}", where=str(path), fix="check judge.rubrics in the recipe"
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"not valid TOML: {error}", where=str(path), fix="mend the syntax there") from None
    return rubric_of(table, where=str(path))


def rubric_of(table: Mapping[str, Any], *, where: str) -> Rubric:
    """A rubric from its table. Raises DataError if a part is missing or the parts do not fit one another."""
    missing = [
        name
        for name in ("name", "version", "about", "primary", "system", "ask", "re_ask", "measures", "schema", "positive")
        if name not in table
    ]
    if missing:
        raise DataError(f"the rubric lacks {', '.join(missing)}", where=where, fix="see data/rubrics for a whole one")
    measures = tuple(_measure(name, part, where) for name, part in table["measures"].items())
    positive = Positive(
        table["positive"].get("measure", table["primary"]),
        tuple(table["positive"].get("labels", ())),
        table["positive"].get("below"),
    )
    # Not canonical_json: dates and other TOML kinds have no place in a rubric, and the order of the anchors counts.
    source = json.dumps(table, ensure_ascii=False, separators=(",", ":"))
    rubric = Rubric(
        table["name"], table["version"], table["about"], table["system"].strip(), table["ask"], table["re_ask"],
        table["schema"], measures, table["primary"], positive, source,
    )  # fmt: skip
    _check(rubric, where)
    return rubric


def _measure(name: str, table: Mapping[str, Any], where: str) -> Measure:
    field = table.get("field", name)
    if labels := table.get("labels"):
        return Measure(name, field, None, tuple(Option(o["name"], float(o["value"]), o["meaning"]) for o in labels))
    if "low" not in table or "high" not in table:
        raise DataError(f"measure {name!r} has neither labels nor low and high", where=where, fix="give it one of them")
    anchors = tuple(Option(str(o["at"]), float(o["at"]), o["meaning"]) for o in table.get("anchors", ()))
    return Measure(name, field, (int(table["low"]), int(table["high"])), anchors)


def _check(rubric: Rubric, where: str) -> None:
    """The parts of a rubric must name one another rightly, or its answers could be read in two ways."""
    properties = rubric.schema.get("properties", {})
    names = {measure.name for measure in rubric.measures}
    faults = [f"schema.required does not name {name!r}" for name in properties if name not in rubric.schema["required"]]
    faults += [f"the schema has no field {m.field!r}" for m in rubric.measures if m.field not in properties]
    faults += [
        f"no measure is called {name!r}" for name in (rubric.primary, rubric.positive.measure) if name not in names
    ]
    for measure in rubric.measures:
        listed = properties.get(measure.field, {}).get("enum")
        if measure.labels and listed is not None and list(measure.labels) != listed:
            faults.append(f"the labels of {measure.name!r} are not the enum of its field")
    if rubric.schema.get("additionalProperties") is not False:
        faults.append("schema.additionalProperties must be false")
    if faults:
        raise DataError(faults[0], where=where, fix="make the rubric's parts agree")


def _unread(reason: str) -> ParsedReply:
    return ParsedReply({}, {}, reason)


def _typed(value: object, kind: str) -> bool:
    kinds: dict[str, type] = {"string": str, "integer": int, "number": float, "boolean": bool}
    return isinstance(value, kinds.get(kind, object)) and (kind == "boolean" or not isinstance(value, bool))


def _no_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table


def _no_constants(name: str) -> float:
    raise ValueError(f"{name} is no number")


def shipped_rubrics() -> dict[str, Path]:
    """The shipped rubric files by name."""
    return {path.stem: path for path in sorted((assets("data") / "rubrics").glob("*.toml"))}


def rubric_named(settings: JudgeSettings, name: str) -> Rubric:
    """A rubric by name: the recipe's own file where it gives one, else the shipped one. Raises RecipeError, DataError."""
    shipped = shipped_rubrics()
    if name in settings.rubrics:
        return load_rubric(Path(settings.rubrics[name]))
    if name not in shipped:
        raise RecipeError(
            f"no rubric is called {name!r}",
            where="judge.rubrics",
            fix=f'give its file there: judge.rubrics.{name} = "..."; shipped are {", ".join(shipped)}',
        )
    return load_rubric(shipped[name])
