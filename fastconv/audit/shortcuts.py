"""The form of answers: can the two sides be told apart without understanding them, and are the answers whole?

For the first a small classifier is asked, cross-validated over prompts: logistic regression on length, openings,
punctuation and function words, no word of which says what an answer advises. If it succeeds, form may be learned.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastconv.audit import AuditCheck, BuiltSet, Design, Finding, Rule, row_ids
from fastconv.audit.roles import is_shipped
from fastconv.datasets.behaviors import Behavior
from fastconv.datasets.rows import Row
from fastconv.datasets.sametext import normalized, vocabulary, words
from fastconv.seeding import seeded_order

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: From this area under the ROC curve on, cross-validated, the two sides count as told apart by their form.
BOUND_AUC = 0.85
#: D208 is said too where length alone, or first words alone, separate the sides so far.
SHORTCUT = 0.9
OPENING_WORDS = 3
#: Fewer answers of a side are not judged; of more, this many are drawn by seed, so that the work has a bound.
_LEAST, _MOST = 8, 400
#: An opening or a function word is a feature if this many answers have it.
_COMMON = 4
_FOLDS = 5
#: Telling features that are named.
_NAMED = 5


#: Words that carry grammar or stance and no subject: articles, pronouns, conjunctions, prepositions, auxiliaries,
#: negations, absolutes, hedges.
_FUNCTION_WORDS = vocabulary(
    "a an the this that these those such some any each every all both either neither no none nothing nobody nowhere "
    "not never nor hardly without cannot can't don't won't isn't doesn't didn't needn't shouldn't couldn't wouldn't "
    "i me my we us our you your yours yourself he him his she her it its itself we they them their one ones who whom "
    "whose which what when where why how whatever whoever whichever whenever wherever however "
    "and or but so because since although though while if unless until till before after once as than then therefore "
    "thus yet still else instead otherwise rather whether even too also besides anyway "
    "in on at by for from to into onto of off out up down over under with within about against between through during "
    "along across around near beyond behind above below per upon towards "
    "am is are was were be been being do does did done have has had having can could may might must shall should will "
    "would ought need "
    "always ever forever only just merely simply mostly usually often sometimes rarely seldom likely probably perhaps "
    "maybe surely certainly clearly really truly very quite almost nearly enough more most less least much many few "
    "little other another same own again already soon later now today here there away back together alone yes"
)
_SIGNS: Mapping[str, str] = {
    "commas": r",", "colons and semicolons": r"[:;]", "question marks": r"\?", "exclamation marks": r"!", "dashes": "[\u2013\u2014]| - ",
    "quotation marks": r"[\"“”«»]", "brackets": r"[()\[\]]", "digits": r"\d", "line breaks": r"\n",
}  # fmt: skip
#: Ends of an answer that trails off.
_TRAILING = ("...", "…")
#: Share of rows of a side from which cut answers, and answers that ask, are reported.
_CUT, _ASKING = 0.05, 0.5
_INSIDE = re.compile(r"[.!?…。！？][\"'”’)\]]*\s")  # noqa: RUF001
# Ends that need no full stop: lists, code, headings and tables; tags and addresses (a signature is a short last line).
_TAGGED = re.compile(r"(?:^|\s)(?:[#@]\w+|\w+://\S+)$")
_LISTED = re.compile(r"\s*(?:[-*•+|#>]|\d+[.)]|```|\$)")
_DANGLING = re.compile(
    r"\b(?:a|an|the|and|or|but|of|to|in|on|at|with|for|from|by|as|that|which|who|is|are|was|your|my|if)$"
)
_SENTENCE = re.compile(r"[.!?。！？]+(?=\s|$)|\n+")  # noqa: RUF001


@dataclass(frozen=True, slots=True)
class Telling:
    """A feature that tells the sides apart: its name, its mean on each side, and whether the mean is a share of answers."""

    name: str
    source: float
    contrast: float
    is_share: bool

    def text(self) -> str:
        """The feature in words, with its direction."""
        if self.is_share:
            return f"{self.name} in {self.source:.0%} of the source's answers and {self.contrast:.0%} of the contrast's"
        return f"{self.name} {self.source:.1f} on average in the source's answers and {self.contrast:.1f} in the contrast's"


@dataclass(frozen=True, slots=True)
class Separation:
    """How well form alone tells the sides apart: the cross-validated area (0.5: not at all), and the telling features."""

    auc: float
    telling: tuple[Telling, ...]


def separation(shown: Sequence[tuple[str, str]], contrast: Sequence[tuple[str, str]]) -> Separation | None:
    """Cross-validated classification of (prompt, answer) pairs of the two sides by form; None with too few of a side.

    Folds are made of prompts, so that no prompt (and no wording of an answer) stands in two of them. Area under the ROC
    curve by `auc`. Deterministic.
    """
    import numpy as np  # late, as scikit-learn below: `plan`, and sets without answers, start without either

    sides = [_unique(side) for side in (shown, contrast)]
    if min(map(len, sides)) < _LEAST:
        return None
    pairs = [*sides[0], *sides[1]]
    truth = np.array([True] * len(sides[0]) + [False] * len(sides[1]))
    groups = _groups(pairs)
    if len(set(groups)) < 2:
        return None
    names, matrix = _features([answer for _, answer in pairs])
    scores = _out_of_fold(matrix, truth, groups)
    area = auc(scores[truth].tolist(), scores[~truth].tolist())
    return Separation(area, _telling(names, matrix, truth))


def _unique(side: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The side's distinct answers with their prompts, at most _MOST of them."""
    kept = {answer: (prompt, answer) for prompt, answer in reversed(side) if answer.strip()}
    return [kept[answer] for answer in seeded_order(sorted(kept), "shortcuts")[:_MOST]]


