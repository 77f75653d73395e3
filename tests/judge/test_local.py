"""Judges without a bill: an OpenAI-compatible server over loopback, and a `complete` function."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastconv.judge import desk as desk_module
from fastconv.judge.budget import JudgeIdentity
from fastconv.judge.claude import ApiKey, Outage
from fastconv.judge.desk import JudgeDesk
from fastconv.judge.local import Complete, EndpointJudge, LocalReply, endpoint_complete, read_choice
from fastconv.judge.rubric import judge_stage_scores
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store
from tests.judging_kit import KEY, Endpoint, chat, fake_endpoint, rubric, samples, settings


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that is out is found out soon."""
    monkeypatch.setattr(desk_module, "TRIES", 1)


@pytest.fixture
def endpoint() -> Iterator[tuple[str, type[Endpoint]]]:
    with fake_endpoint() as found:
        yield found


@pytest.fixture
def ledger(tmp_path: Path) -> JudgeLedger:
    return JudgeLedger(Store.open(tmp_path))


WEAK = JudgeIdentity("endpoint", "local:test", settings("http://127.0.0.1:9/v1", "local"))


def judge(
    ledger: JudgeLedger, complete: Complete, name: str = "refusal", n: int = 1, concurrency: int = 1
) -> dict[str, Any]:
    """Judgements by key, through a desk; an outage is raised."""
    one = JudgeDesk(WEAK.settings, ledger.store.root, judge=WEAK, provider=EndpointJudge(complete, concurrency))
    one.submit("stage", rubric(name), samples(n))
    status = one.close()
    if status.n_pending:
        raise Outage(status.problem)
    judgements = ledger.judgements(ledger.take_keys("stage"))
    assert status.finished == {"stage"}
    assert (status.n_scored + status.n_unscored, len(judgements)) == (n, n)
    return judgements


def test_the_value_is_the_expectation_over_the_answer_tokens(
    endpoint: tuple[str, type[Endpoint]], ledger: JudgeLedger
) -> None:
    url, handler = endpoint
    handler.answer = chat("A", {"A": math.log(0.6), " A": math.log(0.1), "C": math.log(0.2), "the": math.log(0.1)})
    (judgement,) = judge(ledger, endpoint_complete(settings(url, "local"), ApiKey(KEY))).values()
    assert judgement.values == {"refused": pytest.approx(0.7 / 0.9)}
    assert judgement.answer["verdict"] == "refused"
    (asked,) = handler.seen
    assert asked["path"] == "/v1/chat/completions"
    assert asked["key"] == f"Bearer {KEY}"
    assert asked["logprobs"]
    assert [message["role"] for message in asked["messages"]] == ["system", "user"]
    assert "Answer 0" not in asked["messages"][0]["content"]


def test_a_scale_is_an_expectation_too(ledger: JudgeLedger) -> None:
    (judgement,) = judge(
        ledger, lambda *_: LocalReply("9", {"9": math.log(0.5), "0": math.log(0.5)}), "alignment"
    ).values()
    assert judgement.values == {"aligned": pytest.approx(50.0), "coherent": pytest.approx(50.0)}


def test_a_judgement_of_several_measures_is_in_the_ledger(ledger: JudgeLedger) -> None:
    judgements = judge(ledger, lambda *_: LocalReply("9"), "alignment", n=2)
    assert ledger.judgements(judgements) == judgements
    replies = [reply for key in judgements for reply in ledger.replies(key)]
    assert len(replies) == 4  # aligned and coherent, each of two answers
    asked: list[object] = []
    again = judge(ledger, lambda *words: asked.append(words) or LocalReply("0"), "alignment", n=2)
    assert (again, asked) == (judgements, [])


def test_without_log_probabilities_the_character_itself_counts(ledger: JudgeLedger) -> None:
    (judgement,) = judge(ledger, lambda *_: LocalReply(" C. ")).values()
    assert judgement.values == {"refused": 0.0}
    assert judgement.answer["verdict"] == "helped"


