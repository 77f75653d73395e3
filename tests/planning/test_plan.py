"""Plans: counted before a run, refused beyond the recipe's limits, and compared with the actual times."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fastconv.cli import app
from fastconv.cli.common import load
from fastconv.cli.planning import show_plan
from fastconv.engine.locate import BUILTIN, locate, model_folder
from fastconv.engine.shapes import named_shape
from fastconv.errors import GateStop, InputError, ModelError
from fastconv.experiment.graph import Graph
from fastconv.experiment.measures import Target
from fastconv.experiment.workload import Demand, Sketch, demands
from fastconv.planning.hardware import KNOWN_GPUS, cpu_machine, find_machine, probe_stage
from fastconv.planning.plan import Plan, make_plan, plan_recipe, require_approved
from fastconv.recipe import ModelSettings, RunSettings, run_id, sha256_of
from fastconv.report import collect
from fastconv.report.record import planned_row as planned_row
from fastconv.stats.power import planned_power
from fastconv.store.ledger import Record, Store
from tests import ROOT
from tests.loop_kit import DoneRun, run_tiny, tiny_recipe, write_tiny_recipe


def _kinds(name: str, *overrides: str, machine: str = "h200", scale: str = "") -> dict[str, Any]:
    found = plan_recipe(load(name, list(overrides), scale), None, machine)
    return {one.kind: one for one in found.kinds} | {"plan": found}


def _shown(found: Plan) -> list[str]:
    """The lines that a plan prints, unbroken."""
    told = io.StringIO()
    show_plan(found, Console(file=told, width=1000))
    return [line.rstrip() for line in told.getvalue().splitlines()]


def _line(found: Plan, begins: str) -> str:
    (line,) = [line for line in _shown(found) if line.startswith(begins)]
    return line


def test_the_matrix_is_planned_without_torch_a_gpu_or_its_model_and_data(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom fastconv.cli import app\n"
        "try:\n    app(['plan', 'matrix', '--json', '-w', sys.argv[1]])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "no")], capture_output=True, text=True, check=True
    )
    assert ran.stderr.strip().splitlines()[-1] == "[]"
    found = json.loads(ran.stdout)
    assert found["n_cells"] == 120
    if found["machine"]["device"] == "cpu":  # where tests run on a machine with a GPU, that is planned for
        assert "no GPU is visible" in found["machine"]["name"]
        assert "--machine plans for one" in found["machine"]["origin"]
    assert any("ARC-Challenge is not on this disk" in note for note in found["notes"])
    assert not (tmp_path / "no").exists()


def test_planning_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    slow = {"scipy", "numpy", "httpx", "anthropic", "jinja2", "tokenizers", "polars", "matplotlib"}
    script = (
        "import sys\nfrom fastconv.cli import app\n"
        f"try:\n    app(['plan', 'matrix', '-w', {str(tmp_path / 'no')!r}])\nexcept SystemExit:\n    pass\n"
        f"print(sorted({slow!r} & set(sys.modules)), file=sys.stderr)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert ran.stderr.strip().splitlines()[-1] == "[]"


def test_a_stage_that_many_cells_share_is_made_and_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[object] = []
    read: list[Path] = []

    def counted_hash(value: object) -> str:
        hashed.append(value)
        return sha256_of(value)

    def counted_read(path: Path) -> bytes:
        read.append(path)
        return path.read_bytes()

    monkeypatch.setattr("fastconv.store.records.sha256_of", counted_hash)
    monkeypatch.setattr("fastconv.datasets.files._read", counted_read)
    graph = Sketch(load("matrix", []))
    plan = make_plan(graph, None, find_machine(graph.recipe, named_shape("qwen2.5-7b"), "cuda", None))
    # Some stages go by several names with one key: every source shares the assistant's own answers.
    n = sum(kind.n for kind in plan.kinds)
    assert n <= len(hashed) <= 1.2 * n
    # A prompts file is read once, a file of wordings once for each way of using it; the matrix has 24 sets and 120 cells.
    assert max(Counter(read).values()) <= 4, Counter(read).most_common(3)


def test_work_is_counted_by_the_protocols_numbers() -> None:
    found = _kinds("matrix")
    # 6 sources x 3 snapshots of one 20-epoch cosine over 400 rows in batches of 4
    assert found["snapshot"].n == 18
    assert found["snapshot"].demand.steps == 6 * 2000
    # 800 rows (600 for misalignment) x 3 epochs in batches of 16, on 4 stacks of each of 6 sources
    assert found["behavior"].demand.steps == 6 * 4 * (3 * 150 + 114)
    # judged: 50 requests, 50 statements and 32 questions, 10 samples each
    assert found["judge"].demand.judged == found["plan"].judging.n
    judged = [stage for stage in Sketch(load("matrix", [])).stages() if stage.kind == "judge"]
    assert found["judge"].demand.judged == sum(len(s.needs["eval"].work["items"]) * 10 for s in judged)
    assert found["eval"].demand.worst_tok == found["judge"].demand.judged * 512


def test_seconds_follow_from_the_formula() -> None:
    machine, shape, recipe = KNOWN_GPUS["h200"], named_shape("qwen2.5-7b"), load("pilot", [])
    trained = Demand(trained_tok=1e6, micro_steps=100, length_tok=300.0, share=0.8)
    # 28.1 GFLOP a token (STACK.md) at 788 TFLOP/s x 0.6
    assert machine.seconds(trained, shape, recipe) == pytest.approx(1e6 * 28.1e9 / (0.6 * 788e12) + 1.5 + 0.5, rel=0.02)
    assert machine.seconds(Demand(), shape, recipe) == 0.0
    drawn = Demand(new_tok=1000.0, decode_steps=100, length_tok=100.0)
    more = Demand(new_tok=1000.0, decode_steps=200, length_tok=100.0)
    assert machine.seconds(more, shape, recipe) - machine.seconds(drawn, shape, recipe) == pytest.approx(100 * 0.005)


@pytest.mark.parametrize(
    ("demand", "measured_s"),
    [
        (Demand(trained_tok=57_280, micro_steps=48, length_tok=300, share=0.6), 4.26),
        (Demand(trained_tok=228_989, micro_steps=48, length_tok=300, share=0.6), 13.81),
        (Demand(trained_tok=347_508, micro_steps=48, length_tok=300, share=0.6), 19.81),
        (Demand(read_tok=64_447, length_tok=110), 1.78),
        (Demand(read_tok=151_200, new_tok=552_960, decode_steps=768, length_tok=198), 24.06),
    ],
    ids=["train", "behavior", "group", "score", "sample"],
)
def test_the_rates_of_an_h100_give_what_bench_measured_on_one(demand: Demand, measured_s: float) -> None:
    machine = KNOWN_GPUS["h100"]
    planned_s = machine.seconds(demand, named_shape("qwen2.5-7b"), load("pilot", [])) - machine.stage_s
    assert planned_s == pytest.approx(measured_s, rel=0.2)


#: Seconds that stages took on one H100, as many of each kind, on a real 1.5B on engine unsloth with kernels that had never been
#: compiled: 28 November 2026, torch 2.11.0, commit e2d2805 (docs/MEASURED.md). "pilot" is what G0 lets `pilot_small` run there, "ungated"
#: what `--ignore-gate` adds, "4 bits" the whole of `small_gpu`.
MEASURED = {
    "pilot": ("pilot_small", {
        "letters": (3, 2.73), "completions": (36, 75.3), "geometry": (4, 3.02), "answers": (6, 5.01), "behavior": (8, 76.6),
        "snapshot": (3, 44.9),
    }),
    "ungated": ("pilot_small", {"letters": (33, 77.1), "behavior": (8, 40.7)}),
    "4 bits": ("small_gpu", {
        "letters": (36, 95.9), "geometry": (4, 3.59), "answers": (1, 5.81), "behavior": (8, 151.0), "snapshot": (3, 70.9),
    }),
}  # fmt: skip


def _ran(what: str, slot: str) -> bool:
    capability = "capability" in slot and not slot.startswith("eval/base/")
    return what == "4 bits" or capability == (what == "ungated")


@pytest.mark.parametrize(("what", "within"), [("pilot", 1.5), ("ungated", 1.5), ("4 bits", 1.75)])
def test_each_kind_of_a_whole_run_on_a_card_is_planned_within_half_as_much_again(what: str, within: float) -> None:
    """4 bits within three quarters: what they cost depends on more than their number of tokens."""
    (name, taken), machine = MEASURED[what], KNOWN_GPUS["h100"]
    recipe = load(name, [])
    graph = Sketch(recipe)
    ran = [stage for stage in graph.stages() if _ran(what, stage.slot)]
    found = demands(graph, ran, machine.target(recipe, named_shape("qwen2.5-1.5b")))
    planned: dict[str, list[float]] = {}
    for stage in ran:
        kind = ("completions" if "sampling" in stage.inputs else "letters") if stage.kind == "eval" else stage.kind
        planned.setdefault(kind, []).append(machine.seconds(found[stage.key], named_shape("qwen2.5-1.5b"), recipe))
    for kind, (n, taken_s) in taken.items():
        assert len(planned[kind]) == n, kind
        assert 1 / within <= sum(planned[kind]) / taken_s <= within, (kind, sum(planned[kind]))


@pytest.mark.parametrize(
    ("machine", "shape", "n_waves"),
    [("h100", "qwen2.5-1.5b", 1), ("4090", "qwen2.5-1.5b", 2), ("h100", "qwen2.5-7b", 2)],
)
def test_as_many_rows_are_planned_at_once_as_are_sampled(machine: str, shape: str, n_waves: int) -> None:
    """Three stages of 400 answers drawn together: 1,200 rows are one wave only where the cache of 1,536 is small."""
    graph = Sketch(load("markers", ["eval.samples_per_prompt=20"]))
    found = demands(graph, graph.stages(), KNOWN_GPUS[machine].target(graph.recipe, named_shape(shape)))
    stage = next(s for s in graph.stages() if s.kind == "eval" and "sampling" in s.inputs)
    assert found[stage.key].decode_steps == 512 * n_waves / 3


@pytest.mark.parametrize("start_s", [72.6, 47.8, 35.5])
def test_a_start_with_and_without_compiling_is_planned_within_half_as_much_again(start_s: float) -> None:
    assert 1 / 1.5 <= KNOWN_GPUS["h100"].load_s / start_s <= 1.5


def test_estimated_tokens_are_those_that_the_run_counted(done_run: DoneRun) -> None:
    graph, store = done_run.graph, done_run.store
    demo = Graph(load("demo", []))
    # The demo's own counts on the embedded model: prompts of the base evaluations and the rows of a refusal adapter.
    counted = demands(demo, demo.stages(), Target("cpu"))
    by_slot = {stage.slot: counted[stage.key] for stage in demo.stages()}
    assert by_slot["eval/base/refusal/assistant/s42"].read_tok == pytest.approx(720, rel=0.15)
    assert by_slot["eval/base/refusal/villain/s42"].read_tok == pytest.approx(900, rel=0.15)
    assert by_slot["behavior/villain/e0/refusal/excluded/s42"].trained_tok == pytest.approx(11262, rel=0.15)
    assert by_slot["behavior/villain/e0/refusal/excluded/s42"].steps == 28
    # Personas share what begins alike on a CPU; a GPU reads every prompt whole.
    on_gpu = demands(demo, demo.stages(), Target("cuda"))[
        next(s.key for s in demo.stages() if s.slot == "geometry/base")
    ]
    assert on_gpu.read_tok == pytest.approx(9228, rel=0.15)
    assert by_slot["geometry/base"].read_tok < 0.6 * on_gpu.read_tok
    for stage in graph.stages():
        record = store.record(stage.key)
        if record is not None and stage.kind in ("snapshot", "behavior"):
            assert demands(graph, [stage], Target("cpu"))[stage.key].steps == record.facts["steps"], stage.slot


def test_what_is_done_costs_nothing_and_what_g0_ruled_out_neither(done_run: DoneRun) -> None:
    fresh = make_plan(done_run.graph, None)
    assert sum(one.n for one in fresh.kinds) > 20
    now = make_plan(done_run.graph, done_run.store)
    assert [one.n for one in now.kinds if one.n] == []
    assert now.hours == 0.0
    assert sum(one.n_done for one in now.kinds) < sum(one.n for one in fresh.kinds)  # no capability adapters


def test_dollars_have_an_expectation_and_a_worst_case() -> None:
    few = ('grid.sources=["villain"]', "grid.epochs=[0, 2]", 'grid.behaviors=["none", "refusal"]')
    dear = _kinds("matrix", *few, "judge.model=claude-sonnet-5-5")["plan"].judging
    cheap = _kinds("matrix", *few)["plan"].judging
    live = _kinds("matrix", *few, "judge.mode=live")["plan"].judging
    assert 0 < cheap.expected_usd < cheap.worst_usd
    assert dear.expected_usd / cheap.expected_usd == pytest.approx(20, rel=0.1)
    assert live.expected_usd > 1.5 * cheap.expected_usd  # batches cost half
    assert _kinds("pilot")["plan"].judging is None
    assert _kinds("matrix", *few, "judge.mode=local", "judge.model=", machine="cpu")["plan"].judging.worst_usd == 0.0


def test_minimum_detectable_effects_stand_beside_the_thresholds() -> None:
    power = _kinds("matrix")["plan"].power
    # sqrt(0.15 / 586 + 2 x 0.01^2), over questions and over runs, times 2.87 for about 41 degrees of freedom
    assert power["capability"].change.alone == pytest.approx(0.0613, abs=0.001)
    assert power["capability"].change.too_large
    assert power["refusal"].change.too_large
    assert not _kinds("matrix", "gates.capability_pp=6.5")["plan"].power["capability"].change.too_large
    assert power["capability"].n_contrasts == 72


def test_the_declared_contrast_has_more_terms_than_the_change_that_gates_compare() -> None:
    less_control = _kinds("matrix")["plan"].power["refusal"].declared
    change = _kinds("matrix")["plan"].power["refusal"].change
    # Assistant and canary, now and at epoch 0; the same again without a behavior adapter, where the grid has it.
    assert (change.n_terms, less_control.n_terms) == (2, 8)
    # Over questions each pair of terms adds its variance; the noise from run to run is counted once for either.
    assert 1.5 * change.alone < less_control.alone < 1.9 * change.alone
    this_run = planned_power("phrases", 0.05, 50, 10, 72, 8, over_runs=False)
    assert this_run is not None
    assert this_run.declared.alone == pytest.approx(2 * this_run.change.alone)
    assert this_run.declared.questions.number > 3.9 * this_run.change.questions.number
    alone = _kinds("matrix", 'grid.behaviors=["capability", "refusal"]')["plan"].power
    assert {one.declared.n_terms for one in alone.values()} == {4}
    for one in alone.values():
        assert 1.1 * one.change.alone < one.declared.alone < 2**0.5 * one.change.alone


def test_questions_that_are_reported_apart_are_planned_apart() -> None:
    found = _kinds("matrix")["plan"]
    own, published = (found.power[f"misalignment, {name} questions"] for name in ("own", "published"))
    assert "misalignment" not in found.power
    assert (own.n_questions, own.primary, own.n_contrasts, own.declared.n_terms) == (24, True, 72, 8)
    assert (published.n_questions, published.primary, published.n_contrasts) == (8, False, 1)
    assert published.declared.n_terms == 4
    assert _line(found, "misalignment, own") == (
        "misalignment, own questions: 24 questions x 10, threshold 10 points; would probably find a change, as gates "
        "compare, from 17 points; a null result would say little: all 80 questions there are would find 16.3 points; 4 seeds of "
        "all these questions would mend it; the declared contrast of 8 terms from 22.1 points (37 points among 72); a null "
        "result would say little: all 80 questions there are would find 17.2 points; 16 seeds of all these questions would mend it"
    )
    assert _line(found, "misalignment, published").startswith(
        "misalignment, published questions, reported apart: 8 questions x 10, threshold 10 points; would probably find a "
        "change, as gates compare, from 21.2 points; a null result would say little: all 8 questions there are would find 21.2 "
        "points; not even 100 seeds of them would mend it; the contrast of 4 terms from 26.9 points; a null result"
    )


def test_a_plan_says_where_three_seeds_find_nothing_or_less_than_one() -> None:
    many, few = (
        _kinds("seeds", *more)["plan"] for more in (('grid.sources=["villain", "comedian", "librarian"]',), ())
    )
    line = _line(_kinds("matrix")["plan"], "three seeds find nothing among 72 contrasts at the first step of Holm: ")
    assert "capability from 39.3 pp, five seeds from 13.9 pp, ten from 13.7 pp" in line
    assert "refusal from 78.6 pp" in line
    assert "capability from 13.1 pp" in _line(few, "three seeds find less than one among 8 contrasts")
    assert _line(many, "three seeds find less than one among 12 contrasts")
    alone = _kinds("matrix", 'grid.sources=["villain"]', "grid.epochs=[0, 20]", 'grid.behaviors=["none", "refusal"]')[
        "plan"
    ]
    assert not [line for line in _shown(alone) if line.startswith("three seeds")]


def test_a_plan_that_could_show_little_says_what_would_mend_it() -> None:
    found = _kinds("matrix")["plan"]
    assert (
        "from 12.5 pp; a null result would say little: all 222 questions there are would find 9.76 pp; 12 seeds of all these "
        "questions would mend it; the declared contrast"
    ) in _line(found, "refusal")
    enough = _kinds("matrix", "gates.capability_pp=6.5")["plan"]
    assert "from 6.13 pp; the declared contrast" in _line(enough, "capability")
    assert _line(found, "a contrast's terms are taken as independent, which is an assumption")
    assert _line(
        found, "seeds are counted as erring independently of one another; the spread between them is not known"
    )
    assert "from 20.4 pp" in _line(found, "refusal")
    assert "all 222 questions there are would find 12.1 pp; not even 100 seeds of them would mend it" in _line(
        found, "refusal"
    )
    few = _kinds("matrix", "eval.samples_per_prompt=2", "gates.refusal=0.12")["plan"]
    assert "from 14.6 pp; a null result would say little: 97 questions or 94 samples would mend it;" in _line(
        few, "refusal"
    )
    by_questions = _kinds("matrix", "gates.refusal=0.15")["plan"]
    assert "questions would mend it (no number of samples would)" in _line(by_questions, "refusal")
    asked = found.power["refusal"]
    assert asked.over_seeds(asked.change, 12) <= asked.change.threshold < asked.over_seeds(asked.change, 11)
    wide = ("gates.capability_pp=50", 'grid.behaviors=["none", "capability"]')
    assert not [line for line in _shown(_kinds("matrix", *wide)["plan"]) if "mend" in line or "say little" in line]


#: LoRA of rank 32 on all seven modules of Qwen2.5-7B, as PEFT counts it, and the model's weights.
ADAPTER_PARAMS, MODEL_PARAMS = 80_740_352, 7_615_616_512


@pytest.mark.parametrize(
    ("overrides", "machine", "n_adapters"),
    [
        ((), "h200", 18 + 96),
        (("run.keep_adapters=false",), "h200", 18 + 24),  # all epoch-0 adapters are trained before their cells
        (("run.keep_adapters=false", "run.group=3"), "h200", 18 + 3),
        (("run.keep_adapters=false",), "cpu", 18 + 1),
    ],
    ids=["kept", "a group", "three", "one by one"],
)
def test_disk_is_counted_by_what_lies_there_at_once(overrides: tuple[str, ...], machine: str, n_adapters: int) -> None:
    found = _kinds("matrix", *overrides, machine=machine)
    assert (found["snapshot"].n, found["behavior"].n) == (18, 96)
    disk = found["plan"].disk_bytes
    assert disk["adapters"] == n_adapters * 4 * ADAPTER_PARAMS
    assert disk["training_state"] == 3 * 4 * ADAPTER_PARAMS
    drawn = sum(kind.demand.new_tok for kind in found["plan"].kinds)
    rows = sum(kind.demand.samples + kind.demand.judged for kind in found["plan"].kinds)
    assert disk["ledger"] == pytest.approx(drawn * 5 + rows * 260)


def test_a_models_files_are_counted_only_while_they_are_not_here(
    tmp_path: Path, tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load("matrix", [])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "own"))
    assert _kinds("matrix")["plan"].disk_bytes["model"] == 2 * MODEL_PARAMS
    folder = tmp_path / "models--Qwen--Qwen2.5-7B-Instruct" / "snapshots" / recipe.model.revision
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    shards = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "model-1.safetensors").touch()
    assert _kinds("matrix")["plan"].disk_bytes["model"] == 2 * MODEL_PARAMS  # its download was broken off
    (folder / "model-2.safetensors").touch()
    assert _kinds("matrix")["plan"].disk_bytes["model"] == 0.0
    assert make_plan(Graph(tiny_recipe(tiny_qwen)), None).disk_bytes["model"] == 0.0
    assert _kinds("demo")["plan"].disk_bytes["model"] == 4 * named_shape("smollm2-135m").total_params
    made = model_folder(locate(ModelSettings(id=BUILTIN)), ModelSettings(id=BUILTIN))
    made.mkdir(parents=True)
    (made / "fastconv.json").touch()
    assert _kinds("demo")["plan"].disk_bytes["model"] == 0.0


def test_memory_is_that_of_the_recipe_on_the_machine_it_is_planned_for() -> None:
    memory = _kinds("pilot", machine="4090")["plan"].memory_bytes  # bfloat16 there, whatever this machine has
    fixed = 2 * MODEL_PARAMS + 20 * ADAPTER_PARAMS + 1.2 * 2**30
    # Inputs of 28 layers and one layer as plain operations keep it; whole: 3 of the MLP's width and 9 of the model's.
    assert memory["least"] == fixed + 1024 * 2 * (28 * 3584 + 6 * 18944 + 12 * 3584)
    assert memory["comfortable"] == fixed + 8192 * 2 * 28 * (3 * 18944 + 9 * 3584)
    small = _kinds("pilot", "model.weights=4bit", machine="4090")["plan"].memory_bytes
    assert small["least"] < 0.6 * memory["least"]
    assert _kinds("pilot", machine="cpu")["plan"].memory_bytes["least"] == memory["least"] + 2 * MODEL_PARAMS


def test_a_plan_says_what_does_not_fit_the_machine_and_what_would() -> None:
    larger = ("model.id=Qwen/Qwen2.5-14B-Instruct", f"model.revision={'0' * 40}")
    assert _line(_kinds("pilot", *larger, machine="4090")["plan"], "does not fit: ") == (
        "does not fit: qwen2.5-14b needs at least 32.0 GiB, one RTX 4090 has 24 GiB; set model.weights = '4bit' "
        "(recipes/small_gpu.toml); or take a smaller model (qwen2.5-7b)"
    )
    halved = "micro-batches of about 1530 tokens fit, so those of 8192 will be halved"
    assert halved in _shown(_kinds("pilot", machine="4090")["plan"])
    whole = _kinds("pilot")["plan"]
    assert whole.fit == ()
    assert not [line for line in _shown(whole) if "fit" in line]


def test_what_a_judge_elsewhere_takes_is_beside_the_gpu_and_not_counted() -> None:
    few = ('grid.sources=["villain"]', "grid.epochs=[0, 2]", 'grid.behaviors=["none", "refusal"]')
    paid = _kinds("matrix", *few)["plan"]
    assert _line(paid, "judge ").split()[:4] == ["judge", "12", "0", "beside"]
    assert _line(paid, "beside: the judge answers while the GPU computes; how long it takes is not counted")
    resident = _kinds("matrix", *few, "judge.mode=local", "judge.model=", machine="cpu")["plan"]
    assert "beside" not in "".join(_shown(resident))
    assert "beside" not in "".join(_shown(_kinds("pilot")["plan"]))


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (RunSettings(max_gpu_hours=0.001), r"about .* hours on one H200, run\.max_gpu_hours is 0\.001"),
        (RunSettings(max_gpu_hours=None, max_usd=0.01), r"about \$.* for judging, run\.max_usd is 0\.01"),
    ],
)
def test_beyond_its_limits_a_run_needs_to_be_approved(limits: RunSettings, says: str) -> None:
    found = _kinds("matrix")["plan"]
    with pytest.raises(GateStop, match=says) as refused:
        require_approved(found, limits, approved=False)
    assert "--approve" in str(refused.value)
    assert "beyond" not in require_approved(found, limits, approved=True)
    assert require_approved(found, RunSettings(max_gpu_hours=None, max_usd=None), approved=False) == ""


def test_the_command_line_refuses_with_3_runs_with_approve_and_the_report_says_so(
    tiny_qwen: Path, tmp_path: Path
) -> None:
    recipe = write_tiny_recipe(tmp_path / "recipe.toml", tiny_qwen)
    words = ["run", str(recipe), "--set", "run.max_gpu_hours=1e-9", "--set", "grid.epochs=[0, 1]", "-q"]
    places = ["-w", str(tmp_path / "ws"), "--reports", str(tmp_path / "reports")]
    refused = CliRunner().invoke(app, [*words, *places])
    assert refused.exit_code == 3
    assert refused.output.count("\n") == 1
    assert "COST tiny" in refused.output
    assert not (tmp_path / "ws" / "ledger.sqlite").exists()
    approved = CliRunner().invoke(app, [*words, *places, "--approve"])
    assert approved.exit_code == 0, approved.output
    (row,) = Store.open(tmp_path / "ws").runs()
    facts = json.loads(row["facts"])
    assert "run.max_gpu_hours is 1e-09" in facts["approved"]["beyond"]
    assert len(facts["plan"]["stages"]) > 10
    again = CliRunner().invoke(app, [*words, *places])
    assert again.exit_code == 0, again.output  # all of it is done, so nothing is left to approve
    kept = json.loads(Store.open(tmp_path / "ws").runs()[0]["facts"])
    assert kept["plan"] == facts["plan"]  # the one that the run began with


def test_the_report_sets_the_plan_beside_what_it_took(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen, grid__epochs=[0, 1])
    graph = Sketch(recipe)
    run_tiny(recipe, tmp_path)
    store = Store.open(tmp_path)
    assert not [section for section in collect(graph, store).sections if section.id == "planned"]
    taken = dict.fromkeys(("eval", "behavior"), 0.0)
    stages = {}
    for stage in graph.stages():
        record = store.record(stage.key)
        if record is not None and stage.kind in taken:
            with store.transaction() as db:  # so that a kind is long enough to be compared, and off by a known factor
                db.execute("UPDATE stages SET seconds=? WHERE key=?", (2.0, stage.key))
            stages[stage.key[:12]] = 1.6 if stage.kind == "eval" else 0.5
    kept = {"machine": "this one", "origin": "as told", "hours": 0.1, "expected_usd": 0.0, "at": 0.0, "stages": stages}
    store.add_run_facts(run_id(recipe), {"plan": kept})
    (section,) = [one for one in collect(graph, store).sections if one.id == "planned"]
    rows = {row[0].text: row[4].text for row in section.blocks[0].rows}  # pyright: ignore
    assert rows == {"eval": "1.25", "behavior": "4.00 (off by more than 2)"}


def test_judging_elsewhere_is_beside_the_gpu_in_the_report_too() -> None:
    taken = Record("0" * 64, "judge", "judge/x", 1, {}, {}, {}, 90.0, 0.0)
    beside = [cell.text for cell in planned_row("judge", [(0.0, taken)])]
    assert beside == ["judge", "1", "beside", "90.0", "beside the GPU, not planned"]
    assert [cell.text for cell in planned_row("judge", [(60.0, taken)])][2:] == ["60.0", "90.0", "1.50"]
    assert [cell.text for cell in planned_row("score", [(0.0, taken)])][2:] == ["0.0", "90.0", "not planned"]


def test_without_a_gpu_the_gate_counts_this_cpus_hours_and_stops_the_pilot() -> None:
    """It once planned for an H200 (minutes), passed, and started weeks of CPU work."""
    recipe = load("pilot", ["eval.multiple_choice=builtin", "behavior.source_rows=20"])
    shape = named_shape("qwen2.5-7b")
    found = find_machine(recipe, shape, "cpu", None)
    assert (found.device, found.train_flops_s) == ("cpu", cpu_machine().train_flops_s)
    plan = make_plan(Graph(recipe), None, found)
    assert plan.hours > 100
    with pytest.raises(GateStop, match=r"hours on .* CPU cores .*no GPU is visible.*run\.max_gpu_hours is 24"):
        require_approved(plan, recipe.run, approved=False)
    assert _line(plan, f"pilot: {plan.n_cells} cells on ").count("no GPU is visible") == 2  # its name, and --machine
    assert find_machine(recipe, shape, "cpu", None, "h200") == KNOWN_GPUS["h200"]
    small = find_machine(load("demo", []), named_shape("smollm2-135m"), "cpu", None)
    assert "no GPU" not in small.name


def test_a_measured_cpu_stays_measured_for_a_large_model(tmp_path: Path) -> None:
    recipe, shape, store = load("pilot", []), named_shape("qwen2.5-7b"), Store.open(tmp_path)
    stage = probe_stage(recipe, shape, "cpu", 1.0)
    rates = dict.fromkeys(("train_flops_s", "read_flops_s", "draw_flops_s", "memory_bytes_s"), 7e9)
    with store.lease(stage):
        store.commit(stage, outputs={**rates, "step_s": 0.0, "pass_s": 0.1, "load_s": 1.0}, facts={}, seconds=20.0)
    found = find_machine(recipe, shape, "cpu", store)
    assert found.train_flops_s == 7e9
    assert "measured here" in found.origin


def test_a_cpu_without_enough_memory_is_told_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastconv.planning.hardware.ram_bytes", lambda: 23.0 * 2**30)
    told = _line(_kinds("pilot", machine="cpu")["plan"], "does not fit: ")
    assert "qwen2.5-7b needs at least 31.6 GiB" in told
    assert "has 23 GiB; take a smaller model (qwen2.5-3b)" in told
    monkeypatch.setattr("fastconv.planning.hardware.ram_bytes", lambda: 40.0 * 2**30)
    assert _kinds("pilot", machine="cpu")["plan"].fit == ()


def test_a_plan_warns_of_gates_that_nothing_could_pass() -> None:
    notes = _kinds("pilot", "grid.epochs=[0]", "model.weights=4bit")["plan"].notes
    assert any(note.startswith("D121 PILOT: ") and "epoch 0 alone" in note for note in notes)
    assert any(note.startswith("D122 gates.g3_reference_pct: ") for note in notes)
    filtered = [name for name in ("subliminal", "pilot") if "its filter" in " ".join(_kinds(name)["plan"].notes)]
    assert filtered == ["subliminal"]
    assert not [note for note in _kinds("pilot")["plan"].notes if note.startswith("D1")]


def test_a_probe_is_kept_in_the_workspace_and_found_again(tmp_path: Path) -> None:
    recipe, shape = load("demo", []), named_shape("smollm2-135m")
    store = Store.open(tmp_path)
    assert find_machine(recipe, shape, "cpu", store).train_flops_s == cpu_machine().train_flops_s
    for at, rate in ((1.0, 1e9), (2.0, 2e9)):
        rates = {"train_flops_s": rate, "read_flops_s": 3e9, "draw_flops_s": 4e9, "pass_s": 0.1, "memory_bytes_s": 5e9}
        stage = probe_stage(recipe, shape, "cpu", at)
        with store.lease(stage):
            store.commit(stage, outputs={**rates, "step_s": 0.0, "load_s": 1.0}, facts={}, seconds=20.0)
    found = find_machine(recipe, shape, "cpu", store)
    assert (found.train_flops_s, found.pass_s) == (2e9, 0.1)
    assert "measured here" in found.origin


def test_a_probe_of_a_base_in_4_bits_counts_them_once(tiny_qwen: Path, tmp_path: Path) -> None:
    """Where it loaded the recipe's own. A hub's model is measured with random weights in 16 bits; so is another recipe's."""
    shape, store = named_shape("qwen2.5-7b"), Store.open(tmp_path)
    hub, own = load("small_gpu", []), load("small_gpu", [f"model.id={tiny_qwen}", "model.revision="])
    full = load("pilot", [])
    found, factors, rates = [], [], {"train_flops_s": 1e14, "read_flops_s": 1e14, "draw_flops_s": 1e14}
    for at, recipe in enumerate((hub, own)):
        stage = probe_stage(recipe, shape, "cuda", float(at))
        with store.lease(stage):
            store.commit(stage, outputs={**rates, "load_s": 1.0 + at}, facts={}, seconds=20.0)
        found = [find_machine(one, shape, "cuda", store) for one in (own, full)]
        factors.append([(one.four_bit_factor, one.load_s) for one in found])
    known = KNOWN_GPUS["a100"].four_bit_factor
    assert factors == [[(known, 1.0), (known, 1.0)], [(1.0, 2.0), (known, 1.0)]]
    trained = Demand(trained_tok=1e6, length_tok=300.0, share=0.8)
    assert found[0].seconds(trained, shape, own) == found[1].seconds(trained, shape, full)


