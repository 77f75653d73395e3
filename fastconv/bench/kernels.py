"""Benchmark of the stacked-LoRA kernel by layer: base product alone, torch's operations, and the kernel's tilings."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastconv.bench.measure import BenchModel, BenchResult, Clock, base_shape, matmul_ceiling, measured, paired_ratio
from fastconv.engine.kernels.lora import StackedKernel
from fastconv.engine.kernels.lora_tables import Tiling
from fastconv.engine.lora import Adapter, Route, Slot, StackedLinear, keep_mask
from fastconv.recipe import LoraSettings

DROPOUT = 0.05
#: (tokens, slots) of a pass: a batch of 4 rows, one of 16, a long micro-batch, and six adapters trained together.
CASES = ((1200, 1), (4800, 1), (8192, 1), (7200, 6))
BASE, PLAIN, STACKED = "base product alone", "torch's operations", "stacked kernel"
#: Tilings of the kernel by name; a `Stack` uses the first.
TILINGS: Mapping[str, Tiling] = MappingProxyType({
    STACKED: Tiling(),
    f"{STACKED}, base first": Tiling(order="base_first"),
    f"{STACKED}, small blocks": Tiling(shrink_m=32, shrink_split=1024, expand_n=64, chunk=128),
    f"{STACKED}, large blocks": Tiling(shrink_split=1024, shrink_splits=4, expand_m=128, chunk=512, chunk_n=128),
})  # fmt: skip
#: Rounds, in each of which every way is timed once, and the seconds that one timing should take on a GPU.
ROUNDS, ROUND_S = 5, 0.02
_NAME = "layer.q_proj"


@dataclass(frozen=True)
class _Layer:
    """Sizes of a layer, and how many of a decoder block's seven modules have them."""

    n_in: int
    n_out: int
    count: int


@dataclass(frozen=True)
class _Work:
    """A layer with its slots, input x [T, in] and output gradient dy [T, out]."""

    layer: StackedLinear
    x: torch.Tensor
    dy: torch.Tensor
    slots: tuple[Slot, ...]

    def take(self, tiling: Tiling | None) -> Callable[[], None]:
        """A function that runs one forward and backward pass, with the kernel, or without it if `tiling` is None."""
        kernel = None if tiling is None else StackedKernel(self.x.device, tiling)

        def run() -> None:
            self.layer.route.kernel = kernel
            self.x.grad = None
            self.layer(self.x).backward(self.dy)

        return run

    def base(self) -> None:
        """The base product and its gradient to x alone."""
        weight = self.layer.base.weight
        F.linear(self.x, weight, self.layer.base.bias)
        torch.mm(self.dy, weight)


def bench_kernel(model: BenchModel, n_tok: int | None = None) -> BenchResult:
    """Forward and backward of every layer shape of the model, ranks r + r, dropout 0.05 on the trainable adapter.

    `extra.layers` has microseconds for each shape and case, `extra.errors` relative errors against fp32. With
    `n_tok` the only case is a pass of that many tokens. `ours` and `usual` are for one block's seven modules in the
    first case. Raises ModelError without a GPU.
    """
    StackedKernel(model.device)  # raises before anything is allocated
    ceiling = matmul_ceiling(model.device, model.dtype)
    model_shape = model.random or base_shape(model.base())
    layers = [_Layer(*sizes, count) for sizes, count in Counter(model_shape.modules).items()]
    cases = CASES if n_tok is None else ((n_tok, 1),)
    lines, errors = [], []
    for tokens, n_slots in cases:
        for layer in layers:
            work = _work(model, layer, tokens, n_slots)
            seconds = _timed(work, model.device)
            lines.append(_line(layer, tokens, n_slots, model.lora.r, seconds, ceiling))
            if (tokens, n_slots) in (cases[0], cases[-1]):
                errors.append({"in": layer.n_in, "out": layer.n_out, "slots": n_slots, **_errors(work)})
    return _comparison(model, cases, lines, errors, ceiling)


