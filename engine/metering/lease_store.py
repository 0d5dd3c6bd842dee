"""Leases in the database: `leases.py`'s arithmetic within transactions that lock the budget's row."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

from sqlalchemy import func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering import leases as pure
from engine.metering import schema
from engine.metering.database import Database
from engine.metering.leases import Budget, Lease
from engine.metering.ledger import insert_ignoring

#: A subject with this ending counts requests; any other counts what requests are charged.
REQUESTS = "#requests"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class LeaseStore:
    """Leases for one life of a worker.

    A lease lasts `lasts_s` from its last grant or renewal; a worker whose purse is past that takes nothing,
    since others may settle it some time later (`settle_expired`).
    """

    def __init__(
        self,
        database: Database,
        worker: str,
        *,
        lasts_s: float = 900.0,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self._database, self._worker, self._lasts_s, self._clock = database, worker, lasts_s, clock

    @property
    def lasts_s(self) -> float:
        return self._lasts_s

    async def lease(self, subject: str, period: str, wish: int, limit: int) -> int:
        """Units granted, 0 to `wish`; together with what all workers hold and used never over `limit`.

        Raises:
            ValueError: this life was settled, because it was thought dead: begin another.
            DatabaseError: the database failed; nothing is granted.
        """
        async with self._database.writing() as connection:
            budget = await _locked(connection, subject, period)
            lease = await self._lease(connection, subject, period)
            budget, lease, units = pure.grant(budget, lease, wish, limit)
            await _keep_budget(connection, subject, period, budget)
            await self._keep(connection, subject, period, lease)
        return units

    async def give_back(self, subject: str, period: str, units: int) -> None:
        """Returns units that this worker will not spend.

        Raises:
            ValueError: more than it holds.
            DatabaseError: the database failed; they are still leased.
        """
        async with self._database.writing() as connection:
            budget = await _locked(connection, subject, period)
            lease = await self._lease(connection, subject, period)
            budget, lease = pure.give_back(budget, lease, units)
            await _keep_budget(connection, subject, period, budget)
            await self._keep(connection, subject, period, lease)

    async def renew(self) -> None:
        """This worker lives: its leases last again from now."""
        async with self._database.writing() as connection:
            await connection.execute(
                update(schema.leases)
                .where(schema.leases.c.worker == self._worker, schema.leases.c.settled_at.is_(None))
                .values(expires_at=self._expiry())
            )

    def _expiry(self) -> int:
        return self._clock() + int(self._lasts_s * 1000)

    async def _lease(self, connection: AsyncConnection, subject: str, period: str) -> Lease:
        await connection.execute(
            insert_ignoring(connection, schema.leases),
            {
                "id": lease_id(subject, period, self._worker),
                "subject": subject,
                "period": period,
                "worker": self._worker,
                "granted": 0,
                "used": 0,
                "expires_at": self._expiry(),
                "settled_at": None,
            },
        )
        table = schema.leases
        found = await connection.execute(
            select(table.c.granted, table.c.used, table.c.settled_at).where(
                table.c.id == lease_id(subject, period, self._worker)
            )
        )
        granted, used, settled_at = found.one()
        return Lease(granted, used, settled_at is not None)

    async def _keep(self, connection: AsyncConnection, subject: str, period: str, lease: Lease) -> None:
        if lease.settled:
            return
        await connection.execute(
            update(schema.leases)
            .where(schema.leases.c.id == lease_id(subject, period, self._worker))
            .values(granted=lease.granted, used=lease.used, expires_at=self._expiry())
        )


async def settle_worker(database: Database, worker: str, *, clock: Callable[[], int] = now_ms) -> int:
    """Settles all leases of a life that is over, from the ledger; how many leases it had.

    The caller knows that the life is over and that its journal is in the ledger. Doing it again is harmless
    and takes in rows that came later.
    """
    async with database.writing() as connection:
        table = schema.leases
        found = await connection.execute(
            select(table.c.subject, table.c.period)
            .where(table.c.worker == worker)
            .order_by(table.c.subject, table.c.period)
        )
        accounts = [(subject, period) for subject, period in found]
        for subject, period in accounts:
            await _settle_one(connection, worker, subject, period, clock())
    return len(accounts)


async def settle_expired(
    database: Database, *, grace_s: float, clock: Callable[[], int] = now_ms
) -> list[str]:
    """Settles the leases of lives that nobody has heard of since their leases ended `grace_s` ago.

    For machines that do not come back, whose journals nobody can read. If one does, its journal is folded in
    and settled again: the budget then counts those rows too, though it may be over by them.
    """
    table = schema.leases
    async with database.reading() as connection:
        found = await connection.execute(
            select(table.c.worker)
            .distinct()
            .where(table.c.settled_at.is_(None), table.c.expires_at < clock() - int(grace_s * 1000))
        )
        workers = sorted(worker for (worker,) in found)
    for worker in workers:
        await settle_worker(database, worker, clock=clock)
    return workers


async def read_budget(database: Database, subject: str, period: str) -> Budget:
    """What of a budget is used and leased now."""
    table = schema.budgets
    async with database.reading() as connection:
        found = await connection.execute(
            select(table.c.used, table.c.leased).where(table.c.subject == subject, table.c.period == period)
        )
        row = found.one_or_none()
    return Budget() if row is None else Budget(*row)


def lease_id(subject: str, period: str, worker: str) -> str:
    """One life has one lease of each budget."""
    return hashlib.sha256(f"{worker}/{period}/{subject}".encode()).hexdigest()[:32]


async def _settle_one(connection: AsyncConnection, worker: str, subject: str, period: str, now: int) -> None:
    budget = await _locked(connection, subject, period)
    table = schema.leases
    found = await connection.execute(
        select(table.c.granted, table.c.used, table.c.settled_at).where(
            table.c.id == lease_id(subject, period, worker)
        )
    )
    granted, used, settled_at = found.one()
    spent = await _spent(connection, worker, subject, period)
    budget, lease = pure.settle(budget, Lease(granted, used, settled_at is not None), spent)
    await _keep_budget(connection, subject, period, budget)
    await connection.execute(
        update(table)
        .where(table.c.id == lease_id(subject, period, worker))
        .values(granted=lease.granted, used=lease.used, settled_at=settled_at or now)
    )


async def _spent(connection: AsyncConnection, worker: str, subject: str, period: str) -> int:
    """What the ledger says of one life's requests for a subject in a period."""
    table = schema.ledger
    owner = subject.removesuffix(REQUESTS)
    counted = func.count() if subject.endswith(REQUESTS) else func.coalesce(func.sum(table.c.charge), 0)
    found = await connection.execute(
        select(counted).where(
            table.c.worker == worker,
            table.c.period == period,
            or_(table.c.key_id == owner, table.c.tenant_id == owner),
        )
    )
    return int(found.scalar_one())


async def _locked(connection: AsyncConnection, subject: str, period: str) -> Budget:
    """The budget, which nobody else changes until this transaction ends."""
    table = schema.budgets
    await connection.execute(
        insert_ignoring(connection, table), {"subject": subject, "period": period, "used": 0, "leased": 0}
    )
    found = await connection.execute(
        select(table.c.used, table.c.leased)
        .where(table.c.subject == subject, table.c.period == period)
        .with_for_update()
    )
    return Budget(*found.one())


async def _keep_budget(connection: AsyncConnection, subject: str, period: str, budget: Budget) -> None:
    table = schema.budgets
    await connection.execute(
        update(table)
        .where(table.c.subject == subject, table.c.period == period)
        .values(used=budget.used, leased=budget.leased)
    )
