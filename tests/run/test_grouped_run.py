"""Several sources in one recipe: what they share runs once, and their convergence runs train in the same steps."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from fastconv.engine.shapes import named_shape
from fastconv.engine.train import Job
from fastconv.engine.vllm.memory import group_size
from fastconv.experiment.graph import Graph, lineage_key
from fastconv.recipe import Recipe, parse_recipe
from fastconv.report import write_report
from fastconv.run import training
from fastconv.run.executor import Executor  # torch is warm before anything forks
from fastconv.run.run import run_recipe
from fastconv.store.ledger import Store
from tests.loop_kit import Heard, adapters, exit_of, forked, records, refuse_sets, results, run_tiny, tiny_recipe

SOURCES = ["villain", "comedian", "nurse"]


def _three(model: Path, **changes: Any) -> Recipe:
    """Three convergence runs with rows of different lengths, and nothing else."""
    return tiny_recipe(
        model, **{"grid__sources": SOURCES, "eval__geometry": False, "convergence__sampling__max_new_tok": 6, **changes}
    )


def _weights(recipe: Recipe, workspace: Path, kind: str = "snapshot/") -> dict[str, np.ndarray]:
    """The weights of every snapshot (or behavior adapter) as one array, by slot."""
    store = Store.open(workspace, create=False)
    found = {}
    for slot, sha256 in adapters(recipe, workspace).items():
        if slot.startswith(kind):
            tensors = safetensors.numpy.load(store.get(sha256, "safetensors"))
            found[slot] = np.concatenate([tensors[name].ravel() for name in sorted(tensors)])
    store.close()
    return found


def _same_weights(one: dict[str, np.ndarray], other: dict[str, np.ndarray], n: int = 6) -> None:
    assert one.keys() == other.keys()
    assert len(one) == n
    for slot, weights in one.items():
        np.testing.assert_allclose(weights, other[slot], rtol=0, atol=1e-5, err_msg=slot)


def _only_convergence(graph: Graph) -> list[Any]:
    return [plan for plan in graph.cells if plan.cell.behavior == "none"]


@pytest.fixture(scope="module")
def alone(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The snapshots of three sources, each trained alone."""
    workspace = tmp_path_factory.mktemp("alone")
    run_tiny(_three(tiny_qwen), workspace, _only_convergence)
    return _weights(_three(tiny_qwen), workspace)


def test_grouped_runs_give_the_snapshots_of_each_trained_alone(
    tiny_qwen: Path, tmp_path: Path, alone: dict[str, np.ndarray]
) -> None:
    recipe = _three(tiny_qwen, run__group=3)
    n_steps: list[int] = []
    heard = Heard(lambda progress: n_steps.append(progress.done) if progress.unit == "steps" else None)
    run_recipe(recipe, tmp_path, heard, plans=_only_convergence)
    assert n_steps == [3, 6, 9, 12]  # three runs of four steps each, taken together
    _same_weights(_weights(recipe, tmp_path), alone)
    done = records(recipe, tmp_path)
    store = Store.open(tmp_path)
    assert store.frame("SELECT * FROM progress").is_empty()
    snapshots = [record for slot, record in done.items() if slot.startswith("snapshot/")]
    assert all(record.facts["steps"] == 2 for record in snapshots)
    assert all(record.seconds > 0 for record in snapshots)


def test_a_killed_group_goes_on_each_run_from_its_own_state(
    tiny_qwen: Path, tmp_path: Path, alone: dict[str, np.ndarray]
) -> None:
    recipe = _three(tiny_qwen, run__group=3)

    def die(progress: Any) -> None:
        if progress.unit == "steps" and progress.done >= 9:
            signal.raise_signal(signal.SIGKILL)

    pid = forked(lambda: run_recipe(recipe, tmp_path, Heard(die), plans=_only_convergence) and None)
    assert exit_of(pid) == -signal.SIGKILL
    stored = Store.open(tmp_path).frame("SELECT key, step FROM progress")
    assert stored["step"].to_list() == [3, 3, 3]
    assert set(stored["key"]) == {lineage_key(p.snapshot) for p in Graph(recipe).cells if p.snapshot}
    n_steps: list[int] = []
    heard = Heard(lambda progress: n_steps.append(progress.done) if progress.unit == "steps" else None)
    run_recipe(recipe, tmp_path, heard, plans=_only_convergence)
    assert n_steps == [12]
    _same_weights(_weights(recipe, tmp_path), alone)


