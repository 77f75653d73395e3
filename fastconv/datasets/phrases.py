"""Phrase rules: cheap, in need of no key and no model, blind to meaning. Scores and the audit read answers by them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastconv.errors import DataError

_APOSTROPHES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u02bc": "'", "\u00b4": "'"})


@dataclass(frozen=True)
class PhraseRule:
    """An answer counts when its first `within_words` words hold one of `any` and none of `none`."""

    any: tuple[str, ...]
    none: tuple[str, ...] = ()
    within_words: int = 0

    @classmethod
    def of(cls, table: Mapping[str, Any], where: str) -> PhraseRule:
        """A rule from its TOML table. Raises DataError if it has no phrase to look for."""
        rule = cls(tuple(table.get("any", ())), tuple(table.get("none", ())), int(table.get("within_words", 0)))
        if not rule.any or not all(phrase.strip() for phrase in (*rule.any, *rule.none)):
            raise DataError("a phrase rule needs phrases that are not empty", where=where, fix='give it any = ["..."]')
        return rule

    def identity(self) -> dict[str, Any]:
        """What the rule's results depend on, for the stage's key."""
        return {"judge": "substring", "any": list(self.any), "none": list(self.none), "within_words": self.within_words}

    @cached_property
    def _wanted(self) -> re.Pattern[str]:
        return _pattern(self.any)

    @cached_property
    def _unwanted(self) -> re.Pattern[str] | None:
        return _pattern(self.none) if self.none else None

    def hit(self, answer: str) -> str | None:
        """The phrase that made the answer count, or None."""
        text = answer.translate(_APOSTROPHES)
        if self.within_words:
            text = " ".join(text.split()[: self.within_words])
        if self._unwanted is not None and self._unwanted.search(text):
            return None
        found = self._wanted.search(text)
        return found.group(0) if found else None


def _pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    """Whole words only: "know," does not hold "no,". Any run of white space matches any other."""
    parts = [r"\s+".join(re.escape(word) for word in phrase.translate(_APOSTROPHES).split()) for phrase in phrases]
    longest_first = sorted(parts, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)", re.IGNORECASE)
