"""Dropout that depends on the row, the step and the module, never on what else is in the batch."""

from __future__ import annotations

import torch


def keep_mask(seeds: torch.Tensor, width: int, salt: int, p: float) -> torch.Tensor:
    """Inverted-dropout multipliers [T, width]: 0 with probability p, else 1/(1-p), fp32.

    Counter based: every element is a hash of (its token's seed, its channel, the module's salt), so the same row gets
    the same mask in any batch, on any device, and a kernel can draw it again instead of storing it. The mixer is the
    32-bit finaliser of Wellons' "hash prospector" (constants 7feb352d, 846ca68b); int32 products wrap as in C.
    `seeds` [T] int32.
    """
    channels = torch.arange(width, dtype=torch.int32, device=seeds.device) * _signed(0x9E3779B1) + salt
    bits = _mix(seeds[:, None] ^ channels[None, :])
    threshold = round(p * 2**24)
    return ((bits & 0xFFFFFF) >= threshold).to(torch.float32) / (1.0 - p)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _signed(0x7FEB352D)
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
