"""Who draws completions: the resident base, or a vLLM server that gets the same stack as one concatenated adapter.

Both draw under whatever stack is live, so whoever asks for completions need not care which of them it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from fastconv.engine import room
from fastconv.engine.adapter import Adapter, concatenate
from fastconv.engine.base import Base, model_files, resolve_device, resolve_dtype
from fastconv.engine.completions import Client
from fastconv.engine.export import BaseReference, export_adapter
from fastconv.engine.locate import ModelSource
from fastconv.engine.sample import Drawn, sample
from fastconv.engine.serve import BASE_NAME, Server, adapter_folder, server_command
from fastconv.engine.stack import Stack
from fastconv.recipe import ModelSettings, Recipe, SamplingSettings, TrainSettings
from fastconv.shapes import shape_of

#: The server's log, in the workspace; each run begins it anew.
LOG_FILE = "vllm.log"

OnToken = Callable[[int], None]


class Sampler(Protocol):
    """Draws one completion per prompt, in order, under the stack that is live."""

    def draw(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: SamplingSettings, on_token: OnToken
    ) -> list[Drawn]: ...
    def close(self) -> None: ...


class Resident:
    """The base in this process; see `engine.sample`."""

    def __init__(self, base: Base) -> None:
        self._base = base

    def draw(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: SamplingSettings, on_token: OnToken
    ) -> list[Drawn]:
        """See `Sampler`."""
        return sample(self._base, prompts, seeds, settings, on_token)

    def close(self) -> None:
        """Nothing is held."""


class Served:
    """A vLLM server. Its draws are its own: the same seeds give other tokens than on the resident base.

    vLLM takes one adapter per prompt, so a stack is served concatenated, in the base's dtype as vLLM would cast it. A
    name is never used twice: vLLM keys its prefix cache by it, and would answer from another stack's cache.
    """

    def __init__(self, server: Server, stack: Stack) -> None:
        self._server = server
        self._stack = stack
        self._client = Client(server, n_connections=room.USEFUL_ROWS)
        self._on: tuple[Adapter, ...] = ()
        self._name = BASE_NAME
        self._n_served = 0

    def draw(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: SamplingSettings, on_token: OnToken
    ) -> list[Drawn]:
        """See `Sampler`. Raises SamplerError if the server is lost or refuses."""
        adapters = tuple(adapter for slot in self._stack.route.slots for adapter in slot.adapters)
        name = self._serve(adapters) if adapters else BASE_NAME
        return self._client.complete(name, prompts, seeds, settings, self._stack.base.tokenizer.stop_ids, on_token)

    def close(self) -> None:
        """End the client; the server is its owner's to end."""
        self._client.close()

    def _serve(self, adapters: tuple[Adapter, ...]) -> str:
        """The name under which these adapters are served; the probes of a cell follow one another."""
        if len(adapters) == len(self._on) and all(a is b for a, b in zip(adapters, self._on, strict=True)):
            return self._name
        if self._on:
            self._client.unload(self._name)
            shutil.rmtree(self._server.folder / self._name, ignore_errors=True)
            self._on = ()
        self._n_served += 1
        self._name = f"stack-{self._n_served}"
        folder = self._server.folder / self._name
        export_adapter(concatenate(adapters), BaseReference(BASE_NAME), folder, self._stack.base.dtype)
        self._client.load(self._name, str(folder))
        self._on = adapters
        return self._name


def start_server(recipe: Recipe, source: ModelSource, longest_tok: int, workspace: Path) -> Server:
    """Start vLLM for a recipe: `longest_tok` is its longest prompt with its completion. Call it before the base loads.

    vLLM measures free memory while it starts and fails if that changes; what training needs is left free for it.
    Raises ModelError, RecipeError or SamplerError, one line each.
    """
    rank, phases = room.stacked_rank(recipe), (recipe.convergence, recipe.behavior)
    return launch(recipe.model, source, longest_tok, rank, workspace, phases=phases, r=recipe.lora.r)


def launch(
    settings: ModelSettings,
    source: ModelSource,
    longest_tok: int,
    stacked_r: int,
    workspace: Path,
    *,
    phases: Sequence[TrainSettings] = (),
    r: int = 1,
) -> Server:
    """Start vLLM for a model and stacks of rank `stacked_r`, beside training of these phases with adapters of rank `r`.

    Without phases it takes what is free now. Raises as `start_server` does.
    """
    device, dtype = resolve_device(settings), resolve_dtype(settings)
    command, rank = server_command(device.type), room.lora_rank(stacked_r)
    folder = model_files(settings, source)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = shape_of(config, source.id)
    length = room.length_tok(longest_tok, int(config.get("max_position_embeddings") or longest_tok))
    chosen = room.Room(length, rank)
    if device.type == "cuda":
        others = room.training_bytes(shape, phases, r, weight_bytes=dtype.itemsize) if phases else room.TRAINER_BYTES
        chosen = room.share_memory(
            room.Memory(*torch.cuda.mem_get_info(device)), shape, others_bytes=others,
            max_length_tok=length, max_lora_rank=rank, weight_bytes=dtype.itemsize,
        )  # fmt: skip
    adapters = adapter_folder(shape.adapter_params(rank) * dtype.itemsize, workspace)
    named = str(dtype).removeprefix("torch.")
    return Server(command, folder, chosen, dtype=named, folder=adapters, log=workspace / LOG_FILE)
