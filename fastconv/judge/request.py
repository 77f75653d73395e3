"""The one request builder: both transports and the local judge ask exactly what is built here.

Judged text is data. It stands in the user turn only, between fences that carry a nonce, and cannot close them: the
nonce is drawn from the judgement's key, which is a sha256 over that very text, so no text can hold its own nonce.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastconv.judge.rubric import Measure, Rubric
from fastconv.recipe import canonical_json, sha256_of

#: Raised when the rendered form changes, so that judgements of two forms are never taken for one another.
FORM = 1
_NONCE_HOLE = "\x00"  # neutralising removes it from judged text, so it stands in the template alone
_FENCE_WORDS = "question|answer|statement|request|system|rubric|instructions?|human|assistant|user|verdict|grades?"
#: Angle brackets of many scripts (full width, small, quotation, mathematical, ornamental, CJK).
_BRACKETS = "<\uff1c\ufe64\u2039\u00ab\u2329\u3008\u27e8\u276e\u276c\u27ea\u300a"
#: A bracket before a word that our fences or chat formats use.
_FENCE_LIKE = re.compile(rf"[{_BRACKETS}]+(?=[\s/|\uff0f\uff3c\\]*(?:{_FENCE_WORDS})\b)", re.IGNORECASE)
_SPECIAL_TOKEN = re.compile(r"<\|(?=[^|<>\n]{1,40}\|>)")


@dataclass(frozen=True)
class JudgeItem:
    """One text to be judged: what was asked, what was answered, and which of the samples it is."""

    question: str
    answer: str
    sample: int


@dataclass(frozen=True)
class JudgeParams:
    """What a request is sent with. All of it is part of the key. `thinking` and `effort` are "" where left out."""

    model: str
    max_reply_tok: int
    max_judged_chars: int
    thinking: str = ""
    effort: str = ""
    #: Shows the labels (or the scale) in the other order; only calibration does, to measure position bias.
    reverse: bool = False

    def identity(self) -> dict[str, Any]:
        """The parameters as the key sees them."""
        return {
            "model": self.model, "max_reply_tok": self.max_reply_tok, "max_judged_chars": self.max_judged_chars,
            "thinking": self.thinking, "effort": self.effort, "form": FORM,
        }  # fmt: skip


@dataclass(frozen=True)
class JudgeRequest:
    """A built request. `key` names the judgement; `body` is what the SDK sends."""

    key: str
    rubric: Rubric
    params: JudgeParams
    sample: int
    rendered: str

    @cached_property
    def nonce(self) -> str:
        """16 hex digits, the same for every sending of this request."""
        return nonce_of(self.key)

    def user_text(self, *, re_ask: bool = False) -> str:
        """The user turn, fenced by the nonce; `re_ask` adds the line that follows a malformed reply."""
        text = with_nonce(self.rendered, self.key)
        return f"{text}\n\n{self.rubric.re_ask}" if re_ask else text

    def body(self, *, re_ask: bool = False) -> dict[str, Any]:
        """Keyword arguments of `messages.create`, and `params` of a batch's item.

        The rubric is marked for the cache. The API caches nothing below a minimum length that depends on the model
        (512 to 4,096 tokens as of 2026); the shipped rubrics are shorter, so only a long rubric of one's own is ever
        read from it. The options and the question stay behind the judged text, so that the last word is ours.
        """
        output: dict[str, Any] = {"format": {"type": "json_schema", "schema": dict(self.rubric.schema)}}
        body: dict[str, Any] = {
            "model": self.params.model,
            "max_tokens": self.params.max_reply_tok,
            # The rubric is the same for thousands of requests: cached, and free of anything judged.
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
        """No prompt of this request has more tokens: a token is at least a byte; 1,000 for the API's own framing."""
        return len(canonical_json(self.body(re_ask=True)).encode()) + 1000


