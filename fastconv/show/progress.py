"""A run as people watch it (bars on a terminal, lines elsewhere), and judging in words: progress, cost, agreement, calibration."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from fastconv.stats.units import counted, duration_text, rate_text, shortened_slot

if TYPE_CHECKING:
    from fastconv.audit.checks import CheckReport
    from fastconv.judge.calibrate import Calibration, InjectionCounts
    from fastconv.judge.desk import DeskStatus
    from fastconv.judge.rubric import Agreement
    from fastconv.planning.hardware import TimeLeft
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
    from fastconv.judge.rubric import figures_of_rule  # --help starts without it

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
#: Characters of a stage's name that stay beside its figures on a narrow terminal.
LEAST_NAME = 14
_COLOURS = {
    "pass": "green",
    "go": "green",
    "fail": "red",
    "stop": "red",
    "uninformative": "yellow",
    "not applicable": "dim",
    "no contrast": "dim",
}


class StageClock:
    """How fast a stage goes on: its progress so far, the rate since its first sign of life, and the time left at it."""

    def __init__(self, now: float) -> None:
        self.began_s = now
        self.done, self.total, self.unit, self.loss = 0, 0, "", None
        self._first: tuple[float, int] | None = None

    def note(self, progress: StageProgress, now: float) -> None:
        """Progress was made. What a checkpoint brought, and a first step that warms up, count for no rate."""
        self.done, self.total, self.unit, self.loss = progress.done, progress.total, progress.unit, progress.loss
        if self._first is None:
            self._first = now, progress.done

    def rate(self, now: float) -> float | None:
        """Units per second; None before two signs of life."""
        if self._first is None or self.done <= self._first[1] or now <= self._first[0]:
            return None
        return (self.done - self._first[1]) / (now - self._first[0])

    @property
    def share(self) -> float:
        """Share that is done."""
        return self.done / self.total if self.total else 0.0

    def figures(self, now: float) -> list[str]:
        """Count, time left, rate and loss, the most telling first."""
        if not self.total:
            return [f"{duration_text(now - self.began_s)} so far"]
        found, rate = [f"{self.done:,}/{self.total:,} {self.unit}"], self.rate(now)
        if rate is not None:
            # Answers end by themselves: their number of tokens is a bound.
            most = "at most " if self.unit == "tok" else ""
            found += [f"{most}{duration_text((self.total - self.done) / rate)} left", rate_text(rate, self.unit)]
        else:
            found.append(f"{duration_text(now - self.began_s)} so far")
        return found if self.loss is None else [*found, f"loss {self.loss:.3f}"]


def bar_line(width: int, name: str, figures: Sequence[str], share: float | None, *, plain: bool = False) -> Text:
    """One line of at most `width` characters: name, bar (without `share`: none), figures.

    The figures stand whole, except that the last ones are left out where not even a short name fits beside them; then the
    bar goes, then the ends of the words of its name. `plain` draws the bar in ASCII.
    """
    shown = list(figures)
    while len(shown) > 1 and len("  ".join(shown)) + 2 + min(len(name), LEAST_NAME) > width:
        shown.pop()
    right = "  ".join(shown)
    room = max(width - len(right) - 2, 4)
    line = Text(shortened_slot(name, room))
    bar_width = min(room - len(name) - 2, 30)
    if share is not None and bar_width >= 6:
        full = round(min(max(share, 0.0), 1.0) * bar_width)
        line.append("  ")
        line.append(("#" if plain else "\u2501") * full, style="cyan")
        line.append(("-" if plain else "\u2501") * (bar_width - full), style="dim")
    line.append(" " * max(room - len(line), 0) + "  " + right)
    line.truncate(width)
    return line


class LineWatcher:
    """Prints one line per event; used in logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next_line_s = 0.0
        self._clock = StageClock(time.monotonic())
        self._left: TimeLeft | None = None
        self._still_wanted: Callable[[], Collection[str]] = tuple
        self._next_drawing_s = 0.0
        self._next_judging_s = 0.0
        self._judged = ""

    def expect(self, left: TimeLeft, still_wanted: Callable[[], Collection[str]]) -> None:
        """The run has a plan. `still_wanted` gives the keys of the stages that it needs once G0 has ruled some out."""
        self._left, self._still_wanted = left, still_wanted

    def note(self, text: str) -> None:
        """Something that the run does not depend on, e.g. a tracker that failed."""
        self._console.print(f"note: {escape(text)}")

    def audited(self, report: CheckReport) -> None:
        """The design passed its audit, perhaps with warnings; what is other than the recipe seems to say is told."""
        for finding in report.findings:
            if finding.code in _SAID_AT_START:
                self._console.print(f"note: {escape(finding.subject)}: {escape(finding.why)}")
        codes = sorted({finding.code for finding in report.warnings})
        if codes:
            self._console.print(
                f"audit: {counted(len(report.warnings), 'warning')} ({', '.join(codes)}); `fastconv check` shows them"
            )

    def begin(self, run: str, n_stages: int, n_todo: int) -> None:
        """The run starts, with this many stages."""
        plan = f"; {self._all_left()} by the plan" if self._left is not None and n_todo else ""
        self._console.print(f"run {run}: {n_stages:,} stages, {n_stages - n_todo:,} done already{plan}")
        if n_todo and self._left is not None and self._left.loads:
            self._console.print("  loading the model and testing it")

    def engine(self, facts: Mapping[str, Any]) -> None:
        """The base model is loaded; prints device, dtype, attention backend and sampler."""
        if self._left is not None:
            self._left.loaded(time.monotonic())
        base = f"{facts['name']} on {facts['device']}, {facts['dtype']}, attention {facts['attention']}"
        self._console.print(f"engine: {escape(base)}, sampler {escape(facts['sampler'])}")
        if "attention_passed_over" in facts:
            self._console.print(f"  attention passed over: {escape(facts['attention_passed_over'])}", style="dim")

    def stage(self, stage: Stage, reason: str) -> None:
        """A stage starts."""
        now = time.monotonic()
        self._clock = StageClock(now)
        self._next_line_s = now + LINE_EVERY_S
        if self._left is not None:
            self._left.begin(stage.key, now)
        self._console.print(f"  {escape(stage.slot)}{'' if reason == 'new' else f' (again: {escape(reason)})'}")

    def progress(self, progress: StageProgress) -> None:
        """A stage made progress."""
        now = time.monotonic()
        self._note(self._clock, progress, now)
        if now >= self._next_line_s:
            self._next_line_s = now + LINE_EVERY_S
            in_all = f"; {self._all_left()} in all" if self._left is not None else ""
            self._console.print(f"    {escape(', '.join(self._clock.figures(now)))}{in_all}")

    def stage_done(self, stage: Stage, seconds: float) -> None:
        """A stage was committed."""
        if self._left is not None:
            self._left.done(stage.key, time.monotonic())

    def stage_failed(self, stage: Stage, reason: str) -> None:
        """A stage gave no usable numbers; the run continues without it."""
        if self._left is not None:
            self._left.done(stage.key, time.monotonic())
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
        if verdict.gate == "G0" and verdict.failed and self._left is not None:
            self._left.keep(self._still_wanted())
        self._console.print(gate_line(verdict))

    def _note(self, clock: StageClock, progress: StageProgress, now: float) -> None:
        clock.note(progress, now)
        if self._left is not None:
            self._left.progress(clock.share, exact=progress.unit == "steps", now=now)

    def _all_left(self) -> str:
        assert self._left is not None
        return f"about {duration_text(self._left.seconds(time.monotonic()))} left"


