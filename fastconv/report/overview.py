"""The first page: what was found, how sure that is, and the matrix of all declared contrasts."""

from __future__ import annotations

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.contrasts import ContrastSubject
from fastconv.report.blocks import OPEN_ROWS, Block, Figure, Note, Section, Table, TableCell
from fastconv.report.claims import NoSuchClaimError, ask
from fastconv.report.figures import heatmap
from fastconv.stats.units import Unit, p_value, scale, signed, size
from fastconv.stats.verdicts import CellVerdict

#: More pilot gates stand in a table.
OPEN_PILOTS = 4
_COLUMNS = (
    "contrast", "verdict", "change", "interval", "over seeds", "p", "p by sign flips", "threshold", "confidence", "why",
)  # fmt: skip
_LETTERS = {
    "transfer": "T",
    "reverse": "R",
    "equivalent": "=",
    "inconclusive": "?",
    "uninformative": "u",
    "withheld": "w",
}


def headline(decided: Analysis) -> Section:
    """Go or stop and how sure, then counts, the largest change of each behavior, the study's rules, the pilot gates."""
    blocks: list[Block] = []
    pilots = [gate for gate in decided.gates if gate.gate == "PILOT"]
    try:
        blocks.append(ask(decided, "answer"))
    except NoSuchClaimError:
        blocks.append(Note("No pilot gate was decided: the recipe's cells are not all done."))
    blocks += _edited_first(decided)
    if any(one.rows for one in decided.verdicts):
        blocks.append(ask(decided, "counts"))
    behaviors = dict.fromkeys(one.behavior for one in decided.verdicts if one.estimate is not None)
    blocks += [ask(decided, "largest", behavior=behavior) for behavior in behaviors]
    if decided.measured:
        blocks.append(ask(decided, "unscored"))
    for gate in decided.gates:
        if gate.gate in ("CONFIRM", "FALSIFY") and gate.verdict in ("pass", "fail"):
            blocks.append(ask(decided, "study", gate=gate.gate, subject=gate.subject))
    claims = [ask(decided, "pilot", subject=gate.subject) for gate in pilots]
    if len(claims) <= OPEN_PILOTS:
        return Section("verdict", "Verdict", (*blocks, *claims))
    rows = tuple(
        (TableCell(one.verdict, word=one.verdict), TableCell.saying(claim))
        for one, claim in zip(pilots, claims, strict=True)
    )
    return Section(
        "verdict", "Verdict", (*blocks, Table("pilots", ("pilot gate", "why"), rows, folded=f"{len(rows)} pilot gates"))
    )


def _edited_first(decided: Analysis) -> list[Block]:
    """Verdicts that another set of thresholds decided otherwise come before all others."""
    first = {one.label: one.kind for one in decided.under_first[1]}
    return [
        ask(decided, "edited_finding", label=one.label)
        for one in decided.verdicts
        if first.get(one.label, one.kind) != one.kind
    ]


def findings(decided: Analysis) -> Section | None:
    """The heatmap of declared contrasts and the table behind it."""
    subjects = decided.declared
    if not subjects:
        return None
    found = {one.label: one for one in decided.verdicts}
    verdicts = {subject: found.get(label) for label, subject in subjects.items()}
    blocks: list[Block] = []
    if any(one is not None and one.estimate is not None for one in verdicts.values()):
        blocks.append(_matrix(decided, verdicts))
        blocks.append(
            Note(
                "Colour and sign: the change in the direction of leakage, in thresholds (orange) or against it (purple). "
                "T transfer, R reverse, = equivalent, ? inconclusive, u uninformative, w withheld; a dash was not measured."
            )
        )
    # Before the tables and not in a caption: where nothing speaks, the only table is folded away.
    warned = dict.fromkeys(one.behavior for one in decided.verdicts if one.sign_flip_warning)
    blocks += [ask(decided, "sign_flips", behavior=behavior) for behavior in warned]
    blocks += _tables(decided, verdicts)
    return Section(
        "findings", "Findings", tuple(blocks),
        "Each contrast is the assistant's change against epoch zero, paired by question, minus the canary's, minus the same "
        "without a behavior adapter where that control was run. Intervals are t intervals over questions at the usual level; "
        "p-values are corrected over all declared contrasts (Holm).",
    )  # fmt: skip


