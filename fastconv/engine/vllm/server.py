"""A vLLM server as a child process: its command line, its sizes, starting it, and ending it.

It runs as long as the run and ends with it, even after a crash (`watchdog`). Prompts are token ids: it applies no chat
template and no sampling defaults of the model, and sends no telemetry.
"""

from __future__ import annotations

import contextlib
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

from fastconv.engine.builtin import prepare_model_folder
from fastconv.engine.locate import ModelSource, trains_without_kernels
from fastconv.engine.model import resolve_device, resolve_dtype
from fastconv.engine.shapes import n_positions, shape_of
from fastconv.engine.vllm import memory, watchdog
from fastconv.engine.vllm.memory import USEFUL_ROWS, ServerMemory
from fastconv.errors import ModelError, SamplerError
from fastconv.recipe import ModelSettings, Recipe, TrainSettings
from fastconv.store.io import child_environment

#: Environment variable with the command that starts vLLM, for one in another environment: vLLM pins torch exactly.
COMMAND_VARIABLE = "FASTCONV_VLLM"
#: The base's name on the server; adapters have other names.
BASE_NAME = "base"
#: Start-up takes 35 to 90 s on an H100; a cold compile cache and slow disks take longer.
START_S = 900.0
_POLL_S, _END_S, _TAIL_LINES, _TAIL_BYTES = 0.1, 15.0, 4, 16384
#: Stacks that a server holds at once, where several are served: each takes memory, and a switch takes a read.
MOST_ADAPTERS = 8
#: The server's log, in the workspace; each run starts it anew.
LOG_FILE = "vllm.log"
#: Tried first for adapters: a folder in memory.
_SHARED_MEMORY = Path("/dev/shm")
#: Space that is left free beside an adapter's files.
_SPARE_BYTES = 64 * 2**20