def build_request(rubric: Rubric, params: JudgeParams, item: JudgeItem) -> JudgeRequest:
    """The request that judges one item.

    Its key is the sha256 of model, parameters, rubric sha256, rendered text (with a hole where the nonce goes) and
    sample index, so ten samples stay ten judgements and a new rubric is a new one.
    """
    fenced = fenced_item(item, params.max_judged_chars)
    rendered = "\n\n".join([fenced, _options_text(rubric, params.reverse), rubric.ask])
    key = sha256_of({
        "params": params.identity(),
        "rubric": rubric.sha256,
        "rendered": rendered,
        "sample": item.sample,
    })  # fmt: skip
    return JudgeRequest(key, rubric, params, item.sample, rendered)


def neutralised(text: str) -> str:
    """Judged text that cannot leave its fence or hide from a reader.

    Control characters and lone surrogates become U+FFFD, invisible format characters (zero width, direction, tags) go,
    line breaks become one kind, and a bracket before a word of our fences or of a chat format becomes a parenthesis.
    """
    text = re.sub("\r\n|[\r\u0085\u2028\u2029]", "\n", text)
    kept = []
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cf":
            continue
        kept.append("\ufffd" if kind == "Cs" or (kind == "Cc" and character not in "\n\t") else character)
    return _SPECIAL_TOKEN.sub("(|", _FENCE_LIKE.sub("(", "".join(kept)))


def fenced_item(item: JudgeItem, max_chars: int) -> str:
    """Question and answer between fences whose nonce is still a hole; `with_nonce` fills it."""
    return "\n\n".join(
        _fenced(name, text, max_chars) for name, text in (("question", item.question), ("answer", item.answer))
    )


def nonce_of(key: str) -> str:
    """16 hex digits drawn from a judgement's key."""
    return hashlib.sha256(f"nonce\x1f{key}".encode()).hexdigest()[:16]


def with_nonce(rendered: str, key: str) -> str:
    """Rendered text with its fences closed by the key's nonce."""
    return rendered.replace(_NONCE_HOLE, nonce_of(key))


def _fenced(name: str, text: str, max_chars: int) -> str:
    """A block of judged text. The notice of a cut stands outside the fence, where judged text cannot forge it."""
    # Cut before neutralising, so that the work is bounded too.
    clean = neutralised(text[:max_chars])
    cut = len(text) - max_chars
    notice = f"\n(The {name} goes on for {cut} more characters, which are not shown.)" if cut > 0 else ""
    shown = clean if clean.strip() else "(empty)"
    return f"<{name}-{_NONCE_HOLE}>\n{shown}\n</{name}-{_NONCE_HOLE}>{notice}"


def _options_text(rubric: Rubric, reverse: bool) -> str:
    """What the primary measure's labels or grades mean, in the rubric's order or the other way round."""
    lines = []
    for measure in rubric.measures:
        options = measure.options[::-1] if reverse else measure.options
        if options:
            lines.append(_heading(measure))
            lines += [f"- {option.name}: {option.meaning}" for option in options]
    return "\n".join(lines)


def _heading(measure: Measure) -> str:
    return f"{measure.name}, one of:" if measure.scale is None else f"{measure.name}, for orientation:"


#: Raised when the wording or the reading of a local request changes.
FORM = 1


LETTERS, DIGITS = "ABCDEFGHIJ", "0123456789"


@dataclass(frozen=True)
class LocalAsk:
    """Everything asked about one item: one user turn for each measure, under one judgement's key."""

    key: str
    rubric: Rubric
    model: str
    sample: int
    turns: tuple[tuple[str, str], ...]  # (characters, user text)

    def prompt(self, place: int, *, reminder: bool = False) -> Prompt:
        """What is asked about a measure: the rubric, the user turn fenced by the nonce, the characters to choose from."""
        characters, text = self.turns[place]
        line = f"\nReply with one of {', '.join(characters)} and nothing else." if reminder else ""
        return self.rubric.system, with_nonce(text, self.key) + line, characters


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


Prompt = tuple[str, str, str]
