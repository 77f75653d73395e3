"""The server beside the run: what a stage asks goes to it, and the stage is committed when its completions are there.

Meanwhile the next stage is computed: one cell's completions are drawn while the next adapter is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastconv.chat import ChatTokenizer, SystemTurn
from fastconv.recipe import SamplingSettings
from fastconv.seeding import seed_of
from fastconv.store.ledger import Lease, Store
from fastconv.store.records import Sample, Stage

if TYPE_CHECKING:
    from fastconv.engine.generate import Completion
    from fastconv.run.executor import Executor, Outcome, PendingStage


@dataclass(frozen=True)
class SamplingStatus:
    """Slots of the stages at the server, the tokens drawn for them, and the most that can be."""

    slots: tuple[str, ...] = ()
    n_tok: int = 0
    most_tok: int = 0


@dataclass(frozen=True)
class _AtServer:
    stage: Stage
    begun: PendingStage
    lease: Lease
    held: ExitStack


class SamplingQueue:
    """Stages whose completions a server draws, each under its lease until it is committed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._at_server: dict[str, _AtServer] = {}

    def submit(self, stage: Stage, engine: Executor) -> None:
        """Hand a stage to the server. Raises what beginning it raises; nothing is held then."""
        with ExitStack() as held:
            lease = held.enter_context(self._store.lease(stage))
            begun = engine.begin(stage, lease)
            self._at_server[stage.key] = _AtServer(stage, begun, lease, held.pop_all())

    @property
    def keys(self) -> Collection[str]:
        """Of the stages at the server."""
        return self._at_server.keys()

    @property
    def status(self) -> SamplingStatus:
        """Where drawing stands."""
        there = self._at_server.values()
        return SamplingStatus(
            tuple(one.stage.slot for one in there),
            sum(one.begun.drawing.n_tok for one in there),
            sum(one.begun.asked.most_tok for one in there),
        )

    def note(self) -> None:
        """Tell other terminals how far each stage is."""
        for one in self._at_server.values():
            one.lease.note({"done": one.begun.drawing.n_tok, "total": one.begun.asked.most_tok, "unit": "tok"})

    def take(self) -> Iterator[tuple[Stage, float]]:
        """Commit what is drawn; each stage with its seconds. Raises SamplerError if drawing one of them failed."""
        for one in [one for one in self._at_server.values() if one.begun.drawing.done]:
            outcome, seconds = one.begun.outcome(), one.begun.drawing.seconds
            commit(self._store, one.stage, outcome, seconds)
            del self._at_server[one.stage.key]
            one.held.close()
            yield one.stage, seconds

    def close(self) -> None:
        """Let go of every stage. The caller has taken what it wants; the rest is drawn again by the next run."""
        while self._at_server:
            self._at_server.popitem()[1].held.close()


def commit(store: Store, stage: Stage, outcome: Outcome, seconds: float) -> None:
    """Write down what computing a stage gave."""
    store.commit(
        stage,
        outputs=outcome.outputs,
        facts=outcome.facts,
        seconds=seconds,
        samples=outcome.samples,
        scores=outcome.scores,
    )


@dataclass(frozen=True)
class SamplingRequests:
    """Every prompt of a stage in order: (row, user text, sample index), its token ids and its seed."""

    persona: str
    items: tuple[tuple[str, str, int], ...]
    prompts: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]
    settings: SamplingSettings

    @property
    def prompt_tok(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def most_tok(self) -> int:
        """As many tokens as can be drawn at most."""
        return len(self.items) * self.settings.max_new_tok

    def samples(self, drawn: Sequence[Completion], tokenizer: ChatTokenizer) -> list[Sample]:
        """The completions, one for each item in order, as the ledger keeps them."""
        return [
            Sample(row, i, self.persona, user, tokenizer.decode(one.ids), len(one.ids) + one.ended, one.ended)
            for (row, user, i), one in zip(self.items, drawn, strict=True)
        ]


def is_drawn(stage: Stage) -> bool:
    """Whether computing this stage is drawing completions."""
    return "sampling" in stage.inputs


def sampling_requests(stage: Stage, tokenizer: ChatTokenizer) -> SamplingRequests:
    """What a stage asks: each of its texts `per_prompt` times. Seeds depend on the item alone, so epochs are paired."""
    system, persona = _system(stage), stage.inputs["persona"] if stage.kind == "answers" else stage.work["probe"]
    items = tuple((row, user, i) for row, user in _texts(stage) for i in range(stage.inputs["per_prompt"]))
    return SamplingRequests(
        persona,
        items,
        tuple(tuple(tokenizer.prompt_ids(system, user)) for _, user, _ in items),
        tuple(seed_of("sample", stage.inputs["seed"], row, i) for row, _, i in items),
        SamplingSettings.model_validate(stage.inputs["sampling"]),
    )


def longest_tok(stages: Sequence[Stage], tokenizer: ChatTokenizer) -> int:
    """Tokens of the longest prompt with its completion over stages that are drawn."""
    longest: dict[tuple[str, ...], int] = {}
    for stage in stages:
        asked = (stage.inputs["prompts_sha256"], *stage.inputs["system"])
        if asked not in longest:
            longest[asked] = max(len(tokenizer.prompt_ids(_system(stage), user)) for _, user in _texts(stage))
    return max(
        longest[stage.inputs["prompts_sha256"], *stage.inputs["system"]] + stage.inputs["sampling"]["max_new_tok"]
        for stage in stages
    )


def _texts(stage: Stage) -> Sequence[tuple[str, str]]:
    """(row, user text) of everything asked."""
    return stage.work["prompts"] if stage.kind == "answers" else stage.work["items"]


def _system(stage: Stage) -> SystemTurn:
    return SystemTurn(*stage.inputs["system"])
