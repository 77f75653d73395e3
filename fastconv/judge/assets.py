"""What a recipe judges with: its rubrics and prices, shipped or the user's own, and the judge they make."""

from __future__ import annotations

from pathlib import Path

from fastconv.datasets.files import assets
from fastconv.errors import RecipeError
from fastconv.judge.budget import PriceTable, load_prices
from fastconv.judge.rubric import Rubric, load_rubric
from fastconv.recipe import JudgeSettings


def shipped_rubrics() -> dict[str, Path]:
    """The shipped rubric files by name."""
    return {path.stem: path for path in sorted((assets("data") / "rubrics").glob("*.toml"))}


def rubric_named(settings: JudgeSettings, name: str) -> Rubric:
    """A rubric by name: the recipe's own file where it gives one, else the shipped one. Raises RecipeError, DataError."""
    shipped = shipped_rubrics()
    if name in settings.rubrics:
        return load_rubric(Path(settings.rubrics[name]))
    if name not in shipped:
        raise RecipeError(
            f"no rubric is called {name!r}",
            where="judge.rubrics",
            fix=f'give its file there: judge.rubrics.{name} = "..."; shipped are {", ".join(shipped)}',
        )
    return load_rubric(shipped[name])


def prices_of(settings: JudgeSettings) -> PriceTable:
    """The shipped price table with the recipe's own over it. Raises DataError."""
    own = [Path(settings.prices)] if settings.prices else []
    return load_prices(assets("data") / "prices.toml", *own)
