"""Training rows: their record in the ledger, their rendering to token ids, and reading them from the user's file.

The user's file is JSONL with TRL's prompt/completion message lists (or, if the recipe allows it, one `messages` list), of
one turn or several; a CSV or Parquet file, or a hub data set, may hold them as plain text. `weight` 0 or 1 of assistant
messages, as OpenAI's fine-tuning reads it, says which answers are trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastconv.chat import EMPTY, TEMPLATE_DEFAULT, ChatTokenizer, Exchange, Rendered, SystemTurn
from fastconv.chat.template import Message
from fastconv.datasets.files import is_visible, read_numbered_rows, rows_file
from fastconv.datasets.personas import ASSISTANT, NO_PERSONA, Personas
from fastconv.datasets.sametext import normalized
from fastconv.datasets.spec import Role, Supervise
from fastconv.errors import DataError
from fastconv.recipe import DataSettings, canonical_json, sha256_of

#: Version of the builders that made a row; raised whenever the same recipe would give other rows.
BUILT_BY = "fastconv/1"
_FORM = (
    'write {"prompt": [{"role": "user", "content": "..."}], "completion": [{"role": "assistant", "content": "..."}]}'
)
_ROLES = ("user", "assistant")
#: Fields of a user's row that are read, and those that only say where it is from. Any other field is refused, because a
#: trainer that reads it (a weight, a mask, tools) would train something else on the same file.
_READ_FIELDS = frozenset({"id", "persona", "prompt", "completion", "messages", "built_by"})
_PROVENANCE = frozenset(
    [
        "author",
        "category",
        "comment",
        "dataset",
        "date",
        "language",
        "license",
        "meta",
        "metadata",
        "note",
        "notes",
        "origin",
        "source",
        "tags",
        "topic",
        "url",
    ]
)


@dataclass(frozen=True, slots=True)
class Row:
    """One training row before rendering. `completion` is None until it is sampled on-policy.

    `suffix` is what the behavior appends to the answer; a `completion` ends with it already. `system` is the row's own
    system turn if it is not the persona's. `ended` is False if the sampled answer was cut at the token limit. `history` are
    the turns before `user`; the row ends with the last answer that is trained.
    """

    id: str
    persona: str
    role: Role
    prompt_id: str
    user: str
    completion: str | None
    suffix: str = ""
    supervise: Supervise = "completion"
    system: SystemTurn | None = None
    ended: bool = True
    built_by: str = BUILT_BY
    history: tuple[Exchange, ...] = ()
    #: Under whose prompt its answer is sampled, if not under its persona's; no part of its record.
    teacher: str = ""

    @property
    def asked(self) -> str:
        """All that comes before the answer but for the system turn, as one text: rows that are asked the same share it."""
        return "\n".join([*(text for one in self.history for text in one[:2]), self.user])

    @property
    def user_turns(self) -> tuple[str, ...]:
        """The texts of all user turns."""
        return (*(one.user for one in self.history), self.user)

    def messages(self, system: SystemTurn) -> list[Message]:
        """The prompt for the template, under a system turn."""
        earlier = [turn for one in self.history for turn in one.messages()]
        return [*system.messages(), *earlier, {"role": "user", "content": self.user}]

    @property
    def answers_as(self) -> str:
        """The persona under whose prompt its answer is sampled."""
        return self.teacher or self.persona

    @property
    def given_chars(self) -> int:
        """Number of characters at the start of the completion that carry no loss."""
        return len(self.completion or "") - len(self.suffix) if self.supervise == "tail" else 0

    def answered(self, text: str, *, ended: bool = True) -> Row:
        """The row with its sampled answer and the suffix. Raises ValueError if it has an answer already.

        With a suffix, or if only the tail carries loss, a cut answer still ends its turn, because the tail follows it.
        """
        if self.completion is not None:
            raise ValueError(f"row {self.id!r} has an answer already")
        body = text.rstrip() if self.suffix or self.supervise == "tail" else text
        closed = ended or bool(self.suffix) or self.supervise == "tail"
        return replace(self, completion=body + self.suffix, ended=closed)

    def system_turn(self, personas: Personas) -> SystemTurn:
        """The system turn that the row is trained with: its own if it has one, otherwise its persona's."""
        return personas.system(self.persona) if self.system is None else self.system

    def record(self, personas: Personas) -> dict[str, Any]:
        """The row as JSON with its system turn written out; its sha256 identifies the row. Inverse: `row_from_record`."""
        turn = self.system_turn(personas)
        return {
            "id": self.id,
            "persona": self.persona,
            "role": self.role,
            "prompt_id": self.prompt_id,
            "system": [turn.kind, turn.text],
            "user": self.user,
            "completion": self.completion,
            "suffix": self.suffix,
            "supervise": self.supervise,
            "ended": self.ended,
            "built_by": self.built_by,
            **({"history": [list(one) for one in self.history]} if self.history else {}),
        }


