"""How each kind of stage is computed. One object per process: it holds the resident base and nothing else of weight.

A stage's executor reads its needs from the ledger, computes, and returns an `Outcome`; `run` commits it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fastconv.asked import Asked, asked_of, is_drawn, longest_tok
from fastconv.auditing import audit_set, require_passed
from fastconv.card import look, require_fit, shape_on_disk
from fastconv.datasets.audit import report_of
from fastconv.datasets.rows import row_of
from fastconv.engine.base import Base, load_base, model_files
from fastconv.engine.fold import folded, rho
from fastconv.engine.geometry import last_states, layers_at, n_layers, places
from fastconv.engine.launch import start_server
from fastconv.engine.locate import engine_identity
from fastconv.engine.reference import TrlOptions, plain_model, train_with_trl
from fastconv.engine.room import group_size
from fastconv.engine.sample import Drawn, sample
from fastconv.engine.score import letter_item, score_letters
from fastconv.engine.selftest import self_test
from fastconv.engine.serve import Server
from fastconv.engine.served import Drawing, Served
from fastconv.engine.stack import Adapter, Probe, Slot, Stack
from fastconv.engine.train import Job, Trainee, start
from fastconv.errors import SamplerError, TrainingError, stopped
from fastconv.graph import Graph, lineage_key
from fastconv.judging.local import LocalReply, Prompt
from fastconv.store import Lease, Sample, Score, Stage, Store
from fastconv.tokens import ChatTokenizer, Rendered, SystemTurn
from fastconv.training import Progress, Task, note, train_kept


@dataclass(frozen=True)
class Outcome:
    """What a stage gave: `outputs` are part of the record, `facts` (tokens by kind) are for people."""

    outputs: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    scores: Sequence[Score] = ()


@dataclass(frozen=True)
class Begun:
    """A stage whose completions the server draws meanwhile. `outcome` raises what drawing them raised."""

    asked: Asked
    drawing: Drawing
    outcome: Callable[[], Outcome]


class Executor:
    """Computes stages on one resident base. `tell` hears progress, `stop` is asked whether to end at the next step.

    `wanted` are the keys of the stages that were asked for.
    """

    def __init__(
        self,
        graph: Graph,
        store: Store,
        tell: Callable[[Progress], None] = lambda progress: None,
        stop: Callable[[], bool] = lambda: False,
        wanted: Collection[str] = (),
    ) -> None:
        self._wanted = wanted
        self._at_hand: dict[str, Adapter] = {}
        self._proven: dict[str, float] = {}
        self._graph = graph
        self._recipe = graph.recipe
        self._store = store
        self._tell = tell
        self._stop = stop
        self._server: Server | None = None

    def prepare(self) -> None:
        """Start the sampler's server, if the recipe has one and anything that was asked for has to be sampled.

        It comes first: a server measures free memory while it starts, and fails if the base is loaded meanwhile.
        """
        stages = [stage for stage in self._graph.stages() if stage.key in self._wanted and is_drawn(stage)]
        missing = [stage for stage in stages if self._store.record(stage.key) is None]
        if self._recipe.model.sampler == "vllm" and missing:
            tokenizer = ChatTokenizer(model_files(self._recipe.model, self._graph.source))
            self._server = start_server(
                self._recipe, self._graph.source, longest_tok(missing, tokenizer), self._store.root
            )

    def prove(self) -> None:
        """Load the base and prove that it can be trusted. Raises ModelError or TrainingError if it cannot."""
        if not all(map(math.isfinite, self.stack.base_probe.logits)):
            raise TrainingError(
                "the base gives logits that are not finite",
                where=self._recipe.model.id,
                fix="its weights are damaged: fetch the model again",
            )

    def close(self) -> None:
        """End the server, if there is one, and drop what it still draws."""
        if "served" in self.__dict__:
            self.served.close()
        if self._server is not None:
            self._server.close()

    @cached_property
    def base(self) -> Base:
        """The base model; loaded when the first stage needs it, once. Raises ModelError if the GPU is not fit for it."""
        if engine_identity(self._recipe.model)["device"] == "cuda":
            require_fit(look(torch.cuda, torch.version.cuda), self._recipe, shape_on_disk(self._recipe.model))
        return load_base(self._recipe.model, self._graph.source)

    @cached_property
    def stack(self) -> Stack:
        """The live stack on the base; on a GPU proven by the self-tests before anything is computed with it."""
        stack = Stack(self.base, self._recipe.lora)
        if self.base.device.type == "cuda":
            self._proven |= self_test(stack, {self._recipe.convergence.optimizer, self._recipe.behavior.optimizer})
        return stack

    @cached_property
    def served(self) -> Served:
        """The server as a sampler, under whatever stack is live."""
        if self._server is None:
            raise SamplerError("no vLLM server was started", where="model.sampler", fix="run the recipe as a whole")
        return Served(self._server, self.stack)

    def facts(self) -> dict[str, Any]:
        """What the reproducibility card says of the loaded model and its device."""
        device = self.stack.base.device
        named = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        engine = {
            "name": engine_identity(self._recipe.model)["engine"],
            "device": named,
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "n_threads": torch.get_num_threads(),
            "sampler": f"vllm {self._server.version}" if self._server else self._recipe.model.sampler,
            "attention": self.base.attention.name,
        }
        if passed_over := self.base.attention.passed_over:
            engine["attention_passed_over"] = "; ".join(f"{name}: {why}" for name, why in passed_over)
        if self.base.device.type == "cuda":
            engine["self_tests"] = f"{len(self._proven)} passed, at most {max(self._proven.values()):.1%} apart"
        return {"engine": engine, "template": {"sha256": self.base.tokenizer.template_sha256}}

    def compute(self, stage: Stage, lease: Lease) -> Outcome:
        """Compute a stage of any kind but those that `train` trains."""
        compute = {
            "eval": self._letters,
            "rows": self._rows,
            "score": self._score,
            "geometry": self._geometry,
        }
        return self._completions(stage, lease) if is_drawn(stage) else compute[stage.kind](stage, lease)

    # --- text ------------------------------------------------------------------------------------------

    def _completions(self, stage: Stage, lease: Lease) -> Outcome:
        """Answers, or a probe's completions under a stack, drawn by the resident base."""
        asked, n_drawn = asked_of(stage, self.base.tokenizer), 0

        def on_token(n_tok: int) -> None:
            nonlocal n_drawn
            n_drawn += n_tok
            self._tick(lease, Progress(stage.slot, n_drawn, asked.most_tok, "tok"))

        with self._under(stage) as proof:
            drawn = sample(self.base, asked.prompts, asked.seeds, asked.settings, on_token)
        return self._drawn(asked, drawn, proof)

    def begin(self, stage: Stage, lease: Lease) -> Begun:
        """Have the server draw a stage's completions under its stack; `Begun.outcome` is there once `Begun.done`.

        Waits while the server is still busy with another stack. Raises Interrupted, SamplerError and what a stack that
        cannot be proven raises.
        """
        asked = asked_of(stage, self.base.tokenizer)
        waiting = Progress(stage.slot, 0, asked.most_tok, "tok")
        with self._under(stage) as proof:
            drawing = self.served.begin(asked.prompts, asked.seeds, asked.settings, lambda: self._tick(lease, waiting))
        return Begun(asked, drawing, lambda: self._drawn(asked, drawing.result(), proof))

    @contextlib.contextmanager
    def _under(self, stage: Stage) -> Iterator[dict[str, Any]]:
        """What a stage is drawn under: answers under the bare base, a probe's completions under its stack."""
        if stage.kind == "answers":
            yield {}
        else:
            with self.live_stack(stage) as proof:
                yield proof

    def _drawn(self, asked: Asked, drawn: Sequence[Drawn], proof: Mapping[str, Any]) -> Outcome:
        samples = asked.samples(drawn, self.base.tokenizer)
        facts = {"sampled_tok": sum(one.n_tok for one in samples), "prompt_tok": asked.prompt_tok}
        return Outcome({"n": len(samples), **proof}, facts, samples)

    # --- letters and phrases ---------------------------------------------------------------------------

    def _letters(self, stage: Stage, lease: Lease) -> Outcome:
        tokenizer, system = self.base.tokenizer, _system(stage.inputs["system"])
        questions = {question.id: question for question in self._graph.questions.eval}
        asked = [questions[row] for row, _ in stage.work["items"]]
        items = [letter_item(tokenizer, tokenizer.prompt_text(system, q.user), q.labels) for q in asked]
        self._tick(lease, Progress(stage.slot, 0, len(items), "questions"))
        with self.live_stack(stage) as proof:
            found = score_letters(self.base, items, self._recipe.eval.batch_tok)
        scores = [
            Score(
                question.id, 0, "accuracy", float(one.predicted == question.gold), None,
                {"gold": question.answer, "predicted": question.labels[one.predicted], "mass": round(one.mass, 6),
                 "margin": round(one.margin, 6), "logprobs": [round(value, 6) for value in one.logprobs]},
            )
            for question, one in zip(asked, found, strict=True)
        ]  # fmt: skip
        return Outcome(
            {"n": len(scores), **proof}, {"scored_tok": sum(len(item.prompt) for item in items)}, scores=scores
        )

    def _score(self, stage: Stage, lease: Lease) -> Outcome:
        rule = stage.work["rule"]
        scores = []
        for one in self._store.samples(stage.needs["eval"].key):
            phrase = rule.hit(one.completion)
            scores.append(Score(one.row, one.sample, "rate", float(phrase is not None), None, {"phrase": phrase}))
        return Outcome({"n": len(scores)}, scores=scores)

    def _geometry(self, stage: Stage, lease: Lease) -> Outcome:
        personas, tokenizer = stage.inputs["personas"], self.base.tokenizer
        asked = [user for _, user in stage.work["items"]]
        prompts = [tokenizer.prompt_ids(_system(system), user) for _, *system in personas for user in asked]
        self._tick(lease, Progress(stage.slot, 0, len(prompts), "prompts"))
        layers = layers_at(n_layers(self.base), stage.inputs["depths"])
        with self.live_stack(stage) as proof:
            states = last_states(self.base, prompts, layers, self._recipe.eval.batch_tok)
        means = states.double().view(len(personas), len(asked), *states.shape[1:]).mean(dim=1)
        found = places(dict(zip([name for name, *_ in personas], means, strict=True)), layers, stage.inputs["anchor"])
        scores = []
        for one in found:
            cosine = None if one.cosine is None else round(one.cosine, 6)
            why = None if cosine is not None else "the persona lies at the centre of all"
            scores.append(Score(one.persona, one.layer, "cosine", cosine, why))
            scores.append(Score(one.persona, one.layer, "distinctiveness", round(one.distinctiveness, 6)))
        return Outcome(
            {"n": len(scores), "layers": list(layers), **proof}, {"scored_tok": sum(map(len, prompts))}, scores=scores
        )

    def judge(self, prompts: Sequence[Prompt]) -> list[LocalReply]:
        """The bare base as a weak judge: log-probabilities of each prompt's allowed characters, among these alone.

        One forward for each prompt, what prompts begin with alike (the rubric) computed once. The share that the whole
        vocabulary leaves to these characters stands in the text. Raises Interrupted when the user stops.
        """
        if self._stop():
            raise stopped("judge")
        tokenizer, replies = self.base.tokenizer, []
        texts = [tokenizer.prompt_text(SystemTurn("text", system), user) for system, user, _ in prompts]
        items = [letter_item(tokenizer, text, list(prompt[2])) for text, prompt in zip(texts, prompts, strict=True)]
        with self.stack.live():
            found = score_letters(self.base, items, self._recipe.eval.batch_tok)
        for (_, _, characters), one in zip(prompts, found, strict=True):
            mass = max(one.mass, 1e-300)
            shares = {c: round(value - math.log(mass), 6) for c, value in zip(characters, one.logprobs, strict=True)}
            replies.append(LocalReply(f"{characters[one.predicted]} (mass {one.mass:.3g})", shares))
        return replies

    # --- training --------------------------------------------------------------------------------------

    def _rows(self, stage: Stage, lease: Lease) -> Outcome:
        answers = {persona: {s.row: s for s in self._store.samples(need.key)} for persona, need in stage.needs.items()}
        rows = []
        for row in stage.work["rows"]:
            if row.completion is None:
                drawn = answers[row.persona][row.prompt_id]
                row = row.answered(drawn.completion, ended=drawn.ended)
            rows.append(row.record(self._graph.personas))
        return Outcome({"rows": self._store.put_json(rows), "n": len(rows)})

    def _behavior_rows(self, stage: Stage) -> tuple[Rendered, ...]:
        """The rows of a behavior adapter as the model will see them, once the audit has nothing against them (gate G1)."""
        set_name, record = stage.needs["rows"].work["set"], self._record(stage.needs["rows"])
        rows = [row_of(row) for row in self._store.get_json(record.outputs["rows"])]
        rendered, findings = audit_set(self._graph, set_name, rows, self.base.tokenizer)
        require_passed(report_of(self._recipe, findings), f"G1 {set_name}")
        return rendered

    def _behavior(self, stage: Stage, lease: Lease, frozen: tuple[Adapter, ...]) -> Task:
        """One behavior adapter above these frozen ones."""
        # Drawn from the rows' key alone: every epoch's cell starts from the same weights and sees the same order.
        drawn_from = ("behavior", stage.needs["rows"].key, stage.inputs["seed"])
        job = Job(stage.slot, self._behavior_rows(stage), self._recipe.behavior, drawn_from, frozen)
        return Task(job, stage.key, lease, [job.n_steps])

    def train(self, runs: Sequence[tuple[Sequence[Stage], Lease]]) -> None:
        """Train in the same steps and commit: convergence runs through these missing snapshots of each, or behavior
        adapters, one to a run and all on one snapshot, once it is certain that what lies below them did not change.

        Raises TrainingError if one of the runs cannot be trained, DataError if the audit refuses its rows.
        """
        first = runs[0][0][0]
        with self._in_place(first.needs) as frozen:
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

    def group_size(self, runs: Sequence[Stage]) -> int:
        """How many of these runs (the first so many; each by its first stage) to train in the same steps."""
        size = self._recipe.run.group
        if size != "auto":
            return size
        shape = shape_on_disk(self._recipe.model, self._graph.source)
        if self.base.device.type != "cuda" or shape is None:
            return 1
        phase = self._recipe.convergence if runs[0].kind == "snapshot" else self._recipe.behavior
        step_tok = []
        for stage in runs:
            rows = self._convergence_rows(stage) if stage.kind == "snapshot" else self._behavior_rows(stage)
            step_tok.append(phase.batch_rows * sum(len(row.ids) for row in rows) / max(1, len(rows)))
        free, _ = torch.cuda.mem_get_info(self.base.device)
        return group_size(shape, self._recipe.lora.r, step_tok, phase.micro_batch_tok, free)

    def _convergence_rows(self, stage: Stage) -> list[Rendered]:
        """The answers of a convergence run as rows under the assistant's prompt; those without a token are left out."""
        system, limit = _system(stage.inputs["system"]), self._recipe.convergence.max_length_tok
        rows = [
            self.base.tokenizer.training_ids(system, s.prompt, s.completion, limit, ended=s.ended)
            for s in self._store.samples(stage.needs["answers"].key)
        ]
        return [row for row in rows if row.n_supervised]

    def _convergence(self, snapshots: Sequence[Stage], lease: Lease) -> Task:
        """One convergence run up to the last of these snapshots."""
        stage, missing = snapshots[0], {int(one.inputs["epoch"]): one for one in snapshots}
        drawn_from = ("convergence", stage.needs["answers"].key, stage.inputs["seed"])
        rows = tuple(self._convergence_rows(stage))
        job = Job(stage.slot.rsplit("/", 2)[0], rows, self._recipe.convergence, drawn_from)
        committed_s, reached = 0.0, 0

        def keep(trainee: Trainee, spent_s: float) -> None:
            nonlocal committed_s, reached
            epoch, within = divmod(trainee.step, job.steps_per_epoch)
            if within or epoch not in missing:
                return
            self._commit_trained(missing[epoch], trainee, (trainee.adapter,), spent_s - committed_s, reached)
            committed_s, reached = spent_s, trainee.step

        stops = [epoch * job.steps_per_epoch for epoch in sorted(missing)]
        return Task(job, lineage_key(stage), lease, stops, keep)

    def _train(self, tasks: Sequence[Task]) -> list[Trainee]:
        """Train in the same steps, from kept state where there is some."""
        if self._recipe.model.trainer == "trl":
            return [self._train_with_trl(task) for task in tasks]
        every_s = self._recipe.run.checkpoint_every_s
        return train_kept(self.stack, self._store, tasks, every_s=every_s, stop=self._stop, tell=self._tell)

    def _train_with_trl(self, task: Task) -> Trainee:
        """The same job by the reference, from its beginning for every stop: slow, and only for checking ours."""
        job, began = task.job, time.monotonic()
        trainee = start(self.stack, job)
        first = trainee.adapter.flat.clone()
        for stop in task.stops:
            trainee.adapter.flat.copy_(first)
            model = plain_model(self._recipe.model)
            found = train_with_trl(model, job, trainee.adapter, TrlOptions(until_step=stop))
            trainee.adapter.flat.copy_(found.weights)
            trainee.losses[:stop] = torch.tensor(found.losses)
            trainee.step = stop
            task.spent_s = time.monotonic() - began
            task.keep(trainee, task.spent_s)
        return trainee

    def _commit_trained(
        self, stage: Stage, trainee: Trainee, stack: tuple[Adapter, ...], seconds: float, from_step: int
    ) -> None:
        """Commit an adapter with the probe of its stack. Raises TrainingError if its last step was not finite."""
        trainee.check()
        with self.stack.live(Slot(frozen=stack)):
            probe = self.stack.prove(None, stage.slot)
        adapter, per_epoch = trainee.adapter, trainee.job.steps_per_epoch
        losses = trainee.losses[: trainee.step].tolist()
        outputs = {
            "adapter": self._store.put(adapter.to_bytes(), "safetensors"),
            "weights_sha256": adapter.sha256(),
            "probe": [round(value, 6) for value in probe.logits],
            "from_base": round(probe.distance(self.stack.base_probe), 6),
            "rho": self._rho(adapter),
            "losses": [round(value, 6) for value in losses],
            "last_epoch_loss": round(sum(losses[-per_epoch:]) / len(losses[-per_epoch:]), 6),
        }
        self._store.commit(stage, outputs=outputs, facts=_train_facts(trainee, from_step), seconds=seconds)

    def _rho(self, adapter: Adapter) -> dict[str, float]:
        """||delta|| / ||W||: least, median and greatest over modules."""
        shares = sorted(rho(self.stack, [adapter]).values())
        chosen = {"least": shares[0], "median": shares[len(shares) // 2], "greatest": shares[-1]}
        return {name: float(f"{value:.4g}") for name, value in chosen.items()}

    # --- the stack -------------------------------------------------------------------------------------

    def adapters(self, needs: Mapping[str, Stage]) -> list[Adapter]:
        """The adapters of a stack in order: the snapshot, then the behavior. Verified against the ledger.

        Those of the stack before are still at hand: the probes of a cell follow one another.
        """
        stages = [needs[name] for name in ("snapshot", "behavior") if name in needs]
        names = [self._record(stage).outputs["adapter"] for stage in stages]
        self._at_hand = {
            sha256: self._at_hand.get(sha256)
            or self.stack.load_adapter(self._store.get(sha256, "safetensors"), stage.slot)
            for sha256, stage in zip(names, stages, strict=True)
        }
        return [self._at_hand[sha256] for sha256 in names]

    @contextlib.contextmanager
    def _in_place(self, needs: Mapping[str, Stage]) -> Iterator[tuple[Adapter, ...]]:
        """The stack's adapters that are to be live; with published semantics the snapshot is folded in instead."""
        adapters = tuple(self.adapters(needs))
        if self._recipe.model.semantics == "published" and "snapshot" in needs:
            with folded(self.stack, adapters[:1], "published"):
                yield adapters[1:]
        else:
            yield adapters

    @contextlib.contextmanager
    def live_stack(self, stage: Stage) -> Iterator[dict[str, Any]]:
        """The stack of an evaluation (or of its score), live inside the block; gives the distances that prove it."""
        stage = stage.needs.get("eval", stage)
        top = stage.needs.get("behavior") or stage.needs.get("snapshot")
        recorded = Probe(tuple(self._record(top).outputs["probe"])) if top else None
        with self._in_place(stage.needs) as adapters, self.stack.live(*([Slot(frozen=adapters)] if adapters else [])):
            probe = self.stack.prove(recorded, stage.slot)
            proof = {"from_base": round(probe.distance(self.stack.base_probe), 6)}
            if recorded is not None:
                proof["from_recorded"] = round(probe.distance(recorded), 6)
            yield proof

    # --- small things ----------------------------------------------------------------------------------

    def _record(self, stage: Stage) -> Any:
        record = self._store.record(stage.key)
        if record is None:
            raise TrainingError("a stage before it is missing", where=stage.slot, fix="run the recipe again")
        return record

    def _tick(self, lease: Lease, progress: Progress) -> None:
        note(lease, progress)
        self._tell(progress)
        if self._stop():
            raise stopped(progress.slot)


def _train_facts(trainee: Trainee, from_step: int) -> dict[str, Any]:
    rows = trainee.job.rows
    n_tok = sum(len(rows[row].ids) for step in range(from_step, trainee.step) for row in trainee.job.batch(step))
    fitted = {"micro_batch_limit": trainee.micro_batch_tok, "recomputed": trainee.recomputes}
    return {"trained_tok": n_tok, "steps": trainee.step - from_step, **fitted}


def _system(pair: Sequence[str]) -> SystemTurn:
    return SystemTurn(pair[0], pair[1])  # pyright: ignore[reportArgumentType]
