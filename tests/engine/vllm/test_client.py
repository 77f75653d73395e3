"""The client against a server that refuses what vLLM refuses: ids in, ids out, in order, whatever happens between."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastconv.engine.generate import Completion
from fastconv.errors import FastconvError, SamplerError
from fastconv.recipe import SamplingSettings
from tests.loop_kit import until
from tests.serve_kit import STOPS, Fake, fake, running

__all__ = ["fake"]

SETTINGS = SamplingSettings(temperature=0.7, top_p=0.9, max_new_tok=12)


def prompts(n: int) -> list[list[int]]:
    rng = random.Random(n)
    return [[rng.randrange(256) for _ in range(rng.randint(3, 30))] for _ in range(n)]


def drawn(fake: Fake, n: int = 40, **changes: Any) -> list[Completion]:
    """What a fresh server gives for `n` prompts."""
    with fake.client(**changes) as client:
        return client.complete("base", prompts(n), range(n), SETTINGS, STOPS)


def test_what_is_asked_and_what_comes_back(fake: Fake) -> None:
    n_tok = []
    with fake.client() as client:
        found = client.complete("base", prompts(40), range(2**63 - 40, 2**63), SETTINGS, STOPS, n_tok.append)
    asked = fake.asked("/v1/completions")
    assert sorted(one["seed"] for one in asked) == list(range(2**63 - 40, 2**63))
    first = next(one for one in asked if one["seed"] == 2**63 - 40)
    assert first | {"in_flight": 0} == {
        "path": "/v1/completions", "model": "base", "prompt": prompts(40)[0], "seed": 2**63 - 40, "temperature": 0.7,
        "top_p": 0.9, "max_tokens": 12, "stop_token_ids": [258, 256], "return_token_ids": True,
        "skip_special_tokens": False, "in_flight": 0,
    }  # fmt: skip
    assert 5 < sum(one.ended for one in found) < 35
    assert all(not set(one.ids) & set(STOPS) for one in found)
    assert all(one.ended or len(one.ids) == 12 for one in found)
    assert sum(n_tok) == sum(len(one.ids) + one.ended for one in found)


def test_results_are_in_the_callers_order_and_bounded_in_flight(fake: Fake) -> None:
    calm = drawn(fake, 60, n_connections=1)
    fake.script(latency_s=0.03)
    assert drawn(fake, 60, n_connections=8) == calm
    busiest = max(one["in_flight"] for one in fake.asked("/v1/completions"))
    assert 4 <= busiest < 8  # counted before the request itself joins


def test_nothing_to_draw(fake: Fake) -> None:
    assert drawn(fake, 0) == []


def test_passing_faults_are_tried_again(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastconv.engine.vllm.client._FIRST_WAIT_S", 0.01)
    calm = drawn(fake)
    fake.script(faults=[429, 500, 503, "reset", "cut", 429, "reset"])
    assert drawn(fake) == calm
    assert len(fake.asked("/v1/completions")) == 47


def test_a_server_that_only_fails_is_given_up(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastconv.engine.vllm.client._FIRST_WAIT_S", 0.01)
    fake.script(faults=[503] * 1000)
    with pytest.raises(SamplerError, match=r"failed a request 5 times \(it answered 503: not now\)"):
        drawn(fake, 1)
    assert len(fake.asked("/v1/completions")) == 5


def test_a_server_that_dies_midway(fake: Fake) -> None:
    fake.script(die_after=20, latency_s=0.01)
    with pytest.raises(SamplerError, match=r"ended by itself \(exit code 1\).*illegal memory access") as caught:
        drawn(fake, 200)
    assert len(str(caught.value).splitlines()) == 1
    assert not any(map(running, fake.pids))


def test_a_server_that_hangs_midway(fake: Fake) -> None:
    fake.script(hang_after=10)
    with pytest.raises(SamplerError, match=r"no completion in 0.5 s"):
        drawn(fake, stall_s=0.5)  # the fake would be silent for an hour


def test_whoever_listens_may_stop_it_even_while_the_server_is_silent(fake: Fake) -> None:
    class Stop(FastconvError): ...

    def stop(n_tok: int) -> None:
        if not n_tok:
            raise Stop("stopped")

    fake.script(hang_after=10)
    with fake.client() as client:
        with pytest.raises(Stop):
            client.complete("base", prompts(40), range(40), SETTINGS, STOPS, stop)
        loop_is_free = httpx.get(f"{client._server.url}/health").status_code == 200
    assert loop_is_free


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ("model", "base answered in its place"),
        ("prompt", "other token ids than were sent"),
        ("no_ids", "no token ids"),
        ("finish", "ended by 'abort'"),
        ("eos", "ended by 'stop' on token 1"),
    ],
)
def test_a_reply_that_is_not_what_was_asked_for_is_refused(fake: Fake, tmp_path: Path, lie: str, said: str) -> None:
    fake.script(lie=lie)
    with fake.client() as client:
        client.load("stack-1", adapter(tmp_path, 4))
        with pytest.raises(SamplerError, match=said):
            client.complete("stack-1", prompts(1), [1], SETTINGS, STOPS)


def test_what_vllm_refuses(fake: Fake, tmp_path: Path) -> None:
    with fake.client() as client:
        with pytest.raises(SamplerError, match=r"404: The model `stack-9` does not exist"):
            client.complete("stack-9", prompts(3), range(3), SETTINGS, STOPS)
        with pytest.raises(SamplerError, match=r"400: This model's maximum context length is 256"):
            client.complete("base", [[1] * 250], [1], SETTINGS, STOPS)
        with pytest.raises(SamplerError, match=r"LoRA rank 16 is greater than max_lora_rank 8"):
            client.load("stack-1", adapter(tmp_path, 16))
        client.load("stack-2", adapter(tmp_path, 8))
        with pytest.raises(SamplerError, match=r"'stack-2' has already been loaded"):
            client.load("stack-2", adapter(tmp_path, 8))
        client.unload("stack-2")
        with pytest.raises(SamplerError, match=r"'stack-2' has already been loaded"):
            client.load("stack-2", adapter(tmp_path, 8))  # unloaded, and yet its cache would be another's
        with pytest.raises(SamplerError, match=r"404: .*'stack-2' cannot be found"):
            client.unload("stack-2")
        with pytest.raises(SamplerError, match=r"404: No adapter found"):
            client.load("stack-3", str(tmp_path / "none"))


def test_what_the_fake_refuses_beyond_what_the_client_could_send(fake: Fake) -> None:
    with fake.client() as client:
        url, headers = client._server.url, {"authorization": f"Bearer {client._server.key}"}
        body = {"model": "base", "prompt": "text", "seed": 1, "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=headers).status_code == 400
        assert httpx.post(f"{url}/v1/chat/completions", json={"messages": []}, headers=headers).status_code == 400
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401


def test_a_server_that_died_between_two_calls(fake: Fake, tmp_path: Path) -> None:
    with fake.client() as client:
        client.complete("base", prompts(4), range(4), SETTINGS, STOPS)
        pids = fake.pids
        os.kill(pids[0], 9)
        until(lambda: not running(pids[0]))
        with pytest.raises(SamplerError, match=r"/v1/load_lora_adapter failed|ended by itself"):
            client.load("stack-1", adapter(tmp_path, 4))
        with pytest.raises(SamplerError, match="ended by itself"):
            client.complete("base", prompts(4), range(4), SETTINGS, STOPS)


def adapter(folder: Path, r: int) -> str:
    """A folder that looks like a PEFT adapter of this rank."""
    made = folder / f"r{r}"
    made.mkdir(exist_ok=True)
    (made / "adapter_config.json").write_text(f'{{"r": {r}}}')
    (made / "adapter_model.safetensors").write_bytes(bytes(r))
    return str(made)
