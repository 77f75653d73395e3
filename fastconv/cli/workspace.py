"""Commands on workspaces: `merge` and `gc`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastconv.cli.common import DEFAULT_WORKSPACE, AsJson, Workspace, with_exit_codes

if TYPE_CHECKING:
    from fastconv.run.gc import GcPlan


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for verb in (merge, gc):
        app.command()(with_exit_codes(verb))


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
        typer.echo(f"{bytes_text(item.n_bytes):>10}  {item.kind} {item.name}: {item.why}")
    for text in plan.skipped:
        typer.echo(f"left alone: {text}")
    if not plan.garbage:
        typer.echo("nothing to free")
    elif freed is None:
        typer.echo(f"{bytes_text(plan.n_bytes)} can be freed: the same command with --yes")
    else:
        typer.echo(f"{bytes_text(freed)} freed")
