"""Sampling on the resident base model under the live stack: continuous batching, with one seed for each row.

`sample` fills the cache with prompts and decodes them; `Decoder` runs one decoding step, on a GPU as a CUDA graph;
`sample_tokens` draws from the logits. A row's random numbers come from its own seed before the first token, so that
neither its batch nor the device changes them. Finished rows leave at once, and waiting prompts take their slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from fastconv.engine.attention import NO_LIMITS, Limits, Rows, masked_attention, to_device
from fastconv.engine.model import Base, pack
from fastconv.engine.score import free_memory, ignore_halving, no_memory, with_memory
from fastconv.engine.shapes import shape_of
from fastconv.recipe import SamplingSettings

#: A nucleus of up to this many tokens is found without sorting the vocabulary.
_TOP_K = 512
#: Rows decoded at once; a data-centre GPU is compute-bound well below this, a CPU gains nothing beyond 64.
MAX_ROWS = {"cuda": 1024, "cpu": 64}
#: Share of the free GPU memory that the cache may take.
_CACHE_SHARE = 0.7
#: Prompt tokens in one prefill pass.
_PREFILL_TOK = {"cuda": 32768, "cpu": 4096}
#: Graphs are captured for these numbers of rows; a step runs on the smallest that holds its rows.
_GRAPH_ROWS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled completion: its tokens without the stop token, and whether a stop token ended it."""

    ids: tuple[int, ...]
    ended: bool


@dataclass
class SampledRow:
    """A prompt being completed: `place` in the caller's order, random numbers in [0, 1), tokens sampled so far.

    A caller that watches may set `dropped`: the row then leaves before its next token.
    """

    place: int
    prompt: Sequence[int]
    uniforms: list[float]
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


#: Called with the rows of a step once they have its tokens.
Watch = Callable[[Sequence[SampledRow]], None]


