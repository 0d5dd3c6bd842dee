"""Leases in the database: `leases.py`'s arithmetic within transactions that lock the budgets' rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering import leases as pure
from engine.metering import schema
from engine.metering.budget_rows import Name, chunks, keep_budgets, lease_id, locked, now_ms, read_budgets
from engine.metering.budget_rows import read_budget as read_budget
from engine.metering.database import Database
from engine.metering.inserting import insert_ignoring
from engine.metering.leases import Budget, Lease
from engine.metering.settlement import settle_expired as settle_expired
from engine.metering.settlement import settle_worker as settle_worker


@dataclass(frozen=True)
class Order:
    """What a worker wants of one budget: it gives `back` units first, then wants what a `cost` needs.

    limit: the most that all workers together may hold. share_of: the limit that a block is a share of.
    back: units to return. cost: of the request that waits, 0 for none. workers: among how many the rest is
    shared. unspared: units that are spent or in the hand of a request.
    """

    subject: str
    period: str
    limit: int
    share_of: int
    back: int = 0
    cost: int = 0
    workers: int = 1
    unspared: int = 0


@dataclass(frozen=True)
class Given:
    """The answer to an order.

    before: units of this lease without the new ones: those that are spent, in hand or spare. units: new ones.
    budget: after it all. elsewhere: what other living leases have to spare, looked for where a cost was named
    and nothing granted.
    """

    before: int
    units: int
    budget: Budget
    elsewhere: int = 0


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
            budget = (await locked(connection, [(subject, period)]))[(subject, period)]
            lease = await self._lease(connection, subject, period)
            budget, lease, units = pure.grant(budget, lease, wish, limit)
            await keep_budgets(connection, [((subject, period), budget)])
            await self._keep(connection, subject, period, lease)
        return units

    async def give_back(self, subject: str, period: str, units: int) -> None:
        """Returns units that this worker will not spend.

        Raises:
            ValueError: more than it holds.
            DatabaseError: the database failed; they are still leased.
        """
        async with self._database.writing() as connection:
            budget = (await locked(connection, [(subject, period)]))[(subject, period)]
            lease = await self._lease(connection, subject, period)
            budget, lease = pure.give_back(budget, lease, units)
            await keep_budgets(connection, [((subject, period), budget)])
            await self._keep(connection, subject, period, lease)

    async def trade(self, orders: Sequence[Order]) -> list[Given]:
        """Many orders of different budgets in one transaction, answered in their order.

        A lease that was settled is opened again. Units that cannot be given back are left alone.

        Raises:
            DatabaseError: the database failed; nothing changed.
        """
        wanted = {(order.subject, order.period): order for order in orders}
        assert len(wanted) == len(orders), "one order for each budget"
        names = sorted(wanted)
        given: dict[Name, Given] = {}
        async with self._database.writing() as connection:
            budgets = await locked(connection, names)
            held = await self._leases(connection, names)
            changed: list[tuple[Name, Budget, Lease]] = []
            for name in names:
                order = wanted[name]
                budget, lease = pure.reopen(budgets[name], held[name])
                budget, lease = pure.give_back(budget, lease, min(order.back, lease.granted))
                before, taken = lease.granted, budget.used + budget.leased
                wish = pure.block(order.share_of, taken, order.workers, order.cost) if order.cost else 0
                if order.back and before - order.unspared + budget.room(order.limit) < order.cost:
                    # What was given back would only come again, and stay too little.
                    wish = 0
                budget, lease, units = pure.grant(budget, lease, wish, order.limit)
                lease = replace(lease, used=min(order.unspared, lease.granted))
                changed.append((name, budget, lease))
                given[name] = Given(before, units, budget)
            await keep_budgets(connection, [(name, budget) for name, budget, _ in changed])
            await self._keep_leases(connection, [(name, lease) for name, _, lease in changed])
            short = [name for name in names if wanted[name].cost and not given[name].units]
            for name, spare in (await self._elsewhere(connection, short)).items():
                given[name] = replace(given[name], elsewhere=spare)
        return [given[(order.subject, order.period)] for order in orders]

    async def look(self, names: Iterable[Name]) -> dict[Name, Budget]:
        """Several budgets as they are now.

        Raises:
            DatabaseError: the database failed.
        """
        return await read_budgets(self._database, names)

    async def settle(self, names: Iterable[Name]) -> None:
        """Settles leases of this life in periods that are over; all of their rows are in the ledger.

        Raises:
            DatabaseError: the database failed; they are still open.
        """
        await settle_worker(self._database, self._worker, only=set(names), clock=self._clock)

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

    async def _leases(self, connection: AsyncConnection, names: Sequence[Name]) -> dict[Name, Lease]:
        """This life's leases of some budgets; those that are not there yet are made."""
        ids = {lease_id(subject, period, self._worker): (subject, period) for subject, period in names}
        found = await self._find_leases(connection, ids)
        missing = [id for id, name in ids.items() if name not in found]
        if missing:
            await connection.execute(
                insert_ignoring(connection, schema.leases), [self._fresh(id, *ids[id]) for id in missing]
            )
            found |= await self._find_leases(connection, {id: ids[id] for id in missing})
        return found

    async def _find_leases(self, connection: AsyncConnection, ids: dict[str, Name]) -> dict[Name, Lease]:
        table = schema.leases
        found: dict[Name, Lease] = {}
        for some in chunks(sorted(ids)):
            rows = await connection.execute(
                select(table.c.id, table.c.granted, table.c.used, table.c.settled_at).where(
                    table.c.id.in_(some)
                )
            )
            found |= {
                ids[id]: Lease(granted, used, settled_at is not None)
                for id, granted, used, settled_at in rows
            }
        return found

    async def _keep_leases(self, connection: AsyncConnection, leases: Sequence[tuple[Name, Lease]]) -> None:
        await connection.execute(
            update(schema.leases)
            .where(schema.leases.c.id == bindparam("of_id"))
            .values(
                granted=bindparam("now_granted"),
                used=bindparam("now_used"),
                expires_at=self._expiry(),
                settled_at=None,
            ),
            [
                {
                    "of_id": lease_id(subject, period, self._worker),
                    "now_granted": lease.granted,
                    "now_used": lease.used,
                }
                for (subject, period), lease in leases
            ],
        )

    async def _elsewhere(self, connection: AsyncConnection, names: Sequence[Name]) -> dict[Name, int]:
        """What other lives hold of budgets and have neither spent nor in hand, as they last said."""
        table = schema.leases
        found: dict[Name, int] = {}
        for subject, period in names:
            spare = await connection.scalar(
                select(func.sum(table.c.granted - table.c.used)).where(
                    table.c.subject == subject,
                    table.c.period == period,
                    table.c.worker != self._worker,
                    table.c.settled_at.is_(None),
                )
            )
            found[(subject, period)] = int(spare or 0)
        return found

    def _fresh(self, id: str, subject: str, period: str) -> dict[str, Any]:
        return {
            "id": id,
            "subject": subject,
            "period": period,
            "worker": self._worker,
            "granted": 0,
            "used": 0,
            "expires_at": self._expiry(),
            "settled_at": None,
        }

    async def _lease(self, connection: AsyncConnection, subject: str, period: str) -> Lease:
        return (await self._leases(connection, [(subject, period)]))[(subject, period)]

    async def _keep(self, connection: AsyncConnection, subject: str, period: str, lease: Lease) -> None:
        if lease.settled:
            return
        await connection.execute(
            update(schema.leases)
            .where(schema.leases.c.id == lease_id(subject, period, self._worker))
            .values(granted=lease.granted, used=lease.used, expires_at=self._expiry())
        )
