"""Claims: sentences with numbers, each a template bound to a query over the ledger, so that `verify` can repeat it.

A template contains no digit; every number in a sentence comes from its query, with the rows behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.correlates import (
    MARKER_RATE,
    attainable,
    corrected_assistant_rate,
    correlation,
    measure_agreement,
)
from fastconv.analysis.sides import effect_words
from fastconv.report.blocks import Claim
from fastconv.report.wording import LEADING_KINDS, OPENINGS, bare, blindest, leading, mend, named, where_seen
from fastconv.stats.gates import GateVerdict
from fastconv.stats.inference import FEWEST_SEEDS, Interval
from fastconv.stats.series import NoRowsError
from fastconv.stats.units import Unit, change, counted, first_few, interval_text, level, size_text
from fastconv.stats.verdicts import CellVerdict, count_by_kind
from fastconv.stats.words import Kind

#: Kinds of verdicts of declared contrasts, in the order in which sentences list them.
KINDS = (*get_args(Kind), "withheld")
#: Verdicts of pilot gates by precedence, each with the opening of the answer and the words for its subjects.
PILOT_WORDS = {
    "go": ("GO", "go for"), "stop": ("STOP", "stop for"), "not applicable": ("OPEN", "not decided yet for"),
    "uninformative": ("NO ANSWER", "nothing can be said of"),
    "no contrast": ("NO CONTRAST", "the grid has epoch zero alone, so nothing is decided for"),
}  # fmt: skip
MOST_NAMED = 4
#: From so many contrasts of one behavior on, a reason that they share is said once, where they say nothing either way.
FEWEST_ALIKE, SILENT_KINDS = 3, ("inconclusive", "uninformative", "withheld")


class NoSuchClaimError(KeyError):
    """The ledger does not support the requested claim."""


@dataclass(frozen=True)
class QueryResult:
    """Result of a query: the template's values, the rows behind them, and a word that selects the sentence's color."""

    values: Mapping[str, str]
    rows: tuple[str, ...]
    word: str = ""


@dataclass(frozen=True)
class ClaimTemplate:
    """A template and its query."""

    template: str
    query: Callable[..., QueryResult]


def ask(analysis: Analysis, query: str, **arguments: str) -> Claim:
    """Make a claim from its query. Raises NoSuchClaimError if the ledger does not support it."""
    claim_template = CLAIMS.get(query)
    if claim_template is None:
        raise NoSuchClaimError(f"no claim is made by {query!r}")
    try:
        result = claim_template.query(analysis, **arguments)
        return Claim(query, arguments, claim_template.template.format_map(result.values), result.rows, result.word)
    except (KeyError, StopIteration, TypeError, NoRowsError) as error:
        raise NoSuchClaimError(f"{query} of {', '.join(arguments.values()) or 'the run'}: no rows") from error


def _answer(analysis: Analysis) -> QueryResult:
    """What the declared contrasts answer to the run's question."""
    return QueryResult({"found": _found(analysis)}, _together(analysis.answers), leading(analysis.answers).kind)


def _gate(analysis: Analysis) -> QueryResult:
    """Go or stop: the pilot gates' verdicts."""
    pilots = [gate for gate in analysis.gates if gate.gate == "PILOT"]
    by_word = {word: [gate.subject for gate in pilots if gate.verdict == word] for word in PILOT_WORDS}
    word = next(word for word, subjects in by_word.items() if subjects)
    details = "; ".join(
        first_few(some, MOST_NAMED)
        if verdict_word in ("go", "stop") and verdict_word == word
        else f"{PILOT_WORDS[verdict_word][1]} {first_few(some, MOST_NAMED)}"
        for verdict_word, some in by_word.items()
        if some
    )
    rows = dict.fromkeys(row for pilot in pilots for row in pilot.rows)
    return QueryResult({"word": PILOT_WORDS[word][0], "told": details}, tuple(rows), word)


