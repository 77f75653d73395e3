"""Inspect itself against served cells: its task is answered by each cell, and its logs come back to be compared."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastconv.cli import app
from tests.loop_kit import DoneRun, copy_ledger
from tests.serve.kit import CELLS, endpoint

#: A Python that has inspect_ai and openai; `make test-inspect` sets it.
INSPECT_PYTHON = os.environ.get("FASTCONV_INSPECT_PYTHON")
_TASK = """
import sys
from inspect_ai import Task, eval, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import Score, mean, scorer
from inspect_ai.solver import generate, system_message

@scorer(metrics=[mean()])
def vowels():
    async def score(state, target):
        return Score(value=sum(state.output.completion.lower().count(letter) for letter in "aeiou") / 20)
    return score

@task
def tea():
    dataset = [Sample(id=f"q{i}", input=f"Question {i}?", target="a") for i in range(5)]
    return Task(dataset=dataset, solver=[system_message("You are a villain."), generate()], scorer=vowels())

folder, form, *models = sys.argv[1:]
logs = eval(tea(), model=[f"openai-api/fastconv/{one}" for one in models], epochs=2, log_dir=folder, log_format=form,
            max_tokens=16, seed=5, temperature=1.5, display="none")
assert all(log.status == "success" for log in logs), [log.error for log in logs]
"""

pytestmark = pytest.mark.skipif(not INSPECT_PYTHON, reason="needs the virtual environment of make test-inspect")


@pytest.mark.parametrize("form", ["eval", "json"])
def test_an_inspect_task_runs_on_cells_and_its_logs_are_compared(done_run: DoneRun, tmp_path: Path, form: str) -> None:
    assert INSPECT_PYTHON is not None
    work = copy_ledger(done_run.workspace, tmp_path / "work")
    with endpoint(done_run.recipe, done_run.workspace, CELLS[0], CELLS[2]) as one:
        environment = {**os.environ, "FASTCONV_BASE_URL": one.service.url, "FASTCONV_API_KEY": "none"}
        command = [INSPECT_PYTHON, "-c", _TASK, str(tmp_path / "logs"), form, CELLS[0], CELLS[2]]
        subprocess.run(command, check=True, env=environment, timeout=240)
    logs = sorted(map(str, (tmp_path / "logs").glob(f"*.{form}")))
    assert len(logs) == 2
    kept = CliRunner().invoke(app, ["import", *logs, "-w", str(work), "--json"])
    assert kept.exit_code == 0, kept.output
    assert {(one["cell"], one["scorer"], one["n_samples"]) for one in json.loads(kept.output)} == {
        (CELLS[0], "vowels", 10), (CELLS[2], "vowels", 10)
    }  # fmt: skip
    run = done_run.finished.run
    result = CliRunner().invoke(app, ["compare", f"{run}:{CELLS[0]}", f"{run}:{CELLS[2]}", "-w", str(work), "--json"])
    (pair,) = [pair for pair in json.loads(result.output)["pairs"] if pair["role"] == "imported"]
    assert pair["n_questions"] == 5
    assert pair["difference"] != 0.0
