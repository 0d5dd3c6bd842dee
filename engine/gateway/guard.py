"""Stops the work on a request whose client has gone."""

from __future__ import annotations

import asyncio
from types import TracebackType

from engine.gateway.exchange import ClientGoneError, Exchange, Receive


class WhileClientWaits:
    """`async with`: the block is cancelled, and ClientGoneError raised, once the client closes.

    The request's body must have been read: what `receive` still tells is the disconnect alone.
    """

    __slots__ = ("_exchange", "_gone", "_receive", "_task", "_watcher")

    def __init__(self, receive: Receive, exchange: Exchange) -> None:
        self._receive = receive
        self._exchange = exchange
        self._gone = False
        self._task: asyncio.Task[object] | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        self._task = asyncio.current_task()
        self._watcher = asyncio.create_task(self._watch())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Nothing is awaited here: a cancel that the watcher has asked for has always struck inside the block.
        watcher, task = self._watcher, self._task
        # The tasks know this object: let go of, all three are freed at once.
        self._watcher = self._task = None
        if watcher is not None:
            watcher.cancel()
        if self._gone and task is not None:
            task.uncancel()
            raise ClientGoneError from None

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        # A server says "disconnect" after a complete answer too.
        if not self._exchange.complete and self._task is not None:
            self._gone = True
            self._task.cancel()
