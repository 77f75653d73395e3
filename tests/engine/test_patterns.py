"""Adapters on chosen layers with ranks and alphas of single modules: as PEFT computes, trains, saves and loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fastconv.engine import trl_reference as reference
from fastconv.engine.export import BaseReference, export_adapter, export_concatenated, load_peft_folder
from fastconv.engine.lora import concatenate
from fastconv.engine.stack import Slot, Stack, folded
from fastconv.engine.train import Hooks, Job, start, train
from fastconv.errors import AdapterError
from fastconv.recipe import LoraSettings, parse_recipe
from tests.engine_kit import (
    SNAPSHOT,
    furthest,
    live_logits,
    packed_logits,
    peft_model,
    plain_logits,
    plain_model,
    ragged_rows,
    random_adapter,
    tiny_stack,
    train_settings,
)

TOLERANCE = 1e-5
#: One layer of two, a rank by leaf and one by the end of a name, an alpha; with and without rsLoRA.
SHAPES = {
    "layers": LoraSettings(r=8, alpha=16, layers="1"),
    "ranks": LoraSettings(r=8, alpha=16, rank_pattern={"layers.0.mlp.down_proj": 3, "q_proj": 16}),
    "alphas": LoraSettings(r=4, alpha=8, rslora=False, alpha_pattern={"layers.1.*": 32.0}, rank_pattern={"up_proj": 2}),
    "all": LoraSettings(r=4, alpha=8, layers="0-1", targets=("q_proj", "v_proj"), rank_pattern={"0.self_attn.v_proj": 7}),
}  # fmt: skip
ROWS = [list(range(65, 65 + n)) for n in (9, 17, 30)]


@pytest.fixture(scope="module", params=SHAPES)
def stack(request: pytest.FixtureRequest, tiny_qwen: Path) -> Stack:
    return tiny_stack(tiny_qwen, SHAPES[request.param])


def test_logits_are_pefts(stack: Stack, tiny_qwen: Path) -> None:
    """One adapter, and two of which the other has no pattern on the same modules."""
    first, second = random_adapter(stack, 1, size=0.1), random_adapter(stack, 2, size=0.1)
    for adapters in ((first,), (first, second)):
        model = peft_model(tiny_qwen, {str(place): adapter for place, adapter in enumerate(adapters)})
        mine = live_logits(stack, adapters, ROWS)
        assert furthest(mine, [plain_logits(model, row) for row in ROWS]) < TOLERANCE
        assert furthest(mine, packed_logits(stack.base, ROWS)) > 0.05, "it changes nothing"


def test_modules_ranks_and_scales_are_pefts(stack: Stack, tiny_qwen: Path) -> None:
    model = peft_model(tiny_qwen, {"default": stack.new_adapter(1)})
    theirs = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and "default" in layer.lora_A
    }
    adapter = stack.new_adapter(1)
    assert {module: (adapter.ranks[module], adapter.scales[module]) for module in adapter.sizes} == theirs


def test_a_training_is_trls(stack: Stack, tiny_qwen: Path) -> None:
    """On a snapshot with the same patterns: losses, and weights in their own ranks."""
    below = (random_adapter(stack, 1),)
    job = Job("job", ragged_rows(8, 3), train_settings(epochs=3), ("job", 42), below)
    first = stack.new_adapter(*job.seed_parts)
    theirs = reference.train_with_trl(plain_model(tiny_qwen), job, first)
    trainee = start(stack, job)
    train(stack, [trainee], Hooks())
    assert trainee.losses.tolist() == pytest.approx(theirs.losses, abs=TOLERANCE)
    assert float((trainee.adapter.flat - theirs.weights).abs().max()) < 1e-4
    assert float((trainee.adapter.flat - first.flat).abs().max()) > 1e-3


def test_what_peft_saves_loads(stack: Stack, tiny_qwen: Path, tmp_path: Path) -> None:
    adapter = random_adapter(stack, 5)
    peft_model(tiny_qwen, {"default": adapter}).save_pretrained(tmp_path)
    loaded = load_peft_folder(stack, tmp_path, BaseReference(str(tiny_qwen)))
    assert furthest(live_logits(stack, [loaded], ROWS), live_logits(stack, [adapter], ROWS)) < 1e-6
    wide = tiny_stack(tiny_qwen, SNAPSHOT)  # a stack that could carry more: the folder says where it goes
    elsewhere = load_peft_folder(wide, tmp_path, BaseReference(str(tiny_qwen)))
    assert furthest(live_logits(wide, [elsewhere], ROWS), live_logits(stack, [adapter], ROWS)) < 1e-6


@pytest.mark.parametrize("n", [1, 2])
def test_exports_load_in_peft_and_are_the_stack(stack: Stack, tiny_qwen: Path, tmp_path: Path, n: int) -> None:
    from peft import PeftModel

    adapters = [random_adapter(stack, seed) for seed in range(n)]
    base = BaseReference(str(tiny_qwen))
    (export_concatenated(adapters, base, tmp_path) if n > 1 else export_adapter(adapters[0], base, tmp_path))
    model = PeftModel.from_pretrained(plain_model(tiny_qwen), str(tmp_path)).eval()
    mine = live_logits(stack, adapters, ROWS)
    assert furthest(mine, [plain_logits(model, row) for row in ROWS]) < TOLERANCE
    back = load_peft_folder(stack, tmp_path, base)
    assert furthest(mine, live_logits(stack, [back], ROWS)) < TOLERANCE


def test_a_joined_stack_has_scale_1_everywhere(stack: Stack) -> None:
    """So a server that knows one scale for all modules, and pads ranks, computes it rightly."""
    adapters = [random_adapter(stack, seed) for seed in range(2)]
    joined = concatenate(adapters)
    assert set(joined.scales.values()) == {1.0}
    assert joined.scale == 1.0
    assert joined.ranks == {module: sum(a.ranks[module] for a in adapters) for module in joined.sizes}
    assert max(joined.ranks.values()) == joined.shape.r


def test_a_fold_is_the_stack(stack: Stack) -> None:
    adapters = [random_adapter(stack, seed) for seed in range(2)]
    mine = live_logits(stack, adapters, ROWS)
    with folded(stack, adapters):
        assert furthest(mine, packed_logits(stack.base, ROWS)) < 1e-4


def test_bytes_keep_the_shape(stack: Stack) -> None:
    adapter = random_adapter(stack, 3)
    again = stack.load_adapter(adapter.to_bytes(), "here")
    assert again.shape == adapter.shape
    assert again.flat.equal(adapter.flat)


def test_a_start_is_zero_and_small_ranks_start_like_large_ones(stack: Stack) -> None:
    adapter = stack.new_adapter("a", 1)
    assert all(not b.any() and a.abs().max() <= a.shape[1] ** -0.5 for a, b in adapter.weights.values())
    with stack.live(Slot(frozen=(adapter,))), torch.no_grad():
        assert furthest(packed_logits(stack.base, ROWS[:1]), packed_logits(stack.base, ROWS[:1])) == 0.0


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"layers": "0-7"}, "no layer 3"),
        ({"rank_pattern": {"q_prj": 2}}, "q_prj"),
        ({"alpha_pattern": {"layers.1.mlp.q_proj": 2.0}}, "layers.1.mlp.q_proj"),
    ],
)
def test_what_chooses_nothing_is_refused(tiny_qwen: Path, table: dict[str, Any], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        tiny_stack(tiny_qwen, LoraSettings.model_validate(table))


@pytest.mark.parametrize(
    "table",
    [{"layers": "5-2"}, {"layers": "a"}, {"layers": "1,"}, {"rank_pattern": {"q(": 2}}, {"rank_pattern": {"q": 0}}],
)
def test_bad_settings_are_refused(table: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LoraSettings.model_validate(table)


def test_the_same_layers_are_the_same_setting_and_unset_ones_are_left_out() -> None:
    def dumped(**lora: Any) -> Any:
        return parse_recipe({"name": "x", "lora": lora}).lora.model_dump(mode="json")

    assert dumped(layers="3,1-2,2") == dumped(layers="1-3")
    assert set(dumped()) == {"r", "alpha", "rslora", "targets"}
    assert json.loads(json.dumps(dumped(rank_pattern={"q_proj": 4})))["rank_pattern"] == {"q_proj": 4}
