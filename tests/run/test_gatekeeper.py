"""A failed gate stops a run before its next cost; parse_ignored_gates it takes a reason, which run and report then print."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastconv.analysis.gates import decide_gates, ignored_gates, measurable_behaviors
from fastconv.cli import app
from fastconv.errors import GateStop, InputError
from fastconv.experiment.graph import Graph
from fastconv.recipe import run_id
from fastconv.report import collect
from fastconv.report.blocks import render_html
from fastconv.run.run import parse_ignored_gates, run_recipe
from fastconv.store.ledger import Store
from tests.loop_kit import Heard, run_tiny, tiny_recipe, write_tiny_recipe

WHY = "random weights never converge"


def _kinds(store: Store, graph: Graph) -> list[str]:
    return [stage.slot for stage in graph.stages() if store.record(stage.key) is not None]


def test_a_failed_g2_stops_before_any_adapter_on_a_snapshot(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe, heard = tiny_recipe(tiny_qwen, eval__geometry=False, gates__g2_loss=0.1), Heard()
    with pytest.raises(GateStop, match=r"G2 failed: loss .*--ignore-gate G2 --because") as caught:
        run_recipe(recipe, tmp_path, heard)
    assert caught.value.exit_code == 3
    store, graph = Store.open(tmp_path), Graph(recipe)
    done = _kinds(store, graph)
    assert "snapshot/villain/source/e1/s42" in done
    assert not [slot for slot in done if slot.startswith("behavior/villain/source")]
    assert [(v.gate, v.verdict) for v in heard.gates if v.gate == "G2"] == [("G2", "fail")]
    assert any(body["gate"] == "G2" and body["rows"] for body in store.verdicts(run_id(recipe)))
    # The same command stops again, at no cost; with the gate ignored it goes on from there.
    with pytest.raises(GateStop):
        run_recipe(recipe, tmp_path, Heard())
    finished = run_recipe(recipe, tmp_path, heard, ignore_gates={"G2": WHY})
    assert finished.tally.n_stages > 0
    assert ignored_gates(store, recipe) == {"G2": WHY}
    assert next(v for v in finished.verdicts if v.gate == "G2").ignored == WHY
    html = render_html(collect(graph, store))
    assert f"Gate G2 was ignored, because {WHY}." in html
    run_recipe(recipe, tmp_path, Heard())  # it stays ignored: the reason is in the ledger


def test_a_gate_that_the_recipe_does_not_let_stop_is_only_told(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen, eval__geometry=False, gates__g2_loss=0.1, gates__stop=[])
    finished, _ = run_tiny(recipe, tmp_path)
    assert next(v for v in finished.verdicts if v.gate == "G2").verdict == "fail"


def test_g35_stops_the_run(tiny_qwen: Path, tmp_path: Path) -> None:
    strict = {"eval__geometry": False, "gates__g35_tolerance": 1e-9, "gates__g35_floor_nats": 0.0}
    with pytest.raises(GateStop, match=r"G3\.5 failed: .*highest later .*\(\+"):  # so high an lr spoils the snapshots
        run_tiny(tiny_recipe(tiny_qwen, convergence__lr=1.0, **strict), tmp_path / "higher")
    finished, _ = run_tiny(tiny_recipe(tiny_qwen, **strict), tmp_path / "lower")
    (verdict,) = [v for v in finished.verdicts if v.gate == "G3.5"]
    assert verdict.verdict == "pass"
    assert "(-" in verdict.reason


@pytest.mark.parametrize("silent", ["G4", "G5"])
def test_a_silent_first_source_stops_before_the_next_one_is_trained(
    tiny_qwen: Path, tmp_path: Path, silent: str
) -> None:
    three = ["villain", "comedian", "librarian"]
    recipe = tiny_recipe(
        tiny_qwen,
        eval__geometry=False,
        grid__sources=three,
        grid__epochs=[0, 1],
        gates__stop=[silent],
        gates__g5_sources=2,
    )
    with pytest.raises(GateStop, match=rf"{silent} failed: no shift beyond a threshold") as caught:
        run_recipe(recipe, tmp_path, Heard())
    assert caught.value.exit_code == 3
    trained = {slot.split("/")[1] for slot in _kinds(Store.open(tmp_path), Graph(recipe)) if "/source/e1/" in slot
               and slot.startswith("behavior/")}  # fmt: skip
    assert trained == set(three[: 1 if silent == "G4" else 2])
    finished = run_recipe(recipe, tmp_path, Heard(), ignore_gates={silent: "the others are wanted all the same"})
    assert next(v for v in finished.verdicts if v.gate == silent).ignored
    run_recipe(recipe, tmp_path, Heard())  # nothing is left to pay for


def test_an_ignored_g0_trains_what_could_not_be_measured(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen, eval__geometry=False, grid__behaviors=["none", "capability"], grid__epochs=[0, 1])
    run_tiny(recipe, tmp_path)
    store, graph = Store.open(tmp_path), Graph(recipe)
    assert measurable_behaviors(graph, store) == []
    assert not [slot for slot in _kinds(store, graph) if slot.startswith("behavior")]
    run_recipe(recipe, tmp_path, Heard(), ignore_gates={"G0": "to see what training does"})
    assert [slot for slot in _kinds(store, graph) if slot.startswith("behavior")]
    g0 = next(v for v in decide_gates(graph, store, graph.cells) if v.gate == "G0")
    assert (g0.verdict, g0.ignored) == ("fail", "to see what training does")


@pytest.mark.parametrize(
    ("codes", "because", "said"),
    [
        (["G1"], "because I say so", "audit's refusals cannot be ignored"), (["G9"], "a reason here", "'G9' ends no run"),
        (["G2"], "", "needs its reason"), (["G2"], "ok", "needs its reason"), ([], "a reason here", "without a gate"),
    ],
)  # fmt: skip
def test_what_cannot_be_ignored_or_has_no_reason(codes: list[str], because: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_ignored_gates(codes, because)


def test_the_command_line_stops_with_3_and_writes_the_report_so_far(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path / "tiny.toml", tiny_qwen)
    where = ["-w", str(tmp_path / "w"), "--reports", str(tmp_path / "r"), "--set", "gates.g2_loss=0.1"]
    stopped = CliRunner().invoke(app, ["run", str(recipe), *where])
    assert stopped.exit_code == 3
    assert "G2 failed" in stopped.output
    page = next((tmp_path / "r").glob("*.html"))
    assert "G2" in page.read_text()
    went_on = CliRunner().invoke(app, ["run", str(recipe), *where, "--ignore-gate", "G2", "--because", WHY])
    assert went_on.exit_code == 0, went_on.output
    assert f"ignored, because {WHY}" in went_on.output
    assert WHY in page.read_text()
