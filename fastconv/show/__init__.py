"""What people see in a terminal: live progress, tables, the end of a run. Line by line when it is no terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fastconv.show.judging import judging_text, money_text

if TYPE_CHECKING:
    from fastconv.datasets.audit import CheckReport
    from fastconv.doctor import Finding
    from fastconv.execute import Progress as StageProgress
    from fastconv.findings.gates import GateVerdict
    from fastconv.judging.book import DeskStatus
    from fastconv.run import Finished
    from fastconv.scoring import ScoreReport
    from fastconv.standing import StageStatus
    from fastconv.store import Stage, Store

#: Seconds between two progress lines where the output is no terminal.
LINE_EVERY_S = 15.0
_COLOURS = {
    "done": "green",
    "running": "cyan",
    "to do": "default",
    "pending": "magenta",
    "stale": "yellow",
    "skipped": "dim",
    "failed": "red",
}
_WORDS = {
    "pass": "green",
    "go": "green",
    "fail": "red",
    "stop": "red",
    "uninformative": "yellow",
    "not applicable": "dim",
}


class LineWatcher:
    """One line for each thing that happens; used in logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next_line_s = 0.0
        self._began_s = 0.0
        self._next_judging_s = 0.0
        self._judged = ""

    def audited(self, report: CheckReport) -> None:
        """The design passed its audit, perhaps with warnings."""
        codes = sorted({found.code for found in report.warnings})
        if codes:
            self._console.print(
                f"audit: {len(report.warnings)} warnings ({', '.join(codes)}); `fastconv check` shows them"
            )

    def begin(self, run: str, n_stages: int, n_todo: int) -> None:
        """The run is known."""
        self._console.print(f"run {run}: {n_stages} stages, {n_stages - n_todo} done already")

    def engine(self, facts: Mapping[str, Any]) -> None:
        """The base is loaded: on what, and by what it will be trained, asked and sampled."""
        said = f"{facts['name']} on {facts['device']}, {facts['dtype']}, attention {facts['attention']}"
        self._console.print(f"engine: {escape(said)}, sampler {escape(facts['sampler'])}")
        if "attention_passed_over" in facts:
            self._console.print(f"  attention passed over: {escape(facts['attention_passed_over'])}", style="dim")

    def stage(self, stage: Stage, reason: str) -> None:
        """A stage begins."""
        self._began_s = time.monotonic()
        self._next_line_s = self._began_s + LINE_EVERY_S
        self._console.print(f"  {escape(stage.slot)}{'' if reason == 'new' else f' (again: {escape(reason)})'}")

    def progress(self, progress: StageProgress) -> None:
        """A stage moved on."""
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
        """A stage gave no usable numbers; the run goes on without it."""
        self._console.print(f"    [red]failed[/]: {escape(reason)}")

    def judging(self, status: DeskStatus) -> None:
        """Where judging stands: now and then, and when all that was asked for is judged."""
        now, text = time.monotonic(), judging_text(status)
        due = now >= self._next_judging_s or (not status.n_pending and self._judged != text)
        if status.n_asked and due and self._judged != text:
            self._next_judging_s, self._judged = now + LINE_EVERY_S, text
            self._console.print(f"    {escape(text)}")

    def gate(self, verdict: GateVerdict) -> None:
        """A gate was decided."""
        self._console.print(_gate_line(verdict))


