"""Claude as a judge: everything that knows Anthropic's API, live and in batches. It sends and parses, and stores nothing.

Nothing is sent again here, and nothing is booked: `judge.desk` and `judge.batches` do that for every provider alike.
"""

from __future__ import annotations

import asyncio
import datetime
import time
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from fastconv.errors import JudgeError
from fastconv.judge.batches import BatchCard, NotShown
from fastconv.judge.budget import Price, cost_usd, worst_usd
from fastconv.judge.http import (
    CLAUDE_KEY,
    CLAUDE_URL,
    MAX_BODY_BYTES,
    MAX_NAME_CHARS,
    PATIENCE,
    ApiKey,
    Outage,
    ask,
    async_client,
    error_text,
    json_object,
    judge_url,
    retry_after_s,
    safe_name,
    safe_value,
    sync_client,
)
from fastconv.judge.request import JudgeRequest
from fastconv.recipe import JudgeSettings
from fastconv.store.records import RawReply

if TYPE_CHECKING:
    from anthropic import APIError, AsyncAnthropic

__all__ = ["ApiKey", "Claude", "Outage"]

#: More tokens than a reply can report.
MAX_USAGE_TOK = 10**9
#: HTTP status codes that mean "not visible to this key" when they answer a request about one batch.
_INVISIBLE = (400, 403, 404)
#: Value of the `anthropic-version` header, as the SDK sends it.
API_VERSION = "2023-06-01"


