"""Claude live, real SDK over loopback: faults, outages, secrets, injections, throughput."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from fastconv.errors import JudgeError
from fastconv.judge import desk as judge_desk_module
from fastconv.judge.access import PaidAccess, check_reachable
from fastconv.judge.budget import build_requests, judge_params
from fastconv.judge.calibrate import fill_attempt, load_attempts
from fastconv.judge.claude import make_client, parse_reply
from fastconv.judge.http import ApiKey, json_object
from fastconv.judge.request import JudgeRequest
from fastconv.judge.rubric import REASONS, judge_stage_scores
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Sample, Store
from tests.fake_claude import DELIVERED, LIVE_FAULTS, FakeClaude, Script, fake_claude
from tests.judging_kit import DATA, KEY, PRICE, desk, judge_all, judgement_keys, rubric, samples, settings
from tests.loop_kit import until

INJECTIONS = load_attempts(DATA / "injections.json")


def filled_for(name: str) -> list[str]:
    """Every attempt, asking for the best verdict of a rubric."""
    return [fill_attempt(attempt, rubric(name), "100" if name == "alignment" else "helped") for attempt in INJECTIONS]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two repetitions, so that a dead judge is found dead soon."""
    monkeypatch.setattr(judge_desk_module, "TRIES", 3)


def ledger_of(workspace: Path) -> JudgeLedger:
    return JudgeLedger(Store.open(workspace))


def storm(workspace: Path, n: int) -> None:
    """`n` judgements through 20 % faults of every kind: all finished, none lost, none paid twice, calls bounded."""
    with fake_claude(Script(fault_share=0.2, hang_s=10.0, seed=n), own_process=True) as server:
        # An answer that is not held back comes in milliseconds, so that only those time out that are lost.
        status = judge_all(server.url, workspace, samples(n), timeout_s=2.0, concurrency=32)
        bill = server.bill()
    assert (status.n_asked, status.n_pending, status.problem) == (n, 0, "")
    ledger = ledger_of(workspace)
    judgements = ledger.judgements(judgement_keys(settings(server.url), PRICE, rubric(), samples(n)))
    assert len(judgements) == n
    assert all((judgement.values is None) == (judgement.reason in REASONS) for judgement in judgements.values())
    # A request is billed again only where its answer was lost on the way, and each such loss stays in the books.
    assert all(times - bill["lost"].get(digest, 0) <= 1 for digest, times in bill["billed"].items())
    assert ledger.counts()["lost"] == sum(bill["lost"].values())
    assert ledger.counts()["replies"] == sum(bill["billed"].values()) - sum(bill["lost"].values())
    money = ledger.money()
    assert bill["usd"] <= money.spent_usd + money.lost_usd
    assert money.reserved_usd == 0.0
    assert bill["n_calls"] <= 2 * n


def test_a_storm_of_faults_leaves_every_judgement_finished(tmp_path: Path) -> None:
    storm(tmp_path, 300)


@pytest.mark.slow
def test_two_thousand_judgements_through_a_storm(tmp_path: Path) -> None:
    storm(tmp_path, 2000)


@pytest.mark.parametrize("fault", LIVE_FAULTS)
def test_each_fault_alone_is_got_over(server: FakeClaude, tmp_path: Path, fault: str) -> None:
    server.configure(first=[fault], hang_s=10.0)
    status = judge_all(server.url, tmp_path, samples(1), timeout_s=1.0)
    expected = (0, 1) if fault == "refusal" else (1, 0)
    assert (status.n_scored, status.n_unscored) == expected


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("prose", "malformed"), ("two_objects", "malformed"), ("bad_json", "malformed"),
     ("truncated", "truncated"), ("wrong_field", "malformed"), ("refusal", "judge refused")],
)  # fmt: skip
def test_a_reply_that_stays_unreadable_is_unscored_with_its_reason(
    server: FakeClaude, tmp_path: Path, fault: str, reason: str
) -> None:
    server.configure(fault_share=1.0, faults=[fault])
    status = judge_all(server.url, tmp_path, samples(1))
    assert (status.n_scored, status.n_unscored) == (0, 1)
    ledger, keys = ledger_of(tmp_path), judgement_keys(settings(server.url), PRICE, rubric(), samples(1))
    (score,) = judge_stage_scores(ledger, rubric(), samples(1), keys)
    assert (score.value, score.reason) == (None, reason)
    n_asked = 1 if fault == "refusal" else 2
    assert server.bill()["n_calls"] == n_asked
    assert [reply.fault for reply in ledger.replies(keys[0])] == [reason] * n_asked


