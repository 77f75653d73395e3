"""Builds judging requests and reads the replies to them: `JudgeRequest` for a paid judge, live and in batches.

Beside it stand what every request (`Request`) and whoever answers it (`Provider`) offer a desk, and the desk's list of
requests that are not finished.

Judged text is data. It appears only in the user turn, between fences that contain a nonce, and cannot close them: the
nonce is derived from the judgement's key, which is a sha256 over that very text, so no text can contain its own nonce.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fastconv.judge.rubric import Measure, Rubric
from fastconv.recipe import canonical_json, sha256_of
from fastconv.store.records import Judgement, RawReply

if TYPE_CHECKING:
    from fastconv.judge.batches import BatchApi
    from fastconv.judge.budget import Price
    from fastconv.judge.http import ApiKey
    from fastconv.recipe import JudgeSettings

#: Version of the rendered form, part of every key. Increase it when the form changes.
FORM = 1
#: Placeholder for the nonce. `neutralize` removes this character from judged text, so it occurs in the template only.
_NONCE_HOLE = "\x00"
#: Words that our fences and chat formats use.
_FENCE_WORDS = "question|answer|statement|request|system|rubric|instructions?|human|assistant|user|verdict|grades?"
#: Angle brackets of many scripts (full width, small, quotation, mathematical, ornamental, CJK).
_BRACKETS = "<\uff1c\ufe64\u2039\u00ab\u2329\u3008\u27e8\u276e\u276c\u27ea\u300a"
#: A bracket before such a word.
_FENCE_LIKE = re.compile(rf"[{_BRACKETS}]+(?=[\s/|\uff0f\uff3c\\]*(?:{_FENCE_WORDS})\b)", re.IGNORECASE)
#: A bracket that opens a control token of some tokenizer: a server's own is not known here.
_SPECIAL_TOKEN = re.compile(
    r"<(?=[|\uff5c][^|\uff5c<>\n]{1,40}[|\uff5c]>|/?(?:s|bos|eos|pad|unk|mask|(?:start|end)_of_turn|SYS)>)|\[(?=/?INST\])"
)


@dataclass(frozen=True)
class JudgeItem:
    """One text to judge: question, answer, and the index of the sample."""

    question: str
    answer: str
    sample: int


@dataclass(frozen=True)
class JudgeParams:
    """Parameters of a request, part of its key. An empty `thinking` or `effort` is left out of the request."""

    model: str
    max_reply_tok: int
    max_judged_chars: int
    thinking: str = ""
    effort: str = ""
    #: Show the labels (or the scale) in reverse order. Only calibration does, to measure position bias.
    reverse: bool = False

    def identity(self) -> dict[str, Any]:
        """The parameters as they enter the key."""
        return {
            "model": self.model, "max_reply_tok": self.max_reply_tok, "max_judged_chars": self.max_judged_chars,
            "thinking": self.thinking, "effort": self.effort, "form": FORM,
        }  # fmt: skip


@dataclass(frozen=True)
class JudgeRequest:
    """A request to a paid judge. `key` is the judgement's key; `body` is what Claude's SDK sends."""

    key: str
    rubric: Rubric
    params: JudgeParams
    sample: int
    rendered: str

    @cached_property
    def nonce(self) -> str:
        """16 hex digits, the same every time this request is sent."""
        return nonce_of(self.key)

    def user_text(self, *, re_ask: bool = False) -> str:
        """The user turn with the nonce filled in; `re_ask` adds the rubric's reminder after an unreadable reply."""
        text = fill_nonce(self.rendered, self.key)
        return f"{text}\n\n{self.rubric.re_ask}" if re_ask else text

    def body(self, *, re_ask: bool = False) -> dict[str, Any]:
        """Keyword arguments of `messages.create`, and `params` of a batch item.

        The rubric is marked for the API's prompt cache. The API caches nothing below a minimum length that depends on
        the model (512 to 4,096 tokens as of 2026); the shipped rubrics are shorter, so only a user's long rubric is
        cached. Options and question come after the judged text, so that our instructions come last.
        """
        output: dict[str, Any] = {"format": {"type": "json_schema", "schema": dict(self.rubric.schema)}}
        body: dict[str, Any] = {
            "model": self.params.model,
            "max_tokens": self.params.max_reply_tok,
            # The rubric is the same for thousands of requests and contains no judged text, so it can be cached.
            "system": [{"type": "text", "text": self.rubric.system, "cache_control": {"type": "ephemeral"}}],
            "messages": [{"role": "user", "content": self.user_text(re_ask=re_ask)}],
        }
        if self.params.effort:
            output["effort"] = self.params.effort
        if self.params.thinking:
            body["thinking"] = {"type": self.params.thinking}
        return {**body, "output_config": output}

    @cached_property
    def max_prompt_tok(self) -> int:
        """Upper bound of the prompt's tokens: one per byte, and 1,000 for the API's own framing."""
        return len(canonical_json(self.body(re_ask=True)).encode()) + 1000

    def read(self, reply: RawReply, before: Sequence[RawReply]) -> tuple[RawReply, Judgement | None]:
        """Read a reply by the rubric: the reply with its fault (if any), and the judgement, or None to ask once more.

        `before` are the earlier replies that could not be read. A malformed, truncated or out-of-range reply is asked
        for again once; a refusal by the judge is not.
        """
        parsed = self.rubric.read(reply.text, reply.stop_reason)
        reply = replace(reply, fault=parsed.reason)
        if parsed.reason is None:
            model, sha256 = reply.model, self.rubric.sha256
            return reply, Judgement(self.key, sha256, model, self.sample, parsed.values, parsed.answer)
        is_final = parsed.reason == "judge refused" or bool(before)
        return reply, self.unscored(parsed.reason) if is_final else None

    def unscored(self, reason: str) -> Judgement:
        """The finished judgement without values; `reason` is one of `rubric.REASONS`."""
        return Judgement(self.key, self.rubric.sha256, self.params.model, self.sample, None, {}, reason)


