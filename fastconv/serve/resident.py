"""The resident base behind an endpoint: one model, a queue in front of it, and the stack of one cell live at a time.

Requests for the same cell with the same temperature and nucleus are drawn together, others in turn, the oldest first. The
model runs in the thread that calls `work`; `draw` is called in the thread of the endpoint.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastconv.engine.generate import SampledRow, sample
from fastconv.engine.score import memory_errors
from fastconv.engine.shapes import MAX_ROWS
from fastconv.errors import FastconvError, Interrupted, stopped
from fastconv.recipe import SamplingSettings
from fastconv.run.stacks import Stacks
from fastconv.serve.protocol import ApiError, Finish, refusal_of
from fastconv.store.records import Stage

#: Completions that may wait for the model; more are refused, so that a flood ends in an error and not in memory.
MOST_WAITING = 4096
#: Time between two looks at whether to end.
_LOOK_S = 0.2


@dataclass(frozen=True)
class Piece:
    """Tokens of a completion as they are drawn; the last piece says how it ended."""

    ids: tuple[int, ...]
    finish: Finish | None = None


@dataclass(eq=False)
class _Waiting:
    """One completion to draw. Only `gone` is written by the endpoint's thread once it waits."""

    cell: str
    prompt: tuple[int, ...]
    seed: int
    settings: SamplingSettings
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | ApiError] = field(default_factory=asyncio.Queue)
    gone: bool = False
    n_sent: int = 0

    @property
    def group(self) -> tuple[str, float, float]:
        """What completions that are drawn together share."""
        return self.cell, self.settings.temperature, self.settings.top_p

    def tell(self, piece: Piece | ApiError) -> None:
        """Hand a piece to the endpoint's thread, unless its loop has ended."""
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError:
            self.gone = True

    def follow(self, row: SampledRow) -> None:
        """Hand over what is new in this row; nothing where memory ran out and it is drawn again up to here."""
        row.dropped = self.gone
        if len(row.tokens) > self.n_sent and not self.gone:
            self.tell(Piece(tuple(row.tokens[self.n_sent :])))
            self.n_sent = len(row.tokens)
        if row.ended or len(row.tokens) == len(row.uniforms):
            self.tell(Piece((), "stop" if row.ended else "length"))
            self.gone = True


class ResidentModel:
    """The cells of a run on the resident base. `cells` has a stage of each, under whose stack it is evaluated."""

    def __init__(self, stacks: Stacks, cells: Mapping[str, Stage]) -> None:
        self._stacks = stacks
        self._cells = cells
        self._waiting: list[_Waiting] = []
        self._changed = threading.Condition()
        self._ended = False
        self.name = "resident"

    def prove(self, cell: str) -> dict[str, Any]:
        """Put a cell's stack in place once; the distances of its probe logits. Raises what `Stacks.live_stack` raises."""
        with memory_errors(cell), self._stacks.live_stack(self._cells[cell]) as proof:
            return proof

    async def draw(
        self, cell: str, prompt: tuple[int, ...], seed: int, settings: SamplingSettings
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of one completion. Closing the iterator ends its drawing. Raises ApiError."""
        waiting = _Waiting(cell, prompt, seed, settings, asyncio.get_running_loop())
        with self._changed:
            if self._ended:
                raise _ending()
            if len(self._waiting) >= MOST_WAITING:
                raise ApiError(429, f"{MOST_WAITING} completions wait already: ask again later", code="queue_full")
            self._waiting.append(waiting)
            self._changed.notify()
        try:
            while True:
                piece = await waiting.pieces.get()
                if isinstance(piece, ApiError):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            waiting.gone = True

    def work(self, stop: Callable[[], bool]) -> None:
        """Draw what is asked until `stop` returns True. Then what waits is told that the endpoint ends."""
        try:
            while not stop():
                if batch := self._next():
                    self._draw(batch, stop)
        finally:
            with self._changed:
                self._ended = True
                left, self._waiting = self._waiting, []
            for waiting in left:
                waiting.tell(_ending())

    def _next(self) -> list[_Waiting]:
        """The oldest that waits, and all that can be drawn with it; waits a moment for one."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting), _LOOK_S)
            self._waiting = [one for one in self._waiting if not one.gone]
            if not self._waiting:
                return []
            most = MAX_ROWS[self._stacks.base.device.type]
            batch = [one for one in self._waiting if one.group == self._waiting[0].group][:most]
            self._waiting = [one for one in self._waiting if one not in batch]
        return batch

    def _draw(self, batch: Sequence[_Waiting], stop: Callable[[], bool]) -> None:
        """Draw a batch to its end. An error is told to all of it, and the endpoint goes on."""

        def watch(rows: Sequence[SampledRow]) -> None:
            for row in rows:
                batch[row.place].follow(row)
            if stop():
                raise stopped("serve")

        first = batch[0]
        try:
            with memory_errors(first.cell), self._stacks.live_stack(self._cells[first.cell]):
                sample(
                    self._stacks.base, [one.prompt for one in batch], [one.seed for one in batch], first.settings,
                    limits=[one.settings.max_new_tok for one in batch], watch=watch,
                )  # fmt: skip
        except FastconvError as error:
            told = _ending() if isinstance(error, Interrupted) else refusal_of(error, 500)
            for one in batch:
                if not one.gone:
                    one.tell(told)


def _ending() -> ApiError:
    return ApiError(503, "the endpoint is ending", code="shutting_down")
