"""A judge without a bill: any OpenAI-compatible server, or a `complete` function such as the resident base's.

A local judge answers with one character per measure. Where the log-probabilities of that character are given, the
value is their expectation (finer than the likeliest one, after G-Eval, Liu et al. 2023, section 2); otherwise the
character itself counts. Such a judge is weak, and its name says so in every judgement and report.
"""

from __future__ import annotations

import http.client
import json
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastconv.errors import JudgeError
from fastconv.judge.claude import LOCAL_KEY, ApiKey, Outage
from fastconv.judge.desk import DeskStatus
from fastconv.judge.request import LETTERS, JudgeItem, LocalAsk, Prompt, build_local
from fastconv.judge.rubric import Measure, Rubric
from fastconv.recipe import JudgeSettings, canonical_json
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Sample, Store
from fastconv.store.records import Judgement, Operation, RawReply, Reserve, Settle

#: Items asked and written down together.
SLICE = 32
#: Below this share of the probability on the allowed characters, the judge did not answer in the form asked for.
MIN_MASS = 0.5
#: The fault of a raw reply about one measure of several: it is kept, and no judgement can be read from it alone.
PART = "one measure of several"


@dataclass(frozen=True)
class LocalReply:
    """What a local judge said: its text, and the log-probabilities by token text at the answer's first token."""

    text: str
    logprobs: Mapping[str, float] | None = None


#: (system, user, the characters to choose from) -> reply. The resident base's may give log-probabilities for exactly
#: these characters. Raises OSError if it cannot be asked.
Complete = Callable[[str, str, str], LocalReply]
#: The same for many prompts at once, replies in their order.
Ask = Callable[[Sequence[Prompt]], Sequence[LocalReply]]


def at_once(complete: Complete, n_threads: int = 1) -> Ask:
    """An `Ask` that puts up to `n_threads` prompts to `complete` at the same time."""

    def ask(prompts: Sequence[Prompt]) -> Sequence[LocalReply]:
        if n_threads == 1:
            return [complete(*prompt) for prompt in prompts]
        with ThreadPoolExecutor(n_threads) as pool:
            return list(pool.map(lambda prompt: complete(*prompt), prompts))

    return ask


@dataclass
class _Answers:
    """What one item has been answered so far."""

    values: dict[str, float] = field(default_factory=dict)
    answer: dict[str, Any] = field(default_factory=dict)
    replies: list[RawReply] = field(default_factory=list)
    unread: bool = False


class LocalJudge:
    """Judges through an `Ask`, in the caller's thread."""

    def __init__(
        self, ledger: JudgeLedger, ask: Ask, model: str, *, max_judged_chars: int = 12_000, reverse: bool = False
    ) -> None:
        self._ledger = ledger
        self._ask = ask
        self._model = model
        self._max_chars = max_judged_chars
        self._reverse = reverse

    def asks(self, rubric: Rubric, samples: Sequence[Sample]) -> list[LocalAsk]:
        """What is asked about these samples; `key` of each names its judgement."""
        return [
            build_local(rubric, self._model, JudgeItem(s.prompt, s.completion, s.sample), self._max_chars,
                        reverse=self._reverse)
            for s in samples
        ]  # fmt: skip

    def judge(self, rubric: Rubric, samples: Sequence[Sample]) -> dict[str, Judgement]:
        """Judge samples; gives the judgements by key. Each slice of them is in the ledger as soon as it is made.

        Raises Outage when the judge cannot be reached now, JudgeError when asking on makes no sense; what was judged
        until then stays.
        """
        self._ledger.save_rubric(rubric.sha256, rubric.name, rubric.source)
        asks = {ask.key: ask for ask in self.asks(rubric, samples)}
        done = self._ledger.judgements(asks)
        todo = [ask for key, ask in asks.items() if key not in done]
        # Slices bound what waits in memory and what an error in one of them throws away.
        for start in range(0, len(todo), SLICE):
            part = todo[start : start + SLICE]
            try:
                answers = self._answer(part)
            except OSError as error:
                raise Outage(f"the local judge cannot be asked: {error}") from None
            judged = [_judgement(ask, found) for ask, found in zip(part, answers, strict=True)]
            self._keep(judged, answers)
            done |= {one.key: one for one in judged}
        return done

    def _answer(self, part: Sequence[LocalAsk]) -> list[_Answers]:
        """Every measure of every item; a measure whose answer cannot be read is asked once more, then given up."""
        found = [_Answers() for _ in part]
        for place in range(len(part[0].turns)):
            open_items = [i for i, one in enumerate(found) if not one.unread]
            for reminder in (False, True):
                if not open_items:
                    break
                said = self._ask([part[i].prompt(place, reminder=reminder) for i in open_items])
                open_items = [
                    i for i, reply in zip(open_items, said, strict=True) if not _taken(part[i], place, reply, found[i])
                ]
            for i in open_items:
                found[i].unread = True
        return found

    def _keep(self, judged: Sequence[Judgement], answers: Sequence[_Answers]) -> None:
        """Write a slice's replies down, the last of each with its judgement."""
        for place in range(max(len(one.replies) for one in answers)):
            now = [
                (one, all_of.replies[place], place == len(all_of.replies) - 1)
                for one, all_of in zip(judged, answers, strict=True)
                if place < len(all_of.replies)
            ]
            tickets = self._ledger.apply([Reserve(one.key, 0.0) for one, _, _ in now])
            # A reply about one measure of several is no judgement yet; without a fault it would pass for an unread one.
            ends: list[Operation] = [
                Settle(
                    ticket, one.key, reply if last else replace(reply, fault=reply.fault or PART), one if last else None
                )
                for ticket, (one, reply, last) in zip(tickets, now, strict=True)
                if isinstance(ticket, int)  # else another process was quicker
            ]
            self._ledger.apply(ends)


