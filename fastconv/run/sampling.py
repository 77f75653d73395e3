"""Sampling requests of a stage, and the queue of stages whose completions a vLLM server is sampling.

`sampling_requests` lists the prompts, token ids and seeds of a stage. While the server samples the completions of a
queued stage, the process goes on with the next stage: one cell is sampled while the next adapter is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastconv.chat import ChatTokenizer, SystemTurn
from fastconv.recipe import SamplingSettings, canonical_json
from fastconv.seeding import seed_of
from fastconv.store.ledger import Lease, Store
from fastconv.store.records import Sample, Stage

if TYPE_CHECKING:
    from fastconv.engine.generate import Completion
    from fastconv.run.executor import Executor, Outcome, PendingStage


@dataclass(frozen=True)
class Progress:
    """Progress of a stage: `done` of `total` `unit`s, and the last loss while training.

    `each` has (name, step, loss) of every run that was trained in the same step.
    """

    slot: str
    done: int
    total: int
    unit: str
    loss: float | None = None
    each: tuple[tuple[str, int, float | None], ...] = ()


def note_progress(lease: Lease, progress: Progress) -> None:
    """Write a stage's progress to its lease, where `fastconv status` reads it."""
    lease.note({"done": progress.done, "total": progress.total, "unit": progress.unit, "loss": progress.loss})


@dataclass(frozen=True)
class SamplingRequests:
    """Every prompt of a stage, in order: `items` are (row, user text, sample index), with token ids and seeds."""

    persona: str
    items: tuple[tuple[str, str, int], ...]
    prompts: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]
    settings: SamplingSettings

    @property
    def prompt_tok(self) -> int:
        """Number of tokens in all prompts."""
        return sum(map(len, self.prompts))

    @property
    def max_tok(self) -> int:
        """Upper bound of the sampled tokens."""
        return len(self.items) * self.settings.max_new_tok

    def samples(self, completions: Sequence[Completion], tokenizer: ChatTokenizer) -> list[Sample]:
        """Samples for the ledger from one completion per item, in order."""
        return [
            Sample(
                row, i, self.persona, user, tokenizer.answer_text(drawn.ids), len(drawn.ids) + drawn.ended, drawn.ended
            )
            for (row, user, i), drawn in zip(self.items, completions, strict=True)
        ]


def is_sampled(stage: Stage) -> bool:
    """Whether this stage is computed by sampling completions."""
    return "sampling" in stage.inputs


def sampling_requests(stage: Stage, tokenizer: ChatTokenizer) -> SamplingRequests:
    """The prompts of a stage, each text `per_prompt` times. Seeds depend on the item only, so that epochs are paired."""
    system, persona = _system(stage), stage.inputs["persona"] if stage.kind == "answers" else stage.work["probe"]
    items = tuple((row, user, i) for row, user in _texts(stage) for i in range(stage.inputs["per_prompt"]))
    ids = {user: tuple(tokenizer.prompt_ids(system, user)) for user in dict.fromkeys(user for _, user in _texts(stage))}
    return SamplingRequests(
        persona,
        items,
        tuple(ids[user] for _, user, _ in items),
        tuple(seed_of("sample", stage.inputs["seed"], row, i) for row, _, i in items),
        SamplingSettings.model_validate(stage.inputs["sampling"]),
    )


def in_one_pass(stage: Stage) -> Hashable:
    """What stages must share for their completions to be sampled together: the stack, and the sampling settings."""
    stack = tuple(need.key for need in stage.needs.values())
    return is_sampled(stage), stage.kind == "answers", stack, canonical_json(stage.inputs.get("sampling"))


def max_sequence_tok(stages: Sequence[Stage], tokenizer: ChatTokenizer) -> int:
    """Upper bound of the tokens of one prompt and its completion, over sampled stages."""
    longest: dict[tuple[str, ...], int] = {}
    for stage in stages:
        prompts = (stage.inputs["prompts_sha256"], *stage.inputs["system"])
        if prompts not in longest:
            longest[prompts] = max(len(tokenizer.prompt_ids(_system(stage), user)) for _, user in _texts(stage))
    return max(
        longest[stage.inputs["prompts_sha256"], *stage.inputs["system"]] + stage.inputs["sampling"]["max_new_tok"]
        for stage in stages
    )


