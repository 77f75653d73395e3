"""The first sections: what is read in a minute, the same in numbers, and the matrix of all declared contrasts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.contrasts import NEGATIVES_IN_WORDS, ContrastSubject, Part
from fastconv.analysis.sides import SideContrast
from fastconv.datasets.behaviors import NO_BEHAVIOR
from fastconv.experiment.graph import CellPlan
from fastconv.report.blocks import OPEN_ROWS, Block, Figure, Note, Section, Table, TableCell
from fastconv.report.claims import NoSuchClaimError, alike, ask
from fastconv.report.figures import heatmap, lines
from fastconv.report.measures import ROLES, axis_of, role_points
from fastconv.report.wording import leading, named
from fastconv.stats.units import Unit, p_value, scale, signed, size_text
from fastconv.stats.verdicts import CellVerdict

#: More pilot gates than this are shown in a table.
OPEN_PILOTS = 4
_COLUMNS = (
    "contrast", "verdict", "change", "assistant", "canary", "mimicry", "interval", "over questions, this run", "over seeds", "p", "p by sign flips", "threshold", "confidence", "why",
)  # fmt: skip
#: What a contrast between sides is.
_BETWEEN = (
    "A contrast between two sides is the first minus the second, paired by question, with nothing taken off; the canary's own "
    "difference stands beside it. Stronger, weaker: the first side shows more, or less, of the measure than the second. "
)
#: What a contrast of the grid is.
_OVER_EPOCHS = (
    "Each contrast is the assistant's change against epoch zero, paired by question, minus the canary's, minus the same "
    "without a behavior adapter where that control was run; what each of them did by itself stands beside it. "
)
_LETTERS = {
    "transfer": "T",
    "stronger": "S",
    "weaker": "W",
    "reverse": "R",
    "generic": "G",
    "equivalent": "=",
    "inconclusive": "?",
    "uninformative": "u",
    "withheld": "w",
}


def headline(analysis: Analysis) -> Section:
    """What is read in a minute: the answer, how sure it is and why not surer, one figure, and what to run next."""
    blocks: list[Block] = []
    onward = Note("What to run next: the same recipe on, to its end.")
    if not analysis.declared:
        blocks.append(Note("The recipe declares no contrast: it has no epoch besides the first."))
        onward = Note("What to run next: the same recipe with later epochs (`grid.epochs`).")
    elif not analysis.verdicts:
        blocks.append(Note("No declared contrast was measured yet."))
    else:
        onward = ask(analysis, "next")
        blocks += [ask(analysis, "answer"), *_edited_first(analysis), ask(analysis, "sure")]
        if (figure := _first_figure(analysis)) is not None:
            blocks.append(figure)
    try:
        blocks.append(ask(analysis, "gate"))
    except NoSuchClaimError:
        if not analysis.graph.recipe.grid.contrasts:
            blocks.append(Note("No pilot gate was decided: the recipe's cells are not all done."))
    return Section("verdict", "Verdict", (*blocks, onward))


def _first_figure(analysis: Analysis) -> Figure | None:
    """Assistant, source and canary over the epochs of the leading contrast's column; None if it has one epoch."""
    subject = analysis.subject(leading(analysis.answers).label)
    if isinstance(subject, SideContrast):
        return _sides(analysis, subject)
    column = {at.epoch: at for at in analysis.found.subjects if replace(at, epoch=subject.epoch) == subject}
    part = analysis.found.main(subject.behavior)
    series = {role: line for role in ROLES if (line := role_points(analysis, part, column, role))}
    if not any(len(line) > 1 for line in series.values()):
        return None
    title = f"{subject.source}, {subject.behavior}, {NEGATIVES_IN_WORDS.get(subject.negatives, subject.negatives)}"
    names = {f"{subject.source} (the source)" if role == "source" else role: line for role, line in series.items()}
    axes = ("convergence epoch", f"{subject.behavior}: {axis_of(analysis, part)}")
    return lines("first", title, names, axes, analysis.run, (0.0, 100.0), (6.4, 3.0))


