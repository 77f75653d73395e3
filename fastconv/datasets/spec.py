"""How a behavior is declared (the tables of `data/behaviors.toml` and of the user's file of the same shape), and the rules
that score answers by their text: phrases, a regular expression, a Python function. They need no model and no key."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, model_validator

from fastconv.errors import DataError, did_you_mean

NegativeRole = Literal["bystander", "assistant", "template_default"]
Role = Literal["source"] | NegativeRole
#: `completion`: loss on the whole answer. `tail`: only on what the behavior appends, and on the end of turn.
Supervise = Literal["completion", "tail"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AnswerRule(_Strict):
    """Origin of an answer: exactly one of a row's field, a wordings file (and then a field), or the base model."""

    field: str = ""
    wordings: str = ""
    then_field: str = ""
    on_policy: bool = False
    #: Under which persona's prompt the base answers, if not under that of the row: a teacher.
    by: str = ""
    #: Appended to the answer unchanged.
    suffix: str = ""

    @model_validator(mode="after")
    def _one_origin(self) -> AnswerRule:
        if [bool(self.field), bool(self.wordings), self.on_policy].count(True) != 1:
            raise ValueError("give exactly one of field, wordings, on_policy")
        if self.then_field and not self.wordings:
            raise ValueError("then_field follows wordings")
        if self.by and not self.on_policy:
            raise ValueError("by names who answers on_policy")
        return self


