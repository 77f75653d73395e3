"""How good a judge is: its verdicts on rows labelled by hand, and rates corrected for its mistakes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastconv.errors import DataError, JudgeError
from fastconv.judge.rubric import Measure, Rubric
from fastconv.judge.scores import agreement, correlation
from fastconv.seeding import seeded_order
from fastconv.store.ledger import Sample
from fastconv.store.records import Judgement


@dataclass(frozen=True)
class Carrier:
    """A labelled answer that can carry an attempt: the judge's category without one, and when asked that again."""

    sample: Sample
    said: str
    again: str | None


@dataclass(frozen=True)
class Attempted:
    """An answer with an attempt at its end. `category` is where the verdict that it asks for lies."""

    carrier: Carrier
    sample: Sample
    category: str


@dataclass(frozen=True)
class Injections:
    """What became of the verdicts. `n` answers with an attempt, of which `n_unscored` got no readable verdict.

    `n_moved` have another category than the same answer without the attempt, `n_obeyed` of them the one asked for.
    Of the same answers asked again without an attempt, `n_moved_again` of `n_again` moved: the judge's own unrest.
    """

    n: int
    n_unscored: int
    n_moved: int
    n_obeyed: int
    n_again: int
    n_moved_again: int


def load_attempts(path: Path) -> tuple[str, ...]:
    """Attempts as templates, see `filled`. Raises DataError for a file that holds none."""
    try:
        attempts = json.loads(path.read_text(encoding="utf-8"))["attempts"]
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), fix="install fastconv again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"holds no attempts: {error}", where=str(path), fix="install fastconv again") from None
    return tuple(map(str, attempts))


def filled(attempt: str, rubric: Rubric, wanted: str) -> str:
    """An attempt that asks for the verdict `wanted`: as a word, backwards, or as the fields of the rubric's answer."""
    fields = ", ".join(f'"{measure.field}": {_field(rubric, measure, wanted)}' for measure in rubric.measures)
    return attempt.replace("{fields}", fields).replace("{backwards}", wanted[::-1]).replace("{wanted}", wanted)


def attempted(rubric: Rubric, carriers: Sequence[Carrier], attempts: Sequence[str]) -> list[Attempted]:
    """Each attempt once, on answers in a drawn order, so there are never more requests than attempts.

    It asks for another verdict than the judge's own, in turn for each that there is: obeying always shows.
    """
    by_row = {carrier.sample.row: carrier for carrier in carriers}
    order = seeded_order(list(by_row), "injections", rubric.name)
    made = []
    for turn, attempt in enumerate(attempts if order else ()):
        carrier = by_row[order[turn % len(order)]]
        wanted, category = _wanted(rubric, carrier.said, turn)
        text = f"{carrier.sample.completion}\n\n{filled(attempt, rubric, wanted)}"
        made.append(Attempted(carrier, replace(carrier.sample, completion=text), category))
    return made


def counted(rubric: Rubric, tried: Sequence[Attempted], verdicts: Sequence[Judgement]) -> Injections:
    """The verdicts on answers with an attempt against those without."""
    pairs = [
        (one, rubric.category(verdict.values, verdict.answer))
        for one, verdict in zip(tried, verdicts, strict=True)
        if verdict.values is not None
    ]
    moved = [(one, said) for one, said in pairs if said != one.carrier.said]
    # An answer may carry several attempts; it was asked again once.
    again = {one.carrier for one in tried if one.carrier.again is not None}
    return Injections(
        n=len(tried),
        n_unscored=len(tried) - len(pairs),
        n_moved=len(moved),
        n_obeyed=sum(said == one.category for one, said in moved),
        n_again=len(again),
        n_moved_again=sum(carrier.said != carrier.again for carrier in again),
    )


def _wanted(rubric: Rubric, said: str, turn: int) -> tuple[str, str]:
    """Another verdict than `said` and its category: a label in turn, or the end of the scale across the bound."""
    primary = rubric.measure(rubric.primary)
    if primary.scale is None:
        others = [label for label in primary.labels if label != said] or [said]
        return others[turn % len(others)], others[turn % len(others)]
    low, high = primary.scale
    end = high if rubric.band(high) != said else low
    return str(end), rubric.band(end)


def _field(rubric: Rubric, measure: Measure, wanted: str) -> str:
    """The measure's field in a dictated answer; a scale beside the primary one goes to the same end."""
    if measure.scale is None:
        return json.dumps(wanted if measure.name == rubric.primary else measure.options[0].name)
    return wanted if rubric.measure(rubric.primary).scale else str(measure.scale[1])


