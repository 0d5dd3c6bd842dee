"""Which terms apply to a key or tenant, as the database has them now."""

from __future__ import annotations

from sqlalchemy import Table, select
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering import keys, schema, tenants
from engine.metering.database import Database
from engine.metering.keyring import Caller
from engine.metering.keys import Key
from engine.metering.plans import Plan
from engine.metering.standing import Standing, read_standing, standing_under
from engine.metering.tenants import Tenant


async def caller_of(database: Database, key: Key) -> Caller:
    """A key with its tenant and the plan that applies to it: its own, or its tenant's.

    Raises:
        DatabaseError: the database fails.
    """
    async with database.reading() as connection:
        row = await _row(connection, schema.tenants, key.tenant_id)
        tenant = Tenant.model_validate(row)
        plan = await _plan(connection, key.plan_id or tenant.plan_id)
    return Caller(key=key, tenant=tenant, plan=plan)


async def key_standing(database: Database, named: str, now_ms: int) -> tuple[Caller, Standing | None]:
    """A key with its terms, and where it stands under its plan (None without one).

    Raises:
        AccessError: there is no such key, or there are several.
        DatabaseError: the database fails.
    """
    caller = await caller_of(database, await keys.find(database, named))
    return caller, await read_standing(database, caller, now_ms)


async def tenant_standing(
    database: Database, named: str, now_ms: int
) -> tuple[Tenant, Plan | None, Standing | None]:
    """A tenant with its plan, and where it stands; None where each of its keys has a standing of its own.

    Raises:
        AccessError: there is no such tenant.
        DatabaseError: the database fails.
    """
    tenant = await tenants.find(database, named)
    async with database.reading() as connection:
        plan = await _plan(connection, tenant.plan_id)
    if plan is None or plan.spec.counts != "tenant":
        return tenant, plan, None
    return tenant, plan, await standing_under(database, plan, tenant.id, now_ms)


async def _plan(connection: AsyncConnection, id: str | None) -> Plan | None:
    return None if id is None else Plan.model_validate(await _row(connection, schema.plans, id))


async def _row(connection: AsyncConnection, table: Table, id: str) -> dict[str, object]:
    return dict((await connection.execute(select(table).where(table.c.id == id))).mappings().one())
