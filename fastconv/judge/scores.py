"""Scores made from judgements, and the agreement of two ways of scoring the same samples."""

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
    n_missing = sum(key not in judgements for key in keys)
    if n_missing:
        raise JudgeError(
            f"{n_missing} of {len(keys)} judgements are not made yet", where=rubric.name, fix="run `fastconv judge`"
        )
    scores = []
    for sample, key in zip(samples, keys, strict=True):
        judgement = judgements[key]
        detail = {"judgement": key, "model": judgement.model, "rubric": rubric.sha256}
        if judgement.values is None:
            scores.append(Score(sample.row, sample.sample, rubric.primary, None, judgement.reason, detail))
            continue
        others = {name: value for name, value in judgement.values.items() if name != rubric.primary}
        label = judgement.answer.get(rubric.measure(rubric.primary).field)
        detail |= {**others, **({"label": label} if isinstance(label, str) else {})}
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
