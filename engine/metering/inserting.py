"""How rows get into the ledger's table: many in one statement, each request id once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Insert
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering import schema
from engine.metering.database import Database
from engine.metering.rows import COLUMNS, LedgerRow, encode, joined


async def write_rows(database: Database, rows: Sequence[LedgerRow]) -> None:
    """Adds rows in one transaction; those whose request id is there already are left as they are.

    Raises:
        DatabaseError, SQLAlchemyError, OSError: nothing is known to be written.
    """
    await write_encoded(database, [encode(row) for row in rows])


async def write_encoded(database: Database, records: Sequence[bytes]) -> None:
    """As `write_rows`, of what `rows.encode` made.

    Raises:
        DatabaseError, SQLAlchemyError, OSError: nothing is known to be written.
        msgspec.DecodeError: one is no row; nothing was written.
    """
    async with database.writing() as connection:
        await insert_encoded(connection, records)


async def insert_rows(connection: AsyncConnection, rows: Sequence[LedgerRow]) -> None:
    """As `write_rows`, within a transaction of the caller."""
    await insert_encoded(connection, [encode(row) for row in rows])


async def insert_encoded(connection: AsyncConnection, records: Sequence[bytes]) -> None:
    """As `write_encoded`, within a transaction of the caller."""
    if not records:
        return
    statement = _OF_JSON[connection.dialect.name]
    await connection.exec_driver_sql(statement, (joined(records),))


def insert_ignoring(connection: AsyncConnection, table: Any) -> Insert:
    """An insert that leaves a row with the same primary key as it is, in the connection's dialect."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement: Insert = dialect.insert(table).on_conflict_do_nothing(index_elements=list(table.primary_key))
    return statement


def _statement(picked: Sequence[str], rows: str) -> str:
    """All rows are one parameter, an array of arrays: a statement a row would keep the interpreter busy.

    They are added in one order everywhere: two PostgreSQL transactions with common rows then wait instead of
    deadlocking.
    """
    return (
        f"INSERT INTO ledger ({', '.join(COLUMNS)}) SELECT {', '.join(picked)} FROM {rows} ORDER BY 1 "
        "ON CONFLICT (request_id) DO NOTHING"
    )


def _kind(name: str) -> str:
    """A column's type in PostgreSQL."""
    return schema.ledger.columns[name].type.compile(postgresql.dialect())  # type: ignore[no-untyped-call]


#: By dialect; the column's place in a row is counted from 0.
_OF_JSON = {
    "sqlite": _statement(
        [f"json_extract(value, '$[{place}]')" for place in range(len(COLUMNS))], "json_each(?) WHERE true"
    ),
    "postgresql": _statement(
        [f"CAST(value->>{place} AS {_kind(name)})" for place, name in enumerate(COLUMNS)],
        "json_array_elements(CAST($1 AS json))",
    ),
}
