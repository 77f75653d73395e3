"""The judging part of the ledger: judgements, raw replies, batches, and money.

The rules that keep money safe, each one transaction:

- A sending is paid for in advance: `Reserve` books its worst case or is refused, so the sum over all processes of the
  workspace never passes the cap. What it cost replaces the booking when the reply is written down, in one step.
- A booking whose reply may have been lost on the way stays booked at its worst case.
- One key has at most one open booking; a key that a live process (or an open batch) is asking is not asked again.
- A batch's intent and its bookings are written before it is sent.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastconv.recipe import canonical_json
from fastconv.store.io import lives, started
from fastconv.store.ledger import Store
from fastconv.store.records import (
    FAILURES,
    NUSD,
    BatchItem,
    History,
    JudgeBatch,
    Judgement,
    Money,
    Operation,
    RawReply,
    Refusal,
    Reserve,
    Settle,
    Unpaid,
)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS judge_rubrics(sha256 TEXT PRIMARY KEY, name TEXT NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS judgements(
  key TEXT PRIMARY KEY, rubric_sha256 TEXT NOT NULL, model TEXT NOT NULL, sample INTEGER NOT NULL,
  "values" TEXT, answer TEXT NOT NULL, reason TEXT, judged_at REAL NOT NULL,
  CHECK (("values" IS NULL) = (reason IS NOT NULL)));
CREATE TABLE IF NOT EXISTS judge_replies(
  ticket INTEGER PRIMARY KEY, key TEXT NOT NULL, transport TEXT NOT NULL, model TEXT NOT NULL, text TEXT NOT NULL,
  stop_reason TEXT NOT NULL, usage TEXT NOT NULL, cost_nusd INTEGER NOT NULL, latency_s REAL, fault TEXT,
  received_at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS judge_replies_by_key ON judge_replies(key);
CREATE TABLE IF NOT EXISTS judge_money(
  ticket INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, custom_id TEXT NOT NULL, nusd INTEGER NOT NULL,
  state TEXT NOT NULL, outcome TEXT NOT NULL, intent TEXT, holder TEXT NOT NULL, made_at REAL NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS judge_money_open ON judge_money(key) WHERE state='reserved';
CREATE INDEX IF NOT EXISTS judge_money_by_key ON judge_money(key);
CREATE INDEX IF NOT EXISTS judge_money_by_intent ON judge_money(intent) WHERE intent IS NOT NULL;
CREATE TABLE IF NOT EXISTS judge_totals(state TEXT PRIMARY KEY, nusd INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS judge_batches(
  intent TEXT PRIMARY KEY, batch TEXT UNIQUE, state TEXT NOT NULL, n INTEGER NOT NULL, holder TEXT NOT NULL,
  made_at REAL NOT NULL, ended_at REAL);
CREATE TABLE IF NOT EXISTS judge_calibrations(
  rubric_sha256 TEXT NOT NULL, model TEXT NOT NULL, body TEXT NOT NULL, made_at REAL NOT NULL,
  PRIMARY KEY(rubric_sha256, model));
"""


