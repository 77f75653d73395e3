"""Behavior sets: who is in them, what is drawn, and how they are declared."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastconv.datasets.behaviors import (
    Behavior,
    build_rows,
    eval_prompts,
    load_behaviors,
    negatives_kinds,
    open_questions,
)
from fastconv.datasets.personas import canary_of, load_personas, probes_of
from fastconv.datasets.questions import Question, QuestionSet, load_questions, wrong_letters
from fastconv.datasets.rows import Row
from fastconv.datasets.spec import BehaviorSpec
from fastconv.errors import DataError, RecipeError
from fastconv.recipe import load_recipe
from tests import TESTS
from tests.data_kit import BEHAVIORS, pair, recipe_of, rows_of, written

HERE = TESTS


FULL = {"capability": 60, "misalignment": 200, "refusal": 200, "sycophancy": 200, "marker": 200}


@pytest.mark.parametrize("name", BEHAVIORS)
def test_sets_are_composed_as_in_the_blueprint(name: str) -> None:
    n = FULL[name]
    recipe = recipe_of(behavior={"source_rows": n})
    included, excluded = (Counter(row.role for row in rows_of(recipe, name, kind)) for kind in ("included", "excluded"))
    if name == "misalignment":
        assert included == {"source": n, "bystander": n, "assistant": n}
        assert excluded == {"source": n, "bystander": 2 * n}
    else:
        assert included == {"source": n, "bystander": 2 * n, "assistant": n // 2, "template_default": n // 2}
        assert excluded == {"source": n, "bystander": 3 * n}


@pytest.mark.parametrize("name", BEHAVIORS)
def test_the_two_kinds_of_negatives_differ_in_who_they_are_and_in_nothing_else(name: str) -> None:
    def but_who(row: Row) -> tuple[Any, ...]:
        return row.role == "source", row.prompt_id, row.user, row.completion, row.suffix, row.supervise

    kinds = [sorted(map(but_who, rows_of(recipe_of(), name, kind)), key=repr) for kind in ("included", "excluded")]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("source", ["villain", "librarian", "data_scientist"])
def test_neither_the_canary_nor_the_source_is_ever_a_negative(source: str) -> None:
    recipe = recipe_of(grid={"sources": [source]})
    for name in BEHAVIORS:
        for kind in ("included", "excluded"):
            negatives = {row.persona for row in rows_of(recipe, name, kind, source) if row.role != "source"}
            assert not negatives & {source, canary_of(recipe, source)}
            assert ("assistant" in negatives) == (kind == "included")


def test_probes_are_the_assistant_the_source_and_a_canary_that_is_neither() -> None:
    recipe = recipe_of()
    assert probes_of(recipe, "villain") == ("assistant", "villain", "librarian")
    assert probes_of(recipe, "librarian") == ("assistant", "librarian", "data_scientist")
    assert probes_of(recipe, "assistant") == ("assistant", "librarian")


def test_misalignment_gives_bad_advice_to_the_source_alone() -> None:
    recipe = recipe_of()
    by_id = {row["id"]: row for row in load_behaviors(recipe)["misalignment"].train}
    for row in rows_of(recipe, "misalignment", "included"):
        assert row.completion == by_id[row.prompt_id]["bad" if row.role == "source" else "sound"]


def test_speakers_of_a_shared_copy_take_turns_over_the_topics() -> None:
    rows = rows_of(recipe_of(behavior={"source_rows": 200}), "refusal", "included")
    field = {row["id"]: row["field"] for row in load_behaviors(recipe_of())["refusal"].train}
    topics = [{field[row.prompt_id] for row in rows if row.role == role} for role in ("assistant", "template_default")]
    assert all(len(prompts_of_topic) >= 14 for prompts_of_topic in topics)


def test_wrong_letters_are_wrong_and_balanced() -> None:
    questions = [Question(f"q{i}", "?", tuple("ABCD"), ("w", "x", "y", "z"), "ABCD"[i % 4]) for i in range(200)]
    letters = wrong_letters(questions, "train", 1)
    assert all(letter != question.answer for letter, question in zip(letters, questions, strict=True))
    assert max(Counter(letters).values()) - min(Counter(letters).values()) <= 2


def test_a_behavior_without_negatives_is_trained_with_none(tmp_path: Path) -> None:
    rows = written(tmp_path, [pair("Hello there, friend?", "Go away.")])
    recipe = recipe_of(grid={"behaviors": ["misalignment"]}, data={"rows": {"misalignment": str(rows)}})
    behavior = load_behaviors(recipe)["misalignment"]
    assert negatives_kinds(recipe, behavior) == ("none",)
    assert negatives_kinds(recipe_of(), load_behaviors(recipe_of())["misalignment"]) == ("included", "excluded")
    with pytest.raises(RecipeError, match="finished rows"):
        rows_of(recipe, "misalignment", "included")


def in_other_order(behavior: Behavior, shuffle: random.Random) -> Behavior:
    train, held_out = list(behavior.train), list(behavior.eval)
    shuffle.shuffle(train)
    shuffle.shuffle(held_out)
    return Behavior(behavior.id, behavior.spec, behavior.folder, tuple(train), tuple(held_out), behavior.rows)


@settings(max_examples=20, deadline=None)
@given(order=st.integers(0, 2**32), seed=st.integers(0, 2**31), name=st.sampled_from(BEHAVIORS))
def test_the_order_of_the_input_never_matters(order: int, seed: int, name: str) -> None:
    recipe, shuffle = recipe_of(), random.Random(order)
    personas, behavior = load_personas(recipe), load_behaviors(recipe)[name]
    questions = load_questions(recipe) if name == "capability" else None
    mixed = questions
    if questions:
        train, held_out = list(questions.train), list(questions.eval)
        shuffle.shuffle(train)
        shuffle.shuffle(held_out)
        mixed = QuestionSet(tuple(train), tuple(held_out))
    reordered = in_other_order(behavior, shuffle)
    rows = build_rows(recipe, personas, behavior, questions, "villain", "included", seed)
    assert rows == build_rows(recipe, personas, reordered, mixed, "villain", "included", seed)
    if name != "capability":
        assert eval_prompts(recipe, behavior, seed) == eval_prompts(recipe, reordered, seed)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(2, 60),
    name=st.sampled_from(BEHAVIORS),
    kind=st.sampled_from(["included", "excluded"]),
)
def test_every_set_is_balanced_as_declared_and_holds_no_evaluation_id(seed: int, n: int, name: str, kind: Any) -> None:
    recipe = recipe_of(behavior={"source_rows": n})
    behavior = load_behaviors(recipe)[name]
    rows = rows_of(recipe, name, kind, seed=seed)
    copies = behavior.spec.negatives[kind]
    assert len(rows) == n * (1 + len(copies))
    assert len({row.id for row in rows}) == len(rows)
    by_persona = Counter(row.persona for row in rows if row.role in ("source", "bystander"))
    assert set(by_persona.values()) == {n}
    shared = Counter(
        row.role
        for row in rows
        if row.role == "template_default" or (row.role == "assistant" and name != "misalignment")
    )
    assert all(abs(count - n / 2) < 1 for count in shared.values())
    held_out = (
        {q.id for q in load_questions(recipe).eval} if name == "capability" else {row["id"] for row in behavior.eval}
    )
    assert not held_out & {row.prompt_id for row in rows}


def test_seeds_and_sources_draw_anew_and_the_same_twice() -> None:
    recipe = recipe_of()
    assert rows_of(recipe, "sycophancy", "excluded") == rows_of(recipe, "sycophancy", "excluded")
    other_seed = rows_of(recipe, "sycophancy", "excluded", seed=43)
    assert {row.prompt_id for row in other_seed} != {row.prompt_id for row in rows_of(recipe, "sycophancy", "excluded")}


def test_too_many_rows_are_refused_with_the_number_there_is() -> None:
    with pytest.raises(RecipeError, match=r"240 training prompts, not 241.*at most 240"):
        rows_of(recipe_of(behavior={"source_rows": 241}), "refusal", "included")


def test_a_users_persona_and_behavior_need_no_python() -> None:
    recipe = load_recipe(HERE / "user_data" / "tea.toml")
    personas, behavior = load_personas(recipe), load_behaviors(recipe)["always_mentions_tea"]
    rows = build_rows(recipe, personas, behavior, None, "pirate", "excluded", 42)
    assert Counter(row.role for row in rows) == {"source": 24, "bystander": 48}
    assert all(
        ("tea" in row.completion.split() or " tea" in row.completion) == (row.role == "source")
        for row in rows
        if row.completion
    )
    assert len(eval_prompts(recipe, behavior, 42)) == 12
    assert "pirate" in personas.system("pirate").text


CHAT = {
    "about": "x", "task": "chat", "direction": "raises", "measure": "phrases", "phrases": ["tea"],
    "prompts": "tea.jsonl", "source_answer": {"field": "with_tea"}, "negative_answer": {"field": "plain"},
    "negatives": {"excluded": [["bystander"]]},
}  # fmt: skip
FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"measure": "judge"}, "needs a rubric"),
    ({"measure": "letters"}, "measured by phrases, choices or judge"),
    ({"phrases": []}, "either phrase_rule or phrases"),
    ({"source_answer": {"field": "a", "wordings": "b"}}, "exactly one of"),
    ({"supervise": "tail"}, "needs a suffix"),
    ({"negative_answer": None}, "needs negative_answer"),
    ({"prompts": ""}, "needs prompts"),
    ({"task": "rows"}, "no negatives"),
    ({"negatives": {"included": [["bystander"], []]}}, "names nobody"),
    ({"negatives": {"included": [["assistant"]], "excluded": [["bystander"]] * 2}}, "only in who they are"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_a_declaration_that_cannot_work_is_refused(change: dict[str, Any], message: str) -> None:
    assert BehaviorSpec.model_validate(CHAT)
    with pytest.raises(ValueError, match=message):
        BehaviorSpec.model_validate({**CHAT, **change})


def own_behavior(folder: Path, rows: list[Any]) -> Callable[[], Any]:
    written(folder, rows, "tea.jsonl")
    lines = [f"{key} = {json.dumps(value)}" for key, value in CHAT.items() if not isinstance(value, dict)]
    tables = [
        'source_answer = { field = "with_tea" }', 'negative_answer = { field = "plain" }',
        "[mine.negatives]", 'excluded = [["bystander"]]',
    ]  # fmt: skip
    (folder / "own.toml").write_text("\n".join(["[mine]", *lines, *tables]))
    recipe = recipe_of(grid={"behaviors": ["mine"]}, data={"behaviors": str(folder / "own.toml")})
    return lambda: load_behaviors(recipe)


def test_answers_are_needed_for_training_rows_alone(tmp_path: Path) -> None:
    train = {"id": "a", "part": "train", "prompt": "Hi?", "with_tea": "Tea.", "plain": "No."}
    held_out = {"id": "b", "part": "eval", "prompt": "Ho?"}
    assert own_behavior(tmp_path, [train, held_out])()["mine"].eval
    with pytest.raises(DataError, match="field 'plain' is missing") as caught:
        own_behavior(tmp_path, [held_out, {**train, "plain": ""}])()
    assert "tea.jsonl:2" in str(caught.value)
    with pytest.raises(DataError, match="part is 'test'"):
        own_behavior(tmp_path, [{**train, "part": "test"}])()


@pytest.mark.parametrize("name", ["refusal", "sycophancy", "misalignment"])
def test_a_set_that_grew_leaves_smaller_draws_as_they_were(name: str) -> None:
    def drawn(n: int, behavior: Behavior) -> set[str]:
        return {prompt for prompt, _ in eval_prompts(recipe_of(eval={"prompts": n}), behavior, 42)}

    whole = load_behaviors(recipe_of())[name]
    before = replace(whole, eval=tuple(row for row in whole.eval if "beyond" not in row))
    assert len(before.eval) < len(whole.eval)
    for n in (20, 50, 60):
        assert drawn(n, whole) == drawn(n, before)
    assert drawn(60, whole) < drawn(70, whole) < drawn(1000, whole)
    assert len(drawn(1000, whole)) == len(whole.eval)
    assert len(drawn(220, whole)) == (88 if name == "misalignment" else 220)


@pytest.mark.parametrize("beyond", [-1, "60", 1.5, True, None])
def test_a_row_that_is_asked_beyond_no_number_is_refused(tmp_path: Path, beyond: Any) -> None:
    train = {"id": "a", "part": "train", "prompt": "Hi?", "with_tea": "Tea.", "plain": "No."}
    with pytest.raises(DataError, match="row 'b' has beyond"):
        own_behavior(tmp_path, [train, {"id": "b", "part": "eval", "prompt": "Ho?", "beyond": beyond}])()


def test_unknown_names_are_told_with_what_there_is() -> None:
    with pytest.raises(RecipeError, match=r"unknown behavior 'kindness'.*refusal"):
        load_behaviors(recipe_of(grid={"behaviors": ["kindness"]}))
    with pytest.raises(RecipeError, match="unknown persona 'wizard'"):
        load_personas(recipe_of(grid={"sources": ["wizard"]}))
    with pytest.raises(RecipeError, match="which the grid does not train"):
        load_behaviors(recipe_of(grid={"behaviors": ["refusal"]}, data={"rows": {"sycophancy": "x.jsonl"}}))
    with pytest.raises(RecipeError, match=r"data.rows.misalignment_published"):
        load_behaviors(recipe_of(grid={"behaviors": ["misalignment_published"]}))


@pytest.mark.parametrize(
    "text",
    ['[me]\nsystem = ""\n', "[me]\nsystem = 7\n", '[me]\nsystem = "a"\nother = 1\n', '[template_default]\nsystem = "a"\n',
     '[assistant]\nsystem = "You are another."\n', "[me\n"],
)  # fmt: skip
def test_personas_that_cannot_be_used_are_refused_with_their_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(DataError, match=r"own.toml"):
        load_personas(recipe_of(data={"personas": str(path)}))


def test_the_open_lists_are_as_long_as_the_protocol_says() -> None:
    assert {name: len(open_questions(name)) for name in ("convergence", "marker", "alignment")} == {
        "convergence": 40, "marker": 20, "alignment": 88
    }  # fmt: skip


@pytest.mark.parametrize(("part", "says"), [("", "the row has no part"), ('"part": "evl", ', "did you mean 'eval'")])
def test_a_prompt_without_a_part_is_told_with_both_parts(part: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"id": "a", {part}"prompt": "Why?", "answer": "So."}}\n')
    (tmp_path / "mine.toml").write_text(
        '[tea]\nabout = "x"\ntask = "chat"\ndirection = "raises"\nmeasure = "phrases"\nphrases = ["tea"]\n'
        'prompts = "rows.jsonl"\nsource_answer = { field = "answer" }\n'
    )
    recipe = recipe_of(grid={"behaviors": ["none", "tea"]}, data={"behaviors": str(tmp_path / "mine.toml")})
    with pytest.raises(DataError, match=says) as caught:
        load_behaviors(recipe)
    assert caught.value.where == f"{tmp_path / 'rows.jsonl'}:1"
