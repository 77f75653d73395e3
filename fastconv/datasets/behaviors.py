"""Behaviors and their sets of training rows: the source's rows, and those of the negatives as the contrast.

The two kinds of negatives differ only in *which personas* they are: prompts, counts and task are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastconv.datasets.files import assets, data_file, is_visible, read_jsonl, read_numbered_jsonl, read_toml
from fastconv.datasets.personas import Personas, canary_of
from fastconv.datasets.questions import Question, QuestionSet, wrong_letters
from fastconv.datasets.rows import Row, load_user_rows
from fastconv.datasets.spec import AnswerRule, BehaviorSpec, NegativeRole, Role
from fastconv.errors import DataError, RecipeError, did_you_mean
from fastconv.recipe import NegativesKind, Recipe, first_fault
from fastconv.seeding import seeded_order

#: The behavior of the convergence-only control, which trains no behavior adapter.
NO_BEHAVIOR = "none"
#: Training prompts as (prompt id, user text, the source's answer, the contrast's); an answer of None is sampled later.
Drawn = list[tuple[str, str, str | None, str | None]]


@dataclass(frozen=True)
class Behavior:
    """A behavior with its prompts: `train` and `eval` rows hold id, text and further fields of their file."""

    id: str
    spec: BehaviorSpec
    folder: Path
    train: tuple[Mapping[str, Any], ...] = ()
    eval: tuple[Mapping[str, Any], ...] = ()
    #: The user's file of finished rows, which then replace the rows built from prompts.
    rows: str | None = None
    #: Whether its protocol has negatives: `spec.negatives` is empty for finished rows, which bring their own.
    contrastive: bool = False
    #: Prompts drawn before: the sets of all sources and negatives of a seed train the same ones.
    _drawn: dict[tuple[Any, ...], Drawn] = field(default_factory=dict, compare=False, repr=False)

    @property
    def eval_field(self) -> str:
        """The field of an `eval` row that holds the user turn."""
        return self.spec.eval_field if self.spec.eval_prompts else self.spec.prompt_field

    def wordings(self, name: str) -> list[str]:
        """The texts of a wordings file beside the behavior's declaration, or a shipped one. Raises DataError."""
        return [row["text"] for row in read_jsonl(data_file(self.folder, name), {"text": str})]


def load_behaviors(recipe: Recipe) -> dict[str, Behavior]:
    """The behaviors of the recipe's grid by id, from the shipped and the user's declarations.

    Raises RecipeError for a behavior that is not declared or rows that the grid does not use, DataError for a file.
    """
    shipped = assets("data")
    declared = {
        name: (table, shipped / "behaviors.toml") for name, table in read_toml(shipped / "behaviors.toml").items()
    }
    if recipe.data.behaviors:
        path = Path(recipe.data.behaviors)
        declared |= {name: (table, path) for name, table in read_toml(path).items()}
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
                fix=did_you_mean(name, declared, f"use one of {', '.join([NO_BEHAVIOR, *declared])}.")
                + " Or add it in data.behaviors",
            )
        behaviors[name] = _load(name, *declared[name], recipe.data.rows.get(name, ""))
    return behaviors


def negatives_kinds(recipe: Recipe, behavior: Behavior) -> tuple[NegativesKind, ...]:
    """The kinds of negatives that a behavior is trained with: the grid's, or `none` if it declares none."""
    return recipe.grid.negatives if behavior.spec.negatives else ("none",)


def set_name(behavior: str, source: str, kind: str, seed: int) -> str:
    """The name of a behavior set, for example `refusal/villain/included/s42`."""
    return f"{behavior}/{source}/{kind}/s{seed}"


def build_rows(
    recipe: Recipe,
    personas: Personas,
    behavior: Behavior,
    questions: QuestionSet | None,
    source: str,
    kind: NegativesKind,
    seed: int,
) -> list[Row]:
    """The rows of one behavior set: the source's rows, then those of each copy of the prompts for the negatives.

    Prompts, wordings and bystanders are drawn by `seeding`. Completions are None where they are sampled later. Raises
    RecipeError if there are fewer prompts than `behavior.source_rows`, or if the kind is not declared.
    """
    if behavior.rows is not None:
        return _user_rows(recipe, personas, behavior, source, kind)
    prompts = _draw_prompts(recipe, behavior, questions, seed)
    spec = behavior.spec

    def row(persona: str, role: Role, prompt: str, user: str, answer: str | None, rule: AnswerRule | None) -> Row:
        suffix = rule.suffix if rule else ""
        completion = None if answer is None else answer + suffix
        identity = f"{behavior.id}/{source}/{persona}/{prompt}"
        return Row(identity, persona, role, prompt, user, completion, suffix, spec.supervise)

    rows = [row(source, "source", prompt, user, shown, spec.source_answer) for prompt, user, shown, _ in prompts]
    if kind == "none":
        return rows
    copies = _copies(behavior, kind)
    n_bystanders = sum(role == "bystander" for copy in copies for role in copy)
    bystanders = iter(personas.bystanders(n_bystanders, source, canary_of(recipe, source), seed))
    for copy in copies:
        speakers: list[tuple[str, Role]] = [(next(bystanders) if role == "bystander" else role, role) for role in copy]
        for place, (prompt, user, _, contrast) in enumerate(prompts):
            # Alternating, because prompts are ordered by topic: with halves each speaker would have its own topics.
            persona, role = speakers[place % len(speakers)]
            rows.append(row(persona, role, prompt, user, contrast, spec.negative_answer))
    return rows


