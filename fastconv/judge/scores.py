"""From judgements to the ledger's scores, and how far two ways of scoring agree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fastconv.errors import JudgeError
from fastconv.judge.rubric import Rubric
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Sample, Score


@dataclass(frozen=True)
class Agreement:
    """How far two ways of scoring the same samples agree. `n` were scored by both.

    `kappa` is Cohen's over the categories (NaN where both always say the same one thing), `confusion[first, second]`
    counts them, `mean_difference` is second minus first, `correlation` Pearson's (NaN without spread).
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
    """Scores of a stage from its judgements, one per sample, metric = the rubric's primary measure.

    `keys` are the judgements' in the samples' order. Other measures and the label stand in `detail`. A judgement
    without a value is a score without one, with its reason. Raises JudgeError while judgements are missing.
    """
    found = ledger.judgements(keys)
    n_missing = sum(key not in found for key in keys)
    if n_missing:
        raise JudgeError(
            f"{n_missing} of {len(keys)} judgements are not made yet", where=rubric.name, fix="run `fastconv judge`"
        )
    scores = []
    for sample, key in zip(samples, keys, strict=True):
        one = found[key]
        detail = {"judgement": key, "model": one.model, "rubric": rubric.sha256}
        if one.values is None:
            scores.append(Score(sample.row, sample.sample, rubric.primary, None, one.reason, detail))
            continue
        others = {name: value for name, value in one.values.items() if name != rubric.primary}
        label = one.answer.get(rubric.measure(rubric.primary).field)
        detail |= {**others, **({"label": label} if isinstance(label, str) else {})}
        scores.append(Score(sample.row, sample.sample, rubric.primary, one.values[rubric.primary], None, detail))
    return scores


def compare_scores(first: Sequence[Score], second: Sequence[Score], *, cut: float = 0.5) -> Agreement:
    """Agreement of two lists of scores by row and sample (judge and substring, old rubric and new).

    Categories are "over" and "under": values of at least `cut` (0.5 for rates, 50 for alignment points) and below.
    """
    one = {(score.row, score.sample): score.value for score in first if score.value is not None}
    two = {(score.row, score.sample): score.value for score in second if score.value is not None}
    both = sorted(one.keys() & two.keys())
    pairs = [(one[place], two[place]) for place in both]
    counted = agreement([_side(a, cut) for a, _ in pairs], [_side(b, cut) for _, b in pairs])
    n_unpaired = len(one.keys() | two.keys()) - len(both)
    difference = sum(b - a for a, b in pairs) / len(pairs) if pairs else math.nan
    return Agreement(
        counted.n, n_unpaired, counted.accuracy, counted.kappa, counted.confusion, difference,
        correlation([a for a, _ in pairs], [b for _, b in pairs]),
    )  # fmt: skip


def agreement(first: Sequence[str], second: Sequence[str]) -> Agreement:
    """Accuracy, Cohen's kappa and confusion of two lists of categories for the same items."""
    n = len(first)
    confusion = dict(Counter(zip(first, second, strict=True)))
    if n == 0:
        return Agreement(0, 0, math.nan, math.nan, {}, math.nan, math.nan)
    same = sum(count for (a, b), count in confusion.items() if a == b) / n
    ones, twos = Counter(first), Counter(second)
    by_chance = sum(ones[name] * twos[name] for name in ones) / n**2
    kappa = (same - by_chance) / (1 - by_chance) if by_chance < 1 else math.nan
    return Agreement(n, 0, same, kappa, confusion, math.nan, math.nan)


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
