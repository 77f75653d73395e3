"""The command line: thin commands over `run`, `analysis`, `report` and `planning`. Imports no torch at start."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fastconv.cli.common import (
    DEFAULT_REPORTS,
    DEFAULT_WORKSPACE,
    AsJson,
    Overrides,
    Quiet,
    RecipeOption,
    RecipePath,
    Reports,
    Scale,
    Workspace,
    exit_code_of,
    load,
    load_recipe_or_run,
    open_existing,
    with_exit_codes,
)
from fastconv.cli.judging import judge_app
from fastconv.cli.planning import Approve, cost_gate, recipe_app
from fastconv.cli.planning import register as register_plan
from fastconv.cli.workspace import Public, Push, describe
from fastconv.cli.workspace import register as register_workspace
from fastconv.errors import EXIT_CODES, FastconvError
from fastconv.store.io import require_writable

_CODES = "  \n".join(f"{code}  {meaning}" for code, meaning in EXIT_CODES.items())
app = typer.Typer(
    help="Does making an assistant talk like a persona also give it that persona's behaviors?\n\n"
    "Begin with `fastconv run demo`, which needs no GPU and no key; `fastconv recipe list` has the others.",
    epilog=f"Exit codes:  \n{_CODES}",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(recipe_app, name="recipe")
app.add_typer(judge_app, name="judge")
register_plan(app)  # before `run`, as one meets them

IgnoreGate = Annotated[
    list[str],
    typer.Option("--ignore-gate", help="Go on although this gate fails: G0, G2, G3, G3.5, KILL, G4, G5 (repeatable)"),
]
OnlyNegatives = Annotated[str | None, typer.Option("--negatives", help="Only these: included, excluded or none")]
OnlyConvergence = Annotated[str | None, typer.Option("--convergence", help="Only this convergence: source or generic")]
OnlySeed = Annotated[int | None, typer.Option("--seed", help="Only this seed")]
OnlyArm = Annotated[str | None, typer.Option("--arm", help="Only this arm of grid.arms")]
Because = Annotated[str, typer.Option("--because", help="Why: recorded with the run and printed in its report")]


def _version(asked: bool) -> None:
    if asked:
        from fastconv import __version__

        typer.echo(f"fastconv {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it")] = False,
) -> None:
    pass


class _RunCommand(TyperCommand):
    """Allows `--ray` without an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[str] = []
        for word, after in zip(args, [*args[1:], "-"], strict=True):
            given += [word, "local"] if word == "--ray" and after.startswith("-") else [word]
        return super().parse_args(ctx, given)


