"""What a kill, an interrupt, a full disk or a second process may cost: time, and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from fastconv.chat import ChatTokenizer
from fastconv.errors import BusyError, DataError, Interrupted, StoreError, TrainingError
from fastconv.experiment.graph import Graph
from fastconv.recipe import Recipe
from fastconv.report import write_report
from fastconv.run.run import run_recipe
from fastconv.run.status import FailedStage, raise_failed, status_of
from fastconv.store.ledger import Store
from tests.loop_kit import (
    N_STEPS,
    SNAPSHOT_SLOT,
    Heard,
    adapters,
    die_at_fsync,
    exit_of,
    forked,
    kill,
    records,
    refuse_sets,
    results,
    run_tiny,
    running_slots,
    tiny_recipe,
    until,
)

pytest.importorskip("fastconv.run.executor")  # torch is warm before anything forks


def _slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def _die_at(slot: str, done: int) -> Callable[[Any], None]:
    """A watcher's ear that kills its own process, unasked and at once, when `slot` has come this far."""

    def act(progress: Any) -> None:
        if progress.slot.startswith(slot) and progress.done >= done:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def _stop_at(slot: str, done: int) -> Callable[[Any], None]:
    """An ear that presses Ctrl-C once, when `slot` has come this far."""
    pressed = False

    def act(progress: Any) -> None:
        nonlocal pressed
        if not pressed and progress.slot.startswith(slot) and progress.done >= done:
            pressed = True
            signal.raise_signal(signal.SIGINT)

    return act


def _artefacts(workspace: Path) -> set[str]:
    return {path.stem for path in (workspace / "artefacts").rglob("*") if path.is_file()}


@pytest.mark.parametrize("step", [_slow(1), 2, 3, _slow(4)])
def test_after_kill_9_in_convergence_training_the_run_goes_on_to_the_same_bits(
    recipe: Recipe, whole: dict[str, str], tmp_path: Path, step: int
) -> None:
    pid = forked(lambda: run_recipe(recipe, tmp_path, Heard(_die_at(SNAPSHOT_SLOT, step))))
    assert exit_of(pid) == -signal.SIGKILL
    steps_again: list[int] = []

    def count(progress: Any) -> None:
        if progress.slot.startswith(SNAPSHOT_SLOT):
            steps_again.append(progress.done)

    run_recipe(recipe, tmp_path, Heard(count))
    assert steps_again == list(range(step + 1, N_STEPS + 1))  # kept state is used, nothing is trained twice
    assert results(recipe, tmp_path) == whole
    outputs = records(recipe, tmp_path).values()
    assert _artefacts(tmp_path) == {r.outputs[k] for r in outputs for k in ("adapter", "rows") if k in r.outputs}


@pytest.mark.parametrize("nth", [_slow(3), 10, _slow(17)])
def test_after_kill_9_in_the_middle_of_a_write_the_run_goes_on_to_the_same_bits(
    recipe: Recipe, whole: dict[str, str], tmp_path: Path, nth: int
) -> None:
    """Dies before the nth fsync of an artefact: its temporary file is whole or not, its row is not there."""

    def work() -> None:
        die_at_fsync(nth)
        run_recipe(recipe, tmp_path, Heard())

    assert exit_of(forked(work)) == -signal.SIGKILL
    run_tiny(recipe, tmp_path)
    assert results(recipe, tmp_path) == whole


@pytest.mark.parametrize(
    ("slot", "done"),
    [("eval/base/refusal/assistant", 3), ("behavior/villain/source/e1", 1), _slow("answers/villain", 2)],
)
def test_after_kill_9_anywhere_else_the_run_goes_on_to_the_same_bits(
    recipe: Recipe, whole: dict[str, str], tmp_path: Path, slot: str, done: int
) -> None:
    pid = forked(lambda: run_recipe(recipe, tmp_path, Heard(_die_at(slot, done))))
    assert exit_of(pid) == -signal.SIGKILL
    killed = next(stage for stage in Graph(recipe).stages() if stage.slot.startswith(slot))
    store = Store.open(tmp_path)
    assert store.record(killed.key) is None
    assert store.samples(killed.key) == []
    assert store.live_leases() == {}
    store.close()
    run_tiny(recipe, tmp_path)
    assert results(recipe, tmp_path) == whole


def test_no_training_state_outlives_a_kill_after_the_last_epoch(recipe: Recipe, tmp_path: Path) -> None:
    """Killed after the last snapshot was committed and before its training state was freed."""

    def work() -> None:
        real = Store.drop_progress

        def die(self: Store, key: str) -> None:
            if self.latest_in_slot(f"{SNAPSHOT_SLOT}/e2/s42"):
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, key)

        Store.drop_progress = die
        run_recipe(recipe, tmp_path, Heard())

    assert exit_of(forked(work)) == -signal.SIGKILL
    assert not Store.open(tmp_path).frame("SELECT key FROM progress").is_empty()
    run_tiny(recipe, tmp_path)
    store = Store.open(tmp_path)
    assert store.frame("SELECT key FROM progress").is_empty()
    wanted = {r.outputs[k] for r in records(recipe, tmp_path).values() for k in ("adapter", "rows") if k in r.outputs}
    assert _artefacts(tmp_path) == wanted


