"""Rubrics: the judge's instructions, the JSON schema of its reply, the strict parsing of replies, and the scores made of them.

Below the rubric: scores of a stage from its judgements, and the agreement of two ways of scoring the same samples.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fastconv.datasets.files import assets, read_jsonl, read_toml
from fastconv.datasets.spec import PhraseRule
from fastconv.errors import DataError, JudgeError, RecipeError, did_you_mean
from fastconv.judge.http import safe_value
from fastconv.recipe import JudgeSettings, file_bytes, toml_table
from fastconv.stats.units import scale_maximum
from fastconv.store.io import damaged
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Sample, Score

#: Why a judgement has no value. A reason accompanies a NULL and never a number.
REASONS = ("malformed", "out of range", "truncated", "judge refused", "expired", "errored")


@dataclass(frozen=True)
class Option:
    """A label with its value, or an anchor of a scale: a grade and its meaning."""

    name: str
    value: float
    meaning: str


@dataclass(frozen=True)
class Measure:
    """One number of a judgement: an integer within `scale` (low, high), or the value of one of `options`.

    `field` is its key in the reply's JSON object.
    """

    name: str
    field: str
    scale: tuple[int, int] | None
    options: tuple[Option, ...]

    @property
    def labels(self) -> dict[str, float]:
        """Values by label; empty for a scale."""
        return {} if self.scale else {option.name: option.value for option in self.options}

    def value(self, raw: object) -> float | str:
        """The value of a reply's field, or the reason why it has none."""
        if self.scale is None:
            return self.labels[raw] if isinstance(raw, str) and raw in self.labels else "malformed"
        if not isinstance(raw, int) or isinstance(raw, bool):
            return "malformed"
        low, high = self.scale
        return float(raw) if low <= raw <= high else "out of range"


@dataclass(frozen=True)
class Positive:
    """What counts as positive for rates and kappa: some labels, or values of a scale below a bound."""

    measure: str
    labels: tuple[str, ...] = ()
    below: float | None = None

    def holds(self, answer: Mapping[str, Any], values: Mapping[str, float], field: str) -> bool:
        """Whether a judgement is positive."""
        if self.below is not None:
            return values[self.measure] < self.below
        return answer[field] in self.labels


@dataclass(frozen=True)
class ParsedReply:
    """A parsed reply: `values` by measure and the whole JSON `answer`, or both empty and a `reason`."""

    values: Mapping[str, float]
    answer: Mapping[str, Any]
    reason: str | None = None


@dataclass(frozen=True)
class Rubric:
    """A rubric, as read from its TOML file."""

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
    #: The whole rubric as JSON text, stored in the ledger with its judgements.
    source: str

    @cached_property
    def sha256(self) -> str:
        """sha256 (hex) of `source`; identifies the rubric in every judgement's key."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def unit(self) -> Literal["share", "points"]:
        """Unit of the primary measure: a share of 1 (labels), or points (a scale)."""
        return "points" if self.measure(self.primary).scale else "share"

    def measure(self, name: str) -> Measure:
        """The measure of this name."""
        return next(measure for measure in self.measures if measure.name == name)

    def read(self, text: str, stop_reason: str = "end_turn") -> ParsedReply:
        """Parse a reply: exactly one JSON object with exactly the rubric's fields.

        A repeated key, a second object, text around it or another field make it malformed, so that judged text which
        the judge echoes is never parsed as its verdict.
        """
        if stop_reason == "refusal":
            return _unread("judge refused")
        if stop_reason in ("max_tokens", "model_context_window_exceeded"):
            return _unread("truncated")
        try:
            answer = json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constants, parse_float=_finite)
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
        # Escapes in the text can spell what the text itself no longer holds: half an emoji, a zero byte.
        return ParsedReply(values, safe_value(answer))

    def is_positive(self, values: Mapping[str, float], answer: Mapping[str, Any]) -> bool:
        """Whether a judgement counts as positive."""
        return self.positive.holds(answer, values, self.measure(self.positive.measure).field)

    def category(self, values: Mapping[str, float], answer: Mapping[str, Any]) -> str:
        """A judgement's category: its label, or for a scale the side of the bound that its value lies on."""
        primary = self.measure(self.primary)
        return self.band(values[self.primary]) if primary.scale else str(answer[primary.field])

    def band(self, value: float) -> str:
        """The side of the positives' bound that a value of the scale lies on, as text."""
        bound = self.positive.below or 0.0
        return f"under {bound:g}" if value < bound else f"{bound:g} and over"


def load_rubric(path: Path) -> Rubric:
    """Read a rubric file (TOML). Raises DataError with the file and the fault."""
    try:
        table = toml_table(file_bytes(path).decode())
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror}", where=str(path), fix="check judge.rubrics in the recipe"
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"not valid TOML: {error}", where=str(path), fix="mend the syntax there") from None
    try:
        return parse_rubric(table, where=str(path))
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        what = f"a part of the rubric is not of its kind: {error}"
        raise DataError(what, where=str(path), fix="see data/rubrics for a whole one") from None


