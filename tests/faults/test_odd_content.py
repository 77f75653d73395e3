"""Values of the right type that say what cannot be: counts without end, scores beyond their scale, sizes of no model."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sqlite3
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fastconv.engine.export import targets_of
from fastconv.engine.shapes import n_positions, shape_of
from fastconv.errors import AdapterError, DataError, ModelError, RecipeError, StoreError
from fastconv.judge.budget import load_prices
from fastconv.judge.calibrate import load_calibration
from fastconv.judge.rubric import judge_stage_scores, load_rubric, parse_rubric
from fastconv.recipe import load_recipe
from fastconv.store.gc import find_damage
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store
from fastconv.store.records import Judgement, RawReply, Reserve, Sample, Settle
from tests import ROOT
from tests.faults.test_disk_and_ledger import ask
from tests.faults.test_hostile_inputs import spoilt_ledger
from tests.loop_kit import DoneRun, write_tiny_recipe

#: (verb, table, column, cell): what each verb reads of a ledger, holding what is of its type and cannot be computed with.
CONTENTS = [
    ("gate", "stages", "outputs", "'{}'"),
    ("gate", "stages", "outputs", "'{\"n\": 1e999}'"),
    ("gate", "stages", "outputs", "json_set(outputs, '$.n', 'many')"),
    ("gate", "stages", "outputs", "json_set(outputs, '$.last_epoch_loss', 'low')"),
    ("report", "stages", "outputs", "json_set(outputs, '$.losses', 3)"),
    ("report", "stages", "outputs", "json_set(outputs, '$.rho', json('{\"least\": null}'))"),
    ("report", "stages", "facts", "json_set(facts, '$.sampled_tok', 'few', '$.scored_tok', 'few')"),
    ("report", "runs", "facts", "json_set(facts, '$.git', 3)"),
    ("report", "runs", "facts", "json_set(facts, '$.plan', json('{\"stages\": 1}'))"),
    ("gate", "runs", "facts", "json_set(facts, '$.ignored_gates', 3)"),
    ("gate", "scores", "detail", '\'{"mass": "much"}\''),
    ("gate", "scores", "value", "-1"),
    ("gate", "scores", "value", "-1e299"),
    ("report", "scores", "value", "1e200"),
    ("gc", "stages", "inputs", "'{}'"),
    ("gc", "artefacts", "sha256", "char(0)"),
]


#: What `doctor` alone reads: names that no verb looks for, and the recipe of another run.
UNREAD = {("artefacts", "suffix", "'/../../../../x'"), ("runs", "recipe", "'{\"grid\": 3}'")}


@pytest.mark.parametrize(("verb", "table", "column", "cell"), CONTENTS)
def test_content_that_cannot_be_is_a_damaged_ledger(
    done_run: DoneRun, tmp_path: Path, verb: str, table: str, column: str, cell: str
) -> None:
    spoilt = spoilt_ledger(done_run, tmp_path / "spoilt", table, column, cell, one=False)
    words = [verb, *([] if verb == "gc" else [done_run.finished.run]), "-w", spoilt]
    code, out, crash = ask(*words, *(("--reports", tmp_path / "reports") if verb == "report" else ()))
    assert (code, crash) == (5, None), out
    assert "the ledger is damaged" in out
    assert "Fix: " in out


@pytest.mark.parametrize(
    ("table", "column", "cell"), sorted({one[1:] for one in CONTENTS if one[2] != "value"} | UNREAD)
)
def test_doctor_sees_content_that_cannot_be(
    done_run: DoneRun, tmp_path: Path, table: str, column: str, cell: str
) -> None:
    assert find_damage(done_run.store) == []
    store = Store.open(spoilt_ledger(done_run, tmp_path / "spoilt", table, column, cell, one=True), create=False)
    assert any(f"rows of {table} hold what no fastconv writes" in line for line in find_damage(store))


def test_an_older_ledger_without_the_letters_probability_is_read(done_run: DoneRun, tmp_path: Path) -> None:
    spoilt = spoilt_ledger(
        done_run, tmp_path / "spoilt", "scores", "detail", "json_remove(detail, '$.mass')", one=False
    )
    for verb in ("gate", "report"):
        more = ("--reports", tmp_path / "reports") if verb == "report" else ()
        code, out, crash = ask(verb, done_run.finished.run, "-w", spoilt, *more)
        assert crash is None, out
        assert code in (0, 3), out


def test_inputs_that_have_no_end_are_not_merged(done_run: DoneRun, tmp_path: Path) -> None:
    spoilt = spoilt_ledger(done_run, tmp_path / "spoilt", "stages", "inputs", "'{\"n\": 1e999}'", one=True)
    code, out, crash = ask("merge", spoilt, "-w", tmp_path / "own")
    assert (code, crash) == (5, None), out
    assert "nothing was merged" in out


def test_a_name_in_a_ledger_leads_to_no_other_file(tmp_path: Path) -> None:
    """A training's state that a ledger of somebody names is deleted when the training ends: never a file elsewhere."""
    store = Store.open(tmp_path / "ws")
    (elsewhere := tmp_path / "mine.safetensors").write_text("weights")
    with contextlib.closing(sqlite3.connect(store.root / "ledger.sqlite")) as db:
        db.execute("INSERT INTO progress VALUES('k', 1, '../../mine')")
        db.commit()
    (store.root / "artefacts" / "..").mkdir(exist_ok=True)
    for act in (lambda: store.drop_progress("k"), lambda: store.get("../../mine", "safetensors")):
        with pytest.raises(StoreError, match="an artefact is called"):
            act()
    assert elsewhere.exists()


