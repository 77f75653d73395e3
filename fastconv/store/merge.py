"""Merging workspaces: finished stages with their rows and artefacts, judgements, runs and verdicts.

Stages may be merged any number of times, from any workspace, in any order. A stage is transferred as a `StageBundle`,
so that it can come from another machine as well as from a folder on this one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from fastconv.errors import InputError, StoreError
from fastconv.store.io import joined_json, stored_json
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store
from fastconv.store.sound import is_number, key_of

#: Tables whose rows are merged.
_MERGED = (
    "stages", "samples", "scores", "runs", "run_stages", "verdicts", "judgements", "judge_replies", "judge_money", "judge_rubrics",
    "judge_calibrations",
)  # fmt: skip
_STAGES = "SELECT key, kind, slot, version, inputs, outputs, facts, seconds, finished_at FROM stages"
#: Table -> query of a stage's rows in the order of the primary key, so that two ledgers list them alike.
_ROWS = {
    "samples": "SELECT * FROM samples WHERE stage=? ORDER BY row, sample",
    "scores": "SELECT * FROM scores WHERE stage=? ORDER BY row, sample, metric",
}


@dataclass(frozen=True)
class StageBundle:
    """A finished stage as plain data: its row, the rows by table, and (sha256, suffix, bytes) of its artefacts."""

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
class MergeResult:
    """Counts of one merge: stages added, stages present before, artefact bytes copied, judgements added."""

    n_added: int
    n_known: int
    copied_bytes: int
    n_judgements: int


def merge(store: Store, other: Store, keys: Collection[str] | None = None) -> MergeResult:
    """Add the finished stages of `other` to `store`: those of `keys`, or all with judgements, runs and verdicts.

    What `store` has stays; what it lacks is added in the order in which it was committed, so that a killed merge leaves no
    stage without those it depends on. Raises InputError if both are one workspace, and StoreError, before anything is written, if a
    stage has different results in both.
    """
    if store.root.resolve() == other.root.resolve():
        raise InputError("it is this workspace", where=str(other.root), fix="name another one")
    require_sound_money(other)
    order = [key for (key,) in other.rows("SELECT key FROM stages ORDER BY rowid")]
    wanted = order if keys is None else [key for key in order if key in keys]
    known = {key for (key,) in store.rows("SELECT key FROM stages")}
    for key in wanted:
        if key not in known:
            require_sound(pack_stage(other, key, artefacts=False), str(other.root))
    if unsound := other.unsound_rows(_MERGED):
        raise StoreError(f"{unsound[0]}; nothing was merged", where=str(other.root), fix="merge another workspace")
    if differing := [
        key for key in wanted if key in known and _differs(store, pack_stage(other, key, artefacts=False))
    ]:
        slot = other.rows("SELECT slot FROM stages WHERE key=?", (differing[0],))[0][0]
        raise _conflict(slot, str(other.root), len(differing))
    n_added = copied_bytes = 0
    for key in wanted:
        bundle = pack_stage(other, key, lacking=store)
        n_added += unpack_stage(store, bundle)
        copied_bytes += sum(len(data) for _, _, data in bundle.artefacts)
    n_judgements = 0
    if keys is None:
        n_judgements = JudgeLedger(store).merge_from(other)
        _merge_runs(store, other)
    return MergeResult(n_added, len(wanted) - n_added, copied_bytes, n_judgements)


def pack_stage(store: Store, key: str, *, artefacts: bool = True, lacking: Store | None = None) -> StageBundle:
    """Read a finished stage with its artefacts, their sha256 verified; with `lacking`, only those that store lacks.

    Artefacts that `gc --adapters` removed are left out. Raises StoreError for one that is damaged or missing, and for a
    stage without a key.
    """
    found = store.rows(f"{_STAGES} WHERE key=?", (key,))
    if not found:  # SQLite lets a primary key be NULL, and finds no row by it
        raise StoreError("the row of a stage is damaged", where=str(store.root), fix="see `fastconv doctor`")
    stage = found[0]
    rows = tuple((table, tuple(store.rows(query, (key,)))) for table, query in _ROWS.items())
    named = list(artefacts_of(store, stage[5])) if artefacts else []
    contents = [
        (sha256, suffix, store.get(sha256, suffix))
        for sha256, suffix in named
        if lacking is None or not lacking.path(sha256, suffix).is_file()
    ]
    return StageBundle(key, stage[2], stage, rows, tuple(contents))


def require_sound(bundle: StageBundle, where: str) -> None:
    """Refuse a stage that no fastconv wrote: its key is not that of its inputs, or a row holds what is no score or sample.

    Raises StoreError. A workspace that is merged may come from anybody.
    """
    key, kind, slot, version, inputs, outputs, facts, seconds, finished_at = bundle.stage
    fault = ""
    if not all(isinstance(text, str) for text in (key, kind, slot, inputs, outputs, facts)):
        fault = "its row is damaged"
    elif key_of(kind, version, stored_json(inputs)) != key:
        fault = "its key is not that of its inputs"
    elif not all(isinstance(stored_json(text), dict) for text in (outputs, facts)):
        fault = "its row is damaged"
    elif not all(is_number(n) for n in (seconds, finished_at)):
        fault = "its times are no numbers"
    for table, rows in bundle.rows:
        sound = _is_sample if table == "samples" else _is_score
        n_bad = sum(not sound(row) for row in rows)
        if n_bad and not fault:
            fault = f"{n_bad} of its {table} are none"
    if fault:
        raise StoreError(f"stage {slot}: {fault}; nothing was merged", where=where, fix="merge it without that stage")


def require_sound_money(other: Store) -> None:
    """Refuse judgements that are no numbers and costs below zero, which would add to the budget. Raises StoreError."""
    if not other.rows("SELECT 1 FROM sqlite_master WHERE name='judge_money'"):
        return
    costs = "SELECT nusd FROM judge_money UNION ALL SELECT cost_nusd FROM judge_replies"
    if not all(isinstance(nusd, int) and 0 <= nusd < 2**53 for (nusd,) in other.rows(costs)):
        raise StoreError("a cost of judging is no amount", where=str(other.root), fix="merge another workspace")
    for (text,) in other.rows('SELECT "values" FROM judgements WHERE "values" IS NOT NULL'):
        values = stored_json(text)
        if not isinstance(values, dict) or not all(is_number(value) for value in values.values()):
            raise StoreError("a judgement is no number", where=str(other.root), fix="merge another workspace")


def _is_score(row: tuple[Any, ...]) -> bool:
    """Whether a row (stage, row, sample, metric, value, reason, detail) is a score."""
    _, name, sample, metric, value, reason, detail = row
    texts = all(isinstance(text, str) for text in (name, metric, detail))
    return texts and isinstance(sample, int) and (isinstance(reason, str) if value is None else is_number(value))


def _is_sample(row: tuple[Any, ...]) -> bool:
    """Whether a row (stage, row, sample, persona, prompt, completion, n_tok, ended) is a sample."""
    _, name, sample, persona, prompt, completion, n_tok, ended = row
    texts = all(isinstance(text, str) for text in (name, persona, prompt, completion))
    return texts and all(isinstance(n, int) for n in (sample, n_tok, ended)) and n_tok >= 0


def unpack_stage(store: Store, bundle: StageBundle) -> bool:
    """Add a stage to `store`; False if it has the stage already.

    Artefacts are written first and the stage's row last, so that a kill in between leaves no half stage. Raises
    StoreError if an artefact's bytes do not match its sha256, or if the store has another result for the stage.
    """
    require_sound(bundle, "what was to be merged")
    if _differs(store, bundle):
        raise _conflict(bundle.slot, "what was to be merged", 1)
    for sha256, suffix, data in bundle.artefacts:
        if store.put(data, suffix) != sha256:
            raise StoreError(
                "an artefact came with other bytes than its name says", where=bundle.slot, fix="merge it again"
            )
    with store.transaction() as db:
        if db.execute("SELECT 1 FROM stages WHERE key=?", (bundle.key,)).fetchone():
            return False
        for table, rows in bundle.rows:
            for row in rows:
                db.execute(f"INSERT INTO {table} VALUES({','.join('?' * len(row))})", row)
        db.execute(f"INSERT INTO stages VALUES({','.join('?' * len(bundle.stage))})", bundle.stage)
        db.execute("DELETE FROM failures WHERE key=?", (bundle.key,))  # it was computed elsewhere
    return True


def artefacts_of(store: Store, outputs: str) -> Iterator[tuple[str, str]]:
    """(sha256, suffix) of the artefacts that a stage's outputs (JSON) name."""
    for text in strings_in(stored_json(outputs)):
        yield from store.rows("SELECT sha256, suffix FROM artefacts WHERE sha256=?", (text,))


