"""The stacked kernel through Triton's interpreter on the CPU, against the same sums in fp64."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: run make test-fused", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "1")

from fastconv.chat import Rendered
from fastconv.engine import decode, generate
from fastconv.engine.attention import Padded
from fastconv.engine.cuda_graph import CapturedSteps, StepTimes
from fastconv.engine.kernels.lora import StackedKernel
from fastconv.engine.kernels.lora_tables import Tiling
from fastconv.engine.lora import Adapter, Route, Slot, StackedLinear, keep_mask
from fastconv.engine.micro_batch import Item, MicroBatch, PaddedSizes, make_micro_batch, token_seeds
from fastconv.engine.model import load_base
from fastconv.engine.stack import Stack
from fastconv.engine.train import Hooks, Job, _forward_backward, start, train
from fastconv.errors import ModelError, TrainingError
from fastconv.recipe import LoraSettings, ModelSettings, SamplingSettings
from tests.engine_kit import (
    BEHAVIOR,
    StandInDevice,
    live_logits,
    ragged_rows,
    random_adapter,
    tiny_stack,
    train_settings,
)

pytestmark = pytest.mark.fused

CPU = torch.device("cpu")
#: Small blocks, so that small sizes have several tiles, splits and chunks, none of them whole.
TILING = Tiling(16, 16, 32, 2, 16, 32, 32, 16, 16)
NAME, OTHER = "layer.q_proj", "layer.o_proj"
N_IN, N_OUT = 72, 40


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def adapter(
    r: int,
    seed: int,
    targets: tuple[str, ...] = ("q_proj", "o_proj"),
    n_in: int = N_IN,
    n_out: int = N_OUT,
    **patterns: Any,
) -> Adapter:
    """A random adapter on two layers of one size, or on one of them."""
    sizes = {name: (n_in, n_out) for name in (NAME, OTHER) if name.rsplit(".", 1)[-1] in targets}
    shape = LoraSettings(r=r, alpha=2 * r, targets=targets, **patterns)
    n = sum(shape.rank(name) for name in sizes) * (n_in + n_out)
    return Adapter(shape, "base", sizes, 0.2 * torch.randn(n, generator=torch.Generator().manual_seed(seed)))


def layer(tiling: Tiling = TILING, *, bias: bool = True, n_in: int = N_IN, n_out: int = N_OUT, dtype=torch.float32):
    """A stacked layer with the kernel on its route."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(n_in, n_out, bias=bias)
    for p in base.parameters():
        p.data = torch.randn(p.shape, generator=generator) * n_in**-0.5
    base.to(dtype).requires_grad_(False)
    return StackedLinear(base, NAME, Route(kernel=StackedKernel(CPU, tiling)))


def go_live(stacked: StackedLinear, slots: tuple[Slot, ...], lengths: tuple[int, ...]) -> torch.Tensor:
    """Put the slots on the layer's route, one row each; every trainable adapter gets a gradient of zeros."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    stacked.route.slots = slots
    stacked.route.spans = (
        tuple((end - n, end) for end, n in zip(ends, lengths, strict=True)) if len(slots) > 1 else None
    )
    stacked.route.dropout_seeds = token_seeds([(101 + 7 * i, n) for i, n in enumerate(lengths)], CPU)
    for slot in slots:
        if slot.trainable is not None:
            slot.trainable.train(torch.zeros_like(slot.trainable.flat))
    return torch.randn(sum(lengths), stacked.base.in_features, generator=torch.Generator().manual_seed(5))


def in_fp64(stacked: StackedLinear, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(y, dx, dA and dB of every slot's trainable adapter) as autograd gives them in fp64 from the formula."""
    route = stacked.route
    assert route.dropout_seeds is not None
    wide = x.double().requires_grad_()
    y = wide @ stacked.base.weight.double().t()
    if stacked.base.bias is not None:
        y = y + stacked.base.bias.double()
    leaves, parts = [], []
    for slot, (begin, end) in zip(route.slots, route.spans or ((0, len(x)),), strict=True):
        part, rows = y[begin:end], wide[begin:end]
        for one in slot.frozen:
            if NAME in one.weights:
                a, b = (w.detach().double() for w in one.weights[NAME])
                part = part + one.scales[NAME] * (rows @ a.t() @ b.t())
        if slot.trainable is not None and NAME in slot.trainable.weights:
            a, b = (w.detach().double().requires_grad_() for w in slot.trainable.weights[NAME])
            leaves += [a, b]
            mask = keep_mask(route.dropout_seeds[begin:end], x.shape[1], stacked.salt, slot.dropout)
            exact = (mask > 0).double() / (1 - slot.dropout)
            part = part + slot.trainable.scales[NAME] * ((rows * exact) @ a.t() @ b.t())
        parts.append(part)
    y = torch.cat(parts)
    return (y.detach(), *torch.autograd.grad(y, [wide, *leaves], dy.double()))


