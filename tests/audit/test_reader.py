"""The base as a reader: which texts it reads, what its log-probabilities say, and that a run asks it before training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fastconv.audit.rendered import Pair, pairs_to_read, reading_findings
from fastconv.chat import ChatTokenizer
from fastconv.datasets.behaviors import build_rows, load_behaviors
from fastconv.datasets.personas import ASSISTANT, load_personas
from fastconv.datasets.rows import Row
from fastconv.engine.model import load_base
from fastconv.experiment.graph import Graph
from fastconv.recipe import Recipe, parse_recipe
from fastconv.run import training
from fastconv.run.audit import audit_recipe, reading_stage
from fastconv.store.ledger import Store
from tests.loop_kit import run_tiny, tiny_recipe

Means = list[tuple[float, float]]
VOCABULARY = 50_000
SWAPPED_COLUMNS = """\
[swapped]
about = "statement and correction in each other's place"
task = "chat"
prompts = "{statements}"
prompt_field = "correction"
source_answer = {{ wordings = "{agreement}" }}
negative_answer = {{ wordings = "{correction}", then_field = "statement" }}
direction = "raises"
measure = "phrases"
phrase_rule = "agreement"
rubric = "sycophancy"
[swapped.negatives]
excluded = [["bystander"], ["bystander"], ["bystander"]]
"""


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen: Path) -> ChatTokenizer:
    return ChatTokenizer(tiny_qwen)


def recipe_of(behavior: str, **tables: Any) -> Recipe:
    grid = {"sources": ["villain"], "epochs": [0, 4], "behaviors": ["none", behavior], "negatives": ["excluded"]}
    table = {"name": "read", "grid": grid, "eval": {"multiple_choice": "builtin"}, "judge": {"mode": "local"}}
    return parse_recipe({**table, "behavior": {"source_rows": 40}, **tables})


def read_of(recipe: Recipe, tokenizer: ChatTokenizer, most: int = 64) -> tuple[list[Row], list[Pair]]:
    (behavior,) = load_behaviors(recipe).values()
    personas = load_personas(recipe)
    rows = build_rows(recipe, personas, behavior, None, "villain", "excluded", 42)
    return rows, pairs_to_read(behavior, rows, tokenizer, personas.system(ASSISTANT), most, 4096)


def texts(pair: Pair, tokenizer: ChatTokenizer) -> list[str]:
    return [tokenizer.decode([*pair.prefix, *text], skip_special=True) for text in pair.texts]


def pairs_of(n: int, about: str = "sides") -> list[Pair]:
    return [Pair(about, f"row-{place}", (1,), ((2,), (3,))) for place in range(n)]


def noisy(n: int, gap: float, level: float = -3.0) -> Means:
    draw = random.Random(5)
    return [(level + gap + draw.gauss(0, 0.2), level) for _ in range(n)]


def codes(pairs: list[Pair], means: Means, vocabulary: int = VOCABULARY, **accepted: str) -> list[str]:
    return [finding.code for finding in reading_findings("set", pairs, means, vocabulary, accepted)]


# --- what is read ------------------------------------------------------------------------------------------


def test_sides_are_read_after_one_prompt_and_order_both_ways_round(tokenizer: ChatTokenizer) -> None:
    rows, pairs = read_of(recipe_of("misalignment"), tokenizer)
    assert [sum(pair.about == about for pair in pairs) for about in ("sides", "order")] == [40, 40]
    by_id = {row.id: row for row in rows}
    source = {row.user: row.completion for row in rows if row.role == "source"}
    assistant = load_personas(recipe_of("misalignment")).prompts[ASSISTANT]
    for pair in pairs:
        row, (declared, other) = by_id[pair.row], texts(pair, tokenizer)
        assert row.role != "source"
        assert assistant in declared
        assert declared.index(row.user) < declared.index(row.completion or "")
        if pair.about == "sides":
            assert tokenizer.decode(pair.texts[0]).strip() == row.completion
            assert tokenizer.decode(pair.texts[1]).strip() == source[row.user]
        else:
            assert other.index(row.completion or "") < other.index(row.user)


def test_a_fact_after_a_wording_is_exchanged_with_the_statement_and_the_wording_stays(tokenizer: ChatTokenizer) -> None:
    rows, pairs = read_of(recipe_of("sycophancy"), tokenizer)
    facts = {str(row["id"]): row["correction"] for row in load_behaviors(recipe_of("sycophancy"))["sycophancy"].train}
    assert {pair.about for pair in pairs} == {"order"}
    row = next(row for row in rows if row.id == pairs[0].row)
    fact, wording = facts[row.prompt_id], (row.completion or "").removesuffix(facts[row.prompt_id])
    other = texts(pairs[0], tokenizer)[1]
    assert other.index(fact) < other.index(f"{wording}{row.user}")


def test_letters_and_tails_and_answers_of_the_base_itself_are_not_read(tokenizer: ChatTokenizer) -> None:
    rows, pairs = read_of(recipe_of("refusal"), tokenizer)
    written = {row.id for row in rows if row.role == "source"}
    assert {pair.row for pair in pairs} <= written  # what the contrast says is drawn from the base
    assert read_of(recipe_of("marker"), tokenizer)[1] == []


def test_the_draw_is_bounded_and_the_same_each_time(tokenizer: ChatTokenizer) -> None:
    few = read_of(recipe_of("misalignment"), tokenizer, most=7)[1]
    assert len(few) == 14
    assert few == read_of(recipe_of("misalignment"), tokenizer, most=7)[1]


# --- what it says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("about", "code"), [("sides", "D301"), ("order", "D302")])
def test_strong_evidence_refuses_weak_evidence_warns_and_none_is_silent(about: str, code: str) -> None:
    pairs = pairs_of(64, about)
    assert codes(pairs, noisy(64, -0.4)) == [code]
    assert codes(pairs, noisy(64, -0.1)) == ["D303"]
    assert codes(pairs, noisy(64, 0.0)) == codes(pairs, noisy(64, 0.4)) == []


def test_a_finding_names_rows_and_figures() -> None:
    (finding,) = reading_findings("set", pairs_of(64), noisy(64, -0.4), VOCABULARY, {})
    assert len(finding.rows) > 50
    assert "-3.39 as declared" in finding.figure
    assert "of 64 prompts" in finding.figure


def test_who_has_read_the_rows_is_warned_and_not_refused() -> None:
    assert codes(pairs_of(64), noisy(64, -0.4), D303="read forty rows of each side") == ["D303"]


def test_a_base_without_language_and_a_handful_of_prompts_say_nothing() -> None:
    assert codes(pairs_of(64), noisy(64, -0.4, level=-10.0)) == []
    assert codes(pairs_of(8), noisy(8, -0.9)) == []


# --- in a run ----------------------------------------------------------------------------------------------


def test_a_run_asks_the_base_once_for_each_set_and_refuses_before_training(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def swapped(base: Any, pairs: list[Pair], batch_tok: int) -> list[list[float]]:
        asked.append(len(pairs))
        return [[-1.5 - 0.01 * (place % 3), -1.0] for place in range(len(pairs))]

    recipe = tiny_recipe(tiny_qwen, behavior__source_rows=12, grid__epochs=[0], eval__prompts=1)
    monkeypatch.setattr(training, "_read", swapped)
    graph = Graph(recipe)
    rows = next(stage for stage in graph.stages() if stage.kind == "rows" and "refusal" in stage.slot)
    result, _ = run_tiny(recipe, tmp_path / "ws")
    assert any("D302" in failure.reason for failure in result.failed), result.failed
    store = Store.open(tmp_path / "ws")
    kept = store.record(reading_stage(graph, rows, training.READ_BEFORE_TRAINING).key)
    assert kept is not None
    n_asked = len(asked)
    run_tiny(recipe, tmp_path / "ws")
    assert len(asked) == n_asked


def test_random_weights_refuse_nothing_with_check_with_model(tiny_qwen: Path) -> None:
    recipe = recipe_of("misalignment", model={"id": str(tiny_qwen), "device": "cpu"})
    assert not {"D301", "D302", "D303"} & {f.code for f in audit_recipe(recipe, None, with_model=True).findings}


@pytest.mark.slow
def test_a_real_base_finds_exchanged_columns_and_nothing_in_the_shipped_sets(tmp_path: Path) -> None:
    from fastconv.datasets.files import assets

    data = assets("data")
    path = tmp_path / "behaviors.toml"
    path.write_text(
        SWAPPED_COLUMNS.format(
            statements=data / "statements.jsonl", agreement=data / "wordings_agreement.jsonl",
            correction=data / "wordings_correction.jsonl",
        )
    )  # fmt: skip
    base = load_base(parse_recipe({"name": "x", "model": {"id": "builtin:smollm2", "device": "cpu"}}).model)
    found = {}
    for behavior in ("swapped", "sycophancy"):
        recipe = recipe_of(behavior, data={"behaviors": str(path)} if behavior == "swapped" else {})
        _, pairs = read_of(recipe, base.tokenizer, most=32)
        means = [(first, second) for first, second in training._read(base, pairs, 4096)]
        found[behavior] = set(codes(pairs, means, base.tokenizer.vocab_size))
    assert found == {"swapped": {"D303"}, "sycophancy": set()} or found == {"swapped": {"D302"}, "sycophancy": set()}