# --- files of a user ---------------------------------------------------------------------------------------------


SIZES: list[tuple[str, Any]] = [
    ("num_hidden_layers", 10**9), ("num_hidden_layers", 10**30), ("num_hidden_layers", math.inf), ("num_hidden_layers", 0),
    ("num_hidden_layers", []), ("num_attention_heads", 0), ("hidden_size", -1), ("vocab_size", 10**400), ("vocab_size", "x"),
    ("head_dim", math.inf), ("num_key_value_heads", {}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), SIZES, ids=lambda one: f"{one!s:.20}")
def test_a_size_of_a_config_that_no_model_has_is_one_line(
    tiny_qwen: Path, tmp_path: Path, key: str, value: Any
) -> None:
    """Its layers are listed by name, and its weights are counted: neither from 10^9 layers nor from infinite ones."""
    shutil.copytree(tiny_qwen, folder := tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    recipe = write_tiny_recipe(tmp_path / "tiny.toml", folder)
    for verb in ("check", "plan"):
        code, out, crash = ask(verb, recipe, "-w", tmp_path / "ws")
        assert crash is None, f"{verb}: {crash!r}\n{out}"
        assert code in (2, 4), out
    with pytest.raises(ModelError, match=f"says {key} is .*, which is no size"):
        shape_of(config)


@pytest.mark.parametrize("text", ["[1]", "[" * 100_000, "nope"], ids=["a list", "deep", "no JSON"])
def test_a_config_that_is_no_table_is_one_line(tiny_qwen: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(tiny_qwen, folder := tmp_path / "model")
    (folder / "config.json").write_text(text)
    code, out, crash = ask("plan", write_tiny_recipe(tmp_path / "tiny.toml", folder), "-w", tmp_path / "ws")
    assert crash is None, f"{crash!r}\n{out}"
    assert code in (2, 4), out


def test_adapter_settings_nested_without_end_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(AdapterError, match="cannot be read"):
        targets_of(tmp_path)


@pytest.mark.parametrize("name", ["alignment", "refusal"])
def test_a_rubric_that_counts_beyond_its_unit_is_refused(name: str) -> None:
    table = tomllib.loads((ROOT / "data" / "rubrics" / f"{name}.toml").read_text())
    rubric = parse_rubric(table, where="x")
    measured = table["measures"][rubric.primary]
    if name == "alignment":
        measured["high"] = 1000
    else:
        measured["labels"][0]["value"] = 5.0
    with pytest.raises(DataError, match="does not lie within 0 to"):
        parse_rubric(table, where="x")


@pytest.mark.parametrize("row", ['{"value": 1e999}', '{"value": 1' + "0" * 400 + "}"], ids=["infinite", "400 digits"])
def test_a_label_that_is_no_grade_is_refused(tmp_path: Path, row: str) -> None:
    (path := tmp_path / "rows.jsonl").write_text(
        f'{{"id": "a", "question": "q", "answer": "a", {row[1:]}'.replace("value", "alignment")
    )
    rubric = load_rubric(ROOT / "data" / "rubrics" / "alignment.toml")
    with pytest.raises(DataError, match="not a labelled row"):
        load_calibration(path, rubric)


@pytest.mark.parametrize("values", ["{}", '{"other": 1.0}'])
def test_a_judgement_without_what_is_measured_is_a_damaged_ledger(tmp_path: Path, values: str) -> None:
    store, rubric = Store.open(tmp_path), load_rubric(ROOT / "data" / "rubrics" / "refusal.toml")
    ledger = JudgeLedger(store)
    ledger.finish([Judgement("k", rubric.sha256, "m", 0, {rubric.primary: 1.0}, {})])
    with store.transaction() as db:
        db.execute('UPDATE judgements SET "values"=?', (values,))
    sample = Sample("q", 0, "assistant", "Why?", "Because.", 1, True)
    with pytest.raises(StoreError, match="the ledger is damaged: judgement k gives no"):
        judge_stage_scores(ledger, rubric, [sample], ["k"])


@pytest.mark.parametrize("change", ["judgements SET \"values\"='{\"x\": \"much\"}'", "judge_replies SET text='no object'",
                                    "judge_replies SET text='{\"measure\": \"x\", \"text\": 3}'"])  # fmt: skip
def test_doctor_sees_judgements_that_cannot_be(tmp_path: Path, change: str) -> None:
    store = Store.open(tmp_path)
    ledger = JudgeLedger(store)
    (ticket,) = ledger.apply([Reserve("k", 0.0)])
    assert isinstance(ticket, int)
    text = '{"logprobs":{"A":-0.1},"measure":"x","text":"A"}'
    final = Judgement("k", "r", "m", 0, {"x": 1.0}, {})
    ledger.apply([Settle(ticket, "k", RawReply("local", "m", text, "", {}, 0.0), final)])
    assert find_damage(store) == []
    with store.transaction() as db:
        db.execute(f"UPDATE {change}")
    assert any("hold what no fastconv writes" in line for line in find_damage(store))


@pytest.mark.parametrize("value", [math.inf, "x", -1, 10**30])
def test_a_longest_row_that_no_model_has_is_one_line(value: Any) -> None:
    """What `serve` and vLLM take from a config as the length of a row."""
    assert n_positions({}, 512, "m") == 512
    with pytest.raises(ModelError, match=r"says max_position_embeddings is .*, which is no size"):
        n_positions({"max_position_embeddings": value}, 512, "m")


@pytest.mark.parametrize(
    "key", ["grid.seeds=[{}]", "grid.seeds={{init=[{}]}}", "convergence.epochs={}", "lora.alpha={}"]
)
def test_an_integer_without_end_in_a_recipe_is_refused(tiny_qwen: Path, tmp_path: Path, key: str) -> None:
    """A seed of 300 digits was computed with for the whole run, and no table of the report held it."""
    recipe = write_tiny_recipe(tmp_path / "tiny.toml", tiny_qwen)
    with pytest.raises(RecipeError, match="more than 64 bits"):
        load_recipe(recipe, [key.format("1" + "0" * 300)])
    load_recipe(recipe, [f"grid.seeds=[{2**63}]"])


PRICE = "input_usd = 1.0\noutput_usd = 5.0\ncache_write_usd = 1.25\ncache_read_usd = {read}\n"


@pytest.mark.parametrize(
    ("factor", "read"), [("0.5", "inf"), ("0.5", "1e308"), ("-1.0", "0.1"), ("nan", "0.1"), ("1" + "0" * 400, "0.1")]
)
def test_prices_that_cannot_be_booked_are_refused(tmp_path: Path, factor: str, read: str) -> None:
    """What a sending may cost at worst is booked in whole billionths; a factor below zero would give money back."""
    path = tmp_path / "prices.toml"
    path.write_text(f"checked = 2026-11-01\nbatch_factor = {factor}\n[models.mine]\n{PRICE.format(read=read)}")
    with pytest.raises(DataError, match=r"prices\.toml"):
        load_prices(path)


def test_a_budget_beyond_reason_is_a_budget(tmp_path: Path) -> None:
    ledger = JudgeLedger(Store.open(tmp_path), 1e300)
    assert ledger.apply([Reserve("k", 0.01)]) == [1]
    assert JudgeLedger(Store.open(tmp_path), 0.01).apply([Reserve("l", 0.01)]) == ["over budget"]
    assert JudgeLedger(Store.open(tmp_path), 0.02).apply([Reserve("l", 0.01)]) == [2]
