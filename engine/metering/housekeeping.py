"""What a gateway does for its books every few hours: old rows become sums, and what nobody asks for goes.

Every worker of every machine does it, each at a time of its own: whoever comes later finds little to do, and
whoever is killed leaves it to the next.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from engine.metering.database import Database, DatabaseError
from engine.metering.retention import first_kept, roll_up, settle_journals

log = logging.getLogger("hearth.ledger")

#: Time between two rounds, and the longest wait before the first, seconds.
EVERY_S, FIRST_S = 6 * 3600.0, 900.0


class Housekeeping:
    """One worker's task; `start` it in the event loop, `close` it before the database."""

    def __init__(
        self,
        database: Database,
        folder: Path,
        *,
        keep_months: int,
        every_s: float = EVERY_S,
        first_s: float = FIRST_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`folder` holds this machine's journals."""
        self._database, self._folder = database, folder
        self._keep_months = keep_months
        self._purges: list[Callable[[], Awaitable[object]]] = []
        self._every_s, self._first_s, self._clock = every_s, first_s, clock
        self._task: asyncio.Task[None] | None = None

    def also(self, purge: Callable[[], Awaitable[object]]) -> None:
        """Another thing to do each round, for instance `Idempotency.purge`; it may raise DatabaseError."""
        self._purges.append(purge)

    def start(self) -> None:
        self._task = asyncio.create_task(self._go_on())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def tidy(self) -> None:
        """One round.

        Raises:
            DatabaseError, OSError: the rest is left to the next round.
        """
        for purge in self._purges:
            await purge()
        await settle_journals(self._database, self._folder)
        before = first_kept(self._keep_months, int(self._clock() * 1000))
        if before is None:
            return
        done = await roll_up(self._database, before)
        if done.rows:
            months = ", ".join(done.months)
            log.info("%d rows of %s became sums (metering.keep_months).", done.rows, months)

    async def _go_on(self) -> None:
        # Workers that started together are apart from here on.
        await asyncio.sleep(self._first_s * random.random())
        while True:
            try:
                await self.tidy()
            except (DatabaseError, OSError) as error:
                log.warning("Old rows could not be looked after; the next try is in hours: %s", error)
            await asyncio.sleep(self._every_s * (0.75 + random.random() / 2))
