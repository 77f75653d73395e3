"""Every comparison runs, on a tiny model: what it says is well formed. How fast is for `fastconv bench` itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastconv import bench as benches
from fastconv import show
from fastconv.bench import bench
from fastconv.bench.measure import Clock, Peak, bench_model, paired_ratio
from fastconv.bench.training import LOADS, make_jobs
from fastconv.cli import app
from fastconv.engine import train as training
from fastconv.engine.cuda_graph import MicroBatch, StepTally
from fastconv.engine.stack import Stack
from fastconv.errors import GateStop, InputError, ModelError
from fastconv.recipe import ModelSettings
from tests.serve_kit import Fake, fake, running

__all__ = ["fake"]


@pytest.mark.parametrize(
    ("kind", "size", "ways"),
    [
        ("train", 2, 2),
        pytest.param("behavior", 2, 2, marks=pytest.mark.slow),
        ("group", 2, 1),
        ("score", 8, 2),
        ("stack", 1, 1),
        ("sample", 2, 1),
    ],
)
def test_a_comparison_is_well_formed(tiny_qwen: Path, kind: str, size: int, ways: int) -> None:
    found = json.loads(json.dumps(bench(kind, str(tiny_qwen), device="cpu", size=size)))
    assert found["kind"] == kind
    assert len(found["usual"]) == ways
    assert found["ours"]["seconds"] > 0
    assert found["ours"]["per_s"] > 0
    assert found["ours"]["written_bytes"] == 0
    assert found["ratio"] == pytest.approx(next(iter(found["ratios"].values())))
    assert found["threads"] == torch.get_num_threads()


def test_padding_and_captures_of_the_timed_steps_are_told_apart(
    tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a tally that grows by the same in every micro-step: what the warm-up did is no part of it."""
    tally = StepTally()
    step = training.micro_step

    def counted(stack: Stack, batch: MicroBatch, totals: torch.Tensor) -> None:
        for name, more in (("n_tok", 100), ("padded_tok", 104), ("launched", 1), ("captures", 2), ("capture_s", 0.5)):
            setattr(tally, name, getattr(tally, name) + more)
        step(stack, batch, totals)

    monkeypatch.setattr(training, "micro_step", counted)
    monkeypatch.setattr("fastconv.bench.training.captured_steps", lambda stack: SimpleNamespace(tally=tally))
    found = bench("group", str(tiny_qwen), device="cpu", size=3)
    extra = found["extra"]
    assert extra["padding"] == pytest.approx(0.04)
    assert (extra["launched"], extra["captures"], extra["capture_s"]) == (3, 6, 1.5)
    show.bench(found, as_json=False)
    assert "padded by 4.0 %" in capsys.readouterr().out


def test_the_usual_swap_writes_the_whole_model(tiny_qwen: Path) -> None:
    found = bench("stack", str(tiny_qwen), device="cpu", size=1)
    weights = (tiny_qwen / "model.safetensors").stat().st_size
    assert found["usual"][0]["written_bytes"] > weights
    assert found["ratios"]["merge + save + load"] > 100


@pytest.mark.slow
def test_sampling_is_compared_with_vllm_where_there_is_one(tiny_qwen: Path, fake: Fake) -> None:
    fake.script(engine=True)
    found = bench("sample", str(tiny_qwen), device="cpu", size=4)
    assert [way["name"] for way in found["usual"]] == ["generate, padded", "vllm, a server"]
    assert found["extra"]["vllm_tokens"] > 0
    assert found["ratios"]["vllm, a server"] > 0
    assert not any(map(running, fake.pids))


def test_sampling_says_why_vllm_was_not_measured(tiny_qwen: Path) -> None:
    assert bench("sample", str(tiny_qwen), device="cpu", size=4)["extra"]["vllm"].startswith("not measured: ")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_whole_cell_and_a_random_shape() -> None:
    assert bench("cell", "random:smollm2-135m", device="cpu")["ratio"] > 1