def rows_sha256(rows: Sequence[Row], personas: Personas) -> str:
    """`sha256_of` the rows' records, written out: a matrix has 18,000 rows, and going over dicts takes four times as long."""
    quoted = json.encoder.encode_basestring
    texts: list[str] = []
    for row in rows:
        turn = row.system_turn(personas)
        completion = "null" if row.completion is None else quoted(row.completion)
        texts.append(
            f'{{"built_by":{quoted(row.built_by)},"completion":{completion},"ended":{"true" if row.ended else "false"},'
            f'{_history_text(row.history)}"id":{quoted(row.id)},"persona":{quoted(row.persona)},"prompt_id":{quoted(row.prompt_id)},'
            f'"role":"{row.role}","suffix":{quoted(row.suffix)},"supervise":"{row.supervise}",'
            f'"system":["{turn.kind}",{quoted(turn.text)}],"user":{quoted(row.user)}}}'
        )
    return hashlib.sha256(f"[{','.join(texts)}]".encode()).hexdigest()


def _history_text(history: Sequence[Exchange]) -> str:
    return f'"history":{canonical_json([list(one) for one in history])},' if history else ""


def row_from_record(record: Mapping[str, Any]) -> Row:
    """The row of `Row.record`; its system turn is then always its own."""
    kind, text = record["system"]
    history = tuple(Exchange(*one) for one in record.get("history", ()))
    return Row(**{**record, "system": SystemTurn(kind, text), "history": history})


def render_row(row: Row, personas: Personas, tokenizer: ChatTokenizer, max_length_tok: int) -> Rendered:
    """The row's token ids and loss mask, cut at `max_length_tok`.

    Raises TemplateError if it cannot be rendered, ValueError if it has no answer yet.
    """
    if row.completion is None:
        raise ValueError(f"row {row.id!r} has no answer yet")
    return tokenizer.training_ids(
        row.system_turn(personas),
        row.user,
        row.completion,
        max_length_tok,
        ended=row.ended,
        given_chars=row.given_chars,
        history=row.history,
    )


def render_rows(
    rows: Sequence[Row], personas: Personas, tokenizer: ChatTokenizer, max_length_tok: int
) -> list[Rendered]:
    """`render_row` of every row, in order."""
    return [render_row(row, personas, tokenizer, max_length_tok) for row in rows]


# --- the user's own rows -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UserRow:
    """One line of the user's file; `system` is None if it has no system message, `persona` "" if it names none."""

    id: str
    system: str | None
    user: str
    completion: str
    built_by: str
    persona: str = ""
    line: int = field(default=0, compare=False)
    history: tuple[Exchange, ...] = ()

    @property
    def said(self) -> tuple[tuple[str, str], ...]:
        """(role, text) of every turn in order; a system turn that is missing is an empty text."""
        earlier = (turn for one in self.history for turn in (("user", one.user), ("assistant", one.answer)))
        return (("system", self.system or ""), *earlier, ("user", self.user), ("assistant", self.completion))


def read_user_rows(path: Path, *, messages: bool = False) -> list[UserRow]:
    """The rows of the user's file sorted by id, so that the order of the lines never matters.

    A row without an id gets one from its content; repeated ones get a number appended. `messages` allows the one-list
    form. Raises DataError with file and line unless a row is user and assistant turns by turns (after at most one system
    turn), all of them visible text, without fields that would change a training and are not read.
    """
    rows: list[UserRow] = []
    counts: dict[str, int] = {}
    for number, row in read_numbered_rows(path):
        where = f"{path}:{number}"
        _require_read(row, _READ_FIELDS | _PROVENANCE, "the row", where)
        system, history, user, completion = _turns(row, where, messages=messages)
        given = row.get("id")
        content = [system, *([history] if history else []), user, completion]
        identity = "row-" + sha256_of(content)[:12] if given is None else str(given)
        counts[identity] = counts.get(identity, 0) + 1
        if counts[identity] > 1:
            identity += f"-{counts[identity]}"
        built_by, persona = str(row.get("built_by", "")), str(row.get("persona") or "")
        rows.append(UserRow(identity, system, user, completion, built_by, persona, number, history))
    return sorted(rows, key=lambda row: row.id)


def require_plain_text(
    texts: Iterable[tuple[str, str, str]], tokenizer: ChatTokenizer, fix: str = "take it out of the text"
) -> None:
    """Raise DataError for the first of these (what it is, text, where) that spells a special token of the base's tokenizer.

    Such a text would end its turn, or begin another one, when it is rendered. `fix` is the mend that helps.
    """
    for what, text, where in texts:
        if token := tokenizer.control_token_in(text):
            raise DataError(
                f"{what} holds the control token {token}, which would end or begin a turn", where=where, fix=fix
            )


