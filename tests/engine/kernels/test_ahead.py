"""Kernels compiled ahead are those that training and scoring launch. Compiled for a card that is not there; see `make test-fused`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastconv.chat import Rendered
from fastconv.engine import ahead, stack
from fastconv.engine.kernels import lora
from fastconv.engine.model import load_base, pack
from fastconv.engine.score import hidden_fp32
from fastconv.engine.selftest import SelfTestSetup
from fastconv.engine.stack import Slot, Stack
from fastconv.engine.train import Hooks, Job, start, train
from fastconv.recipe import LoraSettings, ModelSettings, SamplingSettings
from tests.engine_kit import train_settings

# pyright: reportMissingImports=false
# Triton comes with torch's CUDA builds alone.

pytestmark = [
    pytest.mark.fused,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: make test-fused"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler: make test-fused"),
]

LORA = LoraSettings(r=32, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
PHASES = (train_settings(), train_settings(dropout=0.1))
SAMPLING = SamplingSettings(max_new_tok=4)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Triton compiles for an H100, and a compiled kernel that is launched only leaves its name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import CompiledKernel

    from fastconv.engine.kernels import lora_triton

    names: list[str] = []
    card = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setattr(lora, "why_unusable", lambda device: None)
    monkeypatch.setattr(stack, "why_unusable", lambda device: None)
    monkeypatch.setattr(CompiledKernel, "launch_metadata", lambda self, *given: None)
    monkeypatch.setattr(
        CompiledKernel, "run", property(lambda self: lambda *given: names.append(self.metadata.name)), raising=False
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", card)
    for kernel in vars(lora_triton).values():
        if isinstance(kernel, triton.runtime.JITFunction):
            kernel.device_caches.clear()  # of an earlier test
    return names


def _stack(folder: Path) -> Stack:
    base = load_base(ModelSettings.model_validate({"id": str(folder), "device": "cpu", "dtype": "bfloat16"}))
    plain = Stack(base, LORA, "plain")
    plain.route.kernel = lora.StackedKernel(base.device)  # its probe would have launched
    return plain


def _work(stack: Stack) -> None:
    """A step of each phase on a snapshot and above one, and a pass over rows under each stack."""
    rows = tuple(Rendered((place,) * 32, 16) for place in range(4))
    frozen = [stack.zero_adapter(stack.base.device) for _ in range(2)]
    for settings in PHASES:
        for above in ((), tuple(frozen[:1])):
            train(stack, [start(stack, Job("j", rows, settings, ("x",), above))], Hooks(), until_step=1)
    for slots in ((), (Slot((frozen[0],)),), (Slot(tuple(frozen)),)):
        for lengths in ((16, 32), (5, 16)):
            ids, positions, layout = pack([[1] * n_tok for n_tok in lengths], stack.base)
            with stack.live(*slots), torch.no_grad():
                stack.base.hidden(ids, positions, layout)
                hidden_fp32(stack.base, ids, positions, layout)


def test_what_a_run_launches_was_compiled_ahead(
    tiny_qwen: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = _stack(tiny_qwen)
    compiled = ahead.compile_ahead(stack, PHASES, SAMPLING, letters=True)
    assert compiled > 20
    assert not launched
    assert not stack.route.slots
    monkeypatch.setattr(torch, "isfinite", lambda values: torch.ones_like(values, dtype=torch.bool))  # nothing computed
    with ahead.noted() as late:
        _work(stack)
        tests = SelfTestSetup(stack)
        tests.gradient()
        tests.logits(tests.rows, tests.frozen, tests.trainable)
    assert not late
    assert {"shrink", "finish_shrink", "expand", "input_side", "output_side", "add_up"} <= set(launched)


def test_without_it_each_would_be_compiled_when_it_is_launched(
    tiny_qwen: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = _stack(tiny_qwen)
    monkeypatch.setattr(torch, "isfinite", lambda values: torch.ones_like(values, dtype=torch.bool))
    with ahead.noted() as late:
        _work(stack)
    assert len(late) > 20
    assert not launched


def test_a_stack_of_torchs_operations_has_nothing_to_compile(tiny_qwen: Path) -> None:
    base = load_base(ModelSettings.model_validate({"id": str(tiny_qwen), "device": "cpu"}))
    assert ahead.compile_ahead(Stack(base, LORA), PHASES, SAMPLING) == 0


def test_the_hook_is_put_back_whatever_happens() -> None:
    from triton import knobs

    before: Any = knobs.runtime.jit_cache_hook
    with pytest.raises(RuntimeError), ahead.noted():
        raise RuntimeError
    assert knobs.runtime.jit_cache_hook is before