def server_command(device: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The command that starts vLLM. Raises ModelError if it is not installed, or if `device` is not a GPU."""
    if command := environ.get(COMMAND_VARIABLE):
        return shlex.split(command)
    if device != "cuda":
        raise ModelError(
            "the vLLM sampler needs a GPU", where="model.sampler", fix="set model.sampler = 'resident' on this machine"
        )
    sibling = Path(sys.executable).with_name("vllm")
    program = str(sibling) if sibling.is_file() else shutil.which("vllm")
    if program is None:
        raise ModelError(
            "vLLM is not installed",
            where="model.sampler",
            fix=f"install vllm in an environment of its own and name its vllm in {COMMAND_VARIABLE}, or set it to 'resident'",
        )
    return [program]


def serve_arguments(model: Path, port: int, sizes: ServerMemory, dtype: str) -> list[str]:
    """Command-line arguments of `vllm serve`."""
    args = [
        "serve", str(model), "--served-model-name", BASE_NAME, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", dtype, "--max-model-len", str(sizes.max_length_tok),
        # Otherwise the model's own top_k and repetition penalty are applied.
        "--generation-config", "vllm",
        "--enable-lora", "--max-loras", str(sizes.n_adapters), "--max-lora-rank", str(sizes.max_lora_rank),
        "--max-num-seqs", str(USEFUL_ROWS),
        "--uvicorn-log-level", "warning",
    ]  # fmt: skip
    if sizes.kv_bytes is not None and sizes.memory_share is not None:
        args += [
            "--kv-cache-memory-bytes",
            str(sizes.kv_bytes),
            "--gpu-memory-utilization",
            f"{sizes.memory_share:.4f}",
        ]
    else:  # a CPU's generator cannot go back, as vLLM lets that of a seeded prompt do which it reads in pieces
        args.append("--no-enable-chunked-prefill")
    return args


def server_environment(key: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment of the server process: adapters loaded at run time, no telemetry, no downloads, its own API key, no other.

    Every prompt has a seed of its own, and vLLM never draws such a prompt by FlashInfer; its warm-up would compile that sampler
    all the same, with a CUDA compiler that few machines have. So it is off, whatever the environment says.
    """
    return child_environment(
        environ, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1",
        VLLM_API_KEY=key, VLLM_USE_FLASHINFER_SAMPLER="0",
    )  # fmt: skip


def adapter_folder(needed_bytes: int, workspace: Path, shared: Path = _SHARED_MEMORY) -> Path:
    """A new folder, named after this process, where an adapter of this size fits: in `shared`, else in the workspace.

    Raises SamplerError if it fits in neither.
    """
    for place in (shared, workspace):
        if not (place.is_dir() and os.access(place, os.W_OK)):
            continue
        if shutil.disk_usage(place).free >= needed_bytes + _SPARE_BYTES:
            return Path(tempfile.mkdtemp(prefix=f"fastconv-adapters-{os.getpid()}-", dir=place))
    raise SamplerError(
        f"adapters of {needed_bytes / 2**20:.0f} MiB fit neither in {shared} nor in the workspace",
        where=str(workspace),
        fix="free some space, or set model.sampler = 'resident'",
    )


class Server:
    """A `vllm serve` process under a watchdog.

    `url` is its address, `key` its API key, `folder` the folder for adapters, `start_s` the seconds of its start.
    Raises SamplerError if it does not start within `start_s`.
    """

    def __init__(
        self, command: list[str], model: Path, sizes: ServerMemory, *, dtype: str, folder: Path, log: Path, start_s: float = START_S
    ) -> None:  # fmt: skip
        self.folder = folder
        self.log = log
        self.key = secrets.token_urlsafe(32)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._where = " ".join(command)
        began = time.monotonic()
        with _truncated(log) as output:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-I", watchdog.__file__, str(os.getpid()), str(folder),
                    *command, *serve_arguments(model, port, sizes, dtype),
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
        """Whether the process runs, possibly hanging."""
        return self._process.poll() is None

    def failure(self, what: str) -> SamplerError:
        """The error for a server that failed: what happened, and the last lines of its log."""
        if not self.alive:
            what = f"the vLLM server ended by itself (exit code {self._process.returncode})"
        return SamplerError(
            f"{what}; its log ends: {self._tail()}",
            where=self._where,
            fix=f"see {self.log}; what was finished is kept and the same command goes on, or set model.sampler = 'resident'",
        )

    def close(self) -> None:
        """End the server and its child processes, and remove the adapters' folder."""
        self._process.terminate()
        try:
            self._process.wait(_END_S * 2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait(self, deadline: float) -> str:
        """Wait until the server serves our base; returns its version. Raises SamplerError."""
        with httpx.Client(timeout=5.0, trust_env=False) as client:
            while self.alive:
                if time.monotonic() > deadline:
                    raise self.failure("the vLLM server did not come up in time")
                try:
                    if client.get(f"{self.url}/health").status_code == 200:
                        return self._version(client)
                except httpx.TransportError:
                    pass
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_POLL_S)  # until the next poll, or until the process ends
        raise self.failure("the vLLM server did not start")

    def _version(self, client: httpx.Client) -> str:
        """The server's version, after a check that it is ours: another one on the same port would not know the key."""
        served = client.get(f"{self.url}/v1/models", headers={"authorization": f"Bearer {self.key}"})
        if served.status_code != 200 or BASE_NAME not in served.text:
            raise self.failure(f"what answers at {self.url} is not our vLLM server ({served.status_code})")
        reply = client.get(f"{self.url}/version")
        return str(reply.json().get("version", "")) if reply.status_code == 200 else ""

    def _tail(self) -> str:
        """The last lines of the log in one line, without the key."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        tail = " | ".join(lines[-_TAIL_LINES:]).replace(self.key, "[key]")
        return tail or "(nothing)"


def _truncated(log: Path) -> BinaryIO:
    """The log file, emptied and open for appending."""
    file = log.open("ab")
    file.truncate(0)
    return file


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(recipe: Recipe, source: ModelSource, longest_tok: int, workspace: Path) -> Server:
    """Start vLLM for a recipe, whose longest prompt with its completion has `longest_tok` tokens.

    Call it before the base is loaded: vLLM measures free memory while it starts, and fails if that changes. The memory
    that training needs is left free. Raises ModelError, RecipeError or SamplerError.
    """
    rank, phases = memory.stacked_rank(recipe), (recipe.convergence, recipe.behavior)
    return launch(recipe.model, source, longest_tok, rank, workspace, phases=phases, r=recipe.lora.most_r)


def launch(
    settings: ModelSettings,
    source: ModelSource,
    longest_tok: int,
    stacked_r: int,
    workspace: Path,
    *,
    phases: Sequence[TrainSettings] = (),
    r: int = 1,
    n_stacks: int = 1,
) -> Server:
    """Start vLLM for a model and stacks of rank `stacked_r`, beside training of these phases with adapters of rank `r`.

    Without phases it may take all free memory. There is space for the files of `n_stacks` stacks, and up to
    `MOST_ADAPTERS` are in its memory at once. Raises as `start_server` does.
    """
    device, dtype = resolve_device(settings), resolve_dtype(settings)
    command, rank = server_command(device.type), memory.lora_rank(stacked_r)
    folder = prepare_model_folder(settings, source)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = shape_of(config, source.id)
    length = memory.length_tok(longest_tok, n_positions(config, longest_tok, source.id))
    n_adapters = min(n_stacks, MOST_ADAPTERS)
    sizes = memory.ServerMemory(length, rank, n_adapters=n_adapters)
    if device.type == "cuda":
        others = memory.TRAINER_BYTES
        if phases:
            plain = trains_without_kernels(settings)
            others = memory.training_bytes(shape, phases, r, weight_bytes=dtype.itemsize, plain=plain)
        sizes = memory.share_memory(
            memory.GpuMemory(*torch.cuda.mem_get_info(device)), shape, others_bytes=others,
            max_length_tok=length, max_lora_rank=rank, weight_bytes=dtype.itemsize, n_adapters=n_adapters,
        )  # fmt: skip
    adapters = adapter_folder(n_stacks * shape.adapter_params(rank) * dtype.itemsize, workspace)
    dtype_name = str(dtype).removeprefix("torch.")
    return Server(command, folder, sizes, dtype=dtype_name, folder=adapters, log=workspace / LOG_FILE)