class BarWatcher(LineWatcher):
    """A live bar for the run and one for the stage, with rate and time left."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self._whole: Any = None
        self._current: Any = None
        self._judge: Any = None

    def __enter__(self) -> BarWatcher:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def begin(self, run: str, n_stages: int, n_todo: int) -> None:
        """The run is known."""
        super().begin(run, n_stages, n_todo)
        self._whole = self._bars.add_task("run", total=n_stages, completed=n_stages - n_todo, unit="stages", rate="")

    def stage(self, stage: Stage, reason: str) -> None:
        """A stage begins."""
        super().stage(stage, reason)
        self._current = self._bars.add_task(escape(stage.slot), total=None, unit="", rate="")

    def progress(self, progress: StageProgress) -> None:
        """A stage moved on."""
        if self._current is not None:
            loss = "" if progress.loss is None else f" loss {progress.loss:.3f}"
            elapsed_s = max(time.monotonic() - self._began_s, 1e-3)
            rate = f"{progress.done / elapsed_s:.1f} {progress.unit}/s"
            self._bars.update(
                self._current, completed=progress.done, total=progress.total, unit=progress.unit + loss, rate=rate
            )

    def stage_done(self, stage: Stage, seconds: float) -> None:
        """A stage was committed."""
        if self._current is not None and stage.kind != "judge":
            self._bars.remove_task(self._current)
            self._current = None
        self._bars.advance(self._whole)

    def stage_failed(self, stage: Stage, reason: str) -> None:
        """A stage gave no usable numbers."""
        super().stage_failed(stage, reason)
        if self._current is not None:
            self._bars.remove_task(self._current)
            self._current = None

    def judging(self, status: DeskStatus) -> None:
        """Where judging stands, on a bar of its own."""
        if not status.n_asked:
            return
        if self._judge is None:
            self._judge = self._bars.add_task("judge", total=status.n_asked, unit="judged", rate="")
        money = money_text(status)
        unit = " ".join(("judged", *([money] if money else []), *([status.problem] if status.problem else [])))
        self._bars.update(
            self._judge, completed=status.n_asked - status.n_pending, total=status.n_asked, unit=escape(unit)
        )


class SilentWatcher(LineWatcher):
    """Says nothing."""

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

    def stage_failed(self, stage: Stage, reason: str) -> None:
        """Nothing."""

    def gate(self, verdict: GateVerdict) -> None:
        """Nothing."""


@contextmanager
def watcher(*, quiet: bool, stream: TextIO) -> Iterator[LineWatcher]:
    """The right watcher for the stream: bars on a terminal, lines elsewhere, nothing if quiet."""
    console = Console(file=stream, highlight=False, soft_wrap=not stream.isatty())
    if quiet:
        yield SilentWatcher(console)
    elif console.is_terminal:
        with BarWatcher(console) as bars:
            yield bars
    else:
        yield LineWatcher(console)


def finished(end: Finished, report: Path) -> None:
    """The end of a run: what it computed now, the verdicts, where the report is."""
    console = console_of_output()
    tokens = end.tally.tokens
    spent = ", ".join(
        f"{tokens[name]:,} {name.removesuffix('_tok')}"
        for name in ("trained_tok", "sampled_tok", "scored_tok")
        if name in tokens
    )
    if end.tally.n_stages:
        console.print(f"computed {end.tally.n_stages} stages in {end.tally.seconds:.0f} s; tokens: {spent or 'none'}")
    else:
        console.print("nothing to compute: every stage was done already")
    for verdict in end.verdicts:
        if verdict.gate == "PILOT":
            console.print(_gate_line(verdict))
    console.print(f"report: {report}", soft_wrap=True)


def status(statuses: Sequence[StageStatus], *, as_json: bool) -> None:
    """Every stage with its state and the reason."""
    if as_json:
        print(json.dumps([asdict(one) for one in statuses], indent=1))
        return
    console = console_of_output()
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "state", "seconds", "why"):
        table.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
    for one in statuses:
        seconds = "" if one.seconds is None else f"{one.seconds:.1f}"
        table.add_row(escape(one.slot), f"[{_COLOURS[one.state]}]{one.state}[/]", seconds, escape(one.reason))
    console.print(table)
    counts = {state: sum(one.state == state for one in statuses) for state in _COLOURS}
    console.print(", ".join(f"{n} {state}" for state, n in counts.items() if n))


def runs(store: Store | None, *, as_json: bool) -> None:
    """All runs of a workspace."""
    rows = [
        {
            "run": row["id"],
            "recipe_sha256": row["recipe_sha256"],
            "started_at": row["started_at"],
            "finished_at": row["finished_at"],
        }
        for row in (store.runs() if store else [])
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    console = console_of_output()
    if not rows:
        console.print("no runs here yet; begin with: fastconv run demo")
    for row in rows:
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["started_at"]))
        console.print(f"{row['run']}  started {started}  {'finished' if row['finished_at'] else 'not finished'}")


def gates(verdicts: Sequence[GateVerdict], *, as_json: bool) -> None:
    """Gates with reason, threshold and the number of rows behind each."""
    if as_json:
        print(json.dumps([verdict.body() for verdict in verdicts], indent=1))
        return
    console = console_of_output()
    for verdict in verdicts:
        console.print(_gate_line(verdict))
        console.print(f"    rule: {escape(verdict.threshold)}; {len(verdict.rows)} rows", style="dim")


def check(report: CheckReport, *, as_json: bool) -> None:
    """The audit's findings, the worst first, each with its rows and mend."""
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
        return
    console = console_of_output()
    colours = {"refuse": "red", "warn": "yellow", "note": "dim"}
    for found in report.findings:
        accepted = report.accepted.get(found.code)
        word = f"accepted ({escape(accepted)})" if accepted else f"[{colours[found.severity]}]{found.severity}[/]"
        figure = f" ({escape(found.figure)})" if found.figure else ""
        console.print(f"{found.code} {word} {escape(found.subject)}: {escape(found.why)}{figure}")
        if found.rows:
            more = f" and {len(found.rows) - 5} more" if len(found.rows) > 5 else ""
            console.print(f"    rows: {escape(', '.join(found.rows[:5]))}{more}", style="dim")
        if found.severity != "note":
            console.print(f"    mend: {escape(found.mend)}", style="dim")
    console.print(f"{len(report.refusals)} refused, {len(report.warnings)} warnings, {len(report.accepted)} accepted")


