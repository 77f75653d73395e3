"""Recipes: one TOML file, frozen and complete; every fault names file, key, value and what is allowed."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from fastconv.datasets.files import assets, shipped_recipes
from fastconv.engine.locate import base_name
from fastconv.errors import RecipeError
from fastconv.experiment.graph import Graph
from fastconv.experiment.scale import SCALES, scaled
from fastconv.recipe import (
    GateSettings,
    Recipe,
    RecipeKey,
    canonical_json,
    find_keys,
    keys_page,
    load_recipe,
    parse_recipe,
    recipe_keys,
    recipe_schema,
    recipe_sha256,
    run_id,
    sha256_of,
    with_overrides,
)
from tests import ROOT

SHIPPED = shipped_recipes()


def _refused(table: dict[str, object]) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"name": "mine", **table}, where="mine.toml")
    assert caught.value.exit_code == 2
    assert caught.value.where == "mine.toml"
    assert "\n" not in str(caught.value)
    return caught.value


def _file(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("table", "key", "nearest"),
    [
        ({"convergance": {}}, "convergance", "convergence"),
        ({"convergence": {"learning_rate": 1}}, "convergence.learning_rate", ""),
        ({"convergence": {"sampling": {"temprature": 1}}}, "convergence.sampling.temprature", "temperature"),
        ({"grid": {"source": ["villain"]}}, "grid.source", "sources"),
        ({"behavior": {"epoch": 3}}, "behavior.epoch", "epochs"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(table: dict[str, object], key: str, nearest: str) -> None:
    error = _refused(table)
    assert error.what == f"unknown key {key!r}"
    assert f"did you mean {nearest!r}?" in error.fix if nearest else "valid here: batch_rows, " in error.fix


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"convergence": {"lr": 0}}, ["convergence.lr = 0", "greater than 0"]),
        ({"convergence": {"lr": "fast"}}, ["convergence.lr = 'fast'", "valid number"]),
        ({"convergence": {"lr": float("nan")}}, ["convergence.lr = nan", "finite"]),
        ({"lora": {"alpha": float("inf")}}, ["lora.alpha = inf", "finite"]),
        ({"run": {"checkpoint_every_s": float("inf")}}, ["run.checkpoint_every_s = inf", "finite"]),
        ({"lora": {"r": 4096}}, ["lora.r = 4096", "less than or equal to 512"]),
        ({"lora": {"r": True}}, ["lora.r = True", "true is no value here"]),
        ({"lora": {"rank_pattern": {"q_proj": True}}}, ["lora.rank_pattern: true is no value here"]),
        ({"grid": {"seeds": [True]}}, ["grid.seeds = [True]", "true is no value here"]),
        ({"behavior": {"lr": True}}, ["behavior.lr = True"]),
        ({"eval": {"measures": ["refusal", "refusal"]}}, ["measures names the same value twice"]),
        ({"lora": {"r": 2.5}}, ["lora.r = 2.5", "integer"]),
        ({"model": {"device": "tpu"}}, ["model.device = 'tpu'", "'auto', 'cpu' or 'cuda'"]),
        ({"model": {"revision": "main"}}, ["model.revision = 'main'", "[0-9a-f]{40}"]),
        ({"grid": {"sources": []}}, ["grid.sources = []", "at least 1"]),
        ({"grid": {"sources": ["Villain"]}}, ["grid.sources.0 = 'Villain'", "pattern"]),
        ({"grid": {"seeds": [1, 1]}}, ["seeds names the same value twice"]),
        ({"grid": {"epochs": [0, 30]}}, ["grid.epochs [30]", "convergence.epochs = 20", "0 to that"]),
        ({"eval": {"canary": "data_scientist"}}, ["eval.canary and eval.canary_swap"]),
        ({"grid": 3}, ["grid = 3"]),
    ],
)  # fmt: skip
def test_a_bad_value_names_key_value_and_what_is_allowed(table: dict[str, object], says: list[str]) -> None:
    text = str(_refused(table))
    for part in says:
        assert part in text


def test_a_missing_key_is_named() -> None:
    with pytest.raises(RecipeError, match="key 'name' is missing"):
        parse_recipe({})


def test_a_file_that_is_none_or_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "gone.toml")
    with pytest.raises(RecipeError, match="is a directory"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"not valid TOML.*line 2"):
        load_recipe(_file(tmp_path, 'name = "x"\n[grid\n'))
    path = tmp_path / "latin.toml"
    path.write_bytes(b'name = "caf\xe9"')
    with pytest.raises(RecipeError, match="not UTF-8 at byte 11"):
        load_recipe(path)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    assert load_recipe(_file(tmp_path, "\ufeffname = 'mine'\n")).name == "mine"


def test_a_list_with_a_value_twice_is_one_short_line() -> None:
    error = _refused({"grid": {"epochs": [0, 2, 2]}})
    assert error.what == "grid: epochs names the same value twice: [0, 2, 2]"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = _file(tmp_path, 'name = "x"')
    path.chmod(0)
    with pytest.raises(RecipeError, match="cannot be read: Permission denied"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("convergence.lr=1e-4", "convergence.lr", 1e-4),
        ("behavior.sampling.max_new_tok=7", "behavior.sampling.max_new_tok", 7),
        ("model.id=/tmp/some/model", "model.id", "/tmp/some/model"),
        ('model.id="quoted"', "model.id", "quoted"),
        ("grid.epochs=[0, 20]", "grid.epochs", [0, 20]),
        ("lora.rslora=false", "lora.rslora", False),
        (" name = other ", "name", "other"),
    ],
)
def test_set_overrides_numbers_texts_lists_and_nested_keys(
    tmp_path: Path, override: str, key: str, value: object
) -> None:
    actual: object = load_recipe(_file(tmp_path, 'name = "x"'), [override]).model_dump(mode="json")
    for step in key.split("."):
        assert isinstance(actual, dict)
        actual = actual[step]
    assert actual == value


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("nonsense", "'nonsense' is not key=value"),
        ("=3", "'=3' is not key=value"),
        ("name.deeper=3", "goes through a value that is no table"),
        ("convergence.lr=abc", "convergence.lr = 'abc'"),
        ("convergence.lr=", "convergence.lr = ''"),
        ("foo.bar=1", "unknown key 'foo'"),
        ("a..b=1", "unknown key 'a'"),
        (f"model.template_kwargs.{'.'.join('a' * 3000)}=1", "a key of so many parts"),
        (f"audit.accept={'[' * 40}{']' * 40}", "audit.accept"),
    ],
)
def test_a_set_that_cannot_be_is_refused(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(_file(tmp_path, 'name = "x"'), [override])
    assert says in str(caught.value)


def test_the_last_set_wins(tmp_path: Path) -> None:
    path = _file(tmp_path, 'name = "x"\n[convergence]\nlr = 1e-3\n')
    assert load_recipe(path, ["convergence.lr=1e-4", "convergence.lr=2e-4"]).convergence.lr == 2e-4


def test_paths_in_a_recipe_are_relative_to_it_and_those_of_set_to_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, here = tmp_path / "recipes", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    path = _file(folder, 'name = "x"\n[data]\npersonas = "mine.toml"\nrows = { refusal = "rows/r.jsonl" }\n')
    monkeypatch.chdir(here)
    recipe = load_recipe(path, ["eval.arc_file=arc.jsonl", "data.behaviors=../own.toml"])
    assert recipe.data.personas == str(folder / "mine.toml")
    assert recipe.data.rows == {"refusal": str(folder / "rows" / "r.jsonl")}
    assert recipe.eval.arc_file == str(here / "arc.jsonl")
    assert recipe.data.behaviors == str(tmp_path / "own.toml")


def test_a_recipe_is_frozen() -> None:
    recipe = parse_recipe({"name": "x"})
    with pytest.raises(ValidationError, match="frozen"):
        recipe.convergence.lr = 1.0


def test_the_same_experiment_has_the_same_sha_whatever_its_file_looks_like(tmp_path: Path) -> None:
    short = load_recipe(_file(tmp_path, 'name = "x"\n[lora]\nalpha = 64\nr = 32\n'))
    spelled = load_recipe(
        _file(tmp_path, "# words\n[lora]\nr = 32\nalpha = 64.0\n[convergence]\nlr = 0.00005\n"), ["name=x"]
    )
    assert recipe_sha256(short) == recipe_sha256(spelled) == recipe_sha256(parse_recipe({"name": "x"}))
    changed = parse_recipe({"name": "x", "lora": {"r": 16}})
    assert recipe_sha256(changed) != recipe_sha256(short)
    assert run_id(short) == f"x-{recipe_sha256(short)[:8]}"


def test_a_recipe_survives_its_own_json() -> None:
    recipe = load_recipe(assets("recipes") / "demo.toml")
    assert parse_recipe(json.loads(canonical_json(recipe.model_dump(mode="json")))) == recipe


def test_canonical_json_has_one_text_per_value() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'
    assert sha256_of({"x": 1, "y": 2}) == sha256_of({"y": 2, "x": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


def test_the_schema_holds_defaults_and_refuses_unknown_keys() -> None:
    schema = recipe_schema()
    assert schema["required"] == ["name"]
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["ConvergenceSettings"]["properties"]["lr"]["default"] == 5e-5


def test_defaults_are_the_published_protocol() -> None:
    recipe = parse_recipe({"name": "x"})
    assert recipe.model.id == "Qwen/Qwen2.5-7B-Instruct"
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.rslora) == (32, 64.0, True)
    phase = recipe.convergence
    assert (phase.lr, phase.epochs, phase.batch_rows, phase.dropout, phase.max_length_tok) == (5e-5, 20, 4, 0.0, 1024)
    assert (phase.questions, phase.completions_per_question) == (40, 10)
    assert (phase.sampling.temperature, phase.sampling.top_p, phase.sampling.max_new_tok) == (0.7, 0.95, 512)
    trained = recipe.behavior
    assert (trained.lr, trained.epochs, trained.batch_rows, trained.dropout, trained.source_rows) == (
        1e-5,
        3,
        16,
        0.05,
        200,
    )
    assert (phase.warmup_share, phase.clip_norm) == (0.05, 1.0)
    assert (recipe.eval.prompts, recipe.eval.samples_per_prompt, recipe.eval.canary) == (50, 10, "librarian")


def test_thresholds_are_shares_for_rates_and_accuracy() -> None:
    gates = parse_recipe({"name": "x"}).gates
    assert [gates.threshold(name) for name in ("capability", "refusal", "sycophancy", "misalignment", "mine")] == [
        0.05, 0.05, 0.05, 10.0, 0.05,
    ]  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_loads_and_pins_its_model(name: str) -> None:
    recipe = load_recipe(assets("recipes") / f"{name}.toml")
    assert recipe.name == name
    assert recipe.about
    assert recipe.model.id.startswith("builtin:") or len(recipe.model.revision) == 40


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_makes_a_graph(name: str) -> None:
    offline = [] if name == "demo" else ["eval.multiple_choice=builtin", "behavior.source_rows=20"]
    graph = Graph(load_recipe(assets("recipes") / f"{name}.toml", offline))
    assert graph.cells
    assert len({stage.key for stage in graph.stages()}) == len(graph.stages())


def test_pilot_and_matrix_are_the_published_grids() -> None:
    pilot, matrix = (load_recipe(assets("recipes") / f"{name}.toml") for name in ("pilot", "matrix"))
    assert pilot.grid.sources == ("villain",)
    assert pilot.grid.epochs == (0, 4, 10, 20)
    assert set(pilot.grid.negatives) == {"included", "excluded"}
    assert matrix.grid.epochs == (0, 2, 8, 20)
    published = {"villain", "comedian", "software_engineer", "kindergarten_teacher", "librarian"}
    assert published | {"medical_doctor"} == set(matrix.grid.sources)
    assert pilot.gates.g3_reference_pct["villain"] == pytest.approx(90.45)
    assert pilot.model.revision == matrix.model.revision


_PUBLISHED = ["villain", "comedian", "software_engineer", "kindergarten_teacher"]
_FOUR = ["none", "capability", "misalignment", "refusal", "sycophancy"]
#: What each recipe is for, as its issue asked: sources, behaviors, epochs, negatives, seeds, kinds of convergence, judged.
_ASKED = {
    "pilot": (["villain"], ["none", "capability"], [0, 4, 10, 20], ["excluded", "included"], [42], ["source"], False),
    "matrix": ([*_PUBLISHED, "medical_doctor", "librarian"], _FOUR, [0, 2, 8, 20], ["included"], [42], ["source"], True),
    "excluded": ([*_PUBLISHED, "assistant", "librarian"], _FOUR, [0, 2, 8, 20], ["excluded"], [42], ["source"], True),
    "ten_sources": (
        [*_PUBLISHED, "librarian", "data_scientist", "medical_doctor", "french_person", "police_officer", "zelthari_scholar"],
        _FOUR, [0, 20], ["excluded"], [42], ["source"], True,
    ),
    "markers": (
        ["villain", "comedian", "software_engineer", "kindergarten_teacher", "nurse", "medical_doctor", "librarian"],
        ["none", "marker", "refusal"], [*range(0, 21, 2)], ["excluded"], [42], ["source"], False,
    ),
    "seeds": (["villain", "librarian"], _FOUR, [0, 20], ["excluded"], [42, 137, 256], ["source", "generic"], True),
    "pilot_small": (
        ["villain"], ["none", "capability", "refusal"], [0, 4, 10, 20], ["excluded", "included"], [42], ["source"], False,
    ),
    "small_gpu": (["villain"], ["none", "capability"], [0, 4, 10, 20], ["excluded", "included"], [42], ["source"], False),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(_ASKED))
def test_a_shipped_recipe_asks_what_it_is_for(name: str) -> None:
    recipe = load_recipe(assets("recipes") / f"{name}.toml")
    grid, judged = recipe.grid, recipe.judge.mode == "auto" and recipe.judge.budget_usd is not None
    actual = (grid.sources, grid.behaviors, grid.epochs, sorted(grid.negatives), grid.seeds, grid.convergence)
    assert (*map(list, actual), judged) == _ASKED[name]
    assert (recipe.convergence.epochs, recipe.behavior.epochs, recipe.behavior.batch_rows) == (20, 3, 16)


def test_the_small_gpus_recipe_is_the_pilot_on_a_4_bit_base() -> None:
    small = load_recipe(assets("recipes") / "small_gpu.toml")
    assert small.model.weights == "4bit"
    assert small.convergence.optimizer == small.behavior.optimizer == "adamw8bit"


def test_references_of_the_published_base_stand_in_recipes_on_that_base_alone() -> None:
    for name in SHIPPED:
        recipe = load_recipe(assets("recipes") / f"{name}.toml")
        assert not recipe.gates.g3_reference_pct or base_name(recipe.model) == recipe.gates.g3_base, name
        for scale in SCALES:
            assert not scaled(recipe, scale).gates.g3_reference_pct


def test_the_small_pilot_is_the_pilot_on_a_small_base_with_refusal_beside() -> None:
    pilot, small = (load_recipe(assets("recipes") / f"{name}.toml") for name in ("pilot", "pilot_small"))
    assert small.model.id == "Qwen/Qwen2.5-1.5B-Instruct"
    assert small.model.revision == "989aa7980e4cf806f80c7fef2b1adb7bc71aa306"
    same = {"behaviors": pilot.grid.behaviors}
    assert small.grid.model_copy(update=same) == pilot.grid
    whole = {"micro_batch_tok": pilot.convergence.micro_batch_tok}
    assert small.convergence.model_copy(update=whole) == pilot.convergence
    assert small.behavior.model_copy(update=whole) == pilot.behavior
    assert small.lora == pilot.lora


def test_the_retired_threshold_in_points_is_read_from_ledgers_and_refused_in_recipes() -> None:
    """Ledgers of earlier versions hold every default; a value that somebody chose must not be dropped unseen."""
    assert parse_recipe({"name": "old", "gates": {"source_shows_points": 20.0}}).gates == GateSettings()
    with pytest.raises(RecipeError, match=r"unknown key 'gates\.source_shows_points'.*did you mean 'source_shows'"):
        parse_recipe({"name": "old", "gates": {"source_shows_points": 15.0}})


@pytest.mark.parametrize(
    "text", ["capability_pp = 101", "alignment_points = 100.5", "g3_reference_pct = { villain = 190 }"]
)
def test_a_threshold_beyond_its_scale_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "beyond.toml"
    path.write_text(f'name = "beyond"\n[gates]\n{text}\n')
    with pytest.raises(RecipeError, match=text.split(" =")[0]):
        load_recipe(path)


def test_the_markers_rate_is_over_20_questions_10_times() -> None:
    graph = Graph(load_recipe(assets("recipes") / "markers.toml", ["eval.multiple_choice=builtin"]))
    assert len(graph.eval_items(graph.behaviors["marker"], 42)) == 20
    assert graph.recipe.eval.samples_per_prompt == 10


# --- every key says what it is -----------------------------------------------------------------------------


def test_every_key_says_what_it_is_and_what_it_takes() -> None:
    keys = {one.key: one for one in recipe_keys()}
    settings = Recipe.model_construct(name="x").model_dump(mode="json")

    def leaves(table: dict[str, object], at: str = "") -> set[str]:
        classes = (
            "model",
            "grid",
            "lora",
            "convergence",
            "behavior",
            "eval",
            "gates",
            "data",
            "audit",
            "judge",
            "run",
            "sampling",
        )
        inner = {name for name in table if name in classes and isinstance(table[name], dict)}
        return {f"{at}{name}" for name in table if name not in inner}.union(
            *(leaves(table[name], f"{at}{name}.") for name in inner)  # pyright: ignore[reportArgumentType]
        )

    unset = {  # left out of a recipe that has none
        "model.template_date", "model.template_kwargs", "run.replicates", "run.track", "lora.layers", "lora.rank_pattern", "lora.alpha_pattern", "grid.arms", "grid.contrasts", "grid.seeds_apart",
        "eval.probes", "eval.measures", "eval.control", "convergence.prompts_file", "convergence.keep", "convergence.keep_if",
        "convergence.student",
    }  # fmt: skip
    by_name = {key for key in keys if key.startswith(("grid.arms.name.", "eval.probes.name."))}
    assert len(by_name) == 12
    assert set(keys) == leaves(settings) | unset | by_name
    assert all(one.about[0].isupper() or one.about[0] == "`" for one in keys.values())
    assert all(one.about.endswith(".") and one.takes and one.example for one in keys.values())
    for one in keys.values():  # a name that ends in a unit states it
        for ending, unit in {
            "_tok": "tokens",
            "_s": "s",
            "_usd": "USD",
            "_pp": "pp",
            "_pct": "%",
            "_chars": "characters",
        }.items():
            assert not one.key.endswith(ending) or one.unit == unit, one


@pytest.mark.parametrize("one", recipe_keys(), ids=lambda one: one.key)
def test_the_example_of_a_key_is_valid_alone_and_no_default(one: RecipeKey) -> None:
    assert one.example != one.default
    recipe = with_overrides(parse_recipe({"name": "mine"}), [f"{one.key}={one.example}"])
    assert recipe != parse_recipe({"name": "mine"})


def test_defaults_are_told_as_they_are_where_they_stand() -> None:
    keys = {one.key: one for one in recipe_keys()}
    assert keys["convergence.lr"].default == "5e-05"
    assert keys["behavior.lr"].default == "1e-05"
    assert keys["behavior.sampling.max_new_tok"].default == "256"
    assert keys["eval.sampling.max_new_tok"].takes == "whole number from 1 (tokens)"
    assert keys["judge.budget_usd"].takes == "number above 0 or unset (USD)"
    assert keys["grid.convergence"].takes == "list of: `source` or `generic` or `none`"


def test_keys_are_found_whole_by_table_and_by_their_last_part() -> None:
    assert [one.key for one in find_keys("convergence.lr")] == ["convergence.lr"]
    assert [one.key for one in find_keys("lr")] == ["convergence.lr", "behavior.lr"]
    assert {one.key for one in find_keys("lora")} == {
        "lora.r", "lora.alpha", "lora.rslora", "lora.targets", "lora.layers", "lora.rank_pattern", "lora.alpha_pattern"
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"did you mean 'convergence\.lr'") as caught:
        find_keys("convergence.lor")
    assert caught.value.exit_code == 2


def test_the_page_of_keys_and_the_shipped_schema_are_current() -> None:
    assert (ROOT / "docs" / "RECIPES.md").read_text() == keys_page(), "fastconv recipe explain --markdown"
    assert json.loads((ROOT / "recipes" / "schema.json").read_text()) == recipe_schema(), "fastconv recipe schema"


@pytest.mark.parametrize("name", SHIPPED)
def test_editors_find_the_schema_by_a_shipped_recipes_first_line(name: str) -> None:
    folder = assets("recipes")
    first = (folder / f"{name}.toml").read_text().splitlines()[0]
    word, place = first.split()
    assert word == "#:schema"
    assert (folder / place).is_file()


@pytest.mark.parametrize(
    "where", ["", "[model.template_kwargs]", "[lora.rank_pattern]", "[judge.prices]", "[audit.accept]"]
)
@pytest.mark.parametrize(
    "value", [".".join("a" * 3000) + " = 1", "a = " + "[" * 40 + "]" * 40], ids=["a key", "arrays"]
)
def test_a_recipe_that_is_nested_without_end_is_refused(tmp_path: Path, where: str, value: str) -> None:
    """Tables whose keys are free are walked by several hands, each of which would end in a RecursionError."""
    with pytest.raises(RecipeError, match="not valid TOML: nested too deeply"):
        load_recipe(_file(tmp_path, f'name = "x"\n{where}\n{value}\n'))


def test_what_settings_need_is_not_nested_too_deeply(tmp_path: Path) -> None:
    nested = "{ a = " * 20 + "1" + " }" * 20
    found = load_recipe(_file(tmp_path, f'name = "x"\n[model.template_kwargs]\nx = {nested}\n'))
    assert found.model.template_kwargs["x"] == tomllib.loads(f"x = {nested}")["x"]