def parse_rubric(table: Mapping[str, Any], *, where: str) -> Rubric:
    """Make a rubric from its TOML table. Raises DataError if a part is missing or parts contradict one another."""
    missing = [
        name
        for name in ("name", "version", "about", "primary", "system", "ask", "re_ask", "measures", "schema", "positive")
        if name not in table
    ]
    if missing:
        raise DataError(f"the rubric lacks {', '.join(missing)}", where=where, fix="see data/rubrics for a whole one")
    for name in ("name", "about", "primary", "system", "ask", "re_ask"):
        if not isinstance(table[name], str):
            raise TypeError(f"{name} is no text")
    measures = tuple(_measure(name, part, where) for name, part in table["measures"].items())
    positive = Positive(
        table["positive"].get("measure", table["primary"]),
        tuple(table["positive"].get("labels", ())),
        table["positive"].get("below"),
    )
    # Not canonical_json: dates and other TOML types must fail here, and the order of the anchors counts.
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
    """Raise DataError unless schema, measures and positives refer to one another consistently."""
    properties = rubric.schema.get("properties", {})
    names = {measure.name for measure in rubric.measures}
    faults = [f"schema.required does not name {name!r}" for name in properties if name not in rubric.schema["required"]]
    faults += [f"the schema has no field {m.field!r}" for m in rubric.measures if m.field not in properties]
    faults += [
        f"no measure is called {name!r}" for name in (rubric.primary, rubric.positive.measure) if name not in names
    ]
    known = ("string", "integer", "number", "boolean")
    faults += [f"the schema's {name!r} has no type" for name, part in properties.items() if part["type"] not in known]
    for measure in rubric.measures:
        values = [option.value for option in measure.options]
        texts = [part for option in measure.options for part in (option.name, option.meaning)]
        if not all(map(math.isfinite, values)) or not all(isinstance(text, str) for text in (measure.field, *texts)):
            faults.append(f"{measure.name!r} has values that are no numbers, or texts that are none")
        low, high = measure.scale or (-math.inf, math.inf)
        if not low < high or not all(low <= value <= high for value in values):
            faults.append(f"the scale of {measure.name!r} has no length, or not all of its anchors")
        top, counted = scale_maximum("points" if measure.scale else "share"), measure.scale or values
        if measure.name == rubric.primary and not all(0 <= value <= top for value in counted):
            faults.append(f"{measure.name!r}, which is measured, does not lie within 0 to {top:g}")
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
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
    return isinstance(value, kinds.get(kind, object)) and (kind == "boolean" or not isinstance(value, bool))


def _no_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is no number that is kept")
    return value


def _no_constants(name: str) -> float:
    raise ValueError(f"{name} is no number")


def shipped_rubrics() -> dict[str, Path]:
    """Paths of the shipped rubric files by name."""
    return {path.stem: path for path in sorted((assets("data") / "rubrics").glob("*.toml"))}


def find_rubric(settings: JudgeSettings, name: str) -> Rubric:
    """Load a rubric by name: the file in `judge.rubrics` if there is one, else the shipped one. Raises RecipeError, DataError."""
    shipped = shipped_rubrics()
    if name in settings.rubrics:
        return load_rubric(Path(settings.rubrics[name]))
    if name not in shipped:
        raise RecipeError(
            f"no rubric is called {name!r}",
            where="judge.rubrics",
            fix=did_you_mean(
                name, shipped, f'give its file there: judge.rubrics.{name} = "..."; shipped are {", ".join(shipped)}'
            ),
        )
    return load_rubric(shipped[name])


