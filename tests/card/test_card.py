"""The script for a card: what it reads off ledgers, plans and looks, how it kills and survives, and a rehearsal without a card."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType

from fastconv.engine.cuda_graph import CapturedSteps, StepTally
from fastconv.engine.generate import Completion
from fastconv.run.training import GpuUse
from tests.card import profiling, timing
from tests.card.__main__ import main, run_part
from tests.card.grid import Kill
from tests.card.ledgers import Lease, Ledger, StageRow, compare, copy_ledger, read_ledger
from tests.card.part import PARTS, function_of
from tests.card.process import Look, Watch, read_looks, run_child, summary
from tests.card.profiling import Span, busy_us, kind_of, profiled, table
from tests.card.seven import estimate
from tests.card.sheet import Job, Sheet, read_sheet, write_json
from tests.card.speed import gpu_files, junit_counts
from tests.card.table import markdown
from tests.card.vllm import agreement
from tests.loop_kit import DoneRun, until

# --- two ledgers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger_file(done_run: DoneRun, tmp_path: Path) -> Path:
    """A copy of a finished run's ledger, to be spoilt."""
    target = tmp_path / "ledger.sqlite"
    assert copy_ledger(done_run.workspace / "ledger.sqlite", target)
    return target


def spoilt(path: Path, statement: str, *values: object) -> Ledger:
    """The ledger after a statement that changes exactly one row."""
    with sqlite3.connect(path) as db:
        assert db.execute(statement, values).rowcount == 1
    return read_ledger(path)


def test_a_copy_is_equal_in_every_stage(done_run: DoneRun, ledger_file: Path) -> None:
    first, second = read_ledger(done_run.workspace / "ledger.sqlite"), read_ledger(ledger_file)
    found = compare(first, second)
    assert found["equal"] == found["stages"] == len(first.stages)
    assert found["gates"]["equal"] == found["gates"]["n"] > 0
    assert found["letters"]["same_letter"] == found["letters"]["n"] > 0
    assert found["first_different"] is None
    assert sum(one["equal"] for one in found["by_kind"].values()) == found["stages"]


def test_a_completion_that_differs_is_counted_and_what_follows_from_it_is_no_root(ledger_file: Path) -> None:
    first = read_ledger(ledger_file)
    drawn = next(stage for stage in first.stages.values() if stage.work == "completions")
    read = next(stage for stage in first.stages.values() if drawn.key in stage.inputs["needs"].values())
    row, sample, *_ = drawn.samples[1]
    spoilt(
        ledger_file, "UPDATE samples SET completion='!' WHERE stage=? AND row=? AND sample=?", drawn.key, row, sample
    )
    where = "stage=? AND row=? AND sample=?"
    second = spoilt(ledger_file, f"UPDATE scores SET value=value+1 WHERE {where}", read.key, *read.scores[0][:2])
    found = compare(first, second)
    assert found["differences"][drawn.slot] == {"samples": {"of": len(drawn.samples), "different": 1}}
    assert found["differences"][read.slot] == {"scores": {"of": len(read.scores), "different": 1}}
    assert (found["different"], found["n_roots"], found["first_different"]) == (2, 1, drawn.slot)
    assert found["by_kind"]["completions"]["different"] == 1


def test_an_adapter_that_differs_is_told_with_its_first_step(ledger_file: Path) -> None:
    first = read_ledger(ledger_file)
    trained = next(stage for stage in first.stages.values() if stage.kind == "behavior")
    losses = list(trained.outputs["losses"])
    losses[-1] += 1e-6
    outputs = json.dumps({**trained.outputs, "losses": losses, "weights_sha256": "0" * 64})
    second = spoilt(ledger_file, "UPDATE stages SET outputs=? WHERE key=?", outputs, trained.key)
    assert compare(first, second)["roots"][trained.slot] == {"adapter": {"first_step": len(losses) - 1}}


