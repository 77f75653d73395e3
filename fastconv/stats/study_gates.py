"""Rules over the whole study: G4, G5, confirm and falsify. Thresholds decide them; evidence is the interval.

They take shifts and do not ask where these came from, so published figures without samples go through the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from fastconv.recipe import GateSettings
from fastconv.stats.gates import GateVerdict
from fastconv.stats.series import Number
from fastconv.stats.units import Unit, change

Role = Literal["assistant", "source", "canary"]


@dataclass(frozen=True)
class Shift:
    """How far a measure moved against epoch 0 under one probe, in its unit, with the rows of both ends.

    `unread` says why there is no value (NaN then): too many samples of an end have no score.
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

    @property
    def moved(self) -> bool:
        """Beyond the threshold, in either direction."""
        return abs(self.value) >= self.threshold - 1e-12

    @property
    def number(self) -> Number:
        """The change with its rows; cannot be had without any."""
        return Number(self.value, self.unit, self.rows)

    @property
    def text(self) -> str:
        """How it is cited."""
        return f"{self.source} {self.behavior} {change(self.value, self.unit)} at epoch {self.epoch}"


def signal(gates: GateSettings, subject: str, shifts: Sequence[Shift]) -> GateVerdict:
    """G4: the first source shows a signal in at least one behavior at any epoch."""
    rule = f"{gates.g4_source} shifts beyond the threshold in at least one behavior"
    return _any_moves("G4", subject, rule, [one for one in _assistant(shifts) if one.source == gates.g4_source])


def first_sources(gates: GateSettings, subject: str, shifts: Sequence[Shift], order: Sequence[str]) -> GateVerdict:
    """G5: at least one of the first sources shows a signal. `order` is the recipe's, controls left out."""
    first = list(order)[: gates.g5_sources]
    rule = f"at least one of the first {gates.g5_sources} sources shifts beyond a threshold"
    measured = {one.source for one in shifts}
    waiting = [source for source in first if source not in measured]
    if len(first) < gates.g5_sources or waiting:
        why = (
            f"not measured yet: {', '.join(waiting)}"
            if waiting
            else f"the grid has {len(first)} of {gates.g5_sources} sources"
        )
        return GateVerdict("G5", subject, "not applicable", why, rule)
    return _any_moves("G5", subject, rule, [one for one in _assistant(shifts) if one.source in first])


