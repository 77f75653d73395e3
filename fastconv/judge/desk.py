"""The judge beside the GPU: a thread with its own event loop and its own connection to the ledger.

`submit` only hands samples over, so the training loop never waits for a judge. What the desk cannot finish (outage,
budget, a key another process is asking) stays pending: the completions are in the ledger, and the same keys are found
again by whoever submits them next.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastconv.errors import JudgeError
from fastconv.judge.batches import BatchJudge, InvisibleBatch
from fastconv.judge.budget import Price
from fastconv.judge.claude import ApiKey, LiveJudge, LoopLedger, Outage, PendingJudgement, concluded
from fastconv.judge.identity import params_of, requests_of
from fastconv.judge.request import JudgeRequest
from fastconv.judge.rubric import Rubric
from fastconv.recipe import JudgeSettings
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Sample, Store
from fastconv.store.records import Judgement, Money, Refusal


@dataclass(frozen=True)
class DeskStatus:
    """Where judging stands. `problem` is one line, or "" when all is well."""

    n_asked: int = 0
    n_scored: int = 0
    n_unscored: int = 0
    n_stages: int = 0
    #: Stages whose every sample has a judgement.
    finished: frozenset[str] = frozenset()
    money: Money = field(default_factory=lambda: Money(0.0, 0.0, 0.0, None))
    problem: str = ""
    #: The judge is out for now (it is tried again), or done with for good (key refused, budget spent).
    out: bool = False
    stopped: bool = False

    @property
    def n_pending(self) -> int:
        """Judgements asked for and not finished."""
        return self.n_asked - self.n_scored - self.n_unscored


@dataclass
class DeskState:
    """What the desk was asked, inside its thread."""

    requests: dict[str, JudgeRequest] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    n_scored: int = 0
    #: Keys that a stage still waits for, and the stages that wait for a key.
    waits_for: dict[str, set[str]] = field(default_factory=dict)
    wanted_by: dict[str, set[str]] = field(default_factory=dict)
    #: Unreadable replies by key, where there are any.
    n_unread: dict[str, int] = field(default_factory=dict)
    problem: str = ""
    n_outages: int = 0
    stopped: bool = False
    #: How often a stage's last judgement came in.
    n_finished: int = 0

    def want(self, stage: str, request: JudgeRequest) -> bool:
        """Enter one request of a stage; True if its key is new."""
        waits = self.waits_for.setdefault(stage, set())
        if request.key not in self.done:
            waits.add(request.key)
            self.wanted_by.setdefault(request.key, set()).add(stage)
        is_new = request.key not in self.requests
        self.requests.setdefault(request.key, request)
        return is_new

    def finish(self, judgement: Judgement) -> None:
        """Cross a judgement off, once."""
        if judgement.key not in self.done:
            self.done.add(judgement.key)
            self.n_scored += judgement.reason is None
            for stage in self.wanted_by.pop(judgement.key, ()):
                self.waits_for[stage].discard(judgement.key)
                self.n_finished += not self.waits_for[stage]

    def pending(self) -> bool:
        """Whether anything asked for is not finished."""
        return len(self.done) < len(self.requests)


def look_up(ledger: JudgeLedger, requests: Sequence[JudgeRequest]) -> tuple[dict[str, Judgement], dict[str, int]]:
    """What the ledger knows of requests: finished judgements, and the number of unreadable replies of the others.

    A reply that came when nobody was waiting for it (its process had died) is read now.
    """
    known = ledger.judgements(request.key for request in requests)
    tried = ledger.sent_keys(request.key for request in requests if request.key not in known)
    unread: dict[str, int] = {}
    for request in requests:
        if request.key not in tried:
            continue
        for reply in ledger.replies(request.key):
            if reply.fault is not None or request.key in known:
                continue
            reply, final = concluded(request, reply, ledger.history(request.key).n_unread)
            if reply.fault is not None:
                ledger.set_fault(request.key, reply.fault)
            if final is not None:
                ledger.finish([final])
                known[request.key] = final
        unread[request.key] = ledger.history(request.key).n_unread
    return known, unread


#: Rounds of SDK retries that a request gets before the judge counts as out.
ROUNDS = 3
#: How long the desk rests in an outage before it tries again.
OUTAGE_PAUSE_S = 20.0
#: Batch rounds in a row that may fail before a desk that is being closed gives up.
BATCH_PATIENCE = 5
#: How often the desk looks: at its inbox and flags, at a key that another process is asking, at its own status.
_LOOK_S, _LOOK_AGAIN_S, _STATUS_S = 0.01, 0.5, 0.1
#: Requests built and looked up at a time, between which replies are served.
_SLICE = 32


class JudgeDesk:
    """Judges completions through Claude while the caller does something else.

    `submit` never blocks; `poll` tells how far it is; `close` waits for the rest (or lets it be). `auto` mode sends
    what is large and not urgent as batches and the rest live.
    """

    def __init__(
        self,
        settings: JudgeSettings,
        workspace: Path,
        price: Price,
        key: ApiKey,
        *,
        batch_factor: float = 0.5,
        reverse: bool = False,
    ) -> None:
        self._settings = settings
        self._workspace = workspace
        self._price = price
        self._factor = batch_factor
        self._key = key
        self._params = params_of(settings, price, reverse=reverse)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")
        self._status = DeskStatus()
        self._inbox: queue.SimpleQueue[tuple[str, Rubric, tuple[Sample, ...], bool]] = queue.SimpleQueue()
        self._closing = False
        self._abandon = False
        self._run: Future[None] = self._pool.submit(lambda: asyncio.run(self._main()))

    # --- for the caller's thread ------------------------------------------------------------------------

    def submit(self, stage: str, rubric: Rubric, samples: Sequence[Sample], *, urgent: bool = False) -> None:
        """Hand a stage's completions over and return at once. Handing the same ones over twice changes nothing."""
        self._inbox.put((stage, rubric, tuple(samples), urgent))

    def poll(self) -> DeskStatus:
        """How far judging is. Raises what ended the desk, if it broke (StoreError)."""
        if self._run.done():
            self._run.result()
        return self._status

    def close(self, *, wait: bool = True) -> DeskStatus:
        """End the desk and give its last status.

        With `wait` all that was handed over is judged first, unless the judge is out or the budget is spent; without,
        requests under way are dropped (they stay booked) and batches go on at the API until somebody asks again.
        """
        self._abandon = self._abandon or not wait
        self._closing = True
        try:
            self._run.result()
        finally:
            self._pool.shutdown()
        return self._status

    # --- inside the thread ------------------------------------------------------------------------------

    async def _main(self) -> None:
        self._live_queue: asyncio.Queue[JudgeRequest] = asyncio.Queue()
        self._batch_waiting: dict[str, JudgeRequest] = {}
        # Batches that our API key is not shown, the keys that wait for them, and live requests among those.
        self._unseen: tuple[InvisibleBatch, ...] = ()
        self._stuck: set[str] = set()
        self._parked: dict[str, JudgeRequest] = {}
        self._wake = asyncio.Event()
        self._book = DeskState()
        self._n_under_way = self._n_asking = 0
        self._patience = 1
        self._failed: asyncio.Future[Any] | None = None
        # Two connections: one that waits for the disk, for batches, and one for the many writes of live judging.
        store = Store.open(self._workspace)
        self._ledger = JudgeLedger(store, self._settings.budget_usd)
        self._quick = LoopLedger(self._workspace, self._settings.budget_usd)
        live = LiveJudge(self._settings, self._quick, self._price, self._key)
        batch = BatchJudge(self._settings, self._ledger, self._price, self._factor, self._key, self._book.requests)
        jobs = [self._receive(), self._keep_status(), self._work_batches(batch)]
        jobs += [self._work_live(live) for _ in range(self._settings.concurrency)]
        tasks = [asyncio.create_task(job) for job in jobs]
        end = asyncio.create_task(self._until_end())
        try:
            # A task other than `end` is done only when it broke.
            done, _ = await asyncio.wait([*tasks, end], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in [*tasks, end]:
                task.cancel()
            await asyncio.gather(*tasks, end, return_exceptions=True)
            await live.close()
            await batch.close()
            self._publish()
            await self._quick.close()
            self._ledger.release()
            store.close()

    async def _until_end(self) -> None:
        """Returns when the caller has closed the desk and nothing more can be done."""
        while True:
            if self._failed is not None:
                self._failed.result()
            idle = self._n_under_way == 0
            rest = self._book.pending() or not self._inbox.empty()
            if self._abandon or (self._closing and idle and (not rest or self._book.stopped or self._all_stuck())):
                return
            await asyncio.sleep(_LOOK_S)

    def _all_stuck(self) -> bool:
        """Whether all that is not finished waits for batches that our API key is not shown."""
        if not self._stuck or not self._inbox.empty():
            return False
        left = [key for key in self._book.requests if key not in self._book.done]
        return bool(left) and self._stuck.issuperset(left)

    async def _receive(self) -> None:
        while True:
            if self._inbox.empty():
                await asyncio.sleep(_LOOK_S)
                continue
            self._n_under_way += 1
            try:
                await self._take(*self._inbox.get())
            finally:
                self._n_under_way -= 1

    async def _take(self, stage: str, rubric: Rubric, samples: Sequence[Sample], urgent: bool) -> None:
        """Enter a stage's samples in the book and send on what the ledger cannot answer."""
        self._quick.ledger.save_rubric(rubric.sha256, rubric.name, rubric.source)
        fresh: list[JudgeRequest] = []
        for start in range(0, len(samples), _SLICE):
            requests = requests_of(rubric, self._params, samples[start : start + _SLICE])
            new = self._not_known([request for request in requests if self._book.want(stage, request)])
            await asyncio.sleep(0)  # replies are served between two slices
            if self._goes_live(len(samples), urgent):
                self._ask_live(new)  # at once: the first are answered while the rest are looked up
            else:
                fresh += new
        if self._goes_live(len(fresh), urgent):
            self._ask_live(fresh)
        else:
            self._batch_waiting |= {request.key: request for request in fresh}
            self._wake.set()

    def _goes_live(self, n: int, urgent: bool) -> bool:
        """Whether so many judgements are asked for live and not as a batch."""
        mode = self._settings.mode
        return mode == "live" or (mode == "auto" and (urgent or n < self._settings.batch_from))

    def _ask_live(self, requests: Sequence[JudgeRequest]) -> None:
        for request in requests:
            self._live_queue.put_nowait(request)

    def _not_known(self, requests: Sequence[JudgeRequest]) -> list[JudgeRequest]:
        """Cross off what the ledger can answer; gives the rest, with what was tried for it noted in the book."""
        known, unread = look_up(self._quick.ledger, requests)
        for judgement in known.values():
            self._book.finish(judgement)
        self._book.n_unread |= unread
        return [request for request in requests if request.key not in known]

    # --- live -------------------------------------------------------------------------------------------

    async def _work_live(self, live: LiveJudge) -> None:
        while True:
            request = await self._live_queue.get()
            self._n_under_way += 1
            try:
                if not self._book.stopped:
                    await self._judge_live(live, request)
            finally:
                self._n_under_way -= 1

    async def _judge_live(self, live: LiveJudge, request: JudgeRequest) -> None:
        """One request to its end, to a stop of the desk, or back into the queue."""
        n_rounds = 0
        while not self._book.stopped:
            self._n_asking += 1
            try:
                outcome = await live.judge(request, self._book.n_unread.get(request.key, 0))
            except Outage as outage:
                n_rounds += 1
                self._not_known([request])
                if n_rounds >= ROUNDS:
                    self._live_queue.put_nowait(request)
                    self._patience = 1
                    await self._rest(str(outage), max(outage.wait_s, OUTAGE_PAUSE_S))
                    return
                await asyncio.sleep(outage.wait_s)  # the SDK does not wait after its last sending
                continue
            except JudgeError as error:
                self._stop(str(error))
                return
            finally:
                self._n_asking -= 1
            if isinstance(outcome, PendingJudgement):
                self._book.problem, self._book.n_outages = "", 0
                self._n_under_way += 1
                outcome.written.add_done_callback(partial(self._written, outcome.judgement))
                return
            await self._after_refusal(request, outcome)
            if request.key in self._book.done or request.key in self._parked:
                return

    def _written(self, judgement: Judgement, done: asyncio.Future[Any]) -> None:
        """A judgement counts when the ledger has it, and not before."""
        self._n_under_way -= 1
        if done.cancelled() or done.exception() is not None:
            self._failed = self._failed or done
        else:
            self._book.finish(judgement)

    async def _after_refusal(self, request: JudgeRequest, refusal: Refusal) -> None:
        if refusal == "done":
            self._not_known([request])
        elif refusal == "held" and request.key in self._stuck:
            self._parked[request.key] = request  # this worker is free for others
        elif refusal == "held":
            await asyncio.sleep(_LOOK_AGAIN_S)
        elif self._n_asking or self._batches_to_come():
            await asyncio.sleep(2 * _LOOK_S)  # replies under way will free a part of what is booked for them
        else:
            self._stop_at_budget()

    # --- batches ----------------------------------------------------------------------------------------

    async def _work_batches(self, batch: BatchJudge) -> None:
        """Reconcile, send, collect, rest; an open question about an old batch holds back new ones."""
        while True:
            self._wake.clear()
            if self._batch_waiting or self._ledger.batches("sent") or self._ledger.batches("intended"):
                self._n_under_way += 1
                try:
                    await self._batch_round(batch)
                    if not self._book.stopped:
                        self._book.problem, self._book.n_outages = "", 0
                except Outage as outage:
                    self._patience = BATCH_PATIENCE
                    await self._rest(str(outage), max(outage.wait_s, self._settings.batch_poll_s))
                except JudgeError as error:
                    self._stop(str(error))
                finally:
                    self._n_under_way -= 1
            # Not wait_for: in Python 3.11 it can swallow the cancellation that ends this task (python/cpython#86296).
            until = time.monotonic() + self._settings.batch_poll_s
            while time.monotonic() < until and not self._wake.is_set():
                await asyncio.sleep(_LOOK_S)

    async def _batch_round(self, batch: BatchJudge) -> None:
        failure: Outage | JudgeError | None = None
        try:
            n_open = await batch.reconcile()
            if self._batch_waiting and not n_open and not self._book.stopped:
                await self._send_batches(batch)
        except Outage as outage:
            failure = outage  # what is under way is looked at all the same
        found = await batch.collect()
        self._unseen = found.unseen
        self._stuck = {key for one in found.unseen for key in one.keys}
        again = [key for key in found.again if key in self._book.requests and key not in self._parked]
        self._batch_waiting |= {key: self._book.requests[key] for key in again}
        for key in [key for key in self._parked if key not in self._stuck]:
            self._live_queue.put_nowait(self._parked.pop(key))
        unfinished = [request for key, request in self._book.requests.items() if key not in self._book.done]
        for judgement in self._ledger.judgements(request.key for request in unfinished).values():
            self._book.finish(judgement)
        if again:
            self._wake.set()
        failure = failure or found.failure
        if failure is not None:
            raise failure

    def _batches_to_come(self) -> bool:
        """Whether a batch is under way whose results will free a part of what is booked for it."""
        hidden = {one.intent for one in self._unseen}
        return any(one.intent not in hidden for one in self._ledger.batches("sent"))

    async def _send_batches(self, batch: BatchJudge) -> None:
        """Send what waits; what the ledger refuses waits on, unless it is done already."""
        # Taken out first: more may be put in while this waits for the API.
        taken, self._batch_waiting = self._batch_waiting, {}
        try:
            refused = (await batch.submit(self._not_known(list(taken.values())))).refused
        except (Outage, JudgeError):
            self._batch_waiting |= taken
            raise
        unread = self._not_known([taken[key] for key, why in refused.items() if why == "done"])
        self._batch_waiting |= {key: taken[key] for key, why in refused.items() if why != "done"}
        self._batch_waiting |= {request.key: request for request in unread}
        if "over budget" in refused.values() and not self._batches_to_come():
            self._stop_at_budget()

    # --- stops and status -------------------------------------------------------------------------------

    async def _rest(self, problem: str, pause_s: float) -> None:
        """Wait in an outage. A caller that waits for the end is kept waiting for some outages in a row."""
        self._book.problem = problem
        self._book.n_outages += 1
        until = time.monotonic() + pause_s
        while time.monotonic() < until and not (self._closing and self._book.n_outages >= self._patience):
            await asyncio.sleep(5 * _LOOK_S)
        if self._closing and self._book.n_outages >= self._patience:
            self._book.stopped = True

    def _stop(self, problem: str) -> None:
        self._book.problem = problem
        self._book.stopped = True

    def _stop_at_budget(self) -> None:
        self._stop(f"judge.budget_usd = {self._settings.budget_usd:g} is spent; raise it and run `fastconv judge`")

    async def _keep_status(self) -> None:
        n_finished = 0
        while True:
            self._publish()
            until = time.monotonic() + _STATUS_S
            while time.monotonic() < until and self._book.n_finished == n_finished:
                await asyncio.sleep(_LOOK_S)
            n_finished = self._book.n_finished

    def _publish(self) -> None:
        book = self._book
        finished = frozenset(stage for stage, waits in book.waits_for.items() if not waits)
        problem = book.problem or next((one.line for one in self._unseen), "")
        self._status = DeskStatus(
            len(book.requests), book.n_scored, len(book.done) - book.n_scored, len(book.waits_for), finished,
            self._quick.ledger.money(), problem, book.n_outages >= self._patience or self._all_stuck(), book.stopped,
        )  # fmt: skip