def _matrix(decided: Analysis, verdicts: dict[ContrastSubject, CellVerdict | None]) -> Figure:
    several = len({subject.negatives for subject in verdicts}) > 1

    def row_from_record(subject: ContrastSubject) -> str:
        return f"{subject.source}, {subject.negatives}" if several else subject.source

    rows = list(dict.fromkeys(row_from_record(subject) for subject in verdicts))
    behaviors = list(dict.fromkeys(subject.behavior for subject in verdicts))
    epochs = sorted({subject.epoch for subject in verdicts})
    columns = [(behavior, epoch) for behavior in behaviors for epoch in epochs]
    by_place = {(row_from_record(s), (s.behavior, s.epoch)): one for s, one in verdicts.items()}
    values: list[list[float | None]] = []
    texts: list[list[str]] = []
    for row in rows:
        line = [by_place.get((row, column)) for column in columns]
        values.append([_in_thresholds(decided, one) for one in line])
        texts.append([_short(one) for one in line])
    names = [f"{behavior} e{epoch}" for behavior, epoch in columns]
    return heatmap("matrix", "Change beyond canary and mimicry, points", rows, names, values, texts, decided.run)


def _in_thresholds(decided: Analysis, one: CellVerdict | None) -> float | None:
    if one is None or one.estimate is None or not one.margin or one.kind in ("uninformative", "withheld"):
        return None
    return decided.found.direction(one.behavior) * one.estimate / one.margin


def _short(one: CellVerdict | None) -> str:
    if one is None:
        return "-"
    letter = _LETTERS[one.kind]
    if one.estimate is None or one.kind in ("uninformative", "withheld"):
        return letter
    return f"{signed(scale(one.unit) * one.estimate, 0)} {letter}"


def _tables(decided: Analysis, verdicts: dict[ContrastSubject, CellVerdict | None]) -> list[Table]:
    """One table, or where it would be long two: what says something, and, folded away, what does not."""
    seeded = any(one is not None and one.over_seeds is not None for one in verdicts.values())
    columns = tuple(name for name in _COLUMNS if seeded or name != "over seeds")
    rows = {subject: _row(decided, subject, one, seeded=seeded) for subject, one in verdicts.items()}
    numeric = frozenset(range(2, columns.index("confidence")))
    caption = "Changes in percentage points, or in points where a judge scores."
    if seeded:
        caption += (
            " Over seeds: the t interval over the means of the seeds; where it says no, a change is inconclusive."
        )
    if len(rows) <= OPEN_ROWS:
        return [Table("contrasts", columns, tuple(rows.values()), numeric, caption)]
    silent = [s for s, one in verdicts.items() if one is None or one.kind in ("inconclusive", "uninformative")]
    speaking = tuple(row for subject, row in rows.items() if subject not in silent)
    rest = tuple(rows[subject] for subject in silent)
    folded = f"{len(rest)} contrasts that say nothing either way, or were not run"
    tables = [Table("contrasts", columns, speaking, numeric, caption)] if speaking else []
    return [*tables, Table("contrasts-silent", columns, rest, numeric, caption, folded)] if rest else tables


def _row(
    decided: Analysis, subject: ContrastSubject, one: CellVerdict | None, *, seeded: bool
) -> tuple[TableCell, ...]:
    label = subject.label(decided.found.main(subject.behavior))
    if one is None:
        return (TableCell(label), TableCell("not run", word="absent"), *[TableCell("")] * (8 if seeded else 7))
    shown = one.estimate is not None
    rows = one.rows if shown else ()
    estimate = signed(scale(one.unit) * (one.estimate or 0.0)) if shown else ""
    over = one.over_seeds
    over_seeds = _range(over.low, over.high, one.unit) if over is not None else ""
    return (
        TableCell(label), TableCell(one.kind, word=one.kind), TableCell(estimate, rows), TableCell(_range(one.low, one.high, one.unit), rows),
        *((TableCell(over_seeds, rows),) if seeded else ()),
        TableCell(p_value(one.p_corrected), rows), TableCell(p_value(one.p_sign_flip), rows),
        TableCell(size(one.margin, one.unit) if one.margin else ""), TableCell(one.confidence.level),
        TableCell.saying(ask(decided, "finding", label=label)),
    )  # fmt: skip


def _range(low: float | None, high: float | None, unit: Unit) -> str:
    """An interval as a table shows it; empty where there is none."""
    return (
        f"{signed(scale(unit) * low)} to {signed(scale(unit) * high)}" if low is not None and high is not None else ""
    )
