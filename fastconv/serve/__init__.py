"""`fastconv serve`: the cells of a run behind one OpenAI-compatible endpoint on the loopback, each under its own name.

Every stack is proven by its logits before the endpoint answers. vLLM draws where there is one, else the resident base;
both answer with the tokens that a run records for the same prompt, seed and settings, near ties apart.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from fastconv.analysis.contrasts import in_words
from fastconv.analysis.imported import stack_id
from fastconv.chat import ChatTokenizer
from fastconv.chat.template import read_json
from fastconv.engine.builtin import prepare_model_folder
from fastconv.engine.locate import engine_identity
from fastconv.engine.lora import Adapter, parse_adapter
from fastconv.engine.model import resolve_dtype
from fastconv.engine.shapes import n_positions, shape_of
from fastconv.engine.stack import Probe
from fastconv.engine.vllm.memory import stacked_rank
from fastconv.engine.vllm.server import launch, server_command
from fastconv.errors import InputError, ModelError, RecipeError
from fastconv.experiment.cells import conditions_of
from fastconv.experiment.graph import CellPlan, Graph
from fastconv.experiment.schedule import fitting_cells
from fastconv.recipe import run_id, sha256_of
from fastconv.run.stacks import Stacks
from fastconv.serve.endpoint import Endpoint, Served, listen
from fastconv.serve.resident import ResidentModel
from fastconv.serve.vllm import VllmCell, VllmModel
from fastconv.store.ledger import Stage, Store

EngineChoice = Literal["auto", "resident", "vllm"]


@dataclass(frozen=True)
class Service:
    """What is served: the endpoint's address, the engine that draws, and each cell with the proof of its stack."""

    url: str
    engine: str
    proofs: Mapping[str, Mapping[str, Any]]


def chosen_cells(graph: Graph, store: Store, wanted: Sequence[str]) -> dict[str, CellPlan]:
    """The cells to serve by name: those that fit one of these names or patterns (`villain-*-refusal-*`), else all.

    Cells that are not trained are left out unless they are named. Raises InputError for a name that fits none, for one
    that is not trained, and if nothing is left.
    """
    fitting = fitting_cells(graph, wanted)
    missing = {name: slot for name, plan in fitting.items() if (slot := _missing(plan, store))}
    for name in wanted:
        if slot := missing.get("-".join(name.split())):
            fix = "run the recipe first; adapters that `gc` freed are trained again after `fastconv forget SLOT`"
            raise InputError(f"the cell has no adapter here: {slot}", where=name, fix=fix)
    if len(missing) == len(fitting):
        raise InputError("no cell is trained yet", where=run_id(graph.recipe), fix="run the recipe first")
    return {name: plan for name, plan in fitting.items() if name not in missing}


def _stage(name: str, plan: CellPlan) -> Stage:
    """A stage that stands on a cell's stack, as its evaluations do."""
    return Stage("served", name, 1, {}, plan.stack)


def _missing(plan: CellPlan, store: Store) -> str:
    """The slot of an adapter of this cell that is not there; "" if all are."""
    for stage in plan.stack.values():
        record = store.record(stage.key)
        if record is None or not store.path(record.outputs["adapter"], "safetensors").is_file():
            return stage.slot
    return ""


def fingerprint(graph: Graph, plan: CellPlan) -> str:
    """What identifies a cell's stack in every reply (`system_fingerprint`): a hash of base, engine and its stages' keys."""
    return f"fp_{stack_id(graph, plan)[:16]}"


def pick_engine(graph: Graph, choice: EngineChoice) -> Literal["resident", "vllm"]:
    """Who draws: with `auto` vLLM where its command is found, else the resident base. Raises ModelError, RecipeError."""
    published = graph.recipe.model.semantics == "published"
    if choice == "vllm" and published:
        raise RecipeError(
            "vLLM serves a snapshot as an adapter, this run folds it into the weights", where="model.semantics",
            fix="serve it with --engine resident",
        )  # fmt: skip
    if choice == "resident" or published:
        return "resident"
    try:
        server_command(engine_identity(graph.recipe.model)["device"])
    except ModelError as error:
        if choice == "auto":
            return "resident"
        raise ModelError(
            error.what, where="--engine", fix="name its command in FASTCONV_VLLM, or serve it with --engine resident"
        ) from None
    return "vllm"


def serve(
    graph: Graph, store: Store, cells: Mapping[str, CellPlan], *, engine: EngineChoice, port: int, context_tok: int,
    stop: threading.Event, tell: Callable[[str], None], ready: Callable[[Service], None],
) -> None:  # fmt: skip
    """Serve these cells until `stop` is set. `tell` hears of each step of the start, `ready` when requests are answered.

    Raises InputError if the port is taken, ModelError or SamplerError for a base or server that does not start or ends,
    TrainingError for a stack that is not the recorded one.
    """
    opened = _vllm if pick_engine(graph, engine) == "vllm" else _resident
    with ExitStack() as resources:
        here, there = engine_identity(graph.recipe.model), graph.engine_inputs["engine"]
        if here != there:
            tell(
                f"computed by {_named(there)}; here {_named(here)} draws, which rounds otherwise: "
                "an answer may part from the recorded one where two tokens are nearly as likely"
            )
        folder = prepare_model_folder(graph.recipe.model, graph.source)
        tokenizer, config = ChatTokenizer(folder, graph.recipe.model), read_json(folder / "config.json")
        files = _BaseFiles(tokenizer, config, min(context_tok, n_positions(config, context_tok, folder.name)))
        listening = listen(port)  # before a base is loaded: a port that is taken is known at once
        resources.callback(listening.close)
        one = resources.enter_context(opened(graph, store, cells, files, stop, tell))
        proofs = {}
        for name in cells:
            proofs[name] = one.prove(name)
            tell(f"{name}: proven, {_in_words(proofs[name])}")
        served = {name: Served(name, fingerprint(graph, plan), _about(graph, plan)) for name, plan in cells.items()}
        endpoint = Endpoint(
            one.model, served, tokenizer, graph.recipe.eval.sampling, context_tok=one.context_tok, listening=listening
        )
        resources.callback(endpoint.close)
        endpoint.start()
        ready(Service(endpoint.url, one.model.name, proofs))
        one.work()


