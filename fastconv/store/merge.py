"""Taking over what another workspace computed: finished stages with their rows and artefacts, judgements, runs, verdicts.

The same stages may come any number of times, from anywhere, in any order. A stage travels as a `StageBundle`, so that it can
come from another machine as well as from a folder of this one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from fastconv.errors import InputError, StoreError
from fastconv.recipe import canonical_json
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store

_STAGES = "SELECT key, kind, slot, version, inputs, outputs, facts, seconds, finished_at FROM stages"
#: Tables that rows of a stage stand in, in the order of their primary keys, so that two ledgers list them alike.
_ROWS = {
    "samples": "SELECT * FROM samples WHERE stage=? ORDER BY row, sample",
    "scores": "SELECT * FROM scores WHERE stage=? ORDER BY row, sample, metric",
}


@dataclass(frozen=True)
class StageBundle:
    """A finished stage with its rows and (sha256, suffix, bytes) of its artefacts. Plain data, as the ledger holds it."""

    key: str
    slot: str
    stage: tuple[Any, ...]
    rows: tuple[tuple[str, tuple[tuple[Any, ...], ...]], ...]
    artefacts: tuple[tuple[str, str, bytes], ...]

    @property
    def outputs(self) -> str:
        """The stage's outputs as canonical JSON."""
        return self.stage[5]


@dataclass(frozen=True)
class Merged:
    """What a merge brought: stages added, stages that were here already, artefact bytes copied, judgements added."""

    n_added: int
    n_known: int
    copied_bytes: int
    n_judgements: int


def merge(store: Store, other: Store, keys: Collection[str] | None = None) -> Merged:
    """Take over the finished stages of `other` (those of `keys`, or all with judgements, runs and verdicts).

    Nothing is written if a stage stands in both with different results: StoreError names it. Otherwise what is here
    stays, what is missing is added, the oldest first, so that a merge that was killed left no stage without its needs.
    """
    if store.root.resolve() == other.root.resolve():
        raise InputError("it is this workspace", where=str(other.root), fix="name another one")
    order = [key for (key,) in other.rows("SELECT key FROM stages ORDER BY finished_at, rowid")]
    wanted = order if keys is None else [key for key in order if key in keys]
    here = {key for (key,) in store.rows("SELECT key FROM stages")}
    if apart := [key for key in wanted if key in here and _differs(store, pack(other, key, artefacts=False))]:
        slot = other.rows("SELECT slot FROM stages WHERE key=?", (apart[0],))[0][0]
        raise _two_results(slot, str(other.root), len(apart))
    n_added = copied = 0
    for key in wanted:
        parcel = pack(other, key, lacking=store)
        n_added += unpack(store, parcel)
        copied += sum(len(data) for _, _, data in parcel.artefacts)
    n_judgements = 0
    if keys is None:
        n_judgements = JudgeLedger(store).take_over(other)
        _take_runs(store, other)
    return Merged(n_added, len(wanted) - n_added, copied, n_judgements)


def pack(store: Store, key: str, *, artefacts: bool = True, lacking: Store | None = None) -> StageBundle:
    """A finished stage ready to travel; with `lacking`, only the artefacts that store lacks. Artefacts are verified.

    An artefact that `gc --adapters` removed is left out. Raises StoreError for one that is damaged or was lost.
    """
    stage = store.rows(f"{_STAGES} WHERE key=?", (key,))[0]
    rows = tuple((table, tuple(store.rows(query, (key,)))) for table, query in _ROWS.items())
    named = list(artefacts_of(store, stage[5])) if artefacts else []
    carried = [
        (sha256, suffix, store.get(sha256, suffix))
        for sha256, suffix in named
        if lacking is None or not lacking.path(sha256, suffix).is_file()
    ]
    return StageBundle(key, stage[2], stage, rows, tuple(carried))


def unpack(store: Store, parcel: StageBundle) -> bool:
    """Add a stage; False if it is here already. Raises StoreError for other bytes than named, or another result here.

    Artefacts come first and the row last: no row means that it never happened.
    """
    if _differs(store, parcel):
        raise _two_results(parcel.slot, "what was to be merged", 1)
    for sha256, suffix, data in parcel.artefacts:
        if store.put(data, suffix) != sha256:
            raise StoreError(
                "an artefact came with other bytes than its name says", where=parcel.slot, fix="merge it again"
            )
    with store.transaction() as db:
        if db.execute("SELECT 1 FROM stages WHERE key=?", (parcel.key,)).fetchone():
            return False
        for table, rows in parcel.rows:
            for row in rows:
                db.execute(f"INSERT INTO {table} VALUES({','.join('?' * len(row))})", row)
        db.execute(f"INSERT INTO stages VALUES({','.join('?' * len(parcel.stage))})", parcel.stage)
        db.execute("DELETE FROM failures WHERE key=?", (parcel.key,))  # it came off elsewhere
    return True


def artefacts_of(store: Store, outputs: str) -> Iterator[tuple[str, str]]:
    """(sha256, suffix) of the artefacts that a stage's outputs (JSON) name."""
    for text in texts_in(json.loads(outputs)):
        yield from store.rows("SELECT sha256, suffix FROM artefacts WHERE sha256=?", (text,))


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON or TOML value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part)


def _differs(store: Store, parcel: StageBundle) -> bool:
    """Whether the stage stands here with another result. How long it took, where and when is no part of a result."""
    here = store.rows("SELECT outputs FROM stages WHERE key=?", (parcel.key,))
    if not here:
        return False
    return here[0][0] != parcel.outputs or any(
        tuple(store.rows(_ROWS[table], (parcel.key,))) != rows for table, rows in parcel.rows
    )


def _two_results(slot: str, where: str, n: int) -> StoreError:
    more = f" ({n} stages in all)" if n > 1 else ""
    return StoreError(
        f"{slot} has one result here and another there for the same inputs{more}; both are kept, nothing was merged",
        where=where,
        fix=f"find out which one is wrong, `fastconv forget {slot}` in its workspace, then merge again",
    )


def _take_runs(store: Store, other: Store) -> None:
    """Add runs, the stages they rest on and their verdicts. Of a run in both, the first start and the newest word stand.

    What a run here was told (its facts, its stages) stays; what only the other knows is added.
    """
    with store.transaction() as db:
        for run, recipe, recipe_sha256, source, started_at, finished_at, facts in other.rows("SELECT * FROM runs"):
            mine = db.execute("SELECT facts FROM runs WHERE id=?", (run,)).fetchone()
            merged = {**json.loads(facts), **(json.loads(mine["facts"]) if mine else {})}
            db.execute(
                "INSERT INTO runs VALUES(?,?,?,?,?,?,?) ON CONFLICT(id) DO UPDATE SET facts=excluded.facts, "
                "started_at=MIN(started_at, excluded.started_at), finished_at=COALESCE(finished_at, excluded.finished_at)",
                (run, recipe, recipe_sha256, source, started_at, finished_at, canonical_json(merged)),
            )
        for row in other.rows("SELECT run, key, slot, reused FROM run_stages"):
            db.execute("INSERT OR IGNORE INTO run_stages VALUES(?,?,?,?)", row)
        for row in other.rows("SELECT run, gate, subject, verdict, body, decided_at FROM verdicts"):
            db.execute(
                "INSERT INTO verdicts VALUES(?,?,?,?,?,?) ON CONFLICT(run, gate, subject) DO UPDATE SET "
                "verdict=excluded.verdict, body=excluded.body, decided_at=excluded.decided_at "
                "WHERE excluded.decided_at > decided_at",
                row,
            )
