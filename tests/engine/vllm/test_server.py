"""The vLLM server's process: what it is told, how its failing is said, and that nothing of it stays behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fastconv.engine.vllm.memory import ServerMemory
from fastconv.engine.vllm.server import (
    COMMAND_VARIABLE,
    Server,
    adapter_folder,
    serve_arguments,
    server_command,
    server_environment,
)
from fastconv.engine.vllm.watchdog import children_of
from fastconv.errors import ModelError, SamplerError
from tests.loop_kit import exit_of, forked, kill, until
from tests.serve_kit import Fake, end, fake, running

__all__ = ["fake"]


def test_what_the_server_is_told(fake: Fake) -> None:
    server = fake.server(room=ServerMemory(320, 64, 10**9, 0.25))
    try:
        flags = fake.noted()[0]["flags"]
        assert server.version == "0.32.0"
        assert server.alive
        assert flags["port"] == int(server.url.rsplit(":", 1)[1])
        wanted = {
            "host": "127.0.0.1", "enable_lora": True, "max_lora_rank": 64, "max_loras": 1, "max_model_len": 320,
            "generation_config": "vllm", "kv_cache_memory_bytes": 10**9, "gpu_memory_utilization": 0.25,
        }  # fmt: skip
        assert wanted.items() <= flags.items()
    finally:
        server.close()
    assert not server.alive
    on_cpu = serve_arguments(Path("m"), 1, ServerMemory(64, 8), "float32")
    assert "--gpu-memory-utilization" not in on_cpu
    assert "--no-enable-chunked-prefill" in on_cpu, "a seeded prompt read in pieces ends vLLM on a CPU"
    assert not flags["no_enable_chunked_prefill"]


def test_its_environment_sends_nothing_and_holds_a_key() -> None:
    env = server_environment("secret", {"HOME": "/h"})
    assert env == {
        "HOME": "/h", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_API_KEY": "secret", "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }  # fmt: skip


def test_a_server_that_fails_to_start_is_one_line_with_its_last_words(fake: Fake) -> None:
    fake.script(start="fail")
    with pytest.raises(SamplerError, match=r"ended by itself \(exit code 1\).*CUDA out of memory") as caught:
        fake.server()
    assert len(str(caught.value).splitlines()) == 1
    until(lambda: not any(map(running, fake.pids)))


def test_a_server_that_hangs_at_its_start_is_given_up_and_ended(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake.folder / "vllm.log"

    class Clock:
        """Its time comes once the server has said what it waits for, however long it took to begin."""

        @staticmethod
        def monotonic() -> float:
            return 1000.0 if log.exists() and "never comes" in log.read_text() else 0.0

        sleep = staticmethod(time.sleep)

    fake.script(start="hang")
    monkeypatch.setattr("fastconv.engine.vllm.server.time", Clock)
    with pytest.raises(SamplerError, match=r"did not come up in time.*something that never comes"):
        fake.server(start_s=999.0)
    assert not any(map(running, fake.pids))
    assert not (fake.folder / "adapters").exists()


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SamplerError, match=r"exit code 127.*/no/such/vllm: No such file"):
        Server(
            ["/no/such/vllm"],
            tmp_path,
            ServerMemory(64, 8),
            dtype="float32",
            folder=tmp_path / "a",
            log=tmp_path / "log",
        )


def test_closing_ends_the_server_its_engine_and_its_files(fake: Fake) -> None:
    server = fake.server()
    (fake.folder / "adapters" / "left").mkdir()
    assert all(map(running, fake.pids))
    server.close()
    assert not any(map(running, fake.pids))
    assert not (fake.folder / "adapters").exists()


def test_a_parent_killed_at_once_leaves_no_server_and_no_files(fake: Fake) -> None:
    def hold() -> None:
        fake.server()
        (fake.folder / "up").touch()
        until(lambda: False, timeout_s=600)  # until it is killed

    parent = forked(hold)
    until((fake.folder / "up").exists)
    pids = fake.pids
    assert all(map(running, pids))
    kill(parent)
    until(lambda: not any(map(running, pids)))
    until(lambda: not (fake.folder / "adapters").exists())


def test_a_parent_killed_while_the_server_starts_leaves_none(fake: Fake) -> None:
    fake.script(start="hang")
    parent = forked(lambda: fake.server() and None)
    until(lambda: fake.record.exists() and bool(fake.record.read_text()))
    pids = fake.pids
    kill(parent)
    until(lambda: not any(map(running, pids)))


def test_a_watchdog_killed_at_once_ends_the_server(fake: Fake) -> None:
    server = fake.server()
    end(server._process.pid)
    until(lambda: not running(fake.pids[0]), 5)
    server.close()
    end(fake.pids[1])  # the fake does not end its engine itself, as vLLM does when it is asked to end


def test_another_server_at_the_port_is_not_ours(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    other = fake.server()
    try:
        port = int(other.url.rsplit(":", 1)[1])
        monkeypatch.setattr("fastconv.engine.vllm.server._free_port", lambda: port)
        with pytest.raises(SamplerError, match=r"not our vLLM server|ended by itself"):
            fake.server(folder=fake.folder / "mine", log=fake.folder / "mine.log")
    finally:
        other.close()


def test_adapters_go_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, workspace = tmp_path / "shm", tmp_path / "work"
    shared.mkdir()
    workspace.mkdir()
    free = {shared: 10**9, workspace: 10**12}
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": free[place]}))
    mine = adapter_folder(10**8, workspace, shared)
    assert mine.parent == shared
    assert mine.name.startswith(f"fastconv-adapters-{os.getpid()}-")
    assert adapter_folder(10**9, workspace, shared).parent == workspace
    assert adapter_folder(10**8, workspace, tmp_path / "none").parent == workspace
    with pytest.raises(SamplerError, match="fit neither"):
        adapter_folder(10**13, workspace, shared)


def test_a_child_is_found_whatever_its_name_is(tmp_path: Path) -> None:
    """A process's name stands in brackets among what the kernel tells of it, and is any bytes."""

    def named() -> None:
        Path("/proc/self/comm").write_bytes(b"\xff) S 1 (x")
        (tmp_path / "named").touch()
        time.sleep(60.0)

    child = forked(named)
    try:
        until((tmp_path / "named").exists)
        assert child in children_of(os.getpid())
    finally:
        kill(child)


def test_which_vllm_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server_command("cpu", {COMMAND_VARIABLE: "/opt/env/bin/vllm --x"}) == ["/opt/env/bin/vllm", "--x"]
    with pytest.raises(ModelError, match="needs a GPU"):
        server_command("cpu", {})
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(ModelError, match=rf"not installed.*{COMMAND_VARIABLE}"):
        server_command("cuda", {})


def test_a_run_that_ends_well_needs_no_killing(fake: Fake) -> None:
    def whole() -> None:
        fake.server().close()

    assert exit_of(forked(whole)) == 0
    assert not any(map(running, fake.pids))
    assert os.path.exists(fake.folder / "vllm.log")
