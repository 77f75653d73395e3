"""The personas with their system prompts, and which of them are a source's bystanders, canary and probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastconv.chat import TEMPLATE_DEFAULT, SystemTurn, parse_system_turn
from fastconv.datasets.files import assets, is_visible, read_toml
from fastconv.errors import DataError, RecipeError, did_you_mean
from fastconv.recipe import OWN_ROLES, Recipe
from fastconv.seeding import seeded_order

ASSISTANT = "assistant"
#: Not a persona but the condition without a system turn, so that the chat template inserts its own.
NO_PERSONA = "template_default"


@dataclass(frozen=True)
class Personas:
    """The known personas: id -> exact system prompt."""

    prompts: Mapping[str, str]
    #: Shipped personas whose prompt the user's file replaces by another.
    replaced: tuple[str, ...] = ()
    #: System turns that the recipe gives to arms and probes of its own, by their names: conditions, not personas.
    conditions: Mapping[str, SystemTurn] = field(default_factory=dict)
    _turns: dict[str, SystemTurn] = field(default_factory=dict, compare=False, repr=False)

    def system(self, persona: str) -> SystemTurn:
        """The system turn of a persona, a condition, or `template_default`. Raises RecipeError for an unknown one."""
        if persona == NO_PERSONA:
            return TEMPLATE_DEFAULT
        if persona in self.conditions:
            return self.conditions[persona]
        if persona not in self._turns:  # asked for every training row
            self.require(persona, "persona")
            self._turns[persona] = SystemTurn("text", self.prompts[persona])
        return self._turns[persona]

    def require(self, persona: str, where: str) -> None:
        """Raise RecipeError naming `where` unless the persona is known."""
        if persona not in self.prompts:
            raise RecipeError(
                f"unknown persona {persona!r}",
                where=where,
                fix=self.how_to_name(persona),
            )

    def how_to_name(self, persona: str) -> str:
        """The mend for a persona that is not known."""
        near = did_you_mean(persona, self.prompts, f"use one of {', '.join(self.prompts)}.")
        return f"{near} Or add it in data.personas"

    def bystanders(self, n: int, source: str, canary: str, seed: int) -> list[str]:
        """n personas drawn by `seeding`, never the source, the assistant or the canary. Raises RecipeError for too few."""
        eligible = [persona for persona in self.prompts if persona not in (source, ASSISTANT, canary)]
        if len(eligible) < n:
            raise RecipeError(
                f"{n} bystanders are needed, {len(eligible)} personas are left",
                where="data.personas",
                fix="add personas",
            )
        return seeded_order(eligible, "bystander", seed, source)[:n]


def load_personas(recipe: Recipe) -> Personas:
    """The shipped personas and the user's.

    Raises RecipeError if a source, a canary or a gate's persona of the recipe is not among them, DataError for a bad file.
    """
    prompts = shipped = _read(assets("data") / "personas.toml")
    if recipe.data.personas:
        user_prompts = _read(Path(recipe.data.personas))
        if ASSISTANT in user_prompts and user_prompts[ASSISTANT] != prompts[ASSISTANT]:
            raise DataError(
                "the assistant's prompt is the protocol's",
                where=recipe.data.personas,
                fix="give your persona another id",
            )
        prompts = prompts | user_prompts
    replaced = tuple(name for name, text in shipped.items() if prompts[name] != text)
    personas = Personas(prompts, replaced, _conditions(recipe, Personas(prompts)))
    for source in recipe.grid.sources:
        personas.require(source, "grid.sources")
    personas.require(recipe.eval.canary, "eval.canary")
    personas.require(recipe.eval.canary_swap, "eval.canary_swap")
    personas.require(recipe.gates.negative_control, "gates.negative_control")
    if recipe.gates.g4_source:
        personas.require(recipe.gates.g4_source, "gates.g4_source")
    return personas


def _conditions(recipe: Recipe, personas: Personas) -> dict[str, SystemTurn]:
    """The system turns of arms that train under one of their own, and of the recipe's probes, by name."""
    turns: dict[str, SystemTurn] = {}
    for arm, settings in recipe.grid.arms.items():
        for source in recipe.grid.sources if settings.has_own_condition else ():
            turn = parse_system_turn(settings.system) if settings.system else personas.system(source)
            turns[speaker_of(recipe, source, arm)] = turn
    for name, probe in recipe.eval.probes.items():
        turns[name] = parse_system_turn(probe.system) if probe.system else personas.system(probe.persona or ASSISTANT)
    for name in turns:
        if name in personas.prompts or name in (NO_PERSONA, *OWN_ROLES):
            where = f"eval.probes.{name}" if name in recipe.eval.probes else "grid.arms"
            raise RecipeError(f"{name!r} is a persona or a probe already", where=where, fix="give it another name")
    return turns


def canary_of(recipe: Recipe, source: str) -> str:
    """The persona whose change measures generic damage: eval.canary, or eval.canary_swap where that is the source."""
    return recipe.eval.canary_swap if source == recipe.eval.canary else recipe.eval.canary


def speaker_of(recipe: Recipe, source: str, arm: str) -> str:
    """The condition that the source's rows of an arm are trained under, and its positive control is asked under: the source,
    or one of the arm's own."""
    if not arm or not recipe.grid.arms[arm].has_own_condition:
        return source
    return arm if recipe.grid.arms[arm].system else f"{source}_{arm}"


def probes_of(recipe: Recipe, source: str, arm: str = "") -> tuple[str, ...]:
    """The conditions that a cell is evaluated under: assistant, source, canary, an arm's own prompt, the recipe's own probes.

    No repetitions. The positive control is `speaker_of`.
    """
    asked = (ASSISTANT, source, canary_of(recipe, source), speaker_of(recipe, source, arm), *recipe.eval.probes)
    return tuple(dict.fromkeys(asked))


def _read(path: Path) -> dict[str, str]:
    """Persona id -> system prompt from a TOML file."""
    prompts = {}
    for persona, entry in read_toml(path).items():
        if (
            not isinstance(entry, dict)
            or set(entry) != {"system"}
            or not isinstance(entry["system"], str)
            or not is_visible(entry["system"])
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
