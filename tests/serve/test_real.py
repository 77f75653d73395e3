"""vLLM itself (its CPU build) and the resident base behind the endpoint: served answers are the ledger's, near ties apart.

Run by `make test-vllm` with vLLM in a virtual environment of its own. Greedy and in fp32.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fastconv.chat import ChatTokenizer
from fastconv.engine.vllm.server import COMMAND_VARIABLE
from fastconv.experiment.graph import Graph
from fastconv.recipe import Recipe
from fastconv.run.stacks import Stacks
from fastconv.store.ledger import Store
from tests.engine_kit import packed_logits
from tests.loop_kit import run_tiny, tiny_recipe, until
from tests.serve.kit import CELLS, Running, endpoint
from tests.serve_kit import running

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(COMMAND_VARIABLE not in os.environ, reason="needs the virtual environment of make test-vllm"),
]

#: A token that the reference prefers by less (nats) is a near tie.
NEAR_TIE_NATS = 0.01


@pytest.fixture(scope="module")
def run(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A greedy run with answers of 12 tokens and adapters that change them, on 2 heads of 32: vLLM's CPU attention has no
    heads of 16. Ranks differ between modules, and one layer of three carries none."""
    folder = tmp_path_factory.mktemp("wide") / "qwen"
    shutil.copytree(tiny_qwen, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2, "num_key_value_heads": 1}))
    lora = {"r": 4, "alpha": 8.0, "layers": "1-2", "rank_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 6}}
    recipe = tiny_recipe(
        folder, lora=lora, convergence__lr=5e-2, behavior__lr=5e-2, eval__sampling={"temperature": 0.0, "max_new_tok": 12},
        gates__stop=[], eval__geometry=False, eval__samples_per_prompt=1,
    )  # fmt: skip
    workspace = tmp_path_factory.mktemp("work") / "checkpoints"
    run_tiny(recipe, workspace)
    return recipe, workspace


@pytest.fixture(scope="module")
def served(run: tuple[Recipe, Path]) -> Iterator[Running]:
    """Three cells on one server, which is gone with its endpoint."""
    before = vllm_processes()
    with endpoint(*run, *CELLS, engine="vllm") as one:
        started = vllm_processes() - before
        assert started
        yield one
    until(lambda: not any(map(running, started)))


def assert_near_tie(recipe: Recipe, workspace: Path, cell: str, body: dict[str, Any], theirs: str, own: str) -> None:
    """Two greedy answers differ only from a token on that the resident base under this stack hardly prefers."""
    graph, store = Graph(recipe), Store.open(workspace, create=False)
    plan = next(plan for plan in graph.cells if plan.cell.name == cell)
    stacks = Stacks(graph, store)
    tokenizer: ChatTokenizer = stacks.base.tokenizer
    prompt = tokenizer.conversation_ids(body["messages"])
    first, second = (tokenizer.encode(text) for text in (theirs, own))
    place = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    with stacks.live_stack(next(iter(plan.scores.values()))), torch.no_grad():
        (logits,) = packed_logits(stacks.base, [[*prompt, *second[:place]]])
    best = logits[-1].topk(2).values
    assert float(best[0] - best[1]) < NEAR_TIE_NATS, f"{theirs!r} is served, {own!r} is recorded"


@pytest.mark.parametrize("cell", CELLS)
def test_vllm_s_answers_are_the_ledger_s(served: Running, run: tuple[Recipe, Path], cell: str) -> None:
    asked = list(served.sampled(cell))
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda one: served.post(one[0]).json(), asked))
    same = 0
    for reply, (body, sample) in zip(replies, asked, strict=True):
        (choice,) = reply["choices"]
        if choice["message"]["content"] == sample.completion:
            same += 1
        else:
            assert_near_tie(*run, cell, body, choice["message"]["content"], sample.completion)
    assert same >= 0.8 * len(asked)


def test_each_cell_is_proven_by_vllm_s_own_logits(served: Running) -> None:
    for cell in CELLS[1:]:
        proof = served.service.proofs[cell]
        assert proof["from_recorded"] < 2e-3 < proof["from_base"]
    assert served.service.engine.startswith("vllm")


@pytest.mark.parametrize("cell", CELLS)
def test_the_resident_base_answers_alike(served: Running, run: tuple[Recipe, Path], cell: str) -> None:
    with endpoint(*run, cell, engine="resident") as resident:
        for body, sample in resident.sampled(cell):
            assert resident.post(body).json()["choices"][0]["message"]["content"] == sample.completion


def test_cells_differ(served: Running) -> None:
    bodies = [body["messages"] for body, _ in served.sampled(CELLS[0])]
    answers = [
        [
            served.post({"model": cell, "messages": messages}).json()["choices"][0]["message"]["content"]
            for messages in bodies
        ]
        for cell in CELLS
    ]
    assert all(answers[i] != answers[j] for i in range(3) for j in range(i))


def test_two_clients_at_once_on_two_cells_one_of_them_a_stream(served: Running) -> None:
    def body(cell: str, **more: Any) -> dict[str, Any]:
        return {"model": cell, "messages": [{"role": "user", "content": "Hello?"}], "seed": 3, "temperature": 1.0,
                "max_tokens": 40, **more}  # fmt: skip

    def streamed(cell: str) -> str:
        with (
            served.client as client,
            client.stream("POST", "/v1/chat/completions", json=body(cell, stream=True)) as reply,
        ):
            lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
        assert lines.pop() == "[DONE]"
        assert len(lines) > 10
        return "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines)

    def whole(cell: str) -> str:
        return served.post(body(cell)).json()["choices"][0]["message"]["content"]

    alone = [whole(CELLS[1]), whole(CELLS[2])]
    with ThreadPoolExecutor(2) as threads:
        both = threads.submit(streamed, CELLS[1]), threads.submit(whole, CELLS[2])
        assert [one.result() for one in both] == alone


def vllm_processes() -> set[int]:
    """Process ids of every vLLM server on this machine, ours or not."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"vllm" in path.read_bytes().lower() and b"pytest" not in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found
