"""Judging through Claude in a thread of its own, with its own event loop and ledger connections, while the GPU works.

`submit` only queues samples, so the training loop never waits for a judge. What the desk cannot finish (outage, budget,
a key that another process is asking) stays pending: the completions are in the ledger, and submitting the same samples
again, in this process or another, continues from there.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastconv.errors import JudgeError
from fastconv.judge.batches import BatchJudge, InvisibleBatch
from fastconv.judge.budget import Price, build_requests, judge_params
from fastconv.judge.claude import LiveJudge, LoopLedger, PendingJudgement, lookup_judgements
from fastconv.judge.http import ApiKey, Outage
from fastconv.judge.request import JudgeRequest
from fastconv.judge.rubric import Rubric
from fastconv.recipe import JudgeSettings
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Sample, Store
from fastconv.store.records import Judgement, Money, Refusal

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


@dataclass
class DeskState:
    """The requests of a desk and their progress; used inside the desk's thread only."""

    requests: dict[str, JudgeRequest] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    n_scored: int = 0
    #: By stage, the keys it still waits for; by key, the stages that wait for it.
    waits_for: dict[str, set[str]] = field(default_factory=dict)
    wanted_by: dict[str, set[str]] = field(default_factory=dict)
    #: Number of unreadable replies by key, where not 0.
    n_unread: dict[str, int] = field(default_factory=dict)
    problem: str = ""
    n_outages: int = 0
    stopped: bool = False
    #: Number of stages whose last judgement has arrived.
    n_finished: int = 0

    def add(self, stage: str, request: JudgeRequest) -> bool:
        """Add a request of a stage; True if its key is new."""
        waits = self.waits_for.setdefault(stage, set())
        if request.key not in self.done:
            waits.add(request.key)
            self.wanted_by.setdefault(request.key, set()).add(stage)
        is_new = request.key not in self.requests
        self.requests.setdefault(request.key, request)
        return is_new

    def finish(self, judgement: Judgement) -> None:
        """Mark a judgement as finished; repeated calls change nothing."""
        if judgement.key not in self.done:
            self.done.add(judgement.key)
            self.n_scored += judgement.reason is None
            for stage in self.wanted_by.pop(judgement.key, ()):
                self.waits_for[stage].discard(judgement.key)
                self.n_finished += not self.waits_for[stage]

    def pending(self) -> bool:
        """Whether any request is unfinished."""
        return len(self.done) < len(self.requests)


