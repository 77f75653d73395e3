"""The training loop for both phases and for several adapters at once on one base, and its loss.

Rows are packed end to end, logits are computed only for supervised tokens (`weighted_cross_entropy`), and every adapter
has its own data order, schedule and optimizer. What a job computes depends neither on the other jobs in its steps nor
on micro-batching. On a GPU the host never waits within a step: index tensors are made in pinned memory, and the finite
check stays on the device.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastconv.engine.cuda_graph import CapturedSteps
from fastconv.engine.family import Head
from fastconv.engine.micro_batch import Item, MicroBatch, make_micro_batch, no_padding, split
from fastconv.engine.model import Base
from fastconv.engine.same_bits import settings_kept
from fastconv.engine.stack import Slot, Stack
from fastconv.engine.trainee import Job, Trainee, lr_at, save_state, start
from fastconv.errors import TrainingError
from fastconv.seeding import seed_of

__all__ = ["Hooks", "Job", "Trainee", "lr_at", "save_state", "start", "train"]

#: Rows of logits held at once; 512 x 152,064 in bf16 is 0.16 GB.
CHUNK_ROWS = 512
#: Times that a step is tried when it is measured.
_TRIALS = 12
#: Steps that the host may be ahead of the device when it reads the finite check; one keeps the GPU busy.
_LAG_STEPS = {"cuda": 1, "cpu": 0}


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradient to `hidden` in the forward pass: the head is frozen, so nothing else has to be kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: Head, targets: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = torch.empty(targets.shape[0], dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden)
        for first in range(0, targets.shape[0], CHUNK_ROWS):
            span = slice(first, first + CHUNK_ROWS)
            logits = head.logits(hidden[span])
            slope = head.slope(logits)  # before the loss, which may overwrite the logits
            losses[span], logit_grad = _loss_and_gradient(logits, targets[span], weights[span])
            if not isinstance(slope, float) or slope != 1.0:
                logit_grad = logit_grad * slope
            grad[span] = logit_grad @ head.weight
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0].to(grad.dtype), None, None, None


def _loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses [n] fp32, gradient of sum(weights * loss) to the logits [n, vocab] in their dtype); may overwrite
    them."""
    if logits.is_cuda and logits.dtype != torch.float32:  # fp32 is for checking: torch's own operations
        from fastconv.engine.kernels.elementwise import cross_entropy_in_place

        return cross_entropy_in_place(logits, targets, weights), logits
    wide = logits.float()
    grad = torch.softmax(wide, dim=-1)
    grad[torch.arange(len(targets), device=grad.device), targets] -= 1.0
    return F.cross_entropy(wide, targets, reduction="none"), (grad * weights[:, None]).to(logits.dtype)


