"""The stacked-LoRA kernel: the branches of a layer, for one slot or many, in a fixed number of launches.

`StackedLinear` calls the `StackedKernel` of its route. This module prepares the tables: the addresses of every slot's
weights and gradients, and the tokens of every slot. `lora_triton` has the kernels, `lora_launch` their autograd function;
they, and with them Triton, are imported at the first call.
"""

from __future__ import annotations

import importlib.util
import os
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from fastconv.engine.attention import to_device
from fastconv.engine.kernels.lora_tables import (
    GraphTables,
    LayerCall,
    LiveSlots,
    PackedAdapters,
    Tiling,
    TokenRouting,
    WeightTable,
)
from fastconv.engine.lora import Adapter, Route, Slot, StackedLinear
from fastconv.errors import ModelError, TrainingError

#: Weight tables kept for reuse: a training run needs one, an evaluation beside it another.
_TABLES_KEPT = 8
#: Low-rank values of a token over all modules of a call: with more, sums and weights do not fit into the registers and the
#: shared memory of a block (compiled for compute capability 8.9 and 9.0: at most 80 and 128 KiB).
_MOST_TOGETHER = 192


@dataclass
class StackedKernel:
    """State that a stack's layers share: the live slots' weights in the compute dtype, and the tables of their
    addresses.

    Weights are cast once per `Stack.live` block (fp32 is used in place), into buffers whose addresses stay the same as
    long as the adapter exists. Whoever changes an adapter within a block must call `refresh`. Kernels find weights,
    gradients and tokens through tables on the device alone, so a captured graph (`own_tables`) serves other slots and
    other spans once their tables are copied into its own (`load_tables`). Raises ModelError if triton is not installed or cannot run on `device`.
    """

    device: torch.device
    tiling: Tiling = field(default_factory=Tiling)
    _cast: weakref.WeakKeyDictionary[Adapter, dict[torch.dtype, torch.Tensor]] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False
    )
    _tables: dict[Any, tuple[torch.Tensor, dict[str, WeightTable]]] = field(default_factory=dict, repr=False)
    _live: LiveSlots | None = None
    _rows: dict[Any, TokenRouting] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if (reason := why_unusable(self.device)) is not None:
            raise ModelError(f"the stacked kernel cannot run: {reason}", where="kernel", fix='use kernel = "plain"')

    def serves(self, layer: StackedLinear, x: torch.Tensor) -> bool:
        """Whether the kernels can compute this layer: a weight of x's dtype (so not 4-bit), and at least one token."""
        return layer.base.weight.dtype == x.dtype and x.numel() > 0

    def forward(self, layer: StackedLinear, x: torch.Tensor) -> torch.Tensor:
        """W x + b + the live branches, for x [..., T, in] -> [..., T, out].

        Gradients of A and B are added to their `.grad`. Raises TrainingError if a trainable weight has none.
        """
        y = self.joined((layer,), layer.base.weight, layer.base.bias, x)
        return layer.base(x) if y is None else y

    def joined(
        self, layers: Sequence[StackedLinear], weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor
    ) -> torch.Tensor | None:
        """As `forward` for up to `MOST_JOINED` layers of the same input, [..., T, sum of outs]: their outputs side by side.
        `weight` and `bias` are theirs below one another. None if they cannot be computed together, or carry nothing."""
        from fastconv.engine.kernels.lora_launch import stacked_linear

        route = layers[0].route
        live = self._live_slots(route, x.dtype)
        found = live.joined([layer.name for layer in layers])
        if found is None or (len(layers) > 1 and len(layers) * found[0].width > _MOST_TOGETHER):
            return None
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        call = LayerCall(
            weight, bias, found[0], self._routing(route, len(flat)), live, route.dropout_seeds if live.drops else None,
            tuple(layer.base.out_features for layer in layers), tuple(layer.salt for layer in layers), self.tiling, found[1],
        )  # fmt: skip
        trained = [
            weight
            for slot in live.slots
            if slot.trainable is not None
            for layer in layers
            for weight in slot.trainable.weights.get(layer.name, ())
            if weight.requires_grad
        ]
        return stacked_linear(flat, call, trained).view(*x.shape[:-1], -1)

    def refresh(self) -> None:
        """Cast the live adapters' weights again, to the same addresses. The host does not wait."""
        if self._live is None:
            return
        for slot, (frozen, _) in zip(self._live.slots, self._live.packed, strict=True):
            current, _ = self._pack_slot(slot, self._live.dtype)
            if frozen is not None and current is not None and len(slot.frozen) > 1:
                frozen.flat.copy_(current.flat)

    def release(self) -> None:
        """Forget the live slots; the next pass casts its weights again."""
        self._live = None
        self._rows = {}

    def structure(self, route: Route, dtype: torch.dtype) -> Hashable:
        """What two passes over equally many tokens must share for one graph to serve both."""
        return self._live_slots(route, dtype).structure

    def own_tables(self, route: Route, dtype: torch.dtype, n_tok: int) -> GraphTables:
        """Until the slots are released, passes over `n_tok` tokens read tables of their own: those of a graph to be
        captured, which cannot copy from the host."""
        live, rows = self._live_slots(route, dtype).copied(), self._routing(route, n_tok).copied()
        self._live, self._rows[_routing_key(route, n_tok)] = live, rows
        return GraphTables(live.tables, live.scales, live.thresholds, rows.whole)

    def load_tables(self, tables: GraphTables, route: Route, dtype: torch.dtype, n_tok: int) -> None:
        """Let a captured graph compute with what is live now, whose weights are cast if they were not yet."""
        tables.load(self._live_slots(route, dtype), self._routing(route, n_tok))

    def _live_slots(self, route: Route, dtype: torch.dtype) -> LiveSlots:
        """The live slots' weights and tables; made again if the slots changed since the last call."""
        live, seeded = self._live, route.dropout_seeds is not None
        if live is None or live.slots is not route.slots or (live.dtype, live.seeded) != (dtype, seeded):
            live = self._live = self._make_live(route.slots, dtype, seeded)
        return live

    def _make_live(self, slots: tuple[Slot, ...], dtype: torch.dtype, seeded: bool) -> LiveSlots:
        rates = [slot.dropout if seeded and slot.trainable is not None else 0.0 for slot in slots]
        packed = tuple(self._pack_slot(slot, dtype) for slot in slots)
        # with the dtype: what was fp32 at an address may be 16 bits of another adapter later
        key = dtype, *((_key(slot, pair), rate) for slot, pair, rate in zip(slots, packed, rates, strict=True))
        if key not in self._tables:
            if len(self._tables) == _TABLES_KEPT:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = _addresses(slots, packed, self.device)
        tables, layers = self._tables[key]
        scales = [
            [
                [
                    frozen.scale_of(module) if frozen else 0.0,
                    trained.scale_of(module) / (1.0 - rate) if trained else 0.0,
                ]
                for (frozen, trained), rate in zip(packed, rates, strict=True)
            ]
            for module in layers
        ]
        return LiveSlots(
            slots, dtype, seeded, any(rates), packed, tables, layers, to_device(torch.tensor(scales), self.device),
            to_device(torch.tensor([round(rate * 2**24) for rate in rates], dtype=torch.int32), self.device),
        )  # fmt: skip

    def _pack_slot(self, slot: Slot, dtype: torch.dtype) -> tuple[PackedAdapters | None, PackedAdapters | None]:
        """(the slot's frozen adapters as one, its trainable adapter) in this dtype; None where there is none."""
        frozen = None
        if len(slot.frozen) == 1:
            frozen = self._pack(slot.frozen[0], dtype)
        elif slot.frozen:
            frozen = _joined(slot.frozen, dtype)
        return frozen, None if slot.trainable is None else self._pack(slot.trainable, dtype)

    def _pack(self, adapter: Adapter, dtype: torch.dtype) -> PackedAdapters:
        flat = adapter.flat.detach()
        if dtype != flat.dtype:
            buffers = self._cast.setdefault(adapter, {})
            if dtype not in buffers:
                buffers[dtype] = torch.empty_like(flat, dtype=dtype)
            flat = buffers[dtype].copy_(flat)
        offsets, at = {}, 0
        for module, (n_in, n_out) in adapter.sizes.items():
            r = adapter.ranks[module]
            offsets[module] = (at, at + r * n_in, r)
            at += r * (n_in + n_out)
        return PackedAdapters(flat, offsets, adapter.scales)

    def _routing(self, route: Route, n_tok: int) -> TokenRouting:
        """The token tables of this pass, which all its layers share; kept while the slots are live."""
        key = _routing_key(route, n_tok)
        if key not in self._rows:
            self._rows[key] = token_routing(route.spans or ((0, n_tok),), n_tok, self.tiling, self.device)
        return self._rows[key]


