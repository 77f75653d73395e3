"""The stack: adapters live on the resident base, in order, all but the last of them frozen.

`y = W x + sum_i s_i B_i A_i d_i(x)`: nothing is merged, nothing is reloaded, a swap assigns a few references.
Adapter weights are fp32 views into one flat tensor, so an optimizer step, a checksum and a save are each one pass.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fastconv.engine.kernels.lora import StackedKernel, why_unusable
from fastconv.engine.lora import Adapter, concatenate, parse_adapter
from fastconv.engine.model import Base, pack
from fastconv.engine.optim import assert_foldable, dense_weight
from fastconv.engine.stacked_linear import Route, Slot, StackedLinear
from fastconv.errors import AdapterError, TrainingError
from fastconv.recipe import LoraSettings
from fastconv.seeding import seed_of

#: The fixed probe; 3 rows of 8 tokens are plenty to see a lost adapter, and cost little more than reading the weights.
_PROBE_ROWS, _PROBE_TOK = 3, 8
#: A recorded probe keeps this many logits per row; enough to tell two stacks apart, small enough to store.
_PROBE_KEPT = 16
#: How far the logits of one stack may lie apart on two occasions, by the base's precision.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}

KernelChoice = Literal["auto", "plain", "stacked"]


@dataclass(frozen=True)
class Probe:
    """Logits of a fixed token sequence under one stack, as numbers small enough for the ledger."""

    logits: tuple[float, ...]

    def distance(self, other: Probe) -> float:
        """Largest absolute difference in logits."""
        return max(abs(mine - theirs) for mine, theirs in zip(self.logits, other.logits, strict=True))


class Stack:
    """The live adapters of a base. One per base; made once, it replaces the target layers by stacked ones.

    `kernel` says what computes the branches: "plain" torch's operations, "stacked" the Triton kernel (ModelError where
    it cannot run), "auto" the kernel on a GPU in 16 bits, where `fastconv bench kernel` measured it ahead.
    """

    def __init__(self, base: Base, settings: LoraSettings, kernel: KernelChoice = "auto") -> None:
        self.base = base
        self.settings = settings
        if kernel == "auto":
            fits = base.device.type == "cuda" and base.dtype != torch.float32 and why_unusable(base.device) is None
            kernel = "stacked" if fits else "plain"
        self.route = Route(kernel=StackedKernel(base.device) if kernel == "stacked" else None)
        self.sizes = _install(base, settings, self.route)
        self.tied = tied_layers(base)
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
        adapter = parse_adapter(data, self.base.name, self.sizes, where)
        return self.take(adapter)

    def take(self, adapter: Adapter) -> Adapter:
        """The same adapter on the base's device."""
        if adapter.flat.device == self.base.device:
            return adapter
        return Adapter(adapter.shape, adapter.base, adapter.sizes, adapter.flat.to(self.base.device))

    @contextlib.contextmanager
    def live(
        self,
        *slots: Slot,
        spans: tuple[tuple[int, int], ...] | None = None,
        dropout_seeds: torch.Tensor | None = None,
    ) -> Iterator[None]:
        """Make these slots live inside the block; outside, the base is bare again. Milliseconds, no copies."""
        before = self.route.slots, self.route.spans, self.route.dropout_seeds
        self.route.slots, self.route.spans, self.route.dropout_seeds = tuple(slots), spans, dropout_seeds
        try:
            yield
        finally:
            self.route.slots, self.route.spans, self.route.dropout_seeds = before
            if self.route.kernel is not None:
                self.route.kernel.release()

    @torch.no_grad()
    def probe(self) -> Probe:
        """Logits of the fixed probe under whatever is live now."""
        vocab = self.base.head.weight.shape[0]
        rows = [[seed_of("probe", row, i) % vocab for i in range(_PROBE_TOK)] for row in range(_PROBE_ROWS)]
        ids, positions, layout = pack(rows, self.base)
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
                fix="train for more than the warm-up's steps (at the first one the lr is 0); if it was, report this",
            )
        if recorded is not None and now.distance(recorded) > _PROBE_TOLERANCE[self.base.dtype]:
            raise TrainingError(
                f"the stack's logits are {now.distance(recorded):.2g} away from those recorded for it", where=where,
                fix="the adapters or the base are not the recorded ones; run `fastconv doctor`",
            )  # fmt: skip
        return now


