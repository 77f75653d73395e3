"""Judgements and the money they cost, as plain data: what the judging wing hands to its ledger and gets back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
class Batch:
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
