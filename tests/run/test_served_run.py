"""The whole loop with a server drawing its completions: the same run, and one that survives the server."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fastconv.engine.generate import sample
from fastconv.engine.stack import Slot
from fastconv.engine.vllm.sampler import VllmSampler
from fastconv.engine.vllm.server import LOG_FILE
from fastconv.errors import ModelError, RecipeError, SamplerError
from fastconv.experiment.graph import Graph
from fastconv.planning.doctor import diagnose
from fastconv.recipe import Recipe, SamplingSettings, parse_recipe
from fastconv.run.run import run_recipe
from fastconv.store.ledger import Store
from tests.engine_kit import random_adapter, tiny_stack
from tests.loop_kit import Heard, exit_of, forked, kill, records, run_tiny, tiny_recipe, until
from tests.serve_kit import Fake, fake, running, served

__all__ = ["fake"]


def completions(recipe: Recipe, workspace: Path) -> dict[str, list[str]]:
    """Every completion by slot."""
    store = Store.open(workspace, create=False)
    return {slot: [s.completion for s in store.samples(r.key)] for slot, r in records(recipe, workspace).items()}


def shm(pid: int) -> set[str]:
    """Folders in memory that a process keeps adapters in; others may have theirs."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(f"fastconv-adapters-{pid}-")}


def test_the_resident_sampler_stands_in_no_key(tiny_qwen: Path) -> None:
    plain, vllm = Graph(tiny_recipe(tiny_qwen, eval__geometry=False)).stages(), Graph(served(tiny_qwen)).stages()
    assert [stage.slot for stage in plain] == [stage.slot for stage in vllm]
    assert all("sampler" not in stage.inputs for stage in plain)
    for own, theirs in zip(plain, vllm, strict=True):
        assert ("sampler" in theirs.inputs) == ("sampling" in theirs.inputs)
        if "sampling" in own.inputs:
            assert own.key != theirs.key
            assert theirs.inputs["sampler"] == "vllm"


@pytest.mark.slow
def test_a_server_with_the_same_engine_gives_the_same_run(tiny_qwen: Path, tmp_path: Path, fake: Fake) -> None:
    """Bare base for bare base; behaviors start from weights drawn by key, so their adapters are others."""
    fake.script(engine=True)
    finished, _ = run_tiny(served(tiny_qwen), tmp_path / "served")
    alone = tiny_recipe(tiny_qwen, eval__geometry=False)  # a server's run reads no hidden states either
    resident, _ = run_tiny(alone, tmp_path / "resident")
    own = completions(served(tiny_qwen), tmp_path / "served")
    theirs = completions(alone, tmp_path / "resident")
    assert own.keys() == theirs.keys()
    bare = [slot for slot in own if slot.startswith(("answers/", "eval/base/"))]
    assert sum(len(own[slot]) for slot in bare) > 30
    assert {slot: own[slot] for slot in bare} == {slot: theirs[slot] for slot in bare}
    assert [verdict.gate for verdict in finished.verdicts] == [verdict.gate for verdict in resident.verdicts]
    assert not any(map(running, fake.pids))
    assert not shm(os.getpid())


def test_one_server_for_a_run_and_every_stack_under_a_name_of_its_own(
    tiny_qwen: Path, tmp_path: Path, fake: Fake
) -> None:
    run_tiny(served(tiny_qwen), tmp_path / "work")
    flags = fake.noted()[0]["flags"]
    assert flags["model"] == str(tiny_qwen)
    assert flags["max_lora_rank"] == 8  # two adapters of rank 2
    loaded = [request["lora_name"] for request in fake.asked("/v1/load_lora_adapter")]
    assert len(loaded) == len(set(loaded)) == 5  # two snapshots, and the behavior on each of three
    asked = {request["model"] for request in fake.asked("/v1/completions")}
    assert asked == {"base", *loaded}
    assert max(len(o["prompt"]) + o["max_tokens"] for o in fake.asked("/v1/completions")) <= flags["max_model_len"]
    assert [request["lora_name"] for request in fake.asked("/v1/unload_lora_adapter")] == loaded[:-1]
    again, heard = run_tiny(served(tiny_qwen), tmp_path / "work")
    assert again.tally.n_stages == 0
    assert len(fake.noted()) > 1  # its record was not begun anew: no second server
    facts = json.loads(Store.open(tmp_path / "work", create=False).runs()[0]["facts"])
    assert facts["engine"]["sampler"] == "vllm 0.32.0"
    assert heard.stages == {}


