"""`fastconv recipe`, `check` and `plan`, and the cost gate of `run` and `cell`. Imports torch only for `--measure`."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastconv.cli.common import (
    DEFAULT_WORKSPACE,
    AsJson,
    Overrides,
    RecipePath,
    Scale,
    WithModel,
    Workspace,
    load,
    open_existing,
    with_exit_codes,
)
from fastconv.stats.power import QuestionSupply, remedy_text
from fastconv.stats.units import counted, duration_text, size_text

if TYPE_CHECKING:
    from fastconv.experiment.graph import CellPlan, Graph
    from fastconv.planning.plan import KindPlan, Plan
    from fastconv.show.progress import LineWatcher
    from fastconv.stats.power import DesignPower, DetectableContrast

Approve = Annotated[bool, typer.Option("--approve", help="Run although the estimate is beyond the recipe's limits")]

#: A share of the scale that no published change exceeded: what only finds larger ones finds nothing.
LARGEST_EFFECT = 0.389


recipe_app = typer.Typer(help="Look at recipes: list, show, copy, explain, schema.", no_args_is_help=True)


@recipe_app.command("list")
@with_exit_codes
def recipe_list(
    as_json: AsJson = False,
    costs: Annotated[
        bool, typer.Option("--costs", help="What each costs on an RTX 4090, an H100 and an H200, as Markdown, instead")
    ] = False,
) -> None:
    """List the shipped recipes with what each asks."""
    from fastconv.datasets.files import shipped_recipes

    if costs:
        from fastconv.planning.plan import costs_table, recipe_costs

        recipes = (load(name, []) for name in shipped_recipes())
        print(json.dumps(list(map(asdict, recipe_costs(recipes))), indent=1) if as_json else costs_table(recipes))
        return
    asked = {name: load(name, []).about for name in shipped_recipes()}
    if as_json:
        print(json.dumps(asked, indent=1, ensure_ascii=False))
        return
    width = max(map(len, asked))
    for name, about in asked.items():
        _echo(f"{name:<{width}}  {about}", width + 2)


@recipe_app.command("show")
@with_exit_codes
def recipe_show(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006 (typer reads the default)
    scale: Scale = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> None:
    """Print a recipe complete, with every default and override, as JSON, and its sha256."""
    from fastconv.recipe import recipe_sha256

    loaded = load(recipe, overrides, scale, workspace)
    print(json.dumps({**loaded.model_dump(mode="json"), "sha256": recipe_sha256(loaded)}, indent=1))


@recipe_app.command("copy")
@with_exit_codes
def recipe_copy(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name (`recipe list`) or a recipe's path")],
    file: Annotated[Path, typer.Argument(help="The file to write; it must not be there yet")],
) -> None:
    """Write a recipe to a file of your own, comments and all, to change what you like; its name becomes the file's."""
    from fastconv.datasets.files import assets, find_recipe, shipped_recipes
    from fastconv.errors import InputError, RecipeError, did_you_mean
    from fastconv.recipe import load_recipe
    from fastconv.store.io import write_text

    source = find_recipe(recipe)
    if not source.is_file():
        raise RecipeError("no recipe is called this", where=recipe, fix=did_you_mean(recipe, shipped_recipes()))
    if file.exists():
        raise InputError("there is a file already", where=str(file), fix="give another name, or move it away")
    load_recipe(source)
    text = source.read_text(encoding="utf-8-sig").replace(
        "#:schema ./schema.json", f"#:schema {assets('recipes') / 'schema.json'}"
    )
    name = re.sub(r"[^a-z0-9_]+", "_", file.stem.lower()).lstrip("_0123456789") or "mine"
    write_text(file, re.sub(r'(?m)^name = ".*"$', f'name = "{name[:40]}"', text, count=1))
    print(file)


