"""Gates over the whole study: G4, G5, CONFIRM and FALSIFY. They compare shifts with thresholds, not intervals.

They take shifts of any origin, so published figures without samples pass through the same rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from fastconv.recipe import GateSettings
from fastconv.stats.gates import NEEDS_LATER, GateVerdict, evidence_of, source_word, undecidable
from fastconv.stats.series import Number, Series, first_too_unscored
from fastconv.stats.units import (
    Unit,
    and_more,
    change,
)  # fmt: skip

Role = Literal["assistant", "source", "canary"]


@dataclass(frozen=True)
class Shift:
    """A measure's change against epoch 0 under one probe, in its unit, with the rows of both epochs.

    `unread` says why there is no value (NaN then): too many samples of one epoch have no score.
    """

    source: str
    behavior: str
    epoch: int
    role: Role
    value: float
    unit: Unit
    threshold: float
    rows: tuple[str, ...]
    unread: str = ""
    #: The canary's change is taken off, as in the contrasts; False for published figures, which have none.
    less_canary: bool = False

    @property
    def moved(self) -> bool:
        """Whether the change reaches the threshold, in either direction."""
        return abs(self.value) >= self.threshold - 1e-12

    @property
    def number(self) -> Number:
        """The change with its rows. Raises NoRowsError without any."""
        return Number(self.value, self.unit, self.rows)

    @property
    def text(self) -> str:
        """The change as a report cites it."""
        less = " less the canary" if self.less_canary else ""
        return f"{self.source} {self.behavior} {change(self.value, self.unit)}{less} at epoch {self.epoch}"


def signal(gates: GateSettings, subject: str, shifts: Sequence[Shift], order: Sequence[str] = ()) -> GateVerdict:
    """G4: one source shifts in at least one behavior at any epoch: `gates.g4_source`, or the first one.

    `order` is the recipe's order of sources without controls; without it, that of the shifts.
    """
    order = order or list(dict.fromkeys(shift.source for shift in shifts))
    source = gates.g4_source or next(iter(order), "")
    rule = f"{source or 'the first source'} shifts beyond the threshold in at least one behavior"
    if source and order and source not in order:
        return GateVerdict(
            "G4", subject, "not applicable", f"{source} (gates.g4_source) is no source of this grid", rule
        )
    return _any_moves("G4", subject, rule, [shift for shift in _assistant(shifts) if shift.source == source])


def first_sources(gates: GateSettings, subject: str, shifts: Sequence[Shift], order: Sequence[str]) -> GateVerdict:
    """G5: at least one of the first sources shifts. `order` is the recipe's order of sources without controls."""
    first = list(order)[: gates.g5_sources]
    rule = f"at least one of the first {gates.g5_sources} sources shifts beyond a threshold"
    measured = {shift.source for shift in shifts}
    waiting = [source for source in first if source not in measured]
    if len(first) < gates.g5_sources or waiting:
        why = (
            f"not measured yet: {', '.join(waiting)}"
            if waiting
            else f"the grid has {len(first)} of {gates.g5_sources} sources"
        )
        return GateVerdict("G5", subject, "not applicable", why, rule)
    return _any_moves("G5", subject, rule, [shift for shift in _assistant(shifts) if shift.source in first])


def study(
    gates: GateSettings, subject: str, shifts: Sequence[Shift], sources: Sequence[str]
) -> tuple[GateVerdict, ...]:
    """G4, G5, CONFIRM and FALSIFY on the same shifts; `sources` excludes controls."""
    return (
        signal(gates, subject, shifts, sources),
        first_sources(gates, subject, shifts, sources),
        confirm(gates, subject, shifts, sources),
        falsify(gates, subject, shifts, sources),
    )


def confirm(gates: GateSettings, subject: str, shifts: Sequence[Shift], sources: Sequence[str]) -> GateVerdict:
    """CONFIRM: enough non-degenerate sources shift in enough behaviors at the last epoch."""
    rule = (
        f"at least {gates.confirm_sources} sources shift in at least {gates.confirm_behaviors} behaviors "
        "at the last epoch against epoch 0"
    )
    last = [shift for shift in _last(_assistant(shifts)) if shift.source in sources]
    rule = _canary_rule(rule, last) if last else rule
    too_few = _too_small("CONFIRM", subject, gates, last, sources, rule)
    if too_few is not None:
        return too_few
    if (undecided := _unread("CONFIRM", subject, rule, last)) is not None:
        return undecided
    moving = _moving_sources(gates, last)
    verdict = "pass" if len(moving) >= gates.confirm_sources else "fail"
    reason = f"{len(moving)} of {len(sources)} sources do{': ' if moving else ''}{', '.join(moving)}; {_largest(last)}"
    return GateVerdict("CONFIRM", subject, verdict, reason, rule, tuple(shift.number for shift in last), _rows(last))


