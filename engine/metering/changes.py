"""Counters that say when something was changed, so that those who hold it in memory read it again."""

from __future__ import annotations

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering.schema import changes

#: Keys, tenants and plans.
ACCESS = "access"


async def bump(connection: AsyncConnection, name: str) -> int:
    """Counts a change and gives its number; seen by others when the transaction is committed.

    Done first in a transaction it is a lock too: on PostgreSQL the next one who counts waits for this one's
    end (SQLite has but one writer anyway), so that what is read after it stays true until it is written.
    """
    counted = update(changes).where(changes.c.name == name).values(version=changes.c.version + 1)
    version = (await connection.execute(counted.returning(changes.c.version))).scalar_one_or_none()
    if version is None:
        await connection.execute(insert(changes).values(name=name, version=1))
    return int(version or 1)


async def version_of(connection: AsyncConnection, name: str) -> int:
    """How often it was changed; 0 where it never was."""
    found = (await connection.execute(select(changes.c.version).where(changes.c.name == name))).scalar()
    return int(found or 0)
