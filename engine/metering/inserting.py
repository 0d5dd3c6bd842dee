"""How rows get into the ledger's table: many in one statement, each request id once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec
from sqlalchemy import Insert
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.metering import schema
from engine.metering.database import Database
from engine.metering.rows import COLUMNS, LedgerRow, encode, values

#: Rows of one SQLite statement; fewer are inserted one by one. SQLite takes 32 766 values in one.
_ROWS_OF_STATEMENTS = (256, 32)


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
    # In one order everywhere: two PostgreSQL transactions with common rows then wait instead of deadlocking.
    ordered = sorted([values(record) for record in records], key=_first)
    if connection.dialect.name == "postgresql":
        if ordered:
            await connection.exec_driver_sql(_of_json(), (msgspec.json.encode(ordered).decode(),))
        return
    place = 0
    for size in _ROWS_OF_STATEMENTS:
        while len(ordered) - place >= size:
            flat = [value for row in ordered[place : place + size] for value in row]
            await connection.exec_driver_sql(_of_values(size), tuple(flat))
            place += size
    if place < len(ordered):
        await connection.exec_driver_sql(_of_values(1), [tuple(row) for row in ordered[place:]])


def insert_ignoring(connection: AsyncConnection, table: Any) -> Insert:
    """An insert that leaves a row with the same primary key as it is, in the connection's dialect."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement: Insert = dialect.insert(table).on_conflict_do_nothing(index_elements=list(table.primary_key))
    return statement


def _first(row: list[Any]) -> Any:
    return row[0]


@cache
def _of_values(rows: int) -> str:
    """SQLite: the driver's loop over single rows would give up and take the interpreter's lock for each."""
    one = f"({', '.join('?' * len(COLUMNS))})"
    return (
        f"INSERT INTO ledger ({', '.join(COLUMNS)}) VALUES {', '.join([one] * rows)} "
        "ON CONFLICT (request_id) DO NOTHING"
    )


@cache
def _of_json() -> str:
    """PostgreSQL: all rows are one parameter, an array of arrays."""
    kinds = {
        name: column.type.compile(postgresql.dialect())  # type: ignore[no-untyped-call]
        for name, column in schema.ledger.columns.items()
    }
    picked = ", ".join(f"CAST(row->>{place} AS {kinds[name]})" for place, name in enumerate(COLUMNS))
    return (
        f"INSERT INTO ledger ({', '.join(COLUMNS)}) SELECT {picked} "
        "FROM json_array_elements(CAST($1 AS json)) WITH ORDINALITY AS rows(row, place) ORDER BY place "
        "ON CONFLICT (request_id) DO NOTHING"
    )
