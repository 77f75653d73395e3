"""Where the time of a run went: plan against actual, tokens a second, what the card did meanwhile, and the figures by probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from fastconv.startup import StartTimes
from tests.card.ledgers import Ledger, StageRow
from tests.card.process import Look, summary

#: Facts that count tokens of a stage's own work; a prompt's tokens come beside those drawn.
TOKENS = ("trained_tok", "sampled_tok", "scored_tok", "read_tok")
#: Stages that end within this of one another were computed in one pass.
_TOGETHER_S = 0.02
#: Gaps that a sheet names.
_NAMED = 8
_STACKS = ("base", "one adapter", "two adapters")


def _ratio(taken: float, planned: float) -> float | None:
    return round(taken / planned, 3) if planned else None


def plan_against_actual(ledger: Ledger, planned_kinds: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Seconds by the plan that the run was begun with and taken, of every finished stage and of each kind.

    `planned_kinds` are those of `fastconv plan --json`, made before the run: what they say of stages that never ran (a gate ruled
    them out) stands under `not_run_s`.
    """
    plan = ledger.facts.get("plan", {})
    by_key = plan.get("stages", {})
    stages = {
        slot: {
            "work": stage.work, "planned_s": by_key[stage.key[:12]], "taken_s": round(stage.seconds, 3),
            "ratio": _ratio(stage.seconds, by_key[stage.key[:12]]),
        }
        for slot, stage in ledger.stages.items()
        if stage.key[:12] in by_key
    }  # fmt: skip
    kinds: dict[str, dict[str, Any]] = {}
    for one in stages.values():
        kind = kinds.setdefault(one["work"], {"n": 0, "planned_s": 0.0, "taken_s": 0.0})
        kind["n"] += 1
        kind["planned_s"] += one["planned_s"]
        kind["taken_s"] += one["taken_s"]
    for kind in kinds.values():
        kind |= {"planned_s": round(kind["planned_s"], 2), "taken_s": round(kind["taken_s"], 2)}
        kind["ratio"] = _ratio(kind["taken_s"], kind["planned_s"])
    planned_s, taken_s = (sum(kind[name] for kind in kinds.values()) for name in ("planned_s", "taken_s"))
    whole_s = sum(float(kind["seconds"]) for kind in planned_kinds)
    return {
        "machine": plan.get("machine"), "origin": plan.get("origin"),
        "start": {"planned_s": plan.get("start_s"), "taken_s": ledger.facts.get("start_s"), **start_parts(ledger)},
        "kinds": kinds, "stages": stages,
        "all": {"planned_s": round(planned_s, 2), "taken_s": round(taken_s, 2), "ratio": _ratio(taken_s, planned_s)},
        "before_the_run": {kind["kind"]: {"n": kind["n"], "seconds": round(kind["seconds"], 2)} for kind in planned_kinds},
        "not_run_s": round(whole_s - planned_s, 2) if planned_kinds else None,
    }  # fmt: skip


def start_parts(ledger: Ledger) -> dict[str, float]:
    """Seconds of the parts of a start, as far as the run recorded them; what is missing to `taken_s` is in no part."""
    return {one.name: ledger.facts[one.name] for one in fields(StartTimes) if one.name in ledger.facts}


def wall(ledger: Ledger, began: float, ended: float) -> dict[str, Any]:
    """Seconds of a run that began and ended at these times: to its first stage, in stages, and between them.

    What lies between two stages is told by the kind of the one that follows, and the longest such gaps by name. Stages that an
    earlier sitting had finished count only as `done_before`.
    """
    every = sorted(ledger.stages.values(), key=lambda stage: stage.finished_at)
    stages = [stage for stage in every if stage.finished_at >= began]
    if not stages:
        return {"wall_s": round(ended - began, 2), "stages": 0, "done_before": len(every)}
    groups: list[list[StageRow]] = [[stages[0]]]
    for before, stage in pairwise(stages):
        if stage.work == before.work and stage.finished_at - before.finished_at < _TOGETHER_S:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    at, gaps = groups[0][-1].finished_at - sum(stage.seconds for stage in groups[0]), []
    first_s = at - began
    for group in groups:
        gap_s = group[-1].finished_at - at - sum(stage.seconds for stage in group)
        gaps.append((gap_s, group[0].work, group[0].slot))
        at = group[-1].finished_at
    by_kind: dict[str, float] = {}
    for gap_s, work, _ in gaps:
        by_kind[work] = by_kind.get(work, 0.0) + gap_s
    return {
        "wall_s": round(ended - began, 2), "to_first_stage_s": round(first_s, 2), "stages": len(stages),
        "done_before": len(every) - len(stages),
        "in_stages_s": round(sum(stage.seconds for stage in stages), 2),
        "between_stages_s": round(sum(gap_s for gap_s, *_ in gaps), 2),
        "between_by_kind": {work: round(seconds, 2) for work, seconds in by_kind.items()},
        "longest_between": [
            {"seconds": round(gap_s, 2), "before": slot} for gap_s, _, slot in sorted(gaps, reverse=True)[:_NAMED]
        ],
        "after_the_last_s": round(ended - at, 2),
    }  # fmt: skip


