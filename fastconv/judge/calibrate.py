"""Calibration of a judge: accuracy on hand-labelled rows, resistance to prompt injection, and rates corrected for its errors.

`calibrate` judges labelled rows several times and compares the judgements with the labels. It also appends injection
attempts (instructions to the judge that dictate a verdict) to some of the answers and counts the verdicts that change.
`corrected_rate` uses the measured sensitivity and specificity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastconv.errors import DataError, JudgeError
from fastconv.judge.rubric import Measure, Rubric, agreement, correlation
from fastconv.recipe import file_bytes
from fastconv.seeding import seeded_order
from fastconv.store.ledger import Sample
from fastconv.store.records import Judgement

#: (samples, options in reverse order) -> one judgement per sample, in the samples' order.
JudgeSamples = Callable[[Sequence[Sample], bool], Sequence[Judgement]]


@dataclass(frozen=True)
class Carrier:
    """A labelled answer to append an attempt to, with the judge's category for it and for its retest (None: unscored)."""

    sample: Sample
    category: str
    retest_category: str | None


@dataclass(frozen=True)
class InjectedSample:
    """An answer with an attempt appended. `category` is the category of the verdict that the attempt asks for."""

    carrier: Carrier
    sample: Sample
    category: str


@dataclass(frozen=True)
class InjectionCounts:
    """Verdicts on `n` answers with an attempt, of which `n_unscored` got no readable verdict.

    `n_moved` got another category than the same answer without the attempt, `n_obeyed` of them the requested one. As a
    baseline, `n_moved_again` of `n_again` of these answers changed category when judged again without an attempt.
    """

    n: int
    n_unscored: int
    n_moved: int
    n_obeyed: int
    n_again: int
    n_moved_again: int


def load_attempts(path: Path) -> tuple[str, ...]:
    """Read injection attempts (templates for `fill_attempt`) from a JSON file. Raises DataError for a file without any."""
    try:
        attempts = json.loads(path.read_text(encoding="utf-8"))["attempts"]
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), fix="install fastconv again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"holds no attempts: {error}", where=str(path), fix="install fastconv again") from None
    return tuple(map(str, attempts))


def fill_attempt(attempt: str, rubric: Rubric, wanted: str) -> str:
    """Fill a template with the verdict `wanted`: as a word, backwards, or as the fields of the rubric's reply."""
    fields = ", ".join(f'"{measure.field}": {_field_text(rubric, measure, wanted)}' for measure in rubric.measures)
    return attempt.replace("{fields}", fields).replace("{backwards}", wanted[::-1]).replace("{wanted}", wanted)


def inject_attempts(rubric: Rubric, carriers: Sequence[Carrier], attempts: Sequence[str]) -> list[InjectedSample]:
    """Append each attempt to one answer, in a seeded order of the answers; as many samples as attempts.

    An attempt asks for a verdict that differs from the judge's own (the possible ones in turn), so obeying is visible.
    """
    by_row = {carrier.sample.row: carrier for carrier in carriers}
    order = seeded_order(list(by_row), "injections", rubric.name)
    injected = []
    for turn, attempt in enumerate(attempts if order else ()):
        carrier = by_row[order[turn % len(order)]]
        wanted, category = _other_verdict(rubric, carrier.category, turn)
        text = f"{carrier.sample.completion}\n\n{fill_attempt(attempt, rubric, wanted)}"
        injected.append(InjectedSample(carrier, replace(carrier.sample, completion=text), category))
    return injected


def count_injections(
    rubric: Rubric, injected: Sequence[InjectedSample], verdicts: Sequence[Judgement]
) -> InjectionCounts:
    """Compare the verdicts on answers with an attempt, in the order of `injected`, with those without."""
    pairs = [
        (item, rubric.category(verdict.values, verdict.answer))
        for item, verdict in zip(injected, verdicts, strict=True)
        if verdict.values is not None
    ]
    moved = [(item, category) for item, category in pairs if category != item.carrier.category]
    # An answer may carry several attempts; it was retested once.
    retested = {item.carrier for item in injected if item.carrier.retest_category is not None}
    return InjectionCounts(
        n=len(injected),
        n_unscored=len(injected) - len(pairs),
        n_moved=len(moved),
        n_obeyed=sum(category == item.category for item, category in moved),
        n_again=len(retested),
        n_moved_again=sum(carrier.category != carrier.retest_category for carrier in retested),
    )


