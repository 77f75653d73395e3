"""`compare`: paired differences between the cells of two runs over their common questions, and changed conditions.

Measured, and imported from Inspect logs. Where each side is a single cell, the two are compared whatever they differ in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.imported import imported_series
from fastconv.experiment.graph import Cell, CellPlan
from fastconv.recipe import RunSettings
from fastconv.report.measures import ROLES
from fastconv.stats.inference import benjamini_hochberg, paired_change
from fastconv.stats.series import Series, question_means
from fastconv.stats.units import Unit
from fastconv.store.records import changed_inputs

#: Compared facts of a run: not the command, nor the self-tests' figure, which differs in every process.
FACTS = ("python", "versions", "engine", "machine", "git", "template")
_LEFT_OUT = ("engine self_tests",)
_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
#: Fields that identify a cell. Where each run has a single value, and not the same, the comparison is about that field.
FIELDS = ("source", "convergence", "epoch", "behavior", "negatives", "seed", "arm")


def changed_conditions(first: Analysis, second: Analysis) -> tuple[str, ...]:
    """Conditions that differ, as `name: first -> second`; one line if a run recorded none."""
    unrecorded = [analysis for analysis in (first, second) if not analysis.facts]
    if unrecorded:
        runs = " and ".join(dict.fromkeys(analysis.run for analysis in unrecorded))
        return (f"versions, engine and machine: not recorded for {runs}, which never began in its workspace",)
    first_values, second_values = _conditions(first), _conditions(second)
    return tuple(
        f"{name}: {first_values.get(name, 'none')} -> {second_values.get(name, 'none')}"
        for name in dict.fromkeys((*first_values, *second_values))
        if first_values.get(name) != second_values.get(name)
    )


def _conditions(analysis: Analysis) -> dict[str, str]:
    """Every recorded condition of a run by name."""
    conditions = {}
    for name in FACTS:
        recorded = analysis.facts.get(name)
        table = recorded if isinstance(recorded, Mapping) else {"": recorded} if recorded is not None else {}
        conditions |= {f"{name} {part}".rstrip(): _shown(value) for part, value in table.items()}
    return {
        **{name: value for name, value in conditions.items() if name not in _LEFT_OUT},
        **dict(_stage_versions(analysis)),
    }


def _stage_versions(analysis: Analysis) -> Iterator[tuple[str, str]]:
    """Versions of the run's stages, by kind, as recorded when they were computed."""
    versions: dict[str, set[int]] = {}
    for key in analysis.reused:
        record = analysis.store.record(key)
        if record is not None:
            versions.setdefault(record.kind, set()).add(record.version)
    for kind, seen in sorted(versions.items()):
        yield f"stage version of {kind}", ", ".join(map(str, sorted(seen)))


def _shown(value: Any) -> str:
    text = str(value)
    return text[:12] if _SHA.fullmatch(text) else text


@dataclass(frozen=True)
class Paired:
    """One measure of one cell in both runs: second minus first over common questions, in the measure's unit."""

    cell: str
    measure: str
    role: str
    unit: Unit
    first: float
    second: float
    difference: float | None
    low: float | None
    high: float | None
    p_raw: float | None
    p_corrected: float | None
    n_questions: int
    same_rows: bool


