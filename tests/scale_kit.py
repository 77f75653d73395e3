"""A synthetic ledger of a whole matrix: every stage's row and scores drawn from named parts, nothing computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fastconv.experiment.graph import Graph
from fastconv.recipe import Recipe, canonical_json, parse_recipe, recipe_sha256, run_id
from fastconv.seeding import seed_of
from fastconv.store.ledger import Store
from fastconv.store.records import Sample, Score, Stage

BEHAVIORS = ("refusal", "sycophancy", "marker")
#: The judge of a judged recipe, and the sha256 of its rubric, as its scores name them.
JUDGE, RUBRIC = "a-judge", "5" * 64


def matrix_recipe(model: Path, *, n_sources: int = 4, seeds: int = 3, prompts: int = 50, samples: int = 5) -> Recipe:
    """At most five sources, two kinds of negatives, epochs 0, 2, 8, 20 and three behaviors: 96 cells for each seed, and controls."""
    sources = ["villain", "comedian", "software_engineer", "kindergarten_teacher", "police_officer"][:n_sources]
    return parse_recipe(
        {
            "name": "matrix",
            "about": "a synthetic matrix",
            "model": {"id": str(model), "device": "cpu"},
            "grid": {
                "sources": sources, "epochs": [0, 2, 8, 20], "behaviors": ["none", *BEHAVIORS],
                "negatives": ["included", "excluded"], "seeds": list(range(seeds)),
            },
            "behavior": {"source_rows": 8},
            "eval": {"prompts": prompts, "samples_per_prompt": samples, "multiple_choice": "builtin"},
        }
    )  # fmt: skip


def fill(recipe: Recipe, workspace: Path) -> tuple[Graph, Store, int]:
    """Write every stage of the recipe as if it had run; returns the number of scores."""
    graph, store = Graph(recipe), Store.open(workspace)
    run = run_id(recipe)
    store.start_run(run, canonical_json(recipe.model_dump(mode="json")), recipe_sha256(recipe), recipe.name, {})
    about = {}
    for plan in graph.cells:
        for (measure, probe), stage in (*plan.base.items(), *plan.scores.items(), *plan.beside.items()):
            about[stage.key] = (measure, probe, plan.cell if stage not in plan.base.values() else None)
        about |= {stage.key: (measure, probe, plan.cell) for (_, measure, probe), stage in plan.replicates.items()}
    n_scores = 0
    for stage in graph.stages():
        samples, scores = [], []
        outputs: dict[str, object] = {"n": len(stage.work.get("rows", ()))}
        if stage.kind in ("snapshot", "behavior"):
            losses = np.linspace(2.0, 0.5, 60).round(6).tolist()
            rho = {"least": 0.01, "median": 0.02, "greatest": 0.03}
            outputs |= {"adapter": stage.key, "losses": losses, "last_epoch_loss": 0.52, "rho": rho, "from_base": 1.0}
        if stage.kind == "rows":
            outputs["rows"] = stage.key
        if stage.kind == "geometry":
            outputs["layers"] = [1, 2]
            scores = _geometry(stage)
        if stage.kind == "eval":
            outputs |= {"from_base": 1.0, "from_recorded": 0.0}
            row, user = stage.work["items"][0]
            samples = [Sample(row, 0, stage.work["probe"], user, "an answer", 3, True)]
        if stage.kind in ("score", "judge"):
            measure, probe, cell = about[stage.key]
            drawn = stage.key if graph.judge is None else stage.needs["eval"].key  # the same answers, read twice
            scores = _scores(recipe, measure, probe, cell, graph, drawn)
            scores = _as_judged(scores, stage.key) if stage.kind == "judge" else scores
            n_scores += len(scores)
        store.commit(stage, outputs=outputs, facts={"sampled_tok": 10}, seconds=1.5, samples=samples, scores=scores)
        store.note_stage_of_run(run, stage, reused=False)
    store.finish_run(run)
    return graph, store, n_scores


def _geometry(stage: Stage) -> list[Score]:
    """Cosine and distinctiveness of every persona at two depths."""
    rng = np.random.default_rng(seed_of("geometry", stage.key))
    return [
        Score(persona, layer, metric, round(float(rng.random()), 3), None, {})
        for persona, *_ in stage.inputs["personas"]
        for layer in (1, 2)
        for metric in ("cosine", "distinctiveness")
    ]


def _scores(recipe: Recipe, measure: str, probe: str, cell: object, graph: Graph, key: str) -> list[Score]:
    """Rates: the source shows what it was trained on, the villain's assistant takes some of it over, the rest nothing."""
    rng = np.random.default_rng(seed_of("scale", key))
    behavior = getattr(cell, "behavior", "none")
    rate = 0.05
    if behavior == measure:
        rate = 0.9 if probe == getattr(cell, "source", "") else 0.05
        if probe == "assistant" and getattr(cell, "source", "") == "villain":
            rate += 0.02 * getattr(cell, "epoch", 0)
    seed = getattr(cell, "seed", 0)
    return [
        Score(row, i, "rate", float(rng.random() < rate), None, {"phrase": None})
        for row, _ in graph.eval_items(graph.behaviors[measure], seed)
        for i in range(recipe.eval.samples_per_prompt)
    ]


def _as_judged(scores: list[Score], key: str) -> list[Score]:
    """What a judge says of the same answers: one in twenty otherwise."""
    others = np.random.default_rng(seed_of("judge", key)).random(len(scores)) < 0.05
    detail = {"rubric": RUBRIC, "model": JUDGE}
    return [
        replace(one, value=1 - (one.value or 0.0) if other else one.value, detail=detail)
        for one, other in zip(scores, others, strict=True)
    ]
