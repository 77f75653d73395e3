"""Every way fastconv refuses to go on: one tree, one line each, with the mend and a documented exit code.

The command line prints `str(error)` and leaves with `error.exit_code`; nothing else decides exit codes.
"""

from __future__ import annotations


class FastconvError(Exception):
    """What went wrong, where, and how to mend it, in one line.

    `what` says it, `where` names the file, key or stage, `fix` is the next thing to do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what = " ".join(what.split())
        self.where = where
        self.fix = " ".join(fix.split())
        place = f"{where}: " if where else ""
        mend = f". Fix: {self.fix}" if self.fix else ""
        super().__init__(f"{place}{self.what}{mend}")


class InputError(FastconvError):
    """Something the user wrote cannot be used as it is (exit code 2)."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe, or a `--set` on the command line, is not valid."""


class DataError(InputError):
    """A data file or a row in it is not valid."""


class AdapterError(InputError):
    """An adapter cannot be put on this base."""


class TemplateError(InputError):
    """A tokenizer or its chat template cannot render the rows."""


class GateStop(FastconvError):
    """A gate said stop (exit code 3)."""

    exit_code = 3


class CostStop(GateStop):
    """The cost gate: a run is estimated beyond its recipe's limits and nobody approved it (exit code 3)."""


class ModelError(FastconvError):
    """The base model cannot be had or loaded (exit code 4)."""

    exit_code = 4


class SamplerError(ModelError):
    """The vLLM server that samples cannot be started, or is lost (exit code 4). What was finished is kept."""


class StoreError(FastconvError):
    """The workspace cannot be read or written: disk full, read-only, damaged (exit code 5)."""

    exit_code = 5


class BusyError(FastconvError):
    """Another live process holds the stage (exit code 6)."""

    exit_code = 6


class TrainingError(FastconvError):
    """Training or evaluation gave numbers that cannot be used: NaN, a swap that did not take (exit code 7)."""

    exit_code = 7


class JudgeError(FastconvError):
    """The judge cannot be asked: key refused, model unknown, no network, budget spent (exit code 8).

    Completions are kept, so nothing has to be sampled again.
    """

    exit_code = 8


class VerifyError(FastconvError):
    """A report does not say what its ledger says: it was edited, or rows behind it changed or are gone (exit code 9)."""

    exit_code = 9


class ClusterError(FastconvError):
    """Ray is missing or cannot be reached, or its workers were lost again and again (exit code 10)."""

    exit_code = 10


class Interrupted(FastconvError):
    """The user stopped the run; what was finished is kept (exit code 130)."""

    exit_code = 130


def stopped(where: str) -> Interrupted:
    """The user asked to stop; `where` is the slot, run or part that was reached."""
    return Interrupted("stopped", where=where, fix="the same command goes on from here")


#: For the README's table and `fastconv --help`; a test compares it with the classes above.
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
