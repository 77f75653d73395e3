"""Chat rendering: messages to token ids, with the loss mask of training rows. Needs neither torch nor transformers.

This is the only module that calls a chat template. A row's system turn is one of three different conditions:

- `text`: the template gets a system message with this text;
- `empty`: the template gets a system message whose content is "";
- `template_default`: the template gets no system message and may insert its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from fastconv.errors import TemplateError

if TYPE_CHECKING:  # both are slow to import, and `plan` and `status` read no tokenizer
    import jinja2
    import tokenizers

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SystemTurn:
    """The system turn of a row: a text, `empty`, or `template_default`. Raises ValueError if kind and text disagree."""

    kind: Literal["text", "empty", "template_default"]
    text: str = ""

    def __post_init__(self) -> None:
        if (self.kind == "text") != bool(self.text):
            raise ValueError(f"a system turn of kind {self.kind!r} with text {self.text!r} says two things")

    def messages(self) -> list[Message]:
        """Zero or one system message for the template."""
        if self.kind == "template_default":
            return []
        return [{"role": "system", "content": self.text}]


TEMPLATE_DEFAULT = SystemTurn("template_default")
EMPTY = SystemTurn("empty")


def parse_system_turn(text: str) -> SystemTurn:
    """The system turn that a user wrote as `template_default`, `empty`, or the prompt itself."""
    return {"template_default": TEMPLATE_DEFAULT, "empty": EMPTY}.get(text) or SystemTurn("text", text)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A training row as token ids: `ids[loss_from:]` carry loss; the last of them ends the turn unless it was cut.

    The first `n_prompt` ids are the prompt; the `n_given` ids after it are the part of the answer without loss.
    `truncated` says that the row was cut at the maximum length.
    """

    ids: tuple[int, ...]
    n_prompt: int
    truncated: bool = False
    n_given: int = 0

    @property
    def loss_from(self) -> int:
        """Index of the first token that carries loss."""
        return min(self.n_prompt + self.n_given, len(self.ids))

    @property
    def n_supervised(self) -> int:
        """Number of tokens that carry loss."""
        return len(self.ids) - self.loss_from


