"""Judging of a run: the queue that judges completions while stages are computed, and judging for calibration.

`JudgeQueue` hands completions to any kind of judge and commits judge stages as their judgements arrive. A paid judge and
a local endpoint work in threads of their own, so the GPU goes on with the next stage; the resident base judges in the
caller's thread. What is not judged stays pending, and its completions are in the ledger.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from fastconv.errors import JudgeError, stopped
from fastconv.experiment.graph import Graph
from fastconv.judge.access import JudgeAccess, check_judge, open_desk
from fastconv.judge.calibrate import CalibrationRow, JudgeSamples
from fastconv.judge.desk import DeskStatus, JudgeDesk
from fastconv.judge.local import CompleteMany
from fastconv.judge.rubric import Agreement, Rubric, agreement, judge_stage_scores
from fastconv.recipe import sha256_of
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Sample, Stage, Store
from fastconv.store.records import Judgement

#: Seconds a waiting run lets pass at most before it checks for a stop, and between status displays of a busy run.
WAIT_S, SHOW_S = 0.25, 1.0


class JudgeWatcher(Protocol):
    """Displays the progress of judging."""

    def judging(self, status: DeskStatus) -> None: ...
    def stage_done(self, stage: Stage, seconds: float) -> None: ...


class JudgeQueue:
    """Sends completions to the judge and commits judge stages when their judgements have arrived. Use as a context.

    Leaving the context waits for the judge; leaving it by an exception drops open requests (their reservations stay, and
    the next run requests them again), while batches go on at the API. `later` judges nothing and leaves every stage
    pending. `resident` returns the base's `CompleteMany` when the resident base judges. Without `access`, `check_judge`
    is called at the first stage.
    """

    def __init__(
        self, graph: Graph, store: Store, run: str, watcher: JudgeWatcher, *,
        stop: threading.Event, resident: Callable[[], CompleteMany], access: JudgeAccess | None = None, later: bool = False,
    ) -> None:  # fmt: skip
        self._graph = graph
        self._store = store
        self._run = run
        self._watcher = watcher
        self._stop = stop
        self._resident = resident
        self._access = access
        self._later = later
        self._desk: JudgeDesk | None = None
        self._ledger: JudgeLedger | None = None
        self._waiting: dict[str, tuple[Stage, float]] = {}
        self._shown_s = 0.0
        #: Number of stages committed by this queue, and the last status of its judge.
        self.n_committed = 0
        self.status = DeskStatus()

    def __enter__(self) -> JudgeQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._desk is not None:
            desk, self._desk = self._desk, None
            self.status = desk.close(wait=kind is None)
            if kind is None:
                self._commit(self.status)

    @property
    def pending(self) -> list[Stage]:
        """Stages that were submitted and are not judged."""
        return [stage for stage, _ in self._waiting.values()]

    def submit(self, stage: Stage, *, urgent: bool = False) -> None:
        """Submit a judge stage whose completions are in the ledger. Returns at once unless the resident base judges."""
        samples = self._store.samples(stage.needs["eval"].key)
        self._waiting[stage.key] = (stage, time.monotonic())
        if self._later:
            return
        if self._desk is None:
            self._desk = self._open()
        self._desk.submit(stage.key, stage.work["rubric"], samples, urgent=urgent)
        self.collect()

    def show_status(self) -> None:
        """Display the status at most every `SHOW_S` seconds; called from the training loop, which must not wait."""
        now = time.monotonic()
        if self._desk is not None and now - self._shown_s >= SHOW_S:
            self._shown_s = now
            self._watcher.judging(self._desk.poll())

    def collect(self) -> None:
        """Commit the stages whose judgements have all arrived. Raises StoreError."""
        if self._desk is not None:
            self.status = self._desk.poll()
            self._commit(self.status)
            self._watcher.judging(self.status)

    def wait(self) -> None:
        """Wait until every submitted stage is judged, or the judge is out or stopped. Raises Interrupted, StoreError."""
        while True:
            self.collect()
            if not self._waiting or self._desk is None or self.status.out or self.status.stopped:
                return
            if self._stop.is_set():
                raise stopped("judge")
            self._desk.wait(WAIT_S)

    def facts(self) -> dict[str, Any]:
        """Facts about judging for the run's record; empty without a judge or if judging is left for later."""
        judge = self._graph.judge
        if judge is None or self._later:
            return {}
        slots = [stage.slot for stage in self.pending]
        return {"judging": {"judge": judge.name, "weak": judge.weak, "pending": slots, "problem": self.status.problem}}

    def _open(self) -> JudgeDesk:
        judge = self._graph.judge
        assert judge is not None, "a judge stage exists only where there is a judge"
        access = self._access or check_judge(judge, self._store)
        return open_desk(judge, access, self._store.root, self._resident)

    def _commit(self, status: DeskStatus) -> None:
        for key in [key for key in self._waiting if key in status.finished]:
            stage, began = self._waiting.pop(key)
            seconds = time.monotonic() - began
            self._ledger = self._ledger or JudgeLedger(self._store)
            commit_judged(self._store, self._ledger, stage, seconds)
            self._store.note_stage_of_run(self._run, stage, reused=False)
            self.n_committed += 1
            self._watcher.stage_done(stage, seconds)


