"""Words about verdicts that several claims, sections and tables of a report share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial

from fastconv.analysis.analysis import Analysis
from fastconv.datasets.behaviors import n_eval_prompts_there_are
from fastconv.stats.power import QuestionSupply, remedy_text
from fastconv.stats.units import counted, size_text
from fastconv.stats.verdicts import CellVerdict

#: In a verdict's reason: an estimate with its interval, a corrected p-value, the interval over seeds.
_ROW_FIGURES = re.compile(
    r" [+-]?[\d.]+ (?:pp|points) \[[^\]]*\]| \(corrected p = [^)]*\)| \(over \d+ seeds \[[^\]]*\]\)"
)
#: What a report opens with, if there is any.
OPENINGS = {"transfer": "Yes", "reverse": "The other way", "stronger": "Stronger", "weaker": "Weaker"}
LEADING_KINDS = tuple(OPENINGS)


def leading(verdicts: Sequence[CellVerdict]) -> CellVerdict:
    """The verdict that a report opens with: the surest transfer, else reverse, else the surest of all. KeyError if none."""
    if not verdicts:
        raise KeyError("verdicts")
    kinds = [kind for kind in LEADING_KINDS if any(verdict.kind == kind for verdict in verdicts)]
    return max((verdict for verdict in verdicts if not kinds or verdict.kind == kinds[0]), key=_certainty)


def _certainty(verdict: CellVerdict) -> tuple[int, float]:
    in_thresholds = abs(verdict.estimate or 0.0) / (verdict.margin or 1.0)  # points and shares side by side
    return ("LOW", "MODERATE", "HIGH").index(verdict.confidence.level), in_thresholds


def named(analysis: Analysis, label: str) -> str:
    """A contrast in words, with its question set if that is reported apart."""
    subject = analysis.subject(label)
    part = analysis.found.main(subject.behavior).name
    return analysis.words(label) + (f", {part} questions" if part else "")


def blindest(verdicts: Sequence[CellVerdict]) -> CellVerdict | None:
    """The verdict whose detectable effect exceeds its threshold by most; None if none does."""
    blind = [verdict for verdict in verdicts if (verdict.detectable or 0.0) > (verdict.margin or 0.0)]
    return max(blind, key=lambda verdict: (verdict.detectable or 0.0) / (verdict.margin or 1.0), default=None)


def where_seen(verdicts: Sequence[CellVerdict], behavior: str) -> str:
    """A behavior to run where it can be seen, with what most often kept its contrasts from saying anything."""
    of_behavior = [one for one in verdicts if one.behavior == behavior]
    mute = Counter(_why_mute(one) for one in of_behavior if one.kind == "uninformative")
    why, many = mute.most_common(1)[0]
    return f"{behavior} where it can be seen ({many} of {counted(len(of_behavior), 'contrast')}: {why})"


def _why_mute(verdict: CellVerdict) -> str:
    """The reason of an uninformative verdict without its figures, which differ from contrast to contrast."""
    return re.split(r";|:| \(", bare(verdict.reason))[0]


def bare(reason: str) -> str:
    """A verdict's reason without the figures that its row has anyway."""
    return _ROW_FIGURES.sub("", reason)


def mend(analysis: Analysis, verdict: CellVerdict) -> str:
    """What would bring a verdict's detectable effect down to its threshold, of what there is."""
    there_are = _questions_there_are(analysis, verdict.behavior)
    supply = QuestionSupply(
        there_are,
        partial(verdict.would_find, max(there_are, verdict.n_questions)),
        lambda size: size_text(size, verdict.unit),
        max(1, verdict.n_seeds),
    )
    return remedy_text(verdict.mend, supply)


def _questions_there_are(analysis: Analysis, behavior: str) -> int:
    """Number of questions that there are for a behavior's verdicts, asked or not."""
    about = analysis.graph.behaviors[behavior]
    if about.spec.measure == "letters":
        return len(analysis.graph.questions.eval)
    return next(iter(n_eval_prompts_there_are(about)), 0)
