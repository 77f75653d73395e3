"""The rule for the word of one cell: transfer, reverse, generic, equivalent, inconclusive or uninformative, with its reason.

docs/DESIGN.md, section 6. The numbers come from `stats.verdicts`, which corrects them over the family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastconv.stats.bounds import RateBound
from fastconv.stats.inference import FEWEST_SEEDS, ROUNDING, Equivalence, Interval, SeedPool, seeds_against
from fastconv.stats.units import Unit, change, interval_text, scale_maximum, size_text

#: The words of contrasts, in the order in which sentences list them: first of changes over convergence, then of sides.
Kind = Literal["transfer", "reverse", "generic", "stronger", "weaker", "equivalent", "inconclusive", "uninformative"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Input of the verdict rule for one cell.

    `direction` is -1 where leakage lowers the measure (accuracy, alignment), else +1. `contrast` is the transfer
    contrast, `p_corrected` its Holm-corrected t p-value, `equivalence` its TOST with the threshold as margin; all in
    the measure's `unit`. `bound_base` and `bound_now` are the assistant's rate bounds, scaled to 0..1, or None. The two
    bools are None when nothing was measured, which counts as not shown. `seeds` pools the seeds' estimates of the
    contrast. `assistant` and `canary` are their own changes against epoch 0; None leaves whose movement it was unasked.
    `source_moved` says what the second bool rests on.
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
    assistant: Interval | None = None
    canary: Interval | None = None
    source_moved: str = ""
    #: Two sides of a contrast are compared, and not epochs: the words are stronger and weaker.
    sides: bool = False

    @property
    def compared(self) -> str:
        """What is compared, in words."""
        return "sides" if self.sides else "epochs"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One of eight kinds and the sentence that explains it."""

    kind: Kind
    reason: str


def verdict(evidence: Evidence) -> Verdict:
    """Apply the rule of section 6: first whether the cell is informative at all, then its kind.

    A change that TOST shows to lie within the threshold is *equivalent* even where its p-value is small, and the reason
    says both: the threshold is the smallest effect declared to matter (Lakens 2017, SPPS 8:355). A change that is clear
    of zero over questions but not over seeds is *inconclusive*: the interval over questions is conditional on these
    seeds; nor is anything *equivalent* whose interval over seeds leaves the margin. *transfer* and *reverse* are said of
    the assistant, so its own change must go the same way; where the canary moves as much or more, it is *generic*.
    Between two sides of a contrast the words are *stronger* (the first side shows more of the measure, in its direction)
    and *weaker*.

    Raises ValueError for evidence that contradicts itself.
    """
    _check_evidence(evidence)
    uninformative = _why_uninformative(evidence)
    if uninformative is not None:
        return Verdict("uninformative", uninformative)
    contrast, margin = evidence.contrast, size_text(evidence.equivalence.margin, evidence.unit)
    if contrast.estimate is None or contrast.low is None or contrast.high is None:
        return _verdict_without_interval(evidence)
    figures = f"{change(contrast.estimate, evidence.unit)} {interval_text(contrast.low, contrast.high, evidence.unit)}"
    significant = evidence.p_corrected is not None and evidence.p_corrected <= evidence.alpha
    if not evidence.sides and (generic := _why_generic(evidence, significant=significant)) is not None:
        return Verdict("generic", generic)
    beyond = _seeds_beyond_margin(evidence)
    if evidence.equivalence.equivalent and not beyond:
        aside = "; it differs from zero, by less than declared to matter" if significant else ""
        return Verdict("equivalent", f"the change {figures} lies within the margin of {margin}{aside}")
    if evidence.p_corrected is None:
        return Verdict("inconclusive", f"the change {figures} has no corrected p-value")
    against = None if evidence.seeds is None else seeds_against(evidence.seeds)
    if not significant:
        reason = f"the change {figures} is neither clear of zero (corrected p = {evidence.p_corrected:.3g})"
        return Verdict(
            "inconclusive", f"{reason} nor within the margin of {margin}{beyond}{f'; {against}' if against else ''}"
        )
    if against is not None:
        clear = f"is clear of zero over questions (corrected p = {evidence.p_corrected:.3g})"
        return Verdict("inconclusive", f"the change {figures} {clear} and not over seeds: {against}")
    check = evidence.p_sign_flip_corrected
    disagrees = check is not None and check > evidence.alpha
    aside = f"; the sign-flip check disagrees (p = {check:.3g})" if disagrees else ""
    with_leakage = contrast.estimate * evidence.direction > 0
    own = evidence.assistant
    if own is not None and not _moves(own, 1 if contrast.estimate > 0 else -1):
        return Verdict(
            "inconclusive",
            f"the difference {figures} is not the assistant's own movement, which is {_figures(own, evidence.unit)}",
        )
    if evidence.sides:
        more = "more" if with_leakage else "less"
        reason = f"the first side shows {more} of it than the second: {figures} (corrected p = {evidence.p_corrected:.3g}){aside}"
        return Verdict("stronger" if with_leakage else "weaker", reason)
    side = "in the direction of" if with_leakage else "against the direction of"
    reason = f"the change {figures} goes {side} leakage (corrected p = {evidence.p_corrected:.3g}){aside}"
    return Verdict("transfer" if with_leakage else "reverse", reason)


