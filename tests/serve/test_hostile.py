"""What clients send that cannot be answered: an error in OpenAI's shape each, and an endpoint that goes on."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fastconv.serve.endpoint import MAX_BODY_BYTES
from tests.loop_kit import DoneRun
from tests.serve.kit import CELLS, Running, endpoint

HELLO = [{"role": "user", "content": "Hello?"}]


@pytest.fixture(scope="module")
def running(done_run: DoneRun) -> Iterator[Running]:
    with endpoint(done_run.recipe, done_run.workspace, CELLS[1]) as one:
        yield one
        assert one.post({"model": CELLS[1], "messages": HELLO, "max_tokens": 2}).status_code == 200, "it did not go on"


def assert_error(reply: httpx.Response, status: int, param: str | None = None, said: str = "") -> None:
    """An error body of OpenAI's, and nothing beside it."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"].startswith("application/json")
    body = reply.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == {429: "rate_limit_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )
    assert param is None or error["param"] == param
    assert said in error["message"]


BODIES: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "no JSON": (b'{"model": ', 400),
    "no UTF-8": (b'{"model": "\xff\xfe"}', 400),
    "a list": (b"[]", 400),
    "a number of 5,000 digits": (b'{"model": ' + b"9" * 5000 + b"}", 400),
    "100,000 brackets": (b"[" * 100_000, 400),
    "half a character": (rb'{"model": "a\ud83d", "messages": [{"role": "user", "content": "Hi"}]}', 400),
    "bytes at random": (bytes(range(256)) * 100, 400),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_body_that_is_no_request(running: Running, name: str, path: str) -> None:
    content, status = BODIES[name]
    with running.client as client:
        assert_error(client.post(path, content=content), status)


FIELDS: dict[str, tuple[dict[str, Any], int, str]] = {
    "an unknown model": ({"model": "gpt-4o"}, 404, "model"),
    "no model": ({"model": None}, 400, "model"),
    "a number as model": ({"model": 4}, 400, "model"),
    "no messages": ({"messages": None}, 400, "messages"),
    "an empty list of messages": ({"messages": []}, 400, "messages"),
    "a text as messages": ({"messages": "Hello?"}, 400, "messages"),
    "negative tokens": ({"max_tokens": -5}, 400, "max_tokens"),
    "no tokens": ({"max_completion_tokens": 0}, 400, "max_completion_tokens"),
    "tokens as text": ({"max_tokens": "16"}, 400, "max_tokens"),
    "tokens as true": ({"max_tokens": True}, 400, "max_tokens"),
    "more tokens than are read": ({"max_tokens": 10**9}, 400, "max_tokens"),
    "a seed of 200 bits": ({"seed": 2**200}, 400, "seed"),
    "a negative temperature": ({"temperature": -1}, 400, "temperature"),
    "NaN": ({"temperature": float("nan")}, 400, "temperature"),
    "an empty nucleus": ({"top_p": 0}, 400, "top_p"),
    "10,000 choices": ({"n": 10_000}, 400, "n"),
    "five stop sequences": ({"stop": list("abcde")}, 400, "stop"),
    "null as a stop sequence": ({"stop": ["a", None]}, 400, "stop.1"),
    "an empty stop sequence": ({"stop": [""]}, 400, "stop"),
    "an unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, ""),
    "an answer at the end": ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, 400, "messages"),
    "a prompt that is too long": ({"messages": [{"role": "user", "content": "a" * 5000}]}, 400, "messages"),
    "a control token": ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, 400, ""),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools"),
    "probabilities": ({"logprobs": True}, 400, "logprobs"),
    "a penalty": ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    "a field that nobody knows": ({"temprature": 0.5}, 400, "temprature"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_cannot_be_honoured(running: Running, name: str) -> None:
    change, status, param = FIELDS[name]
    body = {"model": CELLS[1], "messages": HELLO, **change}
    with running.client as client:
        reply = client.post("/v1/chat/completions", content=json.dumps(body))
        assert_error(reply, status, param or None)
        assert_error(client.post("/v1/chat/completions", content=json.dumps({**body, "stream": True})), status)


def test_too_many_stop_sequences_are_said_to_be_too_many(running: Running) -> None:
    reply = running.post({"model": CELLS[1], "messages": HELLO, "stop": list("abcde")})
    assert_error(reply, 400, "stop", "at most 4")


def test_fields_that_ask_for_nothing_are_let_pass(running: Running) -> None:
    idle = {
        "tools": [], "tool_choice": "auto", "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0, "user": "me",
        "logit_bias": {}, "response_format": {"type": "text"}, "metadata": {"a": "b"}, "stop": None, "seed": None,
        "top_p": None, "parallel_tool_calls": True, "stream": False, "reasoning_effort": None,
    }  # fmt: skip
    answered = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": [], "annotations": []}
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO, answered, *HELLO]
    reply = running.post({"model": CELLS[1], "messages": messages, "max_tokens": 2, **idle})
    assert reply.status_code == 200, reply.text


