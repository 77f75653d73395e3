"""`fastconv judge`: finish pending judging, judge again with another rubric, calibrate. Imports no torch."""

from __future__ import annotations

import difflib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastconv.cli.common import (
    DEFAULT_WORKSPACE,
    AsJson,
    Overrides,
    Quiet,
    RecipePath,
    Scale,
    Workspace,
    load,
    load_recipe_or_run,
    with_exit_codes,
)
from fastconv.errors import JudgeError


class _FinishByDefault(TyperGroup):
    """Makes `fastconv judge RUN` mean `fastconv judge finish RUN`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        word = args[0] if args else "--help"
        meant = difflib.get_close_matches(word, self.commands, cutoff=0.75)  # click says which
        if word not in self.commands and word != "--help" and not meant:
            args = ["finish", *args]
        return super().parse_args(ctx, args)


judge_app = typer.Typer(
    cls=_FinishByDefault,
    help="Judge what waits for the judge: `fastconv judge RUN`. Judge it again: `--rubric FILE`. Or calibrate.",
    no_args_is_help=True,
)


@judge_app.command()
@with_exit_codes
def finish(
    recipe: RecipePath,
    rubric: Annotated[
        Path | None, typer.Option("--rubric", help="Judge the kept completions by this rubric instead")
    ] = None,
    again: Annotated[
        str,
        typer.Option("--again", metavar="REASON", help="Also ask for what is unscored for this reason: malformed, ..."),
    ] = "",
    overrides: Overrides = [],  # noqa: B006 (typer reads the default)
    scale: Scale = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Judge what a run's judge still owes, without a GPU: completions are kept, judgements are never paid twice."""
    from fastconv.run.rejudge import finish_judging, with_rubric
    from fastconv.show.progress import agreement_json, judged_lines, watching
    from fastconv.store.ledger import Store

    store = Store.open(workspace, create=False)
    before = load_recipe_or_run(recipe, overrides, store, scale)
    store.close()
    loaded = before if rubric is None else with_rubric(before, rubric)
    with watching(quiet=quiet or as_json, stream=sys.stderr) as watcher:
        end = finish_judging(loaded, workspace, watcher, before=None if rubric is None else before, again=again)
    if as_json:
        agreement = {m: {o: agreement_json(a) for o, a in by.items()} for m, by in end.agreement.items()}
        status = {**asdict(end.status), "finished": len(end.status.finished)}
        print(json.dumps({"run": end.run, "n_judged_stages": end.n_committed, "pending": end.pending,
                          "judging": status, "agreement": agreement}))  # fmt: skip
        if end.pending:
            raise typer.Exit(JudgeError.exit_code)
        return
    for line in judged_lines(end):
        typer.echo(line)
    end.require_judged()


@judge_app.command()
@with_exit_codes
def calibrate(
    recipe: RecipePath = "",
    mode: Annotated[
        str, typer.Option("--mode", help="Without a recipe: live, batch, auto, local or substring")
    ] = "live",
    model: Annotated[str, typer.Option("--model", help="Without a recipe: the judge's model")] = "",
    base_url: Annotated[str, typer.Option("--base-url", help="Without a recipe: where it is asked")] = "",
    budget_usd: Annotated[
        float | None, typer.Option("--budget-usd", help="The most that judging in this workspace may ever cost")
    ] = None,
    rubrics: Annotated[list[str], typer.Option("--rubric", help="A rubric by name (repeatable); default: all")] = [],  # noqa: B006
    rows: Annotated[Path | None, typer.Option("--rows", help="Labelled rows of your own, for one rubric")] = None,
    overrides: Overrides = [],  # noqa: B006
    scale: Scale = "",
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
) -> None:
    """Measure a judge on labelled rows: accuracy, kappa, test-retest, position and length bias, injection attempts."""
    from fastconv.experiment.graph import Graph
    from fastconv.judge.budget import judge_identity, recipe_prices
    from fastconv.recipe import parse_recipe
    from fastconv.run.rejudge import calibrate_judge
    from fastconv.show.progress import agreement_json, calibrated_lines

    graph = Graph(load(recipe, overrides, scale, workspace)) if recipe else None
    if graph is not None:
        settings, judge = graph.recipe.judge, graph.judge
    else:
        table: dict[str, Any] = {"mode": mode, "model": model, "base_url": base_url, "budget_usd": budget_usd}
        settings = parse_recipe({"name": "calibrate", "judge": table}, where="calibrate").judge
        judge = judge_identity(settings, recipe_prices(settings), "")
    results = calibrate_judge(judge, settings, workspace, rubrics, rows=rows, graph=graph)
    if as_json:
        body = [
            {
                "rubric": result.rubric,
                "judge": result.judge.to_json() if result.judge else None,
                "phrases": agreement_json(result.phrases) if result.phrases else None,
                "rule": [{**asdict(one), "precision": one.precision, "recall": one.recall} for one in result.rule],
            }
            for result in results
        ]
        print(json.dumps(body))
        return
    for result in results:
        typer.echo("\n".join(calibrated_lines(result)))