def _texts(stage: Stage) -> Sequence[tuple[str, str]]:
    """(row, user text) of every prompt of a stage."""
    return stage.work["prompts"] if stage.kind == "answers" else stage.work["items"]


def _system(stage: Stage) -> SystemTurn:
    return SystemTurn(*stage.inputs["system"])


@dataclass(frozen=True)
class SamplingStatus:
    """Slots of the stages at the server, the tokens sampled for them so far, and the upper bound of these tokens."""

    slots: tuple[str, ...] = ()
    n_tok: int = 0
    max_tok: int = 0


@dataclass(frozen=True)
class _QueuedStage:
    stage: Stage
    pending: PendingStage
    lease: Lease
    resources: ExitStack


class SamplingQueue:
    """Stages whose completions the server is sampling, each under its lease until it is committed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._queued: dict[str, _QueuedStage] = {}

    def submit(self, stage: Stage, engine: Executor) -> None:
        """Start sampling a stage. Raises what `Executor.begin` raises; the lease is released then."""
        with ExitStack() as resources:
            lease = resources.enter_context(self._store.lease(stage))
            pending = engine.begin(stage, lease)
            self._queued[stage.key] = _QueuedStage(stage, pending, lease, resources.pop_all())

    @property
    def keys(self) -> Collection[str]:
        """Keys of the queued stages."""
        return self._queued.keys()

    @property
    def status(self) -> SamplingStatus:
        """Progress of the queued stages."""
        queued = self._queued.values()
        return SamplingStatus(
            tuple(entry.stage.slot for entry in queued),
            sum(entry.pending.completions.n_tok for entry in queued),
            sum(entry.pending.requests.max_tok for entry in queued),
        )

    def note_progress(self) -> None:
        """Write each stage's progress to its lease, where `fastconv status` reads it."""
        for entry in self._queued.values():
            n_tok, max_tok = entry.pending.completions.n_tok, entry.pending.requests.max_tok
            entry.lease.note({"done": n_tok, "total": max_tok, "unit": "tok"})

    def wait(self, timeout_s: float) -> None:
        """Block until a queued stage is sampled or has failed, at most `timeout_s` seconds."""
        wait([entry.pending.completions.future for entry in self._queued.values()], timeout_s, FIRST_COMPLETED)

    def take(self) -> Iterator[tuple[Stage, float]]:
        """Commit the finished stages; yields each with its seconds. Raises SamplerError if sampling one of them failed."""
        for entry in [entry for entry in self._queued.values() if entry.pending.completions.done]:
            outcome, seconds = entry.pending.outcome(), entry.pending.completions.seconds
            commit_outcome(self._store, entry.stage, outcome, seconds)
            del self._queued[entry.stage.key]
            entry.resources.close()
            yield entry.stage, seconds

    def close(self) -> None:
        """Release the leases of all queued stages; the next run samples them again."""
        while self._queued:
            self._queued.popitem()[1].resources.close()


def commit_outcome(store: Store, stage: Stage, outcome: Outcome, seconds: float) -> None:
    """Commit the outcome of a stage that took `seconds`."""
    store.commit(
        stage,
        outputs=outcome.outputs,
        facts=outcome.facts,
        seconds=seconds,
        samples=outcome.samples,
        scores=outcome.scores,
    )


def commit_together(store: Store, outcomes: Sequence[tuple[Stage, Outcome]], seconds: float) -> dict[str, float]:
    """Commit stages that were computed in one pass of `seconds`, all or none of them: a run that is killed between two
    would sample the others again in another batch, which rounds differently. Returns each one's seconds by key, its
    share by sampled tokens.
    """
    sampled = [max(1, int(outcome.facts.get("sampled_tok", 1))) for _, outcome in outcomes]
    shares = {stage.key: seconds * n / sum(sampled) for (stage, _), n in zip(outcomes, sampled, strict=True)}
    with store.transaction():
        for stage, outcome in outcomes:
            commit_outcome(store, stage, outcome, shares[stage.key])
    return shares
