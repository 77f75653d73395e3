"""Decoding on the resident base: the key-value cache, one pass over its rows, and the draw of their next tokens.

On a GPU (`DeviceDecoder`) a pass is a CUDA graph, what it needs of the one before stays on the device, and the host
reads tokens one pass late.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fastconv.engine.attention import NO_LIMITS, Layout, Limits, masked_attention, to_device
from fastconv.engine.cuda_graph import CudaDevice, Device
from fastconv.engine.lora import shared_route
from fastconv.engine.model import Base
from fastconv.recipe import SamplingSettings

#: A nucleus of up to this many tokens is found without sorting the vocabulary.
_TOP_K = 512
#: Graphs are captured for these numbers of rows; a pass runs on the smallest that holds its rows. A capture takes as long as
#: some 20 passes (0.2 s on an H100), and below 256 rows a pass takes as long with fewer.
_GRAPH_ROWS = (8, 32, 128, 256, 384, 512, 640, 768, 1024, 1280, 1536)
#: Slots where memory does not hold those of the next larger graph: in finer steps, for rows that wait take whole waves. Such
#: a decoder has a graph for all of its slots beside those for fewer.
_SHORT_SLOTS = tuple(sorted({*_GRAPH_ROWS, 16, 48, 64, 96, 192}))


def slots_for(n_rows: int, n_fit: int) -> int:
    """Slots for decoding `n_rows` at once where `n_fit` of them fit in memory: as many as the next larger graph has.

    Where they fit, this follows from the rows alone, and so does every pass over them; where they do not, the fewest of
    `_SHORT_SLOTS` that hold the rows, or the most that fit.
    """
    wanted = next((size for size in _GRAPH_ROWS if size >= n_rows), n_rows)
    if wanted <= n_fit:
        return wanted
    short = [size for size in _SHORT_SLOTS if size <= n_fit] or [n_fit]
    return next((size for size in short if size >= n_rows), short[-1])


@dataclass
class SampledRow:
    """A prompt being completed: `place` in the caller's order, random numbers in [0, 1), tokens sampled so far.

    A caller that watches may set `dropped`: the row then leaves before its next token.
    """

    place: int
    prompt: Sequence[int]
    uniforms: torch.Tensor
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    dropped: bool = False

    @property
    def active(self) -> bool:
        """Whether another token is to be sampled. There is one random number for each that may be."""
        return not self.ended and not self.dropped and len(self.tokens) < len(self.uniforms)

    @property
    def length(self) -> int:
        """Tokens in the cache before the next pass; the last sampled token is not in it yet."""
        return len(self.prompt) + len(self.tokens) - 1


#: Rows by slot; None where a slot is free.
Slots = list[SampledRow | None]


class Cache:
    """Key-value cache for sampling: `keys` and `values`, one tensor [slots, kv heads, length, d] per layer.

    Unfinished rows occupy the first slots, so that a decoding pass works on views and never copies the cache.
    A layer's tensors are made by the first prompts that it sees, in the shapes and the dtype that the layer itself has:
    families differ in them, and some from layer to layer.
    """

    def __init__(self, n_slots: int, max_length_tok: int) -> None:
        self.n_slots, self.max_length_tok = n_slots, max_length_tok
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        #: Whether some layer's attention was computed over its whole length: what rows then get depends on that length.
        self.read_whole = False

    @property
    def n_tok(self) -> int:
        """Tokens that it has room for."""
        return self.n_slots * self.max_length_tok

    def reserve(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Make room for a layer with these keys and values [kv heads, T, d], unless there is."""
        for held, part in ((self.keys, key), (self.values, value)):
            if layer not in held:
                held[layer] = part.new_zeros(self.n_slots, part.shape[0], self.max_length_tok, part.shape[2])

    def move(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        """Copy the first `length` positions of each slot in `source` [n] int64 to the slot in `target` at the same place; no
        slot is in both. All rows at once: a launch for each row and layer took the host longer than the passes between."""
        for layers in (self.keys, self.values):
            for layer in layers.values():
                kept = layer[:, :, :length]
                kept[target] = kept[source]


@dataclass(frozen=True)
class Prefill:
    """The pass over the prompts: attention within rows that also fills the cache.

    Token `tokens[i]` of the pass goes to position `positions[i]` of slot `slots[i]` (int64 [n] each, on the device). A
    prompt that several slots share is computed once.
    """

    rows: Layout
    cache: Cache
    tokens: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        limits: Limits = NO_LIMITS,
    ) -> torch.Tensor:
        """Write keys and values to the cache, then attend as `rows` does."""
        self.cache.reserve(layer, key, value)
        self.cache.keys[layer][self.slots, :, self.positions] = key.transpose(0, 1)[self.tokens]
        self.cache.values[layer][self.slots, :, self.positions] = value.transpose(0, 1)[self.tokens]
        return self.rows.attend(layer, query, key, value, scale, limits)


