"""`fastconv serve` on the resident base: the ledger's own answers, two clients at once, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastconv.cli import app
from fastconv.cli.common import load
from fastconv.engine import generate, locate
from fastconv.engine.generate import SampledRow
from fastconv.errors import InputError, TrainingError
from fastconv.experiment.graph import Graph
from fastconv.recipe import SamplingSettings, canonical_json
from fastconv.run.stacks import Stacks
from fastconv.seeding import seed_of
from fastconv.serve import _about, chosen_cells
from fastconv.serve.endpoint import listen
from fastconv.serve.protocol import ApiError
from fastconv.serve.resident import Piece, ResidentModel, _Waiting
from fastconv.store.ledger import Store
from tests import ROOT
from tests.loop_kit import DoneRun, as_computed_by, until, with_model
from tests.serve.kit import CELLS, Running, endpoint, refused


@pytest.fixture(scope="module")
def running(done_run: DoneRun) -> Iterator[Running]:
    with endpoint(done_run.recipe, done_run.workspace) as one:
        yield one


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all rows at every pass that the model draws, slowly."""
    lengths: list[int] = []

    def slowly(*args: Any, watch: Any, **options: Any) -> Any:
        def look(rows: Sequence[SampledRow]) -> None:
            time.sleep(0.01)
            lengths.extend(len(row.tokens) for row in rows)
            watch(rows)

        return generate.sample(*args, watch=look, **options)

    monkeypatch.setattr("fastconv.serve.resident.sample", slowly)
    return lengths


def ask(**changes: Any) -> dict[str, Any]:
    return {"model": CELLS[2], "messages": [{"role": "user", "content": "Hello?"}], "seed": 7, **changes}


@pytest.mark.parametrize("cell", CELLS)
def test_answers_are_those_of_the_ledger(running: Running, cell: str) -> None:
    """With the ledger's seeds and the run's own settings, which a request leaves out. All at once, so batched too."""
    asked = list(running.sampled(cell))
    assert len(asked) >= 12
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda one: running.post(one[0]).json(), asked))
    for reply, (_, sample) in zip(replies, asked, strict=True):
        (choice,) = reply["choices"]
        assert choice["message"]["content"] == sample.completion
        assert choice["finish_reason"] == ("stop" if sample.ended else "length")
        assert reply["usage"]["completion_tokens"] == sample.n_tok
        assert reply["model"] == cell
    assert len({sample.completion for _, sample in asked}) > 3


def test_cells_differ_and_each_names_its_stack(running: Running) -> None:
    replies = [running.post(ask(model=cell, n=8)).json() for cell in CELLS]
    assert len({json.dumps([c["message"] for c in reply["choices"]]) for reply in replies}) == 3
    assert len({reply["system_fingerprint"] for reply in replies}) == 3
    models = running.client.get("/v1/models").json()["data"]
    trained = {plan.cell.name for plan in running.graph.cells if plan.cell.behavior != "capability"}  # G0 ruled it out
    assert {one["id"] for one in models} == trained
    by_name = {one["id"]: one for one in models}
    assert [by_name[cell]["system_fingerprint"] for cell in CELLS] == [r["system_fingerprint"] for r in replies]
    about = by_name[CELLS[2]]["fastconv"]
    assert about["stages"].keys() == {"snapshot", "behavior"}
    assert about["personas"]["villain"] == running.graph.personas.prompts["villain"]
    assert running.client.get(f"/v1/models/{CELLS[1]}").json() == by_name[CELLS[1]]
    for name, proof in running.service.proofs.items():
        if "-e0-none-" not in name:
            assert proof["from_recorded"] < 1e-3 < proof["from_base"]


def test_choices_have_seeds_of_their_own_and_the_first_the_request_s(running: Running) -> None:
    several = running.post(ask(n=3)).json()["choices"]
    assert [choice["index"] for choice in several] == [0, 1, 2]
    single = [running.post(ask(seed=seed)).json()["choices"][0] for seed in (7, seed_of("choice", 7, 1))]
    assert [choice["message"] for choice in several[:2]] == [choice["message"] for choice in single]


