"""Settlement: what a life of a worker spent of each budget, by the ledger's rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date, timedelta

from sqlalchemy import case, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering import leases as pure
from engine.metering import schema
from engine.metering.budget_rows import Name, keep_budgets, locked, now_ms
from engine.metering.database import Database
from engine.metering.leases import Lease
from engine.metering.retention import ENDED

#: A subject with one of these endings counts requests, those that were included, or those of a day (its
#: period); any other counts what requests are charged.
REQUESTS, INCLUDED, DAY = "#requests", "#included", "#day"
_DAY_MS = 86_400_000


async def settle_worker(
    database: Database,
    worker: str,
    *,
    only: set[Name] | None = None,
    clock: Callable[[], int] = now_ms,
) -> int:
    """Settles the leases of a life that is over, from the ledger; how many leases that were.

    The caller knows that the life (or, with `only`, its work in these subjects and periods) is over and that
    its journal is in the ledger. Doing it again is harmless and takes in rows that came later.
    """
    table = schema.leases
    async with database.writing() as connection:
        found = await connection.execute(
            select(table.c.id, table.c.subject, table.c.period).where(table.c.worker == worker)
        )
        ids = {(subject, period): id for id, subject, period in found}
        names = sorted(name for name in ids if only is None or name in only)
        if not names:
            return 0
        # First the locks, then the sums: of two who settle at once the later one has seen all rows.
        budgets = await locked(connection, names)
        spent = await _spent(connection, worker, names)
        now = clock()
        for name in names:
            rows = await connection.execute(
                select(table.c.granted, table.c.used, table.c.settled_at).where(table.c.id == ids[name])
            )
            granted, used, settled_at = rows.one()
            budgets[name], lease = pure.settle(
                budgets[name], Lease(granted, used, settled_at is not None), spent[name]
            )
            await connection.execute(
                update(table)
                .where(table.c.id == ids[name])
                .values(granted=lease.granted, used=lease.used, settled_at=settled_at or now)
            )
        await keep_budgets(connection, list(budgets.items()))
    return len(names)


async def settle_expired(
    database: Database, *, grace_s: float, clock: Callable[[], int] = now_ms
) -> list[str]:
    """Settles the leases of lives that nobody has heard of since their leases ended `grace_s` ago.

    For machines that do not come back, whose journals nobody can read. If one does, its journal is folded in
    and settled again: the budget then counts those rows too, though it may be over by them. Also settles what
    a life got after its end: a PostgreSQL server may carry out what a worker sent just before it was killed.
    """
    table, lives = schema.leases, schema.lives
    ended = select(lives.c.worker).where(lives.c.settled_until == ENDED)
    async with database.reading() as connection:
        found = await connection.execute(
            select(table.c.worker)
            .distinct()
            .where(
                table.c.settled_at.is_(None),
                or_(table.c.expires_at < clock() - int(grace_s * 1000), table.c.worker.in_(ended)),
            )
        )
        workers = sorted(worker for (worker,) in found)
    for worker in workers:
        await settle_worker(database, worker, clock=clock)
    return workers


async def _spent(connection: AsyncConnection, worker: str, names: Sequence[Name]) -> dict[Name, int]:
    """What the ledger says of one life's requests, for each subject in a period: one pass over its rows."""
    table = schema.ledger
    day = table.c.at // _DAY_MS
    found = await connection.execute(
        select(
            table.c.key_id,
            table.c.tenant_id,
            table.c.period,
            day,
            func.count(),
            func.sum(table.c.charge),
            func.sum(case((table.c.included, 1), else_=0)),
        )
        .where(table.c.worker == worker)
        .group_by(table.c.key_id, table.c.tenant_id, table.c.period, day)
    )
    sums: Counter[Name] = Counter()
    for key, tenant, period, number, requests, charge, included in found:
        for owner in {key, tenant}:
            sums[owner, period] += int(charge)
            sums[owner + REQUESTS, period] += int(requests)
            sums[owner + INCLUDED, period] += int(included)
            sums[owner + DAY, _day_name(number)] += int(requests)
    return {name: sums[name] for name in names}


def _day_name(number: int) -> str:
    return (date(1970, 1, 1) + timedelta(days=number)).isoformat()
