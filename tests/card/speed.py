"""Parts bench, attention and gpu_tests: what the project's own benchmarks and tests say on a card."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from fastconv.engine import attention_backends as backends
from fastconv.engine.shapes import named_shape
from tests.card.grid import FASTCONV
from tests.card.process import run_child
from tests.card.sheet import NO_CARD, Job, Sheet, has_card

MODELS = ("random:qwen2.5-1.5b", "random:qwen2.5-7b")
#: Row lengths (tokens) of a convergence step and of a behavior step, as `bench` has them.
ROWS = {"convergence": (312, 287, 401, 289), "behavior": (300,) * 16}
_REPEATS = 20


def bench(job: Job, sheet: Sheet) -> None:
    """`fastconv bench engine` and `bench all` at both sizes; a comparison that was made already is not made again."""
    found: dict[str, Any] = sheet.found.get("models", {})
    for model in (job.model,) if job.rehearse else MODELS:
        one = found.setdefault(model, {})
        short = model.rpartition(".")[2] if ":" in model else "model"
        if "engine" not in one:
            out = job.path(f"engine-{short}.json")
            ran = run_child([*FASTCONV, "bench", "engine", "--model", model, "--json"], job.path("run.log"),
                            deadline=job.deadline, out=out)  # fmt: skip
            told = json.loads(out.read_text() or "{}")
            one["engine"] = told if ran.ok else {"missing": ran.killed or told.get("error", ran.last)}
            sheet.note(models=found)
        if not one.get("all_done"):
            file = job.path(f"all-{short}.json")
            size = ["--size", "2"] if job.rehearse else []
            ran = run_child([*FASTCONV, "bench", "all", "--model", model, "--out", str(file), *size], job.path("run.log"),
                            deadline=job.deadline)  # fmt: skip
            one["all"] = json.loads(file.read_text()) if file.is_file() else {"missing": ran.last}
            one |= {"all_done": ran.ok, "seconds": round(ran.seconds, 1)}
            sheet.note(models=found)
            if not ran.ok:
                sheet.end("stopped" if ran.killed else "failed", ran.killed or ran.last)
                return
    sheet.end("complete")


def attention(job: Job, sheet: Sheet) -> None:
    """Every attention backend at both sizes: is it right, does it give the same bits, and its milliseconds."""
    found: dict[str, Any] = sheet.found.get("shapes", {})
    made: dict[str, Callable[[], Any]] = {"sdpa": backends._padded_sdpa}
    made |= {name: make for name, (make, _) in backends._CANDIDATES.items()}
    device, chosen = torch.device("cpu" if job.rehearse else "cuda"), dict[str, str]()
    dtype = torch.float32 if job.rehearse else torch.bfloat16
    for name in ("tiny",) if job.rehearse else ("qwen2.5-1.5b", "qwen2.5-7b"):
        shape = named_shape(name)
        sizes = (shape.n_heads, shape.n_kv_heads, shape.head_dim)
        for backend, make in made.items():
            if backend not in found.setdefault(name, {}):
                found[name][backend] = tried(make, device, dtype, sizes)
                sheet.note(shapes=found)
        chosen[name] = backends.pick_attention(device, dtype, *sizes).name
        sheet.note(chosen=chosen)
    sheet.end("complete")


def tried(
    make: Callable[[], Any], device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> dict[str, Any]:
    """One backend: its distance from SDPA in fp32, whether it repeats, seconds of its first call, and milliseconds forward and
    backward by load."""
    began = time.perf_counter()
    try:
        kernel = make()
        distance = backends._distance(kernel, device, dtype, *sizes)
        first_s = time.perf_counter() - began
        repeats = backends._repeats(kernel, device, dtype, *sizes)
        took = {load: milliseconds(kernel, lengths, device, dtype, sizes) for load, lengths in ROWS.items()}
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
    kernel: Any, lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> dict[str, float]:
    """Milliseconds of a layer's attention over rows of these lengths, forward, and forward and backward; the best of some."""
    rows, inputs = backends._trial(lengths, sum(lengths), kernel, device, *sizes)
    parts = [part.to(dtype).requires_grad_() for part in inputs]
    scale = sizes[2] ** -0.5

    def forward() -> torch.Tensor:
        return kernel(*parts, rows, scale)

    def both() -> None:
        out = forward()
        torch.autograd.grad(out, parts, torch.ones_like(out))

    found = {}
    for name, work in (("forward", forward), ("forward_and_backward", both)):
        best = float("inf")
        for _ in range(3 if device.type == "cpu" else _REPEATS):
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
        found[name] = round(1000 * best, 4)
    return found


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
