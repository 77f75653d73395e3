"""What the engine's tests share: stacks on tiny models, random adapters, ragged rows, and PEFT as the reference."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fastconv.chat import Rendered
from fastconv.engine import trl_reference as reference
from fastconv.engine.lora import Adapter, keep_mask
from fastconv.engine.model import Base, load_base, pack
from fastconv.engine.stack import Slot, Stack
from fastconv.recipe import LoraSettings, ModelSettings, TrainSettings

SNAPSHOT = LoraSettings(r=8, alpha=16)
BEHAVIOR = LoraSettings(r=4, alpha=8)


def tiny_stack(folder: Path, lora: LoraSettings = SNAPSHOT, dtype: str = "float32") -> Stack:
    """A stack on a freshly loaded tiny base on the CPU."""
    return Stack(load_base(ModelSettings.model_validate({"id": str(folder), "device": "cpu", "dtype": dtype})), lora)


def random_adapter(stack: Stack, seed: int, shape: LoraSettings | None = None, size: float = 0.05) -> Adapter:
    """An adapter whose A and B are both random, so that it changes the logits by about half a nat."""
    shape = shape or stack.settings
    n = sum(shape.rank(module) * (n_in + n_out) for module, (n_in, n_out) in stack.sizes.items())
    flat = size * torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return Adapter(shape, stack.base.name, stack.sizes, flat)


def ragged_rows(n: int, seed: int = 0, longest: int = 40) -> tuple[Rendered, ...]:
    """Rows of random byte tokens with lengths between 8 and `longest`, a third to all but two of it prompt."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        length = rng.randint(8, longest)
        rows.append(Rendered(tuple(rng.randrange(256) for _ in range(length)), rng.randint(length // 3, length - 2)))
    return tuple(rows)


def train_settings(**changes: Any) -> TrainSettings:
    """Settings of a short training run."""
    return TrainSettings(**({"lr": 1e-3, "epochs": 2, "batch_rows": 4, "dropout": 0.0} | changes))


def packed_logits(base: Base, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Our logits [T_i, vocab] of every row, all rows in one packed pass."""
    ids, positions, layout = pack([list(row) for row in rows], base)
    with torch.no_grad():
        logits = base.logits(base.hidden(ids, positions, layout))
    return list(logits.split([len(row) for row in rows]))


def live_logits(stack: Stack, adapters: Sequence[Adapter], rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """`packed_logits` with these adapters live."""
    with stack.live(Slot(frozen=tuple(adapters))):
        return packed_logits(stack.base, rows)


def plain_model(folder: Path) -> Any:
    """The model as transformers loads it, with its own attention: knows nothing of fastconv."""
    return reference.plain_model(ModelSettings(id=str(folder), device="cpu", dtype="float32")).eval()


def peft_model(folder: Path, adapters: Mapping[str, Adapter]) -> Any:
    """A PeftModel with all these adapters active at once, the last one with gradients."""
    return reference.add_peft_adapters(plain_model(folder), adapters).eval()


class SharedMask(nn.Module):
    """Stands in for PEFT's dropout: the engine's own mask, for the token seeds set before each pass."""

    def __init__(self, salt: int, p: float, seeds: list[torch.Tensor]) -> None:
        super().__init__()
        self.salt, self.p, self.seeds = salt, p, seeds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, T, width] times the mask."""
        return x * keep_mask(self.seeds[0], x.shape[-1], self.salt, self.p)


def plain_logits(model: Any, row: Sequence[int]) -> torch.Tensor:
    """Logits [T, vocab] of one row alone."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(row)])).logits[0]


def furthest(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Largest absolute difference between two lists of tensors."""
    return max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True))


class StandInDevice:
    """Stands in for CUDA where steps are captured: a replay runs the step again with what it read when it was captured.

    Like a graph it keeps addresses and no names: the kernel's tables and the slots are those of the capture, whatever is
    live at the replay.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.calls: list[str] = []

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Keep the route and the kernel's tables as they are now."""
        self.calls.append("capture")
        at_capture = self._read()

        def replay() -> None:
            self.calls.append("replay")
            before = self._read()
            self._write(at_capture)
            run()
            self._write(before)

        return replay

    def _read(self) -> tuple[Any, ...]:
        """What is live, and the kernel's tables of it."""
        route, kernel = self.stack.route, cast(Any, self.stack.route.kernel)
        tables = (kernel._live, dict(kernel._rows)) if kernel is not None else ()
        return route.slots, route.spans, route.dropout_seeds, *tables

    def _write(self, found: tuple[Any, ...]) -> None:
        route, kernel = self.stack.route, cast(Any, self.stack.route.kernel)
        route.slots, route.spans, route.dropout_seeds = found[:3]
        if kernel is not None:
            kernel._live, kernel._rows = found[3:]

    def timed(self, run: Callable[[], None]) -> Callable[[], float | None]:
        """Never known."""
        run()
        return lambda: None