@recipe_app.command("explain")
@with_exit_codes
def recipe_explain(
    name: Annotated[
        str, typer.Argument(metavar="KEY", help="A key, a table or a key's last part; without it, all keys")
    ] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Write docs/RECIPES.md to standard output")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a key of a recipe is: its meaning, what it takes, its unit, default and an example."""
    from fastconv.recipe import find_keys, keys_page, recipe_keys

    if markdown:
        print(keys_page(), end="")
        return
    keys = find_keys(name) if name else recipe_keys()
    if as_json:
        print(json.dumps([asdict(one) for one in keys], indent=1, ensure_ascii=False))
        return
    for one in keys:
        _echo(f"{one.key}: {one.about}", 4)
        if name:
            default = f"default {one.default}" if one.default else "no default"
            _echo(f"    {one.takes.replace('`', '')}; {default}; for example --set '{one.key}={one.example}'", 4)


@recipe_app.command("schema")
@with_exit_codes
def recipe_schema_verb(
    path: Annotated[
        bool, typer.Option("--path", help="Only the path of the shipped schema, for an editor's `#:schema` line")
    ] = False,
) -> None:
    """Print the JSON schema of recipes, which editors complete and check keys from."""
    from fastconv.datasets.files import assets
    from fastconv.recipe import recipe_schema

    print(assets("recipes") / "schema.json" if path else json.dumps(recipe_schema(), indent=1, ensure_ascii=False))


def _echo(line: str, indent: int) -> None:
    """Print a line; on a terminal what does not fit goes on below, indented."""
    if sys.stdout.isatty():
        folded = textwrap.wrap(
            line, shutil.get_terminal_size().columns, subsequent_indent=" " * indent, break_on_hyphens=False
        )
        line = "\n".join(folded)
    typer.echo(line)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(with_exit_codes(check))
    app.command()(with_exit_codes(plan))


def check(
    recipe: RecipePath,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="With `check rows FILE`: a file of rows, or a data set hf://... of the hub, alone",
            show_default=False,
        ),
    ] = "",
    overrides: Overrides = [],  # noqa: B006 (typer reads the default)
    scale: Scale = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
    with_model: WithModel = False,
) -> None:  # fmt: skip
    """Audit the design and the rows of a recipe before a GPU second is spent. Exit code 2 if anything is refused, 4 if
    no run would take the base.

    `check rows FILE` reads a file of rows alone: what is in it, its tokens, and what training on it costs.
    """
    from fastconv import show
    from fastconv.errors import DataError, InputError

    if file or (recipe == "rows" and not Path(recipe).exists()):
        if recipe != "rows" or not file:
            what = "`check rows` needs the file" if not file else f"{file!r} is one argument too many"
            raise InputError(what, where="check", fix="write `check RECIPE`, or `check rows FILE` for a file alone")
        if scale or with_model:
            what = f"`check rows` takes no {'--scale' if scale else '--with-model'}: no run and no model is asked"
            raise InputError(what, where="check", fix="leave it out; --set model.id=... names another base")
        from fastconv.planning.doctor import plan_rows

        found = plan_rows(file, overrides)
        print(json.dumps(found.to_json(), indent=1, ensure_ascii=False) if as_json else "\n".join(found.lines()))
        return
    from fastconv.run.audit import audit_recipe, pinning_problem

    read = None
    if with_model:
        from fastconv.run.standalone import read_by_the_base as read
    loaded = load(recipe, overrides, scale, workspace)
    report, problem = audit_recipe(loaded, open_existing(workspace), read=read), pinning_problem(loaded)
    show.check(report, as_json=as_json, base="" if problem is None else str(problem))
    if not report.passed:
        n = len(report.refusals)
        what = "1 finding refuses it" if n == 1 else f"{n} findings refuse it"
        error = DataError(what, where=recipe, fix="mend as said above")
        raise typer.Exit(DataError.exit_code) if as_json else error
    if problem is not None:
        raise typer.Exit(problem.exit_code) if as_json else problem


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

    loaded = load(recipe, overrides, scale, workspace)
    if measure:
        from fastconv.bench import measure_machine
        from fastconv.store.ledger import Store

        measure_machine(loaded, Store.open(workspace))
    store = open_existing(workspace)
    judge = JudgePreflight(loaded.judge, store)
    recipe_plan = plan_recipe(loaded, store, machine).with_judge_problem(judge.problem())
    if as_json:
        print(json.dumps(recipe_plan.to_json(), indent=1))
        return
    from fastconv.show import console_of_output

    show_plan(recipe_plan, console_of_output())