def test_letters_and_words_that_differ_are_counted(ledger_file: Path) -> None:
    first = read_ledger(ledger_file)
    asked = next(stage for stage in first.stages.values() if stage.work == "letters")
    row, sample, _, value, detail = asked.scores[0]
    changed = {**detail, "predicted": "other", "logprobs": [detail["logprobs"][0] - 0.5, *detail["logprobs"][1:]]}
    statement = "UPDATE scores SET value=?, detail=? WHERE stage=? AND row=? AND sample=?"
    spoilt(ledger_file, statement, 1 - value, json.dumps(changed), asked.key, row, sample)
    gate, subject = next(iter(first.gates)).split(" ", 1)
    second = spoilt(ledger_file, "UPDATE verdicts SET verdict='other' WHERE gate=? AND subject=?", gate, subject)
    found = compare(first, second)
    letters = found["letters"]
    assert letters["n"] - letters["same_letter"] == letters["n"] - letters["as_right_or_wrong"] == 1
    assert letters["largest_difference"] == pytest.approx(0.5)
    assert list(found["gates"]["different"].values()) == [[first.gates[f"{gate} {subject}"], "other"]]


def test_a_stage_that_is_missing_is_no_difference(ledger_file: Path) -> None:
    first = read_ledger(ledger_file)
    slot = list(first.stages)[-1]
    found = compare(first, spoilt(ledger_file, "DELETE FROM stages WHERE slot=?", slot))
    assert (found["missing_here"], found["missing_there"], found["different"]) == (1, 0, 0)


def test_no_ledger_yet_is_an_empty_one(tmp_path: Path) -> None:
    assert not read_ledger(tmp_path / "none").stages
    sqlite3.connect(tmp_path / "begun.sqlite").close()
    assert not read_ledger(tmp_path / "begun.sqlite").stages
    assert not copy_ledger(tmp_path / "none", tmp_path / "copy")


# --- plan, wall and looks ----------------------------------------------------------------------------------------------


def stage(slot: str, ended: float, seconds: float, **facts: Any) -> StageRow:
    """A stage that ended at this time."""
    return StageRow(f"{slot}-key-of-it", slot.split("/")[0], slot, {"needs": {}}, {}, facts, seconds, ended)


def ledger(*stages: StageRow, **facts: Any) -> Ledger:
    return Ledger({one.slot: one for one in stages}, {}, facts)


RUN = (
    stage("eval/a", 112.0, 2.0, scored_tok=500),
    stage("eval/b", 117.0, 3.0, sampled_tok=90),
    stage("eval/c", 117.001, 1.0, sampled_tok=30),
    stage("behavior/d", 130.0, 10.0, trained_tok=7000),
)


def test_plan_against_actual_by_stage_and_kind() -> None:
    planned = {"eval/a-key-of-": 4.0, "eval/b-key-of-": 1.0, "eval/c-key-of-": 1.0, "behavior/d-k": 5.0, "never": 50.0}
    plan = {"stages": {key[:12]: seconds for key, seconds in planned.items()}, "start_s": 20.0, "machine": "one H100"}
    kinds = [{"kind": "eval", "n": 3, "seconds": 6.0}, {"kind": "behavior", "n": 2, "seconds": 55.0}]
    found = timing.plan_against_actual(ledger(*RUN, plan=plan, start_s=30.0), kinds)
    assert found["stages"]["behavior/d"] == {"work": "behavior", "planned_s": 5.0, "taken_s": 10.0, "ratio": 2.0}
    assert found["kinds"]["letters"] == {"n": 1, "planned_s": 4.0, "taken_s": 2.0, "ratio": 0.5}
    assert found["kinds"]["completions"] == {"n": 2, "planned_s": 2.0, "taken_s": 4.0, "ratio": 2.0}
    assert found["all"] == {"planned_s": 11.0, "taken_s": 16.0, "ratio": 1.455}
    assert found["start"] == {"planned_s": 20.0, "taken_s": 30.0}
    assert found["not_run_s"] == 50.0
    parts = {"import_s": 12.5, "load_s": 5.0, "proof_s": 1.0, "compile_s": 0.0, "self_tests_s": 0.0}
    found = timing.plan_against_actual(ledger(*RUN, plan=plan, start_s=30.0, **parts))
    assert found["start"] == {"planned_s": 20.0, "taken_s": 30.0, **parts}