class Request(Protocol):
    """What a desk needs of a request."""

    @property
    def key(self) -> str:
        """The key of its judgement."""
        ...

    def read(self, reply: RawReply, before: Sequence[RawReply]) -> tuple[RawReply, Judgement | None]:
        """The reply with its fault (if any), and the judgement, or None to ask once more after the unread `before`."""
        ...


class Provider(Protocol):
    """What a desk needs of a judge: it sends and parses, and stores nothing."""

    @property
    def n_parallel(self) -> int:
        """Requests that may be under way at once."""
        ...

    @property
    def batches(self) -> BatchApi | None:
        """Its batches, or None if it takes none."""
        ...

    async def ask(self, request: Any, before: Sequence[RawReply]) -> RawReply:
        """Send a request once, after the unread replies `before`. Raises Outage; JudgeError if sending more makes no sense."""
        ...

    async def close(self) -> None:
        """Close connections and threads."""
        ...


class PaidProvider(Provider, Protocol):
    """A provider that bills: the variable of its key, its own address, and how it is made and tried."""

    key_name: ClassVar[str]
    url: ClassVar[str]

    def __init__(self, settings: JudgeSettings, price: Price, key: ApiKey, batch_factor: float) -> None: ...

    @staticmethod
    def check(settings: JudgeSettings, key: ApiKey, within_s: float) -> None:
        """Ask for what costs nothing. Raises JudgeError for a refused key or an unknown model, Outage."""
        ...


class OpenRequests:
    """The requests of a desk that are not finished, and the stages that wait for them."""

    def __init__(self) -> None:
        #: Requests that are not finished, by key.
        self.open: dict[str, Any] = {}
        self.n_scored = self.n_unscored = 0
        #: Grows with every stage that is finished.
        self.n_changes = 0
        self._asked: set[str] = set()
        # By stage, the keys it still waits for; by key, the stages that wait for it.
        self._waits: dict[str, set[str]] = {}
        self._wanted: dict[str, set[str]] = {}

    @property
    def n_asked(self) -> int:
        """Different keys that were ever added."""
        return len(self._asked)

    @property
    def n_stages(self) -> int:
        """Stages that were ever added."""
        return len(self._waits)

    def begin(self, stage: str) -> None:
        """Begin to add a stage's requests; it is not finished before `end`, whatever is judged already."""
        self._waits.setdefault(stage, set()).add("")

    def add(self, stage: str, request: Request) -> bool:
        """Add a request of a stage; True if its key is new."""
        is_new = request.key not in self._asked
        if is_new:
            self._asked.add(request.key)
            self.open[request.key] = request
        if request.key in self.open:
            self._waits[stage].add(request.key)
            self._wanted.setdefault(request.key, set()).add(stage)
        return is_new

    def end(self, stage: str) -> None:
        """All requests of a stage are added."""
        self._waits[stage].discard("")
        self.n_changes += not self._waits[stage]

    def finish(self, judgements: Iterable[Judgement]) -> None:
        """Mark judgements as finished; repeated calls change nothing."""
        for judgement in judgements:
            if self.open.pop(judgement.key, None) is not None:
                self.n_scored += judgement.reason is None
                self.n_unscored += judgement.reason is not None
                for stage in self._wanted.pop(judgement.key, ()):
                    self._waits[stage].discard(judgement.key)
                    self.n_changes += not self._waits[stage]

    def finished(self) -> frozenset[str]:
        """Stages that wait for nothing."""
        return frozenset(stage for stage, waits in self._waits.items() if not waits)