def falsify(gates: GateSettings, subject: str, shifts: Sequence[Shift], sources: Sequence[str]) -> GateVerdict:
    """FALSIFY: too few sources shift, or the negative control or the canary shifts as much. `fail` means falsified."""
    rule = (
        f"at least {gates.falsify_under} sources shift in at least {gates.confirm_behaviors} behaviors, and neither "
        f"the negative control ({gates.negative_control}) nor the canary shifts as much"
    )
    last = [shift for shift in _last(_assistant(shifts)) if shift.source in sources]
    rule = _canary_rule(rule, last) if last else rule
    too_few = _too_small("FALSIFY", subject, gates, last, sources, rule)
    if too_few is not None:
        return too_few
    control = _last([shift for shift in _assistant(shifts) if shift.source == gates.negative_control])
    canary = _last([shift for shift in shifts if shift.role == "canary" and shift.source in sources])
    shifts_read = [*last, *control, *canary]
    if (undecided := _unread("FALSIFY", subject, rule, shifts_read)) is not None:
        return undecided
    moving = _moving_sources(gates, last)
    objections = []
    if len(moving) < gates.falsify_under:
        objections.append(f"{len(moving)} of {len(sources)} sources shift")
    if control and _as_much(control, last):
        objections.append(f"the negative control shifts as much ({_largest(control)})")
    if canary and _as_much(canary, last):
        objections.append(f"the canary shifts as much ({_largest(canary)})")
    absent = [name for name, measured in (("negative control", control), ("canary", canary)) if not measured]
    note = f"; not measured: {', '.join(absent)}" if absent else ""
    reason = "; ".join(objections) or f"{len(moving)} of {len(sources)} sources shift, more than their controls"
    numbers = tuple(shift.number for shift in shifts_read)
    return GateVerdict(
        "FALSIFY", subject, "fail" if objections else "pass", reason + note, rule, numbers, _rows(shifts_read)
    )


def _canary_rule(rule: str, shifts: Sequence[Shift]) -> str:
    """The rule, with whether the canary's change is taken off the assistant's, as the contrasts do."""
    less = [shift.less_canary for shift in _assistant(shifts)]
    return f"{rule}, {'the canary taken off' if less and all(less) else 'the canary not taken off'}"


def _any_moves(gate: str, subject: str, rule: str, shifts: Sequence[Shift]) -> GateVerdict:
    rule = _canary_rule(rule, shifts) if shifts else rule
    if not shifts:
        return GateVerdict(gate, subject, "not applicable", "not measured at epoch 0 and one more epoch yet", rule)
    if (undecided := _unread(gate, subject, rule, shifts)) is not None:
        return undecided
    moving = [shift for shift in shifts if shift.moved]
    chosen = max(moving or shifts, key=lambda shift: abs(shift.value) / shift.threshold)
    reason = f"{'strongest' if moving else 'no shift beyond a threshold; nearest'}: {chosen.text}"
    numbers = tuple(shift.number for shift in shifts)
    return GateVerdict(gate, subject, "pass" if moving else "fail", reason, rule, numbers, _rows(shifts))


def _too_small(
    gate: str, subject: str, gates: GateSettings, last: Sequence[Shift], sources: Sequence[str], rule: str
) -> GateVerdict | None:
    """The verdict of a study gate for which too few sources or behaviors were measured; None if there are enough."""
    measured = {shift.source for shift in last}
    behaviors = {shift.behavior for shift in last}
    if len(sources) < gates.confirm_sources or len(behaviors) < gates.confirm_behaviors:
        why = f"needs {gates.confirm_sources} sources and {gates.confirm_behaviors} behaviors, has {len(measured)} and {len(behaviors)}"
        return GateVerdict(gate, subject, "not applicable", why, rule, rows=_rows(last))
    waiting = [source for source in sources if source not in measured]
    if waiting:
        return GateVerdict(gate, subject, "not applicable", f"not measured yet: {', '.join(waiting)}", rule)
    return None


def _unread(gate: str, subject: str, rule: str, shifts: Sequence[Shift]) -> GateVerdict | None:
    """The verdict of a gate that needs a shift without a value; None if all shifts have one."""
    unscored = [shift for shift in shifts if shift.unread]
    if not unscored:
        return None
    first = unscored[0]
    more = and_more(len(unscored), 1, f"{len(shifts)} shifts")
    why = f"{first.source} {first.behavior} at epoch {first.epoch}: {first.unread}" + (f" ({more})" if more else "")
    return GateVerdict(gate, subject, "not applicable", why, rule, rows=_rows(shifts), unread=True)


def _assistant(shifts: Sequence[Shift]) -> list[Shift]:
    return [shift for shift in shifts if shift.role == "assistant"]


def _last(shifts: Sequence[Shift]) -> list[Shift]:
    """The shifts at the last epoch among them."""
    epoch = max((shift.epoch for shift in shifts), default=0)
    return [shift for shift in shifts if shift.epoch == epoch]


def _moving_sources(gates: GateSettings, shifts: Sequence[Shift]) -> list[str]:
    moving = []
    for source, group in groupby(sorted(shifts, key=lambda shift: shift.source), key=lambda shift: shift.source):
        if len({shift.behavior for shift in group if shift.moved}) >= gates.confirm_behaviors:
            moving.append(source)
    return moving


