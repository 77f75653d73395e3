"""Exceptions of fastconv: each is one line that says what is wrong, where, and how to fix it, with an exit code.

The command line prints `str(error)` and exits with `error.exit_code`; nothing else decides exit codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Longest part of an error that is shown, in characters: a server or a file can send any length.
MAX_SHOWN_CHARS = 2000
#: Code units of UTF-16 that stand alone (half an emoji): a str can hold them, UTF-8 and SQLite cannot.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def shown(text: str, max_chars: int = MAX_SHOWN_CHARS) -> str:
    """Text from outside as one line for people: white space joined, what cannot be printed escaped, the length bounded.

    A terminal obeys control characters, so that raw text could clear the screen or set its title.
    """
    line = " ".join(text[: 2 * max_chars].split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    return line if len(line) <= max_chars else f"{line[: max_chars - 1]}…"


def safe_text(text: str, max_chars: int) -> str:
    """Text from outside as it may be stored: valid Unicode without zero bytes (U+FFFD in their place), the length bounded."""
    return _LONE_SURROGATE.sub("\ufffd", text[:max_chars]).replace("\x00", "\ufffd")


class FastconvError(Exception):
    """Base class. `what` is the fault, `where` the file, key or stage, `fix` what the user can do; all as `shown` gives it."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what = what = shown(what)
        self.where = where = shown(where)
        self.fix = shown(fix)
        place = f"{where}: " if where else ""
        advice = f". Fix: {self.fix}" if self.fix else ""
        super().__init__(f"{place}{self.what}{advice}")


class InputError(FastconvError):
    """Input from the user cannot be used: command line, recipe, data or adapter (exit code 2)."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe, or a `--set` on the command line, is not valid."""


class DataError(InputError):
    """A data file or a row in it is not valid. `rows`: the ids of the rows concerned, where there are several."""

    def __init__(self, what: str, *, where: str = "", fix: str = "", rows: tuple[str, ...] = ()) -> None:
        super().__init__(what, where=where, fix=fix)
        self.rows = rows


class AdapterError(InputError):
    """An adapter does not fit the base model."""


class TemplateError(InputError):
    """A tokenizer or its chat template cannot render the rows."""


class GateStop(FastconvError):
    """A gate with verdict `fail` ends the run (exit code 3)."""

    exit_code = 3


class CostStop(GateStop):
    """The cost gate: the estimate is above the recipe's limits and the run was not approved (exit code 3)."""


class ModelError(FastconvError):
    """The base model cannot be downloaded or loaded (exit code 4)."""

    exit_code = 4


class SamplerError(ModelError):
    """The vLLM server that samples cannot be started, or was lost (exit code 4). Finished stages are kept."""


class StoreError(FastconvError):
    """The workspace cannot be read or written: disk full, read-only, damaged (exit code 5)."""

    exit_code = 5


class BusyError(FastconvError):
    """Another live process holds the lease of the stage (exit code 6)."""

    exit_code = 6


class TrainingError(FastconvError):
    """Training or evaluation gave unusable numbers: NaN, or an adapter swap without effect (exit code 7)."""

    exit_code = 7


class JudgeError(FastconvError):
    """The judge cannot be asked: key refused, model unknown, no network, budget spent (exit code 8).

    Completions are kept, so that nothing is sampled again.
    """

    exit_code = 8


class VerifyError(FastconvError):
    """A report does not match its ledger: it was edited, or rows behind it changed or are gone (exit code 9)."""

    exit_code = 9


class ClusterError(FastconvError):
    """Ray is missing or cannot be reached, or its workers were lost repeatedly (exit code 10)."""

    exit_code = 10


class Interrupted(FastconvError):
    """The user stopped the run; finished stages are kept (exit code 130)."""

    exit_code = 130


def stopped(where: str) -> Interrupted:
    """The error for a stop that the user asked for; `where` is the slot, run or part that was reached."""
    return Interrupted("stopped", where=where, fix="the same command goes on from here")


def did_you_mean(given: str, known: Iterable[str], otherwise: str = "") -> str:
    """The fix for an unknown name: the nearest known one; without any near enough `otherwise`, or the known ones."""
    import difflib

    names = list(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.6) or [
        name for name in names if given and name.startswith(given)
    ]
    return f"did you mean {near[0]!r}?" if near else otherwise or f"valid here: {', '.join(sorted(names))}"


#: Exit code -> meaning, for the README and `fastconv --help`; a test compares it with the classes above.
EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "a defect of fastconv itself",
    2: "bad input: command line, recipe, data, adapter",
    3: "a gate said stop",
    4: "the base model cannot be had or loaded",
    5: "the workspace cannot be read or written",
    6: "another process is computing the same stage",
    7: "training or evaluation gave unusable numbers",
    8: "the judge cannot be asked, or its budget is spent",
    9: "a report does not match its ledger",
    10: "Ray is missing or not reached, or loses its workers",
    130: "interrupted; the same command goes on",
}
