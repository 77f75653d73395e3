"""A ledger connection in a thread of its own, for the many small commits of live judging.

They do not wait for the disk: requests that wait for one fsync leave together, come back together, and then queue for
the CPU, which cost a tenth of the throughput. Every stage that is committed makes all before it durable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fastconv.errors import StoreError
from fastconv.judgements import Operation, Refusal
from fastconv.store import Store
from fastconv.store_judging import JudgeLedger

Result = TypeVar("Result")


class LedgerThread:
    """The judging ledger for one event loop. Operations that arrive during a commit share the next one."""

    def __init__(self, workspace: Path, cap_usd: float | None) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge-ledger")
        self._opening = self._pool.submit(lambda: JudgeLedger(Store.open(workspace).relaxed(), cap_usd))
        self._waiting: list[tuple[Operation, asyncio.Future[Any]]] = []
        self._flushing: asyncio.Task[None] | None = None

    async def call(self, work: Callable[[JudgeLedger], Result]) -> Result:
        """Run a piece of ledger work in the thread. Raises StoreError."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(self._opening.result()))

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
                results = await self.call(lambda ledger, operations=operations: ledger.apply(operations))
            except StoreError as error:
                for _, done in taken:
                    done.set_exception(error)
                continue
            for (_, done), result in zip(taken, results, strict=True):
                done.set_result(result)

    async def close(self) -> None:
        """Write what is waiting, keep what was under way as lost, close the connection, end the thread."""
        if self._flushing is not None:
            await asyncio.gather(self._flushing, return_exceptions=True)
        try:
            await self.call(JudgeLedger.let_go)
            await self.call(lambda ledger: ledger.store.close())
        finally:
            self._pool.shutdown()