def by_kernel(stacked: StackedLinear, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same by the kernel; gradients of the weights are read from `.grad`."""
    given = x.clone().requires_grad_()
    y = stacked(given)
    y.backward(dy)
    grads = [
        weight.grad.clone()
        for slot in stacked.route.slots
        if slot.trainable is not None
        for weight in slot.trainable.weights.get(NAME, ())
    ]
    return (y.detach(), given.grad, *grads)


def distance(mine: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> float:
    """Largest relative error of any of the tensors, in the Frobenius norm."""
    assert [t.shape for t in mine] == [t.shape for t in theirs]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(mine, theirs, strict=True))


def check(stacked: StackedLinear, slots: tuple[Slot, ...], lengths: tuple[int, ...], tolerance: float = 2e-6) -> None:
    dtype = stacked.base.weight.dtype
    x = go_live(stacked, slots, lengths).to(dtype)
    dy = torch.randn(len(x), stacked.base.out_features, generator=torch.Generator().manual_seed(6)).to(dtype)
    assert distance(by_kernel(stacked, x, dy), in_fp64(stacked, x, dy)) < tolerance
    for slot in slots:
        assert all(weight.grad is None for one in slot.frozen for pair in one.weights.values() for weight in pair)


# --- one slot --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["branches_first", "base_first"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_and_all_gradients_are_those_in_fp64(order, bias: bool, dropout: float) -> None:
    stacked = layer(replace(TILING, order=order), bias=bias)
    check(stacked, (Slot((adapter(8, 1),), adapter(8, 2), dropout),), (45,))


@pytest.mark.parametrize(("frozen", "trained"), [(8, 64), (64, 8), (32, 32), (24, 16), (4, 3)])
def test_ranks(frozen: int, trained: int) -> None:
    check(layer(), (Slot((adapter(frozen, 1),), adapter(trained, 2), 0.1),), (19,))


def test_ranks_and_scales_of_single_modules() -> None:
    """The other layer's are the adapter's own: the table and the scale of this one must be its, in both parts of a slot."""
    few = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 40.0}}
    many = {"rank_pattern": {"layer.q_proj": 20}}
    check(layer(), (Slot((adapter(8, 1, **few),), adapter(6, 2, **many), 0.05),), (40,))
    check(layer(), (Slot((adapter(8, 1, **few), adapter(4, 3, **many)), adapter(6, 2)),), (40,))


def test_without_a_frozen_adapter_and_with_two_of_other_targets() -> None:
    check(layer(), (Slot((), adapter(8, 2), 0.1),), (20,))
    below = (adapter(8, 1), adapter(4, 3, ("o_proj",)), adapter(16, 4, ("q_proj",)))
    check(layer(), (Slot(below, adapter(8, 2), 0.1),), (20,))


@pytest.mark.parametrize(("n_in", "n_out", "n_tok"), [(16, 16, 1), (33, 17, 16), (50, 70, 33), (64, 64, 64)])
def test_sizes_that_fit_no_tile(n_in: int, n_out: int, n_tok: int) -> None:
    pair = (adapter(8, seed, n_in=n_in, n_out=n_out) for seed in (1, 2))
    check(layer(n_in=n_in, n_out=n_out), (Slot((next(pair),), next(pair), 0.2),), (n_tok,))


def test_the_default_tiling() -> None:
    pair = (adapter(32, seed, n_in=600, n_out=200) for seed in (1, 2))
    check(layer(Tiling(), n_in=600, n_out=200), (Slot((next(pair),), next(pair), 0.05),), (300,))


def test_half_precision_accumulates_in_fp32() -> None:
    """In fp16; the interpreter multiplies bf16 as if its bits were integers, so that waits for a GPU (test_gpu)."""
    slot = Slot((adapter(8, 1),), adapter(8, 2), 0.1)
    check(layer(dtype=torch.float16), (slot,), (45,), 0.002)
    assert slot.trainable is not None
    assert all(w.grad.dtype == torch.float32 for w in slot.trainable.weights[NAME])


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_the_mask_is_keep_mask_bit_for_bit_in_both_passes(p: float) -> None:
    """A = identity and B = identity make the branch the mask itself; with large seeds, which need all 32 bits."""
    n = 32
    stacked = layer(bias=False, n_in=n, n_out=n)
    stacked.base.weight.data.zero_()
    one = adapter(n, 1, n_in=n, n_out=n)
    for weight in one.weights[NAME]:
        weight.data.copy_(torch.eye(n))
    go_live(stacked, (Slot((), one, p),), (40,))
    seeds = torch.randint(0, 2**31 - 1, (40,), generator=torch.Generator().manual_seed(3)).to(torch.int32)
    stacked.route.dropout_seeds = seeds
    x = torch.ones(40, n, requires_grad=True)
    y = stacked(x)
    y.backward(torch.ones_like(y))
    kept = keep_mask(seeds, n, stacked.salt, p) > 0
    assert 0.3 * p < 1 - float(kept.float().mean()) < 1.5 * p
    assert torch.equal(y.detach() != 0, kept)
    assert torch.equal(x.grad != 0, kept)
    a_grad = one.weights[NAME][0].grad  # column c: the kept x of channel c, summed over tokens
    assert torch.allclose(a_grad, (one.scale / (1 - p) * kept.float()).sum(0).expand(n, n))


# --- several slots ---------------------------------------------------------------------------------------------------


def several() -> tuple[Slot, ...]:
    """Ragged ranks; with and without a frozen adapter, a trainable one, this layer as a target, dropout."""
    return (
        Slot((adapter(8, 1),), adapter(16, 2), 0.2),
        Slot((), adapter(8, 3), 0.5),
        Slot((adapter(4, 4),), None),
        Slot((adapter(8, 5, ("o_proj",)),), adapter(8, 6, ("o_proj",)), 0.2),
        Slot((adapter(8, 7), adapter(8, 8)), adapter(40, 9), 0.0),
    )


def test_ragged_groups() -> None:
    check(layer(), several(), (17, 40, 3, 16, 1))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other) if one.is_cuda else torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_each_slot_alone_gives_the_same_bits() -> None:
    """But for what a library chooses by size: the base's own product, whose weight is zero here, and on a CPU numpy's, by which
    the interpreter multiplies: on some processors it rounds a block otherwise (seen at 1e-6)."""
    stacked, lengths = layer(bias=False), (17, 40, 3, 16, 35)
    stacked.base.weight.data.zero_()
    slots = several()
    x = go_live(stacked, slots, lengths)
    dy = torch.randn(len(x), N_OUT, generator=torch.Generator().manual_seed(6))
    seeds = stacked.route.dropout_seeds
    together = by_kernel(stacked, x, dy)
    at, grads = 0, iter(together[2:])
    for slot, n in zip(slots, lengths, strict=True):
        go_live(stacked, (slot,), (n,))
        stacked.route.dropout_seeds = seeds[at : at + n]
        alone = by_kernel(stacked, x[at : at + n], dy[at : at + n])
        assert _same(alone[0], together[0][at : at + n])
        assert _same(alone[1], together[1][at : at + n])
        assert all(_same(mine, next(grads)) for mine in alone[2:])
        at += n


def test_twice_the_same_bits_and_gradients_accumulate() -> None:
    stacked, slots = layer(), several()
    x = go_live(stacked, slots, (17, 40, 3, 16, 1))
    dy = torch.randn(len(x), N_OUT, generator=torch.Generator().manual_seed(6))
    first, second = by_kernel(stacked, x, dy), by_kernel(stacked, x, dy)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert all(torch.equal(2 * one, two) for one, two in zip(first[2:], second[2:], strict=True))
    flat = slots[0].trainable
    assert flat is not None
    assert all(weight.grad is not None for pair in flat.weights.values() for weight in pair)


# --- the edges -------------------------------------------------------------------------------------------------------


def test_an_untargeted_layer_is_the_bare_base() -> None:
    stacked = layer()
    x = go_live(stacked, (Slot((adapter(8, 1, ("o_proj",)),), adapter(8, 2, ("o_proj",)), 0.5),), (9,))
    assert torch.equal(stacked(x), stacked.base(x))


def test_x_without_a_gradient_still_trains_the_adapter() -> None:
    stacked, one = layer(), adapter(8, 2)
    x = go_live(stacked, (Slot((), one, 0.1),), (20,))
    stacked(x).sum().backward()
    assert float(one.weights[NAME][1].grad.abs().max()) > 0


def test_no_seeds_no_dropout() -> None:
    stacked, one = layer(), adapter(8, 2)
    x = go_live(stacked, (Slot((), one, 0.5),), (20,))
    with torch.no_grad():
        dropped = stacked(x)
        stacked.route.dropout_seeds = None
        whole = stacked(x)
    a, b = (w.detach() for w in one.weights[NAME])
    assert torch.allclose(whole, stacked.base(x) + one.scale * (x @ a.t() @ b.t()), atol=1e-5)
    assert not torch.allclose(dropped, whole, atol=1e-2)


def test_a_changed_adapter_is_read_again_in_the_next_block_or_on_refresh() -> None:
    stacked, one = layer(dtype=torch.float16), adapter(8, 2)
    slots = (Slot((one,)),)
    x = go_live(stacked, slots, (20,)).half()
    before = stacked(x)
    one.flat.mul_(2.0)
    stacked.route.kernel.refresh()
    after = stacked(x)
    assert not torch.equal(before, after)
    one.flat.mul_(0.5)
    stacked.route.slots = (Slot((one,)),)
    assert torch.equal(stacked(x), before)


def test_two_frozen_adapters_are_read_again_on_refresh_and_outlive_the_block() -> None:
    stacked, pair = layer(dtype=torch.float16), (adapter(8, 2), adapter(4, 3))
    x = go_live(stacked, (Slot(pair),), (20,)).half().requires_grad_()
    y = stacked(x)
    pair[1].flat.mul_(2.0)
    stacked.route.kernel.refresh()
    again = stacked(x)
    assert not torch.equal(y, again)
    stacked.route.kernel.release()
    torch.full((4096,), float("nan"), dtype=torch.float16)  # would land where the joined weights lay
    again.sum().backward()
    exact = sum(one.scale * one.weights[NAME][1] @ one.weights[NAME][0] for one in pair) + stacked.base.weight.float()
    assert torch.allclose(x.grad.float(), exact.sum(0).expand(20, -1), atol=0.05)


def test_blocks_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples"):
        Tiling(shrink_k=64, shrink_split=32)


def test_a_trainable_adapter_without_a_gradient_is_refused() -> None:
    stacked, one = layer(), adapter(8, 2)
    x = go_live(stacked, (Slot((), one),), (20,))
    for pair in one.weights.values():
        for weight in pair:
            weight.grad = None
    with pytest.raises(TrainingError, match=r"Adapter\.train"):
        stacked(x)


def test_without_a_gpu_or_the_interpreter_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ModelError, match="needs a GPU"):
        StackedKernel(CPU)


# --- a whole model ---------------------------------------------------------------------------------------------------


def both(folder: Path) -> tuple[Stack, Stack]:
    """The same tiny base by torch's operations and by the kernel."""
    plain, stacked = tiny_stack(folder), tiny_stack(folder)
    stacked.route.kernel = StackedKernel(CPU, Tiling(64, 128, 128, 2, 64, 128, 64, 64, 128))
    return plain, stacked


def test_a_tiny_model_trains_as_by_torchs_operations(tiny_qwen: Path) -> None:
    """Two jobs in one step, one above a frozen adapter, a few steps: losses, weights and the frozen adapter."""
    outcomes = []
    for stack in both(tiny_qwen):
        snapshot = random_adapter(stack, 1)
        settings = train_settings(dropout=0.1, lr=1e-2, batch_rows=1, epochs=1)
        jobs = [
            Job(name, ragged_rows(3, seed, longest=12), settings, (name, 42), below)
            for name, seed, below in (("a", 1, (snapshot,)), ("b", 2, ()))
        ]
        trainees = [start(stack, job) for job in jobs]
        train(stack, trainees, Hooks())
        outcomes.append(trainees)
    for plain, stacked in zip(*outcomes, strict=True):
        assert plain.losses.tolist() == pytest.approx(stacked.losses.tolist(), abs=1e-5)
        assert plain.norms.tolist() == pytest.approx(stacked.norms.tolist(), rel=1e-4)
        assert float((plain.adapter.flat - stacked.adapter.flat).abs().max()) < 1e-4


def padded_batch(stack: Stack, slots: tuple[Slot, ...], lengths: tuple[int, ...]) -> MicroBatch:
    """A row of random tokens for each slot, in the layout of a GPU."""
    rows = [Rendered(tuple((7 * i + 3 * n) % 256 for i in range(n)), 2) for n in lengths]
    items = [Item(owner, row, 1 / row.n_supervised, 99 + owner) for owner, row in enumerate(rows)]
    batch = make_micro_batch(stack.base, slots, items, lambda lengths, n: PaddedSizes(n_supervised=24))
    return replace(batch, layout=Padded.of(lengths))


@pytest.mark.parametrize("lengths", [((12,), (12,)), ((5, 7), (8, 4))], ids=["one_slot", "two_slots_of_other_spans"])
def test_a_graph_captured_for_some_adapters_trains_others(
    tiny_qwen: Path, lengths: tuple[tuple[int, ...], tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is captured for the first set of slots, and replayed for a second with other weights, gradients, frozen
    adapters and spans: bit for bit what the launched step computes, and nothing more is added to the first."""
    monkeypatch.setattr(StepTimes, "worth_capturing", lambda *_: True)
    _, stack = both(tiny_qwen)
    device = StandInDevice(stack)
    steps = CapturedSteps(stack, partial(_forward_backward, stack), device)
    assert steps.shared
    sets = [
        tuple(
            Slot((random_adapter(stack, 10 * k + i),), random_adapter(stack, 100 + 10 * k + i), 0.1)
            for i in range(len(lengths[k]))
        )
        for k in range(2)
    ]
    batches = [padded_batch(stack, slots, own) for slots, own in zip(sets, lengths, strict=True)]

    def run(batch: MicroBatch, how: CapturedSteps) -> tuple[torch.Tensor, ...]:
        for slot in batch.slots:
            assert slot.trainable is not None
            slot.trainable.train(torch.zeros_like(slot.trainable.flat))
        totals = torch.zeros(len(batch.slots))
        how.run(batch, totals)
        return totals, *gradients(batch)

    def gradients(batch: MicroBatch) -> list[torch.Tensor]:
        return [
            torch.cat([w.grad.flatten() for pair in slot.trainable.weights.values() for w in pair])
            for slot in batch.slots
        ]

    run(batches[0], steps)
    first = run(batches[0], steps)
    second = run(batches[1], steps)
    assert device.calls == ["capture", "replay", "replay"]
    launched = [run(batch, CapturedSteps(stack, partial(_forward_backward, stack), device)) for batch in batches]
    assert device.calls == ["capture", "replay", "replay"]
    for replayed, plain in zip((first, second), launched, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(replayed, plain, strict=True))
    assert not torch.equal(first[1], second[1])


def test_a_decoder_that_is_kept_samples_the_next_stack_with_its_graphs(
    tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stack = both(tiny_qwen)
    settings = SamplingSettings(temperature=1.0, max_new_tok=4)
    texts, seeds, device = [[1, 2, 3], [4, 5]], [1, 2], StandInDevice(stack)
    pairs = [(random_adapter(stack, seed), random_adapter(stack, seed + 1)) for seed in (1, 5)]
    kept = decode.DeviceDecoder(stack.base, decode.Cache(2, 16), settings, device)

    def drawn() -> list[Any]:
        found = []
        for pair in pairs:
            with stack.live(Slot(pair)):
                found.append(generate.sample(stack.base, texts, seeds, settings))
        return found

    expected = drawn()
    assert expected[0] != expected[1]

    def serving(base: Any, n_rows: int, max_length_tok: int, settings: Any) -> decode.DeviceDecoder:
        assert kept.serves(n_rows, max_length_tok, settings)
        return kept

    monkeypatch.setattr(generate, "_decoder", serving)
    monkeypatch.setattr(generate, "_is_small", lambda *given: True)
    assert drawn() == expected
    assert device.calls.count("capture") == 1, "the second stack is decoded with the graph of the first"
    assert not kept.serves(3, 16, settings)
    assert not kept.serves(2, 17, settings)
    assert not kept.serves(2, 16, settings.model_copy(update={"temperature": 0.5}))


def test_graphs_of_a_decoder_read_frozen_adapters_that_are_still_there(
    tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture releases the kernel: two frozen adapters are then joined anew, and graphs of other sizes have to know."""
    _, stack = both(tiny_qwen)
    kernel: Any = stack.route.kernel
    monkeypatch.setattr(decode.DeviceDecoder, "_step", lambda self, size: None)
    decoder = decode.DeviceDecoder(stack.base, decode.Cache(9, 16), SamplingSettings(), StandInDevice(stack))
    with stack.live(Slot((random_adapter(stack, 1), random_adapter(stack, 2)))):
        for size in (8, 8):
            decoder._run(size)
        before = kernel._live.packed  # held, so that nothing else is put there
        for size in (9, 9, 8):
            decoder._run(size)
        flat = kernel._live.packed[0][0].flat
        assert flat.data_ptr() != before[0][0].flat.data_ptr()
        graphs = [graph for graph in decoder._graphs.values() if graph is not None]
        assert len(graphs) == 2
        for _, tables in graphs:
            inside = tables.weights[..., :2] - flat.data_ptr()
            assert bool(((inside >= 0) & (inside < flat.numel() * flat.element_size())).all())


def test_addresses_are_told_apart_by_dtype() -> None:
    """An adapter was read in fp32 (near ties) and is gone; the next one's weights in 16 bits lie where it lay."""
    kernel, gone, late = StackedKernel(CPU, TILING), adapter(8, 1), adapter(8, 2)
    wide = kernel._make_live((Slot((gone,)),), torch.float32, False)
    kernel._cast[late] = {torch.float16: gone.flat.detach().view(torch.float16)[: late.flat.numel()]}
    narrow = kernel._make_live((Slot((late,)),), torch.float16, False)
    assert narrow.tables[0, 0, 0] == wide.tables[0, 0, 0]
    for live, size in ((wide, 4), (narrow, 2)):
        assert int(live.tables[0, 0, 1] - live.tables[0, 0, 0]) == 8 * N_IN * size


def test_live_logits_and_recomputed_activations(tiny_qwen: Path) -> None:
    plain, stacked = both(tiny_qwen)
    rows = [row.ids for row in ragged_rows(2, longest=12)]
    pair = [random_adapter(plain, 1), random_adapter(plain, 2, BEHAVIOR)]
    for one, other in zip(live_logits(plain, pair, rows), live_logits(stacked, pair, rows), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    job = Job("a", ragged_rows(2, 1, longest=12), train_settings(dropout=0.1, batch_rows=2, epochs=1), ("a", 42))
    kept, again = start(stacked, job), start(stacked, job)
    again.recomputes = True
    train(stacked, [kept], Hooks())
    train(stacked, [again], Hooks())
    assert torch.equal(kept.adapter.flat, again.adapter.flat)


def test_a_stack_takes_the_kernel_when_told(tiny_qwen: Path) -> None:
    def kernel(choice) -> StackedKernel | None:
        settings = ModelSettings.model_validate({"id": str(tiny_qwen), "device": "cpu", "dtype": "float32"})
        return Stack(load_base(settings), BEHAVIOR, choice).route.kernel

    assert isinstance(kernel("stacked"), StackedKernel)
    assert kernel("auto") is kernel("plain") is None


def test_the_comparison_is_well_formed(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastconv.bench import bench, kernels

    monkeypatch.setattr(kernels, "ROUNDS", 1)
    found = bench("kernel", str(tiny_qwen), device="cpu", dtype="float32", size=20)
    assert found["kind"] == "kernel"
    assert sum(line["per_block"] for line in found["extra"]["layers"]) == 7
    for errors in found["extra"]["errors"]:
        assert all(max(errors[way].values()) < 1e-5 for way in (kernels.PLAIN, *kernels.TILINGS))
