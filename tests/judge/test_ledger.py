"""The judging tables: money that cannot be overspent, keys asked once, a NULL for what has no value."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastconv.errors import StoreError
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store
from fastconv.store.records import Judgement, RawReply, Reserve, Settle, Unpaid


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    one = Store.open(tmp_path)
    yield one
    one.close()


def reply(cost_usd: float, fault: str | None = None) -> RawReply:
    return RawReply("live", "claude-test", "{}", "end_turn", {"output_tokens": 3}, cost_usd, 0.1, fault)


def judged(key: str) -> Judgement:
    return Judgement(key, "r" * 64, "claude-test", 0, {"refused": 1.0}, {"verdict": "refused"})


def test_the_cap_counts_what_is_booked_spent_and_lost(store: Store) -> None:
    ledger = JudgeLedger(store, cap_usd=1.0)
    first, second, third = ledger.apply([Reserve("a", 0.5), Reserve("b", 0.5), Reserve("c", 0.000001)])
    assert isinstance(first, int)
    assert isinstance(second, int)
    assert third == "over budget"
    ledger.apply([Settle(first, "a", reply(0.1), judged("a"))])
    assert ledger.apply([Reserve("c", 0.4)]) != ["over budget"]
    assert ledger.apply([Reserve("d", 0.000001)]) == ["over budget"]
    ledger.apply([Unpaid(second, "lost")])
    money = ledger.money()
    assert (money.spent_usd, money.lost_usd, money.reserved_usd, money.left_usd) == (0.1, 0.5, 0.4, 0.0)


def test_a_key_is_asked_once_at_a_time_and_never_after_its_judgement(store: Store) -> None:
    ledger = JudgeLedger(store)
    ticket = ledger.apply([Reserve("a", 0.1)])[0]
    assert isinstance(ticket, int)
    assert ledger.apply([Reserve("a", 0.1)]) == ["held"]
    ledger.apply([Settle(ticket, "a", reply(0.01, "malformed"), None)])
    assert [reply.fault for reply in ledger.unread("a")] == ["malformed"]
    ticket = ledger.apply([Reserve("a", 0.1)])[0]
    assert isinstance(ticket, int)
    ledger.apply([Settle(ticket, "a", reply(0.01), judged("a"))])
    assert ledger.apply([Reserve("a", 0.1)]) == ["done"]
    assert [entry.fault for entry in ledger.replies("a")] == ["malformed", None]


def test_a_reply_that_nobody_has_read_yet_is_not_paid_for_again(store: Store) -> None:
    ledger = JudgeLedger(store)
    ticket = ledger.apply([Reserve("a", 0.1)])[0]
    assert isinstance(ticket, int)
    ledger.apply([Settle(ticket, "a", reply(0.01), None)])
    assert ledger.apply([Reserve("a", 0.1)]) == ["done"]
    ledger.set_fault("a", "malformed")
    assert isinstance(ledger.apply([Reserve("a", 0.1)])[0], int)


def test_ending_a_sending_twice_changes_nothing(store: Store) -> None:
    ledger = JudgeLedger(store)
    ticket = ledger.apply([Reserve("a", 0.1)])[0]
    assert isinstance(ticket, int)
    end = Settle(ticket, "a", reply(0.02), judged("a"))
    ledger.apply([end, end, Unpaid(ticket, "lost")])
    ledger.apply([end])
    assert ledger.money().spent_usd == 0.02
    assert len(ledger.replies("a")) == 1


def test_a_dead_process_leaves_its_bookings_as_losses(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        ledger = JudgeLedger(Store.open(tmp_path), cap_usd=1.0)
        ledger.apply([Reserve("a", 0.3)])
        ledger.write_intent([Reserve("b", 0.2)])
        os._exit(0)
    os.waitpid(child, 0)
    ledger = JudgeLedger(Store.open(tmp_path), cap_usd=1.0)
    money = ledger.money()
    assert (money.lost_usd, money.reserved_usd) == (0.3, 0.2)  # the batch may still be running
    assert ledger.apply([Reserve("b", 0.1)]) == ["held"]
    assert isinstance(ledger.apply([Reserve("a", 0.1)])[0], int)
    assert [batch.n for batch in ledger.batches("intended")] == [1]
    ledger.void_batch(ledger.batches("intended")[0].intent)
    assert isinstance(ledger.apply([Reserve("b", 0.1)])[0], int)


def test_a_live_process_keeps_its_intent_to_itself(store: Store) -> None:
    ledger = JudgeLedger(store)
    intent, results = ledger.write_intent([Reserve("a", 0.1), Reserve("b", 0.1)])
    assert all(isinstance(result, int) for result in results)
    assert ledger.batches("intended") == []
    ledger.release_batch(intent)
    assert [batch.intent for batch in ledger.batches("intended")] == [intent]


def test_an_intent_nobody_has_money_for_is_not_written(store: Store) -> None:
    ledger = JudgeLedger(store, cap_usd=0.01)
    assert list(ledger.write_intent([Reserve("a", 0.1)])[1]) == ["over budget"]
    assert ledger.money().reserved_usd == 0.0
    with store.transaction() as db:
        assert db.execute("SELECT COUNT(*) FROM judge_batches").fetchone()[0] == 0


def test_no_value_without_a_null_and_no_null_without_a_reason(store: Store) -> None:
    ledger = JudgeLedger(store)
    ledger.finish([Judgement("a", "r", "m", 0, None, {}, "malformed")])
    judgement = ledger.judgements(["a"])["a"]
    assert judgement.values is None
    assert judgement.reason == "malformed"
    for bad in (Judgement("b", "r", "m", 0, None, {}), Judgement("c", "r", "m", 0, {"x": 0.0}, {}, "malformed")):
        with pytest.raises(StoreError):
            ledger.finish([bad])


def test_a_finished_judgement_is_never_changed(store: Store) -> None:
    ledger = JudgeLedger(store)
    ledger.finish([judged("a")])
    ledger.finish([Judgement("a", "r", "m", 0, None, {}, "malformed")])
    assert ledger.judgements(["a"])["a"].values == {"refused": 1.0}


def test_a_calibration_is_kept_by_rubric_and_model(store: Store) -> None:
    ledger = JudgeLedger(store)
    ledger.save_calibration("r", "m", {"kappa": 0.5})
    ledger.save_calibration("r", "m", {"kappa": 0.6})
    assert ledger.calibration("r", "m") == {"kappa": 0.6}
    assert ledger.calibration("r", "other") is None
