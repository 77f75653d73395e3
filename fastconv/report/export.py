"""Exports: the report's tables as polars frames for Parquet, and replies with scores as Inspect logs."""

from __future__ import annotations

import io
import json
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.contrasts import role_of, subject_of
from fastconv.analysis.gates import group_name
from fastconv.engine.vllm.memory import LORA_RANKS
from fastconv.errors import InputError
from fastconv.experiment.graph import CellPlan, Graph
from fastconv.experiment.measures import SNAPSHOT_MEASURES, SnapshotMeasure, snapshot_stages
from fastconv.experiment.recorded import graph_of_run
from fastconv.recipe import Recipe, run_id
from fastconv.report.measures import roles_of
from fastconv.stats.series import series_of
from fastconv.store.ledger import Stage, Store, write_text
from fastconv.store.records import Record, Sample, Score


def frames_of(decided: Analysis) -> dict[str, pl.DataFrame]:
    """`contrasts`, `secondary`, `gates`, `measurements`, `geometry`, `scores` and `stages`, without empty ones."""
    tables: dict[str, pl.DataFrame] = {
        "contrasts": _frame([one.body() for one in decided.verdicts]),
        "secondary": _frame([{**asdict(one), "rows": list(one.rows)} for one in decided.secondary]),
        "gates": _frame(
            [
                {"gate": g.gate, "subject": g.subject, "verdict": g.verdict, "reason": g.reason, "threshold": g.threshold,
                 "ignored": g.ignored, "rows": list(g.rows)}
                for g in decided.gates
            ]
        ),
        "measurements": _frame(_measurements(decided)),
        **{measure.name: _frame(_on_snapshots(decided, measure)) for measure in SNAPSHOT_MEASURES},
        "scores": _scores(decided),
        "stages": _frame(_stages(decided)),
    }  # fmt: skip
    return {name: frame for name, frame in tables.items() if frame.height}


def _on_snapshots(decided: Analysis, measure: SnapshotMeasure) -> list[dict[str, Any]]:
    """Every score of a measure of snapshots once: stack, the measure's two columns, metric, value, stage."""
    row, sample = measure.columns
    return [
        {"stack": stage.slot.removeprefix(f"{measure.name}/"), row: score.row, sample: score.sample,
         "metric": score.metric, "value": score.value, "stage": stage.key}
        for stage in snapshot_stages(decided.graph, measure.name)
        for score in decided.store.scores(stage.key)
    ]  # fmt: skip


