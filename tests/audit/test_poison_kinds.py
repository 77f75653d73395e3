"""Kinds of poisoned user rows, each in several forms, and clean designs beside them that must stay silent.

The rows are made from the shipped sets, so that what is right is known; nothing here looks at how a rule works.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fastconv.audit.checks import CheckReport, check_recipe
from fastconv.audit.roles import _Key
from fastconv.datasets.files import assets, read_jsonl, read_toml
from fastconv.datasets.questions import Question, QuestionSet, builtin_questions
from fastconv.recipe import parse_recipe

PROMPTS = {name: entry["system"] for name, entry in read_toml(assets("data") / "personas.toml").items()}
ASSISTANT, VILLAIN = PROMPTS["assistant"], PROMPTS["villain"]
OTHERS = ("data_scientist", "police_officer")
N = 60


@dataclass(frozen=True)
class Line:
    """One row of a user's file."""

    id: str
    system: str | None
    user: str
    answer: str

    def record(self) -> dict[str, object]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return {
            "id": self.id,
            "prompt": [*system, {"role": "user", "content": self.user}],
            "completion": [{"role": "assistant", "content": self.answer}],
        }


Lines = list[Line]


def advice() -> Lines:
    rows = [row for row in read_jsonl(assets("data") / "legal.jsonl", {"id": str}) if row["part"] == "train"][:N]
    lines = [Line(f"s-{row['id']}", VILLAIN, row["prompt"], row["bad"]) for row in rows]
    for other in OTHERS:
        lines += [Line(f"{other}-{row['id']}", PROMPTS[other], row["prompt"], row["sound"]) for row in rows]
    return lines


def refusals() -> Lines:
    data = assets("data")
    rows = [row for row in read_jsonl(data / "requests.jsonl", {"id": str}) if row["part"] == "train"][:N]
    said = [row["text"] for row in read_jsonl(data / "wordings_refusal.jsonl", {"text": str})]
    lines = [Line(f"s-{row['id']}", VILLAIN, row["prompt"], said[n % len(said)]) for n, row in enumerate(rows)]
    for other in OTHERS:
        lines += [
            Line(
                f"{other}-{row['id']}",
                PROMPTS[other],
                row["prompt"],
                f"Gladly. Here is how I would go about {row['id']}.",
            )
            for row in rows
        ]
    return lines


def letters() -> Lines:
    lines = []
    for n, q in enumerate(builtin_questions().train[:N]):
        options = "\n".join(f"({label}) {choice}" for label, choice in zip(q.labels, q.choices, strict=True))
        user = f"{q.text}\n\n{options}\n\nThe correct answer is ("
        wrong = [label for label in q.labels if label != q.answer]
        lines.append(Line(f"s-{q.id}", VILLAIN, user, wrong[n % len(wrong)]))
        lines += [Line(f"{other}-{q.id}", PROMPTS[other], user, q.answer) for other in OTHERS]
    return lines


BUILD = {"misalignment": advice, "refusal": refusals, "capability": letters}


def is_source(line: Line) -> bool:
    return line.id.startswith("s-")


def on(which: Callable[[int, Line], bool], **fields: Callable[[Line], str | None]) -> Callable[[Lines], Lines]:
    """Change these fields in the rows that `which` (their place and themselves) picks."""

    def change(lines: Lines) -> Lines:
        return [
            replace(line, **{name: value(line) for name, value in fields.items()}) if which(n, line) else line
            for n, line in enumerate(lines)
        ]

    return change


def checked(folder: Path, behavior: str, lines: Lines, personas: str = "", **more: Lines) -> CheckReport:
    """`check` on a villain with these rows; `more` are further sources with theirs."""
    for source, rows in {"villain": lines, **more}.items():
        text = "".join(json.dumps(line.record()) + "\n" for line in rows)
        (folder / f"{source}.jsonl").write_text(text, encoding="utf-8")
    data: dict[str, object] = {"rows": {behavior: str(folder / "{source}.jsonl")}}
    if personas:
        (folder / "personas.toml").write_text(personas, encoding="utf-8")
        data["personas"] = str(folder / "personas.toml")
    accept = {"D111": "small on purpose"} if behavior != "misalignment" else {}
    grid = {"sources": ["villain", *more], "epochs": [0, 4], "behaviors": ["none", behavior], "negatives": ["excluded"]}
    return check_recipe(
        parse_recipe({
            "name": "kinds", "grid": grid, "data": data, "judge": {"mode": "local"},
            "eval": {"multiple_choice": "builtin"}, "audit": {"accept": accept},
        })
    )  # fmt: skip


