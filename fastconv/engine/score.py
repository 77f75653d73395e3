"""Multiple choice by letter log-probabilities: packed batches, logits at the last position only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastconv.engine.base import Base, length_batches, pack


@dataclass(frozen=True, slots=True)
class LetterItem:
    """One question as tokens: the prompt up to where the letter would come, and each label's token there."""

    prompt: tuple[int, ...]
    letters: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LetterScore:
    """Log-probabilities (nats, over the whole vocabulary) of a question's own labels, in their order."""

    logprobs: tuple[float, ...]

    @property
    def predicted(self) -> int:
        """Index of the most likely label; the first one on an exact tie."""
        return max(range(len(self.logprobs)), key=lambda i: (self.logprobs[i], -i))

    @property
    def mass(self) -> float:
        """Probability that the next token is one of the labels at all."""
        return float(torch.tensor(self.logprobs, dtype=torch.float64).exp().sum())

    @property
    def margin(self) -> float:
        """Best minus second best log-probability (nats)."""
        first, second = sorted(self.logprobs, reverse=True)[:2]
        return first - second


@torch.no_grad()
def score_letters(base: Base, items: Sequence[LetterItem], batch_tok: int) -> list[LetterScore]:
    """Score every item under whatever stack is live, in the items' order.

    Batches are sorted by length and bounded by `batch_tok` tokens; rows do not see each other.
    """
    scores: list[LetterScore | None] = [None] * len(items)
    for batch in length_batches([len(item.prompt) for item in items], batch_tok):
        ids, positions, layout = pack([list(items[i].prompt) for i in batch], base.device)
        hidden = base.hidden(ids, positions, layout)
        last = torch.tensor([stop - 1 for stop in layout.starts[1:]], device=base.device)
        logprobs = torch.log_softmax(base.logits(hidden[last]), dim=-1).cpu()
        for place, i in enumerate(batch):
            scores[i] = LetterScore(tuple(logprobs[place, list(items[i].letters)].tolist()))
    return [score for score in scores if score is not None]
