"""Training of convergence runs and behavior adapters, one or several in the same steps, with checkpoints and commits.

`train_with_checkpoints` is the loop over `engine.train`; `Trainer` turns stages into tasks for it and commits the
adapters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from fastconv.audit.checks import Finding, build_report
from fastconv.audit.rendered import Pair, pairs_to_read, reading_findings
from fastconv.chat import Rendered, SystemTurn
from fastconv.datasets.personas import ASSISTANT
from fastconv.datasets.rows import Row, render_rows, require_plain_text, row_from_record
from fastconv.engine.cuda_graph import CapturedSteps, StepTally
from fastconv.engine.device import shape_on_disk
from fastconv.engine.generate import training_room_bytes
from fastconv.engine.locate import trains_without_kernels
from fastconv.engine.model import Base
from fastconv.engine.score import TextItem, memory_errors, score_texts
from fastconv.engine.stack import Adapter, Slot, Stack, rho
from fastconv.engine.train import Hooks, Job, Trainee, save_state, start, together_speedup, train
from fastconv.engine.trl_reference import train_reference
from fastconv.engine.vllm.memory import group_size
from fastconv.errors import DataError, stopped
from fastconv.experiment.graph import Graph, lineage_key
from fastconv.recipe import TrainSettings, sha256_of
from fastconv.run.audit import READ_BEFORE_TRAINING, audit_set, reading_stage, require_passed
from fastconv.run.sampling import Progress, note_progress
from fastconv.run.stacks import Stacks
from fastconv.store.ledger import Lease, Sample, Stage, Store

#: What helps where a sampled answer cannot be trained on.
_DRAW_ANEW = "change the seed or the sampling, so that the answers are drawn anew"

#: Sets of rows that stay rendered from one training to the next: those of a snapshot come again on the next one.
_KEPT_SETS = 8


@dataclass
class TrainingTask:
    """One training run. `key` is where its checkpoint is stored, `stops` are the steps to commit at, the last is its end.

    `after_step(trainee, seconds)` is called after every step, with the seconds of this run so far; a step that several
    runs share counts in equal parts. `spent_s` is the same sum.
    """

    job: Job
    key: str
    lease: Lease
    stops: Sequence[int]
    after_step: Callable[[Trainee, float], None] = lambda trainee, seconds: None
    spent_s: float = field(default=0.0, init=False)

    def begin(self, stack: Stack, store: Store) -> Trainee:
        """Start the run from its checkpoint, or from its first step."""
        checkpoint = store.progress(self.key)
        if checkpoint and checkpoint[0] > self.stops[0]:
            checkpoint = None  # it lies after an epoch that is to be committed: start again, with identical results
        return start(stack, self.job, store.get(checkpoint[1], "safetensors") if checkpoint else None)


def train_with_checkpoints(
    stack: Stack, store: Store, tasks: Sequence[TrainingTask], *,
    every_s: float, stop: Callable[[], bool], tell: Callable[[Progress], None],
) -> list[Trainee]:  # fmt: skip
    """Train all tasks to their ends, in the same steps, with a checkpoint every `every_s` seconds.

    When `stop` returns True, raises Interrupted after the current step, with checkpoints of all tasks written. Raises
    what `engine.train` raises. `tell` is called with the progress after every step.
    """
    trainees = [task.begin(stack, store) for task in tasks]
    task_of = {id(trainee): task for trainee, task in zip(trainees, tasks, strict=True)}
    total = sum(task.stops[-1] for task in tasks)
    last = saved_at = time.monotonic()

    def after_step(active: Sequence[Trainee]) -> None:
        nonlocal last, saved_at
        now = time.monotonic()
        share, last = (now - last) / len(active), now
        for trainee in active:
            task = task_of[id(trainee)]
            task.spent_s += share
            task.after_step(trainee, task.spent_s)
        stopping = stop()
        if stopping or now - saved_at >= every_s:
            for trainee in active:
                if trainee.step < task_of[id(trainee)].stops[-1]:
                    store.save_progress(task_of[id(trainee)].key, trainee.step, save_state(trainee))
            saved_at = time.monotonic()
        losses, each = [], []
        for trainee in active:
            task, name = task_of[id(trainee)], trainee.job.name
            losses.append(trainee.last_loss)
            each.append((name, trainee.step, finite_or_none(losses[-1])))
            note_progress(task.lease, Progress(name, trainee.step, task.stops[-1], "steps", each[-1][-1]))
        mean, done = finite_or_none(sum(losses) / len(losses)), sum(t.step for t in trainees)
        tell(Progress(tasks[0].job.name, done, total, "steps", mean, tuple(each)))
        if stopping:  # `stop` is not called again: a later request ends the next step, which is then checkpointed
            raise stopped(tasks[0].job.name)

    train(stack, trainees, Hooks(after_step), until_step=[task.stops[-1] for task in tasks])
    return trainees


def seed_parts(stage: Stage, kind: Literal["seed", "order_seed"] = "seed") -> tuple[object, ...]:
    """What names the initial weights, or row order and dropout (`order_seed`), of a training: a seed where it is set apart.

    It is what the rows ask, by content, and the seed: not the answers that the base draws, since engines that round
    differently draw different ones, and not a key, which names the engine. So the cells of all epochs, and of all engines,
    start from the same weights and see their rows in the same order.
    """
    seed, answers = stage.inputs.get(kind, stage.inputs["seed"]), stage.needs.get("answers")
    if answers is not None:
        content = sha256_of([answers.inputs[name] for name in ("system", "prompts_sha256", "per_prompt")])
        return "convergence", content, seed
    return "behavior", stage.needs["rows"].inputs["rows_sha256"], seed


def read_set(
    graph: Graph, store: Store | None, base: Base, stage: Stage, rows: Sequence[Row], most: int
) -> list[Finding]:
    """What the bare base, as a reader, finds in the rows of a set, given by its `rows` stage: at most `most` prompts.

    What was read is kept in the ledger under its own key, so that a set is read once.
    """
    name, system = stage.work["set"], graph.personas.system(ASSISTANT)
    behavior, longest_tok = graph.behaviors[name.split("/")[0]], graph.recipe.behavior.max_length_tok
    pairs = pairs_to_read(behavior, rows, base.tokenizer, system, most, longest_tok)
    if not pairs:
        return []
    reading = reading_stage(graph, stage, most)
    record = store.record(reading.key) if store is not None else None
    if record is not None:
        means = record.facts["means"]
    else:
        began = time.monotonic()
        means = _read(base, pairs, graph.recipe.eval.batch_tok)
        facts = {"means": means, "read_tok": sum(len(pair.prefix) + sum(map(len, pair.texts)) for pair in pairs)}
        if store is not None:
            store.commit(reading, outputs={"n": len(pairs)}, facts=facts, seconds=time.monotonic() - began)
    pairs_of_means = [(first, second) for first, second in means]
    return reading_findings(name, pairs, pairs_of_means, base.tokenizer.vocab_size, graph.recipe.audit.accept)


def _read(base: Base, pairs: Sequence[Pair], batch_tok: int) -> list[list[float]]:
    """Log-probability per token (nats) of both texts of each pair."""
    items = [TextItem(pair.prefix, pair.texts, (0, 0), (1, 1)) for pair in pairs]
    scores = score_texts(base, items, batch_tok)
    return [
        [round(total / len(text), 5) for total, text in zip(score.logprobs, pair.texts, strict=True)]
        for pair, score in zip(pairs, scores, strict=True)
    ]


def finite_or_none(loss: float) -> float | None:
    """The loss, or None while the GPU has not returned one."""
    return loss if math.isfinite(loss) else None


class Trainer:
    """Trains stages on the resident base. `tell` is called with progress, `stop` returns whether to end after the step."""

    def __init__(
        self, graph: Graph, store: Store, stacks: Stacks, tell: Callable[[Progress], None], stop: Callable[[], bool]
    ) -> None:
        self._graph = graph
        self._recipe = graph.recipe
        self._store = store
        self._stacks = stacks
        self._tell = tell
        self._stop = stop
        #: Keys of the sets of rows that the bare base has read, and of those that were audited, that nothing refuses.
        self._read: set[str] = set()
        self._audited: set[str] = set()
        self._gpu: GpuUse | None = None
        #: Rows of the runs that are sized and trained next, and of the newest sets, by what they are trained from.
        self._rendered: dict[str, tuple[Rendered, ...]] = {}

    def train(self, runs: Sequence[tuple[Sequence[Stage], Lease]]) -> None:
        """Train runs in the same steps and commit their stages.

        A run is either the missing snapshots of one convergence run, or a single behavior adapter; all behavior adapters
        stand on the same snapshot and are committed after the end of all. Raises TrainingError if a run cannot be
        trained, DataError if the audit refuses its rows.
        """
        first = runs[0][0][0]
        if first.kind == "behavior":
            self._require_read([stage.needs["rows"] for (stage,), _ in runs])
        with memory_errors(first.slot), self._stacks.in_place(first.needs) as frozen:
            if first.kind == "snapshot":
                tasks = [self._convergence(snapshots, lease) for snapshots, lease in runs]
            else:
                tasks = [self._behavior(stage, lease, frozen) for (stage,), lease in runs]
            trainees = self._train(tasks)
            if first.kind == "behavior":
                for ((stage,), _), task, trainee in zip(runs, tasks, trainees, strict=True):
                    self._commit_trained(stage, trainee, (*frozen, trainee.adapter), task.spent_s, 0)
        for task in tasks:
            self._store.drop_progress(task.key)
        kept = [(key, rows) for key, rows in self._rendered.items() if key in self._audited]
        self._rendered = dict(kept[-_KEPT_SETS:])

    def group_size(self, runs: Sequence[Stage]) -> int:
        """How many of these runs, each given by its first stage, to train in the same steps: the first n of the list.

        With `run.group` "auto" as many as memory allows, where that was measured to be faster than one after another.
        """
        size = self._recipe.run.group
        if size != "auto":
            return size
        shape = shape_on_disk(self._recipe.model, self._graph.source)
        if self._stacks.base.device.type != "cuda" or shape is None:
            return 1
        phase = self._phase(runs[0])
        room = training_room_bytes(self._stacks.base)
        step_tok = (phase.batch_rows * self._mean_tok(stage) for stage in runs)
        plain = trains_without_kernels(self._recipe.model)
        size = group_size(shape, self._recipe.lora.most_r, step_tok, phase.micro_batch_tok, room, plain=plain)
        return size if size > 1 and self._is_faster_together(runs[:size]) else 1

    def _is_faster_together(self, runs: Sequence[Stage]) -> bool:
        """Whether these runs train faster in the same steps, as measured once for as many of this kind on this device.

        The measurement is kept in the ledger, so that a run which goes on groups as it began, to the same bits.
        """
        first, stack = runs[0], self._stacks.stack
        phase = self._phase(first)
        device = torch.cuda.get_device_name() if stack.base.device.type == "cuda" else "cpu"
        settings = {"lora": self._recipe.lora.model_dump(mode="json"), "phase": phase.model_dump(mode="json")}
        inputs = {**self._graph.engine_inputs, **settings, "on": device, "runs": len(runs)}
        stage = Stage("grouping", f"grouping/{first.kind}/{len(runs)}", 1, inputs)
        if (record := self._store.record(stage.key)) is not None:
            return record.outputs["speedup"] > 1
        began = time.monotonic()
        with self._stacks.in_place(first.needs) as frozen:
            below = frozen if first.kind == "behavior" else ()
            jobs = [self._job(run, below) for run in runs]
            speedup = together_speedup(stack, jobs)
        self._store.commit(stage, outputs={"speedup": round(speedup, 3)}, facts={}, seconds=time.monotonic() - began)
        return speedup > 1

    def _mean_tok(self, stage: Stage) -> float:
        """Mean tokens of a row."""
        rows = self._rows_of(stage)
        return sum(len(row.ids) for row in rows) / max(1, len(rows))

    def _rows_of(self, stage: Stage) -> tuple[Rendered, ...]:
        """The rows of a run, rendered once to be sized and trained: many adapters are trained on the same ones.

        They are not audited here, so that a refused row fails its stage and not the sizing.
        """
        key = lineage_key(stage) if stage.kind == "snapshot" else stage.needs["rows"].key
        if key not in self._rendered:
            if stage.kind == "snapshot":
                self._rendered[key] = self._convergence_rows(stage)
            else:
                limit, tokenizer = self._recipe.behavior.max_length_tok, self._stacks.base.tokenizer
                built = self._built_rows(stage.needs["rows"])
                self._rendered[key] = tuple(render_rows(built, self._graph.personas, tokenizer, limit))
        return self._rendered[key]

    def _job(self, stage: Stage, frozen: tuple[Adapter, ...] = ()) -> Job:
        """What is trained for a stage: a behavior adapter above these frozen ones, or its whole convergence run."""
        whole = stage.kind == "snapshot"
        name = stage.slot.rsplit("/", 2)[0] if whole else stage.slot
        order = seed_parts(stage, "order_seed")
        return Job(name, self._rows_of(stage), self._phase(stage), seed_parts(stage), frozen, order_parts=order)

    def _phase(self, stage: Stage) -> TrainSettings:
        return self._recipe.convergence if stage.kind == "snapshot" else self._recipe.behavior

    def _built_rows(self, rows: Stage) -> list[Row]:
        """The rows of a set, given by its `rows` stage."""
        return [row_from_record(row) for row in self._store.get_json(self._stacks.record(rows).outputs["rows"])]

    def _require_audited(self, stage: Stage) -> None:
        """Audit the rows of a behavior adapter, once for all that are trained on them. Raises DataError if one is refused
        (gate G1)."""
        rows = stage.needs["rows"]
        if rows.key in self._audited:
            return
        name, built = rows.work["set"], self._built_rows(rows)
        findings = audit_set(self._graph, name, built, self._rows_of(stage), self._stacks.base.tokenizer)
        require_passed(build_report(self._recipe, findings), f"G1 {name}")
        self._audited.add(rows.key)

    def _require_read(self, sets: Sequence[Stage]) -> None:
        """Let the bare base read these sets of rows. Raises DataError if what it finds refuses one (gate G1)."""
        unread = {rows.key: rows for rows in sets if rows.key not in self._read}
        if not unread:  # the same rows are trained on many snapshots
            return
        with self._stacks.stack.live():
            for rows in unread.values():
                built = self._built_rows(rows)
                findings = read_set(self._graph, self._store, self._stacks.base, rows, built, READ_BEFORE_TRAINING)
                require_passed(build_report(self._recipe, findings), f"G1 {rows.work['set']}")
                self._read.add(rows.key)

    def _behavior(self, stage: Stage, lease: Lease, frozen: tuple[Adapter, ...]) -> TrainingTask:
        """The task of a behavior adapter on top of these frozen ones."""
        self._require_audited(stage)
        job = self._job(stage, frozen)
        return TrainingTask(job, stage.key, lease, [job.n_steps])

    def _convergence_rows(self, stage: Stage) -> tuple[Rendered, ...]:
        """The answers of a convergence run as rendered rows under the assistant's prompt, without those that have no token."""
        system, limit = SystemTurn(*stage.inputs["system"]), self._recipe.convergence.max_length_tok
        rows = [
            self._stacks.base.tokenizer.training_ids(system, s.prompt, s.completion, limit, ended=s.ended)
            for s in self._kept(stage)
        ]
        return tuple(row for row in rows if row.n_supervised)

    def _kept(self, stage: Stage) -> list[Sample]:
        """The answers of a convergence run that its filter keeps. Raises DataError if it keeps none."""
        drawn, rule = self._store.samples(stage.needs["answers"].key), stage.work["filter"]
        kept = [one for one in drawn if rule is None or rule.match(one.completion) is not None]
        if rule is not None and not kept:
            fix = f"widen it; one answer is {drawn[0].completion[:80]!r}"
            raise DataError(f"the filter keeps none of {len(drawn)} answers", where="convergence.keep", fix=fix)
        return kept

    def _convergence(self, snapshots: Sequence[Stage], lease: Lease) -> TrainingTask:
        """The task of a convergence run up to the last of these snapshots."""
        stage, missing = snapshots[0], {int(snapshot.inputs["epoch"]): snapshot for snapshot in snapshots}
        drawn = self._store.samples(stage.needs["answers"].key)
        said = (
            (f"the answer to {s.row} (sample {s.sample})", s.completion, stage.needs["answers"].slot) for s in drawn
        )
        require_plain_text(said, self._stacks.base.tokenizer, _DRAW_ANEW)
        job = self._job(stage)
        kept = {} if stage.work["filter"] is None else {"answers_drawn": len(drawn), "answers_kept": len(job.rows)}
        committed_s, committed_step = 0.0, 0

        def commit_snapshot(trainee: Trainee, spent_s: float) -> None:
            nonlocal committed_s, committed_step
            epoch, within = divmod(trainee.step, job.steps_per_epoch)
            if within or epoch not in missing:
                return
            seconds, stack = spent_s - committed_s, (trainee.adapter,)
            self._commit_trained(missing[epoch], trainee, stack, seconds, committed_step, kept)
            committed_s, committed_step = spent_s, trainee.step

        stops = [epoch * job.steps_per_epoch for epoch in sorted(missing)]
        return TrainingTask(job, lineage_key(stage), lease, stops, commit_snapshot)

    def _train(self, tasks: Sequence[TrainingTask]) -> list[Trainee]:
        """Train the tasks with the recipe's trainer."""
        if self._stacks.base.device.type == "cuda":
            self._gpu = GpuUse(self._stacks.base)
        if self._recipe.model.uses_reference_trainer:
            return [self._train_reference(task) for task in tasks]
        every_s = self._recipe.run.checkpoint_every_s
        return train_with_checkpoints(
            self._stacks.stack, self._store, tasks, every_s=every_s, stop=self._stop, tell=self._tell
        )

    def _train_reference(self, task: TrainingTask) -> Trainee:
        """Train the same job by the reference trainer, which keeps no state between steps."""

        def keep(trainee: Trainee, spent_s: float) -> None:
            task.spent_s = spent_s
            task.after_step(trainee, spent_s)

        return train_reference(self._recipe.model, self._stacks.stack, task.job, task.stops, keep)

    def _commit_trained(
        self,
        stage: Stage,
        trainee: Trainee,
        stack: tuple[Adapter, ...],
        seconds: float,
        from_step: int,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Commit an adapter with the probe logits of its stack. Raises TrainingError if its last step was not finite."""
        trainee.check()
        with self._stacks.stack.live(Slot(frozen=stack)):
            probe = self._stacks.stack.prove(None, stage.slot)
        adapter = trainee.adapter.to(torch.device("cpu"), copy=True)  # it is kept, and this one may be trained on
        per_epoch = trainee.job.steps_per_epoch
        losses = trainee.losses[: trainee.step].tolist()
        outputs = {
            "adapter": self._store.put(adapter.to_bytes(), "safetensors"),
            "weights_sha256": adapter.sha256(),
            "probe": [round(value, 6) for value in probe.logits],
            "from_base": round(probe.distance(self._stacks.stack.base_probe), 6),
            "rho": self._rho(trainee.adapter),
            "losses": [round(value, 6) for value in losses],
            "last_epoch_loss": round(sum(losses[-per_epoch:]) / len(losses[-per_epoch:]), 6),
            **(more or {}),
        }
        facts = _train_facts(trainee, from_step) | ({} if self._gpu is None else self._gpu.facts())
        self._store.commit(stage, outputs=outputs, facts=facts, seconds=seconds)
        self._stacks.keep_newest(outputs["adapter"], adapter)

    def _rho(self, adapter: Adapter) -> dict[str, float]:
        """Frobenius norm of the adapter's delta relative to that of W: least, median and greatest over modules."""
        ratios = sorted(rho(self._stacks.stack, [adapter]).values())
        chosen = {"least": ratios[0], "median": ratios[len(ratios) // 2], "greatest": ratios[-1]}
        return {name: float(f"{value:.4g}") for name, value in chosen.items()}


class GpuUse:
    """What training takes of a GPU: the most memory that torch had allocated, micro-steps launched and replayed, graphs captured
    and the seconds of it. Each stage tells what came since the one before."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._begin()

    def facts(self) -> dict[str, float]:
        """The facts since the last call, `capture_s` in seconds."""
        steps = self._base.kept.get("steps")
        found: dict[str, float] = {"peak_bytes": torch.cuda.max_memory_allocated(self._base.device)}
        if isinstance(steps, CapturedSteps):
            tally = steps.tally.since(self._before if steps is self._steps else StepTally())
            found |= {name: tally[name] for name in ("launched", "replayed", "captures")}
            found["capture_s"] = round(tally["capture_s"], 3)
        self._begin()
        return found

    def _begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._base.device)
        self._steps = self._base.kept.get("steps")
        self._before = replace(self._steps.tally) if isinstance(self._steps, CapturedSteps) else StepTally()


def _train_facts(trainee: Trainee, from_step: int) -> dict[str, Any]:
    rows = trainee.job.rows
    n_tok = sum(len(rows[row].ids) for step in range(from_step, trainee.step) for row in trainee.job.batch(step))
    fitted = {"micro_batch_limit": trainee.micro_batch_tok, "recomputed": trainee.recomputes}
    return {"trained_tok": n_tok, "steps": trainee.step - from_step, **fitted}
