"""Training jobs and their state: data order and learning-rate schedule, optimizer state, saving and resuming."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache

import safetensors.torch
import torch

from fastconv.chat import Rendered
from fastconv.engine.lora import Adapter, read_safetensors
from fastconv.engine.optim import Optimizer, make_optimizer, moment_names, optimizer_state
from fastconv.engine.stack import Stack
from fastconv.errors import TrainingError
from fastconv.recipe import TrainSettings
from fastconv.seeding import seeded_permutation


@dataclass(frozen=True)
class Job:
    """One adapter to train on `rows`, above `frozen` adapters; `seed_parts` name its initial weights, `order_parts` the
    order of rows and the dropout, where they are not the same."""

    name: str
    rows: tuple[Rendered, ...]
    settings: TrainSettings
    seed_parts: tuple[object, ...]
    frozen: tuple[Adapter, ...] = ()
    order_parts: tuple[object, ...] = ()

    @property
    def chance(self) -> tuple[object, ...]:
        """What names the order of rows and the dropout."""
        return self.order_parts or self.seed_parts

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch; the last one may have fewer rows."""
        return math.ceil(len(self.rows) / self.settings.batch_rows)

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole schedule."""
        return self.steps_per_epoch * self.settings.epochs

    def batch(self, step: int) -> list[int]:
        """Row indices of an optimizer step (0-based). Each epoch has its own order, derived from `chance`."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _order(len(self.rows), epoch, self.chance)
        return order[within * self.settings.batch_rows : (within + 1) * self.settings.batch_rows]


@lru_cache(maxsize=32)
def _order(n_rows: int, epoch: int, chance: tuple[object, ...]) -> list[int]:
    """The order of an epoch, which every step of it asks for; 8,000 rows take 30 ms to put in order."""
    return seeded_permutation(n_rows, "order", epoch, *chance)


