"""What a work emits while it runs, as an async iterator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any


class Stream(AsyncIterator[Any]):
    """What a running work emits. ``aclose`` (or cancelling the task that waits in it) gives the work up."""

    def __init__(
        self, arrived: asyncio.Queue[Any], answer: asyncio.Future[Any], leave: Callable[[], None]
    ) -> None:
        self._arrived = arrived
        self._answer = answer
        self._leave = leave

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        if self._arrived.empty() and not self._answer.done():
            getter = asyncio.ensure_future(self._arrived.get())
            try:
                await asyncio.wait([getter, self._answer], return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                getter.cancel()
                self._leave()
                raise
            if getter.done():
                return getter.result()
            getter.cancel()
        # Emits were scheduled on the loop before the answer was, so none can come after it.
        if not self._arrived.empty():
            return self._arrived.get_nowait()
        self._leave()
        if self._answer.cancelled():
            raise StopAsyncIteration
        error = self._answer.exception()
        if error is not None:
            raise error
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Gives the work up if it still waits or runs; harmless afterwards."""
        self._leave()
