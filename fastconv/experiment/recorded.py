"""The graph of a run that is read, on whatever machine: a laptop or a login node has another engine, and perhaps not the base.
No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastconv.errors import ModelError, StoreError
from fastconv.experiment.graph import ENGINE_INPUTS, Graph
from fastconv.recipe import ModelSettings, Recipe, run_id
from fastconv.store.io import stored_json
from fastconv.store.ledger import Store


def graph_of_run(recipe: Recipe, store: Store) -> Graph:
    """The graph of a recipe with the keys that its stages here were computed with.

    These are this machine's if it has computed, tried or begun any of them, else those of the engine that computed most.
    Raises ModelError where the base is not here and nothing was computed with it either.
    """
    graphs = graphs_of_run(recipe, store)
    if not graphs:
        return Graph(recipe)  # which says what is missing
    done = {key for (key,) in store.rows("SELECT key FROM stages")}
    touched = done | set(store.live_leases()) | set(store.failures())
    if any(stage.key in touched for stage in graphs[0].stages()):
        return graphs[0]
    return max(graphs, key=lambda graph: sum(stage.key in done for stage in graph.stages()))


def graphs_of_run(recipe: Recipe, store: Store) -> list[Graph]:
    """The graph of a recipe as this machine keys it, if its base is here, and as every engine does that may have computed it
    in this workspace: with this base, where the settings leave the engine open, if runs with the same model settings are here."""
    try:
        own = [Graph(recipe)]
    except ModelError:
        own = []
    here, bases = [graph.engine_inputs for graph in own], _bases_of_model(recipe, store)
    if own and bases:
        bases = [here[0]["base"]]
    others = [engine for engine in store.engines(ENGINE_INPUTS) if engine not in here and engine["base"] in bases]
    return own + [Graph(recipe, engine) for engine in others if _is_open_to(recipe.model, engine)]


def _is_open_to(settings: ModelSettings, engine: Mapping[str, Any]) -> bool:
    """Whether these settings are computed with such inputs on some machine."""
    named = engine["engine"]
    asked = {"engine": settings.engine, "device": settings.device, "dtype": settings.dtype}
    fits = all(value in ("auto", named.get(name)) for name, value in asked.items())
    same_weights = named.get("weights", "full") == settings.weights
    return fits and same_weights and engine.get("template") == settings.template_inputs.get("template")


def _bases_of_model(recipe: Recipe, store: Store) -> list[Mapping[str, Any]]:
    """The bases that runs with these model settings were computed on."""
    model, found = recipe.model.model_dump(mode="json"), list[Mapping[str, Any]]()
    for row in store.runs():
        try:
            table = stored_json(row["recipe"])
        except StoreError:
            continue
        if row["id"] == run_id(recipe) or (isinstance(table, dict) and table.get("model") == model):
            found += [engine["base"] for engine in store.engines(ENGINE_INPUTS, row["id"])]
    return found
