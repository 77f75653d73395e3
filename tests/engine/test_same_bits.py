"""Attention asks torch for gradients in a fixed order during its own backward pass, and at no other time. That the bits are the
same is for a card to show (test_gpu.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.deterministic as torch_deterministic

from fastconv.engine import same_bits
from fastconv.engine.same_bits import dot_product_attention, settings_kept


def settings() -> tuple[bool, bool, bool]:
    """(deterministic, warns only, fills new tensors)."""
    return (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch_deterministic.fill_uninitialized_memory,  # pyright: ignore[reportAttributeAccessIssue]
    )  # fmt: skip


def in_order(parts: Sequence[Any]) -> torch.Tensor:
    """Attention as on a GPU."""
    query, key, value = parts
    return same_bits._attend_in_order(query, key, value, None, 0.25)


class Spy:
    """Stands in for torch's attention: notes the settings of its backward pass, or fails in it."""

    def __init__(self, *, fails: bool = False) -> None:
        self.seen: list[tuple[bool, bool, bool]] = []
        self.fails = fails

    def attend(self, query: Any, key: Any, value: Any, mask: Any, scale: float) -> torch.Tensor:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        spy = self

        class Noting(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
                spy.seen.append(settings())
                if spy.fails:
                    raise torch.OutOfMemoryError("no memory in attention")
                return grads[0]

        return Noting.apply(out)  # pyright: ignore[reportReturnType]


class After(torch.autograd.Function):
    """Notes the settings of the pass through whatever made attention's inputs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seen: list[Any]) -> torch.Tensor:
        ctx.seen = seen
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.seen.append(settings())
        return grads[0] * 2, None


@pytest.fixture
def parts() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, 8, 16, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("wanting", [(True, True, True), (True, False, False), (False, False, True)])
def test_the_order_is_asked_for_in_attentions_backward_pass_alone(
    parts: list[torch.Tensor], wanting: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, before = Spy(), settings()
    monkeypatch.setattr(same_bits, "_attend", spy.attend)
    after: list[Any] = []
    given = [After.apply(part, after) if wants else part.detach() for part, wants in zip(parts, wanting, strict=True)]
    out = in_order(given)
    assert settings() == before
    loss = (out * 3).square().sum()
    loss.backward()
    assert spy.seen == [(True, False, False)]
    assert after == [before] * sum(wanting)
    assert settings() == before


def test_values_and_gradients_are_torchs_own(parts: list[torch.Tensor]) -> None:
    out = in_order(parts)
    found = torch.autograd.grad(out.square().sum(), parts)
    query, key, value = parts
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.25)
    expected = torch.autograd.grad(plain.square().sum(), parts)
    assert torch.equal(out, plain)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_several_layers_each_ask_for_it(parts: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    spy, before = Spy(), settings()
    monkeypatch.setattr(same_bits, "_attend", spy.attend)
    x: Any = parts[0]
    after: list[Any] = []
    for _ in range(3):
        x = in_order([After.apply(x, after) for _ in range(3)])
    x.sum().backward()
    assert spy.seen == [(True, False, False)] * 3
    assert after == [before] * 9


def test_no_memory_within_attention_leaves_the_settings_as_they_were(
    parts: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = settings()
    monkeypatch.setattr(same_bits, "_attend", Spy(fails=True).attend)
    out = in_order(parts)
    with pytest.raises(torch.OutOfMemoryError), settings_kept():
        out.sum().backward()
    assert settings() == before


def test_a_setting_of_the_users_own_is_kept(parts: list[torch.Tensor]) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        in_order(parts).sum().backward()
        assert settings() == (True, True, True)
    finally:
        torch.use_deterministic_algorithms(False)


def test_grouped_heads_and_masks_are_computed_on_a_cpu_as_before(parts: list[torch.Tensor]) -> None:
    query, key = parts[0].repeat(1, 2, 1, 1), parts[1]
    grouped = dot_product_attention(query, key, parts[2], None, 0.25)
    keys, values = (part.repeat_interleave(2, 1) for part in (key, parts[2]))
    expected = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=0.25)
    torch.testing.assert_close(grouped, expected)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    torch.testing.assert_close(dot_product_attention(query, keys, values, mask, 0.25), grouped)
