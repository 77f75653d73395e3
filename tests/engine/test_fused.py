"""The real `unsloth.kernels.fast_lora` with our stack, through Triton's interpreter, against PEFT's two-adapter sum.

Run by `make test-fused` in a virtual environment and a process of its own.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT

if os.environ.get("FASTCONV_FUSED") != "1":
    pytest.skip("needs the virtual environment of make test-fused", allow_module_level=True)

from tests.fake_cuda import pretend

pretend()

import safetensors.torch
import torch

from fastconv.chat import ChatTokenizer
from fastconv.engine import unsloth as fused
from fastconv.engine import unsloth as unsloth_path
from fastconv.engine.batch import token_seeds
from fastconv.engine.model import make_base, pack
from fastconv.engine.selftest import self_test
from fastconv.engine.stack import Slot, Stack
from fastconv.errors import TrainingError
from tests.engine.fused_reference import ROWS, adapters
from tests.engine_kit import SNAPSHOT, furthest, live_logits, random_adapter

pytestmark = pytest.mark.fused

#: float16 against PEFT's float32: logits of a few nats, of which the adapters make up about five.
NEAR = 0.08
#: What dropping either adapter changes, at the least.
FAR = 2.0


def loaded(folder: Path) -> Stack:
    model = unsloth_path.load(folder, torch.float16, torch.device("cpu"))
    return Stack(make_base(model, ChatTokenizer(folder), "tiny"), SNAPSHOT)


@pytest.fixture(scope="module", params=["tiny_qwen", "tiny_llama"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Stack, dict[str, Any]]:
    """A stack through Unsloth (biases on q, k, v and none) and what PEFT computes for the same adapters and rows."""
    folder = request.getfixturevalue(request.param)
    out = tmp_path_factory.mktemp("reference") / "peft.safetensors"
    command = [sys.executable, "-m", "tests.engine.fused_reference", str(folder), str(out)]
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "UNSLOTH"))}
    subprocess.run(command, check=True, env=plain, cwd=ROOT)
    return loaded(folder), safetensors.torch.load_file(out)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of the fused kernels was called."""
    from unsloth.kernels import fast_lora

    calls: Counter[str] = Counter()
    for name in ("LoRA_MLP", "LoRA_QKV", "LoRA_W"):
        kernel = getattr(fast_lora, name)

        def counted(*args: Any, _name: str = name, _apply: Any = kernel.apply) -> Any:
            calls[_name] += 1
            return _apply(*args)

        monkeypatch.setattr(kernel, "apply", counted)
    return calls


def gradient(stack: Stack, dropout: float = 0.0) -> torch.Tensor:
    """Of the mean over rows of their mean losses, for the second adapter above the frozen first."""
    frozen, trainable = adapters(stack)
    grad = torch.zeros_like(trainable.flat)
    trainable.train(grad)
    ids, positions, layout = pack([list(row) for row in ROWS], stack.base)
    with stack.live(Slot((frozen,), trainable, dropout)):
        if dropout:
            stack.route.dropout_seeds = token_seeds([(i, len(row)) for i, row in enumerate(ROWS)], stack.base.device)
        logits = stack.base.logits(stack.base.hidden(ids, positions, layout))
        losses = [
            torch.nn.functional.cross_entropy(part[:-1], torch.tensor(row[1:]))
            for part, row in zip(logits.split([len(row) for row in ROWS]), ROWS, strict=True)
        ]
        torch.stack(losses).mean().backward()
    assert all(weight.grad is None for pair in frozen.weights.values() for weight in pair)
    return grad


