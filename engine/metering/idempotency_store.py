"""The rows of Idempotency-Keys: what is asked of them and written to them, on either database.

Rows of one transaction are written in one order, so that two workers wait for each other, not for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Row, and_, bindparam, delete, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering.inserting import insert_ignoring
from engine.metering.schema import idempotency as table

_PURGED_AT_ONCE = 500
_NO_ANSWER: dict[str, Any] = {"status": None, "headers": None, "body": None}

#: A row: the id of an API key, and the client's Idempotency-Key.
Place = tuple[str, str]


class Claim(NamedTuple):
    """What a request claims; `request_hash` as `idempotency_http.hash_request` makes it."""

    key_id: str
    idem_key: str
    request_hash: str
    request_id: str

    @property
    def place(self) -> Place:
        return self.key_id, self.idem_key


class Answer(NamedTuple):
    """An answer as it is kept; None for a body that is not."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes | None


# Not of another worker that took it for left behind; it goes on under the same id.
_MINE = and_(
    table.c.key_id == bindparam("at_key"),
    table.c.idem_key == bindparam("at_idem"),
    table.c.worker == bindparam("me"),
)
_ANSWER = (
    update(table)
    .where(_MINE, table.c.body.is_(None))
    .values(status=bindparam("status"), headers=bindparam("headers"), body=bindparam("body"))
)
_DROP = delete(table).where(_MINE, table.c.status.is_(None))


async def add(connection: AsyncConnection, claims: Collection[Claim], worker: str, now: int) -> set[Place]:
    """Claims those keys that nobody has; which they were. `now`: Unix milliseconds."""
    rows = [{**claim._asdict(), "created_at": now, "worker": worker} for claim in sorted(claims)]
    insert = insert_ignoring(connection, table).returning(table.c.key_id, table.c.idem_key)
    return {(key_id, idem_key) for key_id, idem_key in await connection.execute(insert, rows)}


async def find(connection: AsyncConnection, place: Place) -> Row[Any] | None:
    """A key's row, held until the transaction ends."""
    return (await connection.execute(select(table).where(_at(place)).with_for_update())).one_or_none()


async def begin_anew(connection: AsyncConnection, claim: Claim, worker: str, now: int) -> None:
    """Gives a row that counts no more to a new request."""
    values = {**claim._asdict(), **_NO_ANSWER, "worker": worker, "created_at": now}
    await connection.execute(update(table).where(_at(claim.place)).values(**values))


async def take_over(
    connection: AsyncConnection, place: Place, worker: str, now: int, *, charged: bool
) -> None:
    """Gives a dead worker's claim to another; charged: it counts as answered, and the answer is not known."""
    values = {"worker": worker, "created_at": now, "status": 200 if charged else None}
    await connection.execute(update(table).where(_at(place)).values(**values))


async def tell(connection: AsyncConnection, worker: str, answers: Mapping[Place, Answer | None]) -> None:
    """Keeps the answers to this worker's claims; None: the claim is dropped, unless it was answered."""
    kept: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    for place in sorted(answers):
        where = {"at_key": place[0], "at_idem": place[1], "me": worker}
        answer = answers[place]
        if answer is None:
            dropped.append(where)
            continue
        headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in answer.headers]
        kept.append({**where, "status": answer.status, "headers": headers, "body": answer.body})
    for statement, parameters in ((_ANSWER, kept), (_DROP, dropped)):
        if parameters:
            await connection.execute(statement, parameters)


async def purge_some(
    connection: AsyncConnection, old_before: int, old_after: int, lives: Callable[[str], bool]
) -> tuple[int, bool]:
    """Deletes some rows made before the one moment or after the other; how many, and whether it was all.

    A claim of a living worker that is not answered stays, whatever the clock says.
    """
    old = or_(table.c.created_at < old_before, table.c.created_at > old_after)
    running = select(table.c.worker).where(old, table.c.status.is_(None)).distinct()
    found = (await connection.execute(running)).scalars()
    alive = [worker for worker in found if worker is not None and lives(worker)]
    left = or_(table.c.status.is_not(None), table.c.worker.is_(None), table.c.worker.not_in(alive))
    place = tuple_(table.c.key_id, table.c.idem_key)
    some = select(table.c.key_id, table.c.idem_key).where(old, left).limit(_PURGED_AT_ONCE)
    gone = (await connection.execute(delete(table).where(place.in_(some), old, left))).rowcount
    return gone, gone < _PURGED_AT_ONCE


def _at(place: Place) -> ColumnElement[bool]:
    return and_(table.c.key_id == place[0], table.c.idem_key == place[1])
