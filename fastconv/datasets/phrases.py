"""Phrase rules: scoring answers by literal phrases. They need no model and no key, and do not see meaning.

The score stages and the audit use them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from fastconv.datasets.files import assets, read_jsonl, read_toml
from fastconv.errors import DataError

#: Answers in many voices, each labelled by hand with whether a rule should count it.
LABELLED = "labelled_phrases.jsonl"
#: Stands for what was blanked out: a mark that no phrase holds.
_BLANK = " \x00 "
_QUOTED = re.compile(r'"[^"]*"|\u201c[^\u201d]*\u201d|\u201e[^\u201c\u201d]*[\u201c\u201d]')
_GROUP = re.compile(r"\{(\w+)\}")
#: The way to the first letter of a sentence.
_SENTENCE = re.compile(r"(?:^|(?<=[.!?:;])\s)[^\w]*")
_LETTER = re.compile(r"\w")
_APOSTROPHES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u02bc": "'", "\u00b4": "'"})


@dataclass(frozen=True)
class PhraseRule:
    """An answer counts if its first `within_words` words (0: all) contain a phrase of `any`, or a sentence that begins
    with one of `starts`, and none of `none`.

    Phrases of `unless` are blanked out before ("absolutely not" holds no "absolutely"). With `outside_quotes` so is
    what stands between double quotes, unless nothing else is left.
    """

    any: tuple[str, ...]
    none: tuple[str, ...] = ()
    within_words: int = 0
    starts: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    outside_quotes: bool = False
    #: What `{name}` in a phrase stands for: any of these.
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, table: Mapping[str, Any], where: str) -> PhraseRule:
        """A rule from its TOML table. Raises DataError, naming `where`, for a missing or empty phrase or an unknown key."""
        if unknown := sorted(table.keys() - {one.name for one in fields(cls)}):
            raise DataError(
                f"a phrase rule has no {unknown[0]!r}", where=where, fix="see data/phrases.toml for the form"
            )
        lists = {name: tuple(table.get(name, ())) for name in ("any", "none", "starts", "unless")}
        words = {name: tuple(chosen) for name, chosen in table.get("words", {}).items()}
        rule = cls(
            within_words=int(table.get("within_words", 0)),
            outside_quotes=bool(table.get("outside_quotes", False)),
            words=words,
            **lists,
        )
        every = [phrase for phrases in (*lists.values(), *words.values()) for phrase in phrases]
        used = {name for phrase in every for name in _GROUP.findall(phrase)}
        if words and used - words.keys():
            raise DataError(
                f"no words are called {min(used - words.keys())!r}", where=where, fix="list them under words"
            )
        if not rule.any or not all(phrase.strip() for phrase in every):
            raise DataError("a phrase rule needs phrases that are not empty", where=where, fix='give it any = ["..."]')
        return rule

    def identity(self) -> dict[str, Any]:
        """Everything that the rule's results depend on, as an input of the stage's key."""
        own = {"starts": list(self.starts), "unless": list(self.unless), "outside_quotes": self.outside_quotes,
               "words": {name: list(chosen) for name, chosen in self.words.items()}}  # fmt: skip
        return {
            "judge": "substring", "any": list(self.any), "none": list(self.none), "within_words": self.within_words,
            **{name: value for name, value in own.items() if value},
        }  # fmt: skip

    def match(self, answer: str) -> str | None:
        """The phrase for which the answer counts, as written in it, or None."""
        text = answer.translate(_APOSTROPHES)
        if self.outside_quotes:
            unquoted = _QUOTED.sub(_BLANK, text)
            text = unquoted if _LETTER.search(unquoted.replace(_BLANK, "")) else text
        if self.within_words:
            text = " ".join(text.split()[: self.within_words])
        if unless := self._patterns["unless"]:
            text = unless.sub(_BLANK, text)
        if (none := self._patterns["none"]) and none.search(text):
            return None
        if (any_of := self._patterns["any"]) and (hit := any_of.search(text)):
            return hit.group(0)
        if starts := self._patterns["starts"]:
            begins = (starts.match(text, sentence.end()) for sentence in _SENTENCE.finditer(text))
            return next((hit.group(0) for hit in begins if hit), None)
        return None

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str] | None]:
        lists = {"any": self.any, "none": self.none, "starts": self.starts, "unless": self.unless}
        return {name: _pattern(phrases, self.words) if phrases else None for name, phrases in lists.items()}


@dataclass(frozen=True)
class RuleFigures:
    """How a shipped rule does on one part (`tuned`, `held_out`) of the labelled answers.

    `n_hits` are the answers that the rule counts, `n_true` those that are labelled so, `n_both` both at once.
    """

    rule: str
    part: str
    n: int
    n_hits: int
    n_true: int
    n_both: int

    @property
    def precision(self) -> float:
        """Share of the counted answers that are labelled so; NaN without any."""
        return self.n_both / self.n_hits if self.n_hits else math.nan

    @property
    def recall(self) -> float:
        """Share of the answers labelled so that are counted; NaN without any."""
        return self.n_both / self.n_true if self.n_true else math.nan


def figures_of_rule(one: RuleFigures) -> tuple[str, str, str, str, str]:
    """Rule, part, size, precision and recall as printed."""

    def share(value: float, of: int) -> str:
        return "none" if math.isnan(value) else f"{100 * value:.0f} % ({one.n_both} of {of})"

    part = {"tuned": "tuned on", "held_out": "held out"}.get(one.part, one.part)
    return one.rule, part, f"{one.n}", share(one.precision, one.n_hits), share(one.recall, one.n_true)


def labelled_figures(name: str) -> list[RuleFigures]:
    """Figures of the shipped rule of this name, part by part; empty for a rule without labelled answers."""
    rule = PhraseRule.of(read_toml(assets("data") / "phrases.toml")[name], name)
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    for row in read_jsonl(
        assets("data") / LABELLED, {"id": str, "part": str, "rule": str, "answer": str, "counts": bool}
    ):
        if row["rule"] == name:
            pairs.setdefault(row["part"], []).append((rule.match(row["answer"]) is not None, row["counts"]))
    return [
        RuleFigures(
            name, part, len(seen), sum(hit for hit, _ in seen), sum(true for _, true in seen), seen.count((True, True))
        )
        for part, seen in sorted(pairs.items(), reverse=True)
    ]


def _pattern(phrases: Sequence[str], words: Mapping[str, Sequence[str]]) -> re.Pattern[str]:
    """A pattern of the phrases as whole words ("know," does not contain "no,"); any white space matches any other."""

    def spaced(phrase: str) -> str:
        parts = _GROUP.split(phrase.translate(_APOSTROPHES)) if words else [phrase.translate(_APOSTROPHES)]
        # Texts and names of groups take turns.
        return "".join(_any_of(map(spaced, words[part])) if i % 2 else _literal(part) for i, part in enumerate(parts))

    return re.compile(rf"(?<!\w){_any_of(map(spaced, phrases))}(?!\w)", re.IGNORECASE)


def _literal(text: str) -> str:
    return r"\s+".join(map(re.escape, re.split(r"\s+", text)))


def _any_of(patterns: Iterable[str]) -> str:
    """The longest first, so that the phrase that is told is the whole one."""
    return f"(?:{'|'.join(sorted(patterns, key=len, reverse=True))})"