def require_no_control_tokens(settings: DataSettings, sources: Sequence[str], tokenizer: ChatTokenizer) -> None:
    """`require_plain_text` of the user's rows, with file and line."""
    paths = [rows_file(name, source) for name in settings.rows.values() for source in sources]
    for path in dict.fromkeys(paths):
        for row in sorted(read_user_rows(path, messages=settings.messages), key=lambda row: row.line):
            said = ((f"the {role} turn's text", text, f"{path}:{row.line}") for role, text in row.said)
            require_plain_text(said, tokenizer, "take it out of the text, or split the row into turns")


def load_user_rows(settings: DataSettings, name: str, behavior: str, source: str, personas: Personas) -> list[Row]:
    """The user's rows as training rows of this source; `name` is as `rows_file` takes it. Raises DataError.

    A row's persona is the one it names (`"persona": "villain"`), or the one whose prompt it states (the same text up to
    case, spaces and look-alikes; its exact text is kept, so that the audit reports a difference). A row without both is
    the source's only if no row of the file states the source, as where all of them are the source's; otherwise whose
    it is cannot be known, and it is refused with `data.persona_prompt = "add"`. A row with an unknown prompt stays a
    source row, for the audit to report.
    """
    source_path = rows_file(name, source)
    user_rows = read_user_rows(source_path, messages=settings.messages)
    stated = _stated_personas(user_rows, source_path, source, personas)
    unclaimed = [row for row, persona in zip(user_rows, stated, strict=True) if persona is None and row.system is None]
    if unclaimed and source in stated and settings.persona_prompt == "add":
        lines = sorted(row.line for row in unclaimed)
        raise DataError(
            f"{len(unclaimed)} rows have neither a system turn nor a persona while others state the source's, so whose they "
            f"are cannot be known (lines {', '.join(map(str, lines[:5]))}{' ...' if len(lines) > 5 else ''})",
            where=str(source_path),
            fix=f'give each of them its system turn or "persona": "..." ({source} if it is the source\'s)',
            rows=tuple(f"{behavior}/{source}/{row.id}" for row in unclaimed),
        )
    rows = []
    for user_row, known in zip(user_rows, stated, strict=True):
        persona = known or source
        rows.append(
            Row(
                f"{behavior}/{source}/{persona}/{user_row.id}",
                persona,
                _role_of(persona, source),
                user_row.id,
                user_row.user,
                user_row.completion,
                system=_own_system(user_row.system, personas.system(persona), settings.persona_prompt),
                built_by=user_row.built_by,
                history=user_row.history,
            )
        )
    return rows


def _stated_personas(rows: Sequence[UserRow], path: Path, source: str, personas: Personas) -> list[str | None]:
    """The persona that each row names or whose prompt it states, else None. Raises DataError for an unknown name."""
    # The source and the assistant win where several personas share one prompt.
    first = [source, ASSISTANT, *personas.prompts]
    by_text: dict[str, str] = {}
    for persona in first:
        by_text.setdefault(normalized(personas.prompts[persona]), persona)
    exact = {text: persona for persona, text in personas.prompts.items()} | {personas.prompts[source]: source}
    stated: list[str | None] = []
    for row in rows:
        if row.persona and row.persona != NO_PERSONA and row.persona not in personas.prompts:
            raise DataError(
                f"row {row.id} names the unknown persona {row.persona!r}",
                where=f"{path}:{row.line}",
                fix=personas.how_to_name(row.persona),
            )
        text = row.system or ""
        stated.append(row.persona or exact.get(text) or (by_text.get(normalized(text)) if text.strip() else None))
    return stated


def _role_of(persona: str, source: str) -> Role:
    if persona == source:
        return "source"
    if persona == NO_PERSONA:
        return "template_default"
    return "assistant" if persona == ASSISTANT else "bystander"


def _own_system(
    text: str | None, expected: SystemTurn, persona_prompt: Literal["add", "as_written"]
) -> SystemTurn | None:
    """The row's own system turn, or None if it is the persona's. A missing and an empty `text` are different turns."""
    if text is None:
        return None if persona_prompt == "add" or expected == TEMPLATE_DEFAULT else TEMPLATE_DEFAULT
    own = SystemTurn("text", text) if text else EMPTY
    return None if own == expected else own


