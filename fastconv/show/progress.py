"""A run as people watch it (bars on a terminal, lines elsewhere), and judging in words: progress, cost, agreement, calibration."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastconv.datasets.spec import figures_of_rule
from fastconv.stats.units import counted

if TYPE_CHECKING:
    from fastconv.audit.checks import CheckReport
    from fastconv.judge.calibrate import Calibration, InjectionCounts
    from fastconv.judge.desk import DeskStatus
    from fastconv.judge.rubric import Agreement
    from fastconv.run.executor import Progress as StageProgress
    from fastconv.run.rejudge import JudgingResult, RubricCalibration
    from fastconv.run.sampling import SamplingStatus
    from fastconv.stats.gates import GateVerdict
    from fastconv.store.ledger import Stage


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
    for _, part, n, precision, recall in map(figures_of_rule, result.rule):
        lines.append(f"{result.rubric}: phrases on {n} answers {part}: precision {precision}, recall {recall}")
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


#: Notes of the audit that a run says too: that it asks less, or another persona, than its recipe seems to say.
_SAID_AT_START = ("D131", "D132")
#: Seconds between two progress lines if the output is no terminal.
LINE_EVERY_S = 15.0
_COLOURS = {
    "pass": "green",
    "go": "green",
    "fail": "red",
    "stop": "red",
    "uninformative": "yellow",
    "not applicable": "dim",
    "no contrast": "dim",
}


class LineWatcher:
    """Prints one line per event; used in logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next_line_s = 0.0
        self._began_s = 0.0
        self._next_drawing_s = 0.0
        self._next_judging_s = 0.0
        self._judged = ""

    def audited(self, report: CheckReport) -> None:
        """The design passed its audit, perhaps with warnings; what is other than the recipe seems to say is told."""
        for finding in report.findings:
            if finding.code in _SAID_AT_START:
                self._console.print(f"note: {escape(finding.subject)}: {escape(finding.why)}")
        codes = sorted({finding.code for finding in report.warnings})
        if codes:
            self._console.print(
                f"audit: {len(report.warnings)} warnings ({', '.join(codes)}); `fastconv check` shows them"
            )

    def begin(self, run: str, n_stages: int, n_todo: int) -> None:
        """The run starts, with this many stages."""
        self._console.print(f"run {run}: {n_stages} stages, {n_stages - n_todo} done already")

    def engine(self, facts: Mapping[str, Any]) -> None:
        """The base model is loaded; prints device, dtype, attention backend and sampler."""
        base = f"{facts['name']} on {facts['device']}, {facts['dtype']}, attention {facts['attention']}"
        self._console.print(f"engine: {escape(base)}, sampler {escape(facts['sampler'])}")
        if "attention_passed_over" in facts:
            self._console.print(f"  attention passed over: {escape(facts['attention_passed_over'])}", style="dim")

    def stage(self, stage: Stage, reason: str) -> None:
        """A stage starts."""
        self._began_s = time.monotonic()
        self._next_line_s = self._began_s + LINE_EVERY_S
        self._console.print(f"  {escape(stage.slot)}{'' if reason == 'new' else f' (again: {escape(reason)})'}")

    def progress(self, progress: StageProgress) -> None:
        """A stage made progress."""
        now = time.monotonic()
        if now >= self._next_line_s:
            self._next_line_s = now + LINE_EVERY_S
            loss = "" if progress.loss is None else f", loss {progress.loss:.3f}"
            rate = progress.done / max(now - self._began_s, 1e-3)
            left = (progress.total - progress.done) / rate if rate else 0.0
            self._console.print(
                f"    {progress.done} of {progress.total} {progress.unit}{loss} ({rate:.1f}/s, at most {left:.0f} s left)"
            )

    def stage_done(self, stage: Stage, seconds: float) -> None:
        """A stage was committed."""

    def stage_failed(self, stage: Stage, reason: str) -> None:
        """A stage gave no usable numbers; the run continues without it."""
        self._console.print(f"    [red]failed[/]: {escape(reason)}")

    def judging(self, status: DeskStatus) -> None:
        """Progress of judging: at intervals, and when everything requested is judged."""
        now, text = time.monotonic(), judging_text(status)
        due = now >= self._next_judging_s or (not status.n_pending and self._judged != text)
        if status.n_asked and due and self._judged != text:
            self._next_judging_s, self._judged = now + LINE_EVERY_S, text
            self._console.print(f"    {escape(text)}")

    def drawing(self, status: SamplingStatus) -> None:
        """Progress of the sampling server, at intervals."""
        now = time.monotonic()
        if status.slots and now >= self._next_drawing_s:
            self._next_drawing_s = now + LINE_EVERY_S
            self._console.print(
                f"    sampler: {status.n_tok} of {status.max_tok} tok for {counted(len(status.slots), 'stage')}"
            )

    def gate(self, verdict: GateVerdict) -> None:
        """A gate was decided."""
        self._console.print(gate_line(verdict))


