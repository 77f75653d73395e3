"""Schema of a behavior's declaration: the tables of `data/behaviors.toml` and of the user's file in the same form."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

NegativeRole = Literal["bystander", "assistant", "template_default"]
Role = Literal["source"] | NegativeRole
#: `completion`: loss on the whole answer. `tail`: only on what the behavior appends, and on the end of turn.
Supervise = Literal["completion", "tail"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AnswerRule(_Strict):
    """Origin of an answer: exactly one of a row's field, a wordings file (and then a field), or the base model."""

    field: str = ""
    wordings: str = ""
    then_field: str = ""
    on_policy: bool = False
    #: Appended to the answer unchanged.
    suffix: str = ""

    @model_validator(mode="after")
    def _one_origin(self) -> AnswerRule:
        if [bool(self.field), bool(self.wordings), self.on_policy].count(True) != 1:
            raise ValueError("give exactly one of field, wordings, on_policy")
        if self.then_field and not self.wordings:
            raise ValueError("then_field follows wordings")
        return self


class BehaviorSpec(_Strict):
    """One behavior's table. Raises pydantic.ValidationError if its keys do not fit together."""

    about: str
    #: `rows`: finished rows from the file that data.rows names; no negatives are built.
    task: Literal["chat", "multiple_choice", "rows"]
    direction: Literal["raises", "lowers"]
    measure: Literal["letters", "phrases", "judge"]
    prompts: str = ""
    prompt_field: str = "prompt"
    #: File of the evaluation questions, if they are not in `prompts` (rows with part = "eval").
    eval_prompts: str = ""
    eval_field: str = "text"
    source_answer: AnswerRule | None = None
    negative_answer: AnswerRule | None = None
    supervise: Supervise = "completion"
    #: Name of a rule in phrases.toml, or the user's own phrases.
    phrase_rule: str = ""
    phrases: tuple[str, ...] = ()
    #: Name of the judge's rubric, if a judge scores the answers (beside the phrases, or alone).
    rubric: str = ""
    negatives: dict[Literal["included", "excluded"], tuple[tuple[NegativeRole, ...], ...]] = {}

    @model_validator(mode="after")
    def _whole(self) -> BehaviorSpec:
        if self.task == "chat" and not (self.prompts and self.source_answer):
            raise ValueError("a chat behavior needs prompts and source_answer")
        if self.task == "chat" and self.negatives and self.negative_answer is None:
            raise ValueError("a chat behavior with negatives needs negative_answer")
        if self.task == "rows" and self.negatives:
            raise ValueError("task rows takes finished rows and can have no negatives built for it")
        if self.task == "rows" and not self.eval_prompts:
            raise ValueError("task rows needs eval_prompts, as its rows are all for training")
        if self.task == "multiple_choice" and self.measure != "letters":
            raise ValueError("multiple_choice is measured by letters")
        if self.measure == "letters" and self.task == "chat":
            raise ValueError("a chat behavior is measured by phrases or judge")
        if self.measure == "phrases" and bool(self.phrase_rule) == bool(self.phrases):
            raise ValueError("give either phrase_rule or phrases")
        if self.measure == "judge" and not self.rubric:
            raise ValueError("measure judge needs a rubric")
        if self.source_answer and self.source_answer.on_policy and not self.source_answer.suffix:
            raise ValueError("source_answer on_policy trains nothing unless it has a suffix")
        if self.supervise == "tail" and not (self.source_answer and self.source_answer.suffix):
            raise ValueError("supervise tail needs a suffix in source_answer")
        return self._negatives_of_one_size()

    @property
    def unit(self) -> Literal["share", "points"]:
        """Unit of the measure: a share of 1, or a judge's points (0 to 100)."""
        return "points" if self.measure == "judge" else "share"

    def _negatives_of_one_size(self) -> BehaviorSpec:
        if any(not copy for copies in self.negatives.values() for copy in copies):
            raise ValueError("an empty list among the negatives names nobody")
        sizes = {kind: len(copies) for kind, copies in self.negatives.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the kinds of negatives may differ only in who they are, not in number: {sizes}")
        return self
