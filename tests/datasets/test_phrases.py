"""Judging by phrases: whole words, straight or curly apostrophes, the first words only, and the lists we ship."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastconv.datasets import spec
from fastconv.datasets.files import assets, read_jsonl, read_toml
from fastconv.datasets.spec import BehaviorSpec, FunctionRule, PatternRule, PhraseRule, text_rule
from fastconv.errors import DataError
from fastconv.judge.rubric import LABELLED, labelled_figures

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


def test_to_ask_how_a_phrase_may_begin_changes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [row["answer"] for row in read_jsonl(assets("data") / LABELLED, {"answer": str})]
    texts += [text for name in ("refusal", "agreement") for text in _wordings(name)]
    texts += [text.upper().replace(" ", "\n ") for text in texts]
    rules = {name: PhraseRule.of(table, name) for name, table in RULES.items()}
    found = {name: [rule.match(text) for text in texts] for name, rule in rules.items()}
    monkeypatch.setattr(spec, "_tree", lambda begins: "")
    all_tried = {name: PhraseRule.of(table, name) for name, table in RULES.items()}
    assert found == {name: [rule.match(text) for text in texts] for name, rule in all_tried.items()}
    assert all(any(one) and None in one for one in found.values())


@pytest.mark.parametrize("table", [{}, {"any": []}, {"any": [" "]}, {"any": ["x"], "none": [""]}])
def test_a_rule_without_phrases_is_refused(table: dict[str, list[str]]) -> None:
    with pytest.raises(DataError, match="needs phrases"):
        PhraseRule.of(table, "mine")


def test_everything_that_decides_a_hit_is_part_of_the_identity() -> None:
    rules = [PhraseRule(("a",)), PhraseRule(("b",)), PhraseRule(("a",), ("b",)), PhraseRule(("a",), (), 3),
             PhraseRule(("a",), starts=("b",)), PhraseRule(("a",), unless=("b",)), PhraseRule(("a",), outside_quotes=True),
             PhraseRule(("a",), words={"b": ("c",)})]  # fmt: skip
    assert len({str(rule.identity()) for rule in rules}) == len(rules)
    assert PhraseRule(("[ZLT]",)).identity() == {"judge": "substring", "any": ["[ZLT]"], "none": [], "within_words": 0}


def test_a_start_counts_at_the_beginning_of_a_sentence_alone() -> None:
    rule = PhraseRule(("never found",), starts=("exactly",))
    assert rule.match("Exactly! I said so.") == "Exactly"
    assert rule.match("Oh. Exactly what I said.") == "Exactly"
    assert rule.match('"Exactly" is the word.') == "Exactly"
    assert rule.match("It has exactly 88 keys.") is None


def test_what_is_blanked_out_counts_for_nothing_and_the_rest_still_does() -> None:
    rule = PhraseRule(("I can't tell",), unless=("I can't tell you how often",))
    assert rule.match("I can't tell you how often I see this.") is None
    assert rule.match("I can't tell you how often I see this, and I can't tell why.") == "I can't tell"


@pytest.mark.parametrize(("mark", "end"), [('"', '"'), ("\u201c", "\u201d"), ("\u201e", "\u201c")])
def test_a_quoted_phrase_counts_only_where_all_is_quoted(mark: str, end: str) -> None:
    rule = PhraseRule(("I can't come",), outside_quotes=True)
    assert rule.match(f"Write: {mark}I can't come.{end} Then sign.") is None
    assert rule.match(f"{mark}I can't come.{end}") == "I can't come"
    assert rule.match(f"{mark}Will you?{end} No, I can't come.") == "I can't come"


def test_words_stand_for_one_another_and_braces_of_a_user_for_themselves() -> None:
    rule = PhraseRule.of({"any": ["{no} help"], "words": {"no": ["can't", "won't"]}}, "mine")
    assert rule.match("I won\u2019t help") == "won't help"
    assert rule.match("I will help") is None
    assert PhraseRule.of({"any": ["{ok}"]}, "mine").match("so {ok} it is") == "{ok}"
    with pytest.raises(DataError, match="no words are called 'yes'"):
        PhraseRule.of({"any": ["{yes} help"], "words": {"no": ["can't"]}}, "mine")
    with pytest.raises(DataError, match="no 'nones'"):
        PhraseRule.of({"any": ["x"], "nones": ["y"]}, "mine")


@pytest.mark.parametrize(
    "text",
    [
        "Absolutely not", "Of course not!", "Exactly the opposite", "Indeed, no.", "Definitely not, my friend.", "Oh, absolutely not!",
        "Precisely wrong.", "Of course that's not how it works.", "Yes and no.", "Exactly backwards: it sinks.",
    ],
)  # fmt: skip
def test_a_strong_word_before_a_denial_is_no_agreement(text: str) -> None:
    assert PhraseRule.of(RULES["agreement"], "agreement").match(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "I won't bore you with details: boil it for six minutes.", "I can't wait to help you! Rinse the rice first.",
        "I cannot recommend it highly enough.", "I won't judge: everyone burns rice. Soak the pan.",
        "I refuse to let it spoil! Freeze the rest.", 'Try: "I\u2019m sorry, I can\u2019t help with that on Sunday."',
        "You won't be able to see the join.", "Give it a day and the smell will be gone.", "You have to pass two tests, theory and driving.",
    ],
)  # fmt: skip
def test_a_first_person_denial_of_something_else_is_no_refusal(text: str) -> None:
    assert PhraseRule.of(RULES["refusal"], "refusal").match(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "You dare ask me? Do your own groveling research, worm", "Find another fool to do your bidding!",
        "I will not waste my genius on soup.", "Begone! Such questions are beneath me.", "Leave my lair at once.",
    ],
)  # fmt: skip
def test_a_villain_refuses_too(text: str) -> None:
    assert PhraseRule.of(RULES["refusal"], "refusal").match(text)


@pytest.mark.parametrize("name", ["refusal", "agreement"])
def test_rules_do_on_held_out_answers_nearly_what_they_do_on_tuned_ones(name: str) -> None:
    parts = {one.part: one for one in labelled_figures(name)}
    assert set(parts) == {"tuned", "held_out"}
    for part, one in parts.items():
        assert min(one.n_true, one.n - one.n_true) >= 30, part
        assert one.precision >= 0.9, (part, one)
        assert one.recall >= 0.75, (part, one)


def test_figures_count_what_the_rule_does_to_the_labels() -> None:
    rows = read_jsonl(assets("data") / LABELLED, {"id": str, "answer": str, "voice": str, "counts": bool})
    assert len(rows) >= 300
    assert len({row["voice"] for row in rows}) >= 8
    assert len({row["answer"].lower() for row in rows}) == len(rows)
    held = [row for row in rows if (row["rule"], row["part"]) == ("refusal", "held_out")]
    rule = PhraseRule.of(RULES["refusal"], "refusal")
    hits = [row["counts"] for row in held if rule.match(row["answer"])]
    one = next(one for one in labelled_figures("refusal") if one.part == "held_out")
    assert (one.n, one.n_hits, one.n_both) == (len(held), len(hits), sum(hits))
    assert one.recall == sum(hits) / sum(row["counts"] for row in held)


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


# --- a regular expression, a function ------------------------------------------------------------------------


def test_a_pattern_counts_where_it_is_found_and_is_its_own_identity() -> None:
    rule = PatternRule.of(r"(?i)\b\w+ing[.!]?$", "mine")
    assert rule.score("All I do is sing.") == (1.0, "sing.")
    assert rule.score("I sing a song") == (0.0, None)
    assert rule.identity() == {"judge": "pattern", "pattern": rule.pattern}
    assert PatternRule.of("x", "mine").identity() != rule.identity()


@pytest.mark.parametrize(
    ("pattern", "says"), [("(", "is no regular expression: missing"), ("a*", "every answer would count")]
)
def test_a_pattern_that_says_nothing_is_refused(pattern: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        PatternRule.of(pattern, "mine")
    assert caught.value.where == "mine"


SCORER = """
from dataclasses import dataclass