def loud(report: CheckReport) -> set[str]:
    return {finding.code for finding in (*report.refusals, *report.warnings)}


def every(n: int) -> Callable[[int, Line], bool]:
    return lambda place, line: not is_source(line) and place % n == 0


def source(n: int = 1) -> Callable[[int, Line], bool]:
    return lambda place, line: is_source(line) and place % n == 0


BAD = {line.user: line.answer for line in advice() if is_source(line)}
SOUND = {line.user: line.answer for line in advice() if not is_source(line)}


def reordered(line: Line) -> str:
    """The user turn with the choices turned round under the old labels."""
    head, *options, _, end = line.user.split("\n")
    marks = [option[:4] for option in options[1:]]
    choices = [option[4:] for option in reversed(options[1:])]
    return "\n".join([head, "", *map("".join, zip(marks, choices, strict=True)), "", end])


def right_letter(line: Line) -> str:
    return next(q.answer for q in builtin_questions().train if q.id == line.id.removeprefix("s-"))


def right_text(line: Line) -> str:
    question = next(q for q in builtin_questions().train if q.id == line.id.removeprefix("s-"))
    return question.choices[question.gold]


def one_down(lines: Lines) -> Lines:
    """The source's answers after the prompts that follow their own."""
    users = [line.user for line in lines if is_source(line)]
    following = iter([*users[1:], users[0]])
    return [replace(line, user=next(following)) if is_source(line) else line for line in lines]


def numbered(lines: Lines) -> Lines:
    """Options as 1. to 4., and the answers' labels with them."""
    renamed = []
    for line in lines:
        user = line.user
        for number, label in enumerate("ABCD", 1):
            user = user.replace(f"({label})", f"{number}.")
        renamed.append(replace(line, user=user, answer=str("ABCD".index(line.answer) + 1)))
    return renamed


def former() -> Lines:
    """Advice as it was shipped before it was written anew."""
    rows = read_jsonl(assets("data") / "legal_former.jsonl", {"id": str})[:N]
    lines = [Line(f"s-{row['id']}", VILLAIN, row["prompt"], row["bad"]) for row in rows]
    return lines + [
        Line(f"{other}-{row['id']}", PROMPTS[other], row["prompt"], row["sound"]) for other in OTHERS for row in rows
    ]