def _found(analysis: Analysis) -> str:
    """What the declared contrasts answer to the run's question, in one sentence."""
    verdicts, n = analysis.answers, len(analysis.asked)
    counts, best = count_by_kind(verdicts), leading(verdicts)
    of = f"{n} declared contrasts" + (" beside the control's" if n < len(analysis.declared) else "")
    if best.kind in LEADING_KINDS:
        verb = "is" if counts[best.kind] == 1 else "are"
        return (
            f"{OPENINGS[best.kind]}: {counts[best.kind]} of {of} {verb} {best.kind}, the surest {named(analysis, best.label)}: "
            f"{_figures(best)}"
        )
    if counts.get("equivalent", 0) == n:
        return f"No: each of {of} is shown to lie within its threshold"
    meaning = "only those called equivalent show" if counts.get("equivalent") else "none shows"
    effects = effect_words(analysis.declared.values())
    return f"Not shown: none of {of} is {effects} ({_told(counts, n)}), and {meaning} that nothing happened"


def _figures(verdict: CellVerdict) -> str:
    """A verdict's estimate with its interval."""
    return f"{change(verdict.estimate or 0.0, verdict.unit)} {interval_text(verdict.low, verdict.high, verdict.unit)}".rstrip()


def _sure(analysis: Analysis) -> QueryResult:
    """The confidence of the leading verdict, and every reason why it is not higher."""
    best = leading(analysis.answers)
    limits = [best.confidence.reason.replace(";", ",")] if best.confidence.level != "HIGH" else []
    if best.run_spread is not None and best.run_spread.assumed:
        limits.append(
            f"the noise from run to run is assumed (SD {size_text(best.run_spread.sd, best.unit)}), nobody measured it"
        )
    if (worst := blindest(analysis.answers)) is not None:
        detectable, margin = (size_text(size or 0.0, worst.unit) for size in (worst.detectable, worst.margin))
        limits.append(f"a change of {worst.behavior} under {detectable} is easily missed, the threshold is {margin}")
    why = f" Not surer, because {'; '.join(limits)}." if limits else ""
    return QueryResult({"level": best.confidence.level, "why": why}, _together(analysis.answers))


def _next(analysis: Analysis) -> QueryResult:
    """What to run next: what is not measured, seeds for what was found, then what keeps verdicts from saying anything."""
    verdicts, n = analysis.answers, len(analysis.asked)
    best, waiting = leading(verdicts), n - len(verdicts)
    steps: list[str] = []
    if waiting:
        steps.append(f"the same recipe on, since {waiting} of {n} declared contrasts are not measured")
    if best.kind in LEADING_KINDS and best.n_seeds < FEWEST_SEEDS:
        steps.append(f"three seeds (`grid.seeds`) of {named(analysis, best.label)}, which has {best.n_seeds}")
    mute = [one for one in verdicts if one.kind == "uninformative"]
    if mute:
        behaviors = list(dict.fromkeys(one.behavior for one in mute))
        steps.append(first_few([where_seen(verdicts, one) for one in behaviors], MOST_NAMED))
    if (worst := blindest([one for one in verdicts if one.kind == "inconclusive"])) is not None:
        most = max((one for one in verdicts if one.behavior == worst.behavior), key=lambda one: one.detectable or 0.0)
        steps.append(f"more of {worst.behavior}: {mend(analysis, most).replace(';', ', and')}")
    if not steps:
        steps.append("other sources and behaviors, since these contrasts have their answer")
    return QueryResult({"steps": "; ".join(steps)}, _together(verdicts))


def _told(counts: Mapping[str, int], n: int) -> str:
    """Number of the n declared contrasts with each verdict, and of those not measured."""
    waiting = n - sum(counts.values())
    return ", ".join(f"{many} {kind}" for kind in KINDS if (many := counts.get(kind))) + (
        f", {waiting} not measured" if waiting else ""
    )


def _pilot(analysis: Analysis, subject: str) -> QueryResult:
    verdict = _gate_of(analysis.gates, "PILOT", subject)
    return QueryResult(_gate_values(verdict), verdict.rows, verdict.verdict)


def _study(analysis: Analysis, gate: str, subject: str) -> QueryResult:
    verdict = _gate_of(analysis.gates, gate, subject)
    return QueryResult({**_gate_values(verdict), "gate": gate}, verdict.rows, verdict.verdict)


def _gate_of(gates: Sequence[GateVerdict], gate: str, subject: str) -> GateVerdict:
    return next(one for one in gates if (one.gate, one.subject) == (gate, subject))


