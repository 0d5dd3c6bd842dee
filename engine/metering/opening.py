"""The database as every process opens it: migrated, with the keys of an older Hearth taken in."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from sqlalchemy import select

from engine.config import Config
from engine.metering.changes import ACCESS, bump
from engine.metering.database import Database, url_of
from engine.metering.keys import Key, add
from engine.metering.keysfile import read_keys
from engine.metering.migrations import migrate
from engine.metering.schema import keys

log = logging.getLogger("hearth.keys")


@contextlib.asynccontextmanager
async def opened(config: Config) -> AsyncIterator[Database]:
    """The configured database, ready for use; closed at the end.

    Raises:
        DatabaseError: it cannot be opened or is of a newer schema.
        AccessError: an old keys.json cannot be read.
    """
    database = Database(url_of(config))
    try:
        await prepare(database, config)
        yield database
    finally:
        await database.close()


async def prepare(database: Database, config: Config) -> None:
    """Brings the schema up to date and takes in what an old keys.json holds.

    Raises:
        DatabaseError: it cannot be opened or is of a newer schema.
        AccessError: an old keys.json cannot be read.
    """
    await migrate(database)
    await import_file(database, config.keys_file)


async def import_file(database: Database, file: Path) -> int:
    """Takes in the keys of an old keys.json that the database does not know; the file stays as it is.

    A key that was revoked since is known, and so stays revoked. How many were taken in is returned.

    Raises:
        AccessError: the file cannot be read.
        DatabaseError: the database fails.
    """
    found = read_keys(file)
    if not found:
        return 0
    async with database.reading() as connection:
        known = set((await connection.execute(select(keys.c.sha256))).scalars())
    if all(entry.sha256 in known for entry in found):
        return 0
    async with database.writing() as connection:
        version = await bump(connection, ACCESS)
        known = set((await connection.execute(select(keys.c.sha256))).scalars())
        ids = set((await connection.execute(select(keys.c.id))).scalars())
        fresh = {entry.sha256: entry for entry in found if entry.sha256 not in known}
        for entry in fresh.values():
            id = entry.id if entry.id not in ids and 0 < len(entry.id) <= 64 else f"key_{entry.sha256[:12]}"
            await add(
                connection,
                Key(
                    id=id,
                    tenant_id="default",
                    name=entry.name[:200] or "default",
                    prefix=entry.prefix[:16],
                    sha256=entry.sha256,
                    created_at=entry.created * 1000,
                ),
                version,
            )
            ids.add(id)
    log.info("took in %d keys of %s; from now on keys are kept in %s", len(fresh), file, database.name)
    return len(fresh)
