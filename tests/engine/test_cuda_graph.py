"""Which micro-steps are captured as graphs, and what a replay computes: on the CPU, with a device that stands in for CUDA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastconv.engine import cuda_graph
from fastconv.engine import train as loop
from fastconv.engine.attention import Padded
from fastconv.engine.cuda_graph import CapturedSteps, StepTimes
from fastconv.engine.micro_batch import JobSizes, MicroBatch, make_micro_batch, rounded_sizes
from fastconv.engine.stack import Slot, Stack
from fastconv.engine.train import Hooks, Job, _forward_backward, _items, start, train
from tests.engine_kit import StandInDevice, ragged_rows, random_adapter, tiny_stack, train_settings


def batch_of(stack: Stack, job: Job, step: int = 0) -> MicroBatch:
    """A step's rows in the layout of a GPU, on the CPU."""
    trainee = start(stack, job)
    trainee.step = step
    trainee.adapter.train(trainee.grad)
    items = _items(0, trainee)
    batch = make_micro_batch(stack.base, [Slot(job.frozen, trainee.adapter)], items, rounded_sizes)
    layout = Padded.of([len(item.row.ids) for item in items], width=64, n_rows=8)
    return replace(batch, layout=layout)


def steps_of(stack: Stack) -> tuple[CapturedSteps, StandInDevice]:
    device = StandInDevice(stack)
    return CapturedSteps(stack, partial(_forward_backward, stack), device), device


def test_a_replay_adds_what_the_launched_step_adds(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepTimes, "worth_capturing", lambda *_: True)
    stack = tiny_stack(tiny_qwen)
    batch = batch_of(stack, Job("a", ragged_rows(4), train_settings(), ("a",), (random_adapter(stack, 1),)))
    trainee = batch.slots[0].trainable
    assert trainee is not None
    steps, device = steps_of(stack)
    found = []
    for _ in range(3):
        trainee.train(torch.zeros_like(trainee.flat)) if not found else [
            weight.grad.zero_() for pair in trainee.weights.values() for weight in pair if weight.grad is not None
        ]
        totals = torch.zeros(1)
        steps.run(batch, totals)
        grads = torch.cat([w.grad.flatten() for pair in trainee.weights.values() for w in pair if w.grad is not None])
        found.append((float(totals), grads.clone()))
    assert device.calls == ["capture", "replay", "replay"]
    assert len(steps) == 1
    for total, grads in found[1:]:
        assert total == found[0][0]
        assert torch.equal(grads, found[0][1])
    assert not steps.shared, "torch's operations keep the addresses of one adapter"
    steps.end_of_trainees()
    assert not len(steps)


def never_known() -> float | None:
    return None


def times_with(launch_s: float, capture_s: float, device_s: float, device_tok: int) -> StepTimes:
    times = StepTimes(launch_s=launch_s, capture_s=capture_s)
    times.replayed(device_tok, lambda: device_s)
    return times


def test_a_size_met_a_third_time_is_captured_to_learn_the_times() -> None:
    """Not the second time: the first launch of all holds what is compiled, and says nothing of the host."""
    assert not StepTimes(launch_s=0.1).worth_capturing(500, 1, 9)
    assert StepTimes(launch_s=0.1).worth_capturing(500, 2, 0)
    waiting = StepTimes(launch_s=0.1, capture_s=0.4)
    waiting.replayed(500, never_known)
    assert not waiting.worth_capturing(500, 2, 9), "how long the device takes is not known yet"


def test_launches_that_the_device_takes_longer_for_than_the_host_are_never_captured() -> None:
    """A capture of a large size takes as much memory again as the step; six runs of 7B then trained in halved batches."""
    times = StepTimes()
    times.launched(7000, 2.1, lambda: 2.1)  # with all that is compiled
    assert not times.device_tok
    times.launched(7200, 0.29, lambda: 0.42)
    assert (times.launch_s, times.device_tok, times.device_s) == (0.29, 7200, 0.42)
    assert not times.worth_capturing(7200, 2, 1000)
    assert not times.worth_capturing(7000, 2, 1000)
    assert times.worth_capturing(1300, 2, 2), "0.29 s to launch what the device does in 0.08 s"


