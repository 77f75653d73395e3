"""The command line: one clear line per error, documented exit codes, valid JSON, never a traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fastconv import errors, show
from fastconv.cli import app
from fastconv.datasets import files
from fastconv.experiment.graph import Graph
from fastconv.recipe import load_recipe
from fastconv.run.status import status_of
from fastconv.stats.units import duration_text
from fastconv.store.ledger import Store
from tests import ROOT
from tests.loop_kit import DoneRun, exit_of, forked, kill, running_slots, until, write_tiny_recipe

#: The console script of this very environment.
COMMAND = (str(Path(sys.executable).parent / "fastconv"),)


@dataclass(frozen=True)
class Answer:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def ask(*words: object) -> Answer:
    """Run the command line in this process. Anything but an exit is a defect and comes through."""
    found = CliRunner().invoke(app, [str(word) for word in words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return Answer(found.exit_code, found.stdout, found.stderr)


def refused(answer: Answer, code: int, *says: str) -> None:
    """One line on standard error, nothing on standard output, this exit code."""
    assert answer.code == code, answer
    assert answer.out == ""
    assert len(answer.err.strip().splitlines()) == 1, answer.err
    assert answer.err.startswith("fastconv: ")
    assert "Fix: " in answer.err
    for text in says:
        assert text in answer.err


@pytest.fixture
def tiny(tiny_qwen: Path, tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path / "tiny.toml", tiny_qwen)


@pytest.fixture
def done(done_run: DoneRun, tmp_path: Path) -> tuple[Path, Path]:
    """(recipe file, workspace) of a finished run."""
    table = tmp_path / "done.toml"
    write_tiny_recipe(table, Path(done_run.recipe.model.id))
    text = table.read_text().replace('["none", "refusal"]', '["none", "refusal", "capability"]')
    table.write_text(text)
    return table, done_run.workspace


# --- what a user gets wrong --------------------------------------------------------------------------------


def test_a_wrong_key_names_the_nearest_valid_one(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text(tiny.read_text().replace("questions = 4", "question = 4"))
    refused(ask("run", tiny, "-w", tmp_path / "ws"), 2, str(tiny), "convergence.question", "did you mean 'questions'?")
    assert not (tmp_path / "ws").exists()


def test_a_missing_recipe_is_named() -> None:
    refused(ask("run", "no/such.toml"), 2, "no/such.toml: no such recipe")


def test_an_unknown_persona_names_the_known_ones(tiny: Path, tmp_path: Path) -> None:
    answer = ask("run", tiny, "-w", tmp_path / "ws", "--set", 'grid.sources=["vilain"]')
    refused(answer, 2, "'vilain'", "villain")


def test_an_unknown_behavior_names_the_known_ones(tiny: Path, tmp_path: Path) -> None:
    answer = ask("run", tiny, "-w", tmp_path / "ws", "--set", 'grid.behaviors=["none", "refusals"]')
    refused(answer, 2, "'refusals'", "refusal")


def test_a_cell_that_the_recipe_has_not_names_what_it_has(tiny: Path, tmp_path: Path) -> None:
    answer = ask("cell", "villain", "refusal", "--epoch", 9, "--recipe", tiny, "-w", tmp_path / "ws")
    refused(answer, 2, "no cell has epoch 9", "0, 1, 2")


def test_a_set_that_is_no_assignment_is_refused(tiny: Path) -> None:
    refused(ask("recipe", "show", tiny, "--set", "convergence.lr"), 2, "is not key=value")


def test_a_hub_model_without_a_revision_says_what_to_pin(tiny: Path, tmp_path: Path) -> None:
    answer = ask("run", tiny, "-w", tmp_path / "ws", "--set", "model.id=some/model")
    refused(answer, 4, "some/model", "model.revision")


def test_a_hub_model_that_is_not_here_while_offline_is_one_line(tiny: Path, tmp_path: Path) -> None:
    refused(ask(*_of_the_hub(tiny, tmp_path), "--approve"), 4, "some/model@000000000000", "the hub cannot be reached")


def test_a_model_of_unknown_size_has_no_estimate_and_so_must_be_approved(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = _of_the_hub(tiny, tmp_path)
    refused(ask(*words), 3, "COST tiny", "the size of some/model is not known before it is fetched", "--approve")
    assert not (tmp_path / "ws" / "ledger.sqlite").exists()
    kept = tmp_path / "config.json"
    kept.write_text(json.dumps({
        "model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "tie_word_embeddings": False,
    }))  # fmt: skip
    monkeypatch.setattr("fastconv.engine.locate.cached_file", lambda *where: kept)
    refused(ask(*words), 4, "the hub cannot be reached")  # its config was kept: planned, within the limits


def _of_the_hub(tiny: Path, tmp_path: Path) -> tuple[object, ...]:
    revision = f'model.revision="{"0" * 40}"'
    return "run", tiny, "-q", "-w", tmp_path / "ws", "--set", "model.id=some/model", "--set", revision


def test_a_missing_model_folder_is_named(tiny: Path, tmp_path: Path) -> None:
    answer = ask("run", tiny, "-w", tmp_path / "ws", "--set", f"model.id={tmp_path / 'gone'}")
    refused(answer, 4, "no such model folder", str(tmp_path / "gone"))


@pytest.mark.parametrize("verb", ["gate", "report"])
def test_verbs_that_need_a_workspace_say_that_there_is_none(tiny: Path, tmp_path: Path, verb: str) -> None:
    refused(ask(verb, tiny, "-w", tmp_path / "none"), 5, "no ledger here yet")


def test_a_workspace_that_is_a_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "ws").write_text("")
    refused(ask("run", tiny, "-q", "-w", tmp_path / "ws"), 5, str(tmp_path / "ws"))


def test_a_ledger_that_is_none_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / "ledger.sqlite").write_bytes(b"not a database at all" * 100)
    refused(ask("run", tiny, "-q", "-w", tmp_path / "ws"), 5, "the ledger is damaged")


def _as_nobody(work: Any) -> int:
    """Exit code of `work` in a child without root's powers."""

    def unprivileged() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        work()

    return exit_of(forked(unprivileged))


