"""On a CUDA device: Unsloth's kernels with the stack in bf16, 4-bit bases, 8-bit moments, self-tests, backends.

Unsloth patches whatever is imported after it, so each question about it gets a process of its own (`ask`); the answers
are printed, so that one run of `pytest -m gpu -s tests/engine/test_gpu_unsloth.py` also says how far apart and how fast.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from fastconv.engine.attention_backends import pick_attention
from fastconv.engine.device import query_gpu
from fastconv.engine.model import load_base
from fastconv.engine.selftest import self_test
from fastconv.engine.stack import Stack
from fastconv.recipe import ModelSettings
from tests import ROOT
from tests.engine_kit import SNAPSHOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_unsloth = pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="needs unsloth")
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")

_PRELUDE = """
import json, sys, time
import torch
from fastconv.engine.model import load_base, pack
from fastconv.engine.selftest import self_test
from fastconv.engine.stack import Slot, Stack
from fastconv.engine.train import Hooks, Job, start, train
from fastconv.recipe import LoraSettings, ModelSettings
from tests.engine_kit import BEHAVIOR, SNAPSHOT, ragged_rows, random_adapter, train_settings

def stack_of(**settings):
    return Stack(load_base(ModelSettings.model_validate({"id": sys.argv[1], "device": "cuda", **settings})), SNAPSHOT)

def trained(stack, **settings):
    frozen = stack.take(random_adapter(stack, 1))
    trainee = start(stack, Job("job", ragged_rows(12), train_settings(**settings), ("gpu",), (frozen,)))
    train(stack, [trainee], Hooks())
    return trainee
"""


def ask(script: str, *words: str) -> dict[str, Any]:
    """Run a script in a fresh process; the JSON object on its last line is the answer."""
    found = subprocess.run(
        [sys.executable, "-c", _PRELUDE + textwrap.dedent(script), *words],
        capture_output=True, text=True, timeout=280, cwd=ROOT, env=dict(os.environ),
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    answer = json.loads(found.stdout.strip().splitlines()[-1])
    print(json.dumps(answer))
    return answer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_tests_pass_on_the_plain_engine(tiny_qwen: Path, dtype: str) -> None:
    settings = ModelSettings.model_validate({"id": str(tiny_qwen), "device": "cuda", "dtype": dtype, "engine": "torch"})
    print(self_test(Stack(load_base(settings), SNAPSHOT)))


def test_a_backend_is_picked_by_trying() -> None:
    for heads, kv_heads, head_dim in ((28, 4, 128), (9, 3, 64), (4, 2, 16)):
        found = pick_attention(torch.device("cuda"), torch.bfloat16, heads, kv_heads, head_dim)
        print(found.name, found.passed_over)
    assert pick_attention(torch.device("cuda"), torch.float32, 4, 2, 16).name == "sdpa"


def test_the_card_is_looked_at() -> None:
    found = query_gpu(torch.cuda, torch.version.cuda)
    print(found)
    assert found.capability >= (8, 0)
    assert 0 < found.free_bytes <= found.total_bytes


@needs_unsloth
@pytest.mark.parametrize("folder", ["tiny_qwen", "tiny_llama"])
def test_unsloth_in_bf16_passes_the_self_tests_and_trains_as_the_plain_engine(
    folder: str, request: pytest.FixtureRequest
) -> None:
    path = str(request.getfixturevalue(folder))
    fused = ask(
        """
        stack = stack_of(engine="unsloth")
        found = self_test(stack)
        runs = {str(p): trained(stack, dropout=p).losses.tolist() for p in (0.0, 0.05)}
        stack.route.plain = True
        plain = {str(p): trained(stack, dropout=p).losses.tolist() for p in (0.0, 0.05)}
        print(json.dumps({"self_test": found, "losses": runs, "plain": plain}))
        """,
        path,
    )
    torch_engine = ask(
        """
        stack = stack_of(engine="torch", dtype="bfloat16")
        print(json.dumps({"losses": {str(p): trained(stack, dropout=p).losses.tolist() for p in (0.0, 0.05)}}))
        """,
        path,
    )
    for p in ("0.0", "0.05"):
        assert fused["losses"][p] == pytest.approx(fused["plain"][p], abs=0.03)
        assert fused["losses"][p] == pytest.approx(torch_engine["losses"][p], abs=0.05)


@needs_unsloth
def test_trl_is_left_as_it_is(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth would rewrite its trainers and compile them, a quarter of the time of its import."""
    monkeypatch.delenv("UNSLOTH_ALLOW_CPU", raising=False)
    told = ask(
        """
        stack_of(engine="unsloth", dtype="bfloat16")
        from trl import SFTTrainer
        print(json.dumps({"trainer": SFTTrainer.__module__, "begins": SFTTrainer.__init__.__module__}))
        """,
        str(tiny_qwen),
    )
    assert all(module.startswith("trl.") for module in told.values())