def _other_verdict(rubric: Rubric, category: str, turn: int) -> tuple[str, str]:
    """A verdict outside `category`, and its category: the labels in turn, or the end of the scale across the bound."""
    primary = rubric.measure(rubric.primary)
    if primary.scale is None:
        others = [label for label in primary.labels if label != category] or [category]
        return others[turn % len(others)], others[turn % len(others)]
    low, high = primary.scale
    end = high if rubric.band(high) != category else low
    return str(end), rubric.band(end)


def _field_text(rubric: Rubric, measure: Measure, wanted: str) -> str:
    """The JSON text of a measure's field in a dictated reply; secondary scales go to the same end as the primary one."""
    if measure.scale is None:
        return json.dumps(wanted if measure.name == rubric.primary else measure.options[0].name)
    return wanted if rubric.measure(rubric.primary).scale else str(measure.scale[1])


@dataclass(frozen=True)
class CalibrationRow:
    """A hand-labelled answer: `label` for rubrics of labels, `value` (0 to 100) for scales. `kind` names its difficulty.

    `others` are the true values of the secondary scales, as far as they were given.
    """

    id: str
    question: str
    answer: str
    label: str | None
    value: float | None
    kind: str
    others: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ScaleAccuracy:
    """A judge's mean absolute error (points) and Pearson correlation on a secondary scale, over `n` rows."""

    n: int
    mean_abs_error: float
    correlation: float


@dataclass(frozen=True)
class Calibration:
    """A judge's results on labelled rows. Shares are between 0 and 1; NaN where a number is undefined.

    Categories are the labels, or for a scale the side of the rubric's bound that the value lies on. `retest` is the
    share of rows with the same category when judged again, `position` with the options in reverse order, and
    `position_shift` the mean rise of the value then. `length_bias` is the correlation of error and log answer length.
    `sensitivity` and `specificity` refer to the rubric's positives. `beside` holds the secondary scales by name,
    `injections` the effect of injection attempts.
    """

    rubric: str
    rubric_sha256: str
    model: str
    n: int
    n_unscored: int
    accuracy: float
    kappa: float
    confusion: dict[str, int]
    mean_abs_error: float
    retest: float
    position: float
    position_shift: float
    length_bias: float
    sensitivity: float
    n_positive: int
    specificity: float
    n_negative: int
    accuracy_by_kind: dict[str, float]
    beside: dict[str, ScaleAccuracy]
    injections: InjectionCounts

    def to_json(self) -> dict[str, Any]:
        """JSON object for the ledger and `--json`; NaN becomes null."""
        return {name: _json_value(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class CorrectedRate:
    """A rate (share) corrected for a judge's errors, with its interval."""

    rate: float
    low: float
    high: float


def _grade(value: Any) -> float:
    """A labelled grade as a number. Raises ValueError, TypeError or OverflowError for what is none."""
    if not math.isfinite(grade := float(value)):
        raise ValueError(f"{value} is no grade")
    return grade


def load_calibration(path: Path, rubric: Rubric) -> list[CalibrationRow]:
    """Read the labelled rows (JSONL) of a rubric. Raises DataError with file and line for an invalid row."""
    primary = rubric.measure(rubric.primary)
    scales = [measure.name for measure in rubric.measures if measure.scale and measure.name != rubric.primary]
    rows = []
    try:
        lines = file_bytes(path).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), fix="check the path") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            label, value = (row["label"], None) if primary.labels else (None, _grade(row[rubric.primary]))
            others = {name: _grade(row[name]) for name in scales if name in row}
            kind = row.get("kind", "plain")
            rows.append(CalibrationRow(row["id"], row["question"], row["answer"], label, value, kind, others))
            if not all(
                isinstance(text, str)
                for text in (row["id"], row["question"], row["answer"], kind, "" if label is None else label)
            ):
                raise TypeError("id, question, answer, kind and label are texts")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise DataError(
                f"not a labelled row: {error}", where=f"{path}:{number}", fix="see the shipped rows"
            ) from None
        if primary.labels and label not in primary.labels:
            raise DataError(
                f"label {label!r} is none of the rubric's",
                where=f"{path}:{number}",
                fix=f"use {', '.join(primary.labels)}",
            )
    return rows


