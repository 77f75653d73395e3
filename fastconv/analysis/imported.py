"""Inspect logs of served cells: read, kept in the ledger beside the run's own measures, and found again for `compare`.

A log is a task's samples with their answers and scores, as a JSON file or in Inspect's `.eval` (a zip file). Each scorer of
it becomes a stage of kind `imported`: its key holds the stack that answered and the log's content, so that a log that is
imported again changes nothing. A cell is known by the model's name, as `fastconv serve` gives it.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastconv.errors import DataError, InputError, did_you_mean, safe_text, shown
from fastconv.experiment.graph import CellPlan, Graph
from fastconv.experiment.measures import KINDS
from fastconv.experiment.recorded import graph_of_run
from fastconv.judge.http import safe_value
from fastconv.recipe import parse_recipe, run_id, sha256_of
from fastconv.stats.series import Series, series_of
from fastconv.stats.units import Unit
from fastconv.store.io import storage_errors, stored_json
from fastconv.store.ledger import Sample, Score, Stage, Store
from fastconv.store.sound import is_number

#: Inspect's letters for correct, partly, incorrect and no answer.
_LETTERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
#: How Python's zipfile knows Zstandard, which it does not read before 3.14.
_ZSTANDARD = 93
#: A log that unpacks to more is refused; texts and names are kept up to these lengths (characters).
_MOST_BYTES, _PART_BYTES = 4 * 2**30, 2**20
_TEXT_CHARS, _NAME_CHARS = 200_000, 120
#: What a file that is no log makes its readers raise; RuntimeError: an entry that is encrypted, or JSON nested too deep.
_UNREADABLE = (ValueError, RuntimeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
_EXPORT = "write the log as JSON with `inspect log convert --to json`, and import that"


@dataclass(frozen=True)
class ImportedStage:
    """What one scorer of a log became: the run and cell that it is of, and whether it was there before."""

    run: str
    cell: str
    task: str
    scorer: str
    n_samples: int
    n_unscored: int
    known: bool


@dataclass(frozen=True)
class _Scored:
    scorer: str
    samples: tuple[Sample, ...]
    scores: tuple[Score, ...]


def stack_id(graph: Graph, plan: CellPlan) -> str:
    """What identifies a cell's stack: a sha256 (hex) over base, engine and the keys of its adapters' stages."""
    return sha256_of([dict(graph.engine_inputs), [stage.key for stage in plan.stack.values()]])


def import_log(path: Path, store: Store, *, run: str = "", cell: str = "") -> list[ImportedStage]:
    """Keep an Inspect log in the ledger, one stage for each of its scorers.

    `run` and `cell` say what it is of, where the model's name does not, or several runs have such a cell. Raises DataError
    for a file that is no finished log with samples, InputError where the cell is not known.
    """
    log = _read(path)
    about = log["eval"]
    model = cell or str(about.get("model", "")).rsplit("/", 1)[-1]
    graph, plan = _cell_of(store, run, model, str(path))
    task = shown(str(about.get("task", "")), _NAME_CHARS) or path.stem
    done = []
    for scored in _scorers(log["samples"], str(path)):
        content = [[s.row, s.sample, s.prompt, s.completion] for s in scored.samples]
        content += [[s.row, s.sample, s.value, s.reason] for s in scored.scores]
        stage = Stage(
            "imported", f"imported/{plan.cell.name}/{task}/{scored.scorer}", KINDS["imported"].version,
            {"stack": stack_id(graph, plan), "task": task, "scorer": scored.scorer, "content_sha256": sha256_of(content)},
        )  # fmt: skip
        known = store.record(stage.key) is not None
        facts = {
            name: safe_value(about.get(name))
            for name in ("eval_id", "created", "model", "model_generate_config", "task_args")
        }
        store.commit(
            stage,
            outputs={"n": len(scored.samples)},
            facts=facts,
            seconds=0.0,
            samples=scored.samples,
            scores=scored.scores,
        )
        name = run_id(graph.recipe)
        store.note_stage_of_run(name, stage, reused=known)
        n_unscored = sum(score.value is None for score in scored.scores)
        done.append(ImportedStage(name, plan.cell.name, task, scored.scorer, len(scored.samples), n_unscored, known))
    return done


def imported_series(graph: Graph, store: Store, plan: CellPlan) -> dict[str, Series]:
    """What was imported of a cell by name (`task: scorer`), the newest of each; also by another run with the same stack."""
    found: dict[str, Series] = {}
    stack = stack_id(graph, plan)
    query = "SELECT key, inputs FROM stages WHERE kind='imported' ORDER BY finished_at"
    for key, text in store.rows(query):
        inputs = stored_json(text)
        if inputs.get("stack") == stack:
            name, scores = f"{inputs['task']}: {inputs['scorer']}", store.scores(key)
            found[name] = series_of(key, name, "", scores, _unit(scores))
    return found


def _unit(scores: Sequence[Score]) -> Unit:
    """Shares where all values lie in 0 to 1, else points."""
    return "share" if all(score.value is None or 0.0 <= score.value <= 1.0 for score in scores) else "points"


def _cell_of(store: Store, run: str, model: str, where: str) -> tuple[Graph, CellPlan]:
    """The run and cell that a model's name means. Raises InputError if none, or several with different stacks, has it."""
    runs = [row for row in store.runs() if run in ("", row["id"])]
    if not runs:
        fix = did_you_mean(run, [row["id"] for row in store.runs()], "see `fastconv status` for the runs")
        raise InputError(f"no run is called {run!r}", where="--run", fix=fix)
    found: dict[str, tuple[Graph, CellPlan]] = {}
    names: list[str] = []
    for row in runs:
        graph = graph_of_run(parse_recipe(stored_json(row["recipe"]), where=row["id"]), store)
        names += [plan.cell.name for plan in graph.cells]
        for plan in graph.cells:
            if plan.cell.name == "-".join(model.split()):
                found.setdefault(stack_id(graph, plan), (graph, plan))
    if not found:
        fix = did_you_mean(model, names, "say which cell it is with --cell NAME, as `fastconv serve` names it")
        raise InputError(f"the log's model {model!r} is no cell of {run or 'any run here'}", where=where, fix=fix)
    if len(found) > 1:
        several = ", ".join(run_id(graph.recipe) for graph, _ in found.values())
        raise InputError(f"several runs have a cell {model}: {several}", where=where, fix="say which with --run RUN")
    return next(iter(found.values()))


