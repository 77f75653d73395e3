"""Judges that cost nothing: an OpenAI-compatible server (`EndpointJudge`), or the resident base model (`ResidentJudge`).

A local judge answers with one character per measure. If the log-probabilities of that character are given, the value
is their expectation (G-Eval, Liu et al. 2023, section 2); otherwise the character itself counts. Such a judge is weak,
and its name says so in every judgement and report.

Each measure is a turn of its own: a request is finished when its replies hold one for every measure, or two that cannot
be read for one. What is asked next follows from the replies kept, so a judge that died goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import queue
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from fastconv.errors import JudgeError
from fastconv.judge.http import LOCAL_KEY, PATIENCE, ApiKey, Outage, ask, error_text, judge_url, sync_client
from fastconv.judge.request import JudgeItem, fence_item, fill_nonce
from fastconv.judge.rubric import Measure, Rubric
from fastconv.recipe import JudgeSettings, canonical_json, sha256_of
from fastconv.store.records import Judgement, RawReply

#: Version of the rendered form, part of every key. Increase it when the form changes.
LOCAL_FORM = 1
#: The characters a local judge chooses from: for labels, and for scales.
LETTERS, DIGITS = "ABCDEFGHIJ", "0123456789"
#: Prompts that the resident base reads together.
SLICE = 32
#: A reply with less probability than this on the allowed characters counts as unreadable.
MIN_MASS = 0.5
#: The fault of a raw reply about one measure of several: it is stored, but is not a judgement by itself.
PART = "one measure of several"
#: Seconds between two looks of the caller's thread whether it is still needed.
_LOOK_S = 0.01


@dataclass(frozen=True)
class LocalReply:
    """A local judge's reply: its text, and log-probabilities (nats) by token text at the first token of the answer."""

    text: str
    logprobs: Mapping[str, float] | None = None


#: (system text, user text, characters to choose from)
Prompt = tuple[str, str, str]
#: (system, user, allowed characters) -> reply. Raises Outage if the judge cannot be reached now.
Complete = Callable[[str, str, str], LocalReply]
#: The same for many prompts, with the replies in their order. The resident base gives log-probabilities for exactly the
#: allowed characters.
CompleteMany = Callable[[Sequence[Prompt]], Sequence[LocalReply]]


# --- requests ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalRequest:
    """A request to a local judge: one (characters, user text) turn per measure, under one judgement key."""

    key: str
    rubric: Rubric
    model: str
    sample: int
    turns: tuple[tuple[str, str], ...]

    def prompt(self, before: Sequence[RawReply]) -> Prompt:
        """The next prompt after the replies `before`; after an unreadable one, with a line about the form."""
        place, n_unread, _, _ = self._standing(before)
        characters, text = self.turns[min(place, len(self.turns) - 1)]
        line = f"\nReply with one of {', '.join(characters)} and nothing else." if n_unread else ""
        return self.rubric.system, fill_nonce(text, self.key) + line, characters

    def raw(self, reply: LocalReply, before: Sequence[RawReply]) -> RawReply:
        """The reply to `prompt(before)` as it is stored."""
        measure = self.rubric.measures[min(self._standing(before)[0], len(self.turns) - 1)]
        text = canonical_json({"measure": measure.name, "text": reply.text, "logprobs": reply.logprobs})
        return RawReply("local", self.model, text, "", {}, 0.0)

    def read(self, reply: RawReply, before: Sequence[RawReply]) -> tuple[RawReply, Judgement | None]:
        """Read a reply: the reply with its fault (if any), and the judgement, or None while there is more to ask.

        An unreadable reply is asked for once more; then the whole request is unscored.
        """
        place, n_unread, values, answer = self._standing([*before, reply])
        if n_unread:
            return replace(reply, fault="malformed"), self.unscored("malformed") if n_unread > 1 else None
        if place < len(self.turns):
            return replace(reply, fault=PART), None
        return reply, Judgement(self.key, self.rubric.sha256, self.model, self.sample, values, answer)

    def unscored(self, reason: str) -> Judgement:
        """The finished judgement without values; `reason` is one of `rubric.REASONS`."""
        return Judgement(self.key, self.rubric.sha256, self.model, self.sample, None, {}, reason)

    def _standing(self, replies: Sequence[RawReply]) -> tuple[int, int, dict[str, float], dict[str, Any]]:
        """Index of the measure that is asked next, its unreadable replies, and values and answer of those before it."""
        values: dict[str, float] = {}
        answer: dict[str, Any] = {}
        stored = [json.loads(reply.text) for reply in replies]
        for place, (measure, (characters, _)) in enumerate(zip(self.rubric.measures, self.turns, strict=True)):
            about = [LocalReply(one["text"], one["logprobs"]) for one in stored if one["measure"] == measure.name]
            shares = next((found for one in about if (found := read_choice(one, characters)) is not None), None)
            if shares is None:
                return place, len(about), values, answer
            values[measure.name], answer[measure.field] = _measure_value(measure, shares, characters)
        return len(self.turns), 0, values, answer


