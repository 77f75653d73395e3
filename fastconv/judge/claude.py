"""Claude as a judge: SDK client, error messages, reading of replies, and live judging.

`LiveJudge` sends one request at a time through the Messages API; `judge.batches` shares the client, the errors and the
reading of replies. Before a request is sent, its worst-case cost is reserved in the ledger. Nothing is sent again here:
the desk decides when.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastconv.errors import JudgeError
from fastconv.judge.budget import Price, cost_usd, worst_usd
from fastconv.judge.http import (
    CLAUDE_KEY,
    CLAUDE_URL,
    PATIENCE,
    ApiKey,
    Outage,
    async_client,
    error_text,
    json_object,
    judge_url,
    retry_after_s,
    safe_name,
    safe_value,
)
from fastconv.judge.request import JudgeRequest
from fastconv.recipe import JudgeSettings
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store
from fastconv.store.records import Judgement, Operation, RawReply, Refusal, Reserve, Settle, Unpaid

if TYPE_CHECKING:
    from anthropic import APIError, AsyncAnthropic

__all__ = ["ApiKey", "Outage", "LiveJudge", "LoopLedger"]

#: More tokens than a reply can report.
MAX_USAGE_TOK = 10**9


def make_client(settings: JudgeSettings, key: ApiKey) -> AsyncAnthropic:
    """The SDK client for a recipe's judge; it sends each request once. Raises JudgeError for a host that gets no key."""
    from anthropic import AsyncAnthropic

    base = judge_url(settings.base_url, has_key=True)
    return AsyncAnthropic(
        api_key=key.reveal(),
        base_url=str(base),
        timeout=settings.timeout_s,
        max_retries=0,
        http_client=async_client(base, settings.timeout_s, settings.concurrency),
    )


def api_error(error: APIError, settings: JudgeSettings, key: ApiKey) -> JudgeError | Outage:
    """Translate an SDK error: JudgeError if it ends judging, Outage if it may pass. One line, without the key."""
    from anthropic import APIConnectionError, APIStatusError, APITimeoutError

    where = settings.base_url or CLAUDE_URL
    if isinstance(error.__cause__, JudgeError):
        return error.__cause__
    if isinstance(error, APITimeoutError):
        return Outage(f"no answer within {settings.timeout_s:g} s from {where}")
    if isinstance(error, APIConnectionError):
        return Outage(f"{where} cannot be reached")
    if not isinstance(error, APIStatusError):
        return Outage(f"{where} sent something that is no answer")
    wait_s = retry_after_s(error.response.headers)
    return status_error(error.status_code, error.body, settings, key, wait_s)


def status_error(
    code: int, body: object, settings: JudgeSettings, key: ApiKey, wait_s: float = 0.0
) -> JudgeError | Outage:
    """Translate an HTTP error status as `api_error` does. `body` is the parsed response, `wait_s` its `retry-after`."""
    where = settings.base_url or CLAUDE_URL
    message = error_text(body, key)
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


def parse_reply(
    message: object, price: Price, *, transport: str, key: ApiKey, worst: float, factor: float = 1.0
) -> RawReply | None:
    """Parse a message (a JSON value as `http.safe_value` gives it); None if it is none: nothing is known of the reply.

    `worst` is the most that the reply can cost in US dollars. It counts as the cost where the usage counts are missing
    or cannot be true.
    """
    if (
        not isinstance(message, dict)
        or message.get("type") != "message"
        or not isinstance(message.get("content"), list)
    ):
        return None
    blocks = [block for block in message["content"] if isinstance(block, dict) and block.get("type") == "text"]
    # Scrubbed once more, because the key could be split over two blocks.
    text = safe_value("".join(str(block.get("text", "")) for block in blocks), key)
    usage = read_usage(message.get("usage"))
    cost = min(cost_usd(usage, price, factor), worst) if usage else worst
    return RawReply(
        transport, safe_name(message.get("model")), text, safe_name(message.get("stop_reason")), usage, cost
    )