class JudgeLedger:
    """The judging tables of an open store. `cap_usd` is this process's hard stop over the whole workspace."""

    def __init__(self, store: Store, cap_usd: float | None = None) -> None:
        self._store = store
        self._cap_usd = cap_usd
        self._holder = _me()
        with store.transaction() as db:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            self._bury_the_dead(db)

    @property
    def store(self) -> Store:
        """The store that it stands on."""
        return self._store

    # --- what is known ----------------------------------------------------------------------------------

    def judgements(self, keys: Iterable[str]) -> dict[str, Judgement]:
        """The finished judgements among these keys."""
        found: dict[str, Judgement] = {}
        with self._store.transaction() as db:
            for key in keys:
                row = db.execute("SELECT * FROM judgements WHERE key=?", (key,)).fetchone()
                if row is not None:
                    found[key] = _judgement(row)
        return found

    def tried(self, keys: Iterable[str]) -> set[str]:
        """Those among these keys that were ever sent."""
        with self._store.transaction() as db:
            return {key for key in keys if db.execute("SELECT 1 FROM judge_money WHERE key=?", (key,)).fetchone()}

    def replies(self, key: str) -> list[RawReply]:
        """Every raw reply of a key in the order received."""
        with self._store.transaction() as db:
            rows = db.execute("SELECT * FROM judge_replies WHERE key=? ORDER BY ticket", (key,)).fetchall()
        return [
            RawReply(row["transport"], row["model"], row["text"], row["stop_reason"], json.loads(row["usage"]),
                     row["cost_nusd"] / NUSD, row["latency_s"], row["fault"])
            for row in rows
        ]  # fmt: skip

    def history(self, key: str) -> History:
        """What was tried for a key already, by this process or an earlier one."""
        with self._store.transaction() as db:
            return _history(db, key)

    def set_fault(self, key: str, fault: str) -> None:
        """Say why replies that were kept unread (nobody was waiting for them) cannot be read."""
        with self._store.transaction() as db:
            db.execute("UPDATE judge_replies SET fault=? WHERE key=? AND fault IS NULL", (fault, key))

    def money(self) -> Money:
        """Where the workspace's judging budget stands."""
        with self._store.transaction() as db:
            total = {row["state"]: row["nusd"] / NUSD for row in db.execute("SELECT * FROM judge_totals")}
        return Money(total.get("spent", 0.0), total.get("reserved", 0.0), total.get("lost", 0.0), self._cap_usd)

    def cost_usd(self, keys: Iterable[str]) -> float:
        """What the judgements of these keys have cost, replies that were lost included at their worst case."""
        query = "SELECT COALESCE(SUM(nusd), 0) FROM judge_money WHERE key=? AND state IN ('spent', 'lost')"
        with self._store.transaction() as db:
            return sum(db.execute(query, (key,)).fetchone()[0] for key in keys) / NUSD

    def remember_rubric(self, sha256: str, name: str, body: str) -> None:
        """Keep a rubric's text, so that raw replies can be read again when the file is gone."""
        with self._store.transaction() as db:
            db.execute("INSERT OR IGNORE INTO judge_rubrics VALUES(?,?,?)", (sha256, name, body))

    def keep_calibration(self, rubric_sha256: str, model: str, body: Mapping[str, Any]) -> None:
        """Keep how good a judge was with a rubric; the newest stands."""
        with self._store.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO judge_calibrations VALUES(?,?,?,?)",
                (rubric_sha256, model, canonical_json(dict(body)), time.time()),
            )

    def calibration(self, rubric_sha256: str, model: str) -> dict[str, Any] | None:
        """How good a judge was with a rubric, if it was ever calibrated."""
        with self._store.transaction() as db:
            row = db.execute(
                "SELECT body FROM judge_calibrations WHERE rubric_sha256=? AND model=?", (rubric_sha256, model)
            ).fetchone()
        return json.loads(row["body"]) if row else None

    def take_over(self, other: Store) -> int:
        """Add another ledger's judgements, replies, rubrics, calibrations and what they cost; the judgements added.

        Doing it again changes nothing. Open bookings stay with the process that made them; what was spent or lost counts
        here too, as a budget is over everything that a workspace holds.
        """
        if not other.rows("SELECT 1 FROM sqlite_master WHERE name='judge_money'"):
            return 0
        n_added = 0
        with self._store.transaction() as db:
            for table in ("judge_rubrics", "judge_calibrations", "judgements"):
                for row in other.rows(f"SELECT * FROM {table}"):
                    marks = ",".join("?" * len(row))
                    cursor = db.execute(f"INSERT OR IGNORE INTO {table} VALUES({marks})", row)
                    n_added += cursor.rowcount if table == "judgements" else 0
            replies = {row[0]: row[1:] for row in other.rows("SELECT * FROM judge_replies")}
            ended = "SELECT ticket, key, custom_id, nusd, state, outcome, holder, made_at FROM judge_money WHERE state<>'reserved'"
            for ticket, *booking in other.rows(ended):
                _take_booking(db, booking, replies.get(ticket))
        return n_added

    # --- sendings ---------------------------------------------------------------------------------------

    def apply(self, operations: Sequence[Operation]) -> list[int | Refusal | None]:
        """Do all operations in one transaction; for each `Reserve` a ticket or why it was refused, else None."""
        results: list[int | Refusal | None] = []
        with self._store.transaction() as db:
            for operation in operations:
                if isinstance(operation, Reserve):
                    results.append(self._reserve(db, operation, None))
                else:
                    _close_sending(db, operation)
                    results.append(None)
        return results

    def finish(self, judgements: Iterable[Judgement]) -> None:
        """Write judgements that no sending stands behind (a local judge's). A finished one is never changed."""
        with self._store.transaction() as db:
            for judgement in judgements:
                _finish(db, judgement)

    def _reserve(self, db: sqlite3.Connection, ask: Reserve, intent: str | None) -> int | Refusal:
        if db.execute("SELECT 1 FROM judgements WHERE key=?", (ask.key,)).fetchone():
            return "done"
        if db.execute("SELECT 1 FROM judge_replies WHERE key=? AND fault IS NULL", (ask.key,)).fetchone():
            return "done"  # paid for, and kept unread because nobody was waiting for it: to be read, not asked again
        holder = db.execute("SELECT * FROM judge_money WHERE key=? AND state='reserved'", (ask.key,)).fetchone()
        if holder is not None:
            if holder["intent"] is not None or _is_alive(holder["holder"]):
                return "held"
            # Its process died with the request under way: it may have been billed, so its booking stays.
            _move(db, holder, "lost", "lost", holder["nusd"])
        nusd = math.ceil(ask.usd * NUSD)
        if self._cap_usd is not None:
            committed = db.execute("SELECT COALESCE(SUM(nusd), 0) FROM judge_totals").fetchone()[0]
            if committed + nusd > math.floor(self._cap_usd * NUSD):
                return "over budget"
        cursor = db.execute(
            "INSERT INTO judge_money(key, custom_id, nusd, state, outcome, intent, holder, made_at) "
            "VALUES(?,'',?,'reserved','',?,?,?)",
            (ask.key, nusd, intent, self._holder, time.time()),
        )
        _add(db, "reserved", nusd)
        ticket = int(cursor.lastrowid or 0)
        # The intent in it makes a custom id unique among all workspaces that share an account.
        custom_id = f"{ask.key[:32]}-{(intent or '')[:16]}-{ticket}"
        db.execute("UPDATE judge_money SET custom_id=? WHERE ticket=?", (custom_id, ticket))
        return ticket

    def let_go(self) -> None:
        """Give up what this connection has under way: its requests may have been billed, its intents are unknown."""
        with self._store.transaction() as db:
            own = "SELECT * FROM judge_money WHERE state='reserved' AND intent IS NULL AND holder=?"
            for row in db.execute(own, (self._holder,)).fetchall():
                _move(db, row, "lost", "lost", row["nusd"])
            db.execute("UPDATE judge_batches SET holder='' WHERE state='intended' AND holder=?", (self._holder,))

    def _bury_the_dead(self, db: sqlite3.Connection) -> None:
        """Requests that were under way when their process died may have been billed: their bookings become losses."""
        for row in db.execute("SELECT * FROM judge_money WHERE state='reserved' AND intent IS NULL").fetchall():
            if not _is_alive(row["holder"]):
                _move(db, row, "lost", "lost", row["nusd"])

    # --- batches ----------------------------------------------------------------------------------------

    def write_intent(self, asks: Sequence[Reserve]) -> tuple[str, Sequence[int | Refusal]]:
        """Book a batch's items and write its intent, in one transaction and before it is sent.

        Gives the intent and, for each ask, its ticket or why it has no part in the batch. No intent is left behind
        when nothing could be booked.
        """
        intent = uuid.uuid4().hex
        with self._store.transaction() as db:
            results: list[int | Refusal] = [self._reserve(db, ask, intent) for ask in asks]
            n = sum(isinstance(result, int) for result in results)
            if n:
                db.execute(
                    "INSERT INTO judge_batches VALUES(?,NULL,'intended',?,?,?,NULL)",
                    (intent, n, self._holder, time.time()),
                )
        return intent, results

    def attach(self, intent: str, batch: str) -> None:
        """Note the id under which the API took a batch."""
        with self._store.transaction() as db:
            db.execute("UPDATE judge_batches SET batch=?, state='sent' WHERE intent=?", (batch, intent))

    def disown(self, intent: str) -> None:
        """Say that this process does not know whether a batch was taken: it is to be reconciled."""
        with self._store.transaction() as db:
            db.execute("UPDATE judge_batches SET holder='' WHERE intent=? AND state='intended'", (intent,))

    def void(self, intent: str) -> None:
        """Say that a batch was never taken: its bookings are freed."""
        with self._store.transaction() as db:
            for row in db.execute(
                "SELECT * FROM judge_money WHERE intent=? AND state='reserved'", (intent,)
            ).fetchall():
                _move(db, row, "free", "void", 0)
            db.execute("UPDATE judge_batches SET state='void' WHERE intent=?", (intent,))

    def close_batch(self, intent: str) -> None:
        """Say that every result of a batch is in the ledger."""
        with self._store.transaction() as db:
            db.execute("UPDATE judge_batches SET state='done', ended_at=? WHERE intent=?", (time.time(), intent))

    def batches(self, state: str) -> list[JudgeBatch]:
        """Batches in a state, oldest first. Those that a live process is about to send are left to it."""
        with self._store.transaction() as db:
            rows = db.execute("SELECT * FROM judge_batches WHERE state=? ORDER BY made_at", (state,)).fetchall()
        found = [JudgeBatch(r["intent"], r["batch"], r["state"], r["n"], r["holder"], r["made_at"]) for r in rows]
        return [one for one in found if one.state != "intended" or not _is_alive(one.holder)]

    def known_batch_ids(self) -> set[str]:
        """Ids of all batches that an intent is attached to."""
        with self._store.transaction() as db:
            return {row[0] for row in db.execute("SELECT batch FROM judge_batches WHERE batch IS NOT NULL")}

    def batch_items(self, intent: str) -> list[BatchItem]:
        """The booked items of a batch."""
        with self._store.transaction() as db:
            rows = db.execute("SELECT * FROM judge_money WHERE intent=? ORDER BY ticket", (intent,)).fetchall()
        return [
            BatchItem(row["ticket"], row["key"], row["custom_id"], row["state"], row["nusd"] / NUSD) for row in rows
        ]

    def counts(self) -> dict[str, int]:
        """How many judgements, replies and lost sendings the ledger holds; for status lines and tests."""
        queries = {
            "scored": "SELECT COUNT(*) FROM judgements WHERE reason IS NULL",
            "unscored": "SELECT COUNT(*) FROM judgements WHERE reason IS NOT NULL",
            "replies": "SELECT COUNT(*) FROM judge_replies",
            "lost": "SELECT COUNT(*) FROM judge_money WHERE state='lost'",
        }
        with self._store.transaction() as db:
            return {name: db.execute(query).fetchone()[0] for name, query in queries.items()}


