"""Multiple choice by log-probabilities: of the letters after a prompt, or of the choices' whole texts.

Batches are packed, logits are computed only where a score needs them, and common prefixes are computed once. Near ties
of letters are scored again with every product in fp32 (`hidden_fp32`, `logprobs_fp32`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from fastconv.chat import ChatTokenizer
from fastconv.engine.attention import Layout, PrefixGroup, PrefixTrees, to_device
from fastconv.engine.model import Base, length_batches
from fastconv.engine.prompts import pack_prompts
from fastconv.errors import TrainingError

#: Rows of the head that are converted to fp32 at once; 16,384 x 3,584 are 0.23 GB.
_HEAD_ROWS = 16384
#: Items whose two best letters are closer than this (nats) are scored again in fp32: bf16 rounding may swap them.
NEAR_TIE_NATS = 0.05


#: What torch says in a RuntimeError where the machine's or the device's memory ran out.
_MEMORY_WORDS = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
T = TypeVar("T")
R = TypeVar("R")


def in_halves(
    base: Base, batch: Sequence[T], compute: Callable[[Sequence[T]], R], on_halved: Callable[[], None]
) -> Iterator[tuple[Sequence[T], R]]:
    """(part of the batch, what `compute` gives for it) in order: the whole batch, or halves of it where memory ran out.

    What the base keeps for speed alone is freed first. `on_halved` is called for each halving. Raises TrainingError if a
    single row does not fit.
    """
    parts = [batch]
    while parts:
        part = parts.pop(0)
        result = with_memory(lambda part=part: compute(part))
        if result is not None:
            yield part, result
            continue
        if base.drop_kept():
            parts.insert(0, part)
            continue
        if len(part) < 2:
            raise no_memory()
        on_halved()
        parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]


def with_memory(compute: Callable[[], R]) -> R | None:
    """What `compute` returns, or None if memory ran out in it: leaving this frame frees the traceback and its tensors."""
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an error says that a device's memory, or the machine's own, ran out; also in the capture of a graph."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or isinstance(error.__context__, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _MEMORY_WORDS)


@contextlib.contextmanager
def memory_errors(where: str) -> Iterator[None]:
    """A block in which running out of memory becomes a TrainingError of one line; `where` is the stage or the file."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            "no memory is left on the device", where=where, fix="free it, or use a smaller model or 4-bit weights"
        ) from None


def free_memory() -> None:
    """Give back what the allocator keeps for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def no_memory() -> TrainingError:
    """The error where not even one row fits."""
    return TrainingError(
        "one row alone does not fit in memory", where="memory", fix="free the device, or ask for shorter rows"
    )


def ignore_halving() -> None:
    """For callers that do not count halvings."""


@dataclass(frozen=True, slots=True)
class LetterItem:
    """A question as tokens: the prompt up to the position of the letter, and each label's token at that position."""

    prompt: tuple[int, ...]
    letters: tuple[int, ...]


def letter_item(tokenizer: ChatTokenizer, prompt: str, labels: Sequence[str], quoted: Sequence[str] = ()) -> LetterItem:
    """The item of a rendered prompt and its labels. `quoted` are parts of it in which a control token is text.

    Raises TemplateError if a label is not one token there.
    """
    ids, letters = tokenizer.letter_ids(prompt, labels, quoted)
    return LetterItem(tuple(ids), tuple(letters))


@dataclass(frozen=True, slots=True)
class LetterScore:
    """Log-probabilities (nats, over the whole vocabulary) of a question's labels, in their order.

    `rescored` says that they come from a second pass in fp32, because the first one was a near tie.
    """

    logprobs: tuple[float, ...]
    rescored: bool = False

    @property
    def predicted(self) -> int:
        """Index of the most likely label; the first one on an exact tie."""
        return max(range(len(self.logprobs)), key=lambda i: (self.logprobs[i], -i))

    @property
    def mass(self) -> float:
        """Probability that the next token is one of the labels."""
        return float(torch.tensor(self.logprobs, dtype=torch.float64).exp().sum())

    @property
    def margin(self) -> float:
        """Best minus second best log-probability (nats)."""
        first, second = sorted(self.logprobs, reverse=True)[:2]
        return first - second


