"""The ledger connection of live judging, for its many small commits.

They run in the event loop itself and do not wait for the disk. A thread of their own cost a tenth of the throughput:
each statement gives up the interpreter lock and waits up to 5 ms to have it back from a busy loop; and requests that
wait for one fsync leave together, come back together, and then queue for the CPU. Every stage that is committed makes
all before it durable.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastconv.errors import StoreError
from fastconv.store.judgements import Operation, Refusal
from fastconv.store.ledger import Store
from fastconv.store.judge_ledger import JudgeLedger


class LoopLedger:
    """The judging ledger for one event loop. Operations posted in one turn of the loop share a commit."""

    def __init__(self, workspace: Path, cap_usd: float | None) -> None:
        self.ledger = JudgeLedger(Store.open(workspace).relaxed(), cap_usd)
        self._waiting: list[tuple[Operation, asyncio.Future[Any]]] = []
        self._flushing: asyncio.Task[None] | None = None

    def post(self, operation: Operation) -> asyncio.Future[int | Refusal | None]:
        """Hand an operation over; the future is done (or holds a StoreError) when it is committed.

        Operations are done in the order posted, so one that is awaited vouches for those before it.
        """
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((operation, done))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        return done

    async def do(self, operation: Operation) -> int | Refusal | None:
        """Do one operation; returns when it is committed. Raises StoreError."""
        # Shielded: a cancelled task must not take back an operation that the others' commit already holds.
        return await asyncio.shield(self.post(operation))

    async def _flush(self) -> None:
        while self._waiting:
            taken, self._waiting = self._waiting, []
            operations = [operation for operation, _ in taken]
            try:
                results = self.ledger.apply(operations)
            except StoreError as error:
                for _, done in taken:
                    done.set_exception(error)
                continue
            for (_, done), result in zip(taken, results, strict=True):
                done.set_result(result)

    async def close(self) -> None:
        """Write what is waiting, keep what was under way as lost, close the connection."""
        if self._flushing is not None:
            await asyncio.gather(self._flushing, return_exceptions=True)
        try:
            self.ledger.let_go()
        finally:
            self.ledger.store.close()