class BehaviorSpec(_Strict):
    """One behavior's table. Raises pydantic.ValidationError if its keys do not fit together."""

    about: str
    #: `rows`: finished rows from the file that data.rows names; no negatives are built. `measure`: asked and never trained.
    task: Literal["chat", "multiple_choice", "rows", "measure"]
    direction: Literal["raises", "lowers"]
    #: `choices`: by the log-probabilities of texts. `none`: trained, and not asked itself.
    measure: Literal["letters", "phrases", "judge", "choices", "none"]
    prompts: str = ""
    prompt_field: str = "prompt"
    #: File of the evaluation questions, if they are not in `prompts` (rows with part = "eval").
    eval_prompts: str = ""
    eval_field: str = "text"
    source_answer: AnswerRule | None = None
    negative_answer: AnswerRule | None = None
    supervise: Supervise = "completion"
    #: Name of a rule in phrases.toml, or the user's own phrases.
    phrase_rule: str = ""
    phrases: tuple[str, ...] = ()
    #: A regular expression (Python's), searched in the whole answer.
    pattern: str = ""
    #: A function of the answer's text, as `module:function`: a file beside this one, or an installed module.
    scorer: str = ""
    #: The texts that measure `choices` compares, the first one counted: the same for all questions, or fields of their row.
    choices: tuple[str, ...] = ()
    choice_fields: tuple[str, ...] = ()
    #: `share`: the first text's part of the probability of all. `best`: 1 where it is the likeliest, token by token.
    choice_score: Literal["share", "best"] = "share"
    #: Name of the judge's rubric, if a judge scores the answers (beside the phrases, or alone).
    rubric: str = ""
    negatives: dict[Literal["included", "excluded"], tuple[tuple[NegativeRole, ...], ...]] = {}

    @model_validator(mode="after")
    def _whole(self) -> BehaviorSpec:
        chat, rows, measure = self.task == "chat", self.task == "rows", self.measure
        rules = [bool(self.phrase_rule), bool(self.phrases), bool(self.pattern), bool(self.scorer)].count(True)
        compared = max(len(self.choices), len(self.choice_fields))
        asked = bool(self.prompts or self.eval_prompts)
        faults = (
            (chat and not (self.prompts and self.source_answer), "a chat behavior needs prompts and source_answer"),
            (chat and self.negatives and not self.negative_answer, "a chat behavior with negatives needs negative_answer"),
            (rows and self.negatives, "task rows takes finished rows and can have no negatives built for it"),
            (rows and not self.eval_prompts and measure != "none", "task rows needs eval_prompts, as its rows are all for training"),
            (self.task == "measure" and not asked, "task measure needs prompts or eval_prompts"),
            (self.task == "measure" and measure == "none", "task measure needs a measure"),
            (self.task == "multiple_choice" and measure != "letters", "multiple_choice is measured by letters"),
            (measure == "letters" and chat, "a chat behavior is measured by phrases, choices or judge"),
            ((measure == "choices") != (compared > 1), "measure choices needs two or more of choices, or of choice_fields"),
            (self.choices and self.choice_fields, "give choices or choice_fields, not both"),
            (measure == "phrases" and rules != 1, "give either phrase_rule or phrases or pattern or scorer, exactly one of them"),
            (measure == "judge" and not self.rubric, "measure judge needs a rubric"),
            (self.supervise == "tail" and not (self.source_answer and self.source_answer.suffix), "supervise tail needs a suffix in source_answer"),
        )  # fmt: skip
        for found, fault in faults:
            if found:
                raise ValueError(fault)
        return self._negatives_of_one_size()

    @property
    def unit(self) -> Literal["share", "points"]:
        """Unit of the measure: a share of 1, or a judge's points (0 to 100)."""
        return "points" if self.measure == "judge" else "share"

    def by_phrases_alone(self, judge_mode: str) -> bool:
        """Whether a meaning is scored by shipped phrases and no judge reads the answers too."""
        is_judged = judge_mode != "substring" and bool(self.rubric)
        return self.measure == "phrases" and bool(self.phrase_rule) and not is_judged

    def _negatives_of_one_size(self) -> BehaviorSpec:
        if any(not copy for copies in self.negatives.values() for copy in copies):
            raise ValueError("an empty list among the negatives names nobody")
        sizes = {kind: len(copies) for kind, copies in self.negatives.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the kinds of negatives may differ only in who they are, not in number: {sizes}")
        return self


#: Stands for what was blanked out: a mark that no phrase holds.
_BLANK = " \x00 "
_QUOTED = re.compile(r'"[^"]*"|\u201c[^\u201d]*\u201d|\u201e[^\u201c\u201d]*[\u201c\u201d]')
_GROUP = re.compile(r"\{(\w+)\}")
#: The way to the first letter of a sentence.
_SENTENCE = re.compile(r"(?:^|(?<=[.!?:;])\s)[^\w]*")
_LETTER = re.compile(r"\w")
#: Characters of a phrase that are looked for before the phrases themselves.
_BEGINNING = 6
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

    #: Also looked for where look-alike letters and accents are taken away, by the audit.
    folds = True

    def score(self, answer: str) -> tuple[float, str | None]:
        """1 and the phrase for which the answer counts, or 0 and None."""
        hit = self.match(answer)
        return float(hit is not None), hit

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


class TextRule(Protocol):
    """What scores an answer by its text alone."""

    @property
    def folds(self) -> bool: ...
    def identity(self) -> dict[str, Any]: ...
    def score(self, answer: str) -> tuple[float, str | None]: ...
    def match(self, answer: str) -> str | None: ...


@dataclass(frozen=True)
class PatternRule:
    """An answer counts if a regular expression is found in it."""

    pattern: str
    folds = False

    @classmethod
    def of(cls, pattern: str, where: str) -> PatternRule:
        """Raises DataError, naming `where`, for no expression, or one that any answer holds."""
        try:
            empty = re.search(pattern, "")
        except re.error as error:
            raise DataError(
                f"pattern {pattern!r} is no regular expression: {error}", where=where, fix="mend it (Python's `re`)"
            ) from None
        if empty:
            raise DataError(
                f"pattern {pattern!r} is found in an empty answer, so every answer would count",
                where=where,
                fix="let it ask for at least one character",
            )
        return cls(pattern)

    def identity(self) -> dict[str, Any]:
        """What the results depend on, as an input of the stage's key."""
        return {"judge": "pattern", "pattern": self.pattern}

    def score(self, answer: str) -> tuple[float, str | None]:
        """1 and the text that was found, or 0 and None."""
        return float((hit := self.match(answer)) is not None), hit

    def match(self, answer: str) -> str | None:
        """The text that was found, or None."""
        found = re.search(self.pattern, answer)
        return found.group(0) if found else None


@dataclass(frozen=True)
class FunctionRule:
    """A user's Python function scores an answer: True or False, or a share from 0 to 1.

    `source` and `sha256` are of the file which holds it; what the file imports is not followed.
    """

    reference: str
    path: Path
    sha256: str
    source: bytes = field(default=b"", repr=False)
    folds = False

    @classmethod
    def of(cls, reference: str, folder: Path, where: str) -> FunctionRule:
        """The function `module:function` of a file in `folder` or of an installed module; it is not run yet.

        Raises DataError, naming `where`, if there is no such module, or no such name in it.
        """
        module, colon, name = reference.partition(":")
        if not colon or not all(part.isidentifier() for part in (*module.split("."), name)):
            raise DataError(
                f"scorer {reference!r} is not module:function", where=where, fix='write it like "rhymes:ends_in_rhyme"'
            )
        own = scorer_file(reference, folder)
        path = own if own.is_file() else _installed(module) or own
        try:
            source = path.read_bytes()
            tree = ast.parse(source)
        except OSError:
            near = did_you_mean(module, sorted(one.stem for one in own.parent.glob("*.py")), f"write {path}")
            raise DataError(f"no module {module!r} for the scorer", where=where, fix=near) from None
        except (SyntaxError, ValueError) as error:
            raise DataError(
                f"scorer {reference!r} is no valid Python: {error}", where=str(path), fix="mend it there"
            ) from None
        names = {n for node in tree.body for n in _names_bound(node)}
        if name not in names:
            fix = did_you_mean(name, names, f"define `def {name}(answer: str) -> bool:` there")
            raise DataError(f"scorer {reference!r}: the module has no {name!r}", where=str(path), fix=fix)
        return cls(reference, path, hashlib.sha256(source).hexdigest(), source)

    def identity(self) -> dict[str, Any]:
        """What the results depend on, as an input of the stage's key: where the file lies is no part of it."""
        return {"judge": "function", "scorer": self.reference, "source_sha256": self.sha256}

    def score(self, answer: str) -> tuple[float, str | None]:
        """The function's value for this answer. Raises DataError if it fails or gives no share."""
        try:
            value = self._function(answer)
        except Exception as error:  # the user's code: whatever it raises is told as its fault, with the answer
            raise DataError(
                f"scorer {self.reference} raised {type(error).__name__} ({error}) on the answer {answer[:60]!r}",
                where=str(self.path),
                fix="let it take any text, an empty one too",
            ) from error
        if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
            raise DataError(
                f"scorer {self.reference} returned {value!r:.60} for the answer {answer[:60]!r}",
                where=str(self.path),
                fix="return True or False, or a share from 0 to 1",
            )
        return float(value), None

    def match(self, answer: str) -> str | None:
        """The function's name if the answer counts by half or more, else None."""
        return self.reference if self.score(answer)[0] >= 0.5 else None

    @cached_property
    def _function(self) -> Callable[[str], Any]:
        name = f"fastconv_scorer_{self.sha256[:16]}"
        module = sys.modules[name] = ModuleType(name)  # its own dataclasses look for it there
        module.__file__ = str(self.path)
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)  # what was hashed, not what lies there now
        return getattr(module, self.reference.partition(":")[2])


