"""The self-tests pass on a good engine and each one turns red when what it watches is broken."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fastconv.engine import selftest
from fastconv.engine.attention import Packed
from fastconv.engine.lora import StackedLinear
from fastconv.engine.selftest import SelfTestSetup, self_test
from fastconv.engine.stack import Stack
from fastconv.errors import ModelError, TrainingError
from fastconv.recipe import parse_recipe
from fastconv.run import stacks
from fastconv.startup import StartTimes
from tests.engine_kit import tiny_stack


@pytest.fixture(scope="module")
def stack(tiny_qwen: Path) -> Stack:
    return tiny_stack(tiny_qwen)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("folder", ["tiny_qwen", "tiny_llama"])
def test_a_good_engine_passes_and_is_left_as_it_was(folder: str, dtype: str, request: pytest.FixtureRequest) -> None:
    stack = tiny_stack(request.getfixturevalue(folder), dtype=dtype)
    before = stack.probe()
    found = self_test(stack)
    assert set(found) == {"import order", "precision", "packed rows", "swap", "fused kernels"}
    assert max(found.values()) < 0.1
    assert stack.probe() == before
    assert not stack.route.slots


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(("device", "tested"), [("cuda", [{"adamw", "adamw8bit"}]), ("cpu", [])])
def test_every_load_on_a_gpu_is_tested_and_compiles_ahead_what_it_trains(
    device: str, tested: list[set[str]], trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    compiled: list[int] = []
    recipe = parse_recipe({"name": "x", "behavior": {"optimizer": "adamw8bit"}})
    times = StartTimes()
    loaded = stacks.Stacks(SimpleNamespace(recipe=recipe, behaviors={}), SimpleNamespace(), times, trains=trains)  # type: ignore[arg-type]
    vars(loaded)["base"] = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr(stacks, "Stack", lambda base, settings: "stack")

    def noted(stack: Any, optimizers: Any) -> dict[str, float]:
        asked.append(set(optimizers))
        return {"swap": 0.01}

    monkeypatch.setattr(stacks, "self_test", noted)
    monkeypatch.setattr(stacks, "compile_ahead", lambda stack, phases, sampling, letters: compiled.append(len(phases)))
    assert loaded.stack == "stack"
    assert asked == tested
    assert compiled == [2] * (len(tested) * trains)
    assert (times.self_tests_s > 0) == bool(tested)


def test_a_card_without_room_to_compile_ahead_compiles_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **named: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    recipe = parse_recipe({"name": "x"})
    loaded = stacks.Stacks(SimpleNamespace(recipe=recipe, behaviors={}), SimpleNamespace(), trains=True)  # type: ignore[arg-type]
    vars(loaded)["base"] = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(stacks, "Stack", lambda base, settings: "stack")
    monkeypatch.setattr(stacks, "self_test", lambda stack, optimizers: {})
    monkeypatch.setattr(stacks, "compile_ahead", full)
    assert loaded.stack == "stack"


def test_unsloth_after_what_it_patches_is_refused(monkeypatch: pytest.MonkeyPatch, stack: Stack) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))  # comes last in the order of imports
    with pytest.raises(ModelError, match="was imported before unsloth"):
        self_test(stack)


def test_a_leak_between_packed_rows_is_seen(monkeypatch: pytest.MonkeyPatch, stack: Stack) -> None:
    def one_long_row(self: Packed, layer: int, q: Any, k: Any, v: Any, scale: float) -> torch.Tensor:
        return whole(Packed((0, self.starts[-1])), layer, q, k, v, scale)

    whole = Packed.attend
    monkeypatch.setattr(Packed, "attend", one_long_row)
    with pytest.raises(TrainingError, match="leaks into row"):
        self_test(stack)


def test_rows_that_lose_their_positions_are_seen(monkeypatch: pytest.MonkeyPatch, stack: Stack) -> None:
    def all_but_the_first_shifted(self: Packed) -> torch.Tensor:
        return torch.cat([torch.arange(stop - start) // (1 + start) for start, stop in pairwise(self.starts)])

    monkeypatch.setattr(Packed, "positions", all_but_the_first_shifted)
    with pytest.raises(TrainingError, match="packed rows are"):
        self_test(stack)


def test_a_dropped_adapter_is_seen(monkeypatch: pytest.MonkeyPatch, stack: Stack) -> None:
    def only_the_last(self: StackedLinear, y: Any, x: Any, slot: Any, seeds: Any) -> torch.Tensor:
        slot = type(slot)(slot.adapters[-1:])
        return both(self, y, x, slot, seeds)

    both = StackedLinear._add_branches
    monkeypatch.setattr(StackedLinear, "_add_branches", only_the_last)
    with pytest.raises(TrainingError, match="one of two adapters is dropped"):
        selftest.swap(SelfTestSetup(stack))


def test_a_swap_that_does_not_take_is_seen(monkeypatch: pytest.MonkeyPatch, stack: Stack) -> None:
    monkeypatch.setattr(StackedLinear, "_add_branches", lambda self, y, x, slot, seeds: y)
    with pytest.raises(TrainingError, match="the swap did not take"):
        selftest.swap(SelfTestSetup(stack))


@pytest.mark.parametrize("what", ["adapter", "exp_avg"])
def test_what_should_be_fp32_and_is_not_is_seen(what: str, monkeypatch: pytest.MonkeyPatch, stack: Stack) -> None:
    ground = SelfTestSetup(stack)
    if what == "adapter":
        ground.frozen.flat = ground.frozen.flat.half()
    else:
        plain = selftest.make_optimizer

        def half_moments(kind: str, weights: torch.nn.Parameter, lr: float) -> Any:
            optimizer = plain(kind, weights, lr)
            zeros = {name: torch.zeros_like(weights, dtype=torch.float16) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weights] = zeros
            optimizer.step = lambda: None  # type: ignore[method-assign,assignment]
            return optimizer

        monkeypatch.setattr(selftest, "make_optimizer", half_moments)
    with pytest.raises(TrainingError, match=f"{what} is torch.float16"):
        selftest.precision(ground, ["adamw"])


def test_a_fused_path_that_computes_something_else_is_seen(monkeypatch: pytest.MonkeyPatch, stack: Stack) -> None:
    def only_the_last_when_fused(self: StackedLinear, y: Any, x: Any, slot: Any, seeds: Any) -> torch.Tensor:
        if not self.route.plain:
            slot = type(slot)((), slot.trainable) if slot.trainable else type(slot)(slot.frozen[-1:])
        return both(self, y, x, slot, seeds)

    both = StackedLinear._add_branches
    monkeypatch.setattr(StackedLinear, "_add_branches", only_the_last_when_fused)
    with pytest.raises(TrainingError, match="the fused kernels' logits are"):
        selftest.fused_kernels(SelfTestSetup(stack))


@pytest.mark.parametrize("off", ["rounding", "twice as large"])
def test_gradients_may_differ_by_what_rounding_does_to_them(
    monkeypatch: pytest.MonkeyPatch, tiny_qwen: Path, off: str
) -> None:
    """A deep base in 16 bits blows rounding up beyond any fixed bound; a gradient that is wrong is still seen."""
    plain = SelfTestSetup.gradient

    def fused(self: SelfTestSetup, change: Any = None) -> torch.Tensor:
        if change is not None or self.stack.route.plain:
            return plain(self, change)
        return plain(self, selftest.in_last_bits) if off == "rounding" else 2 * plain(self)

    monkeypatch.setattr(SelfTestSetup, "gradient", fused)
    monkeypatch.setitem(selftest._TOLERANCE, torch.bfloat16, 1e-3)
    setup = SelfTestSetup(tiny_stack(tiny_qwen, dtype="bfloat16"))
    if off == "rounding":
        assert selftest.fused_kernels(setup) > 1e-3
    else:
        with pytest.raises(TrainingError, match=r"gradients are 100.0% off, rounding alone \d"):
            selftest.fused_kernels(setup)
