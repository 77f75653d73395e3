"""docs/POWER.md from the product's own arithmetic: `python -m tests.stats.power_tables > docs/POWER.md`."""

from __future__ import annotations

from fastconv.stats.power import Measure, effect_over_seeds, planned_runs, planned_spread


def _least(measure: Measure, scale: float = 100.0) -> float:
    """What three seeds alone find at the first step of Holm among 72, however many questions there are."""
    return scale * effect_over_seeds(1e-6, 10_000, 3, planned_runs(measure), 0.05 / 72)


def power_tables() -> str:
    """docs/POWER.md: what seeds and questions can find, from the declared spreads (`python -m tests.stats.power_tables`)."""
    lines = [
        "# What a design can find", "",
        "Smallest change of a contrast (assistant less canary less mimicry, 8 terms) that is found four times out of five, with",
        "the declared noise from run to run and the planning assumptions of `stats/power.py`; alone, and at the first step of Holm",
        "over 24 and over 72 declared contrasts. With 1 or 2 seeds the declared spread counts, from 3 on the seeds' own.",
        "Generated: `python -m tests.stats.power_tables > docs/POWER.md`.", "",
        "Published effects to hold against it: refusal or agreement .364 -> .462 is 9.8 pp; alignment 89.5 -> 50.6 is 38.9 points.",
    ]  # fmt: skip
    shown: tuple[tuple[Measure, str, tuple[int, ...], int, float], ...] = (
        ("letters", "Accuracy (586 questions), pp", (586,), 1, 100.0),
        ("phrases", "Rates (refusal, agreement; 10 samples), pp", (50, 220, 1000), 10, 100.0),
        ("judge", "Alignment, points", (24, 80), 10, 1.0),
    )
    for measure, title, questions, n_samples, scale in shown:
        lines += ["", f"## {title}", "", "| questions | seeds | alone | of 24 | of 72 |", "|---|---|---|---|---|"]
        for n_questions in questions:
            for n_seeds in (1, 3, 5, 10, 20):
                spread, one_run = planned_spread(measure, n_samples, 8), planned_runs(measure)
                told = " | ".join(
                    f"{scale * effect_over_seeds(spread, n_questions, n_seeds, one_run, 0.05 / m):.1f}"
                    for m in (1, 24, 72)
                )
                lines.append(f"| {n_questions} | {n_seeds} | {told} |")
    lines += [
        "", "**Three seeds find nothing among 72 contrasts.** The test over seeds then has 2 degrees of freedom: at the first step of",
        f"Holm it needs {_least('letters'):.0f} pp of accuracy, {_least('phrases'):.0f} pp of a rate or {_least('judge', 1.0):.0f} points of alignment, more than one seed",
        "with the declared noise (15, 17 to 32, and 33 to 37). `plan` says so where it holds; five seeds find what one does, and ten more.",
        "", "More questions help until the noise from run to run remains; then only seeds do. With three seeds the test over them",
        "alone has 2 degrees of freedom, so among many contrasts it finds large changes only: five or more are worth their price.",
    ]  # fmt: skip
    lines += [
        "", "## Coverage", "",
        "Share of 95 % intervals that hold the truth, 4,000 draws each (a standard error of 0.4 points), 20 and 50 questions x 10",
        "samples, ICC 0.2 and 0.5, rates of 0 to 10 % (`tests/stats/test_run_noise.py`, `coverage`).", "",
        "| interval | noise from run to run | coverage |", "|---|---|---|",
        "| over questions and runs, what a verdict rests on | as declared | 93.0 to 98.2 |",
        "| the same | of an SD as uncertain as its degrees of freedom say | 91.9 to 96.0 |",
        "| over questions, this run | none | 90.9 to 99.9 where both rates are over 0, 81.2 to 92.8 from a rate of 0 |", "",
        "Over 97 %: where runs dominate, 8 degrees of freedom allow for doubt in a declared SD, which is what holds the family's error",
        "at 1.5 times the noise. Under 93 %: 20 questions from a floor to 10 %, whose skewness no t interval sees. The interval over",
        "questions alone is too short at a floor, so no word rests on it. A score-type variance for questions without a hit was tried",
        "(half a hit for each): 94.8 to 100 % over questions, up to 99.9 % with runs; the plain one is nearer to 95 %.",
        "", "## Error of a family", "",
        "Families without any effect that have at least one false *transfer* or *reverse* at most (changes significant after Holm):",
        "`tests/stats/test_family_error.py`, one-sided 95 % bound in brackets.", "",
        "| grid | noise as declared | 1.5 times | without that noise in the intervals |", "|---|---|---|---|",
        "| matrix | 1.9 % (2.4) | 8.3 % (9.2) | 84 % |", "| ten_sources | 3.1 % (3.5) | 8.2 % (8.8) | 71 % |",
        "| seeds | 1.2 % (1.6) | 1.8 % (2.2) | 17 % |",
        "", "*Equivalent* of a true change of just the margin, same noise: none of 400 families of eight contrasts (95 % bound 0.7 %). A lone",
        "contrast with one seed and hardly any sampling noise errs in 11 % of 500: with the whole noise from run to run, 5 pp could be",
        "shown of nothing with one seed, so the word takes the canary's own part for zero (`power.unshared_variance`).",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(power_tables(), end="")
