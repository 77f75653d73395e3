"""Computes every kind of stage on the resident base model, except trainings, which `run.training` does.

The executor reads what a stage needs from the ledger, computes, and returns an `Outcome`; the runner commits it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch

from fastconv.chat import ChatTokenizer, SystemTurn
from fastconv.datasets.rows import require_plain_text
from fastconv.engine.builtin import prepare_model_folder
from fastconv.engine.generate import Completion, sample
from fastconv.engine.geometry import measure_geometry
from fastconv.engine.locate import engine_identity
from fastconv.engine.score import LetterItem, TextItem, letter_item, memory_errors, score_letters, score_texts
from fastconv.engine.vllm.sampler import PendingCompletions, VllmSampler
from fastconv.engine.vllm.server import Server, start_server
from fastconv.errors import JudgeError, SamplerError, TemplateError, TrainingError, stopped
from fastconv.experiment.graph import Graph
from fastconv.judge.local import LocalReply, Prompt
from fastconv.run.audit import require_conditions
from fastconv.run.sampling import (
    Progress,
    SamplingRequests,
    is_sampled,
    max_sequence_tok,
    note_progress,
    sampling_requests,
)
from fastconv.run.stacks import Stacks
from fastconv.run.training import Trainer
from fastconv.startup import StartTimes
from fastconv.store.ledger import Lease, Sample, Score, Stage, Store

#: How each measure of snapshots (`experiment.measures.SNAPSHOT_MEASURES`) is computed under the live stack.
SNAPSHOT_COMPUTE = {"geometry": measure_geometry}


@dataclass(frozen=True)
class Outcome:
    """Result of a stage. `outputs` are part of its record; `facts` (token counts by kind) are for reports."""

    outputs: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    scores: Sequence[Score] = ()


@dataclass(frozen=True)
class PendingStage:
    """A stage whose completions the server is sampling. `outcome()` waits for them and raises what sampling raised."""

    requests: SamplingRequests
    completions: PendingCompletions
    outcome: Callable[[], Outcome]


class Executor:
    """Computes stages on one resident base. `tell` is called with progress, `stop` returns whether to end.

    `wanted` are the keys of the stages to compute; they decide whether a sampling server is started. The seconds of the
    start are added to `times`.
    """

    def __init__(
        self,
        graph: Graph,
        store: Store,
        tell: Callable[[Progress], None] = lambda progress: None,
        stop: Callable[[], bool] = lambda: False,
        wanted: Collection[str] = (),
        times: StartTimes | None = None,
    ) -> None:
        self._wanted = wanted
        self._graph = graph
        self._recipe = graph.recipe
        self._store = store
        self._tell = tell
        self._stop = stop
        self._server: Server | None = None
        self._n_halved = 0
        self.stacks = Stacks(graph, store, times, trains=True)
        self.trainer = Trainer(graph, store, self.stacks, tell, stop)

    def prepare(self) -> None:
        """Start the vLLM server if the recipe samples with it and a wanted stage has to be sampled.

        Must be called before the base is loaded: the server measures free memory while it starts. Raises SamplerError.
        """
        stages = [stage for stage in self._graph.stages() if stage.key in self._wanted and is_sampled(stage)]
        missing = [stage for stage in stages if self._store.record(stage.key) is None]
        if self._recipe.model.sampler == "vllm" and missing:
            tokenizer = ChatTokenizer(prepare_model_folder(self._recipe.model, self._graph.source), self._recipe.model)
            self._server = start_server(
                self._recipe, self._graph.source, max_sequence_tok(missing, tokenizer), self._store.root
            )

    def prove(self) -> None:
        """Load the base, try its template and run its self-tests. Raises what `require_conditions` raises, ModelError or
        TrainingError if they fail."""
        with memory_errors(self._recipe.model.id):
            require_conditions(self._recipe, self.stacks.base.tokenizer)
            logits = self.stacks.stack.base_probe.logits
        if not all(map(math.isfinite, logits)):
            raise TrainingError(
                "the base gives logits that are not finite",
                where=self._recipe.model.id,
                fix="its weights are damaged: fetch the model again",
            )

    def close(self) -> None:
        """Stop the server, if there is one, and drop what it is still sampling."""
        if "served" in self.__dict__:
            self.served.close()
        if self._server is not None:
            self._server.close()

    @cached_property
    def served(self) -> VllmSampler:
        """The server as a sampler for the live stack. Raises SamplerError if none was started."""
        if self._server is None:
            raise SamplerError("no vLLM server was started", where="model.sampler", fix="run the recipe as a whole")
        return VllmSampler(self._server, self.stacks.stack)

    def facts(self) -> dict[str, Any]:
        """Facts about the loaded model and its device for the reproducibility card."""
        device = self.stacks.stack.base.device
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        engine = {
            "name": engine_identity(self._recipe.model)["engine"],
            "device": device_name,
            "dtype": str(self.stacks.base.dtype).removeprefix("torch."),
            "n_threads": torch.get_num_threads(),
            "sampler": f"vllm {self._server.version}" if self._server else self._recipe.model.sampler,
            "attention": self.stacks.base.attention.name,
        }
        if passed_over := self.stacks.base.attention.passed_over:
            engine["attention_passed_over"] = "; ".join(f"{name}: {why}" for name, why in passed_over)
        if self.stacks.base.device.type == "cuda":
            engine["self_tests"] = (
                f"{len(self.stacks.proven)} passed, at most {max(self.stacks.proven.values()):.1%} apart"
            )
        return {"engine": engine, "template": self.stacks.base.tokenizer.template.facts}

    def compute(self, stages: Sequence[tuple[Stage, Lease]]) -> list[Outcome]:
        """Compute a stage of any kind except `snapshot` and `behavior`, which `trainer` trains; or several whose
        completions can be sampled in one pass (`sampling.in_one_pass`)."""
        self._n_halved = 0
        stage, lease = stages[0]
        with memory_errors(stage.slot):
            if is_sampled(stage):
                outcomes = self._completions(stages)
            else:
                compute = {
                    "eval": self._choices if "choices" in stage.work else self._letters,
                    "rows": self._rows,
                    "score": self._score,
                    **dict.fromkeys(SNAPSHOT_COMPUTE, self._measure),
                }
                outcomes = [compute[stage.kind](stage, lease)]
        halved = {"halved": self._n_halved} if self._n_halved else {}
        return [replace(outcome, facts={**outcome.facts, **halved}) for outcome in outcomes]

    def _on_halved(self) -> None:
        self._n_halved += 1

    # --- text ------------------------------------------------------------------------------------------

    def _completions(self, stages: Sequence[tuple[Stage, Lease]]) -> list[Outcome]:
        """Sample answers or probes' completions with the resident base, all in one pass."""
        asked = [sampling_requests(stage, self.stacks.base.tokenizer) for stage, _ in stages]
        max_tok, n_sampled = sum(requests.max_tok for requests in asked), 0

        def on_token(n_tok: int) -> None:
            nonlocal n_sampled
            n_sampled += n_tok
            for stage, lease in stages[1:]:
                note_progress(lease, Progress(stage.slot, n_sampled, max_tok, "tok"))
            self._tick(stages[0][1], Progress(stages[0][0].slot, n_sampled, max_tok, "tok"))

        prompts = [prompt for requests in asked for prompt in requests.prompts]
        seeds = [seed for requests in asked for seed in requests.seeds]
        with self._sampling_stack(stages[0][0]) as proof:
            drawn = iter(sample(self.stacks.base, prompts, seeds, asked[0].settings, on_token, self._on_halved))
        return [self._sampled_outcome(requests, list(islice(drawn, len(requests.items))), proof) for requests in asked]

    def begin(self, stage: Stage, lease: Lease) -> PendingStage:
        """Start sampling a stage's completions on the server, under the stage's stack.

        Blocks while the server is still busy with another stack. Raises Interrupted, SamplerError, and what a stack
        that fails its probe raises.
        """
        requests = sampling_requests(stage, self.stacks.base.tokenizer)
        waiting = Progress(stage.slot, 0, requests.max_tok, "tok")
        with self._sampling_stack(stage) as proof:
            completions = self.served.begin(
                requests.prompts, requests.seeds, requests.settings, lambda: self._tick(lease, waiting)
            )
        return PendingStage(requests, completions, lambda: self._sampled_outcome(requests, completions.result(), proof))

    @contextlib.contextmanager
    def _sampling_stack(self, stage: Stage) -> Iterator[dict[str, Any]]:
        """The stack to sample a stage under, live in the block: the bare base for answers, else the stage's own."""
        if stage.kind == "answers":
            yield {}
        else:
            with self.stacks.live_stack(stage) as proof:
                yield proof

    def _sampled_outcome(
        self, requests: SamplingRequests, completions: Sequence[Completion], proof: Mapping[str, Any]
    ) -> Outcome:
        samples = requests.samples(completions, self.stacks.base.tokenizer)
        facts = {"sampled_tok": sum(row.n_tok for row in samples), "prompt_tok": requests.prompt_tok}
        return Outcome({"n": len(samples), **proof}, facts, samples)

    # --- letters and phrases ---------------------------------------------------------------------------

    def _letters(self, stage: Stage, lease: Lease) -> Outcome:
        tokenizer, system = self.stacks.base.tokenizer, SystemTurn(*stage.inputs["system"])
        questions = {question.id: question for question in self._graph.questions.eval}
        asked = stage.work["items"]
        selected = [questions[row] for row, _ in asked]
        require_plain_text(((f"the question {row}", user, stage.slot) for row, user in asked), tokenizer)
        prompts = [tokenizer.prompt_text(system, user) for _, user in asked]
        items = [letter_item(tokenizer, prompt, q.labels) for prompt, q in zip(prompts, selected, strict=True)]
        self._tick(lease, Progress(stage.slot, 0, len(items), "questions"))
        with self.stacks.live_stack(stage) as proof:
            results = score_letters(self.stacks.base, items, self._recipe.eval.batch_tok, self._on_halved)
        scores = [
            Score(
                question.id, 0, "accuracy", float(result.predicted == question.gold), None,
                {"gold": question.answer, "predicted": question.labels[result.predicted], "mass": round(result.mass, 6),
                 "margin": round(result.margin, 6), "logprobs": [round(value, 6) for value in result.logprobs]},
            )
            for question, result in zip(selected, results, strict=True)
        ]  # fmt: skip
        return Outcome(
            {"n": len(scores), **proof}, {"scored_tok": sum(len(item.prompt) for item in items)}, scores=scores
        )

    def _choices(self, stage: Stage, lease: Lease) -> Outcome:
        """Texts compared by log-probability: the first one's share of all, or whether it is the likeliest by token."""
        tokenizer, system, work = self.stacks.base.tokenizer, SystemTurn(*stage.inputs["system"]), stage.work
        said = [
            (f"a text of {row}", text, stage.slot)
            for row, user in work["items"]
            for text in (user, *work["choices"][row])
        ]
        require_plain_text(said, tokenizer)
        items = []
        for row, user in work["items"]:
            texts = work["choices"][row]
            rows = [tokenizer.training_ids(system, user, text, 2**30, ended=False) for text in texts]
            prompt, answers = rows[0].ids[: rows[0].loss_from], tuple(one.ids[one.loss_from :] for one in rows)
            items.append(TextItem(prompt, answers, (0,) * len(texts), tuple(map(len, texts))))
        self._tick(lease, Progress(stage.slot, 0, len(items), "questions"))
        with self.stacks.live_stack(stage) as proof:
            results = score_texts(self.stacks.base, items, self._recipe.eval.batch_tok, self._on_halved)
        scores = []
        for (row, _), item, result in zip(work["items"], items, results, strict=True):
            per_tok = [value / len(ids) for value, ids in zip(result.logprobs, item.choices, strict=True)]
            if stage.inputs["choice_score"] == "best":
                value = float(per_tok[0] > max(per_tok[1:]))
            else:
                value = 1.0 / sum(math.exp(min(700.0, other - result.logprobs[0])) for other in result.logprobs)
            detail = {
                "logprobs": [round(one, 6) for one in result.logprobs],
                "per_tok": [round(one, 6) for one in per_tok],
            }
            scores.append(Score(row, 0, "rate", value, None, detail))
        n_tok = sum(len(item.prompt) + sum(map(len, item.choices)) for item in items)
        return Outcome({"n": len(scores), **proof}, {"scored_tok": n_tok}, scores=scores)

    def _score(self, stage: Stage, lease: Lease) -> Outcome:
        rule = stage.work["rule"]
        scores = []
        for completed in self._store.samples(stage.needs["eval"].key):
            value, phrase = rule.score(completed.completion)
            scores.append(Score(completed.row, completed.sample, "rate", value, None, {"phrase": phrase}))
        return Outcome({"n": len(scores)}, scores=scores)

    def _measure(self, stage: Stage, lease: Lease) -> Outcome:
        """A measure of the snapshot that is live, or of the base."""
        with self.stacks.live_stack(stage) as proof:
            measured = SNAPSHOT_COMPUTE[stage.kind](
                self.stacks.base,
                stage.inputs,
                [user for _, user in stage.work["items"]],
                self._recipe.eval.batch_tok,
                lambda n_prompts: self._tick(lease, Progress(stage.slot, 0, n_prompts, "prompts")),
                self._on_halved,
            )
        return Outcome({**measured.outputs, **proof}, measured.facts, scores=measured.scores)

    def judge(self, prompts: Sequence[Prompt]) -> list[LocalReply]:
        """Judge with the bare base: log-probabilities (nats) of each prompt's characters, normalized over these alone.

        One forward pass per prompt; the common prefix of prompts (the rubric) is computed once. The reply's text holds
        the probability mass of these characters over the whole vocabulary. A control token that a judged text spells is
        read as its characters. Raises Interrupted when the user stops.
        """
        if self._stop():
            raise stopped("judge")
        items = {place: item for place, prompt in enumerate(prompts) if (item := self._judge_item(prompt)) is not None}
        try:
            with memory_errors("judge"), self.stacks.stack.live():
                results = score_letters(self.stacks.base, list(items.values()), self._recipe.eval.batch_tok)
        except TrainingError as error:
            raise JudgeError(
                error.what, where="judge", fix="lower judge.max_judged_chars, or free the device"
            ) from None
        replies = [LocalReply("", {})] * len(prompts)  # no reply, where there was nothing that could be asked
        for place, result in zip(items, results, strict=True):
            characters, mass = prompts[place][2], max(result.mass, 1e-300)
            shares = {c: round(value - math.log(mass), 6) for c, value in zip(characters, result.logprobs, strict=True)}
            replies[place] = LocalReply(f"{characters[result.predicted]} (mass {result.mass:.3g})", shares)
        return replies

    def _judge_item(self, prompt: Prompt) -> LetterItem | None:
        """A prompt to judge as tokens, or None if a control token in it can be written in no other way."""
        tokenizer, (system, user, characters) = self.stacks.base.tokenizer, prompt
        try:
            text = tokenizer.prompt_text(SystemTurn("text", system), user)
            return letter_item(tokenizer, text, list(characters), (system, user))
        except TemplateError:
            if tokenizer.control_token_in(user):
                return None
            raise

    # --- rows ------------------------------------------------------------------------------------------

    def _rows(self, stage: Stage, lease: Lease) -> Outcome:
        answers = {persona: {s.row: s for s in self._store.samples(need.key)} for persona, need in stage.needs.items()}
        rows = []
        for row in stage.work["rows"]:
            if row.completion is None:
                answer = answers[row.answers_as][row.prompt_id]
                row = row.answered(answer.completion, ended=answer.ended)
            rows.append(row.record(self._graph.personas))
        return Outcome({"rows": self._store.put_json(rows), "n": len(rows)})

    # --- small things ----------------------------------------------------------------------------------

    def _tick(self, lease: Lease, progress: Progress) -> None:
        note_progress(lease, progress)
        self._tell(progress)
        if self._stop():
            raise stopped(progress.slot)
