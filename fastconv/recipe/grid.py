"""The tables of a recipe that say what is compared: the grid of cells, and what each cell is asked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fastconv.recipe.settings import Name, Names, PositiveInt, RecipeTable, SamplingSettings, setting

ConvergenceKind = Literal["source", "generic", "none"]
NegativesKind = Literal["included", "excluded", "none"]


class GridSettings(RecipeTable):
    """The cells of the experiment: every combination of these lists (epoch 0 is the base without a snapshot)."""

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
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = setting(
        (42,), "Each draws its own rows, bystanders and weights; three that agree raise confidence.", [42, 137, 256]
    )

    @model_validator(mode="after")
    def _no_repeats(self) -> GridSettings:
        for field in type(self).model_fields:
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise ValueError(f"{field} names the same value twice: {list(values)}")
        if self.behaviors == ("none",):
            raise ValueError("behaviors names only the control `none`, which measures nothing without a behavior")
        return self


class EvalSettings(RecipeTable):
    """The evaluation; every probe gets the same questions and sample seeds at every epoch."""

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
