"""vLLM itself (its CPU build) as the sampler: what it draws is what the resident sampler and transformers with PEFT give.

Run by `make test-vllm` with vLLM in a virtual environment of its own. Greedy, in fp32: two implementations may differ
only where the reference itself hardly prefers one token to another.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

from fastconv.chat import SystemTurn
from fastconv.engine.generate import Completion, sample
from fastconv.engine.locate import locate
from fastconv.engine.lora import Adapter
from fastconv.engine.stack import Slot, Stack
from fastconv.engine.vllm.sampler import VllmSampler
from fastconv.engine.vllm.server import COMMAND_VARIABLE, Server, launch
from fastconv.errors import SamplerError
from fastconv.recipe import LoraSettings, ModelSettings, SamplingSettings
from tests.engine_kit import SNAPSHOT, live_logits, peft_model, plain_logits, plain_model, random_adapter, tiny_stack
from tests.loop_kit import until
from tests.serve_kit import running

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(400),
    pytest.mark.skipif(COMMAND_VARIABLE not in os.environ, reason="needs the virtual environment of make test-vllm"),
]

#: A token that the reference prefers by less (nats) is a near tie; fp32 logits differ by about a thousandth of it.
NEAR_TIE_NATS = 0.01
#: A nucleus of one token: vLLM raises a temperature under 0.01 to that, at which near ties would still be drawn.
GREEDY = SamplingSettings(temperature=0.01, top_p=1e-6, max_new_tok=16)
QUESTIONS = (
    "What is the capital of France?", "Name three colours.", "Why is the sky blue?", "How do I boil an egg?",
    "Write a sentence about a river.", "What is 12 plus 30?", "Who wrote Hamlet?", "Give me advice for a long walk.",
)  # fmt: skip
PROBES = {"assistant": "You are a helpful assistant.", "librarian": "You are a librarian who loves quiet rooms."}
SECOND = LoraSettings(r=4, alpha=8)
#: Random adapters of this size change most completions.
SIZE = 0.2


@dataclass(frozen=True)
class Case:
    """One server beside the resident base of the same weights, and two adapters."""

    server: Server
    stack: Stack
    sampler: VllmSampler
    folder: Path
    first: Adapter
    second: Adapter

    def prompts(self, probe: str) -> list[list[int]]:
        tokenizer = self.stack.base.tokenizer
        return [tokenizer.prompt_ids(SystemTurn("text", PROBES[probe]), question) for question in QUESTIONS]

    def drawn(self, prompts: Sequence[Sequence[int]]) -> list[Completion]:
        """What the server draws under the live stack."""
        return self.sampler.draw(prompts, range(len(prompts)), GREEDY, lambda n_tok: None)

    def both(self, live: Sequence[Adapter], probe: str) -> tuple[list[Completion], list[Completion]]:
        """What the server and the resident base draw under these adapters."""
        prompts = self.prompts(probe)
        with self.stack.live(*([Slot(frozen=tuple(live))] if live else [])):
            return self.drawn(prompts), sample(self.stack.base, prompts, list(range(len(prompts))), GREEDY)

    def assert_same(self, live: Sequence[Adapter], probe: str) -> list[Completion]:
        """The server draws the resident base's tokens under these adapters, up to a near tie; returns what it drew."""
        theirs, own = self.both(live, probe)
        for prompt, a, b in zip(self.prompts(probe), theirs, own, strict=True):
            (logits,) = live_logits(self.stack, live, [[*prompt, *b.ids]])
            assert_near_tie(self.with_end(logits[len(prompt) - 1 :]), tokens(a), tokens(b))
        return theirs

    def with_end(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` [T, vocab] with a last column for "it ends", the likeliest of the tokens that stop."""
        stops = list(self.stack.base.tokenizer.stop_ids)
        return torch.cat([logits, logits[:, stops].max(-1, keepdim=True).values], 1)


def tokens(completion: Completion) -> list[int]:
    """A completion's tokens; -1, the column of `with_end`, stands for its end."""
    return [*completion.ids, *([-1] if completion.ended else [])]


@pytest.fixture(scope="module")
def wide_qwen(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen2 (biases on q, k, v) with 2 heads of 32 instead of 4 of 16, which vLLM's CPU attention does not have."""
    folder = tmp_path_factory.mktemp("wide") / "qwen"
    shutil.copytree(tiny_qwen, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2, "num_key_value_heads": 1}))
    return folder


@pytest.fixture(scope="module")
def case(wide_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """As a run starts it: the server first, then the base. One server for all tests of this file that can share it."""
    settings = ModelSettings.model_validate({"id": str(wide_qwen), "device": "cpu", "dtype": "float32"})
    server = launch(settings, locate(settings), 256, SNAPSHOT.r + SECOND.r, tmp_path_factory.mktemp("work"))
    try:
        stack = tiny_stack(wide_qwen)
        first, second = random_adapter(stack, 1, size=SIZE), random_adapter(stack, 2, SECOND, size=SIZE)
        sampler = VllmSampler(server, stack)
        try:
            yield Case(server, stack, sampler, wide_qwen, first, second)
        finally:
            sampler.close()
    finally:
        server.close()


def assert_near_tie(logits: torch.Tensor, theirs: Sequence[int], own: Sequence[int]) -> None:
    """Two token lists are equal up to a near tie of `logits` [T, vocab], those along `own`."""
    for place, (a, b) in enumerate(zip(theirs, own, strict=False)):
        if a != b:
            gap = float(abs(logits[place, a] - logits[place, b]))
            assert gap < NEAR_TIE_NATS, f"token {place} is {a}, not {b}, which is likelier by {gap:.3f} nats"
            return
    assert len(theirs) == len(own)


@pytest.mark.parametrize("live", ["base", "snapshot", "stack"])
def test_greedy_tokens_are_those_of_the_resident_sampler_and_of_peft(case: Case, live: str) -> None:
    adapters = {"base": (), "snapshot": (case.first,), "stack": (case.first, case.second)}[live]
    theirs = case.assert_same(adapters, "assistant")
    model = plain_model(case.folder)
    if adapters:
        model = peft_model(case.folder, {str(place): adapter for place, adapter in enumerate(adapters)})
    for prompt, completion in zip(case.prompts("assistant"), theirs, strict=True):
        drawn = tokens(completion)
        reference = case.with_end(plain_logits(model, [*prompt, *completion.ids])[len(prompt) - 1 :])[: len(drawn)]
        gap = reference.max(-1).values - reference[range(len(drawn)), drawn]
        assert float(gap.max()) < NEAR_TIE_NATS, f"transformers prefers other tokens than {drawn}, by {gap.tolist()}"


def test_a_swapped_adapter_is_the_one_that_draws(case: Case) -> None:
    """Base, one, both, the other, base, both again: each as the resident base, each another, and the old one is gone."""
    results, names = [], []
    for live in ((), (case.first,), (case.first, case.second), (case.second,), (), (case.first, case.second)):
        results.append(case.assert_same(live, "assistant"))
        with httpx.Client(headers={"authorization": f"Bearer {case.server.key}"}, trust_env=False) as client:
            listed = {model["id"] for model in client.get(f"{case.server.url}/v1/models").json()["data"]}
        assert "base" in listed
        assert len(listed) <= 2, "an adapter that was swapped out is still served"
        names.append(max(listed))  # "stack-N", once there is one
    assert len(set(names[1:4] + names[5:])) == 4, "a name was used again"
    for i in range(4):
        for j in range(i):
            changed = sum(a != b for a, b in zip(results[i], results[j], strict=True))
            assert changed >= len(QUESTIONS) // 2, f"{i} and {j} hardly differ: which adapter drew?"


def test_two_probes_in_turn_and_at_once(case: Case) -> None:
    """Probes share questions and the server's prefix cache; neither may answer for the other, nor depend on the turn."""
    live, probes = (case.first, case.second), tuple(PROBES)
    in_turn = {probe: case.assert_same(live, probe) for probe in probes}
    assert in_turn["assistant"] != in_turn["librarian"]
    with case.stack.live(Slot(frozen=live)):
        pending = {
            probe: case.sampler.begin(case.prompts(probe), range(len(QUESTIONS)), GREEDY) for probe in reversed(probes)
        }
        for probe, one in pending.items():
            assert one.result() == in_turn[probe]


def test_seeds_decide_what_is_sampled(case: Case) -> None:
    settings, prompt = SamplingSettings(temperature=1.0, max_new_tok=12), case.prompts("assistant")[4]
    drawn = [
        case.sampler.draw([prompt] * 4, seeds, settings, lambda n_tok: None) for seeds in ([1, 2, 3, 4], [1, 2, 3, 4])
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 4


def test_an_engine_that_crashes_midway_is_one_line_and_leaves_nothing(case: Case) -> None:
    """The last test of this server. vLLM's engine is a process of its own: what the GPU's memory would end."""
    processes = descendants(case.server._process.pid)
    (engine,) = [pid for pid in processes if "EngineCore" in title(pid)]
    long = SamplingSettings(temperature=1.0, max_new_tok=80)
    pending = case.sampler.begin(case.prompts("assistant") * 16, range(16 * len(QUESTIONS)), long)
    until(lambda: pending.n_tok > 0 or pending.done)
    assert not pending.done, pending.result()
    os.kill(engine, 9)
    with pytest.raises(SamplerError, match=r"the same command goes on") as caught:
        pending.result()
    assert len(str(caught.value).splitlines()) == 1
    assert case.server.key not in str(caught.value)
    case.server.close()
    until(lambda: not any(map(running, processes)))
    assert not case.server.folder.exists()


def descendants(pid: int) -> list[int]:
    """Process ids under a process, itself first."""
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        children = Path(f"/proc/{found[-1]}/task").glob("*/children")
        waiting += [int(child) for file in children for child in file.read_text().split()]
    return found


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
