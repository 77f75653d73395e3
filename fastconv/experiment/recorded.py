"""The graph of a run that is read, on whatever machine: a laptop or a login node has another engine, and perhaps not the base.
No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastconv.engine.locate import ENGINE_INPUTS, identities_on
from fastconv.errors import ModelError, StoreError
from fastconv.experiment.graph import Graph
from fastconv.recipe import ModelSettings, Recipe, run_id
from fastconv.store.io import stored_json
from fastconv.store.ledger import Stage, Store


def graph_of_run(recipe: Recipe, store: Store) -> Graph:
    """The graph of a recipe with the keys that its stages here were computed with.

    These are this machine's if it has computed or begun any that its engine names, else those of the engine that computed most.
    Raises ModelError where the base is not here and nothing was computed with it either.
    """
    own = _own_graph(recipe)
    done = {key for (key,) in store.rows("SELECT key FROM stages")}
    if own is not None:
        begun = done | set(store.live_leases())
        if any(stage.key in begun for stage in _of_engine(own)):
            return own
    graphs = [*filter(None, [own]), *_graphs_of_others(recipe, store, own)]
    if not graphs:
        return Graph(recipe)  # which says what is missing
    return max(graphs, key=lambda graph: sum(stage.key in done for stage in _of_engine(graph)))


def graphs_of_run(recipe: Recipe, store: Store) -> list[Graph]:
    """The graph of a recipe as this machine keys it, if its base is here, and as every engine does that may have computed it
    in this workspace: with this base, where the settings leave the engine open, if runs with the same model settings are here."""
    own = _own_graph(recipe)
    return [*filter(None, [own]), *_graphs_of_others(recipe, store, own)]


def _of_engine(graph: Graph) -> list[Stage]:
    """The stages whose inputs name the engine: others, as rows of multiple-choice sets, have one key on every machine."""
    return [stage for stage in graph.stages() if "engine" in stage.inputs]


def _own_graph(recipe: Recipe) -> Graph | None:
    """The graph as this machine keys it; None where the base is not here."""
    try:
        return Graph(recipe)
    except ModelError:
        return None


def _graphs_of_others(recipe: Recipe, store: Store, own: Graph | None) -> list[Graph]:
    bases = _bases_of_model(recipe, store)
    if bases and own is not None:
        bases = [own.engine_inputs["base"]]
    return [
        Graph(recipe, engine)
        for engine in _engines(store)
        if engine["base"] in bases
        and (own is None or engine != own.engine_inputs)
        and _is_open_to(recipe.model, engine)
    ]


def _engines(store: Store, run: str = "") -> list[dict[str, Any]]:
    """Each set of `ENGINE_INPUTS`, `base` and `engine` among them, with which stages were computed: all, or a run's."""
    query = "SELECT inputs FROM stages" + (" WHERE key IN (SELECT key FROM run_stages WHERE run=?)" if run else "")
    found: list[dict[str, Any]] = []
    for (text,) in store.rows(query, (run,) if run else ()):
        inputs = stored_json(text)
        engine = {name: inputs[name] for name in ENGINE_INPUTS if name in inputs} if isinstance(inputs, dict) else {}
        named = isinstance(engine.get("base"), dict) and isinstance(engine.get("engine"), dict)
        if named and engine not in found:
            found.append(engine)
    return found


def _is_open_to(settings: ModelSettings, engine: Mapping[str, Any]) -> bool:
    """Whether these settings are computed with such inputs on some machine."""
    devices = ("cpu", "cuda") if settings.device == "auto" else (settings.device,)
    identities = [identity for device in devices for identity in identities_on(device, settings)]
    return engine["engine"] in identities and engine.get("template") == settings.template_inputs.get("template")


def _bases_of_model(recipe: Recipe, store: Store) -> list[Mapping[str, Any]]:
    """The bases that runs with these model settings were computed on."""
    model, found = recipe.model.model_dump(mode="json"), list[Mapping[str, Any]]()
    for row in store.runs():
        try:
            table = stored_json(row["recipe"])
        except StoreError:
            continue
        if row["id"] == run_id(recipe) or (isinstance(table, dict) and table.get("model") == model):
            found += [engine["base"] for engine in _engines(store, row["id"])]
    return found
