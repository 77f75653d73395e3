"""The power of a t test without scipy, whose import takes longer than all that `plan` and `check` do beside it.

Student's t is Z / S with S = sqrt(chi2 / df), so a probability of it is a mean over S of the normal distribution. With
x = ln S the density of x is proportional to exp(df (x - exp(2 x) / 2)): smooth, and zero to all digits at both ends, where
the trapezoid rule converges exponentially (Trefethen and Weideman 2014, SIAM Review 56:385) and the constant cancels.
"""

from __future__ import annotations

import math
from statistics import NormalDist

_NORMAL = NormalDist()
_ROOT_HALF = math.sqrt(0.5)
#: Where the density of ln S is below exp(-34) of its maximum nothing is summed.
_NEGLIGIBLE = -34.0
#: Past this many degrees of freedom Student's t is the normal distribution to all digits that are printed.
_NORMAL_DF = 1e7
#: Newton's steps; four or five are usual.
_MOST_STEPS = 50

Nodes = list[tuple[float, float]]


def noncentrality(df: float, alpha: float, power: float) -> float:
    """The noncentrality at which t with `df` degrees of freedom exceeds its two-sided critical value with `power`.

    In the true direction only: a rejection with the wrong sign is no success, and its probability is about 1e-6 at 80 %
    power. Relative error below 1e-8 (tests hold it against scipy). Rounded to ten decimals: those after them depend on the
    processor, and a report is verified on others than wrote it. Raises ValueError unless alpha < power and df >= 1.
    """
    if power <= alpha or df < 1:
        raise ValueError(f"power must exceed alpha and df be at least 1, not {power}, {alpha} and {df}")
    z_power = _NORMAL.inv_cdf(power)
    if df > _NORMAL_DF:
        return _NORMAL.inv_cdf(1.0 - alpha / 2.0) + z_power
    critical = _critical(df, alpha / 2.0)
    delta, resolved = critical + max(z_power, 0.0), 0.0
    nodes: Nodes = []
    for _ in range(_MOST_STEPS):
        if delta > resolved:
            resolved = 1.2 * delta + 1.0
            nodes = _nodes(df, resolved)
        # Newton on the scale of normal quantiles, on which power rises almost in a line with the noncentrality.
        reached = sum(weight * math.erfc((critical * s - delta) * _ROOT_HALF) for weight, s in nodes) / 2.0
        z = _NORMAL.inv_cdf(min(max(reached, 1e-300), 1.0 - 1e-16))
        slope = sum(weight * math.exp(-0.5 * (delta - critical * s) ** 2) for weight, s in nodes) / math.exp(
            -0.5 * z * z
        )
        step = (z - z_power) / slope
        delta -= step
        if abs(step) < 1e-10 * delta:
            break
    return round(delta, 10)


def _critical(df: float, tail: float) -> float:
    """The t that is exceeded with probability `tail`: Newton on ln t and ln P, between which heavy tails are a line."""
    t = _NORMAL.inv_cdf(1.0 - tail)
    for _ in range(_MOST_STEPS):
        nodes = _nodes(df, t)
        exceeds = sum(weight * math.erfc(t * s * _ROOT_HALF) for weight, s in nodes) / 2.0
        density = sum(weight * s * math.exp(-0.5 * (t * s) ** 2) for weight, s in nodes)
        step = math.log(exceeds / tail) * exceeds / (t * density) * math.sqrt(2.0 * math.pi)
        t *= math.exp(step)
        if abs(step) < 1e-10:
            break
    return t


def _nodes(df: float, slope: float) -> Nodes:
    """(weight, S) of a trapezoid rule over ln S that resolves the density and a normal probability rising with `slope`."""
    step = 0.8 / math.sqrt(2.0 * df + slope**2)
    nodes: Nodes = []
    for sign in (1, -1):
        i = 0 if sign == 1 else 1
        while (log_density := df * (sign * i * step - math.expm1(2.0 * sign * i * step) / 2.0)) > _NEGLIGIBLE:
            nodes.append((math.exp(log_density), math.exp(sign * i * step)))
            i += 1
    mass = sum(weight for weight, _ in nodes)
    return [(weight / mass, s) for weight, s in nodes]
