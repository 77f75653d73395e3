"""On a CUDA device: what is compiled ahead is what a run launches, and changes no bit of what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastconv.engine.ahead import compile_ahead
from fastconv.engine.generate import sample
from fastconv.engine.model import load_base, pack
from fastconv.engine.score import hidden_fp32
from fastconv.engine.selftest import self_test
from fastconv.engine.stack import Slot, Stack
from fastconv.engine.train import Hooks, Job, start, train
from fastconv.recipe import LoraSettings, ModelSettings, SamplingSettings
from tests.engine_kit import ragged_rows, random_adapter, train_settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# pyright: reportMissingImports=false
# Triton comes with torch's CUDA builds alone.

LORA = LoraSettings(r=32)
PHASES = (train_settings(), train_settings(dropout=0.05))
SAMPLING = SamplingSettings(temperature=1.0, max_new_tok=8)


def _stack(folder: Path) -> Stack:
    settings = {"id": str(folder), "device": "cuda", "dtype": "bfloat16", "engine": "torch"}
    return Stack(load_base(ModelSettings.model_validate(settings)), LORA)


def _work(stack: Stack) -> list[torch.Tensor]:
    """Weights of an adapter of each phase, alone and above another one; logits and completions under one and two."""
    one, other = (stack.take(random_adapter(stack, seed)) for seed in (1, 2))
    found = []
    for settings in PHASES:
        for frozen in ((), (one,)):
            trainee = start(stack, Job("job", ragged_rows(12), settings, ("ahead",), frozen))
            train(stack, [trainee], Hooks())
            found.append(trainee.adapter.flat)
    ids, positions, layout = pack([[1, 2, 3], [4, 5]], stack.base)
    for slots in ((), (Slot((one,)),), (Slot((one, other)),)):
        with stack.live(*slots), torch.no_grad():
            found.append(stack.base.logits(stack.base.hidden(ids, positions, layout)))
            found.append(hidden_fp32(stack.base, ids, positions, layout))
            drawn = sample(stack.base, [[1, 2, 3]] * 9, list(range(9)), SAMPLING)
        found += [torch.tensor(one.ids) for one in drawn]
    return found


def test_what_a_run_launches_is_compiled_ahead_and_gives_the_same_bits(
    tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    late: list[str] = []

    def told(*, fn: Any, **others: Any) -> None:
        late.append(fn.name)

    stack = _stack(tiny_qwen)
    before = stack.probe()
    n = compile_ahead(stack, PHASES, SAMPLING, letters=True)
    assert stack.probe() == before
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", told)
    self_test(stack)
    computed = _work(stack)
    assert not late, f"{n} compiled ahead"
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", None)
    again = _work(_stack(tiny_qwen))
    assert all(map(torch.equal, computed, again))
