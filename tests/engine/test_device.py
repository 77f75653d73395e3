"""A GPU that is too small, too old, busy, or whose driver does not match: one line each, with what would fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastconv.engine import device as card
from fastconv.engine.device import GpuFacts, fitting_changes, min_training_bytes, query_gpu, require_fit
from fastconv.engine.shapes import SHAPES, activation_bytes_per_tok, adapter_bytes, weight_bytes
from fastconv.errors import ModelError
from fastconv.planning import doctor
from fastconv.recipe import ModelSettings, Recipe, load_recipe

GIB = 2**30
QWEN = SHAPES["qwen2.5-7b"]
OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading "
    "and installing a new version from the URL"
)


def fake_cuda(free_gib: float = 140.0, total_gib: float = 141.0, capability: tuple[int, int] = (9, 0), error: str = ""):  # type: ignore[no-untyped-def]
    """A `torch.cuda` that has this card, or raises this at the first call."""

    def init() -> None:
        if error:
            raise RuntimeError(error)

    return SimpleNamespace(
        init=init,
        is_available=lambda: not error,
        mem_get_info=lambda: (int(free_gib * GIB), int(total_gib * GIB)),
        get_device_name=lambda: "Some Card",
        get_device_capability=lambda: capability,
    )


def line(cuda: Any, recipe: str = "pilot", *changes: str) -> str:
    loaded = load_recipe(f"recipes/{recipe}.toml", ["model.device=cuda", *changes])
    try:
        return require_fit(query_gpu(cuda, "13.0"), loaded, QWEN)
    except ModelError as error:
        return str(error)


def test_bytes_are_those_worked_out_for_qwen_7b() -> None:
    assert weight_bytes(QWEN) == 2 * 7_615_616_512
    assert 5.4 < weight_bytes(QWEN, four_bit=True) / 1e9 < 5.7
    assert adapter_bytes(QWEN, 32) == 80_740_352 * 20
    assert activation_bytes_per_tok(QWEN, plain=True) / 1e6 == pytest.approx(8.9, abs=0.2)
    # 26.27e9 bytes for a step of at most 5,300 tokens, 37.39e9 for one of 7,900 (bench behavior and group on an H100)
    assert activation_bytes_per_tok(QWEN) == pytest.approx(26.27e9 / 5300, rel=0.06)
    assert activation_bytes_per_tok(QWEN) == pytest.approx(37.39e9 / 7900, rel=0.06)


def test_a_large_card_is_fit_for_the_pilot() -> None:
    assert line(fake_cuda()).startswith("Some Card, 140 of 141 GiB free, at least 17")


@pytest.mark.parametrize(
    ("cuda", "told"),
    [
        (
            fake_cuda(15.5, 15.9),
            ("Some Card is too small: it has 15.9 GiB", "model.weights = '4bit'", "qwen2.5-3b"),
        ),
        (fake_cuda(15.0, 80.0), ("the GPU is busy: 15.0 of 80.0 GiB are free", "nvidia-smi", "4bit", "qwen2.5-3b")),
        (fake_cuda(15.0, 24.0, (7, 5)), ("too old: compute capability 7.5, bfloat16 needs 8.0", "float32")),
        (
            fake_cuda(error=OLD_DRIVER),
            ("driver speaks CUDA 12.2, torch was built for 13.0", "update the NVIDIA driver"),
        ),
        (fake_cuda(error="CUDA error: all CUDA-capable devices are busy or unavailable"), ("busy", "nvidia-smi")),
        (fake_cuda(error="CUDA error: out of memory"), ("no memory is free", "nvidia-smi")),
        (fake_cuda(error="Found no NVIDIA driver on your system."), ("Found no NVIDIA driver", "device = 'cpu'")),
        (fake_cuda(3.9, 4.0), ("too small", "qwen2.5-0.5b")),
    ],
    ids=["small", "busy", "old", "driver", "exclusive", "full", "no driver", "tiny"],
)
def test_one_line_says_what_is_wrong_and_what_would_fit(cuda: Any, told: tuple[str, ...]) -> None:
    said = line(cuda)
    assert "\n" not in said
    for words in told:
        assert words in said


def test_a_cpu_build_of_torch_is_named() -> None:
    with pytest.raises(ModelError, match="built without CUDA"):
        query_gpu(fake_cuda(), None)


def test_what_is_said_to_fit_does() -> None:
    pilot = load_recipe("recipes/pilot.toml", ["model.device=cuda"])
    room = 15.5 * GIB
    small = load_recipe("recipes/pilot.toml", ["model.device=cuda", "model.weights=4bit"])
    assert min_training_bytes(small, QWEN) < room < min_training_bytes(pilot, QWEN)
    assert any("qwen2.5-3b" in option for option in fitting_changes(pilot, QWEN, room))
    assert min_training_bytes(pilot, SHAPES["qwen2.5-3b"]) < room
    assert list(fitting_changes(pilot, QWEN, GIB)) == []


def test_the_small_gpu_recipe_fits_where_it_says() -> None:
    assert "at least" in line(fake_cuda(15.2, 15.9), "small_gpu")
    assert "micro-batches" not in line(fake_cuda(22.5, 23.9), "small_gpu")
    assert "micro-batches of about" in line(fake_cuda(22.5, 23.9), "pilot", "model.weights=4bit")


def test_the_small_pilot_fits_a_card_of_12_gb_without_halving() -> None:
    recipe = load_recipe("recipes/pilot_small.toml", ["model.device=cuda"])
    said = require_fit(query_gpu(fake_cuda(11.3, 11.76), "13.0"), recipe, SHAPES["qwen2.5-1.5b"])
    assert "at least" in said
    assert "halved" not in said


def test_doctor_and_run_refuse_a_base_that_this_machines_memory_cannot_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = load_recipe("recipes/pilot.toml", ["model.device=cpu"])
    monkeypatch.setattr(card, "ram_bytes", lambda: 23.0 * GIB)
    found = next(one for one in doctor.diagnose(recipe, tmp_path) if one.subject == "device")
    assert found.exit_code == ModelError.exit_code
    assert "it has 23.0 GiB of memory, qwen2.5-7b on its CPU needs at least 31.6" in found.text
    assert "a smaller model (qwen2.5-3b)" in found.text
    assert "4bit" not in found.text  # NF4 needs a GPU
    from fastconv.run.stacks import Stacks

    graph: Any = SimpleNamespace(recipe=recipe, source=None)
    with pytest.raises(ModelError) as raised:
        _ = Stacks(graph, SimpleNamespace()).base  # type: ignore[arg-type]
    assert str(raised.value) == found.text
    monkeypatch.setattr(card, "ram_bytes", lambda: 64.0 * GIB)
    (enough,) = [one for one in doctor.diagnose(recipe, tmp_path) if one.subject == "device"]
    assert enough.exit_code == 0
    assert "64 GiB of memory, at least 31.6 needed" in enough.text
    monkeypatch.setattr(card, "ram_bytes", lambda: None)  # a system that does not tell is not refused
    assert card.require_ram(recipe, QWEN) == ""


def test_the_memory_that_may_be_used_is_told_on_this_machine() -> None:
    room = card.ram_bytes()
    assert room is not None
    assert 2**28 < room < 2**50


def test_a_broken_config_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        card.shape_on_disk(ModelSettings(id=str(tmp_path)))


def test_doctor_and_run_say_the_same_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = load_recipe("recipes/pilot.toml", ["model.device=cuda"])
    monkeypatch.setattr(torch, "cuda", fake_cuda(15.5, 15.9))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = next(one for one in doctor.diagnose(recipe, tmp_path) if one.subject == "device")
    assert found.exit_code == ModelError.exit_code
    from fastconv.run.stacks import Stacks

    graph: Any = SimpleNamespace(recipe=recipe, source=None)
    with pytest.raises(ModelError) as raised:
        _ = Stacks(graph, SimpleNamespace()).base  # type: ignore[arg-type]
    assert str(raised.value) == found.text
    assert "4bit" in found.text


def test_a_model_that_is_not_known_yet_is_not_judged_by_its_size() -> None:
    recipe = Recipe.model_validate({"name": "own", "model": {"id": "someone/else", "revision": "0" * 40}})
    assert card.shape_on_disk(recipe.model) is None
    small = GpuFacts("Some Card", (9, 0), GIB, GIB)
    assert require_fit(small, recipe, None) == "Some Card, 1 of 1 GiB free"
