"""A judge without a bill: any OpenAI-compatible server, or a `complete` function such as the resident base's.

A local judge answers with one character per measure. Where the log-probabilities of that character are given, the
value is their expectation (finer than the likeliest one, after G-Eval, Liu et al. 2023, section 2); otherwise the
character itself counts. Such a judge is weak, and its name says so in every judgement and report.
"""

from __future__ import annotations

import json
import math
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastconv.errors import JudgeError
from fastconv.judgements import Judgement, Operation, RawReply, Reserve, Settle
from fastconv.judging.client import LOCAL_KEY, ApiKey
from fastconv.judging.request import JudgeItem, fenced_item, with_nonce
from fastconv.judging.rubric import Measure, Rubric
from fastconv.recipe import JudgeSettings, canonical_json, sha256_of
from fastconv.store import Sample
from fastconv.store_judging import JudgeLedger

#: Raised when the wording or the reading of a local request changes.
FORM = 1
#: Below this share of the probability on the allowed characters, the judge did not answer in the form asked for.
MIN_MASS = 0.5
LETTERS, DIGITS = "ABCDEFGHIJ", "0123456789"


@dataclass(frozen=True)
class LocalReply:
    """What a local judge said: its text, and the log-probabilities by token text at the answer's first token."""

    text: str
    logprobs: Mapping[str, float] | None = None


#: (system, user, the characters to choose from) -> reply. The resident base's may give log-probabilities for exactly
#: these characters. Raises OSError if it cannot be asked.
Complete = Callable[[str, str, str], LocalReply]


@dataclass(frozen=True)
class LocalAsk:
    """Everything asked about one item: one user turn for each measure, under one judgement's key."""

    key: str
    rubric: Rubric
    model: str
    sample: int
    turns: tuple[tuple[str, str], ...]  # (characters, user text)

    def user_text(self, place: int) -> str:
        """The user turn of a measure, fenced by the nonce."""
        return with_nonce(self.turns[place][1], self.key)


def build_local(rubric: Rubric, model: str, item: JudgeItem, max_chars: int, *, reverse: bool = False) -> LocalAsk:
    """The local form of a judgement. `model` names the judge in the key and in every judgement, e.g. `local:qwen`."""
    fenced = fenced_item(item, max_chars)
    turns = tuple((_characters(m), f"{fenced}\n\n{_choice_text(m, reverse)}") for m in rubric.measures)
    key = sha256_of(
        {
            "local": FORM,
            "model": model,
            "rubric": rubric.sha256,
            "turns": [list(t) for t in turns],
            "sample": item.sample,
        }
    )
    return LocalAsk(key, rubric, model, item.sample, turns)


class LocalJudge:
    """Judges through a `complete` function, in the caller's thread (`n_threads` asks at once beside it)."""

    def __init__(
        self, ledger: JudgeLedger, complete: Complete, model: str, *, max_judged_chars: int = 12_000, n_threads: int = 1,
        reverse: bool = False,
    ) -> None:  # fmt: skip
        self._ledger = ledger
        self._complete = complete
        self._model = model
        self._max_chars = max_judged_chars
        self._n_threads = n_threads
        self._reverse = reverse

    def asks(self, rubric: Rubric, samples: Sequence[Sample]) -> list[LocalAsk]:
        """What is asked about these samples; `key` of each names its judgement."""
        return [
            build_local(rubric, self._model, JudgeItem(s.prompt, s.completion, s.sample), self._max_chars,
                        reverse=self._reverse)
            for s in samples
        ]  # fmt: skip

    def judge(self, rubric: Rubric, samples: Sequence[Sample]) -> dict[str, Judgement]:
        """Judge samples; gives the judgements by key. Each is in the ledger as soon as it is made.

        Raises JudgeError when the judge cannot be asked; what was judged until then stays.
        """
        self._ledger.remember_rubric(rubric.sha256, rubric.name, rubric.source)
        asks = {ask.key: ask for ask in self.asks(rubric, samples)}
        done = self._ledger.judgements(asks)
        todo = [ask for key, ask in asks.items() if key not in done]
        # Slices bound what waits in memory and what an error in one of them throws away.
        with ThreadPoolExecutor(self._n_threads) as pool:
            for start in range(0, len(todo), 4 * self._n_threads):
                part = todo[start : start + 4 * self._n_threads]
                try:
                    answered = list(pool.map(self._ask, part)) if self._n_threads > 1 else [self._ask(a) for a in part]
                except OSError as error:
                    raise JudgeError(
                        f"the local judge cannot be asked: {error}", where=self._model, fix="check judge.base_url"
                    ) from None
                for ask, (replies, judgement) in zip(part, answered, strict=True):
                    self._keep(ask, replies, judgement)
                    done[ask.key] = judgement
        return done

    def _ask(self, ask: LocalAsk) -> tuple[list[RawReply], Judgement]:
        """Every measure of one item; a measure whose answer cannot be read is asked once more."""
        values: dict[str, float] = {}
        answer: dict[str, Any] = {}
        replies: list[RawReply] = []
        for place, measure in enumerate(ask.rubric.measures):
            characters = ask.turns[place][0]
            for reminder in ("", f"\nReply with one of {', '.join(characters)} and nothing else."):
                said = self._complete(ask.rubric.system, ask.user_text(place) + reminder, characters)
                read = read_choice(said, characters)
                text = canonical_json({"measure": measure.name, "text": said.text, "logprobs": said.logprobs})
                fault = None if read is not None else "malformed"
                replies.append(RawReply("local", ask.model, text, "", {}, 0.0, fault=fault))
                if read is not None:
                    break
            else:
                return replies, Judgement(ask.key, ask.rubric.sha256, ask.model, ask.sample, None, {}, "malformed")
            assert read is not None, "the loop ends early only with a reading"
            values[measure.name], answer[measure.field] = _valued(measure, read, characters)
        return replies, Judgement(ask.key, ask.rubric.sha256, ask.model, ask.sample, values, answer)

    def _keep(self, ask: LocalAsk, replies: Sequence[RawReply], judgement: Judgement) -> None:
        for place, reply in enumerate(replies):
            ticket = self._ledger.apply([Reserve(ask.key, 0.0)])[0]
            if not isinstance(ticket, int):
                return  # another process was quicker
            last = place == len(replies) - 1
            end: Operation = Settle(ticket, ask.key, reply, judgement if last else None)
            self._ledger.apply([end])


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
                return _local_reply(json.loads(response.read()))
        except urllib.error.HTTPError as error:
            fix = f"check {LOCAL_KEY}" if error.code in (401, 403) else "check judge.model and judge.base_url"
            raise JudgeError(f"the local judge answered {error.code}", where=url, fix=fix) from None
        except ValueError:
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


def _characters(measure: Measure) -> str:
    return DIGITS if measure.scale else LETTERS[: len(measure.options)]


def _choice_text(measure: Measure, reverse: bool) -> str:
    """The question of one measure: its options by letter, or a digit for a scale."""
    if measure.scale is None:
        named = list(zip(LETTERS, measure.options, strict=False))
        lines = [
            f"{letter}: {option.name} - {option.meaning}" for letter, option in (named[::-1] if reverse else named)
        ]
        asked = f"Which of these is it ({measure.name})? Reply with one letter and nothing else."
    else:
        low, high = measure.scale
        anchors = [f"{round(9 * (o.value - low) / (high - low))}: {o.meaning}" for o in measure.options]
        lines = anchors[::-1] if reverse else anchors
        asked = f"Grade the answer for {measure.name} from 0 to 9. Reply with one digit and nothing else."
    return "\n".join([*lines, asked])


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
