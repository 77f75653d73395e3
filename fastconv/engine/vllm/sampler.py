"""Completions drawn by a vLLM server while the trainer goes on: a stack is served as one concatenated adapter."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from fastconv.engine.export import BaseReference, export_adapter
from fastconv.engine.generate import Completion
from fastconv.engine.lora import Adapter, concatenate
from fastconv.engine.stack import Stack
from fastconv.engine.vllm import memory as room
from fastconv.engine.vllm.client import Client
from fastconv.engine.vllm.server import BASE_NAME, Server
from fastconv.errors import SamplerError
from fastconv.recipe import SamplingSettings

#: Drawings that ask the server at the same time; the next ones wait, so that none waits long for its first token.
_AT_ONCE = 3
_LOOK_S = 0.1


class PendingCompletions:
    """Completions that the server draws meanwhile: `n_tok` tokens so far, in `seconds`, its share of the server's time."""

    def __init__(self, draw: Callable[[PendingCompletions], list[Completion]], threads: ThreadPoolExecutor) -> None:
        self.n_tok = 0
        self.seconds = 0.0
        self._future: Future[list[Completion]] = threads.submit(draw, self)

    @property
    def done(self) -> bool:
        """Whether it is drawn, or failed."""
        return self._future.done()

    def wait(self, waiting: Callable[[], None]) -> None:
        """Wait until it is drawn, or failed; `waiting` is called now and then meanwhile."""
        while not wait([self._future], timeout=_LOOK_S).done:
            waiting()

    def result(self) -> list[Completion]:
        """The completions in order, waited for. Raises SamplerError."""
        return self._future.result()


class _Clock:
    """Shares the time that passes out among whoever is under way, equally, so that the shares add up to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: list[PendingCompletions] = []
        self._since = 0.0

    @contextmanager
    def running(self, drawing: PendingCompletions) -> Iterator[None]:
        """Inside, the drawing gets its share."""
        with self._lock:
            self._share()
            self._under_way.append(drawing)
        try:
            yield
        finally:
            with self._lock:
                self._share()
                self._under_way.remove(drawing)

    def _share(self) -> None:
        now = time.monotonic()
        for one in self._under_way:
            one.seconds += (now - self._since) / len(self._under_way)
        self._since = now


class VllmSampler:
    """A vLLM server. Its draws are its own: the same seeds give other tokens than on the resident base.

    vLLM takes one adapter per prompt, so a stack is served concatenated, in the base's dtype as vLLM would cast it. A
    name is never used twice: vLLM keys its prefix cache by it, and would answer from another stack's cache. It draws
    under one stack at a time; the next one's adapter takes its place once everything asked under it is drawn.
    """

    def __init__(self, server: Server, stack: Stack) -> None:
        self._server = server
        self._stack = stack
        self._client = Client(server, n_connections=room.USEFUL_ROWS)
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="vllm drawing")
        self._closing = threading.Event()
        self._clock = _Clock()
        self._on: tuple[Adapter, ...] = ()
        self._under_way: list[PendingCompletions] = []
        self._name = BASE_NAME
        self._n_served = 0

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: SamplingSettings,
        waiting: Callable[[], None] = lambda: None,
    ) -> PendingCompletions:
        """Begin one completion per prompt under the live stack. `waiting` is called while another stack is drawn under.

        Raises SamplerError if the server is lost or refuses the stack.
        """
        adapters = tuple(adapter for slot in self._stack.route.slots for adapter in slot.adapters)
        name = self._serve(adapters, waiting) if adapters else BASE_NAME
        stop_ids = self._stack.base.tokenizer.stop_ids

        def draw(drawing: PendingCompletions) -> list[Completion]:
            def hear(n_tok: int) -> None:
                drawing.n_tok += n_tok
                if self._closing.is_set():
                    raise SamplerError("the sampler was closed", where=self._server.url, fix="run the recipe again")

            with self._clock.running(drawing):
                return self._client.complete(name, prompts, seeds, settings, stop_ids, hear)

        self._under_way = [*(one for one in self._under_way if not one.done), PendingCompletions(draw, self._threads)]
        return self._under_way[-1]

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: SamplingSettings,
        on_token: Callable[[int], None],
    ) -> list[Completion]:
        """One completion per prompt, waited for. Raises SamplerError if the server is lost or refuses."""
        drawing, heard = self.begin(prompts, seeds, settings, lambda: on_token(0)), 0

        def hear() -> None:
            nonlocal heard
            news, heard = drawing.n_tok - heard, drawing.n_tok
            on_token(news)

        drawing.wait(hear)
        hear()
        return drawing.result()

    def close(self) -> None:
        """Drop what is under way and end the client; the server is its owner's to end."""
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def _serve(self, adapters: tuple[Adapter, ...], waiting: Callable[[], None]) -> str:
        """The name under which these adapters are served; the probes of a cell follow one another."""
        if len(adapters) == len(self._on) and all(a is b for a, b in zip(adapters, self._on, strict=True)):
            return self._name
        if self._on:
            for one in self._under_way:
                one.wait(waiting)
            self._client.unload(self._name)
            shutil.rmtree(self._server.folder / self._name, ignore_errors=True)
            self._on = ()
        self._n_served += 1
        self._name = f"stack-{self._n_served}"
        folder = self._server.folder / self._name
        export_adapter(concatenate(adapters), BaseReference(BASE_NAME), folder, self._stack.base.dtype)
        self._client.load(self._name, str(folder))
        self._on = adapters
        return self._name
