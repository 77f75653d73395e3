"""The verbs over what is there already: `verify`, `compare`, `merge`, `gc`, ... The command line registers them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastconv.cli.common import (
    DEFAULT_REPORTS,
    DEFAULT_WORKSPACE,
    AsJson,
    Overrides,
    RecipePath,
    Reports,
    Scale,
    Workspace,
    load_recipe_or_run,
    with_exit_codes,
)
from fastconv.errors import shown
from fastconv.show import console_of_output
from fastconv.stats.units import change, counted, interval_text, level

if TYPE_CHECKING:
    from fastconv.analysis.analysis import Analysis
    from fastconv.report.compare import Paired, RunComparison
    from fastconv.run.gc import GcPlan


Push = Annotated[
    str,
    typer.Option("--push", metavar="OWNER/NAME", help="Also upload it to the hub with your token, as a private model"),
]
Public = Annotated[bool, typer.Option("--public", help="With --push: as a public model")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for verb in (verify, compare, published, merge, gc, forget, serve):
        app.command()(with_exit_codes(verb))
    app.command("import")(with_exit_codes(import_logs))


def merge(
    others: Annotated[list[Path], typer.Argument(help="Workspaces to take results from; they are only read")],
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
) -> None:
    """Take over what other workspaces computed. Again changes nothing; two results for one stage are refused."""
    from fastconv.store.ledger import Store
    from fastconv.store.merge import merge as merge_workspaces

    sources = [Store.open(path, create=False) for path in others]
    store = Store.open(workspace)
    merged = {str(path): merge_workspaces(store, source) for path, source in zip(others, sources, strict=True)}
    if as_json:
        print(json.dumps({name: asdict(result) for name, result in merged.items()}, indent=1))
        return
    for name, result in merged.items():
        judged = f", {result.n_judgements} judgements" if result.n_judgements else ""
        typer.echo(
            f"{name}: {result.n_added} stages taken over ({bytes_text(result.copied_bytes)}{judged}), {result.n_known} known"
        )


def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Free it; without this it is only shown")] = False,
    adapters: Annotated[
        list[str],
        typer.Option("--adapters", help="Also the adapters of this finished run; its scores stay (repeatable)"),
    ] = [],  # noqa: B006 (typer reads the default)
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
) -> None:
    """Show what of a workspace nothing needs any more and how many bytes that is; with --yes, free it."""
    from fastconv.run.gc import find_garbage
    from fastconv.store.gc import free
    from fastconv.store.ledger import Store

    store = Store.open(workspace, create=False)
    plan = find_garbage(store, adapters)
    freed = free(store, plan.garbage) if yes else 0
    if as_json:
        shown = [{"kind": w.kind, "name": w.name, "why": w.why, "bytes": w.n_bytes} for w in plan.garbage]
        print(json.dumps({"waste": shown, "bytes": plan.n_bytes, "freed_bytes": freed, "left": plan.skipped}, indent=1))
        return
    _show(plan, freed if yes else None)


def describe(recipe: Any, store: Any, folder: Path, cell: dict[str, Any], *, push: str, private: bool) -> list[str]:
    """Write an exported cell's model card, and push the folder if a repository is named; returns what was made."""
    from fastconv.experiment.recorded import graph_of_run
    from fastconv.hub import push_folder
    from fastconv.report.export import write_card

    graph = graph_of_run(recipe, store)
    first, *others = graph.select(**cell)
    if others:
        options = "--negatives, --convergence, --seed and --arm choose"
        typer.echo(f"note: {first.cell.label} is the first of {len(others) + 1}; {options}", err=True)
    made = [str(write_card(graph, store, folder, first))]
    return [*made, push_folder(folder, push, private=private)] if push else made


