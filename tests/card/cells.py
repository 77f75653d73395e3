"""One cell of pilot_small as it is asked: its base, the prompts of its probes, and stacks of none, one and two adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastconv.api import load_recipe
from fastconv.engine.lora import Adapter
from fastconv.engine.stack import Slot, Stack
from fastconv.experiment.graph import CellPlan, Graph
from fastconv.recipe import Recipe, SamplingSettings
from fastconv.run.sampling import SamplingRequests, sampling_requests
from fastconv.run.stacks import Stacks
from fastconv.store.ledger import Store
from fastconv.store.records import Stage
from tests.card.grid import PILOT, Grid
from tests.card.sheet import Job

#: Standard deviation of what stands in for trained weights where there are none.
_STAND_IN = 0.01
STACKS = ("base", "one adapter", "two adapters")


def recipe_of(job: Job, grid: Grid, *settings: str) -> Recipe:
    """The recipe of a grid with further settings, as the command line would load it."""
    named = [part for part in grid.named(job)[1:] if part not in ("--set", "--scale", "tiny")]
    return load_recipe(grid.recipe, [*named, *settings], scale="tiny" if job.rehearse else "")


@dataclass(frozen=True)
class Prompts:
    """The prompts of all probes of a cell (token ids) with their seeds and the sampling settings of the recipe."""

    requests: tuple[SamplingRequests, ...]

    @property
    def ids(self) -> list[tuple[int, ...]]:
        """Token ids of every prompt."""
        return [ids for one in self.requests for ids in one.prompts]

    @property
    def seeds(self) -> list[int]:
        """The seed of every prompt."""
        return [seed for one in self.requests for seed in one.seeds]

    @property
    def settings(self) -> SamplingSettings:
        """The recipe's sampling settings, which its probes share."""
        return self.requests[0].settings

    @property
    def longest_tok(self) -> int:
        """Tokens of the longest prompt with its completion."""
        return max(map(len, self.ids)) + self.settings.max_new_tok


class OpenCell:
    """The refusal cell of pilot_small at its last epoch, on the base that is loaded when it is first needed.

    Adapters are those of the first of these workspaces that has them; elsewhere random ones stand in, and `origin` says so.
    """

    def __init__(self, recipe: Recipe, workspaces: Sequence[Path], own: Path) -> None:
        self.recipe, self.graph = recipe, Graph(recipe)
        cells = [plan for plan in self.graph.cells if plan.cell.behavior == "refusal" and plan.adapter is not None]
        self.base_cell = next(plan for plan in cells if not plan.cell.epoch)
        self.last_cell = max(cells, key=lambda plan: plan.cell.epoch)
        self.store, self.origin = Store.open(own), "random weights stand in"
        for folder in workspaces:
            if (folder / "ledger.sqlite").is_file():
                store = Store.open(folder, create=False)
                if all(
                    self._has(store, stage)
                    for plan in (self.base_cell, self.last_cell)
                    for stage in plan.stack.values()
                ):
                    self.store, self.origin = store, f"trained, of the workspace {folder.parent.name}"
                    break
        self.stacks = Stacks(self.graph, self.store)

    @classmethod
    def of(cls, job: Job) -> OpenCell:
        """The cell for a part, with the adapters of whichever part has trained the grid."""
        trained = [job.workspace(name) for name in ("pilot", "killed", "engine")]
        return cls(recipe_of(job, PILOT), trained, job.workspace())

    @staticmethod
    def _has(store: Store, stage: Stage) -> bool:
        record = store.record(stage.key)
        return record is not None and store.path(record.outputs["adapter"], "safetensors").is_file()

    @property
    def trained(self) -> bool:
        """Whether the adapters are trained ones."""
        return self.origin.startswith("trained")

    @property
    def stack(self) -> Stack:
        """The stack on the base; on a GPU its self-tests run first."""
        return self.stacks.stack

    @cached_property
    def prompts(self) -> Prompts:
        """What every probe of the cell is asked: as many prompts as a run draws in one pass."""
        return self.asked(self.base_cell)

    def asked(self, plan: CellPlan) -> Prompts:
        """The prompts of all probes of a cell."""
        tokenizer = self.stacks.base.tokenizer
        evaluations = [stage.needs.get("eval", stage) for stage in plan.scores.values()]
        return Prompts(tuple(sampling_requests(stage, tokenizer) for stage in evaluations))

    @cached_property
    def adapters(self) -> dict[str, tuple[Adapter, ...]]:
        """The adapters of each of `STACKS`."""
        if self.trained:
            one, two = (tuple(self.stacks.adapters(plan.stack)) for plan in (self.base_cell, self.last_cell))
            return dict(zip(STACKS, ((), one, two), strict=True))
        made = [self.stack.new_adapter("card", place) for place in range(2)]
        for adapter in made:
            adapter.flat.normal_(0.0, _STAND_IN)
        return dict(zip(STACKS, ((), (made[0],), tuple(made)), strict=True))

    @contextlib.contextmanager
    def live(self, name: str) -> Iterator[None]:
        """One of `STACKS` is live in the block."""
        adapters = self.adapters[name]
        with self.stack.live(*([Slot(frozen=adapters)] if adapters else [])):
            yield
