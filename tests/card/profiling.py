"""Tables by kind of kernel from torch's profiler, and the seconds in which the device had nothing to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

#: Kinds of kernels by parts of their names, the first that fits. Ours are named in fastconv/engine/kernels, Unsloth's beside.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("adapters", ("finish_shrink", "shrink", "expand", "input_side", "output_side", "add_up")),
    ("draw", ("nucleus_draw", "topk", "sort", "searchsorted", "cumsum", "tensor_kernel_scan", "argmax", "radix")),
    ("loss", ("cross_entropy", "log_softmax", "logsumexp")),
    ("norms", ("_rms", "rmsnorm", "layernorm", "layer_norm")),
    # cuDNN computes nothing but attention here: its backward pass has kernels that name neither (compute_dot_do_o, convert_dq).
    ("attention", ("flash", "fmha", "attention", "attn", "sdpa", "cudnn", "_decode", "_rope", "softmax")),
    ("swiglu", ("swiglu", "_fg_kernel", "_dwf_dw", "silu")),
    ("adamw", ("adam", "multi_tensor_apply", "multi_tensor")),
    ("products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "gemv", "splitk", "matmul", "addmm", "aten::mm", "dot_kernel")),
    ("copies", ("memcpy", "memset", "copy", "index", "gather", "scatter", "_rows", "catarray", "fill")),
    ("adds", ("add", "mul", "elementwise", "vectorized", "reduce")),
)  # fmt: skip
_NAMED = 12
#: CUPTI before CUDA 13.1 loses the first kernels of each further profile of a process (pytorch/pytorch#192021): so many that mean
#: nothing come first, of a kind that nothing else here launches, and do not count.
_HEAD, _HEAD_NAME = 256, "hypot"


@dataclass(frozen=True)
class Span:
    """A kernel's name and when the device was at it (microseconds)."""

    name: str
    began_us: float
    ended_us: float


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), "other")


def busy_us(spans: Iterable[Span]) -> float:
    """Microseconds in which at least one kernel ran."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda one: one.began_us):
        total += max(0.0, span.ended_us - max(span.began_us, until))
        until = max(until, span.ended_us)
    return total


def table(spans: Sequence[Span], wall_s: float) -> dict[str, Any]:
    """Milliseconds and launches by kind, the dearest kernels of `other` and of all, and what the device did of the wall time."""
    if not spans:
        return {"missing": "the profiler saw no kernel", "wall_s": round(wall_s, 4)}
    kinds: dict[str, dict[str, float]] = {}
    names: dict[str, list[float]] = {}
    for span in spans:
        took_ms = (span.ended_us - span.began_us) / 1000
        kind = kinds.setdefault(kind_of(span.name), {"ms": 0.0, "launches": 0})
        kind["ms"] += took_ms
        kind["launches"] += 1
        names.setdefault(span.name[:120], []).append(took_ms)
    busy_s = busy_us(spans) / 1e6
    first, last = min(span.began_us for span in spans), max(span.ended_us for span in spans)
    dearest = sorted(names.items(), key=lambda one: -sum(one[1]))
    listed = [{"kernel": name, "kind": kind_of(name), "ms": round(sum(ms), 3), "n": len(ms)} for name, ms in dearest]
    return {
        "kinds": {name: {**kind, "ms": round(kind["ms"], 3)} for name, kind in sorted(kinds.items(), key=lambda k: -k[1]["ms"])},
        "dearest": listed[:_NAMED], "dearest_other": [one for one in listed if one["kind"] == "other"][:_NAMED],
        "busy_s": round(busy_s, 4), "idle_s": round((last - first) / 1e6 - busy_s, 4), "wall_s": round(wall_s, 4),
        "idle_of_wall_s": round(max(0.0, wall_s - busy_s), 4),
    }  # fmt: skip


def _is_annotation(event: Any) -> bool:
    """Whether an event is the range of a name (`Optimizer.step#...`) and no kernel: it spans what is in it."""
    return bool(getattr(event, "is_user_annotation", False)) or event.name.startswith(("Optimizer.", "ProfilerStep"))


def profiled(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """The table of what `work` launches on the device; on a CPU that of torch's operations, whose times hold one another."""
    from torch.profiler import ProfilerActivity, profile

    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]) as found:
        if is_gpu:
            _launch_head(device)
        began = time.perf_counter()
        work()
        if is_gpu:
            torch.cuda.synchronize()
        wall_s = time.perf_counter() - began
    wanted = "CUDA" if is_gpu else "CPU"
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in found.events() or ()
        if str(event.device_type).endswith(wanted) and not _is_annotation(event)
    ]
    if not is_gpu:
        return table(spans, wall_s)
    timed = [span for span in spans if 0 <= span.began_us <= span.ended_us]  # of the others CUPTI lost the times
    head = sum(_HEAD_NAME in span.name for span in timed)
    lost = {"lost_of_head": _HEAD - head, "without_times": len(spans) - len(timed)}
    return {**table([span for span in timed if _HEAD_NAME not in span.name], wall_s), **lost}


def _launch_head(device: torch.device) -> None:
    """Launch kernels for CUPTI to lose instead of those that are measured."""
    ones = torch.ones(1, device=device)
    for _ in range(_HEAD):
        torch.hypot(ones, ones)
    torch.cuda.synchronize()
