"""A whole run under kills, a wrong clock, a second process, odd places, and three hundred cells: the same bits, nothing paid twice."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from fastconv.errors import BusyError
from fastconv.experiment.graph import Graph
from fastconv.judge import desk
from fastconv.recipe import Recipe
from fastconv.run.run import run_recipe
from fastconv.store.ledger import Stage, Store
from fastconv.store.merge import merge
from tests.fake_claude import FakeClaude, fake_claude
from tests.judging_kit import KEY
from tests.loop_kit import Heard, exit_of, forked, results, run_tiny, tiny_recipe
from tests.run.test_judging import CONCURRENCY, Loop

pytest.importorskip("fastconv.run.executor")  # torch is warm before anything forks

YEAR_S = 365 * 86400.0


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setattr(desk, "OUTAGE_PAUSE_S", 0.1)


# --- kills ----------------------------------------------------------------------------------------------------


def killed_until_done(loop: Loop, rng: random.Random, longest_s: float, most: int) -> int:
    """The run in children that are killed at random moments, `most` times at most, then to its end; how many were killed."""
    n_killed = 0
    while True:
        pid = forked(lambda: run_recipe(loop.recipe(), loop.workspace, Heard()))
        if n_killed == most:
            assert exit_of(pid, 300.0) == 0
            return n_killed
        killer = threading.Timer(rng.uniform(0.0, longest_s), os.kill, (pid, signal.SIGKILL))
        killer.start()
        code = exit_of(pid, 300.0)
        killer.cancel()
        killer.join()
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            return n_killed
        n_killed += 1


@dataclass(frozen=True)
class Undisturbed:
    """What a judged run found, what was billed for it, and the seconds that it took."""

    results: dict[str, str]
    paid: set[str]
    took_s: float


@pytest.fixture(scope="module")
def undisturbed(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Undisturbed]:
    """A run that nothing disturbed, by the judge's mode."""

    @cache
    def run(mode: str) -> Undisturbed:
        with fake_claude() as fake:
            loop = Loop(tmp_path_factory.mktemp(mode), tiny_qwen, fake.url, mode=mode)
            began = time.monotonic()
            run_recipe(loop.recipe(), loop.workspace, Heard())
            took_s = time.monotonic() - began
            return Undisturbed(results(loop.recipe(), loop.workspace), set(fake.bill()["billed"]), took_s)

    return run


@pytest.mark.parametrize(
    ("mode", "seed", "most"),
    [("live", 0, 1),
     *(pytest.param(mode, seed, 12, marks=pytest.mark.slow) for mode in ("live", "batch") for seed in range(1, 5))],
)  # fmt: skip
def test_a_judged_run_that_is_killed_anywhere_ends_with_the_same_bits_and_one_bill(
    server: FakeClaude, tiny_qwen: Path, tmp_path: Path, mode: str, seed: int, most: int,
    undisturbed: Callable[[str], Undisturbed],
) -> None:  # fmt: skip
    whole = undisturbed(mode)
    loop = Loop(tmp_path, tiny_qwen, server.url, mode=mode)
    n_killed = killed_until_done(loop, random.Random(f"{mode}/{seed}"), whole.took_s, most)
    assert results(loop.recipe(), loop.workspace) == whole.results
    billed = server.bill()["billed"]
    assert set(billed) == whole.paid
    again = sum(billed.values()) - len(billed)
    assert again <= (0 if mode == "batch" else n_killed * CONCURRENCY)  # live: what was in flight when it died
    store = Store.open(loop.workspace, create=False)
    assert store.live_leases() == {}
    assert store.rows("PRAGMA integrity_check") == [("ok",)]
    booked = [usd for (usd,) in store.rows("SELECT nusd FROM judge_money WHERE state='reserved'")]
    assert mode == "live" or booked == []


# --- the clock ------------------------------------------------------------------------------------------------


