"""Sections for the record: audit warnings, failures, other runs, limits, reproducibility, training, cost and plan."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from fastconv.analysis.analysis import Analysis
from fastconv.audit.checks import check_recipe
from fastconv.datasets.behaviors import NO_BEHAVIOR, Behavior
from fastconv.datasets.files import assets, data_file, file_sha256, rows_file
from fastconv.datasets.personas import ASSISTANT
from fastconv.engine.locate import TINY
from fastconv.errors import DataError
from fastconv.experiment.graph import Graph, lineage_key
from fastconv.recipe import HUB, SHIPPED, canonical_json, recipe_sha256, sha256_of
from fastconv.report.blocks import Block, Figure, Figures, Note, Section, Table, TableCell, folded_if_long, plain_row
from fastconv.report.claims import ask
from fastconv.report.figures import curves
from fastconv.run.status import failed_stages
from fastconv.stats.units import counted, first_few
from fastconv.store.io import stored_json
from fastconv.store.ledger import Stage, changed_inputs
from fastconv.store.records import Record

#: A ratio of actual to planned seconds beyond this, either way, is a defect of the plan.
MOST_FACTOR = 2.0
#: Kinds that took less than this in total are not compared: the plan is not that fine.
LEAST_S = 1.0


def user_files(graph: Graph) -> dict[str, str]:
    """sha256 (hex) of every user file by the key that names it, except rubrics (see `_judge`)."""
    return {f"{name}: {path.name}": _sha256(path) for name, path in _named(graph)}


def questions_asked(graph: Graph) -> dict[str, str]:
    """sha256 (hex) of the multiple-choice questions, independent of file order and format; empty if there are none."""
    if not any(behavior.spec.measure == "letters" for behavior in graph.behaviors.values()):
        return {}
    questions = graph.questions
    return {
        f"asked: {counted(len(questions.eval), 'question')}": questions.eval_sha256,
        "asked or kept for training": questions.sha256,
    }


def _named(graph: Graph) -> Iterator[tuple[str, Path]]:
    recipe = graph.recipe
    for name, path in (
        ("data.personas", recipe.data.personas),
        ("data.behaviors", recipe.data.behaviors),
        ("eval.arc_file", recipe.eval.arc_file),
        ("judge.prices", recipe.judge.prices),
        ("convergence.prompts_file", recipe.convergence.prompts_file),
        *((f"grid.arms.{arm}.rows", own.rows) for arm, own in recipe.grid.arms.items() if "{source}" not in own.rows),
        *((f"eval.probes.{name}.texts", probe.texts) for name, probe in recipe.eval.probes.items()),
    ):
        if path and not path.startswith(SHIPPED):
            yield name, Path(path)
    for behavior, path in recipe.data.rows.items():
        for source in recipe.grid.sources if "{source}" in path else ("",):
            pinned = f" ({path})" if path.startswith(HUB) else ""
            yield f"data.rows.{behavior}{source and f' of {source}'}{pinned}", rows_file(path, source)
    for behavior in graph.behaviors.values():
        yield from _beside(behavior)


def _beside(behavior: Behavior) -> Iterator[tuple[str, Path]]:
    """The files that a user's behavior declaration names, relative to its folder."""
    if behavior.folder.resolve() == assets("data").resolve():
        return
    spec = behavior.spec
    rules = {"source_answer": spec.source_answer, "negative_answer": spec.negative_answer}
    wordings = {f"{rule}.wordings": given.wordings for rule, given in rules.items() if given is not None}
    for key, name in {"prompts": spec.prompts, "eval_prompts": spec.eval_prompts, **wordings}.items():
        if name:
            yield f"{behavior.id}.{key}", data_file(behavior.folder, name)


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except DataError:
        return "cannot be read any more"


def warnings(analysis: Analysis) -> Section:
    """The audit's warnings, with the recipe's reason where it accepts one."""
    audit = check_recipe(analysis.graph.recipe)
    rows = []
    for code in dict.fromkeys(finding.code for finding in audit.findings if finding.severity == "warn"):
        findings = [finding for finding in audit.findings if finding.code == code]
        acceptance = f"accepted: {audit.accepted[code]}" if code in audit.accepted else "not accepted"
        figures = "; ".join(f"{finding.subject}: {finding.figure}" for finding in findings if finding.figure)
        rows.append(plain_row((code, acceptance, findings[0].why, figures)))
    if not rows:
        return Section("audit", "Warnings of the audit", (Note("none"),))
    table = Table("warnings", ("code", "accepted", "what it means", "figures"), tuple(rows))
    return Section("audit", "Warnings of the audit", (table,))