def weighted_cross_entropy(
    hidden: torch.Tensor, head: Head | torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of weights * loss, with gradient to `hidden`; losses [n] fp32, without one).

    hidden [n, d]; head with weight [vocab, d] (frozen), or that weight alone; targets [n] int64, weights [n] fp32. With
    weights 1/N over all N supervised tokens of an optimizer step, the sums over its micro-batches add up to the token
    mean, however it is split.
    """
    head = Head(head) if isinstance(head, torch.Tensor) else head
    total, losses = _ChunkedCrossEntropy.apply(hidden, head, targets, weights)  # pyright: ignore[reportGeneralTypeIssues]
    return total, losses


@dataclass(frozen=True)
class Hooks:
    """Callbacks of `train`. `after_step` gets the trainees of the step and may raise to stop, which it does between
    steps."""

    after_step: Callable[[Sequence[Trainee]], None] = field(default=lambda trainees: None)


def train(
    stack: Stack, trainees: Sequence[Trainee], hooks: Hooks, *, until_step: int | Sequence[int] | None = None
) -> None:
    """Train all trainees to the end of their schedules, one optimizer step of each per round.

    `until_step` ends them earlier, all at one step or each at its own. Raises TrainingError if a loss or gradient is
    not finite (that optimizer step is not taken), if a frozen adapter changed, or if one row does not fit in memory.
    """
    _assert_fp32(trainees)
    ends = [t.job.n_steps for t in trainees]
    if until_step is not None:
        limits = [until_step] * len(ends) if isinstance(until_step, int) else until_step
        ends = [min(end, until) for end, until in zip(ends, limits, strict=True)]
    frozen = {id(adapter): adapter for trainee in trainees for adapter in trainee.job.frozen}
    before = {key: adapter.flat.clone() for key, adapter in frozen.items()}
    try:
        while active := [t for t, end in zip(trainees, ends, strict=True) if t.step < end]:
            if (steps := captured_steps(stack)) is not None:
                steps.steps_left = max(t.job.n_steps - t.step for t in active)
            _round(stack, active)
            hooks.after_step(active)
        for trainee in trainees:
            trainee.check()
    finally:
        for trainee in trainees:
            trainee.adapter.train(None)
        if (captured := stack.base.kept.get("steps")) is not None:
            captured.end_of_trainees()
    if not all(torch.equal(adapter.flat, before[key]) for key, adapter in frozen.items()):
        raise TrainingError("a frozen adapter changed", where=trainees[0].job.name, fix="report this defect")


def together_speedup(stack: Stack, jobs: Sequence[Job]) -> float:
    """Seconds of the jobs' first steps one after another, over those of all of them in one; 0 if that does not fit.

    Measured on trainees that are thrown away, gradients alone, the best of `_TRIALS`: until then what is worth a graph is
    captured.
    """
    trainees = [start(stack, job) for job in jobs]

    def seconds(active: Sequence[Trainee]) -> float:
        work = [item for owner, trainee in enumerate(active) for item in _items(owner, trainee)]
        best = math.inf
        for _ in range(_TRIALS):
            began = time.perf_counter()
            if _gradients(stack, active, work) is None:
                return math.inf
            if stack.base.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
        return best

    try:
        together_s = seconds(trainees)
        return 0.0 if math.isinf(together_s) else sum(seconds([trainee]) for trainee in trainees) / together_s
    finally:
        for trainee in trainees:
            trainee.adapter.train(None)


def _round(stack: Stack, active: Sequence[Trainee]) -> None:
    """One optimizer step for every active trainee; smaller micro-batches if memory runs out, the same result."""
    work = [item for owner, trainee in enumerate(active) for item in _items(owner, trainee)]
    while (totals := _gradients(stack, active, work)) is None:
        _reduce_memory(stack.base, active, work)
    for trainee, loss in zip(active, totals.unbind(), strict=True):
        _optimizer_step(trainee, loss)


def _items(owner: int, trainee: Trainee) -> list[Item]:
    """The rows of a trainee's next step; with weight 1/N on each of its N supervised tokens they make the token
    mean."""
    job = trainee.job
    indices = job.batch(trainee.step)
    n_supervised = sum(job.rows[index].n_supervised for index in indices)
    seeds = [seed_of("dropout", *job.chance, trainee.step, index) & 0x7FFFFFFF for index in indices]
    return [Item(owner, job.rows[i], 1.0 / n_supervised, seed) for i, seed in zip(indices, seeds, strict=True)]


def _gradients(stack: Stack, active: Sequence[Trainee], work: Sequence[Item]) -> torch.Tensor | None:
    """Compute every trainee's gradient; returns their losses [len(active)] fp32, or None if memory ran out."""
    for trainee in active:
        trainee.grad.zero_()
        trainee.adapter.train(trainee.grad)
    slots = [Slot(t.job.frozen, t.adapter, t.job.settings.dropout) for t in active]
    totals = torch.zeros(len(active), device=stack.base.device)
    recomputes = any(t.recomputes for t in active)
    captured = captured_steps(stack) if not recomputes else None
    if captured is not None and len(active) > 1 and not captured.shared:
        captured = None
    limit_tok = min(t.micro_batch_tok for t in active)
    sizes_for = no_padding if captured is None else captured.sizes([t.job for t in active], limit_tok)
    try:
        with recomputing(stack.base) if recomputes else contextlib.nullcontext():
            for micro in _micro_batches(work, limit_tok):
                batch = make_micro_batch(stack.base, slots, micro, sizes_for)
                if captured is not None:
                    captured.run(batch, totals)
                else:
                    micro_step(stack, batch, totals)
    except torch.OutOfMemoryError:
        return None  # leaving this frame frees the traceback, and with it the step's tensors
    return totals


