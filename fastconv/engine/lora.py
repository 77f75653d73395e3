"""LoRA weights of one base (made, read, written and joined), and the linear layer that carries live adapters.

`y = W x + sum_i s_i B_i A_i d_i(x)`, with d_i the dropout of the trainable adapter and the identity for frozen ones. A mask
depends on row, step and module alone, never on what else is in the batch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from fastconv.errors import AdapterError
from fastconv.recipe import LoraSettings, canonical_json
from fastconv.seeding import seed_of

_PREFIX = "base_model.model."


class Adapter:
    """LoRA weights for target modules of one base: A [r, in] and B [out, r] for each module with its own rank, fp32.

    `flat` [n] holds all of them in the order of `sizes` (module -> (in, out)); `weights[module]` = (A, B) are views
    into it. `base` is the `Base.name` of its base. Raises ValueError if `flat` has another length or is not fp32.
    """

    def __init__(
        self, shape: LoraSettings, base: str, sizes: Mapping[str, tuple[int, int]], flat: torch.Tensor
    ) -> None:
        self.shape = shape
        self.base = base
        self.sizes = dict(sizes)
        self.flat = flat
        self.weights: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        #: Rank and scale of each module.
        self.ranks = {module: shape.rank(module) for module in self.sizes}
        self.scales = {module: shape.scale(module) for module in self.sizes}
        self._grad: torch.Tensor | None = None
        offset = 0
        for module, (n_in, n_out) in self.sizes.items():
            r = self.ranks[module]
            a = flat[offset : offset + r * n_in].view(r, n_in)
            offset += a.numel()
            b = flat[offset : offset + n_out * r].view(n_out, r)
            offset += b.numel()
            self.weights[module] = (nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False))
        if offset != flat.numel() or flat.dtype != torch.float32:
            raise ValueError("flat tensor does not fit the module sizes, or is not fp32")

    @property
    def scale(self) -> float:
        """alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023), alpha / r without (Hu et al. 2021), where no pattern says other."""
        return self.shape.alpha / (math.sqrt(self.shape.r) if self.shape.rslora else self.shape.r)

    def train(self, grad: torch.Tensor | None) -> None:
        """Accumulate gradients into `grad` (fp32, shaped as `flat`); None makes the adapter frozen again."""
        if grad is not None and grad is self._grad:
            return
        self._grad, offset = grad, 0
        for pair in self.weights.values():
            for weight in pair:
                weight.requires_grad_(grad is not None)
                weight.grad = None if grad is None else grad[offset : offset + weight.numel()].view_as(weight)
                offset += weight.numel()

    def to(self, device: torch.device, *, copy: bool = False) -> Adapter:
        """The adapter on a device, copied in one piece; itself if it is there, unless a `copy` is asked for."""
        if self.flat.device == device and not copy:
            return self
        return Adapter(self.shape, self.base, self.sizes, self.flat.detach().to(device, copy=copy))

    def sha256(self) -> str:
        """sha256 (hex) of the weights' bytes."""
        return hashlib.sha256(self.flat.detach().cpu().numpy().data).hexdigest()

    def to_bytes(self, dtype: torch.dtype = torch.float32) -> bytes:
        """A safetensors file with PEFT's tensor names in `dtype`; LoRA shape and base are in its metadata."""
        tensors = {
            f"{_PREFIX}{module}.lora_{letter}.weight": weight.detach().to(dtype)
            for module, pair in self.to(torch.device("cpu")).weights.items()
            for letter, weight in zip("AB", pair, strict=True)
        }
        metadata = {"lora": canonical_json(self.shape.model_dump(mode="json")), "base": self.base}
        return _ordered_metadata(safetensors.torch.save(tensors, metadata=metadata))

    def delta_norms(self) -> dict[str, float]:
        """Frobenius norm of scale * B A by module, without computing the product and with one wait for a device.

        ||BA||_F^2 = tr(A^T B^T B A) = sum((B^T B) * (A A^T)), two r x r Gram matrices; in fp64, since it cancels.
        """
        squared = []
        for pair in self.weights.values():
            a, b = (weight.detach().double() for weight in pair)
            squared.append(((b.t() @ b) * (a @ a.t())).sum())
        values = torch.stack(squared).tolist()
        return {
            module: self.scales[module] * math.sqrt(max(value, 0.0))
            for module, value in zip(self.weights, values, strict=True)
        }


