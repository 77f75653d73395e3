"""Judge against phrases: the same answers scored twice, and rates corrected for the judge's known mistakes."""

from __future__ import annotations

from fastconv.analysis.agreement import judged_measures, judging_money, pair_of
from fastconv.analysis.analysis import Decided
from fastconv.report.blocks import Block, Cell, Note, Section, Table
from fastconv.report.figures import Point, scatter
from fastconv.stats.units import full
from fastconv.report.claims import NoSuchClaimError, ask


def judge_against_phrases(decided: Decided) -> Section | None:
    """Agreement with kappa for each measure, a point for each cell, corrected rates where a calibration exists."""
    measures = judged_measures(decided)
    phrases = [name for name, behavior in decided.graph.behaviors.items() if behavior.spec.measure == "phrases"]
    if not measures:
        if not phrases:
            return None
        text = f"No judge read the answers. Scored by phrases alone, which are blind to meaning: {', '.join(phrases)}."
        return Section("judge", "Judge against phrases", (Note(text),))
    blocks: list[Block] = []
    points = _points(decided)
    if points:
        axes = ("by phrases, %", "by the judge, %")
        blocks.append(scatter("judge", "The same answers scored twice", points, axes, decided.run, diagonal=True))
    for measure in measures:
        try:
            blocks.append(ask(decided, "agreement", measure=measure))
        except NoSuchClaimError:
            blocks.append(Note(f"{measure}: no answer was scored both ways."))
    corrected = _corrected(decided)
    if corrected:
        blocks.append(Table("corrected", ("contrast", "the assistant's rate"), tuple(corrected)))
    else:
        blocks.append(
            Note("No calibration of this judge with these rubrics is in the ledger, so no rate is corrected.")
        )
    blocks += _money(decided)
    return Section("judge", "Judge against phrases", tuple(blocks))


def _points(decided: Decided) -> list[Point]:
    points, seen = [], set()
    for plan in decided.graph.cells:
        for measure, probe in plan.beside:
            pair = pair_of(decided, plan, measure, probe)
            if pair is None or pair[0].stage in seen or not (pair[0].rows and pair[1].rows):
                continue
            seen.add(pair[0].stage)
            top = full(pair[0].unit)
            points.append(Point(100 * pair[1].mean.value, 100 * pair[0].mean.value / top, label=probe, group=measure))
    return points


def _corrected(decided: Decided) -> list[tuple[Cell, ...]]:
    rows = []
    for one in decided.verdicts:
        try:
            claim = ask(decided, "corrected", label=one.label)
        except NoSuchClaimError:
            continue
        rows.append((Cell(one.label), Cell.saying(claim)))
    return rows


def _money(decided: Decided) -> list[Block]:
    money = judging_money(decided)
    if money is None:
        return []
    rows = tuple(
        (Cell(name), Cell("no cap" if usd is None else f"${usd:.2f}", ("ledger/judge_totals",)))
        for name, usd in money.items()
    )
    return [Table("money", ("judging, whole workspace", "dollars"), rows, frozenset({1}))]
