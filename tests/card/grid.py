"""The parts that are runs of fastconv: pilot, killed, engine, four_bit, ungated, and what they share with seven and ray."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from fastconv.recipe import IgnorableGate
from tests.card import timing
from tests.card.ledgers import (
    KeptLedger,
    Lease,
    Ledger,
    compare,
    compare_words,
    copy_ledger,
    leases,
    read_ledger,
)
from tests.card.process import Ran, read_looks, run_child
from tests.card.sheet import Job, Sheet, n_cards, read_sheet

FASTCONV = (sys.executable, "-m", "fastconv")
NO_LOOKS = "nvidia-smi was not asked"
#: Exit codes with which a run has said all that it will: done, and ended by a gate.
ENDED = (0, 3)


@dataclass(frozen=True)
class Grid:
    """A run of a recipe: the settings that differ, further arguments, and the workspace where it is not the part's own."""

    recipe: str
    settings: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    workspace: str = ""
    #: A base of its own instead of the job's.
    model: str = ""

    def named(self, job: Job) -> list[str]:
        """The recipe and its settings, as `run`, `plan` and `cell --recipe` take them."""
        scale = ["--scale", "tiny"] if job.rehearse else []
        settings = [f"model.id={self.model or job.model}", "model.revision="]
        if job.arc and not job.rehearse:
            settings.append(f"eval.arc_file={job.arc}")
        return [self.recipe, *scale, *(part for one in (*settings, *self.settings) for part in ("--set", one))]

    def folder(self, job: Job) -> Path:
        """Its workspace."""
        return job.workspace(self.workspace)


def ignore_gates(job: Job) -> tuple[str, ...]:
    """Arguments that let every gate fail that would end a run: what is measured is the run."""
    gates = get_args(IgnorableGate)
    return (*(part for gate in gates for part in ("--ignore-gate", gate)), "--because", job.why)


def plan_json(job: Job, grid: Grid, log: Path) -> dict[str, Any]:
    """What `fastconv plan` says of a grid in its workspace; empty where it cannot be planned."""
    out = job.path(f"plan-{grid.recipe}.json")
    command = [*FASTCONV, "plan", *grid.named(job), "-w", str(grid.folder(job)), "--json"]
    ran = run_child(command, log, deadline=job.deadline, out=out)
    told = read_sheet(out)
    return told if ran.ok else {"problem": ran.killed or told.get("error", ran.last)}


@contextlib.contextmanager
def planned_beside(job: Job, sheet: Sheet, plans: Mapping[str, Grid]) -> Iterator[None]:
    """Plans grids while the block runs, which is what waits for the card: a plan alone hashes the base several times.

    Each is noted at the block's end under its name, unless it stands there already.
    """
    left = {name: grid for name, grid in plans.items() if "kinds" not in sheet.found.get(name, {})}
    with ThreadPoolExecutor(max(1, len(left))) as beside:
        made = {name: beside.submit(plan_json, job, grid, job.path(f"{name}.log")) for name, grid in left.items()}
        yield
        for name, plan in made.items():
            sheet.note(**{name: plan.result()})


def run_grid(
    job: Job, sheet: Sheet, grid: Grid, *, each: Callable[[int], str] = lambda pid: "",
    plans: Mapping[str, Grid] | None = None,
) -> Ran:  # fmt: skip
    """Run a grid to its report, or on from where it was killed, and note all that the run tells.

    Each sitting stands under `sittings`; walls and looks are of the last one, which is the whole run if there was one.
    `plans` are made meanwhile and noted by name; by default the grid's own as `plan`.
    """
    workspace, log = grid.folder(job), job.path("run.log")
    ledger_file, kept_file = workspace / "ledger.sqlite", job.path("ledger.sqlite")
    reports = workspace.parent / "reports"
    command = [*FASTCONV, "run", *grid.named(job), "-w", str(workspace), "--reports", str(reports), "--approve", *grid.arguments]  # fmt: skip
    began, kept = time.time(), KeptLedger(ledger_file, kept_file)
    looks_file = sheet.path.with_name(f"{sheet.path.stem}-smi.csv")

    def watch(pid: int) -> str:
        if kept.now_and_then():
            note_run(sheet, read_ledger(kept_file), began, time.time(), looks_file)
        return each(pid)

    with planned_beside(job, sheet, {"plan": grid} if plans is None else plans):
        ran = run_child(command, log, deadline=job.deadline, each=watch)
    copy_ledger(ledger_file, kept_file)
    ledger = read_ledger(kept_file)
    sittings = [*sheet.found.get("sittings", []), _sitting(ran)]
    sheet.note(
        command=" ".join(command[2:]), sittings=sittings, smi=looks_file.name if looks_file.is_file() else NO_LOOKS
    )
    note_run(sheet, ledger, ran.began, ran.began + ran.seconds, looks_file)
    sheet.note(contrasts=timing.contrast_words(reports), exit_code=ran.code)
    if ran.code in ENDED and not ran.killed:
        _keep_report(reports, job)
    return ran


