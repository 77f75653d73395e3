"""Rows as a rectangle give what rows end to end give, and padding changes nothing: the GPU's layout, checked on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastconv.engine.attention import Packed, Padded, Ragged
from fastconv.engine.micro_batch import PaddedSizes, make_micro_batch, no_padding, rounded_sizes
from fastconv.engine.stack import Slot
from fastconv.engine.train import Job, _items, micro_step, start
from tests.engine_kit import ragged_rows, random_adapter, tiny_stack, train_settings

LENGTHS = [3, 5, 2]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)


@pytest.mark.parametrize(("n_tok", "width"), [(0, 0), (12, 8)])
def test_a_rectangle_attends_as_packed_rows_do(n_tok: int, width: int) -> None:
    total = max(n_tok, 10)
    q, k, v = drawn(4, total, 8), drawn(2, total, 8, seed=1), drawn(2, total, 8, seed=2)
    padded = Padded.of(LENGTHS, n_tok=n_tok, width=width).attend(0, q, k, v, 0.3)
    packed = Packed.of(LENGTHS).attend(0, q[:, :10], k[:, :10], v[:, :10], 0.3)
    assert torch.allclose(padded[:10], packed, atol=1e-6)
    given = torch.randn(total, 4, 8, generator=torch.Generator().manual_seed(3))
    ours, theirs = torch.autograd.grad(padded, (q, k, v), given), torch.autograd.grad(packed, (q, k, v), given[:10])
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
        assert not one[:, 10:].any(), "padding must give no gradient"


def test_every_token_has_one_place() -> None:
    layout = Padded.of(LENGTHS, n_tok=12, width=8)
    assert (layout.source >= 0).sum() == 10
    assert layout.source[layout.place[:10]].tolist() == list(range(10))
    assert layout.place[10:].tolist() == [-1, -1]


def test_rectangles_come_in_few_shapes() -> None:
    assert {Padded.of([3, n]).longest for n in range(200, 400)} == {256, 320, 384, 448}


def test_sizes_are_rounded_up_by_little_and_few() -> None:
    assert rounded_sizes([300, 20], 100) == PaddedSizes(n_tok=320, width=384, n_rows=2, n_supervised=128)
    assert rounded_sizes([301] * 13, 1300) == PaddedSizes(n_tok=3968, width=384, n_rows=16, n_supervised=1408)
    padding = [rounded_sizes([n // 8] * 8, n).n_tok / (n // 8 * 8) - 1 for n in range(1024, 8192, 8)]
    assert sum(padding) / len(padding) < 0.025
    assert max(padding) < 0.07


def test_logits_are_hardly_padded() -> None:
    """A row of logits costs a twelfth of a token of 7B: rounded up to a power of two they cost a step of six runs 4 %."""
    padding = [rounded_sizes([300] * 16, n).n_supervised / n - 1 for n in range(1024, 8192, 8)]
    assert sum(padding) / len(padding) < 0.05
    assert rounded_sizes([307] * 24, 4423).n_supervised == 4608


def test_rows_that_fill_up_change_nothing() -> None:
    q, k, v = drawn(4, 10, 8), drawn(2, 10, 8, seed=1), drawn(2, 10, 8, seed=2)
    filled, plain = Padded.of(LENGTHS, n_rows=8), Padded.of(LENGTHS)
    assert (filled.n_rows, filled.longest) == (8, plain.longest)
    assert torch.equal(filled.attend(0, q, k, v, 0.3), plain.attend(0, q, k, v, 0.3))
    ragged = Ragged.of(LENGTHS, lambda *parts: parts[0], n_tok=12, n_rows=5)
    assert ragged.bounds.tolist() == [0, 3, 8, 10, 10, 10, 12]


def test_a_padded_micro_step_has_the_loss_and_gradient_of_the_plain_one(tiny_qwen: Path) -> None:
    stack = tiny_stack(tiny_qwen)
    job = Job("job", ragged_rows(6), train_settings(dropout=0.1, batch_rows=6), ("pad",), (random_adapter(stack, 1),))
    trainee = start(stack, job)
    trainee.adapter.flat.copy_(random_adapter(stack, 2).flat)
    items = _items(0, trainee)
    results = []
    for sizes_for in (no_padding, rounded_sizes):
        trainee.grad.zero_()
        trainee.adapter.train(trainee.grad)
        batch = make_micro_batch(stack.base, [Slot(job.frozen, trainee.adapter, 0.1)], items, sizes_for)
        if sizes_for is rounded_sizes:  # on the CPU the rows themselves stay packed; where the loss is gets padded
            assert batch.take.shape[0] % 64 == 0
        total = torch.zeros(1)
        micro_step(stack, batch, total)
        results.append((float(total), trainee.grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)
