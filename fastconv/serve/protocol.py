"""OpenAI's chat and text completions as they are asked for and answered: requests in, bodies and errors out. No network.

A field that is not computed here is refused, unless its value changes nothing; so is a field that nobody knows. What a
client leaves out is taken from the run's own `eval.sampling`, so that a plain chat has the condition that was measured.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastconv.chat import ChatTokenizer
from fastconv.chat.template import Message
from fastconv.datasets.rows import require_plain_text
from fastconv.errors import FastconvError, shown
from fastconv.recipe import SamplingSettings
from fastconv.seeding import seed_of

#: Fields that change nothing here whatever they say: who asks, and how a company would store and bill it.
_IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
#: Fields that are not computed here, and the values at which they ask for nothing. A list or table may be empty too.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": (), "logprobs": (False,), "top_logprobs": (0,),
    "tools": (), "tool_choice": ("none", "auto"), "functions": (), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": (), "echo": (False,), "best_of": (1,), "suffix": ("",),
}  # fmt: skip
_MAX_SEED = 2**63
#: Completions of one request.
_MAX_CHOICES = 128
Finish = Literal["stop", "length"]


class ApiError(Exception):
    """An error as OpenAI's API shapes it: HTTP status, message, type, and the field and code where there are any."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": shown(message), "type": kind, "param": param, "code": code}}


def refusal_of(error: FastconvError, status: int = 400) -> ApiError:
    """An error of fastconv in OpenAI's shape."""
    return ApiError(status, f"{error.what}. Fix: {error.fix}" if error.fix else error.what)


class _Table(BaseModel):
    """A strict table of JSON. `null` is a field that was left out; one that asks for nothing is dropped."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        kept = {}
        for name, value in table.items():
            if name in cls.model_fields:
                if value is not None or cls.model_fields[name].is_required():
                    kept[name] = value
            elif not (name in _IGNORED or _asks_nothing(name, value)):
                kept[name] = value  # refused below: unknown, or not computed here
        return kept


def _asks_nothing(name: str, value: Any) -> bool:
    return value is None or (name in _NEUTRAL and (value in ([], {}) or value in _NEUTRAL[name]))


class _Part(_Table):
    type: Literal["text"]
    text: str


class _Turn(_Table):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, table: Any) -> Any:
        """An answer that is sent back holds fields of it that say nothing (`refusal`, `tool_calls`, `annotations`)."""
        if not isinstance(table, dict):
            return table
        return {name: value for name, value in table.items() if value or name in cls.model_fields}

    @property
    def message(self) -> Message:
        """As the template takes it; `developer` is OpenAI's newer name of `system`."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class _StreamOptions(_Table):
    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: Literal[False] = False


class _Request(_Table):
    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-_MAX_SEED, lt=_MAX_SEED)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=_MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()


class _ChatRequest(_Request):
    messages: Annotated[list[_Turn], Field(min_length=1)]


class _TextRequest(_Request):
    prompt: str | list[int] | Annotated[list[str], Field(min_length=1)]


@dataclass(frozen=True)
class Ask:
    """A request, ready to be drawn: one prompt (token ids) and one seed for each choice, in order."""

    kind: Literal["chat", "text"]
    model: str
    prompts: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]
    settings: SamplingSettings
    stops: tuple[str, ...]
    stream: bool
    usage_in_stream: bool
    n: int


def parse_ask(
    data: bytes, kind: Literal["chat", "text"], models: Mapping[str, Any], tokenizer: ChatTokenizer,
    defaults: SamplingSettings, context_tok: int,
) -> Ask:  # fmt: skip
    """The request in a body. Raises ApiError for everything that cannot be answered as it is asked."""
    table = _json(data)
    try:
        asked = (_ChatRequest if kind == "chat" else _TextRequest).model_validate(table)
    except ValidationError as error:
        raise _invalid(error) from None
    if asked.model not in models:
        raise unknown_model(asked.model, models)
    try:
        prompts = _chat_prompt(asked, tokenizer) if isinstance(asked, _ChatRequest) else _text_prompts(asked, tokenizer)
    except FastconvError as error:
        raise refusal_of(error) from None
    stops = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    if "" in stops:
        raise ApiError(400, "an empty stop sequence would end every answer", param="stop")
    settings = _settings(asked, max(map(len, prompts)), defaults, context_tok)
    first = secrets.randbits(63) if asked.seed is None else asked.seed
    seeds = [first if choice == 0 else seed_of("choice", first, choice) for choice in range(asked.n)]
    return Ask(
        kind, asked.model, tuple(prompt for prompt in prompts for _ in seeds), tuple(seeds * len(prompts)), settings, stops,
        asked.stream, asked.stream_options.include_usage, asked.n,
    )  # fmt: skip


