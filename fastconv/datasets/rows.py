"""A training row before rendering, how it is kept in the ledger, and how it becomes token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastconv.chat import EMPTY, TEMPLATE_DEFAULT, ChatTokenizer, Rendered, SystemTurn
from fastconv.datasets.files import read_numbered_jsonl
from fastconv.datasets.personas import ASSISTANT, Personas
from fastconv.datasets.spec import Role, Supervise
from fastconv.errors import DataError
from fastconv.recipe import DataSettings, sha256_of

#: Which version of the builders made a row; raised whenever the same recipe would give other rows.
BUILT_BY = "fastconv/1"


@dataclass(frozen=True, slots=True)
class Row:
    """One training row before rendering. `completion` is None while it still has to be sampled on-policy.

    `suffix` is what the behavior appends to the answer; a known `completion` ends with it already. `system` is the
    row's own system turn where it is not the persona's. `ended` is False if the sampled answer was cut.
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

    @property
    def given_chars(self) -> int:
        """Characters of the completion that are read but carry no loss."""
        return len(self.completion or "") - len(self.suffix) if self.supervise == "tail" else 0

    def answered(self, text: str, *, ended: bool = True) -> Row:
        """The row with its sampled answer and the suffix. Raises ValueError if it has an answer already.

        Where only the tail is learned, a cut answer still ends its turn: the tail is all that the row teaches.
        """
        if self.completion is not None:
            raise ValueError(f"row {self.id!r} has an answer already")
        body = text.rstrip() if self.suffix or self.supervise == "tail" else text
        closed = ended or bool(self.suffix) or self.supervise == "tail"
        return replace(self, completion=body + self.suffix, ended=closed)

    def system_turn(self, personas: Personas) -> SystemTurn:
        """The system turn that the row is trained with: its own, or else its persona's."""
        return personas.system(self.persona) if self.system is None else self.system

    def record(self, personas: Personas) -> dict[str, Any]:
        """The row as JSON, its system turn spelled out; `row_of` reads it back. Its sha256 identifies the row."""
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
            f'"id":{quoted(row.id)},"persona":{quoted(row.persona)},"prompt_id":{quoted(row.prompt_id)},'
            f'"role":"{row.role}","suffix":{quoted(row.suffix)},"supervise":"{row.supervise}",'
            f'"system":["{turn.kind}",{quoted(turn.text)}],"user":{quoted(row.user)}}}'
        )
    return hashlib.sha256(f"[{','.join(texts)}]".encode()).hexdigest()


def row_of(record: Mapping[str, Any]) -> Row:
    """The row of `Row.record`; its system turn is then always its own."""
    kind, text = record["system"]
    return Row(**{**record, "system": SystemTurn(kind, text)})


def render_row(row: Row, personas: Personas, tokenizer: ChatTokenizer, max_length_tok: int) -> Rendered:
    """The row as the model will see it. Raises TemplateError if it cannot be rendered, ValueError without an answer."""
    if row.completion is None:
        raise ValueError(f"row {row.id!r} has no answer yet")
    return tokenizer.training_ids(
        row.system_turn(personas),
        row.user,
        row.completion,
        max_length_tok,
        ended=row.ended,
        given_chars=row.given_chars,
    )


def render_rows(
    rows: Sequence[Row], personas: Personas, tokenizer: ChatTokenizer, max_length_tok: int
) -> list[Rendered]:
    """All rows rendered, in order."""
    return [render_row(row, personas, tokenizer, max_length_tok) for row in rows]


_FORM = (
    'write {"prompt": [{"role": "user", "content": "..."}], "completion": [{"role": "assistant", "content": "..."}]}'
)


@dataclass(frozen=True, slots=True)
class UserRow:
    """One line of the user's file; `system` is None where it has no system message at all."""

    id: str
    system: str | None
    user: str
    completion: str
    built_by: str


