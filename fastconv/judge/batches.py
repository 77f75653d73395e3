"""Claude for half the price: Message Batches that survive a crash without an item paid twice.

An intent with its bookings is written first, then the batch is created without retries, then its id is noted. Whatever
happens in between leaves an intent without an id. Such an intent is reconciled with the API's list of batches before
anything is sent again: a batch of its size that still runs may be it, so we wait; one that has ended shows by the
custom ids of its results, which carry the digests of our requests and the numbers of our bookings.

Every batch under way is looked at on its own. One that the API does not show to our key may come back with the key that
it was sent with: it stays open, and whatever does not wait for it goes on. One whose results can never come (archived,
deleted) is closed; its money stays booked as lost, as it may have been spent, and its items are asked again.
"""

from __future__ import annotations

import datetime
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastconv.errors import JudgeError
from fastconv.judge.budget import Price, worst_usd
from fastconv.judge.claude import ApiKey, Outage, concluded, explained, make_client, reply_of, unscored
from fastconv.judge.request import JudgeRequest
from fastconv.recipe import JudgeSettings, canonical_json
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.records import BatchItem, JudgeBatch, Operation, RawReply, Refusal, Reserve, Settle, Unpaid

if TYPE_CHECKING:
    from anthropic import APIError, AsyncAnthropic
    from anthropic.types.messages import MessageBatch

#: Limits of the API, the second with room for the envelope.
MAX_ITEMS, MAX_BYTES = 10_000, 200_000_000
#: Items that brought no reply are sent again at most so often.
MAX_RESUBMISSIONS = 2
#: How far the API's clock and ours may differ when a batch is looked for by its time.
CLOCK_SKEW_S = 300.0
#: Results are written down in pieces, so that a crash while reading costs little work and no money.
_INGEST_ITEMS = 200
#: The API keeps results for 29 days. A batch that it has not shown for longer can never bring any.
KEPT_S = 30 * 86_400.0
#: How often in a row a batch that this key has seen must be unknown before it counts as deleted.
DELETED_LOOKS = 3
#: Answers that mean "not for this key" when they are about one batch.
_UNSEEN = (400, 403, 404)
#: Batches that may fail in one round before the API itself counts as out.
_MAX_FAILURES = 3


@dataclass(frozen=True)
class SubmitResult:
    """What became of requests handed to `submit`: those refused by the ledger, and why. The rest are under way."""

    refused: dict[str, Refusal]


@dataclass(frozen=True)
class InvisibleBatch:
    """A batch that the API does not show to this key: its intent, the keys that wait for it, and one line about it."""

    intent: str
    keys: frozenset[str]
    line: str


@dataclass(frozen=True)
class BatchProgress:
    """What one look at the batches under way brought: keys to be asked again, batches not seen, and what failed."""

    again: tuple[str, ...]
    unseen: tuple[InvisibleBatch, ...]
    failure: Outage | JudgeError | None


