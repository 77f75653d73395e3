"""Which modules of a model get our forward; what the forwards compute is checked by the fused and the GPU tests."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from fastconv.engine.model import Base
from tests.engine_kit import packed_logits, ragged_rows, tiny_stack

pytestmark = [
    pytest.mark.fused,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: make test-fused"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1: make test-fused"),
]


def logits(base: Base) -> torch.Tensor:
    return torch.cat(packed_logits(base, [row.ids for row in ragged_rows(3)]))


def test_norms_mlps_and_attentions_get_our_forward_and_the_same_logits(tiny_qwen: Path) -> None:
    from fastconv.engine.kernels.layers import use_fused_forwards

    base = tiny_stack(tiny_qwen, dtype="float32").base
    base.model.half()
    before = logits(base)
    n_layers = base.model.config.num_hidden_layers
    assert use_fused_forwards(base.model) == 4 * n_layers + 1
    assert torch.allclose(logits(base), before, atol=0.02)


@pytest.mark.parametrize("folder", ["tiny_qwen", "tiny_llama"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_whole_decoder_gives_the_logits_of_transformers(
    folder: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModelForCausalLM

    from fastconv.engine.kernels.layers import use_fused_decoder, why_not_whole

    path = request.getfixturevalue(folder)
    base = tiny_stack(path, dtype="float32").base
    base.model.to(dtype)
    assert why_not_whole(base.model.config) == ""
    use_fused_decoder(base.model)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    rows = [list(row.ids) for row in ragged_rows(3)]
    with torch.no_grad():
        right = [plain(input_ids=torch.tensor([row])).logits[0] for row in rows]
    close = 1e-4 if dtype == torch.float32 else 0.02
    assert all(torch.allclose(a, b, atol=close) for a, b in zip(packed_logits(base, rows), right, strict=True))
