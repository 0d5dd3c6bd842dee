"""What becomes of old rows: sums by month, tenant, key, model and category, which leave every total the same.

A row that became part of a sum has lost its request id, so it must never come again: a journal that still
held it would be folded in as if it were new. Hence a row is only rolled up when its worker's life is known
to be *settled* past it: that no journal holds a row of that life from before then. `settle_journals` says
so of the journals of this machine, and `end` of a life that is over. A machine that was switched off before
its journal was emptied, and comes back a year later, therefore finds its rows as rows.

What this leaves open: a request that a machine recorded just before it was lost, and that was sent again with
the same Idempotency-Key and answered by another machine. Both rows bear one id and count once, unless the
first machine comes back after that month was rolled up.

Several gateways may do all this at the same time: each transaction sums and deletes the same rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from sqlalchemy import ColumnElement, and_, delete, exists, func, literal, or_, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering import schema
from engine.metering.database import Database
from engine.metering.journal import SUFFIX, read_only
from engine.metering.moments import period_span
from engine.metering.pricing import period_name
from engine.metering.rows import decode

#: Until when a life that is over is settled: for good.
ENDED = 253_402_300_799_000
#: Rows of one transaction (0.5 s at most of a SQLite file on a busy machine), and the pause after it.
AT_ONCE, _PAUSE_S = 2000, 0.02
#: A row is as old as its request, which may have taken this long to be answered; nor does a clock that is set
#: back by less let a row slip behind what was settled.
_MARGIN_MS = 86_400_000
#: Any number of our own: PostgreSQL's name of the lock under which one at a time rolls up.
_ADVISORY_LOCK = 0x48_52_6F_6C


@dataclass(frozen=True)
class Rolled:
    """What a roll-up did, or would do."""

    before: str
    #: Rows that became sums, by month.
    months: dict[str, int] = field(default_factory=dict)
    #: Older rows that stay, by the worker whose life is not known to be settled.
    kept: dict[str, int] = field(default_factory=dict)
    #: Whether another process was at it, so that this one left it to that.
    busy: bool = False

    @property
    def rows(self) -> int:
        return sum(self.months.values())


def first_kept(keep_months: int, now_ms: int) -> str | None:
    """The oldest month whose rows are kept: `keep_months` before the present one; None = all are kept."""
    if keep_months == 0:
        return None
    present = period_name("month", now_ms)
    number = int(present[:4]) * 12 + int(present[5:]) - 1 - keep_months
    return f"{max(number // 12, 1970):04d}-{number % 12 + 1:02d}"


async def end(database: Database, worker: str) -> None:
    """A life is over and all of its journal is in the ledger; called before the journal is removed.

    Raises:
        DatabaseError: the database failed; the life counts as not settled.
    """
    async with database.writing() as connection:
        await _settle(connection, {worker: ENDED})


async def has_ended(database: Database, worker: str) -> bool:
    """Whether `end` was told: whatever a journal of this life holds has been counted.

    Raises:
        DatabaseError: the database failed.
    """
    until = schema.lives.c.settled_until
    async with database.reading() as connection:
        found = await connection.scalar(select(until).where(schema.lives.c.worker == worker))
    return bool(found == ENDED)


async def settle_journals(database: Database, folder: Path, *, now_ms: int | None = None) -> None:
    """Notes how far the lives whose journals lie in a folder are settled: up to the oldest row in each.

    The worker may live and write meanwhile: what it adds is newer, but for a clock that is set back.

    Raises:
        DatabaseError: the database failed.
        OSError: a journal cannot be read.
    """
    latest = (time.time_ns() // 1_000_000 if now_ms is None else now_ms) - _MARGIN_MS
    settled = await asyncio.to_thread(_oldest_rows, folder, latest)
    if settled:
        async with database.writing() as connection:
            await _settle(connection, settled)


def _oldest_rows(folder: Path, latest: int) -> dict[str, int]:
    """How far each journal's life is settled; one with records that cannot be read is left out."""
    settled: dict[str, int] = {}
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        records, _ = read_only(file)
        try:
            oldest = min((decode(record).at for record in records), default=latest)
        except msgspec.DecodeError:
            continue
        # A journal that was removed meanwhile reads as empty; its life is then `ended`, which is later.
        settled[file.name.removesuffix(SUFFIX)] = max(0, min(oldest, latest))
    return settled


async def _settle(connection: AsyncConnection, settled: dict[str, int]) -> None:
    table = schema.lives
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    insert = dialect.insert(table)
    # Sorted: two transactions with common rows wait for each other instead of deadlocking.
    rows = [{"worker": worker, "settled_until": until} for worker, until in sorted(settled.items())]
    await connection.execute(
        insert.on_conflict_do_update(
            index_elements=[table.c.worker],
            set_={"settled_until": insert.excluded.settled_until},
            where=insert.excluded.settled_until > table.c.settled_until,
        ),
        rows,
    )


