"""Keeps the directory in step with the scheduler's route table."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

import aiohttp
from pydantic import ValidationError

from engine.gateway.routing import Directory
from engine.routes import RouteTable

log = logging.getLogger("hearth.gateway")

#: How long one long poll waits at the scheduler, seconds.
_WAIT_S = 25.0
#: The longest wait between two tries while the scheduler is away, seconds.
_MOST_BACKOFF_S = 1.0


class RouteWatch:
    """Follows the control socket; while that is away, the table's file; and else keeps the table it has."""

    def __init__(
        self, directory: Directory, *, socket: Path, file: Path, first_backoff_s: float = 0.1
    ) -> None:
        self._directory = directory
        self._socket = socket
        self._file = file
        self._first_backoff_s = first_backoff_s
        self._stamp: tuple[int, int, int] | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Reads the file, so that the first request already finds its way, then follows."""
        self.read_file()
        self._task = asyncio.create_task(self._follow())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def read_file(self) -> bool:
        """Takes the file's table when the file has changed since it was last read; whether it did."""
        try:
            status = self._file.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp == self._stamp:
                return False
            table = RouteTable.model_validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return False
        except (OSError, ValidationError) as error:
            log.error(
                "%s cannot be read as a route table: %s. The table known before stays in use.",
                self._file,
                error,
            )
            return False
        self._stamp = stamp
        self._directory.replace(table)
        return True

    async def _follow(self) -> None:
        backoff = self._first_backoff_s
        connector = aiohttp.UnixConnector(str(self._socket))
        timeout = aiohttp.ClientTimeout(total=_WAIT_S + 10, sock_connect=2)
        away = False
        after = self._directory.version
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            while True:
                try:
                    after = await self._poll(session, after)
                except (aiohttp.ClientError, OSError, TimeoutError, ValidationError) as error:
                    if not away:
                        log.info("the scheduler is away (%s); serving on with the routes known", error)
                    away = True
                    if self.read_file():
                        after = self._directory.version
                    await asyncio.sleep(backoff)
                    backoff = min(backoff * 2, _MOST_BACKOFF_S)
                    continue
                if away:
                    log.info("the scheduler is back")
                away, backoff = False, self._first_backoff_s

    async def _poll(self, session: aiohttp.ClientSession, after: int) -> int:
        """One long poll; the version of the table held then."""
        parameters = {"after": str(after), "wait": str(_WAIT_S)}
        async with session.get("http://scheduler/routes", params=parameters) as response:
            if response.status in (204, 304):
                return after
            response.raise_for_status()
            table = RouteTable.model_validate_json(await response.read())
        # A scheduler that has just started has published nothing yet: its empty table is no news.
        if table.version != after and (table.models or not self._directory.known):
            self._directory.replace(table)
        return table.version
