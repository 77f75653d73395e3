"""`compare`: two runs side by side, cell by cell, with paired differences over the questions that both asked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.contrasts import Part
from fastconv.experiment.graph import Cell, CellPlan
from fastconv.report.measures import ROLES
from fastconv.stats.inference import benjamini_hochberg, paired_change
from fastconv.stats.series import Series, means_at
from fastconv.stats.units import Unit
from fastconv.store.records import changed_inputs

#: What of a run's facts is compared. The command is no condition, and the self-tests' figure is another in every process.
FACTS = ("python", "versions", "engine", "machine", "git", "template")
_LEFT_OUT = ("engine self_tests",)
_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def changed_conditions(first: Analysis, second: Analysis) -> tuple[str, ...]:
    """What differs, as `name: first -> second`; that a run noted nothing is one line of its own."""
    silent = [one for one in (first, second) if not one.facts]
    if silent:
        runs = " and ".join(dict.fromkeys(one.run for one in silent))
        return (f"versions, engine and machine: not recorded for {runs}, which never began in its workspace",)
    ours, theirs = _conditions(first), _conditions(second)
    return tuple(
        f"{name}: {ours.get(name, 'none')} -> {theirs.get(name, 'none')}"
        for name in dict.fromkeys((*ours, *theirs))
        if ours.get(name) != theirs.get(name)
    )


def _conditions(decided: Analysis) -> dict[str, str]:
    """Every condition of a run by name."""
    found = {}
    for name in FACTS:
        noted = decided.facts.get(name)
        table = noted if isinstance(noted, Mapping) else {"": noted} if noted is not None else {}
        found |= {f"{name} {part}".rstrip(): _shown(value) for part, value in table.items()}
    return {**{name: value for name, value in found.items() if name not in _LEFT_OUT}, **dict(_stage_versions(decided))}


def _stage_versions(decided: Analysis) -> Iterator[tuple[str, str]]:
    """The versions of the stages that the run rests on, kind by kind, as they were when they were computed."""
    versions: dict[str, set[int]] = {}
    for key in decided.reused:
        record = decided.store.record(key)
        if record is not None:
            versions.setdefault(record.kind, set()).add(record.version)
    for kind, seen in sorted(versions.items()):
        yield f"stage version of {kind}", ", ".join(map(str, sorted(seen)))


def _shown(value: Any) -> str:
    text = str(value)
    return text[:12] if _SHA.fullmatch(text) else text


#: What names a cell; a field on which each run has one value of its own is what the comparison is about.
FIELDS = ("source", "convergence", "epoch", "behavior", "negatives", "seed")


@dataclass(frozen=True)
class Paired:
    """One measure of one cell in both runs: second minus first, over common questions. Effects in the measure's unit."""

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
    """Two runs: what their recipes differ in and the conditions they were made under, what their cells were matched
    without, and the paired differences."""

    first: str
    second: str
    changes: tuple[str, ...]
    conditions: tuple[str, ...]
    apart: tuple[str, ...]
    pairs: tuple[Paired, ...]
    n_unmatched: int

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def compare(first: Analysis, second: Analysis) -> RunComparison:
    """Match the cells of two runs and compare every measure that both have."""
    apart = tuple(_apart(first, second))
    ours, theirs = _by_place(first, apart), _by_place(second, apart)
    raw = [pair for place in ours if place in theirs for pair in _pairs(first, second, ours[place], theirs[place])]
    ps = [np.nan if one.p_raw is None else one.p_raw for one in raw]
    corrected = benjamini_hochberg(ps).tolist() if ps else []
    pairs = tuple(
        Paired(**{**asdict(one), "p_corrected": None if np.isnan(p) else p})
        for one, p in zip(raw, corrected, strict=True)
    )
    changes = changed_inputs(first.graph.recipe.model_dump(mode="json"), second.graph.recipe.model_dump(mode="json"))
    conditions, n_unmatched = changed_conditions(first, second), len(set(ours) ^ set(theirs))
    return RunComparison(first.run, second.run, tuple(changes), conditions, apart, pairs, n_unmatched)


def _apart(first: Analysis, second: Analysis) -> Iterator[str]:
    """Fields that each run holds fixed at a value of its own (a seed, a kind of negatives)."""
    for name in FIELDS:
        ours, theirs = ({getattr(plan.cell, name) for plan in one.graph.cells} - {"none"} for one in (first, second))
        if len(ours) == len(theirs) == 1 and ours != theirs:
            yield name


def _by_place(decided: Analysis, apart: tuple[str, ...]) -> dict[tuple[Any, ...], CellPlan]:
    return {
        tuple(
            "" if name in apart and getattr(plan.cell, name) != "none" else getattr(plan.cell, name) for name in FIELDS
        ): plan
        for plan in decided.graph.cells
    }


def _pairs(first: Analysis, second: Analysis, one: CellPlan, two: CellPlan) -> Iterator[Paired]:
    for measure in one.measures:
        if measure not in two.measures:
            continue
        for part in first.found.parts(measure):
            for role in ROLES:
                ours = first.found.now(one, part, first.found.persona(one.cell, role))
                theirs = second.found.now(two, part, second.found.persona(two.cell, role))
                if ours is not None and theirs is not None and ours.rows and theirs.rows:
                    yield _pair(_label(one.cell, two.cell), part, role, ours, theirs)


def _label(one: Cell, two: Cell) -> str:
    return one.label if one.label == two.label else f"{one.label} | {two.label}"


def _pair(label: str, part: Part, role: str, ours: Series, theirs: Series) -> Paired:
    common = sorted(set(ours.questions) & set(theirs.questions))
    interval = paired_change(means_at(theirs, common), means_at(ours, common)).interval if len(common) > 1 else None
    found = (None, None, None, None, 0)
    if interval is not None:
        found = (interval.estimate, interval.low, interval.high, interval.p_two_sided, interval.n_clusters)
    return Paired(
        label, part.title, role, ours.unit, ours.mean.value, theirs.mean.value, *found[:4], None, found[4],
        ours.stage == theirs.stage,
    )  # fmt: skip