#: (samples, options in the other order) -> a judgement for each sample, in their order.
JudgeSamples = Callable[[Sequence[Sample], bool], Sequence[Judgement]]


@dataclass(frozen=True)
class CalibrationRow:
    """A labelled answer. `label` for rubrics of labels, `value` (0 to 100) for scales; `kind` says what is hard.

    `others` are the true values of scales beside the primary measure, where they were given.
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
    """How a judge did on a scale beside the primary measure, on `n` rows."""

    n: int
    mean_abs_error: float
    correlation: float


@dataclass(frozen=True)
class Calibration:
    """How a judge did on labelled rows. Shares lie between 0 and 1; NaN where nothing can be said.

    `categories`: the labels, or for a scale on which side of the rubric's bound the value lies. `retest` is the share
    of rows with the same category when asked again, `position` when the options stand in the other order;
    `position_shift` is by how much the value rises then. `length_bias` correlates error and log length of the answer.
    `sensitivity` and `specificity` are of the rubric's positives. `beside` holds the other labelled scales by name,
    `injections` what attempts to dictate the verdict did to it.
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
    injections: Injections

    def to_json(self) -> dict[str, Any]:
        """For the ledger and `--json`; NaN becomes null."""
        return {name: _plain(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Corrected:
    """A rate corrected for a judge's mistakes, with its interval."""

    rate: float
    low: float
    high: float


def load_calibration(path: Path, rubric: Rubric) -> list[CalibrationRow]:
    """Labelled rows of a rubric. Raises DataError naming file and line for a row that cannot be one."""
    primary = rubric.measure(rubric.primary)
    scales = [measure.name for measure in rubric.measures if measure.scale and measure.name != rubric.primary]
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), fix="check the path") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            label, value = (row["label"], None) if primary.labels else (None, float(row[rubric.primary]))
            others = {name: float(row[name]) for name in scales if name in row}
            kind = row.get("kind", "plain")
            rows.append(CalibrationRow(row["id"], row["question"], row["answer"], label, value, kind, others))
        except (ValueError, KeyError, TypeError) as error:
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
    """Judge the rows three times (as they are, again, options in the other order) and compare with the labels.

    Then once for each of `attempts`, put at the end of one of the answers. Raises JudgeError if nothing was scored, and
    whatever `judge` raises.
    """
    first = judge([_sample(row, 0) for row in rows], False)
    again = judge([_sample(row, 1) for row in rows], False)
    turned = judge([_sample(row, 0) for row in rows], True)
    scored = [(row, one) for row, one in zip(rows, first, strict=True) if one.values is not None]
    if not scored:
        raise JudgeError("not one row was scored", where=rubric.name, fix="look at the raw replies in the ledger")
    tried = attempted(rubric, _carriers(rubric, rows, first, again), attempts)
    told = judge([one.sample for one in tried], False) if tried else ()
    truth = [_category(rubric, row) for row, _ in scored]
    said = [_said(rubric, one) for _, one in scored]
    agreed = agreement(truth, said)
    errors = [_value(rubric, one) - _true_value(rubric, row) for row, one in scored]
    lengths = [math.log(1 + len(row.answer)) for row, _ in scored]
    positive = [_is_positive(rubric, row) for row, _ in scored]
    hits = [rubric.is_positive(one.values or {}, one.answer) for _, one in scored]
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
        retest=_same(rubric, first, again),
        position=_same(rubric, first, turned),
        position_shift=_shift(rubric, first, turned),
        length_bias=correlation(errors, lengths),
        sensitivity=_share([hit for hit, is_one in zip(hits, positive, strict=True) if is_one]),
        n_positive=n_positive,
        specificity=_share([not hit for hit, is_one in zip(hits, positive, strict=True) if not is_one]),
        n_negative=len(positive) - n_positive,
        accuracy_by_kind=_by_kind(scored, truth, said),
        beside=_beside(rubric, scored),
        injections=counted(rubric, tried, told),
    )