def _taken(ask: LocalAsk, place: int, said: LocalReply, into: _Answers) -> bool:
    """Enter one reply about one measure; False if it cannot be read."""
    measure, characters = ask.rubric.measures[place], ask.turns[place][0]
    read = read_choice(said, characters)
    text = canonical_json({"measure": measure.name, "text": said.text, "logprobs": said.logprobs})
    into.replies.append(RawReply("local", ask.model, text, "", {}, 0.0, fault="malformed" if read is None else None))
    if read is None:
        return False
    into.values[measure.name], into.answer[measure.field] = _valued(measure, read, characters)
    return True


def _judgement(ask: LocalAsk, found: _Answers) -> Judgement:
    if found.unread:
        return Judgement(ask.key, ask.rubric.sha256, ask.model, ask.sample, None, {}, "malformed")
    return Judgement(ask.key, ask.rubric.sha256, ask.model, ask.sample, found.values, found.answer)


def read_choice(reply: LocalReply, characters: str) -> dict[str, float] | None:
    """Probability of each allowed character (they sum to 1), or None if the reply is not in the form asked for."""
    if reply.logprobs is not None:
        mass = dict.fromkeys(characters, 0.0)
        for token, logprob in reply.logprobs.items():
            if token.strip() in mass and token.strip():
                mass[token.strip()] += math.exp(min(0.0, logprob))
        total = sum(mass.values())
        return {name: share / total for name, share in mass.items()} if total >= MIN_MASS else None
    found = re.fullmatch(rf"\W*([{characters}])\W*", reply.text)
    return {name: float(name == found.group(1)) for name in characters} if found else None


def endpoint_complete(settings: JudgeSettings, key: ApiKey | None = None) -> Complete:
    """A `complete` over an OpenAI-compatible server at `judge.base_url` (a vLLM or llama.cpp server's `…/v1`)."""
    url = f"{settings.base_url.rstrip('/')}/chat/completions"
    headers = {"content-type": "application/json"}
    if key is not None:
        headers["authorization"] = f"Bearer {key.reveal()}"

    def complete(system: str, user: str, characters: str) -> LocalReply:
        body = {
            "model": settings.model, "max_tokens": 4, "temperature": 0.0, "logprobs": True, "top_logprobs": 20,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        }  # fmt: skip
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=settings.timeout_s) as response:
                body = json.loads(response.read())
                return _local_reply(body if key is None else key.cleaned(body))
        except urllib.error.HTTPError as error:
            if error.code == 429 or error.code >= 500:
                raise OSError(f"{url} answered {error.code}") from None
            fix = f"check {LOCAL_KEY}" if error.code in (401, 403) else "check judge.model and judge.base_url"
            raise JudgeError(f"the local judge answered {error.code}", where=url, fix=fix) from None
        except http.client.HTTPException:
            raise OSError(f"{url} sent something that is no answer") from None
        except (ValueError, RecursionError):
            raise JudgeError("the local judge sent no JSON", where=url, fix="check judge.base_url") from None

    return complete


def _local_reply(body: Any) -> LocalReply:
    try:
        choice = body["choices"][0]
        text = str(choice["message"]["content"] or "")
        tokens = (choice.get("logprobs") or {}).get("content") or []
        spoken = next((token for token in tokens if token["token"].strip()), None)
        logprobs = None
        if spoken is not None and spoken.get("top_logprobs"):
            logprobs = {one["token"]: float(one["logprob"]) for one in spoken["top_logprobs"]}
    except (KeyError, IndexError, TypeError, AttributeError):
        return LocalReply("")
    return LocalReply(text, logprobs)


