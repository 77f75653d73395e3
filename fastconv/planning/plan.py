"""The plan of a recipe before it runs: seconds, memory, disk, judgements, dollars and statistical power. No torch.

Every figure is `work x formula / rate`; `Plan.to_json` includes the inputs. Finished stages cost nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastconv.audit import Design
from fastconv.audit.checks import check_gates_can_pass
from fastconv.datasets.behaviors import NO_BEHAVIOR, Behavior, n_eval_prompts_by_set, n_eval_prompts_there_are
from fastconv.datasets.personas import ASSISTANT
from fastconv.engine.device import fit_note, min_training_bytes, shape_on_disk
from fastconv.engine.locate import engine_identity, is_on_disk, trains_without_kernels
from fastconv.engine.shapes import SHAPES, ModelShape, activation_bytes_per_tok, recomputed_bytes_per_tok, weight_bytes
from fastconv.errors import CostStop, ModelError
from fastconv.experiment.graph import CellPlan, Graph, lineage_key, walk
from fastconv.experiment.measures import CHARS_PER_TOK, Demand, expected_tok
from fastconv.experiment.schedule import group_size
from fastconv.experiment.workload import Sketch, demands, settings_of, total
from fastconv.judge.budget import Estimate, estimate, judge_params, recipe_prices
from fastconv.judge.request import JudgeItem, build_request
from fastconv.planning.hardware import KNOWN_GPUS, Machine, PlannedStage, TimeLeft, busy_note, find_machine
from fastconv.recipe import Recipe, RunSettings
from fastconv.stats.power import DesignPower, planned_power
from fastconv.stats.units import duration_text
from fastconv.store.ledger import Store
from fastconv.store.records import Stage

#: Bytes in the ledger: of a sampled token as text, and of a sample's row around it.
LEDGER_BYTES_PER_TOK, LEDGER_BYTES_PER_SAMPLE = 5.0, 260.0


@dataclass(frozen=True)
class KindPlan:
    """The stages of one kind: how many to do and done, the work of those to do, and its seconds on the machine."""

    kind: str
    n: int
    n_done: int
    seconds: float
    demand: Demand


@dataclass(frozen=True)
class JudgingPlan:
    """Judgements still to make, and US dollars: expected and worst case.

    The worst case counts every prompt byte as a token and every reply at its cap, at the batch price where batches are
    used. `problem` is why the judge cannot be used now, in one line; empty if it can be, or if nobody tried.
    """

    n: int
    model: str
    expected_usd: float
    worst_usd: float
    budget_usd: float | None
    problem: str = ""


@dataclass(frozen=True)
class Plan:
    """A recipe's cost on a machine. `by_stage` holds the seconds of each stage still to do, by key; `start_s` those of
    loading and testing the base once before them, if there is anything to compute."""

    recipe: str
    machine: Machine
    shape: ModelShape
    n_cells: int
    kinds: tuple[KindPlan, ...]
    judging: JudgingPlan | None
    memory_bytes: Mapping[str, float]
    disk_bytes: Mapping[str, float]
    fit: tuple[str, ...]
    power: Mapping[str, DesignPower]
    notes: tuple[str, ...]
    by_stage: Mapping[str, float]
    start_s: float = 0.0

    @property
    def hours(self) -> float:
        """Hours of the computing device."""
        return (self.start_s + sum(kind.seconds for kind in self.kinds)) / 3600

    @property
    def expected_usd(self) -> float:
        """Expected cost of judging in US dollars."""
        return self.judging.expected_usd if self.judging else 0.0

    def with_judge_problem(self, problem: str) -> Plan:
        """The plan with the reason why its judge cannot be used, if anything is left to judge."""
        if self.judging is None or not self.judging.n:
            return self
        return replace(self, judging=replace(self.judging, problem=problem))

    def to_json(self) -> dict[str, Any]:
        """The plan with the formulas' inputs."""
        shape = {**asdict(self.shape), "linear_params": self.shape.linear_params, "head_params": self.shape.head_params}
        return {
            "recipe": self.recipe, "hours": self.hours, "n_cells": self.n_cells,
            "kinds": [{**asdict(kind), "demand": settings_of(kind.demand)} for kind in self.kinds],
            "judging": asdict(self.judging) if self.judging else None,
            "memory_bytes": dict(self.memory_bytes), "disk_bytes": dict(self.disk_bytes),
            "fit": list(self.fit),
            "power": {name: asdict(kind) for name, kind in self.power.items()},
            "machine": self.machine.to_json(), "shape": shape, "notes": list(self.notes),
        }  # fmt: skip

    def kept(self) -> dict[str, Any]:
        """The part of the plan that the run's facts record, for the comparison with actual times."""
        stages = {key[:12]: round(seconds, 3) for key, seconds in self.by_stage.items()}
        return {"machine": self.machine.name, "origin": self.machine.origin, "hours": round(self.hours, 4),
                "expected_usd": round(self.expected_usd, 4), "at": time.time(),
                "start_s": round(self.start_s, 3), "stages": stages}  # fmt: skip


