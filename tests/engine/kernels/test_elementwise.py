"""Our Triton kernels through Triton's interpreter, against torch in fp32; see `make test-fused`."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F

pytestmark = [
    pytest.mark.fused,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: make test-fused"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1: make test-fused"),
]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)


def agree(ours: torch.Tensor, theirs: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    assert torch.allclose(ours, theirs, atol=2e-6)
    given = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9))
    pairs = zip(torch.autograd.grad(ours, inputs, given), torch.autograd.grad(theirs, inputs, given), strict=True)
    assert all(torch.allclose(one, other, atol=2e-6) for one, other in pairs)


@pytest.mark.parametrize("width", [48, 64])
def test_rms_norm(width: int) -> None:
    from fastconv.engine.kernels.norms import rms_norm

    x, weight = drawn(5, width), drawn(width, seed=1).detach()
    agree(rms_norm(x, weight, 1e-6), weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), (x,))


@pytest.mark.parametrize("adds", [True, False])
def test_a_sum_and_its_norm_get_their_gradients_in_one_pass(adds: bool) -> None:
    from fastconv.engine.kernels.norms import residual_norm, rms_norm

    x, delta, weight = drawn(5, 48), drawn(5, 48, seed=2), drawn(48, seed=1).detach()
    inputs = (x, delta) if adds else (x,)
    total, normed = residual_norm(x, delta if adds else None, weight, 1e-6)
    plain = x + delta if adds else x
    assert torch.equal(total, plain)
    assert torch.equal(normed, rms_norm(plain, weight, 1e-6))
    agree(torch.cat([total * 2, normed]), torch.cat([plain * 2, rms_norm(plain, weight, 1e-6)]), inputs)
    (alone,) = torch.autograd.grad(residual_norm(x, None, weight, 1e-6)[1].sum(), x)
    assert torch.allclose(alone, torch.autograd.grad(rms_norm(x, weight, 1e-6).sum(), x)[0], atol=1e-6)


def test_swiglu() -> None:
    from fastconv.engine.kernels.elementwise import swiglu

    gate, up = drawn(5, 333), drawn(5, 333, seed=1)
    agree(swiglu(gate, up), F.silu(gate) * up, (gate, up))


def test_rope() -> None:
    from fastconv.engine.kernels.elementwise import rope

    x, angle = drawn(6, 3, 8), drawn(6, 4, seed=1).detach().repeat(1, 2)
    turned = x * angle.cos()[:, None] + torch.cat([-x[..., 4:], x[..., :4]], -1) * angle.sin()[:, None]
    agree(rope(x, angle.cos(), angle.sin()), turned, (x,))


def test_moved_rows_come_back() -> None:
    from fastconv.engine.kernels.elementwise import gather_rows

    x, there, back = drawn(7, 3, 5), torch.tensor([2, -1, 0, 6]), torch.tensor([2, -1, 0, -1, -1, -1, 3])
    agree(gather_rows(x, there, back), x[there.clamp(min=0)] * (there >= 0).float()[:, None, None], (x,))


@pytest.mark.parametrize("vocab", [33, 9000])
def test_the_loss_and_its_gradient_come_from_one_kernel(vocab: int) -> None:
    from fastconv.engine.kernels.elementwise import cross_entropy_in_place

    logits = drawn(5, vocab)
    targets, weights = torch.tensor([0, vocab - 1, 7, 30, 7]), torch.tensor([0.1, 0.5, 0.0, 0.2, 0.2])
    plain = F.cross_entropy(logits, targets, reduction="none")
    (expected,) = torch.autograd.grad((plain * weights).sum(), logits)
    given = logits.detach().clone()
    given[2, 3] = -float("inf")
    losses = cross_entropy_in_place(given, targets, weights)
    alike = [0, 1, 3, 4]
    assert torch.allclose(losses[alike], plain[alike].detach(), atol=2e-6)
    assert torch.allclose(given[alike], expected[alike], atol=2e-6)
    assert bool(torch.isfinite(losses).all())
    assert not given[2].any()  # no weight, no gradient


def test_a_logit_that_is_no_number_makes_the_loss_none() -> None:
    from fastconv.engine.kernels.elementwise import cross_entropy_in_place

    logits = drawn(2, 40).detach()
    logits[0, 3] = float("nan")
    losses = cross_entropy_in_place(logits, torch.tensor([1, 1]), torch.ones(2))
    assert losses.isnan().tolist() == [True, False]


def test_decoding_sees_each_rows_own_length_and_keeps_the_new_token() -> None:
    from fastconv.engine.kernels.elementwise import decode_attention

    query, keys, values = drawn(3, 6, 16), drawn(4, 2, 200, 16, seed=1), drawn(4, 2, 200, 16, seed=2)
    key, value = (drawn(2, 3, 16, seed=seed).transpose(0, 1) for seed in (3, 4))
    lengths = torch.tensor([0, 70, 128])
    before = keys.detach().clone()
    with torch.no_grad():
        out = decode_attention(query, key, value, keys, values, lengths, 0.25)
        for row, newest in enumerate(lengths.tolist()):
            assert torch.equal(keys[row, :, newest], key[row])
            assert torch.equal(values[row, :, newest], value[row])
            before[row, :, newest] = key[row]
            k, v = (cache[row, :, : newest + 1].repeat_interleave(3, 0) for cache in (keys, values))
            alone = F.scaled_dot_product_attention(query[row][:, None], k, v, scale=0.25)[:, 0]
            assert torch.allclose(out[row], alone, atol=2e-6)
    assert torch.equal(keys, before)  # nothing else is written
