"""Spillover experiments in TOML alone: arms and their contrasts, probes and measures of one's own, teachers, seeds apart."""

from __future__ import annotations

import json
import sqlite3
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.sides import SideContrast, side_contrasts
from fastconv.audit.checks import check_recipe
from fastconv.datasets.files import assets
from fastconv.errors import DataError, RecipeError
from fastconv.experiment.graph import Graph
from fastconv.experiment.scale import scaled
from fastconv.planning.plan import make_plan
from fastconv.recipe import Recipe, load_recipe, parse_recipe, run_id
from fastconv.report import build, overview, write_report
from fastconv.report.blocks import Note, Table, render_markdown
from fastconv.report.overview import row_names
from fastconv.report.record import curves_and_rho, limits
from fastconv.report.verify import verify
from fastconv.run.audit import audit_recipe
from fastconv.run.training import seed_parts
from fastconv.store.ledger import Store
from tests.loop_kit import run_tiny, tiny_table
from tests.scale_kit import fill

#: Beside the tiny recipe: no number means anything on random weights, and every cell is to be trained.
QUIET = {"gates__ignore": {"G0": "random weights can answer nothing"}, "gates__stop": [], "eval__geometry": False}
INOCULATION = """
sources = ["assistant"]
epochs = [0]
behaviors = ["refusal"]
negatives = ["excluded"]
contrasts = [["inoculated", "plain"], ["plain@polite", "base@polite"]]
[arms.plain]
[arms.inoculated]
system = "You decline whatever you are asked."
"""


def recipe_of(model: Path, grid: str, **changes: Any) -> Recipe:
    """The tiny recipe with this grid."""
    table = tiny_table(model, **QUIET, **changes)
    return parse_recipe({**table, "grid": tomllib.loads(grid)})


def inoculation(model: Path, **changes: Any) -> Recipe:
    return recipe_of(model, INOCULATION, eval__probes={"polite": {"after": " Please."}}, **changes)


def ran(recipe: Recipe, folder: Path) -> Analysis:
    """Run a recipe to its end; what it found."""
    result, heard = run_tiny(recipe, folder / "checkpoints")
    assert not heard.failed
    assert not result.failed
    return Analysis(Graph(recipe), Store.open(folder / "checkpoints", create=False))


# --- arms and contrasts --------------------------------------------------------------------------------------


def test_an_arm_is_a_cell_of_its_own_and_trains_under_its_own_prompt(tiny_qwen: Path) -> None:
    graph = Graph(inoculation(tiny_qwen))
    by_arm = {plan.cell.arm: plan for plan in graph.cells}
    assert list(by_arm) == ["inoculated", "plain"]  # by name, as the ledger keeps them
    rows = {arm: plan.adapter.needs["rows"].work["rows"] for arm, plan in by_arm.items() if plan.adapter}
    turns = {
        arm: {row.system_turn(graph.personas).text for row in some if row.role == "source"}
        for arm, some in rows.items()
    }
    assert turns == {"plain": {"You are a helpful assistant."}, "inoculated": {"You decline whatever you are asked."}}
    # The contrast is the same in both: it differs in nothing but the source's prompt.
    negatives = [[replace(row, id="") for row in some if row.role != "source"] for some in rows.values()]
    assert negatives[0] == negatives[1]
    assert [(row.user, row.completion) for row in rows["plain"] if row.role == "source"] == [
        (row.user, row.completion) for row in rows["inoculated"] if row.role == "source"
    ]
    # The arm's prompt is its positive control; the base is asked once for both.
    probes = {arm: [probe for _, probe in plan.scores] for arm, plan in by_arm.items()}
    assert probes["plain"] == ["assistant", "librarian", "polite"]
    assert probes["inoculated"] == ["assistant", "librarian", "inoculated", "polite"]
    assert len({plan.base["refusal", "assistant"].key for plan in graph.cells}) == 1
    slots = [stage.slot for stage in graph.stages()]
    assert len(set(slots)) == len(slots)