def rates(ledger: Ledger) -> dict[str, Any]:
    """Tokens a second by kind of work, and by the number of adapters that it stands on."""
    found: dict[str, dict[str, Any]] = {}
    for stage in ledger.stages.values():
        n_tok = sum(int(stage.facts.get(name, 0)) for name in TOKENS)
        if not n_tok:
            continue
        name = stage.work
        if stage.kind in ("eval", "behavior"):
            below = stage.n_adapters if stage.kind == "eval" else int("snapshot" in stage.inputs.get("needs", {}))
            name = f"{name}, {'above a snapshot' if below else 'on the base'}" if stage.kind == "behavior" else name
            name = f"{name}, {_STACKS[below]}" if stage.kind == "eval" else name
        one = found.setdefault(name, {"n": 0, "tok": 0, "seconds": 0.0})
        one["n"] += 1
        one["tok"] += n_tok
        one["seconds"] += stage.seconds
    for one in found.values():
        one["tok_per_s"] = round(one["tok"] / one["seconds"]) if one["seconds"] else None
        one["seconds"] = round(one["seconds"], 2)
    return found


def card_by_kind(ledger: Ledger, looks: Sequence[Look]) -> dict[str, Any]:
    """What the card did in stages of each kind, and in none; a look belongs to the stage that was under way."""
    spans = [(stage.began_at, stage.finished_at, stage.work) for stage in ledger.stages.values() if stage.seconds > 0]
    by_kind: dict[str, list[Look]] = {}
    for look in looks:
        kind = next((work for began, ended, work in spans if began <= look.at <= ended), "in no stage")
        by_kind.setdefault(kind, []).append(look)
    return {kind: summary(found) for kind, found in by_kind.items()}


def card_use(ledger: Ledger, looks: Sequence[Look]) -> dict[str, Any]:
    """What the card did in all, since the first stage began, and by kind of stage."""
    began = min((stage.began_at for stage in ledger.stages.values()), default=float("inf"))
    return {
        "all": summary(looks), "since_the_first_stage": summary([look for look in looks if look.at >= began]),
        "by_kind": card_by_kind(ledger, looks),
    }  # fmt: skip


def figures(ledger: Ledger) -> dict[str, float]:
    """Mean of every scored stage by slot: accuracies of letters, rates of phrases."""
    return {
        slot: round(fmean(values), 6)
        for slot, stage in ledger.stages.items()
        if (values := [s[3] for s in stage.scores if s[2] in ("accuracy", "rate") and s[3] is not None])
    }


def memory(ledger: Ledger) -> dict[str, Any]:
    """What trainings recorded of the card's memory: the most that torch had allocated, by kind, and what was halved for it."""
    peaks: dict[str, int] = {}
    for stage in ledger.stages.values():
        if "peak_bytes" in stage.facts:
            peaks[stage.kind] = max(peaks.get(stage.kind, 0), int(stage.facts["peak_bytes"]))
    halved = {slot: stage.facts["halved"] for slot, stage in ledger.stages.items() if "halved" in stage.facts}
    limits = {
        stage.facts["micro_batch_limit"] for stage in ledger.stages.values() if "micro_batch_limit" in stage.facts
    }
    recomputed = [slot for slot, stage in ledger.stages.items() if stage.facts.get("recomputed")]
    return {"torch_peak_bytes": peaks, "halved": halved, "micro_batch_limits": sorted(limits), "recomputed": recomputed}


def captures(ledger: Ledger) -> dict[str, Any]:
    """Graphs that trainings captured and the seconds of it, by kind, as far as stages recorded it."""
    found: dict[str, dict[str, float]] = {}
    for stage in ledger.stages.values():
        for name in ("launched", "replayed", "captures", "capture_s"):
            if name in stage.facts:
                kind = found.setdefault(stage.kind, {})
                kind[name] = round(kind.get(name, 0.0) + float(stage.facts[name]), 3)
    return found


def contrast_words(reports: Path) -> dict[str, str]:
    """The word of every contrast in the newest report of a folder."""
    import polars as pl

    tables = sorted(reports.glob("*/tables/contrasts.parquet"), key=lambda path: path.stat().st_mtime)
    if not tables:
        return {}
    rows = pl.read_parquet(tables[-1], columns=["label", "behavior", "kind"]).iter_rows()
    return {f"{label} {behavior}": kind for label, behavior, kind in rows}
