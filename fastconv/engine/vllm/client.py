"""Client of an OpenAI-compatible completions server, by token ids: many requests at once, each with its own seed.

A background thread runs the requests over open connections. The caller's thread gets each reply as it comes, can stop
the requests by raising, and is where a server that died or hangs is detected.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import httpx

from fastconv.engine.generate import Completion
from fastconv.errors import SamplerError
from fastconv.recipe import SamplingSettings

T = TypeVar("T")

#: Attempts of one request; between them the client waits as the server asks, or twice as long each time.
ATTEMPTS = 5
_FIRST_WAIT_S, _MAX_WAIT_S = 0.25, 10.0
#: A server that finishes no completion for this long is taken to hang: 512 rows of 512 tokens take half a minute.
STALL_S = 300.0
#: Timeouts of loading an adapter (a file of some hundred MB) and of connecting; interval of checking the server.
_ADAPTER_S, _CONNECT_S, _CHECK_S = 120.0, 10.0, 0.2
#: Characters of a server's message that an error shows.
_SHOWN_CHARS = 300
#: A pool scans all its connections for every request, so many small pools cost less than a large one.
_POOL_CONNECTIONS = 8


class CompletionServer(Protocol):
    """What a client needs of the server: address, API key, whether its process runs, and the error if it fails."""

    url: str
    key: str

    @property
    def alive(self) -> bool: ...
    def failure(self, what: str) -> SamplerError: ...


class Client:
    """A client of one server. `n_connections` bounds the concurrent requests of all calling threads together.

    `stall_s` seconds without a completion count as a hanging server.
    """

    def __init__(self, server: CompletionServer, *, n_connections: int, stall_s: float = STALL_S) -> None:
        self._server = server
        self._n = n_connections
        self._stall_s = stall_s
        #: When the server last answered any caller: with several, one may wait long for its first reply.
        self._last_reply_at = 0.0
        self._pools = [_pool(server) for _ in range(-(-n_connections // _POOL_CONNECTIONS))]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm client", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancel all requests and close the connections."""
        self._in_loop(_close_all(self._pools))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def load(self, name: str, folder: str) -> None:
        """Load the PEFT directory `folder` on the server under a name not used before. Raises SamplerError if it
        refuses."""
        self._adapter("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    def unload(self, name: str) -> None:
        """Unload an adapter from the server. Raises SamplerError if it refuses."""
        self._adapter("/v1/unload_lora_adapter", {"lora_name": name})

    def complete(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: SamplingSettings,
        stop_ids: Sequence[int],
        on_token: Callable[[int], None] = lambda n_tok: None,
    ) -> list[Completion]:
        """Sample one completion for each prompt (token ids) with its seed, in order.

        `model` is the name of the base or of a loaded adapter. `on_token` is called with the number of tokens of each
        completion, and with 0 while waiting. Raises SamplerError if the server refuses a request, dies, hangs, or its
        reply does not fit the request.
        """
        bodies = (
            {
                "model": model, "prompt": list(prompt), "seed": seed, "temperature": settings.temperature,
                "top_p": settings.top_p, "max_tokens": settings.max_new_tok, "stop_token_ids": list(stop_ids),
                "return_token_ids": True, "skip_special_tokens": False,
            }
            for prompt, seed in zip(prompts, seeds, strict=True)
        )  # fmt: skip
        completions: list[Completion | None] = [None] * len(prompts)
        for place, reply in self._replies(bodies, len(prompts), lambda: on_token(0)):
            completion = completions[place] = _completion(reply, model, prompts[place], stop_ids)
            on_token(len(completion.ids) + completion.ended)
        return [completion for completion in completions if completion is not None]

    def _replies(
        self, bodies: Iterator[dict[str, Any]], n: int, waiting: Callable[[], None]
    ) -> Iterator[tuple[int, Any]]:
        """(place, reply) of every request body, as replies come. Closing the iterator early cancels the other
        requests."""
        done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        sending = self._in_loop(self._begin(enumerate(bodies), min(n, self._n), done))
        self._last_reply_at = time.monotonic()
        try:
            while n:
                try:
                    place_and_reply = done.get(timeout=_CHECK_S)
                except queue.Empty:
                    if sending.done() and done.empty():
                        sending.result()  # raises: it ended before all replies had come
                    if not self._server.alive:
                        raise self._server.failure("the vLLM server is gone") from None
                    if time.monotonic() - self._last_reply_at > self._stall_s:
                        raise self._server.failure(f"no completion in {self._stall_s:g} s") from None
                    waiting()
                    continue
                self._last_reply_at = time.monotonic()
                n -= 1
                yield place_and_reply
        finally:
            self._in_loop(_cancel(sending))

    def _in_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` in the background thread and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _begin(
        self, bodies: Iterator[tuple[int, Any]], n_workers: int, done: queue.SimpleQueue[tuple[int, Any]]
    ) -> asyncio.Task[None]:
        return asyncio.create_task(self._send_all(bodies, n_workers, done))

    async def _send_all(
        self, bodies: Iterator[tuple[int, Any]], n_workers: int, done: queue.SimpleQueue[tuple[int, Any]]
    ) -> None:
        async def work(pool: httpx.AsyncClient) -> None:
            for place, body in bodies:  # a shared iterator: each worker takes the next request
                done.put((place, await self._send(pool, body)))

        workers = [asyncio.create_task(work(self._pools[i % len(self._pools)])) for i in range(n_workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _send(self, pool: httpx.AsyncClient, body: Any) -> Any:
        """The reply to one request, which is sent again after connection errors, 429 and 5xx."""
        wait_s, fault = _FIRST_WAIT_S, ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(min(wait_s, _MAX_WAIT_S))
                wait_s *= 2
            try:
                reply = await pool.post("/v1/completions", content=json.dumps(body))
            except httpx.TransportError as error:
                fault = f"{type(error).__name__} {error}".strip()
                if not self._server.alive:
                    break
                continue
            if reply.status_code == 200:
                return _json(reply)
            fault = f"it answered {reply.status_code}: {_message(reply)}"
            if reply.status_code != 429 and reply.status_code < 500:
                raise _refused(self._server.url, fault)
            with contextlib.suppress(ValueError):
                wait_s = max(wait_s, float(reply.headers.get("retry-after", "")))
        raise self._server.failure(f"the vLLM server failed a request {ATTEMPTS} times ({fault})")

    def _adapter(self, path: str, body: dict[str, str]) -> None:
        """Post an adapter request, once: if only the reply was lost, the name is taken and must not be sent again."""
        request = self._pools[0].post(path, content=json.dumps(body), timeout=_ADAPTER_S)
        try:
            reply = self._in_loop(request)
        except httpx.TransportError as error:
            raise self._server.failure(f"{path} failed ({type(error).__name__})") from None
        if reply.status_code != 200:
            raise _refused(self._server.url, f"{path} answered {reply.status_code}: {_message(reply)}")


def _pool(server: CompletionServer) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=server.url,
        headers={"authorization": f"Bearer {server.key}", "content-type": "application/json"},
        limits=httpx.Limits(max_connections=_POOL_CONNECTIONS, max_keepalive_connections=_POOL_CONNECTIONS),
        timeout=httpx.Timeout(None, connect=_CONNECT_S),
        trust_env=False,
        verify=False,  # loopback and plain HTTP: no certificates are read
    )


async def _close_all(pools: Sequence[httpx.AsyncClient]) -> None:
    for pool in pools:
        await pool.aclose()


async def _cancel(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it has released its connections."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _completion(reply: Any, model: str, prompt: Sequence[int], stop_ids: Sequence[int]) -> Completion:
    """The completion in a reply, without its stop token. Raises SamplerError if it does not fit the request."""
    try:
        (choice,) = reply["choices"]
        served, finish, prompt_read = reply["model"], choice["finish_reason"], choice["prompt_token_ids"]
        ids = tuple(int(token) for token in choice["token_ids"])
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(model, f"its reply has no token ids ({error!r})") from None
    if served != model:
        raise _refused(model, f"{served} answered in its place")
    if list(prompt_read) != list(prompt):
        raise _refused(model, "it read other token ids than were sent")
    if finish == "length":
        return Completion(ids, False)
    if finish != "stop" or not ids or ids[-1] not in stop_ids:
        raise _refused(model, f"a completion ended by {finish!r} on token {ids[-1] if ids else 'none'}")
    return Completion(ids[:-1], True)


def _refused(where: str, what: str) -> SamplerError:
    return SamplerError(
        f"the vLLM server does not do as asked: {what}",
        where=where,
        fix="use a vLLM version of the extra 'vllm', or set model.sampler = 'resident'",
    )


def _json(reply: httpx.Response) -> Any:
    try:
        return reply.json()
    except ValueError:
        raise _refused(str(reply.url), "its reply is no JSON") from None


def _message(reply: httpx.Response) -> str:
    """The server's error message, shortened."""
    try:
        body = reply.json()
        message = body["error"]["message"] if "error" in body else body["message"]
    except (ValueError, KeyError, TypeError):
        message = reply.text
    return " ".join(str(message).split())[:_SHOWN_CHARS]
