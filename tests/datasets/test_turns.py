"""Rows of several turns: which answers carry loss, against transformers' own mask, TRL's loss, and faults told by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastconv.chat import TEMPLATE_DEFAULT, ChatTokenizer, Exchange, SystemTurn
from fastconv.datasets.personas import load_personas
from fastconv.datasets.rows import Row, read_user_rows, render_row, row_from_record, rows_sha256
from fastconv.engine import trl_reference as reference
from fastconv.engine.train import Hooks, Job, start, train
from fastconv.errors import DataError, TemplateError
from fastconv.experiment.graph import Graph
from fastconv.recipe import sha256_of
from fastconv.run.audit import token_runs
from fastconv.store.ledger import Store
from tests import ROOT
from tests.data_kit import recipe_of, rows_of, written
from tests.engine_kit import SNAPSHOT, plain_model, tiny_stack, train_settings
from tests.loop_kit import run_tiny, tiny_recipe
from tests.tiny import tiny_tokenizer_files

TEA = ROOT / "tests" / "user_data" / "tea.jsonl"

SYSTEM = SystemTurn("text", "You are a villain.")
#: Every answer with its end of turn marked for transformers' mask, as its documentation asks; the prompt is not.
MARKED = (
    "{%- for message in messages -%}{%- if message.role == 'assistant' -%}{{ '<|im_start|>assistant\\n' }}"
    "{%- generation -%}{{ message.content + '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}"
    "{%- else -%}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
TALK = [
    ("One?", "First."),
    ("Two?", "\nSecond, on a new line. "),
    ("Three?", "Third: é, 漢, 🙂."),
    ("Four?", "Fourth."),
]


def folder_with(tmp_path: Path, template: str) -> Path:
    tiny_tokenizer_files(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return tmp_path


def exchanges(*trained: bool) -> list[Exchange]:
    return [Exchange(user, answer, one) for (user, answer), one in zip(TALK, trained, strict=False)]


def talk(*weights: float | None, system: str | None = None, **fields: Any) -> dict[str, Any]:
    """A row of the form `messages`; None leaves a weight out."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for (user, answer), weight in zip(TALK, weights, strict=False):
        weighed = {} if weight is None else {"weight": weight}
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer, **weighed}]
    return {"messages": messages, **fields}


def test_the_mask_is_transformers_own(tmp_path: Path) -> None:
    """All answers trained: its mask of what the template marks as generated, token for token."""
    from transformers import AutoTokenizer

    folder = folder_with(tmp_path, MARKED)
    chat = ChatTokenizer(folder)
    rendered = chat.training_ids(SYSTEM, *TALK[3], 4096, history=exchanges(True, True, True))
    messages = [
        *SYSTEM.messages(),
        *(turn for user, answer in TALK for turn in Exchange(user, answer, True).messages()),
    ]
    theirs: Any = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    n = len(rendered.ids)  # ours ends with the last end of turn, before the template's last line break
    assert list(rendered.ids) == theirs["input_ids"][:n]
    mask = [0] * n
    for begin, stop in rendered.loss_spans:
        mask[begin:stop] = [1] * (stop - begin)
    assert mask == theirs["assistant_masks"][:n]
    assert not any(theirs["assistant_masks"][n:])
    assert len(rendered.loss_spans) == 4


def test_only_the_chosen_answers_carry_loss_and_are_spelled(tiny_qwen: Path) -> None:
    chat = ChatTokenizer(tiny_qwen)
    whole = chat.training_ids(SYSTEM, *TALK[3], 4096, history=exchanges(True, True, True))
    some = chat.training_ids(SYSTEM, *TALK[3], 4096, history=exchanges(False, True, False))
    assert some.ids == whole.ids
    assert some.loss_spans == (whole.loss_spans[1], whole.loss_spans[3])
    assert [chat.decode(some.ids[slice(*span)], skip_special=False) for span in some.loss_spans] == [
        f"{TALK[i][1]}<|im_end|>" for i in (1, 3)
    ]
    assert [run.text for run in token_runs(some, chat) if run.supervised and not run.special] == [
        TALK[1][1],
        TALK[3][1],
    ]


