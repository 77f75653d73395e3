"""Builds every judging request: `JudgeRequest` for Claude (live and batch), `LocalRequest` for local judges.

Judged text is data. It appears only in the user turn, between fences that contain a nonce, and cannot close them: the
nonce is derived from the judgement's key, which is a sha256 over that very text, so no text can contain its own nonce.
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

#: Version of the rendered form, part of every key. Increase it when the form changes; a local judge has its own.
FORM, LOCAL_FORM = 1, 1
#: The characters a local judge chooses from: for labels, and for scales.
LETTERS, DIGITS = "ABCDEFGHIJ", "0123456789"
#: (system text, user text, characters to choose from)
Prompt = tuple[str, str, str]
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
    """A request to Claude. `key` is the judgement's key; `body` is what the SDK sends."""

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


@dataclass(frozen=True)
class LocalRequest:
    """A request to a local judge: one (characters, user text) turn per measure, under one judgement key."""

    key: str
    rubric: Rubric
    model: str
    sample: int
    turns: tuple[tuple[str, str], ...]

    def prompt(self, place: int, *, reminder: bool = False) -> Prompt:
        """The prompt for the measure at index `place`; `reminder` adds a line after an unreadable reply."""
        characters, text = self.turns[place]
        line = f"\nReply with one of {', '.join(characters)} and nothing else." if reminder else ""
        return self.rubric.system, fill_nonce(text, self.key) + line, characters


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