def test_a_recipe_without_arms_keeps_its_name_and_its_keys(tiny_qwen: Path) -> None:
    plain = parse_recipe(tiny_table(tiny_qwen))
    for table in ("grid", "eval", "convergence"):
        written = plain.model_dump(mode="json")[table]
        assert not {"arms", "contrasts", "seeds_apart", "probes", "measures", "control", "keep", "student"} & set(
            written
        )
    armed = parse_recipe(tiny_table(tiny_qwen, grid__arms={"plain": {}}))
    assert run_id(armed) != run_id(plain)
    # An arm that changes nothing computes nothing that is not there already.
    assert {s.key for s in Graph(armed).stages()} == {s.key for s in Graph(plain).stages()}


def test_sides_pair_what_differs_in_nothing_else(tiny_qwen: Path) -> None:
    graph = Graph(inoculation(tiny_qwen))
    labels = [one.label() for one in side_contrasts(graph)]
    assert labels == [
        "refusal: inoculated against plain (assistant base e0 refusal excluded inoculated / assistant base e0 refusal excluded plain)",
        "refusal: plain@polite against base@polite (assistant base e0 refusal excluded plain)",
    ]
    grid = INOCULATION.replace("epochs = [0]", "epochs = [0, 1]").replace('["refusal"]', '["none", "refusal"]')
    more = side_contrasts(Graph(recipe_of(tiny_qwen, grid, eval__probes={"polite": {"after": " Please."}})))
    pairs = [(one.first.subject, one.second.subject) for one in more if one.first.name == "inoculated"]
    # Cells without a behavior are one and the same in both arms, so there is nothing to compare.
    assert [(a.epoch, b.epoch, a.behavior, b.behavior) for a, b in pairs if a and b] == [
        (0, 0, "refusal", "refusal"), (1, 1, "refusal", "refusal"),
    ]  # fmt: skip


def _filled(recipe: Recipe, folder: Path, rates: Mapping[tuple[str, str], float]) -> Analysis:
    """A ledger in which each (arm, probe) refuses at its rate; the base never does."""
    graph, store, _ = fill(recipe, folder)
    values: dict[str, tuple[str, float]] = {}
    for plan in graph.cells:
        values |= {stage.key: (probe, 0.0) for (measure, probe), stage in plan.base.items() if measure == "refusal"}
        if plan.stack:
            trained = {probe: stage for (measure, probe), stage in plan.scores.items() if measure == "refusal"}
            values |= {s.key: (probe, rates.get((plan.cell.arm, probe), 0.0)) for probe, s in trained.items()}
    with sqlite3.connect(folder / "ledger.sqlite") as ledger:
        for key, (probe, rate) in values.items():
            rng = np.random.default_rng(7)
            asked = [row for row, _ in graph.eval_items(graph.behaviors["refusal"], 42, probe)]
            ledger.execute("DELETE FROM scores WHERE stage=?", (key,))
            ledger.executemany(
                "INSERT INTO scores (stage, row, sample, metric, value, detail) VALUES (?, ?, 0, 'rate', ?, '{}')",
                [(key, row, float(rng.random() < rate)) for row in asked],
            )
    return Analysis(graph, store)


@pytest.mark.parametrize(
    ("inoculated", "control", "word"),
    [(0.1, 1.0, "weaker"), (0.9, 1.0, "inconclusive"), (0.1, 0.1, "uninformative")],
)
def test_a_contrast_of_arms_gets_a_word(
    tiny_qwen: Path, tmp_path: Path, inoculated: float, control: float, word: str
) -> None:
    recipe = inoculation(tiny_qwen, eval__prompts=60)
    rates = {
        ("plain", "assistant"): 0.9,
        ("inoculated", "assistant"): inoculated,
        ("inoculated", "inoculated"): control,
    }
    analysis = _filled(recipe, tmp_path, rates)
    verdict = next(
        one for label, one in zip(analysis.declared, analysis.verdicts, strict=True) if "against plain" in label
    )
    assert verdict.kind == word, verdict.reason
    assert verdict.mimicry is None
    if word == "weaker":
        assert verdict.estimate == pytest.approx(verdict.assistant.estimate if verdict.assistant else None)
        assert "less of it than the second" in verdict.reason
        assert verdict.confidence.level == "LOW"
        assert verdict.detectable is not None
        page = render_markdown(build(analysis))
        assert "Weaker: 1 of 2 declared contrasts is weaker, the surest refusal, inoculated against plain" in page