def concatenate(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter that computes the sum of these: A stacked, B side by side with the scales multiplied in.

    A module's rank is the sum of theirs and its scale is 1 (alpha = r, no rsLoRA), also for programs that know one scale for
    all modules. PEFT's `add_weighted_adapter("cat")` keeps
    rsLoRA on and is sqrt(r) too large. Exact in fp32; training dropout has no meaning here. Raises AdapterError if they
    do not share a base and target modules.
    """
    first = adapters[0]
    if any(adapter.base != first.base or adapter.sizes != first.sizes for adapter in adapters):
        raise AdapterError(
            "the adapters differ in base or target modules", where="stack", fix="join adapters of one recipe"
        )
    ranks = {module: sum(adapter.ranks[module] for adapter in adapters) for module in first.sizes}
    parts = []
    for module in first.sizes:
        parts.append(torch.cat([adapter.weights[module][0].detach() for adapter in adapters]).reshape(-1))
        scaled = [adapter.weights[module][1].detach() * adapter.scales[module] for adapter in adapters]
        parts.append(torch.cat(scaled, dim=1).reshape(-1))
    r = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != r}
    patterns = {"rank_pattern": others, "alpha_pattern": {module: float(rank) for module, rank in others.items()}}
    shape = first.shape.model_copy(update={"r": r, "alpha": float(r), "rslora": False, **patterns})
    return Adapter(shape, first.base, first.sizes, torch.cat(parts))


def parse_adapter(data: bytes, base: str, sizes: Mapping[str, tuple[int, int]] | None, where: str) -> Adapter:
    """An adapter on the CPU from the bytes of `Adapter.to_bytes`, checked against the base named `base` and its layers.

    `sizes` are (in, out) of every layer that can carry an adapter; None takes those of the file, for a base that is loaded
    elsewhere. Raises AdapterError naming `where` if the file is damaged, made for another base, or does not fit.
    """
    tensors, metadata = read_safetensors(data, where)
    if "lora" not in metadata:
        raise AdapterError(
            "the file says nothing of its LoRA shape",
            where=where,
            fix="use an adapter that fastconv wrote, or load a PEFT folder",
        )
    if metadata.get("base") != base:
        raise AdapterError(
            "the adapter was made for another base model", where=where, fix="use the base it was trained on"
        )
    try:
        shape = LoraSettings.model_validate_json(metadata["lora"])
    except ValidationError:
        raise AdapterError("its LoRA shape cannot be read", where=where, fix="copy or train it again") from None
    return adapter_from_tensors(tensors, shape, base, _sizes_of(tensors) if sizes is None else sizes, where)


def _sizes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """(in, out) of every module that has both matrices in a file."""
    sizes = {}
    for name, b in tensors.items():
        module = name.removeprefix(_PREFIX).removesuffix(".lora_B.weight")
        a = tensors.get(f"{_PREFIX}{module}.lora_A.weight")
        if name.endswith(".lora_B.weight") and a is not None:
            sizes[module] = (a.shape[1], b.shape[0])
    return sizes


def adapter_from_tensors(
    tensors: Mapping[str, torch.Tensor],
    shape: LoraSettings,
    base: str,
    sizes: Mapping[str, tuple[int, int]],
    where: str,
) -> Adapter:
    """An adapter on the CPU from tensors with PEFT's names; arguments as for `parse_adapter`.

    Raises AdapterError if a tensor is missing, unexpected, of another shape or not finite.
    """
    modules = {module: size for module, size in sizes.items() if shape.carries(module)}
    if missing := set(shape.targets) - {module.rsplit(".", 1)[-1] for module in modules}:
        raise AdapterError(
            f"it targets {', '.join(sorted(missing))}, which this stack does not",
            where=where,
            fix="add them to lora.targets; layers tied to the embedding cannot carry an adapter",
        )
    remaining, parts = dict(tensors), []
    for module, (n_in, n_out) in modules.items():
        r = shape.rank(module)
        for letter, wanted in (("A", (r, n_in)), ("B", (n_out, r))):
            tensor = remaining.pop(f"{_PREFIX}{module}.lora_{letter}.weight", None)
            if tensor is None or tuple(tensor.shape) != wanted:
                state = "missing" if tensor is None else f"of shape {list(tensor.shape)}, not {list(wanted)}"
                whole = (
                    "say in layers_to_transform which layers it is for, or train it on every layer that has this name"
                )
                raise AdapterError(
                    f"lora_{letter} of {module} is {state}",
                    where=where,
                    fix="use an adapter of this rank, made for this base" if tensor is not None else whole,
                )
            if not tensor.is_floating_point():
                raise AdapterError(
                    f"lora_{letter} of {module} holds {str(tensor.dtype).removeprefix('torch.')} numbers, which are no weights alone",
                    where=where,
                    fix="save it in 16 or 32 bits",
                )
            parts.append(tensor.reshape(-1).float())
    if remaining:
        whole = all(".lora_" not in name for name in remaining)
        raise AdapterError(
            f"it holds {len(remaining)} tensors that {'are no LoRA' if whole else 'this base has no place for'}, e.g. {min(remaining)}",
            where=where,
            fix="save it with save_embedding_layers=False, and without layers that are trained whole"
            if whole
            else "use a plain LoRA adapter made for this base",
        )
    flat = torch.cat(parts)
    if not bool(torch.isfinite(flat).all()):
        raise AdapterError("the adapter holds NaN or infinite weights", where=where, fix="train it again")
    return Adapter(shape, base, modules, flat)


def read_safetensors(data: bytes, where: str) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """(tensors on the CPU, metadata) of a safetensors file. Raises AdapterError if it is damaged."""
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise AdapterError(
            f"not a whole safetensors file: {error}", where=where, fix="copy or train it again"
        ) from None
    return tensors, safetensors_metadata(data)


def _ordered_metadata(data: bytes) -> bytes:
    """The same safetensors file with sorted metadata: the library's order varies, and a file that is named by its
    sha256 must have the same bytes for the same weights."""
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + n :]


def safetensors_metadata(data: bytes) -> dict[str, str]:
    """The metadata of a complete safetensors file, whose header is a length in 8 bytes followed by JSON."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__") or {}


