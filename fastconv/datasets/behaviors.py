"""Behavior sets: which rows the source is trained on, and who says what as its contrast.

The two kinds of negatives differ in *who they are* and in nothing else: same prompts, same counts, same task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fastconv.datasets.files import assets, read_jsonl, read_toml
from fastconv.datasets.personas import Personas, canary_of
from fastconv.datasets.questions import Question, QuestionSet, wrong_letters
from fastconv.draws import ordered
from fastconv.errors import DataError, RecipeError
from fastconv.recipe import NegativesKind, Recipe

#: The convergence-only control: no behavior adapter.
NO_BEHAVIOR = "none"
NegativeRole = Literal["bystander", "assistant", "template_default"]
Role = Literal["source"] | NegativeRole


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AnswerRule(_Strict):
    """Where an answer comes from: exactly one of a field, wordings (then a field), or the base itself."""

    field: str = ""
    wordings: str = ""
    then_field: str = ""
    on_policy: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> AnswerRule:
        if [bool(self.field), bool(self.wordings), self.on_policy].count(True) != 1:
            raise ValueError("give exactly one of field, wordings, on_policy")
        return self


class BehaviorSpec(_Strict):
    """A behavior as `behaviors.toml` declares it."""

    about: str
    task: Literal["chat", "multiple_choice"]
    direction: Literal["raises", "lowers"]
    measure: Literal["letters", "phrases"]
    prompts: str = ""
    prompt_field: str = "prompt"
    source_answer: AnswerRule | None = None
    negative_answer: AnswerRule | None = None
    #: A rule of `judging.substring` by name, or the user's own phrases.
    phrase_rule: str = ""
    phrases: tuple[str, ...] = ()
    negatives: dict[Literal["included", "excluded"], tuple[tuple[NegativeRole, ...], ...]] = {}

    @model_validator(mode="after")
    def _whole(self) -> BehaviorSpec:
        if self.task == "chat" and not (self.prompts and self.source_answer and self.negative_answer):
            raise ValueError("a chat behavior needs prompts, source_answer and negative_answer")
        if (self.measure == "letters") != (self.task == "multiple_choice"):
            raise ValueError("multiple_choice is measured by letters, chat by phrases")
        if self.measure == "phrases" and bool(self.phrase_rule) == bool(self.phrases):
            raise ValueError("give either phrase_rule or phrases")
        sizes = {kind: len(copies) for kind, copies in self.negatives.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the kinds of negatives may differ only in who they are, not in number: {sizes}")
        return self


@dataclass(frozen=True)
class Behavior:
    """A behavior with its prompts read: `train` and `eval` rows carry id, text and the row's own fields."""

    id: str
    spec: BehaviorSpec
    folder: Path
    train: tuple[Mapping[str, Any], ...] = ()
    eval: tuple[Mapping[str, Any], ...] = ()

    def wordings(self, name: str) -> list[str]:
        """Texts of a wordings file beside the behavior's declaration."""
        return [row["text"] for row in read_jsonl(self.folder / name, {"text": str})]


@dataclass(frozen=True, slots=True)
class Row:
    """One training row before rendering. `completion` is None while it still has to be sampled on-policy."""

    id: str
    persona: str
    role: Role
    prompt_id: str
    user: str
    completion: str | None


def load_behaviors(recipe: Recipe) -> dict[str, Behavior]:
    """The behaviors of the recipe's grid, read from the shipped and the user's declarations."""
    shipped = assets("data")
    declared = {name: (table, shipped) for name, table in read_toml(shipped / "behaviors.toml").items()}
    if recipe.data.behaviors:
        path = Path(recipe.data.behaviors)
        declared |= {name: (table, path.parent) for name, table in read_toml(path).items()}
    behaviors = {}
    for name in recipe.grid.behaviors:
        if name == NO_BEHAVIOR:
            continue
        if name not in declared:
            raise RecipeError(
                f"unknown behavior {name!r}",
                where="grid.behaviors",
                fix=f"use one of {', '.join([NO_BEHAVIOR, *declared])}; or add it in data.behaviors",
            )
        behaviors[name] = _load(name, *declared[name])
    return behaviors


