"""`fastconv plan`, and the cost gate that `run` and `cell` pass before they begin. Imports no torch but to measure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastconv.cli.common import DEFAULT_WORKSPACE, AsJson, Overrides, RecipePath, Scale, Workspace, answered, load
from fastconv.cli.common import open_if_there as open_store

if TYPE_CHECKING:
    from fastconv.experiment.graph import CellPlan, Graph

Approve = Annotated[bool, typer.Option("--approve", help="Run although the estimate is beyond the recipe's limits")]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(answered(plan))


def plan(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006 (typer reads the default)
    scale: Scale = "",
    machine: Annotated[
        str, typer.Option("--machine", help="Plan for another machine: cpu, h200, h100, a100, l40s, a10, 4090, 3090")
    ] = "",
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure this machine first (about 20 seconds) and keep it in the workspace"),
    ] = False,
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe costs before it is run: time, memory, disk, judgements, dollars, and what it could show."""
    from fastconv.run.judge_glance import JudgeGlance
    from fastconv.planning.plan import plan_recipe

    loaded = load(recipe, overrides, scale)
    if measure:
        from fastconv.bench.probe import keep_probe
        from fastconv.store.ledger import Store

        keep_probe(loaded, Store.open(workspace))
    store = open_store(workspace)
    judge = JudgeGlance(loaded.judge, store)
    found = plan_recipe(loaded, store, machine).knowing(judge.problem())
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
        return
    from fastconv.show import console_of_output
    from fastconv.show.planning import plan as show_plan

    show_plan(found, console_of_output())


def cost_gate(workspace: Path, *, approved: bool) -> Callable[[Graph, Sequence[CellPlan]], dict[str, Any]]:
    """What `run_recipe` asks before it begins: facts of the run's plan, or CostStop for one beyond its limits.

    A run that goes on keeps the plan that it began with. A model whose size is not known before it is fetched cannot be
    planned; where the recipe has limits, such a run begins only with --approve.
    """

    def admit(graph: Graph, cells: Sequence[CellPlan]) -> dict[str, Any]:
        from fastconv.engine.device import shape_on_disk
        from fastconv.planning.plan import facts_of, make_plan, require_approved, require_known
        from fastconv.recipe import run_id

        recipe = graph.recipe
        if shape_on_disk(recipe.model) is None:
            return facts_of(None, require_known(recipe, approved=approved))
        store = open_store(workspace)
        found = make_plan(graph, store, plans=cells)
        facts = facts_of(found, require_approved(found, recipe.run, approved=approved))
        if store is not None and "plan" in store.run_facts(run_id(recipe)):
            del facts["plan"]
        return facts

    return admit