def peek(title: str, lines: Sequence[RenderableType]) -> None:
    """Rendered rows of one training set."""
    console = console_of_output()
    console.rule(escape(title))
    for line in lines:
        console.print(line)


def scored(report: ScoreReport, *, as_json: bool) -> None:
    """Accuracy and chance; with `as_json` every question."""
    if as_json:
        print(json.dumps(asdict(report)))
        return
    n_right = sum(one.correct for one in report.questions)
    console_of_output().print(
        f"{n_right} of {len(report.questions)} right: {100 * report.accuracy:.1f} % (chance {100 * report.chance:.1f} %)"
    )


def bench(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Ours and the usual ways side by side."""
    if as_json:
        print(json.dumps(found))
        return
    console = console_of_output()
    console.print(
        f"{found['kind']}: {found['work']}; {found['model']} on {found['device']} in {found['dtype']}, {found['threads']} threads"
    )
    table = Table(box=None, pad_edge=False)
    for name in ("way", "seconds", f"{found['unit']}/s", "peak memory", "written", "of ceiling", "ours is"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for way in (found["ours"], *found["usual"]):
        ratio = found["ratios"].get(way["name"])
        memory = "not measured" if way["peak_bytes"] is None else f"{way['peak_bytes'] / 2**30:.2f} GiB"
        ceiling = "" if way["ceiling_share"] is None else f"{100 * way['ceiling_share']:.1f} %"
        written = f"{way['written_bytes'] / 2**20:.0f} MiB"
        table.add_row(
            way["name"],
            f"{way['seconds']:.3g}",
            f"{way['per_s']:.4g}",
            memory,
            written,
            ceiling,
            f"{ratio:.2f}x" if ratio else "",
        )
    console.print(table)


def doctor(findings: Sequence[Finding], *, as_json: bool) -> None:
    """What the doctor found."""
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
        return
    console = console_of_output()
    for finding in findings:
        mark = "[red]no [/]" if finding.exit_code else "[green]ok [/]"
        console.print(f"{mark} {escape(finding.subject)}: {escape(finding.text)}")


def _gate_line(verdict: GateVerdict) -> str:
    colour = _WORDS.get(verdict.verdict, "default")
    aside = f"; ignored, because {escape(verdict.ignored)}" if verdict.ignored else ""
    return f"{verdict.gate} {escape(verdict.subject)}: [{colour}]{verdict.verdict}[/] ({escape(verdict.reason)}{aside})"


def console_of_output() -> Console:
    """Standard output; lines are not broken where nobody reads them on a screen."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())