def failures(analysis: Analysis) -> Section | None:
    """Stages that failed when they were last tried, and the cells without their numbers."""
    failed = failed_stages(analysis.store.failures(), analysis.graph.cells)
    if not failed:
        return None
    rows = tuple(
        plain_row((TableCell(stage.slot, code=True), stage.reason, "; ".join(stage.cells))) for stage in failed
    )
    table = Table("failed", ("stage", "why it failed", "cells without its numbers"), rows)
    intro = "What these stages would have given is missing below, not zero. The same command tries them again."
    return Section("failed", "Failed", (table,), intro)


def superseded(analysis: Analysis) -> Section | None:
    """Other runs of the same recipe name in this workspace, and how they differ."""
    this_recipe = analysis.graph.recipe.model_dump(mode="json")
    rows = []
    for row in analysis.store.runs():
        if row["source"] != analysis.graph.recipe.name or row["id"] == analysis.run:
            continue
        changes = changed_inputs(stored_json(row["recipe"]), this_recipe)
        ended = "finished" if row["finished_at"] else "not finished"
        rows.append(plain_row((row["id"], _when(row["started_at"]), ended, first_few(changes, 4, "; "))))
    if not rows:
        return None
    table = Table("superseded", ("run", "started", "state", "what this run has instead"), tuple(rows))
    return Section(
        "superseded-runs",
        "Other runs of this recipe",
        (table,),
        "They rest on other inputs; no figure of this page mixes them in.",
    )


def limits(analysis: Analysis) -> Section:
    """What the run cannot show, whatever its results."""
    recipe = analysis.graph.recipe
    sentences = []
    if len(recipe.grid.seeds) == 1:
        sentences.append("One seed: confidence is LOW whatever the intervals say.")
    if any(recipe.grid.epochs) and NO_BEHAVIOR not in recipe.grid.behaviors:
        sentences.append("No convergence-only control: mimicry and transfer cannot be told apart.")
    if ASSISTANT in recipe.grid.sources:
        sentences.append(
            "The assistant as its own source is a degenerate control: what it shows is training, not transfer. It counts "
            "in no verdict over convergence."
            if recipe.grid.contrasts
            else "The assistant as its own source is a degenerate control: what it shows is training, not transfer. It counts "
            "in no verdict."
        )
    if recipe.judge.mode == "substring" and any(b.spec.measure == "phrases" for b in analysis.graph.behaviors.values()):
        sentences.append("Text is judged by phrases only; no judge read it.")
    if analysis.graph.judge is not None and analysis.graph.judge.weak:
        sentences.append(f"{analysis.graph.judge.name} is a weak judge: it answers by one character.")
    if recipe.model.id == TINY:
        sentences.append(
            "Random weights: the numbers show that every stage runs and that they can be traced, nothing else."
        )
    elif recipe.model.id.startswith("builtin:"):
        sentences.append("A small embedded model shows that the loop works; it says nothing about larger ones.")
    if recipe.grid.negatives == ("included",):
        sentences.append(
            "The assistant is among the negatives everywhere: an effect is a lower bound, and no effect says nothing."
        )
    missing = [plan.cell.label for plan in analysis.graph.cells if plan not in analysis.measured]
    if missing:
        more = " and others" if len(missing) > 4 else ""
        sentences.append(f"Not measured: {', '.join(missing[:4])}{more}.")
    sentences += [*_filtered(analysis), *_pending(analysis)]
    return Section("limits", "Limits", tuple(Note(line) for line in sentences) or (Note("none stated"),))


def _filtered(analysis: Analysis) -> list[str]:
    """What the filter on answers left, where that is under half, or not as much for every convergence training."""
    kept = {
        _run_name(stage): (int(record.outputs["answers_kept"]), int(record.outputs["answers_drawn"]))
        for stage, record in _trained(analysis)
        if "answers_kept" in record.outputs
    }
    few, unequal = any(2 * n < drawn for n, drawn in kept.values()), len({n for n, _ in kept.values()}) > 1
    if not few and not unequal:
        return []
    told = ", ".join(f"{n} of {drawn} ({name})" for name, (n, drawn) in kept.items())
    differ = "; so they differ in how many rows they were trained on too" if unequal else ""
    return [f"Answers that the filter kept: {told}{differ}."]


