"""Chat rendering: messages to token ids, with the loss mask of training rows. Needs neither torch nor transformers.

This is the only module that calls a chat template (`template`). A row's system turn is one of three different conditions:

- `text`: the template gets a system message with this text;
- `empty`: the template gets a system message whose content is "";
- `template_default`: the template gets no system message and may insert its own.

Where the prompt ends is read off a rendered row: all that stands before the answer's first character is prompt, also what the template's
generation prompt leaves out (an empty think block). A token that holds both sides of that place belongs to the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastconv.chat.template import OTHER_TEMPLATE, ChatTemplate, Message, named_tokens, read_json
from fastconv.errors import TemplateError
from fastconv.recipe import ModelSettings

if TYPE_CHECKING:  # slow to import, and `plan` and `status` read no tokenizer
    import tokenizers

#: Stands for a user's text and for an answer where only the places around them matter.
_USER, _ANSWER = "fastconv-user-probe", "fastconv-answer-probe"


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

    `settings` give the template's date and its own variables (`model.template_date`, `model.template_kwargs`).
    `stop_ids` are the ids of the tokens that end an answer: the end of turn first, then the tokenizer's other ends.
    """

    def __init__(self, folder: Path | str, settings: ModelSettings | None = None) -> None:
        self.folder = folder = Path(folder)
        config = read_json(folder / "tokenizer_config.json")
        self._tokenizer = _read_tokenizer(folder / "tokenizer.json")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = named_tokens({**config, **read_json(folder / "special_tokens_map.json")})
        self.template = ChatTemplate(folder, config, self._special, settings or ModelSettings())
        self.render = self.template.render
        self.end_of_turn_id = self._end_of_turn()
        self.stop_ids = self._stop_ids()

    @cached_property
    def vocab_size(self) -> int:
        """Number of rows that an embedding needs: the largest token id, special ones included, plus 1."""
        return max(self.vocab.values()) + 1

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Every token's text and id, special ones included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def pad_id(self) -> int | None:
        """Id of the tokenizer's padding token, or None if it names none that it has."""
        return self._tokenizer.token_to_id(self._special["pad_token"]) if "pad_token" in self._special else None

    def encode(self, text: str, quoted: Sequence[str] = ()) -> list[int]:
        """Token ids of rendered text; special tokens in it are recognized, none are added.

        `quoted` are parts of it, in their order, that somebody else wrote: a control token that is spelled there is read as
        its characters. A part without one is encoded with the text around it. Raises TemplateError if that cannot be done.
        """
        ids: list[int] = []
        for part in (part.strip() for part in quoted if self.control_token_in(part)):
            if text.count(part) != 1:
                raise TemplateError(f"a text with a control token stands {text.count(part)} times in its prompt")
            before, _, text = text.partition(part)
            ids += [*self.encode(before), *self._plain_ids(part)]
        return [*ids, *self._tokenizer.encode(text, add_special_tokens=False).ids]

    def _plain_ids(self, text: str) -> list[int]:
        """Token ids of the characters of a text, whatever control tokens they spell."""
        ids = self._as_plain.encode(text, add_special_tokens=False).ids
        if any(token_id in self._control_ids for token_id in ids):
            raise TemplateError("this tokenizer has no other way to write its control tokens")
        return ids

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of text without a template, with what transformers' tokenizer sets before it (a BOS), if anything."""
        return [*self._before_raw_text, *self.encode(text)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids; `skip_special` leaves special tokens out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def answer_text(self, ids: Sequence[int]) -> str:
        """The text of a sampled answer: `decode` without the space that the template itself sets before an answer."""
        return self.decode(ids).removeprefix(self._space_before_answer)

    def answer_reader(self) -> Callable[[int], str]:
        """A function that takes an answer's tokens one by one and returns the text that each completes, perhaps none."""
        from tokenizers.decoders import DecodeStream

        stream, space = DecodeStream(skip_special_tokens=True), self._space_before_answer

        def read(token_id: int) -> str:
            nonlocal space
            text = stream.step(self._tokenizer, token_id) or ""
            if text:
                text, space = text.removeprefix(space), ""
            return text

        return read

    def token_text(self, token_id: int) -> str:
        """The text of one token, special tokens included."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def is_special(self, token_id: int) -> bool:
        """Whether this is the id of a special token."""
        return token_id in self._special_ids

    def control_token_in(self, text: str) -> str | None:
        """The first control token that is spelled in this text, or None. In a message it would end a turn or begin one."""
        found = self._any_control.search(text) if self._any_control else None
        return found.group() if found else None

    def prompt_text(self, system: SystemTurn, user: str) -> str:
        """A system turn and a user turn as text, up to the first character of the assistant's answer.

        Raises what `conversation_text` raises.
        """
        return self.conversation_text([*system.messages(), {"role": "user", "content": user}])

    def conversation_text(self, messages: Sequence[Message]) -> str:
        """Messages that end with a user's, as text up to the first character of the assistant's next answer.

        Raises TemplateError if the template leaves out the text of a system or user turn, or if a row with an answer does
        not begin with the template's generation prompt.
        """
        generation = self.render(messages, add_generation_prompt=True)
        row = self.render([*messages, {"role": "assistant", "content": _ANSWER}], add_generation_prompt=False)
        prompt, found, _ = row.rpartition(_ANSWER)
        begins = prompt if found else row
        if not begins.startswith(generation):
            raise TemplateError(
                f"the prompt is not how the row begins: a row with an answer goes on with {_differs(begins, generation)} "
                f"where the template's generation prompt has {_differs(generation, begins)}",
                fix="set the template's own switch in model.template_kwargs (for example enable_thinking = false), or "
                "use a template that renders turns independently",
            )
        if not found:
            raise TemplateError("the chat template does not write an answer as it is given", fix=OTHER_TEMPLATE)
        for message in messages:  # an earlier answer may lose its think block: templates differ in what they keep of it
            if message["role"] != "assistant" and message["content"].strip() not in prompt:
                raise TemplateError(
                    f"the chat template leaves out or rewrites the {message['role']} turn", fix=OTHER_TEMPLATE
                )
        return prompt

    def prompt_ids(self, system: SystemTurn, user: str) -> list[int]:
        """Token ids of `prompt_text`, without a space at its end: that is merged into an answer's first token."""
        return self.conversation_ids([*system.messages(), {"role": "user", "content": user}])

    def conversation_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of `conversation_text`, as `prompt_ids` gives them for a single turn."""
        return self.encode(self.conversation_text(messages).rstrip(" "))

    def require_conditions(self, turns: Mapping[str, SystemTurn]) -> None:
        """Raise TemplateError unless each of these system turns, by name, is a prompt of its own to the model."""
        seen: dict[tuple[int, ...], str] = {}
        for name, turn in turns.items():
            first = seen.setdefault(tuple(self.prompt_ids(turn, _USER)), name)
            if first != name and turns[first] != turn:
                raise TemplateError(
                    f"the chat template makes the same prompt of the system turns of {first} and {name}, so they are one "
                    "condition",
                    fix="give them texts that differ in more than white space, or use a model whose template tells them "
                    "apart",
                )

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
        row is not the prompt and the completion (the mask would then be wrong) or does not end its turn.
        """
        prompt_text = self.prompt_text(system, user)
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": completion}]
        text = self.render([*system.messages(), *turns], add_generation_prompt=False)
        if not text.startswith(prompt_text):
            raise TemplateError(
                "the prompt is not how the row begins: what the template writes before this answer depends on it",
                fix="take out of the answer what the template reads (a think block), or use another template",
            )
        if not text[len(prompt_text) :].lstrip().startswith(completion.strip()):
            raise TemplateError(
                f"the template rewrites this answer: {completion[:40]!r} became {text[len(prompt_text) :][:40]!r}",
                fix="take out of the answer what the template reads (a think block), or use another template",
            )
        answered_from = len(prompt_text.rstrip(" "))
        prompt, ids = self.encode(prompt_text[:answered_from]), self.encode(text)
        if ids[: len(prompt)] != prompt:
            # One token spans the boundary (a newline that starts the answer after one that ends the prompt). Sampling
            # appends tokens to the prompt's own, so the answer is encoded apart from it.
            ids = prompt + self.encode(text[answered_from:])
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

    def letter_ids(
        self, prompt_text: str, letters: Sequence[str], quoted: Sequence[str] = ()
    ) -> tuple[list[int], list[int]]:
        """(ids of the prompt, id of each letter as the next token), found by encoding each letter after this prompt.

        So there is no guess between "A" and " A"; a space at the prompt's end may be part of the letter's token, as it is
        in a row. `quoted` as in `encode`. Raises TemplateError if a letter is not one token there, or if two letters share
        one.
        """
        unspaced = prompt_text.rstrip(" ")
        found = None if unspaced == prompt_text else self._letters_after(unspaced, prompt_text, letters, quoted)
        if not isinstance(found, tuple):
            found = self._letters_after(prompt_text, prompt_text, letters, quoted)
        if not isinstance(found, tuple):
            raise TemplateError(
                f"the letter {found!r} is not one token after the prompt",
                fix="use labels that are one token, or another model; `fastconv score --text` scores by text",
            )
        if len(set(found[1])) != len(letters):
            raise TemplateError(
                f"two of the letters {list(letters)} share a token", fix="use labels that differ, or another model"
            )
        return found

    def _letters_after(
        self, context: str, prompt_text: str, letters: Sequence[str], quoted: Sequence[str]
    ) -> tuple[list[int], list[int]] | str:
        """As `letter_ids`, if each letter encoded with the prompt is one token after `context`; else the first that is not."""
        prompt = self.encode(context, quoted)
        # Special tokens split the text before tokens are merged. If the text after the last one encodes to the prompt's
        # last tokens, that text alone decides the token of a letter, so only it has to be encoded again.
        ends = (start + len(text) for text in self.special_texts if (start := context.rfind(text)) >= 0)
        cut = max(ends, default=0)
        tail_ids = self.encode(context[cut:])
        if not tail_ids or prompt[-len(tail_ids) :] != tail_ids:
            cut, tail_ids = 0, prompt
        letter_ids = []
        for letter in letters:
            ids = self.encode(prompt_text[cut:] + letter, () if cut else quoted)
            if ids[:-1] != tail_ids:
                return letter
            letter_ids.append(ids[-1])
        return prompt, letter_ids

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The texts of all special tokens."""
        added = self._tokenizer.get_added_tokens_decoder()
        return tuple(token.content for token in added.values() if token.special)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def _control_ids(self) -> dict[int, str]:
        """Ids and texts of the tokens that end a turn, begin one or stand for none: the special ones, and added ones that
        the template writes."""
        added, row = self._tokenizer.get_added_tokens_decoder(), self._probe_row()
        texts = {token_id: token.content for token_id, token in added.items() if token.special or token.content in row}
        return {token_id: text for token_id, text in texts.items() if text.strip()}

    @cached_property
    def _any_control(self) -> re.Pattern[str] | None:
        longest_first = sorted(self._control_ids.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @cached_property
    def _as_plain(self) -> tokenizers.Tokenizer:
        """The tokenizer, which reads control tokens in a text as their characters."""
        import tokenizers

        written = json.loads(self._tokenizer.to_str())
        for token in written["added_tokens"]:
            token["special"] = token["id"] in self._control_ids
        plain = tokenizers.Tokenizer.from_str(json.dumps(written))
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _before_raw_text(self) -> list[int]:
        """What the post-processor of tokenizer.json sets before a text, as transformers' fast tokenizers do."""
        plain, ids = self.encode("a"), self._tokenizer.encode("a", add_special_tokens=True).ids
        starts = (i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
        return ids[: next(starts, 0)]

    @cached_property
    def _space_before_answer(self) -> str:
        before, _, _ = self._probe_row().partition(_ANSWER)
        return before[len(before.rstrip(" ")) :]

    def _probe_row(self) -> str:
        turns = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
        return self.render(turns, add_generation_prompt=False)

    def _end_of_turn(self) -> int:
        """Id of the special token right after an assistant's text in a rendered conversation. Raises TemplateError."""
        _, found, rest = self._probe_row().partition(_ANSWER)
        after = self.encode(rest) if found else []
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
        raise TemplateError(
            "no tokenizer.json",
            where=str(path.parent),
            fix="use a model folder with a fast tokenizer; transformers' AutoTokenizer writes one with save_pretrained",
        )
    import tokenizers

    if "model" not in read_json(path):
        raise TemplateError("not a tokenizer", where=str(path), fix="fetch the model again")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other kind for a file that it cannot read
        raise TemplateError(f"not a tokenizer: {error}", where=str(path), fix="fetch the model again") from None


def _differs(text: str, other: str) -> str:
    """The start of what `text` has where it is no longer like `other`, quoted; "nothing" at its end."""
    at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return repr(text[at : at + 24]) if at < len(text) else "nothing"
