"""Metering as a gateway worker does it: its books, limits and retries, opened and closed together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine.config import Config
from engine.gateway.exchange import Exchange, Send
from engine.gateway.meter import Meter
from engine.gateway.metrics import GatewayMetrics
from engine.gateway.retries import IDEMPOTENCY_KEY, Retries
from engine.gateway.terms import ANONYMOUS, Headers
from engine.metering.books import Books
from engine.metering.database import Database
from engine.metering.housekeeping import Housekeeping
from engine.metering.idempotency import Idempotency, Recorded
from engine.metering.keyring import Caller
from engine.metering.limits import Limits
from engine.routes import ModelRoute

#: After a request's time is up, how long its Idempotency-Key counts as in use, seconds.
_CLAIM_GRACE_S = 60.0
#: Pause between two looks at how the ledger stands, seconds.
_LOOK_S = 1.0


class Charging:
    """Draws tickets for requests, and knows what became of earlier tries of them."""

    def __init__(
        self,
        books: Books,
        limits: Limits,
        retries: Retries,
        metrics: GatewayMetrics,
        now_ms: Callable[[], int],
    ) -> None:
        self.books = books
        self._limits = limits
        self._retries = retries
        self._meter = Meter(books, limits, now_ms=now_ms)
        self._watch = asyncio.create_task(self._tell(metrics))

    @classmethod
    async def open(
        cls,
        config: Config,
        database: Database,
        housekeeping: Housekeeping,
        metrics: GatewayMetrics,
        now_ms: Callable[[], int],
    ) -> Charging:
        """Begins a life of this worker's books. The database may be away.

        Raises:
            JournalError, CountsError: the state or runtime folder cannot be written.
        """
        books = await Books.open(config, database)
        limits = Limits(config.runtime_dir / "limits")
        stale_s = config.gateway.request_timeout_s + _CLAIM_GRACE_S
        store = Idempotency(database, books.worker, folder=books.folder, stale_s=stale_s)
        housekeeping.also(store.purge)
        return cls(books, limits, Retries(store), metrics, now_ms)

    async def close(self) -> None:
        """Ends it: what was recorded is folded in, what was leased is settled."""
        self._watch.cancel()
        await self._retries.close()
        await self.books.close()
        self._limits.close()

    def headers(self, caller: Caller, status: int) -> Headers:
        """The lines about the caller's limits in an answer that costs nothing."""
        return self._meter.headers(caller, status)

    async def admitted(self, exchange: Exchange, send: Send, route: ModelRoute, body: bytes) -> bool:
        """Draws the request's ticket; False: it has been answered from the record of an earlier try.

        Raises:
            ApiError: the caller's plan does not allow it now, or nobody can say.
        """
        caller = exchange.caller or ANONYMOUS
        if IDEMPOTENCY_KEY not in exchange.headers:
            ticket = await self._meter.admit(exchange, caller, route, request_id=exchange.own_id)
        else:
            path: str = exchange.scope["path"]
            attempt = await self._retries.claim(exchange, caller.key.id, path, body, exchange.own_id)
            if isinstance(attempt, Recorded):
                await _replay(send, attempt)
                return False
            try:
                ticket = await self._meter.admit(
                    exchange,
                    caller,
                    route,
                    request_id=attempt.request_id,
                    attempt=attempt,
                    charged=not attempt.charged_before,
                )
            except BaseException:
                await attempt.drop()
                raise
        exchange.ticket, exchange.standing = ticket, ticket.headers
        return True

    async def _tell(self, metrics: GatewayMetrics) -> None:
        """Has `/metrics` tell how the ledger stands."""
        while True:
            metrics.ledger(self.books.writer.backlog, away=self.books.writer.away)
            await asyncio.sleep(_LOOK_S)


async def _replay(send: Send, kept: Recorded) -> None:
    """The answer of an earlier try; nothing is charged for it again."""
    headers = [*kept.headers, (b"content-length", b"%d" % len(kept.body)), (b"x-hearth-replayed", b"true")]
    await send({"type": "http.response.start", "status": kept.status, "headers": headers})
    await send({"type": "http.response.body", "body": kept.body})
