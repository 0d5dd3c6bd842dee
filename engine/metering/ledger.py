"""Writes the ledger: a row is durable in the local journal before `record` returns, and in the database soon.

A background task folds what the journal holds into the database every `fold_s`, many rows in one
transaction; while the database is away it tries again every `retry_s`. A row that is written twice (after a
commit whose answer was lost, say) counts once, by its request id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from engine.metering.counters import Counters as Counters
from engine.metering.counters import Tally
from engine.metering.database import Database, DatabaseError
from engine.metering.inserting import insert_ignoring as insert_ignoring
from engine.metering.inserting import insert_rows as insert_rows
from engine.metering.inserting import write_encoded
from engine.metering.inserting import write_rows as write_rows
from engine.metering.journal import HEAD_BYTES, Journal, JournalError, JournalFullError
from engine.metering.rows import MOST_ROW_BYTES, LedgerRow, encode
from engine.metering.scribe import Entry, Scribe

log = logging.getLogger("hearth.ledger")

#: Rows of one transaction of a fold: what the event loop prepares without a pause takes some milliseconds.
_ROWS_AT_ONCE = 1000
#: What a database can fail with: its own errors, and taking too long.
FAILURES = (DatabaseError, SQLAlchemyError, OSError, TimeoutError)


class LedgerWriter:
    """One worker's writer; made and used in one event loop, `start`ed before use and `close`d after it."""

    def __init__(
        self,
        database: Database,
        journal: Journal,
        *,
        worker: str,
        tally: Tally | None = None,
        write_through: bool = False,
        fold_s: float = 0.25,
        retry_s: float = 0.5,
        patience_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            tally: where this life's counters are mirrored for `verify`.
            write_through: `record` also waits for the database, unless it is away.
            fold_s: pause between two folds.
            retry_s: pause after the database failed.
            patience_s: longest wait for the database in `record` and `close`.
        """
        self._database, self._journal = database, journal
        self._write_through, self._fold_s, self._retry_s = write_through, fold_s, retry_s
        self._patience_s, self._clock = patience_s, clock
        self._scribe = Scribe(journal, tally, self._written)
        #: Batches that are in the journal and not in the database, each with the journal's end behind it.
        self._backlog: deque[tuple[list[bytes], int]] = deque()
        self._backlogged, self._journaled, self._folded = asyncio.Event(), 0, 0
        self._folding = asyncio.Lock()
        self._reserved = 0
        self._away_until = self._refuses_until = float("-inf")
        self._failing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.counters = Counters(worker, since=time.time_ns() // 1_000_000)

    @property
    def away(self) -> bool:
        """Whether the database failed a moment ago."""
        return self._clock() < self._away_until

    @property
    def backlog(self) -> int:
        """Rows that are in the journal and not in the database yet."""
        return self._journaled - self._folded

    def start(self) -> None:
        """Begins to write, and to fold in what this journal holds already.

        Raises:
            JournalError: it cannot be read.
        """
        if self._journal.size:
            self._add(self._journal.records(), self._journal.end)
        self._scribe.start()
        self._keep(self._fold_forever())

    async def close(self) -> None:
        """Makes what waits durable, folds the journal in if the database is there, and ends."""
        await self._scribe.stop()
        # What the thread told last is done when all that was scheduled before has been.
        await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.flush(), self._patience_s)
        if not self.backlog and self._journal.size:
            with contextlib.suppress(JournalError):
                await asyncio.to_thread(self._journal.drop, self._journal.end)

    def reserve(self) -> None:
        """Before a request is sent on: makes sure that its row will have room in the journal.

        Each success is followed by one `record(…, reserved=True)` or one `release`.

        Raises:
            JournalFullError: it might have none; refuse the request (503).
        """
        needed = (self._reserved + 1) * (MOST_ROW_BYTES + HEAD_BYTES)
        if self._journal.size + needed > self._journal.most_bytes:
            raise JournalFullError(
                "the ledger's database is away or slow, and the local journal has no room for another "
                "request: bring the database back, or give `metering.journal_bytes` more."
            )
        if self._clock() < self._refuses_until:
            raise JournalFullError(
                f"neither the journal {self._journal.file} nor the ledger's database can be written: see to "
                "the disk and the database."
            )
        self._reserved += 1

    def release(self) -> None:
        """The request that reserved is not recorded."""
        self._reserved -= 1

    async def record(self, row: LedgerRow, *, reserved: bool = False) -> None:
        """Returns once the row is durable. A cancelled caller's row is written all the same.

        Raises:
            JournalError: neither the journal nor the database took it: the request must not be answered as
                if it were counted.
            ValueError: the row is too large.
        """
        try:
            data = encode(row)
        except ValueError:
            if reserved:
                self.release()
            raise
        await self.record_encoded(data, row.charge, reserved=reserved)

    async def record_encoded(self, data: bytes, charge: int, *, reserved: bool = False) -> None:
        """As `record`, of a row as `rows.encode` or a `rows.Form` writes it, and its charge.

        Raises:
            JournalError: as `record`.
        """
        try:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._scribe.put(Entry(data, charge, done), under_way=self._reserved)
            self.counters.waiting += 1
            await done
            if self._write_through and not self.away:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.flush(), self._patience_s)
        finally:
            if reserved:
                self._reserved -= 1

    async def flush(self) -> bool:
        """Folds in every row that was recorded before this call; False: the database is away, they stay."""
        target = self._journaled
        async with self._folding:
            while self._folded < target:
                if not await self._fold_some():
                    return False
        return True

    def _written(self, entries: Sequence[Entry], end: int, error: JournalError | None) -> None:
        """The journal took a batch, or refused it."""
        if error is not None:
            self._keep(self._rescue(entries, error))
            return
        self.counters.to_journal += len(entries)
        self._add([entry.data for entry in entries], end)
        self._settle(entries, None)

    def _settle(self, entries: Sequence[Entry], error: JournalError | None) -> None:
        self.counters.waiting -= len(entries)
        if error is None:
            self.counters.recorded += len(entries)
            self.counters.charge += sum(entry.charge for entry in entries)
        for entry in entries:
            if entry.done.done():
                continue
            if error is None:
                entry.done.set_result(None)
            else:
                entry.done.set_exception(error)

    def _add(self, records: list[bytes], end: int) -> None:
        self._backlog.append((records, end))
        self._journaled += len(records)
        self._backlogged.set()

    async def _rescue(self, entries: Sequence[Entry], error: JournalError) -> None:
        """The journal's disk fails: the database itself is tried before the requests are."""
        try:
            await asyncio.wait_for(
                write_encoded(self._database, [entry.data for entry in entries]), self._patience_s
            )
        except FAILURES as failure:
            log.error("%d answered requests could not be recorded: %s %s", len(entries), error, failure)
            self._refuses_until = self._clock() + self._retry_s
            failed: JournalError | None = error
        else:
            self.counters.to_database += len(entries)
            failed = None
        self._scribe.decided(len(entries), sum(entry.charge for entry in entries), durable=failed is None)
        self._settle(entries, failed)

    async def _fold_forever(self) -> None:
        while True:
            await self._backlogged.wait()
            await asyncio.sleep(self._retry_s if self.away else self._fold_s)
            await self.flush()

    async def _fold_some(self) -> bool:
        """Moves some of the oldest rows into the database; whether it took them."""
        records: list[bytes] = []
        batches = 0
        for some, _ in self._backlog:
            if records and len(records) + len(some) > _ROWS_AT_ONCE:
                break
            records += some
            batches += 1
        try:
            await write_encoded(self._database, records)
        except (*FAILURES, msgspec.DecodeError) as error:
            if not self._failing:
                log.warning(
                    "%d answered requests wait in the journal for the database: %s", self.backlog, error
                )
            self._failing, self._away_until = True, self._clock() + self._retry_s
            return False
        if self._failing:
            log.info("The ledger's database is back; %d rows are folded in.", self.backlog)
        self._failing, self._away_until = False, float("-inf")
        end = [self._backlog.popleft() for _ in range(batches)][-1][1]
        self._folded += len(records)
        self.counters.folded += len(records)
        self.counters.flushes += 1
        if not self._backlog:
            self._backlogged.clear()
        self._scribe.drop(end)
        return True

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
