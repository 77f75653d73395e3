"""Parts bench, attention and gpu_tests: what the project's own benchmarks and tests say on a card."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

import fastconv.bench as benchmarks
from fastconv.bench import kernels
from fastconv.bench.measure import Clock
from fastconv.engine import attention_backends as backends
from fastconv.engine.attention import Padded
from fastconv.engine.shapes import named_shape
from tests.card.grid import FASTCONV
from tests.card.process import run_child
from tests.card.sheet import NO_CARD, Job, Sheet, has_card, read_sheet, write_json

MODELS = ("random:qwen2.5-1.5b", "random:qwen2.5-7b")
#: Row lengths (tokens) of a convergence step and of a behavior step, as `bench` has them.
ROWS = {"convergence": (312, 287, 401, 289), "behavior": (300,) * 16}
_REPEATS = 20


def bench(job: Job, sheet: Sheet) -> None:
    """What `fastconv bench all` compares at both sizes, `stack` last (it writes 15 GB three times), and `bench engine`.

    Each comparison is noted when it is made, and not made again.
    """
    found: dict[str, Any] = sheet.found.get("models", {})
    kinds = sorted(benchmarks.ALL_KINDS, key=lambda kind: kind == "stack")
    for model in (job.model,) if job.rehearse else MODELS:
        one = found.setdefault(model, {})
        short = model.rpartition(".")[2] if ":" in model else "model"
        if "ours" not in one.get("engine", {}):
            out = job.path(f"engine-{short}.json")
            ran = run_child([*FASTCONV, "bench", "engine", "--model", model, "--json"], job.path("run.log"),
                            deadline=job.deadline, out=out)  # fmt: skip
            told = read_sheet(out)
            one["engine"] = told if ran.ok else {"missing": ran.killed or told.get("error", ran.last)}
            sheet.note(models=found)
        for kind in kinds:
            all_found = one.get("all", {})
            made = {**all_found.get("results", {}), **all_found.get("left_out", {})}
            if kind in made:
                continue
            if job.left_s <= 0:
                sheet.end("stopped", "out of time; the same command goes on")
                return
            one["all"] = _with_kind(all_found, kind, model, 2 if job.rehearse else None)
            write_json(job.path(f"all-{short}.json"), one["all"])  # as `bench all --out` writes it
            sheet.note(models=found)
    sheet.end("complete")


def _with_kind(before: Mapping[str, Any], kind: str, model: str, size: int | None) -> dict[str, Any]:
    """What `bench all` found before, and one more comparison; one that fails leaves the others be."""
    try:
        now = benchmarks.bench_all(model, size=size, kinds=(kind,))
    except Exception as error:
        now = {"left_out": {kind: " ".join(f"{type(error).__name__}: {error}".split())[:300]}}
    finally:
        benchmarks.free_memory()
    both = {name: {**before.get(name, {}), **now.get(name, {})} for name in ("results", "left_out")}
    return {**before, **now, **both}


def attention(job: Job, sheet: Sheet) -> None:
    """Every attention backend at both sizes: is it right, does it give the same bits, and its milliseconds."""
    found: dict[str, Any] = sheet.found.get("shapes", {})
    made: dict[str, tuple[Callable[[], Any], bool]] = {"sdpa": (backends._padded_sdpa, True), **backends._CANDIDATES}
    device, chosen = torch.device("cpu" if job.rehearse else "cuda"), dict[str, str]()
    dtype = torch.float32 if job.rehearse else torch.bfloat16
    for name in ("tiny",) if job.rehearse else ("qwen2.5-1.5b", "qwen2.5-7b"):
        shape = named_shape(name)
        sizes = (shape.n_heads, shape.n_kv_heads, shape.head_dim)
        for backend, (make, captures) in made.items():
            if backend not in found.setdefault(name, {}):
                found[name][backend] = tried(make, device, dtype, sizes, captures=captures)
                sheet.note(shapes=found)
        chosen[name] = backends.pick_attention(device, dtype, *sizes).name
        sheet.note(chosen=chosen)
    sheet.end("complete")


def tried(
    make: Callable[[], Any], device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int], *, captures: bool
) -> dict[str, Any]:
    """One backend: its distance from SDPA in fp32, whether it repeats, seconds of its first call, and milliseconds forward and
    backward by load."""
    began = time.perf_counter()
    try:
        kernel = make()
        distance = backends._distance(kernel, device, dtype, *sizes)
        first_s = time.perf_counter() - began
        repeats = backends._repeats(kernel, device, dtype, *sizes)
        pads = make is backends._padded_sdpa
        took = {
            load: milliseconds(kernel, lengths, device, dtype, sizes, captures=captures, pads=pads)
            for load, lengths in ROWS.items()
        }
    except backends._DOES_NOT_WORK as error:
        return {"missing": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    right = distance <= backends._TOLERANCE[dtype]
    return {
        "right": right,
        "distance": round(distance, 6),
        "same_bits": repeats,
        "first_s": round(first_s, 3),
        "ms": took,
    }


def milliseconds(
    kernel: Any, lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int], *,
    captures: bool, pads: bool,
) -> dict[str, Any]:  # fmt: skip
    """Milliseconds of a layer's attention over rows of these lengths, forward, and forward and backward; the best of some.

    On a card as a graph, as steps run, else the host's launches are what is timed: those stand under `launched`. With `pads`
    the rows are laid out before, as a step does it once for all of its layers.
    """
    rows, inputs = backends._trial(lengths, sum(lengths), kernel, device, *sizes)
    parts = [part.to(dtype).requires_grad_() for part in inputs]
    scale = sizes[2] ** -0.5
    padded = Padded.of(list(lengths))
    padded = padded.with_inputs([part.to(device) for part in padded.inputs])

    def forward() -> torch.Tensor:
        return padded.attend(0, parts[0], parts[1], parts[2], scale) if pads else kernel(*parts, rows, scale)

    def both() -> None:
        out = forward()
        torch.autograd.grad(out, parts, torch.ones_like(out))

    found: dict[str, Any] = {}
    ways: dict[str, Callable[[], Any]] = {"forward": forward, "forward_and_backward": both}
    for name, work in ways.items():
        launched = found[name] = best_of(work, device)
        if device.type == "cuda":
            found.setdefault("launched", {})[name] = launched
            if captures:
                try:
                    found[name] = best_of(kernels._replayed(work), device)
                except backends._DOES_NOT_WORK as error:
                    found["not_captured"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return found


def best_of(work: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of some work, the best of some tries."""
    best = float("inf")
    for _ in range(3 if device.type == "cpu" else _REPEATS):
        clock = Clock(device)
        with clock.running():
            work()
        best = min(best, clock.seconds)
    return round(1000 * best, 4)


