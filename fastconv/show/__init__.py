"""Terminal output of the commands: tables and the end of a run. `show.progress` shows a run while it computes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fastconv.errors import GateStop, shown
from fastconv.show.progress import gate_line
from fastconv.stats.units import counted, duration_text, first_few, shortened, shortened_slot

if TYPE_CHECKING:
    from fastconv.audit.checks import CheckReport
    from fastconv.bench import Change
    from fastconv.planning.doctor import Diagnosis
    from fastconv.run.run import RunResult
    from fastconv.run.standalone import ScoreReport
    from fastconv.run.status import StageStatus
    from fastconv.stats.gates import GateVerdict
    from fastconv.store.ledger import Store

_COLOURS = {
    "done": "green",
    "running": "cyan",
    "to do": "default",
    "pending": "magenta",
    "stale": "yellow",
    "skipped": "dim",
    "failed": "red",
}


def finished(end: RunResult, report: Path) -> None:
    """Print the end of a run: what it computed, the pilot verdicts, the path of the report."""
    console = console_of_output()
    tokens = end.tally.tokens
    spent = ", ".join(
        f"{tokens[name]:,} {name.removesuffix('_tok')}"
        for name in ("trained_tok", "sampled_tok", "scored_tok")
        if name in tokens
    )
    if end.tally.n_stages:
        console.print(
            f"computed {end.tally.n_stages} stages in {duration_text(end.tally.seconds)}; tokens: {spent or 'none'}"
        )
    else:
        console.print("nothing to compute: every stage was done already")
    for verdict in end.verdicts:
        if verdict.gate == "PILOT":
            console.print(gate_line(verdict))
    console.print(f"report: {report}", soft_wrap=True)


def status(statuses: Sequence[StageStatus], *, as_json: bool) -> None:
    """Print every stage with its state and the reason for it."""
    if as_json:
        print(json.dumps([asdict(stage) for stage in statuses], indent=1))
        return
    console = console_of_output()
    took = ["" if stage.seconds is None else duration_text(stage.seconds) for stage in statuses]
    longest = max((len(stage.slot) for stage in statuses), default=0)
    # On a terminal each stage has one line, its name and reason shortened; elsewhere both are whole.
    room = console.width - 18 - min(max((len(stage.reason) + 1 for stage in statuses), default=0), console.width // 4)
    name_width = min(longest, max(room, 24)) if console.is_terminal else longest
    why_width = max(console.width - name_width - 19, 0) if console.is_terminal else None
    for stage, seconds in zip(statuses, took, strict=True):
        why = stage.reason if why_width is None else shortened(stage.reason, why_width)
        line = Text(f"{shortened_slot(stage.slot, name_width):<{name_width}}  ")
        line.append(f"{stage.state:<7}", style=_COLOURS[stage.state])
        line.append(f"  {seconds:>7} {why}".rstrip())
        console.print(line, soft_wrap=True)
    counts = {state: sum(stage.state == state for stage in statuses) for state in _COLOURS}
    console.print(", ".join(f"{n} {state}" for state, n in counts.items() if n))


def runs(store: Store | None, *, as_json: bool) -> None:
    """Print all runs of a workspace."""
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
        console.print(f"{shown(row['run'])}  started {started}  {'finished' if row['finished_at'] else 'not finished'}")


def gates(verdicts: Sequence[GateVerdict], *, as_json: bool) -> None:
    """Print gates with reason, threshold and the number of rows behind each."""
    if as_json:
        print(json.dumps([verdict.body() for verdict in verdicts], indent=1))
        return
    console = console_of_output()
    for verdict in verdicts:
        console.print(gate_line(verdict))
        console.print(f"    rule: {escape(verdict.threshold)}; {counted(len(verdict.rows), 'row')}", style="dim")


def check(report: CheckReport, *, as_json: bool, base: str = "") -> None:
    """Print the audit's findings, the worst first, each with its rows and how to fix it; `base`: why no run takes the base."""
    if as_json:
        refused = {"passed": False, "base": base} if base else {}
        print(json.dumps(report.to_json() | refused, indent=1))
        return
    console = console_of_output()
    colours = {"refuse": "red", "warn": "yellow", "note": "dim"}
    for finding in report.findings:
        accepted = report.accepted.get(finding.code)
        word = f"accepted ({escape(accepted)})" if accepted else f"[{colours[finding.severity]}]{finding.severity}[/]"
        figure = f" ({escape(finding.figure)})" if finding.figure else ""
        console.print(f"{finding.code} {word} {escape(finding.subject)}: {escape(finding.why)}{figure}")
        if finding.rows:
            console.print(f"    rows: {escape(first_few(finding.rows, 5))}", style="dim")
        if finding.severity != "note":
            console.print(f"    mend: {escape(finding.mend)}", style="dim")
    if base and not report.passed:
        console.print(f"[red]base[/]: {escape(base)}")
    console.print(f"{len(report.refusals)} refused, {len(report.warnings)} warnings, {len(report.accepted)} accepted")


