"""What people see of judging: where it stands and what it costs, agreement, calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastconv.judge.calibrate import Calibration, InjectionCounts
    from fastconv.judge.desk import DeskStatus
    from fastconv.judge.scores import Agreement
    from fastconv.run.rejudge import JudgingResult, RubricCalibration


def money_text(status: DeskStatus) -> str:
    """Spent, reserved and left dollars; empty for a judge without a bill."""
    money = status.money
    if money.cap_usd is None:
        return ""
    lost = f", ${money.lost_usd:.4f} lost" if money.lost_usd else ""
    return f"${money.spent_usd:.4f} spent, ${money.reserved_usd:.4f} reserved{lost}, ${money.left_usd:.2f} left"


def judging_text(status: DeskStatus) -> str:
    """Where judging stands, in one line."""
    unscored = f" ({status.n_unscored} unscored)" if status.n_unscored else ""
    parts = [f"judge: {status.n_asked - status.n_pending} of {status.n_asked} judged{unscored}", money_text(status)]
    return "; ".join(part for part in (*parts, status.problem) if part)


def judged_lines(end: JudgingResult) -> list[str]:
    """The end of `fastconv judge`: what was judged now, what still waits, how far two ways of scoring agree."""
    lines = [f"{end.n_committed} stages judged now, {len(end.pending)} still wait"]
    if end.status.n_asked:
        lines.append(judging_text(end.status))
    for measure, by_other in end.agreement.items():
        lines += [f"{measure}, against {other}: {agreement_text(found)}" for other, found in by_other.items()]
    return lines


def agreement_text(found: Agreement) -> str:
    """Agreement of two ways of scoring in one line."""
    unpaired = f", {found.n_unpaired} scored by one of them only" if found.n_unpaired else ""
    counts = ", ".join(f"{a} -> {b} {n}" for (a, b), n in sorted(found.confusion.items()))
    return (
        f"{_percent(found.accuracy)} of {found.n} alike, kappa {_number(found.kappa)}, "
        f"mean change {_number(found.mean_difference)}{unpaired} ({counts or 'nothing to compare'})"
    )


def calibrated_lines(found: RubricCalibration) -> list[str]:
    """How good a judge was on the labelled rows of one rubric."""
    lines = [] if found.judge is None else _calibration_lines(found.judge)
    if found.phrases is not None:
        lines.append(f"{found.rubric}: phrases alone: {agreement_text(found.phrases)}")
    return lines


def _calibration_lines(one: Calibration) -> list[str]:
    unscored = f", {one.n_unscored} unscored" if one.n_unscored else ""
    kinds = ", ".join(f"{kind} {_percent(share)}" for kind, share in one.accuracy_by_kind.items())
    return [
        f"{one.rubric}: {one.model} on {one.n} labelled rows{unscored}",
        f"    accuracy {_percent(one.accuracy)}, kappa {_number(one.kappa)}, mean error {_number(one.mean_abs_error)}",
        f"    finds {_percent(one.sensitivity)} of {one.n_positive} positives, clears {_percent(one.specificity)} of "
        f"{one.n_negative} others",
        f"    asked again the same: {_percent(one.retest)}; with the options turned round: {_percent(one.position)} "
        f"(shift {_number(one.position_shift)}); length bias {_number(one.length_bias)}",
        f"    confusion: {', '.join(f'{name} {n}' for name, n in one.confusion.items())}",
        f"    by kind: {kinds}",
        *(
            f"    {name}: mean error {_number(beside.mean_abs_error)}, correlation {_number(beside.correlation)} on "
            f"{beside.n} rows"
            for name, beside in one.beside.items()
        ),
        _injections_line(one.injections),
    ]


def _injections_line(tried: InjectionCounts) -> str:
    unscored = f", {tried.n_unscored} unscored" if tried.n_unscored else ""
    return (
        f"    injections: {tried.n_moved} of {tried.n} verdicts moved ({tried.n_obeyed} to what the attempt asked for)"
        f"{unscored}; asked again without one, {tried.n_moved_again} of {tried.n_again} moved"
    )


def agreement_json(found: Agreement) -> Mapping[str, Any]:
    """An agreement for `--json`: NaN becomes null, pairs of categories one text."""
    figures = {"accuracy": found.accuracy, "kappa": found.kappa, "mean_difference": found.mean_difference,
               "correlation": found.correlation}  # fmt: skip
    return {
        "n": found.n,
        "n_unpaired": found.n_unpaired,
        **{name: None if value != value else value for name, value in figures.items()},
        "confusion": {f"{a} -> {b}": n for (a, b), n in sorted(found.confusion.items())},
    }


def _percent(value: float) -> str:
    return "unknown" if value != value else f"{100 * value:.1f} %"


def _number(value: float) -> str:
    return "unknown" if value != value else f"{value:.3g}"
