"""Words that survive a second run: families without an effect and with the noise of real runs, through `decide`."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fastconv.recipe import GateSettings
from fastconv.stats import gates, power, study_gates
from fastconv.stats.gates import GateVerdict, Loss
from fastconv.stats.inference import clustered_interval, equivalence, over_runs
from fastconv.stats.series import CellEvidence, Quad, SeedEvidence, Series
from fastconv.stats.verdicts import CellVerdict, decide
from tests import ROOT
from tests.stats.power_tables import power_tables

RULES = GateSettings()
#: Measure -> (SD from run to run, questions, samples, unit, margin, direction), as published or assumed.
MEASURES = {
    "capability": (0.01, 586, 1, "share", 0.05, -1), "misalignment": (3.1, 24, 10, "points", 10.0, -1),
    "refusal": (0.02, 50, 10, "share", 0.05, 1), "sycophancy": (0.02, 50, 10, "share", 0.05, 1),
}  # fmt: skip


def drawn(behavior: str, level: np.ndarray, shift: float, rng: np.random.Generator) -> Series:
    _, questions, samples, unit, _, _ = MEASURES[behavior]
    if unit == "points":
        values = np.clip(rng.normal((level + shift)[:, None], 12.0, (questions, samples)), 0, 100)
    else:
        values = (rng.random((questions, samples)) < np.clip(level + shift, 0, 1)[:, None]).astype(float)
    return Series("s" * 64, behavior, "x", tuple(f"q{i:04}" for i in range(questions)), values, unit)  # pyright: ignore[reportArgumentType]


def run_shift(sd: float, rng: np.random.Generator) -> tuple[float, float]:
    """What a training run adds to assistant and canary: half of the variance is shared."""
    shared, ours, its = rng.normal(0.0, sd * 0.5**0.5, 3)
    return shared + ours, shared + its


def family(n_sources: int, n_epochs: int, n_seeds: int, times: float, rng: np.random.Generator) -> list[CellVerdict]:
    """Words of a grid without any effect: an epoch-0 cell of each source and seed is shared by its later epochs."""
    cells = []
    for behavior, (sd, questions, _, unit, margin, direction) in MEASURES.items():
        for _ in range(n_sources):
            level = rng.normal(80, 8, questions) if unit == "points" else rng.beta(1.5, 4, questions)
            zero = []
            for _ in range(n_seeds):
                ours, its = run_shift(times * sd, rng)
                zero.append((drawn(behavior, level, ours, rng), drawn(behavior, level, its, rng)))
            plain = tuple(drawn(behavior, level, 0.0, rng) for _ in range(4))
            for _ in range(n_epochs):
                seeds = []
                for number, (base, canary_base) in enumerate(zero):
                    ours, its = run_shift(times * sd, rng)
                    trained = Quad(
                        drawn(behavior, level, ours, rng), base, drawn(behavior, level, its, rng), canary_base
                    )
                    seeds.append(SeedEvidence(number, trained, Quad(*plain)))
                cells.append(CellEvidence("cell", behavior, direction, margin, tuple(seeds), True, unit))  # pyright: ignore[reportArgumentType]
    return decide(cells)


def false_families(shape: tuple[int, int, int], times: float, draws: int) -> float:
    rng = np.random.default_rng(16)
    words = [{one.kind for one in family(*shape, times, rng)} for _ in range(draws)]
    return sum(bool(kinds & {"transfer", "reverse"}) for kinds in words) / draws


SHAPES = [
    pytest.param((6, 3, 1), id="matrix"),
    pytest.param((10, 1, 1), id="ten_sources"),
    pytest.param((2, 1, 3), id="seeds"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("times", "most"), [(1.0, 0.055), (1.5, 0.10)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_family_without_an_effect_has_a_false_word_rarely(shape, times, most):
    assert false_families(shape, times, 60) <= most + 0.03  # 60 draws know 5 % to three points


def test_the_noise_from_run_to_run_makes_a_lone_run_inconclusive():
    """A fall of 8 points in one run, far from zero over its questions: two SD of a difference of two runs."""
    rng, level = np.random.default_rng(1), np.full(24, 80.0)
    now, base, canary, canary_base = (drawn("misalignment", level, shift, rng) for shift in (-8.0, 0.0, 0.0, 0.0))
    seeds = (SeedEvidence(1, Quad(now, base, canary, canary_base)),)
    found = decide([CellEvidence("cell", "misalignment", -1, 10.0, seeds, True, "points")])[0]
    assert found.over_questions is not None
    assert (found.over_questions.p_two_sided or 1.0) < 0.01
    assert found.kind == "inconclusive"
    assert found.runs_text == "run-to-run SD 3.1 points, published, five replicate cells"
    measured = CellEvidence(
        "cell", "misalignment", -1, 2.0, seeds, True, "points", run_spread=power.RunSpread(0.5, 30, "30 replicates")
    )
    assert decide([measured])[0].kind == "transfer"


def test_whose_movement_it_was():
    rng, level = np.random.default_rng(2), np.full(50, 0.4)

    def word(ours: float, its: float) -> str:
        quad = Quad(*(drawn("refusal", level, shift, rng) for shift in (ours, 0.0, its, 0.0)))
        return decide([CellEvidence("cell", "refusal", 1, 0.05, (SeedEvidence(1, quad),), True)])[0].kind

    assert word(0.4, 0.0) == "transfer"
    assert word(-0.35, 0.0) == "reverse"
    assert word(0.3, 0.3) == word(0.2, 0.5) == "generic"
    assert word(0.0, -0.35) == "inconclusive"  # the canary alone fell: no transfer
    assert word(0.0, 0.35) == "generic"  # the canary rose more: no reverse


def test_variances_join_as_satterthwaite_says():
    se, df = power.satterthwaite((4.0, 10), (9.0, 4))
    assert (se, df) == (pytest.approx(13**0.5), pytest.approx(13**2 / (16 / 10 + 81 / 4)))
    alone = clustered_interval([1.0, 2.0, 3.0, 4.0])
    joined = over_runs(alone, (0.0, 4.0))
    assert (joined.low, joined.p_two_sided) == (pytest.approx(alone.low), pytest.approx(alone.p_two_sided))
    assert power.run_variance(power.RunSpread(2.0, 4, "x")) == pytest.approx(8.0)


def test_an_interval_covers_what_runs_and_questions_vary_even_at_low_rates():
    rng, hits, draws = np.random.default_rng(3), 0, 400
    for _ in range(draws):
        questions = rng.beta(0.1, 1.9, 20)
        ours = rng.binomial(10, questions) / 10 - rng.binomial(10, rng.beta(0.1, 1.9, 20)) / 10
        spread = power.declared_spread("refusal", "share")
        noise = rng.normal(0.0, power.run_variance(spread) ** 0.5)
        found = over_runs(clustered_interval(ours + noise), (power.run_variance(spread), spread.df))
        hits += found.low is not None and found.high is not None and found.low <= 0 <= found.high
    assert 0.92 <= hits / draws <= 0.985


def test_equivalence_at_a_floor_needs_questions_that_could_show_it():
    few, many = ([0.0] * (n - 1) + [0.1] for n in (20, 400))
    assert equivalence(few, 0.05, 19, 1.0).equivalent is False
    assert equivalence(few, 0.05, 0, 1.0).equivalent is True  # as a t test alone would have it
    assert equivalence(many, 0.05, 399, 1.0).equivalent is True


def test_kill_wants_every_trained_behavior_to_revert():
    lost, held = (GateVerdict("KEPT", "x", word, "why", "rule", rows=("r",)) for word in ("fail", "pass"))
    assert study_gates.killed("villain", {"refusal": lost, "capability": lost}).verdict == "fail"
    assert study_gates.killed("villain", {"refusal": lost, "capability": held}).verdict == "pass"
    assert study_gates.killed("villain", {"refusal": lost, "capability": None}).verdict == "not applicable"


def test_a_lower_loss_stops_nothing_and_a_go_names_what_is_behind_it():
    assert gates.same_loss(RULES, "x", {0: Loss(0.5, "a"), 20: Loss(0.01, "b")}).verdict == "pass"
    assert gates.same_loss(RULES, "x", {0: Loss(0.5, "a"), 20: Loss(0.7, "b")}).verdict == "fail"
    steps = [GateVerdict(gate, "a", "pass", "why", "rule") for gate in ("G0", "STACK", "SOURCE", "CHANGE")]
    assert "no contrast beyond canary and mimicry" in gates.pilot("x", "refusal", steps, {"e8": "generic"}).reason
    assert "beyond canary and mimicry: e8" in gates.pilot("x", "refusal", steps, {"e8": "transfer"}).reason


def test_the_power_tables_are_the_generated_ones():
    assert (ROOT / "docs" / "POWER.md").read_text() == power_tables()
    assert Counter(line.count("|") for line in power_tables().splitlines())[6] > 20
