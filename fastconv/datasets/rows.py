"""A training row before rendering, how it is kept in the ledger, and how it becomes token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastconv.datasets.personas import Personas
from fastconv.datasets.spec import Role, Supervise
from fastconv.chat import ChatTokenizer, Rendered, SystemTurn

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
