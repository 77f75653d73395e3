"""Every random choice of fastconv, made by sha256 of named parts, so that it can be recomputed by hand.

No generator state: adding a row, a persona or a stage never changes what another one drew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def digest(*parts: object) -> bytes:
    """sha256 of the parts' texts, joined by a unit separator (which no part may contain)."""
    joined = "\x1f".join(map(str, parts))
    if joined.count("\x1f") > max(0, len(parts) - 1):
        raise ValueError("a named part contains the unit separator")
    return hashlib.sha256(joined.encode()).digest()


def seed_of(*parts: object) -> int:
    """A 63-bit seed from named parts."""
    return int.from_bytes(digest(*parts)[:8], "big") >> 1


def ordered(items: Sequence[Item], *parts: object) -> list[Item]:
    """The items in an order drawn from named parts and the items' texts alone, not from their input order."""
    return sorted(items, key=lambda item: (digest(*parts, item), str(item)))


def shuffled_indices(n: int, *parts: object) -> list[int]:
    """A permutation of range(n) drawn from named parts."""
    return sorted(range(n), key=lambda index: digest(*parts, index))