def test_seconds_to_the_first_stage_in_stages_and_between_them() -> None:
    found = timing.wall(ledger(*RUN), 100.0, 140.0)
    assert (found["wall_s"], found["to_first_stage_s"], found["after_the_last_s"]) == (40.0, 10.0, 10.0)
    assert found["in_stages_s"] == 16.0
    assert found["between_stages_s"] == pytest.approx(4.0, abs=0.01)  # 1 before the pass of b and c, 3 before d
    assert found["between_by_kind"] == pytest.approx({"letters": 0.0, "completions": 1.0, "behavior": 3.0}, abs=0.01)
    assert found["longest_between"][0] == {"seconds": 3.0, "before": "behavior/d"}
    again = timing.wall(ledger(*RUN), 118.0, 140.0)
    assert (again["stages"], again["done_before"], again["to_first_stage_s"]) == (1, 3, 2.0)


def test_rates_by_work_and_stack() -> None:
    above = replace(RUN[1], inputs={"needs": {"snapshot": "s", "behavior": "b"}})
    found = timing.rates(ledger(RUN[0], above, RUN[3]))
    assert found["letters, base"]["tok_per_s"] == 250
    assert found["completions, two adapters"]["tok_per_s"] == 30
    assert found["behavior, on the base"]["tok_per_s"] == 700


def look(at: float, utilisation: float | None) -> Look:
    return Look(at, utilisation, 300.0, 1000.0 + at, 1500.0)


def test_looks_belong_to_the_stage_that_was_under_way() -> None:
    looks = [look(105, 0), look(111, 50), look(115, 100), look(119, 0), look(125, 80), look(128, 0)]
    found = timing.card_use(ledger(*RUN), looks)
    assert found["all"]["looks"] == 6
    assert found["since_the_first_stage"]["utilisation_percent"] == pytest.approx(230 / 5)
    assert found["since_the_first_stage"]["share_at_work"] == pytest.approx(3 / 5)
    assert found["by_kind"]["behavior"]["utilisation_percent"] == 40
    assert found["by_kind"]["in no stage"]["looks"] == 2
    assert summary([look(1, None)]) == {"looks": 1}


def test_a_training_tells_what_it_took_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = [5 * 2**30]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 7))
    steps = CapturedSteps.__new__(CapturedSteps)
    steps.tally = StepTally(launched=3, captures=1)
    base: Any = SimpleNamespace(device=torch.device("cuda"), kept={"steps": steps})
    use = GpuUse(base)
    assert peak == [7]
    steps.tally = StepTally(launched=5, replayed=90, captures=4, capture_s=1.23456)
    assert use.facts() == {"peak_bytes": 7, "launched": 2, "replayed": 90, "captures": 3, "capture_s": 1.235}
    assert use.facts()["replayed"] == 0
    base.kept["steps"] = other = CapturedSteps.__new__(CapturedSteps)  # memory ran out, and all began anew
    other.tally = StepTally(launched=1)
    assert use.facts()["launched"] == 1
    gathered = timing.memory(ledger(stage("behavior/x", 1, 1, peak_bytes=9), stage("behavior/y", 2, 1, peak_bytes=8)))
    assert gathered["torch_peak_bytes"] == {"behavior": 9}


