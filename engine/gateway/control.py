"""The gateway's calls to the scheduler's control socket."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import aiohttp

#: What a call raises while the scheduler is away, stops or does not answer in time.
AWAY: Final = (aiohttp.ClientError, OSError, TimeoutError)
_CONNECT_S = 2.0


class ControlClient:
    """Posts JSON to the control socket; cancelling a call closes its connection."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Called once, inside the running event loop; connects to nothing yet."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(self._socket), limit=0), trust_env=False
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def post(self, path: str, message: Any, *, within_s: float | None) -> tuple[int, bytes]:
        """Status and body of the answer.

        Args:
            within_s: longest it may take; None = as long as it likes.

        Raises:
            aiohttp.ClientError, OSError, TimeoutError: no answer (`AWAY`).
        """
        assert self._session is not None, "start() comes first"
        timeout = aiohttp.ClientTimeout(total=within_s, sock_connect=_CONNECT_S)
        async with self._session.post(f"http://scheduler{path}", json=message, timeout=timeout) as response:
            return response.status, await response.read()
