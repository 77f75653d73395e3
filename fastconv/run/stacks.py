"""The resident base, and the stack of a stage live on it: adapters from the ledger, in order, proven by logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch

from fastconv.engine.device import query_gpu, require_fit, shape_on_disk
from fastconv.engine.locate import engine_identity
from fastconv.engine.model import Base, load_base
from fastconv.engine.selftest import self_test
from fastconv.engine.stack import Adapter, Probe, Slot, Stack, folded
from fastconv.errors import TrainingError
from fastconv.experiment.graph import Graph
from fastconv.store.ledger import Record, Stage, Store


class Stacks:
    """One base for a whole process, loaded when it is first needed, and the stacks of a recipe on it.

    `proven` are the self-tests that a GPU passed, each with how far apart it found things.
    """

    def __init__(self, graph: Graph, store: Store) -> None:
        self._graph = graph
        self._recipe = graph.recipe
        self._store = store
        self._at_hand: dict[str, Adapter] = {}
        self.proven: dict[str, float] = {}

    @cached_property
    def base(self) -> Base:
        """The base model; loaded when the first stage needs it, once. Raises ModelError if the GPU is not fit for it."""
        if engine_identity(self._recipe.model)["device"] == "cuda":
            require_fit(query_gpu(torch.cuda, torch.version.cuda), self._recipe, shape_on_disk(self._recipe.model))
        return load_base(self._recipe.model, self._graph.source)

    @cached_property
    def stack(self) -> Stack:
        """The live stack on the base; on a GPU proven by the self-tests before anything is computed with it."""
        stack = Stack(self.base, self._recipe.lora)
        if self.base.device.type == "cuda":
            self.proven |= self_test(stack, {self._recipe.convergence.optimizer, self._recipe.behavior.optimizer})
        return stack

    def adapters(self, needs: Mapping[str, Stage]) -> list[Adapter]:
        """The adapters of a stack in order: the snapshot, then the behavior. Verified against the ledger.

        Those of the stack before are still at hand: the probes of a cell follow one another.
        """
        stages = [needs[name] for name in ("snapshot", "behavior") if name in needs]
        names = [self.record(stage).outputs["adapter"] for stage in stages]
        self._at_hand = {
            sha256: self._at_hand.get(sha256)
            or self.stack.load_adapter(self._store.get(sha256, "safetensors"), stage.slot)
            for sha256, stage in zip(names, stages, strict=True)
        }
        return [self._at_hand[sha256] for sha256 in names]

    @contextlib.contextmanager
    def in_place(self, needs: Mapping[str, Stage]) -> Iterator[tuple[Adapter, ...]]:
        """The stack's adapters that are to be live; with published semantics the snapshot is folded in instead."""
        adapters = tuple(self.adapters(needs))
        if self._recipe.model.semantics == "published" and "snapshot" in needs:
            with folded(self.stack, adapters[:1], "published"):
                yield adapters[1:]
        else:
            yield adapters

    @contextlib.contextmanager
    def live_stack(self, stage: Stage) -> Iterator[dict[str, Any]]:
        """The stack of an evaluation (or of its score), live inside the block; gives the distances that prove it."""
        stage = stage.needs.get("eval", stage)
        top = stage.needs.get("behavior") or stage.needs.get("snapshot")
        recorded = Probe(tuple(self.record(top).outputs["probe"])) if top else None
        with self.in_place(stage.needs) as adapters, self.stack.live(*([Slot(frozen=adapters)] if adapters else [])):
            probe = self.stack.prove(recorded, stage.slot)
            proof = {"from_base": round(probe.distance(self.stack.base_probe), 6)}
            if recorded is not None:
                proof["from_recorded"] = round(probe.distance(recorded), 6)
            yield proof

    def record(self, stage: Stage) -> Record:
        """What a stage before this one gave. Raises TrainingError if it is not done."""
        record = self._store.record(stage.key)
        if record is None:
            raise TrainingError("a stage before it is missing", where=stage.slot, fix="run the recipe again")
        return record