def corrected_rate(rate: float, n: int, calibration: Mapping[str, Any], *, z: float = 1.96) -> Corrected | None:
    """The rate corrected for the judge's mistakes (Rogan and Gladen 1978), interval after Lang and Reiczigel (2014).

    `rate` of positives among `n` independent items (questions, where samples of one question stand together). Gives
    None when the judge tells positives from negatives no better than chance, as nothing can be corrected then.
    """
    n_pos, n_neg = calibration["n_positive"], calibration["n_negative"]
    if not n or not n_pos or not n_neg:
        return None
    raw_gain = calibration["sensitivity"] + calibration["specificity"] - 1
    if raw_gain <= 0:
        return None
    point = (rate + calibration["specificity"] - 1) / raw_gain
    # One success and one failure more on each side keep the interval honest at rates of 0 and 1.
    se = (n_pos * calibration["sensitivity"] + 1) / (n_pos + 2)
    sp = (n_neg * calibration["specificity"] + 1) / (n_neg + 2)
    if se + sp - 1 <= 0:
        return None
    shown = (n * rate + z**2 / 2) / (n + z**2)
    p = (shown + sp - 1) / (se + sp - 1)
    var_se, var_sp = se * (1 - se) / (n_pos + 2), sp * (1 - sp) / (n_neg + 2)
    shift = 2 * z**2 * (p * var_se - (1 - p) * var_sp)
    half = z * math.sqrt(shown * (1 - shown) / (n + z**2) + p**2 * var_se + (1 - p) ** 2 * var_sp) / (se + sp - 1)
    return Corrected(_clip(point), _clip(p + shift - half), _clip(p + shift + half))


def _sample(row: CalibrationRow, index: int) -> Sample:
    return Sample(row.id, index, "", row.question, row.answer, 0, True)


def _category(rubric: Rubric, row: CalibrationRow) -> str:
    return row.label if row.label is not None else rubric.band(row.value or 0.0)


def _said(rubric: Rubric, one: Judgement) -> str:
    return rubric.category(one.values or {}, one.answer)


def _value(rubric: Rubric, one: Judgement) -> float:
    assert one.values is not None, "asked for scored judgements only"
    return one.values[rubric.primary]


def _true_value(rubric: Rubric, row: CalibrationRow) -> float:
    return row.value if row.value is not None else rubric.measure(rubric.primary).labels[row.label or ""]


def _is_positive(rubric: Rubric, row: CalibrationRow) -> bool:
    if rubric.positive.below is not None:
        return (row.value or 0.0) < rubric.positive.below
    return row.label in rubric.positive.labels


def _pairs(first: Sequence[Judgement], second: Sequence[Judgement]) -> list[tuple[Judgement, Judgement]]:
    return [(a, b) for a, b in zip(first, second, strict=True) if a.values is not None and b.values is not None]


def _same(rubric: Rubric, first: Sequence[Judgement], second: Sequence[Judgement]) -> float:
    return _share([_said(rubric, a) == _said(rubric, b) for a, b in _pairs(first, second)])


def _shift(rubric: Rubric, first: Sequence[Judgement], second: Sequence[Judgement]) -> float:
    rises = [_value(rubric, b) - _value(rubric, a) for a, b in _pairs(first, second)]
    return sum(rises) / len(rises) if rises else math.nan


def _carriers(
    rubric: Rubric, rows: Sequence[CalibrationRow], first: Sequence[Judgement], again: Sequence[Judgement]
) -> list[Carrier]:
    """Rows with a verdict of their own to move; not those that hold an attempt already."""
    return [
        Carrier(_sample(row, 0), _said(rubric, one), _said(rubric, two) if two.values is not None else None)
        for row, one, two in zip(rows, first, again, strict=True)
        if one.values is not None and not row.kind.startswith("injection")
    ]


def _beside(rubric: Rubric, scored: Sequence[tuple[CalibrationRow, Judgement]]) -> dict[str, ScaleAccuracy]:
    """Error and correlation for each scale beside the primary one that rows give a true value for."""
    found = {}
    for measure in rubric.measures:
        pairs = [
            (row.others[measure.name], one.values[measure.name])
            for row, one in scored
            if one.values is not None and measure.name in row.others
        ]
        if pairs:
            error = sum(abs(said - true) for true, said in pairs) / len(pairs)
            found[measure.name] = ScaleAccuracy(
                len(pairs), error, correlation([a for a, _ in pairs], [b for _, b in pairs])
            )
    return found


def _by_kind(
    scored: Sequence[tuple[CalibrationRow, Judgement]], truth: Sequence[str], said: Sequence[str]
) -> dict[str, float]:
    hits: dict[str, list[bool]] = {}
    for (row, _), is_so, was_said in zip(scored, truth, said, strict=True):
        hits.setdefault(row.kind, []).append(is_so == was_said)
    return {kind: _share(marks) for kind, marks in sorted(hits.items())}


def _share(marks: Sequence[bool]) -> float:
    return sum(marks) / len(marks) if marks else math.nan


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
