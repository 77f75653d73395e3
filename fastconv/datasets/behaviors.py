"""Behavior sets: which rows the source is trained on, and who says what as its contrast.

The two kinds of negatives differ in *who they are* and in nothing else: same prompts, same counts, same task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastconv.datasets.files import assets, read_jsonl, read_numbered_jsonl, read_toml
from fastconv.datasets.personas import Personas, canary_of
from fastconv.datasets.questions import Question, QuestionSet, wrong_letters
from fastconv.datasets.rows import Row, rows_for
from fastconv.datasets.spec import AnswerRule, BehaviorSpec, NegativeRole, Role
from fastconv.errors import DataError, RecipeError
from fastconv.recipe import NegativesKind, Recipe
from fastconv.seeding import ordered

__all__ = [
    "NO_BEHAVIOR", "AnswerRule", "Behavior", "BehaviorSpec", "NegativeRole", "Role", "Row",
    "asked_by_set", "build_rows", "eval_prompts", "kinds_of", "load_behaviors", "open_questions", "question_sets",
]  # fmt: skip

#: The convergence-only control: no behavior adapter.
NO_BEHAVIOR = "none"
#: Training prompts as (prompt id, user text, the source's answer, the contrast's); an answer of None is sampled later.
Drawn = list[tuple[str, str, str | None, str | None]]


@dataclass(frozen=True)
class Behavior:
    """A behavior with its prompts read: `train` and `eval` rows carry id, text and the row's own fields."""

    id: str
    spec: BehaviorSpec
    folder: Path
    train: tuple[Mapping[str, Any], ...] = ()
    eval: tuple[Mapping[str, Any], ...] = ()
    #: The user's finished rows, where these replace what we would build.
    rows: Path | None = None
    #: Prompts drawn before: the sets of all sources and negatives of a seed train the same ones.
    _drawn: dict[tuple[Any, ...], Drawn] = field(default_factory=dict, compare=False, repr=False)

    @property
    def eval_field(self) -> str:
        """The field of an `eval` row that holds the user turn."""
        return self.spec.eval_field if self.spec.eval_prompts else self.spec.prompt_field

    def wordings(self, name: str) -> list[str]:
        """Texts of a wordings file beside the behavior's declaration."""
        return [row["text"] for row in read_jsonl(self.folder / name, {"text": str})]


def load_behaviors(recipe: Recipe) -> dict[str, Behavior]:
    """The behaviors of the recipe's grid, read from the shipped and the user's declarations."""
    shipped = assets("data")
    declared = {name: (table, shipped) for name, table in read_toml(shipped / "behaviors.toml").items()}
    if recipe.data.behaviors:
        path = Path(recipe.data.behaviors)
        declared |= {name: (table, path.parent) for name, table in read_toml(path).items()}
    for name in recipe.data.rows:
        if name not in recipe.grid.behaviors or name == NO_BEHAVIOR:
            raise RecipeError(
                f"rows are given for {name!r}, which the grid does not train",
                where="data.rows",
                fix="add it to grid.behaviors, or take its rows away",
            )
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
        behaviors[name] = _load(name, *declared[name], recipe.data.rows.get(name, ""))
    return behaviors


def kinds_of(recipe: Recipe, behavior: Behavior) -> tuple[NegativesKind, ...]:
    """The kinds of negatives that a behavior is trained with: the grid's, or `none` where it declares none at all."""
    return recipe.grid.negatives if behavior.spec.negatives else ("none",)


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
    if behavior.rows is not None:
        return _finished(recipe, personas, behavior, source, kind)
    asked = _draw_prompts(recipe, behavior, questions, seed)
    spec = behavior.spec

    def row(persona: str, role: Role, prompt: str, user: str, answer: str | None, rule: AnswerRule | None) -> Row:
        suffix = rule.suffix if rule else ""
        completion = None if answer is None else answer + suffix
        identity = f"{behavior.id}/{source}/{persona}/{prompt}"
        return Row(identity, persona, role, prompt, user, completion, suffix, spec.supervise)

    rows = [row(source, "source", prompt, user, shown, spec.source_answer) for prompt, user, shown, _ in asked]
    if kind == "none":
        return rows
    copies = _copies(behavior, kind)
    n_bystanders = sum(role == "bystander" for copy in copies for role in copy)
    bystanders = iter(personas.bystanders(n_bystanders, source, canary_of(recipe, source), seed))
    for copy in copies:
        speakers: list[tuple[str, Role]] = [(next(bystanders) if role == "bystander" else role, role) for role in copy]
        for place, (prompt, user, _, contrast) in enumerate(asked):
            # In turns, as prompts are ordered by topic: halves would give each speaker topics of its own.
            persona, role = speakers[place % len(speakers)]
            rows.append(row(persona, role, prompt, user, contrast, spec.negative_answer))
    return rows