def _micro_batches(work: Sequence[Item], limit_tok: int) -> list[list[Item]]:
    """An optimizer step in micro-batches (`split`): rows of a trainee stay contiguous."""
    return [list(work[first:stop]) for first, stop in split([len(item.row.ids) for item in work], limit_tok)]


def _reduce_memory(base: Base, active: Sequence[Trainee], work: Sequence[Item]) -> None:
    """Drop what is kept for speed alone; then halve the micro-batch; if each has one row, recompute activations; raise
    TrainingError if that was tried too."""
    steps = base.kept.get("steps")
    if base.drop_kept():
        if isinstance(steps, CapturedSteps):  # without its graphs, but with what it measured
            steps.forget()
            base.kept["steps"] = steps
        return
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
    """Within the block each layer's activations are recomputed in the backward pass (Chen et al. 2016), not kept."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in base.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # our dropout needs no generator
    try:
        for layer in layers:
            layer.gradient_checkpointing = True
            object.__setattr__(layer, "_gradient_checkpointing_func", recompute)
            layer.training = True  # transformers checks it; the modules inside stay in evaluation mode
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


def captured_steps(stack: Stack) -> CapturedSteps | None:
    """The micro-steps of a stack on a GPU, which are kept with its base; None where no graph can hold them."""
    if stack.base.device.type != "cuda" or not stack.base.attention.captures:
        return None
    kept = stack.base.kept
    if "steps" not in kept:
        kept["steps"] = CapturedSteps(stack, partial(_forward_backward, stack))
    return kept["steps"]


def micro_step(stack: Stack, batch: MicroBatch, totals: torch.Tensor) -> None:
    """Forward and backward of one packed micro-batch; adds each trainee's share of the loss to `totals`."""
    with stack.live(*batch.slots, spans=batch.spans, dropout_seeds=batch.seeds):
        _forward_backward(stack, batch, totals)


def _forward_backward(stack: Stack, batch: MicroBatch, totals: torch.Tensor) -> None:
    """Forward and backward of a micro-batch under the live stack."""
    hidden = stack.base.hidden(batch.ids, batch.positions, batch.layout)
    loss, losses = weighted_cross_entropy(
        hidden.index_select(0, batch.take), stack.base.readout, batch.targets, batch.weights
    )
    with settings_kept():
        loss.backward()
    add_by_owner(totals, batch.owners, losses * batch.weights, ordered=totals.is_cuda)


def add_by_owner(totals: torch.Tensor, owners: torch.Tensor, shares: torch.Tensor, *, ordered: bool) -> None:
    """Add shares [N] fp32 to the totals [n] fp32 of their owners [N] int64.

    `ordered` is for a GPU, where `index_add_` adds in whatever order its threads come: the recorded losses of the same
    weights would differ in their last bits from run to run.
    """
    if not ordered:
        totals.index_add_(0, owners, shares)
        return
    own = owners == torch.arange(totals.shape[0], device=owners.device)[:, None]
    totals += torch.where(own, shares, 0.0).sum(1)


def _optimizer_step(trainee: Trainee, loss: torch.Tensor) -> None:
    """Check, clip, step. Once a loss or gradient was not finite, the optimizer changes nothing."""
    settings = trainee.job.settings
    norm = torch.linalg.vector_norm(trainee.grad)
    trainee.monitor.record(trainee.step, loss, norm)
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
        moments = (
            trainee.moments if trainee.job.settings.optimizer == "adamw" else {}
        )  # the others have 8 bits by choice
        tensors = {"weights": trainee.adapter.flat, "gradient": trainee.grad, **moments}
        for name, tensor in tensors.items():
            if name != "step" and tensor.dtype != torch.float32:
                raise TrainingError(
                    f"the {name} is {tensor.dtype}, not fp32", where=trainee.job.name, fix="report this defect"
                )
