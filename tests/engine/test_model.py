"""Loading a base: all of its weights and nothing else, its own tokenizer, and one line for whatever cannot be loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fastconv.chat import ChatTokenizer
from fastconv.engine import selftest
from fastconv.engine.model import load_base
from fastconv.errors import FastconvError, ModelError, TemplateError
from fastconv.recipe import ModelSettings
from tests.tiny import CHAT_TEMPLATE, tiny_model_folder

Weights = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "cache"))
    return tiny_model_folder(tmp_path / "model", "qwen2")


def load(folder: Path, **settings: Any) -> None:
    load_base(ModelSettings.model_validate({"id": str(folder), "device": "cpu", "dtype": "float32", **settings}))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reweigh(folder: Path, change: Callable[[Weights], Weights]) -> None:
    file = folder / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file, metadata={"format": "pt"})


def _without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "n"),
    [(_without("lm_head"), 1), (_without("layers.1."), 12), (_without("q_proj.bias"), 3),
     (lambda weights: {f"wrapped.{name}": value for name, value in weights.items()}, 39)],
)  # fmt: skip
def test_weights_that_the_files_lack_are_no_random_numbers(
    folder: Path, change: Callable[[Weights], Weights], n: int
) -> None:
    reweigh(folder, change)
    with pytest.raises(ModelError, match=rf"the files lack {n} of the model's weights"):
        load(folder)


def test_more_layers_than_the_files_hold_are_refused(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=5)
    with pytest.raises(ModelError, match=r"lack 24 .* model.layers.3"):
        load(folder)


def test_weights_without_a_place_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    reweigh(folder, lambda weights: weights | {"model.layers.0.self_attn.o_proj.bias": torch.ones(64)})
    load(folder)
    assert "1 weights of the files have no place in the model, e.g. model.layers.0.self_attn.o_proj.bias" in caplog.text


def test_an_adapter_beside_the_weights_is_not_loaded_in_secret(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "another/base"}')
    with pytest.raises(ModelError, match="the folder holds a PEFT adapter"):
        load(folder)


@pytest.mark.parametrize(
    ("config", "because"),
    [({"hidden_act": "no_such"}, "names 'no_such', which transformers lacks"),
     ({"num_hidden_layers": "two"}, "expected int, got str"),
     ({"num_attention_heads": 5}, "shapes of its weights are not those"),
     ({"rope_parameters": {"rope_type": "no_such"}}, "RoPE of type no_such"),
     ({"model_type": "no_such"}, "does not recognize this architecture"),
     ({"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}, "code of its own, which is never run"),
     ({"model_type": "t5"}, "an encoder beside its decoder"),
     ({"quantization_config": {"quant_method": "fp8"}}, "stored quantized .fp8"),
     ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "stored quantized .awq"),
     ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "stored quantized")],
)  # fmt: skip
def test_what_cannot_be_loaded_is_one_line(folder: Path, config: Mapping[str, Any], because: str) -> None:
    edit(folder / "config.json", **config)
    with pytest.raises(ModelError, match=because) as caught:
        load(folder)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert len(caught.value.what) < 300


# --- the tokenizer -------------------------------------------------------------------------------------------

_FAR = {
    "content": "<|far|>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": True,
}


def _prefix_space(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", add_prefix_space=True)


def _added_in_config(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", additional_special_tokens=["<|far|>"])


def _added_in_a_file(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<|far|>": 259}')


def _split_specials(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", split_special_tokens=True)


@pytest.mark.parametrize(
    ("change", "because"),
    [(_prefix_space, "makes other tokens of"), (_added_in_config, "has another id for '<.far.>'"),
     (_added_in_a_file, "has another id for '<.far.>'"), (_split_specials, "makes other tokens of")],
)  # fmt: skip
def test_what_stands_beside_tokenizer_json_is_not_left_out(
    folder: Path, change: Callable[[Path], None], because: str
) -> None:
    change(folder)
    with pytest.raises(TemplateError, match=because) as caught:
        selftest.require_tokens(ChatTokenizer(folder))
    assert "save_pretrained" in caught.value.fix


def test_the_mend_for_added_tokens_mends(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    _added_in_config(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "whole")
    selftest.require_tokens(ChatTokenizer(tmp_path / "whole"))


def test_a_template_reads_special_tokens_in_transformers_order(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", bos_token="<|im_start|>", chat_template="{{ bos_token }}" + CHAT_TEMPLATE)
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<|endoftext|>"}')
    tokenizer = ChatTokenizer(folder)
    assert tokenizer.render([{"role": "user", "content": "x"}], add_generation_prompt=True).startswith("<|endoftext|>")
    selftest.require_tokens(tokenizer)


def test_another_prompt_than_transformers_writes_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ChatTokenizer(folder)
    monkeypatch.setattr(tokenizer, "render", lambda turns, add_generation_prompt: "another")
    with pytest.raises(TemplateError, match="renders another prompt"):
        selftest.require_tokens(tokenizer)


def test_tokens_are_compared_at_every_load_that_is_not_proven_yet(folder: Path) -> None:
    load(folder)
    _added_in_a_file(folder)
    with pytest.raises(FastconvError, match="has another id"):
        load(folder)
