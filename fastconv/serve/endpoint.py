"""The endpoint: HTTP on loopback, in a thread of its own. It reads bodies within bounds and answers in OpenAI's shapes.

aiohttp does the HTTP: it is there with `datasets`, bounds bodies, and tells when a client has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from fastconv.chat import ChatTokenizer
from fastconv.errors import FastconvError, InputError
from fastconv.recipe import SamplingSettings
from fastconv.serve.protocol import AnswerText, ApiError, Ask, Reply, parse_ask, refusal_of, unknown_model
from fastconv.serve.resident import Piece

#: The longest body; a context of 128,000 tokens takes about one MiB.
MAX_BODY_BYTES = 8 * 2**20
#: A client that takes longer to send its body is refused.
_BODY_S = 60.0
#: How long replies under way may take once the endpoint ends, and its thread to end.
_GRACE_S, _JOIN_S = 1.0, 10.0
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class Model(Protocol):
    """What draws completions for the endpoint."""

    def draw(
        self, cell: str, prompt: tuple[int, ...], seed: int, settings: SamplingSettings
    ) -> AsyncGenerator[Piece, None]: ...


@dataclass(frozen=True)
class Served:
    """One cell as it is served: its name, the fingerprint of its stack, and what `/v1/models` says of it."""

    name: str
    fingerprint: str
    about: Mapping[str, Any]


class Endpoint:
    """An OpenAI-compatible endpoint for these cells on a listening socket, from `start` to `close`.

    `defaults` are the settings of requests that leave them out, `context_tok` the tokens of a prompt with its completion.
    """

    def __init__(
        self, model: Model, served: Mapping[str, Served], tokenizer: ChatTokenizer, defaults: SamplingSettings,
        *, context_tok: int, listening: socket.socket,
    ) -> None:  # fmt: skip
        self._model, self._served, self._tokenizer, self._defaults = model, served, tokenizer, defaults
        self._context_tok = context_tok
        self._began_s = int(time.time())
        self._listening = listening
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="endpoint", daemon=True)

    @property
    def url(self) -> str:
        """The address that clients take as their base URL."""
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1"

    def start(self) -> None:
        """Begin to answer; returns once it does."""
        self._thread.start()
        self._ready.wait()

    def close(self) -> None:
        """End: running replies are cut, and the port is free."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(_JOIN_S)
        self._listening.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._ready.set()
            self._loop.close()

    async def _serve(self) -> None:
        app = web.Application(middlewares=[_errors, _same_machine], client_max_size=MAX_BODY_BYTES)
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.get("/v1/models/{name}", self._one_model),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._text),
            ]
        )
        # With `handler_cancellation` a handler whose client has gone is cancelled, and so is what it had drawn.
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=_GRACE_S, auto_decompress=False, logger=_logger()
        )  # fmt: skip
        await runner.setup()
        try:
            await web.SockSite(runner, self._listening).start()
            self._ready.set()
            await self._stop.wait()
        finally:
            await runner.cleanup()

    # --- models ----------------------------------------------------------------------------------------

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._described(one) for one in self._served.values()]})

    async def _one_model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self._served:
            raise unknown_model(name, self._served)
        return web.json_response(self._described(self._served[name]))

    def _described(self, one: Served) -> dict[str, Any]:
        about = {"system_fingerprint": one.fingerprint, "max_model_len": self._context_tok, **one.about}
        return {"id": one.name, "object": "model", "created": self._began_s, "owned_by": "fastconv", **about}

    # --- completions -----------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._completion(request, "chat")

    async def _text(self, request: web.Request) -> web.StreamResponse:
        return await self._completion(request, "text")

    async def _completion(self, request: web.Request, kind: Literal["chat", "text"]) -> web.StreamResponse:
        data = await _body(request)
        ask = parse_ask(data, kind, self._served, self._tokenizer, self._defaults, self._context_tok)
        reply = Reply.to(ask, self._served[ask.model].fingerprint)
        return await (self._streamed if ask.stream else self._whole)(request, ask, reply)

    async def _whole(self, request: web.Request, ask: Ask, reply: Reply) -> web.Response:
        async def one(index: int) -> tuple[str, AnswerText]:
            answer, text = AnswerText(self._tokenizer, ask.stops), []
            async for piece in self._pieces(ask, index, answer):
                text.append(piece)
            return "".join(text), answer

        drawn = await _together([one(index) for index in range(len(ask.prompts))])
        n_tok = sum(answer.n_tok for _, answer in drawn)
        body = reply.whole([text for text, _ in drawn], [answer.finish for _, answer in drawn], n_tok)
        return web.json_response(body)

    async def _streamed(self, request: web.Request, ask: Ask, reply: Reply) -> web.StreamResponse:
        """Server-sent events. The first waits for the first token, so that what is refused until then has its status."""
        events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        async def one(index: int) -> int:
            answer, first = AnswerText(self._tokenizer, ask.stops), True
            async for text in self._pieces(ask, index, answer):
                if text or first:
                    events.put_nowait(reply.chunk(index, text, first=first))
                first = False
            events.put_nowait(reply.chunk(index, "", answer.finish, first=first))
            return answer.n_tok

        drawing = asyncio.ensure_future(_together([one(index) for index in range(len(ask.prompts))]))
        try:
            event = await _next(events, drawing)
            response = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-store"})
            response.headers.update(_allowed(request))
            await response.prepare(request)
            try:
                while event is not None:
                    await response.write(_event(event))
                    event = await _next(events, drawing)
                if ask.usage_in_stream:
                    await response.write(_event(reply.last(sum(drawing.result()))))
                await response.write(b"data: [DONE]\n\n")
            except ApiError as error:  # the status is sent already
                await response.write(_event(error.body))
            await response.write_eof()
        finally:
            drawing.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError):
                await drawing
        return response

    async def _pieces(self, ask: Ask, index: int, answer: AnswerText) -> AsyncIterator[str]:
        """The texts of one choice as they come; after a stop sequence it is drawn no further."""
        async with contextlib.aclosing(
            self._model.draw(ask.model, ask.prompts[index], ask.seeds[index], ask.settings)
        ) as pieces:
            async for piece in pieces:
                yield answer.add(piece.ids)
                if answer.finish is not None:
                    return
                if piece.finish is not None:
                    yield answer.end(piece.finish)
                    return


