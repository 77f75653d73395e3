"""What a run shows while it goes on: figures that stand whole at any width, and a time left that learns."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fastconv.datasets.files import find_recipe
from fastconv.experiment.workload import Sketch
from fastconv.planning.hardware import PlannedStage, TimeLeft, cpu_machine
from fastconv.planning.plan import Plan, make_plan, time_left
from fastconv.recipe import load_recipe
from fastconv.run.sampling import Progress
from fastconv.show import progress as module
from fastconv.show.progress import BarWatcher, LineWatcher, StageClock, bar_line
from fastconv.stats.units import duration_text, rate_text, shortened, shortened_slot
from fastconv.store.records import Stage

SLOT = "score/kindergarten_teacher/source/e20+misalignment/excluded/misalignment/assistant/s42"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (4.2, "4.2s"), (9.96, "10s"), (59.4, "59s"), (59.6, "1m 00s"), (750, "12m 30s"),
     (3599.7, "1h 00m"), (7500, "2h 05m"), (360000, "4d 04h"), (-3, "0.0s")],
)  # fmt: skip
def test_times_have_one_style(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_a_rate_is_told_by_the_way_that_is_above_one() -> None:
    assert rate_text(3.14, "steps") == "3.1 steps/s"
    assert rate_text(0.4, "steps") == "2.5 s/step"
    assert rate_text(13421.0, "tok") == "13,421 tok/s"


@given(st.text("abc/_", max_size=90), st.integers(4, 100))
def test_a_name_loses_its_middle_and_nothing_else(name: str, width: int) -> None:
    short = shortened(name, width)
    assert len(short) <= width
    assert short == name or (len(short) == width and short[0] == name[0] and short[-1] == name[-1] and ".." in short)


@pytest.mark.parametrize("width", [35, 41, 50, 61, 90])
def test_a_slot_keeps_its_epoch_and_its_seed(width: int) -> None:
    short = shortened_slot(SLOT, width)
    assert len(short) <= width
    assert short.endswith("/s42")
    assert "/e20+mi" in short
    assert (short == SLOT) == (len(SLOT) <= width)
    alone = SLOT.replace("+misalignment/excluded", "")
    assert shortened_slot(alone, width) != short


@given(st.text("abc/+_", max_size=90), st.integers(4, 100))
def test_any_slot_fits(slot: str, width: int) -> None:
    assert len(shortened_slot(slot, width)) <= width


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("name", ["run", SLOT])
def test_count_and_time_left_stand_whole_at_every_width(name: str, width: int) -> None:
    figures = ["12,345/123,456 tok", "at most 12m 30s left", "1,234 tok/s", "loss 12.345"]
    line = bar_line(width, name, figures, 0.25)
    assert len(line) <= width
    assert "12,345/123,456 tok" in line.plain
    assert "at most 12m 30s left" in line.plain
    assert line.plain.startswith(name[:2])
    assert ("loss 12.345" in line.plain) == (width >= (80 if name == "run" else 100))
    if width == 200:
        assert name in line.plain
        assert "\u2501" in line.plain


def test_a_stage_tells_its_rate_from_its_own_first_step_on() -> None:
    clock = StageClock(0.0)
    assert clock.figures(3.0) == ["3.0s so far"]
    clock.note(Progress("s", 101, 200, "steps", 1.5), 10.0)  # 100 of them came from a checkpoint
    assert clock.figures(10.0) == ["101/200 steps", "10s so far", "loss 1.500"]
    clock.note(Progress("s", 106, 200, "steps", 1.25), 20.0)
    assert clock.figures(20.0) == ["106/200 steps", "3m 08s left", "2.0 s/step", "loss 1.250"]


def _run(true_ratio: dict[str, float]) -> list[tuple[float, float]]:
    """(seconds gone, seconds that the clock says are left) after each stage of a run whose stages take other times than
    planned: convergence, then eight cells of a behavior, an evaluation and a score each."""
    kinds = ["snapshot", *["behavior", "eval", "eval", "score"] * 8]
    planned = {"snapshot": 60.0, "behavior": 20.0, "eval": 10.0, "score": 1.0}
    todo = {f"k{i}": PlannedStage(kind, f"k{i}", planned[kind]) for i, kind in enumerate(kinds)}
    left, now, seen = TimeLeft(todo, 5.0, 0.0), 9.0, []
    left.loaded(now)
    for key, stage in todo.items():
        left.begin(key, now)
        took = stage.seconds * true_ratio[stage.kind]
        for tenth in range(1, 10):
            left.progress(tenth / 10, exact=stage.kind == "behavior")
            seen.append((now + took * tenth / 10, left.seconds(now + took * tenth / 10)))
        now += took
        left.done(key, now)
        seen.append((now, left.seconds(now)))
    return [(gone, said) for gone, said in seen if gone < now] + [(now, left.seconds(now))]


@pytest.mark.parametrize(
    "ratio",
    [
        {"snapshot": 1.0, "behavior": 1.0, "eval": 1.0, "score": 1.0},
        {"snapshot": 3.0, "behavior": 3.0, "eval": 3.0, "score": 3.0},
        {"snapshot": 0.4, "behavior": 0.5, "eval": 0.4, "score": 2.0},
        {"snapshot": 2.0, "behavior": 1.6, "eval": 2.4, "score": 1.0},
    ],
)
def test_the_time_left_is_right_within_30_percent_from_the_first_fifth_on(ratio: dict[str, float]) -> None:
    seen = _run(ratio)
    total = seen[-1][0]
    assert seen[-1][1] == 0.0
    for gone, said in seen:
        if total / 5 <= gone < 0.95 * total:
            assert said == pytest.approx(total - gone, rel=0.3), (gone, said, total)


def _demo(graph: Sketch, plan: Plan, rng: random.Random) -> Iterator[tuple[float, float, float]]:
    """(seconds gone, seconds said to be left, seconds left) over a `make demo` that is unlike its plan.

    Each kind of stage takes 0.6 to 1.3 times its plan, start-up 0.5 to 3 times, each stage by itself 5 % more or less; a
    training is slow to start. Begins where a tenth of the first training is done. G0 rules capability out.
    """
    stages = [stage for stage in graph.stages(graph.cells) if stage.key in plan.by_stage]
    off = {kind: math.exp(rng.uniform(math.log(0.6), math.log(1.3))) for kind in sorted({s.kind for s in stages})}
    took = {stage.key: plan.by_stage[stage.key] * off[stage.kind] * math.exp(rng.gauss(0, 0.05)) for stage in stages}
    asked = [stage for stage in stages if stage.slot.startswith(("eval/base", "score/base"))]
    kept = [stage for stage in stages if stage in asked or "capability" not in stage.slot]
    left, now, seen = time_left(plan, graph, graph.cells, 0.0), plan.start_s * rng.uniform(0.5, 3.0), []
    left.loaded(now)
    for stage in kept:
        left.begin(stage.key, now)
        exact = stage.kind in ("behavior", "snapshot")
        slow_s = 0.04 * took[stage.key] if exact else 0.0
        for share in (n / 50 for n in range(1, 50)):
            at = now + slow_s + share * (took[stage.key] - slow_s)
            left.progress(share, exact=exact, now=at)
            if seen or (exact and share > 0.1):
                seen.append((at, left.seconds(at)))
        now += took[stage.key]
        left.done(stage.key, now)
        if stage is asked[-1]:
            left.keep({stage.key for stage in kept})
    return ((gone, said, now - gone) for gone, said in seen if now / 5 <= gone < 0.95 * now)


def test_a_demo_unlike_its_plan_is_told_within_30_percent_from_the_first_fifth_on() -> None:
    graph = Sketch(load_recipe(find_recipe("demo"), []))
    plan = make_plan(graph, None, cpu_machine())
    for seed in range(60):
        for gone, said, truly in _demo(graph, plan, random.Random(seed)):
            assert said == pytest.approx(truly, rel=0.3), (seed, gone)


def test_the_first_sign_of_life_tells_no_rate() -> None:
    """A training that goes on from half its steps, and takes its time to begin."""
    left = TimeLeft({"a": PlannedStage("behavior", "a", 100.0)}, 0.0, 0.0)
    left.begin("a", 0.0)
    left.progress(0.5, exact=True, now=40.0)
    left.progress(0.75, exact=True, now=65.0)
    assert left.seconds(65.0) == pytest.approx(25.0)


def test_the_rest_of_a_training_tells_of_the_next_one() -> None:
    """A snapshot that the training passed is counted once."""
    left = TimeLeft({n: PlannedStage("snapshot", n[:1], 10.0) for n in ("a4", "a8", "b4", "b8")}, 0.0, 0.0)
    left.begin("a4", 0.0)
    for share in (0.1, 0.5):
        left.progress(share, exact=True, now=40.0 * share)
    left.done("a4", 20.0)
    left.progress(0.75, exact=True, now=30.0)
    assert left.seconds(30.0) == pytest.approx(10.0 + 40.0, rel=0.05)


def test_the_time_left_knows_trainings_that_reach_several_stages_and_what_g0_rules_out() -> None:
    snapshots = {f"e{n}": PlannedStage("snapshot", "one training", 10.0) for n in (4, 10, 20)}
    left = TimeLeft({**snapshots, "x": PlannedStage("behavior", "x", 100.0)}, 0.0, 0.0)
    assert left.seconds(0.0) == 130.0
    left.begin("e4", 0.0)
    left.progress(0.5, exact=True)
    assert left.seconds(15.0) == pytest.approx(15.0 + 100.0)
    left.keep({"e4", "e10", "e20"})
    assert left.seconds(15.0) == pytest.approx(15.0)
    for n in (4, 10, 20):
        left.done(f"e{n}", 30.0)
    assert (left.seconds(30.0), left.n_todo) == (0.0, 0)


def test_a_training_that_runs_slower_than_planned_tells_of_the_next_ones() -> None:
    left = TimeLeft({name: PlannedStage("behavior", name, 100.0) for name in "abcd"}, 0.0, 0.0)
    left.begin("a", 0.0)
    left.progress(0.25, exact=True)
    assert left.seconds(75.0) == pytest.approx(4 * 300.0 - 75.0, rel=0.3)  # three times as slow; by the plan alone 325


def test_loading_is_a_stage_of_its_own_and_makes_no_other_slow() -> None:
    left = TimeLeft({"a": PlannedStage("eval", "a", 10.0), "b": PlannedStage("eval", "b", 10.0)}, 20.0, 0.0)
    assert left.seconds(0.0) == 40.0
    assert left.seconds(5.0) == 35.0
    left.loaded(60.0)
    left.begin("a", 60.0)
    left.done("a", 70.0)
    assert left.seconds(70.0) == pytest.approx(10.0)


def _watched(watcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one stage, on a clock that goes on by 20 s with each look."""
    ticks = iter(range(0, 10**6, 20))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(ticks)))
    stage = Stage("eval", SLOT, 1, {}, {})
    watcher.expect(TimeLeft({stage.key: PlannedStage("eval", stage.key, 600.0)}, 30.0, 0.0), lambda: [stage.key])
    watcher.begin("tiny-00000000", 3, 1)
    watcher.engine({"name": "torch", "device": "cpu", "dtype": "float32", "attention": "sdpa", "sampler": "resident"})
    watcher.stage(stage, "new")
    for done in (1, 2):
        watcher.progress(Progress(SLOT, done, 10, "steps", 1.5))


def test_lines_tell_loading_the_rate_and_what_is_left_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    _watched(LineWatcher(Console(file=said, width=200)), monkeypatch)
    lines = said.getvalue().splitlines()
    assert "3 stages, 2 done already; about 10m" in lines[0]
    assert lines[1].strip() == "loading the model and testing it"
    assert lines[2].startswith("engine: torch on cpu")
    assert lines[3].strip() == SLOT
    assert "2/10 steps" in lines[-1]
    assert "s/step" in lines[-1]
    assert "left in all" in lines[-1]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_shows_each_stage_and_the_run_at_any_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = BarWatcher(Console(file=io.StringIO(), force_terminal=True, width=width))
    _watched(watcher, monkeypatch)
    shown = io.StringIO()
    Console(file=shown, width=width).print(watcher._lines())
    stage, run = shown.getvalue().splitlines()
    assert max(len(stage), len(run)) <= width
    assert "2/10 steps" in stage
    assert " left" in stage
    assert "2/3 stages  about " in run
    assert run.endswith(" left")