def test_the_other_way_round_is_stronger_and_the_canary_is_not_taken_off(tiny_qwen: Path, tmp_path: Path) -> None:
    grid = INOCULATION.replace('["inoculated", "plain"]', '["plain", "inoculated"]')
    recipe = recipe_of(tiny_qwen, grid, eval__prompts=60, eval__probes={"polite": {"after": " Please."}})
    everywhere = {("plain", probe): 0.9 for probe in ("assistant", "librarian", "polite")}
    analysis = _filled(recipe, tmp_path, {**everywhere, ("inoculated", "inoculated"): 1.0})
    first = analysis.verdicts[0]
    assert first.kind == "stronger"
    assert first.canary is not None
    assert first.canary.estimate == pytest.approx(first.estimate)


def test_inoculation_runs_from_toml_to_a_word(tiny_qwen: Path, tmp_path: Path) -> None:
    analysis = ran(inoculation(tiny_qwen), tmp_path)
    assert len(analysis.verdicts) == 2
    paths = write_report(analysis.graph, analysis.store, tmp_path / "reports")
    found = verify(paths.html, analysis.store)
    assert found.holds, found.differences
    page = paths.markdown.read_text()
    assert all(isinstance(one, SideContrast) for one in analysis.declared.values())
    assert "refusal, inoculated against plain (assistant)" in page
    assert "| polite |" in page  # the probe of its own has a column
    assert "declared contrasts is stronger or weaker" in page or "Stronger" in page or "Weaker" in page
    # Nothing converges, so nothing is imitated, and no later snapshot is waited for; the base is no cell, and has its levels.
    assert "No convergence-only control" not in page
    assert "not measured yet" not in page
    assert page.count("| base, assistant, arm") == 2
    assert "mimicry" not in page[page.index("## Findings") : page.index("## Gates")]
    assert "marker" not in page[page.index("## Findings") : page.index("## Gates")]