def _pending(analysis: Analysis) -> list[str]:
    """Judge stages with finished completions and without judgements."""
    store = analysis.store
    stages = [s for s in analysis.graph.stages() if s.kind == "judge" and store.record(s.key) is None]
    slots = [stage.slot for stage in stages if store.record(stage.needs["eval"].key) is not None]
    if not slots:
        return []
    return [f"{len(slots)} stages wait for the judge: {first_few(slots, 5)}."]


def card(analysis: Analysis) -> Section:
    """Everything needed to reproduce the run."""
    blocks: list[Block] = []
    for title, table in _tables(analysis).items():
        rows = tuple((TableCell(name), TableCell(str(value), code=True)) for name, value in table.items())
        if rows:
            blocks.append(Table(f"card-{title.split()[0].lower()}", (title, ""), rows))
    return Section("card", "Reproducibility card", tuple(blocks))


def _tables(analysis: Analysis) -> dict[str, Mapping[str, str]]:
    graph, facts = analysis.graph, analysis.facts
    sets = {
        stage.slot: str(record.outputs["rows"])
        for stage in graph.stages()
        if stage.kind == "rows" and (record := analysis.reading.record(stage)) is not None
    }
    data = {path.name: file_sha256(path) for path in sorted(assets("data").iterdir()) if path.is_file()}
    return {
        "Run": {
            "command": facts.get("command", "not recorded"),
            "recipe sha256": recipe_sha256(graph.recipe),
            "seeds": ", ".join(map(str, graph.recipe.grid.seeds)),
            **{f"git {name}": value for name, value in facts.get("git", {}).items()},
        },
        "Base model": {
            **graph.engine_inputs["base"],
            **({"folder": graph.recipe.model.id} if graph.engine_inputs["base"]["id"] == "local" else {}),
            **{f"template {name}": value for name, value in facts.get("template", {}).items()},
        },
        "Judge": _judge(analysis),
        "Machine": {
            "engine" if name == "name" else name: str(value)
            for name, value in {**facts.get("machine", {}), **facts.get("engine", {})}.items()
        },
        "Versions": {"python": facts.get("python", "not recorded"), **facts.get("versions", {})},
        "Sets trained on (sha256)": sets,
        "Data files (sha256)": data,
        "Brought files (sha256)": user_files(graph),
        "Questions of multiple choice (sha256)": questions_asked(graph),
        "Settings": {
            "canonical recipe": sha256_of(graph.recipe.model_dump(mode="json")),
            "recipe": canonical_json(graph.recipe.model_dump(mode="json")),  # sorted, as the ledger keeps it
        },
    }


def _judge(analysis: Analysis) -> dict[str, str]:
    """The judge, and every rubric of a finished judge stage, by its name in the recipe."""
    graph = analysis.graph
    if graph.judge is None:
        return {}
    judged = [s for s in graph.stages() if s.kind == "judge" and analysis.reading.record(s) is not None]
    used = {stage.work["rubric"].sha256 for stage in judged}
    rubrics = {b.spec.rubric: rubric for b in graph.behaviors.values() if (rubric := graph.rubric(b)) is not None}
    return {
        "judge": graph.judge.name,
        **{
            f"rubric {name}": f"{rubric.name} version {rubric.version}, sha256 {rubric.sha256}"
            for name, rubric in rubrics.items()
            if rubric.sha256 in used
        },
    }


def _when(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))


def curves_and_rho(analysis: Analysis) -> Section | None:
    """Training loss over steps for each convergence training and behavior, and rho of every adapter."""
    trained = list(_trained(analysis))
    if not trained:
        return None
    panels = [*_convergence(analysis, trained), *_behaviors(analysis, trained)]
    rows = tuple(_rho_row(stage, record) for stage, record in trained)
    columns = ("adapter", "last epoch's loss", "rho, least", "median", "greatest", "sha256")
    caption = "rho: norm of the adapter's delta over the norm of the weights that it stands beside, over modules."
    blocks: list[Block] = [Figures("curves", "Training loss", tuple(panels))] if panels else []
    blocks.append(Table("rho", columns, rows, frozenset({1, 2, 3, 4}), caption, folded_if_long(rows, "adapters")))
    filtered = [(stage, record) for stage, record in trained if "answers_kept" in record.outputs]
    if filtered:
        kept = tuple(_kept_row(stage, record) for stage, record in filtered)
        told = "Answers that the recipe's filter keeps, of those that were drawn; convergence trains no other."
        blocks.append(Table("kept", ("snapshot", "answers kept"), kept, frozenset({1}), told))
    return Section("training", "Training", tuple(blocks))