def _sides(analysis: Analysis, contrast: SideContrast) -> Figure:
    """The level of a measure under every probe, on the base and in each cell of the contrast's source; seeds are averaged.

    Arms may differ in the condition of their source's rows: then the base has several levels there, in the order of the rows.
    """
    part, recipe = analysis.found.main(contrast.behavior), analysis.graph.recipe
    cells = {
        subject: plans
        for subject, plans in analysis.found.subjects.items()
        if subject.source == contrast.source and contrast.behavior in plans[0].measures
        if subject.epoch or subject.behavior != NO_BEHAVIOR
    }
    roles = [*ROLES, *recipe.eval.probes]
    at_base = [[_level(analysis, part, plans, role, at_base=True) for role in roles] for plans in cells.values()]
    levels = [[_level(analysis, part, plans, role) for role in roles] for plans in cells.values()]
    unit = analysis.graph.behaviors[contrast.behavior].spec.unit
    margin = analysis.found.gates.threshold(contrast.behavior, unit) * analysis.found.direction(contrast.behavior)
    values = [
        [None if one is None or base is None else (one - base) / margin for one, base in zip(line, bases, strict=True)]
        for line, bases in zip(levels, at_base, strict=True)
    ]
    texts = [["-" if one is None else f"{scale(unit) * one:.0f}" for one in line] for line in (*at_base, *levels)]
    base_texts = ["/".join(dict.fromkeys(column)) for column in zip(*texts[: len(cells)], strict=True)]
    texts = [base_texts, *texts[len(cells) :]]
    values = [[None if one == "-" else 0.0 for one in base_texts], *values]
    title = f"{contrast.behavior}: {axis_of(analysis, part)}"
    return heatmap(
        "first", title, ["base", *row_names(list(cells))], roles, values, texts, analysis.run, "measurements"
    )


def row_names(subjects: Sequence[ContrastSubject]) -> list[str]:
    """The shortest names that tell these cells apart: arm, or behavior where there are no arms, and what else they differ in."""
    words = {
        subject: {
            "arm": subject.arm,
            "behavior": "convergence alone" if subject.behavior == NO_BEHAVIOR else subject.behavior,
            "epoch": f"epoch {subject.epoch}",
            "negatives": NEGATIVES_IN_WORDS.get(subject.negatives, subject.negatives),
            "convergence": f"on {subject.convergence} answers",
        }
        for subject in subjects
    }
    names = {subject: said["arm"] or said["behavior"] for subject, said in words.items()}
    for field in ("behavior", "epoch", "negatives", "convergence"):
        differ = len({said[field] for said in words.values()}) > 1
        if differ and len(set(names.values())) < len(names):
            names = {one: ", ".join(dict.fromkeys([name, words[one][field]])) for one, name in names.items()}
    return list(names.values())


def _level(
    analysis: Analysis, part: Part, plans: Sequence[CellPlan], role: str, *, at_base: bool = False
) -> float | None:
    """The mean over seeds of a cell's level under a probe; None if no seed is measured."""
    read = analysis.found.base if at_base else analysis.found.now
    found = [read(plan, part, analysis.found.persona(plan.cell, role)) for plan in plans]
    means = [series.mean.value for series in found if series is not None and series.rows]
    return sum(means) / len(means) if means else None


def numbers(analysis: Analysis) -> Section | None:
    """Counts, the largest change of each behavior, study gates and pilot gates."""
    blocks: list[Block] = []
    pilots = [gate for gate in analysis.gates if gate.gate == "PILOT" and gate.rows]
    if any(verdict.rows for verdict in analysis.verdicts):
        blocks.append(ask(analysis, "counts"))
    behaviors = dict.fromkeys(verdict.behavior for verdict in analysis.verdicts if verdict.estimate is not None)
    blocks += [ask(analysis, "largest", behavior=behavior) for behavior in behaviors]
    if analysis.measured:
        blocks.append(ask(analysis, "unscored"))
    for gate in analysis.gates:
        if gate.gate in ("CONFIRM", "FALSIFY") and gate.verdict in ("pass", "fail"):
            blocks.append(ask(analysis, "study", gate=gate.gate, subject=gate.subject))
    claims = [ask(analysis, "pilot", subject=gate.subject) for gate in pilots]
    if len(claims) <= OPEN_PILOTS:
        return Section("numbers", "In numbers", (*blocks, *claims)) if blocks or claims else None
    rows = tuple(
        (TableCell(pilot.verdict, word=pilot.verdict), TableCell.saying(claim))
        for pilot, claim in zip(pilots, claims, strict=True)
    )
    table = Table("pilots", ("pilot gate", "why"), rows, folded=f"{len(rows)} pilot gates")
    return Section("numbers", "In numbers", (*blocks, table))