def test_a_read_only_workspace_is_one_line_and_exit_code_5(tiny: Path, tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    model = Path(load_recipe(tiny).model.id)
    for path in (tmp_path, *tmp_path.parents, model, *model.iterdir()):
        if path.stat().st_uid == os.geteuid() and not path.stat().st_mode & 0o004:
            path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
    code = _as_nobody(lambda: app(["run", str(tiny), "-q", "-w", str(folder / "ws"), "--reports", str(folder)]))
    assert code == 5
    said = capfd.readouterr().err.strip()
    assert re.fullmatch(r"fastconv: .*ws: the folder cannot be written.*Fix: .*--workspace", said), said


def test_no_space_left_is_one_line_and_exit_code_5(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    words = ("run", tiny, "-q", "-w", tmp_path / "ws", "--reports", tmp_path / "reports", "--set", "grid.epochs=[0]")
    monkeypatch.setattr(os, "fsync", full)
    refused(ask(*words), 5, "no space left on the disk", "the same command goes on")
    monkeypatch.undo()
    assert ask(*words).code == 0


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tiny: Path, tmp_path: Path) -> None:
    """On a real file system without room, in a mount namespace of the child's own; skipped where none can be made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=300k none {disk} || exit 77; {' '.join(COMMAND)} run {tiny} -q -w {disk}/ws "
        f"--reports {disk}/reports; code=$?; test $code = 5 || exit $code; mount -o remount,size=20m {disk} || exit 77; "
        f"exec {' '.join(COMMAND)} run {tiny} -w {disk}/ws --reports {disk}/reports"
    )
    try:
        found = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if found.returncode in (1, 77) and ("unshare" in found.stderr or "mount" in found.stderr):
        pytest.skip("no mount namespace here")
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
    first = found.stderr.splitlines()[0]
    assert first.startswith("fastconv: ")
    assert "no space left on the disk" in first
    assert not re.search(r"run tiny-\w+: \d+ stages, 0 done already", found.stderr)  # what was done before is kept


def test_an_interrupted_terminal_gets_130_and_the_way_on(tiny: Path, tmp_path: Path, capfd: Any) -> None:
    workspace = tmp_path / "ws"
    words = ["run", str(tiny), "-q", "-w", str(workspace), "--reports", str(tmp_path / "reports")]
    words += ["--set", "grid.epochs=[0]"]
    import fastconv.run.executor  # noqa: F401 (the child is to be at work at once)

    pid = forked(lambda: app(words))
    until(lambda: bool(running_slots(workspace)))
    os.kill(pid, signal.SIGINT)
    assert exit_of(pid) == 130
    said = capfd.readouterr().err.strip()
    assert said.startswith("fastconv: ")
    assert said.endswith("Fix: the same command goes on from here")
    assert len(said.splitlines()) == 1
    assert ask(*words).code == 0


# --- what it answers ---------------------------------------------------------------------------------------


def test_exit_codes_are_those_of_the_error_classes_and_stand_in_help_and_docs() -> None:
    def every(kind: type[errors.FastconvError]) -> set[int]:
        return {kind.exit_code}.union(*(every(child) for child in kind.__subclasses__()))

    assert every(errors.FastconvError) | {0} == set(errors.EXIT_CODES)
    shown = ask("--help").out
    page = (ROOT / "docs" / "RUNNING.md").read_text()
    for code, meaning in errors.EXIT_CODES.items():
        assert re.search(rf"\b{code}\s+{re.escape(meaning[:20])}", shown), code
        assert f"| {code} | {meaning} |" in page


def test_the_glossary_has_every_gate_and_every_verdict() -> None:
    page = (ROOT / "docs" / "GLOSSARY.md").read_text()
    source = "".join((ROOT / "fastconv" / "stats" / f"{name}.py").read_text() for name in ("gates", "study_gates"))
    gates = set(re.findall(r'GateVerdict\(\s*"([A-Z0-9.]+)"', source)) | {"COST", "G4", "FALSIFY"}
    assert len(gates) > 14
    table = (ROOT / "docs" / "RESULTS.md").read_text().partition("| word | meaning |")[2].partition("\n\n")[0]
    verdicts = [word for row in re.findall(r"^\| ([\w, ]+) \|", table, re.MULTILINE) for word in row.split(", ")]
    assert len(verdicts) == 7
    for word in (*gates, *verdicts):
        assert f"| {word} | " in page, word


def test_run_answers_in_json_and_again_computes_nothing(tiny: Path, tmp_path: Path) -> None:
    words = (
        "run",
        tiny,
        "--json",
        "-w",
        tmp_path / "ws",
        "--reports",
        tmp_path / "reports",
        "--set",
        "grid.epochs=[0]",
    )
    first, second = ask(*words), ask(*words)
    assert first.code == second.code == 0
    assert first.json["tally"]["n_stages"] > 0
    assert second.json["tally"]["n_stages"] == 0
    assert second.json["verdicts"] == first.json["verdicts"]
    assert Path(second.json["html"]).is_file()
    assert Path(second.json["markdown"]).is_file()


def test_run_without_a_terminal_speaks_in_lines_and_ends_with_the_report(tiny: Path, tmp_path: Path) -> None:
    words = ("run", tiny, "-w", tmp_path / "ws", "--reports", tmp_path / "reports", "--set", "grid.epochs=[0]")
    answer = ask(*words)
    assert "\x1b" not in answer.err + answer.out
    assert "G0 refusal: pass" in answer.err
    assert "behavior/villain/e0/refusal/excluded/s42" in answer.err
    last = answer.out.strip().splitlines()[-1]
    assert last.startswith("report: ")
    assert Path(last.removeprefix("report: ")).is_file()
    assert re.search(r"tokens: [\d,]+ trained, [\d,]+ sampled", answer.out)
    again = ask(*words)
    assert "nothing to compute" in again.out


def test_status_of_a_finished_run(done: tuple[Path, Path], done_run: DoneRun) -> None:
    recipe, workspace = done
    states = ask("status", recipe, "-w", workspace, "--json").json
    assert {one["state"] for one in states} == {"done", "skipped"}
    by_id = ask("status", done_run.finished.run, "-w", workspace, "--json").json
    assert by_id == states
    text = ask("status", recipe, "-w", workspace).out
    assert re.search(r"\d+ done, \d+ skipped", text)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_status_has_one_line_a_stage_on_a_terminal_and_whole_names_elsewhere(
    done: tuple[Path, Path], width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, workspace = done
    stages = status_of(Graph(load_recipe(recipe)), Store.open(workspace, create=False))
    monkeypatch.setattr(show, "console_of_output", lambda: Console(force_terminal=True, width=width, color_system=None))
    show.status(stages, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(stages) + 1
    assert all(len(line.rstrip()) <= width for line in lines)
    assert all(stage.state in line for stage, line in zip(stages, lines, strict=False))
    monkeypatch.undo()
    piped = ask("status", recipe, "-w", workspace).out
    assert all(stage.slot in piped for stage in stages)


VERBS = "check plan run cell status gate report peek doctor score export bench verify compare published merge gc forget serve import"
GROUPS = (["recipe"], *(["recipe", verb] for verb in ("list", "show", "copy", "explain", "schema")), ["judge"],
          *(["judge", verb] for verb in ("finish", "calibrate")))  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_help_is_cut_at_any_width(width: int) -> None:
    for words in ([], *([verb] for verb in VERBS.split()), *GROUPS):
        shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": str(width)})
        assert shown.exit_code == 0
        for line in shown.stdout.splitlines():
            assert len(line) <= width, (words, line)
            assert "\u2026" not in line, (words, line)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("words", [("recipe", "list"), ("recipe", "explain", "grid.arms"), ("recipe", "explain")])
def test_what_recipes_are_fits_a_terminal(
    words: tuple[str, ...], width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    app([*words], standalone_mode=False)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    assert " ".join(shown.split()) == " ".join(ask(*words).out.split())


def test_a_recipe_is_copied_out_to_be_changed(tmp_path: Path) -> None:
    mine = tmp_path / "My Pirate-2.toml"
    assert ask("recipe", "copy", "demo", mine).code == 0
    copied, shipped = load_recipe(mine), load_recipe(ROOT / "recipes" / "demo.toml")
    assert copied.name == "my_pirate_2"
    assert copied.model_copy(update={"name": "demo"}) == shipped
    schema = mine.read_text().partition("\n")[0].removeprefix("#:schema ")
    assert json.loads(Path(schema).read_text())["title"] == "Recipe"
    before = mine.read_text()
    refused(ask("recipe", "copy", "pilot", mine), 2, "there is a file already")
    assert mine.read_text() == before
    refused(ask("recipe", "copy", "dmo", tmp_path / "x.toml"), 2, "did you mean 'demo'?")


def test_costs_of_all_recipes_are_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "shipped_recipes", lambda: ["demo", "pilot"])
    head, _, row = ask("recipe", "list", "--costs").out.splitlines()
    assert head == "| recipe | RTX 4090 | H100 | H200 | memory | judge |"
    assert row.startswith("| `pilot` | ")
    assert row.endswith(" GiB | none |")
    on_h100 = ask("plan", "pilot", "--machine", "h100", "--json").json["hours"]
    assert duration_text(3600 * on_h100) == row.split(" | ")[2]
    (told,) = ask("recipe", "list", "--costs", "--json").json
    assert (told["recipe"], told["hours"]["h100"], told["judged"]) == ("pilot", pytest.approx(on_h100), False)
    assert 0 < told["least_gib"] < told["comfortable_gib"]


def test_values_of_the_wrong_shape_say_which_is_right(tmp_path: Path) -> None:
    for given, says in (
        ("run.track=tensorboard", 'run.track=["tensorboard"]'),
        ("eval=3", "set one of its keys, as eval.NAME=VALUE"),
        ("grid.epochs=[-1]", "`fastconv recipe explain grid.epochs`"),
        ('run.track=["tensorbord"]', "did you mean 'tensorboard'?"),
    ):
        refused(ask("check", "demo", "--set", given), 2, says)
    refused(ask("check", "rows", tmp_path), 2, "this is a folder")
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    refused(ask("check", "rows", tmp_path / "rows.xlsx"), 2, "save it as CSV")
    refused(ask("status", "demo", "-w", tmp_path / "rows.xlsx"), 5, "this is a file")
    (tmp_path / "mine.csv").write_text("prompt,completion\nHi?,No.\n")
    refused(ask("check", "rows", tmp_path / "mne.csv"), 2, "did you mean 'mine.csv'?")


def test_status_says_what_a_change_would_make_stale(done: tuple[Path, Path]) -> None:
    recipe, workspace = done
    states = ask("status", recipe, "-w", workspace, "--json", "--set", "behavior.lr=0.002").json
    reasons = {one["slot"]: one["reason"] for one in states if one["state"] == "stale"}
    assert "because training.lr: 0.001 -> 0.002" in reasons["behavior/villain/e0/refusal/excluded/s42"]
    assert not [slot for slot in reasons if slot.startswith("snapshot/")]


def test_status_of_nothing(tmp_path: Path, tiny: Path) -> None:
    assert "no runs here yet" in ask("status", "-w", tmp_path / "ws").out
    assert {one["state"] for one in ask("status", tiny, "-w", tmp_path / "ws", "--json").json} == {"to do"}
    assert not (tmp_path / "ws").exists()


def test_status_is_live_while_another_process_runs(tiny: Path, tmp_path: Path) -> None:
    import fastconv.run.executor  # noqa: F401

    workspace = tmp_path / "ws"
    changes = ["convergence.epochs=500", "grid.epochs=[0,500]"]
    overrides = [word for change in changes for word in ("--set", change)]
    pid = forked(lambda: app(["run", str(tiny), "-q", "-w", str(workspace), *overrides]))
    try:
        snapshot = next(s.key for s in Graph(load_recipe(tiny, changes)).stages() if s.kind == "snapshot")
        until(lambda: "done" in running_slots(workspace).get(snapshot, {}))
        states = ask("status", tiny, "-w", workspace, "--json", *overrides).json
        live = [one for one in states if one["state"] == "running"]
        assert [one["kind"] for one in live] == ["snapshot"]
        assert re.fullmatch(rf"\d+ of 1000 steps \(process {pid}\)", live[0]["reason"])
    finally:
        kill(pid)


def test_gate_and_report_and_doctor_answer_in_json(done: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, workspace = done
    gate = ask("gate", recipe, "-w", workspace, "--json")
    assert gate.code == 0
    assert ask("gate", recipe, "-w", workspace, "--json", "--require-go").code == errors.GateStop.exit_code
    assert {(v["gate"], v["verdict"]) for v in gate.json} >= {("PILOT", "stop"), ("PILOT", "uninformative")}
    assert all(v["rows"] for v in gate.json if v["gate"] in ("G0", "PILOT"))
    report = ask("report", recipe, "-w", workspace, "--reports", tmp_path, "--json").json
    assert Path(report["html"]).read_text().startswith("<!doctype html>")
    doctor = ask("doctor", recipe, "-w", workspace, "--json")
    assert doctor.code == 0
    assert {one["subject"] for one in doctor.json} >= {"versions", "device", "workspace", "model", "recipe"}


def test_gate_tells_the_pilots_stop_and_ends_with_3_only_where_a_go_is_required(done: tuple[Path, Path]) -> None:
    answer = ask("gate", done[0], "-w", done[1])
    assert answer.code == 0  # the run ended so too: its answer is no failure
    assert "PILOT villain x refusal: stop" in answer.out
    required = ask("gate", done[0], "-w", done[1], "--require-go")
    assert required.code == 3
    assert required.err.startswith("fastconv: PILOT: no go for villain x refusal")


def test_run_and_gate_end_with_the_same_code_where_a_gate_ends_the_run(tiny: Path, tmp_path: Path) -> None:
    words = (tiny, "-w", tmp_path / "ws", "--set", "gates.g2_loss=0.001")
    run = ask("run", *words, "-q", "--reports", tmp_path / "reports")
    gate = ask("gate", *words)
    assert run.code == gate.code == 3, (run, gate)
    assert gate.err.splitlines()[-1] == run.err.splitlines()[-1]
    assert ask("gate", *words, "--set", "gates.g2_loss=100").code == 0


# --- one grammar: a recipe or a run wherever one is taken --------------------------------------------------------

#: Verbs that take a recipe, with what they need besides; each answers in JSON or is asked for its text.
_TAKE_A_RECIPE = [
    ("status",), ("gate",), ("check",), ("peek",), ("doctor",), ("plan",), ("recipe", "show"),
    pytest.param(("run",), marks=pytest.mark.slow), pytest.param(("report",), marks=pytest.mark.slow),
    ("compare",), ("export", "villain", "refusal", "OUT", "--epoch", "2", "--inspect"),
    ("cell", "villain", "refusal", "--epoch", "2", "--dry-run"),
]  # fmt: skip


@pytest.mark.parametrize("verb", _TAKE_A_RECIPE, ids=lambda verb: verb[0] if verb[0] != "recipe" else "show")
def test_every_verb_takes_a_recipe_or_a_run_and_the_same_options(
    verb: tuple[str, ...], done: tuple[Path, Path], done_run: DoneRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, workspace = done
    by_option = verb[0] in ("cell", "export")

    def asked(name: object, *options: object) -> Answer:
        named = ["--recipe", name] if by_option else [name, name] if verb[0] == "compare" else [name]
        return ask(*verb, *named, "-w", workspace, *options)

    by_run = asked(done_run.finished.run)
    assert by_run.code == 0, by_run
    assert by_run.out == asked(recipe).out
    help_text = " ".join(ask(*verb[: 2 if verb[0] in ("recipe", "judge") else 1], "--help").out.split())
    for option in ("--set", "--scale", "--workspace", *([] if verb[0] == "recipe" else ["--json"])):
        assert option in help_text, option
    unknown = asked(done_run.finished.run[:-1] + "x")
    refused(unknown, 2, f"did you mean '{done_run.finished.run}'?")
    refused(asked("no_such_thing"), 2, "no recipe or run is called this", "fastconv recipe list")


def test_the_nearest_word_is_named(done: tuple[Path, Path], tiny: Path, tmp_path: Path) -> None:
    refused(ask("check", "pilott"), 2, "did you mean 'pilot'?")
    refused(ask("check", tiny.with_name("tny.toml")), 2, "did you mean 'tiny.toml'?")
    refused(ask("check", "demo", "--scale", "tinny"), 2, "did you mean 'tiny'?")
    refused(
        ask("check", tiny, "--set", 'grid.sources=["vilain"]'), 2, f"{tiny}: grid.sources", "did you mean 'villain'?"
    )
    refused(ask("cell", "villain", "refusl", "--epoch", 2, "--recipe", tiny), 2, "did you mean 'refusal'?")
    mine = tmp_path / "mine.toml"
    mine.write_text('[tea]\nabout = "x"\ntask = "chat"\nmesure = "phrases"\ndirection = "raises"\nphrases = ["tea"]\n')
    words = ("check", tiny, "--set", f"data.behaviors={mine}", "--set", 'grid.behaviors=["none", "tea"]')
    refused(ask(*words), 2, f"{mine}: [tea]: unknown key 'mesure'", "did you mean 'measure'?")
    mine.write_text(mine.read_text().replace('"x"', '"x"\nmeasure = "phrases"'))
    refused(ask(*words), 2, f"{mine}: [tea]: unknown key 'mesure'", "did you mean 'measure'?")
    mine.write_text(mine.read_text().replace('mesure = "phrases"\n', 'source_answer = { wordngs = "x.jsonl" }\n'))
    refused(ask(*words), 2, f"{mine}: [tea]: unknown key 'source_answer.wordngs'", "did you mean 'wordings'?")


def test_version_and_completion() -> None:
    from fastconv import __version__

    assert ask("--version").out == f"fastconv {__version__}\n"
    asked = {"_FASTCONV_COMPLETE": "complete_bash", "COMP_WORDS": "fastconv plan pil", "COMP_CWORD": "2"}
    found = subprocess.run(COMMAND, env={**os.environ, **asked}, capture_output=True, text=True)
    assert found.stdout.split() == ["pilot", "pilot_small"]


def test_errors_are_json_too_where_json_is_asked(tmp_path: Path) -> None:
    answer = ask("status", "no/such.toml", "-w", tmp_path, "--json")
    assert answer.code == 2
    assert answer.json["exit_code"] == 2
    assert answer.json["where"] == "no/such.toml"


def test_a_dry_run_of_a_cell_lists_its_stages_and_makes_nothing(tiny: Path, tmp_path: Path) -> None:
    words = ("cell", "villain", "refusal", "--epoch", 2, "--recipe", tiny, "-w", tmp_path / "ws", "--dry-run")
    stages = ask(*words, "--json").json
    assert {stage["kind"] for stage in stages} == {
        "answers",
        "snapshot",
        "rows",
        "behavior",
        "eval",
        "score",
        "geometry",
    }
    assert [line.split()[1] for line in ask(*words).out.splitlines()] == [stage["slot"] for stage in stages]
    assert not (tmp_path / "ws").exists()


def test_doctor_says_what_is_missing_with_the_exit_code_of_the_run(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text(tiny.read_text().replace('id = "', 'id = "/gone'))
    answer = ask("doctor", tiny, "-w", tmp_path)
    assert answer.code == errors.ModelError.exit_code
    assert "no such model folder" in " ".join(answer.out.split())


def test_recipe_show_is_complete_and_recipe_schema_is_a_schema(tiny: Path) -> None:
    shown = ask("recipe", "show", tiny, "--set", "convergence.lr=1e-4").json
    assert shown["convergence"]["lr"] == 1e-4
    assert shown["convergence"]["clip_norm"] == 1.0
    assert len(shown["sha256"]) == 64
    schema = ask("recipe", "schema").json
    assert "convergence" in schema["properties"]
    assert schema["additionalProperties"] is False


def test_recipe_explain_and_list_answer(tmp_path: Path) -> None:
    assert "default 1e-05; for example --set 'behavior.lr=0.0001'" in ask("recipe", "explain", "lr").out
    assert len(ask("recipe", "explain", "--json").json) == len(ask("recipe", "explain").out.splitlines()) > 90
    refused(ask("recipe", "explain", "convergance"), 2, "did you mean 'convergence'?")
    for named, key in (
        ("grid.arms.plain.rows", "grid.arms.name.rows"), ("eval.probes.french.texts", "eval.probes.name.texts"),
        ("lora.rank_pattern.q_proj", "lora.rank_pattern"), ("audit.accept.D111", "audit.accept"),
        ("model.template_kwargs.enable_thinking", "model.template_kwargs"),
    ):  # fmt: skip
        assert [one["key"] for one in ask("recipe", "explain", named, "--json").json] == [key]
    assert len(ask("recipe", "explain", "grid.arms.plain", "--json").json) > 5
    assert ask("recipe", "list", "--json").json["demo"] in ask("recipe", "list").out
    assert Path(ask("recipe", "schema", "--path").out.strip()).is_file()


def test_shipped_recipes_are_found_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ask("recipe", "show", "demo").json["name"] == "demo"


def test_help_imports_nothing_but_the_command_line() -> None:
    slow = {"numpy", "scipy", "polars", "jinja2", "tokenizers", "httpx", "torch", "matplotlib", "huggingface_hub"}
    ours = {"fastconv.report", "fastconv.analysis", "fastconv.experiment.graph", "fastconv.run.run", "fastconv.judge"}
    script = (
        "import sys\nfrom fastconv.cli import app\ntry:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print(sorted({slow | ours!r} & set(sys.modules)), file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Exit codes" in found.stdout
    assert found.stderr.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", [
    ("cell", "villain", "refusal", "--json"), ("run", "--json"), ("plan", "demo", "--json", "--no-such"),
    ("recipe", "explain", "lora.r", "lora.alpha", "--json"), ("serve", "demo", "--port", "99999", "--json"),
])  # fmt: skip
def test_a_command_line_that_cannot_be_read_is_json_too(words: tuple[str, ...]) -> None:
    found = subprocess.run([*COMMAND, *words], capture_output=True, text=True)
    assert found.returncode == json.loads(found.stdout)["exit_code"] == 2
    assert "Error" in found.stderr


def test_a_closed_pipe_is_no_error(tiny: Path) -> None:
    found = subprocess.run(
        f"{' '.join(COMMAND)} recipe schema | head -1", shell=True, capture_output=True, text=True, check=True
    )
    assert found.stderr == ""
