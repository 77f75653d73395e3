"""What is proven of every base before it is used, in seconds: the library traps that would change results in silence.

Two random adapters, one frozen and one trainable, run over three short packed rows. Each check names itself in the error
it raises; `self_test` returns what it measured, for the run's facts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import nn

from fastconv.engine.lora import Adapter
from fastconv.engine.model import Base, pack
from fastconv.engine.optim import dense_weight, make_optimizer, moment_names
from fastconv.engine.stack import Slot, Stack
from fastconv.engine.stacked_linear import StackedLinear
from fastconv.engine.train import weighted_cross_entropy
from fastconv.errors import TrainingError
from fastconv.recipe import LoraSettings
from fastconv.seeding import seed_of

#: Lengths (tokens) of the rows of the probe.
_ROWS_TOK = (13, 7, 20)
_RANK = 4
#: Norm of each probing adapter's delta against its layer's weights: far above rounding, far below breaking the model.
_SIZE = 0.1
#: How far apart two ways of computing the same may lie, as a share of what the adapters change, by precision.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.15}


class SelfTestSetup:
    """What the checks share: the stack, two random adapters on it, and packed rows."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.frozen, self.trainable = _adapter(stack, "frozen"), _adapter(stack, "trainable")
        vocab = stack.base.head.weight.shape[0]
        self.rows = [[seed_of("self-test", row, i) % vocab for i in range(n)] for row, n in enumerate(_ROWS_TOK)]

    @property
    def base(self) -> Base:
        """The base under the stack."""
        return self.stack.base

    @property
    def tolerance(self) -> float:
        """Of the base's precision."""
        return _TOLERANCE[self.base.dtype]

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], *adapters: Adapter) -> list[torch.Tensor]:
        """Logits [T_i, vocab] of each row, packed, with these adapters live."""
        ids, positions, layout = pack([list(row) for row in rows], self.base)
        with self.stack.live(*([Slot(frozen=adapters)] if adapters else [])):
            logits = self.base.logits(self.base.hidden(ids, positions, layout))
        return list(logits.split([len(row) for row in rows]))

    def gradient(self) -> torch.Tensor:
        """Gradient [flat] fp32 of the rows' mean loss, for the trainable adapter above the frozen one."""
        ids, positions, layout = pack(self.rows, self.base)
        grad = torch.zeros_like(self.trainable.flat)
        self.trainable.train(grad)
        try:
            with self.stack.live(Slot((self.frozen,), self.trainable)):
                hidden = self.base.hidden(ids, positions, layout)
                weights = torch.full((len(ids) - 1,), 1.0 / len(ids), device=ids.device)
                loss, _ = weighted_cross_entropy(hidden[:-1], self.base.head.weight, ids[1:], weights)
                loss.backward()
        finally:
            self.trainable.train(None)
        return grad


def self_test(stack: Stack, optimizers: Collection[str] = ("adamw",)) -> dict[str, float]:
    """Run every check on a stack whose base is bare. Raises TrainingError or ModelError at the first that fails.

    `optimizers` are those that the recipe trains with. Returns by check how far apart two ways of computing lay.
    """
    ground = SelfTestSetup(stack)
    found: dict[str, float] = {}
    checks: Mapping[str, Callable[[SelfTestSetup], float]] = {
        "import order": lambda _: import_order(),
        "precision": lambda g: precision(g, optimizers),
        "packed rows": packed_rows,
        "swap": swap,
        "fused kernels": fused_kernels,
    }
    for name, check in checks.items():
        found[name] = check(ground)
    return found


def import_order() -> float:
    """Where unsloth is loaded, it came before the libraries that it patches."""
    if "unsloth" in sys.modules:
        from fastconv.engine.unsloth import assert_imported_first

        assert_imported_first()
    return 0.0


def precision(ground: SelfTestSetup, optimizers: Collection[str]) -> float:
    """Adapters, gradients and moments are fp32 (8-bit moments only where asked for), on a step really taken."""
    held = {"adapter": ground.trainable.flat, "frozen adapter": ground.frozen.flat, "gradient": ground.gradient()}
    for kind in optimizers:
        weights = nn.Parameter(ground.trainable.flat.clone())
        weights.grad = held["gradient"].clone()
        optimizer = make_optimizer(kind, weights, 1e-4)
        optimizer.step()
        if kind == "adamw":
            held |= {name: optimizer.state[weights][name] for name in moment_names(kind)}
    for name, tensor in held.items():
        if tensor.dtype != torch.float32:
            raise _failed(f"the {name} is {tensor.dtype}, not fp32")
    if not bool(torch.isfinite(held["gradient"]).all()) or not bool(held["gradient"].any()):
        raise _failed("the trainable adapter gets no finite gradient")
    if any(weight.grad is not None for pair in ground.frozen.weights.values() for weight in pair):
        raise _failed("the frozen adapter gets a gradient")
    return 0.0


