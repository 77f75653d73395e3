"""What the ledger holds: a stage and its result, samples and scores. Plain data, no storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastconv.recipe import canonical_json, sha256_of


@dataclass(frozen=True)
class Stage:
    """One unit of work: what it is and everything that its result depends on.

    `slot` is the human name, the same across recipes, so that a changed input can be shown as a reason.
    `inputs` holds settings, data hashes and, under `needs`, the keys of the stages before it. `work` is what computing
    it takes at hand (prompts, rows): content that `inputs` already names by sha256, so it is no part of the key.
    """

    kind: str
    slot: str
    version: int
    inputs: Mapping[str, Any]
    needs: Mapping[str, Stage] = field(default_factory=dict)
    work: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def full_inputs(self) -> dict[str, Any]:
        """Settings plus the keys of the stages before this one."""
        return {**self.inputs, "needs": {name: stage.key for name, stage in self.needs.items()}}

    @cached_property
    def key(self) -> str:
        """sha256 over kind, version and inputs; equal keys are equal results."""
        return sha256_of({"kind": self.kind, "version": self.version, "inputs": self.full_inputs})


@dataclass(frozen=True)
class Record:
    """A finished stage as the ledger holds it; `facts` are for people (tokens, device) and never identity."""

    key: str
    kind: str
    slot: str
    version: int
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    facts: Mapping[str, Any]
    seconds: float
    finished_at: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One drawn completion; `ended` tells whether the end of turn was reached."""

    row: str
    sample: int
    persona: str
    prompt: str
    completion: str
    n_tok: int
    ended: bool


@dataclass(frozen=True, slots=True)
class Score:
    """One measured value of one sample, or the reason why there is none."""

    row: str
    sample: int
    metric: str
    value: float | None
    reason: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why a stage could not be finished when it was last tried; `exit_code` is its error's."""

    slot: str
    exit_code: int
    reason: str
    failed_at: float


def changed_inputs(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the leaves that differ, as `name: old -> new`; used for `stale because`."""
    changes: list[str] = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes += changed_inputs(old, new, f"{prefix}{name}.")
        else:
            changes.append(f"{prefix}{name}: {_short(old)} -> {_short(new)}")
    return changes


def _short(value: object) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    return text if len(text) <= 24 else f"{text[:10]}…"
