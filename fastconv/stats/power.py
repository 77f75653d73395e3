"""Power: the smallest effect that a design can detect, and how many questions, samples or seeds a smaller one needs.

Closed formulas (docs/DESIGN.md, section 6) that the audit, `plan` and the report share, so that all three print the
same figure. Malformed input raises `ValueError`; a quantity that valid input cannot give is `None`, with the
explanation in `reason`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fastconv.stats.student import noncentrality

Measure = Literal["letters", "phrases", "judge", "choices", "none"]
#: More samples of a question than this are no plan.
MOST_SAMPLES = 1_000_000
#: More seeds of a cell than this are no plan.
MOST_SEEDS = 100
#: No variance from run to run.
NO_RUNS = (0.0, math.inf)
#: Assumed spread between questions of a paired change, before there are data: accuracy where 15 % of the questions
#: flip; a rate near 0.1 with half of its variance between questions, half of that removed by pairing; judge points.
FLIP_SHARE, PLANNED_RATE, PLANNED_ICC, PLANNED_PAIRING, POINTS_SD = 0.15, 0.10, 0.5, 0.5, 15.0


@dataclass(frozen=True, slots=True)
class RunSpread:
    """How far the mean of one trained cell lies from run to run: a standard deviation in the measure's unit.

    `df`: degrees of freedom that the figure carries. `origin` says where it is from; `assumed` that nobody measured it.
    """

    sd: float
    df: float
    origin: str
    assumed: bool = False


#: Share of a cell's run-to-run variance that its canary shares (assumed), so that the difference is free of it.
SHARED_WITH_CANARY = 0.5
#: Two trained cells stand in a change against epoch 0: the behavior adapter on the snapshot and the one at epoch 0.
TRAINED_CELLS = 2
#: Before there are replicates. Five cells that were trained again spread by 3.1 points of alignment (published, #112):
#: 4 degrees of freedom. For accuracy and rates nobody repeated a cell. A figure believed to a quarter of itself counts
#: as (1/4)^-2 / 2 = 8 degrees of freedom (JCGM 100:2008, Guide to the Expression of Uncertainty in Measurement, G.4.2).
_PUBLISHED = RunSpread(3.1, 4.0, "published, five replicate cells")
_LETTERS, _RATES = (RunSpread(sd, 8.0, "assumed, no replicates", assumed=True) for sd in (0.01, 0.02))


def declared_spread(behavior: str, unit: str) -> RunSpread:
    """The run-to-run spread that holds for a measure until seeds or replicates give one."""
    return _PUBLISHED if unit == "points" else _LETTERS if behavior == "capability" else _RATES


def run_variance(spread: RunSpread, n_seeds: int = 1) -> float:
    """Run-to-run variance of the assistant's change less the canary's, averaged over seeds, in the squared unit.

    2 sd^2 x 2 (1 - rho) / n: each of the two trained cells (`TRAINED_CELLS`) brings the variance of a difference of two
    means of equal variance with correlation rho = `SHARED_WITH_CANARY`. Mimicry adds none: its snapshot is the one under
    the behavior adapter, so what is particular to that training cancels, and the base is not trained. A change of one
    persona alone has 2 sd^2 / n, which is the same at rho = 1/2.
    """
    return TRAINED_CELLS * spread.sd**2 * 2 * (1 - SHARED_WITH_CANARY) / n_seeds


def unshared_variance(spread: RunSpread, n_seeds: int = 1) -> float:
    """`run_variance` without the canary's own part, 2 sd^2 (1 - rho) / n: what equivalence is tested against.

    With the canary's part 5 pp could be shown of no rate with one seed (1.645 x 2.83 pp is nearly that), so the word
    would not exist. It therefore assumes that what the canary does not share with the assistant does not move the canary.
    """
    return TRAINED_CELLS * spread.sd**2 * (1 - SHARED_WITH_CANARY) / n_seeds


def satterthwaite(*parts: tuple[float, float]) -> tuple[float, float]:
    """Standard error and degrees of freedom of a sum of independent variances, each with its own degrees of freedom.

    Source: Satterthwaite 1946, Biometrics Bulletin 2:110. A part without variance counts nothing.
    """
    total = sum(variance for variance, _ in parts)
    weight = sum(variance**2 / df for variance, df in parts if variance)
    return math.sqrt(total), total**2 / weight if weight else math.inf


@dataclass(frozen=True, slots=True)
class Detectable:
    """The minimum detectable effect, in the unit of `sd_between`."""

    effect: float | None
    sd_between: float | None
    n_clusters: int
    alpha: float
    power: float
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class SampleSizeNeeded:
    """How many of `what` bring the minimum detectable effect down to `effect`; `number` is None if none does."""

    number: int | None
    what: Literal["questions", "samples", "seeds"]
    effect: float
    reason: str


@dataclass(frozen=True, slots=True)
class DetectableContrast:
    """The minimum detectable effect of one test of a contrast of `n_terms` rates or scores, before there are data.

    `alone` is uncorrected and in the unit of the measure; `questions` and `samples` bring it down to `threshold`.
    """

    n_terms: int
    threshold: float
    alone: float
    questions: SampleSizeNeeded
    samples: SampleSizeNeeded

    @property
    def too_large(self) -> bool:
        """Whether the detectable effect exceeds the threshold, so that a null result is uninformative."""
        return self.alone > self.threshold


@dataclass(frozen=True, slots=True)
class DesignPower:
    """Power of a design before there are data, in the unit of the measure (a share, or judge points).

    `change` is a paired change, which gates compare; `declared` the contrast that verdicts rest on, and `in_family` the
    same at the first step of Holm over `n_contrasts`. `primary` is False for questions that are reported separately, on
    which no verdict rests. `n_available` are the questions that there are, asked or not (None: not known).
    """

    measure: Measure
    threshold: float
    n_questions: int
    n_samples: int
    n_contrasts: int
    change: DetectableContrast
    declared: DetectableContrast
    in_family: float
    primary: bool = True
    n_available: int | None = None

    def over_seeds(self, contrast: DetectableContrast, n_seeds: int) -> float:
        """What all questions that there are would find of one of its contrasts over so many seeds, as docs/POWER.md counts."""
        spread = planned_spread(self.measure, self.n_samples, contrast.n_terms)
        there_are = max(self.n_questions, self.n_available or 0)
        return effect_over_seeds(spread, there_are, n_seeds, planned_runs(self.measure))

    def family_over_seeds(self, n_seeds: int) -> float:
        """What the declared contrast finds over so many seeds at the first step of Holm, with the questions asked."""
        spread = planned_spread(self.measure, self.n_samples, self.declared.n_terms)
        one_run = planned_runs(self.measure)
        return effect_over_seeds(spread, self.n_questions, n_seeds, one_run, 0.05 / max(1, self.n_contrasts))


def planned_spread(measure: Measure, n_samples: int, n_terms: int = 2) -> float:
    """Assumed standard deviation between questions of a contrast: a share, or judge points.

    The assumption is made for a paired change, of two terms. More terms are taken as independent, so each pair adds the
    variance of one such change; a correlation between them would shrink it.
    """
    pairs = math.sqrt(n_terms / 2)
    if measure == "letters":
        return math.sqrt(FLIP_SHARE) * pairs
    if measure == "judge":
        return POINTS_SD * pairs
    return rate_contrast_sd(PLANNED_RATE, n_samples, PLANNED_ICC, n_terms, PLANNED_PAIRING)


def planned_runs(measure: Measure, n_seeds: int = 1) -> tuple[float, float]:
    """Variance from run to run and its degrees of freedom that a design counts on: as declared for the measure."""
    spread = declared_spread("capability" if measure == "letters" else "", "points" if measure == "judge" else "share")
    return run_variance(spread, n_seeds), spread.df


def planned_power(
    measure: Measure, threshold: float, n_questions: int, n_samples: int, n_contrasts: int = 1, n_terms: int = 2,
    *, primary: bool = True, over_runs: bool = True,
) -> DesignPower | None:  # fmt: skip
    """The minimum detectable effects of a design beside its threshold; None for fewer than two questions.

    With one seed and the declared noise from run to run; without `over_runs` over questions alone, for this run.

    `n_terms` of the declared contrast: 2 for a paired change, 4 against the canary, 8 when mimicry is subtracted too.
    """
    if n_questions < 2:
        return None
    runs = planned_runs(measure) if over_runs else NO_RUNS
    change, declared = (_reach(measure, threshold, n_questions, n_samples, terms, runs) for terms in (2, n_terms))
    spread = planned_spread(measure, n_samples, n_terms)
    family = minimum_detectable_effect(spread, n_questions, 0.05 / max(1, n_contrasts), runs=runs).effect
    if change is None or declared is None or family is None:
        return None
    return DesignPower(measure, threshold, n_questions, n_samples, n_contrasts, change, declared, family, primary)


def _reach(
    measure: Measure, threshold: float, n_questions: int, n_samples: int, n_terms: int, runs: tuple[float, float]
) -> DetectableContrast | None:
    spread = planned_spread(measure, n_samples, n_terms)
    alone = minimum_detectable_effect(spread, n_questions, runs=runs).effect
    if alone is None:
        return None
    if measure in ("phrases", "choices"):
        variance = n_terms * PLANNED_RATE * (1 - PLANNED_RATE)
        own, drawn = variance * PLANNED_ICC * (1 - PLANNED_PAIRING), variance * (1 - PLANNED_ICC)
        samples = samples_needed(threshold, math.sqrt(own), math.sqrt(drawn), n_questions, runs=runs)
    else:
        samples = SampleSizeNeeded(
            None, "samples", threshold, "the spread is between questions; samples do not shrink it"
        )
    return DetectableContrast(n_terms, threshold, alone, clusters_needed(threshold, spread, runs=runs), samples)


@dataclass(frozen=True, slots=True)
class QuestionSupply:
    """The questions that there are for a contrast, asked or not; `over_seeds` gives what all of them detect over so many
    seeds (`effect_over_seeds`), of which there are `n_seeds` now; `show` prints an effect.
    """

    n_available: int
    over_seeds: Callable[[int], float]
    show: Callable[[float], str]
    n_seeds: int = 1

    @property
    def reach(self) -> float:
        """What all questions that there are would detect with the seeds there are."""
        return self.over_seeds(self.n_seeds)


def remedy_text(needed: Sequence[SampleSizeNeeded], supply: QuestionSupply | None = None) -> str:
    """The numbers of questions, samples or seeds that make a detectable effect small enough, as text.

    With a `supply`, more questions than there are are no remedy: then it says what all of them find, and how many seeds
    with them would do.
    """
    asks = next((need for need in needed if need.what == "questions"), None)
    if supply is not None and asks is not None and (asks.number is None or asks.number > supply.n_available):
        others = [need for need in needed if need.what == "samples" and need.number is not None]
        there = f"all {supply.n_available} questions there are would find {supply.show(supply.reach)}"
        seeds = seeds_needed(asks.effect, supply.over_seeds, supply.n_seeds)
        others += [seeds] if seeds.number is not None else []
        ways = [
            f"{need.number:,} {need.what}" + (" of all these questions" if need.what == "seeds" else "")
            for need in others
        ]
        return f"{there}; {' or '.join(ways) or f'not even {MOST_SEEDS} seeds of them'} would mend it"
    possible = [f"{need.number:,} {need.what}" for need in needed if need.number is not None]
    impossible = [need.what for need in needed if need.number is None]
    words = f"{' or '.join(possible)} would mend it" if possible else "no number of questions would mend it"
    return words + (f" (no number of {' or '.join(impossible)} would)" if impossible and possible else "")


def minimum_detectable_effect(
    sd_between: float | None,
    n_clusters: int,
    alpha: float = 0.05,
    power: float = 0.8,
    runs: tuple[float, float] = NO_RUNS,
) -> Detectable:
    """Smallest change that a two-sided paired t test over `n_clusters` questions detects with the given power.

    delta(alpha, power, C - 1) * sd / sqrt(C), where delta is the noncentrality of Student's t (Cohen, Statistical Power
    Analysis, 1988, chapter 2). `sd_between`: standard deviation between questions of the contrast itself, in its unit.
    For the first step of Holm over m contrasts pass alpha / m. `runs`: variance from run to run and its degrees of
    freedom, which joins that of the mean over questions (`satterthwaite`).
    """
    _check_open_unit(alpha=alpha, power=power)
    _check_clusters(n_clusters)
    reason = _unusable_spread(sd_between)
    if reason is not None or sd_between is None:
        return Detectable(None, sd_between, n_clusters, alpha, power, reason)
    se, df = satterthwaite((sd_between**2 / n_clusters, n_clusters - 1), runs)
    return Detectable(noncentrality(df, alpha, power) * se, sd_between, n_clusters, alpha, power)


def rate_contrast_sd(rate: float, n_samples: int, icc: float, n_terms: int = 2, pairing: float = 0.0) -> float:
    """Expected standard deviation between questions of a contrast of `n_terms` rates of `n_samples` each.

    sqrt(n_terms * p(1-p) * (icc (1 - pairing) + (1 - icc) / S)): the variance of a cluster mean (Donner and Klar,
    Cluster Randomization Trials, 2000). `n_terms`: 2 for a paired change, 4 against the canary, 8 for transfer.
    `pairing` is the correlation of a question's true rates over the terms; 0 assumes none.
    """
    _check_open_unit(rate=rate)
    if n_samples < 1 or n_terms < 1 or not 0 <= icc <= 1 or not 0 <= pairing <= 1:
        raise ValueError("need n_samples >= 1, n_terms >= 1, and icc and pairing between 0 and 1")
    return math.sqrt(n_terms * rate * (1 - rate) * (icc * (1 - pairing) + (1 - icc) / n_samples))


def clusters_needed(
    effect: float, sd_between: float | None, alpha: float = 0.05, power: float = 0.8, limit: int = 1_000_000,
    runs: tuple[float, float] = NO_RUNS,
) -> SampleSizeNeeded:  # fmt: skip
    """Fewest questions whose minimum detectable effect is at most `effect`; None above `limit`.

    With a variance from run to run (`runs`) no number of questions may do, and the reason says so.
    """
    _check_effect(effect)
    _check_open_unit(alpha=alpha, power=power)
    _check_clusters(limit)
    reason = _unusable_spread(sd_between)
    if reason is not None or sd_between is None:
        return SampleSizeNeeded(None, "questions", effect, reason or "")

    def shows(n: int) -> bool:
        se, df = satterthwaite((sd_between**2 / n, n - 1), runs)
        return noncentrality(df, alpha, power) * se <= effect

    if not shows(limit):
        if runs[0]:
            reason = f"the noise from run to run hides {effect:.4g} whatever is asked; add seeds"
            return SampleSizeNeeded(None, "questions", effect, reason)
        return SampleSizeNeeded(None, "questions", effect, f"not even {limit} questions can show {effect:.4g}")
    number = _first_true(shows, 2, limit)
    return SampleSizeNeeded(number, "questions", effect, f"{number} questions can show {effect:.4g}")


def seeds_needed(effect: float, over_seeds: Callable[[int], float], n_seeds: int = 1) -> SampleSizeNeeded:
    """Fewest seeds, more than the `n_seeds` there are, that detect `effect`; `over_seeds` as in `QuestionSupply`."""
    _check_effect(effect)
    first = max(3, n_seeds + 1)  # from three seeds on they are tested among themselves too, which finds less at first
    number = next((n for n in range(n_seeds + 1, 3) if over_seeds(n) <= effect), None)
    if number is None and first <= MOST_SEEDS and over_seeds(MOST_SEEDS) <= effect:
        number = _first_true(lambda n: over_seeds(n) <= effect, first, MOST_SEEDS)
    reason = f"{number} seeds can show {effect:.4g}" if number else f"not even {MOST_SEEDS} seeds can show {effect:.4g}"
    return SampleSizeNeeded(number, "seeds", effect, reason)


def samples_needed(
    effect: float,
    sd_question: float | None,
    sd_sample: float | None,
    n_clusters: int,
    alpha: float = 0.05,
    power: float = 0.8,
    runs: tuple[float, float] = NO_RUNS,
) -> SampleSizeNeeded:
    """Fewest samples per question that bring the minimum detectable effect down to `effect`.

    With `n_clusters` questions the contrast's variance between them is sd_question^2 + sd_sample^2 / S
    (both spreads of the contrast); only the second part shrinks, so where the first alone is too large no
    number of samples helps (Snijders and Bosker, Multilevel Analysis, 2012, chapter 11).
    """
    _check_effect(effect)
    _check_open_unit(alpha=alpha, power=power)
    _check_clusters(n_clusters)
    if sd_question is None or sd_sample is None or not math.isfinite(sd_question + sd_sample):
        return SampleSizeNeeded(None, "samples", effect, "the spread is not known, so no number can be given")
    if sd_question < 0 or sd_sample < 0:
        raise ValueError(f"a spread cannot be negative, not {sd_question} and {sd_sample}")

    def shows(n: int) -> bool:
        spread = math.sqrt(sd_question**2 + (0.0 if n == 0 else sd_sample**2 / n))
        se, df = satterthwaite((spread**2 / n_clusters, n_clusters - 1), runs)
        return se == 0 or noncentrality(df, alpha, power) * se <= effect

    if sd_sample == 0 and shows(0):
        return SampleSizeNeeded(1, "samples", effect, "one sample per question is enough")
    if not shows(MOST_SAMPLES):
        what = "runs and " if runs[0] else ""
        reason = f"the spread between {what}{n_clusters} questions alone hides {effect:.4g}; add {'seeds' if runs[0] else 'questions'}"
        return SampleSizeNeeded(None, "samples", effect, reason)
    number = _first_true(shows, 1, MOST_SAMPLES)
    return SampleSizeNeeded(number, "samples", effect, f"{number} samples per question can show {effect:.4g}")


def _first_true(predicate: Callable[[int], bool], low: int, high: int) -> int:
    """Smallest n in low..high where a monotone `predicate` holds, given that it holds at `high`."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if predicate(middle) else (middle + 1, high)
    return low