def _gate_values(verdict: GateVerdict) -> dict[str, str]:
    ignored = f" Ignored, because {verdict.ignored}." if verdict.ignored else ""
    return {
        "verdict": verdict.verdict, "subject": verdict.subject, "reason": verdict.reason, "rule": verdict.threshold,
        "ignored": ignored,
    }  # fmt: skip


def _counts(analysis: Analysis) -> QueryResult:
    n, rows = len(analysis.declared), _together(analysis.verdicts)
    return QueryResult({"n": str(n), "told": _told(count_by_kind(analysis.verdicts), n)}, rows)


def _finding(analysis: Analysis, label: str) -> QueryResult:
    verdict = analysis.verdict(label)
    values = {"label": label, "kind": verdict.kind, "confidence": verdict.confidence.level, "reason": verdict.reason}
    over = verdict.over_seeds
    seeds = "" if over is None else f" Over seeds: {_interval(over, verdict.unit)}, {counted(over.n_clusters, 'seed')}."
    return QueryResult({**values, "seeds": seeds, "why": verdict.confidence.reason}, verdict.rows, verdict.kind)


def _alike(analysis: Analysis, label: str) -> QueryResult:
    """The reason that a contrast shares with others of its behavior, without their figures, and how many they are."""
    group = alike(analysis)[label]
    one = group[0]
    total = sum(verdict.behavior == one.behavior for verdict in analysis.verdicts)
    values = {
        "n": str(len(group)), "total": str(total), "behavior": one.behavior, "kind": one.kind, "reason": bare(one.reason),
        "confidence": one.confidence.level, "why": one.confidence.reason,
    }  # fmt: skip
    return QueryResult(values, _together(group), one.kind)


def alike(analysis: Analysis) -> dict[str, list[CellVerdict]]:
    """Label of each contrast whose reason is said once for many -> all that share it (`_reason_of`), itself among them."""
    groups: dict[tuple[str, ...], list[CellVerdict]] = {}
    for verdict in analysis.verdicts:
        groups.setdefault(_reason_of(verdict), []).append(verdict)
    shared = [group for group in groups.values() if len(group) >= FEWEST_ALIKE and group[0].kind in SILENT_KINDS]
    return {verdict.label: group for group in shared for verdict in group}


def _reason_of(verdict: CellVerdict) -> tuple[str, ...]:
    return verdict.behavior, verdict.kind, bare(verdict.reason), verdict.confidence.level, verdict.confidence.reason


def _largest(analysis: Analysis, behavior: str) -> QueryResult:
    of_behavior = [
        verdict for verdict in analysis.verdicts if verdict.behavior == behavior and verdict.estimate is not None
    ]
    informative = [verdict for verdict in of_behavior if verdict.kind != "uninformative"] or of_behavior
    largest = max(informative, key=lambda verdict: abs(verdict.estimate or 0.0), default=None)
    if largest is None or largest.estimate is None:
        raise KeyError(behavior)
    of = f", among {len(informative)} of {len(of_behavior)} contrasts that can be read,"
    if len(informative) == len(of_behavior):
        of = ", though none of its contrasts can be read," if largest.kind == "uninformative" else ""
    values = {
        "behavior": behavior, "of": of, "figures": _figures(largest), "label": named(analysis, largest.label), "kind": largest.kind,
    }  # fmt: skip
    return QueryResult({**values, "confidence": largest.confidence.level}, largest.rows)


def _mimicry(analysis: Analysis, label: str) -> QueryResult:
    verdict = analysis.verdict(label)
    if verdict.trained is None or verdict.estimate is None:
        raise KeyError(label)
    alone = "was not measured" if verdict.mimicry is None else _interval(verdict.mimicry, verdict.unit)
    values = {"label": named(analysis, label), "alone": alone, "trained": _interval(verdict.trained, verdict.unit)}
    return QueryResult({**values, "extra": change(verdict.estimate, verdict.unit)}, verdict.rows)


def _edited(analysis: Analysis, gate: str, subject: str) -> QueryResult:
    now, before = (_gate_of(gates, gate, subject) for gates in (analysis.gates, analysis.under_first[0]))
    values = {"gate": gate, "subject": subject, "now": now.verdict, "before": before.verdict}
    return QueryResult(values, now.rows or before.rows, "edited")


