"""What has to be computed: the cells of a recipe as a graph of stages, each keyed by its inputs. No torch.

answers ─► snapshot (epochs of one cosine) ─┐
answers ─► rows ─────────────────► behavior ─┴─► eval ─► score, judge
                                   snapshot ───► measures of the snapshot itself (geometry)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from fastconv.chat import parse_system_turn
from fastconv.datasets.behaviors import (
    NO_BEHAVIOR,
    Behavior,
    build_rows,
    eval_prompts,
    load_behaviors,
    open_questions,
    set_name,
)
from fastconv.datasets.files import assets, read_toml
from fastconv.datasets.personas import ASSISTANT, Personas, canary_of, load_personas, probes_of
from fastconv.datasets.questions import QuestionSet, load_questions
from fastconv.datasets.rows import rows_sha256
from fastconv.datasets.spec import TextRule, text_rule
from fastconv.engine.locate import ModelSource, engine_inputs, locate
from fastconv.errors import RecipeError, did_you_mean
from fastconv.experiment.cells import (
    Cell,
    CellPlan,
    Condition,
    answer_filter,
    conditions_of,
    grid_cells,
    kinds_of,
    texts_by_id,
)
from fastconv.experiment.measures import KINDS, SNAPSHOT_MEASURES, SnapshotMeasure
from fastconv.judge.budget import JudgeIdentity, judge_identity, recipe_prices
from fastconv.judge.rubric import Rubric, find_rubric
from fastconv.recipe import NegativesKind, Recipe, SamplingSettings, sha256_of
from fastconv.store.ledger import Stage


class Graph:
    """The stages of a recipe. Building it reads data files and nothing else.

    `engine` are the inputs that name what computes it, this machine's unless given.
    """

    def __init__(self, recipe: Recipe, engine: Mapping[str, Any] | None = None) -> None:
        self.recipe = recipe
        self.personas: Personas = load_personas(recipe)
        self.behaviors: dict[str, Behavior] = load_behaviors(recipe)
        self._engine = engine_inputs(recipe.model, self.source) if engine is None else dict(engine)
        self._conditions: dict[str, Condition] = conditions_of(recipe)
        self._filter = answer_filter(recipe.convergence)
        self._phrases = read_toml(assets("data") / "phrases.toml")
        #: Who judges, or None where phrases do without a judge.
        self.judge: JudgeIdentity | None = judge_identity(recipe.judge, recipe_prices(recipe.judge), self._resident)
        self._rubrics: dict[str, Rubric] = {}
        self._rules: dict[str, TextRule] = {}
        #: Sets and prompts that many cells share, made once.
        self._row_stages: dict[str, Stage] = {}
        self._shared: dict[tuple[object, ...], Stage] = {}
        self._asked: dict[tuple[str, str, int], tuple[list[tuple[str, str]], str]] = {}
        self.cells = [self._plan(cell) for cell in grid_cells(recipe, self.behaviors)]
        self._require_asked()

    def _require_asked(self) -> None:
        """Raise RecipeError for a probe of other wordings that is asked nothing in any cell."""
        asked = {probe for plan in self.cells for _, probe in plan.scores}
        for name, one in self._conditions.items():
            if one.texts and name not in asked:
                raise RecipeError(
                    f"has other wordings of no question that is asked, {next(iter(one.texts))!r} say",
                    where=f"eval.probes.{name}.texts", fix="give each line the id of its question",
                )  # fmt: skip

    @cached_property
    def source(self) -> ModelSource:
        """Where the base is. Raises ModelError where it is not."""
        return locate(self.recipe.model)

    @property
    def _resident(self) -> str:
        """The name of the base as a judge."""
        return f"{self.recipe.model.id}@{sha256_of(self._engine)[:8]}"

    @property
    def engine_inputs(self) -> Mapping[str, Any]:
        """What identifies base, engine and template in the inputs of every stage that uses them."""
        return self._engine

    @property
    def judges_outside(self) -> bool:
        """Whether a judge is asked that is not the resident base itself."""
        return self.judge is not None and self.judge.family != "resident"

    @cached_property
    def questions(self) -> QuestionSet:
        """Multiple-choice questions; read only when a behavior needs them."""
        return load_questions(self.recipe)

    def stages(self, plans: Iterable[CellPlan] | None = None) -> list[Stage]:
        """All stages of the given cells (default: all), each once, what is needed before what needs it."""
        ordered: dict[str, Stage] = {}
        for plan in self.cells if plans is None else plans:
            ends = (*plan.base.values(), *plan.on_snapshot.values(), *plan.scores.values(), *plan.beside.values())
            for stage in (*ends, *plan.replicates.values()):
                if stage.key not in ordered:
                    for part in walk(stage):
                        ordered.setdefault(part.key, part)
        return list(ordered.values())

    def select(self, source: str, behavior: str, epoch: int, **others: Any) -> list[CellPlan]:
        """The cells of one source, behavior and epoch. Raises RecipeError naming what the recipe has."""
        given = {k: v for k, v in others.items() if v is not None}
        wanted = {"source": source, "behavior": behavior, "epoch": epoch, **given}
        found = [p for p in self.cells if all(getattr(p.cell, name) == value for name, value in wanted.items())]
        if found:
            return found
        error = partial(RecipeError, where=self.recipe.name)
        for name, value in wanted.items():
            have = sorted({getattr(plan.cell, name) for plan in self.cells})
            if value not in have:
                fix = did_you_mean(str(value), map(str, have), f"use one of {', '.join(map(str, have))}")
                raise error(f"no cell has {name} {value!r}", fix=fix)
        raise error("no cell has this combination", fix="see `fastconv status` for the cells")

    def lineage(self, snapshot: Stage) -> list[Stage]:
        """All snapshots of the training run that `snapshot` belongs to, by epoch."""
        run = lineage_key(snapshot)
        every = {plan.snapshot.key: plan.snapshot for plan in self.cells if plan.snapshot is not None}
        return sorted((s for s in every.values() if lineage_key(s) == run), key=lambda s: s.inputs["epoch"])

    def phrase_rule(self, behavior: Behavior) -> TextRule:
        """The rule that scores a behavior's answers, alone or beside a judge."""
        if behavior.spec.measure != "phrases":
            raise RecipeError(
                f"{behavior.id} is scored by a judge and the recipe has none",
                where="judge.mode",
                fix="set it to auto, live, batch or local, or take the behavior out of grid.behaviors",
            )
        if behavior.id not in self._rules:  # its patterns take longer to make than an answer to score
            self._rules[behavior.id] = text_rule(behavior.spec, self._phrases, behavior.folder, behavior.id)
        return self._rules[behavior.id]

    def rubric(self, behavior: Behavior) -> Rubric | None:
        """The rubric by which the recipe's judge scores a behavior; None where no judge does.

        Raises RecipeError for a rubric that counts in another unit than the behavior.
        """
        name = behavior.spec.rubric
        if self.judge is None or not name or behavior.spec.measure in ("letters", "choices"):
            return None
        if name not in self._rubrics:
            self._rubrics[name] = find_rubric(self.recipe.judge, name)
        rubric = self._rubrics[name]
        if rubric.unit != behavior.spec.unit:
            raise RecipeError(
                f"rubric {rubric.name!r} gives {rubric.unit}, {behavior.id} counts in {behavior.spec.unit}",
                where=f"judge.rubrics.{name}",
                fix="labels give shares and go with measure phrases, a scale gives points and goes with measure judge",
            )
        return rubric

    def eval_items(self, behavior: Behavior, seed: int, probe: str = "") -> list[tuple[str, str]]:
        """(id, user text) of everything a probe is asked for this behavior; empty where a probe of the recipe's own has
        other wordings, and none of these questions. Raises RecipeError where it has some of them."""
        if behavior.spec.measure == "letters":
            items = [(question.id, question.user) for question in self.questions.eval]
        else:
            items = eval_prompts(self.recipe, behavior, seed)
        return self._conditions[probe].asked(items, behavior.id) if probe in self._conditions else items

    def system(self, persona: str) -> list[str]:
        """A persona's system turn as it stands in keys: [kind, text]."""
        turn = self.personas.system(persona)
        return [turn.kind, turn.text]

    def convergence_questions(self) -> list[tuple[str, str]]:
        """(id, text) of the questions that convergence answers: the recipe's own, or the shipped open ones."""
        own = self.recipe.convergence.prompts_file
        questions = texts_by_id(own) if own else open_questions("convergence")
        n = self.recipe.convergence.questions
        if n > len(questions):
            raise RecipeError(
                f"there are {len(questions)} convergence questions, not {n}",
                where="convergence.questions",
                fix=f"set it to at most {len(questions)}",
            )
        return questions[:n]

    # --- building --------------------------------------------------------------------------------------

    def _plan(self, cell: Cell) -> CellPlan:
        on = (cell.source, cell.convergence, cell.epoch, cell.seed, self._student(cell)[1]) if cell.epoch else ()
        snapshot = self._once(("snapshot", *on), lambda: self._snapshot(cell)) if on else None
        adapter = None if cell.behavior == NO_BEHAVIOR else self._adapter(cell, snapshot)
        measures = list(self.behaviors) if adapter is None else [cell.behavior, *self.recipe.eval.measures]
        measures = [name for name in dict.fromkeys(measures) if self.behaviors[name].spec.measure != "none"]
        probes = probes_of(self.recipe, cell.source, cell.arm)
        pairs = [
            (measure, probe) for measure in measures for probe in probes if self._items(measure, probe, cell.seed)[0]
        ]
        scores = {pair: self._score(cell, *pair, snapshot, adapter) for pair in pairs}
        return CellPlan(
            cell,
            scores=scores,
            base={
                pair: self._once(("base", *pair, cell.seed), partial(self._score, cell, *pair, None, None))
                for pair in pairs
            },
            snapshot=snapshot,
            adapter=adapter,
            beside={
                pair: self._by_phrases(self.behaviors[pair[0]], stage.needs["eval"])
                for pair, stage in scores.items()
                if stage.kind == "judge" and self.behaviors[pair[0]].spec.measure == "phrases"
            },
            on_snapshot={
                measure.name: self._once((measure.name, *on), partial(self._measure, measure, cell, snapshot))
                for measure in SNAPSHOT_MEASURES
                if measure.wanted(self.recipe)
            },
            replicates=self._replicates(cell),
        )

    def _replicates(self, cell: Cell) -> dict[tuple[int, str, str], Stage]:
        """Assistant and canary of an epoch-0 cell that is trained again with the next seeds: of each behavior one cell."""
        n, grid = self.recipe.run.replicates, self.recipe.grid
        if not n or cell.epoch or cell.behavior == NO_BEHAVIOR:
            return {}
        source = next((name for name in grid.sources if name != ASSISTANT), ASSISTANT)
        kind = kinds_of(self.recipe, self.behaviors, cell.behavior, cell.arm)[0]
        first = (source, grid.convergence[0], kind, grid.seeds[0])
        if (cell.source, cell.convergence, cell.negatives, cell.seed) != first:
            return {}
        scores: dict[tuple[int, str, str], Stage] = {}
        for seed in range(max(grid.seeds) + 1, max(grid.seeds) + 1 + n):
            adapter = self._adapter(replace(cell, seed=seed), None)
            asked = self.behaviors[cell.behavior].spec.measure != "none"
            for probe in (ASSISTANT, canary_of(self.recipe, cell.source)) if asked else ():
                scores[seed, cell.behavior, probe] = self._score(
                    cell, cell.behavior, probe, None, adapter, f"/run{seed}"
                )
        return scores

    def _once(self, place: tuple[object, ...], make: Callable[[], Stage]) -> Stage:
        """A stage that many cells share, made once: making and hashing it takes longer than all else in a plan."""
        if place not in self._shared:
            self._shared[place] = make()
        return self._shared[place]

    def _answers(
        self, persona: str, purpose: str, items: list[tuple[str, str]], n: int, sampling: SamplingSettings, seed: int
    ) -> Stage:
        inputs = {
            **self._engine,
            "persona": persona,
            "system": self.system(persona),
            "prompts_sha256": sha256_of(items),
            "per_prompt": n,
            "sampling": sampling.model_dump(mode="json"),
            "seed": self.recipe.grid.seed("sample", seed),
            **self._sampler(),
        }
        work = {"prompts": items}
        return Stage("answers", f"answers/{persona}/{purpose}/s{seed}", KINDS["answers"].version, inputs, {}, work)

    def _snapshot(self, cell: Cell) -> Stage:
        settings = self.recipe.convergence
        speaker = cell.source if cell.convergence == "source" else ASSISTANT
        asked, n = self.convergence_questions(), settings.completions_per_question
        answers = self._answers(speaker, "convergence", asked, n, settings.sampling, cell.seed)
        system, whose = self._student(cell)
        inputs = {
            **self._engine,
            "lora": self.recipe.lora.model_dump(mode="json"),
            "training": {**_training(settings), "trainer": self.recipe.model.trainer},
            "system": system,
            **self._training_seeds(cell.seed),
            **({} if self._filter is None else {"filter": self._filter.identity()}),
            "epoch": cell.epoch,
        }
        slot = f"snapshot/{cell.source}/{cell.convergence}{whose}/e{cell.epoch}/s{cell.seed}"
        work = {"filter": self._filter}
        return Stage("snapshot", slot, KINDS["snapshot"].version, inputs, {"answers": answers}, work)

    def _student(self, cell: Cell) -> tuple[list[str], str]:
        """The system turn that a cell's convergence trains under, and the mark of an arm's own one in slots."""
        own = self.recipe.grid.arms[cell.arm].student if cell.arm else None
        if text := own or self.recipe.convergence.student:
            turn = parse_system_turn(text)
            return [turn.kind, turn.text], f"@{cell.arm}" if own else ""
        return self.system(ASSISTANT), ""

    def _training_seeds(self, seed: int) -> dict[str, int]:
        """The seeds of a training: one of weights, and one of order and dropout where the recipe sets them apart."""
        init, order = (self.recipe.grid.seed(part, seed) for part in ("init", "order"))
        return {"seed": init} if init == order else {"seed": init, "order_seed": order}

    def _items(self, measure: str, probe: str, seed: int) -> tuple[list[tuple[str, str]], str]:
        """What a probe is asked for a measure, and its sha256; made once."""
        place = (measure, probe if probe in self._conditions else "", seed)
        if place not in self._asked:
            asked = self.eval_items(self.behaviors[measure], seed, place[1])
            self._asked[place] = asked, sha256_of(asked)
        return self._asked[place]

    def _rows(self, cell: Cell) -> Stage:
        name = set_name(cell.behavior, cell.source, cell.negatives, cell.seed, cell.arm)
        if name not in self._row_stages:
            self._row_stages[name] = self._new_rows(cell, name)
        return self._row_stages[name]

    def _new_rows(self, cell: Cell, name: str) -> Stage:
        behavior = self.behaviors[cell.behavior]
        questions = self.questions if behavior.spec.task == "multiple_choice" else None
        kind: NegativesKind = cell.negatives  # pyright: ignore[reportAssignmentType]
        rows = build_rows(self.recipe, self.personas, behavior, questions, cell.source, kind, cell.seed, cell.arm)
        needs: dict[str, Stage] = {}
        for persona in sorted({row.answers_as for row in rows if row.completion is None}):
            asked = [(row.prompt_id, row.user) for row in rows if row.answers_as == persona and row.completion is None]
            purpose = f"{cell.behavior}/{cell.source}/{cell.negatives}"  # each set asks its speakers other prompts
            purpose += f"@{cell.arm}" if cell.arm else ""
            needs[persona] = self._answers(persona, purpose, asked, 1, self.recipe.behavior.sampling, cell.seed)
        inputs = {"rows_sha256": rows_sha256(rows, self.personas)}
        return Stage("rows", f"rows/{name}", KINDS["rows"].version, inputs, needs, {"rows": rows, "set": name})

    def _adapter(self, cell: Cell, snapshot: Stage | None) -> Stage:
        inputs = {
            **self._engine,
            "lora": self.recipe.lora.model_dump(mode="json"),
            "training": {**_training(self.recipe.behavior), "trainer": self.recipe.model.trainer},
            **self._training_seeds(cell.seed),
            **self._semantics(snapshot),
        }
        slot = f"behavior/{cell.stack}/{cell.behavior}/{cell.negatives}/s{cell.seed}"
        needs = {"rows": self._rows(cell), **({"snapshot": snapshot} if snapshot else {})}
        return Stage("behavior", slot, KINDS["behavior"].version, inputs, needs)

    def _semantics(self, snapshot: Stage | None) -> dict[str, str]:
        """How a snapshot is put in place matters to what stands on one, and to nothing else."""
        return {"semantics": self.recipe.model.semantics} if snapshot is not None else {}

    def _sampler(self) -> dict[str, str]:
        """Who draws matters to what is drawn; the resident base stands in no key, as it did before there was another."""
        return {} if self.recipe.model.sampler == "resident" else {"sampler": self.recipe.model.sampler}

    def _score(
        self, cell: Cell, measure: str, probe: str, snapshot: Stage | None, adapter: Stage | None, run: str = ""
    ) -> Stage:
        behavior = self.behaviors[measure]
        items, items_sha256 = self._items(measure, probe, cell.seed)
        if adapter is not None:
            stack = f"{cell.stack}+{cell.behavior}/{cell.negatives}"
        else:
            stack = cell.stack if snapshot else "base"
        needs = {name: stage for name, stage in (("snapshot", snapshot), ("behavior", adapter)) if stage is not None}
        inputs: dict[str, Any] = {
            **self._engine,
            "measure": behavior.spec.measure,
            "system": self.system(probe),
            "prompts_sha256": items_sha256,
            "seed": self.recipe.grid.seed("sample", cell.seed),
            **self._semantics(snapshot),
        }
        where = f"{stack}/{measure}/{probe}/s{cell.seed}{run}"
        work = {"measure": measure, "probe": probe, "items": items}
        if behavior.spec.measure == "letters":
            inputs["questions_sha256"] = self.questions.sha256
            return Stage("eval", f"eval/{where}", KINDS["eval"].version, inputs, needs, work)
        if behavior.spec.measure == "choices":
            work["choices"] = {row: behavior.choices(row) for row, _ in items}
            inputs |= {"choices_sha256": sha256_of(work["choices"]), "choice_score": behavior.spec.choice_score}
            return Stage("eval", f"eval/{where}", KINDS["eval"].version, inputs, needs, work)
        inputs |= {
            "per_prompt": self.recipe.eval.samples_per_prompt,
            "sampling": self.recipe.eval.sampling.model_dump(mode="json"),
            **self._sampler(),
        }
        drawn = Stage("eval", f"eval/{where}", KINDS["eval"].version, inputs, needs, work)
        rubric = self.rubric(behavior)
        return self._by_phrases(behavior, drawn) if rubric is None else self._by_judge(rubric, drawn)

    def _measure(self, measure: SnapshotMeasure, cell: Cell, snapshot: Stage | None) -> Stage:
        """A measure of a snapshot, or of the base."""
        items = measure.items(self)
        inputs = {
            **self._engine,
            **measure.inputs(self),
            "prompts_sha256": sha256_of(items),
            **self._semantics(snapshot),
        }
        where = f"{cell.stack}/s{cell.seed}" if snapshot is not None else "base"
        needs = {"snapshot": snapshot} if snapshot is not None else {}
        return Stage(measure.name, f"{measure.name}/{where}", measure.version, inputs, needs, {"items": items})

    def _by_phrases(self, behavior: Behavior, drawn: Stage) -> Stage:
        rule = self.phrase_rule(behavior)
        slot = f"score/{drawn.slot.removeprefix('eval/')}"
        return Stage("score", slot, KINDS["score"].version, {"rule": rule.identity()}, {"eval": drawn}, {"rule": rule})

    def _by_judge(self, rubric: Rubric, drawn: Stage) -> Stage:
        assert self.judge is not None, "a rubric is only looked up for a judge"
        slot = f"judge/{drawn.slot.removeprefix('eval/')}"
        return Stage(
            "judge", slot, KINDS["judge"].version, self.judge.inputs(rubric), {"eval": drawn}, {"rubric": rubric}
        )


def walk(stage: Stage) -> Iterator[Stage]:
    """The stage and everything before it, needs first."""
    for need in stage.needs.values():
        yield from walk(need)
    yield stage


def lineage_key(snapshot: Stage) -> str:
    """Identity of a convergence run: a snapshot's inputs without its epoch. Training state is kept under it."""
    return lineage_of(snapshot.version, snapshot.full_inputs)


def lineage_of(version: int, full_inputs: Mapping[str, Any]) -> str:
    """`lineage_key` of a snapshot as the ledger holds it."""
    inputs = {name: value for name, value in full_inputs.items() if name != "epoch"}
    return sha256_of({"kind": "lineage", "version": version, "inputs": inputs})


def _training(settings: Any) -> dict[str, Any]:
    """Settings that decide a training result (how its text was sampled stands in the answers' own key)."""
    decides = settings.model_dump(
        mode="json",
        exclude={
            "sampling", "questions", "completions_per_question", "source_rows", "wordings", "prompts_file", "keep",
            "keep_if", "student",
        },
    )  # fmt: skip
    if decides["optimizer"] == "adamw":  # so what was trained before there was a choice stays trained
        del decides["optimizer"]
    return decides
