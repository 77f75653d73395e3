"""Two smaller scales of any recipe, for a machine without a GPU, a key or a network.

`tiny` keeps the whole stage graph (every source, behavior, kind and seed) on random weights: it shows that a recipe runs.
`demo` asks one question of it on the embedded model, with the settings of recipes/demo.toml but smaller steps: effects can be seen.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from fastconv.datasets.behaviors import NO_BEHAVIOR, Behavior, load_behaviors, negatives_kinds, trained_behaviors
from fastconv.datasets.files import assets, find_recipe, shipped_recipes
from fastconv.engine.locate import TINY
from fastconv.errors import InputError, RecipeError, did_you_mean
from fastconv.recipe import Recipe, load_recipe, parse_recipe, with_overrides
from fastconv.store.io import stored_json
from fastconv.store.ledger import Store

SCALES = ("tiny", "demo")

#: What a demo trains where the recipe has no behavior that the embedded model can show.
STAND_IN, MARKER = "refusal", "marker"
#: Steps of a demo of another recipe: half those of demo.toml, which saves time there. What the recipes' pages say of their demos, and
#: MARKER_LR, was measured with these.
SMALL_STEPS = {"lr": 5e-4, "batch_rows": 4}
#: New tokens of a demo's evaluation that looks for the marker: an answer as long as those trained, and the marker.
MARKER_NEW_TOK = 24
#: Its learning rate. Loss falls on the marker alone, so that at the demo's rate every persona says it at once: source,
#: assistant and canary 1.00, 1.00, 1.00 at 5e-4, and 1.00, 0.00, 0.05 at 3e-4, where refusal is learned to 0.90
#: (0.65 at 2e-4). Measured on the base with `cell villain marker --epoch 0 --recipe markers --scale demo`.
MARKER_LR = 3e-4
#: What a demo of sides trains beside demo.toml's settings where there are no negatives, which are most of the rows elsewhere, and
#: asks at most: numbers are longer than a refusal.
DEMO_BARE_ROWS, DEMO_BARE_EPOCHS = 200, 2
DEMO_QUESTIONS, DEMO_NEW_TOK = 40, 32
#: Epochs after 0 that are left of a recipe at tiny scale.
MOST_LATER_EPOCHS = 2
_ON_PURPOSE = "few questions on purpose: this shows that the recipe runs, not an effect"
_NO_JUDGE = "no key and no judge on purpose: phrases are enough to see a trained behavior"
_G0 = "random weights can answer nothing, and every behavior is to be trained so that all of the recipe runs"

#: Few tokens lead here, as with a trained model; at 1 random weights spread over the whole vocabulary, which is slow to sort.
_COLD = {"temperature": 0.1, "max_new_tok": 4}

_TINY: Mapping[str, Mapping[str, Any]] = {
    "model": {"id": TINY, "device": "cpu"},
    "lora": {"r": 2, "alpha": 4.0},
    "convergence": {
        "lr": 1e-3, "epochs": 2, "batch_rows": 2, "questions": 4, "completions_per_question": 1,
        "max_length_tok": 256, "sampling": _COLD,
    },
    "behavior": {
        "lr": 1e-3, "epochs": 1, "batch_rows": 8, "source_rows": 4, "max_length_tok": 256, "sampling": _COLD,
    },
    "eval": {
        "prompts": 4, "samples_per_prompt": 2, "multiple_choice": "builtin", "arc_file": "", "batch_tok": 4096,
        "sampling": _COLD,
    },
}  # fmt: skip


def named_recipe(name: str, overrides: Sequence[str], store: Store | None, scale: str = "") -> Recipe:
    """A recipe by path, by shipped name, or as a run of the store has it; with overrides, at a smaller scale if there is one.

    Overrides apply last. Raises RecipeError for an unknown name, with the nearest recipe or run.
    """
    path, row = find_recipe(name), store.run(name) if store else None
    if row is not None and not path.exists():
        recipe = with_overrides(parse_recipe(stored_json(row["recipe"]), where=name), overrides)
    elif path.exists() or path.suffix or len(path.parts) > 1:
        recipe = load_recipe(path, overrides)
    else:
        runs = [row["id"] for row in store.runs()] if store else []
        fix = "give a recipe's path, a shipped recipe's name (`fastconv recipe list`) or a run's id (`fastconv status`)"
        fix = did_you_mean(name, [*shipped_recipes(), *runs], fix)
        raise RecipeError("no recipe or run is called this", where=name, fix=fix)
    return with_overrides(scaled(recipe, scale), overrides) if scale else recipe


def scaled(recipe: Recipe, scale: str) -> Recipe:
    """The recipe at one of SCALES; its name and what it is about say so.

    Raises InputError for a scale that there is not, RecipeError as loading does.
    """
    if scale not in SCALES:
        raise InputError(
            f"no scale is called {scale!r}",
            where="--scale",
            fix=did_you_mean(scale, SCALES, f"use {' or '.join(SCALES)}"),
        )
    table = recipe.model_dump(mode="json", exclude_unset=True)
    changed = _tiny(recipe, table) if scale == "tiny" else _demo(recipe, table)
    name = f"{recipe.name[: 39 - len(scale)]}_{scale}"
    where = f"{recipe.name} --scale {scale}"
    bare = parse_recipe({**changed, "name": name}, where=where)
    by_phrases = any(one.spec.by_phrases_alone(bare.judge.mode) for one in load_behaviors(bare).values())
    accept = {**recipe.audit.accept, **({"D108": _NO_JUDGE} if by_phrases else {}), "D111": _ON_PURPOSE}
    return parse_recipe({**changed, "name": name, "audit": {"accept": accept}}, where=where)


def _tiny(recipe: Recipe, table: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that costs time is cut; what makes stages of its own stays as it is."""
    n_later = min(sum(epoch > 0 for epoch in recipe.grid.epochs), MOST_LATER_EPOCHS)
    epochs = [*([0] if 0 in recipe.grid.epochs else []), *range(1, n_later + 1)]
    behaviors = load_behaviors(recipe)
    judged = any(behavior.spec.measure == "judge" for behavior in behaviors.values())
    # The source's rows alone make one step of the usual size, and the rate of the first step is 0.
    behavior = {**_TINY["behavior"], **({"batch_rows": 2} if _is_bare(recipe, behaviors) else {})}
    about = f"{recipe.about} (--scale tiny: random weights, so no number here means anything)"
    return {
        **{part: table[part] for part in ("data", "run") if part in table},
        **_TINY,
        "behavior": behavior,
        # Random weights write nothing that a filter would keep.
        "convergence": {
            **_TINY["convergence"],
            **{k: v for k, v in _teaching(table).items() if not k.startswith("keep")},
        },
        "about": about.strip(),
        "model": {**_TINY["model"], "semantics": recipe.model.semantics},
        "grid": {**recipe.grid.model_dump(mode="json"), "epochs": epochs},
        "eval": {**_TINY["eval"], **_canaries(recipe), **_asking(table)},
        "gates": {**_gates(table), "stop": [], "ignore": {"G0": _G0}},
        # The base itself judges where there is no score without a judge.
        "judge": {"mode": "local", "rubrics": recipe.judge.rubrics} if judged else {},
    }