class Claude:
    """The Messages API and its batches, as `judge.desk.Provider` and `judge.batches.BatchApi`. Use inside one event loop.

    `batch_factor` multiplies `price` for batches. Raises JudgeError for a host that gets no key.
    """

    key_name: ClassVar[str] = CLAUDE_KEY
    url: ClassVar[str] = CLAUDE_URL

    def __init__(self, settings: JudgeSettings, price: Price, key: ApiKey, batch_factor: float) -> None:
        self.n_parallel = settings.concurrency
        self.batches = self
        self._settings = settings
        self._price = price
        self._factor = batch_factor
        self._key = key
        self._where = settings.base_url or CLAUDE_URL
        self._client = make_client(settings, key)

    async def close(self) -> None:
        """Close the HTTP connections."""
        await self._client.close()

    @staticmethod
    def check(settings: JudgeSettings, key: ApiKey, within_s: float) -> None:
        """Request the model's entry, which costs nothing; without the SDK, because importing it is slow.

        Raises JudgeError for a refused key or an unknown model, Outage.
        """
        base = judge_url(settings.base_url, has_key=True)
        url = f"{str(base).rstrip('/')}/v1/models/{urllib.parse.quote(settings.model, safe='')}"
        headers = {"x-api-key": key.reveal(), "anthropic-version": API_VERSION}
        with sync_client(base, within_s) as client:
            status, body, wait_s = ask(client, "GET", url, headers, within_s=within_s, key=key)
        if not 200 <= status < 300:
            raise status_error(status, body, settings, key, wait_s)

    # --- live -------------------------------------------------------------------------------------------

    async def ask(self, request: JudgeRequest, before: Sequence[RawReply]) -> RawReply:
        """Send a request once, with the rubric's reminder if earlier replies could not be read. Raises Outage, JudgeError."""
        from anthropic import APIError, APIStatusError

        within_s, began = PATIENCE * self._settings.timeout_s, time.monotonic()
        try:
            async with asyncio.timeout(within_s):
                raw = await self._client.messages.with_raw_response.create(**request.body(re_ask=bool(before)))
        except TimeoutError:
            raise Outage(f"no whole answer within {within_s:g} s from {self._where}") from None
        except APIError as error:
            # The API bills no request that it answers with an error.
            raise self._error(error, taken=not isinstance(error, APIStatusError)) from None
        body = raw.http_response.content
        worst = worst_usd(request, self._price)
        reply = parse_reply(json_object(body, self._key), self._price, transport="live", key=self._key, worst=worst)
        if reply is None:
            # The API sends no web pages: what was asked did not reach it.
            is_page = body.lstrip()[:1] == b"<"
            problem = f"{self._where} sent something that is no answer: a network's login page, perhaps"
            raise Outage(problem, taken=not is_page)
        return replace(reply, latency_s=time.monotonic() - began)

    def _error(self, error: APIError, *, taken: bool) -> JudgeError | Outage:
        """Translate an SDK error: JudgeError if it ends judging, Outage if it may pass. One line, without the key."""
        from anthropic import APIConnectionError, APIStatusError, APITimeoutError

        if isinstance(error.__cause__, JudgeError):
            return error.__cause__
        if isinstance(error, APITimeoutError):
            return Outage(f"no answer within {self._settings.timeout_s:g} s from {self._where}", taken=taken)
        if isinstance(error, APIConnectionError):
            return Outage(f"{self._where} cannot be reached", taken=taken)
        if not isinstance(error, APIStatusError):
            return Outage(f"{self._where} sent something that is no answer", taken=taken)
        wait_s = retry_after_s(error.response.headers)
        return status_error(error.status_code, error.body, self._settings, self._key, wait_s, taken=taken)

    # --- batches ----------------------------------------------------------------------------------------

    async def create(self, items: Sequence[tuple[str, JudgeRequest, bool]]) -> str:
        """Send a batch of (custom id, request, whether it is asked again) and return its id. Raises Outage, JudgeError.

        It is never sent again by itself: a repeated create could make a second batch, and both would be billed.
        """
        from anthropic import APIError

        body: Any = [{"custom_id": name, "params": request.body(re_ask=again)} for name, request, again in items]
        try:
            batch = await self._client.messages.batches.create(requests=body)
        except APIError as error:
            # An answer below 500 says that the batch was not accepted; after any other it may have been.
            raise self._error(error, taken=getattr(error, "status_code", 500) >= 500) from None
        return self._card(batch).id

    async def look(self, batch: str) -> BatchCard:
        """A batch as it stands now. Raises NotShown, Outage, JudgeError."""
        from anthropic import APIError

        try:
            return self._card(await self._client.messages.batches.retrieve(batch))
        except APIError as error:
            raise self._batch_error(error) from None

    async def newest_first(self) -> AsyncGenerator[BatchCard, None]:
        """The account's batches. Raises Outage (also for a page that is no list of batches), JudgeError."""
        from anthropic import APIError

        try:
            page = await self._client.messages.batches.list(limit=100)
            while True:
                if not isinstance(getattr(page, "data", None), list):
                    raise self._no_batch()
                for batch in page.data:
                    yield self._card(batch)
                if not page.has_next_page():
                    return
                page = await page.get_next_page()
        except APIError as error:
            raise self._error(error, taken=False) from None

    async def results(self, batch: str) -> AsyncGenerator[tuple[str, str, Any], None]:
        """Yield (custom id, type, message) of a batch's results, made safe; lines that hold none are left out.

        Raises Outage if the stream breaks off or holds no result at all (it can be read again), NotShown, JudgeError.
        """
        import httpx2
        from anthropic import AnthropicError, APIError

        n_read = n_bad = 0
        try:
            async with (
                self._client.messages.batches.with_streaming_response.results(batch) as response,
                aclosing(_lines(response.iter_bytes())) as lines,
            ):
                async for line in lines:
                    found = json_object(line, self._key)
                    n_read, n_bad = n_read + (found is not None), n_bad + (found is None)
                    if found is not None:
                        result = found.get("result")
                        result = result if isinstance(result, dict) else {}
                        yield str(found.get("custom_id")), str(result.get("type")), result.get("message")
        except APIError as error:
            raise self._batch_error(error) from None
        except (httpx2.HTTPError, AnthropicError, ValueError):
            raise Outage(f"the results of batch {batch} broke off") from None
        if n_bad and not n_read:
            raise self._no_batch()

    def parse(self, message: object, worst_usd: float) -> RawReply | None:
        """The reply in a batch's result, or None if it is none."""
        return parse_reply(message, self._price, transport="batch", key=self._key, worst=worst_usd, factor=self._factor)

    def _batch_error(self, error: APIError) -> NotShown | JudgeError | Outage:
        """The exception for an API error in a call about one batch."""
        status = getattr(error, "status_code", 0)
        return NotShown(status) if status in _INVISIBLE else self._error(error, taken=True)

    def _no_batch(self) -> Outage:
        return Outage(f"{self._where} sent something that is no batch: a login page, perhaps")

    def _card(self, batch: Any) -> BatchCard:
        """What is read of a batch. Raises Outage if it is none; the SDK passes on whatever a server sends."""
        counts = getattr(batch, "request_counts", None)
        numbers = [
            getattr(counts, name, None) for name in ("processing", "succeeded", "errored", "canceled", "expired")
        ]
        texts = [getattr(batch, name, None) for name in ("id", "processing_status")]
        created, results = getattr(batch, "created_at", None), getattr(batch, "results_url", None)
        if (
            not all(isinstance(text, str) and len(text) <= MAX_NAME_CHARS and text.isprintable() for text in texts)
            or not all(isinstance(n, int) for n in numbers)
            or not isinstance(created, datetime.datetime)
            or not isinstance(results, str | None)
        ):
            raise self._no_batch()
        ended = batch.processing_status == "ended"
        return BatchCard(
            batch.id, created.timestamp(), sum(n or 0 for n in numbers), ended, has_results=results is not None
        )


# --- calls ---------------------------------------------------------------------------------------------------


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


# --- replies ------------------------------------------------------------------------------------------------


def status_error(
    code: int, body: object, settings: JudgeSettings, key: ApiKey, wait_s: float = 0.0, *, taken: bool = False
) -> JudgeError | Outage:
    """Translate an HTTP error status. `body` is the parsed response, `wait_s` its `retry-after`; see Outage for `taken`."""
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
    return Outage(f"{where} answered {code}: {message}", wait_s, taken=taken)


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


async def _lines(parts: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The lines of a stream that are not empty. Raises ValueError for one without end."""
    held = b""
    async for part in parts:
        *lines, held = (held + part).split(b"\n")
        if len(held) > MAX_BODY_BYTES:
            raise ValueError("a line without end")
        for line in lines:
            if line.strip():
                yield line
    if held.strip():
        yield held
