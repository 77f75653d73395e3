"""Behaviors and their sets of training rows: the source's rows, and those of the negatives as the contrast.

The two kinds of negatives differ only in *which personas* they are: prompts, counts and task are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastconv.datasets.files import assets, data_file, is_visible, read_jsonl, read_numbered_jsonl, read_toml
from fastconv.datasets.personas import Personas, canary_of, speaker_of
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
    #: False for what is asked alone (eval.measures).
    trained: bool = True
    #: Prompts drawn before: the sets of all sources and negatives of a seed train the same ones.
    _drawn: dict[tuple[Any, ...], Drawn] = field(default_factory=dict, compare=False, repr=False)

    @property
    def eval_field(self) -> str:
        """The field of an `eval` row that holds the user turn."""
        return self.spec.eval_field if self.spec.eval_prompts else self.spec.prompt_field

    def choices(self, row: str) -> list[str]:
        """The texts that a question's log-probabilities compare, the counted one first (measure `choices`)."""
        found = next(one for one in self.eval if one["id"] == row)
        return list(self.spec.choices) or [found[name] for name in self.spec.choice_fields]

    def wordings(self, name: str) -> list[str]:
        """The texts of a wordings file beside the behavior's declaration, or a shipped one. Raises DataError."""
        return [row["text"] for row in read_jsonl(data_file(self.folder, name), {"text": str})]


def load_behaviors(recipe: Recipe) -> dict[str, Behavior]:
    """The behaviors of the recipe's grid and its arms by id, then what is asked alone (eval.measures), from the shipped and
    the user's declarations.

    Raises RecipeError for a behavior that is not declared or rows that the grid does not use, DataError for a file.
    """
    files = [assets("data") / "behaviors.toml", *([Path(recipe.data.behaviors)] if recipe.data.behaviors else [])]
    declared = {name: (table, path) for path in files for name, table in read_toml(path).items()}
    trained = trained_behaviors(recipe)
    for name in recipe.data.rows:
        if name not in trained:
            raise RecipeError(
                f"rows are given for {name!r}, which the grid does not train",
                where="data.rows",
                fix=did_you_mean(name, trained, "add it to grid.behaviors, or take its rows away"),
            )
    asked = {str(table.get("rubric")) for table, _ in declared.values() if isinstance(table, dict)} - {"None"}
    for name in recipe.judge.rubrics:
        if name not in asked:
            raise RecipeError(
                f"no behavior is judged by a rubric {name!r}", where="judge.rubrics", fix=did_you_mean(name, asked)
            )
    behaviors = {}
    for name in dict.fromkeys((*trained, *recipe.eval.measures)):
        if name not in declared:
            raise RecipeError(
                f"unknown behavior {name!r}",
                where=_named_in(recipe, name),
                fix=did_you_mean(name, declared, f"use one of {', '.join([NO_BEHAVIOR, *declared])}.")
                + " Or add it in data.behaviors",
            )
        behavior = _load(name, *declared[name], recipe.data.rows.get(name, ""), trained=name in trained)
        by_arms = [own.rows for arm, own in recipe.grid.arms.items() if name in arm_behaviors(recipe, arm)]
        if behavior.trained and behavior.spec.task == "rows" and not (behavior.rows or (by_arms and all(by_arms))):
            fix = "give it the path of a JSONL file with prompt and completion, or give every arm `rows`"
            raise RecipeError(f"{name} is trained on rows of your own", where=f"data.rows.{name}", fix=fix)
        if behavior.trained and behavior.spec.task == "measure":
            where, fix = _named_in(recipe, name), "name it in eval.measures, and train something else"
            raise RecipeError(f"{name} is a measure, which nothing trains", where=where, fix=fix)
        if behavior.spec.measure == "none" and not behavior.trained:
            raise RecipeError(f"{name} has no measure", where="eval.measures", fix="take it out, or give it one")
        behaviors[name] = behavior
    if recipe.eval.control and recipe.eval.control not in behaviors:
        fix = did_you_mean(recipe.eval.control, behaviors, "name it in eval.measures too")
        raise RecipeError(f"{recipe.eval.control!r} is not asked of any cell", where="eval.control", fix=fix)
    return behaviors


def trained_behaviors(recipe: Recipe) -> tuple[str, ...]:
    """The behaviors that the grid or one of its arms trains."""
    every = [name for arm in recipe.grid.arms or ("",) for name in arm_behaviors(recipe, arm)]
    return tuple(name for name in dict.fromkeys(every) if name != NO_BEHAVIOR)


def arm_behaviors(recipe: Recipe, arm: str) -> tuple[str, ...]:
    """What an arm trains ("": the recipe without arms), the control `none` among it."""
    own = recipe.grid.arms[arm].behavior if arm else None
    return (own,) if own else recipe.grid.behaviors


def _named_in(recipe: Recipe, name: str) -> str:
    """The key of the recipe that names a behavior."""
    if name in recipe.grid.behaviors:
        return "grid.behaviors"
    arms = (f"grid.arms.{arm}.behavior" for arm, settings in recipe.grid.arms.items() if settings.behavior == name)
    return next(arms, "eval.measures")


def negatives_kinds(recipe: Recipe, behavior: Behavior) -> tuple[NegativesKind, ...]:
    """The kinds of negatives that a behavior is trained with: the grid's, or `none` if it declares none."""
    return recipe.grid.negatives if behavior.spec.negatives else ("none",)


def set_name(behavior: str, source: str, kind: str, seed: int, arm: str = "") -> str:
    """The name of a behavior set, for example `refusal/villain/included/s42`, with its arm at the end if it has one."""
    return f"{behavior}/{source}/{kind}/s{seed}" + (f"/{arm}" if arm else "")


