"""`fastconv plan`, and the cost gate that `run` and `cell` pass before they begin. Imports no torch but to measure."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastconv.cli.kit import DEFAULT_WORKSPACE, AsJson, Overrides, RecipePath, Scale, Workspace, answered, load
from fastconv.cli.kit import open_if_there as open_store

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
    from fastconv.plan import plan_recipe

    loaded = load(recipe, overrides, scale)
    if measure:
        from fastconv.bench.probe import keep_probe
        from fastconv.store import Store

        keep_probe(loaded, Store.open(workspace))
    found = plan_recipe(loaded, open_store(workspace), machine)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
        return
    from rich.console import Console

    from fastconv.show.planning import plan as show_plan

    show_plan(found, Console(highlight=False, soft_wrap=not sys.stdout.isatty()))


def pass_cost_gate(recipe: Any, workspace: Path, plans: Any, *, approved: bool) -> dict[str, Any]:
    """What the run's facts are to say of its plan. Raises GateStop for a run beyond its limits that nobody approved.

    A run that goes on keeps the plan that it began with.
    """
    from fastconv.graph import Graph
    from fastconv.plan import facts_of, make_plan, require_approved
    from fastconv.recipe import run_id

    store = open_store(workspace)
    graph = Graph(recipe)
    found = make_plan(graph, store, plans=plans(graph) if plans else None)
    beyond = require_approved(found, recipe.run, approved=approved)
    facts = facts_of(found, beyond)
    begun = next((json.loads(row["facts"]) for row in store.runs() if row["id"] == run_id(recipe)), {}) if store else {}
    if "plan" in begun:
        del facts["plan"]
    return facts
