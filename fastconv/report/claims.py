"""Claims: sentences with numbers, each a template bound to a query over the ledger, so that `verify` can repeat it.

A template contains no digit; every number in a sentence comes from its query, with the rows behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.correlates import (
    MARKER,
    MARKER_RATE,
    corrected_assistant_rate,
    in_words,
    levels,
    measure_agreement,
    transfer_by_source,
)
from fastconv.datasets.behaviors import n_eval_prompts_there_are
from fastconv.report.blocks import Claim
from fastconv.seeding import seed_of
from fastconv.stats.bounds import exact_spearman, spearman_attainable
from fastconv.stats.gates import GateVerdict
from fastconv.stats.inference import Interval
from fastconv.stats.power import QuestionSupply, remedy_text
from fastconv.stats.units import Unit, change, counted, first_few, interval_text, level, signed, size_text
from fastconv.stats.verdicts import CellVerdict, count_by_kind

#: Kinds of verdicts of declared contrasts, in the order in which sentences list them.
KINDS = ("transfer", "reverse", "generic", "equivalent", "inconclusive", "uninformative", "withheld")
#: Verdicts of pilot gates by precedence, each with the opening of the answer and the words for its subjects.
PILOT_WORDS = {
    "go": ("GO", "go for"), "stop": ("STOP", "stop for"), "not applicable": ("OPEN", "not decided yet for"),
    "uninformative": ("NO ANSWER", "nothing can be said of"),
    "no contrast": ("NO CONTRAST", "the grid has epoch zero alone, so nothing is decided for"),
}  # fmt: skip
MOST_NAMED = 4


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
    except (KeyError, StopIteration, TypeError) as error:
        raise NoSuchClaimError(f"{query} of {', '.join(arguments.values()) or 'the run'}: no rows") from error
    return Claim(query, arguments, claim_template.template.format_map(result.values), result.rows, result.word)


def _answer(analysis: Analysis) -> QueryResult:
    """Go or stop, and the confidence: the pilot gates' verdicts, then what the declared contrasts add."""
    pilots = [gate for gate in analysis.gates if gate.gate == "PILOT"]
    by_word = {word: [gate.subject for gate in pilots if gate.verdict == word] for word in PILOT_WORDS}
    word = next(word for word, subjects in by_word.items() if subjects)
    details = "; ".join(
        _listed(some)
        if verdict_word in ("go", "stop") and verdict_word == word
        else f"{PILOT_WORDS[verdict_word][1]} {_listed(some)}"
        for verdict_word, some in by_word.items()
        if some
    )
    rows = dict.fromkeys(row for verdict_word in (*pilots, *analysis.verdicts) for row in verdict_word.rows)
    return QueryResult(
        {"word": PILOT_WORDS[word][0], "told": details, "sure": _how_sure(analysis.verdicts, len(analysis.declared))},
        tuple(rows),
        word,
    )


def _how_sure(verdicts: Sequence[CellVerdict], n: int) -> str:
    """Summary of the n declared contrasts, with the confidence of the most certain one."""
    counts = count_by_kind(verdicts)
    if not n:
        return "the recipe declares no contrast"
    if not verdicts:
        return "no declared contrast was measured yet"
    leading_kind = next((kind for kind in ("transfer", "reverse") if counts.get(kind)), None)
    best = max((verdict for verdict in verdicts if leading_kind in (None, verdict.kind)), key=_certainty)
    sure = f"confidence {best.confidence.level} ({best.confidence.reason})"
    if leading_kind is not None:
        verb = "is" if counts[leading_kind] == 1 else "are"
        figures = f"{change(best.estimate or 0.0, best.unit)} {interval_text(best.low, best.high, best.unit)}".rstrip()
        return f"{counts[leading_kind]} of {n} declared contrasts {verb} {leading_kind}, the surest {best.label} by {figures} with {sure}"
    counts_text = _told(counts, n)
    if counts.get("equivalent", 0) == n:
        meaning = "each is shown to lie within its threshold"
    elif counts.get("equivalent"):
        meaning = "only those called equivalent show that nothing happened"
    else:
        meaning = "none shows that nothing happened either"
    return f"none of {n} declared contrasts is transfer ({counts_text}); {meaning}; {sure}"


def _told(counts: Mapping[str, int], n: int) -> str:
    """Number of the n declared contrasts with each verdict, and of those not measured."""
    waiting = n - sum(counts.values())
    return ", ".join(f"{many} {kind}" for kind in KINDS if (many := counts.get(kind))) + (
        f", {waiting} not measured" if waiting else ""
    )


def _certainty(verdict: CellVerdict) -> tuple[int, float]:
    return ("LOW", "MODERATE", "HIGH").index(verdict.confidence.level), abs(verdict.estimate or 0.0)


