"""A card that another process has filled: every pass gives what it gives on an empty one, and the record says what was halved."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fastconv.engine.model import load_base
from fastconv.engine.stack import Slot, Stack
from fastconv.recipe import ModelSettings
from fastconv.run.run import run_recipe
from fastconv.store.records import Stage
from tests import tiny
from tests.engine_kit import SNAPSHOT, random_adapter
from tests.faults.test_memory import PASSES, probed
from tests.loop_kit import Heard, records, results, run_tiny, tiny_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
#: Left on the card: several rows of the model below, whose MLP alone takes 0.1 MB for each token, and not all of them.
LEFT_BYTES = 256 << 20


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random Qwen2 of three layers with activations as wide as those of a real model."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {"HIDDEN": 1024, "INTERMEDIATE": 8192, "HEADS": 16, "KV_HEADS": 4}.items():
            patched.setattr(tiny, name, value)
        yield tiny.tiny_model_folder(tmp_path_factory.mktemp("wide"), "qwen2")


@pytest.fixture(scope="module")
def stack(wide: Path) -> Stack:
    settings = {"id": str(wide), "device": "cuda", "dtype": "float32", "engine": "torch"}
    return Stack(load_base(ModelSettings.model_validate(settings)), SNAPSHOT)


def filled() -> torch.Tensor:
    """All of the card's free memory but LEFT_BYTES; dropping it gives it back."""
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return torch.empty(max(0, free - LEFT_BYTES), dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("name", [*PASSES, "probe"])
def test_a_pass_on_a_card_that_is_nearly_full_gives_the_same(stack: Stack, name: str) -> None:
    """Values in fp32 to 1e-3: passes of other shapes are summed in another order. Tokens and likeliest letters exactly."""
    read: Callable[..., list[Any]] = probed if name == "probe" else PASSES[name]
    halved: list[int] = []
    with stack.live(Slot((stack.take(random_adapter(stack, 1, size=0.01)),))):
        plenty = read(stack, lambda: halved.append(0), 512)
        assert not halved
        stack.base.drop_kept()
        others = filled()
        scarce = read(stack, lambda: halved.append(1), 512)
        del others
        torch.cuda.empty_cache()
    assert bool(halved) == (name != "probe")  # its few tokens fit
    assert len(scarce) == len(plenty)
    for one, other in zip(plenty, scarce, strict=True):
        if name == "sampling":
            assert one == other
        assert one == pytest.approx(other, abs=1e-3)
        if name == "letters":
            assert one.index(max(one)) == other.index(max(other))


@dataclass
class Filling(Heard):
    """Fills the card whenever a stage reads or samples, and frees it when that stage has ended."""

    others: list[torch.Tensor] = field(default_factory=list)

    def progress(self, progress: Any) -> None:
        if not self.others and not progress.slot.startswith(("snapshot", "behavior")):
            self.others.append(filled())

    def stage_done(self, stage: Stage, seconds: float) -> None:
        self.others.clear()
        torch.cuda.empty_cache()


def test_a_run_on_a_card_that_is_nearly_full_ends_and_says_what_was_halved(wide: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        wide, model__device="cuda", model__dtype="float32", model__engine="torch", eval__prompts=60, eval__samples_per_prompt=4,
        grid__behaviors=["none", "capability"],
    )  # fmt: skip
    plenty, scarce = tmp_path / "plenty", tmp_path / "scarce"
    run_tiny(recipe, plenty)
    heard = Filling()
    run_recipe(recipe, scarce, heard)
    assert not heard.failed
    assert results(recipe, scarce).keys() == results(recipe, plenty).keys()
    halved = {slot for slot, record in records(recipe, scarce).items() if record.facts.get("halved")}
    assert halved
    assert not any(record.facts.get("halved") for record in records(recipe, plenty).values())
