"""Judges that cost nothing: an OpenAI-compatible server, or the resident base model.

A local judge answers with one character per measure. If the log-probabilities of that character are given, the value
is their expectation (G-Eval, Liu et al. 2023, section 2); otherwise the character itself counts. Such a judge is weak,
and its name says so in every judgement and report.

`LocalJudge` judges samples in the caller's thread; `LocalDesk` has the methods of `judge.desk.JudgeDesk` and may judge
in a thread of its own.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastconv.errors import JudgeError
from fastconv.judge.desk import DeskStatus
from fastconv.judge.http import LOCAL_KEY, PATIENCE, ApiKey, Outage, ask, error_text, judge_url, sync_client
from fastconv.judge.request import LETTERS, JudgeItem, LocalRequest, Prompt, build_local_request
from fastconv.judge.rubric import Measure, Rubric
from fastconv.recipe import JudgeSettings, canonical_json
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Sample, Store
from fastconv.store.records import Judgement, Operation, RawReply, Reserve, Settle

#: Samples that are judged and committed together.
SLICE = 32
#: A reply with less probability than this on the allowed characters counts as unreadable.
MIN_MASS = 0.5
#: The fault of a raw reply about one measure of several: it is stored, but is not a judgement by itself.
PART = "one measure of several"
#: Seconds that the desk waits in an outage before it tries again.
OUTAGE_PAUSE_S = 10.0


@dataclass(frozen=True)
class LocalReply:
    """A local judge's reply: its text, and log-probabilities (nats) by token text at the first token of the answer."""

    text: str
    logprobs: Mapping[str, float] | None = None


#: (system, user, allowed characters) -> reply. The resident base gives log-probabilities for exactly these characters.
#: Raises Outage if the judge cannot be reached now.
Complete = Callable[[str, str, str], LocalReply]
#: The same for many prompts, with the replies in their order.
CompleteMany = Callable[[Sequence[Prompt]], Sequence[LocalReply]]


def concurrent_complete(complete: Complete, n_threads: int = 1) -> CompleteMany:
    """A `CompleteMany` that calls `complete` in up to `n_threads` threads at the same time."""

    def complete_many(prompts: Sequence[Prompt]) -> Sequence[LocalReply]:
        if n_threads == 1:
            return [complete(*prompt) for prompt in prompts]
        with ThreadPoolExecutor(n_threads) as pool:
            return list(pool.map(lambda prompt: complete(*prompt), prompts))

    return complete_many


@dataclass
class _ItemReplies:
    """Values, answer and raw replies for one sample so far. `unread`: a measure stayed unreadable."""

    values: dict[str, float] = field(default_factory=dict)
    answer: dict[str, Any] = field(default_factory=dict)
    replies: list[RawReply] = field(default_factory=list)
    unread: bool = False


