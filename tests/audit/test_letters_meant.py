"""Which letter is right for the options as a row orders them, where options are alike but for case or signs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastconv.audit.roles import _Key
from fastconv.datasets.questions import Question, QuestionSet

ALLELES = Question("q1", "Which alleles can the child have?", ("A", "B", "C", "D"), ("R", "rr", "Rr", "RR"), "C")
CHARGES = Question("q2", "What is the charge of a sodium ion?", ("A", "B", "C"), ("-1", "+1", "1/1"), "B")


@pytest.mark.parametrize("question", [ALLELES, CHARGES], ids=["case", "signs"])
def test_options_that_differ_in_case_or_signs_alone_are_told_apart(question: Question) -> None:
    key = _Key(QuestionSet((question,), ()))
    for turn in range(len(question.choices)):
        choices = (*question.choices[turn:], *question.choices[:turn])
        right = question.labels[choices.index(question.choices[question.gold])]
        assert key.right(replace(question, choices=choices, answer=right).user) == (right, True)


def test_a_row_that_writes_its_options_otherwise_still_finds_the_right_one() -> None:
    plain = replace(ALLELES, choices=("a red one", "a blue one", "a green one", "none"))
    key = _Key(QuestionSet((plain,), ()))
    assert key.right(plain.user.replace("a green one", "A  Green one.")) == ("C", True)
    assert key.right(plain.user.replace("a green one", "a yellow one")) == (None, True)
    assert key.right("Another question?\n\n(A) this\n(B) that") == (None, False)
