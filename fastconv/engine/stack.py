"""The adapter stack of the resident base: making adapters live, probing them, and folding them into the weights.

`Stack` replaces the base's target layers by stacked ones and makes adapters live by assigning references: no weights
are merged or reloaded. A `Probe` proves that a stack is live. `folded` adds a stack's delta to the weights for a while,
and `rho` measures the delta against them.
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
from fastconv.engine.lora import Adapter, Route, Slot, StackedLinear, concatenate, parse_adapter
from fastconv.engine.model import Base, pack
from fastconv.engine.optim import assert_foldable, dense_weight
from fastconv.engine.score import ignore_halving, in_halves
from fastconv.errors import AdapterError, TrainingError
from fastconv.recipe import LoraSettings, require_chosen
from fastconv.seeding import seed_of

#: The probe's token rows: 3 of 8 tokens are enough to see a lost adapter, and cost little more than reading the
#: weights.
_PROBE_ROWS, _PROBE_TOK = 3, 8
#: Logits kept of each probe row: enough to tell two stacks apart, few enough to store.
_PROBE_KEPT = 16
#: Largest difference between two probes of the same stack (logits), by the base's dtype.
_PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
#: Kernels other than those that recorded a probe round otherwise, in every logit that is compared.
_OTHER_KERNELS = 2.0

#: Below this ||delta|| / ||W||, folding in bf16 loses over 10 % of the delta to rounding.
RHO_MIN = 0.017

KernelChoice = Literal["auto", "plain", "stacked"]
Semantics = Literal["live", "published"]


@dataclass(frozen=True)
class Probe:
    """A few logits of fixed token rows under one stack, as the ledger stores them."""

    logits: tuple[float, ...]

    def distance(self, reference: Probe) -> float:
        """Largest absolute difference in logits."""
        return max(abs(a - b) for a, b in zip(self.logits, reference.logits, strict=True))


class Stack:
    """The live adapters of a base. There is one per base; making it replaces the target layers by stacked ones.

    `kernel` says what computes the branches: "plain" torch's operations, "stacked" the Triton kernel (raises ModelError
    where it cannot run), "auto" the kernel on a GPU in 16 bits, where `fastconv bench kernel` measured it faster.
    Raises AdapterError if a target layer does not exist or shares its weight with the embedding.
    """

    def __init__(self, base: Base, settings: LoraSettings, kernel: KernelChoice = "auto") -> None:
        self.base = base
        self.settings = settings
        if kernel == "auto":
            can_run = base.device.type == "cuda" and base.dtype != torch.float32 and why_unusable(base.device) is None
            kernel = "stacked" if can_run else "plain"
        self.route = Route(kernel=StackedKernel(base.device) if kernel == "stacked" else None)
        self.sizes = _install(base, settings, self.route)
        self.tied = tied_layers(base)
        self.base_probe = self.probe()

    def new_adapter(self, *seed_parts: object) -> Adapter:
        """A new adapter: A uniform as in PEFT (Kaiming, a = sqrt 5), B zero; `seed_parts` name its random numbers."""
        adapter = self.zero_adapter(torch.device("cpu"))
        for module, (a, _) in adapter.weights.items():
            generator = torch.Generator().manual_seed(seed_of("lora", module, *seed_parts))
            bound = 1.0 / math.sqrt(a.shape[1])
            torch.rand(a.shape, generator=generator, out=a.data).mul_(2 * bound).sub_(bound)
        return self.take(adapter)

    def zero_adapter(self, device: torch.device) -> Adapter:
        """An adapter of zeros, of the settings' shape."""
        n = sum(self.settings.rank(module) * (n_in + n_out) for module, (n_in, n_out) in self.sizes.items())
        return Adapter(self.settings, self.base.name, self.sizes, torch.zeros(n, device=device))

    def load_adapter(self, data: bytes, where: str) -> Adapter:
        """The adapter that `Adapter.to_bytes` wrote. Raises AdapterError if it is damaged or made for another base."""
        adapter = parse_adapter(data, self.base.name, self.sizes, where)
        return self.take(adapter)

    def take(self, adapter: Adapter) -> Adapter:
        """The adapter on the base's device; a copy if it is elsewhere."""
        return adapter.to(self.base.device)

    @contextlib.contextmanager
    def live(
        self,
        *slots: Slot,
        spans: tuple[tuple[int, int], ...] | None = None,
        dropout_seeds: torch.Tensor | None = None,
    ) -> Iterator[None]:
        """Make these slots live within the block; afterwards what was live before is again. No weights are copied.

        `spans` and `dropout_seeds` as in `Route`.
        """
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
        """Logits of the fixed token rows under what is live now; row by row where memory runs out."""
        rows, kept = probe_tokens(self.base.head.weight.shape[0])
        columns = torch.tensor(kept, device=self.base.device)

        def compute(part: Sequence[list[int]]) -> list[float]:
            ids, positions, layout = pack(list(part), self.base)
            hidden = self.base.hidden(ids, positions, layout)
            last = torch.tensor([stop - 1 for stop in layout.starts[1:]], device=self.base.device)
            return self.base.logits(hidden[last])[:, columns].flatten().tolist()

        spans, self.route.spans = self.route.spans, None
        try:
            return Probe(
                tuple(value for _, part in in_halves(self.base, rows, compute, ignore_halving) for value in part)
            )
        finally:
            self.route.spans = spans

    def prove(self, recorded: Probe | None, where: str, recorded_as: Mapping[str, str] | None = None) -> Probe:
        """Check that the live stack takes effect: its logits differ from the base's and match the recorded ones.

        `recorded_as` is the engine that recorded them (`engine_identity`) where it is another one. Raises TrainingError
        otherwise, with `where`. If `recorded` is None only the first is checked. Returns the probe.
        """
        probe = self.probe()
        if not all(math.isfinite(value) for value in probe.logits):
            raise TrainingError(
                "the stack gives logits that are not finite",
                where=where,
                fix="train its adapters again with a lower lr",
            )
        if self.route.slots and probe.distance(self.base_probe) == 0.0:
            raise TrainingError(
                "the adapters change nothing: the swap did not take",
                where=where,
                fix="train for more than the warm-up's steps (at the first one the lr is 0); if it was, report this",
            )
        if recorded is not None and probe.distance(recorded) > probe_tolerance(self.base.dtype, recorded_as):
            raise TrainingError(
                f"the stack's logits are {probe.distance(recorded):.2g} away from those recorded for it", where=where,
                fix="the adapters or the base are not the recorded ones; run `fastconv doctor`",
            )  # fmt: skip
        return probe


