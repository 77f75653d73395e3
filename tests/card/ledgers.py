"""Reading ledgers, also of runs that are under way or were killed, and comparing two of them stage by stage."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Kinds whose outputs are timings, which no two runs share.
_TIMED = ("grouping",)
#: Most stages that a comparison names.
_NAMED = 25


@dataclass(frozen=True)
class StageRow:
    """A finished stage: its record, its samples as (row, sample, completion, ended), its scores as (row, sample, metric, value,
    detail)."""

    key: str
    kind: str
    slot: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    facts: Mapping[str, Any]
    seconds: float
    finished_at: float
    samples: tuple[tuple[Any, ...], ...] = ()
    scores: tuple[tuple[Any, ...], ...] = ()

    @property
    def began_at(self) -> float:
        """When it began, by its own seconds."""
        return self.finished_at - self.seconds

    @property
    def n_adapters(self) -> int:
        """Adapters of the stack that it stands on."""
        return sum(name in self.inputs.get("needs", {}) for name in ("snapshot", "behavior"))

    @property
    def work(self) -> str:
        """Its kind; evaluations are told apart by what they do."""
        if self.kind != "eval":
            return self.kind
        return "completions" if "sampled_tok" in self.facts else "letters"


@dataclass(frozen=True)
class Ledger:
    """What a ledger holds: stages by slot in the order that they were finished, words of the gates, facts of its newest run."""

    stages: Mapping[str, StageRow] = field(default_factory=dict)
    gates: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    began_at: float = 0.0
    finished_at: float | None = None

    def slot_of(self, key: str) -> str:
        """The slot of the stage with this key; the key itself if it is not here."""
        return next((slot for slot, stage in self.stages.items() if stage.key == key), key)


@dataclass(frozen=True)
class Lease:
    """A stage that a process holds, and how much of it is done."""

    slot: str
    pid: int
    done: float
    total: float

    @property
    def share(self) -> float:
        """Share that is done."""
        return self.done / self.total if self.total else 0.0


@contextlib.contextmanager
def _opened(path: Path) -> Any:
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0)
    db.row_factory = sqlite3.Row
    try:
        yield db
    finally:
        db.close()


def read_ledger(path: Path) -> Ledger:
    """Read `ledger.sqlite` whole; an empty `Ledger` if there is none yet."""
    if not path.is_file():
        return Ledger()
    with _opened(path) as db:
        try:
            return _read(db)
        except sqlite3.OperationalError:  # its tables are being made
            return Ledger()


def _read(db: sqlite3.Connection) -> Ledger:
    samples: dict[str, list[tuple[Any, ...]]] = {}
    for row in db.execute("SELECT stage, row, sample, completion, ended FROM samples ORDER BY stage, row, sample"):
        samples.setdefault(row["stage"], []).append(tuple(row)[1:])
    scores: dict[str, list[tuple[Any, ...]]] = {}
    for row in db.execute("SELECT stage, row, sample, metric, value, detail FROM scores ORDER BY 1, 2, 3, 4"):
        scores.setdefault(row["stage"], []).append((*tuple(row)[1:5], json.loads(row["detail"])))
    stages = {}
    for row in db.execute("SELECT * FROM stages ORDER BY finished_at, rowid"):
        stages[row["slot"]] = StageRow(
            row["key"], row["kind"], row["slot"], json.loads(row["inputs"]), json.loads(row["outputs"]),
            json.loads(row["facts"]), row["seconds"], row["finished_at"], tuple(samples.get(row["key"], ())), tuple(scores.get(row["key"], ())),
        )  # fmt: skip
    run = db.execute("SELECT * FROM runs ORDER BY started_at DESC, rowid DESC LIMIT 1").fetchone()
    if run is None:
        return Ledger(stages)
    gates = db.execute("SELECT gate, subject, verdict FROM verdicts WHERE run=? ORDER BY gate, subject", (run["id"],))
    words = {f"{gate} {subject}": verdict for gate, subject, verdict in gates}
    return Ledger(stages, words, json.loads(run["facts"]), run["started_at"], run["finished_at"])


def leases(path: Path) -> list[Lease]:
    """The leases of a ledger that a process may be making right now; those of dead processes stand among them."""
    if not path.is_file():
        return []
    with contextlib.suppress(sqlite3.Error), _opened(path) as db:
        found = [(row["slot"], row["pid"], json.loads(row["note"])) for row in db.execute("SELECT * FROM leases")]
        return [Lease(slot, pid, note.get("done", 0), note.get("total", 0)) for slot, pid, note in found]
    return []


def copy_ledger(source: Path, target: Path) -> bool:
    """Copy a ledger without its artefacts, also while it is written; False if there is none yet."""
    if not source.is_file():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}")
    beside.unlink(missing_ok=True)
    with contextlib.suppress(sqlite3.Error), _opened(source) as db, contextlib.closing(sqlite3.connect(beside)) as copy:
        db.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")
        copy.commit()
    if not beside.is_file():
        return False
    beside.replace(target)
    return True


class KeptLedger:
    """Copies a ledger to where results are kept, at most every `every_s` seconds."""

    def __init__(self, source: Path, target: Path, every_s: float = 20.0) -> None:
        self._source, self._target, self._every_s = source, target, every_s
        self._last = time.monotonic()

    def now_and_then(self) -> bool:
        """Copy if it is time; whether it was."""
        if time.monotonic() - self._last < self._every_s:
            return False
        self._last = time.monotonic()
        return copy_ledger(self._source, self._target)


# --- comparing -------------------------------------------------------------------------------------------------------


def _plain(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs beside the adapter and its losses."""
    return {name: value for name, value in outputs.items() if name not in ("adapter", "weights_sha256", "losses")}


