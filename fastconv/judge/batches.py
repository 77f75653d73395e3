"""Judging in batches, at a lower price than live requests; any provider's batches go through here (`BatchApi`).

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
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from fastconv.errors import JudgeError
from fastconv.judge.budget import Price, worst_usd
from fastconv.judge.http import Outage
from fastconv.judge.request import JudgeRequest
from fastconv.recipe import JudgeSettings
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.records import BatchItem, JudgeBatch, Operation, RawReply, Refusal, Reserve, Settle, Unpaid

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
#: So many failed batches in one round mean that the API itself is unavailable.
_MAX_FAILURES = 3


@dataclass(frozen=True)
class BatchCard:
    """A batch of `n` items as the API shows it; `created_s` in Unix seconds. Results may be gone although it has ended."""

    id: str
    created_s: float
    n: int
    ended: bool
    has_results: bool


class NotShown(Exception):
    """The API shows no such batch to this key; `status` is the HTTP status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class BatchApi(Protocol):
    """What `Batches` needs of a provider. All calls raise Outage and JudgeError; those about one batch raise NotShown too."""

    async def create(self, items: Sequence[tuple[str, JudgeRequest, bool]]) -> str:
        """Send a batch of (custom id, request, whether it is asked again), once; its id. See Outage for `taken`."""
        ...

    async def look(self, batch: str) -> BatchCard:
        """A batch as it stands now."""
        ...

    def newest_first(self) -> AsyncGenerator[BatchCard, None]:
        """The account's batches."""
        ...

    def results(self, batch: str) -> AsyncGenerator[tuple[str, str, Any], None]:
        """(custom id, `succeeded` or why not, message) of a batch that has ended."""
        ...

    def parse(self, message: object, worst_usd: float) -> RawReply | None:
        """The reply in a message, or None if it is none; `worst_usd` is the most that it can have cost."""
        ...


@dataclass(frozen=True)
class InvisibleBatch:
    """A batch that the API does not show to this key: its intent, the judgement keys that wait for it, and a status line."""

    intent: str
    keys: frozenset[str]
    line: str


