"""Part vllm: one cell of pilot_small drawn by a vLLM server and by the resident base, and a server that is killed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import takewhile
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from fastconv.bench.training import free_memory
from fastconv.chat import ChatTokenizer
from fastconv.engine.builtin import prepare_model_folder
from fastconv.engine.generate import Completion, sample
from fastconv.engine.vllm.sampler import VllmSampler
from fastconv.engine.vllm.server import COMMAND_VARIABLE, Server, start_server
from fastconv.engine.vllm.watchdog import children_of
from fastconv.errors import SamplerError
from fastconv.recipe import SamplingSettings
from fastconv.run.sampling import max_sequence_tok
from tests.card.cells import STACKS, OpenCell, recipe_of
from tests.card.grid import ENDED, FASTCONV, Grid, ignore_gates
from tests.card.ledgers import leases, read_ledger
from tests.card.process import run_child
from tests.card.sheet import Job, Sheet

_VLLM = Grid("pilot_small", ("model.sampler=vllm",))
#: Seconds that a run with a server needs at least; less is not worth beginning.
_LEAST_S = 90.0
_TOLD_ARGUMENTS = (
    "--gpu-memory-utilization",
    "--kv-cache-memory-bytes",
    "--max-model-len",
    "--max-lora-rank",
    "--max-num-seqs",
)


def vllm(job: Job, sheet: Sheet) -> None:
    """Greedy agreement, rates, speed and swaps in one process; then whole runs of the cell, one with its server killed."""
    if job.rehearse:  # a server that draws with our own engine
        os.environ.setdefault(COMMAND_VARIABLE, shlex.join([sys.executable, "-m", "tests.fake_vllm"]))
        os.environ.setdefault("VLLM_FAKE_SCRIPT", json.dumps({"engine": True, "latency_s": 0.3}))
    if COMMAND_VARIABLE not in os.environ:
        sheet.end("skipped", f"{COMMAND_VARIABLE} names no vLLM")
        return
    if "draws" not in sheet.found or "killed_in_a_draw" not in sheet.found:
        side_by_side(job, sheet)
        free_memory()  # the runs below size their server by what is free
    if not job.rehearse and job.left_s < _LEAST_S:
        sheet.end("stopped", "no time left for the run whose server is killed")
        return
    killed_run(job, sheet)


# --- in one process ----------------------------------------------------------------------------------------------------


def side_by_side(job: Job, sheet: Sheet) -> None:
    """The server and the resident base on one card, each asked the same under no, one and two adapters."""
    recipe = recipe_of(job, _VLLM)
    # Keys name the sampler where it decides what is drawn: this cell, and so its adapters, is the resident recipe's.
    cell = OpenCell.of(job)
    tokenizer = ChatTokenizer(prepare_model_folder(recipe.model, cell.graph.source), recipe.model)
    stages = [stage.needs["eval"] for stage in cell.base_cell.scores.values() if "eval" in stage.needs]
    before = memory_free()
    server = start_server(recipe, cell.graph.source, max_sequence_tok(stages, tokenizer), cell.store.root)
    with closing(server):
        sheet.note(
            start_s=round(server.start_s, 2), version=server.version, adapters=cell.origin, arguments=told_arguments(server),
            memory_free_bytes={"before": before, "with_server": memory_free()},
        )  # fmt: skip
        began = time.perf_counter()
        assert cell.stack.base is not None
        sheet.note(base_loaded_s=round(time.perf_counter() - began, 2), memory_free_with_base_bytes=memory_free())
        with closing(VllmSampler(server, cell.stack)) as sampler:
            found: dict[str, Any] = {}
            for name in STACKS:
                with cell.live(name):
                    found[name] = {"swap": swap(cell, sampler), **both(cell, sampler)}
                sheet.note(draws=found)
            with cell.live("base"):
                sheet.note(killed_in_a_draw=killed_in_a_draw(cell, server, sampler))


def memory_free() -> dict[str, int] | None:
    """Bytes of the card's memory, free and in all; None without a card."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return {"free": free, "total": total}


def told_arguments(server: Server) -> dict[str, str]:
    """The sizes that the server was started with, as its command line has them."""
    words = Path(f"/proc/{server._process.pid}/cmdline").read_text().split("\0")
    return {word: words[place + 1] for place, word in enumerate(words[:-1]) if word in _TOLD_ARGUMENTS}