def _edited_first(analysis: Analysis) -> list[Block]:
    """Verdicts that differ under the first thresholds, shown before all others."""
    first = {verdict.label: verdict.kind for verdict in analysis.under_first[1]}
    return [
        ask(analysis, "edited_finding", label=verdict.label)
        for verdict in analysis.verdicts
        if first.get(verdict.label, verdict.kind) != verdict.kind
    ]


def findings(analysis: Analysis) -> Section | None:
    """The heatmap of declared contrasts and the table behind it."""
    subjects = analysis.declared
    if not subjects:
        return None
    by_label = {verdict.label: verdict for verdict in analysis.verdicts}
    verdicts = {subject: by_label.get(label) for label, subject in subjects.items()}
    blocks: list[Block] = []
    on_epochs = {subject: one for subject, one in verdicts.items() if isinstance(subject, ContrastSubject)}
    if any(verdict is not None and verdict.estimate is not None for verdict in on_epochs.values()):
        blocks.append(_matrix(analysis, on_epochs))
        blocks.append(
            Note(
                "Colour and sign: the change in the direction of leakage, in thresholds (orange) or against it (purple). "
                "T transfer, R reverse, G generic (the canary moves as much), = equivalent, ? inconclusive, u uninformative, w withheld; a dash was not measured."
            )
        )
    # Not in a caption: without findings the only table is folded away, and its caption with it.
    weak_sign_flips = dict.fromkeys(verdict.behavior for verdict in analysis.verdicts if verdict.sign_flip_warning)
    blocks += [ask(analysis, "sign_flips", behavior=behavior) for behavior in weak_sign_flips]
    blocks += _run_noise(analysis)
    told = alike(analysis)
    blocks += [
        ask(analysis, "alike", label=label) for label in dict.fromkeys(group[0].label for group in told.values())
    ]
    blocks += _tables(analysis, verdicts, told)
    return Section(
        "findings", "Findings", tuple(blocks),
        f"{_BETWEEN if len(on_epochs) < len(verdicts) else ''}{_OVER_EPOCHS if on_epochs else ''}"
        "Intervals hold the noise from run to run beside that over questions: the spread of the seeds from three on, else a "
        "declared one. "
        "p-values are corrected over all declared contrasts (Holm).",
    )  # fmt: skip


def _run_noise(analysis: Analysis) -> list[Block]:
    """What stands for the noise from run to run: one line for the behaviors that share it."""
    behaviors: dict[tuple[str, ...], list[str]] = {}
    for behavior in dict.fromkeys(verdict.behavior for verdict in analysis.verdicts if verdict.run_spread is not None):
        told = dict.fromkeys(verdict.runs_text for verdict in analysis.verdicts if verdict.behavior == behavior)
        behaviors.setdefault(tuple(told), []).append(behavior)
    return [ask(analysis, "runs", behavior=", ".join(names)) for names in behaviors.values()]


def _matrix(analysis: Analysis, verdicts: dict[ContrastSubject, CellVerdict | None]) -> Figure:
    several = len({subject.negatives for subject in verdicts}) > 1

    def row_of(subject: ContrastSubject) -> str:
        who = f"{subject.source}, {subject.arm}" if subject.arm else subject.source
        return f"{who},\n{NEGATIVES_IN_WORDS.get(subject.negatives, subject.negatives)}" if several else who

    rows = list(dict.fromkeys(row_of(subject) for subject in verdicts))
    behaviors = list(dict.fromkeys(subject.behavior for subject in verdicts))
    epochs = sorted({subject.epoch for subject in verdicts})
    columns = [(behavior, epoch) for behavior in behaviors for epoch in epochs]
    by_place = {(row_of(s), (s.behavior, s.epoch)): verdict for s, verdict in verdicts.items()}
    values: list[list[float | None]] = []
    texts: list[list[str]] = []
    for row in rows:
        line = [by_place.get((row, column)) for column in columns]
        values.append([_in_thresholds(analysis, verdict) for verdict in line])
        texts.append([_short(verdict) for verdict in line])
    names = [f"{behavior}, epoch {epoch}" for behavior, epoch in columns]
    return heatmap("matrix", "Change beyond canary and mimicry, points", rows, names, values, texts, analysis.run)


def _in_thresholds(analysis: Analysis, verdict: CellVerdict | None) -> float | None:
    if (
        verdict is None
        or verdict.estimate is None
        or not verdict.margin
        or verdict.kind in ("uninformative", "withheld")
    ):
        return None
    return analysis.found.direction(verdict.behavior) * verdict.estimate / verdict.margin


