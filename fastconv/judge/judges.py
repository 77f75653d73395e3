"""The ways to have samples judged, ready for `run`: keys of a stage, what it will cost, and calibration's askers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fastconv.errors import JudgeError
from fastconv.store.judgements import Judgement
from fastconv.judge.book import params_of, requests_of
from fastconv.judge.budget import Estimate, Price, estimate
from fastconv.judge.calibrate import CalibrationRow, JudgeSamples
from fastconv.judge.claude import Outage
from fastconv.judge.desk import JudgeDesk
from fastconv.judge.local import Ask, LocalJudge
from fastconv.judge.access import JudgeAccess
from fastconv.judge.request import JudgeItem, build_request
from fastconv.judge.rubric import Rubric
from fastconv.judge.scores import Agreement, agreement
from fastconv.recipe import JudgeSettings
from fastconv.store.ledger import Sample, Store
from fastconv.store.judge_ledger import JudgeLedger


def open_desk(settings: JudgeSettings, workspace: Path, access: JudgeAccess, *, reverse: bool = False) -> JudgeDesk:
    """A desk for a paid judge."""
    factor = access.batch_factor
    return JudgeDesk(settings, workspace, access.price, access.key, batch_factor=factor, reverse=reverse)


def stage_keys(settings: JudgeSettings, price: Price | None, rubric: Rubric, samples: Sequence[Sample]) -> list[str]:
    """Keys of the judgements of a stage's samples by a paid judge, in their order."""
    return [request.key for request in requests_of(rubric, params_of(settings, price), samples)]


def planned_cost(
    settings: JudgeSettings, access: JudgeAccess, rubric: Rubric, n: int, *, question_chars: int, answer_chars: int
) -> Estimate:
    """What `n` judgements of texts of this length cost in US dollars; `auto` counts as a batch where it would be one."""
    is_batch = settings.mode == "batch" or (settings.mode == "auto" and n >= settings.batch_from)
    item = JudgeItem("q" * question_chars, "a " * (answer_chars // 2), 0)
    request = build_request(rubric, params_of(settings, access.price), item)
    return estimate([request], n, access.price, access.batch_factor if is_batch else 1.0)


def ask_desk(settings: JudgeSettings, workspace: Path, access: JudgeAccess, rubric: Rubric) -> JudgeSamples:
    """For `calibrate`: judge through a desk of its own and wait. Raises JudgeError if the judge could not finish."""

    def judge(samples: Sequence[Sample], reverse: bool) -> list[Judgement]:
        desk = open_desk(settings, workspace, access, reverse=reverse)
        desk.submit("calibration", rubric, samples, urgent=True)
        status = desk.close()
        if status.n_pending:
            raise JudgeError(
                f"{status.n_pending} of {status.n_asked} rows were not judged: {status.problem}",
                where=rubric.name,
                fix="the same command goes on from here",
            )
        keys = [r.key for r in requests_of(rubric, params_of(settings, access.price, reverse=reverse), samples)]
        store = Store.open(workspace)
        try:
            found = JudgeLedger(store).judgements(keys)
        finally:
            store.close()
        return [found[key] for key in keys]

    return judge


def ask_local(ledger: JudgeLedger, ask: Ask, model: str, rubric: Rubric, *, max_judged_chars: int) -> JudgeSamples:
    """For `calibrate`: judge through an `Ask`. Raises JudgeError if the judge cannot be reached."""

    def judge(samples: Sequence[Sample], reverse: bool) -> list[Judgement]:
        local = LocalJudge(ledger, ask, model, max_judged_chars=max_judged_chars, reverse=reverse)
        try:
            found = local.judge(rubric, samples)
        except Outage as outage:
            raise JudgeError(str(outage), where=model, fix="check judge.base_url") from None
        return [found[ask.key] for ask in local.asks(rubric, samples)]

    return judge


def calibrate_phrases(rubric: Rubric, rows: Sequence[CalibrationRow], hit: Callable[[str], bool]) -> Agreement:
    """How a phrase rule does on labelled rows: `hit` against the rubric's positives. It knows no finer labels."""
    if rubric.positive.below is not None:
        truth = [(row.value or 0.0) < rubric.positive.below for row in rows]
    else:
        truth = [row.label in rubric.positive.labels for row in rows]
    names = {True: "positive", False: "other"}
    return agreement([names[is_one] for is_one in truth], [names[hit(row.answer)] for row in rows])