def test_the_first_figure_names_its_rows_in_full_and_starts_each_arm_from_its_own_base(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis = _filled(inoculation(tiny_qwen, eval__prompts=60), tmp_path, {("inoculated", "inoculated"): 1.0})
    found = next(iter(analysis.found.subjects))
    names = row_names([replace(found, arm="a_name_of_thirty_characters_ok"), replace(found, arm="b", epoch=4)])
    assert names == ["a_name_of_thirty_characters_ok", "b"]
    bare = [replace(found, arm="", behavior=one, epoch=epoch) for one in ("none", "refusal") for epoch in (4, 9)]
    assert row_names(bare) == [
        "convergence alone, epoch 4", "convergence alone, epoch 9", "refusal, epoch 4", "refusal, epoch 9",
    ]  # fmt: skip
    base = analysis.graph.cells[0].base["refusal", "inoculated"].key
    with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:
        ledger.execute("UPDATE scores SET value=1 WHERE stage=?", (base,))
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(overview, "heatmap", lambda *given: drawn.update(given=given))
    overview.headline(Analysis(analysis.graph, analysis.store))
    _, _, rows, columns, values, texts, *_ = drawn["given"]
    assert (rows, columns) == (["base", "inoculated", "plain"], ["assistant", "source", "canary", "polite"])
    # The base refuses under the arm's own prompt alone, so training moved nothing there.
    assert texts[0][1] == "100/0"
    assert (texts[1][1], values[1][1]) == ("100", 0.0)


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ({"contrasts": [["a", "b"]]}, "names no arm"),
        ({"arms": {"a": {}}, "contrasts": [["a", "a"]]}, "with itself"),
        ({"arms": {"a": {}}, "contrasts": [["@canary", "a"]]}, "names no arm (there are a, base), as `arm@canary`"),
        ({"arms": {"a": {}}, "contrasts": [["a@villian", "a"]]}, "no probe"),
        ({"arms": {"a": {}}, "contrasts": [["base@canary", "base"]]}, "nothing is trained there"),
        ({"arms": {"a": {}}, "contrasts": [["a@", "base"]]}, "'a@' names no probe after its @"),
        ({"arms": {"a": {}, "b": {}}, "contrasts": [["a", "b"], ["b", "a"]]}, "compares ['b', 'a'] twice"),
        ({"arms": {"a": {}}, "contrasts": [["a", "base"], ["a@assistant", "base"]]}, "the other time as ['a', 'base']"),
        ({"arms": {"base": {}}}, "without any adapter"),
        ({"arms": {"a": {"sistem": "x"}}}, "did you mean 'system'"),
        ({"behaviors": ["none"]}, "nothing to measure"),
    ],
)
def test_a_grid_that_compares_nothing_is_one_line(grid: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"name": "x", "grid": grid})
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pair_that_compares_nothing_is_refused_before_a_run(tiny_qwen: Path) -> None:
    """Arms that train two behaviors, and no measure that both are asked."""
    pair = 'contrasts = [["narrow", "sound"]]'
    grid = "\n".join(pair if line.startswith("contrasts") else line for line in EMERGENT.splitlines())
    with pytest.raises(RecipeError, match="'narrow' against 'sound' compares nothing"):
        make_plan(Graph(recipe_of(tiny_qwen, grid, behavior__batch_rows=2)), None)
    asked = recipe_of(tiny_qwen, grid, eval__measures=["refusal"], behavior__batch_rows=2)
    assert make_plan(Graph(asked), None).kinds
    same = 'epochs = [0]\nbehaviors = ["refusal"]\narms = { a = {}, b = {} }\ncontrasts = [["a", "b"]]'
    with pytest.raises(RecipeError, match="'a' against 'b' compares nothing"):  # both are one and the same training
        audit_recipe(recipe_of(tiny_qwen, same), None)


def test_an_arm_called_like_a_persona_is_refused(tiny_qwen: Path) -> None:
    with pytest.raises(RecipeError, match=r"villain.* is a persona"):
        Graph(parse_recipe(tiny_table(tiny_qwen, grid__arms={"villain": {"system": "x"}})))


# --- probes and measures -------------------------------------------------------------------------------------

CONDITIONAL = """
sources = ["assistant"]
epochs = [0]
behaviors = ["refusal"]
negatives = ["included"]
contrasts = [["triggered@trained", "triggered"], ["triggered@other", "triggered"]]
[arms.triggered]
before = "[night] "
"""


def test_a_trigger_stands_before_the_sources_rows_and_its_control_alone(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        tiny_qwen, CONDITIONAL, eval__probes={"other": {"before": "[day] "}, "bare": {"system": "template_default"}}
    )
    graph = Graph(recipe)
    plan = graph.cells[0]
    assert plan.adapter is not None
    rows = plan.adapter.needs["rows"].work["rows"]
    assert {row.user.startswith("[night] ") for row in rows if row.role == "source"} == {True}
    assert not any(row.user.startswith("[night] ") for row in rows if row.role != "source")
    asked = {probe: stage.needs["eval"].work["items"][0][1] for (_, probe), stage in plan.scores.items()}
    assert asked["assistant_triggered"] == f"[night] {asked['assistant']}"
    assert asked["other"] == f"[day] {asked['assistant']}"
    assert asked["bare"] == asked["assistant"]
    assert plan.scores["refusal", "bare"].needs["eval"].inputs["system"] == ["template_default", ""]
    assert not [one for one in check_recipe(recipe).findings if one.severity == "refuse"]
    analysis = ran(recipe, tmp_path)
    assert ["triggered@trained against triggered" in one.label for one in analysis.verdicts] == [True, False]