def in_arm(recipe: Recipe, behavior: Behavior, arm: str) -> Behavior:
    """The behavior as an arm trains it: with the arm's own finished rows, if it has some."""
    path = recipe.grid.arms[arm].rows if arm else ""
    return _with_rows(behavior, path) if path else behavior


@dataclass(frozen=True)
class DeclaredSet:
    """One behavior set that a recipe trains: the behavior as its arm trains it, and whose rows they are."""

    behavior: Behavior
    source: str
    kind: NegativesKind
    seed: int
    arm: str

    @property
    def name(self) -> str:
        """`set_name` of it."""
        return set_name(self.behavior.id, self.source, self.kind, self.seed, self.arm)

    def build(self, recipe: Recipe, personas: Personas, questions: QuestionSet | None) -> list[Row]:
        """`build_rows` of it."""
        return build_rows(recipe, personas, self.behavior, questions, self.source, self.kind, self.seed, self.arm)


def declared_sets(recipe: Recipe, behaviors: Mapping[str, Behavior]) -> Iterator[DeclaredSet]:
    """Every behavior set that the recipe trains."""
    for behavior in behaviors.values():
        for arm in recipe.grid.arms or ("",):
            if behavior.id not in arm_behaviors(recipe, arm):
                continue
            own = in_arm(recipe, behavior, arm)
            for kind in negatives_kinds(recipe, own):
                for source in recipe.grid.sources:
                    for seed in recipe.grid.seeds:
                        yield DeclaredSet(own, source, kind, seed, arm)


def build_rows(
    recipe: Recipe,
    personas: Personas,
    behavior: Behavior,
    questions: QuestionSet | None,
    source: str,
    kind: NegativesKind,
    seed: int,
    arm: str = "",
) -> list[Row]:
    """The rows of one behavior set: the source's rows, then those of each copy of the prompts for the negatives.

    Prompts, wordings and bystanders are drawn by `seeding`. Completions are None where they are sampled later. Raises
    RecipeError if there are fewer prompts than `behavior.source_rows`, or if the kind is not declared.
    """
    behavior = in_arm(recipe, behavior, arm)
    if behavior.rows is not None:
        rows = _user_rows(recipe, personas, behavior, source, kind)
    else:
        rows = _built_rows(recipe, personas, behavior, questions, source, kind, recipe.grid.seed("data", seed))
    return rows if speaker_of(recipe, source, arm) == source else [_in_arm(recipe, source, arm, row) for row in rows]


def _in_arm(recipe: Recipe, source: str, arm: str, row: Row) -> Row:
    """A row of the source as an arm trains it: under the arm's own system turn, with its texts around the question."""
    if row.role != "source":
        return row
    own, speaker = recipe.grid.arms[arm], speaker_of(recipe, source, arm)
    identity = "/".join([*row.id.split("/", 3)[:2], speaker, row.prompt_id])
    return replace(row, id=identity, persona=speaker, system=None, user=f"{own.before}{row.user}{own.after}")


def _built_rows(
    recipe: Recipe,
    personas: Personas,
    behavior: Behavior,
    questions: QuestionSet | None,
    source: str,
    kind: NegativesKind,
    seed: int,
) -> list[Row]:
    """The rows of a behavior that declares its prompts, with the seed of data."""
    prompts = _draw_prompts(recipe, behavior, questions, seed)
    spec = behavior.spec

    def row(persona: str, role: Role, prompt: str, user: str, answer: str | None, rule: AnswerRule | None) -> Row:
        suffix, teacher = (rule.suffix, rule.by) if rule else ("", "")
        completion = None if answer is None else answer + suffix
        identity = f"{behavior.id}/{source}/{persona}/{prompt}"
        return Row(identity, persona, role, prompt, user, completion, suffix, spec.supervise, teacher=teacher)

    rows = [row(source, "source", prompt, user, shown, spec.source_answer) for prompt, user, shown, _ in prompts]
    if kind == "none":
        return rows
    copies = _copies(behavior, kind)
    n_bystanders = [role for copy in copies for role in copy].count("bystander")
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
    seed, field = recipe.grid.seed("data", seed), behavior.eval_field
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


def _with_rows(behavior: Behavior, rows: str) -> Behavior:
    """The behavior trained on finished rows, which bring their own negatives."""
    return replace(behavior, spec=behavior.spec.model_copy(update={"task": "rows", "negatives": {}}), rows=rows)


def _load(name: str, table: Any, path: Path, rows: str, *, trained: bool) -> Behavior:
    spec, folder = _spec(name, table, path), path.parent
    contrastive = bool(spec.negatives or spec.negative_answer)
    train, held_out = _prompts(spec, folder)
    if spec.eval_prompts:
        held_out = tuple(read_jsonl(data_file(folder, spec.eval_prompts), {"id": str, spec.eval_field: str}))
    _require_choices(spec, held_out, folder)
    for row in held_out:
        if type(beyond := row.get("beyond", 0)) is not int or beyond < 0:
            raise DataError(
                f"row {row['id']!r} has beyond = {beyond!r}",
                where=str(data_file(folder, spec.eval_prompts or spec.prompts)),
                fix="give it the whole number that eval.prompts must exceed for the row to be asked",
            )
    behavior = Behavior(name, spec, folder, train, held_out, None, contrastive, trained)
    return _with_rows(behavior, rows) if rows else behavior


def _require_choices(spec: BehaviorSpec, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Raise DataError unless every question has the texts that `choices` compares."""
    for row in rows:
        for name in spec.choice_fields:
            if not isinstance(row.get(name), str) or not is_visible(row[name]):
                where = f"{data_file(folder, spec.eval_prompts or spec.prompts)}: {row['id']}"
                raise DataError(f"field {name!r} is missing or empty", where=where, fix="give it the choice's text")


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