def swap(cell: OpenCell, sampler: VllmSampler) -> dict[str, float]:
    """Seconds of one token of one prompt under a new stack, and again: the difference is the swap."""
    prompts = cell.prompts
    one = prompts.settings.model_copy(update={"max_new_tok": 1})
    took = []
    for _ in range(2):
        began = time.perf_counter()
        sampler.draw(prompts.ids[:1], prompts.seeds[:1], one, lambda n_tok: None)
        took.append(time.perf_counter() - began)
    return {"first_s": round(took[0], 4), "again_s": round(took[1], 4), "swap_s": round(took[0] - took[1], 4)}


def both(cell: OpenCell, sampler: VllmSampler) -> dict[str, Any]:
    """What both draw under the live stack, greedily and at the recipe's temperature."""
    prompts, found = cell.prompts, dict[str, Any]()
    greedy = prompts.settings.model_copy(update={"temperature": 0.0, "top_p": 1.0})
    for name, settings in (("greedy", greedy), ("sampled", prompts.settings)):
        drawn, told = {}, {}
        for way in ("vllm", "resident"):
            began = time.perf_counter()
            drawn[way] = _drawn(cell, sampler if way == "vllm" else None, settings)
            seconds = time.perf_counter() - began
            n_tok = sum(len(one.ids) + one.ended for one in drawn[way])
            told[way] = {"seconds": round(seconds, 3), "tok": n_tok, "tok_per_s": round(n_tok / seconds)}
        more = agreement(drawn["vllm"], drawn["resident"]) if name == "greedy" else rates(cell, drawn)
        found[name] = {**told, **more}
    return found


def _drawn(cell: OpenCell, sampler: VllmSampler | None, settings: SamplingSettings) -> list[Completion]:
    ids, seeds = cell.prompts.ids, cell.prompts.seeds
    if sampler is not None:
        return sampler.draw(ids, seeds, settings, lambda n_tok: None)
    return sample(cell.stack.base, ids, seeds, settings)


def agreement(first: Sequence[Completion], second: Sequence[Completion]) -> dict[str, Any]:
    """How far two ways agree: completions that are the same, and the tokens before the first that is not."""
    pairs = [
        ((*a.ids, -1) if a.ended else a.ids, (*b.ids, -1) if b.ended else b.ids)
        for a, b in zip(first, second, strict=True)
    ]
    same = [len(list(takewhile(lambda two: two[0] == two[1], zip(a, b, strict=False)))) for a, b in pairs]
    parted = [n for n, (a, b) in zip(same, pairs, strict=True) if a != b]
    longest = sum(max(len(a), len(b)) for a, b in pairs)
    return {
        "same_completions": sum(a == b for a, b in pairs), "of": len(pairs),
        "same_tok_share": round(sum(same) / max(1, longest), 4),
        "median_tok_before_they_part": statistics.median(parted) if parted else None,
    }  # fmt: skip


def rates(cell: OpenCell, drawn: Mapping[str, Sequence[Completion]]) -> dict[str, Any]:
    """The rate of the trained behavior by probe in both ways, with the standard error over questions, and how many of its errors
    their difference is."""
    rule, tokenizer = cell.graph.phrase_rule(cell.graph.behaviors["refusal"]), cell.stacks.base.tokenizer
    found, begin = {}, 0
    for requests in cell.prompts.requests:
        end = begin + len(requests.items)
        sides = {}
        for way, completions in drawn.items():
            by_question: dict[str, list[float]] = {}
            for (row, _, _), one in zip(requests.items, completions[begin:end], strict=True):
                by_question.setdefault(row, []).append(rule.score(tokenizer.answer_text(one.ids))[0])
            sides[way] = [statistics.fmean(values) for values in by_question.values()]
        apart = [a - b for a, b in zip(sides["vllm"], sides["resident"], strict=True)]
        error = _error(apart)
        found[requests.persona] = {
            **{way: {"rate": round(statistics.fmean(means), 4), "error": round(_error(means), 4)} for way, means in sides.items()},
            "difference": round(statistics.fmean(apart), 4), "its_error": round(error, 4),
            "errors_apart": round(statistics.fmean(apart) / error, 2) if error else None,
        }  # fmt: skip
        begin = end
    return {"rates": found}


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0


