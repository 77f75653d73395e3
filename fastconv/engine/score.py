"""Multiple choice by log-probabilities: the letters after a prompt, or the choices' whole texts.

Packed batches, logits only where a score needs them; rows do not see each other, and what rows begin with alike is
computed once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastconv.chat import ChatTokenizer
from fastconv.engine.attention import Layout, PrefixGroup, PrefixTrees
from fastconv.engine.model import Base, length_batches, pack
from fastconv.engine.transfer import to_device

#: Rows of the head held in fp32 at once; 16,384 x 3,584 are 0.23 GB.
_HEAD_ROWS = 16384


@torch.no_grad()
def hidden_fp32(base: Base, ids: torch.Tensor, positions: torch.Tensor, layout: Layout) -> torch.Tensor:
    """As `Base.hidden`, every product in fp32: hidden states [T, hidden] fp32."""
    with _widening(base):
        return base.hidden(ids, positions, layout)


@torch.no_grad()
def logprobs_fp32(base: Base, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [n, vocab] fp32 of hidden states [n, hidden] fp32; the head is widened a piece at a time."""
    pieces = [F.linear(hidden, piece.float()) for piece in base.head.weight.split(_HEAD_ROWS)]
    return torch.log_softmax(torch.cat(pieces, dim=-1), dim=-1)