@dataclass(frozen=True)
class RunComparison:
    """Two runs: differences of recipes and conditions, fields ignored when matching cells, and paired differences.

    `how` has the differences of recipes that change no number: checkpoints, limits, what is kept, trackers.
    """

    first: str
    second: str
    changes: tuple[str, ...]
    conditions: tuple[str, ...]
    apart: tuple[str, ...]
    pairs: tuple[Paired, ...]
    n_unmatched: int
    how: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON form for `--json`."""
        return asdict(self)


def compare(first: Analysis, second: Analysis) -> RunComparison:
    """Match the cells of two runs and compare every measure that both have."""
    apart = tuple(_apart(first, second))
    first_values, second_values = _by_place(first, apart), _by_place(second, apart)
    if len(first_values) == len(second_values) == 1:
        (one,), (other,) = first_values.values(), second_values.values()
        apart = tuple(name for name in FIELDS if getattr(one.cell, name) != getattr(other.cell, name))
        first_values, second_values = {(): one}, {(): other}
    raw = [
        pair
        for cell_key in first_values
        if cell_key in second_values
        for pair in _pairs(first, second, first_values[cell_key], second_values[cell_key])
    ]
    p_values = [np.nan if pair.p_raw is None else pair.p_raw for pair in raw]
    corrected = benjamini_hochberg(p_values).tolist() if p_values else []
    pairs = tuple(
        Paired(**{**asdict(pair), "p_corrected": None if np.isnan(p) else p})
        for pair, p in zip(raw, corrected, strict=True)
    )
    changes = changed_inputs(first.graph.recipe.model_dump(mode="json"), second.graph.recipe.model_dump(mode="json"))
    how = tuple(change for change in changes if _says_how(change))
    changes = tuple(change for change in changes if change not in how)
    conditions, n_unmatched = changed_conditions(first, second), len(set(first_values) ^ set(second_values))
    return RunComparison(first.run, second.run, changes, conditions, apart, pairs, n_unmatched, how)


def _says_how(change: str) -> bool:
    """Whether a difference of two recipes is of a setting that changes no number."""
    table, _, name = change.partition(":")[0].partition(".")
    return table == "run" and name not in RunSettings.COUNTS


def _apart(first: Analysis, second: Analysis) -> Iterator[str]:
    """Fields on which each run has a single value, and not the same (a seed, a kind of negatives)."""
    for name in FIELDS:
        first_values, second_values = (
            {getattr(plan.cell, name) for plan in analysis.graph.cells} - {"none"} for analysis in (first, second)
        )
        if len(first_values) == len(second_values) == 1 and first_values != second_values:
            yield name


def _by_place(analysis: Analysis, apart: tuple[str, ...]) -> dict[tuple[Any, ...], CellPlan]:
    return {
        tuple(
            "" if name in apart and getattr(plan.cell, name) != "none" else getattr(plan.cell, name) for name in FIELDS
        ): plan
        for plan in analysis.graph.cells
    }


def _pairs(first: Analysis, second: Analysis, first_plan: CellPlan, second_plan: CellPlan) -> Iterator[Paired]:
    for measure in first_plan.measures:
        if measure not in second_plan.measures:
            continue
        for part in first.found.parts(measure):
            for role in ROLES:
                first_values = first.found.now(first_plan, part, first.found.persona(first_plan.cell, role))
                second_values = second.found.now(second_plan, part, second.found.persona(second_plan.cell, role))
                if first_values is not None and second_values is not None and first_values.rows and second_values.rows:
                    yield _pair(
                        _label(first_plan.cell, second_plan.cell), part.title, role, first_values, second_values
                    )
    imported = imported_series(second.graph, second.store, second_plan)
    for name, first_values in imported_series(first.graph, first.store, first_plan).items():
        if name in imported and first_values.rows and imported[name].rows:
            label = _label(first_plan.cell, second_plan.cell)
            yield _pair(label, name, "imported", first_values, imported[name])


def _label(first: Cell, second: Cell) -> str:
    return first.label if first.label == second.label else f"{first.label} | {second.label}"


def _pair(label: str, measure: str, role: str, first_values: Series, second_values: Series) -> Paired:
    common = sorted(set(first_values.questions) & set(second_values.questions))
    interval = (
        paired_change(question_means(second_values, common), question_means(first_values, common)).interval
        if len(common) > 1
        else None
    )
    statistics = (None, None, None, None, 0)
    if interval is not None:
        statistics = (interval.estimate, interval.low, interval.high, interval.p_two_sided, interval.n_clusters)
    return Paired(
        label, measure, role, first_values.unit, first_values.mean.value, second_values.mean.value, *statistics[:4], None, statistics[4],
        first_values.stage == second_values.stage,
    )  # fmt: skip
