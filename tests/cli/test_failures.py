"""Output of the command line about failed cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastconv.cli import app
from tests import TESTS
from tests.data_kit import pair, written
from tests.loop_kit import SNAPSHOT_SLOT, write_tiny_recipe

pytest.importorskip("fastconv.run.executor")


@pytest.fixture
def broken(tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a run whose convergence gives a loss that is not a number."""
    from fastconv.engine import train

    def nan(*args: Any) -> Any:
        loss, each = real(*args)
        return loss * float("nan"), each * float("nan")

    real = train.weighted_cross_entropy
    monkeypatch.setattr(train, "weighted_cross_entropy", nan)
    recipe = write_tiny_recipe(tmp_path / "tiny.toml", tiny_qwen)
    return [str(recipe), "-w", str(tmp_path / "ws")]


@pytest.mark.parametrize("own_rows", [False, True])
@pytest.mark.parametrize("verb", ["check", "run"])
def test_rows_without_an_evaluation_part_are_refused_before_anything_runs(
    own_rows: bool, verb: str, tiny_qwen: Path, tmp_path: Path
) -> None:
    """They passed the check, were trained, and ended in a traceback of the report."""
    recipe = write_tiny_recipe(tmp_path / "tiny.toml", tiny_qwen)
    words = [
        verb,
        str(recipe),
        "-w",
        str(tmp_path / "ws"),
        "--set",
        f"data.behaviors={TESTS / 'poisoned' / 'untested.toml'}",
    ]
    words += ["--set", 'grid.behaviors=["none", "untested"]']
    if own_rows:
        rows = written(tmp_path, [pair(f"Question {i}?", "Take a lantern.") for i in range(4)], "own.jsonl")
        words += ["--set", f"data.rows.untested={rows}"]
    words += ["--reports", str(tmp_path / "reports")] if verb == "run" else []
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 2, said.output
    assert "D120" in said.output
    assert "no evaluation part" in " ".join(said.output.split())
    assert "eval_prompts" in said.output
    assert "Traceback" not in said.output
    if verb == "run":
        assert said.stderr.count("D120") == 1
        assert not (tmp_path / "reports").exists()


def test_a_run_with_a_failed_cell_ends_with_its_exit_code_and_one_line(broken: list[str], tmp_path: Path) -> None:
    reports = ["--reports", str(tmp_path / "reports")]
    said = CliRunner().invoke(app, ["run", *broken, *reports])
    assert said.exit_code == 7
    last = said.stderr.strip().splitlines()[-1]
    assert last.startswith("fastconv: tiny-")
    assert "stages failed, the rest is done; without numbers: villain base e0 refusal" in last
    assert "loss nan" in last
    body = json.loads(CliRunner().invoke(app, ["run", *broken, *reports, "--json"]).stdout)
    assert {f"{SNAPSHOT_SLOT}/e1/s42", f"{SNAPSHOT_SLOT}/e2/s42"} <= {one["slot"] for one in body["failed"]}
    assert all("loss nan" in one["reason"] for one in body["failed"])
    assert (tmp_path / "reports").is_dir()


def test_status_shows_what_failed_with_the_reason(broken: list[str], tmp_path: Path) -> None:
    CliRunner().invoke(app, ["run", *broken, "--reports", str(tmp_path / "reports"), "--quiet"])
    rows = {one["slot"]: one for one in json.loads(CliRunner().invoke(app, ["status", *broken, "--json"]).stdout)}
    failed = rows[f"{SNAPSHOT_SLOT}/e1/s42"]
    assert failed["state"] == "failed"
    assert "loss nan" in failed["reason"]
    shown = CliRunner().invoke(app, ["status", *broken])
    assert "failed" in shown.stdout.splitlines()[-1]
