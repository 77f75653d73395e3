"""The training loop against PEFT's gradients, TRL's curve and itself under every way of splitting the work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastconv.chat import Rendered
from fastconv.engine import train as loop
from fastconv.engine import trl_reference as reference
from fastconv.engine.micro_batch import token_seeds
from fastconv.engine.model import Base
from fastconv.engine.stack import Stack
from fastconv.engine.train import Hooks, Job, lr_at, save_state, start, train, weighted_cross_entropy
from fastconv.engine.trainee import Trainee
from fastconv.errors import AdapterError, TrainingError
from fastconv.seeding import seed_of
from tests.engine_kit import (
    BEHAVIOR,
    SharedMask,
    peft_model,
    plain_model,
    ragged_rows,
    random_adapter,
    tiny_stack,
    train_settings,
)

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["tiny_qwen", "tiny_llama"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def stack(folder: Path) -> Stack:
    return tiny_stack(folder)


def job_of(stack: Stack, n_rows: int = 16, *, frozen: bool = False, name: str = "job", **changes) -> Job:
    """A job on random rows; `frozen` puts a snapshot below the trained adapter."""
    below = (random_adapter(stack, 1),) if frozen else ()
    return Job(name, ragged_rows(n_rows, seed_of("rows", name) % 1000), train_settings(**changes), (name, 42), below)


def finish(stack: Stack, *jobs: Job, until_step: int | None = None):
    """The trainees of these jobs, trained together."""
    trainees = [start(stack, job) for job in jobs]
    train(stack, trainees, Hooks(), until_step=until_step)
    return trainees


# --- against PEFT and TRL --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.5])
def test_gradients_are_pefts_and_the_frozen_adapter_gets_none(stack: Stack, folder: Path, dropout: float) -> None:
    snapshot, behavior = random_adapter(stack, 1), random_adapter(stack, 2)
    job = Job("job", ragged_rows(6), train_settings(batch_rows=6, dropout=dropout), ("job", 42), (snapshot,))
    trainee = start(stack, job)
    trainee.adapter.flat.copy_(behavior.flat)
    work = loop._items(0, trainee)
    totals = loop._gradients(stack, [trainee], work)
    assert totals is not None

    model = peft_model(folder, {"snapshot": snapshot, "behavior": behavior})
    seeds: list[torch.Tensor] = [torch.zeros(0)]
    if dropout:
        for module in stack.sizes:
            layer = model.base_model.model.get_submodule(module)
            salt = seed_of("dropout", module) & 0x7FFFFFFF
            layer.lora_dropout["behavior"] = SharedMask(salt, dropout, seeds)
    loss = torch.zeros(())
    for item in work:
        seeds[0] = token_seeds([(item.seed, len(item.row.ids))], torch.device("cpu"))
        logits = model(input_ids=torch.tensor([item.row.ids])).logits[0, item.row.n_prompt - 1 : -1]
        targets = torch.tensor(item.row.ids[item.row.n_prompt :])
        loss = loss + item.weight * torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    loss.backward()

    assert float(totals[0]) == pytest.approx(float(loss.detach()), abs=TOLERANCE)
    for module, pair in trainee.adapter.weights.items():
        layer = model.base_model.model.get_submodule(module)
        for mine, theirs in zip(pair, (layer.lora_A, layer.lora_B), strict=True):
            assert float((mine.grad - theirs["behavior"].weight.grad).abs().max()) < TOLERANCE, module
            assert theirs["snapshot"].weight.grad is None
    assert float(trainee.grad.abs().max()) > 0.01
    assert all(weight.grad is None for pair in snapshot.weights.values() for weight in pair)


@pytest.mark.parametrize(("frozen", "clip_norm"), [(False, 1.0), (True, 6.0)], ids=["convergence", "stacked"])
def test_our_curve_is_trls_over_50_steps(stack: Stack, folder: Path, frozen: bool, clip_norm: float) -> None:
    """With two clips: one that every step exceeds, and one that some do not."""
    job = job_of(stack, 18, frozen=frozen, epochs=10, lr=1e-3, clip_norm=clip_norm)  # 5 steps an epoch, one of 2 rows
    assert job.n_steps == 50
    first = stack.new_adapter(*job.seed_parts)
    theirs = reference.train_with_trl(plain_model(folder), job, first)
    (mine,) = finish(stack, job)
    assert len(theirs.losses) == 50
    assert clip_norm == 1.0 or 5 < sum(norm > clip_norm for norm in theirs.norms) < 45
    assert mine.losses[0] - mine.losses[-1] > 0.1, "the run must learn something for this to show anything"
    assert mine.losses.tolist() == pytest.approx(theirs.losses, abs=TOLERANCE)
    assert mine.norms.tolist() == pytest.approx(theirs.norms, abs=1e-4)
    assert float((mine.adapter.flat - theirs.weights).abs().max()) < 1e-4


def test_the_schedule_is_transformers_cosine(stack: Stack) -> None:
    from transformers import get_cosine_schedule_with_warmup

    settings = train_settings(lr=3e-4)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings.lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=4, num_training_steps=77)
    for step in range(77):
        assert lr_at(step, 77, settings) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


# --- against itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_micro_batches_do_not_change_the_result(stack: Stack, dropout: float) -> None:
    whole = job_of(stack, 16, frozen=True, batch_rows=16, dropout=dropout, epochs=6)
    (together,) = finish(stack, whole)
    single = replace(whole, settings=whole.settings.model_copy(update={"micro_batch_tok": 1}))
    (one_by_one,) = finish(stack, single)
    assert float((together.losses - one_by_one.losses).abs().max()) < TOLERANCE
    assert float((together.adapter.flat - one_by_one.adapter.flat).abs().max()) < TOLERANCE


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_adapters_trained_together_are_those_trained_alone(stack: Stack, dropout: float) -> None:
    jobs = [
        job_of(stack, 16, name="a", dropout=dropout),
        job_of(stack, 7, name="b", dropout=dropout, frozen=True, lr=5e-4),
        job_of(stack, 12, name="c", dropout=0.1, batch_rows=3),
    ]
    alone = [finish(stack, job)[0] for job in jobs]
    together = finish(stack, *jobs)
    for one, other in zip(alone, together, strict=True):
        assert one.step == other.step == one.job.n_steps
        assert float((one.losses - other.losses).abs().max()) < TOLERANCE
        assert float((one.adapter.flat - other.adapter.flat).abs().max()) < TOLERANCE


def test_dropout_does_something_and_keeps_the_mean(stack: Stack) -> None:
    plain, dropped = (finish(stack, job_of(stack, dropout=p))[0] for p in (0.0, 0.5))
    assert float((plain.adapter.flat - dropped.adapter.flat).abs().max()) > 1e-4
    mask = token_seeds([(12345, 4000)], torch.device("cpu"))
    from fastconv.engine.lora import keep_mask

    kept = keep_mask(mask, 64, 7, 0.05)
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.005)
    assert kept.unique().tolist() == [0.0, pytest.approx(1 / 0.95)]
    assert float((kept[:, 0] - kept[:, 1]).abs().mean()) == pytest.approx(2 * 0.05 * 0.95 / 0.95, abs=0.02)


def test_every_row_of_every_step_of_every_job_has_its_own_mask(stack: Stack) -> None:
    seeds = []
    for name in ("a", "b"):
        trainee = start(stack, job_of(stack, 8, name=name, dropout=0.1))
        for step in range(trainee.job.n_steps):
            trainee.step = step
            seeds += [item.seed for item in loop._items(0, trainee)]
    assert len(set(seeds)) == len(seeds) == 2 * 8 * 2
    one, other = (token_seeds([(seed, 9)], torch.device("cpu")) for seed in seeds[:2])
    assert len({*one.tolist(), *other.tolist()}) == 18


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_resume_is_bitwise(stack: Stack, dropout: float) -> None:
    job = job_of(stack, frozen=True, dropout=dropout)
    (whole,) = finish(stack, job)
    (half,) = finish(stack, job, until_step=3)
    resumed = start(stack, job, save_state(half))
    train(stack, [resumed], Hooks())
    assert resumed.adapter.flat.equal(whole.adapter.flat)
    assert resumed.losses.equal(whole.losses)
    assert resumed.norms.equal(whole.norms)
    assert resumed.last_loss == float(whole.losses[-1])
    assert all(resumed.moments[name].equal(whole.moments[name]) for name in ("exp_avg", "exp_avg_sq", "step"))


def test_a_state_of_another_job_is_refused(stack: Stack) -> None:
    (trainee,) = finish(stack, job_of(stack), until_step=1)
    state = save_state(trainee)
    with pytest.raises(TrainingError, match="of another job"):
        start(stack, job_of(stack, 80), state)
    with pytest.raises(AdapterError, match="not a whole safetensors"):
        start(stack, job_of(stack), state[:-9])


def test_frozen_bytes_do_not_change_and_a_change_is_seen(stack: Stack) -> None:
    job = job_of(stack, frozen=True)
    before = [adapter.sha256() for adapter in job.frozen]
    base = {name: p.clone() for name, p in stack.base.model.named_parameters()}
    finish(stack, job)
    assert [adapter.sha256() for adapter in job.frozen] == before
    assert all(p.equal(base[name]) for name, p in stack.base.model.named_parameters())

    def meddle(trainees) -> None:
        job.frozen[0].flat[0] += 1.0

    with pytest.raises(TrainingError, match="a frozen adapter changed"):
        train(stack, [start(stack, job)], Hooks(meddle), until_step=1)


def test_no_gradients_are_left_behind(stack: Stack) -> None:
    (trainee,) = finish(stack, job_of(stack, frozen=True))
    for adapter in (trainee.adapter, *trainee.job.frozen):
        assert not any(
            weight.requires_grad or weight.grad is not None for pair in adapter.weights.values() for weight in pair
        )
    assert stack.route.slots == ()
    assert all(p.grad is None for p in stack.base.model.parameters())


def test_bf16_base_keeps_fp32_adapters(tiny_qwen: Path) -> None:
    half = tiny_stack(tiny_qwen, dtype="bfloat16")
    (trainee,) = finish(half, job_of(half, frozen=True, dropout=0.05))
    assert trainee.adapter.flat.dtype == trainee.grad.dtype == trainee.moments["exp_avg"].dtype == torch.float32
    assert float(trainee.losses[-1]) < float(trainee.losses[0])


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1], ids=["read_at_once", "read_late"])
def test_a_step_that_is_not_finite_is_never_taken(stack: Stack, monkeypatch: pytest.MonkeyPatch, lag: int) -> None:
    """Also where the host reads the verdict a step late, as on a GPU: the guard is in the optimizer."""
    monkeypatch.setitem(loop._LAG_STEPS, "cpu", lag)
    job = job_of(stack)
    (good,) = finish(stack, job, until_step=3)
    trainee = start(stack, job)

    def poison(active) -> None:
        if trainee.step == 3:
            monkeypatch.setattr(stack.base, "hidden", lambda *args: Base.hidden(stack.base, *args) * float("nan"))

    with pytest.raises(TrainingError, match=r"loss nan .* at step 4") as error:
        train(stack, [trainee], Hooks(poison))
    assert "Fix:" in str(error.value)
    assert trainee.step == 3
    assert trainee.adapter.flat.equal(good.adapter.flat)
    assert trainee.moments["step"] == 3
    assert trainee.moments["exp_avg"].equal(good.moments["exp_avg"])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("lag", [0, 1], ids=["read_at_once", "read_late"])
def test_a_gradient_that_is_not_finite_beside_a_finite_loss_is_never_applied(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, lag: int, value: float
) -> None:
    monkeypatch.setitem(loop._LAG_STEPS, "cpu", lag)
    job, real = job_of(stack), loop._optimizer_step
    (good,) = finish(stack, job, until_step=3)
    trainee = start(stack, job)

    def overflow(one: Trainee, loss: torch.Tensor) -> None:
        assert bool(torch.isfinite(loss))
        if one.step == 3:
            one.grad[7] = value
        real(one, loss)

    monkeypatch.setattr(loop, "_optimizer_step", overflow)
    with pytest.raises(TrainingError, match="at step 4"):
        train(stack, [trainee], Hooks())
    assert trainee.step == 3
    assert trainee.adapter.flat.equal(good.adapter.flat)
    assert trainee.moments["exp_avg_sq"].equal(good.moments["exp_avg_sq"])


def test_a_loss_that_is_not_finite_beside_a_finite_gradient_is_never_applied(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, real = job_of(stack), loop._optimizer_step
    (good,) = finish(stack, job, until_step=3)
    trainee = start(stack, job)
    monkeypatch.setattr(
        loop, "_optimizer_step", lambda one, loss: real(one, loss * (float("nan") if one.step == 3 else 1.0))
    )
    with pytest.raises(TrainingError, match="at step 4"):
        train(stack, [trainee], Hooks())
    assert trainee.adapter.flat.equal(good.adapter.flat)


def test_every_epoch_sees_all_rows_in_an_order_of_its_own(stack: Stack) -> None:
    job = job_of(stack, 16, epochs=4)
    steps = range(job.steps_per_epoch)
    orders = [[row for step in steps for row in job.batch(epoch * len(steps) + step)] for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(16)) for order in orders)
    other = replace(job, seed_parts=("other", 42))
    assert [row for step in steps for row in other.batch(step)] != orders[0]


def test_nan_in_the_weights_stops_before_the_first_step(stack: Stack) -> None:
    trainee = start(stack, job_of(stack))
    trainee.adapter.flat[3] = float("nan")
    before = trainee.adapter.flat.clone()
    with pytest.raises(TrainingError, match="at step 1"):
        train(stack, [trainee], Hooks())
    assert torch.equal(trainee.adapter.flat.nan_to_num(7.0), before.nan_to_num(7.0))


def test_a_bad_state_is_not_saved(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loop._LAG_STEPS, "cpu", 5)
    trainee = start(stack, job_of(stack))
    trainee.adapter.flat[3] = float("inf")
    with pytest.raises(TrainingError, match="at step 1"):
        train(stack, [trainee], Hooks(lambda active: save_state(trainee) and None))


def test_anything_but_fp32_is_refused(stack: Stack) -> None:
    trainee = start(stack, job_of(stack))
    trainee.grad = trainee.grad.bfloat16()
    with pytest.raises(TrainingError, match=r"gradient is torch\.bfloat16, not fp32"):
        train(stack, [trainee], Hooks())


def test_a_row_without_loss_is_refused(stack: Stack) -> None:
    job = replace(job_of(stack), rows=(Rendered((1, 2, 3), 3),))
    with pytest.raises(TrainingError, match="no token that carries loss"):
        start(stack, job)


def _memory_for(stack: Stack, monkeypatch: pytest.MonkeyPatch, n_tok: int) -> list[int]:
    """Let a forward pass of more than `n_tok` tokens run out of memory; returns the sizes tried."""
    tried: list[int] = []

    def hidden(ids: torch.Tensor, *args) -> torch.Tensor:
        tried.append(len(ids))
        if len(ids) > n_tok:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Base.hidden(stack.base, ids, *args)

    monkeypatch.setattr(stack.base, "hidden", hidden)
    return tried


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(stack, 16, frozen=True, batch_rows=16, dropout=0.05)
    (plenty,) = finish(stack, job)
    tried = _memory_for(stack, monkeypatch, 100)
    (scarce,) = finish(stack, job)
    assert tried[0] > 100
    assert max(tried[3:]) <= 100
    assert scarce.micro_batch_tok <= 100 < plenty.micro_batch_tok == job.settings.micro_batch_tok
    assert not scarce.recomputes
    assert float((plenty.adapter.flat - scarce.adapter.flat).abs().max()) < TOLERANCE


def test_memory_for_less_than_a_row_is_one_clear_line(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    _memory_for(stack, monkeypatch, 4)
    trainee = start(stack, job_of(stack))
    before = trainee.adapter.sha256()
    with pytest.raises(TrainingError, match="does not fit in memory"):
        train(stack, [trainee], Hooks())
    assert trainee.recomputes
    assert trainee.adapter.sha256() == before


def test_recomputed_activations_give_the_same_result(stack: Stack) -> None:
    job = job_of(stack, frozen=True, dropout=0.05)
    (kept,) = finish(stack, job)
    again = start(stack, job)
    again.recomputes = True
    train(stack, [again], Hooks())
    assert float((kept.adapter.flat - again.adapter.flat).abs().max()) < TOLERANCE
    assert not any(module.training for module in stack.base.model.modules())


def test_chunked_loss_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastconv.engine import train as module

    monkeypatch.setattr(module, "CHUNK_ROWS", 3)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 8, generator=generator, requires_grad=True)
    head, targets = torch.randn(20, 8, generator=generator), torch.randint(20, (11,), generator=generator)
    weights = torch.rand(11, generator=generator)
    total, losses = weighted_cross_entropy(hidden, head, targets, weights)
    (grad,) = torch.autograd.grad(total, hidden)
    plain = torch.nn.functional.cross_entropy(hidden @ head.t(), targets, reduction="none")
    (expected,) = torch.autograd.grad((plain * weights).sum(), hidden)
    assert float((losses - plain.detach()).abs().max()) < 1e-6
    assert float((grad - expected).abs().max()) < 1e-6


def test_rank_of_the_trained_adapter_is_the_recipes(tiny_qwen: Path) -> None:
    stack = tiny_stack(tiny_qwen, BEHAVIOR)
    (trainee,) = finish(stack, job_of(stack), until_step=1)
    assert trainee.adapter.shape.r == 4


def test_losses_added_in_a_fixed_order_are_the_same_sums() -> None:
    """The way that a GPU adds them, whose bits do not depend on how its threads come."""
    drawn = torch.Generator().manual_seed(0)
    owners, shares = torch.randint(0, 3, (500,), generator=drawn), torch.rand(500, generator=drawn)
    found = []
    for ordered in (False, True):
        totals = torch.tensor([1.0, 2.0, 3.0, 4.0])
        loop.add_by_owner(totals, owners, shares, ordered=ordered)
        found.append(totals)
    assert torch.allclose(*found)
    assert float(found[1][3]) == 4.0  # an owner without tokens in this micro-batch
