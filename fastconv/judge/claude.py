"""Claude as a judge: API key, SDK client, error messages, reading of replies, and live judging.

`LiveJudge` sends one request at a time through the Messages API; `judge.batches` shares the key, the client, the
errors and the reading of replies. Before an HTTP attempt is sent, its worst-case cost is reserved in the ledger.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
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
#: How often the SDK itself repeats a failed request, waiting as the server asks.
SDK_RETRIES = 4
#: Environment variables that hold the API keys.
CLAUDE_KEY, LOCAL_KEY = "ANTHROPIC_API_KEY", "FASTCONV_LOCAL_KEY"
#: Characters of a server's message that are shown at most.
_SHOWN_CHARS = 200
#: Longest wait in seconds that a server's `retry-after` can ask for.
MAX_WAIT_S = 60.0


class ApiKey:
    """An API key from the environment. Its repr hides it, and `scrub` removes it from text that a server sent back."""

    def __init__(self, value: str) -> None:
        self._value = value

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], name: str = CLAUDE_KEY) -> ApiKey:
        """Read the key from a variable. Raises JudgeError if it is not set or contains an impossible character."""
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
        """The text with every occurrence of the key replaced."""
        return text.replace(self._value, "[key]")

    def scrub_json(self, value: Any) -> Any:
        """A parsed JSON value with the key removed from all strings: in the raw text it may have been hidden by escapes."""
        if isinstance(value, str):
            return self.scrub(value)
        if isinstance(value, list):
            return [self.scrub_json(item) for item in value]
        if isinstance(value, dict):
            return {self.scrub(name): self.scrub_json(item) for name, item in value.items()}
        return value

    def __repr__(self) -> str:
        return "ApiKey(hidden)"


class Outage(Exception):
    """The judge cannot be reached now; unfinished judgements stay pending. `wait_s`: seconds that the server asked to wait."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


def make_client(settings: JudgeSettings, key: ApiKey, middleware: Any = None) -> AsyncAnthropic:
    """The SDK client for a recipe's judge. `middleware` is called for every HTTP attempt."""
    from anthropic import AsyncAnthropic

    return AsyncAnthropic(
        api_key=key.reveal(),
        base_url=settings.base_url or CLAUDE_URL,
        timeout=settings.timeout_s,
        max_retries=SDK_RETRIES,
        middleware=[middleware] if middleware else [],
    )


def api_error(error: APIError, settings: JudgeSettings, key: ApiKey) -> JudgeError | Outage:
    """Translate an SDK error: JudgeError if it ends judging, Outage if it may pass. One line, without the key."""
    from anthropic import APIConnectionError, APIStatusError, APITimeoutError

    where = settings.base_url or CLAUDE_URL
    if isinstance(error, APITimeoutError):
        return Outage(f"no answer within {settings.timeout_s:g} s from {where}")
    if isinstance(error, APIConnectionError):
        return Outage(f"{where} cannot be reached")
    if not isinstance(error, APIStatusError):
        return Outage(f"{where} sent something that is no answer")
    wait_s = _retry_after_s(error.response.headers)
    return status_error(error.status_code, error.body, settings, key, wait_s)


def status_error(
    code: int, body: object, settings: JudgeSettings, key: ApiKey, wait_s: float = 0.0
) -> JudgeError | Outage:
    """Translate an HTTP error status as `api_error` does. `body` is the parsed response, `wait_s` its `retry-after`."""
    where = settings.base_url or CLAUDE_URL
    message = key.scrub(" ".join(_message(body).split()))[:_SHOWN_CHARS]
    fixes = {
        401: ("the API key was refused", f"check {CLAUDE_KEY}"),
        403: ("the API key may not use this", f"check the rights of {CLAUDE_KEY}"),
        404: (f"the judge does not know model {settings.model!r}", "check judge.model and judge.base_url"),
        400: (f"the judge refused the request: {message}", "mend what it names, then run `fastconv judge`"),
        413: ("the request is too large for the judge", "lower judge.max_judged_chars"),
    }
    if code in fixes:
        what, fix = fixes[code]
        return JudgeError(what, where=where, fix=fix)
    return Outage(f"{where} answered {code}: {message}", wait_s)