class Jumping:
    """A clock for `time.time` that jumps by `jump_s` every few readings, and back again by the next jump."""

    def __init__(self, jump_s: float, every: int) -> None:
        self.real, self.jump_s, self.every, self.n = time.time, jump_s, every, 0

    def __call__(self) -> float:
        self.n += 1
        return self.real() + (self.jump_s if (self.n // self.every) % 2 else 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["", "live", "batch"])
@pytest.mark.parametrize("jump_s", [YEAR_S, -YEAR_S], ids=["forward", "back"])
def test_a_clock_that_jumps_by_a_year_changes_nothing(
    server: FakeClaude, tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, jump_s: float,
    recipe: Recipe, whole: dict[str, str], undisturbed: Callable[[str], Undisturbed],
) -> None:  # fmt: skip
    clock = Jumping(jump_s, every=7)
    loop = Loop(tmp_path, tiny_qwen, server.url, mode=mode) if mode else None
    asked, workspace = (loop.recipe(), loop.workspace) if loop else (recipe, tmp_path / "ws")
    monkeypatch.setattr(time, "time", clock)
    run_recipe(asked, workspace, Heard())
    assert clock.n > 4 * clock.every
    assert results(asked, workspace) == (undisturbed(mode).results if mode else whole)
    assert max(server.bill()["billed"].values(), default=1) == 1
    own, other = Store.open(tmp_path / "own"), Store.open(workspace, create=False)
    order = [key for (key,) in other.rows("SELECT key FROM stages ORDER BY rowid")]
    merge(own, other)
    assert [key for (key,) in own.rows("SELECT key FROM stages ORDER BY rowid")] == order
    needs = {stage.key: [need.key for need in stage.needs.values()] for stage in Graph(asked).stages()}
    place = {key: i for i, key in enumerate(order)}
    assert all(place[need] < place[key] for key in place for need in needs.get(key, ()))


@pytest.mark.parametrize(
    ("off_s", "alive"), [(0.0, True), (-10.0, True), (10.0, True), (YEAR_S, False), (-YEAR_S, False)]
)
def test_a_lease_of_another_host_with_a_wrong_clock_is_waited_for_by_nobody(
    tmp_path: Path, off_s: float, alive: bool
) -> None:
    stage, store = Stage("eval", "eval/one", 1, {"seed": 1}), Store.open(tmp_path)
    with store.transaction() as db:
        row = (stage.key, stage.slot, 1, "elsewhere", "0-1-1", time.time() + off_s, "{}")
        db.execute("INSERT INTO leases VALUES(?,?,?,?,?,?,?)", row)
    assert bool(store.live_leases()) == alive
    if alive:
        with pytest.raises(BusyError), store.lease(stage):
            pass
        return
    with store.lease(stage):
        assert store.live_leases()


def test_the_first_run_stays_the_first_when_the_clock_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, now = Store.open(tmp_path), time.time()
    for i, off_s in enumerate((0.0, -YEAR_S, YEAR_S, 1.0)):
        monkeypatch.setattr(time, "time", lambda off_s=off_s: now + off_s)
        store.start_run(f"run-{i}", "{}", "x", "own", {})
        store.start_run("run-0", "{}", "x", "own", {})  # goes on, and keeps its start
    assert [row["id"] for row in store.runs()] == ["run-3", "run-2", "run-1", "run-0"]


# --- two at once ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_with_two_recipes_in_one_workspace_share_it(
    recipe: Recipe, whole: dict[str, str], tiny_qwen: Path, tmp_path: Path
) -> None:
    """They want the same base stages at the same time; who finds one taken says so, and goes on when it is asked again."""
    other = tiny_recipe(tiny_qwen, name="other", grid__epochs=[0, 2])
    waiting, codes = [recipe, other], []
    for _ in range(20):
        pids = [(one, forked(lambda one=one: run_recipe(one, tmp_path, Heard()))) for one in waiting]
        ended = [(one, exit_of(pid, 120.0)) for one, pid in pids]
        codes += [code for _, code in ended]
        waiting = [one for one, code in ended if code != 0]
        if not waiting:
            break
    assert not waiting
    assert set(codes) <= {0, BusyError.exit_code}
    assert results(recipe, tmp_path) == whole
    shared = results(other, tmp_path)
    assert shared.items() <= whole.items()
    assert Store.open(tmp_path).rows("SELECT COUNT(*) FROM leases") == [(0,)]


@pytest.mark.slow
def test_a_run_in_another_thread_is_the_same(recipe: Recipe, whole: dict[str, str], tmp_path: Path) -> None:
    """As from a notebook or a server: signals belong to the main thread alone."""
    ended: list[object] = []
    thread = threading.Thread(target=lambda: ended.append(run_tiny(recipe, tmp_path)))
    thread.start()
    thread.join(300)
    assert ended
    assert results(recipe, tmp_path) == whole


def test_many_threads_of_one_process_share_a_workspace(tmp_path: Path) -> None:
    def commit(place: int) -> None:
        store = Store.open(tmp_path)
        stage = Stage("eval", f"eval/{place}", 1, {"seed": place})
        with store.lease(stage):
            store.commit(stage, outputs={"rows": store.put(b"[1]", "json")}, facts={}, seconds=1.0)
        store.close()

    threads = [threading.Thread(target=commit, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    store = Store.open(tmp_path, create=False)
    assert store.rows("SELECT COUNT(*) FROM stages") == [(8,)]
    assert store.rows("SELECT COUNT(*) FROM leases") == [(0,)]


def test_two_processes_that_begin_a_workspace_at_once_both_have_it(tmp_path: Path) -> None:
    def commit(place: int) -> None:
        store = Store.open(tmp_path / "new" / "ws")
        stage = Stage("eval", f"eval/{place}", 1, {"seed": place})
        store.commit(stage, outputs={"rows": store.put(b"[1]", "json")}, facts={}, seconds=1.0)

    pids = [forked(lambda place=place: commit(place)) for place in range(6)]
    assert [exit_of(pid) for pid in pids] == [0] * 6
    store = Store.open(tmp_path / "new" / "ws", create=False)
    assert store.rows("SELECT COUNT(*) FROM stages") == [(6,)]
    assert store.rows("PRAGMA integrity_check") == [("ok",)]


# --- the soak -------------------------------------------------------------------------------------------------


def usage() -> tuple[int, int, int]:
    """Bytes of memory that this process holds, its open files, and its threads."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_three_hundred_cells_need_no_more_memory_files_or_time_for_each(tiny_qwen: Path, tmp_path: Path) -> None:
    """One process and one workspace: the last hundred cells against the first hundred, after the first few have warmed it."""
    marks: list[tuple[int, float, tuple[int, int, int]]] = []
    n_cells, seed, began = 0, 0, time.process_time()
    while n_cells < 300:
        recipe = tiny_recipe(tiny_qwen, grid__seeds=[seed], grid__behaviors=["none", "refusal", "sycophancy"])
        n_cells += len(Graph(recipe).cells)
        run_recipe(recipe, tmp_path, Heard())
        marks.append((n_cells, time.process_time() - began, usage()))
        seed += 1
    third = len(marks) // 3

    def seconds(part: list[tuple[int, float, tuple[int, int, int]]]) -> float:
        return (part[-1][1] - part[0][1]) / (part[-1][0] - part[0][0])

    assert seconds(marks[2 * third :]) < 1.5 * seconds(marks[1:third])
    memory, files, threads = (([mark[2][i] for mark in marks]) for i in range(3))
    assert max(memory[2 * third :]) < 1.1 * max(memory[third : 2 * third]) + (8 << 20)
    assert max(files[2 * third :]) <= max(files[1:third])
    assert max(threads[2 * third :]) <= max(threads[1:third])
    store = Store.open(tmp_path, create=False)
    assert store.rows("SELECT COUNT(*) FROM leases") == [(0,)]
    assert not list(tmp_path.rglob(".tmp-*"))
