"""Throughput of a machine: known GPUs, an estimate from CPU cores, or a measured probe; and the time that a run has left, a
plan at these rates corrected by what the run measures. Does not import torch.

Seconds = work / rate + fixed costs (see `Machine.seconds`), with the formulas of `engine.shapes`. A rate is what the
engine achieves, not the data sheet's figure.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from fastconv.engine.device import ram_bytes
from fastconv.engine.locate import engine_identity, gpu_is_visible, locate
from fastconv.engine.shapes import ModelShape, Work, forward_flops_per_tok, train_flops_per_tok, weight_bytes
from fastconv.errors import InputError, did_you_mean
from fastconv.experiment.measures import Demand, Target
from fastconv.recipe import Recipe
from fastconv.store.io import child_environment
from fastconv.store.ledger import Store
from fastconv.store.records import Stage

PROBE_VERSION = 1
#: A model of more weights than this is hardly meant for a CPU.
LARGE_PARAMS = 1e9
#: Share of a training after which its own rate is believed, and no longer the plan's.
TRUSTED_SHARE = 0.1


@dataclass(frozen=True)
class PlannedStage:
    """A stage still to do: its kind, what identifies the training that reaches it, and its seconds by the plan."""

    kind: str
    training: str
    seconds: float


class TimeLeft:
    """Seconds that a run still needs: the plan's seconds of what is to do, times what finished stages took of theirs.

    Times are seconds of one clock (`time.monotonic`). Each kind of stage has a ratio of its own, drawn to that of all
    kinds as long as little of it is measured. Loading is counted apart and corrects nothing.
    """

    def __init__(self, todo: Mapping[str, PlannedStage], load_s: float, now: float) -> None:
        """`todo` by stage key; `load_s` is the plan's time to load the model and test it (0: nothing is to load)."""
        self._todo = dict(todo)
        self._load_s, self._since = load_s, now
        self._running: set[str] = set()
        self._share, self._exact = 0.0, False
        self._first: tuple[float, float] | None = None
        self._begun_share = 0.0
        self._measured: dict[str, float] = {}
        self._planned: dict[str, float] = {}
        total_s = sum(stage.seconds for stage in todo.values())
        self._all_weight_s, self._kind_weight_s = max(0.02 * total_s, 1.0), max(0.005 * total_s, 0.5)

    @property
    def n_todo(self) -> int:
        """Number of stages still to do."""
        return len(self._todo)

    @property
    def loads(self) -> bool:
        """Whether the model is still to be loaded."""
        return self._load_s > 0

    def loaded(self, now: float) -> None:
        """The model is loaded and tested."""
        self._load_s, self._since = 0.0, now

    def begin(self, key: str, now: float) -> None:
        """A stage starts, and with it those that the same training reaches."""
        if not self._running:
            self._since, self._share, self._exact, self._first, self._begun_share = now, 0.0, False, None, 0.0
        if key in self._todo:
            training = self._todo[key].training
            self._running |= {other for other, stage in self._todo.items() if stage.training == training}

    def progress(self, share: float, *, exact: bool, now: float | None = None) -> None:
        """The running stages are done to this share; one that is not exact is a lower bound.

        With `now` the first sign of life counts for no rate: it brings what a checkpoint kept, and is slow to come.
        """
        self._share, self._exact = share, exact
        if self._first is None:
            self._first = (self._since, 0.0) if now is None else (now, share)

    def done(self, key: str, now: float) -> None:
        """A stage is finished (or has failed)."""
        stage = self._todo.pop(key, None)
        self._running.discard(key)
        if stage is not None and stage.seconds:
            self._measured[stage.kind] = self._measured.get(stage.kind, 0.0) + now - self._since
            self._planned[stage.kind] = self._planned.get(stage.kind, 0.0) + stage.seconds
            self._since = now
            # What the same training has still to reach is the rest of it.
            self._first, self._begun_share = (now, self._share), self._share

    def keep(self, wanted: Collection[str]) -> None:
        """Drop the stages that are no longer wanted, of a behavior that G0 ruled out, say."""
        self._todo = {key: stage for key, stage in self._todo.items() if key in wanted}
        self._running &= self._todo.keys()

    def seconds(self, now: float) -> float:
        """Seconds left at this time."""
        waiting = (stage for key, stage in self._todo.items() if key not in self._running)
        running_s = sum(self._todo[key].seconds * self._ratio(self._todo[key].kind, now) for key in self._running)
        elapsed_s = max(now - self._since, 0.0)
        left_s = max(running_s - elapsed_s, 0.0)
        seen_s, seen = self._seen(now)
        if seen > 0:
            by_share_s = seen_s * (1 - self._share) / seen
            near = min(seen / TRUSTED_SHARE, 1.0)
            left_s = near * by_share_s + (1 - near) * left_s if self._exact else min(left_s, by_share_s)
        load_s = max(self._load_s - elapsed_s, 0.0) if self._load_s else 0.0
        return load_s + left_s + sum(stage.seconds * self._ratio(stage.kind, now) for stage in waiting)

    def _seen(self, now: float) -> tuple[float, float]:
        """Seconds that the running stages went on in sight, and the share of them that was done in these."""
        since, share = self._first or (now, self._share)
        return max(now - since, 0.0), self._share - share

    def _ratio(self, kind: str, now: float) -> float:
        """What a second of the plan takes, for this kind of stage; a training that runs tells it before it ends."""
        measured, planned = dict(self._measured), dict(self._planned)
        seen_s, seen = self._seen(now)
        if self._exact and seen >= TRUSTED_SHARE / 2 and self._running:
            running = [self._todo[key] for key in self._running]
            kind_now = running[0].kind
            measured[kind_now] = measured.get(kind_now, 0.0) + seen_s
            planned[kind_now] = planned.get(kind_now, 0.0) + seen * sum(stage.seconds for stage in running) / max(
                1 - self._begun_share, seen
            )
        every = (sum(measured.values()) + self._all_weight_s) / (sum(planned.values()) + self._all_weight_s)
        own_s, planned_s = measured.get(kind, 0.0), planned.get(kind, 0.0)
        return (own_s + self._kind_weight_s * every) / (planned_s + self._kind_weight_s)