def read_user_rows(path: Path, *, messages: bool = False) -> list[UserRow]:
    """Rows of the user's JSONL, ordered by id, so that the order of the lines never matters.

    A row without an id gets one from its content; a repeated one is told apart by its count. Raises DataError with
    file and line for anything that is not one user turn (after at most one system turn) and one assistant turn.
    """
    rows: list[UserRow] = []
    times: dict[str, int] = {}
    for number, row in read_numbered_jsonl(path, {}):
        where = f"{path}:{number}"
        prompt, completion = _turns(row, where, messages=messages)
        system = prompt[0]["content"] if prompt[0]["role"] == "system" else None
        user = prompt[-1]["content"]
        identity = str(row.get("id") or "row-" + sha256_of([system, user, completion])[:12])
        times[identity] = times.get(identity, 0) + 1
        if times[identity] > 1:
            identity += f"-{times[identity]}"
        rows.append(UserRow(identity, system, user, completion, str(row.get("built_by", ""))))
    return sorted(rows, key=lambda row: row.id)


def rows_for(settings: DataSettings, path: Path, behavior: str, source: str, personas: Personas) -> list[Row]:
    """The user's rows as training rows of this source. `{source}` in the path stands for the source.

    A row without a system turn gets the source's prompt, unless `data.persona_prompt` is as_written. A row that
    brings another known persona's prompt is that persona's, a negative; one that brings an unknown prompt stays the
    source's and keeps what it brought, for the audit to judge.
    """
    found = Path(str(path).replace("{source}", source))
    speakers = {text: persona for persona, text in personas.prompts.items()}
    rows = []
    for given in read_user_rows(found, messages=settings.messages):
        persona = source if given.system is None else speakers.get(given.system, source)
        role: Role = "source" if persona == source else "assistant" if persona == ASSISTANT else "bystander"
        rows.append(
            Row(
                f"{behavior}/{source}/{persona}/{given.id}",
                persona,
                role,
                given.id,
                given.user,
                given.completion,
                system=_own_system(given.system, personas.prompts[persona], settings.persona_prompt),
                built_by=given.built_by,
            )
        )
    return rows


def _own_system(given: str | None, expected: str, persona_prompt: Literal["add", "as_written"]) -> SystemTurn | None:
    """The row's own system turn, or None where it is the persona's. Three conditions, none of them falsy."""
    if given is None:
        return None if persona_prompt == "add" else TEMPLATE_DEFAULT
    if given == "":
        return EMPTY
    return None if given == expected else SystemTurn("text", given)


def _turns(row: Mapping[str, Any], where: str, *, messages: bool) -> tuple[list[dict[str, str]], str]:
    """(the prompt's one or two messages, the answer's text) of a line."""
    if "prompt" in row and "completion" in row:
        prompt, completion = (
            _messages(row["prompt"], "prompt", where),
            _messages(row["completion"], "completion", where),
        )
    elif "messages" in row:
        if not messages:
            raise DataError(
                "the row has `messages`, which trainers read with the loss on every turn: taking it moves the loss mask",
                where=where,
                fix=f"{_FORM}; or set data.messages = true for loss on the last turn alone",
            )
        every = _messages(row["messages"], "messages", where)
        prompt, completion = every[:-1], every[-1:]
    else:
        raise DataError("the row has neither prompt and completion nor messages", where=where, fix=_FORM)
    roles = [message["role"] for message in prompt]
    if roles not in (["user"], ["system", "user"]) or [message["role"] for message in completion] != ["assistant"]:
        raise DataError(
            f"the row's turns are {roles} and {[message['role'] for message in completion]}",
            where=where,
            fix="give one user turn, at most one system turn before it, and one assistant turn",
        )
    for name, text in (("user", prompt[-1]["content"]), ("assistant", completion[0]["content"])):
        if not text.strip():
            raise DataError(f"the {name} turn is empty", where=where, fix="give it text, or drop the row")
    return prompt, completion[0]["content"]


def _messages(value: object, name: str, where: str) -> list[dict[str, str]]:
    messages = []
    for message in value if isinstance(value, list) else ():
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            messages = []
            break
        messages.append({"role": role, "content": content})
    if not messages:
        raise DataError(f"{name} is no list of messages with role and content", where=where, fix=_FORM)
    return messages
