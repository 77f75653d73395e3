"""Attention over packed rows, used by training, scoring and sampling: one function and the layouts it works on.

Model code calls `attend` in every layer through transformers' attention interface and passes the `layout` of the
current forward pass. A layout says which tokens form a row; no row attends to another. Training needs no mask and, on
a CPU, no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch

from fastconv.engine.same_bits import dot_product_attention
from fastconv.errors import ModelError

#: Name under which `attend` is registered with transformers.
ATTENTION = "fastconv"
#: The width of a padded batch is a multiple of this: batches of nearly the same width share a graph.
_WIDTH_STEP = 64
#: What helps where a family computes something that fastconv does not.
OTHER_BASE = "use a base of a family that docs/FAMILIES.md lists as equal, for example Qwen2.5, Qwen3 or Llama 3"


@dataclass(frozen=True)
class Limits:
    """What a layer's attention has beyond causal softmax attention.

    `window` tokens are seen by each token, itself included (0: all before it). `softcap` c turns scores s into
    c tanh(s / c) before the mask (Gemma Team 2024, section 2; 0: none).
    """

    window: int = 0
    softcap: float = 0.0

    def hides(self, n_tok: int) -> bool:
        """Whether the window hides anything in a row of `n_tok` tokens."""
        return 0 < self.window < n_tok


#: Plain causal attention.
NO_LIMITS = Limits()


class Layout(Protocol):
    """How the tokens of one forward pass form rows."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        limits: Limits = NO_LIMITS,
    ) -> torch.Tensor:
        """Attention output [T, heads, d] of query [heads, T, d], key and value [kv heads, T, d], all in one dtype."""
        ...


#: Keywords of transformers' attention interface that change nothing here: what they say is in the layout, or is not
#: used in evaluation mode. Every other keyword that is set is refused.
_WITHOUT_EFFECT = frozenset(
    {
        "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
        "num_items_in_batch", "target_dtype", "logits_to_keep", "output_router_logits", "num_logits_to_keep",
        "position_embeddings",
    }
)  # fmt: skip


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, heads, T, d] -> ([1, T, heads, d], None).

    `scaling` defaults to 1 / sqrt(d). Raises ModelError for a mask and for every keyword whose effect is not computed
    here: a keyword that is swallowed is another model.
    """
    if layout is None:
        raise ModelError(
            f"{type(module).__name__} does not hand on to attention which tokens form a row",
            where="model.id",
            fix=OTHER_BASE,
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    asked = {name: value for name, value in others.items() if name not in _WITHOUT_EFFECT and value is not None}
    asked |= {"attention_mask": attention_mask} if attention_mask is not None else {}
    asked |= {"dropout": dropout} if dropout else {}
    asked |= {"is_causal": False} if not causal else {}
    if asked:
        raise ModelError(
            f"the attention of {type(module).__name__} asks for {', '.join(sorted(asked))}, which is not computed here",
            where="model.id",
            fix=OTHER_BASE,
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    limits = Limits(int(sliding_window or 0), float(softcap or 0.0))
    given = (limits,) if limits != NO_LIMITS else ()
    layer = int(module.layer_idx)  # pyright: ignore[reportArgumentType]
    return layout.attend(layer, query[0], key[0], value[0], scale, *given)[None], None


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of query [..., heads, n, d] to key and value [..., heads, m, d] where `mask` [.., n, m] bool allows it.

    SDPA, or with a soft cap, which SDPA does not have, the products themselves and a softmax in fp32. A mask of None is
    causal with n = m. A row that sees nothing gives zeros with SDPA's rule for it.
    """
    if not softcap:
        return dot_product_attention(query, key, value, mask, scale)
    if mask is None:
        mask = visible(query.shape[-2], key.shape[-2], 0, query.device)
    scores = query @ key.transpose(-1, -2) * scale
    scores = torch.tanh(scores / softcap) * softcap
    shares = torch.softmax(scores.float().masked_fill(~mask, torch.finfo(torch.float32).min), dim=-1)
    return shares.to(query.dtype) @ value


def visible(n: int, m: int, window: int, device: torch.device) -> torch.Tensor:
    """[n, m] bool: the last n of m tokens of a row see those up to themselves, at most `window` of them (0: all)."""
    mask = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)
    return mask.triu(m - n - window + 1) if window else mask


def register() -> None:
    """Register `attend` with transformers under the name `ATTENTION`. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end: row i is tokens starts[i] to starts[i+1], with causal attention within it. Used on CPUs."""

    starts: tuple[int, ...]

    @classmethod
    def of(cls, lengths: list[int]) -> Packed:
        """The layout of rows with these lengths (tokens)."""
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        return cls(tuple(starts))

    def positions(self) -> torch.Tensor:
        """Position of every token within its row, int64 [T], on the CPU."""
        return torch.cat([torch.arange(stop - start) for start, stop in pairwise(self.starts)])

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        limits: Limits = NO_LIMITS,
    ) -> torch.Tensor:
        """SDPA, one call for each row."""
        return attend_by_row(query, key, value, self.starts, scale, limits)