def tied_layers(base: Base) -> frozenset[str]:
    """Last names of the layers that share the embedding's tensor (and the embedding's own, if any do).

    A delta on one of them would change the other, so they carry no adapter.
    """
    embedding = base.model.get_input_embeddings()
    sharing = {
        name.rsplit(".", 1)[-1]
        for name, module in base.model.named_modules()
        if getattr(module, "weight", None) is embedding.weight
    }
    return frozenset(sharing) if len(sharing) > 1 else frozenset()


def _install(base: Base, settings: LoraSettings, route: Route) -> dict[str, tuple[int, int]]:
    """Replace the target layers by stacked ones; returns (in, out) of each by its name, in model order."""
    tied = tied_layers(base)
    sizes: dict[str, tuple[int, int]] = {}
    found: set[str] = set()
    for name, module in list(base.model.named_modules()):
        leaf = name.rsplit(".", 1)[-1]
        if leaf not in settings.targets or not isinstance(module, nn.Linear):
            continue
        if leaf in tied or module is base.head:
            shares = "shares its weight with the embedding" if leaf in tied else "is the output head"
            raise AdapterError(f"{name} {shares}", where="lora.targets", fix="leave it out of lora.targets")
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


#: Below this share of the weights' norm, folding in bf16 loses over 10 % of the delta.
RHO_MIN = 0.017

Semantics = Literal["live", "published"]


def rho(stack: Stack, adapters: Sequence[Adapter]) -> dict[str, float]:
    """||sum of scale * B A||_F / ||W||_F by module, without a dense product (`Adapter.delta_norm`)."""
    joined = concatenate(adapters)
    norms = {name: float(torch.linalg.vector_norm(dense_weight(layer.base))) for name, layer in _layers(stack)}
    return {module: joined.delta_norm(module) / norms[module] for module in joined.sizes}


@contextlib.contextmanager
def folded(stack: Stack, adapters: Sequence[Adapter], semantics: Semantics = "live") -> Iterator[None]:
    """Add the adapters' delta to the base's weights inside the block; afterwards the weights are the old bits.

    The pristine weights wait on the host and come back by copy: subtracting the delta would not restore them. Raises
    AdapterError, with nothing changed, if the base is not fp32 and some module's rho is under `RHO_MIN`, unless
    `semantics` is "published", which asks for that rounding; ModelError if the base is quantized.
    """
    if stack.route.slots:
        raise AdapterError("a stack is live", where="fold", fix="fold outside of Stack.live")
    assert_foldable({name: layer.base for name, layer in _layers(stack)})
    joined = concatenate(adapters)
    if semantics != "published" and stack.base.dtype != torch.float32:
        _refuse_rounding(rho(stack, adapters), stack.base.dtype)
    pristine: dict[str, torch.Tensor] = {}
    layers = {name: layer for name, layer in _layers(stack) if name in joined.sizes}
    try:
        with torch.no_grad():
            for name, layer in layers.items():
                weight = layer.base.weight
                pristine[name] = weight.to("cpu", copy=True)
                a, b = joined.weights[name]
                weight += (b @ a * joined.scale).to(weight.dtype)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in pristine.items():
                layers[name].base.weight.copy_(tensor)


def _refuse_rounding(found: Mapping[str, float], dtype: torch.dtype) -> None:
    module = min(found, key=lambda name: found[name])
    if found[module] < RHO_MIN:
        raise AdapterError(
            f"{module} has rho {found[module]:.2%}, under {RHO_MIN:.1%}: {dtype} would round over 10 % of it away",
            where="fold",
            fix='keep the stack live, or say semantics = "published" to reproduce that rounding',
        )


def _layers(stack: Stack) -> Iterator[tuple[str, StackedLinear]]:
    for module in stack.base.model.modules():
        if isinstance(module, StackedLinear):
            yield module.name, module
