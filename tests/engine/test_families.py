"""Each family computes what transformers and PEFT compute, or is refused by name; the proof at load, and what it sees."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastconv.engine import family, proof, selftest
from fastconv.engine.attention import Limits, Packed, Padded, attend, attend_by_row, visible
from fastconv.engine.family import Head
from fastconv.engine.locate import engine_identity, locate
from fastconv.engine.model import Base, check_base, load_base, pack
from fastconv.engine.shapes import shape_of
from fastconv.engine.train import weighted_cross_entropy
from fastconv.errors import FastconvError, ModelError
from fastconv.recipe import ModelSettings
from tests import ROOT
from tests.engine.families_kit import COLUMNS, FAMILIES, NEAR, build, row_of, table, verdicts


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "cache"))


def loaded(folder: Path, **settings: Any) -> Base:
    return load_base(ModelSettings.model_validate({"id": str(folder), "device": "cpu", **settings}))


def _known_before_loading(folder: Path) -> str:
    """What `check_base` says of a folder: `equal`, or why it is refused."""
    try:
        check_base(folder, ModelSettings(id=str(folder), device="cpu"))
    except FastconvError as error:
        return error.what
    return "equal"


@pytest.mark.slow
def test_no_family_is_silently_another_model(tmp_path: Path) -> None:
    rows = []
    for number, name in enumerate(FAMILIES):
        found = verdicts(tmp_path / str(number), name)
        wrong = {column: value for column, value in found.items() if not isinstance(value, str) and value > NEAR}
        assert not wrong, f"{name}: {wrong}"
        refused_at_load = isinstance(found["bare"], str) and "RoPE changes with the length" not in found["bare"]
        assert (_known_before_loading(tmp_path / str(number)) != "equal") == refused_at_load, name
        rows.append(row_of(name, found))
    equal = [row for row in rows if row.count(" equal ") == len(COLUMNS)]
    assert len(FAMILIES) >= 24
    assert len(equal) >= 24
    page = ROOT / "docs" / "FAMILIES.md"
    if os.environ.get("FASTCONV_WRITE_FAMILIES"):
        page.write_text(table(rows))
    assert page.read_text() == table(rows), "docs/FAMILIES.md is not what this test finds"


@pytest.mark.parametrize("name", ["gemma2", "mistral 0.1", "granite", "cohere2", "phi (2)", "gpt_neox"])
def test_a_family_is_transformers_own(tmp_path: Path, name: str) -> None:
    found = verdicts(tmp_path / "model", name)
    assert all(not isinstance(value, str) and value <= NEAR for value in found.values()), found


@pytest.mark.parametrize(
    ("name", "because"),
    [("qwen3_next", "linear_attention"), ("gpt_oss", "s_aux"), ("llama4_text", "chunked_attention"),
     ("bloom", "ALiBi"), ("bart (decoder)", "does not tell packed rows apart"),
     ("falcon", "a list of its own"), ("stablelm", "which tokens form a row"), ("lfm2", "conv")],
)  # fmt: skip
def test_a_family_beyond_is_refused_at_load_by_name(tmp_path: Path, name: str, because: str) -> None:
    with pytest.raises(ModelError, match=because) as caught:
        loaded(build(tmp_path / "model", name))
    assert "FAMILIES.md" in caught.value.fix


@pytest.mark.parametrize("name", ["bart (decoder)", "gpt_oss", "gptj", "gemma3n_text"])
def test_a_family_is_known_before_its_weights_are_read(tmp_path: Path, name: str) -> None:
    folder = build(tmp_path / "model", name)
    (folder / "model.safetensors").unlink()
    assert (_known_before_loading(folder) == "equal") == (name == "gemma3n_text")


@pytest.mark.parametrize("name", ["llama, dynamic RoPE", "phi3, longrope"])
def test_rows_past_the_length_where_rope_changes_are_refused(tmp_path: Path, name: str) -> None:
    base = loaded(build(tmp_path / "model", name))
    pack([list(range(16)), [1, 2]], base)
    with pytest.raises(ModelError, match="17 tokens is longer than 16"):
        pack([list(range(17))], base)


def _without_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "hides", lambda self, n_tok: False)


def _without_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Head, "_shaped", lambda self, raw: raw)


def _without_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Head, "slope", lambda self, logits: 1.0)


def _without_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "_longest", lambda config: (0, ""))


@pytest.mark.parametrize(
    ("name", "breaks", "seen"),
    [("mistral 0.1", _without_windows, "packed rows"), ("granite", _without_scale, "packed rows"),
     ("granite", _without_slope, "gradient"), ("gemma2", _without_slope, "gradient"),
     ("llama, dynamic RoPE", _without_lengths, "off")],
)  # fmt: skip
def test_the_proof_sees_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, breaks: Callable[[pytest.MonkeyPatch], None], seen: str
) -> None:
    folder = build(tmp_path / "model", name)
    breaks(monkeypatch)
    with pytest.raises(ModelError, match=seen):
        loaded(folder)


def test_a_wide_window_is_proven_by_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(tmp_path / "model", "mistral 0.1")
    config = json.loads((folder / "config.json").read_text()) | {"sliding_window": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    assert loaded(folder).rules.windows == (4096,)
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "another"))
    _without_windows(monkeypatch)
    with pytest.raises(ModelError, match="another model"):
        loaded(folder)


def test_a_base_in_bf16_is_held_against_a_small_fp32_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(tmp_path / "model", "gemma2")
    base = loaded(folder, dtype="bfloat16")
    measured = proof.prove(base)
    assert measured["fp32 packed rows"] < 1e-4
    assert measured["packed rows"] < 0.25
    monkeypatch.setattr(family.Rules, "pads", lambda self, longest: False)
    monkeypatch.setattr(proof, "rules_of", lambda model: family.NO_RULES)
    with pytest.raises(ModelError, match="another model"):
        proof.prove(base)


def test_in_fp32_what_rounding_does_to_the_reference_itself_refuses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained weights blow up single tokens: a real 1.5B differs from itself by 0.01 nats in a batch of two."""
    base = loaded(build(tmp_path / "model", "mistral 0.1"))
    with torch.no_grad():
        base.model.model.norm.weight *= 1e5  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    measured = proof.prove(base)
    assert measured["packed rows"] > proof._NEAR_NATS
    with monkeypatch.context() as patch:
        patch.setattr(proof, "_ROUNDINGS", 0.0)
        with pytest.raises(ModelError, match="another model"):
            proof.prove(base)
    _without_windows(monkeypatch)
    with pytest.raises(ModelError, match="another model"):
        proof.prove(base)


