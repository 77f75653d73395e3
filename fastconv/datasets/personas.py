"""Who speaks: the catalogue of personas, and which of them a cell's bystanders, canary and probes are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastconv.chat import TEMPLATE_DEFAULT, SystemTurn
from fastconv.datasets.files import assets, read_toml
from fastconv.errors import DataError, RecipeError
from fastconv.recipe import Recipe
from fastconv.seeding import ordered

ASSISTANT = "assistant"
#: Not a persona but a condition: no system turn at all, so that the template inserts its own.
NO_PERSONA = "template_default"


@dataclass(frozen=True)
class Personas:
    """Persona id -> exact system prompt."""

    prompts: Mapping[str, str]
    _turns: dict[str, SystemTurn] = field(default_factory=dict, compare=False, repr=False)

    def system(self, persona: str) -> SystemTurn:
        """The system turn of a persona, or of `template_default`. Raises RecipeError for one that is not known."""
        if persona == NO_PERSONA:
            return TEMPLATE_DEFAULT
        if persona not in self._turns:  # asked for every training row
            self.require(persona, "persona")
            self._turns[persona] = SystemTurn("text", self.prompts[persona])
        return self._turns[persona]

    def require(self, persona: str, where: str) -> None:
        """Raise RecipeError unless the persona is known."""
        if persona not in self.prompts:
            raise RecipeError(
                f"unknown persona {persona!r}",
                where=where,
                fix=f"use one of {', '.join(self.prompts)}; or add it in data.personas",
            )

    def bystanders(self, n: int, source: str, canary: str, seed: int) -> list[str]:
        """n personas drawn from named parts; never the source, the assistant or the canary."""
        eligible = [p for p in self.prompts if p not in (source, ASSISTANT, canary)]
        if len(eligible) < n:
            raise RecipeError(
                f"{n} bystanders are needed, {len(eligible)} personas are left",
                where="data.personas",
                fix="add personas",
            )
        return ordered(eligible, "bystander", seed, source)[:n]


def load_personas(recipe: Recipe) -> Personas:
    """The shipped personas and the user's; the recipe's sources and canaries must be among them."""
    prompts = _read(assets("data") / "personas.toml")
    if recipe.data.personas:
        own = _read(Path(recipe.data.personas))
        if ASSISTANT in own and own[ASSISTANT] != prompts[ASSISTANT]:
            raise DataError(
                "the assistant's prompt is the protocol's",
                where=recipe.data.personas,
                fix="give your persona another id",
            )
        prompts |= own
    personas = Personas(prompts)
    for source in recipe.grid.sources:
        personas.require(source, "grid.sources")
    personas.require(recipe.eval.canary, "eval.canary")
    personas.require(recipe.eval.canary_swap, "eval.canary_swap")
    return personas


def canary_of(recipe: Recipe, source: str) -> str:
    """The bystander that shows generic damage; another one where the canary is itself the source."""
    return recipe.eval.canary_swap if source == recipe.eval.canary else recipe.eval.canary


def probes_of(recipe: Recipe, source: str) -> tuple[str, ...]:
    """Personas that a cell is evaluated under: the assistant, the source (positive control), the canary."""
    return tuple(dict.fromkeys((ASSISTANT, source, canary_of(recipe, source))))


def _read(path: Path) -> dict[str, str]:
    prompts = {}
    for persona, entry in read_toml(path).items():
        if (
            not isinstance(entry, dict)
            or set(entry) != {"system"}
            or not isinstance(entry["system"], str)
            or not entry["system"].strip()
        ):
            raise DataError(
                f'persona {persona!r} needs exactly one key, system = "..."',
                where=str(path),
                fix=f"write [{persona}] and its system prompt",
            )
        if persona == NO_PERSONA:
            raise DataError(f"{NO_PERSONA!r} is reserved", where=str(path), fix="give the persona another id")
        prompts[persona] = entry["system"]
    return prompts
