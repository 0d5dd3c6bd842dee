"""The database: brought to the newest schema by whoever comes first; failures are told, nothing is lost."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event, inspect, text

from engine.config import Config
from engine.metering import keys, migrations
from engine.metering.database import (
    Database,
    DatabaseAwayError,
    DatabaseError,
    explain,
    sqlite_url,
    url_of,
)
from engine.metering.migrations import REVISIONS, migrate, upgrade_through
from engine.metering.opening import opened
from engine.metering.schema import ledger, metadata


async def tables(database: Database) -> dict[str, list[str]]:
    """Every table's columns, indexes and constraints by name, as the database tells them."""

    def look(connection):  # type: ignore[no-untyped-def]
        told = inspect(connection)
        return {
            table: sorted(
                [f"{c['name']} {c['type']} {c['nullable']}" for c in told.get_columns(table)]
                + [f"index {i['name']}" for i in told.get_indexes(table)]
                + [f"foreign key {f['name']}" for f in told.get_foreign_keys(table)]
                + [f"unique {u['name']}" for u in told.get_unique_constraints(table)]
                + [f"check {c['name']}" for c in told.get_check_constraints(table)]
                + [f"primary key {told.get_pk_constraint(table)['constrained_columns']}"]
            )
            for table in told.get_table_names()
            if table != "alembic_version"
        }

    async with database.reading() as connection:
        return await connection.run_sync(look)


async def test_the_migrations_end_at_the_schema(url: str) -> None:
    database = Database(url)
    async with database.writing() as connection:
        await connection.run_sync(upgrade_through)
    async with database.reading() as connection:
        left = await connection.run_sync(
            lambda c: compare_metadata(MigrationContext.configure(c, opts={"compare_type": True}), metadata)
        )
    assert left == []
    migrated = await tables(database)
    async with database.writing() as connection:
        await connection.run_sync(metadata.drop_all)
        await connection.run_sync(metadata.create_all)
    assert migrated == await tables(database)
    await database.close()


async def test_a_database_of_the_first_schema_keeps_its_rows(url: str) -> None:
    database = Database(url)
    async with database.writing() as connection:
        await connection.run_sync(upgrade_through, "0001")
        await connection.execute(
            text(
                "INSERT INTO ledger (request_id, key_id, tenant_id, model, category, charge, unit, status, "
                "at, worker, period) "
                "VALUES ('r', 'k', 't', 'm', 'chat', 3, 'EUR', 'answered', 1, 'w', '2026-11')"
            )
        )
    await migrate(database)
    async with database.reading() as connection:
        found = (await connection.execute(ledger.select())).mappings().one()
    assert (found["request_id"], found["charge"], found["included"]) == ("r", 3, False)
    await database.close()


def test_every_migration_is_named() -> None:
    script = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert [found.revision for found in script.walk_revisions()][::-1] == list(REVISIONS)


async def test_a_fresh_database_is_made_by_several_at_once_and_once(url: str) -> None:
    several = [Database(url) for _ in range(4)]
    await asyncio.gather(*(migrate(each) for each in several))
    async with several[0].reading() as connection:
        assert (await connection.execute(text("SELECT version_num FROM alembic_version"))).all() == [
            (REVISIONS[-1],)
        ]
        assert (await connection.execute(text("SELECT id FROM tenants"))).all() == [("default",)]
    for each in several:
        await each.close()


async def test_a_newer_schema_is_refused_and_left_alone(url: str) -> None:
    database = Database(url)
    await migrate(database)
    async with database.writing() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseError, match=r"schema 9999, newer than this Hearth knows \(0003\)"):
        await migrate(database)
    await database.close()


async def test_what_was_committed_is_there_after_a_reopening(url: str) -> None:
    for expected in (0, 1):
        database = Database(url)
        await migrate(database)
        assert len(await keys.list_keys(database)) == expected
        await keys.create(database)
        await database.close()


async def test_a_failed_transaction_leaves_nothing(url: str) -> None:
    database = Database(url)
    await migrate(database)
    with pytest.raises(RuntimeError):
        async with database.writing() as connection:
            await connection.execute(text("DELETE FROM tenants"))
            raise RuntimeError
    with pytest.raises(DatabaseError, match="failed"):
        async with database.writing() as connection:
            await connection.execute(text("DELETE FROM tenants"))
            await connection.execute(text("no such statement"))
    async with database.reading() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM tenants"))).scalar() == 1
    await database.close()


async def test_a_reader_sees_one_state(url: str) -> None:
    database = Database(url)
    await migrate(database)
    async with database.reading() as connection:
        count = text("SELECT count(*) FROM keys")
        before = (await connection.execute(count)).scalar()
        await keys.create(database)
        assert (await connection.execute(count)).scalar() == before == 0
    assert len(await keys.list_keys(database)) == 1
    await database.close()


async def test_writers_wait_for_each_other(url: str) -> None:
    """Read, then write: with a lock taken too late, SQLite would refuse one and PostgreSQL lose it."""
    several = [Database(url) for _ in range(4)]
    await migrate(several[0])
    made = await asyncio.gather(*(keys.create(each, name=f"{i}") for i in range(5) for each in several))
    assert len(await keys.list_keys(several[0])) == len(made) == 20
    async with several[0].reading() as connection:
        counted = (
            await connection.execute(text("SELECT version FROM changes WHERE name = 'access'"))
        ).scalar()
    assert counted == 21
    for each in several:
        await each.close()