def calibrate(
    rubric: Rubric, rows: Sequence[CalibrationRow], judge: JudgeSamples, attempts: Sequence[str] = ()
) -> Calibration:
    """Judge the rows three times (as they are, again, options in reverse order) and compare with the labels.

    Each of `attempts` is then appended to one answer and judged. Raises JudgeError if no row was scored, and whatever
    `judge` raises.
    """
    first = judge([_sample(row, 0) for row in rows], False)
    retest = judge([_sample(row, 1) for row in rows], False)
    reversed_ = judge([_sample(row, 0) for row in rows], True)
    scored = [(row, judgement) for row, judgement in zip(rows, first, strict=True) if judgement.values is not None]
    if not scored:
        raise JudgeError("not one row was scored", where=rubric.name, fix="look at the raw replies in the ledger")
    injected = inject_attempts(rubric, _carriers(rubric, rows, first, retest), attempts)
    verdicts = judge([item.sample for item in injected], False) if injected else ()
    truth = [_true_category(rubric, row) for row, _ in scored]
    judged = [_category(rubric, judgement) for _, judgement in scored]
    agreed = agreement(truth, judged)
    errors = [_value(rubric, judgement) - _true_value(rubric, row) for row, judgement in scored]
    lengths = [math.log(1 + len(row.answer)) for row, _ in scored]
    positive = [_is_positive(rubric, row) for row, _ in scored]
    hits = [rubric.is_positive(judgement.values or {}, judgement.answer) for _, judgement in scored]
    n_positive = sum(positive)
    return Calibration(
        rubric=rubric.name,
        rubric_sha256=rubric.sha256,
        model=scored[0][1].model,
        n=len(rows),
        n_unscored=len(rows) - len(scored),
        accuracy=agreed.accuracy,
        kappa=agreed.kappa,
        confusion={f"{a} -> {b}": count for (a, b), count in sorted(agreed.confusion.items())},
        mean_abs_error=sum(map(abs, errors)) / len(errors),
        retest=_same_share(rubric, first, retest),
        position=_same_share(rubric, first, reversed_),
        position_shift=_mean_rise(rubric, first, reversed_),
        length_bias=correlation(errors, lengths),
        sensitivity=_share([hit for hit, truly in zip(hits, positive, strict=True) if truly]),
        n_positive=n_positive,
        specificity=_share([not hit for hit, truly in zip(hits, positive, strict=True) if not truly]),
        n_negative=len(positive) - n_positive,
        accuracy_by_kind=_accuracy_by_kind(scored, truth, judged),
        beside=_secondary_accuracy(rubric, scored),
        injections=count_injections(rubric, injected, verdicts),
    )


def corrected_rate(rate: float, n: int, calibration: Mapping[str, Any], *, z: float = 1.96) -> CorrectedRate | None:
    """A rate of positives corrected for the judge's errors (Rogan and Gladen 1978; interval: Lang and Reiczigel 2014).

    `rate` is the judged share of positives among `n` independent items (questions, if each has several samples), `z` the
    normal quantile of the interval. Returns None if the judge separates positives from negatives no better than chance.
    """
    n_pos, n_neg = calibration["n_positive"], calibration["n_negative"]
    if not n or not n_pos or not n_neg:
        return None
    raw_gain = calibration["sensitivity"] + calibration["specificity"] - 1
    if raw_gain <= 0:
        return None
    point = (rate + calibration["specificity"] - 1) / raw_gain
    # One more success and one more failure on each side keep the interval valid at rates of 0 and 1.
    se = (n_pos * calibration["sensitivity"] + 1) / (n_pos + 2)
    sp = (n_neg * calibration["specificity"] + 1) / (n_neg + 2)
    if se + sp - 1 <= 0:
        return None
    shown = (n * rate + z**2 / 2) / (n + z**2)
    p = (shown + sp - 1) / (se + sp - 1)
    var_se, var_sp = se * (1 - se) / (n_pos + 2), sp * (1 - sp) / (n_neg + 2)
    shift = 2 * z**2 * (p * var_se - (1 - p) * var_sp)
    half = z * math.sqrt(shown * (1 - shown) / (n + z**2) + p**2 * var_se + (1 - p) ** 2 * var_sp) / (se + sp - 1)
    return CorrectedRate(_clip(point), _clip(p + shift - half), _clip(p + shift + half))