def declared_rows(recipe: Recipe, behavior: Behavior, kind: str) -> int | None:
    """Number of training rows that recipe and behavior declare; None for the user's finished rows, which declare none."""
    if behavior.rows is not None:
        return None
    n_copies = {name: len(copies) for name, copies in behavior.spec.negatives.items()}
    return recipe.behavior.source_rows * (1 + dict[str, int](n_copies).get(kind, 0))


def eval_prompts(recipe: Recipe, behavior: Behavior, seed: int) -> list[tuple[str, str]]:
    """(id, user turn) of the held-out prompts that every probe is asked, drawn by `seeding` and sorted by id.

    A row with `beyond = N` takes part where eval.prompts exceeds N, after all rows with a smaller N or none. So a set
    can grow while smaller draws, and the stages that rest on them, stay what they were.
    """
    field = behavior.eval_field
    by_id = {row["id"]: row[field] for row in behavior.eval}
    waves: dict[int, list[str]] = {}
    for row in behavior.eval:
        waves.setdefault(int(row.get("beyond", 0)), []).append(row["id"])
    open_waves = [waves[least] for least in sorted(waves) if recipe.eval.prompts > least]
    order = [prompt for ids in open_waves for prompt in seeded_order(ids, "eval", behavior.id, seed)]
    return [(prompt, by_id[prompt]) for prompt in sorted(order[: recipe.eval.prompts])]


def eval_prompt_sets(behavior: Behavior) -> dict[str, frozenset[str]]:
    """Set -> ids of its held-out prompts, the largest set first; verdicts rest on the first one alone.

    The set's name is "" if there is only one. Empty for a behavior without held-out prompts of its own.
    """
    sets: dict[str, set[str]] = {}
    for row in behavior.eval:
        sets.setdefault(str(row.get("set", "")), set()).add(row["id"])
    if len(sets) == 1:
        return {"": frozenset(*sets.values())}
    return {name: frozenset(sets[name]) for name in sorted(sets, key=lambda name: -len(sets[name]))}


def n_eval_prompts_by_set(recipe: Recipe, behavior: Behavior) -> dict[str, int]:
    """Set -> number of its prompts that a probe is asked with the grid's first seed; order of `eval_prompt_sets`."""
    drawn = {prompt for prompt, _ in eval_prompts(recipe, behavior, recipe.grid.seeds[0])}
    return {name: len(ids & drawn) for name, ids in eval_prompt_sets(behavior).items()}


def n_eval_prompts_there_are(behavior: Behavior) -> tuple[int, ...]:
    """Number of held-out prompts of each set, asked or not; order of `eval_prompt_sets`."""
    return tuple(len(ids) for ids in eval_prompt_sets(behavior).values())


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
    available = len(questions.drawable) if questions is not None else len(behavior.train)
    if available < n:
        raise RecipeError(
            f"{behavior.id} has {available} training prompts, not {n}",
            where="behavior.source_rows",
            fix=f"set it to at most {available}",
        )
    parts = ("train", behavior.id, seed)
    if questions is not None:
        chosen = sorted(_draw_questions(questions, n, *parts), key=lambda question: question.id)
        return [
            (question.id, question.user, f"{wrong})", f"{question.answer})")
            for question, wrong in zip(chosen, wrong_letters(chosen, *parts), strict=True)
        ]
    by_id = {row["id"]: row for row in behavior.train}
    ids = sorted(seeded_order(list(by_id), *parts)[:n])
    spec = behavior.spec
    n_wordings = recipe.behavior.wordings
    rows = [by_id[identity] for identity in ids]
    shown = _answers(behavior, spec.source_answer, rows, n_wordings, "source", *parts)
    contrast = _answers(behavior, spec.negative_answer, rows, n_wordings, "contrast", *parts)
    users = [row[spec.prompt_field] for row in rows]
    return list(zip(ids, users, shown, contrast, strict=True))