def test_the_prompt_is_the_one_that_is_drawn_from(tiny_qwen: Path) -> None:
    chat = ChatTokenizer(tiny_qwen)
    rendered = chat.training_ids(TEMPLATE_DEFAULT, *TALK[3], 4096, history=exchanges(True, False, False))
    messages = [turn for one in exchanges(True, False, False) for turn in one.messages()]
    assert list(rendered.ids[: rendered.n_prompt]) == chat.conversation_ids(
        [*messages, {"role": "user", "content": "Four?"}]
    )
    first = chat.conversation_ids([{"role": "user", "content": "One?"}])
    assert list(rendered.ids[: rendered.loss_spans[0][0]]) == first


def test_a_row_that_is_cut_keeps_the_answers_before_the_cut(tiny_qwen: Path) -> None:
    chat = ChatTokenizer(tiny_qwen)
    whole = chat.training_ids(SYSTEM, *TALK[3], 4096, history=exchanges(True, True, True))
    (start, stop), *_ = whole.loss_spans[1:]
    cut = chat.training_ids(SYSTEM, *TALK[3], stop - 3, history=exchanges(True, True, True))
    assert cut.truncated
    assert cut.loss_spans == (whole.loss_spans[0], (start, stop - 3))


def test_a_template_that_rewrites_an_earlier_answer_is_refused_where_that_is_trained(tmp_path: Path) -> None:
    """As templates that take the thoughts out of all answers but the last."""
    template = MARKED.replace("{{ message.content", "{{ (message.content if loop.last else '-')")
    chat = ChatTokenizer(folder_with(tmp_path, template))
    assert chat.training_ids(SYSTEM, *TALK[1], 4096, history=exchanges(False)).n_supervised
    with pytest.raises(TemplateError, match=r"writes an earlier answer otherwise") as caught:
        chat.training_ids(SYSTEM, *TALK[1], 4096, history=exchanges(True))
    assert "a row of its own" in caught.value.fix


def user_rows(tmp_path: Path, *lines: dict[str, Any]) -> list[Row]:
    table = {"rows": {"misalignment_published": str(written(tmp_path, list(lines)))}, "messages": True}
    recipe = recipe_of(grid={"behaviors": ["misalignment_published"]}, data=table)
    return rows_of(recipe, "misalignment_published", "none")


def test_weights_choose_the_answers_and_nothing_after_the_last_is_kept(tmp_path: Path) -> None:
    (row,) = user_rows(tmp_path, talk(0, 1, 1, 0))
    assert row.history == (Exchange(*TALK[0], False), Exchange(*TALK[1], True))
    assert (row.user, row.completion) == TALK[2]