def unknown_model(name: str, models: Mapping[str, Any]) -> ApiError:
    """The error for a model that is not served."""
    served = ", ".join(list(models)[:8])
    return ApiError(404, f"the model {name!r} is not served; here are {served}", param="model", code="model_not_found")


def _json(data: bytes) -> dict[str, Any]:
    try:
        table = json.loads(data)
        json.dumps(table, ensure_ascii=False).encode()  # half a character (a lone surrogate) is no text
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON", code="invalid_json") from None
    if not isinstance(table, dict):
        raise ApiError(400, "the body is no JSON object", code="invalid_json")
    return table


def _invalid(error: ValidationError) -> ApiError:
    """The first fault of a request; where a field may be of several types, the fault of the one that fits furthest."""
    faults = error.errors(include_url=False, include_input=False)
    of_field = (one for one in faults if one["loc"][:1] == faults[0]["loc"][:1])
    first = max(of_field, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    param = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "str", "constrained")))
    if first["type"] == "extra_forbidden":
        known = "not computed here" if str(first["loc"][-1]) in _NEUTRAL else "not known here"
        return ApiError(400, f"{param!r} is {known}: leave it out", param=param, code="unsupported_parameter")
    return ApiError(400, f"{param or 'the request'}: {first['msg']}", param=param or None, code="invalid_value")


def _chat_prompt(asked: _ChatRequest, tokenizer: ChatTokenizer) -> list[tuple[int, ...]]:
    messages = [turn.message for turn in asked.messages]
    if messages[-1]["role"] != "user":
        raise ApiError(400, "the last message must be the user's: it is what is answered", param="messages")
    require_plain_text(((f"a {m['role']} message", m["content"], "messages") for m in messages), tokenizer)
    return [tuple(tokenizer.conversation_ids(messages))]


def _text_prompts(asked: _TextRequest, tokenizer: ChatTokenizer) -> list[tuple[int, ...]]:
    given = asked.prompt
    if isinstance(given, str):
        prompts = [tuple(tokenizer.encode_raw(given))]
    elif all(isinstance(one, int) for one in given):
        prompts = [tuple(one for one in given if isinstance(one, int))]
        if any(not 0 <= token < tokenizer.vocab_size for token in prompts[0]):
            raise ApiError(400, f"token ids lie in 0 to {tokenizer.vocab_size - 1}", param="prompt")
    else:
        prompts = [tuple(tokenizer.encode_raw(str(one))) for one in given]
    if not all(prompts):
        raise ApiError(400, "an empty prompt cannot be continued", param="prompt")
    if len(prompts) * asked.n > _MAX_CHOICES:
        raise ApiError(400, f"at most {_MAX_CHOICES} completions of one request", param="prompt")
    return prompts


def _settings(asked: _Request, prompt_tok: int, defaults: SamplingSettings, context_tok: int) -> SamplingSettings:
    """How the answer is drawn. Raises ApiError if it does not fit beside its prompt."""
    name = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    wanted, room = asked.max_completion_tokens or asked.max_tokens, context_tok - prompt_tok
    if room < (wanted or 1):
        raise ApiError(
            400, f"the prompt takes {prompt_tok} tokens and the answer up to {wanted or 1}, {context_tok} are read here",
            param=name if room > 0 else "messages", code="context_length_exceeded",
        )  # fmt: skip
    return SamplingSettings(
        temperature=defaults.temperature if asked.temperature is None else asked.temperature,
        top_p=defaults.top_p if asked.top_p is None else asked.top_p,
        max_new_tok=wanted or min(defaults.max_new_tok, room),
    )