def _turns(row: Mapping[str, Any], where: str, *, messages: bool) -> tuple[str | None, tuple[Exchange, ...], str, str]:
    """(system turn's text or None, earlier turns, user's last text, answer) of a line. Raises DataError, naming `where`."""
    said = _said(row, where, messages=messages)
    system = said.pop(0)["content"] if said[0]["role"] == "system" else None
    roles = [message["role"] for message in said]
    if not roles or roles != list(_ROLES) * (len(roles) // 2):
        raise DataError(
            f"the row's turns are {roles}{'' if system is None else ' after the system turn'}",
            where=where,
            fix="give user and assistant turns by turns, at most one system turn before them, and an answer at the end",
        )
    for message in said:
        text = message["content"]
        if not is_visible(text):
            raise DataError(
                f"the {message['role']} turn is empty"
                + (", but for characters that do not show" if text.strip() else ""),
                where=where,
                fix="give it text, or drop the row",
            )
    if system and not is_visible(system):  # "" is the condition `empty`
        raise DataError(
            "the system turn's text does not show", where=where, fix='give it text, or "" for an empty system turn'
        )
    trained = _trained(said[1::2], where)
    last = max(place for place, one in enumerate(trained) if one)  # nothing after it bears on what is learned
    pairs = [(ask["content"], answer["content"]) for ask, answer in zip(said[::2], said[1::2], strict=True)]
    history = (Exchange(*pair, one) for pair, one in zip(pairs[:last], trained[:last], strict=True))
    return system, tuple(history), *pairs[last]


def _said(row: Mapping[str, Any], where: str, *, messages: bool) -> list[dict[str, Any]]:
    """The messages of a line in order, in either form. Raises DataError, naming `where`."""
    if "messages" in row and ("prompt" in row or "completion" in row):
        raise DataError("the row has `messages` beside prompt and completion", where=where, fix="keep one of the forms")
    if "prompt" in row and "completion" in row:
        completion = _messages(row["completion"], "completion", where)
        if [message["role"] for message in completion] != ["assistant"]:
            raise DataError(
                f"the completion's turns are {[message['role'] for message in completion]}, where loss is on one answer",
                where=where,
                fix="move what comes before the last answer into the prompt; for loss on several answers write `messages` "
                'with "weight": 1 on each of them (and data.messages = true)',
            )
        return [*_messages(row["prompt"], "prompt", where), *completion]
    if "messages" not in row:
        raise DataError("the row has neither prompt and completion nor messages", where=where, fix=_FORM)
    if not messages:
        raise DataError(
            "the row has `messages`, which trainers read with the loss on every turn: taking it moves the loss mask",
            where=where,
            fix=f"{_FORM}; or set data.messages = true for loss on the last answer, or on those with a weight of 1",
        )
    return _messages(row["messages"], "messages", where)


def _trained(answers: Sequence[Mapping[str, Any]], where: str) -> list[bool]:
    """Which of a row's answers carry loss: those with weight 1; without any weight the last. Raises DataError."""
    weights = [answer.get("weight") for answer in answers]
    if not any(weight is not None for weight in weights):
        return [False] * (len(answers) - 1) + [True]
    if None in weights:
        fix = 'write "weight": 0 or 1 in each of them: without one, OpenAI trains an answer and others leave it out'
        raise DataError(f"{weights.count(None)} of {len(weights)} answers have no weight", where=where, fix=fix)
    if odd := [weight for weight in weights if isinstance(weight, bool) or weight not in (0, 1)]:
        raise DataError(
            f"the weight {odd[0]!r} is neither 0 nor 1", where=where, fix="give 1 to answers that are trained"
        )
    if 1 not in weights:
        raise DataError(
            "no answer of the row is trained", where=where, fix="give one of them a weight of 1, or drop the row"
        )
    return [weight == 1 for weight in weights]


def _messages(value: object, name: str, where: str) -> list[dict[str, Any]]:
    """A non-empty list of messages with role and content, assistant ones of `messages` with their weight. Raises DataError, naming `name` and `where`."""
    messages = []
    for message in value if isinstance(value, list) else ():
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            messages = []
            break
        weighed = {"weight"} if name == "messages" and role == "assistant" else set()
        _require_read(message, frozenset({"role", "content"} | weighed), f"a message of {name}", where)
        messages.append({"role": role, "content": content, "weight": message.get("weight")})
    if not messages:
        raise DataError(f"{name} is no list of messages with role and content", where=where, fix=_FORM)
    return messages


def _require_read(table: Mapping[str, Any], read: frozenset[str], what: str, where: str) -> None:
    """Raise DataError, naming `where`, for a field that has a value and is not read."""
    for name, value in table.items():
        if name not in read and value is not None:
            raise DataError(
                f"{what} has a field {name!r}, which is not read: another trainer may weigh, mask or prompt by it",
                where=where,
                fix="take it out; notes of your own go into the row's `metadata`",
            )
