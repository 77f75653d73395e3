"""One training loop for both phases, and for several adapters at once on one base.

Rows are packed end to end, logits exist only where there is loss, and every adapter has its own data order, schedule
and optimizer. What a job computes does not depend on which other jobs share its steps, nor on micro-batching. On a GPU
the host never waits inside a step: index tensors are made in pinned memory, and the finite check stays on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastconv.engine.batch import Item, MicroBatch, make_micro_batch, no_padding
from fastconv.engine.cuda_graph import CapturedSteps, rounded_sizes
from fastconv.engine.model import Base
from fastconv.engine.stack import Slot, Stack
from fastconv.engine.trainee import Job, Trainee, lr_at, save_state, start
from fastconv.errors import TrainingError
from fastconv.seeding import seed_of

#: Rows of logits held at once; 512 x 152,064 in bf16 is 0.16 GB.
CHUNK_ROWS = 512


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The head is frozen, so the gradient to `hidden` is all there is to keep, and it is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = torch.empty(targets.shape[0], dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden)
        for first in range(0, targets.shape[0], CHUNK_ROWS):
            span = slice(first, first + CHUNK_ROWS)
            losses[span], share = _loss_and_share(hidden[span] @ head.t(), targets[span], weights[span])
            grad[span] = share @ head
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0].to(grad.dtype), None, None, None


def _loss_and_share(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses [n] fp32, gradient of sum(weights * loss) to the logits, in their dtype); may overwrite the logits."""
    if logits.is_cuda and logits.dtype != torch.float32:  # fp32 is for checking: torch's own operations
        from fastconv.engine.kernels.elementwise import cross_entropy_in_place

        return cross_entropy_in_place(logits, targets, weights), logits
    exact = logits.float()
    share = torch.softmax(exact, dim=-1)
    share[torch.arange(len(targets), device=share.device), targets] -= 1.0
    return F.cross_entropy(exact, targets, reduction="none"), (share * weights[:, None]).to(logits.dtype)


def weighted_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of weights * loss, with gradient to `hidden`; losses [n] fp32, without one).

    hidden [n, d], head [vocab, d] (frozen), targets [n] int64, weights [n] fp32. With weights 1/N over all N supervised
    tokens of an optimizer step, the sums over its micro-batches add up to the token mean, however it was split.
    """
    total, losses = _ChunkedCrossEntropy.apply(hidden, head, targets, weights)  # pyright: ignore[reportGeneralTypeIssues]
    return total, losses


__all__ = ["Hooks", "Job", "Trainee", "lr_at", "save_state", "start", "train"]

#: How many steps the host may run ahead of a GPU before it looks at the finite check; one keeps the GPU busy.
_LAG_STEPS = {"cuda": 1, "cpu": 0}


@dataclass(frozen=True)
class Hooks:
    """What the caller does along the way. `after_step` may raise to stop; the state is then that of a whole step."""

    after_step: Callable[[Sequence[Trainee]], None] = field(default=lambda trainees: None)


def train(
    stack: Stack, trainees: Sequence[Trainee], hooks: Hooks, *, until_step: int | Sequence[int] | None = None
) -> None:
    """Take every trainee to the end of its schedule (or to `until_step`, its own), one optimizer step each per round.

    Raises TrainingError if a loss or gradient is not finite (that optimizer step is not taken, the weights stay good),
    if a frozen adapter changed, or if one row does not fit in memory.
    """
    _assert_fp32(trainees)
    ends = [t.job.n_steps for t in trainees]
    if until_step is not None:
        asked = [until_step] * len(ends) if isinstance(until_step, int) else until_step
        ends = [min(end, until) for end, until in zip(ends, asked, strict=True)]
    frozen = {id(adapter): adapter for trainee in trainees for adapter in trainee.job.frozen}
    before = {key: adapter.flat.clone() for key, adapter in frozen.items()}
    try:
        while active := [t for t, end in zip(trainees, ends, strict=True) if t.step < end]:
            _round(stack, active)
            hooks.after_step(active)
        for trainee in trainees:
            trainee.check()
    finally:
        for trainee in trainees:
            trainee.adapter.train(None)
    if not all(torch.equal(adapter.flat, before[key]) for key, adapter in frozen.items()):
        raise TrainingError("a frozen adapter changed", where=trainees[0].job.name, fix="report this defect")


def _round(stack: Stack, active: Sequence[Trainee]) -> None:
    """One optimizer step for every active trainee; smaller micro-batches if memory runs out, the same result."""
    work = [item for owner, trainee in enumerate(active) for item in _items(owner, trainee)]
    while (totals := _gradients(stack, active, work)) is None:
        _make_room(stack.base, active, work)
    for trainee, loss in zip(active, totals.unbind(), strict=True):
        _optimizer_step(trainee, loss)


def _items(owner: int, trainee: Trainee) -> list[Item]:
    """The rows of a trainee's next step; with weight 1/N on each of its N supervised tokens they make the token mean."""
    job = trainee.job
    indices = job.batch(trainee.step)
    n_supervised = sum(job.rows[index].n_supervised for index in indices)
    seeds = [seed_of("dropout", *job.seed_parts, trainee.step, index) & 0x7FFFFFFF for index in indices]
    return [Item(owner, job.rows[i], 1.0 / n_supervised, seed) for i, seed in zip(indices, seeds, strict=True)]