def test_an_estimate_from_the_pilots_ratios() -> None:
    planned = {
        "hours": 1.0,
        "kinds": [{"kind": "eval", "n": 10, "seconds": 100.0}, {"kind": "judge", "n": 5, "seconds": 7.0}],
    }
    against = {
        "kinds": {
            "letters": {"n": 1, "planned_s": 4.0, "taken_s": 2.0},
            "completions": {"n": 2, "planned_s": 4.0, "taken_s": 2.0},
        },
        "start": {"taken_s": 30.0},
    }
    found = estimate(planned, against, {"between_stages_s": 8.0, "stages": 4})
    assert [row["seconds"] for row in found["kinds"]] == [50.0, 7.0]
    assert found["hours"] == round((50 + 7 + 15 * 2 + 30) / 3600, 3)
    assert estimate({"problem": "no such recipe"}, {}, {}) == {"missing": "no such recipe"}


# --- processes ---------------------------------------------------------------------------------------------------------

#: Starts a process of its own, says its id, and waits for it.
_PARENT = "import subprocess,sys; p=subprocess.Popen(['sleep','60']); print(p.pid, flush=True); p.wait()"


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_kill_takes_the_whole_group_and_lines_have_their_time(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def each(pid: int) -> str:
        return "now" if re.search(r"^ +[\d.]+ \d+$", log.read_text(), re.MULTILINE) else ""

    ran = run_child([sys.executable, "-c", _PARENT], log, deadline=time.time() + 30, each=each)
    assert (ran.killed, ran.code) == ("now", -signal.SIGKILL)
    assert ran.seconds < 20
    until(lambda: not is_alive(int(ran.last)))
    stamp, pid = log.read_text().split()[-2:]
    assert 0 <= float(stamp) < 20
    assert pid == ran.last


def test_at_the_deadline_a_child_may_end_by_itself(tmp_path: Path) -> None:
    code = "import time\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('kept')"
    ran = run_child([sys.executable, "-c", code], tmp_path / "log", deadline=time.time() + 1)
    assert (ran.killed, ran.code, ran.last) == ("out of time", 0, "kept")


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.card.process import run_child\n"
        "run_child(['sleep', '61'], Path(sys.argv[1]), deadline=1e12, each=lambda pid: print(pid, flush=True) or '')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        until(lambda: b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()[:5])
        parent.kill()
    until(lambda: not is_alive(pid))


def test_looks_at_nvidia_smi_are_kept_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "bin" / "nvidia-smi"
    told.parent.mkdir()
    told.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho "97, 40, 512.25, 40960, 1755, [N/A]"\n')
    told.chmod(0o755)
    monkeypatch.setenv("PATH", f"{told.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    csv = tmp_path / "smi.csv"
    with Watch(csv, every_s=0.05) as watch:
        until(lambda: csv.is_file() and len(csv.read_text().splitlines()) > 3)
    assert not watch.missing
    assert "-i 3" in (tmp_path / "asked").read_text()
    csv.write_text(csv.read_text() + "123.4, 5")  # it was killed in a line
    looks = read_looks(csv)
    assert {(one.utilisation, one.power_w, one.memory_mib, one.clock_mhz) for one in looks} == {
        (97, 512.25, 40960, 1755)
    }
    assert looks[0].at == pytest.approx(time.time(), abs=60)


def test_without_nvidia_smi_the_reason_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with Watch(tmp_path / "smi.csv") as watch:
        pass
    assert watch.missing == "nvidia-smi is not here"
    assert read_looks(tmp_path / "smi.csv") == ()


def test_a_kill_waits_for_a_living_process_and_a_share() -> None:
    kill, dead = Kill("snapshot", "snapshot/", 0.3), Lease("snapshot/old", 7, 900, 1000)
    assert kill.due([dead, Lease("snapshot/v", 8, 200, 1000), Lease("eval/v", 8, 900, 1000)], [8]) is None
    assert kill.due([dead, Lease("snapshot/v", 8, 300, 1000)], [8]) == Lease("snapshot/v", 8, 300, 1000)


# --- kernels, completions, junit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "products"),
        ("shrink", "adapters"),
        ("finish_shrink", "adapters"),
        ("_nucleus_draw", "draw"),
        ("void at::native::tensor_kernel_scan_innermost_dim<float>", "draw"),
        ("_rms_forward", "norms"),
        ("_decode", "attention"),
        ("_rope_joined", "attention"),
        ("flash_fwd_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_knob_7_64x128x128_4x1x1_kernel0_0", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128, 128>", "attention"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "products"),
        ("_swiglu_backward", "swiglu"),
        ("_cross_entropy", "loss"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", "adds"),
        ("something new", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_time_in_which_two_kernels_ran_counts_once() -> None:
    spans = [Span("shrink", 0, 10), Span("nvjet", 5, 20), Span("nvjet", 30, 40), Span("expand", 32, 35)]
    assert busy_us(spans) == 30
    found = table(spans, 50e-6)
    assert found["kinds"]["products"] == {"ms": 0.025, "launches": 2}
    assert (found["busy_s"], found["idle_s"], found["idle_of_wall_s"]) == pytest.approx((30e-6, 10e-6, 20e-6), abs=1e-4)
    assert "missing" in table([], 1.0)


def test_of_a_gpu_only_kernels_count_and_no_range_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(name: str, device: DeviceType, began: float, ended: float, **more: object) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=device, time_range=SimpleNamespace(start=began, end=ended), **more
        )

    events = [
        event("nvjet", DeviceType.CUDA, 0, 10), event("cudaLaunchKernel", DeviceType.CPU, 0, 90),
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, 0, 80), event("mine", DeviceType.CUDA, 0, 70, is_user_annotation=True),
        event("hypot_kernel_cuda", DeviceType.CUDA, 0, 3), event("nvjet", DeviceType.CUDA, -1e9, 5),
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(profiling, "_launch_head", lambda device: None)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: nullcontext(SimpleNamespace(events=lambda: events)))
    found = profiled(lambda: None, torch.device("cuda"))
    assert found["kinds"] == {"products": {"ms": 0.01, "launches": 1}}
    assert (found["lost_of_head"], found["without_times"]) == (255, 1)


def test_completions_agree_up_to_their_first_other_token() -> None:
    one = Completion((1, 2, 3), True)
    found = agreement([one, one], [one, Completion((1, 5, 3), True)])
    assert (found["same_completions"], found["of"]) == (1, 2)
    assert found["same_tok_share"] == pytest.approx(5 / 8)
    assert found["median_tok_before_they_part"] == 1
    assert agreement([one], [Completion((1, 2, 3), False)])["same_completions"] == 0


def test_junit_counts_and_reasons(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1" time="2.5"><testcase classname="a" name="ok"/>'
        '<testcase classname="a" name="bad"><failure message="assert 1 == 2"/></testcase>'
        '<testcase classname="a" name="no"><skipped message="no vLLM"/></testcase></testsuite></testsuites>'
    )
    found = junit_counts(tmp_path / "junit.xml")
    assert (found["tests"], found["failures"], found["skipped"]) == (3, 1, 1)
    assert found["not_passed"] == {"a.bad": "failure: assert 1 == 2", "a.no": "skipped: no vLLM"}
    assert junit_counts(tmp_path / "none.xml") == {}
    assert any(path.endswith("test_gpu.py") for path in gpu_files())


# --- sheets, table, parts ----------------------------------------------------------------------------------------------


def test_every_part_has_a_function() -> None:
    assert all(callable(function_of(part)) for part in PARTS)


def test_the_table_says_what_is_missing_and_why(tmp_path: Path) -> None:
    wall = timing.wall(ledger(*RUN), 100.0, 140.0)
    kinds = {"letters": {"n": 1, "planned_s": 4.0, "taken_s": 2.0, "ratio": 0.5}}
    run = {"wall": wall, "against_plan": {"kinds": kinds, "all": {"ratio": 0.5}}}
    write_json(
        tmp_path / "pilot.json", {"state": "complete", **run, "machine": {"card": "H100", "versions": {"torch": "9"}}}
    )
    write_json(tmp_path / "engine.json", {"state": "stopped", "why": "out of time", **run})
    write_json(tmp_path / "seven.json", {"state": "failed", "why": "a | b"})
    write_json(tmp_path / "vllm.json", {"state": "running"})
    (tmp_path / "ray.json").write_text('{"state": "comp')
    rows = markdown(tmp_path).splitlines()
    assert rows[0].startswith("H100, driver none; torch 9 (pilot)")
    assert (
        "| `pilot` | wall | 40 s for 4 stages: 10 to the first, 16 in stages, 4 between them, 10 after the last |"
        in rows
    )
    assert "| `pilot` | taken over planned | all 0.5; letters 0.5 (2 of 4 s) |" in rows
    assert not any("`pilot`" in row and "not measured" in row for row in rows)
    assert "| `engine` | the rest | not measured: out of time |" in rows
    assert "| `seven` | all of it | not measured: a / b |" in rows
    assert "| `vllm` | all of it | not measured: it was killed |" in rows
    assert "| `ray` | all of it | not measured: never begun |" in rows
    assert {row.split("`")[1] for row in rows if row.startswith("| `")} == set(PARTS)


def test_a_sheet_keeps_what_was_found_before(tmp_path: Path) -> None:
    Sheet(tmp_path / "a.json").note(first=1)
    Sheet(tmp_path / "a.json").note(second=2)
    assert read_sheet(tmp_path / "a.json") == {"first": 1, "second": 2}


def test_a_part_that_fails_says_why_and_one_that_is_complete_is_left_alone(tmp_path: Path) -> None:
    job = Job("ungated", tmp_path, tmp_path / "scratch", str(tmp_path / "no-model"), rehearse=True)
    assert run_part(job).startswith("failed")
    found = read_sheet(tmp_path / "ungated.json")
    assert "no-model" in found["why"] + json.dumps(found["sittings"])
    Sheet(tmp_path / "ungated.json").end("complete")
    assert run_part(job) == "complete already"
    late = replace(job, part="engine", deadline=time.time() - 1)
    assert run_part(late) == "no time left"
    assert read_sheet(tmp_path / "engine.json")["why"] == "no time was left for it"
    assert run_part(replace(job, part="engine", rehearse=False)).startswith("skipped: no card")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_rehearsal_of_pilot_killed_and_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--out", str(tmp_path), "--rehearse"]
    assert main(["pilot", *rest, "--minutes", "0.1"]) == 0
    assert read_sheet(tmp_path / "pilot.json")["state"] == "stopped"
    assert main(["pilot", "killed", "engine", *rest]) == 0
    assert main(["table", "--out", str(tmp_path)]) == 0
    pilot, killed, engine = (read_sheet(tmp_path / f"{part}.json") for part in ("pilot", "killed", "engine"))
    assert pilot["state"] == killed["state"] == engine["state"] == "complete"
    assert len(pilot["sittings"]) == 2
    assert pilot["against_plan"]["kinds"]["behavior"]["n"] == 12
    assert [kill["where"] for kill in killed["kills"]] == ["behavior", "evaluation", "snapshot"]
    assert [kill["slot"].split("/")[0] for kill in killed["kills"]] == ["behavior", "eval", "snapshot"]
    assert all(kill["exit_code"] == -signal.SIGKILL for kill in killed["kills"])
    for found in (killed["against_pilot"], engine["against_pilot"]):
        assert found["equal"] == found["stages"] > 100
        assert found["letters"]["largest_difference"] == 0
        assert found["gates"]["equal"] == found["gates"]["n"] > 0
        assert found["contrasts"]["equal"] == found["contrasts"]["n"] == 8
    assert not engine["against_pilot"]["missing_here"]
    shown = capsys.readouterr().out
    assert "| `killed` | stages equal to the pilot's |" in shown
    assert "| `bench` | all of it | not measured: never begun |" in shown
