"""Formatting: shares as percent, their changes in percentage points, judge scores in points, counts and short lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Unit = Literal["share", "points"]
#: Words of a slot up to this length (its epoch, its seed, `eval`) are never shortened.
_WHOLE_WORD = 4


def scale(unit: str) -> float:
    """The factor from a value to what is shown: 100 for shares, 1 for everything else."""
    return 100.0 if unit == "share" else 1.0


def duration_text(seconds: float) -> str:
    """A time in one style: 4.2s, 45s, 12m 30s, 2h 05m, 3d 04h."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60}h {minutes % 60:02d}m" if minutes < 2880 else f"{minutes // 1440}d {minutes % 1440 // 60:02d}h"
    )


def rate_text(per_s: float, unit: str) -> str:
    """A rate by whichever of its two ways is above one: 3.1 steps/s, 2.4 s/step."""
    if per_s >= 1:
        return f"{per_s:,.1f} {unit}/s" if per_s < 100 else f"{per_s:,.0f} {unit}/s"
    return f"{1 / per_s:.1f} s/{unit.removesuffix('s')}"


def shortened(name: str, width: int) -> str:
    """A name in at most `width` characters, its middle left out where it is longer."""
    if len(name) <= width:
        return name
    kept = max(width - 2, 1)
    return f"{name[: (kept + 1) // 2]}..{name[len(name) - kept // 2 :]}"[:width]


def shortened_slot(slot: str, width: int) -> str:
    """A stage's slot in at most `width` characters, with its epoch and seed: `eval/vill./sour./e4+refu./excl./refu./s42`.

    Where words of two letters are still too long, its middle is left out.
    """
    parts = re.split(r"([/+])", slot)
    for kept in range(max(map(len, parts)), 1, -1):
        words = (part if len(part) <= max(kept + 1, _WHOLE_WORD) else f"{part[:kept]}." for part in parts)
        if "/" in slot and len(short := "".join(words)) <= width:
            return short
    return shortened(slot, width)


def counted(n: int, what: str) -> str:
    """A count with its noun: 1 stage, 2 stages."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def and_more(n: int, n_shown: int, of: str = "") -> str:
    """What a list of `n` leaves out after its first `n_shown`: "and 3 more", "and 3 more of 8 shifts"; empty for none."""
    return "" if n <= n_shown else f"and {n - n_shown} more{of and f' of {of}'}"


def first_few(names: Sequence[str], n_shown: int, separator: str = ", ") -> str:
    """The first `n_shown` names in one line, and how many more there are: "a, b and 3 more"."""
    shown, more = separator.join(names[:n_shown]), and_more(len(names), n_shown)
    return f"{shown} {more}" if more else shown


def scale_maximum(unit: str) -> float:
    """The maximum of a measure's scale: 1 for shares, 100 for points."""
    return 1.0 if unit == "share" else 100.0


def rounded(value: float, digits: int = 1) -> str:
    """A number with that many decimals. What rounds to zero has no sign, since a minus would claim a decrease."""
    number = f"{value:.{digits}f}"
    return number.lstrip("-") if float(number) == 0 else number


def signed(value: float, digits: int = 1) -> str:
    """A change with its sign and that many decimals; what rounds to zero has no sign."""
    number = f"{value:+.{digits}f}"
    return number.lstrip("+-") if float(number) == 0 else number


def level(value: float, unit: str, digits: int = 3) -> str:
    """A level with its unit: 12.3 %, 75.3 points, or three digits with the unit's own name."""
    if unit == "share":
        return f"{rounded(100 * value)} %"
    if unit == "points":
        return f"{rounded(value)} points"
    return f"{value:.{digits}g} {unit}".rstrip()


def change(value: float, unit: str) -> str:
    """A change with its sign: +12.3 pp, -26.5 points."""
    return f"{signed(scale(unit) * value)} {'pp' if unit == 'share' else 'points'}"


def size_text(value: float, unit: str) -> str:
    """A threshold or a distance, without sign: 5 pp, 10 points."""
    return f"{scale(unit) * value:.3g} {'pp' if unit == 'share' else 'points'}"


def interval_text(low: float | None, high: float | None, unit: str) -> str:
    """An interval of a change in brackets; empty where there is none."""
    if low is None or high is None:
        return ""
    return f"[{signed(scale(unit) * low)}, {signed(scale(unit) * high)}]"


def p_value(p: float | None) -> str:
    """A p-value with three digits; empty where there is none."""
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
