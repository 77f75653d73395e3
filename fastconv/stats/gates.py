"""Pre-registered go/no-go gates G0 to G3.5, STACK, SOURCE, CHANGE, KEPT, KILL and PILOT, and the loss rules of training.

Each verdict names its threshold, its numbers and the ids of the rows behind them. A gate decides whether the run goes
on to spend more compute; what counts as a finding is decided in `stats.verdicts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastconv.recipe import GateSettings
from fastconv.stats.bounds import above_chance
from fastconv.stats.inference import over_runs
from fastconv.stats.power import declared_spread, run_variance
from fastconv.stats.series import Number, Quad, Series, first_too_unscored, too_unscored
from fastconv.stats.units import (
    Unit,
    and_more,
    change,
    counted,
    first_few,
    interval_text,
    level,
    scale_maximum,
    signed,
    size_text,
)  # fmt: skip
from fastconv.stats.verdicts import canary_contrast, change_contrast

Outcome = Literal["pass", "fail", "not applicable"]
SourceWord = Literal["shown", "not shown", "there before"]
#: Why a recipe whose only epoch is 0 decides nothing.
NEEDS_LATER = "needs epoch 0 and one more"
NO_CONTRAST = "the grid has epoch 0 alone, so it declares no contrast"
#: Letters that hold less of the probability than this are an answer that the model mostly would not give.
LEAST_LETTER_MASS = 0.5
#: A pilot gate lists this many changed groups; of more it names only the one with the largest change.
MOST_LISTED = 2


@dataclass(frozen=True)
class GateVerdict:
    """A gate's verdict on one subject. `rows` are the ids of the rows it rests on."""

    gate: str
    subject: str
    verdict: str
    reason: str
    threshold: str
    numbers: tuple[Number, ...] = ()
    rows: tuple[str, ...] = ()
    #: Why a failed gate was ignored on the command line; empty where it was not.
    ignored: str = ""
    #: Too many unscored samples to decide; the verdict is `not applicable`.
    unread: bool = False

    @property
    def failed(self) -> bool:
        """Whether the verdict is `fail` or `stop`."""
        return self.verdict in ("fail", "stop")

    def body(self) -> dict[str, Any]:
        """JSON form for the ledger."""
        return asdict(self)


def undecidable(gate: str, subject: str, why: str, threshold: str, read: Sequence[Series]) -> GateVerdict:
    """A `not applicable` verdict for a gate whose series have too many unscored samples; it carries no numbers."""
    rows = tuple(dict.fromkeys(row for series in read for row in series.evidence_rows))
    return GateVerdict(gate, subject, "not applicable", why, threshold, rows=rows, unread=True)


def measurable(
    gates: GateSettings, behavior: str, direction: str, base: Series, chance: float | None, mass: Series | None = None
) -> GateVerdict:
    """G0: whether the behavior can move on this base, in its declared direction, under the assistant persona.

    Accuracy must lie above chance (one-sided exact binomial test); a rate must have headroom in its direction. `mass` is
    the letters' share of the probability: an accuracy among letters that the base rarely says is told as that.
    """
    by_chance = f"above chance at p < {gates.above_chance_alpha:g}"
    threshold = by_chance if chance is not None else f"at least {100 * gates.headroom:g} points of room"
    if why := too_unscored(base):
        return undecidable("G0", behavior, why, threshold, [base])
    mean = base.mean
    if chance is not None:
        n = len(base.rows)
        n_right = round(mean.value * n)
        test = above_chance(n_right, n, chance, gates.above_chance_alpha)
        verdict: Outcome = "pass" if test.above else "fail"
        reason = (
            f"base accuracy {mean.text()} ({n_right} of {n}) against chance {100 * chance:.1f} % (guessing, or always the "
            f"commonest letter): p = {test.p_one_sided:.3g}"
        )
        if mass is not None:
            reason += f"; {letter_mass_text(mass.mean)}"
        if verdict == "fail":
            reason += "; there is nothing to lose, so nothing is trained"
        numbers = (mean,) if mass is None else (mean, mass.mean)
        return GateVerdict("G0", behavior, verdict, reason, threshold, numbers, base.rows)
    top = scale_maximum(base.unit)
    room = (top - mean.value if direction == "raises" else mean.value) / top
    verdict = "pass" if room >= gates.headroom - 1e-9 else "fail"  # 1 - 0.9 is a little under 0.1
    side = "below the ceiling" if direction == "raises" else "above the floor"
    return GateVerdict(
        "G0", behavior, verdict, f"base level {mean.text()} leaves {100 * room:.1f} points {side}",
        threshold, (mean,), base.rows,
    )  # fmt: skip


