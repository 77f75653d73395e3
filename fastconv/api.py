"""fastconv from a notebook: the same few functions as the command line, with polars frames as answers."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from fastconv.analysis.gates import decide_gates, stage_series
from fastconv.datasets.personas import ASSISTANT, canary_of
from fastconv.errors import InputError
from fastconv.experiment.graph import CellPlan, Graph
from fastconv.recipe import Recipe, parse_recipe, run_id
from fastconv.run.run import run_recipe as _run_recipe
from fastconv.run.status import status_of
from fastconv.show.progress import watching
from fastconv.store.ledger import Store

if TYPE_CHECKING:
    from fastconv.engine.model import Base

WORKSPACE = Path("checkpoints")


def run_recipe(recipe: Recipe, *, workspace: Path | str = WORKSPACE, quiet: bool = False) -> Run:
    """Run a recipe to its verdict, or go on with it, and open it. Raises FastconvError as the command line does."""
    with watching(quiet=quiet, stream=sys.stderr) as watcher:
        _run_recipe(recipe, Path(workspace), watcher).require_whole()
    return open_run(recipe, workspace=workspace)


def open_run(recipe: Recipe | str, *, workspace: Path | str = WORKSPACE) -> Run:
    """Open what a workspace holds of a recipe, or of a run by its id, computing nothing."""
    store = Store.open(workspace, create=False)
    if isinstance(recipe, Recipe):
        return Run(recipe, store)
    if (row := store.run(recipe)) is not None:
        return Run(parse_recipe(json.loads(row["recipe"]), where=recipe), store)
    known = ", ".join(row["id"] for row in store.runs()) or "none"
    raise InputError(f"no run is called {recipe!r}", where=str(workspace), fix=f"runs here: {known}")


class Run:
    """A recipe's view of a workspace: its cells, samples and metrics as frames, its stacks as ready models."""

    def __init__(self, recipe: Recipe, store: Store) -> None:
        self.recipe = recipe
        self.id = run_id(recipe)
        self._graph = Graph(recipe)
        self._store = store

    def stages(self) -> pl.DataFrame:
        """Every stage: slot, kind, key, state, reason, seconds."""
        return pl.DataFrame([asdict(one) for one in status_of(self._graph, self._store)], infer_schema_length=None)

    def cells(self) -> pl.DataFrame:
        """Every cell of the grid and how many of its end stages are done."""
        rows = []
        for plan in self._graph.cells:
            done = sum(self._store.record(stage.key) is not None for stage in plan.scores.values())
            rows.append({**asdict(plan.cell), "n_measured": done, "n_to_measure": len(plan.scores)})
        return pl.DataFrame(rows)

    def metrics(self) -> pl.DataFrame:
        """One row for each cell, measure and probe that was measured: value (share), questions, samples, unscored, stage."""
        rows: list[dict[str, Any]] = []
        for plan, measure, probe, role in self._measured():
            one = stage_series(self._store, plan.scores[measure, probe], measure, probe)
            if one is None or not one.rows:
                continue
            counts = {"n_questions": len(one.rows), "n_samples": one.n_samples, "n_unscored": one.n_unscored}
            rows.append(
                {
                    **asdict(plan.cell),
                    "measure": measure,
                    "probe": probe,
                    "role": role,
                    "value": one.mean.value,
                    **counts,
                    "stage": one.stage,
                }
            )
        return pl.DataFrame(rows, infer_schema_length=None)

    def samples(self) -> pl.DataFrame:
        """Every sampled completion of the cells with its score: cell, measure, probe, row, sample, prompt, completion, value, reason."""
        rows: list[dict[str, Any]] = []
        for plan, measure, probe, role in self._measured():
            stage = plan.scores[measure, probe]
            drawn = stage.needs.get("eval")
            if drawn is None or self._store.record(stage.key) is None:
                continue
            scores = {(score.row, score.sample): score for score in self._store.scores(stage.key)}
            for one in self._store.samples(drawn.key):
                score = scores.get((one.row, one.sample))
                judged = {"value": score.value if score else None, "reason": score.reason if score else "not scored"}
                rows.append(
                    {**asdict(plan.cell), "measure": measure, "probe": probe, "role": role, **asdict(one), **judged}
                )
        return pl.DataFrame(rows, infer_schema_length=None)

    def verdicts(self) -> pl.DataFrame:
        """The gates' verdicts, decided from the ledger as it is now."""
        decided = decide_gates(self._graph, self._store, self._graph.cells)
        return pl.DataFrame(
            [{k: v for k, v in one.body().items() if k != "numbers"} for one in decided], infer_schema_length=None
        )

    def stack(self, source: str, *, epoch: int, behavior: str = "none", **others: Any) -> Base:
        """The base model with a cell's stack live and proven; `.model` generates, `.tokenizer` renders.

        Raises InputError if the cell has not been trained.
        """
        from fastconv.run.stacks import Stacks

        plan = self._graph.select(source, behavior, epoch, **others)[0]
        missing = [s.slot for s in (plan.snapshot, plan.adapter) if s is not None and self._store.record(s.key) is None]
        if missing:
            raise InputError("the stack is not trained", where=missing[0], fix="run the recipe first")
        stacks = Stacks(self._graph, self._store)
        with stacks.live_stack(next(iter(plan.scores.values()))):
            slots = stacks.stack.route.slots
        stacks.stack.route.slots = slots  # live for good: this base is the caller's alone
        return stacks.base

    def _measured(self) -> list[tuple[CellPlan, str, str, str]]:
        roles = []
        for plan in self._graph.cells:
            personas = {
                ASSISTANT: "assistant",
                canary_of(self.recipe, plan.cell.source): "canary",
                plan.cell.source: "source",
            }
            roles += [(plan, measure, probe, personas[probe]) for measure, probe in plan.scores]
        return roles
