"""Claude at once: one request per judgement, every HTTP attempt booked before it leaves.

The SDK retries by itself; a middleware under its retry loop sees each attempt, so an attempt that was refused (429,
529) is freed, and one whose answer was lost on the way (timeout, reset) stays booked, as it may have been billed.
"""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastconv.store.judgements import Judgement, Refusal, Reserve, Settle, Unpaid
from fastconv.judge.budget import Price, worst_usd
from fastconv.judge.claude import ApiKey, concluded, explained, make_client, reply_of
from fastconv.judge.commit import LoopLedger
from fastconv.judge.request import JudgeRequest
from fastconv.recipe import JudgeSettings

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic


class Refused(Exception):
    """A sending that the ledger did not allow."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal: Refusal = refusal


@dataclass(frozen=True)
class Judged:
    """A judgement, and the future that is done when the ledger has it."""

    judgement: Judgement
    written: asyncio.Future[Any]


@dataclass
class _Meter:
    """The booking of the attempt under way; lives as long as one call of the SDK."""

    key: str
    worst_usd: float
    ticket: int | None = None


class LiveJudge:
    """Asks Claude through the Messages API. Use inside one event loop."""

    def __init__(self, settings: JudgeSettings, ledger: LoopLedger, price: Price, key: ApiKey) -> None:
        self._settings = settings
        self._ledger = ledger
        self._price = price
        self._key = key
        self._meter: ContextVar[_Meter | None] = ContextVar("meter", default=None)
        self._client: AsyncAnthropic = make_client(settings, key, self._metered)

    async def judge(self, request: JudgeRequest, n_unread: int) -> Judged | Refusal:
        """Judge one request to its end, re-asking once where its reply cannot be read.

        `n_unread` is how many unreadable replies the ledger already holds for it.
        Gives the judgement and when it is on disk, or the ledger's refusal: over budget, held by another process, or done already. Raises
        Outage if the judge cannot be reached now, JudgeError if asking on makes no sense, StoreError.
        """
        from anthropic import APIError

        while True:
            meter = _Meter(request.key, worst_usd(request, self._price))
            self._meter.set(meter)
            began = time.monotonic()
            try:
                raw = await self._client.messages.with_raw_response.create(**request.body(re_ask=n_unread > 0))
            except Refused as refused:
                return refused.refusal
            except APIError as error:
                raise explained(error, self._settings, self._key) from None
            reply = reply_of(
                raw.http_response.text, self._price, transport="live", key=self._key, worst=meter.worst_usd
            )
            reply, final = concluded(request, replace(reply, latency_s=time.monotonic() - began), n_unread)
            assert meter.ticket is not None, "an attempt left without a booking"
            # Not waited for: the booking of the next request is posted behind it and shares its commit.
            written = self._ledger.post(Settle(meter.ticket, request.key, reply, final))
            if final is not None:
                return Judged(final, written)
            n_unread += 1

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _metered(self, request: Any, call_next: Any) -> Any:
        """Book an attempt, send it, and free or keep the booking by how it ended."""
        from anthropic import APIConnectionError

        meter = self._meter.get()
        if meter is None:
            return await call_next(request)
        booked = await self._ledger.do(Reserve(meter.key, meter.worst_usd))
        if not isinstance(booked, int):
            raise Refused(booked or "held")
        meter.ticket = booked
        try:
            response = await call_next(request)
        except APIConnectionError:
            await self._ledger.do(Unpaid(booked, "lost"))
            raise
        if response.status_code >= 400:
            await self._ledger.do(Unpaid(booked, "refused"))
        return response
