"""Where a caller stands in the present period of its plan: what is used and left, from the ledger's rows."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering import schema
from engine.metering.database import Database
from engine.metering.keyring import Caller
from engine.metering.moments import period_span
from engine.metering.plans import Plan
from engine.metering.pricing import period_name


@dataclass(frozen=True)
class Standing:
    """What was used in one period by all whose requests count together; amounts in the plan's unit."""

    plan: Plan
    period: str
    requests: int
    charge: int
    #: Requests that cost nothing since they were among those included.
    included: int

    @property
    def ends(self) -> int:
        """When the period is over, unix milliseconds."""
        return period_span(self.period).until

    @property
    def included_left(self) -> int:
        return max(0, self.plan.spec.included - self.included)

    @property
    def budget_used(self) -> int:
        """Requests or charge, whichever the plan's budget is of."""
        budget = self.plan.spec.budget
        return self.requests if budget is not None and budget.of == "requests" else self.charge

    @property
    def budget_left(self) -> int | None:
        """None without a budget; a soft one that is overspent has 0 left."""
        budget = self.plan.spec.budget
        return None if budget is None else max(0, budget.limit - self.budget_used)


async def read_standing(database: Database, caller: Caller, now_ms: int) -> Standing | None:
    """The caller's standing now; None where it has no plan.

    Raises:
        DatabaseError: the database failed.
    """
    if caller.plan is None:
        return None
    return await standing_under(database, caller.plan, caller.subject, now_ms)


async def standing_under(database: Database, plan: Plan, subject: str, now_ms: int) -> Standing:
    """The standing of a key or, where the plan counts by tenants, of a tenant (by its id).

    Raises:
        DatabaseError: the database failed.
    """
    period = period_name(plan.spec.period, now_ms)
    async with database.reading() as connection:
        requests, charge, included = await _used(connection, plan, subject, period)
    return Standing(plan, period, requests, charge, included)


async def _used(connection: AsyncConnection, plan: Plan, subject: str, period: str) -> tuple[int, int, int]:
    table = schema.ledger
    owner = table.c.tenant_id if plan.spec.counts == "tenant" else table.c.key_id
    found = await connection.execute(
        select(
            func.count(),
            func.coalesce(func.sum(table.c.charge), 0),
            func.count().filter(table.c.included.is_(True)),
        ).where(
            owner == subject,
            # A request counts where it was admitted, so its row is never older than its period; this is what
            # the index on (owner, at) needs to find the rows.
            table.c.at >= period_span(period).since,
            table.c.period == period,
        )
    )
    requests, charge, included = found.one()
    return int(requests), int(charge), int(included)
