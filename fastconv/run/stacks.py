"""The base of a process, loaded when it is first needed, and a recipe's stacks on it, each proven when it is put in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import torch

from fastconv.engine.ahead import compile_ahead
from fastconv.engine.device import query_gpu, require_fit, require_ram, shape_on_disk
from fastconv.engine.locate import engine_identity
from fastconv.engine.model import Base, load_base
from fastconv.engine.score import with_memory
from fastconv.engine.selftest import self_test
from fastconv.engine.stack import Adapter, Probe, Slot, Stack, folded
from fastconv.errors import TrainingError
from fastconv.experiment.graph import Graph
from fastconv.startup import StartTimes
from fastconv.store.ledger import Record, Stage, Store

#: Bytes of the host's memory for adapters that were just committed, of which the newest stays whatever its size: the three
#: snapshots of a pilot and two behaviors on one, at 1.5B and 7B. On a CPU, whose base lies in that memory, the newest alone.
_NEWEST_BYTES = {"cuda": 2**31, "cpu": 0}


class Stacks:
    """One base per process, loaded when it is first needed, and the stacks of a recipe on it.

    `proven` holds the self-tests passed on a GPU, each with the relative difference it measured. The seconds of loading
    and testing are added to `times`. Where stages are computed (`trains`), their kernels are compiled ahead.
    """

    def __init__(self, graph: Graph, store: Store, times: StartTimes | None = None, *, trains: bool = False) -> None:
        self._graph = graph
        self._recipe = graph.recipe
        self._store = store
        self._times = times or StartTimes()
        self._trains = trains
        self._cached: dict[str, Adapter] = {}
        #: The adapters that were committed last, on the CPU, by sha256; the oldest first.
        self._newest: dict[str, Adapter] = {}
        self.proven: dict[str, float] = {}

    @cached_property
    def base(self) -> Base:
        """The base model, loaded on first use. Raises ModelError if the GPU, or the RAM, cannot hold it."""
        if engine_identity(self._recipe.model)["device"] == "cuda":
            require_fit(query_gpu(torch.cuda, torch.version.cuda), self._recipe, shape_on_disk(self._recipe.model))
        else:
            require_ram(self._recipe, shape_on_disk(self._recipe.model))
        return load_base(self._recipe.model, self._graph.source, self._times)

    @cached_property
    def stack(self) -> Stack:
        """The stack on the base. On a GPU, the self-tests run before anything is computed with it."""
        stack = Stack(self.base, self._recipe.lora)
        if self.base.device.type == "cuda":
            if self._trains:
                with self._times.part("compile_s"):
                    self._compile_ahead(stack)
            optimizers = {self._recipe.convergence.optimizer, self._recipe.behavior.optimizer}
            with self._times.part("self_tests_s"):
                self.proven |= self_test(stack, optimizers)
        return stack

    def _compile_ahead(self, stack: Stack) -> None:
        """Compile what the recipe's stages launch; where there is no room, they compile it."""
        phases = (self._recipe.convergence, self._recipe.behavior)
        letters = any(behavior.spec.measure == "letters" for behavior in self._graph.behaviors.values())
        with_memory(partial(compile_ahead, stack, phases, self._recipe.eval.sampling, letters=letters))

    def adapters(self, needs: Mapping[str, Stage]) -> list[Adapter]:
        """The adapters of a stack in order (snapshot, behavior): as they were committed by this process, or read from their files
        and verified against the ledger.

        The previous stack's adapters stay cached, because the probes of one cell follow one another.
        """
        stages = [needs[name] for name in ("snapshot", "behavior") if name in needs]
        hashes = [self.record(stage).outputs["adapter"] for stage in stages]
        before, self._cached = self._cached, {}
        for sha256, stage in zip(hashes, stages, strict=True):
            self._cached[sha256] = before.get(sha256) or self._taken(sha256, stage.slot)
        return [self._cached[sha256] for sha256 in hashes]

    def _taken(self, sha256: str, slot: str) -> Adapter:
        """An adapter that the previous stack did not hold: kept since it was committed, or read from its file."""
        if sha256 in self._newest:
            return self.stack.take(self._newest[sha256])
        return self.stack.load_adapter(self._store.get(sha256, "safetensors"), slot)

    def keep_newest(self, sha256: str, adapter: Adapter) -> None:
        """Keep an adapter that was just committed, on the CPU and nobody else's: those of one snapshot are evaluated soon."""
        self._newest.pop(sha256, None)
        self._newest[sha256] = adapter
        most = _NEWEST_BYTES[self.base.device.type]
        while len(self._newest) > 1 and sum(kept.flat.nbytes for kept in self._newest.values()) > most:
            self._newest.pop(next(iter(self._newest)))

    @contextlib.contextmanager
    def in_place(self, needs: Mapping[str, Stage]) -> Iterator[tuple[Adapter, ...]]:
        """The adapters to attach. With published semantics the snapshot is folded into the base inside the block instead."""
        adapters = tuple(self.adapters(needs))
        if self._recipe.model.semantics == "published" and "snapshot" in needs:
            with folded(self.stack, adapters[:1], "published"):
                yield adapters[1:]
        else:
            yield adapters

    @contextlib.contextmanager
    def live_stack(self, stage: Stage) -> Iterator[dict[str, Any]]:
        """Attach the stack of an evaluation (or of its score) inside the block; yields the distances of its probe logits."""
        stage = stage.needs.get("eval", stage)
        top = stage.needs.get("behavior") or stage.needs.get("snapshot")
        recorded = Probe(tuple(self.record(top).outputs["probe"])) if top else None
        with self.in_place(stage.needs) as adapters, self.stack.live(*([Slot(frozen=adapters)] if adapters else [])):
            probe = self.stack.prove(recorded, stage.slot, self._recorded_as)
            proof = {"from_base": round(probe.distance(self.stack.base_probe), 6)}
            if recorded is not None:
                proof["from_recorded"] = round(probe.distance(recorded), 6)
            yield proof

    @cached_property
    def _recorded_as(self) -> Mapping[str, str] | None:
        """The engine that computed the run, where it is another than this one."""
        engine = self._graph.engine_inputs["engine"]
        return None if engine == engine_identity(self._recipe.model) else engine

    def record(self, stage: Stage) -> Record:
        """The record of a finished stage. Raises TrainingError if it is not done."""
        record = self._store.record(stage.key)
        if record is None:
            raise TrainingError("a stage before it is missing", where=stage.slot, fix="run the recipe again")
        return record
