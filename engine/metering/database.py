"""The database of keys, plans and the ledger: a SQLite file, or PostgreSQL where a URL names one.

SQLite runs in WAL mode with `synchronous=FULL`: what is committed survives a loss of power. Transactions say
beforehand whether they write: `writing()` takes SQLite's write lock at its begin (`BEGIN IMMEDIATE`), so
that two writers wait for each other instead of failing half-way.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from engine.config import Config

#: Longest wait for another writer of the file, and for a PostgreSQL server to answer, seconds.
_LOCK_S, _CONNECT_S, _STATEMENT_S = 10.0, 5.0, 30.0
#: Longest wait for another that makes a new file at this moment, seconds.
_WAL_S = 1.0
#: Most connections of one process.
_CONNECTIONS = 4
#: A server that starts, ends, or begins anew after one of its processes was killed.
_ANEW = ("starting up", "not yet accepting", "recovery mode", "shutting down", "another server process")
_POSTGRESQL = ("postgresql", "postgres", "postgresql+asyncpg")
_WRITES = "hearth_writes"


class DatabaseError(Exception):
    """The database cannot be used; the message names it, the reason and the next step."""


class DatabaseAwayError(DatabaseError):
    """It cannot be used for now (no connection, locked, read-only, full): the same may succeed later."""


class Database:
    """An engine and how to speak to it. Nothing is opened before the first transaction."""

    def __init__(self, url: str | URL) -> None:
        """`url` as `url_of` gives it.

        Raises:
            DatabaseError: it names no database that Hearth can use.
        """
        self.url = _checked(url)
        self.name = self.url.render_as_string(hide_password=True)
        if self.is_sqlite:
            self.name = str(self.url.database)
        self.engine: AsyncEngine = _make_engine(self.url)
        self._writer = self.engine.execution_options(**{_WRITES: True})
        # SQLite's transactions see one state anyway; PostgreSQL's do when asked.
        one_state = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        self._reader = self.engine.execution_options(**one_state)

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that sees one state of the database and writes nothing.

        Raises:
            DatabaseError: the database fails.
        """
        with self._explained():
            async with self._reader.begin() as connection:
                yield connection

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that writes; committed at its end, durable once this has returned.

        Raises:
            DatabaseError: the database fails; nothing was written.
            sqlalchemy.exc.IntegrityError: a row is there already, or names what is not.
        """
        with self._explained():
            async with self._writer.begin() as connection:
                yield connection

    async def close(self) -> None:
        await self.engine.dispose()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except (SQLAlchemyError, OSError) as error:
            raise explain(error, self.name) from error


def url_of(config: Config) -> URL:
    """Where this configuration keeps its database.

    Raises:
        DatabaseError: `metering.database_url` names none that Hearth can use.
    """
    if config.metering.database_url:
        return _checked(config.metering.database_url)
    return sqlite_url(config.database_file)


def sqlite_url(file: Path) -> URL:
    return URL.create("sqlite+aiosqlite", database=str(file))


def make_folder(url: URL) -> None:
    """Makes a SQLite file's folder, and the file so that only its owner may read it.

    Raises:
        DatabaseError: neither can be made.
    """
    if url.get_backend_name() != "sqlite" or url.database is None:
        return
    file = Path(url.database)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # SQLite gives its -wal and -shm files the same mode. A file that is there is not opened: to close it
        # would drop the locks of this process's connections, and another process would delete the -wal file
        # that they still write to (sqlite.org/howtocorrupt.html, 2.2).
        with contextlib.suppress(FileExistsError):
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        raise DatabaseError(
            f"The database {file} cannot be opened: {error.strerror}. Make {file.parent} writable for this "
            "user, or name another folder with `state_dir`."
        ) from error


def explain(error: Exception, name: str) -> DatabaseError:
    """What a person is told of a driver's error."""
    reason = " ".join(str(getattr(error, "orig", None) or error).split())
    known = _known(reason.lower())
    if known is not None:
        kind, next_step = known
        return kind(f"The database {name} cannot be used: {reason}. {next_step}")
    lost = isinstance(error, OSError | TimeoutError | PoolTimeoutError)
    lost = lost or (isinstance(error, DBAPIError) and error.connection_invalidated)
    if lost:
        return DatabaseAwayError(
            f"The database {name} cannot be reached: {reason or type(error).__name__}. Is its server "
            "running, and `metering.database_url` right?"
        )
    return DatabaseError(f"The database {name} failed: {reason}.")


def _known(reason: str) -> tuple[type[DatabaseError], str] | None:
    """The kind of a failure that is told by its text, and what to do about it."""
    away, lasting = DatabaseAwayError, DatabaseError
    steps: tuple[tuple[tuple[str, ...], type[DatabaseError], str], ...] = (
        (
            ("readonly", "read-only"),
            away,
            "Make the file and its folder writable for this user; nothing was written.",
        ),
        (("is full", "no space left"), away, "Free some disk space; nothing was written."),
        (("is locked",), away, "Another process holds it; end that, or try again."),
        (("disk i/o error",), away, "Look at the disk (and whether it is full); nothing was written."),
        (("unable to open",), away, "Is its folder there, and may this user read and write it?"),
        (
            ("not a database", "malformed"),
            lasting,
            "The file is damaged or something else: move it away and restore a backup.",
        ),
        (("password authentication", "no password"), lasting, "Check the user in `metering.database_url`."),
        (
            ("does not exist",),
            lasting,
            "Create it (createdb, createuser) or check the name in `metering.database_url`.",
        ),
        (
            (*_ANEW, "too many clients", "connection was closed", "is closed"),
            away,
            "Try again in a moment.",
        ),
    )
    for texts, kind, step in steps:
        if any(text in reason for text in texts):
            return kind, step
    return None


def _checked(url: str | URL) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        # The URL may hold a password: it is not repeated.
        raise DatabaseError(
            "metering.database_url is no URL. Write postgresql://user:password@host:5432/name, or leave it "
            "empty for SQLite."
        ) from error
    if parsed.drivername in _POSTGRESQL:
        return parsed.set(drivername="postgresql+asyncpg")
    if parsed.drivername == "sqlite+aiosqlite" and parsed.database:
        return parsed
    raise DatabaseError(
        f"metering.database_url begins with '{parsed.drivername}', which Hearth does not know. Write "
        "postgresql://user:password@host:5432/name, or leave it empty for SQLite."
    )


def _make_engine(url: URL) -> AsyncEngine:
    if url.get_backend_name() != "sqlite":
        return create_async_engine(
            url,
            pool_size=_CONNECTIONS,
            max_overflow=0,
            pool_pre_ping=True,
            pool_timeout=_STATEMENT_S,
            connect_args={"timeout": _CONNECT_S, "command_timeout": _STATEMENT_S},
        )
    engine = create_async_engine(
        url, pool_size=_CONNECTIONS, max_overflow=0, connect_args={"timeout": _LOCK_S}
    )
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # Transactions are begun by `_begin_sqlite`, not by the driver's guess.
    connection.isolation_level = None
    cursor = connection.cursor()
    until = time.monotonic() + _WAL_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            # Two that open a new file at once: for this change SQLite does not wait by itself.
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.005)
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
