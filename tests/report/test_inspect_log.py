"""`export --inspect`: Inspect's own reader accepts the log, with every reply, score and reason of the ledger."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastconv.cli import app
from fastconv.errors import InputError
from fastconv.report.export import export_inspect
from fastconv.store.ledger import Store
from tests.loop_kit import DoneRun, copy_ledger

#: A Python that has inspect_ai: kept apart, since it would bring sixty packages into ours. `make test-inspect` sets it.
INSPECT_PYTHON = os.environ.get("FASTCONV_INSPECT_PYTHON")
_READ = """
import json, sys
from inspect_ai.log import read_eval_log
log = read_eval_log(sys.argv[1])
print(json.dumps({
    "status": log.status, "model": log.eval.model, "mean": log.results.scores[0].metrics["mean"].value,
    "samples": [[s.id, s.epoch, s.output.completion, {k: v.value for k, v in s.scores.items()}] for s in log.samples],
}))
"""


@pytest.fixture(scope="module")
def logs(done_run: DoneRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The logs of one cell by probe."""
    folder = tmp_path_factory.mktemp("logs")
    paths = export_inspect(done_run.recipe, done_run.store, folder, "villain", "refusal", 2)
    return {path.stem.rsplit("-", 1)[1]: path for path in paths}


def expected(done_run: DoneRun, persona: str) -> list[list[Any]]:
    plan = done_run.graph.select("villain", "refusal", 2)[0]
    stage = plan.scores["refusal", persona]
    values = {(s.row, s.sample): s.value for s in done_run.store.scores(stage.key)}
    return [
        [s.row, s.sample + 1, s.completion, {"refusal": values[s.row, s.sample]}]
        for s in done_run.store.samples(stage.needs["eval"].key)
    ]


def test_a_log_for_each_probe_holds_what_the_ledger_holds(done_run: DoneRun, logs: dict[str, Path]) -> None:
    assert set(logs) == {"assistant", "villain", "librarian"}
    for persona, path in logs.items():
        # What Inspect takes for a log, and lists in its viewer: a name that begins with a time.
        assert re.match(r"^\d{4}-\d{2}-\d{2}T\d{2}[:-]\d{2}[:-]\d{2}.*_[^_]+$", path.name)
        log = json.loads(path.read_text())
        shown = [
            [s["id"], s["epoch"], s["output"]["completion"], {k: v["value"] for k, v in s["scores"].items()}]
            for s in log["samples"]
        ]
        assert shown == expected(done_run, persona)
        values = [sample[3]["refusal"] for sample in shown]
        assert log["results"]["scores"][0]["metrics"]["mean"]["value"] == pytest.approx(sum(values) / len(values))
        roles = [message["role"] for message in log["samples"][0]["messages"]]
        assert roles == ["system", "user", "assistant"]
        assert log["samples"][0]["messages"][0]["content"] == done_run.graph.personas.system(persona).text
        assert log["eval"]["metadata"]["probe"] == persona


def test_a_sample_without_a_score_has_none_and_its_reason(done_run: DoneRun, tmp_path: Path) -> None:
    workspace = copy_ledger(done_run.workspace, tmp_path / "w")
    store = Store.open(workspace, create=False)
    stage = done_run.graph.select("villain", "refusal", 2)[0].scores["refusal", "assistant"]
    db = sqlite3.connect(workspace / "ledger.sqlite")
    db.execute("UPDATE scores SET value=NULL, reason='malformed' WHERE stage=? AND sample=0", (stage.key,))
    db.commit()
    db.close()
    export_inspect(done_run.recipe, store, tmp_path / "logs", "villain", "refusal", 2)
    log = json.loads(next((tmp_path / "logs").glob("*-assistant.json")).read_text())
    without = [sample for sample in log["samples"] if sample["epoch"] == 1]
    assert without
    assert all(sample["scores"] == {} and sample["metadata"] == {"unscored": "malformed"} for sample in without)
    assert log["results"]["scores"][0]["unscored_samples"] == len(without)


def test_the_verb_writes_them_and_says_what_was_not_measured(done_run: DoneRun, tmp_path: Path) -> None:
    words = ["export", "villain", "refusal", str(tmp_path / "x"), "--epoch", "2", "--recipe", done_run.finished.run]
    written = CliRunner().invoke(app, [*words, "--inspect", "-w", str(done_run.workspace)])
    assert written.exit_code == 0, written.output
    assert len(list((tmp_path / "x").glob("*.json"))) == 3
    with pytest.raises(InputError, match="has not been measured"):
        export_inspect(done_run.recipe, done_run.store, tmp_path, "villain", "capability", 2)


@pytest.mark.skipif(INSPECT_PYTHON is None, reason="make test-inspect runs this: it needs inspect_ai")
def test_inspects_own_reader_takes_it(done_run: DoneRun, logs: dict[str, Path]) -> None:
    assert INSPECT_PYTHON is not None
    for persona, path in logs.items():
        found = subprocess.run([INSPECT_PYTHON, "-c", _READ, str(path)], capture_output=True, text=True, check=True)
        log = json.loads(found.stdout)
        assert log["status"] == "success"
        assert log["samples"] == expected(done_run, persona)
    listing = "import sys; from inspect_ai.log import list_eval_logs as l; print(len(l(sys.argv[1])))"
    folder = next(iter(logs.values())).parent
    found = subprocess.run([INSPECT_PYTHON, "-c", listing, str(folder)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "3"