class Batches:
    """Sends requests as batches and stores their results. Use inside one event loop.

    `requests` holds the desk's unfinished requests by key; the desk changes it. Results of other keys are stored as raw
    replies, and read when somebody asks for them. `factor` multiplies `price` for batches.
    """

    def __init__(
        self, api: BatchApi, settings: JudgeSettings, ledger: JudgeLedger, price: Price, factor: float,
        requests: Mapping[str, JudgeRequest],
    ) -> None:  # fmt: skip
        self._api = api
        self._settings = settings
        self._ledger = ledger
        self._price = price
        self._factor = factor
        self._requests = requests
        #: Batches that were not shown to this key when they were last looked at.
        self.invisible: tuple[InvisibleBatch, ...] = ()
        #: Batch ids that this key was shown; by intent, how often a check failed, and how often it showed no batch.
        self._shown: set[str] = set()
        self._n_failed: Counter[str] = Counter()
        self._n_invisible: Counter[str] = Counter()

    def any_open(self) -> bool:
        """Whether a batch was sent, or perhaps sent, whose results are not in the ledger."""
        return bool(self._ledger.batches("sent") or self._ledger.batches("intended"))

    def any_to_come(self) -> bool:
        """Whether the results of a sent batch will still free a part of its reservations."""
        invisible = {batch.intent for batch in self.invisible}
        return any(batch.intent not in invisible for batch in self._ledger.batches("sent"))

    # --- sending ----------------------------------------------------------------------------------------

    async def submit(self, requests: Sequence[JudgeRequest]) -> dict[str, Refusal]:
        """Send requests in as few batches as the API's limits allow; the keys that the ledger refused, with the reason.

        Raises Outage when it is unknown whether a batch was accepted (its intent is reconciled later), JudgeError when
        sending more makes no sense. Neither leaves a reservation for a batch that was certainly not accepted.
        """
        refused: dict[str, Refusal] = {}
        for chunk in _chunks(requests):
            reservations = [Reserve(request.key, worst_usd(request, self._price, self._factor)) for request in chunk]
            intent, results = self._ledger.write_intent(reservations)
            outcomes = zip(chunk, results, strict=True)
            refused |= {request.key: result for request, result in outcomes if not isinstance(result, int)}
            if any(isinstance(result, int) for result in results):
                await self._create(intent, {request.key: request for request in chunk})
        return refused

    async def _create(self, intent: str, chunk: Mapping[str, JudgeRequest]) -> None:
        """Send the booked items of an intent."""
        items = [
            (item.custom_id, chunk[item.key], bool(self._ledger.unread(item.key)))
            for item in self._ledger.batch_items(intent)
        ]
        try:
            batch = await self._api.create(items)
        except (Outage, JudgeError) as error:
            if isinstance(error, Outage) and error.taken:
                self._ledger.release_batch(intent)
            else:
                self._ledger.void_batch(intent)
            raise
        self._ledger.set_batch_id(intent, batch)

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
        candidates = await self._recent(min(intent.made_at for intent in intents) - CLOCK_SKEW_S)
        n_open = 0
        for intent in intents:
            own = {item.custom_id for item in self._ledger.batch_items(intent.intent)}
            proved, running, unproved = None, False, False
            for batch in candidates:
                if batch.n != intent.n or batch.created_s < intent.made_at - CLOCK_SKEW_S:
                    continue
                if not batch.ended:
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
                self._close(intent.intent)
            else:
                self._ledger.void_batch(intent.intent)
        return n_open

    async def _recent(self, since_s: float) -> list[BatchCard]:
        """The API's batches created after `since_s` (Unix seconds) that no intent is attached to."""
        known_ids, batches = self._ledger.known_batch_ids(), []
        async with aclosing(self._api.newest_first()) as listed:
            async for batch in listed:
                if batch.created_s < since_s:
                    break
                if batch.id not in known_ids:
                    batches.append(batch)
        return batches

    async def _holds(self, batch: BatchCard, own: set[str]) -> bool | None:
        """Whether a batch that ended holds one of the custom ids `own`; None if its results are gone.

        Custom ids are unique, so a single match is proof.
        """
        if not batch.has_results:
            return None
        try:
            async with aclosing(self._api.results(batch.id)) as results:
                async for custom_id, _, _ in results:
                    if custom_id in own:
                        return True
        except NotShown:
            return None
        return False

    def _is_young(self, batch: JudgeBatch) -> bool:
        """Whether a batch is so new that the API's list may not show it yet."""
        return abs(time.time() - batch.made_at) < self._settings.batch_grace_s  # a clock may have gone back

    # --- results ----------------------------------------------------------------------------------------

    async def collect(self) -> tuple[list[str], Outage | JudgeError | None]:
        """Store the results of every batch that ended: the keys to request again, and the first failure.

        A batch that fails does not keep the others from being read.
        """
        retry_keys: list[str] = []
        invisible: list[InvisibleBatch] = []
        failures: list[Outage | JudgeError] = []
        # Oldest first, but those that failed before come last.
        for batch in sorted(self._ledger.batches("sent"), key=lambda batch: self._n_failed[batch.intent]):
            try:
                retry_keys += await self._check(batch)
            except NotShown as not_shown:
                if not self._may_come(batch, not_shown.status):
                    retry_keys += self._close(batch.intent)
                elif not self._is_young(batch):
                    invisible.append(self._invisible_batch(batch, not_shown.status))
            except (Outage, JudgeError) as failure:
                self._n_failed[batch.intent] += 1
                failures.append(failure)
                if len(failures) == _MAX_FAILURES:
                    break
        self.invisible = tuple(invisible)
        hard = [failure for failure in failures if isinstance(failure, JudgeError)]
        return retry_keys, next(iter([*hard, *failures]), None)

    async def _check(self, batch: JudgeBatch) -> list[str]:
        """Check one batch and store its results if it ended; returns the keys to request again."""
        assert batch.batch is not None, "a sent batch has an id"
        card = await self._api.look(batch.batch)
        self._shown.add(batch.batch)
        self._n_invisible[batch.intent] = 0
        if not card.ended:
            return []
        if card.has_results:
            await self._ingest(batch.intent, batch.batch)
        return self._close(batch.intent)

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

    async def _ingest(self, intent: str, batch: str) -> None:
        items = {item.custom_id: item for item in self._ledger.batch_items(intent) if item.state == "reserved"}
        waiting: list[Operation] = []
        async with aclosing(self._api.results(batch)) as results:
            async for custom_id, kind, message in results:
                if custom_id in items:
                    waiting.append(self._end(items[custom_id], kind, message))
                if len(waiting) >= _INGEST_ITEMS:
                    self._ledger.apply(waiting)
                    waiting = []
        self._ledger.apply(waiting)

    def _close(self, intent: str) -> list[str]:
        """Close a batch; items without a result count as missing. Returns the keys to request again."""
        items = self._ledger.batch_items(intent)
        self._ledger.apply([self._end(item, "missing", None) for item in items if item.state == "reserved"])
        self._ledger.close_batch(intent)
        keys = [item.key for item in items]
        done = self._ledger.judgements(keys)
        return [key for key in keys if key not in done]

    def _end(self, item: BatchItem, kind: str, message: object) -> Operation:
        """The ledger operation that settles an item's reservation by its result."""
        request = self._requests.get(item.key)
        reply = self._api.parse(message, item.usd) if kind == "succeeded" else None
        if reply is not None:
            final = None
            if request is not None:
                reply, final = request.read(reply, self._ledger.unread(item.key))
            return Settle(item.ticket, item.key, reply, final)
        # An item without a result may have been billed, so its reservation stays.
        outcome = kind if kind in ("expired", "errored", "canceled") else "missing"
        given_up = request is not None and self._ledger.n_failed(item.key) >= MAX_RESUBMISSIONS
        reason = "errored" if outcome == "errored" else "expired"
        return Unpaid(item.ticket, outcome, request.unscored(reason) if request and given_up else None)


def _chunks(requests: Sequence[JudgeRequest]) -> list[list[JudgeRequest]]:
    """Requests in groups that the API takes as one batch."""
    chunks: list[list[JudgeRequest]] = []
    n_bytes = 0
    for request in requests:
        size = request.max_prompt_tok  # one token per byte of the body, and room for the envelope
        if not chunks or len(chunks[-1]) == MAX_ITEMS or n_bytes + size > MAX_BYTES:
            chunks.append([])
            n_bytes = 0
        chunks[-1].append(request)
        n_bytes += size
    return chunks