def _close_sending(db: sqlite3.Connection, end: Settle | Unpaid) -> None:
    """Settle a booking once: a second end of the same ticket (results read twice) changes nothing."""
    row = db.execute("SELECT * FROM judge_money WHERE ticket=? AND state='reserved'", (end.ticket,)).fetchone()
    if row is None:
        return
    if isinstance(end, Unpaid):
        lost = end.outcome in ("lost", "missing")
        _move(db, row, "lost" if lost else "free", end.outcome, row["nusd"] if lost else 0)
    else:
        reply, cost = end.reply, math.ceil(end.reply.cost_usd * NUSD)
        _move(db, row, "spent", "reply", cost)
        db.execute(
            "INSERT INTO judge_replies VALUES(?,?,?,?,?,?,?,?,?,?,?)",
            (end.ticket, end.key, reply.transport, reply.model, reply.text, reply.stop_reason,
             canonical_json(dict(reply.usage)), cost, reply.latency_s, reply.fault, time.time()),
        )  # fmt: skip
    if end.final is not None:
        _finish(db, end.final)


def _take_booking(db: sqlite3.Connection, booking: Sequence[Any], reply: Sequence[Any] | None) -> None:
    """Add an ended booking of another ledger with its reply, under a ticket of this one; once, whoever brings it."""
    key, custom_id, nusd, state, outcome, holder, made_at = booking
    # Tickets are counted in each ledger; the request's own id, its process and its moment are the same in all of them.
    same = "SELECT 1 FROM judge_money WHERE key=? AND custom_id=? AND holder=? AND made_at=?"
    if db.execute(same, (key, custom_id, holder, made_at)).fetchone():
        return
    cursor = db.execute(
        "INSERT INTO judge_money(key, custom_id, nusd, state, outcome, intent, holder, made_at) "
        "VALUES(?,?,?,?,?,NULL,?,?)",
        (key, custom_id, nusd, state, outcome, holder, made_at),
    )
    if state != "free":
        _add(db, state, nusd)
    if reply is not None:
        marks = ",".join("?" * (1 + len(reply)))
        db.execute(f"INSERT INTO judge_replies VALUES({marks})", (cursor.lastrowid, *reply))