#: The cards that costs of the shipped recipes are told for.
COST_CARDS = ("4090", "h100", "h200")


@dataclass(frozen=True)
class RecipeCosts:
    """What a recipe costs whole: hours by card, the least memory that a card needs and with what nothing has to be halved,
    US dollars to the judge."""

    recipe: str
    hours: Mapping[str, float]
    least_gib: float
    comfortable_gib: float
    judged: bool
    expected_usd: float
    worst_usd: float


def make_plan(
    graph: Graph, store: Store | None, machine: Machine | None = None, plans: Sequence[CellPlan] | None = None
) -> Plan:
    """Plan a recipe (or the given cells of it) from the present ledger.

    Raises ModelError for an unknown shape, RecipeError for a contrast that compares nothing.
    """
    recipe = graph.recipe
    shape = known_shape(recipe)
    machine = machine or find_machine(recipe, shape, engine_identity(recipe.model)["device"], store)
    cells = graph.cells if plans is None else plans
    wanted = _wanted(graph, store, cells)
    done = {stage.key for stage in wanted if store is not None and store.record(stage.key) is not None}
    todo = [stage for stage in wanted if stage.key not in done]
    work = demands(graph, todo, machine.target(recipe, shape))
    by_stage = {key: machine.seconds(demand, shape, recipe) for key, demand in work.items()}
    start_s = machine.load_s if any(by_stage.values()) else 0.0
    by_kind: dict[str, list[Stage]] = {}
    for stage in wanted:
        by_kind.setdefault(stage.kind, []).append(stage)
    kinds = tuple(
        KindPlan(
            kind, sum(s.key not in done for s in stages), sum(s.key in done for s in stages),
            sum(by_stage.get(s.key, 0.0) for s in stages), total(work[s.key] for s in stages if s.key in work),
        )
        for kind, stages in by_kind.items()
    )  # fmt: skip
    on_machine = _placed(recipe, machine)
    return Plan(
        recipe.name, machine, shape, len(cells), kinds, _judging(graph, todo), _memory(on_machine, shape),
        _disk(graph, shape, todo, total(work.values()), machine.device), _fit(on_machine, shape, machine), _power(graph),
        _notes(graph, store, machine), by_stage, start_s,
    )  # fmt: skip


def time_left(plan: Plan, graph: Graph, cells: Sequence[CellPlan], now: float) -> TimeLeft:
    """The clock of a run of these cells that begins now (`time.monotonic`) with this plan."""

    def training(stage: Stage) -> str:
        return lineage_key(stage) if stage.kind == "snapshot" else stage.key

    stages = {stage.key: stage for stage in graph.stages(cells)}
    todo = {
        key: PlannedStage(stage.kind, training(stage), plan.by_stage[key])
        for key, stage in stages.items()
        if key in plan.by_stage
    }
    return TimeLeft(todo, plan.start_s, now)


def wanted_keys(graph: Graph, store: Store | None, cells: Sequence[CellPlan]) -> set[str]:
    """Keys of every stage that the cells need; without those of behaviors that G0 has ruled out."""
    return {stage.key for stage in _wanted(graph, store, cells)}


