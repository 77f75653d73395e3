"""Parts drawing and steps: where the time of sampling and of a training step goes."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch

from fastconv.bench import bench_model
from fastconv.bench.measure import Clock
from fastconv.bench.training import LOADS, WARM_UP, free_memory, make_jobs
from fastconv.engine import decode, generate, shapes
from fastconv.engine.cuda_graph import CudaDevice
from fastconv.engine.stack import Stack
from fastconv.engine.train import Hooks, captured_steps, start, train
from fastconv.recipe import ModelSettings
from tests.card.cells import STACKS, OpenCell
from tests.card.profiling import profiled
from tests.card.sheet import Job, Sheet

#: New tokens of each row under the profiler: a whole draw would be half a million kernels.
PROFILED_TOK = 48
#: Steps under the profiler, and the sizes of base whose steps are profiled.
PROFILED_STEPS, SIZES = 6, ("random:qwen2.5-1.5b", "random:qwen2.5-7b")
LOAD_KINDS = ("train", "behavior", "group")


@dataclass
class Passes:
    """What a draw was: passes by number of rows, seconds of captures (host) and of prefills (device), and their numbers."""

    device: torch.device
    by_rows: Counter[int] = field(default_factory=Counter)
    rows: int = 0
    captures: list[float] = field(default_factory=list)
    prefills: list[Callable[[], float]] = field(default_factory=list)
    prefill_rows: list[int] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """The findings; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return {
            "passes": sum(self.by_rows.values()), "rows_computed": sum(n * count for n, count in self.by_rows.items()),
            "rows_wanted": self.rows, "by_rows": {str(n): count for n, count in sorted(self.by_rows.items())},
            "captures": len(self.captures), "capture_s": round(sum(self.captures), 4),
            "prefills": len(self.prefills), "prefill_rows": self.prefill_rows,
            "prefill_s": round(sum(seconds() for seconds in self.prefills), 4),
        }  # fmt: skip

    def timed(self) -> tuple[Callable[[], None], Callable[[], float]]:
        """(end the span that begins now, its seconds on the device)."""
        if self.device.type != "cuda":
            times = [time.perf_counter()]
            return lambda: times.append(time.perf_counter()), lambda: times[1] - times[0]
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        return ended.record, lambda: began.elapsed_time(ended) / 1000


@contextlib.contextmanager
def watched_passes(device: torch.device) -> Iterator[Passes]:
    """Counts the passes, captures and prefills of draws in the block. Nothing waits for the device."""
    passes, prefill, capture = Passes(device), generate._prefill, CudaDevice.capture

    def counted(launch: Any) -> Any:
        def counting(self: Any, slots: Any) -> Any:
            passes.by_rows[self.size(len(slots))] += 1
            passes.rows += sum(row is not None for row in slots)
            return launch(self, slots)

        return counting

    def timed_prefill(base: Any, new: Any, *others: Any) -> Any:
        end, seconds = passes.timed()
        found = prefill(base, new, *others)
        end()
        passes.prefills.append(seconds)
        passes.prefill_rows.append(len(new))
        return found

    def timed_capture(self: CudaDevice, run: Callable[[], None]) -> Callable[[], None]:
        began = time.perf_counter()
        found = capture(self, run)
        passes.captures.append(time.perf_counter() - began)
        return found

    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(generate, "_prefill", timed_prefill))
        patches.enter_context(patch.object(CudaDevice, "capture", timed_capture))
        for kind in (decode.Decoder, decode.DeviceDecoder):
            patches.enter_context(patch.object(kind, "launch", counted(kind.launch)))
        yield passes