def _short(verdict: CellVerdict | None) -> str:
    if verdict is None:
        return "-"
    letter = _LETTERS[verdict.kind]
    if verdict.estimate is None or verdict.kind in ("uninformative", "withheld"):
        return letter
    return f"{signed(scale(verdict.unit) * verdict.estimate, 0)} {letter}"


def _tables(
    analysis: Analysis, verdicts: Mapping[ContrastSubject | SideContrast, CellVerdict | None], told: Collection[str]
) -> list[Table]:
    """One table, or if it were long two: contrasts with a finding, and, folded away, those without."""
    seeded = any(verdict is not None and verdict.over_seeds is not None for verdict in verdicts.values())
    columns = tuple(name for name in _COLUMNS if seeded or name != "over seeds")
    rows = {subject: _row(analysis, subject, verdict, told, seeded=seeded) for subject, verdict in verdicts.items()}
    if all(isinstance(subject, SideContrast) for subject in rows):  # sides are compared as they are
        at = columns.index("mimicry")
        columns = columns[:at] + columns[at + 1 :]
        rows = {subject: row[:at] + row[at + 1 :] for subject, row in rows.items()}
    numeric = frozenset(range(2, columns.index("confidence")))
    caption = (
        "Changes in percentage points, or in points where a judge scores. Near an end of the scale the interval over questions "
        "alone is too short (docs/POWER.md); no word rests on it."
    )
    if seeded:
        caption += (
            " Over seeds: the t interval over the means of the seeds; where it says no, a change is inconclusive."
        )
    if len(rows) <= OPEN_ROWS:
        return [Table("contrasts", columns, tuple(rows.values()), numeric, caption)]
    without_finding = [
        s for s, verdict in verdicts.items() if verdict is None or verdict.kind in ("inconclusive", "uninformative")
    ]
    with_finding = tuple(row for subject, row in rows.items() if subject not in without_finding)
    rest = tuple(rows[subject] for subject in without_finding)
    folded = f"{len(rest)} contrasts that say nothing either way, or were not run"
    tables = [Table("contrasts", columns, with_finding, numeric, caption)] if with_finding else []
    return [*tables, Table("contrasts-silent", columns, rest, numeric, caption, folded)] if rest else tables


def _row(
    analysis: Analysis,
    subject: ContrastSubject | SideContrast,
    verdict: CellVerdict | None,
    told: Collection[str],
    *,
    seeded: bool,
) -> tuple[TableCell, ...]:
    label = subject.label(analysis.found.main(subject.behavior))
    if verdict is None:
        return (
            TableCell(named(analysis, label)),
            TableCell("not run", word="absent"),
            *[TableCell("")] * (12 if seeded else 11),
        )
    has_estimate = verdict.estimate is not None
    rows = verdict.rows if has_estimate else ()
    estimate = signed(scale(verdict.unit) * (verdict.estimate or 0.0)) if has_estimate else ""
    over = verdict.over_seeds
    over_seeds = _range(over.low, over.high, verdict.unit) if over is not None else ""
    own = verdict.over_questions
    moved = tuple(
        TableCell(signed(scale(verdict.unit) * one.estimate), rows)
        if one is not None and one.estimate is not None
        else TableCell("")
        for one in (verdict.assistant, verdict.canary, verdict.mimicry)
    )
    return (
        TableCell(named(analysis, label)), TableCell(verdict.kind, word=verdict.kind), TableCell(estimate, rows), *moved,
        TableCell(_range(verdict.low, verdict.high, verdict.unit), rows), TableCell(_range(own.low, own.high, verdict.unit) if own else "", rows if own else ()),
        *((TableCell(over_seeds, rows),) if seeded else ()),
        TableCell(p_value(verdict.p_corrected), rows), TableCell(p_value(verdict.p_sign_flip), rows),
        TableCell(size_text(verdict.margin, verdict.unit) if verdict.margin else ""), TableCell(verdict.confidence.level),
        TableCell("as said above") if label in told else TableCell.saying(ask(analysis, "finding", label=label)),
    )  # fmt: skip


def _range(low: float | None, high: float | None, unit: Unit) -> str:
    """An interval as a table shows it; empty if there is none."""
    return (
        f"{signed(scale(unit) * low)} to {signed(scale(unit) * high)}" if low is not None and high is not None else ""
    )
