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

import torch
from torch.utils.checkpoint import checkpoint

from fastconv.draws import seed_of
from fastconv.engine.base import Base, pack, to_device
from fastconv.engine.job import Job, Trainee, lr_at, save_state, start
from fastconv.engine.loss import weighted_cross_entropy
from fastconv.engine.stack import Slot, Stack
from fastconv.errors import TrainingError
from fastconv.tokens import Rendered

__all__ = ["Hooks", "Job", "Trainee", "lr_at", "save_state", "start", "train"]

#: How many steps the host may run ahead of a GPU before it looks at the finite check; one keeps the GPU busy.
_LAG_STEPS = {"cuda": 1, "cpu": 0}


@dataclass(frozen=True)
class Hooks:
    """What the caller does along the way. `after_step` may raise to stop; the state is then that of a whole step."""

    after_step: Callable[[Sequence[Trainee]], None] = field(default=lambda trainees: None)


@dataclass(frozen=True, slots=True)
class _Item:
    """A row in a step: whose it is, the weight of each of its supervised tokens, and its dropout seed."""

    owner: int
    row: Rendered
    weight: float
    seed: int


def train(stack: Stack, trainees: Sequence[Trainee], hooks: Hooks, *, until_step: int | None = None) -> None:
    """Take every trainee to the end of its schedule (or to `until_step`), one optimizer step each per round.

    Raises TrainingError if a loss or gradient is not finite (that optimizer step is not taken, the weights stay good),
    if a frozen adapter changed, or if one row does not fit in memory.
    """
    _assert_fp32(trainees)
    frozen = {id(adapter): adapter for trainee in trainees for adapter in trainee.job.frozen}
    before = {key: adapter.sha256() for key, adapter in frozen.items()}
    try:
        while active := [t for t in trainees if not t.done and (until_step is None or t.step < until_step)]:
            _round(stack, active)
            hooks.after_step(active)
        for trainee in trainees:
            trainee.check()
    finally:
        for trainee in trainees:
            trainee.adapter.train(None)
    if any(adapter.sha256() != before[key] for key, adapter in frozen.items()):
        raise TrainingError("a frozen adapter changed", where=trainees[0].job.name, fix="report this defect")


def _round(stack: Stack, active: Sequence[Trainee]) -> None:
    """One optimizer step for every active trainee; smaller micro-batches if memory runs out, the same result."""
    work = [item for owner, trainee in enumerate(active) for item in _items(owner, trainee)]
    while (totals := _gradients(stack, active, work)) is None:
        _make_room(stack.base, active, work)
    for trainee, loss in zip(active, totals.unbind(), strict=True):
        _optimizer_step(trainee, loss)


def _items(owner: int, trainee: Trainee) -> list[_Item]:
    """The rows of a trainee's next step; with weight 1/N on each of its N supervised tokens they make the token mean."""
    job = trainee.job
    indices = job.batch(trainee.step)
    n_supervised = sum(job.rows[index].n_supervised for index in indices)
    seeds = [seed_of("dropout", *job.seed_parts, trainee.step, index) & 0x7FFFFFFF for index in indices]
    return [_Item(owner, job.rows[i], 1.0 / n_supervised, seed) for i, seed in zip(indices, seeds, strict=True)]


def _gradients(stack: Stack, active: Sequence[Trainee], work: Sequence[_Item]) -> torch.Tensor | None:
    """Fill every trainee's gradient; returns their losses [len(active)] fp32, or None if memory ran out on the way."""
    for trainee in active:
        trainee.grad.zero_()
        trainee.adapter.train(trainee.grad)
    slots = [Slot(t.job.frozen, t.adapter, t.job.settings.dropout) for t in active]
    totals = torch.zeros(len(active), device=stack.base.device)
    memory = recomputing(stack.base) if any(t.recomputes for t in active) else contextlib.nullcontext()
    try:
        with memory:
            for micro in _micro_batches(work, min(t.micro_batch_tok for t in active)):
                _micro_step(stack, slots, micro, totals)
    except torch.OutOfMemoryError:
        return None  # the traceback, and with it the step's tensors, is gone once this frame is left
    return totals


def _micro_batches(work: Sequence[_Item], limit_tok: int) -> list[list[_Item]]:
    """Split in order, so that each trainee's rows stay contiguous; at least one row each."""
    batches: list[list[_Item]] = []
    room = 0
    for item in work:
        size = len(item.row.ids)
        if not batches or size > room:
            batches.append([])
            room = limit_tok
        batches[-1].append(item)
        room -= size
    return batches


def _make_room(base: Base, active: Sequence[Trainee], work: Sequence[_Item]) -> None:
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


def _micro_step(stack: Stack, slots: Sequence[Slot], micro: Sequence[_Item], totals: torch.Tensor) -> None:
    """Forward and backward of one packed micro-batch; adds each trainee's share of the loss to `totals`."""
    device = stack.base.device
    ids, positions, layout = pack([list(item.row.ids) for item in micro], device)
    take, targets, weights, owners = _supervision(micro, layout.starts, device)
    live, spans = [], []
    for owner, slot in enumerate(slots):
        mine = [i for i, item in enumerate(micro) if item.owner == owner]
        if mine:
            live.append(slot)
            spans.append((layout.starts[mine[0]], layout.starts[mine[-1] + 1]))
    with stack.live(*live):
        stack.route.spans = tuple(spans) if len(live) > 1 else None
        if any(slot.dropout > 0 for slot in live):
            stack.route.dropout_seeds = token_seeds([(item.seed, len(item.row.ids)) for item in micro], device)
        hidden = stack.base.hidden(ids, positions, layout)
        loss, losses = weighted_cross_entropy(hidden[take], stack.base.head.weight, targets, weights)
        loss.backward()
    totals.index_add_(0, owners, losses * weights)


def _supervision(
    micro: Sequence[_Item], starts: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(place of the token before, target, weight, owner) of every token that carries loss, each [N]."""
    take, targets, weights, owners = [], [], [], []
    for item, begin in zip(micro, starts, strict=False):
        loss_from, n_supervised = item.row.loss_from, item.row.n_supervised
        take += range(begin + loss_from - 1, begin + len(item.row.ids) - 1)
        targets += item.row.ids[loss_from:]
        weights += [item.weight] * n_supervised
        owners += [item.owner] * n_supervised
    tensors = (torch.tensor(take), torch.tensor(targets), torch.tensor(weights), torch.tensor(owners))
    return tuple(to_device(tensor, device) for tensor in tensors)  # pyright: ignore[reportReturnType]


def token_seeds(rows: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """One dropout seed per token [T] int32 from (row seed, row length) pairs: the row's seed mixed with the place."""
    seeds = torch.cat([seed + 0x01000193 * torch.arange(length, dtype=torch.int64) for seed, length in rows])
    return to_device((seeds & 0x7FFFFFFF).to(torch.int32), device)


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