def letter_mass_text(mass: Number) -> str:
    """What share of the probability the letters hold, and what that means where it is not the larger part."""
    if mass.value >= LEAST_LETTER_MASS:
        return f"the letters hold {mass.text()} of the probability"
    return f"the letters hold only {mass.text()} of the probability: most answers would begin with something else"


def stacking(subject: str, proofs: Mapping[str, Mapping[str, Any]]) -> GateVerdict:
    """STACK: every evaluated stack differs from the base and reproduces the logits recorded when it was trained.

    `proofs`: evaluation slot -> its outputs (`from_base`, `from_recorded`: largest absolute differences in probe
    logits).
    """
    stacked = {slot: proof for slot, proof in proofs.items() if "from_recorded" in proof}
    lost = [slot for slot, proof in stacked.items() if not proof["from_base"] > 0]
    if not stacked:
        return GateVerdict("STACK", subject, "not applicable", "no stack was evaluated", "logits move")
    least = min(proof["from_base"] for proof in stacked.values())
    furthest = max(proof["from_recorded"] for proof in stacked.values())
    verdict = "fail" if lost else "pass"
    reason = (
        f"{counted(len(stacked), 'evaluation')} had {'its' if len(stacked) == 1 else 'their'} stack in place: it moves the probe's "
        f"logits by at least {least:.3g} and reproduces them within {furthest:.2g}"
    )
    return GateVerdict("STACK", subject, verdict, reason, "every swap moves the logits", rows=tuple(sorted(stacked)))


def reference(gates: GateSettings, source: str, epoch0: Series | None, base: str = "") -> GateVerdict:
    """G3: the assistant's epoch-0 accuracy with `included` negatives lies within the tolerance of the published one.

    Not applicable on another base than `gates.g3_base`; `base` is as `engine.locate.base_name` writes it, "" if it is that one.
    """
    expected = gates.g3_reference_pct.get(source)
    threshold = f"within {gates.g3_tolerance_pp:g} pp of the published figure"
    why = ""
    if expected is None:
        why = "the recipe gives no reference for this source"
    elif base and base != gates.g3_base:
        why = f"the reference is of another base ({gates.g3_base}); this one is {base}"
    elif epoch0 is None:
        why = "no epoch-0 cell with included negatives"
    if why or epoch0 is None or expected is None:
        return GateVerdict("G3", source, "not applicable", why, threshold)
    if why := too_unscored(epoch0):
        return undecidable("G3", source, why, threshold, [epoch0])
    mean = epoch0.mean
    off_pp = 100 * mean.value - expected
    verdict = "pass" if abs(off_pp) <= gates.g3_tolerance_pp else "fail"
    return GateVerdict(
        "G3",
        source,
        verdict,
        f"{mean.text()} against {expected:g} %: {signed(off_pp)} pp",
        threshold,
        (mean,),
        epoch0.rows,
    )


def source_room(unit: Unit, direction: str, base: float) -> float:
    """How far a source could move, in the measure's unit: from its base level to the level that its rows teach.

    That is the scale's end in the behavior's direction: accuracy 0, alignment 0, a rate of 1.
    """
    return scale_maximum(unit) - base if direction == "raises" else base


def source_word(gates: GateSettings, unit: Unit, direction: str, base: float, now: float) -> SourceWord:
    """Whether a source shows what it was trained on, from its mean level at base and now, in the measure's unit.

    `there before`: its base level left less than `gates.source_room` of the scale, and it has not moved away by as much.
    """
    least_room, room = gates.source_room * scale_maximum(unit), source_room(unit, direction, base)
    moved = (now - base) * (1 if direction == "raises" else -1)
    if room < least_room - 1e-9:
        return "not shown" if moved <= -least_room + 1e-9 else "there before"
    return "shown" if moved >= gates.source_shows * room - 1e-9 else "not shown"


def _share(moved: float, room: float) -> str:
    """A share in whole percent, without a signed zero."""
    return f"{round(100 * moved / room) + 0} %"