def probe_tolerance(dtype: torch.dtype, recorded_as: Mapping[str, str] | None) -> float:
    """Largest difference (logits) of a stack's probe from its record: by the base's dtype, and the coarser of both where
    another engine recorded it."""
    own = _PROBE_TOLERANCE[str(dtype).removeprefix("torch.")]
    return own if recorded_as is None else _OTHER_KERNELS * max(own, _PROBE_TOLERANCE[recorded_as["dtype"]])


def probe_tokens(vocab: int) -> tuple[list[list[int]], list[int]]:
    """(token rows, tokens whose logits are kept after each) of every probe of a base with this many rows in its head."""
    rows = [[seed_of("probe", row, i) % vocab for i in range(_PROBE_TOK)] for row in range(_PROBE_ROWS)]
    return rows, [seed_of("kept", i) % vocab for i in range(_PROBE_KEPT)]


def tied_layers(base: Base) -> frozenset[str]:
    """Leaf names of the modules that share the embedding's tensor, the embedding included; empty if none does.

    A delta on one of them would change the others, so they carry no adapter.
    """
    embedding = base.model.get_input_embeddings()
    sharing = {
        name.rsplit(".", 1)[-1]
        for name, module in base.model.named_modules()
        if getattr(module, "weight", None) is embedding.weight
    }
    return frozenset(sharing) if len(sharing) > 1 else frozenset()


