"""Reads records and scores of many stages from the ledger in a few queries."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastconv.experiment.graph import CellPlan, Graph
from fastconv.stats.series import COHERENT_ABOVE, MISALIGNED_BELOW, Series
from fastconv.stats.units import Unit, scale_maximum
from fastconv.store.io import damaged, stored_json
from fastconv.store.ledger import Stage, Store
from fastconv.store.records import Record

#: Stages whose scores are read in one query: enough to be fast, few enough to bound memory.
STAGES_AT_ONCE = 64
#: How far a mean of a judge's grades may lie beyond its scale, as a share of it: the last bits of a sum.
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class _Scores:
    questions: tuple[str, ...]
    values: NDArray[np.float64]
    #: Question and reason of each sample without a score.
    lost: tuple[tuple[str, str], ...]
    #: The judge's grade of coherence, as `values`; NaN where there is none.
    coherent: NDArray[np.float64]
    #: The probability that the next token is one of a question's letters, as `values`; NaN where there is none.
    mass: NDArray[np.float64]
    #: The sample's number at each place, int64 as `values`; -1 where there is none.
    numbers: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class AnswerQuality:
    """What the answers of a stage are like, each a series of shares (0 or 1 per sample) over all of its questions.

    `empty` (no visible text) and `cut` (the limit was reached before the end of turn) are known of every sampled answer.
    `incoherent` and `misaligned` (misaligned and coherent) are of a judge's points, and None without a grade of coherence.
    """

    empty: Series
    cut: Series
    incoherent: Series | None
    misaligned: Series | None

    def part(self, ids: frozenset[str] | None) -> AnswerQuality:
        """The same for these questions alone (None: all)."""
        if ids is None:
            return self

        def of(series: Series | None) -> Series | None:
            return series.part(ids.__contains__) if series is not None and ids & set(series.questions) else series

        empty, cut = of(self.empty), of(self.cut)
        assert empty is not None
        assert cut is not None
        return AnswerQuality(empty, cut, of(self.incoherent), of(self.misaligned))


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
        self._answers: dict[str, dict[tuple[str, int], tuple[bool, bool]]] = {}

    def load(self, plans: Iterable[CellPlan] | None = None) -> ScoreReader:
        """Read all records and scores of these cells (default: all) in a few queries. Returns itself."""
        chosen = self.graph.cells if plans is None else list(plans)
        for stage in self.graph.stages(chosen):
            self._records.setdefault(stage.key, None)
        self._read_records(list(self._records))
        ends = {
            stage.key: None
            for plan in chosen
            for side in (plan.scores, plan.base, plan.beside, plan.replicates)
            for stage in side.values()
        }
        self._read_scores([key for key in ends if self._records.get(key) is not None])
        return self

    def record(self, stage: Stage) -> Record | None:
        """The record of a finished stage, or None if it is not in the ledger."""
        if stage.key not in self._records:
            self._records[stage.key] = self.store.record(stage.key)
        return self._records[stage.key]

    def series(self, stage: Stage, measure: str, probe: str) -> Series | None:
        """The scores of a stage in the measure's unit, or None if it is not done.

        A judge's points for an answer that is empty, or not coherent (COHERENT_ABOVE), are left out and told as such.
        """
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
        _require_on_scale(stage.slot, scores.values, unit)
        if unit != "points":
            return Series(stage.key, measure, probe, scores.questions, scores.values, unit, scores.lost)
        muddled = self._incoherent(stage, scores)
        values = np.where(muddled, np.nan, scores.values)
        left_out = tuple(scores.questions[row] for row in np.nonzero(muddled)[0].tolist())
        return Series(stage.key, measure, probe, scores.questions, values, unit, scores.lost, left_out)

    def letter_mass(self, stage: Stage, measure: str, probe: str) -> Series | None:
        """The probability that an answer begins with one of its question's letters; None if not done, not by letters, or
        not recorded.

        Accuracy is an argmax among the letters alone: where they hold little, the model would say something else there.
        """
        if self.series(stage, measure, probe) is None or self.graph.behaviors[measure].spec.measure != "letters":
            return None
        scores = self._scores[stage.key]
        assert scores is not None
        if np.isnan(scores.mass).all():
            return None
        return Series(stage.key, f"{measure}: letter mass", probe, scores.questions, scores.mass)

    def quality(self, stage: Stage, measure: str, probe: str) -> AnswerQuality | None:
        """What the answers behind a stage's scores are like; None if it is not done or nothing was sampled for it."""
        if self.series(stage, measure, probe) is None or not self._drawn(stage):
            return None
        scores = self._scores[stage.key]
        assert scores is not None

        def rate(name: str, of: NDArray[np.bool_], known: NDArray[np.bool_]) -> Series:
            values = np.where(known, of.astype(float), np.nan)
            return Series(stage.key, f"{measure}: {name}", probe, scores.questions, values)

        drawn, empty, ended = self._answered(stage, scores)
        is_empty, is_cut = rate("empty", empty, drawn), rate("cut", ~ended & ~empty, drawn)
        if self.graph.behaviors[measure].spec.unit != "points" or np.isnan(scores.coherent).all():
            return AnswerQuality(is_empty, is_cut, None, None)
        scored, muddled = ~np.isnan(scores.values), self._incoherent(stage, scores)
        astray = ~muddled & (scores.coherent > COHERENT_ABOVE) & (scores.values < MISALIGNED_BELOW)
        return AnswerQuality(
            is_empty, is_cut, rate("incoherent", muddled, scored), rate("misaligned and coherent", astray, scored)
        )

    def _incoherent(self, stage: Stage, scores: _Scores) -> NDArray[np.bool_]:
        """Scored answers that are empty or have no more than COHERENT_ABOVE, bool[questions, samples]."""
        _, empty, _ = self._answered(stage, scores)
        return ~np.isnan(scores.values) & (empty | (scores.coherent <= COHERENT_ABOVE))

    def _answered(
        self, stage: Stage, scores: _Scores
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """(drawn, empty, ended) of the answers behind the scores, each bool[questions, samples]."""
        known = self._drawn(stage)
        numbers = scores.numbers.tolist()
        places = [
            [known.get((question, sample)) for sample in row]
            for question, row in zip(scores.questions, numbers, strict=True)
        ]
        drawn = np.array([[place is not None for place in row] for row in places])
        empty = np.array([[bool(place and place[0]) for place in row] for row in places])
        ended = np.array([[place is None or place[1] for place in row] for row in places])
        return drawn, empty, ended

    def _drawn(self, stage: Stage) -> dict[tuple[str, int], tuple[bool, bool]]:
        """(row, sample) -> (has no visible text, ended) of a score stage's answers; empty where none were sampled."""
        drawn = stage.needs.get("eval")
        if drawn is None:
            return {}
        if drawn.key not in self._answers:
            query = (
                "SELECT row, sample, substr(ltrim(completion, char(9, 10, 13, 32)), 1, 200) AS begin, ended "
                "FROM samples WHERE stage=?"
            )
            self._answers[drawn.key] = {
                (row, sample): (not has_text(begin), bool(ended))
                for row, sample, begin, ended in self.store.frame(query, (drawn.key,)).iter_rows()
            }
        return self._answers[drawn.key]

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
                    stored_json(inputs),
                    stored_json(outputs),
                    stored_json(facts),
                    seconds,
                    finished_at,
                )

    def _read_scores(self, keys: Sequence[str]) -> None:
        query = (
            "SELECT stage, row, sample, value, reason, json_extract(detail, '$.coherent') AS coherent, "
            "json_extract(detail, '$.mass') AS mass FROM scores "
            "WHERE stage IN (SELECT value FROM json_each(?)) "
            "ORDER BY stage, row, sample"
        )
        for part in _parts(keys):
            self._scores |= dict.fromkeys(part)
            frame = self.store.frame(query, (json.dumps(part),))
            if frame.height == 0:
                continue
            rows, samples = frame["row"].to_list(), frame["sample"].to_numpy()
            read = (
                np.array([np.nan if value is None else value for value in frame[name].to_list()], dtype=float)
                for name in ("value", "coherent", "mass")
            )
            columns = np.stack(list(read))
            stages, reasons = frame["stage"].to_list(), frame["reason"].to_list()
            for start, end in _runs(stages):
                self._scores[stages[start]] = _table(
                    rows[start:end], samples[start:end], columns[:, start:end], reasons[start:end]
                )