def keep_mask(seeds: torch.Tensor, width: int, salt: int, p: float) -> torch.Tensor:
    """Inverted-dropout multipliers [T, width]: 0 with probability p, else 1/(1-p), fp32.

    Counter-based: every element is a hash of (its token's seed, its channel, the module's salt), so the same row gets
    the same mask in any batch and on any device, and a kernel can compute it again instead of storing it. The hash is
    the 32-bit finaliser of Wellons' "hash prospector" (constants 7feb352d, 846ca68b); int32 products wrap as in C.
    `seeds` [T] int32.
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


class BranchKernel(Protocol):
    """A fused kernel that computes whole stacked layers; `kernels.lora.StackedKernel` is the one there is."""

    def serves(self, layer: StackedLinear, x: torch.Tensor) -> bool:
        """Whether it can compute this layer on x [..., T, in]."""
        ...

    def forward(self, layer: StackedLinear, x: torch.Tensor) -> torch.Tensor:
        """W x + b + the live branches, for x [..., T, in] -> [..., T, out]."""
        ...

    def joined(
        self, layers: Sequence[StackedLinear], weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor
    ) -> torch.Tensor | None:
        """The same for layers of one input whose weights lie below one another in `weight`, side by side; None if they
        cannot be computed together."""
        ...

    def release(self) -> None:
        """Forget the live slots."""
        ...

    def structure(self, route: Route, dtype: torch.dtype) -> Hashable:
        """What two passes over equally many tokens must share for one captured graph to serve both."""
        ...

    def own_tables(self, route: Route, dtype: torch.dtype, n_tok: int) -> Any:
        """Tables of a graph that is captured next, over `n_tok` tokens."""
        ...

    def load_tables(self, tables: Any, route: Route, dtype: torch.dtype, n_tok: int) -> None:
        """Copy what is live now into the tables of a captured graph, before a replay."""
        ...


@dataclass
class Slot:
    """The adapters for a span of tokens. Only `trainable` gets gradients, and dropout (a probability) on its input."""

    frozen: tuple[Adapter, ...] = ()
    trainable: Adapter | None = None
    dropout: float = 0.0

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The frozen adapters, then the trainable one."""
        return (*self.frozen, self.trainable) if self.trainable is not None else self.frozen