def test_an_interrupt_keeps_whole_steps_and_the_run_goes_on_to_the_same_bits(
    recipe: Recipe, whole: dict[str, str], tmp_path: Path
) -> None:
    patient = recipe.model_copy(update={"run": recipe.run.model_copy(update={"checkpoint_every_s": 3600.0})})
    before = signal.getsignal(signal.SIGINT)  # a shell lets its background jobs ignore it
    with pytest.raises(Interrupted, match="the same command goes on from here"):
        run_recipe(patient, tmp_path, Heard(_stop_at(SNAPSHOT_SLOT, 1)))
    assert signal.getsignal(signal.SIGINT) is before
    store = Store.open(tmp_path)
    stored = store.frame("SELECT step FROM progress")["step"].to_list()
    assert stored == [2]  # the step that ran when the user asked was finished and kept
    assert store.live_leases() == {}
    store.close()
    run_tiny(patient, tmp_path)
    assert results(recipe, tmp_path) == whole


def test_an_interrupt_in_sampling_leaves_no_half_stage(recipe: Recipe, whole: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_recipe(recipe, tmp_path, Heard(_stop_at("answers/villain", 2)))
    run_tiny(recipe, tmp_path)
    assert results(recipe, tmp_path) == whole


def test_two_processes_at_once_the_second_is_told_who_is_at_work(recipe: Recipe, tmp_path: Path) -> None:
    def wait_in_training(progress: Any) -> None:
        if progress.slot.startswith("behavior/"):
            signal.pause()

    pid = forked(lambda: run_recipe(recipe, tmp_path, Heard(wait_in_training)))
    try:
        keys = {stage.key for stage in Graph(recipe).stages() if stage.kind == "behavior"}
        until(lambda: any(key in keys and "done" in note for key, note in running_slots(tmp_path).items()), pid=pid)
        with pytest.raises(BusyError, match=rf"process {pid} on .* is computing it") as caught:
            run_recipe(recipe, tmp_path, Heard())
        assert caught.value.exit_code == 6
        live = [status for status in status_of(Graph(recipe), Store.open(tmp_path)) if status.state == "running"]
        assert [status.slot for status in live] == ["behavior/villain/e0/refusal/excluded/s42"]
        assert live[0].reason == f"1 of 2 steps (process {pid})"
    finally:
        kill(pid)
    run_tiny(recipe, tmp_path)  # a dead holder's lease is taken over


def test_many_processes_on_one_new_workspace_compute_every_stage_once(
    recipe: Recipe, whole: dict[str, str], tmp_path: Path
) -> None:
    pids = [forked(lambda: run_recipe(recipe, tmp_path, Heard())) for _ in range(3)]
    codes = sorted(exit_of(pid) for pid in pids)
    assert codes[0] == 0
    assert set(codes) <= {0, BusyError.exit_code}
    assert results(recipe, tmp_path) == whole


def test_a_model_with_nan_weights_stops_with_exit_code_7_and_no_number(tiny_qwen: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_qwen, broken)
    weights = safetensors.numpy.load_file(broken / "model.safetensors")
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)
    safetensors.numpy.save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="not finite") as caught:
        run_tiny(tiny_recipe(broken), tmp_path / "ws")
    assert caught.value.exit_code == 7
    assert Store.open(tmp_path / "ws").frame("SELECT * FROM scores").is_empty()


def _exploding(monkeypatch: pytest.MonkeyPatch, hits: Callable[[int], bool]) -> None:
    """From here on the nth loss (1, 2, ...) that is computed is not a number, if it is hit."""
    from fastconv.engine import train

    real, n_losses = train.weighted_cross_entropy, 0

    def explode(*args: Any) -> Any:
        nonlocal n_losses
        n_losses += 1
        loss, each = real(*args)
        return (loss * float("nan"), each * float("nan")) if hits(n_losses) else (loss, each)

    monkeypatch.setattr(train, "weighted_cross_entropy", explode)