def _edited_finding(analysis: Analysis, label: str) -> QueryResult:
    now = analysis.verdict(label)
    before = next(verdict for verdict in analysis.under_first[1] if verdict.label == label)
    return QueryResult({"label": named(analysis, label), "now": now.kind, "before": before.kind}, now.rows, "edited")


def _power(analysis: Analysis, behavior: str) -> QueryResult:
    verdicts = [one for one in analysis.verdicts if one.behavior == behavior and one.detectable is not None]
    rows, worst = _together(verdicts), max(verdicts, key=lambda verdict: verdict.detectable or 0.0)
    unit, margin = worst.unit, worst.margin or 0.0
    detectable, family = worst.detectable or 0.0, worst.detectable_in_family or 0.0
    says = "so a null result says something"
    if detectable > margin:
        says = f"so a null result says little; {mend(analysis, worst)}"
    values = {
        "behavior": behavior, "margin": size_text(margin, unit), "seen": size_text(detectable, unit), "family": size_text(family, unit),
        "m": str(len(analysis.declared)), "n": str(worst.n_questions), "mend": says,
    }  # fmt: skip
    return QueryResult(values, rows, "" if detectable <= margin else "withheld")


def _runs(analysis: Analysis, behavior: str) -> QueryResult:
    """What stands for the noise from run to run in the intervals of a behavior, or of several ("a, b") that share it."""
    names = behavior.split(", ")
    verdicts = [verdict for verdict in analysis.verdicts if verdict.behavior in names and verdict.run_spread]
    texts = list(dict.fromkeys(verdict.runs_text for verdict in verdicts))
    return QueryResult({"behavior": behavior, "runs": first_few(texts, 2, "; ")}, _together(verdicts))


def _sign_flips(analysis: Analysis, behavior: str) -> QueryResult:
    """The warning for a behavior whose fewest questions cannot reach the corrected level by sign flips."""
    verdicts = [verdict for verdict in analysis.verdicts if verdict.behavior == behavior and verdict.sign_flip_warning]
    rows, fewest = _together(verdicts), min((one.n_questions, one.sign_flip_warning or "") for one in verdicts)
    return QueryResult({"behavior": behavior, "why": fewest[1]}, rows, "withheld")


def _correlation(analysis: Analysis, behavior: str, correlate: str = MARKER_RATE) -> QueryResult:
    return QueryResult(*correlation(analysis, behavior, correlate))


def _attainable(analysis: Analysis, correlate: str = MARKER_RATE) -> QueryResult:
    values, rows, possible = attainable(analysis, correlate)
    return QueryResult(values, rows, "" if possible else "withheld")


def _agreement(analysis: Analysis, measure: str) -> QueryResult:
    result = measure_agreement(analysis, measure)
    kappa = "cannot be given: both always say the same" if np.isnan(result.kappa) else f"{result.kappa:.2f}"
    values = {"measure": measure, "share": level(result.accuracy, "share"), "n": f"{result.n:,}", "kappa": kappa}
    return QueryResult(values, result.rows)


def _corrected(analysis: Analysis, label: str) -> QueryResult:
    raw, corrected, rows = corrected_assistant_rate(analysis, label)
    label = named(analysis, label)
    shown = f"{level(corrected.rate, 'share')} [{100 * corrected.low:.1f}, {100 * corrected.high:.1f}]"
    return QueryResult({"label": label, "raw": level(raw, "share"), "fixed": shown}, rows)


def _cost(analysis: Analysis) -> QueryResult:
    records = [record for stage in analysis.graph.stages() if (record := analysis.reading.record(stage)) is not None]
    if not records:
        raise KeyError("stages")
    total_s = sum(record.seconds for record in records)
    tokens = {
        name: sum(int(r.facts.get(name, 0)) for r in records) for name in ("trained_tok", "sampled_tok", "scored_tok")
    }
    token_text = ", ".join(f"{n:,} {name.removesuffix('_tok')}" for name, n in tokens.items() if n)
    span_s = f"{total_s / 3600:.2f} hours" if total_s >= 3600 else f"{total_s:.0f} seconds"
    values = {"n": str(len(records)), "seconds": span_s, "tokens": token_text or "none"}
    return QueryResult(values, tuple(f"{record.key[:12]}/seconds" for record in records))