class ChatTokenizer:
    """A tokenizer and its chat template, read from a model folder. Raises TemplateError if they cannot be used.

    `stop_ids` are the ids of the tokens that end an answer: the end of turn first, then the tokenizer's other ends.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        self._tokenizer = _read_tokenizer(folder / "tokenizer.json")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.template_text = _template_text(folder, config)
        self._special = {
            name: text
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (text := _token_text(config.get(name)))
        }
        self._template = _compile(self.template_text, str(folder))
        self.end_of_turn_id = self._end_of_turn()
        self.stop_ids = self._stop_ids()

    @cached_property
    def template_sha256(self) -> str:
        """sha256 (hex) of the chat template's text."""
        return hashlib.sha256(self.template_text.encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def largest_id(self) -> int:
        """The largest token id, special ones included; ids need not be contiguous."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def pad_id(self) -> int | None:
        """Id of the tokenizer's padding token, or None if it names none that it has."""
        return self._tokenizer.token_to_id(self._special["pad_token"]) if "pad_token" in self._special else None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The template's text for these messages. Raises TemplateError when the template refuses them."""
        import jinja2

        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except jinja2.TemplateError as error:
            raise TemplateError(
                f"the chat template refuses these messages: {error}", fix="use a template that takes a system turn"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text; special tokens in it are recognized, none are added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids; `skip_special` leaves special tokens out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def token_text(self, token_id: int) -> str:
        """The text of one token, special tokens included."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def is_special(self, token_id: int) -> bool:
        """Whether this is the id of a special token."""
        return token_id in self._special_ids

    def prompt_text(self, system: SystemTurn, user: str) -> str:
        """A system turn and a user turn as text, up to the start of the assistant's answer."""
        return self.render([*system.messages(), {"role": "user", "content": user}], add_generation_prompt=True)

    def prompt_ids(self, system: SystemTurn, user: str) -> list[int]:
        """Token ids of `prompt_text`."""
        return self.encode(self.prompt_text(system, user))

    def training_ids(
        self,
        system: SystemTurn,
        user: str,
        completion: str,
        max_length_tok: int,
        *,
        ended: bool = True,
        given_chars: int = 0,
    ) -> Rendered:
        """A training row with loss on the completion and its end-of-turn token alone.

        A row over `max_length_tok` tokens is cut at the end (`truncated`). `ended` False means that the completion was
        cut while it was sampled: the row then stops before the end of turn, so that the model does not learn to stop
        there. The first `given_chars` characters of the completion carry no loss. Raises TemplateError if the rendered
        row does not begin with the prompt (the mask would then be wrong) or does not end its turn.
        """
        prompt_text = self.prompt_text(system, user)
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": completion}]
        text = self.render([*system.messages(), *turns], add_generation_prompt=False)
        if not text.startswith(prompt_text):
            raise TemplateError(
                "the prompt is not how the row begins", fix="use a template that renders turns independently"
            )
        prompt, ids = self.encode(prompt_text), self.encode(text)
        if ids[: len(prompt)] != prompt:
            # One token spans the boundary (a newline that starts the answer after one that ends the prompt). Sampling
            # appends tokens to the prompt's own, so the answer is encoded apart from it.
            ids = prompt + self.encode(text[len(prompt_text) :])
        try:
            end = len(ids) - 1 - ids[::-1].index(self.end_of_turn_id)  # leaves out what the template adds after it
        except ValueError:
            end = -1
        if end < len(prompt):
            raise TemplateError("the row does not end its turn", fix="check the template's end-of-turn token")
        n_given = 0
        if given_chars:
            n_given = self.tail_start(ids[len(prompt) : end], completion[given_chars:])
        ids = ids[: end + 1] if ended else ids[:end]
        n_prompt = min(len(prompt), max_length_tok)
        return Rendered(tuple(ids[:max_length_tok]), n_prompt, len(ids) > max_length_tok, n_given)

    def tail_start(self, ids: Sequence[int], tail: str) -> int:
        """Index in `ids` of the first token that holds a character of `tail`; `len(ids)` for an empty tail.

        The decoded text of `ids` must end with `tail`, otherwise TemplateError is raised. Compared by characters and
        not by the tail's own ids, because a token may straddle its start (`.\n\n` can be one token); such a token
        belongs to the tail. Searched backwards by decoding, because some tokenizers trim their offsets.
        """
        for start in range(len(ids), -1, -1):
            if self.decode(ids[start:], skip_special=False).endswith(tail):
                return start
        raise TemplateError(
            f"the answer's tokens do not end with {tail!r} when decoded", fix="use a tokenizer that round-trips text"
        )

    def letter_ids(self, prompt_text: str, letters: Sequence[str]) -> tuple[list[int], list[int]]:
        """(ids of the prompt, id of each letter as the next token), found by encoding each letter after this prompt.

        So there is no guess between "A" and " A". Raises TemplateError if a letter is not one token there, or if two
        letters share one.
        """
        prompt = self.encode(prompt_text)
        # Special tokens split the text before tokens are merged. If the text after the last one encodes to the prompt's
        # last tokens, that text alone decides the token of a letter, so only it has to be encoded again.
        ends = (start + len(text) for text in self._special_texts if (start := prompt_text.rfind(text)) >= 0)
        tail = prompt_text[max(ends, default=0) :]
        tail_ids = self.encode(tail)
        if not tail_ids or prompt[-len(tail_ids) :] != tail_ids:
            tail, tail_ids = prompt_text, prompt
        letter_ids = []
        for letter in letters:
            ids = self.encode(tail + letter)
            if ids[:-1] != tail_ids:
                raise TemplateError(
                    f"the letter {letter!r} is not one token after the prompt", fix="score by text instead"
                )
            letter_ids.append(ids[-1])
        if len(set(letter_ids)) != len(letter_ids):
            raise TemplateError(f"two of the letters {list(letters)} share a token", fix="score by text instead")
        return prompt, letter_ids

    @cached_property
    def _special_texts(self) -> tuple[str, ...]:
        added = self._tokenizer.get_added_tokens_decoder()
        return tuple(token.content for token in added.values() if token.special)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def _end_of_turn(self) -> int:
        """Id of the special token right after an assistant's text in a rendered conversation. Raises TemplateError."""
        marker = "fastconv-end-of-turn-probe"
        text = self.render(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}], add_generation_prompt=False
        )
        after = self.encode(text[text.index(marker) + len(marker) :]) if marker in text else []
        if not after or after[0] not in self._special_ids:
            raise TemplateError(
                "the chat template puts no end-of-turn token after an answer", fix="use an instruct model's tokenizer"
            )
        return after[0]

    def _stop_ids(self) -> tuple[int, ...]:
        named = [self._special.get("eos_token"), "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>"]
        ids = [self._tokenizer.token_to_id(token) for token in named if token]
        return tuple(dict.fromkeys([self.end_of_turn_id, *(token_id for token_id in ids if token_id is not None)]))


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise TemplateError("no tokenizer.json", where=str(path.parent), fix="use a model folder with a fast tokenizer")
    import tokenizers

    # The library raises a bare Exception for a file it cannot parse; its JSON is checked first to say so plainly.
    _read_json(path)
    return tokenizers.Tokenizer.from_file(str(path))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TemplateError(f"not valid JSON: {error}", where=str(path), fix="fetch the model again") from None


def _template_text(folder: Path, config: Mapping[str, Any]) -> str:
    """The template in chat_template.jinja or in the tokenizer's config. Raises TemplateError without one."""
    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(text, list):  # several named templates: take the default
        text = next((entry["template"] for entry in text if entry.get("name") == "default"), None)
    if not text:
        raise TemplateError(
            "the tokenizer has no chat template",
            where=str(folder),
            fix="use an instruct model, or add chat_template.jinja to the folder",
        )
    return str(text)


def _token_text(entry: object) -> str:
    """The text of a special token in the tokenizer's config, given as text or as a table; "" without one."""
    if isinstance(entry, Mapping):
        return str(entry.get("content", ""))
    return str(entry) if entry else ""


def _compile(text: str, where: str) -> jinja2.Template:
    """Jinja settings that chat templates are written for (trim and lstrip blocks, `tojson`, `raise_exception`)."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template does not parse: {error}", where=where, fix="fetch the model again"
        ) from None
