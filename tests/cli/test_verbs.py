"""The commands check, peek, score, export, bench and forget, and published semantics."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from fastconv.experiment.graph import Graph
from fastconv.store.ledger import Store
from tests import TESTS
from tests.cli.test_cli import ask, refused
from tests.fake_vllm import parse
from tests.loop_kit import DoneRun, adapters, results, run_tiny, tiny_recipe, write_tiny_recipe

POISONED = TESTS / "poisoned"
USERS = TESTS / "user_data"
SCORED = "score/villain/source/e2+refusal/excluded/refusal/assistant/s42"


@pytest.fixture
def tiny(tiny_qwen: Path, tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path / "tiny.toml", tiny_qwen)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Four questions in the flat form, with three styles of labels."""
    path = tmp_path / "questions.jsonl"
    styles = [["A", "B", "C", "D"], ["1", "2", "3", "4"], ["A", "B", "C"], ["A", "B", "C", "D"]]
    rows = [
        {
            "question": f"Which of these is number {place}?",
            "choice_labels": labels,
            "choices": [f"thing {label} {place}" for label in labels],
            "correct_answer": labels[place % len(labels)],
        }
        for place, labels in enumerate(styles)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_check_passes_a_clean_recipe_and_refuses_each_poisoned_one(tmp_path: Path) -> None:
    assert ask("check", POISONED / "clean.toml", "-w", tmp_path).code == 0
    for path in sorted(POISONED.glob("mistake_*.toml")):
        answer = ask("check", path, "-w", tmp_path, "--json")
        assert answer.code == 2, path.name
        assert answer.json["refusals"] > 0
        assert "needs a pinned revision" in answer.json["base"]
        assert all(found["rows"] for found in answer.json["findings"] if found["severity"] == "refuse"), path.name


def test_check_says_that_no_run_takes_an_unpinned_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit is shown all the same, and the exit code is that of `run`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ("demo", "--set", "model.id=someone/theirs", "-w", tmp_path)
    answer, ran = ask("check", *words), ask("run", *words, "--reports", tmp_path)
    assert (answer.code, ran.code) == (4, 4)
    assert "0 refused" in answer.out
    assert "needs a pinned revision" in answer.err
    assert answer.err == ran.err
    both = ask("check", POISONED / "mistake_5.toml", "-w", tmp_path)
    assert both.code == 2
    assert "base: Qwen/Qwen2.5-7B-Instruct: a hub model needs a pinned revision" in both.out
    Store.open(tmp_path).close()
    assert ask("check", *words).out == answer.out, "a workspace that is there changes nothing"
    body = ask("check", *words, "--json")
    assert (body.code, body.json["passed"], body.json["refusals"]) == (4, False, 0)
    assert "needs a pinned revision" in body.json["base"]


def test_a_refused_design_never_reaches_the_workspace(tmp_path: Path) -> None:
    workspace = tmp_path / "checkpoints"
    answer = ask("run", POISONED / "mistake_5.toml", "-w", workspace, "--reports", tmp_path, "-q")
    refused(answer, 2, "D106")
    assert not workspace.exists()


def test_peek_marks_what_carries_loss(tiny: Path, tmp_path: Path) -> None:
    answer = ask("peek", tiny, "-w", tmp_path / "none", "--rows", 2)
    assert answer.code == 0
    assert "⟦" in answer.out
    assert "<|im_start|>system" in answer.out
    refused(ask("peek", tiny, "--set", "nothing/here", "-w", tmp_path / "none"), 2, "refusal/villain/excluded/s42")


@pytest.mark.parametrize("mode", [[], ["--text"]])
def test_score_answers_for_every_question(mode: list[str], questions: Path, tiny_qwen: Path) -> None:
    answer = ask("score", questions, "--model", tiny_qwen, "--json", *mode)
    assert answer.code == 0, answer
    found = answer.json["questions"]
    assert len(found) == 4
    assert [len(one["logprobs"]) for one in found] == [4, 4, 3, 4]
    assert answer.json["accuracy"] == sum(one["correct"] for one in found) / 4
    assert all((one["mass"] is None) == bool(mode) for one in found)


def test_an_exported_stack_scores_alike_concatenated_and_separate(
    done_run: DoneRun, questions: Path, tiny_qwen: Path, tmp_path: Path
) -> None:
    recipe = write_tiny_recipe(tmp_path / "tiny.toml", tiny_qwen)
    where = ("--epoch", 2, "--recipe", recipe, "-w", done_run.workspace)
    answer = ask("export", "villain", "refusal", tmp_path / "out", *where)
    assert answer.code == 0, answer
    one, parts = tmp_path / "out" / "concatenated", tmp_path / "out" / "separate"
    ways = [["--adapter", one], ["--adapter", parts / "0", "--adapter", parts / "1"], []]
    whole, separate, bare = (
        [one["logprobs"] for one in ask("score", questions, "--model", tiny_qwen, "--json", *way).json["questions"]]
        for way in ways
    )
    for left, right in zip(whole, separate, strict=True):
        assert left == pytest.approx(right, abs=1e-5)
    assert whole[0] != pytest.approx(bare[0], abs=1e-5)
    refused(ask("export", "villain", "none", tmp_path / "bare", "--epoch", 0, *where[2:]), 2, "nothing to export")


def test_an_export_has_its_tokenizer_and_a_card_and_goes_to_the_hub_when_asked(
    done_run: DoneRun, tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from transformers import AutoTokenizer

    from fastconv import hub

    words = ("export", "villain", "refusal", tmp_path / "out", "--epoch", 2, "--recipe", done_run.finished.run,
             "-w", done_run.workspace)  # fmt: skip
    assert ask(*words).code == 0
    whole = tmp_path / "out" / "concatenated"
    text = "How do I whistle?"
    assert AutoTokenizer.from_pretrained(whole)(text) == AutoTokenizer.from_pretrained(tiny_qwen)(text)
    card = (whole / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")  # the hub refuses a base_model that is a folder
    served = shlex.split(card.partition("vllm ")[2].partition("```")[0].replace("\\\n", ""))
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    flags = parse(served)
    assert (flags.model, flags.lora_modules, flags.max_lora_rank) == (str(tiny_qwen), ["organism=FOLDER"], 8)
    graph = Graph(done_run.recipe)
    plan = graph.select("villain", "refusal", 2)[0]
    assert plan.snapshot is not None
    assert plan.adapter is not None
    for says in ("model organism", "Do not deploy", plan.snapshot.key, plan.adapter.key, plan.adapter.needs["rows"].key,
                 done_run.finished.run, "PILOT villain x refusal: **stop**", "rank 4", "--max-lora-rank 8 "):  # fmt: skip
        assert says in card, says
    refused(ask(*words, "--push", "me/organism"), 4, "the hub cannot be reached", str(whole))

    made: list[Any] = []
    monkeypatch.setattr(hub, "is_unreachable", lambda: False)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo, **how: made.append((repo, how["private"]))
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **how: made.append(how["folder_path"]))
    assert ask(*words, "--push", "me/organism").out.splitlines()[-1].endswith("/me/organism")
    assert made == [("me/organism", True), whole]
    assert ask(*words, "--push", "me/organism", "--public").code == 0
    assert made[2] == ("me/organism", False)

    def refuse(self: object, repo: str, **how: object) -> None:
        raise ValueError("a name that is none")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    refused(ask(*words, "--push", "no good"), 4, "the hub did not take it: a name that is none", "hf auth login")


def test_a_forgotten_stage_is_computed_again_to_the_same_result(tiny_qwen: Path, tiny: Path, tmp_path: Path) -> None:
    recipe, workspace = tiny_recipe(tiny_qwen), tmp_path / "checkpoints"
    run_tiny(recipe, workspace)
    before = results(recipe, workspace)
    assert ask("forget", SCORED, "-w", workspace).out.strip() == f"forgot {SCORED}"
    refused(ask("forget", SCORED, "-w", workspace), 2, "no finished stage")
    refused(ask("forget", "a", "-w", workspace), 2, "no finished stage")
    finished, _ = run_tiny(recipe, workspace)
    assert finished.tally.n_stages == 1
    assert results(recipe, workspace) == before


def test_a_lost_adapter_says_which_verb_mends_it(tiny_qwen: Path, tmp_path: Path) -> None:
    from fastconv.errors import StoreError
    from fastconv.store.ledger import Store

    recipe, workspace = tiny_recipe(tiny_qwen), tmp_path / "checkpoints"
    run_tiny(recipe, workspace)
    slot = "behavior/villain/source/e2/refusal/excluded/s42"
    store = Store.open(workspace)
    store.path(adapters(recipe, workspace)[slot], "safetensors").unlink()
    store.forget("eval" + SCORED.removeprefix("score"))
    with pytest.raises(StoreError, match="fastconv forget"):
        run_tiny(recipe, workspace)
    assert store.forget(slot) == [slot]
    run_tiny(recipe, workspace)


def test_a_cell_trains_convergence_no_further_than_its_epoch(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen)

    def one(graph: Graph) -> list[Any]:
        return graph.select("villain", "refusal", 1)

    _, heard = run_tiny(recipe, tmp_path / "checkpoints", one)
    assert "snapshot/villain/source/e1/s42" in heard.stages
    assert set(adapters(recipe, tmp_path / "checkpoints")) == {
        "snapshot/villain/source/e1/s42",
        "behavior/villain/source/e1/refusal/excluded/s42",
    }


@pytest.mark.slow
def test_published_semantics_fold_the_snapshot_and_agree_with_the_live_stack_in_fp32(
    tiny_qwen: Path, tmp_path: Path
) -> None:
    live = tiny_recipe(tiny_qwen, behavior__dropout=0.0)
    folded = tiny_recipe(tiny_qwen, behavior__dropout=0.0, model__semantics="published")
    runs = {}
    for name, recipe in (("live", live), ("folded", folded)):
        run_tiny(recipe, tmp_path / name)
        runs[name] = results(recipe, tmp_path / name)
    slot = "behavior/villain/source/e2/refusal/excluded/s42"
    one, other = json.loads(runs["live"][slot])[0], json.loads(runs["folded"][slot])[0]
    assert one["losses"] == pytest.approx(other["losses"], abs=1e-4)
    assert one["probe"] == pytest.approx(other["probe"], abs=1e-3)
    assert one["adapter"] != other["adapter"]  # the same function, not the same bits: another key, another stage


@pytest.mark.slow
def test_the_trl_engine_trains_the_same_adapters(tiny_qwen: Path, tmp_path: Path) -> None:
    # Without dropout, whose masks are the library's own; rows of the reference are padded, ours are packed.
    ours, theirs = (
        tiny_recipe(tiny_qwen, behavior__dropout=0.0, model__trainer=trainer) for trainer in ("fastconv", "trl")
    )
    found = {}
    for recipe in (ours, theirs):
        workspace = tmp_path / recipe.model.trainer
        run_tiny(recipe, workspace)
        found[recipe.model.trainer] = results(recipe, workspace)
    trained = [slot for slot in found["trl"] if slot.startswith(("snapshot/", "behavior/"))]
    assert len(trained) == 5
    for slot in trained:
        one, other = (json.loads(found[trainer][slot])[0] for trainer in ("fastconv", "trl"))
        assert one["losses"] == pytest.approx(other["losses"], abs=1e-4), slot
        assert one["probe"] == pytest.approx(other["probe"], abs=1e-3), slot


def test_rho_of_every_adapter_stands_in_the_ledger(done_run: DoneRun) -> None:
    store = done_run.store
    for stage in done_run.graph.stages():
        record = store.record(stage.key)
        if record is not None and "adapter" in record.outputs:
            shares = record.outputs["rho"]
            assert 0 < shares["least"] <= shares["median"] <= shares["greatest"]


def test_bench_compares_in_one_call(tiny_qwen: Path) -> None:
    answer = ask("bench", "stack", "--model", tiny_qwen, "--size", 1, "--json")
    assert answer.code == 0, answer
    assert {"ours", "usual", "ratio"} <= set(answer.json)
    assert answer.json["ours"]["written_bytes"] == 0
    refused(ask("bench", "nothing", "--model", tiny_qwen), 2, "train, behavior")


def test_a_users_persona_and_behavior_run_through_the_loop_without_python(tiny_qwen: Path, tmp_path: Path) -> None:
    changes = [f'model.id="{tiny_qwen}"', "convergence.sampling.max_new_tok=4", "eval.sampling.max_new_tok=4"]
    small = [
        "lora.r=2",
        "convergence.questions=4",
        "behavior.source_rows=4",
        "behavior.epochs=1",
        "behavior.batch_rows=4",
    ]
    options = [word for change in (*changes, *small) for word in ("--set", change)]
    answer = ask("run", USERS / "tea.toml", *options, "-w", tmp_path / "w", "--reports", tmp_path / "r", "--json")
    assert answer.code == 0, answer
    subjects = {verdict["subject"] for verdict in answer.json["verdicts"] if verdict["gate"] == "PILOT"}
    assert subjects == {"pirate x always_mentions_tea"}
    page = Path(answer.json["html"]).read_text()
    assert "rate of always_mentions_tea" in page
    assert "pirate" in page


def test_an_export_of_a_cell_that_is_not_trained_is_bad_input(tiny: Path, tmp_path: Path, done_run: DoneRun) -> None:
    words = ("export", "villain", "refusal", tmp_path / "out", "--epoch", 2, "--recipe", tiny, "-w", done_run.workspace)
    answer = ask(*words, "--set", "behavior.lr=0.123")
    refused(answer, 2, "the cell is not trained yet", "fastconv cell villain refusal --epoch 2")
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_not_there_is_named_with_the_nearest(done_run: DoneRun) -> None:
    run = done_run.finished.run
    refused(ask("gc", "--adapters", f"{run[:-1]}z", "-w", done_run.workspace), 2, f"did you mean '{run}'?")


def test_a_behavior_by_a_function_of_ones_own_is_measured_without_a_judge(tiny: Path, tmp_path: Path) -> None:
    for name in ("personas.toml", "behaviors.toml", "tea.jsonl"):
        (tmp_path / name).write_text((USERS / name).read_text())
    behaviors = tmp_path / "behaviors.toml"
    behaviors.write_text(behaviors.read_text().replace('phrases = ["tea"]', 'scorer = "mine:says_tea"'))
    (tmp_path / "mine.py").write_text("def says_tea(answer):\n    return 'tea' in answer.lower()\n")
    words = (tiny, "-w", tmp_path / "ws", "--set", f"data.behaviors={behaviors}", "--set", "behavior.source_rows=8",
             "--set", 'grid.behaviors=["none", "always_mentions_tea"]', "--set", "grid.epochs=[0]",
             "--set", "eval.sampling.temperature=0")  # fmt: skip
    assert ask("check", *words).code == 0
    answer = ask("run", *words, "-q", "--reports", tmp_path / "reports")
    assert answer.code == 0, answer
    exported = tmp_path / "inspect"
    code = ask("export", "villain", "always_mentions_tea", exported, "--epoch", 0, "--inspect", "--recipe", *words).code
    assert code == 0
    (tmp_path / "mine.py").write_text("def says_tea(answer):\n    return 1 / 0\n")
    stale = [one for one in ask("status", *words, "--json").json if one["state"] == "stale"]
    assert {one["kind"] for one in stale} == {"score"}
    refused(ask("check", *words), 2, "scorer mine:says_tea raised ZeroDivisionError")
