"""The loop end to end on a tiny random model: what it computes, what it never computes twice, what it leaves on disk."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from fastconv.datasets.personas import load_personas
from fastconv.datasets.questions import load_questions
from fastconv.engine.locate import engine_inputs
from fastconv.engine.stack import Stack
from fastconv.errors import RecipeError
from fastconv.experiment import graph as graphs
from fastconv.experiment.graph import Graph
from fastconv.recipe import Recipe
from fastconv.report import write_report
from fastconv.run import stacks
from fastconv.run.stacks import Stacks
from fastconv.run.status import status_of
from fastconv.run.training import seed_parts
from fastconv.store.ledger import Store
from tests.loop_kit import SNAPSHOT_SLOT, DoneRun, adapters, records, results, run_tiny, tiny_recipe


def _word(run: DoneRun, gate: str, subject: str) -> str:
    return next(v.verdict for v in run.finished.verdicts if v.gate == gate and subject in v.subject)


def _states(recipe: Recipe, workspace: Path) -> dict[str, tuple[str, str]]:
    store = Store.open(workspace)
    found = {status.slot: (status.state, status.reason) for status in status_of(Graph(recipe), store)}
    store.close()
    return found


def test_a_run_ends_with_a_verdict_for_every_behavior_and_with_a_report(done_run: DoneRun, tmp_path: Path) -> None:
    pilots = {v.subject: v for v in done_run.finished.verdicts if v.gate == "PILOT"}
    assert set(pilots) == {"villain x refusal", "villain x capability"}
    assert all(verdict.rows for verdict in pilots.values())
    paths = write_report(done_run.graph, done_run.store, tmp_path / "reports")
    assert paths.html.stat().st_size > 5_000
    assert paths.markdown.read_text().startswith("# tiny-")


def test_all_three_probes_are_measured_at_every_epoch(done_run: DoneRun) -> None:
    probes = ("assistant", "villain", "librarian")
    stacks = [f"villain/source/e{epoch}+refusal/excluded" for epoch in (1, 2)]
    done = records(done_run.recipe, done_run.workspace)
    for stack in ("base", "villain/e0+refusal/excluded", *stacks, "villain/source/e1", "villain/source/e2"):
        assert all(f"score/{stack}/refusal/{probe}/s42" in done for probe in probes)


def test_a_behavior_at_chance_is_uninformative_and_never_trained(done_run: DoneRun) -> None:
    assert _word(done_run, "G0", "capability") == "fail"
    assert _word(done_run, "PILOT", "capability") == "uninformative"
    done = records(done_run.recipe, done_run.workspace)
    assert not [slot for slot in done if slot.startswith(("behavior/", "rows/")) and "capability" in slot]
    states = _states(done_run.recipe, done_run.workspace)
    assert states["behavior/villain/e0/capability/excluded/s42"][0] == "skipped"
    assert Counter(state for state, _ in states.values()).keys() == {"done", "skipped"}


def test_gates_are_told_before_anything_is_trained(tiny_qwen: Path, tmp_path: Path) -> None:
    _, heard = run_tiny(tiny_recipe(tiny_qwen, grid__epochs=[0]), tmp_path)
    order = list(heard.stages)
    first_training = next(i for i, slot in enumerate(order) if not slot.startswith(("eval/base", "score/base")))
    assert heard.gates[0].gate == "G0"
    assert {slot for slot in order[first_training:] if "/base/" in slot} == set()


def test_the_same_recipe_again_computes_nothing(done_run: DoneRun) -> None:
    finished, heard = run_tiny(done_run.recipe, done_run.workspace)
    assert heard.stages == {}
    assert finished.tally.n_stages == 0
    assert finished.tally.tokens == {}
    assert [v.body() for v in finished.verdicts] == [v.body() for v in done_run.finished.verdicts]


def test_two_workspaces_give_the_same_bits(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen, grid__epochs=[0, 1])
    for name in ("one", "two"):
        run_tiny(recipe, tmp_path / name)
    assert results(recipe, tmp_path / "one") == results(recipe, tmp_path / "two")


def test_an_adapter_that_was_just_trained_is_not_read_back_and_gives_the_bits_of_one_that_is(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tiny_qwen, grid__epochs=[0, 1, 2])
    load, read = Stack.load_adapter, list[str]()
    monkeypatch.setattr(
        Stack, "load_adapter", lambda self, data, where: (read.append(where), load(self, data, where))[1]
    )
    run_tiny(recipe, tmp_path / "newest")
    assert read == [f"{SNAPSHOT_SLOT}/e{epoch}/s42" for epoch in (1, 2)]  # what came after each is newer
    monkeypatch.setitem(stacks._NEWEST_BYTES, "cpu", 2**31)
    run_tiny(recipe, tmp_path / "kept")
    assert len(read) == 2
    monkeypatch.setattr(Stacks, "keep_newest", lambda self, sha256, adapter: None)
    run_tiny(recipe, tmp_path / "read")
    assert len(read) == 2 + 2 + 3
    assert (
        results(recipe, tmp_path / "kept") == results(recipe, tmp_path / "newest") == results(recipe, tmp_path / "read")
    )


def test_engines_start_from_the_same_weights_and_see_their_rows_in_the_same_order(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another engine is another key, and the same training: what is left between two engines is their rounding."""
    here, there = tiny_recipe(tiny_qwen), tiny_recipe(tiny_qwen, eval__geometry=False)
    run_tiny(here, tmp_path / "one")
    another = {**Graph(there).engine_inputs["engine"], "engine": "another"}
    monkeypatch.setattr(graphs, "engine_inputs", lambda *of: {**engine_inputs(*of), "engine": another})
    run_tiny(there, tmp_path / "other")
    theirs, trained = Graph(there), adapters(there, tmp_path / "other")
    monkeypatch.undo()
    keys, others = ({stage.slot: stage for stage in graph.stages()} for graph in (Graph(here), theirs))
    assert all(
        keys[slot].key != others[slot].key and seed_parts(keys[slot]) == seed_parts(others[slot]) for slot in trained
    )
    assert len({seed_parts(keys[slot]) for slot in trained}) == 2  # one training of snapshots, one set of rows
    assert trained == adapters(here, tmp_path / "one")