def test_in_16_bits_a_few_tokens_far_off_refuse_nothing_and_most_tokens_off_do(tiny_qwen: Path) -> None:
    """Trained weights after random tokens: a row may be far off by rounding alone, in transformers' own bf16 as in ours."""
    base = loaded(tiny_qwen, dtype="bfloat16")
    comparison = proof._Comparison(base, proof.plain_twin(base.model))
    right = torch.randn(40, 64)
    few, most, unread = right.clone(), right.clone(), right.clone()
    few[:13] = torch.randn(13, 64)
    most[:27] = torch.randn(27, 64)
    unread[:30] = torch.nan
    assert comparison._gap("logits", [few], [right]) < 0.25
    for wrong in (most, unread):
        with pytest.raises(ModelError, match="another model"):
            comparison._gap("logits", [wrong], [right])
    gradient = right.clone()
    gradient[-1] = 0  # no loss is read at a row's last token
    assert comparison._share(gradient, gradient) == 0
    exact = proof._Comparison(loaded(tiny_qwen), comparison.twin)
    with pytest.raises(ModelError, match="another model"):
        exact._gap("logits", [few], [right])


def test_a_proof_is_kept_until_weights_engine_or_code_change(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proven: list[str] = []
    real = proof.prove
    monkeypatch.setattr(proof, "prove", lambda base: proven.append(str(base.dtype)) or real(base))
    for dtype in ("float32", "float32", "bfloat16"):
        loaded(tiny_qwen, dtype=dtype)
    assert proven == ["torch.float32", "torch.bfloat16"]
    settings = ModelSettings(id=str(tiny_qwen), device="cpu")
    base = loaded(tiny_qwen)
    first = proof._key(base, engine_identity(settings))
    base.name = "other weights"
    assert proof._key(base, engine_identity(settings)) != first
    assert locate(settings).kind == "local"


def test_a_failed_proof_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(tmp_path / "model", "granite")
    with monkeypatch.context() as broken:
        _without_scale(broken)
        with pytest.raises(ModelError):
            loaded(folder)
    assert not list((tmp_path / "cache").rglob("*.json"))
    loaded(folder)


@pytest.mark.slow
def test_the_embedded_model_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTCONV_CACHE")  # converting it again would take longer than all of this
    base = load_base(ModelSettings(id="builtin:smollm2", device="cpu"))
    start_s = time.process_time()
    selftest.require_tokens(base.tokenizer)
    measured = proof.prove(base)
    print(f"proof of builtin:smollm2: {time.process_time() - start_s:.2f} s of CPU time")
    assert max(measured.values()) < 2e-3


def test_a_keyword_that_is_not_computed_is_refused() -> None:
    q = torch.randn(1, 2, 3, 4)
    layout = Packed.of([3])
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    attend(module, q, q, q, None, layout=layout, position_ids=torch.zeros(1), use_cache=False)
    for asked in ({"s_aux": q}, {"position_bias": q}, {"something_new": 1}, {"dropout": 0.1}, {"is_causal": False}):
        with pytest.raises(ModelError, match=next(iter(asked))):
            attend(module, q, q, q, None, layout=layout, **asked)  # type: ignore[arg-type]


def test_padded_rows_have_windows_and_caps_as_packed_rows_do() -> None:
    lengths, limits = [4, 9, 1], Limits(3, 2.0)
    q, k, v = torch.randn(4, 14, 8), torch.randn(2, 14, 8), torch.randn(2, 14, 8)
    padded = Padded.of(lengths, n_tok=14, width=12)
    for one in (limits, Limits(3), Limits(0, 2.0)):
        assert torch.allclose(
            padded.attend(0, q, k, v, 0.3, one), attend_by_row(q, k, v, (0, 4, 13, 14), 0.3, one), atol=1e-5
        )
    assert visible(2, 4, 2, q.device).tolist() == [[False, True, True, False], [False, False, True, True]]


def test_the_chunked_loss_has_the_gradient_of_a_scaled_and_capped_head() -> None:
    hidden = torch.randn(600, 6, dtype=torch.float64).float().requires_grad_()
    head = Head(torch.randn(11, 6), torch.randn(11), 0.25, 3.0)
    targets, weights = torch.randint(0, 11, (600,)), torch.rand(600)
    total, losses = weighted_cross_entropy(hidden, head, targets, weights)
    (mine,) = torch.autograd.grad(total, hidden)
    logits = 3.0 * torch.tanh((hidden @ head.weight.t() + head.bias) * 0.25 / 3.0)  # type: ignore[operator]
    right = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (expected,) = torch.autograd.grad((right * weights).sum(), hidden)
    assert torch.allclose(losses, right.detach(), atol=1e-5)
    assert torch.allclose(mine, expected, atol=1e-6)
    wide = head.logits_fp32(hidden.detach(), 4)
    assert torch.allclose(wide, logits.detach(), atol=1e-5)


def test_sizes_are_read_by_the_names_of_each_family() -> None:
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "vocab_size": 9,
    }
    assert shape_of({"model_type": "gpt_neox", **sizes}).n_kv_heads == 4
    assert shape_of({"model_type": "gemma3", "text_config": {**sizes, "num_key_value_heads": 1}}).n_kv_heads == 1
    assert shape_of({"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 9}).intermediate == 128
    with pytest.raises(ModelError, match="vocab_size"):
        shape_of({"n_layer": 2, "n_head": 4, "n_embd": 32})


def test_a_tokenizer_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", "qwen2")
    held = json.loads((folder / "tokenizer.json").read_text())
    last = held["added_tokens"][-1]
    held["added_tokens"] += [{**last, "id": last["id"] + 1 + i, "content": f"<|far{i}|>"} for i in range(12)]
    (folder / "tokenizer.json").write_text(json.dumps(held))
    with pytest.raises(ModelError, match="embedding only"):
        loaded(folder)
