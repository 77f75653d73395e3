"""One desk for every judge: what it promises whoever answers, and that ledgers of before still count."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from fastconv.errors import JudgeError, stopped
from fastconv.judge import budget, desk
from fastconv.judge.access import JudgeAccess, PaidAccess
from fastconv.judge.batches import BatchCard, NotShown
from fastconv.judge.budget import JudgeIdentity, Price
from fastconv.judge.desk import PROVIDERS, DeskStatus, JudgeDesk
from fastconv.judge.http import ApiKey, Outage
from fastconv.judge.local import SLICE, EndpointJudge, LocalReply, Prompt, ResidentJudge
from fastconv.judge.request import JudgeRequest
from fastconv.judge.rubric import Rubric, parse_rubric
from fastconv.recipe import JudgeSettings
from fastconv.run.judging import JudgeQueue
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store
from fastconv.store.records import RawReply, Stage
from tests import ROOT
from tests.fake_claude import fake_claude
from tests.judging_kit import KEY, PRICE, judge_all, rubric, samples, settings
from tests.judging_kit import desk as desk_on
from tests.loop_kit import until

ENDPOINT = JudgeIdentity("endpoint", "local:test", settings("http://127.0.0.1:9/v1", "local"))
RESIDENT = JudgeIdentity("resident", "resident:test", JudgeSettings(mode="local"))


# --- another provider --------------------------------------------------------------------------------------


class Other:
    """A provider with an API of its own: what a further one has to bring, beside its prices and its line in PROVIDERS."""

    key_name: ClassVar[str] = "OTHER_API_KEY"
    url: ClassVar[str] = "https://other.example"
    #: Batches that were taken, by id; how often each request was asked; and what is to go wrong next.
    taken: ClassVar[dict[str, list[str]]] = {}
    asked: ClassVar[list[str]] = []
    faults: ClassVar[list[Exception]] = []

    def __init__(self, settings: JudgeSettings, price: Price, key: ApiKey, batch_factor: float) -> None:
        self.n_parallel, self.batches = settings.concurrency, self

    @staticmethod
    def check(settings: JudgeSettings, key: ApiKey, within_s: float) -> None:
        raise Outage("other.example is asleep")

    def _next(self) -> None:
        if self.faults:
            raise self.faults.pop(0)

    async def ask(self, request: JudgeRequest, before: Sequence[RawReply]) -> RawReply:
        self._next()
        self.asked.append(request.key)
        return self.parse(request.user_text(re_ask=bool(before)), 1.0)

    async def create(self, items: Sequence[tuple[str, JudgeRequest, bool]]) -> str:
        self.taken[f"b{len(self.taken)}"] = [custom_id for custom_id, _, _ in items]
        self._next()
        return f"b{len(self.taken) - 1}"

    async def look(self, batch: str) -> BatchCard:
        if batch not in self.taken:
            raise NotShown(404)
        return BatchCard(batch, 2e9, len(self.taken[batch]), ended=True, has_results=True)

    async def newest_first(self) -> AsyncGenerator[BatchCard, None]:
        for batch in reversed(self.taken):
            yield await self.look(batch)

    async def results(self, batch: str) -> AsyncGenerator[tuple[str, str, Any], None]:
        for custom_id in self.taken[batch]:
            yield custom_id, "succeeded", "x"

    def parse(self, message: object, worst_usd: float) -> RawReply:
        return RawReply("other", "other-1", json.dumps({"why": "x", "verdict": "refused"}), "stop", {}, 0.001)

    async def close(self) -> None:
        pass


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Price:
    """The price of a model of another provider."""
    for name in ("taken", "asked", "faults"):
        monkeypatch.setattr(Other, name, type(getattr(Other, name))())
    monkeypatch.setitem(PROVIDERS, "other", Other)
    monkeypatch.setattr(desk, "FIRST_WAIT_S", 0.01)
    return PRICE.model_copy(update={"provider": "other"})


@pytest.mark.parametrize("mode", ["live", "batch"])
def test_another_provider_is_one_class_and_a_price(tmp_path: Path, other: Price, mode: str) -> None:
    Other.faults += [Outage("asleep"), Outage("busy", taken=False)]
    one = JudgeDesk(settings("", mode), tmp_path, other, ApiKey(KEY))
    one.submit("stage", rubric(), samples(20))
    status = one.close()
    assert (status.n_scored, status.n_pending, status.finished) == (20, 0, {"stage"})
    sent = Other.asked if mode == "live" else [name for batch in Other.taken.values() for name in batch]
    assert len(set(sent)) == len(sent) == 20
    money = JudgeLedger(Store.open(tmp_path)).money()
    assert money.spent_usd == pytest.approx(0.02)
    assert money.reserved_usd == 0.0
    # Live, the first request may have been billed; the batch whose answer was lost was found again.
    assert (money.lost_usd > 0.0) == (mode == "live")


def test_another_provider_is_checked_with_its_own_key_and_address(other: Price) -> None:
    from fastconv.judge.access import check_reachable, check_settings
    from fastconv.judge.budget import PriceTable

    table = PriceTable(budget.load_prices(ROOT / "data" / "prices.toml").checked, 0.5, {"claude-test": other}, "")
    given = settings("")
    with pytest.raises(JudgeError, match="OTHER_API_KEY"):
        check_settings(given, table, {"ANTHROPIC_API_KEY": KEY})
    access = check_settings(given, table, {"OTHER_API_KEY": KEY})
    assert access is not None
    with pytest.raises(JudgeError, match=r"other\.example is asleep"):
        check_reachable(given, access)
    claudes = settings("https://api.anthropic.com")  # another provider's key does not go there
    with pytest.raises(JudgeError, match=r"send your API key to api\.anthropic\.com"):
        check_settings(claudes, table, {"OTHER_API_KEY": KEY})


# --- requests ----------------------------------------------------------------------------------------------


def no_base() -> Any:
    raise AssertionError("the resident base is not asked")


def outbox(store: Store) -> dict[str, list[str]]:
    """The keys that are kept, by stage."""
    if not store.rows("SELECT 1 FROM sqlite_master WHERE name='judge_outbox'"):
        return {}  # the judge's thread makes it when it opens the ledger
    return {stage: json.loads(keys) for stage, keys in store.rows("SELECT stage, keys FROM judge_outbox")}


def test_requests_are_built_once_and_kept_until_their_stage_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def build(*given: Any) -> JudgeRequest:
        request = budget_build(*given)
        built.append(request.key)
        return request

    budget_build = budget.build_request
    monkeypatch.setattr(budget, "build_request", build)
    store, todo = Store.open(tmp_path), samples(40)
    drawn = Stage("eval", "eval/x", 1, {"x": 1})
    stage = Stage("judge", "judge/x", 1, {"x": 1}, {"eval": drawn}, {"rubric": rubric()})
    store.commit(drawn, outputs={}, facts={}, seconds=0.0, samples=todo)
    watcher: Any = SimpleNamespace(judging=lambda status: None, stage_done=lambda stage, seconds: None)
    kept: list[str] = []
    with fake_claude() as server:
        server.configure(hold=True)
        graph: Any = SimpleNamespace(judge=JudgeIdentity("paid", "claude-test", settings(server.url), PRICE))
        access = JudgeAccess(PaidAccess(PRICE, 0.5, ApiKey(KEY)))
        stop = threading.Event()
        with JudgeQueue(graph, store, "run", watcher, stop=stop, resident=no_base, access=access) as judging:
            judging.submit(stage)
            until(lambda: bool(outbox(store)))
            kept += outbox(store)[stage.key]
            server.configure(hold=False)
            judging.wait()
    assert judging.n_committed == 1
    assert built == kept
    # The scores name their judgements in the order of the samples.
    scores = {(score.row, score.sample): score for score in store.scores(stage.key)}
    assert [scores[one.row, one.sample].detail["judgement"] for one in todo] == kept
    assert outbox(store) == {}


def test_a_stage_is_not_finished_before_all_its_requests_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_claude() as server:
        assert judge_all(server.url, tmp_path, samples(32)).n_scored == 32
        server.configure(hold=True)
        build, seen = JudgeIdentity.requests, list[DeskStatus]()

        def slow(self: JudgeIdentity, *given: Any, **how: bool) -> Any:
            time.sleep(0.05)  # the status is looked at after every slice
            return build(self, *given, **how)

        publish = JudgeDesk._publish

        def look(self: JudgeDesk) -> None:
            publish(self)
            seen.append(self.poll())

        monkeypatch.setattr(JudgeIdentity, "requests", slow)
        monkeypatch.setattr(JudgeDesk, "_publish", look)
        one = desk_on(server.url, tmp_path)
        one.submit("stage", rubric(), samples(40))  # the first 32 are judged, the others are not
        until(lambda: one.poll().n_asked == 40)
        assert 32 in {status.n_asked for status in seen}
        assert not any(status.finished for status in seen)
        server.configure(hold=False)
        assert one.close().finished == {"stage"}


# --- the resident base -------------------------------------------------------------------------------------


def resident(
    workspace: Path, complete: Callable[[Sequence[Prompt]], Sequence[LocalReply]], n: int, name: str = "alignment"
) -> tuple[JudgeDesk, Callable[[], Any]]:
    """A desk of the resident base, and what submits `n` samples to it."""
    one = JudgeDesk(RESIDENT.settings, workspace, judge=RESIDENT, provider=ResidentJudge(complete))
    return one, lambda: one.submit("stage", rubric(name), samples(n))


def test_the_resident_base_reads_in_the_callers_thread_many_prompts_at_once(tmp_path: Path) -> None:
    sizes: list[int] = []

    def complete(prompts: Sequence[Prompt]) -> list[LocalReply]:
        assert threading.current_thread() is threading.main_thread()
        sizes.append(len(prompts))
        return [LocalReply("9", {"9": 0.0}) for _ in prompts]

    one, submit = resident(tmp_path, complete, 2 * SLICE + 3)
    submit()
    assert one.poll().finished == {"stage"}  # it is judged when it is handed over
    status = one.close()
    assert (status.n_scored, status.n_pending) == (2 * SLICE + 3, 0)
    assert sizes == [SLICE, SLICE, SLICE, SLICE, 3, 3]  # two measures each
    again, submit = resident(tmp_path, complete, 2 * SLICE + 3)
    submit()
    assert again.close().n_scored == 2 * SLICE + 3
    assert len(sizes) == 6


def test_what_stops_a_run_stops_the_resident_base_and_what_it_read_stays(tmp_path: Path) -> None:
    n_calls = 0

    def complete(prompts: Sequence[Prompt]) -> list[LocalReply]:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            raise stopped("judge")
        return [LocalReply("9", {"9": 0.0}) for _ in prompts]

    one, submit = resident(tmp_path, complete, 2 * SLICE)
    with pytest.raises(type(stopped("judge"))):
        submit()
    assert one.close(wait=False).n_scored == SLICE
    again, submit = resident(tmp_path, complete, 2 * SLICE)
    submit()
    assert again.close().n_scored == 2 * SLICE
    assert n_calls == 5


def test_a_resident_base_without_memory_leaves_the_rest_pending_with_a_line(tmp_path: Path) -> None:
    def complete(prompts: Sequence[Prompt]) -> list[LocalReply]:
        raise JudgeError("no memory is left", where="judge", fix="free the device")

    one, submit = resident(tmp_path, complete, 3)
    submit()
    submit()  # and the desk comes back at once
    status = one.close()
    assert (status.n_pending, status.stopped) == (3, True)
    assert "no memory is left" in status.problem


# --- ledgers of before -------------------------------------------------------------------------------------


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A workspace whose ledger was written before there was one desk for all: live, batch and local judgements,
    replies of a batch that nobody had read, and a local judge that died between two measures."""
    Store.open(tmp_path).close()
    (tmp_path / "ledger.sqlite").unlink()
    for rest in tmp_path.glob("ledger.sqlite-*"):
        rest.unlink()
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
        db.executescript((ROOT / "tests" / "judge" / "older_ledger.sql").read_text(encoding="utf-8"))
        db.execute("PRAGMA user_version=1")
    return tmp_path