def _kept_row(stage: Stage, record: Record) -> tuple[TableCell, ...]:
    kept, drawn = record.outputs["answers_kept"], record.outputs["answers_drawn"]
    return TableCell(stage.slot), TableCell(f"{kept} of {drawn}", (f"{stage.key[:12]}/answers_kept",))


def _trained(analysis: Analysis) -> Iterator[tuple[Stage, Record]]:
    for stage in analysis.graph.stages():
        record = analysis.reading.record(stage)
        if record is not None and "adapter" in record.outputs:
            yield stage, record


def _convergence(analysis: Analysis, trained: list[tuple[Stage, Record]]) -> list[Figure]:
    """One line per convergence training: the last snapshot's losses include those of the earlier ones."""
    runs: dict[str, tuple[Stage, Record]] = {}
    for stage, record in trained:
        if stage.kind == "snapshot":
            run = lineage_key(stage)
            if run not in runs or len(record.outputs["losses"]) > len(runs[run][1].outputs["losses"]):
                runs[run] = (stage, record)
    series = {_run_name(stage): record.outputs["losses"] for stage, record in runs.values()}
    return [curves("loss-convergence", "Convergence", series, ("step", "loss, nats"), analysis.run)] if series else []


def _run_name(stage: Stage) -> str:
    _, source, convergence, _, seed = stage.slot.split("/")
    return f"{source} {seed}" if convergence == "source" else f"{source} {convergence} {seed}"


def _behaviors(analysis: Analysis, trained: list[tuple[Stage, Record]]) -> list[Figure]:
    by_behavior: dict[str, dict[str, list[float]]] = {}
    for plan in analysis.graph.cells:
        record = analysis.reading.record(plan.adapter) if plan.adapter is not None else None
        if record is not None:
            cell = plan.cell
            name = " ".join([cell.source, f"e{cell.epoch}", cell.negatives, f"s{cell.seed}", cell.arm]).rstrip()
            by_behavior.setdefault(cell.behavior, {}).setdefault(name, record.outputs["losses"])
    return [
        curves(f"loss-{behavior}", f"Training {behavior}", series, ("step", "loss, nats"), analysis.run)
        for behavior, series in by_behavior.items()
    ]


def _rho_row(stage: Stage, record: Record) -> tuple[TableCell, ...]:
    row = (f"{stage.key[:12]}/rho",)
    rho = record.outputs.get("rho", {})
    shares = [
        TableCell(f"{100 * rho[name]:.2g} %", row) if name in rho else TableCell("not recorded")
        for name in ("least", "median", "greatest")
    ]
    loss = TableCell(f"{record.outputs['last_epoch_loss']:.3f}", (f"{stage.key[:12]}/last_epoch_loss",))
    return (TableCell(stage.slot), loss, *shares, TableCell(str(record.outputs["adapter"]), code=True))


def cost(analysis: Analysis) -> Section | None:
    """Seconds and tokens of every stage."""
    rows = []
    for stage in analysis.graph.stages():
        record = analysis.reading.record(stage)
        if record is None:
            continue
        tokens = ", ".join(
            f"{n:,} {name.removesuffix('_tok')}" for name, n in record.facts.items() if name.endswith("_tok")
        )
        if n_halved := record.facts.get("halved"):
            tokens += f" (memory ran out: batches halved {counted(n_halved, 'time')})"
        row = (f"{stage.key[:12]}/seconds",)
        rows.append((
            TableCell(stage.slot), TableCell(stage.key[:12], code=True), TableCell(f"{record.seconds:.1f}", row), TableCell(tokens, row),
            TableCell("reused" if analysis.reused.get(stage.key, True) else "computed"),
        ))  # fmt: skip
    if not rows:
        return None
    kinds = _by_kind(analysis)
    columns = ("stage", "key", "seconds", "tokens", "in this run")
    blocks: tuple[Block, ...] = (
        ask(analysis, "cost"),
        Table("kinds", ("kind of stage", "stages", "seconds"), kinds, frozenset({1, 2})),
        Table("stages", columns, tuple(rows), frozenset({2}), folded=folded_if_long(rows, "stages")),
    )
    return Section("cost", "Cost", blocks)