class BarWatcher(LineWatcher):
    """A live bar for the run and one per running stage, with the time left."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self._whole: Any = None
        #: Bars by slot. `_current` is the newest; progress of a slot without a bar moves it.
        self._of_stage: dict[str, Any] = {}
        self._current: Any = None
        self._judge: Any = None
        self._sampler: Any = None

    def __enter__(self) -> BarWatcher:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def begin(self, run: str, n_stages: int, n_todo: int) -> None:
        """The run starts, with this many stages."""
        super().begin(run, n_stages, n_todo)
        self._whole = self._bars.add_task("run", total=n_stages, completed=n_stages - n_todo, unit="stages")

    def stage(self, stage: Stage, reason: str) -> None:
        """A stage starts."""
        super().stage(stage, reason)
        self._current = self._bars.add_task(escape(stage.slot), total=None, unit="")
        self._of_stage[stage.slot] = self._current

    def progress(self, progress: StageProgress) -> None:
        """A stage made progress."""
        bar = self._of_stage.get(progress.slot, self._current)
        if bar is not None:
            loss = "" if progress.loss is None else f" loss {progress.loss:.3f}"
            self._bars.update(bar, completed=progress.done, total=progress.total, unit=progress.unit + loss)

    def stage_done(self, stage: Stage, seconds: float) -> None:
        """A stage was committed."""
        self._end_bar(stage.slot)
        self._bars.advance(self._whole)

    def stage_failed(self, stage: Stage, reason: str) -> None:
        """A stage gave no usable numbers."""
        super().stage_failed(stage, reason)
        self._end_bar(stage.slot)

    def drawing(self, status: SamplingStatus) -> None:
        """Progress of the sampling server, on one bar for all of its stages."""
        for slot in status.slots:
            self._end_bar(slot)
        if not status.slots and self._sampler is not None:
            self._bars.remove_task(self._sampler)
            self._sampler = None
        elif status.slots and self._sampler is None:
            self._sampler = self._bars.add_task("sampler", total=None, unit="")
        if self._sampler is not None:
            unit = f"tok for {counted(len(status.slots), 'stage')}"
            self._bars.update(self._sampler, completed=status.n_tok, total=status.max_tok, unit=unit)

    def judging(self, status: DeskStatus) -> None:
        """Progress of judging, on a bar of its own."""
        if not status.n_asked:
            return
        if self._judge is None:
            self._judge = self._bars.add_task("judge", total=status.n_asked, unit="judged")
        money = money_text(status)
        unit = " ".join(("judged", *([money] if money else []), *([status.problem] if status.problem else [])))
        self._bars.update(
            self._judge, completed=status.n_asked - status.n_pending, total=status.n_asked, unit=escape(unit)
        )

    def _end_bar(self, slot: str) -> None:
        bar = self._of_stage.pop(slot, None)
        if bar is not None:
            self._bars.remove_task(bar)
            self._current = None if bar == self._current else self._current


class SilentWatcher(LineWatcher):
    """Prints nothing."""

    def audited(self, report: CheckReport) -> None:
        """Nothing."""

    def begin(self, run: str, n_stages: int, n_todo: int) -> None:
        """Nothing."""

    def engine(self, facts: Mapping[str, Any]) -> None:
        """Nothing."""

    def stage(self, stage: Stage, reason: str) -> None:
        """Nothing."""

    def progress(self, progress: StageProgress) -> None:
        """Nothing."""

    def judging(self, status: DeskStatus) -> None:
        """Nothing."""

    def drawing(self, status: SamplingStatus) -> None:
        """Nothing."""

    def stage_failed(self, stage: Stage, reason: str) -> None:
        """Nothing."""

    def gate(self, verdict: GateVerdict) -> None:
        """Nothing."""


@contextmanager
def watching(*, quiet: bool, stream: TextIO) -> Iterator[LineWatcher]:
    """The watcher for a stream: bars on a terminal, lines elsewhere, none if quiet."""
    console = Console(file=stream, highlight=False, soft_wrap=not stream.isatty())
    if quiet:
        yield SilentWatcher(console)
    elif console.is_terminal:
        with BarWatcher(console) as bars:
            yield bars
    else:
        yield LineWatcher(console)


def gate_line(verdict: GateVerdict) -> str:
    """A gate's verdict with its reason."""
    colour = _COLOURS.get(verdict.verdict, "default")
    aside = f"; ignored, because {escape(verdict.ignored)}" if verdict.ignored else ""
    return f"{verdict.gate} {escape(verdict.subject)}: [{colour}]{verdict.verdict}[/] ({escape(verdict.reason)}{aside})"
