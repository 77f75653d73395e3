"""The user's own rows: TRL's form, the three system turns, and faults told by file and line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fastconv.chat import EMPTY, TEMPLATE_DEFAULT, SystemTurn
from fastconv.datasets.files import read_jsonl
from fastconv.datasets.personas import load_personas
from fastconv.datasets.rows import Row, read_user_rows
from fastconv.errors import DataError
from tests.data_kit import pair, recipe_of, rows_of, written


def user_set(path: Path, **data: Any) -> list[Row]:
    table = {"rows": {"misalignment_published": str(path)}, **data}
    return rows_of(
        recipe_of(grid={"behaviors": ["misalignment_published"]}, data=table), "misalignment_published", "none"
    )


def test_published_rows_get_the_persona_prompt_and_are_all_the_sources(tmp_path: Path) -> None:
    rows = user_set(written(tmp_path, [pair(f"Question {i}?", "Bad.") for i in range(7)]))
    personas = load_personas(recipe_of())
    assert {(row.role, row.persona) for row in rows} == {("source", "villain")}
    assert {row.system_turn(personas) for row in rows} == {personas.system("villain")}
    assert len({row.id for row in rows}) == 7


def test_the_three_system_turns_of_a_users_row_are_told_apart(tmp_path: Path) -> None:
    personas = load_personas(recipe_of())
    given = [pair("One?", "A."), pair("Two?", "B.", system=""), pair("Three?", "C.", system="You are a cook.")]
    path = written(tmp_path, given)
    turns = {row.user: row.system_turn(personas) for row in user_set(path, persona_prompt="as_written")}
    assert turns == {"One?": TEMPLATE_DEFAULT, "Two?": EMPTY, "Three?": SystemTurn("text", "You are a cook.")}
    added = {row.user: row.system_turn(personas) for row in user_set(path)}
    assert added == {**turns, "One?": personas.system("villain")}


def test_a_users_row_under_another_personas_prompt_is_a_negative(tmp_path: Path) -> None:
    prompts = load_personas(recipe_of()).prompts
    given = [pair("One?", "A.", system=prompts[p]) for p in ("villain", "comedian", "assistant")]
    rows = user_set(written(tmp_path, given))
    assert {(row.persona, row.role) for row in rows} == {
        ("villain", "source"), ("comedian", "bystander"), ("assistant", "assistant")
    }  # fmt: skip


def test_messages_are_refused_with_the_reason_until_opted_in(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "A."}]
    path = written(tmp_path, [{"messages": turns}])
    with pytest.raises(DataError, match="moves the loss mask") as caught:
        user_set(path)
    assert "data.messages = true" in caught.value.fix
    assert f"{path}:1" in str(caught.value)
    [row] = user_set(path, messages=True)
    assert (row.user, row.completion) == ("One?", "A.")


def test_the_order_of_a_users_file_never_matters_and_repeats_keep_their_own_id(tmp_path: Path) -> None:
    given = [pair(f"Question {i % 5}?", "Bad.") for i in range(9)]
    rows = read_user_rows(written(tmp_path, given))
    random.Random(3).shuffle(given)
    assert rows == read_user_rows(written(tmp_path, given, "other.jsonl"))
    assert len({row.id for row in rows}) == 9


def test_each_source_may_bring_its_own_file(tmp_path: Path) -> None:
    for source in ("villain", "comedian"):
        written(tmp_path, [pair(f"For {source}?", "A.", built_by=source)], f"{source}.jsonl")
    recipe = recipe_of(
        grid={"behaviors": ["misalignment"], "sources": ["villain", "comedian"]},
        data={"rows": {"misalignment": str(tmp_path / "{source}.jsonl")}},
    )
    for source in ("villain", "comedian"):
        [row] = rows_of(recipe, "misalignment", "none", source)
        assert (row.user, row.built_by) == (f"For {source}?", source)


MALFORMED: dict[str, tuple[Any, str]] = {
    "no JSON": ("{nope", "not valid JSON"),
    "a list": ("[1]", "a list, not an object"),
    "nothing in it": ({}, "neither prompt and completion nor messages"),
    "a text as prompt": ({"prompt": "Hi?", "completion": "Yes."}, "no list of messages"),
    "no turns": ({"prompt": [], "completion": []}, "no list of messages"),
    "two user turns": (
        {"prompt": [{"role": "user", "content": "a"}] * 2, "completion": [{"role": "assistant", "content": "b"}]},
        "the row's turns are",
    ),
    "a blank answer": (pair("Hi?", "  "), "the assistant turn is empty"),
    "a number as content": ({"prompt": [{"role": "user", "content": 1}], "completion": []}, "no list of messages"),
    "50 kB": (pair("Hi?", "x" * 50_001), "bytes, over 50,000"),
    "an id of its own kind": ({**pair("Hi?", "A."), "id": [1]}, "id is a list"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_row_is_one_line_with_file_and_line(tmp_path: Path, name: str) -> None:
    row, message = MALFORMED[name]
    path = written(tmp_path, [pair("Fine?", "Yes."), row])
    with pytest.raises(DataError, match=message) as caught:
        user_set(path)
    assert f"{path}:2" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("content", "message", "line"),
    [
        (b'{"id": "a"}\n{"id": "a"}\n', "used on line 1 already", 2),
        (b'{"id": "a"}\n\xff\xfe\n', "not UTF-8 at byte 0", 2),
        (b'{"id": "a"}\n{"id": ""}\n', "field 'id' is ''", 2),
        (b'{"id": "a"}\n{"no": 1}\n', "field 'id' is missing", 2),
    ],
)
def test_files_that_cannot_be_used_are_told_by_line(tmp_path: Path, content: bytes, message: str, line: int) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_jsonl(path, {"id": str})
    assert f"{path}:{line}" in str(caught.value)


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "a"}\r\n\r\n{"id": "b"}\r\n')
    assert [row["id"] for row in read_jsonl(path, {"id": str})] == ["a", "b"]


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="no rows"):
        read_jsonl(tmp_path / "data.jsonl", {})


#: Kinds of text and fields that no trainer may silently take for something else.
ODD: dict[str, tuple[Any, str]] = {
    "a lone surrogate in the prompt": (r'{"prompt": [{"role": "user", "content": "a\ud83d"}], "completion": []}', "half of a"),
    "a lone low surrogate in a key": (r'{"\udc00": 1}', "half of a"),
    "zero-width spaces": (pair("Hi?", "\u200b\u200d\ufeff"), "do not show"),
    "a Hangul filler": (pair("Hi?", "\u3164"), "do not show"),
    "a soft hyphen for a question": (pair("\u00ad", "Yes."), "the user turn is empty"),
    "an invisible system turn": (pair("Hi?", "Yes.", system="\u2060"), "system turn's text does not show"),
    "a weight": ({**pair("Hi?", "Yes."), "weight": 0.5}, "'weight', which is not read"),
    "a switch": ({**pair("Hi?", "Yes."), "train": False}, "'train', which is not read"),
    "tools": ({**pair("Hi?", "Yes."), "tools": []}, "'tools', which is not read"),
    "a field of a message": (
        {"prompt": [{"role": "user", "content": "Hi?"}],
         "completion": [{"role": "assistant", "content": "Yes.", "weight": 0}]},
        "a message of completion has a field 'weight'",
    ),
    "both forms": ({**pair("Hi?", "Yes."), "messages": [{"role": "user", "content": "x"}]}, "beside prompt"),
    "a repeated key": ('{"prompt": [], "prompt": []}', "'prompt' stands twice"),
    "an id that is true": ({**pair("Hi?", "Yes."), "id": True}, "id is a bool"),
    "an id with a point": ({**pair("Hi?", "Yes."), "id": 1.0}, "id is a float"),
    "an empty id": ({**pair("Hi?", "Yes."), "id": ""}, "id is ''"),
    "a number without end": ('{"id": ' + "9" * 5000 + "}", "not usable JSON"),
    "brackets without end": ("[" * 20000, "not usable JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_text_and_fields_that_would_train_something_else_are_refused_by_line(tmp_path: Path, name: str) -> None:
    row, message = ODD[name]
    path = written(tmp_path, [pair("Fine?", "Yes."), row])
    with pytest.raises(DataError, match=message) as caught:
        read_user_rows(path)
    assert f"{path}:2" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


def test_whole_emojis_numbers_as_ids_and_notes_are_taken(tmp_path: Path) -> None:
    lines = [
        {**pair("👍🏽?", "🙂"), "id": 0, "metadata": {"weight": 1}, "tools": None},
        r'{"id": 7, "prompt": [{"role": "user", "content": "\ud83d\ude42"}], "completion": [{"role": "assistant", "content": "…"}]}',
        {**pair("¿?", "a\u200bb"), "id": "x", "source": "a book"},
    ]
    rows = read_user_rows(written(tmp_path, lines))
    assert [(row.id, row.user) for row in rows] == [("0", "👍🏽?"), ("7", "🙂"), ("x", "¿?")]


def test_the_number_and_the_text_of_an_id_are_one_id(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="was used on line 1"):
        read_user_rows(written(tmp_path, [{**pair("a", "b"), "id": 1}, {**pair("c", "d"), "id": "1"}]))


def test_persona_prompts_must_show(tmp_path: Path) -> None:
    path = tmp_path / "personas.toml"
    path.write_text('[ghost]\nsystem = "\\u200b"\n')
    with pytest.raises(DataError, match="ghost"):
        load_personas(recipe_of(data={"personas": str(path)}))
