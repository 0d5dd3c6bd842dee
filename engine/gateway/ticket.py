"""One admitted request: what it holds of limits and budgets, and how it ends: settled once, or given up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from engine.errors import ApiError
from engine.gateway.terms import Headers
from engine.gateway.tokens import NONE, Tokens
from engine.metering.accounts import Account
from engine.metering.books import Books
from engine.metering.journal import JournalError
from engine.metering.rows import Form

log = logging.getLogger("hearth.gateway")


class Attempt(Protocol):
    """One try of a request that bears an Idempotency-Key."""

    async def complete(self, status: int, headers: Headers, body: bytes | None) -> None:
        """It was answered; `body` is None where the answer is not kept."""

    async def drop(self) -> None:
        """It was not answered: a retry is a new request."""


class Ticket(msgspec.Struct):
    """What `Meter.admit` gives; `settle` or `release` ends it, whichever comes first."""

    books: Books
    #: What goes into the row if it is answered; `at` in Unix milliseconds.
    form: Form
    request_id: str
    at: int
    charge: int
    included: bool
    #: What is held of each account until the request ends.
    taken: Sequence[tuple[Account, int]]
    #: The lines about limits and charge in the head of an answer with this status.
    headers: Callable[[int], Headers]
    on_end: Callable[[], None]
    #: False: an earlier try of the same request was charged already; this one is not recorded again.
    charged: bool = True
    attempt: Attempt | None = None
    tokens: Tokens = NONE
    bytes_in: int = 0
    began: float = 0.0
    ended: bool = False

    async def settle(
        self,
        how: str = "answered",
        *,
        status: int = 200,
        headers: Headers | None = None,
        body: bytes | None = None,
    ) -> None:
        """Makes the request's row durable: to be awaited before the last byte is sent. Harmless again.

        Args:
            how: "answered", or "left" where the client went away after the first byte.
            status: the answer's.
            headers: the answer's, kept for a retry with the same Idempotency-Key.
            body: the whole answer where it may be kept; None for a stream.

        Raises:
            ApiError: 503 `ledger_unavailable`: it could not be recorded, and must not be answered.
        """
        if self.ended:
            return
        self.ended = True
        written = False
        row: bytes | None = None
        try:
            if self.charged:
                row = self._row(how)
                await self.books.writer.record_encoded(row, self.charge, reserved=True)
            else:
                self.books.writer.release()
            written = True
        except (JournalError, ValueError) as error:
            if row is None:
                # It cannot be written down, so nobody has given back its room in the journal.
                self.books.writer.release()
            log.error("%s could not be recorded: %s", self.request_id, error)
            await self._drop()
            raise unavailable() from error
        except asyncio.CancelledError:
            # The client went while the row was on its way to the disk: it is written all the same.
            written = True
            await self._complete(status, headers, body)
            raise
        finally:
            end = self.books.wallet.spend if written else self.books.wallet.put_back
            for account, cost in self.taken:
                end(account, cost)
            self.on_end()
        if self.attempt is not None:
            await self._complete(status, headers, body)

    async def release(self) -> None:
        """The request was not answered: nothing is charged. Harmless after `settle`."""
        if self.ended:
            return
        self.ended = True
        self.books.writer.release()
        for account, cost in self.taken:
            self.books.wallet.put_back(account, cost)
        self.on_end()
        await self._drop()

    async def _complete(self, status: int, headers: Headers | None, body: bytes | None) -> None:
        if self.attempt is not None:
            await self.attempt.complete(status, headers or [], body)

    async def _drop(self) -> None:
        if self.attempt is not None:
            await self.attempt.drop()

    def _row(self, how: str) -> bytes:
        return self.form.encode(
            self.request_id,
            self.charge,
            self.included,
            self.at,
            self.tokens.prompt,
            self.tokens.completion,
            bytes_in=self.bytes_in,
            ms=round((time.perf_counter() - self.began) * 1000),
            status=how,
        )


def unavailable() -> ApiError:
    """The 503 where requests cannot be recorded."""
    return ApiError(
        503,
        "The server cannot record requests at this moment, so it answers none: nothing was charged. "
        "Try again in a few seconds; the operator finds the reason in the gateway's log.",
        code="ledger_unavailable",
        headers={"retry-after": "5", "retry-after-ms": "5000"},
    )
