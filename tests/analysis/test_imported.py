"""Inspect logs of served cells: read, kept once, and compared between cells and runs."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from typer.testing import CliRunner

from fastconv.analysis.imported import import_log, imported_series
from fastconv.cli import app
from fastconv.errors import DataError, InputError
from fastconv.run.gc import find_garbage
from fastconv.store.ledger import Store
from tests.faults.test_disk_and_ledger import ask
from tests.loop_kit import DoneRun, copy_ledger
from tests.serve.kit import CELLS

QUESTIONS = 12


def log_of(model: str = f"openai-api/fastconv/{CELLS[0]}", shift: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A log of a task with a letter scorer and one of two numbers, two epochs."""
    samples = []
    for i in range(QUESTIONS):
        for epoch in (1, 2):
            grade = {"value": {"points": min(1.0, 0.1 + 0.03 * i + shift), "n": 4 + i}}
            samples.append({
                "id": f"q{i}", "epoch": epoch, "input": f"Question {i}?", "target": "x",
                "output": {"completion": f"Answer {i}.", "choices": [{"stop_reason": "stop"}], "usage": {"output_tokens": 3}},
                "scores": {"match": {"value": "C" if (i + epoch) % 3 else "I"}, "grade": grade},
            })  # fmt: skip
    return {"version": 2, "status": "success", "eval": {"task": "tea/time", "model": model, "eval_id": "e1"},
            "samples": samples} | changes  # fmt: skip


def written(path: Path, log: Any) -> Path:
    path.write_text(json.dumps(log))
    return path


@pytest.fixture
def store(done_run: DoneRun, tmp_path: Path) -> Store:
    return Store.open(copy_ledger(done_run.workspace, tmp_path / "work"), create=False)


def plan_of(done_run: DoneRun, name: str) -> Any:
    return next(plan for plan in done_run.graph.cells if plan.cell.name == name)


def test_every_scorer_is_a_stage_and_again_changes_nothing(done_run: DoneRun, store: Store, tmp_path: Path) -> None:
    path = written(tmp_path / "log.json", log_of())
    done = import_log(path, store)
    assert [one.scorer for one in done] == ["grade.n", "grade.points", "match"]
    assert {(one.run, one.cell, one.n_samples, one.n_unscored, one.known) for one in done} == {
        (done_run.finished.run, CELLS[0], 2 * QUESTIONS, 0, False)
    }
    found = imported_series(done_run.graph, store, plan_of(done_run, CELLS[0]))
    assert set(found) == {"tea/time: grade.n", "tea/time: grade.points", "tea/time: match"}
    assert found["tea/time: match"].values.shape == (QUESTIONS, 2)
    assert found["tea/time: match"].mean.value == pytest.approx(16 / 24)
    assert (found["tea/time: match"].unit, found["tea/time: grade.n"].unit) == ("share", "points")
    n_stages = store.rows("SELECT count(*) FROM stages")
    assert all(one.known for one in import_log(path, store))
    assert store.rows("SELECT count(*) FROM stages") == n_stages
    assert not any("imported" in item.name for item in find_garbage(store).garbage)


def test_a_later_log_of_the_task_takes_the_earlier_one_s_place(done_run: DoneRun, store: Store, tmp_path: Path) -> None:
    import_log(written(tmp_path / "a.json", log_of()), store)
    import_log(written(tmp_path / "b.json", log_of(shift=0.3)), store)
    found = imported_series(done_run.graph, store, plan_of(done_run, CELLS[0]))["tea/time: grade.points"]
    assert found.mean.value == pytest.approx(0.1 + 0.03 * (QUESTIONS - 1) / 2 + 0.3)


def test_compare_reads_what_was_imported_of_two_cells_of_one_run(
    done_run: DoneRun, store: Store, tmp_path: Path
) -> None:
    for cell, shift in ((CELLS[0], 0.0), (CELLS[2], 0.2)):
        import_log(written(tmp_path / f"{shift}.json", log_of(cell, shift)), store)
    run = done_run.finished.run
    result = CliRunner().invoke(
        app, ["compare", f"{run}:{CELLS[0]}", f"{run}:{CELLS[2]}", "-w", str(store.root), "--json"]
    )
    assert result.exit_code == 0, result.output
    compared = json.loads(result.output)
    pairs = {pair["measure"]: pair for pair in compared["pairs"] if pair["role"] == "imported"}
    assert set(pairs) == {"tea/time: grade.n", "tea/time: grade.points", "tea/time: match"}
    points = pairs["tea/time: grade.points"]
    assert points["difference"] == pytest.approx(0.2)
    assert points["n_questions"] == QUESTIONS
    assert pairs["tea/time: match"]["difference"] == pytest.approx(0.0)
    assert set(compared["apart"]) == {"convergence", "epoch", "behavior", "negatives"} - (
        {"convergence"}
        if plan_of(done_run, CELLS[0]).cell.convergence == plan_of(done_run, CELLS[2]).cell.convergence
        else set()
    )
    shown = CliRunner().invoke(app, ["compare", f"{run}:{CELLS[0]}", f"{run}:{CELLS[2]}", "-w", str(store.root)])
    assert "imported" in shown.output
    assert "tea/time: grade.points" in shown.output