def _listed(subjects: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return first_few(subjects, MOST_NAMED)


def _pilot(analysis: Analysis, subject: str) -> QueryResult:
    verdict = next(gate for gate in analysis.gates if gate.gate == "PILOT" and gate.subject == subject)
    return QueryResult(_gate_values(verdict), verdict.rows, verdict.verdict)


def _study(analysis: Analysis, gate: str, subject: str) -> QueryResult:
    verdict = next(
        gate_verdict for gate_verdict in analysis.gates if (gate_verdict.gate, gate_verdict.subject) == (gate, subject)
    )
    return QueryResult({**_gate_values(verdict), "gate": gate}, verdict.rows, verdict.verdict)


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


def _largest(analysis: Analysis, behavior: str) -> QueryResult:
    of_behavior = [
        verdict for verdict in analysis.verdicts if verdict.behavior == behavior and verdict.estimate is not None
    ]
    informative = [verdict for verdict in of_behavior if verdict.kind != "uninformative"] or of_behavior
    largest = max(informative, key=lambda verdict: abs(verdict.estimate or 0.0), default=None)
    if largest is None or largest.estimate is None:
        raise KeyError(behavior)
    figures = (
        f"{change(largest.estimate, largest.unit)} {interval_text(largest.low, largest.high, largest.unit)}".rstrip()
    )
    values = {"behavior": behavior, "figures": figures, "label": largest.label, "kind": largest.kind}
    return QueryResult({**values, "confidence": largest.confidence.level}, largest.rows)


def _mimicry(analysis: Analysis, label: str) -> QueryResult:
    verdict = analysis.verdict(label)
    if verdict.trained is None or verdict.estimate is None:
        raise KeyError(label)
    alone = "was not measured" if verdict.mimicry is None else _interval(verdict.mimicry, verdict.unit)
    values = {"label": label, "alone": alone, "trained": _interval(verdict.trained, verdict.unit)}
    return QueryResult({**values, "extra": change(verdict.estimate, verdict.unit)}, verdict.rows)


def _edited(analysis: Analysis, gate: str, subject: str) -> QueryResult:
    now = next(
        gate_verdict for gate_verdict in analysis.gates if (gate_verdict.gate, gate_verdict.subject) == (gate, subject)
    )
    before = next(
        gate_verdict
        for gate_verdict in analysis.under_first[0]
        if (gate_verdict.gate, gate_verdict.subject) == (gate, subject)
    )
    values = {"gate": gate, "subject": subject, "now": now.verdict, "before": before.verdict}
    return QueryResult(values, now.rows or before.rows, "edited")


def _edited_finding(analysis: Analysis, label: str) -> QueryResult:
    now = analysis.verdict(label)
    before = next(verdict for verdict in analysis.under_first[1] if verdict.label == label)
    return QueryResult({"label": label, "now": now.kind, "before": before.kind}, now.rows, "edited")


def _power(analysis: Analysis, behavior: str) -> QueryResult:
    verdicts = [
        verdict for verdict in analysis.verdicts if verdict.behavior == behavior and verdict.detectable is not None
    ]
    worst = max(verdicts, key=lambda verdict: verdict.detectable or 0.0)
    unit, margin = worst.unit, worst.margin or 0.0
    detectable, family = worst.detectable or 0.0, worst.detectable_in_family or 0.0
    there_are = _questions_there_are(analysis, behavior)
    supply = QuestionSupply(there_are, worst.n_questions, detectable, lambda size: size_text(size, unit))
    mend = (
        "so a null result says something"
        if detectable <= margin
        else f"so a null result says little; {remedy_text(worst.mend, supply)}"
    )
    values = {
        "behavior": behavior, "margin": size_text(margin, unit), "seen": size_text(detectable, unit), "family": size_text(family, unit),
        "m": str(len(analysis.declared)), "n": str(worst.n_questions),
        "mend": mend,
    }  # fmt: skip
    return QueryResult(values, _together(verdicts), "" if detectable <= margin else "withheld")


def _runs(analysis: Analysis, behavior: str) -> QueryResult:
    """What stands for the noise from run to run in a behavior's intervals: the figure of its fewest seeds."""
    verdicts = [verdict for verdict in analysis.verdicts if verdict.behavior == behavior and verdict.run_spread]
    texts = list(dict.fromkeys(verdict.runs_text for verdict in verdicts))
    return QueryResult({"behavior": behavior, "runs": first_few(texts, 2, "; ")}, _together(verdicts))


def _questions_there_are(analysis: Analysis, behavior: str) -> int:
    """Number of questions that there are for a behavior's verdicts, asked or not."""
    about = analysis.graph.behaviors[behavior]
    if about.spec.measure == "letters":
        return len(analysis.graph.questions.eval)
    return next(iter(n_eval_prompts_there_are(about)), 0)


def _sign_flips(analysis: Analysis, behavior: str) -> QueryResult:
    """The warning for a behavior whose fewest questions cannot reach the corrected level by sign flips."""
    verdicts = [verdict for verdict in analysis.verdicts if verdict.behavior == behavior and verdict.sign_flip_warning]
    fewest = min((verdict.n_questions, verdict.sign_flip_warning or "") for verdict in verdicts) if verdicts else None
    if fewest is None:
        raise KeyError(behavior)
    return QueryResult({"behavior": behavior, "why": fewest[1]}, _together(verdicts), "withheld")


def _correlation(analysis: Analysis, behavior: str, correlate: str = MARKER_RATE) -> QueryResult:
    rates, transfer = levels(analysis, correlate, behavior), transfer_by_source(analysis, behavior)
    sources = sorted(set(rates) & set(transfer))
    rng = np.random.default_rng(seed_of("spearman", behavior))
    if len(sources) < 3:
        raise KeyError(behavior)
    xs, ys = [rates[source].value for source in sources], [transfer[source].estimate or 0.0 for source in sources]
    rows = tuple(row for source in sources for row in (*rates[source].rows, *transfer[source].rows))
    values = {"figures": rank_correlation(xs, ys, rng), "n": str(len(sources)), "correlate": in_words(correlate)}
    return QueryResult({**values, "behavior": behavior}, rows)


def rank_correlation(xs: Sequence[float], ys: Sequence[float], rng: np.random.Generator | None = None) -> str:
    """Exact Spearman correlation of one value per source, as text."""
    correlation = exact_spearman(xs, ys, rng=rng)
    if correlation.rho is None or correlation.p is None:
        return f"cannot be given: {correlation.reason}"
    low, high = (signed(end or 0.0, 2) for end in (correlation.leave_one_out_low, correlation.leave_one_out_high))
    left_out = f"{low} to {high} with one source left out"
    return f"{signed(correlation.rho, 2)} (exact permutation p = {correlation.p:.3g}; {left_out})"


def _attainable(analysis: Analysis, correlate: str = MARKER_RATE) -> QueryResult:
    behaviors = [name for name in analysis.graph.behaviors if name != MARKER]  # whether measured or not
    rates = {
        source: source_level for name in behaviors for source, source_level in levels(analysis, correlate, name).items()
    }
    sources = [source for source in analysis.graph.recipe.grid.sources if source in rates]
    rows = tuple(row for source in sources for row in rates[source].rows)
    named = "a marker rate" if correlate == MARKER_RATE else in_words(correlate).replace("the source's", "their", 1)
    shown = {
        "sources": counted(len(sources), "source"), "behaviors": counted(len(behaviors), "behavior"), "correlate": named,
    }  # fmt: skip
    if len(sources) < 2:
        return QueryResult({**shown, "reason": "there is nothing to correlate with one another"}, rows, "withheld")
    attainable = spearman_attainable(len(sources), max(1, len(behaviors)))
    return QueryResult({**shown, "reason": attainable.reason}, rows, "" if attainable.possible else "withheld")


def _agreement(analysis: Analysis, measure: str) -> QueryResult:
    result = measure_agreement(analysis, measure)
    kappa = "cannot be given: both always say the same" if np.isnan(result.kappa) else f"{result.kappa:.2f}"
    values = {"measure": measure, "share": level(result.accuracy, "share"), "n": f"{result.n:,}", "kappa": kappa}
    return QueryResult(values, result.rows)


def _corrected(analysis: Analysis, label: str) -> QueryResult:
    raw, corrected, rows = corrected_assistant_rate(analysis, label)
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
    return tuple(dict.fromkeys(row for verdict in verdicts for row in verdict.rows))


CLAIMS: Mapping[str, ClaimTemplate] = {
    "answer": ClaimTemplate("{word}: {told}. How sure: {sure}.", _answer),
    "pilot": ClaimTemplate("{verdict} for {subject}: {reason}. Rule: {rule}.{ignored}", _pilot),
    "study": ClaimTemplate("{gate}, {subject}: {verdict}. {reason}. Rule: {rule}.{ignored}", _study),
    "counts": ClaimTemplate("Declared contrasts: {n}. Of these {told}.", _counts),
    "finding": ClaimTemplate("{kind}: {reason}.{seeds} Confidence {confidence}: {why}.", _finding),
    "largest": ClaimTemplate("The largest change of {behavior} is {figures}, in {label}: {kind}, confidence {confidence}.", _largest),
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