def difference(first: StageRow, second: StageRow) -> dict[str, Any]:
    """In what two results of one slot differ; empty if they are the same to the last bit that is kept."""
    found: dict[str, Any] = {}
    if first.samples != second.samples:
        other = {sample[:2]: sample for sample in second.samples}
        n = sum(other.get(sample[:2]) != sample for sample in first.samples)
        found["samples"] = {"of": len(first.samples), "different": n}
    if first.scores != second.scores:
        other = {score[:3]: score for score in second.scores}
        n = sum(other.get(score[:3]) != score for score in first.scores)
        found["scores"] = {"of": len(first.scores), "different": n}
    if first.outputs.get("weights_sha256", first.outputs.get("adapter")) != second.outputs.get(
        "weights_sha256", second.outputs.get("adapter")
    ):
        losses = zip(first.outputs.get("losses", ()), second.outputs.get("losses", ()), strict=False)
        found["adapter"] = {"first_step": next((step for step, (a, b) in enumerate(losses) if a != b), None)}
    elif (before := _plain(first.outputs)) != (now := _plain(second.outputs)):
        found["outputs"] = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return found


def compare(first: Ledger, second: Ledger) -> dict[str, Any]:
    """Two ledgers of one grid, by slot: how many stages are equal, which are not, and where they part.

    `roots` are the stages that differ although all that they need is equal: what follows from them differs by itself.
    """
    common = [slot for slot, stage in first.stages.items() if slot in second.stages and stage.kind not in _TIMED]
    different = {slot: found for slot in common if (found := difference(first.stages[slot], second.stages[slot]))}
    by_kind: dict[str, dict[str, int]] = {}
    for slot in common:
        counts = by_kind.setdefault(first.stages[slot].work, {"equal": 0, "different": 0})
        counts["different" if slot in different else "equal"] += 1

    def is_root(slot: str) -> bool:
        needs = first.stages[slot].inputs.get("needs", {}).values()
        return not any(first.slot_of(key) in different for key in needs)

    roots = {slot: found for slot, found in different.items() if is_root(slot)}
    return {
        "stages": len(common), "equal": len(common) - len(different), "different": len(different),
        "missing_here": sum(slot not in second.stages for slot in first.stages),
        "missing_there": sum(slot not in first.stages for slot in second.stages),
        "by_kind": by_kind,
        "first_different": next(iter(different), None),
        "roots": dict(list(roots.items())[:_NAMED]), "n_roots": len(roots),
        "differences": dict(list(different.items())[:_NAMED]),
        "same_keys": sum(first.stages[slot].key == second.stages[slot].key for slot in common),
        "letters": compare_letters(first, second),
        "gates": compare_words(first.gates, second.gates),
    }  # fmt: skip


def compare_letters(first: Ledger, second: Ledger) -> dict[str, Any]:
    """Multiple choice of both, all together and by slot: the same letter, right or wrong alike, the largest difference of
    log-probabilities."""
    by_slot: dict[str, dict[str, Any]] = {}
    for slot, stage in first.stages.items():
        other = second.stages.get(slot)
        if stage.work != "letters" or other is None:
            continue
        theirs = {score[:3]: score for score in other.scores}
        pairs = [(score, theirs[score[:3]]) for score in stage.scores if score[:3] in theirs]
        by_slot[slot] = {
            "n": len(pairs),
            "same_letter": sum(a[4].get("predicted") == b[4].get("predicted") for a, b in pairs),
            "as_right_or_wrong": sum(a[3] == b[3] for a, b in pairs),
            "right": [sum(bool(pair[side][3]) for pair in pairs) for side in (0, 1)],
            "largest_difference": max((_apart(a[4], b[4]) for a, b in pairs), default=0.0),
        }
    names = ("n", "same_letter", "as_right_or_wrong")
    return {
        **{name: sum(one[name] for one in by_slot.values()) for name in names},
        "largest_difference": max((one["largest_difference"] for one in by_slot.values()), default=0.0),
        "by_slot": by_slot,
    }


def _apart(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    both: Sequence[tuple[float, float]] = list(zip(first.get("logprobs", ()), second.get("logprobs", ()), strict=False))
    return max((abs(a - b) for a, b in both), default=0.0)


def compare_words(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, Any]:
    """Verdicts by name in both: how many are there, how many are equal, and those that are not."""
    common = [name for name in first if name in second]
    different = {name: [first[name], second[name]] for name in common if first[name] != second[name]}
    return {"n": len(common), "equal": len(common) - len(different), "different": different}
