"""Reads records and scores of many stages from the ledger in a few queries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastconv.experiment.graph import CellPlan, Graph
from fastconv.stats.series import Series
from fastconv.store.ledger import Stage, Store
from fastconv.store.records import Record

#: Stages whose scores are read in one query: enough to be fast, few enough to bound memory.
STAGES_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class _Scores:
    questions: tuple[str, ...]
    values: NDArray[np.float64]
    #: Question and reason of each sample without a score.
    lost: tuple[tuple[str, str], ...]


class ScoreReader:
    """Records and series of a graph's stages, cached.

    A stage that finishes later is not seen: make a new reader for the next decision.
    """

    def __init__(self, graph: Graph, store: Store) -> None:
        self.graph = graph
        self.store = store
        self._records: dict[str, Record | None] = {}
        self._scores: dict[str, _Scores | None] = {}
        self._series: dict[tuple[str, str, str], Series | None] = {}

    def load(self, plans: Iterable[CellPlan] | None = None) -> ScoreReader:
        """Read all records and scores of these cells (default: all) in a few queries. Returns itself."""
        chosen = self.graph.cells if plans is None else list(plans)
        for stage in self.graph.stages(chosen):
            self._records.setdefault(stage.key, None)
        self._read_records(list(self._records))
        ends = {
            stage.key: None
            for plan in chosen
            for stage in (*plan.scores.values(), *plan.base.values(), *plan.beside.values())
        }
        self._read_scores([key for key in ends if self._records.get(key) is not None])
        return self

    def record(self, stage: Stage) -> Record | None:
        """The record of a finished stage, or None if it is not in the ledger."""
        if stage.key not in self._records:
            self._records[stage.key] = self.store.record(stage.key)
        return self._records[stage.key]

    def series(self, stage: Stage, measure: str, probe: str) -> Series | None:
        """The scores of a stage in the measure's unit, or None if it is not done."""
        cache_key = (stage.key, measure, probe)
        if cache_key not in self._series:
            self._series[cache_key] = self._make(stage, measure, probe)
        return self._series[cache_key]

    def _make(self, stage: Stage, measure: str, probe: str) -> Series | None:
        if self.record(stage) is None:
            return None
        if stage.key not in self._scores:
            self._read_scores([stage.key])
        scores = self._scores[stage.key]
        if scores is None:
            return None
        unit = self.graph.behaviors[measure].spec.unit
        return Series(stage.key, measure, probe, scores.questions, scores.values, unit, scores.lost)

    def _read_records(self, keys: Sequence[str]) -> None:
        query = (
            "SELECT key, kind, slot, version, inputs, outputs, facts, seconds, finished_at FROM stages "
            "WHERE key IN (SELECT value FROM json_each(?))"
        )
        for part in _parts(keys):
            for row in self.store.frame(query, (json.dumps(part),)).iter_rows():
                key, kind, slot, version, inputs, outputs, facts, seconds, finished_at = row
                self._records[key] = Record(
                    key,
                    kind,
                    slot,
                    version,
                    json.loads(inputs),
                    json.loads(outputs),
                    json.loads(facts),
                    seconds,
                    finished_at,
                )

    def _read_scores(self, keys: Sequence[str]) -> None:
        query = (
            "SELECT stage, row, sample, value, reason FROM scores WHERE stage IN (SELECT value FROM json_each(?)) "
            "ORDER BY stage, row, sample"
        )
        for part in _parts(keys):
            self._scores |= dict.fromkeys(part)
            frame = self.store.frame(query, (json.dumps(part),))
            if frame.height == 0:
                continue
            rows, samples = frame["row"].to_list(), frame["sample"].to_numpy()
            values = np.array([np.nan if value is None else value for value in frame["value"].to_list()], dtype=float)
            stages, reasons = frame["stage"].to_list(), frame["reason"].to_list()
            for start, end in _runs(stages):
                self._scores[stages[start]] = _table(
                    rows[start:end], samples[start:end], values[start:end], reasons[start:end]
                )


def _table(
    rows: Sequence[str], samples: NDArray[np.int64], values: NDArray[np.float64], reasons: Sequence[str | None]
) -> _Scores:
    """Scores of one stage, ordered by row, as float64[questions, samples]."""
    starts = [
        0,
        *(index_in_rows for index_in_rows in range(1, len(rows)) if rows[index_in_rows] != rows[index_in_rows - 1]),
    ]
    index = np.zeros(len(rows), dtype=np.int64)
    index[starts[1:]] = 1
    index = np.cumsum(index)
    table = np.full((len(starts), int(samples.max()) + 1), np.nan)
    table[index, samples] = values
    lost = tuple(
        (rows[index_in_rows], reasons[index_in_rows] or "")
        for index_in_rows in np.flatnonzero(np.isnan(values)).tolist()
    )
    return _Scores(tuple(rows[index_in_rows] for index_in_rows in starts), table, lost)


def _runs(names: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Start and end of each run of equal names."""
    start = 0
    for index in range(1, len(names) + 1):
        if index == len(names) or names[index] != names[start]:
            yield start, index
            start = index


def _parts(keys: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), STAGES_AT_ONCE):
        yield list(keys[start : start + STAGES_AT_ONCE])