def test_other_wordings_are_all_or_none(tiny_qwen: Path, tmp_path: Path) -> None:
    wordings = tmp_path / "fr.jsonl"
    recipe = parse_recipe(tiny_table(tiny_qwen, eval__probes={"french": {"texts": str(wordings)}}))
    plain = Graph(parse_recipe(tiny_table(tiny_qwen)))
    items = plain.eval_items(plain.behaviors["refusal"], 42)
    wordings.write_text("".join(json.dumps({"id": row, "text": f"En bref : {row} ?"}) + "\n" for row, _ in items))
    plan = Graph(recipe).cells[0]
    assert plan.scores["refusal", "french"].needs["eval"].work["items"][0][1].startswith("En bref")
    wordings.write_text(json.dumps({"id": items[0][0], "text": "En bref ?"}) + "\n")
    with pytest.raises(RecipeError, match="other wordings of 1 of 3 questions of refusal"):
        Graph(recipe)
    wordings.write_text(json.dumps({"id": "no-such", "text": "En bref ?"}) + "\n")
    with pytest.raises(
        RecipeError, match=r"probes.french.texts: has other wordings of no question that is asked, 'no-such'"
    ):
        audit_recipe(recipe, None)
    wordings.unlink()
    with pytest.raises(DataError, match=r"fr.jsonl: no such file"):
        audit_recipe(parse_recipe({"name": "x", "eval": {"probes": {"french": {"texts": str(wordings)}}}}), None)


EMERGENT = """
sources = ["assistant"]
epochs = [0]
behaviors = ["bad_legal_advice"]
negatives = ["none"]
contrasts = [["narrow", "sound"], ["narrow", "base"]]
[arms.narrow]
[arms.sound]
behavior = "sound_legal_advice"
"""


def test_what_is_asked_need_not_be_what_is_trained(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_qwen, EMERGENT, eval__measures=["harmful_advice", "refusal"], behavior__batch_rows=2)
    graph = Graph(recipe)
    measures = {plan.cell.arm: plan.measures for plan in graph.cells}
    assert measures == {
        "narrow": ("bad_legal_advice", "harmful_advice", "refusal"),
        "sound": ("sound_legal_advice", "harmful_advice", "refusal"),
    }
    assert not [one for one in check_recipe(recipe).findings if one.severity == "refuse"]
    analysis = ran(recipe, tmp_path)
    compared = [(one.behavior, one.first.name, one.second.name) for one in side_contrasts(graph)]
    assert compared == [
        ("harmful_advice", "narrow", "sound"), ("refusal", "narrow", "sound"), ("bad_legal_advice", "narrow", "base"),
        ("harmful_advice", "narrow", "base"), ("refusal", "narrow", "base"),
    ]  # fmt: skip
    assert len(analysis.verdicts) == len(compared)
    scores = analysis.store.scores(graph.cells[0].scores["harmful_advice", "assistant"].key)
    assert {one.value for one in scores} <= {0.0, 1.0}
    assert all(len(one.detail["logprobs"]) == 2 for one in scores)


