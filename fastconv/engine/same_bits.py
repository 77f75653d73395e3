"""torch's attention without cuDNN's, which torch prefers on Hopper cards: gradients with the same bits each time.

A run that is killed and goes on must reach the weights of one that was not. cuDNN's backward pass adds the gradients of
queries in the order in which blocks happen to end: in a real run one step in some hundred gave other bits, in a short trial
none. Its forward pass is planned anew for each shape, about 60 ms on the host, and sampling meets a new one at each refill.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch.utils.deterministic as torch_deterministic
from torch.nn.attention import SDPBackend, sdpa_kernel

#: torch's implementations that plan nothing and whose backward pass has a form of fixed order, the fastest first.
_ORDERED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def dot_product_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """torch's scaled_dot_product_attention of query [..., heads, n, d] and key and value [..., kv heads, m, d].

    `mask` [.., n, m] bool says what is seen; None is causal. On a GPU gradients are added in a fixed order; whoever runs
    the backward pass does so within `settings_kept`.
    """
    if not query.is_cuda:
        return _attend(query, key, value, mask, scale)
    return _attend_in_order(query, key, value, mask, scale)


def _attend_in_order(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    with sdpa_kernel(_ORDERED):
        out = _attend(query, key, value, mask, scale)
    if out.requires_grad:
        order = _Order()
        out.register_hook(order.begin)
        for part in (query, key, value):
            if part.requires_grad:
                part.register_hook(order.end)
    return out


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    grouped = query.shape[-3] != key.shape[-3]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


@dataclass(frozen=True)
class _Settings:
    """torch's settings of determinism."""

    wanted: bool
    warn_only: bool
    fill: bool

    @classmethod
    def now(cls) -> _Settings:
        """Those of this process."""
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        fill: bool = torch_deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
        return cls(torch.are_deterministic_algorithms_enabled(), warn_only, fill)

    def set(self) -> None:
        """Make these the process' settings."""
        torch.use_deterministic_algorithms(self.wanted, warn_only=self.warn_only)
        torch_deterministic.fill_uninitialized_memory = self.fill  # pyright: ignore[reportAttributeAccessIssue]


#: What makes torch's attention take its ordered form. It warns only, and goes on, in the milder mode; and new tensors need no
#: filling with NaN, which is for finding mistakes.
_IN_ORDER = _Settings(wanted=True, warn_only=False, fill=False)


class _Order:
    """Asks for the ordered form for one backward pass of attention and no other operation: cuBLAS, which the setting would
    refuse unless its workspace is configured, is deterministic as it is."""

    def __init__(self) -> None:
        self._before: _Settings | None = None

    def begin(self, grad: torch.Tensor) -> None:
        """When the gradient of the output is there."""
        self._before = _Settings.now()
        _IN_ORDER.set()

    def end(self, grad: torch.Tensor) -> None:
        """When one of the inputs' gradients is there: before whatever comes next."""
        if self._before is not None:
            self._before.set()
            self._before = None


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """After the block torch's settings are what they were, also where a backward pass ended within attention (no memory)."""
    before = _Settings.now()
    try:
        yield
    finally:
        if _Settings.now() != before:
            before.set()