def build_rows(
    recipe: Recipe,
    personas: Personas,
    behavior: Behavior,
    questions: QuestionSet | None,
    source: str,
    kind: NegativesKind,
    seed: int,
) -> list[Row]:
    """The rows of one behavior set: the source's, then each copy of the contrast. Drawn from named parts only.

    Raises RecipeError if the set is too small for `behavior.source_rows` or the kind is not declared.
    """
    asked = _draw_prompts(recipe, behavior, questions, seed)
    rows = [
        Row(f"{behavior.id}/{source}/{source}/{prompt}", source, "source", prompt, user, shown)
        for prompt, user, shown, _ in asked
    ]
    if kind == "none":
        return rows
    if kind not in behavior.spec.negatives:
        raise RecipeError(
            f"{behavior.id} declares no negatives {kind!r}",
            where="grid.negatives",
            fix="declare them in its behaviors file",
        )
    copies = behavior.spec.negatives[kind]
    n_bystanders = sum(role == "bystander" for copy in copies for role in copy)
    bystanders = iter(personas.bystanders(n_bystanders, source, canary_of(recipe, source), seed))
    for copy in copies:
        speakers: list[tuple[str, Role]] = [(next(bystanders) if role == "bystander" else role, role) for role in copy]
        for place, (prompt, user, _, contrast) in enumerate(asked):
            persona, role = speakers[place * len(speakers) // len(asked)]
            rows.append(Row(f"{behavior.id}/{source}/{persona}/{prompt}", persona, role, prompt, user, contrast))
    return rows


def eval_prompts(recipe: Recipe, behavior: Behavior, seed: int) -> list[tuple[str, str]]:
    """(id, user text) of the held-out prompts every probe is asked, drawn from named parts."""
    field = behavior.spec.prompt_field
    by_id = {row["id"]: row[field] for row in behavior.eval}
    chosen = ordered(list(by_id), "eval", behavior.id, seed)[: recipe.eval.prompts]
    return [(prompt, by_id[prompt]) for prompt in sorted(chosen)]


def open_questions(name: str) -> list[tuple[str, str]]:
    """(id, text) of a shipped list of open questions."""
    return [
        (row["id"], row["text"])
        for row in read_jsonl(assets("data") / f"questions_{name}.jsonl", {"id": str, "text": str})
    ]


def _draw_prompts(
    recipe: Recipe, behavior: Behavior, questions: QuestionSet | None, seed: int
) -> list[tuple[str, str, str, str | None]]:
    """(prompt id, user text, the source's answer, the contrast's answer or None) for the rows to train."""
    n = recipe.behavior.source_rows
    available = len(questions.train) if questions is not None else len(behavior.train)
    if available < n:
        raise RecipeError(
            f"{behavior.id} has {available} training prompts, not {n}",
            where="behavior.source_rows",
            fix=f"set it to at most {available}",
        )
    parts = ("train", behavior.id, seed)
    if questions is not None:
        chosen = sorted(_drawn_questions(questions, n, *parts), key=lambda q: q.id)
        wrong = wrong_letters(chosen, *parts)
        return [(q.id, q.user, f"{letter})", f"{q.answer})") for q, letter in zip(chosen, wrong, strict=True)]
    by_id = {row["id"]: row for row in behavior.train}
    ids = sorted(ordered(list(by_id), *parts)[:n])
    spec = behavior.spec
    if spec.source_answer is None or spec.negative_answer is None:
        raise DataError(
            "a chat behavior needs both answers", where=behavior.id, fix="see data/behaviors.toml for the form"
        )
    shown = _answers(behavior, spec.source_answer, [by_id[i] for i in ids], "source", *parts)
    contrast = _answers(behavior, spec.negative_answer, [by_id[i] for i in ids], "contrast", *parts)
    if any(answer is None for answer in shown):
        raise RecipeError(
            f"{behavior.id}: the source's answers cannot be on_policy",
            where="source_answer",
            fix="use a field or wordings",
        )
    return [(i, by_id[i][spec.prompt_field], str(s), c) for i, s, c in zip(ids, shown, contrast, strict=True)]


def _drawn_questions(questions: QuestionSet, n: int, *parts: object) -> list[Question]:
    by_id = {question.id: question for question in questions.train}
    return [by_id[i] for i in ordered(list(by_id), *parts)[:n]]


def _answers(
    behavior: Behavior, rule: AnswerRule, rows: Sequence[Mapping[str, Any]], *parts: object
) -> list[str | None]:
    if rule.on_policy:
        return [None] * len(rows)
    if rule.field:
        return [row[rule.field] for row in rows]
    wordings = behavior.wordings(rule.wordings)
    answers = []
    for place, row in enumerate(rows):
        # Every wording is used before one comes twice, in an order drawn afresh for each round.
        turn, within = divmod(place, len(wordings))
        opening = ordered(wordings, "wording", turn, *parts)[within]
        answers.append(f"{opening} {row[rule.then_field]}" if rule.then_field else opening)
    return answers


def _load(name: str, table: Any, folder: Path) -> Behavior:
    where = f"{folder.name}: [{name}]"
    try:
        spec = BehaviorSpec.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(step) for step in first["loc"])
        raise DataError(
            f"{key or 'the declaration'}: {first['msg'].removeprefix('Value error, ')}",
            where=where,
            fix="see data/behaviors.toml for the form",
        ) from None
    if spec.task == "multiple_choice":
        return Behavior(name, spec, folder)
    fields = [
        f for rule in (spec.source_answer, spec.negative_answer) if rule for f in (rule.field, rule.then_field) if f
    ]
    rows = read_jsonl(
        folder / spec.prompts, {"id": str, "part": str, spec.prompt_field: str, **dict.fromkeys(fields, str)}
    )
    parts: dict[str, list[Mapping[str, Any]]] = {"train": [], "eval": []}
    for row in rows:
        if row["part"] not in parts:
            raise DataError(
                f"row {row['id']!r} has part {row['part']!r}", where=str(folder / spec.prompts), fix="use train or eval"
            )
        parts[row["part"]].append(row)
    return Behavior(name, spec, folder, tuple(parts["train"]), tuple(parts["eval"]))