class LocalJudge:
    """Judges samples through a `CompleteMany` in the caller's thread, and stores judgements and replies in the ledger."""

    def __init__(
        self,
        ledger: JudgeLedger,
        complete: CompleteMany,
        model: str,
        *,
        max_judged_chars: int = 12_000,
        reverse: bool = False,
    ) -> None:
        self._ledger = ledger
        self._complete = complete
        self._model = model
        self._max_chars = max_judged_chars
        self._reverse = reverse

    def requests(self, rubric: Rubric, samples: Sequence[Sample]) -> list[LocalRequest]:
        """One request per sample, in their order."""
        return [
            build_local_request(rubric, self._model, JudgeItem(s.prompt, s.completion, s.sample), self._max_chars,
                                reverse=self._reverse)
            for s in samples
        ]  # fmt: skip

    def judge(self, rubric: Rubric, samples: Sequence[Sample]) -> dict[str, Judgement]:
        """Judge samples and return the judgements by key. Every `SLICE` samples are committed together.

        Raises Outage if the judge cannot be reached now, JudgeError if asking more makes no sense; what was committed
        until then stays.
        """
        self._ledger.save_rubric(rubric.sha256, rubric.name, rubric.source)
        requests = {request.key: request for request in self.requests(rubric, samples)}
        done = self._ledger.judgements(requests)
        todo = [request for key, request in requests.items() if key not in done]
        # Slices bound the memory, and what is lost when one of them fails.
        for start in range(0, len(todo), SLICE):
            part = todo[start : start + SLICE]
            items = self._ask_measures(part)
            judgements = [_judgement(request, item) for request, item in zip(part, items, strict=True)]
            self._store_slice(judgements, items)
            done |= {judgement.key: judgement for judgement in judgements}
        return done

    def _ask_measures(self, part: Sequence[LocalRequest]) -> list[_ItemReplies]:
        """Ask for every measure of every request; an unreadable reply is requested once more, then given up."""
        items = [_ItemReplies() for _ in part]
        for measure in range(len(part[0].turns)):
            open_items = [i for i, item in enumerate(items) if not item.unread]
            for reminder in (False, True):
                if not open_items:
                    break
                replies = self._complete([part[i].prompt(measure, reminder=reminder) for i in open_items])
                open_items = [
                    i
                    for i, reply in zip(open_items, replies, strict=True)
                    if not _read_into(items[i], part[i], measure, reply)
                ]
            for i in open_items:
                items[i].unread = True
        return items

    def _store_slice(self, judgements: Sequence[Judgement], items: Sequence[_ItemReplies]) -> None:
        """Commit the replies of a slice, the last reply of each sample together with its judgement."""
        for place in range(max(len(item.replies) for item in items)):
            batch = [
                (judgement, item.replies[place], place == len(item.replies) - 1)
                for judgement, item in zip(judgements, items, strict=True)
                if place < len(item.replies)
            ]
            tickets = self._ledger.apply([Reserve(judgement.key, 0.0) for judgement, _, _ in batch])
            # A reply about one measure of several gets a fault; without one it would count as not read yet.
            settlements: list[Operation] = [
                Settle(ticket, judgement.key, reply, judgement)
                if is_last
                else Settle(ticket, judgement.key, replace(reply, fault=reply.fault or PART), None)
                for ticket, (judgement, reply, is_last) in zip(tickets, batch, strict=True)
                if isinstance(ticket, int)  # otherwise another process has judged it already
            ]
            self._ledger.apply(settlements)


def _read_into(item: _ItemReplies, request: LocalRequest, place: int, reply: LocalReply) -> bool:
    """Add a reply about one measure to `item`; False if it cannot be read."""
    measure, characters = request.rubric.measures[place], request.turns[place][0]
    shares = read_choice(reply, characters)
    text = canonical_json({"measure": measure.name, "text": reply.text, "logprobs": reply.logprobs})
    fault = "malformed" if shares is None else None
    item.replies.append(RawReply("local", request.model, text, "", {}, 0.0, fault=fault))
    if shares is None:
        return False
    item.values[measure.name], item.answer[measure.field] = _measure_value(measure, shares, characters)
    return True


def _judgement(request: LocalRequest, item: _ItemReplies) -> Judgement:
    if item.unread:
        return Judgement(request.key, request.rubric.sha256, request.model, request.sample, None, {}, "malformed")
    return Judgement(request.key, request.rubric.sha256, request.model, request.sample, item.values, item.answer)


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
            raise Outage(f"the local judge cannot be asked: {outage}", outage.wait_s) from None
        if status in (408, 409, 429) or status >= 500 or 300 <= status < 400:
            raise Outage(f"the local judge cannot be asked: {url} answered {status}", wait_s)
        if status >= 400:
            fix = f"check {LOCAL_KEY}" if status in (401, 403) else "check judge.model and judge.base_url"
            raise JudgeError(f"the local judge answered {status} {error_text(reply, key)}", where=url, fix=fix)
        read = _local_reply(reply)
        if read is None:
            raise Outage(f"the local judge cannot be asked: {url} sent something that is no completion")
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