def commit_judged(store: Store, ledger: JudgeLedger, stage: Stage, seconds: float) -> None:
    """Commit a submitted judge stage with the scores of its judgements. Raises JudgeError if some are missing."""
    samples, rubric = store.samples(stage.needs["eval"].key), stage.work["rubric"]
    keys = ledger.take_keys(stage.key)
    scores = judge_stage_scores(ledger, rubric, samples, keys)
    n_unscored = sum(score.value is None for score in scores)
    facts = {"judged": len(scores), "cost_usd": ledger.cost_usd(keys)}
    store.commit(
        stage, outputs={"n": len(scores), "n_unscored": n_unscored}, facts=facts, seconds=seconds, scores=scores
    )


def judge_stages(stages: Iterable[Stage]) -> list[Stage]:
    """The judge stages among `stages`."""
    return [stage for stage in stages if stage.kind == "judge"]


def judge_with_desk(open_one: Callable[[bool], JudgeDesk], ledger: JudgeLedger, rubric: Rubric) -> JudgeSamples:
    """For `calibrate`: judge through a desk (`open_one` takes whether the options are reversed) and wait for it.

    The function raises JudgeError if the judge does not finish.
    """

    def judge(samples: Sequence[Sample], reverse: bool) -> list[Judgement]:
        # Named by what is asked, so that two calibrations at the same time keep their requests apart.
        stage = sha256_of({"calibrate": rubric.sha256, "reverse": reverse, "samples": [asdict(s) for s in samples]})
        desk = open_one(reverse)
        try:
            desk.submit(stage, rubric, samples, urgent=True)
        except BaseException:
            desk.close(wait=False)
            raise
        status = desk.close()
        if status.n_pending:
            raise JudgeError(
                f"{status.n_pending} of {status.n_asked} rows were not judged: {status.problem}",
                where=rubric.name,
                fix="the same command goes on from here",
            )
        keys = ledger.take_keys(stage)
        judgements = ledger.judgements(keys)
        return [judgements[key] for key in keys]

    return judge


def calibrate_phrases(rubric: Rubric, rows: Sequence[CalibrationRow], hit: Callable[[str], bool]) -> Agreement:
    """Agreement of a phrase rule with labelled rows. `hit` returns whether an answer is positive; finer labels are merged."""
    if rubric.positive.below is not None:
        truth = [(row.value or 0.0) < rubric.positive.below for row in rows]
    else:
        truth = [row.label in rubric.positive.labels for row in rows]
    names = {True: "positive", False: "other"}
    return agreement([names[is_positive] for is_positive in truth], [names[hit(row.answer)] for row in rows])