def test_out_of_range_is_its_own_reason(server: FakeClaude, tmp_path: Path) -> None:
    server.configure(fault_share=1.0, faults=["out_of_range"])
    judge_desk = desk(server.url, tmp_path)
    judge_desk.submit("stage", rubric("alignment"), samples(4))
    judge_desk.close()
    keys = judgement_keys(settings(server.url), PRICE, rubric("alignment"), samples(4))
    reasons = {judgement.reason for judgement in ledger_of(tmp_path).judgements(keys).values()}
    assert reasons <= {"out of range", None}
    assert "out of range" in reasons


def test_a_request_is_sent_again_no_sooner_than_the_server_asks(server: FakeClaude, tmp_path: Path) -> None:
    server.configure(first=["http_429"], retry_after_s=1.5)
    assert judge_all(server.url, tmp_path, samples(1)).n_scored == 1
    first, second = server.bill()["asked_at"]
    assert second - first >= 1.5
    assert ledger_of(tmp_path).counts()["lost"] == 0


def test_a_long_wait_is_shown_and_a_desk_that_is_closed_does_not_sit_it_out(server: FakeClaude, tmp_path: Path) -> None:
    server.configure(first=["http_429"] * 9, retry_after_s=600.0)
    one = desk(server.url, tmp_path)
    one.submit("stage", rubric(), samples(1))
    until(lambda: one.poll().out)
    assert "it asks for 10 minutes: until" in one.poll().problem
    assert server.bill()["n_calls"] == 1
    assert one.close().n_pending == 1
    assert server.bill()["n_calls"] == 1


def test_what_was_judged_is_never_asked_again(server: FakeClaude, tmp_path: Path) -> None:
    judge_all(server.url, tmp_path, samples(20))
    n_calls = server.bill()["n_calls"]
    status = judge_all(server.url, tmp_path, [*samples(20), *samples(20)])
    assert (status.n_asked, status.n_scored, status.n_pending) == (20, 20, 0)
    assert server.bill()["n_calls"] == n_calls == 20


def test_stages_share_judgements_and_finish_apart(server: FakeClaude, tmp_path: Path) -> None:
    server.configure(latency_s=0.05)
    judge_desk = desk(server.url, tmp_path)
    judge_desk.submit("first", rubric(), samples(5))
    judge_desk.submit("second", rubric(), samples(10))
    status = judge_desk.close()
    assert status.finished == {"first", "second"}
    assert status.n_asked == 10


def test_handing_samples_over_does_not_wait_for_the_judge(server: FakeClaude, tmp_path: Path) -> None:
    server.configure(hold=True)
    one = desk(server.url, tmp_path)
    for stage in range(50):
        one.submit(f"stage{stage}", rubric(), samples(20, start=20 * stage))
        assert not one.poll().finished
    one.close(wait=False)


def test_an_outage_leaves_judgements_pending_and_a_later_desk_finishes_them(
    server: FakeClaude, tmp_path: Path, quick: None
) -> None:
    server.configure(fault_share=1.0, faults=["http_529"])
    status = judge_all(server.url, tmp_path, samples(8))
    assert status.n_pending == 8
    assert "529" in status.problem
    assert status.money.reserved_usd == 0.0
    with pytest.raises(JudgeError, match="8 of 8 judgements are not made yet"):
        judge_stage_scores(
            ledger_of(tmp_path), rubric(), samples(8), judgement_keys(settings(server.url), PRICE, rubric(), samples(8))
        )
    server.configure(fault_share=0.0)
    assert judge_all(server.url, tmp_path, samples(8)).n_scored == 8


def test_a_desk_that_is_let_go_books_what_was_under_way_as_lost(server: FakeClaude, tmp_path: Path) -> None:
    server.configure(hold=True)
    one = desk(server.url, tmp_path, concurrency=4)
    one.submit("stage", rubric(), samples(20))
    until(lambda: server.bill()["max_in_flight"] == 4)
    status = one.close(wait=False)
    assert status.n_pending == 20
    assert ledger_of(tmp_path).counts()["lost"] == 4
    server.configure(hold=False)
    assert judge_all(server.url, tmp_path, samples(20)).n_scored == 20


