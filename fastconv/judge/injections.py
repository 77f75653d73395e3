"""What a judge does with text that tells it what to say: attempts put at the end of labelled answers.

That no attempt leaves its fence is proven without a judge. Whether a judge does as it is told from inside the fence can
only be measured, against its own verdicts on the same answers without an attempt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastconv.seeding import ordered
from fastconv.errors import DataError
from fastconv.store.judgements import Judgement
from fastconv.judge.rubric import Measure, Rubric
from fastconv.store.ledger import Sample


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
    order = ordered(list(by_row), "injections", rubric.name)
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