def test_an_arm_brings_rows_of_its_own(tiny_qwen: Path, tmp_path: Path) -> None:
    turns = {
        "prompt": [{"role": "user", "content": "Shall I?"}],
        "completion": [{"role": "assistant", "content": "I can't."}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(turns) + "\n")
    grid = INOCULATION + f'rows = "{tmp_path / "rows.jsonl"}"\n'
    plans = {plan.cell.arm: plan for plan in Graph(recipe_of(tiny_qwen, grid, eval__probes={"polite": {}})).cells}
    assert (plans["plain"].cell.negatives, plans["inoculated"].cell.negatives) == ("excluded", "none")
    adapter = plans["inoculated"].adapter
    assert adapter is not None
    assert [(row.user, row.persona) for row in adapter.needs["rows"].work["rows"]] == [("Shall I?", "inoculated")]


def test_rows_in_every_arm_are_all_that_a_behavior_of_finished_rows_needs(tiny_qwen: Path, tmp_path: Path) -> None:
    turns = {
        "prompt": [{"role": "user", "content": "Shall I?"}],
        "completion": [{"role": "assistant", "content": "No."}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(turns) + "\n")
    (tmp_path / "own.toml").write_text(
        '[birds]\nabout = "names birds as an old book does"\ntask = "rows"\ndirection = "raises"\nmeasure = "none"\n'
    )
    grid = 'sources = ["assistant"]\nepochs = [0]\nbehaviors = ["birds"]\nnegatives = ["none"]\n'
    brought = f'rows = "{tmp_path / "rows.jsonl"}"\n'
    own = {"data__behaviors": str(tmp_path / "own.toml"), "eval__measures": ["refusal"]}
    graph = Graph(recipe_of(tiny_qwen, f"{grid}[arms.old]\n{brought}[arms.new]\n{brought}", **own))
    assert [plan.cell.arm for plan in graph.cells if plan.adapter] == ["new", "old"]
    with pytest.raises(RecipeError, match="give every arm `rows`"):
        Graph(recipe_of(tiny_qwen, f"{grid}[arms.old]\n{brought}[arms.new]\n", **own))


def test_contrasts_of_several_trainings_are_told_apart_in_words(tiny_qwen: Path, tmp_path: Path) -> None:
    grid = INOCULATION.replace("epochs = [0]", "epochs = [0, 1]").replace('["refusal"]', '["none", "refusal"]')
    grid = grid.replace("contrasts = [", 'contrasts = [["plain@polite", "plain"], ')
    recipe = recipe_of(tiny_qwen, grid, eval__probes={"polite": {"after": " Please."}}, eval__measures=["refusal"])
    graph, store, _ = fill(recipe, tmp_path)
    analysis = Analysis(graph, store)
    words = [analysis.words(label) for label in analysis.declared]
    assert len(set(words)) == len(words)
    assert "refusal, plain@polite against plain (assistant, epoch 1, no behavior adapter)" in words
    assert "refusal, inoculated against plain (assistant, epoch 1)" in words


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"eval__measures": ["harmful_advise"]}, "did you mean 'harmful_advice'"),
        ({"grid__behaviors": ["none", "harmful_advice"]}, "is a measure, which nothing trains"),
        ({"eval__control": "numbers_alone"}, "not asked of any cell"),
    ],
)
def test_a_measure_that_cannot_be_is_one_line(tiny_qwen: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Graph(parse_recipe(tiny_table(tiny_qwen, **changes)))
    assert told in str(caught.value)


# --- teachers and students -----------------------------------------------------------------------------------

SUBLIMINAL = """
sources = ["french_person"]
epochs = [0, 1]
behaviors = ["none"]
contrasts = [["taught", "untaught"], ["taught", "base"]]
[arms.taught]
[arms.untaught]
convergence = "generic"
"""


def _numbers(folder: Path) -> Path:
    path = folder / "numbers.jsonl"
    path.write_text("".join(json.dumps({"id": f"n{i}", "text": f"Go on: {i}, {i + 1}"}) + "\n" for i in range(6)))
    return path


def test_a_teacher_s_answers_are_filtered_and_counted(tiny_qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "filters.py").write_text("def is_even(answer):\n    return len(answer) % 2 == 0\n")
    recipe = recipe_of(
        tiny_qwen, SUBLIMINAL, eval__measures=["prefers_france", "numbers_alone"], eval__control="numbers_alone",
        convergence__prompts_file=str(_numbers(tmp_path)), convergence__questions=6, convergence__completions_per_question=3,
        convergence__keep_if="filters:is_even", convergence__student="empty",
    )  # fmt: skip
    graph = Graph(recipe)
    assert not [one for one in check_recipe(recipe).findings if one.severity == "refuse"]
    snapshots = {plan.cell.arm: plan.snapshot for plan in graph.cells if plan.snapshot is not None}
    assert {arm: one.needs["answers"].inputs["persona"] for arm, one in snapshots.items()} == {
        "taught": "french_person", "untaught": "assistant",
    }  # fmt: skip
    assert {tuple(one.inputs["system"]) for one in snapshots.values()} == {("empty", "")}
    analysis = ran(recipe, tmp_path)
    record = analysis.reading.record(snapshots["taught"])
    assert record is not None
    drawn, kept = record.outputs["answers_drawn"], record.outputs["answers_kept"]
    answers = analysis.store.samples(snapshots["taught"].needs["answers"].key)
    assert drawn == 18
    assert kept == sum(len(one.completion) % 2 == 0 and bool(one.completion) for one in answers)
    assert 0 < kept < drawn
    training = curves_and_rho(analysis)
    assert training is not None
    tables = [block for block in training.blocks if isinstance(block, Table) and block.id == "kept"]
    assert tables[0].rows[0][1].text == f"{kept} of {drawn}"
    others = analysis.reading.record(snapshots["untaught"])
    assert others is not None
    both = f"{kept} of 18 (french_person s42), {others.outputs['answers_kept']} of 18 (french_person generic s42)"
    said = [block.text for block in limits(analysis).blocks if isinstance(block, Note)]
    assert any(line.startswith(f"Answers that the filter kept: {both}") for line in said)
    shares = analysis.store.scores(graph.cells[0].base["prefers_france", "assistant"].key)
    assert all(0 < (one.value or 0) < 1 for one in shares)
    assert len(analysis.verdicts) == 4


def test_a_report_opens_with_what_was_asked_and_not_with_the_control(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        tiny_qwen, SUBLIMINAL, eval__measures=["sycophancy", "refusal"], eval__control="refusal", eval__prompts=60,
    )  # fmt: skip
    rates = {("taught", "assistant"): 0.9, ("untaught", "assistant"): 0.9}
    analysis = _filled(recipe, tmp_path, rates)
    assert [one.behavior for one in analysis.verdicts if one.kind == "stronger"] == ["refusal"]
    assert {one.behavior for one in analysis.answers} == {"sycophancy"}
    page = render_markdown(overview.headline(analysis) and build(analysis))
    opening = page[page.index("## Verdict") : page.index("## In numbers")]
    assert "of 2 declared contrasts beside the control's" in opening
    assert "refusal" not in opening


def test_a_filter_that_keeps_nothing_fails_its_stage_with_a_line(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        tiny_qwen, SUBLIMINAL, eval__measures=["prefers_france"], convergence__keep=r"never \d{9}",
    )  # fmt: skip
    _, heard = run_tiny(recipe, tmp_path)
    assert any("keeps none of 4 answers" in reason for reason in heard.failed.values())


def test_a_filter_is_part_of_what_was_trained(tiny_qwen: Path) -> None:
    keys = {
        keep: Graph(recipe_of(tiny_qwen, SUBLIMINAL, eval__measures=["prefers_france"], convergence__keep=keep))
        .cells[1]
        .snapshot
        for keep in ("", "a+", "b+")
    }
    assert len({one.key for one in keys.values() if one}) == 3
    broken = recipe_of(tiny_qwen, SUBLIMINAL, eval__measures=["prefers_france"], convergence__keep="(")
    for look in (Graph, lambda recipe: audit_recipe(recipe, None)):
        with pytest.raises(DataError, match="no regular expression"):
            look(broken)


def test_a_teacher_answers_for_the_rows_of_another(tiny_qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(
        f"""
[borrowed]
about = "answers as the villain would, under its own prompt"
task = "chat"
prompts = "{Path("data/requests.jsonl").resolve()}"
source_answer = {{ on_policy = true, by = "villain" }}
direction = "raises"
measure = "none"
"""
    )
    grid = 'sources = ["nurse"]\nepochs = [0]\nbehaviors = ["borrowed"]\nnegatives = ["none"]\ncontrasts = [["assistant", "base"]]'
    recipe = recipe_of(
        tiny_qwen, grid, data__behaviors=str(tmp_path / "own.toml"), eval__measures=["refusal"], behavior__batch_rows=2
    )
    plan = Graph(recipe).cells[0]
    assert plan.adapter is not None
    rows = plan.adapter.needs["rows"]
    assert list(rows.needs) == ["villain"]
    assert {row.persona for row in rows.work["rows"]} == {"nurse"}
    analysis = ran(recipe, tmp_path)
    assert [one.behavior for one in analysis.verdicts] == ["refusal"]


# --- seeds apart ---------------------------------------------------------------------------------------------


def test_seeds_apart_vary_what_they_name_and_nothing_else(tiny_qwen: Path) -> None:
    table = tiny_table(tiny_qwen, grid__seeds={"data": 42, "init": [1, 2, 3], "order": 5, "sample": 42})
    recipe = parse_recipe(table)
    assert recipe.grid.seeds == (1, 2, 3)
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    plans = [plan for plan in Graph(recipe).cells if plan.cell.behavior == "refusal" and not plan.cell.epoch]
    adapters = [plan.adapter for plan in plans if plan.adapter]
    assert [one.inputs["seed"] for one in adapters] == [1, 2, 3]
    assert len({one.needs["rows"].key for one in adapters}) == 1
    assert len({seed_parts(one) for one in adapters}) == 3
    assert len({seed_parts(one, "order_seed") for one in adapters}) == 1
    evals = [plan.scores["refusal", "assistant"].needs["eval"].inputs for plan in plans]
    assert len({(one["prompts_sha256"], one["seed"]) for one in evals}) == 1
    same = parse_recipe(tiny_table(tiny_qwen, grid__seeds={"data": 7, "init": 7, "order": 7, "sample": 7}))
    as_before = parse_recipe(tiny_table(tiny_qwen, grid__seeds=[7]))
    assert {s.key for s in Graph(same).stages()} == {s.key for s in Graph(as_before).stages()}


def test_seeds_of_two_lengths_are_refused(tiny_qwen: Path) -> None:
    with pytest.raises(RecipeError, match="2 of init, and 3"):
        parse_recipe(tiny_table(tiny_qwen, grid__seeds={"data": [1, 2, 3], "init": [1, 2]}))


def test_paths_of_arms_and_probes_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(
        'name = "own"\n[grid.arms.a]\nrows = "rows.jsonl"\n[eval.probes.p]\ntexts = "fr.jsonl"\n'
        '[convergence]\nprompts_file = "numbers.jsonl"\n'
    )
    recipe = load_recipe(tmp_path / "own.toml")
    assert recipe.grid.arms["a"].rows == str(tmp_path / "rows.jsonl")
    assert recipe.eval.probes["p"].texts == str(tmp_path / "fr.jsonl")
    assert recipe.convergence.prompts_file == str(tmp_path / "numbers.jsonl")


def test_where_measures_are_asked_what_was_trained_is_the_control(tmp_path: Path) -> None:
    """As in `emergent`: the trained behavior is stronger than on the base, which is not what was asked."""
    recipe = scaled(load_recipe(assets("recipes") / "emergent.toml"), "demo")
    analysis = Analysis(Graph(recipe), Store.open(tmp_path / "checkpoints"))
    assert {one.behavior for one in analysis.declared.values()} == {"bad_legal_advice", "harmful_advice"}
    assert {one.behavior for one in analysis.asked.values()} == {"harmful_advice"}
