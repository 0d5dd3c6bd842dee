"""After a death: a dead worker's journal goes into the ledger, then its leases are settled.

Both happen while the recoverer holds the journal's lock, which it can only get once the worker is dead. Each
step can be done again after a crash of the recoverer: the file goes last.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from engine.metering.database import Database
from engine.metering.journal import SUFFIX, Journal, JournalError, JournalHeldError, left_behind
from engine.metering.lease_store import settle_worker
from engine.metering.ledger import write_rows
from engine.metering.rows import decode, new_life

log = logging.getLogger("hearth.ledger")
_ROWS_AT_ONCE = 500


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


async def recover(database: Database, folder: Path, *, most_bytes: int) -> list[Recovered]:
    """Settles every dead worker of this machine; those that live are left alone.

    Raises:
        DatabaseError: the database failed; what is not settled yet stays for the next time.
    """
    done: list[Recovered] = []
    for journal in left_behind(folder, most_bytes=most_bytes):
        try:
            done.append(await _recover_one(database, journal))
        finally:
            journal.close()
    return done


async def _recover_one(database: Database, journal: Journal) -> Recovered:
    worker = journal.file.name.removesuffix(SUFFIX)
    rows = [decode(record) for record in await asyncio.to_thread(journal.records)]
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        await write_rows(database, rows[start : start + _ROWS_AT_ONCE])
    leases = await settle_worker(database, worker)
    await asyncio.to_thread(journal.remove)
    if rows:
        log.info("Worker %s died with %d rows in its journal: they are in the ledger now.", worker, len(rows))
    return Recovered(worker, len(rows), leases)


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
        await asyncio.to_thread(journal.remove)
    finally:
        journal.close()
