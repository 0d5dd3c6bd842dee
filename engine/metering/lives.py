"""Which gateway workers live, told by the locks of their journals: no timeouts, no numbers of processes."""

from __future__ import annotations

import fcntl
import os
import secrets
from enum import Enum
from pathlib import Path

from engine.metering.journal import SUFFIX, JournalError

_HOME_FILE = "home"


class Life(Enum):
    ALIVE = "alive"
    DEAD = "dead"
    #: Its journal is kept in another folder, most likely on another machine: nobody here can tell.
    ELSEWHERE = "elsewhere"


class Lives:
    """The workers whose journals are in one folder.

    A worker that is written where several machines read it is named with its folder's own mark
    ("3f…/w-9c…"), so that each can tell its own dead from others' workers.
    """

    def __init__(self, folder: Path) -> None:
        """`folder`: where the journals are; it is made, and marked, where it is not.

        Raises:
            JournalError: it cannot be written.
        """
        self._folder = folder
        try:
            self._home = _mark(folder)
        except OSError as error:
            raise JournalError(
                f"the folder of journals {folder} cannot be used: {error.strerror}. Free the disk or "
                "mend its rights."
            ) from error

    def name(self, worker: str) -> str:
        """A worker of this folder, as others may read it."""
        return f"{self._home}/{worker}"

    def journal(self, name: str) -> Path | None:
        """The journal of a worker that was named by `name`; None where it is in another folder."""
        home, _, worker = name.partition("/")
        if home != self._home or not worker or "/" in worker:
            return None
        return self._folder / f"{worker}{SUFFIX}"

    def look(self, name: str) -> Life:
        """Whether a worker that was named by `name` lives."""
        file = self.journal(name)
        if file is None:
            return Life.ELSEWHERE
        try:
            handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return Life.DEAD
        try:
            # Shared, and let go at once: who wants to fold a dead worker's journal in tries again anyway.
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return Life.ALIVE
        finally:
            os.close(handle)
        return Life.DEAD


def _mark(folder: Path) -> str:
    """The folder's mark, made once by whoever comes first."""
    file = folder / _HOME_FILE
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            if mark := file.read_text().strip():
                return mark
        except FileNotFoundError:
            pass
        fresh = folder / f"{_HOME_FILE}.{os.getpid()}.{secrets.token_hex(4)}"
        fresh.write_text(secrets.token_hex(8))
        try:
            # A link, not a rename: the first one stays.
            os.link(fresh, file)
        except FileExistsError:
            # Empty: a crash of the file system took what was in it.
            if not file.read_text().strip():
                fresh.replace(file)
        finally:
            fresh.unlink(missing_ok=True)
