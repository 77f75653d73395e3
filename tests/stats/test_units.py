"""Formatting of numbers: what rounds to zero has no sign, for any unit and anywhere in a report."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from fastconv.analysis.analysis import Analysis
from fastconv.report import build
from fastconv.report.behaviors import _aside_row
from fastconv.report.blocks import render_html, render_markdown
from fastconv.report.figures import Point, lines, scatter
from fastconv.report.overview import _row
from fastconv.stats.units import change, interval_text, level, rounded, signed
from tests.scale_kit import fill, matrix_recipe

#: A zero with a sign, as a word of its own.
SIGNED_ZERO = re.compile(r"(?<![\w.])[-+\u2212]0(?:\.0+)?(?![\d.])")


@pytest.mark.parametrize("value", [-0.0, -0.0004, -1e-17, 0.0, 0.0004])
def test_what_rounds_to_zero_has_no_sign(value: float) -> None:
    assert change(value, "share") == "0.0 pp"
    assert change(value, "points") == "0.0 points"
    assert interval_text(value, value, "share") == "[0.0, 0.0]"
    assert level(value, "share") == "0.0 %"
    assert (signed(value, 2), rounded(value, 2)) == ("0.00", "0.00")


def test_what_does_not_round_to_zero_keeps_its_sign() -> None:
    assert (signed(-0.06), signed(0.06), rounded(-0.06), rounded(0.06)) == ("-0.1", "+0.1", "-0.1", "0.1")
    assert interval_text(-0.0004, 0.0123, "share") == "[0.0, +1.2]"
    assert change(-0.026, "share") == "-2.6 pp"


def test_what_a_figure_says_in_words_has_no_signed_zero() -> None:
    point = Point(-0.01, -0.04, label="x", group="g")
    for drawn in (
        scatter("s", "A title", [point], ("x", "y"), "run"),
        lines("l", "A title", {"a": [point]}, ("x", "y"), "run"),
    ):
        assert not SIGNED_ZERO.findall(drawn.alt), drawn.alt


@pytest.fixture(scope="module")
def decided(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    recipe = matrix_recipe(tiny_qwen, n_sources=1, seeds=1, prompts=6, samples=2)
    graph, store, _ = fill(recipe, tmp_path_factory.mktemp("units"))
    return Analysis(graph, store)


def test_tables_of_contrasts_hold_no_signed_zero(decided: Analysis) -> None:
    label, subject = next(iter(decided.declared.items()))
    hardly = {"estimate": -1e-5, "low": -4e-4, "high": 4e-4}
    verdict = decided.verdict(label)
    whose = ("assistant", "canary", "mimicry", "over_questions")
    moved = {name: replace(getattr(verdict, name), **hardly) for name in whose}
    row = _row(decided, subject, replace(verdict, **hardly, **moved), {}, seeded=False)
    assert [cell.text for cell in row[2:8]] == ["0.0"] * 4 + ["0.0 to 0.0"] * 2
    change_aside = next(one for one in decided.secondary if one.per == "change")
    slope_aside = next(one for one in decided.secondary if one.per == "epoch")
    aside = _aside_row(replace(change_aside, unit="share", **hardly))
    assert [cell.text for cell in aside[2:4]] == ["0.0 pp", "0.0 to 0.0"]
    slope = _aside_row(replace(slope_aside, unit="share", **{name: value / 20 for name, value in hardly.items()}))
    assert [cell.text for cell in slope[2:4]] == ["0.00 pp per epoch", "0.00 to 0.00"]


def test_no_page_holds_a_signed_zero(decided: Analysis) -> None:
    data = build(decided)
    for page in (
        re.sub(r"<style>.*?</style>|src=\"[^\"]*\"", "", render_html(data), flags=re.S),
        render_markdown(data),
    ):
        assert not SIGNED_ZERO.findall(page), [page[m.start() - 60 : m.end() + 20] for m in SIGNED_ZERO.finditer(page)]
