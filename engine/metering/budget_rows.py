"""The budgets' rows: reading, locking and writing many at once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from typing import TypeVar

from sqlalchemy import bindparam, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering import schema
from engine.metering.database import Database
from engine.metering.inserting import insert_ignoring
from engine.metering.leases import Budget

#: A budget's subject and period.
Name = tuple[str, str]
_T = TypeVar("_T")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


async def read_budget(database: Database, subject: str, period: str) -> Budget:
    """What of a budget is used and leased now."""
    table = schema.budgets
    async with database.reading() as connection:
        found = await connection.execute(
            select(table.c.used, table.c.leased).where(table.c.subject == subject, table.c.period == period)
        )
        row = found.one_or_none()
    return Budget() if row is None else Budget(*row)


async def read_budgets(database: Database, names: Iterable[Name]) -> dict[Name, Budget]:
    """Several budgets as they are at one moment.

    Raises:
        DatabaseError: the database failed.
    """
    wanted = sorted(set(names))
    async with database.reading() as connection:
        found = await _find(connection, wanted, lock=False)
    return {name: found.get(name, Budget()) for name in wanted}


def lease_id(subject: str, period: str, worker: str) -> str:
    """One life has one lease of each budget."""
    return hashlib.sha256(f"{worker}/{period}/{subject}".encode()).hexdigest()[:32]


async def locked(connection: AsyncConnection, names: Sequence[Name]) -> dict[Name, Budget]:
    """Budgets, made where missing, which nobody else changes until this transaction ends.

    Locked in one order everywhere, so that two transactions wait for each other instead of deadlocking.
    """
    found = await _find(connection, names, lock=True)
    missing = [name for name in names if name not in found]
    if missing:
        await connection.execute(
            insert_ignoring(connection, schema.budgets),
            [{"subject": subject, "period": period, "used": 0, "leased": 0} for subject, period in missing],
        )
        found = await _find(connection, names, lock=True)
    return found


async def _find(connection: AsyncConnection, names: Sequence[Name], *, lock: bool) -> dict[Name, Budget]:
    table = schema.budgets
    found: dict[Name, Budget] = {}
    for some in chunks(sorted(names)):
        query = (
            select(table.c.subject, table.c.period, table.c.used, table.c.leased)
            .where(tuple_(table.c.subject, table.c.period).in_(some))
            .order_by(table.c.subject, table.c.period)
        )
        rows = await connection.execute(query.with_for_update() if lock else query)
        found |= {(subject, period): Budget(used, leased) for subject, period, used, leased in rows}
    return found


async def keep_budgets(connection: AsyncConnection, budgets: Sequence[tuple[Name, Budget]]) -> None:
    table = schema.budgets
    await connection.execute(
        update(table)
        .where(table.c.subject == bindparam("of_subject"), table.c.period == bindparam("of_period"))
        .values(used=bindparam("now_used"), leased=bindparam("now_leased")),
        [
            {
                "of_subject": subject,
                "of_period": period,
                "now_used": budget.used,
                "now_leased": budget.leased,
            }
            for (subject, period), budget in budgets
        ],
    )


def chunks(items: Sequence[_T]) -> Iterable[Sequence[_T]]:
    """Some hundred at a time: SQLite takes a bounded number of values in one statement."""
    return (items[start : start + 500] for start in range(0, len(items), 500))
