"""The verbs that look at finished findings: `verify` and `compare`. The command line registers them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastconv.cli.common import DEFAULT_WORKSPACE, AsJson, Workspace, answered, load_or_recall

if TYPE_CHECKING:
    from fastconv.analysis.analysis import Decided


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (verify, compare, published):
        app.command()(answered(verb))


def verify(
    report: Annotated[Path, typer.Argument(help="A report, as HTML page or Markdown")],
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
) -> None:
    """Ask the ledger again for every claim of a report, and compare every line. Exit code 9 if anything differs.

    A page of published figures needs no workspace: it is compared with the shipped table.
    """
    from fastconv.errors import VerifyError
    from fastconv.report.verify import verify as check
    from fastconv.report.verify import verify_published
    from fastconv.store.ledger import Store

    found = verify_published(report) or check(report, Store.open(workspace, create=False))
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        for one in found.differences:
            typer.echo(f"{one.what} {one.where}\n    report: {one.report}\n    {found.made_of}: {one.ledger}")
        typer.echo(f"{found.run}: {found.n_claims} claims asked again, {found.n_lines} lines compared")
    if not found.holds:
        if as_json:
            raise typer.Exit(VerifyError.exit_code)
        again = "report" if found.made_of == "ledger" else "published --reports FOLDER"
        raise VerifyError(
            f"{len(found.differences)} differences from the {found.made_of}",
            where=str(report),
            fix=f"the report was edited or the {found.made_of} has moved on; `fastconv {again}` writes it again",
        )


def compare(
    first: Annotated[str, typer.Argument(help="A run's id, or a recipe's path or name")],
    second: Annotated[str, typer.Argument(help="The run to set beside it")],
    workspace: Workspace = DEFAULT_WORKSPACE,
    other: Annotated[
        Path | None, typer.Option("--other-workspace", help="Where the second run lies, if elsewhere")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set two runs side by side: what their recipes differ in, and paired differences of every cell both have."""
    from fastconv.report.compare import compare as pair_up

    found = pair_up(_decided(first, workspace), _decided(second, other or workspace))
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
        return
    from fastconv.show.findings import comparison

    comparison(found)


def published(
    reports: Annotated[Path | None, typer.Option("--reports", help="Also write them there as a report")] = None,
    as_json: AsJson = False,
) -> None:
    """The published tables under these rules: what the thresholds say of them, and why no evidence verdict is possible."""
    from fastconv.report.published import judge_published, published_names, read_published
    from fastconv.report.published_page import lead, write_published
    from fastconv.show import gates

    judged = [judge_published(read_published(name)) for name in published_names()]
    pages = [str(write_published(found, reports)) for found in judged] if reports is not None else []
    if as_json:
        tables = [found.to_json() for found in judged]
        print(json.dumps({"tables": tables, **({"html": pages} if pages else {})}, indent=1))
        return
    for found in judged:
        typer.echo(f"{found.table.about}\n{lead(found).text}")
        gates(found.gates, as_json=False)
        for why in dict.fromkeys((one.behavior, one.kind, one.reason) for one in found.verdicts):
            mine = [one for one in found.verdicts if (one.behavior, one.kind, one.reason) == why]
            typer.echo(f"{why[0]}: {len(mine)} contrasts {why[1]} ({why[2]})")
        for one in found.refused:
            typer.echo(f"refused: {one}")
        typer.echo("")
    for page in pages:
        typer.echo(f"report: {page}")


def _decided(name: str, workspace: Path) -> Decided:
    from fastconv.analysis.analysis import Decided
    from fastconv.experiment.graph import Graph
    from fastconv.store.ledger import Store

    store = Store.open(workspace, create=False)
    return Decided(Graph(load_or_recall(name, [], store)), store)
