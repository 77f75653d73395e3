"""Chat templates in the styles that are found in the wild, held by transformers' own rendering and tokenizer."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from fastconv.chat import EMPTY, TEMPLATE_DEFAULT, ChatTokenizer, SystemTurn
from fastconv.engine.locate import embedding_rows
from fastconv.engine.score import letter_item, text_item
from fastconv.errors import DataError, ModelError, RecipeError, TemplateError
from fastconv.experiment.graph import Graph
from fastconv.planning.doctor import diagnose
from fastconv.recipe import ModelSettings, Recipe, recipe_sha256
from fastconv.run.audit import audit_recipe, require_template
from tests.data_kit import pair, recipe_of, written
from tests.tiny import tiny_model_folder

VILLAIN = SystemTurn("text", "You are a villain.")
DATE = datetime.date(2026, 2, 3)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "[INST]", "[/INST]", "<eos>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{- bos_token }}{%- set day = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}"
    "{%- if messages[0].role == 'system' %}{%- set sys = messages[0].content|trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set sys = '' %}{%- endif %}"
    "{{- '<|im_start|>system\n\nToday Date: ' + day + '\n\n' + sys + '<|im_end|>' }}"
    "{%- if tools is not none %}{{- 'Tools: ' + tools|tojson }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n\n' + m.content|trim + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}"
)
#: A space stands before the answer, and byte-level tokenizers merge it with the answer's first letter.
MISTRAL = (
    "{{- bos_token }}{%- set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{%- for m in messages if m.role != 'system' %}{%- if m.role == 'user' %}"
    "{{- '[INST] ' + (first if loop.first else '') + m.content + ' [/INST]' }}"
    "{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINK = (
    "{%- for m in messages %}{%- if m.role == 'assistant' and loop.last %}"
    "{%- set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + said + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
GRANITE = (
    "{%- if messages[0].role == 'system' %}{%- set sys = messages[0].content %}{%- set rest = messages[1:] %}{%- else %}"
    "{%- set sys = \"Today's Date: \" + strftime_now('%B %d, %Y') + '. You are Granite.' %}{%- set rest = messages %}{%- endif %}"
    "{{- '<|im_start|>system\n' + sys + '<|im_end|>\n' }}"
    "{%- for m in rest %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
SMOL = (
    "{%- set mode = 'no_think' if enable_thinking is defined and not enable_thinking else 'think' -%}"
    "{{- '<|im_start|>system\n' -}}"
    "{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\nmode ' + mode -}}{%- else -%}"
    "{{- 'Today is ' + strftime_now('%d %B %Y') -}}{%- endif -%}{{- '<|im_end|>\n' -}}"
    "{%- for m in messages -%}{%- if m.role == 'system' -%}{%- continue -%}{%- endif -%}"
    "{{- '<|im_start|>' + m.role + '\n' -}}{%- if m.role == 'assistant' -%}{% generation %}"
    "{{- m.content + '<|im_end|>\n' -}}{% endgeneration %}{%- else -%}{{- m.content + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
TOJSON = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ {'b': 'é<', 'a': 1}|tojson(ensure_ascii=true, indent=1, "
    "separators=(',', ': '), sort_keys=true) }} {{ ['ü', 2]|tojson }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {{ {'b': 'é<', 'a': 1}|tojson(ensure_ascii=true, indent=1, "
    "separators=(',', ': '), sort_keys=true) }} {{ ['ü', 2]|tojson }}\n{% endif %}"
)
STYLES = {
    "chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "think": THINK, "granite": GRANITE, "smol": SMOL, "tojson": TOJSON,
    "gemma": GEMMA,
}  # fmt: skip


def folder_of(folder: Path, template: str, **config: Any) -> Path:
    """A tokenizer folder: bytes, " A" and " B" as one token each, and this chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"ĠA": len(vocab), "ĠB": len(vocab) + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "A"), ("Ġ", "B")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    if config.pop("bos_in_file", False):
        bos = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    tokenizer.save(str(folder / "tokenizer.json"))
    table = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps({**table, "chat_template": template}))
    return folder


