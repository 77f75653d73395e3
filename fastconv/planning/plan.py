"""What a recipe will cost before it is run: seconds, memory, disk, judgements and dollars, and what it could show. No torch.

Every figure is `work x formula / rate`; the inputs stand beside it (`Plan.to_json`). What is done already costs nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastconv.datasets.behaviors import NO_BEHAVIOR, Behavior, asked_by_set
from fastconv.datasets.personas import ASSISTANT
from fastconv.engine.device import fit_note, min_training_bytes, shape_on_disk
from fastconv.engine.locate import engine_identity, is_on_disk, trains_without_kernels
from fastconv.engine.shapes import ModelShape, activation_bytes_per_tok, recomputed_bytes_per_tok, weight_bytes
from fastconv.errors import CostStop, ModelError
from fastconv.experiment.graph import CellPlan, Graph, walk
from fastconv.experiment.schedule import group_size
from fastconv.experiment.workload import CHARS_PER_TOK, Demand, Sketch, demands, expected_tok, settings_of, total
from fastconv.judge.budget import Estimate, estimate, prices_of
from fastconv.judge.identity import params_of
from fastconv.judge.request import JudgeItem, build_request
from fastconv.planning.hardware import Machine, find_machine
from fastconv.recipe import Recipe, RunSettings
from fastconv.stats.power import DesignPower, planned_power
from fastconv.store.ledger import Store
from fastconv.store.records import Stage

#: What a drawn token takes in the ledger (bytes): its text, and its share of the row around it.
LEDGER_BYTES_PER_TOK, LEDGER_BYTES_PER_SAMPLE = 5.0, 260.0


@dataclass(frozen=True)
class KindPlan:
    """All stages of one kind that are still to do: how many, their work, and seconds on the machine."""

    kind: str
    n: int
    n_done: int
    seconds: float
    demand: Demand


@dataclass(frozen=True)
class Judging:
    """Judgements still to make and what they cost: expected, and what they cannot exceed (USD, the whole batch price
    off for batches; every prompt byte a token, every reply at its cap). `problem` is why the judge cannot be asked now,
    in one line; empty if it can be, or nobody tried."""

    n: int
    model: str
    expected_usd: float
    worst_usd: float
    budget_usd: float | None
    problem: str = ""


@dataclass(frozen=True)
class Plan:
    """A recipe's cost on a machine. `by_stage` holds the seconds of each stage still to do, by key."""

    recipe: str
    machine: Machine
    shape: ModelShape
    n_cells: int
    kinds: tuple[KindPlan, ...]
    judging: Judging | None
    memory_bytes: Mapping[str, float]
    disk_bytes: Mapping[str, float]
    fit: tuple[str, ...]
    power: Mapping[str, DesignPower]
    notes: tuple[str, ...]
    by_stage: Mapping[str, float]

    @property
    def hours(self) -> float:
        """Hours of the device that computes."""
        return sum(kind.seconds for kind in self.kinds) / 3600

    @property
    def expected_usd(self) -> float:
        """Dollars that judging is expected to cost."""
        return self.judging.expected_usd if self.judging else 0.0

    def knowing(self, problem: str) -> Plan:
        """The plan that also says why its judge cannot be asked, where anything is left to judge."""
        if self.judging is None or not self.judging.n:
            return self
        return replace(self, judging=replace(self.judging, problem=problem))

    def to_json(self) -> dict[str, Any]:
        """Everything, with the formulas' inputs."""
        shape = {**asdict(self.shape), "linear_params": self.shape.linear_params, "head_params": self.shape.head_params}
        return {
            "recipe": self.recipe, "hours": self.hours, "n_cells": self.n_cells,
            "kinds": [{**asdict(one), "demand": settings_of(one.demand)} for one in self.kinds],
            "judging": asdict(self.judging) if self.judging else None,
            "memory_bytes": dict(self.memory_bytes), "disk_bytes": dict(self.disk_bytes),
            "fit": list(self.fit),
            "power": {name: asdict(one) for name, one in self.power.items()},
            "machine": self.machine.to_json(), "shape": shape, "notes": list(self.notes),
        }  # fmt: skip

    def kept(self) -> dict[str, Any]:
        """What a run's facts keep of the plan that it began with."""
        stages = {key[:12]: round(seconds, 3) for key, seconds in self.by_stage.items()}
        return {"machine": self.machine.name, "origin": self.machine.origin, "hours": round(self.hours, 4),
                "expected_usd": round(self.expected_usd, 4), "at": time.time(), "stages": stages}  # fmt: skip


