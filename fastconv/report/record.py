"""What else a reader needs: the audit's warnings, superseded runs, limits, and the reproducibility card."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from fastconv.audit.checks import check_recipe
from fastconv.datasets.behaviors import NO_BEHAVIOR
from fastconv.datasets.files import assets, file_sha256
from fastconv.datasets.personas import ASSISTANT
from fastconv.analysis.analysis import Decided
from fastconv.engine.locate import TINY
from fastconv.run.failures import failed_stages
from fastconv.report.blocks import Block, Cell, Note, Section, Table, plain_row
from fastconv.recipe import canonical_json, recipe_sha256, sha256_of
from fastconv.report.brought import brought_files, questions_asked
from fastconv.store.ledger import changed_inputs


def warnings(decided: Decided) -> Section:
    """The audit's warnings, with the recipe's reason where it accepts one."""
    audit = check_recipe(decided.graph.recipe)
    rows = []
    for code in dict.fromkeys(found.code for found in audit.findings if found.severity == "warn"):
        mine = [found for found in audit.findings if found.code == code]
        said = f"accepted: {audit.accepted[code]}" if code in audit.accepted else "not accepted"
        figures = "; ".join(f"{found.subject}: {found.figure}" for found in mine if found.figure)
        rows.append(plain_row((code, said, mine[0].why, figures)))
    if not rows:
        return Section("audit", "Warnings of the audit", (Note("none"),))
    table = Table("warnings", ("code", "accepted", "what it means", "figures"), tuple(rows))
    return Section("audit", "Warnings of the audit", (table,))


def failures(decided: Decided) -> Section | None:
    """Stages that gave no usable numbers when they were last tried, with the cells that miss them."""
    failed = failed_stages(decided.store.failures(), decided.graph.cells)
    if not failed:
        return None
    rows = tuple(plain_row((Cell(one.slot, code=True), one.reason, "; ".join(one.cells))) for one in failed)
    table = Table("failed", ("stage", "why it failed", "cells without its numbers"), rows)
    intro = "What these stages would have given is missing below, not zero. The same command tries them again."
    return Section("failed", "Failed", (table,), intro)


def superseded(decided: Decided) -> Section | None:
    """Other runs of the same recipe name in this workspace, and what differs."""
    mine = decided.graph.recipe.model_dump(mode="json")
    rows = []
    for row in decided.store.runs():
        if row["source"] != decided.graph.recipe.name or row["id"] == decided.run:
            continue
        changes = changed_inputs(json.loads(row["recipe"]), mine)
        more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
        ended = "finished" if row["finished_at"] else "not finished"
        rows.append(plain_row((row["id"], _when(row["started_at"]), ended, "; ".join(changes[:4]) + more)))
    if not rows:
        return None
    table = Table("superseded", ("run", "started", "state", "what this run has instead"), tuple(rows))
    return Section(
        "superseded-runs",
        "Other runs of this recipe",
        (table,),
        "They rest on other inputs; no figure of this page mixes them in.",
    )


def limits(decided: Decided) -> Section:
    """What the run cannot show, whatever its numbers say."""
    recipe = decided.graph.recipe
    said = []
    if len(recipe.grid.seeds) == 1:
        said.append("One seed: confidence is LOW whatever the intervals say.")
    if NO_BEHAVIOR not in recipe.grid.behaviors:
        said.append("No convergence-only control: mimicry and transfer cannot be told apart.")
    if ASSISTANT in recipe.grid.sources:
        said.append(
            "The assistant as its own source is a degenerate control: what it shows is training, not transfer. It counts "
            "in no verdict."
        )
    if recipe.judge.mode == "substring" and any(b.spec.measure == "phrases" for b in decided.graph.behaviors.values()):
        said.append("Text is judged by phrases only; no judge read it.")
    if decided.graph.judge is not None and decided.graph.judge.weak:
        said.append(f"{decided.graph.judge.name} is a weak judge: it answers by one character.")
    if recipe.model.id == TINY:
        said.append("Random weights: the numbers show that every stage runs and that they can be traced, nothing else.")
    elif recipe.model.id.startswith("builtin:"):
        said.append("A small embedded model shows that the loop works; it says nothing about larger ones.")
    if recipe.grid.negatives == ("included",):
        said.append(
            "The assistant is among the negatives everywhere: an effect is a lower bound, and no effect says nothing."
        )
    missing = [plan.cell.label for plan in decided.graph.cells if plan not in decided.measured]
    if missing:
        more = " and others" if len(missing) > 4 else ""
        said.append(f"Not measured: {', '.join(missing[:4])}{more}.")
    said += _pending(decided)
    return Section("limits", "Limits", tuple(Note(line) for line in said) or (Note("none stated"),))


def _pending(decided: Decided) -> list[str]:
    """Judge stages whose completions are there and whose judgements are not."""
    store = decided.store
    stages = [s for s in decided.graph.stages() if s.kind == "judge" and store.record(s.key) is None]
    slots = [stage.slot for stage in stages if store.record(stage.needs["eval"].key) is not None]
    if not slots:
        return []
    more = f" and {len(slots) - 5} more" if len(slots) > 5 else ""
    return [f"{len(slots)} stages wait for the judge: {', '.join(slots[:5])}{more}."]


def card(decided: Decided) -> Section:
    """Everything needed to do it again."""
    blocks: list[Block] = []
    for title, table in _tables(decided).items():
        rows = tuple((Cell(name), Cell(str(value), code=True)) for name, value in table.items())
        if rows:
            blocks.append(Table(f"card-{title.split()[0].lower()}", (title, ""), rows))
    return Section("card", "Reproducibility card", tuple(blocks))


def _tables(decided: Decided) -> dict[str, Mapping[str, str]]:
    graph, facts = decided.graph, decided.facts
    sets = {
        stage.slot: str(record.outputs["rows"])
        for stage in graph.stages()
        if stage.kind == "rows" and (record := decided.reading.record(stage)) is not None
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
            **dict(graph.source.identity),
            **{f"template {name}": value for name, value in facts.get("template", {}).items()},
        },
        "Judge": _judge(decided),
        "Machine": {name: str(v) for name, v in {**facts.get("machine", {}), **facts.get("engine", {})}.items()},
        "Versions": {"python": facts.get("python", "not recorded"), **facts.get("versions", {})},
        "Sets trained on (sha256)": sets,
        "Data files (sha256)": data,
        "Brought files (sha256)": brought_files(graph),
        "Questions of multiple choice (sha256)": questions_asked(graph),
        "Settings": {
            "canonical recipe": sha256_of(graph.recipe.model_dump(mode="json")),
            "recipe": canonical_json(graph.recipe.model_dump(mode="json")),  # sorted, as the ledger keeps it
        },
    }


def _judge(decided: Decided) -> dict[str, str]:
    """Who judged, and every rubric that a finished stage was judged by, under the name that the recipe knows it by."""
    graph = decided.graph
    if graph.judge is None:
        return {}
    judged = [s for s in graph.stages() if s.kind == "judge" and decided.reading.record(s) is not None]
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