def _work(model: BenchModel, layer: _Layer, n_tok: int, n_slots: int) -> _Work:
    """A layer with random weights, slots with equal spans, and a gradient buffer for every trainable adapter."""
    device, generator = model.device, torch.Generator(model.device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, generator=generator)

    base = nn.Linear(layer.n_in, layer.n_out, device="meta").requires_grad_(False)
    base.weight = nn.Parameter((draw(layer.n_out, layer.n_in) * layer.n_in**-0.5).to(model.dtype), requires_grad=False)
    base.bias = nn.Parameter(draw(layer.n_out).to(model.dtype), requires_grad=False)
    settings = model.lora.model_copy(update={"targets": ("q_proj",)})
    slots = []
    for _ in range(n_slots):
        frozen, trained = (_adapter(settings, layer, draw) for _ in range(2))
        trained.train(torch.zeros_like(trained.flat))
        slots.append(Slot((frozen,), trained, DROPOUT))
    edges = [n_tok * i // n_slots for i in range(n_slots + 1)]
    spans = tuple(itertools.pairwise(edges)) if n_slots > 1 else None
    seeds = torch.randint(2**31 - 1, (n_tok,), device=device, generator=generator).to(torch.int32)
    x = draw(n_tok, layer.n_in).to(model.dtype).requires_grad_()
    route = Route(tuple(slots), spans, seeds)
    return _Work(StackedLinear(base, _NAME, route), x, draw(n_tok, layer.n_out).to(model.dtype), tuple(slots))


def _adapter(settings: LoraSettings, layer: _Layer, draw: Callable[..., torch.Tensor]) -> Adapter:
    flat = draw(settings.r * (layer.n_in + layer.n_out)) * 0.02
    return Adapter(settings, "bench", {_NAME: (layer.n_in, layer.n_out)}, flat)


def _timed(work: _Work, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a pass by way and round; within a round all ways run right after one another."""
    ways = {BASE: work.base, PLAIN: work.take(None)} | {name: work.take(tiling) for name, tiling in TILINGS.items()}
    runs = {name: _replayed(run) if device.type == "cuda" else run for name, run in ways.items()}
    repeats = {}
    for name, run in runs.items():
        clock = Clock(device)
        with clock.running():
            run()
        repeats[name] = max(1, round(ROUND_S / clock.seconds)) if device.type == "cuda" else 1
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            clock = Clock(device)
            with clock.running():
                for _ in range(repeats[name]):
                    run()
            seconds[name].append(clock.seconds / repeats[name])
    return seconds


def _replayed(run: Callable[[], None]) -> Callable[[], None]:
    """The function as a CUDA graph, so that only the GPU's time is measured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _line(
    layer: _Layer, n_tok: int, n_slots: int, r: int, seconds: Mapping[str, list[float]], ceiling: float
) -> dict[str, Any]:
    """Medians in microseconds, the paired ratio of torch's operations over each way, and shares of the ceiling."""
    medians = {name: statistics.median(rounds) for name, rounds in seconds.items()}
    flops = n_tok * (4 * layer.n_in * layer.n_out + 10 * r * (layer.n_in + layer.n_out))
    return {
        "in": layer.n_in, "out": layer.n_out, "per_block": layer.count, "tokens": n_tok, "slots": n_slots,
        "us": {name: 1e6 * value for name, value in medians.items()},
        "plain_over": {name: paired_ratio(seconds[PLAIN], rounds) for name, rounds in seconds.items()},
        "over_base": {name: 1 / paired_ratio(seconds[BASE], rounds) for name, rounds in seconds.items()},
        "of_ceiling": {name: flops / value / ceiling for name, value in medians.items() if name != BASE},
    }  # fmt: skip


def _errors(work: _Work) -> dict[str, dict[str, float]]:
    """Relative errors of y, dx, dA and dB (all slots) against the formula in fp32, by way."""
    exact = _outcome(work, *_in_fp32(work))
    errors = {}
    for name, tiling in {PLAIN: None, **TILINGS}.items():
        work.layer.route.kernel = None if tiling is None else StackedKernel(work.x.device, tiling)
        outcome = _outcome(work, work.layer, work.x, work.dy)
        errors[name] = {
            key: float((outcome[key] - value).norm() / value.norm().clamp(min=1e-30)) for key, value in exact.items()
        }
    return errors


def _outcome(work: _Work, layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dy: torch.Tensor
             ) -> dict[str, torch.Tensor]:  # fmt: skip
    """y, dx and the trainable adapters' gradients dA, dB of one pass, fp32."""
    trained = [slot.trainable.weights[_NAME] for slot in work.slots if slot.trainable is not None]
    for weight in itertools.chain(*trained):
        if weight.grad is not None:
            weight.grad.zero_()
    x.grad = None
    y = layer(x)
    y.backward(dy)
    grads = [torch.cat([grad.flatten() for pair in trained if (grad := pair[i].grad) is not None]) for i in (0, 1)]
    assert x.grad is not None
    return {"y": y.detach().float(), "dx": x.grad.float(), "dA": grads[0], "dB": grads[1]}


def _in_fp32(work: _Work) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor, torch.Tensor]:
    """(the layer by its formula, x, dy), all in fp32."""
    layer, route = work.layer, work.layer.route

    def formula(x: torch.Tensor) -> torch.Tensor:
        parts = []
        assert route.dropout_seeds is not None
        for slot, (start, stop) in zip(work.slots, route.spans or ((0, len(x)),), strict=True):
            rows = x[start:stop]
            part = F.linear(rows, layer.base.weight.float(), layer.base.bias.float())
            mask = keep_mask(route.dropout_seeds[start:stop], x.shape[1], layer.salt, slot.dropout)
            for adapter, branch_input in zip(slot.adapters, (rows, rows * mask), strict=True):
                a, b = adapter.weights[_NAME]
                part = part + adapter.scale * (branch_input @ a.t() @ b.t())
            parts.append(part)
        return torch.cat(parts)

    return formula, work.x.detach().float().requires_grad_(), work.dy.float()


