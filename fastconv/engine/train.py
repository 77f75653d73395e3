"""One training loop for both phases, and for several adapters at once on one base.

Rows are packed end to end, logits exist only where there is loss, and every adapter has its own data order, schedule
and optimizer. What a job computes does not depend on which other jobs share its steps, nor on micro-batching.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import safetensors.torch
import torch

from fastconv.draws import seed_of, shuffled_indices
from fastconv.engine.base import pack
from fastconv.engine.loss import weighted_cross_entropy
from fastconv.engine.stack import Adapter, Slot, Stack
from fastconv.errors import TrainingError
from fastconv.recipe import TrainSettings
from fastconv.tokens import Rendered


@dataclass(frozen=True)
class Job:
    """One adapter to train: on these rows, above these frozen adapters, drawn from these named parts."""

    name: str
    rows: tuple[Rendered, ...]
    settings: TrainSettings
    seed_parts: tuple[object, ...]
    frozen: tuple[Adapter, ...] = ()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows; the last one may hold fewer rows."""
        return math.ceil(len(self.rows) / self.settings.batch_rows)

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole schedule."""
        return self.steps_per_epoch * self.settings.epochs

    def batch(self, step: int) -> list[int]:
        """Row indices of an optimizer step (0-based); each epoch has its own order, drawn from named parts."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = shuffled_indices(len(self.rows), "order", epoch, *self.seed_parts)
        return order[within * self.settings.batch_rows : (within + 1) * self.settings.batch_rows]


@dataclass
class Trainee:
    """A job's moving state: flat fp32 weights, gradient and AdamW moments, losses so far, steps done."""

    job: Job
    adapter: Adapter
    grad: torch.Tensor
    optimizer: torch.optim.AdamW
    losses: torch.Tensor
    norms: torch.Tensor
    step: int = 0

    @property
    def done(self) -> bool:
        """True after the last step of the schedule."""
        return self.step >= self.job.n_steps

    @property
    def epoch(self) -> float:
        """Passes over the rows so far."""
        return self.step / self.job.steps_per_epoch


@dataclass(frozen=True)
class Hooks:
    """What the caller does along the way. `after_step` may raise to stop; the state is then that of a whole step."""

    after_step: Callable[[Sequence[Trainee]], None] = field(default=lambda trainees: None)


def lr_at(step: int, n_steps: int, settings: TrainSettings) -> float:
    """Learning rate of a 0-based step: linear warm-up over ceil(share * n) steps, then half a cosine to zero."""
    warmup = math.ceil(settings.warmup_share * n_steps)
    if step < warmup:
        return settings.lr * step / max(1, warmup)
    progress = (step - warmup) / max(1, n_steps - warmup)
    return settings.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def start(stack: Stack, job: Job, state: bytes | None = None) -> Trainee:
    """A trainee at its first step, or where `state` (from `save_state`) left it. Raises TrainingError on empty rows."""
    if not job.rows or not all(row.n_supervised for row in job.rows):
        raise TrainingError(
            "a row has no token that carries loss", where=job.name, fix="run `fastconv check` on the recipe"
        )
    adapter = stack.new_adapter(*job.seed_parts)
    weights = torch.nn.Parameter(adapter.flat, requires_grad=True)
    grad = torch.zeros_like(adapter.flat)
    weights.grad = grad
    optimizer = torch.optim.AdamW(
        [weights], lr=job.settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True
    )
    device = adapter.flat.device
    losses, norms = torch.zeros(job.n_steps, device=device), torch.zeros(job.n_steps, device=device)
    trainee = Trainee(job, adapter, grad, optimizer, losses, norms)
    if state is not None:
        _restore(trainee, weights, state)
    return trainee


def train(stack: Stack, trainees: Sequence[Trainee], hooks: Hooks, *, until_step: int | None = None) -> None:
    """Take every trainee to the end of its schedule (or to `until_step`), one optimizer step each per round.

    Raises TrainingError before the optimizer step if a loss or gradient is not finite: the weights stay good.
    """
    _assert_fp32(trainees)
    try:
        while active := [t for t in trainees if not t.done and (until_step is None or t.step < until_step)]:
            _round(stack, active)
            hooks.after_step(active)
    finally:
        for trainee in trainees:
            trainee.adapter.train(None)


def save_state(trainee: Trainee) -> bytes:
    """Everything `start` needs to go on bit for bit: weights, moments, losses, step. Data order needs no state."""
    moments = trainee.optimizer.state.get(trainee.optimizer.param_groups[0]["params"][0], {})
    tensors = {"weights": trainee.adapter.flat, "losses": trainee.losses, "norms": trainee.norms}
    if moments:
        tensors |= {"exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={"step": str(trainee.step)},
    )


def _restore(trainee: Trainee, weights: torch.nn.Parameter, state: bytes) -> None:
    tensors = safetensors.torch.load(state)
    step = round(float(tensors["losses"].shape[0])) and int(_metadata(state)["step"])
    trainee.adapter.flat.copy_(tensors["weights"])
    trainee.losses.copy_(tensors["losses"])
    trainee.norms.copy_(tensors["norms"])
    trainee.step = step
    if "exp_avg" in tensors:
        device = weights.device
        trainee.optimizer.state[weights] = {
            "step": torch.tensor(float(step), device=device if device.type == "cuda" else "cpu"),
            "exp_avg": tensors["exp_avg"].to(device),
            "exp_avg_sq": tensors["exp_avg_sq"].to(device),
        }


