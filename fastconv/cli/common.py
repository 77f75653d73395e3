"""Arguments and helpers that all commands share: recipes, workspaces, and errors as one line with an exit code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from fastconv.errors import FastconvError, RecipeError, did_you_mean

DEFAULT_WORKSPACE = Path("checkpoints")
DEFAULT_REPORTS = Path("reports")
_RECIPE_HELP = "A recipe's path, a shipped one's name (`recipe list`), or a run's id (`status`)"


def _recipes_and_runs(incomplete: str) -> list[str]:
    """What a shell completes a recipe from: shipped names, TOML files of this folder, runs of the default workspace."""
    from fastconv.datasets.files import shipped_recipes

    names = [*shipped_recipes(), *map(str, Path().glob("*.toml")), *map(str, Path().glob("recipes/*.toml"))]
    try:
        store = open_existing(DEFAULT_WORKSPACE)
        names += [row["id"] for row in store.runs()] if store else []
    except FastconvError:
        pass  # a key press is no place to tell of a damaged ledger
    return [name for name in names if name.startswith(incomplete)]


def _keys(incomplete: str) -> list[str]:
    from fastconv.recipe import recipe_keys

    return [f"{one.key}=" for one in recipe_keys() if one.key.startswith(incomplete)]


RecipePath = Annotated[
    str, typer.Argument(metavar="RECIPE|RUN", help=_RECIPE_HELP, autocompletion=_recipes_and_runs, show_default=False)
]
RecipeOption = Annotated[
    str, typer.Option("--recipe", metavar="RECIPE|RUN", help=_RECIPE_HELP, autocompletion=_recipes_and_runs)
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key: --set convergence.lr=1e-4 (repeatable; `recipe explain`)",
        autocompletion=_keys,
    ),
]  # fmt: skip
Scale = Annotated[
    str, typer.Option("--scale", help="A smaller one: tiny (random weights, every stage) or demo (the embedded model)")
]
Workspace = Annotated[Path, typer.Option("--workspace", "-w", help="Folder of the ledger and the adapters")]
Reports = Annotated[Path, typer.Option("--reports", help="Folder for the reports")]
WithModel = Annotated[bool, typer.Option("--with-model", help="Let the base read the rows too (a run does)")]
AsJson = Annotated[bool, typer.Option("--json", help="Answer as JSON on standard output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say only the end")]


def with_exit_codes(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn fastconv's errors into one line and an exit code. Another exception is a defect and keeps its traceback."""

    @wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except FastconvError as error:
            error = _naming_its_file(error, str(kwargs.get("recipe") or ""))
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


def _naming_its_file(error: FastconvError, recipe: str) -> FastconvError:
    """A fault of a recipe that only its key names ("grid.sources") names the recipe too."""
    if type(error) is not RecipeError or not recipe or recipe in error.where or error.where.startswith(("--", "/")):
        return error
    return RecipeError(error.what, where=f"{recipe}: {error.where}" if error.where else recipe, fix=error.fix)


def load(name: str, overrides: Sequence[str], scale: str = "", workspace: Path | None = None) -> Any:
    """A recipe by path, by shipped name, or as a run of the workspace has it; with overrides, scaled down if requested.

    Overrides apply last. Raises RecipeError for an unknown name, with the nearest recipe or run.
    """
    from fastconv.datasets.files import find_recipe

    is_recipe = find_recipe(name).exists() or Path(name).suffix or len(Path(name).parts) > 1
    store = None if is_recipe or workspace is None else open_existing(workspace)
    try:
        return load_recipe_or_run(name, overrides, store, scale)
    finally:
        if store is not None:
            store.close()


def load_recipe_or_run(name: str, overrides: Sequence[str], store: Any, scale: str = "") -> Any:
    """As `load`, from an open store (or None)."""
    from fastconv.datasets.files import find_recipe, shipped_recipes
    from fastconv.experiment.scale import scaled
    from fastconv.recipe import load_recipe, parse_recipe, with_overrides

    path, row = find_recipe(name), store.run(name) if store else None
    if row is not None and not path.exists():
        recipe = with_overrides(parse_recipe(json.loads(row["recipe"]), where=name), overrides)
    elif path.exists() or path.suffix or len(path.parts) > 1:
        recipe = load_recipe(path, overrides)
    else:
        runs = [row["id"] for row in store.runs()] if store else []
        fix = "give a recipe's path, a shipped recipe's name (`fastconv recipe list`) or a run's id (`fastconv status`)"
        fix = did_you_mean(name, [*shipped_recipes(), *runs], fix)
        raise RecipeError("no recipe or run is called this", where=name, fix=fix)
    return with_overrides(scaled(recipe, scale), overrides) if scale else recipe


def open_existing(workspace: Path) -> Any:
    """The workspace's store, or None if it has no ledger."""
    from fastconv.store.ledger import Store

    return Store.open(workspace, create=False) if (workspace / "ledger.sqlite").is_file() else None