def cost_gate(
    workspace: Path, *, approved: bool, watcher: LineWatcher | None = None
) -> Callable[[Graph, Sequence[CellPlan]], dict[str, Any]]:
    """Make the check that `run_recipe` calls before a run: facts with its plan, or CostStop beyond the limits.

    A resumed run keeps the plan that it started with. A model whose size is not known before it is downloaded cannot be
    planned; where the recipe has limits, such a run needs --approve. `watcher` is told what the plan expects.
    """

    def admit(graph: Graph, cells: Sequence[CellPlan]) -> dict[str, Any]:
        from fastconv.engine.device import shape_on_disk
        from fastconv.planning.plan import (
            make_plan,
            plan_facts,
            require_approved,
            require_known,
            time_left,
            wanted_keys,
        )
        from fastconv.recipe import run_id

        recipe = graph.recipe
        if shape_on_disk(recipe.model) is None:
            return plan_facts(None, require_known(recipe, approved=approved))
        store = open_existing(workspace)
        recipe_plan = make_plan(graph, store, plans=cells)
        facts = plan_facts(recipe_plan, require_approved(recipe_plan, recipe.run, approved=approved))
        if watcher is not None:
            left = time_left(recipe_plan, graph, cells, time.monotonic())
            watcher.expect(left, lambda: wanted_keys(graph, open_existing(workspace), cells))
        if store is not None and "plan" in store.run_facts(run_id(recipe)):
            del facts["plan"]
        return facts

    return admit


def show_plan(recipe_plan: Plan, console: Console) -> None:
    """Print the whole plan."""
    machine = recipe_plan.machine
    console.print(
        f"{recipe_plan.recipe}: {counted(recipe_plan.n_cells, 'cell')} on {escape(machine.name)} ({escape(machine.origin)})"
    )
    table = Table(box=None, pad_edge=False)
    for name in ("stages", "to do", "done", "time", "work"):
        table.add_column(name, justify="left" if name in ("stages", "work") else "right", overflow="fold")
    for kind in recipe_plan.kinds:
        table.add_row(kind.kind, str(kind.n), str(kind.n_done), _seconds(kind), work(kind))
    if recipe_plan.start_s:
        table.add_row("start-up", "", "", duration_text(recipe_plan.start_s), "the base loaded and tested, once")
    console.print(table)
    console.print(f"in all {duration_text(3600 * recipe_plan.hours)}; {_money(recipe_plan)}")
    if recipe_plan.judging is not None and recipe_plan.judging.problem:
        console.print(f"[red]the judge cannot be asked:[/] {escape(recipe_plan.judging.problem)}")
    for line in (
        *_beside(recipe_plan),
        _rates(recipe_plan),
        _room(recipe_plan),
        *recipe_plan.fit,
        *_power(recipe_plan),
        *recipe_plan.notes,
    ):
        console.print(escape(line))


def _seconds(kind: KindPlan) -> str:
    """Time of a kind's stages; judgements made by another machine take none of this one."""
    return "beside" if _is_beside(kind) else duration_text(kind.seconds)


def _is_beside(kind: KindPlan) -> bool:
    return kind.demand.judged > 0 and not kind.seconds


def _beside(recipe_plan: Plan) -> Iterator[str]:
    if any(map(_is_beside, recipe_plan.kinds)):
        yield "beside: the judge answers while the GPU computes; how long it takes is not counted"


def work(kind: KindPlan) -> str:
    """The work of a kind's stages: tokens, steps, passes, judgements."""
    demand, parts = kind.demand, []
    if demand.trained_tok:
        parts.append(f"{demand.trained_tok:,.0f} tokens trained in {demand.steps:,} steps")
    if demand.read_tok:
        parts.append(f"{demand.read_tok:,.0f} read")
    if demand.new_tok:
        parts.append(
            f"{demand.new_tok:,.0f} drawn (at most {demand.worst_tok:,.0f}) in {demand.decode_steps:,.0f} passes"
        )
    if demand.judged:
        parts.append(f"{demand.judged:,} judgements")
    return ", ".join(parts)


def _money(recipe_plan: Plan) -> str:
    judging = recipe_plan.judging
    if judging is None:
        return "no judge, no bill"
    if not judging.worst_usd:
        return f"{judging.n:,} judgements by {escape(judging.model)}, without a bill"
    budget = "no budget set" if judging.budget_usd is None else f"judge.budget_usd stops it at ${judging.budget_usd:g}"
    return (
        f"{judging.n:,} judgements by {judging.model}: about ${judging.expected_usd:.2f}, at most "
        f"${judging.worst_usd:.2f}; {budget}"
    )