@needs_unsloth
def test_unsloth_trains_with_recomputed_activations_and_samples(tiny_qwen: Path) -> None:
    answer = ask(
        """
        from fastconv.engine.generate import sample
        from fastconv.engine.train import recomputing
        from fastconv.recipe import SamplingSettings
        stack = stack_of(engine="unsloth")
        kept = trained(stack)
        with recomputing(stack.base):
            again = trained(stack)
        prompts = [row.ids for row in ragged_rows(6)]
        with stack.live(Slot((stack.take(random_adapter(stack, 1)),))):
            drawn = sample(stack.base, prompts, list(range(6)), SamplingSettings(max_new_tok=8))
        print(json.dumps({"kept": kept.losses.tolist(), "again": again.losses.tolist(), "n": len(drawn)}))
        """,
        str(tiny_qwen),
    )
    assert answer["again"] == pytest.approx(answer["kept"], abs=0.02)
    assert answer["n"] == 6


@needs_bitsandbytes
@pytest.mark.parametrize("engine", ["torch", pytest.param("unsloth", marks=needs_unsloth)])
def test_a_four_bit_base_carries_a_stack_and_trains_with_eight_bit_moments(engine: str, tiny_qwen: Path) -> None:
    answer = ask(
        """
        from fastconv.engine.optim import is_four_bit
        from fastconv.engine.lora import StackedLinear
        stack = stack_of(engine=sys.argv[2], weights="4bit")
        layers = [m.base for m in stack.base.model.modules() if isinstance(m, StackedLinear)]
        found = self_test(stack, ("adamw", "adamw8bit"))
        full, small = trained(stack, epochs=6), trained(stack, epochs=6, optimizer="adamw8bit")
        print(json.dumps({
            "packed": all(map(is_four_bit, layers)), "self_test": found, "moments": str(small.moments["state1"].dtype),
            "full": full.losses.tolist(), "small": small.losses.tolist(),
        }))
        """,
        str(tiny_qwen),
        engine,
    )
    assert answer["packed"]
    assert answer["moments"] == "torch.uint8"
    assert answer["small"] == pytest.approx(answer["full"], abs=0.1)


@needs_unsloth
def test_what_the_fused_kernels_gain_at_7b_width(tmp_path: Path) -> None:
    """Eight layers of Qwen2.5-7B's width with random weights: seconds and memory of a step, fused against plain."""
    answer = ask(
        """
        from fastconv.engine import unsloth as through_unsloth
        through_unsloth.patch_classes("qwen2")
        from transformers import AutoModelForCausalLM, Qwen2Config
        from fastconv.engine.model import make_base
        config = Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=8,
            num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=4096, pad_token_id=0,
            bos_token_id=None, eos_token_id=None)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        through_unsloth.adopt(model)
        stack = Stack(make_base(model, None, "random"), LoraSettings())
        answer = {"self_test": self_test(stack)}
        first = stack.take(random_adapter(stack, 1, size=0.002))
        second = stack.take(random_adapter(stack, 2, size=0.002))
        rows = [[i % 1000 for i in range(300)]] * 16
        ids, positions, layout = pack(rows, stack.base)
        grad = torch.zeros_like(second.flat)
        for n_frozen in (0, 1):
            for plain in (False, True, False, True):
                stack.route.plain = plain
                second.train(grad)
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
                for i in range(6):
                    if i == 2:
                        torch.cuda.synchronize()
                        began = time.perf_counter()
                    with stack.live(Slot((first,) if n_frozen else (), second)):
                        stack.base.hidden(ids, positions, layout).float().square().mean().backward()
                torch.cuda.synchronize()
                name = f"{1 + n_frozen} adapters, {'plain' if plain else 'fused'}"
                answer.setdefault(name, []).append(
                    [round((time.perf_counter() - began) / 4, 4), round(torch.cuda.max_memory_allocated() / 2**30, 2)])
                second.train(None)
        print(json.dumps(answer))
        """,
        str(tmp_path),
    )
    assert answer["self_test"]["fused kernels"] < 0.15
    assert min(t for t, _ in answer["2 adapters, fused"]) < 1.1 * min(t for t, _ in answer["2 adapters, plain"])


@needs_unsloth
@needs_bitsandbytes
def test_four_bit_layers_give_the_same_logits_under_unsloth_and_bitsandbytes(tiny_qwen: Path) -> None:
    logits = [
        ask(
            """
            stack = stack_of(engine=sys.argv[2], weights="4bit")
            ids, positions, layout = pack([[i % 60 for i in range(20)]], stack.base)
            with torch.no_grad():
                found = stack.base.logits(stack.base.hidden(ids, positions, layout))[:20]
            print(json.dumps({"logits": found.tolist()}))
            """,
            str(tiny_qwen),
            engine,
        )["logits"]
        for engine in ("torch", "unsloth")
    ]
    plain, ours = (torch.tensor(part) for part in logits)
    # Logits of 2 are rounded to 0.016 in bf16, and four layers of it add up: single ones may be 0.06 off.
    assert float((plain - ours).norm() / plain.norm()) < 0.02
    assert torch.allclose(plain, ours, atol=0.12)
