"""The records that the ledger holds, as plain data without storage.

First those of a run (stages with their results, samples, scores, failures), then those of judging (bookings of money,
raw replies, judgements, batches).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from fastconv.recipe import canonical_json, sha256_of

#: Money is counted in whole billionths of a US dollar, so that sums are exact.
NUSD = 1_000_000_000
#: Outcomes of a sending that brought no reply, cost nothing, and count towards the limit of resubmissions.
FAILURES = ("expired", "errored", "canceled", "missing")

#: The tables of a run; those of judging stand with `judge_ledger`.
LEDGER_SCHEMA = """
CREATE TABLE IF NOT EXISTS stages(
  key TEXT PRIMARY KEY, kind TEXT NOT NULL, slot TEXT NOT NULL, version INTEGER NOT NULL, inputs TEXT NOT NULL,
  outputs TEXT NOT NULL, facts TEXT NOT NULL, seconds REAL NOT NULL, finished_at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS stages_by_slot ON stages(slot, finished_at);
CREATE TABLE IF NOT EXISTS artefacts(sha256 TEXT PRIMARY KEY, suffix TEXT NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS samples(
  stage TEXT NOT NULL, row TEXT NOT NULL, sample INTEGER NOT NULL, persona TEXT NOT NULL, prompt TEXT NOT NULL,
  completion TEXT NOT NULL, n_tok INTEGER NOT NULL, ended INTEGER NOT NULL, PRIMARY KEY(stage, row, sample)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores(
  stage TEXT NOT NULL, row TEXT NOT NULL, sample INTEGER NOT NULL, metric TEXT NOT NULL, value REAL, reason TEXT,
  detail TEXT NOT NULL, PRIMARY KEY(stage, row, sample, metric),
  CHECK ((value IS NULL) = (reason IS NOT NULL))) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases(
  key TEXT PRIMARY KEY, slot TEXT NOT NULL, pid INTEGER NOT NULL, host TEXT NOT NULL, token TEXT NOT NULL,
  heartbeat REAL NOT NULL, note TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS progress(key TEXT PRIMARY KEY, step INTEGER NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs(
  id TEXT PRIMARY KEY, recipe TEXT NOT NULL, recipe_sha256 TEXT NOT NULL, source TEXT NOT NULL,
  started_at REAL NOT NULL, finished_at REAL, facts TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS run_stages(
  run TEXT NOT NULL, key TEXT NOT NULL, slot TEXT NOT NULL, reused INTEGER NOT NULL, PRIMARY KEY(run, slot));
CREATE TABLE IF NOT EXISTS verdicts(
  run TEXT NOT NULL, gate TEXT NOT NULL, subject TEXT NOT NULL, verdict TEXT NOT NULL, body TEXT NOT NULL,
  decided_at REAL NOT NULL, PRIMARY KEY(run, gate, subject));
CREATE TABLE IF NOT EXISTS failures(
  key TEXT PRIMARY KEY, slot TEXT NOT NULL, exit_code INTEGER NOT NULL, reason TEXT NOT NULL, failed_at REAL NOT NULL);
"""

Refusal = Literal["over budget", "held", "done"]


# --- runs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One unit of work with everything that its result depends on.

    `slot` is a readable name, the same across recipes, so that a changed input can be shown as the reason why a stage
    is stale. `inputs` holds settings and data hashes; `needs` the stages before it by name. `work` is the content to
    compute with (prompts, rows); `inputs` already names it by sha256, so it is no part of the key.
    """

    kind: str
    slot: str
    version: int
    inputs: Mapping[str, Any]
    needs: Mapping[str, Stage] = field(default_factory=dict)
    work: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def full_inputs(self) -> dict[str, Any]:
        """`inputs` plus the keys of the stages before this one under `needs`."""
        return {**self.inputs, "needs": {name: stage.key for name, stage in self.needs.items()}}

    @cached_property
    def key(self) -> str:
        """sha256 (hex) over kind, version and full inputs; equal keys mean equal results."""
        return sha256_of({"kind": self.kind, "version": self.version, "inputs": self.full_inputs})


@dataclass(frozen=True)
class Record:
    """A finished stage. `facts` are for readers (tokens, device) and never part of its identity.

    `seconds` is its wall time, `finished_at` in seconds since the epoch.
    """

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
    """One sampled completion of `n_tok` tokens; `ended` says whether the end of turn was reached."""

    row: str
    sample: int
    persona: str
    prompt: str
    completion: str
    n_tok: int
    ended: bool


@dataclass(frozen=True, slots=True)
class Score:
    """One metric's value for one sample, or None and the reason why there is none."""

    row: str
    sample: int
    metric: str
    value: float | None
    reason: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why a stage failed when it was last tried, with the exit code of its error; `failed_at` in seconds since the epoch."""

    slot: str
    exit_code: int
    reason: str
    failed_at: float


def changed_inputs(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The leaves that differ, as `name: old -> new`; the reason why a stage is stale."""
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


# --- judging -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reserve:
    """Operation: book the worst-case cost of one sending in US dollars. Its result is a ticket or a Refusal."""

    key: str
    usd: float


@dataclass(frozen=True)
class RawReply:
    """A judge's reply as received. `usage` is in tokens; `fault` says why it could not be parsed, if so."""

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
    """A finished judgement: `values` by measure and the parsed `answer`, or None and the reason."""

    key: str
    rubric_sha256: str
    model: str
    sample: int
    values: Mapping[str, float] | None
    answer: Mapping[str, Any]
    reason: str | None = None


@dataclass(frozen=True)
class Settle:
    """Operation: record a reply and replace the booking by its cost; `final` is the judgement that it completes."""

    ticket: int
    key: str
    reply: RawReply
    final: Judgement | None


@dataclass(frozen=True)
class Unpaid:
    """Operation: end a booking without a reply.

    With outcome `lost` or `missing` the money stays booked (it may have been billed), otherwise it is freed.
    """

    ticket: int
    outcome: str
    final: Judgement | None = None


Operation = Reserve | Settle | Unpaid


@dataclass(frozen=True)
class Money:
    """State of the judging budget in US dollars. `lost` was booked for replies that never arrived."""

    spent_usd: float
    reserved_usd: float
    lost_usd: float
    cap_usd: float | None

    @property
    def left_usd(self) -> float | None:
        """US dollars that may still be booked; None without a cap."""
        if self.cap_usd is None:
            return None
        return max(0.0, self.cap_usd - self.spent_usd - self.reserved_usd - self.lost_usd)


@dataclass(frozen=True)
class BatchItem:
    """One booked item of a batch; its custom id contains the start of the key and the ticket."""

    ticket: int
    key: str
    custom_id: str
    state: str
    usd: float


@dataclass(frozen=True)
class JudgeBatch:
    """A batch of `n` items. `state` is `intended` (perhaps sent), `sent`, `done` or `void`."""

    intent: str
    batch: str | None
    state: str
    n: int
    holder: str
    made_at: float
