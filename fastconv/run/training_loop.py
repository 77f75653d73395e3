"""Training with its state kept: one adapter, or several in one call, each resumable on its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastconv.engine.stack import Stack
from fastconv.engine.train import Hooks, Job, Trainee, save_state, start, train
from fastconv.errors import stopped
from fastconv.store.ledger import Lease, Store


@dataclass(frozen=True)
class Progress:
    """How far a stage is: `done` of `total` `unit`s, and the last loss while training."""

    slot: str
    done: int
    total: int
    unit: str
    loss: float | None = None


@dataclass
class Task:
    """One training: its state is kept under `key`, `keep` hears of every step, the last of `stops` is its end.

    `stops` are the steps at which `keep` must be there. `keep` also gets the seconds that this training took so far:
    of a step that several share, each has its equal part.
    """

    job: Job
    key: str
    lease: Lease
    stops: Sequence[int]
    keep: Callable[[Trainee, float], None] = lambda trainee, seconds: None
    spent_s: float = field(default=0.0, init=False)

    def begin(self, stack: Stack, store: Store) -> Trainee:
        """The trainee where its kept state left it, or at its first step."""
        kept = store.progress(self.key)
        if kept and kept[0] > self.stops[0]:
            kept = None  # the state lies beyond an epoch that is wanted now: begin again, to the same bits
        return start(stack, self.job, store.get(kept[1], "safetensors") if kept else None)


def train_kept(
    stack: Stack, store: Store, tasks: Sequence[Task], *,
    every_s: float, stop: Callable[[], bool], tell: Callable[[Progress], None],
) -> list[Trainee]:  # fmt: skip
    """Train every task to its end, all in the same steps; state is kept now and then, and when the user stops.

    Raises Interrupted once every task's state is kept, and what `engine.train` raises.
    """
    trainees = [task.begin(stack, store) for task in tasks]
    owner = {id(trainee): task for trainee, task in zip(trainees, tasks, strict=True)}
    total = sum(task.stops[-1] for task in tasks)
    last = saved_at = time.monotonic()

    def after_step(active: Sequence[Trainee]) -> None:
        nonlocal last, saved_at
        now = time.monotonic()
        share, last = (now - last) / len(active), now
        for trainee in active:
            task = owner[id(trainee)]
            task.spent_s += share
            task.keep(trainee, task.spent_s)
        stopping = stop()
        if stopping or now - saved_at >= every_s:
            for trainee in active:
                if trainee.step < owner[id(trainee)].stops[-1]:
                    store.save_progress(owner[id(trainee)].key, trainee.step, save_state(trainee))
            saved_at = time.monotonic()
        losses = []
        for trainee in active:
            losses.append(trainee.seen_loss)
            note(
                owner[id(trainee)].lease,
                Progress(trainee.job.name, trainee.step, owner[id(trainee)].stops[-1], "steps", known(losses[-1])),
            )
        tell(
            Progress(tasks[0].job.name, sum(t.step for t in trainees), total, "steps", known(sum(losses) / len(losses)))
        )
        if stopping:  # not asked again: a stop that came since then ends the next step, whose state is kept
            raise stopped(tasks[0].job.name)

    train(stack, trainees, Hooks(after_step), until_step=[task.stops[-1] for task in tasks])
    return trainees


def note(lease: Lease, progress: Progress) -> None:
    """Tell other terminals how far a stage is."""
    lease.note({"done": progress.done, "total": progress.total, "unit": progress.unit, "loss": progress.loss})


def known(loss: float) -> float | None:
    """The loss last seen, or None while a GPU has not answered yet."""
    return loss if math.isfinite(loss) else None