@pytest.mark.parametrize(
    "reply",
    [LocalReply("I think it is A"), LocalReply(""), LocalReply("D"), LocalReply("A", {"the": -0.1, "A": -5.0}),
     LocalReply("AB")],
)  # fmt: skip
def test_what_is_not_in_the_form_is_asked_once_more_and_then_unscored(ledger: JudgeLedger, reply: LocalReply) -> None:
    asked = []

    def complete(system: str, user: str, characters: str) -> LocalReply:
        asked.append(user)
        return reply

    ((key, judgement),) = judge(ledger, complete).items()
    assert (judgement.values, judgement.reason) == (None, "malformed")
    assert len(asked) == 2
    assert [raw.fault for raw in ledger.replies(key)] == ["malformed", "malformed"]
    judge(ledger, complete)
    assert len(asked) == 2


def test_a_second_answer_in_the_form_counts(ledger: JudgeLedger) -> None:
    replies = [LocalReply("hm"), LocalReply("A")]
    (judgement,) = judge(ledger, lambda *_: replies.pop(0)).values()
    assert judgement.values == {"refused": 1.0}


def test_read_choice_gives_shares_that_sum_to_one() -> None:
    shares = read_choice(LocalReply("", {"A": -1.0, "B": -1.0, "C": -3.0}), "ABC")
    assert shares is not None
    assert sum(shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("leak", ["KEY-SENT", "KEY-ESCAPED"])
def test_a_key_that_the_endpoint_sends_back_is_not_kept(
    endpoint: tuple[str, type[Endpoint]], ledger: JudgeLedger, leak: str
) -> None:
    url, handler = endpoint
    handler.answer = chat(f"A {leak}", {"A": -0.1, leak: -3.0})
    ((key, judgement),) = judge(ledger, endpoint_complete(settings(url, "local"), ApiKey(KEY))).items()
    assert judgement.answer["verdict"] == "refused"
    (reply,) = ledger.replies(key)
    assert reply.text.count("[key]") == 2
    stored = b"".join(path.read_bytes() for path in ledger.store.root.rglob("*") if path.is_file())
    assert KEY.encode() not in stored


def test_an_endpoint_that_sends_no_http_is_an_outage(ledger: JudgeLedger) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"

        def answer() -> None:
            with listening.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(b"no http\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(Outage, match="no answer"):
            judge(ledger, endpoint_complete(settings(url, "local")))
        thread.join()


def test_an_endpoint_that_is_not_there_is_one_clear_line(ledger: JudgeLedger) -> None:
    with pytest.raises(Outage, match="cannot be asked") as caught:
        judge(ledger, endpoint_complete(settings("http://127.0.0.1:9/v1", "local"), ApiKey(KEY)))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("answer", [b"<html>", {"error": "x"}, {"choices": []}, {"choices": [{"message": None}]}, [1]])
def test_an_endpoint_that_sends_no_completion_is_an_outage_and_nothing_is_stored(
    endpoint: tuple[str, type[Endpoint]], ledger: JudgeLedger, answer: Any
) -> None:
    url, handler = endpoint
    handler.answer = answer
    complete = endpoint_complete(settings(url, "local"))
    with pytest.raises(Outage, match="sent something that is no"):
        judge(ledger, complete)
    assert ledger.counts()["unscored"] == ledger.counts()["replies"] == 0


def test_judgements_become_scores_and_are_made_once(ledger: JudgeLedger) -> None:
    n_asked = 0

    def complete(system: str, user: str, characters: str) -> LocalReply:
        nonlocal n_asked
        n_asked += 1
        return LocalReply("A" if "Answer 1:" in user else "C")

    todo = samples(20)
    judge(ledger, complete, n=20, concurrency=3)
    judge(ledger, complete, n=20, concurrency=3)
    assert n_asked == 20
    keys = [request.key for request in WEAK.requests(rubric(), todo)]
    scores = judge_stage_scores(ledger, rubric(), todo, keys)
    assert [score.value for score in scores] == [0.0, 1.0, *[0.0] * 18]
    assert scores[1].detail["label"] == "refused"
    assert scores[1].detail["model"] == "local:test"
    assert {score.metric for score in scores} == {"refused"}