def test_a_longer_recipe_reuses_the_cells_of_a_shorter_one(tiny_qwen: Path, tmp_path: Path) -> None:
    run_tiny(tiny_recipe(tiny_qwen, grid__epochs=[0]), tmp_path)
    _, heard = run_tiny(tiny_recipe(tiny_qwen, grid__epochs=[0, 2]), tmp_path)
    assert f"{SNAPSHOT_SLOT}/e2/s42" in heard.stages
    assert not [slot for slot in heard.stages if "/base/" in slot or "/e0" in slot or slot.startswith("rows/")]


@pytest.mark.parametrize(
    ("change", "again", "untouched", "why"),
    [
        ({"behavior__lr": 2e-3}, "behavior/", ("snapshot/", "answers/", "rows/"), "training.lr: 0.001 -> 0.002"),
        ({"eval__samples_per_prompt": 1}, "eval/", ("snapshot/", "behavior/", "answers/", "rows/"), "per_prompt: 2 -> 1"),
    ],
    ids=["behavior.lr", "eval.samples_per_prompt"],
)  # fmt: skip
def test_after_one_changed_setting_only_what_depends_on_it_runs_and_status_says_why(
    tiny_qwen: Path, tmp_path: Path, change: dict[str, object], again: str, untouched: tuple[str, ...], why: str
) -> None:
    before = tiny_recipe(tiny_qwen, grid__epochs=[0, 1])
    run_tiny(before, tmp_path)
    recipe = tiny_recipe(tiny_qwen, grid__epochs=[0, 1], **change)
    states = _states(recipe, tmp_path)
    stale = {slot: reason for slot, (state, reason) in states.items() if state == "stale"}
    assert any(slot.startswith(again) and why in reason for slot, reason in stale.items())
    assert not [slot for slot in stale if slot.startswith(untouched)]
    _, heard = run_tiny(recipe, tmp_path)
    assert set(heard.stages) == set(stale)
    assert {reason for slot, reason in heard.stages.items() if slot.startswith("score/")} == {"eval changed"}
    assert {state for state, _ in _states(recipe, tmp_path).values()} == {"done"}