def source_moved(gates: GateSettings, unit: Unit, direction: str, base: float, now: float) -> str:
    """What `source_word` rests on: the levels, and the share of its room that the source moved beside the share asked."""
    room, moved = source_room(unit, direction, base), (now - base) * (1 if direction == "raises" else -1)
    levels = f"from {level(base, unit)} to {level(now, unit)}"
    return f"{levels}: {_share(moved, room)} of its room, {100 * gates.source_shows:g} % asked" if room > 0 else levels


def source_shows(gates: GateSettings, subject: str, direction: str, base: Series, now: Series) -> GateVerdict:
    """SOURCE: positive control. The source persona must show the trained behavior, or its cell is uninformative.

    What it moved is set against what it could move. Not applicable where it was there before training: then the
    assistant decides.
    """
    unit = now.unit
    threshold = f"moves by at least {100 * gates.source_shows:g} % of its room in the trained direction"
    if why := too_unscored(now, base):
        return undecidable("SOURCE", subject, why, threshold, [base, now])
    sign = 1 if direction == "raises" else -1
    room, moved = source_room(unit, direction, base.mean.value), sign * (now.mean.value - base.mean.value)
    word = source_word(gates, unit, direction, base.mean.value, now.mean.value)
    reason = f"the source went from {base.mean.text()} to {now.mean.text()}"
    small = f"its base level leaves {size_text(room, unit)} of room, under {100 * gates.source_room:g} % of the scale"
    if word == "there before":
        reason = f"the source was there before: {small} ({reason}), so the assistant decides"
    elif room < gates.source_room * scale_maximum(unit) - 1e-9:
        reason = f"{reason}: it was there before ({small}) and has moved away"
    elif room > 0:
        reason += f", {_share(moved, room)} of its room of {size_text(room, unit)}"
    outcomes: dict[SourceWord, Outcome] = {"shown": "pass", "not shown": "fail", "there before": "not applicable"}
    numbers, rows = (base.mean, now.mean), (*base.rows, *now.rows)
    return GateVerdict("SOURCE", subject, outcomes[word], reason, threshold, numbers, rows)


def convergence_change(
    gates: GateSettings,
    behavior: str,
    subject: str,
    by_epoch: Mapping[int, Series],
    canary: Mapping[int, Series] | None = None,
) -> GateVerdict:
    """CHANGE: whether the assistant's change against epoch 0, less the canary's, reaches the threshold, clear of zero.

    The 95 % interval holds the declared noise from run to run. `canary` is the canary's series by epoch; where epochs
    lack it the canary is not taken off, and rule and reason say so.
    """
    unit = next((series.unit for series in by_epoch.values()), "share")
    margin = gates.threshold(behavior, unit)
    epochs = sorted(epoch for epoch in by_epoch if epoch)
    canary = canary if canary is not None and {0, *epochs} <= set(canary) else None
    less = "the canary's change taken off" if canary is not None else "the canary's change not taken off: not measured"
    threshold = f"at least {size_text(margin, unit)} against epoch 0 ({less}), 95 % interval clear of zero"
    if 0 not in by_epoch or not epochs:
        return GateVerdict("CHANGE", subject, "not applicable", NEEDS_LATER, threshold)
    read = [by_epoch, canary] if canary is not None else [by_epoch]
    if why := first_too_unscored((probe[epoch], probe[0]) for probe in read for epoch in epochs):
        return undecidable(
            "CHANGE", subject, why, threshold, [probe[epoch] for probe in read for epoch in (0, *epochs)]
        )
    spread = declared_spread(behavior, unit)
    best: tuple[bool, float, str] | None = None
    for epoch in epochs:
        interval = change_contrast(subject, "change", by_epoch[epoch], by_epoch[0]).interval
        if canary is not None:
            quad = Quad(by_epoch[epoch], by_epoch[0], canary[epoch], canary[0])
            interval = canary_contrast(subject, "change", quad).interval
        interval = over_runs(interval, (run_variance(spread), spread.df))
        if interval.estimate is None:
            continue
        clear = interval.low is not None and interval.high is not None and (interval.low > 0 or interval.high < 0)
        text = f"epoch {epoch}: {change(interval.estimate, unit)} {interval_text(interval.low, interval.high, unit)}".rstrip()
        candidate = (clear and abs(interval.estimate) >= margin - 1e-12, abs(interval.estimate), text)
        best = candidate if best is None else max(best, candidate)
    rows = tuple(row for probe in read for epoch in (0, *epochs) for row in probe[epoch].rows)
    if best is None:
        return GateVerdict("CHANGE", subject, "fail", "no epoch can be compared", threshold, rows=rows)
    numbers = tuple(by_epoch[epoch].mean for epoch in (0, *epochs))
    return GateVerdict(
        "CHANGE", subject, "pass" if best[0] else "fail", f"largest change at {best[2]}", threshold, numbers, rows
    )