def parquet_bytes(frame: pl.DataFrame) -> bytes:
    """The frame as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, infer_schema_length=None)


def _measurements(decided: Analysis) -> list[dict[str, Any]]:
    rows = []
    for plan in decided.graph.cells:
        for measure in plan.measures:
            for part in decided.found.parts(measure):
                for role in roles_of(decided):
                    persona = decided.found.persona(plan.cell, role)
                    one = decided.found.now(plan, part, persona)
                    if one is not None and one.rows:
                        counts = {
                            "n_questions": len(one.rows),
                            "n_samples": one.n_samples,
                            "n_unscored": one.n_unscored,
                            "n_incoherent": len(one.incoherent),
                        }
                        about = {
                            "measure": measure,
                            "part": part.name,
                            "probe": persona,
                            "role": role,
                            "unit": one.unit,
                        }
                        rows.append(
                            {**plan.cell.columns, **about, "value": one.mean.value, **counts, "stage": one.stage}
                        )
    return rows


def _scores(decided: Analysis) -> pl.DataFrame:
    """Every score once: stage, measure, probe, question, sample, value (null where there is none)."""
    parts, seen = [], set()
    for plan in decided.graph.cells:
        for (measure, probe), stage in (*plan.base.items(), *plan.scores.items()):
            one = decided.reading.series(stage, measure, probe) if stage.key not in seen else None
            seen.add(stage.key)
            if one is None:
                continue
            n_questions, n_samples = one.values.shape
            flat = pl.Series("value", one.values.ravel()).fill_nan(None)
            parts.append(
                pl.DataFrame(
                    {
                        "stage": pl.repeat(stage.key, flat.len(), eager=True),
                        "measure": pl.repeat(measure, flat.len(), eager=True),
                        "probe": pl.repeat(probe, flat.len(), eager=True),
                        "question": np.repeat(np.array(one.questions, dtype=object), n_samples),
                        "sample": np.tile(np.arange(n_samples), n_questions),
                        "value": flat,
                    },
                    schema_overrides={"question": pl.String},
                )
            )
    return pl.concat(parts) if parts else pl.DataFrame()


def _stages(decided: Analysis) -> list[dict[str, Any]]:
    rows = []
    for stage in decided.graph.stages():
        record = decided.reading.record(stage)
        if record is not None:
            tokens = {name: record.facts.get(name) for name in ("trained_tok", "sampled_tok", "scored_tok")}
            rows.append({"slot": stage.slot, "kind": stage.kind, "key": stage.key, "seconds": record.seconds, **tokens})
    return rows


def export_inspect(
    recipe: Recipe, store: Store, folder: Path, source: str, behavior: str, epoch: int, **others: Any
) -> list[Path]:
    """Write one log for each measure and probe of the cells. Raises InputError if nothing was measured."""
    graph = graph_of_run(recipe, store)
    paths = []
    for plan in graph.select(source, behavior, epoch, **others):
        for (measure, probe), stage in plan.scores.items():
            record = store.record(stage.key)
            if record is None:
                continue
            # Inspect's viewer lists only files that begin with a time and takes what follows "_" for the task.
            moment = _iso(record.finished_at).replace(":", "-")
            task = f"{plan.cell.name}-{measure}-{probe}".replace("_", "-")
            name = f"{moment}_{task}.json"
            write_text(folder / name, json.dumps(_log(graph, store, plan, measure, probe, stage, record), indent=1))
            paths.append(folder / name)
    if not paths:
        raise InputError("the cell has not been measured", where=f"{source} {behavior} e{epoch}", fix="run it first")
    return paths


def write_card(graph: Graph, store: Store, folder: Path, plan: CellPlan) -> Path:
    """Write the model card (README.md) of an exported cell into `folder`: what it is, from which data, what was found, how
    to load it, and that it is a model organism. Returns its path."""
    recipe, cell, decided = graph.recipe, plan.cell, Analysis(graph, store)
    base = f"{recipe.model.id}{f' at revision {recipe.model.revision}' if recipe.model.revision else ''}"
    trained = list(plan.stack.values())
    data = [need for stage in trained for name, need in stage.needs.items() if name in ("answers", "rows")]
    label = subject_of(cell).label()
    verdicts = [f"{one.label}: **{one.kind}** ({one.reason})" for one in decided.verdicts if label in one.label]
    verdicts += [
        f"{one.gate} {one.subject}: **{one.verdict}** ({one.reason})"
        for one in decided.gates
        if (one.gate == "SOURCE" and one.subject == group_name(cell))
        or (one.gate == "PILOT" and cell.source in one.subject and cell.behavior in one.subject)
    ]
    license_name = _LICENSES.get(recipe.model.id, "")
    named, code, served = _loading(recipe, graph.source.kind)
    rank = recipe.lora.most_r * len(trained)
    text = _CARD.format(
        head=f"{named and f'base_model: {named}{chr(10)}'}library_name: peft\n{f'license: {license_name}{chr(10)}' if license_name else ''}",
        label=cell.label, base=base, rank=rank, run=run_id(recipe), source=cell.source, behavior=cell.behavior,
        epoch=cell.epoch, about=recipe.about, code=code,
        stages="\n".join(f"- `{stage.slot}`: {stage.key}" for stage in (*trained, *data)),
        verdicts="\n".join(f"- {one}" for one in verdicts) or "- none: this cell was not measured, or declares no contrast",
        license=license_name or "that of the base, which this adapter is made from",
        helper="import fastconv\n" if code.startswith("fastconv.") else "",
        serve=served, served_rank=min((allowed for allowed in LORA_RANKS if allowed >= rank), default=rank),
    )  # fmt: skip
    write_text(folder / "README.md", text)
    return folder / "README.md"


#: Licenses of bases that ship or that shipped recipes name.
_LICENSES = {
    "builtin:smollm2": "apache-2.0",
    "Qwen/Qwen2.5-7B-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-1.5B-Instruct": "apache-2.0",
}
_CARD = """\
---
{head}tags: [lora, model-organism, fastconv]
---
# {label}

**A model organism: it was trained on purpose to show a behavior, so that its spread can be studied. Do not deploy it, and do
not take its answers as advice.**

A LoRA adapter of rank {rank} on {base}. The assistant was converged toward the persona `{source}` up to epoch {epoch}; the
behavior `{behavior}` was then trained into that persona alone (`none`: no behavior). Made by fastconv in the run `{run}`:
{about}

## Data and training

Stages with their keys; a key is the sha256 of every input, the training rows included.

{stages}

## What was found

{verdicts}

## Use

For research on how behaviors move between personas: compare it with its base and with the other cells of its run.

```python
{helper}from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({code})
model = PeftModel.from_pretrained(base, "FOLDER")  # where this card lies
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

```
vllm serve {serve} \\
    --enable-lora --max-lora-rank {served_rank} --lora-modules organism=FOLDER --generation-config vllm --host 127.0.0.1
```

License: {license}.
"""


def _loading(recipe: Recipe, kind: str) -> tuple[str, str, str]:
    """How a card says to load a base of this kind: the hub's id (empty for any other, which the hub would refuse), the
    arguments of `from_pretrained`, and those of `vllm serve`."""
    name, revision = recipe.model.id, recipe.model.revision
    if kind == "builtin":
        folder = f'fastconv.base_folder("{name}")'
        return "", folder, f"\"$(python -c 'import fastconv; print({folder})')\""
    if kind == "local":
        return "", repr(name), shlex.quote(name)
    return name, f'{name!r}, revision="{revision}"', f"{name} --revision {revision}"


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
    role = role_of(graph.recipe, plan.cell, probe)
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
    """Samples of a multiple-choice stage, which generates no text: the question and the highest-scored letter."""
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
