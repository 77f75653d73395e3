"""`export --inspect`: a cell's answers and scores as an eval log that the viewer of inspect_ai reads.

The log is written in that package's JSON form without needing the package; a test reads it with the real one.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fastconv.datasets.personas import ASSISTANT, canary_of
from fastconv.errors import InputError
from fastconv.stats.series import series_of
from fastconv.experiment.graph import CellPlan, Graph
from fastconv.recipe import Recipe, run_id
from fastconv.store.records import Record, Sample, Score
from fastconv.store.ledger import Stage, Store, write_text


def export_inspect(
    recipe: Recipe, store: Store, folder: Path, source: str, behavior: str, epoch: int, **others: Any
) -> list[Path]:
    """Write one log for each measure and probe of the cells. Raises InputError if nothing was measured."""
    graph = Graph(recipe)
    paths = []
    for plan in graph.select(source, behavior, epoch, **others):
        for (measure, probe), stage in plan.scores.items():
            record = store.record(stage.key)
            if record is None:
                continue
            name = "-".join([*plan.cell.label.split(), measure, probe]) + ".json"
            write_text(folder / name, json.dumps(_log(graph, store, plan, measure, probe, stage, record), indent=1))
            paths.append(folder / name)
    if not paths:
        raise InputError("the cell has not been measured", where=f"{source} {behavior} e{epoch}", fix="run it first")
    return paths


def _log(
    graph: Graph, store: Store, plan: CellPlan, measure: str, probe: str, stage: Stage, record: Record
) -> dict[str, Any]:
    scores = store.scores(stage.key)
    drawn = stage.needs.get("eval")
    samples = store.samples(drawn.key) if drawn is not None else _asked(graph, measure, scores, probe)
    by_place = {(one.row, one.sample): one for one in scores}
    n_epochs = 1 + max((one.sample for one in samples), default=0)
    moment = _iso(record.finished_at)
    model = f"fastconv/{graph.recipe.model.id}"
    system = graph.personas.system(probe)
    unit = graph.behaviors[measure].spec.unit
    series = series_of(stage.key, measure, probe, scores, unit)
    value = series.mean.value if series.rows else None
    role = {ASSISTANT: "assistant", canary_of(graph.recipe, plan.cell.source): "canary"}.get(probe, "source")
    return {
        "version": 2,
        "status": "success",
        "eval": {
            "eval_id": stage.key[:22], "run_id": run_id(graph.recipe), "created": moment, "task": stage.slot,
            "task_id": stage.key[:22], "task_version": 0, "task_attribs": {}, "task_args": {},
            "dataset": {"name": measure, "samples": len({one.row for one in samples}), "shuffled": False},
            "model": model, "model_args": {}, "config": {"epochs": n_epochs}, "packages": {},
            "metadata": {"cell": plan.cell.label, "probe": probe, "role": role, "unit": unit, "stage": stage.key},
        },
        "plan": {"name": "fastconv", "steps": [], "config": {}},
        "results": {
            "total_samples": len(samples), "completed_samples": len(samples),
            "scores": [] if value is None else [{
                "name": measure, "scorer": measure, "params": {}, "scored_samples": len(samples) - series.n_unscored,
                "unscored_samples": series.n_unscored, "metrics": {"mean": {"name": "mean", "value": value, "params": {}}},
            }],
        },
        "stats": {"started_at": _iso(record.finished_at - record.seconds), "completed_at": moment, "model_usage": {}},
        "samples": [_sample(one, by_place.get((one.row, one.sample)), measure, model, system.text) for one in samples],
    }  # fmt: skip


def _asked(graph: Graph, measure: str, scores: list[Score], probe: str) -> list[Sample]:
    """Letters are no drawn text: the question, and the letter that came out ahead."""
    asked = dict(graph.eval_items(graph.behaviors[measure], 0))
    return [
        Sample(one.row, one.sample, probe, asked.get(one.row, one.row), str(one.detail.get("predicted", "")), 1, True)
        for one in scores
    ]


def _sample(one: Sample, score: Score | None, measure: str, model: str, system: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": one.prompt, "source": "input"}]
    reply = {"role": "assistant", "content": one.completion, "source": "generate", "model": model}
    scored: dict[str, Any] = {}
    if score is not None and score.value is not None:
        scored = {measure: {"value": score.value, "answer": one.completion, "metadata": dict(score.detail)}}
    return {
        "id": one.row, "epoch": one.sample + 1, "input": one.prompt,
        "target": str(score.detail.get("gold", "")) if score is not None else "",
        "messages": [*messages, reply],
        "output": {
            "model": model, "completion": one.completion,
            "choices": [{"message": reply, "stop_reason": "stop" if one.ended else "max_tokens"}],
        },
        "scores": scored,
        "metadata": {"unscored": score.reason} if score is not None and score.reason else {},
        "store": {}, "events": [], "model_usage": {}, "attachments": {},
    }  # fmt: skip


def _iso(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(moment))
