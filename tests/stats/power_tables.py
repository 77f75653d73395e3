"""docs/POWER.md from the product's own arithmetic: `python -m tests.stats.power_tables > docs/POWER.md`."""

from __future__ import annotations

from fastconv.stats.power import Measure, _with_seeds, planned_runs, planned_spread


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
                variance, df = planned_runs(measure, n_seeds)
                runs = variance, df if n_seeds < 3 else n_seeds - 1
                spread = planned_spread(measure, n_samples, 8)
                told = " | ".join(
                    f"{scale * _with_seeds(spread, n_questions, n_seeds, runs, 0.05 / m):.1f}" for m in (1, 24, 72)
                )
                lines.append(f"| {n_questions} | {n_seeds} | {told} |")
    lines += [
        "", "More questions help until the noise from run to run remains; then only seeds do. With three seeds the test over them",
        "alone has 2 degrees of freedom, so among many contrasts it finds large changes only: five or more are worth their price.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(power_tables(), end="")
