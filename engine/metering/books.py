"""One gateway worker's books: its journal, its writer, its wallet, and the upkeep of what dead workers left.

A worker's life begins with a journal of its own, held under a lock. Every worker looks for journals whose
lock is free: their workers are dead, and what they left is folded in and settled by whoever comes first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from engine.config import Config
from engine.metering.counters import Tally
from engine.metering.database import Database
from engine.metering.journal import Journal, JournalError
from engine.metering.lease_store import LeaseStore
from engine.metering.ledger import FAILURES, LedgerWriter
from engine.metering.recovery import begin_life, end_life, recover, sweep_counters
from engine.metering.settlement import settle_expired
from engine.metering.wallet import Wallet

log = logging.getLogger("hearth.ledger")

#: How long a lease lasts without renewal, and how long after that it is settled by others.
LASTS_S, GRACE_S = 6 * 3600.0, 86_400.0
#: Pauses between two looks for dead workers, two renewals, and two looks for what lost machines left.
_RECOVER_S, _RENEW_S, _SWEEP_S = 2.0, 600.0, 3600.0
#: Pause after the database failed; longest wait for it at the end.
_RETRY_S, _PATIENCE_S = 5.0, 5.0


class Books:
    """One life of a worker; made and closed in one event loop.

    writer: `reserve`, `record`, `release`. wallet: `take`, `acquire`, `spend`, `put_back`, `remaining`.
    """

    def __init__(
        self,
        database: Database,
        journal: Journal,
        tally: Tally,
        *,
        write_through: bool = False,
        workers: int = 1,
        recover_s: float = _RECOVER_S,
    ) -> None:
        """`journal`: as `begin_life` makes it. `workers`: about how many share a budget."""
        self.worker = journal.worker
        self.database = database
        self.folder: Path = journal.file.parent
        self._journal, self._tally, self._recover_s = journal, tally, recover_s
        self.writer = LedgerWriter(
            database, journal, worker=self.worker, tally=tally, write_through=write_through
        )
        store = LeaseStore(database, self.worker, lasts_s=LASTS_S)
        self.wallet = Wallet(store, workers=workers, flush=self.flush)
        self._unreadable: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def open(cls, config: Config, database: Database, *, recover_s: float = _RECOVER_S) -> Books:
        """Begins a life in `config.ledger_dir`. The database may be away.

        Raises:
            JournalError: the folder or the journal cannot be written.
        """
        folder = config.ledger_dir
        worker, journal = await asyncio.to_thread(
            begin_life, folder, most_bytes=config.metering.journal_bytes
        )
        try:
            tally = Tally(folder, worker)
        except OSError as error:
            journal.remove()
            raise JournalError(
                f"the counters in {folder} cannot be made: {error.strerror}. Free the disk, or mend its "
                "rights."
            ) from error
        books = cls(
            database,
            journal,
            tally,
            write_through=config.metering.write_through,
            workers=config.gateway.workers,
            recover_s=recover_s,
        )
        books.start()
        return books

    def start(self) -> None:
        """Begins to write and to keep things in order."""
        self.writer.start()
        upkeep: tuple[tuple[Callable[[], Awaitable[object]], float], ...] = (
            (self._recover, self._recover_s),
            (self.wallet.renew, _RENEW_S),
            (self._sweep, _SWEEP_S),
        )
        self._tasks = [asyncio.create_task(_again(work, pause_s)) for work, pause_s in upkeep]
        self._tasks.append(asyncio.create_task(self.wallet.run()))

    async def flush(self) -> bool:
        """Brings all rows that were recorded before into the database; False: it is away, they stay."""
        return await self.writer.flush()

    async def close(self) -> None:
        """Ends the life: rows are folded in, leases settled. What the database cannot take now is kept."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.writer.close()
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await self.wallet.close()
                await end_life(self.database, self.worker, self._journal)
                await sweep_counters(self.database, self.folder)
        except (JournalError, *FAILURES) as error:
            log.warning("The next worker settles what %s leaves: %s", self.worker, error)
        finally:
            self._journal.close()
            self._tally.close()

    async def _recover(self) -> None:
        done = await recover(
            self.database,
            self.folder,
            most_bytes=self._journal.most_bytes,
            unreadable=self._unreadable,
        )
        if done:
            await sweep_counters(self.database, self.folder)

    async def _sweep(self) -> None:
        for worker in await settle_expired(self.database, grace_s=GRACE_S):
            log.warning("Worker %s was not heard of for long: its leases are settled.", worker)
        await sweep_counters(self.database, self.folder)


async def _again(work: Callable[[], Awaitable[object]], pause_s: float) -> None:
    """Does it now and every `pause_s`; sooner again where the database failed."""
    while True:
        try:
            await work()
        except FAILURES as error:
            log.info("Upkeep waits for the database: %s", error)
            await asyncio.sleep(min(pause_s, _RETRY_S))
        else:
            await asyncio.sleep(pause_s)