@dataclass
class Route:
    """Which slots are live, and which tokens of the current pass belong to which slot.

    `spans[i]` is the token range (start, stop) of `slots[i]`; together they cover the pass. None stands for one slot
    with all tokens. `dropout_seeds` [T] int32 has one seed per token, so that a mask depends only on the row and the
    step, not on the rest of the batch. `kernel` computes the branches if there is one, else torch's operations do.
    `plain` switches fused kernels off, for comparison.
    """

    slots: tuple[Slot, ...] = ()
    spans: tuple[tuple[int, int], ...] | None = None
    dropout_seeds: torch.Tensor | None = None
    kernel: BranchKernel | None = None
    plain: bool = False


class StackedLinear(nn.Module):
    """A frozen linear layer with the branches of the live adapters."""

    def __init__(self, base: nn.Linear, name: str, route: Route) -> None:
        super().__init__()
        self.training = base.training
        self.base = base
        self.name = name
        self.route = route
        self.in_features, self.out_features = base.in_features, base.out_features
        self.salt = seed_of("dropout", name) & 0x7FFFFFFF

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., T, in] -> [..., T, out]."""
        kernel = self.route.kernel
        if kernel is not None and not self.route.plain and self.route.slots and kernel.serves(self, x):
            return kernel.forward(self, x)
        y = self.base(x)
        if not self.route.slots:
            return y
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if self.route.spans is None:
            (slot,) = self.route.slots  # without spans, several slots would be ambiguous
            return self._add_branches(flat_y, flat_x, slot, self.route.dropout_seeds).view_as(y)
        parts = []
        for slot, (start, stop) in zip(self.route.slots, self.route.spans, strict=True):
            seeds = None if self.route.dropout_seeds is None else self.route.dropout_seeds[start:stop]
            parts.append(self._add_branches(flat_y[start:stop], flat_x[start:stop], slot, seeds))
        return torch.cat(parts).view_as(y)

    def _add_branches(self, y: torch.Tensor, x: torch.Tensor, slot: Slot, seeds: torch.Tensor | None) -> torch.Tensor:
        """y [T, out] plus the slot's low-rank products of x [T, in], computed in x's dtype."""
        for adapter in slot.adapters:
            if self.name not in adapter.weights:
                continue
            a, b = (weight.to(x.dtype) for weight in adapter.weights[self.name])
            branch_input = x
            if adapter is slot.trainable and slot.dropout > 0 and seeds is not None:
                branch_input = x * keep_mask(seeds, x.shape[-1], self.salt, slot.dropout).to(x.dtype)
            y = torch.addmm(y, F.linear(branch_input, a) * adapter.scales[self.name], b.t())
        return y


def shared_route(model: nn.Module, dtype: torch.dtype) -> Route | None:
    """The route of a model's stacked layers if its kernel computes them all in this dtype: a captured graph then serves
    any adapters (`BranchKernel.own_tables`). None otherwise."""
    layers = [module for module in model.modules() if isinstance(module, StackedLinear)]
    kernel = layers[0].route.kernel if layers else None
    if kernel is None or any(layer.base.weight.dtype != dtype for layer in layers):
        return None
    return layers[0].route