class LossMonitor:
    """Checks on the device that steps are finite, and copies losses and norms to the host without waiting for them.

    `bad` (scalar on the device) is 1 from the first step whose loss or gradient is not finite. The fused AdamW changes
    nothing while it is (its `found_inf`), so the weights stay those before that step however late the host reads it.
    """

    def __init__(self, device: torch.device) -> None:
        self.bad = torch.zeros((), device=device)
        self.last_loss = math.nan
        self._on_gpu = device.type == "cuda"
        self._pending: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()

    def record(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Update `bad` with this step's finite check, and start the copy of (bad, loss, norm) to the host."""
        self.bad.copy_(torch.maximum(self.bad, (~torch.isfinite(loss + norm)).float()))
        values = torch.stack([self.bad, loss, norm])
        if not self._on_gpu:
            self._pending.append((step, values, None))
            return
        arrived = torch.cuda.Event()
        on_host = torch.empty(3, pin_memory=True)
        on_host.copy_(values, non_blocking=True)
        arrived.record()
        self._pending.append((step, on_host, arrived))

    def read(self, lag: int) -> tuple[int, float, float] | None:
        """The first step that was not finite as (step, loss, norm), or None; the newest `lag` steps are not read
        yet."""
        while len(self._pending) > lag:
            step, values, arrived = self._pending.popleft()
            if arrived is not None:
                arrived.synchronize()
            bad, loss, norm = values.tolist()
            self.last_loss = loss
            if bad:
                return step, loss, norm
        return None


@dataclass
class Trainee:
    """The state of a job in training: adapter, gradient [n] fp32, optimizer, losses and norms [n_steps] fp32, steps
    done.

    `micro_batch_tok` and `recomputes` say how a step fits in memory; neither changes a result.
    """

    job: Job
    adapter: Adapter
    grad: torch.Tensor
    optimizer: Optimizer
    losses: torch.Tensor
    norms: torch.Tensor
    micro_batch_tok: int
    step: int = 0
    recomputes: bool = False
    monitor: LossMonitor = field(init=False)

    def __post_init__(self) -> None:
        self.monitor = LossMonitor(self.grad.device)
        self.optimizer.found_inf = self.monitor.bad  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def done(self) -> bool:
        """True after the last step of the schedule."""
        return self.step >= self.job.n_steps

    @property
    def epoch(self) -> float:
        """Epochs done, as a fraction."""
        return self.step / self.job.steps_per_epoch

    @property
    def last_loss(self) -> float:
        """The newest loss that the host has, for progress display: on a GPU one step old; NaN at first."""
        return self.monitor.last_loss

    @property
    def moments(self) -> dict[str, torch.Tensor]:
        """AdamW's state, empty before the first step."""
        return self.optimizer.state.get(self.optimizer.param_groups[0]["params"][0], {})

    def check(self, lag: int = 0) -> None:
        """Raise TrainingError if a step was not finite; `step` is then reset to that of the last good weights."""
        bad_step = self.monitor.read(lag)
        if bad_step is None:
            return
        self.step, loss, norm = bad_step
        raise TrainingError(
            f"loss {loss:.3g} and gradient norm {norm:.3g} at step {self.step + 1}",
            where=self.job.name,
            fix="lower its lr; the weights before this step are kept",
        )


def lr_at(step: int, n_steps: int, settings: TrainSettings) -> float:
    """Learning rate of a 0-based step: linear warm-up over ceil(warmup_share * n_steps), then half a cosine to zero."""
    warmup = math.ceil(settings.warmup_share * n_steps)
    if step < warmup:
        return settings.lr * step / max(1, warmup)
    progress = (step - warmup) / max(1, n_steps - warmup)
    return settings.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def start(stack: Stack, job: Job, state: bytes | None = None) -> Trainee:
    """A trainee at its first step, or at the step of `state` (from `save_state`).

    Raises TrainingError if a row has no supervised token, AdapterError or TrainingError if `state` is damaged or of
    another job.
    """
    if not job.rows or not all(row.n_supervised for row in job.rows):
        raise TrainingError(
            "a row has no token that carries loss", where=job.name, fix="run `fastconv check` on the recipe"
        )
    adapter = stack.new_adapter(*job.seed_parts)
    weights = torch.nn.Parameter(adapter.flat, requires_grad=True)
    grad = torch.zeros_like(adapter.flat)
    weights.grad = grad
    optimizer = make_optimizer(job.settings.optimizer, weights, job.settings.lr)
    device = adapter.flat.device
    losses, norms = torch.zeros(job.n_steps, device=device), torch.zeros(job.n_steps, device=device)
    trainee = Trainee(job, adapter, grad, optimizer, losses, norms, job.settings.micro_batch_tok)
    if state is not None:
        _restore(trainee, weights, state)
    return trainee


def save_state(trainee: Trainee) -> bytes:
    """A safetensors file of all that `start` needs to resume bit for bit: weights, moments, losses, norms, step.

    The data order needs no state. Raises TrainingError if a step was not finite.
    """
    trainee.check()
    tensors = {"weights": trainee.adapter.flat, "losses": trainee.losses, "norms": trainee.norms}
    if trainee.moments:
        tensors |= {name: trainee.moments[name] for name in moment_names(trainee.job.settings.optimizer)}
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={"step": str(trainee.step)},
    )


def _restore(trainee: Trainee, weights: torch.nn.Parameter, state: bytes) -> None:
    tensors, metadata = read_safetensors(state, trainee.job.name)
    expected = {"weights": trainee.adapter.flat, "losses": trainee.losses, "norms": trainee.norms}
    optimizer = trainee.job.settings.optimizer
    first, second, *rest = moment_names(optimizer)
    has_moments = first in tensors
    if has_moments:
        expected |= {first: trainee.grad, second: trainee.grad} | {
            name: tensors.get(name, trainee.grad) for name in rest
        }
    if "step" not in metadata or any(
        name not in tensors or tensors[name].shape != like.shape for name, like in expected.items()
    ):
        raise TrainingError(
            "the saved training state is of another job",
            where=trainee.job.name,
            fix="run `fastconv forget` on its stage, then the recipe again",
        )
    trainee.step = int(metadata["step"])
    trainee.adapter.flat.copy_(tensors["weights"])
    trainee.losses.copy_(tensors["losses"])
    trainee.norms.copy_(tensors["norms"])
    if has_moments:
        trainee.optimizer.state[weights] = optimizer_state(optimizer, tensors, trainee.step, weights.device)