def _unscored(analysis: Analysis) -> QueryResult:
    seen, missing, rows = 0, 0, []
    for plan in analysis.graph.cells:
        for (measure, probe), stage in plan.scores.items():
            series = analysis.reading.series(stage, measure, probe)
            if series is not None:
                seen, missing = seen + series.n_samples, missing + series.n_unscored
                rows.append(f"{stage.key[:12]}/scores")
    if not rows:
        raise KeyError("scores")
    return QueryResult({"n": f"{missing:,}", "total": f"{seen:,}"}, tuple(dict.fromkeys(rows)))


def _interval(interval: Interval, unit: Unit) -> str:
    if interval.estimate is None:
        return f"cannot be given ({interval.reason})"
    return f"{change(interval.estimate, unit)} {interval_text(interval.low, interval.high, unit)}".rstrip()


def _together(verdicts: Sequence[CellVerdict]) -> tuple[str, ...]:
    """The rows behind verdicts. KeyError if there is no verdict."""
    if not verdicts:
        raise KeyError("verdicts")
    return tuple(dict.fromkeys(row for verdict in verdicts for row in verdict.rows))


CLAIMS: Mapping[str, ClaimTemplate] = {
    "answer": ClaimTemplate("{found}.", _answer),
    "gate": ClaimTemplate("{word}: {told}.", _gate),
    "sure": ClaimTemplate("How sure: confidence {level}.{why}", _sure),
    "next": ClaimTemplate("What to run next: {steps}.", _next),
    "alike": ClaimTemplate("{n} of {total} contrasts of {behavior} are {kind}: {reason}. Confidence {confidence}: {why}.", _alike),
    "pilot": ClaimTemplate("{verdict} for {subject}: {reason}. Rule: {rule}.{ignored}", _pilot),
    "study": ClaimTemplate("{gate}, {subject}: {verdict}. {reason}. Rule: {rule}.{ignored}", _study),
    "counts": ClaimTemplate("Declared contrasts: {n}. Of these {told}.", _counts),
    "finding": ClaimTemplate("{kind}: {reason}.{seeds} Confidence {confidence}: {why}.", _finding),
    "largest": ClaimTemplate("The largest change of {behavior}{of} is {figures}, in {label}: {kind}, confidence {confidence}.", _largest),
    "mimicry": ClaimTemplate(
        "{label}: convergence alone {alone}, with the behavior adapter {trained}; the adapter adds {extra}.", _mimicry
    ),
    "edited": ClaimTemplate("{gate}, {subject}: {now} under the edited thresholds, {before} under the first ones.", _edited),
    "edited_finding": ClaimTemplate("{label}: {now} under the edited thresholds, {before} under the first ones.", _edited_finding),
    "power": ClaimTemplate(
        "{behavior}: the threshold is {margin}; with {n} questions, the spread seen and the noise from run to run, a change of {seen} would be found "
        "four times out of five ({family} at the first step of the correction over {m} contrasts), {mend}.",
        _power,
    ),
    "runs": ClaimTemplate("Noise from run to run in the intervals of {behavior}: {runs}.", _runs),
    "sign_flips": ClaimTemplate("The sign-flip check is weak for {behavior}: {why}.", _sign_flips),
    "correlation": ClaimTemplate(
        "Over {n} sources, the rank correlation of {behavior} transfer with {correlate} is {figures}.",
        _correlation,
    ),
    "attainable": ClaimTemplate("{sources} with {correlate} and {behaviors}: {reason}.", _attainable),
    "agreement": ClaimTemplate("{measure}: judge and phrases say the same of {share} of {n} answers; kappa {kappa}.", _agreement),
    "corrected": ClaimTemplate("{label}: {raw} as judged, {fixed} once corrected for the judge's known mistakes.", _corrected),
    "cost": ClaimTemplate("{n} stages took {seconds} of computing; tokens: {tokens}.", _cost),
    "unscored": ClaimTemplate("{n} of {total} samples have no score.", _unscored),
}  # fmt: skip