def _install(base: Base, settings: LoraSettings, route: Route) -> dict[str, tuple[int, int]]:
    """Replace the target layers by stacked ones; returns (in, out) of each by module name, in model order."""
    tied = tied_layers(base)
    sizes: dict[str, tuple[int, int]] = {}
    present: set[str] = set()
    for name, module in list(base.model.named_modules()):
        leaf = name.rsplit(".", 1)[-1]
        if leaf not in settings.targets or not isinstance(module, nn.Linear):
            continue
        present.add(leaf)
        if not settings.carries(name):
            continue
        if leaf in tied or module is base.head:
            shares = "shares its weight with the embedding" if leaf in tied else "is the output head"
            raise AdapterError(f"{name} {shares}", where="lora.targets", fix="leave it out of lora.targets")
        parent = base.model.get_submodule(name.rsplit(".", 1)[0]) if "." in name else base.model
        setattr(parent, leaf, StackedLinear(module, name, route))
        sizes[name] = (module.in_features, module.out_features)
    if missing := set(settings.targets) - present:
        raise _no_such_layers(base, sorted(missing))
    require_chosen(settings, list(sizes))
    return sizes


def _no_such_layers(base: Base, missing: Sequence[str]) -> AdapterError:
    """The error for targets that the base lacks, naming the linear layers that it has."""
    owners = {name.rsplit(".", 1)[-1]: type(module).__name__ for name, module in base.model.named_modules()}
    linear = (StackedLinear, nn.Linear)
    others = {
        name.rsplit(".", 1)[-1]
        for name, m in base.model.named_modules()
        if isinstance(m, linear) and m is not base.head
    }
    kinds = sorted({owners[name] for name in missing if name in owners})
    return AdapterError(
        f"the base has no {'linear ' if kinds else ''}layers called {', '.join(missing)}"
        + (f" (they are {', '.join(kinds)})" if kinds else ""),
        where="lora.targets",
        fix=f"name some of {', '.join(sorted(others - {'base'}))}"
        if others
        else "use a base of another family: on this one no layer can carry an adapter",
    )


def rho(stack: Stack, adapters: Sequence[Adapter]) -> dict[str, float]:
    """||sum of scale * B A||_F / ||W||_F by module, without computing the product (`Adapter.delta_norms`)."""
    deltas = concatenate(adapters).delta_norms()
    weights = {name: layer.base for name, layer in _stacked_layers(stack)}
    norms = torch.stack([torch.linalg.vector_norm(dense_weight(weights[module])) for module in deltas]).tolist()
    return {module: delta / norm for (module, delta), norm in zip(deltas.items(), norms, strict=True)}


@contextlib.contextmanager
def folded(stack: Stack, adapters: Sequence[Adapter], semantics: Semantics = "live") -> Iterator[None]:
    """Add the adapters' delta to the base's weights within the block; afterwards the weights have their old bits.

    The original weights are kept on the host and copied back: subtracting the delta would not restore them. Raises
    AdapterError, with nothing changed, if adapters are live, or if the base is not fp32 and some module's rho is under
    `RHO_MIN` (allowed by `semantics` "published", which reproduces that rounding); ModelError if it is quantized.
    """
    if stack.route.slots:
        raise AdapterError("a stack is live", where="fold", fix="fold outside of Stack.live")
    assert_foldable({name: layer.base for name, layer in _stacked_layers(stack)})
    joined = concatenate(adapters)
    if semantics != "published" and stack.base.dtype != torch.float32:
        _refuse_rounding(rho(stack, adapters), stack.base.dtype)
    original: dict[str, torch.Tensor] = {}
    layers = {name: layer for name, layer in _stacked_layers(stack) if name in joined.sizes}
    try:
        with torch.no_grad():
            for name, layer in layers.items():
                weight = layer.base.weight
                original[name] = weight.to("cpu", copy=True)
                a, b = joined.weights[name]
                weight += (b @ a * joined.scales[name]).to(weight.dtype)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in original.items():
                layers[name].base.weight.copy_(tensor)


def _refuse_rounding(rhos: Mapping[str, float], dtype: torch.dtype) -> None:
    module = min(rhos, key=lambda name: rhos[name])
    if rhos[module] < RHO_MIN:
        raise AdapterError(
            f"{module} has rho {rhos[module]:.2%}, under {RHO_MIN:.1%}: {dtype} would round over 10 % of it away",
            where="fold",
            fix='keep the stack live, or say semantics = "published" to reproduce that rounding',
        )


def _stacked_layers(stack: Stack) -> Iterator[tuple[str, StackedLinear]]:
    for module in stack.base.model.modules():
        if isinstance(module, StackedLinear):
            yield module.name, module