def read_usage(usage: object) -> dict[str, int]:
    """The token counts of a reply by name; empty if they are missing, negative, absurd, or of no prompt at all."""
    if not isinstance(usage, dict):
        return {}
    counts = {safe_name(name): n for name, n in usage.items() if isinstance(n, int) and not isinstance(n, bool)}
    absurd = any(not 0 <= n <= MAX_USAGE_TOK for n in counts.values())
    n_prompt = sum(n for name, n in counts.items() if name.endswith("input_tokens"))
    return {} if absurd or n_prompt <= 0 or "output_tokens" not in counts else counts


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
            (outcome,) = await asyncio.gather(self._commit(operations), return_exceptions=True)
            # Whatever became of the commit, nothing that waits for it may be left waiting.
            for place, (_, done) in enumerate(posted):
                if isinstance(outcome, BaseException):
                    done.set_exception(outcome)
                else:
                    done.set_result(outcome[place])

    async def _commit(self, operations: Sequence[Operation]) -> list[int | Refusal | None]:
        return self.ledger.apply(operations)

    async def close(self) -> None:
        """Commit what is queued, mark requests that are still open as lost, close the connection."""
        if self._flushing is not None:
            await asyncio.gather(self._flushing, return_exceptions=True)
        try:
            self.ledger.release()
        finally:
            self.ledger.store.close()


@dataclass(frozen=True)
class PendingJudgement:
    """A judgement, and the future that completes when it is committed."""

    judgement: Judgement
    written: asyncio.Future[Any]


class LiveJudge:
    """Judges through the Messages API. Use inside one event loop."""

    def __init__(self, settings: JudgeSettings, ledger: LoopLedger, price: Price, key: ApiKey) -> None:
        self._settings = settings
        self._ledger = ledger
        self._price = price
        self._key = key
        self._where = settings.base_url or CLAUDE_URL
        self._client: AsyncAnthropic = make_client(settings, key)

    async def judge(self, request: JudgeRequest, n_unread: int) -> PendingJudgement | Refusal:
        """Send one request, and once more if its reply cannot be read.

        `n_unread` is the number of unreadable replies that the ledger already holds for it. Returns the judgement with
        the future of its commit, or the ledger's refusal: over budget, held by another process, or done already.
        Raises Outage if the judge cannot be reached now, JudgeError if sending more makes no sense, StoreError.
        """
        while True:
            worst = worst_usd(request, self._price)
            ticket = await self._ledger.do(Reserve(request.key, worst))
            if not isinstance(ticket, int):
                return ticket or "held"
            began = time.monotonic()
            body = await self._send(request.body(re_ask=n_unread > 0), ticket)
            message = json_object(body, self._key)
            reply = parse_reply(message, self._price, transport="live", key=self._key, worst=worst)
            if reply is None:
                await self._ledger.do(Unpaid(ticket, "refused" if is_page(body) else "lost"))
                raise Outage(f"{self._where} sent something that is no answer: a network's login page, perhaps")
            reply, final = conclude_reply(request, replace(reply, latency_s=time.monotonic() - began), n_unread)
            # Not awaited: the reservation of the next request is posted after it and shares its commit.
            written = self._ledger.post(Settle(ticket, request.key, reply, final))
            if final is not None:
                return PendingJudgement(final, written)
            n_unread += 1

    async def _send(self, body: dict[str, Any], ticket: int) -> bytes:
        """Send a request once and return the reply's body; without one, its reservation is kept as lost or freed."""
        from anthropic import APIError, APIStatusError

        within_s = PATIENCE * self._settings.timeout_s
        try:
            async with asyncio.timeout(within_s):
                raw = await self._client.messages.with_raw_response.create(**body)
        except TimeoutError:
            await self._ledger.do(Unpaid(ticket, "lost"))
            raise Outage(f"no whole answer within {within_s:g} s from {self._where}") from None
        except APIError as error:
            await self._ledger.do(Unpaid(ticket, "refused" if isinstance(error, APIStatusError) else "lost"))
            raise api_error(error, self._settings, self._key) from None
        return raw.http_response.content

    async def close(self) -> None:
        """Close the HTTP connections."""
        await self._client.close()


def is_page(body: bytes) -> bool:
    """Whether a body is a web page. The API sends none, so what was asked did not reach it and costs nothing."""
    return body.lstrip()[:1] == b"<"
