"""Merging workspaces: everything arrives, once, whole; two results for one stage are never mixed."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastconv.cli import app
from fastconv.errors import InputError, StoreError
from fastconv.recipe import Recipe
from fastconv.run.run import run_recipe
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store
from fastconv.store.merge import merge, pack_stage, unpack_stage
from fastconv.store.records import Judgement, RawReply, Reserve, Sample, Score, Settle, Stage
from tests.loop_kit import DoneRun, Heard, die_at_fsync, exit_of, forked, results, run_tiny, tiny_recipe

EVAL = Stage("eval", "eval/one", 1, {"seed": 42})
SAMPLES = [Sample("q1", 0, "assistant", "Why?", "Because.", 3, True)]


@pytest.fixture
def target(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "here")


@pytest.fixture
def incoming(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "there")


def _commit(store: Store, stage: Stage = EVAL, value: float = 1.0, adapter: bytes = b"weights") -> None:
    outputs = {"adapter": store.put(adapter, "safetensors"), "n": 1}
    scores = [Score("q1", 0, "rate", value)]
    store.commit(stage, outputs=outputs, facts={"sampled_tok": 3}, seconds=1.5, samples=SAMPLES, scores=scores)


def _whole(store: Store) -> dict[str, list[tuple[object, ...]]]:
    tables = ("stages", "artefacts", "samples", "scores", "runs", "run_stages", "verdicts", "judgements", "judge_totals",
              "judge_money", "judge_replies")  # fmt: skip
    known = {name for (name,) in store.rows("SELECT name FROM sqlite_master WHERE type='table'")}
    return {table: sorted(store.rows(f"SELECT * FROM {table}"), key=str) for table in tables if table in known}


def test_a_stage_arrives_with_its_rows_and_verified_artefacts(target: Store, incoming: Store) -> None:
    _commit(incoming)
    done = merge(target, incoming)
    assert (done.n_added, done.n_known, done.copied_bytes) == (1, 0, len(b"weights"))
    assert target.record(EVAL.key) == incoming.record(EVAL.key)
    assert target.samples(EVAL.key) == SAMPLES
    assert target.scores(EVAL.key) == incoming.scores(EVAL.key)
    record = target.record(EVAL.key)
    assert record is not None
    assert target.get(record.outputs["adapter"], "safetensors") == b"weights"


def test_a_stage_that_failed_here_and_came_off_there_is_no_failure_any_more(target: Store, incoming: Store) -> None:
    target.note_failure(EVAL, 7, "loss is not finite")
    _commit(incoming)
    merge(target, incoming)
    assert target.failures() == {}


def test_merging_again_changes_nothing(target: Store, incoming: Store) -> None:
    _commit(incoming)
    incoming.start_run("r", "{}", "0" * 64, "r", {"a": 1})
    incoming.note_stage_of_run("r", EVAL, reused=False)
    incoming.put_verdict("r", "G0", "refusal", "pass", {"gate": "G0"})
    merge(target, incoming)
    before = _whole(target)
    again = merge(target, incoming)
    assert (again.n_added, again.n_known, again.copied_bytes) == (0, 1, 0)
    assert _whole(target) == before
    assert before["runs"]
    assert before["verdicts"]


@pytest.mark.parametrize("change", [{"value": 0.0}, {"adapter": b"other weights"}])
def test_two_results_for_one_stage_are_refused_and_nothing_is_written(
    target: Store, incoming: Store, change: dict[str, Any]
) -> None:
    _commit(target, **change)
    _commit(incoming)
    _commit(incoming, replace(EVAL, slot="eval/two", inputs={"seed": 43}))
    before = _whole(target), _whole(incoming)
    with pytest.raises(StoreError, match="eval/one has one result here and another there") as caught:
        merge(target, incoming)
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)
    assert (_whole(target), _whole(incoming)) == before


def test_the_same_result_at_another_time_on_another_machine_is_the_same_result(target: Store, incoming: Store) -> None:
    _commit(target)
    incoming.commit(
        EVAL, outputs={"adapter": incoming.put(b"weights", "safetensors"), "n": 1}, facts={"sampled_tok": 3, "host": "b"},
        seconds=9.0, samples=SAMPLES, scores=[Score("q1", 0, "rate", 1.0)],
    )  # fmt: skip
    assert merge(target, incoming).n_known == 1


def test_a_damaged_artefact_is_never_taken_over(target: Store, incoming: Store) -> None:
    _commit(incoming)
    record = incoming.record(EVAL.key)
    assert record is not None
    incoming.path(record.outputs["adapter"], "safetensors").write_bytes(b"other bytes")
    with pytest.raises(StoreError, match="do not match its sha256"):
        merge(target, incoming)
    assert target.record(EVAL.key) is None


def test_a_bundle_with_other_bytes_than_named_is_refused(target: Store, incoming: Store) -> None:
    _commit(incoming)
    bundle = pack_stage(incoming, EVAL.key)
    forged = replace(bundle, artefacts=tuple((sha256, suffix, b"forged") for sha256, suffix, _ in bundle.artefacts))
    with pytest.raises(StoreError, match="other bytes than its name says"):
        unpack_stage(target, forged)
    assert target.record(EVAL.key) is None


def test_single_stages_may_be_asked_for(target: Store, incoming: Store) -> None:
    two = replace(EVAL, slot="eval/two", inputs={"seed": 43})
    _commit(incoming)
    _commit(incoming, two)
    assert merge(target, incoming, [two.key]).n_added == 1
    assert target.record(EVAL.key) is None


def test_an_artefact_that_is_missing_here_comes_back(target: Store, incoming: Store) -> None:
    _commit(target)
    _commit(incoming)
    record = target.record(EVAL.key)
    assert record is not None
    path = target.path(record.outputs["adapter"], "safetensors")
    path.unlink()
    assert merge(target, incoming).copied_bytes == len(b"weights")
    assert path.read_bytes() == b"weights"


def test_a_workspace_is_not_merged_into_itself(target: Store) -> None:
    with pytest.raises(InputError, match="it is this workspace"):
        merge(target, Store.open(target.root))


def test_judgements_and_what_they_cost_arrive_once(target: Store, incoming: Store) -> None:
    def spend(store: Store, key: str) -> None:
        ledger = JudgeLedger(store, 10.0)
        (ticket,) = ledger.apply([Reserve(key, 1.0)])
        assert isinstance(ticket, int)
        answer = Judgement(key, "r" * 64, "m", 0, {"rate": 1.0}, {"a": 1})
        ledger.apply([Settle(ticket, key, RawReply("live", "m", "{}", "end", {}, 0.25), answer)])

    spend(target, "a" * 64)
    spend(incoming, "b" * 64)
    JudgeLedger(incoming, 10.0).apply([Reserve("c" * 64, 5.0)])  # open: it stays where it is
    for n_new in (1, 0):
        assert merge(target, incoming).n_judgements == n_new
        money = JudgeLedger(target, 10.0).money()
        assert (money.spent_usd, money.reserved_usd) == (0.5, 0.0)
        assert [reply.text for reply in JudgeLedger(target).replies("b" * 64)] == ["{}"]
        assert JudgeLedger(target).cost_usd(["b" * 64]) == 0.25


def _cells(source: str) -> Callable[..., list[object]]:
    return lambda graph: [plan for plan in graph.cells if plan.cell.source == source]


@pytest.mark.slow
def test_two_halves_of_a_recipe_give_what_one_workspace_gives(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen, grid__sources=["villain", "comedian"], grid__epochs=[0, 1])
    for source in ("villain", "comedian"):
        run_recipe(recipe, tmp_path / source, Heard(), plans=_cells(source))  # pyright: ignore[reportArgumentType]
    run_tiny(recipe, tmp_path / "whole")
    words = ["merge", str(tmp_path / "villain"), str(tmp_path / "comedian"), "-w", str(tmp_path / "both"), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report[str(tmp_path / "comedian")]["n_known"] > 0  # the assistant's base was measured in both
    assert results(recipe, tmp_path / "both") == results(recipe, tmp_path / "whole")
    _, heard = run_tiny(recipe, tmp_path / "both")
    assert heard.stages == {}


@pytest.mark.parametrize("nth", [1, 3])
def test_a_merge_that_was_killed_goes_on(done_run: DoneRun, tmp_path: Path, nth: int) -> None:
    recipe: Recipe = done_run.recipe
    shutil.copytree(done_run.workspace, tmp_path / "there")

    def work() -> None:
        die_at_fsync(nth)
        merge(Store.open(tmp_path / "here"), Store.open(tmp_path / "there"))

    assert exit_of(forked(work)) == -signal.SIGKILL
    merge(Store.open(tmp_path / "here"), Store.open(tmp_path / "there"))
    assert results(recipe, tmp_path / "here") == results(recipe, tmp_path / "there")