def _unusable_spread(sd: float | None) -> str | None:
    if sd is None or not math.isfinite(sd):
        return "the spread is not known, so no number can be given"
    if sd < 0:
        raise ValueError(f"a spread cannot be negative, not {sd}")
    return "a spread of zero says nothing about what could be detected" if sd == 0 else None


def _check_clusters(n: int) -> None:
    if n < 2:
        raise ValueError(f"need at least 2 clusters, not {n}")


def _check_effect(effect: float) -> None:
    if not (math.isfinite(effect) and effect > 0):
        raise ValueError(f"an effect to be shown must be positive, not {effect}")


def _check_open_unit(**named: float) -> None:
    for name, value in named.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, not {value}")


def effect_over_seeds(
    spread: float, n_questions: int, n_seeds: int, one_run: tuple[float, float], alpha: float = 0.05
) -> float:
    """The smallest effect that both tests of a verdict find four times out of five: the arithmetic of docs/POWER.md.

    One test is over questions and runs, the other, from three seeds on, over the seeds alone. `spread`: SD between
    questions; `one_run`: variance from run to run of one seed, with its degrees of freedom, which three seeds replace.
    """
    variance, df = one_run[0] / n_seeds, one_run[1] if n_seeds < 3 else n_seeds - 1
    effect = minimum_detectable_effect(spread, n_questions, alpha, runs=(variance, df)).effect or 0.0
    if n_seeds < 3:
        return effect
    return max(effect, noncentrality(n_seeds - 1, alpha, 0.8) * math.sqrt(variance))
