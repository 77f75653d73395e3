"""The stacked-LoRA kernel: one slot's or many slots' branches of a layer in a fixed number of launches.

`StackedLinear` gives its layer here when its route holds a `StackedKernel`. This module knows where every slot's
weights and gradients lie and which tokens belong to whom; `kernel_launch` holds the autograd function, `kernel_triton`
the kernels. Triton is imported only when a `StackedKernel` is made.
"""

from __future__ import annotations

import importlib.util
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastconv.engine.kernels.lora_tables import LayerCall, LiveSlots, PackedAdapters, Tiling, TokenRouting, WeightTable
from fastconv.engine.lora import Adapter
from fastconv.engine.stacked_linear import Route, Slot, StackedLinear
from fastconv.engine.transfer import to_device
from fastconv.errors import ModelError, TrainingError

#: Tables of addresses that are kept; a training run needs one, an evaluation beside it another.
_TABLES_KEPT = 8


@dataclass
class StackedKernel:
    """What a stack's layers share: the live slots' weights in the compute dtype and the tables that point to them.

    Weights are narrowed once per `Stack.live` block (fp32 ones are used as they lie), in buffers that keep their
    address as long as the adapter lives. Who changes an adapter inside a block, or replays a captured graph, calls
    `refresh`. Raises ModelError where triton is missing or has nothing to run on.
    """

    device: torch.device
    tiling: Tiling = field(default_factory=Tiling)
    _narrow: weakref.WeakKeyDictionary[Adapter, dict[torch.dtype, torch.Tensor]] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False
    )
    _tables: dict[Any, dict[str, WeightTable]] = field(default_factory=dict, repr=False)
    _live: LiveSlots | None = None
    _rows: dict[Any, TokenRouting] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if (reason := why_unusable(self.device)) is not None:
            raise ModelError(f"the stacked kernel cannot run: {reason}", where="kernel", fix='use kernel = "plain"')

    def serves(self, layer: StackedLinear, x: torch.Tensor) -> bool:
        """Whether the kernels can take this layer: a plain weight of x's dtype (not 4-bit), and any tokens at all."""
        return layer.base.weight.dtype == x.dtype and x.numel() > 0

    def prepare(self, route: Route, dtype: torch.dtype, n_tok: int) -> None:
        """Make ready what a pass over `n_tok` tokens needs from the host, before a graph is captured."""
        self._ready(route, dtype)
        self._rows_of(route, n_tok)

    def forward(self, layer: StackedLinear, x: torch.Tensor) -> torch.Tensor:
        """W x + b + the live branches, for x [..., T, in] -> [..., T, out].

        Gradients of A and B are added to their `.grad`. Raises TrainingError where a trainable weight has none.
        """
        from fastconv.engine.kernels.lora_triton import stacked_linear

        route = layer.route
        live = self._ready(route, x.dtype)
        places = live.layers.get(layer.name)
        if places is None:
            return layer.base(x)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        call = LayerCall(
            layer.base.weight, layer.base.bias, places, self._rows_of(route, len(flat)), live,
            route.dropout_seeds if live.drops else None, layer.salt, self.tiling,
        )  # fmt: skip
        trained = [
            weight
            for slot in live.slots
            if slot.trainable is not None
            for weight in slot.trainable.weights.get(layer.name, ())
            if weight.requires_grad
        ]
        return stacked_linear(flat, call, trained).view(*x.shape[:-1], -1)

    def refresh(self) -> None:
        """Read the live adapters' weights again, at the same addresses. No host synchronisation."""
        if self._live is None:
            return
        for slot, (frozen, _) in zip(self._live.slots, self._live.lows, strict=True):
            again, _ = self._lows(slot, self._live.dtype)
            if frozen is not None and again is not None and len(slot.frozen) > 1:
                frozen.flat.copy_(again.flat)

    def release(self) -> None:
        """Nothing is live any more; the next pass reads its weights anew."""
        self._live = None
        self._rows = {}

    def graph_state(self) -> tuple[LiveSlots | None, dict[Any, TokenRouting]]:
        """What a captured graph points to: to be kept as long as the graph, and given to `refresh_graph` before a replay."""
        return self._live, dict(self._rows)

    def refresh_graph(self, held: tuple[LiveSlots | None, dict[Any, TokenRouting]]) -> None:
        """Read the weights that a captured graph points to again, at the same addresses."""
        self._live = held[0]
        self.refresh()
        self._live = None

    def _ready(self, route: Route, dtype: torch.dtype) -> LiveSlots:
        """What is live now; made anew when the slots are others than last time."""
        live, seeded = self._live, route.dropout_seeds is not None
        if live is None or live.slots is not route.slots or (live.dtype, live.seeded) != (dtype, seeded):
            live = self._live = self._prepare(route.slots, dtype, seeded)
        return live

    def _prepare(self, slots: tuple[Slot, ...], dtype: torch.dtype, seeded: bool) -> LiveSlots:
        rates = [slot.dropout if seeded and slot.trainable is not None else 0.0 for slot in slots]
        lows = tuple(self._lows(slot, dtype) for slot in slots)
        key = tuple((_key(slot, pair), rate) for slot, pair, rate in zip(slots, lows, rates, strict=True))
        if key not in self._tables:
            if len(self._tables) == _TABLES_KEPT:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = _addresses(slots, lows, self.device)
        scales = [
            [frozen.scale if frozen else 0.0, trained.scale / (1.0 - rate) if trained else 0.0]
            for (frozen, trained), rate in zip(lows, rates, strict=True)
        ]
        return LiveSlots(
            slots, dtype, seeded, any(rates), lows, self._tables[key], to_device(torch.tensor(scales), self.device),
            to_device(torch.tensor([round(rate * 2**24) for rate in rates], dtype=torch.int32), self.device),
        )  # fmt: skip

    def _lows(self, slot: Slot, dtype: torch.dtype) -> tuple[PackedAdapters | None, PackedAdapters | None]:
        """The slot's frozen adapters as one, and the trainable one, in this dtype."""
        frozen = None
        if len(slot.frozen) == 1:
            frozen = self._low(slot.frozen[0], dtype)
        elif slot.frozen:
            frozen = _joined(slot.frozen, dtype)
        return frozen, None if slot.trainable is None else self._low(slot.trainable, dtype)

    def _low(self, adapter: Adapter, dtype: torch.dtype) -> PackedAdapters:
        flat = adapter.flat.detach()
        if dtype != flat.dtype:
            kept = self._narrow.setdefault(adapter, {})
            if dtype not in kept:
                kept[dtype] = torch.empty_like(flat, dtype=dtype)
            flat = kept[dtype].copy_(flat)
        offsets, at, r = {}, 0, adapter.shape.r
        for module, (n_in, n_out) in adapter.sizes.items():
            offsets[module] = (at, at + r * n_in, r)
            at += r * (n_in + n_out)
        return PackedAdapters(flat, offsets, adapter.scale)

    def _rows_of(self, route: Route, n_tok: int) -> TokenRouting:
        """The tables of this pass's tokens, which all its layers use; kept while the slots are live."""
        key = (route.spans, n_tok, len(route.slots))
        if key not in self._rows:
            self._rows[key] = token_routing(route.spans or ((0, n_tok),), n_tok, self.tiling, self.device)
        return self._rows[key]


