"""A base that Unsloth really loaded, run by our forwards through Triton's interpreter, against PEFT's two-adapter sum.

Run by `make test-fused` in a virtual environment and a process of its own.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import os
import subprocess
import sys
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
from fastconv.engine import score, unsloth
from fastconv.engine.micro_batch import token_seeds
from fastconv.engine.model import make_base, pack
from fastconv.engine.selftest import self_test
from fastconv.engine.stack import Slot, Stack
from fastconv.errors import ModelError
from tests.engine.fused_reference import ROWS, adapters
from tests.engine_kit import SNAPSHOT, furthest, live_logits, random_adapter

pytestmark = pytest.mark.fused

#: float16 against PEFT's float32: logits of a few nats, of which the adapters make up about five.
NEAR = 0.08
#: What dropping either adapter changes, at the least.
FAR = 2.0


def loaded(folder: Path) -> Stack:
    model = unsloth.load(folder, torch.float16, torch.device("cpu"))
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


def test_logits_are_pefts_sum_of_both_adapters(case: tuple[Stack, dict[str, Any]]) -> None:
    stack, peft = case
    expected = [peft[f"logits_{i}"] for i in range(len(ROWS))]
    frozen, trainable = adapters(stack)
    assert unsloth.is_adopted(stack.base.model)
    assert furthest(live_logits(stack, [frozen, trainable], ROWS), expected) < NEAR
    assert furthest(live_logits(stack, [frozen], ROWS), expected) > FAR
    assert furthest(live_logits(stack, [trainable], ROWS), expected) > FAR


def test_gradients_are_pefts_and_the_frozen_adapter_gets_none(case: tuple[Stack, dict[str, Any]]) -> None:
    stack, peft = case
    grad = gradient(stack)
    assert grad.dtype == torch.float32
    assert float((grad - peft["gradient"]).norm() / peft["gradient"].norm()) < 0.02
    dropped = gradient(stack, dropout=0.3)
    assert float((dropped - peft["gradient"]).norm() / peft["gradient"].norm()) > 0.1


def test_near_ties_are_scored_again_in_fp32(
    case: tuple[Stack, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, peft = case
    letters = tuple(range(4, 8))
    items = [score.LetterItem(tuple(row), letters) for row in ROWS]
    expected = [torch.log_softmax(peft[f"logits_{i}"][-1], -1)[list(letters)].tolist() for i in range(len(ROWS))]
    with stack.live(Slot(tuple(adapters(stack)))):
        rough = score.score_letters(stack.base, items, 64)
        monkeypatch.setattr(score, "NEAR_TIE_NATS", 1e9)  # every item is a near tie
        found = score.score_letters(stack.base, items, 64)
    assert all(one.rescored for one in found)

    def off(scores: list[score.LetterScore]) -> float:
        pairs = zip(scores, expected, strict=True)
        return max(abs(a - b) for one, right in pairs for a, b in zip(one.logprobs, right, strict=True))

    assert off(found) < 0.01  # weights are held in 16 bits, products are fp32
    assert off(found) < off(rough)
    assert {p.dtype for p in stack.base.model.parameters()} == {torch.float16}, "each layer is narrow again"


def test_a_model_of_random_weights_takes_the_same_path() -> None:
    unsloth.patch_classes("qwen2")
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    unsloth.adopt(model)
    stack = Stack(make_base(model, None, "random"), SNAPSHOT)  # type: ignore[arg-type]
    assert unsloth.is_adopted(model)
    assert torch.isfinite(
        torch.cat(live_logits(stack, [random_adapter(stack, 1, size=0.2)], [[1, 2, 3], [6, 7]]))
    ).all()


def test_a_decoder_that_is_not_ours_is_refused_by_name() -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=8, max_window_layers=1, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    with pytest.raises(ModelError, match="window"):
        unsloth.adopt(model)
    assert not unsloth.is_adopted(model)


def test_a_batch_longer_than_the_model_is_not_cut(tiny_llama: Path, tmp_path: Path) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"max_position_embeddings": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stack = loaded(tmp_path)
    assert sum(map(len, ROWS)) > 16
    alone = [live_logits(stack, [], [row])[0] for row in ROWS]
    assert furthest(live_logits(stack, [], ROWS), alone) < NEAR


def test_the_self_tests_pass(tiny_llama: Path) -> None:
    self_test(loaded(tiny_llama))