def _move(db: sqlite3.Connection, row: sqlite3.Row, state: str, outcome: str, nusd: int) -> None:
    db.execute(
        "UPDATE judge_money SET state=?, outcome=?, nusd=? WHERE ticket=?", (state, outcome, nusd, row["ticket"])
    )
    _add(db, "reserved", -row["nusd"])
    if state != "free":
        _add(db, state, nusd)


def _add(db: sqlite3.Connection, state: str, nusd: int) -> None:
    db.execute(
        "INSERT INTO judge_totals VALUES(?,?) ON CONFLICT(state) DO UPDATE SET nusd=nusd+excluded.nusd", (state, nusd)
    )


def _finish(db: sqlite3.Connection, one: Judgement) -> None:
    values = None if one.values is None else canonical_json(dict(one.values))
    db.execute(
        "INSERT INTO judgements VALUES(?,?,?,?,?,?,?,?) ON CONFLICT(key) DO NOTHING",
        (one.key, one.rubric_sha256, one.model, one.sample, values, canonical_json(dict(one.answer)), one.reason,
         time.time()),
    )  # fmt: skip


def _history(db: sqlite3.Connection, key: str) -> History:
    unread = db.execute("SELECT COUNT(*) FROM judge_replies WHERE key=? AND fault IS NOT NULL", (key,)).fetchone()[0]
    marks = ",".join("?" * len(FAILURES))
    failed = db.execute(
        f"SELECT COUNT(*) FROM judge_money WHERE key=? AND outcome IN ({marks})", (key, *FAILURES)
    ).fetchone()[0]
    return History(unread, failed)


def _judgement(row: sqlite3.Row) -> Judgement:
    values = None if row["values"] is None else json.loads(row["values"])
    return Judgement(
        row["key"], row["rubric_sha256"], row["model"], row["sample"], values, json.loads(row["answer"]), row["reason"]
    )


def _me() -> str:
    """A name for one connection of this process: host, pid, its start, and a mark of its own."""
    return f"{socket.gethostname()}:{os.getpid()}:{started(os.getpid())}:{uuid.uuid4().hex[:8]}"


def _is_alive(holder: str) -> bool:
    """Whether the process of this name lives. One on another host counts as alive: its money is not ours to judge."""
    if not holder:
        return False
    host, pid_text, since, _ = holder.rsplit(":", 3)
    if host != socket.gethostname():
        return True
    return lives(int(pid_text), since)