def why_unusable(device: torch.device) -> str | None:
    """Why the kernel cannot run here, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a GPU"
    return None


def token_routing(spans: Sequence[tuple[int, int]], n_tok: int, tiling: Tiling, device: torch.device) -> TokenRouting:
    """Cut each slot's span into tiles and chunks, from its own start."""
    sizes = (tiling.shrink_m, tiling.expand_m, tiling.chunk)
    cut = [_cut(spans, size, -(-n_tok // size) + len(spans) - 1) for size in sizes]
    ends, chunks_of = 0, []
    for start, stop in spans:
        n = -(-(stop - start) // tiling.chunk)
        chunks_of.append((ends, ends + n))
        ends += n
    parts = [torch.tensor(part, dtype=torch.int32).reshape(-1) for part in (*cut, chunks_of)]
    shrinks, expands, chunks, of = to_device(torch.cat(parts), device).split([len(part) for part in parts])
    return TokenRouting(n_tok, shrinks.view(-1, 3), expands.view(-1, 3), chunks.view(-1, 3), of.view(-1, 2))


def _cut(spans: Sequence[tuple[int, int]], size: int, n: int) -> list[tuple[int, int, int]]:
    """`n` pieces (slot, start, stop) of at most `size` tokens, the surplus empty."""
    pieces = [
        (slot, at, min(at + size, stop)) for slot, (start, stop) in enumerate(spans) for at in range(start, stop, size)
    ]
    return pieces + [(0, 0, 0)] * (n - len(pieces))


def _joined(adapters: Sequence[Adapter], dtype: torch.dtype) -> PackedAdapters:
    """Frozen adapters as one: A stacked, B side by side with the scales in, module by module, those that have it."""
    parts: list[torch.Tensor] = []
    offsets: dict[str, tuple[int, int, int]] = {}
    at = 0
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.sizes):
        having = [adapter for adapter in adapters if module in adapter.weights]
        a = torch.cat([adapter.weights[module][0].detach() for adapter in having])
        b = torch.cat([adapter.weights[module][1].detach() * adapter.scale for adapter in having], dim=1)
        offsets[module] = (at, at + a.numel(), a.shape[0])
        at += a.numel() + b.numel()
        parts += [a.reshape(-1).to(dtype), b.reshape(-1).to(dtype)]
    return PackedAdapters(torch.cat(parts), offsets, 1.0)


def _key(slot: Slot, pair: tuple[PackedAdapters | None, PackedAdapters | None]) -> Any:
    """All that a slot's addresses follow from."""
    ranks = tuple((a.shape.r, a.shape.targets) for a in slot.adapters)
    starts = tuple(low.flat.data_ptr() if low else 0 for low in pair)
    if slot.trainable is None:
        return ranks, starts, len(slot.frozen)
    first = next(iter(slot.trainable.weights.values()))[0]
    return ranks, starts, len(slot.frozen), first.requires_grad, 0 if first.grad is None else first.grad.data_ptr()


def _addresses(
    slots: Sequence[Slot], lows: Sequence[tuple[PackedAdapters | None, PackedAdapters | None]], device: torch.device
) -> dict[str, WeightTable]:
    """For every module that any slot's adapter targets, where its weights lie; one copy to the device for all."""
    modules = list(dict.fromkeys(module for pair in lows for low in pair if low for module in low.offsets))
    lines = [[_line(module, slot, pair) for slot, pair in zip(slots, lows, strict=True)] for module in modules]
    tables = to_device(torch.tensor(lines, dtype=torch.int64).view(len(modules), len(slots), 8), device)
    return {
        module: WeightTable(
            table, _padded(max(line[6] for line in mine)), _padded(max(line[7] for line in mine)),
            all(address % 16 == 0 for line in mine for address in line[:4])
            and all(rank % 8 == 0 for line in mine for rank in line[6:]),
        )
        for module, mine, table in zip(modules, lines, tables.unbind(), strict=True)
    }  # fmt: skip


def _line(module: str, slot: Slot, pair: tuple[PackedAdapters | None, PackedAdapters | None]) -> list[int]:
    """A row of `WeightTable.table`."""
    addresses, ranks, grads = [], [], [0, 0]
    for low in pair:
        a, b, rank = (0, 0, 0) if low is None else low.offsets.get(module, (0, 0, 0))
        size, start = (low.flat.element_size(), low.flat.data_ptr()) if low is not None and rank else (0, 0)
        addresses += [start + a * size, start + b * size]
        ranks.append(rank)
    if slot.trainable is not None and module in slot.trainable.weights:
        grads = [_grad_address(weight, module) for weight in slot.trainable.weights[module]]
    return [*addresses, *grads, *ranks]


def _grad_address(weight: torch.nn.Parameter, module: str) -> int:
    if not weight.requires_grad:
        return 0
    if weight.grad is None or weight.grad.dtype != torch.float32 or not weight.grad.is_contiguous():
        raise TrainingError(
            "a trainable adapter has no fp32 gradient to add to", where=module, fix="call Adapter.train(grad) first"
        )
    return weight.grad.data_ptr()


def _padded(rank: int) -> int:
    """A rank as the kernels see it: a power of two, at least 16, or 0."""
    return max(16, 1 << (rank - 1).bit_length()) if rank else 0
