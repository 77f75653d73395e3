"""Claude for half the price: Message Batches that survive a crash without an item paid twice.

An intent with its bookings is written first, then the batch is created without retries, then its id is noted. Whatever
happens in between leaves an intent without an id. Such an intent is reconciled with the API's list of batches before
anything is sent again: a batch of its size that still runs may be it, so we wait; one that has ended shows by the
custom ids of its results, which carry the digests of our requests and the numbers of our bookings.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastconv.judgements import Batch, BatchItem, Operation, RawReply, Refusal, Reserve, Settle, Unpaid
from fastconv.judging.budget import Price, worst_usd
from fastconv.judging.client import ApiKey, Outage, concluded, explained, make_client, reply_of, unscored
from fastconv.judging.request import JudgeRequest
from fastconv.recipe import JudgeSettings, canonical_json
from fastconv.store_judging import JudgeLedger

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic
    from anthropic.types.messages import MessageBatch

#: Limits of the API, the second with room for the envelope.
MAX_ITEMS, MAX_BYTES = 10_000, 200_000_000
#: Items that brought no reply are sent again at most so often.
MAX_RESUBMISSIONS = 2
#: How far the API's clock and ours may differ when a batch is looked for by its time.
CLOCK_SKEW_S = 300.0
#: Results are written down in pieces, so that a crash while reading costs little work and no money.
_INGEST_ITEMS = 200


@dataclass(frozen=True)
class Sent:
    """What became of requests handed to `submit`: those refused by the ledger, and why. The rest are under way."""

    refused: dict[str, Refusal]


@dataclass
class _Intake:
    """One batch's results on their way into the ledger."""

    items: dict[str, BatchItem]
    waiting: list[Operation]
    seen: set[str]


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

    # --- sending ----------------------------------------------------------------------------------------

    async def submit(self, requests: Sequence[JudgeRequest]) -> Sent:
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
        return Sent(refused)

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
                self._ledger.void(intent)  # refused for sure
            else:
                self._ledger.disown(intent)
            raise explained(error, self._settings, self._key) from None
        except APIError as error:
            self._ledger.disown(intent)
            raise explained(error, self._settings, self._key) from None
        self._ledger.attach(intent, batch.id)

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
        be it, and left open otherwise. Raises Outage or JudgeError.
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
            running = False
            for batch in possible:
                if batch.processing_status != "ended":
                    running = True
                elif await self._holds(batch, own):
                    found = batch
            if found is not None:
                self._ledger.attach(intent.intent, found.id)
            elif running or time.time() - intent.made_at < self._settings.batch_grace_s:
                n_open += 1
            else:
                self._ledger.void(intent.intent)
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

    async def _holds(self, batch: MessageBatch, own: set[str]) -> bool:
        """Whether a batch that ended holds one of these custom ids. They are unique, so one is proof."""
        async with aclosing(self._results(batch.id)) as lines:
            async for line in lines:
                if str(line.get("custom_id")) in own:
                    return True
        return False

    # --- results ----------------------------------------------------------------------------------------

    async def collect(self) -> list[str]:
        """Take the results of every batch that ended; gives the keys that have to be asked again.

        Raises Outage or JudgeError; what was written down until then stays.
        """
        from anthropic import APIError

        again: list[str] = []
        for batch in self._ledger.batches("sent"):
            assert batch.batch is not None, "a sent batch has an id"
            try:
                state = await self._client.messages.batches.retrieve(batch.batch)
            except APIError as error:
                raise explained(error, self._settings, self._key) from None
            if state.processing_status == "ended":
                again += await self._ingest(batch)
        return again

    async def _ingest(self, batch: Batch) -> list[str]:
        intake = _Intake({item.custom_id: item for item in self._ledger.batch_items(batch.intent)}, [], set())
        async for line in self._results(batch.batch or ""):
            item = intake.items.get(str(line.get("custom_id")))
            if item is None:
                self.n_foreign += 1
                continue
            intake.seen.add(item.custom_id)
            if item.state == "reserved":
                intake.waiting.append(self._taken(item, line.get("result") or {}))
            if len(intake.waiting) >= _INGEST_ITEMS:
                self._ledger.apply(intake.waiting)
                intake.waiting = []
        missing = [item for item in intake.items.values() if item.custom_id not in intake.seen]
        self._ledger.apply([*intake.waiting, *(self._taken(item, {}) for item in missing)])
        self._ledger.close_batch(batch.intent)
        keys = [item.key for item in intake.items.values()]
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
        """The lines of a batch's results. Raises Outage if they break off; they can be read again."""
        import httpx2
        from anthropic import AnthropicError, APIError

        try:
            async for one in await self._client.messages.batches.results(batch):
                yield one.to_dict(mode="json")
        except APIError as error:
            raise explained(error, self._settings, self._key) from None
        except (httpx2.HTTPError, AnthropicError, ValueError):
            raise Outage(f"the results of batch {batch} broke off") from None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def _n_items(batch: MessageBatch) -> int:
    counts = batch.request_counts
    return counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
