"""After a death: a dead worker's journal goes into the ledger, then its leases are settled.

Both happen while the recoverer holds the journal's lock, which it can only get once the worker is dead. Each
step can be done again after a crash of the recoverer: the file goes last.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
from sqlalchemy import func, select

from engine.metering import schema
from engine.metering.counters import SUFFIX as COUNTERS
from engine.metering.counters import read_counters
from engine.metering.database import Database
from engine.metering.inserting import write_encoded
from engine.metering.journal import SUFFIX, Journal, JournalError, JournalHeldError, left_behind
from engine.metering.retention import end, has_ended
from engine.metering.rows import new_life
from engine.metering.settlement import settle_worker

log = logging.getLogger("hearth.ledger")
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Recovered:
    """What was found of one dead worker: rows in its journal, and leases."""

    worker: str
    rows: int
    leases: int


def begin_life(folder: Path, *, most_bytes: int) -> tuple[str, Journal]:
    """A new life and its journal, which exists before anything is leased or written.

    Raises:
        JournalError: the folder cannot be written.
    """
    while True:
        worker = new_life()
        try:
            return worker, Journal(folder / f"{worker}{SUFFIX}", most_bytes=most_bytes)
        except JournalHeldError:
            # A recoverer took the empty file between its making and its locking for a dead worker's.
            continue


async def recover(
    database: Database, folder: Path, *, most_bytes: int, unreadable: set[str] | None = None
) -> list[Recovered]:
    """Settles every dead worker of this machine; those that live are left alone.

    `unreadable` names workers whose journal could not be read before: they are left for a person.

    Raises:
        DatabaseError: the database failed; what is not settled yet stays for the next time.
    """
    done: list[Recovered] = []
    unreadable = set() if unreadable is None else unreadable
    for journal in left_behind(folder, most_bytes=most_bytes, but=unreadable):
        try:
            done.append(await _recover_one(database, journal))
        except (JournalError, msgspec.DecodeError, OSError) as error:
            unreadable.add(journal.worker)
            log.error("%s is kept for a person to look at: %s", journal.file, error)
        finally:
            journal.close()
    return done


async def _recover_one(database: Database, journal: Journal) -> Recovered:
    worker, rows = journal.worker, 0
    # One who was stopped before the removal: its rows may have become sums since.
    if not await has_ended(database, worker):
        records = await asyncio.to_thread(journal.records)
        rows = len(records)
        for start in range(0, rows, _ROWS_AT_ONCE):
            await write_encoded(database, records[start : start + _ROWS_AT_ONCE])
    leases = await settle_worker(database, worker)
    await end(database, worker)
    await asyncio.to_thread(journal.remove)
    if rows:
        log.info("Worker %s died with %d rows in its journal: they are in the ledger now.", worker, rows)
    return Recovered(worker, rows, leases)


async def end_life(database: Database, worker: str, journal: Journal) -> None:
    """A worker ends in order, after its writer is closed: its leases are settled and its journal goes.

    A journal that still holds rows, or a database that is away, leaves both to `recover`.

    Raises:
        JournalError, DatabaseError: as above; the journal is let go of either way.
    """
    try:
        if journal.size:
            raise JournalError(
                f"{journal.file} still holds rows: they are folded in once the database is back."
            )
        await settle_worker(database, worker)
        await end(database, worker)
        await asyncio.to_thread(journal.remove)
    finally:
        journal.close()


async def sweep_counters(database: Database, folder: Path, *, keep_s: float = 7 * 86400.0) -> list[str]:
    """Removes the counters of lives that ended and agree with the ledger; others after `keep_s`.

    Raises:
        DatabaseError: the database failed; they stay for the next time.
    """
    table, gone = schema.ledger, []
    for counters in await asyncio.to_thread(read_counters, folder):
        file = folder / f"{counters.worker}{COUNTERS}"
        if (folder / f"{counters.worker}{SUFFIX}").exists():
            continue
        async with database.reading() as connection:
            found = await connection.execute(
                select(func.count(), func.coalesce(func.sum(table.c.charge), 0)).where(
                    table.c.worker == counters.worker
                )
            )
            rows, charge = found.one()
        agree = counters.recorded <= rows <= counters.recorded + counters.waiting
        agree = agree and (rows != counters.recorded or int(charge) == counters.charge)
        with contextlib.suppress(FileNotFoundError):
            if agree or time.time() - file.stat().st_mtime > keep_s:
                file.unlink()
                gone.append(counters.worker)
    return gone