class LocalDesk:
    """Judges completions through a `CompleteMany`, with the same methods as `JudgeDesk`.

    With `beside` a thread judges and `submit` returns at once. Without, `submit` itself judges, because the resident
    base belongs to the caller's thread. What cannot be judged stays pending, and the next desk can judge it.
    """

    def __init__(
        self, workspace: Path, complete: CompleteMany, model: str, *, max_judged_chars: int, beside: bool
    ) -> None:
        self._workspace = workspace
        self._complete = complete
        self._model = model
        self._max_chars = max_judged_chars
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge") if beside else None
        self._futures: list[Future[None]] = []
        self._store: Store | None = None
        self._judge: LocalJudge | None = None
        self._n_asked = self._n_scored = self._n_unscored = self._n_stages = self._n_outages = 0
        self._finished: set[str] = set()
        self._problem = ""
        self._closing, self._changed = threading.Event(), threading.Event()
        self._stopped = False

    def submit(self, stage: str, rubric: Rubric, samples: Sequence[Sample], *, urgent: bool = False) -> None:
        """Judge a stage's completions after those submitted before; `urgent` makes no difference.

        Without a thread, raises StoreError and what the `CompleteMany` raises to stop a run.
        """
        self._n_asked += len(samples)
        self._n_stages += 1
        if self._pool is None:
            self._judge_stage(stage, rubric, samples)
        else:
            future = self._pool.submit(self._judge_stage, stage, rubric, tuple(samples))
            future.add_done_callback(lambda _: self._changed.set())
            self._futures.append(future)

    def poll(self) -> DeskStatus:
        """The status of judging. Raises the exception that ended the desk's thread, if any (StoreError)."""
        for future in self._futures:
            if future.done():
                future.result()
        return DeskStatus(
            self._n_asked, self._n_scored, self._n_unscored, self._n_stages, frozenset(self._finished.copy()),
            problem=self._problem, out=self._n_outages > 0, stopped=self._stopped,
        )  # fmt: skip

    def wait(self, timeout_s: float) -> None:
        """Block until the status may have changed since the last call, at most `timeout_s` seconds."""
        self._changed.wait(timeout_s)
        self._changed.clear()

    def close(self, *, wait: bool = True) -> DeskStatus:
        """End the desk and return its last status; without `wait`, it ends after the current slice."""
        self._closing.set()
        self._stopped = self._stopped or not wait
        if self._pool is None:
            self._close_store()
        else:
            self._futures.append(self._pool.submit(self._close_store))
            self._pool.shutdown()
        return self.poll()

    def _judge_stage(self, stage: str, rubric: Rubric, samples: Sequence[Sample]) -> None:
        for start in range(0, len(samples), SLICE):
            if not self._judge_slice(rubric, samples[start : start + SLICE]):
                return
        self._finished.add(stage)

    def _judge_slice(self, rubric: Rubric, samples: Sequence[Sample]) -> bool:
        """Judge a few samples, and try again after outages; False if the desk ends before they are judged."""
        while not self._stopped:
            try:
                judgements = self._open_judge().judge(rubric, samples)
            except Outage as outage:
                self._problem = str(outage)
                self._n_outages += 1
                self._changed.set()
                self._stopped = self._closing.wait(max(outage.wait_s, OUTAGE_PAUSE_S)) or self._stopped
                continue
            except JudgeError as error:
                self._problem, self._stopped = str(error), True
                return False
            n_unscored = sum(judgement.values is None for judgement in judgements.values())
            self._n_unscored += n_unscored
            self._n_scored += len(samples) - n_unscored
            self._problem, self._n_outages = "", 0
            self._changed.set()
            return True
        return False

    def _open_judge(self) -> LocalJudge:
        """The judge, with a ledger connection of the thread that judges."""
        if self._judge is None:
            self._store = Store.open(self._workspace)
            self._judge = LocalJudge(
                JudgeLedger(self._store), self._complete, self._model, max_judged_chars=self._max_chars
            )
        return self._judge

    def _close_store(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = self._judge = None
