"""The desk of a judge without a bill: an endpoint beside the GPU, or the resident base in the caller's own thread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from fastconv.errors import JudgeError
from fastconv.judge.book import DeskStatus
from fastconv.judge.claude import Outage
from fastconv.judge.local import SLICE, Ask, LocalJudge
from fastconv.judge.rubric import Rubric
from fastconv.store.ledger import Sample, Store
from fastconv.store.judge_ledger import JudgeLedger

#: How long the desk rests in an outage before it tries again, and how often it looks whether it is to end.
OUTAGE_PAUSE_S, _LOOK_S = 10.0, 0.05


class LocalDesk:
    """Judges completions through an `Ask`; the same few verbs as `JudgeDesk`.

    With `beside` a thread asks and `submit` returns at once. Without, `submit` itself judges: the resident base belongs
    to the caller's thread. What cannot be judged stays pending and is found again by the next desk.
    """

    def __init__(self, workspace: Path, ask: Ask, model: str, *, max_judged_chars: int, beside: bool) -> None:
        self._workspace = workspace
        self._ask = ask
        self._model = model
        self._max_chars = max_judged_chars
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge") if beside else None
        self._futures: list[Future[None]] = []
        self._store: Store | None = None
        self._judge: LocalJudge | None = None
        self._n_asked = self._n_scored = self._n_unscored = self._n_stages = self._n_outages = 0
        self._finished: set[str] = set()
        self._problem = ""
        self._closing = self._stopped = False

    def submit(self, stage: str, rubric: Rubric, samples: Sequence[Sample], *, urgent: bool = False) -> None:
        """Hand a stage's completions over (urgent or not: they are taken in turn).

        Without a thread beside, raises what the `Ask` raises to stop a run, and StoreError.
        """
        self._n_asked += len(samples)
        self._n_stages += 1
        if self._pool is None:
            self._take(stage, rubric, samples)
        else:
            self._futures.append(self._pool.submit(self._take, stage, rubric, tuple(samples)))

    def poll(self) -> DeskStatus:
        """How far judging is. Raises what ended the desk, if it broke (StoreError)."""
        for future in self._futures:
            if future.done():
                future.result()
        return DeskStatus(
            self._n_asked, self._n_scored, self._n_unscored, self._n_stages, frozenset(self._finished.copy()),
            problem=self._problem, out=self._n_outages > 0, stopped=self._stopped,
        )  # fmt: skip

    def close(self, *, wait: bool = True) -> DeskStatus:
        """End the desk and give its last status; without `wait`, at the end of the slice that is being asked."""
        self._closing = True
        self._stopped = self._stopped or not wait
        if self._pool is None:
            self._end()
        else:
            self._futures.append(self._pool.submit(self._end))
            self._pool.shutdown()
        return self.poll()

    def _take(self, stage: str, rubric: Rubric, samples: Sequence[Sample]) -> None:
        for start in range(0, len(samples), SLICE):
            if not self._slice(rubric, samples[start : start + SLICE]):
                return
        self._finished.add(stage)

    def _slice(self, rubric: Rubric, samples: Sequence[Sample]) -> bool:
        """Judge a few samples, through outages; False when the desk is to end before that."""
        while not self._stopped:
            try:
                found = self._opened().judge(rubric, samples)
            except Outage as outage:
                self._problem = str(outage)
                self._n_outages += 1
                self._rest()
                continue
            except JudgeError as error:
                self._problem, self._stopped = str(error), True
                return False
            n_unscored = sum(one.values is None for one in found.values())
            self._n_unscored += n_unscored
            self._n_scored += len(samples) - n_unscored
            self._problem, self._n_outages = "", 0
            return True
        return False

    def _rest(self) -> None:
        """Wait in an outage; a desk that is being closed gives up."""
        until = time.monotonic() + OUTAGE_PAUSE_S
        while time.monotonic() < until and not self._closing:
            time.sleep(_LOOK_S)
        self._stopped = self._stopped or self._closing

    def _opened(self) -> LocalJudge:
        """The judge on a ledger connection of the thread that works."""
        if self._judge is None:
            self._store = Store.open(self._workspace)
            self._judge = LocalJudge(JudgeLedger(self._store), self._ask, self._model, max_judged_chars=self._max_chars)
        return self._judge

    def _end(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = self._judge = None