def build_local_request(
    rubric: Rubric, model: str, item: JudgeItem, max_chars: int, *, reverse: bool = False
) -> LocalRequest:
    """Build the local request for one item. `model` names the judge in key and judgements, e.g. `local:qwen`."""
    fenced = fence_item(item, max_chars)
    turns = tuple((_characters(m), f"{fenced}\n\n{_choice_text(m, reverse)}") for m in rubric.measures)
    key = sha256_of(
        {
            "local": LOCAL_FORM,
            "model": model,
            "rubric": rubric.sha256,
            "turns": [list(t) for t in turns],
            "sample": item.sample,
        }
    )
    return LocalRequest(key, rubric, model, item.sample, turns)


def _characters(measure: Measure) -> str:
    return DIGITS if measure.scale else LETTERS[: len(measure.options)]


def _choice_text(measure: Measure, reverse: bool) -> str:
    """The question about one measure: its options by letter, or a digit for a scale."""
    if measure.scale is None:
        lettered = list(zip(LETTERS, measure.options, strict=False))
        lines = [
            f"{letter}: {option.name} - {option.meaning}"
            for letter, option in (lettered[::-1] if reverse else lettered)
        ]
        question = f"Which of these is it ({measure.name})? Reply with one letter and nothing else."
    else:
        low, high = measure.scale
        anchors = [f"{round(9 * (o.value - low) / (high - low))}: {o.meaning}" for o in measure.options]
        lines = anchors[::-1] if reverse else anchors
        question = f"Grade the answer for {measure.name} from 0 to 9. Reply with one digit and nothing else."
    return "\n".join([*lines, question])


# --- replies -----------------------------------------------------------------------------------------------


def read_choice(reply: LocalReply, characters: str) -> dict[str, float] | None:
    """Probability of each allowed character (sum 1), or None if the reply is not in the requested form."""
    if reply.logprobs is not None:
        mass = dict.fromkeys(characters, 0.0)
        for token, logprob in reply.logprobs.items():
            if token.strip() in mass and token.strip():
                mass[token.strip()] += math.exp(min(0.0, logprob))
        total = sum(mass.values())
        return {name: share / total for name, share in mass.items()} if total >= MIN_MASS else None
    match = re.fullmatch(rf"\W*([{characters}])\W*", reply.text)
    return {name: float(name == match.group(1)) for name in characters} if match else None


# --- judges ------------------------------------------------------------------------------------------------


class EndpointJudge:
    """An OpenAI-compatible server as `judge.desk.Provider`. Each of `n_parallel` requests waits in a thread."""

    batches = None

    def __init__(self, complete: Complete, n_parallel: int) -> None:
        self.n_parallel = n_parallel
        self._complete = complete
        self._pool = ThreadPoolExecutor(n_parallel, thread_name_prefix="judge-endpoint")

    async def ask(self, request: LocalRequest, before: Sequence[RawReply]) -> RawReply:
        """Ask for the next measure of a request. Raises Outage, JudgeError."""
        loop = asyncio.get_running_loop()
        return request.raw(await loop.run_in_executor(self._pool, self._complete, *request.prompt(before)), before)

    async def close(self) -> None:
        """End the threads; those that wait for a reply do so first."""
        self._pool.shutdown(cancel_futures=True)