@dataclass(frozen=True, slots=True)
class TextItem:
    """A question as tokens: the prefix that all choices share, and for each choice the tokens after it.

    `scored_from[i]` is the index of the first scored token of choice i; above 0 only where the context's last token is
    merged differently with different choices. `n_chars[i]` is the choice's length in characters.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    scored_from: tuple[int, ...]
    n_chars: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TextScore:
    """Sum of the log-probabilities (nats) of each choice's tokens, and the choices' lengths in characters."""

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
def score_letters(
    base: Base, items: Sequence[LetterItem], batch_tok: int, on_halved: Callable[[], None] = ignore_halving
) -> list[LetterScore]:
    """Score every item under the live stack, in the items' order.

    Batches have at most `batch_tok` tokens; one that does not fit in memory is halved, and `on_halved` called. On a base
    that is not fp32, near ties (a margin under `NEAR_TIE_NATS`) are scored again in fp32, layer by layer.
    """
    scores = _letters(base, items, batch_tok, on_halved, precise=False)
    if base.dtype == torch.float32:
        return scores
    near = [i for i, score in enumerate(scores) if len(score.logprobs) > 1 and score.margin < NEAR_TIE_NATS]
    rescored = _letters(base, [items[i] for i in near], batch_tok, on_halved, precise=True)
    for i, score in zip(near, rescored, strict=True):
        scores[i] = score
    return scores


def _letters(
    base: Base, items: Sequence[LetterItem], batch_tok: int, on_halved: Callable[[], None], *, precise: bool
) -> list[LetterScore]:
    def compute(batch: Sequence[int]) -> tuple[list[int], list[list[float]]]:
        packed = pack_prompts(base, {i: items[i].prompt for i in batch})
        order = list(packed.pieces)
        take = packed.last(order)
        if precise:
            logprobs = logprobs_fp32(base, hidden_fp32(base, packed.ids, packed.positions, packed.layout)[take])
        else:
            hidden = base.hidden(packed.ids, packed.positions, packed.layout)[take]
            logprobs = torch.log_softmax(base.logits(hidden), dim=-1)
        n_letters = max(len(items[i].letters) for i in order)
        letters = [[*items[i].letters, *[0] * (n_letters - len(items[i].letters))] for i in order]
        return order, logprobs.gather(-1, to_device(torch.tensor(letters), base.device)).tolist()

    scores: dict[int, LetterScore] = {}
    for batch in length_batches([len(item.prompt) for item in items], batch_tok):
        for _, (order, chosen) in in_halves(base, batch, compute, on_halved):
            for i, row in zip(order, chosen, strict=True):
                scores[i] = LetterScore(tuple(row[: len(items[i].letters)]), precise)
    return [scores[i] for i in range(len(items))]


def text_item(tokenizer: ChatTokenizer, context: str, choices: Sequence[str], delimiter: str = " ") -> TextItem:
    """A question encoded as in lm-eval's `multiple_choice` tasks: context, then `delimiter` + choice for each choice.

    Spaces at the context's end belong to the choice; a choice's tokens are those of the whole text after as many tokens
    as the context alone has (lm-eval's `_encode_pair`). The text begins as the model's tokenizer begins a text (a BOS).
    `context` must not be empty.
    """
    stripped = context.rstrip()
    n_context = len(tokenizer.encode_raw(stripped))
    texts = [tokenizer.encode_raw(context + delimiter + choice) for choice in choices]
    shared = min(n_context, *(len(ids) - 1 for ids in texts))
    while any(ids[:shared] != texts[0][:shared] for ids in texts):
        shared -= 1
    return TextItem(
        prompt=tuple(texts[0][:shared]),
        choices=tuple(tuple(ids[shared:]) for ids in texts),
        scored_from=(n_context - shared,) * len(texts),
        n_chars=tuple(len(choice) for choice in choices),
    )


@torch.no_grad()
def score_texts(
    base: Base, items: Sequence[TextItem], batch_tok: int, on_halved: Callable[[], None] = ignore_halving
) -> list[TextScore]:
    """Score every choice of every item under the live stack, in the items' order.

    A question's prompt is computed once for all choices (`PrefixTrees`); a choice's last token is never an input. A batch
    that does not fit in memory is halved, and `on_halved` called.
    """
    sizes = [len(item.prompt) + sum(len(choice) - 1 for choice in item.choices) for item in items]
    scores: dict[int, TextScore] = {}
    for batch in length_batches(sizes, batch_tok):
        for part, found in in_halves(base, batch, lambda part: _texts(base, [items[i] for i in part]), on_halved):
            scores.update(zip(part, found, strict=True))
    return [scores[i] for i in range(len(items))]


def _texts(base: Base, items: Sequence[TextItem]) -> list[TextScore]:
    groups = [PrefixGroup(len(item.prompt), tuple(len(choice) - 1 for choice in item.choices)) for item in items]
    base.require_length(max((g.prefix_tok + n for g in groups for n in g.branches_tok), default=0))
    layout, positions = PrefixTrees.of(groups, base.device)
    ids: list[int] = []
    take, targets, owners, choice_index = [], [], [], 0  # counted over the whole batch
    for item in items:
        last_of_prompt = len(ids) + len(item.prompt) - 1
        ids += item.prompt
        for choice, begin in zip(item.choices, item.scored_from, strict=True):
            before = [last_of_prompt, *range(len(ids), len(ids) + len(choice) - 1)]
            ids += choice[:-1]
            take += before[begin:]
            targets += choice[begin:]
            owners += [choice_index] * (len(choice) - begin)
            choice_index += 1
    hidden = base.hidden(torch.tensor(ids, device=base.device), positions, layout)[
        torch.tensor(take, device=base.device)
    ]
    chosen = _chosen_logprobs(base, hidden, torch.tensor(targets, device=base.device)).cpu().double()
    sums = torch.zeros(choice_index, dtype=torch.float64).index_add_(0, torch.tensor(owners), chosen).tolist()
    scores = []
    for item in items:
        item_sums, sums = sums[: len(item.choices)], sums[len(item.choices) :]
        scores.append(TextScore(tuple(item_sums), item.n_chars))
    return scores


def _chosen_logprobs(base: Base, hidden: torch.Tensor, targets: torch.Tensor, chunk_rows: int = 512) -> torch.Tensor:
    """Log-probability [n] fp32 of each target [n] after hidden states [n, hidden], at most `chunk_rows` rows at a
    time."""
    parts = []
    for rows, chunk_targets in zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True):
        logprobs = torch.log_softmax(base.logits(rows), dim=-1)
        parts.append(logprobs.gather(-1, chunk_targets[:, None])[:, 0])
    return torch.cat(parts)


@torch.no_grad()
def hidden_fp32(base: Base, ids: torch.Tensor, positions: torch.Tensor, layout: Layout) -> torch.Tensor:
    """`Base.hidden` with every product in fp32: hidden states [T, hidden] fp32."""
    with _layers_in_fp32(base):
        return base.hidden(ids, positions, layout)


@torch.no_grad()
def logprobs_fp32(base: Base, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [n, vocab] fp32 of hidden states [n, hidden] fp32; the head is converted piece by piece."""
    return torch.log_softmax(base.readout.logits_fp32(hidden, _HEAD_ROWS), dim=-1)


@contextlib.contextmanager
def _layers_in_fp32(base: Base) -> Iterator[None]:
    """Within the block each layer is fp32 while it runs. Afterwards its tensors are the old ones at their old addresses,
    which captured graphs read."""
    embedding = base.model.get_input_embeddings()
    layers: list[nn.Module] = []
    for child in base.backbone.children():
        layers += list(child) if isinstance(child, nn.ModuleList) else [child]
    layers = [layer for layer in layers if layer is not embedding and any(True for _ in layer.parameters())]

    narrow_data: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def widen(layer: nn.Module, *_: Any) -> None:
        held = narrow_data.setdefault(layer, [])
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.dtype == base.dtype:
                wide = tensor.data.float()
                held.append((tensor, tensor.data))
                tensor.data = wide

    def narrow(layer: nn.Module, *_: Any) -> None:
        for tensor, data in narrow_data.pop(layer, []):
            tensor.data = data

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
