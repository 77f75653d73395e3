"""Fifty cells in one process: what one cell needs is given back before the next."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest
import torch

from fastconv.engine.generate import sample
from fastconv.engine.score import LetterItem, score_letters
from fastconv.engine.stack import Slot, Stack
from fastconv.engine.train import Hooks, Job, save_state, start, train
from fastconv.recipe import SamplingSettings
from tests.engine_kit import ragged_rows, random_adapter, tiny_stack, train_settings


def run_cell(stack: Stack, number: int) -> None:
    """A snapshot from its bytes, a behavior adapter trained on it, probes sampled and scored through both."""
    snapshot = stack.load_adapter(random_adapter(stack, number).to_bytes(), "cell")
    rows = ragged_rows(4, number)
    job = Job(f"cell-{number}", rows, train_settings(epochs=1, dropout=0.05), (number,), (snapshot,))
    trainee = start(stack, job, save_state(start(stack, job)))
    train(stack, [trainee], Hooks())
    with stack.live(Slot((snapshot, trainee.adapter))):
        stack.prove(None, "cell")
        score_letters(stack.base, [LetterItem(row.ids, (1, 2, 3)) for row in rows], 500)
        sample(stack.base, [row.ids for row in rows], [0, 1, 2, 3], SamplingSettings(max_new_tok=4))


def tensor_bytes() -> int:
    """Bytes of all tensors that anything still refers to, storages counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.slow
def test_fifty_cells_end_within_5_percent_of_the_memory_after_the_third(tiny_qwen: Path) -> None:
    stack = tiny_stack(tiny_qwen)
    process = psutil.Process()
    for number in range(3):
        run_cell(stack, number)
    tensors, resident = tensor_bytes(), process.memory_info().rss
    for number in range(3, 50):
        run_cell(stack, number)
    assert tensor_bytes() == tensors, "a cell left tensors behind"
    assert process.memory_info().rss < 1.05 * resident


def test_a_step_keeps_activations_for_its_tokens_not_for_its_adapters(tiny_qwen: Path) -> None:
    """Bytes that autograd saves in a step: more for more tokens, the same however many adapters lie in memory."""
    stack = tiny_stack(tiny_qwen)
    idle = [random_adapter(stack, number) for number in range(5)]

    def saved(n_rows: int) -> int:
        job = Job("job", ragged_rows(n_rows, 1, 30), train_settings(batch_rows=n_rows, epochs=1), ("job",), (idle[0],))
        trainee, kept = start(stack, job), {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            train(stack, [trainee], Hooks(), until_step=1)
        return sum(kept.values())

    few, many, more = saved(4), saved(8), saved(12)
    idle += [random_adapter(stack, number) for number in range(5, 25)]
    assert saved(4) == few, "adapters that are not live must cost a step nothing"
    n_tok = [sum(len(row.ids) for row in ragged_rows(n, 1, 30)) for n in (4, 8, 12)]
    per_tok = (many - few) / (n_tok[1] - n_tok[0])
    assert (more - many) / (n_tok[2] - n_tok[1]) == pytest.approx(per_tok, rel=0.1)
