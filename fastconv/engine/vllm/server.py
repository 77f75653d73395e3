"""A vLLM server as a process of its own: started once for a whole run, gone with it, even after a crash.

Only what it is told by token ids reaches it: no chat template, no defaults of the model's makers, no telemetry.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import httpx
import torch

from fastconv.engine.locate import ModelSource, trains_without_kernels
from fastconv.engine.model import prepare_model_folder, resolve_device, resolve_dtype
from fastconv.engine.shapes import shape_of
from fastconv.engine.vllm import memory as room
from fastconv.engine.vllm import watchdog as keeper
from fastconv.engine.vllm.memory import USEFUL_ROWS, ServerMemory
from fastconv.errors import ModelError, SamplerError
from fastconv.recipe import ModelSettings, Recipe, TrainSettings

#: Names the command that starts vLLM: another environment's, say, since vLLM pins torch exactly.
COMMAND_VARIABLE = "FASTCONV_VLLM"
#: The base's name on the server; adapters have names of their own.
BASE_NAME = "base"
#: Start-up takes 35 to 90 s (STACK.md); a cold compile cache and slow disks take longer.
START_S = 900.0
_LOOK_S, _END_S, _TAIL_LINES, _TAIL_BYTES = 0.1, 15.0, 4, 16384
#: Tried first for adapters: memory, if the container has enough of it.
_SHARED_MEMORY = Path("/dev/shm")
#: ServerMemory that is left free beside an adapter's files.
_SPARE_BYTES = 64 * 2**20


def server_command(device: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The command that starts vLLM. Raises ModelError where it is not installed, or where there is no GPU for it."""
    if own := environ.get(COMMAND_VARIABLE):
        return shlex.split(own)
    if device != "cuda":
        raise ModelError(
            "the vLLM sampler needs a GPU", where="model.sampler", fix="set model.sampler = 'resident' on this machine"
        )
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.is_file() else shutil.which("vllm")
    if found is None:
        raise ModelError(
            "vLLM is not installed",
            where="model.sampler",
            fix=f"pip install 'fastconv[vllm]', name another environment's vllm in {COMMAND_VARIABLE}, or set it to "
            "'resident'",
        )
    return [found]


def serve_arguments(model: Path, port: int, room: ServerMemory, dtype: str) -> list[str]:
    """What `vllm serve` is told."""
    words = [
        "serve", str(model), "--served-model-name", BASE_NAME, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", dtype, "--max-model-len", str(room.max_length_tok),
        # Or the model's own top_k and repetition penalty creep in.
        "--generation-config", "vllm",
        "--enable-lora", "--max-loras", "1", "--max-lora-rank", str(room.max_lora_rank),
        "--max-num-seqs", str(USEFUL_ROWS),
        "--uvicorn-log-level", "warning",
    ]  # fmt: skip
    if room.kv_bytes is not None and room.memory_share is not None:
        words += ["--kv-cache-memory-bytes", str(room.kv_bytes), "--gpu-memory-utilization", f"{room.memory_share:.4f}"]
    return words


