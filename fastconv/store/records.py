"""What the ledger holds: a stage and its result, samples and scores. Plain data, no storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

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


#: Money is kept in whole billionths of a dollar, so that sums are exact.
NUSD = 1_000_000_000
#: Ends of a sending that brought no reply and cost nothing, and count towards the limit of resubmissions.
FAILURES = ("expired", "errored", "canceled", "missing")

Refusal = Literal["over budget", "held", "done"]


@dataclass(frozen=True)
class Reserve:
    """Book the worst case of one sending. Gives a ticket, or why not."""

    key: str
    usd: float


@dataclass(frozen=True)
class RawReply:
    """What a judge sent back, as it came. `usage` in tokens; `fault` says why it could not be read, if so."""

    transport: str
    model: str
    text: str
    stop_reason: str
    usage: Mapping[str, Any]
    cost_usd: float
    latency_s: float | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Judgement:
    """A finished judgement: `values` by measure and the whole `answer`, or None and the reason."""

    key: str
    rubric_sha256: str
    model: str
    sample: int
    values: Mapping[str, float] | None
    answer: Mapping[str, Any]
    reason: str | None = None


@dataclass(frozen=True)
class Settle:
    """Write a reply down and put its cost in place of its booking; `final` ends the judgement."""

    ticket: int
    key: str
    reply: RawReply
    final: Judgement | None


@dataclass(frozen=True)
class Unpaid:
    """End a booking without a reply. `lost` and `missing` stay booked (they may have been billed), the rest is freed."""

    ticket: int
    outcome: str
    final: Judgement | None = None


Operation = Reserve | Settle | Unpaid


@dataclass(frozen=True)
class Money:
    """Where the judging budget stands, in US dollars. `lost` was booked for replies that never arrived."""

    spent_usd: float
    reserved_usd: float
    lost_usd: float
    cap_usd: float | None

    @property
    def left_usd(self) -> float | None:
        """What may still be booked; None without a cap."""
        if self.cap_usd is None:
            return None
        return max(0.0, self.cap_usd - self.spent_usd - self.reserved_usd - self.lost_usd)


@dataclass(frozen=True)
class BatchItem:
    """One booked item of a batch; its custom id carries the key's digest and the ticket."""

    ticket: int
    key: str
    custom_id: str
    state: str
    usd: float


@dataclass(frozen=True)
class JudgeBatch:
    """A batch as the ledger knows it: `intended` (perhaps sent), `sent`, `done` or `void`."""

    intent: str
    batch: str | None
    state: str
    n: int
    holder: str
    made_at: float


@dataclass(frozen=True)
class History:
    """What was tried for a key: replies that could not be read, and sendings that failed without one."""

    n_unread: int
    n_failed: int
