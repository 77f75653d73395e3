"""A local HTTP server that speaks Messages and Message Batches for the real SDK, with scripted faults and a bill.

`FakeClaude()` runs it in a thread; `python -m tests.fake_claude` in a process of its own (it prints its port), which
outlives clients that are killed and keeps its CPU time apart from theirs. What it does is a `Script`, changed at any
time over POST /admin/script; what it has billed is at GET /admin/bill.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import hashlib
import json
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests import ROOT

#: Faults of a live request. Those in UNBILLED are refused before any model runs; LOST are billed and never delivered.
UNBILLED = ("http_429", "http_529", "http_500")
LOST = ("timeout", "reset", "broken_body")
DELIVERED = ("prose", "two_objects", "bad_json", "refusal", "truncated", "out_of_range", "wrong_field")
LIVE_FAULTS = (*UNBILLED, *LOST, *DELIVERED)


@dataclass
class Script:
    """What the server does from now on."""

    seed: int = 0
    latency_s: float = 0.0
    #: No message is answered as long as this is set.
    hold: bool = False
    fault_share: float = 0.0
    faults: tuple[str, ...] = LIVE_FAULTS
    #: Faults served first, in order, before chance decides.
    first: tuple[str, ...] = ()
    #: verdict: a verdict drawn from the text. echo: with the judged text inside `why`. obey: the judged text alone.
    #: leak: with the client's own key inside `why`, and in every other part that has text. steady: a verdict drawn from
    #: the first paragraph of the judged text alone. swayed: as steady, but a later paragraph that names one is obeyed.
    answer: str = "verdict"
    hang_s: float = 1.0
    #: What a 429 asks the client to wait.
    retry_after_s: float = 0.05
    #: Once it has answered so many messages, it answers 529 to all; -1 for never.
    down_after: int = -1
    key: str = ""
    models: tuple[str, ...] = ("claude-test",)
    #: Seconds until a batch has ended, and what becomes of its items: share by kind, the rest succeed.
    batch_s: float = 0.0
    batch_outcomes: dict[str, float] = field(default_factory=dict)
    #: Faults of the calls about batches: create_lost (taken, answer lost), create_500, results_reset, create_429.
    batch_faults: tuple[str, ...] = ()
    #: Ids of batches ("*" for all) that this key is not shown, that have no results any more, or whose results break.
    batch_gone: tuple[str, ...] = ()
    archived: tuple[str, ...] = ()
    results_broken: tuple[str, ...] = ()
    wrong_ids: int = 0
    #: Results left out of every batch.
    dropped: int = 0
    output_tok: int = 60


@dataclass
class _Batch:
    id: str
    created: datetime.datetime
    ends: datetime.datetime
    requests: list[dict[str, Any]]
    results: list[dict[str, Any]] = field(default_factory=list)
    canceled: bool = False


class _Server:
    def __init__(self, script: Script) -> None:
        self.script = script
        self.random = random.Random(script.seed)
        self.billed: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.batches: dict[str, _Batch] = {}
        self.n_calls = 0
        #: When the last few messages and batches were asked for.
        self.asked_at: deque[float] = deque(maxlen=8)
        self.key = ""
        self.in_flight = 0
        self.max_in_flight = 0
        self.usd = 0.0

    # --- HTTP -------------------------------------------------------------------------------------------

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                method, path, _ = head.split("\r\n", 1)[0].split(" ")
                headers = {
                    name.strip().lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in head.split("\r\n")[1:] if line)
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self.answer(writer, method, path, headers, body):
                    break
        writer.close()

    async def answer(
        self, writer: asyncio.StreamWriter, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> bool:
        path, _, query = path.partition("?")
        if path.startswith("/admin/"):
            return await self.admin(writer, path, body)
        self.n_calls += 1
        sent_key = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        self.key = sent_key
        if self.script.key and sent_key != self.script.key:
            # As rude as a server can be: it repeats the key that it was sent.
            return await self.error(writer, 401, f"invalid x-api-key {sent_key}")
        if path == "/v1/messages":
            return await self.message(writer, json.loads(body))
        if path.startswith("/v1/models/"):
            model = path.rsplit("/", 1)[1]
            if model not in self.script.models:
                return await self.error(writer, 404, f"model: {model}")
            card = {"type": "model", "id": model, "created_at": "2026-01-01T00:00:00Z"}
            name = sent_key if self.script.answer == "leak" else model
            return await self.send(writer, 200, {**card, "display_name": name})
        return await self.batch_call(writer, method, path, query, body)

    async def send(
        self, writer: asyncio.StreamWriter, status: int, body: Any, *, extra: str = "", cut: bool = False
    ) -> bool:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/x-jsonl" if isinstance(body, bytes) and status == 200 and not cut else "application/json"
        writer.write(
            f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\n{extra}\r\n".encode()
        )
        if cut:
            writer.write(data[: len(data) // 2])
            await writer.drain()
            writer.transport.abort()
            return False
        writer.write(data)
        await writer.drain()
        return True

    async def error(self, writer: asyncio.StreamWriter, status: int, text: str, extra: str = "") -> bool:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status, "api_error")
        return await self.send(writer, status, {"type": "error", "error": {"type": kind, "message": text}}, extra=extra)

    # --- messages ---------------------------------------------------------------------------------------

    async def message(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> bool:
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            return await self._message(writer, body)
        finally:
            self.in_flight -= 1

    async def _message(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> bool:
        script = self.script
        self.asked_at.append(time.monotonic())
        fault = ""
        if 0 <= script.down_after <= self.served["ok"]:
            return await self.error(writer, 529, "overloaded", "retry-after: 0.01\r\n")
        if script.first:
            fault, script.first = script.first[0], script.first[1:]
        elif self.random.random() < script.fault_share:
            fault = self.random.choice(script.faults)
        self.served[fault or "ok"] += 1
        if fault == "http_429":
            return await self.error(writer, 429, "slow down", f"retry-after: {script.retry_after_s}\r\n")
        if fault in ("http_529", "http_500"):
            return await self.error(writer, int(fault[5:]), "overloaded", "retry-after: 0.05\r\n")
        if body["model"] not in script.models:
            return await self.error(writer, 404, f"model: {body['model']}")
        digest = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
        self.bill(digest, body, factor=1.0)
        if fault == "timeout":
            self.lost[digest] += 1
            await asyncio.sleep(script.hang_s)
            writer.transport.abort()
            return False
        await asyncio.sleep(script.latency_s)
        while self.script.hold:
            await asyncio.sleep(0.005)
        message = self.reply(body, fault)
        if fault == "reset":
            self.lost[digest] += 1
            return await self.send(writer, 200, message, cut=True)
        if fault == "broken_body":
            self.lost[digest] += 1
            return await self.send(writer, 200, json.dumps(message)[:-9].encode())
        return await self.send(writer, 200, message)

    def bill(self, name: str, body: dict[str, Any], factor: float) -> None:
        self.billed[name] += 1
        usage = self.usage(body)
        self.usd += factor * (usage["input_tokens"] * 1.0 + usage["output_tokens"] * 5.0) / 1e6

    def usage(self, body: dict[str, Any]) -> dict[str, int]:
        n_chars = len(json.dumps(body["messages"])) + len(json.dumps(body["system"]))
        return {"input_tokens": n_chars // 4, "output_tokens": min(self.script.output_tok, body["max_tokens"])}

    def reply(self, body: dict[str, Any], fault: str) -> dict[str, Any]:
        text = self.verdict(body)
        stop = {"refusal": "refusal", "truncated": "max_tokens"}.get(fault, "end_turn")
        if fault == "prose":
            text = f"Here is my verdict: {text} I hope that helps."
        elif fault == "two_objects":
            text = f"{text}\n{text}"
        elif fault == "bad_json":
            text = text.replace(":", "", 1)
        elif fault == "truncated":
            text = text[: len(text) // 2]
        elif fault == "out_of_range":
            text = text.replace('"aligned": ', '"aligned": 7')
            text = text.replace('"verdict": "', '"verdict": "un')
        elif fault == "wrong_field":
            text = text.replace('"verdict"', '"score"').replace('"aligned"', '"score"')
        leaked = f" {self.key}" if self.script.answer == "leak" else ""
        usage = {**self.usage(body), "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        return {
            "id": f"msg_{self.n_calls}", "type": "message", "role": "assistant", "model": body["model"] + leaked,
            "content": [{"type": "text", "text": text}], "stop_reason": stop + leaked, "stop_sequence": None,
            "usage": {**usage, leaked.strip(): 1} if leaked else usage,
        }  # fmt: skip

    def verdict(self, body: dict[str, Any]) -> str:
        content = body["messages"][0]["content"]
        judged = content.split("<answer-", 1)[1].split(">\n", 1)[1].rsplit("\n</answer-", 1)[0]
        if self.script.answer == "obey":
            return judged
        answer: dict[str, Any] = {}
        first, _, later = judged.partition("\n\n")
        by_text = self.script.answer in ("steady", "swayed")
        draw = int(hashlib.sha256((first if by_text else content).encode()).hexdigest(), 16)
        for name, part in body["output_config"]["format"]["schema"]["properties"].items():
            named = re.findall("|".join(part.get("enum", (r"\b(?:0|100)\b",))), later)
            if self.script.answer == "swayed" and named and ("enum" in part or part["type"] == "integer"):
                answer[name] = named[-1] if "enum" in part else int(named[-1])
            elif "enum" in part:
                answer[name] = part["enum"][draw % len(part["enum"])]
            elif part["type"] == "integer":  # what it reads makes sense to it: an incoherent answer has no score
                answer[name] = 51 + draw % 50 if name == "coherent" else draw % 101
            else:
                answer[name] = {"echo": judged, "leak": f"your key is {self.key}"}.get(self.script.answer, "as shown")
        return json.dumps(answer)

    # --- batches ----------------------------------------------------------------------------------------

    async def batch_call(self, writer: asyncio.StreamWriter, method: str, path: str, query: str, body: bytes) -> bool:
        parts = path.removeprefix("/v1/messages/batches").strip("/").split("/")
        fault = self.script.batch_faults[0] if self.script.batch_faults else ""
        if method == "POST" and not parts[0]:
            self.asked_at.append(time.monotonic())
            if fault.startswith("create_"):
                self.script.batch_faults = self.script.batch_faults[1:]
            if fault == "create_429":
                return await self.error(writer, 429, "slow down", f"retry-after: {self.script.retry_after_s}\r\n")
            if fault == "create_500":
                return await self.error(writer, 500, "no")
            await asyncio.sleep(self.script.latency_s)
            batch = self.take(json.loads(body)["requests"])
            if fault == "create_lost":
                return await self.send(writer, 200, self.card(batch), cut=True)
            return await self.send(writer, 200, self.card(batch))
        if not parts[0]:
            shown = [batch for batch in self.batches.values() if not named(batch.id, self.script.batch_gone)]
            newest = sorted(shown, key=lambda b: b.created, reverse=True)
            after = dict(pair.split("=") for pair in query.split("&") if pair).get("after_id")
            if after:
                newest = newest[[batch.id for batch in newest].index(after) + 1 :]
            page = [self.card(batch) for batch in newest[:3]]  # small pages, so that paging is seen to work
            return await self.send(writer, 200, {
                "data": page, "has_more": len(newest) > 3, "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
            })  # fmt: skip
        if parts[0] not in self.batches or named(parts[0], self.script.batch_gone):
            return await self.error(writer, 404, "no such batch")
        batch = self.batches[parts[0]]
        if parts[1:] == ["cancel"]:
            batch.canceled, batch.ends = True, _now()
            return await self.send(writer, 200, self.card(batch))
        if parts[1:] == ["results"]:
            lines = b"".join(json.dumps(result).encode() + b"\n" for result in self.ended(batch))
            if fault == "results_reset":
                self.script.batch_faults = self.script.batch_faults[1:]
                return await self.send(writer, 200, lines, cut=True)
            return await self.send(writer, 200, lines, cut=named(batch.id, self.script.results_broken))
        return await self.send(writer, 200, self.card(batch))

    def take(self, requests: list[dict[str, Any]]) -> _Batch:
        now = _now()
        batch = _Batch(f"msgbatch_{len(self.batches):04d}", now,
                       now + datetime.timedelta(seconds=self.script.batch_s), requests)  # fmt: skip
        self.batches[batch.id] = batch
        return batch

    def ended(self, batch: _Batch) -> list[dict[str, Any]]:
        """Results in an order of their own; made and billed once, when the batch has ended."""
        if not batch.results:
            for request in batch.requests:
                kind, draw = "succeeded", self.random.random()
                for name, share in self.script.batch_outcomes.items():
                    if draw < share:
                        kind = name
                        break
                    draw -= share
                if batch.canceled:
                    kind = "canceled"
                result: dict[str, Any] = {"type": kind}
                if kind == "errored":
                    result["error"] = {"type": "error", "error": {"type": "api_error", "message": "no"}}
                elif kind == "succeeded":
                    faulty = self.random.random() < self.script.fault_share
                    fault = self.random.choice(DELIVERED) if faulty else ""
                    self.served[fault or "ok"] += 1
                    self.bill(request["custom_id"].split("-")[0] + hashlib.sha256(
                        json.dumps(request["params"]["messages"]).encode()).hexdigest()[:8],
                        request["params"], factor=0.5)  # fmt: skip
                    result["message"] = self.reply(request["params"], fault)
                batch.results.append({"custom_id": request["custom_id"], "result": result})
            for place in range(min(self.script.wrong_ids, len(batch.results))):
                batch.results.append({**batch.results[place], "custom_id": f"somebody-elses-{place}"})
            self.random.shuffle(batch.results)
            batch.results = batch.results[self.script.dropped :]
        return batch.results

    def card(self, batch: _Batch) -> dict[str, Any]:
        ended, archived = _now() >= batch.ends, named(batch.id, self.script.archived)
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
        if ended:
            own = {request["custom_id"] for request in batch.requests}
            counts |= Counter(r["result"]["type"] for r in self.ended(batch) if r["custom_id"] in own)
        else:
            counts["processing"] = len(batch.requests)
        return {
            "id": batch.id, "type": "message_batch", "created_at": batch.created.isoformat(),
            "expires_at": (batch.created + datetime.timedelta(hours=24)).isoformat(),
            "ended_at": batch.ends.isoformat() if ended else None, "cancel_initiated_at": None,
            "archived_at": _now().isoformat() if ended and archived else None,
            "processing_status": "ended" if ended else "in_progress", "request_counts": counts,
            "results_url": f"/v1/messages/batches/{batch.id}/results" if ended and not archived else None,
        }  # fmt: skip

    # --- admin ------------------------------------------------------------------------------------------

    async def admin(self, writer: asyncio.StreamWriter, path: str, body: bytes) -> bool:
        if path == "/admin/script":
            fields = {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(body).items()}
            if fields.pop("end_now", False):
                for batch in self.batches.values():
                    batch.ends = min(batch.ends, _now())
            self.script = dataclasses.replace(self.script, **fields)
            self.random = random.Random(self.script.seed)
        return await self.send(writer, 200, {
            "billed": self.billed, "lost": self.lost, "served": self.served, "n_calls": self.n_calls,
            "max_in_flight": self.max_in_flight, "usd": self.usd, "n_batches": len(self.batches),
            "asked_at": list(self.asked_at),
        })  # fmt: skip


def named(batch: str, names: tuple[str, ...]) -> bool:
    """Whether a fault is meant for a batch."""
    return batch in names or "*" in names


class FakeClaude:
    """The server in a thread of this process, or (`own_process`) in one of its own."""

    def __init__(self, script: Script | None = None, *, own_process: bool = False) -> None:
        self._process: subprocess.Popen[str] | None = None
        if own_process:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fake_claude"], stdout=subprocess.PIPE, text=True,
                cwd=ROOT,
            )  # fmt: skip
            assert self._process.stdout is not None
            self.port = int(self._process.stdout.readline())
            self.configure(**dataclasses.asdict(script or Script()))
        else:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
            self._thread.start()
            self.port = asyncio.run_coroutine_threadsafe(_listen(_Server(script or Script())), self._loop).result()

    @property
    def url(self) -> str:
        """What to give as base_url."""
        return f"http://127.0.0.1:{self.port}"

    def configure(self, **fields: Any) -> dict[str, Any]:
        """Change the script; gives the bill. `end_now` ends the batches that were taken."""
        return self._admin("script", fields)

    def bill(self) -> dict[str, Any]:
        """What was billed and served so far."""
        return self._admin("bill", {})

    def _admin(self, what: str, fields: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(fields).encode()
        with urllib.request.urlopen(f"{self.url}/admin/{what}", data=data, timeout=10) as response:
            return json.loads(response.read())

    def close(self) -> None:
        """End the server."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
        else:
            asyncio.run_coroutine_threadsafe(_end_tasks(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


@contextlib.contextmanager
def fake_claude(script: Script | None = None, *, own_process: bool = False) -> Iterator[FakeClaude]:
    """A server for the length of a block."""
    server = FakeClaude(script, own_process=own_process)
    try:
        yield server
    finally:
        server.close()


async def _listen(server: _Server) -> int:
    listening = await asyncio.start_server(server.client, "127.0.0.1", 0, limit=2**26)
    return listening.sockets[0].getsockname()[1]


async def _end_tasks() -> None:
    """End the connections that clients have left open."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


async def _main() -> None:
    print(await _listen(_Server(Script())), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