PYTEST = (sys.executable, "-m", "pytest", "--no-header", "-p", "no:cacheprovider")
_RESULT = re.compile(r"^(\S+::\S.*?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL)")


def gpu_tests(job: Job, sheet: Sheet) -> None:
    """`pytest -m gpu` with junit counts; what was seen before a kill is read off its lines."""
    if not has_card():
        sheet.end("skipped", NO_CARD)
        return
    junit, log = job.path("junit.xml"), job.path("run.log")
    junit.unlink(missing_ok=True)
    command = [*PYTEST, "-m", "gpu", "-vv", "--durations=15", f"--junitxml={junit.resolve()}", *gpu_files()]
    ran = run_child(command, log, deadline=job.deadline)
    lines = [line[10:] for line in log.read_text(errors="replace").splitlines()]
    seen = {found[1]: found[2] for line in lines if (found := _RESULT.match(line))}
    counts = {word: sum(one == word for one in seen.values()) for word in sorted(set(seen.values()))}
    failed = [name for name, word in seen.items() if word in ("FAILED", "ERROR")]
    sheet.note(
        command=" ".join(command[1:]),
        seen=counts,
        failed=failed,
        seconds=round(ran.seconds, 1),
        junit=junit_counts(junit),
    )
    if ran.killed:
        sheet.end("stopped", ran.killed)
    else:
        sheet.end("complete" if ran.code in (0, 5) else "failed", "" if ran.ok else ran.last)


def gpu_files() -> list[str]:
    """The test files that hold tests for a card: to collect all others would take minutes."""
    tests = Path(__file__).resolve().parents[1]
    files = sorted(tests.rglob("test_*.py"))
    return [
        str(path) for path in files if "mark.gpu" in path.read_text(encoding="utf-8") and path.parent.name != "card"
    ]


def junit_counts(path: Path) -> dict[str, Any]:
    """Counts of a junit file and what was skipped or failed, with the reasons; empty if it was never written."""
    if not path.is_file():
        return {}
    suite = ElementTree.parse(path).getroot()
    suite = suite[0] if suite.tag == "testsuites" and len(suite) else suite
    told = {}
    for case in suite.iter("testcase"):
        for part in case:
            if part.tag in ("failure", "error", "skipped"):
                told[f"{case.get('classname')}.{case.get('name')}"] = f"{part.tag}: {(part.get('message') or '')[:160]}"
    names = ("tests", "failures", "errors", "skipped", "time")
    return {**{name: float(suite.get(name, 0)) for name in names}, "not_passed": told}