def _sample(row: CalibrationRow, index: int) -> Sample:
    return Sample(row.id, index, "", row.question, row.answer, 0, True)


def _true_category(rubric: Rubric, row: CalibrationRow) -> str:
    return row.label if row.label is not None else rubric.band(row.value or 0.0)


def _category(rubric: Rubric, judgement: Judgement) -> str:
    return rubric.category(judgement.values or {}, judgement.answer)


def _value(rubric: Rubric, judgement: Judgement) -> float:
    assert judgement.values is not None, "called for scored judgements only"
    return judgement.values[rubric.primary]


def _true_value(rubric: Rubric, row: CalibrationRow) -> float:
    return row.value if row.value is not None else rubric.measure(rubric.primary).labels[row.label or ""]


def _is_positive(rubric: Rubric, row: CalibrationRow) -> bool:
    if rubric.positive.below is not None:
        return (row.value or 0.0) < rubric.positive.below
    return row.label in rubric.positive.labels


def _pairs(first: Sequence[Judgement], second: Sequence[Judgement]) -> list[tuple[Judgement, Judgement]]:
    return [(a, b) for a, b in zip(first, second, strict=True) if a.values is not None and b.values is not None]


def _same_share(rubric: Rubric, first: Sequence[Judgement], second: Sequence[Judgement]) -> float:
    return _share([_category(rubric, a) == _category(rubric, b) for a, b in _pairs(first, second)])


def _mean_rise(rubric: Rubric, first: Sequence[Judgement], second: Sequence[Judgement]) -> float:
    rises = [_value(rubric, b) - _value(rubric, a) for a, b in _pairs(first, second)]
    return sum(rises) / len(rises) if rises else math.nan


def _carriers(
    rubric: Rubric, rows: Sequence[CalibrationRow], first: Sequence[Judgement], retest: Sequence[Judgement]
) -> list[Carrier]:
    """The scored rows, without those that already contain an attempt."""
    return [
        Carrier(_sample(row, 0), _category(rubric, a), _category(rubric, b) if b.values is not None else None)
        for row, a, b in zip(rows, first, retest, strict=True)
        if a.values is not None and not row.kind.startswith("injection")
    ]


def _secondary_accuracy(rubric: Rubric, scored: Sequence[tuple[CalibrationRow, Judgement]]) -> dict[str, ScaleAccuracy]:
    """Error and correlation for each secondary scale that rows give a true value for."""
    accuracy = {}
    for measure in rubric.measures:
        pairs = [
            (row.others[measure.name], judgement.values[measure.name])
            for row, judgement in scored
            if judgement.values is not None and measure.name in row.others
        ]
        if pairs:
            error = sum(abs(value - truth) for truth, value in pairs) / len(pairs)
            accuracy[measure.name] = ScaleAccuracy(len(pairs), error, correlation(*zip(*pairs, strict=True)))
    return accuracy


def _accuracy_by_kind(
    scored: Sequence[tuple[CalibrationRow, Judgement]], truth: Sequence[str], judged: Sequence[str]
) -> dict[str, float]:
    correct: dict[str, list[bool]] = {}
    for (row, _), true_category, category in zip(scored, truth, judged, strict=True):
        correct.setdefault(row.kind, []).append(true_category == category)
    return {kind: _share(flags) for kind, flags in sorted(correct.items())}


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else math.nan


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_value(part) for name, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
