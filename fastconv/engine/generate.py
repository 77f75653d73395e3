"""Sampling on the resident base with the live stack: many rows at once, a seed for each.

A row's draws come from its own seed, fixed before the first token, so neither the batch it is in nor the device
changes which random numbers it uses. Finished rows leave at once, and waiting prompts take their places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fastconv.engine.attention import Cache, Prefill
from fastconv.engine.model import Base, pack, to_device
from fastconv.engine.decoder import Decoder, choose
from fastconv.recipe import SamplingSettings

#: Rows decoded at once; a data-centre GPU is compute-bound well below this, a CPU gains nothing beyond 64.
MAX_ROWS = {"cuda": 1024, "cpu": 64}
#: Share of the free GPU memory that the cache may take.
_CACHE_SHARE = 0.7
#: Prompts are read this many tokens at a time.
_PREFILL_TOK = {"cuda": 32768, "cpu": 4096}


@dataclass(frozen=True, slots=True)
class Drawn:
    """One sampled completion: its tokens without the stop token, and whether a stop token ended it."""

    ids: tuple[int, ...]
    ended: bool


@dataclass
class _Row:
    """A prompt on its way: `place` in the caller's order, its random numbers, what it said so far."""

    place: int
    prompt: Sequence[int]
    uniforms: list[float]
    said: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def length(self) -> int:
        """Tokens in the cache before the next pass; the last one said is not there yet."""
        return len(self.prompt) + len(self.said) - 1


@torch.no_grad()
def sample(
    base: Base,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: SamplingSettings,
    on_token: Callable[[int], None] = lambda n_tok: None,
) -> list[Drawn]:
    """Draw one completion per prompt, in order. `on_token` hears how many tokens each step added."""
    rows = [
        _Row(place, prompt, torch.rand(settings.max_new_tok, generator=torch.Generator().manual_seed(seed)).tolist())
        for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    waiting = sorted(rows, key=lambda row: (len(row.prompt), -row.place))  # the longest is taken first, from the end
    if not waiting:
        return []
    cache, n_slots = _cache(base, len(rows), len(waiting[-1].prompt) + settings.max_new_tok)
    decoder = Decoder(base, cache, n_slots, settings)
    alive: list[_Row] = []
    while waiting or alive:
        # Prompts are let in when half the slots are free: rarely, so that reading them is done in large batches.
        if waiting and len(alive) <= n_slots // 2:
            new = _admit(base, waiting, n_slots - len(alive))
            hidden = _prefill(base, new, cache, len(alive))
            uniforms = torch.tensor([row.uniforms[0] for row in new], device=base.device)
            _say(base, choose(base.logits(hidden), uniforms, settings).tolist(), new, on_token)
            alive = _compact(cache, alive + new, settings)
        else:
            said = [row.said[-1] for row in alive]
            uniforms = [row.uniforms[len(row.said)] for row in alive]
            _say(base, decoder.next_tokens(said, [row.length for row in alive], uniforms), alive, on_token)
            alive = _compact(cache, alive, settings)
    return [Drawn(tuple(row.said), row.ended) for row in rows]


def _cache(base: Base, n_rows: int, max_length_tok: int) -> tuple[Cache, int]:
    """A cache with as many slots as are useful and fit in memory, and their number."""
    config = base.model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_slots = min(n_rows, MAX_ROWS[base.device.type])
    like = base.head.weight
    if base.device.type == "cuda":
        per_tok = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * like.element_size()
        free, _ = torch.cuda.mem_get_info(base.device)
        n_slots = max(1, min(n_slots, int(free * _CACHE_SHARE) // (per_tok * max_length_tok)))
    kv_heads = config.num_key_value_heads
    return Cache(config.num_hidden_layers, n_slots, kv_heads, max_length_tok, head_dim, like), n_slots


def _admit(base: Base, waiting: list[_Row], n_free: int) -> list[_Row]:
    """Take prompts off `waiting`, longest first, as many as have a slot and fit in one pass; at least one."""
    new: list[_Row] = []
    room = _PREFILL_TOK[base.device.type]
    while waiting and len(new) < n_free and (not new or len(waiting[-1].prompt) <= room):
        new.append(waiting.pop())
        room -= len(new[-1].prompt)
    return new


def _prefill(base: Base, new: Sequence[_Row], cache: Cache, first_slot: int) -> torch.Tensor:
    """Read the prompts into the cache, equal ones once; hidden states [len(new), hidden] after each's last token."""
    slots: dict[tuple[int, ...], list[int]] = {}
    for slot, row in enumerate(new, first_slot):
        slots.setdefault(tuple(row.prompt), []).append(slot)
    ids, positions, layout = pack([list(prompt) for prompt in slots], base)
    fill = [
        (token, slot, token - start)
        for (prompt, mine), start in zip(slots.items(), layout.starts, strict=False)
        for slot in mine
        for token in range(start, start + len(prompt))
    ]
    tokens, to_slots, to_positions = to_device(torch.tensor(fill).t().contiguous(), base.device)
    hidden = base.hidden(ids, positions, Prefill(layout, cache, tokens, to_slots, to_positions))
    last = dict(zip(slots, layout.starts[1:], strict=True))
    return hidden[torch.tensor([last[tuple(row.prompt)] - 1 for row in new], device=base.device)]


def _say(base: Base, chosen: Sequence[int], rows: Sequence[_Row], on_token: Callable[[int], None]) -> None:
    """Take down the next token of every row."""
    for row, token in zip(rows, chosen, strict=True):
        if token in base.tokenizer.stop_ids:
            row.ended = True
        else:
            row.said.append(token)
    on_token(len(rows))


def _compact(cache: Cache, rows: list[_Row], settings: SamplingSettings) -> list[_Row]:
    """The rows that go on, slot by slot; the last of them move into the slots of the finished ones."""
    going = [not row.ended and len(row.said) < settings.max_new_tok for row in rows]
    n_going = sum(going)
    holes = [slot for slot in range(n_going) if not going[slot]]
    sources = [slot for slot in range(n_going, len(rows)) if going[slot]]
    if holes:
        cache.move(sources, holes, max(rows[slot].length for slot in sources))
        for source, hole in zip(sources, holes, strict=True):
            rows[hole] = rows[source]
    return rows[:n_going]
