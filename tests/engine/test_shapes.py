"""The roofline arithmetic against the figures worked out for Qwen2.5-7B, and shapes against real configurations."""

from __future__ import annotations

import pytest

from fastconv.engine.shapes import SHAPES, Work, forward_flops_per_tok, named_shape, shape_of, train_flops_per_tok
from fastconv.errors import ModelError

QWEN = SHAPES["qwen2.5-7b"]


def test_the_worked_figures_of_qwen_7b() -> None:
    assert pytest.approx(6.525e9, rel=1e-3) == QWEN.linear_params
    assert pytest.approx(7.616e9, rel=1e-3) == QWEN.total_params
    assert QWEN.adapter_params(32) == 80_740_352
    assert QWEN.kv_bytes_per_tok() == 57_344
    work = Work(length_tok=300, completion_share=0.6, r=32)
    assert train_flops_per_tok(QWEN, work) == pytest.approx(28.1e9, rel=1e-3)
    assert train_flops_per_tok(QWEN, work, checkpointing=True) == pytest.approx(41.4e9, rel=1e-3)


def test_a_forward_pass_is_two_flops_a_weight() -> None:
    assert forward_flops_per_tok(QWEN, Work(0, 1, 0)) == 2 * (QWEN.linear_params + QWEN.head_params)


@pytest.mark.parametrize(
    ("name", "params"),
    [("qwen2.5-0.5b", 494_032_768), ("qwen2.5-7b", 7_615_616_512), ("smollm2-135m", 134_515_008),
     ("llama-3.1-8b", 8_030_261_248)],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones(name: str, params: int) -> None:
    assert named_shape(name).total_params == params


def test_a_shape_from_a_config() -> None:
    config = {
        "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    }  # fmt: skip
    assert shape_of(config, "qwen2.5-7b") == QWEN
    with pytest.raises(ModelError, match="num_attention_heads"):
        shape_of({"hidden_size": 8})


def test_an_unknown_shape_names_those_there_are() -> None:
    with pytest.raises(ModelError, match=r"qwen2\.5-7b"):
        named_shape("qwen9")
