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

from fastconv.errors import StoreError
from fastconv.judging.budget import Price, worst_usd
from fastconv.judging.client import ApiKey, concluded, explained, make_client, reply_of
from fastconv.judging.request import JudgeRequest
from fastconv.recipe import JudgeSettings
from fastconv.store_judging import (
    JudgeLedger,
    Judgement,
    Operation,
    Refusal,
    Reserve,
    Settle,
    Unpaid,
)

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic

#: Writes of this window share one commit: an fsync per judgement would be most of its cost.
_COMMIT_WINDOW_S = 0.004


class GroupCommit:
    """Joins the ledger writes of many tasks into few transactions. For one event loop."""

    def __init__(self, ledger: JudgeLedger) -> None:
        self._ledger = ledger
        self._waiting: list[tuple[Operation, asyncio.Future[Any]]] = []

    async def do(self, operation: Operation) -> int | Refusal | None:
        """Do one operation; returns when it is on disk."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((operation, done))
        if len(self._waiting) == 1:
            loop.call_later(_COMMIT_WINDOW_S, self.flush)
        # Shielded: a cancelled task must not take back an operation that others' commit already holds.
        return await asyncio.shield(done)

    def flush(self) -> None:
        """Write what is waiting, now."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        try:
            results = self._ledger.apply([operation for operation, _ in waiting])
        except StoreError as error:
            for _, done in waiting:
                done.set_exception(error)
            return
        for (_, done), result in zip(waiting, results, strict=True):
            done.set_result(result)


class Refused(Exception):
    """A sending that the ledger did not allow."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal: Refusal = refusal


@dataclass
class _Meter:
    """The booking of the attempt under way; lives as long as one call of the SDK."""

    key: str
    worst_usd: float
    ticket: int | None = None


class LiveJudge:
    """Asks Claude through the Messages API. Use inside one event loop."""

    def __init__(self, settings: JudgeSettings, ledger: JudgeLedger, price: Price, key: ApiKey) -> None:
        self._settings = settings
        self._ledger = ledger
        self._commit = GroupCommit(ledger)
        self._price = price
        self._key = key
        self._meter: ContextVar[_Meter | None] = ContextVar("meter", default=None)
        self._client: AsyncAnthropic = make_client(settings, key, self._metered)

    async def judge(self, request: JudgeRequest) -> Judgement | Refusal:
        """Judge one request to its end, re-asking once where its reply cannot be read.

        Gives the judgement, or the ledger's refusal: over budget, held by another process, or done already. Raises
        Outage if the judge cannot be reached now, JudgeError if asking on makes no sense, StoreError.
        """
        from anthropic import APIError

        while True:
            n_unread = self._ledger.history(request.key).n_unread
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
            await self._commit.do(Settle(meter.ticket, request.key, reply, final))
            if final is not None:
                return final

    async def check(self) -> None:
        """Ask for the model's card, which costs nothing. Raises JudgeError or Outage with one clear line."""
        from anthropic import APIError

        try:
            await self._client.with_options(max_retries=1).models.retrieve(self._settings.model)
        except APIError as error:
            raise explained(error, self._settings, self._key) from None

    async def close(self) -> None:
        """Close the connections."""
        self._commit.flush()
        await self._client.close()

    async def _metered(self, request: Any, call_next: Any) -> Any:
        """Book an attempt, send it, and free or keep the booking by how it ended."""
        from anthropic import APIConnectionError

        meter = self._meter.get()
        if meter is None:
            return await call_next(request)
        booked = await self._commit.do(Reserve(meter.key, meter.worst_usd))
        if not isinstance(booked, int):
            raise Refused(booked or "held")
        meter.ticket = booked
        try:
            response = await call_next(request)
        except (APIConnectionError, asyncio.CancelledError):
            # Written at once, not in the shared commit: a cancelled task cannot wait.
            self._ledger.apply([Unpaid(booked, "lost")])
            raise
        if response.status_code >= 400:
            await self._commit.do(Unpaid(booked, "refused"))
        return response
