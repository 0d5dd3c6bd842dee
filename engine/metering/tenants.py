"""Tenants: who owns keys and pays for them."""

from __future__ import annotations

import secrets

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError

from engine.metering.changes import ACCESS, bump
from engine.metering.database import Database
from engine.metering.keys import now_ms
from engine.metering.lookup import ConflictError, checked_name, find_id
from engine.metering.schema import plans, tenants


class Tenant(BaseModel):
    """A row of the table. Times are unix milliseconds."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    id: str
    name: str
    created_at: int
    plan_id: str | None = Field(default=None, description="None = no price and no limits.")
    closed_at: int | None = Field(default=None, description="Since when its keys are refused.")


async def create(database: Database, name: str, *, plan: str | None = None) -> Tenant:
    """A new tenant.

    Args:
        database: where.
        name: unique.
        plan: id or name; None = no price and no limits.

    Raises:
        AccessError: the name cannot be one or is taken, or there is no such plan.
        DatabaseError: the database fails.
    """
    name = checked_name(name)
    try:
        async with database.writing() as connection:
            version = await bump(connection, ACCESS)
            plan_id = None if plan is None else await find_id(connection, plans, plan)
            made = Tenant(
                id=f"tenant_{secrets.token_hex(6)}", name=name, created_at=now_ms(), plan_id=plan_id
            )
            await connection.execute(insert(tenants).values(**made.model_dump(), version=version))
    except IntegrityError as error:
        raise ConflictError(f"There is a tenant '{name}' already.") from error
    return made


async def list_tenants(database: Database) -> list[Tenant]:
    """All tenants, oldest first, closed ones too.

    Raises:
        DatabaseError: the database fails.
    """
    async with database.reading() as connection:
        rows = await connection.execute(select(tenants).order_by(tenants.c.created_at, tenants.c.id))
        return [Tenant.model_validate(dict(row)) for row in rows.mappings()]


async def find(database: Database, named: str) -> Tenant:
    """A tenant by id or name.

    Raises:
        NotFoundError: there is none.
        DatabaseError: the database fails.
    """
    async with database.reading() as connection:
        id = await find_id(connection, tenants, named)
        row = (await connection.execute(select(tenants).where(tenants.c.id == id))).mappings().one()
        return Tenant.model_validate(dict(row))


async def set_plan(database: Database, named: str, plan: str | None) -> Tenant:
    """Gives a tenant another plan, or none.

    Raises:
        NotFoundError: there is no such tenant or plan.
        DatabaseError: the database fails.
    """
    async with database.writing() as connection:
        version = await bump(connection, ACCESS)
        id = await find_id(connection, tenants, named)
        plan_id = None if plan is None else await find_id(connection, plans, plan)
        await connection.execute(
            update(tenants).where(tenants.c.id == id).values(plan_id=plan_id, version=version)
        )
    return await find(database, id)


async def close(database: Database, named: str) -> Tenant:
    """Refuses a tenant's keys from now on; its rows stay. One that is closed stays so.

    Raises:
        NotFoundError: there is no such tenant.
        DatabaseError: the database fails.
    """
    return await _set_closed(database, named, now_ms())


async def reopen(database: Database, named: str) -> Tenant:
    """Takes a closed tenant's keys again.

    Raises:
        NotFoundError: there is no such tenant.
        DatabaseError: the database fails.
    """
    return await _set_closed(database, named, None)


async def _set_closed(database: Database, named: str, at: int | None) -> Tenant:
    async with database.writing() as connection:
        version = await bump(connection, ACCESS)
        id = await find_id(connection, tenants, named)
        changed = update(tenants).where(tenants.c.id == id).values(closed_at=at, version=version)
        if at is not None:
            changed = changed.where(tenants.c.closed_at.is_(None))
        await connection.execute(changed)
    return await find(database, id)