def _comparison(
    model: BenchModel, cases: tuple[tuple[int, int], ...], lines: list[dict[str, Any]], errors: list[dict[str, Any]],
    ceiling: float,
) -> BenchResult:  # fmt: skip
    blocks = [_block(lines, *case) for case in cases]
    seconds = {name: us / 1e6 for name, us in blocks[0]["us"].items()}
    (n_tok, n_slots), ways = cases[0], [PLAIN, *(name for name in TILINGS if name != STACKED), BASE]
    ratios = {name: seconds[name] / seconds[STACKED] for name in ways}
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    return BenchResult(
        kind="kernel", model=model.settings.id, device=model.device.type, dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(), unit="tokens",
        work=f"one block's 7 linear layers forward and backward, {n_tok} tokens, {n_slots} slot, r {model.lora.r} + {model.lora.r}, dropout {DROPOUT}",
        ours=replace(measured(STACKED, seconds[STACKED], n_tok), ceiling_share=blocks[0]["of_ceiling"][STACKED]),
        usual=tuple(replace(measured(name, seconds[name], n_tok), ceiling_share=blocks[0]["of_ceiling"].get(name)) for name in ways),
        ratio=ratios[PLAIN], ratios=ratios,
        extra={"matmul_flops": ceiling, "device_name": device, "blocks": blocks, "layers": lines, "errors": errors},
    )  # fmt: skip


def _block(lines: list[dict[str, Any]], n_tok: int, n_slots: int) -> dict[str, Any]:
    """Figures of a block's seven modules together in one case."""
    case_lines = [line for line in lines if (line["tokens"], line["slots"]) == (n_tok, n_slots)]
    us = {name: sum(line["per_block"] * line["us"][name] for line in case_lines) for name in case_lines[0]["us"]}
    done = {  # microseconds at the ceiling
        name: sum(line["per_block"] * line["us"][name] * line["of_ceiling"][name] for line in case_lines)
        for name in case_lines[0]["of_ceiling"]
    }
    return {
        "tokens": n_tok, "slots": n_slots, "us": us, "of_ceiling": {name: done[name] / us[name] for name in done},
        "plain_over": {name: us[PLAIN] / value for name, value in us.items()},
        "over_base": {name: value / us[BASE] for name, value in us.items()},
    }  # fmt: skip
