"""`run.replicates`: an epoch-0 cell of each behavior is trained again, and gives the noise from run to run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastconv.analysis.analysis import Analysis
from fastconv.errors import RecipeError
from fastconv.experiment.graph import Graph
from fastconv.recipe import Recipe, parse_recipe, run_id
from fastconv.report.claims import ask
from fastconv.run.status import status_of
from fastconv.store.ledger import Store
from tests.loop_kit import run_tiny, tiny_recipe, tiny_table
from tests.scale_kit import fill, matrix_recipe

LABEL = "villain source e20 refusal included"


def test_without_it_no_key_and_no_name_of_a_run_changes(tiny_qwen: Path) -> None:
    plain, again = tiny_recipe(tiny_qwen), tiny_recipe(tiny_qwen, run__replicates=2)
    assert "replicates" not in plain.model_dump(mode="json")["run"]
    assert run_id(plain) == run_id(tiny_recipe(tiny_qwen, run__replicates=0)) != run_id(again)
    assert parse_recipe(again.model_dump(mode="json")) == again
    before, after = ({stage.key: stage for stage in Graph(recipe).stages()} for recipe in (plain, again))
    assert before.keys() < after.keys()
    more = [after[key].slot for key in after.keys() - before.keys()]
    assert sum(slot.startswith("behavior/villain/e0/refusal/excluded/s4") for slot in more) == 2
    assert sum(slot.startswith("score/") and "/run4" in slot for slot in more) == 4  # assistant and canary, twice
    assert len(set(more)) == len(more)
    assert not {slot for slot in more if "snapshot" in slot or "/e1" in slot}


def test_a_replicate_is_asked_what_its_cell_is_asked(tiny_qwen: Path) -> None:
    graph = Graph(tiny_recipe(tiny_qwen, run__replicates=3))
    (plan,) = [plan for plan in graph.cells if plan.replicates]
    assert (plan.cell.source, plan.cell.epoch, plan.cell.behavior, plan.cell.seed) == ("villain", 0, "refusal", 42)
    assert {seed for seed, *_ in plan.replicates} == {43, 44, 45}
    for (seed, measure, probe), stage in plan.replicates.items():
        drawn, own = stage.needs["eval"], plan.scores[measure, probe].needs["eval"]
        assert drawn.inputs == own.inputs
        assert drawn.needs["behavior"].inputs["seed"] == seed
        assert drawn.key != own.key


def test_one_replicate_is_refused(tiny_qwen: Path) -> None:
    with pytest.raises(RecipeError, match="one replicate knows no spread"):
        parse_recipe(tiny_table(tiny_qwen, run__replicates=1))


def test_a_run_trains_them_and_then_computes_nothing_again(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen, run__replicates=2, grid__epochs=[0, 1])
    finished, heard = run_tiny(recipe, tmp_path)
    assert {"behavior/villain/e0/refusal/excluded/s43", "behavior/villain/e0/refusal/excluded/s44"} <= set(heard.stages)
    graph, store = Graph(recipe), Store.open(tmp_path, create=False)
    assert {one.state for one in status_of(graph, store)} == {"done"}
    assert not [verdict.subject for verdict in finished.verdicts if "seed 43" in verdict.subject]
    again, _ = run_tiny(recipe, tmp_path)
    assert again.tally.n_stages == 0
    # A model of random weights never refuses: replicates that are all alike are no certainty.
    assert [one.run_spread and one.run_spread.assumed for one in Analysis(graph, store).verdicts] == [True]


def filled(model: Path, folder: Path, replicates: int) -> tuple[Recipe, Store]:
    table = matrix_recipe(model, n_sources=1, seeds=1, samples=2).model_dump(mode="json")
    table["grid"] |= {"epochs": [0, 20], "behaviors": ["none", "refusal"], "negatives": ["included"]}
    recipe = parse_recipe(table | {"run": {"replicates": replicates}})
    return recipe, fill(recipe, folder)[1]


def test_the_spread_of_the_replicates_is_in_the_interval_and_is_told(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe, store = filled(tiny_qwen, tmp_path / "w", 4)
    decided = Analysis(Graph(recipe), store)
    (plan,) = [plan for plan in decided.graph.cells if plan.replicates]

    def mean(stage: object, probe: str) -> float:
        series = decided.reading.series(stage, "refusal", probe)  # pyright: ignore[reportArgumentType]
        assert series is not None
        return series.mean.value

    ours, its = (
        [mean(plan.scores["refusal", who], who), *(mean(s, who) for key, s in plan.replicates.items() if key[2] == who)]
        for who in ("assistant", "librarian")
    )
    sd = max(np.std(ours, ddof=1), np.std(np.subtract(ours, its), ddof=1))
    one = decided.verdict(LABEL)
    assert one.run_spread is not None
    assert (one.run_spread.sd, one.run_spread.df) == (pytest.approx(sd), 4)
    assert one.runs_text.endswith("measured on 5 trainings of one cell")
    assert one.runs_text in ask(decided, "runs", behavior="refusal").text
    assert "nobody measured it" not in ask(decided, "sure").text
    assert one.over_questions is not None
    assert (one.high or 0.0) - (one.low or 0.0) > (one.over_questions.high or 0.0) - (one.over_questions.low or 0.0)


def test_until_all_are_measured_the_declared_spread_holds(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe, store = filled(tiny_qwen, tmp_path / "w", 2)
    (plan,) = [plan for plan in Graph(recipe).cells if plan.replicates]
    store.forget(list(plan.replicates.values())[-1].key)
    one = Analysis(Graph(recipe), store).verdict(LABEL)
    assert one.run_spread is not None
    assert one.run_spread.assumed