#: How many times as long a GPU takes in 4 bits, and in fp32. Measured on an H100 with a real 1.5B, as `KNOWN_GPUS`.
_FOUR_BIT_FACTOR, _FP32_FACTOR = 2.7, 9.0


@dataclass(frozen=True)
class Machine:
    """Rates of one device.

    FLOP/s for training (`train`), prefill (`read`) and decoding (`draw`), memory bandwidth in bytes/s, and the fixed
    seconds of each training pass (micro-batch), decoding pass, stage and model load.
    """

    name: str
    origin: str
    device: Literal["cpu", "cuda"]
    train_flops_s: float
    read_flops_s: float
    draw_flops_s: float
    memory_bytes_s: float
    step_s: float
    pass_s: float
    stage_s: float
    load_s: float
    memory_bytes: float | None = None
    #: Times the work that 4 bits take; 1 where rates were measured with the recipe's own base.
    four_bit_factor: float = 1.0

    def seconds(self, demand: Demand, shape: ModelShape, recipe: Recipe) -> float:
        """Seconds of a stage: training, prefill (also multiple choice and judging) and decoding, one after another.

        Decoding: each pass reads all weights and takes at least `pass_s`; each token adds its own FLOPs.
        """
        bytes_factor = 2 if self.device == "cpu" else 1
        four_bit = recipe.model.weights == "4bit"
        slower = self.four_bit_factor if four_bit else 1.0
        weights = weight_bytes(shape, four_bit=four_bit) * bytes_factor
        total_s = self.stage_s if demand.trained_tok or demand.read_tok or demand.new_tok else 0.0
        if demand.trained_tok:
            work = Work(demand.length_tok, demand.share, recipe.lora.r)
            total_s += slower * demand.trained_tok * train_flops_per_tok(shape, work) / self.train_flops_s
            total_s += demand.micro_steps * self.step_s
        forward = forward_flops_per_tok(shape, Work(demand.length_tok, 0.0, recipe.lora.r))
        read_tok = slower * demand.read_tok + _FP32_FACTOR * demand.precise_tok
        total_s += read_tok * forward / self.read_flops_s
        if demand.new_tok:
            drawing = forward_flops_per_tok(shape, Work(demand.length_tok, 1.0, recipe.lora.r))
            total_s += demand.new_tok * drawing / self.draw_flops_s
            total_s += slower * demand.decode_steps * max(self.pass_s, weights / self.memory_bytes_s)
        return total_s

    def target(self, recipe: Recipe, shape: ModelShape) -> Target:
        """What the recipe's stages are counted for here."""
        placed = recipe.model.model_copy(update={"device": self.device})
        value_bytes = 4 if engine_identity(placed)["dtype"] == "float32" else 2
        return Target(self.device, self.memory_bytes or 0.0, shape.kv_bytes_per_tok(value_bytes))

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON."""
        return asdict(self)


def _gpu(name: str, tflops: float, memory_tbytes_s: float, gib: float) -> Machine:
    """A GPU from its dense bf16 TFLOP/s, memory bandwidth (TB/s) and memory (GiB), as large operations reach them.

    Fractions of that which the engine reaches, from `fastconv bench` on one H100 (docs/MEASURED.md): training 0.6
    plus 15 ms a micro-batch (`train`, `behavior` and `group` take 0.9 to 1.1 of the measured time), prefill 0.6 (`score`),
    decoding 0.7 plus 5 ms a pass. Held on 28 November 2026 (torch 2.11.0, unsloth 2026.10.7, one H100) against the whole of
    `pilot_small` on a real 1.5B whose kernels had never been compiled, time taken over time planned: see MEASURED in
    tests/planning/test_plan.py.
    """
    peak = tflops * 1e12
    return Machine(
        name, f"known card: {tflops:g} TFLOP/s, {memory_tbytes_s:g} TB/s", "cuda", 0.6 * peak, 0.6 * peak, 0.7 * peak,
        memory_tbytes_s * 1e12, step_s=0.015, pass_s=0.005, stage_s=0.5, load_s=50.0, memory_bytes=gib * 2**30,
        four_bit_factor=_FOUR_BIT_FACTOR,
    )  # fmt: skip


#: H200 and H100: measured matrix products and copies. Others: 80 % of the data sheet, the fraction that those two reach.
KNOWN_GPUS: Mapping[str, Machine] = MappingProxyType({
    "h200": _gpu("one H200", 788, 4.3, 141),
    "h100": _gpu("one H100", 760, 3.0, 80),
    "a100": _gpu("one A100", 250, 1.6, 80),
    "l40s": _gpu("one L40S", 290, 0.7, 48),
    "a10": _gpu("one A10", 100, 0.5, 24),
    "4090": _gpu("one RTX 4090", 130, 0.8, 24),
    "3090": _gpu("one RTX 3090", 57, 0.75, 24),
})  # fmt: skip


def cpu_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2


def busy_note() -> str | None:
    """What a CPU run must know of other work on this machine: None where a core is free."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, cpu_cores()
    if load < cores:
        return None
    return (
        f"this machine is busy: in the last minute {load:.0f} processes wanted its {cores} cores, so expect about "
        f"{1 + load / cores:.0f} times the seconds above while that lasts"
    )


