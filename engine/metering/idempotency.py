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

from sqlalchemy import ColumnElement, Row, and_, delete, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering.database import Database, DatabaseError
from engine.metering.inserting import insert_ignoring
from engine.metering.journal import read_only
from engine.metering.lives import Life, Lives
from engine.metering.rows import decode
from engine.metering.schema import idempotency as table
from engine.metering.schema import ledger

log = logging.getLogger("hearth.idempotency")

Headers = Sequence[tuple[bytes, bytes]]

#: A longer answer is not kept: a retry is served again, and not charged again.
MOST_BODY_BYTES = 1024 * 1024
#: Answers that wait for a database that is away; of more than these the bodies are not kept.
_MOST_OWED_BODIES = 64
_PURGED_AT_ONCE = 500


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


class _Claim(NamedTuple):
    """What a request claims: row and values."""

    key_id: str
    idem_key: str
    request_hash: str
    request_id: str


class _Answer(NamedTuple):
    status: int
    headers: Headers
    body: bytes | None


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
        self._in_hand: dict[tuple[str, str], tuple[str, int]] = {}
        #: What the database is to be told of claims; None: drop it.
        self._owed: dict[tuple[str, str], _Answer | None] = {}
        self._paying = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def claim(self, key_id: str, idem_key: str, request_hash: str, request_id: str) -> Outcome:
        """Claims the key for a request, or says what became of the one that has it.

        Raises:
            DatabaseError: the database fails (`DatabaseAwayError`: for now); nothing is claimed.
        """
        await self._pay()
        place, now = (key_id, idem_key), self._now()
        mine = self._in_hand.get(place)
        if mine is not None:
            digest, since = mine
            return Mismatch() if digest != request_hash else _in_progress(now - since)
        self._in_hand[place] = (request_hash, now)
        outcome: Outcome | None = None
        try:
            outcome = await self._claim(_Claim(key_id, idem_key, request_hash, request_id), now)
        finally:
            # Also when this was cancelled: a row that is ours and not in hand is free to be taken.
            if not isinstance(outcome, Claimed) or outcome.charged:
                del self._in_hand[place]
        return outcome

    async def complete(
        self, key_id: str, idem_key: str, status: int, headers: Headers, body: bytes | None
    ) -> None:
        """The request was answered (2xx) and charged. body: None for a stream. To be called before the last
        byte is sent. A cancelled caller's answer is kept all the same.
        """
        too_many = len(self._owed) >= _MOST_OWED_BODIES
        kept = body if body is not None and len(body) <= MOST_BODY_BYTES and not too_many else None
        await self._owe((key_id, idem_key), _Answer(status, headers if kept is not None else (), kept))

    async def drop(self, key_id: str, idem_key: str) -> None:
        """The request was not answered 2xx: a retry is a new request. As `complete` otherwise."""
        await self._owe((key_id, idem_key), None)

    async def purge(self) -> int:
        """Deletes what is no longer remembered; how many. To be called now and then (each hour, say).

        Raises:
            DatabaseError: the database fails; the rest stays for the next time.
        """
        now, deleted = self._now(), 0
        old = or_(table.c.created_at < now - self._lasts_ms, table.c.created_at > now + self._lasts_ms)
        while True:
            async with self._database.writing() as connection:
                running = select(table.c.worker).where(old, table.c.status.is_(None)).distinct()
                found = [name for name in (await connection.execute(running)).scalars() if name is not None]
                alive = [name for name in found if self._lives.look(name) is Life.ALIVE]
                # A claim of a living worker stays, whatever the clock says.
                ended = and_(
                    old,
                    or_(table.c.status.is_not(None), table.c.worker.is_(None), table.c.worker.not_in(alive)),
                )
                place = tuple_(table.c.key_id, table.c.idem_key)
                some = select(table.c.key_id, table.c.idem_key).where(ended).limit(_PURGED_AT_ONCE)
                gone = (await connection.execute(delete(table).where(place.in_(some), ended))).rowcount
            deleted += gone
            if gone < _PURGED_AT_ONCE:
                return deleted

    async def _claim(self, claim: _Claim, now: int) -> Outcome:
        values = {**claim._asdict(), "created_at": now, "worker": self._me}
        async with self._database.writing() as connection:
            insert = insert_ignoring(connection, table).values(**values).returning(table.c.request_id)
            while (await connection.execute(insert)).scalar_one_or_none() is None:
                found = select(table).where(_at(claim.key_id, claim.idem_key)).with_for_update()
                row = (await connection.execute(found)).one_or_none()
                # None: it was dropped between the two.
                if row is not None:
                    return await self._decide(connection, claim, row, now)
            return Claimed(claim.request_id, charged=False)

    async def _decide(self, connection: AsyncConnection, claim: _Claim, row: Row[Any], now: int) -> Outcome:
        age = now - row.created_at
        running = row.status is None and self._life(row.worker, age) is Life.ALIVE
        if not running and abs(age) > self._lasts_ms:
            # Of a day ago; or of a future that a wrong clock told, and would lock the key until then.
            await _set(connection, claim, now, worker=self._me, **claim._asdict(), **_NO_ANSWER)
            return Claimed(claim.request_id, charged=False)
        if row.request_hash != claim.request_hash:
            return Mismatch()
        if running:
            return _in_progress(age)
        if row.status is None:
            return await self._take_over(connection, claim, row, now)
        if row.body is None:
            return Claimed(row.request_id, charged=True)
        headers = tuple((name.encode("latin-1"), value.encode("latin-1")) for name, value in row.headers)
        return Recorded(row.status, headers, row.body, row.request_id)

    async def _take_over(
        self, connection: AsyncConnection, claim: _Claim, row: Row[Any], now: int
    ) -> Claimed:
        """Goes on with what a dead worker left."""
        # The journal first: what is folded into the ledger between the two looks is then found there.
        charged = await asyncio.to_thread(self._is_in_journal, row.worker, row.request_id)
        if not charged:
            counted = select(ledger.c.request_id).where(ledger.c.request_id == row.request_id)
            charged = (await connection.execute(counted)).scalar_one_or_none() is not None
        # Charged: it counts as answered, and its answer is not known.
        await _set(connection, claim, now, worker=self._me, status=200 if charged else None)
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
        return any(decode(record).request_id == request_id for record in records)

    async def _owe(self, place: tuple[str, str], answer: _Answer | None) -> None:
        self._owed[place] = answer
        task = asyncio.create_task(self._pay_or_wait())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    async def _pay_or_wait(self) -> None:
        try:
            await self._pay()
        except DatabaseError as error:
            log.warning("Answers for retries wait for the database: %s", error)

    async def _pay(self) -> None:
        """Tells the database what is owed: all that has gathered while another was at it, at once."""
        if not self._owed:
            return
        async with self._paying:
            owed = dict(self._owed)
            if not owed:
                return
            async with self._database.writing() as connection:
                # In one order, so that two workers wait for each other rather than for ever.
                for place in sorted(owed):
                    await self._tell(connection, place, owed[place])
            for place in owed:
                self._owed.pop(place, None)
                self._in_hand.pop(place, None)

    async def _tell(
        self, connection: AsyncConnection, place: tuple[str, str], answer: _Answer | None
    ) -> None:
        # Not of another worker that took it for left behind; it goes on under the same id.
        mine = and_(_at(*place), table.c.worker == self._me)
        if answer is None:
            await connection.execute(delete(table).where(mine, table.c.status.is_(None)))
            return
        headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in answer.headers]
        values = {"status": answer.status, "headers": headers, "body": answer.body}
        await connection.execute(update(table).where(mine, table.c.body.is_(None)).values(**values))

    def _now(self) -> int:
        return round(self._clock() * 1000)


_NO_ANSWER: dict[str, Any] = {"status": None, "headers": None, "body": None}


def _at(key_id: str, idem_key: str) -> ColumnElement[bool]:
    return and_(table.c.key_id == key_id, table.c.idem_key == idem_key)


async def _set(connection: AsyncConnection, claim: _Claim, now: int, **values: Any) -> None:
    there = _at(claim.key_id, claim.idem_key)
    await connection.execute(update(table).where(there).values(**values, created_at=now))


def _in_progress(age_ms: int) -> InProgress:
    return InProgress(max(0, age_ms) / 1000)