def listen(port: int) -> socket.socket:
    """A listening socket on the loopback; port 0 takes a free one. Raises InputError if the port cannot be had."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
        listening.listen(128)
    except (OSError, OverflowError) as error:
        listening.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        what = f"port {port} is taken" if taken else f"port {port} cannot be used ({error})"
        raise InputError(what, where="--port", fix="name another one, or 0 for any that is free") from None
    return listening


async def _body(request: web.Request) -> bytes:
    """The body, within its bounds. Raises ApiError; a body that says that it is packed or too long is not read at all."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(
            415, f"a body packed as {coding!r:.40} is not read: send it as it is", code="unsupported_encoding"
        )
    too_long = ApiError(413, f"the body is longer than {MAX_BODY_BYTES} bytes", code="body_too_large")
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise too_long
    try:
        return await asyncio.wait_for(request.read(), _BODY_S)
    except web.HTTPRequestEntityTooLarge:
        raise too_long from None
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {_BODY_S:g} s", code="timeout") from None


async def _together(parts: list[Any]) -> list[Any]:
    """The results of all; if one fails or this is cancelled, the others are cancelled and have ended."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _next(events: asyncio.Queue[dict[str, Any]], drawing: asyncio.Future[Any]) -> dict[str, Any] | None:
    """The next event; None once all are out. Raises what the drawing raised, after the events before it."""
    getting = asyncio.ensure_future(events.get())
    try:
        await asyncio.wait([getting, drawing], return_when=asyncio.FIRST_COMPLETED)
        if getting.done():
            return getting.result()
        if not events.empty():
            return events.get_nowait()
        drawing.result()
        return None
    finally:
        if not getting.done():
            getting.cancel()


def _event(body: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n".encode()


def _logger() -> logging.Logger:
    """Where aiohttp tells of handlers that failed: as everywhere, but for clients that do not speak HTTP."""
    logger = logging.Logger("fastconv.serve")
    logger.parent = logging.getLogger("aiohttp.server")
    logger.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError)))
    return logger


def _refused(request: web.Request, error: ApiError) -> web.Response:
    response = web.json_response(error.body, status=error.status)
    if request.can_read_body and not request.content.at_eof():
        response.force_close()  # what is left of the body is not read as the next request
    return response


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Everything that goes wrong in OpenAI's shape."""
    try:
        return await handler(request)
    except ApiError as error:
        return _refused(request, error)
    except web.HTTPException as error:
        what = {404: f"there is no {request.path}", 405: f"{request.path} takes no {request.method}"}
        return _refused(request, ApiError(error.status, what.get(error.status) or error.reason or "refused"))
    except FastconvError as error:
        return _refused(request, refusal_of(error, 500))


@web.middleware
async def _same_machine(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Refuse what a web page elsewhere makes a browser ask; pages of this machine (a chat window) are let in."""
    origin = request.headers.get("origin")
    for named in (f"//{request.host}", origin):
        if named is not None and _host_of(named) not in _LOOPBACK:
            raise ApiError(403, "only this machine is answered", code="forbidden")
    if request.method == "OPTIONS" and origin is not None:
        return web.Response(status=204, headers=_allowed(request))
    response = await handler(request)
    if not response.prepared:
        response.headers.update(_allowed(request))
    return response


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _allowed(request: web.Request) -> dict[str, str]:
    """Headers that let a page of this machine read the reply."""
    origin = request.headers.get("origin")
    if origin is None:
        return {}
    return {
        "access-control-allow-origin": origin, "access-control-allow-methods": "GET, POST, OPTIONS",
        "access-control-allow-headers": request.headers.get("access-control-request-headers", "*"), "vary": "origin",
    }  # fmt: skip