def cpu_machine() -> Machine:
    """This CPU in fp32, scaled from SmolLM2 on two cores: 150 tokens/s trained, 800 in prefill, 100 decoded."""
    cores = cpu_cores()
    share = min(cores, 16) / 2
    return Machine(
        f"{cores} CPU cores", "guessed from the number of cores; --measure measures it", "cpu", 75e9 * share, 180e9 * share,
        45e9 * share, 6e9 * min(cores, 8), step_s=0.02, pass_s=0.01, stage_s=0.4, load_s=4.0, memory_bytes=ram_bytes(),
    )  # fmt: skip


def find_machine(recipe: Recipe, shape: ModelShape, device: str, store: Store | None, name: str = "") -> Machine:
    """The machine to plan for: the named one, or this one as measured, as known, or as estimated from its cores.

    This one is what will compute: without a visible GPU that is its CPU, and for a large model the name says why.
    Raises InputError for an unknown name.
    """
    if name:
        if name == "cpu":
            return cpu_machine()
        if name not in KNOWN_GPUS:
            raise InputError(
                f"no machine is called {name!r}", where="--machine", fix=did_you_mean(name, ("cpu", *KNOWN_GPUS))
            )
        return KNOWN_GPUS[name]
    here = _this_machine(device)
    for four_bit in (True, False) if recipe.model.weights == "4bit" else (False,):
        probe = store.latest_in_slot(_slot(here, shape, four_bit=four_bit)) if store else None
        if probe is not None and probe.version == PROBE_VERSION:
            factor = 1.0 if four_bit else here.four_bit_factor
            origin = "measured here by `fastconv plan --measure`"
            here = replace(here, **probe.outputs, four_bit_factor=factor, origin=origin)
            break
    if device == "cpu" and recipe.model.device != "cpu" and shape.total_params > LARGE_PARAMS:
        origin = f"{here.origin}; no GPU is visible here, --machine plans for one"
        return replace(here, name=f"{here.name} (no GPU is visible)", origin=origin)
    return here


def probe_stage(recipe: Recipe, shape: ModelShape, device: str, at_s: float) -> Stage:
    """The stage that stores a probe of this machine; `at_s` (seconds since the epoch) makes each one unique."""
    here = _this_machine(device)
    slot = _slot(here, shape, four_bit=recipe.model.weights == "4bit" and probes_own_model(recipe))
    return Stage("probe", slot, PROBE_VERSION, {"machine": here.name, "shape": shape.name, "at": at_s})


def probes_own_model(recipe: Recipe) -> bool:
    """Whether a probe loads the recipe's own model, with its weights in 4 bits if it has them so: where it is on this disk.

    Elsewhere it takes random weights of that shape in full.
    """
    return locate(recipe.model).kind != "hub"


def _slot(machine: Machine, shape: ModelShape, *, four_bit: bool) -> str:
    return f"probe/{machine.name.replace(' ', '-')}/{shape.name}{'/4bit' if four_bit else ''}"


def _this_machine(device: str) -> Machine:
    if device != "cuda":
        cpu = cpu_machine()
        model = platform.processor() or platform.machine()
        return replace(cpu, name=f"{cpu.name} ({model})")
    name = _gpu_name()
    known = next((card for key, card in KNOWN_GPUS.items() if key in name.lower().replace(" ", "")), None)
    if known is not None:
        return replace(known, name=name)
    return replace(
        KNOWN_GPUS["a100"], name=name or "a GPU", origin="taken for an A100, as the card is not known; --measure"
    )


def _gpu_name() -> str:
    if not gpu_is_visible():
        return ""
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return (
            subprocess.run(ask, capture_output=True, text=True, timeout=5, check=True, env=child_environment())
            .stdout.splitlines()[0]
            .strip()
        )
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""