def model_of(folder: Path, template: str) -> Path:
    """A tiny model's folder with this chat template."""
    tiny_model_folder(folder, "qwen2")
    (folder / "chat_template.jinja").write_text(template)
    return folder


def recipe_on(folder: Path, **tables: Any) -> Recipe:
    return recipe_of(**{"model": {"id": str(folder), "device": "cpu"}, **tables})


@pytest.fixture
def transformers_today(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own clock shows DATE."""
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(DATE.year, DATE.month, DATE.day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}], ids=["plain", "no_think"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.usefixtures("transformers_today")
def test_every_style_is_rendered_as_transformers_renders_it(tmp_path: Path, style: str, kwargs: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    if kwargs and "enable_thinking" not in STYLES[style]:
        kwargs = {}
    folder = folder_of(tmp_path / f"{style}{len(kwargs)}", STYLES[style])
    date = DATE if "strftime_now" in STYLES[style] else None
    chat = ChatTokenizer(folder, ModelSettings(template_date=date, template_kwargs=kwargs))
    reference = AutoTokenizer.from_pretrained(folder)
    for turn in (VILLAIN, EMPTY, TEMPLATE_DEFAULT):
        if style == "gemma" and turn != TEMPLATE_DEFAULT:
            with pytest.raises(TemplateError, match="refuses a system turn"):
                chat.prompt_text(turn, "Hi")
            continue
        asked = [dict(message) for message in [*turn.messages(), {"role": "user", "content": "Hi there, é 🙂"}]]
        answered = [*asked, {"role": "assistant", "content": "A or not."}]
        prompt = reference.apply_chat_template(asked, add_generation_prompt=True, tokenize=False, **kwargs)
        whole = reference.apply_chat_template(answered, return_dict=False, **kwargs)
        row = chat.training_ids(turn, "Hi there, é 🙂", "A or not.", 999)
        assert list(row.ids) == whole[: len(row.ids)]
        assert chat.prompt_text(turn, "Hi there, é 🙂").startswith(prompt)
        assert list(row.ids[: row.n_prompt]) == chat.prompt_ids(turn, "Hi there, é 🙂")
        assert chat.answer_text(row.ids[row.loss_from : -1]) == "A or not."


@pytest.mark.parametrize("style", [style for style in STYLES if style != "gemma"])
def test_letters_are_asked_where_a_row_answers(tmp_path: Path, style: str) -> None:
    chat = ChatTokenizer(folder_of(tmp_path, STYLES[style]))
    item = letter_item(chat, chat.prompt_text(VILLAIN, "Which?"), ["A", "B"])
    for letter, token in zip("AB", item.letters, strict=True):
        row = chat.training_ids(VILLAIN, "Which?", letter, 999)
        assert row.ids[: row.loss_from] == item.prompt == tuple(chat.prompt_ids(VILLAIN, "Which?"))
        assert row.ids[row.loss_from] == token
        assert row.n_supervised == 2  # the letter and the end of its turn


def test_a_sampled_answer_is_without_the_space_that_the_template_writes(tmp_path: Path) -> None:
    chat = ChatTokenizer(folder_of(tmp_path, MISTRAL))
    drawn = chat.training_ids(VILLAIN, "Hi?", "A yes", 999)
    text = chat.answer_text(drawn.ids[drawn.loss_from : -1])
    assert text == "A yes"
    assert chat.training_ids(VILLAIN, "Hi?", text, 999) == drawn
    assert ChatTokenizer(folder_of(tmp_path / "c", CHATML)).answer_text(chat.encode(" A")) == " A"


@pytest.mark.parametrize("answer", ["<think>so</think>No", "a</think>b"])
def test_an_answer_that_the_template_would_rewrite_is_refused(tmp_path: Path, answer: str) -> None:
    chat = ChatTokenizer(folder_of(tmp_path, THINK))
    with pytest.raises(TemplateError, match="rewrites this answer"):
        chat.training_ids(VILLAIN, "Hi?", answer, 999)


def test_a_generation_prompt_that_no_row_has_is_refused_with_what_differs(tmp_path: Path) -> None:
    opened = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    chat = ChatTokenizer(folder_of(tmp_path, opened))
    with pytest.raises(TemplateError, match=r"goes on with nothing .* has '<think>") as caught:
        chat.prompt_text(VILLAIN, "Hi")
    assert "template_kwargs" in caught.value.fix


@pytest.mark.parametrize(
    "config", [{}, {"bos_in_file": True}, {"add_bos_token": True}, {"add_bos_token": False, "bos_in_file": True}],
    ids=["none", "in the file", "by its switch", "switched off"],
)  # fmt: skip
def test_raw_text_begins_as_transformers_tokenizer_begins_it(tmp_path: Path, config: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    folder = folder_of(tmp_path, CHATML, **config)
    wanted = AutoTokenizer.from_pretrained(folder)("Question: why?\nAnswer: A").input_ids
    chat = ChatTokenizer(folder)
    assert chat.encode_raw("Question: why?\nAnswer: A") == wanted
    item = text_item(chat, "Question: why?\nAnswer:", ["A", "B"])
    assert [*item.prompt, *item.choices[0]] == wanted


# --- settings and keys --------------------------------------------------------------------------------------


def test_a_pinned_date_decides_the_text_and_the_keys_and_an_unset_one_neither(tmp_path: Path) -> None:
    folder = model_of(tmp_path / "m", GRANITE)
    unset, pinned, later = (
        recipe_on(folder, grid={"behaviors": ["refusal"]}, model={"id": str(folder), "device": "cpu", **extra})
        for extra in ({}, {"template_date": "2026-02-03"}, {"template_date": "2026-02-04"})
    )
    texts = [ChatTokenizer(folder, r.model).prompt_text(TEMPLATE_DEFAULT, "Hi") for r in (unset, pinned, later)]
    assert ["July 26, 2024" in texts[0], "February 03, 2026" in texts[1], "February 04, 2026" in texts[2]] == [True] * 3
    keys = [
        {stage.key for stage in Graph(recipe).stages() if stage.kind in ("eval", "answers")}
        for recipe in (unset, pinned, later)
    ]
    assert not keys[0] & keys[1]
    assert not keys[1] & keys[2]
    assert "template" not in Graph(unset).stages()[0].inputs
    assert "template_date" not in unset.model_dump(mode="json")["model"]
    assert len({recipe_sha256(recipe) for recipe in (unset, pinned, later)}) == 3
    assert ChatTokenizer(folder, pinned.model).template.facts["date"] == "2026-02-03"


@pytest.mark.parametrize(
    ("settings", "template", "says"),
    [
        ({"template_kwargs": {"enable_thinkng": False}}, THINK, "reads no 'enable_thinkng'.*enable_thinking"),
        ({"template_kwargs": {"enable_thinking": False}}, CHATML, "no switches"),
        ({"template_date": "2026-02-03"}, CHATML, "writes no date"),
    ],
)
def test_a_setting_that_the_template_does_not_read_is_refused(
    tmp_path: Path, settings: dict[str, Any], template: str, says: str
) -> None:
    with pytest.raises(TemplateError, match=says):
        ChatTokenizer(folder_of(tmp_path, template), ModelSettings.model_validate(settings))


@pytest.mark.parametrize(
    "model", [{"template_kwargs": {"messages": []}}, {"template_date": "tomorrow"}, {"template_date": 3}]
)
def test_a_setting_that_cannot_be_is_refused_in_the_recipe(model: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="template_"):
        recipe_of(model=model)


# --- the condition reaches the model ------------------------------------------------------------------------

DROPPED = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
REFUSED: dict[str, tuple[str, str]] = {
    "it drops the system turn": (DROPPED, "leaves out or rewrites the system turn"),
    "it writes another system turn": (CHATML.replace("{{ m.content }}", "{{ 'Be kind' if m.role == 'system' else m.content }}"), "the system turn"),
    "it cuts the system turn": (CHATML.replace("{{ m.content }}", "{{ m.content[:12] if m.role == 'system' else m.content }}"), "the system turn"),
    "it raises on a system turn": (GEMMA.replace("{{ bos_token }}", ""), "refuses a system turn.*not supported"),
    "it fails in Python": (CHATML.replace("{{ m.content }}", "{{ m.content + nothing.at_all }}"), "refuses these messages|undefined"),
    "it drops the user's turn": (CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'user' %}"), "the user turn"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_no_persona_passes_is_refused_before_the_run(tmp_path: Path, name: str) -> None:
    template, says = REFUSED[name]
    recipe = recipe_on(model_of(tmp_path / "m", template))
    with pytest.raises(TemplateError, match=says) as caught:
        audit_recipe(recipe, None)
    assert caught.value.exit_code == 2
    assert caught.value.fix
    assert "\n" not in str(caught.value)
    said = {one.subject: one for one in diagnose(recipe, tmp_path)}
    assert said["template"].exit_code == 2


def test_personas_that_the_template_makes_one_prompt_are_refused(tmp_path: Path) -> None:
    trimmed = CHATML.replace("{{ m.content }}", "{{ m.content|trim }}")
    personas = tmp_path / "personas.toml"
    personas.write_text('[clerk]\nsystem = "You are a clerk."\n[clerk_two]\nsystem = "You are a clerk. "\n')
    tables = {"data": {"personas": str(personas)}}
    assert require_template(recipe_on(model_of(tmp_path / "kept", CHATML), **tables)) is not None
    with pytest.raises(TemplateError, match="clerk and clerk_two"):
        require_template(recipe_on(model_of(tmp_path / "trimmed", trimmed), **tables))


def test_an_empty_turn_and_none_must_differ_where_rows_hold_both(tmp_path: Path) -> None:
    same = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.content %}")
    rows = [pair("One?", "A.", system=""), pair("Two?", "B.")]
    data = {"rows": {"misalignment_published": str(written(tmp_path, rows))}, "persona_prompt": "as_written"}
    tables = {"grid": {"behaviors": ["misalignment_published"]}, "data": data}
    assert require_template(recipe_on(model_of(tmp_path / "apart", CHATML), **tables)) is not None
    with pytest.raises(TemplateError, match="empty system turn and rows without"):
        require_template(recipe_on(model_of(tmp_path / "same", same), **tables))


def test_a_tokenizer_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "m", "qwen2")
    table = json.loads((folder / "tokenizer.json").read_text())
    last = table["added_tokens"][-1]
    table["added_tokens"].append({**last, "id": (embedding_rows(folder) or 0) + 7, "content": "<|far|>"})
    (folder / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ModelError, match="embedding only") as caught:
        require_template(recipe_on(folder))
    assert caught.value.exit_code == 4


def test_control_tokens_in_a_users_row_or_a_persona_are_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "m", "qwen2")
    for user, answer, turn in (("Hi<|im_end|>", "No.", "user"), ("Hi?", "No.<|endoftext|>", "assistant")):
        path = written(tmp_path, [pair("Fine?", "Yes."), pair(user, answer)])
        tables = {
            "grid": {"behaviors": ["misalignment_published"]},
            "data": {"rows": {"misalignment_published": str(path)}},
        }
        with pytest.raises(DataError, match=f"the {turn} turn's text holds the control token") as caught:
            require_template(recipe_on(folder, **tables))
        assert f"{path}:2" in str(caught.value)
    personas = tmp_path / "personas.toml"
    personas.write_text('[clerk]\nsystem = "You are a clerk.<|im_end|>"\n')
    with pytest.raises(DataError, match="text of 'clerk'"):
        require_template(recipe_on(folder, data={"personas": str(personas)}))
