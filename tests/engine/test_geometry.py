"""Persona geometry: hidden states against plain transformers, the formulas by hand, and the stage in a run."""

from __future__ import annotations

import math
import random
from pathlib import Path

import polars as pl
import pytest
import torch

from fastconv.datasets.personas import load_personas
from fastconv.engine.geometry import last_token_states, layers_at, n_layers, persona_positions
from fastconv.engine.stack import Slot, Stack
from fastconv.experiment.graph import Graph
from fastconv.experiment.measures import GEOMETRY_DEPTHS
from fastconv.report import write_report
from tests.engine_kit import peft_model, plain_model, random_adapter, tiny_stack
from tests.loop_kit import DoneRun, run_tiny, tiny_recipe


@pytest.fixture(scope="module", params=["tiny_qwen", "tiny_llama"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def stack(folder: Path) -> Stack:
    return tiny_stack(folder)


def _prompts(n: int = 14) -> list[list[int]]:
    """Prompts of different lengths, in twos that begin alike."""
    rng = random.Random(3)
    starts = [[rng.randrange(256) for _ in range(rng.randint(3, 40))] for _ in range(n // 2)]
    return [[*starts[i // 2], *(rng.randrange(256) for _ in range(rng.randint(1, 30)))] for i in range(n)]


@pytest.mark.parametrize("batch_tok", [40, 10_000])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_states_are_those_of_plain_transformers(stack: Stack, folder: Path, batch_tok: int, with_adapter: bool) -> None:
    adapter = random_adapter(stack, 1)
    model = peft_model(folder, {"one": adapter}) if with_adapter else plain_model(folder)
    layers = layers_at(n_layers(stack.base), GEOMETRY_DEPTHS)
    with stack.live(*([Slot(frozen=(adapter,))] if with_adapter else [])):
        found = last_token_states(stack.base, _prompts(), layers, batch_tok)
    assert found.shape == (14, len(layers), 64)
    for prompt, mine in zip(_prompts(), found, strict=True):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
        expected = torch.stack([states[layer][0, -1] for layer in layers])
        assert float((mine - expected).abs().max()) < 1e-5
    assert not any(module._forward_hooks for module in stack.base.backbone.modules())


def test_layers_at_four_depths() -> None:
    assert layers_at(28, GEOMETRY_DEPTHS) == (7, 14, 21, 28)
    assert layers_at(3, GEOMETRY_DEPTHS) == (1, 2, 3)
    assert layers_at(1, GEOMETRY_DEPTHS) == (1,)


def test_cosine_and_distinctiveness_by_hand() -> None:
    """Four personas around a centre at (0, 10): the anchor to the right, one beside it, one opposite, one above."""
    at = {"anchor": (2.0, 10.0), "beside": (1.0, 10.0), "opposite": (-3.0, 9.0), "above": (0.0, 11.0)}
    found = {
        one.persona: one for one in persona_positions({k: torch.tensor([v]) for k, v in at.items()}, [5], "anchor")
    }
    assert {one.layer for one in found.values()} == {5}
    assert found["anchor"].cosine == pytest.approx(1.0)
    assert found["beside"].cosine == pytest.approx(1.0)
    assert found["opposite"].cosine == pytest.approx(-3 / math.sqrt(10))
    assert found["above"].cosine == pytest.approx(0.0, abs=1e-12)
    others = ((1 - 3 + 0) / 3, (10 + 9 + 11) / 3)  # the mean of the other three
    expected = math.hypot(2 - others[0], 10 - others[1]) / 10
    assert found["anchor"].distinctiveness == pytest.approx(expected)


def test_a_persona_at_the_centre_has_no_cosine() -> None:
    at = {"anchor": (1.0, 1.0), "other": (-1.0, 1.0), "centre": (0.0, 1.0)}
    found = {
        one.persona: one for one in persona_positions({k: torch.tensor([v]) for k, v in at.items()}, [1], "anchor")
    }
    assert found["centre"].cosine is None
    assert found["centre"].distinctiveness == 0.0
    assert found["other"].cosine == pytest.approx(-1.0)


def test_a_run_places_every_persona_on_the_base_and_under_every_snapshot(done_run: DoneRun) -> None:
    graph, store = done_run.graph, done_run.store
    stages = [stage for stage in graph.stages() if stage.kind == "geometry"]
    assert sorted(one.slot for one in stages) == [
        "geometry/base", "geometry/villain/source/e1/s42", "geometry/villain/source/e2/s42",
    ]  # fmt: skip
    personas = set(load_personas(done_run.recipe).prompts)
    values = {}
    for stage in stages:
        scores = store.scores(stage.key)
        assert {one.row for one in scores} == personas
        assert {(one.sample, one.metric) for one in scores} == {
            (layer, metric) for layer in (1, 2, 3) for metric in ("cosine", "distinctiveness")
        }
        assert all(
            one.value == pytest.approx(1.0) for one in scores if (one.row, one.metric) == ("assistant", "cosine")
        )
        assert all(abs(one.value or 0.0) <= 1.0 for one in scores if one.metric == "cosine")
        values[stage.slot] = [one.value for one in scores]
    assert len({str(one) for one in values.values()}) == 3  # each stack moves them


def test_geometry_is_one_stage_for_all_cells_and_sources_of_a_stack(tiny_qwen: Path) -> None:
    graph = Graph(
        tiny_recipe(tiny_qwen, grid__sources=["villain", "comedian"], grid__convergence=["source", "generic"])
    )
    keys = {plan.cell: plan.on_snapshot["geometry"].key for plan in graph.cells if plan.on_snapshot}
    assert len({key for cell, key in keys.items() if not cell.epoch}) == 1
    assert len(set(keys.values())) == 1 + 2 * 2 + 2  # the base, two epochs of two sources, two of the generic run


def test_geometry_can_be_left_out_and_then_nothing_of_it_is_there(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen, eval__geometry=False, grid__epochs=[0])
    assert not [stage for stage in Graph(recipe).stages() if stage.kind == "geometry"]
    _, heard = run_tiny(recipe, tmp_path)
    assert not [slot for slot in heard.stages if slot.startswith("geometry/")]


def test_the_report_sets_it_beside_every_leakage_figure(done_run: DoneRun, tmp_path: Path) -> None:
    paths = write_report(done_run.graph, done_run.store, tmp_path)
    lines = paths.markdown.read_text().splitlines()
    begin = next(place for place, line in enumerate(lines) if "Persona geometry" in line)
    rows = {}
    for line in lines[begin:]:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and cells[0].startswith("villain "):
            rows.setdefault(cells[0], cells[1:])
        if line.startswith("#") and rows:
            break
    assert list(rows) == ["villain base e0 s42", "villain source e1 s42", "villain source e2 s42"]
    (stage,) = [one for one in done_run.graph.stages() if one.slot == "geometry/villain/source/e2/s42"]
    wanted = [one for one in done_run.store.scores(stage.key) if (one.row, one.metric) == ("villain", "cosine")]
    assert rows["villain source e2 s42"][0] == ", ".join(f"{one.value:+.2f}" for one in wanted)
    assert rows["villain base e0 s42"][2] == "reference"
    assert rows["villain source e2 s42"][2].endswith("pp")
    assert rows["villain source e2 s42"][3] == "not measured"  # capability is not measurable on random weights
    frame = pl.read_parquet(paths.folder / "tables" / "geometry.parquet")
    assert frame.height == 3 * 2 * 3 * len(load_personas(done_run.recipe).prompts)
