"""Sampling on the resident base model under the live stack: continuous batching, with one seed for each row.

`sample` fills the cache with prompts and lets a `decode.Decoder` run passes over them. A row's random numbers come from
its own seed before the first token, so that neither its batch nor the device changes them. Finished rows leave at once,
and waiting prompts take their slots.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fastconv.engine.attention import to_device
from fastconv.engine.decode import Cache, Decoder, DeviceDecoder, Prefill, SampledRow, Slots, sample_tokens, slots_for
from fastconv.engine.device import OVERHEAD_BYTES
from fastconv.engine.model import Base
from fastconv.engine.prompts import pack_prompts
from fastconv.engine.score import ignore_halving, no_memory, with_memory
from fastconv.engine.shapes import MAX_ROWS, SMALL_SHARE, cached_tok, is_small_cache, rows_at_once, shape_of
from fastconv.recipe import SamplingSettings

#: Share of the GPU memory beside the weights that the cache may take, and of what other programs leave of it.
_CACHE_SHARE, _SHARED_CARD_SHARE = 0.7, 0.9
#: Prompt tokens in one prefill pass.
_PREFILL_TOK = {"cuda": 32768, "cpu": 4096}
#: Times in a row that a kept decoder may be passed over for a smaller one.
_PASSED_OVER = 2
#: Prompts are admitted when this part of the slots is free: at once, but not each in a pass of its own.
_REFILL_PART = 8


#: Called with the rows of a pass once they have its tokens.
Watch = Callable[[Sequence[SampledRow]], None]


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled completion: its tokens without the stop token, and whether a stop token ended it."""

    ids: tuple[int, ...]
    ended: bool