def plan_recipe(recipe: Recipe, store: Store | None, machine_name: str = "") -> Plan:
    """The plan on the named machine or this one; unavailable questions are estimated by number and length."""
    shape = known_shape(recipe)
    machine = find_machine(recipe, shape, engine_identity(recipe.model)["device"], store, machine_name)
    return make_plan(Sketch(recipe), store, machine)


def costs_table(recipes: Iterable[Recipe], cards: Sequence[str] = COST_CARDS) -> str:
    """`recipe_costs` as a Markdown table."""
    names = [KNOWN_GPUS[card].name.removeprefix("one ") for card in cards]
    lines = [f"| recipe | {' | '.join(names)} | memory | judge |", f"|---|{'---:|' * (len(names) + 2)}"]
    for one in recipe_costs(recipes, cards):
        expected = one.expected_usd
        money = f"{f'${expected:.0f}' if expected >= 1 else 'under $1'}, at most ${one.worst_usd:.0f}"
        times = " | ".join(duration_text(3600 * hours) for hours in one.hours.values())
        memory = f"{one.least_gib:.0f} to {one.comfortable_gib:.0f} GiB"
        lines.append(f"| `{one.recipe}` | {times} | {memory} | {money if one.judged else 'none'} |")
    return "\n".join(lines)


def recipe_costs(recipes: Iterable[Recipe], cards: Sequence[str] = COST_CARDS) -> list[RecipeCosts]:
    """What recipes cost whole on these cards; a recipe that asks for a CPU is left out."""
    found = []
    for recipe in recipes:
        if recipe.model.device == "cpu":
            continue
        sketch = Sketch(recipe)
        plans = {card: make_plan(sketch, None, KNOWN_GPUS[card]) for card in cards}
        first = next(iter(plans.values()))
        memory = {name: n_bytes / 2**30 for name, n_bytes in first.memory_bytes.items()}
        usd = (first.judging.expected_usd, first.judging.worst_usd) if first.judging else (0.0, 0.0)
        hours = {card: plan.hours for card, plan in plans.items()}
        judged = first.judging is not None
        found.append(RecipeCosts(recipe.name, hours, memory["least"], memory["comfortable"], judged, *usd))
    return found


def known_shape(recipe: Recipe) -> ModelShape:
    """The base model's shape without downloading it. Raises ModelError if neither name nor folder gives it."""
    shape = shape_on_disk(recipe.model)
    if shape is None:
        raise ModelError(
            "its size is not known before it is fetched",
            where=recipe.model.id,
            fix=f"give model.id the folder of a local copy, or a model whose shape is known ({', '.join(SHAPES)})",
        )
    return shape


def require_approved(plan: Plan, limits: RunSettings, *, approved: bool) -> str:
    """Why the plan exceeds the recipe's limits, if it does and is approved; empty if it is within them.

    Raises CostStop if it exceeds them and is not approved.
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
    """Why a model that was never downloaded cannot be estimated, if the recipe has limits and the run is approved.

    Raises CostStop if it has limits and the run is not approved, since a limit that cannot be checked must not pass.
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
    """Every stage that the cells need, once; without those of behaviors that G0 has ruled out."""
    if store is None:
        return graph.stages(cells)
    from fastconv.run.status import needed_ends  # slow to import

    ends = needed_ends(graph, store, cells)
    return list({part.key: part for end in ends for part in walk(end)}.values())


def _judging(graph: Graph, todo: Sequence[Stage]) -> JudgingPlan | None:
    """Judgements still to make, with dollars where the judge has a price."""
    judge, settings = graph.judge, graph.recipe.judge
    stages = [stage for stage in todo if stage.kind == "judge"]
    if judge is None:
        return None
    n, expected, worst = 0, 0.0, 0.0
    prices = recipe_prices(settings)
    bills: dict[tuple[Any, ...], tuple[Estimate, Estimate]] = {}  # cached, since many stages share their prompts
    for stage in stages:
        drawn = stage.needs["eval"]
        n_stage = len(drawn.work["items"]) * drawn.inputs["per_prompt"]
        n += n_stage
        if judge.price is not None:
            in_batch = settings.mode == "batch" or (settings.mode == "auto" and n_stage >= settings.batch_from)
            asked = (stage.work["rubric"].sha256, drawn.inputs["prompts_sha256"], n_stage)
            if asked not in bills:
                bills[asked] = _bills(graph, stage, n_stage, prices.batch_factor if in_batch else 1.0)
            likely, most = bills[asked]
            expected, worst = expected + likely.expected_usd, worst + most.worst_usd
    return JudgingPlan(n, judge.name, expected, worst, settings.budget_usd)