def pilot(
    subject: str,
    behavior: str,
    verdicts: Sequence[GateVerdict],
    words: Mapping[str, str] | None = None,
    *,
    declared: bool = True,
) -> GateVerdict:
    """PILOT: go if STACK passes, G3 does not fail, and the measure changes for either kind of negatives.

    A change is not yet leakage, so a go says whether any contrast beyond canary and mimicry is behind it: `words` holds
    the words of the subject's declared contrasts by label; None where they are not known. `declared` is False where the
    grid has no epoch besides 0: then there is no contrast, and nothing to decide.
    """
    rule = "STACK passes, G3 does not fail, SOURCE does not fail and CHANGE passes for either kind of negatives"
    word, why = _pilot_word(subject, behavior, verdicts) if declared else ("no contrast", NO_CONTRAST)
    if word == "go" and words is not None:
        why += f"; {_behind(words)}"
    return GateVerdict("PILOT", subject, word, why, rule, rows=evidence_of(verdicts))


def _pilot_word(subject: str, behavior: str, verdicts: Sequence[GateVerdict]) -> tuple[str, str]:
    """The pilot gate's verdict and the reason for it."""
    if any(v.gate == "G0" and v.verdict == "fail" for v in verdicts):
        return "uninformative", f"{behavior} is not measurable on this base"
    # KILL counts too: a decided one would have ended the run before its pilot gate.
    unread = [v for v in verdicts if v.unread and v.gate in ("G0", "G3", "SOURCE", "CHANGE", "KEPT", "KILL")]
    if not unread and not any(v.gate == "CHANGE" and v.verdict != "not applicable" for v in verdicts):
        # "Not measured" must not become "no effect": a change needs two epochs of one cell.
        return "not applicable", f"{behavior} was not measured at epoch 0 and one more epoch yet"
    measured = any(v.gate == "CHANGE" and (v.unread or v.verdict != "not applicable") for v in verdicts)
    failed = [v for v in verdicts if v.gate in ("STACK", "G3") and v.verdict == "fail" and not v.ignored]
    unproven = [v for v in verdicts if v.gate == "STACK" and v.verdict != "pass"]
    if measured and (failed or unproven):
        return "stop", "; ".join(f"{v.gate} {v.verdict}: {v.reason}" for v in (failed or unproven))
    if unread:
        # Unscored samples could have gone either way, so the remaining ones decide neither go nor stop.
        more = and_more(len(unread), 1)
        reason = f"{unread[0].gate} of {unread[0].subject} cannot be decided: {unread[0].reason}"
        return "not applicable", reason + (f" ({more})" if more else "")
    # Nothing is unread here, so a SOURCE gate that is not applicable means that the source was there before.
    shown = {v.subject for v in verdicts if v.gate == "SOURCE" and v.verdict in ("pass", "not applicable")}
    changed = [v for v in verdicts if v.gate == "CHANGE" and v.verdict == "pass" and v.subject in shown]
    if not shown:
        return "stop", "the source does not show the trained behavior"
    if not changed:
        return (
            "stop",
            f"no convergence-dependent change of {behavior} in the assistant is shown, nor that there is none",
        )
    reason = "; ".join(f"{_short(v.subject, subject)}: {v.reason}" for v in changed)
    if len(changed) > MOST_LISTED:
        strongest = max(changed, key=_furthest)
        reason = f"{len(changed)} of {len(shown)} groups change; {_short(strongest.subject, subject)} most: {strongest.reason}"
    return "go", reason


def _behind(words: Mapping[str, str]) -> str:
    """Which contrasts beyond canary and mimicry stand behind a go."""
    behind = [label for label, word in words.items() if word == "transfer"]
    if behind:
        return f"behind it, beyond canary and mimicry: {first_few(behind, MOST_LISTED)}"
    told = ", ".join(f"{many} {word}" for word, many in Counter(words.values()).items())
    return f"no contrast beyond canary and mimicry is behind it ({told or 'none measured'})"


def _furthest(change: GateVerdict) -> float:
    """The largest distance of a CHANGE gate's later epochs from its epoch 0."""
    values = [number.value for number in change.numbers]
    return max((abs(value - values[0]) for value in values), default=0.0)