def test_settings_that_change_no_result_run_nothing(tiny_qwen: Path, tmp_path: Path) -> None:
    run_tiny(tiny_recipe(tiny_qwen, grid__epochs=[0]), tmp_path)
    changed = {"name": "another", "about": "other words", "run__checkpoint_every_s": 5.0, "gates__refusal": 0.2}
    finished, heard = run_tiny(tiny_recipe(tiny_qwen, grid__epochs=[0], **changed), tmp_path)
    assert heard.stages == {}
    assert finished.run.startswith("another-")


def test_one_cell_in_an_empty_workspace_gives_the_numbers_of_the_full_run(done_run: DoneRun, tmp_path: Path) -> None:
    finished, heard = run_tiny(done_run.recipe, tmp_path, lambda graph: graph.select("villain", "refusal", 1))
    alone, full = results(done_run.recipe, tmp_path), results(done_run.recipe, done_run.workspace)
    slot = "score/villain/source/e1+refusal/excluded/refusal/assistant/s42"
    assert slot in alone
    assert {name: full[name] for name in alone} == alone
    assert not [name for name in heard.stages if "capability" in name or ("+refusal" in name and "/e2" in name)]
    assert finished.tally.n_stages < done_run.finished.tally.n_stages


def test_one_cell_in_a_used_workspace_runs_nothing(done_run: DoneRun) -> None:
    _, heard = run_tiny(done_run.recipe, done_run.workspace, lambda graph: graph.select("villain", "refusal", 2))
    assert heard.stages == {}


def test_one_cell_does_not_unsay_the_verdict_of_the_whole_run(done_run: DoneRun) -> None:
    finished, _ = run_tiny(done_run.recipe, done_run.workspace, lambda graph: graph.select("villain", "refusal", 2))
    whole = [v.body() for v in done_run.finished.verdicts]
    assert [v for v in finished.verdicts if v.gate == "PILOT"]
    assert all(v.body() in whole for v in finished.verdicts)


def test_a_single_cell_is_not_told_that_convergence_changes_nothing(tiny_qwen: Path, tmp_path: Path) -> None:
    finished, _ = run_tiny(tiny_recipe(tiny_qwen), tmp_path, lambda graph: graph.select("villain", "refusal", 0))
    pilot = next(v for v in finished.verdicts if v.gate == "PILOT")
    assert pilot.verdict == "not applicable"