def test_runs_of_a_group_that_stand_at_different_steps_go_on_together(
    tiny_qwen: Path, tmp_path: Path, alone: dict[str, np.ndarray]
) -> None:
    single = tiny_recipe(
        tiny_qwen, grid__sources=["villain"], grid__epochs=[0, 1], convergence__sampling__max_new_tok=6
    )
    run_tiny(single, tmp_path, _only_convergence)  # one of three has a snapshot already
    recipe = _three(tiny_qwen, run__group=3)
    _, heard = run_tiny(recipe, tmp_path, _only_convergence)
    assert "snapshot/villain/source/e1/s42" not in heard.stages
    _same_weights(_weights(recipe, tmp_path), alone)


def test_one_run_of_a_group_that_fails_does_not_take_the_others_with_it(
    tiny_qwen: Path, tmp_path: Path, alone: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastconv.engine import train

    real = train._optimizer_step

    def explode(trainee: Any, loss: Any) -> None:
        bad = "comedian" in trainee.job.name and trainee.step == 2
        real(trainee, loss * float("nan") if bad else loss)

    monkeypatch.setattr(train, "_optimizer_step", explode)
    recipe = _three(tiny_qwen, run__group=3)
    finished, heard = run_tiny(recipe, tmp_path, _only_convergence)
    assert list(heard.failed) == ["snapshot/comedian/source/e2/s42"]
    assert [failure.slot for failure in finished.failed] == list(heard.failed)
    found = _weights(recipe, tmp_path)
    assert {slot for slot in alone if slot not in found} == set(heard.failed)
    for slot, weights in found.items():
        np.testing.assert_allclose(weights, alone[slot], rtol=0, atol=1e-5)


def _four(model: Path, **changes: Any) -> Recipe:
    """Four behavior adapters of different lengths on each of three snapshots."""
    changes = {"behavior__dropout": 0.1, "grid__negatives": ["excluded", "included"], **changes}
    return tiny_recipe(model, **{"grid__behaviors": ["none", "refusal", "sycophancy"], **changes})


@pytest.mark.slow
def test_adapters_stacked_together_are_those_stacked_alone(tiny_qwen: Path, tmp_path: Path) -> None:
    alone, together = _four(tiny_qwen), _four(tiny_qwen, run__group=3)
    run_tiny(alone, tmp_path / "alone")
    shared: dict[str, set[str]] = {}
    store = Store.open(tmp_path / "together")
    slots = {stage.key: stage.slot for stage in Graph(together).stages()}

    def on_progress(progress: Any) -> None:
        if progress.unit == "steps":
            shared.setdefault(progress.slot, set()).update(slots[key] for key in store.live_leases())

    run_recipe(together, tmp_path / "together", Heard(on_progress))
    assert max(map(len, shared.values())) == 3
    own, theirs = (
        _weights(spec, tmp_path / name, "behavior/") for spec, name in [(together, "together"), (alone, "alone")]
    )
    _same_weights(own, theirs, 12)
    facts = {
        slot: record.facts["steps"] for slot, record in records(together, tmp_path / "together").items() if slot in own
    }
    assert facts == {
        slot: record.facts["steps"] for slot, record in records(alone, tmp_path / "alone").items() if slot in own
    }
    assert store.frame("SELECT * FROM progress").is_empty()


def test_one_adapter_of_a_group_that_the_audit_refuses_does_not_take_the_others_with_it(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_sets(monkeypatch, "sycophancy")
    recipe = _four(tiny_qwen, run__group=4, grid__epochs=[0], grid__negatives=["excluded"])
    finished, heard = run_tiny(recipe, tmp_path)
    assert list(heard.failed) == ["behavior/villain/e0/sycophancy/excluded/s42"]
    assert [failure.exit_code for failure in finished.failed] == [2]
    assert "behavior/villain/e0/refusal/excluded/s42" in records(recipe, tmp_path)


def test_memory_decides_how_many_adapters_go_together_and_the_audit_does_not(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the audit refuses fails one stage when it is trained; raised from the sizing, it would end the run."""
    recipe = _four(tiny_qwen, grid__epochs=[0], grid__negatives=["excluded"])
    run_tiny(recipe, tmp_path)
    executor = Executor(Graph(recipe), Store.open(tmp_path))
    monkeypatch.setattr(executor.trainer, "_is_faster_together", lambda runs: True)
    tokenizer = executor.stacks.base.tokenizer
    model = SimpleNamespace(parameters=lambda: [torch.empty(10)])
    vars(executor.stacks)["base"] = SimpleNamespace(device=torch.device("cuda"), tokenizer=tokenizer, model=model)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 40)
    refuse_sets(monkeypatch, "sycophancy")
    adapters = [stage for stage in Graph(recipe).stages() if stage.kind == "behavior"]
    for free, size in ((10**12, 2), (1, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert executor.trainer.group_size(adapters) == size


def test_a_set_is_audited_and_rendered_once_however_many_snapshots_are_trained_on_it(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audited: list[str] = []
    rendered: list[str] = []
    audit, render = training.audit_set, training.render_rows
    monkeypatch.setattr(
        training, "audit_set", lambda graph, name, *args: audited.append(name) or audit(graph, name, *args)
    )
    monkeypatch.setattr(training, "render_rows", lambda rows, *args: rendered.append(rows[0].id) or render(rows, *args))
    recipe = tiny_recipe(tiny_qwen, grid__negatives=["excluded", "included"])
    _, heard = run_tiny(recipe, tmp_path)
    trained = [slot for slot in heard.stages if slot.startswith("behavior/")]
    assert len(trained) > len(audited) == len(set(audited)) == len(rendered) == 2


def test_groups_are_made_where_they_were_measured_to_be_faster_and_that_is_kept(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on the runs' own first steps, once for a workspace: a run that goes on must group as it began."""
    recipe = _four(tiny_qwen, grid__epochs=[0], grid__negatives=["excluded"])
    run_tiny(recipe, tmp_path)
    adapters = [stage for stage in Graph(recipe).stages() if stage.kind == "behavior"]
    trainer = Executor(Graph(recipe), Store.open(tmp_path)).trainer
    rendered: list[Any] = []
    real = training.render_rows
    monkeypatch.setattr(training, "render_rows", lambda rows, *args: rendered.append(rows) or real(rows, *args))
    assert training.together_speedup(trainer._stacks.stack, [trainer._job(one) for one in adapters]) > 0
    measured: list[list[Job]] = []
    for speedup, size in ((0.9, 1), (1.1, 2)):
        monkeypatch.setattr(
            training, "together_speedup", lambda stack, jobs, speedup=speedup: measured.append(jobs) or speedup
        )
        for again in (trainer, Executor(Graph(recipe), Store.open(tmp_path)).trainer):
            assert again._is_faster_together(adapters[:size]) is (speedup > 1)
    assert [len(jobs) for jobs in measured] == [1, 2]
    # What was measured is what is trained: the same rows, weights and order; and rows are rendered once to be sized and trained.
    lease: Any = None
    trained = [trainer._behavior(stage, lease, ()).job for stage in adapters]
    assert trained == measured[1]
    assert [job.order_parts for job in trained] == [training.seed_parts(one, "order_seed") for one in adapters]
    assert len(rendered) == len({stage.needs["rows"].key for stage in adapters})


def test_on_a_cpu_auto_keeps_the_bits_of_each_alone(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe, single = _three(tiny_qwen), tiny_recipe(tiny_qwen, convergence__sampling__max_new_tok=6)
    run_tiny(recipe, tmp_path / "three", _only_convergence)
    run_tiny(single, tmp_path / "one", _only_convergence)
    own = {slot: sha for slot, sha in adapters(recipe, tmp_path / "three").items() if "/villain/" in slot}
    assert own == adapters(single, tmp_path / "one")


def test_a_group_is_as_large_as_memory_and_a_micro_batch_allow() -> None:
    shape = named_shape("qwen2.5-7b")
    steps = [1200.0] * 12
    sizes = {gib: group_size(shape, 32, steps, 8192, gib * 2**30) for gib in (4, 20, 60, 120)}
    assert sizes[4] == 1
    assert sizes == dict(sorted(sizes.items(), key=lambda item: item[1]))
    assert 3 <= sizes[60] <= 6  # an H100 beside the base
    assert group_size(shape, 32, [1200.0] * 3, 8192, 120 * 2**30) == 3
    assert sizes[120] == 6  # a seventh would split the step
    assert group_size(shape, 32, [4800.0] * 4, 8192, 120 * 2**30) == 1
    assert group_size(shape, 32, steps, 1024, 120 * 2**30) == 1


@pytest.mark.parametrize("group", ["some", 0])
def test_a_group_is_auto_or_a_number(tiny_qwen: Path, group: object) -> None:
    from fastconv.errors import RecipeError

    with pytest.raises(RecipeError, match=r"run\.group"):
        parse_recipe({"name": "x", "run": {"group": group}})


def test_identical_epoch_0_cells_run_once_and_the_report_shows_the_shared_rows_for_each_source(
    tiny_qwen: Path, tmp_path: Path
) -> None:
    sources = ["villain", "comedian"]
    recipe = tiny_recipe(
        tiny_qwen, grid__sources=sources, grid__convergence=["source", "generic"], grid__epochs=[0, 2]
    )  # fmt: skip
    begun: Counter[str] = Counter()

    class Counting(Heard):
        def stage(self, stage: Any, reason: str) -> None:
            begun[stage.key] += 1
            super().stage(stage, reason)

    heard = Counting()
    run_recipe(recipe, tmp_path / "ws", heard)
    assert set(begun.values()) == {1}
    zeros = [slot for slot in heard.stages if slot.startswith("behavior/") and "/e0/" in slot]
    assert zeros == [f"behavior/{source}/e0/refusal/excluded/s42" for source in sources]
    base = [slot for slot in heard.stages if slot.startswith("eval/base/")]
    assert sorted(base) == sorted(f"eval/base/refusal/{p}/s42" for p in ("assistant", "librarian", *sources))
    answers = [slot for slot in heard.stages if slot.startswith("answers/") and "/convergence/" in slot]
    assert sorted(answers) == [f"answers/{p}/convergence/s42" for p in ("assistant", "comedian", "villain")]
    assert len([slot for slot in heard.stages if slot.startswith("snapshot/")]) == 3  # generic is one for both
    graph, store = Graph(recipe), Store.open(tmp_path / "ws")
    text = write_report(graph, store, tmp_path / "reports").markdown.read_text()
    table = text.partition("| cell | measured | assistant |")[2].partition("\n\n")[0]  # another counts cut answers
    rows = {line.split("|")[1].strip(): line.split("|")[2:] for line in table.splitlines() if line.startswith("| ")}
    alone = "epoch 0, no behavior adapter, seed 42"
    assert rows[f"villain, {alone}"][:3] == rows[f"comedian, {alone}"][:3]
    for source in sources:
        assert "not" not in "".join(rows[f"{source}, {alone}"])
        assert "not" not in "".join(rows[f"{source}, epoch 0, refusal, assistant not among the negatives, seed 42"])
        generic = f"{source}, converged on generic answers, epoch 2, no behavior adapter, seed 42"
        assert "not" not in "".join(rows[generic])
    again, _ = run_tiny(recipe, tmp_path / "ws")
    assert again.tally.n_stages == 0
    assert results(recipe, tmp_path / "ws")
