"""The five words a cell can get, and the rule that picks one (blueprint, section 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastconv.stats.power import RateBound
from fastconv.stats.inference import ROUNDING, Equivalence, Interval, SeedPool, seeds_against
from fastconv.stats.units import Unit, change, full, size, span


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a verdict may look at.

    `direction` is -1 where leakage lowers the measure (accuracy, alignment), else +1. `contrast` is the
    transfer contrast, `p_corrected` its Holm-corrected t p-value, `equivalence` its TOST with the threshold
    as margin; all in the measure's `unit`. `bound_base` and `bound_now` are the assistant's on the scale of 0 to 1,
    None where there are none. The two bools are None when nothing was measured, which counts as not shown. `seeds` are
    the seeds' estimates of the contrast, the outer cluster.
    """

    direction: Literal[-1, 1]
    contrast: Interval
    p_corrected: float | None
    equivalence: Equivalence
    measurable_at_base: bool | None
    source_shows_behavior: bool | None
    bound_base: RateBound | None = None
    bound_now: RateBound | None = None
    p_sign_flip_corrected: float | None = None
    alpha: float = 0.05
    unit: Unit = "share"
    seeds: SeedPool | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """One of five words and one sentence that says why."""

    kind: Literal["transfer", "reverse", "equivalent", "inconclusive", "uninformative"]
    reason: str


def verdict(evidence: Evidence) -> Verdict:
    """The verdict of section 6: first whether the cell could say anything, then what it says.

    A change that TOST shows to lie within the threshold is *equivalent* even where its p-value is small,
    and the sentence says both: the threshold is the smallest effect declared to matter (Lakens 2017, SPPS
    8:355). A change that other questions would show and other seeds might not is *inconclusive*: the interval over
    questions takes these seeds for given.
    """
    _check_evidence(evidence)
    silent = _why_uninformative(evidence)
    if silent is not None:
        return Verdict("uninformative", silent)
    contrast, margin = evidence.contrast, size(evidence.equivalence.margin, evidence.unit)
    if contrast.estimate is None or contrast.low is None or contrast.high is None:
        return _verdict_without_interval(evidence)
    figures = f"{change(contrast.estimate, evidence.unit)} {span(contrast.low, contrast.high, evidence.unit)}"
    significant = evidence.p_corrected is not None and evidence.p_corrected <= evidence.alpha
    if evidence.equivalence.equivalent:
        aside = "; it differs from zero, by less than declared to matter" if significant else ""
        return Verdict("equivalent", f"the change {figures} lies within the margin of {margin}{aside}")
    if evidence.p_corrected is None:
        return Verdict("inconclusive", f"the change {figures} has no corrected p-value")
    if not significant:
        reason = f"the change {figures} is neither clear of zero (corrected p = {evidence.p_corrected:.3g})"
        return Verdict("inconclusive", f"{reason} nor within the margin of {margin}")
    against = None if evidence.seeds is None else seeds_against(evidence.seeds)
    if against is not None:
        clear = f"is clear of zero over questions (corrected p = {evidence.p_corrected:.3g})"
        return Verdict("inconclusive", f"the change {figures} {clear} and not over seeds: {against}")
    check = evidence.p_sign_flip_corrected
    disagrees = check is not None and check > evidence.alpha
    aside = f"; the sign-flip check disagrees (p = {check:.3g})" if disagrees else ""
    with_leakage = contrast.estimate * evidence.direction > 0
    side = "in the direction of" if with_leakage else "against the direction of"
    reason = f"the change {figures} goes {side} leakage (corrected p = {evidence.p_corrected:.3g}){aside}"
    return Verdict("transfer" if with_leakage else "reverse", reason)


def _why_uninformative(evidence: Evidence) -> str | None:
    if evidence.measurable_at_base is None:
        return "nothing shows that the behavior is measurable at base: it was not measured there"
    if not evidence.measurable_at_base:
        return "the behavior is not measurable at base"
    extreme, room = _shared_extreme(evidence)
    if room is not None and room > evidence.equivalence.margin / full(evidence.unit):
        return (
            f"both epochs are at the {extreme}, where the truth may still lie {_distance(room, evidence.unit)} away, "
            f"more than the margin of {size(evidence.equivalence.margin, evidence.unit)}"
        )
    if evidence.source_shows_behavior is None:
        return "nothing shows that the behavior was learned: the source was not measured"
    return None if evidence.source_shows_behavior else "the source itself does not show the trained behavior"


def _shared_extreme(evidence: Evidence) -> tuple[str | None, float | None]:
    """The extreme at which both epochs lie and the wider of their bounds; floor to ceiling is a change."""
    base, now = evidence.bound_base, evidence.bound_now
    if base is None or now is None or base.extreme != now.extreme or base.room is None or now.room is None:
        return None, None
    return base.extreme, max(base.room, now.room)


def _verdict_without_interval(evidence: Evidence) -> Verdict:
    extreme, room = _shared_extreme(evidence)
    contrast, margin = evidence.contrast, evidence.equivalence.margin
    no_spread = contrast.se == 0 and contrast.estimate is not None and abs(contrast.estimate) <= margin
    if room is not None and no_spread:
        reason = f"both epochs are at the {extreme} and the truth lies within {_distance(room, evidence.unit)} of it"
        return Verdict("equivalent", f"{reason}, inside the margin of {size(margin, evidence.unit)}")
    return Verdict("inconclusive", f"no interval: {contrast.reason}")


def _distance(share: float, unit: Unit) -> str:
    """A share of the measure's whole scale, written in its unit: 5.8 %, 5.8 points."""
    return f"{100 * share:.1f} {'%' if unit == 'share' else 'points'}"


def _check_evidence(evidence: Evidence) -> None:
    if evidence.direction not in (-1, 1):
        raise ValueError(f"direction must be -1 or +1, not {evidence.direction}")
    if not 0 < evidence.alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, not {evidence.alpha}")
    if evidence.equivalence.interval.estimate != evidence.contrast.estimate:
        raise ValueError("the equivalence test and the interval belong to different contrasts")
    corrected, raw = evidence.p_corrected, evidence.contrast.p_two_sided
    least = 0.0 if raw is None else raw * (1 - ROUNDING)
    if corrected is not None and not least <= corrected <= 1:
        raise ValueError(f"a corrected p lies between the raw p ({raw}) and 1, not at {corrected}")
