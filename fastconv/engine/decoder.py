"""One decoding step: the last token of every row in, the next one out; on a GPU replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastconv.engine.attention import Cache, Decode
from fastconv.engine.model import Base, to_device
from fastconv.recipe import SamplingSettings

#: A nucleus of up to this many tokens is found without sorting the vocabulary.
_TOP_K = 512
#: Graphs are made for these numbers of rows; a step runs on the smallest that holds its rows.
_GRAPH_ROWS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True)
class _Step:
    """A captured step on the first n rows: what goes in, what comes out, and the graph between."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    verdict: torch.Tensor


class Decoder:
    """Decodes the rows of one cache under the stack that is live. On a GPU the stack may not change in between."""

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

    def next_tokens(self, said: Sequence[int], lengths: Sequence[int], uniforms: Sequence[float]) -> list[int]:
        """The next token of each row, from its last one, its length in the cache, and its random number in [0, 1)."""
        if self._base.device.type == "cuda":
            return self._replayed(said, lengths, uniforms)
        at = torch.tensor(lengths)
        hidden = self._base.hidden(torch.tensor(said), at, Decode(self._cache, at, max(lengths)))
        return choose(self._base.logits(hidden), torch.tensor(uniforms), self._settings).tolist()

    def _replayed(self, said: Sequence[int], lengths: Sequence[int], uniforms: Sequence[float]) -> list[int]:
        n = len(said)
        size = next(size for size in self._sizes if size >= n)
        # The places beyond the rows write to position 0 of free slots, which the next prompt overwrites.
        whole = torch.tensor([[*said, *[0] * (size - n)], [*lengths, *[0] * (size - n)]])
        ids, at = to_device(whole, self._base.device)
        self._ids[:size], self._lengths[:size] = ids, at
        self._uniforms[:n] = to_device(torch.tensor(uniforms), self._base.device)
        if size not in self._steps:
            self._steps[size] = self._captured(size)
        step = self._steps[size]
        step.graph.replay()
        chosen, wide = step.verdict[:, :n].tolist()
        if any(wide):  # the host waits here anyway, so rare rows may take the slow way
            rows = torch.tensor([row for row, is_wide in enumerate(wide) if is_wide], device=self._base.device)
            again = _from_sorted(step.logits[rows], self._uniforms[rows], self._settings)
            for row, token in zip(rows.tolist(), again.tolist(), strict=True):
                chosen[row] = token
        return chosen

    def _captured(self, size: int) -> _Step:
        """Capture the step on the first `size` rows. The run before it loads kernels; it writes what replays write."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._steps.values())).graph.pool() if self._steps else None
        with torch.cuda.graph(graph, pool=pool):
            logits, verdict = self._step(size)
        return _Step(graph, logits, verdict)

    def _step(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [size, vocab], [chosen, is wide] int64 [2, size])."""
        at = self._lengths[:size]
        hidden = self._base.hidden(self._ids[:size], at, Decode(self._cache, at, 0))
        logits = self._base.logits(hidden)
        chosen, is_wide = _from_top(logits, self._uniforms[:size], self._settings)
        return logits, torch.stack([chosen, is_wide.long()])


def choose(logits: torch.Tensor, uniform: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Draw one token per row: temperature, then nucleus (Holtzman et al. 2020), then the inverse of the CDF.

    logits [n, vocab] fp32, uniform [n] in [0, 1) -> [n] int64. The nucleus is the smallest set of most likely tokens
    whose probability reaches top_p; the first token is always in it. Rows whose nucleus lies within the `_TOP_K` most
    likely tokens, nearly all of them, never sort the vocabulary; which way a row goes depends on that row alone.
    """
    chosen, is_wide = _from_top(logits, uniform, settings)
    wide = torch.nonzero(is_wide).flatten()
    if wide.numel():
        chosen[wide] = _from_sorted(logits[wide], uniform[wide], settings)
    return chosen


def _from_top(
    logits: torch.Tensor, uniform: torch.Tensor, settings: SamplingSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """(token drawn from the most likely `_TOP_K` [n], whether the nucleus is wider than these [n] bool)."""
    probabilities = torch.softmax(logits / settings.temperature, dim=-1)
    ranked, tokens = torch.topk(probabilities, min(_TOP_K, probabilities.shape[-1]), dim=-1)
    return _from_ranked(ranked, tokens, uniform, settings.top_p), ranked.sum(-1) < settings.top_p


def _from_sorted(logits: torch.Tensor, uniform: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Tokens [n] drawn from the whole vocabulary, sorted."""
    probabilities = torch.softmax(logits / settings.temperature, dim=-1)
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