def _valued(measure: Measure, shares: Mapping[str, float], characters: str) -> tuple[float, Any]:
    """The expectation over the characters, and the likeliest one's label or grade."""
    likeliest = max(shares, key=lambda name: shares[name])
    if measure.scale is None:
        values = {letter: option.value for letter, option in zip(LETTERS, measure.options, strict=False)}
        label = measure.options[characters.index(likeliest)].name
        return sum(share * values[name] for name, share in shares.items()), label
    low, high = measure.scale
    value = sum(share * (low + (high - low) * int(name) / 9) for name, share in shares.items())
    return value, round(value)


#: How long the desk rests in an outage before it tries again, and how often it looks whether it is to end.
OUTAGE_PAUSE_S, _LOOK_S = 10.0, 0.05


class LocalDesk:
    """Judges completions through an `Ask`; the same few verbs as `JudgeDesk`.

    With `beside` a thread asks and `submit` returns at once. Without, `submit` itself judges: the resident base belongs
    to the caller's thread. What cannot be judged stays pending and is found again by the next desk.
    """

    def __init__(self, workspace: Path, ask: Ask, model: str, *, max_judged_chars: int, beside: bool) -> None:
        self._workspace = workspace
        self._ask = ask
        self._model = model
        self._max_chars = max_judged_chars
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge") if beside else None
        self._futures: list[Future[None]] = []
        self._store: Store | None = None
        self._judge: LocalJudge | None = None
        self._n_asked = self._n_scored = self._n_unscored = self._n_stages = self._n_outages = 0
        self._finished: set[str] = set()
        self._problem = ""
        self._closing = self._stopped = False

    def submit(self, stage: str, rubric: Rubric, samples: Sequence[Sample], *, urgent: bool = False) -> None:
        """Hand a stage's completions over (urgent or not: they are taken in turn).

        Without a thread beside, raises what the `Ask` raises to stop a run, and StoreError.
        """
        self._n_asked += len(samples)
        self._n_stages += 1
        if self._pool is None:
            self._take(stage, rubric, samples)
        else:
            self._futures.append(self._pool.submit(self._take, stage, rubric, tuple(samples)))

    def poll(self) -> DeskStatus:
        """How far judging is. Raises what ended the desk, if it broke (StoreError)."""
        for future in self._futures:
            if future.done():
                future.result()
        return DeskStatus(
            self._n_asked, self._n_scored, self._n_unscored, self._n_stages, frozenset(self._finished.copy()),
            problem=self._problem, out=self._n_outages > 0, stopped=self._stopped,
        )  # fmt: skip

    def close(self, *, wait: bool = True) -> DeskStatus:
        """End the desk and give its last status; without `wait`, at the end of the slice that is being asked."""
        self._closing = True
        self._stopped = self._stopped or not wait
        if self._pool is None:
            self._end()
        else:
            self._futures.append(self._pool.submit(self._end))
            self._pool.shutdown()
        return self.poll()

    def _take(self, stage: str, rubric: Rubric, samples: Sequence[Sample]) -> None:
        for start in range(0, len(samples), SLICE):
            if not self._slice(rubric, samples[start : start + SLICE]):
                return
        self._finished.add(stage)

    def _slice(self, rubric: Rubric, samples: Sequence[Sample]) -> bool:
        """Judge a few samples, through outages; False when the desk is to end before that."""
        while not self._stopped:
            try:
                found = self._opened().judge(rubric, samples)
            except Outage as outage:
                self._problem = str(outage)
                self._n_outages += 1
                self._rest()
                continue
            except JudgeError as error:
                self._problem, self._stopped = str(error), True
                return False
            n_unscored = sum(one.values is None for one in found.values())
            self._n_unscored += n_unscored
            self._n_scored += len(samples) - n_unscored
            self._problem, self._n_outages = "", 0
            return True
        return False

    def _rest(self) -> None:
        """Wait in an outage; a desk that is being closed gives up."""
        until = time.monotonic() + OUTAGE_PAUSE_S
        while time.monotonic() < until and not self._closing:
            time.sleep(_LOOK_S)
        self._stopped = self._stopped or self._closing

    def _opened(self) -> LocalJudge:
        """The judge on a ledger connection of the thread that works."""
        if self._judge is None:
            self._store = Store.open(self._workspace)
            self._judge = LocalJudge(JudgeLedger(self._store), self._ask, self._model, max_judged_chars=self._max_chars)
        return self._judge

    def _end(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = self._judge = None
