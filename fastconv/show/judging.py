"""Terminal output about judging: progress and cost, agreement, calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastconv.judge.calibrate import Calibration, InjectionCounts
    from fastconv.judge.desk import DeskStatus
    from fastconv.judge.scores import Agreement
    from fastconv.run.rejudge import JudgingResult, RubricCalibration


def money_text(status: DeskStatus) -> str:
    """US dollars spent, reserved and left; empty for a judge without a bill."""
    money = status.money
    if money.cap_usd is None:
        return ""
    lost = f", ${money.lost_usd:.4f} lost" if money.lost_usd else ""
    return f"${money.spent_usd:.4f} spent, ${money.reserved_usd:.4f} reserved{lost}, ${money.left_usd:.2f} left"


def judging_text(status: DeskStatus) -> str:
    """The state of judging in one line."""
    unscored = f" ({status.n_unscored} unscored)" if status.n_unscored else ""
    parts = [f"judge: {status.n_asked - status.n_pending} of {status.n_asked} judged{unscored}", money_text(status)]
    return "; ".join(part for part in (*parts, status.problem) if part)


def judged_lines(end: JudgingResult) -> list[str]:
    """The end of `fastconv judge`: stages judged now and still waiting, and agreement with other ways of scoring."""
    lines = [f"{end.n_committed} stages judged now, {len(end.pending)} still wait"]
    if end.status.n_asked:
        lines.append(judging_text(end.status))
    for measure, by_other in end.agreement.items():
        lines += [
            f"{measure}, against {other_scoring}: {agreement_text(result)}"
            for other_scoring, result in by_other.items()
        ]
    return lines


def agreement_text(agreement: Agreement) -> str:
    """Agreement of two ways of scoring in one line."""
    unpaired = f", {agreement.n_unpaired} scored by one of them only" if agreement.n_unpaired else ""
    counts = ", ".join(f"{a} -> {b} {n}" for (a, b), n in sorted(agreement.confusion.items()))
    return (
        f"{_percent(agreement.accuracy)} of {agreement.n} alike, kappa {_number(agreement.kappa)}, "
        f"mean change {_number(agreement.mean_difference)}{unpaired} ({counts or 'nothing to compare'})"
    )


def calibrated_lines(result: RubricCalibration) -> list[str]:
    """A judge's calibration on the labelled rows of one rubric."""
    lines = [] if result.judge is None else _calibration_lines(result.judge)
    if result.phrases is not None:
        lines.append(f"{result.rubric}: phrases alone: {agreement_text(result.phrases)}")
    return lines


def _calibration_lines(calibration: Calibration) -> list[str]:
    unscored = f", {calibration.n_unscored} unscored" if calibration.n_unscored else ""
    kinds = ", ".join(f"{kind} {_percent(share)}" for kind, share in calibration.accuracy_by_kind.items())
    return [
        f"{calibration.rubric}: {calibration.model} on {calibration.n} labelled rows{unscored}",
        f"    accuracy {_percent(calibration.accuracy)}, kappa {_number(calibration.kappa)}, mean error {_number(calibration.mean_abs_error)}",
        f"    finds {_percent(calibration.sensitivity)} of {calibration.n_positive} positives, clears {_percent(calibration.specificity)} of "
        f"{calibration.n_negative} others",
        f"    asked again the same: {_percent(calibration.retest)}; with the options turned round: {_percent(calibration.position)} "
        f"(shift {_number(calibration.position_shift)}); length bias {_number(calibration.length_bias)}",
        f"    confusion: {', '.join(f'{name} {n}' for name, n in calibration.confusion.items())}",
        f"    by kind: {kinds}",
        *(
            f"    {name}: mean error {_number(beside.mean_abs_error)}, correlation {_number(beside.correlation)} on "
            f"{beside.n} rows"
            for name, beside in calibration.beside.items()
        ),
        _injections_line(calibration.injections),
    ]


def _injections_line(injections: InjectionCounts) -> str:
    unscored = f", {injections.n_unscored} unscored" if injections.n_unscored else ""
    return (
        f"    injections: {injections.n_moved} of {injections.n} verdicts moved ({injections.n_obeyed} to what the attempt asked for)"
        f"{unscored}; asked again without one, {injections.n_moved_again} of {injections.n_again} moved"
    )


def agreement_json(agreement: Agreement) -> Mapping[str, Any]:
    """An agreement for `--json`: NaN becomes null, a pair of categories becomes one string."""
    figures = {"accuracy": agreement.accuracy, "kappa": agreement.kappa, "mean_difference": agreement.mean_difference,
               "correlation": agreement.correlation}  # fmt: skip
    return {
        "n": agreement.n,
        "n_unpaired": agreement.n_unpaired,
        **{name: None if value != value else value for name, value in figures.items()},
        "confusion": {f"{a} -> {b}": n for (a, b), n in sorted(agreement.confusion.items())},
    }


def _percent(value: float) -> str:
    return "unknown" if value != value else f"{100 * value:.1f} %"


def _number(value: float) -> str:
    return "unknown" if value != value else f"{value:.3g}"
