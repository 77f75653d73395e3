"""Arguments and helpers that all commands share: recipes, workspaces, and errors as one line with an exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from fastconv.errors import FastconvError

RecipePath = Annotated[str, typer.Argument(help="A recipe's path, or a shipped one's name, e.g. demo")]
Overrides = Annotated[list[str], typer.Option("--set", help="Override a key: --set convergence.lr=1e-4 (repeatable)")]
Scale = Annotated[
    str, typer.Option("--scale", help="A smaller one: tiny (random weights, every stage) or demo (the embedded model)")
]
Workspace = Annotated[Path, typer.Option("--workspace", "-w", help="Folder of the ledger and the adapters")]
Reports = Annotated[Path, typer.Option("--reports", help="Folder for the reports")]
WithModel = Annotated[bool, typer.Option("--with-model", help="Let the base read the rows too (a run does)")]
AsJson = Annotated[bool, typer.Option("--json", help="Answer as JSON on standard output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say only the end")]
DEFAULT_WORKSPACE = Path("checkpoints")
DEFAULT_REPORTS = Path("reports")


def with_exit_codes(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn fastconv's errors into one line and an exit code. Another exception is a defect and keeps its traceback."""

    @wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except FastconvError as error:
            if kwargs.get("as_json"):
                print(
                    json.dumps(
                        {"error": error.what, "where": error.where, "fix": error.fix, "exit_code": error.exit_code}
                    )
                )
            else:
                typer.echo(f"fastconv: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("fastconv: stopped at once; the same command goes on from the last kept state", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise typer.Exit(0) from None

    return run


def load(name: str, overrides: list[str], scale: str = "") -> Any:
    """A recipe by path or shipped name with overrides, scaled down if requested; overrides apply last."""
    from fastconv.experiment.graph import find_recipe
    from fastconv.recipe import load_recipe, with_overrides

    recipe = load_recipe(find_recipe(name), overrides)
    if not scale:
        return recipe
    from fastconv.experiment.scale import scaled

    return with_overrides(scaled(recipe, scale), overrides)


def load_recipe_or_run(name: str, overrides: list[str], store: Any, scale: str = "") -> Any:
    """A recipe by path or name, or the recipe of a run by the run's id."""
    from fastconv.recipe import parse_recipe

    row = store.run(name) if store and not overrides and not scale else None
    if row is not None:
        return parse_recipe(json.loads(row["recipe"]), where=name)
    return load(name, overrides, scale)


def open_existing(workspace: Path) -> Any:
    """The workspace's store, or None if it has no ledger."""
    from fastconv.store.ledger import Store

    return Store.open(workspace, create=False) if (workspace / "ledger.sqlite").is_file() else None