def parse_reply(body: str, price: Price, *, transport: str, key: ApiKey, worst: float, factor: float = 1.0) -> RawReply:
    """Parse a message's JSON body. `worst` is the cost in US dollars that counts when the reply has no usage counts."""
    body = key.scrub(body)
    try:
        message = key.scrub_json(json.loads(body))
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or message.get("type") != "message":
        return RawReply(transport, "", body, "", {}, worst, fault="malformed")
    blocks = [block for block in message.get("content") or [] if isinstance(block, dict)]
    # Scrubbed once more, because the key could be split over two blocks.
    text = key.scrub("".join(str(block.get("text", "")) for block in blocks if block.get("type") == "text"))
    usage = {name: n for name, n in (message.get("usage") or {}).items() if isinstance(n, int)}
    cost = cost_usd(usage, price, factor) if "output_tokens" in usage else worst
    stop = str(message.get("stop_reason") or "")
    return RawReply(transport, str(message.get("model", "")), text, stop, usage, cost)


def conclude_reply(request: JudgeRequest, reply: RawReply, n_unread: int) -> tuple[RawReply, Judgement | None]:
    """Read a reply by the rubric: the reply with its fault (if any), and the judgement, or None to ask once more.

    `n_unread` is the number of earlier unreadable replies. A malformed, truncated or out-of-range reply is requested
    again once; a refusal by the judge is not.
    """
    reading = request.rubric.read(reply.text, reply.stop_reason) if reply.fault is None else None
    fault = reply.fault if reading is None else reading.reason
    reply = dataclasses.replace(reply, fault=fault)
    if reading is not None and fault is None:
        return reply, scored_judgement(request, reply.model, reading.values, reading.answer)
    if fault == "judge refused" or n_unread:
        return reply, unscored_judgement(request, fault or "malformed")
    return reply, None


def scored_judgement(
    request: JudgeRequest, model: str, values: Mapping[str, float], answer: Mapping[str, Any]
) -> Judgement:
    """A finished judgement with values."""
    return Judgement(request.key, request.rubric.sha256, model, request.sample, values, answer)


def unscored_judgement(request: JudgeRequest, reason: str) -> Judgement:
    """A finished judgement without values; `reason` is one of `rubric.REASONS`."""
    return Judgement(request.key, request.rubric.sha256, request.params.model, request.sample, None, {}, reason)


def lookup_judgements(
    ledger: JudgeLedger, requests: Sequence[JudgeRequest]
) -> tuple[dict[str, Judgement], dict[str, int]]:
    """Look requests up in the ledger: finished judgements by key, and for the others the number of unreadable replies.

    A reply that was stored without being read (its process had died) is read now.
    """
    judgements = ledger.judgements(request.key for request in requests)
    tried = ledger.sent_keys(request.key for request in requests if request.key not in judgements)
    n_unread: dict[str, int] = {}
    for request in requests:
        if request.key not in tried:
            continue
        for reply in ledger.replies(request.key):
            if reply.fault is not None or request.key in judgements:
                continue
            reply, final = conclude_reply(request, reply, ledger.history(request.key).n_unread)
            if reply.fault is not None:
                ledger.set_fault(request.key, reply.fault)
            if final is not None:
                ledger.finish([final])
                judgements[request.key] = final
        n_unread[request.key] = ledger.history(request.key).n_unread
    return judgements, n_unread


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds of the `retry-after` header, 0 without one. The API does not use its date form."""
    try:
        wait_s = float(headers.get("retry-after", 0.0))
    except ValueError:
        return 0.0
    return min(max(wait_s, 0.0), MAX_WAIT_S)


def _message(body: object) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message", "")) if isinstance(error, dict) else ""


class LoopLedger:
    """The judging ledger for one event loop. Operations posted in the same turn of the loop share a commit."""

    def __init__(self, workspace: Path, cap_usd: float | None) -> None:
        self.ledger = JudgeLedger(Store.open(workspace).relaxed(), cap_usd)
        self._waiting: list[tuple[Operation, asyncio.Future[Any]]] = []
        self._flushing: asyncio.Task[None] | None = None

    def post(self, operation: Operation) -> asyncio.Future[int | Refusal | None]:
        """Queue an operation; the future completes with its result (or a StoreError) when it is committed.

        Operations run in the order posted, so awaiting one also means that those before it are committed.
        """
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((operation, done))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        return done

    async def do(self, operation: Operation) -> int | Refusal | None:
        """Run one operation and return its result when it is committed. Raises StoreError."""
        # Shielded: a cancelled task must not withdraw an operation that is already part of a shared commit.
        return await asyncio.shield(self.post(operation))

    async def _flush(self) -> None:
        while self._waiting:
            posted, self._waiting = self._waiting, []
            operations = [operation for operation, _ in posted]
            try:
                results = self.ledger.apply(operations)
            except StoreError as error:
                for _, done in posted:
                    done.set_exception(error)
                continue
            for (_, done), result in zip(posted, results, strict=True):
                done.set_result(result)

    async def close(self) -> None:
        """Commit what is queued, mark requests that are still open as lost, close the connection."""
        if self._flushing is not None:
            await asyncio.gather(self._flushing, return_exceptions=True)
        try:
            self.ledger.release()
        finally:
            self.ledger.store.close()


class BudgetRefusal(Exception):
    """The ledger refused the reservation for an HTTP attempt."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal: Refusal = refusal