def server_environment(key: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The server's environment: adapters at run time, nothing sent or fetched, a key that only we know."""
    return {
        **environ,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_API_KEY": key,
    }


def adapter_folder(needed_bytes: int, workspace: Path, shared: Path = _SHARED_MEMORY) -> Path:
    """A new folder, named after this process, where an adapter of this size fits: in memory if there is room, else in
    the workspace.

    Raises SamplerError if it fits nowhere.
    """
    for place in (shared, workspace):
        if not (place.is_dir() and os.access(place, os.W_OK)):
            continue
        if shutil.disk_usage(place).free >= needed_bytes + _SPARE_BYTES:
            return Path(tempfile.mkdtemp(prefix=f"fastconv-adapters-{os.getpid()}-", dir=place))
    raise SamplerError(
        f"an adapter of {needed_bytes / 2**20:.0f} MiB fits neither in {shared} nor in the workspace",
        where=str(workspace),
        fix="free some space, or set model.sampler = 'resident'",
    )


class Server:
    """One `vllm serve` process. `url` is its address, `key` what it wants to hear, `folder` where adapters may lie."""

    def __init__(
        self, command: list[str], model: Path, room: ServerMemory, *, dtype: str, folder: Path, log: Path, start_s: float = START_S
    ) -> None:  # fmt: skip
        self.folder = folder
        self.log = log
        self.key = secrets.token_urlsafe(32)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._where = " ".join(command)
        began = time.monotonic()
        with _emptied(log) as output:
            self._keeper = subprocess.Popen(
                [
                    sys.executable, "-I", keeper.__file__, str(os.getpid()), str(folder),
                    *command, *serve_arguments(model, port, room, dtype),
                ],
                env=server_environment(self.key), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        try:
            self.version = self._wait(began + start_s)
        except BaseException:
            self.close()
            raise
        self.start_s = time.monotonic() - began

    @property
    def alive(self) -> bool:
        """Whether the process still runs; it may hang all the same."""
        return self._keeper.poll() is None

    def failure(self, what: str) -> SamplerError:
        """The error for a server that is of no use any more: what happened, and the last lines of its log."""
        if not self.alive:
            what = f"the vLLM server ended by itself (exit code {self._keeper.returncode})"
        return SamplerError(
            f"{what}; its log ends: {self._tail()}",
            where=self._where,
            fix=f"see {self.log}; what was finished is kept and the same command goes on, or set model.sampler = 'resident'",
        )

    def close(self) -> None:
        """End the server and everything it started, and remove its adapters' folder."""
        self._keeper.terminate()
        try:
            self._keeper.wait(_END_S * 2)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait(self, deadline: float) -> str:
        """Wait until it serves our base; its version."""
        with httpx.Client(timeout=5.0, trust_env=False) as client:
            while self.alive:
                if time.monotonic() > deadline:
                    raise self.failure("the vLLM server did not come up in time")
                try:
                    if client.get(f"{self.url}/health").status_code == 200:
                        return self._version(client)
                except httpx.TransportError:
                    pass
                time.sleep(_LOOK_S)
        raise self.failure("the vLLM server did not start")

    def _version(self, client: httpx.Client) -> str:
        """Its version, once it is proven to be ours: another one on the same port would not know the key."""
        served = client.get(f"{self.url}/v1/models", headers={"authorization": f"Bearer {self.key}"})
        if served.status_code != 200 or BASE_NAME not in served.text:
            raise self.failure(f"what answers at {self.url} is not our vLLM server ({served.status_code})")
        found = client.get(f"{self.url}/version")
        return str(found.json().get("version", "")) if found.status_code == 200 else ""

    def _tail(self) -> str:
        """The last lines of the log as one."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        said = " | ".join(lines[-_TAIL_LINES:]).replace(self.key, "[key]")
        return said or "(nothing)"


def _emptied(log: Path) -> BinaryIO:
    """The log, empty, open for whoever writes at its end."""
    file = log.open("ab")
    file.truncate(0)
    return file


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    folder = prepare_model_folder(settings, source)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = shape_of(config, source.id)
    length = room.length_tok(longest_tok, int(config.get("max_position_embeddings") or longest_tok))
    chosen = room.ServerMemory(length, rank)
    if device.type == "cuda":
        others = room.TRAINER_BYTES
        if phases:
            plain = trains_without_kernels(settings)
            others = room.training_bytes(shape, phases, r, weight_bytes=dtype.itemsize, plain=plain)
        chosen = room.share_memory(
            room.GpuMemory(*torch.cuda.mem_get_info(device)), shape, others_bytes=others,
            max_length_tok=length, max_lora_rank=rank, weight_bytes=dtype.itemsize,
        )  # fmt: skip
    adapters = adapter_folder(shape.adapter_params(rank) * dtype.itemsize, workspace)
    named = str(dtype).removeprefix("torch.")
    return Server(command, folder, chosen, dtype=named, folder=adapters, log=workspace / LOG_FILE)
