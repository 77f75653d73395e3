"""The judging tables of the ledger: judgements, raw replies, batches, and money.

The rules that keep the budget, each enforced in one transaction:

- `Reserve` books the worst-case cost of a sending before it is sent, or is refused, so that the sum over all processes
  of the workspace never exceeds the cap. Recording the reply replaces the booking by the actual cost in the same step.
- A booking whose reply may have been lost in transit stays booked at its worst case.
- A key has at most one open booking; a key that a live process or an open batch is asking is not asked again.
- A batch's intent and its bookings are written before it is sent.
"""

from __future__ import annotations

import math
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastconv.recipe import canonical_json
from fastconv.store.io import process_is_alive, process_start, stored_json
from fastconv.store.ledger import Store
from fastconv.store.records import (
    FAILURES,
    NUSD,
    BatchItem,
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

#: Begins the fault of a reply whose judgement was given up, when its answer was to be judged again.
REOPENED = "before it was judged again: "
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
CREATE TABLE IF NOT EXISTS judge_outbox(stage TEXT PRIMARY KEY, keys TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS judge_totals(state TEXT PRIMARY KEY, nusd INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS judge_batches(
  intent TEXT PRIMARY KEY, batch TEXT UNIQUE, state TEXT NOT NULL, n INTEGER NOT NULL, holder TEXT NOT NULL,
  made_at REAL NOT NULL, ended_at REAL);
CREATE TABLE IF NOT EXISTS judge_calibrations(
  rubric_sha256 TEXT NOT NULL, model TEXT NOT NULL, body TEXT NOT NULL, made_at REAL NOT NULL,
  PRIMARY KEY(rubric_sha256, model));
"""


class JudgeLedger:
    """The judging tables of an open store. `cap_usd` limits what all processes of the workspace spend together."""

    def __init__(self, store: Store, cap_usd: float | None = None) -> None:
        self._store = store
        self._cap_usd = cap_usd
        self._holder = _holder_name()
        with store.transaction() as db:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            self._mark_dead_bookings_lost(db)

    @property
    def store(self) -> Store:
        """The store whose ledger this is."""
        return self._store

    # --- reading and notes ----------------------------------------------------------------------------------

    def judgements(self, keys: Iterable[str]) -> dict[str, Judgement]:
        """The finished judgements among these keys."""
        finished: dict[str, Judgement] = {}
        with self._store.transaction() as db:
            for key in keys:
                row = db.execute("SELECT * FROM judgements WHERE key=?", (key,)).fetchone()
                if row is not None:
                    finished[key] = _judgement(row)
        return finished

    def sent_keys(self, keys: Iterable[str]) -> set[str]:
        """The keys among these that were ever sent."""
        with self._store.transaction() as db:
            return {key for key in keys if db.execute("SELECT 1 FROM judge_money WHERE key=?", (key,)).fetchone()}

    def replies(self, key: str) -> list[RawReply]:
        """The raw replies for a key, in the order they were booked."""
        with self._store.transaction() as db:
            rows = db.execute("SELECT * FROM judge_replies WHERE key=? ORDER BY ticket", (key,)).fetchall()
        return [
            RawReply(row["transport"], row["model"], row["text"], row["stop_reason"], stored_json(row["usage"]),
                     row["cost_nusd"] / NUSD, row["latency_s"], row["fault"])
            for row in rows
        ]  # fmt: skip

    def unread(self, key: str) -> list[RawReply]:
        """The raw replies for a key that are no whole judgement, since it was last given up to be judged again."""
        return [reply for reply in self.replies(key) if reply.fault and not reply.fault.startswith(REOPENED)]

    def n_failed(self, key: str) -> int:
        """Number of sendings for a key that brought no reply and cost nothing, by this process or an earlier one."""
        marks = ",".join("?" * len(FAILURES))
        query = f"SELECT COUNT(*) FROM judge_money WHERE key=? AND outcome IN ({marks})"
        with self._store.transaction() as db:
            return db.execute(query, (key, *FAILURES)).fetchone()[0]

    def set_fault(self, key: str, fault: str) -> None:
        """Record why the replies for a key that were stored unparsed (no one waited for them) cannot be parsed."""
        with self._store.transaction() as db:
            db.execute("UPDATE judge_replies SET fault=? WHERE key=? AND fault IS NULL", (fault, key))

    def money(self) -> Money:
        """State of the workspace's judging budget."""
        with self._store.transaction() as db:
            usd = {row["state"]: row["nusd"] / NUSD for row in db.execute("SELECT * FROM judge_totals")}
        return Money(usd.get("spent", 0.0), usd.get("reserved", 0.0), usd.get("lost", 0.0), self._cap_usd)

    def cost_usd(self, keys: Iterable[str]) -> float:
        """US dollars that the judgements of these keys have cost; lost replies count at their worst case."""
        query = "SELECT COALESCE(SUM(nusd), 0) FROM judge_money WHERE key=? AND state IN ('spent', 'lost')"
        with self._store.transaction() as db:
            return sum(db.execute(query, (key,)).fetchone()[0] for key in keys) / NUSD

    def keep_keys(self, stage: str, keys: Sequence[str]) -> None:
        """Keep the keys of a judge stage's requests, in the order of its samples, until `take_keys`."""
        with self._store.transaction() as db:
            db.execute("INSERT OR REPLACE INTO judge_outbox VALUES(?,?)", (stage, canonical_json(list(keys))))

    def take_keys(self, stage: str) -> list[str]:
        """The kept keys of a stage, which are forgotten; empty without."""
        with self._store.transaction() as db:
            row = db.execute("SELECT keys FROM judge_outbox WHERE stage=?", (stage,)).fetchone()
            db.execute("DELETE FROM judge_outbox WHERE stage=?", (stage,))
        return stored_json(row["keys"]) if row else []

    def save_rubric(self, sha256: str, name: str, body: str) -> None:
        """Save a rubric's text, so that raw replies can be parsed again when its file is gone."""
        with self._store.transaction() as db:
            db.execute("INSERT OR IGNORE INTO judge_rubrics VALUES(?,?,?)", (sha256, name, body))

    def save_calibration(self, rubric_sha256: str, model: str, body: Mapping[str, Any]) -> None:
        """Save how well a judge agreed with the labels of a rubric; the newest result stands."""
        with self._store.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO judge_calibrations VALUES(?,?,?,?)",
                (rubric_sha256, model, canonical_json(dict(body)), time.time()),
            )

    def calibration(self, rubric_sha256: str, model: str) -> dict[str, Any] | None:
        """The saved calibration of a judge with a rubric, or None."""
        with self._store.transaction() as db:
            row = db.execute(
                "SELECT body FROM judge_calibrations WHERE rubric_sha256=? AND model=?", (rubric_sha256, model)
            ).fetchone()
        return stored_json(row["body"]) if row else None

    def merge_from(self, other: Store) -> int:
        """Add another ledger's judgements, replies, rubrics, calibrations and costs; returns the judgements added.

        Repeating it changes nothing. Open bookings are not copied, they belong to the process that made them. What was
        spent or lost counts against this ledger's cap too, because a budget covers everything that a workspace holds.
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
                _add_ended_booking(db, booking, replies.get(ticket))
        return n_added

    # --- sendings ---------------------------------------------------------------------------------------

    def apply(self, operations: Sequence[Operation]) -> list[int | Refusal | None]:
        """Apply operations in one transaction; the result of each is a ticket or Refusal for `Reserve`, else None."""
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
        """Record judgements that cost no sending (a local judge's). A finished one is never changed."""
        with self._store.transaction() as db:
            for judgement in judgements:
                _insert_judgement(db, judgement)

    def reopen(self, keys: Iterable[str], reason: str) -> set[str]:
        """Forget the judgements of these keys that have no value for this reason; returns them. Replies and costs stay.

        What was tried before no longer counts: each is asked for as at first, and once more if it cannot be read.
        """
        with self._store.transaction() as db:
            wanted = "SELECT 1 FROM judgements WHERE key=? AND reason=?"
            found = {key for key in keys if db.execute(wanted, (key, reason)).fetchone()}
            for key in found:
                db.execute("DELETE FROM judgements WHERE key=?", (key,))
                db.execute("UPDATE judge_replies SET fault=? WHERE key=?", (f"{REOPENED}{reason}", key))
                marks = ",".join("?" * len(FAILURES))
                db.execute(
                    f"UPDATE judge_money SET outcome='reopened' WHERE key=? AND outcome IN ({marks})", (key, *FAILURES)
                )
        return found

    def _reserve(self, db: sqlite3.Connection, ask: Reserve, intent: str | None) -> int | Refusal:
        if db.execute("SELECT 1 FROM judgements WHERE key=?", (ask.key,)).fetchone():
            return "done"
        if db.execute("SELECT 1 FROM judge_replies WHERE key=? AND fault IS NULL", (ask.key,)).fetchone():
            return (
                "done"  # paid for and stored unparsed, because no one waited for it: parse it instead of asking again
            )
        booking = db.execute("SELECT * FROM judge_money WHERE key=? AND state='reserved'", (ask.key,)).fetchone()
        if booking is not None:
            if booking["intent"] is not None or _is_alive(booking["holder"]):
                return "held"
            # Its process died with the request in flight: it may have been billed, so the money stays booked.
            _end_booking(db, booking, "lost", "lost", booking["nusd"])
        nusd = math.ceil(ask.usd * NUSD)
        if self._cap_usd is not None:
            committed = db.execute("SELECT COALESCE(SUM(nusd), 0) FROM judge_totals").fetchone()[0]
            if committed + nusd > self._cap_usd * NUSD:
                return "over budget"
        cursor = db.execute(
            "INSERT INTO judge_money(key, custom_id, nusd, state, outcome, intent, holder, made_at) "
            "VALUES(?,'',?,'reserved','',?,?,?)",
            (ask.key, nusd, intent, self._holder, time.time()),
        )
        _add_to_total(db, "reserved", nusd)
        ticket = int(cursor.lastrowid or 0)
        # The intent makes the custom id unique among all workspaces that share an account.
        custom_id = f"{ask.key[:32]}-{(intent or '')[:16]}-{ticket}"
        db.execute("UPDATE judge_money SET custom_id=? WHERE ticket=?", (custom_id, ticket))
        return ticket

    def release(self) -> None:
        """Give up what this connection has in flight: its requests count as lost, its intents are left to reconcile."""
        with self._store.transaction() as db:
            query = "SELECT * FROM judge_money WHERE state='reserved' AND intent IS NULL AND holder=?"
            for row in db.execute(query, (self._holder,)).fetchall():
                _end_booking(db, row, "lost", "lost", row["nusd"])
            db.execute("UPDATE judge_batches SET holder='' WHERE state='intended' AND holder=?", (self._holder,))

    def _mark_dead_bookings_lost(self, db: sqlite3.Connection) -> None:
        """End the bookings of dead processes as lost: their requests may have been billed."""
        for row in db.execute("SELECT * FROM judge_money WHERE state='reserved' AND intent IS NULL").fetchall():
            if not _is_alive(row["holder"]):
                _end_booking(db, row, "lost", "lost", row["nusd"])

    # --- batches ----------------------------------------------------------------------------------------

    def write_intent(self, asks: Sequence[Reserve]) -> tuple[str, Sequence[int | Refusal]]:
        """Book a batch's items and write its intent in one transaction, before the batch is sent.

        Returns the intent (32 hex digits) and, for each ask, its ticket or a Refusal. No intent is written when
        nothing could be booked.
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

    def set_batch_id(self, intent: str, batch: str) -> None:
        """Record the id that the API gave to a batch; its state becomes `sent`."""
        with self._store.transaction() as db:
            db.execute("UPDATE judge_batches SET batch=?, state='sent' WHERE intent=?", (batch, intent))

    def release_batch(self, intent: str) -> None:
        """Give up an intent whose sending is uncertain, so that it is reconciled with the API's list of batches."""
        with self._store.transaction() as db:
            db.execute("UPDATE judge_batches SET holder='' WHERE intent=? AND state='intended'", (intent,))

    def void_batch(self, intent: str) -> None:
        """Record that the API never took a batch; its bookings are freed."""
        with self._store.transaction() as db:
            for row in db.execute(
                "SELECT * FROM judge_money WHERE intent=? AND state='reserved'", (intent,)
            ).fetchall():
                _end_booking(db, row, "free", "void", 0)
            db.execute("UPDATE judge_batches SET state='void' WHERE intent=?", (intent,))

    def close_batch(self, intent: str) -> None:
        """Record that every result of a batch is in the ledger; its state becomes `done`."""
        with self._store.transaction() as db:
            db.execute("UPDATE judge_batches SET state='done', ended_at=? WHERE intent=?", (time.time(), intent))

    def batches(self, state: str) -> list[JudgeBatch]:
        """Batches in a state, oldest first, without those that a live process is about to send."""
        with self._store.transaction() as db:
            rows = db.execute("SELECT * FROM judge_batches WHERE state=? ORDER BY made_at", (state,)).fetchall()
        batches = [
            JudgeBatch(row["intent"], row["batch"], row["state"], row["n"], row["holder"], row["made_at"])
            for row in rows
        ]
        return [batch for batch in batches if batch.state != "intended" or not _is_alive(batch.holder)]

    def known_batch_ids(self) -> set[str]:
        """The API's ids of all batches that were sent from this workspace."""
        with self._store.transaction() as db:
            return {row[0] for row in db.execute("SELECT batch FROM judge_batches WHERE batch IS NOT NULL")}

    def batch_items(self, intent: str) -> list[BatchItem]:
        """The booked items of a batch, in the order of their tickets."""
        with self._store.transaction() as db:
            rows = db.execute("SELECT * FROM judge_money WHERE intent=? ORDER BY ticket", (intent,)).fetchall()
        return [
            BatchItem(row["ticket"], row["key"], row["custom_id"], row["state"], row["nusd"] / NUSD) for row in rows
        ]

    def counts(self) -> dict[str, int]:
        """Numbers of scored and unscored judgements, of replies and of lost sendings."""
        queries = {
            "scored": "SELECT COUNT(*) FROM judgements WHERE reason IS NULL",
            "unscored": "SELECT COUNT(*) FROM judgements WHERE reason IS NOT NULL",
            "replies": "SELECT COUNT(*) FROM judge_replies",
            "lost": "SELECT COUNT(*) FROM judge_money WHERE state='lost'",
        }
        with self._store.transaction() as db:
            return {name: db.execute(query).fetchone()[0] for name, query in queries.items()}


def _close_sending(db: sqlite3.Connection, end: Settle | Unpaid) -> None:
    """End a booking once: a second end of the same ticket (results read twice) changes nothing."""
    row = db.execute("SELECT * FROM judge_money WHERE ticket=? AND state='reserved'", (end.ticket,)).fetchone()
    if row is None:
        return
    if isinstance(end, Unpaid):
        lost = end.outcome in ("lost", "missing")
        _end_booking(db, row, "lost" if lost else "free", end.outcome, row["nusd"] if lost else 0)
    else:
        reply, cost_nusd = end.reply, math.ceil(end.reply.cost_usd * NUSD)
        _end_booking(db, row, "spent", "reply", cost_nusd)
        db.execute(
            "INSERT INTO judge_replies VALUES(?,?,?,?,?,?,?,?,?,?,?)",
            (end.ticket, end.key, reply.transport, reply.model, reply.text, reply.stop_reason,
             canonical_json(dict(reply.usage)), cost_nusd, reply.latency_s, reply.fault, time.time()),
        )  # fmt: skip
    if end.final is not None:
        _insert_judgement(db, end.final)


def _add_ended_booking(db: sqlite3.Connection, booking: Sequence[Any], reply: Sequence[Any] | None) -> None:
    """Copy an ended booking of another ledger with its reply, under a new ticket, unless it is here already."""
    key, custom_id, nusd, state, outcome, holder, made_at = booking
    # Ticket numbers differ between ledgers; a request's custom id, process and time are the same in all of them.
    same = "SELECT 1 FROM judge_money WHERE key=? AND custom_id=? AND holder=? AND made_at=?"
    if db.execute(same, (key, custom_id, holder, made_at)).fetchone():
        return
    cursor = db.execute(
        "INSERT INTO judge_money(key, custom_id, nusd, state, outcome, intent, holder, made_at) "
        "VALUES(?,?,?,?,?,NULL,?,?)",
        (key, custom_id, nusd, state, outcome, holder, made_at),
    )
    if state != "free":
        _add_to_total(db, state, nusd)
    if reply is not None:
        marks = ",".join("?" * (1 + len(reply)))
        db.execute(f"INSERT INTO judge_replies VALUES({marks})", (cursor.lastrowid, *reply))


def _end_booking(db: sqlite3.Connection, row: sqlite3.Row, state: str, outcome: str, nusd: int) -> None:
    """Give an open booking its final state, outcome and amount, and update the totals."""
    db.execute(
        "UPDATE judge_money SET state=?, outcome=?, nusd=? WHERE ticket=?", (state, outcome, nusd, row["ticket"])
    )
    _add_to_total(db, "reserved", -row["nusd"])
    if state != "free":
        _add_to_total(db, state, nusd)


def _add_to_total(db: sqlite3.Connection, state: str, nusd: int) -> None:
    db.execute(
        "INSERT INTO judge_totals VALUES(?,?) ON CONFLICT(state) DO UPDATE SET nusd=nusd+excluded.nusd", (state, nusd)
    )


def _insert_judgement(db: sqlite3.Connection, judgement: Judgement) -> None:
    values = None if judgement.values is None else canonical_json(dict(judgement.values))
    db.execute(
        "INSERT INTO judgements VALUES(?,?,?,?,?,?,?,?) ON CONFLICT(key) DO NOTHING",
        (judgement.key, judgement.rubric_sha256, judgement.model, judgement.sample, values,
         canonical_json(dict(judgement.answer)), judgement.reason, time.time()),
    )  # fmt: skip


def _judgement(row: sqlite3.Row) -> Judgement:
    values = None if row["values"] is None else stored_json(row["values"])
    return Judgement(
        row["key"], row["rubric_sha256"], row["model"], row["sample"], values, stored_json(row["answer"]), row["reason"]
    )


def _holder_name() -> str:
    """A unique name of one connection of this process: host, pid, start time and a random suffix."""
    return f"{socket.gethostname()}:{os.getpid()}:{process_start(os.getpid())}:{uuid.uuid4().hex[:8]}"


def _is_alive(holder: str) -> bool:
    """Whether the process behind a holder's name runs. One on another host counts as alive, as it cannot be checked."""
    if not holder:
        return False
    host, pid, start, _ = holder.rsplit(":", 3)
    if host != socket.gethostname():
        return True
    return process_is_alive(int(pid), start)