@dataclass(frozen=True)
class Decode:
    """A decoding step: one new token for each of the first n slots, slot i at position lengths[i] (int64 [n], device).

    `longest` is the largest length; only the CPU path reads it.
    """

    cache: Cache
    lengths: torch.Tensor
    longest: int

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        limits: Limits = NO_LIMITS,
    ) -> torch.Tensor:
        """Write the new keys and values to the cache, then attend to all tokens of the row so far."""
        n_heads, n_rows, head_dim = query.shape
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        plain = keys.shape == values.shape and not limits.softcap and not limits.hides(keys.shape[2])
        if keys.is_cuda and plain:
            from fastconv.engine.kernels.elementwise import decode_attention

            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
            return decode_attention(query, key, value, keys, values, self.lengths, scale)
        self.cache.read_whole |= not plain
        rows = torch.arange(n_rows, device=keys.device)
        keys[rows, :, self.lengths] = key.transpose(0, 1)
        values[rows, :, self.lengths] = value.transpose(0, 1)
        # The query heads of one kv head become query positions: grouped-query attention without copying the cache.
        grouped = query.transpose(0, 1).reshape(n_rows, keys.shape[1], n_heads // keys.shape[1], head_dim)
        n_keys = keys.shape[2] if keys.is_cuda else self.longest + 1  # a captured step reads the whole cache
        at = torch.arange(n_keys, device=keys.device)
        mask = at <= self.lengths[:, None]
        if limits.window:
            mask &= at > self.lengths[:, None] - limits.window
        keys, values = keys[:n_rows, :, :n_keys], values[:n_rows, :, :n_keys]
        out = masked_attention(grouped, keys, values, scale, softcap=limits.softcap, mask=mask[:, None, None])
        return out.reshape(n_rows, n_heads, values.shape[-1])


class Decoder:
    """Decodes the rows of one cache under the live stack. The host waits for every pass (`lag` 0)."""

    lag = 0

    def __init__(self, base: Base, cache: Cache, settings: SamplingSettings) -> None:
        self.cache = cache
        #: Slots that its rows take; a cache that was kept may have more.
        self.n_slots = cache.n_slots
        self._base = base
        self.settings = settings

    def size(self, n: int) -> int:
        """Rows that a pass over `n` slots computes."""
        return n

    def place(self, slots: Sequence[int], rows: Sequence[SampledRow]) -> None:
        """Take over rows whose prompts are in these slots of the cache and whose first token is sampled."""

    def launch(self, slots: Sequence[SampledRow | None]) -> Callable[[], list[int]]:
        """Begin a pass over these slots; the result waits for its tokens, of which those of free slots mean nothing."""
        rows = [row for row in slots if row is not None]
        at = torch.tensor([row.length for row in rows])
        last = torch.tensor([row.tokens[-1] for row in rows])
        uniforms = torch.stack([row.uniforms[len(row.tokens)] for row in rows])
        hidden = self._base.hidden(last, at, Decode(self.cache, at, int(at.max())))
        tokens = sample_tokens(self._base.logits(hidden), uniforms, self.settings).tolist()
        return lambda: tokens

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Move rows of at most `length` tokens to other slots."""
        source, target = (to_device(torch.tensor(slots), self._base.device) for slots in (sources, targets))
        self._move(source, target, length)

    def _move(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        self.cache.move(source, target, length)


class DeviceDecoder(Decoder):
    """Decodes with all state on the device: a pass reads and writes `_state` [5, slots] int64 (last token, tokens in
    the cache, tokens sampled, most tokens, 1 while the row goes on), so that the next can be launched before the host
    has read it.

    A pass is launched directly the first time, then as a graph. Where the stacked kernel computes every adapted layer, a
    graph serves every stack and the decoder may be kept for the next one; else it is for the live stack alone.
    """

    lag = 1

    def __init__(self, base: Base, cache: Cache, settings: SamplingSettings, device: Device | None = None) -> None:
        super().__init__(base, cache, settings)
        self.passed_over = 0
        self.route = shared_route(base.model, base.dtype)
        self._device = device or CudaDevice()
        self._graphs: dict[Hashable, tuple[Callable[[], None], Any] | None] = {}
        self._loaded: set[Hashable] = set()
        self._state = torch.zeros(5, cache.n_slots, dtype=torch.int64, device=base.device)
        self._uniforms = torch.zeros(cache.n_slots, cache.max_length_tok, device=base.device)
        self._stops = to_device(torch.tensor(base.tokenizer.stop_ids, dtype=torch.int64), base.device)

    def __len__(self) -> int:
        return 1

    def serves(self, n_slots: int, max_length_tok: int, settings: SamplingSettings) -> bool:
        """Whether it can make the passes of a new one of so many slots and tokens; begins anew as that one if so, under
        what is live now."""
        cache = self.cache
        longer = cache.max_length_tok > max_length_tok and not cache.read_whole
        fits = cache.n_slots >= n_slots and (longer or cache.max_length_tok == max_length_tok)
        drawn_alike = (settings.temperature, settings.top_p) == (self.settings.temperature, self.settings.top_p)
        if not fits or not drawn_alike:
            return False
        self.n_slots = n_slots
        self._state.zero_()
        self._loaded.clear()
        return True

    def size(self, n: int) -> int:
        """The smallest size of a graph that holds `n` rows: one of `_GRAPH_ROWS`, or all slots."""
        return next((size for size in _GRAPH_ROWS if n <= size < self.n_slots), self.n_slots) if n else 0

    def place(self, slots: Sequence[int], rows: Sequence[SampledRow]) -> None:
        """Write the rows' state to the device; a row that is done already stays out."""
        state = [
            [row.tokens[-1], row.length, len(row.tokens), len(row.uniforms), 1] if row.active else [0] * 5
            for row in rows
        ]
        at = to_device(torch.tensor(slots), self._base.device)
        self._state[:, at] = to_device(torch.tensor(state).t().contiguous(), self._base.device)
        numbers = torch.nn.utils.rnn.pad_sequence([row.uniforms for row in rows], batch_first=True)
        self._uniforms[at, : numbers.shape[1]] = to_device(numbers, self._base.device)

    def launch(self, slots: Sequence[SampledRow | None]) -> Callable[[], list[int]]:
        """The pass as a graph of the next larger size, and the copy of its tokens to the host."""
        size = self.size(len(slots))
        with torch.no_grad():
            self._run(size)
        return _on_host(self._state[0, : len(slots)])

    def _move(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        """With the rows' state; a pass under way may have added a token to each."""
        super()._move(source, target, min(length + self.lag, self.cache.max_length_tok))
        self._state[:, target] = self._state[:, source]
        self._uniforms[target] = self._uniforms[source]
        self._state[:, source] = 0

    def _run(self, size: int) -> None:
        route = self.route if self.route is not None and self.route.slots else None
        kernel = None if route is None else route.kernel
        key = (size, None if kernel is None or route is None else kernel.structure(route, self._base.dtype))
        if key not in self._graphs:
            self._graphs[key] = None  # what is launched once has its kernels loaded, and can be captured
            self._step(size)
            return
        graph = self._graphs[key]
        if graph is None:
            tables = None
            if kernel is not None and route is not None:
                tables = kernel.own_tables(route, self._base.dtype, size)
            graph = self._graphs[key] = self._device.capture(partial(self._step, size)), tables
            if kernel is not None:
                kernel.release()
                self._loaded.clear()  # frozen adapters of one slot are joined anew, elsewhere
        replay, tables = graph
        if kernel is not None and route is not None and key not in self._loaded:
            kernel.load_tables(tables, route, self._base.dtype, size)
            self._loaded.add(key)
        replay()

    def _step(self, size: int) -> None:
        """The pass itself. A row that ends stays at position 0 of its slot until another takes it."""
        ids, at, n_sampled, most, active = (part[:size] for part in self._state)
        hidden = self._base.hidden(ids, at, Decode(self.cache, at, self.cache.max_length_tok - 1))
        uniforms = self._uniforms[:size].gather(1, n_sampled[:, None])[:, 0]
        tokens = sample_tokens(self._base.readout.logits(hidden), uniforms, self.settings)
        stopped = (tokens[:, None] == self._stops).any(1)
        active.mul_(~stopped & (n_sampled + 1 < most))
        ids.copy_(tokens)
        n_sampled.add_(active)
        at.add_(1).mul_(active)


def _on_host(tensor: torch.Tensor) -> Callable[[], list[int]]:
    """Start the copy of a tensor [n] to the host; the result waits for it."""
    if not tensor.is_cuda:
        values = tensor.tolist()
        return lambda: values
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    on_host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[int]:
        arrived.synchronize()
        return on_host.tolist()

    return read


def sample_tokens(logits: torch.Tensor, uniform: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Sample one token per row: temperature (0: the most likely token), then nucleus (Holtzman et al. 2020), then the
    inverse of the CDF.

    logits [n, vocab], uniform [n] in [0, 1) -> [n] int64. The nucleus is the smallest set of most likely tokens whose
    probability reaches top_p; the first token is always in it. Rows whose nucleus lies within the few most likely tokens,
    nearly all of them, never sort the vocabulary; which method a row takes depends on that row alone. On a GPU no row does,
    and the host does not wait.
    """
    if logits.is_cuda:
        return _sampled_on_device(logits, uniform, settings)
    probabilities = _probabilities(logits.float(), settings.temperature)
    ranked, tokens = torch.topk(probabilities, min(_TOP_K, probabilities.shape[-1]), dim=-1)
    chosen, is_wide = _from_ranked(ranked, tokens, uniform, settings.top_p), ranked.sum(-1) < settings.top_p
    wide = torch.nonzero(is_wide).flatten()
    if wide.numel():
        ranked, tokens = torch.sort(probabilities[wide], dim=-1, descending=True, stable=True)
        chosen[wide] = _from_ranked(ranked, tokens, uniform[wide], settings.top_p)
    return chosen


def _sampled_on_device(logits: torch.Tensor, uniform: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    from fastconv.engine.kernels.draw import draw

    if not settings.temperature:
        return logits.argmax(-1)
    return draw(logits, uniform, settings.temperature, settings.top_p)


def _probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities [n, vocab]; at temperature 0 all of it is on the first of the most likely tokens."""
    if temperature:
        return torch.softmax(logits / temperature, dim=-1)
    return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)


def _from_ranked(ranked: torch.Tensor, tokens: torch.Tensor, uniform: torch.Tensor, top_p: float) -> torch.Tensor:
    """The token at `uniform` of the nucleus' mass; ranked [n, k] descending probabilities of `tokens` [n, k]."""
    cumulative = ranked.cumsum(-1)
    outside = cumulative - ranked >= top_p
    size = (~outside).sum(-1, keepdim=True)
    total = cumulative.gather(-1, size - 1)
    cumulative = cumulative.masked_fill(outside, float("inf"))
    place = torch.searchsorted(cumulative, uniform[:, None] * total, right=True).clamp(max=size - 1)
    return tokens.gather(-1, place)[:, 0]