def test_a_random_shape_is_the_named_one() -> None:
    model = bench_model(ModelSettings(id="random:smollm2-135m", device="cpu"))
    assert sum(p.numel() for p in model.plain().parameters()) == model.random.total_params
    with pytest.raises(ModelError, match="no shape is called"):
        bench_model(ModelSettings(id="random:gpt9"))


def test_all_comparisons_go_into_one_file_and_two_files_are_compared(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What got slower is named, with exit code 3; on another card only ratios to the usual ways count."""
    monkeypatch.setattr(benches, "ALL_KINDS", ("score", "kernel"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    app(["bench", "all", "--model", str(tiny_qwen), "--size", "8", "--out", str(before)], standalone_mode=False)
    found = json.loads(before.read_text())
    assert {"card", "versions", "machine", "python", "model", "at"} <= found.keys()
    assert list(found["results"]) == ["score"]
    assert "cannot run" in found["left_out"]["kernel"]
    slow = json.loads(before.read_text())
    slow["results"]["score"]["ours"]["per_s"] *= 0.8
    after.write_text(json.dumps(slow))
    assert not any(change.slower for change in benches.compare_files([before, before]))
    (rate, *ratios) = benches.compare_files([before, after])
    assert (rate.kind, rate.figure, rate.slower) == ("score", "questions/s", True)
    assert ratios
    assert not any(change.slower for change in ratios)
    capsys.readouterr()
    with pytest.raises(GateStop, match="of 3 figures got slower, most of all score"):
        show.changes(benches.compare_files([before, after]), as_json=False)
    assert "0.80 slower" in capsys.readouterr().out
    after.write_text(json.dumps({**slow, "card": "another"}))
    assert [change.figure for change in benches.compare_files([before, after])] == [one.figure for one in ratios]


def test_what_was_compared_is_kept_when_the_next_comparison_is_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(kind: str, model: str, **others: object) -> dict[str, str]:
        if kind == "score":
            raise KeyboardInterrupt
        return {"kind": kind}

    monkeypatch.setattr(benches, "ALL_KINDS", ("train", "score"))
    monkeypatch.setattr(benches, "bench", measure)
    with pytest.raises(KeyboardInterrupt):
        benches.bench_all("builtin:tiny", device="cpu", out=tmp_path / "all.json")
    assert list(json.loads((tmp_path / "all.json").read_text())["results"]) == ["train"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": {}}'])
def test_files_that_hold_no_benchmarks_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "one.json"
    path.write_text(text)
    with pytest.raises(InputError, match="bench all --out"):
        benches.compare_files([path, path])
    with pytest.raises(InputError, match="two files, not 1"):
        benches.compare_files([path])


def test_an_unknown_comparison(tiny_qwen: Path) -> None:
    with pytest.raises(InputError, match="train, behavior, group, score, stack, sample, cell, kernel"):
        bench("speed", str(tiny_qwen))


def test_the_instruments() -> None:
    device = torch.device("cpu")
    clock, peak = Clock(device), Peak(device)
    with peak.watching(), clock.running():
        block = torch.ones(20_000_000)
        del block
    assert len(clock.blocks) == 1
    assert peak.bytes is None or 60e6 < peak.bytes < 300e6
    assert paired_ratio([2.0, 30.0, 3.0], [1.0, 1.0, 1.0]) == 3.0


def test_the_kernel_is_compared_on_a_gpu_only(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ModelError, match=r"cannot run: (triton is not installed|it needs a GPU)") as error:
        bench("kernel", str(tiny_qwen), device="cpu")
    assert "\n" not in str(error.value)


def test_the_jobs_of_a_load_are_the_same_each_time(tiny_qwen: Path) -> None:
    """Two engines, or two ways, are compared on the same frozen adapters."""
    made = bench_model(ModelSettings.model_validate({"id": str(tiny_qwen), "device": "cpu"}))
    stack = Stack(made.base(), made.lora)
    first, second = (make_jobs(stack, LOADS["behavior", "cpu"], 2) for _ in range(2))
    assert first[0].frozen[0].sha256() == second[0].frozen[0].sha256()
    assert [job.rows for job in first] == [job.rows for job in second]