class ResidentJudge:
    """The resident base as `judge.desk.Provider`: it reads in the thread that calls `serve`, `SLICE` prompts together."""

    batches = None
    n_parallel = SLICE

    def __init__(self, complete: CompleteMany) -> None:
        self._complete = complete
        self._asked: list[tuple[Prompt, asyncio.Future[LocalReply]]] = []
        self._jobs: queue.SimpleQueue[list[tuple[Prompt, asyncio.Future[LocalReply]]]] = queue.SimpleQueue()

    async def ask(self, request: LocalRequest, before: Sequence[RawReply]) -> RawReply:
        """Ask for the next measure of a request. Raises JudgeError."""
        loop = asyncio.get_running_loop()
        if not self._asked:
            loop.call_soon(self._hand_over)  # everything that is asked in this turn of the loop is read together
        answer: asyncio.Future[LocalReply] = loop.create_future()
        self._asked.append((request.prompt(before), answer))
        return request.raw(await answer, before)

    async def close(self) -> None:
        """Nothing to close."""

    def serve(self, is_done: Callable[[], bool]) -> None:
        """Read what is asked, in the caller's thread, until `is_done`. Raises what ends a run (Interrupted, StoreError)."""
        while not is_done():
            try:
                asked = self._jobs.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            outcome: Sequence[LocalReply] | Exception
            try:
                outcome = self._complete([prompt for prompt, _ in asked])
            except (Outage, JudgeError) as error:
                outcome = error
            with contextlib.suppress(RuntimeError):  # the desk has ended meanwhile
                asked[0][1].get_loop().call_soon_threadsafe(_answer, [answer for _, answer in asked], outcome)

    def _hand_over(self) -> None:
        self._jobs.put(self._asked)
        self._asked = []


def _answer(asked: Sequence[asyncio.Future[LocalReply]], outcome: Sequence[LocalReply] | Exception) -> None:
    for place, answer in enumerate(asked):
        if answer.done():  # its task was cancelled
            continue
        if isinstance(outcome, Exception):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome[place])


def endpoint_complete(settings: JudgeSettings, key: ApiKey | None = None) -> Complete:
    """A `Complete` for an OpenAI-compatible server at `judge.base_url` (the `…/v1` of a vLLM or llama.cpp server).

    It raises Outage if the server cannot be reached now or sends what is no completion, JudgeError if it refuses the
    request. Raises JudgeError here for a host that gets no key.
    """
    base = judge_url(settings.base_url, has_key=key is not None)
    url = f"{str(base).rstrip('/')}/chat/completions"
    headers = {"content-type": "application/json"}
    if key is not None:
        headers["authorization"] = f"Bearer {key.reveal()}"
    client = sync_client(base, settings.timeout_s)

    def complete(system: str, user: str, characters: str) -> LocalReply:
        body = {
            "model": settings.model, "max_tokens": 4, "temperature": 0.0, "logprobs": True, "top_logprobs": 20,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        }  # fmt: skip
        within_s = PATIENCE * settings.timeout_s
        try:
            status, reply, wait_s = ask(client, "POST", url, headers, within_s=within_s, key=key, body=body)
        except Outage as outage:
            raise Outage(f"the local judge cannot be asked: {outage}", outage.wait_s, taken=False) from None
        if status in (408, 409, 429) or status >= 500 or 300 <= status < 400:
            raise Outage(f"the local judge cannot be asked: {url} answered {status}", wait_s, taken=False)
        if status >= 400:
            fix = f"check {LOCAL_KEY}" if status in (401, 403) else "check judge.model and judge.base_url"
            raise JudgeError(f"the local judge answered {status} {error_text(reply, key)}", where=url, fix=fix)
        read = _local_reply(reply)
        if read is None:
            raise Outage(f"the local judge cannot be asked: {url} sent something that is no completion", taken=False)
        return read

    return complete


def _local_reply(body: Any) -> LocalReply | None:
    """The reply of a chat completion's body (made safe), or None if it is none."""
    try:
        choice = body["choices"][0]
        text = choice["message"]["content"]
        tokens = (choice.get("logprobs") or {}).get("content") or []
        first = next((token for token in tokens if token["token"].strip()), None)
        logprobs = None
        if first is not None and first.get("top_logprobs"):
            given = {token["token"]: token.get("logprob") for token in first["top_logprobs"]}
            logprobs = {token: float(nats) for token, nats in given.items() if isinstance(nats, int | float)}
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    return LocalReply(text or "", logprobs) if text is None or isinstance(text, str) else None


def _measure_value(measure: Measure, shares: Mapping[str, float], characters: str) -> tuple[float, Any]:
    """The expectation over the characters' probabilities, and the label of the likeliest one or the rounded grade."""
    likeliest = max(shares, key=lambda name: shares[name])
    if measure.scale is None:
        values = {letter: option.value for letter, option in zip(LETTERS, measure.options, strict=False)}
        label = measure.options[characters.index(likeliest)].name
        return sum(share * values[name] for name, share in shares.items()), label
    low, high = measure.scale
    value = sum(share * (low + (high - low) * int(name) / 9) for name, share in shares.items())
    return value, round(value)
