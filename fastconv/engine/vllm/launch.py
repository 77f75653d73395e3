"""Starting vLLM for a recipe: which length and rank it must serve, and how much memory it may take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from fastconv.engine.vllm import memory as room
from fastconv.engine.model import model_files, resolve_device, resolve_dtype
from fastconv.engine.locate import ModelSource, trains_plain
from fastconv.engine.vllm.server import Server, adapter_folder, server_command
from fastconv.recipe import ModelSettings, Recipe, TrainSettings
from fastconv.engine.shapes import shape_of

#: The server's log, in the workspace; each run begins it anew.
LOG_FILE = "vllm.log"


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
        others = room.TRAINER_BYTES
        if phases:
            plain = trains_plain(settings)
            others = room.training_bytes(shape, phases, r, weight_bytes=dtype.itemsize, plain=plain)
        chosen = room.share_memory(
            room.Memory(*torch.cuda.mem_get_info(device)), shape, others_bytes=others,
            max_length_tok=length, max_lora_rank=rank, weight_bytes=dtype.itemsize,
        )  # fmt: skip
    adapters = adapter_folder(shape.adapter_params(rank) * dtype.itemsize, workspace)
    named = str(dtype).removeprefix("torch.")
    return Server(command, folder, chosen, dtype=named, folder=adapters, log=workspace / LOG_FILE)