def _gradients(stack: Stack, active: Sequence[Trainee], work: Sequence[Item]) -> torch.Tensor | None:
    """Fill every trainee's gradient; returns their losses [len(active)] fp32, or None if memory ran out on the way."""
    for trainee in active:
        trainee.grad.zero_()
        trainee.adapter.train(trainee.grad)
    slots = [Slot(t.job.frozen, t.adapter, t.job.settings.dropout) for t in active]
    totals = torch.zeros(len(active), device=stack.base.device)
    recomputes = any(t.recomputes for t in active)
    captured = _captured(stack, active) if not recomputes else None
    try:
        with recomputing(stack.base) if recomputes else contextlib.nullcontext():
            for micro in _micro_batches(work, min(t.micro_batch_tok for t in active)):
                batch = make_micro_batch(stack.base, slots, micro, rounded_sizes if captured else no_padding)
                if captured is not None:
                    captured.run(batch, totals)
                else:
                    _micro_step(stack, batch, totals)
    except torch.OutOfMemoryError:
        return None  # the traceback, and with it the step's tensors, is gone once this frame is left
    return totals


def _micro_batches(work: Sequence[Item], limit_tok: int) -> list[list[Item]]:
    """Split in order, so that each trainee's rows stay contiguous; at least one row each."""
    batches: list[list[Item]] = []
    room = 0
    for item in work:
        size = len(item.row.ids)
        if not batches or size > room:
            batches.append([])
            room = limit_tok
        batches[-1].append(item)
        room -= size
    return batches


def _make_room(base: Base, active: Sequence[Trainee], work: Sequence[Item]) -> None:
    """Halve the micro-batch; with one row in each, recompute activations; then there is nothing left to give."""
    limit = min(t.micro_batch_tok for t in active)
    micros = _micro_batches(work, limit)
    largest = max(sum(len(item.row.ids) for item in micro) for micro in micros)
    if any(len(micro) > 1 for micro in micros):
        for trainee in active:
            trainee.micro_batch_tok = min(limit, largest) // 2
    elif not any(t.recomputes for t in active):
        for trainee in active:
            trainee.recomputes = True
    else:
        raise TrainingError(
            f"one row of {largest} tokens does not fit in memory",
            where=active[0].job.name,
            fix="lower max_length_tok, or use a smaller model or a larger GPU",
        )
    if base.device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def recomputing(base: Base) -> Iterator[None]:
    """Inside, each layer's activations are recomputed in the backward pass (Chen et al. 2016) instead of kept."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in base.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # our dropout needs no generator
    try:
        for layer in layers:
            layer.gradient_checkpointing = True
            object.__setattr__(layer, "_gradient_checkpointing_func", again)
            layer.training = True  # asked for by transformers; the modules inside stay in evaluation mode
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


def _captured(stack: Stack, active: Sequence[Trainee]) -> CapturedSteps | None:
    """The graphs of the only trainee there is; a CPU has none, and a group's spans differ at every step."""
    if stack.base.device.type != "cuda" or not stack.base.attention.captures or len(active) != 1:
        return None
    (trainee,) = active
    if trainee.captured is None:
        trainee.captured = CapturedSteps(stack, partial(_forward_backward, stack))
    return trainee.captured


def _micro_step(stack: Stack, batch: MicroBatch, totals: torch.Tensor) -> None:
    """Forward and backward of one packed micro-batch; adds each trainee's share of the loss to `totals`."""
    with stack.live(*batch.slots, spans=batch.spans, dropout_seeds=batch.seeds):
        _forward_backward(stack, batch, totals)


def _forward_backward(stack: Stack, batch: MicroBatch, totals: torch.Tensor) -> None:
    """The micro-step itself, under the stack that is live."""
    hidden = stack.base.hidden(batch.ids, batch.positions, batch.layout)
    loss, losses = weighted_cross_entropy(
        hidden.index_select(0, batch.take), stack.base.head.weight, batch.targets, batch.weights
    )
    loss.backward()
    totals.index_add_(0, batch.owners, losses * batch.weights)


def _optimizer_step(trainee: Trainee, loss: torch.Tensor) -> None:
    """Check, clip, step. After a step that is not finite the optimizer changes nothing any more."""
    settings = trainee.job.settings
    norm = torch.linalg.vector_norm(trainee.grad)
    trainee.watch.post(trainee.step, loss, norm)
    trainee.check(_LAG_STEPS[trainee.grad.device.type])
    trainee.grad.mul_(torch.clamp(settings.clip_norm / (norm + 1e-6), max=1.0))
    for group in trainee.optimizer.param_groups:
        group["lr"] = lr_at(trainee.step, trainee.job.n_steps, settings)
    trainee.optimizer.step()
    trainee.losses[trainee.step] = loss
    trainee.norms[trainee.step] = norm
    trainee.step += 1


def _assert_fp32(trainees: Sequence[Trainee]) -> None:
    """LoRA weights, gradients and moments are fp32, whatever the base is; checked before the first step."""
    for trainee in trainees:
        moments = trainee.moments if trainee.job.settings.optimizer == "adamw" else {}  # else 8 bits were asked for
        held = {"weights": trainee.adapter.flat, "gradient": trainee.grad, **moments}
        for name, tensor in held.items():
            if name != "step" and tensor.dtype != torch.float32:
                raise TrainingError(
                    f"the {name} is {tensor.dtype}, not fp32", where=trainee.job.name, fix="report this defect"
                )
