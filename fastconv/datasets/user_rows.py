"""Finished rows that the user brings: JSONL of prompt/completion message lists, as TRL reads them.

A plain `messages` list is refused unless the recipe opts in: trainers read that form with the loss on every turn, so
accepting it silently would move the loss mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastconv.datasets.files import read_numbered_jsonl
from fastconv.datasets.personas import ASSISTANT, Personas
from fastconv.datasets.rows import Row
from fastconv.datasets.spec import Role
from fastconv.errors import DataError
from fastconv.recipe import DataSettings, sha256_of
from fastconv.chat import EMPTY, TEMPLATE_DEFAULT, SystemTurn

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
