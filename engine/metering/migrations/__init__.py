"""The schema's history, by Alembic, and how a database is brought to the newest state.

A fresh database gets the tables of `engine.metering.schema` at once; an older one is led through
`versions/`. That both end at the same tables is held by a test. To change the schema: change schema.py, add
`versions/vNNNN_what.py`, add its number to `REVISIONS`.
"""

from __future__ import annotations

import time
from pathlib import Path

from sqlalchemy import Connection, insert, inspect, text

from engine.metering.changes import ACCESS
from engine.metering.database import Database, DatabaseError, make_folder
from engine.metering.schema import changes, metadata, tenants

#: From the first to the newest. Alembic itself (0.15 s to import) is asked only where there is work for it.
REVISIONS = ("0001", "0002", "0003")
_TABLE = "alembic_version"
#: Any number of our own: PostgreSQL's name of the lock under which one process at a time migrates.
_ADVISORY_LOCK = 0x48656172


async def migrate(database: Database) -> None:
    """Brings a database to the newest schema, whoever else does so at the same time.

    Raises:
        DatabaseError: it cannot be opened or written, or its schema is newer than this Hearth knows.
    """
    make_folder(database.url)
    async with database.reading() as connection:
        found = await connection.run_sync(_revision)
    if _is_newest(found, database.name):
        return
    async with database.writing() as connection:
        if not database.is_sqlite:
            await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _ADVISORY_LOCK})
        await connection.run_sync(_upgrade, database.name)


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table(_TABLE):
        return None
    return connection.execute(text(f"SELECT version_num FROM {_TABLE}")).scalar_one_or_none()


def _is_newest(found: str | None, name: str) -> bool:
    if found is not None and found not in REVISIONS:
        raise DatabaseError(
            f"The database {name} has schema {found}, newer than this Hearth knows ({REVISIONS[-1]}). "
            "Run the newer Hearth, or restore the backup made before it; nothing was changed."
        )
    return found == REVISIONS[-1]


def _upgrade(connection: Connection, name: str) -> None:
    # Another process may have been faster.
    found = _revision(connection)
    if _is_newest(found, name):
        return
    if found is None:
        metadata.create_all(connection)
        connection.execute(text(f"CREATE TABLE {_TABLE} (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
        connection.execute(
            text(f"INSERT INTO {_TABLE} (version_num) VALUES (:revision)"), {"revision": REVISIONS[-1]}
        )
        _seed(connection)
        return
    upgrade_through(connection)


def _seed(connection: Connection) -> None:
    """What is there from the first day: whose keys those are that nobody gave a tenant."""
    at = int(time.time() * 1000)
    connection.execute(insert(tenants).values(id="default", name="default", created_at=at, version=1))
    connection.execute(insert(changes).values(name=ACCESS, version=1))


def upgrade_through(connection: Connection, revision: str = "head") -> None:
    """Runs Alembic's migrations on a connection, inside its transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