@dataclass(frozen=True)
class _BaseFiles:
    """What is read of the base's folder, once: tokenizer, configuration, and the tokens that are read at most."""

    tokenizer: ChatTokenizer
    config: Mapping[str, Any]
    context_tok: int


@dataclass(frozen=True)
class _Opened:
    """A model that draws: proving one of its cells, working until the end, and the tokens that it reads at most."""

    model: ResidentModel | VllmModel
    prove: Callable[[str], dict[str, Any]]
    work: Callable[[], None]
    context_tok: int


@contextlib.contextmanager
def _resident(
    graph: Graph, store: Store, cells: Mapping[str, CellPlan], files: _BaseFiles, stop: threading.Event,
    tell: Callable[[str], None],
) -> Iterator[_Opened]:  # fmt: skip
    tell(f"loading {graph.recipe.model.id}")
    stacks = Stacks(graph, store)
    longest_tok = stacks.base.rules.longest_tok or files.context_tok
    model = ResidentModel(stacks, {name: _stage(name, plan) for name, plan in cells.items()})
    yield _Opened(model, model.prove, lambda: model.work(stop.is_set), min(files.context_tok, longest_tok))


@contextlib.contextmanager
def _vllm(
    graph: Graph, store: Store, cells: Mapping[str, CellPlan], files: _BaseFiles, stop: threading.Event,
    tell: Callable[[str], None],
) -> Iterator[_Opened]:  # fmt: skip
    settings, read = graph.recipe.model, _AdapterReader(graph, store)
    stacks = {name: read.stack(plan) for name, plan in cells.items()}
    tell("starting vLLM, which takes a minute or two")
    n_stacks = len({tuple(map(id, stack.adapters)) for stack in stacks.values() if stack.adapters})
    server = launch(
        settings, graph.source, files.context_tok, stacked_rank(graph.recipe), store.root, n_stacks=max(1, n_stacks)
    )
    try:
        vocab = shape_of(files.config, settings.id).vocab
        recorded_as = graph.engine_inputs["engine"]
        model = VllmModel(server, resolve_dtype(settings), recorded_as, files.tokenizer, vocab)
        work = partial(model.work, stop.is_set, stop.wait)
        yield _Opened(model, lambda name: model.prove(name, stacks[name]), work, files.context_tok)
    finally:
        server.close()


class _AdapterReader:
    """Reads stacks from the ledger without a base: vLLM checks that they fit. Cells share the adapters that they share."""

    def __init__(self, graph: Graph, store: Store) -> None:
        self._store = store
        self._base = sha256_of(dict(graph.source.identity))
        self._held: dict[str, Adapter] = {}

    def stack(self, plan: CellPlan) -> VllmCell:
        """The adapters of a cell and its recorded probe. Raises StoreError or AdapterError."""
        adapters, probe = [], None
        for stage in plan.stack.values():
            record = self._store.record(stage.key)
            assert record is not None, "cells without it are not chosen"
            sha256 = record.outputs["adapter"]
            if sha256 not in self._held:
                data = self._store.get(sha256, "safetensors")
                self._held[sha256] = parse_adapter(data, self._base, None, stage.slot)
            adapters.append(self._held[sha256])
            probe = Probe(tuple(record.outputs["probe"]))
        return VllmCell(tuple(adapters), probe)


def _about(graph: Graph, plan: CellPlan) -> dict[str, Any]:
    """What `/v1/models` says of a cell beyond its name; `personas` are the system turns under which it was asked, as recipes
    write them, `around` what stood before and after the questions (a trigger)."""
    stages = {stage.kind: stage.key for stage in plan.stack.values()}
    sampling = graph.recipe.eval.sampling.model_dump(mode="json")
    turns = {probe: graph.personas.system(probe) for probe in sorted({probe for _, probe in plan.scores})}
    personas = {probe: turn.text if turn.kind == "text" else turn.kind for probe, turn in turns.items()}
    triggers = {
        name: one for name, one in conditions_of(graph.recipe).items() if name in turns and (one.before or one.after)
    }
    around = {name: {"before": one.before, "after": one.after} for name, one in triggers.items()}
    return {
        "fastconv": {
            "run": run_id(graph.recipe), "cell": plan.cell.label, "about": in_words(plan.cell), "stages": stages,
            "base": graph.recipe.model.id, "defaults": sampling, "personas": personas, **({"around": around} if around else {}),
        }
    }  # fmt: skip


def _named(engine: Mapping[str, str]) -> str:
    return " ".join(
        [f"engine {engine['engine']} on {engine['device']} in {engine['dtype']}", engine.get("weights", "")]
    ).strip()


def _in_words(proof: Mapping[str, Any]) -> str:
    if "from_recorded" not in proof:
        return "the bare base"
    return f"{proof['from_recorded']:.2g} from its recorded logits, {proof['from_base']:.2g} from the base's"
