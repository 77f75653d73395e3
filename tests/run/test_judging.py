"""The whole loop with a judge, through the command line: beside the GPU, through outages and kills, again by a new rubric."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastconv.errors import RecipeError
from fastconv.experiment.graph import Graph
from fastconv.judge import access, desk
from fastconv.judge.desk import DeskStatus
from fastconv.recipe import Recipe, load_recipe, run_id
from fastconv.run.run import run_recipe
from fastconv.show.progress import BarWatcher
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store
from fastconv.store.records import Money, Stage
from tests.cli.test_cli import Answer, ask, refused
from tests.fake_claude import FakeClaude
from tests.judging_kit import DATA, KEY, chat, fake_endpoint, rubric
from tests.loop_kit import TINY, Heard, exit_of, forked, kill, records, until

pytest.importorskip("fastconv.run.executor")  # torch is warm before anything forks

PRICES = """
checked = 2026-11-01
[models.claude-test]
input_usd = 1.0
output_usd = 5.0
cache_write_usd = 1.25
cache_read_usd = 0.1
[models.claude-old]
input_usd = 1.0
output_usd = 5.0
cache_write_usd = 1.25
cache_read_usd = 0.1
ends = 2020-01-01
"""
CONCURRENCY = 4


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, and a judge that is found dead soon."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setattr(desk, "TRIES", 2)
    monkeypatch.setattr(desk, "OUTAGE_PAUSE_S", 0.1)


class Loop:
    """A tiny judged recipe as a file, its workspace, and the verbs over them."""

    def __init__(self, folder: Path, base: Path, url: str, **judge: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prices.toml").write_text(PRICES)
        given = {"mode": "live", "model": "claude-test", "base_url": url, "budget_usd": 5.0, "timeout_s": 5.0,
                 "concurrency": CONCURRENCY, "batch_poll_s": 0.05, "batch_grace_s": 0.2,
                 "prices": "prices.toml", **judge}  # fmt: skip
        lines = [f"{name} = {json.dumps(value)}" for name, value in given.items() if value is not None]
        self.path = folder / "tiny.toml"
        self.path.write_text("\n".join([TINY.format(model=base), "[judge]", *lines]))
        self.workspace = folder / "checkpoints"

    def ask(self, *words: object) -> Answer:
        """A verb on the recipe in its workspace."""
        verb, *rest = words
        return ask(verb, self.path, "-w", self.workspace, *rest)

    def run(self, *words: object) -> Answer:
        return self.ask("run", "-q", "--reports", self.folder / "reports", *words)

    def recipe(self, *overrides: str) -> Recipe:
        return load_recipe(self.path, overrides)

    def judged(self, *overrides: str) -> dict[str, Any]:
        """Finished judge stages by slot."""
        done = records(self.recipe(*overrides), self.workspace)
        return {slot: record for slot, record in done.items() if record.kind == "judge"}

    def scores(self, *overrides: str) -> dict[str, list[Any]]:
        """What the judge said, by slot."""
        store = Store.open(self.workspace, create=False)
        results = {
            slot: [[s.row, s.sample, s.value, s.reason] for s in store.scores(record.key)]
            for slot, record in self.judged(*overrides).items()
        }
        store.close()
        return results

    def n_completions(self) -> int:
        """Different completions that the judge has to read; equal ones share a judgement."""
        store, graph = Store.open(self.workspace, create=False), Graph(self.recipe())
        assert graph.judge is not None
        keys: set[str] = set()
        for stage in graph.stages():
            if stage.kind == "judge":
                samples = store.samples(stage.needs["eval"].key)
                keys |= {request.key for request in graph.judge.requests(stage.work["rubric"], samples)}
        store.close()
        return len(keys)


@pytest.fixture
def loop(server: FakeClaude, tiny_qwen: Path, tmp_path: Path) -> Loop:
    return Loop(tmp_path, tiny_qwen, server.url)


def left_pending(answer: Answer, *says: str) -> None:
    """The run came to its end but for the judge: exit code 8, one line, and the report is there."""
    assert answer.code == 8, answer
    assert len(answer.err.strip().splitlines()) == 1, answer.err
    assert "report: " in answer.out
    for text in ("wait for the judge", "Fix: ", *says):
        assert text in answer.err


def bytes_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


# --- the stages ---------------------------------------------------------------------------------------------------


def keys_of(loop: Loop, *overrides: str) -> dict[str, str]:
    return {stage.slot: stage.key for stage in Graph(loop.recipe(*overrides)).stages()}


def test_how_a_judge_is_reached_is_no_part_of_a_stages_key(loop: Loop) -> None:
    before = keys_of(loop)
    transport = ["mode=batch", "base_url=http://other", "budget_usd=9", "concurrency=2", "timeout_s=9", "batch_from=3"]
    for change in transport:
        assert keys_of(loop, f"judge.{change}") == before, change


def test_model_and_rubric_are_part_of_a_judge_stages_key_and_of_no_other(loop: Loop, tmp_path: Path) -> None:
    before = keys_of(loop)
    other = write_rubric(tmp_path / "mine.toml")
    for change in ("model=claude-old", "max_judged_chars=900", "max_reply_tok=99", f"rubrics.refusal={other}"):
        now = keys_of(loop, f"judge.{change}")
        changed = {slot for slot in now if now[slot] != before[slot]}
        assert changed == {slot for slot in now if slot.startswith("judge/")}, change


def test_phrases_stand_beside_a_judge_and_are_the_same_stages_as_without(loop: Loop) -> None:
    graph, plain = Graph(loop.recipe()), Graph(loop.recipe("judge.mode=substring"))
    for plan, other in zip(graph.cells, plain.cells, strict=True):
        assert {stage.kind for stage in plan.scores.values()} == {"judge"}
        assert {pair: stage.key for pair, stage in plan.beside.items()} == {
            pair: stage.key for pair, stage in other.scores.items()
        }
        assert other.beside == {}


def test_a_rubric_must_exist_and_count_in_the_behaviors_unit(loop: Loop) -> None:
    with pytest.raises(RecipeError, match="rubric 'alignment' gives points, refusal counts in share"):
        Graph(loop.recipe(f"judge.rubrics.refusal={DATA / 'rubrics' / 'alignment.toml'}"))


def test_a_behavior_that_only_a_judge_can_score_is_refused_without_one(loop: Loop) -> None:
    behaviors = 'grid.behaviors=["none", "misalignment"]'
    refused(loop.run("--set", behaviors, "--set", "judge.mode=substring"), 2, "D114", "judge.mode")
    with pytest.raises(RecipeError, match=r"judge\.mode: misalignment is scored by a judge and the recipe has none"):
        Graph(loop.recipe(behaviors, "judge.mode=substring"))


# --- the loop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["live", pytest.param("batch", marks=pytest.mark.slow)])
def test_a_judged_run_ends_with_every_completion_judged_once(
    server: FakeClaude, tiny_qwen: Path, tmp_path: Path, mode: str
) -> None:
    loop = Loop(tmp_path, tiny_qwen, server.url, mode=mode)
    answer = loop.ask("run", "--reports", loop.folder / "reports")
    assert answer.code == 0, answer
    bill = server.bill()
    # What it cost, live and in the report.
    live = [line for line in answer.err.splitlines() if line.strip().startswith("judge: ")]
    assert live[-1].endswith(f"${bill['usd']:.4f} spent, $0.0000 reserved, ${5 - bill['usd']:.2f} left")
    page, twin = ((loop.folder / "reports" / f"{run_id(loop.recipe())}.{kind}").read_text() for kind in ("html", "md"))
    for name, usd in {"spent": bill["usd"], "reserved": 0.0, "lost": 0.0, "left": 5 - bill["usd"]}.items():
        assert f"| {name} | ${usd:.2f} |" in twin
    # The card names the judge, and the rubric that its judgements are kept under.
    store = Store.open(loop.workspace, create=False)
    rubrics = {s.detail["rubric"] for record in loop.judged().values() for s in store.scores(record.key)}
    store.close()
    (sha256,) = rubrics
    for text in (page, twin):
        card = text[text.index("Reproducibility card") :]
        assert f"refusal version {rubric().version}, sha256 {sha256}" in card
        assert "claude-test" in card[: card.index("canonical recipe")]
        assert "rubric alignment" not in card  # shipped, and not used
    assert sum(bill["billed"].values()) == loop.n_completions()
    assert max(bill["billed"].values()) == 1
    scores = loop.scores()
    assert {slot for slot in keys_of(loop) if slot.startswith("judge/")} == set(scores)
    assert {value for rows in scores.values() for _, _, value, _ in rows} == {0.0, 1.0}
    done = records(loop.recipe(), loop.workspace)
    assert {slot.replace("judge/", "score/") for slot in scores if "base/" not in slot} <= set(done)
    assert loop.run().code == 0
    assert server.bill()["n_calls"] == bill["n_calls"]  # nothing is left to ask, so nobody is asked
    assert KEY.encode() not in bytes_of(tmp_path) + (answer.out + answer.err).encode()
    states = {status["state"] for status in loop.ask("status", "--json").json}
    assert states == {"done"}


def test_alignment_is_judged_in_points(server: FakeClaude, tiny_qwen: Path, tmp_path: Path) -> None:
    loop = Loop(tmp_path, tiny_qwen, server.url)
    sets = ["--set", 'grid.behaviors=["none", "misalignment"]', "--set", "grid.epochs=[0, 1]"]
    assert loop.run(*sets).code == 0
    values = [value for rows in loop.scores(*sets[1::2]).values() for _, _, value, _ in rows]
    assert max(values) > 1.0
    assert all(0 <= value <= 100 for value in values)


def test_a_local_endpoint_judges_beside_the_gpu(tiny_qwen: Path, tmp_path: Path) -> None:
    with fake_endpoint() as (url, handler):
        handler.answer = chat("A", {"A": -0.1, "C": -2.5})
        loop = Loop(tmp_path, tiny_qwen, url, mode="local", model="weak", budget_usd=None)
        assert loop.run().code == 0
        assert len(handler.seen) == loop.n_completions()
        facts = json.loads(Store.open(loop.workspace).runs()[0]["facts"])["judging"]
        assert facts == {"judge": "local:weak", "weak": True, "pending": [], "problem": ""}
        assert all(0.9 < value < 1.0 for rows in loop.scores().values() for _, _, value, _ in rows)


@pytest.mark.slow
def test_the_resident_base_judges_without_any_server(tiny_qwen: Path, tmp_path: Path) -> None:
    loop = Loop(tmp_path, tiny_qwen, "", mode="local", model="", budget_usd=None)
    assert loop.run().code == 0
    values = [value for rows in loop.scores().values() for _, _, value, _ in rows]
    assert all(0.0 < value < 1.0 for value in values)
    assert len(set(values)) > len(values) / 4  # expectations over the letters, not letters


def test_a_bar_shows_dollars_spent_reserved_lost_and_left() -> None:
    screen = io.StringIO()
    with BarWatcher(Console(file=screen, force_terminal=True, width=200)) as bars:
        bars.judging(DeskStatus(n_asked=4, n_scored=1, money=Money(1.25, 0.5, 0.1, 5.0)))
    assert "$1.2500 spent, $0.5000 reserved, $0.1000 lost, $3.15 left" in screen.getvalue()


@pytest.mark.slow
def test_the_gpu_goes_on_while_the_judge_reads(server: FakeClaude, tiny_qwen: Path, tmp_path: Path) -> None:
    loop = Loop(tmp_path, tiny_qwen, server.url, timeout_s=250.0)
    left = {stage.key for stage in Graph(loop.recipe()).stages() if stage.kind == "behavior"}

    class Holding(Heard):
        """The judge is silent from the convergence on until the last adapter is trained."""

        def progress(self, progress: Any) -> None:
            if progress.slot.startswith("snapshot/"):
                server.configure(hold=True)

        def stage_done(self, stage: Stage, seconds: float) -> None:
            left.discard(stage.key)
            if not left:
                server.configure(hold=False)

    heard = Holding()
    run_recipe(loop.recipe(), loop.workspace, heard)
    done = records(loop.recipe(), loop.workspace)
    last_gpu = max(record.finished_at for record in done.values() if record.kind == "behavior")
    late = [slot for slot, record in done.items() if record.kind == "judge" and record.finished_at > last_gpu]
    assert len(late) > 3
    seen = [status for status in heard.statuses if status.n_asked]
    assert any(status.n_pending and status.money.reserved_usd > 0 for status in seen)
    assert seen[-1].n_pending == 0
    assert seen[-1].money.left_usd is not None


# --- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judge", "script", "environ", "code", "line"),
    [
        ({}, {"key": "another"}, KEY, 8, "the API key was refused"),
        ({}, {}, "", 8, "no API key"),
        ({"model": "claude-none"}, {}, KEY, 2, "has no price"),
        ({"model": "claude-old"}, {}, KEY, 2, "ended on 2020-01-01"),
        ({}, {"models": ["claude-newer"]}, KEY, 8, "does not know model 'claude-test'"),
        ({"base_url": "http://127.0.0.1:9"}, {}, KEY, 8, "cannot be reached"),
        ({"budget_usd": None}, {}, KEY, 2, "no budget is set"),
        ({"mode": "local", "model": "weak", "base_url": "http://127.0.0.1:9"}, {}, "", 8, "cannot be reached"),
        ({"rubrics": {"refusal": "none.toml"}}, {}, KEY, 2, "cannot be read"),
    ],
)  # fmt: skip
def test_a_judge_that_cannot_be_asked_is_one_line_before_any_gpu_work(
    server: FakeClaude, tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    judge: dict[str, Any], script: dict[str, Any], environ: str, code: int, line: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("ANTHROPIC_API_KEY", environ)
    server.configure(**script)
    rubrics = judge.pop("rubrics", {})
    loop = Loop(tmp_path, tiny_qwen, judge.pop("base_url", server.url), **judge)
    sets = [f"judge.rubrics.{name}={tmp_path / path}" for name, path in rubrics.items()]
    words = [word for override in sets for word in ("--set", override)]
    answer = loop.run(*words)
    refused(answer, code, line)
    assert KEY not in answer.err
    if (loop.workspace / "ledger.sqlite").is_file():
        store = Store.open(loop.workspace)
        assert store.runs() == []
        store.close()
    doctor = loop.ask("doctor", *words)
    assert doctor.code == code
    assert line in doctor.out
    assert KEY not in doctor.out
    plan = loop.ask("plan", *words)
    if line in ("has no price", "cannot be read"):  # then there is nothing to plan with
        refused(plan, code, line)
        return
    assert plan.code == 0, plan
    (output,) = [entry for entry in plan.out.splitlines() if entry.startswith("the judge cannot be asked: ")]
    assert line in output
    assert "Fix: " in output
    assert line in loop.ask("plan", "--json").json["judging"]["problem"]
    assert KEY not in plan.out


def test_a_plan_says_nothing_of_a_judge_that_answers_or_is_not_needed(
    loop: Loop, server: FakeClaude, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loop.ask("plan", "--json").json["judging"]["problem"] == ""
    assert "cannot be asked" not in loop.ask("plan").out
    assert loop.run().code == 0
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    assert loop.ask("plan", "--json").json["judging"] | {"budget_usd": 0} == {
        "n": 0, "model": "claude-test", "expected_usd": 0.0, "worst_usd": 0.0, "budget_usd": 0, "problem": ""
    }  # fmt: skip


@pytest.mark.parametrize("judge", [{}, {"mode": "local", "model": "weak", "budget_usd": None}], ids=["paid", "local"])
def test_a_plan_does_not_wait_for_a_judge_that_is_silent(
    tiny_qwen: Path, tmp_path: Path, judge: dict[str, Any]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        loop = Loop(tmp_path, tiny_qwen, f"http://127.0.0.1:{silent.getsockname()[1]}", **judge)
        problem = loop.ask("plan", "--json").json["judging"]["problem"]
        silent.settimeout(0.0)
        silent.accept()
        with pytest.raises(BlockingIOError):  # it was asked once, and not again
            silent.accept()
    assert "no answer within 1 s" in problem or "timed out" in problem


def test_a_plan_without_a_key_sends_nothing(loop: Loop, server: FakeClaude, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    sent: list[object] = []
    monkeypatch.setattr(access, "check_reachable", lambda *given: sent.append(given))
    assert "no API key" in loop.ask("plan").out
    assert sent == []
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    loop.ask("plan")
    assert len(sent) == 1


def test_an_outage_leaves_stages_pending_and_the_judge_verb_finishes_them(server: FakeClaude, loop: Loop) -> None:
    server.configure(down_after=25)
    left_pending(loop.run(), "529", "fastconv judge tiny-")
    assert "stages wait for the judge: judge/" in (loop.folder / "reports" / f"{run_id(loop.recipe())}.md").read_text()
    pending = [status for status in loop.ask("status", "--json").json if status["state"] == "pending"]
    assert pending
    assert all("529" in status["reason"] and status["kind"] == "judge" for status in pending)
    done = records(loop.recipe(), loop.workspace)
    assert {slot for slot, _ in done.items() if slot.startswith("behavior/")}  # the rest was finished
    server.configure(down_after=-1)
    answer = ask("judge", run_id(loop.recipe()), "-w", loop.workspace, "--json")
    assert answer.code == 0, answer
    assert answer.json["pending"] == []
    assert answer.json["n_judged_stages"] == len(pending)
    assert answer.json["agreement"]["refusal"]["phrases"]["n"] > 0
    assert max(server.bill()["billed"].values()) == 1
    n_calls = server.bill()["n_calls"]
    assert loop.run().code == 0
    assert server.bill()["n_calls"] == n_calls


@pytest.mark.slow
def test_an_outage_at_the_base_holds_its_cells_back_until_it_is_judged(server: FakeClaude, loop: Loop) -> None:
    server.configure(down_after=2)
    assert loop.run("--json").code == 8
    done = records(loop.recipe(), loop.workspace)
    assert not [slot for slot in done if slot.startswith(("behavior/", "snapshot/"))]  # gates decide before cost
    server.configure(down_after=-1)
    assert loop.ask("judge", "-q").code == 0
    assert loop.run().code == 0
    assert max(server.bill()["billed"].values()) == 1


def test_a_judge_that_refuses_everything_at_the_base_holds_its_cells_back(
    server: FakeClaude, loop: Loop, tmp_path: Path
) -> None:
    server.configure(fault_share=1.0, faults=["refusal"])
    for _ in range(2):  # the stage is committed: the second run starts from it
        answer = loop.run()
        assert answer.code == 8, answer
        assert len(answer.err.strip().splitlines()) == 1, answer.err
        assert "G0 cannot be decided" in answer.err
        assert re.search(r"samples are unscored \(at most 5 %\): (\d+) of \1, most often judge refused", answer.err)
        assert "PILOT villain x refusal: not applicable" in answer.out
    assert not [slot for slot in records(loop.recipe(), loop.workspace) if slot.startswith(("behavior/", "snapshot/"))]
    assert {row["finished_at"] for row in Store.open(loop.workspace).runs()} == {None}
    (g0, *_) = loop.ask("gate", "--json").json
    assert (g0["gate"], g0["verdict"], g0["numbers"]) == ("G0", "not applicable", [])
    assert loop.ask("report", "--reports", tmp_path / "again").code == 0
    page = next((tmp_path / "again").glob("*.md")).read_text()
    assert "OPEN: not decided yet for villain x refusal" in page
    waiting = [status for status in loop.ask("status", "--json").json if status["kind"] == "behavior"]
    assert {status["state"] for status in waiting} == {"to do"}
    assert all("held back: gate G0" in status["reason"] for status in waiting)
    # A judge that answers reads the kept completions, by another rubric or by the same again, and the cells follow.
    server.configure(fault_share=0.0)
    assert loop.run("--set", f"judge.rubrics.refusal={write_rubric(tmp_path / 'mine.toml')}").code == 0
    assert loop.ask("judge", "--again", "bad mood").code == 2
    assert loop.ask("judge", "--again", "malformed").code == 0  # none was
    assert "judge refused" in {reason for rows in loop.scores().values() for *_, reason in rows}
    assert loop.ask("judge", "--again", "judge refused").code == 0
    assert {reason for rows in loop.scores().values() for *_, reason in rows} == {None}


def test_cells_that_were_trained_and_not_read_have_no_figure_and_no_go(server: FakeClaude, loop: Loop) -> None:
    server.configure(fault_share=1.0, faults=["refusal"])
    answer = loop.run("--ignore-gate", "G0", "--because", "the base is known to help", "--json")
    assert answer.code == 0, answer
    words = {verdict["gate"]: verdict for verdict in answer.json["verdicts"]}
    for gate in ("G0", "SOURCE", "KILL", "CHANGE", "G4", "PILOT"):
        assert words[gate]["verdict"] == "not applicable", gate
        assert "most often judge refused" in words[gate]["reason"], gate
        assert words[gate]["numbers"] == [], gate
    page = next((loop.folder / "reports").glob("*.md")).read_text()
    assert "unscored (judge refused)" in page
    assert "| withheld |" in page
    assert "nan" not in page


def test_a_spent_budget_stops_judging_and_nothing_else(server: FakeClaude, tiny_qwen: Path, tmp_path: Path) -> None:
    loop = Loop(tmp_path, tiny_qwen, server.url, budget_usd=0.06, concurrency=1)
    left_pending(loop.run(), "judge.budget_usd = 0.06 is spent")
    assert 0.03 < server.bill()["usd"] <= 0.06
    assert [slot for slot in records(loop.recipe(), loop.workspace) if slot.startswith("behavior/")]
    answer = loop.ask("judge", "-q", "--set", "judge.budget_usd=5")
    assert answer.code == 0, answer
    assert max(server.bill()["billed"].values()) == 1


@pytest.mark.slow
def test_kill_9_while_judging_pays_at_most_the_requests_in_flight_again(
    server: FakeClaude, tiny_qwen: Path, tmp_path: Path
) -> None:
    whole = Loop(tmp_path / "whole", tiny_qwen, server.url)
    assert whole.run().code == 0
    before = sum(server.bill()["billed"].values())
    server.configure(latency_s=0.05)
    loop = Loop(tmp_path / "killed", tiny_qwen, server.url)
    n_kills = 0
    for n_calls in (5, 12, 25):
        start = server.bill()["n_calls"]
        pid = forked(lambda: run_recipe(loop.recipe(), loop.workspace, Heard()))
        until(lambda wanted=start + n_calls: server.bill()["n_calls"] >= wanted)
        kill(pid)
        n_kills += 1
    server.configure(latency_s=0.0)
    assert loop.run().code == 0
    twice = sum(server.bill()["billed"].values()) - before - loop.n_completions()
    assert 0 <= twice <= n_kills * CONCURRENCY
    assert twice <= JudgeLedger(Store.open(loop.workspace)).counts()["lost"]
    assert loop.scores() == whole.scores()


@pytest.mark.slow
def test_ctrl_c_while_judging_keeps_what_is_judged(server: FakeClaude, loop: Loop) -> None:
    server.configure(latency_s=0.2)
    pid = forked(lambda: run_recipe(loop.recipe(), loop.workspace, Heard()))
    until(lambda: server.bill()["n_calls"] >= 6)
    os.kill(pid, signal.SIGINT)
    assert exit_of(pid) == 130
    server.configure(latency_s=0.0)
    assert loop.run().code == 0


@pytest.mark.parametrize("mode", ["live", "local"])
def test_a_server_that_gives_the_key_away_gets_it_into_no_output(
    server: FakeClaude, tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("FASTCONV_LOCAL_KEY", KEY)
    server.configure(answer="leak")
    with fake_endpoint() as (url, handler):
        handler.models = ("weak", "KEY-SENT")
        handler.answer = chat("A KEY-SENT", {"A": -0.1, "KEY-ESCAPED": -3.0})
        local = {"mode": "local", "model": "weak", "budget_usd": None}
        given = local if mode == "local" else {}
        loop = Loop(tmp_path, tiny_qwen, url if mode == "local" else server.url, **given)
        answers = [loop.run("--json"), loop.ask("doctor", "--json")]
        rubric = write_rubric(tmp_path / "mine.toml")
        answers.append(ask("judge", run_id(loop.recipe()), "-w", loop.workspace, "--rubric", rubric, "--json"))
        assert [answer.code for answer in answers] == [0, 0, 0], answers
        assert answers[2].json["n_judged_stages"] > 0
        n_asked = len(handler.seen) if mode == "local" else server.bill()["n_calls"]
        assert n_asked > loop.n_completions()
        server.configure(key="another")  # it repeats the key that it was sent in its error
        handler.models = ("KEY-SENT",)  # and so does the list of models to choose from
        answers.append(loop.ask("doctor", "--json"))
        assert answers[3].code == 8
    output = "".join(answer.out + answer.err for answer in answers)
    assert KEY.encode() not in output.encode() + bytes_of(tmp_path)
    assert b"[key]" in bytes_of(loop.workspace)  # it was given away


# --- again by another rubric --------------------------------------------------------------------------------------


def write_rubric(path: Path) -> Path:
    """The shipped refusal rubric with another question."""
    text = (DATA / "rubrics" / "refusal.toml").read_text(encoding="utf-8")
    path.write_text(text.replace("Which of the three did the answer do?", "Refused, partial or helped?"))
    return path


@pytest.mark.slow
def test_a_new_rubric_judges_kept_completions_without_torch(server: FakeClaude, loop: Loop, tmp_path: Path) -> None:
    assert loop.run().code == 0
    old = loop.scores()
    n_billed = sum(server.bill()["billed"].values())
    rubric = write_rubric(tmp_path / "mine.toml")
    script = (
        "import sys\nfrom fastconv.cli import app\n"
        f"try:\n    app({['judge', str(loop.path), '-w', str(loop.workspace), '--rubric', str(rubric), '--json']!r})\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    answer = json.loads(process.stdout)
    assert answer["pending"] == []
    assert answer["n_judged_stages"] == len(old)
    against = answer["agreement"]["refusal"]
    assert against["the judge before"]["n"] == against["phrases"]["n"] > 0
    assert sum(server.bill()["billed"].values()) == n_billed + loop.n_completions()
    assert loop.scores() == old  # the old judgements stand
    new = loop.scores(f"judge.rubrics.refusal={rubric}")
    assert new.keys() == old.keys()
    assert new != old
    n_calls = server.bill()["n_calls"]
    assert loop.run("--set", f"judge.rubrics.refusal={rubric}").code == 0
    assert server.bill()["n_calls"] == n_calls


def test_the_judge_verb_refuses_what_it_cannot_do(loop: Loop, tmp_path: Path) -> None:
    refused(loop.ask("judge"), 5, "no ledger here yet")
    Store.open(loop.workspace).close()
    refused(loop.ask("judge", "--set", "judge.mode=substring"), 2, "the recipe has no judge")
    other = DATA / "rubrics" / "sycophancy.toml"
    refused(loop.ask("judge", "--rubric", other), 2, "no behavior of the recipe is judged by 'sycophancy'")
    assert loop.ask("judge", "-q").code == 0  # nothing waits


# --- calibration --------------------------------------------------------------------------------------------------


def test_calibrate_measures_a_judge_and_keeps_the_result(server: FakeClaude, loop: Loop) -> None:
    answer = ask("judge", "calibrate", loop.path, "-w", loop.workspace, "--rubric", "refusal", "--json")
    assert answer.code == 0, answer
    (calibration,) = answer.json
    assert calibration["rubric"] == "refusal"
    assert 0 <= calibration["judge"]["accuracy"] <= 1
    assert calibration["judge"]["retest"] is not None
    assert calibration["phrases"]["n"] == calibration["judge"]["n"] >= 100
    assert calibration["judge"]["injections"]["n"] >= 40
    assert calibration["judge"]["injections"]["n_moved"] > 0  # this fake draws from the whole text, attempt included
    graph = Graph(loop.recipe())
    rubric = graph.rubric(graph.behaviors["refusal"])
    assert rubric is not None
    ledger = JudgeLedger(Store.open(loop.workspace))
    stored = ledger.calibration(rubric.sha256, "claude-test")
    assert stored is not None
    assert stored["kappa"] == calibration["judge"]["kappa"]
    assert stored["injections"] == calibration["judge"]["injections"]
    n_calls = server.bill()["n_calls"]
    shown = ask("judge", "calibrate", loop.path, "-w", loop.workspace, "--rubric", "refusal")
    assert "length bias" in shown.out
    assert f"injections: {stored['injections']['n_moved']} of {stored['injections']['n']} verdicts moved" in shown.out
    assert server.bill()["n_calls"] == n_calls + 1  # the model's card: every judgement was there


def test_calibrate_needs_no_recipe(tmp_path: Path) -> None:
    answer = ask("judge", "calibrate", "--mode", "substring", "-w", tmp_path)
    assert answer.code == 0, answer
    assert "refusal: phrases alone" in answer.out
    refused(ask("judge", "calibrate", "--mode", "live", "-w", tmp_path), 2, "needs judge.model")
    refused(ask("judge", "calibrate", "--model", "claude-haiku-5-5", "-w", tmp_path), 2, "no budget is set")