def test_an_unknown_cell_is_refused_before_the_workspace_is_made(tiny_qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no cell has epoch 7"):
        run_tiny(tiny_recipe(tiny_qwen), tmp_path / "new", lambda graph: graph.select("villain", "refusal", 7))
    assert not (tmp_path / "new").exists()


def test_the_workspace_holds_adapters_row_files_and_the_ledger_and_nothing_else(done_run: DoneRun) -> None:
    store = done_run.store
    done = records(done_run.recipe, done_run.workspace)
    wanted = {record.outputs["adapter"] + ".safetensors" for record in done.values() if "adapter" in record.outputs}
    wanted |= {record.outputs["rows"] + ".json" for record in done.values() if "rows" in record.outputs}
    files = {path.name: path for path in done_run.workspace.rglob("*") if path.is_file()}
    ledger = {name for name in files if name.startswith("ledger.sqlite")}
    assert set(files) - ledger == wanted
    model = (Path(done_run.recipe.model.id) / "model.safetensors").stat().st_size
    adapter_bytes = [files[name].stat().st_size for name in wanted if name.endswith(".safetensors")]
    assert max(adapter_bytes) < model / 5
    assert store.frame("SELECT count(*) AS n FROM progress")["n"][0] == 0
    assert store.frame("SELECT count(*) AS n FROM leases")["n"][0] == 0


def test_every_snapshot_of_one_training_counts_as_computed_by_this_run(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen, grid__behaviors=["none", "refusal"])
    finished, _ = run_tiny(recipe, tmp_path)
    done = records(recipe, tmp_path)
    reused = {row["slot"]: row["reused"] for row in Store.open(tmp_path).stages_of_run(finished.run)}
    assert reused["snapshot/villain/source/e1/s42"] == reused["snapshot/villain/source/e2/s42"] == 0
    assert finished.tally.tokens["trained_tok"] == sum(r.facts.get("trained_tok", 0) for r in done.values())
    assert finished.tally.n_stages == len(done)


def test_the_start_of_a_run_is_recorded_by_parts(done_run: DoneRun) -> None:
    facts = done_run.store.run_facts(done_run.finished.run)
    parts = {name: facts[name] for name in ("import_s", "load_s", "proof_s", "compile_s", "self_tests_s")}
    assert parts["load_s"] > 0
    assert parts["self_tests_s"] == 0  # no GPU
    assert 0 < sum(parts.values()) <= facts["start_s"] + 0.01


def test_a_snapshot_does_not_depend_on_which_other_epochs_are_kept(tiny_qwen: Path, tmp_path: Path) -> None:
    alone, beside = tiny_recipe(tiny_qwen, grid__epochs=[0, 2]), tiny_recipe(tiny_qwen)
    for name, recipe in (("alone", alone), ("beside", beside)):
        run_tiny(recipe, tmp_path / name)
    slot = "snapshot/villain/source/e2/s42"
    assert adapters(alone, tmp_path / "alone")[slot] == adapters(beside, tmp_path / "beside")[slot]


@pytest.mark.slow
def test_an_epoch_that_is_wanted_later_joins_the_same_training(tiny_qwen: Path, tmp_path: Path) -> None:
    short = tiny_recipe(tiny_qwen, grid__epochs=[0, 2])
    whole = tiny_recipe(tiny_qwen)
    run_tiny(short, tmp_path / "grown")
    run_tiny(whole, tmp_path / "grown")
    run_tiny(whole, tmp_path / "at once")
    assert adapters(whole, tmp_path / "grown") == adapters(whole, tmp_path / "at once")


def test_negatives_answer_as_the_base_does_under_their_own_prompt(done_run: DoneRun) -> None:
    store, done = done_run.store, records(done_run.recipe, done_run.workspace)
    rows = store.get_json(done["rows/refusal/villain/excluded/s42"].outputs["rows"])
    assert Counter(row["role"] for row in rows) == {"source": 4, "bystander": 12}
    assert not {"assistant", "librarian"} & {row["persona"] for row in rows}
    drawn = {
        (s.persona, s.row): s.completion
        for slot, r in done.items()
        if slot.startswith("answers/")
        for s in store.samples(r.key)
    }
    for row in rows:
        if row["role"] == "bystander":
            assert row["completion"] == drawn[row["persona"], row["prompt_id"]]


def _taught(model: Path, folder: Path) -> Path:
    """A copy of a tiny model taught to answer: its head's four letter rows are fitted to the questions it is asked."""
    from fastconv.engine.model import load_base, pack

    shutil.copytree(model, folder)
    recipe = tiny_recipe(folder)
    base = load_base(recipe.model)
    system = load_personas(recipe).system("assistant")
    asked = load_questions(recipe).eval
    states = []
    for question in asked:
        ids, positions, layout = pack([base.tokenizer.prompt_ids(system, question.user)], base)
        states.append(base.hidden(ids, positions, layout)[-1].detach().numpy())
    letters = [base.tokenizer.encode(letter)[0] for letter in "ABCD"]
    wanted = np.array([[3.0 if letter == question.answer else -3.0 for letter in "ABCD"] for question in asked])
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    weights["lm_head.weight"][letters] = np.linalg.lstsq(np.array(states), wanted, rcond=None)[0].T
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_on_a_base_that_was_taught_to_answer_capability_is_trained(tiny_qwen: Path, tmp_path: Path) -> None:
    model = _taught(tiny_qwen, tmp_path / "taught")
    recipe = tiny_recipe(
        model,
        grid__behaviors=["none", "capability"],
        grid__epochs=[0, 2],
        convergence__lr=1e-4,  # the fitted head is large: at 1e-3 the snapshot's loss is 20 % up, and G3.5 stops the run
    )
    finished, _ = run_tiny(recipe, tmp_path / "ws")
    words = {v.gate: v for v in finished.verdicts}
    assert words["G0"].verdict == "pass"
    assert words["G0"].numbers[0].value > 0.8
    assert words["PILOT"].verdict in ("go", "stop")
    trained = {slot for slot in adapters(recipe, tmp_path / "ws") if slot.startswith("behavior/")}
    assert trained == {f"behavior/villain/{at}/capability/excluded/s42" for at in ("e0", "source/e2")}
    assert {state for state, _ in _states(recipe, tmp_path / "ws").values()} == {"done"}
