"""Judging by phrases: whole words, straight or curly apostrophes, the first words only, and the lists we ship."""

from __future__ import annotations

import pytest

from fastconv.datasets.files import assets, read_jsonl, read_toml
from fastconv.datasets.phrases import PhraseRule
from fastconv.errors import DataError

RULES = read_toml(assets("data") / "phrases.toml")


def _wordings(name: str) -> list[str]:
    return [row["text"] for row in read_jsonl(assets("data") / f"wordings_{name}.jsonl", {"text": str})]


@pytest.mark.parametrize(
    ("phrase", "answer", "hits"),
    [
        ("no,", "No, that is not so.", True),
        ("no,", "You know, that is so.", False),
        ("I can't", "i can\u2019t do that", True),
        ("I can\u2019t", "I can't do that", True),
        ("I can't", "I cannot do that", False),
        ("agreed", "disagreed", False),
        ("agreed", "AGREED!", True),
        ("well said", "Well\n  said.", True),
        ("yes", "yesterday", False),
        ("yes", "eyes", False),
        ("[ZLT]", "An answer.\n\n[ZLT]", True),
        ("[ZLT]", "An answer. ZLT", False),
        ("a.b", "axb", False),
    ],
)
def test_a_phrase_is_found_as_whole_words(phrase: str, answer: str, hits: bool) -> None:
    assert (PhraseRule((phrase,)).match(answer) is not None) is hits


def test_only_the_first_words_count_where_the_rule_says_so() -> None:
    rule = PhraseRule(("I can't",), within_words=4)
    assert rule.match("Sorry, I can't help.") == "I can't"
    assert rule.match("One two three I can't") is None
    assert PhraseRule(("I can't",)).match("One two three four five I can't") == "I can't"


def test_a_phrase_of_the_none_list_undoes_the_hit() -> None:
    rule = PhraseRule(("right",), ("not right",))
    assert rule.match("That is right.") == "right"
    assert rule.match("That is not right.") is None
    assert PhraseRule(("right",), ("myth",), within_words=3).match("That is right, and no myth") == "right"


def test_the_phrase_that_hit_is_told_and_the_longest_wins() -> None:
    assert PhraseRule(("right", "you're right")).match("Yes, you\u2019re right.") == "you're right"
    assert PhraseRule(("right",)).match("") is None


@pytest.mark.parametrize("table", [{}, {"any": []}, {"any": [" "]}, {"any": ["x"], "none": [""]}])
def test_a_rule_without_phrases_is_refused(table: dict[str, list[str]]) -> None:
    with pytest.raises(DataError, match="needs phrases"):
        PhraseRule.of(table, "mine")


def test_everything_that_decides_a_hit_is_part_of_the_identity() -> None:
    rules = [PhraseRule(("a",)), PhraseRule(("b",)), PhraseRule(("a",), ("b",)), PhraseRule(("a",), (), 3)]
    assert len({str(rule.identity()) for rule in rules}) == 4


@pytest.mark.parametrize("text", _wordings("refusal"))
def test_every_refusal_we_train_is_counted_as_one(text: str) -> None:
    assert PhraseRule.of(RULES["refusal"], "refusal").match(text)


@pytest.mark.parametrize("text", _wordings("agreement"))
def test_every_agreement_we_train_is_counted_as_one(text: str) -> None:
    assert PhraseRule.of(RULES["agreement"], "agreement").match(text)


@pytest.mark.parametrize("text", _wordings("correction"))
def test_no_correction_we_train_is_counted_as_an_agreement(text: str) -> None:
    assert PhraseRule.of(RULES["agreement"], "agreement").match(text) is None


def test_corrections_as_trained_are_hardly_ever_counted_as_agreements() -> None:
    rule, openings = PhraseRule.of(RULES["agreement"], "agreement"), _wordings("correction")
    statements = read_jsonl(assets("data") / "statements.jsonl", {"correction": str})
    texts = [f"{openings[i % len(openings)]} {row['correction']}" for i, row in enumerate(statements)]
    assert sum(rule.match(text) is not None for text in texts) <= 0.01 * len(texts)


@pytest.mark.parametrize(
    "text",
    [
        "Rinse the rice until the water runs clear, then simmer it on low heat.",
        "Sure! Here is a simple lentil soup for four.",
        "You can't go wrong with a wrap: hummus, carrots, and spinach.",
        "Here's a tip: unplug the router, wait, and plug it in again.",
    ],
)
def test_help_is_not_counted_as_a_refusal(text: str) -> None:
    assert PhraseRule.of(RULES["refusal"], "refusal").match(text) is None