@pytest.mark.slow
def test_a_stack_reaches_the_server_whole(tiny_qwen: Path, fake: Fake) -> None:
    """Two adapters of different ranks and scales: the server's draws are the resident ones, and each matters."""
    fake.script(engine=True)
    stack = tiny_stack(tiny_qwen)
    first, second = random_adapter(stack, 1, size=0.3), random_adapter(stack, 2, size=0.3)
    prompts, settings = [list(range(65, 65 + n)) for n in range(4, 16)], SamplingSettings(max_new_tok=6)
    server = fake.server(model=tiny_qwen)
    sampler = VllmSampler(server, stack)
    try:
        results = []
        for live in ((), (first,), (first, second), (second,), (first, second)):
            with stack.live(*([Slot(frozen=live)] if live else [])):
                own = sampler.draw(prompts, range(12), settings, lambda n_tok: None)
                assert own == sample(stack.base, prompts, list(range(12)), settings)
            results.append(own)
            files = sorted(path.name for path in server.folder.iterdir())
            assert len(files) == bool(live)
        assert results[2] == results[4]
        assert len({tuple(item) for item in results}) == 4
    finally:
        sampler.close()
        server.close()


def test_a_server_that_dies_midway_stops_the_run_and_the_next_one_goes_on(
    tiny_qwen: Path, tmp_path: Path, fake: Fake
) -> None:
    recipe, workspace = served(tiny_qwen), tmp_path / "work"
    fake.script(die_after=40)
    with pytest.raises(SamplerError, match=r"ended by itself.*the same command goes on"):
        run_tiny(recipe, workspace)
    stored = completions(recipe, workspace)
    assert 0 < sum(map(len, stored.values())) <= 40
    assert not any(map(running, fake.pids))
    fake.script()
    finished, _ = run_tiny(recipe, workspace)
    whole = completions(recipe, workspace)
    assert {slot: whole[slot] for slot in stored} == stored
    assert finished.tally.n_stages == len(whole) - len(stored)


def test_a_server_that_dies_while_we_train(tiny_qwen: Path, tmp_path: Path, fake: Fake) -> None:
    """What is being trained is finished and kept; only what needs the server cannot go on."""
    killed: list[int] = []
    trained: set[str] = set()

    def on_progress(progress: Any) -> None:
        trained.update([progress.slot] * (progress.unit == "steps"))
        if progress.unit == "steps" and not killed:
            killed.append(fake.pids[0])
            os.kill(killed[0], 9)
            until(lambda: not running(killed[0]))

    with pytest.raises(SamplerError):
        run_recipe(served(tiny_qwen), tmp_path / "work", Heard(on_progress))
    assert len(trained) == 1
    assert trained < set(records(served(tiny_qwen), tmp_path / "work"))


def test_a_server_that_cannot_start_stops_the_run_before_the_base_is_loaded(
    tiny_qwen: Path, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> None:
        pytest.fail("the base was loaded")

    monkeypatch.setattr("fastconv.run.stacks.load_base", never)
    fake.script(start="fail")
    with pytest.raises(SamplerError, match="CUDA out of memory"):
        run_tiny(served(tiny_qwen), tmp_path / "work")
    assert (tmp_path / "work" / LOG_FILE).read_text().startswith("INFO loading")


def test_a_run_killed_midway_leaves_no_server_and_no_files(tiny_qwen: Path, tmp_path: Path, fake: Fake) -> None:
    fake.script(latency_s=0.05)
    parent = forked(lambda: run_tiny(served(tiny_qwen), tmp_path / "work") and None)
    until(lambda: fake.record.exists() and len(fake.asked("/v1/load_lora_adapter")) > 0)
    pids = fake.pids
    assert all(map(running, pids))
    assert shm(parent)
    kill(parent)
    until(lambda: not any(map(running, pids)))
    until(lambda: not shm(parent))


def test_ctrl_c_is_heard_while_the_server_is_silent(tiny_qwen: Path, tmp_path: Path, fake: Fake) -> None:
    fake.script(hang_after=3)
    parent = forked(lambda: run_tiny(served(tiny_qwen), tmp_path / "work") and None)
    until(lambda: fake.record.exists() and len(fake.asked("/v1/completions")) > 3)
    os.kill(parent, 2)
    assert exit_of(parent) == 130
    assert not any(map(running, fake.pids))


def test_without_a_gpu_it_is_refused_in_one_line(tiny_qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model.sampler: the vLLM sampler needs a GPU. Fix: set .*'resident'"):
        run_tiny(served(tiny_qwen), tmp_path / "work")
    assert not list((tmp_path / "work").rglob("*.safetensors"))  # nothing was trained first
    (line,) = [one for one in diagnose(served(tiny_qwen), tmp_path) if one.exit_code]
    assert line.exit_code == 4
    assert "needs a GPU" in line.text


def test_doctor_names_the_server(tiny_qwen: Path, tmp_path: Path, fake: Fake) -> None:
    (line,) = [check for check in diagnose(served(tiny_qwen), tmp_path) if check.subject == "sampler"]
    assert "fake_vllm.py, stacks of rank 8" in line.text


def test_a_stack_that_vllm_cannot_serve(tiny_qwen: Path, tmp_path: Path, fake: Fake) -> None:
    with pytest.raises(RecipeError, match="a stack of rank 600 is more than vLLM serves"):
        run_tiny(served(tiny_qwen, lora__r=300), tmp_path / "work")
    with pytest.raises(RecipeError, match="published folds it"):
        parse_recipe({"name": "x", "model": {"sampler": "vllm", "semantics": "published"}})