def _sitting(ran: Ran) -> dict[str, Any]:
    times = {"began": ran.began, "seconds": round(ran.seconds, 2), "quiet_at_the_end_s": round(ran.quiet_s, 2)}
    told = {**times, "exit_code": ran.code, "killed": ran.killed}
    return told if ran.ok else {**told, "last": ran.last}


def _keep_report(reports: Path, job: Job) -> None:
    """Keep the newest report's Markdown twin beside the sheet."""
    pages = sorted(reports.glob("*.md"), key=lambda path: path.stat().st_mtime)
    if pages:
        shutil.copy(pages[-1], job.path("report.md"))


def note_run(sheet: Sheet, ledger: Ledger, began: float, ended: float, looks_file: Path) -> None:
    """Note all that a ledger and the looks tell of a run."""
    looks = [look for look in read_looks(looks_file) if began <= look.at <= ended]
    facts = ledger.facts
    sheet.note(
        engine=facts.get("engine"), git=facts.get("git"), python=facts.get("python"), recorded_versions=facts.get("versions"),
        wall=timing.wall(ledger, began, ended),
        against_plan=timing.plan_against_actual(ledger, sheet.found.get("plan", {}).get("kinds", ())),
        rates=timing.rates(ledger), card=timing.card_use(ledger, looks), memory=timing.memory(ledger),
        captures=timing.captures(ledger), figures=timing.figures(ledger), gates=dict(ledger.gates),
    )  # fmt: skip


def ended(ran: Ran, sheet: Sheet) -> None:
    """End a part whose last act was this run."""
    if ran.killed:
        sheet.end("stopped", f"{ran.killed}; the same command goes on")
    elif ran.code in ENDED:
        sheet.end("complete", "" if ran.ok else f"a gate ended it: {ran.last}")
    else:
        sheet.end("failed", ran.last)


def compare_with_pilot(out: Path, part: str) -> dict[str, Any]:
    """A part's ledger against the pilot's, both as they were kept, and the words of their contrasts."""
    pilot, other = (read_ledger(out / f"{name}-ledger.sqlite") for name in ("pilot", part))
    if not pilot.stages or not other.stages:
        return {"missing": "the pilot's ledger" if not pilot.stages else f"the ledger of {part}"}
    words = [read_sheet(out / f"{name}.json").get("contrasts", {}) for name in ("pilot", part)]
    return {**compare(pilot, other), "contrasts": compare_words(*words)}


# --- parts -----------------------------------------------------------------------------------------------------------

PILOT = Grid("pilot_small")


def pilot(job: Job, sheet: Sheet) -> None:
    """pilot_small as it ships, alone on its card."""
    ended(run_grid(job, sheet, PILOT), sheet)


def engine(job: Job, sheet: Sheet) -> None:
    """pilot_small on engine torch, against the pilot."""
    ran = run_grid(job, sheet, Grid("pilot_small", ("model.engine=torch",)))
    sheet.note(against_pilot=compare_with_pilot(job.out, job.part))
    ended(ran, sheet)


def four_bit(job: Job, sheet: Sheet) -> None:
    """small_gpu on the pilot's base: 4 bits, moments in 8."""
    ran = run_grid(job, sheet, Grid("small_gpu", arguments=ignore_gates(job)))
    plan = sheet.found.get("plan", {})
    adapters = {
        slot: round(stage.seconds, 2)
        for slot, stage in read_ledger(job.path("ledger.sqlite")).stages.items()
        if stage.kind == "behavior"
    }
    peak = {
        "planned_bytes": plan.get("memory_bytes"), "torch_bytes": sheet.found["memory"]["torch_peak_bytes"],
        "nvidia_smi_mib": sheet.found["card"]["all"].get("most_memory_mib"),
    }  # fmt: skip
    sheet.note(adapter_seconds=adapters, peak_memory=peak, against_pilot=compare_with_pilot(job.out, job.part))
    ended(ran, sheet)