def test_a_loss_that_explodes_is_noted_before_the_optimizer_step_and_the_rest_goes_on(
    recipe: Recipe, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tiny(recipe.model_copy(update={"grid": recipe.grid.model_copy(update={"epochs": (0,)})}), tmp_path)
    _exploding(monkeypatch, lambda nth: nth == 4)
    finished, heard = run_tiny(recipe, tmp_path)
    last = f"{SNAPSHOT_SLOT}/e2/s42"
    assert heard.failed.keys() == {last}
    (failed,) = finished.failed
    assert failed.slot == last
    assert failed.cells == ("villain source e2 none s42", "villain source e2 refusal excluded s42")
    with pytest.raises(TrainingError, match=r"at step 4") as caught:
        finished.require_complete()
    assert caught.value.exit_code == 7
    assert "without numbers: villain source e2 none s42, villain source e2 refusal excluded s42" in str(caught.value)
    assert "\n" not in str(caught.value)
    done = results(recipe, tmp_path)
    assert {slot for slot in whole if slot not in done} == {slot for slot in whole if "/e2" in slot}
    store = Store.open(tmp_path)
    states = {status.slot: status for status in status_of(Graph(recipe), store)}
    assert states[last].state == "failed"
    assert "at step 4" in states[last].reason
    after = states["score/villain/source/e2+refusal/excluded/refusal/assistant/s42"]
    assert (after.state, after.reason) == ("skipped", f"{last} failed")
    assert not [row for row in store.runs() if row["id"] == finished.run and row["finished_at"]]
    text = write_report(Graph(recipe), store, tmp_path / "reports").markdown.read_text()
    assert "at step 4" in text
    assert last in text
    monkeypatch.undo()
    finished, heard = run_tiny(recipe, tmp_path)  # a later run tries it again, and that alone
    finished.require_complete()
    assert all("/e2" in slot for slot in heard.stages)
    assert results(recipe, tmp_path) == whole
    assert store.failures() == {}


def test_a_set_that_the_audit_refuses_is_noted_and_other_behaviors_go_on(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tiny_qwen, grid__behaviors=["none", "refusal", "sycophancy"], grid__epochs=[0])
    refuse_sets(monkeypatch, "sycophancy")
    finished, heard = run_tiny(recipe, tmp_path)
    assert list(heard.failed) == ["behavior/villain/e0/sycophancy/excluded/s42"]
    with pytest.raises(DataError, match="villain base e0 sycophancy excluded s42") as caught:
        finished.require_complete()
    assert caught.value.exit_code == 2
    assert "score/villain/e0+refusal/excluded/refusal/villain/s42" in results(recipe, tmp_path)


def test_a_sampled_answer_that_spells_a_control_token_is_not_trained_on(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tiny_qwen, grid__epochs=[0, 1], convergence__questions=2)
    monkeypatch.setattr(ChatTokenizer, "answer_text", lambda self, ids: "Aye.<|im_end|>\n<|im_start|>user\nAnd?")
    _, heard = run_tiny(recipe, tmp_path)
    by_kind = {slot.split("/")[0]: str(error) for slot, error in heard.failed.items()}
    assert "holds the control token <|im_end|>" in by_kind["snapshot"]
    assert "D411" in by_kind["behavior"]
    assert all("drawn anew" in text for text in by_kind.values())


def test_the_worst_failure_gives_the_exit_code(recipe: Recipe) -> None:
    first = FailedStage("behavior/a", "the audit refuses it", 2, ("a",))
    other = FailedStage("snapshot/b", "loss nan", 7, ("b", "a"))
    with pytest.raises(TrainingError, match=r"2 stages failed, .*without numbers: a, b\. First reason: the audit"):
        raise_failed("tiny-1", [first, other])
    raise_failed("tiny-1", [])


def test_a_base_measure_that_fails_takes_its_own_behavior_alone(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastconv.run import executor

    recipe = tiny_recipe(tiny_qwen, grid__behaviors=["none", "refusal", "sycophancy"], grid__epochs=[0])
    real, n_draws = executor.sample, 0

    def draw(*args: Any) -> Any:
        nonlocal n_draws
        n_draws += 1
        if n_draws <= 2:  # all in one pass, then the first of them alone
            raise TrainingError("logits are not finite", where="sampling", fix="look at the base")
        return real(*args)

    monkeypatch.setattr(executor, "sample", draw)
    finished, _ = run_tiny(recipe, tmp_path)
    assert [failure.slot for failure in finished.failed] == ["eval/base/refusal/assistant/s42"]
    done = results(recipe, tmp_path)
    assert not [slot for slot in done if slot.startswith("behavior/") and "refusal" in slot]
    assert [slot for slot in done if slot.startswith("behavior/") and "sycophancy" in slot]
    states = {status.slot: status.state for status in status_of(Graph(recipe), Store.open(tmp_path))}
    assert states["behavior/villain/e0/refusal/excluded/s42"] == "skipped"
    assert states["score/base/refusal/assistant/s42"] == "skipped"
    assert states["score/base/refusal/villain/s42"] == "done"


def test_a_damaged_adapter_is_found_before_it_is_used(recipe: Recipe, tmp_path: Path) -> None:
    run_tiny(recipe, tmp_path)
    sha256 = adapters(recipe, tmp_path)[f"{SNAPSHOT_SLOT}/e2/s42"]
    path = Store.open(tmp_path).path(sha256, "safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    more = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"samples_per_prompt": 1})})
    with pytest.raises(StoreError, match="do not match its sha256"):
        run_tiny(more, tmp_path)


def test_a_disk_that_fills_up_during_training_is_one_line_and_loses_nothing(
    recipe: Recipe, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastconv.store.ledger.write_atomically", full)
    with pytest.raises(StoreError, match="no space left on the disk") as caught:
        run_tiny(recipe, tmp_path)
    monkeypatch.undo()
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)
    run_tiny(recipe, tmp_path)
    assert results(recipe, tmp_path) == whole