def _read(path: Path) -> Mapping[str, Any]:
    """The log as one table with `eval` and `samples`. Raises DataError."""
    if not path.is_file():
        raise DataError(
            "no such file" if not path.exists() else "this is no file", where=str(path), fix="give the log's path"
        )
    try:
        with storage_errors(path):
            log = _read_zip(path) if zipfile.is_zipfile(path) else json.loads(path.read_text(encoding="utf-8"))
    except _UNREADABLE as error:
        raise DataError(
            f"it is no Inspect log that can be read ({shown(str(error), 120)})", where=str(path), fix=_EXPORT
        ) from None
    if not isinstance(log, dict) or not isinstance(log.get("eval"), dict):
        raise DataError(
            "it is no Inspect log: it has no table `eval`", where=str(path), fix="give a log of `inspect eval`"
        )
    if log.get("status") != "success":
        raise DataError(
            f"the evaluation did not finish (its status is {shown(str(log.get('status')), 40)})", where=str(path),
            fix="let it finish with `inspect eval-retry`, and import that log",
        )  # fmt: skip
    if not isinstance(log.get("samples"), list) or not log["samples"]:
        raise DataError("the log has no samples", where=str(path), fix="run it without --no-log-samples")
    return log


def _read_zip(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > _MOST_BYTES:
            raise ValueError("it unpacks to more than 4 GiB")
        log = json.loads(_entry(archive, archive.getinfo("header.json")))
        if not isinstance(log, dict):
            raise ValueError("its header is no table")
        samples = [entry for entry in archive.infolist() if entry.filename.startswith("samples/")]
        log["samples"] = [json.loads(_entry(archive, entry)) for entry in samples]
    return log


def _entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """The bytes of a zip entry, also in Zstandard, which pyarrow reads (it is there with `datasets`)."""
    if entry.compress_type != _ZSTANDARD:
        return archive.read(entry)
    import pyarrow

    file = archive.fp
    assert file is not None, "the archive is open"
    file.seek(entry.header_offset + 26)
    n_name, n_extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    file.seek(n_name + n_extra, io.SEEK_CUR)
    stream = pyarrow.CompressedInputStream(pyarrow.BufferReader(file.read(entry.compress_size)), "zstd")
    parts, left = [], _MOST_BYTES
    try:
        while left > 0 and (part := stream.read(_PART_BYTES)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
    except OSError as error:  # pyarrow's own name for data that is damaged
        raise ValueError(str(error)) from None


def _scorers(samples: Sequence[Any], where: str) -> Iterator[_Scored]:
    """The samples with the scores of each scorer (and of each value of a scorer that gives a table). Raises DataError."""
    rows = []
    for sample in samples:
        if not isinstance(sample, dict) or "id" not in sample:
            raise DataError("a sample of the log has no id", where=where, fix=_EXPORT)
        try:
            rows.append((_sample(sample), _values(sample)))
        except (TypeError, ValueError, AttributeError, LookupError, OverflowError):
            name = shown(str(sample["id"]), 40)
            raise DataError(f"sample {name} of the log cannot be read", where=where, fix=_EXPORT) from None
    names = sorted({name for _, values in rows for name in values})
    if not names:
        raise DataError("the log has no scores", where=where, fix="score it with `inspect score`, and import that log")
    places = [(sample.row, sample.sample) for sample, _ in rows]
    if len(set(places)) != len(places):
        raise DataError("two samples of the log have one id and epoch", where=where, fix=_EXPORT)
    for name in names:
        scores = [_score(sample, values.get(name)) for sample, values in rows]
        yield _Scored(name, tuple(sample for sample, _ in rows), tuple(scores))


def _sample(sample: Mapping[str, Any]) -> Sample:
    output = sample.get("output") or {}
    choices = output.get("choices") or [{}]
    usage = output.get("usage") or {}
    asked = sample.get("input", "")
    prompt = asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False)
    return Sample(
        safe_text(str(sample["id"]), _NAME_CHARS), max(0, _count(sample.get("epoch") or 1) - 1), "imported",
        safe_text(prompt, _TEXT_CHARS), safe_text(str(output.get("completion") or ""), _TEXT_CHARS),
        max(0, _count(usage.get("output_tokens") or 0)), choices[0].get("stop_reason") not in ("max_tokens", "model_length"),
    )  # fmt: skip


def _count(value: Any) -> int:
    """An integer that a ledger holds. Raises TypeError, ValueError or OverflowError."""
    if abs(number := int(value)) >= 2**53:
        raise ValueError(f"{value} is no count")
    return number


def _values(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Value by scorer; a scorer that gives a table has a name for each of its values."""
    values: dict[str, Any] = {}
    for name, score in (sample.get("scores") or {}).items():
        value = score.get("value") if isinstance(score, dict) else None
        if isinstance(value, dict):
            values |= {shown(f"{name}.{part}", _NAME_CHARS): one for part, one in value.items()}
        else:
            values[shown(str(name), _NAME_CHARS)] = value
    return values


def _score(sample: Sample, value: Any) -> Score:
    """The value as a number; None with the reason where it is none."""
    number = _LETTERS.get(value) if isinstance(value, str) else value
    if isinstance(value, str) and number is None:
        try:
            number = float(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or is_number(number):
        return Score(sample.row, sample.sample, "imported", float(number), None, {})
    reason = "not scored" if value is None else f"its score is no number: {shown(str(value), 40)}"
    return Score(sample.row, sample.sample, "imported", None, reason, {})
