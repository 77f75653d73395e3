"""Python interface for notebooks: run or open a recipe, read its results as polars frames, get a stack as a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from fastconv.analysis.contrasts import role_of
from fastconv.analysis.gates import decide_gates, stage_series
from fastconv.engine.builtin import prepare_model_folder
from fastconv.engine.locate import locate
from fastconv.errors import InputError, did_you_mean
from fastconv.experiment.graph import CellPlan
from fastconv.experiment.recorded import graph_of_run
from fastconv.experiment.scale import named_recipe, scaled
from fastconv.recipe import Recipe, model_settings, parse_recipe, run_id
from fastconv.run.run import run_recipe as _run_recipe
from fastconv.run.status import status_of
from fastconv.show.progress import watching
from fastconv.show.trackers import tracking
from fastconv.store.io import stored_json
from fastconv.store.ledger import Store

if TYPE_CHECKING:
    from fastconv.engine.model import Base

WORKSPACE, LEDGER = Path("checkpoints"), "ledger.sqlite"


def load_recipe(
    name: Path | str, overrides: Sequence[str] = (), *, scale: str = "", workspace: Path | str = WORKSPACE
) -> Recipe:
    """A recipe by its path, a shipped one by its name (`demo`), or that of a run by its id; `overrides` as `--set` takes them.

    `scale` makes it smaller: `tiny` (random weights) or `demo` (the embedded model). Raises RecipeError naming file, key and
    value, or the nearest name.
    """
    store = Store.open(workspace, create=False) if (Path(workspace) / LEDGER).is_file() else None
    try:
        return named_recipe(str(name), overrides, store, scale)
    finally:
        if store is not None:
            store.close()


def run_recipe(
    recipe: Recipe | Path | str, *, scale: str = "", workspace: Path | str = WORKSPACE, quiet: bool = False
) -> Run:
    """Run a recipe (or resume it) to its verdict and open the result; a name and `scale` are as `load_recipe` takes them.

    Raises FastconvError as the command line does.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, scale=scale, workspace=workspace)
    elif scale:
        recipe = scaled(recipe, scale)
    with tracking(recipe, Path(workspace)) as tracked, watching(quiet=quiet, stream=sys.stderr) as watcher:
        _run_recipe(recipe, Path(workspace), tracked.watch(watcher)).require_complete()
    return open_run(recipe, workspace=workspace)


def base_folder(model: str, revision: str = "") -> Path:
    """The folder of a base model, for other libraries' `from_pretrained`: `builtin:smollm2` too, converted if it never was.

    Raises ModelError if it cannot be had, RecipeError if the revision is no commit sha.
    """
    settings = model_settings(model, revision)
    return prepare_model_folder(settings, locate(settings))


def open_run(recipe: Recipe | str, *, workspace: Path | str = WORKSPACE) -> Run:
    """Open a run by its recipe or its id; computes nothing.

    Raises StoreError if the workspace has no ledger, InputError if no run has this id.
    """
    store = Store.open(workspace, create=False)
    if isinstance(recipe, Recipe):
        return Run(recipe, store)
    if (row := store.run(recipe)) is not None:
        return Run(parse_recipe(stored_json(row["recipe"]), where=recipe), store)
    known = [row["id"] for row in store.runs()]
    fix = f"{did_you_mean(recipe, known, ' ')} runs here: {', '.join(known) or 'none'}"
    raise InputError(f"no run is called {recipe!r}", where=str(workspace), fix=fix)


