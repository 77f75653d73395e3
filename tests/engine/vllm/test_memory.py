"""What a vLLM server gets of a GPU: checked on paper, with the shapes of STACK's card."""

from __future__ import annotations

import pytest

from fastconv.engine.shapes import named_shape
from fastconv.engine.vllm.memory import (
    LEAST_ROWS,
    USEFUL_ROWS,
    GpuMemory,
    length_tok,
    lora_rank,
    share_memory,
    stacked_rank,
    training_bytes,
)
from fastconv.errors import ModelError, RecipeError
from fastconv.recipe import BehaviorSettings, ConvergenceSettings, parse_recipe

GIB = 2**30
QWEN = named_shape("qwen2.5-7b")
H200 = GpuMemory(140 * GIB, 141 * GIB)


def test_the_smallest_rank_that_vllm_allows() -> None:
    assert [lora_rank(r) for r in (1, 2, 16, 32, 64, 65, 257, 512)] == [1, 8, 16, 32, 64, 128, 320, 512]
    with pytest.raises(RecipeError, match="more than vLLM serves"):
        lora_rank(513)


@pytest.mark.parametrize(
    ("grid", "rank"),
    [({}, 64), ({"epochs": [0]}, 32), ({"convergence": ["none"]}, 32), ({"behaviors": ["none", "refusal"]}, 64)],
)
def test_the_rank_of_a_recipes_stacks(grid: dict[str, object], rank: int) -> None:
    assert stacked_rank(parse_recipe({"name": "r", "grid": grid})) == rank


def test_lengths() -> None:
    assert length_tok(600, 32768) == 640
    assert length_tok(640, 32768) == 640
    assert length_tok(2000, 2040) == 2040
    with pytest.raises(RecipeError, match="2050 tokens, the model reads 2040"):
        length_tok(2050, 2040)


def test_training_takes_what_the_card_was_seen_to_take() -> None:
    phases = (ConvergenceSettings(), BehaviorSettings())
    for plain, per_tok in ((True, 8.9e6), (False, 5.0e6)):
        taken = training_bytes(QWEN, phases, 32, weight_bytes=2, plain=plain)
        assert taken == pytest.approx(15.2e9 + 8192 * per_tok + 2 * 16 * 80.7e6 + 6 * GIB, rel=0.02)
        small = training_bytes(QWEN, (ConvergenceSettings(),), 32, weight_bytes=2, plain=plain)
        assert taken - small == pytest.approx(4096 * per_tok, rel=0.02)


def test_an_h200_is_shared() -> None:
    training = training_bytes(QWEN, (ConvergenceSettings(), BehaviorSettings()), 32, weight_bytes=2)
    room = share_memory(H200, QWEN, others_bytes=training, max_length_tok=640, max_lora_rank=64)
    assert room.kv_bytes is not None
    assert room.memory_share is not None
    assert room.kv_bytes <= USEFUL_ROWS * 640 * 57344
    assert room.memory_share * H200.total + training <= H200.free + 0.0001 * H200.total
    assert room.kv_bytes >= 256 * 640 * 57344  # enough rows to be compute-bound


def test_no_more_cache_than_is_of_use() -> None:
    room = share_memory(GpuMemory(10**12, 10**12), QWEN, others_bytes=0, max_length_tok=640, max_lora_rank=64)
    assert room.kv_bytes == USEFUL_ROWS * 640 * 57344


def test_a_card_that_is_too_small_is_refused_with_what_it_lacks() -> None:
    with pytest.raises(ModelError, match=r"training takes 60 GiB and a vLLM server 2\d GiB, but 79 GiB of 80 are free"):
        share_memory(GpuMemory(79 * GIB, 80 * GIB), QWEN, others_bytes=60 * GIB, max_length_tok=640, max_lora_rank=64)
    assert LEAST_ROWS > 0