def peek(sets: Iterable[tuple[str, Sequence[RenderableType]]], *, as_json: bool) -> None:
    """Print rendered rows of training sets, each set under its name."""
    console = console_of_output()
    if as_json:
        print(json.dumps([{"set": title, "lines": list(map(str, lines))} for title, lines in sets], indent=1))
        return
    for title, lines in sets:
        console.rule(escape(title))
        for line in lines:
            console.print(line)


def scored(report: ScoreReport, *, as_json: bool) -> None:
    """Print accuracy and chance; with `as_json` every question."""
    if as_json:
        print(json.dumps(asdict(report)))
        return
    n_right = sum(question.correct for question in report.questions)
    console_of_output().print(
        f"{n_right} of {len(report.questions)} right: {100 * report.accuracy:.1f} % (chance {100 * report.chance:.1f} %)"
    )


def bench(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print our measurements beside those of the reference implementations."""
    if as_json:
        print(json.dumps(result))
        return
    console = console_of_output()
    console.print(
        f"{result['kind']}: {result['work']}; {result['model']} on {result['device']} in {result['dtype']}, {result['threads']} threads"
    )
    table = Table(box=None, pad_edge=False)
    for name in ("way", "seconds", f"{result['unit']}/s", "peak memory", "written", "of ceiling", "ours is"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for way in (result["ours"], *result["usual"]):
        ratio = result["ratios"].get(way["name"])
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
    if "padding" in (extra := result["extra"]):
        console.print(
            f"padded by {100 * extra['padding']:.1f} %; micro-steps launched {extra['launched']:.0f}, replayed "
            f"{extra['replayed']:.0f}; {extra['captures']:.0f} captures took {extra['capture_s']:.2f} s of these seconds"
        )


def bench_all(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print every comparison of one machine."""
    if as_json:
        print(json.dumps(found))
        return
    for result in found["results"].values():
        bench(result, as_json=False)
    console = console_of_output()
    for kind, reason in found["left_out"].items():
        console.print(escape(f"{kind}: not measured: {reason}"))


def changes(found: Sequence[Change], *, as_json: bool) -> None:
    """Print what two files of benchmarks have in common. Raises GateStop if something got slower."""
    slower = [change for change in found if change.slower]
    if as_json:
        print(json.dumps([{**asdict(change), "share": change.share, "slower": change.slower} for change in found]))
    else:
        table = Table(box=None, pad_edge=False)
        for name in ("kind", "figure", "before", "after", "after over before"):
            table.add_column(name, justify="left" if name in ("kind", "figure") else "right")
        for change in found:
            told = f"{change.share:.2f}" + (" slower" if change.slower else "")
            table.add_row(change.kind, change.figure, f"{change.before:.4g}", f"{change.after:.4g}", told)
        console_of_output().print(table)
    if slower:
        raise GateStop(
            f"{len(slower)} of {len(found)} figures got slower, most of all {min(slower, key=lambda one: one.share).kind}",
            where="bench compare",
            fix="measure both again on a quiet machine; then find the change that made it slower",
        )


def doctor(findings: Sequence[Diagnosis], *, as_json: bool) -> None:
    """Print the doctor's diagnoses."""
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
        return
    console = console_of_output()
    for finding in findings:
        mark = "[red]no [/]" if finding.exit_code else "[green]ok [/]"
        console.print(f"{mark} {escape(finding.subject)}: {escape(finding.text)}")


def console_of_output() -> Console:
    """Console for standard output; lines are not wrapped where it is no terminal."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())
