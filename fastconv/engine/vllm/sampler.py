"""Sampling with a vLLM server, also while training continues: a stack is served as one concatenated adapter."""

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
from fastconv.engine.vllm.client import Client
from fastconv.engine.vllm.memory import USEFUL_ROWS
from fastconv.engine.vllm.server import BASE_NAME, Server
from fastconv.errors import SamplerError
from fastconv.recipe import SamplingSettings

#: Sampling requests that the server gets at once; later ones wait, so that none waits long for its first token.
_CONCURRENT = 3
#: Interval of calling a waiting caller's callback.
_CALLBACK_S = 0.1


class PendingCompletions:
    """Completions being sampled in the background: `n_tok` tokens so far, and `seconds`, its share of the server's
    time."""

    def __init__(self, draw: Callable[[PendingCompletions], list[Completion]], threads: ThreadPoolExecutor) -> None:
        self.n_tok = 0
        self.seconds = 0.0
        #: Done when sampling has ended, or failed.
        self.future: Future[list[Completion]] = threads.submit(draw, self)

    @property
    def done(self) -> bool:
        """Whether sampling has ended, or failed."""
        return self.future.done()

    def wait(self, waiting: Callable[[], None]) -> None:
        """Wait until sampling has ended, or failed; `waiting` is called every `_CALLBACK_S` seconds meanwhile."""
        while not wait([self.future], timeout=_CALLBACK_S).done:
            waiting()

    def result(self) -> list[Completion]:
        """The completions in order of the prompts; waits for them. Raises SamplerError if sampling failed."""
        return self.future.result()


class _SharedClock:
    """Divides the passing time equally among the running requests, so that their seconds add up to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[PendingCompletions] = []
        self._since = 0.0

    @contextmanager
    def running(self, pending: PendingCompletions) -> Iterator[None]:
        """Within the block `pending` gets its share."""
        with self._lock:
            self._share()
            self._running.append(pending)
        try:
            yield
        finally:
            with self._lock:
                self._share()
                self._running.remove(pending)

    def _share(self) -> None:
        now = time.monotonic()
        for pending in self._running:
            pending.seconds += (now - self._since) / len(self._running)
        self._since = now


class VllmSampler:
    """Samples with a vLLM server. The same seeds give other tokens than on the resident base.

    vLLM applies one adapter per prompt, so a stack is served concatenated, in the base's dtype, to which vLLM would
    cast it. An adapter name is never used twice, because vLLM keys its prefix cache by it. One stack is served at a
    time; the next one replaces it when all requests under it have ended.
    """

    def __init__(self, server: Server, stack: Stack) -> None:
        self._server = server
        self._stack = stack
        self._client = Client(server, n_connections=USEFUL_ROWS)
        self._threads = ThreadPoolExecutor(_CONCURRENT, thread_name_prefix="vllm drawing")
        self._closing = threading.Event()
        self._clock = _SharedClock()
        self._served: tuple[Adapter, ...] = ()
        self._running: list[PendingCompletions] = []
        self._name = BASE_NAME
        self._n_served = 0

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: SamplingSettings,
        waiting: Callable[[], None] = lambda: None,
    ) -> PendingCompletions:
        """Start sampling one completion for each prompt under the live stack.

        `waiting` is called while requests under another stack have to end first. Raises SamplerError if the server
        fails or refuses the stack.
        """
        adapters = tuple(adapter for slot in self._stack.route.slots for adapter in slot.adapters)
        name = self._serve(adapters, waiting) if adapters else BASE_NAME
        stop_ids = self._stack.base.tokenizer.stop_ids

        def draw(pending: PendingCompletions) -> list[Completion]:
            def on_token(n_tok: int) -> None:
                pending.n_tok += n_tok
                if self._closing.is_set():
                    raise SamplerError("the sampler was closed", where=self._server.url, fix="run the recipe again")

            with self._clock.running(pending):
                return self._client.complete(name, prompts, seeds, settings, stop_ids, on_token)

        self._running = [
            *(earlier for earlier in self._running if not earlier.done),
            PendingCompletions(draw, self._threads),
        ]
        return self._running[-1]

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: SamplingSettings,
        on_token: Callable[[int], None],
    ) -> list[Completion]:
        """Sample one completion for each prompt and wait for them; `on_token` is called with the number of new tokens.

        Raises SamplerError if the server fails or refuses.
        """
        pending, reported = self.begin(prompts, seeds, settings, lambda: on_token(0)), 0

        def report() -> None:
            nonlocal reported
            new_tok, reported = pending.n_tok - reported, pending.n_tok
            on_token(new_tok)

        pending.wait(report)
        report()
        return pending.result()

    def close(self) -> None:
        """Cancel the running requests and close the client; the server is closed by its owner."""
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def _serve(self, adapters: tuple[Adapter, ...], waiting: Callable[[], None]) -> str:
        """The name under which these adapters are served; loads them unless they are the last served ones."""
        if len(adapters) == len(self._served) and all(a is b for a, b in zip(adapters, self._served, strict=True)):
            return self._name
        if self._served:
            for pending in self._running:
                pending.wait(waiting)
            self._client.unload(self._name)
            shutil.rmtree(self._server.folder / self._name, ignore_errors=True)
            self._served = ()
        self._n_served += 1
        self._name = f"stack-{self._n_served}"
        folder = self._server.folder / self._name
        export_adapter(concatenate(adapters), BaseReference(BASE_NAME), folder, self._stack.base.dtype)
        self._client.load(self._name, str(folder))
        self._served = adapters
        return self._name