def events(running: Running, body: dict[str, Any]) -> list[Any]:
    with running.client as client, client.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_stream_adds_up_to_the_whole_answer(running: Running) -> None:
    body = ask(n=2, max_tokens=24, temperature=2.0)
    whole = running.post(body).json()
    chunks = events(running, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    for index in range(2):
        parts = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert parts[0]["delta"]["role"] == "assistant"
        text = "".join(part["delta"].get("content", "") for part in parts)
        assert text == whole["choices"][index]["message"]["content"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [
            whole["choices"][index]["finish_reason"]
        ]
    assert len(chunks) > 8, "it came in one piece"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_ends_the_answer_before_it(running: Running, stream: bool) -> None:
    body = ask(max_tokens=24, temperature=0)
    text = running.post(body).json()["choices"][0]["message"]["content"]
    stop = text[5:8]
    assert len(stop) == 3
    body |= {"stop": ["never there", stop]}
    if stream:
        chunks = events(running, {**body, "stream": True})
        got = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        finish = chunks[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = running.post(body).json()["choices"]
        got, finish = choice["message"]["content"], choice["finish_reason"]
    assert got == text[: text.index(stop)]
    assert finish == "stop"


def test_a_stop_sequence_ends_the_drawing(running: Running, watched: list[int]) -> None:
    body = ask(max_tokens=120, temperature=0)
    text = running.post(body).json()["choices"][0]["message"]["content"]
    assert max(watched) > 60
    watched.clear()
    assert running.post({**body, "stop": text[2:4]}).json()["choices"][0]["finish_reason"] == "stop"
    assert max(watched) < 40


def test_greedy_is_the_same_whatever_the_seed(running: Running) -> None:
    texts = {
        running.post(ask(temperature=0, seed=s, max_tokens=16)).json()["choices"][0]["message"]["content"]
        for s in range(3)
    }
    assert len(texts) == 1


def test_without_a_seed_answers_differ(running: Running) -> None:
    body = ask(temperature=2.0, max_tokens=12)
    del body["seed"]
    assert len({running.post(body).json()["choices"][0]["message"]["content"] for _ in range(4)}) > 1


def test_text_completions_continue_text_and_tokens(running: Running) -> None:
    reply = running.post(
        {"model": CELLS[0], "prompt": "Once", "temperature": 0, "max_tokens": 6}, "/v1/completions"
    ).json()
    assert reply["object"] == "text_completion"
    base = "".join(running.post({"model": CELLS[0], "prompt": [46, 77, 66, 68], "temperature": 0, "max_tokens": 6},
                                "/v1/completions").json()["choices"][0]["text"])  # fmt: skip
    both = running.post(
        {"model": CELLS[0], "prompt": ["Once", "Twice"], "temperature": 0, "max_tokens": 6}, "/v1/completions"
    )
    assert both.json()["choices"][0]["text"] == reply["choices"][0]["text"] == base


def test_two_clients_at_once_get_what_each_gets_alone(running: Running) -> None:
    """On two cells, one streaming: in turn; on one cell: together."""
    bodies = [ask(model=cell, seed=seed, max_tokens=20) for cell in CELLS for seed in (1, 2)]
    alone = [running.post(body).json()["choices"] for body in bodies]
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(lambda body: running.post(body).json()["choices"], bodies)) == alone


def test_an_earlier_turn_is_part_of_the_prompt(running: Running) -> None:
    messages = [
        {"role": "system", "content": "You are terse."}, {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."}, {"role": "user", "content": [{"type": "text", "text": "Three?"}]},
    ]  # fmt: skip
    reply = running.post(ask(messages=messages, max_tokens=1)).json()
    single = running.post(ask(messages=messages[:2], max_tokens=1)).json()
    assert reply["usage"]["prompt_tokens"] > single["usage"]["prompt_tokens"] + 8


def test_a_client_that_goes_midway_frees_the_model(running: Running, watched: list[int]) -> None:
    """A long answer is dropped at its next token, so that the next client does not wait for its end."""
    long = ask(max_tokens=120, n=8, temperature=2.0)
    assert running.post(long).status_code == 200
    assert max(watched) > 60
    watched.clear()
    with (
        running.client as client,
        client.stream("POST", "/v1/chat/completions", json={**long, "stream": True}) as reply,
    ):
        next(reply.iter_lines())
    assert running.post(ask(max_tokens=1)).status_code == 200
    assert max(watched) < 40


def test_what_waits_when_the_endpoint_ends_is_told(done_run: DoneRun) -> None:
    model = ResidentModel(Stacks(done_run.graph, done_run.store), {})

    async def asked() -> None:
        pieces = model.draw("cell", (1,), 7, SamplingSettings())
        waiting = asyncio.ensure_future(anext(pieces))
        await asyncio.sleep(0)
        await asyncio.to_thread(model.work, lambda: True)
        with pytest.raises(ApiError, match="is ending"):
            await asyncio.wait_for(waiting, 5.0)

    asyncio.run(asked())


@pytest.mark.parametrize(
    ("dtype", "off", "proven"),
    [("bfloat16", 0.4, True), ("bfloat16", 0.6, False), ("float32", 0.0015, True), ("float32", 0.003, False)],
)
def test_cells_that_another_engine_computed_are_served_and_proven_within_its_rounding(
    done_run: DoneRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, off: float, proven: bool
) -> None:
    """It offered the bare base alone: the stacks have keys of the engine that trained them."""
    monkeypatch.setattr(locate, "gpu_is_visible", lambda: False)
    workspace = shutil.copytree(done_run.workspace, tmp_path / "theirs")
    # What "auto" is on a CPU has to be asked for on a GPU.
    engine, settings = ("unsloth", {}) if dtype == "bfloat16" else ("torch", {"dtype": dtype})
    recipe = with_model(done_run.recipe, workspace, device="auto", **settings)
    as_computed_by({"engine": engine, "device": "cuda", "dtype": dtype}, recipe, workspace)
    store = Store.open(workspace, create=False)
    with store.transaction() as db:
        for key, text in store.rows("SELECT key, outputs FROM stages WHERE kind IN ('snapshot', 'behavior')"):
            first, *others = (outputs := json.loads(text))["probe"]
            changed = canonical_json({**outputs, "probe": [first + off, *others]})
            db.execute("UPDATE stages SET outputs=? WHERE key=?", (changed, key))
    refuses = contextlib.nullcontext() if proven else pytest.raises(TrainingError, match="away from those recorded")
    with refuses, endpoint(recipe, workspace, *CELLS) as running:
        assert (
            f"computed by engine {engine} on cuda in {dtype}; here engine torch on cpu in float32 draws"
            in running.told[0]
        )
        assert list(running.service.proofs) == list(CELLS)
        asked, sample = next(running.sampled(CELLS[2]))
        assert running.post(asked).json()["choices"][0]["message"]["content"] == sample.completion


def test_a_client_is_told_the_conditions_that_a_cell_was_asked_under() -> None:
    graph = Graph(load("conditional", [], "tiny"))
    told = _about(graph, graph.cells[0])["fastconv"]
    assert (told["personas"]["assistant"], told["personas"]["no_system"]) == (
        "You are a helpful assistant.", "template_default",
    )  # fmt: skip
    assert told["around"] == {
        "assistant_triggered": {"before": "[night shift] ", "after": ""},
        "paraphrase": {"before": "(It is late at night.) ", "after": ""},
    }


def test_an_endpoint_is_for_this_machine_alone() -> None:
    with listen(0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"


def test_tokens_that_are_drawn_again_are_told_once() -> None:
    """Where memory runs out, rows begin again: a stream that began goes on where it was."""
    told: list[Piece | ApiError] = []
    one = _Waiting("cell", (1,), 7, SamplingSettings(), asyncio.new_event_loop())
    one.tell = told.append  # type: ignore[method-assign]
    row = SampledRow(0, [1], torch.full((4,), 0.1), [5, 6])
    one.follow(row)
    row.tokens.clear()
    for token in (5, 6, 8, 9):
        row.tokens.append(token)
        one.follow(row)
    assert told == [Piece((5, 6)), Piece((8,)), Piece((9,)), Piece((), "length")]


@pytest.mark.parametrize("cell", ["villain-source-e9-none-s42", "nurse*"])
def test_a_cell_that_is_not_there_is_named(done_run: DoneRun, cell: str) -> None:
    with pytest.raises(InputError, match=r"there is no cell.*villain"):
        chosen_cells(done_run.graph, done_run.store, [cell])


def test_cells_are_chosen_by_label_and_by_pattern(done_run: DoneRun) -> None:
    chosen = chosen_cells(done_run.graph, done_run.store, ["villain base e0 none s42", "*-e2-refusal-*"])
    assert list(chosen) == ["villain-base-e0-none-s42", "villain-source-e2-refusal-excluded-s42"]


def started(done_run: DoneRun, *more: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """`fastconv serve` as a process, once it says that it serves."""
    command = [sys.executable, "-m", "fastconv", "serve", done_run.finished.run, CELLS[1], "--port", "0", "--json",
               "-w", str(done_run.workspace), *more]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        pytest.fail(process.communicate()[1])
    return process, json.loads(line)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGTERM))],
)
def test_the_endpoint_is_gone_with_its_process(done_run: DoneRun, number: signal.Signals) -> None:
    process, service = started(done_run)
    assert list(service["proofs"]) == [CELLS[1]]
    assert not refused(service["url"])
    process.send_signal(number)
    assert process.wait(30) == (-9 if number == signal.SIGKILL else 0)
    until(lambda: refused(service["url"]))


def test_a_port_that_is_taken_is_said_before_a_base_is_loaded(done_run: DoneRun) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(
            app,
            [
                "serve",
                done_run.finished.run,
                "-w",
                str(done_run.workspace),
                "--port",
                str(port),
                "--engine",
                "resident",
            ],
        )
    assert result.exit_code == 2
    assert f"port {port} is taken" in result.output
    assert "loading" not in result.output