def draw(cell: OpenCell, n: int | None = None, most_tok: int | None = None) -> dict[str, Any]:
    """Draw what the cell's probes are asked under the live stack, at the recipe's settings; the first `n` prompts if given."""
    device, prompts = cell.stack.base.device, cell.prompts
    ids, seeds, settings = prompts.ids[:n], prompts.seeds[:n], prompts.settings
    limits = [most_tok] * len(ids) if most_tok is not None else ()
    with watched_passes(device) as passes:
        began = time.perf_counter()
        drawn = generate.sample(cell.stack.base, ids, seeds, settings, limits=limits)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        told = passes.told()
    n_tok = sum(len(one.ids) + one.ended for one in drawn)
    lengths = sorted(len(one.ids) + one.ended for one in drawn)
    return {
        "prompts": len(ids), "tok": n_tok, "seconds": round(seconds, 4), "tok_per_s": round(n_tok / seconds),
        "ended": sum(one.ended for one in drawn), "median_tok": lengths[len(lengths) // 2], "longest_tok": lengths[-1],
        **told,
    }  # fmt: skip


def draw_in_waves(cell: OpenCell) -> dict[str, Any]:
    """The same with at most 1,024 rows at once, captures aside: are larger passes faster?"""
    with patch.object(shapes, "MANY_ROWS", 0):
        cell.stack.base.drop_kept()
        draw(cell)
        found = draw(cell)
    cell.stack.base.drop_kept()
    return found


def profiled_draw(cell: OpenCell) -> dict[str, Any]:
    """A short draw with what is captured already, timed by itself and then under the profiler, which slows it.

    Before `draw_in_waves`, which gives the captured graphs up: their capture would count as time of an idle card.
    """
    most, drawn = min(PROFILED_TOK, cell.prompts.settings.max_new_tok), dict[str, Any]()
    alone = draw(cell, most_tok=most)
    kernels = profiled(lambda: drawn.update(draw(cell, most_tok=most)), cell.stack.base.device)
    return {"short": alone, "kernels": kernels, "kernels_of": f"up to {most} new tokens a row", "profiled": drawn}


def drawing(job: Job, sheet: Sheet) -> None:
    """1,500 prompts of pilot_small on the base, one adapter and two: with captures, without, under the profiler, and in waves of at most 1,024."""
    began = time.perf_counter()
    cell = OpenCell.of(job)
    device, attention = cell.stack.base.device, cell.stack.base.attention
    sheet.note(
        adapters=cell.origin, to_ready_s=round(time.perf_counter() - began, 2), device=str(device),
        attention=attention.name, passed_over=attention.passed_over, settings=cell.prompts.settings.model_dump(),
    )  # fmt: skip
    found: dict[str, Any] = sheet.found.get("stacks", {})
    for name in STACKS:
        if "in_waves" in found.get(name, {}):
            continue
        with cell.live(name):
            found[name] = {"first": draw(cell)}
            sheet.note(stacks=found)
            found[name]["second"] = draw(cell)
            sheet.note(stacks=found)
            found[name] |= profiled_draw(cell)
            sheet.note(stacks=found)
            found[name]["in_waves"] = draw_in_waves(cell)
            sheet.note(stacks=found)
    sheet.end("complete")


def steps(job: Job, sheet: Sheet) -> None:
    """A table by kind of kernel of a training step, for the loads of `bench` at both sizes."""
    sizes = (job.model,) if job.rehearse else SIZES
    found: dict[str, Any] = sheet.found.get("loads", {})
    for size in sizes:
        left = [kind for kind in LOAD_KINDS if "kinds" not in found.get(size, {}).get(kind, {}).get("kernels", {})]
        if not left:
            continue
        model = bench_model(ModelSettings.model_validate({"id": size, "engine": "torch"}))
        stack = Stack(model.base(), model.lora)
        for kind in left:
            found.setdefault(size, {})[kind] = profiled_steps(stack, kind)
            sheet.note(loads=found)
            if "kinds" not in found[size][kind]["kernels"]:  # CUPTI is dead in this process
                sheet.end("stopped", "the profiler saw no kernel; the same command goes on in a new process")
                return
            stack.base.drop_kept()
            free_memory()
        del stack
        free_memory()
    sheet.end("complete")


def profiled_steps(stack: Stack, kind: str) -> dict[str, Any]:
    """The steps of a load after their warm-up, timed by themselves and as many under the profiler, whose table is of one step."""
    device = stack.base.device
    first = WARM_UP[device.type]
    second, last = first + PROFILED_STEPS, first + 2 * PROFILED_STEPS
    jobs = make_jobs(stack, LOADS[kind, device.type], last)
    trainees = [start(stack, job) for job in jobs]
    train(stack, trainees, Hooks(), until_step=first)
    clock = Clock(device)
    with clock.running():
        train(stack, trainees, Hooks(), until_step=second)
    captured = captured_steps(stack)
    before = None if captured is None else replace(captured.tally)
    found = profiled(lambda: train(stack, trainees, Hooks(), until_step=last), device)
    n_tok, n_profiled = (
        sum(len(job.rows[row].ids) for job in jobs for step in range(*steps) for row in job.batch(step))
        for steps in ((first, second), (second, last))
    )
    per_step = {name: round(one["ms"] / PROFILED_STEPS, 3) for name, one in found.get("kinds", {}).items()}
    return {
        "steps": PROFILED_STEPS, "tok_a_step": round(n_profiled / PROFILED_STEPS), "ms_a_step": per_step,
        "tok_per_s": round(n_tok / clock.seconds), "profiled_tok_per_s": round(n_profiled / found["wall_s"]),
        "graphs": None if captured is None or before is None else captured.tally.since(before), "kernels": found,
    }  # fmt: skip
