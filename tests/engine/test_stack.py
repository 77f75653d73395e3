"""The live stack against PEFT's sum, the concatenated export and a merge, in fp32 on two tiny models."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastconv.chat import ChatTokenizer
from fastconv.engine import stack as stacking
from fastconv.engine.export import (
    BaseReference,
    export_adapter,
    export_concatenated,
    export_separate,
    load_peft_folder,
)
from fastconv.engine.lora import concatenate, read_safetensors
from fastconv.engine.model import Base
from fastconv.engine.stack import Slot, Stack
from fastconv.errors import AdapterError, TemplateError, TrainingError
from fastconv.recipe import LoraSettings
from tests.engine_kit import (
    BEHAVIOR,
    furthest,
    live_logits,
    packed_logits,
    peft_model,
    plain_logits,
    plain_model,
    ragged_rows,
    random_adapter,
    tiny_stack,
)
from tests.tiny import tiny_model_folder, tiny_tokenizer_files

TOLERANCE = 1e-5
ROWS = [row.ids for row in ragged_rows(5)]


@pytest.fixture(scope="module", params=["tiny_qwen", "tiny_llama"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def stack(folder: Path) -> Stack:
    return tiny_stack(folder)


def pair(stack: Stack):
    """A snapshot and a behavior adapter of different rank and scale."""
    return [random_adapter(stack, 1), random_adapter(stack, 2, BEHAVIOR)]


def test_the_stack_is_pefts_sum_of_two_adapters(stack: Stack, folder: Path) -> None:
    adapters = pair(stack)
    model = peft_model(folder, dict(zip(("snapshot", "behavior"), adapters, strict=True)))
    mine = live_logits(stack, adapters, ROWS)
    assert furthest(mine, [plain_logits(model, row) for row in ROWS]) < TOLERANCE
    assert furthest(mine, packed_logits(stack.base, ROWS)) > 0.1, "the adapters must matter for this to show anything"


def test_the_concatenated_export_loads_in_peft_and_is_the_stack(stack: Stack, folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    adapters = pair(stack)
    export_concatenated(adapters, BaseReference(str(folder)), tmp_path)
    model = PeftModel.from_pretrained(plain_model(folder), str(tmp_path))
    assert furthest(live_logits(stack, adapters, ROWS), [plain_logits(model, row) for row in ROWS]) < TOLERANCE
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (12, 12, False)


def test_the_stack_is_an_fp32_merge(stack: Stack) -> None:
    adapters = pair(stack)
    mine = live_logits(stack, adapters, ROWS)
    with stacking.folded(stack, adapters):
        assert furthest(mine, packed_logits(stack.base, ROWS)) < TOLERANCE


def test_packed_rows_are_the_padded_batch(stack: Stack, folder: Path) -> None:
    longest = max(map(len, ROWS))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ROWS])
    with torch.no_grad():
        padded = plain_model(folder)(input_ids=ids, attention_mask=mask).logits
    theirs = [padded[i, : len(row)] for i, row in enumerate(ROWS)]
    assert furthest(packed_logits(stack.base, ROWS), theirs) < TOLERANCE


def test_a_perturbed_row_leaves_its_neighbours_alone(stack: Stack) -> None:
    before = live_logits(stack, pair(stack), ROWS)
    changed = [[(token + 1) % 256 for token in row] if i == 2 else row for i, row in enumerate(ROWS)]
    after = live_logits(stack, pair(stack), changed)
    assert furthest([before[2]], [after[2]]) > 0.1
    assert furthest(before[:2] + before[3:], after[:2] + after[3:]) == 0.0


def test_two_slots_in_one_pass_each_keep_their_own_tokens(stack: Stack) -> None:
    snapshot, behavior = pair(stack)
    alone = [live_logits(stack, [snapshot], ROWS[:1])[0], live_logits(stack, [snapshot, behavior], ROWS[1:2])[0]]
    with stack.live(Slot((snapshot,)), Slot((snapshot, behavior))):
        middle = len(ROWS[0])
        stack.route.spans = ((0, middle), (middle, middle + len(ROWS[1])))
        together = packed_logits(stack.base, ROWS[:2])
    assert furthest(alone, together) < TOLERANCE


def test_separate_export_round_trip(stack: Stack, folder: Path, tmp_path: Path) -> None:
    adapters, base = pair(stack), BaseReference(str(folder), "0" * 40)
    export_separate(adapters, base, tmp_path)
    loaded = [load_peft_folder(stack, tmp_path / name, base) for name in ("0", "1")]
    assert [a.sha256() for a in loaded] == [a.sha256() for a in adapters]
    assert [a.scale for a in loaded] == pytest.approx([a.scale for a in adapters])
    about = json.loads((tmp_path / "stack.json").read_text())
    assert about["base"]["revision"] == "0" * 40
    assert [entry["folder"] for entry in about["adapters"]] == ["0", "1"]
    assert [entry["sha256"] for entry in about["adapters"]] == [a.sha256() for a in adapters]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapters_file_is_that_of_the_library_with_its_metadata_in_order(stack: Stack, dtype: torch.dtype) -> None:
    adapter = random_adapter(stack, 1)
    data = adapter.to_bytes(dtype)
    tensors, metadata = read_safetensors(data, "here")
    assert len(tensors) == 2 * len(adapter.weights)
    assert list(metadata) == ["base", "lora"]
    theirs = safetensors.torch.save(tensors, metadata=dict(metadata))
    start, their_start = (8 + int.from_bytes(one[:8], "little") for one in (data, theirs))
    assert data[start:] == theirs[their_start:]
    header, their_header = json.loads(data[8:start]), json.loads(theirs[8:their_start])
    assert list(header.items())[1:] == list(their_header.items())[1:]
    module, (a, b) = next(iter(adapter.weights.items()))
    assert tensors[f"base_model.model.{module}.lora_A.weight"].equal(a.to(dtype))
    assert tensors[f"base_model.model.{module}.lora_B.weight"].equal(b.to(dtype))


def test_an_adapter_that_peft_trained_and_saved_loads(stack: Stack, folder: Path, tmp_path: Path) -> None:
    adapter = random_adapter(stack, 5)
    model = peft_model(folder, {"default": adapter})
    model.save_pretrained(tmp_path)
    loaded = load_peft_folder(stack, tmp_path, BaseReference(str(folder)))
    assert loaded.flat.equal(_in_order(adapter, loaded))
    assert furthest(live_logits(stack, [loaded], ROWS), [plain_logits(model, row) for row in ROWS]) < TOLERANCE


def _in_order(adapter, like) -> torch.Tensor:
    return torch.cat([weight.reshape(-1) for module in like.sizes for weight in adapter.weights[module]])


def test_an_adapter_on_some_of_the_layers(stack: Stack, folder: Path, tmp_path: Path) -> None:
    narrow = LoraSettings(r=4, alpha=4, rslora=False, targets=("q_proj", "down_proj"))
    one = tiny_stack(folder, narrow)
    adapter = random_adapter(one, 3)
    export_adapter(adapter, BaseReference(str(folder)), tmp_path)
    loaded = load_peft_folder(stack, tmp_path, BaseReference(str(folder)))
    assert furthest(live_logits(stack, [loaded], ROWS), live_logits(one, [adapter], ROWS)) < TOLERANCE


def test_a_swap_restores_the_bare_base_bit_for_bit_and_is_proven(stack: Stack) -> None:
    adapters, bare = pair(stack), packed_logits(stack.base, ROWS)
    with stack.live(Slot(tuple(adapters))):
        recorded = stack.prove(None, "test")
        assert stack.prove(recorded, "test").distance(recorded) == 0.0
    assert furthest(bare, packed_logits(stack.base, ROWS)) == 0.0
    with stack.live(Slot((adapters[0],))), pytest.raises(TrainingError, match="away from those recorded"):
        stack.prove(recorded, "test")
    silent = random_adapter(stack, 1, size=0.0)
    with stack.live(Slot((silent,))), pytest.raises(TrainingError, match="did not take"):
        stack.prove(None, "test")


def test_fold_gives_the_old_bits_back_also_after_a_failure(folder: Path) -> None:
    half = tiny_stack(folder, dtype="bfloat16")
    adapters = [random_adapter(half, 1)]
    before = {name: p.clone() for name, p in half.base.model.named_parameters()}
    with contextlib.suppress(KeyboardInterrupt), stacking.folded(half, adapters):
        assert any(not p.equal(before[name]) for name, p in half.base.model.named_parameters())
        raise KeyboardInterrupt
    assert all(p.equal(before[name]) for name, p in half.base.model.named_parameters())


def test_a_fold_that_bf16_would_round_away_is_refused(folder: Path) -> None:
    half = tiny_stack(folder, dtype="bfloat16")
    faint = [random_adapter(half, 1, size=0.004)]
    with pytest.raises(AdapterError, match="rho"), stacking.folded(half, faint):
        pass
    with stacking.folded(half, faint, "published"):
        pass


def test_rho_is_that_of_the_dense_product(stack: Stack) -> None:
    adapters = pair(stack)
    found = stacking.rho(stack, adapters)
    for module in stack.sizes:
        delta = sum(adapter.scale * adapter.weights[module][1] @ adapter.weights[module][0] for adapter in adapters)
        weight = stack.base.model.get_submodule(module).base.weight
        assert found[module] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-5)


# --- refusals: one clear line each, nothing loaded -------------------------------------------------------------------


def _one_line(error: pytest.ExceptionInfo[AdapterError]) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert "Fix:" in text


def test_wrong_base_by_name(stack: Stack, tiny_llama: Path, tiny_qwen: Path) -> None:
    other = tiny_stack(tiny_qwen if stack.base.model.config.model_type == "llama" else tiny_llama)
    with pytest.raises(AdapterError, match="another base model") as error:
        stack.load_adapter(random_adapter(other, 1).to_bytes(), "x.safetensors")
    _one_line(error)


def test_wrong_base_in_a_peft_folder(stack: Stack, folder: Path, tmp_path: Path) -> None:
    peft_model(folder, {"default": random_adapter(stack, 5)}).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="was made for") as error:
        load_peft_folder(stack, tmp_path, BaseReference("someone/else"))
    _one_line(error)


def test_a_base_of_the_same_shape_with_other_weights_is_another_base(stack: Stack, tmp_path: Path) -> None:
    kind = "qwen2" if stack.base.model.config.model_type == "qwen2" else "llama_tied"
    other = tiny_stack(tiny_model_folder(tmp_path, kind, seed=1))
    with pytest.raises(AdapterError, match="another base model"):
        stack.load_adapter(random_adapter(other, 1).to_bytes(), "x.safetensors")


def test_wrong_rank(stack: Stack, folder: Path, tmp_path: Path) -> None:
    export_adapter(random_adapter(stack, 1), BaseReference(str(folder)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 16}))
    with pytest.raises(AdapterError, match=r"of shape \[8, \d+\], not \[16") as error:
        load_peft_folder(stack, tmp_path, BaseReference(str(folder)))
    _one_line(error)


def test_nan_weights(stack: Stack) -> None:
    adapter = random_adapter(stack, 1)
    adapter.flat[7] = float("nan")
    with pytest.raises(AdapterError, match="NaN") as error:
        stack.load_adapter(adapter.to_bytes(), "x.safetensors")
    _one_line(error)


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=lambda n: f"{n}_bytes")
def test_truncated_safetensors(stack: Stack, keep: int) -> None:
    with pytest.raises(AdapterError, match="not a whole safetensors file") as error:
        stack.load_adapter(random_adapter(stack, 1).to_bytes()[:keep], "x.safetensors")
    _one_line(error)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt"])
def test_pickles_are_never_read(stack: Stack, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"would run code")
    (tmp_path / "adapter_config.json").write_text("{}")
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(AdapterError, match="pickle") as error:
            load_peft_folder(stack, place, BaseReference("x"))
        _one_line(error)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 2}},
                                    {"peft_type": "IA3"}, {"modules_to_save": ["lm_head"]}, {"r": 0},
                                    {"target_modules": "all-linear"},
                                    {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"},
                                    {"init_lora_weights": "olora"}, {"init_lora_weights": "corda"},
                                    {"init_lora_weights": "lora_ga"}, {"init_lora_weights": "a later one"},
                                    {"alpha_pattern": {"q_proj": 0}}, {"layers_to_transform": [0]},
                                    {"layers_to_transform": 0}, {"lora_bias": True}, {"corda_config": {"rho": 2.0}},
                                    {"an_option_of_tomorrow": 1}], ids=str)  # fmt: skip
def test_anything_but_plain_lora_is_refused(stack: Stack, folder: Path, tmp_path: Path, change: dict) -> None:
    export_adapter(random_adapter(stack, 1), BaseReference(str(folder)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(AdapterError) as error:
        load_peft_folder(stack, tmp_path, BaseReference(str(folder)))
    _one_line(error)


def test_an_eva_start_leaves_the_base_as_it_is(tiny_qwen: Path, tmp_path: Path) -> None:
    from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model

    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="eva", eva_config=EvaConfig())
    written = get_peft_model(plain_model(tiny_qwen), settings)
    for name, weight in written.named_parameters():
        if "lora_" in name:
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    written.save_pretrained(str(tmp_path))
    reference = PeftModel.from_pretrained(plain_model(tiny_qwen), str(tmp_path)).eval()
    stack = tiny_stack(tiny_qwen, LoraSettings(r=4, targets=("q_proj", "v_proj")))
    adapter = load_peft_folder(stack, tmp_path, BaseReference(str(tiny_qwen)))
    row = list(range(20))
    right = reference(input_ids=torch.tensor([row])).logits[0].detach()
    assert torch.allclose(live_logits(stack, [adapter], [row])[0], right, atol=1e-4)


def test_an_adapter_with_tensors_we_have_no_place_for(stack: Stack, folder: Path, tmp_path: Path) -> None:
    export_adapter(random_adapter(stack, 1), BaseReference(str(folder)), tmp_path)
    import safetensors.torch

    tensors, about = read_safetensors((tmp_path / "adapter_model.safetensors").read_bytes(), "x")
    for name, because in (("lm_head.weight", "are no LoRA"), ("lm_head.lora_A.weight", "no place for")):
        held = tensors | {f"base_model.model.{name}": torch.zeros(3)}
        safetensors.torch.save_file(held, tmp_path / "adapter_model.safetensors", metadata=dict(about))
        with pytest.raises(AdapterError, match=because):
            load_peft_folder(stack, tmp_path, BaseReference(str(folder)))


def test_tied_embeddings_carry_no_adapter(tiny_llama: Path, tiny_qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="shares its weight with the embedding") as error:
        tiny_stack(tiny_llama, LoraSettings(r=4, targets=("q_proj", "lm_head")))
    _one_line(error)
    with pytest.raises(
        AdapterError, match="is the output head"
    ):  # untied: its gradient is not made, so not that either
        tiny_stack(tiny_qwen, LoraSettings(r=4, targets=("q_proj", "lm_head")))
    stack = tiny_stack(tiny_llama)
    export_adapter(random_adapter(stack, 1), BaseReference(str(tiny_llama)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "lm_head"]}))
    with pytest.raises(AdapterError, match="shares its weight with the embedding") as error:
        load_peft_folder(stack, tmp_path, BaseReference(str(tiny_llama)))
    _one_line(error)


def test_unknown_target(tiny_qwen: Path) -> None:
    with pytest.raises(AdapterError, match=r"no layers called w_proj.*name some of down_proj, gate_proj") as error:
        tiny_stack(tiny_qwen, LoraSettings(r=4, targets=("w_proj",)))
    _one_line(error)


def test_a_tokenizer_without_a_chat_template(tmp_path: Path) -> None:
    tiny_tokenizer_files(tmp_path, chat_template=False)
    with pytest.raises(TemplateError, match="no chat template") as error:
        ChatTokenizer(tmp_path)
    assert "Fix:" in str(error.value)


def test_a_missing_pad_token_is_mended_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_model_folder(tmp_path, "qwen2")
    tiny_tokenizer_files(folder, pad_token=False)
    base = tiny_stack(folder).base
    assert base.model.config.pad_token_id == base.model.generation_config.pad_token_id == 256  # <|endoftext|>
    assert "no pad token is named; <|endoftext|> is used" in caplog.text


def test_concatenation_needs_one_base(tiny_qwen: Path, tiny_llama: Path) -> None:
    one, other = tiny_stack(tiny_qwen), tiny_stack(tiny_llama)
    with pytest.raises(AdapterError, match="differ in base"):
        concatenate([random_adapter(one, 1), random_adapter(other, 1)])


def test_the_base_is_frozen(stack: Stack) -> None:
    base: Base = stack.base
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training


def test_a_copy_of_the_base_is_known_by_its_weights_or_by_the_users_word(
    stack: Stack, folder: Path, tmp_path: Path
) -> None:
    """Unsloth writes the name of its own copy of a base; another model of the same shapes is not one."""
    import shutil

    copied, other = tmp_path / "copied", tmp_path / "other"
    for place in (copied, other):
        shutil.copytree(folder, place)
    weights = safetensors.torch.load_file(other / "model.safetensors")
    safetensors.torch.save_file({k: v * 1.001 for k, v in weights.items()}, other / "model.safetensors")
    here = BaseReference(str(folder))
    for name, taken in ((str(copied), True), (str(other), False), ("unsloth/a-copy", False)):
        export_adapter(random_adapter(stack, 1), BaseReference(name), tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        safetensors.torch.save_file(safetensors.torch.load_file(file), file)  # as PEFT writes it: no name of a base
        if taken:
            load_peft_folder(stack, tmp_path / "adapter", here)
            continue
        with pytest.raises(AdapterError, match="was made for") as error:
            load_peft_folder(stack, tmp_path / "adapter", here)
        assert f"--same-weights {name}" in error.value.fix
        load_peft_folder(stack, tmp_path / "adapter", BaseReference(str(folder), "", (name,)))