def packed(folder: Path, log: dict[str, Any], method: int) -> Path:
    """The log as `.eval`: a zip with a header and a file for each sample, stored in this method."""
    path = folder / "log.eval"
    parts = {"header.json": {k: v for k, v in log.items() if k != "samples"}}
    parts |= {f"samples/{one['id']}_epoch_{one['epoch']}.json": one for one in log["samples"]}
    zstd = method == 93
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED if zstd else method) as archive:
        for name, part in parts.items():
            data = json.dumps(part).encode()
            archive.writestr(name, pyarrow.compress(data, "zstd", asbytes=True) if zstd else data)
    if zstd:  # marks the entries as Zstandard, as Inspect writes them
        raw = bytearray(path.read_bytes())
        for mark, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
            place = raw.find(mark)
            while place >= 0:
                raw[place + at : place + at + 2] = (93).to_bytes(2, "little")
                place = raw.find(mark, place + 4)
        path.write_bytes(bytes(raw))
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, 93])
def test_an_eval_file_is_the_same_log(store: Store, tmp_path: Path, method: int) -> None:
    import_log(written(tmp_path / "log.json", log_of()), store)
    assert all(one.known for one in import_log(packed(tmp_path, log_of(), method), store))


def with_first(log: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The log with a first sample of which something is other."""
    return {**log, "samples": [{**log["samples"][0], **changes}, *log["samples"][1:]]}


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "no JSON": (lambda log: "nope", DataError, "no Inspect log"),
    "a list": (lambda log: [1], DataError, "no table `eval`"),
    "not finished": (lambda log: {**log, "status": "error"}, DataError, "did not finish"),
    "no samples": (lambda log: {**log, "samples": []}, DataError, "no samples"),
    "no scores": (lambda log: {**log, "samples": [{"id": 1}]}, DataError, "no scores"),
    "no id": (lambda log: {**log, "samples": [{}]}, DataError, "no id"),
    "one sample twice": (lambda log: {**log, "samples": [log["samples"][0]] * 2}, DataError, "one id and epoch"),
    "a list as output": (lambda log: {**log, "samples": [{"id": 1, "output": [1]}]}, DataError, "cannot be read"),
    "an epoch without end": (
        lambda log: with_first(log, epoch=math.inf),
        DataError,
        "sample q0 of the log cannot be read",
    ),
    "an epoch that no 64 bits hold": (lambda log: with_first(log, epoch=10**30), DataError, "cannot be read"),
    "tokens without end": (
        lambda log: with_first(log, output={"usage": {"output_tokens": math.inf}}),
        DataError,
        "cannot be read",
    ),
    "another model": (
        lambda log: {**log, "eval": {"model": "openai/gpt-4o", "task": "t"}},
        InputError,
        "is no cell of",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_and_nothing_is_kept(store: Store, tmp_path: Path, name: str) -> None:
    change, kind, said = FAULTS[name]
    path = written(tmp_path / "log.json", change(log_of()))
    if name == "no JSON":
        path.write_text("nope")
    before = store.rows("SELECT count(*) FROM stages")
    with pytest.raises(kind, match=said) as caught:
        import_log(path, store)
    assert "\n" not in str(caught.value)
    assert "Fix: " in str(caught.value)
    assert store.rows("SELECT count(*) FROM stages") == before


@pytest.mark.parametrize("fault", ["an entry is encrypted", "a damaged entry", "a header that is a list"])
def test_a_faulty_eval_file_is_one_line(store: Store, tmp_path: Path, fault: str) -> None:
    path = packed(tmp_path, log_of(), zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    if fault == "an entry is encrypted":
        for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            raw[raw.find(mark) + at] |= 1
    elif fault == "a damaged entry":
        start = 30 + len("header.json")
        raw[start : start + 8] = b"\xff" * 8
    path.write_bytes(raw)
    if fault == "a header that is a list":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("header.json", "[1]")
    code, out, crash = ask("import", path, "-w", store.root)
    assert (code, crash) == (2, None), out
    assert "no Inspect log that can be read" in out


def test_numbers_beyond_reason_in_a_log_are_left_out(done_run: DoneRun, store: Store, tmp_path: Path) -> None:
    log = log_of()
    log["eval"] |= {"task_args": {"temperature": math.nan, "seed": 10**30}}
    for sample, value in zip(log["samples"], (10**400, 1e308, "1e999"), strict=False):
        sample["scores"] = {"match": {"value": value}}
    import_log(written(tmp_path / "log.json", log), store)
    found = imported_series(done_run.graph, store, plan_of(done_run, CELLS[0]))["tea/time: match"]
    assert len(found.lost) == 3
    assert store.unsound_rows() == []


def test_what_is_no_number_stays_unscored_with_its_reason(done_run: DoneRun, store: Store, tmp_path: Path) -> None:
    log = log_of()
    values = ["C", "P", "N", "0.25", True, None, float("nan"), "maybe", [1]]
    for sample, value in zip(log["samples"], values, strict=False):
        sample["scores"] = {"match": {"value": value}}
    log["samples"] = log["samples"][: len(values)]
    import_log(written(tmp_path / "log.json", log), store, cell=CELLS[1])
    (series,) = imported_series(done_run.graph, store, plan_of(done_run, CELLS[1])).values()
    assert sorted(value for value in series.values.ravel().tolist() if value == value) == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert len(series.lost) == 4
    assert all(reason for _, reason in series.lost)


def test_the_run_and_the_cell_may_be_named(done_run: DoneRun, store: Store, tmp_path: Path) -> None:
    path = written(tmp_path / "log.json", log_of("openai/whatever"))
    (one, *_) = import_log(path, store, run=done_run.finished.run, cell="villain source e2 none s42")
    assert one.cell == CELLS[1]
    with pytest.raises(InputError, match="no run is called"):
        import_log(path, store, run="other", cell=CELLS[1])
