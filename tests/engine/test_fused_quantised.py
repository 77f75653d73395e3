"""The real bitsandbytes on the CPU: a 4-bit base with the stack live, and AdamW with moments in 8 bits."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("FASTCONV_FUSED") != "1" or "unsloth" in sys.modules:
    pytest.skip("needs the virtual environment of make test-fused, and no Unsloth beside it", allow_module_level=True)

import torch

from fastconv.engine.lora import StackedLinear
from fastconv.engine.model import load_base
from fastconv.engine.optim import AdamW8bit, dense_weight, is_four_bit
from fastconv.engine.selftest import self_test
from fastconv.engine.stack import Stack, folded, rho
from fastconv.engine.train import Hooks, Job, Trainee, save_state, start, train
from fastconv.errors import ModelError, TrainingError
from fastconv.recipe import ModelSettings
from tests.engine_kit import SNAPSHOT, furthest, live_logits, ragged_rows, random_adapter, tiny_stack, train_settings

pytestmark = pytest.mark.fused


@pytest.fixture(scope="module")
def four_bit(tiny_qwen: Path) -> Stack:
    settings = ModelSettings.model_validate({"id": str(tiny_qwen), "device": "cpu", "weights": "4bit"})
    return Stack(load_base(settings), SNAPSHOT)


def test_a_stack_lives_on_four_bit_layers_as_on_the_dense_ones_they_stand_for(four_bit: Stack, tiny_qwen: Path) -> None:
    dense = tiny_stack(tiny_qwen)
    layers = {m.name: m.base for m in four_bit.base.model.modules() if isinstance(m, StackedLinear)}
    assert len(layers) == 21
    assert all(map(is_four_bit, layers.values()))
    for module in dense.base.model.modules():
        if isinstance(module, StackedLinear):
            module.base.weight.data.copy_(dense_weight(layers[module.name]))
    adapters = [random_adapter(four_bit, 1), random_adapter(four_bit, 2)]
    rows = [row.ids for row in ragged_rows(4)]
    mine, theirs = live_logits(four_bit, adapters, rows), live_logits(dense, adapters, rows)
    bare = live_logits(four_bit, [], rows)
    assert furthest(mine, theirs) < 0.3 < furthest(mine, bare)  # bfloat16 against float32
    self_test(four_bit, ("adamw", "adamw8bit"))


def test_nothing_is_folded_into_packed_weights(four_bit: Stack) -> None:
    adapter = random_adapter(four_bit, 1)
    with pytest.raises(ModelError, match="4-bit base cannot be folded"), folded(four_bit, [adapter], "published"):
        pass
    assert all(share > 0 for share in rho(four_bit, [adapter]).values())


def trained(stack: Stack, optimizer: str, state: bytes | None = None, until: int | None = None) -> Trainee:
    frozen = random_adapter(stack, 1)
    job = Job("job", ragged_rows(12), train_settings(optimizer=optimizer, dropout=0.05, epochs=4), ("8bit",), (frozen,))
    trainee = start(stack, job, state)
    train(stack, [trainee], Hooks(), until_step=until)
    return trainee


def test_eight_bit_moments_train_as_well_and_resume_to_the_bit(tiny_qwen: Path) -> None:
    stack = tiny_stack(tiny_qwen)
    full, small = trained(stack, "adamw"), trained(stack, "adamw8bit")
    assert small.moments["state1"].dtype == torch.uint8
    assert small.adapter.flat.dtype == small.grad.dtype == torch.float32
    assert small.losses.tolist() == pytest.approx(full.losses.tolist(), abs=0.05)
    assert not torch.equal(small.adapter.flat, full.adapter.flat)
    half = trained(stack, "adamw8bit", until=5)
    assert torch.equal(trained(stack, "adamw8bit", save_state(half)).adapter.flat, small.adapter.flat)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    weights = torch.nn.Parameter(torch.ones(8192))
    weights.grad = torch.full_like(weights, float("nan"))
    optimizer = AdamW8bit(weights, 1e-3)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert bool((weights == 1).all())


def test_four_bit_training_stops_at_a_loss_that_is_not_finite(four_bit: Stack) -> None:
    frozen = random_adapter(four_bit, 1)
    frozen.flat.fill_(float("nan"))
    job = Job("job", ragged_rows(4), train_settings(optimizer="adamw8bit"), ("nan",), (frozen,))
    trainee = start(four_bit, job)
    before = trainee.adapter.flat.clone()
    with pytest.raises(TrainingError, match="at step 1"):
        train(four_bit, [trainee], Hooks())
    assert torch.equal(trainee.adapter.flat, before)
    assert not four_bit.route.slots