async def test_sqlite_is_durable(tmp_path: Path) -> None:
    async with opened(Config(state_dir=tmp_path)) as database, database.reading() as connection:
        assert (await connection.execute(text("PRAGMA journal_mode"))).scalar() == "wal"
        assert (await connection.execute(text("PRAGMA synchronous"))).scalar() == 2
        assert (await connection.execute(text("PRAGMA foreign_keys"))).scalar() == 1


async def test_to_migrate_again_keeps_the_locks_of_what_is_open(tmp_path: Path) -> None:
    file = tmp_path / "hearth.db"
    database = Database(sqlite_url(file))
    try:
        await migrate(database)
        async with database.reading() as connection:
            await connection.execute(text("SELECT count(*) FROM tenants"))
        await migrate(database)
        # Another process, the last one as far as locks tell, would take the -wal file away with it.
        command = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute(sys.argv[2]); c.commit()"
        insert = "INSERT INTO tenants (id, name, created_at, version) VALUES ('t', 't', 1, 1)"
        other = await asyncio.create_subprocess_exec(sys.executable, "-c", command, str(file), insert)
        assert await other.wait() == 0
        assert file.with_name("hearth.db-wal").exists()
        async with database.reading() as connection:
            found = await connection.execute(text("SELECT count(*) FROM tenants WHERE id = 't'"))
            assert found.scalar_one() == 1
    finally:
        await database.close()


async def test_a_damaged_file_is_told_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "hearth.db"
    file.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(DatabaseError, match=r"hearth\.db cannot be used: file is not a database.*backup"):
        async with opened(Config(state_dir=tmp_path)):
            pass
    assert file.read_bytes().startswith(b"this is no")


async def test_a_full_disk_is_told_and_nothing_is_half_written(tmp_path: Path) -> None:
    async with opened(Config(state_dir=tmp_path)) as database:
        async with database.writing() as connection:
            pages = (await connection.execute(text("PRAGMA page_count"))).scalar()
            # As full as a disk without room for one page more; set on this pooled connection.
            await connection.execute(text(f"PRAGMA max_page_count = {pages}"))
        with pytest.raises(DatabaseAwayError, match=r"is full.*Free some disk space"):
            for number in range(1000):
                await keys.create(database, name=f"{number:0200}")
        kept = await keys.list_keys(database)
        async with database.writing() as connection:
            await connection.execute(text(f"PRAGMA max_page_count = {10**6}"))
        await keys.create(database)
        assert len(await keys.list_keys(database)) == len(kept) + 1


async def test_a_read_only_database_is_read_and_writing_it_is_told(tmp_path: Path) -> None:
    async with opened(Config(state_dir=tmp_path)) as database:
        await keys.create(database)
    database = Database(sqlite_url(tmp_path / "hearth.db"))

    # The file's mode would not hold the root user back; this holds anybody, with the same failure.
    @event.listens_for(database.engine.sync_engine, "connect")
    def read_only(connection: Any, _record: object) -> None:
        connection.cursor().execute("PRAGMA query_only = ON")

    await migrate(database)
    assert len(await keys.list_keys(database)) == 1
    with pytest.raises(DatabaseAwayError, match=r"attempt to write a readonly database.*Make the file"):
        await keys.create(database)
    await database.close()


async def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatabaseError, match="cannot be opened: Not a directory"):
        async with opened(Config(state_dir=tmp_path / "file" / "deep")):
            pass


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://user:secret@127.0.0.1:1/hearth", "cannot be reached.*Is its server running"),
        ("mysql://user:secret@127.0.0.1/hearth", "begins with 'mysql'"),
        ("secret", "is no URL"),
    ],
)
async def test_a_database_that_is_not_there_is_told_without_its_password(url: str, told: str) -> None:
    config = Config.model_validate({"metering": {"database_url": url}})
    assert "secret" not in repr(config)
    with pytest.raises(DatabaseError, match=told) as caught:
        async with opened(config):
            pass
    assert "secret" not in str(caught.value)


async def test_a_missing_postgresql_database_is_told(postgresql: object) -> None:
    database = Database(postgresql.get_uri(database="nowhere"))  # type: ignore[attr-defined]
    with pytest.raises(DatabaseError, match=r'"nowhere" does not exist.*Create it'):
        await migrate(database)
    await database.close()


def test_where_the_database_is(tmp_path: Path) -> None:
    assert url_of(Config(state_dir=tmp_path)).database == str(tmp_path / "hearth.db")
    for url in ("postgres://h/x", "postgresql://h/x", "postgresql+asyncpg://h/x"):
        config = Config.model_validate({"metering": {"database_url": url}})
        assert url_of(config).drivername == "postgresql+asyncpg"


def test_an_unknown_failure_keeps_its_reason() -> None:
    told = explain(ValueError("something new"), "hearth.db")
    assert "hearth.db failed: something new" in str(told) and not isinstance(told, DatabaseAwayError)


@pytest.mark.parametrize(
    "reason",
    [
        "the database system is starting up",
        "the database system is not yet accepting connections",
        "the database system is in recovery mode",
        "terminating connection because of crash of another server process",
    ],
)
def test_a_server_that_begins_anew_is_away_for_now(reason: str) -> None:
    assert isinstance(explain(ValueError(reason), "hearth"), DatabaseAwayError)
