"""Layers that read one input as one product: views of one weight, the same numbers, gradients and masks as one by one."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: run make test-fused", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "1")

from fastconv.engine.attention import Packed, Padded
from fastconv.engine.kernels.joined import Joined, can_join, joined_product
from fastconv.engine.kernels.layers import use_fused_decoder
from fastconv.engine.kernels.lora import StackedKernel
from fastconv.engine.kernels.lora_launch import _Stacked
from fastconv.engine.kernels.lora_tables import Tiling
from fastconv.engine.lora import Adapter, Route, Slot, StackedLinear
from fastconv.engine.micro_batch import token_seeds
from fastconv.engine.model import Base
from fastconv.engine.score import _layers_in_fp32
from fastconv.engine.stack import Stack
from fastconv.engine.train import Hooks, Job, start, train
from fastconv.recipe import LoraSettings
from tests.engine_kit import ragged_rows, random_adapter, tiny_stack, train_settings

pytestmark = pytest.mark.fused

CPU = torch.device("cpu")
TILING = Tiling(16, 16, 32, 2, 16, 32, 32, 16, 16)
#: Outputs of q, k and v: as in a model with grouped queries, none a multiple of a tile.
OUTS, N_IN = {"l.q_proj": 40, "l.k_proj": 12, "l.v_proj": 12}, 72


def layers_of(n: int, *, bias: bool) -> list[StackedLinear]:
    generator = torch.Generator().manual_seed(0)
    route, found = Route(kernel=StackedKernel(CPU, TILING)), []
    for name, n_out in list(OUTS.items())[:n]:
        base = nn.Linear(N_IN, n_out, bias=bias).requires_grad_(False)
        for p in base.parameters():
            p.data = torch.randn(p.shape, generator=generator) * N_IN**-0.5
        found.append(StackedLinear(base, name, route))
    return found


def adapter(seed: int, n: int, r: int = 8, **patterns: object) -> Adapter:
    sizes = {name: (N_IN, n_out) for name, n_out in list(OUTS.items())[:n]}
    shape = LoraSettings(r=r, alpha=2 * r, targets=tuple(name.split(".")[1] for name in sizes), **patterns)  # pyright: ignore[reportArgumentType]
    size = sum(shape.rank(name) * (N_IN + n_out) for name, n_out in zip(sizes, OUTS.values(), strict=False))
    return Adapter(shape, "base", sizes, 0.2 * torch.randn(size, generator=torch.Generator().manual_seed(seed)))


def results(
    layers: list[StackedLinear], joined: Joined | None, x: torch.Tensor, dy: torch.Tensor
) -> list[torch.Tensor]:
    """(y, dx, every gradient of A and B), at once or layer by layer."""
    route = layers[0].route
    trained = [slot.trainable for slot in route.slots if slot.trainable is not None]
    for one in trained:
        one.train(torch.zeros_like(one.flat))
    route.kernel.release()  # pyright: ignore[reportOptionalMemberAccess]
    given = x.clone().requires_grad_()
    y = torch.cat([layer(given) for layer in layers], -1) if joined is None else joined.product(layers, given)
    assert y is not None
    y.backward(dy)
    grads = [weight.grad.clone() for one in trained for pair in one.weights.values() for weight in pair]  # pyright: ignore[reportOptionalMemberAccess]
    assert given.grad is not None
    return [y.detach(), given.grad, *grads]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("case", ["one", "frozen", "two_slots", "ranks_of_their_own"])
def test_they_give_what_they_give_one_by_one(n: int, dropout: float, case: str) -> None:
    layers = layers_of(n, bias=n == 3)
    frozen = () if case == "one" else (adapter(1, n, 5 if case == "two_slots" else 8),)
    patterns = {"rank_pattern": {"k_proj": 4}} if case == "ranks_of_their_own" else {}
    slots = [Slot(frozen, adapter(2, n, **patterns), dropout)]
    lengths = [37]
    if case == "two_slots":
        slots, lengths = [*slots, Slot((), adapter(3, n), dropout)], [20, 17]
    route = layers[0].route
    route.slots = tuple(slots)
    route.spans = ((0, 20), (20, 37)) if len(slots) > 1 else None
    route.dropout_seeds = token_seeds([(101 + 7 * i, length) for i, length in enumerate(lengths)], CPU)
    x = torch.randn(37, N_IN, generator=torch.Generator().manual_seed(5))
    dy = torch.randn(37, sum(layer.out_features for layer in layers), generator=torch.Generator().manual_seed(6))
    apart = results(layers, None, x, dy)
    together = results(layers, Joined([layer.base for layer in layers]), x, dy)
    assert len(apart) == 2 + 2 * n * len(slots)
    for one, other in zip(apart, together, strict=True):
        assert float((one - other).norm() / one.norm()) < 2e-6
    assert torch.equal(apart[0], together[0])


@pytest.mark.parametrize("wide_from", [0, 20, 50, 100])
def test_wide_modules_sum_over_longer_chunks(wide_from: int) -> None:
    """Chunks of 64 tokens for 3 modules, from none of them on to all: the same gradients."""
    layers, found = layers_of(3, bias=True), []
    x = torch.randn(37, N_IN, generator=torch.Generator().manual_seed(5))
    dy = torch.randn(37, sum(OUTS.values()), generator=torch.Generator().manual_seed(6))
    for tiling in (TILING, replace(TILING, wide_chunk=64, wide_from=wide_from)):
        route = layers[0].route
        route.kernel = StackedKernel(CPU, tiling)
        route.slots, route.spans = (Slot((), adapter(2, 3)), Slot((), adapter(3, 3))), ((0, 20), (20, 37))
        found.append(results(layers, Joined([layer.base for layer in layers]), x, dy))
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / one.norm()) < 2e-6


def test_layers_that_some_adapter_does_not_reach_are_computed_one_by_one() -> None:
    layers = layers_of(3, bias=True)
    joined = Joined([layer.base for layer in layers])
    route, x = layers[0].route, torch.randn(9, N_IN)
    assert torch.allclose(joined.product(layers, x), torch.cat([layer(x) for layer in layers], -1))  # pyright: ignore[reportArgumentType]
    route.slots = (Slot((adapter(1, 2),)),)  # q and k alone
    assert joined.product(layers, x) is None
    route.slots, route.plain = (Slot((adapter(1, 3),)),), True
    assert joined.product(layers, x) is None, "without kernels for comparison"
    route.slots, route.plain = (Slot((adapter(1, 3, 64),)),), False
    assert joined.product(layers, x) is not None
    route.slots = (Slot((adapter(1, 3, 128),)),)
    assert joined.product(layers, x) is None, "too much for a block"


def fused_base(folder: Path, dtype: torch.dtype = torch.float32) -> Base:
    """A tiny base with our decoder, without a stack."""
    base: Base = tiny_stack(folder).base
    for module in list(base.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, StackedLinear):
                setattr(module, name, child.base)
    base.model.to(dtype)
    use_fused_decoder(base.model)
    return base


def fused_stack(folder: Path, *, joined: bool) -> Stack:
    """The same with a stack and the kernel."""
    base = fused_base(folder)
    if not joined:
        for module in base.model.modules():
            module.__dict__.pop("joined", None)
    return Stack(base, LoraSettings(r=4, alpha=8), "stacked")


@pytest.mark.parametrize("folder", ["tiny_qwen", "tiny_llama"])
def test_a_model_trains_as_one_by_one(
    folder: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs in one step, one above a frozen adapter: losses, gradients' norms and weights."""
    path, outcomes, n_calls = request.getfixturevalue(folder), [], []
    calls = 0
    forward = _Stacked.forward

    def counted(ctx, x, call, *trained):
        nonlocal calls
        calls += 1
        return forward(ctx, x, call, *trained)

    monkeypatch.setattr(_Stacked, "forward", staticmethod(counted))
    for together in (False, True):
        stack = fused_stack(path, joined=together)
        settings = train_settings(dropout=0.1, lr=1e-2, batch_rows=1, epochs=1)
        jobs = [
            Job(name, ragged_rows(2, seed, longest=9), settings, (name, 42), below)
            for name, seed, below in (("a", 1, (random_adapter(stack, 1),)), ("b", 2, ()))
        ]
        calls, trainees = 0, [start(stack, job) for job in jobs]
        train(stack, trainees, Hooks())
        n_calls.append(calls)
        outcomes.append(trainees)
    assert n_calls[1] * 7 == n_calls[0] * 4, "seven products in a layer, or four"
    for plain, joined in zip(*outcomes, strict=True):
        assert plain.losses.tolist() == pytest.approx(joined.losses.tolist(), abs=1e-5)
        assert plain.norms.tolist() == pytest.approx(joined.norms.tolist(), rel=1e-4)
        assert float((plain.adapter.flat - joined.adapter.flat).abs().max()) < 1e-4