class Run:
    """One recipe in one workspace: cells, samples and metrics as polars frames, trained stacks as models."""

    def __init__(self, recipe: Recipe, store: Store) -> None:
        self.recipe = recipe
        self.id = run_id(recipe)
        self._graph = graph_of_run(recipe, store)
        self._store = store

    def stages(self) -> pl.DataFrame:
        """One row per stage: slot, kind, key, state, reason, seconds."""
        statuses = status_of(self._graph, self._store)
        return pl.DataFrame([asdict(status) for status in statuses], infer_schema_length=None)

    def cells(self) -> pl.DataFrame:
        """One row per cell of the grid: its coordinates and how many of its score stages are done."""
        rows = []
        for plan in self._graph.cells:
            n_done = sum(self._store.record(stage.key) is not None for stage in plan.scores.values())
            rows.append({**plan.cell.columns, "n_measured": n_done, "n_to_measure": len(plan.scores)})
        return pl.DataFrame(rows)

    def metrics(self) -> pl.DataFrame:
        """One row per cell, measure and probe that has scores.

        `value` is the mean over questions in the measure's unit (share of 1, or a judge's points); with it come the
        numbers of questions, of samples, of unscored ones and of incoherent ones (which leave a judge's mean), and the
        key of the stage.
        """
        rows: list[dict[str, Any]] = []
        for plan, measure, probe, role in self._measured():
            scores = stage_series(
                self._store, plan.scores[measure, probe], measure, probe, self._graph.behaviors[measure].spec.unit
            )
            if scores is None or not scores.rows:
                continue
            counts = {"n_questions": len(scores.rows), "n_samples": scores.n_samples, "n_unscored": scores.n_unscored,
                      "n_incoherent": len(scores.incoherent)}  # fmt: skip
            rows.append(
                {
                    **plan.cell.columns,
                    "measure": measure,
                    "probe": probe,
                    "role": role,
                    "value": scores.mean.value,
                    **counts,
                    "stage": scores.stage,
                }
            )
        return pl.DataFrame(rows, infer_schema_length=None)

    def samples(self) -> pl.DataFrame:
        """One row per sampled completion: cell, measure, probe, row, sample, prompt, completion, value, reason.

        `value` is None where there is no score; `reason` then says why.
        """
        rows: list[dict[str, Any]] = []
        for plan, measure, probe, role in self._measured():
            stage = plan.scores[measure, probe]
            sampling = stage.needs.get("eval")
            if sampling is None or self._store.record(stage.key) is None:
                continue
            scores = {(score.row, score.sample): score for score in self._store.scores(stage.key)}
            for sample in self._store.samples(sampling.key):
                score = scores.get((sample.row, sample.sample))
                scored = {"value": score.value if score else None, "reason": score.reason if score else "not scored"}
                rows.append(
                    {**plan.cell.columns, "measure": measure, "probe": probe, "role": role, **asdict(sample), **scored}
                )
        return pl.DataFrame(rows, infer_schema_length=None)

    def verdicts(self) -> pl.DataFrame:
        """One row per gate verdict, decided from the ledger as it is now."""
        verdicts = decide_gates(self._graph, self._store, self._graph.cells)
        return pl.DataFrame(
            [{key: value for key, value in verdict.body().items() if key != "numbers"} for verdict in verdicts],
            infer_schema_length=None,
        )

    def stack(self, source: str, *, epoch: int, behavior: str = "none", **others: Any) -> Base:
        """The base model with a cell's stack of adapters live and verified; `.model` generates, `.tokenizer` renders.

        `others` select the cell further (negatives, seed, convergence). Raises InputError if the cell is not trained,
        RecipeError if the recipe has no such cell.
        """
        from fastconv.run.stacks import Stacks

        plan = self._graph.select(source, behavior, epoch, **others)[0]
        stages = list(plan.stack.values())
        missing = [stage.slot for stage in stages if self._store.record(stage.key) is None]
        if missing:
            raise InputError("the stack is not trained", where=missing[0], fix="run the recipe first")
        stacks = Stacks(self._graph, self._store)
        with stacks.live_stack(next(iter(plan.scores.values()))):
            slots = stacks.stack.route.slots
        stacks.stack.route.slots = slots  # stays live after the block: no one else uses this base
        return stacks.base

    def _measured(self) -> list[tuple[CellPlan, str, str, str]]:
        """(cell plan, measure, probe persona, role of the probe) of every score stage."""
        measured = []
        for plan in self._graph.cells:
            measured += [
                (plan, measure, probe, role_of(self.recipe, plan.cell, probe)) for measure, probe in plan.scores
            ]
        return measured