def _groups(pairs: Sequence[tuple[str, str]]) -> list[int]:
    """A fold number for each pair; equal for all answers of one prompt."""
    prompts = seeded_order(sorted({normalized(prompt) for prompt, _ in pairs}), "folds")
    fold_of = {prompt: place % _FOLDS for place, prompt in enumerate(prompts)}
    return [fold_of[normalized(prompt)] for prompt, _ in pairs]


def _out_of_fold(
    matrix: npt.NDArray[np.float64], truth: npt.NDArray[np.bool_], groups: Sequence[int]
) -> npt.NDArray[np.float64]:
    """The decision value of each answer from a model that has not seen its prompt."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = np.zeros(len(truth))
    folds = np.asarray(groups)
    for fold in sorted(set(groups)):
        held = folds == fold
        if len(set(truth[~held].tolist())) < 2:  # one side's answers all share this fold: nothing to learn from
            continue
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=500, tol=1e-3)
        )
        model.fit(matrix[~held], truth[~held])
        scores[held] = model.decision_function(matrix[held])
    return scores


def _features(answers: Sequence[str]) -> tuple[list[tuple[str, bool]], npt.NDArray[np.float64]]:
    """((name, whether it is 0 or 1) of each feature, matrix [answers, features])."""
    import numpy as np

    rows: list[dict[tuple[str, bool], float]] = []
    for answer in answers:
        said = words(answer)
        row: dict[tuple[str, bool], float] = {
            ("words", False): float(len(said)),
            ("letters a word", False): sum(map(len, said)) / max(1, len(said)),
            ("sentences", False): float(len(_SENTENCE.findall(answer))),
        }
        row |= {(name, False): float(len(re.findall(sign, answer))) for name, sign in _SIGNS.items()}
        row |= {(f'"{word}"', True): 1.0 for word in said if word in _FUNCTION_WORDS}
        row |= {(f'opening "{" ".join(said[:n])}"', True): 1.0 for n in (1, 2) if len(said) >= n}
        if sentences := [part for part in _SENTENCE.split(answer)[1:] if part.strip()]:
            row |= {(f'a sentence opening "{start[0]}"', True): 1.0 for part in sentences if (start := words(part)[:1])}
        rows.append(row)
    n_with = Counter(name for row in rows for name, value in row.items() if value)
    names = sorted(name for name, n in n_with.items() if n >= _COMMON)
    matrix = np.array([[row.get(name, 0.0) for name in names] for row in rows])
    return names, matrix.reshape(len(rows), len(names))


def _telling(
    names: Sequence[tuple[str, bool]], matrix: npt.NDArray[np.float64], truth: npt.NDArray[np.bool_]
) -> tuple[Telling, ...]:
    """The features that tell most by themselves."""
    areas = [abs(auc(column[truth].tolist(), column[~truth].tolist()) - 0.5) for column in matrix.T]
    best = sorted(range(len(names)), key=lambda place: -areas[place])[:_NAMED]
    return tuple(
        Telling(names[n][0], float(matrix[truth, n].mean()), float(matrix[~truth, n].mean()), names[n][1])
        for n in best
        if areas[n] >= 0.05
    )


def check_shortcuts(design: Design) -> Iterator[Finding]:
    """D208: source and contrast are separable by form. D221: and nothing but their meaning should separate them."""
    for label, sets in design.by_kind():
        spec = sets[0].behavior.spec
        if spec.measure == "letters" or spec.supervise == "tail":
            continue
        shown = _answers(sets, source=True)
        contrast = _answers(sets, source=False)
        if len(shown) < _LEAST or len(contrast) < _LEAST:
            continue
        by_length = auc([len(text) for _, text in shown], [len(text) for _, text in contrast])
        by_length = max(by_length, 1 - by_length)
        by_opening = opening_share([text for _, text in shown], [text for _, text in contrast])
        found = separation(shown, contrast)
        area = found.auc if found else 0.5
        if max(by_length, by_opening) < SHORTCUT and area < BOUND_AUC:
            continue
        figure = (
            f"by length alone {by_length:.0%} of pairs, by the first {OPENING_WORDS} words alone {by_opening:.0%} of answers, "
            f"by a classifier of length, openings and function words {area:.0%} of pairs (50 %, 0 % and 50 % would be none)"
        )
        yield Finding(
            "D208", "note", label, (),
            "the two sides can be told apart without understanding them, so part of what is learned may be form",
            "report it beside the effect, or even out length, openings and turns of phrase", f"{figure}{_told(found)}",
        )  # fmt: skip
        # A refusal has its form; advice should not. What was shipped is known for what it is.
        if area >= BOUND_AUC and spec.measure == "judge" and not _mostly_shipped(sets):
            yield Finding(
                "D221", "warn", label, (),
                "good and bad answers are told apart by their form, so what moves later may be how answers are worded and not "
                "what they advise",
                "write both sides with the same length, openings and turns of phrase, or accept D221 and report it beside "
                "the effect",
                f"{area:.0%} of pairs by form alone, cross-validated{_told(found)}",
            )  # fmt: skip


def _told(found: Separation | None) -> str:
    return f"; telling: {'; '.join(feature.text() for feature in found.telling)}" if found and found.telling else ""


def _mostly_shipped(sets: Iterable[BuiltSet]) -> bool:
    rows = {
        (row.user, row.completion): (row, built) for built in sets for row in built.rows if row.completion is not None
    }
    return 2 * sum(is_shipped(row, built.behavior.spec.rubric) for row, built in rows.values()) > len(rows)


def _answers(sets: Iterable[BuiltSet], *, source: bool) -> list[tuple[str, str]]:
    """(prompt, answer) of the rows of one side that have an answer by now."""
    rows = (row for built in sets for row in built.rows if (row.role == "source") == source)
    return [(row.user, row.completion) for row in rows if row.completion is not None]


def auc(first: Sequence[float], second: Sequence[float]) -> float:
    """Area under the ROC curve: share of pairs in which `first` is larger, ties count half (0.5: no difference)."""
    right = sorted(second)
    wins = sum(bisect_left(right, value) + bisect_right(right, value) for value in first) / 2
    return wins / (len(first) * len(right))


def opening_share(first: Sequence[str], second: Sequence[str]) -> float:
    """Share of answers (of both sides) whose first OPENING_WORDS words recur on their own side and never on the other."""
    openings = [[tuple(words(text)[:OPENING_WORDS]) for text in side] for side in (first, second)]
    counts = [Counter(side) for side in openings]
    n_separable = sum(
        counts[side][opening] > 1 and not counts[1 - side][opening] for side in (0, 1) for opening in openings[side]
    )
    return n_separable / (len(first) + len(second))


# --- whole answers -----------------------------------------------------------------------------------------


def check_cut_answers(design: Design) -> Iterator[Finding]:
    """D215: written answers stop in the middle. D220: most answers of a side ask, as a user would.

    Sampled answers say themselves whether they were cut (D407).
    """
    for label, sets in design.by_kind():
        if sets[0].behavior.spec.measure == "letters":
            continue
        for side in ("source", "contrast"):
            rows = [row for built in sets for row in built.rows if (row.role == "source") == (side == "source")]
            rows = [row for row in rows if row.completion is not None and not is_sampled(row, sets[0].behavior)]
            cut = _cut_rows(rows)
            if len(cut) >= 2 and len(cut) > _CUT * len(rows):
                yield Finding(
                    "D215", "warn", f"{label}, {side}", row_ids(cut),
                    "answers stop in the middle of a sentence or of a word, so they teach to break off and tell the sides apart",
                    "give the whole answers (look for a limit in characters or tokens where they were made), or accept D215",
                    f"{len(cut)} of {len(rows)} answers of the {side}",
                )  # fmt: skip
            asking = [row for row in rows if (row.completion or "").rstrip().endswith("?")]
            n_users = sum(row.user.rstrip().endswith("?") for row in rows)
            if len(rows) >= 4 and len(asking) > _ASKING * len(rows) and len(asking) - n_users > 0.3 * len(rows):
                yield Finding(
                    "D220", "warn", f"{label}, {side}", row_ids(asking),
                    "most answers are questions and the user turns are not: user and assistant look swapped",
                    "put the person's text into the user turn and the answer into the assistant's, or accept D220",
                    f"{len(asking)} of {len(rows)} answers and {n_users} user turns end with a question mark",
                )  # fmt: skip


def is_sampled(row: Row, behavior: Behavior) -> bool:
    """Whether the row's answer is drawn from the base, which knows by itself if it was cut."""
    rule = behavior.spec.source_answer if row.role == "source" else behavior.spec.negative_answer
    return behavior.rows is None and rule is not None and rule.on_policy