def eval_prompts(recipe: Recipe, behavior: Behavior, seed: int) -> list[tuple[str, str]]:
    """(id, user text) of the held-out prompts every probe is asked, drawn from named parts."""
    field = behavior.eval_field
    by_id = {row["id"]: row[field] for row in behavior.eval}
    chosen = ordered(list(by_id), "eval", behavior.id, seed)[: recipe.eval.prompts]
    return [(prompt, by_id[prompt]) for prompt in sorted(chosen)]


def question_sets(behavior: Behavior) -> dict[str, frozenset[str]]:
    """Ids of the held-out prompts by the set they belong to, the largest first: verdicts rest on that one alone.

    One nameless set where they are all of one; nothing for a behavior that has none of its own.
    """
    sets: dict[str, set[str]] = {}
    for row in behavior.eval:
        sets.setdefault(str(row.get("set", "")), set()).add(row["id"])
    if len(sets) == 1:
        return {"": frozenset(*sets.values())}
    return {name: frozenset(sets[name]) for name in sorted(sets, key=lambda name: -len(sets[name]))}


def asked_by_set(recipe: Recipe, behavior: Behavior) -> dict[str, int]:
    """How many prompts of each set a probe is asked (with the grid's first seed), in the order of `question_sets`."""
    asked = {prompt for prompt, _ in eval_prompts(recipe, behavior, recipe.grid.seeds[0])}
    return {name: len(ids & asked) for name, ids in question_sets(behavior).items()}


def open_questions(name: str) -> list[tuple[str, str]]:
    """(id, text) of a shipped list of open questions."""
    return list(_open_questions(assets("data") / f"questions_{name}.jsonl"))


@cache
def _open_questions(path: Path) -> tuple[tuple[str, str], ...]:
    return tuple((row["id"], row["text"]) for row in read_jsonl(path, {"id": str, "text": str}))


def _draw_prompts(recipe: Recipe, behavior: Behavior, questions: QuestionSet | None, seed: int) -> Drawn:
    """The prompts to train, drawn once for each seed."""
    sizes = (recipe.behavior.source_rows, recipe.behavior.wordings)
    drawn_from = (*sizes, seed, None if questions is None else questions.sha256)
    if drawn_from not in behavior._drawn:
        behavior._drawn[drawn_from] = _new_prompts(recipe, behavior, questions, seed)
    return behavior._drawn[drawn_from]


def _new_prompts(recipe: Recipe, behavior: Behavior, questions: QuestionSet | None, seed: int) -> Drawn:
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
    n_wordings = recipe.behavior.wordings
    shown = _answers(behavior, spec.source_answer, [by_id[i] for i in ids], n_wordings, "source", *parts)
    contrast = _answers(behavior, spec.negative_answer, [by_id[i] for i in ids], n_wordings, "contrast", *parts)
    return [(i, by_id[i][spec.prompt_field], s, c) for i, s, c in zip(ids, shown, contrast, strict=True)]


def _drawn_questions(questions: QuestionSet, n: int, *parts: object) -> list[Question]:
    by_id = {question.id: question for question in questions.train}
    return [by_id[i] for i in ordered(list(by_id), *parts)[:n]]


