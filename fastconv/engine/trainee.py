"""What is trained and how far it is: jobs, trainees, their schedule and their saved state."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import safetensors.torch
import torch

from fastconv.chat import Rendered
from fastconv.engine.cuda_graph import CapturedSteps
from fastconv.engine.lora import Adapter, read_safetensors
from fastconv.engine.optim import Optimizer, make_optimizer, moment_names, optimizer_state
from fastconv.engine.stack import Stack
from fastconv.errors import TrainingError
from fastconv.recipe import TrainSettings
from fastconv.seeding import shuffled_indices


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


class LossMonitor:
    """Loss and gradient norm of past steps as the host sees them, read late so that the host never waits for a step.

    The guard itself is on the device: `bad` is 1 from the first step whose loss or gradient is not finite, the fused
    AdamW leaves everything alone while it is (its `found_inf`), so the weights stay those before that step however
    late the host hears of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.bad = torch.zeros((), device=device)
        self.last_loss = math.nan
        self._on_gpu = device.type == "cuda"
        self._posted: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()

    def post(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Fold this step's finite check into `bad`, and send (bad, loss, norm) on its way to the host."""
        self.bad.copy_(torch.maximum(self.bad, (~torch.isfinite(loss + norm)).float()))
        verdict = torch.stack([self.bad, loss, norm])
        if not self._on_gpu:
            self._posted.append((step, verdict, None))
            return
        arrived = torch.cuda.Event()
        on_host = torch.empty(3, pin_memory=True)
        on_host.copy_(verdict, non_blocking=True)
        arrived.record()
        self._posted.append((step, on_host, arrived))

    def read(self, lag: int) -> tuple[int, float, float] | None:
        """The first bad step as (step, loss, norm), looking at all but the newest `lag` steps; None if all are good."""
        while len(self._posted) > lag:
            step, verdict, arrived = self._posted.popleft()
            if arrived is not None:
                arrived.synchronize()
            bad, loss, norm = verdict.tolist()
            self.last_loss = loss
            if bad:
                return step, loss, norm
        return None


@dataclass
class Trainee:
    """A job's moving state: flat fp32 weights, gradient and AdamW moments, losses so far, steps done.

    `micro_batch_tok` and `recomputes` say what the step had to do to fit in memory; neither changes a result.
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
    #: On a GPU, the micro-steps captured so far.
    captured: CapturedSteps | None = None
    watch: LossMonitor = field(init=False)

    def __post_init__(self) -> None:
        self.watch = LossMonitor(self.grad.device)
        self.optimizer.found_inf = self.watch.bad  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def done(self) -> bool:
        """True after the last step of the schedule."""
        return self.step >= self.job.n_steps

    @property
    def epoch(self) -> float:
        """Passes over the rows so far."""
        return self.step / self.job.steps_per_epoch

    @property
    def last_loss(self) -> float:
        """The newest loss that the host knows, for a progress line: on a GPU a step old, and free to look at."""
        return self.watch.last_loss

    @property
    def moments(self) -> dict[str, torch.Tensor]:
        """AdamW's state, empty before the first step."""
        return self.optimizer.state.get(self.optimizer.param_groups[0]["params"][0], {})

    def check(self, lag: int = 0) -> None:
        """Raise TrainingError if a step was not finite; `step` is then that of the last good weights."""
        found = self.watch.read(lag)
        if found is None:
            return
        self.step, loss, norm = found
        raise TrainingError(
            f"loss {loss:.3g} and gradient norm {norm:.3g} at step {self.step + 1}",
            where=self.job.name,
            fix="lower its lr; the weights before this step are kept",
        )


def lr_at(step: int, n_steps: int, settings: TrainSettings) -> float:
    """Learning rate of a 0-based step: linear warm-up over ceil(share * n) steps, then half a cosine to zero."""
    warmup = math.ceil(settings.warmup_share * n_steps)
    if step < warmup:
        return settings.lr * step / max(1, warmup)
    progress = (step - warmup) / max(1, n_steps - warmup)
    return settings.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def start(stack: Stack, job: Job, state: bytes | None = None) -> Trainee:
    """A trainee at its first step, or where `state` (from `save_state`) left it.

    Raises TrainingError if a row carries no loss, AdapterError or TrainingError if the state is damaged or another's.
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
    """Everything `start` needs to go on bit for bit: weights, moments, losses, step. Data order needs no state.

    Raises TrainingError instead of saving a state that came after a step that was not finite.
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
    tensors, about = read_safetensors(state, trainee.job.name)
    wanted = {"weights": trainee.adapter.flat, "losses": trainee.losses, "norms": trainee.norms}
    optimizer = trainee.job.settings.optimizer
    first, second, *others = moment_names(optimizer)
    stepped = first in tensors
    if stepped:
        wanted |= {first: trainee.grad, second: trainee.grad} | {
            name: tensors.get(name, trainee.grad) for name in others
        }
    if "step" not in about or any(
        name not in tensors or tensors[name].shape != like.shape for name, like in wanted.items()
    ):
        raise TrainingError(
            "the saved training state is of another job",
            where=trainee.job.name,
            fix="run `fastconv forget` on its stage, then the recipe again",
        )
    trainee.step = int(about["step"])
    trainee.adapter.flat.copy_(tensors["weights"])
    trainee.losses.copy_(tensors["losses"])
    trainee.norms.copy_(tensors["norms"])
    if stepped:
        trainee.optimizer.state[weights] = optimizer_state(optimizer, tensors, trainee.step, weights.device)
