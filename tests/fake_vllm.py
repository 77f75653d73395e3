"""A server that speaks as much of vLLM's HTTP API as fastconv uses, and refuses what vLLM refuses.

Run as `python -m tests.fake_vllm serve MODEL --flags`, in place of `vllm`. What it does is a JSON object in
VLLM_FAKE_SCRIPT (see `Script`). Completions are drawn by fastconv's own engine (`engine`), or are a hash of what was asked.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

VERSION = "0.32.0"


@dataclasses.dataclass
class Script:
    """What the server does."""

    #: `fail` ends at once with a traceback's last line, `hang` never answers, `child` ends after its engine began.
    start: str = "ok"
    #: Draw with the real (tiny) model instead of hashing.
    engine: bool = False
    latency_s: float = 0.0
    #: Between two tokens of a stream.
    token_s: float = 0.0
    #: Completions after which it dies, hangs, or is deaf to SIGTERM.
    die_after: int | None = None
    hang_after: int | None = None
    #: Faults of the first completion requests, in order: 429, 500, 503, reset, cut.
    faults: list[Any] = dataclasses.field(default_factory=list)
    #: How replies lie: `model`, `prompt`, `no_ids`, `finish`, `eos`.
    lie: str = ""
    #: While this file exists, completions wait.
    hold: str = ""
    #: A file that hears of every request, one JSON object a line.
    record: str = ""


class Refusal(Exception):
    """An answer that is no 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FakeVllm:
    def __init__(self, flags: argparse.Namespace, script: Script) -> None:
        self.flags, self.script = flags, script
        self.random = random.Random(0)
        self.adapters: dict[str, str] = {}
        self.names: set[str] = set()
        self.n_done = 0
        self.in_flight = 0
        self.engine: Any = None
        if script.engine:
            self.engine = Engine(Path(flags.model))

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                method, path, _ = head.split("\r\n", 1)[0].split(" ")
                headers = {
                    name.strip().lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in head.split("\r\n")[1:] if line)
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                try:
                    status, answer = 200, await self.answer(method, path, headers, json.loads(body or b"{}"), writer)
                except Refusal as refusal:
                    status, answer = refusal.status, {"error": {"message": str(refusal), "code": refusal.status}}
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                extra = "retry-after: 0\r\n" if status == 429 else ""
                writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n{extra}\r\n".encode() + data)
                await writer.drain()
        writer.close()

    async def answer(
        self, method: str, path: str, headers: dict[str, str], body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> Any:
        if path == "/health":
            return ""
        if path == "/version":
            return {"version": VERSION}
        if headers.get("authorization") != f"Bearer {os.environ['VLLM_API_KEY']}":
            raise Refusal(401, "Unauthorized")
        if path != "/v1/models":
            self.note({"path": path, **body, "in_flight": self.in_flight})
        if path == "/v1/models":
            return {"data": [{"id": name} for name in (self.flags.served_model_name, *self.adapters)]}
        if path == "/v1/completions":
            return await self.completion(body, writer)
        if path == "/v1/load_lora_adapter":
            return self.load(body["lora_name"], Path(body["lora_path"]))
        if path == "/v1/unload_lora_adapter":
            if body["lora_name"] not in self.adapters:
                raise Refusal(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
            del self.adapters[body["lora_name"]]
            return "Success"
        if path == "/v1/chat/completions":
            raise Refusal(400, "chat messages go through a template that is not fastconv's")
        raise Refusal(404, "Not Found")

    def load(self, name: str, folder: Path) -> str:
        if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") != "1" or not self.flags.enable_lora:
            raise Refusal(404, "Not Found")
        if name in self.names:  # vLLM refuses one that is loaded; one that was unloaded would meet a stale prefix cache
            raise Refusal(400, f"The lora adapter '{name}' has already been loaded.")
        try:
            config = json.loads((folder / "adapter_config.json").read_text())
            weights = (folder / "adapter_model.safetensors").read_bytes()
        except OSError as error:
            raise Refusal(404, f"No adapter found for {folder}") from error
        if config["r"] > self.flags.max_lora_rank:
            raise Refusal(500, f"LoRA rank {config['r']} is greater than max_lora_rank {self.flags.max_lora_rank}.")
        if len(self.adapters) >= self.flags.max_loras:
            raise Refusal(500, "No free lora slots")
        self.names.add(name)
        self.adapters[name] = str(folder) if self.engine else hashlib.sha256(weights).hexdigest()
        if self.engine:
            self.engine.load(name, folder)
        return f"Success: LoRA adapter '{name}' added successfully."

    async def completion(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> Any:
        if self.script.faults:
            fault = self.script.faults.pop(0)
            if fault in ("reset", "cut"):
                if fault == "cut":
                    writer.write(b'HTTP/1.1 200 X\r\ncontent-length: 500\r\n\r\n{"choices": [')
                    await writer.drain()
                writer.transport.abort()
                raise ConnectionResetError
            raise Refusal(fault, "not now")
        self.check(body)
        self.in_flight += 1
        try:
            # Later requests tend to end first, so that whoever relies on their order is caught.
            await asyncio.sleep(self.script.latency_s * self.random.random())
            while self.script.hold and Path(self.script.hold).exists():
                await asyncio.sleep(0.005)
            if self.script.hang_after is not None and self.n_done >= self.script.hang_after:
                await asyncio.sleep(3600)
            self.n_done += 1
            if self.script.die_after is not None and self.n_done > self.script.die_after:
                print("ERROR EngineCore died: CUDA error: an illegal memory access", flush=True)
                os._exit(1)
            if "prompt_logprobs" in body:
                return self.engine.told(body)
            ids = self.engine.draw(body) if self.engine else self.hashed(body)
            if body.get("stream"):
                await self.stream(body, ids, writer)
        finally:
            self.in_flight -= 1
        return self.reply(body, ids)

    async def stream(self, body: dict[str, Any], ids: list[int], writer: asyncio.StreamWriter) -> None:
        """A token in each event, as server-sent events in chunks; then the connection is closed."""
        writer.write(b"HTTP/1.1 200 X\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        for place, token in enumerate(ids):
            await asyncio.sleep(self.script.token_s)
            last = place == len(ids) - 1
            finish = ("stop" if token in body["stop_token_ids"] else "length") if last else None
            event = {"choices": [{"index": 0, "text": "never read", "token_ids": [token], "finish_reason": finish}]}
            writer.write(f"data: {json.dumps(event)}\n\n".encode())
            await writer.drain()
            self.note({"path": "token", "place": place})
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()
        writer.close()
        raise ConnectionResetError

    def check(self, body: dict[str, Any]) -> None:
        if body["model"] != self.flags.served_model_name and body["model"] not in self.adapters:
            raise Refusal(404, f"The model `{body['model']}` does not exist.")
        if "messages" in body or not isinstance(body.get("prompt"), list):
            raise Refusal(400, "prompt must be token ids")
        if "prompt_logprobs" in body:
            return
        if not all(isinstance(token, int) for token in body["prompt"]):
            raise Refusal(400, "one prompt for each request, since the seed is one for all of them")
        if len(body["prompt"]) + body["max_tokens"] > self.flags.max_model_len:
            raise Refusal(400, f"This model's maximum context length is {self.flags.max_model_len} tokens.")
        if not -(2**63) <= body["seed"] < 2**63:
            raise Refusal(400, "seed is no int64")
        if unknown := set(body) - {"model", "prompt", "seed", "temperature", "top_p", "max_tokens", "stop_token_ids",
                                   "return_token_ids", "skip_special_tokens", "stream"}:  # fmt: skip
            raise Refusal(400, f"unexpected {unknown}")

    def hashed(self, body: dict[str, Any]) -> list[int]:
        """Ids that depend on everything that was asked, the adapter's weights included."""
        about = [self.adapters.get(body["model"], ""), body["prompt"], body["seed"], body["temperature"], body["top_p"]]
        rng = random.Random(json.dumps(about))
        ids = [rng.randrange(97, 123) - 33 for _ in range(body["max_tokens"])]
        if rng.random() < 0.6:
            end = rng.randrange(body["max_tokens"])
            ids[end:] = [rng.choice(body["stop_token_ids"])]
        return ids

    def reply(self, body: dict[str, Any], ids: list[int]) -> Any:
        lie = self.script.lie
        stopped = bool(ids) and ids[-1] in body["stop_token_ids"]
        choice = {
            "index": 0,
            "text": "never read",
            "finish_reason": "abort" if lie == "finish" else "stop" if stopped or lie == "eos" else "length",
            "token_ids": [*ids[:-1], 1] if lie == "eos" else ids,
            "prompt_token_ids": [7, *body["prompt"]] if lie == "prompt" else body["prompt"],
        }
        if lie == "no_ids":
            del choice["token_ids"]
        return {"model": self.flags.served_model_name if lie == "model" else body["model"], "choices": [choice]}

    def note(self, what: dict[str, Any]) -> None:
        if self.script.record:
            with open(self.script.record, "a") as file:
                file.write(json.dumps(what) + "\n")


class Engine:
    """fastconv's engine as the model behind the API; adapters come from their files."""

    def __init__(self, folder: Path) -> None:
        from fastconv.engine.model import load_base
        from fastconv.engine.stack import Stack
        from fastconv.recipe import LoraSettings, ModelSettings

        self.stack = Stack(load_base(ModelSettings(id=str(folder), device="cpu")), LoraSettings())
        self.adapters: dict[str, Any] = {}

    def load(self, name: str, folder: Path) -> None:
        from fastconv.engine.export import BaseReference, load_peft_folder

        self.adapters[name] = load_peft_folder(self.stack, folder, BaseReference("base"))

    def told(self, body: dict[str, Any]) -> Any:
        """The log-probability of each prompt's last token, as vLLM tells those of a prompt."""
        import torch

        from fastconv.engine.model import pack
        from fastconv.engine.stack import Slot

        adapter = self.adapters.get(body["model"])
        choices = []
        for index, prompt in enumerate(body["prompt"]):
            ids, positions, layout = pack([prompt], self.stack.base)
            with torch.no_grad(), self.stack.live(*([Slot(frozen=(adapter,))] if adapter else [])):
                logits = self.stack.base.logits(self.stack.base.hidden(ids, positions, layout))[-2]
            value = float(torch.log_softmax(logits, -1)[prompt[-1]])
            choices.append({"index": index, "prompt_logprobs": [None, {str(prompt[-1]): {"logprob": value}}]})
        return {"choices": choices}

    def draw(self, body: dict[str, Any]) -> list[int]:
        from fastconv.engine.generate import sample
        from fastconv.engine.stack import Slot
        from fastconv.recipe import SamplingSettings

        settings = SamplingSettings(
            temperature=body["temperature"], top_p=body["top_p"], max_new_tok=body["max_tokens"]
        )
        adapter = self.adapters.get(body["model"])
        with self.stack.live(*([Slot(frozen=(adapter,))] if adapter else [])):
            (drawn,) = sample(self.stack.base, [body["prompt"]], [body["seed"]], settings)
        return [*drawn.ids, *([body["stop_token_ids"][0]] if drawn.ended else [])]


def parse(words: list[str]) -> argparse.Namespace:
    """The flags that `vllm serve` 0.32 knows and fastconv uses; anything else is refused, as there."""
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("model")
    for flag in ("--host", "--served-model-name", "--dtype", "--generation-config", "--uvicorn-log-level"):
        parser.add_argument(flag)
    for flag in ("--port", "--max-model-len", "--max-loras", "--max-num-seqs", "--kv-cache-memory-bytes"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--max-lora-rank", type=int, choices=[1, 8, 16, 32, 64, 128, 256, 320, 512])
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--no-enable-chunked-prefill", action="store_true")
    parser.add_argument("--lora-modules", nargs="+")
    parser.add_argument("--revision")
    flags = parser.parse_args(words)
    if flags.host != "127.0.0.1":
        parser.error("fastconv serves on loopback only")
    if flags.generation_config != "vllm":
        parser.error("the model's own top_k and repetition penalty would creep in")
    if not (os.environ.get("VLLM_NO_USAGE_STATS") and os.environ.get("DO_NOT_TRACK")):
        parser.error("usage statistics would be sent")
    return flags


def main() -> None:
    script = Script(**json.loads(os.environ.get("VLLM_FAKE_SCRIPT", "{}")))
    flags = parse(sys.argv[1:])
    # As the engine process of a real server, in a session of its own: it must not outlive the server either.
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    if script.record:
        Path(script.record).write_text(json.dumps({"pids": [os.getpid(), engine.pid], "flags": vars(flags)}) + "\n")
    if script.start == "fail":
        print("INFO loading the model\ntorch.OutOfMemoryError: CUDA out of memory", flush=True)
        os._exit(1)
    if script.start == "hang":
        print("INFO waiting for something that never comes", flush=True)
        time.sleep(600)
    fake = FakeVllm(flags, script)

    async def serve() -> None:
        await (await asyncio.start_server(fake.client, flags.host, flags.port, backlog=1024)).serve_forever()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