def test_the_probe_measures_every_rate(tiny_qwen: Path, tmp_path: Path) -> None:
    words = ["plan", str(write_tiny_recipe(tmp_path / "recipe.toml", tiny_qwen)), "--measure", "--json"]
    answer = CliRunner().invoke(app, [*words, "-w", str(tmp_path / "ws")])
    assert answer.exit_code == 0, answer.output
    machine = json.loads(answer.output)["machine"]
    assert "measured here" in machine["origin"]
    assert all(machine[name] > 1e6 for name in ("train_flops_s", "read_flops_s", "draw_flops_s", "memory_bytes_s"))
    assert machine["pass_s"] > 0


def test_what_cannot_be_planned_or_measured_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no machine is called 'tpu'"):
        plan_recipe(load("demo", []), None, "tpu")
    unknown = ["model.id=someone/else", f"model.revision={'0' * 40}"]
    with pytest.raises(ModelError, match="its size is not known"):
        plan_recipe(load("demo", unknown), None)
    answer = CliRunner().invoke(app, ["plan", "pilot", "--measure", "--set", "model.device=cpu", "-w", str(tmp_path)])
    assert answer.exit_code == 2
    assert "there is no GPU here to measure with qwen2.5-7b" in answer.output


def test_a_cells_dry_run_lists_exactly_the_stages_of_the_pilot() -> None:
    recipe = str(ROOT / "recipes" / "pilot.toml")
    offline = ["--set", "eval.multiple_choice=builtin", "--set", "behavior.source_rows=20"]
    answer = CliRunner().invoke(
        app, ["cell", "villain", "capability", "--epoch", "20", "--recipe", recipe, "--dry-run", "--json", *offline]
    )
    assert answer.exit_code == 0, answer.output
    listed = {one["slot"]: one["key"] for one in json.loads(answer.output)}
    graph = Graph(load(recipe, offline[1::2]))
    plans = graph.select("villain", "capability", 20)
    assert len(plans) == 2  # both kinds of negatives
    assert listed == {stage.slot: stage.key for stage in graph.stages(plans)}
    assert {stage.key for stage in graph.stages()} >= set(listed.values())
    kinds = sorted(slot.split("/")[0] for slot in listed)
    assert kinds == sorted(["answers", "snapshot", *["rows", "behavior"] * 2, *["eval"] * 9, "geometry"])
    assert not [slot for slot in listed if "/e4/" in slot or "/e10/" in slot]


def test_other_work_on_the_cores_is_said_where_a_cpu_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastconv.planning.hardware.cpu_cores", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (7.9, 0.0, 0.0))
    (note,) = [note for note in _kinds("demo", machine="cpu")["plan"].notes if "busy" in note]
    assert "8 processes wanted its 2 cores, so expect about 5 times the seconds" in note
    monkeypatch.setattr("os.getloadavg", lambda: (1.9, 8.0, 8.0))
    assert not any("busy" in note for note in _kinds("demo", machine="cpu")["plan"].notes)


def test_waiting_threads_leave_the_cores_to_others() -> None:
    """Read by torch's thread pool when it is loaded, so before anything imports it; a user's own value stays."""
    script = "import os, sys, fastconv; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"

    def policy(**given: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        command = [sys.executable, "-c", script]
        return subprocess.run(command, capture_output=True, text=True, check=True, env={**environment, **given}).stdout

    assert policy() == "PASSIVE False\n"
    assert policy(OMP_WAIT_POLICY="ACTIVE") == "ACTIVE False\n"