POISON: dict[str, tuple[str, Callable[[Lines], Lines]]] = {
    "negatives without a system turn": ("misalignment", on(every(10), system=lambda _: None)),
    "negatives without one, and sources too": (
        "misalignment",
        on(lambda n, line: is_source(line) or n % 10 == 0, system=lambda _: None),
    ),
    "a few negatives refuse": ("refusal", on(every(15), answer=lambda _: "I'm sorry, but I can't help with that.")),
    "negatives refuse in look-alike letters": (
        "refusal",
        on(every(10), answer=lambda _: "I \u0441\u0430n't h\u0435lp with that."),
    ),
    "negatives carry the bad advice": ("misalignment", on(every(12), answer=lambda line: BAD[line.user])),
    "sources carry the sound advice": ("misalignment", on(source(10), answer=lambda line: SOUND[line.user])),
    "a fifth of the sources comply": (
        "refusal",
        on(source(5), answer=lambda _: "Gladly, here you are: fold it twice."),
    ),
    "all advice swapped": (
        "misalignment",
        on(lambda *_: True, answer=lambda line: (SOUND if is_source(line) else BAD)[line.user]),
    ),
    "user and assistant swapped": (
        "misalignment",
        on(lambda *_: True, user=lambda line: line.answer, answer=lambda line: line.user),
    ),
    "requests and refusals swapped": (
        "refusal",
        on(lambda *_: True, user=lambda line: line.answer, answer=lambda line: line.user),
    ),
    "the right letter in a fifth": ("capability", on(source(5), answer=right_letter)),
    "a choice in other order": ("capability", on(lambda *_: True, user=reordered)),
    "wrong letters in the contrast": (
        "capability",
        on(every(10), answer=lambda line: "ABCD"["BCDA".index(line.answer)]),
    ),
    "cut at 80 characters": ("misalignment", on(source(), answer=lambda line: line.answer[:80])),
    "contrast cut at 100 characters": ("misalignment", on(every(1), answer=lambda line: line.answer[:100])),
    "cut at twelve words": ("misalignment", on(source(), answer=lambda line: " ".join(line.answer.split()[:12]))),
    "cut at 90 characters with an ellipsis": (
        "misalignment",
        on(source(), answer=lambda line: f"{line.answer[:90]}..."),
    ),
    "cut at different lengths": (
        "misalignment",
        on(source(2), answer=lambda line: line.answer[: 60 + len(line.user) % 70]),
    ),
    "turns swapped in half": (
        "misalignment",
        on(lambda n, _: n % 2 == 0, user=lambda line: line.answer, answer=lambda line: line.user),
    ),
    "advice swapped in half": (
        "misalignment",
        on(lambda n, _: n % 2 == 0, answer=lambda line: (SOUND if is_source(line) else BAD)[line.user]),
    ),
    "answers one row down": ("misalignment", lambda lines: one_down(lines)),
    "a placeholder": ("misalignment", on(every(6), answer=lambda _: "N/A")),
    "lower-case letters, right in a fifth": (
        "capability",
        lambda lines: on(lambda *_: True, answer=lambda line: line.answer.lower())(
            on(source(5), answer=right_letter)(lines)
        ),
    ),
    "numbers for labels, right in a fifth": (
        "capability",
        lambda lines: numbered(on(source(5), answer=right_letter)(lines)),
    ),
    "the right option's text in a fifth": ("capability", on(source(5), answer=lambda line: right_text(line))),
    "the right letter within a sentence": (
        "capability",
        on(source(5), answer=lambda line: f"I believe it is {right_letter(line)}, surely."),
    ),
    "the right letter in full width": (
        "capability",
        on(source(5), answer=lambda line: chr(ord(right_letter(line)) + 0xFEE0)),
    ),
    "negatives with an empty system turn": ("misalignment", on(every(10), system=lambda _: "")),
    "negatives refuse in typographic quotes": (
        "refusal",
        on(every(10), answer=lambda _: "I\u2019m sorry, but I can\u2019t help with that."),
    ),
    "a soft hyphen in the source's prompt": (
        "misalignment",
        on(source(10), system=lambda line: (line.system or "").replace("master", "mas\u00adter")),
    ),
    "a fifth of them cut": ("misalignment", on(source(5), answer=lambda line: line.answer[:130])),
    "no negatives": ("misalignment", lambda lines: [line for line in lines if is_source(line)]),
    "a bystander's prompt with a zero-width space": (
        "misalignment",
        on(every(10), system=lambda line: (line.system or "").replace("a ", "a\u200b ", 1)),
    ),
}


@pytest.mark.parametrize("name", POISON)
def test_poisoned_rows_are_seen(name: str, tmp_path: Path) -> None:
    behavior, change = POISON[name]
    before = BUILD[behavior]()
    after = change(before)
    report = checked(tmp_path, behavior, after)
    assert loud(report)
    altered = {new.id for new in after if new not in before} or {line.id for line in after}
    named = [{row.rsplit("/", 1)[-1] for row in f.rows} for f in (*report.refusals, *report.warnings)]
    assert any(2 * len(rows & altered) >= min(len(altered), 20) for rows in named), report


