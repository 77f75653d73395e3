"""What a stage asks of whoever draws completions, and the samples that its answers make. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastconv.seeding import seed_of
from fastconv.recipe import SamplingSettings
from fastconv.store.records import Sample, Stage
from fastconv.chat import ChatTokenizer, SystemTurn

if TYPE_CHECKING:
    from fastconv.engine.generate import Drawn


@dataclass(frozen=True)
class Asked:
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

    def samples(self, drawn: Sequence[Drawn], tokenizer: ChatTokenizer) -> list[Sample]:
        """The completions, one for each item in order, as the ledger keeps them."""
        return [
            Sample(row, i, self.persona, user, tokenizer.decode(one.ids), len(one.ids) + one.ended, one.ended)
            for (row, user, i), one in zip(self.items, drawn, strict=True)
        ]


def is_drawn(stage: Stage) -> bool:
    """Whether computing this stage is drawing completions."""
    return "sampling" in stage.inputs


def asked_of(stage: Stage, tokenizer: ChatTokenizer) -> Asked:
    """What a stage asks: each of its texts `per_prompt` times. Seeds depend on the item alone, so epochs are paired."""
    system, persona = _system(stage), stage.inputs["persona"] if stage.kind == "answers" else stage.work["probe"]
    items = tuple((row, user, i) for row, user in _texts(stage) for i in range(stage.inputs["per_prompt"]))
    return Asked(
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