def _short(group: str, subject: str) -> str:
    """A group's name without the prefix that it shares with its pilot."""
    return group.removeprefix(subject).removeprefix(", ") or group


def evidence_of(verdicts: Sequence[GateVerdict]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row for verdict in verdicts for row in verdict.rows))


@dataclass(frozen=True)
class Loss:
    """Mean loss over the last epoch of a training, in nats per token, and the key of its stage."""

    value: float
    stage: str

    @property
    def number(self) -> Number:
        """The loss as a `Number` with its row."""
        return Number(self.value, "nats", (f"{self.stage[:12]}/last_epoch_loss",))


def data_ready(subject: str, n_expected: int, n_rows: int | None, stage: str, refusals: tuple[str, ...]) -> GateVerdict:
    """G1: the training set has the number of rows that the recipe declares, and the audit refuses nothing.

    `n_expected` is `datasets.behaviors.declared_rows`, `n_rows` what was trained on, None while the set is not built;
    `refusals` are audit codes.
    """
    rule = "the number of rows that the recipe declares, and no refusal of the audit"
    if refusals:
        return GateVerdict("G1", subject, "fail", f"the audit refuses it: {', '.join(refusals)}", rule)
    if n_rows is None:
        return GateVerdict("G1", subject, "not applicable", "the rows are not built yet", rule)
    rows = (f"{stage[:12]}/rows",)
    number = Number(float(n_rows), "rows", rows)
    verdict = "pass" if n_rows == n_expected else "fail"
    return GateVerdict("G1", subject, verdict, f"{n_rows} of {n_expected} rows", rule, (number,), rows)


def converged(
    gates: GateSettings, model: str, subject: str, missing: tuple[str, ...], last: Loss | None
) -> GateVerdict:
    """G2: every snapshot is saved, and the mean loss of the last convergence epoch lies under the limit.

    `missing` are the slots of snapshots that are not in the ledger; `last` is the loss of the last epoch.
    """
    limit = _loss_limit(gates, model)
    rule = "all snapshots saved" + (f", loss under {limit:g}" if limit is not None else "")
    if missing or last is None:
        why = f"not saved yet: {', '.join(missing) or 'the last snapshot'}"
        return GateVerdict("G2", subject, "not applicable", why, rule)
    number = last.number
    if limit is None:
        why = f"loss {last.value:.3g}; no limit is registered for this base (gates.g2_loss)"
        return GateVerdict("G2", subject, "not applicable", why, rule, (number,), number.rows)
    verdict = "pass" if last.value < limit else "fail"
    return GateVerdict("G2", subject, verdict, f"loss {last.value:.3g}", rule, (number,), number.rows)


def _loss_limit(gates: GateSettings, model: str) -> float | None:
    """The limit of G2 in nats on this base: `g2_loss`, or 1.0 on Qwen2.5-7B-Instruct; None where none is registered."""
    if gates.g2_loss is not None:
        return gates.g2_loss
    return 1.0 if "qwen2.5-7b-instruct" in model.lower() else None


def same_loss(gates: GateSettings, subject: str, by_epoch: Mapping[int, Loss]) -> GateVerdict:
    """G3.5: the behavior's training loss on no snapshot lies clearly above that of the epoch-0 cell.

    A lower loss is no sign that the behavior was learned less, so it stops nothing.
    """
    rule = f"training loss at most {100 * gates.g35_tolerance:g} % or {gates.g35_floor_nats:g} nats above the epoch-0 cell's"
    later = sorted(epoch for epoch in by_epoch if epoch)
    if 0 not in by_epoch or not later:
        return GateVerdict("G3.5", subject, "not applicable", NEEDS_LATER, rule)
    zero = by_epoch[0].value

    def off(epoch: int) -> float:
        return by_epoch[epoch].value - zero

    worst = max(later, key=off)
    verdict = "pass" if off(worst) <= max(gates.g35_tolerance * zero, gates.g35_floor_nats) + 1e-12 else "fail"
    numbers = tuple(by_epoch[epoch].number for epoch in (0, *later))
    above = f"{off(worst):+.3g}" if off(worst) else "0"
    reason = f"{zero:.3g} at epoch 0; highest later {by_epoch[worst].value:.3g} at epoch {worst} ({above} nats)"
    rows = tuple(row for number in numbers for row in number.rows)
    return GateVerdict("G3.5", subject, verdict, reason, rule, numbers, rows)
