"""`fastconv plan`, and the cost gate that `run` and `cell` pass before they begin. Imports no torch but to measure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastconv.cli.common import DEFAULT_WORKSPACE, AsJson, Overrides, RecipePath, Scale, Workspace, answered, load
from fastconv.cli.common import open_if_there as open_store
from fastconv.stats.power import DetectableContrast, mended_by
from fastconv.stats.units import size

if TYPE_CHECKING:
    from fastconv.experiment.graph import CellPlan, Graph
    from fastconv.planning.plan import KindPlan, Plan

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
    from fastconv.judge.access import JudgePreflight
    from fastconv.planning.plan import plan_recipe

    loaded = load(recipe, overrides, scale)
    if measure:
        from fastconv.bench import measure_machine
        from fastconv.store.ledger import Store

        measure_machine(loaded, Store.open(workspace))
    store = open_store(workspace)
    judge = JudgePreflight(loaded.judge, store)
    found = plan_recipe(loaded, store, machine).knowing(judge.problem())
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
        return
    from fastconv.show import console_of_output

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


def duration(seconds: float) -> str:
    """Seconds as people read them: 12 s, 4.5 min, 2.3 h."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 or seconds == 0 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_plan(found: Plan, console: Console) -> None:
    """The whole plan."""
    machine = found.machine
    console.print(f"{found.recipe}: {found.n_cells} cells on {escape(machine.name)} ({escape(machine.origin)})")
    table = Table(box=None, pad_edge=False)
    for name in ("stages", "to do", "done", "seconds", "work"):
        table.add_column(name, justify="left" if name in ("stages", "work") else "right", overflow="fold")
    for kind in found.kinds:
        table.add_row(kind.kind, str(kind.n), str(kind.n_done), _seconds(kind), work(kind))
    console.print(table)
    console.print(f"in all {duration(3600 * found.hours)}; {_money(found)}")
    if found.judging is not None and found.judging.problem:
        console.print(f"[red]the judge cannot be asked:[/] {escape(found.judging.problem)}")
    for line in (*_beside(found), _rates(found), _room(found), *found.fit, *_power(found), *found.notes):
        console.print(escape(line))


def _seconds(kind: KindPlan) -> str:
    """What the stages of a kind take; judgements that another machine makes take nothing of this one."""
    return "beside" if _is_beside(kind) else duration(kind.seconds)


def _is_beside(kind: KindPlan) -> bool:
    return kind.demand.judged > 0 and not kind.seconds


def _beside(found: Plan) -> Iterator[str]:
    if any(map(_is_beside, found.kinds)):
        yield "beside: the judge answers while the GPU computes; how long it takes is not counted"


def work(kind: KindPlan) -> str:
    """What the stages of a kind work through."""
    one, said = kind.demand, []
    if one.trained_tok:
        said.append(f"{one.trained_tok:,.0f} tokens trained in {one.steps:,} steps")
    if one.read_tok:
        said.append(f"{one.read_tok:,.0f} read")
    if one.new_tok:
        said.append(f"{one.new_tok:,.0f} drawn (at most {one.worst_tok:,.0f}) in {one.decode_steps:,.0f} passes")
    if one.judged:
        said.append(f"{one.judged:,} judgements")
    return ", ".join(said)


def _money(found: Plan) -> str:
    judging = found.judging
    if judging is None:
        return "no judge, no bill"
    if not judging.worst_usd:
        return f"{judging.n:,} judgements by {escape(judging.model)}, without a bill"
    budget = "no budget set" if judging.budget_usd is None else f"judge.budget_usd stops it at ${judging.budget_usd:g}"
    return (
        f"{judging.n:,} judgements by {judging.model}: about ${judging.expected_usd:.2f}, at most "
        f"${judging.worst_usd:.2f}; {budget}"
    )


def _rates(found: Plan) -> str:
    one, shape = found.machine, found.shape
    return (
        f"rates: {one.train_flops_s / 1e9:,.0f} GFLOP/s trained, {one.read_flops_s / 1e9:,.0f} read, "
        f"{one.draw_flops_s / 1e9:,.0f} drawn; {one.memory_bytes_s / 1e9:,.0f} GB/s; {one.step_s:.2g} s a step, "
        f"{one.pass_s:.2g} s a pass, {one.stage_s:.2g} s a stage, {one.load_s:.2g} s to load; {shape.name}: "
        f"{shape.n_layers} layers, {shape.linear_params / 1e6:,.0f}M linear and {shape.head_params / 1e6:,.0f}M head weights"
    )


def _room(found: Plan) -> str:
    memory = " to ".join(f"{found.memory_bytes[name] / 2**30:.1f}" for name in ("least", "comfortable"))
    has = "" if found.machine.memory_bytes is None else f" of {found.machine.memory_bytes / 2**30:.0f}"
    disk = ", ".join(f"{name.replace('_', ' ')} {value / 1e9:.2f}" for name, value in found.disk_bytes.items())
    return f"memory: {memory} GiB{has}; disk in GB: {disk}"


def _power(found: Plan) -> Iterator[str]:
    """One line for each part of a measure, and what is assumed or not known before a run."""
    for name, one in found.power.items():
        unit = "points" if one.threshold > 1 else "share"
        apart, kind = ("", "declared contrast") if one.primary else (", reported apart", "contrast")
        family = f" ({size(one.in_family, unit)} among {one.n_contrasts})" if one.primary else ""
        yield (
            f"{name}{apart}: {one.n_questions} questions x {one.n_samples}, threshold {size(one.threshold, unit)}; would "
            f"probably find a change, as gates compare, from {_reach(one.change, unit)}; the {kind} of "
            f"{one.declared.n_terms} terms from {_reach(one.declared, unit, family)}"
        )
    if found.power:
        yield "a contrast's terms are taken as independent, which is an assumption: what they share would shrink it"
    if any(one.change.too_large or one.declared.too_large for one in found.power.values()):
        yield "how many seeds would mend it is told after a run: the spread between seeds is not known before one"


def _reach(one: DetectableContrast, unit: str, family: str = "") -> str:
    """A detectable effect, and where it exceeds the threshold a warning with the numbers that would mend it."""
    mend = f"; a null result would say little: {mended_by((one.questions, one.samples))}" if one.too_large else ""
    return f"{size(one.alone, unit)}{family}{mend}"