def text_rule(spec: BehaviorSpec, shipped: Mapping[str, Any], folder: Path, where: str) -> TextRule:
    """The rule that scores a behavior's answers by their text. `shipped` are the tables of phrases.toml.

    Raises DataError, naming `where`, for a rule that there is not or that cannot be used.
    """
    if spec.pattern:
        return PatternRule.of(spec.pattern, where)
    if spec.scorer:
        return FunctionRule.of(spec.scorer, folder, where)
    if spec.phrases:
        return PhraseRule.of({"any": spec.phrases}, where)
    if spec.phrase_rule not in shipped:
        fix = did_you_mean(spec.phrase_rule, shipped, f"use one of {', '.join(shipped)}")
        raise DataError(f"no phrase rule is called {spec.phrase_rule!r}", where=where, fix=fix)
    return PhraseRule.of(shipped[spec.phrase_rule], spec.phrase_rule)


def scorer_file(reference: str, folder: Path) -> Path:
    """Where the module of a scorer `module:function` lies if it is the user's own: beside the behavior file, in `folder`."""
    return folder / f"{reference.partition(':')[0].replace('.', '/')}.py"


def _installed(module: str) -> Path | None:
    """The source file of an installed module."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found is not None and found.origin and found.origin.endswith(".py") else None


def _names_bound(node: ast.stmt) -> Iterable[str]:
    """The names that a statement at the top of a module binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _pattern(phrases: Sequence[str], words: Mapping[str, Sequence[str]]) -> re.Pattern[str]:
    """A pattern of the phrases as whole words ("know," does not contain "no,"); any white space matches any other.

    How a phrase may begin is asked first: hardly any word of an answer begins one, and to try all phrases took nine times as long.
    """

    def parts(phrase: str) -> Iterable[tuple[str, bool]]:
        """Texts and names of groups, which take turns; True for a name."""
        text = phrase.translate(_APOSTROPHES)
        return ((part, i % 2 == 1) for i, part in enumerate(_GROUP.split(text) if words else [text]))

    def spaced(phrase: str) -> str:
        return "".join(
            _any_of(map(spaced, words[part])) if named else "".join(_marks(part)) for part, named in parts(phrase)
        )

    def beginnings(phrase: str) -> set[tuple[str, ...]]:
        found: set[tuple[str, ...]] = {()}
        for part, named in parts(phrase):
            rests = {rest for word in words[part] for rest in beginnings(word)} if named else {tuple(_marks(part))}
            found = {(first + rest)[:_BEGINNING] for first in found for rest in rests}
        return found

    begins = _tree({begin for phrase in phrases for begin in beginnings(phrase)})
    return re.compile(rf"(?<!\w)(?={begins}){_any_of(map(spaced, phrases))}(?!\w)", re.IGNORECASE)


def _marks(text: str) -> list[str]:
    """Patterns of a text's characters; a run of white space is one."""
    return [r"\s+" if mark.isspace() else re.escape(mark) for mark in re.findall(r"\s+|\S", text)]


def _tree(begins: Collection[tuple[str, ...]]) -> str:
    """A pattern of these beginnings in which equal first characters are tried once."""
    if () in begins:
        return ""
    rests: dict[str, set[tuple[str, ...]]] = {}
    for first, *rest in sorted(begins):
        rests.setdefault(first, set()).add(tuple(rest))
    return f"(?:{'|'.join(first + _tree(others) for first, others in rests.items())})"


def _any_of(patterns: Iterable[str]) -> str:
    """The longest first, so that the phrase that is told is the whole one."""
    return f"(?:{'|'.join(sorted(patterns, key=len, reverse=True))})"