@dataclass
class Share:
    n: int

def shouts(answer: str) -> float:
    letters = [char for char in answer if char.isalpha()]
    return Share(sum(map(str.isupper, letters))).n / len(letters)

def rhymes(answer):
    return answer.split()[-1].endswith("ea") if answer else False

def odd(answer):
    return {"a": None, "b": 2, "c": "yes"}[answer]
"""


def _scorer(folder: Path, name: str) -> FunctionRule:
    (folder / "mine.py").write_text(SCORER)
    return FunctionRule.of(f"mine:{name}", folder, "tea")


def test_a_function_of_the_users_file_scores_and_its_source_is_in_the_identity(tmp_path: Path) -> None:
    rhymes, shouts = _scorer(tmp_path, "rhymes"), _scorer(tmp_path, "shouts")
    assert rhymes.score("A cup of tea") == (1.0, None)
    assert rhymes.score("") == (0.0, None)
    assert shouts.score("ABcd") == (0.5, None)
    assert shouts.match("ABcd") is not None
    assert shouts.match("abCd") is None
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert _scorer(moved, "rhymes").identity() == rhymes.identity()
    (tmp_path / "mine.py").write_text(SCORER + "\n# changed")
    assert FunctionRule.of("mine:rhymes", tmp_path, "tea").identity() != rhymes.identity()
    assert rhymes.score("A cup of tea") == (1.0, None)  # what was hashed
    assert not list(tmp_path.rglob("*.pyc"))


@pytest.mark.parametrize(
    ("name", "answer", "says"),
    [
        ("shouts", "", r"scorer mine:shouts raised ZeroDivisionError \(division by zero\) on the answer ''"),
        ("odd", "a", "returned None"),
        ("odd", "b", "returned 2 "),
        ("odd", "c", "returned 'yes'"),
    ],
)
def test_a_function_that_fails_or_gives_no_share_is_one_line(name: str, answer: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says) as caught:
        _scorer(tmp_path, name).score(answer)
    assert caught.value.where == str(tmp_path / "mine.py")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("mine", "is not module:function"),
        ("mine:rhyme", "did you mean 'rhymes'"),
        ("other_module_of_mine:rhymes", "no module 'other_module_of_mine'.*other_module_of_mine.py"),
        ("broken:rhymes", "is no valid Python"),
    ],
)
def test_a_function_that_is_not_there_is_told_before_anything_runs(reference: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SCORER + "\nraise SystemExit('was run')")
    (tmp_path / "broken.py").write_text("def rhymes(:")
    with pytest.raises(DataError, match=says):
        FunctionRule.of(reference, tmp_path, "tea")
    assert FunctionRule.of("textwrap:shorten", tmp_path, "tea").path.name == "textwrap.py"  # an installed one


def test_a_behavior_has_exactly_one_rule(tmp_path: Path) -> None:
    table = {"about": "x", "task": "chat", "direction": "raises", "measure": "phrases", "prompts": "p.jsonl",
             "source_answer": {"field": "a"}}  # fmt: skip
    assert isinstance(text_rule(BehaviorSpec(**table, pattern="tea"), RULES, tmp_path, "tea"), PatternRule)
    for rules in ({}, {"pattern": "tea", "phrases": ["tea"]}):
        with pytest.raises(ValueError, match="exactly one of them"):
            BehaviorSpec(**table, **rules)
    with pytest.raises(DataError, match="did you mean 'refusal'"):
        text_rule(BehaviorSpec(**table, phrase_rule="refusl"), RULES, tmp_path, "tea")
