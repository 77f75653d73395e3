"""Message Batches: a crash at any moment, and no item is paid twice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastconv.judge import batches
from fastconv.judge.rubric import REASONS
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store
from fastconv.store.records import Reserve
from tests.fake_claude import FakeClaude, Script, fake_claude
from tests.judging_kit import PRICE, desk, judge_all, judgement_keys, rubric, samples, settings
from tests.loop_kit import until

MODES = ("batch", "live")
#: How long a batch takes to create where a kill is to hit that call, and how long an intent is then waited for.
CREATE_S, GRACE_S = 0.04, 0.4


def ledger_of(workspace: Path) -> JudgeLedger:
    return JudgeLedger(Store.open(workspace))


def test_a_batch_is_judged_for_half_the_price(server: FakeClaude, tmp_path: Path) -> None:
    server.configure(batch_s=0.1)
    status = judge_all(server.url, tmp_path, samples(30), "batch")
    assert (status.n_scored, status.n_pending) == (30, 0)
    live = judge_all(server.url, tmp_path, samples(30, start=100), "live")
    assert status.money.spent_usd == pytest.approx((live.money.spent_usd - status.money.spent_usd) / 2, rel=0.05)
    assert server.bill()["n_batches"] == 1


def test_auto_takes_batches_for_what_is_large_and_not_urgent(server: FakeClaude, tmp_path: Path) -> None:
    judge_desk = desk(server.url, tmp_path, "auto", batch_from=20)
    judge_desk.submit("large", rubric(), samples(20))
    judge_desk.submit("small", rubric(), samples(5, start=100))
    judge_desk.submit("urgent", rubric(), samples(25, start=200), urgent=True)
    assert judge_desk.close().n_scored == 50
    bill = server.bill()
    assert bill["n_batches"] == 1
    assert sum(len(name) == 64 for name in bill["billed"]) == 30


def test_chunks_stay_within_the_limits(server: FakeClaude, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_ITEMS", 10)
    assert judge_all(server.url, tmp_path, samples(25), "batch").n_scored == 25
    assert server.bill()["n_batches"] == 3
    monkeypatch.setattr(batches, "MAX_BYTES", 10_000)
    assert judge_all(server.url, tmp_path, samples(10, start=100), "batch").n_scored == 10
    assert server.bill()["n_batches"] >= 6


def storm(workspace: Path, n: int) -> None:
    script = Script(
        seed=n, fault_share=0.2, batch_s=0.05, batch_outcomes={"expired": 0.07, "errored": 0.07, "canceled": 0.06},
        batch_faults=("create_429", "results_reset", "create_500", "create_lost", "results_reset"), wrong_ids=5,
    )  # fmt: skip
    with fake_claude(script, own_process=True) as server:
        status = judge_all(server.url, workspace, samples(n), "batch")
        bill = server.bill()
    assert (status.n_pending, status.problem) == (0, "")
    ledger = ledger_of(workspace)
    judgements = ledger.judgements(judgement_keys(settings("x"), PRICE, rubric(), samples(n)))
    assert len(judgements) == n
    assert all((judgement.values is None) == (judgement.reason in REASONS) for judgement in judgements.values())
    assert max(bill["billed"].values()) == 1
    assert ledger.counts()["replies"] == sum(bill["billed"].values())
    money = ledger.money()
    assert money.spent_usd == pytest.approx(bill["usd"], abs=1e-6)
    assert (money.reserved_usd, money.lost_usd) == (0.0, 0.0)


def test_a_storm_of_faults_pays_every_item_once(tmp_path: Path) -> None:
    storm(tmp_path, 300)


@pytest.mark.slow
def test_two_thousand_judgements_through_a_storm(tmp_path: Path) -> None:
    storm(tmp_path, 2000)


@pytest.mark.parametrize(("kind", "reason"), [("expired", "expired"), ("errored", "errored"), ("canceled", "expired")])
def test_what_never_comes_is_resubmitted_twice_and_then_unscored(
    server: FakeClaude, tmp_path: Path, kind: str, reason: str
) -> None:
    server.configure(batch_outcomes={kind: 1.0})
    status = judge_all(server.url, tmp_path, samples(3), "batch")
    assert (status.n_scored, status.n_unscored) == (0, 3)
    assert server.bill()["n_batches"] == 3
    judgements = ledger_of(tmp_path).judgements(judgement_keys(settings("x"), PRICE, rubric(), samples(3)))
    assert {judgement.reason for judgement in judgements.values()} == {reason}
    assert status.money.spent_usd == 0.0


def test_items_without_a_result_are_not_asked_for_ever(server: FakeClaude, tmp_path: Path) -> None:
    server.configure(dropped=3, batch_outcomes={"expired": 0.0})
    status = judge_all(server.url, tmp_path, samples(4), "batch")
    assert (status.n_scored + status.n_unscored, status.n_pending) == (4, 0)
    assert status.n_unscored >= 1
    assert server.bill()["n_batches"] <= 4
    assert status.money.lost_usd > 0.0


def test_a_batch_taken_whose_answer_was_lost_is_found_again(server: FakeClaude, tmp_path: Path) -> None:
    server.configure(batch_faults=["create_lost"], batch_s=0.3, wrong_ids=6)
    status = judge_all(server.url, tmp_path, samples(12), "batch")
    assert status.n_scored == 12
    assert server.bill()["n_batches"] == 1


def test_nothing_is_sent_while_it_is_not_known_whether_a_batch_was_taken(server: FakeClaude, tmp_path: Path) -> None:
    server.configure(batch_faults=["create_lost"], batch_s=600.0)
    one = desk(server.url, tmp_path, "batch")
    one.submit("stage", rubric(), samples(12))
    until(lambda: server.bill()["n_batches"] > 0)
    one.submit("another", rubric(), samples(5, start=100))
    seen = server.bill()["n_calls"]
    until(lambda: server.bill()["n_calls"] > seen + 6)  # it looks, again and again
    n_sent = server.bill()["n_batches"]
    server.configure(end_now=True, batch_s=0.0)
    assert one.close().n_scored == 17
    assert (n_sent, server.bill()["n_batches"]) == (1, 2)


def test_another_users_batch_of_the_same_size_is_not_taken_for_ours(server: FakeClaude, tmp_path: Path) -> None:
    server.configure(batch_s=0.1)
    for other in range(5):  # more than a page of them
        judge_all(server.url, tmp_path / f"other{other}", samples(12, start=1000 * (other + 1)), "batch")
    server.configure(batch_faults=["create_500"])
    status = judge_all(server.url, tmp_path / "ours", samples(12), "batch")
    assert status.n_scored == 12
    assert server.bill()["n_batches"] == 6


def test_a_desk_that_is_let_go_leaves_its_batch_to_the_next(server: FakeClaude, tmp_path: Path) -> None:
    server.configure(batch_s=600.0)
    one = desk(server.url, tmp_path, "batch")
    one.submit("stage", rubric(), samples(9))
    until(lambda: ledger_of(tmp_path).batches("sent"))
    assert one.close(wait=False).n_pending == 9
    server.configure(end_now=True)
    assert judge_all(server.url, tmp_path, samples(9), "batch").n_scored == 9
    assert server.bill()["n_batches"] == 1


def test_results_nobody_waits_for_are_kept_and_read_later(server: FakeClaude, tmp_path: Path) -> None:
    left_under_way(server, tmp_path, 9)
    server.configure(end_now=True)
    assert judge_all(server.url, tmp_path, samples(2, start=100), "live").n_scored == 2  # ingests the old batch too
    ledger = ledger_of(tmp_path)

    def read() -> bool:
        judge_all(server.url, tmp_path, samples(1, start=200), "batch")
        return not ledger.batches("sent")

    until(read)
    n_calls = server.bill()["n_calls"]
    assert judge_all(server.url, tmp_path, samples(9), "live").n_scored == 9
    assert server.bill()["n_calls"] <= n_calls + 3  # no message was asked for again
    assert max(server.bill()["billed"].values()) == 1


def left_under_way(server: FakeClaude, workspace: Path, n: int, **fields: Any) -> str:
    """Send a batch that does not end yet and let go of it; gives its id. From now on, batches end at once."""
    server.configure(batch_s=60.0)
    judge_desk = desk(server.url, workspace, "batch", **fields)
    judge_desk.submit("stage", rubric(), samples(n))
    ledger = ledger_of(workspace)
    while not ledger.batches("sent"):
        time.sleep(0.01)
    judge_desk.close(wait=False)
    server.configure(batch_s=0.0)
    return str(ledger.batches("sent")[0].batch)


@pytest.mark.parametrize("mode", ["batch", "live"])
def test_a_batch_that_the_key_is_not_shown_keeps_no_other_work_waiting(
    server: FakeClaude, tmp_path: Path, mode: str
) -> None:
    gone = left_under_way(server, tmp_path, 12)
    server.configure(batch_gone=[gone])
    judge_desk = desk(server.url, tmp_path, mode, batch_grace_s=0.0, concurrency=4)
    judge_desk.submit("stuck", rubric(), samples(12))
    judge_desk.submit("beside", rubric(), samples(9, start=100))
    status = judge_desk.close()
    assert (status.n_scored, status.n_pending, status.finished) == (9, 12, {"beside"})
    assert gone in status.problem
    assert "another account's" in status.problem
    assert "\n" not in status.problem
    assert status.out
    assert not status.stopped
    money = ledger_of(tmp_path).money()
    assert money.reserved_usd > 0.0  # it may come back with the right key
    assert money.lost_usd == 0.0
    server.configure(batch_gone=[], end_now=True)
    assert judge_all(server.url, tmp_path, samples(12), "batch").n_scored == 12
    assert max(server.bill()["billed"].values()) == 1
    assert ledger_of(tmp_path).money().lost_usd == 0.0


@pytest.mark.parametrize("mode", ["batch", "live"])
def test_a_batch_that_is_not_shown_and_a_spent_budget_end_the_desk(
    server: FakeClaude, tmp_path: Path, mode: str
) -> None:
    server.configure(batch_gone=[left_under_way(server, tmp_path, 12)])
    reserved_usd = ledger_of(tmp_path).money().reserved_usd
    status = judge_all(
        server.url, tmp_path, samples(9, start=100), mode, batch_grace_s=0.0, budget_usd=1.001 * reserved_usd
    )
    assert status.n_pending == 9
    assert "is spent" in status.problem


def test_an_archived_batch_is_closed_as_lost_and_its_items_are_asked_again(server: FakeClaude, tmp_path: Path) -> None:
    gone = left_under_way(server, tmp_path, 6)
    reserved_usd = ledger_of(tmp_path).money().reserved_usd
    server.configure(archived=[gone], end_now=True)
    judge_desk = desk(server.url, tmp_path, "batch")
    judge_desk.submit("again", rubric(), samples(6))
    judge_desk.submit("beside", rubric(), samples(5, start=100))
    status = judge_desk.close()
    assert (status.n_scored, status.n_pending, status.problem) == (11, 0, "")
    assert status.money.lost_usd == pytest.approx(reserved_usd)
    assert status.money.reserved_usd == 0.0
    assert ledger_of(tmp_path).counts()["lost"] == 6


def test_what_is_always_archived_is_asked_again_twice_and_then_unscored(server: FakeClaude, tmp_path: Path) -> None:
    server.configure(archived=["*"])
    status = judge_all(server.url, tmp_path, samples(3), "batch")
    assert (status.n_scored, status.n_unscored) == (0, 3)
    assert server.bill()["n_batches"] == 3
    assert ledger_of(tmp_path).counts()["lost"] == 9


def test_a_batch_deleted_after_this_key_has_seen_it_is_closed_as_lost(server: FakeClaude, tmp_path: Path) -> None:
    server.configure(batch_s=60.0)
    judge_desk = desk(server.url, tmp_path, "batch")
    judge_desk.submit("stage", rubric(), samples(4))
    ledger = ledger_of(tmp_path)
    while not ledger.batches("sent"):
        time.sleep(0.01)
    n_calls = server.bill()["n_calls"]
    while server.bill()["n_calls"] == n_calls:  # the desk has looked at it
        time.sleep(0.01)
    server.configure(batch_s=0.0, batch_gone=["msgbatch_0000"])
    status = judge_desk.close()
    assert (status.n_scored, status.problem) == (4, "")
    assert server.bill()["n_batches"] == 2
    assert ledger.counts()["lost"] == 4


def test_a_batch_not_shown_for_longer_than_results_are_kept_is_closed(
    server: FakeClaude, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.configure(batch_gone=[left_under_way(server, tmp_path, 4)])
    monkeypatch.setattr(batches, "RESULTS_KEPT_S", 0.0)
    assert judge_all(server.url, tmp_path, samples(4), "batch").n_scored == 4
    assert ledger_of(tmp_path).counts()["lost"] == 4


def test_results_that_always_break_off_keep_no_other_batch_waiting(server: FakeClaude, tmp_path: Path) -> None:
    broken = left_under_way(server, tmp_path, 4)
    server.configure(results_broken=[broken], end_now=True, batch_outcomes={"expired": 0.3})
    status = judge_all(server.url, tmp_path, samples(10, start=100), "batch")
    assert status.n_pending == 0
    server.configure(results_broken=[], batch_outcomes={})
    assert judge_all(server.url, tmp_path, samples(4), "batch").n_scored == 4
    assert ledger_of(tmp_path).counts()["lost"] == 0


def test_an_intent_that_may_be_an_archived_batch_is_not_freed(server: FakeClaude, tmp_path: Path) -> None:
    server.configure(batch_faults=["create_lost"], batch_s=60.0)
    one = desk(server.url, tmp_path, "batch")
    one.submit("stage", rubric(), samples(5))
    until(lambda: server.bill()["n_batches"] > 0)
    one.close(wait=False)
    server.configure(batch_s=0.0, archived=["msgbatch_0000"], end_now=True)
    status = judge_all(server.url, tmp_path, samples(5), "batch")
    assert status.n_scored == 5
    assert ledger_of(tmp_path).counts()["lost"] == 5


def test_a_batch_is_sent_again_no_sooner_than_the_server_asks(server: FakeClaude, tmp_path: Path) -> None:
    asked_s = 1.0
    server.configure(batch_faults=["create_429"], retry_after_s=asked_s)
    assert judge_all(server.url, tmp_path, samples(2), "batch").n_scored == 2
    first, second = server.bill()["asked_at"]
    assert second - first >= asked_s


def state_of(workspace: Path) -> tuple[str, int]:
    """(state of the newest batch, replies in the ledger), read beside a child that is at work; ("", 0) before any."""
    if not (workspace / "ledger.sqlite").is_file():
        return "", 0
    with contextlib.closing(sqlite3.connect(workspace / "ledger.sqlite", timeout=5)) as db:
        try:
            state = db.execute("SELECT state FROM judge_batches ORDER BY made_at DESC LIMIT 1").fetchone()
            n_replies = db.execute("SELECT COUNT(*) FROM judge_replies").fetchone()[0]
        except sqlite3.OperationalError:  # its tables are not there yet
            return "", 0
    return (state[0] if state else ""), n_replies


def killed(
    server: FakeClaude, workspace: Path, mode: str, n: int, ready: Callable[[], bool], after_s: float, grace_s: float
) -> bool:
    """Judge in a forked child and kill it a while after it is ready; True if it was still at work."""
    child = os.fork()
    if child == 0:
        judge_all(server.url, workspace, samples(n), mode, batch_grace_s=grace_s, batch_poll_s=0.02, concurrency=8)
        os._exit(0)
    deadline = time.monotonic() + 30
    while not ready() and time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def kill_batches(server: FakeClaude, workspace: Path, n: int, draw: random.Random, seen: Counter[str]) -> None:
    """Kill one judge between its intent and its batch, then others while they look for it and take its results."""
    server.configure(latency_s=CREATE_S, batch_s=0.0)

    def is_sent() -> bool:
        return state_of(workspace)[0] == "sent"

    def is_intended() -> bool:
        return state_of(workspace)[0] == "intended"

    def calls() -> bool:
        return server.bill()["n_calls"] > n_calls

    # Over the call that creates the batch; over the list of batches; over the results, piece by piece.
    for ready, over_s in ((is_intended, 1.3 * CREATE_S), (calls, 0.03), *[(is_sent, 0.06)] * 4):
        n_calls = server.bill()["n_calls"]
        is_dead = killed(server, workspace, "batch", n, ready, draw.uniform(0.0, over_s), GRACE_S)
        state, n_replies = state_of(workspace)
        if not is_dead or state not in ("intended", "sent"):
            return
        seen[state] += 1
        seen["ingesting"] += state == "sent" and 0 < n_replies < n


def kill_live(server: FakeClaude, workspace: Path, n: int, draw: random.Random, seen: Counter[str]) -> None:
    """Kill judges while requests are under way."""
    server.configure(latency_s=0.02)
    for _ in range(6):
        n_calls, before = server.bill()["n_calls"], state_of(workspace)[1]
        is_dead = killed(
            server, workspace, "live", n, lambda before=n_calls: server.bill()["n_calls"] > before,
            draw.uniform(0.0, 0.08), GRACE_S,
        )  # fmt: skip
        n_replies = state_of(workspace)[1]
        if not is_dead or n_replies == n:
            return
        seen["asking"] += 1
        seen["judging"] += n_replies > before


@pytest.mark.parametrize(
    ("mode", "kills"), [("live", 10), *(pytest.param(m, 50, marks=pytest.mark.slow) for m in MODES)]
)
def test_kills_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, kills: int) -> None:
    """Only kills between the intent (live: the first call) and the last result count; several in every state."""
    monkeypatch.setattr(batches, "_INGEST_ITEMS", 5)  # many steps, between which a kill can come
    n, draw, seen = 48, random.Random(7), Counter[str]()
    few = max(3, kills // 10)
    states = ("intended", "sent", "ingesting") if mode == "batch" else ("asking", "judging")
    with fake_claude(own_process=True) as server:
        judge_all(server.url, tmp_path / "warm", samples(3), mode)  # the parent is warm: imports, templates, regexes
        before = sum(server.bill()["billed"].values())
        for number in range(3 * kills):
            if sum(seen[state] for state in states[:2]) >= kills and all(seen[state] >= few for state in states):
                break
            workspace = tmp_path / f"run{number}"
            (kill_batches if mode == "batch" else kill_live)(server, workspace, n, draw, seen)
            status = judge_all(server.url, workspace, samples(n), mode, batch_grace_s=GRACE_S, batch_poll_s=0.02)
            assert (status.n_scored, status.n_pending) == (n, 0)
            total = sum(server.bill()["billed"].values())
            lost = ledger_of(workspace).counts()["lost"]
            if mode == "batch":
                assert (total, lost) == (before + n, 0)
            else:
                assert total - before - n <= lost <= 6 * 8
            before = total
    assert all(seen[state] >= few for state in states), seen


def test_an_intent_that_never_left_is_freed_after_its_grace(server: FakeClaude, tmp_path: Path) -> None:
    keys = judgement_keys(settings("x"), PRICE, rubric(), samples(4))
    child = os.fork()
    if child == 0:
        JudgeLedger(Store.open(tmp_path)).write_intent([Reserve(key, 0.01) for key in keys])
        os._exit(0)
    os.waitpid(child, 0)
    assert judge_all(server.url, tmp_path, samples(4), "batch").n_scored == 4
    assert ledger_of(tmp_path).money().reserved_usd == 0.0