def make_plan(
    graph: Graph, store: Store | None, machine: Machine | None = None, plans: Sequence[CellPlan] | None = None
) -> Plan:
    """Plan a recipe (or the given cells of it) from where the ledger stands. Raises ModelError for an unknown shape."""
    recipe = graph.recipe
    shape = known_shape(recipe)
    machine = machine or find_machine(recipe, shape, engine_identity(recipe.model)["device"], store)
    cells = graph.cells if plans is None else plans
    wanted = _wanted(graph, store, cells)
    done = {stage.key for stage in wanted if store is not None and store.record(stage.key) is not None}
    todo = [stage for stage in wanted if stage.key not in done]
    found = demands(graph, todo, machine.device)
    by_stage = {key: machine.seconds(demand, shape, recipe) for key, demand in found.items()}
    if first := next((key for key, seconds in by_stage.items() if seconds), None):
        by_stage[first] += machine.load_s
    by_kind: dict[str, list[Stage]] = {}
    for stage in wanted:
        by_kind.setdefault(stage.kind, []).append(stage)
    kinds = tuple(
        KindPlan(
            kind, sum(s.key not in done for s in stages), sum(s.key in done for s in stages),
            sum(by_stage.get(s.key, 0.0) for s in stages), total(found[s.key] for s in stages if s.key in found),
        )
        for kind, stages in by_kind.items()
    )  # fmt: skip
    placed = _placed(recipe, machine)
    return Plan(
        recipe.name, machine, shape, len(cells), kinds, _judging(graph, todo), _memory(placed, shape),
        _disk(graph, shape, todo, total(found.values()), machine.device), _fit(placed, shape, machine), _power(graph),
        _notes(graph, store), by_stage,
    )  # fmt: skip


def plan_recipe(recipe: Recipe, store: Store | None, named: str = "") -> Plan:
    """The plan of a recipe on the named machine or this one; questions that are not at hand are stood in for."""
    shape = known_shape(recipe)
    machine = find_machine(recipe, shape, engine_identity(recipe.model)["device"], store, named)
    return make_plan(Sketch(recipe), store, machine)


def known_shape(recipe: Recipe) -> ModelShape:
    """The base's shape without fetching it. Raises ModelError where neither name nor folder tells."""
    shape = shape_on_disk(recipe.model)
    if shape is None:
        raise ModelError(
            "its size is not known before it is fetched",
            where=recipe.model.id,
            fix="give model.id the folder of a local copy, or a model whose shape is known (see fastconv/shapes.py)",
        )
    return shape


def require_approved(plan: Plan, limits: RunSettings, *, approved: bool) -> str:
    """Why the run is beyond its limits, in words, if it is and was approved; empty if it is not beyond them.

    Raises CostStop for one that is beyond them and not approved.
    """
    beyond = []
    if limits.max_gpu_hours is not None and plan.hours > limits.max_gpu_hours:
        beyond.append(
            f"about {plan.hours:.3g} hours on {plan.machine.name}, run.max_gpu_hours is {limits.max_gpu_hours:g}"
        )
    if limits.max_usd is not None and plan.expected_usd > limits.max_usd:
        beyond.append(f"about ${plan.expected_usd:.2f} for judging, run.max_usd is {limits.max_usd:g}")
    why = "; ".join(beyond)
    if beyond and not approved:
        raise CostStop(
            f"the estimate is beyond the recipe's limits: {why}", where=f"COST {plan.recipe}",
            fix="see `fastconv plan`, then add --approve, or raise the limit",
        )  # fmt: skip
    return why


