"""A model's chat template, rendered as transformers renders it, and the turns that it is given. Needs no transformers.

The one difference: `strftime_now` gives a pinned date, so that a prompt is the same text tomorrow.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from fastconv.errors import TemplateError
from fastconv.recipe import ModelSettings

if TYPE_CHECKING:  # slow to import, and `plan` and `status` render nothing
    import jinja2
    import tokenizers

Message = Mapping[str, str]
#: What `strftime_now` gives where the recipe pins no date: the one that Llama 3's template falls back to.
DEFAULT_DATE = datetime.date(2024, 7, 26)
OTHER_TEMPLATE = (
    "use a model whose template does, or put a chat_template.jinja that does into a local copy of its folder"
)
#: Functions that templates are given besides jinja's own.
_GIVEN = ("raise_exception", "strftime_now")


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


class Exchange(NamedTuple):
    """An earlier user turn of a conversation with its answer; `trained` says whether the answer carries loss."""

    user: str
    answer: str
    trained: bool

    def messages(self) -> list[Message]:
        """Both turns for the template."""
        return [{"role": "user", "content": self.user}, {"role": "assistant", "content": self.answer}]


class ChatTemplate:
    """The chat template of a model folder. Raises TemplateError if there is none, or it does not read its settings.

    `config` is tokenizer_config.json, `special` the texts of special tokens by name, which templates may write.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], special: Mapping[str, str], settings: ModelSettings
    ) -> None:
        self.text = _template_text(folder, config)
        self._special = special
        self._date = settings.template_date or DEFAULT_DATE
        self._kwargs = settings.template_kwargs
        self._template, self._reads = _compile(self.text, str(folder), self._date)
        self._require_read(settings)

    @cached_property
    def sha256(self) -> str:
        """sha256 (hex) of the chat template's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """The template's own variables that the recipe sets."""
        return self._kwargs

    @property
    def writes_date(self) -> bool:
        """Whether the template asks for the day, which is pinned here."""
        return "strftime_now" in self._reads

    @property
    def facts(self) -> dict[str, str]:
        """What a report says of the template: its sha256, its date if it writes one, the variables that the recipe sets."""
        facts = {"sha256": self.sha256}
        if "strftime_now" in self._reads:
            facts["date"] = self._date.isoformat()
        return facts | {name: json.dumps(value) for name, value in self._kwargs.items()}

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The template's text for these messages, as transformers writes it.

        Raises TemplateError when the template refuses them, saying whether it is the system turn that it refuses.
        """
        refusal = self._refusal(messages, add_generation_prompt)
        if isinstance(refusal, str):
            return refusal
        system = messages[0]["role"] == "system"
        if system and isinstance(self._refusal(messages[1:], add_generation_prompt), str):
            raise TemplateError(
                f"the chat template refuses a system turn, so no persona would reach the model: {refusal}",
                fix=OTHER_TEMPLATE,
            ) from refusal
        raise TemplateError(
            f"the chat template refuses these messages: {refusal}",
            fix="use another model, or put a chat_template.jinja that renders system, user and assistant into a local "
            "copy of its folder",
        ) from refusal

    def _refusal(self, messages: Sequence[Message], add_generation_prompt: bool) -> str | Exception:
        """The rendered text, or what the template raised."""
        import jinja2

        variables = {**self._special, **self._kwargs, "tools": None, "documents": None}
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            return error

    def _require_read(self, settings: ModelSettings) -> None:
        """Raise TemplateError for a setting that the template does not read: it would change nothing."""
        own = sorted(self._reads - {"messages", "add_generation_prompt", "tools", "documents", *_GIVEN, *self._special})
        for name in settings.template_kwargs:
            if name not in self._reads:
                raise TemplateError(
                    f"the chat template reads no {name!r}, so setting it changes nothing",
                    where="model.template_kwargs",
                    fix=f"use one of {', '.join(own)}" if own else "leave it out: this template has no switches",
                )
        if settings.template_date is not None and "strftime_now" not in self._reads:
            raise TemplateError(
                "the chat template writes no date of its own", where="model.template_date", fix="leave it out"
            )


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TemplateError(f"not valid JSON: {error}", where=str(path), fix="fetch the model again") from None
    if not isinstance(table, dict):
        raise TemplateError("not a JSON object", where=str(path), fix="fetch the model again")
    return table


def _template_text(folder: Path, config: Mapping[str, Any]) -> str:
    """The template in chat_template.jinja or in the tokenizer's config. Raises TemplateError without one."""
    path = folder / "chat_template.jinja"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"it cannot be read: {error}", where=str(path), fix="fetch the model again") from None
    if isinstance(text, list):  # several named templates: take the default
        tables = [entry for entry in text if isinstance(entry, Mapping)]
        text = next((entry.get("template") for entry in tables if entry.get("name") == "default"), None)
    if not text:
        raise TemplateError(
            "the tokenizer has no chat template",
            where=str(folder),
            fix="use an instruct model, or add chat_template.jinja to the folder",
        )
    return str(text)


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that transformers passes to a template, by name."""
    names = [f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    extra = config.get("extra_special_tokens")
    given = {**{name: config.get(name) for name in names}, **(extra if isinstance(extra, Mapping) else {})}
    return {name: text for name, entry in given.items() if (text := _token_text(entry))}


def _token_text(entry: object) -> str:
    """The text of a special token in the tokenizer's config, given as text or as a table; "" without one."""
    if isinstance(entry, Mapping):
        return str(entry.get("content", ""))
    return str(entry) if entry else ""


def _compile(text: str, where: str, date: datetime.date) -> tuple[jinja2.Template, frozenset[str]]:
    """(template, names that it reads), in the environment of transformers' `_compile_jinja_template`.

    `strftime_now` formats the pinned `date` (at midnight) instead of the present moment.
    """
    import jinja2
    from jinja2 import meta, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks an assistant's text for masks; what stands in it is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

        def _as_it_is(self, caller: Any) -> str:
            return caller()

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    try:
        reads = frozenset(meta.find_undeclared_variables(environment.parse(text)))  # leaves out what is global by then
    except jinja2.TemplateError as error:
        raise TemplateError(
            f"the chat template does not parse: {error}", where=where, fix="fetch the model again"
        ) from None
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = datetime.datetime.combine(date, datetime.time()).strftime
    return environment.from_string(text), reads


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json. Raises TemplateError if there is none or it cannot be read."""
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


def differs(text: str, other: str) -> str:
    """The start of what `text` has where it is no longer like `other`, quoted; "nothing" at its end."""
    at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return repr(text[at : at + 24]) if at < len(text) else "nothing"