class AnswerText:
    """The text of one completion as its tokens come, up to a stop sequence."""

    def __init__(self, tokenizer: ChatTokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._read: Callable[[int], str] = tokenizer.answer_reader()
        self._ids: list[int] = []
        self._held = ""
        self._given = ""
        self.n_tok = 0
        self.finish: Finish | None = None

    def add(self, ids: Sequence[int]) -> str:
        """The text that these tokens add and that no later token can take back. After a stop sequence there is none."""
        added = ""
        for token in ids:
            if self.finish is not None:
                break
            self._ids.append(token)
            self.n_tok += 1
            self._held += self._read(token)
            added += self._release()
        return added

    def end(self, finish: Finish) -> str:
        """The rest of the text; the completion ended by its own end of turn (`stop`) or at its limit."""
        if self.finish is not None:
            return ""
        self.n_tok += finish == "stop"
        whole = self._tokenizer.answer_text(self._ids)
        if whole.startswith(self._given):  # what the reader held back, such as half of a character
            self._held = whole[len(self._given) :]
        rest = self._release()
        if self.finish is None:
            self.finish, rest = finish, rest + self._held
        return rest

    def _release(self) -> str:
        """What of the held text can be given: all, but for what may be the beginning of a stop sequence."""
        places = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            self.finish = "stop"
            text, self._held = self._held[: min(places)], ""
        else:
            kept = max(
                (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0
            )
            text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self._given += text
        return text


@dataclass(frozen=True)
class Reply:
    """The bodies of one request's reply: whole, or as the chunks of a stream. All of them have one id and one time."""

    ask: Ask
    fingerprint: str
    id: str
    created_s: int

    @classmethod
    def to(cls, ask: Ask, fingerprint: str) -> Reply:
        """A reply to a request by the stack of this fingerprint."""
        prefix = "chatcmpl" if ask.kind == "chat" else "cmpl"
        return cls(ask, fingerprint, f"{prefix}-{secrets.token_hex(12)}", int(time.time()))

    def whole(self, texts: Sequence[str], finishes: Sequence[Finish | None], n_tok: int) -> dict[str, Any]:
        """The reply in one body; `n_tok` tokens were drawn for all choices together."""
        choices = []
        for index, (text, finish) in enumerate(zip(texts, finishes, strict=True)):
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(self._choice(index, said if self.ask.kind == "chat" else {"text": text}, finish))
        return {**self._head(""), "choices": choices, "usage": self.usage(n_tok)}

    def chunk(self, index: int, text: str, finish: Finish | None = None, *, first: bool = False) -> dict[str, Any]:
        """A piece of choice `index`: the first names the role, the last the finish."""
        delta: dict[str, Any] = {
            **({"role": "assistant"} if first else {}),
            **({"content": text} if text or first else {}),
        }
        said = {"delta": delta} if self.ask.kind == "chat" else {"text": text}
        return {**self._head(".chunk"), "choices": [self._choice(index, said, finish)], **self._no_usage()}

    def last(self, n_tok: int) -> dict[str, Any]:
        """The chunk after all choices with the token counts, for clients that ask for it."""
        return {**self._head(".chunk"), "choices": [], "usage": self.usage(n_tok)}

    def usage(self, n_tok: int) -> dict[str, int]:
        """Token counts: the prompt of every choice once for each distinct prompt, and all that was drawn."""
        prompt_tok = sum(map(len, self.ask.prompts)) // self.ask.n
        return {"prompt_tokens": prompt_tok, "completion_tokens": n_tok, "total_tokens": prompt_tok + n_tok}

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.ask.kind == "chat" else "text_completion"
        return {
            "id": self.id, "object": kind, "created": self.created_s, "model": self.ask.model,
            "system_fingerprint": self.fingerprint,
        }  # fmt: skip

    def _no_usage(self) -> dict[str, Any]:
        return {"usage": None} if self.ask.usage_in_stream else {}

    @staticmethod
    def _choice(index: int, said: Mapping[str, Any], finish: Finish | None) -> dict[str, Any]:
        return {"index": index, **said, "logprobs": None, "finish_reason": finish}