def require_known(recipe: Recipe, *, approved: bool) -> str:
    """Why nothing can be estimated for a model that was never here, if the recipe has limits and the run was approved.

    Raises CostStop where it has limits and the run was not approved: a gate that cannot look must not let pass.
    """
    if recipe.run.max_gpu_hours is None and recipe.run.max_usd is None:
        return ""
    why = f"the size of {recipe.model.id} is not known before it is fetched, so nothing was estimated"
    if not approved:
        raise CostStop(
            f"{why}, and the recipe has limits", where=f"COST {recipe.name}",
            fix="add --approve; once its files are here, `fastconv plan` knows",
        )  # fmt: skip
    return why


def _wanted(graph: Graph, store: Store | None, cells: Sequence[CellPlan]) -> list[Stage]:
    """Every stage that the cells need, each once; none of a behavior that G0 has ruled out already."""
    if store is None:
        return graph.stages(cells)
    from fastconv.run.status import needed_ends  # slow to import

    ends = needed_ends(graph, store, cells)
    return list({part.key: part for end in ends for part in walk(end)}.values())


def _judging(graph: Graph, todo: Sequence[Stage]) -> Judging | None:
    """Judgements still to make; dollars where the judge has a price."""
    judge, settings = graph.judge, graph.recipe.judge
    stages = [stage for stage in todo if stage.kind == "judge"]
    if judge is None:
        return None
    n, expected, worst = 0, 0.0, 0.0
    prices = prices_of(settings)
    bills: dict[tuple[Any, ...], tuple[Estimate, Estimate]] = {}  # many stages ask the same questions
    for stage in stages:
        drawn = stage.needs["eval"]
        mine = len(drawn.work["items"]) * drawn.inputs["per_prompt"]
        n += mine
        if judge.price is not None:
            in_batch = settings.mode == "batch" or (settings.mode == "auto" and mine >= settings.batch_from)
            asked = (stage.work["rubric"].sha256, drawn.inputs["prompts_sha256"], mine)
            if asked not in bills:
                bills[asked] = _bills(graph, stage, mine, prices.batch_factor if in_batch else 1.0)
            likely, most = bills[asked]
            expected, worst = expected + likely.expected_usd, worst + most.worst_usd
    return Judging(n, judge.name, expected, worst, settings.budget_usd)


def _bills(graph: Graph, stage: Stage, n: int, factor: float) -> tuple[Estimate, Estimate]:
    """What `n` judgements of a stage cost with answers as long as expected, and as long as they can be."""
    judge, drawn = graph.judge, stage.needs["eval"]
    assert judge is not None, "a judge stage exists only where there is a judge"
    assert judge.price is not None, "only a paid judge has a bill"
    limit, items = drawn.inputs["sampling"]["max_new_tok"], drawn.work["items"]
    params = params_of(judge.settings, judge.price)
    question = max((user for _, user in items), key=len)

    def bill(answer_tok: float, chars_per_tok: float) -> Estimate:
        answer = "x" * min(int(answer_tok * chars_per_tok), judge.settings.max_judged_chars)
        return estimate([build_request(stage.work["rubric"], params, JudgeItem(question, answer, 0))], n, price, factor)

    price = judge.price
    return bill(expected_tok(limit), CHARS_PER_TOK), bill(limit, 2 * CHARS_PER_TOK)


def _placed(recipe: Recipe, machine: Machine) -> Recipe:
    """The recipe as it would run on that machine: what `auto` resolves to there decides how wide the weights are."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": machine.device})})


def _memory(recipe: Recipe, shape: ModelShape) -> dict[str, float]:
    """Bytes of GPU memory: without which nothing runs, and with whole micro-batches. On a CPU the same of its own."""
    asked = max(recipe.convergence.micro_batch_tok, recipe.behavior.micro_batch_tok)
    longest = max(recipe.convergence.max_length_tok, recipe.behavior.max_length_tok)
    least = min_training_bytes(recipe, shape)
    kept = asked * activation_bytes_per_tok(shape, plain=trains_without_kernels(recipe.model))
    return {"least": least, "comfortable": least - longest * recomputed_bytes_per_tok(shape) + kept}


def _fit(recipe: Recipe, shape: ModelShape, machine: Machine) -> tuple[str, ...]:
    """What of the recipe does not fit into the machine's memory, and what would."""
    room = machine.memory_bytes
    said = "" if room is None else fit_note(machine.name, room, recipe, shape)
    return (said,) if said else ()