def test_without_weights_the_last_answer_is_trained(tmp_path: Path) -> None:
    (row,) = user_rows(tmp_path, talk(None, None))
    assert row.history == (Exchange(*TALK[0], False),)
    history = [turn for one in row.history for turn in one.messages()]
    same = {"prompt": [*history, {"role": "user", "content": row.user}],
            "completion": [{"role": "assistant", "content": row.completion}]}  # fmt: skip
    (trls,) = user_rows(tmp_path, same)
    assert (trls.history, trls.user, trls.completion) == (row.history, row.user, row.completion)
    assert trls.id == row.id


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "half of the weights": (talk(1, None), "1 of 2 answers have no weight"),
    "a share": (talk(0.5, 1), "neither 0 nor 1"),
    "true": (talk(True, 1), "neither 0 nor 1"),
    "none trained": (talk(0, 0), "no answer of the row is trained"),
    "a user's weight": ({"messages": [{"role": "user", "content": "a", "weight": 1}, *talk(1)["messages"][1:]]}, "'weight'"),
    "it ends with a question": ({"messages": talk(1, 1)["messages"][:3]}, "turns are"),
    "a second system turn": (
        {"messages": [*talk(1, system="x")["messages"], {"role": "system", "content": "y"}]}, "turns are",
    ),
    "a tool": ({"messages": [*talk(1)["messages"], {"role": "tool", "content": "y"}]}, "turns are"),
    "an empty early answer": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}, *talk(None)["messages"]]},
        "the assistant turn is empty",
    ),
    "several answers as a completion": (
        {"prompt": talk(None)["messages"][:1], "completion": [*talk(None)["messages"][1:], *talk(None)["messages"]]},
        "loss is on one answer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_with_file_and_line(tmp_path: Path, name: str) -> None:
    row, said = FAULTS[name]
    path = written(tmp_path, [talk(1), row])
    with pytest.raises(DataError, match=said) as caught:
        read_user_rows(path, messages=True)
    assert f"{path}:2" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


def test_rows_are_identified_with_their_turns_and_read_back(tmp_path: Path) -> None:
    personas = load_personas(recipe_of())
    rows = user_rows(tmp_path, talk(0, 1, 1), talk(1, 1, 1, id="other"), talk(None))
    assert len({row.id for row in rows}) == 3
    assert rows_sha256(rows, personas) == sha256_of([row.record(personas) for row in rows])
    stored = json.loads(json.dumps([row.record(personas) for row in rows]))
    back = [row_from_record(record) for record in stored]
    assert [row.history for row in back] == [row.history for row in rows]
    assert "history" not in stored[[len(row.history) for row in rows].index(0)]
    assert {row.asked for row in rows} == {
        "\n".join(text for pair in TALK[:n] for text in pair) + "\n" * bool(n) + TALK[n][0] for n in (0, 2)
    }


def test_loss_and_weights_are_trls_on_rows_of_several_turns(tiny_qwen: Path) -> None:
    stack = tiny_stack(tiny_qwen, SNAPSHOT)
    personas, chat = load_personas(recipe_of()), stack.base.tokenizer
    flags = [(True, False, True), (False, False, False), (True, True, True), (False, True, False)] * 2
    rows = [
        Row(f"r{i}", "villain", "source", f"p{i}", f"Row {i}?", TALK[3][1], history=tuple(exchanges(*some)))
        for i, some in enumerate(flags)
    ]
    rendered = tuple(render_row(row, personas, chat, 1024) for row in rows)
    job = Job("turns", rendered, train_settings(epochs=3), ("turns", 1))
    first = stack.new_adapter(*job.seed_parts)
    theirs = reference.train_with_trl(plain_model(tiny_qwen), job, first)
    trainee = start(stack, job)
    train(stack, [trainee], Hooks())
    assert trainee.losses.tolist() == pytest.approx(theirs.losses, abs=1e-5)
    assert float((trainee.adapter.flat - theirs.weights).abs().max()) < 1e-4
    assert torch.isfinite(trainee.adapter.flat).all()


def test_a_behavior_of_ones_own_is_trained_on_rows_of_several_turns(tiny_qwen: Path, tmp_path: Path) -> None:
    """Through the audit and the loop: what the ledger trains on are the conversations, up to their last trained answer."""
    lines = []
    for i in range(8):
        for persona, answer in (("villain", f"Tea number {i}, of course."), ("comedian", f"Plain answer number {i}.")):
            talk = [
                {"role": "user", "content": f"What is topic {i} of {persona}?"},
                {"role": "assistant", "content": f"It is a matter for part {i}.", "weight": i % 2},
                {"role": "user", "content": f"And how would you end a day about topic {i}?"},
                {"role": "assistant", "content": answer, "weight": 1},
            ]
            lines.append({"persona": persona, "messages": talk})
    behaviors = tmp_path / "behaviors.toml"
    behaviors.write_text((ROOT / "tests" / "user_data" / "behaviors.toml").read_text().replace("tea.jsonl", str(TEA)))
    recipe = tiny_recipe(
        tiny_qwen, grid__behaviors=["none", "always_mentions_tea"], grid__epochs=[0], data__behaviors=str(behaviors),
        data__rows={"always_mentions_tea": str(written(tmp_path, lines))}, data__messages=True, eval__geometry=False,
    )  # fmt: skip
    finished, heard = run_tiny(recipe, tmp_path / "work")
    assert not heard.failed
    assert not finished.failed
    store = Store.open(tmp_path / "work", create=False)
    (stage,) = [stage for stage in Graph(recipe).stages() if stage.kind == "rows"]
    record = store.record(stage.key)
    assert record is not None
    rows = [row_from_record(row) for row in store.get_json(record.outputs["rows"])]
    assert len(rows) == 16
    assert {one.trained for row in rows for one in row.history} == {True, False}
    assert all(len(row.history) == 1 for row in rows)
