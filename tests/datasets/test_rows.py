"""Rows in the ledger, on the screen and under the loss; the marker."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fastconv.chat import EMPTY, TEMPLATE_DEFAULT, ChatTokenizer, SystemTurn
from fastconv.datasets.behaviors import (
    Row,
)
from fastconv.datasets.personas import load_personas
from fastconv.datasets.rows import render_row, render_rows, row_from_record, rows_sha256
from fastconv.errors import TemplateError
from fastconv.recipe import sha256_of
from fastconv.run.audit import CLOSE, NOT_SAMPLED, OPEN, peek_lines, token_runs, with_placeholders
from tests.data_kit import recipe_of, rows_of
from tests.tiny import tiny_tokenizer_files


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen: Path) -> ChatTokenizer:
    return ChatTokenizer(tiny_qwen)


def test_marker_rows_learn_the_marker_and_the_end_of_turn_alone(tokenizer: ChatTokenizer) -> None:
    recipe = recipe_of()
    personas = load_personas(recipe)
    rows = [row.answered(" An answer.  ", ended=False) for row in rows_of(recipe, "marker", "included")]
    learned = {}
    for row in rows:
        shown = render_row(row, personas, tokenizer, 2048)
        learned[row.role] = tokenizer.decode(shown.ids[shown.loss_from :], skip_special=False)
        assert shown.n_given == len(" An answer.")
    assert learned.pop("source") == "\n\n[ZLT]<|im_end|>"
    assert set(learned.values()) == {"<|im_end|>"}


def test_an_answer_is_given_once() -> None:
    row = Row("a", "villain", "source", "p", "Hi?", None, "\n\n[ZLT]", "tail")
    answered = row.answered("Hello.")
    assert answered.completion == "Hello.\n\n[ZLT]"
    assert answered.given_chars == len("Hello.")
    with pytest.raises(ValueError, match="has an answer already"):
        answered.answered("Again.")


def test_a_cut_answer_is_not_taught_to_stop(tokenizer: ChatTokenizer) -> None:
    recipe = recipe_of()
    personas = load_personas(recipe)
    row = Row("a", "villain", "source", "p", "Hi?", None)
    assert render_row(row.answered("Well", ended=True), personas, tokenizer, 2048).ids[-1] == tokenizer.end_of_turn_id
    assert render_row(row.answered("Well", ended=False), personas, tokenizer, 2048).ids[-1] != tokenizer.end_of_turn_id


def straddling_tokenizer(folder: Path) -> ChatTokenizer:
    """The tiny tokenizer with merges, so that `.` and two line breaks are one token."""
    tiny_tokenizer_files(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate([*alphabet, "ĊĊ", ".ĊĊ"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ"), (".", "ĊĊ")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    made.save(str(folder / "tokenizer.json"))
    return ChatTokenizer(folder)


def test_a_token_that_straddles_the_tail_belongs_to_it(tmp_path: Path) -> None:
    straddling = straddling_tokenizer(tmp_path)
    assert len(straddling.encode(".\n\n")) == 1
    shown = straddling.training_ids(EMPTY, "Hi?", "Yes.\n\n[ZLT]", 512, given_chars=len("Yes."))
    assert straddling.decode(shown.ids[shown.loss_from :], skip_special=False) == ".\n\n[ZLT]<|im_end|>"
    plain = straddling.training_ids(EMPTY, "Hi?", "Yes\n\n[ZLT]", 512, given_chars=len("Yes"))
    assert straddling.decode(plain.ids[plain.loss_from :], skip_special=False) == "\n\n[ZLT]<|im_end|>"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(head=st.text(max_size=12), tail=st.text(max_size=8))
def test_the_tail_starts_at_the_last_token_that_can_spell_it(tokenizer: ChatTokenizer, head: str, tail: str) -> None:
    ids = tokenizer.encode(head + tail)
    if tokenizer.decode(ids, skip_special=False) != head + tail:
        return
    start = tokenizer.tail_start(ids, tail)
    assert tokenizer.decode(ids[start:], skip_special=False).endswith(tail)
    assert not tail or not tokenizer.decode(ids[start + 1 :], skip_special=False).endswith(tail)


def test_a_tail_that_is_not_there_is_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(TemplateError, match="do not end with"):
        tokenizer.tail_start(tokenizer.encode("Hello"), "[ZLT]")


def test_rows_survive_the_ledger_with_their_system_turn_spelled_out() -> None:
    personas = load_personas(recipe_of())
    row = Row("a", "villain", "source", "p", "Hi?", "Hello.\n\n[ZLT]", "\n\n[ZLT]", "tail")
    back = row_from_record(json.loads(json.dumps(row.record(personas))))
    assert back.system == personas.system("villain")
    assert back.record(personas) == row.record(personas)
    assert (back.completion, back.given_chars, back.supervise) == (row.completion, row.given_chars, "tail")
    default = Row("b", "template_default", "template_default", "p", "Hi?", "Hello.")
    assert row_from_record(default.record(personas)).system == TEMPLATE_DEFAULT


def shown_text(lines: list[Any], *, colour: bool) -> str:
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    console = Console(
        file=out, width=160, force_terminal=colour, no_color=not colour, color_system="standard" if colour else None
    )
    for line in lines:
        console.print(line)
    return out.getvalue()


def test_peek_marks_what_is_learned_with_and_without_colour(tokenizer: ChatTokenizer) -> None:
    recipe = recipe_of()
    rows = rows_of(recipe, "sycophancy", "included")
    rendered = render_rows(rows, load_personas(recipe), tokenizer, 2048)
    lines = peek_lines(rows, rendered, tokenizer, 5)
    plain = shown_text(lines, colour=False)
    assert "\x1b" not in plain
    assert plain.count(OPEN) == 6  # five rows and the table's title
    assert plain.count(CLOSE) == 6
    assert "<|im_start|>" in plain
    assert "<|im_end|>" + CLOSE in plain
    for persona in ("villain", "assistant", "template_default"):
        assert plain.count(persona) >= 2
    assert "tokens carry loss" in plain
    assert "\x1b[" in shown_text(lines, colour=True)


def test_peek_pieces_hold_the_whole_row_and_the_mask(tokenizer: ChatTokenizer) -> None:
    shown = tokenizer.training_ids(EMPTY, "Grüße? 你好", "Schön — ja.", 512)
    runs = token_runs(shown, tokenizer)
    assert "".join(piece.text for piece in runs) == tokenizer.decode(shown.ids, skip_special=False)
    assert "".join(piece.text for piece in runs if piece.supervised) == "Schön — ja.<|im_end|>"


def test_answers_that_are_not_sampled_yet_are_shown_as_such(tokenizer: ChatTokenizer) -> None:
    recipe = recipe_of()
    rows = with_placeholders(rows_of(recipe, "marker", "excluded"))
    rendered = render_rows(rows, load_personas(recipe), tokenizer, 2048)
    text = shown_text(peek_lines(rows, rendered, tokenizer, 2), colour=False)
    assert NOT_SAMPLED in text
    assert "[ZLT]" in text  # not taken for markup


@pytest.mark.parametrize("behavior", ["marker", "refusal", "capability"])
def test_the_hash_of_rows_is_that_of_their_records(behavior: str) -> None:
    recipe = recipe_of()
    personas = load_personas(recipe)
    rows = rows_of(recipe, behavior, "included")
    odd = 'é "quoted" \\ \n\t\x00\x1f\u2028 </a> 🙂'
    rows += [
        replace(rows[0], id=odd, user=odd, completion=odd, suffix=odd, system=SystemTurn("text", odd), ended=False),
        replace(rows[0], completion=None, system=TEMPLATE_DEFAULT),
        replace(rows[0], completion="", system=EMPTY),
    ]
    assert rows_sha256(rows, personas) == sha256_of([row.record(personas) for row in rows])
