"""The stack: adapters live on the resident base, in order, all but the last of them frozen.

`y = W x + sum_i s_i B_i A_i d_i(x)`: nothing is merged, nothing is reloaded, a swap assigns a few references.
Adapter weights are fp32 views into one flat tensor, so an optimizer step, a checksum and a save are each one pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from fastconv.draws import seed_of
from fastconv.engine.base import Base, pack
from fastconv.errors import AdapterError, TrainingError
from fastconv.recipe import LoraSettings, canonical_json

#: Token ids of the fixed probe are drawn from this name; 3 rows of 24 tokens are plenty to see a lost adapter.
_PROBE_ROWS, _PROBE_TOK = 3, 24
#: A recorded probe keeps this many logits per row; enough to tell two stacks apart, small enough to store.
_PROBE_KEPT = 16
#: How far the logits of one stack may lie apart on two occasions, by the base's precision.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


class Adapter:
    """LoRA weights for every target module of one base: per module A [r, in] and B [out, r], fp32.

    `flat` holds all of them in one tensor, in the order of `sizes`; `weights[module]` are views into it.
    """

    def __init__(
        self, shape: LoraSettings, base: str, sizes: Mapping[str, tuple[int, int]], flat: torch.Tensor
    ) -> None:
        self.shape = shape
        self.base = base
        self.sizes = dict(sizes)
        self.flat = flat
        self.weights: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        offset = 0
        for module, (n_in, n_out) in self.sizes.items():
            a = flat[offset : offset + shape.r * n_in].view(shape.r, n_in)
            offset += a.numel()
            b = flat[offset : offset + n_out * shape.r].view(n_out, shape.r)
            offset += b.numel()
            self.weights[module] = (nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False))
        if offset != flat.numel() or flat.dtype != torch.float32:
            raise ValueError("flat tensor does not fit the module sizes, or is not fp32")

    @property
    def scale(self) -> float:
        """alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023), alpha / r without (Hu et al. 2021)."""
        return self.shape.alpha / (math.sqrt(self.shape.r) if self.shape.rslora else self.shape.r)

    def train(self, grad: torch.Tensor | None) -> None:
        """Collect gradients into `grad` (fp32, like `flat`), or stop collecting with None."""
        offset = 0
        for pair in self.weights.values():
            for weight in pair:
                weight.requires_grad_(grad is not None)
                weight.grad = None if grad is None else grad[offset : offset + weight.numel()].view_as(weight)
                offset += weight.numel()

    def sha256(self) -> str:
        """sha256 (hex) of the weights' bytes."""
        return hashlib.sha256(self.flat.detach().cpu().numpy().tobytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """safetensors with PEFT's tensor names; what is needed to use them stands in the metadata."""
        tensors = {}
        for module, (a, b) in self.weights.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = a.detach().cpu().contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = b.detach().cpu().contiguous()
        about = {"lora": canonical_json(self.shape.model_dump(mode="json")), "base": self.base}
        return safetensors.torch.save(tensors, metadata=about)


@dataclass
class Slot:
    """Adapters that a span of tokens goes through; only `trainable` gets gradients, only it drops inputs out."""

    frozen: tuple[Adapter, ...] = ()
    trainable: Adapter | None = None
    dropout: float = 0.0

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Frozen ones first, then the trainable one."""
        return (*self.frozen, self.trainable) if self.trainable is not None else self.frozen


@dataclass
class Route:
    """Which slots are live, and which tokens of the current pass go through which.

    `spans[i]` is the token range of `slots[i]`, together they cover the pass; None sends all tokens through the only
    slot. `dropout_seeds` [T] (int32) is one seed per token, so that a mask depends on the row and the step alone,
    never on what else is in the batch.
    """

    slots: tuple[Slot, ...] = ()
    spans: tuple[tuple[int, int], ...] | None = None
    dropout_seeds: torch.Tensor | None = None


class StackedLinear(nn.Module):
    """A frozen linear layer and the live adapters' branches beside it."""

    def __init__(self, base: nn.Linear, name: str, route: Route) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.route = route
        self.salt = seed_of("dropout", name) & 0x7FFFFFFF

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., T, in] -> [..., T, out]."""
        y = self.base(x)
        if not self.route.slots:
            return y
        flat_x = x.reshape(-1, x.shape[-1])
        if self.route.spans is None:
            delta = self._branches(flat_x, self.route.slots[0], self.route.dropout_seeds)
        else:
            parts = []
            for slot, (start, stop) in zip(self.route.slots, self.route.spans, strict=True):
                seeds = None if self.route.dropout_seeds is None else self.route.dropout_seeds[start:stop]
                parts.append(self._branches(flat_x[start:stop], slot, seeds))
            delta = torch.cat(parts)
        return y + delta.view_as(y)

    def _branches(self, x: torch.Tensor, slot: Slot, seeds: torch.Tensor | None) -> torch.Tensor:
        """Sum of the slot's low-rank products for tokens x [T, in] -> [T, out], in x's dtype."""
        delta: torch.Tensor | None = None
        for adapter in slot.adapters:
            a, b = (weight.to(x.dtype) for weight in adapter.weights[self.name])
            given = x
            if adapter is slot.trainable and slot.dropout > 0 and seeds is not None:
                given = x * keep_mask(seeds, x.shape[-1], self.salt, slot.dropout).to(x.dtype)
            low = F.linear(given, a) * adapter.scale
            delta = F.linear(low, b) if delta is None else torch.addmm(delta, low, b.t())
        return x.new_zeros(x.shape[0], self.base.out_features) if delta is None else delta


def keep_mask(seeds: torch.Tensor, width: int, salt: int, p: float) -> torch.Tensor:
    """Inverted-dropout multipliers [T, width]: 0 with probability p, else 1/(1-p).

    Counter based: every element is a hash of (its token's seed, its channel, the module's salt), so the same row gets
    the same mask in any batch, on any device, and a kernel can draw it again instead of storing it. The mixer is the
    32-bit finaliser of Wellons' "hash prospector" (constants 7feb352d, 846ca68b); int32 products wrap as in C.
    """
    channels = torch.arange(width, dtype=torch.int32, device=seeds.device) * _signed(0x9E3779B1) + salt
    bits = _mix(seeds[:, None] ^ channels[None, :])
    threshold = round(p * 2**24)
    return ((bits & 0xFFFFFF) >= threshold).to(torch.float32) / (1.0 - p)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _signed(0x7FEB352D)
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


@dataclass(frozen=True)
class Probe:
    """Logits of a fixed token sequence under one stack, as numbers small enough for the ledger."""

    logits: tuple[float, ...]

    def distance(self, other: Probe) -> float:
        """Largest absolute difference in logits."""
        return max(abs(mine - theirs) for mine, theirs in zip(self.logits, other.logits, strict=True))


class Stack:
    """The live adapters of a base. One per base; made once, it replaces the target layers by stacked ones."""

    def __init__(self, base: Base, settings: LoraSettings) -> None:
        self.base = base
        self.settings = settings
        self.route = Route()
        self.sizes = _install(base, settings, self.route)
        self.base_probe = self.probe()

    def new_adapter(self, *seed_parts: object) -> Adapter:
        """A fresh adapter: A uniform as PEFT draws it (Kaiming, a = sqrt 5), B zero; drawn from named parts."""
        n = sum(self.settings.r * (n_in + n_out) for n_in, n_out in self.sizes.values())
        adapter = Adapter(self.settings, self.base.name, self.sizes, torch.zeros(n, device=self.base.device))
        for module, (a, _) in adapter.weights.items():
            generator = torch.Generator().manual_seed(seed_of("lora", module, *seed_parts))
            bound = 1.0 / math.sqrt(a.shape[1])
            values = torch.rand(a.shape, generator=generator) * (2 * bound) - bound
            a.data.copy_(values)
        return adapter

    def load_adapter(self, data: bytes, where: str) -> Adapter:
        """An adapter from `Adapter.to_bytes`. Raises AdapterError if it is damaged or made for another base."""
        tensors, about = _read_safetensors(data, where)
        if about.get("base") != self.base.name:
            raise AdapterError(
                "the adapter was made for another base model", where=where, fix="use the base it was trained on"
            )
        shape = LoraSettings.model_validate_json(about["lora"])
        parts = []
        for module, (n_in, n_out) in self.sizes.items():
            for letter, wanted in (("A", (shape.r, n_in)), ("B", (n_out, shape.r))):
                tensor = tensors.get(f"base_model.model.{module}.lora_{letter}.weight")
                if tensor is None or tuple(tensor.shape) != wanted:
                    found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
                    raise AdapterError(
                        f"lora_{letter} of {module} is {found}, not {wanted}",
                        where=where,
                        fix="use an adapter with this recipe's lora settings",
                    )
                parts.append(tensor.reshape(-1).float())
        flat = torch.cat(parts)
        if not bool(torch.isfinite(flat).all()):
            raise AdapterError("the adapter holds NaN or infinite weights", where=where, fix="train it again")
        return Adapter(shape, self.base.name, self.sizes, flat.to(self.base.device))

    @contextlib.contextmanager
    def live(self, *slots: Slot) -> Iterator[None]:
        """Make these slots live inside the block; outside, the base is bare again. Milliseconds, no copies."""
        before = self.route.slots, self.route.spans, self.route.dropout_seeds
        self.route.slots, self.route.spans, self.route.dropout_seeds = tuple(slots), None, None
        try:
            yield
        finally:
            self.route.slots, self.route.spans, self.route.dropout_seeds = before

    @torch.no_grad()
    def probe(self) -> Probe:
        """Logits of the fixed probe under whatever is live now."""
        vocab = self.base.head.weight.shape[0]
        rows = [[seed_of("probe", row, i) % vocab for i in range(_PROBE_TOK)] for row in range(_PROBE_ROWS)]
        ids, positions, layout = pack(rows, self.base.device)
        spans, self.route.spans = self.route.spans, None
        hidden = self.base.hidden(ids, positions, layout)
        self.route.spans = spans
        last = torch.tensor([stop - 1 for stop in layout.starts[1:]], device=self.base.device)
        kept = torch.tensor([seed_of("kept", i) % vocab for i in range(_PROBE_KEPT)], device=self.base.device)
        values = self.base.logits(hidden[last])[:, kept].flatten().tolist()
        return Probe(tuple(values))

    def prove(self, recorded: Probe | None, where: str) -> Probe:
        """Prove that the live stack is on: its logits differ from the base's and equal those recorded for it.

        Raises TrainingError otherwise. With `recorded` None only the first half is checked. Returns the probe.
        """
        now = self.probe()
        if not all(math.isfinite(value) for value in now.logits):
            raise TrainingError(
                "the stack gives logits that are not finite",
                where=where,
                fix="train its adapters again with a lower lr",
            )
        if self.route.slots and now.distance(self.base_probe) == 0.0:
            raise TrainingError(
                "the adapters change nothing: the swap did not take",
                where=where,
                fix="report this; no number of this stack can be trusted",
            )
        if recorded is not None and now.distance(recorded) > _PROBE_TOLERANCE[self.base.dtype]:
            raise TrainingError(
                f"the stack's logits are {now.distance(recorded):.2g} away from those recorded for it", where=where,
                fix="the adapters or the base are not the recorded ones; run `fastconv doctor`",
            )  # fmt: skip
        return now


def _install(base: Base, settings: LoraSettings, route: Route) -> dict[str, tuple[int, int]]:
    """Replace the target layers by stacked ones; returns (in, out) of each by its name, in model order."""
    tied = base.model.get_input_embeddings().weight
    sizes: dict[str, tuple[int, int]] = {}
    found: set[str] = set()
    for name, module in list(base.model.named_modules()):
        leaf = name.rsplit(".", 1)[-1]
        if leaf not in settings.targets or not isinstance(module, nn.Linear):
            continue
        if module.weight is tied:
            raise AdapterError(
                f"{name} shares its weight with the embedding",
                where="lora.targets",
                fix="leave tied layers out of lora.targets",
            )
        parent = base.model.get_submodule(name.rsplit(".", 1)[0]) if "." in name else base.model
        setattr(parent, leaf, StackedLinear(module, name, route))
        sizes[name] = (module.in_features, module.out_features)
        found.add(leaf)
    if missing := set(settings.targets) - found:
        raise AdapterError(
            f"the base has no layers called {sorted(missing)}",
            where="lora.targets",
            fix="name linear layers of this model",
        )
    return sizes


def _read_safetensors(data: bytes, where: str) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError) as error:
        raise AdapterError(
            f"not a whole safetensors file: {error}", where=where, fix="copy or train it again"
        ) from None
    about = header.get("__metadata__", {})
    if "lora" not in about:
        raise AdapterError(
            "the file says nothing of its LoRA shape", where=where, fix="use an adapter that fastconv wrote"
        )
    return tensors, about
