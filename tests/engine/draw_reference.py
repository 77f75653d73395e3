"""The nucleus by its definition, in fp64 on sorted probabilities: what a draw is held against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

#: How far from a border the CDF of a draw in fp32 may lie.
ROUNDING = 2e-6


@dataclass(frozen=True)
class Nucleus:
    """Tokens of a row, the likeliest first and equal ones in their order, and the sums of probabilities before each.

    `margin` is how far from top_p the sum before or after the last of them is: if it is small, rounding decides.
    """

    tokens: list[int]
    before: list[float]
    mass: float
    margin: float

    def middle(self, place: int) -> float:
        """The number in [0, 1) that lies in the middle of a token's part of the CDF."""
        after = self.before[place + 1] if place + 1 < len(self.before) else self.mass
        return (self.before[place] + after) / 2 / self.mass

    def takes(self, token: int, uniform: float) -> bool:
        """Whether a draw of this token is right, or wrong by no more than rounding."""
        if token not in self.tokens:
            return False
        place = self.tokens.index(token)
        after = self.before[place + 1] if place + 1 < len(self.before) else self.mass
        return self.before[place] - ROUNDING <= uniform * self.mass <= after + ROUNDING


def nucleus(logits: torch.Tensor, temperature: float, top_p: float) -> Nucleus:
    """Of one row of logits [vocab]."""
    scaled = ((logits.double() - logits.double().max()) / temperature).tolist()
    total = math.fsum(math.exp(one) for one in scaled)
    tokens, before, mass = [], [], 0.0
    for token in sorted(range(len(scaled)), key=lambda one: (-scaled[one], one)):
        if mass >= top_p:
            break
        tokens.append(token)
        before.append(mass)
        mass += math.exp(scaled[token]) / total
    return Nucleus(tokens, before, mass, min(abs(mass - top_p), top_p - before[-1]))