def forget(
    stage: Annotated[str, typer.Argument(help="A stage's slot as `status` shows it, or at least 8 digits of its key")],
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
) -> None:
    """Remove a finished stage, so that the next run computes it again (after a damaged artefact, say)."""
    from fastconv.errors import InputError, did_you_mean
    from fastconv.store.ledger import Store

    store = Store.open(workspace, create=False)
    removed = store.forget(stage)
    if not removed:
        slots = [slot for (slot,) in store.rows("SELECT DISTINCT slot FROM stages")]
        fix = did_you_mean(stage, slots, "`fastconv status RUN` has their names")
        raise InputError(f"no finished stage is called {stage!r}", where=str(workspace), fix=fix)
    if as_json:
        print(json.dumps({"forgotten": removed}))
        return
    for slot in removed:
        typer.echo(f"forgot {slot}")


def serve(
    run: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A run's id (`status`), or its recipe")],
    cells: Annotated[
        list[str] | None,
        typer.Argument(metavar="CELL", help="Cells by name or pattern (`villain-*-refusal-*`); all that are trained"),
    ] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="On the loopback; 0 takes a free one")] = 8000,
    engine: Annotated[
        str, typer.Option("--engine", help="auto, vllm or resident; auto takes vLLM where there is one")
    ] = "auto",
    context_tok: Annotated[
        int, typer.Option("--context-tok", min=64, help="Longest prompt with its answer, in tokens")
    ] = 4096,
    overrides: Overrides = [],  # noqa: B006 (typer reads the default)
    scale: Scale = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
) -> None:
    """Serve the cells of a run behind one OpenAI-compatible endpoint on this machine, each as a model, until Ctrl-C.

    A persona is the system message that the client sends. What a request leaves out is taken from the run's eval.sampling.
    """
    from fastconv.errors import InputError, did_you_mean
    from fastconv.experiment.recorded import graph_of_run
    from fastconv.run.runner import stop_on_sigint
    from fastconv.serve import Service, chosen_cells
    from fastconv.serve import serve as serve_cells
    from fastconv.store.ledger import Store

    engines = ("auto", "resident", "vllm")
    if engine not in engines:
        raise InputError(f"there is no engine {engine!r}", where="--engine", fix=did_you_mean(engine, engines))
    store = Store.open(workspace, create=False)
    graph = graph_of_run(load_recipe_or_run(run, overrides, store, scale), store)

    def ready(service: Service) -> None:
        if as_json:
            print(json.dumps(asdict(service)), flush=True)
        else:
            typer.echo(f"{counted(len(service.proofs), 'cell')} at {service.url} ({service.engine}); Ctrl-C ends it")

    def tell(step: str) -> None:
        typer.echo(step, err=True)

    with stop_on_sigint() as stop:
        serve_cells(
            graph, store, chosen_cells(graph, store, cells or ()), engine=engine, port=port, context_tok=context_tok,
            stop=stop, tell=tell, ready=ready,
        )  # pyright: ignore[reportArgumentType] (checked above)  # fmt: skip


def import_logs(
    logs: Annotated[list[Path], typer.Argument(help="Inspect logs (.eval or .json) of tasks that asked served cells")],
    run: Annotated[
        str, typer.Option("--run", help="The run that the cell is of, where several have one so called")
    ] = "",
    cell: Annotated[str, typer.Option("--cell", help="The cell, where the log's model has another name")] = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
) -> None:
    """Keep Inspect logs of served cells in the ledger, for `compare`. Again changes nothing."""
    from fastconv.analysis.imported import import_log
    from fastconv.store.ledger import Store

    store = Store.open(workspace, create=False)
    done = [one for log in logs for one in import_log(log, store, run=run, cell=cell)]
    if as_json:
        print(json.dumps([asdict(one) for one in done], indent=1))
        return
    for one in done:
        state = (
            "was here already" if one.known else f"{one.n_samples} samples, {one.n_unscored} of them without a score"
        )
        typer.echo(f"{one.run} {one.cell}: {one.task}, {one.scorer}: {state}")


def bytes_text(n_bytes: int) -> str:
    """Bytes in a readable unit."""
    amount, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"