def _draw_questions(questions: QuestionSet, n: int, *parts: object) -> list[Question]:
    by_id = {question.id: question for question in questions.drawable}
    return [by_id[identity] for identity in seeded_order(list(by_id), *parts)[:n]]


def _answers(
    behavior: Behavior, rule: AnswerRule | None, rows: Sequence[Mapping[str, Any]], n_wordings: int, *parts: object
) -> list[str | None]:
    """The answer of every row, None where it is sampled; at most `n_wordings` of the wordings are used, 0 means all."""
    if rule is None or rule.on_policy:
        return [None] * len(rows)
    if rule.field:
        return [row[rule.field] for row in rows]
    wordings = seeded_order(behavior.wordings(rule.wordings), "wordings", *parts)
    wordings = wordings[: n_wordings or len(wordings)]
    answers: list[str | None] = []
    round_wordings: list[str] = []
    for place, row in enumerate(rows):
        # Every wording is used once before one repeats, in a new order for each round.
        round_number, within = divmod(place, len(wordings))
        if within == 0:
            round_wordings = seeded_order(wordings, "wording", round_number, *parts)
        opening = round_wordings[within]
        answers.append(f"{opening} {row[rule.then_field]}" if rule.then_field else opening)
    return answers


def _copies(behavior: Behavior, kind: NegativesKind) -> tuple[tuple[NegativeRole, ...], ...]:
    """The declared copies of the prompts for this kind, each with the roles that take turns in it."""
    if kind == "none" or kind not in behavior.spec.negatives:
        raise RecipeError(
            f"{behavior.id} declares no negatives {kind!r}",
            where="grid.negatives",
            fix="declare them in its behaviors file",
        )
    return behavior.spec.negatives[kind]


def _user_rows(recipe: Recipe, personas: Personas, behavior: Behavior, source: str, kind: NegativesKind) -> list[Row]:
    """The user's finished rows, unchanged. Raises RecipeError if negatives are to be built for them."""
    if kind != "none" or behavior.rows is None:
        raise RecipeError(
            f"{behavior.id} takes the user's finished rows, so no negatives {kind!r} can be built for it",
            where="data.rows",
            fix="use negatives none for it",
        )
    return load_user_rows(recipe.data, behavior.rows, behavior.id, source, personas)


def _load(name: str, table: Any, path: Path, rows: str) -> Behavior:
    spec, folder = _spec(name, table, path), path.parent
    finished = rows or None
    contrastive = bool(spec.negatives or spec.negative_answer)
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
        held_out = tuple(read_jsonl(data_file(folder, spec.eval_prompts), {"id": str, spec.eval_field: str}))
    for row in held_out:
        if type(beyond := row.get("beyond", 0)) is not int or beyond < 0:
            raise DataError(
                f"row {row['id']!r} has beyond = {beyond!r}",
                where=str(data_file(folder, spec.eval_prompts or spec.prompts)),
                fix="give it the whole number that eval.prompts must exceed for the row to be asked",
            )
    return Behavior(name, spec, folder, train, held_out, finished, contrastive)


def _spec(name: str, table: Any, path: Path) -> BehaviorSpec:
    try:
        return BehaviorSpec.model_validate(table)
    except ValidationError as error:
        what, fix = first_fault(error, BehaviorSpec)
        raise DataError(what, where=f"{path}: [{name}]", fix=f"{fix} (data/behaviors.toml shows the form)") from None


def _prompts(spec: BehaviorSpec, folder: Path) -> tuple[tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...]]:
    """(train, eval) rows of the prompts file, both empty without one; only `train` rows need the answers' fields."""
    if not spec.prompts:
        return (), ()
    rules = [rule for rule in (spec.source_answer, spec.negative_answer) if rule]
    answers = [field for rule in rules for field in (rule.field, rule.then_field) if field]
    path = data_file(folder, spec.prompts)
    parts: dict[str, list[Mapping[str, Any]]] = {"train": [], "eval": []}
    for number, row in read_numbered_jsonl(path, {"id": str, spec.prompt_field: str}):
        where = f"{path}:{number}"
        if row.get("part") not in parts:
            stated = f"part is {row['part']!r:.40}" if "part" in row else "the row has no part"
            fix = 'give every row part = "train" or "eval" (trained on, or asked in the evaluation)'
            raise DataError(stated, where=where, fix=did_you_mean(str(row.get("part", "")), parts, fix))
        for answer in answers if row["part"] == "train" else ():
            if not isinstance(row.get(answer), str) or not is_visible(row[answer]):
                raise DataError(f"field {answer!r} is missing or empty", where=where, fix="give it the answer's text")
        parts[row["part"]].append(row)
    return tuple(parts["train"]), tuple(parts["eval"])