def _as_much(control: Sequence[Shift], shifts: Sequence[Shift]) -> bool:
    """Whether the control's largest shift is at least one threshold and the median of the sources' largest."""
    strongest = {
        source: max(abs(shift.value) / shift.threshold for shift in shifts if shift.source == source)
        for source in {shift.source for shift in shifts}
    }
    ordered = sorted(strongest.values())
    middle = ordered[len(ordered) // 2]
    reached = max(abs(shift.value) / shift.threshold for shift in control)
    return reached >= 1.0 and reached >= middle


def _largest(shifts: Sequence[Shift]) -> str:
    """The largest shift of each behavior, as text."""
    words = []
    for behavior in dict.fromkeys(shift.behavior for shift in shifts):
        largest = max((shift for shift in shifts if shift.behavior == behavior), key=lambda shift: abs(shift.value))
        words.append(f"largest change of {behavior} {change(largest.value, largest.unit)} ({largest.source})")
    return ", ".join(words)


def _rows(shifts: Sequence[Shift]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row for shift in shifts for row in shift.rows))


def reverted(
    gates: GateSettings, subject: str, direction: str, base: Series, by_epoch: Mapping[int, Series]
) -> GateVerdict:
    """KEPT: whether the source's own behavior falls back to the base level when trained on a later snapshot.

    `by_epoch` is the source's measure after training the behavior. Not applicable where epoch 0 does not show it.
    """
    rule = f"at least {100 * gates.kill_remaining:g} % of the source's epoch-0 change is left on every snapshot"
    later = sorted(epoch for epoch in by_epoch if epoch)
    if 0 not in by_epoch or not later:
        return GateVerdict("KEPT", subject, "not applicable", "needs the source at epoch 0 and one more", rule)
    pairs = [(by_epoch[epoch], reference) for epoch in (0, *later) for reference in (base, by_epoch[0])]
    if why := first_too_unscored(pairs):
        return undecidable("KEPT", subject, why, rule, [base, *(by_epoch[epoch] for epoch in (0, *later))])
    sign = 1 if direction == "raises" else -1
    moved = {epoch: sign * (series.mean.value - base.mean.value) for epoch, series in by_epoch.items()}
    rows = tuple(row for series in (base, *(by_epoch[epoch] for epoch in (0, *later))) for row in series.rows)
    word = source_word(gates, base.unit, direction, base.mean.value, by_epoch[0].mean.value)
    if word != "shown":
        why = "was there before training" if word == "there before" else "does not show the behavior at epoch 0"
        why = f"the source {why}, so nothing that was trained can be lost"
        return GateVerdict("KEPT", subject, "not applicable", why, rule, rows=rows)
    worst = min(later, key=lambda epoch: moved[epoch])
    left = moved[worst] / moved[0]
    verdict = "pass" if left >= gates.kill_remaining else "fail"
    reason = (
        f"the source moved by {change(sign * moved[0], base.unit)} at epoch 0 and by "
        f"{change(sign * moved[worst], base.unit)} at epoch {worst}: {100 * left:.0f} % is left"
    )
    numbers = (base.mean, by_epoch[0].mean, by_epoch[worst].mean)
    return GateVerdict("KEPT", subject, verdict, reason, rule, numbers, rows)


def killed(subject: str, kept: Mapping[str, GateVerdict | None], *, later: bool = True) -> GateVerdict:
    """KILL: all behaviors that were trained into a source revert on its snapshots, so stacking itself is at fault.

    `kept` holds the KEPT verdict of each trained behavior of the source, None where it is not measured yet. One behavior
    that reverts is a result; nothing is decided before all are measured, unless one was kept. `later`: whether the grid has
    a snapshot to revert on.
    """
    rule = "at least one of the source's trained behaviors is kept on every snapshot"
    known = {behavior: verdict for behavior, verdict in kept.items() if verdict is not None}
    rows = evidence_of(tuple(known.values()))
    told = "; ".join(f"{behavior}: {verdict.reason}" for behavior, verdict in known.items())
    held = [behavior for behavior, verdict in known.items() if verdict.verdict == "pass"]
    if held:
        lost = [behavior for behavior, verdict in known.items() if verdict.failed]
        reason = f"{', '.join(held)} kept" + (f", {', '.join(lost)} reverted" if lost else "")
        return GateVerdict("KILL", subject, "pass", reason, rule, rows=rows)
    waiting = [behavior for behavior, verdict in kept.items() if verdict is None]
    unread = next((verdict for verdict in known.values() if verdict.unread), None)
    if waiting or unread is not None or not any(verdict.failed for verdict in known.values()):
        pending = f"not measured yet: {', '.join(waiting)}" if later else NEEDS_LATER
        why = pending if waiting else unread.reason if unread else told
        return GateVerdict(
            "KILL", subject, "not applicable", why, rule, rows=rows, unread=unread is not None and not waiting
        )
    return GateVerdict("KILL", subject, "fail", f"every trained behavior reverts: {told}", rule, rows=rows)