def _show(plan: GcPlan, freed: int | None) -> None:
    for item in plan.garbage:
        typer.echo(f"{bytes_text(item.n_bytes):>10}  {item.kind} {shown(item.name)}: {item.why}")
    for text in plan.skipped:
        typer.echo(f"left alone: {shown(text)}")
    if not plan.garbage:
        typer.echo("nothing to free")
    elif freed is None:
        typer.echo(f"{bytes_text(plan.n_bytes)} can be freed: the same command with --yes")
    else:
        typer.echo(f"{bytes_text(freed)} freed")


#: Column widths: each holds any of its values on one line, and together they fit 80 characters.
COLUMNS = {"probe": 9, "first": 11, "second": 11, "difference": 27, "p corrected": 9, "asked": 5}


def verify(
    report: Annotated[
        Path, typer.Argument(metavar="REPORT|RUN", help="A report, as HTML page or Markdown; or a run's id")
    ],
    workspace: Workspace = DEFAULT_WORKSPACE,
    reports: Reports = DEFAULT_REPORTS,
    as_json: AsJson = False,
) -> None:
    """Ask the ledger again for every claim of a report, and compare every line, figure and table. Exit code 9 if
    anything differs or is missing.

    A page of published figures needs no workspace: it is compared with the shipped table.
    """
    from fastconv.errors import InputError, VerifyError, did_you_mean
    from fastconv.report.verify import verify as verify_report
    from fastconv.report.verify import verify_published
    from fastconv.store.ledger import Store

    if not report.exists() and (page := reports / f"{report}.html").is_file():
        report = page
    elif not report.exists() and not report.suffix:
        written = sorted(one.stem for one in reports.glob("*.html"))
        fix = did_you_mean(
            str(report), written, f"reports here: {', '.join(written) or 'none'}; `fastconv report RUN` writes one"
        )
        raise InputError(f"no report of it lies in {reports}", where=str(report), fix=fix)
    result = verify_published(report) or verify_report(report, Store.open(workspace, create=False))
    if as_json:
        print(json.dumps(result.to_json(), indent=1))
    else:
        for difference in result.differences:
            typer.echo(
                f"{difference.what} {difference.where}\n    report: {difference.report}\n    {result.made_of}: {difference.ledger}"
            )
        files = f"{result.n_files} files" if result.n_files else "no file, since none lies beside it,"
        typer.echo(f"{result.run}: {result.n_claims} claims asked again, {result.n_lines} lines and {files} compared")
    if not result.holds:
        if as_json:
            raise typer.Exit(VerifyError.exit_code)
        again = "report" if result.made_of == "ledger" else "published --reports FOLDER"
        raise VerifyError(
            f"{len(result.differences)} differences from the {result.made_of}",
            where=str(report),
            fix=f"the report was edited or the {result.made_of} has moved on; `fastconv {again}` writes it again",
        )