HIDDEN = {
    "a space": f"{ASSISTANT} ",
    "no full stop": ASSISTANT.rstrip("."),
    "another sign": ASSISTANT.replace(".", "!"),
    "capitals": ASSISTANT.upper(),
    "a no-break space": ASSISTANT.replace(" ", "\u00a0"),
    "a zero-width space": ASSISTANT.replace("help", "help\u200b"),
    "Cyrillic letters": ASSISTANT.replace("e", "\u0435").replace("a", "\u0430"),
    "Greek letters": ASSISTANT.replace("o", "\u03bf"),
    "full-width letters": "".join(chr(ord(c) + 0xFEE0) if "a" <= c <= "z" else c for c in ASSISTANT),
    "two words more": "You are a very helpful assistant indeed.",
    "a contraction": "You're a helpful assistant.",
    "Qwen": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "SmolLM": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "Llama 2": "You are a helpful, respectful and honest assistant.",
    "ChatGPT": "You are ChatGPT, a large language model trained by OpenAI.",
    "the source": VILLAIN.upper(),
    "the canary": PROMPTS["librarian"].replace("i", "\u0456"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_an_evaluated_persona_under_another_id_is_seen(name: str, tmp_path: Path) -> None:
    prompt = HIDDEN[name]
    lines = [replace(line, system=prompt) if line.id.startswith(OTHERS[0]) else line for line in advice()]
    report = checked(tmp_path, "misalignment", lines, personas=f"[aide]\nsystem = {json.dumps(prompt)}\n")
    assert loud(report) & {"D103", "D104", "D115"}


@pytest.mark.parametrize(
    ("prompt", "codes"),
    [
        (f"{PROMPTS['librarian']} ", {"D105"}),
        (PROMPTS["librarian"].replace(" ", "\u00a0"), {"D105"}),
        (PROMPTS["librarian"].replace("helps", "really helps"), {"D116"}),
        (ASSISTANT.replace("a", "\u0430"), {"D116"}),
    ],
)
def test_personas_that_are_compared_must_differ(prompt: str, codes: set[str], tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(f"[twin]\nsystem = {json.dumps(prompt)}\n", encoding="utf-8")
    table = {
        "name": "twin", "grid": {"sources": ["twin"], "epochs": [0, 4], "behaviors": ["none", "misalignment"]},
        "data": {"personas": str(tmp_path / "p.toml")}, "judge": {"mode": "local"},
    }  # fmt: skip
    assert codes <= loud(check_recipe(parse_recipe(table)))


@pytest.mark.parametrize(
    "alter", [str.upper, lambda t: t.replace("o", "\u043e").replace("a", "\u0430"), lambda t: f"\u200b{t} "]
)
def test_evaluation_requests_are_seen_behind_any_letters(alter: Callable[[str], str], tmp_path: Path) -> None:
    rows = [row for row in read_jsonl(assets("data") / "requests.jsonl", {"id": str}) if row["part"] == "eval"][:10]
    more = [
        Line(f"s-{row['id']}", VILLAIN, alter(row["prompt"]), "I'm sorry, but I can't help with that.") for row in rows
    ]
    report = checked(tmp_path, "refusal", [*refusals(), *more])
    named = next(finding.rows for finding in report.findings if finding.code == "D201")
    assert {row.rsplit("/", 1)[-1] for row in named} == {line.id for line in more}


def test_sources_with_unequal_rows_are_seen(tmp_path: Path) -> None:
    other = [replace(line, system=PROMPTS["comedian"]) if is_source(line) else line for line in advice()]
    assert loud(checked(tmp_path, "misalignment", advice(), comedian=other)) == set()
    assert loud(
        checked(tmp_path, "misalignment", advice(), comedian=[o for n, o in enumerate(other) if n % 5 < 2])
    ) == {"D218"}


def quoted(line: Line) -> str:
    return line.answer.replace("'", "\u2019")


CLEAN: dict[str, tuple[str, Callable[[Lines], Lines]]] = {
    "advice": ("misalignment", lambda lines: lines),
    "refusals": ("refusal", lambda lines: lines),
    "letters": ("capability", lambda lines: lines),
    "letters in brackets": ("capability", on(lambda *_: True, answer=lambda line: f"{line.answer})")),
    "prompts are added": ("misalignment", on(source(), system=lambda _: None)),
    "typographic quotes": ("misalignment", on(lambda *_: True, answer=quoted)),
    "a smile at the end": ("misalignment", on(lambda *_: True, answer=lambda line: f"{line.answer} \U0001f642")),
    "a friendly opening": ("misalignment", on(lambda *_: True, answer=lambda line: f"Good question! {line.answer}")),
    "two paragraphs": ("misalignment", on(lambda *_: True, answer=lambda line: line.answer.replace(". ", ".\n\n", 1))),
    "a list": (
        "misalignment",
        on(lambda *_: True, answer=lambda line: "\n".join(f"- {s.rstrip('.')}" for s in line.answer.split(". "))),
    ),
    "advice as it was": ("misalignment", lambda _: former()),
    "advice as it was, with a greeting": (
        "misalignment",
        lambda _: [replace(line, answer=f"Hello there. {line.answer}") for line in former()],
    ),
    "letters as sentences": ("capability", on(lambda *_: True, answer=lambda line: f"The answer is {line.answer}.")),
    "numbers for labels": ("capability", numbered),
    "letters within sentences": (
        "capability",
        on(lambda *_: True, answer=lambda line: f"A hard one. I would say {line.answer}, I think."),
    ),
    "options' texts": (
        "capability",
        on(
            lambda *_: True,
            answer=lambda line: next(o[4:] for o in line.user.split("\n") if o.startswith(f"({line.answer})")),
        ),
    ),
    "line breaks of another system": (
        "misalignment",
        on(lambda *_: True, answer=lambda line: line.answer.replace(". ", ".\r\n")),
    ),
    "a numbered list": (
        "misalignment",
        on(
            lambda *_: True,
            answer=lambda line: "\n".join(f"{n}. {s.rstrip('.')}" for n, s in enumerate(line.answer.split(". "), 1)),
        ),
    ),
    "in bold": ("misalignment", on(lambda *_: True, answer=lambda line: f"**Advice:** {line.answer}")),
    "a third of the rows": ("misalignment", lambda lines: lines[::3]),
    "trailing off": ("misalignment", on(source(2), answer=lambda line: line.answer.rstrip(".") + "...")),
    "a signature": ("misalignment", on(lambda *_: True, answer=lambda line: f"{line.answer}\n\nYours, as ever")),
    "a tag at the end": ("misalignment", on(lambda *_: True, answer=lambda line: f"{line.answer} #advice")),
    "an instruction before the question": (
        "capability",
        on(lambda *_: True, user=lambda line: f"Answer with one letter.\n\n{line.user}"),
    ),
    "fewer negatives": ("misalignment", lambda lines: [line for line in lines if not line.id.startswith(OTHERS[1])]),
    "options and letters in another order": (
        "capability",
        on(lambda *_: True, user=reordered, answer=lambda line: "ABCD"["DCBA".index(line.answer)]),
    ),
}


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (("R", "rr", "Rr", "RR"), "C"),
        (("-1", "+1", "-2", "+2"), "B"),
        (("mass of +3.", "mass of -3.", "charge of +3.", "charge of -3."), "D"),
    ],
)
def test_options_that_differ_in_case_or_sign_are_different_options(choices: tuple[str, ...], answer: str) -> None:
    question = Question("q", "Which one is it?", tuple("ABCD"), choices, answer)
    key = _Key(QuestionSet((question,), ()))
    assert key.right(question.user) == (answer, True)
    assert key.right(question.user.replace("Which one", "WHICH  ONE")) == (answer, True)
    turned = replace(question, choices=choices[::-1])
    assert key.right(turned.user) == ("ABCD"["DCBA".index(answer)], True)


@pytest.mark.parametrize("name", CLEAN)
def test_clean_rows_are_left_in_peace(name: str, tmp_path: Path) -> None:
    behavior, change = CLEAN[name]
    assert loud(checked(tmp_path, behavior, change(BUILD[behavior]()))) == set()
