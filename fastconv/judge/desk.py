"""The one desk that judges completions, for every kind of judge: live, in batches, local, and the resident base.

It works in a thread of its own, with its own event loop and ledger connections, while the GPU works. `submit` only queues
samples, so the training loop never waits for a judge; the resident base alone needs the caller's thread, and `submit`
lends it. A `Provider` sends and parses. What is sent is booked here first, and every reply is read and stored here.

What the desk cannot finish (outage, budget, a key that another process is asking) stays pending: the completions are in
the ledger, and submitting the same samples again, in this process or another, continues from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastconv.errors import JudgeError
from fastconv.judge.batches import Batches
from fastconv.judge.budget import JudgeIdentity, Price, worst_usd
from fastconv.judge.claude import Claude
from fastconv.judge.http import ApiKey, Outage
from fastconv.judge.local import ResidentJudge
from fastconv.judge.request import OpenRequests, PaidProvider, Provider, Request
from fastconv.judge.rubric import Rubric
from fastconv.recipe import JudgeSettings
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Sample, Store
from fastconv.store.records import Money, RawReply, Refusal, Reserve, Settle, Unpaid

#: A request that failed this often in a row counts as an outage; between its sendings the desk waits, twice as long each
#: time, and at least as long as the server asks. A server that asks for a longer wait than LONG_WAIT_S is out at once.
TRIES, FIRST_WAIT_S, MAX_WAIT_S, LONG_WAIT_S = 7, 0.5, 8.0, 10.0
#: Seconds that the desk waits in an outage before it tries again.
OUTAGE_PAUSE_S = 20.0
#: A desk that is being closed gives up after so many failed batch rounds in a row.
BATCH_PATIENCE = 5
#: Seconds between looks at the inbox and flags, at a key that another process is asking, and between status updates.
_LOOK_S, _LOOK_AGAIN_S, _STATUS_S = 0.01, 0.5, 0.1
#: Requests that are built and looked up at a time; replies are served in between.
_SLICE = 32


#: Who is asked for a paid judge, by the `provider` of its price.
PROVIDERS: dict[str, type[PaidProvider]] = {"claude": Claude}


@dataclass(frozen=True)
class DeskStatus:
    """Status of judging: counts of judgements and stages, costs, and a one-line `problem` ("" if there is none)."""

    n_asked: int = 0
    n_scored: int = 0
    n_unscored: int = 0
    n_stages: int = 0
    #: Stages whose samples all have judgements.
    finished: frozenset[str] = frozenset()
    money: Money = field(default_factory=lambda: Money(0.0, 0.0, 0.0, None))
    problem: str = ""
    #: `out`: the judge cannot be reached now and is tried again. `stopped`: it is not (key refused, budget spent).
    out: bool = False
    stopped: bool = False

    @property
    def n_pending(self) -> int:
        """Judgements that were requested and are not finished."""
        return self.n_asked - self.n_scored - self.n_unscored


class JudgeDesk:
    """Judges completions in a thread.

    `submit` queues, `poll` returns the status, `wait` waits for a change, and `close` finishes or drops the rest. A paid
    judge has a `price` (US dollars; `batch_factor` multiplies it for batches) and a `key`; in `auto` mode large stages
    that are not urgent are sent as batches and the others live. A local judge is given as `provider`, with its `judge`.
    `reverse` shows the rubric's options in reverse order.
    """

    def __init__(
        self, settings: JudgeSettings, workspace: Path, price: Price | None = None, key: ApiKey | None = None, *,
        batch_factor: float = 0.5, reverse: bool = False, judge: JudgeIdentity | None = None, provider: Provider | None = None,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._workspace = workspace
        self._price = price
        self._factor = batch_factor
        self._key = key
        self._reverse = reverse
        self._judge = judge or JudgeIdentity("paid", settings.model, settings, price)
        self._given = provider
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")
        self._status = DeskStatus()
        self._inbox: queue.SimpleQueue[tuple[str, Rubric, tuple[Sample, ...], bool]] = queue.SimpleQueue()
        self._changed = threading.Event()
        self._closing = self._abandon = False
        self._run: Future[None] = self._pool.submit(lambda: asyncio.run(self._main()))
        self._run.add_done_callback(lambda _: self._changed.set())

    # --- called from other threads ------------------------------------------------------------------------

    def submit(self, stage: str, rubric: Rubric, samples: Sequence[Sample], *, urgent: bool = False) -> None:
        """Queue a stage's completions and return at once. Submitting them again changes nothing.

        Where the resident base judges, it does so here, in the caller's thread, until the stage is finished.
        """
        self._inbox.put((stage, rubric, tuple(samples), urgent))
        self._lend_thread(lambda: stage in self._status.finished or self._status.stopped)

    def poll(self) -> DeskStatus:
        """The status of judging. Raises the exception that ended the desk's thread, if any (StoreError)."""
        if self._run.done():
            self._run.result()
        return self._status

    def wait(self, timeout_s: float) -> None:
        """Block until the status may have changed since the last call, at most `timeout_s` seconds."""
        self._changed.wait(timeout_s)
        self._changed.clear()

    def close(self, *, wait: bool = True) -> DeskStatus:
        """End the desk and return its last status.

        With `wait`, everything submitted is judged first, unless the judge is out or the budget is spent. Without, open
        requests are dropped (their reservations stay), and batches go on at the API until a later desk collects them.
        """
        self._abandon = self._abandon or not wait
        self._closing = True
        try:
            if wait:
                self._lend_thread(lambda: False)
            self._run.result()
        finally:
            self._abandon = True
            self._pool.shutdown()
        return self._status

    def _lend_thread(self, is_done: Callable[[], bool]) -> None:
        if isinstance(self._given, ResidentJudge):
            self._given.serve(lambda: self._run.done() or is_done())

    # --- inside the thread ------------------------------------------------------------------------------

    async def _main(self) -> None:
        self._begin()
        with contextlib.ExitStack() as ends:

            def ledger(store: Store) -> JudgeLedger:
                ends.callback(store.close)
                return JudgeLedger(store, None if self._price is None else self._settings.budget_usd)

            # Two connections: one that waits for the disk (batches), one for the many writes of live judging.
            synced, self._ledger = ledger(Store.open(self._workspace)), ledger(Store.open(self._workspace).relaxed())
            self._provider = self._given or self._make_provider()
            loops = [self._receive(), self._keep_status()]
            loops += [self._work() for _ in range(self._provider.n_parallel)]
            if self._provider.batches is not None and self._price is not None:
                self._batches = Batches(
                    self._provider.batches, self._settings, synced, self._price, self._factor, self._requests.open
                )
                loops.append(self._work_batches(self._batches))
            tasks = [asyncio.create_task(loop) for loop in loops]
            end = asyncio.create_task(self._until_end())
            try:
                # A task other than `end` completes only by an exception.
                done, _ = await asyncio.wait([*tasks, end], return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in [*tasks, end]:
                    task.cancel()
                await asyncio.gather(*tasks, end, return_exceptions=True)
                await self._provider.close()
                self._publish()
                self._ledger.release()
                synced.release()

    def _begin(self) -> None:
        """The state of judging; all of it belongs to the desk's thread."""
        self._live_queue: asyncio.Queue[Request] = asyncio.Queue()
        self._batch_waiting: dict[str, Any] = {}
        self._batches: Batches | None = None
        # Keys that wait for batches not shown to our API key, and live requests among those.
        self._stuck: set[str] = set()
        self._parked: dict[str, Any] = {}
        self._wake = asyncio.Event()
        self._requests = OpenRequests()
        # By key, the replies that could not be read.
        self._unread: dict[str, list[RawReply]] = {}
        self._problem = self._last_word = ""
        self._stopped = False
        self._n_outages = self._n_active = self._n_live = 0
        self._patience, self._out_until = 1, 0.0

    def _make_provider(self) -> Provider:
        assert self._price is not None and self._key is not None, "a paid judge has a price and a key"  # noqa: PT018
        return PROVIDERS[self._price.provider](self._settings, self._price, self._key, self._factor)

    async def _until_end(self) -> None:
        """Return when the caller has closed the desk and nothing more can be done."""
        while True:
            rest = bool(self._requests.open) or not self._inbox.empty()
            is_over = self._n_active == 0 and (not rest or self._stopped or self._all_stuck())
            if self._abandon or (self._closing and is_over):
                return
            await asyncio.sleep(_LOOK_S)

    def _all_stuck(self) -> bool:
        """Whether every unfinished request waits for a batch that is not shown to our API key."""
        return bool(self._requests.open) and self._inbox.empty() and self._stuck.issuperset(self._requests.open)

    # --- requests ---------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            if self._inbox.empty():
                await asyncio.sleep(_LOOK_S)
                continue
            self._n_active += 1
            try:
                await self._add_stage(*self._inbox.get())
            finally:
                self._n_active -= 1

    async def _add_stage(self, stage: str, rubric: Rubric, samples: Sequence[Sample], urgent: bool) -> None:
        """Build a stage's requests, keep their keys in the ledger, and queue those that the ledger cannot answer."""
        self._ledger.save_rubric(rubric.sha256, rubric.name, rubric.source)
        self._requests.begin(stage)
        keys: list[str] = []
        fresh: list[Any] = []
        for start in range(0, len(samples), _SLICE):
            requests = self._judge.requests(rubric, samples[start : start + _SLICE], reverse=self._reverse)
            keys += [request.key for request in requests]
            new = self._without_judged([request for request in requests if self._requests.add(stage, request)])
            await asyncio.sleep(0)  # serve replies between two slices
            if self._goes_live(len(samples), urgent):
                for request in new:  # right away, so that replies arrive while the other slices are looked up
                    self._live_queue.put_nowait(request)
            else:
                fresh += new
        self._ledger.keep_keys(stage, keys)
        self._requests.end(stage)
        if self._goes_live(len(fresh), urgent):
            for request in fresh:
                self._live_queue.put_nowait(request)
        else:
            self._batch_waiting |= {request.key: request for request in fresh}
            self._wake.set()

    def _goes_live(self, n: int, urgent: bool) -> bool:
        """Whether `n` judgements are requested live and not as a batch."""
        mode = self._settings.mode
        return mode in ("live", "local") or (mode == "auto" and (urgent or n < self._settings.batch_from))

    def _without_judged(self, requests: Sequence[Any]) -> list[Any]:
        """Finish the requests that the ledger can answer; returns the others, their unread replies noted.

        A reply that was stored without being read (nobody waited for it) is read now.
        """
        judgements = self._ledger.judgements(request.key for request in requests)
        self._requests.finish(judgements.values())
        tried = self._ledger.sent_keys(request.key for request in requests if request.key not in judgements)
        for request in [request for request in requests if request.key in tried]:
            before = self._unread[request.key] = self._ledger.unread(request.key)
            for reply in [reply for reply in self._ledger.replies(request.key) if reply.fault is None]:
                reply, final = request.read(reply, before)
                if reply.fault is not None:
                    self._ledger.set_fault(request.key, reply.fault)
                    before.append(reply)
                if final is not None:
                    self._ledger.finish([final])
                    self._requests.finish([final])
                    break
        return [request for request in requests if request.key in self._requests.open]

    # --- live -------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            request = await self._live_queue.get()
            self._n_active += 1
            try:
                await self._judge_live(request)
            finally:
                self._n_active -= 1

    async def _judge_live(self, request: Request) -> None:
        """Judge one request. After an outage it goes back into the queue; all sit out a long wait."""
        n_tries = 0
        while not self._stopped and request.key in self._requests.open and request.key not in self._parked:
            if (left_s := self._out_until - time.monotonic()) > 0:
                await self._wait_in_outage(self._problem, left_s)
                continue
            try:
                refusal = await self._send(request)
            except Outage as outage:
                n_tries, self._problem = n_tries + 1, str(outage)
                if n_tries >= TRIES or outage.wait_s > LONG_WAIT_S:
                    self._patience, pause_s = 1, max(outage.wait_s, OUTAGE_PAUSE_S)
                    if outage.wait_s > LONG_WAIT_S:  # asked of all; a request that fails alone holds nobody else up
                        self._out_until = time.monotonic() + pause_s
                    await self._wait_in_outage(str(outage), pause_s)
                    self._live_queue.put_nowait(request)
                    return
                await asyncio.sleep(max(outage.wait_s, min(FIRST_WAIT_S * 2 ** (n_tries - 1), MAX_WAIT_S)))
            except JudgeError as error:
                self._stop(str(error))
            else:
                await self._after_refusal(request, refusal)

    async def _send(self, request: Any) -> Refusal | None:
        """Book a request, send it once, and store what comes; the ledger's refusal if it may not be sent now.

        Raises Outage and JudgeError as the provider does; the booking is then freed, or lost if it may be billed.
        """
        before = self._unread.setdefault(request.key, [])
        worst = 0.0 if self._price is None else worst_usd(request, self._price)
        (ticket,) = self._ledger.apply([Reserve(request.key, worst)])
        if not isinstance(ticket, int):
            return ticket
        self._n_live += 1
        try:
            reply = await self._provider.ask(request, before)
        except (Outage, JudgeError) as error:
            is_lost = isinstance(error, Outage) and error.taken
            self._ledger.apply([Unpaid(ticket, "lost" if is_lost else "refused")])
            raise
        finally:
            self._n_live -= 1
        reply, final = request.read(reply, before)
        self._ledger.apply([Settle(ticket, request.key, reply, final)])
        self._problem, self._n_outages = "", 0
        if final is None:
            before.append(reply)
        else:
            self._requests.finish([final])
        return None

    async def _after_refusal(self, request: Request, refusal: Refusal | None) -> None:
        if refusal == "done":
            self._without_judged([request])
        elif refusal == "held" and request.key in self._stuck:
            self._parked[request.key] = request  # frees this worker for other requests
        elif refusal == "held":
            await asyncio.sleep(_LOOK_AGAIN_S)
        elif refusal == "over budget" and (self._n_live or (self._batches and self._batches.any_to_come())):
            await asyncio.sleep(2 * _LOOK_S)  # replies to come will free a part of their reservations
        elif refusal == "over budget":
            self._stop_at_budget()

    # --- batches ----------------------------------------------------------------------------------------

    async def _work_batches(self, batches: Batches) -> None:
        """Reconcile, send, collect and wait, in a loop. An unresolved old batch holds back new ones."""
        while True:
            self._wake.clear()
            if self._batch_waiting or batches.any_open():
                self._n_active += 1
                try:
                    await self._batch_round(batches)
                    self._problem, self._n_outages = "", 0
                except Outage as outage:
                    self._patience = BATCH_PATIENCE
                    await self._wait_in_outage(str(outage), max(outage.wait_s, self._settings.batch_poll_s))
                except JudgeError as error:
                    self._stop(str(error))
                finally:
                    self._n_active -= 1
            # Not wait_for: in Python 3.11 it can swallow the cancellation that ends this task (python/cpython#86296).
            deadline = time.monotonic() + self._settings.batch_poll_s
            while time.monotonic() < deadline and not self._wake.is_set():
                await asyncio.sleep(_LOOK_S)

    async def _batch_round(self, batches: Batches) -> None:
        failure: Outage | JudgeError | None = None
        try:
            n_open = await batches.reconcile()
            if self._batch_waiting and not n_open and not self._stopped:
                await self._send_batches(batches)
        except Outage as outage:
            failure = outage  # batches already sent are collected all the same
        retry_keys, later_failure = await batches.collect()
        self._stuck = {key for invisible in batches.invisible for key in invisible.keys}
        wanted = self._requests.open.keys() - self._parked.keys()
        retry = {key: self._requests.open[key] for key in retry_keys if key in wanted}
        self._batch_waiting |= retry
        for key in [key for key in self._parked if key not in self._stuck]:
            self._live_queue.put_nowait(self._parked.pop(key))
        self._requests.finish(self._ledger.judgements(list(self._requests.open)).values())
        if retry:
            self._wake.set()
        if failure := failure or later_failure:
            raise failure

    async def _send_batches(self, batches: Batches) -> None:
        """Send the waiting requests; those that the ledger refuses stay waiting, unless they are done already."""
        # Taken out first, because more may be added while this waits for the API.
        requests, self._batch_waiting = self._batch_waiting, {}
        try:
            refused = await batches.submit(self._without_judged(list(requests.values())))
        except (Outage, JudgeError):
            self._batch_waiting |= requests
            raise
        again = self._without_judged([requests[key] for key, why in refused.items() if why == "done"])
        again += [requests[key] for key, why in refused.items() if why != "done"]
        self._batch_waiting |= {request.key: request for request in again}
        if "over budget" in refused.values() and not batches.any_to_come():
            self._stop_at_budget()

    # --- stops and status -------------------------------------------------------------------------------

    async def _wait_in_outage(self, problem: str, pause_s: float) -> None:
        """Wait `pause_s` seconds. A desk that is being closed stops after `_patience` outages in a row."""
        self._problem = problem
        self._n_outages += 1
        deadline = time.monotonic() + pause_s
        while not (is_over := self._closing and self._n_outages >= self._patience) and time.monotonic() < deadline:
            await asyncio.sleep(5 * _LOOK_S)
        if is_over:
            self._stop(problem)

    def _stop(self, problem: str) -> None:
        self._last_word, self._stopped = self._last_word or problem, True

    def _stop_at_budget(self) -> None:
        self._stop(f"judge.budget_usd = {self._settings.budget_usd:g} is spent; raise it and run `fastconv judge`")

    async def _keep_status(self) -> None:
        n_changes = -1
        while True:
            n_changes = self._requests.n_changes
            self._publish()
            deadline = time.monotonic() + _STATUS_S
            while time.monotonic() < deadline and self._requests.n_changes == n_changes:
                await asyncio.sleep(_LOOK_S)

    def _publish(self) -> None:
        requests, invisible = self._requests, self._batches.invisible if self._batches else ()
        problem = self._last_word or self._problem or next((batch.line for batch in invisible), "")
        money = DeskStatus().money if self._price is None else self._ledger.money()
        self._status = DeskStatus(
            requests.n_asked, requests.n_scored, requests.n_unscored, requests.n_stages, requests.finished(), money, problem,
            self._n_outages >= self._patience or self._all_stuck(), self._stopped,
        )  # fmt: skip
        self._changed.set()
