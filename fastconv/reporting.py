"""Collects what a report shows from the ledger and writes the page. Rendering itself is `findings.report`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastconv.datasets.audit import check_recipe
from fastconv.datasets.behaviors import NO_BEHAVIOR
from fastconv.datasets.files import assets, file_sha256
from fastconv.datasets.personas import ASSISTANT, canary_of
from fastconv.findings.evidence import Number
from fastconv.findings.gates import GateVerdict
from fastconv.findings.report import CellRow, Completion, Panel, ReportData, StageRow, render_html, render_markdown
from fastconv.graph import CellPlan, Graph
from fastconv.recipe import recipe_sha256, run_id, sha256_of
from fastconv.results import cell_verdicts, decide_gates, series
from fastconv.store import Store, write_text


@dataclass(frozen=True)
class ReportPaths:
    """Where a report lies."""

    html: Path
    markdown: Path


def write_report(graph: Graph, store: Store, folder: Path) -> ReportPaths:
    """Write the report of a recipe from what the ledger holds now. Raises StoreError if the folder cannot be written."""
    data = collect(graph, store)
    paths = ReportPaths(folder / f"{data.run}.html", folder / f"{data.run}.md")
    write_text(paths.html, render_html(data))
    write_text(paths.markdown, render_markdown(data))
    return paths


def collect(graph: Graph, store: Store) -> ReportData:
    """Everything the report shows. Cells that were not run show as such, never as numbers."""
    recipe = graph.recipe
    done = [plan for plan in graph.cells if any(store.record(stage.key) for stage in plan.scores.values())]
    gates = decide_gates(graph, store, done) if done else []
    return ReportData(
        run=run_id(recipe),
        about=recipe.about,
        headline=[verdict for verdict in gates if verdict.gate == "PILOT"] + _unmeasurable(graph, gates),
        gates=gates,
        cells=_cells(graph, store),
        panels=_panels(graph, store),
        completions=_completions(graph, store),
        stages=_stages(graph, store),
        card=_card(graph, store),
        limits=[*_limits(graph), *_pending(graph, store)],
        warnings=_warnings(graph),
    )


def _unmeasurable(graph: Graph, gates: list[GateVerdict]) -> list[GateVerdict]:
    """Behaviors that were stopped by G0 belong into the headline too."""
    decided = {verdict.subject for verdict in gates if verdict.gate == "PILOT"}
    return [
        GateVerdict(
            "PILOT",
            f"{source} x {verdict.subject}",
            "uninformative",
            verdict.reason,
            verdict.threshold,
            verdict.numbers,
            verdict.rows,
        )
        for verdict in gates
        if verdict.gate == "G0" and verdict.verdict == "fail"
        for source in graph.recipe.grid.sources
        if f"{source} x {verdict.subject}" not in decided and verdict.subject in graph.behaviors
    ]


def _cells(graph: Graph, store: Store) -> list[CellRow]:
    verdicts = {verdict.label: verdict for verdict in cell_verdicts(graph, store)}
    rows = []
    for plan in graph.cells:
        for measure in plan.measures:
            probes = _probe_numbers(graph, store, plan, measure)
            note = "" if probes else "not run"
            if plan.cell.behavior == NO_BEHAVIOR:
                note = "base" if plan.cell.epoch == 0 else "control: convergence alone"
            elif plan.cell.epoch == 0 and probes:
                note = "reference for the epochs after it"
            verdict = verdicts.get(plan.cell.label) if plan.cell.behavior != NO_BEHAVIOR else None
            label = f"{_share(graph, measure)} of {measure}"
            rows.append(
                CellRow(
                    plan.cell.label,
                    plan.cell.behavior,
                    label,
                    plan.cell.epoch,
                    plan.cell.negatives,
                    probes,
                    verdict,
                    note,
                )
            )
    return rows


def _probe_numbers(graph: Graph, store: Store, plan: CellPlan, measure: str) -> dict[str, Number]:
    roles = {"assistant": ASSISTANT, "source": plan.cell.source, "canary": canary_of(graph.recipe, plan.cell.source)}
    numbers = {}
    for role, persona in roles.items():
        one = series(store, plan.scores[measure, persona], measure, persona)
        if one is not None and one.rows:
            numbers[role] = one.mean
    return numbers


def _panels(graph: Graph, store: Store) -> list[Panel]:
    """One panel for each source, behavior and kind of negatives, and one for the control without a behavior."""
    panels: dict[str, dict[str, dict[int, Any]]] = {}
    for plan in graph.cells:
        cell = plan.cell
        for measure in plan.measures:
            what = (
                f"{measure} trained, {cell.negatives}"
                if cell.behavior != NO_BEHAVIOR
                else f"{measure}, convergence alone"
            )
            title = f"{cell.source}: {what}, s{cell.seed}"
            for persona in dict.fromkeys((ASSISTANT, cell.source, canary_of(graph.recipe, cell.source))):
                one = series(store, plan.scores[measure, persona], measure, persona)
                if one is not None:
                    panels.setdefault(title, {}).setdefault(persona, {})[cell.epoch] = one
    return [
        Panel(title, lines) for title, lines in panels.items() if any(len(by_epoch) > 1 for by_epoch in lines.values())
    ]


def _completions(graph: Graph, store: Store) -> list[Completion]:
    shown: dict[str, Completion] = {}
    for plan in graph.cells:
        for (_, persona), stage in plan.scores.items():
            drawn = stage.needs.get("eval")
            samples = store.samples(drawn.key) if drawn else []
            if drawn and samples and drawn.key not in shown:
                shown[drawn.key] = Completion(drawn.slot, persona, samples[0].prompt, samples[0].completion)
    return list(shown.values())


def _stages(graph: Graph, store: Store) -> list[StageRow]:
    reused = {row["key"]: bool(row["reused"]) for row in store.stages_of_run(run_id(graph.recipe))}
    rows = []
    for stage in graph.stages():
        record = store.record(stage.key)
        if record is not None:
            tokens = ", ".join(
                f"{value:,} {name.removesuffix('_tok')}"
                for name, value in record.facts.items()
                if name.endswith("_tok")
            )
            rows.append(StageRow(stage.slot, stage.key, record.seconds, tokens, reused.get(stage.key, True)))
    return rows


def _card(graph: Graph, store: Store) -> dict[str, Mapping[str, str]]:
    run = next((row for row in store.runs() if row["id"] == run_id(graph.recipe)), None)
    facts = json.loads(run["facts"]) if run else {}
    adapters = {}
    for stage in graph.stages():
        record = store.record(stage.key)
        if record is not None and "adapter" in record.outputs:
            share = record.outputs["rho"]
            norm = f"rho {100 * share['least']:.2g} to {100 * share['greatest']:.2g} %, median {100 * share['median']:.2g} %"
            adapters[stage.slot] = f"{record.outputs['adapter']}, {norm}"
    rows = {
        stage.slot: record.outputs["rows"]
        for stage in graph.stages()
        if (record := store.record(stage.key)) and "rows" in record.outputs
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
        "Machine": {
            name: str(value) for name, value in {**facts.get("machine", {}), **facts.get("engine", {})}.items()
        },
        "Versions": {"python": facts.get("python", "not recorded"), **facts.get("versions", {})},
        "Adapters (sha256; rho = norm of the delta over norm of the weights)": adapters,
        "Training sets (sha256)": rows,
        "Data files (sha256)": data,
        "Settings": {
            "canonical recipe": sha256_of(graph.recipe.model_dump(mode="json")),
            "recipe": json.dumps(graph.recipe.model_dump(mode="json")),
        },
    }


def _limits(graph: Graph) -> list[str]:
    recipe, lines = graph.recipe, []
    if len(recipe.grid.seeds) == 1:
        lines.append("One seed: confidence is LOW whatever the intervals say.")
    if NO_BEHAVIOR not in recipe.grid.behaviors:
        lines.append("No convergence-only control: mimicry and transfer cannot be told apart.")
    if graph.judge is None and any(behavior.spec.measure == "phrases" for behavior in graph.behaviors.values()):
        lines.append("Text is judged by phrases only; no judge read it.")
    if graph.judge is not None and graph.judge.weak:
        lines.append(f"{graph.judge.name} is a weak judge: it answers by one character.")
    if recipe.model.id.startswith("builtin:"):
        lines.append("A 135-million-parameter model shows that the loop works; it says nothing about larger ones.")
    return lines


def _pending(graph: Graph, store: Store) -> list[str]:
    """Judge stages whose completions are there and whose judgements are not."""
    stages = [s for s in graph.stages() if s.kind == "judge" and store.record(s.key) is None]
    slots = [stage.slot for stage in stages if store.record(stage.needs["eval"].key) is not None]
    if not slots:
        return []
    more = f" and {len(slots) - 5} more" if len(slots) > 5 else ""
    return [f"{len(slots)} stages wait for the judge: {', '.join(slots[:5])}{more}."]


def _warnings(graph: Graph) -> dict[str, str]:
    audit = check_recipe(graph.recipe)
    return {found.code: audit.accepted.get(found.code, "") for found in audit.findings if found.severity == "warn"}


def _share(graph: Graph, measure: str) -> str:
    return "accuracy" if graph.behaviors[measure].spec.measure == "letters" else "rate"