def test_a_size_is_captured_early_where_many_steps_are_left(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an H100 at 7B: 0.18 s to launch or capture, 0.09 s on the device. In a schedule of 2,000 steps a size that is
    met twice in ten is worth a graph at once; with none left it has to be met as often as a capture costs."""
    asked: list[int] = []
    monkeypatch.setattr(StepTimes, "worth_capturing", lambda times, n_tok, n_direct, n_more: bool(asked.append(n_more)))
    stack = tiny_stack(tiny_qwen)
    batch = batch_of(stack, Job("a", ragged_rows(4), train_settings(), ("a",)))
    steps, _ = steps_of(stack)
    for left in (2000, 2000, 0, 0):
        steps.steps_left = left
        steps.run(batch, torch.zeros(1))
    assert asked == [2000, 2, 3]
    assert steps.tally.launched == 4
    assert steps.tally.captures == 0


def test_training_says_how_many_steps_are_left(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = tiny_stack(tiny_qwen)
    steps, _ = steps_of(stack)
    monkeypatch.setattr(loop, "captured_steps", lambda stack: steps)
    seen: list[int] = []
    monkeypatch.setattr(loop, "_round", lambda stack, active: [seen.append(steps.steps_left), step(active)])

    def step(active) -> None:
        for trainee in active:
            trainee.step += 1

    job = Job("a", ragged_rows(12), train_settings(epochs=2), ("a",))
    train(stack, [start(stack, job)], Hooks(), until_step=2)
    assert seen == [job.n_steps, job.n_steps - 1]


def test_what_keeps_the_device_busy_in_any_case_is_not_captured_to_learn_how_long() -> None:
    """Graphs of six runs at 7B would hold 35 GB to save nothing."""
    times = times_with(0.18, 0.19, 0.087, 1280)
    assert not times.worth_capturing(4864, 2, 100)
    assert not times.worth_capturing(7424, 2, 100)
    assert times_with(0.18, 0.19, 0.029, 1280).worth_capturing(4864, 2, 100), "at 1.5B the host is the slower one"
    assert times_with(0.18, 0.19, 0.03, 100).worth_capturing(7424, 2, 1), "so small a size says nothing of a large one"


def test_after_memory_ran_out_no_graph_is_as_large(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepTimes, "worth_capturing", lambda *_: True)
    stack = tiny_stack(tiny_qwen)
    job = Job("a", ragged_rows(12), train_settings(epochs=1), ("a",))
    steps, device = steps_of(stack)
    large = batch_of(stack, job)
    small = batch_of(stack, Job("b", ragged_rows(2), train_settings(), ("b",)))
    assert small.ids.shape[0] < large.ids.shape[0]
    for batch in (large, large, small, small):
        steps.run(batch, torch.zeros(1))
    assert len(steps) == 2
    steps.forget()
    assert not len(steps)
    for batch in (large, small, small):
        steps.run(batch, torch.zeros(1))
    assert len(steps) == 1
    assert device.calls.count("capture") == 3


@pytest.mark.parametrize(
    ("device_s", "n_direct", "worth"),
    [(0.05, 6, False), (0.05, 7, True), (0.0999, 1000, False), (0.2, 1000, False)],
    ids=["idles_for_less_than_a_capture", "for_as_long", "hardly_ever", "never"],
)
def test_a_size_is_captured_once_the_device_would_idle_for_a_capture(
    device_s: float, n_direct: int, worth: bool
) -> None:
    """0.1 s to launch, 0.4 s to capture; the device needs `device_s` for 1,000 tokens."""
    assert times_with(0.1, 0.4, device_s, 1000).worth_capturing(1000, 2, n_direct) is worth


def test_as_measured_on_an_h100_a_size_is_captured_when_it_is_met_again() -> None:
    """The host takes 0.18 s to launch, 0.19 s to capture; the device computes 1,300 tokens in 0.03 s."""
    assert times_with(0.18, 0.19, 0.03, 1300).worth_capturing(1300, 2, 1)


def test_the_loop_pads_what_can_be_captured_though_nothing_is_yet(
    tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps without a graph have the length 0: were they taken for none, no size would ever be met twice."""
    stack = tiny_stack(tiny_qwen)
    trainee = start(stack, Job("a", ragged_rows(12), train_settings(epochs=1), ("a",)))
    steps, _ = steps_of(stack)
    asked: list[object] = []
    real = loop.make_micro_batch

    def noted(base, slots, micro, sizes_for) -> MicroBatch:
        asked.append(sizes_for)
        lengths = [len(item.row.ids) for item in micro]
        return replace(real(base, slots, micro, sizes_for), layout=Padded.of(lengths, width=64, n_rows=8))

    monkeypatch.setattr(loop, "make_micro_batch", noted)
    monkeypatch.setattr(loop, "captured_steps", lambda stack: steps)
    assert not len(steps)
    train(stack, [trainee], Hooks())
    assert [type(one) for one in asked] == [JobSizes] * 3
    assert asked[0] is asked[1] is asked[2], "found once for all steps"
    assert steps.times.launch_s < float("inf"), "they were run by it"


def test_small_sizes_wait_longer_for_the_host_than_large_ones() -> None:
    times = times_with(0.1, 0.4, 0.08, 1000)
    assert times.worth_capturing(100, 2, 5)
    assert not times.worth_capturing(1000, 2, 5)


def test_a_much_larger_size_is_captured_once_to_learn_how_long_the_device_takes() -> None:
    times = times_with(0.1, 0.4, 0.09, 200)
    assert not times.worth_capturing(2000, 1, 9)
    assert times.worth_capturing(2000, 2, 2)
    times.replayed(2000, never_known)
    assert not times.worth_capturing(2000, 2, 2)
    assert not times.worth_capturing(1900, 2, 3), "one is enough"
    times.replayed(2000, lambda: 0.2)  # read in order: after the one that is not known
    times._pending.popleft()
    assert not times.worth_capturing(1900, 2, 3)
    assert times.device_tok == 2000


def test_the_graph_used_longest_ago_makes_room(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepTimes, "worth_capturing", lambda *_: True)
    monkeypatch.setattr(cuda_graph, "_MAX_GRAPHS", 2)
    stack = tiny_stack(tiny_qwen)
    job = Job("a", ragged_rows(4), train_settings(), ("a",))
    whole = batch_of(stack, job)
    steps, device = steps_of(stack)
    first, second, third = (
        replace(
            whole, take=whole.take[:n], targets=whole.targets[:n], weights=whole.weights[:n], owners=whole.owners[:n]
        )
        for n in (2, 3, 4)
    )
    for batch in (first, first, second, second, first, third, third):
        steps.run(batch, torch.zeros(1))
    assert len(steps) == 2
    device.calls.clear()
    steps.run(first, torch.zeros(1))
    steps.run(third, torch.zeros(1))
    assert device.calls == ["replay", "replay"], "the second had made room"


def test_running_out_of_memory_in_a_capture_ends_captures_and_loses_nothing(
    tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepTimes, "worth_capturing", lambda *_: True)
    stack = tiny_stack(tiny_qwen)
    batch = batch_of(stack, Job("a", ragged_rows(4), train_settings(), ("a",)))
    steps, device = steps_of(stack)

    def full(run: Callable[[], None]) -> Callable[[], None]:
        device.calls.append("capture")
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(device, "capture", full)
    totals = [torch.zeros(1) for _ in range(4)]
    for total in totals:
        steps.run(batch, total)
    assert device.calls == ["capture"]
    assert len({float(total) for total in totals}) == 1
    assert float(totals[0]) > 0
    steps.forget()
    steps.run(batch, torch.zeros(1))
    assert device.calls == ["capture"] * 2, "until what the graphs held is free"


def test_memory_that_runs_out_in_training_first_costs_what_is_kept_for_speed(
    tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the micro-batch; a step launched again with nothing to drop must not go round for ever."""
    stack, limits = tiny_stack(tiny_qwen), []
    trainee = start(stack, Job("a", ragged_rows(8), train_settings(batch_rows=4, epochs=1), ("a",)))
    stack.base.kept["steps"] = [1, 2]  # anything that has a length
    plain = loop.micro_step

    def short_of_memory(stack: Stack, batch: MicroBatch, totals: torch.Tensor) -> None:
        limits.append(trainee.micro_batch_tok)
        if len(limits) < 3:
            raise torch.OutOfMemoryError("no room")
        plain(stack, batch, totals)

    monkeypatch.setattr(loop, "micro_step", short_of_memory)
    train(stack, [trainee], Hooks())
    assert limits[0] == limits[1] > limits[2]
    assert not stack.base.kept
    assert trainee.done


def test_memory_that_runs_out_costs_graphs_and_not_what_they_taught(tiny_qwen: Path) -> None:
    stack = tiny_stack(tiny_qwen)
    steps, _ = steps_of(stack)
    steps._graphs["a size"] = SimpleNamespace(inputs=SimpleNamespace(ids=torch.zeros(64)))  # pyright: ignore[reportArgumentType]
    stack.base.kept["steps"] = steps
    loop._reduce_memory(stack.base, [], [])
    assert stack.base.kept == {"steps": steps}
    assert not len(steps)