@torch.no_grad()
def sample(
    base: Base, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: SamplingSettings,
    on_token: Callable[[int], None] = lambda n_tok: None, on_halved: Callable[[], None] = ignore_halving,
    *, limits: Sequence[int] = (), watch: Watch = lambda rows: None,
) -> list[Completion]:  # fmt: skip
    """Sample one completion for each prompt (token ids), in order.

    `seeds[i]` is that of prompt i, `limits[i]` the most tokens of its completion (else `settings.max_new_tok`). `on_token`
    is called after every pass with the number of tokens that it sampled, `watch` with the rows that it sampled for. Where
    memory runs out, the unfinished rows begin again, half as many at a time (`on_halved` is called then); what they
    sample does not change by it. Raises TrainingError if a single row does not fit.
    """
    numbers = limits or [settings.max_new_tok] * len(prompts)
    rows = [
        SampledRow(place, prompt, torch.rand(n, generator=torch.Generator().manual_seed(seed)))
        for place, (prompt, seed, n) in enumerate(zip(prompts, seeds, numbers, strict=True))
    ]
    max_rows, unfinished = _rows_at_once(base, rows), rows
    while unfinished:
        if with_memory(partial(_sample_rows, base, unfinished, settings, on_token, watch, max_rows)):
            break
        had_more = base.drop_kept()
        unfinished = [row for row in unfinished if row.active]
        if not had_more:
            max_rows = min(max_rows, len(unfinished))
            if max_rows == 1:
                raise no_memory()
            max_rows = max(1, max_rows // 2)
            on_halved()
        on_token(-sum(len(row.tokens) for row in unfinished))
        for row in unfinished:
            row.tokens.clear()
    return [Completion(tuple(row.tokens), row.ended) for row in rows]


def _rows_at_once(base: Base, rows: Sequence[SampledRow]) -> int:
    """The most rows that are decoded at once. It follows from them and the card, not from what is free."""
    if base.device.type != "cuda" or not rows:
        return MAX_ROWS[base.device.type]
    row_bytes = cached_tok(_length_tok(rows)) * _kv_bytes_per_tok(base)
    return rows_at_once(base.device.type, row_bytes, torch.cuda.mem_get_info(base.device)[1])


def _length_tok(rows: Sequence[SampledRow]) -> int:
    return max(len(row.prompt) + len(row.uniforms) for row in rows)


def _sample_rows(
    base: Base, rows: Sequence[SampledRow], settings: SamplingSettings, on_token: Callable[[int], None], watch: Watch,
    max_rows: int,
) -> bool:  # fmt: skip
    """Sample rows to their ends, at most `max_rows` at a time. Returns True."""
    waiting = sorted(rows, key=lambda row: (len(row.prompt), -row.place))  # popped from the end: the longest first
    n_waves = math.ceil(len(rows) / max_rows)
    n_wanted = math.ceil(len(rows) / n_waves)
    decoder = _decoder(base, n_wanted, _length_tok(rows), settings)
    n_slots, slots = min(decoder.n_slots, n_wanted), Slots()
    under_way: deque[tuple[Slots, Callable[[], list[int]]]] = deque()
    while waiting or under_way or slots:
        n_free = n_slots - sum(row is not None for row in slots)
        if waiting and n_free >= max(1, n_slots // _REFILL_PART):
            new = _admit(base, waiting, n_free)
            _fill(base, new, decoder, slots, on_token)
            watch(new)
        elif slots:
            under_way.append((list(slots), decoder.launch(slots)))
        if under_way and (len(under_way) > decoder.lag or not slots):
            decoded, read = under_way.popleft()
            pairs = [(row, token) for row, token in zip(decoded, read(), strict=True) if row and row.active]
            _append_tokens(base, [token for _, token in pairs], [row for row, _ in pairs], on_token)
            watch([row for row, _ in pairs])
        slots = _compacted(decoder, [row if row is not None and row.active else None for row in slots])
    if isinstance(decoder, DeviceDecoder):
        _keep(base, decoder)
    return True


def _keep(base: Base, decoder: DeviceDecoder) -> None:
    """Keep a decoder with its graphs for the next stack, unless a larger one is kept: that of the evaluations, between which
    a few answers are drawn. One that is not asked any more goes after a few of these."""
    kept, cache = base.kept.get("decoder"), decoder.cache
    if decoder.route is None or not _is_small(base, cache):
        return
    if kept is None or kept is decoder or cache.n_tok >= kept.cache.n_tok or kept.passed_over >= _PASSED_OVER:
        base.kept["decoder"] = decoder
        decoder.passed_over = 0
    else:
        kept.passed_over += 1


def _decoder(base: Base, n_rows: int, max_length_tok: int, settings: SamplingSettings) -> Decoder:
    """A decoder of `n_rows` slots, fewer if memory is short; on a GPU the one that was kept, if it will do.

    Its slots follow from the rows and the card, whatever was kept: they decide which rows share a pass, and a killed run
    that goes on has nothing that was kept.
    """
    base.require_length(max_length_tok)
    if base.device.type != "cuda":
        return Decoder(base, Cache(n_rows, max_length_tok), settings)
    max_length_tok = cached_tok(max_length_tok)
    room_tok = _room_bytes(base) // _kv_bytes_per_tok(base)
    n_slots = slots_for(n_rows, max(1, room_tok // max_length_tok))
    kept = base.kept.get("decoder")
    if kept is not None and kept.serves(n_slots, max_length_tok, settings):
        return kept
    if kept is not None and n_slots * max_length_tok + kept.cache.n_tok > room_tok:  # not beside it
        del base.kept["decoder"], kept
        torch.cuda.empty_cache()
    return DeviceDecoder(base, Cache(n_slots, max_length_tok), settings)


def _room_bytes(base: Base) -> int:
    """Bytes that a cache may take: a share of what the weights leave of the card, whatever torch holds beside them now.

    Only where other programs hold more of the card than that share spares does it follow from what is free.
    """
    of_card, left_by_others = _beside_weights(base)
    return int(min(_CACHE_SHARE * of_card, _SHARED_CARD_SHARE * left_by_others))


def training_room_bytes(base: Base) -> float:
    """Bytes of a GPU that training may take. A decoder is counted as kept whether one is, so that a run that goes on trains as
    many adapters in the same steps as it would have."""
    return min(_beside_weights(base)) - SMALL_SHARE * torch.cuda.mem_get_info(base.device)[1]


def _beside_weights(base: Base) -> tuple[float, float]:
    """Bytes that the weights leave of the GPU, and of what other programs leave of it."""
    free, total = torch.cuda.mem_get_info(base.device)
    weights = sum(weight.numel() * weight.element_size() for weight in base.model.parameters())
    return total - weights - OVERHEAD_BYTES, free + torch.cuda.memory_reserved(base.device) - weights


def _kv_bytes_per_tok(base: Base) -> int:
    return shape_of(base.model.config.to_dict(), base.name).kv_bytes_per_tok(base.head.weight.element_size())


def _is_small(base: Base, cache: Cache) -> bool:
    return is_small_cache(cache.n_tok * _kv_bytes_per_tok(base), torch.cuda.mem_get_info(base.device)[1])


def _admit(base: Base, waiting: list[SampledRow], n_free: int) -> list[SampledRow]:
    """Pop prompts from `waiting`, longest first, as many as have a free slot and fit in one prefill pass; at least
    one."""
    new: list[SampledRow] = []
    room = _PREFILL_TOK[base.device.type]
    while waiting and len(new) < n_free and (not new or len(waiting[-1].prompt) <= room):
        new.append(waiting.pop())
        room -= len(new[-1].prompt)
    return new


def _fill(
    base: Base, new: Sequence[SampledRow], decoder: Decoder, slots: Slots, on_token: Callable[[int], None]
) -> None:
    """Put new rows into free slots, and sample their first tokens."""
    free = [slot for slot, row in enumerate(slots) if row is None]
    places = [*free, *range(len(slots), len(slots) + len(new))][: len(new)]
    slots += [None] * (max(places) + 1 - len(slots))
    hidden = _prefill(base, new, decoder.cache, places)
    uniforms = to_device(torch.stack([row.uniforms[0] for row in new]), base.device)
    chosen = sample_tokens(base.logits(hidden), uniforms, decoder.settings)
    _append_tokens(base, chosen.tolist(), new, on_token)
    decoder.place(places, new)
    for place, row in zip(places, new, strict=True):
        slots[place] = row


def _prefill(base: Base, new: Sequence[SampledRow], cache: Cache, places: Sequence[int]) -> torch.Tensor:
    """Fill these slots of the cache with the prompts, computing equal ones once; hidden states [len(new), hidden] at the
    last tokens."""
    slots: dict[tuple[int, ...], list[int]] = {}
    for slot, row in zip(places, new, strict=True):
        slots.setdefault(tuple(row.prompt), []).append(slot)
    packed = pack_prompts(base, {sharing[0]: prompt for prompt, sharing in slots.items()})
    pieces = [
        (n_tok, token, slot, at)
        for sharing in slots.values()
        for slot in sharing
        for token, at, n_tok in packed.pieces[sharing[0]]
    ]
    prefill = Prefill(packed.layout, cache, *to_device(_by_token(torch.tensor(pieces)), base.device))
    last = packed.last([slots[tuple(row.prompt)][0] for row in new])
    return base.hidden(packed.ids, packed.positions, prefill)[last]


def _by_token(pieces: torch.Tensor) -> torch.Tensor:
    """(token of the pass, slot, position) [3, n] int64 of each token of pieces [p, 4], each (its tokens, token, slot, position)."""
    lengths = pieces[:, 0]
    token, slot, position = pieces[:, 1:].repeat_interleave(lengths, 0).unbind(1)
    within = torch.arange(len(token)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return torch.stack([token + within, slot, position + within])


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


def _compacted(decoder: Decoder, slots: Slots) -> Slots:
    """The slots without free ones at the end. If a pass gets smaller by it, the last rows move into free slots."""
    n_rows = sum(row is not None for row in slots)
    if decoder.size(n_rows) < decoder.size(len(slots)):
        holes = [slot for slot in range(n_rows) if slots[slot] is None]
        sources = [slot for slot in range(n_rows, len(slots)) if slots[slot] is not None]
        if holes:
            moved = [slots[slot] for slot in sources]
            decoder.move(sources, holes, max(row.length for row in moved if row is not None))
            for hole, row in zip(holes, moved, strict=True):
                slots[hole] = row
        slots = slots[:n_rows]
    return slots