class JudgeDesk:
    """Judges completions through Claude in a thread.

    `submit` never blocks, `poll` returns the status, `wait` waits for a change, and `close` finishes or drops the rest.
    In `auto` mode large stages that are not urgent are sent as batches and the others live. `price` is in US dollars,
    `batch_factor` multiplies it for batches, and `reverse` shows the rubric's options in reverse order.
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
        self._params = judge_params(settings, price, reverse=reverse)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")
        self._status = DeskStatus()
        self._inbox: queue.SimpleQueue[tuple[str, Rubric, tuple[Sample, ...], bool]] = queue.SimpleQueue()
        self._changed = threading.Event()
        self._closing = self._abandon = False
        self._run: Future[None] = self._pool.submit(lambda: asyncio.run(self._main()))
        self._run.add_done_callback(lambda _: self._changed.set())

    # --- called from other threads ------------------------------------------------------------------------

    def submit(self, stage: str, rubric: Rubric, samples: Sequence[Sample], *, urgent: bool = False) -> None:
        """Queue a stage's completions and return at once. Submitting them again changes nothing."""
        self._inbox.put((stage, rubric, tuple(samples), urgent))

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
            self._run.result()
        finally:
            self._pool.shutdown()
        return self._status

    # --- inside the thread ------------------------------------------------------------------------------

    async def _main(self) -> None:
        self._live_queue: asyncio.Queue[JudgeRequest] = asyncio.Queue()
        self._batch_waiting: dict[str, JudgeRequest] = {}
        # Batches not shown to our API key, the judgement keys that wait for them, and live requests among those.
        self._invisible: tuple[InvisibleBatch, ...] = ()
        self._stuck: set[str] = set()
        self._parked: dict[str, JudgeRequest] = {}
        self._wake = asyncio.Event()
        self._state = DeskState()
        self._n_active = self._n_live = 0
        self._patience = 1
        self._out_until = 0.0
        self._failed: asyncio.Future[Any] | None = None
        # Two ledger connections: one that waits for the disk (batches), one for the many writes of live judging.
        store = Store.open(self._workspace)
        self._ledger = JudgeLedger(store, self._settings.budget_usd)
        self._live_ledger = LoopLedger(self._workspace, self._settings.budget_usd)
        live = LiveJudge(self._settings, self._live_ledger, self._price, self._key)
        batch = BatchJudge(self._settings, self._ledger, self._price, self._factor, self._key, self._state.requests)
        loops = [self._receive(), self._keep_status(), self._work_batches(batch)]
        loops += [self._work_live(live) for _ in range(self._settings.concurrency)]
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
            await live.close()
            await batch.close()
            self._publish()
            await self._live_ledger.close()
            self._ledger.release()
            store.close()

    async def _until_end(self) -> None:
        """Return when the caller has closed the desk and nothing more can be done."""
        while True:
            if self._failed is not None:
                self._failed.result()
            idle = self._n_active == 0
            rest = self._state.pending() or not self._inbox.empty()
            if self._abandon or (self._closing and idle and (not rest or self._state.stopped or self._all_stuck())):
                return
            await asyncio.sleep(_LOOK_S)

    def _all_stuck(self) -> bool:
        """Whether every unfinished request waits for a batch that is not shown to our API key."""
        if not self._stuck or not self._inbox.empty():
            return False
        unfinished = [key for key in self._state.requests if key not in self._state.done]
        return bool(unfinished) and self._stuck.issuperset(unfinished)

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
        """Add a stage's requests to the state, and queue those that the ledger cannot answer."""
        self._live_ledger.ledger.save_rubric(rubric.sha256, rubric.name, rubric.source)
        fresh: list[JudgeRequest] = []
        for start in range(0, len(samples), _SLICE):
            requests = build_requests(rubric, self._params, samples[start : start + _SLICE])
            new = self._without_judged([request for request in requests if self._state.add(stage, request)])
            await asyncio.sleep(0)  # serve replies between two slices
            if self._goes_live(len(samples), urgent):
                self._ask_live(new)  # right away, so that replies arrive while the other slices are looked up
            else:
                fresh += new
        if self._goes_live(len(fresh), urgent):
            self._ask_live(fresh)
        else:
            self._batch_waiting |= {request.key: request for request in fresh}
            self._wake.set()

    def _goes_live(self, n: int, urgent: bool) -> bool:
        """Whether `n` judgements are requested live and not as a batch."""
        mode = self._settings.mode
        return mode == "live" or (mode == "auto" and (urgent or n < self._settings.batch_from))

    def _ask_live(self, requests: Sequence[JudgeRequest]) -> None:
        for request in requests:
            self._live_queue.put_nowait(request)

    def _without_judged(self, requests: Sequence[JudgeRequest]) -> list[JudgeRequest]:
        """Finish the requests that the ledger can answer; returns the others, their unreadable replies counted in the state."""
        judgements, n_unread = lookup_judgements(self._live_ledger.ledger, requests)
        for judgement in judgements.values():
            self._state.finish(judgement)
        self._state.n_unread |= n_unread
        return [request for request in requests if request.key not in judgements]

    # --- live -------------------------------------------------------------------------------------------

    async def _work_live(self, live: LiveJudge) -> None:
        while True:
            request = await self._live_queue.get()
            self._n_active += 1
            try:
                if not self._state.stopped:
                    await self._judge_live(live, request)
            finally:
                self._n_active -= 1

    async def _judge_live(self, live: LiveJudge, request: JudgeRequest) -> None:
        """Judge one request. After an outage it goes back into the queue; all sit out a long wait."""
        n_tries = 0
        while not self._state.stopped:
            if (left_s := self._out_until - time.monotonic()) > 0:
                await self._wait_in_outage(self._state.problem, left_s)
                continue
            self._n_live += 1
            try:
                outcome = await live.judge(request, self._state.n_unread.get(request.key, 0))
            except Outage as outage:
                n_tries += 1
                self._without_judged([request])
                if n_tries >= TRIES or outage.wait_s > LONG_WAIT_S:
                    self._patience, pause_s = 1, max(outage.wait_s, OUTAGE_PAUSE_S)
                    if outage.wait_s > LONG_WAIT_S:  # asked of all; a request that fails alone holds nobody else up
                        self._out_until = time.monotonic() + pause_s
                    await self._wait_in_outage(str(outage), pause_s)
                    self._live_queue.put_nowait(request)
                    return
                await asyncio.sleep(max(outage.wait_s, min(FIRST_WAIT_S * 2 ** (n_tries - 1), MAX_WAIT_S)))
                continue
            except JudgeError as error:
                self._stop(str(error))
                return
            finally:
                self._n_live -= 1
            if isinstance(outcome, PendingJudgement):
                self._state.problem, self._state.n_outages = "", 0
                self._n_active += 1
                outcome.written.add_done_callback(partial(self._written, outcome.judgement))
                return
            await self._after_refusal(request, outcome)
            if request.key in self._state.done or request.key in self._parked:
                return

    def _written(self, judgement: Judgement, done: asyncio.Future[Any]) -> None:
        """Count a judgement as finished once it is committed."""
        self._n_active -= 1
        if done.cancelled() or done.exception() is not None:
            self._failed = self._failed or done
        else:
            self._state.finish(judgement)

    async def _after_refusal(self, request: JudgeRequest, refusal: Refusal) -> None:
        if refusal == "done":
            self._without_judged([request])
        elif refusal == "held" and request.key in self._stuck:
            self._parked[request.key] = request  # frees this worker for other requests
        elif refusal == "held":
            await asyncio.sleep(_LOOK_AGAIN_S)
        elif self._n_live or self._batches_to_come():
            await asyncio.sleep(2 * _LOOK_S)  # replies to come will free a part of their reservations
        else:
            self._stop_at_budget()

    # --- batches ----------------------------------------------------------------------------------------

    async def _work_batches(self, batch: BatchJudge) -> None:
        """Reconcile, send, collect and wait, in a loop. An unresolved old batch holds back new ones."""
        while True:
            self._wake.clear()
            if self._batch_waiting or self._ledger.batches("sent") or self._ledger.batches("intended"):
                self._n_active += 1
                try:
                    await self._batch_round(batch)
                    if not self._state.stopped:
                        self._state.problem, self._state.n_outages = "", 0
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

    async def _batch_round(self, batch: BatchJudge) -> None:
        failure: Outage | JudgeError | None = None
        try:
            n_open = await batch.reconcile()
            if self._batch_waiting and not n_open and not self._state.stopped:
                await self._send_batches(batch)
        except Outage as outage:
            failure = outage  # batches already sent are collected all the same
        progress = await batch.collect()
        self._invisible = progress.invisible
        self._stuck = {key for invisible in progress.invisible for key in invisible.keys}
        retry = [key for key in progress.retry_keys if key in self._state.requests and key not in self._parked]
        self._batch_waiting |= {key: self._state.requests[key] for key in retry}
        for key in [key for key in self._parked if key not in self._stuck]:
            self._live_queue.put_nowait(self._parked.pop(key))
        unfinished = [request for key, request in self._state.requests.items() if key not in self._state.done]
        for judgement in self._ledger.judgements(request.key for request in unfinished).values():
            self._state.finish(judgement)
        if retry:
            self._wake.set()
        failure = failure or progress.failure
        if failure is not None:
            raise failure

    def _batches_to_come(self) -> bool:
        """Whether the results of a sent batch will still free a part of its reservations."""
        invisible = {batch.intent for batch in self._invisible}
        return any(batch.intent not in invisible for batch in self._ledger.batches("sent"))

    async def _send_batches(self, batch: BatchJudge) -> None:
        """Send the waiting requests; those that the ledger refuses stay waiting, unless they are done already."""
        # Taken out first, because more may be added while this waits for the API.
        requests, self._batch_waiting = self._batch_waiting, {}
        try:
            refused = (await batch.submit(self._without_judged(list(requests.values())))).refused
        except (Outage, JudgeError):
            self._batch_waiting |= requests
            raise
        unread = self._without_judged([requests[key] for key, why in refused.items() if why == "done"])
        self._batch_waiting |= {key: requests[key] for key, why in refused.items() if why != "done"}
        self._batch_waiting |= {request.key: request for request in unread}
        if "over budget" in refused.values() and not self._batches_to_come():
            self._stop_at_budget()

    # --- stops and status -------------------------------------------------------------------------------

    async def _wait_in_outage(self, problem: str, pause_s: float) -> None:
        """Wait `pause_s` seconds. A desk that is being closed stops after `_patience` outages in a row."""
        self._state.problem = problem
        self._state.n_outages += 1
        deadline = time.monotonic() + pause_s
        while time.monotonic() < deadline and not (self._closing and self._state.n_outages >= self._patience):
            await asyncio.sleep(5 * _LOOK_S)
        if self._closing and self._state.n_outages >= self._patience:
            self._state.stopped = True

    def _stop(self, problem: str) -> None:
        self._state.problem = problem
        self._state.stopped = True

    def _stop_at_budget(self) -> None:
        self._stop(f"judge.budget_usd = {self._settings.budget_usd:g} is spent; raise it and run `fastconv judge`")

    async def _keep_status(self) -> None:
        n_finished = 0
        while True:
            self._publish()
            deadline = time.monotonic() + _STATUS_S
            while time.monotonic() < deadline and self._state.n_finished == n_finished:
                await asyncio.sleep(_LOOK_S)
            n_finished = self._state.n_finished

    def _publish(self) -> None:
        state = self._state
        finished = frozenset(stage for stage, waits in state.waits_for.items() if not waits)
        problem = state.problem or next((batch.line for batch in self._invisible), "")
        self._status = DeskStatus(
            len(state.requests), state.n_scored, len(state.done) - state.n_scored, len(state.waits_for), finished,
            self._live_ledger.ledger.money(), problem, state.n_outages >= self._patience or self._all_stuck(), state.stopped,
        )  # fmt: skip
        self._changed.set()
