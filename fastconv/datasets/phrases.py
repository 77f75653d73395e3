"""Phrase rules: scoring answers by literal phrases. They need no model and no key, and do not see meaning.

The score stages and the audit use them.
"""

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
    """An answer counts if its first `within_words` words (0: all) contain a phrase of `any` and none of `none`."""

    any: tuple[str, ...]
    none: tuple[str, ...] = ()
    within_words: int = 0

    @classmethod
    def of(cls, table: Mapping[str, Any], where: str) -> PhraseRule:
        """A rule from its TOML table. Raises DataError, naming `where`, if it has no phrase or an empty one."""
        rule = cls(tuple(table.get("any", ())), tuple(table.get("none", ())), int(table.get("within_words", 0)))
        if not rule.any or not all(phrase.strip() for phrase in (*rule.any, *rule.none)):
            raise DataError("a phrase rule needs phrases that are not empty", where=where, fix='give it any = ["..."]')
        return rule

    def identity(self) -> dict[str, Any]:
        """Everything that the rule's results depend on, as an input of the stage's key."""
        return {"judge": "substring", "any": list(self.any), "none": list(self.none), "within_words": self.within_words}

    @cached_property
    def _any_pattern(self) -> re.Pattern[str]:
        return _pattern(self.any)

    @cached_property
    def _none_pattern(self) -> re.Pattern[str] | None:
        return _pattern(self.none) if self.none else None

    def match(self, answer: str) -> str | None:
        """The phrase for which the answer counts, as written in it, or None."""
        text = answer.translate(_APOSTROPHES)
        if self.within_words:
            text = " ".join(text.split()[: self.within_words])
        if self._none_pattern is not None and self._none_pattern.search(text):
            return None
        hit = self._any_pattern.search(text)
        return hit.group(0) if hit else None


def _pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    """A pattern of the phrases as whole words ("know," does not contain "no,"); any white space matches any other."""
    parts = [r"\s+".join(re.escape(word) for word in phrase.translate(_APOSTROPHES).split()) for phrase in phrases]
    longest_first = sorted(parts, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)", re.IGNORECASE)
