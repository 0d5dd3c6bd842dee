"""Writes one worker's journal: rows that wait together are written together.

While other requests are under way a batch waits for their rows, as databases delay a commit that has
siblings, but only until the event loop has gone round without one more row: then those that could come are
there. On a quick disk the event loop itself writes the batch, since two changes of threads would take longer.
On a slow one a thread does, and the next batch gathers meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import NamedTuple

import msgspec

from engine.metering.counters import Tally
from engine.metering.journal import Journal, JournalError

log = logging.getLogger("hearth.ledger")


class Entry(msgspec.Struct, frozen=True):
    """One row on its way: as the journal keeps it, its charge, and who waits for it."""

    data: bytes
    charge: int
    done: asyncio.Future[None]


class _Drop(NamedTuple):
    position: int


class _Decided(NamedTuple):
    """Rows that the journal refused: whether another place took them."""

    rows: int
    charge: int
    durable: bool


#: Called in the event loop: the batch, the journal's `end` behind it, and why it was not written.
Written = Callable[[Sequence[Entry], int, JournalError | None], None]
_Job = list[Entry] | _Drop | _Decided | None

#: A batch does not wait longer for more rows, seconds.
_MOST_GATHER_S = 0.005
#: A disk is slow once the event loop's writes take longer than this on average, seconds, the last one
#: counting a sixteenth; for so long the thread writes then, until the event loop tries again.
_QUICK_S, _WEIGHT, _APART_S = 0.001, 1 / 16, 5.0


class Scribe:
    """Owns the journal between `start` and `stop`; its other methods are called in the event loop."""

    def __init__(self, journal: Journal, tally: Tally | None, written: Written) -> None:
        self._journal, self._tally, self._written = journal, tally, written
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        #: Rows of the next batch; whether it waits for more, or another batch is with the thread.
        self._next: list[Entry] = []
        self._gathering = self._writing = False
        self._gathers_until = 0.0
        #: Held by whoever is at the journal.
        self._at_journal = threading.Lock()
        #: How long the event loop's writes take, seconds, and until when it leaves them to the thread.
        self._write_s, self._apart_until = 0.0, float("-inf")
        self._thread = threading.Thread(target=self._run, name="hearth-journal", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def put(self, entry: Entry, *, under_way: int = 1) -> None:
        """Hands a row over; `written` tells of it. `under_way`: requests whose rows may come soon."""
        self._next.append(entry)
        if self._gathering or self._writing:
            return
        if under_way <= 1:
            self._write_next()
            return
        self._gathering = True
        self._gathers_until = time.monotonic() + _MOST_GATHER_S
        self._loop.call_soon(self._gather, 0)

    def _gather(self, before: int) -> None:
        """Once in each round of the event loop; `before`: how many rows there were in the one before."""
        rows = len(self._next)
        if rows > before and time.monotonic() < self._gathers_until:
            self._loop.call_soon(self._gather, rows)
            return
        self._gathering = False
        self._write_next()

    def _write_next(self) -> None:
        """Writes what waits, or has the thread do it."""
        if not self._next or self._writing:
            return
        entries, self._next = self._next, []
        began = time.monotonic()
        if began < self._apart_until or not self._at_journal.acquire(blocking=False):
            self._writing = True
            self._jobs.put(entries)
            return
        try:
            error = self._append(entries)
            end = self._journal.end
        finally:
            self._at_journal.release()
        ended = time.monotonic()
        self._write_s += _WEIGHT * (ended - began - self._write_s)
        if self._write_s > _QUICK_S:
            self._write_s, self._apart_until = 0.0, ended + _APART_S
        self._written(entries, end, error)

    def _done(self, entries: Sequence[Entry], end: int, error: JournalError | None) -> None:
        """In the event loop: a batch was written."""
        self._writing = False
        self._written(entries, end, error)
        if not self._gathering:
            self._write_next()

    def drop(self, position: int) -> None:
        """The rows before this `end` of the journal are in the database."""
        self._jobs.put(_Drop(position))

    def decided(self, rows: int, charge: int, *, durable: bool) -> None:
        """After `written` told of an error: whether the rows are durable all the same."""
        self._jobs.put(_Decided(rows, charge, durable))

    async def stop(self) -> None:
        """Writes what was handed over before, then ends the thread."""
        # What is with the thread is told of by `_done`, which may have another batch.
        if self._next:
            self._jobs.put(self._next)
            self._next = []
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        going = True
        while going:
            jobs = self._take()
            entries = [entry for job in jobs if isinstance(job, list) for entry in job]
            if entries:
                self._write(entries)
            for job in jobs:
                if isinstance(job, _Decided) and self._tally is not None:
                    with self._at_journal:
                        self._tally.end(job.rows, job.charge, durable=job.durable)
            position = max((job.position for job in jobs if isinstance(job, _Drop)), default=0)
            if position:
                self._drop(position)
            going = None not in jobs

    def _take(self) -> list[_Job]:
        """All jobs that wait, at least one."""
        jobs = [self._jobs.get()]
        while True:
            try:
                jobs.append(self._jobs.get_nowait())
            except Empty:
                return jobs

    def _write(self, entries: list[Entry]) -> None:
        with self._at_journal:
            error = self._append(entries)
            end = self._journal.end
        try:
            self._loop.call_soon_threadsafe(self._done, entries, end, error)
        except RuntimeError:
            # The loop was closed without a `close` of the writer: nobody waits any more; the rows are safe.
            log.warning("%d rows were journaled after their event loop had ended.", len(entries))

    def _append(self, entries: Sequence[Entry]) -> JournalError | None:
        """Writes a batch; why it was not written, if so. By whoever holds the journal."""
        rows, charge = len(entries), sum(entry.charge for entry in entries)
        if self._tally is not None:
            self._tally.begin(rows)
        try:
            self._journal.append([entry.data for entry in entries])
        except JournalError as failure:
            return failure
        if self._tally is not None:
            self._tally.end(rows, charge, durable=True)
        return None

    def _drop(self, position: int) -> None:
        try:
            with self._at_journal:
                self._journal.drop(position)
        except JournalError as error:
            log.warning("%s", error)