def _metadata(state: bytes) -> dict[str, str]:
    import json

    return json.loads(state[8 : 8 + int.from_bytes(state[:8], "little")])["__metadata__"]


def _round(stack: Stack, active: Sequence[Trainee]) -> None:
    """One optimizer step for every active trainee."""
    work: list[tuple[int, Rendered, float, int]] = []  # (trainee, row, weight per token, dropout seed)
    for index, trainee in enumerate(active):
        rows = trainee.job.batch(trainee.step)
        n_supervised = sum(trainee.job.rows[row].n_supervised for row in rows)
        for row in rows:
            seed = seed_of("dropout", *trainee.job.seed_parts, trainee.step, row) & 0x7FFFFFFF
            work.append((index, trainee.job.rows[row], 1.0 / n_supervised, seed))
        trainee.grad.zero_()
        trainee.adapter.train(trainee.grad)
    slots = [Slot(t.job.frozen, t.adapter, t.job.settings.dropout) for t in active]
    totals = torch.zeros(len(active), device=stack.base.device)
    limit = min(t.job.settings.micro_batch_tok for t in active)
    for micro in _micro_batches(work, limit):
        _micro_step(stack, slots, micro, totals)
    for index, trainee in enumerate(active):
        _optimizer_step(trainee, totals[index])


def _micro_batches(
    work: list[tuple[int, Rendered, float, int]], limit_tok: int
) -> list[list[tuple[int, Rendered, float, int]]]:
    """Split in order, so that each trainee's rows stay contiguous; at least one row each."""
    batches: list[list[tuple[int, Rendered, float, int]]] = []
    room = 0
    for item in work:
        size = len(item[1].ids)
        if not batches or size > room:
            batches.append([])
            room = limit_tok
        batches[-1].append(item)
        room -= size
    return batches


def _micro_step(
    stack: Stack, slots: Sequence[Slot], micro: list[tuple[int, Rendered, float, int]], totals: torch.Tensor
) -> None:
    """Forward and backward of one packed micro-batch; adds each trainee's share of the loss to `totals`."""
    device = stack.base.device
    ids, positions, layout = pack([list(row.ids) for _, row, _, _ in micro], device)
    take, targets, weights, owners = [], [], [], []
    for (owner, row, weight, _), begin in zip(micro, layout.starts, strict=False):
        for place in range(row.n_prompt, len(row.ids)):
            take.append(begin + place - 1)  # the token before predicts this one
            targets.append(row.ids[place])
            weights.append(weight)
            owners.append(owner)
    live, spans = [], []
    for index, slot in enumerate(slots):
        mine = [i for i, item in enumerate(micro) if item[0] == index]
        if mine:
            live.append(slot)
            spans.append((layout.starts[mine[0]], layout.starts[mine[-1] + 1]))
    with stack.live(*live):
        stack.route.spans = tuple(spans) if len(live) > 1 else None
        if any(slot.dropout > 0 for slot in live):
            stack.route.dropout_seeds = _token_seeds(micro, device)
        hidden = stack.base.hidden(ids, positions, layout)
        loss, losses = weighted_cross_entropy(
            hidden[torch.tensor(take, device=device)], stack.base.head.weight,
            torch.tensor(targets, device=device), torch.tensor(weights, device=device),
        )  # fmt: skip
        loss.backward()
    totals.index_add_(0, torch.tensor(owners, device=device), losses * torch.tensor(weights, device=device))


def _token_seeds(micro: list[tuple[int, Rendered, float, int]], device: torch.device) -> torch.Tensor:
    """One dropout seed per token [T] int32: its row's seed mixed with its place in the row."""
    seeds = torch.cat([seed + 0x01000193 * torch.arange(len(row.ids), dtype=torch.int64) for _, row, _, seed in micro])
    return (seeds & 0x7FFFFFFF).to(torch.int32).to(device)


def _optimizer_step(trainee: Trainee, loss: torch.Tensor) -> None:
    """Clip, check, step. The check comes first: bad numbers never reach the weights."""
    settings = trainee.job.settings
    norm = torch.linalg.vector_norm(trainee.grad)
    if not bool(torch.isfinite(norm + loss)):
        raise TrainingError(
            f"loss {loss.item():.3g} and gradient norm {norm.item():.3g} at step {trainee.step + 1}",
            where=trainee.job.name, fix="lower its lr; the weights before this step are kept",
        )  # fmt: skip
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
        state = trainee.optimizer.state.get(trainee.optimizer.param_groups[0]["params"][0], {})
        held = {
            "weights": trainee.adapter.flat,
            "gradient": trainee.grad,
            **{k: v for k, v in state.items() if k != "step"},
        }
        for name, tensor in held.items():
            if tensor.dtype != torch.float32:
                raise TrainingError(
                    f"the {name} is {tensor.dtype}, not fp32", where=trainee.job.name, fix="report this defect"
                )