def build_request(rubric: Rubric, params: JudgeParams, item: JudgeItem) -> JudgeRequest:
    """Build the request that judges one item.

    Its key is the sha256 of model, parameters, rubric sha256, rendered text (with a placeholder for the nonce) and
    sample index, so ten samples are ten judgements, and a changed rubric leads to new judgements.
    """
    fenced = fence_item(item, params.max_judged_chars)
    rendered = "\n\n".join([fenced, _options_text(rubric, params.reverse), rubric.ask])
    key = sha256_of({
        "params": params.identity(),
        "rubric": rubric.sha256,
        "rendered": rendered,
        "sample": item.sample,
    })  # fmt: skip
    return JudgeRequest(key, rubric, params, item.sample, rendered)


def neutralize(text: str) -> str:
    """Change text so that it cannot leave its fence or hide from a reader.

    Control characters and lone surrogates become U+FFFD, invisible format characters (zero width, direction, tags) are
    removed, all line breaks become \\n, and a bracket before a word of our fences or of a chat format becomes a
    parenthesis.
    """
    text = re.sub("\r\n|[\r\u0085\u2028\u2029]", "\n", text)
    characters = []
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cf":
            continue
        characters.append("\ufffd" if kind == "Cs" or (kind == "Cc" and character not in "\n\t") else character)
    return _SPECIAL_TOKEN.sub("(", _FENCE_LIKE.sub("(", "".join(characters)))


def fence_item(item: JudgeItem, max_chars: int) -> str:
    """Question and answer between fences with a placeholder for the nonce; each is cut after `max_chars` characters."""
    return "\n\n".join(
        _fenced(name, text, max_chars) for name, text in (("question", item.question), ("answer", item.answer))
    )


def nonce_of(key: str) -> str:
    """16 hex digits derived from a judgement's key."""
    return hashlib.sha256(f"nonce\x1f{key}".encode()).hexdigest()[:16]


def fill_nonce(rendered: str, key: str) -> str:
    """Rendered text with the placeholders replaced by the key's nonce."""
    return rendered.replace(_NONCE_HOLE, nonce_of(key))


def _fenced(name: str, text: str, max_chars: int) -> str:
    """A fenced block of judged text. The notice of a cut is outside the fence, where judged text cannot forge it."""
    # Cut before neutralizing, which bounds the work.
    clean = neutralize(text[:max_chars])
    cut = len(text) - max_chars
    notice = f"\n(The {name} goes on for {cut} more characters, which are not shown.)" if cut > 0 else ""
    shown = clean if clean.strip() else "(empty)"
    return f"<{name}-{_NONCE_HOLE}>\n{shown}\n</{name}-{_NONCE_HOLE}>{notice}"


def _options_text(rubric: Rubric, reverse: bool) -> str:
    """The meaning of every measure's labels or grades, in the rubric's order or in reverse."""
    lines = []
    for measure in rubric.measures:
        options = measure.options[::-1] if reverse else measure.options
        if options:
            lines.append(_heading(measure))
            lines += [f"- {option.name}: {option.meaning}" for option in options]
    return "\n".join(lines)


def _heading(measure: Measure) -> str:
    return f"{measure.name}, one of:" if measure.scale is None else f"{measure.name}, for orientation:"
