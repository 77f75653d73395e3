"""A vLLM server behind the endpoint: every stack as one adapter, loaded once and proven by vLLM's own logits.

The endpoint renders prompts and reads tokens; vLLM gets token ids with a seed, and streams token ids back.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from fastconv.chat import ChatTokenizer
from fastconv.engine.export import BaseReference, export_adapter
from fastconv.engine.lora import Adapter, concatenate
from fastconv.engine.stack import Probe, probe_tokens, probe_tolerance
from fastconv.engine.vllm.client import Client
from fastconv.engine.vllm.server import BASE_NAME, Server
from fastconv.errors import TrainingError
from fastconv.recipe import SamplingSettings
from fastconv.serve.protocol import ApiError, refusal_of
from fastconv.serve.resident import Piece

_CONNECT_S = 10.0


@dataclass(frozen=True)
class VllmCell:
    """A cell for vLLM: its adapters in order, none for the bare base, and the probe that was recorded for it."""

    adapters: tuple[Adapter, ...]
    recorded: Probe | None


class VllmModel:
    """The cells of a run on a vLLM server, each loaded under a name of its own when it is proven."""

    def __init__(
        self, server: Server, dtype: Any, recorded_as: Mapping[str, str], tokenizer: ChatTokenizer, vocab: int
    ) -> None:
        """`dtype` is the base's, `vocab` the rows of its head, `recorded_as` the engine that recorded the stacks' logits."""
        self._server, self._dtype, self._recorded_as, self._tokenizer = server, dtype, recorded_as, tokenizer
        self._names: dict[str, str] = {}
        self._folders: dict[tuple[int, ...], str] = {}
        self._base: Probe | None = None
        self._rows, self._columns = probe_tokens(vocab)
        self._http: httpx.AsyncClient | None = None
        self.name = f"vllm {server.version}"

    def prove(self, cell: str, stack: VllmCell) -> dict[str, Any]:
        """Load a cell's stack and hold the logits that vLLM has under it against those recorded for it.

        Returns the distances of the probe as `Stacks.live_stack` does, of logits less their mean: vLLM tells
        probabilities, in which a row's logits are known up to a constant. Raises TrainingError if the stack is not the
        recorded one, or changes nothing; SamplerError if the server refuses it.
        """
        self._names[cell] = name = self._load(stack.adapters)
        if self._base is None:
            self._base = self._probe(BASE_NAME)
        if not stack.adapters:
            return {"from_base": 0.0}
        found, base = self._probe(name), self._base
        if found.distance(base) == 0.0:
            raise TrainingError(
                "vLLM has the base's logits under this stack",
                where=cell,
                fix="report this, and serve it with --engine resident",
            )
        assert stack.recorded is not None, "a trained stack has a recorded probe"
        recorded = _centred(stack.recorded, len(self._columns))
        distance = found.distance(recorded)
        if distance > probe_tolerance(self._dtype, self._recorded_as):
            raise TrainingError(
                f"vLLM's logits are {distance:.2g} away from those recorded for the stack", where=cell,
                fix="the adapters or the base are not the recorded ones (`fastconv doctor`), or serve it with --engine resident",
            )  # fmt: skip
        return {"from_base": round(found.distance(base), 6), "from_recorded": round(distance, 6)}

    async def draw(
        self, cell: str, prompt: tuple[int, ...], seed: int, settings: SamplingSettings
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of one completion as vLLM streams them. Closing the iterator makes vLLM stop. Raises ApiError."""
        body = {
            "model": self._names[cell], "prompt": list(prompt), "seed": seed, "temperature": settings.temperature,
            "top_p": settings.top_p, "max_tokens": settings.max_new_tok, "stop_token_ids": list(self._tokenizer.stop_ids),
            "return_token_ids": True, "skip_special_tokens": False, "stream": True,
        }  # fmt: skip
        try:
            async with self._client().stream("POST", "/v1/completions", content=json.dumps(body)) as reply:
                if reply.status_code != 200:
                    said = (await reply.aread())[:1000].decode(errors="replace")
                    status = reply.status_code if 400 <= reply.status_code < 500 else 502
                    raise ApiError(status, f"vLLM refuses it: {said}")
                async for piece in self._pieces(reply.aiter_lines()):
                    yield piece
        except httpx.HTTPError as error:
            raise refusal_of(self._server.failure(f"the vLLM server is gone ({type(error).__name__})"), 502) from None

    def work(self, stop: Callable[[], bool], wait: Callable[[float], object]) -> None:
        """Until `stop` returns True, look whether the server runs. Raises SamplerError if it has ended."""
        while not stop():
            if not self._server.alive:
                raise self._server.failure("the vLLM server is gone")
            wait(0.2)

    async def _pieces(self, lines: AsyncIterator[str]) -> AsyncGenerator[Piece, None]:
        """Tokens from server-sent events. The token that ends the turn is no part of the answer."""
        stops = set(self._tokenizer.stop_ids)
        async for line in lines:
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            try:
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise ApiError(502, f"vLLM: {event['error']['message']}")
                (choice,) = event["choices"]
                ids, finish = tuple(int(one) for one in choice.get("token_ids") or ()), choice.get("finish_reason")
            except (ValueError, KeyError, TypeError):
                raise ApiError(502, "vLLM's stream cannot be read") from None
            if finish not in (None, "stop", "length"):
                raise ApiError(502, f"vLLM ended a completion by {finish!r}")
            yield Piece(ids[:-1] if finish == "stop" and ids and ids[-1] in stops else ids, finish)
            if finish is not None:
                return
        raise ApiError(502, "vLLM's stream ended early")

    def _client(self) -> httpx.AsyncClient:
        """The client of the endpoint's thread, made in its loop. Its connections end with the process."""
        if self._http is None:
            self._http = httpx.AsyncClient(
                base_url=self._server.url, headers=_headers(self._server), trust_env=False, verify=False,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
                timeout=httpx.Timeout(None, connect=_CONNECT_S),
            )  # fmt: skip
        return self._http

    def _load(self, adapters: Sequence[Adapter]) -> str:
        """The name of these adapters on the server, which reads them once, however many cells share them."""
        if not adapters:
            return BASE_NAME
        held = tuple(id(adapter) for adapter in adapters)
        if held not in self._folders:
            name = f"cell-{len(self._folders) + 1}"
            folder = self._server.folder / name
            export_adapter(concatenate(adapters), BaseReference(BASE_NAME), folder, self._dtype)
            client = Client(self._server, n_connections=1)
            try:
                client.load(name, str(folder))
            finally:
                client.close()
            self._folders[held] = name
        return self._folders[held]

    def _probe(self, name: str) -> Probe:
        """`Stack.probe` by vLLM: the log-probability of each kept token after each row, less their mean.

        vLLM tells the log-probability of a prompt's own tokens, so each kept token is asked for as the last of a prompt.
        """
        prompts = [[*row, column] for row, column in itertools.product(self._rows, self._columns)]
        body = {"model": name, "prompt": prompts, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        try:
            reply = httpx.post(
                f"{self._server.url}/v1/completions", content=json.dumps(body), headers=_headers(self._server),
                timeout=600.0, trust_env=False,
            )  # fmt: skip
            choices = sorted(reply.json()["choices"], key=lambda choice: choice["index"])
            logits = [
                float(choice["prompt_logprobs"][-1][str(prompt[-1])]["logprob"])
                for choice, prompt in zip(choices, prompts, strict=True)
            ]
        except (httpx.HTTPError, ValueError, KeyError, TypeError, IndexError) as error:
            raise self._server.failure(f"the vLLM server does not tell its logits ({error!r})") from None
        return _centred(Probe(tuple(logits)), len(self._columns))


def _centred(probe: Probe, n_columns: int) -> Probe:
    """The probe with the mean of each row's logits taken off."""
    rows = [probe.logits[start : start + n_columns] for start in range(0, len(probe.logits), n_columns)]
    return Probe(tuple(value - sum(row) / len(row) for row in rows for value in row))


def _headers(server: Server) -> Mapping[str, str]:
    return {"authorization": f"Bearer {server.key}", "content-type": "application/json"}