def ungated(job: Job, sheet: Sheet) -> None:
    """pilot_small although G0, or another gate, fails: in the pilot's workspace if that is complete here, so that only the rest is computed."""
    done = read_sheet(job.out / "pilot.json").get("state") == "complete"
    shares = done and (job.workspace("pilot") / "ledger.sqlite").is_file()
    grid = Grid("pilot_small", arguments=ignore_gates(job), workspace="pilot" if shares else "")
    sheet.note(workspace="the pilot's: only what G0 had ruled out is computed" if shares else "its own")
    ended(run_grid(job, sheet, grid), sheet)


@dataclass(frozen=True)
class Kill:
    """When to kill: a stage whose slot begins so is held by a living process and done to this share."""

    where: str
    prefix: str
    share: float

    def due(self, found: Sequence[Lease], pids: Sequence[int]) -> Lease | None:
        """The lease that it waits for."""
        fitting = (one for one in found if one.slot.startswith(self.prefix) and one.pid in pids)
        return next((one for one in fitting if one.share >= self.share), None)


#: In the order in which a run meets them. The first evaluation above an adapter: the base's are over too soon.
KILLS = (
    Kill("behavior", "behavior/", 0.3),
    Kill("evaluation", "eval/villain/", 0.02),
    Kill("snapshot", "snapshot/", 0.3),
)


def killed(job: Job, sheet: Sheet) -> None:
    """pilot_small, killed with SIGKILL in a behavior adapter, an evaluation and a snapshot; then against the pilot."""
    ledger_file = job.workspace() / "ledger.sqlite"
    kills: list[dict[str, Any]] = sheet.found.get("kills", [])
    for kill in KILLS[len(kills) :]:
        least = Kill(kill.where, kill.prefix, 0.0) if job.rehearse else kill
        seen: list[Lease] = []

        def each(pid: int, least: Kill = least, seen: list[Lease] = seen) -> str:
            lease = least.due(leases(ledger_file), [pid])
            seen += [lease] if lease is not None else []
            return f"kill -9 in {least.where}" if lease is not None else ""

        ran = run_grid(job, sheet, PILOT, each=each, plans={})
        if ran.killed == "out of time":
            ended(ran, sheet)
            return
        at = (
            {"slot": seen[0].slot, "done": seen[0].done, "of": seen[0].total} if seen else {"missed": "it ended before"}
        )
        kills.append({"where": kill.where, **at, "after_s": round(ran.seconds, 2), "exit_code": ran.code})
        sheet.note(kills=kills)
        if not seen:
            break  # the run has ended, there is nothing left to kill
    ran = run_grid(job, sheet, PILOT, plans={})
    sheet.note(against_pilot=compare_with_pilot(job.out, job.part))
    ended(ran, sheet)


def ray(job: Job, sheet: Sheet) -> None:
    """Two sources on all cards through Ray, against one card after another."""
    if find_spec("ray") is None:
        sheet.end("skipped", "Ray is not installed")
        return
    if (n := n_cards()) < 2:
        sheet.end("skipped", f"it needs two cards, and there {'is one' if n else 'is none'}")
        return
    epochs = "grid.epochs=[0,1]" if job.rehearse else "grid.epochs=[0,4]"
    sources = ('grid.sources=["villain","comedian"]', epochs, 'grid.behaviors=["none","refusal"]')
    gates = ignore_gates(job)
    found: dict[str, Any] = {}
    for name, more in (("ray", ("--ray",)), ("one", ())):
        grid = Grid("pilot_small", sources, (*gates, *more), f"ray-{name}")
        ran = run_grid(job.named(f"ray-{name}"), sheet, grid, plans={})
        found[name] = {"seconds": round(ran.seconds, 2), "exit_code": ran.code, "wall": sheet.found["wall"]}
        sheet.note(runs=found)
        if ran.killed or ran.code not in ENDED:
            ended(ran, sheet)
            return
    first, second = (read_ledger(job.out / f"ray-{name}-ledger.sqlite") for name in ("one", "ray"))
    sheet.note(
        against_one=compare(first, second), times_faster=round(found["one"]["seconds"] / found["ray"]["seconds"], 3)
    )
    sheet.end("complete")