@dataclass(frozen=True)
class PendingJudgement:
    """A judgement, and the future that completes when it is committed."""

    judgement: Judgement
    written: asyncio.Future[Any]


@dataclass
class _Meter:
    """The reservation of the current HTTP attempt; one object per SDK call."""

    key: str
    worst_usd: float
    ticket: int | None = None


class LiveJudge:
    """Judges through the Messages API. Use inside one event loop."""

    def __init__(self, settings: JudgeSettings, ledger: LoopLedger, price: Price, key: ApiKey) -> None:
        self._settings = settings
        self._ledger = ledger
        self._price = price
        self._key = key
        self._meter: ContextVar[_Meter | None] = ContextVar("meter", default=None)
        self._client: AsyncAnthropic = make_client(settings, key, self._metered)

    async def judge(self, request: JudgeRequest, n_unread: int) -> PendingJudgement | Refusal:
        """Send one request, and once more if its reply cannot be read.

        `n_unread` is the number of unreadable replies that the ledger already holds for it. Returns the judgement with
        the future of its commit, or the ledger's refusal: over budget, held by another process, or done already.
        Raises Outage if the judge cannot be reached now, JudgeError if sending more makes no sense, StoreError.
        """
        from anthropic import APIError

        while True:
            meter = _Meter(request.key, worst_usd(request, self._price))
            self._meter.set(meter)
            began = time.monotonic()
            try:
                raw = await self._client.messages.with_raw_response.create(**request.body(re_ask=n_unread > 0))
            except BudgetRefusal as error:
                return error.refusal
            except APIError as error:
                raise api_error(error, self._settings, self._key) from None
            reply = parse_reply(
                raw.http_response.text, self._price, transport="live", key=self._key, worst=meter.worst_usd
            )
            reply, final = conclude_reply(request, replace(reply, latency_s=time.monotonic() - began), n_unread)
            assert meter.ticket is not None, "an attempt was sent without a reservation"
            # Not awaited: the reservation of the next request is posted after it and shares its commit.
            written = self._ledger.post(Settle(meter.ticket, request.key, reply, final))
            if final is not None:
                return PendingJudgement(final, written)
            n_unread += 1

    async def close(self) -> None:
        """Close the HTTP connections."""
        await self._client.close()

    async def _metered(self, request: Any, call_next: Any) -> Any:
        """Reserve the cost of an HTTP attempt, send it, and keep or free the reservation depending on the response."""
        from anthropic import APIConnectionError

        meter = self._meter.get()
        if meter is None:
            return await call_next(request)
        ticket = await self._ledger.do(Reserve(meter.key, meter.worst_usd))
        if not isinstance(ticket, int):
            raise BudgetRefusal(ticket or "held")
        meter.ticket = ticket
        try:
            response = await call_next(request)
        except APIConnectionError:
            await self._ledger.do(Unpaid(ticket, "lost"))
            raise
        if response.status_code >= 400:
            await self._ledger.do(Unpaid(ticket, "refused"))
        return response
