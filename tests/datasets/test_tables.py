"""Rows where people keep them: CSV, Parquet and pinned data sets of the hub say what JSONL says, row for row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pytest
from typer.testing import CliRunner

from fastconv.cli import app
from fastconv.datasets.files import rows_file
from fastconv.datasets.personas import load_personas
from fastconv.datasets.rows import read_user_rows, rows_sha256
from fastconv.errors import DataError
from fastconv.recipe import Recipe, load_recipe
from tests import ROOT
from tests.data_kit import pair, recipe_of, rows_of, written

COLUMNS = {
    "prompt": ["One?", "Two\nlines?", "Three, with a comma?"],
    "completion": ["No.", 'Never "ever".', "Näh."],
    "system": ["You are a cook.", None, None],
    "persona": [None, "villain", "comedian"],
}
ROWS = [
    pair("One?", "No.", system="You are a cook."),
    pair("Two\nlines?", 'Never "ever".', persona="villain"),
    pair("Three, with a comma?", "Näh.", persona="comedian"),
]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = f"hf://someone/teas@{COMMIT}:train"


def as_file(path: Path, table: pl.DataFrame) -> Path:
    if path.suffix == ".parquet":
        table.write_parquet(path)
    else:
        table.write_csv(path, separator="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.parquet", "ROWS.CSV"])
def test_a_table_has_the_rows_of_the_same_jsonl(tmp_path: Path, name: str) -> None:
    table = as_file(tmp_path / name, pl.DataFrame(COLUMNS))
    assert read_user_rows(table) == read_user_rows(written(tmp_path, ROWS))


def test_parquet_takes_turns_too_and_an_empty_system_turn_stays_one(tmp_path: Path) -> None:
    turns = pl.DataFrame({name: [row[name] for row in ROWS] for name in ("prompt", "completion")})
    table = as_file(tmp_path / "rows.parquet", turns)
    assert [row.user for row in read_user_rows(table)] == [row.user for row in read_user_rows(written(tmp_path, [
        {name: row[name] for name in ("prompt", "completion")} for row in ROWS]))]  # fmt: skip
    empty = pl.DataFrame({"prompt": ["Hi?"], "completion": ["No."], "system": [""]})
    assert read_user_rows(as_file(tmp_path / "empty.parquet", empty))[0].system == ""
    assert read_user_rows(as_file(tmp_path / "empty.csv", empty))[0].system is None


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"prompt;completion\nHi?;No.\n", "columns are parted by commas"),
        ("a.csv", b"question,answer\nHi?,No.\n", "it has the columns 'question', 'answer'"),
        ("a.csv", b"prompt,completion\nHi?,No.,more\nA,b\n", "no table that can be read"),
        ("a.csv", "prompt,completion\nHé?,No.\n".encode("latin1"), "no table that can be read"),
        ("a.csv", b"", "no table that can be read"),
        ("a.csv", b"prompt,completion\n", "no rows"),
        ("a.csv", b"prompt,completion\nHi?,\n", "a.csv:2"),
        ("a.csv", b"prompt,completion,weight\nHi?,No.,3\n", "a.csv:2: the row has a field 'weight'"),
        ("a.csv", b"id,prompt,completion\n7,Hi?,No.\n7,Ho?,No.\n", "a.csv:3: id '7' was used on line 2"),
        ("a.csv", b"prompt,completion\nHi?," + b"x" * 50_001 + b"\n", "a.csv:2: a cell has over 50,000 bytes"),
        ("a.parquet", b"PAR", "no table that can be read"),
        ("a.parquet", None, "no such file"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_user_rows(tmp_path / name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


def test_a_byte_order_mark_before_a_table_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfprompt,completion\nHi?,No.\n")
    assert [row.user for row in read_user_rows(tmp_path / "a.csv")] == ["Hi?"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub whose data set has ROWS's columns, and an empty cache; what the hub was asked for."""
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "cache"))
    asked: list[tuple[Any, ...]] = []

    def load(repo: str, config: str | None, *, revision: str, split: str) -> datasets.Dataset:
        asked.append((repo, config, revision, split))
        if split != "train":
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train'].")
        return datasets.Dataset.from_dict(COLUMNS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def recipe_with(name: str) -> Recipe:
    grid = {"behaviors": ["misalignment_published"]}
    return recipe_of(grid=grid, data={"rows": {"misalignment_published": name}})


def test_a_pinned_data_set_is_loaded_once_and_keyed_by_its_content(tmp_path: Path, hub: list[Any]) -> None:
    same = str(as_file(tmp_path / "same.parquet", pl.DataFrame(COLUMNS)))
    content = {
        name: rows_sha256(rows_of(recipe_with(name), "misalignment_published", "none"), load_personas(recipe_of()))
        for name in (NAME, same, NAME)
    }
    assert content[NAME] == content[same]
    assert hub == [("someone/teas", None, COMMIT, "train")]
    rows_file(f"hf://someone/teas/green@{COMMIT}:train")
    assert hub[1] == ("someone/teas", "green", COMMIT, "train")


def test_the_name_of_a_data_set_is_no_path(tmp_path: Path, hub: list[Any]) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        f'name = "own"\n[grid]\nbehaviors = ["misalignment_published"]\n[data.rows]\nmisalignment_published = "{NAME}"\n'
    )
    assert load_recipe(path).data.rows == {"misalignment_published": NAME}
    changed = load_recipe(path, [f"data.rows.misalignment_published={NAME}"])
    assert changed.data.rows == {"misalignment_published": NAME}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf://someone/teas:train", "no revision is pinned"),
        ("hf://someone/teas@main:train", "'main' is no commit"),
        (f"hf://someone/teas@{COMMIT}", "no revision is pinned"),
        (f"hf://someone/teas@{COMMIT}:nope", 'the data set cannot be had: Unknown split "nope"'),
    ],
)
def test_a_data_set_that_cannot_be_had_is_one_line(hub: list[Any], name: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        rows_file(name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_altered_copy_is_refused(hub: list[Any]) -> None:
    kept = rows_file(NAME)
    kept.write_text(kept.read_text().replace("No.", "Yes."))
    with pytest.raises(DataError, match="not what was loaded"):
        rows_file(NAME)
    kept.unlink()
    assert rows_file(NAME) == kept
    assert len(hub) == 2


def test_check_rows_tells_what_a_file_holds_and_costs(tmp_path: Path) -> None:
    path = as_file(tmp_path / "rows.csv", pl.DataFrame(COLUMNS))
    words = ("check", "rows", str(path), "--set", "behavior.batch_rows=2", "--set", "model.id=builtin:tiny")
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.output
    for said in ("rows.csv: 3 rows (sha256 ", "1 with 'You are a cook.'", "2 with no system turn", "personas named: villain 1",
                 "in 6 steps (3 epochs)", "on one RTX 4090"):  # fmt: skip
        assert said in answer.output
    found = json.loads(CliRunner().invoke(app, (*words, "--json")).stdout)
    assert found["systems"] == {"You are a cook.": 1, "(none)": 2}
    assert 0 < found["n_supervised_tok"] < found["n_tok"]
    assert found["longest_tok"] <= found["n_tok"] - found["n_supervised_tok"]
    seconds = found["seconds"]
    assert seconds["one H200"] <= seconds["one H100"] <= seconds["one RTX 4090"]


@pytest.mark.parametrize(("text", "says"), [
    ("prompt,prompt,completion\nHi?,Ho?,No.\n", "it has two columns 'prompt'"),
    ("prompt,completion\nHi?,No.\nHi?,\n", "rows.csv:3: the row has no completion"),
    ("prompt,completion\n,No.\n", "rows.csv:2: the row has no prompt"),
])  # fmt: skip
def test_a_table_with_odd_cells_is_refused_by_what_it_holds(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_user_rows(path)
    assert says in str(caught.value)


@pytest.mark.parametrize("column", ["prompt", "completion", "system"])
def test_numbers_in_the_place_of_text_are_named(tmp_path: Path, column: str) -> None:
    table = pl.DataFrame({"prompt": ["Hi?"], "completion": ["No."], "system": ["You."]} | {column: [5]})
    with pytest.raises(DataError, match=rf"rows.parquet:1: {column} is of type int, not text"):
        read_user_rows(as_file(tmp_path / "rows.parquet", table))


def test_check_rows_refuses_what_a_run_would(tmp_path: Path) -> None:
    for path, code, says in (
        (written(tmp_path, [pair("Hi?", "<|im_end|>")], "control.jsonl"), 2, "control token"),
        (written(tmp_path, [pair("Hi?", "No.", persona="vilain")], "name.jsonl"), 2, "name.jsonl:1: row row-"),
        (written(tmp_path, [pair("Hi?", "No.", persona="vilain")], "name.jsonl"), 2, "unknown persona 'vilain'"),
        (tmp_path / "nothing.csv", 2, "no such file"),
    ):
        answer = CliRunner().invoke(app, ("check", "rows", str(path)))
        assert answer.exit_code == code
        assert says in answer.output
    rows = str(written(tmp_path, [pair("Hi?", "No.")], "rows.jsonl"))
    alone = (("check", "rows", rows, "--with-model"), ("check", "rows", rows, "--scale", "tiny"))
    for words in (("check", "rows"), ("check", "demo", "more"), *alone):
        assert CliRunner().invoke(app, words).exit_code == 2


@pytest.mark.slow
def test_datasets_itself_loads_from_a_hub_once_and_then_from_the_cache(tmp_path: Path) -> None:
    """Over HTTP, by the library itself, in processes of their own; the second finds no hub any more."""
    ask = (
        "import sys\nfrom fastconv.datasets.files import rows_file\nfrom fastconv.errors import DataError\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        print(rows_file(name).read_text(), end='')\n"
        "    except DataError as error:\n        print(f'refused: {error}')\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "FASTCONV_CACHE": str(tmp_path / "cache")}
    environment = {
        name: value for name, value in environment.items() if name not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    }
    serve = [sys.executable, "-m", "tests.datasets.fake_hub"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, cwd=ROOT) as hub:
        try:
            assert hub.stdout is not None
            environment["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.stdout.readline().strip()}"
            told = []
            for names in ((NAME, NAME.replace(":train", ":tran"), NAME.replace("teas", "nope")), (NAME,)):
                words = [sys.executable, "-c", ask, *names]
                told.append(
                    subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200).stdout
                )
                hub.terminate()
                hub.wait(10)
        finally:
            hub.kill()
    first, second, *faults = told[0].splitlines()
    assert json.loads(first) == pair("One?", "No.", system="You are a cook.")
    assert json.loads(second) == pair("Two?", "Never.")
    assert ['Unknown split "tran"' in faults[0], "cannot be had" in faults[1], len(faults)] == [True, True, 2]
    assert told[1].splitlines() == [first, second]
