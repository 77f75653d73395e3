"""`python -m tests.card PART [PART...] --out DIR --model FOLDER --arc FILE`: runs parts one after another, each in a process of its own.

`compare` compares kept ledgers again (a part may have ended before the pilot did), `table` prints rows for docs/MEASURED.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.card.grid import compare_with_pilot
from tests.card.part import PARTS
from tests.card.process import Watch, run_child
from tests.card.sheet import NO_CARD, Job, Sheet, has_card, machine, read_sheet
from tests.card.table import markdown
from tests.tiny import tiny_model_folder

#: Parts whose ledgers are compared with the pilot's.
COMPARED = ("killed", "engine", "four_bit")
#: What a part gets after the deadline to write its checkpoint and its sheet.
_GRACE_S = 35.0


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.card", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "compare", "table"], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, required=True, help="where sheets, logs and ledgers are kept")
    parser.add_argument("--model", default="", help="folder of a real base of about 1.5B (a Qwen2, for seven)")
    parser.add_argument("--arc", default="", help="ARC-Challenge's questions as JSONL")
    parser.add_argument(
        "--scratch", type=Path, help="folder for adapters and bases (default: OUT/scratch); keep it between calls"
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="for all of these parts; they end within one more"
    )
    parser.add_argument("--because", default=Job.why, help="why gates may fail, as a run records it")
    parser.add_argument("--again", action="store_true", help="also parts that are complete, from their beginning")
    parser.add_argument(
        "--rehearse", action="store_true", help="on a machine without a card: a tiny model, recipes at scale tiny"
    )
    return parser.parse_args(arguments)


def job_of(given: argparse.Namespace) -> Job:
    """The job that all parts share. Raises SystemExit where something is missing."""
    out = given.out.resolve()
    scratch = (given.scratch or out / "scratch").resolve()
    model = given.model and str(Path(given.model).resolve())
    if given.rehearse and not model:
        folder = scratch / "tiny"
        model = str(folder if folder.is_dir() else tiny_model_folder(folder, "qwen2"))
    if not model:
        raise SystemExit("--model names no folder (or --rehearse, without a card)")
    if not (given.rehearse or given.arc):
        raise SystemExit("--arc names no file with ARC-Challenge's questions")
    arc = given.arc and str(Path(given.arc).resolve())
    deadline = time.time() + 60 * given.minutes
    return Job("", out, scratch, model, arc, deadline, given.rehearse, given.because)


def run_part(job: Job, *, again: bool = False) -> str:
    """Run one part unless it is complete; returns a line about it."""
    sheet = Sheet(job.out / f"{job.part}.json")
    if sheet.found.get("state") == "complete" and not again:
        return "complete already"
    if again:
        begin_anew(job, sheet)
    if job.left_s <= 0:
        if not sheet.found:
            sheet.end("stopped", "no time was left for it")
        return "no time left"
    if not (job.rehearse or has_card()):
        sheet.end("skipped", NO_CARD)
        return f"skipped: {NO_CARD}"
    sheet.note(part=job.part, state="running", why="", began_at=time.time(), machine=machine(), rehearsal=job.rehearse)
    command = [sys.executable, "-m", "tests.card.part", job.to_json()]
    with Watch(job.path("smi.csv")) as looked:
        ran = run_child(command, job.out / f"{job.part}.log", deadline=job.deadline + _GRACE_S)
    sheet = Sheet(sheet.path)  # as the part left it
    sheet.note(part_s=round(ran.seconds, 1), **({"smi_missing": looked.missing} if looked.missing else {}))
    if sheet.found["state"] == "running":
        sheet.end("stopped" if ran.killed else "failed", ran.killed or ran.last)
    return " ".join(filter(None, (sheet.found["state"], sheet.found.get("why", "")))) + f" ({ran.seconds:.0f} s)"


def begin_anew(job: Job, sheet: Sheet) -> None:
    """Forget what a part has found and computed: finished stages would leave nothing to time."""
    sheet.found = {}
    for name in (job.part, *(f"{job.part}-{rest}" for rest in ("run", "one", "ray"))):
        shutil.rmtree(job.scratch / name, ignore_errors=True)
    job.path("smi.csv").unlink(missing_ok=True)


def compare_again(out: Path) -> None:
    """Compare every kept ledger with the pilot's."""
    for part in COMPARED:
        if read_sheet(out / f"{part}.json").get("sittings"):
            Sheet(out / f"{part}.json").note(against_pilot=compare_with_pilot(out, part))


def main(arguments: Sequence[str]) -> int:
    """Run, compare or print what is asked; 1 if a part failed."""
    given = parsed(arguments)
    wanted = [part for part in given.parts if part in PARTS]
    job, failed = job_of(given) if wanted else None, False
    for part in wanted:
        assert job is not None
        line = run_part(replace(job, part=part), again=given.again)
        failed |= line.startswith("failed")
        print(f"{part}: {line}", flush=True)
    if {"compare", "table"} & set(given.parts):
        compare_again(given.out.resolve())
    if "table" in given.parts:
        print(markdown(given.out.resolve()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