PROMPTS: dict[str, Any] = {
    "an empty text": "", "no prompts": [], "a negative token": [-1], "a token beyond the vocabulary": [10**6],
    "a text among tokens": [65, "a"], "more prompts than are drawn at once": ["a"] * 200, "a table": {},
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_that_cannot_be_continued(running: Running, name: str) -> None:
    assert_error(running.post({"model": CELLS[1], "prompt": PROMPTS[name]}, "/v1/completions"), 400)


@pytest.mark.slow
def test_a_body_of_a_gigabyte_is_refused_by_its_length_alone(running: Running) -> None:
    """The client gets its answer before it has sent the body."""
    host, port = running.service.url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {2**30}\r\n\r\n"
        connection.sendall(head.encode() + b"{" * 1000)
        reply = b""
        while part := connection.recv(65536):
            reply += part
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413")
    assert json.loads(body)["error"]["code"] == "body_too_large"


def test_a_body_without_a_length_is_cut_where_it_gets_too_long(running: Running) -> None:
    def parts() -> Iterator[bytes]:
        yield b'{"model": "'
        for _ in range(2 * MAX_BODY_BYTES // 65536):
            yield b"a" * 65536

    with running.client as client:
        try:
            reply = client.post("/v1/chat/completions", content=parts())
        except httpx.TransportError:  # the connection was closed while the client was still sending
            return
    assert_error(reply, 413)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "no-such"])
def test_a_packed_body_is_refused_and_not_unpacked(running: Running, coding: str) -> None:
    content = gzip.compress(json.dumps({"model": CELLS[1], "messages": HELLO}).encode())
    for body in (content, b"\x1f\x8b\x08zzz"):
        with running.client as client:
            reply = client.post("/v1/chat/completions", content=body, headers={"content-encoding": coding})
        assert_error(reply, 415, said=coding)


@pytest.mark.parametrize("head", ["nonsense", "POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -5"])
def test_what_is_no_http_is_no_defect_of_ours(
    running: Running, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], head: str
) -> None:
    """A port scan writes no traceback into the terminal of who serves."""
    host, port = running.service.url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{head}\r\n\r\n".encode())
        assert connection.recv(65536).startswith(b"HTTP/1.0 400")
    assert "Traceback" not in capfd.readouterr().err
    assert not caplog.records


def test_clients_that_say_nothing_or_half_of_it_hold_nobody_up(running: Running) -> None:
    host, port = running.service.url.removeprefix("http://").removesuffix("/v1").split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(40)]
    try:
        for one in silent[::2]:
            one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        assert running.post({"model": CELLS[1], "messages": HELLO, "max_tokens": 1}).status_code == 200
    finally:
        for one in silent:
            one.close()


@pytest.mark.parametrize(("path", "method", "status"), [
    ("/", "GET", 404), ("/v1/chat/completions", "GET", 405), ("/v1/models", "POST", 405), ("/v1/models/no-such", "GET", 404),
    ("/v1/embeddings", "POST", 404), ("/v1/../../etc/passwd", "GET", 404), ("/v1/models/%00%0d%0aX: y", "GET", 404),
])  # fmt: skip
def test_a_path_or_method_that_is_not_there(running: Running, path: str, method: str, status: int) -> None:
    with running.client as client:
        assert_error(client.request(method, path), status)


@pytest.mark.parametrize("headers", [
    {"origin": "https://evil.example"}, {"host": "evil.example"}, {"origin": "null"}, {"origin": "http://[::bad"},
])  # fmt: skip
def test_a_page_elsewhere_is_refused(running: Running, headers: dict[str, str]) -> None:
    with running.client as client:
        assert_error(client.get("/v1/models", headers=headers), 403)


def test_a_page_of_this_machine_may_ask_and_read(running: Running) -> None:
    page = {"origin": "http://localhost:3000"}
    asked = {**page, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with running.client as client:
        before = client.options("/v1/chat/completions", headers=asked)
        assert before.status_code == 204
        assert before.headers["access-control-allow-headers"] == "authorization"
        reply = client.get("/v1/models", headers={**page, "authorization": "Bearer none"})
    assert reply.headers["access-control-allow-origin"] == page["origin"]


def test_an_error_while_drawing_is_a_server_error_and_the_next_request_is_answered(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastconv.errors import TrainingError

    def fails(*args: Any, **kwargs: Any) -> None:
        raise TrainingError("out of memory", where="here", fix="use a smaller one")

    with monkeypatch.context() as patch:
        patch.setattr("fastconv.serve.resident.sample", fails)
        for stream in (False, True):
            assert_error(
                running.post({"model": CELLS[1], "messages": HELLO, "stream": stream}), 500, said="out of memory"
            )


def test_a_flood_is_refused_and_not_piled_up(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastconv.serve.resident.MOST_WAITING", 3)
    assert_error(running.post({"model": CELLS[1], "messages": HELLO, "n": 50}), 429)