def attend_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: Sequence[int],
    scale: float,
    limits: Limits = NO_LIMITS,
) -> torch.Tensor:
    """torch's scaled_dot_product_attention, one call for each row; the reference for every other implementation.

    Shapes as in `Layout.attend`; row i is tokens starts[i] to starts[i+1].
    """
    key, value = repeat_heads(query, key), repeat_heads(query, value)
    # Split, not sliced: the gradient of each slice would be as long as all rows.
    lengths = [b - a for a, b in pairwise(starts)]
    rows = []
    for n, q, k, v in zip(lengths, *(part[None].split(lengths, 2) for part in (query, key, value)), strict=True):
        if n:
            mask = visible(n, n, limits.window, query.device) if limits.hides(n) else None
            rows.append(masked_attention(q, k, v, scale, softcap=limits.softcap, mask=mask)[0])
    return torch.cat(rows, dim=1).transpose(0, 1)


def repeat_heads(query: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Key or value [kv heads, T, d] -> [heads, T, d], each head repeated for the query heads that share it."""
    return part.repeat_interleave(query.shape[0] // part.shape[0], 0)


@dataclass(frozen=True)
class Ragged:
    """Packed rows for a variable-length attention kernel (chosen by `attention_backends`). Used on GPUs.

    `bounds` [rows + 2] int32 on the device: the first token of each row, the end of the last row, and the end of all
    tokens. Rows that only fill up the number of rows are empty. Padding is one more row, which may be empty, so that
    batches of equal shapes differ only in tensor values.
    `longest` is the largest row length (tokens) that the kernel has to expect.
    """

    starts: tuple[int, ...]
    bounds: torch.Tensor
    longest: int
    kernel: Kernel

    @classmethod
    def of(cls, lengths: Sequence[int], kernel: Kernel, *, n_tok: int = 0, width: int = 0, n_rows: int = 0) -> Ragged:
        """The layout of rows with these lengths (tokens), on the CPU; `n_tok`, `width` and `n_rows` as for
        `Padded.of`."""
        starts = Packed.of(list(lengths)).starts
        end = max(n_tok, starts[-1])
        bounds = torch.tensor([*starts, *[starts[-1]] * (n_rows - len(lengths)), end], dtype=torch.int32)
        return cls(starts, bounds, max(width, end - starts[-1], *lengths), kernel)

    @property
    def n_tok(self) -> int:
        """Number of tokens, padding included. Waits for the device if `bounds` is there."""
        return int(self.bounds[-1])

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Tensors that a captured step overwrites with those of its next batch."""
        return (self.bounds,)

    def with_inputs(self, inputs: Sequence[torch.Tensor]) -> Ragged:
        """The same layout with these tensors as its `inputs`."""
        (bounds,) = inputs
        return replace(self, bounds=bounds)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        limits: Limits = NO_LIMITS,
    ) -> torch.Tensor:
        """Call the kernel; in fp32, which is for checking and which such kernels do not support, SDPA for each row."""
        if query.dtype == torch.float32:
            padding = [query.shape[1]] if query.shape[1] > self.starts[-1] else []
            return attend_by_row(query, key, value, [*self.starts, *padding], scale, limits)
        if limits.softcap or limits.hides(self.longest):
            raise ModelError(
                "a variable-length kernel was given rows longer than the layer's window, or a soft cap",
                where="model.id",
                fix="report this defect: `model.pack` pads such rows",
            )
        return self.kernel(query, key, value, self, scale)


#: (query [heads, T, d], key and value [kv heads, T, d], rows, scale) -> [T, heads, d]
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Ragged, float], torch.Tensor]


