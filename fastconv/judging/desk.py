"""The judge beside the GPU: a thread with its own event loop and its own connection to the ledger.

`submit` only hands samples over, so the training loop never waits for a judge. What the desk cannot finish (outage,
budget, a key another process is asking) stays pending: the completions are in the ledger, and the same keys are found
again by whoever submits them next.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from fastconv.errors import JudgeError
from fastconv.judging.batches import BatchJudge
from fastconv.judging.budget import Price
from fastconv.judging.client import ApiKey, Outage, concluded
from fastconv.judging.live import LiveJudge
from fastconv.judging.request import JudgeItem, JudgeParams, JudgeRequest, build_request
from fastconv.judging.rubric import Rubric
from fastconv.recipe import JudgeSettings
from fastconv.store import Sample, Store
from fastconv.store_judging import JudgeLedger, Judgement, Money, Refusal

#: Rounds of SDK retries that a request gets before the judge counts as out.
ROUNDS = 3
#: How long the desk rests in an outage before it tries again.
OUTAGE_PAUSE_S = 20.0
#: How often a key that another process is asking is looked at again, and how often the status is renewed.
_LOOK_AGAIN_S, _STATUS_S = 0.5, 0.2


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

    @property
    def n_pending(self) -> int:
        """Judgements asked for and not finished."""
        return self.n_asked - self.n_scored - self.n_unscored


@dataclass
class _Book:
    """What the desk was asked, inside its thread."""

    requests: dict[str, JudgeRequest] = field(default_factory=dict)
    stages: dict[str, set[str]] = field(default_factory=dict)
    done: dict[str, bool] = field(default_factory=dict)  # key -> has a value
    problem: str = ""
    stopped: bool = False

    def pending(self) -> bool:
        return len(self.done) < len(self.requests)


def params_of(settings: JudgeSettings, price: Price | None, *, reverse: bool = False) -> JudgeParams:
    """The parameters of a recipe's requests; how the model is spoken to stands in its price table."""
    return JudgeParams(
        settings.model, settings.max_reply_tok, settings.max_judged_chars,
        price.thinking if price else "", price.effort if price else "", reverse,
    )  # fmt: skip


def requests_of(rubric: Rubric, params: JudgeParams, samples: Sequence[Sample]) -> list[JudgeRequest]:
    """The requests that judge a stage's completions, in their order."""
    return [build_request(rubric, params, JudgeItem(one.prompt, one.completion, one.sample)) for one in samples]


