"""What the judging tests share: rubrics, a test model's price, samples, a desk on the fake server."""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from fastconv.judge.budget import Price, build_requests, judge_params
from fastconv.judge.claude import ApiKey
from fastconv.judge.desk import DeskStatus, JudgeDesk
from fastconv.judge.rubric import Rubric, load_rubric
from fastconv.recipe import JudgeSettings
from fastconv.store.records import Sample
from tests import ROOT

DATA = ROOT / "data"
KEY = "sk-test-sentinel-5f0c2a9e"
#: The fake server bills 1 and 5 dollars per million tokens.
PRICE = Price(input_usd=1.0, output_usd=5.0, cache_write_usd=1.25, cache_read_usd=0.1)
ENDED = datetime.date(2026, 11, 30)


def rubric(name: str = "refusal") -> Rubric:
    """A shipped rubric."""
    return load_rubric(DATA / "rubrics" / f"{name}.toml")


def settings(url: str, mode: str = "live", **fields: Any) -> JudgeSettings:
    """Judge settings for the fake server, quick enough for tests."""
    given: dict[str, Any] = {
        "mode": mode, "model": "claude-test", "base_url": url, "budget_usd": 100.0, "timeout_s": 5.0,
        "concurrency": 16, "batch_poll_s": 0.05, "batch_grace_s": 0.3, "max_reply_tok": 256,
    }  # fmt: skip
    return JudgeSettings(**{**given, **fields})


def samples(n: int, start: int = 0, words: int = 12) -> list[Sample]:
    """Completions that all differ."""
    return [
        Sample(f"row-{i:05d}", i % 10, "assistant", f"Question number {i}?", f"Answer {i}: " + "word " * words, words, True)
        for i in range(start, start + n)
    ]  # fmt: skip


def desk(url: str, workspace: Path, mode: str = "live", **fields: Any) -> JudgeDesk:
    """A desk on the fake server."""
    return JudgeDesk(settings(url, mode, **fields), workspace, PRICE, ApiKey(KEY))


def judgement_keys(settings: JudgeSettings, price: Price, rubric: Rubric, samples: list[Sample]) -> list[str]:
    """Keys of a paid judge's judgements of samples, in their order."""
    return [request.key for request in build_requests(rubric, judge_params(settings, price), samples)]


def judge_all(url: str, workspace: Path, todo: list[Sample], mode: str = "live", **fields: Any) -> DeskStatus:
    """Judge samples to the end."""
    one = desk(url, workspace, mode, **fields)
    one.submit("stage", rubric(), todo)
    return one.close()


class Endpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that gives `answer` (bytes as they are) to all, and knows the model `weak`.

    Where an answer says KEY-SENT or KEY-ESCAPED, it gives away the key that it was sent.
    """

    models: ClassVar[tuple[str, ...]] = ("weak",)
    answer: ClassVar[Any] = {}
    status: ClassVar[int] = 200
    seen: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": name} for name in self.models]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append({"path": self.path, "key": self.headers.get("authorization"), **body})
        self._send(self.answer if isinstance(self.answer, bytes) else json.dumps(self.answer).encode())

    def _send(self, data: bytes) -> None:
        key = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        escaped = "".join(f"\\u{ord(character):04x}" for character in key)
        data = data.replace(b"KEY-SENT", key.encode()).replace(b"KEY-ESCAPED", escaped.encode())
        self.send_response(self.status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def fake_endpoint() -> Iterator[tuple[str, type[Endpoint]]]:
    """Such a server over loopback: its base_url and the handler to script."""
    handler = type("Handler", (Endpoint,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def chat(text: str, top: dict[str, float] | None = None) -> dict[str, Any]:
    """A chat completion with this text, and log-probabilities at its second token."""
    choice: dict[str, Any] = {"message": {"content": text}}
    if top is not None:
        tokens = [{"token": token, "logprob": logprob} for token, logprob in top.items()]
        choice["logprobs"] = {"content": [{"token": "\n", "top_logprobs": []}, {"token": text, "top_logprobs": tokens}]}
    return {"choices": [choice]}
