"""How the judge is reached: the key that never shows, the SDK's client, and one clear line for every failure."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastconv.errors import JudgeError, StoreError
from fastconv.judge.budget import Price, cost_usd, worst_usd
from fastconv.judge.request import JudgeRequest
from fastconv.recipe import JudgeSettings
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store
from fastconv.store.records import Judgement, Operation, RawReply, Refusal, Reserve, Settle, Unpaid

if TYPE_CHECKING:
    from anthropic import APIError, AsyncAnthropic

CLAUDE_URL = "https://api.anthropic.com"
#: Sendings of one request by the SDK itself: 1 + this, waiting as the server asks.
SDK_RETRIES = 4
CLAUDE_KEY, LOCAL_KEY = "ANTHROPIC_API_KEY", "FASTCONV_LOCAL_KEY"
#: Longest piece of a server's message that is shown.
_SHOWN_CHARS = 200
#: A server that asks for a longer rest is asked again after this.
MAX_WAIT_S = 60.0


class ApiKey:
    """A key from the environment. It prints as hidden, and `scrub` takes it out of anything a server sent back."""

    def __init__(self, value: str) -> None:
        self._value = value

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], name: str = CLAUDE_KEY) -> ApiKey:
        """The key. Raises JudgeError if it is not set or cannot be one."""
        value = environ.get(name, "").strip()
        if not value:
            raise JudgeError("no API key", where=name, fix=f"set {name} in the environment (never in a recipe)")
        if not value.isascii() or not value.isprintable() or " " in value:
            raise JudgeError("the API key holds a character no key has", where=name, fix="copy the key again")
        return cls(value)

    def reveal(self) -> str:
        """The key itself, for the HTTP client alone."""
        return self._value

    def scrub(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self._value, "[key]")

    def cleaned(self, value: Any) -> Any:
        """A value read from JSON without the key in any of its strings: there it may have stood in escapes."""
        if isinstance(value, str):
            return self.scrub(value)
        if isinstance(value, list):
            return [self.cleaned(one) for one in value]
        if isinstance(value, dict):
            return {self.scrub(name): self.cleaned(one) for name, one in value.items()}
        return value

    def __repr__(self) -> str:
        return "ApiKey(hidden)"


class Outage(Exception):
    """The judge cannot be reached now; what was not judged stays pending. `wait_s` is how long it asked us to wait."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


def make_client(settings: JudgeSettings, key: ApiKey, middleware: Any = None) -> AsyncAnthropic:
    """The SDK's client for a recipe's judge. `middleware` sees every single HTTP attempt."""
    from anthropic import AsyncAnthropic

    return AsyncAnthropic(
        api_key=key.reveal(),
        base_url=settings.base_url or CLAUDE_URL,
        timeout=settings.timeout_s,
        max_retries=SDK_RETRIES,
        middleware=[middleware] if middleware else [],
    )


def explained(error: APIError, settings: JudgeSettings, key: ApiKey) -> JudgeError | Outage:
    """A failure that ends judging (JudgeError), or one that may pass (Outage). One line, without the key."""
    from anthropic import APIConnectionError, APIStatusError, APITimeoutError

    where = settings.base_url or CLAUDE_URL
    if isinstance(error, APITimeoutError):
        return Outage(f"no answer within {settings.timeout_s:g} s from {where}")
    if isinstance(error, APIConnectionError):
        return Outage(f"{where} cannot be reached")
    if not isinstance(error, APIStatusError):
        return Outage(f"{where} sent something that is no answer")
    wait_s = _asked_wait_s(error.response.headers)
    return explained_status(error.status_code, error.body, settings, key, wait_s)


def explained_status(
    code: int, body: object, settings: JudgeSettings, key: ApiKey, wait_s: float = 0.0
) -> JudgeError | Outage:
    """What an HTTP status other than success means; `body` is the server's answer, read if it is JSON."""
    where = settings.base_url or CLAUDE_URL
    said = key.scrub(" ".join(_message(body).split()))[:_SHOWN_CHARS]
    fixes = {
        401: ("the API key was refused", f"check {CLAUDE_KEY}"),
        403: ("the API key may not use this", f"check the rights of {CLAUDE_KEY}"),
        404: (f"the judge does not know model {settings.model!r}", "check judge.model and judge.base_url"),
        400: (f"the judge refused the request: {said}", "mend what it names, then run `fastconv judge`"),
        413: ("the request is too large for the judge", "lower judge.max_judged_chars"),
    }
    if code in fixes:
        what, fix = fixes[code]
        return JudgeError(what, where=where, fix=fix)
    return Outage(f"{where} answered {code}: {said}", wait_s)