class JudgeDesk:
    """Judges completions through Claude while the caller does something else.

    `submit` never blocks; `poll` tells how far it is; `close` waits for the rest (or lets it be). `auto` mode sends
    what is large and not urgent as batches and the rest live.
    """

    def __init__(
        self, settings: JudgeSettings, workspace: Path, price: Price, key: ApiKey, *, batch_factor: float = 0.5
    ) -> None:
        self._settings = settings
        self._workspace = workspace
        self._price = price
        self._factor = batch_factor
        self._key = key
        self._params = params_of(settings, price)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")
        self._status = DeskStatus()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._closing = False
        self._abandon = False
        self._run: Future[None] = self._pool.submit(lambda: asyncio.run(self._main()))
        self._run.add_done_callback(lambda _: self._ready.set())

    # --- for the caller's thread ------------------------------------------------------------------------

    def submit(self, stage: str, rubric: Rubric, samples: Sequence[Sample], *, urgent: bool = False) -> None:
        """Hand a stage's completions over and return at once. Handing the same ones over twice changes nothing."""
        self._call(lambda: self._arrivals.put_nowait((stage, rubric, tuple(samples), urgent)))

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
        self._closing = True
        self._abandon = self._abandon or not wait
        self._call(lambda: self._wake.set())
        try:
            self._run.result()
        finally:
            self._pool.shutdown()
        return self._status

    def _call(self, action: object) -> None:
        self._ready.wait()
        if self._loop is not None and not self._run.done():
            with contextlib.suppress(RuntimeError):  # the loop may end between the question and the call
                self._loop.call_soon_threadsafe(action)  # pyright: ignore[reportArgumentType]

    # --- inside the thread ------------------------------------------------------------------------------

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrivals: asyncio.Queue[tuple[str, Rubric, tuple[Sample, ...], bool]] = asyncio.Queue()
        self._live_queue: asyncio.Queue[JudgeRequest] = asyncio.Queue()
        self._batch_waiting: dict[str, JudgeRequest] = {}
        self._wake = asyncio.Event()
        self._book = _Book()
        self._n_under_way = 0
        store = Store.open(self._workspace)
        self._ledger = JudgeLedger(store, self._settings.budget_usd)
        live = LiveJudge(self._settings, self._ledger, self._price, self._key)
        batch = BatchJudge(self._settings, self._ledger, self._price, self._factor, self._key, self._book.requests)
        self._ready.set()
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
            self._publish()
            await live.close()
            await batch.close()
            store.close()

    async def _until_end(self) -> None:
        """Returns when the caller has closed the desk and nothing more can be done."""
        while True:
            idle = self._n_under_way == 0
            rest = self._book.pending() or not self._arrivals.empty()
            if self._abandon or (self._closing and idle and (not rest or self._book.stopped)):
                return
            await asyncio.sleep(0.01)

    async def _receive(self) -> None:
        while True:
            stage, rubric, samples, urgent = await self._arrivals.get()
            self._n_under_way += 1
            try:
                self._ledger.remember_rubric(rubric.sha256, rubric.name, rubric.source)
                fresh: list[JudgeRequest] = []
                for place, sample in enumerate(samples):
                    if place % 64 == 63:
                        await asyncio.sleep(0)  # answers that arrive meanwhile are not kept waiting
                    request = requests_of(rubric, self._params, [sample])[0]
                    self._book.stages.setdefault(stage, set()).add(request.key)
                    if request.key not in self._book.requests:
                        self._book.requests[request.key] = request
                        if not self._known(request):
                            fresh.append(request)
                self._dispatch(fresh, urgent)
            finally:
                self._n_under_way -= 1

    def _dispatch(self, fresh: Sequence[JudgeRequest], urgent: bool) -> None:
        mode = self._settings.mode
        if mode == "batch" or (mode == "auto" and not urgent and len(fresh) >= self._settings.batch_from):
            self._batch_waiting |= {request.key: request for request in fresh}
            self._wake.set()
        else:
            for request in fresh:
                self._live_queue.put_nowait(request)

    def _known(self, request: JudgeRequest) -> bool:
        """Whether the ledger has the judgement, or a reply that nobody was waiting for and that gives it."""
        found = self._ledger.judgements([request.key]).get(request.key)
        if found is None:
            for reply in self._ledger.replies(request.key):
                if reply.fault is None:
                    n_unread = self._ledger.history(request.key).n_unread
                    reply, found = concluded(request, reply, n_unread)
                    if reply.fault is not None:
                        self._ledger.set_fault(request.key, reply.fault)
            if found is not None:
                self._ledger.finish([found])
        if found is not None:
            self._finished(found)
        return found is not None

    def _finished(self, judgement: Judgement) -> None:
        self._book.done[judgement.key] = judgement.reason is None

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
            try:
                outcome = await live.judge(request)
            except Outage as outage:
                n_rounds += 1
                if n_rounds >= ROUNDS:
                    self._live_queue.put_nowait(request)
                    await self._rest(str(outage))
                    return
                continue
            except JudgeError as error:
                self._stop(str(error))
                return
            if isinstance(outcome, Judgement):
                self._book.problem = ""
                self._finished(outcome)
                return
            await self._after_refusal(request, outcome)
            if request.key in self._book.done:
                return

    async def _after_refusal(self, request: JudgeRequest, refusal: Refusal) -> None:
        if refusal == "done":
            self._known(request)
        elif refusal == "held":
            await asyncio.sleep(_LOOK_AGAIN_S)
        elif self._ledger.money().reserved_usd > 0:
            await asyncio.sleep(0.02)  # replies under way will free a part of what is booked for them
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
                        self._book.problem = ""
                except Outage as outage:
                    await self._rest(str(outage), pause_s=self._settings.batch_poll_s)
                except JudgeError as error:
                    self._stop(str(error))
                finally:
                    self._n_under_way -= 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._settings.batch_poll_s)

    async def _batch_round(self, batch: BatchJudge) -> None:
        n_open = await batch.reconcile()
        if self._batch_waiting and not n_open and not self._book.stopped:
            taken = list(self._batch_waiting.values())
            refused = (await batch.submit(taken)).refused
            self._batch_waiting = {key: self._book.requests[key] for key, why in refused.items() if why != "done"}
            if "over budget" in refused.values() and not self._ledger.batches("sent"):
                self._stop_at_budget()
        again = await batch.collect()
        self._batch_waiting |= {key: self._book.requests[key] for key in again if key in self._book.requests}
        for key, judgement in self._ledger.judgements(self._unfinished()).items():
            self._book.requests[key] and self._finished(judgement)
        if self._batch_waiting and not n_open:
            self._wake.set()

    def _unfinished(self) -> list[str]:
        return [key for key in self._book.requests if key not in self._book.done]

    # --- stops and status -------------------------------------------------------------------------------

    async def _rest(self, problem: str, pause_s: float = OUTAGE_PAUSE_S) -> None:
        """Wait in an outage; when the caller is already waiting for the end, stop instead."""
        self._book.problem = problem
        if self._closing:
            self._book.stopped = True
        else:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause_s)

    def _stop(self, problem: str) -> None:
        self._book.problem = problem
        self._book.stopped = True

    def _stop_at_budget(self) -> None:
        self._stop(f"judge.budget_usd = {self._settings.budget_usd:g} is spent; raise it and run `fastconv judge`")

    async def _keep_status(self) -> None:
        while True:
            self._publish()
            await asyncio.sleep(_STATUS_S)

    def _publish(self) -> None:
        book = self._book
        n_scored = sum(book.done.values())
        finished = frozenset(stage for stage, keys in book.stages.items() if keys <= book.done.keys())
        self._status = DeskStatus(
            len(book.requests), n_scored, len(book.done) - n_scored, len(book.stages), finished,
            self._ledger.money(), book.problem,
        )  # fmt: skip
