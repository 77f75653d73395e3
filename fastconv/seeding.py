"""Seeds, orders and permutations derived by sha256 from named parts, so that any random choice can be recomputed.

There is no generator state: adding a row, a persona or a stage never changes what another one gets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def digest(*parts: object) -> bytes:
    """sha256 (32 bytes) of the parts' texts joined by the unit separator (0x1F).

    Raises ValueError if a part contains the separator.
    """
    joined = "\x1f".join(map(str, parts))
    if joined.count("\x1f") > max(0, len(parts) - 1):
        raise ValueError("a named part contains the unit separator")
    return hashlib.sha256(joined.encode()).digest()


def seed_of(*parts: object) -> int:
    """A seed in [0, 2**63) from named parts."""
    return int.from_bytes(digest(*parts)[:8], "big") >> 1


def seeded_order(items: Sequence[Item], *parts: object) -> list[Item]:
    """The items in a pseudo-random order that depends on the parts and the items' texts, not on their input order."""
    return sorted(items, key=lambda item: (digest(*parts, item), str(item)))


def seeded_permutation(n: int, *parts: object) -> list[int]:
    """A pseudo-random permutation of range(n) that depends on n and the parts alone."""
    return sorted(range(n), key=lambda index: digest(*parts, index))