@contextlib.contextmanager
def _widening(base: Base) -> Iterator[None]:
    """Inside, each layer is fp32 while it runs. Widening is exact, so narrowing again gives the same bits."""
    embedding = base.model.get_input_embeddings()
    layers: list[nn.Module] = []
    for child in base.backbone.children():
        layers += list(child) if isinstance(child, nn.ModuleList) else [child]
    layers = [layer for layer in layers if layer is not embedding and any(True for _ in layer.parameters())]

    def widen(layer: nn.Module, *_: Any) -> None:
        layer.to(torch.float32)

    def narrow(layer: nn.Module, *_: Any) -> None:
        layer.to(base.dtype)

    hooks = [embedding.register_forward_hook(lambda layer, inputs, output: output.float())]
    for layer in layers:
        hooks += [layer.register_forward_pre_hook(widen), layer.register_forward_hook(narrow)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            narrow(layer)


#: Best and second best letter closer than this (nats) may change places in bf16; such items are scored again in fp32.
NEAR_TIE_NATS = 0.05


@dataclass(frozen=True, slots=True)
class LetterItem:
    """One question as tokens: the prompt up to where the letter would come, and each label's token there."""

    prompt: tuple[int, ...]
    letters: tuple[int, ...]


def letter_item(tokenizer: ChatTokenizer, prompt: str, labels: Sequence[str]) -> LetterItem:
    """A rendered prompt and its labels as tokens. Raises TemplateError if a label is not one token there."""
    ids, letters = tokenizer.letter_ids(prompt, labels)
    return LetterItem(tuple(ids), tuple(letters))


@dataclass(frozen=True, slots=True)
class LetterScore:
    """Log-probabilities (nats, over the whole vocabulary) of a question's own labels, in their order.

    `rescored` says that they come from a second pass in fp32, because the first was a near tie.
    """

    logprobs: tuple[float, ...]
    rescored: bool = False

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


@dataclass(frozen=True, slots=True)
class TextItem:
    """One question as tokens: what all choices share, then for each choice the tokens that are its own.

    `scored_from[i]` is where the scored part of choice i begins; above 0 only where the context's last token merges
    differently with different choices. `n_chars[i]` is the choice's length in characters.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    scored_from: tuple[int, ...]
    n_chars: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TextScore:
    """Summed log-probability (nats) of each choice's tokens, and the choices' lengths in characters."""

    logprobs: tuple[float, ...]
    n_chars: tuple[int, ...]

    @property
    def predicted(self) -> int:
        """Index of the choice with the largest sum (lm-eval's `acc`)."""
        return max(range(len(self.logprobs)), key=lambda i: (self.logprobs[i], -i))

    @property
    def predicted_by_length(self) -> int:
        """Index of the choice with the largest sum per character (lm-eval's `acc_norm`)."""
        share = [value / length for value, length in zip(self.logprobs, self.n_chars, strict=True)]
        return max(range(len(share)), key=lambda i: (share[i], -i))


@torch.no_grad()
def score_letters(base: Base, items: Sequence[LetterItem], batch_tok: int) -> list[LetterScore]:
    """Score every item under whatever stack is live, in the items' order.

    Batches are sorted by length and bounded by `batch_tok` tokens. On a base that is not fp32, near ties (under
    `NEAR_TIE_NATS`) are scored again in fp32, layer by layer.
    """
    scores = _letters(base, items, batch_tok, precise=False)
    if base.dtype == torch.float32:
        return scores
    near = [i for i, score in enumerate(scores) if len(score.logprobs) > 1 and score.margin < NEAR_TIE_NATS]
    again = _letters(base, [items[i] for i in near], batch_tok, precise=True)
    for i, score in zip(near, again, strict=True):
        scores[i] = score
    return scores


def _letters(base: Base, items: Sequence[LetterItem], batch_tok: int, *, precise: bool) -> list[LetterScore]:
    scores: dict[int, LetterScore] = {}
    for batch in length_batches([len(item.prompt) for item in items], batch_tok):
        order, tokens, positions, layout, take = pack_prompts(base, {i: items[i].prompt for i in batch})
        if precise:
            logprobs = logprobs_fp32(base, hidden_fp32(base, tokens, positions, layout)[take])
        else:
            logprobs = torch.log_softmax(base.logits(base.hidden(tokens, positions, layout)[take]), dim=-1)
        most = max(len(items[i].letters) for i in order)
        letters = [[*items[i].letters, *[0] * (most - len(items[i].letters))] for i in order]
        chosen = logprobs.gather(-1, to_device(torch.tensor(letters), base.device)).tolist()
        for i, row in zip(order, chosen, strict=True):
            scores[i] = LetterScore(tuple(row[: len(items[i].letters)]), precise)
    return [scores[i] for i in range(len(items))]


def pack_prompts(
    base: Base, prompts: Mapping[int, tuple[int, ...]]
) -> tuple[list[int], torch.Tensor, torch.Tensor, Layout, torch.Tensor]:
    """(order, ids [T], positions [T], layout, place of each prompt's last token [n]) of one batch.

    A GPU takes the rows whole: one attention call saves more there than the shared beginnings cost.
    """
    if base.device.type == "cuda":
        order = list(prompts)
        ids, positions, layout = pack([list(prompts[i]) for i in order], base)
        return order, ids, positions, layout, to_device(torch.tensor(layout.starts[1:]) - 1, base.device)
    order, groups, tokens = shared_prefixes(prompts)
    layout, positions = PrefixTrees.of(groups, base.device)
    last, place = [], 0
    for group in groups:
        place += group.prefix_tok
        for n_tok in group.branches_tok:
            place += n_tok
            last.append(place - 1)
    return order, torch.tensor(tokens), positions, layout, torch.tensor(last)


def shared_prefixes(prompts: Mapping[int, tuple[int, ...]]) -> tuple[list[int], list[PrefixGroup], list[int]]:
    """Lay prompts out so that those that begin alike compute their beginning once: (order, groups, token ids).

    Neighbours in lexicographic order join a group while that saves no fewer tokens than it had saved: chat prompts of
    one persona share its system turn. Every prompt keeps at least its last token to itself.
    """
    order = sorted(prompts, key=lambda i: (prompts[i], i))
    members: list[list[int]] = []
    shared = 0  # tokens that the last group has in common
    for i in order:
        if members:
            common = min(_common(prompts[members[-1][0]], prompts[i]), shared, len(prompts[i]) - 1)
            if common and len(members[-1]) * common >= (len(members[-1]) - 1) * shared:
                members[-1].append(i)
                shared = common
                continue
        members.append([i])
        shared = len(prompts[i]) - 1
    groups, ids = [], []
    for group in members:
        first, last = prompts[group[0]], prompts[group[-1]]
        # In lexicographic order the first and the last of a group share what all of them share.
        prefix = min(_common(first, last), *(len(prompts[i]) - 1 for i in group)) if len(group) > 1 else 0
        groups.append(PrefixGroup(prefix, tuple(len(prompts[i]) - prefix for i in group)))
        ids += first[:prefix]
        for i in group:
            ids += prompts[i][prefix:]
    return order, groups, ids


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that two prompts have in common at their beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def text_item(tokenizer: ChatTokenizer, context: str, choices: Sequence[str], delimiter: str = " ") -> TextItem:
    """A question as lm-eval's `multiple_choice` tasks encode it: context, then `delimiter` + choice for each.

    Spaces at the context's end belong to the choice; a choice's tokens are those of the whole text beyond the
    context's own number of tokens (lm-eval's `_encode_pair`). `context` may not be empty.
    """
    stripped = context.rstrip()
    n_context = len(tokenizer.encode(stripped))
    wholes = [tokenizer.encode(context + delimiter + choice) for choice in choices]
    shared = min(n_context, *(len(whole) - 1 for whole in wholes))
    while any(whole[:shared] != wholes[0][:shared] for whole in wholes):
        shared -= 1
    return TextItem(
        prompt=tuple(wholes[0][:shared]),
        choices=tuple(tuple(whole[shared:]) for whole in wholes),
        scored_from=(n_context - shared,) * len(wholes),
        n_chars=tuple(len(choice) for choice in choices),
    )


@torch.no_grad()
def score_texts(base: Base, items: Sequence[TextItem], batch_tok: int) -> list[TextScore]:
    """Score every choice of every item under whatever stack is live, in the items' order.

    A question's prompt is computed once for all its choices (`PrefixTrees`); a choice's last token is never an input.
    """
    sizes = [len(item.prompt) + sum(len(choice) - 1 for choice in item.choices) for item in items]
    scores: dict[int, TextScore] = {}
    for batch in length_batches(sizes, batch_tok):
        for i, score in zip(batch, _texts(base, [items[i] for i in batch]), strict=True):
            scores[i] = score
    return [scores[i] for i in range(len(items))]


def _texts(base: Base, items: Sequence[TextItem]) -> list[TextScore]:
    groups = [PrefixGroup(len(item.prompt), tuple(len(choice) - 1 for choice in item.choices)) for item in items]
    layout, positions = PrefixTrees.of(groups, base.device)
    ids: list[int] = []
    take, targets, owners, place = [], [], [], 0  # place counts choices over the whole batch
    for item in items:
        last_of_prompt = len(ids) + len(item.prompt) - 1
        ids += item.prompt
        for choice, begin in zip(item.choices, item.scored_from, strict=True):
            before = [last_of_prompt, *range(len(ids), len(ids) + len(choice) - 1)]
            ids += choice[:-1]
            take += before[begin:]
            targets += choice[begin:]
            owners += [place] * (len(choice) - begin)
            place += 1
    hidden = base.hidden(torch.tensor(ids, device=base.device), positions, layout)[
        torch.tensor(take, device=base.device)
    ]
    chosen = _chosen_logprobs(base, hidden, torch.tensor(targets, device=base.device)).cpu().double()
    sums = torch.zeros(place, dtype=torch.float64).index_add_(0, torch.tensor(owners), chosen).tolist()
    scores = []
    for item in items:
        mine, sums = sums[: len(item.choices)], sums[len(item.choices) :]
        scores.append(TextScore(tuple(mine), item.n_chars))
    return scores


def _chosen_logprobs(base: Base, hidden: torch.Tensor, targets: torch.Tensor, chunk_rows: int = 512) -> torch.Tensor:
    """Log-probability [n] fp32 of each target, never holding more than `chunk_rows` rows of logits."""
    parts = []
    for rows, wanted in zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True):
        logprobs = torch.log_softmax(base.logits(rows), dim=-1)
        parts.append(logprobs.gather(-1, wanted[:, None])[:, 0])
    return torch.cat(parts)