def rubric_of(workspace: Path, name: str) -> Rubric:
    """The rubric as it was: the shipped one may have changed since."""
    (row,) = Store.open(workspace).rows(f"SELECT body FROM judge_rubrics WHERE name='{name}'")
    return parse_rubric(json.loads(row[0]), where=name)


@pytest.mark.parametrize("mode", ["live", "batch"])
def test_what_was_paid_before_counts_and_is_not_paid_again(older: Path, mode: str) -> None:
    before = JudgeLedger(Store.open(older)).money()
    assert before.spent_usd == pytest.approx(0.012785)
    with fake_claude() as server:
        one = desk_on(server.url, older, mode)
        for n, start in ((6, 0), (2, 10), (5, 20), (4, 30), (1, 40)):
            one.submit(f"stage{start}", rubric_of(older, "refusal"), samples(n, start=start))
        status = one.close()
        assert (status.n_scored, status.n_unscored, status.n_pending) == (16, 2, 0)
        assert server.bill()["n_calls"] == 0
        assert JudgeLedger(Store.open(older)).money() == before
        # The rest of the budget is what is left of it.
        assert judge_all(server.url, older, samples(3, start=90), budget_usd=before.spent_usd + 1e-6).n_pending == 3


def test_a_local_judge_goes_on_where_an_older_one_died(older: Path) -> None:
    asked: list[str] = []

    def complete(system: str, user: str, characters: str) -> LocalReply:
        asked.append(user)
        return LocalReply("0")

    one = JudgeDesk(ENDPOINT.settings, older, judge=ENDPOINT, provider=EndpointJudge(complete, 1))
    alignment = rubric_of(older, "alignment")
    one.submit("whole", alignment, samples(2))
    one.submit("half", alignment, samples(1, start=5))
    assert one.close().n_scored == 3
    assert ["coherent" in user for user in asked] == [True]  # `aligned` was answered before
    ledger = JudgeLedger(Store.open(older))
    values = [dict(judgement.values or {}) for judgement in ledger.judgements(ledger.take_keys("half")).values()]
    assert values == [{"aligned": pytest.approx(700 / 9), "coherent": 0.0}]