def test_weights_are_views_and_the_model_is_the_same_to_whoever_reads_it(tiny_qwen: Path) -> None:
    stack = fused_stack(tiny_qwen, joined=True)
    right = {name: tensor.clone() for name, tensor in tiny_stack(tiny_qwen).base.model.state_dict().items()}
    found = stack.base.model.state_dict()
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in right.items()}
    assert all(torch.equal(found[name], right[name]) for name in right)
    attention = stack.base.model.model.layers[0].self_attn  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    weights = [layer.base.weight for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    assert sum(w.numel() for w in weights) * 4 == weights[0].untyped_storage().nbytes(), "no memory twice"


def test_near_ties_in_fp32_leave_the_layers_joined(tiny_qwen: Path) -> None:
    """Each layer is widened while it runs: its joined weights would stay beside new ones, and never be used again."""
    base = fused_base(tiny_qwen, torch.float16)
    base = replace(base, dtype=torch.float16)
    mlp = base.model.model.layers[0].mlp  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    x = torch.randn(1, 3, mlp.gate_proj.in_features).half()
    before = joined_product(mlp, x)
    ids = torch.arange(5)
    with _layers_in_fp32(base), torch.no_grad():
        assert base.hidden(ids, ids, Packed.of([5])).dtype == torch.float32
    assert before is not None
    assert torch.equal(before, joined_product(mlp, x))  # pyright: ignore[reportArgumentType]


def test_what_cannot_be_joined_is_left_alone() -> None:
    plain = nn.Linear(8, 4)
    assert can_join([plain, nn.Linear(8, 6)])
    assert not can_join([plain, nn.Linear(8, 6, bias=False)])
    assert not can_join([plain, nn.Linear(6, 6)])
    assert not can_join([plain, nn.Linear(8, 6, dtype=torch.float64)])
    quantised = nn.Linear(8, 6)
    quantised.weight = type("Params4bit", (nn.Parameter,), {})(quantised.weight.data)
    assert not can_join([quantised, quantised])
    with pytest.raises(ValueError, match="cannot be joined"):
        Joined([plain, nn.Linear(6, 6)])


def test_joined_swiglu_and_rope_are_the_separate_ones_to_the_bit() -> None:
    from fastconv.engine.kernels.elementwise import rope, rope_joined, swiglu, swiglu_joined

    generator = torch.Generator().manual_seed(0)
    both = torch.randn(5, 2 * 333, generator=generator).requires_grad_()
    dy = torch.randn(5, 333, generator=generator)
    apart, together = swiglu(*both.chunk(2, -1)), swiglu_joined(both)
    assert torch.equal(apart, together)
    assert torch.equal(*(torch.autograd.grad(y, both, dy)[0] for y in (apart, together)))
    x = torch.randn(6, (3 + 2 * 2) * 8, generator=generator).requires_grad_()
    angle = torch.randn(6, 4, generator=generator).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()
    q, k, v = (part.reshape(6, -1, 8) for part in x.split([24, 16, 16], -1))
    one, other = (rope(q, cos, sin), rope(k, cos, sin), v), rope_joined(x, cos, sin, (3, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    given = [torch.randn(part.shape, generator=generator) for part in one]
    assert torch.equal(*(torch.autograd.grad(parts, x, given)[0] for parts in (one, other)))


def test_rope_lays_rows_out_for_attention_in_the_same_pass() -> None:
    """Three rows in six tokens, two of them padding at the end, in a batch of 4 rows of 3."""
    from fastconv.engine.kernels.elementwise import rope_joined

    generator = torch.Generator().manual_seed(0)
    layout = Padded.of([1, 3, 2], n_tok=8, width=3, n_rows=4)
    layout = layout.with_inputs(
        [layout.source.view(4, -1)[:, :3].flatten(), layout.place // 64 * 3 + layout.place % 64]
    )
    place = torch.where(layout.place < 0, -1, layout.place)
    place[6:] = -1
    x = torch.randn(8, (3 + 2 * 2) * 8, generator=generator).requires_grad_()
    angle = torch.randn(8, 4, generator=generator).repeat(1, 2)
    apart = rope_joined(x, angle.cos(), angle.sin(), (3, 2))
    laid = [torch.where((layout.source >= 0)[:, None, None], part[layout.source.clamp(min=0)], 0.0) for part in apart]
    together = rope_joined(x, angle.cos(), angle.sin(), (3, 2), (layout.source, place))
    assert all(torch.equal(one, other) for one, other in zip(laid, together, strict=True))
    given = [torch.randn(part.shape, generator=generator) for part in laid]
    one, other = (torch.autograd.grad(parts, x, given)[0] for parts in (laid, together))
    assert torch.equal(one, other)
    assert torch.equal(other[6:], torch.zeros_like(other[6:]))


@pytest.mark.parametrize("folder", ["tiny_qwen", "tiny_llama"])
def test_a_padded_layout_gives_the_logits_of_packed_rows(folder: str, request: pytest.FixtureRequest) -> None:
    """In 16 bits, where the joined layers write to the padded batch themselves."""
    base = fused_base(request.getfixturevalue(folder), torch.float16)
    rows = [list(row.ids) for row in ragged_rows(3)]
    lengths = [len(row) for row in rows]
    ids = torch.tensor([token for row in rows for token in row])
    positions = torch.cat([torch.arange(n) for n in lengths])
    found = [base.hidden(ids, positions, layout) for layout in (Packed.of(lengths), Padded.of(lengths, n_rows=4))]
    assert torch.allclose(*found, atol=0.02)
