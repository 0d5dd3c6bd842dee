"""Requests with an `Idempotency-Key`: answered and charged once, however often they are sent."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ApiError
from engine.gateway.exchange import Exchange
from engine.gateway.terms import Headers
from engine.metering.database import DatabaseError
from engine.metering.idempotency import Claimed, Idempotency, InProgress, Mismatch, Recorded
from engine.metering.idempotency_http import check_idempotency_key, hash_request, refusal

#: The header of a request, lower case.
IDEMPOTENCY_KEY = b"idempotency-key"
#: Of the answer's head these are kept for a retry.
_KEPT = (b"content-type",)


@dataclass
class Attempt:
    """One try under a key: see `engine.gateway.ticket.Attempt`."""

    store: Idempotency
    key_id: str
    idem_key: str
    request_id: str
    #: Whether an earlier try was charged.
    charged_before: bool

    async def complete(self, status: int, headers: Headers, body: bytes | None) -> None:
        kept = [(name, value) for name, value in headers if name.lower() in _KEPT]
        await self.store.complete(self.key_id, self.idem_key, status, kept, body)

    async def drop(self) -> None:
        await self.store.drop(self.key_id, self.idem_key)


class Retries:
    """Claims keys for requests, or finds what became of an earlier try."""

    def __init__(self, store: Idempotency) -> None:
        self._store = store

    async def close(self) -> None:
        """Says to the database what it has not been told yet."""
        await self._store.close()

    async def claim(
        self, exchange: Exchange, key_id: str, path: str, body: bytes, request_id: str
    ) -> Attempt | Recorded:
        """The try that this request with the header is, or the kept answer of an earlier one.

        Raises:
            ApiError: 400 for a key that is none, 409 while the first try is still being answered, 422
                where the key was used for another request, 503 while the records cannot be read.
        """
        idem_key = check_idempotency_key(exchange.headers[IDEMPOTENCY_KEY])
        digest = await hash_request(path, exchange.headers.get(b"content-type", b""), body)
        try:
            found = await self._store.claim(key_id, idem_key, digest, request_id)
        except DatabaseError as error:
            raise ApiError(
                503,
                "Whether this Idempotency-Key was used before cannot be read at this moment: the server's "
                "database is away. Nothing was charged; try again in a few seconds.",
                code="idempotency_unavailable",
                headers={"retry-after": "2", "retry-after-ms": "2000"},
            ) from error
        if isinstance(found, (InProgress, Mismatch)):
            raise refusal(found)
        if isinstance(found, Claimed):
            return Attempt(self._store, key_id, idem_key, found.request_id, found.charged)
        return found