def _rates(recipe_plan: Plan) -> str:
    machine, shape = recipe_plan.machine, recipe_plan.shape
    return (
        f"rates: {machine.train_flops_s / 1e9:,.0f} GFLOP/s trained, {machine.read_flops_s / 1e9:,.0f} read, "
        f"{machine.draw_flops_s / 1e9:,.0f} drawn; {machine.memory_bytes_s / 1e9:,.0f} GB/s; {machine.step_s:.2g} s a step, "
        f"{machine.pass_s:.2g} s a pass, {machine.stage_s:.2g} s a stage, {machine.load_s:.2g} s to load; {shape.name}: "
        f"{shape.n_layers} layers, {shape.linear_params / 1e6:,.0f}M linear and {shape.head_params / 1e6:,.0f}M head weights"
    )


def _room(recipe_plan: Plan) -> str:
    memory = " to ".join(f"{recipe_plan.memory_bytes[name] / 2**30:.1f}" for name in ("least", "comfortable"))
    has = "" if recipe_plan.machine.memory_bytes is None else f" of {recipe_plan.machine.memory_bytes / 2**30:.0f}"
    disk = ", ".join(f"{name.replace('_', ' ')} {value / 1e9:.2f}" for name, value in recipe_plan.disk_bytes.items())
    return f"memory: {memory} GiB{has}; disk in GB: {disk}"


def _power(recipe_plan: Plan) -> Iterator[str]:
    """One line for each part of a measure, and what is assumed or unknown before a run."""
    for name, power in recipe_plan.power.items():
        unit = "points" if power.threshold > 1 else "share"
        apart, kind = ("", "declared contrast") if power.primary else (", reported apart", "contrast")
        several = power.primary and power.n_contrasts > 1
        family = f" ({size_text(power.in_family, unit)} among {power.n_contrasts})" if several else ""
        contrast = f"; the {kind} of {power.declared.n_terms} terms from {_reach(power, power.declared, unit, family)}"
        yield (
            f"{name}{apart}: {power.n_questions} questions x {power.n_samples}, threshold {size_text(power.threshold, unit)}; would "
            f"probably find a change, as gates compare, from {_reach(power, power.change, unit)}"
            + (contrast if power.n_contrasts else "")
        )
    if recipe_plan.power:
        yield "a contrast's terms are taken as independent, which is an assumption: what they share would shrink it"
        yield "the noise from run to run is counted as declared for one seed (docs/POWER.md: what more seeds would find)"
    primary = [(name, power) for name, power in recipe_plan.power.items() if power.primary]
    worse = [(name, power) for name, power in primary if power.family_over_seeds(3) > power.family_over_seeds(1)]
    if worse:
        least = min(power.family_over_seeds(3) / (100 if power.threshold > 1 else 1) for _, power in worse)
        what = "nothing" if least > LARGEST_EFFECT else "less than one"
        yield f"three seeds find {what} among {worse[0][1].n_contrasts} contrasts at the first step of Holm: {_few_seeds(worse)}"
    if any(power.change.too_large or power.declared.too_large for power in recipe_plan.power.values()):
        yield "seeds are counted as erring independently of one another; the spread between them is not known before a run"


def _few_seeds(worse: Sequence[tuple[str, DesignPower]]) -> str:
    """What three, five and ten seeds find of each measure among all contrasts."""
    told = []
    for name, power in worse:
        unit = "points" if power.threshold > 1 else "share"
        sizes = [size_text(power.family_over_seeds(n), unit) for n in (3, 5, 10)]
        told.append(f"{name} from {sizes[0]}, five seeds from {sizes[1]}, ten from {sizes[2]}")
    return "; ".join(told) + " (the test over seeds has one degree of freedom less than seeds)"


def _reach(power: DesignPower, contrast: DetectableContrast, unit: str, family: str = "") -> str:
    """A detectable effect; where it exceeds the threshold, also a warning with sample sizes that would suffice."""
    supply = None
    if power.n_available is not None:
        supply = QuestionSupply(
            power.n_available,
            lambda n_seeds: power.over_seeds(contrast, n_seeds),
            lambda size: size_text(size, unit),
        )
    advice = (
        f"; a null result would say little: {remedy_text((contrast.questions, contrast.samples), supply)}"
        if contrast.too_large
        else ""
    )
    return f"{size_text(contrast.alone, unit)}{family}{advice}"