# --- scores ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Agreement of two ways of scoring the same samples; `n` were scored by both, `n_unpaired` by one only.

    `accuracy` is the share of equal categories, `kappa` Cohen's kappa (NaN if both give one constant category),
    `confusion[first, second]` the counts, `mean_difference` second minus first, `correlation` Pearson's (NaN without
    spread).
    """

    n: int
    n_unpaired: int
    accuracy: float
    kappa: float
    confusion: dict[tuple[str, str], int]
    mean_difference: float
    correlation: float


def judge_stage_scores(
    ledger: JudgeLedger, rubric: Rubric, samples: Sequence[Sample], keys: Sequence[str]
) -> list[Score]:
    """Scores of a stage from its judgements: one per sample, with the rubric's primary measure as metric.

    `keys` are the judgement keys in the samples' order. `detail` holds the other measures and the label. A judgement
    without values becomes a score without a value, with its reason. Raises JudgeError while judgements are missing.
    """
    judgements = ledger.judgements(keys)
    if n_missing := len(samples) - sum(key in judgements for key in keys):
        raise JudgeError(
            f"{n_missing} of {len(samples)} judgements are not made yet", where=rubric.name, fix="run `fastconv judge`"
        )
    scores = []
    for sample, judgement in zip(samples, [judgements[key] for key in keys], strict=True):
        detail = {"judgement": judgement.key, "model": judgement.model, "rubric": rubric.sha256}
        if judgement.values is None:
            scores.append(Score(sample.row, sample.sample, rubric.primary, None, judgement.reason, detail))
            continue
        if rubric.primary not in judgement.values:
            raise damaged(f"judgement {judgement.key[:12]} gives no {rubric.primary}")
        label = judgement.answer.get(rubric.measure(rubric.primary).field)
        detail |= {name: value for name, value in judgement.values.items() if name != rubric.primary}
        detail |= {"label": label} if isinstance(label, str) else {}
        scores.append(Score(sample.row, sample.sample, rubric.primary, judgement.values[rubric.primary], None, detail))
    return scores


def compare_scores(first: Sequence[Score], second: Sequence[Score], *, cut: float = 0.5) -> Agreement:
    """Agreement of two lists of scores, paired by row and sample (judge and phrases, or two rubrics).

    Categories are "over" (value at least `cut`: 0.5 for rates, 50 for alignment points) and "under".
    """
    first_values = {(score.row, score.sample): score.value for score in first if score.value is not None}
    second_values = {(score.row, score.sample): score.value for score in second if score.value is not None}
    both = sorted(first_values.keys() & second_values.keys())
    pairs = [(first_values[sample], second_values[sample]) for sample in both]
    categories = agreement([_side(a, cut) for a, _ in pairs], [_side(b, cut) for _, b in pairs])
    n_unpaired = len(first_values.keys() | second_values.keys()) - len(both)
    difference = sum(b - a for a, b in pairs) / len(pairs) if pairs else math.nan
    return Agreement(
        categories.n, n_unpaired, categories.accuracy, categories.kappa, categories.confusion, difference,
        correlation([a for a, _ in pairs], [b for _, b in pairs]),
    )  # fmt: skip


def agreement(first: Sequence[str], second: Sequence[str]) -> Agreement:
    """Accuracy, Cohen's kappa and confusion of two lists of categories for the same items; the other fields are NaN or 0."""
    n = len(first)
    confusion = dict(Counter(zip(first, second, strict=True)))
    if n == 0:
        return Agreement(0, 0, math.nan, math.nan, {}, math.nan, math.nan)
    accuracy = sum(count for (a, b), count in confusion.items() if a == b) / n
    n_first, n_second = Counter(first), Counter(second)
    by_chance = sum(n_first[name] * n_second[name] for name in n_first) / n**2
    kappa = (accuracy - by_chance) / (1 - by_chance) if by_chance < 1 else math.nan
    return Agreement(n, 0, accuracy, kappa, confusion, math.nan, math.nan)


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pearson's correlation; NaN with fewer than two pairs or without spread."""
    if len(xs) < 2:
        return math.nan
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    sxx = sum((x - mean_x) ** 2 for x in xs)
    syy = sum((y - mean_y) ** 2 for y in ys)
    sxy = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return sxy / math.sqrt(sxx * syy) if sxx > 0 and syy > 0 else math.nan


def _side(value: float, cut: float) -> str:
    return "over" if value >= cut else "under"


# --- shipped phrase rules against answers labelled by hand --------------------------------------------------

#: Answers in many voices, each labelled by hand with whether a rule should count it.
LABELLED = "labelled_phrases.jsonl"


@dataclass(frozen=True)
class RuleFigures:
    """How a shipped rule does on one part (`tuned`, `held_out`) of the labelled answers.

    `n_hits` are the answers that the rule counts, `n_true` those that are labelled so, `n_both` both at once.
    """

    rule: str
    part: str
    n: int
    n_hits: int
    n_true: int
    n_both: int

    @property
    def precision(self) -> float:
        """Share of the counted answers that are labelled so; NaN without any."""
        return self.n_both / self.n_hits if self.n_hits else math.nan

    @property
    def recall(self) -> float:
        """Share of the answers labelled so that are counted; NaN without any."""
        return self.n_both / self.n_true if self.n_true else math.nan


def figures_of_rule(one: RuleFigures) -> tuple[str, str, str, str, str]:
    """Rule, part, size, precision and recall as printed."""

    def share(value: float, of: int) -> str:
        return "none" if math.isnan(value) else f"{100 * value:.0f} % ({one.n_both} of {of})"

    part = {"tuned": "tuned on", "held_out": "held out"}.get(one.part, one.part)
    return one.rule, part, f"{one.n}", share(one.precision, one.n_hits), share(one.recall, one.n_true)


def labelled_figures(name: str) -> list[RuleFigures]:
    """Figures of the shipped rule of this name, part by part; empty for a rule without labelled answers."""
    rule = PhraseRule.of(read_toml(assets("data") / "phrases.toml")[name], name)
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    for row in read_jsonl(
        assets("data") / LABELLED, {"id": str, "part": str, "rule": str, "answer": str, "counts": bool}
    ):
        if row["rule"] == name:
            pairs.setdefault(row["part"], []).append((rule.match(row["answer"]) is not None, row["counts"]))
    return [
        RuleFigures(
            name, part, len(seen), sum(hit for hit, _ in seen), sum(true for _, true in seen), seen.count((True, True))
        )
        for part, seen in sorted(pairs.items(), reverse=True)
    ]