def _moves(interval: Interval, direction: int) -> bool:
    """Whether a change is clear of zero in a direction (+1 or -1), uncorrected."""
    end = interval.low if direction > 0 else interval.high
    return end is not None and end * direction > 0


def _figures(interval: Interval, unit: Unit) -> str:
    """An estimate with its interval."""
    if interval.estimate is None:
        return "not known"
    return f"{change(interval.estimate, unit)} {interval_text(interval.low, interval.high, unit)}".rstrip()


def _why_generic(evidence: Evidence, *, significant: bool) -> str | None:
    """Why the change is generic: the canary moves with leakage too, as much as the assistant (within the margin) or more.

    The canary's change is clear of zero and no smaller than the margin, and the difference is no transfer. Either the assistant's change is clear as well, or the canary's is clearly the larger and the
    assistant's not clearly the other way.
    """
    own, canary, toward = evidence.assistant, evidence.canary, evidence.direction
    estimates = [None if moved is None else moved.estimate for moved in (own, canary, evidence.contrast)]
    if own is None or canary is None or None in estimates:
        return None
    ours, its, difference = (toward * (value or 0.0) for value in estimates)
    margin = evidence.equivalence.margin
    both = _moves(own, toward) and ours >= margin
    clear = significant and difference < 0
    if not (_moves(canary, toward) and its >= margin) or (significant and difference > 0):
        return None
    if not (both and ours <= its + margin) and not (clear and not _moves(own, -toward)):
        return None
    return (
        f"the canary moved with leakage as much or more: {_figures(canary, evidence.unit)} against the assistant's "
        f"{_figures(own, evidence.unit)}"
    )


def _seeds_beyond_margin(evidence: Evidence) -> str:
    """That the interval over three seeds or more leaves the margin; empty where it does not, or there is none."""
    pool, margin = evidence.seeds, evidence.equivalence.margin
    if pool is None or pool.n_seeds < FEWEST_SEEDS or pool.interval.low is None or pool.interval.high is None:
        return ""
    if max(-pool.interval.low, pool.interval.high) <= margin:
        return ""
    over = interval_text(pool.interval.low, pool.interval.high, evidence.unit)
    return f" (over {pool.n_seeds} seeds {over})"


def _why_uninformative(evidence: Evidence) -> str | None:
    if evidence.measurable_at_base is None:
        return "nothing shows that the behavior is measurable at base: it was not measured there"
    if not evidence.measurable_at_base:
        return "the behavior is not measurable at base"
    extreme, room = _shared_extreme(evidence)
    if room is not None and room > evidence.equivalence.margin / scale_maximum(evidence.unit):
        return (
            f"both {evidence.compared} are at the {extreme}, where the truth may still lie {_distance(room, evidence.unit)} away, "
            f"more than the margin of {size_text(evidence.equivalence.margin, evidence.unit)}"
        )
    if evidence.source_shows_behavior is None and evidence.sides:
        return "nothing shows that a training took: name a measure that must move in eval.control"
    if evidence.source_shows_behavior is None:
        return "nothing shows that the behavior was learned: the source was not measured"
    if evidence.source_shows_behavior:
        return None
    figures = f" here ({evidence.source_moved})" if evidence.source_moved else ""
    if evidence.sides:
        return f"the positive control is not shown{figures}"
    return f"the source itself does not show the trained behavior{figures}"


def _shared_extreme(evidence: Evidence) -> tuple[str | None, float | None]:
    """The extreme at which both epochs lie and the wider of their bounds; None for floor to ceiling."""
    base, now = evidence.bound_base, evidence.bound_now
    if base is None or now is None or base.extreme != now.extreme or base.room is None or now.room is None:
        return None, None
    return base.extreme, max(base.room, now.room)


def _verdict_without_interval(evidence: Evidence) -> Verdict:
    extreme, room = _shared_extreme(evidence)
    contrast, margin = evidence.contrast, evidence.equivalence.margin
    no_spread = contrast.se == 0 and contrast.estimate is not None and abs(contrast.estimate) <= margin
    if room is not None and no_spread and evidence.equivalence.equivalent is not False:
        reason = f"both {evidence.compared} are at the {extreme} and the truth lies within {_distance(room, evidence.unit)} of it"
        return Verdict("equivalent", f"{reason}, inside the margin of {size_text(margin, evidence.unit)}")
    return Verdict("inconclusive", f"no interval: {contrast.reason}")


def _distance(share: float, unit: Unit) -> str:
    """A share of the measure's whole scale in the measure's unit: 5.8 %, 5.8 points."""
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
