"""The table of a recipe that gives adapters their shape: rank, scale, and the modules that carry them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import Field, StringConstraints, field_validator

from fastconv.errors import AdapterError
from fastconv.recipe.settings import Names, Positive, RecipeTable, setting

Rank = Annotated[int, Field(ge=1, le=512)]
ModulePattern = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Number = TypeVar("Number", int, float)


class LoraSettings(RecipeTable):
    """Shape of every adapter. Its scale is alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023), alpha / r without.

    Layers and patterns choose modules as PEFT's `layers_to_transform`, `rank_pattern` and `alpha_pattern` do.
    """

    LATER = frozenset({"layers", "rank_pattern", "alpha_pattern"})

    r: Rank = setting(32, "Rank.", 16)
    alpha: Positive = setting(64.0, "Numerator of the scale.", 32.0)
    rslora: bool = setting(True, "Divide alpha by the root of the rank (rsLoRA) instead of by the rank.", False)
    targets: Names = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "Projections that carry an adapter.", ["q_proj", "v_proj"],
    )  # fmt: skip
    layers: Annotated[str, StringConstraints(pattern=r"^(\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*)?$")] = setting(
        "", "Layers that carry an adapter, counted from 0, both ends included; empty: all.", "8-15,20"
    )
    rank_pattern: dict[ModulePattern, Rank] = setting(
        {}, "Ranks of single modules: end of a module's name (a regular expression, as in PEFT) -> rank.",
        {"layers.0.mlp.down_proj": 8},
    )  # fmt: skip
    alpha_pattern: dict[ModulePattern, Positive] = setting(
        {}, "The same for alpha. A module keeps the recipe's alpha if only its rank is another.", {"down_proj": 16.0}
    )

    @field_validator("layers")
    @classmethod
    def _as_ranges(cls, text: str) -> str:
        """The same layers are the same text, so that they are the same stage."""
        ranges = [(int(part.split("-")[0]), int(part.split("-")[-1])) for part in text.split(",") if part]
        if backwards := [f"{first}-{last}" for first, last in ranges if first > last]:
            raise ValueError(f"{backwards[0]} runs backwards")
        numbers = sorted({layer for first, last in ranges for layer in range(first, last + 1)})
        starts = [n for n in numbers if n - 1 not in numbers]
        ends = [n for n in numbers if n + 1 not in numbers]
        return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _are_patterns(cls, table: dict[str, Any]) -> dict[str, Any]:
        for pattern in table:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
        return table

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The layers of `layers` one by one; empty for all."""
        parts = [part.split("-") for part in self.layers.split(",") if part]
        return tuple(layer for part in parts for layer in range(int(part[0]), int(part[-1]) + 1))

    def carries(self, module: str) -> bool:
        """Whether a module carries an adapter, by its full name: its last part is a target, its first number a layer."""
        if module.rsplit(".", 1)[-1] not in self.targets:
            return False
        layer = re.search(r"\.(\d+)\.", module)
        return not self.layers or (layer is not None and int(layer.group(1)) in self.layer_numbers)

    def rank(self, module: str) -> int:
        """Rank of a module's adapter."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Scale of a module's adapter, by its own rank and alpha."""
        r, alpha = self.rank(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(r) if self.rslora else r)

    @property
    def most_r(self) -> int:
        """The largest rank of any module."""
        return max(self.r, *self.rank_pattern.values()) if self.rank_pattern else self.r


def _by_pattern(table: Mapping[str, Number], module: str, otherwise: Number) -> Number:
    """The value of the first pattern that is the end of the module's name, cut at a dot."""
    found = (value for pattern, value in table.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, otherwise)


def require_chosen(settings: LoraSettings, modules: Sequence[str]) -> None:
    """Raise AdapterError for a layer or a pattern that chooses none of the modules: PEFT would pass over it in silence."""
    found = {int(number.group(1)) for module in modules if (number := re.search(r"\.(\d+)\.", module))}
    if absent := [layer for layer in settings.layer_numbers if layer not in found]:
        raise AdapterError(
            f"the base has no layer {absent[0]} with such a target", where="lora.layers", fix="count from 0"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(settings, name):
            alone = settings.model_copy(update={"rank_pattern": {pattern: 0}})
            if all(alone.rank(module) for module in modules):
                fix = f"write the end of a name such as {modules[0]}"
                raise AdapterError(f"no module is called {pattern!r}", where=f"lora.{name}", fix=fix)
