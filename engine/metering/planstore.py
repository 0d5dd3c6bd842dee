"""Plans in the database."""

from __future__ import annotations

import secrets

from sqlalchemy import delete as delete_rows
from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError

from engine.metering.changes import ACCESS, bump
from engine.metering.database import Database
from engine.metering.keys import now_ms
from engine.metering.lookup import ConflictError, checked_name, find_id
from engine.metering.plans import Plan, PlanSpec, check_unit
from engine.metering.schema import keys, plans, tenants


async def create(
    database: Database, name: str, spec: PlanSpec, *, unit: str = "credits", currency: str = ""
) -> Plan:
    """A new plan.

    Raises:
        PlanError: unit and currency do not belong together.
        AccessError: the name cannot be one or is taken.
        DatabaseError: the database fails.
    """
    check_unit(unit, currency)
    made = Plan.model_validate(
        {
            "id": f"plan_{secrets.token_hex(6)}",
            "name": checked_name(name),
            "unit": unit,
            "currency": currency,
            "spec": spec,
            "created_at": now_ms(),
        }
    )
    try:
        async with database.writing() as connection:
            version = await bump(connection, ACCESS)
            row = {**made.model_dump(mode="json"), "version": version}
            await connection.execute(insert(plans).values(**row))
    except IntegrityError as error:
        raise ConflictError(
            f"There is a plan '{made.name}' already. Change it, or take another name."
        ) from error
    return made


async def list_plans(database: Database) -> list[Plan]:
    """All plans, oldest first.

    Raises:
        DatabaseError: the database fails.
    """
    async with database.reading() as connection:
        rows = await connection.execute(select(plans).order_by(plans.c.created_at, plans.c.id))
        return [Plan.model_validate(dict(row)) for row in rows.mappings()]


async def find(database: Database, named: str) -> Plan:
    """A plan by id or name.

    Raises:
        NotFoundError: there is none.
        DatabaseError: the database fails.
    """
    async with database.reading() as connection:
        id = await find_id(connection, plans, named)
        row = (await connection.execute(select(plans).where(plans.c.id == id))).mappings().one()
        return Plan.model_validate(dict(row))


async def change(database: Database, named: str, spec: PlanSpec) -> Plan:
    """Gives a plan other terms, for requests from now on; its unit stays, since sums were made in it.

    Raises:
        NotFoundError: there is no such plan.
        DatabaseError: the database fails.
    """
    async with database.writing() as connection:
        version = await bump(connection, ACCESS)
        id = await find_id(connection, plans, named)
        terms = spec.model_dump(mode="json")
        await connection.execute(update(plans).where(plans.c.id == id).values(spec=terms, version=version))
    return await find(database, id)


async def delete(database: Database, named: str) -> Plan:
    """Removes a plan that nobody has; what was charged under it stays in the ledger.

    Raises:
        NotFoundError: there is no such plan.
        ConflictError: tenants or keys have it.
        DatabaseError: the database fails.
    """
    plan = await find(database, named)
    async with database.writing() as connection:
        await bump(connection, ACCESS)
        having = select(tenants.c.name).where(tenants.c.plan_id == plan.id)
        holders = list((await connection.execute(having)).scalars())
        having = select(keys.c.name).where(keys.c.plan_id == plan.id)
        holders += [f"key '{name}'" for name in (await connection.execute(having)).scalars()]
        if holders:
            raise ConflictError(
                f"The plan '{plan.name}' is that of {', '.join(holders[:5])}"
                f"{' and others' if len(holders) > 5 else ''}. Give them another plan first."
            )
        await connection.execute(delete_rows(plans).where(plans.c.id == plan.id))
    return plan