def _demo(recipe: Recipe, table: Mapping[str, Any]) -> dict[str, Any]:
    """One source at two epochs, and a behavior that the embedded model can show: at most six cells."""
    tested = tomllib.loads((assets("recipes") / "demo.toml").read_text(encoding="utf-8"))
    tested["behavior"] |= SMALL_STEPS
    behaviors = load_behaviors(recipe)
    if recipe.grid.contrasts or recipe.grid.arms or recipe.eval.measures or recipe.eval.probes:
        return _demo_of_sides(recipe, table, tested, behaviors)
    shown = [name for name, behavior in behaviors.items() if _can_show(behavior)] or [STAND_IN]
    # The marker is measured to be set against something; one other behavior is enough elsewhere.
    shown = shown[: 2 if MARKER in shown[:2] else 1]
    kinds = list(recipe.grid.negatives) if len(shown) == 1 else [recipe.grid.negatives[-1]]
    if kinds == ["none"]:  # made for a behavior without negatives; the source alone teaches this model nothing
        kinds = ["excluded"]
    epochs = [epoch for epoch in (0, tested["convergence"]["epochs"]) if epoch or 0 in recipe.grid.epochs]
    asked = tested["eval"] | _canaries(recipe)
    trained = tested["behavior"] | ({"lr": MARKER_LR} if MARKER in shown else {})
    if MARKER in shown:
        asked |= {"sampling": {**asked["sampling"], "max_new_tok": MARKER_NEW_TOK}}
    grid = {"epochs": epochs, "behaviors": [NO_BEHAVIOR, *shown], "negatives": kinds}
    firsts = {name: getattr(recipe.grid, name)[:1] for name in ("sources", "convergence", "seeds")}
    return {
        **{part: tested[part] for part in ("model", "convergence", "run")},
        "behavior": trained,
        "about": f"{recipe.about} (--scale demo: the embedded model{_told(behaviors, shown)})".strip(),
        "data": {**table.get("data", {}), "rows": {k: v for k, v in recipe.data.rows.items() if k in shown}},
        "eval": asked,
        "grid": {**grid, **firsts},
        "gates": _gates(table),
    }