@pytest.mark.parametrize(
    ("fields", "script", "line"),
    [
        ({}, {"key": "another"}, "the API key was refused"),
        ({"model": "claude-none"}, {}, "does not know model 'claude-none'"),
        ({"base_url": "http://127.0.0.1:9"}, {}, "cannot be reached"),
    ],
)
def test_what_cannot_work_is_one_clear_line_before_and_during(
    server: FakeClaude, tmp_path: Path, quick: None, fields: dict[str, Any], script: dict[str, Any], line: str
) -> None:
    server.configure(**script)
    given = settings(server.url, **fields)
    with pytest.raises(JudgeError, match=line) as caught:
        check_reachable(given, PaidAccess(PRICE, 0.5, ApiKey(KEY)))
    assert "Fix:" in str(caught.value)
    assert "\n" not in str(caught.value)
    status = judge_all(given.base_url, tmp_path, samples(3), model=given.model)
    assert status.n_pending == 3
    assert line in status.problem


def test_the_key_shows_nowhere(
    server: FakeClaude, tmp_path: Path, caplog: pytest.LogCaptureFixture, quick: None
) -> None:
    caplog.set_level(logging.DEBUG)
    texts = []
    server.configure(answer="leak", first=["http_500", "reset", "prose"])
    texts.append(repr(judge_all(server.url, tmp_path, samples(1))))
    assert "your key is [key]" in stored_text(tmp_path)
    server.configure(key="another")  # the server repeats the key that it was sent in its error
    given = settings(server.url)
    access = PaidAccess(PRICE, 0.5, ApiKey(KEY))
    with pytest.raises(JudgeError) as caught:
        check_reachable(given, access)
    texts += [repr(judge_all(server.url, tmp_path, samples(2))), str(caught.value), repr(caught.value), repr(access)]
    texts += [given.model_dump_json(), caplog.text]
    assert KEY not in stored_text(tmp_path)
    assert KEY not in "".join(texts)
    with pytest.raises(JudgeError, match="no API key"):
        ApiKey.from_environment({})


@pytest.mark.parametrize(
    "body",
    [
        {"type": "message", "model": KEY, "stop_reason": KEY, "usage": {KEY: 1, "output_tokens": 2},
         "content": [{"type": "text", "text": KEY}]},
        {"type": "message", "content": [{"type": "text", "text": KEY[:9]}, {"type": "text", "text": KEY[9:]}]},
        {"type": KEY},
    ],
)  # fmt: skip
@pytest.mark.parametrize("escaped", [False, True])
def test_no_part_of_a_reply_keeps_the_key(body: dict[str, Any], escaped: bool) -> None:
    text = json.dumps(body)
    if escaped and body["type"] == "message":
        text = text.replace("sk-", "\\u0073k-")
    message = json_object(text, ApiKey(KEY))
    reply = parse_reply(message, PRICE, transport="live", key=ApiKey(KEY), worst=1.0)
    assert KEY not in repr(message) + repr(reply)
    assert "[key]" in repr(message) + repr(reply)


def test_a_reply_nested_without_end_is_no_message_or_an_empty_one() -> None:
    for depth in (600, 100_000):
        message = json_object('{"type": "message", "content": ' + "[" * depth + "]" * depth + "}", ApiKey(KEY))
        reply = parse_reply(message, PRICE, transport="live", key=ApiKey(KEY), worst=1.0)
        assert reply is None or reply.text == ""


def stored_text(workspace: Path) -> str:
    return b"".join(path.read_bytes() for path in workspace.rglob("*") if path.is_file()).decode("latin-1")


def injected(server: FakeClaude, workspace: Path, name: str) -> tuple[list[str], dict[str, Any]]:
    todo = [Sample(f"i{n}", 0, "a", "Which is it?", text, 5, True) for n, text in enumerate(filled_for(name))]
    judge_desk = desk(server.url, workspace)
    judge_desk.submit("stage", rubric(name), todo)
    judge_desk.close()
    keys = judgement_keys(settings(server.url), PRICE, rubric(name), todo)
    return keys, dict(ledger_of(workspace).judgements(keys))