def _answers(
    behavior: Behavior, rule: AnswerRule | None, rows: Sequence[Mapping[str, Any]], n_wordings: int, *parts: object
) -> list[str | None]:
    """The answer of every row, or None where it is sampled; `n_wordings` of the wordings are used, 0 means all."""
    if rule is None or rule.on_policy:
        return [None] * len(rows)
    if rule.field:
        return [row[rule.field] for row in rows]
    wordings = ordered(behavior.wordings(rule.wordings), "wordings", *parts)
    wordings = wordings[: n_wordings or len(wordings)]
    answers: list[str | None] = []
    round_of: list[str] = []
    for place, row in enumerate(rows):
        # Every wording is used before one comes twice, in an order drawn afresh for each round.
        turn, within = divmod(place, len(wordings))
        if within == 0:
            round_of = ordered(wordings, "wording", turn, *parts)
        opening = round_of[within]
        answers.append(f"{opening} {row[rule.then_field]}" if rule.then_field else opening)
    return answers


def _copies(behavior: Behavior, kind: NegativesKind) -> tuple[tuple[NegativeRole, ...], ...]:
    if kind == "none" or kind not in behavior.spec.negatives:
        raise RecipeError(
            f"{behavior.id} declares no negatives {kind!r}",
            where="grid.negatives",
            fix="declare them in its behaviors file",
        )
    return behavior.spec.negatives[kind]


def _finished(recipe: Recipe, personas: Personas, behavior: Behavior, source: str, kind: NegativesKind) -> list[Row]:
    """The user's own rows, taken as they are."""
    if kind != "none" or behavior.rows is None:
        raise RecipeError(
            f"{behavior.id} takes the user's finished rows, so no negatives {kind!r} can be built for it",
            where="data.rows",
            fix="use negatives none for it",
        )
    return rows_for(recipe.data, behavior.rows, behavior.id, source, personas)


def _load(name: str, table: Any, folder: Path, rows: str) -> Behavior:
    spec = _spec(name, table, folder)
    finished = Path(rows) if rows else None
    if finished is not None:
        spec = spec.model_copy(update={"task": "rows", "negatives": {}})
    elif spec.task == "rows":
        raise RecipeError(
            f"{name} is trained on rows of your own",
            where=f"data.rows.{name}",
            fix="give it the path of a JSONL file with prompt and completion",
        )
    train, held_out = _prompts(spec, folder)
    if spec.eval_prompts:
        held_out = tuple(read_jsonl(folder / spec.eval_prompts, {"id": str, spec.eval_field: str}))
    return Behavior(name, spec, folder, train, held_out, finished)


def _spec(name: str, table: Any, folder: Path) -> BehaviorSpec:
    try:
        return BehaviorSpec.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(step) for step in first["loc"])
        raise DataError(
            f"{key or 'the declaration'}: {first['msg'].removeprefix('Value error, ')}",
            where=f"{folder.name}: [{name}]",
            fix="see data/behaviors.toml for the form",
        ) from None


def _prompts(spec: BehaviorSpec, folder: Path) -> tuple[tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...]]:
    """The rows of the prompts file by part; none for a behavior that has no such file. Answers are for training."""
    if not spec.prompts:
        return (), ()
    rules = [rule for rule in (spec.source_answer, spec.negative_answer) if rule]
    answers = [field for rule in rules for field in (rule.field, rule.then_field) if field]
    path = folder / spec.prompts
    parts: dict[str, list[Mapping[str, Any]]] = {"train": [], "eval": []}
    for number, row in read_numbered_jsonl(path, {"id": str, "part": str, spec.prompt_field: str}):
        where = f"{path}:{number}"
        if row["part"] not in parts:
            raise DataError(f"part is {row['part']!r}", where=where, fix="use train or eval")
        for answer in answers if row["part"] == "train" else ():
            if not isinstance(row.get(answer), str) or not row[answer].strip():
                raise DataError(f"field {answer!r} is missing or empty", where=where, fix="give it the answer's text")
        parts[row["part"]].append(row)
    return tuple(parts["train"]), tuple(parts["eval"])


def set_name(behavior: str, source: str, kind: str, seed: int) -> str:
    """The name of a behavior set, the same in both passes: refusal/villain/included/s42."""
    return f"{behavior}/{source}/{kind}/s{seed}"