def study(
    gates: GateSettings, subject: str, shifts: Sequence[Shift], sources: Sequence[str]
) -> tuple[GateVerdict, ...]:
    """G4, G5, CONFIRM and FALSIFY on the same shifts; `sources` are those that are no control."""
    return (
        signal(gates, subject, shifts),
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
    last = [one for one in _last(_assistant(shifts)) if one.source in sources]
    short = _too_small("CONFIRM", subject, gates, last, sources, rule)
    if short is not None:
        return short
    if (silent := _unread("CONFIRM", subject, rule, last)) is not None:
        return silent
    moving = _moving_sources(gates, last)
    verdict = "pass" if len(moving) >= gates.confirm_sources else "fail"
    reason = f"{len(moving)} of {len(sources)} sources do{': ' if moving else ''}{', '.join(moving)}; {_largest(last)}"
    return GateVerdict("CONFIRM", subject, verdict, reason, rule, tuple(one.number for one in last), _rows(last))


def falsify(gates: GateSettings, subject: str, shifts: Sequence[Shift], sources: Sequence[str]) -> GateVerdict:
    """FALSIFY: too few sources shift, or the negative control or the canary shifts as much. `fail` is falsified."""
    rule = (
        f"at least {gates.falsify_under} sources shift in at least {gates.confirm_behaviors} behaviors, and neither "
        f"the negative control ({gates.negative_control}) nor the canary shifts as much"
    )
    last = [one for one in _last(_assistant(shifts)) if one.source in sources]
    short = _too_small("FALSIFY", subject, gates, last, sources, rule)
    if short is not None:
        return short
    control = _last([one for one in _assistant(shifts) if one.source == gates.negative_control])
    canary = _last([one for one in shifts if one.role == "canary" and one.source in sources])
    every = [*last, *control, *canary]
    if (silent := _unread("FALSIFY", subject, rule, every)) is not None:
        return silent
    moving = _moving_sources(gates, last)
    faults = []
    if len(moving) < gates.falsify_under:
        faults.append(f"{len(moving)} of {len(sources)} sources shift")
    if control and _as_much(control, last):
        faults.append(f"the negative control shifts as much ({_largest(control)})")
    if canary and _as_much(canary, last):
        faults.append(f"the canary shifts as much ({_largest(canary)})")
    absent = [name for name, found in (("negative control", control), ("canary", canary)) if not found]
    note = f"; not measured: {', '.join(absent)}" if absent else ""
    reason = "; ".join(faults) or f"{len(moving)} of {len(sources)} sources shift, more than their controls"
    numbers = tuple(one.number for one in every)
    return GateVerdict("FALSIFY", subject, "fail" if faults else "pass", reason + note, rule, numbers, _rows(every))


def _any_moves(gate: str, subject: str, rule: str, shifts: Sequence[Shift]) -> GateVerdict:
    if not shifts:
        return GateVerdict(gate, subject, "not applicable", "not measured at epoch 0 and one more epoch yet", rule)
    if (silent := _unread(gate, subject, rule, shifts)) is not None:
        return silent
    moving = [one for one in shifts if one.moved]
    chosen = max(moving or shifts, key=lambda one: abs(one.value) / one.threshold)
    reason = f"{'strongest' if moving else 'no shift beyond a threshold; nearest'}: {chosen.text}"
    numbers = tuple(one.number for one in shifts)
    return GateVerdict(gate, subject, "pass" if moving else "fail", reason, rule, numbers, _rows(shifts))


def _too_small(
    gate: str, subject: str, gates: GateSettings, last: Sequence[Shift], sources: Sequence[str], rule: str
) -> GateVerdict | None:
    """Why a rule over the study cannot be asked of what was measured, if so."""
    measured = {one.source for one in last}
    behaviors = {one.behavior for one in last}
    if len(sources) < gates.confirm_sources or len(behaviors) < gates.confirm_behaviors:
        why = f"needs {gates.confirm_sources} sources and {gates.confirm_behaviors} behaviors, has {len(measured)} and {len(behaviors)}"
        return GateVerdict(gate, subject, "not applicable", why, rule, rows=_rows(last))
    waiting = [source for source in sources if source not in measured]
    if waiting:
        return GateVerdict(gate, subject, "not applicable", f"not measured yet: {', '.join(waiting)}", rule)
    return None


def _unread(gate: str, subject: str, rule: str, shifts: Sequence[Shift]) -> GateVerdict | None:
    """The word of a rule that reads a shift without a value: what the judge left out could have gone either way."""
    silent = [one for one in shifts if one.unread]
    if not silent:
        return None
    first = silent[0]
    more = f" (and {len(silent) - 1} more of {len(shifts)} shifts)" if len(silent) > 1 else ""
    why = f"{first.source} {first.behavior} at epoch {first.epoch}: {first.unread}{more}"
    return GateVerdict(gate, subject, "not applicable", why, rule, rows=_rows(shifts), unread=True)


def _assistant(shifts: Sequence[Shift]) -> list[Shift]:
    return [one for one in shifts if one.role == "assistant"]


def _last(shifts: Sequence[Shift]) -> list[Shift]:
    """The shifts at the last epoch that any of them has."""
    epoch = max((one.epoch for one in shifts), default=0)
    return [one for one in shifts if one.epoch == epoch]


def _moving_sources(gates: GateSettings, shifts: Sequence[Shift]) -> list[str]:
    moving = []
    for source, mine in groupby(sorted(shifts, key=lambda one: one.source), key=lambda one: one.source):
        if len({one.behavior for one in mine if one.moved}) >= gates.confirm_behaviors:
            moving.append(source)
    return moving


def _as_much(control: Sequence[Shift], shifts: Sequence[Shift]) -> bool:
    """Whether the control's strongest shift, in thresholds, reaches the sources' median strongest one and moves."""
    strongest = {
        source: max(abs(o.value) / o.threshold for o in shifts if o.source == source)
        for source in {o.source for o in shifts}
    }
    ordered = sorted(strongest.values())
    middle = ordered[len(ordered) // 2]
    reached = max(abs(one.value) / one.threshold for one in control)
    return reached >= 1.0 and reached >= middle


def _largest(shifts: Sequence[Shift]) -> str:
    """The largest shift of each behavior, in words."""
    words = []
    for behavior in dict.fromkeys(one.behavior for one in shifts):
        mine = max((one for one in shifts if one.behavior == behavior), key=lambda one: abs(one.value))
        words.append(f"largest change of {behavior} {change(mine.value, mine.unit)} ({mine.source})")
    return ", ".join(words)


def _rows(shifts: Sequence[Shift]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row for one in shifts for row in one.rows))