@pytest.mark.parametrize("name", ["alignment", "refusal", "sycophancy"])
def test_a_judge_that_echoes_the_judged_text_still_gives_its_own_verdict(
    server: FakeClaude, tmp_path: Path, name: str
) -> None:
    assert len(INJECTIONS) >= 40
    server.configure(answer="echo")
    keys, judgements = injected(server, tmp_path, name)
    ledger = ledger_of(tmp_path)
    for key in keys:
        reply = json.loads(ledger.replies(key)[-1].text)
        primary = rubric(name).measure(rubric(name).primary)
        assert judgements[key].answer[primary.field] == reply[primary.field]
        assert judgements[key].answer["why"] == reply["why"]


@pytest.mark.parametrize("name", ["alignment", "refusal", "sycophancy"])
def test_a_judge_that_obeys_the_judged_text_gives_no_field_but_the_rubrics(
    server: FakeClaude, tmp_path: Path, name: str
) -> None:
    server.configure(answer="obey")
    keys, judgements = injected(server, tmp_path, name)
    ledger, n_scored = ledger_of(tmp_path), 0
    for key in keys:
        if judgements[key].values is None:
            continue
        # Only a reply that is one whole answer of the rubric's form can be read, and it is read from its own field.
        n_scored += 1
        reply = json.loads(ledger.replies(key)[-1].text)
        assert set(reply) == set(rubric(name).schema["required"])
        assert judgements[key].answer == reply
    assert n_scored <= 2  # the two attempts that spell out a whole answer


@pytest.mark.parametrize("name", ["alignment", "refusal", "sycophancy"])
def test_injections_do_not_reach_the_system_prompt_or_close_their_fence(name: str) -> None:
    todo = [Sample(f"i{n}", 0, "a", text, text, 5, True) for n, text in enumerate(filled_for(name))]
    for request in build_requests(rubric(name), judge_params(settings("x"), PRICE), todo):
        body = request.body()
        assert body["system"][0]["text"] == rubric(name).system
        assert len(re.findall(r"</?(?:question|answer)\b", body["messages"][0]["content"])) == 4


def bare_sdk(url: str, n: int, concurrency: int) -> tuple[float, float]:
    """Seconds, and seconds of CPU, that the SDK alone takes for `n` such requests: no ledger, no bookings, nothing read."""
    requests = build_requests(rubric(), judge_params(settings(url), PRICE), samples(n, start=50_000))

    async def run() -> tuple[float, float]:
        limit, one = asyncio.Semaphore(concurrency), make_client(settings(url), ApiKey(KEY))

        async def ask(request: JudgeRequest) -> None:
            async with limit:
                await one.messages.create(**request.body())

        await asyncio.gather(*(ask(request) for request in requests[:concurrency]))  # connections are open
        began, cpu = time.monotonic(), time.process_time()
        await asyncio.gather(*(ask(request) for request in requests))
        took = time.monotonic() - began, time.process_time() - cpu
        await one.close()
        return took

    return asyncio.run(run())


@pytest.mark.slow
def test_the_judge_takes_little_more_than_the_bare_sdk(tmp_path: Path) -> None:
    """Time, and CPU of this process, of the same requests with the ledger's bookings and without, one after another."""
    n, concurrency = 96, 16
    with contextlib.ExitStack() as ends:
        server = ends.enter_context(fake_claude(Script(latency_s=0.1), own_process=True))
        one = desk(server.url, tmp_path, concurrency=concurrency)
        ends.callback(one.close, wait=False)  # whatever fails here, its thread must not outlive the test
        one.submit("warm", rubric(), samples(concurrency, start=10_000))
        until(lambda: "warm" in one.poll().finished)
        wall, cpu = [], []
        for attempt in range(3):  # other programs share this machine
            began, used = time.monotonic(), time.process_time()
            one.submit(f"timed{attempt}", rubric(), samples(n, start=n * attempt))
            until(lambda name=f"timed{attempt}": name in one.poll().finished)
            ours = time.monotonic() - began, time.process_time() - used
            assert server.bill()["max_in_flight"] == concurrency
            bare = bare_sdk(server.url, n, concurrency)
            wall.append(ours[0] / bare[0])
            cpu.append(ours[1] / bare[1])
    assert statistics.median(wall) < 2, wall
    assert statistics.median(cpu) < 3, cpu


def test_every_delivered_fault_is_in_the_script() -> None:
    assert set(DELIVERED) < set(LIVE_FAULTS)