class BarWatcher(LineWatcher):
    """A live line for the run and one per running stage, with the time left."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._plain = not console.encoding.lower().startswith("utf")
        self._n_stages, self._n_done = 0, 0
        self._loading_since: float | None = None
        #: Clocks by slot. `_current` is the newest slot; progress of a slot without a line moves it.
        self._clocks: dict[str, StageClock] = {}
        self._current = ""
        self._judge: DeskStatus | None = None
        self._sampler: SamplingStatus | None = None
        self._live = Live(console=console, get_renderable=self._lines, refresh_per_second=4, transient=True)

    def __enter__(self) -> BarWatcher:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def begin(self, run: str, n_stages: int, n_todo: int) -> None:
        """The run starts, with this many stages."""
        super().begin(run, n_stages, n_todo)
        self._n_stages, self._n_done = n_stages, n_stages - n_todo
        self._loading_since = time.monotonic() if n_todo and self._left is not None and self._left.loads else None

    def engine(self, facts: Mapping[str, Any]) -> None:
        """The base model is loaded."""
        super().engine(facts)
        self._loading_since = None

    def stage(self, stage: Stage, reason: str) -> None:
        """A stage starts."""
        super().stage(stage, reason)
        self._loading_since = None
        self._clocks[stage.slot], self._current = self._clock, stage.slot

    def progress(self, progress: StageProgress) -> None:
        """A stage made progress."""
        clock = self._clocks.get(progress.slot) or self._clocks.get(self._current)
        if clock is not None:
            self._note(clock, progress, time.monotonic())

    def stage_done(self, stage: Stage, seconds: float) -> None:
        """A stage was committed."""
        super().stage_done(stage, seconds)
        self._clocks.pop(stage.slot, None)
        self._n_done += 1

    def stage_failed(self, stage: Stage, reason: str) -> None:
        """A stage gave no usable numbers."""
        super().stage_failed(stage, reason)
        self._clocks.pop(stage.slot, None)

    def gate(self, verdict: GateVerdict) -> None:
        """A gate was decided; stages that G0 rules out are no part of the run any more."""
        super().gate(verdict)
        if verdict.gate == "G0" and verdict.failed and self._left is not None:
            self._n_stages = self._n_done + self._left.n_todo

    def drawing(self, status: SamplingStatus) -> None:
        """Progress of the sampling server, on one line for all of its stages."""
        for slot in status.slots:
            self._clocks.pop(slot, None)
        self._sampler = status if status.slots else None

    def judging(self, status: DeskStatus) -> None:
        """Progress of judging, on a line of its own."""
        self._judge = status if status.n_asked else self._judge

    def _lines(self) -> Group:
        """The lines as they are now, the run's last."""
        now, width = time.monotonic(), self._console.width
        lines = [
            (slot, clock.figures(now), clock.share if clock.total else None) for slot, clock in self._clocks.items()
        ]
        if self._loading_since is not None:
            lines.append(
                ("loading the model, self-tests", [f"{duration_text(now - self._loading_since)} so far"], None)
            )
        if self._sampler is not None:
            n, of = self._sampler.n_tok, self._sampler.max_tok
            figures = [f"{n:,}/{of:,} tok", counted(len(self._sampler.slots), "stage")]
            lines.append(("sampler", figures, n / of if of else None))
        if self._judge is not None:
            asked, judged = self._judge.n_asked, self._judge.n_asked - self._judge.n_pending
            texts = [text for text in (money_text(self._judge), self._judge.problem) if text]
            lines.append(("judge", [f"{judged:,}/{asked:,} judged", *texts], judged / asked))
        if self._n_stages:
            figures = [
                f"{self._n_done:,}/{self._n_stages:,} stages",
                *([self._all_left()] if self._left is not None else []),
            ]
            lines.append(("run", figures, self._n_done / self._n_stages))
        return Group(*(bar_line(width, *line, plain=self._plain) for line in lines))


class SilentWatcher(LineWatcher):
    """Prints nothing."""

    def __init__(self, console: Console) -> None:
        super().__init__(Console(quiet=True))


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