@dataclass(frozen=True)
class _Step:
    """A captured decoding step on the first n rows: logits [n, vocab] and choice [2, n] as `Decoder._step` returns
    them."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    choice: torch.Tensor


class Cache:
    """Key-value cache for sampling: `keys` and `values`, one tensor [slots, kv heads, length, d] per layer.

    Unfinished rows always occupy the first slots, so that a decoding step works on views and never copies the cache.
    A layer's tensors are made by the first prompts that it sees, in the shapes and the dtype that the layer itself has:
    families differ in them, and some from layer to layer.
    """

    def __init__(self, n_slots: int, max_length_tok: int) -> None:
        self.n_slots, self.max_length_tok = n_slots, max_length_tok
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def reserve(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Make room for a layer with these keys and values [kv heads, T, d], unless there is."""
        for held, part in ((self.keys, key), (self.values, value)):
            if layer not in held:
                held[layer] = part.new_zeros(self.n_slots, part.shape[0], self.max_length_tok, part.shape[2])

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` positions of each slot in `sources` to the slot in `targets` at the same place."""
        for layers in (self.keys, self.values):
            for layer in layers.values():
                for source, target in zip(sources, targets, strict=True):
                    layer[target, :, :length] = layer[source, :, :length]


@dataclass(frozen=True)
class Prefill:
    """The pass over the prompts: attention within rows that also fills the cache.

    Token `tokens[i]` of the pass goes to position `positions[i]` of slot `slots[i]` (int64 [n] each, on the device). A
    prompt that several slots share is computed once.
    """

    rows: Rows
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
        rows = torch.arange(n_rows, device=keys.device)
        keys[rows, :, self.lengths] = key.transpose(0, 1)
        values[rows, :, self.lengths] = value.transpose(0, 1)
        plain = keys.shape == values.shape and not limits.softcap and not limits.hides(keys.shape[2])
        if keys.is_cuda and plain:
            from fastconv.engine.kernels.elementwise import decode_attention

            return decode_attention(query.transpose(0, 1), keys, values, self.lengths, scale)
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
    """Decodes the rows of one cache under the live stack, which must stay the same on a GPU (it is captured)."""

    def __init__(self, base: Base, cache: Cache, n_slots: int, settings: SamplingSettings) -> None:
        self._base = base
        self._cache = cache
        self._settings = settings
        self._steps: dict[int, _Step] = {}
        self._sizes = [n for n in _GRAPH_ROWS if n < n_slots] + [n_slots]
        if base.device.type == "cuda":
            self._ids = torch.zeros(n_slots, dtype=torch.int64, device=base.device)
            self._lengths = torch.zeros_like(self._ids)
            self._uniforms = torch.zeros(n_slots, device=base.device)

    def next_tokens(self, last: Sequence[int], lengths: Sequence[int], uniforms: Sequence[float]) -> list[int]:
        """The next token of each row.

        `last` is the row's last token, `lengths` its tokens in the cache, `uniforms` its random number in [0, 1).
        """
        if self._base.device.type == "cuda":
            return self._replayed(last, lengths, uniforms)
        at = torch.tensor(lengths)
        hidden = self._base.hidden(torch.tensor(last), at, Decode(self._cache, at, max(lengths)))
        return sample_tokens(self._base.logits(hidden), torch.tensor(uniforms), self._settings).tolist()

    def _replayed(self, last: Sequence[int], lengths: Sequence[int], uniforms: Sequence[float]) -> list[int]:
        n = len(last)
        size = next(size for size in self._sizes if size >= n)
        # The padding rows write to position 0 of free slots, which the next prompt overwrites.
        padded = torch.tensor([[*last, *[0] * (size - n)], [*lengths, *[0] * (size - n)]])
        ids, at = to_device(padded, self._base.device)
        self._ids[:size], self._lengths[:size] = ids, at
        self._uniforms[:n] = to_device(torch.tensor(uniforms), self._base.device)
        if size not in self._steps:
            self._steps[size] = self._captured(size)
        step = self._steps[size]
        step.graph.replay()
        chosen, wide = step.choice[:, :n].tolist()
        if any(wide):  # the host waits here anyway, so the rare wide rows may be sorted separately
            rows = torch.tensor([row for row, is_wide in enumerate(wide) if is_wide], device=self._base.device)
            tokens = _from_sorted(step.logits[rows], self._uniforms[rows], self._settings)
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                chosen[row] = token
        return chosen

    def _captured(self, size: int) -> _Step:
        """Capture the step on the first `size` rows. A run before it loads the kernels; it writes only what replays
        write."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._steps.values())).graph.pool() if self._steps else None
        with torch.cuda.graph(graph, pool=pool):
            logits, choice = self._step(size)
        return _Step(graph, logits, choice)

    def _step(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [size, vocab] fp32, (token, whether the nucleus is wider than `_TOP_K`) int64 [2, size])."""
        at = self._lengths[:size]
        hidden = self._base.hidden(self._ids[:size], at, Decode(self._cache, at, 0))
        logits = self._base.logits(hidden)
        chosen, is_wide = _from_top(logits, self._uniforms[:size], self._settings)
        return logits, torch.stack([chosen, is_wide.long()])


def sample_tokens(logits: torch.Tensor, uniform: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Sample one token per row: temperature (0: the most likely token), then nucleus (Holtzman et al. 2020), then the
    inverse of the CDF.

    logits [n, vocab] fp32, uniform [n] in [0, 1) -> [n] int64. The nucleus is the smallest set of most likely tokens
    whose probability reaches top_p; the first token is always in it. Rows whose nucleus lies within the `_TOP_K` most
    likely tokens, nearly all of them, never sort the vocabulary; which method a row takes depends on that row alone.
    """
    chosen, is_wide = _from_top(logits, uniform, settings)
    wide = torch.nonzero(is_wide).flatten()
    if wide.numel():
        chosen[wide] = _from_sorted(logits[wide], uniform[wide], settings)
    return chosen


def _probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities [n, vocab]; at temperature 0 all of it is on the first of the most likely tokens."""
    if temperature:
        return torch.softmax(logits / temperature, dim=-1)
    return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)


def _from_top(
    logits: torch.Tensor, uniform: torch.Tensor, settings: SamplingSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """(token sampled from the `_TOP_K` most likely ones [n], whether the nucleus is wider than these [n] bool)."""
    probabilities = _probabilities(logits, settings.temperature)
    ranked, tokens = torch.topk(probabilities, min(_TOP_K, probabilities.shape[-1]), dim=-1)
    return _from_ranked(ranked, tokens, uniform, settings.top_p), ranked.sum(-1) < settings.top_p


def _from_sorted(logits: torch.Tensor, uniform: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Tokens [n] drawn from the whole vocabulary, sorted."""
    probabilities = _probabilities(logits, settings.temperature)
    ranked, tokens = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    return _from_ranked(ranked, tokens, uniform, settings.top_p)


def _from_ranked(ranked: torch.Tensor, tokens: torch.Tensor, uniform: torch.Tensor, top_p: float) -> torch.Tensor:
    """The token at `uniform` of the nucleus' mass; ranked [n, k] descending probabilities of `tokens` [n, k]."""
    cumulative = ranked.cumsum(-1)
    outside = cumulative - ranked >= top_p
    size = (~outside).sum(-1, keepdim=True)
    total = cumulative.gather(-1, size - 1)
    cumulative = cumulative.masked_fill(outside, float("inf"))
    place = torch.searchsorted(cumulative, uniform[:, None] * total, right=True).clamp(max=size - 1)
    return tokens.gather(-1, place)[:, 0]


@torch.no_grad()
def sample(
    base: Base, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: SamplingSettings,
    on_token: Callable[[int], None] = lambda n_tok: None, on_halved: Callable[[], None] = ignore_halving,
    *, limits: Sequence[int] = (), watch: Watch = lambda rows: None,
) -> list[Completion]:  # fmt: skip
    """Sample one completion for each prompt (token ids), in order.

    `seeds[i]` is that of prompt i, `limits[i]` the most tokens of its completion (else `settings.max_new_tok`). `on_token`
    is called after every step with the number of tokens that it sampled, `watch` with the rows that it sampled for. Where
    memory runs out, the unfinished rows begin again, half as many at a time (`on_halved` is called then); what they
    sample does not change by it. Raises TrainingError if a single row does not fit.
    """
    numbers = limits or [settings.max_new_tok] * len(prompts)
    rows = [
        SampledRow(place, prompt, torch.rand(n, generator=torch.Generator().manual_seed(seed)).tolist())
        for place, (prompt, seed, n) in enumerate(zip(prompts, seeds, numbers, strict=True))
    ]
    max_rows, unfinished = MAX_ROWS[base.device.type], rows
    while unfinished:
        if with_memory(partial(_sample_rows, base, unfinished, settings, on_token, watch, max_rows)):
            break
        free_memory()
        unfinished = [row for row in unfinished if row.active]
        max_rows = min(max_rows, len(unfinished))
        if max_rows == 1:
            raise no_memory()
        max_rows = max(1, max_rows // 2)
        on_halved()
        on_token(-sum(len(row.tokens) for row in unfinished))
        for row in unfinished:
            row.tokens.clear()
    return [Completion(tuple(row.tokens), row.ended) for row in rows]


def _sample_rows(
    base: Base, rows: Sequence[SampledRow], settings: SamplingSettings, on_token: Callable[[int], None], watch: Watch,
    max_rows: int,
) -> bool:  # fmt: skip
    """Sample rows to their ends, at most `max_rows` at a time. Returns True."""
    waiting = sorted(rows, key=lambda row: (len(row.prompt), -row.place))  # popped from the end: the longest first
    longest_tok = max(len(row.prompt) + len(row.uniforms) for row in rows)
    cache, n_slots = _cache(base, min(max_rows, len(rows)), longest_tok)
    decoder = Decoder(base, cache, n_slots, settings)
    alive: list[SampledRow] = []
    while waiting or alive:
        # Prompts are admitted when half the slots are free: rarely, so that prefill passes are large.
        if waiting and len(alive) <= n_slots // 2:
            new = _admit(base, waiting, n_slots - len(alive))
            hidden = _prefill(base, new, cache, len(alive))
            uniforms = torch.tensor([row.uniforms[0] for row in new], device=base.device)
            _append_tokens(base, sample_tokens(base.logits(hidden), uniforms, settings).tolist(), new, on_token)
            watch(new)
            alive = _compact(cache, alive + new)
        else:
            last = [row.tokens[-1] for row in alive]
            uniforms = [row.uniforms[len(row.tokens)] for row in alive]
            _append_tokens(base, decoder.next_tokens(last, [row.length for row in alive], uniforms), alive, on_token)
            watch(alive)
            alive = _compact(cache, alive)
    return True


def _cache(base: Base, n_rows: int, max_length_tok: int) -> tuple[Cache, int]:
    """(cache, number of slots): as many slots as there are rows that fit in memory."""
    base.require_length(max_length_tok)
    n_slots = n_rows
    if base.device.type == "cuda":
        per_tok = shape_of(base.model.config.to_dict(), base.name).kv_bytes_per_tok(base.head.weight.element_size())
        free, _ = torch.cuda.mem_get_info(base.device)
        n_slots = max(1, min(n_slots, int(free * _CACHE_SHARE) // (per_tok * max_length_tok)))
    return Cache(n_slots, max_length_tok), n_slots


def _admit(base: Base, waiting: list[SampledRow], n_free: int) -> list[SampledRow]:
    """Pop prompts from `waiting`, longest first, as many as have a free slot and fit in one prefill pass; at least
    one."""
    new: list[SampledRow] = []
    room = _PREFILL_TOK[base.device.type]
    while waiting and len(new) < n_free and (not new or len(waiting[-1].prompt) <= room):
        new.append(waiting.pop())
        room -= len(new[-1].prompt)
    return new


def _prefill(base: Base, new: Sequence[SampledRow], cache: Cache, first_slot: int) -> torch.Tensor:
    """Fill the cache with the prompts, computing equal ones once; hidden states [len(new), hidden] at the last
    tokens."""
    slots: dict[tuple[int, ...], list[int]] = {}
    for slot, row in enumerate(new, first_slot):
        slots.setdefault(tuple(row.prompt), []).append(slot)
    ids, positions, layout = pack([list(prompt) for prompt in slots], base)
    fill = [
        (token, slot, token - start)
        for (prompt, sharing), start in zip(slots.items(), layout.starts, strict=False)
        for slot in sharing
        for token in range(start, start + len(prompt))
    ]
    tokens, to_slots, to_positions = to_device(torch.tensor(fill).t().contiguous(), base.device)
    hidden = base.hidden(ids, positions, Prefill(layout, cache, tokens, to_slots, to_positions))
    last = dict(zip(slots, layout.starts[1:], strict=True))
    return hidden[torch.tensor([last[tuple(row.prompt)] - 1 for row in new], device=base.device)]


def _append_tokens(
    base: Base, chosen: Sequence[int], rows: Sequence[SampledRow], on_token: Callable[[int], None]
) -> None:
    """Append the next token to every row, or mark the row as ended by a stop token."""
    for row, token in zip(rows, chosen, strict=True):
        if token in base.tokenizer.stop_ids:
            row.ended = True
        else:
            row.tokens.append(token)
    on_token(len(rows))


def _compact(cache: Cache, rows: list[SampledRow]) -> list[SampledRow]:
    """The unfinished rows, slot by slot; the last of them move into the slots of finished ones."""
    active = [row.active for row in rows]
    n_active = sum(active)
    holes = [slot for slot in range(n_active) if not active[slot]]
    sources = [slot for slot in range(n_active, len(rows)) if active[slot]]
    if holes:
        cache.move(sources, holes, max(rows[slot].length for slot in sources))
        for source, hole in zip(sources, holes, strict=True):
            rows[hole] = rows[source]
    return rows[:n_active]