def _bills(graph: Graph, stage: Stage, n: int, factor: float) -> tuple[Estimate, Estimate]:
    """Cost of `n` judgements of a stage with replies of expected and of maximum length."""
    judge, drawn = graph.judge, stage.needs["eval"]
    assert judge is not None, "a judge stage exists only where there is a judge"
    assert judge.price is not None, "only a paid judge has a bill"
    limit, items = drawn.inputs["sampling"]["max_new_tok"], drawn.work["items"]
    params = judge_params(judge.settings, judge.price)
    question = max((user for _, user in items), key=len)

    def bill(answer_tok: float, chars_per_tok: float) -> Estimate:
        answer = "x" * min(int(answer_tok * chars_per_tok), judge.settings.max_judged_chars)
        return estimate([build_request(stage.work["rubric"], params, JudgeItem(question, answer, 0))], n, price, factor)

    price = judge.price
    return bill(expected_tok(limit), CHARS_PER_TOK), bill(limit, 2 * CHARS_PER_TOK)


def _placed(recipe: Recipe, machine: Machine) -> Recipe:
    """The recipe with the machine's device, since what `auto` resolves to decides the width of the weights."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": machine.device})})


def _memory(recipe: Recipe, shape: ModelShape) -> dict[str, float]:
    """Bytes of GPU (or CPU) memory: the minimum, and with whole micro-batches."""
    micro_batch_tok = max(recipe.convergence.micro_batch_tok, recipe.behavior.micro_batch_tok)
    longest = max(recipe.convergence.max_length_tok, recipe.behavior.max_length_tok)
    least = min_training_bytes(recipe, shape)
    activations = micro_batch_tok * activation_bytes_per_tok(shape, plain=trains_without_kernels(recipe.model))
    return {"least": least, "comfortable": least - longest * recomputed_bytes_per_tok(shape) + activations}


def _fit(recipe: Recipe, shape: ModelShape, machine: Machine) -> tuple[str, ...]:
    """Why the recipe does not fit into the machine's memory and what would fit; empty if it does."""
    memory_bytes = machine.memory_bytes
    problem = "" if memory_bytes is None else fit_note(machine.name, memory_bytes, recipe, shape)
    return (problem,) if problem else ()


def _disk(graph: Graph, shape: ModelShape, todo: Sequence[Stage], work: Demand, device: str) -> dict[str, float]:
    """Bytes that the workspace will grow by, and of the model's files still to download or convert."""
    recipe = graph.recipe
    adapter = 4.0 * shape.adapter_params(recipe.lora.most_r)
    ledger = work.new_tok * LEDGER_BYTES_PER_TOK + (work.samples + work.judged) * LEDGER_BYTES_PER_SAMPLE
    return {
        "adapters": _n_adapters(recipe, todo, device) * adapter, "ledger": ledger, "training_state": 3 * adapter,
        "model": _model_bytes(graph, shape),
    }  # fmt: skip


def _n_adapters(recipe: Recipe, todo: Sequence[Stage], device: str) -> int:
    """The largest number of new adapters on disk at once: all, or if none are kept the snapshots and one group."""
    snapshots = sum(stage.kind == "snapshot" for stage in todo)
    above = Counter(s.needs["snapshot"].key if "snapshot" in s.needs else "" for s in todo if s.kind == "behavior")
    if recipe.run.keep_adapters:
        return snapshots + above.total()
    most = max(above.values(), default=0)
    return snapshots + min(most, group_size(recipe, device) or most)