async def roll_up(
    database: Database, before: str, *, dry_run: bool = False, at_once: int = AT_ONCE
) -> Rolled:
    """Replaces the settled rows of all months before `before` ("2026-11") by sums.

    Settled leases and budgets of those months go too. Stopped half-way, what is done is done.

    Raises:
        ValueError: `before` is no month, or one that has not begun.
        DatabaseError: the database failed.
    """
    limit = month_start(before)
    if limit > datetime.now(UTC).timestamp() * 1000:
        raise ValueError(f"{before} has not begun: only months that are over are rolled up.")
    if dry_run:
        return Rolled(before, await _settled_months(database, limit), await _kept(database, limit))
    months: dict[str, int] = {}
    async with _my_turn(database) as mine:
        place: int | None = 0 if mine else None
        while place is not None:
            async with database.writing() as connection:
                month, rows, place = await _roll_some(connection, place, limit, at_once)
            if rows:
                months[month] = months.get(month, 0) + rows
                await asyncio.sleep(_PAUSE_S)
        if mine:
            async with database.writing() as connection:
                await _forget_leases(connection, before)
    return Rolled(before, months, await _kept(database, limit), busy=not mine)


@contextlib.asynccontextmanager
async def _my_turn(database: Database) -> AsyncIterator[bool]:
    """Whether this process may roll up now: of those on one PostgreSQL server only one does at a time.

    They would harm nothing, but one's transaction would fail on rows that the other's has removed. SQLite's
    write lock lets them take turns by itself.
    """
    if database.is_sqlite:
        yield True
        return
    async with database.writing() as connection:
        lock = text("SELECT pg_try_advisory_xact_lock(:lock)")
        yield bool(await connection.scalar(lock, {"lock": _ADVISORY_LOCK}))


async def _roll_some(
    connection: AsyncConnection, place: int, limit: int, at_once: int
) -> tuple[str, int, int | None]:
    """Rolls up about `at_once` rows of one month, the oldest from `place` on.

    Returns the month, how many rows, and the place to go on from; None when there are no more.
    """
    if connection.dialect.name == "postgresql":
        # The sums and the deletion must see the same rows; one that comes meanwhile waits for the next time.
        await connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    ledger, rollups = schema.ledger, schema.rollups
    ripe = and_(ledger.c.at >= place, ledger.c.at < limit, _is_settled())
    first = await connection.scalar(select(func.min(ledger.c.at)).where(ripe))
    if first is None:
        return "", 0, None
    month = period_name("month", first)
    end_of_month = period_span(month).until
    ripe = and_(ripe, ledger.c.at < end_of_month)
    stop = await connection.scalar(
        select(ledger.c.at).where(ripe).order_by(ledger.c.at).offset(at_once).limit(1)
    )
    stop = end_of_month if stop is None else max(stop, first + 1)
    inside = and_(ripe, ledger.c.at < stop)
    names = ("tenant_id", "key_id", "model", "category", "unit")
    columns = [ledger.c[name] for name in names]
    sums = select(literal(month), *columns, func.count(), func.sum(ledger.c.charge))
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    insert = dialect.insert(rollups).from_select(
        ["month", *names, "requests", "charge"], sums.where(inside).group_by(*columns)
    )
    await connection.execute(
        insert.on_conflict_do_update(
            index_elements=list(rollups.primary_key),
            set_={
                "requests": rollups.c.requests + insert.excluded.requests,
                "charge": rollups.c.charge + insert.excluded.charge,
            },
        )
    )
    rolled = (await connection.execute(delete(ledger).where(inside))).rowcount
    return month, rolled, stop


def _is_settled() -> ColumnElement[bool]:
    """Whether a ledger row's life is settled past it."""
    ledger, lives = schema.ledger, schema.lives
    return exists().where(lives.c.worker == ledger.c.worker, lives.c.settled_until > ledger.c.at)


async def _settled_months(database: Database, limit: int) -> dict[str, int]:
    """How many rows of each month would become sums."""
    ledger = schema.ledger
    day = (ledger.c.at // 86_400_000).label("day")
    query = select(day, func.count()).where(ledger.c.at < limit, _is_settled()).group_by(day)
    async with database.reading() as connection:
        days = (await connection.execute(query)).all()
    return _summed((period_name("month", day * 86_400_000), count) for day, count in days)


async def _kept(database: Database, limit: int) -> dict[str, int]:
    """Older rows that stay, by worker."""
    ledger = schema.ledger
    query = select(ledger.c.worker, func.count()).where(ledger.c.at < limit, ~_is_settled())
    async with database.reading() as connection:
        rows = (await connection.execute(query.group_by(ledger.c.worker))).all()
    return _summed((worker, count) for worker, count in rows)


def _summed(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, count in counts:
        sums[name] = sums.get(name, 0) + count
    return dict(sorted(sums.items()))


async def _forget_leases(connection: AsyncConnection, before: str) -> None:
    """Removes budgets of periods before this month, with their leases, once all of their lives are over.

    A life that may come back is settled from its rows, and its budget must then still be there.
    """
    budgets, leases, lives = schema.budgets, schema.leases, schema.lives
    other = leases.alias()
    over = exists().where(lives.c.worker == other.c.worker, lives.c.settled_until == ENDED)
    open_ones = exists().where(
        other.c.subject == leases.c.subject,
        other.c.period == leases.c.period,
        or_(other.c.settled_at.is_(None), ~over),
    )
    await connection.execute(delete(leases).where(leases.c.period < before, ~open_ones))
    has_leases = exists().where(leases.c.subject == budgets.c.subject, leases.c.period == budgets.c.period)
    await connection.execute(delete(budgets).where(budgets.c.period < before, ~has_leases))


def month_start(month: str) -> int:
    """Unix milliseconds of a month's begin.

    Raises:
        ValueError: it is no month.
    """
    try:
        if len(month) == 7:
            return period_span(month).since
    except ValueError:
        pass
    raise ValueError(f"{month!r} is no month: write it as 2026-11.")