def reply_of(body: str, price: Price, *, transport: str, key: ApiKey, worst: float, factor: float = 1.0) -> RawReply:
    """A reply from the body of a message, as raw as it came. What has no usage count is charged at its worst case."""
    body = key.scrub(body)
    try:
        message = key.cleaned(json.loads(body))
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or message.get("type") != "message":
        return RawReply(transport, "", body, "", {}, worst, fault="malformed")
    blocks = [block for block in message.get("content") or [] if isinstance(block, dict)]
    # Scrubbed once more: joined blocks could spell the key.
    text = key.scrub("".join(str(block.get("text", "")) for block in blocks if block.get("type") == "text"))
    usage = {name: n for name, n in (message.get("usage") or {}).items() if isinstance(n, int)}
    cost = cost_usd(usage, price, factor) if "output_tokens" in usage else worst
    stop = str(message.get("stop_reason") or "")
    return RawReply(transport, str(message.get("model", "")), text, stop, usage, cost)


def concluded(request: JudgeRequest, reply: RawReply, n_unread: int) -> tuple[RawReply, Judgement | None]:
    """What a reply means: itself with its fault, and the judgement unless the request is to be asked once more.

    A malformed, truncated or out-of-range reply is asked again once; the judge's own refusal is not.
    """
    reading = request.rubric.read(reply.text, reply.stop_reason) if reply.fault is None else None
    fault = reply.fault if reading is None else reading.reason
    reply = dataclasses.replace(reply, fault=fault)
    if reading is not None and fault is None:
        return reply, judgement_of(request, reply.model, reading.values, reading.answer)
    if fault == "judge refused" or n_unread:
        return reply, unscored(request, fault or "malformed")
    return reply, None


def judgement_of(
    request: JudgeRequest, model: str, values: Mapping[str, float], answer: Mapping[str, Any]
) -> Judgement:
    """A finished judgement with its values."""
    return Judgement(request.key, request.rubric.sha256, model, request.sample, values, answer)


def unscored(request: JudgeRequest, reason: str) -> Judgement:
    """A finished judgement without a value, and the reason."""
    return Judgement(request.key, request.rubric.sha256, request.params.model, request.sample, None, {}, reason)


def _asked_wait_s(headers: Mapping[str, str]) -> float:
    """Seconds of a `retry-after`, 0 without one; its other form, a date, is not used by the API."""
    try:
        wait_s = float(headers.get("retry-after", 0.0))
    except ValueError:
        return 0.0
    return min(max(wait_s, 0.0), MAX_WAIT_S)


def _message(body: object) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message", "")) if isinstance(error, dict) else ""


class LoopLedger:
    """The judging ledger for one event loop. Operations posted in one turn of the loop share a commit."""

    def __init__(self, workspace: Path, cap_usd: float | None) -> None:
        self.ledger = JudgeLedger(Store.open(workspace).relaxed(), cap_usd)
        self._waiting: list[tuple[Operation, asyncio.Future[Any]]] = []
        self._flushing: asyncio.Task[None] | None = None

    def post(self, operation: Operation) -> asyncio.Future[int | Refusal | None]:
        """Hand an operation over; the future is done (or holds a StoreError) when it is committed.

        Operations are done in the order posted, so one that is awaited vouches for those before it.
        """
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((operation, done))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        return done

    async def do(self, operation: Operation) -> int | Refusal | None:
        """Do one operation; returns when it is committed. Raises StoreError."""
        # Shielded: a cancelled task must not take back an operation that the others' commit already holds.
        return await asyncio.shield(self.post(operation))

    async def _flush(self) -> None:
        while self._waiting:
            taken, self._waiting = self._waiting, []
            operations = [operation for operation, _ in taken]
            try:
                results = self.ledger.apply(operations)
            except StoreError as error:
                for _, done in taken:
                    done.set_exception(error)
                continue
            for (_, done), result in zip(taken, results, strict=True):
                done.set_result(result)

    async def close(self) -> None:
        """Write what is waiting, keep what was under way as lost, close the connection."""
        if self._flushing is not None:
            await asyncio.gather(self._flushing, return_exceptions=True)
        try:
            self.ledger.release()
        finally:
            self.ledger.store.close()


class BudgetRefusal(Exception):
    """A sending that the ledger did not allow."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal: Refusal = refusal


@dataclass(frozen=True)
class PendingJudgement:
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

    async def judge(self, request: JudgeRequest, n_unread: int) -> PendingJudgement | Refusal:
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
            except BudgetRefusal as refused:
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
                return PendingJudgement(final, written)
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
            raise BudgetRefusal(booked or "held")
        meter.ticket = booked
        try:
            response = await call_next(request)
        except APIConnectionError:
            await self._ledger.do(Unpaid(booked, "lost"))
            raise
        if response.status_code >= 400:
            await self._ledger.do(Unpaid(booked, "refused"))
        return response
