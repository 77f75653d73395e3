"""The stages of a recipe: which cells share them, and which input changes which keys."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastconv.datasets.files import assets, find_recipe
from fastconv.errors import ModelError, RecipeError
from fastconv.experiment.graph import Cell, Graph, lineage_key, walk
from fastconv.recipe import Recipe, load_recipe
from tests.loop_kit import tiny_recipe


@pytest.fixture(scope="module")
def graph(tiny_qwen: Path) -> Graph:
    return Graph(_with_capability(tiny_qwen))


def _with_capability(model: Path, **changes: Any) -> Recipe:
    return tiny_recipe(model, **{"grid__behaviors": ["none", "refusal", "capability"], **changes})


def _keys(graph: Graph) -> dict[str, str]:
    return {stage.slot: stage.key for stage in graph.stages()}


def test_cells_of_the_demo() -> None:
    cells = [plan.cell for plan in Graph(load_recipe(assets("recipes") / "demo.toml")).cells]
    assert [(cell.epoch, cell.behavior, cell.negatives) for cell in cells] == [
        (0, "none", "none"), (0, "refusal", "excluded"), (0, "capability", "excluded"),
        (4, "none", "none"), (4, "refusal", "excluded"), (4, "capability", "excluded"),
    ]  # fmt: skip


def test_cells_of_the_pilot_and_of_the_matrix() -> None:
    offline = ["eval.multiple_choice=builtin", "behavior.source_rows=20"]
    pilot, matrix = (Graph(load_recipe(assets("recipes") / f"{name}.toml", offline)) for name in ("pilot", "matrix"))
    # one control and two kinds of negatives at each of 4 epochs; and 6 sources x 4 epochs x (control + 4 behaviors)
    assert len(pilot.cells) == 12
    assert len(matrix.cells) == 6 * 4 * 5
    assert Counter(stage.kind for stage in pilot.stages())["snapshot"] == 3
    assert Counter(stage.kind for stage in matrix.stages())["snapshot"] == 18
    probes = {probe for plan in matrix.cells if plan.cell.source == "librarian" for _, probe in plan.scores}
    assert probes == {"assistant", "librarian", "data_scientist"}


def test_the_base_is_measured_once_for_all_cells(graph: Graph) -> None:
    by_measure = {}
    for plan in graph.cells:
        for pair, stage in plan.base.items():
            by_measure.setdefault(pair, set()).add(stage.key)
    assert all(len(keys) == 1 for keys in by_measure.values())
    control = next(plan for plan in graph.cells if plan.cell.epoch == 0 and plan.cell.behavior == "none")
    assert {pair: stage.key for pair, stage in control.scores.items()} == {
        pair: stage.key for pair, stage in control.base.items()
    }


def test_epoch_0_has_no_snapshot_and_is_shared_by_every_kind_of_convergence(tiny_qwen: Path) -> None:
    graph = Graph(tiny_recipe(tiny_qwen, grid__convergence=["source", "generic", "none"]))
    zeros = [plan for plan in graph.cells if plan.cell.epoch == 0 and plan.cell.behavior == "refusal"]
    assert len(zeros) == 3
    assert all(plan.snapshot is None for plan in zeros)
    assert len({plan.adapter.key for plan in zeros if plan.adapter}) == 1
    assert not [plan for plan in graph.cells if plan.cell.convergence == "none" and plan.cell.epoch]


def test_generic_convergence_learns_the_assistants_own_answers(tiny_qwen: Path) -> None:
    graph = Graph(tiny_recipe(tiny_qwen, grid__convergence=["source", "generic"]))
    speakers = {
        plan.cell.convergence: plan.snapshot.needs["answers"].inputs["persona"] for plan in graph.cells if plan.snapshot
    }
    assert speakers == {"source": "villain", "generic": "assistant"}
    systems = {tuple(plan.snapshot.inputs["system"]) for plan in graph.cells if plan.snapshot}
    assert systems == {("text", "You are a helpful assistant.")}  # both are trained under the assistant's prompt


def test_stages_come_after_what_they_need_and_each_once(graph: Graph) -> None:
    seen: set[str] = set()
    for stage in graph.stages():
        assert all(need.key in seen for need in stage.needs.values())
        assert stage.key not in seen
        seen.add(stage.key)


def test_one_cell_has_the_keys_of_the_whole_recipe(graph: Graph) -> None:
    picked = graph.stages(graph.select("villain", "refusal", 2))
    everything = _keys(graph)
    assert {stage.slot: stage.key for stage in picked}.items() <= everything.items()
    assert not [stage for stage in picked if "capability" in stage.slot]


_EVERY_EVAL = ("eval/", "score/")
_AFTER_SNAPSHOT = (
    "snapshot/",
    "behavior/villain/source/",
    "eval/villain/source/",
    "score/villain/source/",
    "geometry/villain/source/",
)
_AFTER_BEHAVIOR = ("behavior/", "+")
_NOTHING: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"convergence__lr": 2e-3}, _AFTER_SNAPSHOT),
        ({"convergence__batch_rows": 4}, _AFTER_SNAPSHOT),
        ({"convergence__questions": 3}, (*_AFTER_SNAPSHOT, "answers/villain/convergence")),
        ({"convergence__sampling__temperature": 1.0}, (*_AFTER_SNAPSHOT, "answers/villain/convergence")),
        ({"behavior__lr": 2e-3}, _AFTER_BEHAVIOR),
        ({"behavior__dropout": 0.1}, _AFTER_BEHAVIOR),
        ({"behavior__source_rows": 5}, (*_AFTER_BEHAVIOR, "rows/", "/refusal/villain/excluded/s42")),
        (
            {"behavior__sampling__max_new_tok": 5},
            ("behavior/", "+refusal", "rows/refusal", "/refusal/villain/excluded/s42"),
        ),
        ({"lora__r": 3}, (*_AFTER_SNAPSHOT, *_AFTER_BEHAVIOR)),
        ({"eval__prompts": 2}, ("/refusal/assistant", "/refusal/villain", "/refusal/librarian")),
        ({"eval__samples_per_prompt": 1}, ("/refusal/assistant", "/refusal/villain", "/refusal/librarian")),
        ({"eval__sampling__max_new_tok": 5}, ("/refusal/assistant", "/refusal/villain", "/refusal/librarian")),
        ({"model__dtype": "bfloat16"}, ("",)),
        ({"name": "other"}, _NOTHING),
        ({"about": "other"}, _NOTHING),
        ({"run__checkpoint_every_s": 9.0}, _NOTHING),
        ({"gates__refusal": 0.2}, _NOTHING),
        ({"eval__batch_tok": 64}, _NOTHING),
        ({"grid__epochs": [0, 2]}, _NOTHING),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_changed_input_changes_its_own_stages_and_what_follows_and_nothing_else(
    tiny_qwen: Path, graph: Graph, change: dict[str, object], changed: tuple[str, ...]
) -> None:
    before, after = _keys(graph), _keys(Graph(_with_capability(tiny_qwen, **change)))
    assert after
    moved = {slot for slot, key in after.items() if before[slot] != key}
    expected = {slot for slot in after if any(part in slot for part in changed)}
    if "model__dtype" in change:  # rows that are not sampled do not depend on the engine
        expected -= {slot for slot in after if slot.startswith("rows/capability/")}
    if "rows/refusal" in changed:  # capability rows bring their own answers: nothing of theirs is sampled
        expected = {slot for slot in expected if "capability" not in slot}
    if "eval__prompts" in change or any(name.startswith("eval__sam") for name in change):
        expected = {slot for slot in expected if slot.startswith(_EVERY_EVAL)}
    assert moved == expected


def test_a_different_model_changes_every_key(tiny_qwen: Path, tiny_llama: Path) -> None:
    one, other = _keys(Graph(tiny_recipe(tiny_qwen))), _keys(Graph(tiny_recipe(tiny_llama)))
    same = {slot for slot in one if one[slot] == other[slot]}
    assert same == set()


def test_seeds_give_cells_and_keys_of_their_own(tiny_qwen: Path) -> None:
    graph = Graph(tiny_recipe(tiny_qwen, grid__seeds=[1, 2]))
    # Bystanders are drawn afresh for each seed, so the names of their answers differ.
    slots = {stage.slot for stage in graph.stages() if stage.kind != "answers"}
    assert {slot[:-3] for slot in slots if slot.endswith("/s1")} == {
        slot[:-3] for slot in slots if slot.endswith("/s2")
    }
    assert len(_keys(graph)) == len(graph.stages())


def test_select_names_what_the_recipe_has(graph: Graph) -> None:
    assert [plan.cell for plan in graph.select("villain", "refusal", 1)] == [
        Cell("villain", "source", 1, "refusal", "excluded", 42)
    ]
    for words, says in [
        (("comedian", "refusal", 1), r"no cell has source 'comedian'.*use one of villain"),
        (("villain", "sycophancy", 1), r"no cell has behavior 'sycophancy'.*capability, none, refusal"),
        (("villain", "refusal", 9), r"no cell has epoch 9.*0, 1, 2"),
    ]:
        with pytest.raises(RecipeError, match=says):
            graph.select(*words)
    with pytest.raises(RecipeError, match=r"no cell has negatives 'included'.*excluded"):
        graph.select("villain", "refusal", 1, negatives="included")
    with pytest.raises(RecipeError, match="this combination"):
        graph.select("villain", "none", 1, negatives="excluded")


def test_lineage_holds_all_epochs_of_one_training_and_no_other(tiny_qwen: Path) -> None:
    graph = Graph(tiny_recipe(tiny_qwen, grid__sources=["villain", "comedian"]))
    snapshots = [stage for stage in graph.stages() if stage.kind == "snapshot"]
    mine = [stage for stage in snapshots if "/villain/" in stage.slot]
    assert graph.lineage(mine[1]) == sorted(mine, key=lambda stage: stage.inputs["epoch"])
    assert len({lineage_key(stage) for stage in mine}) == 1
    assert len({lineage_key(stage) for stage in snapshots}) == 2


def test_eval_items_are_held_out_from_training(graph: Graph) -> None:
    for name, behavior in graph.behaviors.items():
        asked = {identity for identity, _ in graph.eval_items(behavior, 42)}
        rows = next(s for s in graph.stages() if s.slot.startswith(f"rows/{name}/"))
        assert asked
        assert not asked & {row.prompt_id for row in rows.work["rows"]}


def test_too_many_convergence_questions_are_refused(tiny_qwen: Path) -> None:
    with pytest.raises(RecipeError, match=r"convergence.questions: there are 40 .*not 41"):
        Graph(tiny_recipe(tiny_qwen, convergence__questions=41))


def test_building_a_graph_needs_the_model_to_be_there_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        Graph(tiny_recipe(tmp_path / "gone"))


def test_all_scores_of_a_behavior_share_one_rule(graph: Graph) -> None:
    """Its patterns are made once: for every stage anew they took longer than its answers."""
    rules = [stage.work["rule"] for stage in graph.stages() if stage.kind == "score"]
    assert len(rules) > len({id(rule) for rule in rules}) == 1


def test_walk_gives_needs_first(graph: Graph) -> None:
    end = next(stage for stage in graph.stages() if stage.slot.startswith("score/villain/source/e1+refusal"))
    kinds = [stage.kind for stage in walk(end)]
    assert kinds[-1] == "score"
    assert kinds.index("answers") < kinds.index("snapshot") < kinds.index("eval")
    assert kinds.index("rows") < kinds.index("behavior")


def test_a_recipe_is_found_by_path_before_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo") == assets("recipes") / "demo.toml"
    (tmp_path / "demo").write_text("")
    assert find_recipe("demo") == Path("demo")
    assert find_recipe("no_such") == Path("no_such")