def _by_kind(analysis: Analysis) -> tuple[tuple[TableCell, ...], ...]:
    records_of_kind: dict[str, list[Record]] = {}
    for stage in analysis.graph.stages():
        record = analysis.reading.record(stage)
        if record is not None:
            records_of_kind.setdefault(stage.kind, []).append(record)
    return tuple(
        (
            TableCell(kind),
            TableCell(str(len(records)), _ids(records)),
            TableCell(f"{sum(r.seconds for r in records):.1f}", _ids(records)),
        )
        for kind, records in records_of_kind.items()
    )


def _ids(records: list[Record]) -> tuple[str, ...]:
    return tuple(f"{record.key[:12]}/seconds" for record in records)


def planned(analysis: Analysis) -> Section | None:
    """Planned and actual seconds of the stages that this run computed itself."""
    plan = analysis.facts.get("plan")
    if not plan:
        return None
    pairs_of_kind: dict[str, list[tuple[float, Record]]] = {}
    for stage in analysis.graph.stages():
        record, seconds = analysis.reading.record(stage), plan["stages"].get(stage.key[:12])
        if record is not None and seconds is not None and not analysis.reused.get(stage.key, True):
            pairs_of_kind.setdefault(stage.kind, []).append((seconds, record))
    rows = [
        planned_row(kind, pairs) for kind, pairs in pairs_of_kind.items() if sum(r.seconds for _, r in pairs) >= LEAST_S
    ]
    if not rows:
        return None
    columns = ("kind of stage", "stages", "planned, s", "taken, s", "taken over planned")
    intro = f"The plan made when the run began, on {plan['machine']} ({plan['origin']})."
    if (start_s := analysis.facts.get("start_s")) is not None and plan.get("start_s"):
        intro += (
            f" Start-up, in which the base is loaded and tested, took {start_s:.1f} s of {plan['start_s']:.1f} planned."
        )
    blocks: list[Block] = [Table("planned", columns, tuple(rows), frozenset({1, 2, 3, 4}))]
    if "approved" in analysis.facts:
        blocks.insert(0, Note(f"Begun with --approve beyond its limits: {analysis.facts['approved']['beyond']}."))
    return Section("planned", "Plan against actual", tuple(blocks), intro)


def planned_row(kind: str, pairs: list[tuple[float, Record]]) -> tuple[TableCell, ...]:
    """Row of one kind: planned and actual seconds of its stages, and their ratio."""
    ids = tuple(f"{record.key[:12]}/seconds" for _, record in pairs)
    planned_s, taken_s = sum(seconds for seconds, _ in pairs), sum(record.seconds for _, record in pairs)
    factor = taken_s / planned_s if planned_s else None
    off = factor is None or not 1 / MOST_FACTOR <= factor <= MOST_FACTOR
    beside = kind == "judge" and not planned_s  # an external judge works while the GPU computes
    unplanned = "beside the GPU, not planned" if beside else "not planned"
    factor_text = unplanned if factor is None else f"{factor:.2f}" + (" (off by more than 2)" if off else "")
    return (
        TableCell(kind), TableCell(str(len(pairs)), ids), TableCell("beside" if beside else f"{planned_s:.1f}"), TableCell(f"{taken_s:.1f}", ids), TableCell(factor_text, ids),
    )  # fmt: skip


def handed_on(files: Mapping[str, bytes]) -> Section:
    """The figures and tables beside the page, with the sha256 of each."""
    rows = tuple(
        (TableCell(name), TableCell(f"{len(content):,}"), TableCell(hashlib.sha256(content).hexdigest(), code=True))
        for name, content in files.items()
    )
    intro = (
        "The figures and tables in the folder beside this page. `fastconv verify` makes each anew from the ledger and compares "
        "it with the file and with the hash here; the page and its Markdown twin it compares line by line."
    )
    table = Table("files-table", ("file", "bytes", "sha256"), rows, frozenset({1}), folded=f"{len(rows)} files")
    return Section("files", "Files beside this page", (table,), intro)
