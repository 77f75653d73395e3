"""Gates on data and training: G1, G2, G3.5, and the kill criterion. Each stops a run before its next cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastconv.stats.series import Number, Series, first_too_unscored
from fastconv.stats.gates import GateVerdict, unread
from fastconv.stats.units import change
from fastconv.recipe import GateSettings


@dataclass(frozen=True)
class Loss:
    """The mean loss over the last epoch of a training, in nats per token, and the stage that it stands in."""

    value: float
    stage: str

    @property
    def number(self) -> Number:
        """With its row."""
        return Number(self.value, "nats", (f"{self.stage[:12]}/last_epoch_loss",))


def data_ready(subject: str, n_expected: int, n_rows: int | None, stage: str, refusals: tuple[str, ...]) -> GateVerdict:
    """G1: the training set exists with the size that the protocol gives it, and the audit refuses nothing.

    `n_rows` is None while it is not built; `refusals` are codes of the audit.
    """
    rule = "the protocol's number of rows, and no refusal of the audit"
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
    """G2: every snapshot is saved, and the last convergence epoch's mean loss lies under the limit.

    `missing` are snapshots that are not in the ledger; `last` is the last epoch's loss.
    """
    limit = gates.loss_limit(model)
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


def same_loss(gates: GateSettings, subject: str, by_epoch: Mapping[int, Loss]) -> GateVerdict:
    """G3.5: the behavior was learned alike on every snapshot: its training loss lies near the epoch-0 cell's."""
    rule = (
        f"training loss within {100 * gates.g35_tolerance:g} % of the epoch-0 cell's, or both under "
        f"{gates.g35_floor_nats:g} nats"
    )
    later = sorted(epoch for epoch in by_epoch if epoch)
    if 0 not in by_epoch or not later:
        return GateVerdict("G3.5", subject, "not applicable", "needs epoch 0 and one more", rule)
    zero = by_epoch[0].value

    def off(epoch: int) -> float:
        return abs(by_epoch[epoch].value - zero) / zero if zero else float("inf")

    def alike(epoch: int) -> bool:
        return off(epoch) <= gates.g35_tolerance + 1e-12 or max(by_epoch[epoch].value, zero) < gates.g35_floor_nats

    worst = max(later, key=lambda epoch: (not alike(epoch), off(epoch)))
    verdict = "pass" if alike(worst) else "fail"
    numbers = tuple(by_epoch[epoch].number for epoch in (0, *later))
    reason = f"{zero:.3g} at epoch 0; furthest {by_epoch[worst].value:.3g} at epoch {worst} ({100 * off(worst):.0f} %)"
    rows = tuple(row for number in numbers for row in number.rows)
    return GateVerdict("G3.5", subject, verdict, reason, rule, numbers, rows)


def reverted(
    gates: GateSettings, subject: str, direction: str, base: Series, by_epoch: Mapping[int, Series]
) -> GateVerdict:
    """KILL: does the source's own behavior fall back to the base once it stands on a snapshot?

    `by_epoch` is the source's measure after training the behavior. Says nothing where epoch 0 does not show it.
    """
    rule = f"at least {100 * gates.kill_remaining:g} % of the source's epoch-0 change is left on every snapshot"
    later = sorted(epoch for epoch in by_epoch if epoch)
    if 0 not in by_epoch or not later:
        return GateVerdict("KILL", subject, "not applicable", "needs the source at epoch 0 and one more", rule)
    pairs = [(by_epoch[epoch], other) for epoch in (0, *later) for other in (base, by_epoch[0])]
    if why := first_too_unscored(pairs):
        return unread("KILL", subject, why, rule, [base, *(by_epoch[epoch] for epoch in (0, *later))])
    sign = 1 if direction == "raises" else -1
    moved = {epoch: sign * (one.mean.value - base.mean.value) for epoch, one in by_epoch.items()}
    rows = tuple(row for one in (base, *(by_epoch[epoch] for epoch in (0, *later))) for row in one.rows)
    if moved[0] < gates.shows(base.unit) - 1e-9:
        why = "the source does not show the behavior at epoch 0, so nothing can be lost"
        return GateVerdict("KILL", subject, "not applicable", why, rule, rows=rows)
    worst = min(later, key=lambda epoch: moved[epoch])
    left = moved[worst] / moved[0]
    verdict = "pass" if left >= gates.kill_remaining else "fail"
    reason = (
        f"the source moved by {change(sign * moved[0], base.unit)} at epoch 0 and by "
        f"{change(sign * moved[worst], base.unit)} at epoch {worst}: {100 * left:.0f} % is left"
    )
    numbers = (base.mean, by_epoch[0].mean, by_epoch[worst].mean)
    return GateVerdict("KILL", subject, verdict, reason, rule, numbers, rows)
