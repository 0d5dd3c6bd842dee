"""Writes the ledger: a row is durable, in the database or in the local journal, before `record` returns.

Rows that wait together are written together: while one flush is at the disk the next batch gathers, so the
number of flushes follows the disk and not the number of requests. A database that fails or hangs is replaced
by the journal at once; it is tried again every `retry_s`, and what the journal holds is then folded in. A row
that is written twice (after a commit whose answer was lost, say) counts once, by its request id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Insert
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering import schema
from engine.metering.database import Database, DatabaseError
from engine.metering.journal import HEAD_BYTES, Journal, JournalError, JournalFullError
from engine.metering.rows import MOST_ROW_BYTES, LedgerRow, decode, encode

log = logging.getLogger("hearth.ledger")

#: Rows of one statement: a batch larger than this is several statements of one transaction.
_ROWS_AT_ONCE = 500
#: What a database can fail with: its own errors, and taking too long.
FAILURES = (DatabaseError, SQLAlchemyError, OSError, TimeoutError)


@dataclass
class Counters:
    """What a writer did since it began; compared with the ledger by `verify`."""

    worker: str
    #: Unix milliseconds when it began.
    since: int
    #: Rows for which `record` returned, and the sum of their charges.
    recorded: int = 0
    charge: int = 0
    #: Rows that are waiting to become durable.
    waiting: int = 0
    #: How rows became durable, and how many were folded in from the journal later.
    to_database: int = 0
    to_journal: int = 0
    folded: int = 0
    #: Flushes to the database: rows divided by these is the size of a batch.
    flushes: int = 0


class LedgerWriter:
    """One worker's writer; made and used in one event loop, `start`ed before use and `close`d after it."""

    def __init__(
        self,
        database: Database,
        journal: Journal,
        *,
        worker: str,
        retry_s: float = 0.5,
        patience_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`patience_s`: a flush that takes longer goes to the journal."""
        self._database = database
        self._journal = journal
        self._retry_s, self._patience_s, self._clock = retry_s, patience_s, clock
        self._waiting: list[tuple[LedgerRow, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._disk = asyncio.Lock()
        self._reserved = 0
        self._away_until = float("-inf")
        self._tasks: list[asyncio.Task[None]] = []
        self._late: set[asyncio.Task[None]] = set()
        self._closing = False
        self.counters = Counters(worker, since=time.time_ns() // 1_000_000)

    @property
    def away(self) -> bool:
        """Whether the database failed a moment ago."""
        return self._clock() < self._away_until

    def start(self) -> None:
        """Begins to write, and to fold in what this journal holds already."""
        self._tasks = [asyncio.create_task(self._flush_forever()), asyncio.create_task(self._fold_forever())]

    async def close(self) -> None:
        """Makes what waits durable, folds the journal in if the database is there, and ends."""
        self._closing = True
        self._wake.set()
        if self._tasks:
            flusher, folder = self._tasks
            await flusher
            folder.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await folder
        if self._late:
            await asyncio.wait(set(self._late))
        await self.fold()

    def reserve(self) -> None:
        """Before a request is sent on: makes sure that its row will have room in the journal.

        Each success is followed by one `record(…, reserved=True)` or one `release`.

        Raises:
            JournalFullError: it might have none; refuse the request (503).
        """
        needed = (self._reserved + 1) * (MOST_ROW_BYTES + HEAD_BYTES)
        if self._journal.size + needed > self._journal.most_bytes:
            raise JournalFullError(
                "the ledger's database is away and the local journal has no room for another request: "
                "bring the database back, or give `metering.journal_bytes` more."
            )
        self._reserved += 1

    def release(self) -> None:
        """The request that reserved is not recorded."""
        self._reserved -= 1

    async def record(self, row: LedgerRow, *, reserved: bool = False) -> None:
        """Returns once the row is durable. A cancelled caller's row is written all the same.

        Raises:
            JournalError: neither the database nor the journal took it: the request must not be answered as
                if it were counted.
            ValueError: the row is too large.
        """
        try:
            encode(row)
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            # A caller that was cancelled will not look at a failure: that is no forgotten exception.
            done.add_done_callback(lambda future: future.cancelled() or future.exception())
            self._waiting.append((row, done))
            self.counters.waiting += 1
            self._wake.set()
            await asyncio.shield(done)
        finally:
            if reserved:
                self.release()

    async def _flush_forever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                batch, self._waiting = self._waiting, []
                await self._flush(batch)
            if self._closing:
                return

    async def _flush(self, batch: list[tuple[LedgerRow, asyncio.Future[None]]]) -> None:
        rows = [row for row, _ in batch]
        failure: JournalError | None = None
        if await self._to_database(rows):
            self.counters.to_database += len(rows)
        else:
            failure = await self._to_journal(rows)
        self.counters.waiting -= len(rows)
        if failure is None:
            self.counters.recorded += len(rows)
            self.counters.charge += sum(row.charge for row in rows)
        for _, done in batch:
            if failure is None:
                done.set_result(None)
            else:
                done.set_exception(failure)

    async def _to_database(self, rows: Sequence[LedgerRow]) -> bool:
        if self.away:
            return False
        try:
            await self._write(rows)
        except FAILURES as error:
            self._away_until = self._clock() + self._retry_s
            log.warning("The ledger's database is away, the journal takes over: %s", error)
            return False
        self.counters.flushes += 1
        return True

    async def _write(self, rows: Sequence[LedgerRow]) -> None:
        """Writes to the database, or raises TimeoutError when `patience_s` is over.

        What took too long is not waited for: a SQLite driver cannot be interrupted while it waits for a lock.
        It may still succeed; the rows are then there already when the journal is folded in.
        """
        task = asyncio.create_task(write_rows(self._database, rows))
        await asyncio.wait({task}, timeout=self._patience_s)
        if task.done():
            task.result()
            return
        self._late.add(task)
        task.add_done_callback(self._late.discard)
        task.add_done_callback(lambda late: late.cancelled() or late.exception())
        task.cancel()
        raise TimeoutError(f"the database did not answer within {self._patience_s:g} s")

    async def _to_journal(self, rows: Sequence[LedgerRow]) -> JournalError | None:
        async with self._disk:
            try:
                await asyncio.to_thread(self._journal.append, [encode(row) for row in rows])
            except JournalError as error:
                log.error("%d answered requests could not be recorded: %s", len(rows), error)
                return error
        self.counters.to_journal += len(rows)
        return None

    async def _fold_forever(self) -> None:
        while True:
            if self._journal.size and not self.away:
                await self.fold()
            await asyncio.sleep(self._retry_s)

    async def fold(self) -> bool:
        """Moves the journal's rows into the database; False: the database is away, they stay.

        Rows that are added meanwhile stay for the next time, and all are folded again then: those that are
        in the ledger already count once.
        """
        async with self._disk:
            size = self._journal.size
            records = await asyncio.to_thread(self._journal.records) if size else []
        try:
            rows = [decode(record) for record in records]
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                await self._write(rows[start : start + _ROWS_AT_ONCE])
            async with self._disk:
                if size and self._journal.size == size:
                    await asyncio.to_thread(self._journal.clear)
                    self.counters.folded += len(rows)
        except FAILURES as error:
            self._away_until = self._clock() + self._retry_s
            log.info("The journal waits for the database: %s", error)
            return False
        except (JournalError, msgspec.DecodeError) as error:
            log.error("The journal %s cannot be folded in: %s", self._journal.file, error)
            return False
        return True


async def write_rows(database: Database, rows: Sequence[LedgerRow]) -> None:
    """Adds rows in one transaction; those whose request id is there already are left as they are.

    Raises:
        DatabaseError, SQLAlchemyError, OSError: nothing is known to be written.
    """
    async with database.writing() as connection:
        await insert_rows(connection, rows)


async def insert_rows(connection: AsyncConnection, rows: Sequence[LedgerRow]) -> None:
    """As `write_rows`, within a transaction of the caller."""
    # In one order everywhere: two PostgreSQL transactions with common rows then wait instead of deadlocking.
    ordered = sorted(rows, key=lambda row: row.request_id)
    statement = insert_ignoring(connection, schema.ledger)
    for start in range(0, len(ordered), _ROWS_AT_ONCE):
        values = [msgspec.structs.asdict(row) for row in ordered[start : start + _ROWS_AT_ONCE]]
        await connection.execute(statement, values)


def insert_ignoring(connection: AsyncConnection, table: Any) -> Insert:
    """An insert that leaves a row with the same primary key as it is, in the connection's dialect."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement: Insert = dialect.insert(table).on_conflict_do_nothing(index_elements=list(table.primary_key))
    return statement
