"""The verbs that look at finished findings: `verify` and `compare`. The command line registers them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastconv.cli.kit import DEFAULT_WORKSPACE, AsJson, Workspace, answered, load_or_recall

if TYPE_CHECKING:
    from fastconv.deciding.decided import Decided


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (verify, compare, published):
        app.command()(answered(verb))


def verify(
    report: Annotated[Path, typer.Argument(help="A report, as HTML page or Markdown")],
    workspace: Workspace = DEFAULT_WORKSPACE,
    as_json: AsJson = False,
) -> None:
    """Ask the ledger again for every claim of a report, and compare every line. Exit code 9 if anything differs."""
    from fastconv.errors import VerifyError
    from fastconv.reporting.verifying import verify as check
    from fastconv.store import Store

    found = check(report, Store.open(workspace, create=False))
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        for one in found.differences:
            typer.echo(f"{one.what} {one.where}\n    report: {one.report}\n    ledger: {one.ledger}")
        typer.echo(f"{found.run}: {found.n_claims} claims asked again, {found.n_lines} lines compared")
    if not found.holds:
        if as_json:
            raise typer.Exit(VerifyError.exit_code)
        raise VerifyError(
            f"{len(found.differences)} differences from the ledger",
            where=str(report),
            fix="the report was edited or the ledger has moved on; `fastconv report` writes it again",
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
    from fastconv.reporting.comparing import compare as pair_up

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
    from fastconv.reporting.published import judge_published, write_published
    from fastconv.show import gates

    found = judge_published()
    page = write_published(found, reports) if reports is not None else None
    if as_json:
        print(json.dumps({**found.to_json(), **({"html": str(page)} if page else {})}, indent=1))
        return
    gates(found.gates, as_json=False)
    for why in dict.fromkeys((one.behavior, one.kind, one.reason) for one in found.verdicts):
        mine = [one for one in found.verdicts if (one.behavior, one.kind, one.reason) == why]
        typer.echo(f"{why[0]}: {len(mine)} contrasts {why[1]} ({why[2]})")
    for one in found.refused:
        typer.echo(f"refused: {one}")
    if page is not None:
        typer.echo(f"report: {page}")


def _decided(name: str, workspace: Path) -> Decided:
    from fastconv.deciding.decided import Decided
    from fastconv.graph import Graph
    from fastconv.store import Store

    store = Store.open(workspace, create=False)
    return Decided(Graph(load_or_recall(name, [], store)), store)