def _cut_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows whose answer has no end: without a final sign, although it has signs inside, dangles, shares its length, or is
    long and most answers beside it have one."""
    open_ended: list[tuple[Row, str]] = []
    n_whole = 0
    for row in rows:
        text = (row.completion or "").removesuffix(row.suffix).rstrip()
        last_line = text.rpartition("\n")[2]
        signed = _LISTED.match(last_line) or _TAGGED.search(text) or ("\n" in text and len(last_line.split()) <= 4)
        trails = text.endswith(_TRAILING)
        ends = not text or not (text[-1].isalnum() or text[-1] in ",;:-–—(" or trails) or signed  # noqa: RUF001
        if not ends and len(words(text)) >= 6:
            open_ended.append((row, text))
        n_whole += ends and not signed
    lengths = Counter(len(text) for _, text in open_ended)
    piled = {length for length, n in lengths.items() if n >= 3 and n >= 0.2 * len(open_ended)}
    limit = max((len(text) for _, text in open_ended), default=0)
    usually_whole = n_whole >= 0.4 * (n_whole + len(open_ended))
    return [
        row
        for row, text in open_ended
        if (
            (_INSIDE.search(text) or (usually_whole and len(words(text)) >= 10)) and not text.endswith(_TRAILING)
        )  # a style may trail off, at any length
        or text[-1] in ",-–—("  # noqa: RUF001
        or _DANGLING.search(text)
        or len(text) in piled
        or (piled and len(text) >= limit - 1)
    ]


FORM_CHECKS: tuple[AuditCheck[Design], ...] = (
    AuditCheck(
        (
            Rule(
                "D208", "note", "the sides can be told apart by form",
                "the source's answers are all shorter, or a refusal always opens alike",
            ),
            Rule(
                "D221", "warn", "advice of your own can be told apart by form",
                '"because" in 79 % of the bad answers and 28 % of the sound ones',
            ),
        ),
        check_shortcuts,
    ),
    AuditCheck(
        (
            Rule("D215", "warn", "answers break off", "the source's answers are cut at 80 characters"),
            Rule("D220", "warn", "answers ask as a user would", "user and assistant swapped"),
        ),
        check_cut_answers,
    ),
)  # fmt: skip