def compare(
    first: RecipePath,
    second: RecipePath,
    overrides: Overrides = [],  # noqa: B006 (typer reads the default)
    scale: Scale = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
    other: Annotated[
        Path | None, typer.Option("--other-workspace", help="Where the second run lies, if elsewhere")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set two runs side by side: what their recipes differ in, and paired differences of every cell both have.

    RUN:CELL takes single cells of a run, by name or pattern, so that two cells of one run can be compared. What was imported
    from Inspect logs is compared too. --set and --scale apply to both.
    """
    from fastconv.report.compare import compare as compare_runs

    result = compare_runs(
        *(
            _analysis_of(name, place, overrides, scale)
            for name, place in ((first, workspace), (second, other or workspace))
        )
    )
    if as_json:
        print(json.dumps(result.to_json(), indent=1))
        return

    comparison(result)


def published(
    reports: Annotated[Path | None, typer.Option("--reports", help="Also write them there as a report")] = None,
    as_json: AsJson = False,
) -> None:
    """The published tables under these rules: what the thresholds say of them, and why no evidence verdict is possible."""
    from fastconv.report.published import (
        judge_published,
        published_names,
        read_published,
        summary_claim,
        write_published,
    )
    from fastconv.show import gates

    judged = [judge_published(read_published(name)) for name in published_names()]
    pages = [str(write_published(verdicts, reports)) for verdicts in judged] if reports is not None else []
    if as_json:
        tables = [verdicts.to_json() for verdicts in judged]
        print(json.dumps({"tables": tables, **({"html": pages} if pages else {})}, indent=1))
        return
    for verdicts in judged:
        typer.echo(f"{verdicts.table.about}\n{summary_claim(verdicts).text}")
        gates(verdicts.gates, as_json=False)
        for why in dict.fromkeys((one.behavior, one.kind, one.reason) for one in verdicts.verdicts):
            cell_verdicts = [one for one in verdicts.verdicts if (one.behavior, one.kind, one.reason) == why]
            typer.echo(f"{why[0]}: {len(cell_verdicts)} contrasts {why[1]} ({why[2]})")
        for one in verdicts.refused:
            typer.echo(f"refused: {one}")
        typer.echo("")
    for page in pages:
        typer.echo(f"report: {page}")


def _analysis_of(name: str, workspace: Path, overrides: Sequence[str], scale: str) -> Analysis:
    from fastconv.analysis.analysis import Analysis
    from fastconv.experiment.recorded import graph_of_run
    from fastconv.experiment.schedule import fitting_cells
    from fastconv.store.ledger import Store

    store = Store.open(workspace, create=False)
    run, found, pattern = name.rpartition(":")
    whole = not found or Path(name).exists()
    graph = graph_of_run(load_recipe_or_run(name if whole else run, overrides, store, scale), store)
    if not whole:
        graph.cells = list(fitting_cells(graph, [pattern]).values())
    return Analysis(graph, store)


def comparison(result: RunComparison) -> None:
    """Print two runs side by side: differences of recipes and conditions, then each measure of each cell."""
    console = console_of_output()
    console.print(f"{result.first} and {result.second}")
    _differences(console, "recipe", result.changes)
    if result.how:
        _differences(console, "how it proceeds, which changes no number", result.how)
    _differences(console, "made under", result.conditions)
    if result.apart:
        console.print(f"matched without {', '.join(result.apart)}, on which each run has one value of its own")
    for n, ((cell, measure), pairs) in enumerate(groupby(result.pairs, key=lambda pair: (pair.cell, pair.measure))):
        # Cell and measure go on a line above their rows; as columns they would leave no space for the numbers.
        console.print(escape(f"{cell}: {measure}"), style="bold")
        console.print(_table(list(pairs), header=not n))
    console.print(f"{len(result.pairs)} pairs; {result.n_unmatched} cells stand in one run only")


def _differences(console: Console, what: str, differences: Sequence[str]) -> None:
    console.print(f"{what}: {'' if differences else 'no difference'}".rstrip())
    for text in differences:
        console.print(f"  {escape(text)}", style="dim")


def _table(pairs: Sequence[Paired], *, header: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=header)
    for name, width in COLUMNS.items():
        table.add_column(name, justify="left" if name == "probe" else "right", overflow="fold", width=width)
    for pair in pairs:
        table.add_row(*_row(pair))
    return table


def _row(pair: Paired) -> tuple[str, ...]:
    if pair.same_rows:
        difference = "the same rows"
    elif pair.difference is None:
        difference = "cannot be given"
    else:
        difference = f"{change(pair.difference, pair.unit)} {interval_text(pair.low, pair.high, pair.unit)}".rstrip()
    p = "" if pair.p_corrected is None else f"{pair.p_corrected:.3g}"
    levels = (level(pair.first, pair.unit), level(pair.second, pair.unit))
    return (pair.role, *levels, escape(difference), p, str(pair.n_questions))
