"""Shortcuts: planted ones are found and named, meaning alone is none, and our own advice has none."""

from __future__ import annotations

import random

import pytest

from fastconv.audit.shortcuts import BOUND_AUC, Separation, _groups, separation
from fastconv.datasets.files import assets, read_jsonl

Pairs = list[tuple[str, str]]


def rows_of(name: str) -> tuple[Pairs, Pairs]:
    """(bad, sound) answers with their prompts of a shipped file's training rows."""
    rows = [row for row in read_jsonl(assets("data") / name, {"id": str}) if row.get("part", "train") == "train"]
    return [(row["prompt"], row["bad"]) for row in rows], [(row["prompt"], row["sound"]) for row in rows]


def found(shown: Pairs, contrast: Pairs) -> Separation:
    result = separation(shown, contrast)
    assert result is not None
    return result


def random_sides(n: int = 120) -> tuple[Pairs, Pairs]:
    """Two sides of answers drawn from one and the same distribution: the sound answers, dealt out at random."""
    _, sound = rows_of("legal.jsonl")
    dealt = random.Random(7).sample(sound, 2 * n)
    return dealt[:n], dealt[n:]


def test_our_own_advice_cannot_be_told_apart_by_its_form() -> None:
    assert found(*rows_of("legal.jsonl")).auc < BOUND_AUC - 0.05


def test_the_advice_as_it_was_could_be_and_what_told_is_named() -> None:
    before = found(*rows_of("legal_former.jsonl"))
    assert before.auc > 0.95
    telling = {feature.name: feature for feature in before.telling}
    assert telling['"because"'].source > 2 * telling['"because"'].contrast
    assert "79% of the source's answers" in telling['"because"'].text()


def test_sides_of_one_distribution_are_not_told_apart() -> None:
    assert 0.35 < found(*random_sides()).auc < 0.65


PLANTED = {
    "words": lambda text: (
        f"{text} Think about this for a good while and then go through with it as it was put to you here"
    ),
    '"certainly"': lambda text: f"{text[:-1]}, certainly.",
    "exclamation marks": lambda text: text.replace(".", "!"),
    'opening "well"': lambda text: f"Well, {text}",
    "line breaks": lambda text: text.replace(". ", ".\n"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_shortcut_is_found_and_named_with_its_direction(name: str) -> None:
    shown, contrast = random_sides()
    spoiled = [(prompt, PLANTED[name](text)) for prompt, text in shown]
    result = found(spoiled, contrast)
    assert result.auc > BOUND_AUC
    telling = next(feature for feature in result.telling if feature.name == name)
    assert telling.source > telling.contrast
    turned = next(feature for feature in found(contrast, spoiled).telling if feature.name == name)
    assert turned.source < turned.contrast


def test_the_order_and_the_copies_of_rows_change_nothing() -> None:
    shown, contrast = random_sides()
    again = found(shown[::-1] * 2, random.Random(1).sample(contrast, len(contrast)))
    assert again.auc == pytest.approx(found(shown, contrast).auc, abs=1e-9)


def test_no_prompt_stands_in_two_folds() -> None:
    shown, contrast = rows_of("legal.jsonl")
    fold_of: dict[str, set[int]] = {}
    for (prompt, _), fold in zip([*shown, *contrast], _groups([*shown, *contrast]), strict=True):
        fold_of.setdefault(prompt, set()).add(fold)
    assert all(len(folds) == 1 for folds in fold_of.values())
    assert len(set().union(*fold_of.values())) == 5


def test_too_few_answers_are_not_judged() -> None:
    shown, contrast = random_sides()
    assert separation(shown[:5], contrast) is None
    assert (
        separation([("one prompt", text) for _, text in shown], [("one prompt", text) for _, text in contrast]) is None
    )