def packed_rows(ground: SelfTestSetup) -> float:
    """A row's logits are those it has alone, and another row's tokens change none of their bits."""
    both = (ground.frozen, ground.trainable)
    packed = ground.logits(ground.rows, *both)
    for place in range(len(ground.rows)):
        vocab = packed[0].shape[1]
        changed = [[(token + 1) % vocab for token in row] if i == place else row for i, row in enumerate(ground.rows)]
        for other, (before, after) in enumerate(zip(packed, ground.logits(changed, *both), strict=True)):
            if (other == place) == bool(torch.equal(before, after)):
                raise _failed(f"packed row {place} leaks into row {other}" if other != place else "a row is not read")
    bare, alone = ground.logits(ground.rows), [ground.logits([row], *both)[0] for row in ground.rows]
    return _compare("packed rows", alone, packed, bare, ground.tolerance)


def swap(ground: SelfTestSetup) -> float:
    """Each adapter changes the logits, both do it together, and without them the base has its old bits."""
    before = ground.stack.probe()
    with ground.stack.live(Slot((ground.frozen, ground.trainable))):
        ground.stack.prove(None, "self-test")
    if ground.stack.probe() != before:
        raise _failed("the base is not what it was before a swap")
    bare = ground.logits(ground.rows)
    both = ground.logits(ground.rows, ground.frozen, ground.trainable)
    for name, one in (("frozen", ground.frozen), ("trainable", ground.trainable)):
        share = _share(ground.logits(ground.rows, one), both, bare)
        if share < 2 * ground.tolerance:
            raise _failed(f"without the {name} adapter the logits are the same: one of two adapters is dropped")
    return 0.0


def fused_kernels(ground: SelfTestSetup) -> float:
    """Logits and gradients of fused kernels are those of the layers' own forward, to rounding."""
    both = (ground.frozen, ground.trainable)
    bare, fused, gradient = ground.logits(ground.rows), ground.logits(ground.rows, *both), ground.gradient()
    ground.stack.route.plain = True
    try:
        plain, expected = ground.logits(ground.rows, *both), ground.gradient()
    finally:
        ground.stack.route.plain = False
    apart = _compare("the fused kernels' logits", fused, plain, bare, ground.tolerance)
    off = float(torch.linalg.vector_norm(gradient - expected) / torch.linalg.vector_norm(expected))
    if not off <= ground.tolerance:
        raise _failed(f"the fused kernels' gradients are {off:.1%} off")
    return max(apart, off)


def _compare(
    what: str, mine: Sequence[torch.Tensor], other: Sequence[torch.Tensor], bare: Sequence[torch.Tensor], limit: float
) -> float:
    share = _share(mine, other, bare)
    if not share <= limit:
        raise _failed(f"{what} are {share:.1%} of the adapters' effect away from what they should be")
    return share


def _share(mine: Sequence[torch.Tensor], other: Sequence[torch.Tensor], bare: Sequence[torch.Tensor]) -> float:
    """||mine - other|| / ||other - bare||: a difference as a share of what the adapters change."""
    difference = torch.linalg.vector_norm(torch.cat([a - b for a, b in zip(mine, other, strict=True)]))
    return float(difference / torch.linalg.vector_norm(torch.cat([a - b for a, b in zip(other, bare, strict=True)])))


def _adapter(stack: Stack, name: str) -> Adapter:
    """A random adapter of low rank whose delta is `_SIZE` of each layer's weights, in Frobenius norm."""
    shape = LoraSettings(r=_RANK, alpha=float(_RANK), rslora=False, targets=stack.settings.targets)
    layers = {m.name: m.base for m in stack.base.model.modules() if isinstance(m, StackedLinear)}
    n = sum(_RANK * (n_in + n_out) for n_in, n_out in stack.sizes.values())
    generator = torch.Generator().manual_seed(seed_of("self-test", name))
    values = torch.randn(n, generator=generator).to(stack.base.device)
    adapter = Adapter(shape, stack.base.name, stack.sizes, values)
    for module, (a, b) in adapter.weights.items():
        wanted = _SIZE * torch.linalg.vector_norm(dense_weight(layers[module]))
        b.data.mul_(wanted / (torch.linalg.vector_norm(a.data) * torch.linalg.vector_norm(b.data) / _RANK**0.5))
    return adapter


def _failed(what: str) -> TrainingError:
    return TrainingError(
        f"self-test: {what}", where="engine", fix="set model.engine = 'torch', and report this with `fastconv doctor`"
    )
