"""`fastconv serve` with a vLLM server behind it: a fake that draws with our engine, so that every stack must reach it whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastconv import serve
from fastconv.chat import ChatTokenizer
from fastconv.engine.lora import Adapter
from fastconv.errors import SamplerError, TrainingError
from tests import ROOT
from tests.loop_kit import DoneRun, until
from tests.serve.kit import CELLS, endpoint, refused
from tests.serve_kit import Fake, end, fake, running

__all__ = ["fake"]


def ask(**changes: Any) -> dict[str, Any]:
    return {"model": CELLS[2], "messages": [{"role": "user", "content": "Hello?"}], "seed": 7, **changes}


@pytest.mark.slow
def test_answers_are_those_of_the_ledger_and_cells_are_loaded_once(
    done_run: DoneRun, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.script(engine=True)
    read: list[Path] = []
    real = serve.ChatTokenizer

    def counted(folder: Path, *settings: Any) -> ChatTokenizer:
        read.append(folder)
        return real(folder, *settings)

    monkeypatch.setattr(serve, "ChatTokenizer", counted)
    with endpoint(done_run.recipe, done_run.workspace, *CELLS, engine="auto") as one:
        assert one.service.engine == "vllm 0.32.0"
        assert fake.noted()[0]["flags"]["max_loras"] == 2
        for cell in CELLS:
            for body, sample in list(one.sampled(cell))[:6]:
                reply = one.post(body).json()
                (choice,) = reply["choices"]
                assert reply["usage"]["completion_tokens"] == sample.n_tok
                assert choice["message"]["content"] == sample.completion
                assert choice["finish_reason"] == ("stop" if sample.ended else "length")
        proofs = one.service.proofs
        assert all(proofs[cell]["from_recorded"] < 1e-3 < proofs[cell]["from_base"] for cell in CELLS[1:])
        loaded = [request["lora_name"] for request in fake.asked("/v1/load_lora_adapter")]
        assert len(loaded) == len(set(loaded)) == 2
        pids = fake.pids
    assert not any(map(running, pids))
    assert len(read) == 1  # by the endpoint and for vLLM alike


@pytest.mark.slow
def test_a_stack_that_is_not_the_recorded_one_is_not_served(
    done_run: DoneRun, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM gets weights that are a little off, or none at all."""
    fake.script(engine=True)
    real = Adapter.to_bytes

    def altered(factor: float) -> None:
        def to_bytes(adapter: Adapter, *args: Any) -> bytes:
            return real(Adapter(adapter.shape, adapter.base, adapter.sizes, adapter.flat * factor), *args)

        monkeypatch.setattr(Adapter, "to_bytes", to_bytes)

    for factor, said in ((1.2, "away from those recorded"), (0.0, "the base's logits")):
        altered(factor)
        with (
            pytest.raises(TrainingError, match=said),
            endpoint(done_run.recipe, done_run.workspace, CELLS[2], engine="vllm"),
        ):
            pass
        assert not any(map(running, fake.pids))


@pytest.mark.slow
def test_a_stream_is_passed_on_as_it_comes_and_ends_with_its_client(done_run: DoneRun, fake: Fake) -> None:
    fake.script(engine=True, token_s=0.05)
    with endpoint(done_run.recipe, done_run.workspace, CELLS[2], engine="vllm") as one, one.client as client:
        body = ask(max_tokens=100, temperature=2.0, stream=True)
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            began = time.monotonic()
            next(reply.iter_lines())
            assert time.monotonic() - began < 2.0  # all 100 tokens take five seconds
        n_tokens = len(fake.asked("token"))
        time.sleep(0.5)
        assert len(fake.asked("token")) <= n_tokens + 5, "vLLM draws on for nobody"


@pytest.mark.slow
def test_a_stop_sequence_ends_the_drawing_too(done_run: DoneRun, fake: Fake) -> None:
    fake.script(engine=True)
    with endpoint(done_run.recipe, done_run.workspace, CELLS[2], engine="vllm") as one:
        text = one.post(ask(max_tokens=24, temperature=0)).json()["choices"][0]["message"]["content"]
        stopped = one.post(ask(max_tokens=24, temperature=0, stop=text[5:8])).json()
    assert stopped["choices"][0]["message"]["content"] == text[: text.index(text[5:8])]
    assert stopped["choices"][0]["finish_reason"] == "stop"


@pytest.mark.slow
def test_a_server_that_dies_ends_the_endpoint_with_one_line(done_run: DoneRun, fake: Fake) -> None:
    fake.script(engine=True)

    def dies() -> None:
        with endpoint(done_run.recipe, done_run.workspace, CELLS[2], engine="vllm") as one:
            end(fake.pids[0])
            until(lambda: refused(one.service.url))

    with pytest.raises(SamplerError, match="ended by itself"):
        dies()


@pytest.mark.slow
def test_a_request_that_loses_the_server_has_an_error_of_its_own(
    done_run: DoneRun, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.script(engine=True, faults=["reset", 500])
    monkeypatch.setattr(
        "fastconv.serve.vllm.VllmModel.prove", lambda model, cell, stack: model._names.update({cell: "base"}) or {}
    )
    with endpoint(done_run.recipe, done_run.workspace, CELLS[2], engine="vllm") as one:
        for _ in range(2):
            reply = one.post(ask(max_tokens=2))
            assert reply.status_code == 502
            assert reply.json()["error"]["type"] == "server_error"
        assert one.post(ask(max_tokens=2)).status_code == 200


@pytest.mark.slow
def test_vllm_is_gone_with_a_process_that_is_killed(done_run: DoneRun, fake: Fake, tmp_path: Path) -> None:
    fake.script(engine=True)
    command = [sys.executable, "-m", "fastconv", "serve", done_run.finished.run, CELLS[1], "--port", "0", "--json",
               "-w", str(done_run.workspace)]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert process.stdout is not None
    assert "vllm" in process.stdout.readline()
    pids = fake.pids
    assert all(map(running, pids))
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    until(lambda: not any(map(running, pids)))