def strings_in(value: Any) -> Iterator[str]:
    """Every string in a JSON or TOML value at any depth; keys of tables are left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_in(part)


def _differs(store: Store, bundle: StageBundle) -> bool:
    """Whether the store has another result for the stage. Its duration, place and time are no part of a result."""
    outputs = store.rows("SELECT outputs FROM stages WHERE key=?", (bundle.key,))
    if not outputs:
        return False
    return outputs[0][0] != bundle.outputs or any(
        tuple(store.rows(_ROWS[table], (bundle.key,))) != rows for table, rows in bundle.rows
    )


def _conflict(slot: str, where: str, n: int) -> StoreError:
    more = f" ({n} stages in all)" if n > 1 else ""
    return StoreError(
        f"{slot} has one result here and another there for the same inputs{more}; both are kept, nothing was merged",
        where=where,
        fix=f"find out which one is wrong, `fastconv forget {slot}` in its workspace, then merge again",
    )


def _merge_runs(store: Store, other: Store) -> None:
    """Add runs, the stages they use, and their verdicts.

    For a run in both, the earlier start and the newer verdicts stand; facts and stages that `store` has stay, and those
    that only `other` has are added.
    """
    with store.transaction() as db:
        for run, recipe, recipe_sha256, source, started_at, finished_at, facts in other.rows("SELECT * FROM runs"):
            known = db.execute("SELECT facts FROM runs WHERE id=?", (run,)).fetchone()
            merged = joined_json(facts, stored_json(known["facts"]) if known else {})
            db.execute(
                "INSERT INTO runs VALUES(?,?,?,?,?,?,?) ON CONFLICT(id) DO UPDATE SET facts=excluded.facts, "
                "started_at=MIN(started_at, excluded.started_at), finished_at=COALESCE(finished_at, excluded.finished_at)",
                (run, recipe, recipe_sha256, source, started_at, finished_at, merged),
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
