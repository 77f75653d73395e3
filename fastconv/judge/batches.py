"""Judging through Claude's Message Batches API, at half the price of live requests.

A crash must not lead to an item being paid twice. So an intent with its reservations is written to the ledger first,
then the batch is created without retries, then its id is noted. A crash in between leaves an intent without an id. It is
reconciled with the API's list of batches before anything else is sent: a running batch of the same size may belong to
it, so the judge waits; a batch that ended is recognized by the custom ids of its results, which hold the digests of the
requests and the numbers of the reservations.

Every sent batch is checked on its own. A batch that the API does not show to this key may have been sent with another
key: it stays open, and whatever does not wait for it goes on. A batch whose results can never come (archived, deleted)
is closed; its cost stays in the ledger as lost, because it may have been charged, and its items are requested again.
"""

from __future__ import annotations

import datetime
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from fastconv.errors import JudgeError
from fastconv.judge.budget import Price, worst_usd
from fastconv.judge.claude import api_error, conclude_reply, make_client, parse_reply, unscored_judgement
from fastconv.judge.http import CLAUDE_URL, MAX_BODY_BYTES, MAX_NAME_CHARS, ApiKey, Outage, json_object
from fastconv.judge.request import JudgeRequest
from fastconv.recipe import JudgeSettings, canonical_json
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.records import BatchItem, JudgeBatch, Operation, RawReply, Refusal, Reserve, Settle, Unpaid

if TYPE_CHECKING:
    from anthropic import APIError, AsyncAnthropic
    from anthropic.types.messages import MessageBatch

#: Limits of the API on one batch: items, and bytes with room for the envelope.
MAX_ITEMS, MAX_BYTES = 10_000, 200_000_000
#: How often an item that brought no reply is sent again.
MAX_RESUBMISSIONS = 2
#: Seconds by which the API's clock and ours may differ when a batch is searched by its creation time.
CLOCK_SKEW_S = 300.0
#: Results are committed in groups of this size, so that a crash while reading them costs little work and no money.
_INGEST_ITEMS = 200
#: Seconds. The API keeps results for 29 days, so a batch that it has not shown for longer cannot bring any.
RESULTS_KEPT_S = 30 * 86_400.0
#: A batch that this key has seen counts as deleted after so many 404 answers in a row.
DELETED_AFTER = 3
#: HTTP status codes that mean "not visible to this key" when they answer a request about one batch.
_INVISIBLE = (400, 403, 404)
#: So many failed batches in one round mean that the API itself is unavailable.
_MAX_FAILURES = 3


@dataclass(frozen=True)
class SubmitResult:
    """Result of `BatchJudge.submit`: the keys that the ledger refused, with the reason. All others were sent."""

    refused: dict[str, Refusal]


@dataclass(frozen=True)
class InvisibleBatch:
    """A batch that the API does not show to this key: its intent, the judgement keys that wait for it, and a status line."""

    intent: str
    keys: frozenset[str]
    line: str


@dataclass(frozen=True)
class BatchProgress:
    """Result of `BatchJudge.collect`: keys to request again, batches not shown to this key, and the first failure."""

    retry_keys: tuple[str, ...]
    invisible: tuple[InvisibleBatch, ...]
    failure: Outage | JudgeError | None


