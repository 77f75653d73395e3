"""Stages that failed: written down with their reason, whatever needs them left out, and everything else goes on.

Only what concerns one stage is kept this way: numbers that cannot be used (TrainingError) and a training set that the
audit refuses (DataError). A base, workspace, gate, judge or user that says no still ends the run at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastconv.errors import DataError, FastconvError, TrainingError
from fastconv.stats.units import counted
from fastconv.experiment.graph import CellPlan, walk
from fastconv.store.records import Failure, Stage
from fastconv.store.ledger import Store

#: So many cells are named in the line that ends a run.
NAMED_CELLS = 6


@dataclass(frozen=True)
class FailedStage:
    """A stage that failed and the cells that have no numbers, or fewer, because of it."""

    slot: str
    reason: str
    exit_code: int
    cells: tuple[str, ...]


class Failing:
    """The stages of one run that failed, and what cannot be computed because of them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._keys: set[str] = set()
        self._blocked: set[str] = set()

    def note(self, stage: Stage, error: TrainingError | DataError) -> None:
        """Write a failure down. A later run tries the stage again."""
        self._keys.add(stage.key)
        self._store.note_failure(stage, error.exit_code, str(error))

    def blocks(self, stage: Stage) -> bool:
        """Whether this stage failed, or something before it did, so that it cannot be computed."""
        if any(need.key in self._keys or need.key in self._blocked for need in stage.needs.values()):
            self._blocked.add(stage.key)
        return stage.key in self._keys or stage.key in self._blocked

    def touches(self, plan: CellPlan) -> bool:
        """Whether a failure takes anything from this cell."""
        return bool(self._keys) and any(part.key in self._keys for part in parts_of(plan))

    def of(self, plans: Sequence[CellPlan]) -> tuple[FailedStage, ...]:
        """What failed in this run, with the cells it is missing in."""
        return failed_stages({k: v for k, v in self._store.failures().items() if k in self._keys}, plans)


def parts_of(plan: CellPlan) -> list[Stage]:
    """Every stage that a cell's measures rest on; a stage may come more than once."""
    ends = (*plan.base.values(), *plan.scores.values(), *plan.beside.values())
    return [part for end in ends for part in walk(end)]


def failed_stages(failures: Mapping[str, Failure], plans: Sequence[CellPlan]) -> tuple[FailedStage, ...]:
    """Those of the failures (by key) that concern these cells, each with the cells' labels."""
    cells: dict[str, list[str]] = {}
    for plan in plans:
        parts = [*parts_of(plan), *([plan.geometry] if plan.geometry is not None else [])]
        for key in {part.key for part in parts} & failures.keys():
            cells.setdefault(key, []).append(plan.cell.label)
    return tuple(
        FailedStage(one.slot, one.reason, one.exit_code, tuple(cells[key]))
        for key, one in failures.items()
        if key in cells
    )


def raise_failed(run: str, failed: Sequence[FailedStage]) -> None:
    """Raise one error for all of these stages, naming the cells; its exit code is the worst of theirs."""
    if not failed:
        return
    kind: type[FastconvError] = max((DataError, TrainingError), key=lambda k: _has(failed, k.exit_code) * k.exit_code)
    cells = list(dict.fromkeys(label for one in failed for label in one.cells))
    more = f" and {len(cells) - NAMED_CELLS} more" if len(cells) > NAMED_CELLS else ""
    raise kind(
        f"{counted(len(failed), 'stage')} failed, the rest is done; without numbers: {', '.join(cells[:NAMED_CELLS])}{more}. "
        f"First reason: {failed[0].reason.rstrip('.')}",
        where=run,
        fix="mend the cause; the same command tries them again and nothing else",
    )


def _has(failed: Sequence[FailedStage], exit_code: int) -> bool:
    return any(one.exit_code == exit_code for one in failed)
