"""The power of a t test, held against scipy's noncentral t."""

from __future__ import annotations

import pytest
from scipy import special

from fastconv.stats.student import noncentrality


@pytest.mark.parametrize("df", [1.0, 1.3, 2.0, 3.0, 4.7, 8.0, 20.0, 59.0, 585.0, 999_999.0])
@pytest.mark.parametrize(("alpha", "power"), [(0.05, 0.3), (0.05, 0.8), (0.05 / 12, 0.9), (0.05 / 72, 0.8)])
def test_scipy_finds_the_same_power(df: float, alpha: float, power: float) -> None:
    critical = float(special.stdtrit(df, 1.0 - alpha / 2.0))
    reached = 1.0 - float(special.nctdtr(df, noncentrality(df, alpha, power), critical))
    assert reached == pytest.approx(power, rel=1e-8)


def test_many_degrees_of_freedom_are_the_normal_distribution() -> None:
    exact = float(special.ndtri(0.975) + special.ndtri(0.8))
    assert noncentrality(1e9, 0.05, 0.8) == pytest.approx(exact, rel=1e-12)
    assert noncentrality(0.99e7, 0.05, 0.8) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(("df", "alpha", "power"), [(5.0, 0.05, 0.05), (0.5, 0.05, 0.8)])
def test_what_no_t_test_has_is_refused(df: float, alpha: float, power: float) -> None:
    with pytest.raises(ValueError, match="must exceed alpha"):
        noncentrality(df, alpha, power)
