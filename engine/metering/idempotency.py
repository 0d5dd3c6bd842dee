"""Retries: two requests of one key with the same Idempotency-Key are one, within a day, on every worker.

A claim is a row that its worker writes before the request goes on, and whose answer it adds at the end. Who
finds a claim of a dead worker takes it over under the same request id, so that the ledger, whose primary key
that is, counts both once whatever happens between.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering import idempotency_store as store
from engine.metering.database import Database, DatabaseError
from engine.metering.idempotency_store import Answer, Claim, Place
from engine.metering.journal import read_only
from engine.metering.lives import Life, Lives
from engine.metering.rows import decode
from engine.metering.schema import ledger

log = logging.getLogger("hearth.idempotency")

Headers = Sequence[tuple[bytes, bytes]]

#: A longer answer is not kept: a retry is served again, and not charged again.
MOST_BODY_BYTES = 1024 * 1024
#: Answers that wait for a database that is away; of more than these the bodies are not kept.
_MOST_OWED_BODIES = 64
#: Claims of which it is not known whether they were written: of more than these nothing is kept.
_MOST_OWED = 10_000


class Claimed(NamedTuple):
    """Go on, under this request id. charged: it was charged already, so it must not be charged again."""

    request_id: str
    charged: bool


class Recorded(NamedTuple):
    """It was answered: this is the answer."""

    status: int
    headers: Headers
    body: bytes
    request_id: str


class InProgress(NamedTuple):
    """Another request with this key is being answered, since so many seconds."""

    since_s: float


class Mismatch(NamedTuple):
    """The key was used for another request."""


Outcome = Claimed | Recorded | InProgress | Mismatch


class Idempotency:
    """One worker's claims; made and used in one event loop.

    Each claim is followed by one `complete` or `drop`. Both return even where the database is away: what they
    have to say is then said before the next claim.
    """

    def __init__(
        self,
        database: Database,
        worker: str,
        *,
        folder: Path,
        stale_s: float,
        lasts_s: float = 86_400,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            worker: this life of the worker, whose journal is in `folder` (as `recovery.begin_life` makes it).
            stale_s: a claim of another machine's worker that is older counts as left behind: longer than any
                request may take.
            lasts_s: how long a key is remembered.
            clock: Unix time, seconds.

        Raises:
            JournalError: the folder cannot be written.
        """
        self._database = database
        self._lives = Lives(folder)
        self._me = self._lives.name(worker)
        self._lasts_ms, self._stale_ms = round(lasts_s * 1000), round(stale_s * 1000)
        self._clock = clock
        #: Claims that are being made or answered here, by row: digest and Unix milliseconds.
        self._in_hand: dict[Place, tuple[str, int]] = {}
        #: What the database is to be told of claims; None: drop it.
        self._owed: dict[Place, Answer | None] = {}
        #: Claims that wait for the database.
        self._waiting: list[tuple[Claim, asyncio.Future[Outcome]]] = []
        #: Those who want to hear that what is owed was said.
        self._listening: list[asyncio.Future[None]] = []
        self._writer: asyncio.Task[None] | None = None
        #: Whether something came since the writer last looked.
        self._more = False

    async def claim(self, key_id: str, idem_key: str, request_hash: str, request_id: str) -> Outcome:
        """Claims the key for a request, or says what became of the one that has it.

        Raises:
            DatabaseError: the database fails (`DatabaseAwayError`: for now); nothing is claimed.
        """
        place, now = (key_id, idem_key), self._now()
        if place in self._owed:
            await self._say()
        mine = self._in_hand.get(place)
        if mine is not None:
            digest, since = mine
            return Mismatch() if digest != request_hash else _in_progress(now - since)
        self._in_hand[place] = (request_hash, now)
        claim = Claim(key_id, idem_key, request_hash, request_id)
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append((claim, future))
        self._begin_to_write()
        outcome: Outcome | None = None
        try:
            outcome = await future
        finally:
            if not isinstance(outcome, Claimed) or outcome.charged:
                del self._in_hand[place]
            if outcome is None and len(self._owed) < _MOST_OWED:
                # Cancelled, or a commit whose end is unknown: if there is a row, nobody will answer it.
                self._owed[place] = None
                if future.cancelled() or future.exception() is None:
                    self._begin_to_write()
        return outcome

    async def complete(
        self, key_id: str, idem_key: str, status: int, headers: Headers, body: bytes | None
    ) -> None:
        """The request was answered (2xx) and charged. body: None for a stream. To be called before the last
        byte is sent. A cancelled caller's answer is kept all the same.
        """
        too_many = len(self._owed) >= _MOST_OWED_BODIES
        kept = body if body is not None and len(body) <= MOST_BODY_BYTES and not too_many else None
        self._owed[key_id, idem_key] = Answer(status, headers if kept is not None else (), kept)
        await self._say_or_wait()

    async def drop(self, key_id: str, idem_key: str) -> None:
        """The request was not answered 2xx: a retry is a new request. As `complete` otherwise."""
        self._owed[key_id, idem_key] = None
        await self._say_or_wait()

    async def close(self) -> None:
        """Says what is still to be said. What cannot be said is found in the ledger by whoever asks next."""
        await self._say_or_wait()

    async def purge(self) -> int:
        """Deletes what is no longer remembered; how many. To be called now and then (each hour, say).

        Raises:
            DatabaseError: the database fails; the rest stays for the next time.
        """
        now, deleted, done = self._now(), 0, False

        def lives(worker: str) -> bool:
            return self._lives.look(worker) is Life.ALIVE

        while not done:
            async with self._database.writing() as connection:
                gone, done = await store.purge_some(
                    connection, now - self._lasts_ms, now + self._lasts_ms, lives
                )
            deleted += gone
        return deleted

    async def _say(self) -> None:
        """Returns once the database knows what is owed; its errors are raised, and it stays owed."""
        heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # A caller that was cancelled will not look at a failure: that is no forgotten exception.
        heard.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._listening.append(heard)
        self._begin_to_write()
        await asyncio.shield(heard)

    async def _say_or_wait(self) -> None:
        try:
            await self._say()
        except DatabaseError as error:
            log.warning("Answers for retries wait for the database: %s", error)

    def _begin_to_write(self) -> None:
        self._more = True
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())

    async def _write(self) -> None:
        # What comes while one batch is written is the next.
        while self._more:
            self._more = False
            claims = {claim.place: (claim, future) for claim, future in self._waiting if not future.done()}
            listening = self._listening
            self._waiting, self._listening = [], []
            try:
                await self._write_owed()
                for heard in listening:
                    _resolve(heard, None)
                if claims:
                    await self._write_claims(claims)
            except Exception as error:
                # Each of these is somebody's, who raises it.
                for heard in listening:
                    _fail(heard, error)
                for _, future in claims.values():
                    _fail(future, error)

    async def _write_owed(self) -> None:
        owed = dict(self._owed)
        if not owed:
            return
        async with self._database.writing() as connection:
            await store.tell(connection, self._me, owed)
        for place in owed:
            self._owed.pop(place, None)
            self._in_hand.pop(place, None)

    async def _write_claims(self, claims: dict[Place, tuple[Claim, asyncio.Future[Outcome]]]) -> None:
        now = self._now()
        outcomes: dict[Place, Outcome] = {}
        async with self._database.writing() as connection:
            fresh = await store.add(connection, [claim for claim, _ in claims.values()], self._me, now)
            for place in sorted(claims):
                claim = claims[place][0]
                if place in fresh:
                    outcomes[place] = Claimed(claim.request_id, charged=False)
                else:
                    outcomes[place] = await self._claim(connection, claim, now)
        for place, (_, future) in claims.items():
            _resolve(future, outcomes[place])

    async def _claim(self, connection: AsyncConnection, claim: Claim, now: int) -> Outcome:
        """Claims what another has, or had."""
        while (row := await store.find(connection, claim.place)) is None:
            # It was dropped meanwhile.
            if await store.add(connection, [claim], self._me, now):
                return Claimed(claim.request_id, charged=False)
        return await self._decide(connection, claim, row, now)

    async def _decide(self, connection: AsyncConnection, claim: Claim, row: Row[Any], now: int) -> Outcome:
        age = now - row.created_at
        running = row.status is None and self._life(row.worker, age) is Life.ALIVE
        if not running and abs(age) > self._lasts_ms:
            # Of a day ago; or of a future that a wrong clock told, and would lock the key until then.
            await store.begin_anew(connection, claim, self._me, now)
            return Claimed(claim.request_id, charged=False)
        if row.request_hash != claim.request_hash:
            return Mismatch()
        if running:
            return _in_progress(age)
        if row.status is None:
            return await self._take_over(connection, row, now)
        if row.body is None:
            return Claimed(row.request_id, charged=True)
        headers = tuple((name.encode("latin-1"), value.encode("latin-1")) for name, value in row.headers)
        return Recorded(row.status, headers, row.body, row.request_id)

    async def _take_over(self, connection: AsyncConnection, row: Row[Any], now: int) -> Claimed:
        """Goes on with what a dead worker left."""
        # The journal first: what is folded into the ledger between the two looks is then found there.
        charged = await asyncio.to_thread(self._is_in_journal, row.worker, row.request_id)
        if not charged:
            counted = select(ledger.c.request_id).where(ledger.c.request_id == row.request_id)
            charged = (await connection.execute(counted)).scalar_one_or_none() is not None
        place = (row.key_id, row.idem_key)
        await store.take_over(connection, place, self._me, now, charged=charged)
        return Claimed(row.request_id, charged)

    def _life(self, name: str | None, age: int) -> Life:
        """Whether the worker of a claim lives; one of another machine for as long as the claim is young."""
        # One of ours that is in hand was told of before this.
        if name is None or name == self._me:
            return Life.DEAD
        life = self._lives.look(name)
        if life is Life.ELSEWHERE:
            return Life.ALIVE if abs(age) <= self._stale_ms else Life.DEAD
        return life

    def _is_in_journal(self, worker: str | None, request_id: str) -> bool:
        file = self._lives.journal(worker) if worker is not None else None
        if file is None:
            return False
        records, _ = read_only(file)
        # Only those that may be it are read: one that another version wrote may not be readable.
        mark = request_id.encode()
        return any(decode(record).request_id == request_id for record in records if mark in record)

    def _now(self) -> int:
        return round(self._clock() * 1000)


def _resolve(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _in_progress(age_ms: int) -> InProgress:
    return InProgress(max(0, age_ms) / 1000)
