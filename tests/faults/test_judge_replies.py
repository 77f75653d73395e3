"""Whatever a judge's server sends: judging ends, money stays within what was booked, and only our own errors come out."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastconv.errors import JudgeError, StoreError
from fastconv.judge import desk as desk_module
from fastconv.judge.access import PaidAccess, check_endpoint, check_reachable
from fastconv.judge.claude import parse_reply
from fastconv.judge.desk import DeskStatus
from fastconv.judge.http import ApiKey, Outage, json_object, judge_url
from fastconv.judge.local import endpoint_complete, read_choice
from fastconv.recipe import canonical_json
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store
from fastconv.store.records import Settle
from tests.judging_kit import KEY, PRICE, chat, judge_all, rubric, samples
from tests.judging_kit import settings as judge_settings

#: A reply to a request: (status, body or JSON, headers).
Reply = tuple[int, Any, dict[str, str]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that is out is found out soon."""
    monkeypatch.setattr(desk_module, "TRIES", 2)
    monkeypatch.setattr(desk_module, "FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(desk_module, "OUTAGE_PAUSE_S", 0.1)


@contextmanager
def server(answer: Callable[[str, dict[str, Any]], Reply]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that answers by `answer(path, request)`; its address, and the headers that it was sent."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            seen.append({name.lower(): value for name, value in self.headers.items()} | {"path": self.path})
            status, body, headers = answer(self.path, json.loads(raw) if raw else {})
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {
                "content-type": "application/json",
                "content-length": str(len(data)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            """Quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", seen
    finally:
        http.shutdown()
        http.server_close()


def verdict(why: str = "as shown") -> str:
    return json.dumps({"why": why, "verdict": "refused"})


def message(text: str, **changes: Any) -> dict[str, Any]:
    """A message of the API with this text."""
    return {
        "id": "m", "type": "message", "role": "assistant", "model": "claude-test", "stop_reason": "end_turn",
        "content": [{"type": "text", "text": text}], "usage": {"input_tokens": 100, "output_tokens": 20}, **changes,
    }  # fmt: skip


def judged(workspace: Path, body: Any, n: int = 3, headers: dict[str, str] | None = None) -> DeskStatus:
    with server(lambda path, request: (200, body, headers or {})) as (url, _):
        return judge_all(url, workspace, samples(n))


@pytest.mark.parametrize(
    ("text", "n_scored"),
    [(verdict("half an emoji \ud83d"), 3), ("\ud800" + verdict(), 0), (verdict("a zero byte \x00"), 3),
     ('{"why": "x", "verdict": "refused", "n": 1e999}', 0), (verdict("\x1b]0;title\x07\x1b[2J"), 3)],
)  # fmt: skip
def test_text_that_cannot_be_stored_is_read_or_is_unscored(tmp_path: Path, text: str, n_scored: int) -> None:
    status = judged(tmp_path, message(text))
    assert (status.n_scored, status.n_unscored, status.n_pending) == (n_scored, 3 - n_scored, 0)


@pytest.mark.parametrize(
    "usage",
    [{"input_tokens": -(10**7), "output_tokens": -(10**6)}, {"input_tokens": 10**30, "output_tokens": 10**30}, None,
     {"input_tokens": 10**8, "output_tokens": 10**8}, {"input_tokens": "many"}, {"input_tokens": 0, "output_tokens": 0},
     {"input_tokens": 100, "output_tokens": 20, "cache_read_input_tokens": -(10**9)}, [1], {"output_tokens": 1e308},
     {"input_tokens": 100, "output_tokens": -(10**6)}],
)  # fmt: skip
def test_what_is_booked_lies_between_nothing_and_the_worst_case(tmp_path: Path, usage: Any) -> None:
    status = judged(tmp_path, message(verdict(), usage=usage))
    assert status.n_scored == 3
    ledger = JudgeLedger(Store.open(tmp_path))
    worst = [row[0] for row in ledger.store.rows("SELECT nusd FROM judge_money")]
    assert all(0 < nusd <= 10_000_000 for nusd in worst)  # a short request costs at most a cent
    assert 0 < status.money.spent_usd <= 0.03
    assert status.money.reserved_usd == status.money.lost_usd == 0


@pytest.mark.parametrize(
    "body",
    [b"<html><body>Please log in</body></html>", b"", b"not json", {"status": "log in first"}, [1, 2], None,
     {"type": "message", "content": "text"}, {"type": "page", "content": [{"type": "text", "text": "x"}]}, {"type": "error", "error": {"message": "x"}}, b"\xff\xfe", b"[" * 50_000],
)  # fmt: skip
def test_a_body_that_is_no_message_is_an_outage_and_is_asked_again(tmp_path: Path, body: Any) -> None:
    status = judged(tmp_path, body)
    assert (status.n_scored, status.n_unscored, status.n_pending) == (0, 0, 3)
    assert "no answer" in status.problem
    if isinstance(body, bytes) and body.startswith(b"<"):
        assert status.money.spent_usd == status.money.lost_usd == status.money.reserved_usd == 0  # it never arrived
    assert judged(tmp_path, message(verdict())).n_scored == 3


def test_a_body_without_end_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastconv.judge.http.MAX_BODY_BYTES", 10_000)
    assert judged(tmp_path, message(verdict("x" * 20_000)), n=1).n_pending == 1


@pytest.mark.parametrize("packing", ["gzip", "deflate", "GZIP", "br", "zstd, gzip"])
def test_a_packed_reply_is_not_unpacked(tmp_path: Path, packing: str) -> None:
    """A thousandth of what it unpacks to may be within every limit; none is asked for."""
    packed = zlib.compress(json.dumps(message(verdict())).encode(), wbits=15 if packing == "deflate" else 31)
    with server(lambda path, request: (200, packed, {"content-encoding": packing})) as (url, seen):
        assert judge_all(url, tmp_path, samples(1)).n_pending == 1
        with pytest.raises(Outage, match="packed"):
            endpoint_complete(judge_settings(f"{url}/v1", "local"))("rubric", "judged text", "AB")
    assert {headers["accept-encoding"] for headers in seen} == {"identity"}


@pytest.mark.parametrize("status", [400, 403, 404, 429, 500, 529, 302])
def test_a_servers_words_reach_the_terminal_as_one_plain_line(tmp_path: Path, status: int) -> None:
    error = {
        "type": "error",
        "error": {"type": "x", "message": "\x1b]0;owned\x07 \x1b[2J\n two\ud800 " + "long " * 999},
    }
    with server(lambda path, request: (status, error, {"location": "http://127.0.0.1:9/"})) as (url, _):
        problem = judge_all(url, tmp_path, samples(1)).problem
    assert problem
    assert problem.isprintable()
    assert len(problem) < 600


@pytest.mark.parametrize(
    "problem", [OverflowError("too large"), UnicodeEncodeError("utf-8", "x", 0, 1, "no"), KeyError("x")]
)
def test_a_writer_that_fails_in_any_way_fails_those_who_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    applied = JudgeLedger.apply

    def apply(self: JudgeLedger, operations: Any) -> Any:
        if any(isinstance(operation, Settle) for operation in operations):
            raise problem
        return applied(self, operations)

    monkeypatch.setattr(JudgeLedger, "apply", apply)
    with pytest.raises(type(problem)):
        judged(tmp_path, message(verdict()))


def test_what_sqlite_cannot_hold_is_a_storage_error(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    for value in (2**70, "\ud800"):
        with pytest.raises(StoreError, match="cannot be stored"), store.transaction() as db:
            db.execute("INSERT INTO progress VALUES('k', ?, 'x')", (value,))


def test_a_login_page_is_no_answer_to_whether_the_judge_can_be_asked() -> None:
    with server(lambda path, request: (200, b"<html>log in</html>", {"content-type": "text/html"})) as (url, _):
        with pytest.raises(JudgeError, match="no answer"):
            check_reachable(judge_settings(url), PaidAccess(PRICE, 0.5, ApiKey(KEY)))
        with pytest.raises(JudgeError, match="no answer"):
            check_endpoint(judge_settings(f"{url}/v1", "local"), None)


# --- where a key goes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "hosts", "allowed"),
    [
        ("", "", True), ("https://api.anthropic.com", "", True), ("https://API.Anthropic.com:443/", "", True),
        ("http://127.0.0.1:8000", "", True), ("http://localhost:8000/v1", "", True), ("http://[::1]:8000", "", True),
        ("http://api.anthropic.com", "", False), ("https://evil.example", "", False),
        ("https://api.anthropic.com@evil.example", "", False), ("https://api.anthropic.com\\@evil.example", "", False),
        ("https://api.anthropic.com.evil.example", "", False), ("http://127.0.0.1.evil.example", "", False),
        ("http://2130706433", "", False), ("http://0.0.0.0:1", "", False), ("file:///etc/passwd", "", False),
        ("ftp://127.0.0.1", "", False), ("https://user:pass@127.0.0.1", "", False), ("//127.0.0.1", "", False),
        ("https://gate.example", "gate.example", True), ("https://gate.example:8443", "other, gate.example:8443", True),
        ("https://gate.example:1", "gate.example:8443", False), ("http://gate.example", "gate.example", False),
        ("https://a\x00b", "", False), ("https://127.0.0.1:port", "", False),
    ],
)  # fmt: skip
def test_a_key_goes_where_the_user_said(url: str, hosts: str, allowed: bool) -> None:
    environ = {"FASTCONV_JUDGE_HOSTS": hosts}
    if allowed:
        judge_url(url, has_key=True, environ=environ)
        return
    with pytest.raises(JudgeError) as refused:
        judge_url(url, has_key=True, environ=environ)
    assert str(refused.value).isprintable()


def test_a_judge_without_a_key_may_stand_in_the_users_network() -> None:
    assert judge_url("http://192.0.2.1:8000/v1", has_key=False).host == "192.0.2.1"


@pytest.mark.parametrize("mode", ["live", "batch"])
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_no_redirect_is_followed(tmp_path: Path, mode: str, status: int) -> None:
    with server(lambda path, request: (200, message(verdict()), {})) as (other, at_other):
        away = {"location": f"{other}/v1/messages"}
        with server(lambda path, request: (status, b"", away)) as (url, seen):
            judge_all(url, tmp_path, samples(2), mode)
    assert seen
    assert not at_other


def test_no_redirect_is_followed_within_the_host_either(tmp_path: Path) -> None:
    def answer(path: str, request: dict[str, Any]) -> Reply:
        return (200, message(verdict()), {}) if path == "/elsewhere" else (307, b"", {"location": "/elsewhere"})

    with server(answer) as (url, seen):
        assert judge_all(url, tmp_path, samples(1)).n_pending == 1
    assert {one["path"] for one in seen} == {"/v1/messages"}


def test_results_of_a_batch_are_fetched_from_the_judge_alone(tmp_path: Path) -> None:
    with server(lambda path, request: (200, b"{}", {})) as (other, at_other):
        batch = {
            "id": "msgbatch_1", "type": "message_batch", "processing_status": "ended",
            "created_at": "2026-11-26T00:00:00Z", "expires_at": "2026-11-27T00:00:00Z", "ended_at": None,
            "archived_at": None, "cancel_initiated_at": None, "results_url": f"{other}/results",
            "request_counts": {"processing": 0, "succeeded": 2, "errored": 0, "canceled": 0, "expired": 0},
        }  # fmt: skip
        with server(lambda path, request: (200, batch, {})) as (url, seen):
            status = judge_all(url, tmp_path, samples(2), "batch")
    assert seen
    assert not at_other
    assert status.n_pending == 2
    assert "which gets no key" in status.problem


@pytest.mark.parametrize("mode", ["live", "batch"])
def test_the_loopback_is_asked_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    with server(lambda path, request: (502, {}, {})) as (proxy, through):
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        with server(lambda path, request: (200, message(verdict()), {})) as (url, seen):
            judge_all(url, tmp_path, samples(1), mode)
        with server(lambda path, request: (200, chat("A"), {})) as (url, _):
            assert endpoint_complete(judge_settings(f"{url}/v1", "local"))("rubric", "judged", "AB").text == "A"
    assert seen
    assert not through


# --- anything at all ---------------------------------------------------------------------------------------

#: JSON as a server may send it: with lone surrogates, control characters, huge and infinite numbers.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.sampled_from(["message", "text"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["type", "content", "text", "usage", "model", "stop_reason", "output_tokens", "input_tokens",
                         "choices", "message", "logprobs", "top_logprobs", "token", "logprob"]) | st.text(st.characters()),
        inner, max_size=5,
    ),
    max_leaves=25,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(body=JSON | st.binary(max_size=60))
def test_any_reply_is_stored_or_is_none(body: Any) -> None:
    found = json_object(body if isinstance(body, bytes) else json.dumps(body), ApiKey(KEY))
    reply = parse_reply(found, PRICE, transport="live", key=ApiKey(KEY), worst=0.01)
    if reply is not None:
        assert 0 <= reply.cost_usd <= 0.01
        canonical_json(dict(reply.usage))
        read = rubric().read(reply.text, reply.stop_reason)
        for text in (reply.text, reply.model, reply.stop_reason, canonical_json(dict(read.answer))):
            text.encode()


@settings(max_examples=100, deadline=None)
@given(body=JSON)
def test_any_completion_of_a_local_judge_is_read_or_is_an_outage(body: Any) -> None:
    from fastconv.judge.local import _local_reply

    reply = _local_reply(json_object(json.dumps(body), None))
    if reply is not None:
        shares = read_choice(reply, "ABC")
        assert shares is None or abs(sum(shares.values()) - 1) < 1e-9
        canonical_json({"text": reply.text, "logprobs": reply.logprobs}).encode()


def test_what_a_local_judge_refuses_is_one_plain_line() -> None:
    error = {"error": {"message": "\x1b[31m no such model \n here"}}
    with server(lambda path, request: (404, error, {})) as (url, _):
        complete = endpoint_complete(judge_settings(f"{url}/v1", "local"))
        with pytest.raises(JudgeError) as refused:
            complete("rubric", "judged", "AB")
    assert str(refused.value).isprintable()
    assert "no such model here" in str(refused.value)
    with (
        server(lambda path, request: (503, error, {"retry-after": "7200"})) as (url, _),
        pytest.raises(Outage, match="60 minutes: until") as out,
    ):
        endpoint_complete(judge_settings(f"{url}/v1", "local"))("rubric", "judged", "AB")
    assert out.value.wait_s == 3600


def test_the_writers_tasks_end_with_the_desk(tmp_path: Path) -> None:
    before = threading.active_count()
    judged(tmp_path, message(verdict()))
    assert threading.active_count() <= before + 1  # the server's own thread may still be ending
    assert JudgeLedger(Store.open(tmp_path)).money().reserved_usd == 0
