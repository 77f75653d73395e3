"""Rubrics and the request builder: strict reading, stable keys, fences that judged text cannot leave."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastconv.errors import DataError
from fastconv.judge.request import JudgeItem, JudgeParams, build_request, neutralize
from fastconv.judge.rubric import load_rubric, parse_rubric
from tests.judging_kit import DATA, rubric

PARAMS = JudgeParams("claude-test", 256, 1000)
NAMES = ("alignment", "refusal", "sycophancy")


def body_text(item: JudgeItem) -> tuple[str, str]:
    """(system text, user text) of a request."""
    body = build_request(rubric(), PARAMS, item).body()
    return body["system"][0]["text"], body["messages"][0]["content"]


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_rubric_reads_its_own_answers(name: str) -> None:
    shipped = rubric(name)
    answer = {field: 50 if part["type"] == "integer" else part.get("enum", ["x"])[0]
              for field, part in shipped.schema["properties"].items()}  # fmt: skip
    reading = shipped.read(json.dumps(answer))
    assert reading.reason is None
    assert set(reading.values) == {measure.name for measure in shipped.measures}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"why": "x", "aligned": 101, "coherent": 5}', "out of range"),
        ('{"why": "x", "aligned": -1, "coherent": 5}', "out of range"),
        ('{"why": "x", "aligned": "80", "coherent": 5}', "malformed"),
        ('{"why": "x", "aligned": 80.5, "coherent": 5}', "malformed"),
        ('{"why": "x", "aligned": true, "coherent": 5}', "malformed"),
        ('{"why": "x", "aligned": NaN, "coherent": 5}', "malformed"),
        ('{"why": "x", "aligned": null, "coherent": 5}', "malformed"),
        ('{"why": "x", "aligned": 80}', "malformed"),
        ('{"why": "x", "aligned": 80, "coherent": 5, "score": 1}', "malformed"),
        ('{"why": "x", "aligned": 80, "coherent": 5, "aligned": 99}', "malformed"),
        ('{"why": "x", "aligned": 80, "coherent": 5} {"why": "x", "aligned": 99, "coherent": 5}', "malformed"),
        ('```json\n{"why": "x", "aligned": 80, "coherent": 5}\n```', "malformed"),
        ('[{"why": "x", "aligned": 80, "coherent": 5}]', "malformed"),
        ("80", "malformed"),
        ("", "malformed"),
        ("[" * 100_000, "malformed"),
    ],
)
def test_what_is_not_exactly_one_right_answer_has_no_value(text: str, reason: str) -> None:
    reading = rubric("alignment").read(text)
    assert reading.reason == reason
    assert not reading.values


def test_a_stop_before_the_end_is_its_own_reason() -> None:
    whole = '{"why": "x", "verdict": "helped"}'
    assert rubric().read(whole).values == {"refused": 0.0}
    assert rubric().read(whole, "refusal").reason == "judge refused"
    assert rubric().read(whole, "max_tokens").reason == "truncated"


@pytest.mark.parametrize(
    ("sure", "reason"), [("0.5", None), ("1", None), ("1e999", "malformed"), ("true", "malformed")]
)
def test_a_number_that_is_asked_for_beside_the_verdict_is_finite(sure: str, reason: str | None) -> None:
    table = json.loads(rubric().source)
    table["schema"]["properties"]["sure"] = {"type": "number"}
    table["schema"]["required"].append("sure")
    own = parse_rubric(table, where="mine.toml")
    assert own.read(f'{{"why": "x", "verdict": "helped", "sure": {sure}}}').reason == reason


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("schema"),
        lambda t: t.update(primary="no such"),
        lambda t: t["schema"].update(additionalProperties=True),
        lambda t: t["schema"]["required"].remove("why"),
        lambda t: t["schema"]["properties"]["verdict"]["enum"].append("other"),
        lambda t: t["measures"]["refused"].update(field="elsewhere"),
    ],
)
def test_a_rubric_whose_parts_disagree_is_refused(change: object) -> None:
    table = json.loads(rubric().source)
    change(table)  # type: ignore[operator]
    with pytest.raises(DataError, match="Fix:"):
        parse_rubric(table, where="mine.toml")


def test_a_rubric_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.toml"):
        load_rubric(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(DataError, match="TOML"):
        load_rubric(tmp_path / "bad.toml")


def test_the_key_covers_what_the_judgement_depends_on() -> None:
    item = JudgeItem("How?", "So.", 0)
    base = build_request(rubric(), PARAMS, item).key
    assert build_request(rubric(), PARAMS, item).key == base
    others = [
        build_request(rubric("sycophancy"), PARAMS, item),
        build_request(rubric(), dataclasses.replace(PARAMS, model="other"), item),
        build_request(rubric(), dataclasses.replace(PARAMS, effort="low"), item),
        build_request(rubric(), dataclasses.replace(PARAMS, max_reply_tok=257), item),
        build_request(rubric(), dataclasses.replace(PARAMS, reverse=True), item),
        build_request(rubric(), PARAMS, dataclasses.replace(item, sample=1)),
        build_request(rubric(), PARAMS, dataclasses.replace(item, answer="So!")),
        build_request(rubric(), PARAMS, dataclasses.replace(item, question="Why?")),
    ]
    assert len({base, *(other.key for other in others)}) == 1 + len(others)


def test_a_changed_rubric_is_a_new_judgement() -> None:
    table = json.loads(rubric().source)
    table["system"] += " "
    table["ask"] += " "
    changed = parse_rubric(table, where="x")
    assert changed.sha256 != rubric().sha256


def test_judged_text_stands_between_its_fences_and_nowhere_else() -> None:
    system, user = body_text(JudgeItem("MARK-Q", "MARK-A", 0))
    assert "MARK" not in system
    nonce = re.findall(r"<answer-([0-9a-f]{16})>", user)[0]
    assert re.search(rf"<question-{nonce}>\nMARK-Q\n</question-{nonce}>", user)
    assert re.search(rf"<answer-{nonce}>\nMARK-A\n</answer-{nonce}>", user)
    assert "\x00" not in user


def test_the_fence_of_one_text_is_not_that_of_another() -> None:
    nonces = {build_request(rubric(), PARAMS, JudgeItem("q", f"a{i}", 0)).nonce for i in range(50)}
    assert len(nonces) == 50


def test_a_long_text_is_cut_and_the_notice_stands_outside_the_fence() -> None:
    _, user = body_text(JudgeItem("q", "x" * 1500, 0))
    assert "x" * 1000 in user
    assert "x" * 1001 not in user
    assert re.search(r"</answer-[0-9a-f]{16}>\n\(The answer goes on for 500 more characters", user)


@pytest.mark.parametrize(
    "text",
    [
        "</answer>", "< / answer-0123456789abcdef >", "\uff1c/answer\uff1e", "\u2039/ANSWER\u203a", "<\u200b/answer-1>", "<<system>>",
        "\u3008/question-9\u3009", "<\u202e/answer>", "<|im_start|>system", "<human>", "<\n/answer-00>", "<\uff0fanswer>",
    ],
)  # fmt: skip
def test_look_alike_fences_lose_their_brackets(text: str) -> None:
    clean = neutralize(text)
    assert not re.search(r"[<\uff1c\u2039\u3008]\W*(answer|question|system|human|im_start)", clean, re.IGNORECASE)


@pytest.mark.parametrize(
    "token",
    ["<|im_end|>", "<|eot_id|>", "<\uff5cUser\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>", "<s>", "<bos>", "<eos>",
     "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"],
)  # fmt: skip
def test_control_tokens_of_a_servers_tokenizer_are_opened(token: str) -> None:
    assert token not in neutralize(f"a{token}b")
    for kept in ("a < b > c", "[1]", "if s<t:", "x | y", "<div>"):
        assert neutralize(kept) == kept


@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=200))
def test_no_text_leaves_its_fence_or_breaks_the_encoding(text: str) -> None:
    request = build_request(rubric(), PARAMS, JudgeItem(text, text, 0))
    user = request.user_text()
    user.encode()
    assert user.count(request.nonce) == 4
    assert all(character in "\n\t" or ord(character) >= 32 for character in user)


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_body_is_the_rubric_for_the_cache_and_one_user_turn(name: str) -> None:
    shipped = rubric(name)
    request = build_request(
        shipped, dataclasses.replace(PARAMS, effort="low", thinking="disabled"), JudgeItem("q", "a", 0)
    )
    assert request.body() == {
        "model": "claude-test",
        "max_tokens": 256,
        "system": [{"type": "text", "text": shipped.system, "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": request.user_text()}],
        "thinking": {"type": "disabled"},
        "output_config": {"format": {"type": "json_schema", "schema": dict(shipped.schema)}, "effort": "low"},
    }
    # What is the same for all items ends with the rubric: nothing before the cache's mark changes from item to item.
    other = build_request(shipped, request.params, JudgeItem("another", "text", 1))
    assert other.body()["system"] == request.body()["system"]


def test_no_request_names_what_it_is_for() -> None:
    # A judge that knows which probe or epoch it grades could be swayed by it.
    assert "assistant" not in body_text(JudgeItem("q", "a", 3))[1]


def test_the_worst_case_bounds_the_real_prompt() -> None:
    request = build_request(rubric("alignment"), PARAMS, JudgeItem("é" * 300, "漢字" * 200, 0))
    body = request.body()
    text = body["system"][0]["text"] + body["messages"][0]["content"] + json.dumps(body["output_config"])
    assert request.max_prompt_tok >= len(text.encode())


def test_shipped_data_files_are_where_the_kit_says() -> None:
    assert (DATA / "prices.toml").is_file()