class _NotShown(Exception):
    """The API shows no such batch to this key; `status` is the HTTP status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class BatchJudge:
    """Judges through the Message Batches API. Use inside one event loop.

    `requests` holds the desk's requests by key; the desk adds to it. Results of other keys are stored as raw replies only.
    `factor` multiplies `price` for batches.
    """

    def __init__(
        self, settings: JudgeSettings, ledger: JudgeLedger, price: Price, factor: float, key: ApiKey,
        requests: dict[str, JudgeRequest],
    ) -> None:  # fmt: skip
        self._settings = settings
        self._ledger = ledger
        self._price = price
        self._factor = factor
        self._key = key
        self._requests = requests
        self._client: AsyncAnthropic = make_client(settings, key)
        #: Number of results whose custom id is not one of ours.
        self.n_foreign = 0
        #: Batch ids that this key was shown; by intent, how often a check failed, and how often it showed no batch.
        self._shown: set[str] = set()
        self._n_failed: Counter[str] = Counter()
        self._n_invisible: Counter[str] = Counter()

    # --- sending ----------------------------------------------------------------------------------------

    async def submit(self, requests: Sequence[JudgeRequest]) -> SubmitResult:
        """Send requests in as few batches as the API's limits allow.

        Raises Outage when it is unknown whether a batch was accepted (its intent is reconciled later), JudgeError when
        sending more makes no sense. Neither leaves a reservation for a batch that was certainly not accepted.
        """
        refused: dict[str, Refusal] = {}
        for chunk in self._chunks(requests):
            reservations = [Reserve(request.key, worst_usd(request, self._price, self._factor)) for request in chunk]
            intent, results = self._ledger.write_intent(reservations)
            reserved = [request for request, result in zip(chunk, results, strict=True) if isinstance(result, int)]
            for request, result in zip(chunk, results, strict=True):
                if not isinstance(result, int):
                    refused[request.key] = result
            if reserved:
                await self._create(intent, reserved)
        return SubmitResult(refused)

    async def _create(self, intent: str, requests: Sequence[JudgeRequest]) -> None:
        from anthropic import APIError, APIStatusError

        custom_ids = {item.key: item.custom_id for item in self._ledger.batch_items(intent)}
        body: Any = [
            {"custom_id": custom_ids[r.key], "params": r.body(re_ask=self._ledger.history(r.key).n_unread > 0)}
            for r in requests
        ]
        try:
            # Never sent again by itself: a repeated create could make a second batch, and both would be billed.
            batch = await self._client.messages.batches.create(requests=body)
        except APIStatusError as error:
            if error.status_code < 500:
                self._ledger.void_batch(intent)  # certainly not accepted
            else:
                self._ledger.release_batch(intent)
            raise api_error(error, self._settings, self._key) from None
        except APIError as error:
            self._ledger.release_batch(intent)
            raise api_error(error, self._settings, self._key) from None
        if not _is_batch(batch):
            self._ledger.release_batch(intent)
            raise self._no_answer()
        self._ledger.set_batch_id(intent, batch.id)

    def _no_answer(self) -> Outage:
        return Outage(f"{self._settings.base_url or CLAUDE_URL} sent something that is no batch: a login page, perhaps")

    def _chunks(self, requests: Sequence[JudgeRequest]) -> list[list[JudgeRequest]]:
        chunks: list[list[JudgeRequest]] = []
        n_bytes = 0
        for request in requests:
            size = len(canonical_json(request.body(re_ask=True)).encode()) + 200
            if not chunks or len(chunks[-1]) == MAX_ITEMS or n_bytes + size > MAX_BYTES:
                chunks.append([])
                n_bytes = 0
            chunks[-1].append(request)
            n_bytes += size
        return chunks

    # --- after a crash ----------------------------------------------------------------------------------

    async def reconcile(self) -> int:
        """Resolve the intents without a batch id; returns how many stay unresolved.

        An intent is attached if a batch is proved to be its own, voided if it is older than the grace period and no
        batch can be its own, and left open otherwise. If its batch may be one whose results are gone, it is closed as
        lost and its reservations are not freed. Raises Outage or JudgeError.
        """
        intents = self._ledger.batches("intended")
        if not intents:
            return 0
        since = min(intent.made_at for intent in intents) - CLOCK_SKEW_S
        candidates = await self._recent(since)
        n_open = 0
        for intent in intents:
            possible = [
                batch
                for batch in candidates
                if _n_items(batch) == intent.n and batch.created_at.timestamp() >= intent.made_at - CLOCK_SKEW_S
            ]
            own = {item.custom_id for item in self._ledger.batch_items(intent.intent)}
            proved = None
            running = unproved = False
            for batch in possible:
                if batch.processing_status != "ended":
                    running = True
                    continue
                holds = await self._holds(batch, own)
                proved = batch if holds else proved
                unproved = unproved or holds is None
            if proved is not None:
                self._ledger.set_batch_id(intent.intent, proved.id)
            elif running or self._is_young(intent):
                n_open += 1
            elif unproved:
                self._close_batch(intent.intent)
            else:
                self._ledger.void_batch(intent.intent)
        return n_open

    async def _recent(self, since: float) -> list[MessageBatch]:
        """The API's batches created after `since` (Unix seconds) that no intent is attached to."""
        from anthropic import APIError

        known_ids, batches = self._ledger.known_batch_ids(), []
        try:
            async for batch in self._listed():
                if batch.created_at.timestamp() < since:
                    break
                if batch.id not in known_ids:
                    batches.append(batch)
        except APIError as error:
            raise api_error(error, self._settings, self._key) from None
        return batches

    async def _listed(self) -> AsyncGenerator[MessageBatch, None]:
        """The API's batches, the newest first. Raises Outage for a page that is no list of batches."""
        page = await self._client.messages.batches.list(limit=100)
        while True:
            if not isinstance(getattr(page, "data", None), list) or not all(map(_is_batch, page.data)):
                raise self._no_answer()
            for batch in page.data:
                yield batch
            if not page.has_next_page():
                return
            page = await page.get_next_page()

    async def _holds(self, batch: MessageBatch, own: set[str]) -> bool | None:
        """Whether a batch that ended holds one of the custom ids `own`; None if its results are gone.

        Custom ids are unique, so a single match is proof.
        """
        if batch.results_url is None:
            return None
        try:
            async with aclosing(self._results(batch.id)) as lines:
                async for line in lines:
                    if str(line.get("custom_id")) in own:
                        return True
        except _NotShown:
            return None
        return False

    def _is_young(self, batch: JudgeBatch) -> bool:
        """Whether a batch is so new that the API's list may not show it yet."""
        return abs(time.time() - batch.made_at) < self._settings.batch_grace_s  # a clock may have gone back

    # --- results ----------------------------------------------------------------------------------------

    async def collect(self) -> BatchProgress:
        """Store the results of every batch that ended. A batch that fails does not keep the others from being read."""
        retry_keys: list[str] = []
        invisible: list[InvisibleBatch] = []
        failures: list[Outage | JudgeError] = []
        # Oldest first, but those that failed before come last.
        for batch in sorted(self._ledger.batches("sent"), key=lambda batch: self._n_failed[batch.intent]):
            try:
                retry_keys += await self._check_batch(batch)
            except _NotShown as not_shown:
                if not self._may_come(batch, not_shown.status):
                    retry_keys += self._close_batch(batch.intent)
                elif not self._is_young(batch):
                    invisible.append(self._invisible_batch(batch, not_shown.status))
            except (Outage, JudgeError) as failure:
                self._n_failed[batch.intent] += 1
                failures.append(failure)
                if len(failures) == _MAX_FAILURES:
                    break
        hard = [failure for failure in failures if isinstance(failure, JudgeError)]
        return BatchProgress(tuple(retry_keys), tuple(invisible), next(iter([*hard, *failures]), None))

    async def _check_batch(self, batch: JudgeBatch) -> list[str]:
        """Check one batch and store its results if it ended; returns the keys to request again."""
        from anthropic import APIError

        assert batch.batch is not None, "a sent batch has an id"
        try:
            state = await self._client.messages.batches.retrieve(batch.batch)
        except APIError as error:
            raise self._failure(error) from None
        if not _is_batch(state):
            raise self._no_answer()
        self._shown.add(batch.batch)
        self._n_invisible[batch.intent] = 0
        if state.processing_status != "ended":
            return []
        return self._close_batch(batch.intent) if state.results_url is None else await self._ingest(batch)

    def _failure(self, error: APIError) -> _NotShown | JudgeError | Outage:
        """The exception for an API error in a call about one batch."""
        status = getattr(error, "status_code", 0)
        return _NotShown(status) if status in _INVISIBLE else api_error(error, self._settings, self._key)

    def _may_come(self, batch: JudgeBatch, status: int) -> bool:
        """Whether a batch that is not shown may still bring results.

        A batch of another account's key looks as if it had been deleted. It counts as deleted only if this key has seen it.
        """
        self._n_invisible[batch.intent] += 1
        was_shown = status == 404 and batch.batch in self._shown
        is_deleted = was_shown and self._n_invisible[batch.intent] >= DELETED_AFTER
        return not is_deleted and time.time() - batch.made_at < RESULTS_KEPT_S

    def _invisible_batch(self, batch: JudgeBatch, status: int) -> InvisibleBatch:
        waiting = frozenset(item.key for item in self._ledger.batch_items(batch.intent) if item.state == "reserved")
        until = datetime.datetime.fromtimestamp(batch.made_at + RESULTS_KEPT_S, datetime.UTC).date()
        line = (
            f"batch {batch.batch} is not shown to this API key ({status}): it may be another account's; "
            f"{len(waiting)} judgements wait for the key that it was sent with, and are asked again after {until}"
        )
        return InvisibleBatch(batch.intent, waiting, line)

    async def _ingest(self, batch: JudgeBatch) -> list[str]:
        items = {item.custom_id: item for item in self._ledger.batch_items(batch.intent)}
        waiting: list[Operation] = []
        async for line in self._results(batch.batch or ""):
            item, result = items.get(str(line.get("custom_id"))), line.get("result")
            if item is None:
                self.n_foreign += 1
            elif item.state == "reserved":
                waiting.append(self._result_operation(item, result if isinstance(result, dict) else {}))
            if len(waiting) >= _INGEST_ITEMS:
                self._ledger.apply(waiting)
                waiting = []
        self._ledger.apply(waiting)
        return self._close_batch(batch.intent)

    def _close_batch(self, intent: str) -> list[str]:
        """Close a batch; items without a result count as missing. Returns the keys to request again."""
        items = self._ledger.batch_items(intent)
        self._ledger.apply([self._result_operation(item, {}) for item in items if item.state == "reserved"])
        self._ledger.close_batch(intent)
        keys = [item.key for item in items]
        done = self._ledger.judgements(keys)
        return [key for key in keys if key not in done]

    def _result_operation(self, item: BatchItem, result: dict[str, Any]) -> Operation:
        """The ledger operation that settles an item's reservation by its result."""
        request, kind = self._requests.get(item.key), str(result.get("type"))
        history = self._ledger.history(item.key)
        reply: RawReply | None = None
        if kind == "succeeded":
            reply = parse_reply(
                result.get("message"),
                self._price,
                transport="batch",
                key=self._key,
                worst=item.usd,
                factor=self._factor,
            )
        if reply is not None and request is None:
            return Settle(item.ticket, item.key, reply, None)
        if reply is not None and request is not None:
            reply, final = conclude_reply(request, reply, history.n_unread)
            return Settle(item.ticket, item.key, reply, final)
        # An item without a result may have been billed, so its reservation stays.
        outcome = kind if kind in ("expired", "errored", "canceled") else "missing"
        given_up = history.n_failed >= MAX_RESUBMISSIONS and request is not None
        reason = "errored" if outcome == "errored" else "expired"
        return Unpaid(item.ticket, outcome, unscored_judgement(request, reason) if given_up and request else None)

    async def _results(self, batch: str) -> AsyncGenerator[dict[str, Any], None]:
        """Yield a batch's results as JSON objects made safe; lines that hold none are left out.

        Raises Outage if the stream breaks off or holds no result at all (it can be read again), or _NotShown.
        """
        import httpx2
        from anthropic import AnthropicError, APIError

        n_read = n_bad = 0
        results = self._client.messages.batches.with_streaming_response.results(batch)
        try:
            async with results as response, aclosing(_lines(response.iter_bytes())) as lines:
                async for line in lines:
                    result = json_object(line, self._key)
                    n_read, n_bad = n_read + (result is not None), n_bad + (result is None)
                    if result is not None:
                        yield result
        except APIError as error:
            raise self._failure(error) from None
        except (httpx2.HTTPError, AnthropicError, ValueError):
            raise Outage(f"the results of batch {batch} broke off") from None
        if n_bad and not n_read:
            raise self._no_answer()

    async def close(self) -> None:
        """Close the HTTP connections."""
        await self._client.close()


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


def _is_batch(value: object) -> TypeGuard[MessageBatch]:
    """Whether a parsed answer has what is read of a batch; the SDK passes on whatever a server sends."""
    counts = getattr(value, "request_counts", None)
    numbers = [getattr(counts, name, None) for name in ("processing", "succeeded", "errored", "canceled", "expired")]
    texts = [getattr(value, name, None) for name in ("id", "processing_status")]
    return (
        all(isinstance(text, str) and len(text) <= MAX_NAME_CHARS and text.isprintable() for text in texts)
        and all(isinstance(n, int) for n in numbers)
        and isinstance(getattr(value, "created_at", None), datetime.datetime)
        and isinstance(getattr(value, "results_url", None), str | None)
    )


def _n_items(batch: MessageBatch) -> int:
    counts = batch.request_counts
    return counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
