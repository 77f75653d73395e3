"""The report's tables as polars frames, for Parquet files beside it."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl

from fastconv.analysis.analysis import Decided
from fastconv.report.geometry import geometry_rows
from fastconv.report.measures import ROLES


def frames_of(decided: Decided) -> dict[str, pl.DataFrame]:
    """`contrasts`, `secondary`, `gates`, `measurements`, `geometry`, `scores` and `stages`; empty ones are left out."""
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
        "geometry": _frame(geometry_rows(decided)),
        "scores": _scores(decided),
        "stages": _frame(_stages(decided)),
    }  # fmt: skip
    return {name: frame for name, frame in tables.items() if frame.height}


def parquet_bytes(frame: pl.DataFrame) -> bytes:
    """The frame as one Parquet file."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, infer_schema_length=None)


def _measurements(decided: Decided) -> list[dict[str, Any]]:
    rows = []
    for plan in decided.graph.cells:
        for measure in plan.measures:
            for part in decided.found.parts(measure):
                for role in ROLES:
                    persona = decided.found.persona(plan.cell, role)
                    one = decided.found.now(plan, part, persona)
                    if one is not None and one.rows:
                        counts = {
                            "n_questions": len(one.rows),
                            "n_samples": one.n_samples,
                            "n_unscored": one.n_unscored,
                        }
                        about = {
                            "measure": measure,
                            "part": part.name,
                            "probe": persona,
                            "role": role,
                            "unit": one.unit,
                        }
                        rows.append(
                            {**asdict(plan.cell), **about, "value": one.mean.value, **counts, "stage": one.stage}
                        )
    return rows


def _scores(decided: Decided) -> pl.DataFrame:
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


def _stages(decided: Decided) -> list[dict[str, Any]]:
    rows = []
    for stage in decided.graph.stages():
        record = decided.reading.record(stage)
        if record is not None:
            tokens = {name: record.facts.get(name) for name in ("trained_tok", "sampled_tok", "scored_tok")}
            rows.append({"slot": stage.slot, "kind": stage.kind, "key": stage.key, "seconds": record.seconds, **tokens})
    return rows