@app.command(cls=_RunCommand)
@with_exit_codes
def run(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006 (typer reads the default)
    scale: Scale = "",
    ignore_gate: IgnoreGate = [],  # noqa: B006
    because: Because = "",
    approve: Approve = False,
    workspace: Workspace = DEFAULT_WORKSPACE,
    reports: Reports = DEFAULT_REPORTS,
    ray: Annotated[
        str,
        typer.Option(
            "--ray", metavar="[ADDRESS]", help="Spread sources over a Ray cluster; without ADDRESS over this machine"
        ),
    ] = "",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe to its verdict and report. What is done already is not done again. Exit code 3 if a gate stops it."""
    loaded, ignored = load(recipe, overrides, scale, workspace), _ignored(ignore_gate, because)
    _run(
        loaded, workspace, reports, as_json=as_json, quiet=quiet, plans=None, ignored=ignored, approve=approve, ray=ray
    )


@app.command()
@with_exit_codes
def cell(
    source: Annotated[str, typer.Argument(help="The source persona, e.g. villain")],
    behavior: Annotated[str, typer.Argument(help="The behavior, e.g. refusal")],
    epoch: Annotated[int, typer.Option("--epoch", help="Epoch of the snapshot; 0 is the base")],
    recipe: RecipeOption,
    negatives: OnlyNegatives = None,
    convergence: OnlyConvergence = None,
    seed: OnlySeed = None,
    arm: OnlyArm = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the stages with their keys and run nothing")] = False,
    ignore_gate: IgnoreGate = [],  # noqa: B006
    because: Because = "",
    approve: Approve = False,
    overrides: Overrides = [],  # noqa: B006
    scale: Scale = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
    reports: Reports = DEFAULT_REPORTS,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run single cells of a recipe: the same stages, with the same keys, that the whole recipe would run."""
    from fastconv.experiment.graph import Graph

    loaded = load(recipe, overrides, scale, workspace)

    def plans(graph: Graph) -> list[Any]:
        return graph.select(source, behavior, epoch, negatives=negatives, convergence=convergence, seed=seed, arm=arm)

    if dry_run:
        graph = Graph(loaded)
        stages = graph.stages(plans(graph))
        listed = [{"slot": stage.slot, "kind": stage.kind, "key": stage.key} for stage in stages]
        if as_json:
            print(json.dumps(listed, indent=1))
        else:
            for stage in stages:
                print(f"{stage.key[:12]}  {stage.slot}")
        return
    ignored = _ignored(ignore_gate, because)
    _run(loaded, workspace, reports, as_json=as_json, quiet=quiet, plans=plans, ignored=ignored, approve=approve)


@app.command()
@with_exit_codes
def status(
    recipe: RecipePath = "",
    overrides: Overrides = [],  # noqa: B006
    scale: Scale = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
) -> None:
    """Show where a run stands: every stage done, running, to do, stale (and why) or skipped. Without RUN: all runs."""
    from fastconv import show
    from fastconv.experiment.graph import Graph
    from fastconv.run.status import status_of

    store = open_existing(workspace)
    if not recipe:
        show.runs(store, as_json=as_json)
        return
    loaded = load_recipe_or_run(recipe, overrides, store, scale)
    show.status(status_of(Graph(loaded), store), as_json=as_json)


@app.command()
@with_exit_codes
def gate(
    recipe: RecipePath,
    require_go: Annotated[
        bool,
        typer.Option("--require-go", help="Exit code 3 unless every PILOT says go, to decide what a script runs next"),
    ] = False,
    overrides: Overrides = [],  # noqa: B006
    scale: Scale = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
) -> None:
    """Decide the gates again from the ledger. Exit code 3 as for `run`: if a gate ends it there; a PILOT only answers."""
    from fastconv import show
    from fastconv.analysis.gates import decide_gates
    from fastconv.errors import GateStop
    from fastconv.experiment.recorded import graph_of_run
    from fastconv.run.run import replay_gates
    from fastconv.store.ledger import Store

    store = Store.open(workspace, create=False)
    graph = graph_of_run(load_recipe_or_run(recipe, overrides, store, scale), store)
    verdicts = decide_gates(graph, store, graph.cells)
    show.gates(verdicts, as_json=as_json)
    try:
        replay_gates(graph, store)
    except GateStop as error:
        if not as_json:
            raise
        raise typer.Exit(error.exit_code) from None
    if require_go and (stopped := [v.subject for v in verdicts if v.gate == "PILOT" and v.verdict != "go"]):
        if as_json:
            raise typer.Exit(GateStop.exit_code)
        raise GateStop(f"no go for {', '.join(stopped)}", where="PILOT", fix="the reasons stand above, with their rows")


@app.command()
@with_exit_codes
def report(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    scale: Scale = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
    reports: Reports = DEFAULT_REPORTS,
    as_json: AsJson = False,
) -> None:
    """Write the report of a run again: one HTML page, its Markdown twin, figures and tables."""
    from fastconv.experiment.recorded import graph_of_run
    from fastconv.report import write_report
    from fastconv.store.ledger import Store

    store = Store.open(workspace, create=False)
    paths = write_report(graph_of_run(load_recipe_or_run(recipe, overrides, store, scale), store), store, reports)
    places = {"html": str(paths.html), "markdown": str(paths.markdown), "folder": str(paths.folder)}
    print(json.dumps(places) if as_json else paths.html)


@app.command()
@with_exit_codes
def peek(
    recipe: RecipePath,
    sets: Annotated[
        list[str], typer.Option("--of", help="Only this training set, as named above its rows (repeatable)")
    ] = [],  # noqa: B006
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows of each set")] = 4,
    overrides: Overrides = [],  # noqa: B006
    scale: Scale = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
) -> None:
    """Show training rows exactly as the model sees them, with the tokens that carry loss marked."""
    from fastconv import show
    from fastconv.run.audit import peek_recipe

    names = [*sets, *(text for text in overrides if "=" not in text)]  # --set named sets too, before there was --of
    loaded = load(recipe, [text for text in overrides if "=" in text], scale, workspace)
    show.peek(peek_recipe(loaded, open_existing(workspace), names, rows), as_json=as_json)


@app.command()
@with_exit_codes
def doctor(
    recipe: RecipePath = "",
    overrides: Overrides = [],  # noqa: B006
    scale: Scale = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
    deep: Annotated[bool, typer.Option("--deep", help="Also read every artefact and every page of the ledger")] = False,
    fix: Annotated[
        bool, typer.Option("--fix", help="Mend what is safe: leases of dead processes, stray files")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check this machine (and what a recipe needs): versions, device, model, workspace. Exit code 4 or 5 if it cannot."""
    from fastconv import show
    from fastconv.planning.doctor import diagnose

    findings = diagnose(load(recipe, overrides, scale, workspace) if recipe else None, workspace, deep=deep, fix=fix)
    show.doctor(findings, as_json=as_json)
    if worst := max((finding.exit_code for finding in findings), default=0):
        raise typer.Exit(worst)


@app.command()
@with_exit_codes
def score(
    questions: Annotated[Path, typer.Argument(help="Questions as JSONL, in ARC's form or flat")],
    model: Annotated[str, typer.Option("--model", help="A hub id, a folder, or builtin:smollm2")],
    revision: Annotated[str, typer.Option("--revision", help="Commit sha of a hub model")] = "",
    adapters: Annotated[list[Path], typer.Option("--adapter", help="A PEFT folder; repeat to stack in order")] = [],  # noqa: B006
    system: Annotated[
        str, typer.Option("--system", help="System prompt; `empty` or `template_default` are conditions")
    ] = "template_default",
    by_text: Annotated[
        bool, typer.Option("--text", help="Score the choices' texts, as lm-eval's arc_challenge does")
    ] = False,
    same_weights: Annotated[
        list[str],
        typer.Option("--same-weights", help="Another name of this base that an adapter may state; repeatable"),
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Score a multiple-choice file under any base and adapters."""
    from fastconv import show
    from fastconv.chat import parse_system_turn
    from fastconv.recipe import model_settings
    from fastconv.run.standalone import score_file

    result = score_file(
        model_settings(model, revision),
        adapters,
        questions,
        parse_system_turn(system),
        by_text=by_text,
        same_weights=same_weights,
    )
    show.scored(result, as_json=as_json)


@app.command()
@with_exit_codes
def export(
    source: Annotated[str, typer.Argument(help="The source persona")],
    behavior: Annotated[str, typer.Argument(help="The behavior, or none for the snapshot alone")],
    folder: Annotated[Path, typer.Argument(help="Where to write")],
    epoch: Annotated[int, typer.Option("--epoch", help="Epoch of the snapshot; 0 is the base")],
    recipe: RecipeOption,
    negatives: OnlyNegatives = None,
    convergence: OnlyConvergence = None,
    seed: OnlySeed = None,
    arm: OnlyArm = None,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Write the cell's answers and scores as Inspect logs instead")
    ] = False,
    push: Push = "",
    public: Public = False,
    overrides: Overrides = [],  # noqa: B006
    scale: Scale = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
) -> None:
    """Write a cell's stack as PEFT adapters: one for all with tokenizer and model card, and each alone with stack.json."""
    from fastconv.store.ledger import Store

    store = Store.open(workspace, create=False)
    if inspect:
        from fastconv.report.export import export_inspect as export_cell
    else:
        from fastconv.run.standalone import export_cell
    loaded = load_recipe_or_run(recipe, overrides, store, scale)
    chosen: dict[str, Any] = {"source": source, "behavior": behavior, "epoch": epoch, "negatives": negatives,
                              "convergence": convergence, "seed": seed, "arm": arm}  # fmt: skip
    paths: list[Any] = export_cell(loaded, store, folder, **chosen)
    if not inspect:
        paths += describe(loaded, store, paths[0], chosen, push=push, private=not public)
    print(json.dumps([str(path) for path in paths]) if as_json else "\n".join(map(str, paths)))


@app.command()
@with_exit_codes
def bench(
    kind: Annotated[
        str, typer.Argument(help="train, behavior, group, score, stack, sample, cell, kernel, engine; all or compare")
    ],
    files: Annotated[
        list[Path] | None, typer.Argument(help="For compare: two files of `bench all`, before, after")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="As in a recipe, or random:qwen2.5-7b for speed and memory")
    ] = "builtin:smollm2",
    size: Annotated[int | None, typer.Option("--size", min=1, help="Steps, questions, swaps, rows or tokens")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="With all: the file to write")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure ours against the usual way in one call: rates, memory, bytes written, share of the matmul ceiling.

    `all` measures everything that this machine can, into one file; `compare` says what got slower between two such files
    (exit code 3).
    """
    from fastconv import bench as benches
    from fastconv import show

    if kind == "compare":
        show.changes(benches.compare_files(files or []), as_json=as_json)
    elif kind == "all":
        show.bench_all(benches.bench_all(model, size=size, out=out), as_json=as_json)
    else:
        show.bench(benches.bench(kind, model, size=size), as_json=as_json)


register_workspace(app)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(exit_code_of(app))


def _ignored(codes: list[str], because: str) -> dict[str, str]:
    from fastconv.run.run import parse_ignored_gates

    return parse_ignored_gates(codes, because)


def _run(
    recipe: Any, workspace: Path, reports: Path, *, as_json: bool, quiet: bool, plans: Any, ignored: dict[str, str],
    approve: bool, ray: str = "",
) -> None:  # fmt: skip
    from fastconv import show
    from fastconv.errors import CostStop, GateStop
    from fastconv.experiment.graph import Graph
    from fastconv.report import write_report
    from fastconv.run.run import run_recipe
    from fastconv.show.progress import watching
    from fastconv.show.trackers import tracking
    from fastconv.store.ledger import Store

    for folder, option in ((workspace, "--workspace"), (reports, "--reports")):
        require_writable(folder, option)  # found before the computing, not after it
    with tracking(recipe, workspace) as tracked:
        try:
            with watching(quiet=quiet or as_json, stream=sys.stderr) as watcher:
                admit = cost_gate(workspace, approved=approve, watcher=watcher)
                listening = tracked.watch(watcher)
                if ray:
                    from fastconv.cluster import run_on_ray

                    finished = run_on_ray(recipe, workspace, listening, address=ray, ignore_gates=ignored, admit=admit)
                else:
                    finished = run_recipe(recipe, workspace, listening, plans=plans, ignore_gates=ignored, admit=admit)
        except GateStop as stop:
            if not isinstance(stop, CostStop):  # where nothing was started, there is nothing to report
                tracked.report = write_report(Graph(recipe), Store.open(workspace), reports).html
                typer.echo(f"report so far: {tracked.report}", err=True)
            raise
        paths = write_report(Graph(recipe), Store.open(workspace), reports)
        tracked.report = paths.html
    if as_json:
        body = {"run": finished.run, "tally": asdict(finished.tally), "verdicts": [v.body() for v in finished.verdicts]}
        body |= {"pending": finished.pending, "problem": finished.problem, "failed": list(map(asdict, finished.failed))}
        body |= {"held": {one.subject: one.reason for one in finished.held}}
        print(json.dumps({**body, "html": str(paths.html), "markdown": str(paths.markdown)}))
        try:
            finished.require_complete()
        except FastconvError as error:  # already in the JSON body
            raise typer.Exit(error.exit_code) from None
    else:
        show.finished(finished, paths.html)
        finished.require_complete()
