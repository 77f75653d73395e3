"""Progress of a run: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastconv.show.judging import judging_text, money_text
from fastconv.stats.units import counted

if TYPE_CHECKING:
    from fastconv.audit.checks import CheckReport
    from fastconv.judge.desk import DeskStatus
    from fastconv.run.executor import Progress as StageProgress
    from fastconv.run.sampling import SamplingStatus
    from fastconv.stats.gates import GateVerdict
    from fastconv.store.ledger import Stage

#: Seconds between two progress lines if the output is no terminal.
LINE_EVERY_S = 15.0
_COLOURS = {
    "pass": "green",
    "go": "green",
    "fail": "red",
    "stop": "red",
    "uninformative": "yellow",
    "not applicable": "dim",
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
        """The design passed its audit, perhaps with warnings."""
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