class _NotShown(Exception):
    """The API shows no such batch to this key."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class BatchJudge:
    """Asks Claude through the Message Batches API. Use inside one event loop.

    `requests` is the desk's book of what is wanted: results of a key that is not in it are kept as raw replies only.
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
        #: Results whose custom id was none of ours.
        self.n_foreign = 0
        #: Batches that this key was shown, and by intent how often a look failed or showed nothing.
        self._shown: set[str] = set()
        self._n_failed: Counter[str] = Counter()
        self._n_hidden: Counter[str] = Counter()

    # --- sending ----------------------------------------------------------------------------------------

    async def submit(self, requests: Sequence[JudgeRequest]) -> SubmitResult:
        """Send requests in as many batches as the API's limits ask for.

        Raises Outage when it is not known whether a batch was taken (its intent is then reconciled), JudgeError when
        asking on makes no sense. Both leave nothing booked that was surely not taken.
        """
        refused: dict[str, Refusal] = {}
        for chunk in self._chunks(requests):
            asks = [Reserve(request.key, worst_usd(request, self._price, self._factor)) for request in chunk]
            intent, results = self._ledger.write_intent(asks)
            booked = [request for request, result in zip(chunk, results, strict=True) if isinstance(result, int)]
            for request, result in zip(chunk, results, strict=True):
                if not isinstance(result, int):
                    refused[request.key] = result
            if booked:
                await self._create(intent, booked)
        return SubmitResult(refused)

    async def _create(self, intent: str, requests: Sequence[JudgeRequest]) -> None:
        from anthropic import APIError, APIStatusError

        custom_ids = {item.key: item.custom_id for item in self._ledger.batch_items(intent)}
        body: Any = [
            {"custom_id": custom_ids[r.key], "params": r.body(re_ask=self._ledger.history(r.key).n_unread > 0)}
            for r in requests
        ]
        try:
            # No automatic retry: a second create could make a second batch, and both would be billed.
            batch = await self._client.with_options(max_retries=0).messages.batches.create(requests=body)
        except APIStatusError as error:
            if error.status_code < 500:
                self._ledger.void_batch(intent)  # refused for sure
            else:
                self._ledger.release_batch(intent)
            raise explained(error, self._settings, self._key) from None
        except APIError as error:
            self._ledger.release_batch(intent)
            raise explained(error, self._settings, self._key) from None
        self._ledger.set_batch_id(intent, batch.id)

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
        """Find out about every intent without a batch id; gives how many are still open questions.

        An intent is attached if a batch is proved to be its own, void if it is older than the grace and no batch can
        be it, and left open otherwise. One that may be a batch whose results are gone is closed as lost, not freed.
        Raises Outage or JudgeError.
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
            found = None
            running = unproved = False
            for batch in possible:
                if batch.processing_status != "ended":
                    running = True
                    continue
                holds = await self._holds(batch, own)
                found = batch if holds else found
                unproved = unproved or holds is None
            if found is not None:
                self._ledger.set_batch_id(intent.intent, found.id)
            elif running or self._is_young(intent):
                n_open += 1
            elif unproved:
                self._closed(intent.intent)
            else:
                self._ledger.void_batch(intent.intent)
        return n_open

    async def _recent(self, since: float) -> list[MessageBatch]:
        """Batches made since a moment that no intent is attached to."""
        from anthropic import APIError

        known, found = self._ledger.known_batch_ids(), []
        try:
            async for batch in self._client.messages.batches.list(limit=100):
                if batch.created_at.timestamp() < since:
                    break
                if batch.id not in known:
                    found.append(batch)
        except APIError as error:
            raise explained(error, self._settings, self._key) from None
        return found

    async def _holds(self, batch: MessageBatch, own: set[str]) -> bool | None:
        """Whether a batch that ended holds one of these custom ids; None if its results are gone.

        The ids are unique, so one is proof.
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
        """Whether the API's list may not know a batch yet."""
        return time.time() - batch.made_at < self._settings.batch_grace_s

    # --- results ----------------------------------------------------------------------------------------

    async def collect(self) -> BatchProgress:
        """Take the results of every batch that ended. A batch that fails does not keep the others from being read."""
        again: list[str] = []
        unseen: list[InvisibleBatch] = []
        failures: list[Outage | JudgeError] = []
        # Oldest first, but those that failed before come last.
        for batch in sorted(self._ledger.batches("sent"), key=lambda one: self._n_failed[one.intent]):
            try:
                again += await self._look(batch)
            except _NotShown as hidden:
                if not self._may_come(batch, hidden.status):
                    again += self._closed(batch.intent)
                elif not self._is_young(batch):
                    unseen.append(self._unseen(batch, hidden.status))
            except (Outage, JudgeError) as failure:
                self._n_failed[batch.intent] += 1
                failures.append(failure)
                if len(failures) == _MAX_FAILURES:
                    break
        hard = [failure for failure in failures if isinstance(failure, JudgeError)]
        return BatchProgress(tuple(again), tuple(unseen), next(iter([*hard, *failures]), None))

    async def _look(self, batch: JudgeBatch) -> list[str]:
        """Look at one batch and take its results if it ended; gives the keys that have to be asked again."""
        from anthropic import APIError

        assert batch.batch is not None, "a sent batch has an id"
        try:
            state = await self._client.messages.batches.retrieve(batch.batch)
        except APIError as error:
            raise self._failure(error) from None
        self._shown.add(batch.batch)
        self._n_hidden[batch.intent] = 0
        if state.processing_status != "ended":
            return []
        return self._closed(batch.intent) if state.results_url is None else await self._ingest(batch)

    def _failure(self, error: APIError) -> _NotShown | JudgeError | Outage:
        """A failure of a call about one batch."""
        status = getattr(error, "status_code", 0)
        return _NotShown(status) if status in _UNSEEN else explained(error, self._settings, self._key)

    def _may_come(self, batch: JudgeBatch, status: int) -> bool:
        """Whether a batch that is not shown may bring results yet.

        To another account's key a batch looks as if it had been deleted. It was deleted if this very key has seen it.
        """
        self._n_hidden[batch.intent] += 1
        was_shown = status == 404 and batch.batch in self._shown
        is_deleted = was_shown and self._n_hidden[batch.intent] >= DELETED_LOOKS
        return not is_deleted and time.time() - batch.made_at < KEPT_S

    def _unseen(self, batch: JudgeBatch, status: int) -> InvisibleBatch:
        waiting = frozenset(item.key for item in self._ledger.batch_items(batch.intent) if item.state == "reserved")
        until = datetime.datetime.fromtimestamp(batch.made_at + KEPT_S, datetime.UTC).date()
        line = (
            f"batch {batch.batch} is not shown to this API key ({status}): it may be another account's; "
            f"{len(waiting)} judgements wait for the key that it was sent with, and are asked again after {until}"
        )
        return InvisibleBatch(batch.intent, waiting, line)

    async def _ingest(self, batch: JudgeBatch) -> list[str]:
        items = {item.custom_id: item for item in self._ledger.batch_items(batch.intent)}
        waiting: list[Operation] = []
        async for line in self._results(batch.batch or ""):
            item = items.get(str(line.get("custom_id")))
            if item is None:
                self.n_foreign += 1
            elif item.state == "reserved":
                waiting.append(self._taken(item, line.get("result") or {}))
            if len(waiting) >= _INGEST_ITEMS:
                self._ledger.apply(waiting)
                waiting = []
        self._ledger.apply(waiting)
        return self._closed(batch.intent)

    def _closed(self, intent: str) -> list[str]:
        """Close a batch, what it brought no result for as missing; gives the keys that have to be asked again."""
        items = self._ledger.batch_items(intent)
        self._ledger.apply([self._taken(item, {}) for item in items if item.state == "reserved"])
        self._ledger.close_batch(intent)
        keys = [item.key for item in items]
        done = self._ledger.judgements(keys)
        return [key for key in keys if key not in done]

    def _taken(self, item: BatchItem, result: dict[str, Any]) -> Operation:
        """What one result means for its booking and its judgement."""
        request, kind = self._requests.get(item.key), str(result.get("type"))
        history = self._ledger.history(item.key)
        if kind == "succeeded":
            reply: RawReply = reply_of(
                canonical_json(result.get("message")), self._price, transport="batch", key=self._key, worst=item.usd,
                factor=self._factor,
            )  # fmt: skip
            if request is None:
                return Settle(item.ticket, item.key, reply, None)
            reply, final = concluded(request, reply, history.n_unread)
            return Settle(item.ticket, item.key, reply, final)
        # An item without a result may have been billed: it stays booked, and is asked again no oftener than the others.
        outcome = kind if kind in ("expired", "errored", "canceled") else "missing"
        given_up = history.n_failed >= MAX_RESUBMISSIONS and request is not None
        reason = "errored" if outcome == "errored" else "expired"
        return Unpaid(item.ticket, outcome, unscored(request, reason) if given_up and request else None)

    async def _results(self, batch: str) -> AsyncGenerator[dict[str, Any], None]:
        """The lines of a batch's results. Raises Outage if they break off (they can be read again), or _NotShown."""
        import httpx2
        from anthropic import AnthropicError, APIError

        try:
            async for one in await self._client.messages.batches.results(batch):
                yield one.to_dict(mode="json")
        except APIError as error:
            raise self._failure(error) from None
        except (httpx2.HTTPError, AnthropicError, ValueError):
            raise Outage(f"the results of batch {batch} broke off") from None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def _n_items(batch: MessageBatch) -> int:
    counts = batch.request_counts
    return counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