def test_logits_are_pefts_sum_of_both_adapters(case: tuple[Stack, dict[str, Any]], kernels: Counter[str]) -> None:
    stack, peft = case
    expected = [peft[f"logits_{i}"] for i in range(len(ROWS))]
    frozen, trainable = adapters(stack)
    assert furthest(live_logits(stack, [frozen, trainable], ROWS), expected) < NEAR
    layers = len(stack.base.backbone.layers)  # type: ignore[arg-type]
    assert kernels["LoRA_MLP"] == kernels["LoRA_W"] == layers
    assert kernels["LoRA_QKV"] == (0 if stack.base.model.config.model_type == "qwen2" else layers)
    assert furthest(live_logits(stack, [frozen], ROWS), expected) > FAR
    assert furthest(live_logits(stack, [trainable], ROWS), expected) > FAR


def test_gradients_are_pefts_and_the_frozen_adapter_gets_none(
    case: tuple[Stack, dict[str, Any]], kernels: Counter[str]
) -> None:
    stack, peft = case
    grad = gradient(stack)
    assert kernels["LoRA_MLP"]
    assert grad.dtype == torch.float32
    assert float((grad - peft["gradient"]).norm() / peft["gradient"].norm()) < 0.02


def test_dropout_takes_the_two_adapter_path(case: tuple[Stack, dict[str, Any]], kernels: Counter[str]) -> None:
    stack, peft = case
    dropped = gradient(stack, dropout=0.3)
    assert not kernels
    stack.route.plain = True
    try:
        assert torch.equal(dropped, gradient(stack, dropout=0.3))
    finally:
        stack.route.plain = False
    assert float((dropped - peft["gradient"]).norm() / peft["gradient"].norm()) > 0.1


def test_a_kernel_that_drops_the_second_adapter_is_seen(
    case: tuple[Stack, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unsloth.kernels import fast_lora

    def one_of_two(layer: Any) -> Any:
        slots = layer.route.slots
        layer.route.slots = tuple(replace(slot, frozen=slot.frozen[:1], trainable=None) for slot in slots)
        try:
            return fused.lora_parameters(layer)
        finally:
            layer.route.slots = slots

    stack, peft = case
    monkeypatch.setattr(fast_lora, "get_lora_parameters", one_of_two)
    assert furthest(live_logits(stack, adapters(stack), ROWS), [peft[f"logits_{i}"] for i in range(len(ROWS))]) > 0.3


def test_a_model_of_random_weights_takes_the_same_path(kernels: Counter[str]) -> None:
    unsloth_path.patch_classes("qwen2")
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    fused.patch_model(model)
    stack = Stack(make_base(model, None, "random"), SNAPSHOT)  # type: ignore[arg-type]
    adapters = [random_adapter(stack, seed, size=0.2) for seed in (1, 2)]
    rows = [[1, 2, 3, 4, 5], [6, 7, 8]]
    kernels.clear()
    mine = live_logits(stack, adapters, rows)
    assert kernels["LoRA_MLP"] == 1
    stack.route.plain = True
    assert furthest(mine, live_logits(stack, adapters, rows)) < NEAR


def test_a_batch_longer_than_the_model_is_not_cut(tiny_llama: Path, tmp_path: Path) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"max_position_embeddings": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stack = loaded(tmp_path)
    assert sum(map(len, ROWS)) > 16
    alone = [live_logits(stack, [], [row])[0] for row in ROWS]
    assert furthest(live_logits(stack, [], ROWS), alone) < NEAR


def test_the_self_tests_pass_and_see_a_dropped_adapter(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unsloth.kernels import fast_lora

    stack = loaded(tiny_llama)
    assert 0 < self_test(stack)["fused kernels"] < 0.02
    reader = fast_lora.get_lora_parameters

    def last_alone(layer: Any) -> Any:
        slots = layer.route.slots
        layer.route.slots = tuple(
            replace(slot, frozen=()) if slot.trainable else replace(slot, frozen=slot.frozen[-1:]) for slot in slots
        )
        try:
            return reader(layer)
        finally:
            layer.route.slots = slots

    monkeypatch.setattr(fast_lora, "get_lora_parameters", last_alone)
    with pytest.raises(TrainingError, match="self-test"):
        self_test(stack)