@dataclass(frozen=True)
class Padded:
    """Packed rows that are padded to [rows, width] for attention only, so that one SDPA call serves all. Used on GPUs.

    `source` [rows * width] is the token at each padded position, `place` [T] the padded position of each token; both
    int64 on the device, negative where there is none.
    """

    starts: tuple[int, ...]
    n_rows: int
    source: torch.Tensor
    place: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], *, n_tok: int = 0, width: int = 0, n_rows: int = 0) -> Padded:
        """The layout of rows with these lengths (tokens), on the CPU.

        `n_tok`, `width` and `n_rows` are lower bounds of the numbers of tokens, of tokens in a row and of rows, so that
        many batches get the same shape. The width is rounded up to a multiple of `_WIDTH_STEP` in any case.
        """
        starts = Packed.of(list(lengths)).starts
        width = -(-max(width, *lengths) // _WIDTH_STEP) * _WIDTH_STEP
        source = torch.full((max(n_rows, len(lengths)), width), -1)
        place = torch.full((max(n_tok, starts[-1]),), -1)
        for row, (start, stop) in enumerate(pairwise(starts)):
            source[row, : stop - start] = torch.arange(start, stop)
            place[start:stop] = torch.arange(row * width, row * width + stop - start)
        return cls(starts, len(source), source.flatten(), place)

    @property
    def n_tok(self) -> int:
        """Number of tokens, padding included."""
        return self.place.shape[0]

    @property
    def longest(self) -> int:
        """Width of the padded batch: tokens in a row, padding included."""
        return self.source.shape[0] // self.n_rows

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Tensors that a captured step overwrites with those of its next batch."""
        return self.source, self.place

    def with_inputs(self, inputs: Sequence[torch.Tensor]) -> Padded:
        """The same layout with these tensors as its `inputs`."""
        source, place = inputs
        return replace(self, source=source, place=place)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        limits: Limits = NO_LIMITS,
    ) -> torch.Tensor:
        """One SDPA call on the padded batch. Rows are left-aligned, so the causal mask also hides the padding."""
        q, k, v = (_gather_rows(tensor.transpose(0, 1), self.source, self.place) for tensor in (query, key, value))
        return self.attend_padded(q, k, v, scale, limits)

    def attend_padded(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, limits: Limits = NO_LIMITS
    ) -> torch.Tensor:
        """The same of query [rows * width, heads, d], key and value that are padded already -> [T, heads, d]."""
        q, k, v = (part.view(self.n_rows, -1, *part.shape[1:]).transpose(1, 2) for part in (query, key, value))
        if limits.softcap or limits.hides(self.longest):
            k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
            mask = visible(self.longest, self.longest, limits.window, q.device)
            out = masked_attention(q, k, v, scale, softcap=limits.softcap, mask=mask)
        else:
            out = dot_product_attention(q, k, v, None, scale)
        out = out.transpose(1, 2).reshape(-1, out.shape[1], out.shape[3])
        return _gather_rows(out, self.place, self.source)


#: Layouts of packed rows: on a CPU, on a GPU with SDPA, on a GPU with a variable-length kernel.
Rows = Packed | Padded | Ragged


def _gather_rows(x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Row i of the result is x[index[i]], or zero where that is negative; `inverse` maps back, for the gradient."""
    if x.is_cuda:
        from fastconv.engine.kernels.elementwise import gather_rows

        return gather_rows(x, index, inverse)
    mask = (index >= 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return x.index_select(0, index.clamp(min=0)) * mask


@dataclass(frozen=True)
class PrefixGroup:
    """A prefix followed by branches (lengths in tokens); a branch attends to the prefix and itself, not to other
    branches."""

    prefix_tok: int
    branches_tok: tuple[int, ...]


@dataclass(frozen=True)
class PrefixTrees:
    """Prefix groups laid end to end, so that rows with a common prefix compute it once.

    `masks[i][j]` [branch, prefix + branch] bool says what the tokens of branch j of group i attend to.
    """

    groups: tuple[PrefixGroup, ...]
    masks: tuple[tuple[torch.Tensor, ...], ...]

    @classmethod
    def of(cls, groups: Sequence[PrefixGroup], device: torch.device) -> tuple[PrefixTrees, torch.Tensor]:
        """(layout, position of every token within its row [T] int64) of these groups, on `device`."""
        masks, positions = [], []
        for group in groups:
            whole = [torch.ones(n, group.prefix_tok + n, dtype=torch.bool, device=device) for n in group.branches_tok]
            masks.append(tuple(mask.tril(group.prefix_tok) for mask in whole))
            positions += range(group.prefix_tok)
            for n_tok in group.branches_tok:
                positions += range(group.prefix_tok, group.prefix_tok + n_tok)
        return cls(tuple(groups), tuple(masks)), torch.tensor(positions, device=device)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        limits: Limits = NO_LIMITS,
    ) -> torch.Tensor:
        """SDPA, one call for each prefix and one for each branch."""
        repeats = query.shape[0] // key.shape[0]
        key, value = key.repeat_interleave(repeats, 0)[None], value.repeat_interleave(repeats, 0)[None]
        query, parts, start = query[None], [], 0
        for group, masks in zip(self.groups, self.masks, strict=True):
            stop = start + group.prefix_tok
            k, v = key[:, :, start:stop], value[:, :, start:stop]
            if group.prefix_tok:
                q = query[:, :, start:stop]
                mask = visible(stop - start, stop - start, limits.window, q.device) if limits.window else None
                parts.append(masked_attention(q, k, v, scale, softcap=limits.softcap, mask=mask))
            for n_tok, mask in zip(group.branches_tok, masks, strict=True):
                start, stop = stop, stop + n_tok
                if not n_tok:
                    continue  # a choice of one token is predicted from the prefix alone
                q, keys, values = (part[:, :, start:stop] for part in (query, key, value))
                seen = None  # a prompt that shares nothing is a row like any other
                if group.prefix_tok:
                    keys, values, seen = torch.cat([k, keys], dim=2), torch.cat([v, values], dim=2), mask
                if limits.hides(keys.shape[2]):
                    seen = mask & visible(n_tok, keys.shape[2], limits.window, q.device)
                parts.append(masked_attention(q, keys, values, scale, softcap=limits.softcap, mask=seen))
            start = stop
        return torch.cat(parts, dim=2)[0].transpose(0, 1)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`; to a GPU through pinned memory, so that the host does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