def _disk(graph: Graph, shape: ModelShape, todo: Sequence[Stage], work: Demand, device: str) -> dict[str, float]:
    """Bytes that the workspace grows by, and of the model's files if they are still to be fetched or converted."""
    recipe = graph.recipe
    adapter = 4.0 * shape.adapter_params(recipe.lora.r)
    ledger = work.new_tok * LEDGER_BYTES_PER_TOK + (work.samples + work.judged) * LEDGER_BYTES_PER_SAMPLE
    return {
        "adapters": _n_adapters(recipe, todo, device) * adapter, "ledger": ledger, "training_state": 3 * adapter,
        "model": _model_bytes(graph, shape),
    }  # fmt: skip


def _n_adapters(recipe: Recipe, todo: Sequence[Stage], device: str) -> int:
    """How many new adapters lie on the disk at once: all, or where none are kept the snapshots and one group above."""
    snapshots = sum(stage.kind == "snapshot" for stage in todo)
    above = Counter(s.needs["snapshot"].key if "snapshot" in s.needs else "" for s in todo if s.kind == "behavior")
    if recipe.run.keep_adapters:
        return snapshots + above.total()
    most = max(above.values(), default=0)
    return snapshots + min(most, group_size(recipe, device) or most)


def _model_bytes(graph: Graph, shape: ModelShape) -> float:
    """Bytes of the model's files that are not on this disk yet; an embedded model is converted into 32 bits."""
    if is_on_disk(graph.source, graph.recipe.model):
        return 0.0
    return weight_bytes(shape) * (2 if graph.source.kind == "builtin" else 1)


def _power(graph: Graph) -> dict[str, DesignPower]:
    """The smallest effects that each behavior's design could show, beside its threshold; one entry for each set of
    questions that is reported apart, by the name that the report gives it."""
    recipe = graph.recipe
    contrasts = {
        replace(plan.cell, seed=0)
        for plan in graph.cells
        if plan.cell.behavior != NO_BEHAVIOR
        and plan.cell.epoch
        and plan.cell.convergence == "source"
        and plan.cell.source != ASSISTANT
    }
    less_control = any(plan.cell.behavior == NO_BEHAVIOR for plan in graph.cells)
    found = {}
    for name, behavior in graph.behaviors.items():
        measure, threshold = behavior.spec.measure, recipe.gates.threshold(name, behavior.spec.unit)
        samples = 1 if measure == "letters" else recipe.eval.samples_per_prompt
        for place, (title, n) in enumerate(_asked(graph, behavior).items()):
            # What is reported apart is no declared contrast: the change less the canary's, tested by itself.
            family, terms = (max(1, len(contrasts)), 8 if less_control else 4) if place == 0 else (1, 4)
            planned = planned_power(measure, threshold, n, samples, family, terms, primary=place == 0)
            if planned is not None:
                found[title] = planned
    return found


def _asked(graph: Graph, behavior: Behavior) -> dict[str, int]:
    """How many questions each part of a behavior's measure has, the part that verdicts rest on first."""
    if behavior.spec.measure == "letters":
        return {behavior.id: len(graph.questions.eval)}
    sets = asked_by_set(graph.recipe, behavior)
    return {f"{behavior.id}, {name} questions" if name else behavior.id: n for name, n in sets.items()}


def _notes(graph: Graph, store: Store | None) -> tuple[str, ...]:
    said = []
    if isinstance(graph, Sketch) and not graph.questions_known:
        said.append(
            "ARC-Challenge is not on this disk: its questions are taken as 586 of average length, and whether stages that "
            "ask or train them are done is not known (eval.arc_file names a copy)"
        )
    if store is None or not any(store.record(s.key) for plan in graph.cells for s in plan.base.values()):
        said.append("the base is not measured yet: behaviors that gate G0 rules out will cost nothing more")
    return tuple(said)


def facts_of(plan: Plan | None, beyond: str) -> dict[str, Any]:
    """For the run's facts: the plan it began with and, where that is beyond the recipe's limits, that it was approved."""
    approved = {"approved": {"beyond": beyond, "at": time.time()}} if beyond else {}
    return ({} if plan is None else {"plan": plan.kept()}) | approved