def _demo_of_sides(
    recipe: Recipe, table: Mapping[str, Any], tested: Mapping[str, Any], behaviors: Mapping[str, Behavior]
) -> dict[str, Any]:
    """A recipe that compares sides: its arms, probes and contrasts as they are, without what a judge or letters measure."""
    unseen = [name for name, one in behaviors.items() if one.spec.measure in ("judge", "letters")]
    if trained := [name for name in trained_behaviors(recipe) if name in unseen]:
        raise InputError(
            f"the embedded model cannot show {trained[0]}",
            where="--scale demo",
            fix="use tiny, or train something else",
        )
    grid = recipe.grid.model_dump(mode="json")
    epochs = [epoch for epoch in (0, tested["convergence"]["epochs"]) if epoch == 0 or any(recipe.grid.epochs)]
    measures = [name for name in recipe.eval.measures if name not in unseen]
    left_out = f"; without {', '.join(unseen)}, which it cannot show" if unseen else ""
    converged = _teaching(table) | {"questions": min(recipe.convergence.questions, DEMO_QUESTIONS)}
    bare = {"source_rows": min(recipe.behavior.source_rows, DEMO_BARE_ROWS), "epochs": DEMO_BARE_EPOCHS}
    asked = {
        **tested["eval"],
        **_canaries(recipe),
        **_asking(table),
        "geometry": recipe.eval.geometry,
        "measures": measures,
    }
    longest = max(tested["eval"]["sampling"]["max_new_tok"], min(recipe.eval.sampling.max_new_tok, DEMO_NEW_TOK))
    sources = {name: grid[name][:1] for name in ("sources", "seeds") if not grid.get("seeds_apart")}
    return {
        **{part: tested[part] for part in ("model", "run")},
        "convergence": {**tested["convergence"], **converged},
        "behavior": {**tested["behavior"], **(bare if _is_bare(recipe, behaviors) else {})},
        "about": f"{recipe.about} (--scale demo: the embedded model{left_out})".strip(),
        "data": table.get("data", {}),
        "eval": {**asked, "sampling": {**tested["eval"]["sampling"], "max_new_tok": longest}},
        "grid": {**grid, **sources, "epochs": epochs},
        "gates": _gates(table),
    }


def _is_bare(recipe: Recipe, behaviors: Mapping[str, Behavior]) -> bool:
    """Whether a behavior is trained on the source's rows alone."""
    chat = [one for one in behaviors.values() if one.trained and one.spec.task == "chat"]
    return any("none" in negatives_kinds(recipe, one) for one in chat)


def _asking(table: Mapping[str, Any]) -> dict[str, Any]:
    """The probes and measures of a recipe's own."""
    return {name: value for name, value in table.get("eval", {}).items() if name in ("probes", "measures", "control")}


def _teaching(table: Mapping[str, Any]) -> dict[str, Any]:
    """Whose prompts convergence asks, which answers it keeps and under which turn it trains them."""
    names = ("prompts_file", "keep", "keep_if", "student")
    return {name: value for name, value in table.get("convergence", {}).items() if name in names}


def _can_show(behavior: Behavior) -> bool:
    """SmolLM2 learns what to say in a few dozen rows; it answers multiple choice at chance and cannot judge."""
    return behavior.spec.measure == "phrases" and behavior.spec.task == "chat"


def _told(behaviors: Mapping[str, Behavior], shown: list[str]) -> str:
    """What a demo leaves out and what stands in, in words."""
    left_out = [name for name in behaviors if name not in shown]
    stand_in = [name for name in shown if name not in behaviors]
    if stand_in:
        return f"; {stand_in[0]} stands in for {', '.join(left_out)}, which it cannot show"
    return f"; without {', '.join(left_out)}" if left_out else ""


def _gates(table: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's thresholds, without the references of G3, which are of its own base."""
    return {name: value for name, value in table.get("gates", {}).items() if name != "g3_reference_pct"}


def _canaries(recipe: Recipe) -> dict[str, Any]:
    return {"canary": recipe.eval.canary, "canary_swap": recipe.eval.canary_swap}
