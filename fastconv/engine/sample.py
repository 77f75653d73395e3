"""Sampling on the resident base with the live stack: many rows at once, a seed for each.

A row's draws come from its own seed, fixed before the first token, so neither the batch it is in nor the device
changes which random numbers it uses. Finished rows leave the batch at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastconv.engine.attention import Cache, Decode, Prefill
from fastconv.engine.base import Base, pack
from fastconv.recipe import SamplingSettings

#: Rows in one batch; decoding on a data-centre GPU is compute-bound well below this, a CPU gains nothing beyond 64.
MAX_ROWS = {"cuda": 1024, "cpu": 64}


@dataclass(frozen=True, slots=True)
class Drawn:
    """One sampled completion: its tokens without the stop token, and whether a stop token ended it."""

    ids: tuple[int, ...]
    ended: bool


@torch.no_grad()
def sample(
    base: Base,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: SamplingSettings,
    on_token: Callable[[int], None] = lambda n_tok: None,
) -> list[Drawn]:
    """Draw one completion per prompt, in order. `on_token` hears how many tokens each step added."""
    drawn: list[Drawn] = []
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    results: dict[int, Drawn] = {}
    limit = MAX_ROWS[base.device.type]
    for start in range(0, len(order), limit):
        batch = order[start : start + limit]
        done = _sample_batch(base, [list(prompts[i]) for i in batch], [seeds[i] for i in batch], settings, on_token)
        results.update(zip(batch, done, strict=True))
    drawn.extend(results[i] for i in range(len(prompts)))
    return drawn


def _sample_batch(
    base: Base, prompts: list[list[int]], seeds: list[int], settings: SamplingSettings, on_token: Callable[[int], None]
) -> list[Drawn]:
    config = base.model.config
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=base.device)
    longest = max(len(prompt) for prompt in prompts)
    cache = Cache(
        config.num_hidden_layers, len(prompts), config.num_key_value_heads, longest + settings.max_new_tok,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads, base.head.weight,
    )  # fmt: skip
    ids, positions, layout = pack(prompts, base.device)
    hidden = base.hidden(ids, positions, Prefill(layout, cache))[
        torch.tensor(layout.starts[1:], device=base.device) - 1
    ]
    uniforms = torch.stack(
        [torch.rand(settings.max_new_tok, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )
    uniforms = uniforms.to(base.device)
    stops = torch.tensor(base.tokenizer.stop_ids, device=base.device)
    tokens: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    alive = list(range(len(prompts)))
    for step in range(settings.max_new_tok):
        chosen = _choose(base.logits(hidden), uniforms[:, step], settings)
        stopped = torch.isin(chosen, stops)
        for row, token, stop in zip(alive, chosen.tolist(), stopped.tolist(), strict=True):
            if stop:
                ended[row] = True
            else:
                tokens[row].append(token)
        on_token(len(alive))
        if step + 1 == settings.max_new_tok or bool(stopped.all()):
            break
        if bool(stopped.any()):
            rows = torch.nonzero(~stopped).flatten()
            cache.keep(rows)
            chosen, uniforms, lengths = chosen[rows], uniforms[rows], lengths[rows]
            alive = [alive[i] for i in rows.tolist()]
        hidden = base.hidden(chosen, lengths, Decode(cache, lengths, int(lengths.max())))
        lengths = lengths + 1
    return [Drawn(tuple(row), end) for row, end in zip(tokens, ended, strict=True)]


def _choose(logits: torch.Tensor, uniform: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Draw one token per row: temperature, then nucleus (Holtzman et al. 2020), then the inverse of the CDF.

    logits [n, vocab] fp32, uniform [n] in [0, 1) -> [n] int64. The nucleus is the smallest set of most likely tokens
    whose probability reaches top_p; the first token is always in it.
    """
    probabilities = torch.softmax(logits / settings.temperature, dim=-1)
    ranked, tokens = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    cumulative = ranked.cumsum(-1)
    outside = cumulative - ranked >= settings.top_p
    cumulative = cumulative.masked_fill(outside, float("inf"))
    size = (~outside).sum(-1, keepdim=True)
    total = cumulative.gather(-1, size - 1)
    place = torch.searchsorted(cumulative, uniform[:, None] * total, right=True).clamp(max=size - 1)
    return tokens.gather(-1, place)[:, 0]
