"""Memory runs out in a pass: half as much at a time and the same results, or one line where a single row does not fit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastconv.engine import generate
from fastconv.engine.generate import sample
from fastconv.engine.geometry import last_token_states
from fastconv.engine.model import Base
from fastconv.engine.score import (
    LetterItem,
    TextItem,
    in_halves,
    memory_errors,
    score_letters,
    score_texts,
    with_memory,
)
from fastconv.engine.stack import Slot, Stack
from fastconv.errors import TrainingError
from fastconv.experiment.graph import Graph
from fastconv.recipe import Recipe, SamplingSettings
from fastconv.report import write_report
from fastconv.store.ledger import Store
from tests.engine_kit import random_adapter, tiny_stack
from tests.loop_kit import records, results, run_tiny

SETTINGS = SamplingSettings(temperature=1.0, top_p=0.95, max_new_tok=12)
#: What torch raises where memory runs out: on a device, in its libraries, on the machine itself.
KINDS: list[Exception] = [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
]  # fmt: skip


@pytest.fixture(scope="module")
def stack(tiny_qwen: Path) -> Stack:
    return tiny_stack(tiny_qwen)


def prompts(n: int) -> list[tuple[int, ...]]:
    rng = random.Random(0)
    return [tuple(rng.randrange(256) for _ in range(rng.randint(6, 30))) for _ in range(n)]


def letters(stack: Stack, on_halved: Callable[[], None], n: int = 12) -> list[tuple[float, ...]]:
    items = [LetterItem(prompt, (3, 7, 11)) for prompt in prompts(n)]
    return [score.logprobs for score in score_letters(stack.base, items, 10_000, on_halved)]


def texts(stack: Stack, on_halved: Callable[[], None], n: int = 12) -> list[tuple[float, ...]]:
    items = [TextItem(prompt, ((5, 6, 7), (8, 9)), (0, 0), (3, 2)) for prompt in prompts(n)]
    return [score.logprobs for score in score_texts(stack.base, items, 10_000, on_halved)]


def states(stack: Stack, on_halved: Callable[[], None], n: int = 12) -> list[list[float]]:
    return last_token_states(stack.base, prompts(n), [1, 2], 10_000, on_halved).flatten(1).tolist()


def drawn(stack: Stack, on_halved: Callable[[], None], n: int = 12) -> list[list[int]]:
    counted: list[int] = []
    found = sample(stack.base, prompts(n), list(range(n)), SETTINGS, counted.append, on_halved)
    assert sum(counted) == sum(len(one.ids) + one.ended for one in found)
    return [[*one.ids, one.ended] for one in found]


def probed(stack: Stack, on_halved: Callable[[], None], n: int = 0) -> list[list[float]]:
    with stack.live(Slot((stack.take(random_adapter(stack, 1)),))):
        return [list(stack.probe().logits)]


PASSES = {"letters": letters, "texts": texts, "states": states, "sampling": drawn}


def memory_for(monkeypatch: pytest.MonkeyPatch, n_tok: int, error: Exception = KINDS[0]) -> list[int]:
    """A device whose memory holds passes of `n_tok` tokens; the list gets the size of each pass that is tried."""
    real, tried = Base.hidden, []

    def hidden(self: Base, ids: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        tried.append(len(ids))
        if len(ids) > n_tok:
            raise error
        return real(self, ids, *rest, **named)

    monkeypatch.setattr(Base, "hidden", hidden)
    return tried


@pytest.mark.parametrize("error", KINDS, ids=lambda error: f"{type(error).__name__}{str(error)[:12]}")
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_that_does_not_fit_is_halved_and_gives_the_same(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    halved: list[int] = []
    plenty = PASSES[name](stack, lambda: halved.append(0))
    assert not halved
    tried = memory_for(monkeypatch, 60, error)
    scarce = PASSES[name](stack, lambda: halved.append(1))
    assert halved
    assert max(tried) > 60
    assert len(scarce) == len(plenty)
    for one, other in zip(plenty, scarce, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_the_probe_is_read_row_by_row(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    (plenty,) = probed(stack, lambda: None)
    tried = memory_for(monkeypatch, 8)
    (scarce,) = probed(stack, lambda: None)
    assert max(tried) > 8
    assert scarce == pytest.approx(plenty, abs=1e-4)
    memory_for(monkeypatch, 4)
    with pytest.raises(TrainingError, match="one row alone does not fit"):
        probed(stack, lambda: None)
    spans = ((0, 8),)
    with stack.live(Slot(), spans=spans):  # as in a pass over packed rows
        with pytest.raises(TrainingError, match="one row alone does not fit"):
            stack.probe()
        assert stack.route.spans == spans
    monkeypatch.undo()
    assert probed(stack, lambda: None) == [pytest.approx(plenty, abs=1e-4)]  # the stack is whole after it


@pytest.mark.parametrize("name", PASSES)
def test_memory_for_less_than_a_row_is_one_line(stack: Stack, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plenty = PASSES[name](stack, lambda: None)
    memory_for(monkeypatch, 4)
    with pytest.raises(TrainingError, match="one row alone does not fit in memory") as caught:
        PASSES[name](stack, lambda: None)
    assert caught.value.exit_code == 7
    assert str(caught.value).isprintable()
    monkeypatch.undo()
    assert PASSES[name](stack, lambda: None) == plenty


def test_memory_that_runs_out_while_sampling_keeps_what_is_finished(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out in a later step than the first: rows in half-done state begin again and come out the same."""
    plenty = drawn(stack, lambda: None)
    for at in (2, 5, 9):
        real, calls = Base.hidden, [0]

        def hidden(self: Base, *given: Any, at: int = at, calls: list[int] = calls, real: Any = real) -> torch.Tensor:
            calls[0] += 1
            if calls[0] in (at, at + 1):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(self, *given)

        with monkeypatch.context() as patched:
            patched.setattr(Base, "hidden", hidden)
            patched.setitem(generate.MAX_ROWS, "cpu", 8)
            assert drawn(stack, lambda: None) == plenty


def test_errors_that_are_no_want_of_memory_are_not_taken_for_it() -> None:
    def broken() -> int:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(in_halves(SimpleNamespace(drop_kept=bool), [1, 2], lambda part: broken(), lambda: None))
    with pytest.raises(RuntimeError, match="shapes differ"), memory_errors("here"):
        broken()

    def in_capture() -> int:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("the capture failed because of an earlier error")

    assert with_memory(in_capture) is None
    with pytest.raises(TrainingError, match="no memory is left on the device"), memory_errors("here"):
        in_capture()


@pytest.mark.slow
def test_a_run_in_little_memory_ends_with_the_same_and_its_report_says_so(
    recipe: Recipe, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = memory_for(monkeypatch, 900)
    run_tiny(recipe, tmp_path / "ws")
    assert max(tried) > 900
    found = results(recipe, tmp_path / "ws")
    assert found.keys() == whole.keys()
    # Weights differ in their last bits, as a step's shares are added in another order; what is sampled under them does not.
    assert {slot: json.loads(text)[1] for slot, text in found.items()} == {
        slot: json.loads(text)[1] for slot, text in whole.items()
    }
    halved = {s.partition("/")[0] for s, done in records(recipe, tmp_path / "ws").items() if done.facts.get("halved")}
    assert halved == {"answers", "eval", "geometry"}
    page = write_report(Graph(recipe), Store.open(tmp_path / "ws", create=False), tmp_path / "reports").html
    assert "memory ran out: batches halved" in page.read_text()