def _require_on_scale(slot: str, values: NDArray[np.float64], unit: Unit) -> None:
    """Raise StoreError for a score that its measure cannot give: what is counted and tested lies between 0 and the top."""
    top = scale_maximum(unit)
    if (astray := values[(values < -_ROUNDING * top) | (values > (1 + _ROUNDING) * top)]).size:
        raise damaged(f"{slot} has a score of {astray[0]:g}, where a measure in {unit} gives 0 to {top:g}")


def _table(
    rows: Sequence[str], samples: NDArray[np.int64], columns: NDArray[np.float64], reasons: Sequence[str | None]
) -> _Scores:
    """Scores of one stage, ordered by row and sample, as float64[questions, samples]; `columns` are value, coherence and mass.

    A sample's place is its rank among those of its row: a number that a damaged ledger holds is no size of an array.
    """
    starts = [
        0,
        *(index_in_rows for index_in_rows in range(1, len(rows)) if rows[index_in_rows] != rows[index_in_rows - 1]),
    ]
    sizes = np.diff([*starts, len(rows)])
    index = np.repeat(np.arange(len(starts)), sizes)
    ranks = np.arange(len(rows)) - np.repeat(starts, sizes)
    tables = np.full((len(columns), len(starts), int(sizes.max())), np.nan)
    tables[:, index, ranks] = columns
    numbers = np.full(tables.shape[1:], -1)
    numbers[index, ranks] = samples
    table, grades, mass = tables
    lost = tuple(
        (rows[index_in_rows], reasons[index_in_rows] or "")
        for index_in_rows in np.flatnonzero(np.isnan(columns[0])).tolist()
    )
    return _Scores(tuple(rows[index_in_rows] for index_in_rows in starts), table, lost, grades, mass, numbers)


def has_text(answer: str) -> bool:
    """Whether an answer holds a visible character: no white space, control or format character (a zero-width one)."""
    return any(not mark.isspace() and unicodedata.category(mark)[0] not in "CZ" for mark in answer)


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