def _routing_key(route: Route, n_tok: int) -> Hashable:
    return route.spans, n_tok, len(route.slots)


def why_unusable(device: torch.device) -> str | None:
    """Why the kernel cannot run on this device, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a GPU"
    return None


def token_routing(spans: Sequence[tuple[int, int]], n_tok: int, tiling: Tiling, device: torch.device) -> TokenRouting:
    """The token tables of a pass: each slot's span (start, stop) cut into tiles and chunks, from its own start."""
    parts = [
        _split_spans(spans, size, -(-n_tok // size) + len(spans) - 1) for size in (tiling.shrink_m, tiling.expand_m)
    ]
    for size in (tiling.chunk, tiling.wide_chunk):
        ends = list(accumulate(-(-(stop - start) // size) for start, stop in spans))
        of_slot = list(zip([0, *ends], ends, strict=False))
        parts += [_split_spans(spans, size, -(-n_tok // size) + len(spans) - 1), of_slot]
    tables = [torch.tensor(part, dtype=torch.int32).reshape(-1) for part in parts]
    return TokenRouting.of(n_tok, to_device(torch.cat(tables), device), [len(table) for table in tables])


def _split_spans(spans: Sequence[tuple[int, int]], size: int, n: int) -> list[tuple[int, int, int]]:
    """`n` pieces (slot, start, stop) of at most `size` tokens; surplus pieces are empty."""
    pieces = [
        (slot, at, min(at + size, stop)) for slot, (start, stop) in enumerate(spans) for at in range(start, stop, size)
    ]
    return pieces + [(0, 0, 0)] * (n - len(pieces))


def _joined(adapters: Sequence[Adapter], dtype: torch.dtype) -> PackedAdapters:
    """Frozen adapters as one: for each module the A of those that target it stacked, their B side by side, scaled."""
    parts: list[torch.Tensor] = []
    offsets: dict[str, tuple[int, int, int]] = {}
    at = 0
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.sizes):
        targeting = [adapter for adapter in adapters if module in adapter.weights]
        a = torch.cat([adapter.weights[module][0].detach() for adapter in targeting])
        b = torch.cat([adapter.weights[module][1].detach() * adapter.scales[module] for adapter in targeting], dim=1)
        offsets[module] = (at, at + a.numel(), a.shape[0])
        at += a.numel() + b.numel()
        parts += [a.reshape(-1).to(dtype), b.reshape(-1).to(dtype)]
    return PackedAdapters(torch.cat(parts), offsets, dict.fromkeys(offsets, 1.0))


def _key(slot: Slot, pair: tuple[PackedAdapters | None, PackedAdapters | None]) -> Any:
    """Everything that a slot's row of the weight table depends on."""
    ranks = tuple(
        (a.shape.r, a.shape.targets, a.shape.layers, tuple(a.shape.rank_pattern.items())) for a in slot.adapters
    )
    starts = tuple(packed.flat.data_ptr() if packed else 0 for packed in pair)
    if slot.trainable is None:
        return ranks, starts, len(slot.frozen)
    first = next(iter(slot.trainable.weights.values()))[0]
    return ranks, starts, len(slot.frozen), first.requires_grad, 0 if first.grad is None else first.grad.data_ptr()


def _addresses(
    slots: Sequence[Slot], pairs: Sequence[tuple[PackedAdapters | None, PackedAdapters | None]], device: torch.device
) -> tuple[torch.Tensor, dict[str, WeightTable]]:
    """(tables [modules, slots, 8], the weight table by module) of all that any slot's adapter targets, copied at once."""
    modules = list(dict.fromkeys(module for pair in pairs for packed in pair if packed for module in packed.offsets))
    rows = [[_table_row(module, slot, pair) for slot, pair in zip(slots, pairs, strict=True)] for module in modules]
    tables = to_device(torch.tensor(rows, dtype=torch.int64).view(len(modules), len(slots), 8), device)
    return tables, {
        module: WeightTable(
            table, _padded(max(row[6] for row in module_rows)), _padded(max(row[7] for row in module_rows)),
            all(address % 16 == 0 for row in module_rows for address in row[:4])
            and all(rank % 8 == 0 for row in module_rows for rank in row[6:]),
        )
        for module, module_rows, table in zip(modules, rows, tables.split(1), strict=True)
    }  # fmt: skip


def _table_row(module: str, slot: Slot, pair: tuple[PackedAdapters | None, PackedAdapters | None]) -> list[int]:
    """A row of `WeightTable.table`."""
    addresses, ranks, grads = [], [], [0, 0]
    for packed in pair:
        a, b, rank = (0, 0, 0) if packed is None else packed.offsets.get(module, (0, 0, 0))
        size, start = (packed.flat.element_size(), packed.flat.data_ptr()) if packed is not None and rank else (0, 0)
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
    """The rank padded for the kernels: a power of two, at least 16; 0 stays 0."""
    return max(16, 1 << (rank - 1).bit_length()) if rank else 0