def killed_in_a_draw(cell: OpenCell, server: Server, sampler: VllmSampler) -> dict[str, Any]:
    """Kill vLLM with SIGKILL while it draws: what the caller is told, and after how many seconds."""
    prompts = cell.prompts
    killed_at: list[float] = []

    def on_token(n_tok: int) -> None:
        if not killed_at and (n_tok or time.perf_counter() > patience):
            killed_at.append(time.perf_counter())
            kill_servers(server._process.pid, itself=False)

    patience = time.perf_counter() + 2.0
    long = prompts.settings.model_copy(update={"max_new_tok": max(64, prompts.settings.max_new_tok)})
    try:
        sampler.draw(prompts.ids, prompts.seeds, long, on_token)
    except SamplerError as error:
        told = str(error)
        return {
            "told": told[:600],
            "lines": len(told.splitlines()),
            "after_s": round(time.perf_counter() - killed_at[0], 2) if killed_at else None,  # None: it died by itself
        }
    return {"told": "", "missed": "all was drawn before the kill" if not killed_at else "the draw ended all the same"}


# --- whole runs --------------------------------------------------------------------------------------------------------


def killed_run(job: Job, sheet: Sheet) -> None:
    """The cell as a run whose vLLM is killed while it draws, and the same command again, to its end."""
    workspace, log = job.scratch / "vllm-run" / "checkpoints", job.path("run.log")
    named = _VLLM.named(job)
    command = [*FASTCONV, "cell", "villain", "refusal", "--epoch", "0", "--negatives", "included", "--recipe", *named,
               "-w", str(workspace), "--reports", str(workspace.parent / "reports"), "--approve", *ignore_gates(job)]  # fmt: skip
    killed: list[str] = []

    def kill(pid: int) -> str:
        held = [] if killed else leases(workspace / "ledger.sqlite")
        drawing = next((one for one in held if one.pid == pid and one.slot.startswith("eval/") and one.done > 0), None)
        if drawing is None and job.rehearse:  # tiny draws end before their first note
            drawing = next((one for one in held if one.pid == pid and "refusal" in one.slot), None)
        if drawing is not None and kill_servers(pid):
            killed.append(f"{drawing.slot}, {drawing.done} of {drawing.total} tokens")
        return ""

    runs: list[dict[str, Any]] = sheet.found.get("runs", [])
    for each in (kill, lambda pid: ""):
        n_before = len(killed)
        ran = run_child(command, log, deadline=job.deadline, each=each)
        at = killed[-1] if len(killed) > n_before else None
        told = {
            "seconds": round(ran.seconds, 1),
            "exit_code": ran.code,
            "killed_at": at,
            "last": ran.last,
        }
        runs.append({**told, "errors": [line for line in ran.tail if "Traceback" in line]})
        sheet.note(runs=runs)
        if ran.killed:
            sheet.end("stopped", ran.killed)
            return
        if ran.code in ENDED and not killed:
            break
    ledger = read_ledger(workspace / "ledger.sqlite")
    drawn = {slot: stage.facts for slot, stage in ledger.stages.items() if "sampled_tok" in stage.facts}
    sheet.note(run_engine=ledger.facts.get("engine"), drawn=drawn)
    sheet.end(
        "complete" if runs[-1]["exit_code"] in ENDED else "failed",
        "" if runs[-1]["exit_code"] in ENDED else runs[-1]["last"],
    )


def kill_servers(pid: int, *, itself: bool = True) -> list[int]:
    """SIGKILL the vLLM processes below `pid`: the watchdog's child and its own. Returns their ids."""
    watchdogs = [one for one in descendants(pid) if "watchdog.py" in _command(one)]
    watchdogs += [] if itself else [pid]
    found = [child for watchdog in watchdogs for child in descendants(watchdog)]
    for child in found:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return found


def descendants(pid: int) -> Iterator[int]:
    """Ids of all processes below this one."""
    below = children_of(pid)
    for child in below:  # grows
        yield child
        below += children_of(child)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