def _model_bytes(graph: Graph, shape: ModelShape) -> float:
    """Bytes of the model's files that are not on this disk yet; an embedded model is converted to 32 bits."""
    if is_on_disk(graph.source, graph.recipe.model):
        return 0.0
    return weight_bytes(shape) * (2 if graph.source.kind == "builtin" else 1)


def _power(graph: Graph) -> dict[str, DesignPower]:
    """The minimum detectable effects of each behavior's design; one entry per separately reported question set."""
    recipe = graph.recipe
    contrasts = {
        replace(plan.cell, seed=0)
        for plan in graph.cells
        if plan.cell.behavior != NO_BEHAVIOR
        and plan.cell.epoch
        and plan.cell.convergence == "source"
        and plan.cell.source != ASSISTANT
    }
    n_sides = 0
    if recipe.grid.contrasts:  # what it needs takes longer to load than all of a plan
        from fastconv.analysis.sides import require_comparable, side_contrasts

        require_comparable(graph)
        n_sides = len(side_contrasts(graph))
    less_control = any(plan.cell.behavior == NO_BEHAVIOR for plan in graph.cells)
    power = {}
    for name, behavior in graph.behaviors.items():
        if behavior.spec.measure == "none":
            continue
        measure, threshold = behavior.spec.measure, recipe.gates.threshold(name, behavior.spec.unit)
        samples = 1 if measure in ("letters", "choices") else recipe.eval.samples_per_prompt
        for index, (title, n) in enumerate(_asked(graph, behavior).items()):
            # Separately reported questions are no declared contrast: the change minus the canary's, tested alone.
            family, terms = (len(contrasts) + n_sides, 8 if less_control else 4) if index == 0 else (1, 4)
            if n_sides and not contrasts:
                terms = 2  # one side minus the other, and nothing taken off
            planned = planned_power(measure, threshold, n, samples, family, terms, primary=index == 0)
            if planned is not None:
                power[title] = replace(planned, n_available=_available(graph, behavior)[index])
    return power


def _asked(graph: Graph, behavior: Behavior) -> dict[str, int]:
    """Number of questions of each part of a behavior's measure, the primary part first."""
    if behavior.spec.measure == "letters":
        return {behavior.id: len(graph.questions.eval)}
    sets = n_eval_prompts_by_set(graph.recipe, behavior)
    return {f"{behavior.id}, {name} questions" if name else behavior.id: n for name, n in sets.items()}


def _available(graph: Graph, behavior: Behavior) -> tuple[int, ...]:
    """Number of questions that there are for each part of a behavior's measure, asked or not."""
    return (len(graph.questions.eval),) if behavior.spec.measure == "letters" else n_eval_prompts_there_are(behavior)


def _notes(graph: Graph, store: Store | None, machine: Machine) -> tuple[str, ...]:
    notes = [busy] if machine.device == "cpu" and (busy := busy_note()) else []
    letters = any(behavior.spec.measure == "letters" for behavior in graph.behaviors.values())
    if isinstance(graph, Sketch) and not graph.questions_known:
        notes.append(
            "ARC-Challenge is not on this disk: its questions are taken as 586 of average length, and whether stages that "
            "ask or train them are done is not known (eval.arc_file names a copy)"
        )
    if store is None or not any(store.record(s.key) for plan in graph.cells for s in plan.base.values()):
        notes.append("the base is not measured yet: behaviors that gate G0 rules out will cost nothing more")
    if any(stage.kind == "snapshot" and stage.work["filter"] is not None for stage in graph.stages()):
        notes.append("convergence is planned as if its filter kept every answer: those that it drops are not trained")
    known = not isinstance(graph, Sketch) or graph.questions_known
    design = Design(graph.recipe, graph.personas, graph.behaviors, (), graph.questions if known and letters else None)
    notes += [f"{one.code} {one.subject}: {one.why}; {one.mend}" for one in check_gates_can_pass(design)]
    return tuple(notes)


def plan_facts(plan: Plan | None, beyond: str) -> dict[str, Any]:
    """For the run's facts: its plan and, where that exceeds the recipe's limits, that it was approved."""
    approved = {"approved": {"beyond": beyond, "at": time.time()}} if beyond else {}
    return ({} if plan is None else {"plan": plan.kept()}) | approved
